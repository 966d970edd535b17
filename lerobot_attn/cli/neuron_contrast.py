"""Commands that ask which neurons differ between two groups, and what can be read where."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lerobot_attn.cli.messages import progress_bar
from lerobot_attn.cli.neurons import neurons
from lerobot_attn.cli.options import ConditionName, SettingsFile, Successes, TaskText, part_of, whole_numbers
from lerobot_attn.errors import ConfigError

RunPath = Annotated[Path, typer.Argument(help="A run's output folder, or a task's folder; with neurons.")]
Stream = Annotated[str | None, typer.Option(help="vlm or expert. Default: both.")]
Layers = Annotated[str | None, typer.Option("--layers", help="Layers, as 0,4 or 0-3. Default: all recorded.")]
Groups = Annotated[
    list[str] | None,
    typer.Option(
        "--group",
        help="Tokens: a camera (by the end of its name), task, state, template or actions; may be repeated. "
        "Default: all.",
    ),
]
Reduction = Annotated[str | None, typer.Option(help="Over the tokens of a group: mean (default) or max.")]
Confidence = Annotated[float | None, typer.Option(help="Of the intervals over episodes.")]
Seed = Annotated[int | None, typer.Option(help="Seed of all draws.")]


@neurons.command()
def contrast(
    path: RunPath,
    other: Annotated[
        Path | None, typer.Argument(metavar="[B]", help="Another run, with which the first is compared.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for table, figure and page.")] = Path(
        "contrast"
    ),
    by: Annotated[
        str | None,
        typer.Option(
            help="What tells the groups of one run apart: success, phase=carry, condition=NAME, "
            "eef_z>median (or any number of the state), lift_height>task_median (of the episode), time<0.5, "
            "distance:target<0.1, FILE.csv:COLUMN>2 (rows by episode and, perhaps, frame).",
        ),
    ] = None,
    during: Annotated[
        str | None, typer.Option(help="Only inferences of which this holds, e.g. phase=carry.")
    ] = None,
    residuals: Annotated[
        bool | None, typer.Option("--residuals", help="Features of the residual stream instead of neurons.")
    ] = None,
    stream: Stream = None,
    layers: Layers = None,
    group: Groups = None,
    reduction: Reduction = None,
    denoise_step: Annotated[
        str | None, typer.Option(help="Of the expert: a number, negative from the last, or mean (default).")
    ] = None,
    top: Annotated[int | None, typer.Option(help="Rows of the table. Default: 500.")] = None,
    chosen: Annotated[
        int | None, typer.Option(help="Units chosen on half of the episodes, to be measured on the other.")
    ] = None,
    permutations: Annotated[int | None, typer.Option(help="Permutations of the labels.")] = None,
    confidence: Confidence = None,
    seed: Seed = None,
    settings: SettingsFile = None,
    task: TaskText = None,
    success: Successes = None,
    condition: ConditionName = None,
) -> None:
    """Say which neurons fire differently in two groups of episodes, or of moments.

    Every unit's area under the curve (0.5 is chance), with intervals over episodes, p corrected for all that
    were tried, and the area on episodes that a unit was not chosen on. Writes contrast.csv, which other
    commands take as a found set, a figure and a page.
    """
    from lerobot_attn.report.contrast import ContrastSettings, sentences, write_contrast
    from lerobot_attn.settings import load_settings
    from lerobot_attn.store.runs import open_run

    chosen_settings = load_settings(
        ContrastSettings,
        settings,
        residuals=residuals,
        stream=stream,
        layers=_numbers(layers),
        groups=tuple(group) if group else None,
        reduction=reduction,
        denoise_step=_step(denoise_step, ("mean",)),
        during=during,
        top=top,
        n_chosen=chosen,
        n_permutations=permutations,
        confidence=confidence,
        seed=seed,
    )
    run, second = (
        None if one is None else part_of(open_run(one), task, success, condition) for one in (path, other)
    )
    assert run is not None
    with progress_bar("Comparing") as progress:
        found, files = write_contrast(
            run,
            second,
            by,
            output,
            chosen_settings,
            progress,
        )
    _say((*found.notes, *found.remarks), sentences(found), files)


@neurons.command()
def probe(
    path: RunPath,
    what: Annotated[
        str,
        typer.Option(
            help="What to read: a number of the state (eef_z), phase, success, reward, distance:target, "
            "position:INSTANCE.z, FILE.csv:COLUMN, or a comparison (eef_z>median)."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for table, figure and page.")] = Path(
        "probes"
    ),
    fit: Annotated[
        str | None, typer.Option(help="regression, classification, or auto (by the values, default).")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="neurons, residual or both (default).")] = None,
    stream: Stream = None,
    layers: Layers = None,
    group: Groups = None,
    reduction: Reduction = None,
    denoise_step: Annotated[
        str | None,
        typer.Option(help="Of the expert: a number, negative from the last, mean (default) or all."),
    ] = None,
    shuffles: Annotated[int | None, typer.Option(help="Shuffled controls. Default: 20.")] = None,
    folds: Annotated[
        int | None, typer.Option(help="Parts of the episodes that are held out in turn.")
    ] = None,
    confidence: Confidence = None,
    seed: Seed = None,
    settings: SettingsFile = None,
    task: TaskText = None,
    success: Successes = None,
    condition: ConditionName = None,
) -> None:
    """Say what a linear probe can read from which layer, beside shuffled labels.

    Trained on some episodes and scored on others. Writes probe.csv, a figure and a page. Needs scikit-learn:
    pip install 'lerobot_policy_attn[neurons]'.
    """
    from lerobot_attn.report.probes import ProbeSettings, sentences, write_probes
    from lerobot_attn.settings import load_settings
    from lerobot_attn.store.runs import open_run

    chosen_settings = load_settings(
        ProbeSettings,
        settings,
        kind=kind,
        task=fit,
        stream=stream,
        layers=_numbers(layers),
        groups=tuple(group) if group else None,
        reduction=reduction,
        denoise_step=_step(denoise_step, ("mean", "all")),
        n_shuffles=shuffles,
        n_folds=folds,
        confidence=confidence,
        seed=seed,
    )
    run = part_of(open_run(path), task, success, condition)
    with progress_bar("Probing") as progress:
        found, files = write_probes(run, what, output, chosen_settings, progress)
    _say((*found.notes, *found.remarks), sentences(found), files)


def _say(notes: tuple[str, ...], said: list[str], files: list[Path]) -> None:
    for note in notes:
        print(note, file=sys.stderr)
    print("\n".join(said))
    print("\n".join(f"Wrote {file}" for file in files))


def _numbers(text: str | None) -> tuple[int, ...] | None:
    found = whole_numbers("--layers", text)
    return None if found is None else tuple(found)


def _step(text: str | None, words: tuple[str, ...]) -> Any:
    if text is None or text in words:
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"--denoise-step: got {text!r}, expected a number or {' or '.join(words)}"
        ) from None
