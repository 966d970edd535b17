"""A small EVO-1 of LeRobot's own code, built without the Hub.

Its weights are random but peaked, so that mixed-up indices show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_tokenizers import byte_level_bpe

_SPECIAL = ("<pad>", "<unk>", "<IMG_CONTEXT>", "<img>", "</img>")
_SIDE_PX, _PATCH_PX = 84, 14  # a grid of 3 x 3 cells, of 2 x 2 patches each


def save_language_model(folder: Path) -> str:
    """Save InternVL with random weights, and a tokenizer, as LeRobot loads them; return the folder."""
    import torch
    from transformers import InternVLConfig, InternVLModel, PreTrainedTokenizerFast

    tokenizer = byte_level_bpe(_SPECIAL, more=["Image-1:"], unknown="<unk>")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(_SPECIAL[2:]),
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [_SIDE_PX, _SIDE_PX],
            "patch_size": [_PATCH_PX, _PATCH_PX],
        },
        image_token_id=_SPECIAL.index("<IMG_CONTEXT>"),
        image_seq_length=(_SIDE_PX // _PATCH_PX // 2) ** 2,
        downsample_ratio=0.5,
    )
    InternVLModel(config).save_pretrained(folder)
    return str(folder)


def make_policy(
    language_model: str,
    cameras: tuple[str, ...] = ("observation.images.top", "observation.images.wrist"),
    policy_class: Any = None,
    size: tuple[int, int] = (96, 128),
    **settings: Any,
) -> tuple[Any, Any, Any]:
    """Return (policy, preprocessor, postprocessor).

    Args:
        language_model: its folder.
        cameras: names of the image features.
        policy_class: `Evo1Policy` or one derived from it.
        size: (height, width) of the cameras.
        settings: of the policy's config.
    """
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.evo1.modeling_evo1 import Evo1Policy
    from lerobot.policies.evo1.processor_evo1 import make_evo1_pre_post_processors

    policy_class = policy_class or Evo1Policy
    config = policy_class.config_class(
        **{
            "device": "cpu",
            "use_amp": False,
            "vlm_model_name": language_model,
            "vlm_dtype": "float32",
            "vlm_num_layers": 2,
            "image_resolution": (_SIDE_PX, _SIDE_PX),
            "use_flash_attn": False,
            "enable_gradient_checkpointing": False,
            "embed_dim": 32,
            "hidden_dim": 32,
            "state_hidden_dim": 32,
            "num_heads": 4,
            "num_layers": 3,
            "num_inference_timesteps": 4,
            "chunk_size": 10,
            "n_action_steps": 4,
            "max_state_dim": 8,
            "max_action_dim": 8,
            "max_views": 2,
            "input_features": {
                **{name: PolicyFeature(FeatureType.VISUAL, (3, *size)) for name in cameras},
                "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
            },
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (6,))},
            **settings,
        }
    )
    torch.manual_seed(0)
    policy = policy_class(config).eval()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if name.endswith("attn.in_proj_weight"):
                weight[: 2 * len(weight) // 3] *= 4
            if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
                weight *= 15
    return policy, *make_evo1_pre_post_processors(config)
