"""What the benchmarks share: runs side by side, ratios of medians, one table, JSON that README's is made of.

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
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numcodecs
    import zarr

    from lerobot_attn.store.writer import EpisodeWriter
    from lerobot_attn.synthetic import SyntheticPlan

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("lerobot", "torch", "zarr", "numcodecs", "xarray", "dask", "zarrs", "numpy")


@dataclass(frozen=True)
class Result:
    """One claim.

    Attributes:
        what: what was measured, with its conditions, as README's table shall say it.
        value: the median.
        unit: "×" for a ratio, "MB", "MB/s", "ms", ….
        least: smallest of the runs; None where there was one.
        most: largest of the runs.
        at_most: target, where small is good.
        at_least: target, where large is good.
        headline: whether README's table has it.
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


class MadeUpMaps(NamedTuple):
    """What a made-up policy attends to in one inference, rows sum to 1.

    Attributes:
        full: (denoise_step, layer, head, query, key), float32.
        means: (denoise_step, all_layer, head, key), float32, over the executed queries.
    """

    full: np.ndarray
    means: np.ndarray

    def as_bfloat16(self) -> MadeUpMaps:
        """Return the maps of the same policy run in bfloat16, which rounds each softmax.

        The means stay: they are taken in float32, and a mean of rounded values has as many bits as another.
        """
        return MadeUpMaps(_round_to_bfloat16(self.full), self.means)

    def as_float16(self) -> MadeUpMaps:
        """Return the maps as they are stored."""
        return MadeUpMaps(self.full.astype(np.float16), self.means.astype(np.float16))


