"""In which phase of its task an episode is at each frame: approach, grasp, carry, release; or its quarters.

Knows the robot's state by its dimensions' names; knows neither attention nor a simulator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

TASK_PHASES = ("approach", "grasp", "carry", "release")
QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")
PHASES_IN_WORDS: dict[tuple[str, ...], str] = {
    TASK_PHASES: "approach until the gripper closes, grasp until the hand has risen by 2 cm, carry until the "
    "gripper opens, release after that (from the state)",
    QUARTERS: "quarters of the episode, because its state names no gripper and no height of the hand",
}
_HEIGHT = "eef_z"  # m
_RISEN_M = 0.02
_CHANGE = 0.1  # of the widest opening so far: by so much the gripper has closed, or opened again


class Phases(NamedTuple):
    """The phase of each frame.

    Attributes:
        names: `TASK_PHASES` or `QUARTERS`.
        of_frame: (frame,) whole numbers, an index into `names`.
    """

    names: tuple[str, ...]
    of_frame: NDArray[np.intp]

    def of_inferences(self, dataset: xr.Dataset) -> NDArray[np.intp]:
        """Return (inference,) the phase of the frame at which each inference was asked for."""
        asked = np.clip(dataset["inference_frame"].values, 0, max(0, len(self.of_frame) - 1))
        return self.of_frame[asked] if len(self.of_frame) else np.zeros(len(asked), np.intp)


def task_phases(dataset: xr.Dataset) -> Phases:
    """Tell the phases of an episode that picks something up and puts it somewhere.

    Where the state has a dimension `eef_z` (m) and one or more with "gripper" in their names: the gripper
    closes when its opening falls by 10 % of the widest so far; the hand has lifted something when it is 2 cm
    above its lowest since then; a gripper that opens again by 10 % before that is back at the approach, after
    it, it releases; one that closes anew grasps anew. An opening is the sum of what the fingers are away from
    their middle, or the one number there is, of which more means wider. Where the state does not say,
    quarters of the episode.

    Args:
        dataset: an episode's.

    Returns:
        The phase of each frame.
    """
    opening, height = _hand(dataset)
    if opening is None or height is None:
        return quarters(dataset)
    n_frames = len(opening)
    phases = np.zeros(n_frames, np.intp)
    phase, widest, extreme, lowest = 0, -np.inf, np.inf, np.inf
    for frame in range(n_frames):
        wide, high = float(opening[frame]), float(height[frame])
        widest = max(widest, wide)
        margin = _CHANGE * abs(widest)
        if phase in (0, 3):  # open: `extreme` is the widest opening since then
            extreme = wide if not np.isfinite(extreme) else max(extreme, wide)
            if wide < extreme - margin:
                phase, extreme, lowest = 1, wide, high
        else:  # closed: `extreme` is the narrowest
            extreme, lowest = min(extreme, wide), min(lowest, high)
            if wide > extreme + margin:
                phase, extreme = (0, wide) if phase == 1 else (3, wide)
            elif phase == 1 and high >= lowest + _RISEN_M:
                phase = 2
        phases[frame] = phase
    return Phases(TASK_PHASES, phases)


def grasp_to_release(dataset: xr.Dataset) -> slice | None:
    """Return the frames from the gripper's closing until it opens again, of the grasp that lifted something.

    The phases are those of `task_phases`. The grasp is the one before the first carry; where the hand never
    rose, the first one. Without an opening it goes on to the last frame.

    Args:
        dataset: an episode's.

    Returns:
        The frames; None where the gripper never closed, or the state does not say.
    """
    phases = task_phases(dataset)
    closed = np.isin(phases.of_frame, (1, 2))
    if phases.names != TASK_PHASES or not closed.any():
        return None
    carries = np.flatnonzero(phases.of_frame == 2)
    first = start = int(carries[0]) if carries.size else int(closed.argmax())
    while start and closed[start - 1]:
        start -= 1
    opens = np.flatnonzero(~closed[first:])
    return slice(start, first + int(opens[0]) if opens.size else len(closed))


def quarters(dataset: xr.Dataset) -> Phases:
    """Cut an episode into four parts of the same number of frames."""
    n_frames = dataset.sizes.get("frame", 0)
    return Phases(QUARTERS, np.arange(n_frames) * len(QUARTERS) // max(1, n_frames))


def _hand(dataset: xr.Dataset) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """Return the gripper's opening and the hand's height, (frame,) each; None where the state lacks it."""
    if "state" not in dataset or "state_dim" not in dataset.coords:
        return None, None
    names = [str(name) for name in dataset["state_dim"].values.tolist()]
    grippers = [index for index, name in enumerate(names) if "gripper" in name.lower()]
    if not grippers or _HEIGHT not in names:
        return None, None
    state = dataset["state"].values
    fingers = state[:, grippers]
    opening = fingers[:, 0] if len(grippers) == 1 else np.abs(fingers).sum(axis=1)
    return opening, state[:, names.index(_HEIGHT)]
