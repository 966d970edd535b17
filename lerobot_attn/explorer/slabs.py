"""An episode's attention as blocks of little-endian float16.

A slab holds everything that one view of a frame needs, so that changing layer, head, camera or normalisation
asks for nothing more. Pure functions on an episode; knows no request.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.select import RAW
from lerobot_attn.errors import SelectionError
from lerobot_attn.explorer.means import means
from lerobot_attn.store.reader import Episode

PREFIX = "prefix_attention"


class Slab(NamedTuple):
    """Numbers of attention: little-endian float16 in C order, and their shape."""

    body: bytes
    shape: tuple[int, ...]


def mean_slab(episode: Episode, inference: int, denoise_step: int) -> Slab:
    """Return one denoise step's means over the executed actions: (layer, head, key).

    Those that are stored; of a layer without them, that of its full map.

    Args:
        episode: the episode.
        inference: its number.
        denoise_step: its label.

    Raises:
        SelectionError: the episode does not hold it.
    """
    step = place_of(episode, "denoise_step", denoise_step)
    of_inference(episode.arrays["token_id"], inference)
    return _slab(means(episode.arrays, slice(inference, inference + 1), step)[0])


def map_slab(episode: Episode, inference: int, denoise_step: int, layer: int) -> Slab:
    """Return one full map of the suffix: (head, query, key).

    Args:
        episode: the episode.
        inference: its number.
        denoise_step: its label.
        layer: its label.

    Raises:
        SelectionError: the episode does not hold it.
    """
    array = of_inference(_array(episode, RAW), inference)
    step, layer_place = place_of(episode, "denoise_step", denoise_step), place_of(episode, "layer", layer)
    return _slab(array.isel(denoise_step=step, layer=layer_place).values)


def prefix_slab(episode: Episode, inference: int, prefix_layer: int, query: int) -> Slab:
    """Return what one prefix token attends to in one layer of the language model: (head, prefix_key).

    Args:
        episode: the episode.
        inference: its number.
        prefix_layer: its label.
        query: key token of the prefix.

    Raises:
        SelectionError: the episode does not hold it.
    """
    array = of_inference(_array(episode, PREFIX), inference)
    if not 0 <= query < array.sizes["prefix_query"]:
        raise SelectionError(f"prefix token {query} does not exist: there are {array.sizes['prefix_query']}")
    layer = place_of(episode, "prefix_layer", prefix_layer)
    return _slab(array.isel(prefix_layer=layer, prefix_query=query).values)


def of_inference(array: xr.DataArray, inference: int) -> xr.DataArray:
    """Return an array at one inference.

    Raises:
        SelectionError: there is no such inference.
    """
    n = array.sizes["inference"]
    if not 0 <= inference < n:
        raise SelectionError(f"inference {inference} does not exist: the episode has {n}")
    return array.isel(inference=inference)


def place_of(episode: Episode, dimension: str, label: int) -> int:
    """Return a label's place along its dimension.

    Raises:
        SelectionError: it was not recorded.
    """
    found = labels(episode.arrays, dimension)
    if label not in found:
        raise SelectionError(f"{dimension} {label} was not recorded: the episode holds {found}")
    return found.index(label)


def labels(data: xr.Dataset, dimension: str, array: str | None = None) -> list[int]:
    """Return a dimension's labels; none where the episode lacks it, or the array that is asked about."""
    if dimension not in data.coords or (array is not None and array not in data):
        return []
    found: list[int] = data[dimension].values.tolist()
    return found


def _array(episode: Episode, name: str) -> xr.DataArray:
    data = episode.arrays
    if name not in data or 0 in data[name].shape[1:]:
        raise SelectionError(f"this episode was recorded without {name}")
    return data[name]


def _slab(array: NDArray[Any]) -> Slab:
    values = np.ascontiguousarray(array, dtype="<f2")
    return Slab(values.tobytes(), values.shape)
