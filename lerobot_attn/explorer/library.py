"""Which episodes there are under a path, and what has changed since one last looked.

Only what is found here is ever served: a request names an episode by its id, never by a path. Looks at the
file system by polling, which works on network file systems too. Safe to use from several threads.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path, PurePath

from lerobot_attn.errors import LerobotAttnError, StoreError, first_line
from lerobot_attn.explorer.listing import Listing
from lerobot_attn.explorer.rounds import Rounds
from lerobot_attn.explorer.summary import Summary, summary_from_index, summary_of, version_of
from lerobot_attn.store.attributes import is_store
from lerobot_attn.store.files import first_link
from lerobot_attn.store.index import WORTH, Index, Stamp
from lerobot_attn.store.location import bare_name, is_episode_name, signature_of
from lerobot_attn.store.reader import Episode, open_episode
from lerobot_attn.store.references import Clip, RemoteVideo, Video, file_of, is_unchanged
from lerobot_attn.store.runs import Run, open_run
from lerobot_attn.store.url import Place, Url, place_of

# ":" separates folders, "%" escapes, and names may hold bytes that are no text.
_NOT_IN_IDS = re.compile(r"[:%\x00-\x1f\x7f\ud800-\udfff]")
_MAX_OPEN = 32  # episodes whose dataset is kept open
# Seconds between two listings of the folder that requests for unknown ids cause, because a listing takes a
# fifth of a second for 2,000 stores.
_RESCAN_S = 0.5
# How many times as long as a listing takes (and, for each second of `rescan_s`, at least) the next one waits.
_LISTINGS_APART = 20
_RETRY_S = 2.0  # seconds until a store is tried again that the file system could not read


class NotThereError(LookupError):
    """What was asked for does not exist, or no longer; the message is for the page."""


type _Signature = tuple[int, int, int]


@dataclass(frozen=True)
class _Known:
    """What was read of a store when its metadata had this signature."""

    signature: _Signature
    summary: Summary | None
    problem: str | None  # why it could not be opened
    retry_at: float = math.inf  # on the monotonic clock, for what may pass by itself


@dataclass(frozen=True)
class _Scan:
    """What a listing of the folder found.

    Attributes:
        started_at: on the monotonic clock.
        took_s: seconds.
        stores: id → folder, in the order of the paths.
        problems: of those that are not served, one line each.
        run: all that was found.
    """

    started_at: float = -math.inf
    took_s: float = 0.0
    stores: Mapping[str, Place] = field(default_factory=dict)
    problems: Sequence[str] = ()
    run: Run | None = None


class Library:
    """The episodes under a path.

    Args:
        path: an episode, a task's folder, or a run's output folder.
        rescan_s: seconds for which a listing of the folder is believed; longer where it takes long.

    Raises:
        StoreError: nothing there, or no episode in it.
    """

    def __init__(self, path: str | Place, *, rescan_s: float = 1.0):
        self.path = place_of(path)
        self._root = self.path if isinstance(self.path, Url) else self.path.resolve()
        if not _is_name(self.path.name):
            self.path = self._root
        self._is_episode = is_episode_name(self.path.name) or (
            open_run(self.path).is_episode if isinstance(self.path, Url) else is_store(self.path)
        )
        # Say at once what is wrong with the path.
        if self._is_episode:
            open_episode(self.path)
        else:
            open_run(self.path)
        self._rescan_s = rescan_s
        self._scan = self._looked_over = _Scan()
        self._rounds = Rounds()
        self._known: dict[str, _Known] = {}
        self._due: dict[str, None] = {}  # ids of stores to read: those that have changed, and unread ones
        self._index: Index | None = None  # of the run, while many stores are unread
        self._listing: Listing | None = None
        self._has_news = False  # since it was made
        self._open: OrderedDict[str, tuple[_Signature, Episode]] = OrderedDict()
        # Each of these is held while something slow is done. Whoever needs only what is known takes none.
        self._looking = threading.Lock()  # while changed stores are read
        self._scanning = threading.Lock()  # while the folder is listed
        self._opening = threading.Lock()  # while a store is opened
        self._lock = threading.Lock()  # while `_open` is looked up or changed, which takes no time

    @property
    def name(self) -> str:
        """What the page calls the run."""
        return self._root.name

    @property
    def is_episode(self) -> bool:
        """Whether the path is one episode, rather than a folder of them."""
        return self._is_episode

    def look(self, budget_s: float = math.inf) -> Listing:
        """Return what is there now, in the order of the paths.

        Args:
            budget_s: seconds to spend on stores that are new or have changed; the others are left for the
                next time. One at least is read, so that looking again and again comes to an end.
        """
        # What another one reads just now is told next time; nothing at all would be taken for an empty run.
        wait_s = -1 if self._listing is None or math.isinf(budget_s) else budget_s
        if not self._looking.acquire(timeout=wait_s) and self._listing is not None:
            return self._listing
        try:
            self._note_what_changed()
            end = time.monotonic() + budget_s
            for n_read, id_ in enumerate(self._next_to_read()):
                if n_read and time.monotonic() > end:
                    break
                self._update(id_)
            if not self._due:
                self._index = None
            if self._has_news or self._listing is None:
                self._listing, self._has_news = self._listed(), False
            return self._listing
        finally:
            self._looking.release()

    def _note_what_changed(self) -> None:
        """Find what must be read. In a large run a change may take until the next looks to be found."""
        scan = self._rescan(self._rescan_s * max(1.0, _LISTINGS_APART * self._scan.took_s))
        if scan is not self._looked_over:
            self._looked_over, self._has_news = scan, True
            n_new = sum(id_ not in self._known and id_ not in self._due for id_ in scan.stores)
            if scan.run is not None and n_new >= WORTH:
                self._index = scan.run.index()
            self._rounds.over(scan.stores)
            self._known = {id_: found for id_, found in self._known.items() if id_ in scan.stores}
            self._due = {id_: None for id_ in scan.stores if id_ in self._due or id_ not in self._known}
        for id_ in self._rounds.turn():
            signature = _signature(scan.stores[id_])
            if signature is None:
                self._forget(id_)
            elif _is_stale(self._known.get(id_), signature):
                self._due[id_], self._has_news = None, True

    def _next_to_read(self) -> list[str]:
        """Return ids: in turns one that has changed, for somebody may watch it, and one that is new."""
        changed = [id_ for id_ in self._due if id_ in self._known]
        new = [id_ for id_ in self._due if id_ not in self._known]
        return [id_ for pair in zip_longest(changed, new) for id_ in pair if id_ is not None]

    def _update(self, id_: str) -> None:
        """Read a store's row, if it is still there."""
        path = self._looked_over.stores[id_]
        signature = _signature(path)
        if signature is None:
            self._forget(id_)
            return
        found = self._indexed(id_, path, signature) or self._read(id_, path, signature)
        if id_ in self._known:
            self._rounds.note_change(id_)
        self._known[id_], self._has_news = found, True
        del self._due[id_]

    def _forget(self, id_: str) -> None:
        self._has_news = True
        self._known.pop(id_, None)
        self._due.pop(id_, None)

    def _listed(self) -> Listing:
        """Return what is known; the same object as last time if that is the same."""
        scan = self._looked_over
        found = [known for id_ in scan.stores if (known := self._known.get(id_)) is not None]
        summaries = [one.summary for one in found if one.summary is not None]
        problems = [*(one.problem for one in found if one.problem is not None), *scan.problems]
        n_unread = sum(id_ not in self._known for id_ in self._due)
        last = self._listing
        if last is not None and (summaries, problems, n_unread) == (
            last.summaries,
            last.problems,
            last.n_unread,
        ):
            return last
        return Listing(summaries, problems, n_unread)

    def episode(self, id_: str, version: str | None = None) -> Episode:
        """Return an episode as it is now.

        Args:
            id_: of a `Summary`.
            version: of the same; None takes whatever is there.

        Raises:
            NotThereError: no such episode, it was removed, or another, or a link to elsewhere, has taken its
                place.
            StoreError: it is damaged, or a part of it is a link.
        """
        path = self._scan.stores.get(id_) or self._rescan(min(self._rescan_s, _RESCAN_S)).stores.get(id_)
        if path is None:
            raise NotThereError(f"there is no episode {id_!r} here")
        signature = _signature(path)
        if signature is None:
            with self._lock:
                self._open.pop(id_, None)
            raise NotThereError(f"episode {id_} was removed while it was open")
        refusal = self._refusal(path)
        if refusal is not None:
            raise NotThereError(f"episode {id_} {refusal}")
        episode = self._held(id_, signature)
        if episode is None:
            with self._opening:
                episode = self._held(id_, signature) or self._opened(path)  # it may be open by now
                self._hold(id_, signature, episode)
        if version is not None and version != version_of(episode):
            raise NotThereError(f"episode {id_} was replaced by another recording; load the page anew")
        return episode

    def video(self, episode: Episode, camera: str) -> Video:
        """Return a camera's video; looks at its path anew, for a link may have taken the file's place.

        Args:
            episode: from `episode`.
            camera: its full name.

        Raises:
            NotThereError: the episode has none, or no longer.
        """
        video, folder = episode.videos.get(camera), episode.path.parent
        # Beside an episode that is served alone lies what its folder holds, which is not under the root.
        if video is not None and (self.is_episode or self._refusal(folder) is None):
            with contextlib.suppress(OSError, RuntimeError):  # a loop of links
                if isinstance(video, RemoteVideo):
                    file_of(video)  # a server may refuse
                    return video
                if isinstance(video, Clip):
                    if is_unchanged(video):
                        return video
                elif isinstance(folder, Path) and _is_in(video, folder):
                    return video
        raise NotThereError(f"this episode has no video of camera {camera!r}")

    def _held(self, id_: str, signature: _Signature) -> Episode | None:
        with self._lock:
            held = self._open.get(id_)
            if held is None or held[0] != signature:
                return None
            self._open.move_to_end(id_)
            return held[1]

    def _hold(self, id_: str, signature: _Signature, episode: Episode) -> None:
        with self._lock:
            self._open[id_] = (signature, episode)
            self._open.move_to_end(id_)
            while len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)

    def _opened(self, path: Place) -> Episode:
        """Open a store that lies here with all its parts.

        Raises:
            StoreError: it is damaged, a part of it is a link, or it cannot be read.
        """
        try:
            # A store is opened once, and again after each commit while it is recorded. So a link that is put
            # into it between two commits is not seen; a hard link never is.
            link = first_link(path) if isinstance(path, Path) and path.is_dir() else None
            if link is not None and isinstance(path, Path):
                raise StoreError(
                    f"{path}: {link.relative_to(path)} is a link, expected plain files; not served; put what "
                    "it leads to in its place"
                )
            episode = open_episode(path)
            version_of(episode)
        except LerobotAttnError:
            raise
        except Exception as error:  # files may vanish, and a stranger's attributes may be anything
            raise StoreError(f"{path}: cannot be read: {first_line(error)}") from error
        return episode

    def _indexed(self, id_: str, path: Place, signature: _Signature) -> _Known | None:
        """Return a store's row as the run's index has it; None where the store has to be read.

        What `_opened` refuses besides is refused when somebody opens the episode.
        """
        run = self._looked_over.run
        if self._index is None or run is None or path in run.unsure:
            return None
        row = self._index.row(path, Stamp(*signature[1:])) if isinstance(path, Path) else None
        summary = None if row is None else summary_from_index(id_, row)
        return None if summary is None else _Known(signature, summary, None)

    def _read(self, id_: str, path: Place, signature: _Signature) -> _Known:
        """Return a store's row, or why it has none: one odd store must not hide the others."""
        retry_at = math.inf
        try:
            refusal = self._refusal(path)
            if refusal is not None:
                raise StoreError(f"{path}: {refusal}")
            episode = self._opened(path)
            with self._lock:
                is_watched = id_ in self._open
            if is_watched:
                # Whoever follows it as it grows is told of it and asks at once, several questions at a time:
                # each would open the arrays for itself, which takes longer than the answer.
                with contextlib.suppress(StoreError):  # is said to who asks
                    _ = episode.arrays
                self._hold(id_, signature, episode)
            return _Known(signature, summary_of(id_, episode), None)
        except LerobotAttnError as error:
            problem = first_line(error)
            passes = isinstance(error.__cause__, OSError)
        except Exception as error:
            problem = f"{path}: cannot be read: {first_line(error)}"
            passes = isinstance(error, OSError)
        if passes:
            retry_at = time.monotonic() + _RETRY_S
        return _Known(signature, None, problem, retry_at)

    def _refusal(self, path: Place) -> str | None:
        """Return why a path is not served: it leads to where nobody offered anything. None if it is."""
        if isinstance(path, Url) or isinstance(self._root, Url):
            return None  # only what was found below the address that was given comes here
        try:
            if path.resolve().is_relative_to(self._root):
                return None
        except (OSError, RuntimeError) as error:
            return f"cannot be followed: {first_line(error)}; expected a folder; not served"
        return "is a link out of the served folder, expected a folder in it; not served; serve its own folder"

    def _rescan(self, max_age_s: float) -> _Scan:
        """List the folder, unless that was done so many seconds ago or later."""
        with self._scanning:
            started_at = time.monotonic()
            if started_at - self._scan.started_at < max_age_s:
                return self._scan
            stores: dict[str, Place] = {}
            problems = []
            run = self._find()
            for folder, found in groupby(run.stores, lambda store: store.parent):
                # Thousands lie in one folder: what is the same for all of them is found out once.
                is_here, prefix = self._refusal(folder) is None, self._prefix(folder)
                for store in found:
                    is_plain = is_here and (isinstance(store, Url) or not store.is_symlink())
                    refusal = None if is_plain else self._refusal(store)
                    if refusal is None:
                        stores[id_alone(store) if self.is_episode else prefix + _own_id(store)] = store
                    else:
                        problems.append(f"{store}: {refusal}")
            self._scan = _Scan(started_at, time.monotonic() - started_at, stores, problems, run)
            return self._scan

    def _find(self) -> Run:
        if self.is_episode:
            return Run(self.path, (self.path,))
        try:
            return open_run(self.path)
        except OSError:  # the folder has become empty, is gone, or cannot be listed
            return Run(self.path, ())

    def _prefix(self, folder: Place) -> str:
        """Return what the ids of a folder's stores begin with.

        An id is the store's path below the root, in one segment of a URL; no two stores have the same.
        """
        if self.is_episode:
            return ""
        return "".join(f"{_escaped(name)}:" for name in _below(folder, self.path).parts)


