"""Measure what a checkpoint of the demo policy does in LIBERO's scenes.

    python scripts/demo/evaluate.py checkpoint=DIR [official.tasks=[0,7]] [official.states=50]
    [named.layouts=6]

"official": the suite's tasks from LIBERO's own initial states, none of which was trained on; success is
LIBERO's, within LeRobot's 280 steps. "named": random layouts that no training frame shows, each with the
instruction of every object in turn; which object the hand came down on, which ones were lifted. Each episode
becomes a line of JSON, so an interrupted evaluation goes on where it was. Prints a table with 95 % intervals
(Wilson).
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from expert import GRIPS, carry_height
from generate import NAMED, RENDER_PX
from omegaconf import DictConfig, OmegaConf
from scene import (
    BASKET,
    OBJECTS,
    SUITE,
    instruction,
    random_places,
    scene_of,
    silence,
)
from tqdm import tqdm

from lerobot_attn.errors import LerobotAttnError

MOST_STEPS = 280  # LeRobot's own length of an episode of this suite
LIFTED = 0.03  # metres above where it stood
REACHED, LOW = (
    0.03,
    0.16,
)  # horizontal distance of the hand, and its height, when it has come down on something


@dataclass(frozen=True)
class Trial:
    """One episode to be tried.

    Attributes:
        kind: "official" or "named".
        task: whose scene it is.
        index: number of the initial state, or of the random layout.
        name: the object that is named.
    """

    kind: str
    task: int
    index: int
    name: str


@dataclass(frozen=True)
class Outcome:
    """What happened in one episode.

    Attributes:
        success: LIBERO's own.
        steps: that were done.
        reached: the object that the hand came down on first, "" if on none.
        lifted: the objects that were lifted, in this order.
        height: of the named object above where it stood, the most of the episode, metres.
    """

    success: bool
    steps: int
    reached: str
    lifted: tuple[str, ...]
    height: float


def run(checkpoint: Path, trial: Trial, most_steps: int = MOST_STEPS) -> Outcome:
    """Do one episode, of this many steps at most; chance follows from the trial alone."""
    import torch
    from rollout import PolicyActor

    actor, scene = PolicyActor.of(checkpoint), scene_of(trial.task, RENDER_PX)
    torch.manual_seed(trial.index)
    if trial.kind == "official":
        scene.reset(trial.index)
    else:
        rng = np.random.default_rng([987, trial.task, trial.index])
        scene.reset(0, random_places(scene.names, rng))
    actor.begin()
    start = {name: scene.position(name) for name in scene.names}
    lifted: list[str] = []
    reached, height = "", 0.0
    for step in range(most_steps):
        scene.step(actor.act(scene, trial.name))
        for name in scene.names:
            if name not in lifted and scene.position(name)[2] > start[name][2] + LIFTED:
                lifted.append(name)
            below = np.hypot(*(scene.hand - start[name])[:2])
            if not reached and below < REACHED and scene.hand[2] < LOW:
                reached = name
        height = max(height, float(scene.position(trial.name)[2] - start[trial.name][2]))
        if scene.in_basket(trial.name):
            return Outcome(True, step + 1, reached, tuple(lifted), round(height, 3))
    return Outcome(False, most_steps, reached, tuple(lifted), round(height, 3))


def _run(job: tuple[Path, Trial, int]) -> tuple[Trial, Outcome]:
    return job[1], run(*job)


def trials(official: dict[str, Any], named: dict[str, Any]) -> list[Trial]:
    """Return the episodes that the settings ask for, those of one task together."""
    out = []
    for task in official["tasks"]:
        out += [Trial("official", task, index, OBJECTS[task]) for index in range(official["states"])]
    for task in named["tasks"]:
        for index in range(named["layouts"]):
            out += [Trial("named", task, index, name) for name in NAMED]
    return sorted(out, key=lambda trial: trial.task)


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a share (Wilson 1927), 95 % by default."""
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def shown(hits: Iterable[bool]) -> str:
    """Return e.g. "41 of 50, 82 % (69 to 90 %)"."""
    values = list(hits)
    low, high = wilson(sum(values), len(values))
    share = 100 * sum(values) / max(1, len(values))
    return f"{sum(values)} of {len(values)}, {share:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = []
    official = [row for row in rows if row["kind"] == "official"]
    if official:
        lines += ["| task | instruction | success |", "|---|---|---|"]
        for task in sorted({row["task"] for row in official}):
            own = [row for row in official if row["task"] == task]
            lines.append(
                f"| {task} | {instruction(own[0]['name'])} | {shown(row['success'] for row in own)} |"
            )
        lines.append(f"| all | | {shown(row['success'] for row in official)} |")
        lines.append("")
    named = [row for row in rows if row["kind"] == "named"]
    if named:
        lines += [
            "| named object | reached first | lifted | another lifted | in the basket |",
            "|---|---|---|---|---|",
        ]
        for name in [*sorted({row["name"] for row in named}), "all"]:
            own = [row for row in named if name in (row["name"], "all")]
            cells = (
                shown(row["reached"] == row["name"] for row in own),
                shown(row["name"] in row["lifted"] for row in own),
                shown(any(other != row["name"] for other in row["lifted"]) for row in own),
                shown(row["success"] for row in own),
            )
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, *_heights(rows)]).rstrip("\n")


