"""How large, how far and how many: sizes of folders in words, the type of a progress report, cores.

Knows nothing of what lies in a folder, of what progresses or of what is computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

Progress = Callable[[int, int], None]  # called as `progress(done, total)`

_HAS_ONE_CORE = ContextVar("has_one_core", default=False)


def n_cores() -> int:
    """Return how many cores the calling thread may use: those of this process, or 1 within `one_core`."""
    if _HAS_ONE_CORE.get():
        return 1
    if hasattr(os, "sched_getaffinity"):  # fewer than the machine has, in a container or a job of a cluster
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def one_core() -> Iterator[None]:
    """Let what this thread calls use one core, because other threads or processes keep the others busy."""
    token = _HAS_ONE_CORE.set(True)
    try:
        yield
    finally:
        _HAS_ONE_CORE.reset(token)


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
