"""Numbers distributed like a policy's attention, for measuring size and speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.synthetic.plan import SyntheticPlan
from lerobot_attn.synthetic.planted import planted_prefix, planted_vision
from lerobot_attn.synthetic.prompts import Prompt, masked_keys
from lerobot_attn.synthetic.store import Maps, write_store


def write_softmax_episode(folder: str | Path, plan: SyntheticPlan | None = None, **attributes: Any) -> Path:
    """Write an episode of numbers distributed like a policy's attention, for measuring size and speed.

    Rows are softmaxes in float32 over logits of normal parts: one per (layer, head, key) with standard
    deviation 2, which every inference shares; a drift of 0.7 per inference; 0.5 per denoise step; 0.4 per
    query; independent noise of 0.1. So rows are peaked and correlated over inferences, steps and queries.
    Masked keys are exactly 0; keys that a layer cannot see are NaN.

    Args:
        folder: a run's folder.
        plan: its sizes.
        attributes: further group attributes.

    Returns:
        The store's path.
    """
    plan = plan or SyntheticPlan.full_size()
    rng = np.random.default_rng(plan.seed)
    n_keys, first = plan.layout.n_keys, plan.executed_queries.start
    blind = set(plan.prefix_only_layers)
    suffix = np.arange(n_keys) >= plan.layout.prefix_len

    def normal(*shape: int, scale: float) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    base = normal(plan.n_layers, plan.n_heads, 1, n_keys, scale=2)

    def maps(inference: int, prompt: Prompt) -> Maps:
        drift = base + normal(plan.n_layers, plan.n_heads, 1, n_keys, scale=0.7)
        steps = normal(plan.n_denoise_steps, 1, plan.n_heads, 1, n_keys, scale=0.5)
        queries = normal(1, plan.n_heads, plan.n_queries, n_keys, scale=0.4)
        masked = np.full(n_keys, np.float32(0))
        masked[masked_keys(plan, prompt)] = -np.inf

        def rows(layers: list[int], start: int, stop: int) -> NDArray[np.float32]:
            logits = drift[layers][None] + steps[:, :1] + queries[:, :, start:stop]
            logits += normal(*logits.shape, scale=0.1) + masked
            unseen = [position for position, layer in enumerate(layers) if layer in blind]
            for position in unseen:
                logits[:, position, ..., suffix] = -np.inf
            np.exp(logits - logits.max(axis=-1, keepdims=True), out=logits)
            logits /= logits.sum(axis=-1, keepdims=True)
            for position in unseen:
                logits[:, position, ..., suffix] = np.nan
            return logits

        every = list(range(plan.n_layers))
        executed = [rows([layer], first, first + plan.n_executed).mean(axis=3) for layer in every]
        prefix = planted_prefix(plan, prompt) if plan.prefix_layers else None
        vision = planted_vision(plan, inference) if plan.vision_layers else None
        means = np.concatenate(executed, axis=1)
        return Maps(rows(list(plan.layers), 0, plan.n_queries), means, prefix, vision)

    return write_store(Path(folder), plan, maps, attributes)
