"""Doses and random draws: a condition at each dose against the mean of its random draws, state by state.

    effects = dose_effects(episodes)      # as `effects.paired_effects` takes them, with base and dose
    dose_table(effects)                   # experiment, condition, dose, control, draws, metric, …

One random set of units is not like another, so a condition is held against the mean of all draws of its
control, from the same initial states, and against each draw by itself. `dose_words` says it in sentences.
Knows no store.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lerobot_attn.analysis.effects import BASELINE, METRICS, Metric, mcnemar, pairs, sign_flip
from lerobot_attn.analysis.intervals import paired_interval

DOSE_COLUMNS = (
    *("experiment", "condition", "dose", "control", "draws", "metric", "a", "b", "difference"),
    *("low", "high", "n", "p", "p_holm", "n_beyond"),
)


class Side(NamedTuple):
    """One or more conditions that are taken together: the draws of a control at one dose, or a single one.

    Attributes:
        name: the condition's, or what its draws are called without their number.
        base: without the dose.
        dose: NaN where there is none.
        members: names of the conditions.
        is_random: whether the members are random draws.
    """

    name: str
    base: str
    dose: float
    members: tuple[str, ...]
    is_random: bool


# Of a side and of its control: member → its episodes, by initial state.
_Paired = tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]


class DoseEffect(NamedTuple):
    """A condition at a dose, or its control's draws, against another side, in one metric.

    Attributes:
        experiment: its name.
        side: what is compared.
        control: what it is compared with.
        metric: its name.
        a: mean of the side over the initial states; of draws, of their mean.
        b: likewise of the control.
        difference: a - b.
        low, high: bootstrap interval over initial states; NaN with fewer than two.
        n: initial states in which both have the metric.
        p: sign-flip test, of a share without draws the exact McNemar test.
        p_holm: p corrected for the doses that were tried (Holm 1979, Scandinavian Journal of Statistics
            6:65-70).
        n_beyond: of the control's members, how many the condition's mean lies beyond, on the difference's
            side.
        confidence: of the interval.
    """

    experiment: str
    side: Side
    control: Side
    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    n: int
    p: float
    p_holm: float
    n_beyond: int
    confidence: float

    @property
    def is_shown(self) -> bool:
        """Whether there is a difference by every measure.

        The interval leaves zero out, the corrected p is small, and the condition lies beyond each draw: the
        interval speaks of other initial states, and not of other draws.
        """
        excludes_zero = self.low > 0 or self.high < 0
        is_beyond = self.n_beyond == len(self.control.members)
        return excludes_zero and is_beyond and self.p_holm <= 1 - self.confidence


class Slope(NamedTuple):
    """How a condition's distance from its control grows with the dose.

    Attributes:
        experiment, base, control, metric: names.
        slope: mean over initial states of the least-squares slope, metric a unit of dose.
        low, high: bootstrap interval over initial states.
        n: initial states that have every dose.
        p: sign-flip test.
        doses: that were tried.
        n_draws: draws of the control that are there at every dose.
        n_beyond: of these, how many the condition's own slope lies beyond, on the slope's side.
        confidence: of the interval.
    """

    experiment: str
    base: str
    control: str
    metric: str
    slope: float
    low: float
    high: float
    n: int
    p: float
    doses: tuple[float, ...]
    n_draws: int
    n_beyond: int
    confidence: float

    @property
    def is_shown(self) -> bool:
        """Whether it grows by every measure, as `DoseEffect.is_shown`."""
        excludes_zero = self.low > 0 or self.high < 0
        return excludes_zero and self.p <= 1 - self.confidence and self.n_beyond == self.n_draws


def has_doses(episodes: pd.DataFrame) -> bool:
    """Return whether some condition of an experiment has a dose or random draws."""
    return "base" in episodes and bool((episodes["dose"].notna() | episodes["draw"].notna()).any())


def dose_effects(
    episodes: pd.DataFrame, *, confidence: float = 0.95, n_resamples: int = 10_000, seed: int = 0
) -> list[DoseEffect]:
    """Compare each condition that has doses or drawn controls with its controls and the baseline.

    A control's draws are pooled: in each initial state the mean of those that have the metric.

    Args:
        episodes: as `effects.paired_effects` takes them, with the columns base (the condition's name without
            dose and draw), dose and draw (NaN where there is none).
        confidence: of the intervals.
        n_resamples: of the bootstrap and of the sign-flip test.
        seed: of both.

    Returns:
        For each such condition and metric: against each control, and against the baseline; then each control
        against the baseline.

    Raises:
        SelectionError: two episodes of one condition began in the same initial state.
    """
    found: list[DoseEffect] = []
    for name, part in episodes.groupby("experiment", sort=False):
        seen: set[tuple[str, str]] = set()
        for side, other in _comparisons(part):
            if (side.name, other.name) in seen:
                continue
            seen.add((side.name, other.name))
            paired = _paired(part, side, other)
            for metric in METRICS.values():
                if metric.name in part and metric.name != "action_difference":
                    effect = _effect(str(name), paired, side, other, metric, confidence, n_resamples, seed)
                    found += [] if effect is None else [effect]
    return _corrected(found)


def _comparisons(part: pd.DataFrame) -> Iterator[tuple[Side, Side]]:
    baseline = [side for side in sides(part) if side.name == BASELINE]
    for side, controls in families(part):
        for other in [*controls, *baseline]:
            yield side, other
        for control in controls:
            for other in baseline:
                yield control, other


def sides(part: pd.DataFrame) -> list[Side]:
    """Return the conditions of one experiment in their order, draws of one control and dose together."""
    found: dict[tuple[str, float | None], list[Any]] = {}
    for condition, rows in part.groupby("condition", sort=False):
        first = rows.iloc[0]
        dose = None if pd.isna(first["dose"]) else float(first["dose"])
        is_draw = not pd.isna(first["draw"])
        key = (str(first["base"]) if is_draw else str(condition), dose)
        found.setdefault(key, [str(first["base"]), is_draw, []])[2].append(str(condition))
    result = []
    for (name, dose), (base, is_random, members) in found.items():
        called = name if not is_random or dose is None else f"{name}_dose{dose:g}"
        result.append(Side(called, base, math.nan if dose is None else dose, tuple(members), is_random))
    return result


def families(part: pd.DataFrame) -> Iterator[tuple[Side, list[Side]]]:
    """Yield each condition of one experiment that has a dose or drawn controls, with its controls."""
    control_of = dict(zip(part["condition"], part["control_of"], strict=True))
    there = sides(part)
    for side in there:
        if side.name == BASELINE or any(control_of[one] is not None for one in side.members):
            continue
        controls = [
            other
            for other in there
            if any(control_of[one] in (side.name, side.base) for one in other.members) and other is not side
        ]
        if not math.isnan(side.dose) or any(control.is_random for control in controls):
            yield side, controls


def _effect(
    experiment: str,
    paired: _Paired,
    side: Side,
    control: Side,
    metric: Metric,
    confidence: float,
    n_resamples: int,
    seed: int,
) -> DoseEffect | None:
    own, other = _values(paired, metric.name)
    a, b = own.mean(axis=1), other.mean(axis=1)
    both = (a.notna() & b.notna()).to_numpy()
    if not both.any():
        return None
    differences = (a - b).to_numpy()[both]
    low, high = paired_interval(differences, confidence=confidence, n_resamples=n_resamples, seed=seed)
    if metric.is_share and len(side.members) == len(control.members) == 1:
        p = mcnemar(int(np.sum(differences > 0)), int(np.sum(differences < 0)))
    else:
        p = sign_flip(differences, n_resamples, seed)
    difference = float(differences.mean())
    beyond = (a.to_numpy()[both, None] - other.to_numpy()[both]) * math.copysign(1.0, difference)
    n_beyond = sum(_mean(column) > 0 for column in beyond.T)
    means = float(a.to_numpy()[both].mean()), float(b.to_numpy()[both].mean())
    names = (experiment, side, control, metric.name)
    return DoseEffect(*names, *means, difference, low, high, int(both.sum()), p, p, n_beyond, confidence)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def paired_values(
    part: pd.DataFrame, side: Side, control: Side, metric: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the metric of both sides, (initial state, member) each, rows of the same initial states.

    Args:
        part: episodes of one experiment.
        side: one.
        control: the other one.
        metric: its column.

    Raises:
        SelectionError: two episodes of one condition began in the same initial state.
    """
    return _values(_paired(part, side, control), metric)


