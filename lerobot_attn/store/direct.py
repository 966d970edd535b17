"""Numbers of a store on this machine, read from its files without Zarr's event loop.

For xarray this stands in the place of Zarr's array. A chunk's range of its shard is read, held against its
checksum, decoded, and what is asked for is copied. Wherever something is not as expected (another codec; a
file that is missing, short, damaged or replaced meanwhile; texts; points instead of ranges), the whole
question goes to Zarr, which says what is wrong, or gives the value that stands for what is not there. So
nothing is decided here about damage. Safe from any thread and process; no file is held open.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from xarray.backends.zarr import ZarrArrayWrapper, ZarrStore
from xarray.core import indexing

from lerobot_attn.sizes import n_cores
from lerobot_attn.store.encoding import WORTH_THREADS_BYTES, ArrayDecoder
from lerobot_attn.store.location import Folder
from lerobot_attn.store.packed import LocalFile, Member, Packed, Source

Index = tuple[int, ...]


class DirectStore(ZarrStore):
    """A store's arrays as xarray opens them, of which numbers are read directly. Made by `open_group`."""

    def open_store_variable(self, name: Any) -> Any:
        """Return an array, lazy."""
        variable = super().open_store_variable(name)  # type: ignore[no-untyped-call]
        variable.data = indexing.LazilyIndexedArray(DirectArray(self.members[name]))  # type: ignore
        return variable


class DirectArray(ZarrArrayWrapper):
    """One array for xarray, read directly where that is sure to give what Zarr gives."""

    def __reduce__(self) -> Any:
        return DirectArray, (self._array,)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        # Of points, Zarr reads no chunk that none lies in.
        if self._chunks is not None and not isinstance(key, indexing.VectorizedIndexer):
            outer = indexing.IndexingSupport.OUTER
            try:
                return indexing.explicit_indexing_adapter(key, self.shape, outer, self._chunks.read)
            except Exception:  # what damaged files raise depends on the codec: Zarr shall say it
                pass
        return super().__getitem__(key)  # type: ignore[no-untyped-call]

    @cached_property
    def _chunks(self) -> _Chunks | None:
        return _chunks_of(self._array)


def _chunks_of(array: zarr.Array[Any]) -> _Chunks | None:
    """Return an array's chunks; None where Zarr alone can read them."""
    store = array.store
    if not isinstance(store, (Folder, Packed)) or array.dtype.kind not in "biufc":
        return None
    if isinstance(store, Packed) and not isinstance(store.source, LocalFile):  # at a URL
        return None
    try:
        return _Chunks(array, store, ArrayDecoder(array.metadata.to_dict(), array.dtype))
    except Exception:  # a strange store's metadata is for Zarr to judge
        return None


class _Piece(NamedTuple):
    """What is asked for along one dimension, of one chunk.

    Attributes:
        number: of the chunk.
        inside: which of its values.
        at: where they go.
    """

    number: int
    inside: slice | NDArray[np.integer[Any]]
    at: slice


class _Part(NamedTuple):
    """What is asked for of one chunk, and where the chunk lies.

    Attributes:
        source: the file.
        place: of the chunk in it.
        pieces: one a dimension.
    """

    source: Source
    place: Member
    pieces: tuple[_Piece, ...]


