"""LeRobot's evaluation config with the attention options. Comments above fields are the help texts."""

import dataclasses
from dataclasses import dataclass, field

from lerobot.configs.default import EvalConfig
from lerobot.configs.eval import EvalPipelineConfig

from lerobot_attn.config import AttentionConfig


@dataclass
class AttentionEvalConfig(EvalConfig):
    """`--eval.*` with attention capture."""

    # Record what the policy attends to: one Zarr store per episode under {output_dir}/attention (lerobot-
    # attn).
    save_attention_maps: bool = False
    # What to record and how to store it; --eval.attention=FILE reads the settings from a YAML file.
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    # Act on the policy, whether it is recorded or not: a YAML file of a condition (docs/interventions.md), or
    # its content in braces.
    interventions: str | None = None
    # When cameras are drawn: 'always', or 'inferences', at frames at which the policy looks alone (LIBERO):
    # the same actions several times as fast, and no videos.
    render: str = "always"
    # Number of the first episode of each task: with n_episodes=10, 20 evaluates its episodes 20 to 29, from
    # their own initial states and seeds, so that several jobs can share a task.
    first_episode: int = 0


@dataclass
class AttentionEvalPipelineConfig(EvalPipelineConfig):
    """`lerobot-eval`'s config with attention capture."""

    eval: AttentionEvalConfig = field(default_factory=AttentionEvalConfig)


def plain_eval_config(options: AttentionEvalConfig) -> EvalConfig:
    """Return the `EvalConfig` that LeRobot would have parsed without the options."""
    return EvalConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(EvalConfig)})
