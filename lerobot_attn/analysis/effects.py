"""What an intervention changed: conditions of an experiment against each other, pair by pair.

    effects = paired_effects(episodes)          # a tidy table, one row an episode: see `paired_effects`
    effects_table(effects)                      # experiment, condition, control, metric, difference, low, …
    print(sentence(effects[0]))

A pair is two episodes from the same initial state: same task group, task, episode index and seed. Knows no
store; `analysis.behaviour` measures episodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lerobot_attn.analysis.intervals import FEW_EPISODES, paired_interval
from lerobot_attn.errors import SelectionError

BASELINE = "baseline"  # the condition without an intervention
COLUMNS = ("experiment", "condition", "control", "metric", "difference", "low", "high", "n", "p")
_PAIR = ["task_group", "task_id", "episode_index"]
_SAME_M = 1e-3  # how far apart two first scenes may lie: the simulator repeats an initial state exactly


class Metric(NamedTuple):
    """One number of an episode.

    Attributes:
        name: its column, and its name in `effects.csv`.
        text: what it is, in words.
        units: of its values.
        is_share: whether it is 0 or 1 in an episode, so that its mean is a share.
        factor: from its units to those that sentences say it in.
        said_in: these; "" for its own.
        digits: after the point, in sentences.
    """

    name: str
    text: str
    units: str = "1"
    is_share: bool = False
    factor: float = 1.0
    said_in: str = ""
    digits: int = 3

    def said(self, value: float, *, unit: bool = True) -> str:
        """Return a difference in words, e.g. "+1.4 cm" of 0.014 m, "-12 points" of a share."""
        if self.is_share:
            return f"{100 * value:+.0f}{' points' if unit else ''}"
        units = self.said_in or ("" if self.units == "1" else self.units)
        return f"{self.factor * value:+.{self.digits}f}{f' {units}' if unit and units else ''}"


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("success", "success", is_share=True),
        Metric("approached_target", "target approached", is_share=True),
        Metric("approached_named", "named object approached", is_share=True),
        Metric("action_difference", "rms change of the first chunk", "policy units"),
        Metric("path_length", "path of the hand", "m"),
        Metric("lift_height", "mean height of the lift", "m", False, 100, "cm", 1),
        Metric("lift_height_max", "greatest height of the lift", "m", False, 100, "cm", 1),
        Metric("mean_speed", "mean speed of the hand", "mm a frame", False, 1, "", 2),
        Metric("steps_to_success", "steps to success", "actions"),
    )
}


class Effect(NamedTuple):
    """A condition against its control in one metric, over their pairs.

    Attributes:
        experiment, condition, control, metric: names.
        difference: mean over the pairs of condition minus control.
        low, high: bootstrap interval over initial states; NaN with fewer than two pairs.
        n: pairs in which both episodes have the metric.
        p: exact McNemar test of a share, sign-flip test of any other metric; NaN of the action difference
            against the baseline, which cannot be negative.
        a, b: means of condition and control over the pairs.
        n_only_condition, n_only_control: of a share, pairs in which only one of the two is 1.
        confidence: of the interval.
    """

    experiment: str
    condition: str
    control: str
    metric: str
    difference: float
    low: float
    high: float
    n: int
    p: float
    a: float
    b: float
    n_only_condition: int
    n_only_control: int
    confidence: float

    @property
    def is_shown(self) -> bool:
        """Whether there is a difference by both measures: the interval leaves zero out, and p is small."""
        excludes_zero = self.low > 0 or self.high < 0
        return excludes_zero and (math.isnan(self.p) or self.p <= 1 - self.confidence)

    @property
    def n_needed(self) -> int | None:
        """Pairs that a difference of 10 points would need (`episodes_needed`); None of what is no share."""
        if not METRICS[self.metric].is_share:
            return None
        return episodes_needed((self.n_only_condition + self.n_only_control) / self.n)


class Pairing(NamedTuple):
    """The pairs of a condition and its control.

    Attributes:
        condition, control: (pair, …) tables whose rows belong together.
        left_out: a line for each group of episodes that has no partner, and why.
    """

    condition: pd.DataFrame
    control: pd.DataFrame
    left_out: tuple[str, ...]


def paired_effects(
    episodes: pd.DataFrame, *, confidence: float = 0.95, n_resamples: int = 10_000, seed: int = 0
) -> list[Effect]:
    """Compare each condition with the baseline and with its matched controls, metric by metric.

    Args:
        episodes: one row an episode, complete ones alone. Columns: experiment, condition, control_of (the
            condition whose control this one is, or None), task_group, task_id, episode_index, seed, and of
            `METRICS` those that were measured, NaN where an episode has none; `start`, if there, holds
            numbers of the first scene (m), by which pairs are checked.
        confidence: of the intervals.
        n_resamples: of the bootstrap, and of the sign-flip test of more than 12 pairs.
        seed: of both.

    Returns:
        An effect for each comparison and metric that has a pair; controls are compared with the baseline too.

    Raises:
        SelectionError: no two conditions, or two episodes of one condition from the same initial state.
    """
    found = []
    for experiment, of_it in episodes.groupby("experiment", sort=False):
        for condition, control in comparisons(of_it):
            pairing = pairs(of_it, condition, control)
            for metric in METRICS.values():
                if metric.name in episodes:
                    a, b = (part[metric.name].to_numpy(float) for part in pairing[:2])
                    both = np.isfinite(a) & np.isfinite(b)
                    if both.any():
                        names = (str(experiment), condition, control, metric.name)
                        found.append(_effect(names, a[both], b[both], confidence, n_resamples, seed))
    return found


def comparisons(episodes: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Yield (condition, control) of one experiment: matched controls first, then the baseline.

    Raises:
        SelectionError: there is one condition alone.
    """
    names = list(dict.fromkeys(episodes["condition"]))
    if len(names) < 2:
        raise SelectionError(f"one condition alone ({names[0]}), expected two or more to compare")
    control_of = dict(zip(episodes["condition"], episodes["control_of"], strict=True))
    # The control of a condition with doses may be that of all of them, named without the dose.
    base_of = dict(zip(episodes["condition"], episodes.get("base", episodes["condition"]), strict=True))
    for name in names:
        wholes = {name, base_of.get(name, name)}
        yield from ((name, control) for control in names if control_of[control] in wholes)
        if name != BASELINE and BASELINE in names and control_of[BASELINE] != name:
            yield name, BASELINE


