#!/usr/bin/env python
"""What recording costs a robot's control loop: its time on the loop's thread, and the ticks' jitter.

    python benchmarks/robot_loop.py                 # four minutes on two idle cores

`lerobot-rollout` itself, real-time chunking at 30 Hz, the demo policy, a robot with two cameras of 640 × 480
that exists on paper only. Without and with recording, in turns. The time on the loop's thread is everything
that the recording does when the loop calls it; a tick's jitter is how far the time between two looks at the
robot is from 1/30 s.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import Result, arguments, finish, machine, median, ratio

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from robots import JOINTS, MOVED, Scripted

FPS = 30
TOLD = ("on_look", "on_observation", "on_popped", "on_sent", "add_frame")  # what the loop's thread calls
AT_MOST_MS = 1.0


class Prepared:
    """Pictures of a robot's cameras, made before the loop begins: making them must not cost a tick."""

    def __init__(self, height_px: int, width_px: int):
        noise = np.random.default_rng(0)
        self.shape = (height_px, width_px, 3)
        self._pictures = [noise.integers(0, 256, self.shape, np.uint8) for _ in range(16)]

    def look(self, robot: Scripted) -> dict[str, Any]:
        """Return what the robot shows next."""
        robot.calls_s.append(time.perf_counter())
        robot.n_looks += 1
        picture = self._pictures[robot.n_looks % len(self._pictures)]
        return {
            **dict.fromkeys(JOINTS, robot.n_looks / 1000),
            "image": picture.copy(),
            "image2": picture.copy(),
        }


@contextmanager
def prepared_robot(pictures: Prepared) -> Iterator[None]:
    """Let the scripted robot show these pictures."""
    look, features = Scripted.get_observation, Scripted.observation_features
    shown = {**dict.fromkeys(JOINTS, float), "image": pictures.shape, "image2": pictures.shape}
    Scripted.get_observation = lambda self: pictures.look(self)
    Scripted.observation_features = property(lambda self: shown)
    try:
        yield
    finally:
        Scripted.get_observation, Scripted.observation_features = look, features


@contextmanager
def timed_on_the_loops_thread() -> Iterator[dict[int, float]]:
    """Yield number of a look → seconds that the recording took on the loop's thread until the next one."""
    from lerobot_attn.recording.robot import RobotRecording

    seconds: dict[int, float] = defaultdict(float)
    originals = {name: getattr(RobotRecording, name) for name in TOLD}
    loop = threading.current_thread()

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                if threading.current_thread() is loop:
                    seconds[Scripted.made[-1].n_looks] += time.perf_counter() - start

        return method

    for name, original in originals.items():
        setattr(RobotRecording, name, timed(original))
    try:
        yield seconds
    finally:
        for name, original in originals.items():
            setattr(RobotRecording, name, original)


def rollout(checkpoint: Path, stores: Path | None, duration_s: float) -> Scripted:
    """Run `lerobot-rollout`, recorded into `stores` or not at all; return the robot."""
    from lerobot.scripts import lerobot_rollout

    from lerobot_attn.plugin import install_rollout

    install_rollout(vars(lerobot_rollout))
    recorded = [] if stores is None else ["--save_attention_maps=true", f"--attention.dir={stores}"]
    before = sys.argv
    sys.argv = [
        "lerobot-rollout", "--robot.type=scripted", f"--policy.path={checkpoint}", "--inference.type=rtc",
        "--task=pick up the soup", f"--fps={FPS}", f"--duration={duration_s}",
        "--return_to_initial_position=false", *recorded,
    ]  # fmt: skip
    try:
        lerobot_rollout.main()
    finally:
        sys.argv = before
    robot = Scripted.made[-1]
    assert set(robot.sent[-1]) == set(MOVED)
    return robot


def jitter_ms(robot: Scripted) -> np.ndarray:
    """Return how far each tick is from its time, ms; the first second is left out."""
    intervals = np.diff(robot.calls_s)[FPS:]
    return np.abs(intervals - 1 / FPS) * 1000


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    from lerobot_attn.demo.checkpoint import make_demo_checkpoint

    parsed = arguments(__doc__)
    before = machine()
    duration_s, size_px = (3.0, (96, 96)) if parsed.quick else (20.0, (480, 640))
    ticks, jitter = [], {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as name, prepared_robot(Prepared(*size_px)):
        folder = Path(name)
        checkpoint = make_demo_checkpoint(folder / "policy", random=True)
        for number in range(parsed.runs):
            for kind in sorted(jitter, reverse=bool(number % 2)):
                stores = folder / str(number) if kind == "with" else None
                with timed_on_the_loops_thread() as seconds:
                    robot = rollout(checkpoint, stores, duration_s)
                jitter[kind].append(float(np.percentile(jitter_ms(robot), 99)))
                if kind == "with":
                    ticks.append([1000 * s for s in list(seconds.values())[FPS:]])
    each = [np.array(run) for run in ticks]
    results: list[Result] = [
        median(
            "robot's loop at 30 Hz: recording's time on its thread, a tick, median",
            [float(np.median(run)) for run in each],
            "ms",
            at_most=AT_MOST_MS,
        ),
        median(
            "robot's loop at 30 Hz: recording's time on its thread, a tick, p99",
            [float(np.percentile(run, 99)) for run in each],
            "ms",
            at_most=AT_MOST_MS,
            headline=True,
        ),
        ratio(
            "robot's loop at 30 Hz: p99 of the ticks' jitter, recorded over not recorded",
            jitter["with"],
            jitter["without"],
            headline=True,
        ),
        median("robot's loop at 30 Hz: p99 of the ticks' jitter, not recorded", jitter["without"], "ms"),
    ]
    how = (
        f"lerobot-rollout, real-time chunking at {FPS} Hz for {duration_s:g} s, demo policy with random "
        f"weights, two cameras of {size_px[1]} × {size_px[0]}, default capture; with and without in turns"
    )
    details = {"jitter_p99_ms": jitter, "tick_ms": [[round(t, 4) for t in run] for run in ticks]}
    return finish("robot_loop", results, parsed, how=how, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
