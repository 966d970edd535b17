"""Whether differences are above zero, by flipping their signs, however many of them were tried.

Knows neither attention nor episodes but as numbers.
"""

from __future__ import annotations

from typing import NamedTuple

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
