"""Doses of an intervention: the arm's height over the lift, and an outcome over the dose, beside controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lerobot_attn.figures.canvas import Caption, new_figure, styled
from lerobot_attn.figures.fonts import one_line

# Okabe and Ito's vermilion for what is fired, darker with the dose; random draws in grey, words in blue.
_FIRED = ("#F0A878", "#E07B39", "#D55E00", "#9C4300", "#5E2800")
_BASELINE, _RANDOM, _OTHER = "black", "#777777", "#0072B2"
_PANEL_IN = 2.2
_LEGEND_ROW_PT = 9.0
_LABEL_LETTERS = 30  # of a line of the label, as long as the axis is high


class HeightLine(NamedTuple):
    """The height of the hand over the lift segment, mean over episodes.

    Attributes:
        name: of the condition, with its dose.
        kind: "baseline", "fired", "random" (draws together) or "other".
        dose: NaN without one.
        height: (time,), m, at equal steps from the gripper's closing to the segment's end.
        low, high: (time,), the interval of the mean over episodes.
        n: episodes.
    """

    name: str
    kind: str
    dose: float
    height: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    n: int


class DosePoint(NamedTuple):
    """An outcome at a dose, as its difference from the baseline.

    Attributes:
        name: of the condition, without its dose.
        kind: "fired", "random" or "other".
        dose: NaN without one.
        difference, low, high: with its interval.
        draws: of random ones, each by itself.
    """

    name: str
    kind: str
    dose: float
    difference: float
    low: float
    high: float
    draws: tuple[float, ...] = ()


@styled
def dose_figure(
    columns: Sequence[tuple[str, str, Sequence[HeightLine], Sequence[DosePoint]]],
    caption: Caption,
    *,
    width_in: float = 7.0,
) -> Figure:
    """Draw for each fired set a panel of heights over the lift and one of the outcome over the dose.

    Args:
        columns: (name of the set, label of the outcome's axis, lines, points) of each set; without lines
            the panel of heights is left out.
        caption: what is said below.
        width_in: width of the figure, inches.
    """
    has_lines = any(lines for _, _, lines, _ in columns)
    side_by_side = has_lines and len(columns) == 1
    n_rows = 1 if side_by_side or not has_lines else 2
    figure = new_figure(width_in, n_rows * _PANEL_IN + 0.35 * (n_rows - 1), caption)
    n_columns = 2 if side_by_side else max(1, len(columns))
    grid = figure.add_gridspec(n_rows, n_columns)
    heights: list[Axes] = []
    outcomes: list[Axes] = []
    for index, (name, label, lines, points) in enumerate(columns):
        if has_lines:
            axes = figure.add_subplot(grid[0, index], sharey=heights[0] if heights else None)
            _draw_lines(axes, lines)
            axes.set_title(one_line(name, 40), pad=10 + _LEGEND_ROW_PT * math.ceil(len(lines) / 2))
            heights.append(axes)
        place = grid[0, 1] if side_by_side else grid[n_rows - 1, index]
        axes = figure.add_subplot(place, sharey=outcomes[0] if outcomes else None)
        _draw_points(axes, points)
        lines_of_label = (part for line in label.splitlines() for part in wrap(line, _LABEL_LETTERS))
        axes.set_ylabel("\n".join(lines_of_label))
        outcomes.append(axes)
        if not has_lines:
            axes.set_title(one_line(name, 40))
    return figure


def _draw_lines(axes: Axes, lines: Sequence[HeightLine]) -> None:
    fired = [line for line in lines if line.kind == "fired"]
    for line in lines:
        color = {"baseline": _BASELINE, "random": _RANDOM, "other": _OTHER}.get(line.kind)
        if color is None:
            color = _shade(fired.index(line), len(fired))
        time = np.linspace(0, 1, len(line.height))
        axes.fill_between(time, 100 * line.low, 100 * line.high, color=color, alpha=0.1, linewidth=0)
        style = {"random": "--", "other": ":"}.get(line.kind, "-")
        label = f"{one_line(line.name, 34)}, n = {line.n}"
        axes.plot(time, 100 * line.height, style, color=color, label=label)
    axes.set_xlabel("lift, from the gripper's closing to the destination")
    axes.set_ylabel("height of the hand, cm")
    axes.set_xlim(0, 1)
    # Above the lines, which may run anywhere.
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, handlelength=1.6, columnspacing=1
    )
    axes.spines[["top", "right"]].set_visible(False)


def _shade(index: int, n: int) -> str:
    return _FIRED[2] if n == 1 else _FIRED[round(index * (len(_FIRED) - 1) / (n - 1))]


def _draw_points(axes: Axes, points: Sequence[DosePoint]) -> None:
    axes.axhline(0, color="black", linewidth=0.6, zorder=0)
    doses = sorted({point.dose for point in points if math.isfinite(point.dose)})
    places = {dose: index for index, dose in enumerate(doses)}
    without = list(dict.fromkeys(p.name for p in points if not math.isfinite(p.dose)))
    beyond = {name: len(doses) + index for index, name in enumerate(without)}
    named: set[str] = set()
    for kind, color, mark, shift in (
        ("random", _RANDOM, "s", 0.14),
        ("fired", _FIRED[2], "o", -0.14),
        ("other", _OTHER, "D", 0.0),
    ):
        for name in dict.fromkeys(point.name for point in points if point.kind == kind):
            of_it = [point for point in points if (point.kind, point.name) == (kind, name)]
            x = [places.get(p.dose, beyond.get(p.name, 0)) + shift for p in of_it]
            y = [p.difference for p in of_it]
            for place, point in zip(x, of_it, strict=True):
                if point.draws:
                    at = np.full(len(point.draws), place + 0.12)
                    axes.plot(at, point.draws, ".", color=color, markersize=3, alpha=0.7)
                if math.isfinite(point.low):
                    axes.vlines(place, point.low, point.high, color=color, linewidth=1.2)
            line = "-" if len(of_it) > 1 else ""
            label = f"{one_line(name, 30)}{', mean of draws; dots: each' if kind == 'random' else ''}"
            axes.plot(x, y, mark + line, color=color, markersize=4, linewidth=0.8, label=label)
            named.add(name)
    axes.set_xticks(range(len(doses) + len(without)), [*(f"{d:g}" for d in doses), *without])
    axes.set_xlim(-0.5, len(doses) + len(without) - 0.5)
    axes.set_xlabel("dose" if doses else "")
    axes.margins(y=0.15)
    axes.legend(loc="best", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
