"""Stores at URLs, through Zarr's ObjectStore (obstore), and FsspecStore for what obstore has no scheme for.

    files = remote_at(place_of("https://example.org/run/episode_00000.zarr"))
    files.read("zarr.json")

Everything is read-only. Credentials come from the environment alone. A request that fails is tried again
twice, and takes 20 seconds at most. Small files that were read are kept, because a request costs more than
they do. Knows nothing of what a store holds.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import io
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore

from lerobot_attn.errors import SetupError, StoreError, first_line
from lerobot_attn.store.packed import PACKED_SUFFIX, Packed, members_of
from lerobot_attn.store.services import EXTRA, connect, credentials, told
from lerobot_attn.store.url import Url, place_of

_TAIL_BYTES = 1 << 18  # of a packed store: its list of members, the group's metadata and small tables
_MAX_TAIL_BYTES = 1 << 24
_MAX_OPEN = 32
_MAX_VIDEO_BYTES = 4_000_000_000
_BLOCK_BYTES = 1 << 23

_open: OrderedDict[Url, Remote | Packed] = OrderedDict()
_lock = threading.Lock()


def remote_at(url: Url, *, anew: bool = False) -> Remote | Packed:
    """Return the files of a store at a URL, packed or not; those that were looked at last are kept.

    Args:
        url: the store's.
        anew: look at it again, as it is now.

    Raises:
        StoreError: a packed one is not there, cannot be read, or is no pack.
        SetupError: the extra `remote` is not installed.
    """
    with _lock:
        found = None if anew else _open.get(url)
    if found is None:
        found = _packed(url) if url.name.endswith(PACKED_SUFFIX) else Remote(url)
        with _lock:
            _open[url] = found
            while len(_open) > _MAX_OPEN:
                _open.popitem(last=False)
    return found


def _packed(url: Url) -> Packed:
    source = RemoteFile(Remote(url.parent), url.name)
    packed = Packed(source, members_of(source, str(url)), str(url), functools.partial(_again, str(url)))
    # Behind the maps come the tables: what of them is not there yet comes in one request.
    maps = [member.start + member.size for name, member in packed.members.items() if "attention/c/" in name]
    source.keep_from(max(maps, default=0))
    return packed


def _again(url: str) -> Packed:
    found = remote_at(_url(url))
    assert isinstance(found, Packed)
    return found


def _url(text: str) -> Url:
    found = place_of(text)
    assert isinstance(found, Url)
    return found


class Remote(WrapperStore[Store]):
    """The files below a URL, for Zarr, xarray and Dask, and for what reads a store without them.

    Args:
        url: of a folder.

    Raises:
        SetupError: the extra `remote` is not installed.
    """

    def __init__(self, url: Url):
        super().__init__(_store_of(url.root, credentials()))
        self.url = url
        self._kept: dict[str, bytes | None] = {}
        self._ends: Mapping[str, bytes] = {}
        self._groups: dict[str, tuple[str, ...]] = {}  # file → those that are read together with it
        self._coming: dict[str, asyncio.Task[None]] = {}

    def __reduce__(self) -> Any:
        return _remote, (str(self.url),)

    def __dask_tokenize__(self) -> str:
        return str(self.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __str__(self) -> str:
        return str(self.url)

    @property
    def _supports_sync_io(self) -> bool:
        return False

    def with_read_only(self, read_only: bool = False) -> Remote:
        """Return itself: it cannot be written."""
        if not read_only:
            raise ValueError(f"{self.url}: is read-only")
        return self

    def _at(self, key: str) -> str:
        return f"{self.url.key}/{key}".strip("/")

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a file or a part of it; None where there is none.

        Raises:
            StoreError: nobody answers, or the answer is a refusal.
        """
        if byte_range is None and key in self._groups:
            await self._together(key)
        if byte_range is None and key in self._kept:
            kept = self._kept[key]
            return None if kept is None else prototype.buffer.from_bytes(kept)
        end = self._ends.get(key)
        if end is not None and byte_range == SuffixByteRequest(len(end)):
            return prototype.buffer.from_bytes(end)
        try:
            return await self._store.get(self._at(key), prototype, byte_range)
        except Exception as error:  # each service has its own kinds
            raise told(self.url / key, error) from error

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return parts of files, None for each that is not there."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def get_ranges(self, key: str, byte_ranges: Any, *, prototype: BufferPrototype, **_: Any) -> Any:
        """Yield parts of a file, near ones in one request."""
        async for group in Store.get_ranges(self, key, byte_ranges, prototype=prototype):
            yield group

    async def exists(self, key: str) -> bool:
        """Return whether there is such a file."""
        try:
            return await self._store.exists(self._at(key))
        except Exception as error:
            raise told(self.url / key, error) from error

    async def getsize(self, key: str) -> int:
        """Return a file's size, bytes."""
        return await self._store.getsize(self._at(key))

    # Files, for what reads a store without Zarr

    def holds(self, key: str) -> bool:
        """Return whether there is such a file."""
        return key in self._kept or sync(self.exists(key))

    def file_bytes(self, key: str) -> int:
        """Return a file's size, bytes.

        Raises:
            FileNotFoundError: there is none.
            StoreError: nobody answers, or the answer is a refusal.
        """
        try:
            return sync(self.getsize(key))
        except FileNotFoundError:
            raise
        except Exception as error:
            raise told(self.url / key, error) from error

    def read(self, key: str, part: ByteRequest | None = None) -> bytes:
        """Return what a file holds, or a part of it.

        Raises:
            FileNotFoundError: there is none.
            StoreError: nobody answers, or the answer is a refusal.
        """
        found = sync(self.get(key, default_buffer_prototype(), part))
        if found is None:
            raise FileNotFoundError(f"{self.url / key}: is not there")
        return bytes(found.to_bytes())

    def read_start(self, key: str, most: int) -> bytes:
        """Return what a file holds, up to so many bytes; what is shorter is kept."""
        content = self.read(key, RangeByteRequest(0, most))
        if len(content) < most:
            self._kept[key] = content
        return content

    def open_file(self, key: str) -> BinaryIO:
        """Return a file that can be read and sought in, as `read`."""
        return io.BytesIO(self.read(key))

    def total_bytes(self) -> int:
        """Return the size of all files, bytes; 0 where the server does not list them."""
        try:
            return sync(self._store.getsize_prefix(self.url.key + "/"))
        except Exception:
            return 0

    def names(self, below: str = "") -> list[str]:
        """Return what lies in the folder, or in one below it.

        Raises:
            StoreError: it cannot be listed; plain HTTP servers never can.
        """

        async def listed() -> list[str]:
            return [name async for name in self._store.list_dir(self._at(below))]

        try:
            return sorted(name.strip("/") for name in sync(listed()))
        except Exception as error:
            raise told(self.url / below, error) from error

    def keep(self, files: Mapping[str, bytes], ends: Mapping[str, bytes]) -> None:
        """Take what files hold, or what they end in, from elsewhere: it is not asked for any more."""
        self._kept |= files
        self._ends = ends

    def read_together(self, keys: Iterable[str]) -> None:
        """Once one of these small files is read, read all of them at once and keep them.

        One after the other they would take as many round trips. Of those that are not there, that is kept.
        """
        group = tuple(key for key in keys if key not in self._kept)
        self._groups |= dict.fromkeys(group, group)

    async def _together(self, key: str) -> None:
        """Read the files of a file's group, or wait until they are read."""
        if key not in self._coming:
            group = self._groups[key]
            self._coming |= dict.fromkeys(group, asyncio.ensure_future(self._fetch(group)))
        await self._coming[key]

    async def _fetch(self, group: Iterable[str]) -> None:
        names, prototype = [*group], default_buffer_prototype()
        try:
            found = await asyncio.gather(*(self._store.get(self._at(name), prototype) for name in names))
        except Exception as error:  # each service has its own kinds
            raise told(self.url, error) from error
        else:
            for name, content in zip(names, found, strict=True):
                self._kept[name] = None if content is None else bytes(content.to_bytes())
        finally:
            for name in names:
                self._groups.pop(name, None)
                self._coming.pop(name, None)


