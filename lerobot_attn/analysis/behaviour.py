"""What a robot did in an episode: its path, how high it lifted, when it succeeded, what it approached.

Pure functions on an episode's dataset. Needs the end effector's position in `state` (`eef_x`, `eef_y`,
`eef_z`, as LIBERO's recordings have it) and, for objects, `instance_position`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.phases import grasp_to_release
from lerobot_attn.errors import SelectionError

NEAR_M = 0.10  # the end effector is at an object: about a can's height from its centre
ARRIVED_M = 0.05  # the hand is over a destination: horizontal distance from its centre
LIFTED_M = 0.03  # an object was lifted: more than a push or a tilt moves its centre
_AXES = ("eef_x", "eef_y", "eef_z")
_OBJECTS = ("target", "distractor")  # roles of what can be fetched; a destination cannot


class Approach(NamedTuple):
    """Which object an episode went for.

    Attributes:
        name: the instance; "" if none was lifted and none was near.
        how: "lifted", "near", or "".
        objects: all instances that it could have been; chance is 1 / len(objects).
        targets: those of them with the role "target".
        nearest_m: instance → least distance to the end effector, m.
    """

    name: str
    how: str
    objects: tuple[str, ...]
    targets: tuple[str, ...]
    nearest_m: dict[str, float]


def end_effector(data: xr.Dataset) -> NDArray[np.float64]:
    """Return (frame, xyz): where the end effector was, m, in the world's frame.

    Raises:
        SelectionError: the state has no such dimensions.
    """
    names = [str(name) for name in data["state_dim"].values] if "state" in data else []
    if not set(_AXES) <= set(names):
        held = ", ".join(names) or "no state"
        raise SelectionError(f"end effector: the state has {held}; expected {', '.join(_AXES)}")
    return np.asarray(data["state"].values, float)[:, [names.index(name) for name in _AXES]]


def path_length(data: xr.Dataset) -> float:
    """Return how far the end effector went, m: the sum over frames of its steps.

    Raises:
        SelectionError: as `end_effector`.
    """
    return float(np.linalg.norm(np.diff(end_effector(data), axis=0), axis=1).sum())


def mean_speed(data: xr.Dataset) -> float:
    """Return how far the end effector goes from one frame to the next, mm, mean over the episode.

    A frame is a control step: of LIBERO 1/20 s, so that 5 mm a frame are 0.1 m/s.

    Raises:
        SelectionError: as `end_effector`.
    """
    n_steps = len(end_effector(data)) - 1
    return 1000 * path_length(data) / n_steps if n_steps > 0 else np.nan


def lift_heights(data: xr.Dataset) -> NDArray[np.float64]:
    """Return (frame of the lift segment,) how high the end effector is, m, in the world's frame.

    The lift segment goes from the gripper's closing (`phases.grasp_to_release`: the grasp that lifted
    something) until the hand arrives over the destination, that is within 5 cm of its centre in the
    horizontal, or the gripper opens, or the episode ends. Where the destination is unknown (no
    `instance_position`), the first of the other two ends it.

    Returns:
        Empty where the gripper never closed.

    Raises:
        SelectionError: the state has no end effector or no gripper.
    """
    hand = end_effector(data)
    if not any("gripper" in str(name).lower() for name in data["state_dim"].values):
        raise SelectionError(
            "lift: the state names no gripper, expected a dimension with 'gripper' in its name"
        )
    held = grasp_to_release(data)
    if held is None:
        return np.zeros(0)
    heights = hand[held, 2]
    apart = _from_destination(data, hand[held, :2], held.start)
    arrived = np.flatnonzero(apart <= ARRIVED_M)
    return heights[: arrived[0] + 1] if arrived.size else heights


def lift_height(data: xr.Dataset) -> float:
    """Return the mean height of the end effector in the lift segment (`lift_heights`), m; NaN without one.

    Raises:
        SelectionError: as `lift_heights`.
    """
    heights = lift_heights(data)
    return float(heights.mean()) if heights.size else np.nan


def lift_height_max(data: xr.Dataset) -> float:
    """Return the greatest height of the end effector in the lift segment, m; NaN without one.

    Raises:
        SelectionError: as `lift_heights`.
    """
    heights = lift_heights(data)
    return float(heights.max()) if heights.size else np.nan


def lift_profile(data: xr.Dataset, n_times: int = 50) -> NDArray[np.float64]:
    """Return (time,) the height of the end effector, m, at equal steps through the lift segment.

    Time is normalised: the first value is at the gripper's closing, the last one at the segment's end; NaN
    where there is no segment.

    Args:
        data: an episode's dataset.
        n_times: how many.

    Raises:
        SelectionError: as `lift_heights`.
    """
    heights = lift_heights(data)
    if not heights.size:
        return np.full(n_times, np.nan)
    at = np.linspace(0, len(heights) - 1, n_times)
    return np.asarray(np.interp(at, np.arange(len(heights)), heights), float)


def _from_destination(data: xr.Dataset, places: NDArray[np.float64], first: int) -> NDArray[np.float64]:
    """Return (frame,) the horizontal distance to the nearest destination, m; inf where none is known.

    Args:
        data: an episode's dataset.
        places: (frame, xy), m, of consecutive frames.
        first: number of the first of them.
    """
    if "instance_position" not in data or not len(data["instance_position"]):
        return np.full(len(places), np.inf)
    roles = [str(role) for role in data["instance_role"].values]
    goals = [number for number, role in enumerate(roles) if role == "destination"]
    frames = np.arange(first, first + len(places))
    seen = np.maximum(np.searchsorted(data["inference_frame"].values, frames, side="right") - 1, 0)
    where = np.asarray(data["instance_position"].values, float)[seen][:, goals, :2]  # (frame, goal, xy)
    apart = np.linalg.norm(where - places[:, None], axis=2)
    known = np.where(np.isfinite(apart), apart, np.inf)
    return np.asarray(known.min(axis=1, initial=np.inf), float)


def steps_to_success(data: xr.Dataset) -> float:
    """Return how many actions it took until the task was solved; NaN if it was not, or nobody told."""
    if "success" not in data:
        return np.nan
    solved = np.flatnonzero(data["success"].values)
    return float(solved[0] + 1) if solved.size else np.nan


def approached(data: xr.Dataset, *, near_m: float = NEAR_M, lifted_m: float = LIFTED_M) -> Approach:
    """Return which object was lifted first, or else came nearest to the end effector.

    Objects are the instances with the role target or distractor. Their positions are known at inferences; in
    between the last one holds.

    Args:
        data: an episode's dataset, with `instance_position`.
        near_m: an object that was never nearer than this was not approached, m.
        lifted_m: an object that rose by this since the first inference was lifted, m.

    Raises:
        SelectionError: there are no positions, no objects, or no end effector in the state.
    """
    if "instance_position" not in data:
        raise SelectionError(
            "approached object: the episode has no instance_position; expected an episode recorded with "
            "segmentation=true"
        )
    roles = [str(role) for role in data["instance_role"].values]
    where = np.asarray(data["instance_position"].values, float)  # (inference, instance, xyz)
    numbers = [i for i, role in enumerate(roles) if role in _OBJECTS and np.isfinite(where[:, i]).any()]
    if not numbers:
        raise SelectionError(
            "approached object: the scene has no target and no distractor whose place is known"
        )
    names = [str(name) for name in data["instance"].values]
    hand = end_effector(data)
    seen = np.searchsorted(data["inference_frame"].values, np.arange(len(hand)), side="right") - 1
    apart = np.linalg.norm(where[np.maximum(seen, 0)][:, numbers] - hand[:, None], axis=2)
    nearest = {names[i]: _least(apart[:, k]) for k, i in enumerate(numbers)}
    rises = where[:, numbers, 2] - where[0, numbers, 2] >= lifted_m
    name, how = "", ""
    if rises.any():
        first = np.where(rises.any(axis=0), rises.argmax(axis=0), len(where))
        tied = [k for k in range(len(numbers)) if first[k] == first.min()]
        name, how = names[numbers[min(tied, key=lambda k: nearest[names[numbers[k]]])]], "lifted"
    elif min(nearest.values()) <= near_m:
        name, how = min(nearest, key=lambda instance: nearest[instance]), "near"
    objects = tuple(names[i] for i in numbers)
    return Approach(name, how, objects, tuple(names[i] for i in numbers if roles[i] == "target"), nearest)


def _least(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.min()) if known.size else np.inf


def named_objects(instruction: str, objects: tuple[str, ...]) -> tuple[str, ...]:
    """Return which instances an instruction names: "milk_1" is named by "pick up the milk".

    Args:
        instruction: as the policy got it.
        objects: names of instances, words joined by underscores, perhaps with a number behind.
    """
    text = f" {' '.join(re.findall(r'[^\W_]+', instruction.lower()))} "
    return tuple(name for name in objects if f" {_words(name)} " in text)


def _words(instance: str) -> str:
    return re.sub(r"_\d+$", "", instance).replace("_", " ").lower()


def given_instruction(data: xr.Dataset) -> str:
    """Return the task's words as the policy was given them at the first inference, from its own tokens."""
    if not data.sizes.get("inference") or not data.sizes.get("text"):
        return ""
    pieces, words = data["token_text"][0].values, data["text_word"][0].values
    parts = ["".join(str(p) for p in pieces[words == word]).strip() for word in range(int(words.max()) + 1)]
    return " ".join(part for part in parts if part)


def chunk_difference(chunk: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the rms difference of two action chunks, in the policy's units.

    Args:
        chunk: (query, action_dim), NaN where a token is no action.
        other: likewise.

    Raises:
        SelectionError: their shapes differ.
    """
    if chunk.shape != other.shape:
        raise SelectionError(f"action chunks: got shapes {chunk.shape} and {other.shape}, expected the same")
    apart = np.asarray(chunk, float) - other
    known = apart[np.isfinite(apart)]
    return float(np.sqrt(np.mean(known**2))) if known.size else np.nan
