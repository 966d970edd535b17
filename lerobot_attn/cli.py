"""The `lerobot-attn` command. Each command parses its options and makes one call into the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.status import Status

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


EpisodePath = Annotated[Path, typer.Argument(help="An episode's store, ….zarr.")]
SettingsFile = Annotated[
    Path | None, typer.Option("--settings", help="Read settings from this YAML file; options come on top.")
]
Layer = Annotated[str | None, typer.Option(help="Layer: a number (negative from the last) or mean.")]
Step = Annotated[str | None, typer.Option(help="Denoise step: a number (negative from the last) or mean.")]
Head = Annotated[str | None, typer.Option(help="Head: a number, mean or max.")]
Query = Annotated[
    str | None,
    typer.Option(help="Action token: a number, frame (the one executed at the frame), executed or mean."),
]
Normalisation = Annotated[
    str | None,
    typer.Option(
        help="share of all attention, share within the image, frame (of its largest patch), or episode (one "
        "range for all frames)."
    ),
]
LeaveOut = Annotated[
    str | None, typer.Option(help="Key tokens to leave out, as 0,4; or sinks, to find attention sinks first.")
]
ColorMap = Annotated[str | None, typer.Option("--colormap", help="A matplotlib colour map.")]
Alpha = Annotated[float | None, typer.Option(help="Opacity of the largest value, 0 to 1.")]
Clip = Annotated[
    float | None, typer.Option(help="Percentile of the patches at which colours end; 100 is the largest.")
]
Interpolation = Annotated[
    str | None, typer.Option(help="nearest (a patch is a square) or linear (blended between patch centres).")
]


@app.command()
def plot(
    episode: EpisodePath,
    kind: Annotated[
        str,
        typer.Option(
            help="image, text, combined, evolution, heads, denoise, actions, cross-modal or timeline."
        ),
    ] = "image",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG, PDF or SVG file. Default: {kind}.png")
    ] = None,
    frames: Annotated[
        str | None, typer.Option(help="Frames, as 12 or 0,40,80 or 0-9, or all. Default: the middle one.")
    ] = None,
    cameras: Annotated[
        str | None, typer.Option(help="Cameras, by the last part of the name. Default: all.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers, as -1 or 0,8,17 or 0-17, all or mean. Default: full maps.")
    ] = None,
    denoise_steps: Annotated[
        str | None, typer.Option(help="Denoise steps, likewise. Default: the last one.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Heads, as 3 or 0,4, all, mean or max. Default: mean.")
    ] = None,
    query: Query = None,
    normalisation: Normalisation = None,
    word: Annotated[
        str | None, typer.Option(help="For cross-modal: a word of the task, or its number. Default: all.")
    ] = None,
    leave_out: LeaveOut = None,
    clip: Clip = None,
    color_map: ColorMap = None,
    alpha: Alpha = None,
    interpolation: Interpolation = None,
    width: Annotated[
        float | None, typer.Option(help="Width in inches: 3.4 is a paper's column, 7 (default) a page.")
    ] = None,
    columns: Annotated[int | None, typer.Option(help="Panels in a row.")] = None,
    dpi: Annotated[int | None, typer.Option(help="Dots per inch of PNG files.")] = None,
    settings: SettingsFile = None,
) -> None:
    """Draw where and at what the policy looked: a figure of one kind, for chosen frames, layers and heads."""
    from lerobot_attn.figures import save_figure
    from lerobot_attn.plot import PlotSettings
    from lerobot_attn.plot import plot as draw
    from lerobot_attn.settings import load_settings
    from lerobot_attn.store.reader import open_episode

    chosen = load_settings(
        PlotSettings,
        settings,
        frames=frames,
        cameras=cameras,
        layers=layers,
        denoise_steps=denoise_steps,
        heads=heads,
        query=query,
        normalisation=normalisation,
        word=word,
        leave_out=leave_out,
        clip=clip,
        colormap=color_map,
        alpha=alpha,
        interpolation=interpolation,
        width=width,
        columns=columns,
        dpi=dpi,
    )
    with _status(f"Drawing {kind}"):
        figure = draw(open_episode(episode), kind, chosen)
        path = save_figure(figure, output or Path(f"{kind}.png"), dpi=chosen.dpi)
    print(f"Wrote {path}")


@app.command()
def demo_policy(
    directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
) -> None:
    """Write a tiny Pi0.5 checkpoint with random weights, for trying things out without the real one."""
    from lerobot_attn.demo.checkpoint import make_demo_checkpoint

    with _status("Writing the demo checkpoint (loading LeRobot takes a while)"):
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


def _status(text: str) -> Status:
    """Return a spinner on stderr."""
    return Console(stderr=True).status(text)


def main() -> None:
    """Run the command line; errors of ours are one line on stderr and exit status 1."""
    try:
        app()
    except LerobotAttnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