def _remote(url: str) -> Remote:
    found = remote_at(_url(url))
    assert isinstance(found, Remote)
    return found


class RemoteFile:
    """One file at a URL, whose bytes are read by their place; its last part is kept.

    Raises:
        StoreError: it is not there, or cannot be read.
    """

    def __init__(self, folder: Remote, name: str):
        self._folder, self._name = folder, name
        try:
            self.size = folder.file_bytes(name)
        except FileNotFoundError as error:
            raise StoreError(f"{folder.url / name}: no such store; expected a packed episode") from error
        self._kept_from = self.size
        self._kept = b""
        self._pieces: dict[tuple[int, int], bytes] = {}
        self.keep_from(self.size - _TAIL_BYTES)

    def keep_from(self, start: int) -> None:
        """Keep everything from a place on, read in one request; of a very long part only the end."""
        start = max(0, start, self.size - _MAX_TAIL_BYTES)
        if start < self._kept_from:
            self._kept = self._fetched(start, self._kept_from) + self._kept
            self._kept_from = start

    def keep(self, start: int, piece: bytes) -> None:
        """Take a piece from elsewhere: it is not asked for any more."""
        self._pieces[start, start + len(piece)] = piece

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`."""
        found = self._there(start, stop)
        return self._fetched(start, stop) if found is None else found

    async def read_async(self, start: int, stop: int) -> bytes:
        """Return the same without holding up an event loop."""
        there = self._there(start, stop)
        if there is not None:
            return there
        part = RangeByteRequest(start, stop)
        found = await self._folder.get(self._name, default_buffer_prototype(), part)
        return b"" if found is None else bytes(found.to_bytes())

    def _there(self, start: int, stop: int) -> bytes | None:
        """Return bytes that need not be asked for; None of others."""
        if start >= self._kept_from:
            return self._kept[start - self._kept_from : stop - self._kept_from]
        return self._pieces.get((start, stop))

    def _fetched(self, start: int, stop: int) -> bytes:
        return self._folder.read(self._name, RangeByteRequest(start, stop)) if stop > start else b""


def fetched(url: Url) -> Path:
    """Return a copy of a file on this machine, made at the first call and removed when the process ends.

    Raises:
        StoreError: it is not there, cannot be read, or is larger than any video.
    """
    with _fetching:
        return _fetched(url)


_fetching = threading.Lock()


@functools.cache
def _fetched(url: Url) -> Path:
    folder = Remote(url.parent)
    try:
        size = folder.file_bytes(url.name)
        if size > _MAX_VIDEO_BYTES:
            raise StoreError(f"{url}: has {size} bytes, expected a video of at most {_MAX_VIDEO_BYTES}")
        target = Path(tempfile.mkdtemp(dir=_temporary_folder()), "video.mp4")
        with target.open("wb") as file:
            for start in range(0, size, _BLOCK_BYTES):
                part = RangeByteRequest(start, min(start + _BLOCK_BYTES, size))
                file.write(folder.read(url.name, part))
    except FileNotFoundError as error:
        raise StoreError(f"{url}: no such video; its MP4 is not beside the store") from error
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{url}: cannot be fetched: {error.strerror or first_line(error)}") from error
    return target


@functools.cache
def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="lerobot-attn-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.lru_cache(maxsize=16)
def _store_of(root: str, environment: tuple[tuple[str, str], ...]) -> Store:
    """Connect to a bucket, host or data set; nothing is asked yet."""
    if root.startswith("hf://"):
        return _hub(root)
    store = connect(root)
    from zarr.storage import ObjectStore

    return ObjectStore(store, read_only=True)


def _hub(root: str) -> Store:
    """Connect to a data set on the Hub, for which obstore has no scheme."""
    try:
        import fsspec  # type: ignore[import-untyped]
        from zarr.storage import FsspecStore

        fsspec.get_filesystem_class("hf")
    except (ImportError, ValueError) as error:
        raise SetupError(
            f"{root}: is read by fsspec and huggingface_hub, which are not installed; {EXTRA}"
        ) from error
    store: Store = FsspecStore.from_url(root, read_only=True)
    return store
