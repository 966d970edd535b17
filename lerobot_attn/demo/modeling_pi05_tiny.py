"""The demo policy `pi05_tiny`: LeRobot's Pi0.5 with its towers replaced by small ones.

All that runs is Pi0.5's own code; this module only builds smaller modules for it and fills them with random
weights, which those of a checkpoint replace. Knows nothing of checkpoints, tokenizers or of how attention is
captured.
"""

from __future__ import annotations

from typing import Any

import torch
from lerobot.policies.pi05.modeling_pi05 import PI05Policy, PI05Pytorch
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.utils.import_utils import require_package
from torch import nn

from lerobot_attn.demo.configuration_pi05_tiny import PI05TinyConfig
from lerobot_attn.demo.filling import fill_velocity, fill_weight, keep_channels_free
from lerobot_attn.demo.paligemma import fill_towers, shrink_towers


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
        with torch.device("cpu"):
            shrink_towers(model.paligemma_with_expert, config)
            model.action_in_proj = nn.Linear(config.max_action_dim, config.width)
            model.action_out_proj = nn.Linear(config.width, config.max_action_dim)
            model.time_mlp_in = nn.Linear(config.width, config.width)
            model.time_mlp_out = nn.Linear(config.width, config.width)
        _fill(model, config)
    model.paligemma_with_expert.to_bfloat16_for_selected_params(config.dtype)
    model.paligemma_with_expert._set_requires_grad()
    return model


@torch.no_grad()
def _fill(model: PI05Pytorch, config: PI05TinyConfig) -> None:
    """Fill every weight from `config.init_seed` so that attention is peaked and the actions stay small.

    Heads differ in sharpness, layers in their order, and denoise steps because AdaRMS, zero in a fresh Pi0.5,
    reacts to the flow time. The noisy action passes through channels that no layer writes to, so that the
    velocity takes the noise away, and what the layers read from images and words moves the arm a little.
    """
    draw = torch.Generator().manual_seed(config.init_seed)
    expert = fill_towers(model.paligemma_with_expert, config.width, draw)
    carried = config.max_action_dim
    keep_channels_free(expert.layers, carried)
    for layer in expert.layers:
        _fill_modulation(layer.input_layernorm.dense, 0.5, draw)
        _fill_modulation(layer.post_attention_layernorm.dense, 0.5, draw)
    _fill_modulation(expert.norm.dense, 0.1, draw)

    fill_weight(model.time_mlp_in, 2.0, draw)
    fill_weight(model.time_mlp_out, 2.0, draw)
    model.action_in_proj.bias.zero_()
    model.action_in_proj.weight.copy_(2.0 * torch.eye(config.width, carried))
    # 3: after ten Euler steps 4 % of the noise is left; larger values overshoot and leave more (10: 12 %).
    fill_velocity(model.action_out_proj, carried, 3.0, draw)


def _fill_modulation(dense: nn.Linear, gain: float, draw: torch.Generator) -> None:
    """Fill an AdaRMS layer's `(scale, shift, gate)`: the flow time sways all three, around 0, 0 and 0.5."""
    fill_weight(dense, gain, draw)
    dense.bias.chunk(3)[2].fill_(0.5)
