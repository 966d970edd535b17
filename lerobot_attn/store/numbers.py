"""Stored numbers that stand for something else (a kind, a word, a row of another array), checked when read.

    allowed = allowed_numbers(n_cameras=2, n_inferences=28, n_queries=50)
    values = check_when_read(variable, "….zarr: key_kind", allowed["key_kind"])

Whoever looks up an enum or an index by a stored number can trust it: a number that means nothing raises
StoreError with its array and place, at the moment at which it is read. Nothing is read ahead. Knows arrays
and what the schema says of them, and no file.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from lerobot_attn.errors import StoreError
from lerobot_attn.layout import Kind

if TYPE_CHECKING:
    import xarray as xr


class Allowed(NamedTuple):
    """The whole numbers that an array may hold: first … last, or first and more where last is None."""

    first: int
    last: int | None

    def __str__(self) -> str:
        return f"{self.first} or more" if self.last is None else f"{self.first} to {self.last}"

    def refuses(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which values are not allowed."""
        return (values < self.first) | (False if self.last is None else values > self.last)


def allowed_numbers(
    n_cameras: int, n_inferences: int, n_queries: int, n_instances: int = 0
) -> dict[str, Allowed]:
    """Return array name → the numbers that mean something there.

    Args:
        n_cameras: cameras of the layout.
        n_inferences: inferences that the store holds.
        n_queries: action tokens of an inference.
        n_instances: what masks can show; 0 where there are none.
    """
    return {
        "key_kind": Allowed(min(Kind), max(Kind)),
        "key_camera": Allowed(-1, n_cameras - 1),
        "text_word": Allowed(-1, None),
        "text_state_dim": Allowed(-1, None),
        "inference_frame": Allowed(0, None),
        "frame_inference": Allowed(0, n_inferences - 1),
        "frame_query": Allowed(-1, n_queries - 1),
        "segmentation": Allowed(-1, n_instances - 1),
    }


def check_when_read(variable: xr.Variable, where: str, allowed: Allowed) -> indexing.MemoryCachedArray:
    """Return a variable's values, still lazy, such that reading one that is not allowed raises StoreError.

    Args:
        variable: without Dask's chunks.
        where: store and array, for the error.
        allowed: the numbers that it may hold.
    """
    check = partial(_check, where, variable.dims, allowed)
    lazy = indexing.LazilyIndexedArray(_CheckedArray(variable.copy(deep=False), check))
    # xarray wraps its own arrays so, too: what was read whole is kept, and nobody changes what is kept.
    kept: indexing.MemoryCachedArray = indexing.MemoryCachedArray(indexing.CopyOnWriteArray(lazy))  # type: ignore
    return kept


class _CheckedArray(BackendArray):
    """A variable's values, read when they are asked for and checked then."""

    def __init__(self, variable: xr.Variable, check: partial[None]):
        self.shape, self.dtype = variable.shape, variable.dtype
        self._variable, self._check = variable, check

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        values = np.asarray(self._variable[key].values)
        positions = [np.atleast_1d(np.arange(n)[part]) for n, part in zip(self.shape, key, strict=True)]
        self._check(values.reshape([len(part) for part in positions]), positions)
        return values


def _check(
    where: str,
    dims: tuple[Hashable, ...],
    allowed: Allowed,
    values: NDArray[Any],
    positions: list[NDArray[np.integer[Any]]],
) -> None:
    wrong = allowed.refuses(values)
    if wrong.any():
        at = np.unravel_index(int(wrong.argmax()), values.shape)
        place = ", ".join(f"{dim} {part[i]}" for dim, part, i in zip(dims, positions, at, strict=True))
        raise StoreError(f"{where} is {values[at]} at {place}, expected {allowed}: damaged")
