"""The processors of the demo policy `smolvla_tiny`: SmolVLA's own, with a tokenizer in their JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lerobot.processor import (
    NewLineTaskProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from lerobot_attn.demo.configuration_smolvla_tiny import SmolVLATinyConfig
from lerobot_attn.demo.processor_pi05_tiny import demo_tokenizer_step

if TYPE_CHECKING:
    import torch


def make_smolvla_tiny_pre_post_processors(
    config: SmolVLATinyConfig,
    dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None,
    tokenizer_json: str | None = None,
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Return the pre- and postprocessor; LeRobot's factory calls this by its name.

    Args:
        config: The policy's settings.
        dataset_stats: Per feature the statistics, e.g. `{"action": {"mean": (7,), "std": (7,), …}}`, float32.
        tokenizer_json: The tokenizer as JSON text; by default the one of the installed LIBERO's instructions.

    Raises:
        SetupError: LIBERO, whose instructions the tokenizer learns, is not installed.
        ConfigError: The tokenizer has more ids than the policy has embeddings.
    """
    tokenizer = demo_tokenizer_step(
        tokenizer_json, config.vocab_size, config.tokenizer_max_length, padding=config.pad_language_to
    )
    steps = make_default_policy_processor_steps(config, dataset_stats)
    return make_policy_processor_pipelines(
        input_steps=[
            steps.rename_observations,
            steps.add_batch_dim,
            NewLineTaskProcessorStep(),
            tokenizer,
            steps.to_device,
            steps.normalize,
        ],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )
