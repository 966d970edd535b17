"""Frames of a camera's video as JPEG, by frame number.

A browser's video element cannot seek to an exact frame, so the page gets pictures. Decoding always begins
at the video's start. So a decoder stays open, because the next frame is likely to be asked for next, and
pictures are kept in memory, up to a limit, because people go back.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lerobot_attn.errors import StoreError
from lerobot_attn.store.references import Clip, Video, file_of
from lerobot_attn.store.video import Frame, read_frames

# Frames that are kept on the way to a wanted one; one further ahead is sooner found from the video's start.
_BLOCK = 32
_MAX_DECODERS = 4  # enough for two episodes of two cameras side by side
_QUALITY = 90


class _Video(NamedTuple):
    """A video as it is now."""

    source: Video
    version: str
    size_px: tuple[int, int] | None


def video_version(video: Video) -> str | None:
    """Return what changes with a video's file: 8 hexadecimal digits; None where there is no file."""
    try:
        found = file_of(video).stat()
    except OSError:
        return None
    part = f" {video.start_s} {video.n_frames}" if isinstance(video, Clip) else ""
    return hashlib.sha256(f"{found.st_mtime_ns} {found.st_size}{part}".encode()).hexdigest()[:8]


class FramePictures:
    """A cache of frames as JPEG. Safe to use from several threads.

    Args:
        max_bytes: memory that the pictures may take.
    """

    def __init__(self, max_bytes: int = 128_000_000):
        self._max_bytes = max_bytes
        self._bytes = 0
        self._pictures: OrderedDict[tuple[_Video, int], bytes] = OrderedDict()
        self._decoders: OrderedDict[_Video, _Decoder] = OrderedDict()
        self._lock = threading.Lock()

    def picture(self, video: Video, frame: int, size_px: tuple[int, int] | None) -> bytes:
        """Return one frame as JPEG.

        Args:
            video: the file, or the episode's part of one.
            frame: number, from 0.
            size_px: (height, width) to crop to: the encoder pads odd sizes.

        Raises:
            StoreError: the file is missing or no video, or has no such frame.
        """
        version = video_version(video)
        if version is None:
            raise StoreError(f"{file_of(video).name}: no such video file")
        source = _Video(video, version, size_px)
        found = self._held(source, frame)
        if found is None:
            decoder = self._decoder(source)
            with decoder.lock:  # while this thread waited, another may have decoded the frame
                found = self._held(source, frame) or self._decode(source, decoder, frame)
        return found

    def _decoder(self, source: _Video) -> _Decoder:
        with self._lock:
            found = self._decoders.setdefault(source, _Decoder(source))
            self._decoders.move_to_end(source)
            while len(self._decoders) > _MAX_DECODERS:
                self._decoders.popitem(last=False)
            return found

    def _decode(self, source: _Video, decoder: _Decoder, frame: int) -> bytes:
        picture = b""
        for number, image in decoder.until(frame):
            picture = jpeg(image)
            self._hold(source, number, picture)
        return picture

    def _held(self, source: _Video, frame: int) -> bytes | None:
        with self._lock:
            found = self._pictures.get((source, frame))
            if found is not None:
                self._pictures.move_to_end((source, frame))
            return found

    def _hold(self, source: _Video, frame: int, picture: bytes) -> None:
        with self._lock:
            if (source, frame) in self._pictures:
                return
            self._pictures[source, frame] = picture
            self._bytes += len(picture)
            while self._bytes > self._max_bytes and len(self._pictures) > 1:
                _, dropped = self._pictures.popitem(last=False)
                self._bytes -= len(dropped)


class _Decoder:
    """A video that is open at some frame. Hold its `lock` to use it."""

    def __init__(self, source: _Video):
        self.lock = threading.Lock()
        self._source = source
        self._frames: Iterator[Frame] | None = None
        self._next = 0

    def until(self, frame: int) -> Iterator[tuple[int, Frame]]:
        """Yield the frames from where the decoder is up to the wanted one, each with its number.

        Raises:
            StoreError: the file is no video, or has no such frame.
        """
        if self._frames is None or not self._next <= frame < self._next + _BLOCK:
            self._next = frame - frame % _BLOCK
            self._frames = read_frames(
                self._source.source, size_px=self._source.size_px, numbers=itertools.count(self._next)
            )
        try:
            while self._next <= frame:
                image = next(self._frames)
                self._next += 1
                yield self._next - 1, image
        except StoreError:
            self._frames = None
            raise


def jpeg(image: NDArray[np.uint8], *, quality: int = _QUALITY, small: bool = False) -> bytes:
    """Return an image as JPEG.

    Args:
        image: (height, width, 3) uint8.
        quality: 1 to 95.
        small: spend time on a smaller file, and halve the resolution of colours, as videos do.
    """
    stream = io.BytesIO()
    subsampling = "4:2:0" if small else "4:4:4"
    Image.fromarray(image).save(stream, "JPEG", quality=quality, subsampling=subsampling, optimize=small)
    return stream.getvalue()
