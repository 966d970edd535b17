"""Adapters: one per policy family. This module finds the right one and imports no framework until then."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lerobot_attn.errors import UnsupportedPolicyError
from lerobot_attn.policies.families import WHY_NOT

if TYPE_CHECKING:
    from lerobot_attn.policies.base import PolicyAdapter

# Policy type as registered with LeRobot → where its adapter lives. A type derived from one of these uses its
# parent's.
ADAPTERS: dict[str, tuple[str, str]] = {
    "act": ("lerobot_attn.policies.act", "ACTAdapter"),
    "eo1": ("lerobot_attn.policies.eo1", "EO1Adapter"),
    "evo1": ("lerobot_attn.policies.evo1", "EVO1Adapter"),
    "groot": ("lerobot_attn.policies.groot", "GrootAdapter"),
    "molmoact2": ("lerobot_attn.policies.molmoact2", "MolmoAct2Adapter"),
    "pi0": ("lerobot_attn.policies.pi0", "Pi0Adapter"),
    "pi05": ("lerobot_attn.policies.pi05", "Pi05Adapter"),
    "pi0_fast": ("lerobot_attn.policies.pi0_fast", "Pi0FastAdapter"),
    "smolvla": ("lerobot_attn.policies.smolvla", "SmolVLAAdapter"),
    "wall_x": ("lerobot_attn.policies.wall_x", "WallXAdapter"),
    "xvla": ("lerobot_attn.policies.xvla", "XVLAAdapter"),
}


def adapter_type(config: Any) -> str:
    """Return the policy type whose adapter serves a policy of this config.

    Args:
        config: a LeRobot `PreTrainedConfig`, or None when a command was given no policy.

    Raises:
        UnsupportedPolicyError: no adapter serves it.
    """
    for cls in type(config).__mro__:
        try:
            name = config.get_choice_name(cls)
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
        if name in ADAPTERS:
            return name
    got = getattr(config, "type", None) or type(config).__name__
    why = f" ({WHY_NOT[got]})" if got in WHY_NOT else ""
    raise UnsupportedPolicyError(
        f"attention capture does not support the policy type {got!r}{why}; supported: "
        f"{', '.join(sorted(ADAPTERS))} "
        "and policies derived from them; evaluate without --eval.save_attention_maps or use a supported "
        "policy"
    )


def adapter_for(policy: Any) -> PolicyAdapter:
    """Build the adapter for a live policy, looking through PEFT and `AttentionPolicy` wrappers.

    Raises:
        UnsupportedPolicyError: no adapter serves it.
    """
    policy = unwrap(policy)
    return adapter_class(getattr(policy, "config", None))(policy)


def adapter_class(config: Any) -> type[PolicyAdapter]:
    """Return the adapter of the policies that have this config.

    Raises:
        UnsupportedPolicyError: there is none.
    """
    module, name = ADAPTERS[adapter_type(config)]
    found: type[PolicyAdapter] = getattr(importlib.import_module(module), name)
    return found


def unwrap(policy: Any) -> Any:
    """Return the policy itself from inside a `PeftModel` or another wrapper that has `get_base_model`."""
    while hasattr(policy, "get_base_model"):
        policy = policy.get_base_model()
    return policy
