"""What the doses of an experiment showed, in sentences that can say "no effect of these units shown".

    verdicts(episodes, dose_effects(episodes))

The numbers are those of `analysis.doses`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from lerobot_attn.analysis.doses import DoseEffect, Side, Slope, families
from lerobot_attn.analysis.effects import BASELINE, METRICS, Metric
from lerobot_attn.analysis.intervals import FEW_EPISODES


def outcome_of(part: pd.DataFrame) -> str:
    """Return the metric that an experiment's question is about: named by its plan, or else the success."""
    named = list(part.get("outcome", pd.Series(dtype=object)).dropna().unique())
    return str(named[0]) if named and named[0] in METRICS else "success"


def verdicts(
    episodes: pd.DataFrame, effects: Sequence[DoseEffect], slopes: Sequence[Slope] = ()
) -> list[str]:
    """Say what an experiment's doses showed in the metric that it asked about, and no more than that.

    Args:
        episodes: as `dose_effects` takes them; `outcome` and `expectation`, if there, are the plan's.
        effects: of `dose_effects`.
        slopes: of `dose_slopes`, in the same metric.

    Returns:
        Sentences: what was expected, each condition at each dose, then of each base what was shown.
    """
    lines = []
    for name, part in episodes.groupby("experiment", sort=False):
        metric = METRICS[outcome_of(part)]
        expected = list(part.get("expectation", pd.Series(dtype=object)).dropna().unique())
        lines.append(f"Asked before the run: {metric.text}.")
        lines += [f"Expected before the run: {str(one).rstrip('.')}." for one in expected]
        here = {
            (one.side.name, one.control.name): one
            for one in effects
            if (one.experiment, one.metric) == (str(name), metric.name)
        }
        bases: dict[str, list[DoseEffect]] = {}
        for side, controls in families(part):
            said, held = _said_of(part, side, controls, here, metric)
            lines += said
            bases.setdefault(side.base, []).extend(held)
        for base, held in bases.items():
            lines += _shown_at(base, held)
            lines += [
                _slope_said(one, metric)
                for one in slopes
                if (one.experiment, one.base, one.metric) == (str(name), base, metric.name)
            ]
        lines += _others_said(part, here, metric)
    return lines


def _said_of(
    part: pd.DataFrame,
    side: Side,
    controls: Sequence[Side],
    here: Mapping[tuple[str, str], DoseEffect],
    metric: Metric,
) -> tuple[list[str], list[DoseEffect]]:
    lines, held = [], []
    own = here.get((side.name, BASELINE))
    head = f"{side.name}: {_against(own, metric)} against the baseline" if own else side.name
    for control in controls:
        effect = here.get((side.name, control.name))
        if not control.is_random:
            continue
        if effect is None:
            lines.append(f"{side.name}: {_known(part, side, metric)}, so nothing can be said of it.")
            continue
        held.append(effect)
        n_draws = len(control.members)
        alone = here.get((control.name, BASELINE))
        theirs = f", its {n_draws} random draws {_against(alone, metric)}" if alone else ""
        if math.isnan(effect.low):
            lines.append(f"{head}{theirs}; nothing can be said from {effect.n} initial states.")
            continue
        said = (
            f"{head}{theirs}; apart from them {_against(effect, metric)}, p = {effect.p_holm:.2g} (Holm), "
            f"beyond {effect.n_beyond} of {n_draws} draws, {effect.n} initial states: "
        )
        said += "an effect of these units" if effect.is_shown else "no effect of these units shown"
        if effect.n < _n_states(part, side):
            said += f"; {_known(part, side, metric)}"
        if effect.n < FEW_EPISODES:
            said += "; an interval of so few is rough"
        lines.append(f"{said}.")
    return lines, held


def _n_states(part: pd.DataFrame, side: Side) -> int:
    return int(part["condition"].isin(side.members).sum())


def _known(part: pd.DataFrame, side: Side, metric: Metric) -> str:
    """Say in how many episodes of a side the metric is known; there is no lift where nothing was grasped."""
    rows = part[part["condition"].isin(side.members)]
    return f"the {metric.text} is known in {int(rows[metric.name].notna().sum())} of {len(rows)} episodes"


def _shown_at(base: str, held: Sequence[DoseEffect]) -> list[str]:
    if not held:
        return [
            f"{base}: nothing is known of random draws as its control, so nothing can be said of its units."
        ]
    shown = [one for one in held if one.is_shown]
    doses = [f"{one.side.dose:g}" for one in shown if not math.isnan(one.side.dose)]
    n = f"{len(held)} dose{'s' * (len(held) > 1)}" if not math.isnan(held[0].side.dose) else "the run"
    if not shown:
        return [f"{base}: no effect of these units shown in {n}."]
    ways = {one.difference > 0 for one in shown}
    way = "up and down" if len(ways) > 1 else "up" if ways.pop() else "down"
    where = f" at dose {', '.join(doses)} of {n}" if doses else ""
    return [f"{base}: an effect of these units, {way}{where}."]


def _slope_said(slope: Slope, metric: Metric) -> str:
    head = f"{slope.base}: {metric.said(slope.slope)} a unit of dose against its random draws"
    if math.isnan(slope.low):
        return f"{head}; nothing can be said from {slope.n} initial states."
    ends = f"{metric.said(slope.low, unit=False)} to {metric.said(slope.high, unit=False)}"
    verdict = "it grows with the dose" if slope.is_shown else "no growth with the dose shown"
    beyond = f"beyond {slope.n_beyond} of {slope.n_draws} draws"
    return f"{head} ({ends}), p = {slope.p:.2g}, {beyond}, {slope.n} initial states: {verdict}."


def _others_said(part: pd.DataFrame, here: Mapping[tuple[str, str], DoseEffect], metric: Metric) -> list[str]:
    """Say what controls that are no random draws did, such as a word in the prompt."""
    names = [control.name for _, controls in families(part) for control in controls if not control.is_random]
    lines = []
    for name in dict.fromkeys(names):
        effect = here.get((name, BASELINE))
        if effect is None:
            continue
        shown = (effect.low > 0 or effect.high < 0) and effect.p <= 1 - effect.confidence
        verdict = "a difference" if shown else "no difference shown"
        lines.append(
            f"{name}, the control without firing: {_against(effect, metric)} against the baseline, p = "
            f"{effect.p:.2g}, {effect.n} initial states: {verdict}."
        )
    return lines


def _against(effect: DoseEffect, metric: Metric) -> str:
    said = metric.said(effect.difference)
    if math.isnan(effect.low):
        return said
    return f"{said} ({metric.said(effect.low, unit=False)} to {metric.said(effect.high, unit=False)})"
