"""Commands that ask whether what a policy attends to matters: experiment, effects."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import progress_bar
from lerobot_attn.cli.options import SettingsFile


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def experiment(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE.yaml", help="The plan; configs/experiment has some to begin with.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to record into.")],
    no_control: Annotated[
        bool, typer.Option("--no-control", help="Let conditions pass that have no control.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the commands and the number of episodes.")
    ] = False,
) -> None:
    """Evaluate a policy in several conditions, from the same initial states and with the same noise.

    The plan's values can be given here: policy.path=CHECKPOINT n_episodes=20 env.task_ids=[0,3]. What is
    complete in the folder is kept, so the same command goes on where it was interrupted.
    """
    from lerobot_attn.plugin.experiment import ExperimentPlan, run_experiment

    values = {"no_control": True} if no_control else {}
    plan = ExperimentPlan.from_yaml(file, context.args, **values)
    raise typer.Exit(run_experiment(plan, output, dry_run=dry_run, say=lambda line: print(line, flush=True)))


@app.command()
def effects(
    path: Annotated[Path, typer.Argument(help="An experiment's output folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the report. Default: effects in PATH.")
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Of the intervals over initial states.")] = None,
    near: Annotated[
        float | None,
        typer.Option(help="Metres: an object that the end effector never came nearer to was not approached."),
    ] = None,
    lifted: Annotated[
        float | None, typer.Option(help="Metres: an object that rose by this was lifted.")
    ] = None,
    settings: SettingsFile = None,
) -> None:
    """Compare an experiment's conditions pair by pair: success, actions, what was approached, paths.

    Writes effects.csv (condition minus control with bootstrap intervals and p), a figure, and a report with a
    sentence for each comparison.
    """
    from lerobot_attn.analysis.effects import BASELINE, sentence
    from lerobot_attn.report import EffectsSettings, write_effects
    from lerobot_attn.settings import load_settings
    from lerobot_attn.store.runs import open_run

    chosen = load_settings(EffectsSettings, settings, confidence=confidence, near=near, lifted=lifted)
    with progress_bar("Reading") as progress:
        found, files = write_effects(open_run(path), output or path / "effects", chosen, progress)
    for note in found.notes:
        print(note, file=sys.stderr)
    matched = [effect for effect in found.effects if effect.control != BASELINE]
    print("\n".join(map(sentence, matched or found.effects)))
    print("\n".join(f"Wrote {file}" for file in files))
