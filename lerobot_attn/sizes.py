"""How large and how far: sizes of folders in words, and the type of a progress report.

Knows nothing of what lies in a folder or of what progresses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Progress = Callable[[int, int], None]  # called as `progress(done, total)`


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder, or of a file, bytes."""
    if folder.is_file():
        return folder.stat().st_size
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def format_bytes(n_bytes: float) -> str:
    """Return a size for people, in powers of 1000: "16.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