def _paired(part: pd.DataFrame, side: Side, control: Side) -> _Paired:
    """Return the episodes of both sides' members that began as the side's first member did."""
    tables = [
        {member: pairs(part, side.members[0], member).control for member in members}
        for members in (side.members, control.members)
    ]
    return tables[0], tables[1]


def _values(paired: _Paired, metric: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    found = [
        pd.DataFrame({member: rows[metric].astype(float) for member, rows in members.items()})
        for members in paired
    ]
    common = found[0].index.intersection(found[1].index)
    return found[0].loc[common], found[1].loc[common]


def _corrected(effects: Sequence[DoseEffect]) -> list[DoseEffect]:
    """Return the effects with p corrected over the doses of one base, control and metric."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, one in enumerate(effects):
        key = (one.experiment, one.side.base, one.control.base, one.metric)
        groups.setdefault(key, []).append(index)
    result = list(effects)
    for members in groups.values():
        corrected = holm([effects[index].p for index in members])
        for index, p in zip(members, corrected, strict=True):
            result[index] = effects[index]._replace(p_holm=p)
    return result


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for how many they are: the chance of any false find stays at the level.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65-70.
    """
    order = sorted(range(len(p)), key=lambda index: p[index])
    corrected, least = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = least
    return corrected


def dose_slopes(
    episodes: pd.DataFrame,
    metric: str,
    *,
    confidence: float = 0.95,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> list[Slope]:
    """Return how the distance from the drawn controls grows with the dose, where there are two doses or more.

    Args:
        episodes: as `dose_effects` takes them.
        metric: its column.
        confidence: as `dose_effects` takes it.
        n_resamples: likewise.
        seed: likewise.
    """
    found = []
    for name, part in episodes.groupby("experiment", sort=False):
        courses: dict[tuple[str, str], dict[float, tuple[pd.Series, dict[int, pd.Series]]]] = {}
        draw_of = dict(zip(part["condition"], part["draw"], strict=True))
        for side, controls in families(part):
            for control in controls:
                if control.is_random and metric in part and not math.isnan(side.dose):
                    own, other = paired_values(part, side, control, metric)
                    draws = {int(draw_of[member]): other[member] for member in other}
                    by_dose = courses.setdefault((side.base, control.base), {})
                    by_dose[side.dose] = own.mean(axis=1), draws
        for (base, control_base), by_dose in courses.items():
            if len(by_dose) < 2:
                continue
            own = _slopes({dose: one for dose, (one, _) in by_dose.items()})
            pooled = {dose: pd.DataFrame(draws).mean(axis=1) for dose, (_, draws) in by_dose.items()}
            slopes = (own - _slopes(pooled)).dropna().to_numpy()
            if not len(slopes):
                continue
            mean = float(slopes.mean())
            numbers = set.intersection(*(set(draws) for _, draws in by_dose.values()))
            alone = [
                float(_slopes({dose: draws[number] for dose, (_, draws) in by_dose.items()}).mean())
                for number in sorted(numbers)
            ]
            n_beyond = sum((float(own.mean()) - one) * mean > 0 for one in alone)
            low, high = paired_interval(slopes, confidence=confidence, n_resamples=n_resamples, seed=seed)
            p = sign_flip(slopes, n_resamples, seed)
            names, doses = (str(name), base, control_base, metric), tuple(by_dose)
            found.append(
                Slope(*names, mean, low, high, len(slopes), p, doses, len(alone), n_beyond, confidence)
            )
    return found


def _slopes(by_dose: Mapping[float, pd.Series]) -> pd.Series:
    """Return the least-squares slope over the doses of each initial state that has a value at each."""
    table = pd.DataFrame(by_dose).dropna()
    doses = np.array(list(by_dose))
    centred = doses - doses.mean()
    return pd.Series(table.to_numpy() @ centred / (centred @ centred), table.index)


def dose_table(effects: Sequence[DoseEffect]) -> pd.DataFrame:
    """Return effects as the rows of `doses.csv`, with the columns `DOSE_COLUMNS`."""
    rows = [
        {
            **one._asdict(),
            "condition": one.side.name,
            "dose": one.side.dose,
            "control": one.control.name,
            "draws": len(one.control.members) if one.control.is_random else 0,
        }
        for one in effects
    ]
    return pd.DataFrame(rows, columns=list(DOSE_COLUMNS))
