"""How spread out and how steady attention is. Knows no episode, only arrays."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import xarray as xr

from lerobot_attn.analysis.renamed import warn_renamed
from lerobot_attn.errors import SelectionError


def attention_entropy(array: xr.DataArray, dims: Sequence[Hashable] | None = None) -> xr.Dataset:
    """Return the entropy of a distribution and the effective number of tokens, or patches, that share it.

    The entropy is Shannon's ("A Mathematical Theory of Communication", 1948); Clark et al. 2019
    (arXiv:1906.04341) describe attention by it. The values are first divided by their sum, so for a heatmap
    it is the distribution within the image: `effective_number` is 1 when one patch takes everything and the
    number of patches when all get the same.

    Args:
        array: attention or a heatmap, not negative.
        dims: what to take the distribution over; by default key, token, or grid_y and grid_x.

    Returns:
        `entropy` in bits and `effective_number` = 2^entropy (perplexity), over the remaining dimensions. Keys
        that a layer cannot see (NaN at some keys of a row) have no part in it; NaN where everything is 0 or
        missing (NaN at every key).

    Raises:
        SelectionError: the array lacks the dimensions.
    """
    dims = _distribution_dims(array, dims)
    p = _shares(array, dims)
    # 0 log 0 is 0. Absent keys are 0 by now; a missing row is NaN and stays it, as NaN * 0 is.
    bits: xr.DataArray = xr.apply_ufunc(np.log2, p.where(p > 0, 1), dask="allowed")
    entropy = 0 - (p * bits).sum(dims, skipna=False)  # not -(…), which makes -0.0 of a one-hot's 0
    entropy.attrs = {"long_name": "entropy", "units": "bit"}
    number = 2**entropy
    number.attrs = {"long_name": "effective number", "units": "1"}
    return xr.Dataset({"entropy": entropy, "effective_number": number})


def sharpness(array: xr.DataArray, dims: Sequence[Hashable] | None = None) -> xr.Dataset:
    """Return what `attention_entropy` does; deprecated."""
    warn_renamed("sharpness", "attention_entropy")
    return attention_entropy(array, dims)


def stability(array: xr.DataArray, along: str, dims: Sequence[Hashable] | None = None) -> xr.DataArray:
    """Return how much of a map stays from one denoise step, inference or frame to the next.

    The overlap sum(min(p, q)) of the two distributions (histogram intersection of Swain & Ballard, "Color
    indexing", 1991), which is 1 minus their total variation distance: 1 when nothing moves, 0 when nothing is
    shared. Keys that a layer cannot see have no part in it.

    Args:
        array: attention or heatmaps, with the dimension `along`.
        along: "denoise_step", "inference" or "frame".
        dims: what the distributions are over; by default key, token, or grid_y and grid_x.

    Returns:
        The same dimensions without `dims`; `along` is one shorter and labelled by the later of the two. NaN
        where a map is all 0 or missing.

    Raises:
        SelectionError: the array lacks a dimension, or has one map only.
    """
    dims = _distribution_dims(array, dims)
    if along not in array.dims:
        raise SelectionError(
            f"stability along {along!r}: the maps have {', '.join(map(str, array.dims))}; keep it with 'all'"
        )
    if array.sizes[along] < 2:
        raise SelectionError(f"stability along {along!r} needs two maps at least, got {array.sizes[along]}")
    p = _shares(array, dims)
    later = p.isel({along: slice(1, None)})
    earlier = p.isel({along: slice(None, -1)})
    # The result is labelled by the later map alone: its step, its flow time.
    earlier = earlier.drop_vars([name for name in earlier.coords if along in earlier.coords[name].dims])
    shared: xr.DataArray = xr.apply_ufunc(np.minimum, later, earlier, dask="allowed")
    overlap = shared.sum(dims, skipna=False)
    overlap.attrs = {"long_name": f"overlap with the previous {along.replace('_', ' ')}", "units": "1"}
    return overlap


def _shares(array: xr.DataArray, dims: Sequence[Hashable]) -> xr.DataArray:
    """Divide by the sum over the keys that exist; absent keys become 0, a missing or empty row NaN."""
    values = array.fillna(0)
    total = values.sum(dims)  # 0 of a missing row
    return values / total.where(total > 0)


def _distribution_dims(array: xr.DataArray, dims: Sequence[Hashable] | None) -> list[Hashable]:
    if dims is None:
        for usual in (("grid_y", "grid_x"), ("key",), ("token",), ("action_key",), ("modality",)):
            if set(usual) <= set(array.dims):
                return list(usual)
        raise SelectionError(
            f"no distribution among the dimensions {', '.join(map(str, array.dims))}; give dims="
        )
    missing = [dim for dim in dims if dim not in array.dims]
    if missing:
        raise SelectionError(f"dimension {missing[0]!r} is not among {', '.join(map(str, array.dims))}")
    return list(dims)
