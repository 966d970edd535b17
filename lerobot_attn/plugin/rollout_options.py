"""LeRobot's rollout config with the attention options. Comments above fields are the help texts."""

from dataclasses import dataclass, field

from lerobot.rollout import RolloutConfig

from lerobot_attn.config import AttentionConfig


@dataclass
class AttentionRolloutConfig(RolloutConfig):
    """`lerobot-rollout`'s config with attention capture."""

    # Record what the policy attends to: one Zarr store per episode (lerobot-attn), in attention.dir or in
    # outputs/rollout/{date}/{time}_{robot}_{policy}/attention.
    save_attention_maps: bool = False
    # What to record and how to store it; --attention=FILE reads the settings from a YAML file.
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    # Act on the policy, whether it is recorded or not: a YAML file of a condition (docs/interventions.md), or
    # its content in braces.
    interventions: str | None = None
