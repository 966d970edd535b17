#!/usr/bin/env python
"""Time the overlay of a full-size episode: 280 frames, one camera of 360 × 360, into an MP4.

    python benchmarks/overlay_speed.py [--episode EPISODE.zarr] [--runs 5] [--json FILE]

Without an episode one of made-up numbers is written to a temporary folder first (a minute). Prints frames per
second of each run and the median, then where the time of a run goes. The first run is counted: it warms
nothing but the disk cache. Target: 60 frames a second on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lerobot_attn.overlay import OverlaySettings, overlay_frames, write_overlay
from lerobot_attn.store.reader import Episode, open_episode
from lerobot_attn.synthetic import write_softmax_episode
from lerobot_attn.video import VideoWriter, read_frames

TARGET = 60.0


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and the result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def breakdown(episode: Episode, folder: Path) -> dict[str, float]:
    """Return the seconds of each part alone; encoding runs beside the rest in a process of its own."""
    camera, video = next(iter(episode.videos.items()))
    reading, frames = timed(lambda: overlay_frames(open_episode(episode.path)))
    drawing, drawn = timed(lambda: list(frames))
    writer = VideoWriter(folder / "encoded.mp4", fps=20, size_px=drawn[0].shape[:2], fast=True)

    def encode() -> None:
        for frame in drawn:
            writer.write(frame)
        writer.close()

    return {
        "read the maps": reading,
        f"draw, with decoding {camera.rpartition('.')[2]}": drawing,
        "of that, decode": timed(lambda: sum(1 for _ in read_frames(video)))[0],
        "encode": timed(encode)[0],
    }


def measure(path: Path, runs: int) -> dict[str, Any]:
    """Write the overlay several times."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = []
        for _ in range(runs):
            seconds, written = timed(
                lambda: write_overlay(open_episode(path), folder / "overlay.mp4", OverlaySettings())
            )
            rates.append(written.n_frames / seconds)
        episode = open_episode(path)
        return {
            "frames": written.n_frames,
            "file_bytes": written.path.stat().st_size,
            "frames_per_s": rates,
            "median_frames_per_s": statistics.median(rates),
            "target_frames_per_s": TARGET,
            "seconds": breakdown(episode, folder),
            "cores": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        }


def episodes(path: Path | None) -> Iterator[Path]:
    """Yield the episode, which is written first where none is given."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield write_softmax_episode(folder)


def main() -> int:
    """Measure, print and write JSON; exit status 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episode", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for path in episodes(arguments.episode):
        found = measure(path, arguments.runs)
    print(f"{found['machine']}, {found['cores']} cores, load {found['load_average']:.1f}")
    rates = ", ".join(f"{rate:.0f}" for rate in found["frames_per_s"])
    print(f"{found['frames']} frames: {rates} frames/s; {found['file_bytes'] / 1e6:.1f} MB")
    print(f"median {found['median_frames_per_s']:.0f} frames/s, target {TARGET:.0f}")
    for part, seconds in found["seconds"].items():
        print(f"{seconds:8.2f} s  {part}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if found["median_frames_per_s"] >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
