"""Doses and random draws in the report of an experiment: their table, their figure and what is said of them.

The numbers are those of `analysis.doses`; `report.effects` reads the episodes and writes the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn import figures
from lerobot_attn.analysis import behaviour
from lerobot_attn.analysis.dose_words import outcome_of, verdicts
from lerobot_attn.analysis.doses import (
    DoseEffect,
    Side,
    Slope,
    dose_effects,
    dose_slopes,
    families,
    has_doses,
    paired_values,
    sides,
)
from lerobot_attn.analysis.effects import BASELINE, METRICS, Effect
from lerobot_attn.analysis.intervals import interval_of_mean
from lerobot_attn.errors import SelectionError
from lerobot_attn.figures.canvas import Caption
from lerobot_attn.figures.doses import DosePoint, HeightLine
from lerobot_attn.report.page import Page

PROFILE = "lift_profile"  # column of an episode's heights over the lift segment
_MOST_TEXT = 2000  # characters of a stranger's expectation


class Doses(NamedTuple):
    """What an experiment's doses showed.

    Attributes:
        effects: each comparison in each metric.
        slopes: of the outcome.
        sentences: the verdicts.
    """

    effects: list[DoseEffect]
    slopes: list[Slope]
    sentences: list[str]


def family_of(said: Mapping[str, Any], condition: str) -> dict[str, Any]:
    """Return what a store's `experiment` says of doses and of the question, as columns of its row.

    Args:
        said: the attribute; a stranger's, so anything.
        condition: the condition's name.
    """
    base, outcome, expectation = (said.get(name) for name in ("base", "outcome", "expectation"))
    return {
        "base": base if isinstance(base, str) and base else condition,
        "dose": _number(said.get("dose")),
        "draw": _number(said.get("draw")),
        "outcome": outcome if isinstance(outcome, str) and outcome in METRICS else None,
        "expectation": expectation[:_MOST_TEXT] if isinstance(expectation, str) else None,
    }


def _number(value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else math.nan


def measure_lift(row: dict[str, Any], data: xr.Dataset) -> list[str]:
    """Put an episode's lift into its row; return why not, where it was asked for and cannot be measured."""
    row[PROFILE] = None
    try:
        row["lift_height"] = behaviour.lift_height(data)
        row["lift_height_max"] = behaviour.lift_height_max(data)
        row[PROFILE] = behaviour.lift_profile(data)
    except SelectionError as error:
        return [str(error)] if str(row["outcome"]).startswith("lift") else []
    return []


def find_doses(table: pd.DataFrame, *, confidence: float, n_resamples: int, seed: int) -> Doses | None:
    """Compare the doses of an experiment's conditions; None where it has none.

    Args:
        table: one row an episode, as `report.effects.read_episodes` returns it.
        confidence: of the intervals.
        n_resamples: of the bootstrap.
        seed: of it.
    """
    if not has_doses(table):
        return None
    how: dict[str, Any] = {"confidence": confidence, "n_resamples": n_resamples, "seed": seed}
    effects = dose_effects(table, **how)
    slopes = [
        slope
        for _, part in table.groupby("experiment", sort=False)
        for slope in dose_slopes(part, outcome_of(part), **how)
    ]
    return Doses(effects, slopes, verdicts(table, effects, slopes))


def pooled(effects: pd.DataFrame, episodes: pd.DataFrame, found: Doses) -> pd.DataFrame:
    """Return an experiment's comparisons with the draws of a control together, for a figure.

    Args:
        effects: rows of `effects.csv`.
        episodes: one row an episode.
        found: what the doses showed.
    """
    draws = set(episodes.loc[episodes["draw"].notna(), "condition"])
    alone = ~effects["condition"].isin(draws) & ~effects["control"].isin(draws)
    rows = [
        {
            **one._asdict(),
            "condition": one.side.name,
            "control": f"{one.control.name} ({len(one.control.members)} draws)"
            if one.control.is_random
            else one.control.name,
        }
        for one in found.effects
        if not one.side.is_random
    ]
    together = pd.DataFrame(rows)
    return pd.concat([effects[alone & ~effects["condition"].isin(together["condition"])], together])


def add_to(
    page: Page, found: Doses, episodes: pd.DataFrame, effects: Sequence[Effect], picture: Path
) -> None:
    """Say on the page what the doses showed.

    Args:
        page: of the report.
        found: what they showed.
        episodes: one row an episode.
        effects: of each draw by itself, among others.
        picture: their figure's file.
    """
    page.heading("Doses and random draws")
    page.points(found.sentences)
    page.picture(picture, "the hand's height over the lift, and the outcome over the dose, beside controls")
    page.text(
        "The lift segment goes from the gripper's closing until the hand arrives over the destination (5 cm "
        "in the horizontal), the gripper opens, or the episode ends. A condition is held against the mean of "
        "its random draws in each initial state. “An effect of these units” is said where the interval "
        "leaves zero out, p (sign-flip test, corrected for the doses by Holm's method) agrees, and the "
        "condition lies beyond each of the draws: the interval speaks of other initial states, and not of "
        "other draws."
    )
    header = ["condition", "metric", "its mean", "the draws' mean", "difference", "p (Holm)", "beyond draws"]
    page.table(header, [_row(one) for one in found.effects if one.control.is_random])
    outcomes = {str(name): outcome_of(part) for name, part in episodes.groupby("experiment", sort=False)}
    draws = set(episodes.loc[episodes["draw"].notna(), "condition"])
    alone = [
        [one.condition, one.control, *_numbers(one, one.p)]
        for one in effects
        if one.control in draws and outcomes.get(one.experiment) == one.metric
    ]
    if alone:
        asked = ", ".join(METRICS[name].text for name in dict.fromkeys(outcomes.values()))
        page.text(f"Each draw by itself, {asked} (every metric of it is in effects.csv):")
        page.table(["condition", "draw", "its mean", "the draw's mean", "difference", "p"], alone)


