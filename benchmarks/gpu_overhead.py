#!/usr/bin/env python
"""What capture costs at Pi0.5's released size on a CUDA device: time of an inference, and GPU memory.

    python benchmarks/gpu_overhead.py                  # 4.1 B parameters, 10 GB of GPU memory, minutes
    python benchmarks/gpu_overhead.py --compiled       # torch.compile on both sides
    python benchmarks/gpu_overhead.py --device cpu --quick    # does it run?

Random bfloat16 weights: attention costs the same whatever the weights. One policy for each kind, all with the
very same weights; an inference is timed from an idle device until every map has arrived on the host, kinds in
turns. Peak memory is of one inference, above the weights and the inputs. That actions are bit for bit the
same is checked.

Without a CUDA device it ends with an error. `--device cpu` measures there and says so in every row.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from common import Result, arguments, finish, in_turns, machine, median, ratio
from policies import captures, full_size_policy, infer, observation, tiny_policy

from lerobot_attn import AttentionConfig, capture_attention

OFF = "without capture"
AT_MOST = {"default": 1.02, "all layers": 1.10}
BATCH_SIZES = (1, 8)
N_INFERENCES = 3  # in one timing

Build = Callable[..., Any]


def choose_device(asked: str | None, cuda_is_available: bool) -> str:
    """Return the device.

    Raises:
        SystemExit: there is no CUDA device, and none but it was asked for.
    """
    if asked not in (None, "cpu") and not asked.startswith("cuda"):
        sys.exit(f"error: --device {asked}, expected cuda, cuda:N or cpu")
    if asked != "cpu" and not cuda_is_available:
        sys.exit(
            "error: no CUDA device, so no GPU figures; run this where torch.cuda.is_available(), or say "
            "--device cpu"
        )
    return asked or "cuda"


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def peak_mb(device: str, call: Callable[[], Any]) -> float:
    """Return the GPU memory that a call takes at its peak, MB, above what was allocated before it."""
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def measure(
    policies: Mapping[str, Any], batch_size: int, runs: int, device: str, *, compiled: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Time the kinds in turns, and then take each one's memory.

    Args:
        policies: what is measured → its policy; the first is not watched.
        batch_size: number of environments.
        runs: rounds that count.
        device: where the policies are.
        compiled: whether the watched policies stay compiled.

    Returns:
        Seconds of an inference of each round, and peak GPU memory in MB, which is empty on a CPU.

    Raises:
        RuntimeError: the actions are not bit for bit the same, or no maps came.
    """
    batch = observation(policies[OFF], batch_size)
    settings: dict[str, AttentionConfig | None] = {OFF: None, **captures(compiled=compiled)}
    chunks: dict[str, torch.Tensor] = {}
    n_records = dict.fromkeys(policies, 0)

    def count(name: str, record: Any) -> None:
        n_records[name] += 1

    def run(name: str, n: int = 1 if device == "cpu" else N_INFERENCES) -> None:
        for _ in range(n):
            chunks[name] = infer(policies[name], batch)
        synchronize(device)

    with ExitStack() as stack:
        for name, policy in policies.items():
            if settings[name] is not None:
                on_record = functools.partial(count, name)
                stack.enter_context(capture_attention(policy, settings[name], on_record=on_record))
        kinds = {name: functools.partial(run, name) for name in policies}
        seconds = in_turns(kinds, runs)
        memory = {}
        if device != "cpu":
            memory = {name: peak_mb(device, functools.partial(run, name, 1)) for name in policies}
    for name in policies:
        # A compiler may order sums otherwise in a graph that also returns maps.
        same = torch.allclose(chunks[name], chunks[OFF], rtol=0.05, atol=0.05)
        if not (same if compiled else torch.equal(chunks[name], chunks[OFF])):
            raise RuntimeError(f"{name}: the actions differ from those without capture")
        if name != OFF and not n_records[name]:
            raise RuntimeError(f"{name}: no inference was recorded")
    each = 1 if device == "cpu" else N_INFERENCES
    return {name: [value / each for value in values] for name, values in seconds.items()}, memory


def claims(
    seconds: Mapping[str, list[float]],
    memory: Mapping[str, float],
    batch_size: int,
    where: str,
    *,
    on_gpu: bool,
) -> list[Result]:
    """Return the rows of one batch size; only those of a GPU have targets and go into the docs."""
    results = []
    for name, values in seconds.items():
        if name == OFF:
            continue
        at_most = AT_MOST.get(name) if on_gpu else None
        results.append(
            ratio(
                f"{where}, batch {batch_size}, inference with capture {name} over without",
                values,
                seconds[OFF],
                at_most=at_most,
                headline=at_most is not None,
            )
        )
        if memory:
            added = memory[name] - memory[OFF]
            results.append(
                Result(f"{where}, batch {batch_size}, peak memory added by capture {name}", added, "MB")
            )
    results.append(median(f"{where}, batch {batch_size}, inference {OFF}", seconds[OFF], "s"))
    return results


def build_policies(quick: bool, device: str, compiled: bool) -> dict[str, Any]:
    """Return one policy for each kind; all of them share one set of weights, or have equal ones."""
    names = (OFF, *captures())
    if quick:
        return {
            name: tiny_policy(device, compiled=compiled, depth=2, num_inference_steps=2) for name in names
        }
    first = full_size_policy(device, compiled=compiled)
    others = {name: full_size_policy(device, compiled=compiled, weights_of=first) for name in names[1:]}
    return {OFF: first, **others}


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    parsed = arguments(
        __doc__,
        ("--device", {"help": "cuda, cuda:N or cpu (default: cuda)"}),
        ("--compiled", {"action": "store_true", "help": "with compile_model=true on both sides"}),
    )
    device = choose_device(parsed.device, torch.cuda.is_available())
    on_gpu = device != "cpu"
    where = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    before = machine(where)
    name = "gpu_overhead" if on_gpu else "gpu_overhead_cpu"
    if parsed.compiled:
        where, name = f"{where}, compiled", f"{name}_compiled"
    policies = build_policies(parsed.quick, device, parsed.compiled)
    results, details = [], {}
    for batch_size in BATCH_SIZES[: 1 if parsed.quick else None]:
        torch._dynamo.reset()
        seconds, memory = measure(policies, batch_size, parsed.runs, device, compiled=parsed.compiled)
        results += claims(seconds, memory, batch_size, where, on_gpu=on_gpu and not parsed.compiled)
        details[f"batch {batch_size}"] = {
            "inference_s": seconds,
            "median_inference_s": {kind: statistics.median(values) for kind, values in seconds.items()},
            "peak_mb": memory,
        }
    size = "demo policy, 2 small layers" if parsed.quick else "Pi0.5 at its released size"
    how = (
        f"{size}, random weights, {'float32' if parsed.quick else 'bfloat16'}, 10 denoise steps; until "
        "every map is on the host; kinds in turns in one process, ratios of each round"
    )
    return finish(name, results, parsed, how=how, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
