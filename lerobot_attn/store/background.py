"""A single thread that writes, behind a queue bounded in bytes.

Knows nothing of what it runs: jobs are callables that belong to a key (an episode). When a job of a key
fails, the key's later jobs are dropped and the failure is kept for whoever asks.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Job:
    key: Hashable
    run: Callable[[], None]
    n_bytes: int
    always: bool


class BackgroundWriter:
    """Runs jobs in order on one thread; a full queue makes `submit` wait: nothing is dropped or grows.

    Args:
        max_bytes: memory that queued jobs may hold together. A single larger job is let through alone.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._jobs: deque[_Job] = deque()
        self._pending_bytes = 0
        self._n_unfinished = 0
        self._closing = False
        self._condition = threading.Condition()
        self._failures: dict[Hashable, BaseException] = {}
        self.waited_s = 0.0
        self._thread = threading.Thread(target=self._work, name="lerobot-attn-writer", daemon=True)
        self._thread.start()

    def submit(
        self, key: Hashable, run: Callable[[], None], n_bytes: int = 0, *, always: bool = False
    ) -> None:
        """Queue a job; wait while it does not fit.

        Args:
            key: whose job it is.
            run: what to do.
            n_bytes: memory that the job holds until it is done.
            always: run it even after a job of the same key has failed (to clean up).
        """
        with self._condition:
            if self._closing:
                raise RuntimeError("the writer is closed")
            if self._pending_bytes and self._pending_bytes + n_bytes > self._max_bytes:
                started = time.perf_counter()
                try:
                    self._condition.wait_for(
                        lambda: not self._pending_bytes or self._pending_bytes + n_bytes <= self._max_bytes
                    )
                finally:
                    self.waited_s += time.perf_counter() - started
            self._jobs.append(_Job(key, run, n_bytes, always))
            self._pending_bytes += n_bytes
            self._n_unfinished += 1
            self._condition.notify_all()

    def failure(self, key: Hashable) -> BaseException | None:
        """Return what went wrong first with a key's jobs, if anything."""
        return self._failures.get(key)

    def fail(self, key: Hashable, error: BaseException) -> None:
        """Mark a key as failed from outside; its queued jobs are dropped."""
        self._failures.setdefault(key, error)

    def flush(self) -> None:
        """Wait until every queued job is done."""
        with self._condition:
            self._condition.wait_for(lambda: self._n_unfinished == 0)

    def close(self) -> None:
        """Finish every queued job and stop the thread."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            try:
                if job.always or job.key not in self._failures:
                    job.run()
            except (
                BaseException
            ) as error:  # the thread must live on for the other episodes; the failure is reported
                self._failures.setdefault(job.key, error)
            finally:
                n_bytes = job.n_bytes
                del job  # its arrays go before its bytes are given back
                with self._condition:
                    self._pending_bytes -= n_bytes
                    self._n_unfinished -= 1
                    self._condition.notify_all()
