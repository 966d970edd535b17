"""Does an attention map predict what matters to the policy? The numbers; nobody is asked here.

How much a patch matters is told by random masks, as in RISE (Petsiuk, Das, Saenko 2018, "RISE: Randomized
Input Sampling for Explanation of Black-box Models"): parts of the images are hidden at random, and the change
of the action with a patch hidden is compared with the change with it shown. Beside that importance stand two
measures of a map: its rank correlation with the importance, and the deletion and insertion curves of the
same paper, in which patches are hidden or shown in the map's order. Their chance levels are here too.

Patches of all cameras that show something of an image are numbered in one row, `patch`: see `Patches`. Knows
no policy, no file and no picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from lerobot_attn.analysis.intervals import mean_of
from lerobot_attn.analysis.spatial import visible_patches
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import ImageGeometry

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# Shares of the patches that are hidden (deletion) or shown (insertion); closer together where they are few,
# because what matters is often a few patches.
SHARES: tuple[float, ...] = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)


class Patches:
    """The patches that show a part of an image, of all cameras, numbered row by row, camera after camera.

    Patches that lie wholly on a letterbox's padding have no number. Those of one camera are a rectangle.

    Args:
        geometries: camera → how its image became patches; in the policy's order.
    """

    def __init__(self, geometries: Mapping[str, ImageGeometry]):
        self.geometries = dict(geometries)
        self._rows: dict[str, NDArray[np.intp]] = {}
        self._columns: dict[str, NDArray[np.intp]] = {}
        self.places: dict[str, slice] = {}
        start = 0
        for camera, geometry in self.geometries.items():
            rows, columns = visible_patches(geometry)
            self._rows[camera], self._columns[camera] = np.flatnonzero(rows), np.flatnonzero(columns)
            self.places[camera] = slice(start, start + int(rows.sum() * columns.sum()))
            start = self.places[camera].stop

    def __len__(self) -> int:
        """Return the number of patches of all cameras."""
        return max((place.stop for place in self.places.values()), default=0)

    @property
    def cameras(self) -> list[str]:
        """Their names, in order."""
        return list(self.geometries)

    def rectangle(self, values: NDArray[Any], camera: str) -> NDArray[Any]:
        """Return one camera's values, (…, row, column), of (…, patch)."""
        shape = len(self._rows[camera]), len(self._columns[camera])
        return values[..., self.places[camera]].reshape(*values.shape[:-1], *shape)

    def on_grid(self, values: NDArray[Any], camera: str, fill: float = np.nan) -> NDArray[Any]:
        """Return one camera's values on its whole grid, (…, grid_y, grid_x), `fill` on the padding."""
        geometry = self.geometries[camera]
        shape = (*values.shape[:-1], geometry.grid_rows, geometry.grid_columns)
        grid = np.full(shape, fill, np.result_type(values.dtype, np.float32))
        rows, columns = np.ix_(self._rows[camera], self._columns[camera])
        grid[..., rows, columns] = self.rectangle(values, camera)
        return grid

    def of_grids(self, grids: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Return (…, patch) of each camera's whole grid (…, grid_y, grid_x); undoes `on_grid`."""
        parts = []
        for camera in self.geometries:
            grid = np.asarray(grids[camera])
            rows, columns = np.ix_(self._rows[camera], self._columns[camera])
            parts.append(grid[..., rows, columns].reshape(*grid.shape[:-2], -1))
        return np.concatenate(parts, axis=-1)


# Importance


def random_masks(patches: Patches, n_masks: int, *, hidden_share: float, rng: np.random.Generator) -> Bools:
    """Draw which patches are hidden, in coarse cells at random offsets as RISE draws them.

    A cell is about an eighth of the grid wide, in whole patches. RISE draws each cell for itself. Here a
    round of 1 / hidden_share masks hides every cell once, so that each patch is hidden equally often, and an
    importance from few masks is less noisy.

    Args:
        patches: what can be hidden.
        n_masks: masks; made up to whole rounds.
        hidden_share: share of the patches that each mask hides, up to 1/2; rounded to 1/2, 1/3, 1/4, …
        rng: the source of randomness.

    Returns:
        (mask, patch) bool, True where hidden. Masks of one round follow one another.
    """
    n_groups = max(2, round(1 / hidden_share))
    n_rounds = -(-n_masks // n_groups)
    found = np.zeros((n_rounds, n_groups, len(patches)), bool)
    for camera in patches.cameras:
        rows, columns = patches.rectangle(found[0, 0], camera).shape
        cell = max(1, round(max(rows, columns) / 8))
        down, across = rows // cell + 2, columns // cell + 2
        for of_round in found:
            groups = rng.permutation(np.arange(down * across) % n_groups).reshape(down, across)
            top, left = rng.integers(0, cell, 2)
            fine = groups.repeat(cell, axis=0).repeat(cell, axis=1)[top : top + rows, left : left + columns]
            of_round[:, patches.places[camera]] = fine.reshape(-1) == np.arange(n_groups)[:, None]
    return found.reshape(-1, len(patches))


def importance_of(hidden: Bools, change: ArrayLike) -> Floats:
    """Return how much more the action changes with a patch hidden than with it shown.

    RISE's conditional mean, with hidden in the place of shown and less the mean over the other masks, so that
    0 means that the patch makes no difference.

    Args:
        hidden: (mask, patch) bool, each patch hidden by some masks and not by all.
        change: (mask,) of the action.

    Returns:
        (patch,) in the change's unit.
    """
    change = np.asarray(change, float)
    n_hidden = hidden.sum(axis=0)
    with_it = change @ hidden / n_hidden
    without = change @ ~hidden / (len(hidden) - n_hidden)
    return np.asarray(with_it - without)


# Rank correlation


def shifted_correlations(importance: ArrayLike, maps: ArrayLike) -> Floats:
    """Return Spearman's rank correlation of maps with an importance, and with each circular shift of it.

    Maps and importances are smooth, so neighbouring patches are no independent observations, and a null of
    shuffled patches would call almost any correlation significant. A circular shift keeps the importance as
    smooth as it was and moves it to another place.

    Args:
        importance: (row, column).
        maps: (map, row, column).

    Returns:
        (shift, map), as many shifts as there are patches; the first one moves nothing, so its row holds the
        correlations themselves. NaN where a map or the importance is the same everywhere, or missing.
    """
    importance = np.asarray(importance, float)
    rows, columns = importance.shape
    theirs = _standard_ranks(np.asarray(maps, float).reshape(-1, importance.size))
    ours = _standard_ranks(importance.reshape(1, -1)).reshape(rows, columns)
    down, across = np.divmod(np.arange(importance.size), columns)
    row = (np.arange(rows)[None, :] - down[:, None]) % rows
    column = (np.arange(columns)[None, :] - across[:, None]) % columns
    every_shift = ours[row[:, :, None], column[:, None, :]].reshape(importance.size, -1)
    return np.asarray(every_shift @ theirs.T)


def _standard_ranks(values: Floats) -> Floats:
    """Return the ranks of each row, ties sharing theirs, with mean 0 and length 1; NaN of a constant row."""
    ranks = rankdata(values, axis=-1, nan_policy="propagate")
    ranks = ranks - ranks.mean(axis=-1, keepdims=True)
    length = np.sqrt((ranks**2).sum(axis=-1, keepdims=True))
    return np.asarray(np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0))


@dataclass(frozen=True)
class Correlation:
    """Rank correlations, mean over frames, with what chance gives; each (map,).

    Attributes:
        value: the correlations.
        chance: mean under random circular shifts.
        chance_low: the lower end of the central 95 % under them.
        chance_high: the upper end.
        p: how often the best of all these maps would reach the value by chance, so corrected for how many
            there are.
    """

    value: Floats
    chance: Floats
    chance_low: Floats
    chance_high: Floats
    p: Floats


def against_shifts(
    correlations: Sequence[Floats], episodes: Sequence[int], *, n_draws: int = 2000, seed: int = 0
) -> Correlation:
    """Hold mean correlations to those of shifted importances.

    Frames of one episode show nearly the same picture, and its maps lie at nearly the same place. So all of
    them are shifted alike: a coincidence that lasts for the whole episode counts once.

    Args:
        correlations: of each frame, (shift, map) of `shifted_correlations`.
        episodes: of each frame, the number of its episode.
        n_draws: draws of shifts; with one episode every shift is taken once instead.
        seed: of the draws.
    """
    values = np.stack(correlations)
    n_shifts = values.shape[1]
    names, member = np.unique(np.asarray(episodes), return_inverse=True)
    if n_shifts < 2:
        nothing = np.full(values.shape[2], np.nan)
        return Correlation(mean_of(values[:, 0]), *(nothing,) * 4)
    if len(names) == 1:
        shifts = np.arange(1, n_shifts)[:, None]
    else:
        shifts = np.random.default_rng(seed).integers(1, n_shifts, (n_draws, len(names)))
    null: Floats = np.zeros((len(shifts), values.shape[2]))
    counts = np.zeros(values.shape[2])
    for frame, of_frame in enumerate(values):
        null += np.nan_to_num(of_frame[shifts[:, member[frame]]])
        counts += np.isfinite(of_frame[0])
    null = np.where(counts > 0, null / np.maximum(counts, 1), np.nan)
    value = mean_of(values[:, 0])
    best = np.nan_to_num(null, nan=-np.inf).max(axis=1)
    p = (1 + (best[:, None] >= value - 1e-12).sum(axis=0)) / (1 + len(best))
    low, high = np.percentile(null, [2.5, 97.5], axis=0)
    return Correlation(value, null.mean(axis=0), low, high, np.where(np.isfinite(value), p, np.nan))


# Curves


def ranking(score: ArrayLike, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return the patches in descending order of a score, (patch,); equal ones in random order.

    Missing scores (NaN) come last.
    """
    score = np.nan_to_num(np.asarray(score, float), nan=-np.inf)
    order: NDArray[np.intp] = np.lexsort((rng.random(score.size), -score))
    return order


def random_ranking(order: NDArray[np.intp], patches: Patches, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return a ranking of random patches, each of the camera that an order has at the same place.

    With random weights, too, attention may favour one camera, and hiding that one may act more. So which
    camera comes when is the order's, and where in its picture is random.
    """
    found = np.empty_like(order)
    for place in patches.places.values():
        of_camera = (order >= place.start) & (order < place.stop)
        found[of_camera] = rng.permutation(np.arange(place.start, place.stop))
    return found


def shifted_ranking(score: ArrayLike, patches: Patches, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return the ranking of a score that was moved to another place in each camera, by a circular shift.

    It hides clumps of patches as the score's own ranking does: the stricter of the two chance levels.
    """
    score = np.asarray(score, float)
    moved = np.empty_like(score)
    for camera in patches.cameras:
        part = patches.rectangle(score, camera)
        shift = int(rng.integers(1, part.size)) if part.size > 1 else 0
        rolled = np.roll(part, divmod(shift, part.shape[1]), axis=(0, 1))
        moved[patches.places[camera]] = rolled.reshape(-1)
    return ranking(moved, rng)


def hidden_along(order: NDArray[np.intp], shares: Sequence[float]) -> Bools:
    """Return what is hidden along a ranking's two curves, (2, share, patch) bool: deletion, insertion.

    Deletion hides the first patches of the ranking; insertion shows them alone. At least one each.
    """
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order))
    first = place < np.maximum(1, np.round(np.asarray(shares) * len(order)))[:, None]
    return np.stack([first, ~first])


def curve_areas(curves: ArrayLike, all_hidden: ArrayLike, shares: Sequence[float]) -> Floats:
    """Return the areas under deletion and insertion curves, in units of the change with all patches hidden.

    The curves are the change of the action against the share of the patches that is hidden (deletion) or
    shown (insertion); the area is by the trapezoidal rule from 0 to 1. Petsiuk et al. draw a class's score,
    which falls where the action's change grows: a ranking that finds what matters has a **large** area under
    its deletion curve and a small one under its insertion curve.

    Args:
        curves: (…, 2, share) change of the action along deletion and insertion.
        all_hidden: (…) change with every patch hidden: where the one curve ends and the other begins.
        shares: the shares.

    Returns:
        (…, 2): NaN where hiding everything changes nothing.
    """
    curves = np.asarray(curves, float)
    end = np.broadcast_to(np.asarray(all_hidden, float), curves.shape[:-2])
    ends = np.stack([np.zeros_like(end), end], axis=-1)
    whole = np.concatenate([ends[..., None], curves, ends[..., ::-1, None]], axis=-1)
    area = np.trapezoid(whole, [0, *shares, 1], axis=-1)
    return np.asarray(
        np.divide(area, end[..., None], out=np.full_like(area, np.nan), where=end[..., None] > 0)
    )


def gain(areas: ArrayLike, chance: ArrayLike) -> Floats:
    """Return by how much areas are better than those of chance, (…, 2): above 0 is better in both curves."""
    return np.asarray((np.asarray(areas, float) - np.asarray(chance, float)) * np.array([1.0, -1.0]))


# What was found


@dataclass(frozen=True)
class FrameSaliency:
    """What was found at one frame; see `Saliency` for the axes.

    Attributes:
        episode: number of the episode.
        frame: number of the frame in it.
        importance: (patch,), in the policy's units of an action.
        halves: (2, patch) the same from either half of the masks.
        attention: (layer, head, patch) share of all attention, mean over the executed actions and the
            denoise steps.
        curves: ranking → (draw, 2, share) change of the action along deletion and insertion. The rankings are
            "importance", and for each of the layers whose curves were asked for "attention LAYER", "random
            LAYER" (`random_ranking`) and "shifted LAYER" (`shifted_ranking`).
        all_hidden: change of the action with every patch hidden.
        floor: change of the action when the policy is asked again with nothing hidden: rounding, or
            randomness that is not held.
        pictures: camera → (height, width, 3) uint8; empty where they were not kept.
    """

    episode: int
    frame: int
    importance: Floats
    halves: Floats
    attention: NDArray[np.float32]
    curves: Mapping[str, Floats]
    all_hidden: float
    floor: float
    pictures: Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class Saliency:
    """Importance beside attention, frame by frame.

    Attributes:
        patches: which patch is where.
        layers: numbers of the layers.
        heads: numbers of the heads.
        curve_layers: the layers whose curves there are, as text; "mean" is the mean of `layers`.
        shares: of the patches, at which the curves were asked for.
        frames: in the order of the episodes and frames.
        facts: what was asked, as plain values: `n_masks`, `hidden_share`, `fill`, `seed`, …
        shuffled: the same of copies of the policy with shuffled weights, which have learned nothing.
    """

    patches: Patches
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    curve_layers: tuple[str, ...]
    shares: tuple[float, ...]
    frames: tuple[FrameSaliency, ...]
    facts: Mapping[str, Any]
    shuffled: tuple[Saliency, ...] = ()

    def __post_init__(self) -> None:
        """Check that there is a frame.

        Raises:
            SelectionError: there is none.
        """
        if not self.frames:
            raise SelectionError("saliency of no frame; expected one at least")

    @cached_property
    def map_names(self) -> list[tuple[str, str]]:
        """(layer, head) of each map, as text: all of them, then means over heads, layers, and both."""
        layers, heads = ([*map(str, some), "mean"] for some in (self.layers, self.heads))
        return [(layer, head) for layer in layers for head in heads]

    def maps(self, frame: FrameSaliency) -> Floats:
        """Return a frame's maps in the order of `map_names`, (map, patch)."""
        maps: Floats = with_means(frame.attention).reshape(len(self.map_names), -1)
        return maps

    def attention(self, frame: FrameSaliency, layer: str) -> Floats:
        """Return the mean over heads of a layer, or of all of them ("mean"), (patch,)."""
        number = self.map_names.index((layer, "mean"))
        of_layer: Floats = self.maps(frame)[number]
        return of_layer


def with_means(attention: ArrayLike) -> Floats:
    """Append the means over heads and layers: (layer, head, patch) → (layer + 1, head + 1, patch).

    What a layer cannot see (NaN) has no part in the mean of the layers.
    """
    attention = np.asarray(attention, float)
    heads = np.concatenate([attention, attention.mean(axis=1, keepdims=True)], axis=1)
    return np.asarray(np.concatenate([heads, mean_of(heads)[None]]))
