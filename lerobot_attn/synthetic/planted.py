"""Attention that lies on known patches, words and tokens, and what it is: the truth to test against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.layout import Kind
from lerobot_attn.synthetic.plan import SyntheticPlan
from lerobot_attn.synthetic.prompts import Prompt, key_kinds, make_prompt, masked_keys
from lerobot_attn.synthetic.scene import planted_box
from lerobot_attn.synthetic.store import Maps, write_store

_PATCH_SHARE = (
    0.75  # of a camera's attention that lies on the planted patch; the rest is even over the others
)
_WORD_SHARE = 0.75  # likewise of the task's


def planted_patch(
    plan: SyntheticPlan, camera: int, *, frame: int, layer: int, head: int, denoise_step: int
) -> tuple[int, int]:
    """Return the (row, column) of the one patch that is attended to; it always shows a part of the image."""
    height, width = list(plan.image_px.values())[camera]
    geometry = plan.layout.cameras[camera].geometry
    assert geometry is not None
    if (layer, head) == plan.on_first_object:
        box = planted_box(plan, camera, next(iter(plan.objects)), frame)
        if box is not None:  # out of sight, it is not attended to
            return geometry.patch_at(box.centre[0] * height, box.centre[1] * width)
    y = (0.5 + (3 * frame + 2 * layer + 5 * head + denoise_step + camera) % 11) / 11 * height
    x = (0.5 + (2 * frame + 5 * layer + 3 * head + 4 * denoise_step + camera) % 9) / 9 * width
    return geometry.patch_at(y, x)


def planted_partner(
    plan: SyntheticPlan, patch: tuple[int, int], *, inference: int, camera: int, layer: int, head: int
) -> tuple[int, int]:
    """Return the (row, column) of the one patch that a patch attends to inside the vision tower.

    It lies below and to the right, over the edges: another for each camera, layer, head and inference. Unless
    the grid is small, a patch is not its partner's partner: whoever takes queries for keys finds another.
    """
    rows, columns = plan.patches
    return (patch[0] + 1 + inference + layer) % rows, (patch[1] + 2 + 2 * camera + 3 * head) % columns


def planted_word(plan: SyntheticPlan, frame: int) -> int:
    """Return which word of the task gets most of the task's attention at a frame, of those not cut off."""
    words = list(range(len(plan.task.split())))
    if plan.cut_prompt:
        words = make_prompt(plan, frame // plan.n_executed).words
    return words[frame % len(words)]


def planted_shares(plan: SyntheticPlan, frame: int, layer: int | None = None) -> dict[str, float]:
    """Return the share of each modality at a frame: the cameras' falls over the episode, the task's rises.

    What the episode lacks (a state token, special tokens) has no share and no entry. "action" is what an
    action token gives to itself.

    Args:
        plan: the episode's.
        frame: its number.
        layer: of a layer that cannot see the suffix there is no "action", and no "state" that lies in the
            suffix alone; the others' shares grow so that they sum to 1. Default: a layer that sees all.
    """
    phase = frame / max(1, plan.n_frames - 1)
    cameras = list(plan.image_px)
    shares = {cameras[0]: 0.45 - 0.25 * phase} | {name: 0.15 / (len(cameras) - 1) for name in cameras[1:]}
    if len(cameras) == 1:
        shares[cameras[0]] += 0.15
    shares |= {"task": 0.15 + 0.25 * phase, "state": 0.1, "template": 0.05, "action": 0.1}
    if any(plan.image_special):
        shares["special"] = 0.05
    in_prompt = plan.state_in_prompt
    if in_prompt and plan.cut_prompt:
        in_prompt = Kind.STATE in make_prompt(plan, min(frame, plan.n_frames - 1) // plan.n_executed).kind
    if not in_prompt and not plan.n_prefix_state and not plan.n_suffix_state:
        del shares["state"]
    shares = _rescaled(shares)
    return shares if layer is None else _seen_by(plan, layer, shares)


def write_planted_episode(folder: str | Path, plan: SyntheticPlan | None = None, **attributes: Any) -> Path:
    """Write an episode whose attention is that of `planted_patch`, `planted_word` and `planted_shares`.

    Of a camera's share three quarters lie on its planted patch, of the task's on the planted word; an action
    token's self-attention is all its own; of the template's tokens only begin-of-sequence is looked at. A
    token that stands before the actions in the suffix attends as the first action does. In prefix attention,
    word w looks at patch w of the first camera, each patch at the word of its own row, and everything else at
    itself. In the vision tower three quarters of a patch's attention lie on its `planted_partner`.

    Args:
        folder: a run's folder; the store goes to `attention/{task_group}_{task_id}/episode_{index}.zarr`.
        plan: its sizes.
        attributes: further group attributes.

    Returns:
        The store's path.
    """
    plan = plan or SyntheticPlan()

    def maps(inference: int, prompt: Prompt) -> Maps:
        layout, kinds = plan.layout, key_kinds(plan, prompt)
        full = np.zeros(
            (plan.n_denoise_steps, plan.n_layers, plan.n_heads, plan.n_queries, layout.n_keys), np.float32
        )
        for step, layer, head, query in np.ndindex(full.shape[:-1]):
            full[step, layer, head, query] = _planted_row(
                plan, prompt, kinds, inference, step, layer, head, query
            )
        full[:, list(plan.prefix_only_layers), :, :, layout.prefix_len :] = np.nan
        prefix = planted_prefix(plan, prompt) if plan.prefix_layers else None
        vision = planted_vision(plan, inference) if plan.vision_layers else None
        means = full[..., plan.executed_queries, :].mean(axis=3)
        return Maps(full[:, list(plan.layers)], means, prefix, vision)

    return write_store(Path(folder), plan, maps, attributes)


def _rescaled(shares: dict[str, float]) -> dict[str, float]:
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def _seen_by(plan: SyntheticPlan, layer: int, shares: dict[str, float]) -> dict[str, float]:
    """Leave out what a layer cannot see."""
    if layer not in plan.prefix_only_layers:
        return shares
    absent = {"action"}
    if not plan.state_in_prompt and not plan.n_prefix_state:
        absent.add("state")
    return _rescaled({name: share for name, share in shares.items() if name not in absent})


def _planted_row(
    plan: SyntheticPlan,
    prompt: Prompt,
    kinds: NDArray[np.int8],
    inference: int,
    step: int,
    layer: int,
    head: int,
    query: int,
) -> NDArray[np.float32]:
    layout = plan.layout
    frame = inference * plan.n_executed + max(0, query - plan.first_action_query)
    # A chunk's last actions may lie beyond the episode; what is planted is that of its last frame.
    of_frame = min(frame, plan.n_frames - 1)
    if plan.cut_prompt:  # the prompt is this inference's, also for actions that are never executed
        of_frame = min(of_frame, (inference + 1) * plan.n_executed - 1)
        frame = of_frame
    shares = _seen_by(plan, layer, planted_shares(plan, of_frame))
    row = np.zeros(layout.n_keys, np.float32)
    images = [segment for segment in layout.segments if segment.kind == "image"]
    for index, segment in enumerate(images[: len(plan.image_px)]):
        share = shares[segment.name]
        patch_row, column = planted_patch(plan, index, frame=frame, layer=layer, head=head, denoise_step=step)
        row[segment.start : segment.stop] = share * (1 - _PATCH_SHARE) / (len(segment) - 1)
        row[segment.start + patch_row * plan.grid[1] + column] = share * _PATCH_SHARE
    start, words = layout.language.start, prompt.words
    for word in words:
        tokens = np.flatnonzero(prompt.word == word)
        here = _WORD_SHARE if word == planted_word(plan, frame) else (1 - _WORD_SHARE) / (len(words) - 1)
        here = 1 if len(words) == 1 else here
        row[start + tokens] = shares["task"] * here / len(tokens)
    sees_suffix = layer not in plan.prefix_only_layers
    visible = np.arange(layout.n_keys) < (layout.n_keys if sees_suffix else layout.prefix_len)
    for kind, name in ((Kind.STATE, "state"), (Kind.SPECIAL, "special")):
        keys = np.flatnonzero((kinds == kind) & visible)
        row[keys] = shares.get(name, 0) / max(1, len(keys))
    row[start] = shares["template"]
    if sees_suffix:
        row[layout.prefix_len + query] += shares["action"]
    return row


def planted_vision(plan: SyntheticPlan, inference: int) -> NDArray[np.float32]:
    """Return (camera, vision_layer, vision_head, patch_query, patch_key), as `planted_partner` says."""
    rows, columns = plan.patches
    n = rows * columns
    sizes = len(plan.image_px), len(plan.vision_layers), plan.n_vision_heads
    maps = np.full((*sizes, n, n), (1 - _PATCH_SHARE) / max(1, n - 1), np.float32)
    for camera, position, head, patch in np.ndindex(*sizes, n):
        layer = plan.vision_layers[position]
        row, column = planted_partner(
            plan, divmod(patch, columns), inference=inference, camera=camera, layer=layer, head=head
        )
        maps[camera, position, head, patch, row * columns + column] = _PATCH_SHARE
    return maps


def planted_prefix(plan: SyntheticPlan, prompt: Prompt) -> NDArray[np.float32]:
    """Return (prefix_layer, head, prefix_query, prefix_key), as `write_planted_episode` says."""
    layout = plan.layout
    n, words = layout.prefix_len, prompt.words
    rows = np.eye(n, dtype=np.float32)
    tokens = [layout.language.start + np.flatnonzero(prompt.word == word) for word in words]
    images = [segment for segment in layout.segments if segment.kind == "image"]
    for word, keys in zip(words, tokens, strict=True):
        rows[keys] = 0
        rows[keys, images[0].start + word] = 1
    for segment in images[: len(plan.image_px) - plan.n_suffix_cameras]:
        for patch in range(len(segment)):
            keys = tokens[patch // plan.grid[1] % len(words)]
            rows[segment.start + patch] = 0
            rows[segment.start + patch, keys] = 1 / len(keys)
    rows[masked_keys(plan, prompt)[:n]] = 0
    return np.broadcast_to(rows, (len(plan.prefix_layers), plan.n_heads, n, n))
