"""Settings of `lerobot-attn plot`. Knows no episode and draws nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lerobot_attn.figures.look import LookSettings


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
    # Layers: a number (negative from the last), a list, 'all' or 'mean'. Default: those with full maps.
    layers: Any = None
    # Denoise steps, likewise. Default: the last one that is stored; the policy's last yields the action.
    denoise_steps: Any = None
    # Heads: a number, a list, 'all', 'mean' or 'max'. Default: mean; all for kind heads.
    heads: Any = None
    # A word of the task, by its text or number, for kind cross-modal. Default: all words.
    word: Any = None
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
        if isinstance(self.cameras, str):
            names = [name.strip() for name in self.cameras.split(",")]
            self._set("cameras", None if self.cameras == "all" else names)
