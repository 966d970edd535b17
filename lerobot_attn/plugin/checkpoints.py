"""A policy's checkpoint with its processors, loaded as LeRobot's own commands load it.

Knows LeRobot's factories. Asks the policy nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from lerobot_attn.errors import ConfigError, LerobotAttnError, first_line
from lerobot_attn.policies import adapter_type


class Checkpoint(NamedTuple):
    """What a checkpoint says before its weights are loaded.

    Attributes:
        config: the policy's config, with the options of the command line.
        preprocessor: turns observations into the policy's batch.
        postprocessor: turns its actions into the robot's.
    """

    config: Any
    preprocessor: Any
    postprocessor: Any


def read_checkpoint(path: str, options: Sequence[str] = ()) -> Checkpoint:
    """Read a checkpoint's config and processors.

    Args:
        path: its folder, or its name on the Hub.
        options: fields of its config that are set otherwise, each as `--name=value`.

    Raises:
        ConfigError: there is no such checkpoint, or an option is none of its config's.
        UnsupportedPolicyError: nobody knows how to observe its attention.
    """
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    _register_policies()
    try:
        config = PreTrainedConfig.from_pretrained(path, cli_overrides=list(options))
        config.pretrained_path = path
        adapter_type(config)
        device = {"device_processor": {"device": str(config.device)}}
        processors = make_pre_post_processors(config, pretrained_path=path, preprocessor_overrides=device)
    except LerobotAttnError:
        raise
    except SystemExit as error:  # the parser of options has printed what it did not understand
        raise ConfigError(
            f"--policy: got {' '.join(options)}, expected fields of its config as --policy.name=value"
        ) from error
    except Exception as error:  # of the Hub, of files, of the parser: many kinds
        raise ConfigError(
            f"--policy.path: {path} cannot be loaded ({_why(error)}); expected a checkpoint's folder "
            "or its name on the Hub"
        ) from error
    return Checkpoint(config, *processors)


def load_policy(checkpoint: Checkpoint, dataset: Any = None, renames: bool = False) -> Any:
    """Load the weights.

    Args:
        checkpoint: what was read of it.
        dataset: metadata of the data set that the policy sees; None: it has the checkpoint's own features.
        renames: whether features of the data set are renamed on their way to the policy.

    Raises:
        ConfigError: the weights cannot be loaded.
    """
    from lerobot.policies.factory import make_policy

    config = checkpoint.config
    if dataset is None:
        dataset = SimpleNamespace(features=_features(config.output_features))
    try:
        # LeRobot compares the cameras unless told that some are renamed; whoever calls this has done so.
        return make_policy(config, ds_meta=dataset, rename_map={"": ""} if renames else None).eval()
    except Exception as error:
        raise ConfigError(
            f"--policy.path: the weights of {config.pretrained_path} cannot be loaded ({first_line(error)})"
        ) from error


def _why(error: BaseException) -> str:
    """Return what an error says, and what caused it: the parser of configs says only that one is wrong."""
    cause = error.__cause__
    return first_line(error) if cause is None else f"{first_line(error)} {first_line(cause)}"


def _register_policies() -> None:
    """Register the policy types of installed plugins, this package's own among them."""
    from lerobot.utils.import_utils import register_third_party_plugins

    before = sys.argv
    try:
        # LeRobot's plugins may read its commands' options, which this command's are not.
        sys.argv = before[:1]
        register_third_party_plugins()
    finally:
        sys.argv = before


def _features(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a policy's outputs as a data set describes its features."""
    return {
        name: {"dtype": "float32", "shape": tuple(feature.shape), "names": None}
        for name, feature in outputs.items()
    }
