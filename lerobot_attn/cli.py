"""The `lerobot-attn` command. Each command parses its options and makes one call into the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

from lerobot_attn import __version__
from lerobot_attn.errors import ConfigError, LerobotAttnError, StoreError

if TYPE_CHECKING:
    from lerobot_attn.store.reader import Episode
    from lerobot_attn.store.runs import Run

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
    from lerobot_attn.store.runs import open_run

    run = open_run(path)
    facts = inspection.describe_episode(run[0]) if run.is_episode else inspection.describe_run(run)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    render = inspection.render_episode if run.is_episode else inspection.render_run
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
        str | None, typer.Option(help="Cameras, by the end of the name. Default: all.")
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
    from lerobot_attn.figures import check_format, save_figure
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
    path = check_format(output or Path(f"{kind}.png"))
    with _status(f"Drawing {kind}"):
        figure = draw(open_episode(episode), kind, chosen)
        save_figure(figure, path, dpi=chosen.dpi)
    print(f"Wrote {path}")


@app.command()
def overlay(
    episode: EpisodePath,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="MP4 or GIF file. Default: overlay.mp4")
    ] = None,
    camera: Annotated[
        str | None, typer.Option(help="Camera, by the end of its name, or all. Default: the first.")
    ] = None,
    layer: Layer = None,
    denoise_step: Step = None,
    head: Head = None,
    query: Query = None,
    normalisation: Normalisation = None,
    leave_out: LeaveOut = None,
    clip: Clip = None,
    alpha: Alpha = None,
    color_map: ColorMap = None,
    interpolation: Interpolation = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second. Default: the episode's.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Height of a view in pixels. Default: the camera's.")
    ] = None,
    frames: Annotated[str | None, typer.Option(help="Frames, as 0-99 or 0,5,10. Default: all.")] = None,
    gif: Annotated[bool, typer.Option("--gif", help="Write a GIF, for a README.")] = False,
    settings: SettingsFile = None,
) -> None:
    """Write the episode's video with the heatmap over it on the left and the pure map on the right."""
    from lerobot_attn.overlay import OverlaySettings, write_overlay
    from lerobot_attn.settings import load_settings
    from lerobot_attn.store.reader import open_episode

    chosen = load_settings(
        OverlaySettings,
        settings,
        camera=camera,
        layer=layer,
        denoise_step=denoise_step,
        head=head,
        query=query,
        normalisation=normalisation,
        leave_out=leave_out,
        clip=clip,
        alpha=alpha,
        colormap=color_map,
        interpolation=interpolation,
        fps=fps,
        size=size,
        frames=frames,
    )
    target = output or Path("overlay.gif" if gif else "overlay.mp4")
    if gif and target.suffix.lower() != ".gif":
        raise ConfigError(f"{target}: --gif writes a GIF, expected a name that ends in .gif")
    with _progress("Overlay") as progress:
        path = write_overlay(open_episode(episode), target, chosen, progress)
    print(f"Wrote {path}")


