"""Instance masks of an episode's inferences, as rows of its store.

The first inference's masks say which cameras and instances there are, and how large a mask is. Knows
`SceneMasks` and the schema; knows neither a simulator nor a file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.errors import CaptureError
from lerobot_attn.masks import UNKNOWN, SceneMasks, scaled
from lerobot_attn.store.schema import coordinates_of_masks


class SceneRows:
    """Rows of one episode.

    Args:
        first: the masks of its first inference.

    Attributes:
        arrays: names of the arrays that every inference of the episode has.
        sizes: dimension → size.
        coordinates: fixed array → values.

    Raises:
        CaptureError: there is no mask, or it does not fit its instances.
    """

    def __init__(self, first: SceneMasks):
        if not first.masks or not first.instances:
            raise CaptureError("masks: got none of any camera, expected at least one, and its instances")
        self._instances = first.instances
        self._cameras = tuple(first.masks)
        shapes = [mask.shape for mask in first.masks.values()]
        self._size_px = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
        self.arrays = {"segmentation"} | ({"instance_position"} if first.positions is not None else set())
        self.sizes = {
            "mask_camera": len(self._cameras),
            "mask_y": self._size_px[0],
            "mask_x": self._size_px[1],
            "instance": len(self._instances),
            "xyz": 3,
        }
        self.coordinates = coordinates_of_masks(self._cameras, self._instances)

    def rows(self, scene: SceneMasks | None) -> dict[str, NDArray[Any]]:
        """Return array → an inference's row; of one without masks, that nobody knows.

        Raises:
            CaptureError: other instances or cameras than the first inference's, or numbers that mean nothing.
        """
        masks = np.full((len(self._cameras), *self._size_px), UNKNOWN, np.int16)
        positions = np.full((len(self._instances), 3), np.nan, np.float32)
        if scene is not None:
            self._check(scene)
            for number, camera in enumerate(self._cameras):
                if camera in scene.masks:
                    masks[number] = scaled(np.asarray(scene.masks[camera]), self._size_px)
            if scene.positions is not None:
                positions[:] = scene.positions
        rows: dict[str, NDArray[Any]] = {"segmentation": masks, "instance_position": positions}
        return {name: row for name, row in rows.items() if name in self.arrays}

    def _check(self, scene: SceneMasks) -> None:
        if scene.instances != self._instances:
            odd = sorted({*scene.instances} ^ {*self._instances})
            raise CaptureError(
                f"masks: got other instances or roles than at the first inference, expected the same in the "
                f"same order; they differ in {', '.join(one.name for one in odd) or 'their order'}"
            )
        new = [camera for camera in scene.masks if camera not in self._cameras]
        if new:
            raise CaptureError(
                f"masks: got some of {new[0]}, expected those of the first inference's cameras: "
                f"{', '.join(self._cameras)}"
            )
        for camera, mask in scene.masks.items():
            values = np.asarray(mask)
            if values.ndim != 2 or values.dtype.kind not in "iu" or not values.size:
                raise CaptureError(
                    f"masks: {camera} has shape {values.shape} of {values.dtype}, expected (height, width) "
                    "of whole numbers"
                )
            if values.min() < UNKNOWN or values.max() >= len(self._instances):
                raise CaptureError(
                    f"masks: {camera} has numbers {values.min()} to {values.max()}, expected -1 (unknown) to "
                    f"{len(self._instances) - 1}, the last instance"
                )
