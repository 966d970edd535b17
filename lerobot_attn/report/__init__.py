"""Findings as files: figures, tables and a page of text in one folder.

    write_report([failed], [solved], "report")   # Python side of `lerobot-attn compare A B -o report`
    write_grounding(open_run("out"), "report")   # of `lerobot-attn ground RUN -o report`

The numbers are those of `analysis`; the drawing is in `figures`, the videos in `overlay`.
"""

from lerobot_attn.report.comparison import (
    CompareSettings,
    Comparison,
    compare_groups,
    comparison_figure,
    side_by_side,
    write_report,
)
from lerobot_attn.report.effects import EffectsSettings, find_effects, write_effects
from lerobot_attn.report.grounding import Grounded, GroundSettings, ground_run
from lerobot_attn.report.grounding_page import write_grounding

__all__ = [
    "CompareSettings",
    "Comparison",
    "EffectsSettings",
    "GroundSettings",
    "Grounded",
    "compare_groups",
    "comparison_figure",
    "find_effects",
    "ground_run",
    "side_by_side",
    "write_effects",
    "write_grounding",
    "write_report",
]
