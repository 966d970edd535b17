"""How large and how far: sizes of folders in words, and the type of a progress report.

Knows nothing of what lies in a folder or of what progresses.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

Progress = Callable[[int, int], None]  # called as `progress(done, total)`


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder, or of a file, bytes."""
    if not folder.is_dir():
        return folder.stat().st_size if folder.is_file() else 0
    total, folders = 0, [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:  # a run has millions of files, and `Path.rglob` is slow
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file():
                    total += entry.stat().st_size
    return total


def format_bytes(n_bytes: float) -> str:
    """Return a size for people, in powers of 1000: "16.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
