"""Effects of an experiment's conditions, as table, figure and page.

    files = write_effects("out", "out/effects")   # Python side of `lerobot-attn effects out`

Reads the stores of an experiment; the numbers are those of `analysis.effects` and `analysis.behaviour`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from lerobot_attn import figures
from lerobot_attn.analysis import behaviour
from lerobot_attn.analysis.doses import dose_table
from lerobot_attn.analysis.effects import (
    BASELINE,
    METRICS,
    Effect,
    comparisons,
    effects_table,
    paired_effects,
    pairs,
    sentence,
)
from lerobot_attn.errors import RANDOM_WEIGHTS, ConfigError, SelectionError
from lerobot_attn.figures.canvas import Caption
from lerobot_attn.report import doses
from lerobot_attn.report.page import Page
from lerobot_attn.settings import check_ranges
from lerobot_attn.sizes import Progress
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.runs import Run

_KEY = ["task_group", "task_id", "episode_index"]


@dataclass(frozen=True, kw_only=True)
class EffectsSettings:
    """Settings of `lerobot-attn effects`."""

    # Confidence of the intervals over initial states.
    confidence: float = 0.95
    # How often pairs are drawn for an interval.
    n_resamples: int = 10_000
    seed: int = 0
    # An object that the end effector never came nearer to was not approached, metres.
    near: float = behaviour.NEAR_M
    # An object that rose by this was lifted, metres.
    lifted: float = behaviour.LIFTED_M
    # Width of the figure, inches.
    width: float = 7.0
    # Dots per inch of the figure.
    dpi: int = 200

    _ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "confidence": (0.5, 0.999),
        "n_resamples": (100, 1_000_000),
        "seed": (0, 2**32 - 1),
        "near": (0.001, 10),
        "lifted": (0.001, 10),
        "width": (2, 30),
        "dpi": (30, 1200),
    }

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: a value is out of its range.
        """
        check_ranges(self, self._ranges)


class Episodes(NamedTuple):
    """An experiment's episodes as a table.

    Attributes:
        table: one row an episode, as `analysis.effects.paired_effects` takes it, with `approached` (the
            object's name) and `n_objects` besides.
        notes: what was left out or could not be measured, and why, one line each.
        remarks: what is to be said of the policy beside its numbers.
    """

    table: pd.DataFrame
    notes: tuple[str, ...]
    remarks: tuple[str, ...]


def read_episodes(
    run: Run, settings: EffectsSettings | None = None, progress: Progress | None = None
) -> Episodes:
    """Measure every complete episode of an experiment.

    Args:
        run: the experiment's folder.
        settings: thresholds of `approached`.
        progress: called as `progress(done, total)`, episodes read.

    Raises:
        SelectionError: no episode is complete.
    """
    settings = settings or EffectsSettings()
    rows: list[dict[str, Any]] = []
    chunks: dict[tuple[Any, ...], Any] = {}
    lacking: dict[str, int] = {}
    notes, remarks, n_incomplete = [], dict[str, None](), 0
    for number, episode in enumerate(run):
        if not episode.is_complete:
            n_incomplete += 1
            continue
        row, lacks = _measured(episode, settings)
        rows.append(row)
        for reason in lacks:
            lacking[reason] = lacking.get(reason, 0) + 1
        data = episode.arrays
        key = _side(row, row["condition"])
        chunks[key] = data["action_chunk"][0].values if data.sizes.get("inference") else None
        if episode.has_random_weights:
            remarks[RANDOM_WEIGHTS] = None
        elif episode.policy_remark:
            remarks[episode.policy_remark] = None
        if progress is not None:
            progress(number + 1, len(run))
    if not rows:
        raise SelectionError(
            f"{run.path}: none of {len(run)} episodes is complete; expected some of each condition"
        )
    if n_incomplete:
        said = "1 incomplete episode is" if n_incomplete == 1 else f"{n_incomplete} incomplete episodes are"
        notes.append(f"{said} left out")
    notes += [f"left out: {reason}" for _, reason in run.damaged]
    notes += [f"not measured in {n} episode{'s' * (n > 1)}: {reason}" for reason, n in lacking.items()]
    for row in rows:
        row["action_difference"], reason = _change(chunks, row)
        if reason:
            notes.append(reason)
    return Episodes(pd.DataFrame(rows), tuple(dict.fromkeys(notes)), tuple(remarks))


