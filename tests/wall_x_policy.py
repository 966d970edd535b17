"""A small Wall-X of LeRobot's own code, built without the Hub.

Its weights are random but peaked, so that mixed-up indices show. LeRobot computes it in bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_tokenizers import byte_level_bpe

_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<|propri|>", "<|action|>", "<|action_fast|>"),
)
_N_HIDDEN = 32


def save_model(folder: Path, *, padding_side: str = "right") -> str:
    """Save the processor, the model's config and its weights as LeRobot loads them, and return the folder.

    Args:
        folder: where to.
        padding_side: of the tokenizer, where the prompts of a batch are unlike.
    """
    import torch
    from lerobot.policies.wall_x.modeling_wall_x import Qwen2_5_VLMoEForAction
    from lerobot.policies.wall_x.qwen_model import Qwen2_5_VLConfig
    from safetensors.torch import save_file
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = byte_level_bpe(
        _SPECIAL,
        more=[
            "You are a helpful assistant. Observation: Instruction: Predict the next action in robot action."
        ],
        size=380,
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[0],
        eos_token=_SPECIAL[2],
        padding_side=padding_side,
    )
    processor = Qwen2_5_VLProcessor(
        # LeRobot resizes images to 256 pixels, and this to fewer cells.
        image_processor=Qwen2VLImageProcessor(min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(),
    )
    processor.save_pretrained(folder)
    ids = {name: number for number, name in enumerate(_SPECIAL)}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(fast),
            "hidden_size": _N_HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "num_experts": 2,
            "experts": [{"hidden_size": _N_HIDDEN, "intermediate_size": 64, "hidden_act": "silu"}] * 2,
            "dim_inputs": [_N_HIDDEN, _N_HIDDEN],
            "mlp_moe": True,
            "dof_config": {"arm": 8},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": _N_HIDDEN,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        agent_pos_config={"arm": 8},
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen2_5_VLMoEForAction(config, processor=processor)
    weights = {name: weight.clone().contiguous() for name, weight in model.state_dict().items()}
    for name, weight in weights.items():
        if name.startswith("model.layers") and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight *= 15
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def make_policy(
    folder: str,
    cameras: tuple[str, ...] = ("observation.images.top", "observation.images.wrist"),
    policy_class: Any = None,
    size: tuple[int, int] = (96, 128),
    **settings: Any,
) -> tuple[Any, Any, Any]:
    """Return (policy, preprocessor, postprocessor).

    Args:
        folder: what `save_model` returned.
        cameras: names of the image features.
        policy_class: `WallXPolicy` or one derived from it.
        size: (height, width) of the cameras.
        settings: of the policy's config.
    """
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.wall_x.modeling_wall_x import WallXPolicy
    from lerobot.policies.wall_x.processor_wall_x import make_wall_x_pre_post_processors

    policy_class = policy_class or WallXPolicy
    config = policy_class.config_class(
        **{
            "device": "cpu",
            "pretrained_name_or_path": folder,
            "max_state_dim": 8,
            "max_action_dim": 8,
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
    return policy_class(config).eval(), *make_wall_x_pre_post_processors(config)
