"""The demo policy's processors: Pi0.5's own, with a tokenizer that travels inside the pipeline's JSON.

Knows nothing of the policy's weights, nor where a checkpoint lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from lerobot_attn.demo.configuration_pi05_tiny import PI05TinyConfig
from lerobot_attn.demo.tokenizer import demo_tokenizer_json, transformers_tokenizer, vocab_size
from lerobot_attn.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass
class DemoTokenizerProcessorStep(TokenizerProcessorStep):
    """LeRobot's tokenizer step, with the tokenizer itself in its config instead of a name on the Hub.

    A checkpoint that holds it can be moved and loaded without network. LeRobot imports the class by its path.

    Attributes:
        tokenizer_json: The `tokenizers` library's JSON text of the whole tokenizer.
        input_tokenizer: The tokenizer that runs, as in the parent.
    """

    # Inherited, the parent's registered name would make LeRobot load the parent's class.
    _registry_name: ClassVar[str | None] = None

    tokenizer_json: str = ""

    def __post_init__(self) -> None:
        """Build the tokenizer.

        Raises:
            ConfigError: `tokenizer_json` is empty.
        """
        if not self.tokenizer_json:
            raise ConfigError(
                "the demo tokenizer step got no tokenizer_json, expected the tokenizer's JSON text; "
                "write the checkpoint again with lerobot-attn demo-policy"
            )
        self.tokenizer = transformers_tokenizer(self.tokenizer_json)
        super().__post_init__()

    def get_config(self) -> dict[str, Any]:
        """Return the parent's settings and the tokenizer's JSON text."""
        return {**super().get_config(), "tokenizer_json": self.tokenizer_json}


def demo_tokenizer_step(
    tokenizer_json: str | None, vocabulary: int, max_length: int, padding: str = "max_length"
) -> DemoTokenizerProcessorStep:
    """Return the step that tokenizes a demo policy's prompts, padding on the right.

    Args:
        tokenizer_json: The tokenizer as JSON text; None for the one of the installed LIBERO's instructions.
        vocabulary: Number of token ids that the policy has embeddings for.
        max_length: Slots of the prompt; a longer one is cut.
        padding: "max_length", or "longest": as many slots as the batch's longest prompt needs.

    Raises:
        SetupError: LIBERO, whose instructions the tokenizer learns, is not installed.
        ConfigError: The tokenizer has more ids than the policy has embeddings.
    """
    if tokenizer_json is None:
        tokenizer_json = demo_tokenizer_json()
    if vocab_size(tokenizer_json) > vocabulary:
        raise ConfigError(
            f"policy.vocab_size is {vocabulary}, expected at least the demo tokenizer's "
            f"{vocab_size(tokenizer_json)}; raise policy.vocab_size"
        )
    return DemoTokenizerProcessorStep(
        tokenizer_json=tokenizer_json, max_length=max_length, padding_side="right", padding=padding
    )


def make_pi05_tiny_pre_post_processors(
    config: PI05TinyConfig,
    dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None,
    tokenizer_json: str | None = None,
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Return the pre- and postprocessor; LeRobot's factory calls this by its name.

    Args:
        config: The policy's settings.
        dataset_stats: Per feature the statistics, e.g. `{"action": {"q01": (7,), "q99": (7,), …}}`, float32.
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
            relative,
            steps.normalize,  # before the state becomes words: those are bins of [-1, 1]
            Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim),
            tokenizer,
            steps.to_device,
        ],
        output_steps=[
            steps.unnormalize,
            AbsoluteActionsProcessorStep(enabled=config.use_relative_actions, relative_step=relative),
            steps.to_cpu,
        ],
    )
