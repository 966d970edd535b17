"""Where the chunks of a store's arrays lie: in which file, and what part of the array each covers.

Knows Zarr's files and shards. Judges none of them: that is `lerobot_attn.store.damage`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import zarr
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray

from lerobot_attn.errors import StoreError, first_line
from lerobot_attn.store.location import Files, Folder, files_at
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.schema import BY_NAME, DIMENSIONS, METADATA, Growth

Grid = tuple[int, ...]
_CHECKSUM = CRC32C(location="end")
_ABSENT = 2**64 - 1  # offset and length in a shard's index of a chunk that is not there


class StoredArray:
    """One array as the group's metadata describes it: where its chunks lie and what they cover.

    Indices of chunks count along every dimension of the array; their leading parts do for a place.

    Args:
        files: of the store.
        array: opened from the group's consolidated metadata.
        metadata: the same as JSON.
    """

    def __init__(self, files: Files, array: zarr.Array[Any], metadata: Mapping[str, Any]):
        self.name = array.path
        self.array = array
        self.metadata = metadata
        self._files = files
        self.spec = BY_NAME.get(self.name)
        self.dims = self.spec.dims if self.spec else tuple(f"axis {axis}" for axis in range(array.ndim))
        codecs = metadata["codecs"]
        self._chunk = self._file = array.shards or array.chunks
        self._sharding: Mapping[str, Any] | None = None
        # One inference a shard; other shards would be taken as chunks.
        whole = all(size >= n for size, n in zip(self._file[1:], array.shape[1:], strict=True))
        is_ours = whole and array.chunks[:1] == self._file[:1] == (1,)
        if is_ours and _names(codecs) == ["sharding_indexed"]:
            self._chunk = array.chunks
            self._sharding = codecs[0]["configuration"]
            codecs = codecs[0]["configuration"]["codecs"]
        self.has_checksums = _names(codecs)[-1:] == ["crc32c"]

    @property
    def is_sharded(self) -> bool:
        """Whether its files are shards of several chunks."""
        return self._sharding is not None

    @property
    def grows_with(self) -> Growth:
        """The dimension along which rows are appended, if any."""
        return self.spec.grows_with if self.spec else None

    @property
    def can_miss_values(self) -> bool:
        """Whether what is not there reads as NaN or unknown, and so cannot be taken for a value."""
        return self.spec is not None and self.spec.can_be_missing

    @property
    def n_files(self) -> Grid:
        """Files along each dimension: shards, or chunks."""
        return tuple(math.ceil(n / size) for n, size in zip(self.array.shape, self._file, strict=True))

    @property
    def n_inside(self) -> Grid:
        """Chunks of a file along each dimension."""
        return tuple(file // chunk for file, chunk in zip(self._file, self._chunk, strict=True))

    @property
    def n_chunks(self) -> int:
        """Number of chunks."""
        return math.prod(self.n_files) * math.prod(self.n_inside)

    @property
    def _n_leading(self) -> int:
        """Dimensions that chunks divide, and those before them."""
        counts = [file * inside for file, inside in zip(self.n_files, self.n_inside, strict=True)]
        divided = [axis for axis, count in enumerate(counts) if count > 1]
        if self.spec and (self.spec.sharded or self.grows_with):
            # Also where an episode holds but one of each.
            sizes = self.spec.chunks(dict.fromkeys(DIMENSIONS, 2))
            divided += [axis for axis, size in enumerate(sizes) if size == 1 or axis == 0]
        return max(divided, default=-1) + 1

    @property
    def folder(self) -> Path:
        """Where the array lies, in a store that is a folder."""
        assert isinstance(self._files, Folder)
        return self._files.root / self.name

    def file(self, index: Sequence[int]) -> Path:
        """Return the file of a shard or of an unsharded chunk, in a store that is a folder."""
        return self.folder / self._key(index)

    def file_name(self, index: Sequence[int]) -> str:
        """Return the name in the store of the file of a shard or of an unsharded chunk."""
        return f"{self.name}/{self._key(index)}"

    def is_there(self, index: Sequence[int]) -> bool:
        """Return whether there is a file of a shard or of an unsharded chunk."""
        return self._files.holds(self.file_name(index))

    def open_file(self, index: Sequence[int]) -> BinaryIO:
        """Return the file of a shard or of an unsharded chunk, open for reading.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        return self._files.open_file(self.file_name(index))

    def own_metadata(self) -> Any:
        """Return the array's own metadata, of which `metadata` is the group's copy.

        Raises:
            OSError: there is none, or it cannot be read.
            ValueError: it is no JSON.
        """
        return json.loads(self._files.read(f"{self.name}/{METADATA}").decode("utf-8"))

    def _key(self, index: Sequence[int]) -> str:
        whole = (*index, *[0] * (self.array.ndim - len(index)))
        return self.array.metadata.encode_chunk_key(whole)

    def file_of(self, chunk: Sequence[int]) -> Path:
        """Return the file that a chunk is in, by its index or the leading part of it."""
        return self.file([i // n for i, n in zip(chunk, self.n_inside, strict=False)])

    def leading(self, index: Sequence[int]) -> Grid:
        """Return a chunk's index without the dimensions that one chunk covers."""
        return tuple(index[: self._n_leading])

    def selection(self, chunk: Sequence[int]) -> tuple[slice, ...]:
        """Return what a chunk covers of the array."""
        return tuple(
            slice(i * size, min((i + 1) * size, n))
            for i, size, n in zip(chunk, self._chunk, self.array.shape, strict=False)
        )

    def place(self, chunk: Sequence[int], labels: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Return dimension → label of what a chunk covers, or its position where there are no labels.

        Args:
            chunk: its index, or the leading part of it.
            labels: dimension → its labels.
        """
        at: dict[str, Any] = {}
        for dim, part in zip(self.dims, self.selection(self.leading(chunk)), strict=False):
            first, last = part.start, part.stop - 1
            if dim in labels:
                at[dim] = labels[dim][first]
            elif dim in ("inference", "frame"):
                at[dim] = first if first == last else (first, last)
            else:
                at[dim] = f"at position {first}"
        return at

    def index_of_shard(self, file: BinaryIO) -> ShardIndex:
        """Read a shard's index.

        Args:
            file: the shard, open for reading.

        Raises:
            ValueError: it is damaged.
        """
        assert self._sharding is not None
        if _names(self._sharding["index_codecs"]) != ["bytes", "crc32c"]:
            raise ValueError("its index is not stored as bytes with a checksum")
        n_bytes = 16 * math.prod(self.n_inside) + 4
        length = file.seek(0, 2)
        if length < n_bytes:
            raise ValueError(f"it is truncated to {length} bytes, its index alone takes {n_bytes}")
        at_end = self._sharding.get("index_location", "end") == "end"
        start = file.seek(length - n_bytes if at_end else 0)
        try:
            entries = np.frombuffer(_CHECKSUM.decode(file.read(n_bytes)), "<u8")
        except RuntimeError:
            raise ValueError("its index cannot be read: it is truncated, or damaged there") from None
        return ShardIndex(start, entries.reshape(*self.n_inside, 2).copy())


class ShardIndex(NamedTuple):
    """Where the chunks of a shard lie in its file.

    Attributes:
        start: of the index in the file, bytes.
        entries: (chunks inside along each dimension, 2): offset and length, bytes.
    """

    start: int
    entries: NDArray[np.uint64]

    def holds(self, inside: Grid) -> bool:
        """Whether a chunk is there."""
        return bool((self.entries[inside] != _ABSENT).any())

    def drop(self, inside: Grid) -> None:
        """Forget a chunk."""
        self.entries[inside] = _ABSENT

    def encoded(self) -> bytes:
        """Return the bytes of the index, its checksum included."""
        return bytes(_CHECKSUM.encode(self.entries.tobytes()))


def stored_arrays(episode: Episode) -> dict[str, StoredArray]:
    """Return the arrays of a store by name, as its consolidated metadata describes them.

    Raises:
        StoreError: the metadata is damaged.
    """
    try:
        files = files_at(episode.path)
        document = json.loads(files.read(METADATA).decode("utf-8"))
        group = zarr.open_group(files, mode="r", zarr_format=3, use_consolidated=True)
        described = document["consolidated_metadata"]["metadata"]
        return {name: StoredArray(files, _array(group, name), described[name]) for name in described}
    except Exception as error:  # zarr raises many kinds for damaged metadata
        raise StoreError(f"{episode.path}: damaged metadata: {first_line(error)}") from error


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _names(codecs: Any) -> list[str]:
    return [codec["name"] if isinstance(codec, dict) else codec for codec in codecs]
