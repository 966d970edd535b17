"""Acting on a policy while it runs, with everything else held fixed: an intervention is data.

    with intervene(policy, [BlockAttention({"camera": "image"}, passes="both"), FixedNoise(0)]):
        action = policy.select_action(batch)

The data (`spec.py`) needs no framework; `intervene` imports torch when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lerobot_attn.interventions.firing import FireNeurons, SteerResidual
from lerobot_attn.interventions.spec import (
    BlockAttention,
    Condition,
    FixedNoise,
    Intervention,
    Occlude,
    Task,
)

if TYPE_CHECKING:
    from lerobot_attn.interventions.session import Intervener, intervene

__all__ = [
    "BlockAttention",
    "Condition",
    "FireNeurons",
    "FixedNoise",
    "Intervener",
    "Intervention",
    "Occlude",
    "SteerResidual",
    "Task",
    "intervene",
]


def __getattr__(name: str) -> Any:
    if name not in ("Intervener", "intervene"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("lerobot_attn.interventions.session"), name)
