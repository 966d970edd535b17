"""A robot for `lerobot-rollout` that shows what a script says: numbered pictures and joints, no hardware.

Registered with LeRobot as robots of plugins are. What was sent to it is kept, so that a test can tell which
action answered which observation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from lerobot.robots import Robot, RobotConfig
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig

JOINTS = tuple(f"joint_{i}.pos" for i in range(1, 9))  # as many as the demo policy's state has numbers
MOVED = JOINTS[:7]  # as many as its action has
CAMERAS = {"image": (96, 96, 3), "image2": (96, 96, 3)}


@RobotConfig.register_subclass("scripted")
@dataclass(kw_only=True)
class ScriptedConfig(RobotConfig):
    """Settings of the robot.

    `breaks_at`: the look at which it disconnects; None: it never does.
    """

    breaks_at: int | None = None
    seed: int = 0


class Scripted(Robot):
    """Shows look after look, whatever is sent."""

    config_class = ScriptedConfig
    name = "scripted"
    made: ClassVar[list[Scripted]] = []  # every one of this process, for the tests

    def __init__(self, config: ScriptedConfig):
        super().__init__(config)
        self.config = config
        self.n_looks = 0
        self.sent: list[dict[str, float]] = []
        self.sent_after: list[int] = []  # number of the look before each action
        self.calls_s: list[float] = []
        self.disconnected_s: float | None = None
        self._connected = False
        self.made.append(self)

    @property
    def observation_features(self) -> dict[str, Any]:
        return {**dict.fromkeys(JOINTS, float), **CAMERAS}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(MOVED, float)

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:
        self._connected = True

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass

    def get_observation(self) -> dict[str, Any]:
        self.before_look()
        if self.n_looks == self.config.breaks_at:
            raise ConnectionError("the robot's cable came loose")
        self.calls_s.append(time.perf_counter())
        self.n_looks += 1
        return look(self.n_looks, self.config.seed)

    def before_look(self) -> None:
        """For tests to replace: what happens just before the robot is looked at."""

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.sent.append(dict(action))
        self.sent_after.append(self.n_looks)
        return action

    def disconnect(self) -> None:
        self._connected = False
        self.disconnected_s = time.perf_counter()


def look(number: int, seed: int = 0) -> dict[str, Any]:
    """Return what the robot shows at a look: its first joint and its pictures' brightness tell which."""
    noise = np.random.default_rng([seed, number])
    joints = dict(zip(JOINTS, noise.uniform(-1, 1, len(JOINTS)).tolist(), strict=True))
    joints[JOINTS[0]] = number / 1000
    shades = dict(zip(CAMERAS, brightness_of(number), strict=True))
    return {**joints, **{name: np.full(shape, shades[name], np.uint8) for name, shape in CAMERAS.items()}}


def brightness_of(number: int) -> tuple[int, int]:
    """Return the grey of each camera's picture at a look, of 255."""
    shade = 16 + 3 * number % 220
    return shade, 252 - shade


@TeleoperatorConfig.register_subclass("scripted_hand")
@dataclass(kw_only=True)
class HandConfig(TeleoperatorConfig):
    """Settings of the person's hand."""

    moved: dict[str, float] = field(default_factory=dict)


class Hand(Teleoperator):
    """A person who holds every joint at 0.5."""

    config_class = HandConfig
    name = "scripted_hand"

    def __init__(self, config: HandConfig):
        super().__init__(config)
        self._connected = False

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(MOVED, float)

    @property
    def feedback_features(self) -> dict[str, Any]:
        return {}

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:
        self._connected = True

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass

    def get_action(self) -> dict[str, Any]:
        return dict.fromkeys(MOVED, 0.5)

    def send_feedback(self, feedback: dict[str, Any]) -> None:
        pass

    def disconnect(self) -> None:
        self._connected = False
