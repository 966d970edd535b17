"""A small GR00T N1.7 of LeRobot's own code, built without the Hub.

Its weights are random but peaked, so that mixed-up indices show; its prompt is written as Qwen3-VL's.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
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


def save_backbone(folder: Path) -> str:
    """Save tokenizer, processor and config of Qwen3-VL as LeRobot loads them, and return the folder."""
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLVideoProcessor,
    )

    tokenizer = byte_level_bpe(_SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_SPECIAL[0], eos_token=_SPECIAL[2])
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    edges = {"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32}
    image_processor = Qwen2VLImageProcessor(size=edges, image_mean=[0.5] * 3, image_std=[0.5] * 3, **sizes)
    image_processor.save_pretrained(folder)
    Qwen3VLVideoProcessor().save_pretrained(folder)
    ids = {name: number for number, name in enumerate(_SPECIAL)}
    Qwen3VLConfig(
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        text_config={
            "model_type": "qwen3_vl_text",
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_interleaved": True,
                "mrope_section": [2, 1, 1],
            },
        },
        vision_config={
            "model_type": "qwen3_vl",
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    ).save_pretrained(folder)
    return str(folder)


@cache
def _base(
    backbone: str,
    n_layers: int,
    n_reading: int,
    reading_heads: int,
    is_alternate: bool,
    horizon: int,
    pictures: str,
) -> str:
    """Save a GR00T with random weights beside its backbone, and return the folder.

    It is laid out as NVIDIA's checkpoints: `processor_config.json` says what is done to pictures (as JSON).
    """
    import torch
    from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config

    shared = {"positional_embeddings": None, "dropout": 0.0, "final_dropout": True}
    config = GR00TN17Config(
        model_name=backbone,
        backbone_model_type="qwen",
        backbone_embedding_dim=32,
        select_layer=2,
        max_state_dim=8,
        max_action_dim=8,
        action_horizon=horizon,
        hidden_size=32,
        input_embedding_dim=32,
        max_seq_len=64,
        max_num_embodiments=12,
        num_inference_timesteps=4,
        use_alternate_vl_dit=is_alternate,
        diffusion_model_cfg={
            "num_layers": n_layers,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "norm_type": "ada_norm",
            "output_dim": 32,
            "interleave_self_attention": True,
            **shared,
        },
        vl_self_attention_cfg={
            "num_layers": n_reading,
            "num_attention_heads": reading_heads,
            "attention_head_dim": 32 // reading_heads,
            **shared,
        },
    )
    torch.manual_seed(0)
    model = GR00TN17(config, load_backbone_weights=False).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                weight.normal_().mul_(2 * weight.shape[-1] ** -0.5)
            elif name.endswith((".W", "position_embedding.weight", "proj_out_2.weight")):
                weight.normal_().mul_(weight.shape[-2] ** -0.5)
            elif "language_model" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.normal_().mul_(0.3 * weight.shape[-1] ** -0.5)
            elif "embed_tokens" in name or ("merger" in name and weight.ndim == 2):
                weight.normal_().mul_(0.3)
    folder = Path(tempfile.mkdtemp(prefix="gr00t-", dir=Path(backbone).parent))
    model.save_pretrained(folder)
    said = {"processor_kwargs": json.loads(pictures)}
    (folder / "processor_config.json").write_text(json.dumps(said))
    return str(folder)


def make_policy(
    backbone: str,
    cameras: tuple[str, ...] = ("observation.images.top", "observation.images.wrist"),
    policy_class: Any = None,
    size: tuple[int, int] = (96, 128),
    n_layers: int = 5,
    n_reading: int = 2,
    reading_heads: int = 4,
    is_alternate: bool = True,
    horizon: int = 10,
    pictures: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Any, Any, Any]:
    """Return (policy, preprocessor, postprocessor).

    Args:
        backbone: folder of Qwen3-VL's processor and config.
        cameras: names of the image features.
        policy_class: `GrootPolicy` or one derived from it.
        size: (height, width) of the cameras.
        n_layers: of the action head, every other one over the prompt.
        n_reading: layers of its self-attention over the prompt.
        reading_heads: heads of these.
        is_alternate: whether the layers over the prompt see words and images in turns.
        horizon: actions that the model makes, of which the config may take fewer.
        pictures: what the preprocessor does with pictures, as `processor_config.json` says it; by default
            they are resized to a square of 96 px, of which 86 are stretched over 3 by 4 cells.
        settings: of the policy's config.
    """
    import torch
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.groot.modeling_groot import GrootPolicy
    from lerobot.policies.groot.processor_groot import (
        GrootN17VLMEncodeStep,
        make_groot_pre_post_processors,
    )

    policy_class = policy_class or GrootPolicy
    said = json.dumps(pictures or {"image_target_size": [96, 128], "image_crop_size": [86, 115]})
    base = _base(backbone, n_layers, n_reading, reading_heads, is_alternate, horizon, said)
    config = policy_class.config_class(
        **{
            "device": "cpu",
            "base_model_path": base,
            "use_bf16": False,
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
    policy = policy_class(config).eval()
    ones = torch.ones(6)
    stats = {name: {"min": -ones, "max": ones} for name in ("action", "observation.state")}
    preprocessor, postprocessor = make_groot_pre_post_processors(config, dataset_stats=stats)
    for step in preprocessor.steps:
        if isinstance(step, GrootN17VLMEncodeStep):
            step.model_name = backbone
    return policy, preprocessor, postprocessor
