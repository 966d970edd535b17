"""A part of a task's episodes: an evaluation that begins with another than the first.

LeRobot always begins with episode 0. Episode n of a task has the seed of the evaluation plus n; LIBERO's has
the suite's initial state n besides. Knows nothing of recordings.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lerobot_attn.errors import ConfigError
from lerobot_attn.plugin.script import replaced_names

_INITIAL_STATE = "init_state_id"  # of LiberoEnv: the state of its next reset


def check_first_episode(first: int, option: str) -> None:
    """Check the number of the first episode.

    Raises:
        ConfigError: it is negative.
    """
    if first < 0:
        raise ConfigError(f"{option}: got {first}, expected an episode's number, from 0")


def beginning_at(namespace: dict[str, Any], first: int) -> AbstractContextManager[None]:
    """Let each task of the evaluation begin with an episode while the block runs.

    The random numbers begin with the seed plus `first`, so that parts of a task do not share their noise.

    Args:
        namespace: globals of the script, where its functions look each other up by name.
        first: the episode's number.
    """
    return replaced_names(namespace, {"run_one": functools.partial(_wrap_run_one, first=first)})


def _wrap_run_one(original: Callable[..., Any], *, first: int) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def run_one(*args: Any, **kwargs: Any) -> Any:
        from lerobot.utils.random_utils import set_seed

        bound = signature.bind(*args, **kwargs)
        call, env = bound.arguments, bound.arguments["env"]
        if call.get("start_seed") is not None:
            call["start_seed"] += first
            set_seed(call["start_seed"])
        pass_initial_states(env, first)
        return original(*bound.args, **bound.kwargs)

    return run_one


def pass_initial_states(env: Any, number: int) -> None:
    """Let LIBERO's environments go on as if so many episodes had been; others count none."""
    if all(env.call("has_wrapper_attr", _INITIAL_STATE)):
        states = env.get_attr(_INITIAL_STATE)
        vector = getattr(env, "_env", env)  # LeRobot's lazy one cannot set what it holds
        vector.set_attr(_INITIAL_STATE, [state + number for state in states])
