"""The check of an episode's instance masks: numbers, sizes, roles, cameras. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lerobot_attn.errors import Check
from lerobot_attn.masks import UNKNOWN
from lerobot_attn.store.chunks import stored_arrays
from lerobot_attn.store.reader import Episode

NAME = "masks"


def masks(episode: Episode, inferences: Sequence[int]) -> list[Check]:
    """Check that masks show instances that there are, of cameras of the layout, and how much is known.

    Args:
        episode: from `open_episode`; without masks there is nothing to check.
        inferences: those that are looked at.
    """
    # As they are stored: the dataset refuses numbers that mean nothing, which are what is looked for here.
    arrays = stored_arrays(episode)
    if "segmentation" not in arrays:
        return []
    instances, cameras = episode.instances, episode.arrays["mask_camera"].values.tolist()
    wrong = []
    names = [instance.name for instance in instances]
    if len(set(names)) < len(names):
        wrong.append("two instances have one name")
    if not instances or instances[0].role != "background":
        wrong.append("the first instance is no background")
    sizes = {camera.name: camera.geometry for camera in episode.layout.cameras}
    height, width = arrays["segmentation"].array.shape[2:]
    for camera in cameras:
        geometry = sizes.get(camera)
        if geometry is None:
            wrong.append(f"{camera} is no camera of the layout")
        elif len(cameras) == 1 and abs(height / width - geometry.height_px / geometry.width_px) > 0.05:
            image = f"{geometry.height_px} x {geometry.width_px}"
            wrong.append(f"masks are {height} x {width}, the images of {camera} {image}")
    known = []
    for inference in inferences:
        values = np.asarray(arrays["segmentation"].array[inference])
        odd = values[(values < UNKNOWN) | (values >= len(instances))]
        if len(odd):
            wrong.append(
                f"inference {inference} shows instance {int(odd[0])}, there are 0 to {len(instances) - 1}"
            )
        known.append(float((values != UNKNOWN).mean()))
    if wrong:
        return [Check.of(NAME, False, "; ".join(wrong))]
    share = f"{np.mean(known):.0%} of the pixels are known" if known else "no inference has one"
    return [Check.of(NAME, True, f"{len(instances)} instances, {len(cameras)} cameras, {share}")]
