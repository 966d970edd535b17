"""What an observation or action of anybody's loop holds: state, pictures, rows of numbers.

Of a policy it knows the names of the cameras alone; no store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lerobot_attn.errors import CaptureError

_STATES = ("observation.state", "state", "agent_pos")


class Row(NamedTuple):
    """Numbers of one frame: (1, n) float32, and their names where they came with some."""

    values: np.ndarray
    names: tuple[str, ...]


class PolicyCameras(NamedTuple):
    """The cameras of a policy.

    Attributes:
        names: of its image features.
        are_normalised: whether its preprocessor normalises images. What a camera showed is then no longer in
            the policy's batch, not even where the values happen to lie in [0, 1].
    """

    names: tuple[str, ...] = ()
    are_normalised: bool = False


class State(NamedTuple):
    """The robot's state at one frame: (1, state_dim) float32, None without one; and its names."""

    values: np.ndarray | None
    names: tuple[str, ...]


def cameras_of(policy: Any) -> PolicyCameras:
    """Return the cameras that a policy's config names; none where it has no such config."""
    config = getattr(policy, "config", None)
    names = getattr(config, "image_features", None) or ()
    modes = getattr(config, "normalization_mapping", None) or {}
    return PolicyCameras(tuple(names), modes.get("VISUAL", "IDENTITY") != "IDENTITY")


def as_row(what: str, value: Any) -> Row:
    """Return numbers as one row: a tensor, array or list of shape (n,) or (1, n), or a mapping to numbers.

    Raises:
        CaptureError: another shape, or no numbers.
    """
    names: tuple[str, ...] = ()
    if isinstance(value, Mapping):
        names, value = tuple(map(str, value)), list(value.values())
    if isinstance(value, Tensor):
        value = value.detach().float().cpu().numpy()
    try:
        array = np.array(value, np.float32)
    except (TypeError, ValueError) as error:
        raise CaptureError(f"{what}: got {type(value).__name__}, expected numbers: {error}") from error
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.ndim != 1 or not array.size:
        raise CaptureError(f"{what}: got shape {array.shape}, expected ({what.split('_')[-1]}_dim,)")
    return Row(array[None], names)


def state_of(observation: Mapping[str, Any] | None) -> State:
    """Return the robot's state in an observation: under one of its usual names, or its plain numbers."""
    if not isinstance(observation, Mapping):
        return State(None, ())
    for name in _STATES:
        if observation.get(name) is not None:
            return State(*as_row("state", observation[name]))
    numbers = {
        str(name): value
        for name, value in observation.items()
        if isinstance(value, int | float | np.floating) and not isinstance(value, bool)
    }
    return State(*as_row("state", numbers)) if numbers else State(None, ())


def pictures_of(
    observation: Mapping[str, Any] | None, cameras: Sequence[str], n_envs: int = 1
) -> dict[str, Tensor]:
    """Return the pictures of a policy's cameras in an observation, as a policy's batch has them.

    Args:
        observation: with pictures under the cameras' whole or short names, also inside "pixels".
        cameras: the policy's.
        n_envs: how many environments the observation is of.

    Returns:
        camera → (n_envs, 3, height, width) float32 in [0, 1]; cameras that are not there are left out.
    """
    places, found = _places(observation), {}
    for camera in cameras:
        for place in places:
            picture = place.get(camera, place.get(camera.rsplit(".", 1)[-1]))
            tensor = _as_pictures(picture, n_envs)
            if tensor is not None:
                found[camera] = tensor
                break
    return found


def pictured(observation: Mapping[str, Any] | None) -> list[str]:
    """Return the names of all pictures in one environment's observation, whosever cameras they are."""
    places = _places(observation)
    return [str(name) for place in places for name in place if _as_pictures(place[name], 1) is not None]


def _places(observation: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if not isinstance(observation, Mapping):
        return []
    pixels = observation.get("pixels")
    return [observation, *([pixels] if isinstance(pixels, Mapping) else [])]


def _as_pictures(value: Any, n_envs: int) -> Tensor | None:
    if not isinstance(value, Tensor | np.ndarray):
        return None
    tensor = torch.as_tensor(value).detach()
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.ndim != 4 or len(tensor) != n_envs:
        return None
    if tensor.shape[1] != 3 and tensor.shape[-1] == 3:
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.shape[1] != 3:
        return None
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
