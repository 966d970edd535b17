"""Grounding drawn: which maps lie on an object, when, and from noise to action. Chance is in every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from lerobot_attn.figures.canvas import Caption, colorbar, new_figure, say_missing, styled
from lerobot_attn.figures.fonts import one_line
from lerobot_attn.figures.outlines import ROLE_LOOKS
from lerobot_attn.figures.scale import colormap
from lerobot_attn.masks import Role

CHANCE_NAMES = {
    "uniform": "chance: uniform map",
    "fixed": "chance: its mean map on other episodes",
    "centre": "chance: centre prior",
}
_CHANCE_DASHES = {"uniform": (0, (4, 2)), "fixed": (0, (1, 1.2)), "centre": (0, (5, 1.5, 1, 1.5))}
_CHANCE_MARKERS = {"uniform": "|", "fixed": "x", "centre": "d"}
_BACKGROUND_COLOR = "#2E7D32"
_CHANCE_COLOR = "#000000"  # a distractor is grey; chance also has its own dashes and markers
_OUTCOMES = {"success": "#0072B2", "failure": "#D55E00"}


@dataclass(frozen=True)
class Levels:
    """One number along an axis, its interval, and what chance gives.

    Attributes:
        value: (x,).
        low: (x,) lower end of the interval; NaN where there is none.
        high: likewise.
        chance: name of a level, see `CHANCE_NAMES` → (x,); NaN where it is not known.
    """

    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    chance: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


@styled
def ranking_figure(
    rows: pd.DataFrame, label: str, caption: Caption, *, per_cent: bool = False, width_in: float = 7.0
) -> Figure:
    """Draw the best maps below each other, with their intervals and chance levels.

    Args:
        rows: columns name, value, low, high, uniform, fixed, centre, p; the best first.
        label: of the axis.
        caption: what is said below.
        per_cent: whether values are shares.
        width_in: width of the figure, inches.
    """
    factor = 100.0 if per_cent else 1.0
    figure = new_figure(width_in, 0.6 + 0.17 * max(1, len(rows)), caption)
    axes = figure.subplots()
    places = np.arange(len(rows))
    value = factor * rows["value"].to_numpy(float)
    low, high = (factor * rows[end].to_numpy(float) for end in ("low", "high"))
    axes.hlines(places, low, high, color=_color("target"), linewidth=1.2)
    axes.plot(
        value, places, "o", color=_color("target"), markersize=4, label="the policy's map", linestyle=""
    )
    for name, marker in _CHANCE_MARKERS.items():
        axes.plot(
            factor * rows[name].to_numpy(float),
            places,
            marker,
            color=_CHANCE_COLOR,
            markersize=5,
            markerfacecolor="none",
            linestyle="",
            label=CHANCE_NAMES[name],
        )
    axes.set_yticks(places, [one_line(str(name), 44) for name in rows["name"]])
    right = axes.secondary_yaxis("right")
    right.set_yticks(places, [f"p {p:.2g}" if p >= 0.001 else "p < 0.001" for p in rows["p"]])
    right.spines["right"].set_visible(False)
    right.tick_params(length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    _plain(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


@styled
def layers_figure(
    above: Mapping[str, NDArray[np.float64]],
    layers: Sequence[int],
    heads: Sequence[str],
    label: str,
    caption: Caption,
    *,
    chosen: tuple[str, int, str] | None = None,
    width_in: float = 7.0,
) -> Figure:
    """Draw how far every layer and head is above the better chance level, one map a camera.

    Args:
        above: camera → (layer, head) value minus the better chance level; NaN where there is none.
        layers: labels.
        heads: labels.
        label: of the colour bar.
        caption: what is said below.
        chosen: camera, layer and head that get a frame.
        width_in: width of the figure, inches.
    """
    finite = np.concatenate([np.abs(values[np.isfinite(values)]) for values in above.values()])
    most = float(finite.max(initial=0)) or 1.0
    figure = new_figure(width_in, 0.75 + 0.17 * max(7, len(layers)), caption)
    every = figure.subplots(1, len(above), squeeze=False, sharey=True)[0]
    for axes, (camera, values) in zip(every, above.items(), strict=True):
        axes.imshow(
            values,
            cmap=colormap("RdBu_r"),
            vmin=-most,
            vmax=most,
            interpolation="nearest",
            aspect="auto",
            origin="lower",
        )
        axes.set_xticks(np.arange(len(heads)), heads)
        axes.set_xlabel("head")
        axes.set_title(one_line(camera, 40), pad=2)
        axes.set_yticks(np.arange(len(layers)), [str(layer) for layer in layers])
        say_missing(axes, values)
        if chosen is not None and chosen[0] == camera:
            x, y = list(heads).index(chosen[2]), list(layers).index(chosen[1])
            axes.add_patch(_frame(x, y))
    every[0].set_ylabel("layer")
    bar = colorbar(figure, list(every), "RdBu_r", -most, most, label, aspect=20)
    bar.axhline(0, color="black", linewidth=0.8)
    bar.set_yticks([-most, 0, most], [f"{-most:.2g}", "0 = chance", f"{most:.2g}"])
    return figure


@styled
def phases_figure(
    roles: Mapping[str, Levels], phases: Sequence[str], label: str, caption: Caption, *, width_in: float = 7.0
) -> Figure:
    """Draw how dense attention is on each role in each phase, on a logarithmic axis whose 1 is chance.

    Args:
        roles: role → concentration in each phase.
        phases: their names.
        label: of the axis.
        caption: what is said below.
        width_in: width of the figure, inches.
    """
    figure = new_figure(width_in, 2.2, caption)
    axes = figure.subplots()
    width = 0.8 / max(1, len(roles))
    for number, (role, levels) in enumerate(roles.items()):
        x = np.arange(len(phases)) + (number - (len(roles) - 1) / 2) * width
        _dots(axes, x, levels, _color(role), role)
        fixed = levels.chance.get("fixed", np.full(len(phases), np.nan))
        axes.plot(
            x,
            fixed,
            "x",
            color=_CHANCE_COLOR,
            markersize=4,
            label=CHANCE_NAMES["fixed"] if number == 0 else "",
        )
    axes.set_yscale("log")
    axes.axhline(1, color=_CHANCE_COLOR, linestyle=_CHANCE_DASHES["uniform"], label=CHANCE_NAMES["uniform"])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xticks(np.arange(len(phases)), phases)
    axes.set_xlim(-0.5, len(phases) - 0.5)
    axes.set_ylabel(label)
    _plain(axes)
    _legend(figure, axes)
    return figure


@styled
def levels_figure(
    panels: Mapping[str, Levels],
    x: NDArray[np.float64],
    labels: tuple[str, str],
    caption: Caption,
    *,
    role: str = "target",
    ticks: Sequence[str] | None = None,
    per_cent: bool = False,
    width_in: float = 7.0,
) -> Figure:
    """Draw a number along layers or denoise steps, with its interval and chance levels; one panel a camera.

    Args:
        panels: title → the number along x.
        x: (x,) places on the axis.
        labels: of the x and y axes.
        caption: what is said below.
        role: whose colour the line has.
        ticks: of x; by default its numbers.
        per_cent: whether values are shares.
        width_in: width of the figure, inches.
    """
    factor = 100.0 if per_cent else 1.0
    figure = new_figure(width_in, 2.2, caption)
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    color = _color(role)
    for axes, (title, levels) in zip(every, panels.items(), strict=True):
        axes.plot(x, factor * levels.value, "o-", color=color, markersize=3, label=f"attention on the {role}")
        axes.fill_between(x, factor * levels.low, factor * levels.high, color=color, alpha=0.2, linewidth=0)
        for name, values in levels.chance.items():
            if np.isfinite(values).any():
                axes.plot(
                    x,
                    factor * values,
                    color=_CHANCE_COLOR,
                    linestyle=_CHANCE_DASHES[name],
                    label=CHANCE_NAMES[name],
                )
        axes.set_title(one_line(title, 60), pad=2)
        axes.set_xlabel(labels[0])
        axes.set_ylim(bottom=0)
        if ticks is not None:
            axes.set_xticks(x, ticks)
        say_missing(axes, levels.value)
        _plain(axes)
    every[0].set_ylabel(labels[1])
    _legend(figure, every[0])
    return figure


@styled
def outcomes_figure(
    roles: Sequence[str],
    outcomes: Mapping[str, Levels],
    label: str,
    caption: Caption,
    *,
    per_cent: bool = False,
    width_in: float = 7.0,
) -> Figure:
    """Draw successes and failures beside each other, role by role.

    Args:
        roles: names of the places on the x axis.
        outcomes: "success" and "failure" → the number of each role.
        label: of the y axis.
        caption: what is said below.
        per_cent: whether values are shares.
        width_in: width of the figure, inches.
    """
    figure = new_figure(width_in, 2.2, caption)
    axes = figure.subplots()
    for number, (outcome, levels) in enumerate(outcomes.items()):
        x = np.arange(len(roles)) + (number - (len(outcomes) - 1) / 2) * 0.3
        factor = 100.0 if per_cent else 1.0
        scaled = Levels(factor * levels.value, factor * levels.low, factor * levels.high)
        _dots(axes, x, scaled, _OUTCOMES.get(outcome, "black"), outcome)
        chance = levels.chance.get("uniform")
        if chance is not None:
            axes.hlines(
                factor * chance,
                x - 0.12,
                x + 0.12,
                color=_CHANCE_COLOR,
                linestyle=_CHANCE_DASHES["uniform"],
                label=CHANCE_NAMES["uniform"] if number == 0 else "",
            )
    axes.set_xticks(np.arange(len(roles)), roles)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label)
    _plain(axes)
    _legend(figure, axes)
    return figure


def _color(role: str) -> str:
    """Return the colour of a role's outlines; that of the background, which has none, is its own."""
    look = ROLE_LOOKS.get(cast(Role, role))
    return _BACKGROUND_COLOR if look is None else look.colour


def _dots(axes: Axes, x: NDArray[np.floating[Any]], levels: Levels, color: str, name: str) -> None:
    """Draw values as dots with their intervals as bars."""
    known = np.isfinite(levels.low) & np.isfinite(levels.high)
    axes.vlines(x[known], levels.low[known], levels.high[known], color=color, linewidth=1.2)
    axes.plot(x, levels.value, "o", color=color, markersize=4, label=name, linestyle="")


def _frame(x: int, y: int) -> Rectangle:
    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.2)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)), frameon=False)
