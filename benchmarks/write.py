#!/usr/bin/env python
"""Write inferences through the package's writer, against the bare codec and `torch.save`, and on two cores.

    python benchmarks/write.py [--runs 5] [--folder DIR] [--quick] [--json FILE]

Two inferences of Pi0.5's sizes with the default capture: ten denoise steps of two layers' maps and all
layers' means, 19 MB of float16 each. All kinds do the same two in turns on one core, by the time that the
process has had of it, and MB are those float16 MB whatever a kind makes of them:

    writer     EpisodeWriter: append_inference, append_frames and commit of each, files and all
    codec      the compressor alone over the same chunks, in the order in which the store has their axes
    codec+file the same, and what comes out into a file, without any format
    float16    `torch.save` of the same tensors in float16, a file per inference
    float32    `torch.save` of the same maps in float32, a file per inference
    original   `torch.save` of the same maps in float32 as the original layout has them: a file per action,
               ten per inference; means, which it does not have, are left out of this and the one before

Then an inference with the maps of all layers, 150 MB, on one core and on two, in turns and by the clock on
the wall; that says little on a busy machine.

Nothing waits for the disk: files go to the system's cache, on all sides. What the writer stored is read back
and compared.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import torch
import zarr
from common import (
    Result,
    StoredCodec,
    arguments,
    filesystem,
    finish,
    in_turns,
    machine,
    median,
    original_layout,
    pin_to_one_core,
    ratio,
    stored_codec,
)
from made_up import MadeUpEpisode, MadeUpMaps

from lerobot_attn.synthetic import SyntheticPlan

N_INFERENCES = 2
FIELDS = {"suffix_attention": "full", "suffix_attention_mean": "means"}
HOW = (
    "Two inferences of Pi0.5's sizes, 19 MB of made-up softmax maps and means in float16 each (MadeUpEpisode "
    "in benchmarks/made_up.py), all kinds in turns on one core, seconds of its time; files into the cache."
)


class StoreWriting:
    """The package's writer.

    Args:
        path: the store.
        episode: what is written.
        maps: of its inferences, float16.
    """

    def __init__(self, path: Path, episode: MadeUpEpisode, maps: list[MadeUpMaps]):
        self._path = path
        self._rows = [episode.rows(i, one) for i, one in enumerate(maps)]
        self._frames = [episode.frame_rows(i) for i in range(len(maps))]
        self._maps = maps
        self._writer = episode.writer(path)

    def run(self) -> None:
        """Append the inferences to what is there, each with its commit."""
        for rows, frames in zip(self._rows, self._frames, strict=True):
            self._writer.append_inference(rows)
            self._writer.append_frames(frames)
            self._writer.commit()

    def check(self) -> None:
        """Read the last inferences with Zarr.

        Raises:
            RuntimeError: they are not what was written.
        """
        for name, field in FIELDS.items():
            array = zarr.open_array(self._path / name, mode="r")
            for back, maps in enumerate(reversed(self._maps), start=1):
                stored = np.asarray(array[array.shape[0] - back])
                if not np.array_equal(stored.view(np.uint16), getattr(maps, field).view(np.uint16)):
                    raise RuntimeError(f"{self._path}: {name} differs from what was written")

    def codecs(self) -> dict[str, tuple[tuple[int, ...], StoredCodec]]:
        """Return the chunk shape and the codec of each array of maps, as its metadata has them."""
        arrays = {name: zarr.open_array(self._path / name, mode="r") for name in FIELDS}
        return {name: (array.chunks, stored_codec(array)) for name, array in arrays.items()}


def chunks(values: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield an array's parts of a shape that divides its own."""
    for index in np.ndindex(*(size // part for size, part in zip(values.shape, shape, strict=True))):
        yield values[tuple(slice(i * part, (i + 1) * part) for i, part in zip(index, shape, strict=True))]


def compress(maps: list[MadeUpMaps], codecs: dict[str, tuple[tuple[int, ...], StoredCodec]]) -> list[bytes]:
    """Do what the store does to the maps' chunks, and nothing else."""
    return [
        codec.blosc.encode(np.ascontiguousarray(chunk.transpose(codec.order)))
        for one in maps
        for name, (shape, codec) in codecs.items()
        for chunk in chunks(getattr(one, FIELDS[name])[None], shape)
    ]


def kinds(
    folder: Path, episode: MadeUpEpisode, maps: list[MadeUpMaps], store: StoreWriting
) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name; each writes all inferences once."""
    codecs = store.codecs()
    originals = [original_layout(one.full.astype(np.float32)) for one in maps]
    tensors = [{field: torch.from_numpy(getattr(one, field)) for field in FIELDS.values()} for one in maps]

    def codec_and_file() -> None:
        with (folder / "chunks").open("wb") as file:
            for chunk in compress(maps, codecs):
                file.write(chunk)

    def save(values: list[Any], times: int = 1) -> None:
        for index, value in enumerate(values):
            for action in range(times):
                torch.save(value, folder / f"{index}_{action}.pt")

    return {
        "writer": store.run,
        "codec": lambda: compress(maps, codecs),
        "codec+file": codec_and_file,
        "float16": lambda: save(tensors),
        "float32": lambda: save(originals),
        "original": lambda: save(originals, times=episode.plan.n_executed),
    }


class Cores:
    """Runs a call on so many of the cores that this machine has: its threads, and those that it starts."""

    def __init__(self) -> None:
        self._before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # of these, those that we may use
        self.all = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, self._before)

    def on(self, n: int, call: Callable[[], Any]) -> Any:
        """Call on n cores."""
        os.sched_setaffinity(0, self.all[:n])
        try:
            return call()
        finally:
            os.sched_setaffinity(0, self._before)


def all_layers(folder: Path, plan: SyntheticPlan, runs: int) -> tuple[list[Result], dict[str, list[float]]]:
    """Return how much faster two cores write all layers' maps than one, and the seconds; {} with one core."""
    cores = Cores()
    if len(cores.all) < 2:
        print("only one core: two were not tried")
        return [], {}
    episode = MadeUpEpisode(replace(plan, layers=tuple(range(plan.n_layers)), n_frames=plan.n_executed))
    maps = [episode.maps(0).as_float16()]
    calls = {}
    for n in (1, 2):  # a writer looks when it is made how many there are
        store = cores.on(n, partial(StoreWriting, folder / f"all_{n}.zarr", episode, maps))
        calls[f"{n} cores"] = partial(cores.on, n, store.run)
    seconds = in_turns(calls, runs)
    mb = (maps[0].full.nbytes + maps[0].means.nbytes) / 1e6
    what = f"writing all layers' maps ({mb:.0f} MB an inference)"
    one, two = seconds.values()
    return [ratio(f"{what}: times as fast on two cores as on one", one, two, at_least=1.7)], seconds


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    folder_option = ("--folder", {"type": Path, "help": "where to write (default: a temporary folder)"})
    parsed = arguments(__doc__, folder_option)
    pin_to_one_core()
    before = machine()
    numcodecs.blosc.set_nthreads(1)
    plan = SyntheticPlan() if parsed.quick else SyntheticPlan.full_size(n_frames=10 * N_INFERENCES)
    episode = MadeUpEpisode(plan)
    maps = [episode.maps(inference).as_float16() for inference in range(N_INFERENCES)]
    mb = sum(one.full.nbytes + one.means.nbytes for one in maps) / 1e6
    with tempfile.TemporaryDirectory(dir=parsed.folder) as name:
        folder = Path(name)
        store = StoreWriting(folder / "writer.zarr", episode, maps)
        seconds = in_turns(kinds(folder, episode, maps, store), parsed.runs, clock=time.process_time)
        store.check()
        where = filesystem(folder)
        on_two, of_all_layers = all_layers(folder, plan, parsed.runs)
    writer = seconds["writer"]
    results = [
        median("writing: float16 a second through the writer, one core", [mb / s for s in writer], "MB/s"),
        ratio(
            "writing: share of the bare codec's speed on the same core",
            seconds["codec"],
            writer,
            at_least=0.6,
            headline=True,
        ),
        ratio(
            "writing: share of the speed of the bare codec and a plain file", seconds["codec+file"], writer
        ),
        ratio(
            "writing: times as fast as `torch.save` in the original layout (float32, a file per action)",
            seconds["original"],
            writer,
            headline=True,
        ),
        ratio(
            "writing: times as fast as `torch.save` of the maps in float32, each once",
            seconds["float32"],
            writer,
        ),
        ratio(
            "writing: times as fast as `torch.save` of the same tensors in float16",
            seconds["float16"],
            writer,
        ),
        *on_two,
    ]
    details = {"seconds": seconds, "all_layers_seconds": of_all_layers, "float16_mb": mb, "filesystem": where}
    return finish("write", results, parsed, how=HOW, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
