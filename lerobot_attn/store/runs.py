"""Runs: the episode stores under a folder, found without opening any.

    for episode in open_run("outputs/eval"):
        print(episode.task, episode.success)

Knows what stores are called and how to open one. Knows nothing of what they hold.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lerobot_attn.errors import SelectionError, StoreError
from lerobot_attn.sizes import Progress
from lerobot_attn.store.attributes import HELP, NothingYetError, is_store
from lerobot_attn.store.index import WORTH, Index, IndexRow, Stamp, TableRow, home_of, stamp_of_store
from lerobot_attn.store.location import bare_name, files_at, is_episode_name, names_below, other_form
from lerobot_attn.store.reader import Episode, open_episode
from lerobot_attn.store.receipts import receipt_of, receipt_path, removed_stores
from lerobot_attn.store.remote import Remote
from lerobot_attn.store.schema import EPISODE_SUFFIX, METADATA
from lerobot_attn.store.url import Place, Url, place_of

if TYPE_CHECKING:
    import pandas as pd


class Run:
    """The episodes under a folder, opened one by one as they are asked for. Get it from `open_run`.

    Iterating yields the episodes in the order of their paths and passes over damaged stores, which `damaged`
    lists. `len(run)` and `run[index]` count the stores that are there, without opening any: where one is
    damaged, `run[index]` raises its `StoreError`.

    Args:
        path: the folder.
        stores: the episodes in it.
        unsure: those of them that are there in both forms.

    Attributes:
        path: the folder.
        stores: the stores' folders, and the files of those that are packed.
    """

    def __init__(self, path: Place, stores: Iterable[Place], unsure: Collection[Place] = ()):
        self.path = path
        self.stores = tuple(stores)
        self._unsure = frozenset(unsure)
        self._reasons: dict[Place, str | None] = {}  # of the stores that were tried; None: it opened
        self._begun: set[Place] = set()  # of those that did not open: that hold nothing yet
        self._rows: dict[Place, IndexRow] | None = None
        self._before: dict[Place, IndexRow] = {}

    def __repr__(self) -> str:
        """Say which run this is."""
        return f"<Run {self.path}: {len(self)} episodes>"

    def __len__(self) -> int:
        return len(self.stores)

    @property
    def is_episode(self) -> bool:
        """Whether the path is one episode's store, rather than a folder of them."""
        return self.stores == (self.path,)

    def __iter__(self) -> Iterator[Episode]:
        for store in self.stores:
            episode = self._opened(store)
            if episode is not None:
                yield episode

    def __getitem__(self, index: int) -> Episode:
        return open_episode(self.stores[index])

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """All episodes that can be opened, in memory at once."""
        return tuple(self)

    @property
    def damaged(self) -> tuple[tuple[Place, str], ...]:
        """Stores that could not be opened, with the reason."""
        for store in self.stores:
            if store not in self._reasons:
                self._opened(store)
        return tuple((store, reason) for store in self.stores if (reason := self._reasons[store]) is not None)

    def _opened(self, store: Place) -> Episode | None:
        try:
            episode = open_episode(store)
        except StoreError as error:
            self._reasons[store] = str(error)
            if isinstance(error, NothingYetError):
                self._begun.add(store)
            return None
        self._reasons[store] = None
        return episode

    @property
    def unsure(self) -> Collection[Place]:
        """Those of the stores that are there in both forms, packed and not, which opening refuses."""
        return self._unsure

    def index(self) -> Index:
        """Return the rows that are on disk, each to be believed as far as `Index.row` does."""
        here = [store for store in self.stores if isinstance(store, Path)]
        return Index(home_of(self.path, here) if isinstance(self.path, Path) else None)

    @property
    def begun(self) -> tuple[Place, ...]:
        """Those of the damaged stores whose recording has not committed anything yet."""
        return tuple(store for store, _ in self.damaged if store in self._begun)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per episode: task, condition, success, frames, inferences, bytes, complete, dataset, path.

        Of a robot's rollout `dataset` and `episode` say which episode of which data set it is. From the run's
        index, as far as its stores are what they were.
        """
        import pandas as pd

        return pd.DataFrame([row.table for row in self.rows()], columns=list(TableRow._fields))

    def rows(self, progress: Progress | None = None) -> list[IndexRow]:
        """Return what is known of each episode that can be opened, in the order of the stores.

        Of complete episodes it is in the run's index, `attention-index.parquet`; each is looked at once, and
        read where it is not what the index says. Then the index is written anew, if the folder lets it.

        Args:
            progress: called as `progress(done, total)`.
        """
        if self._rows is None:
            self._rows = self._look(progress)
        return [self._rows[store] for store in self.stores if store in self._rows]

    @cached_property
    def sent(self) -> tuple[IndexRow, ...]:
        """Episodes that were sent to a bucket and removed here, as receipts say; paths are the old ones."""
        if not isinstance(self.path, Path) or self.is_episode:
            return ()
        return tuple(
            row for store in removed_stores(self.path) if (row := _row_of_receipt(store)) is not None
        )

    def again(self) -> Run:
        """Return the run as it is now; of its episodes those are looked at that are new or have changed.

        Raises:
            StoreError: it is gone.
        """
        now = open_run(self.path)
        now._before = self._before if self._rows is None else self._rows
        return now

    def where(
        self, *, task: str | None = None, success: bool | None = None, condition: str | None = None
    ) -> Run:
        """Return the part of the run whose episodes are so; what cannot be opened is not among them.

        Args:
            task: the task's group and number ("libero_object_3"), its group, or words of its instruction, in
                upper or lower case; None: any.
            success: whether the episode succeeded; None: any, also those that nobody judged.
            condition: the name of what was done to the policy ("baseline" where nothing was); None: any.

        Raises:
            SelectionError: no episode is so.
        """
        rows = self.rows()
        chosen = _of_task(rows, task)
        for name, wanted in (("success", success), ("condition", condition)):
            if wanted is not None:
                chosen = [row for row in chosen if getattr(row.table, name) == wanted]
        if not chosen:
            raise SelectionError(f"{self.path}: {_nothing(rows, task, success, condition)}")
        paths = {row.table.path: row for row in chosen}
        part = Run(self.path, [store for store in self.stores if str(store) in paths])
        part._rows = {store: paths[str(store)] for store in part.stores}
        part._reasons = dict.fromkeys(part.stores)
        return part

    def _look(self, progress: Progress | None) -> dict[Place, IndexRow]:
        n_here = sum(isinstance(store, Path) for store in self.stores)
        index: Index | None = None
        rows: dict[Place, IndexRow] = {}
        for number, store in enumerate(self.stores, start=1):
            stamp = stamp_of_store(store)
            row = self._before.get(store)
            if row is None or stamp is None or row.stamp != stamp or not row.table.complete:
                row = None
            if row is None and isinstance(store, Path) and isinstance(self.path, Path) and n_here >= WORTH:
                index = index or self.index()
                row = index.row(store, stamp) if stamp and store not in self._unsure else None
            if row is not None:
                self._reasons[store] = None
            elif (episode := self._opened(store)) is not None:
                row = IndexRow.of(store, episode.header, stamp)
            if row is not None:
                rows[store] = row
            if progress is not None and (number % 50 == 0 or number == len(self.stores)):
                progress(number, len(self.stores))
        if index is not None:
            index.keep(rows.values())
        return rows


def _row_of_receipt(store: Path) -> IndexRow | None:
    file = receipt_path(store)
    try:
        looked = file.stat()
    except OSError:  # removed since it was found
        return None
    receipt = receipt_of(store)
    if receipt is None:
        return None
    stamp = Stamp(looked.st_mtime_ns, looked.st_size)
    return IndexRow.of(store, receipt.header, stamp, n_bytes=receipt.n_bytes)


def task_name(row: TableRow) -> str:
    """Return a task's group and number, as "libero_object_3"."""
    return f"{row.task_group}_{row.task_id}"


