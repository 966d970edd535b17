"""Commands that give runs away and bring them back: push, pull."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import progress_bar, status

_MOST_LINES = 20


@app.command()
def push(
    path: Annotated[
        Path, typer.Argument(help="A run's output folder, a task's folder, or an episode (….zarr).")
    ],
    repo: Annotated[
        str, typer.Option(metavar="USER/NAME", help="Of a data set on the Hub; made where there is none.")
    ],
    public: Annotated[
        bool,
        typer.Option("--public", help="Let everybody see it. Default: private, and a public one is refused."),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace other recordings of the same names, and a card that somebody changed.",
        ),
    ] = False,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed", help="Send each store as one file (….zarr.zip), as `lerobot-attn pack` does."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be sent, and print the card.")
    ] = False,
) -> None:
    """Send a run's complete episodes to the Hugging Face Hub, as a data set with a card made from the run.

    Sent are stores and videos, nothing else of the folder. Paths of this machine in what stores say are
    shortened to their last part; each is printed. Interrupted, the same command goes on.
    """
    from lerobot_attn.report.card import write_card
    from lerobot_attn.store.hub import CARD
    from lerobot_attn.store.hub import push as send
    from lerobot_attn.store.parcel import pack_up
    from lerobot_attn.store.runs import open_run

    run = open_run(path)
    with status("Reading the run and drawing its contact sheet"):
        parcel = pack_up(run, packed=packed)
        beside = write_card(run, parcel, repo)
    _say(f"left out: {line}" for line in parcel.left_out)
    _say(f"shortened: {before!r} to {after!r}" for before, after in parcel.replaced.items())
    if dry_run:
        visible = "public" if public else "private"
        print(f"{parcel} would go to {repo}, {visible}; the card:\n\n{beside[CARD].decode()}")
        return
    with progress_bar(f"Pushing {parcel} (MB)") as progress:
        done = send(parcel, repo, beside=beside, public=public, overwrite=overwrite, progress=progress)
    _say(done.notes)
    print(f"{done}\nTo bring it back: lerobot-attn pull {repo} -o FOLDER")


@app.command()
def pull(
    place: Annotated[
        str,
        typer.Argument(
            metavar="USER/NAME",
            help="A data set on the Hub, or hf://datasets/USER/NAME[@REVISION][/FOLDER OF IT].",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to bring it to: a new one, or an empty one.")
    ],
) -> None:
    """Bring a run, or one task or episode of it, from the Hugging Face Hub.

    Interrupted, the same command goes on.
    """
    from lerobot_attn.store.hub import pull as bring

    done = bring(place, output)
    print(f"{done}\nTo look at them: lerobot-attn view {done.folder}")


def _say(lines: Iterable[str]) -> None:
    found = list(lines)
    for line in found[:_MOST_LINES]:
        print(line, file=sys.stderr)
    if len(found) > _MOST_LINES:
        print(f"… and {len(found) - _MOST_LINES} more", file=sys.stderr)
