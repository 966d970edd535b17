"""Where a store lies, told to Zarr so that no letter of the path means anything to it.

A path that reaches xarray as text is parsed as a URL: `h#1`, `a?b` and `x::y` would be cut or taken for
chains of file systems. A store is a folder, or packed: one zip file. Knows nothing of what a store holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from zarr.storage import LocalStore

from lerobot_attn.errors import StoreError
from lerobot_attn.sizes import folder_bytes
from lerobot_attn.store.packed import PACKED_SUFFIX, Packed, packed_at, stamp_of
from lerobot_attn.store.remote import Remote, remote_at
from lerobot_attn.store.schema import EPISODE_SUFFIX, METADATA
from lerobot_attn.store.url import Place, Url

PACKED_EPISODE_SUFFIX = EPISODE_SUFFIX + PACKED_SUFFIX


class Folder(LocalStore):
    """A store's folder, for xarray and Dask: nothing is written, and what was read has a date."""

    def __init__(self, path: Path):
        super().__init__(path, read_only=True)

    def __reduce__(self) -> tuple[type[Folder], tuple[Path]]:
        return Folder, (self.root,)

    def __dask_tokenize__(self) -> tuple[str, int]:
        # Dask takes chunks of equal tokens for equal: a store that has grown since must get another token.
        return str(self.root), self.root.stat().st_mtime_ns

    def holds(self, key: str) -> bool:
        """Return whether there is such a file."""
        return (self.root / key).is_file()

    def file_bytes(self, key: str) -> int:
        """Return a file's size, bytes.

        Raises:
            OSError: there is none, or it cannot be looked at.
        """
        return (self.root / key).stat().st_size

    def read(self, key: str) -> bytes:
        """Return what a file holds.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        return (self.root / key).read_bytes()

    def read_start(self, key: str, most: int) -> bytes:
        """Return what a file holds, up to so many bytes."""
        with (self.root / key).open("rb") as file:
            return file.read(most)

    def open_file(self, key: str) -> BinaryIO:
        """Return a file, open for reading.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        return (self.root / key).open("rb")

    def total_bytes(self) -> int:
        """Return the size of all files, bytes."""
        return folder_bytes(self.root)


Files = Folder | Packed | Remote


def files_at(place: Place, *, anew: bool = False) -> Files:
    """Return a store's files, a folder's or packed, here or at a URL; of a folder nothing is read.

    Args:
        place: the store.
        anew: of a URL, look at it again, as it is now.

    Raises:
        StoreError: a packed one is damaged, or no pack; a URL cannot be read.
        SetupError: a URL, and the extra `remote` is not installed.
        OSError: it cannot be read.
    """
    if isinstance(place, Url):
        return remote_at(place, anew=anew)
    path = place.absolute()
    return packed_at(path) if is_packed(path) else Folder(path)


def is_packed(place: Place) -> bool:
    """Return whether a path is a file named as packed episodes are; reads nothing."""
    return place.suffix == PACKED_SUFFIX and (isinstance(place, Url) or place.is_file())


def on_this_machine(place: Place, what: str) -> Path:
    """Return a path.

    Args:
        place: a path or a URL.
        what: cannot be done at a URL, for the error.

    Raises:
        StoreError: it is a URL.
    """
    if isinstance(place, Url):
        raise StoreError(f"{place}: {what}, expected a path on this machine; copy it here first")
    return place


def signature_of(path: Place) -> tuple[int, int, int]:
    """Return what changes with every commit into a store, for each one replaces the metadata; not at a URL.

    Raises:
        OSError: the store is gone.
    """
    if isinstance(path, Url):
        return 0, 0, 0
    return stamp_of((path if is_packed(path) else path / METADATA).stat())


def is_episode_name(name: str) -> bool:
    """Return whether a file or folder is named as episodes are, packed or not."""
    return name.endswith((EPISODE_SUFFIX, PACKED_EPISODE_SUFFIX))


def names_below(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder at or below a root and the names in it; none in a store, of hundreds of files."""
    for folder, folders, files in os.walk(root):
        yield Path(folder), [*folders, *files]
        folders[:] = [name for name in folders if not name.endswith(EPISODE_SUFFIX)]


def bare_name(name: str) -> str:
    """Return the name of a store, packed or not, without its suffix: what its videos' names begin with."""
    return name.removesuffix(PACKED_SUFFIX).removesuffix(EPISODE_SUFFIX)


def other_form(path: Path) -> Path | None:
    """Return where the same episode would lie packed, or unpacked; None for names of another kind."""
    if path.name.endswith(PACKED_EPISODE_SUFFIX):
        return path.with_name(path.name.removesuffix(PACKED_SUFFIX))
    return path.with_name(path.name + PACKED_SUFFIX) if path.name.endswith(EPISODE_SUFFIX) else None


def present_form(path: Path) -> Path | None:
    """Return the form in which an episode is there, packed or not; None where it is not."""
    other = other_form(path)
    return next((form for form in (path, other) if form is not None and form.exists()), None)


def refuse_both_forms(path: Path) -> None:
    """Raise StoreError where an episode is there packed and unpacked: nobody knows which one counts."""
    other = other_form(path)
    if other is not None and other.exists() and path.exists():
        raise StoreError(
            f"{path}: {other.name} lies beside it, expected one form of an episode; `lerobot-attn pack` or "
            "`unpack` finishes what was interrupted, or remove one of them"
        )