class MadeUpEpisode:
    """An episode of maps that are made as a policy makes them, of random queries and keys; no policy runs.

    A row is softmax(sharpness · q·k/√256 + sinks) in float32. As in Pi0.5, all heads share a layer's keys.
    Keys are normal, and patches resemble their neighbours (a Gaussian of 1.5 patches). A query is the sum of
    normal parts: one of its head, with a standard deviation of 1; one of 0.5 that changes slowly along the
    chunk (a Gaussian of 8 tokens); one of its own of 0.4 · flow time; one of 0.1 that is new at each denoise
    step. Sinks are begin-of-sequence (+5) and three patches per head (+4). Masked keys (the empty camera,
    unused language slots) are exactly 0. With a sharpness of 2, a full-size row is spread over 42 keys
    effectively (exp of its entropy) and its largest weight is 0.23, on average. Trained policies' maps were
    not at hand.

    Args:
        plan: its sizes.
        sharpness: standard deviation of the logits before the sinks.
    """

    def __init__(self, plan: SyntheticPlan, *, sharpness: float = 2.0):
        self.plan = plan
        self.sharpness = sharpness
        self._read_tables()

    def maps(self, inference: int) -> MadeUpMaps:
        """Make the maps of an inference; the same ones each time."""
        plan = self.plan
        shape = (plan.n_denoise_steps, plan.n_layers, plan.n_heads, plan.layout.n_keys)
        full, means = [], np.empty(shape, np.float32)
        for layer in range(plan.n_layers):
            is_full = layer in plan.layers
            rows = self._layer(inference, layer, plan.n_queries if is_full else plan.n_executed)
            means[:, layer] = rows[:, :, : plan.n_executed].mean(axis=2)
            if is_full:
                full.append(rows)
        return MadeUpMaps(np.stack(full, axis=1), means)

    def rows(self, inference: int, maps: MadeUpMaps) -> dict[str, np.ndarray]:
        """Return what `EpisodeWriter.append_inference` takes; `maps` are float16."""
        return {
            **self._inference_rows[inference],
            "suffix_attention": maps.full,
            "suffix_attention_mean": maps.means,
        }

    def frame_rows(self, inference: int) -> dict[str, np.ndarray]:
        """Return what `EpisodeWriter.append_frames` takes: the frames of an inference's actions."""
        mine = self._frames["frame_inference"] == inference
        return {name: values[mine] for name, values in self._frames.items()}

    def writer(self, path: Path) -> EpisodeWriter:
        """Return the package's writer for this episode, with the default compression."""
        from lerobot_attn.store.writer import Compression, EpisodeWriter

        return EpisodeWriter(
            path,
            sizes=self._sizes,
            coordinates=self._coordinates,
            attributes=self._attributes,
            compression=Compression(),
            optional={"suffix_attention", "suffix_attention_mean", "state", "reward", "success"},
        )

    def write(self, path: Path, make: Callable[[int], MadeUpMaps]) -> None:
        """Write the whole episode; `make` gives the float16 maps of an inference."""
        writer = self.writer(path)
        for inference in range(self.plan.n_inferences):
            writer.append_inference(self.rows(inference, make(inference)))
            writer.append_frames(self.frame_rows(inference))
            writer.commit()
        writer.close(complete=True)

    def _layer(self, inference: int, layer: int, n_queries: int) -> np.ndarray:
        """Return (denoise_step, head, query, key), float32."""
        plan, rank = self.plan, 256
        rng = np.random.default_rng((plan.seed, inference, layer))
        slots = self._inference_rows[inference]["key_kind"]

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, dtype=np.float32)

        keys = normal(plan.layout.n_keys, rank)
        near = _resemblance(np.argwhere(np.ones(plan.grid)), 1.5)
        cameras = [part for part in plan.layout.segments if part.kind == "image"]
        for part in cameras:
            patches = keys[part.start : part.stop]
            keys[part.start : part.stop] = 0.8 * near @ patches + 0.6 * patches
        sinks = np.where(slots == 0, np.float32(-np.inf), np.float32(0))[None].repeat(plan.n_heads, axis=0)
        sinks[:, plan.layout.language.start] += 5
        for head in sinks:
            head[rng.choice(np.flatnonzero(slots == 1), 3, replace=False)] += 4
        along_chunk = _resemblance(np.arange(plan.n_queries)[:, None], 8)[:n_queries]
        head_part = normal(plan.n_heads, 1, rank)
        slow_part = 0.5 * (along_chunk @ normal(plan.n_heads, plan.n_queries, rank))
        own_part = 0.4 * normal(plan.n_heads, n_queries, rank)
        rows = np.empty((plan.n_denoise_steps, plan.n_heads, n_queries, plan.layout.n_keys), np.float32)
        for step, logits in enumerate(rows):
            flow_time = 1 - step / plan.n_denoise_steps
            queries = head_part + slow_part + flow_time * own_part + 0.1 * normal(*own_part.shape)
            np.matmul(queries * (self.sharpness / rank**0.5), keys.T, out=logits)
            logits += sinks[:, None]
            logits -= logits.max(axis=-1, keepdims=True)
            np.exp(logits, out=logits)
            logits /= logits.sum(axis=-1, keepdims=True)
        return rows

    def _read_tables(self) -> None:
        """Take all but the maps from an episode that the package makes, written with the smallest maps."""
        from lerobot_attn.store.reader import open_episode
        from lerobot_attn.store.schema import BY_NAME
        from lerobot_attn.synthetic import write_softmax_episode

        plan = self.plan
        small = replace(plan, n_layers=1, layers=(), n_heads=1, n_denoise_steps=1, videos=False)
        with tempfile.TemporaryDirectory() as folder:
            episode = open_episode(write_softmax_episode(folder, small))
            data = episode.arrays.load()
        policy = {
            "n_layers": plan.n_layers,
            "n_heads": plan.n_heads,
            "n_denoise_steps": plan.n_denoise_steps,
        }
        self._attributes = {**episode.attributes, "policy": {**episode.attributes["policy"], **policy}}
        counts = {
            "denoise_step": plan.n_denoise_steps,
            "layer": len(plan.layers),
            "all_layer": plan.n_layers,
            "head": plan.n_heads,
        }
        self._sizes = {**{str(dim): size for dim, size in data.sizes.items()}, **counts}
        self._coordinates = {name: np.arange(size) for name, size in counts.items()}
        self._coordinates["layer"] = np.array(plan.layers)
        self._coordinates["flow_time"] = 1 - np.arange(plan.n_denoise_steps) / plan.n_denoise_steps
        self._inference_rows: list[dict[str, np.ndarray]] = [{} for _ in range(plan.n_inferences)]
        self._frames: dict[str, np.ndarray] = {}
        for name, variable in data.variables.items():
            spec = BY_NAME[str(name)]
            if spec.grows_with == "frame":
                self._frames[spec.name] = variable.values
            elif spec.grows_with == "inference" and not spec.sharded:
                for rows, values in zip(self._inference_rows, variable.values, strict=True):
                    rows[spec.name] = values
            elif spec.grows_with is None:
                self._coordinates.setdefault(spec.name, variable.values)


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


def _resemblance(positions: np.ndarray, width: float) -> np.ndarray:
    """Return weights, (position, position) of float32, that make neighbours alike and keep the variance."""
    squared = ((positions[:, None] - positions[None]) ** 2).sum(axis=-1)
    weights = np.exp(-squared / (2 * width**2))
    normed: np.ndarray = (weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))).astype(np.float32)
    return normed


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    import torch

    rounded: np.ndarray = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    return rounded


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
