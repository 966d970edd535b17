"""Recording episodes, whatever loop drives them. Left of the store: nothing here reads one back.

Importing the package loads neither torch nor LeRobot: names are resolved when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "LoopEpisode": "loop_episode",
    "LoopRecording": "loop",
    "VideoFrames": "video_frames",
    "record_dataset": "replay",
    "record_episodes": "loop",
}
__all__ = ["LoopEpisode", "LoopRecording", "VideoFrames", "record_dataset", "record_episodes"]

if TYPE_CHECKING:
    from lerobot_attn.recording.loop import LoopRecording, record_episodes
    from lerobot_attn.recording.loop_episode import LoopEpisode
    from lerobot_attn.recording.replay import record_dataset
    from lerobot_attn.recording.video_frames import VideoFrames


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
