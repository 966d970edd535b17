"""Whether a run's attention is on what its tasks are about: numbers from its masks.

    found = ground_run(open_run("out"))            # Python side of `lerobot-attn ground RUN -o report`
    write_grounding(open_run("out"), "report")     # with figures, tables and a page

What each number is, `analysis.grounding` says; the page is written in `grounding_page`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lerobot_attn.analysis.grounding import METRICS, NO_MASKS, ROLES, Metric, Role, mask_source, scene_of
from lerobot_attn.analysis.grounding_runs import RunGrounding, ground_episodes, with_an_end
from lerobot_attn.analysis.grounding_tables import (
    HeldOut,
    Resampling,
    grounding_table,
    held_out,
    ranking,
)
from lerobot_attn.analysis.intervals import interval_of_difference, interval_of_mean, mean_of
from lerobot_attn.analysis.phases import QUARTERS, TASK_PHASES, quarters, task_phases
from lerobot_attn.errors import ConfigError, SelectionError
from lerobot_attn.figures.grounding import Levels
from lerobot_attn.settings import check_choice, check_numbers, check_ranges, parse_choice
from lerobot_attn.sizes import Progress
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.runs import Run


@dataclass(frozen=True, kw_only=True)
class GroundSettings:
    """Settings of `lerobot-attn ground`."""

    # Whose mask the layers and heads are ranked by.
    role: Role = "target"
    # What they are ranked by: mass, concentration, iou, peak_hit or centre_distance.
    metric: Metric = "mass"
    # Cameras, by name or the end of it. Default: all that have masks.
    cameras: tuple[str, ...] = ()
    # Layers: a list, or 'all' that are stored.
    layer: Any = "all"
    # Denoise step of the ranking: a number, negative from the last stored one. The table has every step.
    denoise_step: int = -1
    # Action token: 'executed' (the mean over the executed ones), 'mean', or a number, from the full maps.
    query: Any = "executed"
    # Confidence of the intervals over episodes.
    confidence: float = 0.95
    # Resamples of the bootstrap.
    n_resamples: int = 1000
    # Random flips of the test, where there are too many episodes to take every combination of signs.
    n_flips: int = 10_000
    seed: int = 0
    # Width of the figures, inches.
    width: float = 7.0
    # Dots per inch of the figures.
    dpi: int = 200

    def __post_init__(self) -> None:
        """Read choices given as text, and check what can be checked without an episode.

        Raises:
            ConfigError: a value is out of range or of the wrong type.
        """
        for name in ("layer", "query"):
            object.__setattr__(self, name, parse_choice(getattr(self, name)))
        object.__setattr__(self, "layer", check_numbers("layer", self.layer, "all"))
        cameras = (self.cameras,) if isinstance(self.cameras, str) else tuple(self.cameras)
        object.__setattr__(self, "cameras", cameras)
        check_choice(self, "role", ROLES)
        check_choice(self, "metric", METRICS)
        if self.query not in ("executed", "mean") and type(self.query) is not int:
            raise ConfigError(f"query: got {self.query!r}, expected executed, mean or a number")
        check_ranges(
            self,
            {
                "denoise_step": (-1000, 1000),
                "confidence": (0.5, 0.999),
                "n_resamples": (100, 100_000),
                "n_flips": (100, 1_000_000),
                "seed": (0, 2**32 - 1),
                "width": (3, 30),
                "dpi": (30, 1200),
            },
        )

    @property
    def resampling(self) -> Resampling:
        """How intervals and p-values are found."""
        return Resampling(self.confidence, self.n_resamples, self.n_flips, self.seed)


class Arm(NamedTuple):
    """The robot's part of a camera's attention, by layer, mean over heads; all episodes."""

    levels: Levels  # (layer,) mass, shares
    # Mean over layers of mass minus the robot's share of the area, and its interval; shares.
    above_area: tuple[float, float, float]


@dataclass(frozen=True)
class Grounded:
    """What `ground_run` found.

    Attributes:
        run: every episode's means.
        settings: how they were looked at.
        table: `grounding.csv`, see `grounding_table`.
        ranking: see `analysis.grounding_tables.ranking`.
        best: the map that did best on one half of the episodes.
        step: position among the denoise steps of what the ranking is of.
        overall: metric → chance level or "value", "low", "high" → number: the best map on the other half.
        phases: names of the phases of the task.
        by_phase: role → concentration in each phase, of the best map on the episodes it is reported on.
        ahead: another role → the role's concentration minus that role's in each phase, pairs of an episode.
        by_step: settings' metric at each denoise step, likewise.
        arm: camera → the robot's part; empty where nothing has that role.
        outcomes: "success" and "failure" → the settings' metric of each role, likewise; empty unless both are
            among the episodes.
        outcome_differences: role → success minus failure, low, high; likewise.
        masks: where the masks are from.
        notes: what a reader has to know, e.g. episodes that were left out.
    """

    run: RunGrounding
    settings: GroundSettings
    table: pd.DataFrame
    ranking: pd.DataFrame
    best: HeldOut
    step: int
    overall: dict[str, dict[str, float]]
    phases: tuple[str, ...]
    by_phase: dict[str, Levels]
    ahead: dict[str, Levels]
    by_step: Levels
    arm: dict[str, Arm]
    outcomes: dict[str, Levels]
    outcome_differences: dict[str, tuple[float, float, float]]
    masks: str
    notes: tuple[str, ...]

    @property
    def episodes(self) -> list[Episode]:
        """The episodes."""
        return [source for source in self.run.sources if isinstance(source, Episode)]

    @property
    def has_random_weights(self) -> bool:
        """Whether the policy was a demo whose maps mean nothing."""
        return any(episode.has_random_weights for episode in self.episodes)


def ground_run(
    run: Run | Sequence[Episode], settings: GroundSettings | None = None, progress: Progress | None = None
) -> Grounded:
    """Measure which layers and heads are on the target, against three levels of chance.

    Args:
        run: of `open_run`, or episodes; with masks, of one policy.
        settings: what to look at.
        progress: called as `progress(done, total)`; each episode is read two or three times.

    Raises:
        SelectionError: no episode with masks, no such role, camera, layer or step, or episodes of policies
            whose layers, heads, steps or patches differ.
    """
    settings = settings or GroundSettings()
    episodes, notes = _with_masks(run)
    sources, step = _check_scenes(episodes, settings)
    n_third = max(1, len(episodes) // 2)
    n_done = 0

    def tell(done: int, _: int) -> None:
        nonlocal n_done
        n_done = done
        if progress is not None:
            progress(done, 2 * len(episodes) + n_third)

    where: dict[str, Any] = {"layer": settings.layer, "query": settings.query}
    found = ground_episodes(episodes, progress=tell, cameras=settings.cameras or None, **where)
    how, role, metric = settings.resampling, settings.role, settings.metric
    best = held_out(found, role=role, metric=metric, step=step, how=how)
    if len(best.chosen_on) == len(best.reported_on) == 1 and not best.is_held_out:
        notes.append("one episode alone: no interval, and no other episode to choose the best map on")
    phases, levels = _by_phase(found, best, step, lambda: tell(n_done + 1, 0))
    shown = [role for role in found.roles if role != "background"]
    concentration = {name: levels["value"][:, found.roles.index(name)] for name in shown}
    ahead = {
        name: concentration[role] - concentration[name] for name in shown if name != role and role in shown
    }
    own = range(len(found.denoise_steps))
    of_steps = [_levels(found, best, at, role, metric, how) for at in own]
    return Grounded(
        run=found,
        settings=settings,
        table=grounding_table(found, how),
        ranking=ranking(found, role=role, metric=metric, step=step, how=how),
        best=best,
        step=step,
        overall={name: _numbers(_levels(found, best, step, role, name, how)) for name in METRICS},
        phases=phases,
        by_phase={
            name: _over_episodes({k: v[:, found.roles.index(name)] for k, v in levels.items()}, how)
            for name in shown
        },
        ahead={name: _over_episodes({"value": difference}, how) for name, difference in ahead.items()},
        by_step=_joined(of_steps),
        arm=_arm(found, step, how),
        **_outcomes(found, best, step, metric, how),
        masks=", ".join(sorted(sources)) or "unknown",
        notes=tuple(notes),
    )


def _with_masks(run: Run | Sequence[Episode]) -> tuple[list[Episode], list[str]]:
    """Return the episodes that hold masks, and what is to be said of the others."""
    every = list(run)
    held = [e for e in every if e.array_shape("segmentation") is not None and e.n_inferences]
    where = f"{run.path}: " if isinstance(run, Run) else ""
    if not held:
        why = NO_MASKS.replace("the episode holds no", f"none of {len(every)} episodes holds")
        raise SelectionError(where + (why if every else "got no episodes, expected one at least"))
    notes = []
    if n_out := len(every) - len(held):
        notes.append(f"left out: {n_out} of {len(every)} episodes, which hold no masks or no inference")
    if isinstance(run, Run):
        notes += [f"left out, damaged: {reason}" for _, reason in run.damaged]
    conditions = dict.fromkeys(episode.condition.text for episode in held)
    if len(conditions) > 1:
        named = "; ".join(text or "no intervention" for text in conditions)
        notes.append(f"episodes of {len(conditions)} conditions are mixed: {named}; ground each by itself")
    elif any(conditions):
        notes.append(held[0].condition.line)
    return held, notes


def _check_scenes(episodes: Sequence[Episode], settings: GroundSettings) -> tuple[set[str], int]:
    """Check what can be, before hours are spent.

    Returns:
        Where the masks are from, and the position of the denoise step among those stored.
    """
    step = _step(copy.copy(episodes[0]).arrays["denoise_step"].values.tolist(), settings.denoise_step)
    roles: set[str] = set()
    sources: set[str] = set()
    for episode in episodes:
        dataset = copy.copy(episode).arrays
        try:
            roles |= set(scene_of(dataset).roles)
        except SelectionError as error:
            raise SelectionError(f"{episode.path}: {error}") from error
        sources.add(mask_source(dataset))
    if settings.role not in roles:
        held = ", ".join(role for role in ROLES if role in roles)
        raise SelectionError(
            f"role {settings.role!r}: nothing in the run's scenes has it, expected one of {held}; roles are "
            "given when masks are recorded or attached"
        )
    return sources - {""}, step


def _step(saved: list[int], wanted: int) -> int:
    """Return the position of a denoise step; negative ones count from the last stored."""
    if wanted < 0 and -wanted <= len(saved):
        return len(saved) + wanted
    if wanted not in saved:
        raise SelectionError(f"denoise step {wanted} was not saved; saved are {', '.join(map(str, saved))}")
    return saved.index(wanted)


def _levels(run: RunGrounding, best: HeldOut, step: int, role: str, metric: str, how: Resampling) -> Levels:
    """Return a number of the best map on the episodes that it is reported on, each (1,)."""
    levels = run.levels(best.candidate, step, role, metric)
    return _over_episodes({name: array[best.reported_on, None] for name, array in levels.items()}, how)


def _over_episodes(levels: dict[str, NDArray[np.float64]], how: Resampling) -> Levels:
    """Return means over episodes with the value's interval, of (episode, x) arrays."""
    low, high = interval_of_mean(levels["value"], how.confidence, how.n_resamples, how.seed)
    means = {name: mean_of(array) for name, array in levels.items()}
    value = means.pop("value")
    return Levels(value, low, high, means)


