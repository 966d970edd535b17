#!/usr/bin/env python
"""Flat memory: lerobot-eval over an episode of 3,000 frames against one of 300, with and without capture.

    python benchmarks/memory.py            # five minutes on two idle cores
    python benchmarks/memory.py --libero   # in LIBERO; most of an hour without a GPU to render

A real `lerobot-eval` with the demo policy, a process for each measurement: an inference every 10 frames,
default capture, two cameras of 360 × 360. LIBERO renders a few frames a second on a CPU, so the frames come
from a made-up environment with LIBERO's observations. LeRobot itself keeps every rendered frame of an episode
for its MP4 (1.2 GB for 3,000 of 360 × 360); here they are 32 × 32, so that they do not hide what is measured.

Resident memory is that of the process and of the encoders that it started, read after each frame; a run's is
its largest. The claim is what capture adds: the growth from 300 to 3,000 frames with it, less the growth
without it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments, finish, machine, median

AT_MOST_MB = 64.0
IMAGE_PX, RENDERED_PX = 360, 32
FRAMES = (300, 3000)
NAMES = {True: "with capture", False: "without capture"}
# LeRobot's way to leave the progress bars out; one thread, because two runs go side by side.
ENVIRONMENT = {"SLURM_JOB_ID": "0", "MUJOCO_GL": "egl", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def resident_mb(process: Path = Path("/proc/self")) -> float:
    """Return the resident memory of a process and its children, MB."""
    children = [child for task in process.glob("task/*/children") for child in task.read_text().split()]
    total_kb = 0
    for folder in (process, *(Path("/proc") / child for child in children)):
        try:
            status = (folder / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # an encoder that has just ended
        lines = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        total_kb += sum(
            int(line.split()[1]) for line in lines
        )  # none: it has ended, but nobody has waited for it
    return total_kb * 1024 / 1e6


def added_growth(with_capture: Sequence[float], without: Sequence[float]) -> float:
    """Return what capture adds to the growth: each is the memory of the short and of the long episode."""
    return (with_capture[1] - with_capture[0]) - (without[1] - without[0])


def evaluate(samples: Path, argv: list[str]) -> None:
    """Be `lerobot-eval`, and write the resident memory after each frame, MB, as a JSON list."""
    import gymnasium as gym
    from lerobot.scripts import lerobot_eval

    _register_made_up_environment()
    step, found = gym.vector.SyncVectorEnv.step, []

    def sampled_step(self: Any, actions: Any) -> Any:
        for env in self.envs:
            simulation = getattr(env.unwrapped, "_env", None)
            if simulation is not None:
                simulation.env.horizon = max(FRAMES) + 1000  # robosuite ends an episode after 1,000 steps
        result = step(self, actions)
        found.append(resident_mb())
        return result

    gym.vector.SyncVectorEnv.step = sampled_step
    sys.argv = ["lerobot-eval", *argv]
    lerobot_eval.main()
    samples.write_text(json.dumps(found))


def _register_made_up_environment() -> None:
    import gymnasium as gym
    import numpy as np
    from lerobot.envs.configs import EnvConfig, LiberoEnv

    def box(*shape: int) -> gym.spaces.Box:
        return gym.spaces.Box(-np.inf, np.inf, shape, np.float64)

    class MadeUp(gym.Env):
        """LIBERO's observations, without a simulation: the pictures move, the arm does not."""

        metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012  as gymnasium declares it
        task = task_description = "pick up the alphabet soup and place it in the basket"

        def __init__(self, n_frames: int):
            picture = gym.spaces.Box(0, 255, (IMAGE_PX, IMAGE_PX, 3), np.uint8)
            state = {
                "eef": {"pos": box(3), "quat": box(4), "mat": box(3, 3)},
                "gripper": {"qpos": box(2), "qvel": box(2)},
                "joints": {"pos": box(7), "vel": box(7)},
            }
            spaces = {name: gym.spaces.Dict(parts) for name, parts in state.items()}
            self.observation_space = gym.spaces.Dict(
                {
                    "pixels": gym.spaces.Dict({"image": picture, "image2": picture}),
                    "robot_state": gym.spaces.Dict(spaces),
                }
            )
            self.action_space = gym.spaces.Box(-1, 1, (7,), np.float32)
            self._max_episode_steps = n_frames
            self._zeros = {
                name: {part: np.zeros(space.shape) for part, space in parts.items()}
                for name, parts in state.items()
            }
            rng = np.random.default_rng(0)
            coarse = rng.integers(0, 256, (IMAGE_PX // 20, IMAGE_PX // 20, 3), np.uint8)
            self._picture = coarse.repeat(20, axis=0).repeat(20, axis=1)
            self._frame = 0

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            super().reset(seed=seed)
            self._frame = 0
            return self._observation(), {"is_success": False}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self._frame += 1
            return self._observation(), 0.0, False, False, {"is_success": False}

        def render(self) -> Any:
            return self._picture[:RENDERED_PX, :RENDERED_PX].copy()

        def _observation(self) -> dict[str, Any]:
            pictures = {
                "image": np.roll(self._picture, 3 * self._frame, axis=1),
                "image2": np.roll(self._picture, 2 * self._frame, axis=0),
            }
            return {"pixels": pictures, "robot_state": self._zeros}

    @EnvConfig.register_subclass("made_up")
    @dataclass
    class MadeUpConfig(LiberoEnv):
        """Options of the made-up environment: those of LIBERO."""

        def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
            assert self.episode_length is not None
            envs = gym.vector.SyncVectorEnv(
                [lambda: MadeUp(self.episode_length) for _ in range(n_envs)],
                autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
            )
            return {self.type: {0: envs}}


def start(
    folder: Path, checkpoint: Path, n_frames: int, *, capture: bool, libero: bool
) -> subprocess.Popen[bytes]:
    """Start an evaluation of one episode; it leaves `samples.json` in the folder."""
    folder.mkdir()
    environment = ["--env.type=made_up"]
    if libero:
        environment = ["--env.type=libero", "--env.task=libero_object", "--env.task_ids=[0]"]
        environment += [f"--env.observation_{side}={IMAGE_PX}" for side in ("height", "width")]
    command = [
        *(sys.executable, __file__, "--evaluate", str(folder / "samples.json")),
        f"--policy.path={checkpoint}",
        "--policy.device=cpu",
        *environment,
        f"--env.episode_length={n_frames}",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        f"--eval.save_attention_maps={str(capture).lower()}",
        f"--output_dir={folder / 'out'}",
    ]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT}
        )


