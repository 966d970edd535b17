"""Commands that ask whether attention is on the right thing, and whether it matters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import progress_bar
from lerobot_attn.cli.options import ConditionName, SettingsFile, Successes, TaskText, part_of
from lerobot_attn.errors import RANDOM_WEIGHTS


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def experiment(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE.yaml", help="The plan; configs/experiment has some to begin with.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to record into.")],
    no_control: Annotated[
        bool, typer.Option("--no-control", help="Let conditions pass that have no control.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only print the conditions, their commands and the number of episodes."
        ),
    ] = False,
) -> None:
    """Evaluate a policy in several conditions, from the same initial states and with the same noise.

    The plan's values can be given here: policy.path=CHECKPOINT n_episodes=20 env.task_ids=[0,3]. What is
    complete in the folder is kept, so the same command goes on where it was interrupted.
    """
    from lerobot_attn.plugin.experiment import ExperimentPlan, run_experiment

    values = {"no_control": True} if no_control else {}
    plan = ExperimentPlan.from_yaml(file, context.args, **values)
    raise typer.Exit(run_experiment(plan, output, dry_run=dry_run, say=lambda line: print(line, flush=True)))


@app.command()
def effects(
    path: Annotated[Path, typer.Argument(help="An experiment's output folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the report. Default: effects in PATH.")
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Of the intervals over initial states.")] = None,
    near: Annotated[
        float | None,
        typer.Option(help="Metres: an object that the end effector never came nearer to was not approached."),
    ] = None,
    lifted: Annotated[
        float | None, typer.Option(help="Metres: an object that rose by this was lifted.")
    ] = None,
    settings: SettingsFile = None,
) -> None:
    """Compare an experiment's conditions pair by pair: success, actions, what was approached, paths.

    Writes effects.csv (condition minus control with bootstrap intervals and p), a figure, and a report with a
    sentence for each comparison. Where a plan has doses and random draws also doses.csv, a figure of them,
    and verdicts in the plan's outcome.
    """
    from lerobot_attn.report import EffectsSettings, write_effects
    from lerobot_attn.settings import load_settings
    from lerobot_attn.store.runs import open_run

    chosen = load_settings(EffectsSettings, settings, confidence=confidence, near=near, lifted=lifted)
    with progress_bar("Reading") as progress:
        found, files = write_effects(open_run(path), output or path / "effects", chosen, progress)
    for note in found.notes:
        print(note, file=sys.stderr)
    print("\n".join(found.sentences))
    print("\n".join(f"Wrote {file}" for file in files))


@app.command()
def ground(
    path: Annotated[
        Path,
        typer.Argument(help="A run's output folder, a task's folder, or an episode (….zarr); with masks."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for figures, tables and page.")
    ] = Path("grounding"),
    role: Annotated[
        str | None,
        typer.Option(help="Whose mask: target (default), destination, distractor, robot or background."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What layers and heads are ranked by: mass (share inside, default), concentration, iou, "
            "peak_hit or centre_distance."
        ),
    ] = None,
    camera: Annotated[
        list[str] | None,
        typer.Option(help="Camera, by the end of its name; may be repeated. Default: all that have masks."),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Layers: a list as 0,4 or a range as 0-3. Default: all.")
    ] = None,
    denoise_step: Annotated[
        int | None,
        typer.Option(help="Denoise step of the ranking, negative from the last. Default: last stored."),
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="Action token: executed (mean, default), mean of all, or a number.")
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Of the intervals over episodes.")] = None,
    task: TaskText = None,
    success: Successes = None,
    condition: ConditionName = None,
    settings: SettingsFile = None,
) -> None:
    """Say which layers and heads are on the target, against chance, and write a report.

    Needs masks: record with --eval.attention.segmentation=true, or attach them with lerobot-attn masks. Each
    number stands beside three levels of chance: a uniform map, the policy's own mean map over other episodes,
    and a centre prior. The best layer and head is chosen on half of the episodes and reported on the others.
    """
    from lerobot_attn.report import GroundSettings, write_grounding
    from lerobot_attn.report.grounding_page import sentence
    from lerobot_attn.settings import load_settings
    from lerobot_attn.store.runs import open_run

    chosen = load_settings(
        GroundSettings,
        settings,
        role=role,
        metric=metric,
        cameras=tuple(camera) if camera else None,
        layer=layer,
        denoise_step=denoise_step,
        query=query,
        confidence=confidence,
    )
    run = part_of(open_run(path), task, success, condition)
    with progress_bar("Grounding") as progress:
        found, files = write_grounding(run, output, chosen, progress)
    for note in (*found.notes, *([RANDOM_WEIGHTS] if found.has_random_weights else [])):
        print(note, file=sys.stderr)
    print(sentence(found))
    print("\n".join(f"Wrote {file}" for file in files))