def pairs(episodes: pd.DataFrame, condition: str, control: str) -> Pairing:
    """Put episodes of two conditions side by side that began in the same initial state.

    Args:
        episodes: of one experiment, as `paired_effects` takes them.
        condition: the first one's name.
        control: the other one's.

    Raises:
        SelectionError: two episodes of one condition began in the same initial state.
    """
    sides = []
    for name in (condition, control):
        side = episodes[episodes["condition"] == name].set_index(_PAIR)
        if side.index.has_duplicates:
            group, task, index = side.index[side.index.duplicated()][0]
            raise SelectionError(
                f"{name}: two episodes {index} of {group}_{task}, expected one; move one of them elsewhere"
            )
        sides.append(side)
    a, b = sides
    left_out = []
    for name, side, other in ((condition, a, b), (control, b, a)):
        if alone := [key for key in side.index if key not in other.index]:
            partner = control if name == condition else condition
            left_out.append(f"{name}: {_named(alone)} without a partner in {partner}")
    common = [key for key in a.index if key in b.index]
    for column, what, same in (("seed", "seed", _same_seed), ("start", "first scene", _same_start)):
        if column not in episodes:
            continue
        told = zip(common, a.loc[common, column], b.loc[common, column], strict=True)
        if unlike := [key for key, own, other in told if not same(own, other)]:
            left_out.append(f"{condition} and {control}: {_named(unlike)} with another {what}")
            common = [key for key in common if key not in unlike]
    return Pairing(a.loc[common], b.loc[common], tuple(left_out))


def _named(keys: Sequence[tuple[str, int, int]]) -> str:
    shown = ", ".join(f"{group}_{task} episode {index}" for group, task, index in keys[:3])
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{shown}{more}"


def _same_seed(own: Any, other: Any) -> bool:
    return bool(own == other or (pd.isna(own) and pd.isna(other)))


def _same_start(own: Any, other: Any) -> bool:
    if own is None or other is None:  # nothing tells
        return True
    first, other = np.asarray(own, float), np.asarray(other, float)
    return first.shape == other.shape and bool(np.allclose(first, other, atol=_SAME_M, equal_nan=True))


def _effect(
    names: tuple[str, str, str, str],
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    confidence: float,
    n_resamples: int,
    seed: int,
) -> Effect:
    differences = a - b
    low, high = paired_interval(differences, confidence=confidence, n_resamples=n_resamples, seed=seed)
    metric, is_share = names[3], METRICS[names[3]].is_share
    only_a, only_b = (int(np.sum(differences == sign)) if is_share else 0 for sign in (1, -1))
    if is_share:
        p = mcnemar(only_a, only_b)
    elif metric == "action_difference" and names[2] == BASELINE:
        p = math.nan
    else:
        p = sign_flip(differences, n_resamples, seed)
    means = float(a.mean()), float(b.mean())
    return Effect(*names, float(differences.mean()), low, high, len(a), p, *means, only_a, only_b, confidence)


