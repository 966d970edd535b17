"""Episodes of a robot that a policy moves: which inference, and which row of its chunk, gave each action.

A `RobotRecording` is told what happens (an observation, an inference, an action that was sent, a frame that a
dataset took, the end of an episode) and hands each episode to the writer's thread. Inferences may run on a
thread of their own and end after the frames that they answer to. Knows neither robots nor LeRobot's scripts.

The loop's thread never waits for the disk, unless `when_behind="wait"` says so: what the writer cannot take
in time is dropped, and the store says what.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lerobot_attn.capture import HostCopies, InferenceRecord, capture_attention
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import CaptureError, first_line
from lerobot_attn.prompt import Tokenizer
from lerobot_attn.recording.background import quick_turns
from lerobot_attn.recording.beside import viewers_beside
from lerobot_attn.recording.episode import NO_TOKEN
from lerobot_attn.recording.folder import Remedies, RunFolder, task_folder
from lerobot_attn.recording.handle import EpisodeHandle
from lerobot_attn.recording.plan import DimensionNames
from lerobot_attn.recording.provenance import check_encoder
from lerobot_attn.recording.robot_episode import ARRAYS, Inference, Origin, RobotEpisode, Tick
from lerobot_attn.recording.series import EpisodeSeries
from lerobot_attn.recording.uploading import uploading

logger = logging.getLogger(__name__)

GROUP = "rollout"
_REMEDIES = Remedies("choose another --attention.dir", "--attention.existing=")
_RECENT = 8  # observations that an inference which has just begun may have been shown
_NICENESS = 10  # of the writer: the policy and the loop go first
_LOOK_EVERY_S = 0.005  # the writer looks for jobs: the loop does not wake it
_PATIENCE_S = 60.0  # how long stores may take once the robot has been let go


@contextmanager
def record_robot(
    policy: Any,
    folder: Path,
    config: AttentionConfig,
    *,
    fps: float,
    tokenizer: Tokenizer | None,
    names: DimensionNames,
    cameras: Mapping[str, str],
    task: str,
    attributes: Mapping[str, Any],
    rerun_url: str | None = None,
) -> Iterator[RobotRecording]:
    """Record the episodes of a robot; `plugin.rollout` tells what happens.

    Args:
        policy: the policy that moves it.
        folder: where the stores go, `{folder}/rollout_0/episode_{index:05d}.zarr`.
        config: what to capture and how to store it.
        fps: frames per second of the videos.
        tokenizer: the policy's.
        names: names of the state's and the action's dimensions.
        cameras: the robot's name of a camera (`observation.images.front`) → the policy's.
        task: the instruction.
        attributes: further plain values that each store says of itself.
        rerun_url: where the viewer of the rollout's Rerun session listens; by default on this machine.

    Raises:
        UnsupportedPolicyError: no adapter knows the policy.
        ConfigError: a layer, head or denoise step does not exist.
        StoreError: the folder cannot be used, or there is no video encoder.
    """
    config = config.for_robots().without_simulator("on a robot")
    run_folder = RunFolder(folder, config.existing, _REMEDIES)
    check_encoder(policy, config)
    with (
        quick_turns(),
        run_folder.claim(),
        uploading(run_folder.path, config) as uploads,
        viewers_beside(run_folder.path, config, rerun_url),
    ):
        recording = RobotRecording(policy, run_folder, config, fps, names, cameras, task)
        recording.uploads = uploads
        with capture_attention(
            policy,
            config,
            tokenizer=tokenizer,
            on_record=recording.on_record,
            on_failure=recording.on_failure,
        ) as capture:
            recording._begin(capture, attributes)
            try:
                yield recording
            except BaseException as error:
                recording.interrupt(error)
                raise
            finally:
                recording.write_out()


class RobotRecording(EpisodeSeries):
    """Follows a robot; what `record_robot` yields.

    An episode begins with its first frame (`add_frame`) and ends with `finish_episode` or `discard_episode`.
    What is told here costs the control loop no waiting and raises nothing, but with `on_error="abort"`.
    """

    def __init__(
        self,
        policy: Any,
        run_folder: RunFolder,
        config: AttentionConfig,
        fps: float,
        names: DimensionNames,
        cameras: Mapping[str, str],
        task: str,
    ):
        super().__init__(
            policy, run_folder, config, fps, names, niceness=_NICENESS, look_every_s=_LOOK_EVERY_S
        )
        self._cameras = dict(cameras)
        self._task = task
        self._lock = threading.RLock()  # inferences may run on a thread of their own
        self._n_looks = 0
        self._shown: deque[tuple[Any, int]] = deque(maxlen=_RECENT)  # what the policy may see, and its look
        self._seen: tuple[int, float] = (0, 0.0)  # what the inference that runs was shown, and since when
        self._record: InferenceRecord | None = None
        self._newest: Inference | None = None
        self._ended: list[Inference] = []
        self._chosen: tuple[HostCopies, Tensor] | None = None
        self._origin: Origin | None = None
        self._tick: Tick | None = None
        self._ring: deque[Tick] = deque()
        self._drained: deque[Tick] = deque()
        self._episode: RobotEpisode | None = None
        self._policy_errors: list[str] = []

    # What the robot and the policy do

    def on_look(self) -> None:
        """The loop asks the robot for an observation: what was sent before and no frame took is over."""
        with self._lock:
            self._n_looks += 1
            self._tick = None

    def on_observation(self, observation: Any) -> None:
        """The policy may be shown this observation, the newest, from now on."""
        with self._lock:
            self._shown.append((observation, self._n_looks))

    def on_shown(self, observation: Any = None) -> None:
        """An inference begins.

        Args:
            observation: the very object that `on_observation` was told of; None: the newest.
        """
        with self._lock:
            looks = [look for one, look in reversed(self._shown) if observation is None or one is observation]
            self._seen = (looks[0] if looks else self._n_looks, time.perf_counter())
            self._record = None

    def on_record(self, record: InferenceRecord) -> None:
        """The policy ran, and this was captured of it."""
        with self._lock:
            self._record = record
            self._tell_size(record.maps_bytes)

    def on_failure(self, error: Exception) -> None:
        """The policy ran, and nothing could be captured of it."""
        with self._lock:
            if self._episode is None:
                logger.error("An inference outside of every episode could not be captured: %s", error)
            else:
                self._episode.fail(error)

    def on_policy_error(self, error: BaseException) -> None:
        """The policy raised. Under RTC LeRobot asks it again, some times."""
        with self._lock:
            self._policy_errors.append(first_line(error))
            if self._episode is not None:
                self._episode.say("policy_errors", list(self._policy_errors))

    def tell_task(self, task: str) -> None:
        """The policy is told this instruction in the episodes to come."""
        with self._lock:
            self._task = task

    def say(self, name: str, value: Any) -> None:
        """Let the stores of the episode that runs and of those to come say something."""
        with self._lock:
            self._attributes = {**self._attributes, name: value}
            if self._episode is not None:
                self._episode.say(name, value)

    def on_chunk(self, delay: int = 0) -> Inference:
        """The chunk of the inference that ran is there; its first `delay` actions are skipped."""
        with self._lock:
            observed, started_s = self._seen
            inference = Inference(self._record, observed, started_s, time.perf_counter(), delay)
            self._record = None
            self._newest = inference
            self._ended.append(inference)
            return inference

    def on_selected(self, action: Tensor) -> None:
        """`select_action` returned (1, action_dim): a chunk's first row if the policy ran, or the next."""
        with self._lock:
            if self._record is not None:
                self._origin = Origin(self.on_chunk(), 0, is_certain=False)
            elif self._origin is not None:
                self._origin = Origin(self._origin.inference, self._origin.row + 1, is_certain=False)
            copies = HostCopies()
            self._chosen = (copies, copies.copy(action.detach().float()))
            copies.seal()

    def on_popped(self, origin: Origin) -> None:
        """The queue of actions handed out a row."""
        with self._lock:
            self._origin, self._chosen = origin, None

    def on_reset(self) -> None:
        """Policy and queue were reset: what was inferred before moves the robot no more."""
        with self._lock:
            self._ended.clear()
            self._newest = self._origin = self._chosen = None

    def on_sent(self, *, has_token: bool) -> None:
        """An action was sent to the robot.

        Args:
            has_token: whether it is the row that was handed out last, not something between two rows.
        """
        with self._lock:
            copies, action = self._chosen or (HostCopies(), None)
            ended, self._ended = self._ended, []
            self._tick = Tick(
                self._n_looks, time.perf_counter(), self._origin, has_token, action, copies, ended
            )

    # What a buffer of frames does (the strategy "highlight")

    def on_buffered(self, n_buffered: int) -> None:
        """The frame of the newest action went to a buffer, which now holds so many of the newest ones."""
        with self._lock:
            if self._tick is not None:
                self._ring.append(self._tick)
                self._tick = None
            while len(self._ring) > n_buffered:
                self._ring.popleft()
            self._forget_oldest()

    def on_drained(self) -> None:
        """The buffered frames will be added to the episode, oldest first."""
        with self._lock:
            self._drained, self._ring = self._ring, deque()

    def _forget_oldest(self) -> None:
        """Keep the maps of buffered frames within the memory that the queue may have."""
        held: dict[int, Inference] = {}
        for tick in self._ring:
            for inference in (*tick.ended, *([] if tick.origin is None else [tick.origin.inference])):
                if inference.record is not None:
                    held[id(inference)] = inference
        n_bytes = sum(inference.record.n_bytes for inference in held.values() if inference.record)
        for inference in [*held.values()][:-1]:  # never the newest
            if n_bytes <= self._config.queue_mb * 1_000_000:
                return
            if inference.record is not None:
                n_bytes -= inference.record.n_bytes
                inference.record = None

    # Episodes

    def add_frame(self, index: int, frame: Mapping[str, Any]) -> None:
        """A frame belongs to the episode that runs, or begins one.

        Args:
            index: the number of the episode.
            frame: the robot's state, action and pictures: "observation.state" (state_dim,), "action"
                (action_dim,), and "observation.images.*" (height, width, 3) uint8.

        Raises:
            CaptureError: with `on_error="abort"`, what went wrong with the recording.
        """
        with self._lock:
            try:
                tick = self._drained.popleft() if self._drained else self._tick
                if tick is self._tick:
                    self._tick = None
                if self._episode is None:
                    self._episode = self._open(index)
                self._episode.add(tick or self._nobodys_tick(), frame)
            except Exception as error:
                if self._episode is None:
                    logger.error("An episode cannot be recorded: %s", error)
                    return
                self._episode.fail(error)
            self._episode.tell_failure()

    def finish_episode(self, ended: str) -> None:
        """The episode is over.

        Args:
            ended: what ended it.
        """
        with self._lock:
            episode, self._episode = self._episode, None
            if episode is not None:
                episode.finish(ended)

    def discard_episode(self, reason: str) -> None:
        """Nobody wants the episode: it is filmed again under the same number."""
        with self._lock:
            episode, self._episode = self._episode, None
            if episode is not None:
                self._handles = [handle for handle in self._handles if handle is not episode.handle]
                episode.discard(reason)

    def interrupt(self, error: BaseException) -> None:
        """The rollout raised: close what there is."""
        with self._lock:
            episode, self._episode = self._episode, None
            if episode is not None:
                episode.interrupt(error)

    def write_out(self) -> None:
        """Wait until all is written, at most a minute; what is not by then is dropped.

        The robot has been let go before. A further Ctrl-C (or what LeRobot makes of it, `SystemExit`) drops
        the rest at once.
        """
        self.finish_episode("the rollout's end")
        began = time.perf_counter()
        try:
            while not self._writer.flush(2.0):
                left = _PATIENCE_S - (time.perf_counter() - began)
                n_left = sum(handle.n_unwritten for handle in self._handles if handle.failure is None)
                if left <= 0:
                    self._drop(f"the disk was too slow: not written within {_PATIENCE_S:g} s")
                    break
                logger.warning(
                    "Writing %d inferences that are queued, for at most %.0f s; Ctrl-C drops them",
                    n_left,
                    left,
                )
        except (KeyboardInterrupt, SystemExit):
            self._drop("what was queued was dropped by Ctrl-C")
        self._end()

    def _drop(self, reason: str) -> None:
        self._writer.drop(CaptureError(reason))
        self._writer.close(1.0)
        logger.warning("Not everything was written: %s", reason)

    @property
    def failures(self) -> list[str]:
        """What went wrong with each episode that could not be saved whole."""
        return [
            f"episode {result.index}: {result.reason}"
            for result in self.results
            if result.failed and not result.interrupted
        ]

    def _open(self, index: int) -> RobotEpisode:
        plan = self._plan(task_folder(GROUP, 0), GROUP, 0, index, None)
        handle = None
        if plan is not None:
            handle = EpisodeHandle(plan, 0, self._config, self._writer, self._names, strict=False)
            handle.task, handle.has_reward, handle.has_success = self._task, False, False
            handle.more = ARRAYS
            self._handles.append(handle)
        self._policy_errors.clear()
        return RobotEpisode(handle, self._writer, self._config, self._cameras)

    def _nobodys_tick(self) -> Tick:
        """An action that no policy gave: a person's."""
        ended, self._ended = self._ended, []
        origin = None if self._newest is None else Origin(self._newest, NO_TOKEN, is_certain=True)
        return Tick(self._n_looks, time.perf_counter(), origin, False, None, HostCopies(), ended)
