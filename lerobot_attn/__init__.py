"""See what a vision-language-action policy attends to.

    from lerobot_attn import capture_attention, open_episode, open_run

Importing the package loads neither torch nor LeRobot, nor zarr: names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AttentionCapture": "lerobot_attn.capture",
    "AttentionConfig": "lerobot_attn.config",
    "AttentionPolicy": "lerobot_attn.capture.policy",
    "BlockAttention": "lerobot_attn.interventions",
    "Condition": "lerobot_attn.interventions",
    "FireNeurons": "lerobot_attn.interventions",
    "FixedNoise": "lerobot_attn.interventions",
    "InferenceRecord": "lerobot_attn.capture",
    "Occlude": "lerobot_attn.interventions",
    "SteerResidual": "lerobot_attn.interventions",
    "Task": "lerobot_attn.interventions",
    "attach_masks": "lerobot_attn.store.attach",
    "capture_attention": "lerobot_attn.capture",
    "intervene": "lerobot_attn.interventions",
    "open_episode": "lerobot_attn.store.reader",
    "record_episodes": "lerobot_attn.plugin.recorders",
    "open_run": "lerobot_attn.store.runs",
    "record_dataset": "lerobot_attn.plugin.recorders",
}
__all__ = [
    "AttentionCapture",
    "AttentionConfig",
    "AttentionPolicy",
    "BlockAttention",
    "Condition",
    "FireNeurons",
    "FixedNoise",
    "InferenceRecord",
    "Occlude",
    "SteerResidual",
    "Task",
    "attach_masks",
    "capture_attention",
    "intervene",
    "open_episode",
    "open_run",
    "record_dataset",
    "record_episodes",
]

if TYPE_CHECKING:
    from lerobot_attn.capture import AttentionCapture, InferenceRecord, capture_attention
    from lerobot_attn.capture.policy import AttentionPolicy
    from lerobot_attn.config import AttentionConfig
    from lerobot_attn.interventions import (
        BlockAttention,
        Condition,
        FireNeurons,
        FixedNoise,
        Occlude,
        SteerResidual,
        Task,
        intervene,
    )
    from lerobot_attn.plugin.recorders import record_dataset, record_episodes
    from lerobot_attn.store.attach import attach_masks
    from lerobot_attn.store.reader import open_episode
    from lerobot_attn.store.runs import open_run


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
