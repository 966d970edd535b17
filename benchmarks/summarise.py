#!/usr/bin/env python
"""Summarise a run on worker processes: speed against the bare codec, and memory over the number of episodes.

    python benchmarks/summarise.py [--runs 5] [--cores 2] [--quick] [--json FILE]

Episodes of 145 steps of Pi0.5's sizes are summarised frame by frame: `modality_share` of the two layers with
full maps at every denoise step, so that every full map is decompressed. In turns:

    decode     the compressor alone over one episode's chunks, in this process, seconds of one core
    read       one episode's full maps as an array from the store, on one core, likewise
    alone      `summarise_run` of one episode on one core, likewise
    workers    `summarise_run` of all episodes on that many worker processes that run already, by the clock
               on the wall; says little on a busy machine

MB are those of the float16 maps. Memory is the largest peak of a worker process while it summarises so many
episodes, against four times as many; before each, the peak starts anew. All files are in the system's cache.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numcodecs
import numpy as np
import pandas as pd
import zarr
from common import arguments, finish, machine, median, ratio, stored_codec, timed
from made_up import MadeUpEpisode

from lerobot_attn import open_episode, open_run
from lerobot_attn.analysis import local_workers, summarise_run
from lerobot_attn.sizes import one_core
from lerobot_attn.synthetic import SyntheticPlan

if TYPE_CHECKING:
    from distributed import Client

    from lerobot_attn.store.reader import Episode

EPISODES_A_WORKER = 6
TIMES_AS_MANY = 4  # episodes, where memory is compared
HOW = (
    "An episode of 145 steps of Pi0.5's sizes, made-up softmax maps of two layers (MadeUpEpisode in "
    "benchmarks/made_up.py), under many names; modality_share of every frame, layer with full maps and "
    "denoise step; files in the system's cache."
)


def write_run(folder: Path, plan: SyntheticPlan, n: int) -> list[Episode]:
    """Write an episode, and give it the names of a whole run."""
    made_up = MadeUpEpisode(plan)
    task = folder / "attention" / "made_up_0"
    made_up.write(task / "episode_00000.zarr", lambda inference: made_up.maps(inference).as_float16())
    for index in range(1, n):
        shutil.copytree(
            task / "episode_00000.zarr", task / f"episode_{index:05d}.zarr", copy_function=os.link
        )
    return list(open_run(folder))


def compressed(store: Path) -> tuple[Callable[[], None], int]:
    """Return what decompresses every chunk of the full maps, and how many bytes it gives."""
    array = zarr.open_array(store / "suffix_attention", mode="r")
    codec, values = stored_codec(array), np.asarray(array[:])
    sizes = array.chunks
    chunks = [
        codec.blosc.encode(
            np.ascontiguousarray(
                values[tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, sizes, strict=True))].transpose(
                    codec.order
                )
            )
        )
        for index in np.ndindex(*(n // size for n, size in zip(values.shape, sizes, strict=True)))
    ]

    def decode() -> None:
        for chunk in chunks:
            codec.blosc.decode(chunk)

    return decode, values.nbytes


def read(episode: Episode) -> np.ndarray:
    """Return an episode's full maps."""
    with one_core():
        values: np.ndarray = open_episode(episode.path).arrays["suffix_attention"].values
    return values


def alone(episode: Episode) -> None:
    """Summarise an episode in this process, as a worker does it."""
    with one_core():
        summarised([episode], "synchronous")


def start_anew() -> None:
    """Forget this process's peak of memory so far."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Return the largest memory that this process has had since then, MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def summarised(episodes: list[Episode], scheduler: Any) -> pd.DataFrame:
    """Summarise episodes.

    Raises:
        RuntimeError: one could not be.
    """
    full = episodes[0].arrays["layer"].values.tolist()  # "all" would be all layers' means
    found = summarise_run(
        episodes, "modality_share", by="frame", scheduler=scheduler, layer=full, denoise_step="all"
    )
    if found.failed:
        raise RuntimeError(f"{found.failed[0].path}: {found.failed[0].error}")
    return found.table


def peaks_mb(episodes: list[Episode], client: Client) -> list[float]:
    """Return the workers' largest peak while they summarise some of the episodes, and while all, MB."""
    peaks = []
    for some in (episodes[: len(episodes) // TIMES_AS_MANY], episodes):
        client.run(start_anew)
        # By episode, as thousands are summarised: what the client keeps is small, too.
        summarise_run(some, "modality_share", by="episode", scheduler=client, layer="all", query="mean")
        peaks.append(max(client.run(peak_mb).values()))
    return peaks


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    parsed = arguments(
        __doc__, ("--cores", {"type": int, "default": 2, "help": "worker processes (default: 2)"})
    )
    before = machine()
    numcodecs.blosc.set_nthreads(1)
    cores = parsed.cores
    n = cores * (2 if parsed.quick else EPISODES_A_WORKER)
    plan = SyntheticPlan() if parsed.quick else SyntheticPlan.full_size(n_frames=145)
    seconds: dict[str, list[float]] = {"decode": [], "read": [], "alone": [], "workers": []}
    peaks = []
    with tempfile.TemporaryDirectory() as name, local_workers(cores) as client:
        episodes = write_run(Path(name), plan, n)
        decode, n_bytes = compressed(Path(episodes[0].path))
        if not summarised(episodes, client).equals(summarised(episodes, "synchronous")):  # and warms both up
            raise RuntimeError("the workers' table is not the one without them")
        for _ in range(parsed.runs):
            seconds["decode"].append(timed(decode, time.process_time))
            seconds["read"].append(timed(partial(read, episodes[0]), time.process_time))
            seconds["alone"].append(timed(partial(alone, episodes[0]), time.process_time))
            seconds["workers"].append(timed(partial(summarised, episodes, client)))
            peaks.append(peaks_mb(episodes, client))
    mb = n_bytes / 1e6
    one_share = [cores * took / n for took in seconds["workers"]]  # seconds of a worker for an episode
    what = f"summarising full maps on {cores} workers"
    results = [
        ratio(
            f"{what}: share of {cores} cores' bare decoding speed of the same maps",
            seconds["decode"],
            one_share,
            at_least=0.8,
            headline=True,
        ),
        ratio(
            "summarising full maps in one process: share of one core's bare decoding speed of the same maps",
            seconds["decode"],
            seconds["alone"],
        ),
        ratio(f"{what}: share of {cores} times the speed of reading them", seconds["read"], one_share),
        ratio(
            f"{what}: share of {cores} times the speed of one process without a scheduler",
            seconds["alone"],
            one_share,
            at_least=0.8,
            headline=True,
        ),
        median(f"{what}: float16 maps a second", [mb * cores / took for took in one_share], "MB/s"),
        median("bare decoding of them, one core", [mb / took for took in seconds["decode"]], "MB/s"),
        ratio(
            f"{what}: a worker's peak memory, {n} episodes over {n // TIMES_AS_MANY}",
            [many for _, many in peaks],
            [few for few, _ in peaks],
            at_most=1.1,
            headline=True,
        ),
        median(f"{what}: a worker's peak memory", [many for _, many in peaks], "MB"),
    ]
    details = {"seconds": seconds, "episodes": n, "float16_mb_an_episode": mb, "peaks_mb": peaks}
    return finish("summarise", results, parsed, how=HOW, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
