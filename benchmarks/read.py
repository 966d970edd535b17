#!/usr/bin/env python
"""Read maps, heatmaps, means and a whole episode: time and memory, beside torch.load of `.pt` files.

    python benchmarks/read.py [--runs 5] [--episode EPISODE.zarr] [--quick] [--json FILE]

The episode has 145 steps of Pi0.5's sizes: two layers' maps and all layers' means of 15 inferences. The
original layout is a `.pt` per action, {denoise_step: {"attention_weights": [layer, …]}} of float32 maps. To
look at one map all of a file is loaded, so it matters what else is in it; three kinds are tried:

    pt, same layers   a file per action with the same two layers: 33 MB
    pt, all layers    a file per action with all 18 layers, which is what the original layout has: 293 MB;
                      beside it the same file loaded with mmap=True, which reads what is touched
    pt, episode       one file with the same two layers of the episode, each inference once: 489 MB

The store is read cold (opened anew each time) and warm (the dataset is open). All files are in the system's
cache, which favours the layouts that read more. What is asked:

    map       (head, query, key) of one inference, the last layer and denoise step, raw
    heatmap   first camera, one frame, last layer and step, mean of the heads
    means     one frame's means over the executed queries: every denoise step, layer and head
    scan      mean over denoise steps, heads and queries of every inference and stored layer, with Dask

Each layout has a process of its own for each question, all take turns, and all answers are compared. Memory
is the process's peak above what it had after its imports. Answers from "all layers" are compared in the
layers that the store has maps of, because the others' maps are made up of these.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from common import Result, arguments, finish, machine, median, original_layout, ratio
from made_up import MadeUpEpisode

from lerobot_attn.sizes import folder_bytes
from lerobot_attn.synthetic import SyntheticPlan

if TYPE_CHECKING:
    import xarray as xr

COLD, WARM, DASK = "store, cold", "store, warm", "store, Dask"
SAME, ALL, MMAP, EPISODE = "pt, same layers", "pt, all layers", "pt, all layers, mmap", "pt, episode"
QUESTIONS = {
    "map": (COLD, WARM, SAME, ALL, MMAP, EPISODE),
    "heatmap": (COLD, WARM, SAME),
    "means": (COLD, WARM, ALL, MMAP),
    "scan": (DASK, SAME, EPISODE),
}
N_ALL_LAYERS = 2  # files with all layers: two are enough to read in turns, and large
QUICK_ROUNDS_PER_RUN = 2  # of the questions that are quick to answer; a scan is not
IMPORTS = ("torch", "dask.array", "zarr", "xarray", "lerobot_attn.analysis", "lerobot_attn.store.reader")
TARGETS_MS = {COLD: 100.0, WARM: 10.0}
TARGET_MB = 100.0
HOW = (
    "145 steps of Pi0.5's sizes, made-up softmax maps (MadeUpEpisode in benchmarks/made_up.py); each layout "
    "and question in a process of its own, in turns; all files in the system's cache; memory is the peak "
    "above the imports."
)


class Places(NamedTuple):
    """Where the layouts lie, and what a reader of `.pt` files must know beside them.

    Attributes:
        store: the episode.
        pt: folder of the `.pt` files.
        frame_inference: which inference gave each frame's action.
        n_executed: actions executed per inference.
        layers: positions of the store's full maps among all layers.
        grid: rows and columns of the first camera's patches, which are the first keys.
    """

    store: Path
    pt: Path
    frame_inference: tuple[int, ...]
    n_executed: int
    layers: tuple[int, ...]
    grid: tuple[int, int]

    def same_layers(self, inference: int) -> Path:
        """Return the file of an inference's action; the other actions' files would hold the same."""
        return self.pt / f"same_{inference}.pt"

    def all_layers(self, inference: int) -> Path:
        """Return the file with the maps of all layers."""
        return self.pt / f"all_{inference}.pt"

    @property
    def episode(self) -> Path:
        """The file with all inferences."""
        return self.pt / "episode.pt"


class Turn(NamedTuple):
    """What one reading gave.

    Attributes:
        ms: how long it took, milliseconds.
        answer: what was read.
    """

    ms: float
    answer: np.ndarray


class Cost(NamedTuple):
    """What a process has used so far.

    Attributes:
        peak_bytes: most resident memory.
        read_bytes: read from files, cached or not; memory maps do not count.
    """

    peak_bytes: int
    read_bytes: int


@dataclass(frozen=True)
class Reading:
    """How one layout did at one question.

    Attributes:
        ms: of each round.
        first_ms: of the first reading of the process, which does not count.
        peak_mb: memory above the imports.
        read_mb: read from files in one round.
    """

    ms: list[float]
    first_ms: float
    peak_mb: float
    read_mb: float


def _number_after(file: str, label: str) -> int:
    for line in Path("/proc/self", file).read_text(encoding="utf-8").splitlines():
        if line.startswith(label):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/{file} has no {label}: this benchmark needs Linux")


def cost() -> Cost:
    """Return what this process has used; ru_maxrss would count the parent's memory as well."""
    return Cost(_number_after("status", "VmHWM:") * 1024, _number_after("io", "rchar:"))


