"""One `eval_info.json` for a run of many jobs, in the form in which LeRobot writes that of one evaluation.

    found = gather(open_run("out"))
    found.write(Path("out/eval_info.json"))

Each job's own file is taken where it is there and holds all that its stores hold; otherwise the episodes that
are complete are counted from their stores. Knows LeRobot's form and nothing of LeRobot.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lerobot_attn.errors import ConfigError, StoreError, first_line
from lerobot_attn.sizes import Progress
from lerobot_attn.store.evaluation import EVAL_INFO as EVAL_INFO
from lerobot_attn.store.files import replace_json
from lerobot_attn.store.index import IndexRow
from lerobot_attn.store.location import on_this_machine
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.runs import Run

_MARK = "gathered"  # what LeRobot's own files do not have
_MAX_BYTES = 200_000_000
_LISTS = (
    "sum_rewards",
    "max_rewards",
    "successes",
    "video_paths",
    "predicted_video_paths",
    "attention_paths",
)
_PER_EPISODE = _LISTS[:3]

Task = tuple[str, int]


@dataclass(frozen=True)
class Gathered:
    """What a run's jobs found.

    Attributes:
        info: as LeRobot has it (`per_task`, `per_group`, `overall`), and under "gathered" what came from
            where.
        notes: what is missing or was counted from stores, a line each.
    """

    info: dict[str, Any]
    notes: list[str]

    @property
    def line(self) -> str:
        """All in one line."""
        overall, said = self.info["overall"], self.info[_MARK]
        pc = overall["pc_success"]
        return (
            f"{overall['n_episodes']} episodes of {len(self.info['per_task'])} tasks from {said['n_jobs']} "
            f"jobs, {'no outcome known' if pc is None else f'{pc:.1f} % successful'}"
        )

    def write(self, path: Path) -> Path:
        """Write the file in one step, in place of one that was gathered before.

        Raises:
            StoreError: an evaluation's own file is there, or it cannot be written.
        """
        if path.exists() and _MARK not in (_read(path) or {}):
            raise StoreError(
                f"{path}: is an evaluation's own, expected a place for the whole run's; give another file "
                "with -o, or gather the folder that holds all jobs"
            )
        try:
            replace_json(path, self.info)
        except OSError as error:
            raise StoreError(f"{path}: cannot be written: {error.strerror or first_line(error)}") from error
        return path


@dataclass
class _Job:
    """An evaluation of its own: its folder, and the complete episodes in it by task."""

    folder: Path
    info: dict[str, Any] | None
    tasks: dict[Task, list[IndexRow]] = field(default_factory=dict)


class _Part(NamedTuple):
    """What one job found of one task: values by episode, and paths."""

    first: int  # number of its first episode
    metrics: dict[str, list[Any]]
    saved: Mapping[str, Any] | None  # what the job's own file says of the stores


def gather(run: Run, *, condition: str | None = None, progress: Progress | None = None) -> Gathered:
    """Put together what the jobs of a run found.

    Args:
        run: of the folder that holds all jobs.
        condition: count the episodes of this one alone; None: there is but one.
        progress: called as `progress(done, total)` while stores are read.

    Raises:
        ConfigError: several conditions or policies, whose episodes are no one evaluation's, or an episode.
        SelectionError: no episode is in that condition.
        StoreError: the run is at a URL.
    """
    root = on_this_machine(run.path, "a URL is read-only, and jobs' files are not looked for there")
    if run.is_episode:
        raise ConfigError(f"{root}: is an episode, expected the folder that holds an evaluation's jobs")
    rows = [*run.rows(progress), *run.sent]
    if condition is not None:
        chosen = [row for row in rows if row.table.condition == condition]
        rows = chosen or run.where(condition=condition).rows()  # which says what there is
    _refuse_mixture(root, rows)
    notes: list[str] = []
    jobs = _jobs(root, rows, notes, whole=condition is None)
    parts: dict[Task, list[_Part]] = {}
    seen: dict[tuple[Any, ...], str] = {}
    n_from_stores, seconds, n_timed = 0, 0.0, 0
    n_read, n_rows = 0, sum(row.table.complete for row in rows)
    for job in jobs:
        told = _tasks_of(job.info)
        for task in sorted({*told, *job.tasks}):
            here, twice = _once(job.tasks.get(task, []), seen, notes)
            metrics = None if twice else told.get(task)
            if metrics is not None and len(metrics["successes"]) >= len(here):
                first = min((int(row.table.episode or 0) for row in here), default=0)
                parts.setdefault(task, []).append(_told(first, metrics))
            elif here:
                parts.setdefault(task, []).append(_counted(here))
                n_from_stores += len(here)
            n_read += len(job.tasks.get(task, []))
            if progress is not None:
                progress(n_read, n_rows)
        if job.info is None and job.tasks:
            n_complete = sum(map(len, job.tasks.values()))
            notes.append(
                f"{job.folder}: no {EVAL_INFO}, for it has not come to its end: its {n_complete} complete "
                "episodes are counted from their stores, its seconds are not known"
            )
        eval_s = _seconds(job.info)
        if eval_s is not None:
            seconds += eval_s
            n_timed += sum(len(one["successes"]) for one in told.values())
    notes += _missing(rows, run, jobs)
    per_task = [_per_task(task, found) for task, found in sorted(parts.items())]
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in per_task:
        groups.setdefault(one["task_group"], []).append(one["metrics"])
    overall = _aggregate([one["metrics"] for one in per_task])
    eval_s = seconds if n_timed else None
    timed = {"eval_s": eval_s, "eval_ep_s": None if eval_s is None else eval_s / n_timed}
    info = {
        "per_task": per_task,
        "per_group": {name: _aggregate(found) for name, found in groups.items()},
        "overall": overall | timed,
        _MARK: {
            "n_jobs": len(jobs),
            "jobs": [str(job.folder) for job in jobs],
            "n_episodes_from_stores": n_from_stores,
            "notes": notes,
        },
    }
    return Gathered(info, notes)


def _refuse_mixture(root: Path, rows: Iterable[IndexRow]) -> None:
    rows = list(rows)
    for what, found, help_ in (
        ("conditions", {row.table.condition: None for row in rows}, "choose one with --condition NAME"),
        ("policies", {row.policy: None for row in rows}, "gather each one's folder by itself"),
    ):
        if len(found) > 1:
            names = ", ".join(map(repr, list(found)[:5]))
            raise ConfigError(
                f"{root}: holds episodes of {len(found)} {what} ({names}), expected one, because a success "
                f"rate over several means nothing; {help_}"
            )


def _jobs(root: Path, rows: Iterable[IndexRow], notes: list[str], *, whole: bool) -> list[_Job]:
    jobs: dict[Path, _Job] = {}

    def job_at(folder: Path) -> _Job:
        if folder not in jobs:
            file = folder / EVAL_INFO
            info = _read(file) if file.is_file() else None
            if file.is_file() and info is None:
                notes.append(f"{file}: cannot be read; its job's episodes are counted from their stores")
            own = info is not None and _MARK not in info
            jobs[folder] = _Job(folder, info if own else None)
        return jobs[folder]

    for row in rows:
        if row.table.complete:
            stores = Path(row.table.path).parent.parent
            job = job_at(stores.parent if stores.name == "attention" else stores)
            job.tasks.setdefault(_task(row), []).append(row)
    for file in [root / EVAL_INFO, *sorted(root.glob(f"*/{EVAL_INFO}"))] if whole else []:
        if file.parent not in jobs and file.is_file() and _MARK not in (_read(file) or {}):
            job_at(file.parent)  # it left no store, as with keep=success
    return [jobs[folder] for folder in sorted(jobs)]


def _task(row: IndexRow) -> Task:
    number = row.table.task_id
    return str(row.table.task_group), number if type(number) is int else 0


def _once(
    rows: Sequence[IndexRow], seen: dict[tuple[Any, ...], str], notes: list[str]
) -> tuple[list[IndexRow], bool]:
    """Return the rows whose episode no other job has, and whether some were left out."""
    kept = []
    for row in sorted(rows, key=_number):
        key = (*_task(row), row.table.episode, row.seed)
        if row.seed is not None and key in seen:
            notes.append(f"{row.table.path}: is the episode of {seen[key]}, of another job; counted once")
        else:
            seen.setdefault(key, row.table.path)
            kept.append(row)
    return kept, len(kept) < len(rows)


def _number(row: IndexRow) -> int:
    return row.table.episode if type(row.table.episode) is int else 0


def _told(first: int, metrics: Mapping[str, Any]) -> _Part:
    saved = metrics.get("attention")
    lists = {name: list(metrics.get(name) or []) for name in _LISTS}
    return _Part(first, lists, saved if isinstance(saved, dict) else None)


def _counted(rows: Sequence[IndexRow]) -> _Part:
    """Return what the stores of complete episodes say, in the order of their numbers."""
    metrics: dict[str, list[Any]] = {name: [] for name in _LISTS}
    for row in rows:
        total, most = row.sum_reward, row.max_reward
        if total is None:
            total, most = _rewards(row)
        metrics["sum_rewards"].append(total)
        metrics["max_rewards"].append(most)
        metrics["successes"].append(row.table.success)
        metrics["attention_paths"].append(row.table.path)
    return _Part(_number(rows[0]), metrics, {"stored_bytes": sum(row.table.bytes for row in rows)})


def _rewards(row: IndexRow) -> tuple[float | None, float | None]:
    """Return the sum and the largest of an episode's rewards; None where it has none."""
    try:
        rewards = open_episode(row.table.path).rewards()
    except StoreError:
        return None, None
    if rewards is None or not len(rewards) or not np.isfinite(rewards).all():
        return None, None
    return float(rewards.sum()), float(rewards.max())


