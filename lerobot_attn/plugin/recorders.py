"""What the front door records with: `lerobot_attn.recording`, and a look at what the policy is fed.

Adds nothing but the checks of each episode's first observation. Records nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from lerobot_attn.plugin.feeding.quiet import QuietChecks
from lerobot_attn.recording import loop, replay

__all__ = ["record_dataset", "record_episodes"]


def _checked[**P, R](record: Callable[P, R]) -> Callable[P, R]:
    @wraps(record)
    def checked_record(*args: P.args, **kwargs: P.kwargs) -> R:
        kwargs.setdefault("checks", QuietChecks().look)
        return record(*args, **kwargs)

    return checked_record


record_dataset = _checked(replay.record_dataset)
record_episodes = _checked(loop.record_episodes)