_read: Callable[[int], np.ndarray]  # set in a process of its own, by `start`


def start(question: str, layout: str, places: Places) -> Cost:
    """Make this process ready for one layout and question."""
    global _read
    if layout in (COLD, WARM, DASK):
        _read = store_reader(question, layout, places)
    else:
        _read = pt_reader(question, layout, places)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: imports are no reading
    return cost()


def turn(inference: int) -> Turn:
    """Read once."""
    start_s = time.perf_counter()
    answer = _read(inference)
    return Turn(1000 * (time.perf_counter() - start_s), answer)


def store_reader(question: str, layout: str, places: Places) -> Callable[[int], np.ndarray]:
    """Return what answers a question from the store."""
    import dask.array  # noqa: F401
    import zarr  # noqa: F401

    from lerobot_attn import analysis
    from lerobot_attn.store.reader import open_episode

    def one_map(data: xr.Dataset, inference: int) -> np.ndarray:
        return data["suffix_attention"][inference, -1, -1].values

    def heatmap(data: xr.Dataset, inference: int) -> np.ndarray:
        frame, layer = places.frame_inference.index(inference), int(data["layer"][-1])
        chosen = analysis.image_heatmap(data, frame=frame, layer=layer, denoise_step=-1, head="mean")
        return chosen.values

    def means(data: xr.Dataset, inference: int) -> np.ndarray:
        frame = places.frame_inference.index(inference)
        return data["suffix_attention_mean"][int(data["frame_inference"][frame])].values

    def scan(data: xr.Dataset, inference: int) -> np.ndarray:
        maps = data["suffix_attention"].astype(np.float32)
        return maps.mean(("denoise_step", "head", "query"), skipna=False).compute().values

    ask = {"map": one_map, "heatmap": heatmap, "means": means, "scan": scan}[question]
    episode = open_episode(places.store)
    if layout == DASK:
        return lambda inference: ask(open_episode(places.store).dataset, inference)
    if layout == COLD:
        return lambda inference: ask(open_episode(places.store).arrays, inference)
    return lambda inference: ask(episode.arrays, inference)


def pt_reader(question: str, layout: str, places: Places) -> Callable[[int], np.ndarray]:
    """Return what answers a question from `.pt` files."""
    import torch

    last = places.layers[-1] if layout in (ALL, MMAP) else -1

    def load(inference: int) -> dict[int, Any]:
        """Return {denoise_step: {"attention_weights": [layer, …]}}, tensors (1, head, query, key)."""
        if layout == EPISODE:
            found: dict[int, Any] = torch.load(places.episode, weights_only=True)[inference]
        elif layout == SAME:
            found = torch.load(places.same_layers(inference), weights_only=True)
        else:
            found = torch.load(places.all_layers(inference), weights_only=True, mmap=layout == MMAP)
        return found

    def one_map(inference: int) -> np.ndarray:
        maps = load(inference)
        chosen: np.ndarray = maps[max(maps)]["attention_weights"][last][0].numpy().copy()
        return chosen

    def heatmap(inference: int) -> np.ndarray:
        maps = load(inference)
        patches = maps[max(maps)]["attention_weights"][last][0, :, 0, : places.grid[0] * places.grid[1]]
        shown: np.ndarray = patches.mean(0).reshape(places.grid).numpy()
        return shown

    def means(inference: int) -> np.ndarray:
        steps = [
            torch.cat([layer[:, :, : places.n_executed].mean(2) for layer in step["attention_weights"]])
            for step in load(inference).values()
        ]
        found: np.ndarray = torch.stack(steps).numpy()
        return found

    def mean_of(maps: dict[int, Any]) -> np.ndarray:
        steps = [torch.cat(step["attention_weights"]).mean((1, 2)) for step in maps.values()]
        found: np.ndarray = torch.stack(steps).mean(0).numpy()
        return found

    def scan_actions(inference: int) -> np.ndarray:
        found = {frame: mean_of(load(i)) for frame, i in enumerate(places.frame_inference)}
        return np.stack([found[places.frame_inference.index(i)] for i in sorted(set(places.frame_inference))])

    def scan_episode(inference: int) -> np.ndarray:
        maps = torch.load(places.episode, weights_only=True)
        return np.stack([mean_of(one) for one in maps.values()])

    scan = scan_episode if layout == EPISODE else scan_actions
    return {"map": one_map, "heatmap": heatmap, "means": means, "scan": scan}[question]


