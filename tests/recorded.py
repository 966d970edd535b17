"""Small LeRobotDatasets on disk, whose pictures are kept without loss and whose numbers are known."""

from __future__ import annotations

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

FPS = 20
CAMERAS = ("observation.images.image", "observation.images.image2")


def picture(episode, frame, camera=0, size=32):
    """(size, size, 3) uint8: noise of its own for each frame, brighter from frame to frame."""
    noise = np.random.default_rng([episode, frame, camera])
    return noise.integers(0, 12, (size, size, 3), dtype=np.uint8) + np.uint8(60 * camera + 4 * (frame % 40))


def state(episode, frame, dim=8):
    return np.linspace(-0.2, 0.02, dim, dtype=np.float32) * (1 + episode) + np.float32(0.001 * frame)


def action(episode, frame, dim=7):
    return np.arange(dim, dtype=np.float32) / 10 + episode + np.float32(0.01 * frame)


def write_dataset(
    root, lengths, *, cameras=CAMERAS, tasks=("pick up the soup",), dims=(8, 7), size=32, videos=False
):
    """Write a data set of so many frames an episode; episode i has task i modulo their number."""
    kind = "video" if videos else "image"
    features = {
        camera: {"dtype": kind, "shape": (size, size, 3), "names": ["height", "width", "channels"]}
        for camera in cameras
    }
    for name, dim in zip(("observation.state", "action"), dims, strict=True):
        names = [f"{name.rpartition('.')[2]}_{'abcdefgh'[i]}" for i in range(dim)]
        features[name] = {"dtype": "float32", "shape": (dim,), "names": names}
    dataset = LeRobotDataset.create(f"tests/{root.name}", FPS, features, root=root, use_videos=videos)
    for episode, length in enumerate(lengths):
        for frame in range(length):
            shown = {camera: picture(episode, frame, i, size) for i, camera in enumerate(cameras)}
            numbers = {"observation.state": state(episode, frame, dims[0])}
            numbers["action"] = action(episode, frame, dims[1])
            dataset.add_frame({**shown, **numbers, "task": tasks[episode % len(tasks)]})
        dataset.save_episode(parallel_encoding=False)  # no fork of a process with threads
    dataset.finalize()
    return root
