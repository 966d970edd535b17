"""The report of a run's grounding: figures, tables and a page in one folder.

What it says, `ground_run` found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lerobot_attn import figures
from lerobot_attn.analysis.grounding import CHANCES, DEFINITIONS, METRICS
from lerobot_attn.analysis.intervals import mean_of
from lerobot_attn.analysis.phases import PHASES_IN_WORDS
from lerobot_attn.errors import ConfigError
from lerobot_attn.figures.canvas import RANDOM_WEIGHTS, Caption, store_name
from lerobot_attn.figures.grounding import (
    Levels,
    layers_figure,
    levels_figure,
    outcomes_figure,
    phases_figure,
    ranking_figure,
)
from lerobot_attn.layout import short_names
from lerobot_attn.report.grounding import Grounded, GroundSettings, ground_run
from lerobot_attn.report.page import Page
from lerobot_attn.sizes import Progress
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.runs import Run

_MOST_ROWS = 12  # of the ranking, in figure and page; the file has all
_SHARES = ("mass", "iou", "peak_hit")
_UNITS = {"mass": "%", "iou": "%", "peak_hit": "%", "concentration": "times", "centre_distance": "patches"}


def write_grounding(
    run: Run | Sequence[Episode],
    folder: str | Path,
    settings: GroundSettings | None = None,
    progress: Progress | None = None,
) -> tuple[Grounded, list[Path]]:
    """Write `grounding.csv`, `ranking.csv`, figures, and `report.md` with `report.html`.

    Args:
        run: of `open_run`, or episodes.
        folder: where to; it is made.
        settings: what to look at, and how to draw it.
        progress: called as `progress(done, total)`.

    Returns:
        What was found, and the files.

    Raises:
        SelectionError: as `ground_run`.
        ConfigError: the folder cannot be written.
    """
    found = ground_run(run, settings, progress)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "grounding.csv", folder / "ranking.csv"]
        found.table.to_csv(files[0], index=False)
        found.ranking.to_csv(files[1], index=False)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write the report: {error.strerror or error}") from error
    drawn = {name: (figure, text) for name, figure, text in _figures(found)}
    for name, (figure, _) in drawn.items():
        files.append(figures.save_figure(figure, folder / f"{name}.png", dpi=found.settings.dpi))
    page = _page(found, folder, {name: text for name, (_, text) in drawn.items()})
    return found, [*files, *page.write(folder)]


def sentence(found: Grounded) -> str:
    """Say in a sentence how much of the best map lies on the role's mask, and what chance would give."""
    role, metric, best = found.settings.role, found.settings.metric, found.best
    numbers = found.overall[metric]
    names = short_names(found.run.cameras)
    candidate = best.candidate
    chances = [
        f"{text} {_number(metric, numbers[name])}"
        for name, text in (
            ("uniform", "uniform map" if metric != "mass" else "its share of the area"),
            ("fixed", "the policy's mean map over other episodes"),
            ("centre", "centre prior"),
        )
        if np.isfinite(numbers[name])
    ]
    where = f"layer {candidate.layer}, {_head(candidate.head)}, camera {names[candidate.camera]}"
    how = (
        f"chosen on {_episodes(len(best.chosen_on))}, reported on {_episodes(len(best.reported_on), 'other')}"
        if best.is_held_out
        else "chosen and reported on the same episode"
    )
    p = "" if best.p is None else f"; p = {best.p:.2g} against the best of them, one-sided"
    return (
        f"{where} ({how}): {metric} on the {role} is {_number(metric, numbers['value'])}"
        f"{_interval(metric, numbers)}. Chance: {', '.join(chances)}{p}."
    )


