"""What the library found of a run, and the part of it that somebody wants to see.

Pure functions on rows that were read; opens no store and knows no request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from lerobot_attn.errors import ConfigError
from lerobot_attn.explorer.summary import OUTCOMES, Summary

MOST_CHOICES = 100  # tasks or conditions to choose from: a longer list is of no use to anybody
MOST_PROBLEMS = 100  # lines


@dataclass(frozen=True, eq=False)
class Listing:
    """What is under a path.

    Attributes:
        summaries: the episodes that can be opened, in the order of their paths.
        problems: why the others cannot, one line each.
        n_unread: stores that nobody has looked into yet.
    """

    summaries: Sequence[Summary] = ()
    problems: Sequence[str] = ()
    n_unread: int = 0

    @cached_property
    def by_id(self) -> Mapping[str, Summary]:
        """The episodes by their ids."""
        return {summary.id: summary for summary in self.summaries}

    @cached_property
    def overview(self) -> dict[str, Any]:
        """What can be said of all episodes together, as plain JSON values."""
        outcomes = Counter(summary.outcome for summary in self.summaries)
        remarks = dict.fromkeys(str(summary.facts["policy_remark"]) for summary in self.summaries)
        return {
            "n_episodes": len(self.summaries),
            "outcomes": {name: outcomes[name] for name in OUTCOMES},
            "tasks": self._choices("task"),
            "conditions": self._choices("condition_name"),
            "is_changed": any(summary.facts["condition"] for summary in self.summaries),
            "random_weights": any(summary.facts["random_weights"] for summary in self.summaries),
            "policy_remarks": [remark for remark in remarks if remark][:MOST_PROBLEMS],
            **self.unserved,
        }

    @property
    def unserved(self) -> dict[str, Any]:
        """What of the run is not in the table, as plain JSON values."""
        return {
            "damaged": [*self.problems[:MOST_PROBLEMS]],
            "n_damaged": len(self.problems),
            "n_unread": self.n_unread,
        }

    def _choices(self, fact: str) -> list[dict[str, Any]]:
        """Return the values of a fact, each with how many episodes have it; the most frequent of many."""
        counts = Counter(str(summary.facts[fact]) for summary in self.summaries)
        kept = {value for value, _ in counts.most_common(MOST_CHOICES)}
        return [{"name": value, "n": n} for value, n in counts.items() if value in kept]


class Wanted(NamedTuple):
    """Which episodes somebody wants to see, in which order, and which part of them.

    Attributes:
        find: words, each of which must be in what `Summary.words` says. One that is a task's group and number
            (libero_object_3) finds this task alone, and not number 30.
        outcome: one of `OUTCOMES`; None for any.
        task: the instruction; None for any.
        condition: its name; None for any.
        sort: one of `ORDERS`.
        descending: the other way round; what is not known stays last.
        offset: number of the first one, from 0; beyond the end it is the last part that is given.
        limit: how many at most; None for all.
        first: id of the episode that the part begins with, wherever it has moved to. Goes before the offset,
            if the episode is among those that are wanted.
    """

    find: str = ""
    outcome: str | None = None
    task: str | None = None
    condition: str | None = None
    sort: str = "path"
    descending: bool = False
    offset: int = 0
    limit: int | None = None
    first: str | None = None


# Keys to sort by; None, which goes last, where it is not known. "path" is the order of the listing itself.
ORDERS: Mapping[str, Callable[[Summary], Any] | None] = {
    "path": None,
    "task": lambda row: row.facts["task"].casefold() or None,
    "condition": lambda row: row.facts["condition_name"].casefold(),
    "outcome": lambda row: OUTCOMES.index(row.outcome) if row.outcome != "unknown" else None,
    "frames": lambda row: row.facts["n_frames"],
    "inferences": lambda row: row.facts["n_inferences"],
    "size": lambda row: row.facts["stored_bytes"],
}


def wanted_of(asked: Mapping[str, str]) -> Wanted:
    """Return what the parameters of a request ask for, named as in `Wanted`: all, unless they say otherwise.

    Raises:
        ConfigError: one of them is none that there is.
    """
    sort = asked.get("sort", "path")
    _check("sort", sort.removeprefix("-"), ORDERS)
    if "outcome" in asked:
        _check("outcome", asked["outcome"], OUTCOMES)
    return Wanted(
        find=asked.get("find", ""),
        outcome=asked.get("outcome"),
        task=asked.get("task"),
        condition=asked.get("condition"),
        sort=sort.removeprefix("-"),
        descending=sort.startswith("-"),
        offset=_number("offset", asked.get("offset", "0"), 0),
        limit=_number("limit", asked["limit"], 1) if "limit" in asked else None,
        first=asked.get("first"),
    )


def _check(name: str, said: str, known: Collection[str]) -> None:
    if said not in known:
        raise ConfigError(f"{name}: got {said[:40]!r}, expected one of {', '.join(known)}")


def _number(name: str, said: str, least: int) -> int:
    if said.isdecimal() and len(said) <= 9 and int(said) >= least:
        return int(said)
    raise ConfigError(f"{name}: got {said[:40]!r}, expected a whole number from {least} on")


def part(listing: Listing, wanted: Wanted) -> dict[str, Any]:
    """Return the rows that are wanted, and where they stand among those that fit, as plain JSON values."""
    rows = _ordered(_fitting(listing.summaries, wanted), wanted)
    offset = _offset(rows, wanted)
    end = None if wanted.limit is None else offset + wanted.limit
    return {
        "episodes": [row.to_dict() for row in rows[offset:end]],
        "offset": offset,
        "n_found": len(rows),
    }


def _fitting(rows: Sequence[Summary], wanted: Wanted) -> list[Summary]:
    words = wanted.find.casefold().split()
    names = {row.task_name for row in rows} if words else set()
    return [
        row
        for row in rows
        if (wanted.outcome is None or row.outcome == wanted.outcome)
        and (wanted.task is None or row.facts["task"] == wanted.task)
        and (wanted.condition is None or row.facts["condition_name"] == wanted.condition)
        and all(row.task_name == word if word in names else word in row.words for word in words)
    ]


def _ordered(rows: list[Summary], wanted: Wanted) -> list[Summary]:
    key = ORDERS[wanted.sort]
    if key is None:
        return rows[::-1] if wanted.descending else rows
    known = [(value, row) for row in rows if (value := key(row)) is not None]
    known.sort(key=lambda pair: pair[0], reverse=wanted.descending)  # equal ones stay in the order of paths
    return [*(row for _, row in known), *(row for row in rows if key(row) is None)]


def _offset(rows: Sequence[Summary], wanted: Wanted) -> int:
    if wanted.first is not None:
        place = next((place for place, row in enumerate(rows) if row.id == wanted.first), None)
        if place is not None:
            return place
    if wanted.offset < len(rows) or wanted.limit is None:
        return min(wanted.offset, len(rows))
    return max(0, len(rows) - 1) // wanted.limit * wanted.limit


def news(before: Listing, now: Listing) -> dict[str, Any] | None:
    """Return what has changed between two looks, as plain JSON values; None if nothing has."""
    if now is before:
        return None
    changed = [row for row in now.summaries if before.by_id.get(row.id) != row]
    removed = [id_ for id_ in before.by_id if id_ not in now.by_id]
    unserved = (now.n_unread, now.problems)
    if not changed and not removed and unserved == (before.n_unread, before.problems):
        return None
    return {
        "changed": [row.to_dict() for row in changed],
        "grown": [row.id for row in changed if row.id in before.by_id],
        "removed": removed,
        **now.unserved,
    }
