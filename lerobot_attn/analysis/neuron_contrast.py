"""Which units fire differently in two groups of episodes, or of moments; against all that were tried.

    found = contrast(episodes, labels)  # labels: per episode (inference,) 1, 0 or NaN
    found.table                         # stream, layer, unit, group, reduction, auc, low, high, p_corrected

The area under the curve (AUC) is the probability that a unit fires more in a random member of the first group
than in one of the second; 0.5 is chance. Inferences of an episode resemble each other, so the episode is what
is counted, drawn and permuted. Draws nothing and opens no file.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.areas import Areas, share_reached
from lerobot_attn.analysis.neurons import Block, Choice, Units, activations, blocks_of
from lerobot_attn.analysis.permutation import ranks
from lerobot_attn.analysis.sources import Source, path_of
from lerobot_attn.errors import SelectionError
from lerobot_attn.sizes import Progress

FEWEST = 4  # episodes (of each group): two for each half of the held-out measure
_DONORS = 20  # other episodes whose labels stand for the time course

_Floats = NDArray[np.float32]
_Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ContrastDraws:
    """How many draws a contrast makes.

    Attributes:
        n_permutations: of the correction for all that were tried; all of them where there are fewer.
        n_splits: ways to halve the episodes, for the held-out area.
        n_chosen: units chosen on one half.
        n_held_out_permutations: of the held-out area.
        n_resamples: of the intervals.
        confidence: of the intervals.
        top: rows of the table, the largest differences; the held-out units come on top.
        seed: of all.
    """

    n_permutations: int = 2000
    n_splits: int = 5
    n_chosen: int = 10
    n_held_out_permutations: int = 99
    n_resamples: int = 2000
    confidence: float = 0.95
    top: int = 500
    seed: int = 0


class HeldOut(NamedTuple):
    """The area of chosen units on episodes that they were not chosen on, turned so that more is better.

    Attributes:
        auc: mean over splits and chosen units; 0.5 is chance. NaN with too few episodes.
        null: (permutation,) the same of permuted labels.
        p: share of permutations that reach it, one-sided.
    """

    auc: float
    null: _Doubles
    p: float


@dataclass(frozen=True)
class Contrast:
    """What `contrast` found.

    Attributes:
        kind: "between" episodes, or "within" them.
        table: the units with the largest differences, one row each: stream, layer, unit, group, reduction,
            auc, low, high, p_corrected, auc_held_out, n_episodes, denoise_step, auc_time, p_beyond_time.
            `auc_held_out` is of the units that are the best on one half of the episodes, measured on the
            other, and NaN of all others; only their mean is fair, because rows are ordered by all episodes.
            The last two, of a contrast within episodes, say what the labels of other episodes at the same
            fraction of the episode give, and whether the unit differs more than that (corrected too).
        n_tried: units, times groups and reductions, that were tried.
        n_silent: of them, those that never change.
        n_first, n_second: episodes (or, within, episodes with both labels, twice).
        smallest_p: the smallest corrected p that so few episodes can give.
        p: (tried,) corrected p of every unit.
        auc: (tried,) area of every unit.
        largest_null: (permutation,) the largest distance from 0.5 of all units, under permuted labels.
        null_counts: (bin,) mean number of units in each of `areas.N_BINS` bins from 0 to 1, under permuted
        labels. held_out: see `HeldOut`.
        notes: what was left out, and why, one line each.
        how: how many draws were made.
    """

    kind: Literal["between", "within"]
    table: pd.DataFrame
    n_tried: int
    n_silent: int
    n_first: int
    n_second: int
    smallest_p: float
    p: _Floats
    auc: _Floats
    largest_null: _Doubles
    null_counts: _Doubles
    held_out: HeldOut
    notes: tuple[str, ...]
    how: ContrastDraws

    def found(self, alpha: float = 0.05) -> int:
        """Return how many units differ, at a corrected p of at most alpha."""
        return int((self.p <= alpha).sum())


def contrast(
    episodes: Sequence[Source],
    labels: Sequence[_Doubles],
    choice: Choice | None = None,
    *,
    strata: Sequence[Hashable] | None = None,
    how: ContrastDraws | None = None,
    progress: Progress | None = None,
) -> Contrast:
    """Compare every unit's activations between two groups, given by labels.

    Where each episode has one label, the contrast is between episodes: the unit's mean over an episode's
    inferences is one value, ranked within the episode's stratum (its task), and the labels are permuted
    between episodes of a stratum. Where episodes have both labels, it is within them: the area of each such
    episode by itself, whose mean is tested by flipping signs by episode (exchanging the two groups in it).
    Both keep an episode's inferences together, so their likeness is no evidence. The corrected p is the
    share of permutations in which the largest difference of all units reaches a unit's (max statistic,
    Westfall & Young, "Resampling-based multiple testing", 1993), to either side.

    Args:
        episodes: with neurons or residuals; each is read once.
        labels: of each episode (inference,): 1 the first group, 0 the second, NaN neither.
        choice: which activations; one denoise step or their mean.
        strata: of each episode, e.g. its task: groups are compared within it. None: one for all.
        how: how many draws.
        progress: called as `progress(done, total)`.

    Returns:
        The contrast.

    Raises:
        SelectionError: nothing was recorded, episodes differ in what was recorded, a group is empty, or there
            are fewer than four episodes (of each group, between episodes).
    """
    choice, how = choice or Choice(), how or ContrastDraws()
    if choice.denoise_step == "all":
        raise SelectionError("denoise step 'all': expected one number, or 'mean', for a contrast")
    units = Units(blocks_of(_arrays(episodes[0]), choice))
    has_both = [_has_both(own) for own in labels]
    is_within = any(has_both)
    kept, notes = _usable(labels, has_both, is_within)
    groups: list[Hashable] = [strata[i] if strata is not None else 0 for i in kept]
    is_first = np.array([np.nanmean(labels[i]) > 0.5 for i in kept])
    if not is_within:
        kept, groups, is_first, more = _comparable(kept, groups, is_first)
        notes += more
    _check_counts(is_within, len(kept), is_first)
    ticks = _Ticks(progress, len(kept) + 2 * len(units.blocks) + how.n_splits)
    chosen = [episodes[i] for i in kept]
    own = [labels[i] for i in kept]
    if is_within:
        raw, beyond = _areas(chosen, own, units, choice, ticks)
    else:
        raw, beyond = _means(chosen, own, units, choice, ticks), None
    is_whole: NDArray[np.bool_] = np.asarray(np.isfinite(raw).all(axis=0))
    if not is_whole.any():
        raise SelectionError(
            "contrast: no token group has a value in every episode; choose groups that every episode has"
        )
    if not is_whole.all():
        absent = [b for b, part in zip(units.blocks, units.slices(), strict=True) if not is_whole[part].any()]
        names = ", ".join(dict.fromkeys(f"{b.stream} {b.group}" for b in absent))
        notes.append(f"not tried, because some episodes have no such tokens: {names}")
    places = np.flatnonzero(is_whole)
    n_silent = np.count_nonzero(raw[:, places].min(axis=0) == raw[:, places].max(axis=0))
    stack = Areas(is_within, raw[:, places], np.array(_codes(groups)), is_first)
    rng = np.random.default_rng(how.seed)
    draws, smallest = stack.draws(how.n_permutations, rng)
    found = stack.deviations(stack.own[None])[0]
    null = stack.largest(draws, lambda done, total: ticks.part(len(units.blocks), done / total))
    p = share_reached(null, np.abs(found), is_exact=smallest.is_exact)
    held, per_unit = _held_out(stack, how, ticks)
    order = np.argsort(-np.abs(found), kind="stable")
    order = order[(np.arange(len(order)) < how.top) | np.isfinite(per_unit[order])]
    table = units.table(places[order])
    low, high = stack.intervals(order, confidence=how.confidence, n_resamples=how.n_resamples, seed=how.seed)
    table = table.assign(
        auc=0.5 + found[order],
        low=low,
        high=high,
        p_corrected=p[order],
        auc_held_out=per_unit[order],
        n_episodes=len(kept),
        auc_time=np.nan,
        p_beyond_time=np.nan,
    )
    if beyond is not None:
        time = Areas(True, beyond[:, places], stack.strata, is_first)
        extra = time.deviations(time.own[None])[0]
        limit = time.largest(draws, lambda done, total: ticks.part(len(units.blocks), done / total))
        table["auc_time"] = 0.5 + found[order] - extra[order]
        table["p_beyond_time"] = share_reached(limit, np.abs(extra), is_exact=smallest.is_exact)[order]
    columns = ["stream", "layer", "unit", "group", "reduction", "auc", "low", "high", "p_corrected"]
    columns += ["auc_held_out", "n_episodes", "denoise_step", "auc_time", "p_beyond_time"]
    if len(kept) < len(episodes):
        notes.insert(0, f"{len(kept)} of {len(episodes)} episodes are compared")
    ticks.end()
    return Contrast(
        kind="within" if is_within else "between",
        table=table[columns],
        n_tried=len(places),
        n_silent=int(n_silent),
        n_first=len(kept) if is_within else int(is_first.sum()),
        n_second=len(kept) if is_within else int((~is_first).sum()),
        smallest_p=smallest.p,
        p=p.astype(np.float32),
        auc=(0.5 + found).astype(np.float32),
        largest_null=null,
        null_counts=stack.histogram(draws),
        held_out=held,
        notes=tuple(notes),
        how=how,
    )


def _held_out(stack: Areas, how: ContrastDraws, ticks: _Ticks) -> tuple[HeldOut, _Floats]:
    """Choose units on half of the episodes, and measure them on the other, several times, both ways.

    Returns:
        The mean of all; and (unit,) the areas of the first halving, chosen on its first half, else NaN.
    """
    n_units, n_null = stack.values.shape[1], how.n_held_out_permutations
    rng = np.random.default_rng([how.seed, 1])
    n_chosen = min(how.n_chosen, max(1, n_units // 2))
    # A permutation is the same in all halves: halves overlap, so what they give is alike.
    weights = np.concatenate([stack.own[None], stack.random(n_null, rng)])
    reached = np.full((how.n_splits, 2, n_null + 1), np.nan)
    per_unit = np.full(n_units, np.nan, np.float32)
    for split in range(how.n_splits):
        sides = stack.halves(rng)
        halves = [stack.half(side) for side in sides]
        for choose, measure in ((0, 1), (1, 0)):
            for draw in range(n_null + 1):
                own = halves[choose].deviations(weights[draw, sides[choose]][None])[0]
                if not np.isfinite(own).all():  # a half of one group alone
                    continue
                best = np.argpartition(-np.abs(own), n_chosen - 1)[:n_chosen]
                other = halves[measure].deviations(weights[draw, sides[measure]][None], best)[0]
                reached[split, choose, draw] = 0.5 + float(np.mean(np.sign(own[best]) * other))
                if draw == 0 and np.isfinite(other).all() and np.isnan(per_unit).all():
                    per_unit[best] = 0.5 + other
        ticks.step()
    is_known = np.isfinite(reached)
    n_known = is_known.sum(axis=(0, 1))
    if not n_known[0]:
        return HeldOut(np.nan, np.zeros(0), np.nan), per_unit
    mean = np.where(is_known, reached, 0).sum(axis=(0, 1)) / np.maximum(n_known, 1)
    null = mean[1:][n_known[1:] > 0]
    p = (1 + int((null >= mean[0] - 1e-9).sum())) / (1 + len(null))
    return HeldOut(float(mean[0]), null, p), per_unit


def _has_both(labels: _Doubles) -> bool:
    known = labels[np.isfinite(labels)]
    return len(known) > 0 and bool(known.min() < known.max())


def _usable(labels: Sequence[_Doubles], has_both: list[bool], is_within: bool) -> tuple[list[int], list[str]]:
    known = [bool(np.isfinite(own).any()) for own in labels]
    notes = []
    if is_within:
        kept = [i for i, both in enumerate(has_both) if both]
        if alone := sum(known) - len(kept):
            notes.append(f"left out: {alone} episode{'s' * (alone > 1)} with one of the two labels alone")
    else:
        kept = [i for i, is_known in enumerate(known) if is_known]
    if unknown := len(labels) - sum(known):
        notes.append(f"left out: {unknown} episode{'s' * (unknown > 1)} whose label is not known")
    return kept, notes


def _comparable(
    kept: list[int], groups: list[Hashable], is_first: NDArray[np.bool_]
) -> tuple[list[int], list[Hashable], NDArray[np.bool_], list[str]]:
    """Keep the strata in which both groups are; where there is none, all of them, as one."""
    sides = [
        {g for g, first in zip(groups, is_first, strict=True) if first == side} for side in (True, False)
    ]
    both = sides[0] & sides[1]
    if not both:
        note = ["the two groups share no task, so what differs may be the task"] if all(sides) else []
        return kept, [0] * len(kept), is_first, note
    inside = [i for i, group in enumerate(groups) if group in both]
    n_out = len(kept) - len(inside)
    note = [f"left out: {n_out} episodes of tasks that have one group alone"] if n_out else []
    return [kept[i] for i in inside], [groups[i] for i in inside], is_first[inside], note


def _check_counts(is_within: bool, n: int, is_first: NDArray[np.bool_]) -> None:
    n_first = int(is_first.sum())
    if is_within:
        if n < FEWEST:
            raise SelectionError(
                f"contrast: {n} episodes have moments of both groups; expected {FEWEST} or more"
            )
    elif min(n_first, n - n_first) < FEWEST:
        empty = "one group is empty: " if min(n_first, n - n_first) == 0 else ""
        raise SelectionError(
            f"contrast: {empty}the label holds of {n_first} episodes and not of {n - n_first}; expected "
            f"{FEWEST} or more of each"
        )


def _codes(groups: Sequence[Hashable]) -> list[int]:
    known: dict[Hashable, int] = {}
    return [known.setdefault(group, len(known)) for group in groups]


def _arrays(source: Source) -> xr.Dataset:
    return source if isinstance(source, xr.Dataset) else copy.copy(source).arrays


def _blocks(source: Source, units: Units, choice: Choice) -> Any:
    """Yield (place, activations) of an episode, after checking that it holds the same units."""
    dataset = _arrays(source)
    blocks = tuple(blocks_of(dataset, choice))
    if blocks != units.blocks:
        unlike: Block = next(b for b in (*blocks, *units.blocks) if b not in units.blocks or b not in blocks)
        raise SelectionError(
            f"{path_of(source) or 'an episode'}: holds other units than the first episode ({unlike.text}, "
            f"{unlike.n_units} units); compare runs of one policy and one choice of layers"
        )
    for part, found in zip(units.slices(), activations(dataset, choice), strict=True):
        yield part, found.values


def _means(
    episodes: Sequence[Source], labels: Sequence[_Doubles], units: Units, choice: Choice, ticks: _Ticks
) -> _Floats:
    """Return (episode, unit) means over the labelled inferences; NaN where none had such tokens."""
    means = np.full((len(episodes), len(units)), np.nan, np.float32)
    for index, (source, own) in enumerate(zip(episodes, labels, strict=True)):
        for part, values in _blocks(source, units, choice):
            known = np.isfinite(own) & np.isfinite(values).all(axis=1)
            if known.any():
                means[index, part] = values[known].mean(axis=0)
        ticks.step()
    return means


def _areas(
    episodes: Sequence[Source], labels: Sequence[_Doubles], units: Units, choice: Choice, ticks: _Ticks
) -> tuple[_Floats, _Floats]:
    """Return (episode, unit) areas minus 0.5, and the same minus what other episodes' labels give."""
    areas = np.full((len(episodes), len(units)), np.nan, np.float32)
    beyond = np.full_like(areas, np.nan)
    rng = np.random.default_rng(0)
    for index, (source, own) in enumerate(zip(episodes, labels, strict=True)):
        others = [i for i in range(len(episodes)) if i != index]
        donors = [labels[i] for i in rng.permutation(others)[:_DONORS]]
        moved = [donor[_same_time(len(own), len(donor))] for donor in donors]
        for part, values in _blocks(source, units, choice):
            known = np.isfinite(own) & np.isfinite(values).all(axis=1)
            every = [own[known], *(m[known] for m in moved)]
            usable = [one for one in every if np.isfinite(one).all() and _has_both(one)]
            if not _has_both(own[known]):
                continue
            ranked, given = ranks(values[known]), np.array(usable)
            n_first = given.sum(axis=1)
            pairs = n_first * (known.sum() - n_first)
            found = (given @ ranked - (n_first * (n_first + 1) / 2)[:, None]) / pairs[:, None] - 0.5
            areas[index, part] = found[0]
            beyond[index, part] = found[0] - (found[1:].mean(axis=0) if len(found) > 1 else 0)
        ticks.step()
    return areas, beyond


def _same_time(n: int, n_other: int) -> NDArray[np.intp]:
    """Return for each of n inferences the one at the same fraction of another episode."""
    return np.rint(np.arange(n) * (n_other - 1) / max(1, n - 1)).astype(np.intp)


class _Ticks:
    """Counts the parts of the work towards a total."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0.0

    def step(self) -> None:
        self.part(1, 1.0)

    def part(self, weight: int, fraction: float) -> None:
        """Say that a fraction of a part of some weight is done; at 1 it is counted."""
        if self._progress is not None:
            self._progress(int(self._done + weight * fraction), self._total)
        if fraction >= 1:
            self._done += weight

    def end(self) -> None:
        if self._progress is not None:
            self._progress(self._total, self._total)