def _row(one: DoseEffect) -> list[str]:
    beyond = f"{one.n_beyond} of {len(one.control.members)}"
    return [one.side.name, METRICS[one.metric].text, *_numbers(one, one.p_holm), beyond]


def _numbers(one: DoseEffect | Effect, p: float) -> list[str]:
    metric = METRICS[one.metric]
    if metric.is_share:
        means = [f"{100 * value:.0f} %" for value in (one.a, one.b)]
    else:
        means = [f"{metric.factor * value:.{metric.digits}f}" for value in (one.a, one.b)]
    said = metric.said(one.difference)
    if math.isfinite(one.low):
        said += f" ({metric.said(one.low, unit=False)} to {metric.said(one.high, unit=False)})"
    return [*means, said, "" if math.isnan(p) else f"{p:.2g}"]


def steering_figure(
    table: pd.DataFrame, found: Doses, caption: Caption, *, confidence: float, seed: int, width_in: float
) -> Any:
    """Draw the height over the lift segment and the outcome over the dose, each beside its controls.

    Args:
        table: one row an episode.
        found: what its doses showed.
        caption: what is said below.
        confidence: of the intervals.
        seed: of the bootstrap.
        width_in: width of the figure, inches.
    """
    columns = []
    for name, part in table.groupby("experiment", sort=False):
        metric = METRICS[outcome_of(part)]
        factor, unit = (
            (100.0, "points") if metric.is_share else (metric.factor, metric.said_in or metric.units)
        )
        axis = f"{metric.text},\nchange against the baseline, {unit}"
        here = {
            (one.side.name, one.control.name): one
            for one in found.effects
            if (one.experiment, one.metric) == (str(name), metric.name)
        }
        bases: dict[str, list[tuple[Side, list[Side]]]] = {}
        for side, controls in families(part):
            bases.setdefault(side.base, []).append((side, controls))
        for base, of_it in bases.items():
            lines = _lines(part, of_it, confidence, seed)
            columns.append((base, axis, lines, _points(of_it, here, factor, part, metric.name)))
    return figures.dose_figure(columns, caption, width_in=width_in)


def _lines(
    part: pd.DataFrame, of_base: list[tuple[Side, list[Side]]], confidence: float, seed: int
) -> list[HeightLine]:
    """Return what is drawn of the lift: baseline, controls at the largest dose, each dose, other controls."""
    found = []
    for side in sides(part):
        if side.name == BASELINE:
            found.append(_line(part, side, "baseline", confidence, seed))
    others: dict[str, HeightLine] = {}
    for side, controls in of_base:
        found.append(_line(part, side, "fired", confidence, seed))
        for control in controls:
            kind = "random" if control.is_random else "other"
            others[control.base] = _line(part, control, kind, confidence, seed)  # of the last dose
    return [line for line in [*found, *others.values()] if np.isfinite(line.height).any()]


def _line(part: pd.DataFrame, side: Side, kind: str, confidence: float, seed: int) -> HeightLine:
    rows = part[part["condition"].isin(side.members)]
    rows = rows[[profile is not None and bool(np.isfinite(profile).all()) for profile in rows[PROFILE]]]
    # Draws of one initial state are one: the interval is over states.
    of_state = [
        np.stack(list(state[PROFILE])).mean(axis=0)
        for _, state in rows.groupby(["task_group", "task_id", "episode_index"])
    ]
    known = np.stack(of_state) if of_state else np.zeros((0, 2))
    height: NDArray[np.float64] = known.mean(axis=0) if len(known) else np.full(2, np.nan)
    low, high = interval_of_mean(known, confidence, 2000, seed) if len(known) else (height, height)
    name = side.name if not side.is_random else f"{side.name} ({len(side.members)} draws)"
    return HeightLine(name, kind, side.dose, height, low, high, len(known))


def _points(
    of_base: list[tuple[Side, list[Side]]],
    here: Mapping[tuple[str, str], DoseEffect],
    factor: float,
    part: pd.DataFrame,
    metric: str,
) -> list[DosePoint]:
    """Return what is drawn over the dose: differences from the baseline, in the units of sentences."""
    found: dict[str, DosePoint] = {}
    baseline = next((side for side in sides(part) if side.name == BASELINE), None)
    for side, controls in of_base:
        for kind, one in [("fired", side)] + [
            ("random" if control.is_random else "other", control) for control in controls
        ]:
            effect = here.get((one.name, BASELINE))
            if effect is None:
                continue
            draws: tuple[float, ...] = ()
            if one.is_random and baseline is not None:
                draws = tuple(
                    factor * float(value)
                    for value in _differences(part, one, baseline, metric)
                    if math.isfinite(value)
                )
            mean, low, high = (factor * value for value in (effect.difference, effect.low, effect.high))
            found[one.name] = DosePoint(one.base, kind, one.dose, mean, low, high, draws)
    return list(found.values())


def _differences(part: pd.DataFrame, side: Side, baseline: Side, metric: str) -> NDArray[np.float64]:
    """Return (member,) of each draw by itself: its mean difference from the baseline."""
    own, other = paired_values(part, side, baseline, metric)
    return own.sub(other.iloc[:, 0], axis=0).mean(axis=0).to_numpy(float)
