"""What the cameras of an episode showed: the frames of their videos, or blank ones and the reason for it.

Knows videos and the size of images, not attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn import analysis
from lerobot_attn.errors import StoreError, first_line
from lerobot_attn.figures.look import LookSettings
from lerobot_attn.layout import ImageGeometry
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.references import Clip
from lerobot_attn.store.video import Frame, read_frames

_BLANK = 128  # grey of a frame that is not there: bright and dark colours of a map show on it


class Pictures(NamedTuple):
    """Frames of a camera, (height, width, 3) uint8 each, and why some of them are blank; "" if none is."""

    images: list[Frame]
    is_blank: list[bool]
    reason: str


def on_image(
    heatmap: xr.DataArray, geometry: ImageGeometry, image: Frame, settings: LookSettings
) -> NDArray[np.float32]:
    """Put a heatmap (…, grid_y, grid_x) on the pixels of a camera's image: (…, height, width)."""
    height, width, _ = image.shape
    return analysis.on_camera_pixels(
        heatmap, geometry, size_px=(height, width), interpolation=settings.interpolation
    )


def camera_pictures(episode: Episode, camera: str, frames: Sequence[int]) -> Pictures:
    """Return the camera's frames; blank ones of the camera's size where its video is missing or too short.

    Args:
        episode: from `open_episode`.
        camera: its full name.
        frames: frame numbers, in any order.
    """
    found: dict[int, Frame] = {}
    reason = ""
    numbers = sorted(set(frames))
    if camera not in episode.videos:
        reason = episode.why_no_video(camera)
    else:
        size_px = episode.image_size_px(camera)
        try:
            for number, image in zip(
                numbers, read_frames(episode.videos[camera], size_px=size_px, numbers=numbers), strict=True
            ):
                found[number] = image
        except StoreError as error:
            reason = _without_path(error, episode, camera)
    height, width = episode.image_size_px(camera) or next(
        (image.shape[:2] for image in found.values()), (224, 224)
    )
    blank = np.full((height, width, 3), _BLANK, np.uint8)
    return Pictures(
        [found.get(frame, blank) for frame in frames], [frame not in found for frame in frames], reason
    )


def _without_path(error: StoreError, episode: Episode, camera: str) -> str:
    """Return what is wrong with a video by its name alone: a caption has no room for whole paths."""
    path = str(video.path if isinstance(video := episode.videos[camera], Clip) else video)
    return first_line(error).replace(path, path.replace("\\", "/").rpartition("/")[2])