def _of_task(rows: list[IndexRow], task: str | None) -> list[IndexRow]:
    if task is None:
        return rows
    named = [row for row in rows if task in (task_name(row.table), row.table.task_group)]
    return named or [row for row in rows if task.casefold() in row.table.task.casefold()]


def _nothing(rows: list[IndexRow], task: str | None, success: bool | None, condition: str | None) -> str:
    """Say what was looked for in vain, and what there is."""
    asked = {
        f"of task {task!r}": task is not None,
        f"in condition {condition!r}": condition is not None,
        "that succeeded" if success else "that failed": success is not None,
    }
    tasks = {f"{task_name(row.table)} ({row.table.task})": None for row in rows}
    conditions = {row.table.condition: None for row in rows}
    n_success, n_failure = (sum(row.table.success is outcome for row in rows) for outcome in (True, False))
    there = [
        *([f"tasks {_first(tasks)}"] if task is not None else []),
        *([f"conditions {_first(conditions)}"] if condition is not None else []),
        f"{n_success} successes and {n_failure} failures",
    ]
    return (
        f"no episode {' '.join(text for text, is_asked in asked.items() if is_asked)}; of its {len(rows)} "
        f"episodes there are {'; '.join(there)}"
    )


def _first(names: Iterable[str], most: int = 5) -> str:
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def open_run(path: str | Place) -> Run:
    """Find every episode under a folder: a run's output folder, its `attention`, or one task's.

    Reads no store: each is opened when it is asked for.

    Args:
        path: the folder; an episode's own path, whatever it is called, gives a run of one. A URL of either,
            as of `open_episode`; the folders of plain HTTP servers cannot be listed.

    Raises:
        StoreError: nothing there, or no episode in it.
    """
    place = place_of(path)
    if isinstance(place, Url):
        return _remote_run(place)
    path = place
    if not path.exists():
        raise StoreError(f"{path}: no such folder; {HELP}")
    if is_episode_name(path.name) or not path.is_dir() or is_store(path):
        open_episode(path)
        return Run(path, (path,))
    stores, unsure = _find_stores(path)
    if not stores:
        gone = next(removed_stores(path), None)
        receipt = None if gone is None else receipt_of(gone)
        sent = "" if receipt is None else f"; what was here was sent to a bucket, e.g. {receipt.url}"
        raise StoreError(
            f"{path}: holds no episode store, expected {{task}}/episode_*{EPISODE_SUFFIX} in it{sent}"
        )
    return Run(path, stores, unsure)


