"""Options that several commands have. Knows no command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lerobot_attn.cli.messages import progress_bar
from lerobot_attn.errors import ConfigError
from lerobot_attn.settings import parse_choice
from lerobot_attn.store.url import place_of

if TYPE_CHECKING:
    from lerobot_attn.store.runs import Run


def _former_name(old: str, new: str) -> Callable[[str | None], str | None]:
    """Return what an option does that has another name now: it works, and says so."""

    def say(value: str | None) -> str | None:
        if value is not None:
            print(f"{old} is now called {new}; the old name is deprecated", file=sys.stderr)
        return value

    return say


# Parsed here, because a Path drops one of the slashes of s3://.
EpisodePath = Annotated[
    Any,
    typer.Argument(
        parser=place_of, metavar="PATH", help="An episode's store, ….zarr, or packed, ….zarr.zip; or its URL."
    ),
]
RunPath = Annotated[
    Any,
    typer.Argument(
        parser=place_of,
        metavar="PATH",
        help="An episode (….zarr, ….zarr.zip), a task's folder, or a run's output folder; or its URL.",
    ),
]
TaskText = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TEXT",
        help="Only episodes of this task: group and number (libero_object_3), group, or words of its "
        "instruction.",
    ),
]
Successes = Annotated[
    bool | None, typer.Option("--success/--failure", help="Only successful episodes, or only the others.")
]
ConditionName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Only episodes in this condition; baseline: nothing was done."),
]
PolicyPath = Annotated[
    str,
    typer.Option(
        "--policy.path",
        metavar="CHECKPOINT",
        help="A checkpoint's folder or Hub name. Other fields of its config: --policy.device=cuda, …",
    ),
]
DataSetEpisodes = Annotated[
    str | None, typer.Option(help="Episodes of the data set, as 0,3 or 0-9. Default: all.")
]
SettingsFile = Annotated[
    Path | None, typer.Option("--settings", help="Read settings from this YAML file; options come on top.")
]
Layer = Annotated[
    str | None, typer.Option(help="Layer: a number (negative from the last) or mean. Default: last stored.")
]
Step = Annotated[
    str | None,
    typer.Option(help="Denoise step: a number (negative from the last) or mean. Default: last stored."),
]
Head = Annotated[str | None, typer.Option(help="Head: a number, mean or max.")]
Query = Annotated[
    str | None,
    typer.Option(help="Action token: a number, frame (the one executed at the frame), executed or mean."),
]
Normalisation = Annotated[
    str | None,
    typer.Option(
        help="share of all attention, share within the image, frame (of its largest patch), or episode (one "
        "range for all frames)."
    ),
]
Exclude = Annotated[
    str | None,
    typer.Option(help="Key tokens to exclude, as 0,4; or sinks, to find attention sinks first."),
]
LeaveOut = Annotated[
    str | None,
    typer.Option("--leave-out", hidden=True, callback=_former_name("--leave-out", "--exclude")),
]
ColorMap = Annotated[str | None, typer.Option("--colormap", help="A matplotlib colour map.")]
Alpha = Annotated[float | None, typer.Option(help="Opacity of the largest value, 0 to 1.")]
SchedulerAddress = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="tcp://HOST:PORT",
        help="Read the episodes on the workers of this Dask scheduler, which must see their paths. Default: "
        "threads here.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", help="Read them in so many processes on this machine instead."),
]
Clip = Annotated[
    float | None, typer.Option(help="Percentile of the patches at which colours end; 100 is the largest.")
]
Interpolation = Annotated[
    str | None, typer.Option(help="nearest (a patch is a square) or linear (blended between patch centres).")
]
Outlines = Annotated[
    bool | None,
    typer.Option(
        "--outlines/--no-outlines",
        help="Outline the scene's objects, if the episode has masks. Default: yes.",
    ),
]


def part_of(run: Run, task: str | None, success: bool | None, condition: str | None) -> Run:
    """Return a run's episodes that were asked for, and say on stderr what could not be asked.

    Args:
        run: the run.
        task: what `TaskText` gave.
        success: what `Successes` gave.
        condition: what `ConditionName` gave.

    Raises:
        SelectionError: there is none.
    """
    if task is None and success is None and condition is None:
        return run
    with progress_bar("Reading") as progress:
        run.rows(progress)
    for _, reason in run.damaged:
        print(f"left out: {reason}", file=sys.stderr)
    return run.where(task=task, success=success, condition=condition)


def whole_numbers(name: str, text: str | None) -> list[int] | None:
    """Return the numbers that an option's text names, as 0,3 or 0-9; None where it was not given.

    Raises:
        ConfigError: it is something else.
    """
    if text is None:
        return None
    found = parse_choice(text)
    numbers = found if isinstance(found, list) else [found]
    if not all(isinstance(number, int) for number in numbers):
        raise ConfigError(f"{name}: got {text!r}, expected numbers as 0,3 or 0-9")
    return numbers
