"""The demo policy `smolvla_tiny`: LeRobot's SmolVLA around a small SmolVLM that is made here.

All that runs is SmolVLA's own code; this module only gives it a small config, where it would ask the Hub for
one, and fills the weights at random, which those of a checkpoint replace. Knows nothing of checkpoints,
tokenizers or of how attention is captured.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from lerobot.policies.smolvla import smolvlm_with_expert
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching
from lerobot.utils.import_utils import require_package
from transformers import SmolVLMConfig

from lerobot_attn.demo.configuration_smolvla_tiny import SmolVLATinyConfig
from lerobot_attn.demo.filling import (
    fill_action_time,
    fill_attention,
    fill_mlp,
    fill_velocity,
    fill_vision,
    fill_weight,
    keep_channels_free,
)

# The demo tokenizer has no tokens of their own for these; SmolVLA embeds them where images begin and end.
_FAKE_IMAGE_TOKEN, _GLOBAL_IMAGE_TOKEN = 3, 1
_PAD = 0
_building = threading.Lock()


class SmolVLATinyPolicy(SmolVLAPolicy):
    """SmolVLA with small towers; its weights are random until it loads some."""

    config_class = SmolVLATinyConfig
    name = "smolvla_tiny"

    def __init__(self, config: SmolVLATinyConfig, **kwargs: Any):
        """Build the small policy; the same `config.init_seed` gives the same weights.

        Args:
            config: Sizes and settings.
            **kwargs: What LeRobot's factory hands every policy, such as statistics; unused, as in SmolVLA.
        """
        require_package("transformers", extra="smolvla")
        # PyTorch's constructors draw initial weights, all replaced in _fill; only the CPU's generator moves.
        with torch.random.fork_rng(devices=[]), _in_place_of_the_hub(config):
            super().__init__(config, **kwargs)
            _fill(self.model, config)


@contextmanager
def _in_place_of_the_hub(config: SmolVLATinyConfig) -> Iterator[None]:
    """While it lasts, LeRobot finds SmolVLM's config and processor here, where it would ask the Hub.

    Of the processor it reads two token ids. A real one needs the package num2words and files of its own.
    """
    processor = SimpleNamespace(
        tokenizer=SimpleNamespace(
            fake_image_token_id=_FAKE_IMAGE_TOKEN, global_image_token_id=_GLOBAL_IMAGE_TOKEN
        )
    )
    made = {
        "AutoConfig": SimpleNamespace(from_pretrained=lambda name: _vlm_config(config)),
        "AutoProcessor": SimpleNamespace(from_pretrained=lambda name: processor),
    }
    module = vars(smolvlm_with_expert)
    with _building:
        before = {name: module[name] for name in made}
        module.update(made)
        try:
            yield
        finally:
            module.update(before)


def _vlm_config(config: SmolVLATinyConfig) -> SmolVLMConfig:
    side = config.resize_imgs_with_padding[0] if config.resize_imgs_with_padding else 512
    return SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": config.width,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.num_vlm_layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.key_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "pad_token_id": _PAD,
        },
        vision_config={
            "hidden_size": config.vision_width,
            "intermediate_size": config.vision_mlp_width,
            "num_hidden_layers": config.vision_depth,
            "num_attention_heads": config.vision_heads,
            "image_size": side,
            "patch_size": config.patch_px,
        },
        scale_factor=config.scale_factor,
        pad_token_id=_PAD,
        image_token_id=_FAKE_IMAGE_TOKEN,
    )


@torch.no_grad()
def _fill(model: VLAFlowMatching, config: SmolVLATinyConfig) -> None:
    """Fill every weight from `config.init_seed` so that attention is peaked and the actions stay small.

    Heads differ in sharpness, layers in their order, and denoise steps because the flow time is part of each
    action token. The noisy action passes through channels that no layer writes to, so that the velocity takes
    the noise away, and what the layers read from images, words and state moves the arm a little.
    """
    draw = torch.Generator().manual_seed(config.init_seed)
    towers = model.vlm_with_expert
    vlm, expert = towers.vlm.model, towers.lm_expert
    fill_vision(vlm.vision_model, draw)
    # Divided by the factor that SmolVLA multiplies image tokens and words with, so that each is of unit size.
    fill_weight(vlm.connector.modality_projection.proj, config.width**-0.5, draw)
    vlm.text_model.embed_tokens.weight.normal_(std=config.width**-0.5, generator=draw)
    towers.vlm.lm_head.weight.normal_(std=config.width**-0.5, generator=draw)  # never used
    for tower in (vlm.text_model, expert):
        for layer in tower.layers:
            fill_attention(layer.self_attn, draw)
            fill_mlp(layer.mlp, draw)
    keep_channels_free(expert.layers, config.max_action_dim)
    # A state has 8 numbers of the 32 that there is place for: made as large as the other tokens.
    fill_weight(model.state_proj, 2.0, draw)
    fill_action_time(model, config.max_action_dim, draw)
    fill_velocity(model.action_out_proj, config.max_action_dim, 3.0, draw)
