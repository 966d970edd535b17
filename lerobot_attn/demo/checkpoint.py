"""Write a complete, movable checkpoint of a demo policy: trained, or with random weights.

    lerobot-eval --policy.path=DIR --env.type=libero …

Knows which files a LeRobot checkpoint has only through LeRobot's own `save_pretrained`.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lerobot_attn.demo import trained
from lerobot_attn.demo.tokenizer import demo_tokenizer_json, vocab_size
from lerobot_attn.errors import SetupError

if TYPE_CHECKING:
    import torch

Ranges = tuple[tuple[float, float], ...]

# Policy type → how its classes begin. LeRobot finds a type's modules by its name, and so does this one.
POLICY_TYPES = {"pi05_tiny": "PI05Tiny", "pi0_tiny": "PI0Tiny", "smolvla_tiny": "SmolVLATiny"}

# (q01, q99) of each number: LIBERO's workspace in round figures, not the statistics of a data set.
_STATE_RANGES = (
    (-0.4, 0.2),  # end effector x, metres
    (-0.35, 0.35),  # y
    (0.0, 1.3),  # z: LIBERO's tables stand at different heights
    (1.5, 3.4),  # end effector orientation as an axis-angle vector, radians; hand down is about (π, 0, 0)
    (-2.0, 2.0),
    (-1.0, 1.0),
    (0.0, 0.04),  # the two fingers' positions, metres
    (-0.04, 0.0),
)
_ACTION_RANGES = (
    (-0.9, 0.9),  # end effector move x, in LIBERO's units: 1 is the controller's largest step
    (-0.9, 0.9),  # y
    (-0.9, 0.9),  # z
    (-0.3, 0.3),  # rotation about x, 1 is the largest turn
    (-0.3, 0.3),
    (-0.3, 0.3),
    (-1.0, 1.0),  # gripper: -1 opens, 1 closes
)


def make_demo_checkpoint(
    directory: str | Path,
    *,
    policy_type: str = trained.DEFAULT,
    random: bool = False,
    variant: str = trained.DEFAULT,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint of a demo policy; the global random state stays as it was.

    Args:
        directory: Where to; made with its parents. The checkpoint can be moved later.
        policy_type: One of `POLICY_TYPES`; pi05_tiny alone has trained weights.
        random: Whether its weights are random, so that its attention maps mean nothing, instead of trained.
        variant: Which trained policy of type pi05_tiny, one of `trained.VARIANTS`.
        seed: Seed of random weights. The same seed gives the same `model.safetensors`, byte for byte.
        overwrite: Whether the files of a checkpoint in `directory` may be replaced; other files there stay.

    Returns:
        `directory` as a path: it holds `config.json`, `model.safetensors`, `policy_preprocessor.json`,
        `policy_postprocessor.json` and their statistics; a trained policy's card as `README.md`.

    Raises:
        SetupError: The directory cannot be used; there is no such type or variant, or none of this type is
            trained; or, with random weights, LIBERO is not installed: the tokenizer learns its instructions.
    """
    target = Path(directory)
    _check_type(policy_type, random)
    if target.exists() and not target.is_dir():
        raise SetupError(
            f"cannot write a demo checkpoint to {target}: got a file, expected a directory; name another path"
        )
    try:
        if target.is_dir() and any(target.iterdir()) and not overwrite:
            raise SetupError(
                f"cannot write a demo checkpoint to {target}: got a directory with files in it, expected a "
                "new or an empty one; name another path or allow overwriting"
            )
        if random:
            demo_tokenizer_json()  # without LIBERO nothing is made
        else:
            trained.check(variant)
        target.mkdir(parents=True, exist_ok=True)
        # Written aside on the same disk and then moved: an interrupted run leaves no half-written file.
        with tempfile.TemporaryDirectory(dir=target, prefix=".unfinished-") as aside:
            if random:
                _write_random(Path(aside), policy_type, seed)
            else:
                _write_trained(Path(aside), variant)
            for path in sorted(Path(aside).iterdir()):
                path.replace(target / path.name)
    except OSError as error:
        raise SetupError(
            f"cannot write a demo checkpoint to {target}: got {error.strerror or error}, expected a place to "
            "write to; name another path"
        ) from error
    return target


