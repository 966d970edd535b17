"""What an observation or action of anybody's loop holds: state, pictures, rows of numbers.

Knows no policy and no store.
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


class State(NamedTuple):
    """The robot's state at one frame: (1, state_dim) float32, None without one; and its names."""

    values: np.ndarray | None
    names: tuple[str, ...]


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


def pictures_of(observation: Mapping[str, Any], cameras: Sequence[str]) -> dict[str, Tensor]:
    """Return the pictures of a policy's cameras in an observation, as a policy's batch has them.

    Args:
        observation: with pictures under the cameras' whole or short names, also inside "pixels".
        cameras: the policy's.

    Returns:
        camera → (1, 3, height, width) float32 in [0, 1]; cameras that are not there are left out.
    """
    if not isinstance(observation, Mapping):
        return {}
    pixels = observation.get("pixels")
    places: list[Mapping[str, Any]] = [observation, *([pixels] if isinstance(pixels, Mapping) else [])]
    found = {}
    for camera in cameras:
        for place in places:
            picture = place.get(camera, place.get(camera.rsplit(".", 1)[-1]))
            tensor = _as_picture(picture)
            if tensor is not None:
                found[camera] = tensor
                break
    return found


def _as_picture(value: Any) -> Tensor | None:
    if not isinstance(value, Tensor | np.ndarray):
        return None
    tensor = torch.as_tensor(value).detach()
    if tensor.ndim == 4 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != 3:
        return None
    if tensor.shape[0] != 3 and tensor.shape[-1] == 3:
        tensor = tensor.permute(2, 0, 1)
    if tensor.shape[0] != 3:
        return None
    return (tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float())[None]
