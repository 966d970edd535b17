"""The `lerobot-attn` command. Each command parses its options and makes one call into the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lerobot_attn import __version__
from lerobot_attn.errors import LerobotAttnError

app = typer.Typer(
    name="lerobot-attn",
    help="See what a vision-language-action policy attends to.\n\n"
    "Record with: lerobot-eval --eval.save_attention_maps=true …",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="An episode (….zarr), a task's folder, or a run's output folder.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what is in an episode's store or in a run: task, shapes, segments, size, where attention goes."""
    from lerobot_attn import inspection
    from lerobot_attn.store.reader import open_run
    from lerobot_attn.store.schema import EPISODE_SUFFIX

    run = open_run(path)
    is_episode = path.suffix == EPISODE_SUFFIX
    facts = inspection.describe_episode(run[0]) if is_episode else inspection.describe_run(run)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    render = inspection.render_episode if is_episode else inspection.render_run
    Console().print(render(facts))


@app.command()
def demo_policy(
    directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
) -> None:
    """Write a tiny Pi0.5 checkpoint with random weights, for trying things out without the real one."""
    from lerobot_attn.demo.checkpoint import make_demo_checkpoint

    with Console(stderr=True).status("Writing the demo checkpoint (loading LeRobot takes a while)"):
        path = make_demo_checkpoint(directory, seed=seed, overwrite=overwrite)
    print(f"Wrote {path}: policy type pi05_tiny, random weights, so its attention maps mean nothing.")
    print(f"Use it with: lerobot-eval --policy.path={path} …")


@app.command()
def doctor() -> None:
    """Check Python, torch, LeRobot's patch points, the GL backend, LIBERO's files and the disk."""
    from lerobot_attn.doctor import print_report, run_checks

    raise typer.Exit(print_report(run_checks(), Console()))


@app.command()
def setup_libero(
    assets: Annotated[
        Path | None,
        typer.Option(help="An archive or folder with LIBERO's assets, for machines without the Hub."),
    ] = None,
) -> None:
    """Write LIBERO's config file, which it would otherwise ask for on stdin, and put its assets in place."""
    from lerobot_attn.libero import install_assets, write_libero_config

    print(f"LIBERO config: {write_libero_config()}")
    if assets is not None:
        print(f"LIBERO assets: {install_assets(assets)}")


def main() -> None:
    """Run the command line; errors of ours are one line on stderr and exit status 1."""
    try:
        app()
    except LerobotAttnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