def libero_config(vocabulary: int, policy_type: str = trained.DEFAULT, **settings: Any) -> Any:
    """Return a policy's settings, e.g. a `PI05TinyConfig`, for LIBERO's two cameras, state and actions.

    Args:
        vocabulary: Number of token ids.
        policy_type: One of `POLICY_TYPES`.
        **settings: Other fields of its config.
    """
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

    config = _part(policy_type, "configuration", "Config")
    return config(
        device="cpu",  # fast enough everywhere; --policy.device=cuda works as well
        push_to_hub=False,
        vocab_size=vocabulary,
        input_features={
            # LIBERO's two cameras at LeRobot's default size; the policy resizes them.
            f"{OBS_IMAGES}.image": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 360, 360)),
            f"{OBS_IMAGES}.image2": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 360, 360)),
            OBS_STATE: PolicyFeature(type=FeatureType.STATE, shape=(len(_STATE_RANGES),)),
        },
        output_features={ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(len(_ACTION_RANGES),))},
        **settings,
    )


def save_policy(
    directory: Path, policy: Any, tokenizer_json: str, state_ranges: Ranges, action_ranges: Ranges
) -> None:
    """Write all files of a checkpoint into a directory.

    Args:
        directory: Where to; it must exist.
        policy: The policy.
        tokenizer_json: Its tokenizer as JSON text.
        state_ranges: (q01, q99) of each number of the state, by which the policy's input is scaled.
        action_ranges: Likewise of the action.
    """
    from lerobot.utils.constants import ACTION, OBS_STATE

    kind = policy.config.type
    make_processors = getattr(_module("processor", kind), f"make_{kind}_pre_post_processors")
    stats = {OBS_STATE: statistics(state_ranges), ACTION: statistics(action_ranges)}
    preprocessor, postprocessor = make_processors(
        policy.config, dataset_stats=stats, tokenizer_json=tokenizer_json
    )
    policy.save_pretrained(directory)
    preprocessor.save_pretrained(directory)
    postprocessor.save_pretrained(directory)


def _check_type(policy_type: str, random: bool) -> None:
    if policy_type not in POLICY_TYPES:
        raise SetupError(
            f"no demo policy of type {policy_type!r}: expected one of {', '.join(sorted(POLICY_TYPES))}"
        )
    if not random and policy_type != trained.DEFAULT:
        raise SetupError(
            f"no trained demo policy of type {policy_type}: only {trained.DEFAULT} comes with trained "
            "weights; ask for random ones"
        )


def _module(part: str, policy_type: str) -> Any:
    return importlib.import_module(f"lerobot_attn.demo.{part}_{policy_type}")


def _part(policy_type: str, part: str, name: str) -> Any:
    """Return the class of a type, e.g. its "modeling" module's class whose name ends with "Policy"."""
    return getattr(_module(part, policy_type), POLICY_TYPES[policy_type] + name)


def _write_random(directory: Path, policy_type: str, seed: int) -> None:
    """Write a checkpoint with random weights."""
    # Imports torch and LeRobot, which the checks above need not wait for.
    make_policy = _part(policy_type, "modeling", "Policy")
    tokenizer_json = demo_tokenizer_json()
    policy = make_policy(libero_config(vocab_size(tokenizer_json), policy_type, init_seed=seed))
    save_policy(directory, policy, tokenizer_json, _STATE_RANGES, _ACTION_RANGES)


def _write_trained(directory: Path, variant: str) -> None:
    """Write a checkpoint with the trained weights that come with the package."""
    tokenizer_json = trained.tokenizer_json()
    policy = trained.policy(variant, libero_config(vocab_size(tokenizer_json), **trained.settings(variant)))
    save_policy(directory, policy, tokenizer_json, trained.STATE_RANGES, trained.ACTION_RANGES)
    (directory / "README.md").write_text(trained.card(), encoding="utf-8")


def statistics(ranges: Ranges) -> dict[str, torch.Tensor]:
    """Return `{"q01": (n,), …}`, float32, of n numbers given as (q01, q99); mean and std to match."""
    import torch

    low, high = torch.tensor(ranges, dtype=torch.float32).unbind(dim=1)
    margin = 0.05 * (high - low)
    return {
        "min": low - margin,
        "max": high + margin,
        "mean": (low + high) / 2,
        "std": (high - low) / 4,
        "q01": low,
        "q99": high,
    }
