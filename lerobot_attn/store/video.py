"""Camera MP4s in and out, frame by frame. Knows nothing of episodes or attention."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
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
    leave out what is still queued.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where processes of a group of their own get none
        yield
        return
    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # which processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a process that reads its input from here, out of a terminal's reach.

    It is started without a copy of this process (no `preexec_fn`): while a process with a policy in it is
    copied nothing else runs, and afterwards each of its pages has to be claimed again.
    """
    group: dict[str, Any] = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined]
        if sys.platform == "win32"
        else {"process_group": 0}
    )
    with _signals_kept_away():
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, **group)


class VideoWriter:
    """Writes RGB frames to an H.264 MP4 that browsers play.

    The encoder is a process of its own, which finishes the file even if this one is killed. Odd sizes are
    padded by one row or column, which players crop away again only if told: `read_frames` does so when given
    the size.

    Args:
        path: the MP4.
        fps: frames per second.
        size_px: (height, width) of the frames.
        fast: be done as soon as can be, with somewhat less quality: for what is only looked at.

    Raises:
        StoreError: there is no encoder.
    """

    def __init__(self, path: Path, *, fps: float, size_px: tuple[int, int], fast: bool = False):
        self.path = path
        self.size_px = size_px
        self.n_frames = 0
        self._pad = (size_px[0] % 2, size_px[1] % 2)
        find_encoder()
        height, width = (size + pad for size, pad in zip(size_px, self._pad, strict=True))
        self._process = _start(
            [
                imageio_ffmpeg.get_ffmpeg_exe(),
                *("-y", "-v", "error"),
                *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"),
                *("-r", str(Fraction(fps).limit_denominator()), "-i", "-"),
                *("-c:v", "libx264", "-pix_fmt", "yuv420p"),
                # A fast preset makes larger files, which is little beside maps, and leaves the cores to the
                # policy and the renderer. So does a single thread, where nobody waits for the file.
                *("-preset", "superfast", *(("-crf", "20") if fast else ("-crf", "18", "-threads", "1"))),
                *("-movflags", "+faststart", _url(path)),
            ]
        )
        assert self._process.stdin is not None
        self._input = self._process.stdin

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
            self._input.write(np.ascontiguousarray(frame).data)
        except (OSError, ValueError) as error:  # ValueError: its input was closed
            raise StoreError(f"{self.path}: the video encoder stopped: {error}") from error
        self.n_frames += 1

    def close(self) -> None:
        """Finish the file; a second call does nothing.

        What became of it the file says: an encoder that died leaves none, or one that cannot be read.
        """
        with suppress(OSError):  # of an encoder that died
            self._input.close()
        try:
            self._process.wait()
        except BaseException:  # e.g. a second Ctrl-C
            self._process.kill()
            raise


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
