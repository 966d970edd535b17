"""The one mean over layers and heads, and the one sum over keys, where keys are absent or maps are missing.

A row is what one query of one layer and head gives to all keys. It can be NaN in two ways:

- at every key: the store lacks the map. The row is *missing*, and so is every result that needs it.
- at some keys: the layer cannot see them, e.g. the suffix in SmolVLA's cross-attention. Those keys are
  *absent*: not 0, and no part of a sum or of a mean.

So a mean over layers takes, for each key, the layers in which that key exists. Where some of the layers lack
keys, the sum of such a mean over all keys is more than 1, because what the other layers give to these keys is
divided among fewer layers. Knows no dataset, only arrays; lazy in, lazy out.

Maps are stored in float16 and averaged in float32. Whatever is not lazy is turned into float32 and averaged a
piece at a time that stays in a core's cache, which gives the same numbers as all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.errors import SelectionError

_PIECE_BYTES = 4_000_000  # of stored maps that are read at a time, or one inference's where those are more
_INFINITE = 0x7C00  # the bits of a float16 that is infinite; NaN and negative values have larger ones
_CACHED_VALUES = 50_000  # in float32 a tenth of what a core's own cache holds today


def in_pieces(
    array: xr.DataArray,
    numbers: int | Sequence[int] | NDArray[np.integer[Any]],
    read: Callable[[Any], xr.DataArray],
) -> xr.DataArray:
    """Read a few inferences after others, so that few maps are held at a time; of Dask's arrays all at once.

    Args:
        array: (inference, …) what is read from.
        numbers: inferences, or one.
        read: called with some of the numbers; returns (inference, …), reduced.

    Returns:
        What `read` returns of all of them, without the coordinates that vary along no dimension it kept.
    """
    if isinstance(numbers, int) or array.chunks is not None:
        return read(numbers)
    n_bytes = array.nbytes // max(1, array.sizes["inference"])
    length = max(1, _PIECE_BYTES // max(1, n_bytes))
    if len(numbers) <= length:
        return read(numbers)
    pieces = [read(numbers[start : start + length]) for start in range(0, len(numbers), length)]
    return joined(pieces, "inference")


def joined(pieces: Sequence[xr.DataArray], dim: str) -> xr.DataArray:
    """Put pieces of one array side by side again; their labels are taken from the first, not compared."""
    if len(pieces) == 1:
        return pieces[0]
    if not pieces[0].coords:  # milliseconds less
        variables = [piece.variable for piece in pieces]
        whole = xr.Variable.concat(variables, dim)  # type: ignore[no-untyped-call]
        return xr.DataArray(whole, name=pieces[0].name)
    return xr.concat(pieces, dim, coords="minimal", compat="override", join="override")


def mean_over(
    array: xr.DataArray,
    dims: str | Sequence[str],
    *,
    keys: str = "key",
    may_lack_keys: bool = True,
) -> xr.DataArray:
    """Return the mean over layers, heads, denoise steps or queries.

    Args:
        array: (…, key) share of attention, float; absent keys and missing rows are NaN.
        dims: what to average over, e.g. "layer" or ["layer", "head"].
        keys: the dimension of a row.
        may_lack_keys: False where all rows see the same keys, which is quicker and gives the same there.

    Returns:
        The other dimensions. For each key the mean over the rows in which it exists, NaN where it exists in
        none; NaN at every key where one of the rows is missing.
    """
    over = [dims] if isinstance(dims, str) else list(dims)
    if not may_lack_keys or keys not in array.dims:
        return plain_mean(array, *over)
    array = in_float32(array)
    exists = array.notnull()
    count = exists.sum(over).astype(array.dtype)
    mean = array.where(exists, 0).sum(over) / count.where(count > 0)
    is_missing = (~exists.any(keys)).any(over)
    return mean.where(~is_missing)


def over_heads(array: xr.DataArray, head: int | Sequence[int] | str, dim: str = "head") -> xr.DataArray:
    """Return the mean over heads, or the maximum; the array itself where `head` is "all" or chose some.

    Args:
        array: (…, head, …); all heads of a layer see the same keys, so what is NaN in one stays NaN.
        head: "mean", "max", "all", or what was selected already.
        dim: the dimension of the heads.
    """
    if not isinstance(head, str) or head == "all":
        return array
    return plain_mean(array, dim) if head == "mean" else array.max(dim, skipna=False)


def plain_mean(array: xr.DataArray, *dims: str) -> xr.DataArray:
    """Return the mean, NaN where one value is; of float16 in float32."""
    if len(dims) > 1 or array.dtype != np.float16 or array.chunks is not None or not array.size:
        return in_float32(array).mean(dims, skipna=False)
    values, axis = array.values, int(array.get_axis_num(dims[0]))
    mean = np.empty(values.shape[:axis] + values.shape[axis + 1 :], np.float32)
    n_outer = axis
    while n_outer and math.prod(values.shape[n_outer:]) < _CACHED_VALUES:
        n_outer -= 1
    for piece in np.ndindex(values.shape[:n_outer]):
        np.mean(_float32(values[piece]), axis=axis - n_outer, out=mean[piece])
    coords = {name: coord.variable for name, coord in array.coords.items() if dims[0] not in coord.dims}
    return xr.DataArray(mean, coords, [dim for dim in array.dims if dim != dims[0]], array.name, array.attrs)


def in_float32(array: xr.DataArray) -> xr.DataArray:
    """Return float16 as float32, and anything else as it is."""
    if array.dtype.kind != "f" or array.dtype.itemsize > 2:
        return array
    if array.dtype != np.float16 or array.chunks is not None:  # in another order of bytes, or lazy
        return array.astype(np.float32)
    return array.copy(data=_float32(array.values))


def _float32(values: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return what `values.astype(np.float32)` does, in an eighth of the time where all are shares.

    NumPy 2.2 converts float16 one value after another, in 8 ns. Here the bits of a float16, 5 of exponent and
    10 of mantissa, are put where float32 has 8 and 23, which takes vector instructions, and 112 is added to
    the exponent, because it counts from -15 in float16 and from -127 in float32. Below the smallest normal
    float16, m · 2⁻²⁴ has become 2⁻¹⁵ + m · 2⁻²⁵, and twice that less 2⁻¹⁴ is right; for all other
    values that is the larger of the two. Negative, infinite and missing values are left to NumPy.
    """
    bits = values.view(np.uint16)
    if not bits.size or bits.max() >= _INFINITE:
        return values.astype(np.float32)
    wide = bits.astype(np.uint32)
    wide <<= 13
    wide += 112 << 23
    result: NDArray[np.float32] = wide.view(np.float32)
    below = result + result
    below -= np.float32(2**-14)
    np.minimum(result, below, out=result)
    return result


