"""Progress of checks of different kinds, as one count."""

from __future__ import annotations

from lerobot_attn.sizes import Progress


class Ticks:
    """Counts what is done of everything, for the progress callback."""

    def __init__(self, total: int, progress: Progress | None):
        self._total, self._progress, self._done = total, progress, 0

    def tick(self, n: int = 1) -> None:
        """Count so much more as done."""
        self._done += n
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)

    def finish(self) -> None:
        """Everything is done, whatever was counted."""
        if self._progress is not None:
            self._progress(self._total, self._total)
