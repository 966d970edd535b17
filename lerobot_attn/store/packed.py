"""A packed episode: a store's files as the members of one zip file, read where they lie.

    store = packed_at(Path("episode_00000.zarr.zip"))
    store.read("zarr.json")

The file is a plain zip, stored and not deflated, so a member is a range of its bytes; Zarr's own ZipStore
reads it too. It may come from a stranger: what is compressed, encrypted, named twice, or named so that it
would lie elsewhere once unpacked, is refused before anything is read. No file is held open, because a run has
thousands of them.
Knows nothing of what a store holds.
"""

from __future__ import annotations

import asyncio
import functools
import io
import os
import stat
import zipfile
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, Protocol

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from lerobot_attn.errors import StoreError, first_line

PACKED_SUFFIX = ".zip"  # behind that of a store's folder
HELP = "expected an episode packed by `lerobot-attn pack`, stored and not compressed"
_MAX_MEMBERS = 1_000_000
# The largest part of a file that its list of members may take: a hundred bytes for each.
_MAX_READ_BYTES = 128_000_000
_MAX_NAME = 1024
_HEADER_BYTES = 30  # of a member's own header, before its name
_ENCRYPTED, _STREAMED = 0x1, 0x8  # bits of a member's flags


class Member(NamedTuple):
    """Where a member's bytes lie in the file.

    Attributes:
        start: of its content, bytes.
        size: of its content, bytes.
    """

    start: int
    size: int


class Source(Protocol):
    """A file whose bytes are read by their place."""

    @property
    def size(self) -> int:
        """How long it is, bytes."""

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`."""

    async def read_async(self, start: int, stop: int) -> bytes:
        """Return the same without holding up an event loop."""


class LocalFile:
    """A file on this machine, opened for each read, that must stay what it was.

    Raises:
        OSError: it is not there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.stamp = stamp_of(path.stat())
        self.size = self.stamp[2]

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`.

        Raises:
            StoreError: another file has taken its place.
        """
        with self.path.open("rb", buffering=0) as file:  # a chunk is read once, and larger than any buffer
            if stamp_of(os.fstat(file.fileno())) != self.stamp:
                raise StoreError(f"{self.path}: another file has taken its place; open it again")
            file.seek(start)
            return file.read(stop - start)

    async def read_async(self, start: int, stop: int) -> bytes:
        """Return the same, read in a thread."""
        return await asyncio.to_thread(self.read, start, stop)


def stamp_of(found: os.stat_result) -> tuple[int, int, int]:
    """Return what tells a file from the one that takes its place."""
    return found.st_ino, found.st_mtime_ns, found.st_size


def packed_at(path: Path) -> Packed:
    """Return a packed episode's files; their list is read and checked, and nothing else.

    Raises:
        StoreError: no zip file, a truncated one, or members that no pack holds.
        OSError: it cannot be read.
    """
    path = path.absolute()
    return _packed(path, stamp_of(path.stat()))


@functools.lru_cache(maxsize=32)  # a list of a thousand members takes 5 ms to read
def _packed(path: Path, stamp: tuple[int, int, int]) -> Packed:
    source = LocalFile(path)
    return Packed(source, members_of(source, str(path)), str(path), functools.partial(packed_at, path))


class _Reader(io.RawIOBase):
    """A source as a file to seek in, which `zipfile` needs; nothing absurdly long is read of it."""

    def __init__(self, source: Source):
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self._source.size)[whence]
        if at < 0:
            raise OSError(f"a place {at} before its beginning")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        stop = self._source.size if size is None or size < 0 else min(self._at + size, self._source.size)
        if stop - self._at > _MAX_READ_BYTES:
            raise zipfile.BadZipFile(f"its list of members takes more than {_MAX_READ_BYTES} bytes")
        found = self._source.read(self._at, stop) if stop > self._at else b""
        self._at += len(found)
        return found


def members_of(source: Source, where: str) -> dict[str, Member]:
    """Return name → place of each member of a zip file that could be a packed store's.

    Args:
        source: the file.
        where: what errors call it.

    Raises:
        StoreError: no zip file, a truncated one, or members that no pack holds.
    """
    reader = _Reader(source)
    try:
        # Opened for reading, a ZipFile that is dropped leaves the file as it is.
        archive = zipfile.ZipFile(reader)
        infos, end = archive.infolist(), archive.start_dir
    except StoreError:
        raise
    except Exception as error:  # zipfile raises many kinds for damaged files
        raise StoreError(
            f"{where}: is no whole zip file ({first_line(error)}): truncated, or something else; {HELP}"
        ) from error
    if len(infos) > _MAX_MEMBERS:
        raise StoreError(f"{where}: holds {len(infos)} members, expected at most {_MAX_MEMBERS}; {HELP}")
    found: dict[str, Member] = {}
    # A member's content ends where the next one begins, whatever its own header says; so none overlap.
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        why_not = _why_not(info, found)
        start = end - info.file_size
        slack = start - info.header_offset - _HEADER_BYTES - _name_bytes(info)
        if why_not is None and (info.header_offset < 0 or slack < 0):
            why_not = "does not lie in it as its list says: truncated or damaged"
        if why_not is None and slack:
            start = _start(reader, info)
            if start + info.file_size > end:
                why_not = "does not lie in it as its list says: damaged"
        if why_not is not None:
            name = info.filename if len(info.filename) <= 60 else f"{info.filename[:57]}…"
            raise StoreError(f"{where}: its member {name!r} {why_not}; {HELP}")
        end = info.header_offset
        if not info.is_dir():
            found[info.filename] = Member(start, info.file_size)
    return found


def _name_bytes(info: zipfile.ZipInfo) -> int:
    try:
        return len(info.orig_filename.encode("ascii"))
    except UnicodeEncodeError:
        return len(info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace"))


def _start(reader: _Reader, info: zipfile.ZipInfo) -> int:
    """Return where a member's content begins, by its own header."""
    reader.seek(info.header_offset)
    header = reader.read(_HEADER_BYTES)
    lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return info.header_offset + _HEADER_BYTES + sum(lengths)


