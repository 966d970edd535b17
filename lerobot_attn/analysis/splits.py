"""The two groups that a comparison is of, out of one run: by outcome, or by what was done to the policy.

Looks at what episodes say of themselves; opens no array.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lerobot_attn.analysis.sources import Source, condition_of, sources_of, success_of
from lerobot_attn.errors import SelectionError

BASELINE = "baseline"


class BySuccess[S: Source](NamedTuple):
    """Episodes that solved their task, and those that did not."""

    successes: list[S]
    failures: list[S]


class ByCondition[S: Source](NamedTuple):
    """Episodes of two conditions; where one of them is the baseline, it is `a`."""

    a: list[S]
    b: list[S]


def split_by_success[S: Source](episodes: Iterable[S]) -> BySuccess[S]:
    """Split episodes by whether they solved their task; interrupted ones, which do not know, are left out.

    Raises:
        SelectionError: one side would be empty.
    """
    found = sources_of(episodes, "split_by_success")
    successes = [source for source in found if success_of(source) is True]
    failures = [source for source in found if success_of(source) is False]
    if not successes or not failures:
        unknown = len(found) - len(successes) - len(failures)
        raise SelectionError(
            f"split_by_success needs both: got {len(successes)} successes, {len(failures)} failures and "
            f"{unknown} interrupted episodes"
        )
    return BySuccess(successes, failures)


def split_by_condition[S: Source](
    episodes: Iterable[S], names: Sequence[str] | None = None
) -> ByCondition[S]:
    """Split episodes by what was done to the policy in them.

    Args:
        episodes: of `open_run`, or datasets.
        names: of the two conditions, a's and b's; None: the two that there are, the baseline first.

    Raises:
        SelectionError: there are not two conditions and none were named, or no episode of one of them.
    """
    found: dict[str, list[S]] = {}
    for source in sources_of(episodes, "split_by_condition"):
        found.setdefault(condition_of(source), []).append(source)
    there = ", ".join(f"{name} ({len(found[name])})" for name in sorted(found))
    if names is None:
        names = sorted(found, key=lambda name: (name != BASELINE, name))
        if len(names) != 2:
            raise SelectionError(
                f"conditions: the episodes are of {there}; expected two conditions, or the names of two"
            )
    if len(names) != 2 or names[0] == names[1] or not {*names} <= {*found}:
        raise SelectionError(f"conditions: got {', '.join(names)}, expected two of {there}")
    return ByCondition(found[names[0]], found[names[1]])
