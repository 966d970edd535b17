#!/usr/bin/env python
"""Write inferences through the package's writer, on one core, against the bare codec and `torch.save`.

    python benchmarks/write.py [--runs 5] [--folder DIR] [--quick] [--json FILE]

Two inferences of Pi0.5's sizes with the default capture: ten denoise steps of two layers' maps and all
layers' means, 19 MB of float16 each. All kinds do the same two in turns, and MB are those float16 MB
whatever a kind makes of them:

    writer     EpisodeWriter: append_inference, append_frames and commit of each, files and all
    zarrs      the same with the codec pipeline of the package zarrs, where that is installed
    fused      the same with zarr's own FusedCodecPipeline, where this zarr has it
    codec      the compressor alone over the same chunks, in the order in which the store has their axes
    codec+file the same, and what comes out into a file, without any format
    float16    `torch.save` of the same tensors in float16, a file per inference
    float32    `torch.save` of the same maps in float32, a file per inference
    original   `torch.save` of the same maps in float32 as the original layout has them: a file per action,
               ten per inference; means, which it does not have, are left out of this and the one before

Nothing waits for the disk: files go to the system's cache, on all sides. What each writer stored is read back
and compared.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import torch
import zarr
import zarr.core.codec_pipeline
from common import (
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
PIPELINES = {"zarrs": "zarrs.ZarrsCodecPipeline", "fused": "zarr.core.codec_pipeline.FusedCodecPipeline"}
HOW = (
    "Two inferences of Pi0.5's sizes, 19 MB of made-up softmax maps and means in float16 each (MadeUpEpisode "
    "in benchmarks/made_up.py), all kinds in turns on one core, files into the system's cache."
)


def pipelines() -> dict[str, str]:
    """Return the codec pipelines that are installed beside zarr's default one."""
    found = {}
    if importlib.util.find_spec("zarrs"):
        found["zarrs"] = PIPELINES["zarrs"]
    if hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
        found["fused"] = PIPELINES["fused"]
    return found


class StoreWriting:
    """The package's writer, with one of zarr's codec pipelines.

    Args:
        path: the store.
        episode: what is written.
        maps: of its inferences, float16.
        pipeline: the codec pipeline's path; None is zarr's default.
    """

    def __init__(
        self, path: Path, episode: MadeUpEpisode, maps: list[MadeUpMaps], pipeline: str | None = None
    ):
        self._path = path
        self._rows = [episode.rows(i, one) for i, one in enumerate(maps)]
        self._frames = [episode.frame_rows(i) for i in range(len(maps))]
        self._maps = maps
        self._config = {} if pipeline is None else {"codec_pipeline.path": pipeline}
        self._writer = episode.writer(path)

    def run(self) -> None:
        """Append the inferences to what is there, each with its commit."""
        with zarr.config.set(self._config):
            for rows, frames in zip(self._rows, self._frames, strict=True):
                self._writer.append_inference(rows)
                self._writer.append_frames(frames)
                self._writer.commit()

    def check(self) -> None:
        """Read the last inferences with zarr's default pipeline.

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
    folder: Path, episode: MadeUpEpisode, maps: list[MadeUpMaps], stores: dict[str, StoreWriting]
) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name; each writes all inferences once."""
    codecs = stores["writer"].codecs()
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
        **{name: store.run for name, store in stores.items()},
        "codec": lambda: compress(maps, codecs),
        "codec+file": codec_and_file,
        "float16": lambda: save(tensors),
        "float32": lambda: save(originals),
        "original": lambda: save(originals, times=episode.plan.n_executed),
    }


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    folder_option = ("--folder", {"type": Path, "help": "where to write (default: a temporary folder)"})
    parsed = arguments(__doc__, folder_option)
    pin_to_one_core()
    before = machine()
    numcodecs.blosc.set_nthreads(1)
    found = pipelines()
    for name in sorted(set(PIPELINES) - set(found)):
        print(f"{PIPELINES[name]} is not installed: skipped")
    plan = SyntheticPlan() if parsed.quick else SyntheticPlan.full_size(n_frames=10 * N_INFERENCES)
    episode = MadeUpEpisode(plan)
    maps = [episode.maps(inference).as_float16() for inference in range(N_INFERENCES)]
    mb = sum(one.full.nbytes + one.means.nbytes for one in maps) / 1e6
    with tempfile.TemporaryDirectory(dir=parsed.folder) as name:
        folder = Path(name)
        stores = {
            kind: StoreWriting(folder / f"{kind}.zarr", episode, maps, pipeline)
            for kind, pipeline in {"writer": None, **found}.items()
        }
        seconds = in_turns(kinds(folder, episode, maps, stores), parsed.runs)
        for store in stores.values():
            store.check()
        where = filesystem(folder)
    writer = seconds["writer"]
    results = [
        median("writing: float16 a second through the writer, one core", [mb / s for s in writer], "MB/s"),
        ratio(
            "writing: share of the bare codec's speed on the same core",
            seconds["codec"],
            writer,
            at_least=0.8,
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
        *(ratio(f"writing: times as fast with {PIPELINES[kind]}", writer, seconds[kind]) for kind in found),
    ]
    details = {"seconds": seconds, "float16_mb": mb, "filesystem": where}
    return finish("write", results, parsed, how=HOW, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
