"""The signals by which a cluster ends a job: noted when they come, obeyed between two frames.

Knows signals. Knows nothing of what is recorded, or of how it is written out.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

# SLURM ends a job with SIGTERM and says so before with what --signal names; submitit asks for SIGUSR2.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class Preempted(BaseException):
    """A signal asked the process to end. No `Exception`, so that no loop takes it for a fault of its own.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Preemption:
    """Whether a signal has asked for the end.

    A handler that raised, as that of Ctrl-C does, could do so amid a frame, and in code that passes over
    exceptions. This one notes the signal, and the loop asks for it where a frame is whole. Further signals,
    of which a cluster sends several, change nothing: only Ctrl-C and SIGKILL end the writing of what is
    queued.

    Attributes:
        number: the first signal; None: there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the signals inside the block; outside of the main thread, where Python cannot, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        heard = [number for number in SIGNALS if before[number] != signal.SIG_IGN]
        try:
            for number in heard:
                signal.signal(number, self._note)
            yield
        finally:
            for number in heard:
                signal.signal(number, signal.SIG_DFL if before[number] is None else before[number])

    def check(self) -> None:
        """End here if a signal has asked for it.

        Raises:
            Preempted: it has.
        """
        if self.number is not None:
            raise Preempted(self.number)

    def _note(self, number: int, frame: Any) -> None:
        if self.number is None:
            self.number = number
