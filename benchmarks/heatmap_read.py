#!/usr/bin/env python
"""Time and weigh the reading of one heatmap of a full-size episode, beside torch.load of the same maps.

    python benchmarks/heatmap_read.py [--episode EPISODE.zarr] [--repeats 20] [--json FILE]

One heatmap: first camera, one frame, layer 17, last denoise step, mean of the heads. Cold opens the episode
anew each time, warm has it open. The other layout is a `.pt` file per action: {denoise_step:
{"attention_weights": [layer, …]}} of float32 maps, here 10 steps and 2 layers, five files in turn. All files
are in the system's cache, which favours the layout that reads more. Each runs in a process of its own; memory
is its peak above the same process after its imports. Without an episode one of made-up numbers is written to
a temporary folder first (a minute).

Targets: cold 100 ms, warm 10 ms, 100 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LAYER = 17
N_FILES = 5
TARGETS = {"cold": 100.0, "warm": 10.0}
TARGET_MB = 100.0
KINDS = ("cold", "warm", "torch.load")


def peak_bytes() -> int:
    """Return this process's peak of resident memory; ru_maxrss would count the parent's as well."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: this benchmark needs Linux")


def read_bytes() -> int:
    """Return how many bytes this process has read from files, cached or not."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise RuntimeError("no rchar in /proc/self/io: this benchmark needs Linux")


def repeated(
    read: Callable[[int], np.ndarray], repeats: int, *, warm_up: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """Read different frames, and say how long each took, how much memory all did, and what came."""
    before = peak_bytes()
    if warm_up is not None:
        warm_up()
    read_before = read_bytes()
    times, values = [], np.empty(0)
    for number in range(repeats):
        start = time.perf_counter()
        values = read(number)
        times.append(1000 * (time.perf_counter() - start))
    return {
        "first_ms": times[0],
        "median_ms": statistics.median(times),
        "peak_mb": (peak_bytes() - before) / 1e6,
        "read_mb": (read_bytes() - read_before) / 1e6 / repeats,
        "heatmap": values.tolist(),
    }


def read_stores(kind: str, path: Path, repeats: int) -> dict[str, Any]:
    """Read heatmaps from the store; the last one is of the first inference."""
    import dask.array  # noqa: F401
    import xarray  # noqa: F401
    import zarr  # noqa: F401

    from lerobot_attn import analysis
    from lerobot_attn.store.reader import open_episode

    episode = open_episode(path)
    n_frames = episode.n_frames

    def warm_up() -> None:
        _ = episode.arrays

    def heatmap(number: int) -> np.ndarray:
        data = (open_episode(path) if kind == "cold" else episode).arrays
        frame = (repeats - 1 - number) * n_frames // repeats
        return analysis.image_heatmap(data, frame=frame, layer=LAYER, denoise_step=-1, head="mean").values

    return repeated(heatmap, repeats, warm_up=warm_up if kind == "warm" else None)


def read_pt(folder: Path, grid: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Read heatmaps from `.pt` files; the last one is of the first inference."""
    import torch

    def heatmap(number: int) -> np.ndarray:
        file = folder / f"action_{(repeats - 1 - number) % N_FILES}.pt"
        maps = torch.load(file, weights_only=True)
        attention = maps[max(maps)]["attention_weights"][-1]
        return attention[0, :, 0, : grid[0] * grid[1]].mean(0).reshape(grid).numpy()

    return repeated(heatmap, repeats)


def write_pt(path: Path, folder: Path) -> list[int]:
    """Write the first inferences' maps as the other layout has them, and return the grid of patches."""
    import torch

    from lerobot_attn import analysis
    from lerobot_attn.store.reader import open_episode

    data = open_episode(path).arrays
    for inference in range(N_FILES):
        maps = torch.from_numpy(data["suffix_attention"][inference].values.astype(np.float32))
        torch.save(
            {
                step: {"attention_weights": [layer.clone()[None] for layer in layers]}
                for step, layers in enumerate(maps.unbind())
            },
            folder / f"action_{inference}.pt",
        )
    _, geometry, _ = analysis.camera_geometry(data)
    return [geometry.grid_rows, geometry.grid_columns]


def in_process(*arguments: Any) -> Any:
    """Run this file in a process of its own, and return what it printed as JSON."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(path: Path, repeats: int) -> dict[str, Any]:
    """Run each kind in its process, and compare their heatmaps."""
    with tempfile.TemporaryDirectory() as folder:
        grid = in_process("--role", "write", "--episode", path, "--pt", folder)
        found = {
            kind: in_process(
                *("--role", kind, "--episode", path, "--pt", folder),
                *("--repeats", repeats, "--grid", *grid),
            )
            for kind in KINDS
        }
        size = (Path(folder) / "action_0.pt").stat().st_size
    heatmaps = [np.array(found[kind].pop("heatmap")) for kind in KINDS]
    for heatmap in heatmaps[1:]:
        np.testing.assert_allclose(heatmap, heatmaps[0], rtol=1e-5)
    other = found["torch.load"]["median_ms"]
    return {
        "kinds": found,
        "times_as_fast_as_torch_load": {kind: other / found[kind]["median_ms"] for kind in TARGETS},
        "pt_file_bytes": size,
        "repeats": repeats,
        "targets": {**{f"{kind}_ms": value for kind, value in TARGETS.items()}, "peak_mb": TARGET_MB},
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def show(found: dict[str, Any]) -> bool:
    """Print a table, and return whether the targets were met."""
    print(f"{found['machine']}, {found['cores']} cores, load {found['load_average']:.1f}")
    print(f"one .pt file: {found['pt_file_bytes'] / 1e6:.1f} MB; median of {found['repeats']}")
    print(f"{'':12}{'median ms':>12}{'first ms':>12}{'read MB':>12}{'peak MB':>12}{'target ms':>12}")
    met = True
    for kind, row in found["kinds"].items():
        target = TARGETS.get(kind)
        wanted = f"{target:.0f}" if target else ""
        numbers = [row[name] for name in ("median_ms", "first_ms", "read_mb", "peak_mb")]
        print(f"{kind:12}{''.join(f'{number:12.1f}' for number in numbers)}{wanted:>12}")
        if target:
            met &= row["median_ms"] < target and row["peak_mb"] < TARGET_MB
    for kind, ratio in found["times_as_fast_as_torch_load"].items():
        print(f"{kind}: {ratio:.1f} times as fast as torch.load")
    print(f"targets, {TARGET_MB:.0f} MB included: {'met' if met else 'MISSED'}")
    return met


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episode", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--role", choices=(*KINDS, "write"), help=argparse.SUPPRESS)
    parser.add_argument("--pt", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--grid", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "write":
        print(json.dumps(write_pt(arguments.episode, arguments.pt)))
        return 0
    if arguments.role == "torch.load":
        print(json.dumps(read_pt(arguments.pt, tuple(arguments.grid), arguments.repeats)))
        return 0
    if arguments.role:
        print(json.dumps(read_stores(arguments.role, arguments.episode, arguments.repeats)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.episode
        if path is None:
            from lerobot_attn.synthetic import write_softmax_episode

            path = write_softmax_episode(folder)
        found = measure(path, arguments.repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if show(found) else 1


if __name__ == "__main__":
    sys.exit(main())
