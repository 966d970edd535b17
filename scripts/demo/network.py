"""Pi0.5's forward pass as training needs it: the same numbers as LeRobot's, several times as fast.

What is left out never reaches an action: the masked third camera, padding of the prompt, and what the VLM's
last layer would write. Patches may be dropped, each keeping its position; several noisy chunks share one
prefix; of a chunk some tokens may be taken. Works on the modules of a `pi05_tiny` policy and changes nothing
in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy

N_CAMERAS, N_PATCHES = 2, 256


@dataclass(frozen=True)
class Prefix:
    """What the action expert reads of images and prompt.

    Attributes:
        keys: of each layer, (batch, 1, tokens, head size).
        values: likewise.
        valid: (batch, tokens), whether a token is there; padding of the prompts is not.
        length: (batch,), number of tokens before the actions, as positions count them: dropped patches count.
    """

    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor
    length: Tensor


def image_tokens(policy: PI05TinyPolicy, images: Tensor) -> Tensor:
    """Return the image tokens that the VLM gets.

    Args:
        policy: the policy.
        images: (batch, 2, 3, 224, 224), from -1 to 1.

    Returns:
        (batch, 512, width): first camera, then the second.
    """
    tokens: Tensor = policy.model.paligemma_with_expert.embed_image(images.flatten(0, 1))
    return tokens.unflatten(0, (-1, N_CAMERAS)).flatten(1, 2)


def encode(
    policy: PI05TinyPolicy, images: Tensor, prompt: Tensor, mask: Tensor, places: Tensor | None = None
) -> Prefix:
    """Run the VLM over images and prompt.

    Args:
        policy: the policy.
        images: (batch, patches, width), as `image_tokens` returns them, or some of them.
        prompt: (batch, tokens), token ids.
        mask: (batch, tokens), bool: which of them are no padding.
        places: (batch, patches), which of the 512 patches `images` are; all of them by default.
    """
    language = policy.model.paligemma_with_expert.paligemma.model.language_model
    hidden = torch.cat([images, language.embed_tokens(prompt)], dim=1)
    batch, n_images = images.shape[:2]
    if places is None:
        places = torch.arange(n_images).expand(batch, -1)
    n_all = N_CAMERAS * N_PATCHES
    positions = torch.cat([places, n_all + mask.cumsum(1) - 1], dim=1)
    valid = torch.cat([torch.ones(batch, n_images, dtype=torch.bool), mask], dim=1)
    turns = language.rotary_emb(hidden, positions)
    allowed = valid[:, None, None, :]
    keys, values = [], []
    for layer in language.layers:
        normed, _ = layer.input_layernorm(hidden)
        query, key, value = _project(layer.self_attn, normed, turns)
        keys.append(key)
        values.append(value)
        if layer is language.layers[-1]:
            break  # nothing reads what it would write
        hidden = hidden + _attend(layer.self_attn, query, key, value, allowed)
        normed, _ = layer.post_attention_layernorm(hidden)
        hidden = hidden + layer.mlp(normed)
    return Prefix(keys, values, valid, n_all + mask.sum(1))


def velocity(
    policy: PI05TinyPolicy, prefix: Prefix, noisy: Tensor, time: Tensor, tokens: Tensor | None = None
) -> Tensor:
    """Run the action expert once.

    Args:
        policy: the policy.
        prefix: of `batch` observations.
        noisy: (batch × draws, tokens, 32), noisy action chunks; the draws of one observation follow one
            another.
        time: (batch × draws,), flow time: 1 is noise.
        tokens: which of the chunk's tokens `noisy` are, ascending; the first ones by default.

    Returns:
        The velocity from actions to noise, shaped as `noisy`.
    """
    model = policy.model
    expert = model.paligemma_with_expert.gemma_expert.model
    language = model.paligemma_with_expert.paligemma.model.language_model
    batch, n = len(prefix.length), noisy.shape[1]
    draws = len(noisy) // batch
    tokens = torch.arange(n) if tokens is None else tokens

    embedded = create_sinusoidal_pos_embedding(
        time,
        model.action_in_proj.out_features,
        min_period=policy.config.min_period,
        max_period=policy.config.max_period,
        device=time.device,
    ).to(time.dtype)
    condition = F.silu(model.time_mlp_out(F.silu(model.time_mlp_in(embedded))))
    hidden = model.action_in_proj(noisy)
    turns = language.rotary_emb(hidden, (prefix.length[:, None] + tokens).repeat_interleave(draws, dim=0))
    # The draws of one observation lie side by side: all see its prefix, none another draw.
    own = torch.eye(draws, dtype=torch.bool).repeat_interleave(n, 0).repeat_interleave(n, 1)
    seen = prefix.valid[:, None, None, :].expand(-1, 1, draws * n, -1)
    allowed = torch.cat([seen, own.expand(batch, 1, -1, -1)], dim=3)
    for layer, past_key, past_value in zip(expert.layers, prefix.keys, prefix.values, strict=True):
        normed, gate = layer.input_layernorm(hidden, condition)
        query, key, value = (_side_by_side(part, draws) for part in _project(layer.self_attn, normed, turns))
        read = _attend(
            layer.self_attn, query, torch.cat([past_key, key], 2), torch.cat([past_value, value], 2), allowed
        )
        hidden = hidden + read.reshape(hidden.shape) * gate
        normed, gate = layer.post_attention_layernorm(hidden, condition)
        hidden = hidden + layer.mlp(normed) * gate
    hidden, _ = expert.norm(hidden, condition)
    out: Tensor = model.action_out_proj(hidden)
    return out


@torch.no_grad()
def sample(policy: PI05TinyPolicy, prefix: Prefix, noise: Tensor, steps: int) -> Tensor:
    """Return the chunks that `noise`, (batch, tokens, 32), becomes in so many Euler steps."""
    chunk = noise
    for step in range(steps):
        time = torch.full((len(noise),), 1 - step / steps)
        chunk = chunk - velocity(policy, prefix, chunk, time) / steps
    return chunk


def _project(attention: Any, hidden: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (batch, heads, tokens, head size), keys and values of one head, turned by position."""
    query, key, value = (
        linear(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *turns, unsqueeze_dim=1)
    return query, key, value


def _side_by_side(part: Tensor, draws: int) -> Tensor:
    """Bring (batch × draws, heads, tokens, size) into (batch, heads, draws × tokens, size)."""
    return part.unflatten(0, (-1, draws)).transpose(1, 2).flatten(2, 3)


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Return what the attention writes, (batch, queries, width); all heads share one key head.

    Heads are laid behind one another as queries of that one head, which is what makes it fast.
    """
    batch, heads, n, size = query.shape
    mask = None if bool(allowed.all()) else allowed.expand(-1, -1, n, -1).repeat(1, 1, heads, 1)
    read = F.scaled_dot_product_attention(
        query.reshape(batch, 1, heads * n, size), key, value, attn_mask=mask, scale=attention.scaling
    )
    out: Tensor = attention.o_proj(read.view(batch, heads, n, size).transpose(1, 2).flatten(2))
    return out
