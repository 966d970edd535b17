"""What a person chooses when looking at maps: which ones, and in which colours.

The settings of `plot`, `overlay` and `report` build on these. Knows no episode and draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lerobot_attn.analysis.select import Where
from lerobot_attn.analysis.spatial import NORMALISATIONS, Interpolation, Normalisation
from lerobot_attn.errors import ConfigError
from lerobot_attn.figures.scale import colormap
from lerobot_attn.settings import (
    Renaming,
    check_choice,
    check_numbers,
    check_one_map,
    check_ranges,
    parse_choice,
)


@dataclass(frozen=True, kw_only=True)
class LookSettings(metaclass=Renaming):
    """How maps are chosen and coloured; labels as `analysis.Where` takes them, or as text: "17", "0-99"."""

    # Action token: a number, 'frame' (the one executed at the frame), 'executed' or 'mean'.
    query: Any = "frame"
    # Key tokens to exclude, e.g. attention sinks; or 'sinks' to find them first. The rest is rescaled to 1.
    exclude: Any = ()
    # share (of all attention), image (share within the image), frame (of the largest patch), episode (share
    # of all attention, one colour range for all frames). The range is that of what is shown with share and
    # image.
    normalisation: Normalisation = "share"
    # Where the colour range ends: this percentile of the patches that the range is of; 100 is the largest.
    # Below it a few bright patches do not darken the rest, and the colour bar gets an arrow; 99.9 keeps the
    # range of a single bright patch among 16 × 16.
    clip: float = 99.9
    # A matplotlib colour map for images.
    colormap: str = "inferno"
    # Opacity of the largest value over the image, 0 to 1.
    alpha: float = 0.7
    # nearest (a patch is a square) or linear (blended between patch centres).
    interpolation: Interpolation = "nearest"

    # Former names of fields.
    renamed: ClassVar[dict[str, str]] = {"leave_out": "exclude"}
    # Fields that may be given as text.
    _choices: ClassVar[tuple[str, ...]] = ("query", "exclude")
    # Of the fields that are added to these: the limits of numbers, and the words that one may be.
    _ranges: ClassVar[dict[str, tuple[float, float]]] = {}
    _words: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        """Read choices given as text, and check what can be checked without an episode.

        Raises:
            ConfigError: a value is out of range or of the wrong type.
        """
        for name in self._choices:
            self._set(name, parse_choice(getattr(self, name)))
        self._set("exclude", check_numbers("exclude", self.exclude, "sinks"))
        check_choice(self, "normalisation", NORMALISATIONS)
        if self.interpolation not in ("nearest", "linear"):
            raise ConfigError(f"interpolation: got {self.interpolation!r}, expected nearest or linear")
        check_ranges(self, {"clip": (50, 100), "alpha": (0, 1), **self._ranges})
        for name, words in self._words.items():
            check_choice(self, name, words)
        if not isinstance(self.colormap, str):
            raise ConfigError(f"colormap: got {self.colormap!r}, expected a matplotlib name, e.g. inferno")
        colormap(self.colormap)

    @property
    def leave_out(self) -> Any:
        """Deprecated name of `exclude`."""
        return self.exclude

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class OneMapSettings(LookSettings):
    """Settings of what shows one map of each frame: layer, step and head are each one number or a mean."""

    # Camera, by name or the end of it. Default: the first.
    camera: str | None = None
    # Layer: a number (negative from the last) or 'mean'. Default: the last one that the store holds.
    layer: int | Literal["mean"] | None = None
    # Denoise step: likewise; the policy's last one yields the action.
    denoise_step: int | Literal["mean"] | None = None
    # Head: a number, 'mean' or 'max'.
    head: int | Literal["mean", "max"] = "mean"
    # Frames per second of a video. Default: the episode's.
    fps: float | None = None

    _choices: ClassVar[tuple[str, ...]] = ("query", "exclude", "layer", "denoise_step", "head")

    def __post_init__(self) -> None:
        """Check these too, before what all pictures share.

        Raises:
            ConfigError: a value is out of range, of the wrong type, or asks for several maps at once.
        """
        super().__post_init__()
        for name, words in (("layer", ("mean",)), ("denoise_step", ("mean",)), ("head", ("mean", "max"))):
            if getattr(self, name) is not None:
                check_one_map(name, getattr(self, name), words)
        if self.fps is not None:
            check_ranges(self, {"fps": (0.1, 240)})

    @property
    def where(self) -> Where:
        """What to look at, for `analysis`."""
        return {
            "layer": self.layer,
            "denoise_step": self.denoise_step,
            "head": self.head,
            "query": self.query,
            "exclude": self.exclude,
        }
