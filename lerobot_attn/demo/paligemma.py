"""A small PaliGemma and its action expert, in place of those that Pi0 and Pi0.5 build; filled at random."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lerobot_attn.demo.filling import fill_attention, fill_mlp, fill_vision, fill_weight
from lerobot_attn.demo.small_towers import SmallTowers


def shrink_towers(towers: Any, config: SmallTowers) -> None:
    """Replace both towers of a LeRobot `PaliGemmaWithExpertModel` by small ones of the same classes."""
    vlm_config, expert_config = _shrunken_configs(towers, config)
    towers.paligemma = type(towers.paligemma)(vlm_config)
    towers.gemma_expert = type(towers.gemma_expert)(expert_config)
    towers.gemma_expert.model.embed_tokens = None  # as at full size: actions are projected, not embedded


def fill_towers(towers: Any, width: int, draw: torch.Generator) -> Any:
    """Fill both towers, but for norms that react to the flow time; return the action expert."""
    vlm, expert = towers.paligemma.model, towers.gemma_expert.model
    fill_vision(vlm.vision_tower.vision_model, draw)
    fill_weight(vlm.multi_modal_projector.linear, 1.0, draw)
    # Divided by the factor that Gemma multiplies its embeddings with, so that words are as large as patches.
    vlm.language_model.embed_tokens.weight.normal_(std=width**-0.5, generator=draw)
    # LeRobot loads lm_head into embed_tokens: the two must be equal. Neither policy uses its heads.
    towers.paligemma.lm_head.weight.copy_(vlm.language_model.embed_tokens.weight)
    towers.gemma_expert.lm_head.weight.normal_(std=width**-0.5, generator=draw)
    for tower in (vlm.language_model, expert):
        for layer in tower.layers:
            fill_attention(layer.self_attn, draw)
            fill_mlp(layer.mlp, draw)
    return expert


def _shrunken_configs(towers: Any, config: SmallTowers) -> tuple[Any, Any]:
    """Return small copies of the VLM's and the action expert's transformers configs."""
    vlm, expert = copy.deepcopy(towers.paligemma.config), copy.deepcopy(towers.gemma_expert.config)
    for tower in (vlm.text_config, expert):
        tower.hidden_size = config.width
        tower.intermediate_size = config.mlp_width
        tower.num_hidden_layers = config.depth
        tower.head_dim = config.head_dim
        tower.vocab_size = config.vocab_size
    if expert.adarms_cond_dim is not None:
        expert.adarms_cond_dim = config.width
    vlm.hidden_size = vlm.projection_dim = config.width
    vlm._vocab_size = vlm.image_token_index = config.vocab_size
    vision = vlm.vision_config
    vision.hidden_size = config.vision_width
    vision.intermediate_size = config.vision_mlp_width
    vision.num_hidden_layers = config.vision_depth
    vision.num_attention_heads = config.vision_heads
    vision.projection_dim = config.width
    vision.vocab_size = config.vocab_size
    return vlm, expert
