"""Heatmaps over camera images, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from lerobot_attn.analysis.spatial import Mask
from lerobot_attn.errors import ConfigError
from lerobot_attn.figures.canvas import Caption, colorbar, largest, new_figure, styled
from lerobot_attn.figures.fonts import one_line
from lerobot_attn.figures.matrices import draw_matrix
from lerobot_attn.figures.outlines import draw_outlines
from lerobot_attn.figures.scale import ColourScale, colormap
from lerobot_attn.layout import short_names


@dataclass(frozen=True)
class Panel:
    """One heatmap: (height, width) on the camera's own pixels, its title, and its image if it has its own."""

    heat: NDArray[np.float32]
    title: str
    image: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Group:
    """Heatmaps over one image.

    Attributes:
        label: title of the image.
        image: (height, width, 3) uint8.
        panels: the heatmaps.
        note: what is to be said of the image in a few words, e.g. that there was none.
        mask: of the objects that are outlined in all pictures of the group; None: none.
    """

    label: str
    image: NDArray[np.uint8]
    panels: Sequence[Panel]
    note: str = ""
    mask: Mask | None = None


@styled
def image_grid(
    groups: Sequence[Group],
    caption: Caption,
    *,
    vmax: float,
    unit: str,
    vmin: float = 0.0,
    clipped: bool = False,
    cmap: str = "inferno",
    alpha: float = 0.7,
    columns: int = 6,
    width_in: float = 7.0,
) -> Figure:
    """Draw each group's image, then its heatmaps over the image; all panels share one colour range.

    Opacity grows with the value's root from 0 to `alpha`, so what is not attended to stays visible; the
    colour alone tells the value.

    Args:
        groups: what to draw; each begins a new row.
        caption: what is said below.
        vmin: start of the colour range.
        vmax: its end.
        unit: label of the colour bar.
        clipped: whether values lie beyond vmax, which the colour bar then shows.
        cmap: a matplotlib colour map.
        alpha: opacity of the largest value, 0 to 1.
        columns: panels in a row, the plain image included.
        width_in: width of the figure, inches.

    Raises:
        ConfigError: unknown colour map, or nothing to draw.
    """
    rows, columns = _rows(groups, columns, width_in)
    figure = new_figure(width_in, sum(row.height_in for row in rows) + 0.05, caption)
    shown = _draw_rows(figure, figure.add_gridspec(1, 1)[0], rows, columns, vmin, vmax, cmap, alpha)
    colorbar(figure, shown, cmap, vmin, vmax, unit, clipped=clipped)
    return figure


@styled
def cross_modal_figure(
    groups: Sequence[Group],
    shares: xr.DataArray,
    caption: Caption,
    *,
    vmax: float,
    unit: str,
    clipped: bool = False,
    cmap: str = "inferno",
    alpha: float = 0.7,
    columns: int = 6,
    width_in: float = 7.0,
) -> Figure:
    """Draw what words look at in the images, and below what each modality looks at.

    Args:
        groups: one per camera, a panel per word.
        shares: (from_modality, to_modality), rows sum to 1.
        caption: what is said below.
        vmax: end of the images' colour range.
        unit: label of the images' colour bar.
        clipped: whether values lie beyond vmax.
        cmap: a matplotlib colour map, for images.
        alpha: opacity of the largest value.
        columns: panels in a row, the plain image included.
        width_in: width of the figure, inches.

    Raises:
        ConfigError: unknown colour map, or nothing to draw.
    """
    rows, columns = _rows(groups, columns, width_in)
    names = [
        list(short_names(map(str, shares[dim].values)).values()) for dim in ("from_modality", "to_modality")
    ]
    images_in, matrix_in = sum(row.height_in for row in rows), 0.6 + 0.22 * len(names[0])
    figure = new_figure(width_in, images_in + matrix_in, caption)
    parts = figure.add_gridspec(2, 1, height_ratios=[images_in, matrix_in])
    shown = _draw_rows(figure, parts[0], rows, columns, 0.0, vmax, cmap, alpha)
    colorbar(figure, shown, cmap, 0, vmax, unit, clipped=clipped)
    axes = figure.add_subplot(parts[1])
    values = shares.transpose("from_modality", "to_modality").values
    draw_matrix(axes, values, names[0], names[1], "viridis")
    axes.set_ylabel("from")
    axes.set_xlabel("to: share of attention, %")
    colorbar(figure, axes, "viridis", 0, largest(values), "share", shrink=1.0, aspect=12)
    return figure


