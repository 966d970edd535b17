"""Two episodes or two groups against each other: shares over the episode, and differences with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from numpy.typing import NDArray

from lerobot_attn.analysis.renamed import argument_renamed
from lerobot_attn.figures.canvas import (
    Caption,
    colorbar,
    largest,
    modality_colors,
    new_figure,
    styled,
)
from lerobot_attn.figures.fonts import one_line
from lerobot_attn.figures.images import Group, draw_overlay
from lerobot_attn.figures.scale import colormap
from lerobot_attn.layout import short_names

# Blue and vermilion of Okabe and Ito: told apart by colour-blind readers, and in grey by the dashes.
_COLORS = ("#0072B2", "#D55E00")
_DASHES = ("-", "--")


@argument_renamed("sharpness", "effective_patches")
@styled
def comparison_figure(
    shares: xr.Dataset,
    effective_patches: xr.Dataset,
    overall: pd.DataFrame,
    names: tuple[str, str],
    caption: Caption,
    *,
    strips: Sequence[Group] = (),
    means: Sequence[NDArray[np.float32]] = (),
    vmax: float = 1.0,
    unit: str = "",
    clipped: bool = False,
    cmap: str = "inferno",
    alpha: float = 0.7,
    width_in: float = 7.0,
) -> Figure:
    """Draw what two sides look at, how their shares go along, and their overall differences.

    Args:
        shares: of `analysis.compare`, measure modality_share: (phase or frame, modality).
        effective_patches: of the same, measure entropy: (phase or frame, camera), how many patches the
            attention is spread over.
        overall: of `analysis.compare_overall`; columns kind, name, difference, low, high.
        names: of the two sides.
        caption: what is said below.
        strips: rows of heatmaps over images, one per side; drawn on top. For two episodes.
        means: mean heatmaps of a and b, (height, width) each, and their difference. For two groups.
        vmax: end of the strips' colour range.
        unit: label of their colour bar.
        clipped: whether values lie beyond vmax.
        cmap: a matplotlib colour map, for the strips.
        alpha: opacity of the largest value.
        width_in: width of the figure, inches.
    """
    drawn = [str(m) for m in shares["modality"].values if str(m) != "padding"]
    cameras = [str(c) for c in effective_patches["camera"].values]
    panels = len(drawn) + len(cameras)
    columns = 4 if width_in >= 5 else 2
    rows = -(-panels // columns)
    strip_in = 0.0
    if strips:
        columns_of_strip = max(len(group.panels) for group in strips)
        panel_in = (width_in - 0.75) / columns_of_strip
        strip_in = sum(panel_in * g.panels[0].heat.shape[0] / g.panels[0].heat.shape[1] + 0.2 for g in strips)
    if len(means):
        strip_in = (width_in - 1.6) / 3 * means[0].shape[0] / means[0].shape[1] + 0.25
    in_both = overall[np.isfinite(overall["difference"].to_numpy(float))]
    is_token = in_both["measure"] == "token_attention"
    n_bars = max(int(is_token.sum()), int((~is_token).sum()))
    lines_in, bars_in = rows * 1.15 + 0.15, 0.115 * n_bars + 0.55
    figure = new_figure(width_in, strip_in + lines_in + bars_in, caption)
    heights = [*([strip_in] if strip_in else []), lines_in, bars_in]
    parts = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    if strips:
        grid = parts[0].subgridspec(len(strips), columns_of_strip)
        shown = []
        for row, group in enumerate(strips):
            for column, panel in enumerate(group.panels):
                axes = figure.add_subplot(grid[row, column])
                image = group.image if panel.image is None else panel.image
                draw_overlay(axes, image, panel.heat, vmax=vmax, cmap=cmap, alpha=alpha)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.set_title(panel.title, pad=2)
                if column == 0:
                    axes.set_ylabel(group.label)
                shown.append(axes)
        colorbar(figure, shown, cmap, 0, vmax, unit, clipped=clipped)
    elif len(means):
        _draw_means(figure, parts[0], means, names, unit, cmap)
    grid = parts[len(heights) - 2].subgridspec(rows, columns)
    labels = short_names([*drawn, *cameras])
    every = [(labels[name], shares.sel(modality=name), 100.0, "%") for name in drawn]
    every += [(f"{labels[c]}: effective patches", effective_patches.sel(camera=c), 1.0, "") for c in cameras]
    first: Axes | None = None
    for index, (title, part, factor, _) in enumerate(every):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        draw_pair(axes, part, names, factor)
        axes.set_title(title + (", %" if factor == 100 else ""), pad=2)
        if index >= panels - columns:
            axes.set_xlabel(str(part["a"].dims[0]))
        first = first or axes
    if first is not None:
        first.legend(frameon=False, loc="best", handlelength=1.8)
    halves = parts[len(heights) - 1].subgridspec(1, 2)
    for column, rows_of in enumerate((in_both[~is_token], in_both[is_token])):
        if len(rows_of):
            draw_differences(figure.add_subplot(halves[column]), rows_of, names)
    return figure


def _draw_means(
    figure: Figure,
    where: SubplotSpec,
    means: Sequence[NDArray[np.float32]],
    names: tuple[str, str],
    unit: str,
    cmap: str,
) -> None:
    """Draw the mean heatmaps of both sides on one colour range, and their difference on one of its own."""
    vmax = max(largest(mean) for mean in means[:2]) or 1.0
    most = largest(np.abs(means[2])) or 1.0
    ranges = [(0.0, vmax, cmap), (0.0, vmax, cmap), (-most, most, "RdBu_r")]
    titles = [f"{names[0]}, mean", f"{names[1]}, mean", f"{names[1]} minus {names[0]}"]
    grid = where.subgridspec(1, 3)
    for column, (values, (low, high, colors), title) in enumerate(zip(means, ranges, titles, strict=True)):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(values, cmap=colormap(colors), vmin=low, vmax=high, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(title, pad=2)
        colorbar(figure, axes, colors, low, high, unit if column == 1 else "", aspect=20)


def draw_pair(axes: Axes, part: xr.Dataset, names: tuple[str, str], factor: float = 1.0) -> None:
    """Draw the means of the two sides along phase or frame; the band is a plus the interval of b - a.

    Args:
        axes: where.
        part: `a`, `b`, `low` and `high` along one dimension.
        names: of the two sides.
        factor: what the values are multiplied with.
    """
    (along,) = part["a"].dims
    x = part[along].values
    for side, color, dashes, name in zip(("a", "b"), _COLORS, _DASHES, names, strict=True):
        axes.plot(x, factor * part[side].values, color=color, linestyle=dashes, label=name)
    if np.isfinite(part["low"].values).any():
        low, high = (factor * (part["a"] + part[bound]).values for bound in ("low", "high"))
        axes.fill_between(x, low, high, color=_COLORS[1], alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def draw_differences(axes: Axes, overall: pd.DataFrame, names: tuple[str, str]) -> None:
    """Draw b minus a of each row as a bar, with its interval where there is one."""
    kinds = overall["kind"].tolist()
    colors = modality_colors(list(dict.fromkeys(kinds)))
    places = np.arange(len(overall))
    values = 100 * overall["difference"].to_numpy(float)
    axes.barh(places, values, color=[colors[kind] for kind in kinds], height=0.75)
    low, high = (100 * overall[bound].to_numpy(float) for bound in ("low", "high"))
    known = np.isfinite(low) & np.isfinite(high)
    axes.hlines(places[known], low[known], high[known], color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.5)
    axes.set_yticks(places, [one_line(str(name), 28) for name in overall["name"]])
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_xlabel(f"{names[1]} minus {names[0]}, percentage points")
    axes.spines[["top", "right"]].set_visible(False)