def _figures(found: Grounded) -> list[tuple[str, Figure, str]]:
    """Return each figure with the name of its file and what it shows."""
    run, settings, best = found.run, found.settings, found.best
    role, metric, width = settings.role, settings.metric, settings.width
    names = short_names(run.cameras)
    candidate = best.candidate
    step = _step(found)
    chosen = f"{names[candidate.camera]}, layer {candidate.layer}, {_head(candidate.head)}"
    held = f"on {_episodes(len(best.reported_on), 'other' if best.is_held_out else '')}"
    label = f"{metric} on the {role}{_unit(metric)}"

    def caption(*facts: str) -> Caption:
        return _caption(found, facts)

    rows = found.ranking.head(_MOST_ROWS)
    rows = rows.assign(
        name=[
            f"{names[c]}, layer {k}, {_head(h)}"
            for c, k, h in zip(rows["camera"], rows["layer"], rows["head"], strict=True)
        ]
    )
    drawn = [
        (
            "ranking",
            ranking_figure(
                rows,
                label,
                caption(step, f"the best {len(rows)} of {len(found.ranking)}, p corrected for all of them"),
                per_cent=metric in _SHARES,
                width_in=width,
            ),
            f"The maps that are most on the {role}, with intervals and chance levels",
        )
    ]
    above = mean_of(run.above_chance(found.step, role, metric)).reshape(
        len(run.cameras), len(run.layers), len(run.heads)
    )
    scale = 100.0 if metric in _SHARES else 1.0
    over = {"concentration": "concentration", "centre_distance": "patches closer than"}.get(
        metric, "percentage points"
    )
    drawn.append(
        (
            "layers_heads",
            layers_figure(
                {names[camera]: scale * above[c] for c, camera in enumerate(run.cameras)},
                run.layers,
                run.heads,
                f"{over} above chance",
                caption(step, f"{metric} on the {role}", f"framed: {chosen}"),
                chosen=(names[candidate.camera], candidate.layer, candidate.head),
                width_in=width,
            ),
            f"How far every layer and head is above chance on the {role}",
        )
    )
    drawn.append(
        (
            "phases",
            phases_figure(
                found.by_phase,
                found.phases,
                "concentration (inside : outside)",
                caption(held, chosen, step, PHASES_IN_WORDS[found.phases]),
                width_in=width,
            ),
            "How dense attention is on each role through the phases of the task",
        )
    )
    if len(run.denoise_steps) > 1:
        drawn.append(
            (
                "noise_to_action",
                levels_figure(
                    {chosen: found.by_step},
                    np.arange(len(run.denoise_steps), dtype=float),
                    ("denoise step: noise on the left, the action on the right", label),
                    caption(held),
                    role=role,
                    ticks=[str(at) for at in run.denoise_steps],
                    per_cent=metric in _SHARES,
                    width_in=width,
                ),
                f"Attention on the {role} from noise to action",
            )
        )
    if found.arm:
        drawn.append(
            (
                "robot",
                levels_figure(
                    {names[camera]: arm.levels for camera, arm in found.arm.items()},
                    np.arange(len(run.layers), dtype=float),
                    ("layer", "mass on the robot, %"),
                    caption(step, "mean over heads"),
                    role="robot",
                    ticks=[str(layer) for layer in run.layers],
                    per_cent=True,
                    width_in=width,
                ),
                "Attention on the robot, against the area that it covers",
            )
        )
    if found.outcomes:
        drawn.append(
            (
                "outcomes",
                outcomes_figure(
                    list(found.outcome_differences),
                    found.outcomes,
                    f"{metric}{_unit(metric)}",
                    caption(held, chosen, step),
                    per_cent=metric in _SHARES,
                    width_in=width,
                ),
                "Attention on each role in successes and failures",
            )
        )
    return drawn


