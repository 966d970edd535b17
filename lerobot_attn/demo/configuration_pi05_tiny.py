"""Settings of the demo policy `pi05_tiny`: those of Pi0.5, and the sizes of its small towers.

Every LeRobot command imports this module, so it imports nothing that LeRobot's policies have not loaded. It
does not know how the towers are built; see `modeling_pi05_tiny`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi05.configuration_pi05 import PI05Config

from lerobot_attn.errors import ConfigError


@PreTrainedConfig.register_subclass("pi05_tiny")
@dataclass
class PI05TinyConfig(PI05Config):
    """Pi0.5 with small towers: same code, tokens, heads and denoise steps, about a million parameters.

    The VLM and the action expert have Pi0.5's 8 heads over one shared key head. With the defaults of Pi0.5 a
    camera is 16×16 patches, the prompt 200 slots and the action chunk 50 tokens.
    """

    n_action_steps: int = 10  # as is usual on LIBERO: 10 of the chunk's 50 actions are executed
    empty_cameras: int = 1  # LIBERO has two cameras, Pi0.5 three; the third one stays empty and masked

    # True: the weights were never trained, the maps mean nothing, and everything that shows its maps says so.
    random_weights: bool = True
    # One line that everything that shows the policy's maps says of it, e.g. what it was trained on.
    remark: str = ""
    # Seed of the weights that a new policy starts with; a checkpoint's own weights replace them.
    init_seed: int = 0

    depth: int = 4  # layers of the VLM, and of the action expert; 18 in Pi0.5
    width: int = 64  # hidden size of both; 2048 and 1024 in Pi0.5. At least max_action_dim
    mlp_width: int = 192  # hidden size of their MLPs; 16384 and 4096 in Pi0.5
    head_dim: int = 16  # even, for the rotary positions; 256 in Pi0.5
    vision_depth: int = 2  # layers of the image encoder; 27 in Pi0.5
    vision_width: int = 64  # its hidden size, a multiple of vision_heads; 1152 in Pi0.5
    vision_mlp_width: int = 128  # hidden size of its MLPs; 4304 in Pi0.5
    vision_heads: int = 4  # 16 in Pi0.5
    # Token ids, at least as many as the tokenizer's; a demo checkpoint has exactly as many. 257152 in Pi0.5
    vocab_size: int = 640

    def __post_init__(self) -> None:
        """Check the sizes against one another.

        Raises:
            ConfigError: A size is not positive, or does not fit another one.
        """
        super().__post_init__()
        sizes = (
            "depth",
            "width",
            "mlp_width",
            "head_dim",
            "vision_depth",
            "vision_width",
            "vision_mlp_width",
            "vision_heads",
            "vocab_size",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                got = getattr(self, name)
                raise ConfigError(f"policy.{name} is {got}, expected at least 1; leave it at its default")
        if self.width < self.max_action_dim:
            raise ConfigError(
                f"policy.width is {self.width}, expected at least policy.max_action_dim = "
                f"{self.max_action_dim}: the first channels carry the noisy action; raise policy.width"
            )
        if self.width % 2 or self.head_dim % 2:
            raise ConfigError(
                f"policy.width is {self.width} and policy.head_dim {self.head_dim}, expected even numbers: "
                "flow time and positions are sine-cosine pairs; add 1 to the odd one"
            )
        if self.vision_width % self.vision_heads:
            raise ConfigError(
                f"policy.vision_width is {self.vision_width}, expected a multiple of policy.vision_heads = "
                f"{self.vision_heads}; change one of the two"
            )
