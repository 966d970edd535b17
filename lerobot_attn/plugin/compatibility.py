"""Whether the installed LeRobot has what this plugin hangs on: its version, functions, parameters and fields.

Changes nothing, and knows nothing of capture or recording.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
from collections.abc import Sequence
from typing import Any

from lerobot_attn.errors import IncompatibleLeRobotError

EVAL_MODULE = "lerobot.scripts.lerobot_eval"
SUPPORTED_LEROBOT = ((0, 6), (0, 7))  # from, up to but not including
FLAG = "save_attention_maps"

# What the wrappers rely on: the parameters that they read or replace.
PATCH_POINTS: dict[str, tuple[str, ...]] = {
    "main": (),
    "eval_main": ("cfg",),
    "eval_policy_all": ("envs", "policy", "preprocessor", "max_parallel_tasks"),
    "run_one": ("task_group", "task_id", "env", "n_episodes", "max_episodes_rendered", "videos_dir"),
    "rollout": ("env", "policy", "env_preprocessor", "seeds"),
}


def check_lerobot(namespace: dict[str, Any] | None = None) -> list[str]:
    """Return what about the installed LeRobot does not fit this plugin; nothing when all is well.

    Args:
        namespace: globals of the evaluation script; imported when not given.
    """
    try:
        version = importlib.metadata.version("lerobot")
    except importlib.metadata.PackageNotFoundError:
        return ["LeRobot is not installed; pip install 'lerobot_policy_attn[eval]'"]
    problems = []
    low, high = SUPPORTED_LEROBOT
    try:
        release = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        release = (0, 0)
    if not low <= release < high:
        expected = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        problems.append(
            f"LeRobot {version} is installed, expected {expected}; pip install 'lerobot{expected}'"
        )
    if namespace is None:
        try:
            namespace = vars(importlib.import_module(EVAL_MODULE))
        except ImportError as error:
            return [*problems, f"{EVAL_MODULE} cannot be imported: {error}"]
    for name, expected_parameters in PATCH_POINTS.items():
        function = namespace.get(name)
        if not callable(function):
            problems.append(f"{EVAL_MODULE} has no function {name}")
            continue
        found = inspect.signature(inspect.unwrap(function)).parameters
        missing = [parameter for parameter in expected_parameters if parameter not in found]
        if missing:
            problems.append(f"{name}() of {EVAL_MODULE} has no parameter {', '.join(missing)}")
    return problems + _check_configs()


def incompatible(problems: Sequence[str]) -> IncompatibleLeRobotError:
    """Return the error that says what does not fit."""
    return IncompatibleLeRobotError(
        "lerobot-attn cannot capture attention with this LeRobot: " + "; ".join(problems)
    )


def _check_configs() -> list[str]:
    """Return what the config classes lack that the options hang on."""
    from lerobot.configs import default, parser
    from lerobot.configs import eval as eval_configs

    problems = []
    for owner, name in (
        (default, "EvalConfig"),
        (eval_configs, "EvalPipelineConfig"),
        (parser, "wrap"),
    ):
        if not hasattr(owner, name):
            problems.append(f"{owner.__name__} has no {name}")
    if problems:
        return problems
    present = {field.name for field in dataclasses.fields(eval_configs.EvalPipelineConfig)}
    problems += [
        f"EvalPipelineConfig has no field {name}"
        for name in ("env", "eval", "policy", "output_dir")
        if name not in present
    ]
    present = {field.name for field in dataclasses.fields(default.EvalConfig)}
    problems += [
        f"EvalConfig has no field {name}" for name in ("n_episodes", "batch_size") if name not in present
    ]
    problems += [f"EvalConfig has its own field {name}" for name in (FLAG, "attention") if name in present]
    return problems