def _joined(parts: Sequence[Levels]) -> Levels:
    """Put (1,) numbers beside each other."""
    value, low, high = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("value", "low", "high")
    )
    chance = {name: np.concatenate([part.chance[name] for part in parts]) for name in parts[0].chance}
    return Levels(value, low, high, chance)


def _numbers(levels: Levels) -> dict[str, float]:
    """Return (1,) numbers by name."""
    found = {"value": levels.value, "low": levels.low, "high": levels.high, **levels.chance}
    return {name: float(array[0]) for name, array in found.items()}


def _by_phase(
    run: RunGrounding, best: HeldOut, step: int, tell: Callable[[], None]
) -> tuple[tuple[str, ...], dict[str, NDArray[np.float64]]]:
    """Return the phases, and value and chance levels of the best map's concentration in each of them.

    Returns:
        Names of the phases; "value" or chance level → (episode reported on, role, phase).
    """
    by_state = all(task_phases(run.arrays(index)).names == TASK_PHASES for index in best.reported_on)
    phases_of = task_phases if by_state else quarters
    names = TASK_PHASES if by_state else QUARTERS
    levels: dict[str, NDArray[np.float64]] = {}
    for row, index in enumerate(best.reported_on):
        dataset = run.arrays(index)
        of_inference = phases_of(dataset).of_inferences(dataset)
        measured = run.by_inference(index, best.candidate, step).sel(metric="concentration")
        for kind in measured:
            values = with_an_end(measured[kind].transpose("frame", "role").values)
            shape = len(best.reported_on), len(run.roles), len(names)
            level = levels.setdefault(str(kind), np.full(shape, np.nan))
            for phase in range(len(names)):
                level[row, :, phase] = mean_of(values[of_inference == phase])
        tell()
    return names, levels