def _page(found: Grounded, folder: Path, texts: dict[str, str]) -> Page:
    run, settings, best = found.run, found.settings, found.best
    names = short_names(run.cameras)
    page = Page(f"Grounding: is it on the {settings.role}?")
    if found.has_random_weights:
        page.text(RANDOM_WEIGHTS)
    page.text(sentence(found))
    page.points([*_facts(found), *found.notes, *_remarks(found)])

    page.heading("Which layers and heads")
    smallest = found.ranking.attrs["smallest_p"]
    page.text(
        f"{len(found.ranking)} maps were tried: every camera, layer and head, and the mean over "
        f"heads{', at ' * bool(_step(found))}{_step(found)}. p is corrected for all of them (sign flips of "
        f"value minus the better chance level, against the best of all maps in each flip); "
        f"{_episodes(run.n_episodes)} cannot give a p below {smallest:.2g}."
    )
    page.table(
        (
            "camera",
            "layer",
            "head",
            settings.metric,
            "interval",
            "uniform",
            "mean map elsewhere",
            "centre prior",
            "p",
        ),
        [_ranked(row, names, settings.metric) for row in found.ranking.head(_MOST_ROWS).to_dict("records")],
    )
    for name in ("ranking", "layers_heads"):
        page.picture(folder / f"{name}.png", texts[name])

    page.heading(
        "The best map, on episodes that it was not chosen on" if best.is_held_out else "The best map"
    )
    page.table(
        ("metric", "value", "interval", "uniform", "mean map elsewhere", "centre prior"),
        [(metric, *_cells(metric, found.overall[metric])) for metric in METRICS],
    )
    page.points(f"{name}: {text}" for name, text in DEFINITIONS.items())
    page.points(f"{name}: {text}" for name, text in CHANCES.items())

    page.heading("Through the task")
    page.text(
        f"Concentration on each role: attention per area inside, divided by attention per area outside; 1 is "
        f"chance. Phases: {PHASES_IN_WORDS[found.phases]}."
    )
    page.table(
        ("role", *found.phases),
        [
            (role, *(_with_interval("concentration", levels, at) for at in range(len(found.phases))))
            for role, levels in found.by_phase.items()
        ],
    )
    if found.ahead:
        page.text(f"How much denser it is on the {settings.role} than on the others, episode by episode:")
        page.table(
            ("minus", *found.phases),
            [
                (role, *(_with_interval("concentration", levels, at) for at in range(len(found.phases))))
                for role, levels in found.ahead.items()
            ],
        )
    page.picture(folder / "phases.png", texts["phases"])

    if "noise_to_action" in texts:
        page.heading("From noise to action")
        page.picture(folder / "noise_to_action.png", texts["noise_to_action"])
    if found.arm:
        page.heading("The robot")
        page.points(_about_arm(names[camera], arm.above_area) for camera, arm in found.arm.items())
        page.picture(folder / "robot.png", texts["robot"])
    page.heading("Success and failure")
    if found.outcomes:
        page.table(
            ("role", "success", "failure", "difference", "interval"),
            [
                (
                    role,
                    *(
                        _number(settings.metric, float(found.outcomes[o].value[at]))
                        for o in ("success", "failure")
                    ),
                    _difference(settings.metric, difference[0]),
                    _ends(settings.metric, difference[1], difference[2]),
                )
                for at, (role, difference) in enumerate(found.outcome_differences.items())
            ],
        )
        page.picture(folder / "outcomes.png", texts["outcomes"])
    else:
        solved = [run.success[index] for index in best.reported_on]
        page.text(
            f"No comparison: {solved.count(True)} of the {len(solved)} episodes reported on were solved and "
            f"{solved.count(False)} were not; one of each is needed."
        )
    page.text("Every number: grounding.csv; every map that was ranked: ranking.csv.")
    page.text(f"Settings: {json.dumps(asdict(settings))}")
    return page


def _step(found: Grounded) -> str:
    """Say which denoise step the ranking is of; "" for a policy that does not denoise."""
    run = found.run
    return f"denoise step {run.denoise_steps[found.step]}" if np.isfinite(run.flow_time).any() else ""


