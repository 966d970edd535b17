"""Files written to a bucket, and whether what is there is what was sent.

    bucket = Bucket(writable("s3://bucket/run"))
    await bucket.put("task_0/episode_00000.zarr.zip", content)

An object is there whole or not at all. Its checksum is compared without reading it where the service tells
MD5 sums (S3's ETag); otherwise it is read back. Knows nothing of what files hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lerobot_attn.errors import StoreError
from lerobot_attn.sizes import Progress
from lerobot_attn.store.services import connect, told
from lerobot_attn.store.url import Url, place_of

SCHEMES = ("s3", "gs", "az")
_PART_BYTES = 1 << 23  # of an object that is sent in parts, at once
_MAX_PARTS = 9000  # services take 10000
_PARTS_AT_ONCE = 4
_REQUEST_S = 120  # a part on a slow line
_RETRIES = 2  # of one request; whoever calls tries again, too


class UnreachedError(StoreError):
    """Nobody answers, the answer is a refusal, or what arrived is not what was sent: worth another try."""


class Content(Protocol):
    """What is sent: a file, or one that is made while it is read."""

    @property
    def size(self) -> int:
        """How long it is, bytes."""

    def blocks(self) -> Iterator[bytes]:
        """Yield it, a block at a time."""


class PlainFile:
    """A file on this machine.

    Raises:
        OSError: it is not there.
    """

    def __init__(self, path: Path):
        self._path = path
        self.size = path.stat().st_size

    def blocks(self) -> Iterator[bytes]:
        """Yield it, a block at a time.

        Raises:
            StoreError: it has another size by now.
        """
        n_bytes = 0
        with self._path.open("rb") as file:
            while block := file.read(1 << 20):
                n_bytes += len(block)
                yield block
        if n_bytes != self.size:
            raise StoreError(f"{self._path}: was changed while it was read, expected it as it was")


class Found(NamedTuple):
    """An object of a bucket.

    Attributes:
        size: bytes.
        etag: what the service calls its content; "" where it says nothing.
    """

    size: int
    etag: str


class Digest:
    """The checksums of what is sent, as its parts are sent.

    Args:
        size: how long it is, bytes.
    """

    def __init__(self, size: int):
        self.size = size
        self._part_bytes = part_bytes(size)
        self._sha256 = hashlib.sha256()
        self._parts: list[bytes] = []
        self._part, self._n_in_part = _md5(), 0

    def add(self, block: bytes) -> None:
        """Take the next block."""
        self._sha256.update(block)
        rest = memoryview(block)
        while rest:
            piece = rest[: self._part_bytes - self._n_in_part]
            self._part.update(piece)
            self._n_in_part += len(piece)
            rest = rest[len(piece) :]
            if self._n_in_part == self._part_bytes:
                self._parts.append(self._part.digest())
                self._part, self._n_in_part = _md5(), 0

    @property
    def sha256(self) -> str:
        """The SHA-256 of the whole."""
        return str(self._sha256.hexdigest())

    @property
    def etag(self) -> str:
        """What S3 calls the content: its MD5, or that of its parts' MD5s and their number."""
        parts = [*self._parts, *([self._part.digest()] if self._n_in_part or not self._parts else [])]
        if self.size <= self._part_bytes:
            return bytes(parts[0]).hex()
        return f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def digest_of(content: Content) -> Digest:
    """Return the checksums of what would be sent; reads all of it."""
    digest = Digest(content.size)
    for block in content.blocks():
        digest.add(block)
    return digest