def samples_of(running: subprocess.Popen[bytes], folder: Path, n_frames: int) -> list[float]:
    """Wait for an evaluation, and return its resident memory after each frame, MB.

    Raises:
        RuntimeError: it failed, or the episode was shorter than asked for.
    """
    if running.wait() != 0:
        raise RuntimeError(
            f"lerobot-eval ended with {running.returncode}: {(folder / 'log').read_text()[-2000:]}"
        )
    found: list[float] = json.loads((folder / "samples.json").read_text())
    if len(found) != n_frames:
        raise RuntimeError(f"the episode had {len(found)} frames, expected {n_frames}")
    return found


def measure(folder: Path, checkpoint: Path, n_frames: int, libero: bool) -> dict[bool, list[float]]:
    """Evaluate with and without capture, side by side; return whether with capture → memory, MB, by frame."""
    folders = {
        capture: folder / f"{n_frames}_{'with' if capture else 'without'}" for capture in (True, False)
    }
    running = {
        capture: start(folders[capture], checkpoint, n_frames, capture=capture, libero=libero)
        for capture in folders
    }
    try:
        return {capture: samples_of(running[capture], folders[capture], n_frames) for capture in folders}
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def main() -> int:
    """Measure, print and write JSON; exit status 1 where the target is missed."""
    parsed = arguments(
        __doc__,
        ("--libero", {"action": "store_true", "help": "frames from LIBERO instead of made-up ones"}),
        ("--rounds", {"type": int, "default": 1, "help": "rounds, in the place of --runs (default: 1)"}),
    )
    parsed.runs = 1 if parsed.quick else parsed.rounds
    from lerobot_attn.demo.checkpoint import make_demo_checkpoint

    before = machine()
    frames = (12, 30) if parsed.quick else FRAMES
    peaks: dict[bool, list[list[float]]] = {True: [], False: []}  # with capture? → round → of each length
    curves = []
    with tempfile.TemporaryDirectory() as name:
        checkpoint = make_demo_checkpoint(Path(name) / "pi05_tiny", random=True)
        for round_ in range(parsed.runs):
            folder = Path(name) / str(round_)
            folder.mkdir()
            found = [measure(folder, checkpoint, n_frames, parsed.libero) for n_frames in frames]
            for capture, rounds in peaks.items():
                rounds.append([max(samples[capture]) for samples in found])
            curves.append({str(n): samples for n, samples in zip(frames, found, strict=True)})
    short, long = frames
    what = f"resident memory of lerobot-eval, {long} frames over {short}"
    added = [added_growth(*pair) for pair in zip(peaks[True], peaks[False], strict=True)]
    results = [median(f"{what}: what capture adds", added, "MB", at_most=AT_MOST_MB, headline=True)]
    for capture, name in NAMES.items():
        grown = [of_long - of_short for of_short, of_long in peaks[capture]]
        results.append(median(f"{what}, {name}", grown, "MB"))
        results.append(
            median(f"resident memory, {short} frames, {name}", [p[0] for p in peaks[capture]], "MB")
        )
    details = {
        # A hundred points of each curve are enough to see a slope.
        "resident_mb": [
            {
                n: {
                    NAMES[capture]: samples[:: max(1, len(samples) // 100)]
                    for capture, samples in both.items()
                }
                for n, both in curve.items()
            }
            for curve in curves
        ],
        "late_growth_mb": [late_growth(curve[str(long)][True]) for curve in curves],
    }
    how = (
        f"lerobot-eval, demo policy, {'LIBERO' if parsed.libero else 'made-up'} frames, two cameras of "
        f"{IMAGE_PX} × {IMAGE_PX}, default capture, an inference every 10 frames; largest resident memory of "
        "the process and its encoders"
    )
    name = "memory_libero" if parsed.libero else "memory"
    return finish(name, results, parsed, how=how, before=before, details=details)


def late_growth(samples: Sequence[float]) -> float:
    """Return how much more the last quarter of an episode takes than its second, medians, MB."""
    quarter = len(samples) // 4
    return statistics.median(samples[3 * quarter :]) - statistics.median(samples[quarter : 2 * quarter])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--evaluate"]:
        evaluate(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())
