"""Effects of interventions: each condition against its control, with interval and the line of no effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lerobot_attn.figures.canvas import Caption, new_figure, styled
from lerobot_attn.figures.fonts import one_line

# Blue and vermilion of Okabe and Ito; the baseline's marks are hollow, for readers in grey.
_CONTROL, _BASELINE = "#0072B2", "#D55E00"


@styled
def effects_figure(
    effects: pd.DataFrame,
    labels: Mapping[str, str],
    caption: Caption,
    *,
    shares: Sequence[str] = (),
    baseline: str = "baseline",
    width_in: float = 7.0,
) -> Figure:
    """Draw one panel a metric: a point and an interval for each comparison, and a line at no difference.

    Args:
        effects: rows with condition, control, metric, difference, low, high, n.
        labels: metric → what its axis says, with its unit; the panels' order.
        caption: what is said below.
        shares: metrics that are shares, drawn in percentage points.
        baseline: the control that is no matched one; drawn hollow.
        width_in: width of the figure, inches.
    """
    versus = list(dict.fromkeys(zip(effects["condition"], effects["control"], strict=True)))
    drawn = [metric for metric in labels if (effects["metric"] == metric).any()]
    columns = min(3 if width_in >= 5 else 1, max(1, len(drawn)))
    rows = -(-len(drawn) // columns)
    figure = new_figure(width_in, rows * (0.17 * len(versus) + 0.55), caption)
    grid = figure.add_gridspec(max(1, rows), columns)
    for index, metric in enumerate(drawn):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        part = effects[effects["metric"] == metric]
        _draw(axes, part, versus, 100.0 if metric in shares else 1.0, baseline)
        axes.set_xlabel(labels[metric])
        names = [one_line(f"{condition} − {control}", 44) for condition, control in versus]
        axes.set_yticks(range(len(versus)), names if index % columns == 0 else [""] * len(versus))
    return figure


def _draw(
    axes: Axes, part: pd.DataFrame, versus: Sequence[tuple[str, str]], factor: float, baseline: str
) -> None:
    axes.axvline(0, color="black", linewidth=0.6, zorder=0)
    for row in part.to_dict("records"):
        place = versus.index((row["condition"], row["control"]))
        is_baseline = row["control"] == baseline
        color = _BASELINE if is_baseline else _CONTROL
        low, high = factor * row["low"], factor * row["high"]
        if np.isfinite(low) and np.isfinite(high):
            axes.hlines(place, low, high, color=color, linewidth=1.2)
        face = "white" if is_baseline else color
        axes.plot(
            factor * row["difference"], place, "o", markersize=4, color=color, markerfacecolor=face, zorder=3
        )
    axes.set_ylim(len(versus) - 0.4, -0.6)
    low, high = axes.get_xlim()
    if low == high or np.isclose(low, high):
        axes.set_xlim(-1, 1)
    axes.spines[["top", "right"]].set_visible(False)