def _why_not(info: zipfile.ZipInfo, found: Mapping[str, Member]) -> str | None:
    """Return why no pack holds such a member; None if one may."""
    name = info.orig_filename
    parts = name.removesuffix("/").split("/")
    if len(name) > _MAX_NAME or not name.isprintable() or "\\" in name or ":" in parts[0]:
        return "has a name that is no plain path"
    if name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        return "would lie outside the store once unpacked"
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        return "is compressed, so parts of it cannot be read in place; unzip it and pack the folder"
    if info.flag_bits & _STREAMED:
        return "was written as a stream, so where it lies is not known; unzip it and pack the folder"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or no file"
    if info.filename in found:
        return "is there twice"
    return None


class Packed(Store):
    """A packed store's files for Zarr, xarray and Dask: read-only, from any thread or process.

    Args:
        source: the zip file.
        members: of `members_of`.
        where: what errors and Dask call it.
        again: opens it once more, in another process.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(
        self,
        source: Source,
        members: Mapping[str, Member],
        where: str,
        again: functools.partial[Packed],
    ):
        super().__init__(read_only=True)
        self.source, self.members, self.where = source, members, where
        self._again = again

    def __reduce__(self) -> Any:
        return self._again.func, self._again.args

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return self.where, getattr(self.source, "stamp", self.source.size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Packed) and self.__dask_tokenize__() == other.__dask_tokenize__()

    def __hash__(self) -> int:
        return hash(self.where)

    def __str__(self) -> str:
        return self.where

    # Files, for what reads a store without Zarr

    def holds(self, key: str) -> bool:
        """Return whether there is such a file."""
        return key in self.members

    def file_bytes(self, key: str) -> int:
        """Return a file's size, bytes.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._member(key).size

    def read(self, key: str) -> bytes:
        """Return what a file holds.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """
        start, size = self._member(key)
        return self._whole(key, size, self.source.read(start, start + size))

    def read_start(self, key: str, most: int) -> bytes:
        """Return what a file holds, up to so many bytes."""
        start, size = self._member(key)
        return self.source.read(start, start + min(size, most))

    def open_file(self, key: str) -> BinaryIO:
        """Return a file that can be read and sought in, as `read`."""
        return io.BytesIO(self.read(key))

    def total_bytes(self) -> int:
        """Return the size of the zip file, bytes."""
        return self.source.size

    def _member(self, key: str) -> Member:
        try:
            return self.members[key]
        except KeyError:
            raise FileNotFoundError(f"{self.where}: holds no {key}") from None

    def _whole(self, key: str, size: int, content: bytes) -> bytes:
        if len(content) != size:
            raise StoreError(f"{self.where}: {key} ends after {len(content)} of {size} bytes: truncated")
        return content

    # Zarr

    def with_read_only(self, read_only: bool = False) -> Packed:
        """Return itself: it cannot be written."""
        if not read_only:
            _refuse_writing()
        return self

    def _span(self, key: str, wanted: ByteRequest | None) -> tuple[int, int] | None:
        member = self.members.get(key)
        if member is None:
            return None
        first, stop = 0, member.size
        if isinstance(wanted, RangeByteRequest):
            first, stop = wanted.start, min(wanted.end, stop)
        elif isinstance(wanted, OffsetByteRequest):
            first = wanted.offset
        elif isinstance(wanted, SuffixByteRequest):
            first = max(0, stop - wanted.suffix)
        return member.start + min(first, stop), member.start + stop

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a file or a part of it; None where there is none."""
        span = self._span(key, byte_range)
        if span is None:
            return None
        content = self._whole(key, span[1] - span[0], self.source.read(*span))
        return (prototype or default_buffer_prototype()).buffer.from_bytes(content)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a file or a part of it; None where there is none."""
        span = self._span(key, byte_range)
        if span is None:
            return None
        content = self._whole(key, span[1] - span[0], await self.source.read_async(*span))
        return (prototype or default_buffer_prototype()).buffer.from_bytes(content)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return parts of files, None for each that is not there."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Return whether there is such a file."""
        return self.holds(key)

    async def getsize(self, key: str) -> int:
        """Return a file's size, bytes."""
        return self.file_bytes(key)

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the files' names that begin so."""
        for key in self.members:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield what lies in a folder."""
        folder = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        inside = (key.removeprefix(folder) for key in self.members if key.startswith(folder))
        for name in dict.fromkeys(key.partition("/")[0] for key in inside):
            yield name

    # Zarr reads without an event loop where all three are there; a quarter of a millisecond a map.

    def set_sync(self, key: str, value: Buffer) -> None:
        """Refuse to write."""
        _refuse_writing()

    def delete_sync(self, key: str) -> None:
        """Refuse to delete."""
        _refuse_writing()

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse to write."""
        _refuse_writing()

    async def delete(self, key: str) -> None:
        """Refuse to delete."""
        _refuse_writing()

    async def list(self) -> AsyncIterator[str]:
        """Yield the files' names."""
        for key in self.members:
            yield key


def _refuse_writing() -> NoReturn:
    raise ValueError("a packed store is read-only; expected an unpacked one (lerobot-attn unpack)")
