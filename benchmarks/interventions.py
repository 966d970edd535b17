#!/usr/bin/env python
"""What an intervention costs: a policy's inference with it over the same inference without.

    python benchmarks/interventions.py [--policy pi05_tiny]      # two minutes on two idle cores

The demo policy is asked about one observation of two cameras of 360 px, in turns without and with each
intervention, in one process with one thread; the first round does not count. What counts is the time that the
process has had of its core, so that other programs matter less. What a camera shows is given as masks, which
cost nothing here: rendering them is the simulator's, and measured apart (`segmentation.py`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Result, arguments, finish, in_turns, machine, ratio
from policies import CAMERAS, IMAGE_PX, observation, tiny_policy

from lerobot_attn import Condition, intervene
from lerobot_attn.masks import Instance, SceneMasks

AT_MOST = 1.05
N_INFERENCES = 8  # in one timing
PLAIN = "no intervention"
ACTS: dict[str, list[dict[str, Any]]] = {
    "fixed_noise": [{"kind": "fixed_noise"}],
    "block_attention of the target in the suffix": [{"kind": "block_attention", "keys": {"role": "target"}}],
    "block_attention of the target in both passes": [
        {"kind": "block_attention", "keys": {"role": "target"}, "passes": "both"}
    ],
    "occlude the target, mean colour": [{"kind": "occlude", "where": {"role": "target"}}],
    "occlude the target, blurred": [{"kind": "occlude", "where": {"role": "target"}, "fill": "blur"}],
    "occlude the target, inpainted": [{"kind": "occlude", "where": {"role": "target"}, "fill": "inpaint"}],
}


def scene() -> SceneMasks:
    """Return a scene in which each camera shows the target in a square of an eighth of its side."""
    mask = np.zeros((IMAGE_PX, IMAGE_PX), np.int16)
    side = IMAGE_PX // 8
    mask[side * 3 : side * 4, side * 4 : side * 5] = 1
    instances = (Instance("background", "background"), Instance("can_1", "target"))
    return SceneMasks(instances, dict.fromkeys(CAMERAS, mask))


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    parsed = arguments(__doc__)
    before = machine()
    torch.set_num_threads(1)
    policy = tiny_policy()
    batch = observation(policy)

    def asked(parts: list[dict[str, Any]]) -> Callable[[], None]:
        condition = Condition.from_dict({"name": "cost", "interventions": parts})

        @torch.inference_mode()
        def run() -> None:
            with intervene(policy, condition, masks=lambda: [scene()]) as acting:
                acting.begin([0])
                for _ in range(1 if parsed.quick else N_INFERENCES):
                    policy.predict_action_chunk(dict(batch))

        return run

    kinds = {PLAIN: asked([]), **{what: asked(parts) for what, parts in ACTS.items()}}
    seconds = in_turns(kinds, parsed.runs, warm_up=not parsed.quick, clock=time.process_time)
    results: list[Result] = [
        ratio(f"an inference with {what}, over one without", seconds[what], seconds[PLAIN], at_most=AT_MOST)
        for what in ACTS
    ]
    how = (
        f"demo policy (LeRobot's own code, small layers), float32, one observation of two cameras of "
        f"{IMAGE_PX} px, {N_INFERENCES} inferences in a timing, in turns in one process with one thread, "
        "seconds of its core"
    )
    return finish("interventions", results, parsed, how=how, before=before, details={"seconds": seconds})


if __name__ == "__main__":
    sys.exit(main())
