"""Neurons: how far every unit tells two groups apart, beside permuted labels; and what probes read where."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from lerobot_attn.figures.canvas import Caption, colorbar, new_figure, styled
from lerobot_attn.figures.fonts import one_line

# Blue and vermilion of Okabe and Ito; what chance gives is grey.
_MORE, _LESS, _CHANCE = "#0072B2", "#D55E00", "#888888"


@styled
def contrast_figure(
    counts: NDArray[np.float64],
    null_counts: NDArray[np.float64],
    limit: float,
    best: pd.DataFrame,
    held_out: tuple[float, NDArray[np.float64]],
    caption: Caption,
    *,
    width_in: float = 7.0,
) -> Figure:
    """Draw the areas of all units and the held-out area beside permuted labels, and the best units.

    Args:
        counts: (bin,) units by area under the curve, bins of equal width from 0 to 1.
        null_counts: likewise, the mean over permutations of the labels.
        limit: the distance from 0.5 that the best of all units stays below in 95 % of the permutations.
        best: columns name, auc, low, high, p_corrected; the best first.
        held_out: the mean area of chosen units on other episodes, and (permutation,) the same of permuted
            labels; NaN and nothing where there are too few episodes.
        caption: what is said below.
        width_in: width of the figure, inches.
    """
    figure = new_figure(width_in, max(3.4, 0.6 + 0.17 * max(1, len(best))), caption)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.05), height_ratios=(1.6, 1))
    every, held, right = (figure.add_subplot(grid[place]) for place in ((0, 0), (1, 0), (slice(None), 1)))
    edges = np.linspace(0, 1, len(counts) + 1)
    every.stairs(counts, edges, fill=True, color=_MORE, alpha=0.5, label="the labels")
    every.stairs(null_counts, edges, color=_CHANCE, linewidth=1.2, label="permuted labels, mean")
    if limit < 0.5:
        for place, label in ((0.5 - limit, "permuted labels: the best unit, 95 %"), (0.5 + limit, None)):
            every.axvline(place, color="black", linewidth=0.8, linestyle=":", label=label)
    every.set_yscale("symlog", linthresh=1)
    every.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    every.set_ylim(0, 30 * max(1.0, float(counts.max(initial=0)), float(null_counts.max(initial=0))))
    every.set_xlim(0, 1)
    every.set_ylabel("units")
    every.set_title("all units", pad=3)
    every.set_xlabel("area under the curve")
    every.legend(loc="upper left", frameon=False)
    _draw_held_out(held, *held_out)
    _draw_best(right, best)
    for axes in (every, held, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_held_out(axes: Axes, auc: float, null: NDArray[np.float64]) -> None:
    axes.set_title("chosen on half of the episodes, measured on the other", pad=3)
    axes.set_xlim(0, 1)
    axes.set_xlabel("mean area of the chosen units; 0.5 is chance")
    axes.set_yticks([])
    if not np.isfinite(auc):
        axes.text(0.5, 0.5, "too few episodes", ha="center", va="center", transform=axes.transAxes)
        return
    axes.hist(null, np.linspace(0, 1, 51).tolist(), color=_CHANCE, alpha=0.6, label="permuted labels")
    axes.axvline(auc, color=_MORE, linewidth=1.6, label=f"the labels: {auc:.2f}")
    axes.legend(loc="upper left", frameon=False)


def _draw_best(axes: Axes, best: pd.DataFrame) -> None:
    axes.axvline(0.5, color="black", linewidth=0.6, zorder=0)
    places = np.arange(len(best))
    auc = best["auc"].to_numpy(float)
    colors = [_MORE if value >= 0.5 else _LESS for value in auc]
    axes.hlines(places, best["low"], best["high"], color=colors, linewidth=1.2)
    axes.scatter(auc, places, s=14, color=colors, zorder=3)
    axes.set_yticks(places, [one_line(str(name), 34) for name in best["name"]])
    side = axes.secondary_yaxis("right")
    side.set_yticks(places, [f"p {p:.2g}" if p >= 0.001 else "p < 0.001" for p in best["p_corrected"]])
    side.spines["right"].set_visible(False)
    side.tick_params(length=0)
    axes.set_ylim(len(best) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("area under the curve; 0.5 is chance")
    axes.set_title("the largest differences: stream.layer.unit, tokens", pad=3)


@styled
def probe_figure(
    places: pd.DataFrame,
    caption: Caption,
    *,
    label: str,
    chance: float,
    width_in: float = 7.0,
) -> Figure:
    """Draw what probes read, layer by token group, one map for each kind and stream.

    Args:
        places: columns kind, stream, layer, column (token group, reduction and step in words), score,
            p_corrected.
        caption: what is said below.
        label: of the score.
        chance: the score of guessing, where the colours begin.
        width_in: width of the figure, inches.
    """
    parts = list(places.groupby(["kind", "stream"], sort=False))
    n_layers = max(part["layer"].nunique() for _, part in parts)
    widths = [part["column"].nunique() for _, part in parts]
    figure = new_figure(width_in, 1.35 + 0.17 * max(4, n_layers), caption)
    every = figure.subplots(1, len(parts), squeeze=False, width_ratios=widths)[0]
    most = max(float(places["score"].max()), chance + 0.05)
    for axes, ((kind, stream), part) in zip(every, parts, strict=True):
        layers = sorted(part["layer"].unique().tolist())
        columns = list(dict.fromkeys(part["column"]))
        scores = np.full((len(layers), len(columns)), np.nan)
        shown = np.zeros(scores.shape, bool)
        for row in part.to_dict("records"):
            place = layers.index(row["layer"]), columns.index(row["column"])
            scores[place], shown[place] = row["score"], row["p_corrected"] <= 0.05
        axes.imshow(
            np.maximum(scores, chance), cmap="viridis", vmin=chance, vmax=most, aspect="auto", origin="lower"
        )
        for y, x in np.ndindex(scores.shape):
            if np.isfinite(scores[y, x]):
                dark = scores[y, x] < chance + 0.6 * (most - chance)
                text = f"{scores[y, x]:.2f}{'*' if shown[y, x] else ''}"
                axes.text(
                    x, y, text, ha="center", va="center", fontsize=5, color="white" if dark else "black"
                )
        axes.set_xticks(range(len(columns)), [one_line(c, 26) for c in columns], rotation=35, ha="right")
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_title(f"{stream}, {kind}", pad=3)
    every[0].set_ylabel("layer")
    bar = colorbar(figure, list(every), "viridis", chance, most, label, aspect=20)
    bar.set_yticks([chance, most], [f"{chance:.2g} = chance", f"{most:.2g}"])
    return figure
