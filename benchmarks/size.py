#!/usr/bin/env python
"""Weigh a stored episode against `torch.save` of the same maps, and check that nothing was lost.

    python benchmarks/size.py [--runs 5] [--quick] [--json FILE]

145 steps of which 10 come from each inference, Pi0.5's sizes, the default capture: maps of the last two
layers and means of all 18. The original layout is a `.pt` per action, {denoise_step: {"attention_weights":
[layer, …]}} of float32 maps: the maps of an inference are in it as often as actions were executed. A `.pt`
does not compress, so one real file of each kind is written, and counted as often as it would be there. Each
run is an episode of other random numbers. Videos are on neither side.

Compared are (a) the whole store with a `.pt` per action of the same two layers, (b) the same store with a
`.pt` per action of all 18 layers, of which the store has means only, and (c) the whole store with `.pt`
files that hold the same maps and means once an inference. Every stored value is compared, bit for bit, with
float16 of the float32 original.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from common import Result, arguments, finish, machine, median, original_layout
from made_up import MadeUpEpisode, MadeUpMaps

from lerobot_attn.sizes import folder_bytes
from lerobot_attn.synthetic import SyntheticPlan

SHARPNESS = {"flat": 1.0, "peaked": 2.0, "very peaked": 3.0}
N_OTHER = 30  # steps of the episodes of another sharpness
HOW = (
    "Made-up softmax maps of Pi0.5's shapes (MadeUpEpisode in benchmarks/made_up.py): peaked, masked keys "
    "exactly 0, alike over denoise steps and queries. 145 steps, 10 of each inference; bytes of files; "
    "every run another episode. float32 and bfloat16 are the policy's own dtype."
)


def pt_bytes(value: Any, folder: Path) -> int:
    """Return the size of a real `.pt` file."""
    file = folder / "one.pt"
    torch.save(value, file)
    size = file.stat().st_size
    file.unlink()
    return size


def original_bytes(plan: SyntheticPlan, folder: Path) -> dict[str, int]:
    """Return the bytes of an episode in the other layouts; `.pt` files of one shape have one size."""
    size, n_keys = {}, plan.layout.n_keys

    def zeros(n_layers: int, *rest: int) -> np.ndarray:
        return np.zeros((plan.n_denoise_steps, n_layers, plan.n_heads, *rest, n_keys), dtype)

    for dtype in (np.float32, np.float16):
        name = np.dtype(dtype).name
        for layers, n_layers in (("same layers", len(plan.layers)), ("all layers", plan.n_layers)):
            file = pt_bytes(original_layout(zeros(n_layers, plan.n_queries)), folder)
            size[f"per action, {layers}, {name}"] = plan.n_frames * file
        once = {
            "maps": original_layout(zeros(len(plan.layers), plan.n_queries)),
            "means": torch.from_numpy(zeros(plan.n_layers)),
        }
        size[f"once, {name}"] = plan.n_inferences * pt_bytes(once, folder)
    return size


def check_lossless(path: Path, originals: list[MadeUpMaps]) -> None:
    """Compare every stored map and mean, read with zarr alone.

    Raises:
        RuntimeError: a value is not, bit for bit, float16 of the float32 original.
    """
    group = zarr.open_group(path, mode="r")
    for name, field in (("suffix_attention", "full"), ("suffix_attention_mean", "means")):
        for inference, maps in enumerate(originals):
            expected = getattr(maps, field).astype(np.float16).view(np.uint16)
            stored = np.asarray(group[name][inference]).view(np.uint16)  # type: ignore[index]
            n_different = np.count_nonzero(stored != expected)
            if n_different:
                raise RuntimeError(
                    f"{name} of inference {inference}: {n_different} of {expected.size} stored values are "
                    "not float16 of the original, expected none"
                )


def stored_bytes(episode: MadeUpEpisode, originals: list[MadeUpMaps], folder: Path) -> int:
    """Write the episode with the package's writer, check every value, and return its bytes."""
    path = folder / "episode.zarr"
    episode.write(path, lambda inference: originals[inference].as_float16())
    check_lossless(path, originals)
    size = folder_bytes(path)
    shutil.rmtree(path)
    return size