def _side(row: Mapping[str, Any], condition: str) -> tuple[Any, ...]:
    return (row["experiment"], condition, *(row[name] for name in _KEY))


def _change(chunks: Mapping[tuple[Any, ...], Any], row: Mapping[str, Any]) -> tuple[float, str]:
    """Return how far the first chunk is from the baseline's of the same initial state; NaN without one."""
    own, other = chunks[_side(row, row["condition"])], chunks.get(_side(row, BASELINE))
    if own is None or other is None:
        return math.nan, ""
    try:
        return behaviour.chunk_difference(own, other), ""
    except SelectionError as error:
        return math.nan, f"action difference of {row['condition']}: {error}"


def _measured(episode: Episode, settings: EffectsSettings) -> tuple[dict[str, Any], list[str]]:
    """Return an episode's row, and what could not be measured."""
    said = _part(episode.attributes, "experiment")
    done = _part(episode.attributes, "condition")
    condition = str(said.get("condition") or done.get("name") or BASELINE)
    data, lacks = episode.arrays, []
    row: dict[str, Any] = {
        "experiment": str(said.get("name") or "experiment"),
        "condition": condition,
        "text": str(done.get("text") or ""),
        "control_of": None if said.get("control_of") is None else str(said["control_of"]),
        "task_group": str(episode.attributes.get("task_group")),
        **{name: _whole(episode.attributes.get(name)) for name in ("task_id", "episode_index", "seed")},
        "success": math.nan if episode.success is None else float(episode.success),
        **dict.fromkeys(("approached_target", "approached_named", "path_length"), math.nan),
        **dict.fromkeys(("steps_to_success", "lift_height", "lift_height_max", "mean_speed"), math.nan),
        "approached": None,
        "n_objects": 0,
        "start": _start(data),
        **doses.family_of(said, condition),
    }
    lacks += doses.measure_lift(row, data)
    try:
        row["steps_to_success"] = behaviour.steps_to_success(data)
        row["path_length"], row["mean_speed"] = behaviour.path_length(data), behaviour.mean_speed(data)
        went = behaviour.approached(data, near_m=settings.near, lifted_m=settings.lifted)
    except SelectionError as error:
        lacks = [str(error), *(lack for lack in lacks if lack != str(error))]
    else:
        row["approached"], row["n_objects"] = went.name or "none", len(went.objects)
        row["approached_target"] = float(went.name in went.targets) if went.targets else math.nan
        named = behaviour.named_objects(behaviour.given_instruction(data), went.objects)
        row["approached_named"] = float(went.name in named) if named else math.nan
    return row, lacks