def _heights(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of how many episodes carried the object how much higher than the basket's rim asks."""
    above = [
        row["height"] - carry_height(GRIPS[row["name"]]) + GRIPS[row["name"]].height
        for row in rows
        if row["name"] in row["lifted"] and "height" in row  # rows of older evaluations have none
    ]
    if not above:
        return []
    edges = np.array([-np.inf, -0.01, 0.01, 0.03, 0.05, 0.07, 0.09, np.inf])
    names = [
        "less",
        *(f"{100 * a:.0f} to {100 * b:.0f} cm" for a, b in itertools.pairwise(edges[1:-1])),
        "more",
    ]
    counts = np.histogram(above, edges)[0]
    return [
        f"| lifted higher than needed by | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        f"| episodes, of {len(above)} | {' | '.join(map(str, counts))} |",
    ]


def evaluate(
    checkpoint: Path,
    official: dict[str, Any],
    named: dict[str, Any],
    results: Path,
    processes: int,
    most_steps: int = MOST_STEPS,
) -> list[dict[str, Any]]:
    """Run all trials that `results`, a file of JSON lines, does not hold yet; return all rows."""
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(row["kind"], row["task"], row["index"], row["name"]) for row in rows}
    wanted = trials(official, named)
    # A task's scene has six of the ten objects; the others cannot be named there.
    missing = [
        trial
        for trial in wanted
        if (trial.kind, trial.task, trial.index, trial.name) not in done
        and trial.name in objects_of(trial.task)
    ]
    if not missing:
        return rows
    results.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(min(processes, len(missing))) as pool,
        results.open("a", encoding="utf-8") as file,
        tqdm(total=len(missing), desc="evaluation", unit="episode", dynamic_ncols=True) as bar,
    ):
        for trial, outcome in pool.imap_unordered(
            _run, [(checkpoint, trial, most_steps) for trial in missing]
        ):
            row = asdict(trial) | asdict(outcome)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update()
            bar.set_postfix(success=f"{np.mean([row['success'] for row in rows]):.2f}")
    return rows


@cache
def objects_of(task: int) -> tuple[str, ...]:
    """Return the names of the objects in a task's scene, read off its definition."""
    from libero.libero import benchmark, get_libero_path

    with silence():
        definition = benchmark.get_benchmark_dict()[SUITE]().get_task(task)
    folder = Path(get_libero_path("bddl_files")) / definition.problem_folder
    text = (folder / definition.bddl_file).read_text(encoding="utf-8")
    return tuple(name for name in re.findall(r"(\w+)_1 - ", text) if name != BASKET)


@hydra.main(version_base="1.3", config_path="../../configs/demo", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Evaluate, print the table."""
    try:
        checkpoint = Path(config.checkpoint).absolute()
        settings: Any = {key: OmegaConf.to_container(config[key]) for key in ("official", "named")}
        rows = evaluate(
            checkpoint, settings["official"], settings["named"], Path(config.results), config.processes
        )
    except LerobotAttnError as error:
        sys.exit(f"error: {error}")
    print(table(rows))


if __name__ == "__main__":
    main()
