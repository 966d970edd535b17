"""The check of the vision tower's maps: rows sum to 1, cameras and patches are what they say they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lerobot_attn.analysis.vision import VISION
from lerobot_attn.errors import Check
from lerobot_attn.store.damage import is_missing, missing_chunks
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.schema import coordinates_of_patches

_NAME = "vision maps"


def vision_maps(episode: Episode, inferences: Sequence[int]) -> list[Check]:
    """Check the vision tower's maps of some inferences, one camera and layer at a time.

    Returns:
        One check; none of an episode that was recorded without vision layers.
    """
    data = episode.arrays
    if VISION not in data:
        return []
    shown = [camera.name for camera in episode.layout.cameras if not camera.is_empty]
    cameras, layers = data["camera"].values.tolist(), data["vision_layer"].values.tolist()
    if cameras != shown:
        return [Check.of(_NAME, False, f"they are of {cameras}, the layout's cameras with an image {shown}")]
    rows, columns = (int(data[name].values.max(initial=-1)) + 1 for name in ("patch_row", "patch_column"))
    for name, expected in coordinates_of_patches((rows, columns)).items():
        if not np.array_equal(data[name].values, expected):
            return [Check.of(_NAME, False, f"{name} is not that of a grid of {rows} x {columns}, row by row")]
    if data.sizes["patch_query"] != rows * columns:
        return [
            Check.of(
                _NAME, False, f"{data.sizes['patch_query']} patches attend, {rows * columns} are attended"
            )
        ]
    tolerance, missing = episode.row_sum_tolerance(rows * columns), missing_chunks(episode)
    worst, worst_at, n_rows, n_left_out = -1.0, "", 0, 0
    for inference in inferences:
        for camera, layer in np.ndindex(len(cameras), len(layers)):
            if is_missing(missing, VISION, (inference, camera, layer)):
                n_left_out += 1
                continue
            try:
                maps = data[VISION].variable[inference, camera, layer].values
            except Exception:  # a damaged chunk, which the check of all chunks names
                n_left_out += 1
                continue
            sums = maps.sum(axis=-1, dtype=np.float64)
            n_rows += sums.size
            # A row of NaN is as far from 1 as can be.
            deviation = float(np.nan_to_num(np.abs(sums - 1), nan=np.inf).max(initial=0))
            if deviation > worst:
                worst = deviation
                worst_at = f"inference {inference}, camera {cameras[camera]}, layer {layers[layer]}"
    note = f"; maps left out, missing or damaged: {n_left_out}" if n_left_out else ""
    if not n_rows:
        return [Check.of(_NAME, None, f"no row was read{note}")]
    found = (
        f"patches of {rows} x {columns}; largest deviation from 1 of {n_rows} rows is {worst:.1e}, allowed "
        f"{tolerance:.1e}"
    )
    is_fine = worst <= tolerance
    return [Check.of(_NAME, is_fine, (found if is_fine else f"{found}: {worst_at}") + note)]
