#!/usr/bin/env python
"""How cost grows: time, stored bytes and memory over 1, 10, 100 episodes, batches of 1 to 8, 1 to 18 layers.

    python benchmarks/growth.py    # five minutes on two idle cores

A growth is the slope of log(cost) over log(size), the steepest between neighbouring sizes: 1 is linear, 0
flat, more than 1.1 is called super-linear. Each cost is the median of the rounds, sizes in turns.

Inferences are those of the demo policy, with 18 layers where layers are counted; so its maps have the shape
of Pi0.5's. Recorded is what they captured: episodes of one inference and 10 frames, without the cameras'
MP4s, the time until all is on disk. Memory is the peak of resident memory above what it was before.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from common import Result, arguments, finish, machine, timed
from policies import Player, infer, observation, tiny_policy

from lerobot_attn import AttentionConfig, capture_attention
from lerobot_attn.recording.background import BackgroundWriter
from lerobot_attn.sizes import folder_bytes
from lerobot_attn.store.runs import open_run

SUPER_LINEAR = 1.1
EPISODES, BATCH_SIZES, LAYERS, DEPTH = (1, 10, 100), (1, 2, 4, 8), (1, 2, 18), 18

WITH, WITHOUT = "inference with capture", "inference without capture"
OVERHEAD = "inference with capture over without"
# Not called super-linear: LeRobot's own time and memory. What capture adds may not grow faster than they do.
LIMITS = {
    f"{WITHOUT}: time": None,
    f"{WITHOUT}: peak memory": None,
    f"{WITH}: time": None,
    OVERHEAD: 0.1,
}

Costs = dict[str, dict[int, list[float]]]  # what it is, with its unit → size → of each round


class Growth(NamedTuple):
    """How a cost grows with a size."""

    least: float
    most: float


def growth(costs: Mapping[int, float]) -> Growth:
    """Return the flattest and the steepest slope of log(cost) over log(size) between neighbouring sizes.

    Args:
        costs: size → cost, both positive; at least two.
    """
    points = [(math.log(size), math.log(cost)) for size, cost in sorted(costs.items())]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    return Growth(min(slopes), max(slopes))


def peak_mb(call: Callable[[], Any]) -> float:
    """Return by how many MB a call raises the resident memory of this process at most, at least 1."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed counts again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status_kb("VmRSS")
    call()
    return max(1.0, (_status_kb("VmHWM") - before) * 1024 / 1e6)


def _status_kb(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"no {name} in /proc/self/status: this benchmark needs Linux")


def measure(call: Callable[[], Path | None]) -> dict[str, float]:
    """Return what a call costs; a folder that it returns is weighed and removed."""
    folders: list[Path | None] = []
    seconds: list[float] = []
    memory_mb = peak_mb(lambda: seconds.append(timed(lambda: folders.append(call()))))
    costs = {"time, s": seconds[0], "peak memory, MB": memory_mb}
    if folders[0] is not None:
        costs["stored bytes"] = folder_bytes(folders[0])
        shutil.rmtree(folders[0])
    return costs


