"""One episode's row in the run's table: which recording it is, how long, and how it ended."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lerobot_attn import __version__
from lerobot_attn.explorer.facts import identity
from lerobot_attn.explorer.values import plain
from lerobot_attn.store.index import IndexRow
from lerobot_attn.store.reader import Episode

OUTCOMES = ("success", "failure", "incomplete", "unknown")


@dataclass(frozen=True)
class Summary:
    """One episode's row in the run's table.

    Attributes:
        id: names the episode in requests.
        version: changes when another recording takes the episode's place, not when it grows.
        facts: its task, success and so on, as plain JSON values.
    """

    id: str
    version: str
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"id": self.id, "version": self.version, **self.facts}

    @cached_property
    def outcome(self) -> str:
        """How it ended, one of `OUTCOMES`; unknown where the recording does not say."""
        if not self.facts["complete"]:
            return "incomplete"
        return {True: "success", False: "failure"}.get(self.facts["success"], "unknown")

    @cached_property
    def task_name(self) -> str:
        """Group and number of the task, in one case."""
        return f"{self.facts['task_group']}_{self.facts['task_id']}".casefold()

    @cached_property
    def words(self) -> str:
        """What a search looks through, in one case: name, task, condition, id and outcome."""
        names = ("task_group", "task_id", "task", "condition", "condition_name")
        said = [self.facts[name] for name in names]
        said += [f"episode {self.facts['episode']}", self.id, self.outcome]
        return " ".join(str(word) for word in said if word is not None).casefold()


def summary_of(id_: str, episode: Episode) -> Summary:
    """Return an episode's row in the run's table; looks at the size of each of its files."""
    facts = {
        **identity(episode),
        "stored_bytes": _stored_bytes(episode),
        "camera": next(iter(episode.videos), None),
    }
    return Summary(id_, version_of(episode), facts)


def summary_from_index(id_: str, row: IndexRow) -> Summary | None:
    """Return the same as `summary_of` from a row of the run's index; opens no store.

    Args:
        id_: of the episode.
        row: of a store on this machine.

    Returns:
        None where only the store itself can tell which camera has a video.
    """
    table, camera = row.table, row.camera
    if camera is None or (camera and not _is_video_beside(table.path, row.video)):
        return None
    facts = {
        "task": table.task,
        "task_group": plain(table.task_group),
        "task_id": plain(table.task_id),
        "episode": plain(table.episode),
        "success": table.success,
        "complete": table.complete,
        "random_weights": row.random_weights,
        "policy_remark": row.policy_remark,
        "condition": row.condition_text,
        "n_frames": table.frames,
        "n_inferences": table.inferences,
        "condition_name": table.condition,
        "stored_bytes": table.bytes,
        "camera": camera or None,
    }
    return Summary(id_, _version(row.created, table.task, row.seed, table.episode), facts)


def version_of(episode: Episode) -> str:
    """Return what tells this recording from another one in its place, however far it has grown.

    The package's version is in it: what another one answered is not what this one answers.
    """
    said = episode.header
    return _version(said.created, said.task, said.seed, said.attributes.get("episode_index"))


def _version(*told: Any) -> str:
    return hashlib.sha256(repr([__version__, *told]).encode()).hexdigest()[:12]


def _is_video_beside(store: str, name: str | None) -> bool:
    """Return whether a store's own folder has such a video, and no link in its place."""
    if name is None or Path(name).suffix != ".mp4":
        return False
    try:
        return stat.S_ISREG(Path(store).with_name(name).lstat().st_mode)
    except (OSError, ValueError):  # not there; a path rather than a name
        return False


def _stored_bytes(episode: Episode) -> int:
    try:
        return episode.stored_bytes()
    except FileNotFoundError:  # its recording renamed a file between two looks at it
        return episode.stored_bytes()
