"""A small MolmoAct2 of LeRobot's own code, built without the Hub.

Its weights are random but peaked, so that mixed-up indices show. Its images are 5 by 7 patches, of which two
by two are a token: a grid of 3 by 4, whose last row and column are half outside the image.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

N_STATE_TOKENS = 16
_IMAGE = (
    *("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>"),
    *("<frame_end>", "<im_low>"),
)
_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image|>", *_IMAGE),
    *("<action_output>", "<action_start>", "<action_end>", "<state_start>", "<state_end>"),
    *("<setup_start>", "<setup_end>", "<control_start>", "<control_end>"),
    *(f"<state_{number}>" for number in range(N_STATE_TOKENS)),
)
INPUT_PX, PATCH_PX = (70, 98), 14


def _save_processor(folder: Path, input_px: tuple[int, int], crop_mode: str) -> dict[str, int]:
    """Save tokenizer and processor as LeRobot's step loads them, and return the tokens' numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(["put the bowl on the plate", "open the drawer. The setup is"], trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab={**model["vocab"], "<|endoftext|>": len(model["vocab"])},
        merges=[tuple(pair) for pair in model["merges"]],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL[1:])})
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    image_processor = {
        "size": {"height": input_px[0], "width": input_px[1]},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "patch_size": PATCH_PX,
        "pooling_size": [2, 2],
        "crop_mode": crop_mode,
        "max_crops": 2,
        "overlap_margins": [1, 1],
    }
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": image_processor, "video_processor": {}})
    )
    return {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}


@cache
def _checkpoint(
    folder: Path, crop_mode: str, input_px: tuple[int, int], attention: str, expert_heads: int
) -> str:
    """Save a model with its processor under `folder`, and return where."""
    import torch
    from lerobot.policies.molmoact2.molmoact2_hf_model.configuration_molmoact2 import MolmoAct2Config
    from lerobot.policies.molmoact2.molmoact2_hf_model.modeling_molmoact2 import (
        MolmoAct2ForConditionalGeneration,
    )

    folder = folder / f"{crop_mode}-{input_px}-{attention}-{expert_heads}"
    ids = _save_processor(folder, input_px, crop_mode)
    shared = {"attn_implementation": attention}
    narrow = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, **shared}
    config = MolmoAct2Config(
        vit_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "image_default_input_size": input_px,
            "image_patch_size": PATCH_PX,
            "image_num_pos": 36,
            **narrow,
        },
        adapter_config={
            "vit_layers": (-1, -2),
            "hidden_size": 32,
            "intermediate_size": 64,
            "text_hidden_size": 32,
            "pooling_attention_mask": True,
            **narrow,
        },
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "vocab_size": 384,
            "additional_vocab_size": 8,
            "max_position_embeddings": 512,
            "qkv_bias": False,
            "use_qk_norm": True,
            "qk_norm_type": "qwen3",
            **{**narrow, "num_key_value_heads": 2},
        },
        action_expert_config={
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": expert_heads,
            "ffn_multiple_of": 16,
            "timestep_embed_dim": 16,
            "max_action_dim": 32,
            "max_action_horizon": 10,
        },
        image_start_token_id=ids["<im_start>"],
        low_res_image_start_token_id=ids["<low_res_im_start>"],
        image_end_token_id=ids["<im_end>"],
        image_low_res_id=ids["<im_low>"],
        image_patch_id=ids["<im_patch>"],
        image_col_id=ids["<im_col>"],
        frame_start_token_id=ids["<frame_start>"],
        frame_end_token_id=ids["<frame_end>"],
        action_start_token_id=ids["<action_start>"],
        action_end_token_id=ids["<action_end>"],
        eos_token_id=ids["<|endoftext|>"],
        max_action_dim=32,
        max_action_horizon=10,
        action_mode="both",
        flow_matching_num_steps=4,
    )
    torch.manual_seed(0)
    model = MolmoAct2ForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "action_expert" in name:
                # LeRobot begins with gates of 0, so that no block would change anything.
                scale = {"cross_attn.q_proj": 8, "modulation": 0.3}
                factor = next((factor for part, factor in scale.items() if part in name), 1.0)
                weight.normal_().mul_(factor * weight.shape[-1] ** -0.5)
            elif "wte" in name or "image_projector" in name or "patch_embedding" in name:
                weight.normal_().mul_(0.5)
            elif name.endswith(("self_attn.q_norm.weight", "self_attn.k_norm.weight")):
                weight *= 2
            elif "transformer.blocks" in name and weight.ndim == 2:
                weight.normal_().mul_(weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return str(folder)


def make_policy(
    folder: Path,
    cameras: tuple[str, ...] = ("observation.images.top", "observation.images.wrist"),
    policy_class: Any = None,
    size: tuple[int, int] = (96, 128),
    attention: str = "sdpa",
    expert_heads: int = 4,
    crops: bool = False,
    input_px: tuple[int, int] = INPUT_PX,
    **settings: Any,
) -> tuple[Any, Any, Any]:
    """Return (policy, preprocessor, postprocessor).

    Args:
        folder: where models are kept.
        cameras: names of the image features.
        policy_class: `MolmoAct2Policy` or one derived from it.
        size: (height, width) of the cameras.
        attention: of the language model, "sdpa" or "eager".
        expert_heads: of the action expert; the language model has 4.
        crops: whether images are cut into crops besides being resized, which needs a square `input_px`.
        input_px: (height, width) of the vision tower's input.
        settings: of the policy's config.
    """
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.molmoact2.modeling_molmoact2 import MolmoAct2Policy
    from lerobot.policies.molmoact2.processor_molmoact2 import make_molmoact2_pre_post_processors

    policy_class = policy_class or MolmoAct2Policy
    crop_mode = "overlap-and-resize-c2" if crops else "resize"
    config = policy_class.config_class(
        **{
            "device": "cpu",
            "checkpoint_path": _checkpoint(folder, crop_mode, input_px, attention, expert_heads),
            "model_dtype": "float32",
            "action_mode": "continuous",
            "inference_action_mode": "continuous",
            "chunk_size": 10,
            "n_action_steps": 4,
            "setup_type": "a table",
            "control_mode": "joints",
            "num_state_tokens": N_STATE_TOKENS,
            "input_features": {
                **{name: PolicyFeature(FeatureType.VISUAL, (3, *size)) for name in cameras},
                "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
            },
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (6,))},
            **settings,
        }
    )
    return policy_class(config).eval(), *make_molmoact2_pre_post_processors(config)
