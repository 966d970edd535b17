"""One episode of one's own loop: joins what the policy was seen doing with what the loop tells of each frame.

Runs on the loop's thread; inferences may end on another one. Knows no environment and no store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lerobot_attn.capture import AttentionCapture, HostCopies, InferenceRecord
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import CaptureError
from lerobot_attn.masks import SceneMasks
from lerobot_attn.recording.background import BackgroundWriter
from lerobot_attn.recording.episode import Frame, Views
from lerobot_attn.recording.handle import EpisodeHandle, queue_inference, queue_views
from lerobot_attn.recording.observation import as_row, cameras_of, pictured, pictures_of, state_of
from lerobot_attn.recording.plan import DimensionNames

logger = logging.getLogger(__name__)


class Chosen(NamedTuple):
    """What `select_action` returned for an environment: (1, action_dim), on its way to the host."""

    copies: HostCopies
    row: Tensor


def shown_by(capture: AttentionCapture, batch: dict[str, Any]) -> Views | None:
    """Start to copy what the cameras of a batch show. What goes wrong costs the videos alone."""
    copies = HostCopies()
    try:
        images = {name: copies.copy(view) for name, view in capture.adapter.camera_views(batch).items()}
    except Exception as error:
        logger.error("What the cameras show cannot be had, so there is no video of it: %s", error)
        return None
    copies.seal()
    return Views(copies, images) if images else None


class LoopEpisode:
    """One episode of a loop; what `LoopRecording.episode` yields, and `episodes` for each environment.

    Attributes:
        success: whether the episode succeeded; None until somebody knows. What `step` is told counts where
            this is not set.
        task: the instruction as the policy is to be told it: the loop's, or another if a condition says so.
    """

    def __init__(
        self,
        policy: Any,
        capture: AttentionCapture,
        writer: BackgroundWriter,
        config: AttentionConfig,
        handle: EpisodeHandle | None,
        after_step: Callable[[], None],
        task: str,
    ):
        self.success: bool | None = None
        self.task = task
        self._cameras = cameras_of(policy)
        self._capture = capture
        self._writer = writer
        self._config = config
        self._handle = handle
        self._after_step = after_step
        # Inferences whose frame has not been told yet: what the frame brings decides which arrays there are.
        self._records: list[tuple[InferenceRecord, int]] = []  # and the frame that the policy was shown
        self._asked_at = 0
        self._chosen: Chosen | None = None
        self._views: Views | None = None
        self._masks: tuple[SceneMasks, int] | None = None  # and the frame that they are of
        self._state_names: tuple[str, ...] = ()
        self._lock = threading.RLock()  # an inference may end on another thread than the loop's
        self._over = False

    @property
    def is_recorded(self) -> bool:
        """Whether the episode is recorded: not if an earlier recording holds it, or nobody asked for it."""
        return self._handle is not None

    @property
    def wants_inferences(self) -> bool:
        """Whether what the policy attends to next would be stored."""
        return self._handle is not None and not self._over and self._handle.failure is None

    @property
    def n_frames(self) -> int:
        """Frames so far; 0 of an episode that is not recorded."""
        return 0 if self._handle is None else self._handle.n_frames

    def step(
        self,
        observation: Mapping[str, Any] | None,
        action: Any,
        *,
        reward: float | None = None,
        success: bool | None = None,
        policy_action: Any = None,
        from_chunk: bool = True,
        masks: SceneMasks | Callable[[], SceneMasks] | None = None,
    ) -> None:
        """A frame took place: the policy saw the observation, and the action answered it.

        Args:
            observation: the frame's, as robots, environments or data sets give it. State is taken from
                "observation.state", "state", "agent_pos", or else its plain numbers; pictures of cameras only
                where the policy's own batch does not show them, or has them normalised (ACT's).
            action: (action_dim,), or name → number, as the robot or environment got it.
            reward: of the frame; give it at every frame or at none.
            success: whether the task is solved; an array of it is stored if the first frame has it.
            policy_action: (action_dim,) as the policy returned it. Needed only where it did not come from
                `policy.select_action`: the token of the chunk is found by it.
            from_chunk: False where the action is no single token of a chunk: blended, overlapping, or changed
                beyond what a postprocessor does. So is any action that is neither in the newest chunk nor in
                the one before.
            masks: which object each pixel of the observation's pictures shows, or a function that returns it,
                which is called only where the policy ran at this very frame. Stored for the inferences that
                were asked at this frame; the first one must have some if any has.

        Raises:
            CaptureError: the episode is over; a reward or state at some frames only; an action of another
                shape; or, with `on_error="abort"`, what went wrong with the recording.
        """
        if self._over:
            raise CaptureError("the episode is over, expected `step` inside its block")
        if self._handle is None:
            return
        handle = self._handle
        with self._lock:
            frame = self._frame(handle, observation, action, reward, success, policy_action)
            if not handle.n_queued and not self._records:
                handle.fail(
                    CaptureError(
                        f"frame {handle.n_frames} of {handle.plan.name} has an action but no captured "
                        "inference before it; expected the policy to run inside the block: call "
                        "policy.reset() when an episode begins"
                    )
                )
            self._note_masks(handle.n_frames, masks)
            self._queue_records(handle)
            # Of a batch that was normalised nobody knows what the values were, also where they fit a picture.
            views = None if self._cameras.are_normalised else self._views
            views = views or self._views_of(observation) or self._views
            self._views = None
            if views is not None:
                queue_views(self._writer, [handle], views, when_full=self._config.when_full)
            handle.add_frame(frame, has_token=from_chunk)
            handle.next_frame()
        self._after_step()
        handle.tell_failure(goes_on="the loop")

    def _frame(
        self,
        handle: EpisodeHandle,
        observation: Mapping[str, Any] | None,
        action: Any,
        reward: float | None,
        success: bool | None,
        policy_action: Any,
    ) -> Frame:
        state, state_names = state_of(observation)
        row, action_names = as_row("action", action)
        if handle.n_frames == 0:
            handle.has_reward, handle.has_success = reward is not None, success is not None
            handle.state_dim = None if state is None else state.shape[1]
            handle.names = DimensionNames(
                handle.names.state or state_names, handle.names.action or action_names
            )
        if success is not None and not handle.has_success:
            self.success, success = bool(success), None  # only the last frames tell: no array of it
        found = {"reward": reward is not None, "success": success is not None, "state": state is not None}
        expected = {
            "reward": handle.has_reward,
            "success": handle.has_success,
            "state": handle.state_dim is not None,
        }
        for name, has in found.items():
            if has != expected[name]:
                given = "is given" if has else "is not given"
                raise CaptureError(
                    f"{name} {given} at frame {handle.n_frames}, but was otherwise at frame 0; expected it "
                    "at every frame or at none"
                )
        copies, policy_row = self._chosen if self._chosen is not None else (HostCopies(), None)
        self._chosen = None
        if policy_action is not None:
            policy_row = torch.from_numpy(as_row("policy_action", policy_action)[0])
        elif policy_row is None:
            # The loop takes its actions from a chunk of its own: perhaps this is one, as the policy gave it.
            policy_row = torch.from_numpy(row)
        return Frame(
            copies,
            policy_row,
            state,
            row,
            None if reward is None else np.array([reward], np.float32),
            None if success is None else np.array([success], bool),
        )

    def _views_of(self, observation: Mapping[str, Any] | None) -> Views | None:
        if not self._config.cameras or observation is None:
            return None
        names = self._cameras.names
        pictures = pictures_of(observation, names)
        others = pictured(observation) if names and not pictures and self.n_frames == 0 else []
        if others and self._views is None:
            logger.warning(
                "The observation has pictures of %s, expected some of the policy's cameras (%s): there is no "
                "camera video; give `step` the pictures under the policy's names",
                ", ".join(others),
                ", ".join(names),
            )
        return shown_by(self._capture, pictures) if pictures else None

    def on_request(self) -> None:
        """The policy is asked about the frame that runs; what it answers may come some frames later."""
        with self._lock:
            self._asked_at = self.n_frames

    def on_action(self, chosen: Chosen | None, views: Views | None) -> None:
        """The policy has chosen an action, and the cameras showed it something; None where nobody knows."""
        with self._lock:
            self._chosen, self._views = chosen, views

    def on_inference(self, record: InferenceRecord) -> None:
        """The policy ran, for this environment alone; the next frame tells what else there is."""
        with self._lock:
            if self._handle is not None and not self._over:
                self._records.append((record, self._asked_at))

    def say(self, name: str, value: Any) -> None:
        """Let the store say something of itself."""
        if self._handle is not None:
            self._handle.attributes[name] = value

    def fail(self, error: Exception) -> None:
        """What follows in this episode cannot be recorded."""
        if self._handle is not None:
            self._handle.fail(error)

    def _note_masks(self, frame: int, masks: SceneMasks | Callable[[], SceneMasks] | None) -> None:
        """Keep the masks of a frame at which the policy was asked: its answer may come later."""
        if callable(masks):
            ran_now = any(asked_at == frame for _, asked_at in self._records)
            masks = masks() if ran_now else None
        if masks is not None and self._asked_at == frame:
            self._masks = (masks, frame)

    def _queue_records(self, handle: EpisodeHandle) -> None:
        while self._records:
            record, asked_at = self._records.pop(0)
            masks, frame = self._masks or (None, None)
            queue_inference(
                self._writer,
                [handle],
                record,
                asked_at=asked_at,
                scenes={handle.env: masks} if masks is not None and frame == asked_at else None,
                when_full=self._config.when_full,
            )

    def finish(self) -> None:
        """End the episode; leaving its block does so. Of several, for one that ends before the others."""
        with self._lock:
            if self._over:
                return
            self._over = True
            if self._handle is None:
                return
            self._queue_records(self._handle)
            self._handle.ended = "the loop"
            self._handle.finish(success=None if self.success is None else bool(self.success))
        self._handle.tell_failure(goes_on="the loop")
        if not self._handle.n_queued and self._handle.failure is None:
            logger.error("%s: the policy made no inference, nothing was recorded", self._handle.plan.name)

    def interrupt(self, error: BaseException) -> None:
        """The block raised; an episode that had ended is whole."""
        with self._lock:
            if self._over:
                return
            self._over = True
            if self._handle is not None:
                self._queue_records(self._handle)
                self._handle.interrupt(error)
