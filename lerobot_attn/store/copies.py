"""Copies of a store's smallest files in its metadata, so that at a URL they come with the first request.

    document["consolidated_metadata"]["copies"] = copies_of(folder, arrays)

They are the chunks of small tables and, of sharded arrays, the indexes at the ends of shards: what a reader
needs before it can ask for a map. The bytes are those of the files, as base64, checksums included. A copy is
made only of what is not written any more. Files count: readers on this machine do not look at copies, and
`verify` says where one is not what its file holds. Knows files and their codecs, and no meaning.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs
import numpy as np
from numcodecs.checksum32 import CRC32C

from lerobot_attn.store.encoding import ArrayDecoder
from lerobot_attn.store.schema import BY_NAME

COPIES = "copies"
# Of a file, of all tables, and of all indexes. An array is copied whole or not at all.
_MAX_FILE_BYTES, _MAX_TABLES_BYTES, _MAX_INDEXES_BYTES = 1 << 11, 1 << 14, 1 << 15
_CHECKSUM = CRC32C(location="end")


class Copies(NamedTuple):
    """Copies that hold what their checksums say.

    Attributes:
        files: file in the store → what it holds.
        ends: file → its last bytes, the index of a shard.
    """

    files: dict[str, bytes]
    ends: dict[str, bytes]


def copies_of(folder: Path, arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return copies of a store's small files, as they stand in its metadata.

    Args:
        folder: the store's, into which nothing is written meanwhile.
        arrays: name → metadata.
    """
    tables, indexes = dict[str, str](), dict[str, str]()
    left = {"tables": _MAX_TABLES_BYTES, "indexes": _MAX_INDEXES_BYTES}
    for name, array in arrays.items():
        end = _end_bytes(name, array)
        if end is None:
            continue
        copied, kind = (tables, "tables") if end == 0 else (indexes, "indexes")
        # A long episode of many files: none of them is read.
        if n_files(array) * max(1, end) > left[kind]:
            continue
        found = {key: _content(folder / key, end) for key in file_names(name, array)}
        content = {key: value for key, value in found.items() if value is not None}
        n_bytes = sum(map(len, content.values()))
        if n_bytes <= left[kind] and all(len(value) <= _MAX_FILE_BYTES for value in content.values()):
            left[kind] -= n_bytes
            copied |= {key: base64.b64encode(value).decode("ascii") for key, value in content.items()}
    return {"files": tables, "ends": indexes}


def copies_in(document: Mapping[str, Any]) -> Copies:
    """Return the copies in a store's metadata, of arrays that the schema knows.

    Whatever is not as `copies_of` writes it, is too long or too short, or has another checksum, is left out:
    the file itself is read then.

    Args:
        document: the group's `zarr.json`, checked.
    """
    consolidated = document["consolidated_metadata"]
    said = consolidated.get(COPIES)
    found = Copies({}, {})
    if not isinstance(said, dict):
        return found
    for name, array in consolidated["metadata"].items():
        end = _end_bytes(name, array)
        texts = said.get("files" if end == 0 else "ends")
        # Nobody needs more names made up than there are texts.
        if end is None or not isinstance(texts, dict) or n_files(array) > len(texts):
            continue
        for key in file_names(name, array):
            content = _decoded(texts.get(key))
            if content is not None and _is_sound(array, content, end):
                (found.ends if end else found.files)[key] = content
    return found


def n_files(array: Mapping[str, Any]) -> int:
    """Return how many files an array has, by its metadata."""
    return math.prod(_grid(array))


def file_names(name: str, array: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names in a store of an array's files, by its metadata."""
    for index in np.ndindex(*_grid(array)):
        yield "/".join([name, "c", *map(str, index)])


def _grid(array: Mapping[str, Any]) -> list[int]:
    sizes = array["chunk_grid"]["configuration"]["chunk_shape"]
    return [math.ceil(n / size) for n, size in zip(array["shape"], sizes, strict=True)]


def _end_bytes(name: str, array: Mapping[str, Any]) -> int | None:
    """Return how much of a file's end is copied, 0 for all of it; None where nothing is."""
    spec = BY_NAME.get(name)
    if spec is None:
        return None
    if not spec.sharded:
        return 0
    try:
        decoder = ArrayDecoder(array, np.dtype(array["data_type"]))
    except Exception:  # a strange store's metadata is for Zarr to judge
        return None
    return decoder.index_bytes if decoder.is_sharded else None


def _content(file: Path, end: int) -> bytes | None:
    """Return what is copied of a file; None where it is not there."""
    try:
        with file.open("rb") as opened:
            if end:
                opened.seek(-end, 2)
            return opened.read(_MAX_FILE_BYTES + 1)
    except OSError:
        return None


def _decoded(text: Any) -> bytes | None:
    if not isinstance(text, str) or len(text) > 2 * _MAX_FILE_BYTES:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None


def _is_sound(array: Mapping[str, Any], content: bytes, end: int) -> bool:
    """Return whether a copy can be read as its file would be, values of the array's shape and dtype."""
    try:
        if array["data_type"] == "string":
            n_texts: int = math.prod(array["chunk_grid"]["configuration"]["chunk_shape"])
            return _n_texts(array, content) == n_texts
        decoder = ArrayDecoder(array, np.dtype(array["data_type"]))
        if end:
            return len(content) == end and decoder.places(content) is not None
        has_checksum: bool = array["codecs"][-1]["name"] == "crc32c"
        return has_checksum and decoder.chunk(content) is not None
    except Exception:  # of many kinds: what its codecs raise
        return False


def _n_texts(array: Mapping[str, Any], content: bytes) -> int:
    """Return how many texts a chunk holds; -1 where it is not encoded as the schema has it."""
    if [codec["name"] for codec in array["codecs"]] != ["vlen-utf8", "zstd", "crc32c"]:
        return -1
    texts = numcodecs.Zstd().decode(_CHECKSUM.decode(content))
    return len(numcodecs.VLenUTF8().decode(texts))
