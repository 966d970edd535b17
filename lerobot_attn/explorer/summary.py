"""One episode's row in the run's table: which recording it is, how long, and how it ended."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lerobot_attn import __version__
from lerobot_attn.explorer.facts import identity
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
        "condition_name": str(episode.condition.name),
        "stored_bytes": _stored_bytes(episode),
        "camera": next(iter(episode.videos), None),
    }
    return Summary(id_, version_of(episode), facts)


def version_of(episode: Episode) -> str:
    """Return what tells this recording from another one in its place, however far it has grown.

    The package's version is in it: what another one answered is not what this one answers.
    """
    attributes = episode.attributes
    told = [attributes.get(name) for name in ("created", "task", "seed", "episode_index")]
    return hashlib.sha256(repr([__version__, *told]).encode()).hexdigest()[:12]


def _stored_bytes(episode: Episode) -> int:
    try:
        return episode.stored_bytes()
    except FileNotFoundError:  # its recording renamed a file between two looks at it
        return episode.stored_bytes()