def write_episode(path: Path, plan: SyntheticPlan) -> None:
    """Write an episode of made-up maps."""
    episode = MadeUpEpisode(plan)
    episode.write(path, lambda inference: episode.maps(inference).as_float16())


def write_pt(store: Path, folder: Path) -> Places:
    """Write the maps of an episode's store as `.pt` files of each kind."""
    import torch

    from lerobot_attn import analysis
    from lerobot_attn.store.reader import open_episode

    data = open_episode(store).arrays
    layers = data["layer"].values.tolist()
    all_layers = data["all_layer"].values.tolist()
    _, geometry, _ = analysis.camera_geometry(data)
    places = Places(
        store,
        folder,
        tuple(data["frame_inference"].values.tolist()),
        data.attrs["executed_queries"][1],
        tuple(all_layers.index(layer) for layer in layers),
        (geometry.grid_rows, geometry.grid_columns),
    )
    # The store has two layers' maps: in their own places, and in turns in those of the others.
    sources = [
        layers.index(layer) if layer in layers else i % len(layers) for i, layer in enumerate(all_layers)
    ]
    episode = {}
    for inference in range(data.sizes["inference"]):
        maps = data["suffix_attention"][inference].values.astype(np.float32)
        episode[inference] = original_layout(maps)
        torch.save(episode[inference], places.same_layers(inference))
        if inference < N_ALL_LAYERS:
            torch.save(original_layout(maps[:, sources]), places.all_layers(inference))
    torch.save(episode, places.episode)
    return places


def compare(question: str, answers: dict[str, np.ndarray], places: Places) -> None:
    """Check that all layouts gave the same answer.

    Raises:
        AssertionError: one differs from the first by more than rounding to float16 explains.
    """
    first, *others = (answer.astype(np.float64) for answer in answers.values())
    for layout, other in zip(list(answers)[1:], others, strict=True):
        chosen = (slice(None), list(places.layers)) if question == "means" else ()
        np.testing.assert_allclose(
            other[chosen], first[chosen], rtol=2e-3, atol=1e-7, err_msg=f"{question}: {layout}"
        )


def measure(question: str, places: Places, rounds: int, *, quick: bool) -> dict[str, Reading]:
    """Let each layout answer a question in a process of its own, in turns and each round in another order."""
    # A fork of a process that has imported all is quick to start, but its memory grows by the pages of the
    # libraries that it touches: where memory counts, each imports for itself.
    context = multiprocessing.get_context("forkserver" if quick else "spawn")
    if quick:
        context.set_forkserver_preload(list(IMPORTS))
    layouts = QUESTIONS[question]
    processes = {layout: ProcessPoolExecutor(1, context) for layout in layouts}
    try:
        starting = {
            layout: process.submit(start, question, layout, places) for layout, process in processes.items()
        }
        before = {layout: future.result() for layout, future in starting.items()}
        turns: dict[str, list[Turn]] = {layout: [] for layout in layouts}
        for round_ in range(rounds + 1):  # the first one warms up
            first = round_ % len(layouts)
            for layout in layouts[first:] + layouts[:first]:
                inference = round_ % N_ALL_LAYERS
                turns[layout].append(processes[layout].submit(turn, inference).result())
            compare(question, {layout: turns[layout][-1].answer for layout in layouts}, places)
        after = {layout: process.submit(cost).result() for layout, process in processes.items()}
    finally:
        for process in processes.values():
            process.shutdown()
    return {
        layout: Reading(
            ms=[one.ms for one in turns[layout][1:]],
            first_ms=turns[layout][0].ms,
            peak_mb=(after[layout].peak_bytes - before[layout].peak_bytes) / 1e6,
            read_mb=(after[layout].read_bytes - before[layout].read_bytes) / 1e6 / (rounds + 1),
        )
        for layout in layouts
    }


