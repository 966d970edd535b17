"""The zip file of a packed episode, made of a store's files: written to disk, or read as if it were there.

    zipped = Zipped.of(Folder(store), names_in_order(store))
    for block in zipped.blocks(): …

The same store gives the same bytes, wherever and whenever. Knows nothing of what a store holds.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lerobot_attn.errors import StoreError
from lerobot_attn.store.location import Files, Folder
from lerobot_attn.store.packed import Packed
from lerobot_attn.store.schema import BY_NAME, METADATA

BLOCK_BYTES = 1 << 20
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say: the same store gives the same file


def names_in_order(store: Path) -> list[str]:
    """Return the names of a store's files in the order in which they are packed.

    Maps come first and the group's metadata last: one read of the file's last part then brings all tables
    beside the list of members.
    """
    names = [path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()]
    return sorted(names, key=lambda name: (name == METADATA, not _is_map(name), name))


def _is_map(name: str) -> bool:
    array, _, rest = name.partition("/")
    return array in BY_NAME and BY_NAME[array].sharded and rest != METADATA


def blocks_of(files: Files, name: str, size: int) -> Iterator[bytes]:
    """Yield what a store's file holds, a block at a time."""
    if isinstance(files, Packed):
        start = files.members[name].start
        for at in range(start, start + size, BLOCK_BYTES):
            yield files.source.read(at, min(at + BLOCK_BYTES, start + size))
        return
    with files.open_file(name) as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def write_member(archive: zipfile.ZipFile, name: str, size: int, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Write a file into a zip, stored and not compressed, and yield each block once it is written."""
    info = zipfile.ZipInfo(name, _DATE)
    info.external_attr = 0o644 << 16
    info.file_size = size
    with archive.open(info, "w") as member:
        for block in blocks:
            member.write(block)
            yield block


@dataclass(frozen=True)
class _Part:
    """A part of the zip file: bytes of its own, or what a file holds.

    Attributes:
        start: where it begins in the zip file, bytes.
        size: bytes.
        own: what it is; None: what the file `name` holds, whose CRC-32 is `crc`.
    """

    start: int
    size: int
    own: bytes | None = None
    name: str = ""
    crc: int = 0


class Zipped:
    """A zip file that is nowhere: its own bytes are kept, and what its members hold is read where it lies.

    Attributes:
        size: how long it is, bytes.
    """

    def __init__(self, files: Files, parts: Iterable[_Part], replaced: Mapping[str, bytes]):
        self._files, self._parts, self._replaced = files, tuple(parts), replaced
        self.size = self._parts[-1].start + self._parts[-1].size

    @classmethod
    def of(cls, files: Files, names: Iterable[str], replaced: Mapping[str, bytes] | None = None) -> Zipped:
        """Plan the zip file of a store's files, each of which is read once for its checksum.

        Args:
            files: the store's.
            names: of the members, in their order.
            replaced: name → what the zip file holds in a file's place.

        Raises:
            OSError: a file cannot be read.
        """
        replaced, sink = dict(replaced or {}), _Sink()
        crcs: dict[int, tuple[str, int]] = {}
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
            for name in names:
                size = len(replaced[name]) if name in replaced else files.file_bytes(name)
                blocks = [replaced[name]] if name in replaced else blocks_of(files, name, size)
                crc, start = 0, None
                sink.is_content = False
                for block in write_member(archive, name, size, _switched(sink, blocks)):
                    start = sink.at - len(block) if start is None else start
                    crc = zlib.crc32(block, crc)
                    sink.is_content = False
                if start is not None:
                    crcs[start] = (name, crc)
        return cls(files, sink.parts(crcs), replaced)

    def blocks(self) -> Iterator[bytes]:
        """Yield the whole file, a block at a time.

        Raises:
            StoreError: a file is not what it was when this was planned.
            OSError: a file cannot be read.
        """
        for part in self._parts:
            if part.own is not None:
                yield part.own
                continue
            crc = n_bytes = 0
            for block in self._content(part):
                crc, n_bytes = zlib.crc32(block, crc), n_bytes + len(block)
                yield block
            if (crc, n_bytes) != (part.crc, part.size):
                raise StoreError(f"{part.name}: was changed while the store was read, expected it as it was")

    def open(self) -> BinaryIO:
        """Return the file, open for reading and for seeking."""
        return io.BufferedReader(_Reader(self), BLOCK_BYTES)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`."""
        found = []
        for part in self._parts:
            first, last = max(start - part.start, 0), min(stop - part.start, part.size)
            if first >= last:
                continue
            content = part.own
            if content is None and part.name in self._replaced:
                content = self._replaced[part.name]
            if content is not None:
                found.append(content[first:last])
            elif isinstance(self._files, Packed):
                at = self._files.members[part.name].start
                found.append(self._files.source.read(at + first, at + last))
            else:
                with self._files.open_file(part.name) as file:
                    file.seek(first)
                    found.append(file.read(last - first))
        return b"".join(found)

    def _content(self, part: _Part) -> Iterator[bytes]:
        if part.name in self._replaced:
            yield self._replaced[part.name]
        else:
            yield from blocks_of(self._files, part.name, part.size)


def zipped_store(store: Path) -> Zipped:
    """Return the zip file of a store's folder, as `lerobot-attn pack` writes it."""
    return Zipped.of(Folder(store.absolute()), names_in_order(store))


class _Sink(io.RawIOBase):
    """Takes what `zipfile` writes, and keeps all but what members hold.

    Attributes:
        at: where the next byte goes.
        is_content: whether what comes next is what a member holds.
    """

    def __init__(self) -> None:
        self.at = self._end = 0
        self.is_content = False
        self._own: dict[int, bytes] = {}

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self._end)[whence]
        return self.at

    def write(self, data: Any, /) -> int:
        content = bytes(data) if not self.is_content else b""
        n_bytes = len(data) if self.is_content else len(content)
        if content:
            self._own[self.at] = content  # a member's header is written again once its checksum is known
        self.at += n_bytes
        self._end = max(self._end, self.at)
        return n_bytes

    def parts(self, contents: Mapping[int, tuple[str, int]]) -> Iterator[_Part]:
        """Yield the file's parts; `contents` has the name and the CRC-32 of what begins where."""
        starts = sorted({*self._own, *contents})
        for start, stop in zip(starts, [*starts[1:], self._end], strict=True):
            if start in contents:
                name, crc = contents[start]
                yield _Part(start, stop - start, name=name, crc=crc)
            else:
                yield _Part(start, stop - start, own=self._own[start])


def _switched(sink: _Sink, blocks: Iterable[bytes]) -> Iterator[bytes]:
    for block in blocks:
        sink.is_content = True
        yield block


class _Reader(io.RawIOBase):
    def __init__(self, zipped: Zipped):
        self._zipped, self._at = zipped, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._zipped.size)[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        found = self._zipped.read(self._at, min(self._at + len(buffer), self._zipped.size))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