def _arm(run: RunGrounding, step: int, how: Resampling) -> dict[str, Arm]:
    """Return how much of each camera's attention lies on the robot, by layer."""
    if "robot" not in run.roles:
        return {}
    r, m = run.roles.index("robot"), METRICS.index("mass")
    found = {}
    for c, camera in enumerate(run.cameras):
        value, fixed = (np.asarray(a[:, c, :, 0, step, r, m], float) for a in (run.value, run.fixed))
        area, centre = run.uniform[:, c, r, m], run.centre[:, c, r, m]
        by_layer = {"value": value, "uniform": np.broadcast_to(area[:, None], value.shape)}
        by_layer |= {"fixed": fixed, "centre": np.broadcast_to(centre[:, None], value.shape)}
        above = mean_of(value.T)[:, None] - area[:, None]
        low, high = interval_of_mean(above, how.confidence, how.n_resamples, how.seed)
        difference = (float(mean_of(above)[0]), float(low[0]), float(high[0]))
        found[camera] = Arm(_over_episodes(by_layer, how), difference)
    return found


def _outcomes(run: RunGrounding, best: HeldOut, step: int, metric: str, how: Resampling) -> dict[str, Any]:
    """Return the numbers of successes and of failures, and their differences."""
    success = run.success
    groups = {
        name: [index for index in best.reported_on if success[index] is wanted]
        for name, wanted in (("success", True), ("failure", False))
    }
    roles = [role for role in run.roles if role != "background"]
    if not all(groups.values()):
        return {"outcomes": {}, "outcome_differences": {}}
    outcomes, differences = {}, {}
    levels = {role: run.levels(best.candidate, step, role, metric) for role in roles}
    for name, members in groups.items():
        outcomes[name] = _joined(
            [_over_episodes({k: v[members, None] for k, v in levels[role].items()}, how) for role in roles]
        )
    for role in roles:
        solved, failed = (levels[role]["value"][members, None] for members in groups.values())
        low, high = interval_of_difference(failed, solved, how.confidence, how.n_resamples, how.seed)
        difference = float(mean_of(solved)[0] - mean_of(failed)[0])
        differences[role] = (difference, float(low[0]), float(high[0]))
    return {"outcomes": outcomes, "outcome_differences": differences}
