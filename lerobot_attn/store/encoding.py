"""Chunks as Zarr's codecs encode them, from an array's own metadata, without Zarr's event loop.

Zarr hands each chunk to an event loop and from there to threads: milliseconds of Python for what takes a
compressor microseconds. Here the same compressors are called directly, and what comes out is, chunk by chunk,
the bytes that Zarr writes (tests/test_encoding.py holds that). Knows the codecs that the schema uses, and no
others. Opens no file.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numcodecs
import numpy as np
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray

Encoded = Any  # what holds bytes: `bytes`, `bytearray` or an array of uint8

_SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}
_WORTH_THREADS_BYTES = 1_000_000  # starting threads takes as long as compressing some 50 kB


class ArrayEncoder:
    """Encodes the chunks of one array, or its shards of several chunks.

    Args:
        metadata: the array's `zarr.json`, as Zarr wrote it.

    Raises:
        ValueError: it names a codec that the schema does not use.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        # What one file holds: a chunk, or a shard.
        self._file_shape = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        self._chunk_shape, codecs = self._file_shape, metadata["codecs"]
        self._is_sharded = codecs[0]["name"] == "sharding_indexed"
        if self._is_sharded:
            sharding = codecs[0]["configuration"]
            if sharding.get("index_location", "end") != "end":
                raise ValueError("the index of a shard: got it at the start, expected it at the end")
            self._chunk_shape, codecs = tuple(sharding["chunk_shape"]), sharding["codecs"]
            self._encode_index = _chain(sharding["index_codecs"])
        self._encode = _chain(codecs)

    def parts(self, values: NDArray[Any], *, n_threads: int = 1) -> Iterator[Encoded]:
        """Yield what a file holds, from its beginning to its end.

        Args:
            values: all that the file covers, of its whole shape and the array's dtype.
            n_threads: how many encode at a time, where the chunks are worth it. What a codec does, it does
                without the interpreter's lock.
        """
        if values.shape != self._file_shape:
            raise ValueError(f"got values of shape {values.shape}, expected {self._file_shape}")
        if not self._is_sharded:
            yield self._encode(values)
            return
        inside = [whole // part for whole, part in zip(self._file_shape, self._chunk_shape, strict=True)]
        index, end = np.empty((math.prod(inside), 2), np.uint64), 0
        for number, chunk in enumerate(self._encoded(values, inside, n_threads)):
            index[number] = end, len(chunk)
            end += len(chunk)
            yield chunk
        yield self._encode_index(index.reshape(*inside, 2))

    def _encoded(self, values: NDArray[Any], inside: Sequence[int], n_threads: int) -> Iterator[Encoded]:
        """Yield the encoded chunks of a shard in the order of their indices."""
        chunks = [
            values[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, self._chunk_shape, strict=True))]
            for place in itertools.product(*map(range, inside))
        ]
        n_threads = min(n_threads, len(chunks))
        if n_threads == 1 or values.nbytes < _WORTH_THREADS_BYTES:
            yield from map(self._encode, chunks)
            return
        # Threads of this call: they inherit the priority of the thread that writes, and none outlives it.
        with ThreadPoolExecutor(n_threads, "lerobot-attn-encoder") as pool:
            yield from pool.map(self._encode, chunks)


def n_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # fewer than the machine has, in a container or a job of a cluster
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    if name == "bytes" and settings.get("endian", "little") == "little":
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


def _as_little_endian(chunk: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(chunk, chunk.dtype.newbyteorder("<"))
