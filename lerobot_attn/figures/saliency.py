"""Importance beside attention: maps over images, rank correlations with their chance level, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lerobot_attn.figures.canvas import Caption, colorbar, new_figure, styled
from lerobot_attn.figures.fonts import one_line
from lerobot_attn.figures.images import draw_overlay
from lerobot_attn.figures.scale import colormap

# Okabe and Ito's colours.
_RANKINGS = {"importance": "#000000", "attention": "#0072B2", "shifted": "#D55E00", "random": "#999999"}
_DASHES = {"importance": ":", "attention": "-", "shifted": "--", "random": "-."}
_MOST_NUMBERS = 200  # cells of a matrix that have their number written into them


@dataclass(frozen=True)
class Picture:
    """What a frame's row shows of one camera.

    Attributes:
        camera: its short name.
        image: (height, width, 3) uint8.
        importance: (height, width) on its pixels, 1 at the largest of all cameras of the frame.
        attention: likewise.
    """

    camera: str
    image: NDArray[np.uint8]
    importance: NDArray[np.float32]
    attention: NDArray[np.float32]


@styled
def maps_figure(
    rows: Sequence[tuple[str, Sequence[Picture]]],
    caption: Caption,
    *,
    cmap: str = "inferno",
    alpha: float = 0.7,
    width_in: float = 7.0,
) -> Figure:
    """Draw image, importance and attention of each camera side by side, a row a frame.

    Args:
        rows: label of a frame, and its pictures.
        caption: what is said below.
        cmap: a matplotlib colour map.
        alpha: opacity of the largest value.
        width_in: width of the figure, inches.
    """
    columns = 3 * max(len(pictures) for _, pictures in rows)
    panel_in = (width_in - 0.9) / columns
    shape = rows[0][1][0].image.shape
    figure = new_figure(width_in, (panel_in * shape[0] / shape[1] + 0.17) * len(rows) + 0.15, caption)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    letters = max(8, int(panel_in * 72 / 3.9))
    for row, (line, (label, pictures)) in enumerate(zip(grid, rows, strict=True)):
        for axes in line:
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(label)
        for number, picture in enumerate(pictures):
            plain, importance, attention = line[3 * number : 3 * number + 3]
            plain.imshow(picture.image)
            draw_overlay(importance, picture.image, picture.importance, vmax=1, cmap=cmap, alpha=alpha)
            draw_overlay(attention, picture.image, picture.attention, vmax=1, cmap=cmap, alpha=alpha)
            if row == 0:
                titles = one_line(picture.camera, letters), "importance", "attention"
                for axes, title in zip((plain, importance, attention), titles, strict=True):
                    axes.set_title(title, pad=2)
    colorbar(figure, list(grid.ravel()), cmap, 0, 1, "relative to the frame's largest patch")
    return figure


@dataclass(frozen=True)
class Levels:
    """Rank correlations of one camera.

    Attributes:
        camera: its short name.
        value: (layer, head), the last head being their mean.
        p: likewise.
        low: (layer,) lower end of the mean head's interval over frames.
        high: the upper end.
        chance_low: (layer,) lower end of the central 95 % by chance, of the mean head.
        chance_high: the upper end.
        split_half: of the importance with itself.
    """

    camera: str
    value: NDArray[np.float64]
    p: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    chance_low: NDArray[np.float64]
    chance_high: NDArray[np.float64]
    split_half: float


@styled
def correlation_figure(
    cameras: Sequence[Levels],
    layers: Sequence[str],
    heads: Sequence[str],
    caption: Caption,
    *,
    width_in: float = 7.0,
) -> Figure:
    """Draw rank correlations by layer and head, and beside them the mean head's against chance.

    Args:
        cameras: what there is of each.
        layers: names of the layers, the last of which may be their mean.
        heads: names of the heads, likewise.
        caption: what is said below.
        width_in: width of the figure, inches.
    """
    row_in = min(0.22, 3.4 / len(layers)) * len(layers) + 0.75
    figure = new_figure(width_in, row_in * len(cameras), caption)
    grid = figure.subplots(len(cameras), 2, squeeze=False, width_ratios=[1.5, 1])
    most = max(0.1, max(float(np.nanmax(np.abs(c.value), initial=0)) for c in cameras))
    for (matrix, line), levels in zip(grid, cameras, strict=True):
        _draw_correlations(matrix, levels, layers, heads, most)
        _draw_mean_head(line, levels, layers)
    colorbar(figure, list(grid[:, 0]), "RdBu_r", -most, most, "rank correlation with importance", aspect=20)
    return figure


def _draw_correlations(
    axes: Axes, levels: Levels, layers: Sequence[str], heads: Sequence[str], most: float
) -> None:
    axes.imshow(
        levels.value, cmap=colormap("RdBu_r"), vmin=-most, vmax=most, aspect="auto", interpolation="nearest"
    )
    axes.set_xticks(range(len(heads)), heads)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(levels.camera, pad=2)
    for (row, column), value in np.ndenumerate(levels.value):
        if not np.isfinite(value):
            continue
        mark = "*" if levels.p[row, column] < 0.05 else ""
        text = f"{value:.2f}{mark}" if levels.value.size <= _MOST_NUMBERS else mark
        ink = "white" if abs(value) > 0.6 * most else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=5.5, color=ink)


def _draw_mean_head(axes: Axes, levels: Levels, layers: Sequence[str]) -> None:
    places = np.arange(len(layers))
    axes.barh(
        places,
        levels.chance_high - levels.chance_low,
        left=levels.chance_low,
        height=0.8,
        color="#DDDDDD",
        label="chance (circular shifts), 95 %",
    )
    axes.hlines(places, levels.low, levels.high, color="#0072B2", linewidth=1, label="interval over frames")
    axes.plot(levels.value[:, -1], places, "o", color="#0072B2", markersize=3, label="mean of the heads")
    if np.isfinite(levels.split_half):
        axes.axvline(
            levels.split_half,
            color="black",
            linestyle=":",
            label="importance with itself (half of the masks)",
        )
    axes.set_yticks(places, layers)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlabel("rank correlation with importance")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.28), fontsize=5, ncols=2)


@dataclass(frozen=True)
class Curve:
    """A ranking's curve: mean over frames, and its interval; (share,) each, ends included."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@styled
