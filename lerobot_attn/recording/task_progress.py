"""How far a task's rollouts have come, so that a run that was interrupted goes on behind them.

A small file beside the task's stores, written after each batch: what each episode came to, and the state of
the random numbers behind the batch. With that state the next episode draws the noise that it would have drawn
without the interruption. Which episodes are whole is for others to say.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lerobot_attn.store.files import replace_json

logger = logging.getLogger(__name__)

FILE = ".progress.json"
# An episode may be written to its end only while the next batches run.
_N_STATES = 8


@dataclass(frozen=True)
class Result:
    """What an evaluation counts of an episode.

    Attributes:
        sum_reward, max_reward: over its frames.
        success: whether it succeeded.
    """

    sum_reward: float
    max_reward: float
    success: bool


@dataclass(frozen=True)
class Point:
    """Where a task may go on.

    Attributes:
        results: of the episodes before it, in their order.
        random_state: of the random numbers there, as it was given to `TaskProgress.add`.
        videos: that the evaluation has made of them.
    """

    results: tuple[Result, ...]
    random_state: str
    videos: tuple[Path, ...] = ()


class TaskProgress:
    """The progress of one task, in its folder.

    Args:
        folder: the task's folder.
        first_episode: number of the first episode.
    """

    def __init__(self, folder: Path, first_episode: int):
        self._file = folder / FILE
        self._first = first_episode
        self._results: list[Result] = []  # from the first episode on, without a gap
        self._states: dict[int, str] = {}  # number of results → the state behind so many

    def read(self) -> None:
        """Take over what an earlier run has left; nothing, if that cannot be read or began elsewhere."""
        try:
            found: dict[str, Any] = json.loads(self._file.read_text())
            results = [Result(**values) for values in found["results"]]
            states = {int(number): str(state) for number, state in found["random_states"].items()}
            first = found["first_episode"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.info("%s: cannot be read (%s); its episodes are rolled out again", self._file, error)
            return
        if first == self._first:
            self._results, self._states = results, states

    def point(self, n_whole: int, n_episodes: int) -> Point | None:
        """Return the latest point to go on at, or None.

        Args:
            n_whole: how many episodes, from the first one on, are whole.
            n_episodes: how many are evaluated. A last batch may have rolled out more, which do not count.
        """
        known = sorted(n for n in self._states if n <= len(self._results))
        if n_whole >= n_episodes:
            found = [n for n in known if n >= n_episodes][:1] or known[-1:]
        else:
            found = [n for n in known if n <= n_whole][-1:]
        if not found:
            return None
        (n,) = found
        return Point(tuple(self._results[: min(n, n_episodes)]), self._states[n])

    def go_on_behind(self, n_episodes: int) -> None:
        """Forget what was known of later episodes, which are rolled out now."""
        self._results = self._results[:n_episodes]
        self._states = {n: state for n, state in self._states.items() if n <= n_episodes}

    def add(self, results: Sequence[Result], random_state: str) -> None:
        """A batch was rolled out: write down what it came to.

        Args:
            results: of its episodes, which follow those before.
            random_state: of the random numbers behind it.
        """
        self._results += results
        self._states[len(self._results)] = random_state
        self._states = dict(sorted(self._states.items())[-_N_STATES:])
        document = {
            "first_episode": self._first,
            "results": [asdict(result) for result in self._results],
            "random_states": self._states,
        }
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            replace_json(self._file, document)
        except OSError as error:  # as of a full disk: an evaluation does not end for this
            logger.info("%s: cannot be written (%s)", self._file, error.strerror)
