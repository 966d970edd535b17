#!/usr/bin/env python
"""Capture from a policy that stays compiled: are the maps those of the eager policy, and what does it cost?

    python benchmarks/compiled.py                  # on the CPU: needs a C++ compiler, and minutes to compile
    python benchmarks/compiled.py --device cuda --depth 18 --denoise-steps 10

The demo policy, compiled as `compile_model=true` does it, in mode "default", and watched with
`--eval.attention.compiled=true`. The compiler unrolls layers and denoise steps, so there are few of them
here. One policy for each kind, all with the same weights, one observation, one noise; kinds in turns. The
first call, which compiles, is told apart. `--quick` tells the compiler to run the graph eagerly.
`gpu_overhead.py --compiled` does the same at full size.
"""

from __future__ import annotations

import functools
import sys
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from common import Result, arguments, finish, in_turns, machine, median, ratio, timed
from policies import infer, observation, tiny_policy

from lerobot_attn import AttentionConfig, InferenceRecord, capture_attention

# Float16's step just below 1, the largest weight there is.
FLOAT16_STEP = 2.0**-11


class Kind(NamedTuple):
    """One side of a comparison."""

    compiled: bool
    captured: bool

    @property
    def name(self) -> str:
        """What it is called in the JSON."""
        how = "compiled" if self.compiled else "eager"
        return f"{how}, {'with' if self.captured else 'without'} capture"


EAGER, COMPILED = Kind(False, False), Kind(True, False)
EAGER_CAPTURED, COMPILED_CAPTURED = Kind(False, True), Kind(True, True)


def largest_difference(one: InferenceRecord, other: InferenceRecord) -> float:
    """Return the largest difference of two records' weights, full maps and means."""
    differences = []
    for name in ("suffix_attention", "suffix_attention_mean"):
        a, b = (getattr(record, name).astype(np.float32) for record in (one, other))
        differences.append(float(np.abs(a - b).max()))
    return max(differences)


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    parsed = arguments(
        __doc__,
        ("--device", {"default": "cpu", "help": "cpu or cuda (default: cpu)"}),
        ("--depth", {"type": int, "default": 2, "help": "layers (default: 2)"}),
        ("--denoise-steps", {"type": int, "default": 4, "help": "denoise steps (default: 4)"}),
    )
    before = machine(parsed.device)
    sizes = {"depth": parsed.depth, "num_inference_steps": parsed.denoise_steps}
    latest: dict[Kind, InferenceRecord] = {}
    calls, first_s = {}, {}
    with ExitStack() as stack:
        if parsed.quick:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind in (EAGER, COMPILED, EAGER_CAPTURED, COMPILED_CAPTURED):
            policy = tiny_policy(parsed.device, compiled=kind.compiled, **sizes)
            if kind.captured:
                settings = AttentionConfig(compiled=kind.compiled)
                keep = functools.partial(latest.__setitem__, kind)
                stack.enter_context(capture_attention(policy, settings, on_record=keep))
            batch = observation(policy)
            # To the host: on a GPU the time ends when the actions, and so the maps before them, are there.
            calls[kind] = lambda policy=policy, batch=batch: infer(policy, batch).cpu()
            first_s[kind.name] = timed(calls[kind])
        seconds = in_turns(calls, parsed.runs)
    conditions = f"{parsed.depth} layers, {parsed.denoise_steps} denoise steps, {parsed.device}"
    results = [
        Result(
            f"compiled capture against eager capture, {conditions}: largest difference of a weight",
            largest_difference(latest[EAGER_CAPTURED], latest[COMPILED_CAPTURED]),
            "of 1",
            at_most=FLOAT16_STEP,
            headline=True,
        ),
        ratio(
            f"compiled inference, {conditions}, with capture over without",
            seconds[COMPILED_CAPTURED],
            seconds[COMPILED],
            headline=True,
        ),
        ratio(
            "inference with capture, compiled over eager", seconds[COMPILED_CAPTURED], seconds[EAGER_CAPTURED]
        ),
        ratio("inference without capture, compiled over eager", seconds[COMPILED], seconds[EAGER]),
        median("compiled inference without capture", seconds[COMPILED], "s"),
    ]
    how = (
        "demo policy (Pi0.5's code and tokens, small layers), float32, compile_mode=default, default "
        "capture; one observation, kinds in turns in one process"
    )
    details = {"seconds": {kind.name: values for kind, values in seconds.items()}, "first_call_s": first_s}
    return finish("compiled", results, parsed, how=how, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
