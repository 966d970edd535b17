"""Whether the installed LeRobot has what this plugin hangs on: its version, functions, parameters and fields.

Changes nothing, and knows nothing of capture or recording.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lerobot_attn.errors import IncompatibleLeRobotError

EVAL_MODULE = "lerobot.scripts.lerobot_eval"
ROLLOUT_MODULE = "lerobot.scripts.lerobot_rollout"
ROLLOUT_MODULES = {
    "rtc": "lerobot.rollout.inference.rtc",
    **{
        name: f"lerobot.rollout.strategies.{name}"
        for name in ("base", "sentry", "episodic", "highlight", "dagger")
    },
}
SUPPORTED_LEROBOT = ((0, 6), (0, 7))  # from, up to but not including
FLAG = "save_attention_maps"

# What the wrappers rely on: the parameters that they read or replace.
PATCH_POINTS: dict[str, tuple[str, ...]] = {
    "main": (),
    "eval_main": ("cfg",),
    "eval_policy_all": ("envs", "policy", "preprocessor", "max_parallel_tasks"),
    "run_one": (
        *("task_group", "task_id", "env", "n_episodes", "max_episodes_rendered", "videos_dir"),
        "start_seed",
    ),
    "rollout": ("env", "policy", "env_preprocessor", "seeds"),
}


# Likewise of a robot's rollout: module → name → parameters.
ROLLOUT_PATCH_POINTS: dict[str, dict[str, tuple[str, ...]]] = {
    ROLLOUT_MODULE: {"main": (), "rollout": ("cfg",), "build_rollout_context": ("cfg",)},
    ROLLOUT_MODULES["rtc"]: {
        "ActionQueue.merge": ("original_actions", "processed_actions"),
        "ActionQueue.get": (),
        "ActionQueue.clear": (),
        "build_dataset_frame": (),
    },
    ROLLOUT_MODULES["highlight"]: {"RolloutRingBuffer.append": ("frame",), "RolloutRingBuffer.drain": ()},
    **{
        ROLLOUT_MODULES[name]: {"send_next_action": ("obs_processed", "obs_raw", "ctx", "interpolator")}
        for name in ("base", "sentry", "episodic", "dagger")
    },
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
    problems = _check_version(version)
    if namespace is None:
        try:
            namespace = vars(importlib.import_module(EVAL_MODULE))
        except ImportError as error:
            return [*problems, f"{EVAL_MODULE} cannot be imported: {error}"]
    return problems + _check_functions(EVAL_MODULE, namespace, PATCH_POINTS) + _check_configs()


def check_rollout(namespace: dict[str, Any] | None = None) -> list[str]:
    """Return what about the installed LeRobot does not fit the recording of a robot's rollout.

    Args:
        namespace: globals of the rollout script; imported when not given.
    """
    problems = _check_version(importlib.metadata.version("lerobot"))
    for module, points in ROLLOUT_PATCH_POINTS.items():
        found = namespace if module == ROLLOUT_MODULE else None
        if found is None:
            try:
                found = vars(importlib.import_module(module))
            except ImportError as error:
                problems.append(f"{module} cannot be imported: {error}")
                continue
        problems += _check_functions(module, found, points)
    return problems


def _check_version(version: str) -> list[str]:
    low, high = SUPPORTED_LEROBOT
    try:
        release = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        release = (0, 0)
    if low <= release < high:
        return []
    expected = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
    return [f"LeRobot {version} is installed, expected {expected}; pip install 'lerobot{expected}'"]


def _check_functions(
    module: str, namespace: dict[str, Any], points: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """Return which functions are missing, or lack parameters that the wrappers rely on."""
    problems = []
    for name, expected in points.items():
        owner, _, method = name.partition(".")
        function = getattr(namespace.get(owner), method, None) if method else namespace.get(owner)
        if not callable(function):
            problems.append(f"{module} has no function {name}")
            continue
        found = inspect.signature(inspect.unwrap(function)).parameters
        missing = [parameter for parameter in expected if parameter not in found]
        if missing:
            problems.append(f"{name}() of {module} has no parameter {', '.join(missing)}")
    return problems


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
    problems += [
        f"EvalConfig has its own field {name}" for name in (FLAG, "attention", "render") if name in present
    ]
    return problems
