#!/usr/bin/env python
"""What masks cost: a recorded LIBERO rollout with `segmentation=true` over the same rollout without.

    python benchmarks/segmentation.py      # five minutes on two idle cores

LeRobot's own `eval_policy_all` on one LIBERO task, as in `overhead.py`, recorded with the default settings;
in turns in one process, from the same initial state with the same seed; the first round does not count. What
counts is the time that the process has had of the cores, with the threads that draw, so that other programs
matter less. That actions are bit for bit the same is checked.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import arguments, finish, in_turns, machine, median, ratio
from overhead import POLICIES, SUITE, TASK, Rollouts
from policies import captures

AT_MOST = 1.1
PLAIN, MASKS = "recorded without masks", "recorded with masks"


def main() -> int:
    """Measure, print and write JSON; exit status 1 where the target is missed."""
    parsed = arguments(
        __doc__,
        ("--frames", {"type": int, "default": 60, "help": "frames of a rollout (default: 60)"}),
    )
    before, quick = machine(), parsed.quick
    torch.set_num_threads(1)
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("SLURM_JOB_ID", "0")  # LeRobot's way to leave the progress bars out
    from lerobot_attn.plugin.segmentation import environments_with_masks

    frames, image_px = (11, 64) if quick else (parsed.frames, 360)
    config = captures()["default"]
    with tempfile.TemporaryDirectory() as name:
        with environments_with_masks("libero"):
            rollouts = Rollouts(Path(name), POLICIES[0], frames, image_px)
        kinds = {
            PLAIN: rollouts.kind(PLAIN, config),
            MASKS: rollouts.kind(MASKS, replace(config, segmentation=True)),
        }
        seconds = in_turns(kinds, parsed.runs, warm_up=not quick, clock=time.process_time)
        rollouts.close()
    results = [
        ratio(
            f"LIBERO rollout of {frames} frames, recorded with masks over without, time of the cores",
            seconds[MASKS],
            seconds[PLAIN],
            at_most=AT_MOST,
            headline=True,
        ),
        median(f"LIBERO rollout of {frames} frames, {PLAIN}, time of the cores", seconds[PLAIN], "s"),
    ]
    how = (
        "demo policy (LeRobot's own code and tokens, small layers), float32, one thread of torch, 10 actions "
        f"an inference, masks at each; LIBERO {SUITE} task {TASK}, two cameras of {image_px} × {image_px}, "
        "every frame drawn, LeRobot's own evaluation with its video; kinds in turns in one process, ratios "
        "of each round; actions bit for bit the same"
    )
    return finish("segmentation", results, parsed, how=how, before=before, details={"rollout_s": seconds})


if __name__ == "__main__":
    sys.exit(main())