def id_alone(store: Place) -> str:
    """Return the id of an episode that is served, or exported, by itself."""
    return _own_id(store if isinstance(store, Url) or _is_name(store.name) else store.resolve())


def _own_id(store: Place) -> str:
    return _escaped(bare_name(store.name))


def _below(store: Place, root: Place) -> PurePath:
    if isinstance(store, Url) and isinstance(root, Url):
        return store.relative_to(root)
    return PurePath(str(store)).relative_to(str(root))


def _is_in(video: Path, folder: Path) -> bool:
    return video.is_file() and video.resolve().parent == folder.resolve()


def _is_name(last: str) -> bool:
    """Return whether the last part of a path is a folder's name: that of "." and ".." is none."""
    return last not in ("", "..")


def _escaped(name: str) -> str:
    """Return a folder's name with what an id cannot hold written as bytes, as URLs do: "a:b" → "a%3Ab"."""
    return _NOT_IN_IDS.sub(lambda found: "".join(f"%{byte:02X}" for byte in os.fsencode(found[0])), name)


def _signature(store: Place) -> _Signature | None:
    """Return what changes with every commit, for each one replaces the metadata; None if it is gone."""
    try:
        return signature_of(store)
    except OSError:
        return None


def _is_stale(known: _Known | None, signature: _Signature) -> bool:
    return known is None or known.signature != signature or time.monotonic() >= known.retry_at
