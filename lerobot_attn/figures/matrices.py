"""Matrices: action against action, and small ones with their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lerobot_attn.figures.canvas import (
    Caption,
    colorbar,
    largest,
    new_figure,
    say_missing,
    styled,
    unseen_box,
)
from lerobot_attn.figures.fonts import one_line
from lerobot_attn.figures.scale import UNSEEN, colormap

_MOST_TEXTS = 24  # tokens that are named along an axis
_LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}


@styled
def action_figure(
    panels: Sequence[tuple[str, NDArray[np.float32]]],
    caption: Caption,
    *,
    unit: str,
    executed: slice | None,
    unseen: Sequence[bool] = (),
    tokens: Sequence[str] | None = None,
    cmap: str = "viridis",
    width_in: float = 7.0,
    columns: int = 4,
) -> Figure:
    """Draw action-to-action attention, or that among decoded tokens.

    Args:
        panels: titles and (query, action_key) arrays.
        caption: what is said below.
        unit: label of the colour bar.
        executed: the actions of the chunk that are executed, by their number; a line marks the last. None if
            that is not known.
        unseen: for each panel, whether its layer cannot see the actions; it is hatched.
        tokens: the text of each token, where they are decoded ones and no actions.
        cmap: a matplotlib colour map.
        width_in: width of the figure, inches.
        columns: panels in a row.
    """
    columns = max(1, min(columns, len(panels)))
    rows = -(-len(panels) // columns)
    side = min((width_in - 0.9) / columns, 2.6)
    figure = new_figure(width_in, rows * (side + 0.35), caption)
    vmax = max(largest(values) for _, values in panels)
    shown = []
    grid = figure.add_gridspec(rows, columns)
    blind = [*unseen, *[False] * (len(panels) - len(unseen))]
    for index, (title, values) in enumerate(panels):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        axes.imshow(values, cmap=colormap(cmap), vmin=0, vmax=vmax or 1, interpolation="nearest")
        axes.set_title(title, pad=2)
        if blind[index]:
            axes.add_patch(unseen_box(0, 0, 1, 1, transform=axes.transAxes))
            axes.text(0.5, 0.5, UNSEEN, ha="center", va="center", transform=axes.transAxes, bbox=_LABEL_BOX)
        else:
            say_missing(axes, values)
        if executed is not None and tokens is None and not blind[index]:
            for draw in (axes.axhline, axes.axvline):
                draw(executed.stop - 0.5, color="white", linewidth=0.6, linestyle=":")
        if index % columns == 0:
            axes.set_ylabel(f"query: {'action' if tokens is None else 'decoded'} token")
        if index // columns == rows - 1:
            axes.set_xlabel(f"key: {'action' if tokens is None else 'decoded'} token")
        if tokens is not None and len(tokens) <= _MOST_TEXTS:
            texts = [one_line(text, 10) for text in tokens]
            axes.set_xticks(range(len(texts)), texts, rotation=90)
            axes.set_yticks(range(len(texts)), texts)
        shown.append(axes)
    colorbar(figure, shown, cmap, 0, vmax, unit)
    return figure


def draw_matrix(
    axes: Axes, values: NDArray[np.float32], rows: Sequence[str], columns: Sequence[str], cmap: str
) -> None:
    """Draw the cells, with the number of each in per cent; one that is missing (NaN) stays blank."""
    vmax = largest(values) or 1
    axes.imshow(values, cmap=colormap(cmap), vmin=0, vmax=vmax, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), [one_line(name, 24) for name in columns])
    axes.set_yticks(range(len(rows)), [one_line(name, 24) for name in rows])
    for (row, column), value in np.ndenumerate(values):
        ink = "black" if value > 0.6 * vmax else "white"
        if np.isfinite(value):
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=6)
