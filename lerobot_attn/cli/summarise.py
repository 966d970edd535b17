"""The command that measures every episode of a run: summarise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import chosen_workers, progress_bar
from lerobot_attn.cli.options import RunPath, SchedulerAddress, Workers
from lerobot_attn.errors import ConfigError, SetupError
from lerobot_attn.settings import parse_choice
from lerobot_attn.store.files import unfinished

if TYPE_CHECKING:
    import pandas as pd

_SUFFIXES = (".csv", ".parquet")


@app.command()
def summarise(
    path: RunPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="The table: a CSV or Parquet file.")] = Path(
        "summary.csv"
    ),
    measures: Annotated[
        str | None,
        typer.Option(
            help="modality_share, token_attention, entropy, stability, or several with commas. Default: all."
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            help="episode (means over its inferences), inference, or frame: what has rows of its own."
        ),
    ] = "episode",
    layers: Annotated[
        str | None, typer.Option(help="Layers, as -1 or 0,8,17 or 0-17, all or mean. Default: last stored.")
    ] = None,
    denoise_steps: Annotated[
        str | None, typer.Option(help="Denoise steps, likewise. Default: last stored.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Heads, as 3 or 0,4, all, mean or max. Default: mean.")
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="Action token: a number, frame, executed or mean. Default: executed.")
    ] = None,
    scheduler: SchedulerAddress = None,
    workers: Workers = None,
) -> None:
    """Measure where each episode of a run looks: one table, a row for each episode and label.

    Labels are cameras, words, state and so on; columns say the episode's task, condition and success. An
    episode that cannot be read is named, the others are written, and the exit status is 1.
    """
    from lerobot_attn.analysis import MEASURES, summarise_run
    from lerobot_attn.store.runs import open_run

    if output.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"{output}: expected a name that ends in {' or '.join(_SUFFIXES)}")
    where: dict[str, Any] = {
        name: parse_choice(said)
        for name, said in (
            ("layer", layers),
            ("denoise_step", denoise_steps),
            ("head", heads),
            ("query", query),
        )
        if said is not None
    }
    chosen: Any = [name.strip() for name in measures.split(",")] if measures else tuple(MEASURES)
    kind: Any = by
    run = open_run(path)
    episodes = list(run)
    with chosen_workers(scheduler, workers) as computing, progress_bar("Summarising") as progress:
        summary = summarise_run(episodes, chosen, by=kind, scheduler=computing, progress=progress, **where)
    left_out = [reason for _, reason in run.damaged]
    left_out += [f"{failed.path}: {failed.error}" for failed in summary.failed]
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    _write(summary.table, output)
    n_episodes = len(episodes) - len(summary.failed)
    print(f"Wrote {output}: {len(summary.table)} rows of {n_episodes} episodes")
    raise typer.Exit(1 if left_out else 0)


def _write(table: pd.DataFrame, path: Path) -> None:
    """Write a table in place of what is at the path, in one step."""
    temporary = path.with_name(unfinished(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
        temporary.replace(path)
    except ImportError as error:
        raise SetupError(f"{path}: Parquet needs pyarrow: pip install pyarrow, or write a .csv") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
