"""What a replay reads: episodes of frames, each an observation that a policy is asked about.

Knows neither LeRobot nor files; `dataset.py` and `video_frames.py` are two kinds of footage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from lerobot_attn.store.references import Clip


@dataclass(frozen=True)
class FootageEpisode:
    """One episode's numbers, without its pictures; rows are frames.

    Attributes:
        index: its number in the footage.
        tasks: (frame,) the instruction of each frame.
        task_id: number of its first frame's task.
        arrays: array of the store → (frame, …): `timestamp`, `frame_index`, `episode_index` and `task_index`
            always; `action`, `state`, `reward` and `success` where they were recorded.
    """

    index: int
    tasks: Sequence[str]
    task_id: int
    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.tasks)


@dataclass(frozen=True)
class FootageFeatures:
    """What footage has, under its own names.

    Attributes:
        cameras: names of the cameras.
        shapes: feature without pictures → shape of one frame, e.g. {"observation.state": (8,)}.
        state_names: names of the state's dimensions, or none.
        action_names: names of the action's dimensions, or none.
    """

    cameras: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()


class Footage(Protocol):
    """Recorded observations. One thread reads them: decoders of videos are not shared."""

    @property
    def group(self) -> str:
        """The first part of the name of its stores' folders."""

    @property
    def said(self) -> Mapping[str, Any]:
        """What every store says of where its frames come from: plain values."""

    @property
    def dataset(self) -> Mapping[str, Any] | None:
        """The data set to join with: `repo_id`, `root` and `revision`; None without one."""

    @property
    def fps(self) -> float:
        """Frames per second of the videos beside the stores."""

    @property
    def features(self) -> FootageFeatures:
        """What each frame has."""

    @property
    def is_whole(self) -> bool:
        """Whether what a policy needs must be there; otherwise what is missing is made up, and said."""

    @property
    def every(self) -> int | None:
        """Ask at every so many frames, unless told otherwise; None: at chunk starts."""

    def choose(self, episodes: Sequence[int] | None) -> list[int]:
        """Return the numbers of the episodes that are replayed, ascending, and make them ready to be read.

        Raises:
            ConfigError: one does not exist, or there is none.
        """

    def episode(self, index: int) -> FootageEpisode:
        """Read an episode's numbers.

        Raises:
            ConfigError: they contradict each other.
        """

    def observation(self, index: int, frame: int) -> dict[str, Tensor]:
        """Read one frame's observation: feature → tensor without a batch axis.

        Pictures are (3, height, width) float32 in [0, 1].
        """

    def check_clips(self, cameras: Sequence[str]) -> None:
        """Check that a store can point to what cameras showed.

        Raises:
            ConfigError: it cannot.
        """

    def clips(self, index: int, cameras: Sequence[str]) -> dict[str, Clip]:
        """Return which part of which file shows an episode, of each camera."""

    def pictures(self, index: int, frame: int, cameras: Sequence[str]) -> dict[str, Tensor]:
        """Read what cameras showed at one frame: (3, height, width) float32 in [0, 1] each."""
