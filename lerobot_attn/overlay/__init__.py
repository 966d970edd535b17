"""Camera frames with the heatmap over them: beside the pure map as arrays, MP4 and GIF, and in Rerun.

    write_overlay(open_episode("….zarr"), "overlay.mp4")
    for frame in overlay_frames(open_episode("….zarr"), OverlaySettings(layer=17)):
        …  # (height, width, 3) uint8
    export_rerun(open_episode("….zarr"), "episode.rrd")

Python side of `lerobot-attn overlay` and `export-rerun`. Which attention is meant is `analysis`'s business;
this only paints.
"""

from lerobot_attn.figures.scale import ColourScale
from lerobot_attn.overlay.files import FORMATS, WrittenOverlay, overlay_frames, write_overlay
from lerobot_attn.overlay.film import resized
from lerobot_attn.overlay.rerun import export_rerun
from lerobot_attn.overlay.settings import OverlaySettings, RerunSettings
from lerobot_attn.sizes import Progress

__all__ = [
    "FORMATS",
    "ColourScale",
    "OverlaySettings",
    "Progress",
    "RerunSettings",
    "WrittenOverlay",
    "export_rerun",
    "overlay_frames",
    "resized",
    "write_overlay",
]
