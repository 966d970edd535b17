"""Images and language of one frame in one figure, with the shares of all modalities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from lerobot_attn.figures.canvas import (
    Caption,
    colorbar,
    largest,
    mark_unseen_bars,
    modality_colors,
    new_figure,
    say_missing,
    styled,
)
from lerobot_attn.figures.fonts import one_line
from lerobot_attn.figures.images import Group, draw_overlay, outline
from lerobot_attn.figures.text import sentence_of, sentence_places, shade_sentence, token_bars
from lerobot_attn.layout import short_names


@styled
def combined_figure(
    groups: Sequence[Group],
    shares: xr.DataArray,
    tokens: xr.DataArray,
    caption: Caption,
    *,
    vmax: float,
    unit: str,
    clipped: bool = False,
    cmap: str = "inferno",
    alpha: float = 0.7,
    width_in: float = 7.0,
) -> Figure:
    """Draw the cameras with their heatmap, the shaded sentence, the shares, and bars of the tokens.

    Args:
        groups: one per camera, of which the first panel is drawn.
        shares: (modality,).
        tokens: (token,) of `token_attention`.
        caption: what is said below.
        vmax: end of the images' colour range.
        unit: label of the images' colour bar.
        clipped: whether values lie beyond vmax.
        cmap: a matplotlib colour map, for images.
        alpha: opacity of the largest value.
        width_in: width of the figure, inches.
    """
    camera_in = min((width_in - 0.8) / len(groups), 2.6)
    image_in = camera_in * max(g.image.shape[0] / g.image.shape[1] for g in groups) + 0.2
    sentence = sentence_of(tokens)
    places, sentence_in = sentence_places(sentence.words, width_in - 0.2)
    bars_in = max(1.3, 0.115 * tokens.sizes["token"] + 0.3)
    figure = new_figure(width_in, image_in + sentence_in + bars_in + 0.2, caption)
    rows = figure.add_gridspec(3, 1, height_ratios=[image_in, sentence_in, bars_in])
    grid = rows[0].subgridspec(1, len(groups))
    shown = []
    for column, group in enumerate(groups):
        axes = figure.add_subplot(grid[0, column])
        draw_overlay(axes, group.image, group.panels[0].heat, vmax=vmax, cmap=cmap, alpha=alpha)
        outline(axes, group)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(one_line(group.label, 40), pad=2)
        if group.note:
            axes.set_xlabel(group.note)
        shown.append(axes)
    colorbar(figure, shown, cmap, 0, vmax, unit, clipped=clipped)
    axes = figure.add_subplot(rows[1])
    shade_sentence(axes, sentence, "viridis", places)
    halves = rows[2].subgridspec(1, 2, width_ratios=[1, 1.6])
    left, right = figure.add_subplot(halves[0]), figure.add_subplot(halves[1])
    names = [str(name) for name in shares["modality"].values if name != "padding"]
    colors = modality_colors(names)
    heights = np.array([100 * float(shares.sel(modality=name)) for name in names])
    left.barh(range(len(names)), heights, color=[colors[name] for name in names])
    for place, value in enumerate(heights):
        if np.isfinite(value):
            left.text(value, place, f" {value:.1f}", va="center", fontsize=6)
    say_missing(left, heights)
    mark_unseen_bars(left, heights)
    left.set_yticks(range(len(names)), [one_line(name, 24) for name in short_names(names).values()])
    left.set_xlim(0, 1.2 * largest(heights) or 1)
    left.invert_yaxis()
    left.set_xlabel("share of all attention, %")
    left.spines[["top", "right"]].set_visible(False)
    token_bars(right, tokens, legend=False)
    return figure
