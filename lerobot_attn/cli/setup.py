"""Commands about this machine: demo-policy, doctor, policies, setup-libero."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import status
from lerobot_attn.errors import ConfigError


@app.command()
def demo_policy(
    directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    policy_type: Annotated[
        str,
        typer.Option(
            "--type", help="pi05_tiny, trained; pi0_tiny and smolvla_tiny, which have random weights alone."
        ),
    ] = "pi05_tiny",
    random: Annotated[
        bool, typer.Option("--random", help="Random weights instead of trained ones: the maps mean nothing.")
    ] = False,
    variant: Annotated[
        str,
        typer.Option(help="Which trained policy: pi05_tiny; pi05_tiny_heights lifts low or high at random."),
    ] = "pi05_tiny",
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
) -> None:
    """Write a checkpoint of a tiny policy for trying things out: Pi0.5, trained, or another family's."""
    from lerobot_attn.demo.checkpoint import make_demo_checkpoint
    from lerobot_attn.demo.trained import DEFAULT, REMARKS

    random = random or policy_type != DEFAULT  # no other type has trained weights
    with status("Writing the demo checkpoint (loading LeRobot takes a while)"):
        path = make_demo_checkpoint(
            directory, policy_type=policy_type, random=random, variant=variant, seed=seed, overwrite=overwrite
        )
    what = "random weights, so its attention maps mean nothing" if random else REMARKS[variant]
    print(f"Wrote {path}: policy type {policy_type}, {what}.")
    print(f"Use it with: lerobot-eval --policy.path={path} …")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def doctor(
    context: typer.Context,
    policy_path: Annotated[
        str | None,
        typer.Option(
            "--policy.path",
            metavar="CHECKPOINT",
            help="Check what this policy is fed: a checkpoint's folder or Hub name. Also --policy.device=….",
        ),
    ] = None,
    env_type: Annotated[
        str | None,
        typer.Option(
            "--env.type",
            metavar="ENV",
            help="Feed it an environment's first observation, e.g. libero. Also --env.task and other fields.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="REPO_OR_ROOT",
            help="Feed it a LeRobotDataset's first frame; with --env.type, compare the environment with it.",
        ),
    ] = None,
    rename: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Names of environment or data set → the policy's, as '{\"observation.images.front\": …}'.",
        ),
    ] = None,
) -> None:
    """Check this machine: Python, torch, LeRobot's patch points, the GL backend, LIBERO's files, the disk.

    With --policy.path, check what a policy is fed against what it was trained on: one observation goes
    through the checkpoint's own processors. The exit status is 1 if a check failed.
    """
    from lerobot_attn.machine.doctor import check_policy, print_report, run_checks

    if policy_path is None:
        named = {"--env.type": env_type, "--dataset": dataset, "--rename": rename}
        given = [*(name for name, value in named.items() if value is not None), *context.args]
        if given:
            raise ConfigError(f"{given[0]}: goes with --policy.path=CHECKPOINT, which is not given")
        raise typer.Exit(print_report(run_checks(), Console()))
    options = [*context.args, *([] if env_type is None else [f"--env.type={env_type}"])]
    raise typer.Exit(print_report(check_policy(policy_path, dataset, rename, options), Console()))


@app.command()
def policies() -> None:
    """List LeRobot's policy types: whose attention is captured, edited, compiled, and why others' is not."""
    from lerobot_attn.machine.policies import print_policies

    print_policies(Console())


@app.command()
def setup_libero(
    assets: Annotated[
        Path | None,
        typer.Option(help="An archive or folder with LIBERO's assets, for machines without the Hub."),
    ] = None,
) -> None:
    """Write LIBERO's config file, which it would otherwise ask for on stdin, and put its assets in place."""
    from lerobot_attn.machine.libero import install_assets, write_libero_config

    print(f"LIBERO config: {write_libero_config()}")
    if assets is not None:
        print(f"LIBERO assets: {install_assets(assets)}")
