"""One episode of a robot: its frames, and the inferences that gave their actions, in the order of the store.

Runs on the robot's thread. Knows no robot and no store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from lerobot_attn.capture import HostCopies, InferenceRecord
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import CaptureError
from lerobot_attn.recording.background import BackgroundWriter
from lerobot_attn.recording.episode import NO_TOKEN, Frame, Views
from lerobot_attn.recording.handle import EpisodeHandle, queue_inference, queue_views
from lerobot_attn.recording.observation import as_row

# The optional arrays that its frames and inferences come with.
ARRAYS = frozenset({"frame_time", "observed_before", "inference_start", "inference_end", "inference_delay"})


@dataclass(eq=False)
class Inference:
    """One inference: what it saw and when it ran.

    Attributes:
        record: what was captured of it; None where that failed, or was dropped.
        observed: number of the look at the robot that it was shown.
        started_s: when it began, on `time.perf_counter`'s clock.
        ended_s: when its chunk was there.
        delay: actions at the chunk's beginning that were skipped.
    """

    record: InferenceRecord | None
    observed: int
    started_s: float
    ended_s: float
    delay: int = 0


@dataclass(frozen=True)
class Origin:
    """Where an action came from: a row of an inference's chunk.

    `is_certain` says that the queue of actions was seen handing it out; otherwise the chunk is searched for
    the action itself.
    """

    inference: Inference
    row: int
    is_certain: bool


@dataclass
class Tick:
    """An action that was sent.

    Attributes:
        observed: number of the look at the robot that came before it.
        sent_s: when, on `time.perf_counter`'s clock.
        origin: where it came from; None where a person or nobody known gave it.
        has_token: whether it is that row itself, not something between two rows.
        policy_action: (1, action_dim) as the policy returned it, where the chunk is searched for it.
        ended: inferences that ended since the action before.
    """

    observed: int
    sent_s: float
    origin: Origin | None
    has_token: bool
    policy_action: Tensor | None
    copies: HostCopies
    ended: list[Inference] = field(default_factory=list)


class RobotEpisode:
    """An episode from its first frame on.

    Args:
        handle: the way to the writer; None where the episode is not wanted.
        writer: runs the jobs.
        config: the capture and storage settings.
        cameras: the robot's name of a camera → the policy's.
    """

    def __init__(
        self,
        handle: EpisodeHandle | None,
        writer: BackgroundWriter,
        config: AttentionConfig,
        cameras: Mapping[str, str],
    ):
        self.handle = handle
        self._writer = writer
        self._config = config
        self._cameras = cameras if config.cameras else {}
        self._last: dict[str, np.ndarray] = {}  # what each camera showed at the frame before, as it was given
        # Inference → its number in the store, if it is there. It must not keep the maps of past inferences.
        self._numbers = WeakKeyDictionary[Inference, int | None]()
        self._frames: dict[int, int] = {}  # number of a look at the robot → the first frame that shows it
        self._waiting: list[tuple[Tick, Frame, Views | None]] = []  # frames before the first inference
        self._began_s = 0.0

    def add(self, tick: Tick, shown: Mapping[str, Any]) -> None:
        """Add a frame.

        Args:
            tick: the action that was sent.
            shown: state, action and pictures, see `RobotRecording.add_frame`.
        """
        handle = self.handle
        if handle is None or handle.failure is not None:
            return
        number = handle.n_frames + len(self._waiting)
        if number == 0:
            self._began_s = tick.sent_s
        self._frames.setdefault(tick.observed, number)
        state = shown.get("observation.state")
        values = None if state is None else as_row("state", state).values
        if number == 0 and values is not None:
            handle.state_dim = values.shape[1]
        frame = Frame(
            tick.copies,
            tick.policy_action,
            values,
            as_row("action", shown["action"]).values,
            more={"frame_time": np.array([tick.sent_s - self._began_s])},
        )
        for inference in self._due(tick):
            self._queue(handle, inference)
        self._waiting.append((tick, frame, self._views(shown)))
        if handle.n_queued:  # a store begins with an inference
            self._let_in(handle)
        elif sum(views.n_bytes for _, _, views in self._waiting if views) > self._config.queue_mb * 1_000_000:
            handle.fail(
                CaptureError(f"{number} frames went by without an inference, expected one before them")
            )

    def _let_in(self, handle: EpisodeHandle) -> None:
        """Hand over the frames that waited for the first inference, and the newest one."""
        for tick, frame, views in self._waiting:
            if views is not None:
                queue_views(self._writer, [handle], views, when_full=self._config.when_full)
            origin = tick.origin
            number = None if origin is None else self._numbers.get(origin.inference)
            if origin is None or number is None or origin.row == NO_TOKEN or not tick.has_token:
                handle.add_frame(frame, has_token=False)
            else:
                record = origin.inference.record
                assert record is not None  # it has a number
                # Of a policy that decodes tokens a chunk may have more actions than there are tokens.
                query = record.layout.first_action_query + origin.row
                handle.add_frame_of(frame, number, query, is_certain=origin.is_certain)
            handle.next_frame()
        self._waiting.clear()

    def say(self, name: str, value: Any) -> None:
        """Let the store say something of itself."""
        if self.handle is not None:
            self.handle.attributes[name] = value

    def fail(self, error: Exception) -> None:
        """What follows in this episode cannot be recorded."""
        if self.handle is not None:
            self.handle.fail(error)

    def tell_failure(self) -> None:
        """Say once that the episode failed.

        Raises:
            CaptureError: with `on_error="abort"`.
        """
        if self.handle is not None:
            self.handle.tell_failure(goes_on="the robot")

    def finish(self, ended: str) -> None:
        """The episode is over."""
        if self.handle is not None:
            self.handle.ended = ended
            self.handle.finish()

    def discard(self, reason: str) -> None:
        """Nobody wants it."""
        if self.handle is not None:
            self.handle.discard(reason)

    def interrupt(self, error: BaseException) -> None:
        """The rollout raised."""
        if self.handle is not None:
            self.handle.interrupt(error)

    def _due(self, tick: Tick) -> Iterator[Inference]:
        """Yield the inferences that the store needs before this frame, in the order in which they ended.

        The first frame's action may come from an inference that ended before the episode began.
        """
        origin = tick.origin
        before = origin is not None and origin.inference not in tick.ended
        yield from [origin.inference] if origin is not None and before else []
        yield from tick.ended

    def _queue(self, handle: EpisodeHandle, inference: Inference) -> None:
        record = inference.record
        if record is None or inference in self._numbers:
            return
        first = next(iter(self._frames))
        # An observation without an action is no frame: the next frame stands for it.
        asked_at = 0
        for seen, number in reversed(self._frames.items()):  # it was shown one of the newest
            if seen < inference.observed:
                break
            asked_at = number
        taken = queue_inference(
            self._writer,
            [handle],
            record,
            asked_at=asked_at,
            more={
                "observed_before": np.int32(max(0, first - inference.observed)),
                "inference_start": inference.started_s - self._began_s,
                "inference_end": inference.ended_s - self._began_s,
                "inference_delay": np.int32(inference.delay),
            },
            when_full=self._config.when_full,
        )
        self._numbers[inference] = handle.n_queued - 1 if taken else None

    def _views(self, shown: Mapping[str, Any]) -> Views | None:
        images = {}
        for camera, name in self._cameras.items():
            picture = shown.get(camera)
            if picture is not None:
                images[name] = torch.from_numpy(self._kept(camera, _as_uint8(picture))[None])
        return Views(HostCopies(), images) if images else None

    def _kept(self, camera: str, picture: np.ndarray) -> np.ndarray:
        """Return a picture that stays what it is: a copy where the robot fills one array again and again.

        Elsewhere it is not copied. A copy lets other threads run, which may keep the loop's waiting for
        milliseconds.
        """
        last = self._last.get(camera)
        self._last[camera] = picture
        is_its_own = last is not None and not np.may_share_memory(last, picture)
        return picture if is_its_own and picture.flags.writeable else picture.copy()


def _as_uint8(picture: Any) -> np.ndarray:
    array = picture.numpy() if isinstance(picture, Tensor) else np.asarray(picture)
    if array.dtype == np.uint8:
        return array
    return (np.clip(array, 0, 1) * 255).round().astype(np.uint8)
