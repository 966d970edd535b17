"""Write a complete, movable checkpoint of the demo policy.

    lerobot-eval --policy.path=DIR --env.type=libero …

Knows which files a LeRobot checkpoint has only through LeRobot's own `save_pretrained`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lerobot_attn.demo.tokenizer import demo_tokenizer_json, vocab_size
from lerobot_attn.errors import SetupError

if TYPE_CHECKING:
    import torch

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


def make_demo_checkpoint(directory: str | Path, *, seed: int = 0, overwrite: bool = False) -> Path:
    """Write a checkpoint of `pi05_tiny` with random weights; the global random state stays as it was.

    Args:
        directory: Where to; made with its parents. The checkpoint can be moved later.
        seed: Seed of the weights. The same seed gives the same `model.safetensors`, byte for byte.
        overwrite: Whether the files of a checkpoint in `directory` may be replaced; other files there stay.

    Returns:
        `directory` as a path: it holds `config.json`, `model.safetensors`, `policy_preprocessor.json`,
        `policy_postprocessor.json` and their statistics.

    Raises:
        SetupError: The directory cannot be used, or LIBERO, whose instructions the tokenizer learns, is not
            installed.
    """
    target = Path(directory)
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
        demo_tokenizer_json()  # without LIBERO nothing is made
        target.mkdir(parents=True, exist_ok=True)
        # Written aside on the same disk and then moved: an interrupted run leaves no half-written file.
        with tempfile.TemporaryDirectory(dir=target, prefix=".unfinished-") as aside:
            _write(Path(aside), seed)
            for path in sorted(Path(aside).iterdir()):
                path.replace(target / path.name)
    except OSError as error:
        raise SetupError(
            f"cannot write a demo checkpoint to {target}: got {error.strerror or error}, expected a place to "
            "write to; name another path"
        ) from error
    return target


def _write(directory: Path, seed: int) -> None:
    """Write all files of the checkpoint into an empty directory."""
    # Here, for the checks above need not wait for torch and LeRobot.
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

    from lerobot_attn.demo.configuration_pi05_tiny import PI05TinyConfig
    from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy
    from lerobot_attn.demo.processor_pi05_tiny import make_pi05_tiny_pre_post_processors

    config = PI05TinyConfig(
        device="cpu",  # fast enough everywhere; --policy.device=cuda works as well
        push_to_hub=False,
        vocab_size=vocab_size(demo_tokenizer_json()),
        init_seed=seed,
        input_features={
            # LIBERO's two cameras at LeRobot's default size; the policy resizes them.
            f"{OBS_IMAGES}.image": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 360, 360)),
            f"{OBS_IMAGES}.image2": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 360, 360)),
            OBS_STATE: PolicyFeature(type=FeatureType.STATE, shape=(len(_STATE_RANGES),)),
        },
        output_features={ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(len(_ACTION_RANGES),))},
    )
    policy = PI05TinyPolicy(config)  # also adds the empty camera to the config's features
    stats = {OBS_STATE: _statistics(_STATE_RANGES), ACTION: _statistics(_ACTION_RANGES)}
    preprocessor, postprocessor = make_pi05_tiny_pre_post_processors(config, dataset_stats=stats)
    policy.save_pretrained(directory)
    preprocessor.save_pretrained(directory)
    postprocessor.save_pretrained(directory)


def _statistics(ranges: tuple[tuple[float, float], ...]) -> dict[str, torch.Tensor]:
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
