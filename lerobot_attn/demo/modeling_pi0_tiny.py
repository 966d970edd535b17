"""The demo policy `pi0_tiny`: LeRobot's Pi0 with its towers replaced by small ones.

All that runs is Pi0's own code; this module only builds smaller modules for it and fills them with random
weights, which those of a checkpoint replace. Knows nothing of checkpoints, tokenizers or of how attention is
captured.
"""

from __future__ import annotations

from typing import Any

import torch
from lerobot.policies.pi0.modeling_pi0 import PI0Policy, PI0Pytorch
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.utils.import_utils import require_package
from torch import nn

from lerobot_attn.demo.configuration_pi0_tiny import PI0TinyConfig
from lerobot_attn.demo.filling import fill_action_time, fill_velocity, fill_weight, keep_channels_free
from lerobot_attn.demo.paligemma import fill_towers, shrink_towers


class PI0TinyPolicy(PI0Policy):
    """Pi0 with small towers; its weights are random until it loads some."""

    config_class = PI0TinyConfig
    name = "pi0_tiny"

    def __init__(self, config: PI0TinyConfig, **kwargs: Any):
        """Build the small policy; the same `config.init_seed` gives the same weights.

        Args:
            config: Sizes and settings.
            **kwargs: What LeRobot's factory hands every policy, such as statistics; unused, as in Pi0.
        """
        require_package("transformers", extra="pi")
        # Not PI0Policy's own: it would build Pi0's 3 billion parameters. The steps are the same.
        super(PI0Policy, self).__init__(config)
        config.validate_features()
        self.config = config
        self.init_rtc_processor()
        self.model = _small_model(config, self.rtc_processor)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.to(config.device)
        self.reset()


def _small_model(config: PI0TinyConfig, rtc_processor: RTCProcessor | None) -> PI0Pytorch:
    """Return Pi0's model with small towers on the CPU, filled; the global random state stays as it was."""
    # PyTorch's constructors draw initial weights, all replaced in _fill; only the CPU's generator moves.
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):  # full size, but without memory
            model = PI0Pytorch(config, rtc_processor=rtc_processor)
        with torch.device("cpu"):
            shrink_towers(model.paligemma_with_expert, config)
            model.state_proj = nn.Linear(config.max_state_dim, config.width)
            model.action_in_proj = nn.Linear(config.max_action_dim, config.width)
            model.action_out_proj = nn.Linear(config.width, config.max_action_dim)
            model.action_time_mlp_in = nn.Linear(2 * config.width, config.width)
            model.action_time_mlp_out = nn.Linear(config.width, config.width)
        _fill(model, config)
    model.paligemma_with_expert.to_bfloat16_for_selected_params(config.dtype)
    model.paligemma_with_expert._set_requires_grad()
    return model


@torch.no_grad()
def _fill(model: PI0Pytorch, config: PI0TinyConfig) -> None:
    """Fill every weight from `config.init_seed` so that attention is peaked and the actions stay small.

    Heads differ in sharpness, layers in their order, and denoise steps because the flow time is part of each
    action token. The noisy action passes through channels that no layer writes to, so that the velocity takes
    the noise away, and what the layers read from images, words and state moves the arm a little.
    """
    draw = torch.Generator().manual_seed(config.init_seed)
    expert = fill_towers(model.paligemma_with_expert, config.width, draw)
    keep_channels_free(expert.layers, config.max_action_dim)
    # A state has 8 numbers of the 32 that there is place for: made as large as the other tokens.
    fill_weight(model.state_proj, 2.0, draw)
    fill_action_time(model, config.max_action_dim, draw)
    fill_velocity(model.action_out_proj, config.max_action_dim, 3.0, draw)
