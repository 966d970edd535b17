"""The one mean over layers and heads, and the one sum over keys, where keys are absent or maps are missing.

A row is what one query of one layer and head gives to all keys. It can be NaN in two ways:

- at every key: the store lacks the map. The row is *missing*, and so is every result that needs it.
- at some keys: the layer cannot see them, e.g. the suffix in SmolVLA's cross-attention. Those keys are
  *absent*: not 0, and no part of a sum or of a mean.

So a mean over layers takes, for each key, the layers in which that key exists. Where some of the layers lack
keys, the sum of such a mean over all keys is more than 1, because what the other layers give to these keys is
divided among fewer layers. Knows no dataset, only arrays; lazy in, lazy out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr


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
        return array.mean(over, skipna=False)
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
    return array.mean(dim, skipna=False) if head == "mean" else array.max(dim, skipna=False)


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
        membership: (…, key, group) float32, 1 where the key belongs to the group.
        may_lack_keys: False where no row has absent keys, which is quicker and gives the same there.

    Returns:
        (…, group): the sum over those of the group's keys that exist; NaN where the group has keys and none
        of them exists; 0 where it has no key; NaN in every group where the row is missing.
    """
    if not may_lack_keys:
        plain: xr.DataArray = xr.dot(array, membership, dim="key")
        return plain
    exists = array.notnull()
    sums = xr.dot(array.where(exists, 0), membership, dim="key")
    n_there = xr.dot(exists.astype(np.float32), membership, dim="key")
    is_absent = (n_there == 0) & (membership.sum("key") > 0)
    result: xr.DataArray = sums.where(~is_absent & exists.any("key")).transpose(*sums.dims)
    return result
