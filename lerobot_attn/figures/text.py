"""Attention on the prompt: the sentence with its words shaded, bars, and words against layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
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
    mark_unseen_bars,
    modality_colors,
    new_figure,
    say_missing,
    styled,
    unseen_box,
    unseen_cells,
)
from lerobot_attn.figures.fonts import families_for, is_right_to_left, one_line
from lerobot_attn.figures.scale import MISSING, UNSEEN, ColourScale, colormap

_WORD_PT, _LINE_PT = 8.0, 15.0


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
    sentence = sentence_of(tokens)
    places, sentence_in = sentence_places(sentence.words, width_in - 0.2)
    bars_in = max(1.2, 0.115 * n_tokens + 0.3)
    wide = n_layers > 1
    figure = new_figure(width_in, sentence_in + bars_in + 0.25, caption)
    rows = figure.add_gridspec(2, 1, height_ratios=[sentence_in, bars_in + 0.15])
    grid = rows[1].subgridspec(1, 2 if wide else 1)
    shade_sentence(figure.add_subplot(rows[0]), sentence, cmap, places)
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
        unseen = np.argwhere(unseen_cells(values, axis=0))
        for token, layer in unseen:
            axes.add_patch(unseen_box(layer - 0.5, token - 0.5, 1, 1))
        step = max(1, n_layers // 9)
        axes.set_xticks(range(0, n_layers, step), [str(value) for value in layers[::step]])
        axes.set_yticks([])
        axes.set_ylim(bars.get_ylim())
        axes.set_xlabel("layer")
        axes.set_title(f"by layer (hatched: {UNSEEN})" if len(unseen) else "by layer", pad=2)
        colorbar(figure, axes, cmap, 0, vmax, "share of attention", shrink=1.0)
    return figure


class Sentence(NamedTuple):
    """Words in the order in which they are read, and what they are."""

    words: list[str]
    shares: NDArray[np.float32]  # (word,) shares of all attention
    what: str  # what a title calls them


def sentence_of(tokens: xr.DataArray) -> Sentence:
    """Return the words of the task among tokens; where they could not be told apart, the prompt's tokens.

    Args:
        tokens: (token,) of `token_attention`.
    """
    kinds = tokens["kind"].values
    kind, what = ("text", "tokens of the prompt") if "text" in kinds else ("task", "words of the task")
    if "task" in kinds:
        kind, what = "task", "words of the task"
    chosen = tokens.isel(token=kinds == kind)
    return Sentence([one_line(str(label)) for label in chosen["label"].values], chosen.values, what)


class Place(NamedTuple):
    """Where a word stands: its line, left edge and width in points, and as much of it as the line holds."""

    line: int
    left: float
    width: float
    shown: str


def sentence_places(words: Sequence[str], width_in: float) -> tuple[list[Place], float]:
    """Lay words out in lines of a width in inches; return their places and the height in inches.

    A sentence of a script that is written from right to left runs from the right edge.
    """
    line_pt = width_in * 72
    # Labels of the panels below may take room from the sentence, and its letters do not shrink.
    most_pt = 0.85 * line_pt
    places, line, left = [], 0, 0.0
    for word in words:
        shown, width = word, _width_pt(word)
        while width > most_pt and len(shown) > 8:
            shown = one_line(word, int(len(shown) * min(0.9, most_pt / width)))
            width = _width_pt(shown)
        if left and left + width > line_pt:
            line, left = line + 1, 0.0
        places.append(Place(line, left, width, shown))
        left += width + 3
    if is_right_to_left(" ".join(words)):
        right = max(place.left + place.width for place in places)
        places = [place._replace(left=right - place.left - place.width) for place in places]
    return places, (line + 1) * _LINE_PT / 72 + 0.2


def _width_pt(word: str) -> float:
    """Return how much room a word takes with its ground, in points."""
    font = FontProperties(family=families_for(word))
    return float(TextPath((0, 0), word or " ", size=_WORD_PT, prop=font).get_extents().width) + 8


def shade_sentence(axes: Axes, sentence: Sentence, cmap: str, places: Sequence[Place]) -> None:
    """Write words one after another, each on a ground coloured by its share; a title gives the range.

    Args:
        axes: where; its units become points.
        sentence: the words; the ground of one whose share is missing (NaN) stays white.
        cmap: a matplotlib colour map.
        places: of the words, from `sentence_places`.
    """
    most = largest(sentence.shares)
    scale = ColourScale(most, cmap)
    n_lines = max((place.line for place in places), default=0) + 1
    right = max((place.left + place.width for place in places), default=1)
    for value, (line, left, width, shown) in zip(sentence.shares, places, strict=True):
        ground = scale.colours(value)[:3] / 255 if np.isfinite(value) else np.ones(3)
        bright = float(ground @ (0.299, 0.587, 0.114))
        top = -line * _LINE_PT
        axes.add_patch(Rectangle((left, top - _LINE_PT + 2), width, _LINE_PT - 2, color=ground, linewidth=0))
        ink = "black" if bright > 0.5 else "white"
        axes.text(
            left + width / 2,
            top - _LINE_PT / 2 + 1,
            shown,
            ha="center",
            va="center",
            color=ink,
            fontsize=_WORD_PT,
        )
    axes.set_xlim(-1, right + 1)
    axes.set_ylim(-n_lines * _LINE_PT, 1)
    axes.axis("off")
    axes.set_title(_title(sentence, most), loc="left", fontsize=6, color="#444444", pad=1)


def _title(sentence: Sentence, most: float) -> str:
    if not sentence.words:
        return "the prompt holds no words of a task"
    if is_missing(sentence.shares):
        return f"{sentence.what}: {MISSING}"
    if most == 0:
        return f"{sentence.what}: none of the attention is on them"
    return f"{sentence.what}: colour from 0 (dark) to {100 * most:.2g} % of all attention (bright)"


def token_bars(axes: Axes, tokens: xr.DataArray, *, legend: bool = True) -> None:
    """Draw a bar for each word, state dimension and piece of template, coloured by what it is."""
    kinds = tokens["kind"].values.tolist()
    colors = modality_colors(list(dict.fromkeys(kinds)))
    places = np.arange(tokens.sizes["token"])
    axes.barh(places, 100 * tokens.values, color=[colors[kind] for kind in kinds], height=0.8)
    say_missing(axes, tokens.values)
    mark_unseen_bars(axes, tokens.values)
    axes.set_xlim(0, 105 * largest(tokens.values) or 1)
    axes.set_yticks(places, [one_line(str(label), 24) for label in tokens["label"].values])
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
