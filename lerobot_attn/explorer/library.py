"""Which episodes there are under a path, and what has changed since one last looked.

Only what is found here is ever served: a request names an episode by its id, never by a path. Looks at the
file system by polling, which works on network file systems too. Safe to use from several threads.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lerobot_attn.errors import StoreError
from lerobot_attn.store.reader import Episode, open_episode, open_run
from lerobot_attn.store.schema import EPISODE_SUFFIX, METADATA

_MAX_OPEN = 32  # episodes whose dataset is kept open


class NotThereError(LookupError):
    """What was asked for does not exist, or no longer; the message is for the page."""


@dataclass(frozen=True)
class Summary:
    """One episode's row in the run's table.

    Attributes:
        id: names the episode in requests.
        version: changes when another recording takes the episode's place, not when it grows.
        facts: its task, success and so on, as plain JSON values.
    """

    id: str
    version: str
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"id": self.id, "version": self.version, **self.facts}


class Listing(NamedTuple):
    """What is under a path.

    Attributes:
        summaries: the episodes that can be opened.
        problems: why the others cannot, one line each.
        n_unread: stores that nobody has looked into yet.
    """

    summaries: list[Summary]
    problems: list[str]
    n_unread: int


@dataclass(frozen=True)
class _Known:
    """What was read of a store when its metadata had this signature."""

    signature: tuple[int, int, int]
    summary: Summary | None
    problem: str | None  # why it could not be opened


class Library:
    """The episodes under a path.

    Args:
        path: an episode, a task's folder, or a run's output folder.
        rescan_s: seconds for which a listing of the folder is believed.

    Raises:
        StoreError: nothing there, or no episode in it.
    """

    def __init__(self, path: str | Path, *, rescan_s: float = 1.0):
        self.path = Path(path)
        open_run(self.path)  # say at once what is wrong with the path
        self._root = self.path.resolve()
        self._rescan_s = rescan_s
        self._scanned_at = -float("inf")
        self._stores: dict[str, Path] = {}
        self._known: dict[str, _Known] = {}
        self._open: OrderedDict[str, tuple[tuple[int, int, int], Episode]] = OrderedDict()
        self._lock = threading.RLock()
        self._looking = threading.Lock()  # held while stores are read, which others need not wait for

    @property
    def name(self) -> str:
        """What the page calls the run."""
        return self._root.name

    @property
    def is_episode(self) -> bool:
        """Whether the path is one episode, rather than a folder of them."""
        return self.path.suffix == EPISODE_SUFFIX

    def look(self, budget_s: float = math.inf) -> Listing:
        """Return what is there now, in the order of the paths.

        Args:
            budget_s: seconds to spend on stores that are new or have changed; the others are left for the
                next time. One at least is read, so that looking again and again comes to an end.
        """
        with self._looking:
            with self._lock:
                self._rescan()
                stores, known = dict(self._stores), dict(self._known)
            end = time.monotonic() + budget_s
            n_read = n_unread = 0
            for id_, path in stores.items():
                signature = _signature(path)
                if signature is None:
                    known.pop(id_, None)
                elif id_ not in known or known[id_].signature != signature:
                    if n_read and time.monotonic() > end:
                        n_unread += id_ not in known
                        continue
                    known[id_] = _read(id_, path, signature)
                    n_read += 1
            with self._lock:
                self._known = known
        found = [known[id_] for id_ in stores if id_ in known]
        return Listing(
            [one.summary for one in found if one.summary is not None],
            [one.problem for one in found if one.problem is not None],
            n_unread,
        )

    def episode(self, id_: str, version: str | None = None) -> Episode:
        """Return an episode as it is now.

        Args:
            id_: of a `Summary`.
            version: of the same; None takes whatever is there.

        Raises:
            NotThereError: no such episode, it was removed, or another has taken its place.
            StoreError: it is damaged.
        """
        with self._lock:
            if id_ not in self._stores:
                self._rescan(force=True)
            path = self._stores.get(id_)
            if path is None:
                raise NotThereError(f"there is no episode {id_!r} here")
            signature = _signature(path)
            if signature is None:
                self._open.pop(id_, None)
                raise NotThereError(f"episode {id_} was removed while it was open")
            held = self._open.get(id_)
            if held is None or held[0] != signature:
                held = (signature, open_episode(path))
                self._open[id_] = held
            self._open.move_to_end(id_)
            while len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        episode = held[1]
        if version is not None and version != version_of(episode):
            raise NotThereError(f"episode {id_} was replaced by another recording; load the page anew")
        return episode

    def _rescan(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._scanned_at < self._rescan_s:
            return
        self._scanned_at = now
        try:
            stores = open_run(self.path).stores
        except StoreError:  # the folder has become empty, or is gone
            stores = ()
        # A link out of the folder would serve what nobody offered.
        self._stores = {
            self._id(store): store for store in stores if store.resolve().is_relative_to(self._root)
        }
        self._known = {id_: known for id_, known in self._known.items() if id_ in self._stores}

    def _id(self, store: Path) -> str:
        """Return the store's path below the root, in one segment of a URL."""
        if self.is_episode:
            return store.stem
        return ":".join(store.relative_to(self.path).with_suffix("").parts)


def summary_of(id_: str, episode: Episode) -> Summary:
    """Return an episode's row in the run's table; looks at the size of each of its files."""
    attributes = episode.attributes
    facts = {
        "task_group": attributes.get("task_group"),
        "task_id": attributes.get("task_id"),
        "episode": attributes.get("episode_index"),
        "task": episode.task,
        "success": episode.success,
        "complete": episode.is_complete,
        "n_frames": episode.n_frames,
        "n_inferences": episode.n_inferences,
        "random_weights": episode.has_random_weights,
        "stored_bytes": episode.stored_bytes(),
        "camera": next(iter(episode.videos), None),
    }
    return Summary(id_, version_of(episode), facts)


def version_of(episode: Episode) -> str:
    """Return what tells this recording from another one in its place, however far it has grown."""
    attributes = episode.attributes
    told = [attributes.get(name) for name in ("created", "task", "seed", "episode_index")]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def _signature(store: Path) -> tuple[int, int, int] | None:
    """Return what changes with every commit, for each one replaces the metadata; None if it is gone."""
    try:
        found = (store / METADATA).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(id_: str, path: Path, signature: tuple[int, int, int]) -> _Known:
    try:
        return _Known(signature, summary_of(id_, open_episode(path)), None)
    except StoreError as error:
        return _Known(signature, None, str(error))
