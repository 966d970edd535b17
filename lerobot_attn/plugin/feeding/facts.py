"""What the checks of a policy's input are told: plain values and arrays.

Knows neither LeRobot nor torch, and judges nothing. `gather` fills these in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

STATE, ACTION = "observation.state", "action"
_EMPTY_CAMERA = "observation.images.empty_camera_"  # LeRobot's own stand-ins, which nothing ever shows
_EPS = 1e-8  # LeRobot's, where a range has no width

# What LeRobot needs for each way of normalising; whatever else a feature's mode says, it is not normalised.
NEEDS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}


class Scale(NamedTuple):
    """A normalised value is (value - centre) / half; both (dim,), or (3, 1, 1) of pictures."""

    centre: np.ndarray
    half: np.ndarray


@dataclass(frozen=True)
class Expected:
    """What a checkpoint says of its policy and of how inputs and actions are scaled.

    Attributes:
        cameras: image feature → its shape (3, height, width), in the policy's order.
        state_dim: numbers in the state; None: the policy takes no state.
        action_dim: numbers in an action; None: unknown.
        most_dims: the size to which the policy pads a smaller state; None: it does not.
        modes: feature → how it is normalised, e.g. "QUANTILES"; "IDENTITY": not at all.
        statistics: feature → name → (dim,) or (3, 1, 1), in the robot's units.
        n_action_steps: actions that are executed of each chunk.
        chunk_size: actions in a chunk; None: the policy predicts no chunks.
        relative: whether LeRobot makes actions relative to the state before it normalises them.
        dtype: of the weights; None: the config does not say.
        device: where the policy runs, e.g. "cuda".
        compile_mode: `torch.compile`'s mode; None: the policy is not compiled.
        takes_words: whether an instruction is tokenised.
    """

    cameras: Mapping[str, Sequence[int]] = field(default_factory=dict)
    state_dim: int | None = None
    action_dim: int | None = None
    most_dims: int | None = None
    modes: Mapping[str, str] = field(default_factory=dict)
    statistics: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    n_action_steps: int | None = None
    chunk_size: int | None = None
    relative: bool = False
    dtype: str | None = None
    device: str = "cpu"
    compile_mode: str | None = None
    takes_words: bool = False

    @property
    def shown_cameras(self) -> list[str]:
        """The cameras that something must show."""
        return [camera for camera in self.cameras if not camera.startswith(_EMPTY_CAMERA)]

    def lacks(self, feature: str) -> list[str]:
        """Return the names of the statistics that a feature's normalisation needs and that are not there."""
        found = self.statistics.get(feature, {})
        return [name for name in NEEDS.get(self.modes.get(feature, ""), ()) if name not in found]

    def scale(self, feature: str) -> Scale | None:
        """Return how LeRobot scales a feature; None where it does not, or has nothing to do it with."""
        mode = self.modes.get(feature, "")
        if mode not in NEEDS or self.lacks(feature):
            return None
        low, high = (np.asarray(self.statistics[feature][name], np.float64) for name in NEEDS[mode])
        if mode == "MEAN_STD":
            return Scale(low, high + _EPS)
        half = np.where(high == low, _EPS, high - low) / 2
        return Scale(low + half, half)


@dataclass(frozen=True)
class Fed:
    """One observation as it came out of the policy's preprocessor, without a batch axis.

    Attributes:
        pictures: image feature → (3, height, width) or (height, width, 3), of the dtype that it has there.
        state: (state_dim,) normalised; None: there is none.
        prompt: the decoded tokens without padding; None: nothing was tokenised.
        task: the instruction that was given; None: unknown.
        is_cut: whether the prompt's end is missing.
        digits: the numbers that stand for the state in the prompt, 0 to 255; -1 is below the lowest.
        has_patches: whether the preprocessor has put patches of pictures in their place, as GR00T's does.
    """

    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    state: np.ndarray | None = None
    prompt: str | None = None
    task: str | None = None
    is_cut: bool = False
    digits: Sequence[int] = ()
    has_patches: bool = False


@dataclass(frozen=True)
class World:
    """What shows observations and takes actions.

    Attributes:
        what: its name in messages, e.g. "the environment".
        state_names: names of the state's dimensions, or none.
        action_names: names of the action's dimensions, or none.
        action_dim: numbers in an action; None: unknown.
        fps: actions a second; None: unknown.
        control_mode: "relative" (an action says how far to move), "absolute" (where to), or None.
    """

    what: str = "the environment"
    state_names: Sequence[str] = ()
    action_names: Sequence[str] = ()
    action_dim: int | None = None
    fps: float | None = None
    control_mode: str | None = None


@dataclass(frozen=True)
class Recorded:
    """What a data set holds, under the policy's names.

    Attributes:
        states: (frame, state_dim) in the robot's units; None: it has none.
        actions: (frame, action_dim), likewise.
        state_names: names of the state's dimensions, or none.
        action_names: names of the action's dimensions, or none.
        fps: frames per second.
        pictures: camera → pictures (height, width, 3) in [0, 1], the first frames of some episodes.
    """

    states: np.ndarray | None = None
    actions: np.ndarray | None = None
    state_names: Sequence[str] = ()
    action_names: Sequence[str] = ()
    fps: float | None = None
    pictures: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)


class Facts(NamedTuple):
    """Everything that is known; what is None was not looked at."""

    expected: Expected
    fed: Fed | None = None
    world: World | None = None
    recorded: Recorded | None = None
