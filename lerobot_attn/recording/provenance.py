"""What every store says of where it comes from: versions and the policy. Knows no loop and no folder."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from lerobot_attn.config import AttentionConfig
from lerobot_attn.policies.base import PolicyDescription
from lerobot_attn.store.video import find_encoder

_DISTRIBUTIONS = {
    "lerobot_attn": "lerobot_policy_attn",
    "lerobot": "lerobot",
    "torch": "torch",
    "zarr": "zarr",
    "numpy": "numpy",
}


def versions() -> dict[str, str]:
    """Return the versions of what made a recording, by the name of the import."""
    return {name: importlib.metadata.version(wanted) for name, wanted in _DISTRIBUTIONS.items()}


def checkpoint_facts(config: Any) -> dict[str, Any]:
    """Return where a policy comes from and how it runs, of its LeRobot config."""
    path, device = getattr(config, "pretrained_path", None), getattr(config, "device", None)
    return {
        "path": None if path is None else str(path),
        "dtype": getattr(config, "dtype", None),
        "device": None if device is None else str(device),
    }


def policy_facts(sizes: PolicyDescription) -> dict[str, Any]:
    """Return what a live policy is, as the store's `policy` attribute says it."""
    return {
        "type": sizes.policy_type,
        "n_layers": sizes.n_layers,
        "n_prefix_layers": sizes.n_prefix_layers,
        "n_heads": sizes.n_heads,
        "n_denoise_steps": sizes.n_denoise_steps,
        "chunk_size": sizes.chunk_size,
        "n_action_steps": sizes.n_action_steps,
        "random_weights": sizes.random_weights,
        "remark": sizes.remark,
        **({"reads_last_prefix_layer": True} if sizes.reads_last_prefix_layer else {}),
        **({} if sizes.shown_layer is None else {"shown_layer": sizes.shown_layer}),
        **({"n_decode_steps": sizes.n_decode_steps} if sizes.n_decode_steps else {}),
        **(
            {"n_vision_layers": sizes.n_vision_layers, "n_vision_heads": sizes.n_vision_heads}
            if sizes.n_vision_layers
            else {}
        ),
    }


def check_encoder(policy: Any, config: AttentionConfig) -> None:
    """Find the video encoder before anything runs, where a camera is to be filmed.

    Raises:
        StoreError: there is none.
    """
    cameras = getattr(getattr(policy, "config", None), "image_features", True)
    if config.cameras is True and cameras:
        find_encoder()
