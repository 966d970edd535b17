"""Commands that change the form in which episodes lie on a disk, or where they lie: pack, unpack, upload."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import progress_bar

if TYPE_CHECKING:
    from lerobot_attn.store.pack import Repacked
    from lerobot_attn.store.upload import Uploaded


@app.command()
def pack(
    path: Annotated[
        Path, typer.Argument(help="An episode (….zarr), a task's folder, or a run's output folder.")
    ],
) -> None:
    """Make each episode's store one file, ….zarr.zip, which everything here reads in place.

    For file systems that count files. Nothing is compressed again, and the folder goes only once the file was
    compared with it, byte for byte. Incomplete episodes stay folders. Videos stay beside the store.
    """
    from lerobot_attn.store.pack import pack as change

    _each("Packing", path, change)


@app.command()
def unpack(
    path: Annotated[
        Path, typer.Argument(help="A packed episode (….zarr.zip), a task's folder, or a run's output folder.")
    ],
) -> None:
    """Make each packed episode a folder again."""
    from lerobot_attn.store.pack import unpack as change

    _each("Unpacking", path, change)


@app.command()
def upload(
    path: Annotated[
        Path,
        typer.Argument(help="A run's output folder, a task's folder, or an episode (….zarr, ….zarr.zip)."),
    ],
    url: Annotated[str, typer.Argument(metavar="URL", help="A bucket's folder: s3://, gs:// or az://.")],
    remove_local: Annotated[
        bool,
        typer.Option(
            "--remove-local",
            help="Remove each episode here once its checksum was compared; a receipt stays.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace other recordings of the same names.")
    ] = False,
) -> None:
    """Send a run's complete episodes to a bucket, packed, with their cameras' videos; only what is missing.

    The evaluation's own videos of them and its eval_info.json go too, and stay here. What a recording with
    --eval.attention.upload could not send, too. Interrupted, the same command goes on.
    """
    from lerobot_attn.store.upload import upload as send

    def change(path: Path, progress: _Progress) -> Iterator[Uploaded]:
        return send(path, url, keep_local=not remove_local, overwrite=overwrite, progress=progress)

    title, done = "Uploading (bytes of an episode)", "was uploaded and removed here before"
    _each(title, path, change, refused="not uploaded", done=done)


type _Progress = Callable[[int, int], None]
type _Change = Callable[[Path, _Progress], Iterator[Repacked | Uploaded]]


def _each(
    title: str,
    path: Path,
    change: _Change,
    *,
    refused: str = "left alone",
    done: str = "has that form already",
) -> None:
    """Do something with the stores under a path and say what became of each.

    Args:
        title: of the progress bar.
        path: an episode or a run.
        change: does it.
        refused: what is said of a store with which nothing was done; then the exit status is 1.
        done: what is said of every episode where nothing was to do.
    """
    found = []
    with progress_bar(title) as progress:
        for one in change(path, progress):
            found.append(one)
            file = sys.stdout if one.refused is None else sys.stderr
            print(one.line if one.refused is None else f"{refused}: {one.line}", file=file)
    if not found:
        print(f"{path}: nothing to do: every episode {done}")
    raise typer.Exit(any(one.refused is not None for one in found))