def claims(found: dict[str, dict[str, Reading]]) -> list[Result]:
    """Return what is claimed."""

    def against(question: str, store: str, layout: str, what: str, *targets: float) -> list[Result]:
        """Compare time and memory; the targets, if any, are of both in this order, and make headlines."""
        ours, theirs = found[question][store], found[question][layout]
        time_target, memory_target = targets or (None, None)
        headline = bool(targets)
        memory = theirs.peak_mb / ours.peak_mb
        return [
            ratio(f"{what}: times as fast", theirs.ms, ours.ms, at_least=time_target, headline=headline),
            Result(f"{what}: times less memory", memory, "×", at_least=memory_target, headline=headline),
        ]

    all_layers = "`torch.load` of the action's `.pt` with all 18 layers"
    same_layers = "`torch.load` of a `.pt` with the same two layers"
    whole = "`torch.load` of one `.pt` with the episode's maps of the same two layers"
    mapped = f"{all_layers}, mmap=True"
    results = [
        *against("map", WARM, ALL, f"one raw map, store open, against {all_layers}", 100, 30),
        *against("map", COLD, ALL, f"one raw map, store opened anew, against {all_layers}"),
        *against("map", WARM, MMAP, f"one raw map, store open, against {mapped}"),
        *against("map", WARM, SAME, f"one raw map, store open, against {same_layers}"),
        *against("map", WARM, EPISODE, f"one raw map, store open, against {whole}"),
        *against("means", WARM, ALL, f"one frame's means of all layers, store open, against {all_layers}"),
        *against("means", WARM, MMAP, f"one frame's means of all layers, store open, against {mapped}"),
        *against(
            "scan", DASK, SAME, "full scan with Dask, against `torch.load` of a `.pt` per action, same layers"
        ),
        *against("scan", DASK, EPISODE, f"full scan with Dask, against {whole}"),
        *against("heatmap", WARM, SAME, f"one heatmap, store open, against {same_layers}"),
    ]
    for store, name in ((COLD, "opened anew"), (WARM, "open")):
        reading = found["heatmap"][store]
        what = f"one heatmap, store {name}"
        results += [
            median(what, reading.ms, "ms", at_most=TARGETS_MS[store], headline=True),
            Result(f"{what}: memory", reading.peak_mb, "MB", at_most=TARGET_MB),
        ]
    return results


def show(found: dict[str, dict[str, Reading]]) -> None:
    """Print what each layout took."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="readings", title_justify="left")
    table.add_column("question")
    table.add_column("layout")
    for column in ("median ms", "first ms", "MB read", "peak MB"):
        table.add_column(column, justify="right")
    for question, readings in found.items():
        for layout, one in readings.items():
            numbers = (statistics.median(one.ms), one.first_ms, one.read_mb, one.peak_mb)
            table.add_row(question, layout, *(f"{value:.1f}" for value in numbers))
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    parsed = arguments(
        __doc__, ("--episode", {"type": Path, "help": "an episode to read instead (at least two inferences)"})
    )
    before = machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = parsed.episode or folder / "episode.zarr"
        if parsed.episode is None:
            plan = SyntheticPlan() if parsed.quick else SyntheticPlan.full_size(n_frames=145)
            write_episode(store, plan)
        places = write_pt(store, folder)
        files = {
            "store": folder_bytes(store),
            SAME: places.same_layers(0).stat().st_size,
            ALL: places.all_layers(0).stat().st_size,
            EPISODE: places.episode.stat().st_size,
        }
        found = {}
        for question in QUESTIONS:
            per_run = 1 if parsed.quick or question == "scan" else QUICK_ROUNDS_PER_RUN
            found[question] = measure(question, places, parsed.runs * per_run, quick=parsed.quick)
    show(found)
    details = {
        "bytes": files,
        "readings": {
            question: {layout: asdict(reading) for layout, reading in readings.items()}
            for question, readings in found.items()
        },
    }
    return finish("read", claims(found), parsed, how=HOW, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
