"""What chance gives where many are tried: by flipping signs of differences, or permuting labels of groups.

Knows neither attention nor episodes but as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_BATCH_BYTES = 64_000_000


class SignFlips(NamedTuple):
    """What `sign_flips` returns.

    Attributes:
        statistic: (candidate,) sum of the differences over the root of the sum of their squares.
        p: (candidate,) one-sided p-value of each candidate by itself.
        p_corrected: (candidate,) p-value corrected for all candidates that were tried.
        smallest: the smallest p-value that so few episodes can give.
    """

    statistic: NDArray[np.float64]
    p: NDArray[np.float64]
    p_corrected: NDArray[np.float64]
    smallest: float


def sign_flips(differences: NDArray[np.float64], *, n_flips: int = 10_000, seed: int = 0) -> SignFlips:
    """Test whether each candidate's differences lie above zero, by a sign-flip permutation test.

    If a candidate were no better than what it is compared with, each episode's difference would be as likely
    to have the other sign. All candidates are flipped together, and the corrected p-value is the share of
    flips in which the best of all candidates reaches a candidate's statistic (max-T of Westfall & Young,
    "Resampling-based multiple testing", 1993): it holds the chance of any false find at the level, and, other
    than Holm's or Bonferroni's correction, loses nothing where candidates resemble each other, as layers and
    heads do. Of few episodes every combination of signs is taken, of more `n_flips` random ones.

    Args:
        differences: (episode, candidate); NaN where an episode has none, which counts as no evidence.
        n_flips: random flips.
        seed: of the flips.

    Returns:
        The statistics and p-values; p is 1 where there is no difference at all.
    """
    values = np.nan_to_num(np.asarray(differences, np.float64))
    n_episodes, n_candidates = values.shape
    norm = np.sqrt((values**2).sum(axis=0))
    # A flip changes no square, so the norm is the same in each.
    scaled = np.divide(values, norm, out=np.zeros_like(values), where=norm > 0)
    found = scaled.sum(axis=0)
    is_exact = 2**n_episodes <= n_flips
    if is_exact:
        bits = np.arange(2**n_episodes)[:, None] >> np.arange(n_episodes) & 1
        signs = 1.0 - 2.0 * bits
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (n_flips, n_episodes))
    reached, best_reached = np.zeros(n_candidates), np.zeros(n_candidates)
    some = max(1, _BATCH_BYTES // (8 * max(1, n_candidates)))
    least = found - 1e-9  # sums of the same numbers in another order
    for start in range(0, len(signs), some):
        flipped = signs[start : start + some] @ scaled
        reached += (flipped >= least).sum(axis=0)
        best = np.sort(flipped.max(axis=1, initial=-np.inf))
        best_reached += len(best) - np.searchsorted(best, least)
    # Of random flips the one that was found is one more.
    more, total = (0, len(signs)) if is_exact else (1, len(signs) + 1)
    return SignFlips(found, (reached + more) / total, (best_reached + more) / total, 1 / total)


def all_signs(n_episodes: int, n_draws: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], bool]:
    """Return (draw, episode) signs, 1 or -1, and whether they are all that there are.

    Args:
        n_episodes: how many have a sign.
        n_draws: random ones, where there are more than that.
        rng: draws them.
    """
    if n_episodes < 40 and 2**n_episodes <= n_draws:
        bits = np.arange(2**n_episodes)[:, None] >> np.arange(n_episodes) & 1
        return (1 - 2 * bits).astype(np.float32), True
    return rng.choice(np.array([-1, 1], np.float32), (n_draws, n_episodes)), False


def relabellings(
    is_first: NDArray[np.bool_],
    strata: NDArray[np.integer[Any]],
    n_draws: int,
    rng: np.random.Generator,
    *,
    may_be_exact: bool = True,
) -> tuple[NDArray[np.float32], bool]:
    """Return labels that were permuted within strata, and whether they are all that there are.

    Args:
        is_first: (episode,) whether an episode is of the first group.
        strata: (episode,) whole numbers; each keeps how many of its episodes are of the first group.
        n_draws: random ones, where there are more than that.
        rng: draws them.
        may_be_exact: whether all may be taken where they are few.

    Returns:
        (draw, episode) 1 or 0.
    """
    members = [np.flatnonzero(strata == code) for code in np.unique(strata)]
    counts = [int(is_first[of].sum()) for of in members]
    n_all = math.prod(math.comb(len(of), n) for of, n in zip(members, counts, strict=True))
    if may_be_exact and n_all <= n_draws:
        labels = np.zeros((n_all, len(is_first)), np.float32)
        choices = [combinations(of.tolist(), n) for of, n in zip(members, counts, strict=True)]
        for draw, chosen in enumerate(product(*choices)):
            labels[draw, [one for of in chosen for one in of]] = 1
        return labels, True
    labels = np.zeros((n_draws, len(is_first)), np.float32)
    for of, n in zip(members, counts, strict=True):
        picks = of[np.argsort(rng.random((n_draws, len(of))), axis=1)[:, :n]]
        np.put_along_axis(labels, picks, 1, axis=1)
    return labels, False


def ranks(values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return the ranks, from 1, of each column's values among themselves; equal ones share their mean."""
    from scipy.stats import rankdata  # takes a while to import

    found = np.empty(values.shape, np.float32)
    some = max(1, _BATCH_BYTES // (64 * max(1, len(values))))
    for start in range(0, values.shape[1], some):
        found[:, start : start + some] = rankdata(values[:, start : start + some], axis=0)
    return found


def largest(
    weights: NDArray[np.float32],
    values: NDArray[np.float32],
    *,
    offset: float = 0.0,
    scale: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """Return for each draw the largest absolute value over all candidates of a statistic linear in the draw.

    Args:
        weights: (draw, episode) signs or labels.
        values: (episode, candidate).
        offset: subtracted from each sum.
        scale: the sum is multiplied by it.
        progress: called as `progress(done, total)`, candidates.

    Returns:
        (draw,) max over candidates of |(weights @ values - offset) * scale|.
    """
    n_candidates = values.shape[1]
    found = np.zeros(len(weights))
    some = max(1, _BATCH_BYTES // (8 * max(1, len(weights))))
    for start in range(0, n_candidates, some):
        sums = weights @ values[:, start : start + some]
        np.maximum(found, np.abs((sums - np.float32(offset)) * np.float32(scale)).max(axis=1), out=found)
        if progress is not None:
            progress(min(start + some, n_candidates), n_candidates)
    return found
