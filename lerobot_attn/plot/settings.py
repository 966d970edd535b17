"""Settings of `lerobot-attn plot`. Knows no episode and draws nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lerobot_attn.errors import ConfigError
from lerobot_attn.figures.look import LookSettings
from lerobot_attn.settings import check_flag, is_number, parse_choice

PEAK = "peak"


@dataclass(frozen=True, kw_only=True)
class PlotSettings(LookSettings):
    """Settings of `lerobot-attn plot`; labels as `analysis.Where` takes them, or as text: "0,4,9", "0-3".

    Unset (None) means what the kind of picture is usually looked at with.
    """

    query: Any = None
    # Frames: a number, a list, or 'all'. Default: every frame for evolution and timeline; else the frame
    # whose image the middle frame's inference saw.
    frames: Any = None
    # Cameras, by name or the end of it. Default: all that showed an image.
    cameras: Any = None
    # Layers: a number (negative from the last), a list, 'all' or 'mean'. Default: those with full maps. For
    # kinds cross-modal and vision: of the language model, and of the vision tower.
    layers: Any = None
    # Denoise steps, likewise. Default: the last one that is stored; the policy's last yields the action.
    denoise_steps: Any = None
    # Heads: a number, a list, 'all', 'mean' or 'max'. Default: mean; all for kind heads.
    heads: Any = None
    # A word of the task, by its text or number, for kind cross-modal. Default: all words.
    word: Any = None
    # For kind vision: whose attention is shown, as ROW,COLUMN in the vision tower's grid, ranges for an area
    # (12-15,20-23), or 'peak': where the actions look most, on each camera. Default: peak.
    patch: Any = None
    # For kinds image and combined: outline the objects of the scene by their role, if the episode has masks.
    outlines: bool = True
    # Width of the figure, inches: 3.4 is a column of a paper, 7 a page.
    width: float = 7.0
    # Panels in a row.
    columns: int = 6
    # Dots per inch of PNG files.
    dpi: int = 200

    _choices: ClassVar[tuple[str, ...]] = (
        *LookSettings._choices,
        *("frames", "layers", "denoise_steps", "heads"),
    )
    _ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "width": (2, 30),
        "columns": (2, 40),
        "dpi": (30, 1200),
    }

    def __post_init__(self) -> None:
        """Read choices given as text, and check what can be checked without an episode.

        Raises:
            ConfigError: a value is out of range or of the wrong type.
        """
        super().__post_init__()
        check_flag(self, "outlines")
        if isinstance(self.cameras, str):
            names = [name.strip() for name in self.cameras.split(",")]
            self._set("cameras", None if self.cameras == "all" else names)
        if self.patch not in (None, PEAK):
            self._set("patch", _area(self.patch))


def _area(patch: Any) -> tuple[Any, Any]:
    """Read a patch, or an area of patches: (row, column), each a number or a list."""
    try:
        sides = patch.split(",") if isinstance(patch, str) else list(patch)
        row, column = (parse_choice(side) for side in sides)
        found = [number for side in (row, column) for number in np.atleast_1d(side).tolist()]
    except (ConfigError, TypeError, ValueError):
        found = []
    if not found or not all(is_number(number) and number >= 0 for number in found):
        raise ConfigError(
            f"patch: got {patch!r}, expected ROW,COLUMN as 12,20, an area as 12-15,20-23, or {PEAK!r}"
        )
    return row, column
