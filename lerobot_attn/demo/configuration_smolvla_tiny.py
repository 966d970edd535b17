"""Settings of the demo policy `smolvla_tiny`: those of SmolVLA, and the sizes of its small towers.

Every LeRobot command imports this module, so it imports nothing that LeRobot's policies have not loaded. It
does not know how the towers are built; see `modeling_smolvla_tiny`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

from lerobot_attn.demo.small_towers import DemoSettings, check_positive
from lerobot_attn.errors import ConfigError

_SIZES = (
    *("num_vlm_layers", "width", "mlp_width", "head_dim", "heads", "key_heads", "patch_px", "scale_factor"),
    *("vision_depth", "vision_width", "vision_mlp_width", "vision_heads", "vocab_size"),
)


@PreTrainedConfig.register_subclass("smolvla_tiny")
@dataclass
class SmolVLATinyConfig(DemoSettings, SmolVLAConfig):
    """SmolVLA with small towers: same code, tokens, heads and denoise steps, 1.3 million parameters.

    With the defaults of SmolVLA a camera is 8×8 tokens, the prompt has as many slots as it needs, a state
    token ends the prefix, the chunk has 50 actions, and layers that self-attend alternate with layers that
    cross-attend.
    """

    n_action_steps: int = 10  # as is usual on LIBERO: 10 of the chunk's 50 actions are executed
    vlm_model_name: str = "smolvla_tiny"  # nothing is fetched: the small SmolVLM is built here

    num_vlm_layers: int = 4  # layers of the VLM, and of the action expert; 16 in SmolVLA
    width: int = 120  # hidden size of the VLM, a multiple of heads; the expert has 0.75 of it. 960 in SmolVLA
    mlp_width: int = 192  # hidden size of the VLM's MLPs; 2560 in SmolVLA
    head_dim: int = 16  # even, for the rotary positions; 64 in SmolVLA
    heads: int = 15  # as in SmolVLA, a multiple of key_heads
    key_heads: int = 5  # as in SmolVLA
    patch_px: int = 16  # side of a patch; as in SmolVLA
    scale_factor: int = 4  # a token stands for this many patches in each direction; as in SmolVLA
    vision_depth: int = 2  # layers of the image encoder; 12 in SmolVLA
    vision_width: int = 32  # its hidden size, a multiple of vision_heads; 768 in SmolVLA
    vision_mlp_width: int = 64  # hidden size of its MLPs; 3072 in SmolVLA
    vision_heads: int = 4  # 12 in SmolVLA
    # Token ids, at least as many as the tokenizer's; a demo checkpoint has exactly as many. 49280 in SmolVLA
    vocab_size: int = 640

    def __post_init__(self) -> None:
        """Check the sizes against one another.

        Raises:
            ConfigError: A size is not positive, or does not fit another one; or weights are to be fetched.
        """
        super().__post_init__()
        check_positive(self, _SIZES)
        if self.load_vlm_weights:
            raise ConfigError(
                "policy.load_vlm_weights is true, expected false: no weights of this size are on the Hub; "
                "leave it at its default"
            )
        expert_width = int(self.width * self.expert_width_multiplier)
        if expert_width <= self.max_action_dim:
            raise ConfigError(
                f"policy.width is {self.width}, which makes the expert {expert_width} wide, expected more "
                f"than policy.max_action_dim = {self.max_action_dim}: the channels beyond it carry the flow "
                "time; raise policy.width"
            )
        if expert_width % 2 or self.head_dim % 2:
            raise ConfigError(
                f"the expert is {expert_width} wide and policy.head_dim is {self.head_dim}, expected even "
                "numbers: flow time and positions are sine-cosine pairs; change policy.width or head_dim"
            )
        for whole, part in (("width", "heads"), ("heads", "key_heads"), ("vision_width", "vision_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"policy.{whole} is {getattr(self, whole)}, expected a multiple of policy.{part} = "
                    f"{getattr(self, part)}; change one of the two"
                )
