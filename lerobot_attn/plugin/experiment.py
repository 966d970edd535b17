"""Experiments: conditions of a policy on the same tasks, initial states and noise, one `lerobot-eval` each.

    plan = ExperimentPlan.from_yaml("configs/experiment/prompt_swap.yaml", ["policy.path=CHECKPOINT"])
    status = run_experiment(plan, Path("out"))

`out` gets `experiment.yaml` (the plan), a file of interventions for each condition, and a folder for each, as
`lerobot-eval` writes it. What is complete there is kept, so the same call goes on where it was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lerobot_attn.errors import ConfigError, StoreError
from lerobot_attn.interventions.experiment import ALWAYS, ExperimentPlan, PlannedCondition
from lerobot_attn.plugin.launch import eval_arguments, eval_command, launch_eval
from lerobot_attn.recording.progress import progress_of

__all__ = ["ExperimentPlan", "arguments_of", "run_experiment"]

PLAN_FILE = "experiment.yaml"


def run_experiment(
    plan: ExperimentPlan, out: Path, *, dry_run: bool = False, say: Callable[[str], None] = print
) -> int:
    """Evaluate each condition that is not complete yet.

    Args:
        plan: what to do.
        out: the experiment's folder; it is made.
        dry_run: only say what each condition does, the commands and how many episodes they are.
        say: gets lines for people.

    Returns:
        The exit status: 0, or that of the first evaluation that failed or was interrupted.

    Raises:
        ConfigError: the policy is not given, no metric is called as the outcome, or the folder cannot be
            written.
        StoreError: the folder holds another experiment.
    """
    planned = plan.planned
    _check_outcome(plan)
    for what in ("outcome", "expectation"):
        if getattr(plan, what) is not None:
            say(f"{what.capitalize()}: {getattr(plan, what)}")
    if dry_run:
        n_tasks = None if plan.tasks is None else len(plan.tasks)
        each = f"{n_tasks} tasks × {plan.n_episodes}" if n_tasks else f"all tasks × {plan.n_episodes}"
        total = f" = {len(planned) * n_tasks * (plan.n_episodes or 0)} episodes" if n_tasks else " episodes"
        for one in planned:
            control = f"; control of {one.control_of}" if one.control_of else ""
            say(f"# {one.condition.text}{control}")
            say(eval_command(arguments_of(plan, one, out)))
        say(f"{len(planned)} conditions × {each}{total}")
        return 0
    commands = [arguments_of(plan, one, out) for one in planned]  # before anything is written
    _write_plan(plan, out, planned)
    for number, (one, arguments) in enumerate(zip(planned, commands, strict=True), start=1):
        name = f"[{number}/{len(planned)}] {one.name}"
        before = progress_of(out / one.name, plan.n_episodes or 0, plan.tasks)
        say(f"{name}: {before}{'' if before.is_done else '; evaluating'}")
        if before.is_done:
            continue
        if before.missing is not None:
            arguments = arguments_of(plan, one, out, before.missing)
        started = time.monotonic()
        status = launch_eval(arguments)
        after = progress_of(out / one.name, plan.n_episodes or 0, plan.tasks)
        say(f"{name}: {after}, {(time.monotonic() - started) / 60:.1f} min")
        if status or not after.is_done:
            say(f"{name}: ended with status {status}; the same command goes on there")
            return status or 1
    say(f"Compare the conditions with: lerobot-attn effects {out}")
    return 0


def arguments_of(
    plan: ExperimentPlan, condition: PlannedCondition, out: Path, tasks: Sequence[int] | None = None
) -> list[str]:
    """Return the options of `lerobot-eval` for a condition.

    Args:
        plan: the experiment's.
        condition: one of it.
        out: the experiment's folder.
        tasks: numbers of the tasks; None: those of the plan.

    Raises:
        ConfigError: as `eval_arguments`.
    """
    drawn: dict[str, Any] = {} if plan.render == ALWAYS else {"render": plan.render}
    filmed: dict[str, Any] = {"cameras": False} if drawn else {}
    return eval_arguments(
        {
            "policy": plan.policy,
            "env": plan.env if tasks is None else {**plan.env, "task_ids": list(tasks)},
            "eval": {
                "n_episodes": plan.n_episodes,
                "batch_size": plan.batch_size,
                "interventions": str(out / f"{condition.name}.yaml"),
                **drawn,
            },
            "capture": {**plan.capture, **filmed, **_uploaded(plan, condition), "existing": "skip"},
            "rename_map": plan.rename_map,
            "seed": plan.seed,
            "output_dir": str(out / condition.name),
        }
    )


def _uploaded(plan: ExperimentPlan, condition: PlannedCondition) -> dict[str, Any]:
    """Return where a condition's episodes go, if they go anywhere: each has a folder of its own there, too.

    Raises:
        ConfigError: they are not to stay here.
    """
    if plan.capture.get("keep_local", True) is not True:
        raise ConfigError(
            "keep_local: got false in an experiment, expected true, because conditions are compared here; "
            "afterwards `lerobot-attn upload --remove-local` removes what is sent"
        )
    url = plan.capture.get("upload")
    return {} if url is None else {"upload": f"{str(url).rstrip('/')}/{condition.name}/attention"}


def _check_outcome(plan: ExperimentPlan) -> None:
    from lerobot_attn.analysis.effects import METRICS

    if plan.outcome is not None and plan.outcome not in METRICS:
        raise ConfigError(f"outcome: got {plan.outcome!r}, expected one of {', '.join(METRICS)}")


def _write_plan(plan: ExperimentPlan, out: Path, planned: Sequence[PlannedCondition]) -> None:
    file, values = out / PLAN_FILE, plan.to_dict()
    if file.exists():
        for what, theirs, ours in _unlike(ExperimentPlan.from_yaml(file).to_dict(), values):
            raise StoreError(
                f"{file}: is of an experiment with {what} {theirs!r}, this one's is {ours!r}; expected the "
                "same to go on with it; choose another folder"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
        for one in planned:
            text = yaml.safe_dump(one.condition.to_dict(), sort_keys=False, allow_unicode=True)
            (out / f"{one.name}.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from error


def _unlike(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield what must not change between two runs; more tasks, episodes and conditions may come."""
    for name in ("name", "policy", "seed", "capture", "render", "rename_map", "outcome", "expectation"):
        if theirs.get(name) != ours.get(name):
            yield name, theirs.get(name), ours.get(name)
    own, other = ({**side["env"], "task_ids": None} for side in (ours, theirs))
    if own != other:
        yield "env", other, own
    if (theirs["batch_size"] == 1) != (ours["batch_size"] == 1):
        yield "batch_size", theirs["batch_size"], ours["batch_size"]
    before = {one["name"]: one for one in theirs["conditions"]}
    for one in ours["conditions"]:
        other = before.get(one["name"], one)
        if other["interventions"] != one["interventions"]:
            yield f"{one['name']}'s interventions", other["interventions"], one["interventions"]
