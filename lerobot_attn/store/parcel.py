"""What of a run is given away: whole episodes, without what they say of the machine that recorded them.

    parcel = pack_up(open_run("outputs/eval"))
    parcel.episodes, parcel.left_out, parcel.replaced

What is sent are the stores, their camera videos and the evaluation's, nothing else of the folder. Knows
nothing of where it goes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lerobot_attn.errors import StoreError
from lerobot_attn.sizes import format_bytes
from lerobot_attn.store.location import files_at, on_this_machine
from lerobot_attn.store.packed import PACKED_SUFFIX, Packed
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.runs import Run
from lerobot_attn.store.schema import EPISODE_SUFFIX, METADATA
from lerobot_attn.store.scrub import Scrubber, differences
from lerobot_attn.store.url import Place
from lerobot_attn.store.zipped import Zipped, names_in_order


class Item(NamedTuple):
    """A file to send.

    Attributes:
        name: its path in the repository.
        content: where it lies, what it holds, or the zip file that is made on the way.
        size: bytes.
    """

    name: str
    content: Path | bytes | Zipped
    size: int

    @classmethod
    def of(cls, name: str, content: Path | bytes | Zipped) -> Item:
        """Return a file to send, with its size."""
        if isinstance(content, Zipped):
            return cls(name, content, content.size)
        return cls(name, content, len(content) if isinstance(content, bytes) else content.stat().st_size)

    def is_like(self, remote: Any) -> bool:
        """Return whether a file of the repository holds the very same bytes, by its checksum."""
        if remote.size != self.size:
            return False
        if remote.lfs is not None:
            return bool(self._digest(hashlib.sha256()) == remote.lfs.sha256)
        blob = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)  # as git counts
        return bool(self._digest(blob) == remote.blob_id)

    def _digest(self, digest: Any) -> str:
        if isinstance(self.content, bytes):
            digest.update(self.content)
        elif isinstance(self.content, Zipped):
            for block in self.content.blocks():
                digest.update(block)
        else:
            with self.content.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return str(digest.hexdigest())


@dataclass(frozen=True)
class Parcel:
    """What of a run is given away.

    Attributes:
        root: the folder whose paths the repository has.
        episodes: a store's path in the repository → its files, and its videos.
        left_out: what is not sent and why, a line each.
        replaced: what stores say of a machine → what is sent in its place.
    """

    root: Path
    episodes: Mapping[str, Sequence[Item]]
    left_out: tuple[str, ...] = ()
    replaced: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Return the size of it all, bytes."""
        return sum(item.size for items in self.episodes.values() for item in items)

    def __str__(self) -> str:
        """Return how much it is, for messages."""
        n_files = sum(map(len, self.episodes.values()))
        return f"{len(self.episodes)} episodes, {n_files} files, {format_bytes(self.n_bytes)}"


def pack_up(run: Run, *, packed: bool = False) -> Parcel:
    """Choose what of a run is given away, and take what stores say of their machine out of it.

    Args:
        run: the run.
        packed: stores that are folders go as one file each, as `lerobot-attn pack` makes them. Those that are
            packed go so in any case.

    Incomplete and damaged episodes are left out. Paths of a machine in a store's attributes are shortened to
    their last part, see `Scrubber`; arrays and videos are sent as they are.

    Raises:
        StoreError: there is no complete episode, or a link where a store's file is expected.
    """
    place = _local(run.path)
    root = place.parent if run.is_episode else place
    scrubber, left_out = Scrubber(root), list[str]()
    episodes, replaced = dict[str, list[Item]](), dict[str, str]()
    for episode in run:
        path = _local(episode.path)
        name = _name(path, root)
        if not episode.is_complete:
            left_out.append(f"{name}: it is incomplete")
            continue
        if packed and path.is_dir() and name.endswith(EPISODE_SUFFIX):
            name += PACKED_SUFFIX
        if path.is_dir() and not name.endswith(PACKED_SUFFIX):
            episodes[name] = [*_store_items(path, name, scrubber, replaced)]
        else:
            episodes[name] = [Item.of(name, _packed(path, scrubber, replaced))]
        for video, why_not in _videos(episode, root):
            if why_not is None:
                episodes[name].append(Item.of(_name(video, root), video))
            else:
                left_out.append(f"{video.name} of {name}: {why_not}")
    left_out += [f"{_name(_local(path), root)}: it is damaged" for path, _ in run.damaged]
    if not episodes:
        raise StoreError(
            f"{run.path}: holds {len(run)} episodes and none is complete; expected one at least to push"
        )
    return Parcel(root, episodes, tuple(left_out), replaced)


def _local(place: Place) -> Path:
    return on_this_machine(place, "cannot be pushed from a URL")


def _name(path: Path, root: Path) -> str:
    whole, above = (Path(os.path.normpath(one.absolute())) for one in (path, root))
    return whole.relative_to(above).as_posix()


def _store_items(store: Path, name: str, scrubber: Scrubber, replaced: dict[str, str]) -> Iterator[Item]:
    changed = _scrubbed(store, scrubber, replaced)
    for path in sorted(store.rglob("*")):
        if _is_own(path):
            content = changed if changed is not None and path == store / METADATA else path
            yield Item.of(f"{name}/{path.relative_to(store).as_posix()}", content)


def _packed(store: Path, scrubber: Scrubber, replaced: dict[str, str]) -> Path | Zipped:
    """Return a store as one file: the one that is there, or one that is made on the way."""
    files, changed = files_at(store), _scrubbed(store, scrubber, replaced)
    if isinstance(files, Packed):
        names = sorted(files.members, key=lambda name: files.members[name].start)
        own = [name for name in names if not name.rpartition("/")[2].startswith(".")]
        if changed is None and own == names:
            return store
        names = own
    else:
        names = [name for name in names_in_order(store) if _is_own(store / name)]
    return Zipped.of(files, names, {} if changed is None else {METADATA: changed})


def _is_own(path: Path) -> bool:
    """Return whether a path is a file that belongs to a store.

    Raises:
        StoreError: it is a link.
    """
    if path.is_symlink():
        raise StoreError(
            f"{path}: is a link, expected a store's own file; nothing is pushed with links in it"
        )
    return path.is_file() and not path.name.startswith(".")


def _scrubbed(store: Path, scrubber: Scrubber, replaced: dict[str, str]) -> bytes | None:
    """Return a store's metadata without what it says of a machine; None where it says nothing."""
    document = json.loads(files_at(store).read(METADATA))
    before = document["attributes"]
    document["attributes"] = scrubber.value(before, store.parent)
    found = dict(differences(before, document["attributes"]))
    replaced |= found
    return json.dumps(document, indent=2).encode() if found else None


def _videos(episode: Episode, root: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield an episode's videos, and why one is not sent."""
    for camera, video in episode.videos.items():
        if isinstance(video, Path):
            yield video, None
        else:
            yield Path(camera), "it is a data set's own file; replay with cameras=true to have one to push"
    film = episode.eval_video
    if film is not None:
        is_ours = film.is_relative_to(root.resolve())
        path = root / film.relative_to(root.resolve()) if is_ours else film
        yield path, None if is_ours else "it lies outside the folder; push the run's output folder"
