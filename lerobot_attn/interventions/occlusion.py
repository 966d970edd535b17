"""Paints over parts of the policy's pictures: which pixels, and what stands in their place.

Knows pictures as a policy's batch holds them and masks; no policy family. Works in whatever scale they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lerobot_attn.errors import ConfigError
from lerobot_attn.interventions.keys import camera_number, cameras_with_masks
from lerobot_attn.interventions.painting import blurred, inpainted, mean_colour
from lerobot_attn.interventions.selectors import Selector
from lerobot_attn.interventions.spec import Occlude
from lerobot_attn.layout import short_names
from lerobot_attn.masks import SceneMasks

logger = logging.getLogger(__name__)

_PLACES = 200  # that are tried for a shape


class _Picture(NamedTuple):
    """A camera's pictures: (batch, 3, height, width), or with several observations (batch, time, 3, …)."""

    name: str
    number: int
    size: tuple[int, int]  # (height, width), px


class Occluder:
    """Paints over what its occlusions say, in every batch that it is given.

    Args:
        occlusions: in the order in which they are painted.
        cameras: the policy's image features.
    """

    def __init__(self, occlusions: Sequence[Occlude], cameras: Sequence[str]):
        self._occlusions = occlusions
        self._cameras = list(cameras)
        self._short = short_names(self._cameras)
        self._told: set[str] = set()

    def painted(
        self, batch: Mapping[str, Any], episodes: Sequence[int], scenes: Sequence[SceneMasks] | None
    ) -> dict[str, Tensor]:
        """Return the pictures that change: camera → like the batch's, painted over. The batch stays as it is.

        Args:
            batch: the policy's.
            episodes: number of each row's episode.
            scenes: what the cameras of each row show; None where no selector asks.

        Raises:
            ConfigError: a camera or a role that is not there.
        """
        images = {name: batch[name] for name in self._cameras if torch.is_tensor(batch.get(name))}
        # The policy's own test for channels first, where channels may come last.
        is_last = {name: image.ndim == 4 and image.shape[1] != 3 for name, image in images.items()}
        upright = {
            name: image.permute(0, 3, 1, 2) if is_last[name] else image for name, image in images.items()
        }
        pictures = [
            _Picture(name, number, (image.shape[-2], image.shape[-1]))
            for number, (name, image) in enumerate(upright.items())
        ]
        changed: dict[str, Tensor] = {}
        for occlusion in self._occlusions:
            regions = [
                self._regions(occlusion.where, pictures, row, episode, scenes)
                for row, episode in enumerate(episodes)
            ]
            for picture in pictures:
                region = np.stack([one[picture.name] for one in regions])
                if region.any():
                    image = changed.get(picture.name, upright[picture.name])
                    changed[picture.name] = _filled(image, region, occlusion.fill)
        return {
            name: image.permute(0, 2, 3, 1) if is_last[name] else image for name, image in changed.items()
        }

    def _regions(
        self,
        selectors: Sequence[Selector],
        pictures: Sequence[_Picture],
        row: int,
        episode: int,
        scenes: Sequence[SceneMasks] | None,
    ) -> dict[str, NDArray[np.bool_]]:
        """Return camera → (height, width) bool: what the selectors choose of a row's pictures."""
        found: dict[str, NDArray[np.bool_]] = {
            picture.name: np.zeros(picture.size, np.bool_) for picture in pictures
        }
        for selector in selectors:
            if "random_like" in selector:
                like = self._regions(selector["random_like"], pictures, row, episode, scenes)
                for picture in pictures:
                    key = [selector["seed"], episode, picture.number]
                    found[picture.name] |= self._elsewhere(like[picture.name], key, picture.name)
            elif "role" in selector:
                if scenes is None:
                    raise ConfigError(
                        f"role {selector['role']}: nobody says what the pixels show, expected masks"
                    )
                for shown, name in cameras_with_masks(pictures, scenes[row], selector.get("camera")):
                    mask = scenes[row].of_role(name, selector["role"])
                    found[shown.name] |= _resized(mask, shown.size)
            else:
                picture = pictures[
                    camera_number(selector["camera"], [one.name for one in pictures], self._short)
                ]
                height, width = picture.size
                top, left, bottom, right = selector.get("box", (0.0, 0.0, 1.0, 1.0))
                rows = slice(round(top * height), max(round(bottom * height), round(top * height) + 1))
                columns = slice(round(left * width), max(round(right * width), round(left * width) + 1))
                found[picture.name][rows, columns] = True
        return found

    def _elsewhere(self, like: NDArray[np.bool_], key: list[int], camera: str) -> NDArray[np.bool_]:
        """Return the same shape at a random place that does not overlap with where it is.

        The places that are tried are drawn once for an episode, so that the shape stays where it is from
        inference to inference for as long as it can. Where it fits nowhere as it is, it may leave the picture
        on one side and come in at the other; where it fits nowhere at all, what would overlap is left out.
        """
        if not like.any():
            return like
        height, width = like.shape
        at_rows, at_columns = np.flatnonzero(like.any(1)), np.flatnonzero(like.any(0))
        shape = like[at_rows[0] : at_rows[-1] + 1, at_columns[0] : at_columns[-1] + 1]
        places = np.random.default_rng(key).random((_PLACES, 2))
        best, least = like, like.size
        for down, right in places:
            moved = np.zeros_like(like)
            top = int(down * (height - shape.shape[0] + 1))
            left = int(right * (width - shape.shape[1] + 1))
            moved[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
            if not (moved & like).any():
                return moved
        for down, right in places:
            moved = np.roll(like, (int(down * height), int(right * width)), (0, 1))
            overlap = int((moved & like).sum())
            if overlap < least:
                best, least = moved, overlap
            if not overlap:
                return moved
        if camera not in self._told:
            self._told.add(camera)
            logger.warning(
                "random_like: in %s there is no place as large as what is occluded; the control is smaller "
                "there, at first %d of %d pixels",
                camera,
                int(like.sum()) - least,
                int(like.sum()),
            )
        control: NDArray[np.bool_] = best & ~like
        return control


def _resized(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return a mask in a picture's size; each pixel takes what lies at its centre."""
    rows = ((np.arange(size[0]) + 0.5) * mask.shape[0] / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * mask.shape[1] / size[1]).astype(int)
    return mask[rows[:, None], columns]


def _filled(image: Tensor, region: NDArray[np.bool_], fill: str) -> Tensor:
    """Return pictures with a region painted over.

    Args:
        image: (batch, 3, height, width), or (batch, time, 3, height, width).
        region: (batch, height, width).
        fill: one of `spec.FILLS`.
    """
    flat = image.reshape(-1, *image.shape[-3:])
    times = len(flat) // len(region)
    where = torch.from_numpy(np.repeat(region, times, axis=0)).to(image.device)[:, None]
    painted = {"mean": mean_colour, "blur": blurred, "inpaint": inpainted}[fill](flat, where)
    return torch.where(where, painted.to(image.dtype), flat).reshape(image.shape)
