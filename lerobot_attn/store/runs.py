"""Runs: the episode stores under a folder, found without opening any.

    for episode in open_run("outputs/eval"):
        print(episode.task, episode.success)

Knows what stores are called and how to open one. Knows nothing of what they hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lerobot_attn.errors import StoreError
from lerobot_attn.store.attributes import HELP, is_store
from lerobot_attn.store.location import PACKED_EPISODE_SUFFIX, bare_name, files_at, is_episode_name
from lerobot_attn.store.reader import Episode, open_episode
from lerobot_attn.store.remote import Remote
from lerobot_attn.store.schema import EPISODE_SUFFIX, METADATA
from lerobot_attn.store.url import Place, Url, place_of

if TYPE_CHECKING:
    import pandas as pd


class TableRow(NamedTuple):
    """An episode in `Run.table`."""

    task_group: Any
    task_id: Any
    episode: Any
    task: str
    condition: str  # its name; "baseline" where nothing was done to the policy
    success: bool | None
    frames: int
    inferences: int
    bytes: int
    complete: bool
    dataset: str | None  # the data set's repo_id, whose episode `episode` is
    path: str

    @classmethod
    def of(cls, episode: Episode) -> TableRow:
        """Return the row of an episode; looks at the size of each of its files."""
        return cls(
            episode.attributes.get("task_group"),
            episode.attributes.get("task_id"),
            episode.attributes.get("episode_index"),
            episode.task,
            episode.condition.name,
            episode.success,
            episode.n_frames,
            episode.n_inferences,
            episode.stored_bytes(),
            episode.is_complete,
            _dataset(episode.attributes.get("dataset")),
            str(episode.path),
        )


def _dataset(found: Any) -> str | None:
    return str(found["repo_id"]) if isinstance(found, Mapping) and found.get("repo_id") else None


class Run:
    """The episodes under a folder, opened one by one as they are asked for. Get it from `open_run`.

    Iterating yields the episodes in the order of their paths and passes over damaged stores, which `damaged`
    lists. `len(run)` and `run[index]` count the stores that are there, without opening any: where one is
    damaged, `run[index]` raises its `StoreError`.

    Attributes:
        path: the folder.
        stores: the stores' folders, and the files of those that are packed.
    """

    def __init__(self, path: Place, stores: Iterable[Place]):
        self.path = path
        self.stores = tuple(stores)
        self._reasons: dict[Place, str | None] = {}  # of the stores that were tried; None: it opened

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
            return None
        self._reasons[store] = None
        return episode

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per episode: task, condition, success, frames, inferences, bytes, complete, dataset, path.

        Of a robot's rollout `dataset` and `episode` say which episode of which data set it is.
        """
        import pandas as pd

        return pd.DataFrame([TableRow.of(episode) for episode in self], columns=list(TableRow._fields))


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
    stores = _find_stores(path)
    if not stores:
        raise StoreError(f"{path}: holds no episode store, expected {{task}}/episode_*{EPISODE_SUFFIX} in it")
    return Run(path, stores)


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


def _find_stores(path: Path) -> list[Path]:
    for prefix in ("", "*/", "attention/*/", "**/"):
        found = [
            store
            for form in (EPISODE_SUFFIX, PACKED_EPISODE_SUFFIX)
            for store in path.glob(f"{prefix}episode_*{form}")
        ]
        if found:
            break
    # An episode that is there in both forms is one of the run's, which opening refuses.
    either = {bare_name(str(store)): store for store in sorted(found, reverse=True)}
    return sorted(either.values())
