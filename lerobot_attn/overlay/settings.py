"""What an overlay shows, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lerobot_attn.analysis.spatial import Normalisation
from lerobot_attn.errors import ConfigError
from lerobot_attn.figures.look import OneMapSettings
from lerobot_attn.settings import check_flag, check_numbers, check_one_map, check_ranges


@dataclass(frozen=True, kw_only=True)
class OverlaySettings(OneMapSettings):
    """Settings of `lerobot-attn overlay`; labels as `analysis.Where` takes them, or as text: "17", "0-99".

    A frame shows one map, so layer, denoise step, head and query are each one number or a mean; camera 'all'
    shows every camera in a grid.
    """

    # Show the language model's attention among the prefix instead, from this token of it: 'last', 'state',
    # 'mean', or a word of the task by its text or number. Layers are then the language model's.
    prefix_query: str | int | None = None
    normalisation: Normalisation = "episode"
    alpha: float = 0.6
    # Height of a view, pixels. Default: the camera's; 224 at most for a GIF.
    size: int | None = None
    # Outline the objects of the scene by their role, if the episode has masks.
    outlines: bool = True
    # Frames: 'all', a number, a list or a range as '40-80'; shown in the episode's order.
    frames: Any = "all"

    _choices: ClassVar[tuple[str, ...]] = (*OneMapSettings._choices, "frames")

    def __post_init__(self) -> None:
        """Read choices given as text, and check what can be checked without an episode.

        Raises:
            ConfigError: a value is out of range, of the wrong type, or asks for several maps at once.
        """
        super().__post_init__()
        check_one_map("query", self.query, ("frame", "executed", "mean"))
        if not isinstance(self.camera, str | None):
            raise ConfigError(f"camera: got {self.camera!r}, expected one camera's name or 'all'")
        self._set("frames", check_numbers("frames", self.frames, "all"))
        self._check_prefix_query()
        check_flag(self, "outlines")
        if self.size is not None:
            check_ranges(self, {"size": (32, 4320)})
            if self.size != int(self.size):
                raise ConfigError(f"size: got {self.size!r}, expected a whole number of pixels")

    def _check_prefix_query(self) -> None:
        """Refuse what the prefix pass does not have."""
        if self.prefix_query is None:
            return
        if isinstance(self.prefix_query, bool) or not isinstance(self.prefix_query, str | int):
            raise ConfigError(
                f"prefix_query: got {self.prefix_query!r}, expected last, state, mean, or a word of the task"
            )
        for name, none in (("query", "frame"), ("denoise_step", None), ("exclude", ())):
            if getattr(self, name) != none:
                raise ConfigError(
                    f"{name}: got {getattr(self, name)!r} with prefix_query, which shows the prefix's own "
                    f"attention; leave {name} out"
                )


@dataclass(frozen=True, kw_only=True)
class RerunSettings(OneMapSettings):
    """Settings of `lerobot-attn export-rerun`; every camera is shown unless one is named."""

    normalisation: Normalisation = "episode"
    alpha: float = 0.6
    # Quality of the cameras' frames as JPEG, 1 to 95.
    quality: int = 85

    _ranges: ClassVar[dict[str, tuple[float, float]]] = {"quality": (1, 95)}

    def __post_init__(self) -> None:
        """Read choices given as text, and check what can be checked without an episode.

        Raises:
            ConfigError: a value is out of range, of the wrong type, or asks for several maps at once.
        """
        super().__post_init__()
        check_one_map("query", self.query, ("frame", "executed", "mean"))
        if not isinstance(self.camera, str | None):
            raise ConfigError(f"camera: got {self.camera!r}, expected one camera's name or 'all'")
