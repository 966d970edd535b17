"""Matplotlib figures of analysis results: arrays in, a `Figure` out.

Reads no file, shows nothing, leaves matplotlib's settings as they are.
"""

from lerobot_attn.figures.canvas import Caption, check_format, save_figure
from lerobot_attn.figures.combined import combined_figure
from lerobot_attn.figures.comparison import comparison_figure
from lerobot_attn.figures.doses import dose_figure
from lerobot_attn.figures.effects import effects_figure
from lerobot_attn.figures.images import Group, Panel, cross_modal_figure, image_grid
from lerobot_attn.figures.lines import evolution_figure, timeline_figure
from lerobot_attn.figures.matrices import action_figure
from lerobot_attn.figures.text import text_figure

__all__ = [
    "Caption",
    "Group",
    "Panel",
    "action_figure",
    "check_format",
    "combined_figure",
    "comparison_figure",
    "cross_modal_figure",
    "dose_figure",
    "effects_figure",
    "evolution_figure",
    "image_grid",
    "save_figure",
    "text_figure",
    "timeline_figure",
]
