"""Settings that the demo policies built on PaliGemma share: the sizes of their small towers.

Every LeRobot command imports this module, so it imports nothing that LeRobot's policies have not loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lerobot_attn.errors import ConfigError


@dataclass
class DemoSettings:
    """What every demo policy's settings say of its weights."""

    # True: the weights were never trained, the maps mean nothing, and everything that shows its maps says so.
    random_weights: bool = True
    # One line that everything that shows the policy's maps says of it, e.g. what it was trained on.
    remark: str = ""
    # Seed of the weights that a new policy starts with; a checkpoint's own weights replace them.
    init_seed: int = 0


@dataclass
class SmallTowers(DemoSettings):
    """Sizes of a small PaliGemma and its action expert; Pi0 and Pi0.5 have the same sizes at full size."""

    depth: int = 4  # layers of the VLM, and of the action expert; 18 at full size
    width: int = 64  # hidden size of both; 2048 and 1024 at full size. At least max_action_dim
    mlp_width: int = 192  # hidden size of their MLPs; 16384 and 4096 at full size
    head_dim: int = 16  # even, for the rotary positions; 256 at full size
    vision_depth: int = 2  # layers of the image encoder; 27 at full size
    vision_width: int = 64  # its hidden size, a multiple of vision_heads; 1152 at full size
    vision_mlp_width: int = 128  # hidden size of its MLPs; 4304 at full size
    vision_heads: int = 4  # 16 at full size
    # Token ids, at least as many as the tokenizer's; a checkpoint has exactly as many. 257152 at full size
    vocab_size: int = 640


def check_positive(config: Any, names: tuple[str, ...]) -> None:
    """Check that these settings of a policy are at least 1.

    Raises:
        ConfigError: One is not.
    """
    for name in names:
        got = getattr(config, name)
        if got < 1:
            raise ConfigError(f"policy.{name} is {got}, expected at least 1; leave it at its default")


def check_small_towers(config: Any) -> None:
    """Check the sizes against one another.

    Raises:
        ConfigError: A size is not positive, or does not fit another one.
    """
    check_positive(
        config,
        (
            *("depth", "width", "mlp_width", "head_dim"),
            *("vision_depth", "vision_width", "vision_mlp_width", "vision_heads", "vocab_size"),
        ),
    )
    if config.width < config.max_action_dim:
        raise ConfigError(
            f"policy.width is {config.width}, expected at least policy.max_action_dim = "
            f"{config.max_action_dim}: the first channels carry the noisy action; raise policy.width"
        )
    if config.width % 2 or config.head_dim % 2:
        raise ConfigError(
            f"policy.width is {config.width} and policy.head_dim {config.head_dim}, expected even numbers: "
            "flow time and positions are sine-cosine pairs; add 1 to the odd one"
        )
    if config.vision_width % config.vision_heads:
        raise ConfigError(
            f"policy.vision_width is {config.vision_width}, expected a multiple of policy.vision_heads = "
            f"{config.vision_heads}; change one of the two"
        )
