"""Stills: what a camera showed at the newest inference, as a JPEG beside the store while somebody watches.

A video can be read only once it is finished, and one that can be read before is much larger: its encoder
may neither look ahead nor refer back far. So whoever watches gets this picture until then. Knows no episode.
"""

from __future__ import annotations

import glob
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_QUALITY = 90
_DIGITS = 6
_MOST_BYTES = 50_000_000  # of a stranger's file


def still_of(video: Path, frame: int) -> Path:
    """Return where the still of a frame lies, beside the video that will show it."""
    return video.with_name(f"{video.stem}.{frame:0{_DIGITS}d}.jpg")


def write_still(video: Path, frame: int, picture: NDArray[np.uint8]) -> None:
    """Write the still of a frame in the place of the one before.

    Args:
        video: the video that will show it.
        frame: its number.
        picture: (height, width, 3) uint8.

    Raises:
        OSError: it cannot be written.
    """
    from PIL import Image

    path = still_of(video, frame)
    temporary = path.with_suffix(".new")
    Image.fromarray(picture).save(temporary, "JPEG", quality=_QUALITY)
    temporary.replace(path)
    remove_stills(video, but=path)


def read_still(path: Path) -> bytes | None:
    """Return a still as JPEG; None where it is gone by now, or too large for one."""
    try:
        return path.read_bytes() if path.stat().st_size <= _MOST_BYTES else None
    except OSError:
        return None


def remove_stills(video: Path, *, but: Path | None = None) -> None:
    """Remove the stills of a video, all or all but one; what cannot be removed stays."""
    for path in video.parent.glob(f"{glob.escape(video.stem)}.{'[0-9]' * _DIGITS}.jpg"):
        if path != but:
            with suppress(OSError):
                path.unlink()
