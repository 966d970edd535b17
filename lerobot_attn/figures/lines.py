"""How the balance of attention changes: through layers, through denoise steps, over the episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lerobot_attn.analysis.renamed import argument_renamed
from lerobot_attn.figures.canvas import (
    Caption,
    largest,
    modality_colors,
    new_figure,
    styled,
    unseen_box,
    unseen_cells,
)
from lerobot_attn.figures.fonts import one_line
from lerobot_attn.figures.scale import UNSEEN
from lerobot_attn.layout import short_names


@styled
def evolution_figure(
    panels: Sequence[tuple[str, xr.DataArray]], caption: Caption, *, width_in: float = 7.0
) -> Figure:
    """Draw the shares of the modalities stacked, against layers or denoise steps.

    Args:
        panels: titles and arrays (layer or denoise_step, modality) that sum to 1 over modality.
        caption: what is said below.
        width_in: width of the figure, inches.
    """
    beside = width_in >= 5
    figure = new_figure(width_in, 2.1 if beside else 1.9 * len(panels), caption)
    shape = (1, len(panels)) if beside else (len(panels), 1)
    all_axes = figure.subplots(*shape, sharey=True, squeeze=False).ravel()
    # Above 100 there is room for the boxes of what a layer cannot see; the panels share the axis.
    top = 106 if any(_has_unseen(shares) for _, shares in panels) else 100
    for axes, (title, shares) in zip(all_axes, panels, strict=True):
        (along,) = (dim for dim in shares.dims if dim != "modality")
        places = np.arange(shares.sizes[along])
        labels = [str(value) for value in shares[along].values]
        draw_shares(axes, places, shares.transpose(along, "modality"), bars=True)
        step = max(1, len(places) // 12)
        axes.set_xticks(places[::step], labels[::step])
        axes.set_xlabel(str(along).replace("_", " "))
        axes.set_title(title)
        axes.set_ylim(0, top)
        if axes is all_axes[0] or not beside:
            axes.set_ylabel("share of attention, %")
    _legend(figure, all_axes[0])
    return figure


@argument_renamed("sharpness", "effective_patches")
@styled
def timeline_figure(
    shares: xr.DataArray,
    effective_patches: Mapping[str, xr.DataArray],
    reward: NDArray[np.float32] | None,
    success: NDArray[np.bool_] | None,
    inference_frames: NDArray[Any],
    caption: Caption,
    *,
    width_in: float = 7.0,
) -> Figure:
    """Draw shares, effective patches and reward over the frames of an episode; thin lines mark inferences.

    Args:
        shares: (frame, modality).
        effective_patches: camera → (frame,) how many patches the attention is spread over, 2^entropy of
            `attention_entropy`.
        reward: (frame,); None where the recording's loop had none.
        success: (frame,) bool; likewise.
        inference_frames: whole numbers, the frames at which the policy was asked.
        caption: what is said below.
        width_in: width of the figure, inches.
    """
    outcome = reward is not None or success is not None
    figure = new_figure(width_in, 3.6 if outcome else 2.9, caption)
    ratios = [2.2, 1.3, 0.7] if outcome else [2.2, 1.3]
    all_axes = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    top, middle = all_axes[:2]
    frames = shares["frame"].values
    draw_shares(top, frames, shares.transpose("frame", "modality"))
    top.set_ylim(0, 106 if _has_unseen(shares) else 100)
    top.set_ylabel("share of\nattention, %")
    colors = modality_colors(list(effective_patches))
    for camera, values in effective_patches.items():
        alone = _alone(values.values)
        middle.plot(frames, values.values, color=colors[camera], marker=".", markevery=alone)
    middle.set_ylabel("effective\nnumber of patches")
    most = max((largest(values) for values in effective_patches.values()), default=0)
    middle.set_ylim(0, 1.1 * most or 1)
    if outcome:
        _draw_outcome(all_axes[2], frames, reward, success)
    all_axes[-1].set_xlabel("frame")
    for axes in all_axes:
        axes.set_xlim(frames[0] - 0.5, frames[-1] + 0.5)
        for frame in inference_frames:
            axes.axvline(frame - 0.5, color="black", linewidth=0.3, alpha=0.35)
    _legend(figure, top)
    return figure


def _draw_outcome(
    axes: Axes,
    frames: NDArray[Any],
    reward: NDArray[np.float32] | None,
    success: NDArray[np.bool_] | None,
) -> None:
    """Draw the reward as a line and the frames after which the task was solved as an area."""
    if reward is not None:
        axes.step(frames, reward, where="mid", color="black", label="reward")
        known = reward[np.isfinite(reward)]
        axes.set_ylim(float(known.min(initial=0)) - 0.1, float(known.max(initial=1)) * 1.1)
    else:
        axes.set_yticks([])
    solved = np.flatnonzero(False if success is None else success)
    if len(solved):
        axes.axvspan(frames[solved[0]] - 0.5, frames[-1] + 0.5, color="#009E73", alpha=0.25, label="solved")
    axes.set_ylabel("success" if reward is None else "reward")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, loc="upper left", ncols=2)


def draw_shares(axes: Axes, places: NDArray[Any], shares: xr.DataArray, *, bars: bool = False) -> None:
    """Draw (place, modality) stacked, in per cent; modalities that are 0 throughout are left out.

    Places whose shares are missing (NaN) stay blank. Where a layer cannot see some modality, the others make
    up the whole; a hatched box above says so.
    """
    unseen = unseen_cells(shares.values)
    shares = shares.copy(data=np.where(unseen, 0, shares.values))
    names = [str(name) for name in shares["modality"].values]
    colors = modality_colors(names)
    labels = {name: one_line(label, 24) for name, label in short_names(names).items()}
    base = np.zeros(len(places))
    for index, name in enumerate(names):
        values = 100 * shares.values[:, index]
        if largest(values) == 0:
            continue
        below, base = base, base + values
        if bars:
            axes.bar(places, values, bottom=below, width=0.9, color=colors[name], label=labels[name])
        else:
            axes.fill_between(
                _ends(places),
                np.repeat(below, 2),
                np.repeat(base, 2),
                color=colors[name],
                label=labels[name],
                linewidth=0,
            )
    blind = np.flatnonzero(unseen.any(axis=1))
    for number, index in enumerate(blind):
        what = ", ".join(labels[name] for name, absent in zip(names, unseen[index], strict=True) if absent)
        label = f"{what}:\n{UNSEEN}" if number == 0 else None
        axes.add_patch(unseen_box(places[index] - 0.45, 101, 0.9, 4, label=label))


def _has_unseen(shares: xr.DataArray) -> bool:
    return bool(unseen_cells(shares.transpose(..., "modality").values).any())


def _ends(places: NDArray[Any]) -> NDArray[np.float64]:
    """Return where the band of each place begins and ends, (2 * place,): halfway to its neighbours.

    So a place whose neighbours are missing has a width of its own.
    """
    middles = (places[1:] + places[:-1]) / 2
    inner = np.repeat(middles, 2)
    return np.concatenate([[places[0] - 0.5], inner, [places[-1] + 0.5]])


def _alone(values: NDArray[Any]) -> list[int]:
    """Return the positions of values between missing ones (NaN), which no line leads to or from."""
    there = np.concatenate([[False], np.isfinite(values), [False]])
    return [int(place) for place in np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:])]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