def _facts(found: Grounded) -> list[str]:
    """Return what the report is of."""
    run, episodes = found.run, found.episodes
    tasks = sorted({episode.task for episode in episodes})
    task = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
    n_solved = run.success.count(True)
    intervals = f"intervals: {found.settings.confidence:.0%} bootstrap over episodes (expanded percentile)"
    if run.n_episodes < 2:
        intervals = "intervals: none, for one episode has none"
    return [
        f"{_episodes(run.n_episodes)} ({n_solved} solved): {task}",
        f"first episode: {store_name(episodes[0].path)}" if episodes else "",
        f"masks: {found.masks}; seen at " + ", ".join(_seen(found)),
        f"action token: {found.settings.query}",
        intervals,
    ]


def _seen(found: Grounded) -> list[str]:
    """Say at how many inferences each camera shows the role."""
    role = found.run.roles.index(found.settings.role)
    names = short_names(found.run.cameras)
    shares = mean_of(found.run.visible[:, :, role])
    return [
        f"{100 * share:.0f} % of inferences by {names[camera]}"
        for camera, share in zip(found.run.cameras, shares.tolist(), strict=True)
    ]


def _remarks(found: Grounded) -> list[str]:
    """Return what is to be said of the policies, each remark once."""
    return list(dict.fromkeys(e.policy_remark for e in found.episodes if e.policy_remark))


def _caption(found: Grounded, facts: Sequence[str]) -> Caption:
    said = _facts(found)
    warning = RANDOM_WEIGHTS if found.has_random_weights else ""
    return Caption([*facts, said[0], said[-1]], warning, [*found.notes, *_remarks(found)])


def _about_arm(camera: str, above: tuple[float, float, float]) -> str:
    """Say whether a camera's attention on the robot is below the robot's share of the area."""
    difference, low, high = (100 * value for value in above)
    if not np.isfinite(difference):
        return f"{camera}: the robot is never seen"
    what = f"{camera}: {difference:+.1f} percentage points against its area"
    if not np.isfinite(low):
        return f"{what}; one episode has no interval"
    word = "less than its area" if high < 0 else "more than its area" if low > 0 else "not told apart from it"
    return f"{what} (interval {low:+.1f} to {high:+.1f}): {word}; mean over layers and heads"


def _ranked(row: dict[Any, Any], names: dict[str, str], metric: str) -> tuple[str, ...]:
    p = "< 0.001" if row["p"] < 0.001 else f"{row['p']:.2g}"
    return (names[row["camera"]], str(row["layer"]), str(row["head"]), *_cells(metric, row), p)


def _cells(metric: str, numbers: dict[Any, Any]) -> tuple[str, ...]:
    chances = (_number(metric, numbers[name]) for name in ("uniform", "fixed", "centre"))
    return (_number(metric, numbers["value"]), _ends(metric, numbers["low"], numbers["high"]), *chances)


def _with_interval(metric: str, levels: Levels, at: int) -> str:
    ends = _ends(metric, float(levels.low[at]), float(levels.high[at]))
    value = _number(metric, float(levels.value[at])) or "–"
    return f"{value} ({ends})" if ends else value


def _number(metric: str, value: float) -> str:
    """Return a number with its unit; "" where there is none."""
    if not np.isfinite(value):
        return ""
    if metric in _SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" + (" patches" if metric == "centre_distance" else "")


def _difference(metric: str, value: float) -> str:
    return f"{100 * value:+.1f}" if metric in _SHARES else f"{value:+.2f}"


def _ends(metric: str, low: float, high: float) -> str:
    if not (np.isfinite(low) and np.isfinite(high)):
        return ""
    factor, digits = (100, 1) if metric in _SHARES else (1, 2)
    return f"{factor * low:.{digits}f} to {factor * high:.{digits}f}"


def _interval(metric: str, numbers: dict[str, float]) -> str:
    ends = _ends(metric, numbers["low"], numbers["high"])
    return f" (interval {ends})" if ends else ""


def _unit(metric: str) -> str:
    return f", {_UNITS[metric]}"


def _head(head: str) -> str:
    return "mean over heads" if head == "mean" else f"head {head}"


def _episodes(count: int, kind: str = "") -> str:
    return f"{count} {kind + ' ' if kind else ''}episode{'s' if count != 1 else ''}"
