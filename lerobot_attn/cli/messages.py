"""What commands print while they work, and how their errors look. Knows no command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

if TYPE_CHECKING:
    from lerobot_attn.analysis.cluster import Scheduler


def status(text: str) -> Status:
    """Return a spinner on stderr."""
    return Console(stderr=True).status(text)


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, moved by calls of (done, total)."""
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # Into a file it would write an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def chosen_workers(scheduler: str | None, workers: int | None) -> Iterator[Scheduler]:
    """Connect to what the options --scheduler and --workers say; say on stderr where its dashboard is."""
    from lerobot_attn.analysis.cluster import dashboard_of, workers_of

    with ExitStack() as stack:
        with status("Waiting for the scheduler" if workers is None else f"Starting {workers} workers"):
            chosen = stack.enter_context(workers_of(scheduler, workers))
            link = None if chosen is None or isinstance(chosen, str) else dashboard_of(chosen)
        if link is not None:
            print(f"Dashboard: {link}", file=sys.stderr)
        stack.enter_context(log_lines())
        yield chosen


class _Printed(logging.Handler):
    """Prints what is logged on stderr, as it is at that moment: a progress bar takes its place."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(f"{level}{self.format(record)}", file=sys.stderr)


@contextmanager
def log_lines() -> Iterator[None]:
    """Print on stderr what this package logs, one line each."""
    logger, handler = logging.getLogger("lerobot_attn"), _Printed()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # LeRobot's own handlers would print it again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def any_text_can_be_printed() -> None:
    """Let a terminal that is not UTF-8 show a stand-in for what it cannot, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and stream.errors == "strict":
            reconfigure(errors="replace")
