"""What the benchmarks share: runs side by side, ratios of medians, one table, JSON that the docs quote.

A claim is a ratio wherever it can be one: both sides in one run, on the same data, in turns, so that a busy
machine slows both. Seconds are in the details only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numcodecs
    import zarr


RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("lerobot", "torch", "zarr", "numcodecs", "xarray", "dask", "zarrs", "numpy")


@dataclass(frozen=True)
class Result:
    """One claim.

    Attributes:
        what: what was measured, with its conditions, as the table in docs/benchmarks.md shall say it.
        value: the median.
        unit: "×" for a ratio, "MB", "MB/s", "ms", ….
        least: smallest of the runs; None where there was one.
        most: largest of the runs.
        at_most: target, where small is good.
        at_least: target, where large is good.
        headline: whether that table has it.
    """

    what: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None
    at_most: float | None = None
    at_least: float | None = None
    headline: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.at_most is None and self.at_least is None:
            return None
        low = self.at_most is None or self.value <= self.at_most
        return low and (self.at_least is None or self.value >= self.at_least)


def number(value: float) -> str:
    """Return three significant digits, and no fewer than the whole part."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def shown(result: Result) -> str:
    """Return the value with its unit and spread, e.g. "1.02× (1.00–1.05)"."""
    space = "" if result.unit in ("×", "%") else " "
    text = f"{number(result.value)}{space}{result.unit}"
    if result.least is None or result.most is None or result.least == result.most:
        return text
    return f"{text} ({number(result.least)}–{number(result.most)})"


def target(result: Result) -> str:
    """Return the target, e.g. "≤ 1.05"."""
    if result.at_most is not None:
        return f"≤ {result.at_most:g}"
    return f"≥ {result.at_least:g}" if result.at_least is not None else ""


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that a call takes, with the garbage of what ran before collected first."""
    gc.collect()
    start = clock()
    call()
    return clock() - start


def in_turns(
    kinds: Mapping[str, Callable[[], Any]],
    runs: int,
    *,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time each kind `runs` times, in turns and each round in another order.

    Args:
        kinds: name → what to time.
        runs: rounds that count.
        warm_up: run each once before.
        clock: what counts; `time.process_time` counts the seconds that this process has had of the cores,
            however busy others keep them, and none in which it waits for a disk.

    Returns:
        name → seconds of each round.
    """
    if warm_up:
        for call in kinds.values():
            call()
    names, seconds = list(kinds), {name: [] for name in kinds}
    for round_ in range(runs):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(kinds[name], clock))
    return seconds


def ratio(what: str, over: Sequence[float], under: Sequence[float], **claim: Any) -> Result:
    """Return the median of the rounds' ratios over / under; least and most are of the rounds too."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return Result(what, statistics.median(ratios), "×", min(ratios), max(ratios), **claim)


def median(what: str, values: Sequence[float], unit: str, **claim: Any) -> Result:
    """Return the median of the rounds."""
    return Result(what, statistics.median(values), unit, min(values), max(values), **claim)


class StoredCodec(NamedTuple):
    """What the store does to a chunk, without the store.

    Attributes:
        order: of the chunk's axes before compression, e.g. (0, 1, 2, 3, 5, 4).
        blosc: the compressor.
    """

    order: tuple[int, ...]
    blosc: numcodecs.Blosc


def stored_codec(array: zarr.Array[Any]) -> StoredCodec:
    """Return the order of axes and the compressor that an array's own metadata names."""
    import numcodecs

    order: tuple[int, ...] = tuple(range(array.ndim))
    for codec in array.filters:
        found: Any = codec.to_dict()
        if found["name"] != "transpose":
            raise ValueError(f"{array.path}: got the filter {found['name']}, expected none or transpose")
        order = tuple(found["configuration"]["order"])
    blosc: Any = array.compressors[0].to_dict()
    if blosc["name"] != "blosc":
        raise ValueError(f"{array.path}: got the compressor {blosc['name']}, expected blosc")
    settings = blosc["configuration"]
    shuffle = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}[settings["shuffle"]]
    return StoredCodec(order, numcodecs.Blosc(settings["cname"], settings["clevel"], shuffle))


def pin_to_one_core() -> None:
    """Run this program again from its start on one core, unless it is: all its threads share that core.

    A running process would not do: libraries have started threads by then, which keep their cores.
    """
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:
        os.sched_setaffinity(0, {max(cores)})
        os.execv(sys.executable, [sys.executable, *sys.argv])


def original_layout(maps: np.ndarray) -> dict[int, dict[str, list[Any]]]:
    """Return what the predecessor saved per action: {denoise_step: {"attention_weights": [layer, …]}}.

    Args:
        maps: (denoise_step, layer, head, query, key); the tensors are (1, head, query, key), of its dtype.
    """
    import torch

    return {
        step: {"attention_weights": [layer.clone()[None] for layer in layers]}
        for step, layers in enumerate(torch.from_numpy(maps).unbind())
    }


def filesystem(path: Path) -> str:
    """Return the kind of filesystem that a path is on, e.g. "ext4" or "tmpfs"."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    over = [(mount[1], mount[2]) for mount in mounts if path.resolve().is_relative_to(mount[1])]
    return max(over, key=lambda mount: len(mount[0]))[1]


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what the numbers were measured on."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "device": device,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages,
        "load_before": round(os.getloadavg()[0], 2),
    }


def arguments(doc: str, *options: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """Parse the command line that all benchmarks share, and a benchmark's own options.

    Args:
        doc: the benchmark's docstring; its first line is the help text.
        options: (flag, keywords of `add_argument`).
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes and one round: does it run? Says nothing of speed"
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="where to write the result (default: benchmarks/results; nowhere if --quick)",
    )
    for flag, keywords in options:
        parser.add_argument(flag, **keywords)
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.runs = 1
    return parsed


def finish(
    name: str,
    results: Sequence[Result],
    parsed: argparse.Namespace,
    *,
    how: str,
    before: Mapping[str, Any],
    details: Mapping[str, Any] | None = None,
) -> int:
    """Print the table, write the JSON, and return the exit status: 1 where a target is missed.

    Args:
        name: the benchmark's, and the JSON file's.
        results: the claims.
        parsed: what `arguments` returned.
        how: data and method in a sentence or two.
        before: what `machine` returned before the first run.
        details: numbers behind the claims.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name, title_justify="left", caption=how, caption_justify="left")
    table.add_column("what", overflow="fold")
    for column in ("result", "target", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        met = {None: "", True: "met", False: "MISSED"}[result.met]
        table.add_row(result.what, shown(result), target(result), met)
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    if parsed.quick:
        print("--quick: tiny sizes and one round, these numbers say nothing of speed")
    file = parsed.json or (None if parsed.quick else RESULTS / f"{name}.json")
    if file is not None:
        document = {
            "benchmark": name,
            "how": how,
            "runs": parsed.runs,
            "quick": parsed.quick,
            "machine": dict(before),
            "results": [asdict(result) for result in results],
            "details": dict(details or {}),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if parsed.quick or all(result.met is not False for result in results) else 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