class _Chunks:
    """The chunks of one array.

    Args:
        array: opened from the group's consolidated metadata.
        files: of the store, on this machine.
        decoder: of its chunks.
    """

    def __init__(self, array: zarr.Array[Any], files: Folder | Packed, decoder: ArrayDecoder):
        self._array, self._files, self._decoder = array, files, decoder
        self._dtype, self._shape = array.dtype, array.shape

    def read(self, key: Sequence[Any]) -> NDArray[Any]:
        """Return values.

        Args:
            key: for each dimension a number, a slice, or numbers in ascending order.

        Raises:
            Exception: of many kinds: something is not as expected.
        """
        sizes = self._decoder.chunk_shape
        axes = [list(_pieces(*of)) for of in zip(key, self._shape, sizes, strict=True)]
        values = np.empty([pieces[-1].at.stop if pieces else 0 for pieces in axes], self._dtype)
        parts = list(self._parts(itertools.product(*axes)))

        def fill(part: _Part) -> None:
            chunk = self._decoder.chunk(_read(part.source, part.place))
            values[tuple(piece.at for piece in part.pieces)] = _chosen(chunk, part.pieces)

        n_threads = min(n_cores(), len(parts))
        decoded_bytes = len(parts) * self._dtype.itemsize * int(np.prod(sizes))
        if n_threads > 1 and decoded_bytes > WORTH_THREADS_BYTES:
            with ThreadPoolExecutor(n_threads, "lerobot-attn-reader") as pool:
                for _ in pool.map(fill, parts):
                    pass
        else:
            for part in parts:
                fill(part)
        whole = (0 if isinstance(one, (int, np.integer)) else slice(None) for one in key)
        return values[(*whole, ...)]

    def _parts(self, wanted: Iterable[tuple[_Piece, ...]]) -> Iterator[_Part]:
        """Find the chunks; those of one shard must come one after another, or its index is read again."""

        def file_of(pieces: tuple[_Piece, ...]) -> Index:
            return tuple(piece.number // n for piece, n in zip(pieces, inside, strict=True))

        inside = self._decoder.n_inside
        for index, of_file in itertools.groupby(wanted, file_of):
            key = f"{self._array.path}/{self._array.metadata.encode_chunk_key(index)}"
            source, file = _file_at(self._files, key)
            if not self._decoder.is_sharded:
                yield from (_Part(source, file, pieces) for pieces in of_file)
                continue
            end = Member(file.start + file.size - self._decoder.index_bytes, self._decoder.index_bytes)
            if end.start < file.start:
                raise ValueError(f"{key} is too short")
            places = self._decoder.places(_read(source, end))
            for pieces in of_file:
                chunk = tuple(piece.number % n for piece, n in zip(pieces, inside, strict=True))
                offset, length = places[chunk].tolist()
                if file.start + offset + length > end.start:  # also where there is none
                    raise ValueError(f"chunk {chunk} of {key} does not lie in it")
                yield _Part(source, Member(file.start + offset, length), pieces)


def _file_at(files: Folder | Packed, key: str) -> tuple[Source, Member]:
    """Return a file of a store on this machine, and what part of it is the store's."""
    if isinstance(files, Packed):
        return files.source, files.members[key]
    source = LocalFile(files.root / key)
    return source, Member(0, source.size)


def _read(source: Source, place: Member) -> bytes:
    content = source.read(place.start, place.start + place.size)
    if len(content) != place.size:
        raise ValueError(f"got {len(content)} bytes, expected {place.size}")
    return content


def _pieces(wanted: Any, length: int, size: int) -> Iterator[_Piece]:
    """Cut what is asked for along a dimension where chunks end.

    Args:
        wanted: a number, a slice, or numbers in ascending order.
        length: of the dimension.
        size: of a chunk.

    Raises:
        ValueError: they do not ascend, or lie outside.
    """
    if isinstance(wanted, np.ndarray):
        if wanted.size and (wanted[0] < 0 or wanted[-1] >= length or (np.diff(wanted) < 0).any()):
            raise ValueError("expected ascending numbers inside the array")
        if wanted.size and wanted[-1] - wanted[0] == wanted.size - 1 and (np.diff(wanted) == 1).all():
            # A slice is a view of the chunk, numbers would be a copy.
            yield from _pieces(slice(int(wanted[0]), int(wanted[-1]) + 1), length, size)
            return
        numbers = wanted // size
        starts = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
        for at, stop in itertools.pairwise([*starts, len(wanted)]):
            number = int(numbers[at])
            yield _Piece(number, wanted[at:stop] - number * size, slice(at, stop))
        return
    one = isinstance(wanted, (int, np.integer))
    positions = range(length)[wanted : wanted + 1 or None] if one else range(length)[wanted]
    if positions.step < 0 or (one and not positions):
        raise ValueError("expected ascending numbers inside the array")
    at = 0
    while at < len(positions):
        number, first = divmod(positions[at], size)
        n = min(len(positions) - at, (size - first - 1) // positions.step + 1)
        inside = slice(first, first + (n - 1) * positions.step + 1, positions.step)
        yield _Piece(number, inside, slice(at, at + n))
        at += n


def _chosen(chunk: NDArray[Any], pieces: Sequence[_Piece]) -> NDArray[Any]:
    """Return what is asked for of a chunk, all its dimensions kept."""
    chosen = chunk[tuple(p.inside if isinstance(p.inside, slice) else slice(None) for p in pieces)]
    for axis, piece in enumerate(pieces):
        if not isinstance(piece.inside, slice):
            chosen = chosen.take(piece.inside, axis)
    return chosen
