"""The processors of the demo policy `pi0_tiny`: Pi0's own, with a tokenizer inside the pipeline's JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RelativeActionsProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from lerobot_attn.demo.configuration_pi0_tiny import PI0TinyConfig
from lerobot_attn.demo.processor_pi05_tiny import demo_tokenizer_step

if TYPE_CHECKING:
    import torch


def make_pi0_tiny_pre_post_processors(
    config: PI0TinyConfig,
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
    tokenizer = demo_tokenizer_step(tokenizer_json, config.vocab_size, config.tokenizer_max_length)
    steps = make_default_policy_processor_steps(config, dataset_stats)
    relative = RelativeActionsProcessorStep(
        enabled=config.use_relative_actions,
        exclude_joints=config.relative_exclude_joints,
        action_names=config.action_feature_names,
    )
    return make_policy_processor_pipelines(
        input_steps=[
            steps.rename_observations,
            steps.add_batch_dim,
            Pi0NewLineProcessor(),
            tokenizer,
            steps.to_device,
            relative,
            steps.normalize,
        ],
        output_steps=[
            steps.unnormalize,
            AbsoluteActionsProcessorStep(enabled=config.use_relative_actions, relative_step=relative),
            steps.to_cpu,
        ],
    )
