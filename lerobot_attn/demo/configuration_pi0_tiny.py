"""Settings of the demo policy `pi0_tiny`: those of Pi0, and the sizes of its small towers.

Every LeRobot command imports this module, so it imports nothing that LeRobot's policies have not loaded. It
does not know how the towers are built; see `modeling_pi0_tiny`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config

from lerobot_attn.demo.small_towers import SmallTowers, check_small_towers
from lerobot_attn.errors import ConfigError


@PreTrainedConfig.register_subclass("pi0_tiny")
@dataclass
class PI0TinyConfig(SmallTowers, PI0Config):
    """Pi0 with small towers: same code, tokens, heads and denoise steps, about a million parameters.

    The VLM and the action expert have Pi0's 8 heads over one shared key head. With the defaults of Pi0 a
    camera is 16×16 patches, the prompt 48 slots, and the suffix one state token before 50 actions.
    """

    n_action_steps: int = 10  # as is usual on LIBERO: 10 of the chunk's 50 actions are executed
    empty_cameras: int = 1  # LIBERO has two cameras, Pi0 three; the third one stays empty and masked

    def __post_init__(self) -> None:
        """Check the sizes against one another.

        Raises:
            ConfigError: A size is not positive, or does not fit another one.
        """
        super().__post_init__()
        check_small_towers(self)
        if self.width <= self.max_action_dim:
            raise ConfigError(
                f"policy.width is {self.width}, expected more than policy.max_action_dim = "
                f"{self.max_action_dim}: the channels beyond it carry the flow time; raise policy.width"
            )
