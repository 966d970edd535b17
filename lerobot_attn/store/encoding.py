"""Chunks as Zarr's codecs encode and decode them, from an array's own metadata, without Zarr's event loop.

Zarr hands each chunk to an event loop and from there to threads: milliseconds of Python for what takes a
compressor microseconds. Here the same compressors are called directly, and what comes out is, chunk by chunk,
the bytes that Zarr writes (tests/test_encoding.py holds that) and the values that it reads
(tests/test_direct.py). Knows the codecs that the schema uses, and no others. Opens no file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numcodecs
import numpy as np
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray

Encoded = Any  # what holds bytes: `bytes`, `bytearray` or an array of uint8

_SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}
WORTH_THREADS_BYTES = 1_000_000  # starting threads takes as long as compressing some 50 kB


def _without_checksum(content: Any) -> NDArray[np.uint8]:
    """Return what a checksum stands behind.

    Numcodecs' own way looks four times at what kind of buffer it got, which takes as long as the checksum.

    Raises:
        RuntimeError: it does not match.
    """
    encoded = np.frombuffer(content, np.uint8)
    if CRC32C.checksum(encoded[:-4]) != int.from_bytes(encoded[-4:].tobytes(), "little"):
        raise RuntimeError("the checksum does not match")
    return encoded[:-4]


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "blosc": numcodecs.Blosc().decode,
    "zstd": numcodecs.Zstd().decode,
    "crc32c": _without_checksum,
}


class _Cut(NamedTuple):
    """How an array is cut into files and chunks.

    Attributes:
        file_shape: what one file holds: a chunk, or a shard.
        chunk_shape: what is encoded at a time.
        codecs: of a chunk.
        index_codecs: of a shard's index; None where files are chunks.
    """

    file_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    codecs: Sequence[Mapping[str, Any]]
    index_codecs: Sequence[Mapping[str, Any]] | None

    @property
    def n_inside(self) -> tuple[int, ...]:
        """Chunks of a file along each dimension."""
        return tuple(whole // part for whole, part in zip(self.file_shape, self.chunk_shape, strict=True))

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> _Cut:
        """Return what an array's metadata says.

        Raises:
            ValueError: the index of a shard does not stand at its end.
        """
        file_shape = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        codecs = metadata["codecs"]
        if codecs[0]["name"] != "sharding_indexed":
            return cls(file_shape, file_shape, codecs, None)
        sharding = codecs[0]["configuration"]
        if sharding.get("index_location", "end") != "end":
            raise ValueError("the index of a shard: got it at the start, expected it at the end")
        return cls(file_shape, tuple(sharding["chunk_shape"]), sharding["codecs"], sharding["index_codecs"])


class ArrayEncoder:
    """Encodes the chunks of one array, or its shards of several chunks.

    Args:
        metadata: the array's `zarr.json`, as Zarr wrote it.

    Raises:
        ValueError: it names a codec that the schema does not use.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        self._cut = _Cut.of(metadata)
        self._encode = _chain(self._cut.codecs)
        self._encode_index = None if self._cut.index_codecs is None else _chain(self._cut.index_codecs)

    def parts(self, values: NDArray[Any], *, n_threads: int = 1) -> Iterator[Encoded]:
        """Yield what a file holds, from its beginning to its end.

        Args:
            values: all that the file covers, of its whole shape and the array's dtype.
            n_threads: how many encode at a time, where the chunks are worth it. What a codec does, it does
                without the interpreter's lock.
        """
        if values.shape != self._cut.file_shape:
            raise ValueError(f"got values of shape {values.shape}, expected {self._cut.file_shape}")
        if self._encode_index is None:
            yield self._encode(values)
            return
        inside = self._cut.n_inside
        index, end = np.empty((math.prod(inside), 2), np.uint64), 0
        for number, chunk in enumerate(self._encoded(values, inside, n_threads)):
            index[number] = end, len(chunk)
            end += len(chunk)
            yield chunk
        yield self._encode_index(index.reshape(*inside, 2))

    def _encoded(self, values: NDArray[Any], inside: Sequence[int], n_threads: int) -> Iterator[Encoded]:
        """Yield the encoded chunks of a shard in the order of their indices."""
        chunks = [
            values[
                tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, self._cut.chunk_shape, strict=True))
            ]
            for place in itertools.product(*map(range, inside))
        ]
        n_threads = min(n_threads, len(chunks))
        if n_threads == 1 or values.nbytes < WORTH_THREADS_BYTES:
            yield from map(self._encode, chunks)
            return
        # Threads of this call: they inherit the priority of the thread that writes, and none outlives it.
        with ThreadPoolExecutor(n_threads, "lerobot-attn-encoder") as pool:
            yield from pool.map(self._encode, chunks)


