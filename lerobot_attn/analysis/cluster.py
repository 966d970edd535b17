"""Work on episodes in other processes and on other machines, by Dask's distributed scheduler.

    summarise_run(open_run("out"), workers=4)                        # processes on this machine
    summarise_run(open_run("out"), scheduler="tcp://10.0.0.1:8786")  # a cluster that runs already
    with local_workers(4) as client:                                 # one for several calls
        compare(failures, successes, scheduler=client)

One episode is one task. A worker opens the episode by its path or URL itself and sends back what came of it;
no map ever passes through the scheduler or this process. Only a few tasks for each worker are under way at a
time, so that neither holds more of a long run than of a short one. The only place that knows `distributed`,
which the extra `cluster` brings and which is imported when it is first needed. Knows no episode.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dask.system import CPU_COUNT

from lerobot_attn import __version__
from lerobot_attn.errors import (
    ConfigError,
    LerobotAttnError,
    SelectionError,
    SetupError,
    StoreError,
    first_line,
)
from lerobot_attn.sizes import Progress

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger(__name__)

# What computes: Dask's "threads", "processes" or "synchronous"; the address of a distributed scheduler, or a
# client of one; None for the default.
type Scheduler = str | Client | None

HERE = ("threads", "processes", "synchronous")  # the schedulers that need no cluster
_PATIENCE_S = 10  # for a scheduler to answer, and for a first worker before somebody is told
_TASKS_A_THREAD = 2  # under way: one that is worked on and one that waits, so that no worker idles
_RETRIES = 2  # of a task that was lost for reasons that have nothing to do with its episode


class Job(Protocol):
    """What a worker does for one episode; it is pickled."""

    @property
    def place(self) -> str:
        """Where the episode lies on this machine, if it does: then a worker must see it there."""

    def __call__(self) -> Any:
        """Return what came of it; what went wrong with the episode is returned, not raised."""


@contextmanager
def local_workers(n: int | None = None) -> Iterator[Client]:
    """Start worker processes on this machine; they end with the block, also when it is interrupted.

    A script that calls this, or gives `workers`, must do so under `if __name__ == "__main__":`, because the
    workers import it.

    Args:
        n: how many, one thread each; by default one for each core.

    Yields:
        A client, to be given as `scheduler`.

    Raises:
        ConfigError: fewer than one worker.
        SetupError: `distributed` is not installed, or the workers cannot be started.
    """
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise ConfigError(f"workers={n!r}: expected a number of processes, 1 or more")
    distributed = _distributed()
    try:
        cluster = distributed.LocalCluster(
            n_workers=n or CPU_COUNT,
            threads_per_worker=1,
            processes=True,
            # Neither the scheduler nor its dashboard can be reached from other machines.
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            # A worker that is replaced is no error; what is, is raised.
            silence_logs=logging.CRITICAL,
        )
    except RuntimeError as error:
        raise SetupError(
            f"the worker processes cannot be started: {first_line(error)}; a script must start them under "
            "if __name__ == '__main__':, because each of them imports it"
        ) from error
    with cluster, distributed.Client(cluster, set_as_default=False) as client:
        yield client


@contextmanager
def workers_of(scheduler: Scheduler, workers: int | None) -> Iterator[Client | str | None]:
    """Connect to what computes: yield the client of a cluster, or a scheduler that needs none.

    Args:
        scheduler: see `Scheduler`.
        workers: start so many processes on this machine instead.

    Raises:
        ConfigError: both are given, or there are no workers.
        SelectionError: unknown scheduler.
        SetupError: `distributed` is not installed, no scheduler answers there, or workers cannot be started.
    """
    if workers is not None:
        if scheduler is not None:
            raise ConfigError(
                f"got scheduler {_shown(scheduler)} and {workers} workers, expected one of them: a scheduler "
                "has workers of its own"
            )
        with local_workers(workers) as client:
            yield client
    elif isinstance(scheduler, str) and "://" in scheduler:
        with _connected(scheduler) as client:
            yield client
    elif scheduler is None or (isinstance(scheduler, str) and scheduler in HERE):
        yield scheduler
    elif hasattr(scheduler, "submit") and hasattr(scheduler, "nthreads"):
        if getattr(scheduler, "asynchronous", False):
            raise SelectionError("scheduler: got an asynchronous client, expected a synchronous one")
        yield scheduler
    else:
        raise SelectionError(
            f"scheduler {_shown(scheduler)}: expected {', '.join(map(repr, HERE))}, the address of a Dask "
            "scheduler as 'tcp://HOST:PORT', or a client of one"
        )


def dashboard_of(client: Client) -> str | None:
    """Return the address of a cluster's dashboard; None where there is none, as its scheduler lacks bokeh."""
    try:
        has_bokeh = client.run_on_scheduler(util.find_spec, "bokeh") is not None
        link = client.dashboard_link if has_bokeh else None
    except Exception:  # not installed there, or the scheduler runs no functions for others
        return None
    return str(link) if link else None


