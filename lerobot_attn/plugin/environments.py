"""What is known of LeRobot's environments beyond their configs: names of dimensions and of observations."""

from __future__ import annotations

from typing import Any

STATE_NAMES = {
    "libero": ("eef_x", "eef_y", "eef_z", "eef_rx", "eef_ry", "eef_rz", "gripper_left", "gripper_right"),
}
ACTION_NAMES = {"libero": ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")}


def renamed_by(preprocessor: Any) -> dict[str, str]:
    """Return the environment's name of an observation → the policy's (`--rename_map`), where they differ."""
    renamed: dict[str, str] = {}
    for step in getattr(preprocessor, "steps", ()):
        renamed |= getattr(step, "rename_map", {})
    return renamed