def without(array: xr.DataArray, keys: Sequence[int], *, may_lack_keys: bool) -> xr.DataArray:
    """Set keys to 0 and rescale the others, of those that the layer can see, to sum to 1.

    Args:
        array: (…, key) share of attention, float32; absent keys and missing rows are NaN.
        keys: numbers of keys.
        may_lack_keys: False where no row has absent keys.

    Raises:
        SelectionError: no such key.
    """
    n_keys = array.sizes["key"]
    bad = [key for key in keys if not 0 <= key < n_keys]
    if bad:
        raise SelectionError(f"exclude: key {bad[0]} does not exist, expected 0 to {n_keys - 1}")
    keep = np.ones(n_keys, np.float32)
    keep[list(keys)] = 0
    kept = array * xr.DataArray(keep, dims="key")
    total = kept.sum("key", skipna=may_lack_keys)
    return kept / total.where(total != 0, 1)  # nothing left stays 0; a missing map and absent keys stay NaN


def row_sum(array: xr.DataArray, dims: str | Sequence[str] = "key") -> xr.DataArray:
    """Return the sum over the keys that exist, NaN where the row is missing.

    Args:
        array: (…, key) share of attention; absent keys and missing rows are NaN.
        dims: the dimension, or dimensions, of a row.
    """
    over = [dims] if isinstance(dims, str) else list(dims)
    exists = array.notnull()
    return array.where(exists, 0).sum(over).where(exists.any(over))


def group_sums(array: xr.DataArray, membership: xr.DataArray, *, may_lack_keys: bool = True) -> xr.DataArray:
    """Add up a row over groups of keys, e.g. the patches of a camera or the tokens of a word.

    Args:
        array: (…, key) share of attention; absent keys and missing rows are NaN.
        membership: (…, key, group) float32, 1 where the key belongs to the group; its other dimensions are
            the array's.
        may_lack_keys: False where no row has absent keys, which is quicker and gives the same there.

    Returns:
        (…, group): the sum over those of the group's keys that exist; NaN where the group has keys and none
        of them exists; 0 where it has no key; NaN in every group where the row is missing.
    """
    if not may_lack_keys:
        return _products(array, membership)
    exists = array.notnull()
    sums = _products(array.where(exists, 0), membership)
    n_there = _products(exists.astype(np.float32), membership)
    is_absent = (n_there == 0) & (membership.sum("key") > 0)
    result: xr.DataArray = sums.where(~is_absent & exists.any("key")).transpose(*sums.dims)
    return result


def _products(array: xr.DataArray, membership: xr.DataArray) -> xr.DataArray:
    """Return `xr.dot` over key, which has no fast way where both have another dimension in common."""
    if array.chunks is not None or membership.chunks is not None:
        lazy: xr.DataArray = xr.dot(array, membership, dim="key")
        return lazy
    common = [dim for dim in membership.dims if dim in array.dims and dim != "key"]
    (group,) = (dim for dim in membership.dims if dim not in array.dims)
    rows = array.transpose(*common, ..., "key")
    n_rows, n_keys = [rows.sizes[dim] for dim in common], rows.sizes["key"]
    matrices = rows.values.reshape(*n_rows, math.prod(rows.shape[len(common) : -1]), n_keys)
    sums = matrices @ membership.transpose(*common, "key", group).values
    dims = (*rows.dims[:-1], group)
    coords = {name: coord for name, coord in array.coords.items() if "key" not in coord.dims}
    result = xr.DataArray(sums.reshape(*rows.shape[:-1], membership.sizes[group]), coords, dims)
    return result.transpose(*(dim for dim in array.dims if dim != "key"), group)