def run_jobs(client: Client, jobs: Sequence[Job], progress: Progress | None = None) -> list[Any]:
    """Run jobs on a cluster's workers; return what each returned, in their order.

    A worker that ends on the way loses nothing: another one does what it was at. An episode with which
    workers ended several times is tried once more on its own, because it may only have waited beside the one
    that they ended of; if they still do, a StoreError takes the place of its result.

    Args:
        client: of the cluster.
        jobs: what to do.
        progress: called as `progress(done, total)` as jobs are done, from this thread.

    Raises:
        SetupError: the scheduler is gone, or workers do not see a path that this machine sees, have another
            version of this package, or cannot import what is to be done.
    """
    results: dict[int, Any] = {}
    lost: list[int] = []
    for alone, indices in ((False, range(len(jobs))), (True, lost)):
        for index, result in _outcomes(client, jobs, indices, alone=alone):
            if isinstance(result, _WorkersEndedError) and not alone:
                lost.append(index)
                continue
            results[index] = result
            if progress is not None:
                progress(len(results), len(jobs))
    return [results[index] for index in range(len(jobs))]


class _WorkersEndedError(StoreError):
    """Workers ended each time that they were given this episode."""


def _outcomes(
    client: Client, jobs: Sequence[Job], indices: Iterable[int], *, alone: bool
) -> Iterator[tuple[int, Any]]:
    """Yield each job's index and result as it is done, with a few jobs for each worker under way."""
    from distributed import wait
    from distributed.protocol import pickle

    waiting, running, told = deque(indices), dict[Any, int](), False
    try:
        while waiting or running:
            with _in_one_line(client):
                n_threads = sum(client.nthreads().values())  # anew, because workers come and go
                most = 1 if alone else max(1, _TASKS_A_THREAD * n_threads)
                while waiting and len(running) < most:
                    index = waiting.popleft()
                    task = __version__, jobs[index].place, pickle.dumps(jobs[index])
                    running[client.submit(_work, *task, pure=False, retries=_RETRIES)] = index
                try:
                    with client.as_current():
                        done = wait([*running], timeout=_PATIENCE_S, return_when="FIRST_COMPLETED").done
                except TimeoutError:
                    done = ()
            if not done and not n_threads and not told:
                told = True
                log.warning("no worker has joined the scheduler at %s yet; waiting for one", _address(client))
            for future in done:
                index = running.pop(future)
                yield index, _result(client, jobs[index], future)
    finally:
        if running:  # interrupted: nobody wants them any more
            client.cancel([*running], force=True)


def _work(version: str, place: str, payload: bytes) -> tuple[str, Any, str]:
    """Do a job on a worker; return "done" and its result, or why this worker cannot do it, and its host."""
    host = socket.gethostname()
    if version != __version__:
        return "version", __version__, host
    from distributed.protocol import pickle

    try:
        job = pickle.loads(payload)
    except Exception as error:  # a module of the caller's own, say
        return "import", first_line(error), host
    result = job()
    if isinstance(result, Exception):
        try:
            pickle.loads(pickle.dumps(result))
        except Exception:  # some exceptions cannot be sent
            result = RuntimeError(f"{type(result).__name__}: {result}")
        if place and not Path(place).exists():
            return "unseen", result, host
    return "done", result, host


def _result(client: Client, job: Job, future: Any) -> Any:
    """Return what a job returned."""
    from distributed import KilledWorker

    with _in_one_line(client):
        try:
            what, result, host = future.result()
        except KilledWorker as error:
            return _WorkersEndedError(
                f"its worker ended {error.allowed_failures + 1} times: killed, or out of memory; give each "
                "worker more memory, or start fewer on a machine"
            )
    said = {
        "version": f"has lerobot_policy_attn {result}, expected {__version__} as here",
        "import": f"cannot import what it is to do ({result}); measures of your own must be importable there",
        "unseen": f"sees nothing at {job.place}, which is on this machine; expected a path on a file system "
        "that all share, or a URL",
    }
    if what == "done" or (what == "unseen" and not Path(job.place).exists()):
        return result
    raise SetupError(f"{_address(client)}: its worker on {host} {said[what]}")


@contextmanager
def _connected(address: str) -> Iterator[Client]:
    """Connect to the scheduler at an address.

    Raises:
        SetupError: `distributed` is not installed, or none answers there.
    """
    distributed = _distributed()
    try:
        client = distributed.Client(address, timeout=_PATIENCE_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise SetupError(
            f"{address}: no Dask scheduler answered within {_PATIENCE_S} s ({first_line(error)}); start one "
            "with `dask scheduler`, or use workers on this machine (--workers N, workers=N)"
        ) from error
    with client:
        yield client


@contextmanager
def _in_one_line(client: Client) -> Iterator[None]:
    """Say in one line what goes wrong between this process, the scheduler and its workers."""
    try:
        yield
    except LerobotAttnError:
        raise
    except (OSError, CancelledError) as error:
        raise SetupError(
            f"{_address(client)}: the scheduler is gone ({first_line(error)}), and the results with it"
        ) from error
    except Exception as error:
        raise SetupError(
            f"{_address(client)}: the work cannot be sent there ({first_line(error)}); expected "
            f"lerobot_policy_attn {__version__}, Python and Dask as here for the scheduler and every worker"
        ) from error


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise SetupError(
            "workers and schedulers need Dask's distributed; pip install 'lerobot_policy_attn[cluster]'"
        ) from error
    return distributed


def _address(client: Client) -> str:
    scheduler = getattr(client, "scheduler", None)
    return str(getattr(scheduler, "address", None) or "the scheduler")


def _shown(scheduler: Any) -> str:
    return f"{scheduler!r:.80}"
