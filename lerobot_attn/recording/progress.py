"""How far an evaluation is whose episodes are recorded, by the stores that are there.

Knows what stores say of themselves. Starts nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lerobot_attn.errors import StoreError
from lerobot_attn.recording.folder import task_folder
from lerobot_attn.store.attributes import read_header
from lerobot_attn.store.evaluation import EVAL_INFO
from lerobot_attn.store.location import present_form
from lerobot_attn.store.schema import EPISODE_SUFFIX


class Progress(NamedTuple):
    """How far an evaluation is.

    Attributes:
        n_complete: episodes that are complete.
        n_expected: of how many; None where the environment alone knows.
        n_successful: of the complete ones.
        missing: numbers of the tasks that lack episodes; None: all that were asked for.
        is_done: whether nothing is missing.
    """

    n_complete: int
    n_expected: int | None
    n_successful: int
    missing: list[int] | None
    is_done: bool

    def __str__(self) -> str:
        """Say it in words."""
        of = "" if self.n_expected is None else f" of {self.n_expected}"
        return f"{self.n_complete}{of} episodes complete, {self.n_successful} successful"


def progress_of(folder: Path, n_episodes: int, tasks: Sequence[tuple[str, int]] | None) -> Progress:
    """Look at an evaluation's stores; reads what each says of itself.

    Args:
        folder: its output folder.
        n_episodes: of each task.
        tasks: group and number of each; None: the environment alone knows.
    """
    own = None if tasks is None else {task_folder(group, number) for group, number in tasks}
    complete = {
        path.name: [0, 0]
        for path in sorted(folder.glob("attention/*"))
        if path.is_dir() and (path.name in own if own is not None else path.name[0] != ".")
    }
    for task, counts in complete.items():
        for index in range(n_episodes):
            success = _success(folder / "attention" / task / f"episode_{index:05d}{EPISODE_SUFFIX}")
            if success is not None:
                counts[0] += 1
                counts[1] += success
    n_complete, n_successful = (sum(counts[i] for counts in complete.values()) for i in (0, 1))
    if tasks is None:
        n_tasks = _n_tasks(folder)
        full = sum(counts[0] == n_episodes for counts in complete.values())
        is_done = n_tasks is not None and n_tasks == full == len(complete)
        return Progress(n_complete, n_tasks and n_tasks * n_episodes, n_successful, None, is_done)
    lacking = [
        number for group, number in tasks if complete.get(task_folder(group, number), [0])[0] < n_episodes
    ]
    missing = sorted(set(lacking))
    return Progress(n_complete, len(tasks) * n_episodes, n_successful, missing, not missing)


def _success(store: Path) -> bool | None:
    """Return whether a complete episode succeeded; None of one that is not there, cut off or damaged."""
    try:
        found = read_header(present_form(store) or store)
    except StoreError:
        return None
    return found.attributes.get("success") is True if found.is_complete else None


def _n_tasks(folder: Path) -> int | None:
    """Return how many tasks a finished evaluation had; None of one that did not finish."""
    try:
        return len(json.loads((folder / EVAL_INFO).read_text(encoding="utf-8"))["per_task"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
