"""A small EO-1 of LeRobot's own code, built without the Hub.

Its weights are random but peaked, so that mixed-up indices show; its conversation is written as Qwen2.5-VL's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_tokenizers import byte_level_bpe

_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)
N_VOCABULARY = 320


def save_processor(folder: Path) -> str:
    """Save the processor as LeRobot's step loads it, and return its folder."""
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = byte_level_bpe(_SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_SPECIAL[0], eos_token=_SPECIAL[2])
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def make_policy(
    processor: str,
    cameras: tuple[str, ...] = ("observation.images.top", "observation.images.wrist"),
    policy_class: Any = None,
    size: tuple[int, int] = (96, 128),
    **settings: Any,
) -> tuple[Any, Any, Any]:
    """Return (policy, preprocessor, postprocessor).

    Args:
        processor: folder of the processor.
        cameras: names of the image features.
        policy_class: `EO1Policy` or one derived from it.
        size: (height, width) of the cameras.
        settings: of the policy's config.
    """
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.eo1.modeling_eo1 import EO1Policy
    from lerobot.policies.eo1.processor_eo1 import make_eo1_pre_post_processors
    from transformers import Qwen2_5_VLConfig

    ids = {name: number for number, name in enumerate(_SPECIAL)}
    backbone = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": N_VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    policy_class = policy_class or EO1Policy
    torch.manual_seed(0)
    config = policy_class.config_class(
        **{
            "device": "cpu",
            "vlm_base": processor,
            "vlm_config": backbone.to_dict(),
            "pretrained_path": processor,  # LeRobot then takes no weights from the Hub
            "dtype": "float32",
            "image_min_pixels": 4 * 28 * 28,
            "image_max_pixels": 16 * 28 * 28,
            "max_state_dim": 8,
            "max_action_dim": 8,
            "num_denoise_steps": 4,
            "chunk_size": 10,
            "n_action_steps": 4,
            "input_features": {
                **{name: PolicyFeature(FeatureType.VISUAL, (3, *size)) for name in cameras},
                "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
            },
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (6,))},
            **settings,
        }
    )
    policy = policy_class(config).eval()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
                weight *= 15
    return policy, *make_eo1_pre_post_processors(config)