def part_bytes(size: int) -> int:
    """Return how large the parts are in which an object of a size is sent, bytes."""
    return _PART_BYTES * max(1, -(-size // (_PART_BYTES * _MAX_PARTS)))


def writable(said: str) -> Url:
    """Return an address that can be written to.

    Raises:
        StoreError: it is none.
    """
    url = place_of(said)
    if not isinstance(url, Url) or url.scheme not in SCHEMES:
        remedy = "; `lerobot-attn push` sends a run to the Hub" if str(said).startswith("hf://") else ""
        expected = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise StoreError(f"{said}: cannot be written to, expected a bucket ({expected}){remedy}")
    return url


class Bucket:
    """A folder of a bucket, to write into.

    Args:
        url: of the folder.

    Raises:
        SetupError: the extra `remote` is not installed.
        StoreError: the environment does not say what such a bucket needs.
    """

    def __init__(self, url: Url):
        self.url = url
        self._store = connect(url.root, patience_s=_REQUEST_S, retries=_RETRIES)

    async def check(self) -> None:
        """Ask for what is there, to see that the bucket answers.

        Raises:
            UnreachedError: it does not.
        """
        import obstore

        try:
            listed = obstore.list(self._store, self.url.key or None, chunk_size=1)
            async for _ in listed:
                break
        except Exception as error:  # each service has its own kinds
            raise UnreachedError(str(told(self.url, error, "written"))) from error

    async def found(self, name: str) -> Found | None:
        """Return what the service says of an object; None where there is none.

        Raises:
            UnreachedError: it does not answer.
        """
        import obstore

        try:
            said = await obstore.head_async(self._store, self._at(name))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise UnreachedError(str(told(self.url / name, error, "written"))) from error
        return Found(said["size"], (said["e_tag"] or "").strip('"'))

    async def put(
        self, name: str, content: Content, progress: Progress | None = None
    ) -> tuple[Digest, Found]:
        """Write an object, in place of what is there, and make sure that it arrived as it was sent.

        Args:
            name: its name in the folder.
            content: what it holds.
            progress: called as `progress(done, total)` with the bytes that were handed over.

        Raises:
            UnreachedError: it could not be sent, or what arrived is something else.
            StoreError: what is sent was changed meanwhile.
            OSError: what is sent cannot be read.
        """
        import obstore

        digest, fault = Digest(content.size), None

        async def blocks() -> AsyncIterator[bytes]:
            nonlocal fault
            done = 0
            try:
                for block in content.blocks():
                    digest.add(block)
                    done += len(block)
                    if progress is not None:
                        progress(done, content.size)
                    yield block
            except OSError as error:  # obstore would make something of its own of it
                fault = error
                raise

        size = part_bytes(content.size)
        try:
            await obstore.put_async(
                self._store,
                self._at(name),
                blocks(),
                use_multipart=content.size > size,
                chunk_size=size,
                max_concurrency=_PARTS_AT_ONCE,
            )
        except Exception as error:
            if fault is not None:
                raise fault from error
            raise UnreachedError(str(told(self.url / name, error, "written"))) from error
        found = await self.found(name)
        if found is None or not await self.holds(name, found, digest):
            with suppress(Exception):  # nobody shall take it for what was sent
                await obstore.delete_async(self._store, self._at(name))
            raise UnreachedError(
                f"{self.url / name}: what arrived has another checksum than what was sent, expected the "
                "same; it was removed there"
            )
        return digest, found

    async def holds(self, name: str, found: Found, digest: Digest) -> bool:
        """Return whether an object is what a digest is of; it is read where its ETag does not tell.

        Raises:
            UnreachedError: it cannot be read.
        """
        if found.size != digest.size:
            return False
        return found.etag == digest.etag or await self._sha256(name) == digest.sha256

    async def _sha256(self, name: str) -> str:
        import obstore

        sha256 = hashlib.sha256()
        try:
            answer = await obstore.get_async(self._store, self._at(name))
            async for block in answer.stream(min_chunk_size=1 << 20):
                sha256.update(block)
        except FileNotFoundError:
            return ""
        except Exception as error:
            raise UnreachedError(str(told(self.url / name, error, "read"))) from error
        return sha256.hexdigest()

    def _at(self, name: str) -> str:
        return (self.url / name).key


def _md5(start: bytes = b"") -> Any:
    return hashlib.md5(start, usedforsecurity=False)
