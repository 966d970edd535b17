"""Findings as files: figures, tables and a page of text in one folder.

    write_report([failed], [solved], "report")   # Python side of `lerobot-attn compare A B -o report`

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

__all__ = [
    "CompareSettings",
    "Comparison",
    "EffectsSettings",
    "compare_groups",
    "comparison_figure",
    "find_effects",
    "side_by_side",
    "write_effects",
    "write_report",
]
