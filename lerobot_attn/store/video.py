"""Camera MP4s in and out, frame by frame. Knows nothing of episodes or attention."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from lerobot_attn.errors import StoreError
from lerobot_attn.store.references import Clip, Video, file_of

Frame = NDArray[np.uint8]  # (height, width, 3), RGB


def find_encoder() -> None:
    """Find ffmpeg; a second call costs nothing.

    imageio-ffmpeg tries it out in a process; one that was ended by a Ctrl-C would be taken for missing.

    Raises:
        StoreError: there is none.
    """
    try:
        with _signals_kept_away():
            imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise StoreError(f"no video encoder: {error}") from error


@contextmanager
def _signals_kept_away() -> Iterator[None]:
    """Keep what ends a recording, and is sent to all of its processes, from those that are started here.

    That is a terminal's Ctrl-C and a cluster's SIGTERM, SIGUSR1 and SIGUSR2: an encoder that ended then would
    leave out what is still queued. imageio-ffmpeg moves its processes out of the terminal's reach by Python
    code that they run first: a Ctrl-C that comes then would end them.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where it uses other means
        yield
        return
    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # which processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class VideoWriter:
    """Writes RGB frames to an H.264 MP4 that browsers play.

    The encoder is a process of its own, which finishes the file even if this one is killed. Odd sizes are
    padded by one row or column, which players crop away again only if told: `read_frames` does so when given
    the size.

    Args:
        path: the MP4.
        fps: frames per second.
        size_px: (height, width) of the frames.
        fast: spend a third less time, for larger files of somewhat less quality: for what is only looked at.

    Raises:
        StoreError: there is no encoder.
    """

    def __init__(self, path: Path, *, fps: float, size_px: tuple[int, int], fast: bool = False):
        self.path = path
        self.size_px = size_px
        self.n_frames = 0
        self._pad = (size_px[0] % 2, size_px[1] % 2)
        find_encoder()
        self._process: Any = imageio_ffmpeg.write_frames(
            _url(path),
            (size_px[1] + self._pad[1], size_px[0] + self._pad[0]),
            fps=fps,
            codec="libx264",
            pix_fmt_out="yuv420p",
            macro_block_size=1,
            ffmpeg_log_level="error",
            output_params=[
                *("-crf", "20" if fast else "16"),
                *("-preset", "superfast" if fast else "veryfast"),
                *("-movflags", "+faststart"),
            ],
        )
        with _signals_kept_away():
            self._process.send(None)

    def write(self, frame: Frame) -> None:
        """Append a frame.

        Args:
            frame: (height, width, 3) uint8.

        Raises:
            StoreError: the frame's shape differs, or the encoder died.
        """
        if frame.shape != (*self.size_px, 3) or frame.dtype != np.uint8:
            raise StoreError(
                f"{self.path}: got a frame of shape {frame.shape} {frame.dtype}, expected "
                f"{(*self.size_px, 3)} uint8"
            )
        if any(self._pad):
            frame = np.pad(frame, ((0, self._pad[0]), (0, self._pad[1]), (0, 0)), mode="edge")
        try:
            self._process.send(np.ascontiguousarray(frame))
        except (OSError, StopIteration) as error:
            raise StoreError(f"{self.path}: the video encoder stopped: {error}") from error
        self.n_frames += 1

    def close(self) -> None:
        """Finish the file."""
        self._process.close()


