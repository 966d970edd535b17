"""Where the demo policy's actions look when an object is named, on layouts that no training frame shows.

Recorded with the package's own capture: attention of the executed action tokens on both cameras' patches,
mean over heads and denoise steps. Pointing game (Zhang et al. 2016): does the most attended patch show the
named object? Chance is the share of patches that do. And: is the named object, per patch, the most attended
of those in sight? Chance is one over their number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generate import RENDER_PX, Job, approach_frames
from numpy.typing import NDArray
from rollout import load, observation
from scene import OBJECTS, Scene

from lerobot_attn import AttentionConfig, capture_attention

Array = NDArray[Any]

SEED = 20_260  # of layouts and poses that training never draws
POSES = 1000
SHOWS = 0.1  # share of a patch that must show an object
ALL = "all layers"


@dataclass(frozen=True)
class Look:
    """One frame and one named object, for one choice of layers.

    Attributes:
        layers: "layer 0", …, or "all layers".
        hit: whether the most attended patch shows the named object.
        hit_chance: share of patches that show it.
        most: whether the named object is, per patch, the most attended one; None where it is alone in sight.
        most_chance: one over the number of objects in sight.
    """

    layers: str
    hit: bool
    hit_chance: float
    most: bool | None
    most_chance: float


def grounding(
    checkpoint: Path,
    tasks: list[int],
    frames: int,
    progress: Callable[[], object] = lambda: None,
    poses: int = POSES,
) -> list[Look]:
    """Return where a checkpoint looks, `frames` frames of each task's scene.

    Args:
        checkpoint: folder of the checkpoint.
        tasks: whose scenes.
        frames: how many of each.
        progress: called after each frame.
        poses: of the arm, from which the frames draw.
    """
    policy, before, _ = load(checkpoint)
    rng = np.random.default_rng(SEED)
    looks: list[Look] = []
    for task in tasks:
        scene = Scene(task, image_px=RENDER_PX)
        try:
            shown = approach_frames(scene, Job("approach", task, 0, frames, SEED, Path(), poses=poses))
        finally:
            scene.close()
        for frame in shown:
            shares = frame["patches"].reshape(2 * 256, -1)[:, 1 : len(OBJECTS) + 1] / 255
            seen = shares > SHOWS  # (512, objects)
            possible = np.flatnonzero((np.asarray(frame["known"]) > 0) & seen.any(0))
            if len(possible):
                named = int(rng.choice(possible))
                looks += _looks(_attention(policy, before, frame, named), seen, named)
            progress()
    return looks


@torch.no_grad()
def _attention(policy: Any, before: Any, frame: dict[str, Any], named: int) -> Array:
    """Return the mean attention of the executed actions on each patch, (layers, 512)."""
    seen = observation(frame["images"], frame["state"], OBJECTS[named])
    noise = torch.randn(
        (1, policy.config.chunk_size, policy.config.max_action_dim),
        generator=torch.Generator().manual_seed(0),
    )
    executed = policy.config.n_action_steps
    with capture_attention(policy, AttentionConfig(layers="all")) as capture:
        policy.predict_action_chunk(before(seen), noise=noise)
        (record,) = capture.drain()
    assert record.suffix_attention is not None
    maps = np.asarray(record.suffix_attention[:, :, 0, :, :executed, :512], np.float32)
    return maps.mean(axis=(0, 2, 3))


def _looks(attention: Array, seen: Array, named: int) -> list[Look]:
    """Judge each layer, and the mean of all."""
    own = seen[:, named]
    visible = np.flatnonzero(seen.any(0))
    out = []
    for name, weights in [*((f"layer {i}", w) for i, w in enumerate(attention)), (ALL, attention.mean(0))]:
        per_patch = [weights[seen[:, number]].mean() for number in visible]
        most = None if len(visible) == 1 else bool(visible[int(np.argmax(per_patch))] == named)
        out.append(Look(name, bool(own[weights.argmax()]), float(own.mean()), most, 1 / len(visible)))
    return out


def table(looks: list[Look]) -> str:
    """Return the results as Markdown."""
    from evaluate import shown

    lines = ["| attention | pointing game | chance | named most attended | chance |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(look.layers for look in looks):
        own = [look for look in looks if look.layers == name]
        several = [look for look in own if look.most is not None]
        cells = (
            shown(look.hit for look in own),
            f"{100 * np.mean([look.hit_chance for look in own]):.1f} %",
            shown(bool(look.most) for look in several),
            f"{100 * np.mean([look.most_chance for look in several]):.0f} %",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
