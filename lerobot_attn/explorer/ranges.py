"""Where the colours of an episode end, so that they stay what they are from one frame to the next."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.select import attention
from lerobot_attn.explorer.means import in_blocks, mean_layers, means_dataset
from lerobot_attn.explorer.slabs import labels, place_of
from lerobot_attn.explorer.values import numbers
from lerobot_attn.store.reader import Episode

CLIP = 99.9  # percentile of the patches at which colours end, as in the package's figures


def ranges(episode: Episode, denoise_step: int) -> dict[str, Any]:
    """Return where the colour range of the whole episode ends, for every choice of layer and head.

    The `CLIP` percentile of a camera's patches in all inferences, as `analysis`'s `episode_ranges` has it;
    without those that are damaged.

    Args:
        episode: the episode.
        denoise_step: label.

    Returns:
        `layers` and `heads`, the labels and then "mean" (and "max"); `ranges`, a camera's full name → (layer,
        head) shares of attention.

    Raises:
        SelectionError: the episode does not hold it.
    """
    step = place_of(episode, "denoise_step", denoise_step)
    images = [segment for segment in episode.layout.segments if segment.kind == "image"]
    views = {
        camera.name: slice(segment.start, segment.stop)
        for camera, segment in zip(episode.layout.cameras, images, strict=True)
        if not camera.is_empty
    }
    layers: list[int | str] = [*mean_layers(episode.arrays), "mean"]
    heads: list[int | str] = [*labels(episode.arrays, "head"), "mean", "max"]
    n = episode.n_inferences
    largest = {
        name: _Largest((len(layers), len(heads)), n * (keys.stop - keys.start))
        for name, keys in views.items()
    }
    # Cameras come first among the keys: what comes after the last of them is not averaged.
    stop = max((keys.stop for keys in views.values()), default=0)

    def read(block: slice) -> xr.Dataset:
        found = means_dataset(episode.arrays, block, step).isel(key=slice(stop))
        return found.astype(np.float32)  # once, for it takes most of the time

    for _, found in in_blocks(n, read):
        every = _with_reductions(found)
        for name, keys in views.items():
            largest[name].add(np.moveaxis(every[..., keys], 0, 2).reshape(len(layers), len(heads), -1))
    return {
        "layers": layers,
        "heads": heads,
        "ranges": {name: numbers(of_camera.percentile()) for name, of_camera in largest.items()},
    }


def ranges_of_steps(episode: Episode) -> dict[str, Any]:
    """Return what `ranges` does for every denoise step, so that steps side by side have one range.

    Args:
        episode: the episode; every stored mean of it is read.

    Returns:
        `denoise_steps`, the labels; `layers` and `heads` as in `ranges`; `ranges`, a camera's full name →
        (denoise_step, layer, head) shares of attention.

    Raises:
        SelectionError: the episode has no suffix attention.
    """
    steps = labels(episode.arrays, "denoise_step")
    found = [ranges(episode, step) for step in steps]
    return {
        "denoise_steps": steps,
        "layers": found[0]["layers"],
        "heads": found[0]["heads"],
        "ranges": {camera: [of_step["ranges"][camera] for of_step in found] for camera in found[0]["ranges"]},
    }


def _with_reductions(means: xr.Dataset) -> NDArray[np.float32]:
    """Return (inference, layer, head, key): after the layers their mean, after the heads mean and largest."""
    n_layers, n_heads, n_keys = (means.sizes[name] for name in ("all_layer", "head", "key"))

    def values(layer: Literal["all", "mean"], head: Literal["all", "mean", "max"]) -> NDArray[np.float32]:
        found = attention(means, inference="all", layer=layer, denoise_step="all", head=head)
        shape = (-1, n_layers if layer == "all" else 1, n_heads if head == "all" else 1, n_keys)
        return found.values.reshape(shape)

    every_head: tuple[Literal["all", "mean", "max"], ...] = ("all", "mean", "max")
    of_layers, of_mean = (
        np.concatenate([values(layer, head) for head in every_head], axis=2) for layer in ("all", "mean")
    )
    return np.concatenate([of_layers, of_mean], axis=1)


class _Largest:
    """The `CLIP` percentile of many shares of attention, exactly, of which only the largest are kept.

    What lies above the 99.9th percentile is a thousandth of them, so a long episode's maps need not be in
    memory together. No share is negative: a 0 stands for what is not there.

    Args:
        shape: of the percentiles, e.g. (layer, head).
        n_most: numbers that will be added for each of them, at most.
    """

    _ABOVE = (100 - CLIP) / 100  # the part of the numbers that is larger than the percentile

    def __init__(self, shape: tuple[int, ...], n_most: int):
        n_kept = math.floor(max(n_most - 1, 0) * self._ABOVE) + 2  # the percentile lies between two of them
        self._kept = np.zeros((*shape, n_kept), np.float32)
        self._n = np.zeros(shape, int)

    def add(self, values: NDArray[np.float32]) -> None:
        """Take (*shape, value) float32; a missing map, NaN, does not count."""
        is_there = np.isfinite(values)
        self._n += is_there.sum(axis=-1)
        candidates = np.concatenate([self._kept, np.where(is_there, values, 0)], axis=-1)
        n_kept = self._kept.shape[-1]
        self._kept = np.partition(candidates, -n_kept, axis=-1)[..., -n_kept:]

    def percentile(self) -> NDArray[np.float64]:
        """Return (*shape), between neighbours as NumPy has it; 0 where no number was there."""
        descending = np.sort(self._kept, axis=-1)[..., ::-1].astype(np.float64)
        last = np.maximum(self._n - 1, 0)
        from_top = last * self._ABOVE
        upper = np.floor(from_top).astype(int)
        lower = np.minimum(upper + 1, last)
        above, below = (np.take_along_axis(descending, i[..., None], -1)[..., 0] for i in (upper, lower))
        found: NDArray[np.float64] = above + (below - above) * (from_top - upper)
        return found
