"""The objects of a synthetic scene: where each is at a frame, and the masks and pictures that show it.

Knows no attention and writes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.masks import Instance, SceneMasks, instances_of
from lerobot_attn.synthetic.plan import SyntheticPlan

_HEIGHT, _WIDTH = 0.3, 0.6  # of an object: shares of the image's height, and of its strip's width


class Box(NamedTuple):
    """A rectangle, its edges as shares of the image's height and width, 0 to 1 from the top left."""

    top: float
    left: float
    bottom: float
    right: float

    @property
    def centre(self) -> tuple[float, float]:
        """(y, x) as shares of the image's height and width."""
        return (self.top + self.bottom) / 2, (self.left + self.right) / 2

    def mask(self, size_px: tuple[int, int]) -> NDArray[np.bool_]:
        """Return (height, width) bool: the pixels whose centre lies inside."""
        height, width = size_px
        y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
        inside: NDArray[np.bool_] = ((y >= self.top) & (y < self.bottom))[:, None] & (
            (x >= self.left) & (x < self.right)
        )
        return inside


def instances(plan: SyntheticPlan) -> tuple[Instance, ...]:
    """Return what masks show: the background, then the plan's objects in their order."""
    return instances_of(("background", *plan.objects), plan.objects, where="objects")


def mask_px(plan: SyntheticPlan) -> tuple[int, int]:
    """Return the (height, width) of a stored mask, which all cameras share, pixels."""
    sizes = list(plan.image_px.values())
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def planted_box(plan: SyntheticPlan, camera: int, name: str, frame: int) -> Box | None:
    """Return where a camera shows an object at a frame; None where it does not show it.

    Each object has a vertical strip of the image for itself, so that none hides another. It moves up and down
    from frame to frame; strips are handed on from inference to inference and from camera to camera.
    """
    number = list(plan.objects).index(name)
    inference = frame // plan.n_executed
    if number == 0 and inference in plan.out_of_sight:
        return None
    n = len(plan.objects)
    strip = (number + camera + inference) % n
    top = (1 - _HEIGHT) * ((3 * frame + 4 * number + 2 * camera) % 11) / 10
    left = (strip + (1 - _WIDTH) / 2) / n
    return Box(top, left, top + _HEIGHT, left + _WIDTH / n)


def planted_scene(plan: SyntheticPlan, frame: int) -> SceneMasks:
    """Return the masks of all cameras at a frame, as the store holds them at an inference's frame."""
    masks = {}
    for index, camera in enumerate(plan.image_px):
        mask = np.zeros(mask_px(plan), np.int16)
        for number, name in enumerate(plan.objects):
            box = planted_box(plan, index, name, frame)
            if box is not None:
                mask[box.mask(mask.shape)] = number + 1
        masks[camera] = mask
    positions = np.full((len(plan.objects) + 1, 3), np.nan, np.float32)  # the background is nowhere
    for number in range(len(plan.objects)):
        positions[number + 1] = 0.1 * number, 0.01 * frame, 0.9
    return SceneMasks(instances(plan), masks, positions)
