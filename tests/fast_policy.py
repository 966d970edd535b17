"""A small Pi0-FAST for tests: LeRobot's own code, small towers, and stand-ins for its two tokenizers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy, PI0FastPytorch

from lerobot_attn.demo.filling import fill_attention, fill_mlp, fill_vision, fill_weight
from lerobot_attn.demo.tokenizer import train_tokenizer, transformers_tokenizer

IMAGE, WRIST = "observation.images.image", "observation.images.image2"
TASK = "pick up the black bowl"
N_HEADS, HEAD_DIM, DEPTH = 8, 16, 3
N_TOKENS, N_ACTIONS, ACTION_DIM, STATE_DIM = 12, 6, 7, 8
TEXT = 48


class FastTokenizer:
    """What LeRobot's policy needs of the FAST tokenizer: text of the tokens, whose characters are numbers.

    One character a token, so that each token moves one coefficient of the chunk.
    """

    scale, min_token = 8.0, -16

    @property
    def bpe_tokenizer(self) -> FastTokenizer:
        return self

    def decode(self, tokens: Any) -> str:
        return "".join(chr(int(token) % 33) for token in tokens)


def text_tokenizer() -> Any:
    return transformers_tokenizer(train_tokenizer([TASK, "open the drawer"]).to_str())


def make_policy(
    policy_class: type[PI0FastPolicy] = PI0FastPolicy,
    config_class: type[PI0FastConfig] = PI0FastConfig,
    **settings: Any,
) -> PI0FastPolicy:
    """Build the policy as its own `__init__` does, but for the 3 billion parameters and the Hub."""
    features = {name: PolicyFeature(FeatureType.VISUAL, (3, 96, 128)) for name in (IMAGE, WRIST)}
    features["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE_DIM,))
    config = config_class(
        **{
            "device": "cpu",
            "chunk_size": N_ACTIONS,
            "n_action_steps": N_ACTIONS,
            "max_decoding_steps": N_TOKENS,
            "tokenizer_max_length": TEXT,
            # Random weights never spell "Action: ", which a trained policy opens its actions with.
            "validate_action_token_prefix": False,
            "input_features": features,
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
            "empty_cameras": 1,
            **settings,
        }
    )
    policy = policy_class.__new__(policy_class)
    super(PI0FastPolicy, policy).__init__(config)
    config.validate_features()
    policy.config = config
    policy.action_tokenizer = FastTokenizer()
    policy._paligemma_tokenizer = text_tokenizer()
    policy.init_rtc_processor()
    with torch.device("meta"):
        model = PI0FastPytorch(config, paligemma_tokenizer=policy._paligemma_tokenizer)
    towers = model.paligemma_with_expert
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        towers.paligemma = type(towers.paligemma)(
            _small(towers.paligemma.config, len(policy._paligemma_tokenizer))
        )
        _fill(towers.paligemma, policy._paligemma_tokenizer.convert_tokens_to_ids("|"), draw)
    towers.to_bfloat16_for_selected_params(config.dtype)
    policy.model = model
    policy.reset()
    return policy.eval()


def _small(full: Any, vocab_size: int) -> Any:
    config = copy.deepcopy(full)
    text, vision = config.text_config, config.vision_config
    text.hidden_size = config.hidden_size = config.projection_dim = vision.projection_dim = 64
    text.intermediate_size, text.num_hidden_layers = 96, DEPTH
    text.num_attention_heads, text.head_dim = N_HEADS, HEAD_DIM
    text.vocab_size = config._vocab_size = config.image_token_index = vocab_size
    vision.hidden_size, vision.intermediate_size = 32, 48
    vision.num_hidden_layers, vision.num_attention_heads = 1, 2
    return config


def _fill(paligemma: Any, end_id: int, draw: torch.Generator) -> None:
    model = paligemma.model
    fill_vision(model.vision_tower.vision_model, draw)
    fill_weight(model.multi_modal_projector.linear, 1.0, draw)
    model.language_model.embed_tokens.weight.normal_(std=64**-0.5, generator=draw)
    for layer in model.language_model.layers:
        fill_attention(layer.self_attn, draw)
        fill_mlp(layer.mlp, draw)
    head = torch.nn.Linear(64, paligemma.lm_head.out_features, bias=False)
    head.weight.normal_(generator=draw)
    # Longer than the others, so that it wins now and then, and inferences end after unlike numbers of tokens.
    head.weight[end_id] *= END_WEIGHT
    paligemma.lm_head = head


END_WEIGHT = 2.0


def make_batch(
    n: int = 2, seed: int = 0, size: tuple[int, int] = (96, 128), text: int = TEXT
) -> dict[str, Any]:
    """A batch as the preprocessor hands it over."""
    noise = torch.Generator().manual_seed(seed)
    batch: dict[str, Any] = {name: torch.rand(n, 3, *size, generator=noise) for name in (IMAGE, WRIST)}
    batch["observation.state"] = torch.rand(n, STATE_DIM, generator=noise) * 2 - 1
    tasks = [TASK, "open the drawer"] * n
    prompts = [prompt(task, state) for task, state in zip(tasks, batch["observation.state"], strict=False)]
    coded = text_tokenizer()(
        prompts, padding="max_length", max_length=text, truncation=True, return_tensors="pt"
    )
    batch["observation.language.tokens"] = coded["input_ids"]
    batch["observation.language.attention_mask"] = coded["attention_mask"].bool()
    return batch


def prompt(task: str, state: torch.Tensor) -> str:
    """As `Pi0FastPrepareStateAndLanguageTokenizerProcessorStep` writes it."""
    numbers = np.digitize(state.numpy(), bins=np.linspace(-1, 1, 257)[:-1]) - 1
    return f"Task: {task}, State: {' '.join(map(str, numbers))};\n"


@PreTrainedConfig.register_subclass("pi0_fast_of_somebody")
@dataclass
class DerivedConfig(PI0FastConfig):
    pass


class DerivedPolicy(PI0FastPolicy):
    config_class = DerivedConfig
    name = "pi0_fast_of_somebody"
