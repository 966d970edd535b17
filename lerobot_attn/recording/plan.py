"""What is known of an episode before, while and after it is recorded. Plain values, for any thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class EpisodePlan:
    """What is known of an episode before it starts.

    Attributes:
        index: its number within the task, as the evaluation's videos count.
        path: where its store goes.
        fps: frames per second of its videos.
        attributes: what else its store says of itself (task ids, seed, versions, policy, …).
        when_complete: called with the store once it is complete, on the writer's thread.
    """

    index: int
    path: Path
    fps: float
    attributes: Mapping[str, Any]
    when_complete: Callable[[Path], None] | None = None

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"{self.path.parent.name}/{self.path.name}"


@dataclass(frozen=True)
class EpisodeResult:
    """What became of an episode: saved completely, or why not."""

    index: int
    path: Path | None  # None: there is no store
    reason: str | None  # None: saved and complete
    failed: bool = False  # the reason is a fault, not a choice
    interrupted: bool = False  # the loop raised inside the episode, and nothing else went wrong
    kept: bool = False  # an earlier run of the same evaluation had recorded it
    n_frames: int = 0
    n_inferences: int = 0
    raw_bytes: int = 0


@dataclass(frozen=True)
class DimensionNames:
    """Names of the state's and the action's dimensions, where somebody knows them."""

    state: Sequence[str] = ()
    action: Sequence[str] = ()

    def labels(self, kind: str, count: int) -> np.ndarray:
        """Return (count,) names, numbered ones if the known names do not fit."""
        known = self.state if kind == "state" else self.action
        names = known if len(known) == count else [f"{kind}_{i}" for i in range(count)]
        return np.array(names, dtype=object)


@dataclass(frozen=True)
class Known:
    """What the loop knows of an episode when it hands an inference over; the first one's makes the store.

    Attributes:
        task: the instruction.
        state_dim: numbers in the robot's state; None without a state.
        names: names of the state's and the action's dimensions.
        has_reward: whether frames come with a reward.
        has_success: whether frames say if the task is solved.
        more: names of the other optional arrays that frames and inferences come with.
    """

    task: str
    state_dim: int | None
    names: DimensionNames
    has_reward: bool = True
    has_success: bool = True
    more: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Ending:
    """How an episode ended, as the loop's thread saw it.

    Attributes:
        ended_by: what ended it; None if it was interrupted.
        interrupted_by: the loop's own exception, as one line.
        success: whether it succeeded, where the frames do not say.
        discarded_by: who does not want the episode, which is removed; None if it is wanted.
        attributes: what else the store says of itself.
    """

    ended_by: str | None
    interrupted_by: str | None = None
    success: bool | None = None
    discarded_by: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
