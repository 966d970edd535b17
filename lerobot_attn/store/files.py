"""Small files replaced in one step, and folders without links. Knows nothing of what the files say.

Whoever reads such a file finds the old or the new, whole, at any instant. A process that is killed on the way
leaves what `unfinished` names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def replace_json(path: Path, document: Mapping[str, Any], *, durable: bool = False) -> None:
    """Write a JSON object in place of what is at `path`, if anything is.

    Args:
        path: the file, in a folder that exists.
        document: plain JSON values, of numbers only finite ones.
        durable: wait until the disk has it, so that it also outlives a power cut.

    Raises:
        OSError: it cannot be written.
        ValueError: a number is not finite.
    """
    temporary = path.with_name(unfinished(path.name))
    # Indented it would take Python's slow encoder: a millisecond at every commit, with the policy held up.
    text = json.dumps(document, allow_nan=False)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


def replace_bytes(path: Path, parts: Iterable[Any]) -> None:
    """Write bytes in place of what is at `path`, if anything is.

    Args:
        path: the file; folders on the way to it are made.
        parts: what holds the bytes, one part after another; each is written as it comes.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(unfinished(path.name))
    try:
        file = temporary.open("wb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("wb")
    try:
        with file:
            file.writelines(parts)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk every byte counts
        raise


def unfinished(name: str) -> str:
    """Return the name, in the same folder, under which a file of this name is written first."""
    return f".{name}.new"


def first_link(folder: Path) -> Path | None:
    """Return a link that lies anywhere in a folder, or None; no link is followed.

    Raises:
        OSError: the folder, or one in it, cannot be listed.
    """
    folders = [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:  # four times as fast as Path.walk
            for entry in entries:
                if entry.is_symlink():
                    return Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return None