def _part(attributes: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = attributes.get(name)
    return part if isinstance(part, Mapping) else {}


def _whole(value: Any) -> int:
    """Return a number that a store says of its episode; -1 where it says none."""
    return value if type(value) is int else -1


def _start(data: xr.Dataset) -> list[float] | None:
    """Return numbers of the first scene: where every instance was, or else the robot's state."""
    for name in ("instance_position", "state"):
        if name in data and data[name].shape[0]:
            return [float(value) for value in np.ravel(data[name][0].values)]
    return None


class Effects(NamedTuple):
    """What an experiment showed.

    Attributes:
        episodes: the table and what was left out of it.
        effects: each comparison in each metric.
        notes: the same of pairs.
        doses: what doses and random draws showed; None where there are none.
    """

    episodes: Episodes
    effects: list[Effect]
    notes: tuple[str, ...]
    doses: doses.Doses | None = None

    @property
    def sentences(self) -> list[str]:
        """What was found, in sentences: verdicts of doses, else each condition against its control."""
        if self.doses is not None:
            return self.doses.sentences
        matched = [effect for effect in self.effects if effect.control != BASELINE]
        return [sentence(effect) for effect in matched or self.effects]


def find_effects(
    run: Run, settings: EffectsSettings | None = None, progress: Progress | None = None
) -> Effects:
    """Measure an experiment's episodes, and compare its conditions.

    Args:
        run: the experiment's folder.
        settings: how.
        progress: called as `progress(done, total)`, episodes read.

    Raises:
        SelectionError: there are no two conditions, or no pair; two episodes of a condition are the same one.
    """
    settings = settings or EffectsSettings()
    episodes = read_episodes(run, settings, progress)
    effects = paired_effects(
        episodes.table,
        confidence=settings.confidence,
        n_resamples=settings.n_resamples,
        seed=settings.seed,
    )
    notes = [
        line
        for _, part in episodes.table.groupby("experiment", sort=False)
        for condition, control in comparisons(part)
        for line in pairs(part, condition, control).left_out
    ]
    if not effects:
        why = f": {notes[0]}" if notes else ""
        raise SelectionError(f"{run.path}: no two conditions have a pair of episodes{why}")
    dosed = doses.find_doses(
        episodes.table,
        confidence=settings.confidence,
        n_resamples=settings.n_resamples,
        seed=settings.seed,
    )
    return Effects(episodes, effects, tuple(dict.fromkeys([*episodes.notes, *notes])), dosed)


def write_effects(
    run: Run,
    folder: str | Path,
    settings: EffectsSettings | None = None,
    progress: Progress | None = None,
) -> tuple[Effects, list[Path]]:
    """Write `effects.csv`, `episodes.csv`, `effects.png`, `report.md` and `report.html`.

    Where conditions have doses or random draws also `doses.csv` and `doses.png`.

    Args:
        run: the experiment's folder.
        folder: where to; it is made.
        settings: how.
        progress: called as `progress(done, total)`, episodes read.

    Returns:
        What was found, and the files.

    Raises:
        SelectionError: as `find_effects`.
        ConfigError: the folder cannot be written.
    """
    settings = settings or EffectsSettings()
    found = find_effects(run, settings, progress)
    folder = Path(folder)
    table = effects_table(found.effects)
    files = [folder / "effects.csv", folder / "episodes.csv", folder / "effects.png"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(files[0], index=False)
        found.episodes.table.drop(columns=["start", doses.PROFILE]).to_csv(files[1], index=False)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write the report: {error.strerror or error}") from error
    shown = table
    if found.doses is not None:
        files += [folder / "doses.csv", folder / "doses.png"]
        dose_table(found.doses.effects).to_csv(files[3], index=False)
        outcomes = {doses.outcome_of(part) for _, part in found.episodes.table.groupby("experiment")}
        steered = doses.steering_figure(
            found.episodes.table,
            found.doses,
            _caption(table[table["metric"].isin(outcomes)], found, settings, _DOSES_READ),
            confidence=settings.confidence,
            seed=settings.seed,
            width_in=settings.width,
        )
        figures.save_figure(steered, files[4], dpi=settings.dpi)
        shown = doses.pooled(table, found.episodes.table, found.doses)
    figures.save_figure(_figure(shown, found, settings), files[2], dpi=settings.dpi)
    return found, files + _page(run, found, settings, files).write(folder)


_READ = "condition − control: filled against its matched control, hollow against the baseline"
_DOSES_READ = "bands and bars: intervals over initial states; random draws: mean of each state's draws"


def _figure(table: pd.DataFrame, found: Effects, settings: EffectsSettings) -> Any:
    labels = {
        metric.name: f"{metric.text}\n{'percentage points' if metric.is_share else metric.units}"
        for metric in METRICS.values()
    }
    shares = [metric.name for metric in METRICS.values() if metric.is_share]
    return figures.effects_figure(
        table,
        labels,
        _caption(table, found, settings, _READ),
        shares=shares,
        baseline=BASELINE,
        width_in=settings.width,
    )


def _caption(table: pd.DataFrame, found: Effects, settings: EffectsSettings, read: str) -> Caption:
    n = table["n"]
    shown = f"{n.min()} to {n.max()}" if n.min() != n.max() else f"{n.min()}"
    facts = [
        f"experiment {', '.join(dict.fromkeys(table['experiment']))}",
        read,
        f"{settings.confidence:.0%} bootstrap intervals over initial states, {shown} pairs"
        if table["low"].notna().any()
        else "no intervals: one pair each, from which nothing can be said",
    ]
    return Caption(
        facts,
        RANDOM_WEIGHTS if RANDOM_WEIGHTS in found.episodes.remarks else "",
        [remark for remark in found.episodes.remarks if remark != RANDOM_WEIGHTS],
    )


def _page(run: Run, found: Effects, settings: EffectsSettings, files: Sequence[Path]) -> Page:
    names = ", ".join(dict.fromkeys(effect.experiment for effect in found.effects))
    page = Page(f"Effects of {names}")
    page.points([*(f"The policy: {remark}" for remark in found.episodes.remarks), *found.notes])
    if found.doses is not None:
        doses.add_to(page, found.doses, found.episodes.table, found.effects, files[4])
    draws = set(found.episodes.table.loc[found.episodes.table["draw"].notna(), "condition"])
    effects = [effect for effect in found.effects if not {effect.condition, effect.control} & draws]
    matched = [effect for effect in effects if effect.control != BASELINE]
    if matched:
        page.heading("Against the matched control")
        page.points(map(sentence, matched))
    elif not draws:
        page.text("No condition has a matched control: what follows may be due to any intervention at all.")
    page.picture(files[2], "effects with their intervals")
    page.heading("Against the baseline")
    page.points(sentence(effect) for effect in effects if effect.control == BASELINE)
    page.heading("Conditions")
    page.table(*_conditions(found.episodes.table))
    if found.episodes.table["approached"].notna().any():
        page.heading("Which object was approached")
        page.table(*_approached(found.episodes.table))
        page.text(
            f"The first that rose by {settings.lifted} m; if none did, the one to which the hand (the end "
            f"effector) came nearest, within {settings.near} m. Places are known at inferences. “Target” is "
            "the environment's own; “named” is what the policy's instruction names."
        )
    page.heading("How to read this")
    page.points(
        [
            "A pair is two episodes from the same initial state, with the same noise.",
            f"Intervals: {settings.confidence:.0%} bootstrap over pairs ({settings.n_resamples} resamples, "
            "expanded percentiles, Hesterberg 2015). p: exact McNemar test of shares, sign-flip test of "
            "other means; not corrected for the number of rows.",
            "“No difference shown” does not say that there is none: see how many pairs it would need "
            "(two-sided 5 %, power 80 %; Connor 1987).",
            "Steps to success are compared over pairs in which both succeeded.",
            "Policy units are those of the normalised actions that the policy puts out.",
        ]
    )
    return page


def _conditions(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    header = ["condition", "what is done", "control of", "episodes", *(m.text for m in METRICS.values())]
    rows = []
    for condition, part in table.groupby("condition", sort=False):
        control_of = part["control_of"].iloc[0]
        text = part["text"].iloc[0].removeprefix(f"{condition}: ")
        cells = [str(condition), text, "" if control_of is None else str(control_of), str(len(part))]
        for metric in METRICS.values():
            mean = part[metric.name].mean()
            if math.isnan(mean):
                cells.append("")
            else:
                cells.append(f"{100 * mean:.0f} %" if metric.is_share else f"{mean:.3g}")
        rows.append(cells)
    return header, rows


def _approached(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    known = table[table["approached"].notna()]
    names = sorted(known["approached"].unique(), key=lambda name: (name == "none", name))
    rows = []
    for condition, part in known.groupby("condition", sort=False):
        chance = 100 * (1 / part["n_objects"]).mean()
        counts = [str(int((part["approached"] == name).sum())) for name in names]
        rows.append([str(condition), *counts, f"{chance:.0f} %"])
    return ["condition", *names, "chance of one object"], rows