def _per_task(task: Task, parts: Sequence[_Part]) -> dict[str, Any]:
    ordered = sorted(parts, key=lambda part: part.first)
    metrics: dict[str, Any] = {
        name: [value for part in ordered for value in part.metrics[name]] for name in _LISTS
    }
    not_saved = [
        one
        for part in ordered
        for one in (part.saved or {}).get("not_saved", [])
        if isinstance(part.saved, Mapping)
    ]
    metrics["attention"] = {
        "n_saved": len(metrics["attention_paths"]),
        "n_not_saved": len(not_saved),
        "not_saved": not_saved,
        "stored_bytes": sum(int((part.saved or {}).get("stored_bytes") or 0) for part in ordered),
    }
    return {"task_group": task[0], "task_id": task[1], "metrics": metrics}


def _aggregate(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what LeRobot says of a group of tasks: means over all their episodes."""
    lists = {name: [value for metrics in found for value in metrics[name]] for name in _LISTS}
    success = _mean(lists["successes"])
    return {
        "avg_sum_reward": _mean(lists["sum_rewards"]),
        "avg_max_reward": _mean(lists["max_rewards"]),
        "pc_success": None if success is None else success * 100,
        "n_episodes": len(lists["successes"]),
        "video_paths": lists["video_paths"],
        "predicted_video_paths": lists["predicted_video_paths"],
        "attention_paths": lists["attention_paths"],
    }


def _mean(values: Iterable[Any]) -> float | None:
    """Return the mean of what is known; None, for JSON has no NaN, where nothing is."""
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else None


def _missing(rows: Iterable[IndexRow], run: Run, jobs: Sequence[_Job]) -> list[str]:
    """Return what the run lacks, a line each."""
    notes = [f"{row.table.path}: is incomplete; not counted" for row in rows if not row.table.complete]
    notes += [f"not counted: {reason}" for _, reason in run.damaged]
    for job in jobs:
        found = [row for part in job.tasks.values() for row in part]
        expected = max((row.n_expected or 0 for row in found), default=0)
        if len(found) < expected:
            notes.append(f"{job.folder}: {len(found)} of its {expected} episodes are there")
    return notes


def _read(file: Path) -> dict[str, Any] | None:
    """Return what a file says; None where it is no JSON object."""
    try:
        if file.stat().st_size > _MAX_BYTES:
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _tasks_of(info: Mapping[str, Any] | None) -> dict[Task, dict[str, Any]]:
    """Return the metrics of a job's own file by task; of what is not as LeRobot writes it, nothing."""
    told: dict[Task, dict[str, Any]] = {}
    tasks = (info or {}).get("per_task")
    for one in tasks if isinstance(tasks, list) else []:
        metrics = one.get("metrics") if isinstance(one, dict) else None
        if not isinstance(metrics, dict) or type(one.get("task_id")) is not int:
            continue
        lists = [metrics.get(name) for name in _PER_EPISODE]
        if all(isinstance(each, list) and len(each) == len(lists[0] or []) for each in lists):
            values = {name: [_plain(value) for value in metrics[name]] for name in _PER_EPISODE}
            told[str(one.get("task_group")), one["task_id"]] = metrics | values
    return told


def _plain(value: Any) -> Any:
    """Return a number or a truth value; None for NaN and what is neither."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _seconds(info: Mapping[str, Any] | None) -> float | None:
    overall = (info or {}).get("overall")
    found = overall.get("eval_s") if isinstance(overall, dict) else None
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None
