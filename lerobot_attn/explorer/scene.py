"""Which objects an episode's cameras show, pixel by pixel, and how much attention lies on them.

Of stores that hold `segmentation`. Pure functions on an episode; knows no request.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.grounding import ground
from lerobot_attn.analysis.select import layout_of
from lerobot_attn.analysis.spatial import camera_geometry
from lerobot_attn.errors import SelectionError
from lerobot_attn.explorer.means import in_blocks
from lerobot_attn.explorer.slabs import of_inference
from lerobot_attn.explorer.values import number, numbers
from lerobot_attn.layout import ImageGeometry
from lerobot_attn.masks import ROLES, UNKNOWN, patch_coverage
from lerobot_attn.store.reader import Episode

_MASKS, _CAMERA, _ROLE = "segmentation", "mask_camera", "instance_role"
SHOWN_ROLES = tuple(role for role in ROLES if role != "background")  # of which shares are told


def scene(data: xr.Dataset) -> dict[str, Any] | None:
    """Return what the masks' numbers stand for, and which cameras have masks; None where there are none."""
    if _MASKS not in data:
        return None
    names, roles = data["instance"].values, data[_ROLE].values
    return {
        "instances": [
            {"name": str(name), "role": str(role)} for name, role in zip(names, roles, strict=True)
        ],
        "cameras": [name for name, _, _ in _masked(data)],
        "height_px": data.sizes["mask_y"],
        "width_px": data.sizes["mask_x"],
    }


def masks(episode: Episode, inference: int) -> dict[str, Any]:
    """Return what each camera showed at an inference.

    Returns:
        `cameras`: each camera's full name → `runs`, the mask row by row as instance, length, instance, length
        …; `area`, instance → its share of what is known of the image; `coverage`, instance → the patches that
        it touches, row by row in the grid, and which share of what each patch shows it takes; `hidden`, the
        patches that show nothing of which it is known what. Instances that are not in view are left out.

    Raises:
        SelectionError: there is no such inference, or the episode has no masks.
    """
    data = episode.arrays
    found = of_inference(_masks(data), inference)
    return {
        "cameras": {
            name: _mask(found.isel(mask_camera=place).values, geometry)
            for name, place, geometry in _masked(data)
        }
    }


def _mask(mask: NDArray[np.int16], geometry: ImageGeometry) -> dict[str, Any]:
    instances = np.unique(mask[mask > UNKNOWN]).tolist()
    covered = patch_coverage(np.stack([*(mask == i for i in instances), mask > UNKNOWN]), geometry)
    inside, shown = covered[:-1].reshape(len(instances), covered[0].size), covered[-1].ravel()
    coverage, area = {}, {}
    for instance, share in zip(instances, inside, strict=True):
        patches = np.flatnonzero(share)
        coverage[instance] = [patches.tolist(), numbers(share[patches] / shown[patches])]
        area[instance] = number(share.sum() / shown.sum())
    return {
        "runs": _runs(mask),
        "area": area,
        "coverage": coverage,
        "hidden": np.flatnonzero(shown == 0).tolist(),
    }


def role_shares(episode: Episode, first: int, camera: str, maps: xr.DataArray) -> dict[str, Any]:
    """Return how much of a camera's attention lies on the objects of each role, beside their share of it.

    Args:
        episode: the episode.
        first: number of the first inference.
        camera: its name, or the end of it.
        maps: (inference, key) attention of the inferences from `first` on.

    Returns:
        `first`, as asked; `camera`, its full name; `roles`; `share`, (inference, role) of the attention on
        those of the camera's patches that show its image; `chance`, likewise, the share of the image's area:
        what a uniform map would have. None where nothing of that role is in view, and where the map or the
        mask is missing or damaged.

    Raises:
        SelectionError: the episode has no masks, or none of this camera.
    """
    data = episode.arrays
    _masks(data)
    name, _, _ = camera_geometry(data, camera)
    masked = [found for found, _, _ in _masked(data)]
    if name not in masked:
        raise SelectionError(f"camera {camera!r} has no mask; expected one of: {', '.join(masked) or 'none'}")
    shown = [role for role in SHOWN_ROLES if role in data[_ROLE].values]
    maps = maps.assign_coords(inference=first + np.arange(maps.sizes["inference"]))
    share, chance = (np.full((maps.sizes["inference"], len(shown)), np.nan) for _ in range(2))

    def read(block: slice) -> xr.Dataset:
        found = ground(data, maps.isel(inference=block), cameras=[name], roles=shown)
        return found.sel(camera=name, metric="mass").compute()

    for block, found in in_blocks(len(share), read):
        share[block] = found["value"].transpose("inference", "role").values
        chance[block] = found["uniform"].transpose("inference", "role").values
    return {
        "first": first,
        "camera": name,
        "roles": shown,
        "share": numbers(share),
        "chance": numbers(chance),
    }


def _masked(data: xr.Dataset) -> list[tuple[str, int, ImageGeometry]]:
    """Return the cameras that have masks and showed an image: full name, place among the masks, geometry."""
    cameras = {camera.name: camera.geometry for camera in layout_of(data).cameras}
    held = [str(name) for name in data[_CAMERA].values]
    return [
        (name, place, geometry)
        for place, name in enumerate(held)
        if (geometry := cameras.get(name)) is not None
    ]


def _masks(data: xr.Dataset) -> xr.DataArray:
    if _MASKS not in data:
        raise SelectionError(
            "this episode has no masks of what its cameras showed; record with segmentation=true, or attach "
            "masks with lerobot-attn masks"
        )
    return data[_MASKS]


def _runs(mask: NDArray[np.int16]) -> list[int]:
    """Return a mask as instance, length, instance, length …, row by row."""
    flat = mask.ravel()
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    return [value for start, stop in pairwise(edges) for value in (int(flat[start]), stop - start)]
