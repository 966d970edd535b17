"""The trained demo policies that come with the package: their weights, sizes and ranges.

The weights are float16, without what LeRobot's code never reads (the two language-model heads).
`scripts/demo/` trained them; `weights/README.md`, the card, says on what and how well they do. Importing this
module loads neither torch nor LeRobot.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lerobot_attn.errors import SetupError

if TYPE_CHECKING:
    import torch

    from lerobot_attn.demo.configuration_pi05_tiny import PI05TinyConfig
    from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy

WEIGHTS = Path(__file__).parent / "weights"
DEFAULT, HEIGHTS = "pi05_tiny", "pi05_tiny_heights"

# What everything that shows a policy's maps says, in one line.
REMARK = "demo policy, trained in simulation on LIBERO's object suite"
REMARKS = {DEFAULT: REMARK, HEIGHTS: f"{REMARK}, lifts low or high at random"}
VARIANTS = tuple(REMARKS)

# Fields of PI05TinyConfig that differ from the random policy's.
SETTINGS = {"head_dim": 32, "random_weights": False}

# Weights that no number of an inference depends on; Pi0.5 has them all the same.
HEADS = (
    "model.paligemma_with_expert.paligemma.lm_head.weight",
    "model.paligemma_with_expert.gemma_expert.lm_head.weight",
)
EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"

_WORKSPACE = (
    (-0.35, 0.25),  # end effector x, metres
    (-0.35, 0.35),  # y
    (0.0, 0.45),  # z over the floor
    (3.0, 3.3),  # end effector orientation as an axis-angle vector, radians: the hand points down
    (-0.2, 0.2),
    (-0.2, 0.2),
    (0.0, 0.042),  # the two fingers' positions, metres
    (-0.042, 0.0),
)


def _three_digits(low: float, high: float) -> tuple[float, float]:
    """Return (q01, q99) such that [low, high] falls into the bins 100 to about 250 of Pi0.5's 256.

    Every number of the state is then three tokens, and each token of a prompt has one place for all
    inferences.
    """
    size = high - low
    return high - size * 256 / 150, high + 0.02 * size


STATE_RANGES = tuple(_three_digits(low, high) for low, high in _WORKSPACE)
ACTION_RANGES = (*(3 * ((-0.7, 0.7),)), *(4 * ((-1.0, 1.0),)))


def settings(variant: str) -> dict[str, Any]:
    """Return the fields of PI05TinyConfig of a trained policy; of one that is not in the package, too."""
    return {**SETTINGS, "remark": REMARKS.get(variant, REMARK)}


def check(variant: str) -> None:
    """Check that there is such a trained policy.

    Raises:
        SetupError: There is not.
    """
    if variant not in VARIANTS:
        raise SetupError(f"no trained demo policy {variant!r}: expected one of {', '.join(VARIANTS)}")
    if not _file(variant).is_file():
        raise SetupError(
            f"the trained demo policy's weights are missing: got no file {_file(variant).name} in the "
            "package, expected one; install lerobot_policy_attn again"
        )


def tokenizer_json() -> str:
    """Return the tokenizer with which the policies were trained, as JSON text."""
    return (WEIGHTS / "tokenizer.json").read_text(encoding="utf-8")


def card() -> str:
    """Return the policies' card, Markdown."""
    return (WEIGHTS / "README.md").read_text(encoding="utf-8")


def policy(variant: str, config: PI05TinyConfig) -> PI05TinyPolicy:
    """Return a trained policy, float32.

    Args:
        variant: One of `VARIANTS`.
        config: Its settings, of the trained sizes.

    Raises:
        SetupError: There is no such variant, or its weights have other sizes than `config`.
    """
    from safetensors.torch import load_file

    check(variant)
    return load(load_file(_file(variant)), config)


def load(weights: dict[str, torch.Tensor], config: PI05TinyConfig) -> PI05TinyPolicy:
    """Return a policy of weights as `shipped` returns them.

    Raises:
        SetupError: They have other names or sizes than the policy that `config` describes.
    """
    from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy

    made = PI05TinyPolicy(config)
    complete = {name: tensor.float() for name, tensor in weights.items()}
    try:
        # LeRobot loads lm_head into embed_tokens when it opens a checkpoint: the two must be equal.
        complete |= {HEADS[0]: complete[EMBEDDING], HEADS[1]: made.state_dict()[HEADS[1]] * 0}
        made.load_state_dict(complete)
    except (KeyError, RuntimeError) as error:
        raise SetupError(
            f"the trained weights do not fit the policy: got {_first_mismatch(error)}, expected those of "
            "a policy of this size; leave its sizes at their defaults or train it with scripts/demo/train.py"
        ) from error
    return made


def shipped(made: PI05TinyPolicy) -> dict[str, torch.Tensor]:
    """Return a policy's weights as they come with the package: float16, without the heads.

    Raises:
        SetupError: A weight is too large for float16.
    """
    import torch

    weights = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in made.state_dict().items()
        if name not in HEADS
    }
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SetupError(
                f"cannot store {name} as float16: got a value beyond 65504, expected smaller ones"
            )
    return weights


def _file(variant: str) -> Path:
    return WEIGHTS / f"{variant}.safetensors"


def _first_mismatch(error: Exception) -> str:
    """Return the first line of PyTorch's list of what does not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]
