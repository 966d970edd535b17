"""What linear probes read from a policy's layers, as table, figure and page.

    found, files = write_probes(open_run("out"), "eef_z", "probes")

Reads the stores of a run; the numbers are those of `analysis.probes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from lerobot_attn import figures
from lerobot_attn.analysis.neurons import HOW, Choice, blocks_of
from lerobot_attn.analysis.probes import Draws, Probes, probe, scikit_learn
from lerobot_attn.analysis.quantities import Rule
from lerobot_attn.errors import RANDOM_WEIGHTS, SelectionError
from lerobot_attn.figures.canvas import Caption
from lerobot_attn.figures.neurons import probe_figure
from lerobot_attn.report.neuron_labels import labels_of, make_folder, readable, values_of
from lerobot_attn.report.page import Page
from lerobot_attn.settings import check_choice, check_ranges
from lerobot_attn.sizes import Progress
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.runs import Run

_SHOWN = 10  # places on the page
_KINDS = ("neurons", "residual")


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Settings of `lerobot-attn neurons probe`."""

    # neurons, residual, or both.
    kind: str = "both"
    # regression, classification, or auto: by the values.
    task: str = "auto"
    # vlm or expert; null: both.
    stream: str | None = None
    # Layers; null: all that were recorded.
    layers: tuple[int, ...] | None = None
    # Token groups: cameras' names, task, state, template, actions; null: all.
    groups: tuple[str, ...] | None = None
    # Over the group's tokens: mean or max.
    reduction: str = "mean"
    # Denoise step of the expert, the mean over steps, or all: each by itself.
    denoise_step: int | str = "mean"
    # Parts of the episodes, each scored by a probe trained on the others.
    n_folds: int = 5
    # Shuffled controls; 19 are the fewest that can give a p of 0.05.
    n_shuffles: int = 20
    # Resamples and confidence of the intervals over episodes.
    n_resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0
    # Width of the figure, inches, and its dots per inch.
    width: float = 7.0
    dpi: int = 200

    _ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "n_folds": (2, 1000),
        "n_shuffles": (1, 10_000),
        "n_resamples": (100, 1_000_000),
        "confidence": (0.5, 0.999),
        "seed": (0, 2**32 - 1),
        "width": (2, 30),
        "dpi": (30, 1200),
    }

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: a value is out of its range, or not one of its words.
        """
        check_ranges(self, self._ranges)
        check_choice(self, "kind", (*_KINDS, "both"))
        check_choice(self, "task", ("auto", "regression", "classification"))
        check_choice(self, "reduction", ("mean", "max"))


class FoundProbes(NamedTuple):
    """What probes read of one quantity.

    Attributes:
        probes: the numbers.
        what: the quantity.
        settings: how they were made.
        notes: what was left out.
        remarks: what is to be said of the policy.
    """

    probes: Probes
    what: str
    settings: ProbeSettings
    notes: tuple[str, ...]
    remarks: tuple[str, ...]


def find_probes(
    run: Run, what: str, settings: ProbeSettings | None = None, progress: Progress | None = None
) -> FoundProbes:
    """Probe a run's neurons and residuals for a quantity.

    Args:
        run: a run.
        what: the quantity (`analysis.quantities.quantity`), FILE.csv:COLUMN, or a rule such as
            "eef_z>median".
        settings: how.
        progress: called as `progress(done, total)`.

    Raises:
        SelectionError: nothing was recorded, the quantity is not known, or there are fewer than four
        episodes. SetupError: scikit-learn is not installed.
    """
    scikit_learn()
    settings = settings or ProbeSettings()
    side = readable(run)
    choices = _choices(settings, side.episodes[0])
    rule, text = Rule.parse(what), what
    values: Sequence[Any]
    if rule.sign:
        values, text = labels_of(what, side.episodes)
    else:
        values = values_of(rule.name, side.episodes)
    found = probe(
        side.episodes,
        values,
        choices,
        task=None if settings.task == "auto" else settings.task,  # type: ignore[arg-type]
        draws=Draws(
            n_folds=settings.n_folds,
            n_shuffles=settings.n_shuffles,
            n_resamples=settings.n_resamples,
            confidence=settings.confidence,
            seed=settings.seed,
        ),
        progress=progress,
    )
    return FoundProbes(found, text, settings, (*side.notes, *found.notes), side.remarks)


def _choices(settings: ProbeSettings, episode: Episode) -> list[Choice]:
    """Return what to probe; of "both" kinds, what was recorded."""
    of = Choice(
        stream=settings.stream,
        layers=settings.layers,
        groups=settings.groups,
        reductions=(settings.reduction,),
        denoise_step=settings.denoise_step,  # type: ignore[arg-type]  # checked where the steps are known
    )
    data = episode.arrays
    wanted = [kind for kind in _KINDS if settings.kind in (kind, "both")]
    there = [kind for kind in wanted if any(f"{stream}_{kind}" in data for stream in ("vlm", "expert"))]
    if not there:
        raise SelectionError(
            f"{episode.path}: holds no {' and no '.join(wanted)}; record with "
            f"{' or '.join(HOW[kind] for kind in wanted)} (or some layers)"
        )
    choices = [replace(of, kind=kind) for kind in there]  # type: ignore[arg-type]
    for choice in choices:
        blocks_of(data, choice)
    return choices


def write_probes(
    run: Run,
    what: str,
    folder: str | Path,
    settings: ProbeSettings | None = None,
    progress: Progress | None = None,
) -> tuple[FoundProbes, list[Path]]:
    """Write `probe.csv`, `probe.png`, `report.md` and `report.html`.

    Args:
        run: a run.
        what: the quantity.
        folder: where to; it is made when the numbers are there.
        settings: how.
        progress: called as `progress(done, total)`.

    Returns:
        What was found, and the files.

    Raises:
        SelectionError: as `find_probes`.
        SetupError: likewise.
        ConfigError: the folder cannot be written.
    """
    found = find_probes(run, what, settings, progress)

    def write(folder: Path) -> list[Path]:
        files = [folder / "probe.csv", folder / "probe.png"]
        found.probes.table.to_csv(files[0], index=False)
        figures.save_figure(_figure(found), files[1], dpi=found.settings.dpi)
        return files + _page(found, files[1]).write(folder)

    return found, make_folder(folder, write)


def sentences(found: FoundProbes) -> list[str]:
    """Say what can be read where, and no more than that."""
    numbers = found.probes
    best = numbers.places.iloc[0]
    metric = best["metric"]
    where = f"{best['kind']} of {best['stream']} layer {best['layer']}, tokens {_column(best)}"
    facts = (
        f"{metric} {best['score']:.2f} (interval {best['low']:.2f} to {best['high']:.2f}; chance "
        f"{numbers.chance:.2g}, shuffled {best['shuffled']:.2f} on average, {best['shuffled_high']:.2f} "
        f"at most)"
    )
    said = []
    if numbers.n_shuffles < 19:
        said.append(f"{numbers.n_shuffles} shuffles are too few to say anything; 19 are the fewest.")
    elif best["p_corrected"] <= 0.05 and best["score"] > numbers.chance:
        n = int(((numbers.places["p_corrected"] <= 0.05) & (numbers.places["score"] > numbers.chance)).sum())
        said.append(
            f"{found.what} can be read at {n} of {len(numbers.places)} places, on episodes that the "
            f"probe was "
            f"not trained on; best from {where}: {facts}."
        )
    else:
        said.append(
            f"No: {found.what} is not shown to be readable at any of {len(numbers.places)} places. The best, "
            f"{where}, has {facts}; the best place of shuffled values reaches it in "
            f"{100 * best['p_corrected']:.0f} % of the shuffles."
        )
    said.append(
        f"A probe that knows nothing but the fraction of the episode has {metric} "
        f"{numbers.time_score:.2f}: what "
        "a place gives beyond this is more than the time course that all episodes share."
    )
    return said


def _column(row: Any) -> str:
    step = "" if pd.isna(row["denoise_step"]) else f", step {row['denoise_step']}"
    reduction = "" if row["reduction"] == "mean" else f" ({row['reduction']})"
    return f"{str(row['group']).rpartition('.')[2]}{reduction}{step}"


def _figure(found: FoundProbes) -> Figure:
    numbers, settings = found.probes, found.settings
    places = numbers.table[numbers.table["kind"] != "time"].copy()
    places["column"] = [_column(row) for _, row in places.iterrows()]
    n_episodes, n_inferences = places["n_episodes"].iloc[0], places["n_inferences"].iloc[0]
    metric = places["metric"].iloc[0]
    facts = [
        f"{found.what}: {numbers.task}",
        f"{metric} on episodes that a probe was not trained on",
        f"{n_episodes} episodes, {n_inferences} inferences",
        f"* above the best place of {1 - 1 / 20:.0%} of {numbers.n_shuffles} shuffles",
        f"time alone {numbers.time_score:.2f}",
        f"{settings.reduction} over the tokens of a group",
        "mean over denoise steps" if settings.denoise_step == "mean" else "",
    ]
    caption = Caption(
        facts,
        RANDOM_WEIGHTS if RANDOM_WEIGHTS in found.remarks else "",
        [remark for remark in found.remarks if remark != RANDOM_WEIGHTS],
    )
    return probe_figure(places, caption, label=metric, chance=numbers.chance, width_in=settings.width)


def _page(found: FoundProbes, picture: Path) -> Page:
    numbers = found.probes
    page = Page(f"What can be read of {found.what}")
    page.points([*(f"The policy: {remark}" for remark in found.remarks), *found.notes])
    page.points(sentences(found))
    page.picture(picture, "scores of the probes by layer and token group")
    page.heading("The best places")
    rows = [
        [
            *(str(row["kind"]), str(row["stream"]), str(row["layer"]), _column(row)),
            f"{row['score']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
            f"{row['shuffled']:.2f}, {row['shuffled_high']:.2f}",
            f"{row['p_corrected']:.2g}",
        ]
        for _, row in numbers.places.head(_SHOWN).iterrows()
    ]
    header = ["kind", "stream", "layer", "tokens", str(numbers.table["metric"].iloc[0]), "interval"]
    page.table([*header, "shuffled: mean, highest", "p"], rows)
    page.heading("How to read this")
    chance = (
        "R² is 1 − the squared errors over those of the training episodes' mean: chance is 0, and worse than "
        "the mean is below it."
        if numbers.task == "regression"
        else f"Balanced accuracy is the mean over the classes ({', '.join(numbers.classes)}) of the "
        f"share that was told right: chance is {numbers.chance:.2g}."
    )
    page.points(
        [
            chance,
            "A probe is linear: ridge regression, or logistic regression with balanced classes, on "
            "standardised "
            "activations. It is trained on whole episodes and scored on others.",
            "Shuffled: the same activations with the episodes' values in another order, each as a whole "
            "series. "
            "Where all episodes have the same time course, shuffled values can be read too.",
            f"p: the share of {numbers.n_shuffles} shuffles (and the values themselves) in which the "
            f"best of all "
            "places reaches the score. It is corrected for how many places were probed.",
            f"Intervals: {found.settings.confidence:.0%} bootstrap over episodes, of each place by itself.",
            "What can be read is there; whether the policy uses it, a probe cannot say.",
        ]
    )
    return page
