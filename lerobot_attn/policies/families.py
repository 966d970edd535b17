"""Which of LeRobot's policy types are captured, and for each of the others why not. Imports no framework.

`lerobot-attn policies` prints it for the LeRobot that is installed; docs/policies.md has the same table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple


class Family(NamedTuple):
    """What is offered for a policy type that has an adapter."""

    captured: str  # which attention
    edited: bool  # whether a probe may replace attention before it is applied
    compiled: bool  # whether a compiled policy can be read and stay compiled


class Row(NamedTuple):
    """A policy type in the table. `why_not` is empty for one that is captured."""

    policy_type: str
    captured: str
    edited: str
    compiled: str
    why_not: str


HEADINGS = ("policy type", "captured", "edited", "stays compiled", "why not")

_VLA = "the action expert's, the language model's and the vision tower's attention"

# Of those with an adapter.
FAMILIES: dict[str, Family] = {
    "act": Family("the decoder's cross-attention, the encoder's self-attention", True, False),
    "eo1": Family("Qwen2.5-VL's attention, over the prefix and over the actions", True, False),
    "evo1": Family("the action head's cross-attention", True, False),
    "groot": Family("the action head's attention, to and over the prompt and among actions", True, False),
    "molmoact2": Family("the action expert's cross-, the language model's self-attention", True, False),
    "pi0": Family(_VLA, True, True),
    "pi05": Family(_VLA, True, True),
    "pi0_fast": Family("each decoded token's attention, and that among the prefix", True, False),
    "smolvla": Family(_VLA, True, True),
    "wall_x": Family("Qwen2.5-VL's attention, over the prefix and over the actions", True, False),
    "xvla": Family("the soft-prompted transformer's and Florence-2's encoder's attention", True, False),
}

_NOT_YET = "no adapter yet; it is built around {} from the Hub"

# Of LeRobot's other types, found by building them or by reading their code (LeRobot 0.6.1).
WHY_NOT: dict[str, str] = {
    "diffusion": "no attention over images: a U-Net over pooled features (its softmax makes keypoints)",
    "fastwam": _NOT_YET.format("Wan 2.2"),
    "gaussian_actor": "no attention: a convolutional encoder and MLPs",
    "lingbot_va": _NOT_YET.format("Wan's autoencoder and text encoder"),
    "multi_task_dit": "no map of an image: each image enters as one vector (CLIP's, from the Hub)",
    "tdmpc": "no attention: convolutions and MLPs",
    "vla_jepa": _NOT_YET.format("Qwen3-VL and V-JEPA"),
    "vqbet": "no map of an image: each image enters as one vector",
}


def table(
    policy_types: Iterable[str], adapters: Collection[str], parents: Mapping[str, Sequence[str]] | None = None
) -> list[Row]:
    """Return a row for each policy type, captured ones first.

    Args:
        policy_types: as registered with LeRobot.
        adapters: those that have an adapter.
        parents: policy type → the types that it is derived from, nearest first; without it, none is.
    """
    rows = []
    for name in sorted(policy_types):
        served = next((one for one in (name, *(parents or {}).get(name, ())) if one in adapters), None)
        if served is None:
            why = WHY_NOT.get(name, "not known to this version of lerobot-attn")
            rows.append(Row(name, "no", "", "", why))
            continue
        family = FAMILIES[served]
        captured = family.captured + (f" (as {served})" if served != name else "")
        edited, compiled = ("yes" if has else "no" for has in (family.edited, family.compiled))
        rows.append(Row(name, captured, edited, compiled, ""))
    return sorted(rows, key=lambda row: bool(row.why_not))


def markdown(adapters: Collection[str]) -> str:
    """Return the table of LeRobot's own types as Markdown, for docs/policies.md."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    for row in table({*adapters, *WHY_NOT}, adapters):
        lines.append(f"| `{row.policy_type}` | {' | '.join(row[1:])} |")
    return "\n".join(re.sub(" +", " ", line) for line in lines)
