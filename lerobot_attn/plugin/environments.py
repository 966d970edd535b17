"""What is known of LeRobot's environments beyond their configs: the names of their dimensions."""

from __future__ import annotations

STATE_NAMES = {
    "libero": ("eef_x", "eef_y", "eef_z", "eef_rx", "eef_ry", "eef_rz", "gripper_left", "gripper_right"),
}
ACTION_NAMES = {"libero": ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")}
