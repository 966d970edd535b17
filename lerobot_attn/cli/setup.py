"""Commands about this machine: demo-policy, doctor, policies, setup-libero."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import status


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


@app.command()
def doctor() -> None:
    """Check Python, torch, LeRobot's patch points, the GL backend, LIBERO's files and the disk."""
    from lerobot_attn.machine.doctor import print_report, run_checks

    raise typer.Exit(print_report(run_checks(), Console()))


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
