"""One recorded frame and its copies with patches hidden: what the policy answers to them.

Knows the policy by what it is asked and answers. Why it is asked is the business of `plugin.saliency`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lerobot_attn.analysis.saliency import Patches
from lerobot_attn.analysis.spatial import on_camera_pixels
from lerobot_attn.capture import AttentionCapture, InferenceRecord
from lerobot_attn.errors import CaptureError
from lerobot_attn.interventions.painting import blurred, mean_colour
from lerobot_attn.recording.asking import AskedPolicy, Moment
from lerobot_attn.recording.footage import Footage, FootageEpisode
from lerobot_attn.recording.replay_inputs import ReplayInputs
from lerobot_attn.recording.replay_views import reading

Fill = Literal["mean", "blur"]


class Place(NamedTuple):
    """A frame of the footage: its episode, its row there, and its number."""

    episode: FootageEpisode
    row: int
    frame: int

    def __str__(self) -> str:
        return f"frame {self.frame} of episode {self.episode.index}"


class Scene(NamedTuple):
    """One frame on its way: what the policy is given, and what it answered to it."""

    inputs: Mapping[str, Tensor]
    task: str
    seed: int
    moment: Moment  # whose noise its copies start from, too
    record: InferenceRecord
    executed: Tensor  # (action, dimension) float32


class Asker:
    """Asks the policy about one frame and its copies."""

    def __init__(
        self,
        policy: Any,
        capture: AttentionCapture,
        inputs: ReplayInputs,
        preprocessor: Any,
        records: list[InferenceRecord],
        batch_size: int,
    ):
        self._policy = AskedPolicy(policy, preprocessor, capture.policy)
        self._capture, self._records, self._inputs = capture, records, inputs
        # A policy that draws its own noise draws it for a whole batch: each copy is then asked for alone.
        self._batch_size = 1 if self._policy.draws_itself else batch_size

    @property
    def features(self) -> dict[str, str]:
        """The policy's name of a camera → its name in what the preprocessor is given."""
        inputs = self._inputs
        return {theirs: inputs.rename.get(ours, ours) for ours, theirs in inputs.cameras.items()}

    def scene(self, footage: Footage, place: Place, task: str | None, seed: int) -> Scene:
        """Read a frame and ask about it as it is.

        Args:
            footage: what it is of.
            place: which one.
            task: the instruction, instead of the recorded one.
            seed: of the noise.

        Raises:
            CaptureError: it cannot be read, or its attention could not be captured.
        """
        index, unused = place.episode.index, set(footage.features.cameras) - set(self._inputs.cameras)
        with reading(index, place.frame):
            observation = footage.observation(index, place.row)
        frame = self._inputs.frame(observation, [*unused])
        told = place.episode.tasks[place.row] if task is None else task
        moment = Moment(index, place.frame)
        self._records.clear()
        self._capture.enabled = True
        try:
            executed = self._ask([frame], told, seed, moment)[0]
        finally:
            self._capture.enabled = False
        if len(self._records) != 1:
            raise CaptureError(f"{place}: the policy ran {len(self._records)} inferences, expected one")
        return Scene(frame, told, seed, moment, self._records.pop(), executed)

    def changes(
        self,
        scene: Scene,
        patches: Patches,
        hidden: NDArray[np.bool_],
        hide: Hide,
        told: Callable[[int], None],
    ) -> NDArray[np.float64]:
        """Return how much hiding patches changes the action.

        Args:
            scene: of which frame.
            patches: which patch is where.
            hidden: (question, patch) bool.
            hide: covers patches of a picture.
            told: called with the number of questions answered.

        Returns:
            (question,) root mean square over executed actions and their dimensions.
        """
        found = []
        for start in range(0, len(hidden), self._batch_size):
            part = hidden[start : start + self._batch_size]
            copies = [dict(scene.inputs) for _ in part]
            for name in hide.features:
                for copy, picture in zip(copies, hide(name, part), strict=True):
                    copy[name] = picture
            answers = self._ask(copies, scene.task, scene.seed, scene.moment)
            change = (answers - scene.executed).double().square().mean(dim=(1, 2)).sqrt()
            found.append(change.numpy())
            told(len(part))
        return np.concatenate(found)

    def _ask(self, frames: list[Any], task: str, seed: int, moment: Moment) -> Tensor:
        """Return the executed actions, (batch, action, dimension) float32, on the host."""
        batch = self._policy.batch(frames, [task] * len(frames))
        chunk = self._policy.chunk(batch, seed, [moment] * len(frames))
        return chunk[:, : self._capture.policy.n_action_steps].float().cpu()


class Hide:
    """Covers patches of a frame's pictures.

    Args:
        frame: what the policy's preprocessor is given.
        patches: which patch is where.
        features: camera → its name in the frame.
        fill: what a hidden patch shows.
    """

    def __init__(self, frame: Mapping[str, Tensor], patches: Patches, cameras: Mapping[str, str], fill: Fill):
        self._patches = patches
        self._frame = frame
        self.features = {feature: camera for camera, feature in cameras.items()}
        self._fills = {name: self._fill(name, fill) for name in self.features}

    def __call__(self, feature: str, hidden: NDArray[np.bool_]) -> Iterator[Tensor]:
        """Yield one camera's picture for each row of hidden patches, (question, patch)."""
        camera, picture = self.features[feature], self._frame[feature]
        geometry = self._patches.geometries[camera]
        for row in hidden:
            grid = self._patches.on_grid(row, camera, fill=0.0)
            covered = on_camera_pixels(grid, geometry, size_px=(picture.shape[1], picture.shape[2])) > 0
            yield torch.where(torch.from_numpy(covered), self._fills[feature], picture)

    def _fill(self, feature: str, fill: Fill) -> Tensor:
        picture = self._frame[feature]
        if fill == "mean":
            return mean_colour(picture[None])[0]
        return blurred(picture[None])[0]
