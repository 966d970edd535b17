"""Areas under the curve of many units at once, under the labels and under permuted ones.

Between episodes an area is of their values, ranked within strata; within episodes it is the mean of their own
areas. Knows neither neurons nor how labels came about. The area as a sum of ranks: Mann & Whitney 1947.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.analysis.intervals import expanded_tail, interval_of_mean
from lerobot_attn.analysis.permutation import all_signs, largest, ranks, relabellings

N_BINS = 50
_HISTOGRAMS = 20  # permutations whose areas are counted

_Floats = NDArray[np.float32]
_Doubles = NDArray[np.float64]


class Smallest(NamedTuple):
    """The smallest p that so few episodes can give, and whether every permutation is taken."""

    p: float
    is_exact: bool


class Areas:
    """The areas of many units at once. They are linear in the labels: sums of ranks, or means over episodes.

    Args:
        is_within: which of the two.
        values: (episode, unit): means of episodes, or their areas minus 0.5.
        strata: (episode,) whole numbers.
        is_first: (episode,) the group, between episodes.
    """

    def __init__(self, is_within: bool, values: _Floats, strata: NDArray[Any], is_first: NDArray[np.bool_]):
        self.is_within, self.values, self.strata, self.is_first = is_within, values, strata, is_first
        n = len(values)
        self._codes = np.unique(strata)
        self.own: _Floats = np.ones(n, np.float32) if is_within else is_first.astype(np.float32)
        self._rows = values if is_within else np.empty_like(values)
        if not is_within:
            for code in self._codes:
                self._rows[strata == code] = ranks(values[strata == code])

    def deviations(self, weights: _Floats, places: NDArray[np.intp] | None = None) -> _Floats:
        """Return (draw, unit) area minus 0.5 under labels or signs, (draw, episode).

        NaN where a draw has no two episodes of a stratum with different labels.
        """
        rows = self._rows if places is None else self._rows[:, places]
        offset, scale = self._line(weights)
        return np.asarray((weights @ rows - offset[:, None]) * scale[:, None], np.float32)

    def _line(self, weights: _Floats) -> tuple[_Floats, _Floats]:
        """Return (draw,) what to subtract from each sum, and what to multiply it with."""
        if self.is_within:
            ones = np.ones(len(weights), np.float32)
            return 0 * ones, ones / np.float32(weights.shape[1])
        offset, pairs = np.zeros(len(weights)), np.zeros(len(weights))
        for code in self._codes:
            members = self.strata == code
            n_first = weights[:, members].sum(axis=1, dtype=float)
            n_pairs = n_first * (members.sum() - n_first)
            # The least sum that ranks of so many can have, and half of the pairs: an area of 0.5.
            offset += n_first * (n_first + 1) / 2 + n_pairs / 2
            pairs += n_pairs
        scale = np.divide(1, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
        return offset.astype(np.float32), scale.astype(np.float32)

    def largest(self, draws: _Floats, progress: Callable[[int, int], None] | None = None) -> _Doubles:
        """Return (draw,) the largest distance from 0.5 of all units."""
        offset, scale = self._line(draws[:1])  # the same in each: permutations keep a stratum's counts
        return largest(draws, self._rows, offset=float(offset[0]), scale=float(scale[0]), progress=progress)

    def draws(self, n: int, rng: np.random.Generator) -> tuple[_Floats, Smallest]:
        """Return (draw, episode) signs or labels, and the smallest p that they can give."""
        if self.is_within:
            signs, is_exact = all_signs(len(self.values), n, rng)
            return signs, Smallest(2 / len(signs) if is_exact else 1 / (len(signs) + 1), is_exact)
        found, is_exact = relabellings(self.is_first, self.strata, n, rng)
        mirror = all(
            2 * self.is_first[self.strata == code].sum() == (self.strata == code).sum()
            for code in np.unique(self.strata)
        )
        smallest = (2 if mirror else 1) / len(found) if is_exact else 1 / (len(found) + 1)
        return found, Smallest(smallest, is_exact)

    def random(self, n: int, rng: np.random.Generator) -> _Floats:
        """Return (draw, episode) random signs or labels."""
        if self.is_within:
            return rng.choice(np.array([-1, 1], np.float32), (n, len(self.values)))
        return relabellings(self.is_first, self.strata, n, rng, may_be_exact=False)[0]

    def half(self, members: NDArray[np.intp]) -> Areas:
        """Return some of the episodes, ranked among themselves."""
        return Areas(self.is_within, self.values[members], self.strata[members], self.is_first[members])

    def halves(self, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Split the episodes of each stratum at random, whatever their labels."""
        sides: tuple[list[int], list[int]] = ([], [])
        turn = int(rng.integers(2))
        for code in self._codes:
            for member in rng.permutation(np.flatnonzero(self.strata == code)).tolist():
                sides[turn % 2].append(member)
                turn += 1
        return np.sort(np.array(sides[0], np.intp)), np.sort(np.array(sides[1], np.intp))

    def histogram(self, draws: _Floats) -> _Doubles:
        """Return (bin,) mean counts of areas under some draws."""
        some = draws[np.linspace(0, len(draws) - 1, min(_HISTOGRAMS, len(draws))).astype(int)]
        counts = [np.histogram(0.5 + self.deviations(d[None])[0], N_BINS, (0, 1))[0] for d in some]
        return np.asarray(np.mean(counts, axis=0), float)

    def intervals(
        self, places: NDArray[np.intp], *, confidence: float, n_resamples: int, seed: int
    ) -> tuple[_Doubles, _Doubles]:
        """Return low and high of the areas of some units: bootstrap over episodes, in their groups."""
        values = self.values[:, places].astype(float)
        if self.is_within:
            low, high = interval_of_mean(values, confidence, n_resamples, seed)
            return np.clip(0.5 + low, 0, 1), np.clip(0.5 + high, 0, 1)
        first, second = np.flatnonzero(self.is_first), np.flatnonzero(~self.is_first)
        same = (self.strata[first][:, None] == self.strata[second]).astype(float)
        rng = np.random.default_rng(seed)
        drawn = [self._redrawn(side, n_resamples, rng) for side in (first, second)]
        n_pairs = np.einsum("ri,ij,rj->r", drawn[0], same, drawn[1], optimize=True)
        tail = 100 * expanded_tail(min(len(first), len(second)), confidence)
        low, high = np.full(len(places), np.nan), np.full(len(places), np.nan)
        for index in range(len(places)):
            a, b = values[first, index][:, None], values[second, index]
            wins = ((a > b) + 0.5 * (a == b)) * same
            areas = ((drawn[0] @ wins) * drawn[1]).sum(axis=1)[n_pairs > 0] / n_pairs[n_pairs > 0]
            low[index], high[index] = np.percentile(areas, [tail, 100 - tail])
        return low, high

    def _redrawn(self, side: NDArray[np.intp], n: int, rng: np.random.Generator) -> _Doubles:
        """Return (resample, episode) how often each episode is drawn, within its stratum."""
        counts = np.zeros((n, len(side)))
        for code in np.unique(self.strata[side]):
            members = np.flatnonzero(self.strata[side] == code)
            picks = members[rng.integers(0, len(members), (n, len(members)))]
            np.add.at(counts, (np.arange(n)[:, None], picks), 1)
        return counts


def share_reached(null: _Doubles, found: _Floats, *, is_exact: bool) -> _Doubles:
    """Return (unit,) the share of permutations whose largest difference reaches a unit's, the corrected p."""
    order = np.sort(null)
    n_reach = len(null) - np.searchsorted(order, found.astype(float) - 1e-6)
    more, total = (0, len(null)) if is_exact else (1, len(null) + 1)
    return np.asarray((n_reach + more) / total, float)
