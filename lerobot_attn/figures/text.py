"""Attention on the prompt: the sentence with its words shaded, bars, and words against layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from numpy.typing import NDArray

from lerobot_attn.figures.canvas import (
    Caption,
    colorbar,
    is_missing,
    largest,
    modality_colors,
    new_figure,
    say_missing,
    styled,
)
from lerobot_attn.figures.scale import MISSING, colormap

_WORD_PT, _LINE_PT = 8.0, 15.0
_WHITE = (1.0, 1.0, 1.0, 1.0)


@styled
def text_figure(
    tokens: xr.DataArray,
    by_layer: xr.DataArray,
    caption: Caption,
    *,
    cmap: str = "viridis",
    width_in: float = 7.0,
) -> Figure:
    """Draw the sentence with its words shaded, bars of all tokens, and tokens against layers.

    Args:
        tokens: (token,) of `token_attention`.
        by_layer: (layer, token) of the same.
        caption: what is said below.
        cmap: a matplotlib colour map.
        width_in: width of the figure, inches.
    """
    n_tokens, n_layers = by_layer.sizes["token"], by_layer.sizes["layer"]
    words = tokens.isel(token=tokens["kind"].values == "task")
    labels = words["label"].values.tolist()
    places, sentence_in = sentence_places(labels, width_in - 0.2)
    bars_in = max(1.2, 0.115 * n_tokens + 0.3)
    wide = n_layers > 1
    figure = new_figure(width_in, sentence_in + bars_in + 0.25, caption)
    rows = figure.add_gridspec(2, 1, height_ratios=[sentence_in, bars_in + 0.15])
    grid = rows[1].subgridspec(1, 2 if wide else 1)
    shade_sentence(figure.add_subplot(rows[0]), labels, words.values, cmap, places)
    bars = figure.add_subplot(grid[0, 0])
    token_bars(bars, tokens)
    if wide:
        axes = figure.add_subplot(grid[0, 1])
        values = by_layer.transpose("token", "layer").values
        vmax = largest(values)
        layers = by_layer["layer"].values
        axes.imshow(
            values, cmap=colormap(cmap), vmin=0, vmax=vmax or 1, aspect="auto", interpolation="nearest"
        )
        say_missing(axes, values)
        step = max(1, n_layers // 9)
        axes.set_xticks(range(0, n_layers, step), [str(value) for value in layers[::step]])
        axes.set_yticks([])
        axes.set_ylim(bars.get_ylim())
        axes.set_xlabel("layer")
        axes.set_title("by layer", pad=2)
        colorbar(figure, axes, cmap, 0, vmax, "share of attention", shrink=1.0)
    return figure


class Place(NamedTuple):
    """Where a word stands: its line, and left edge and width in points."""

    line: int
    left: float
    width: float


def sentence_places(words: Sequence[str], width_in: float) -> tuple[list[Place], float]:
    """Lay words out in lines of a width in inches; return their places and the height in inches."""
    font = FontProperties(family="DejaVu Sans")
    places, line, left = [], 0, 0.0
    for word in words:
        width = float(TextPath((0, 0), word or " ", size=_WORD_PT, prop=font).get_extents().width) + 8
        if left and left + width > width_in * 72:
            line, left = line + 1, 0.0
        places.append(Place(line, left, width))
        left += width + 3
    return places, (line + 1) * _LINE_PT / 72 + 0.2


def shade_sentence(
    axes: Axes, words: Sequence[str], values: NDArray[np.float32], cmap: str, places: Sequence[Place]
) -> None:
    """Write words one after another, each on a ground coloured by its share; a title gives the range.

    Args:
        axes: where; its units become points.
        words: the sentence.
        values: (word,) shares; the ground of one that is missing (NaN) stays white.
        cmap: a matplotlib colour map.
        places: of the words, from `sentence_places`.
    """
    most = largest(values)
    norm, colors = Normalize(0, most or 1), colormap(cmap)
    n_lines = max((line for line, _, _ in places), default=0) + 1
    right = max((left + width for _, left, width in places), default=1)
    for word, value, (line, left, width) in zip(words, values, places, strict=True):
        ground = colors(norm(float(value))) if np.isfinite(value) else _WHITE
        bright = 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2]
        top = -line * _LINE_PT
        axes.add_patch(Rectangle((left, top - _LINE_PT + 2), width, _LINE_PT - 2, color=ground, linewidth=0))
        ink = "black" if bright > 0.5 else "white"
        axes.text(
            left + width / 2,
            top - _LINE_PT / 2 + 1,
            word,
            ha="center",
            va="center",
            color=ink,
            fontsize=_WORD_PT,
        )
    axes.set_xlim(-1, right + 1)
    axes.set_ylim(-n_lines * _LINE_PT, 1)
    axes.axis("off")
    said = f"colour from 0 (dark) to {100 * most:.2g} % of all attention (bright)"
    title = f"words of the task: {MISSING if is_missing(values) else said}"
    axes.set_title(title, loc="left", fontsize=6, color="#444444", pad=1)


def token_bars(axes: Axes, tokens: xr.DataArray, *, legend: bool = True) -> None:
    """Draw a bar for each word, state dimension and piece of template, coloured by what it is."""
    kinds = tokens["kind"].values.tolist()
    colors = modality_colors(list(dict.fromkeys(kinds)))
    places = np.arange(tokens.sizes["token"])
    axes.barh(places, 100 * tokens.values, color=[colors[kind] for kind in kinds], height=0.8)
    say_missing(axes, tokens.values)
    axes.set_xlim(0, 105 * largest(tokens.values) or 1)
    axes.set_yticks(places, tokens["label"].values)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_xlabel("share of all attention, %")
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        handles = [Rectangle((0, 0), 1, 1, color=colors[kind], label=kind) for kind in dict.fromkeys(kinds)]
        axes.legend(
            handles=handles,
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(handles),
            handlelength=1.0,
            columnspacing=0.8,
            borderpad=0,
            borderaxespad=0.3,
        )
