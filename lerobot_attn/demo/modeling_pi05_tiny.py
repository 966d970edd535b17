"""The demo policy `pi05_tiny`: LeRobot's Pi0.5 with its towers replaced by small ones.

All that runs is Pi0.5's own code; this module only builds smaller modules for it and fills them with random
weights, which those of a checkpoint replace. Knows nothing of checkpoints, tokenizers or of how attention is
captured.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from lerobot.policies.pi05.modeling_pi05 import PI05Policy, PI05Pytorch
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.utils.import_utils import require_package
from torch import Tensor, nn

from lerobot_attn.demo.configuration_pi05_tiny import PI05TinyConfig

# Attention logits have about this standard deviation in a layer's flattest and in its sharpest head.
_FLATTEST_LOGIT_STD, _SHARPEST_LOGIT_STD = 1.0, 3.0


class PI05TinyPolicy(PI05Policy):
    """Pi0.5 with small towers; its weights are random until it loads some."""

    config_class = PI05TinyConfig
    name = "pi05_tiny"

    def __init__(self, config: PI05TinyConfig, **kwargs: Any):
        """Build the small policy; the same `config.init_seed` gives the same weights.

        Args:
            config: Sizes and settings.
            **kwargs: What LeRobot's factory hands every policy, such as statistics; unused, as in Pi0.5.
        """
        require_package("transformers", extra="pi")
        # Not PI05Policy's own: it would build Pi0.5's 4 billion parameters. The steps are the same.
        super(PI05Policy, self).__init__(config)
        config.validate_features()
        self.config = config
        self.init_rtc_processor()
        self.model = _small_model(config, self.rtc_processor)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.to(config.device)
        self.reset()


def _small_model(config: PI05TinyConfig, rtc_processor: RTCProcessor | None) -> PI05Pytorch:
    """Return Pi0.5's model with small towers on the CPU, filled; the global random state stays as it was."""
    # PyTorch's constructors draw initial weights, all replaced in _fill; only the CPU's generator moves.
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):  # full size, but without memory
            model = PI05Pytorch(config, rtc_processor=rtc_processor)
        towers = model.paligemma_with_expert
        vlm_config, expert_config = _shrunken_configs(towers, config)
        with torch.device("cpu"):
            towers.paligemma = type(towers.paligemma)(vlm_config)
            towers.gemma_expert = type(towers.gemma_expert)(expert_config)
            towers.gemma_expert.model.embed_tokens = None  # as in Pi0.5: actions are projected, not embedded
            model.action_in_proj = nn.Linear(config.max_action_dim, config.width)
            model.action_out_proj = nn.Linear(config.width, config.max_action_dim)
            model.time_mlp_in = nn.Linear(config.width, config.width)
            model.time_mlp_out = nn.Linear(config.width, config.width)
        _fill(model, config)
    towers.to_bfloat16_for_selected_params(config.dtype)
    towers._set_requires_grad()
    return model


def _shrunken_configs(towers: Any, config: PI05TinyConfig) -> tuple[Any, Any]:
    """Return small copies of the VLM's and the action expert's transformers configs."""
    vlm, expert = copy.deepcopy(towers.paligemma.config), copy.deepcopy(towers.gemma_expert.config)
    for tower in (vlm.text_config, expert):
        tower.hidden_size = config.width
        tower.intermediate_size = config.mlp_width
        tower.num_hidden_layers = config.depth
        tower.head_dim = config.head_dim
        tower.vocab_size = config.vocab_size
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


@torch.no_grad()
def _fill(model: PI05Pytorch, config: PI05TinyConfig) -> None:
    """Fill every weight from `config.init_seed` so that attention is peaked and the actions stay small.

    Heads differ in sharpness, layers in their order, and denoise steps because AdaRMS, zero in a fresh Pi0.5,
    reacts to the flow time. The noisy action passes through channels that no layer writes to, so that the
    velocity takes the noise away, and what the layers read from images and words moves the arm a little.
    """
    draw = torch.Generator().manual_seed(config.init_seed)
    towers = model.paligemma_with_expert
    vlm, expert = towers.paligemma.model, towers.gemma_expert.model

    # Image encoder: patches differ by their pixels first, then by their place.
    vision = vlm.vision_tower.vision_model
    embeddings = vision.embeddings
    _fill_weight(embeddings.patch_embedding, 1.0, draw)
    embeddings.position_embedding.weight.normal_(std=0.5, generator=draw)
    for layer in vision.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1):
            _fill_weight(linear, 1.0, draw)
        for linear in (attention.out_proj, mlp.fc2):
            _fill_weight(linear, 0.5, draw)
    _fill_weight(vlm.multi_modal_projector.linear, 1.0, draw)

    # Divided by the factor that Gemma multiplies its embeddings with, so that words are as large as patches.
    vlm.language_model.embed_tokens.weight.normal_(std=config.width**-0.5, generator=draw)
    # LeRobot loads lm_head into embed_tokens: the two must be equal. Pi0.5 uses neither head.
    towers.paligemma.lm_head.weight.copy_(vlm.language_model.embed_tokens.weight)
    towers.gemma_expert.lm_head.weight.normal_(std=config.width**-0.5, generator=draw)

    carried = config.max_action_dim
    for tower in (vlm.language_model, expert):
        for layer in tower.layers:
            _fill_attention(layer.self_attn, draw)
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                _fill_weight(linear, 1.0, draw)
    for layer in expert.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[:carried] = 0.0
        _fill_modulation(layer.input_layernorm.dense, 0.5, draw)
        _fill_modulation(layer.post_attention_layernorm.dense, 0.5, draw)
    _fill_modulation(expert.norm.dense, 0.1, draw)

    _fill_weight(model.time_mlp_in, 2.0, draw)
    _fill_weight(model.time_mlp_out, 2.0, draw)
    model.action_in_proj.bias.zero_()
    model.action_in_proj.weight.copy_(2.0 * torch.eye(config.width, carried))
    _fill_weight(model.action_out_proj, 1.5, draw)
    # 3: after ten Euler steps 4 % of the noise is left; larger values overshoot and leave more (10: 12 %).
    model.action_out_proj.weight[:, :carried] = 3.0 * torch.eye(carried)


def _fill_weight(layer: nn.Linear | nn.Conv2d, gain: float, draw: torch.Generator) -> None:
    """Fill a layer so that inputs of unit variance give outputs of standard deviation `gain`; no bias."""
    inputs = layer.weight[0].numel()
    layer.weight.normal_(std=gain * inputs**-0.5, generator=draw)
    if layer.bias is not None:
        layer.bias.zero_()


def _fill_attention(attention: Any, draw: torch.Generator) -> None:
    """Fill one layer's attention, its heads ranging from flat to sharp in an order of the layer's own."""
    for linear in (attention.k_proj, attention.v_proj, attention.o_proj):
        _fill_weight(linear, 1.0, draw)
    _fill_weight(attention.q_proj, 1.0, draw)
    heads: Tensor = attention.q_proj.weight.view(-1, attention.head_dim, attention.q_proj.in_features)
    logit_std = torch.linspace(_FLATTEST_LOGIT_STD, _SHARPEST_LOGIT_STD, len(heads))
    heads *= logit_std[torch.randperm(len(heads), generator=draw)][:, None, None]


def _fill_modulation(dense: nn.Linear, gain: float, draw: torch.Generator) -> None:
    """Fill an AdaRMS layer's `(scale, shift, gate)`: the flow time sways all three, around 0, 0 and 0.5."""
    _fill_weight(dense, gain, draw)
    dense.bias.chunk(3)[2].fill_(0.5)
