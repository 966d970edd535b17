"""A small X-VLA of LeRobot's own code, built without the Hub.

Its weights are random but peaked, so that mixed-up indices show; its tokenizer writes prompts as BART's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_tokenizers import byte_level_bpe

_BART = ("<s>", "<pad>", "</s>", "<unk>")  # BART's ids 0 to 3


def save_tokenizer(folder: Path) -> str:
    """Save the tokenizer as LeRobot's processor loads it, and return its folder."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=_bart_tokenizer(),
        **{f"{name}_token": token for name, token in zip(("bos", "pad", "eos", "unk"), _BART, strict=True)},
    ).save_pretrained(folder)
    return str(folder)


def make_policy(
    tokenizer: str,
    cameras: tuple[str, ...] = ("observation.images.top", "observation.images.wrist"),
    policy_class: Any = None,
    encoder_heads: int = 4,
    vision: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Any, Any, Any]:
    """Return (policy, preprocessor, postprocessor).

    Args:
        tokenizer: folder of the tokenizer.
        cameras: names of the image features.
        policy_class: `XVLAPolicy` or one derived from it.
        encoder_heads: attention heads of Florence-2's encoder.
        vision: settings of the vision tower.
        settings: of the policy's config.
    """
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
    from lerobot.policies.xvla.processor_xvla import make_xvla_pre_post_processors

    policy_class = policy_class or XVLAPolicy
    florence = {
        "vision_config": {
            "embed_dim": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_heads": [2, 2, 2, 2],
            "num_groups": [2, 2, 2, 2],
            "window_size": 4,
            "projection_dim": 32,
            **(vision or {}),
        },
        "text_config": {
            "model_type": "bart",
            "vocab_size": 320,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": encoder_heads,
            "decoder_attention_heads": encoder_heads,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 256,
        },
    }
    torch.manual_seed(0)
    config = policy_class.config_class(
        **{
            "device": "cpu",
            "florence_config": florence,
            "tokenizer_name": tokenizer,
            "tokenizer_max_length": 24,
            "hidden_size": 32,
            "depth": 3,
            "num_heads": 4,
            "num_domains": 3,
            "len_soft_prompts": 5,
            "dim_time": 8,
            "action_mode": "auto",
            "num_denoising_steps": 4,
            "max_state_dim": 8,
            "chunk_size": 10,
            "n_action_steps": 4,
            "input_features": {
                **{name: PolicyFeature(FeatureType.VISUAL, (3, 96, 128)) for name in cameras},
                "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
            },
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (6,))},
            **settings,
        }
    )
    policy = policy_class(config).eval()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight *= 15
            if name.endswith("attn.qkv.weight"):
                weight *= 2
            if name.endswith(("pos_emb", "soft_prompt_hub.weight")):
                weight *= 20
    return policy, *make_xvla_pre_post_processors(config)


def _bart_tokenizer() -> Any:
    """A tokenizer in BART's manner: pieces with their leading blank, `<s>` before and `</s>` after."""
    from tokenizers import processors

    tokenizer = byte_level_bpe(_BART, unknown="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer
