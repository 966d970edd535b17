"""A batched rollout: which inference, and which of its action tokens, gave the action at which frame.

A `RolloutRecorder` is told what happens (an inference ended, an action was selected, the environments
stepped) and hands each environment's episode, cut at its own end, to the writer's thread. It knows neither
LeRobot's scripts nor how attention is observed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lerobot_attn.capture import HostCopies, InferenceRecord
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import CaptureError
from lerobot_attn.masks import SceneMasks
from lerobot_attn.recording.background import BackgroundWriter
from lerobot_attn.recording.episode import EpisodeJob, Frame, Views
from lerobot_attn.recording.handle import EpisodeHandle, queue_inference, queue_views
from lerobot_attn.recording.observation import PolicyCameras, pictures_of
from lerobot_attn.recording.plan import DimensionNames, EpisodePlan, EpisodeResult


class RolloutRecorder:
    """Follows one batched rollout.

    Args:
        plans: one per environment of the batch; None for an episode that is not to be recorded.
        config: the capture settings.
        writer: where jobs go; keys are store paths.
        camera_views: what the cameras show the policy, from the batch that the policy gets.
        cameras: the policy's; what its batch does not show of them is taken from the observation.
        names: names of state and action dimensions.
        scenes: numbers of environments → their masks now, asked for at each inference; None: there are none.
    """

    def __init__(
        self,
        plans: Sequence[EpisodePlan | None],
        *,
        config: AttentionConfig,
        writer: BackgroundWriter,
        camera_views: Callable[[dict[str, Any]], dict[str, Tensor]],
        cameras: PolicyCameras | None = None,
        names: DimensionNames | None = None,
        scenes: Callable[[Collection[int]], Mapping[int, SceneMasks]] | None = None,
    ):
        self._config = config
        self._writer = writer
        self._camera_views = camera_views
        self._cameras = cameras or PolicyCameras()
        self._scenes = scenes
        names = names or DimensionNames()
        self._episodes = [
            EpisodeHandle(plan, env, config, writer, names)
            for env, plan in enumerate(plans)
            if plan is not None
        ]
        self._n_envs = len(plans)
        self._record: InferenceRecord | None = None
        self._state: np.ndarray | None = None
        self._observation: Mapping[str, Any] | None = None
        self._frame: Frame | None = None
        self._views: Views | None = None
        self._has_token = True  # whether the inference that gives the actions is in the store

    def on_observation(
        self,
        state: np.ndarray | None,
        tasks: Sequence[str] | None,
        observation: Mapping[str, Any] | None = None,
    ) -> None:
        """The policy is about to be shown an observation.

        Args:
            state: (batch, state_dim), in the robot's units; None if there is none.
            tasks: instruction of each environment.
            observation: what the policy's preprocessor is given, under the names that the policy has for it.
        """
        self._state, self._observation = state, observation
        for episode in self._active:
            if tasks is not None:
                episode.task = str(tasks[episode.env])
            if state is not None:
                episode.state_dim = state.shape[1]

    def say(self, name: str, values: Sequence[Any]) -> None:
        """Let the stores say something of their episodes: of each environment's its own value."""
        for episode in self._episodes:
            episode.attributes[name] = values[episode.env]

    def on_inference(self, record: InferenceRecord) -> None:
        """The policy ran; its first action is selected next.

        Raises:
            CaptureError: an inference was recorded and no action was taken from it.
        """
        if self._record is not None:
            raise CaptureError(
                "two inferences for one action, expected one; the policy asks its model more than once"
            )
        self._record = record

    def on_action(self, batch: dict[str, Any], action: Tensor) -> None:
        """The policy has chosen the frame's action.

        Args:
            batch: what the policy got.
            action: (batch, action_dim), in the policy's units.
        """
        active = self._active
        copies = HostCopies()
        if self._config.cameras and active:
            images = {name: copies.copy(view) for name, view in self._shown(batch).items()}
            self._views = Views(copies, images)
        self._frame = Frame(copies, copies.copy(action.float()), self._state)
        copies.seal()
        record, self._record = self._record, None
        if record is not None and active:
            self._has_token = queue_inference(
                self._writer, active, record, scenes=self._scenes_now(), when_full=self._config.when_full
            )
        for episode in active:
            episode.add_frame(self._frame, has_token=self._has_token)

    def on_step(self, action: np.ndarray, reward: np.ndarray, success: np.ndarray, ended: np.ndarray) -> None:
        """The environments have taken the action.

        Args:
            action: (batch, action_dim), as the environments got it.
            reward: (batch,).
            success: (batch,) bool.
            ended: (batch,) bool, True where the environment terminated or truncated.
        """
        frame, self._frame = self._frame, None
        if frame is None:
            return
        views, self._views = self._views, None
        if views is not None and views.images and self._active:
            queue_views(self._writer, self._active, views, when_full=self._config.when_full)
        frame.action, frame.reward, frame.success = action, reward, success
        for episode in self._active:
            episode.next_frame()
            if ended[episode.env]:
                episode.ended = "terminated or truncated by the environment"
        self._tell_failures()

    def fail(self, error: Exception) -> None:
        """Attention could not be captured: what follows in these episodes has no inference to belong to.

        Raises:
            CaptureError: with `on_error="abort"`.
        """
        self._record = None
        for episode in self._active:
            episode.fail(error)
        self._tell_failures()

    def finish(self, *, rewards: np.ndarray, successes: np.ndarray) -> list[EpisodeHandle]:
        """The rollout has returned; episodes still running were cut at the step limit.

        Args:
            rewards: (batch, step) as the evaluation counts them.
            successes: (batch, step) likewise.
        """
        for episode in self._episodes:
            episode.ended = episode.ended or "the step limit"
            env, n_frames = episode.env, episode.n_frames
            episode.finish(rewards[env, :n_frames], successes[env, :n_frames])
        return self._episodes

    def interrupt(self, error: BaseException) -> list[EpisodeHandle]:
        """The rollout raised: close what there is; episodes that had ended are whole."""
        for episode in self._episodes:
            episode.interrupt(error)
        return self._episodes

    @property
    def wants_inferences(self) -> bool:
        """Whether some environment's episode still needs what the policy attends to."""
        return any(episode.failure is None for episode in self._active)

    def _scenes_now(self) -> Mapping[int, SceneMasks] | None:
        """Return the masks of environments whose episode goes on: others may have begun another one."""
        if self._scenes is None:
            return None
        try:
            return self._scenes([episode.env for episode in self._active if episode.failure is None])
        except CaptureError as error:
            self.fail(error)
            return None

    def _shown(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return camera → what it showed, (batch, height, width, 3) uint8.

        From the policy's batch, and what that does not show from the observation before it was preprocessed;
        the other way round where the preprocessor normalises images. Of a preprocessor that leaves no picture
        in the batch (GR00T's) the observation's are what it was given.
        """
        present = [name for name in self._cameras.names if name in batch]
        wanted = present or self._cameras.names

        def pictures() -> dict[str, Any]:
            found = pictures_of(self._observation, wanted, self._n_envs)
            # An image that the preprocessor resized is another one.
            return {
                name: image
                for name, image in found.items()
                if name not in batch or image.shape == batch[name].shape
            }

        first, second = (lambda: batch), pictures
        if self._cameras.are_normalised:
            first, second = second, first
        shown = self._camera_views(first())
        return shown if shown.keys() >= set(wanted) else {**self._camera_views(second()), **shown}

    @property
    def _active(self) -> list[EpisodeHandle]:
        return [episode for episode in self._episodes if episode.ended is None]

    def _tell_failures(self) -> None:
        for episode in self._episodes:
            episode.tell_failure(goes_on="the evaluation")


__all__ = [
    "DimensionNames",
    "EpisodeHandle",
    "EpisodeJob",
    "EpisodePlan",
    "EpisodeResult",
    "RolloutRecorder",
]
