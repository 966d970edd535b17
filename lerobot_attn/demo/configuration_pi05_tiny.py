"""Settings of the demo policy `pi05_tiny`: those of Pi0.5, and the sizes of its small towers.

Every LeRobot command imports this module, so it imports nothing that LeRobot's policies have not loaded. It
does not know how the towers are built; see `modeling_pi05_tiny`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi05.configuration_pi05 import PI05Config

from lerobot_attn.demo.small_towers import SmallTowers, check_small_towers


@PreTrainedConfig.register_subclass("pi05_tiny")
@dataclass
class PI05TinyConfig(SmallTowers, PI05Config):
    """Pi0.5 with small towers: same code, tokens, heads and denoise steps, about a million parameters.

    The VLM and the action expert have Pi0.5's 8 heads over one shared key head. With the defaults of Pi0.5 a
    camera is 16×16 patches, the prompt 200 slots and the action chunk 50 tokens.
    """

    n_action_steps: int = 10  # as is usual on LIBERO: 10 of the chunk's 50 actions are executed
    empty_cameras: int = 1  # LIBERO has two cameras, Pi0.5 three; the third one stays empty and masked

    def __post_init__(self) -> None:
        """Check the sizes against one another.

        Raises:
            ConfigError: A size is not positive, or does not fit another one.
        """
        super().__post_init__()
        check_small_towers(self)
