"""An evaluation that was interrupted goes on behind its last whole batch, with the noise that it had then.

LeRobot rolls out every episode of a task. Here a task is called with those that are left, and what the whole
ones came to is put before what it returns.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from lerobot_attn.plugin.shards import pass_initial_states
from lerobot_attn.recording.task_progress import Point, Result

_METRICS = {"sum_rewards": "sum_reward", "max_rewards": "max_reward", "successes": "success"}


def results_of(rollout: dict[str, Any]) -> list[Result]:
    """Return what LeRobot's evaluation counts of each episode of a rollout, by its own sums.

    Args:
        rollout: what the rollout has returned; tensors (batch, step).
    """
    import torch

    done = rollout["done"]
    last = done.to(int).argmax(dim=1, keepdim=True)  # the first step at which it was done
    mask = (torch.arange(done.shape[1]) <= last + 1).int()
    rewards = rollout["reward"] * mask
    columns = rewards.sum(dim=1), rewards.amax(dim=1), (rollout["success"] * mask).any(dim=1)
    return [Result(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def random_state() -> str:
    """Return the state of Python's, NumPy's and torch's random numbers as text."""
    from lerobot.utils.random_utils import serialize_rng_state
    from safetensors.torch import save

    return base64.b64encode(save(serialize_rng_state())).decode()


def restore_random_state(text: str) -> None:
    """Restore what `random_state` has returned."""
    from lerobot.utils.random_utils import deserialize_rng_state
    from safetensors.torch import load

    deserialize_rng_state(load(base64.b64decode(text)))


def go_on(call: dict[str, Any], point: Point) -> None:
    """Let a task's call begin behind the episodes that are whole.

    Args:
        call: the arguments of LeRobot's `run_one` by name, with all defaults; they are changed.
        point: where.
    """
    number = len(point.results)
    call["start_seed"] += number
    call["n_episodes"] -= number
    call["max_episodes_rendered"] = max(0, call["max_episodes_rendered"] - number)
    if call["videos_dir"] is not None:  # LeRobot counts a call's videos from 0
        call["videos_dir"] = Path(call["videos_dir"]) / f"from_{number:05d}"
    pass_initial_states(call["env"], number)
    restore_random_state(point.random_state)


def names_its_episodes(call: dict[str, Any]) -> bool:
    """Return whether seeds tell a task's episodes apart, and nothing but their results is wanted of them."""
    return (
        call["start_seed"] is not None and not call["return_episode_data"] and call["recording_dir"] is None
    )


def joined(point: Point, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return a task's metrics with those of the episodes before.

    Args:
        point: behind which the task went on.
        metrics: of the episodes that were rolled out; empty if none were.
    """
    rest = {"video_paths": [], "predicted_video_paths": [], **metrics}
    before = {name: [getattr(r, field) for r in point.results] for name, field in _METRICS.items()}
    before["video_paths"] = [str(video) for video in point.videos]
    return {**rest, **{name: values + rest.get(name, []) for name, values in before.items()}}