def _remote_run(url: Url) -> Run:
    if is_episode_name(url.name):
        open_episode(url)
        return Run(url, (url,))
    if url.scheme in ("http", "https"):  # which have no lists of what is in a folder
        try:
            open_episode(url)
        except StoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise StoreError(
                f"{url}: is no episode's store, and plain HTTP servers do not list what is in a folder; "
                "expected the address of an episode (….zarr or ….zarr.zip)"
            ) from error
        return Run(url, (url,))
    folder = files_at(url, anew=True)
    assert isinstance(folder, Remote)
    names = folder.names()
    if METADATA in names:
        open_episode(url)
        return Run(url, (url,))
    for level in ("", "attention"):
        if level and level not in names:
            continue
        inside = folder.names(level) if level else names
        found = [f"{level}/{name}".strip("/") for name in inside if _is_episode(name)]
        if not found:
            folders = [f"{level}/{name}".strip("/") for name in inside if "." not in name]
            found = [
                f"{below}/{name}" for below in folders for name in folder.names(below) if _is_episode(name)
            ]
        if found:
            either = {bare_name(name): name for name in sorted(found, reverse=True)}
            return Run(url, [url / name for name in sorted(either.values())])
    raise StoreError(
        f"{url}: holds no episode store, expected {{task}}/episode_*{EPISODE_SUFFIX} in it; is the address "
        "right?"
    )


def _is_episode(name: str) -> bool:
    return name.startswith("episode_") and is_episode_name(name)


def _find_stores(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the episodes below a folder, in the order of their paths, and those that are in both forms."""
    for level in (_itself, _folders_in, _folders_of_attention, _folders_below):
        found = [
            (*parts, name)
            for folder in level(path)
            for parts in [folder.relative_to(path).parts]
            for name in _names_in(folder)
            if _is_episode(name)
        ]
        if found:
            break
    # An episode that is there in both forms is one of the run's, which opening refuses.
    either = {(*parts[:-1], bare_name(parts[-1])): parts for parts in sorted(found, reverse=True)}
    stores = [Path(path, *parts) for parts in sorted(either.values())]
    if len(either) == len(found):
        return stores, []
    return stores, [store for store in stores if (other_form(store) or store).exists()]


def _itself(root: Path) -> list[Path]:
    return [root]


def _folders_in(root: Path) -> list[Path]:
    return [root / name for name in _names_in(root, folders_only=True)]


def _folders_of_attention(root: Path) -> list[Path]:
    return _folders_in(root / "attention")


def _folders_below(root: Path) -> Iterator[Path]:
    for folder, _ in names_below(root):
        yield folder


def _names_in(folder: Path, *, folders_only: bool = False) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not folders_only or entry.is_dir()]
    except OSError:  # no folder, or one that cannot be listed
        return []
