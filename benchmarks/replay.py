#!/usr/bin/env python
"""How fast a recorded episode is replayed, over the speed of the policy alone on the same batches.

    python benchmarks/replay.py          # six minutes on two idle cores

An episode of 40 frames, two cameras of 360 px, in a LeRobotDataset that is written first. The policy alone
is asked about the frames that the replay asks it about, in batches of the same size that are ready in memory,
from the same noise. The replay reads and preprocesses them, asks, and stores maps, tables and the cameras'
videos; its time ends when the store is closed. In turns, the first round does not count.

Asked at chunk starts, the episode is four inferences of a small policy, beside which what an episode costs
by itself (its store, its videos) counts most: that row has no target.

That both get the same actions is checked, bit for bit.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Result, arguments, finish, in_turns, machine, median, ratio

from lerobot_attn import AttentionConfig, open_run, record_dataset

POLICY = "the policy alone"
AT_LEAST = 0.9
N_FRAMES, FPS, TASK = 40, 20, "pick up the alphabet soup and place it in the basket"
EVERY = {"chunk": "asked at chunk starts", 1: "asked at every frame"}


class Replays:
    """The data set, the demo policy and its processors, made once.

    Args:
        folder: where they and the recordings go.
        n_frames: frames of the episode.
        image_px: height and width of the cameras' pictures.
        batch_size: frames in one call of the policy.
        settings: fields of the policy's config.
    """

    def __init__(self, folder: Path, n_frames: int, image_px: int, batch_size: int, **settings: Any):
        from lerobot.configs import PreTrainedConfig
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
        from lerobot.policies.factory import make_policy, make_pre_post_processors

        from lerobot_attn.demo.checkpoint import make_demo_checkpoint

        checkpoint = make_demo_checkpoint(folder / "policy", random=True)
        overrides = [f"--{name}={value}" for name, value in settings.items()]
        config = PreTrainedConfig.from_pretrained(checkpoint, cli_overrides=["--device=cpu", *overrides])
        config.pretrained_path = checkpoint
        cameras = ["observation.images.image", "observation.images.image2"]
        self._write(folder / "dataset", cameras, n_frames, image_px)
        self._dataset = LeRobotDataset("benchmarks/dataset", root=folder / "dataset")
        self._policy = make_policy(config, ds_meta=self._dataset.meta).eval()
        self._processors = make_pre_post_processors(config, pretrained_path=str(checkpoint))
        self._folder, self._n_frames, self._batch_size = folder, n_frames, batch_size
        self._count = itertools.count()
        self._chunks: dict[Any, np.ndarray] = {}

    def alone(self, every: int | str) -> Any:
        """Return a call that asks the policy about what a replay asks."""
        from lerobot_attn.recording.asking import Moment, noise_of

        config: Any = self._policy.config
        step = config.n_action_steps if every == "chunk" else every
        assert isinstance(step, int)
        preprocessor, batches = self._processors[0], []
        frames = list(range(0, self._n_frames, step))
        for start in range(0, len(frames), self._batch_size):
            chosen = frames[start : start + self._batch_size]
            items = [self._dataset[frame] for frame in chosen]
            names = [name for name in items[0] if name.startswith("observation.")]
            batch = {name: torch.stack([item[name] for item in items]) for name in names}
            shape = (config.chunk_size, config.max_action_dim)
            noise = noise_of(shape, 0, [Moment(0, frame) for frame in chosen])
            batches.append((preprocessor({**batch, "task": [TASK] * len(chosen)}), noise))

        @torch.inference_mode()
        def run() -> None:
            chunks = [self._policy.predict_action_chunk(batch, noise=noise) for batch, noise in batches]
            self._same(every, torch.cat(chunks).float().numpy())

        return run

    def replayed(self, every: int | str) -> Any:
        """Return a call that replays the episode."""

        def run() -> None:
            folder = self._folder / f"replay_{next(self._count)}"
            preprocessor, postprocessor = self._processors
            record_dataset(
                self._policy,
                self._dataset,
                folder,
                AttentionConfig(),
                preprocessor=preprocessor,
                postprocessor=postprocessor,
                every=every,  # type: ignore[arg-type]
                batch_size=self._batch_size,
            )
            (episode,) = open_run(folder)
            self._same(every, episode.arrays["action_chunk"].values)

        return run

    def _same(self, every: Any, chunk: np.ndarray) -> None:
        if not np.array_equal(chunk, self._chunks.setdefault(every, chunk)):
            raise RuntimeError(f"{EVERY[every]}: the actions differ from the first run's, expected the same")

    @staticmethod
    def _write(root: Path, cameras: list[str], n_frames: int, image_px: int) -> None:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        picture = {
            "dtype": "image",
            "shape": (image_px, image_px, 3),
            "names": ["height", "width", "channels"],
        }
        features: dict[str, Any] = dict.fromkeys(cameras, picture)
        features["observation.state"] = {"dtype": "float32", "shape": (8,), "names": None}
        features["action"] = {"dtype": "float32", "shape": (7,), "names": None}
        dataset = LeRobotDataset.create("benchmarks/dataset", FPS, features, root=root, use_videos=False)
        for frame in range(n_frames):
            shown = dict.fromkeys(cameras, _picture(frame, image_px))
            numbers = {"observation.state": np.zeros(8, np.float32), "action": np.zeros(7, np.float32)}
            dataset.add_frame({**shown, **numbers, "task": TASK})
        dataset.save_episode()
        dataset.finalize()


def _picture(frame: int, image_px: int) -> np.ndarray:
    """Return (image_px, image_px, 3) uint8: a square that moves before smooth colours, with some noise."""
    across, down = np.meshgrid(*[np.linspace(40, 200, image_px)] * 2)
    picture = np.stack([across, down, np.full_like(across, 90)], axis=-1)
    side = image_px // 8
    left = frame * 3 % (image_px - side)
    picture[image_px // 2 : image_px // 2 + side, left : left + side] = 230
    noise = np.random.default_rng(frame).normal(0, 2, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    parsed = arguments(
        __doc__, ("--batch-size", {"type": int, "default": 4, "help": "frames in one call (default: 4)"})
    )
    before, quick = machine(), parsed.quick
    n_frames, image_px = (12, 32) if quick else (N_FRAMES, 360)
    settings = {"num_inference_steps": 2} if quick else {}
    results: list[Result] = []
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        replays = Replays(Path(name), n_frames, image_px, parsed.batch_size, **settings)
        for every, words in EVERY.items():
            kinds = {POLICY: replays.alone(every), "replayed": replays.replayed(every)}
            seconds = in_turns(kinds, parsed.runs, warm_up=not quick)
            what = f"an episode of {n_frames} frames, {words}"
            results += [
                ratio(
                    f"{what}: speed of the replay over that of {POLICY}",
                    seconds[POLICY],
                    seconds["replayed"],
                    at_least=AT_LEAST if every == 1 else None,
                    headline=every == 1,
                ),
                median(f"{what}: {POLICY}", seconds[POLICY], "s"),
            ]
            details[words] = seconds
    how = (
        "demo policy (LeRobot's own code and tokens, small layers), float32, batches of "
        f"{parsed.batch_size}; a LeRobotDataset with two cameras of 360 × 360 as PNGs; default settings, "
        "videos and all; in turns in one process; actions bit for bit the same"
    )
    return finish("replay", results, parsed, how=how, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
