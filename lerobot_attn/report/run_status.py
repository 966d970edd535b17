"""How far a run is, from its stores alone, also while many jobs write into it: numbers, a line, a table.

    status = status_of(open_run("out"))
    print(status.line)

Knows what stores say of themselves and when they last changed. Knows no job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lerobot_attn.sizes import Progress, format_bytes
from lerobot_attn.store.index import IndexRow, stamp_of_store
from lerobot_attn.store.runs import Run, task_name
from lerobot_attn.store.url import Place

_QUIET_S = 300  # an episode to which nothing was added for so long is not being written any more
_WINDOW_S = 1800  # the speed is that of the last half hour
_MOST_TASKS = 40  # rows of the table; of more tasks a row stands for a whole group
_MOST_BROKEN = 40  # reasons that are printed
_AROUND = 6  # lines around the table's rows


@dataclass
class TaskStatus:
    """How far a task is, in one condition.

    Attributes:
        name: its group and number.
        condition: what was done to the policy.
        n_done: episodes that are complete.
        n_success: of those, the successful ones.
        n_failure: of those, the unsuccessful ones. Of the others nobody knows.
        n_writing: that are being written.
        n_stopped: that are incomplete, and to which nothing is added any more.
        n_broken: that cannot be read.
        n_sent: of those that are complete, the ones that were sent to a bucket and removed here.
        n_bytes: of all stores that can be read, and of those that were sent.
    """

    name: str
    condition: str
    n_done: int = 0
    n_success: int = 0
    n_failure: int = 0
    n_writing: int = 0
    n_stopped: int = 0
    n_broken: int = 0
    n_sent: int = 0
    n_bytes: int = 0

    def add(self, other: TaskStatus) -> None:
        """Count another one's episodes, too."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


_COUNTS = ("n_done", "n_success", "n_failure", "n_writing", "n_stopped", "n_broken", "n_sent", "n_bytes")


