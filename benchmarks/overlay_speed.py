#!/usr/bin/env python
"""Time the overlay of a full-size episode: 280 frames, one camera of 360 × 360, into an MP4.

    python benchmarks/overlay_speed.py [--episode EPISODE.zarr]

Without an episode one of made-up numbers is written to a temporary folder first (a minute). The first run is
counted: it warms nothing but the disk cache. The JSON also tells where the time of a run goes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import arguments, finish, machine, median, timed

from lerobot_attn.overlay import OverlaySettings, overlay_frames, write_overlay
from lerobot_attn.store.reader import Episode, open_episode
from lerobot_attn.store.video import VideoWriter, count_frames, read_frames
from lerobot_attn.synthetic import SyntheticPlan, write_softmax_episode

AT_LEAST_FRAMES_PER_S = 60.0
N_FRAMES, N_FRAMES_QUICK = 280, 10


def breakdown(episode: Episode, folder: Path) -> dict[str, float]:
    """Return the seconds of each part alone; encoding runs beside the rest in a process of its own."""
    camera, video = next(iter(episode.videos.items()))
    made: dict[str, Any] = {}

    def keep(name: str, call: Callable[[], Any]) -> float:
        return timed(lambda: made.__setitem__(name, call()))

    reading = keep("frames", lambda: overlay_frames(open_episode(episode.path)))
    drawing = keep("drawn", lambda: list(made["frames"]))
    drawn = made["drawn"]

    def encode() -> None:
        writer = VideoWriter(folder / "encoded.mp4", fps=20, size_px=drawn[0].shape[:2], fast=True)
        for frame in drawn:
            writer.write(frame)
        writer.close()

    return {
        "read the maps": reading,
        f"draw, with decoding {camera.rpartition('.')[2]}": drawing,
        "of that, decode": timed(lambda: sum(1 for _ in read_frames(video))),
        "encode": timed(encode),
    }


def main() -> int:
    """Measure, print and write JSON; exit status 1 where the target is missed."""
    parsed = arguments(__doc__, ("--episode", {"type": Path, "help": "an episode's store"}))
    before = machine()
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name), parsed.episode
        if path is None:
            n_frames = N_FRAMES_QUICK if parsed.quick else N_FRAMES
            path = write_softmax_episode(folder, SyntheticPlan.full_size(n_frames))
        episode, target = open_episode(path), folder / "overlay.mp4"

        def write() -> None:
            write_overlay(open_episode(path), target, OverlaySettings())

        rates = [episode.n_frames / timed(write) for _ in range(parsed.runs)]
        details = {
            "frames": count_frames(target),
            "file_bytes": target.stat().st_size,
            "frames_per_s": rates,
            "seconds": breakdown(episode, folder),
        }
    what = f"overlay of {details['frames']} full-size frames, one camera of 360 × 360, into an MP4"
    results = [median(what, rates, "frames/s", at_least=AT_LEAST_FRAMES_PER_S, headline=True)]
    how = "made-up softmax numbers" if parsed.episode is None else f"episode {parsed.episode.name}"
    return finish("overlay_speed", results, parsed, how=how, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
