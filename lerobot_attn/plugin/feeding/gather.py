"""The facts of a policy's input, read from LeRobot's configs, processors and batches.

Reads alone: runs no policy, moves no random state, changes no processor. Judges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lerobot_attn.capture import find_tokenizer
from lerobot_attn.plugin.environments import ACTION_NAMES, STATE_NAMES
from lerobot_attn.plugin.feeding.facts import ACTION, STATE, Expected, Fed, World
from lerobot_attn.policies.given_prompt import PromptReader

_IMAGES = "observation.image"
_PATCHES = "pixel_values"
_TOKENS, _MASK = "observation.language.tokens", "observation.language.attention_mask"


def expected_of(config: Any, preprocessor: Any, postprocessor: Any) -> Expected:
    """Return what a policy expects.

    Args:
        config: its LeRobot config.
        preprocessor: its pipeline, whose statistics scale what it is fed.
        postprocessor: its pipeline, whose statistics scale its actions back; None: it is unknown, and how
            actions are scaled is not judged.
    """
    from lerobot.utils.constants import IMAGENET_STATS

    inputs: Mapping[str, Any] = getattr(config, "input_features", None) or {}
    outputs: Mapping[str, Any] = getattr(config, "output_features", None) or {}
    wanted = getattr(config, "normalization_mapping", None) or {}
    modes = {name: _mode(wanted.get(feature.type.name)) for name, feature in {**inputs, **outputs}.items()}
    statistics: dict[str, dict[str, np.ndarray]] = {}
    steps = [(step, False) for step in getattr(preprocessor, "steps", ())]
    steps += [(step, True) for step in getattr(postprocessor, "steps", ())]
    cameras = {name: tuple(f.shape) for name, f in inputs.items() if f.type.name == "VISUAL"}
    for step, scales_back in steps:
        if "ImageNetNormalize" in type(step).__name__:  # X-VLA's, which has no statistics of its own
            found = {key: np.reshape(IMAGENET_STATS[key], (3, 1, 1)) for key in ("mean", "std")}
            modes |= dict.fromkeys(cameras, "MEAN_STD")
            statistics |= dict.fromkeys(cameras, found)
        if not hasattr(step, "norm_map") or not hasattr(step, "stats"):
            continue
        only = getattr(step, "normalize_observation_keys", None)
        for name, feature in step.features.items():
            if (name == ACTION) != scales_back:
                continue
            is_left_out = only is not None and name != ACTION and name not in only
            modes[name] = "IDENTITY" if is_left_out else _mode(step.norm_map.get(feature.type))
            found = {key: np.asarray(value) for key, value in ((step.stats or {}).get(name) or {}).items()}
            if feature.type.name == "VISUAL":  # as LeRobot does with flat ones
                found = {key: value.reshape(-1, 1, 1) for key, value in found.items()}
            statistics[name] = found
    if postprocessor is None:
        modes.pop(ACTION, None)
    state, action = inputs.get(STATE), outputs.get(ACTION)
    is_compiled = bool(getattr(config, "compile_model", False))
    return Expected(
        cameras=cameras,
        state_dim=None if state is None else int(state.shape[0]),
        action_dim=None if action is None else int(action.shape[0]),
        most_dims=getattr(config, "max_state_dim", None),
        modes=modes,
        statistics=statistics,
        n_action_steps=getattr(config, "n_action_steps", None),
        chunk_size=getattr(config, "chunk_size", None),
        relative=bool(getattr(config, "use_relative_actions", False)),
        dtype=getattr(config, "dtype", None),
        device=str(getattr(config, "device", None) or "cpu"),
        compile_mode=str(getattr(config, "compile_mode", None) or "default") if is_compiled else None,
        takes_words=find_tokenizer(preprocessor) is not None,
    )


class FedReader:
    """Reads what a policy is fed from the batches that its preprocessor returns.

    Args:
        config: the policy's LeRobot config.
        preprocessor: its pipeline, whose tokenizer wrote the prompt.
    """

    def __init__(self, config: Any, preprocessor: Any):
        self._prompts = PromptReader(config, find_tokenizer(preprocessor))

    def read(self, batch: Mapping[str, Any], row: int, task: str | None) -> Fed:
        """Return one observation of a batch.

        Args:
            batch: feature → (batch, …), as the policy gets it.
            row: which observation.
            task: the instruction as it was given; None: unknown.
        """
        pictures = {
            name: _array(value[row], n_dims=3)
            for name, value in batch.items()
            if name.startswith(_IMAGES) and isinstance(value, Tensor) and value.ndim >= 4
        }
        state, tokens, mask = batch.get(STATE), batch.get(_TOKENS), batch.get(_MASK)
        prompt = None
        if isinstance(tokens, Tensor):
            ids = tokens[row] if mask is None else tokens[row][mask[row].bool()]
            prompt = self._prompts.read(ids.tolist())
        return Fed(
            pictures=pictures,
            state=_array(state[row], n_dims=1) if isinstance(state, Tensor) and state.ndim > 1 else None,
            task=task,
            prompt=None if prompt is None else prompt.text,
            is_cut=prompt is not None and prompt.is_cut,
            digits=() if prompt is None else prompt.digits,
            has_patches=not pictures and _PATCHES in batch,
        )


def environment_of(config: Any) -> World:
    """Return what an environment's LeRobot config says of it."""
    action = (getattr(config, "features", None) or {}).get(ACTION)
    mode = getattr(config, "control_mode", None)
    return World(
        what=f"the environment {config.type}",
        state_names=STATE_NAMES.get(config.type, ()),
        action_names=ACTION_NAMES.get(config.type, ()),
        action_dim=None if action is None else int(action.shape[0]),
        fps=getattr(config, "fps", None),
        control_mode=mode if isinstance(mode, str) else None,
    )


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of observations in a batch."""
    return next(len(v) for k, v in batch.items() if k.startswith("observation.") and isinstance(v, Tensor))


def _mode(mode: Any) -> str:
    return str(getattr(mode, "value", mode) or "IDENTITY")


def _array(value: Tensor, n_dims: int) -> np.ndarray:
    """Return an observation's array; of several steps (history) the newest."""
    while value.ndim > n_dims:
        value = value[-1]
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()
