"""Which neurons differ between two groups, as table, figure and page.

    found, files = write_contrast(open_run("out"), None, "success", "contrast")

Reads the stores of a run; the numbers are those of `analysis.neuron_contrast`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lerobot_attn import figures
from lerobot_attn.analysis.areas import N_BINS
from lerobot_attn.analysis.neuron_contrast import Contrast, ContrastDraws, contrast
from lerobot_attn.analysis.neurons import Choice
from lerobot_attn.errors import RANDOM_WEIGHTS, ConfigError
from lerobot_attn.figures.canvas import Caption
from lerobot_attn.figures.neurons import contrast_figure
from lerobot_attn.report.neuron_labels import (
    Named,
    Readable,
    labels_of,
    make_folder,
    narrowed,
    readable,
    tasks_of,
)
from lerobot_attn.report.page import Page
from lerobot_attn.settings import check_choice, check_flag, check_ranges
from lerobot_attn.sizes import Progress
from lerobot_attn.store.runs import Run

_SHOWN = 15  # units in the figure and on the page


@dataclass(frozen=True, kw_only=True)
class ContrastSettings:
    """Settings of `lerobot-attn neurons contrast`."""

    # Features of the residual stream instead of neurons.
    residuals: bool = False
    # vlm or expert; null: both.
    stream: str | None = None
    # Layers; null: all that were recorded.
    layers: tuple[int, ...] | None = None
    # Token groups: cameras' names, task, state, template, actions; null: all.
    groups: tuple[str, ...] | None = None
    # Over the group's tokens: mean or max.
    reduction: str = "mean"
    # Denoise step of the expert, or the mean over steps.
    denoise_step: int | str = "mean"
    # Only inferences of which this holds, e.g. phase=carry.
    during: str | None = None
    # A corrected p up to which a unit is said to differ.
    alpha: float = 0.05
    # Permutations of the labels.
    n_permutations: int = 2000
    # Ways to halve the episodes, and units chosen on a half.
    n_splits: int = 5
    n_chosen: int = 10
    # Resamples and confidence of the intervals over episodes.
    n_resamples: int = 2000
    confidence: float = 0.95
    # Rows of the table.
    top: int = 500
    seed: int = 0
    # Width of the figure, inches, and its dots per inch.
    width: float = 7.0
    dpi: int = 200

    _ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "alpha": (0.0001, 0.5),
        "n_permutations": (100, 1_000_000),
        "n_splits": (1, 100),
        "n_chosen": (1, 10_000),
        "n_resamples": (100, 1_000_000),
        "confidence": (0.5, 0.999),
        "top": (1, 100_000),
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
        check_flag(self, "residuals")
        check_choice(self, "reduction", ("mean", "max"))

    @property
    def choice(self) -> Choice:
        """Which activations are looked at."""
        return Choice(
            kind="residual" if self.residuals else "neurons",
            stream=self.stream,
            layers=self.layers,
            groups=self.groups,
            reductions=(self.reduction,),
            denoise_step=self.denoise_step,  # type: ignore[arg-type]  # checked where the steps are known
        )

    @property
    def draws(self) -> ContrastDraws:
        """How many draws are made."""
        return ContrastDraws(
            n_permutations=self.n_permutations,
            n_splits=self.n_splits,
            n_chosen=self.n_chosen,
            n_resamples=self.n_resamples,
            confidence=self.confidence,
            top=self.top,
            seed=self.seed,
        )


class FoundContrast(NamedTuple):
    """A contrast of a run, or of two.

    Attributes:
        contrast: the numbers.
        names: the first group and the second.
        settings: how it was made.
        notes: what was left out.
        remarks: what is to be said of the policy.
    """

    contrast: Contrast
    names: tuple[str, str]
    settings: ContrastSettings
    notes: tuple[str, ...]
    remarks: tuple[str, ...]


def find_contrast(
    a: Run,
    b: Run | None,
    by: str | None,
    settings: ContrastSettings | None = None,
    progress: Progress | None = None,
) -> FoundContrast:
    """Compare the units of two groups of episodes, or of moments.

    Args:
        a: a run.
        b: another run, with which it is compared.
        by: or else what tells the groups of one run apart, see `analysis.quantities.Rule.parse`.
        settings: how.
        progress: called as `progress(done, total)`.

    Raises:
        ConfigError: both b and by were given, or neither.
        SelectionError: as `analysis.neuron_contrast.contrast`, or a label that episodes do not know.
    """
    settings = settings or ContrastSettings()
    if (b is None) == (by is None):
        got = "neither B nor --by" if b is None else f"both B and --by {by}"
        raise ConfigError(f"contrast: got {got}; expected a second run, or what tells episodes of one apart")
    sides = [readable(run) for run in (a, b) if run is not None]
    episodes = [episode for side in sides for episode in side.episodes]
    if by is not None:
        labels = labels_of(by, episodes)
        names = (labels.text, "the rest")
    else:
        firsts = [number == 0 for number, side in enumerate(sides) for _ in side.episodes]
        own: list[NDArray[np.float64]] = [
            np.full(e.n_inferences, float(first)) for e, first in zip(episodes, firsts, strict=True)
        ]
        names = _run_names(sides, a, b)
        labels = Named(own, names[0])
    labels = narrowed(labels, settings.during, episodes)
    found = contrast(
        episodes,
        labels.labels,
        settings.choice,
        strata=tasks_of(episodes),
        how=settings.draws,
        progress=progress,
    )
    return FoundContrast(
        found,
        names,
        settings,
        tuple(dict.fromkeys([*(note for side in sides for note in side.notes), *found.notes])),
        tuple(dict.fromkeys(remark for side in sides for remark in side.remarks)),
    )


def _run_names(sides: list[Readable], a: Run, b: Run | None) -> tuple[str, str]:
    paths = [
        run.path.resolve() if isinstance(run.path, Path) else run.path for run in (a, b) if run is not None
    ]
    names = [path.name for path in paths]
    if names[0] == names[1]:
        names = [f"{path.parent.name}/{path.name}" for path in paths]
    return names[0], names[1]


def write_contrast(
    a: Run,
    b: Run | None,
    by: str | None,
    folder: str | Path,
    settings: ContrastSettings | None = None,
    progress: Progress | None = None,
) -> tuple[FoundContrast, list[Path]]:
    """Write `contrast.csv`, `contrast.png`, `report.md` and `report.html`.

    Args:
        a: a run.
        b: another run.
        by: or else what tells the groups apart.
        folder: where to; it is made when the numbers are there.
        settings: how.
        progress: called as `progress(done, total)`.

    Returns:
        What was found, and the files.

    Raises:
        SelectionError: as `find_contrast`.
        ConfigError: likewise, or the folder cannot be written.
    """
    found = find_contrast(a, b, by, settings, progress)

    def write(folder: Path) -> list[Path]:
        files = [folder / "contrast.csv", folder / "contrast.png"]
        found.contrast.table.to_csv(files[0], index=False)
        figures.save_figure(_figure(found), files[1], dpi=found.settings.dpi)
        return files + _page(found, files[1]).write(folder)

    return found, make_folder(folder, write)


def sentences(found: FoundContrast) -> list[str]:
    """Say what was found, and no more than that."""
    numbers, settings = found.contrast, found.settings
    what = "features" if settings.residuals else "neurons"
    first, second = found.names
    n_found = numbers.found(settings.alpha)
    best = numbers.table.iloc[0]
    where = (
        f"{_neuron(best)}, tokens {str(best['group']).rpartition('.')[2]}: area under the curve "
        f"{best['auc']:.2f}"
    )
    tried = f"{numbers.n_tried:,} tried ({what} by token group)"
    said = []
    if numbers.smallest_p > settings.alpha:
        said.append(
            f"Nothing can be shown: so few episodes give no corrected p below {numbers.smallest_p:.2g}, "
            f"whatever the {what} do. The largest difference is {where}."
        )
    elif n_found:
        said.append(
            f"{n_found:,} of {tried} {'differ' if n_found > 1 else 'differs'} between {first} and {second} "
            f"(corrected p ≤ {settings.alpha:g}); the largest is {where} ({_interval(best)}, corrected p "
            f"{_p(best['p_corrected'])}; 0.5 is chance)."
        )
    else:
        said.append(
            f"No: none of {tried} is shown to differ between {first} and {second}. The largest difference "
            f"({where}) is reached by the best of as many in {100 * best['p_corrected']:.0f} % of the "
            "permutations of the labels."
        )
    held = numbers.held_out
    if math.isnan(held.auc):
        said.append(
            "There are too few episodes to choose units on half of them and to measure the other half."
        )
    else:
        n = min(settings.n_chosen, max(1, numbers.n_tried // 2))
        high = float(np.quantile(held.null, 0.95))
        verdict = "more than" if held.p <= settings.alpha else "no more than"
        said.append(
            f"On episodes that they were not chosen on, the {n} best {what} of the other half reach "
            f"{held.auc:.2f} on average, {verdict} permuted labels do (0.5 is chance; 95 % of permutations "
            f"stay below {high:.2f}, p {_p(held.p)})."
        )
    if numbers.kind == "within" and n_found and numbers.smallest_p <= settings.alpha:
        said.append(_about_time(found))
    if sum((numbers.n_first, numbers.n_second)) < 20 and numbers.kind == "between":
        said.append(
            f"With {numbers.n_first} and {numbers.n_second} episodes the area of the best of so many is near "
            "0 or 1 by chance alone; more episodes, or fewer layers and token groups, can show more."
        )
    return said


def _about_time(found: FoundContrast) -> str:
    table, alpha = found.contrast.table, found.settings.alpha
    shown = table[table["p_corrected"] <= alpha]
    beyond = shown[shown["p_beyond_time"] <= alpha]
    n = len(shown)
    of = f"these {n:,}" if n == found.contrast.found(alpha) else f"the {n:,} largest"
    text = (
        f"With the labels that other episodes have at the same fraction of the episode, "
        f"{'it reaches' if n == 1 else of + ' reach'} "
        f"{0.5 + float((shown['auc_time'] - 0.5).abs().mean()):.2f} on average: "
    )
    if beyond.empty:
        return text + "none is shown to follow the label rather than the time course that all episodes share."
    return text + f"{len(beyond):,} of {n:,} shown to follow the label beyond that shared time course."


def _interval(row: Any) -> str:
    if math.isnan(row["low"]):
        return "no interval"
    return f"interval {row['low']:.2f} to {row['high']:.2f}"


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"


def _neuron(row: Any) -> str:
    return f"{row['stream']}.{row['layer']}.{row['unit']}"


def _named(found: FoundContrast, row: Any) -> str:
    step = "" if found.settings.denoise_step == "mean" else f", step {found.settings.denoise_step}"
    return f"{_neuron(row)} {str(row['group']).rpartition('.')[2]}{step}"


def _figure(found: FoundContrast) -> Figure:
    numbers, settings = found.contrast, found.settings
    best = numbers.table.head(_SHOWN).copy()
    best["name"] = [_named(found, row) for _, row in best.iterrows()]
    counts = np.histogram(numbers.auc, N_BINS, (0, 1))[0].astype(float)
    n = (
        f"{numbers.n_first} and {numbers.n_second} episodes"
        if numbers.kind == "between"
        else f"within {numbers.n_first} episodes"
    )
    facts = [
        f"{found.names[0]} against {found.names[1]}",
        n,
        f"{numbers.n_tried:,} {'features' if settings.residuals else 'neurons'} × token groups",
        f"{settings.reduction} over the tokens of a group",
        f"denoise step {settings.denoise_step}",
        f"during {settings.during}" if settings.during else "",
        f"{settings.confidence:.0%} bootstrap intervals over episodes; p corrected for all that were tried",
        "blue fires more in the first group, red less",
    ]
    caption = Caption(
        facts,
        RANDOM_WEIGHTS if RANDOM_WEIGHTS in found.remarks else "",
        [remark for remark in found.remarks if remark != RANDOM_WEIGHTS],
    )
    limit = float(np.quantile(numbers.largest_null, 0.95))
    return contrast_figure(
        counts,
        numbers.null_counts,
        limit,
        best,
        (numbers.held_out.auc, numbers.held_out.null),
        caption,
        width_in=settings.width,
    )


def _page(found: FoundContrast, picture: Path) -> Page:
    numbers, settings = found.contrast, found.settings
    page = Page(f"Contrast of neurons: {found.names[0]} against {found.names[1]}")
    page.points([*(f"The policy: {remark}" for remark in found.remarks), *found.notes])
    page.points(sentences(found))
    page.picture(picture, "areas under the curve of all units, and the largest differences")
    page.heading("The largest differences")
    header = ["stream", "layer", "unit", "tokens", "area", "interval", "p"]
    header += ["others' labels", "p beyond time"] if numbers.kind == "within" else []
    page.table(header, [_cells(row, numbers.kind) for _, row in numbers.table.head(_SHOWN).iterrows()])
    page.heading("How to read this")
    between = (
        "A unit's value in an episode is its mean over the episode's inferences; episodes are ranked within "
        "their task. The area is the chance that an episode of the first group has the higher value. Labels "
        "are permuted between the episodes of a task."
    )
    within = (
        "The area is the chance that a random moment with the label has a higher activation than one without "
        "it, in the same episode; the mean over episodes. Permutations exchange the two labels in whole "
        "episodes (sign flips), so that moments that resemble each other are no evidence."
    )
    page.points(
        [
            between if numbers.kind == "between" else within,
            f"p: the share of {len(numbers.largest_null)} permutations in which the largest difference "
            f"of all "
            f"{numbers.n_tried:,} reaches this one (max statistic, Westfall & Young 1993), to either side. "
            f"The smallest that these episodes can give is {numbers.smallest_p:.2g}.",
            "Intervals are of each unit by itself: those of the largest differences lie too far from 0.5, "
            "because they were chosen for it.",
            f"Held out: the {settings.n_chosen} that differ most on half of the episodes, measured on the "
            f"other half, over {settings.n_splits} ways to halve, both ways; beside permuted labels. In "
            "contrast.csv "
            "auc_held_out is of those of the first halving: their mean is fair, the largest of them is not.",
            f"{numbers.n_silent:,} of those tried never change.",
            "A unit that differs goes along with the label. Whether it causes anything, only firing it "
            "can say.",
        ]
    )
    return page


def _cells(row: Any, kind: str) -> list[str]:
    def number(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.2f}"

    cells = [str(row["stream"]), str(row["layer"]), str(row["unit"]), str(row["group"]), number(row["auc"])]
    cells += [
        "" if math.isnan(row["low"]) else f"{row['low']:.2f} to {row['high']:.2f}",
        _p(row["p_corrected"]),
    ]
    return cells + ([number(row["auc_time"]), _p(row["p_beyond_time"])] if kind == "within" else [])
