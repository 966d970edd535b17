"""Frames of a camera's video as JPEG, by frame number.

A browser's video element cannot seek to an exact frame, so the page gets pictures. They are decoded in blocks
and kept in memory up to a limit.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lerobot_attn.errors import StoreError
from lerobot_attn.video import read_frames

_BLOCK = 32  # frames decoded at once: decoding begins at the video's start, so neighbours are nearly free
_QUALITY = 90

Key = tuple[Path, int, int]  # file, its time of change, frame


class FramePictures:
    """A cache of frames as JPEG.

    Args:
        max_bytes: memory that the pictures may take.
    """

    def __init__(self, max_bytes: int = 128_000_000):
        self._max_bytes = max_bytes
        self._bytes = 0
        self._pictures: OrderedDict[Key, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._decoding = threading.Lock()

    def picture(self, video: Path, frame: int, size_px: tuple[int, int] | None) -> bytes:
        """Return one frame as JPEG.

        Args:
            video: the file.
            frame: number, from 0.
            size_px: (height, width) to crop to: the encoder pads odd sizes.

        Raises:
            StoreError: the file is missing or no video, or has no such frame.
        """
        try:
            changed = video.stat().st_mtime_ns
        except OSError as error:
            raise StoreError(f"{video.name}: no such video file") from error
        key = (video, changed, frame)
        found = self._held(key)
        if found is None:
            with self._decoding:  # one at a time: who waited may find it decoded
                found = self._held(key) or self._decode(key, size_px)
        return found

    def _held(self, key: Key) -> bytes | None:
        with self._lock:
            found = self._pictures.get(key)
            if found is not None:
                self._pictures.move_to_end(key)
            return found

    def _decode(self, key: Key, size_px: tuple[int, int] | None) -> bytes:
        video, changed, frame = key
        first = frame - frame % _BLOCK
        wanted = None
        try:
            for number, image in enumerate(
                read_frames(video, size_px=size_px, numbers=range(first, first + _BLOCK)), start=first
            ):
                picture = jpeg(image)
                self._hold((video, changed, number), picture)
                if number == frame:
                    wanted = picture
        except StoreError:
            # The block reaches beyond the last frame; what was asked for may have come before.
            if wanted is None:
                raise
        assert wanted is not None
        return wanted

    def _hold(self, key: Key, picture: bytes) -> None:
        with self._lock:
            if key in self._pictures:
                return
            self._pictures[key] = picture
            self._bytes += len(picture)
            while self._bytes > self._max_bytes and len(self._pictures) > 1:
                _, dropped = self._pictures.popitem(last=False)
                self._bytes -= len(dropped)


def jpeg(image: NDArray[np.uint8]) -> bytes:
    """Return an image, (height, width, 3) uint8, as JPEG without subsampled colours."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=_QUALITY, subsampling=0)
    return stream.getvalue()
