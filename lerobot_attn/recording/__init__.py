"""Recording episodes, whatever loop drives them. Left of the store: nothing here reads one back.

Importing the package loads neither torch nor LeRobot: names are resolved when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["LoopEpisode", "LoopRecording", "record_episodes"]

if TYPE_CHECKING:
    from lerobot_attn.recording.loop import LoopRecording, record_episodes
    from lerobot_attn.recording.loop_episode import LoopEpisode


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lerobot_attn.recording import loop

    return getattr(loop, name)
