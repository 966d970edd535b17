"""What a replay gives the policy: names and sizes are checked, what is missing is refused or made up.

Knows a policy by its config's features, and footage by its own. Runs no policy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lerobot_attn.errors import CaptureError, ConfigError
from lerobot_attn.policies.cameras import likely_renames
from lerobot_attn.recording.footage import Footage, FootageFeatures

_EMPTY_CAMERA = "observation.images.empty_camera_"  # LeRobot's own stand-ins, which nothing ever shows
_ROUNDING = 1e-3  # of pictures that were resized


@dataclass(frozen=True)
class ReplayInputs:
    """How footage becomes what the policy's preprocessor takes.

    Attributes:
        cameras: the footage's camera → the policy's, of those that the policy looks at.
        rename: the footage's feature → its name from here on; the preprocessor may rename it further.
        made_up: feature that the footage lacks → zeros of one frame.
        not_given: what the footage lacks, in words, for the store.
    """

    cameras: Mapping[str, str]
    rename: Mapping[str, str]
    made_up: Mapping[str, Tensor]
    not_given: tuple[str, ...]

    @classmethod
    def of(
        cls, config: Any, footage: Footage, rename: Mapping[str, str] | None, preprocessor: Any
    ) -> ReplayInputs:
        """Hold a policy's features to those of the footage.

        Args:
            config: the policy's.
            footage: what is replayed.
            rename: the footage's feature → the policy's.
            preprocessor: the policy's, which may rename by itself.

        Raises:
            ConfigError: a camera, the state or another feature is missing, or has another size.
        """
        rename, theirs = dict(rename or {}), footage.features
        inputs: Mapping[str, Any] = getattr(config, "input_features", None) or {}
        visual = {name for name, feature in inputs.items() if feature.type.name == "VISUAL"}
        # A stand-in may be shown something all the same, by a data set that calls a camera so.
        wanted = [name for name in inputs if name in visual and not name.startswith(_EMPTY_CAMERA)]
        _check_rename(rename, theirs)
        further = _renamed_by(preprocessor)

        def final(name: str) -> str:
            named = rename.get(name, name)
            return further.get(named, named)

        cameras = {camera: final(camera) for camera in theirs.cameras if final(camera) in visual}
        if len(set(cameras.values())) < len(cameras):
            raise ConfigError(f"rename: two cameras get one name: {cameras}, expected one each")
        missing = [name for name in wanted if name not in cameras.values()]
        not_given = [f"{name}: absent" for name in missing]
        can_lack = hasattr(config, "empty_cameras") and bool(cameras)
        if missing and (footage.is_whole or not can_lack):
            raise ConfigError(_missing_camera(missing, theirs, cameras))
        made_up = {}
        shapes = {final(name): shape for name, shape in theirs.shapes.items()}
        for name, feature in inputs.items():
            if name in visual:
                continue
            shape = tuple(feature.shape)
            if name not in shapes and not footage.is_whole:
                made_up[name] = torch.zeros(shape)
                not_given.append(f"{name}: zeros")
            else:
                _check_size(name, shapes.get(name), shape)
        action = (getattr(config, "output_features", None) or {}).get("action")
        if action is not None and ("action" in theirs.shapes or footage.is_whole):
            _check_size("action", theirs.shapes.get("action"), tuple(action.shape))
        if "action" not in theirs.shapes:
            not_given.append("action: absent")
        return cls(cameras, rename, made_up, tuple(not_given))

    def frame(self, observation: Mapping[str, Tensor], unused: Sequence[str]) -> dict[str, Tensor]:
        """Return what the policy gets of one frame, without a batch axis.

        Args:
            observation: as the footage gives it.
            unused: cameras that the policy does not look at.

        Raises:
            CaptureError: a picture is no float in [0, 1], with which policies compute wrong actions silently.
        """
        for camera in self.cameras:
            _check_picture(camera, observation[camera])
        kept = {
            self.rename.get(name, name): value for name, value in observation.items() if name not in unused
        }
        return {**kept, **self.made_up}


def collated(frames: Sequence[Mapping[str, Tensor]], tasks: Sequence[str]) -> dict[str, Any]:
    """Return frames as a batch: feature → (batch, …), and `task`: (batch,) text."""
    return {**{name: torch.stack([frame[name] for frame in frames]) for name in frames[0]}, "task": [*tasks]}


def _renamed_by(preprocessor: Any) -> dict[str, str]:
    """Return what a LeRobot preprocessor itself renames."""
    found: dict[str, str] = {}
    for step in getattr(preprocessor, "steps", ()):
        found |= getattr(step, "rename_map", None) or {}
    return found


def _check_rename(rename: Mapping[str, str], theirs: FootageFeatures) -> None:
    there = [*theirs.cameras, *theirs.shapes]
    for name in rename:
        if name not in there:
            raise ConfigError(
                f"rename: got {name!r}, which is not there, expected one of {', '.join(sorted(there))}"
            )


def _missing_camera(missing: Sequence[str], theirs: FootageFeatures, cameras: Mapping[str, str]) -> str:
    spare = [camera for camera in theirs.cameras if camera not in cameras]
    got = f"{', '.join(theirs.cameras) or 'no camera'}"
    message = f"the policy looks at {', '.join(missing)}, which is not there: got {got}"
    if not spare:
        return f"{message}; expected that camera too: replay with a policy that was trained on these alone"
    pairs = likely_renames(missing, spare)
    return (
        f"{message}; expected the policy's names: perhaps --rename '{json.dumps(pairs)}' (in Python rename=)"
    )


def _check_size(name: str, got: tuple[int, ...] | None, expected: tuple[int, ...]) -> None:
    if got is None:
        raise ConfigError(f"{name}: is not there, the policy expects one of shape {expected}; rename another")
    if got != expected:
        raise ConfigError(
            f"{name}: got shape {got}, the policy expects {expected}; replay with a policy for this robot"
        )


def _check_picture(camera: str, picture: Tensor) -> None:
    if not picture.is_floating_point():
        raise CaptureError(
            f"{camera}: got {picture.dtype} pictures, expected float in [0, 1]; open the data set with "
            "return_uint8=False"
        )
    low, high = float(picture.min()), float(picture.max())
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise CaptureError(f"{camera}: got pictures from {low:.3g} to {high:.3g}, expected float in [0, 1]")