def effects_table(effects: Sequence[Effect]) -> pd.DataFrame:
    """Return effects as the rows of `effects.csv`, with the columns `COLUMNS`."""
    return pd.DataFrame(effects, columns=list(Effect._fields))[list(COLUMNS)]


def mcnemar(n_only_a: int, n_only_b: int) -> float:
    """Return the two-sided p of the exact McNemar test: a binomial test of the unlike pairs against one half.

    Source: McNemar 1947, Psychometrika 12:153-157; exact form e.g. in Agresti, Categorical Data Analysis.

    Args:
        n_only_a: pairs in which only the first is 1.
        n_only_b: pairs in which only the second is 1.
    """
    n = n_only_a + n_only_b
    tail: int = sum(math.comb(n, k) for k in range(min(n_only_a, n_only_b) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def episodes_needed(
    discordance: float, difference: float = 0.1, *, alpha: float = 0.05, power: float = 0.8
) -> int:
    """Return how many pairs a difference of two shares would need to be found by McNemar's test.

    n = (z₁₋α⸝₂ √ψ + z_power √(ψ − δ²))² / δ², with ψ the share of unlike pairs and δ the difference; ψ is at
    least δ, because pairs that are alike make no difference. Source: Connor 1987, Biometrics 43:207-211.

    Args:
        discordance: share of pairs that were seen to be unlike, 0 to 1.
        difference: to be found, 0 to 1.
        alpha: two-sided level of the test.
        power: probability to find the difference if it is there.
    """
    psi = max(discordance, difference)
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    root = z_alpha * math.sqrt(psi) + z_power * math.sqrt(psi - difference**2)
    return math.ceil(root**2 / difference**2)


def sign_flip(differences: NDArray[np.float64], n_draws: int, seed: int) -> float:
    """Return the two-sided p of the mean where each pair's sides may be exchanged; exact up to 12 pairs.

    Args:
        differences: (pair,), no NaN.
        n_draws: random flips of more pairs.
        seed: of the flips.
    """
    n = len(differences)
    if n <= 12:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), (n_draws, n))
    means = np.abs(signs @ differences)
    observed = abs(differences.sum())
    n_as_large = int(np.sum(means >= observed * (1 - 1e-12)))
    return n_as_large / len(signs) if n <= 12 else (n_as_large + 1) / (len(signs) + 1)


def sentence(effect: Effect) -> str:
    """Say in one sentence what was found, and no more than that: "no difference shown" is not "no effect"."""
    metric = METRICS[effect.metric]
    scale, unit, digits = metric.factor, _unit(metric), metric.digits
    if metric.is_share:
        scale, unit, digits = 100.0, " points", 0
    percent = " %" if metric.is_share else ""
    sides = (
        f"{scale * effect.a:.{digits}f}{percent} against {scale * effect.b:.{digits}f}{percent} "
        f"in {effect.n} {'pair' if effect.n == 1 else 'pairs'}"
    )
    head = f"{effect.condition} against {effect.control}, {metric.text}: "
    if math.isnan(effect.low):
        return f"{head}{sides}; nothing can be said from so few."
    low, high, difference = (scale * value for value in (effect.low, effect.high, effect.difference))
    facts = [f"{effect.confidence:.0%} interval {low:+.{digits}f} to {high:+.{digits}f}"]
    if not math.isnan(effect.p):
        facts.append(f"p = {effect.p:.2g}")
    said = f"{head}{sides}, {difference:+.{digits}f}{unit} ({', '.join(facts)})"
    if effect.metric == "action_difference" and effect.control == BASELINE:
        said += "; this is never below zero, so compare it with the matched control's"
    elif not effect.is_shown:
        said += "; no difference shown"
        if effect.n_needed is not None:
            said += f" (one of 10 points would need about {effect.n_needed} pairs)"
    if effect.low == effect.high and metric.is_share:
        limit = 100 * (1 - (1 - effect.confidence) ** (1 / effect.n))
        said += (
            f"; every pair alike, which also happens in {1 - effect.confidence:.0%} of such runs where "
            f"{limit:.0f} % of all pairs are unlike"
            if effect.difference == 0
            else ""
        )
    if effect.n < FEW_EPISODES:
        said += "; an interval of so few pairs is rough"
    return said + "."


def _unit(metric: Metric) -> str:
    units = metric.said_in or metric.units
    return "" if units == "1" else f" {units}"
