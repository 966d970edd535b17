"""What stands in the place of a part of a picture: its mean colour, a blur, or what is around it.

Each function takes pictures (batch, 3, height, width) in whatever scale they are, on any device, and returns
float32 ones. Knows no region's meaning, no policy and no camera.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLUR = 16  # the picture's longer side in standard deviations
_TRUNCATE = 3  # standard deviations from which on the Gaussian is cut off


def mean_colour(image: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Return the mean colour of what is not hidden, (batch, 3, 1, 1); of all where all of it is.

    Args:
        image: (batch, 3, height, width).
        hidden: (batch, 1, height, width) bool; None: nothing is.
    """
    image = image.float()
    if hidden is None:
        return image.mean((2, 3), keepdim=True)
    outside = (~hidden).float()
    outside = torch.where(outside.sum((2, 3), keepdim=True) > 0, outside, 1.0)
    total = (image * outside).sum((2, 3), keepdim=True)
    return total / outside.sum((2, 3), keepdim=True)


def blurred(image: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Return the picture behind a Gaussian, of which a sixteenth of the longer side is a standard deviation.

    Pictures go on beyond their edges as in a mirror. The Gaussian is separable, so it is one matrix for rows
    and one for columns, of which only those are worked out that are looked at.

    Args:
        image: (batch, 3, height, width).
        hidden: (batch, 1, height, width) bool; outside of the smallest box around what is hidden the result
            is the picture itself. None: all of it is blurred.
    """
    image = image.float()
    rows, columns = slice(None), slice(None)
    if hidden is not None:
        rows, columns = _extent(hidden.any(3).any(0)), _extent(hidden.any(2).any(0))
    height, width = image.shape[-2:]
    sigma = max(height, width) / _BLUR
    radius = min(int(_TRUNCATE * sigma), min(height, width) - 1)
    down, right = (torch.from_numpy(_gaussian(side, sigma, radius)).to(image) for side in (height, width))
    painted = image.clone()
    with torch.autocast(image.device.type, enabled=False):  # a policy's may be on, and bfloat16 is coarse
        painted[..., rows, columns] = down[rows] @ (image @ right[columns].T)
    return painted


def inpainted(image: Tensor, hidden: Tensor) -> Tensor:
    """Return the picture in which what is hidden is the smooth continuation of what is around it.

    Each hidden pixel becomes the mean of its four neighbours (Laplace's equation, solved exactly), so that
    colours run on from the rim and nothing of what was there is left. Where there is no rim: the mean colour.

    Args:
        image: (batch, 3, height, width).
        hidden: (batch, 1, height, width) bool.
    """
    image = image.float()
    painted = mean_colour(image, hidden).expand_as(image).clone()
    for row, region in enumerate(hidden[:, 0].cpu().numpy()):
        if region.any() and not region.all():
            # The rim is one pixel wide: nothing farther away has an influence.
            rows, columns = _extent(region.any(1), rim=1), _extent(region.any(0), rim=1)
            known = image[row, :, rows, columns].cpu().double().numpy()
            painted[row, :, rows, columns] = torch.from_numpy(_harmonic(known, region[rows, columns])).to(
                image
            )
    return painted


def _extent(line: Tensor | NDArray[np.bool_], *, rim: int = 0) -> slice:
    """Return from the first to the last that is true, with a rim where there is room for it."""
    at = np.flatnonzero(line.cpu().numpy() if isinstance(line, Tensor) else line)
    return slice(max(int(at[0]) - rim, 0), int(at[-1]) + 1 + rim) if len(at) else slice(0, 0)


@lru_cache(maxsize=8)
def _gaussian(side: int, sigma: float, radius: int) -> NDArray[np.float32]:
    """Return (blurred pixel, pixel) float32: how much each pixel of a line counts in each blurred one."""
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    at = np.abs(np.arange(side)[:, None] + offsets)  # mirrored at the first pixel, and then at the last one
    at = np.where(at < side, at, 2 * (side - 1) - at)
    matrix = np.zeros((side, side))
    np.add.at(matrix, (np.arange(side)[:, None], at), kernel)
    return matrix.astype(np.float32)


def _harmonic(image: NDArray[np.float64], region: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return a picture (channel, height, width) in whose region each pixel is its neighbours' mean."""
    from scipy.sparse import csc_array
    from scipy.sparse.linalg import splu

    rows, columns = np.nonzero(region)
    number = np.full(region.shape, -1)
    number[rows, columns] = np.arange(len(rows))
    neighbours = np.zeros(len(rows))
    at, to, known = [], [], np.zeros((len(rows), len(image)))
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        there_rows, there_columns = rows + down, columns + right
        is_there = (there_rows >= 0) & (there_columns >= 0)
        is_there &= (there_rows < region.shape[0]) & (there_columns < region.shape[1])
        own = np.flatnonzero(is_there)
        there_rows, there_columns = there_rows[own], there_columns[own]
        neighbours[own] += 1
        inside = number[there_rows, there_columns]
        at.append(own[inside >= 0])
        to.append(inside[inside >= 0])
        known[own[inside < 0]] += image[:, there_rows[inside < 0], there_columns[inside < 0]].T
    entries = (np.concatenate([neighbours, -np.ones(sum(map(len, at)))]),)
    places = (np.concatenate([np.arange(len(rows)), *at]), np.concatenate([np.arange(len(rows)), *to]))
    matrix = csc_array((entries[0], places), shape=(len(rows), len(rows)))
    # The matrix is symmetric and its diagonal dominates, so no row needs to be exchanged for another. Panels
    # of one column, because there is next to nothing in those of so sparse a matrix.
    factors = splu(
        matrix,
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        relax=1,
        panel_size=1,
        options={"SymmetricMode": True},
    )
    result = image.copy()
    result[:, rows, columns] = factors.solve(known).T
    return result
