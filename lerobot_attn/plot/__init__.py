"""Figures of an episode: reads what a kind of picture needs, and no more.

    figure = plot(open_episode("….zarr"), "image", PlotSettings(frames=[12], layers=[16, 17]))

Python side of `lerobot-attn plot`. The analysis is in `analysis`, the drawing in `figures`.
"""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from lerobot_attn.analysis.sinks import keys_to_exclude
from lerobot_attn.errors import ConfigError, LerobotAttnError, StoreError, first_line
from lerobot_attn.plot.cameras import camera_pictures, on_image
from lerobot_attn.plot.kinds import KINDS
from lerobot_attn.plot.settings import PlotSettings
from lerobot_attn.store.reader import Episode

__all__ = ["KINDS", "PlotSettings", "camera_pictures", "on_image", "plot"]


def plot(episode: Episode, kind: str, settings: PlotSettings | None = None) -> Figure:
    """Draw a figure of an episode.

    Where a camera's video is missing, its maps lie on a blank frame, and the caption says why.

    Args:
        episode: from `open_episode`.
        kind: one of `KINDS`.
        settings: what to draw, and how.

    Raises:
        ConfigError: no such kind.
        SelectionError: a frame, layer, camera, word … that the episode does not hold.
        StoreError: the episode is empty or damaged.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if episode.n_frames == 0:
        raise StoreError(f"{episode.path}: holds no frames yet; expected one at least")
    settings = settings or PlotSettings()
    try:
        keys = keys_to_exclude(settings.exclude, [episode])
        draw = KINDS[kind](episode, replace(settings, exclude=keys))
    except LerobotAttnError:
        raise
    except (RuntimeError, ValueError, OSError) as error:  # what codecs raise for damaged chunks
        raise StoreError(
            f"{episode.path}: cannot be drawn ({first_line(error)}); lerobot-attn verify tells what is "
            "damaged"
        ) from error
    # Everything is read: what goes wrong from here on is no damage of the store.
    return draw()
