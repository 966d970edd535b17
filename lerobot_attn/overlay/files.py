"""Overlays as frames, as MP4 and as GIF."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lerobot_attn.errors import ConfigError, LerobotAttnError, StoreError
from lerobot_attn.overlay.film import Film
from lerobot_attn.overlay.settings import OverlaySettings
from lerobot_attn.sizes import Progress
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.references import RemoteVideo, file_of
from lerobot_attn.store.video import Frame, VideoWriter, count_frames

FORMATS = (".mp4", ".gif")
_GIF_FPS = 10.0  # frames beyond are left out: a README's clip has to stay small
_GIF_SIZE_PX = 224


@dataclass(frozen=True)
class WrittenOverlay:
    """What `write_overlay` wrote; as text its path and what is to be known of it.

    Attributes:
        path: the file.
        n_frames: frames in it.
        fps: frames per second.
        notes: what differs from what was asked for, e.g. frames that no camera video shows, or letters that
            no font of this machine has; usually empty.
    """

    path: Path
    n_frames: int
    fps: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the path, and the notes in parentheses."""
        return f"{self.path} ({'; '.join(self.notes)})" if self.notes else str(self.path)


def overlay_frames(
    episode: Episode, settings: OverlaySettings | None = None, progress: Progress | None = None
) -> Iterator[Frame]:
    """Yield the overlay's frames: the camera with the heatmap over it on the left, the pure map on the right.

    A header names camera, frame, layer, denoise step, head and action; a footer what the colours mean. Maps
    are read first, one inference at a time, and kept as patches (1 kB a frame for 16 × 16); images stream, so
    memory stays flat. Frames that the store has but a camera's video has not are left out at the end.

    Args:
        episode: from `open_episode`.
        settings: what to show, and how.
        progress: called as `progress(done, total)` with inferences read and frames drawn.

    Returns:
        An iterator over (height, width, 3) uint8, all of one size. Whatever can go wrong with the choice
        itself is raised before the first frame is asked for.

    Raises:
        SelectionError: a frame, layer, camera … that the episode does not hold.
        StoreError: the episode is empty or damaged, or has no video of the camera.
    """
    film = Film(episode, settings or OverlaySettings(), progress)
    return film.draw(film.frames, progress)


def write_overlay(
    episode: Episode,
    path: str | Path,
    settings: OverlaySettings | None = None,
    progress: Progress | None = None,
) -> WrittenOverlay:
    """Write the overlay as MP4 (H.264, for browsers) or, by the file's suffix, as GIF.

    A GIF shows at most 10 frames a second, or `settings.fps`; frames between are left out, and the result's
    notes say so. It is held in memory, one byte a pixel, so it is for clips.

    Args:
        episode: from `open_episode`.
        path: ….mp4 or ….gif; folders are made. It appears when the file is whole.
        settings: what to show, and how.
        progress: called as `progress(done, total)` with inferences read and frames drawn.

    Returns:
        What was written. Where a camera's video is shorter than the store, the frames that both have are
        written, and the notes say how many.

    Raises:
        ConfigError: another suffix, the file is one of the episode's own, or it cannot be written.
        SelectionError: a frame, layer, camera … that the episode does not hold.
        StoreError: the episode is empty or damaged, has no video of the camera, or encoding failed.
    """
    settings, path = settings or OverlaySettings(), Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(
            f"{path}: cannot write {path.suffix or 'no suffix'!r}, expected {' or '.join(FORMATS)}"
        )
    refuse_inputs(episode, path)
    film = Film(episode, settings, progress, max_size_px=_GIF_SIZE_PX if suffix == ".gif" else None)
    with replacing(path, "the overlay") as temporary:
        written = (_write_gif if suffix == ".gif" else _write_mp4)(film, temporary, progress)
    return WrittenOverlay(path, written.n_frames, written.fps, (*film.notes, *written.notes))


@contextmanager
def replacing(path: Path, what: str) -> Iterator[Path]:
    """Yield a name beside a file to write to, which then takes the file's place: it appears when it is whole.

    Raises:
        ConfigError: it cannot be written.
    """
    # Short, because the name that was asked for may be as long as a file system allows.
    temporary = path.with_name(f".{os.getpid()}.new{path.suffix.lower()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except LerobotAttnError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot write {what}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # nothing there is fine, a folder that could not be made as well
            temporary.unlink()


class _Written(NamedTuple):
    n_frames: int
    fps: float
    notes: tuple[str, ...] = ()


def _write_mp4(film: Film, path: Path, progress: Progress | None) -> _Written:
    writer = VideoWriter(path, fps=film.fps, size_px=film.size_px, fast=True)
    try:
        for frame in film.draw(film.frames, progress):
            writer.write(frame)
    finally:
        writer.close()
    found = count_frames(path)
    if found != len(film.frames):
        raise StoreError(
            f"{path}: the video encoder wrote {found} frames, expected {len(film.frames)}; is the disk full?"
        )
    return _Written(found, film.fps)


def _write_gif(film: Film, path: Path, progress: Progress | None) -> _Written:
    step = max(1, math.ceil(film.fps / _GIF_FPS - 1e-6)) if film.fps_is_free else 1
    # GIFs count hundredths of a second, and players take less than two for ten.
    hundredths = max(2, round(100 * step / film.fps))
    frames = film.frames[::step]
    palette = _palette(film, frames)
    images = (
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in film.draw(frames, progress)
    )
    first = next(images)
    first.save(
        path, format="GIF", save_all=True, append_images=images, duration=10 * hundredths, loop=0, disposal=1
    )
    fps = 100 / hundredths
    notes = (f"one of {step} frames, at {fps:.3g} frames/s",) if step > 1 else ()
    return _Written(len(frames), fps, notes)


def _palette(film: Film, frames: Sequence[int]) -> Image.Image:
    """Return 256 colours for the first, the middle and the last frame, and for the colour map."""
    sampled = sorted({frames[0], frames[len(frames) // 2], frames[-1]})
    stacked = np.concatenate(list(film.draw(sampled)))
    # A fifth of all pixels, or the images take every colour and the bar gets bands.
    ramp = film.scale.colours(np.linspace(0, film.scale.vmax, 256))
    stacked = np.concatenate([stacked, np.resize(ramp, (len(stacked) // 4, *stacked.shape[1:]))])
    return Image.fromarray(stacked).quantize(256, method=Image.Quantize.MEDIANCUT)


def refuse_inputs(episode: Episode, path: Path) -> None:
    """Refuse a path that is a folder or one of the episode's own files.

    Raises:
        ConfigError: it is.
    """
    target = path.resolve()
    here = [video for video in episode.videos.values() if not isinstance(video, RemoteVideo)]
    inputs = [file for file in (*map(file_of, here), episode.eval_video) if file]
    inside = isinstance(episode.path, Path) and target.is_relative_to(episode.path.resolve())
    if inside or target in [file.resolve() for file in inputs]:
        raise ConfigError(f"{path}: is one of the episode's own files; expected another name")
    if target.is_dir():
        raise ConfigError(f"{path}: is a folder, expected a file's name")