@dataclass(frozen=True)
class _Row:
    group: Group
    panels: Sequence[Panel]
    is_first: bool
    height_in: float


def _rows(groups: Sequence[Group], columns: int, width_in: float) -> tuple[list[_Row], int]:
    """Break the panels of each group into rows, the plain image standing before its first."""
    if not groups or not all(group.panels for group in groups):
        raise ConfigError("nothing to draw: expected a frame, a camera and a layer at least")
    columns = max(2, min(columns, 1 + max(len(group.panels) for group in groups)))
    rows = []
    # Rows of equal length: eight panels in two rows of four rather than five and three.
    longest = max(len(group.panels) for group in groups)
    per_row = -(-longest // -(-longest // (columns - 1)))
    columns = per_row + 1
    for group in groups:
        panel_in = (width_in - 0.75) / columns
        height = panel_in * group.image.shape[0] / group.image.shape[1] + 0.17
        for start in range(0, len(group.panels), per_row):
            panels = group.panels[start : start + per_row]
            rows.append(_Row(group, panels, start == 0, height))
    return rows, columns


def _draw_rows(
    figure: Figure,
    where: SubplotSpec,
    rows: Sequence[_Row],
    columns: int,
    vmin: float,
    vmax: float,
    cmap: str,
    alpha: float,
) -> list[Axes]:
    colormap(cmap)
    grid = where.subgridspec(len(rows), columns, height_ratios=[row.height_in for row in rows])
    shown: list[Axes] = []
    # What a title of 7 points has room for above one panel.
    characters = max(8, int((figure.get_figwidth() - 0.75) / columns * 72 / 3.9))
    for index, row in enumerate(rows):
        if row.is_first:
            axes = figure.add_subplot(grid[index, 0])
            axes.imshow(row.group.image)
            outline(axes, row.group)
            _bare(axes, row.group.label, characters)
            say_note(axes, row.group.note)
            shown.append(axes)
        for column, panel in enumerate(row.panels, start=1):
            axes = figure.add_subplot(grid[index, column])
            image = row.group.image if panel.image is None else panel.image
            draw_overlay(axes, image, panel.heat, vmin=vmin, vmax=vmax, cmap=cmap, alpha=alpha)
            outline(axes, row.group)
            _bare(axes, panel.title, characters)
            shown.append(axes)
    return shown


def draw_overlay(
    axes: Axes,
    image: NDArray[np.uint8],
    heat: NDArray[np.float32],
    *,
    vmin: float = 0.0,
    vmax: float,
    cmap: str = "inferno",
    alpha: float = 0.7,
) -> None:
    """Draw an image and a heatmap over it; hatched where the whole map is missing (NaN).

    Args:
        axes: where.
        image: (height, width, 3) uint8.
        heat: (height, width) of the same pixels.
        vmin: start of the colour range.
        vmax: its end.
        cmap: a matplotlib colour map.
        alpha: opacity of the largest value.
    """
    scale = ColourScale(vmax, cmap, alpha, vmin)
    axes.imshow(image)
    # Matplotlib looks up the colour itself, so that the axes hold the values and a colour bar can be drawn.
    axes.imshow(
        heat, cmap=colormap(cmap), norm=scale.norm, alpha=scale.opacity(heat), interpolation="nearest"
    )
    if np.isnan(heat).all():
        # Or a map that is not there would look like one of no attention.
        hatch = Rectangle((0, 0), 1, 1, fill=False, linewidth=0, edgecolor="#AAAAAA", hatch="///")
        hatch.set_transform(axes.transAxes)
        axes.add_patch(hatch)


def outline(axes: Axes, group: Group) -> None:
    """Outline a group's objects in one of its pictures."""
    if group.mask is not None:
        height, width, _ = group.image.shape
        draw_outlines(axes, group.mask, (height, width))


def say_note(axes: Axes, note: str) -> None:
    """Write a group's note into its image."""
    if note:
        axes.text(
            0.5, 0.5, note, ha="center", va="center", color="white", transform=axes.transAxes, wrap=True
        )


def _bare(axes: Axes, title: str, characters: int) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(one_line(title, characters), pad=2)