@dataclass
class RunStatus(TaskStatus):
    """How far a run is; `name` is its path, `condition` is empty.

    Attributes:
        n_expected: how many episodes it is to have; None where nobody said it.
        is_announced: whether the recordings said so: jobs that have not begun an episode are not counted.
        per_hour: complete episodes an hour: of the last half hour, or, where nothing is being written any
            more, of the whole run; None where it cannot be told.
        left_s: seconds until the expected number is there, at that speed.
        tasks: the same of each task and condition.
        broken: why stores cannot be read, a line each.
    """

    n_expected: int | None = None
    is_announced: bool = False
    per_hour: float | None = None
    left_s: float | None = None
    tasks: list[TaskStatus] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether as many episodes are complete as are expected, and none is being written."""
        return self.n_expected is not None and self.n_done >= self.n_expected and not self.n_writing

    @property
    def line(self) -> str:
        """All of it in one line."""
        done = f"{self.n_done} episodes done"
        if self.n_expected:
            announced = " announced" if self.is_announced else ""
            share = self.n_done / self.n_expected
            done = f"{self.n_done} of {self.n_expected} episodes{announced} done ({share:.0%})"
        parts = [done, f"{self.n_success} successful", f"{self.n_failure} failing"]
        for count, what in (
            (self.n_writing, "being written"),
            (self.n_stopped, "stopped halfway"),
            (self.n_broken, "broken"),
            (self.n_sent, "of the done sent and removed here"),
        ):
            parts += [f"{count} {what}"] if count else []
        text = f"{self.name}: {', '.join(parts)}; {format_bytes(self.n_bytes)}"
        if self.per_hour is not None:
            text += f"; {self.per_hour:.3g} episodes an hour"
        return text + (f", {_in_words(self.left_s)} left" if self.left_s is not None else "")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"path": self.name, **asdict(self), "is_done": self.is_done}


def status_of(
    run: Run, *, expected: int | None = None, progress: Progress | None = None, now: float | None = None
) -> RunStatus:
    """Count what is there of a run.

    Args:
        run: from `open_run`, or `Run.again` of one that was counted before.
        expected: how many episodes it is to have; None: what its recordings said.
        progress: called as `progress(done, total)` while stores are read.
        now: seconds since 1970; None: now.
    """
    now = time.time() if now is None else now
    found = RunStatus(str(run.path), "")
    tasks: dict[tuple[str, str], TaskStatus] = {}

    def of(name: str, condition: str) -> TaskStatus:
        return tasks.setdefault((name, condition), TaskStatus(name, condition))

    rows = [*run.rows(progress), *run.sent]
    for row in run.sent:
        of(task_name(row.table), row.table.condition).n_sent += 1
    for row in rows:
        task = of(task_name(row.table), row.table.condition)
        task.n_bytes += row.table.bytes
        if row.table.complete:
            task.n_done += 1
            task.n_success += row.table.success is True
            task.n_failure += row.table.success is False
        elif row.has_ended or not _is_fresh(_changed_s(row), now):
            task.n_stopped += 1
        else:
            task.n_writing += 1
    begun = set(run.begun)
    for store, reason in run.damaged:
        task = of(store.parent.name, "?")
        if store in begun and _is_fresh(_touched_s(store), now):
            task.n_writing += 1
        else:
            task.n_broken += 1
            found.broken.append(reason)
    found.tasks = list(tasks.values())
    for task in found.tasks:
        found.add(task)
    found.n_expected, found.is_announced = expected, False
    if expected is None:
        found.n_expected = _announced(rows)
        found.is_announced = found.n_expected is not None
    is_going = found.n_writing > 0 or any(_is_fresh(_changed_s(row), now) for row in rows)
    found.per_hour = _per_hour(rows, now, is_going=is_going)
    n_left = None if found.n_expected is None else found.n_expected - found.n_done
    if is_going and n_left is not None and n_left > 0 and found.per_hour:
        found.left_s = n_left / found.per_hour * 3600
    return found


def render_status(status: RunStatus, height: int | None = None) -> RenderableType:
    """Lay it out for a terminal: the line, a table by task, and why stores cannot be read.

    Args:
        status: of the run.
        height: lines that there is room for; the table has fewer rows then, each of a group of tasks.
    """
    most_broken = _MOST_BROKEN if height is None else max(1, height // 4)
    broken = [f"broken: {_printable(reason)}" for reason in status.broken[:most_broken]]
    if len(status.broken) > most_broken:
        broken.append(f"and {len(status.broken) - most_broken} more that are broken")
    most_tasks = _MOST_TASKS if height is None else height - _AROUND - len(broken)
    has_conditions = len({task.condition for task in status.tasks} - {"baseline", "?"}) > 0

    def together(name_of: Callable[[str], str]) -> list[TaskStatus]:
        found: dict[tuple[str, str], TaskStatus] = {}
        for task in status.tasks:
            # Of one that cannot be read nobody knows the condition.
            key = name_of(task.name), task.condition if has_conditions else ""
            found.setdefault(key, TaskStatus(*key)).add(task)
        return list(found.values())

    tasks = together(str)
    if len(tasks) > most_tasks:
        tasks = together(lambda name: name.rpartition("_")[0])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    if has_conditions:
        table.add_column("condition", overflow="fold")
    columns = {
        "done": "n_done",
        "successful": "n_success",
        "failing": "n_failure",
        "being written": "n_writing",
        "stopped": "n_stopped",
        "broken": "n_broken",
        "sent": "n_sent",
    }
    shown = {title: name for title, name in columns.items() if getattr(status, name) or title == "done"}
    for title in (*shown, "size"):
        table.add_column(title, justify="right")
    for task in tasks:
        table.add_row(
            Text(_printable(task.name)),
            *([Text(_printable(task.condition))] if has_conditions else []),
            *(str(getattr(task, name) or "") for name in shown.values()),
            format_bytes(task.n_bytes),
        )
    parts: list[RenderableType] = [Text(_printable(status.line), style="bold")]
    parts += [table] if tasks else []
    parts += [Text(reason, style="red") for reason in broken]
    return Group(*parts)


def _announced(rows: list[IndexRow]) -> int | None:
    """Return how many episodes the recordings said they would leave: of each folder what was said last."""
    said: dict[str, tuple[float, int | None]] = {}
    for row in rows:
        folder = str(Path(row.table.path).parent.parent)
        said[folder] = max(said.get(folder, (0.0, None)), (_changed_s(row), row.n_expected), key=_first_of)
    numbers = [number for _, number in said.values()]
    return None if None in numbers or not numbers else sum(number or 0 for number in numbers)


def _first_of(pair: tuple[float, int | None]) -> float:
    return pair[0]


def _per_hour(rows: list[IndexRow], now: float, *, is_going: bool) -> float | None:
    times = [_changed_s(row) for row in rows if row.table.complete]
    begun = min(_begun(rows), default=None)
    if begun is None or not times:
        return None
    start, end = (max(begun, now - _WINDOW_S), now) if is_going else (begun, max(times))
    n_done = sum(start < at <= end for at in times)
    return n_done / (end - start) * 3600 if end > start and n_done else None


def _begun(rows: list[IndexRow]) -> Iterator[float]:
    for row in rows:
        try:
            yield datetime.fromisoformat(row.created or "").timestamp()
        except (ValueError, OverflowError, OSError):
            continue


def _changed_s(row: IndexRow) -> float:
    return 0.0 if row.stamp is None else row.stamp.mtime_ns / 1e9


def _touched_s(store: Place) -> float:
    stamp = stamp_of_store(store)
    return 0.0 if stamp is None else stamp.mtime_ns / 1e9


def _is_fresh(at: float, now: float) -> bool:
    return now - at < _QUIET_S


def _in_words(seconds: float) -> str:
    """Return a duration for people: "40 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
