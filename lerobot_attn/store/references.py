"""Videos that an episode's store points to instead of bringing its own: parts of a data set's files.

A store may come from a stranger, and what it points to may lie anywhere. So a reference says how long its
file is and what its two ends hold, and no other file is shown: who wrote the reference has had that very
file, so no store leads to a file whose contents its maker did not know. A data set that was encoded anew is
refused for the same reason, because its frames may lie elsewhere.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

_SUFFIX = ".mp4"
_END_BYTES = 65536


@dataclass(frozen=True)
class Clip:
    """A part of a video file: the frames of one episode, where several share a file.

    Attributes:
        path: the file.
        start_s: time of the part's first frame in the file.
        fps: frames per second; frame t is at start_s + t / fps.
        n_frames: how many there are.
        content: what the file holds, as `content_of` says it; "": not known.
    """

    path: Path
    start_s: float
    fps: float
    n_frames: int
    content: str = ""

    def __str__(self) -> str:
        """Return the file's name and where in it the part lies, for messages."""
        return f"{self.path}, {self.n_frames} frames from {self.start_s:.2f} s"


def film_of(store: Path, attributes: Mapping[str, Any]) -> Path | None:
    """Return the evaluation's own MP4 of an episode, where the file exists.

    It is looked for in the run's `videos` and in the store's own folder alone, whatever the store says.

    Args:
        store: where the episode lies.
        attributes: what its store says of itself.
    """
    video = attributes.get("eval_video")
    if not isinstance(video, dict) or not isinstance(video.get("path"), str):
        return None
    try:
        parents = store.resolve().parents
        path = (store.parent / video["path"]).resolve()
        # Three folders up is the run, or, of a store that was moved, anything.
        folders = [parents[0], *(parent / "videos" for parent in parents[2:3])]
        inside = any(path.is_relative_to(folder) for folder in folders)
        return path if inside and path.suffix == _SUFFIX and path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, a loop of links, a null byte
        return None


@dataclass(frozen=True)
class RemoteVideo:
    """A video at a URL: its file is fetched when it is first asked for.

    Attributes:
        url: where it is, as text.
        fetch: returns a copy on this machine.
    """

    url: str
    fetch: Callable[[], Path]

    def __str__(self) -> str:
        """Return where it is."""
        return self.url


Video = Path | Clip | RemoteVideo


def file_of(video: Video) -> Path:
    """Return the file that holds a video, perhaps among others.

    Raises:
        StoreError: it is at a URL, and cannot be fetched.
    """
    if isinstance(video, RemoteVideo):
        return video.fetch()
    return video.path if isinstance(video, Clip) else video


def reference_to(clip: Clip, store: Path, size_px: tuple[int, int]) -> dict[str, Any]:
    """Return what a store says of a video that it points to.

    Args:
        clip: the part of a file that shows the episode.
        store: the store that says it.
        size_px: (height, width) of the frames.

    Raises:
        OSError: the file cannot be read.
    """
    file = clip.path.absolute()
    try:
        path = Path(os.path.relpath(file, store.absolute().parent)).as_posix()
    except ValueError:  # on another drive
        path = file.as_posix()
    return {
        "reference": True,
        "path": path,
        "absolute_path": file.as_posix(),
        "content": content_of(file),
        "start_s": clip.start_s,
        "fps": clip.fps,
        "n_frames": clip.n_frames,
        "height_px": size_px[0],
        "width_px": size_px[1],
    }


def referenced(video: Mapping[str, Any], store: Path, n_frames: int) -> Clip | None:
    """Return the part of a file that a store points to; None where the very file is not there.

    It is looked for beside the store first, so a store and its data set can be moved together, then where
    it was.

    Args:
        video: what the store says of it.
        store: the store.
        n_frames: frames that the store holds; the part shows no more.
    """
    start, fps, count = (video.get(name) for name in ("start_s", "fps", "n_frames"))
    if not _is_number(start) or not _is_number(fps) or type(count) is not int or not fps or count < 0:
        return None
    for name in (video.get("path"), video.get("absolute_path")):
        # Where two slashes begin a path, looking at it may ask another machine.
        if not isinstance(name, str) or name.replace("\\", "/").startswith("//"):
            continue
        path = store.parent / name
        if path.suffix.lower() == _SUFFIX and _holds(path, video.get("content")):
            path = Path(os.path.normpath(path))
            return Clip(path, float(start), float(fps), min(count, n_frames), str(video["content"]))
    return None


def is_unchanged(clip: Clip) -> bool:
    """Return whether a clip's file is still the one that its store means."""
    return _holds(clip.path, clip.content)


def content_of(path: Path) -> str:
    """Return what tells a file from all others: its size in bytes, and the SHA-256 of its two ends.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        ends = hashlib.sha256(file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        ends.update(file.read(_END_BYTES))
    return f"{size}-{ends.hexdigest()}"


def _holds(path: Path, content: Any) -> bool:
    try:
        return isinstance(content, str) and path.is_file() and content_of(path) == content
    except (OSError, ValueError, RuntimeError):  # too long a name, a loop of links, a null byte
        return False


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0