def by_policy(plan: SyntheticPlan, folder: Path, sharpness: float) -> tuple[dict[str, int], MadeUpMaps]:
    """Return the bytes of an episode's store by the policy's dtype, and the maps of its first inference."""
    episode = MadeUpEpisode(plan, sharpness=sharpness)
    maps = [episode.maps(inference) for inference in range(plan.n_inferences)]
    rounded = [one.as_bfloat16() for one in maps]
    sizes = {
        "float32": stored_bytes(episode, maps, folder),
        "bfloat16": stored_bytes(episode, rounded, folder),
    }
    return sizes, maps[0]


def looks(maps: MadeUpMaps) -> dict[str, float]:
    """Return how peaked the rows are, how many keys are masked, and how alike neighbours are."""
    full = maps.full
    entropy = -(full * np.log(np.maximum(full, np.finfo(np.float32).tiny))).sum(axis=-1)

    def alike(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    return {
        "keys that a row is spread over (exp of its entropy), mean": float(np.exp(entropy).mean()),
        "largest weight of a row, mean": float(full.max(axis=-1).mean()),
        "share of weights that are exactly 0": float((full == 0).mean()),
        "correlation with the next denoise step": alike(full[:-1], full[1:]),
        "correlation with the next query": alike(full[:, :, :, :-1], full[:, :, :, 1:]),
    }


def claims(stores: dict[str, list[int]], other: dict[str, int]) -> list[Result]:
    """Return what is claimed: how many times smaller the stores are than the other layouts."""

    def times(what: str, layout: str, policy: str = "float32", **claim: Any) -> Result:
        ratios = [other[layout] / size for size in stores[policy]]
        return median(f"{what}, {policy} policy", ratios, "×", **claim)

    same, all_ = "`.pt` per action", "`.pt` per action of all 18 layers' maps"
    return [
        median(
            "an episode's store: 145 steps, two layers' maps and all layers' means, lossless in float16, "
            "float32 policy",
            [size / 1e6 for size in stores["float32"]],
            "MB",
            headline=True,
        ),
        median("the same, bfloat16 policy", [size / 1e6 for size in stores["bfloat16"]], "MB"),
        times(
            f"an episode: times smaller than a float32 {same} of the same two layers",
            "per action, same layers, float32",
            at_least=20,
            headline=True,
        ),
        times(
            f"an episode: times smaller than a float32 {same} of the same two layers",
            "per action, same layers, float32",
            "bfloat16",
            at_least=20,
        ),
        times(
            f"an episode: times smaller than a float16 {same} of the same two layers",
            "per action, same layers, float16",
        ),
        times(
            f"an episode: times smaller than a float32 {all_} (the store has their means only)",
            "per action, all layers, float32",
        ),
        times(
            "an episode: times smaller than float32 `.pt` files of the same tensors, each once",
            "once, float32",
            at_least=4,
            headline=True,
        ),
        times(
            "an episode: times smaller than float32 `.pt` files of the same tensors, each once",
            "once, float32",
            "bfloat16",
            at_least=4,
        ),
        times(
            "an episode: times smaller than float16 `.pt` files of the same tensors, each once",
            "once, float16",
        ),
    ]


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    parsed = arguments(__doc__)
    before = machine()
    plan = SyntheticPlan() if parsed.quick else SyntheticPlan.full_size(n_frames=145)
    short = replace(plan, n_frames=min(plan.n_frames, N_OTHER))
    stores: dict[str, list[int]] = {}
    others: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(parsed.runs):
            sizes, _ = by_policy(replace(plan, seed=seed), folder, SHARPNESS["peaked"])
            for policy, size in sizes.items():
                stores.setdefault(policy, []).append(size)
        other = original_bytes(plan, folder)
        once = original_bytes(short, folder)["once, float32"]
        for kind, sharpness in SHARPNESS.items():
            sizes, maps = by_policy(short, folder, sharpness)
            others[kind] = {
                "sharpness": sharpness,
                "times smaller than float32 .pt, each tensor once": {
                    p: once / size for p, size in sizes.items()
                },
                "maps": looks(maps),
            }
    details = {"store bytes": stores, "bytes of the other layouts": other, "by how peaked": others}
    return finish("size", claims(stores, other), parsed, how=HOW, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