def read_frames(
    video: Video, *, size_px: tuple[int, int] | None = None, numbers: Iterable[int] | None = None
) -> Iterator[Frame]:
    """Yield the frames of a video, (height, width, 3) uint8, in order.

    Args:
        video: a file, or a part of one.
        size_px: (height, width) to crop to, for videos of odd sizes.
        numbers: frame numbers wanted, from 0, ascending; all by default. Those of a file are found by
            decoding from the start, so they are exact, whatever the file's timestamps say; those of a part
            by their times, which must be those of its frames per second.

    Raises:
        StoreError: the file is missing or no video, or ends before a wanted frame, or lacks it.
    """
    wanted = None if numbers is None else iter(numbers)
    next_one = 0 if wanted is None else next(wanted, None)
    if next_one is None:
        return
    n_frames = 0
    for number, frame in _numbered(video, next_one):
        n_frames = number + 1
        if number < next_one:
            continue
        image = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
        yield image if size_px is None else image[: size_px[0], : size_px[1]]
        following = n_frames if wanted is None else next(wanted, None)
        if following is None:
            return
        if following < n_frames:
            raise ValueError(f"numbers must ascend, got {following} after {next_one}")
        next_one = following
    if wanted is not None:
        has = "it ends before" if isinstance(video, Clip) else f"has {n_frames} frames, expected"
        raise StoreError(f"{video}: {has} a frame {next_one} in it")


def count_frames(video: Video) -> int:
    """Return the number of frames of a video, by decoding it.

    Raises:
        StoreError: the file is missing or no video.
    """
    return sum(1 for _ in _numbered(video, 0))


def frame_size_px(path: Path) -> tuple[int, int]:
    """Return (height, width) of a video's frames, as its file says.

    Raises:
        StoreError: the file is missing or no video.
    """
    with _opened(path) as (_, stream):
        return int(stream.codec_context.height), int(stream.codec_context.width)


def frame_rate(path: Path) -> float:
    """Return a video's frames per second, as its file says.

    Raises:
        StoreError: the file is missing, no video, or does not say it.
    """
    with _opened(path) as (_, stream):
        if not stream.average_rate:
            raise StoreError(f"{path}: does not say its frames per second")
        return float(stream.average_rate)


def _url(path: str | Path) -> str:
    """Return a path as ffmpeg takes it literally: `run:a/x.mp4` would name a protocol, `-x.mp4` an option."""
    return f"file:{Path(path).absolute()}"


def _numbered(video: Video, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield frames that are not converted to RGB yet, with their numbers; of a part from `first` on.

    Raises:
        StoreError: a part lacks a frame between others.
    """
    if not isinstance(video, Clip):
        yield from enumerate(_decode(file_of(video)))
        return
    expected = min(first, video.n_frames)
    # A file's frames may depend on others before a place that one can jump to; then all are decoded.
    for start_s in (video.start_s + first / video.fps, None):
        for frame in _decode(video.path, start_s) if expected < video.n_frames else ():
            if frame.pts is None or frame.time_base is None:
                raise StoreError(f"{video.path}: its frames have no times, expected those of a data set")
            number = round((float(frame.pts * frame.time_base) - video.start_s) * video.fps)
            if number < expected:
                continue
            if number > expected:
                break
            yield number, frame
            expected += 1
            if expected == video.n_frames:
                return
        else:
            return
        if expected > first:
            raise StoreError(f"{video}: frame {expected} is missing in it")


def _decode(path: Path, start_s: float | None = None) -> Iterator[av.VideoFrame]:
    """Yield decoded frames that are not converted to RGB yet: what is skipped costs little.

    Args:
        path: the file.
        start_s: begin at a frame before that time that can be decoded by itself; None: at the file's start.
    """
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        if start_s:
            container.seek(int(start_s / stream.time_base), stream=stream)
        yield from container.decode(stream)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video; what goes wrong with it, in the block too, is an error of ours."""
    if not path.is_file():
        raise StoreError(f"{path}: no such video file")
    try:
        with av.open(_url(path)) as container:
            stream = next(iter(container.streams.video), None)
            # A file cut off inside its header has a stream without a decoder; PyAV crashes on using it.
            if stream is None or stream.codec_context is None:
                raise StoreError(f"{path}: not a readable video: it holds no pictures")
            yield container, stream
    except av.FFmpegError as error:
        raise StoreError(f"{path}: not a readable video: {str(error).splitlines()[0]}") from error
