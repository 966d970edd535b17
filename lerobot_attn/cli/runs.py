"""Commands for a run of many episodes and jobs: status, gather."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import progress_bar
from lerobot_attn.cli.options import ConditionName, RunPath
from lerobot_attn.errors import StoreError

if TYPE_CHECKING:
    from lerobot_attn.report.run_status import RunStatus
    from lerobot_attn.store.runs import Run
    from lerobot_attn.store.url import Place

_EVERY_S = 2.0  # between two looks


@app.command("status")
def run_status(
    path: RunPath,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every two seconds, until all is there or Ctrl-C.")
    ] = False,
    expected: Annotated[
        int | None,
        typer.Option(min=1, help="Episodes that the run is to have. Default: what its jobs said so far."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table; with --watch a line a look.")
    ] = False,
) -> None:
    """Say how far a run is: episodes done, failing, being written and broken, speed, size and time left.

    Looks at the stores alone, so it works while jobs write, on any machine that sees the folder. Jobs that
    have not begun an episode have not said how many they will record: --expected counts them too.
    """
    from lerobot_attn.report.run_status import render_status, status_of

    with progress_bar("Reading") as progress:
        run = _run_at(path, wait=watch)
        found = status_of(run, expected=expected, progress=progress)
    if not watch:
        if as_json:
            print(json.dumps(found.to_dict(), indent=2))
        else:
            Console().print(render_status(found))
        return
    try:
        _watch(run, found, expected, as_json)
    except KeyboardInterrupt:
        return


def _watch(run: Run, found: RunStatus, expected: int | None, as_json: bool) -> None:
    """Show the run again and again until it is done."""
    from lerobot_attn.report.run_status import status_of

    with _screen(as_json) as show:
        while True:
            show(found)
            if found.is_done:
                return
            time.sleep(_EVERY_S)
            run = run.again() if len(run) else _run_at(run.path, wait=True)
            found = status_of(run, expected=expected)


@contextmanager
def _screen(as_json: bool) -> Iterator[Callable[[RunStatus], None]]:
    """Show each status in place of the one before; into a file or a pipe, as a line where it is another."""
    from rich.live import Live

    from lerobot_attn.report.run_status import render_status

    console, said = Console(), [""]

    def add(found: RunStatus) -> None:
        text = json.dumps(found.to_dict()) if as_json else found.line
        if text != said[0]:
            print(text, flush=True)
        said[0] = text

    if as_json or not console.is_terminal:
        yield add
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda found: live.update(render_status(found, console.height), refresh=True)


def _run_at(path: Place, *, wait: bool) -> Run:
    """Open a run; where it may be waited for or was sent to a bucket, one without an episode too."""
    from lerobot_attn.store.runs import Run, open_run

    try:
        return open_run(path)
    except StoreError:
        if isinstance(path, Path) and path.is_dir() and (wait or Run(path, ()).sent):
            return Run(path, ())
        raise


@app.command()
def gather(
    path: RunPath,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File. Default: eval_info.json in PATH.")
    ] = None,
    condition: ConditionName = None,
) -> None:
    """Write one eval_info.json for a run of many jobs, in the form that lerobot-eval writes for one.

    Each job's own eval_info.json is taken where it is there; of a job that has not come to its end the
    complete episodes are counted from their stores. What is missing is said.
    """
    from lerobot_attn.report.eval_info import EVAL_INFO
    from lerobot_attn.report.eval_info import gather as put_together

    run = _run_at(path, wait=False)
    with progress_bar("Reading") as progress:
        found = put_together(run, condition=condition, progress=progress)
    file = found.write(output or path / EVAL_INFO)
    for line in found.notes:
        print(line, file=sys.stderr)
    print(f"Wrote {file}: {found.line}")
