"""Pack an episode's store into one file, and unpack it, for file systems that count files.

    for done in pack("outputs/eval"):
        print(done.line)

The file is a zip whose members are the store's files, stored and not compressed, so every reader reads it in
place. The other form goes only once the new one was written, waited for and compared byte for byte. Whatever
ends a process on the way, one whole form is there, and the next `pack` or `unpack` finishes.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lerobot_attn.errors import StoreError, first_line
from lerobot_attn.sizes import Progress, folder_bytes, format_bytes
from lerobot_attn.store.files import first_link, unfinished
from lerobot_attn.store.location import Folder, is_packed, on_this_machine, other_form
from lerobot_attn.store.lock import LOCK, claim_folder
from lerobot_attn.store.packed import PACKED_SUFFIX, Packed, packed_at
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.runs import open_run
from lerobot_attn.store.schema import EPISODE_SUFFIX
from lerobot_attn.store.url import place_of
from lerobot_attn.store.zipped import blocks_of, names_in_order, write_member

_READ_ONLY = "a URL is read-only, so nothing is packed or unpacked there"


@dataclass(frozen=True)
class Repacked:
    """What became of one episode.

    Attributes:
        path: the store in its new form; where it was left alone, as it was.
        n_files: how many files the store has.
        n_bytes: of the new form.
        refused: why it was left alone, in one line; None where it was not.
    """

    path: Path
    n_files: int = 0
    n_bytes: int = 0
    refused: str | None = None

    @property
    def line(self) -> str:
        """What became of it, in one line."""
        return self.refused or f"{self.path}: {self.n_files} files, {format_bytes(self.n_bytes)}"


def pack(path: str | Path, progress: Progress | None = None) -> Iterator[Repacked]:
    """Make each episode's store one file, `episode_00000.zarr.zip`; what is packed stays as it is.

    Args:
        path: an episode's store, a task's folder or a run's output folder.
        progress: called as `progress(done, total)` with the bytes written and compared of an episode.

    Yields:
        What became of each episode, as it is done; of those that were packed before, nothing.

    Raises:
        StoreError: nothing there, a recording goes on in the folder, or (of a single episode; among several
            it is noted) the disk is full, or it is incomplete or damaged.
    """
    yield from _each(on_this_machine(place_of(path), _READ_ONLY), False, lambda store: _pack(store, progress))


def unpack(path: str | Path, progress: Progress | None = None) -> Iterator[Repacked]:
    """Make each packed episode a folder again; what is a folder stays as it is.

    Args:
        path: a packed episode, a task's folder or a run's output folder.
        progress: called as `progress(done, total)` with the bytes written and compared of an episode.

    Yields:
        What became of each episode, as it is done; of those that were folders before, nothing.

    Raises:
        StoreError: as of `pack`.
    """
    yield from _each(
        on_this_machine(place_of(path), _READ_ONLY), True, lambda store: _unpack(store, progress)
    )


def _each(path: Path, packed: bool, change: Callable[[Path], Repacked]) -> Iterator[Repacked]:
    """Change the stores under a path that are packed, or that are not."""
    forms = (path, other_form(path)) if path.exists() else ()
    if sum(form is not None and form.exists() for form in forms) == 2:  # what was interrupted is finished
        stores: tuple[Path, ...] = (path,)
        is_episode = True
    else:
        run = open_run(path)
        stores, is_episode = tuple(on_this_machine(one, _READ_ONLY) for one in run.stores), run.is_episode
    with ExitStack() as claimed:
        folders = set()
        for store in stores:
            other = other_form(store)
            both = other is not None and other.exists()
            if both and other is not None and is_packed(store) != packed:
                store = other
            if is_packed(store) != packed:
                if other is not None:
                    _remove(store.with_name(unfinished(other.name)))  # of a process that was killed
                continue
            folder = store.resolve().parent.parent
            if folder not in folders and (folder / LOCK).exists():
                claimed.enter_context(claim_folder(folder, "pack or unpack when it has ended"))
            folders.add(folder)
            try:
                yield change(store)
            except StoreError as error:
                if is_episode:
                    raise
                yield Repacked(store, refused=str(error))


def _pack(store: Path, progress: Progress | None) -> Repacked:
    target = store.with_name(store.name + PACKED_SUFFIX)
    if not store.name.endswith(EPISODE_SUFFIX):
        raise StoreError(
            f"{store}: expected a store whose name ends in {EPISODE_SUFFIX}; rename it, then pack"
        )
    _refuse_links(store)
    folder = Folder(store.absolute())
    names = names_in_order(store)
    total = 2 * sum(folder.file_bytes(name) for name in names)
    said = _Said(progress, total)
    if target.exists():  # a pack or an unpack was interrupted
        _refuse_difference(store, target, packed_at(target), folder, said)
    else:
        if not open_episode(store).is_complete:
            raise StoreError(f"{store}: is incomplete, expected an episode recorded to its end; not packed")
        temporary = store.with_name(unfinished(target.name))
        with _told(store, "pack"), _removed_on_failure(temporary):
            with temporary.open("wb") as file:
                _write(file, folder, names, said)
                file.flush()
                os.fsync(file.fileno())
            _refuse_difference(store, temporary, packed_at(temporary), folder, said)
            temporary.replace(target)
            _keep_names(target.parent)
    with _told(store, "pack"):
        # At once, then file by file: no reader sees half a store.
        old = store.with_name(unfinished(store.name))
        shutil.rmtree(old, ignore_errors=True)
        store.rename(old)
        shutil.rmtree(old)
    return Repacked(target, len(names), target.stat().st_size)


def _unpack(store: Path, progress: Progress | None) -> Repacked:
    target = store.with_name(store.name.removesuffix(PACKED_SUFFIX))
    if target == store or not target.name.endswith(EPISODE_SUFFIX):
        raise StoreError(
            f"{store}: expected a name that ends in {EPISODE_SUFFIX}{PACKED_SUFFIX}; rename it, then unpack"
        )
    try:
        packed = packed_at(store)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{store}: cannot be read: {first_line(error)}") from error
    said = _Said(progress, 2 * sum(member.size for member in packed.members.values()))
    if target.exists():
        _refuse_links(target)
        _refuse_difference(target, store, packed, Folder(target.absolute()), said)
    else:
        open_episode(store)  # what is no episode is not unpacked
        temporary = store.with_name(unfinished(target.name))
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        with _told(store, "unpack"), _removed_on_failure(temporary):
            for name, member in packed.members.items():
                _extract(packed, name, member.size, temporary / name, said)
            _refuse_difference(temporary, store, packed, Folder(temporary.absolute()), said)
            for folder, _, _ in os.walk(temporary):
                _keep_names(Path(folder))
            temporary.rename(target)
            _keep_names(target.parent)
    with _told(store, "unpack"):
        store.unlink()
    return Repacked(target, len(packed.members), folder_bytes(target))


def _write(file: object, folder: Folder, names: Iterable[str], said: _Said) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for name in names:
            size = folder.file_bytes(name)
            for block in write_member(archive, name, size, blocks_of(folder, name, size)):
                said.add(len(block))


def _extract(packed: Packed, name: str, size: int, target: Path, said: _Said) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        for block in blocks_of(packed, name, size):
            file.write(block)
            said.add(len(block))
        file.flush()
        os.fsync(file.fileno())


def _refuse_difference(store: Path, file: Path, packed: Packed, folder: Folder, said: _Said) -> None:
    """Raise StoreError unless a zip holds a folder's files, byte for byte, and no others."""
    names = set(names_in_order(store))
    odd = next(iter(sorted(names ^ packed.members.keys())), None)
    for name, member in packed.members.items() if odd is None else ():
        if folder.file_bytes(name) != member.size:
            odd = name
            break
        for ours, theirs in zip(
            blocks_of(folder, name, member.size), blocks_of(packed, name, member.size), strict=True
        ):
            if ours != theirs:
                odd = name
                break
            said.add(len(ours))
        if odd is not None:
            break
    if odd is not None:
        raise StoreError(
            f"{store}: its {odd} is not the same in {file.name}, expected two forms of one episode; neither "
            "was removed; remove the one that is wrong"
        )


def _refuse_links(store: Path) -> None:
    link = first_link(store)
    if link is not None:
        raise StoreError(f"{store}: {link.relative_to(store)} is a link, expected plain files; not packed")


class _Said:
    """How far an episode is."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def add(self, n_bytes: int) -> None:
        self._done += n_bytes
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


@contextmanager
def _told(store: Path, what: str) -> Iterator[None]:
    """Turn what a file system refuses into an error of ours."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{store}: cannot {what} it: {error.strerror or first_line(error)}, expected a folder with room "
            "that can be written; nothing was lost"
        ) from error


@contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    """Remove what was begun where it is not finished."""
    try:
        yield
    except BaseException:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def _keep_names(folder: Path) -> None:
    """Wait until the disk has a folder's names, so that they outlive a power cut."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
