"""Commands that change the form in which episodes lie on a disk: pack, unpack."""

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
