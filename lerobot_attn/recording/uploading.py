"""Episodes sent to a bucket while a recording goes on: by a thread of low priority that nobody waits for.

    with uploading(folder, config) as uploads:
        …
        uploads.add(store)         # on any thread, once the episode is complete

What fails is tried again, later and later. Whatever is not sent stays on the disk, is said, and can be sent
by `lerobot-attn upload`. Knows folders and buckets. Knows nothing of how episodes are recorded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import first_line
from lerobot_attn.sizes import format_bytes
from lerobot_attn.store.bucket import Bucket, UnreachedError, writable
from lerobot_attn.store.evaluation import EVAL_INFO, films_to_send, send_film, send_info
from lerobot_attn.store.location import present_form
from lerobot_attn.store.receipts import Receipt, receipt_of
from lerobot_attn.store.sending import remove_rest, remove_sent, send_episode

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0  # for what is left at the end of a recording
HURRIED_S = 10.0  # after Ctrl-C, a signal or an error
_GRACE_S = 2.0  # for the thread to end once it was told to
_LOOK_S = 0.2
_SAY_S = 10.0
_NICENESS = 10
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 300.0
_TRIES_AT_THE_END = 3  # without an answer; where it did not answer before, one


@contextmanager
def uploading(
    folder: Path,
    config: AttentionConfig,
    is_hurried: Callable[[], bool] = lambda: False,
    what: str = "episode",
) -> Iterator[Uploads | None]:
    """Send episodes while the block runs; at its end what is left is waited for, for a bounded time.

    Args:
        folder: of the stores.
        config: its `upload` says where to, None: nothing is sent; `keep_local` and `existing` how.
        is_hurried: whether the process shall end soon.
        what: is sent, in messages.

    Raises:
        StoreError: the address is none, or the environment does not say what it needs.
        SetupError: the extra `remote` is not installed.
    """
    if config.upload is None:
        yield None
        return
    overwrite = config.existing == "overwrite"
    uploads = Uploads(folder, config.upload, keep_local=config.keep_local, overwrite=overwrite, what=what)
    try:
        yield uploads
    except BaseException:
        uploads.close(HURRIED_S)
        raise
    uploads.close(PATIENCE_S, is_hurried)


def upload_evaluation(folder: Path, config: AttentionConfig, output: Path) -> None:
    """Send what an evaluation that is over leaves beside its episodes, in a bounded time; copies stay here.

    Args:
        folder: of the stores.
        config: as of `uploading`.
        output: the evaluation's output folder, where its eval_info.json is.
    """
    with uploading(folder, config, what="file of the evaluation") as uploads:
        if uploads is not None:
            uploads.add_evaluation(output)


def check_upload(config: AttentionConfig) -> None:
    """Check what can be checked of where episodes go, before anything runs; nobody is asked.

    Raises:
        StoreError: as of `uploading`.
        SetupError: likewise.
    """
    if config.upload is not None:
        Bucket(writable(config.upload))


@dataclass
class _Job:
    """Something to send.

    Attributes:
        path: of an episode or a file.
        send: sends it; returns how many bytes of it had to be sent, None where it was there.
    """

    path: Path
    send: Callable[[], Awaitable[int | None]]


class Uploads:
    """Sends episodes, one after another, on a thread of its own.

    Args:
        folder: of the stores; their names in the bucket are those in it.
        url: the bucket's folder.
        keep_local: otherwise what was sent is removed here.
        overwrite: replace other recordings of the same names.
        what: is sent, in messages.

    Raises:
        StoreError: as of `uploading`.
        SetupError: likewise.
    """

    def __init__(self, folder: Path, url: str, *, keep_local: bool, overwrite: bool, what: str = "episode"):
        self._folder, self._keep_local, self._overwrite = folder, keep_local, overwrite
        self._what = what
        self._bucket = Bucket(writable(url))
        self._lock = threading.Lock()
        self._waiting: deque[_Job] = deque()
        self._refused: dict[Path, str] = {}
        self._n_sent = self._n_there = self._n_bytes = 0
        self._trouble: str | None = None  # why the last try failed; None: it did not
        self._n_failed = 0  # tries in a row
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None
        self._serving: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._work, name="lerobot-attn-upload", daemon=True)
        self._thread.start()

    def add(self, store: Path) -> None:
        """Send a complete episode, soon; one that was sent and removed before is let be."""
        receipt = receipt_of(store)
        if receipt is not None and receipt.removed and present_form(store) is None:
            with suppress(OSError):
                remove_rest(store, receipt)  # of a process that was killed
            return
        self._add(_Job(store, partial(self._send_episode, store)))

    def add_evaluation(self, output: Path) -> None:
        """Send the evaluation's own videos of the episodes that are in the bucket, and its eval_info.json.

        Args:
            output: the evaluation's output folder.
        """
        for store, receipt in films_to_send(self._folder, self._bucket):
            self._add(_Job(store, partial(self._send_film, store, receipt)))
        if (output / EVAL_INFO).is_file():
            self._add(_Job(output / EVAL_INFO, partial(self._send_info, output / EVAL_INFO)))

    def _add(self, job: _Job) -> None:
        with self._lock:
            self._waiting.append(job)
        self._wake()

    @property
    def n_left(self) -> int:
        """How many could not be sent so far, because the bucket does not answer or there was no time."""
        return len(self._waiting)

    def close(self, patience_s: float, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """Wait until everything is sent, at most for some time, and say what was not.

        A Ctrl-C ends the waiting, not the recording's end.

        Args:
            patience_s: how long.
            is_hurried: whether the process shall end soon; then `HURRIED_S` at most.
        """
        self._closing = True
        self._wake()
        until, said = time.monotonic() + patience_s, time.monotonic() + _LOOK_S
        hurried = False
        try:
            while self._thread.is_alive() and time.monotonic() < until:
                if not hurried and is_hurried():
                    hurried, until = True, min(until, time.monotonic() + HURRIED_S)
                if time.monotonic() >= said:
                    left = max(0, until - time.monotonic())
                    logger.info(
                        "Uploading %s, for at most %.0f s; Ctrl-C leaves them here",
                        self._n(self.n_left),
                        left,
                    )
                    said += _SAY_S
                self._thread.join(_LOOK_S)
        except KeyboardInterrupt:
            pass
        if self._thread.is_alive():
            loop, serving = self._loop, self._serving
            if loop is not None and serving is not None:
                with suppress(RuntimeError):  # it ended just now
                    loop.call_soon_threadsafe(serving.cancel)
            with suppress(KeyboardInterrupt):
                self._thread.join(_GRACE_S)
        self._report()

    def _n(self, n: int) -> str:
        noun, _, rest = self._what.partition(" ")
        return f"{n} {noun}{'s' * (n != 1)} {rest}".rstrip()

    def _report(self) -> None:
        url, n_left = self._bucket.url, len(self._waiting) + len(self._refused)
        if self._n_sent:
            logger.info("Uploaded %s to %s, %s", self._n(self._n_sent), url, format_bytes(self._n_bytes))
        if not n_left:
            return
        reasons = [*self._refused.values()]
        if self._waiting:
            reasons.insert(0, self._trouble or "there was no time")
        logger.warning(
            "%d of %s were not uploaded to %s and stay in %s: %s; to send them: %s",
            n_left,
            self._n(n_left + self._n_sent + self._n_there),
            url,
            self._folder,
            "; ".join(dict.fromkeys(reasons)),
            shlex.join(["lerobot-attn", "upload", str(self._folder), str(url)]),
        )

    # On the thread

    def _wake(self) -> None:
        loop, news = self._loop, self._news
        if loop is not None and news is not None:
            with suppress(RuntimeError):  # the thread has ended
                loop.call_soon_threadsafe(news.set)

    def _work(self) -> None:
        if sys.platform == "linux":  # elsewhere threads have no priority of their own
            with suppress(OSError):
                # obstore's threads, which this one starts, inherit it.
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        with suppress(asyncio.CancelledError):
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._news, self._serving = asyncio.Event(), asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        try:
            await self._bucket.check()
        except UnreachedError as error:
            self._told(error)
        while True:
            self._news.clear()
            with self._lock:
                job = self._waiting[0] if self._waiting else None
            if job is None:
                if self._closing:
                    return
                await self._news.wait()
            elif await self._tried(job):
                with self._lock:
                    self._waiting.popleft()
            elif self._closing and self._n_failed >= _TRIES_AT_THE_END:
                return
            else:
                await self._pause()

    async def _pause(self) -> None:
        """Wait before the next try, longer each time; the end of the recording ends it."""
        assert self._news is not None
        until = time.monotonic() + min(_FIRST_WAIT_S * 2 ** (self._n_failed - 1), _LONGEST_WAIT_S)
        while (left := until - time.monotonic()) > 0:
            was_closing = self._closing
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)
            self._news.clear()
            if self._closing and not was_closing:
                return

    async def _tried(self, job: _Job) -> bool:
        """Send something; return whether there is nothing more to do about it."""
        try:
            n_bytes = await job.send()
            if self._trouble is not None:
                logger.info("Uploading to %s goes on", self._bucket.url)
            self._trouble, self._n_failed = None, 0
            sent = n_bytes is not None
            self._n_sent, self._n_there = self._n_sent + sent, self._n_there + (not sent)
            self._n_bytes += n_bytes or 0
        except UnreachedError as error:
            self._told(error)
            return False
        except Exception as error:  # nothing that goes wrong with one episode keeps the others here
            self._refused[job.path] = first_line(error)
            logger.warning(
                "%s/%s is not uploaded: %s", job.path.parent.name, job.path.name, self._refused[job.path]
            )
        return True

    async def _send_episode(self, store: Path) -> int | None:
        form = present_form(store) or store
        receipt, sent = await send_episode(form, self._bucket, self._inside(store), overwrite=self._overwrite)
        if not self._keep_local:
            remove_sent(form, receipt)
        return receipt.n_bytes if sent else None

    async def _send_film(self, store: Path, receipt: Receipt) -> int | None:
        _, n_bytes = await send_film(store, receipt, self._bucket, self._inside(store))
        return n_bytes or None

    async def _send_info(self, info: Path) -> int | None:
        receipt, sent = await send_info(info, self._bucket, "", overwrite=self._overwrite)
        return receipt.n_bytes if sent else None

    def _inside(self, store: Path) -> str:
        folder = store.parent.relative_to(self._folder).as_posix()
        return "" if folder == "." else folder

    def _told(self, error: UnreachedError) -> None:
        """Note that the bucket does not answer, and say so the first time."""
        if self._trouble is None:
            logger.warning(
                "Nothing can be uploaded now: %s. The recording goes on, and everything stays in %s",
                error,
                self._folder,
            )
        self._trouble = str(error)
        self._n_failed += 1