class ArrayDecoder:
    """Decodes the chunks of one array, and the indices of its shards.

    Args:
        metadata: the array's `zarr.json`.
        dtype: of the values, numbers or truths.

    Attributes:
        file_shape: what one file holds: a chunk, or a shard.
        chunk_shape: what is decoded at a time.
        n_inside: chunks of a file along each dimension.
        is_sharded: whether files are shards, with an index.
        index_bytes: length of a shard's index, which stands at the shard's end.

    Raises:
        ValueError: the metadata names a codec that the schema does not use, or an order that it does not.
    """

    def __init__(self, metadata: Mapping[str, Any], dtype: np.dtype[Any]):
        cut = _Cut.of(metadata)
        self.file_shape, self.chunk_shape, self.n_inside = cut.file_shape, cut.chunk_shape, cut.n_inside
        self.is_sharded = cut.index_codecs is not None
        self.index_bytes = 16 * math.prod(self.n_inside) + 4
        self._dtype = dtype.newbyteorder("<")
        order = list(range(len(self.chunk_shape)))
        codecs = list(cut.codecs)
        if codecs[0]["name"] == "transpose":
            order = list(codecs.pop(0)["configuration"]["order"])
        self._stored_shape = [self.chunk_shape[axis] for axis in order]
        self._axes = np.argsort(order).tolist()
        self._steps = _undoing(codecs)
        # An index without a checksum might be taken for what it is not.
        if cut.index_codecs is not None and [codec["name"] for codec in cut.index_codecs[1:]] != ["crc32c"]:
            raise ValueError("the index of a shard: expected it with a checksum")
        self._index_steps = _undoing(cut.index_codecs or [{"name": "bytes"}])

    def chunk(self, encoded: bytes) -> NDArray[Any]:
        """Return the values of a chunk, which cannot be written to.

        Raises:
            Exception: of many kinds, where it is damaged: what its codecs raise.
        """
        content: Any = encoded
        for step in self._steps:
            content = step(content)
        return np.frombuffer(content, self._dtype).reshape(self._stored_shape).transpose(self._axes)

    def places(self, index: bytes) -> NDArray[np.uint64]:
        """Return where the chunks of a shard lie in it.

        Args:
            index: the end of the shard, `index_bytes` long.

        Returns:
            (chunks inside along each dimension, 2): offset and length, bytes; of a chunk that is not there
            both are 2**64 - 1.

        Raises:
            RuntimeError: its checksum does not match.
        """
        content: Any = index
        for step in self._index_steps:
            content = step(content)
        return np.frombuffer(content, "<u8").reshape(*self.n_inside, 2)


def _chain(codecs: Sequence[Mapping[str, Any]]) -> Callable[[NDArray[Any]], Encoded]:
    """Return what a list of codecs does to a chunk."""
    steps = [_step(codec["name"], codec.get("configuration", {})) for codec in codecs]

    def encode(chunk: NDArray[Any]) -> Encoded:
        encoded: Any = chunk
        for step in steps:
            encoded = step(encoded)
        return encoded

    return encode


def _step(name: str, settings: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return what a codec does.

    Raises:
        ValueError: the schema does not use it.
    """
    if name == "transpose":
        order = tuple(settings["order"])
        return lambda chunk: chunk.transpose(order)
    if _is_little_endian({"name": name, "configuration": settings}):
        return _as_little_endian
    if name == "vlen-utf8":
        return numcodecs.VLenUTF8().encode  # type: ignore[no-any-return]
    if name == "blosc":
        given = {key: settings[key] for key in ("cname", "clevel", "blocksize")}
        blosc = numcodecs.Blosc(**given, shuffle=_SHUFFLES[settings["shuffle"]])
        return blosc.encode  # type: ignore[no-any-return]
    if name == "zstd":
        zstd = numcodecs.Zstd(level=settings["level"], checksum=settings["checksum"])
        return zstd.encode  # type: ignore[no-any-return]
    if name == "crc32c":
        return CRC32C(location="end").encode  # type: ignore[no-any-return]
    raise ValueError(f"codec {name!r} with {dict(settings)}: expected one that the schema uses")


def _undoing(codecs: Sequence[Mapping[str, Any]]) -> list[Callable[[Any], Any]]:
    """Return what undoes the codecs that turn values into bytes and compress those, the last one first.

    Raises:
        ValueError: the schema does not use one of them.
    """
    serializer, *compressors = codecs
    if not _is_little_endian(serializer) or any(codec["name"] not in _DECODERS for codec in compressors):
        raise ValueError(f"codecs {list(codecs)}: expected those that the schema uses")
    return [_DECODERS[codec["name"]] for codec in reversed(compressors)]


def _is_little_endian(codec: Mapping[str, Any]) -> bool:
    """Whether a codec turns values into bytes, the least significant one first."""
    settings = codec.get("configuration", {})
    return bool(codec["name"] == "bytes" and settings.get("endian", "little") == "little")


def _as_little_endian(chunk: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(chunk, chunk.dtype.newbyteorder("<"))
