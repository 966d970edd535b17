#!/usr/bin/env python
"""Capture one inference of Pi0.5 at its released size, with random bfloat16 weights, and write it to a store.

    python benchmarks/full_size_inference.py        # 4.1 B parameters, 11 GB of memory, minutes on a CPU

Checks shapes, row sums, masked keys and that what is stored is what was captured, bit for bit, and tells
sizes. The weights are random: the maps mean nothing, and their compression ratio is not that of a trained
policy. `--quick` takes the demo policy.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import Result, arguments, finish, machine, timed
from policies import Player, full_size_policy, infer, observation, tiny_policy

from lerobot_attn import AttentionConfig, InferenceRecord, capture_attention
from lerobot_attn.recording.background import BackgroundWriter
from lerobot_attn.store.reader import Episode, open_episode


def checks(record: InferenceRecord, episode: Episode) -> list[Result]:
    """Return what must hold of the captured maps, and of the stored ones."""
    maps = record.suffix_attention
    assert maps is not None
    sums = maps.astype(np.float32).sum(axis=-1)
    stored = episode.dataset.suffix_attention[0].values
    return [
        # A bfloat16 weight is off by up to 2^-9 of itself, and so is a sum of them.
        Result("rows' largest deviation from 1", float(np.abs(sums - 1).max()), "of 1", at_most=2.0**-9),
        Result(
            "largest weight on a masked key", float(maps[..., ~record.key_mask[0]].max()), "of 1", at_most=0.0
        ),
        Result(
            "stored weights that differ from the captured",
            float((stored != maps[:, :, 0]).sum()),
            "",
            at_most=0.0,
        ),
        Result("episodes that are not complete", float(not episode.is_complete), "", at_most=0.0),
    ]


def main() -> int:
    """Run one inference, print and write JSON; exit status 1 where a check fails."""
    parsed = arguments(__doc__)
    parsed.runs = 1
    before = machine()
    policy = tiny_policy() if parsed.quick else full_size_policy()
    settings = AttentionConfig(layers="all")
    with tempfile.TemporaryDirectory() as name, capture_attention(policy, settings) as capture:
        batch = observation(policy)
        inference_s = timed(lambda: infer(policy, batch))
        (record,) = capture.drain()
        player = Player(capture, settings, Path(name))

        def write() -> None:
            writer = BackgroundWriter(settings.queue_mb * 1_000_000)
            jobs.extend(player.play(writer, batch, [record]))
            writer.close()

        jobs = []
        write_s = timed(write)
        episode = open_episode(jobs[0].plan.path)
        results = [
            *checks(record, episode),
            Result("maps of an inference, float16, full and means", episode.raw_bytes() / 1e6, "MB"),
            Result("the same stored", episode.stored_bytes() / 1e6, "MB"),
            Result("inference with capture", inference_s, "s"),
            Result("encode and write", write_s, "s"),
            Result(
                "peak memory of the process",
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                "GB",
            ),
        ]
    details = {
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "suffix_attention": list(record.suffix_attention.shape),
        "suffix_attention_mean": list(record.suffix_attention_mean.shape),
    }
    which = "demo policy" if parsed.quick else "Pi0.5 as LeRobot builds it, random bfloat16 weights"
    how = f"{which}, layers=all, one inference and 10 frames"
    return finish("full_size_inference", results, parsed, how=how, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
