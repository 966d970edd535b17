"""Episodes and datasets as the functions over runs take them: opened in turn, let go after use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xarray as xr
from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import delayed

from lerobot_attn.analysis.cluster import Scheduler, run_jobs, workers_of
from lerobot_attn.analysis.labels import said_of
from lerobot_attn.errors import SelectionError
from lerobot_attn.sizes import Progress, one_core


class EpisodeLike(Protocol):
    """What is asked of an episode; `lerobot_attn.open_episode` and `open_run` give them."""

    @property
    def path(self) -> Any:
        """Where it lies."""

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What it says of itself."""

    @property
    def arrays(self) -> xr.Dataset:
        """The episode's dataset; opened only when its turn comes."""


Source = xr.Dataset | EpisodeLike


def map_episodes[Result](
    function: Callable[[xr.Dataset], Result],
    sources: Sequence[Source],
    *,
    scheduler: Scheduler = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Result | Exception]:
    """Call a function on every episode's dataset, in parallel; what it raises takes the place of its result.

    Args:
        function: called with a dataset; with "processes" or a cluster it is pickled.
        sources: the episodes.
        scheduler: what computes; by default threads of this process.
        workers: start so many processes on this machine instead.
        progress: called as `progress(done, total)` as episodes are done, from this thread.

    Returns:
        A result for each, in their order.

    Raises:
        SelectionError: unknown scheduler.
        ConfigError: a scheduler and workers, or no workers.
        SetupError: there is no such cluster, or it cannot do this work.
    """
    jobs = [_Job(function, source, alone=scheduler == "synchronous") for source in sources]
    with workers_of(scheduler, workers) as chosen:
        if chosen is not None and not isinstance(chosen, str):
            return run_jobs(chosen, jobs, progress)
        tasks = [delayed(job, pure=False, traverse=False)() for job in jobs]
        with Callback(posttask=_Counter({task.key for task in tasks}, progress)):
            return list(compute(*tasks, scheduler=chosen or "threads"))


def sources_of[S: Source](episodes: S | Iterable[S], what: str) -> list[S]:
    """Return episodes as a list, one alone too, after checking that they are some.

    Raises:
        SelectionError: there is none, or something else.
    """
    if isinstance(episodes, xr.Dataset) or not isinstance(episodes, Iterable):
        found: list[Any] = [episodes]
    else:
        found = list(episodes)
    if not found:
        raise SelectionError(f"{what}: got no episodes, expected one at least")
    for source in found:
        if not isinstance(source, xr.Dataset) and not hasattr(source, "attributes"):
            raise SelectionError(
                f"{what}: got {type(source).__name__} {source!r:.80}, expected datasets or episodes"
            )
    return found


def attributes_of(source: Source) -> Mapping[Any, Any]:
    """Return what an episode says of itself, without opening its arrays."""
    return said_of(source) if isinstance(source, xr.Dataset) else source.attributes


def success_of(source: Source) -> bool | None:
    """Return whether an episode solved its task; None if it was interrupted or its loop did not know."""
    success = attributes_of(source).get("success")
    # A file that is no Zarr store gives back a number of NumPy's.
    return bool(success) if isinstance(success, (bool, np.bool_, np.integer)) else None


def condition_of(source: Source) -> str:
    """Return the name of what was done to an episode's policy; "baseline" where nothing was."""
    condition = attributes_of(source).get("condition")
    return str(condition.get("name", "")) if isinstance(condition, Mapping) else "baseline"


def path_of(source: Source) -> str:
    """Return where an episode lies, "" if it does not say."""
    return str(source.encoding.get("source", "")) if isinstance(source, xr.Dataset) else str(source.path)


class _Job:
    """One episode's work. No dataclass and no plain argument: Dask would compute a dataset it found there."""

    def __init__(self, function: Callable[[xr.Dataset], Any], source: Source, *, alone: bool = False):
        self.function = function
        self.source = source
        self.alone = alone  # no other job runs meanwhile: this one may use all cores

    @property
    def place(self) -> str:
        """The episode's path, whole; "" for one at a URL, or that does not say."""
        path = path_of(self.source)
        return "" if not path or "://" in path else str(Path(path).absolute())

    def __call__(self) -> Any:
        try:
            # What a copy opens goes when the copy goes; the episode itself would keep it.
            source = self.source
            with nullcontext() if self.alone else one_core():
                return self.function(source if isinstance(source, xr.Dataset) else copy.copy(source).arrays)
        except Exception as error:  # a damaged store raises many kinds, and must not end thousands of others
            return error


class _Counter:
    """Reports finished jobs; Dask's local schedulers call it in the thread that waits for them."""

    def __init__(self, keys: set[Any], progress: Progress | None):
        self._keys, self._total, self._progress = keys, len(keys), progress

    def __call__(self, key: Any, *_: Any) -> None:
        if key in self._keys:
            self._keys.discard(key)
            if self._progress is not None:
                self._progress(self._total - len(self._keys), self._total)