def curves_figure(
    panels: Sequence[tuple[str, Mapping[str, tuple[Curve, Curve]]]],
    shares: Sequence[float],
    caption: Caption,
    *,
    width_in: float = 7.0,
) -> Figure:
    """Draw deletion and insertion curves: above, patches are hidden in a ranking's order; below, shown.

    Args:
        panels: title, and ranking ("attention", "shifted", "random", "importance") → its two curves, in units
            of the change with every patch hidden.
        shares: of the patches, from 0 to 1.
        caption: what is said below.
        width_in: width of the figure, inches.
    """
    figure = new_figure(width_in, 4.0, caption)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey=True)
    for (above, below), (title, rankings) in zip(grid.T, panels, strict=True):
        for name, curves in rankings.items():
            for axes, curve in zip((above, below), curves, strict=True):
                axes.plot(shares, curve.mean, color=_RANKINGS[name], linestyle=_DASHES[name], label=name)
                if name in ("attention", "random"):
                    axes.fill_between(
                        shares, curve.low, curve.high, color=_RANKINGS[name], alpha=0.2, linewidth=0
                    )
        above.set_title(title, pad=2)
        below.set_xlabel("share of the patches")
        for axes in (above, below):
            axes.set_xscale("symlog", linthresh=1 / 64)
            axes.set_xticks([0, 1 / 64, 1 / 16, 1 / 4, 1], ["0", "1/64", "1/16", "1/4", "1"])
            axes.set_xlim(0, 1)
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("hidden first to last (deletion):\nchange of the action")
    grid[1, 0].set_ylabel("shown first to last (insertion):\nchange of the action")
    grid[0, 0].set_ylim(bottom=0)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return figure