@app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(help="An episode (….zarr), a task's folder, or a run's output folder.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Contact sheet: PNG, PDF or SVG file.")
    ] = Path("contact-sheet.png"),
    sheet: Annotated[
        bool, typer.Option("--sheet/--no-sheet", help="Draw the contact sheet, of a single episode.")
    ] = True,
    thorough: Annotated[
        bool | None, typer.Option("--thorough", help="Check the rows of every inference, not of three.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="First drop what is damaged or left over, and say what.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --repair: say what would be dropped, and change nothing.")
    ] = False,
    layer: Layer = None,
    denoise_step: Step = None,
    color_map: ColorMap = None,
    alpha: Alpha = None,
    settings: SettingsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check that maps, frames and videos belong together, and draw a contact sheet; exit status 1 on failure.

    Every chunk is read; what is damaged is named with its coordinates. --repair makes damaged maps missing
    values (NaN), cuts the episode where its tables are damaged, and removes what a killed recording left.

    The sheet shows the policy's view, the evaluation's frame and the overlay for the first, middle and last
    inference and every camera.
    """
    from lerobot_attn.figures import check_format, save_figure
    from lerobot_attn.settings import load_settings
    from lerobot_attn.store.runs import open_run
    from lerobot_attn.verify import VerifySettings, contact_sheet, verify_episode

    chosen = load_settings(
        VerifySettings,
        settings,
        thorough=thorough,
        layer=layer,
        denoise_step=denoise_step,
        colormap=color_map,
        alpha=alpha,
    )
    check_format(output)
    if dry_run and not repair:
        raise ConfigError("--dry-run: goes with --repair, expected both or neither")
    messages = sys.stderr if as_json else sys.stdout
    refused = _repair(path, dry_run, messages) if repair else False
    run = open_run(path)
    single = run.is_episode
    reports = []
    for found in run:
        with _progress("Checking") as progress:
            report = verify_episode(found, thorough=chosen.thorough, progress=progress)
        reports.append(report)
        if not as_json:
            report.render(Console())
    if as_json:
        facts = [report.to_dict() for report in reports]
        print(json.dumps(facts[0] if single else facts, indent=2))
    for _, reason in () if repair else run.damaged:  # a repair has said so already
        print(f"error: {reason}", file=sys.stderr)
    if sheet and single:
        try:
            with _status("Drawing the contact sheet"):
                file = save_figure(contact_sheet(run[0], chosen), output, dpi=chosen.dpi)
        except StoreError as error:
            if reports[0].passed:
                raise
            print(f"No contact sheet: {error}", file=sys.stderr)
        else:
            print(f"Wrote {file}", file=messages)
    passed = not refused and not run.damaged and all(report.passed for report in reports)
    raise typer.Exit(0 if passed else 1)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Side A: an episode, a task's folder, or a run's output folder.")],
    b: Annotated[Path | None, typer.Argument(help="Side B, likewise. Not with --by.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for figure, tables and video.")
    ] = Path("report"),
    by: Annotated[
        str | None, typer.Option(help="Split A instead of giving B: success, its failures against successes.")
    ] = None,
    layer: Layer = None,
    denoise_step: Step = None,
    head: Head = None,
    query: Query = None,
    camera: Annotated[
        str | None,
        typer.Option(help="Camera of the images, by the end of its name. Default: first."),
    ] = None,
    normalisation: Normalisation = None,
    leave_out: LeaveOut = None,
    clip: Clip = None,
    align: Annotated[
        str | None, typer.Option(help="phase (fraction of the episode, default) or frame.")
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Of the intervals over episodes.")] = None,
    video: Annotated[
        bool | None, typer.Option("--video/--no-video", help="Write the video of two episodes side by side.")
    ] = None,
    settings: SettingsFile = None,
) -> None:
    """Compare two episodes (success and failure, two prompts) or two groups, and write a report."""
    from lerobot_attn.analysis.compare import split_by_success
    from lerobot_attn.report import CompareSettings, write_report
    from lerobot_attn.settings import load_settings
    from lerobot_attn.store.runs import open_run

    chosen = load_settings(
        CompareSettings,
        settings,
        layer=layer,
        denoise_step=denoise_step,
        head=head,
        query=query,
        camera=camera,
        normalisation=normalisation,
        leave_out=leave_out,
        clip=clip,
        align=align,
        confidence=confidence,
        video=video,
    )
    if by not in (None, "success"):
        raise ConfigError(f"--by: got {by!r}, expected success")
    if (b is None) == (by is None):
        raise ConfigError("compare: expected two sides A and B, or one with --by success")
    if b is None:
        split = split_by_success(_whole_episodes(open_run(a)))
        sides = split.failures, split.successes
    else:
        sides = _whole_episodes(open_run(a)), _whole_episodes(open_run(b))
    with _progress("Comparing") as progress:
        files = write_report(*sides, output, chosen, progress)
    print("\n".join(f"Wrote {path}" for path in files))


@app.command()
def view(
    path: Annotated[
        Path, typer.Argument(help="An episode (….zarr), a task's folder, or a run's output folder.")
    ],
    port: Annotated[
        int | None, typer.Option(help="Port to listen at; by default the first free one from 8123 on.")
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen at. Any but the default lets other machines in: no password."),
    ] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A further name by which the server may be addressed, as behind a proxy; may be repeated. "
            "*.example.org for all that end so, * for any.",
        ),
    ] = None,
    base_path: Annotated[
        str, typer.Option(help="Path of a proxy that passes it on, as /proxy/8123/. Others need none.")
    ] = "",
) -> None:
    """Serve recordings to the browser, live while they grow, until Ctrl-C."""
    from lerobot_attn.explorer.server import serve

    serve(
        path,
        host=host,
        port=port,
        open_browser=browser,
        allow_hosts=allow_host or (),
        base_path=base_path,
    )


@app.command()
def export_html(
    episode: EpisodePath,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file. Default: the episode's name.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers, as -1 or 0,8,17 or 9-17. Default: all with means.")
    ] = None,
    heads: Annotated[str | None, typer.Option(help="Heads, as 3 or 0,4 or 0-3. Default: all.")] = None,
    denoise_steps: Annotated[
        str | None, typer.Option(help="Denoise steps, likewise, or all. Default: the last recorded.")
    ] = None,
    frames: Annotated[
        str | None, typer.Option(help="Frames, as 0-99 or, every fifth, 0-279:5. Default: all.")
    ] = None,
    max_mb: Annotated[
        float | None, typer.Option(help="Megabytes: a larger file is not written. Default: 25.")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(help="Quality of the pictures as JPEG, 1 to 95. Default: 80.")
    ] = None,
    settings: SettingsFile = None,
) -> None:
    """Write an episode as a single HTML file with the explorer's page, to share: it needs no network."""
    from lerobot_attn.explorer.export import ExportSettings
    from lerobot_attn.explorer.export import export_html as write
    from lerobot_attn.settings import load_settings
    from lerobot_attn.store.reader import open_episode

    chosen = load_settings(
        ExportSettings,
        settings,
        layers=layers,
        heads=heads,
        denoise_steps=denoise_steps,
        frames=frames,
        max_mb=max_mb,
        quality=quality,
    )
    found = open_episode(episode)
    path = output or Path(f"{found.path.stem}.html")
    with _progress("Reading") as progress:
        written = write(
            found,
            path,
            chosen,
            progress=progress,
            announce=lambda contents: print(f"{path}: {contents}, at most {chosen.max_mb:g} MB"),
        )
    print(f"Wrote {written}")


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
    from lerobot_attn.machine.doctor import print_report, run_checks

    raise typer.Exit(print_report(run_checks(), Console()))


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


def _whole_episodes(run: Run) -> list[Episode]:
    """Return a run's episodes, and say which ones cannot be opened."""
    for _, reason in run.damaged:
        print(f"left out: {reason}", file=sys.stderr)
    return list(run)


def _repair(path: Path, dry_run: bool, messages: TextIO) -> bool:
    """Repair the stores under a path and say what was dropped; return whether one could not be repaired."""
    from lerobot_attn.store.repair import repair

    with _progress("Repairing") as progress:
        repairs = repair(path, dry_run=dry_run, progress=progress)
    for store in repairs:
        is_refused = store.refused is not None
        for line in store.lines(done=not dry_run):
            print(f"error: {line}" if is_refused else line, file=sys.stderr if is_refused else messages)
    return any(store.refused is not None for store in repairs)


def _status(text: str) -> Status:
    """Return a spinner on stderr."""
    return Console(stderr=True).status(text)


@contextmanager
def _progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, moved by calls of (done, total)."""
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def main() -> None:
    """Run the command line; errors of ours are one line on stderr and exit status 1."""
    try:
        app()
    except LerobotAttnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