class Sizes:
    """Measures what is done at several sizes, in turns."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, int], Callable[[], Path | None]] = {}

    def add(self, what: str, size: int, call: Callable[[], Path | None]) -> None:
        """Add a call to measure."""
        self._calls[what, size] = call

    def costs(self, runs: int) -> Costs:
        """Measure: a round to warm up, and then those that count, each in another order."""
        costs: Costs = {}
        keys = list(self._calls)
        for round_ in range(-1, runs):
            turn = max(round_, 0) % len(keys)  # an inference is made before it is recorded
            for what, size in keys[turn:] + keys[:turn]:
                found = measure(self._calls[what, size])
                for name, value in found.items() if round_ >= 0 else ():
                    costs.setdefault(f"{what}: {name}", {}).setdefault(size, []).append(value)
        # The first size is not the first in every round.
        return {what: dict(sorted(by_size.items())) for what, by_size in costs.items()}


class Recordings:
    """Captures inferences of a policy and records them, each time into a new folder.

    Args:
        folder: where to.
        stack: ends the captures.
    """

    def __init__(self, folder: Path, stack: ExitStack):
        self._folders = (folder / str(number) for number in itertools.count())
        self._stack = stack

    def of(
        self, policy: Any, batch_size: int = 1, **settings: Any
    ) -> tuple[Callable[[], None], Callable[..., Path]]:
        """Return two calls: make an inference with capture, and record n episodes of the latest."""
        config = AttentionConfig(cameras=False, **settings)
        batch = observation(policy, batch_size)
        watch = capture_attention(policy, config, max_records=1)
        capture = self._stack.enter_context(watch)

        def make() -> None:
            infer(policy, batch)

        def record(n_episodes: int = 1) -> Path:
            folder = next(self._folders)
            player = Player(capture, config, folder)
            writer = BackgroundWriter(config.queue_mb * 1_000_000)
            for _ in range(n_episodes):
                player.play(writer, batch, list(capture.records))
                writer.flush()
            writer.close()
            return folder

        return make, record


def over_episodes(sizes: tuple[int, ...], runs: int, folder: Path, **policy: Any) -> Costs:
    """Record so many episodes, and open the run and its table."""
    measured = Sizes()
    with ExitStack() as stack:
        make, record = Recordings(folder, stack).of(tiny_policy(**policy))
        make()
        for size in sizes:
            measured.add("recording", size, lambda size=size: record(size))
            run = record(size)
            measured.add("open_run and its table", size, lambda run=run: _read(run))
        return measured.costs(runs)


def over_batches(sizes: tuple[int, ...], runs: int, folder: Path, **policy: Any) -> Costs:
    """Make an inference for so many environments, without and with capture, and record it."""
    measured = Sizes()
    plain = tiny_policy(**policy)
    with ExitStack() as stack:
        recordings = Recordings(folder, stack)
        for size in sizes:
            batch = observation(plain, size)
            make, record = recordings.of(tiny_policy(**policy), batch_size=size)
            measured.add(WITHOUT, size, lambda batch=batch: _discard(infer(plain, batch)))
            measured.add(WITH, size, make)
            measured.add("recording", size, record)
        costs = measured.costs(runs)
    over, under = (costs[f"{what}: time, s"] for what in (WITH, WITHOUT))
    costs[f"{OVERHEAD}, ×"] = {
        size: [a / b for a, b in zip(over[size], under[size], strict=True)] for size in sizes
    }
    return costs


def over_layers(sizes: tuple[int, ...], runs: int, folder: Path, *, depth: int, **policy: Any) -> Costs:
    """Make an inference of which so many layers are captured in full, and record it."""
    measured = Sizes()
    with ExitStack() as stack:
        recordings = Recordings(folder, stack)
        for size in sizes:
            last = list(range(depth - size, depth))
            make, record = recordings.of(tiny_policy(depth=depth, **policy), layers=last)
            measured.add(WITH, size, make)
            measured.add("recording", size, record)
        return measured.costs(runs)


def _discard(_: Any) -> None:
    """Nothing was written."""


def _read(run: Path) -> None:
    if not len(open_run(run).table):
        raise RuntimeError(f"{run}: got an empty table, expected the episodes that were recorded")


def claims(axis: str, costs: Costs) -> list[Result]:
    """Return the growth of each cost over one axis."""
    results = []
    for what, by_size in costs.items():
        found = growth({size: statistics.median(values) for size, values in by_size.items()})
        name, sizes = what.partition(",")[0], ", ".join(map(str, by_size))
        results.append(
            Result(
                f"{name}, over {sizes} {axis}",
                found.most,
                "log/log",
                found.least,
                found.most,
                at_most=LIMITS.get(name, SUPER_LINEAR),
            )
        )
    return results


def main() -> int:
    """Measure, print and write JSON; exit status 1 where something grows super-linearly."""
    parsed = arguments(__doc__)
    before = machine()
    episodes, batch_sizes, layers, depth = EPISODES, BATCH_SIZES, LAYERS, DEPTH
    policy: dict[str, Any] = {}
    if parsed.quick:
        episodes, batch_sizes, layers, depth = (1, 2), (1, 2), (1, 2), 2
        policy = {"num_inference_steps": 2}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = {
            "episodes": over_episodes(episodes, parsed.runs, folder / "episodes", **policy),
            "environments of a batch": over_batches(batch_sizes, parsed.runs, folder / "batches", **policy),
            "layers": over_layers(layers, parsed.runs, folder / "layers", depth=depth, **policy),
        }
    results = [result for axis, costs in measured.items() for result in claims(axis, costs)]
    steepest = max((r for r in results if r.at_most == SUPER_LINEAR), key=lambda result: result.value)
    results.append(
        Result(
            f"steepest growth of any cost with episodes, batch or layers ({steepest.what})",
            steepest.value,
            "log/log",
            at_most=SUPER_LINEAR,
            headline=True,
        )
    )
    medians = {
        axis: {
            what: {str(size): statistics.median(values) for size, values in by_size.items()}
            for what, by_size in costs.items()
        }
        for axis, costs in measured.items()
    }
    how = (
        "slope of log(cost) over log(size), the steepest (and the flattest) between neighbouring sizes; demo "
        "policy, Pi0.5's map sizes, default capture without camera MP4s"
    )
    return finish(
        "growth", results, parsed, how=how, before=before, details={"medians": medians, "rounds": measured}
    )


if __name__ == "__main__":
    sys.exit(main())
