"""An episode's means over the executed actions, of every layer that has them, as one dataset for `analysis`.

A recording stores means of some layers and full maps of some. A layer with full maps alone has means as well:
those of its maps. How layers and heads are averaged is `analysis`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.decoded import mean_of_read
from lerobot_attn.analysis.select import MEANS, RAW, executed_queries, prefix_only_layers, stored_layers
from lerobot_attn.errors import LerobotAttnError, SelectionError

_BLOCK = 32  # inferences that are read at once


def mean_layers(data: xr.Dataset) -> list[int]:
    """Return the layers whose means over the executed actions can be had, ascending."""
    full, stored = stored_layers(data)
    return sorted({*full, *stored})


def means(
    data: xr.Dataset, inferences: slice, step: int, layers: Sequence[int] | None = None
) -> NDArray[np.floating[Any]]:
    """Return means over the executed actions: (inference, layer, head, key), stored ones where there are any.

    Args:
        data: an episode's dataset.
        inferences: their numbers.
        step: the denoise step's place.
        layers: labels of the layers, ascending; default: all of `mean_layers`.

    Raises:
        SelectionError: the episode lacks a layer, or all suffix attention.
    """
    full, stored = stored_layers(data)
    there = mean_layers(data)
    if not there:
        raise SelectionError("this episode was recorded without suffix attention")
    wanted = there if layers is None else list(layers)
    at = {"inference": inferences, "denoise_step": step}
    parts: list[NDArray[np.floating[Any]]] = []
    of_stored = [layer for layer in wanted if layer in stored]
    if stored and of_stored == stored:  # at once, for a list of layers would be read ten times as slowly
        parts = [data[MEANS].isel(at).values]
    else:
        places = [stored.index(layer) for layer in of_stored]
        parts = [data[MEANS].isel(at | {"all_layer": slice(place, place + 1)}).values for place in places]
    added = [layer for layer in wanted if layer not in stored]
    for layer in added:  # one at a time, for a full map is large
        if layer not in full:
            raise SelectionError(f"layer {layer} was not recorded: the episode holds means of layers {there}")
        maps = data[RAW].isel(at | {"layer": full.index(layer)})
        numbers = np.arange(data.sizes["inference"])[inferences]
        mean = mean_of_read(data, maps, numbers, executed_queries(data)).values
        parts.append(mean[:, None])
    found: NDArray[np.floating[Any]] = np.concatenate(parts, axis=1)[:, np.argsort([*of_stored, *added])]
    return found


def means_dataset(
    data: xr.Dataset, inferences: slice, step: int, layers: Sequence[int] | None = None
) -> xr.Dataset:
    """Return what `means` does as a dataset that holds nothing else, from which `attention` selects.

    Args:
        data: as in `means`.
        inferences: likewise.
        step: likewise.
        layers: likewise.

    Raises:
        SelectionError: the episode lacks a layer, or all suffix attention.
    """
    values = means(data, inferences, step, layers)
    labels = mean_layers(data) if layers is None else list(layers)
    coordinates: dict[str, Any] = {
        "all_layer": labels,
        "denoise_step": data["denoise_step"].values[step : step + 1],
        "head": data["head"].values,
    }
    blind = set(prefix_only_layers(data))
    if blind:
        sees = [layer not in blind for layer in labels]
        coordinates["all_layer_sees_suffix"] = ("all_layer", sees)
    dims = ("inference", "denoise_step", "all_layer", "head", "key")
    return xr.Dataset({MEANS: (dims, values[:, None])}, coordinates, data.attrs)


def in_blocks[R](n: int, read: Callable[[slice], R], most: int = _BLOCK) -> Iterator[tuple[slice, R]]:
    """Yield what is read of `n` inferences, `most` at once, and of which; damaged ones are passed over.

    Reads nothing once, where there is nothing: what was asked for may not exist.
    """
    most = min(most, _BLOCK)
    blocks = [slice(first, min(first + most, n)) for first in range(0, n, most)] or [slice(0, 0)]
    while blocks:
        block = blocks.pop(0)
        try:
            found = read(block)
        except LerobotAttnError:  # says what is wrong with all of them
            raise
        except Exception:  # whatever codecs raise for a damaged chunk
            if block.stop - block.start > 1:
                blocks[:0] = [slice(i, i + 1) for i in range(block.start, block.stop)]
        else:
            yield block, found
