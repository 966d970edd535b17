"""An episode as the loop's thread sees it: the one way to the job that runs on the writer's thread.

An `EpisodeHandle` owns what is known of the episode's failure; it hands jobs over and never touches a store.
Knows no loop and no policy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from lerobot_attn.capture import InferenceRecord
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import CaptureError
from lerobot_attn.masks import SceneMasks
from lerobot_attn.recording.background import BackgroundWriter, WhenFull
from lerobot_attn.recording.episode import NO_TOKEN, EpisodeJob, Frame, FrameEntry, Views
from lerobot_attn.recording.plan import DimensionNames, Ending, EpisodePlan, EpisodeResult, Known

logger = logging.getLogger(__name__)

_PROGRESS_S = 2.0  # how often is said what is still to be written
_SHOW_EVERY_S = 0.25  # how often who watches sees another frame
_GRACE_S = 1.0  # what a second Ctrl-C leaves for the write in progress, and for closing the stores


class EpisodeHandle:
    """One environment's episode, on the loop's thread.

    Args:
        plan: what is known of the episode.
        env: its environment's number in the batch.
        config: the capture and storage settings.
        writer: runs the jobs, under the store's path as their key.
        names: names of the state's and the action's dimensions.
        strict: see `EpisodeJob`.

    Attributes:
        task: the instruction, as far as it is known.
        n_frames: frames that have taken place.
        n_queued: inferences that were handed over.
        ended: what ended the episode; None while it runs.
        more: names of optional arrays that its frames and inferences come with.
        attributes: what its store says of itself once it is closed.
    """

    def __init__(
        self,
        plan: EpisodePlan,
        env: int,
        config: AttentionConfig,
        writer: BackgroundWriter,
        names: DimensionNames,
        *,
        strict: bool = True,
    ):
        self.plan = plan
        self.env = env
        self.task = ""
        self.state_dim: int | None = None
        self.names = names
        self.has_reward = self.has_success = True
        self.has_pictures = False
        self.n_frames = 0
        self.n_queued = 0
        self.ended: str | None = None
        self.more: frozenset[str] = frozenset()
        self.attributes: dict[str, Any] = {}
        self._config = config
        self._writer = writer
        # After a failure nothing that is queued is sure to be written.
        self._job = EpisodeJob(
            plan, env, config, strict=strict, n_queued=lambda: 0 if self.failure else self._n_jobs
        )
        self._n_jobs = 0  # handed over to be written, of those that commit
        self._entries: list[FrameEntry] = []  # frames that are not queued yet
        self._query = 0
        self._told = False
        self._show_at = 0.0  # when who watches gets frames again, on the monotonic clock; 0: at once

    @property
    def failure(self) -> BaseException | None:
        """What went wrong first, on either thread."""
        return self._writer.failure(self.key)

    @property
    def key(self) -> Hashable:
        """The key of its jobs. An episode that was discarded and filmed again has the path of the first."""
        return self._job

    @property
    def result(self) -> EpisodeResult | None:
        """What became of the episode; None until its store is closed."""
        return self._job.result

    @property
    def n_unwritten(self) -> int:
        """Inferences that were handed over and that the store does not hold."""
        return self.n_queued - self._job.n_written

    def fail(self, error: BaseException) -> None:
        """What follows in this episode cannot be recorded; what is queued of it is still written."""
        self._writer.fail(self.key, error, keep_queued=True)

    def tell_failure(self, *, goes_on: str) -> None:
        """Say once that the episode failed.

        Args:
            goes_on: what goes on without it, e.g. "the evaluation".

        Raises:
            CaptureError: with `on_error="abort"`.
        """
        error = self.failure
        if error is None or self._told:
            return
        self._told = True
        message = f"attention of {self.plan.name} is no longer recorded: {error}"
        if self._config.on_error == "abort":
            raise CaptureError(f"{message}; stopped because of on_error=abort") from error
        logger.error("%s; %s goes on", message, goes_on)

    def add_frame(self, frame: Frame, *, has_token: bool = True) -> None:
        """Note a frame whose action came from the newest inference, or from no single token of it."""
        self._entries.append(FrameEntry(frame, self.n_queued - 1, self._query if has_token else NO_TOKEN))

    def add_frame_of(self, frame: Frame, inference: int, query: int, *, is_certain: bool) -> None:
        """Note a frame whose action is said to be this query of this inference of the episode.

        Args:
            frame: the frame.
            inference: the inference's number in the store.
            query: the action token's index, or `NO_TOKEN`.
            is_certain: whether that is known; otherwise the chunks are searched for the action.
        """
        self._entries.append(FrameEntry(frame, inference, query, is_certain))

    def next_frame(self) -> None:
        """The frame is over."""
        self.n_frames += 1
        self._query += 1
        is_watched = self._config.view or self._config.rerun
        # Somebody watches: an inference is shown as soon as its first frame is in the store, and not only
        # with the next inference. The frames behind it wait for each other a little, for each commit makes
        # the explorer read the store anew.
        if is_watched and self.n_queued and time.monotonic() >= self._show_at:
            self._write_frames()
            self._show_at = time.monotonic() + _SHOW_EVERY_S

    def finish(
        self,
        rewards: np.ndarray | None = None,
        successes: np.ndarray | None = None,
        *,
        success: bool | None = None,
    ) -> None:
        """Queue the end of the episode.

        Args:
            rewards: (step,) as the evaluation counts them, to compare with; None if nobody does.
            successes: (step,) likewise.
            success: whether it succeeded, where the frames do not say it.
        """
        self._close(Ending(self.ended, success=success, attributes=self.attributes), rewards, successes)

    def discard(self, reason: str) -> None:
        """Queue the end of an episode that nobody wants: its store and videos are removed."""
        self._close(Ending(None, discarded_by=reason))

    def interrupt(self, error: BaseException) -> None:
        """Queue the end of an episode whose loop raised; one that had ended is whole."""
        if self.ended is not None:
            self._close(Ending(self.ended, attributes=self.attributes))
            return
        # The frame in flight was shown to the policy, but its outcome is not known.
        self._entries = [entry for entry in self._entries if entry.frame.action is not None]
        cause = f"{type(error).__name__}: {error}".strip().rstrip(":")
        self._close(Ending(None, cause, attributes=self.attributes))

    def outcome(self) -> EpisodeResult:
        """Return what became of the episode; of one that nobody closed, as if the process had been killed."""
        if self.result is not None:
            return self.result
        failure = self.failure
        return EpisodeResult(
            index=self.plan.index,
            path=self.plan.path if self._job.n_written else None,
            reason=f"incomplete: {failure or 'Ctrl-C came before its store was closed'}",
            failed=True,
            n_inferences=self._job.n_written,
        )

    def _known(self) -> Known:
        return Known(self.task, self.state_dim, self.names, self.has_reward, self.has_success, self.more)

    def _append(
        self,
        record: InferenceRecord,
        asked_at: int | None,
        more: Mapping[str, Any] | None,
        scene: SceneMasks | None,
    ) -> Callable[[], None]:
        frame = self.n_frames if asked_at is None else asked_at
        return partial(self._job.append, self._entries, record, frame, self._known(), more, scene)

    def _dropped(self, asked_at: int | None) -> None:
        """Let the store say that the writer could not keep up."""
        if "dropped_inferences" not in self.attributes:
            logger.warning(
                "%s: the writer cannot keep up, inferences are dropped; capture fewer layers, or set "
                "when_behind=wait",
                self.plan.name,
            )
        frames = self.attributes.setdefault("dropped_inferences", [])
        frames.append(self.n_frames if asked_at is None else asked_at)

    def _appended(self, record: InferenceRecord) -> None:
        self.n_queued += 1
        self._n_jobs += 1
        self._query = record.layout.query_of_action(0)
        self._entries = []
        self._show_at = 0.0

    def _write_frames(self) -> None:
        """Queue the frames that are not queued yet."""
        job, entries, n_frames = self._job, self._entries, self.n_frames
        self._entries = []
        self._writer.submit(self.key, lambda: job.append(entries, None, n_frames))
        self._n_jobs += 1

    def _close(
        self, ending: Ending, rewards: np.ndarray | None = None, successes: np.ndarray | None = None
    ) -> None:
        key, job = self.key, self._job
        self._write_frames()
        self._writer.submit(key, lambda: job.check_against(rewards, successes))
        self._writer.submit(key, lambda: job.close(ending, self._writer.failure(key)), always=True)
        self._n_jobs += 1


def queue_inference(
    writer: BackgroundWriter,
    handles: Sequence[EpisodeHandle],
    record: InferenceRecord,
    *,
    asked_at: int | None = None,
    more: Mapping[str, Any] | None = None,
    scenes: Mapping[int, SceneMasks] | None = None,
    when_full: WhenFull = "wait",
) -> bool:
    """Hand an inference to the episodes of its batch.

    Args:
        writer: runs the jobs.
        handles: the episodes.
        record: what was captured.
        asked_at: frame that the policy was shown; None: the one that is running.
        more: this inference's values of the episodes' optional arrays.
        scenes: number of an environment → its masks at this inference.
        when_full: what to do while the queue is full.

    Returns:
        Whether it was taken; otherwise the queue was full, and nothing happened.
    """
    if when_full == "drop" and any(not handle.n_queued for handle in handles):
        when_full = "take"  # an episode's first inference makes its store
    jobs: dict[Hashable, Callable[[], None]] = {
        handle.key: handle._append(record, asked_at, more, (scenes or {}).get(handle.env))
        for handle in handles
    }
    n_bytes = record.n_bytes + sum(
        mask.nbytes for one in (scenes or {}).values() for mask in one.masks.values()
    )
    if not writer.submit_shared(jobs, n_bytes, when_full=when_full):
        for handle in handles:
            handle._dropped(asked_at)
        return False
    # Only now: a Ctrl-C while the queue is full leaves the frames to `interrupt`.
    for handle in handles:
        handle._appended(record)
    return True


def queue_views(
    writer: BackgroundWriter,
    handles: Sequence[EpisodeHandle],
    views: Views,
    *,
    when_full: WhenFull = "wait",
) -> bool:
    """Hand a frame's pictures over on their own: a chunk of frames of many cameras would be too much.

    Returns:
        Whether they were taken; otherwise the queue was full. The videos show the frame before once more
        then, and say so.
    """
    if when_full == "drop" and not all(handle.has_pictures for handle in handles):
        when_full = "take"  # there is nothing yet to show once more
    shows: dict[Hashable, Callable[[], None]] = {
        handle.key: partial(handle._job.show, views) for handle in handles
    }
    for handle in handles:
        handle.has_pictures = True
    if writer.submit_shared(shows, views.n_bytes, when_full=when_full):
        return True
    for handle in handles:
        writer.submit(handle.key, handle._job.show_again)
    return False


def write_out(
    writer: BackgroundWriter,
    handles: Sequence[EpisodeHandle],
    remedy: str,
    *,
    patience_s: float | None = None,
) -> None:
    """Wait until all that is queued is written; say every few seconds how much is left.

    Args:
        writer: whose queue it is.
        handles: the episodes that have something in it.
        remedy: what can be done about it, for the message.
        patience_s: how long to wait before it is said for the first time.
    """
    patience_s = _PROGRESS_S if patience_s is None else patience_s
    while not writer.flush(patience_s):
        patience_s = _PROGRESS_S
        n_inferences = sum(handle.n_unwritten for handle in handles if handle.failure is None)
        logger.warning("Writing %d inferences that are queued; %s", n_inferences, remedy)


def write_out_after(writer: BackgroundWriter, handles: Sequence[EpisodeHandle], error: BaseException) -> None:
    """Write out what a loop that raised has queued, unless a further Ctrl-C says to drop it."""
    try:
        if isinstance(error, KeyboardInterrupt):
            write_out(writer, handles, "Ctrl-C again drops them", patience_s=0)
        else:
            write_out(writer, handles, "Ctrl-C drops them")
    except KeyboardInterrupt:  # not raised: it would hide what ended the loop
        running = [handle for handle in handles if handle.failure is None]
        writer.drop(CaptureError("what was queued was dropped by Ctrl-C"))
        writer.close(_GRACE_S)
        n_inferences = sum(handle.n_unwritten for handle in running)
        logger.warning("Dropped %d inferences that were queued", n_inferences)
