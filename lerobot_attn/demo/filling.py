"""Random weights for the demo policies, such that attention is peaked and differs wherever it may differ.

Knows neither policies nor checkpoints, only LeRobot's and transformers' modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Attention logits have about this standard deviation in a layer's flattest and in its sharpest head.
_FLATTEST_LOGIT_STD, _SHARPEST_LOGIT_STD = 1.0, 3.0
# Far enough to the right that SiLU is a straight line: 6 + x comes out as 6 + x, within 0.02.
_LINEAR_PART = 6.0


def fill_weight(layer: nn.Linear | nn.Conv2d, gain: float, draw: torch.Generator) -> None:
    """Fill a layer so that inputs of unit variance give outputs of standard deviation `gain`; no bias."""
    inputs = layer.weight[0].numel()
    layer.weight.normal_(std=gain * inputs**-0.5, generator=draw)
    if layer.bias is not None:
        layer.bias.zero_()


def fill_attention(attention: Any, draw: torch.Generator) -> None:
    """Fill one layer's attention, its heads ranging from flat to sharp in an order of the layer's own."""
    for linear in (attention.k_proj, attention.v_proj, attention.o_proj):
        fill_weight(linear, 1.0, draw)
    fill_weight(attention.q_proj, 1.0, draw)
    heads: Tensor = attention.q_proj.weight.view(-1, attention.head_dim, attention.q_proj.in_features)
    logit_std = torch.linspace(_FLATTEST_LOGIT_STD, _SHARPEST_LOGIT_STD, len(heads))
    heads *= logit_std[torch.randperm(len(heads), generator=draw)][:, None, None]


def fill_mlp(mlp: Any, draw: torch.Generator) -> None:
    """Fill a gated MLP."""
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        fill_weight(linear, 1.0, draw)


def fill_vision(vision: Any, draw: torch.Generator) -> None:
    """Fill a SigLIP-like image encoder: patches differ by their pixels first, then by their place."""
    embeddings = vision.embeddings
    fill_weight(embeddings.patch_embedding, 1.0, draw)
    embeddings.position_embedding.weight.normal_(std=0.5, generator=draw)
    for layer in vision.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1):
            fill_weight(linear, 1.0, draw)
        for linear in (attention.out_proj, mlp.fc2):
            fill_weight(linear, 0.5, draw)


def keep_channels_free(layers: Any, n_channels: int) -> None:
    """Let no layer write to the first channels, so that they carry through what they were given."""
    for layer in layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[:n_channels] = 0.0


def fill_action_time(model: Any, n_actions: int, draw: torch.Generator) -> None:
    """Fill what makes action tokens of noisy actions and flow time, as Pi0 and SmolVLA do: an MLP of both.

    The first channels of a token are the noisy action, twice as large; the others are made of both, so that
    denoise steps differ.
    """
    width = model.action_in_proj.out_features
    model.action_in_proj.bias.zero_()
    model.action_in_proj.weight.copy_(2.0 * torch.eye(width, n_actions))
    first, last = model.action_time_mlp_in, model.action_time_mlp_out
    fill_weight(first, 3.0, draw)
    first.weight[:n_actions] = torch.eye(n_actions, 2 * width)
    first.bias[:n_actions] = _LINEAR_PART
    fill_weight(last, 2.0, draw)
    last.weight[:n_actions] = torch.eye(n_actions, width)
    last.weight[n_actions:, :n_actions] = 0.0
    last.bias[:n_actions] = -_LINEAR_PART


def fill_velocity(out: nn.Linear, n_actions: int, carried: float, draw: torch.Generator) -> None:
    """Fill what makes a velocity of a token: `carried` times the noisy action, and a little of what was read.

    So Euler steps take the noise away, and images and words move the arm.
    """
    fill_weight(out, 1.5, draw)
    out.weight[:, :n_actions] = carried * torch.eye(n_actions)
