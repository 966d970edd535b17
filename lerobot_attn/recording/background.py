"""A single thread that writes, behind a queue bounded in bytes.

Knows nothing of what it runs: jobs are callables that belong to a key (an episode). When a job of a key
fails, the key's later jobs are dropped and the failure is kept for whoever asks.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Literal

# What to do with a job that does not fit: wait until it does; drop it; or take it nevertheless.
WhenFull = Literal["wait", "drop", "take"]

_TRIM_BYTES = 16_000_000  # while nothing is queued
_TRIM_BUSY_BYTES = 64_000_000  # otherwise
_TURN_S = 0.0005


def _find_trim() -> Callable[[], None]:
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return lambda: None
    return lambda: malloc_trim(0)


# glibc keeps what threads free for itself, in pieces: without this a process that records for a minute holds
# several times the memory that it uses. It takes milliseconds, in which other threads may wait for memory.
_trim = _find_trim()


@dataclass(frozen=True)
class _Job:
    key: Hashable
    run: Callable[[], None]
    n_bytes: int
    always: bool
    number: int = 0  # counts the jobs in the order in which they were queued


class BackgroundWriter:
    """Runs jobs in order on one thread; a full queue makes `submit` wait: nothing is dropped or grows.

    Args:
        max_bytes: memory that queued jobs may hold together. A single larger job is let through alone.
        niceness: by how much its thread yields to others (Linux); 0: not at all. Beside a busy program a
            thread that yields hardly runs. So it does only until somebody has to wait for it: what is queued
            then, and what comes later, is written by a thread that yields to nobody.
        look_every_s: how often its thread looks for jobs; None: whoever queues one wakes it. A thread that is
            woken may take the core, or Python's turn, of the one that wakes it.

    Attributes:
        waited_s: seconds that callers have waited for room in the queue, and for the queue to be done.
    """

    def __init__(self, max_bytes: int, *, niceness: int = 0, look_every_s: float | None = None):
        self._max_bytes = max_bytes
        self._look_every_s = look_every_s
        self._niceness = niceness  # of the thread that works now
        self._jobs: deque[_Job] = deque()
        self._pending_bytes = 0
        self._n_unfinished = 0
        self._closing = False
        self._condition = threading.Condition()
        self._failures: dict[Hashable, BaseException] = {}
        self._kept_before: dict[Hashable, int] = {}  # key that failed → first job that is not run any more
        self._n_queued = 0
        self._untrimmed_bytes = 0
        self.waited_s = 0.0
        self._thread = self._started(niceness)

    def submit(
        self, key: Hashable, run: Callable[[], None], n_bytes: int = 0, *, always: bool = False
    ) -> None:
        """Queue a job; wait while it does not fit. One without bytes never waits.

        Args:
            key: whose job it is.
            run: what to do.
            n_bytes: memory that the job holds until it is done.
            always: run it even after a job of the same key has failed (to clean up).
        """
        self._queue([_Job(key, run, n_bytes, always)])

    def submit_shared(
        self, runs: Mapping[Hashable, Callable[[], None]], n_bytes: int, *, when_full: WhenFull = "wait"
    ) -> bool:
        """Queue one job for each key, all of which use the same arrays.

        All are queued or, when the wait is interrupted, none.

        Args:
            runs: key → what to do.
            n_bytes: memory that the arrays hold until the last of the jobs is done.
            when_full: what to do while they do not fit.

        Returns:
            Whether they were queued; never False unless they may be dropped.
        """
        jobs = [_Job(key, run, 0, always=False) for key, run in runs.items()]
        return self._queue([*jobs[:-1], replace(jobs[-1], n_bytes=n_bytes)], when_full)

    def failure(self, key: Hashable) -> BaseException | None:
        """Return what went wrong first with a key's jobs, if anything."""
        return self._failures.get(key)

    def fail(self, key: Hashable, error: BaseException, *, keep_queued: bool = False) -> None:
        """Mark a key as failed from outside; its later jobs are dropped.

        Args:
            key: whose jobs.
            error: what went wrong.
            keep_queued: run what is in the queue already: the failure says nothing about that.
        """
        with self._condition:
            if key in self._failures:
                return
            if keep_queued:
                self._kept_before[key] = self._n_queued
            self._failures[key] = error

    def drop(self, error: BaseException) -> None:
        """Fail every key that has jobs in the queue. The job that is running goes on."""
        with self._condition:
            for job in self._jobs:
                if not job.always:
                    self.fail(job.key, error)
                    self._kept_before.pop(job.key, None)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until every queued job is done, or for so many seconds; return whether they are done."""
        with self._condition, self._timed():
            if self._n_unfinished:
                self._hurry()
            return self._condition.wait_for(lambda: self._n_unfinished == 0, timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Take no more jobs, and wait for the queued ones, or for so many seconds.

        Jobs that are not done in time go on until the process ends.
        """
        with self._condition:
            self._closing = True
            if self._n_unfinished:
                self._hurry()
            self._condition.notify_all()
        with self._timed():
            self._thread.join(timeout_s)

    def _queue(self, jobs: Sequence[_Job], when_full: WhenFull = "wait") -> bool:
        n_bytes = sum(job.n_bytes for job in jobs)
        with self._condition:
            if self._closing:
                raise RuntimeError("the writer is closed")
            if n_bytes and when_full != "take" and not self._has_room(n_bytes):
                if when_full == "drop":
                    return False
                self._hurry()
                with self._timed():
                    self._condition.wait_for(lambda: self._has_room(n_bytes))
            for job in jobs:
                self._jobs.append(replace(job, number=self._n_queued))
                self._n_queued += 1
            self._pending_bytes += n_bytes
            self._n_unfinished += len(jobs)
            if self._look_every_s is None:
                self._condition.notify_all()
        return True

    def _has_room(self, n_bytes: int) -> bool:
        return not self._pending_bytes or self._pending_bytes + n_bytes <= self._max_bytes

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - started

    def _started(self, niceness: int, before: threading.Thread | None = None) -> threading.Thread:
        thread = threading.Thread(
            target=self._work, args=(niceness, before), name="lerobot-attn-writer", daemon=True
        )
        thread.start()
        return thread

    def _hurry(self) -> None:
        """Let a thread that yields to nobody go on: one that yields may not stop that by itself."""
        if self._niceness:
            # In this order a Ctrl-C in between leaves a thread that works.
            self._thread = self._started(0, before=self._thread)
            self._niceness = 0
            self._condition.notify_all()

    def _work(self, niceness: int, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()  # it finishes the job that it has begun
        if niceness and sys.platform == "linux":  # elsewhere threads have no priority of their own
            with suppress(OSError):
                # Threads and processes that it starts (codecs, the video encoder) inherit it.
                thread = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)
        while True:
            with self._condition:
                # With another niceness another thread goes on.
                while not (self._jobs or self._closing or self._niceness != niceness):
                    self._condition.wait(self._look_every_s)
                if not self._jobs or self._niceness != niceness:
                    return
                job = self._jobs.popleft()
            try:
                is_kept = job.number < self._kept_before.get(job.key, 0)
                if job.always or is_kept or job.key not in self._failures:
                    job.run()
            except (
                BaseException
            ) as error:  # the thread must live on for the other episodes; the failure is reported
                _forget_locals(error)
                self._failures.setdefault(job.key, error)
                self._kept_before.pop(job.key, None)
            finally:
                n_bytes = job.n_bytes
                del job  # its arrays go before its bytes are given back
                self._untrimmed_bytes += n_bytes
                if self._untrimmed_bytes >= (_TRIM_BUSY_BYTES if self._jobs else _TRIM_BYTES):
                    self._untrimmed_bytes = 0
                    _trim()
                with self._condition:
                    self._pending_bytes -= n_bytes
                    self._n_unfinished -= 1
                    self._condition.notify_all()


@contextmanager
def quick_turns() -> Iterator[None]:
    """Let the thread of a loop or a policy go on soon when it wants to.

    Python lets a thread go on for 5 ms while others wait. A policy gives its turn away with each of its
    thousands of operations, and may wait that long each time until it gets it back.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _TURN_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _forget_locals(error: BaseException) -> None:
    """Let go of the arrays that the frames of a failure's traceback hold; its lines can still be shown."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__
