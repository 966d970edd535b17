"""The camera videos beside an episode's store, on the writer's thread. One that fails does not cost the maps.

Knows no attention and no store.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import numpy as np

from lerobot_attn.errors import StoreError, first_line
from lerobot_attn.recording.plan import EpisodePlan
from lerobot_attn.store.stills import remove_stills, write_still
from lerobot_attn.store.video import VideoWriter

logger = logging.getLogger(__name__)


class CameraVideos:
    """One MP4 per camera, `{store's stem}.{camera}.mp4`.

    Args:
        plan: whose videos they are.
        stills: whether somebody watches, who gets the newest inference's pictures while videos are written.

    Attributes:
        errors: camera → why its video could not be written; there is no file of it then.
        n_repeated: frames that show the pictures of the frame before.
    """

    def __init__(self, plan: EpisodePlan, *, stills: bool = False):
        self.errors: dict[str, str] = {}
        self.n_repeated = 0
        self._last: dict[str, np.ndarray] = {}
        self._plan = plan
        self._stills = stills
        self._still_of: dict[str, int] = {}  # camera → the inference whose first frame its still shows
        self._videos: dict[str, VideoWriter] = {}

    def write(self, camera: str, picture: np.ndarray, inference: int | None = None) -> None:
        """Append what a camera showed. A failure is noted, not raised.

        Args:
            camera: which.
            picture: (height, width, 3) uint8.
            inference: number of the newest inference; the first frame after it has a still.
        """
        if camera in self.errors:
            return
        try:
            if camera not in self._videos:
                self._videos[camera] = self._open(camera, picture)
            self._videos[camera].write(picture)
            self._last[camera] = picture
            if self._stills and inference is not None and inference != self._still_of.get(camera):
                self._still_of[camera] = inference
                self._write_still(self._videos[camera], picture)
        except Exception as error:  # an encoder fails in many ways, and the maps matter more
            self._give_up(camera, error)

    def repeat(self) -> None:
        """Append what every camera showed last."""
        self.n_repeated += 1
        for camera, picture in self._last.items():
            self.write(camera, picture)

    def close(self, n_frames: int | None) -> dict[str, dict[str, Any]]:
        """Finish the videos; return what the store says of those that are there.

        Args:
            n_frames: how many frames each must show; None where the episode was cut off.
        """
        for camera, video in list(self._videos.items()):
            try:
                video.close()
                remove_stills(video.path)
                if not video.path.is_file():
                    raise StoreError(f"{video.path}: the video encoder wrote no file")
                if n_frames is not None and video.n_frames != n_frames:
                    raise StoreError(
                        f"{video.path}: got {video.n_frames} pictures, expected one for each of the "
                        f"{n_frames} frames"
                    )
            except Exception as error:
                self._give_up(camera, error)
        return {
            camera: {
                "path": video.path.name,
                "fps": self._plan.fps,
                "n_frames": video.n_frames,
                "height_px": video.size_px[0],
                "width_px": video.size_px[1],
            }
            for camera, video in self._videos.items()
        }

    def remove(self) -> None:
        """Delete the files."""
        for video in self._videos.values():
            video.path.unlink(missing_ok=True)
            remove_stills(video.path)

    def _write_still(self, video: VideoWriter, picture: np.ndarray) -> None:
        try:
            write_still(video.path, video.n_frames - 1, picture)
        except Exception as error:  # who watches sees no picture; the video matters more
            logger.debug("No still beside %s: %s", video.path, first_line(error))

    def _open(self, camera: str, picture: np.ndarray) -> VideoWriter:
        taken = {video.path for video in self._videos.values()}
        path = self._path(camera.rsplit(".", 1)[-1])
        if path in taken:  # two cameras with one short name
            path = self._path(camera)
        return VideoWriter(path, fps=self._plan.fps, size_px=(picture.shape[0], picture.shape[1]))

    def _path(self, name: str) -> Any:
        # A camera's name may hold a slash, a file's may not.
        return self._plan.path.with_name(f"{self._plan.path.stem}.{name.replace('/', '_')}.mp4")

    def _give_up(self, camera: str, error: BaseException) -> None:
        self.errors[camera] = first_line(error)
        logger.error("The video of %s in %s failed: %s", camera, self._plan.name, first_line(error))
        video = self._videos.pop(camera, None)
        if video is not None:
            with suppress(Exception):  # the encoder is dead already
                video.close()
            with suppress(OSError):
                video.path.unlink(missing_ok=True)
            remove_stills(video.path)
