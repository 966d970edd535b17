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

    What a recording with --eval.attention.upload could not send, too. Interrupted, the same command goes on.
    """
    from lerobot_attn.store.upload import upload as send

    found = []
    with progress_bar("Uploading (bytes of an episode)") as progress:
        for one in send(path, url, keep_local=not remove_local, overwrite=overwrite, progress=progress):
            found.append(one)
            file = sys.stdout if one.refused is None else sys.stderr
            print(one.line if one.refused is None else f"not uploaded: {one.line}", file=file)
    if not found:
        print(f"{path}: nothing to do: every episode was uploaded and removed here before")
    raise typer.Exit(any(one.refused is not None for one in found))


type _Change = Callable[[Path, Callable[[int, int], None]], Iterator[Repacked]]


def _each(title: str, path: Path, change: _Change) -> None:
    """Change the stores under a path and say what became of each; exit status 1 where one was left alone."""
    found = []
    with progress_bar(title) as progress:
        for one in change(path, progress):
            found.append(one)
            file = sys.stdout if one.refused is None else sys.stderr
            print(one.line if one.refused is None else f"left alone: {one.line}", file=file)
    if not found:
        print(f"{path}: nothing to do: every episode has that form already")
    raise typer.Exit(any(one.refused is not None for one in found))
