"""Which of thousands of stores to look at now: those that change, each time; all of them, in turn.

Knows names and the clock alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

_ROUND_S = 4.0  # seconds in which each is looked at once, whoever asks how often
_AT_LEAST = 200  # as many at once take no time worth saving
_LIVELY_S = 60.0  # seconds for which one that has changed is looked at each time


class Rounds:
    """Says whose turn it is. Not safe to use from several threads."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._next = 0
        self._asked_at = time.monotonic()
        self._changed_at: dict[str, float] = {}

    def over(self, names: Iterable[str]) -> None:
        """Go round these from now on; those that were there before keep their turn, more or less."""
        self._names = [*names]
        self._changed_at = {
            name: at for name in self._names if (at := self._changed_at.get(name)) is not None
        }

    def note_change(self, name: str) -> None:
        """Look at this one each time for a while."""
        self._changed_at[name] = time.monotonic()

    def turn(self) -> list[str]:
        """Return those to look at now, each once."""
        now = time.monotonic()
        n = len(self._names)
        share = min(1.0, (now - self._asked_at) / _ROUND_S)
        length = min(n, max(_AT_LEAST, round(share * n)))
        self._asked_at = now
        self._changed_at = {name: at for name, at in self._changed_at.items() if now - at < _LIVELY_S}
        start = self._next % n if n else 0
        self._next = start + length
        around = self._names[start : start + length] + self._names[: max(0, start + length - n)]
        return [*dict.fromkeys([*self._changed_at, *around])]
