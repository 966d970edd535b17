"""Commands that look at what was recorded: inspect, plot, overlay, verify, compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import chosen_workers, progress_bar, status
from lerobot_attn.cli.options import (
    Alpha,
    Clip,
    ColorMap,
    ConditionName,
    EpisodePath,
    Exclude,
    Head,
    Interpolation,
    Layer,
    LeaveOut,
    Normalisation,
    Outlines,
    Query,
    RunPath,
    SchedulerAddress,
    SettingsFile,
    Step,
    Successes,
    TaskText,
    Workers,
    part_of,
)
from lerobot_attn.errors import ConfigError, StoreError
from lerobot_attn.store.url import place_of

if TYPE_CHECKING:
    from lerobot_attn.store.reader import Episode
    from lerobot_attn.store.runs import Run
    from lerobot_attn.store.url import Place


@app.command()
def inspect(
    path: RunPath,
    task: TaskText = None,
    success: Successes = None,
    condition: ConditionName = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what is in an episode's store or in a run: task, shapes, segments, size, where attention goes."""
    from lerobot_attn import inspection
    from lerobot_attn.store.runs import open_run

    run = part_of(open_run(path), task, success, condition)
    if run.is_episode:
        facts = inspection.describe_episode(run[0])
    else:
        with progress_bar("Reading") as progress:
            facts = inspection.describe_run(run, progress)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    render = inspection.render_episode if run.is_episode else inspection.render_run
    Console().print(render(facts))


@app.command()
def plot(
    episode: EpisodePath,
    kind: Annotated[
        str,
        typer.Option(
            help="image, text, combined, evolution, heads, denoise, actions, cross-modal, timeline or vision."
        ),
    ] = "image",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG, PDF or SVG file. Default: {kind}.png")
    ] = None,
    frames: Annotated[
        str | None, typer.Option(help="Frames, as 12 or 0,40,80 or 0-9, or all. Default: one in the middle.")
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
    patch: Annotated[
        str | None,
        typer.Option(
            help="For vision: whose attention inside the vision tower, as ROW,COLUMN, 12-15,20-23, or peak "
            "(where the actions look most). Default: peak."
        ),
    ] = None,
    exclude: Exclude = None,
    leave_out: LeaveOut = None,
    clip: Clip = None,
    color_map: ColorMap = None,
    alpha: Alpha = None,
    interpolation: Interpolation = None,
    outlines: Outlines = None,
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
        patch=patch,
        exclude=exclude,
        leave_out=leave_out,
        clip=clip,
        colormap=color_map,
        alpha=alpha,
        interpolation=interpolation,
        outlines=outlines,
        width=width,
        columns=columns,
        dpi=dpi,
    )
    path = check_format(output or Path(f"{kind}.png"))
    with status(f"Drawing {kind}"):
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
    exclude: Exclude = None,
    leave_out: LeaveOut = None,
    clip: Clip = None,
    alpha: Alpha = None,
    color_map: ColorMap = None,
    interpolation: Interpolation = None,
    outlines: Outlines = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second. Default: the episode's.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Height of a view in pixels. Default: the camera's.")
    ] = None,
    frames: Annotated[str | None, typer.Option(help="Frames, as 0-99 or 0,5,10. Default: all.")] = None,
    prefix_query: Annotated[
        str | None,
        typer.Option(
            help="Show the language model's own attention, from this token: last, state, mean or a word."
        ),
    ] = None,
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
        exclude=exclude,
        leave_out=leave_out,
        clip=clip,
        alpha=alpha,
        colormap=color_map,
        interpolation=interpolation,
        outlines=outlines,
        fps=fps,
        size=size,
        frames=frames,
        prefix_query=prefix_query,
    )
    target = output or Path("overlay.gif" if gif else "overlay.mp4")
    if gif and target.suffix.lower() != ".gif":
        raise ConfigError(f"{target}: --gif writes a GIF, expected a name that ends in .gif")
    with progress_bar("Overlay") as progress:
        path = write_overlay(open_episode(episode), target, chosen, progress)
    print(f"Wrote {path}")


@app.command()
def verify(
    path: RunPath,
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
        bool, typer.Option("--repair", help="First drop what is damaged, and say what.")
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
    values (NaN), and cuts the episode where its tables are damaged.

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
        with progress_bar("Checking") as progress:
            report = verify_episode(found, thorough=chosen.thorough, progress=progress)
        reports.append(report)
        if not as_json:
            report.render(Console())
    if as_json:
        facts = [report.to_dict() for report in reports]
        print(json.dumps(facts[0] if single else facts, indent=2))
    for _, reason in () if repair else run.damaged:  # a repair has said so already
        print(f"error: {reason}", file=sys.stderr)
    has_maps = single and any(map(run[0].array_shape, ("suffix_attention", "suffix_attention_mean")))
    if sheet and single and reports[0].passed and not has_maps:
        print("No contact sheet: the episode was recorded without suffix attention", file=sys.stderr)
    elif sheet and single and reports[0].passed and all(camera.is_empty for camera in run[0].layout.cameras):
        print("No contact sheet: the episode's policy saw no camera image", file=sys.stderr)
    elif sheet and single:
        try:
            with status("Drawing the contact sheet"):
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
    a: Annotated[
        Any,
        typer.Argument(
            parser=place_of,
            metavar="A",
            help="Side A: an episode, a task's folder, or a run's output folder; or its URL.",
        ),
    ],
    b: Annotated[
        Any, typer.Argument(parser=place_of, metavar="[B]", help="Side B, likewise. Not with --by.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for figure, tables and video.")
    ] = Path("report"),
    by: Annotated[
        str | None,
        typer.Option(
            help="Split A instead of giving B: success, its failures against successes; condition, what was "
            "done to the policy against nothing; condition=NAME,NAME."
        ),
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
    exclude: Exclude = None,
    leave_out: LeaveOut = None,
    clip: Clip = None,
    align: Annotated[
        str | None, typer.Option(help="phase (fraction of the episode, default) or frame.")
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Of the intervals over episodes.")] = None,
    video: Annotated[
        bool | None, typer.Option("--video/--no-video", help="Write the video of two episodes side by side.")
    ] = None,
    scheduler: SchedulerAddress = None,
    workers: Workers = None,
    task: TaskText = None,
    success: Successes = None,
    condition: ConditionName = None,
    settings: SettingsFile = None,
) -> None:
    """Compare two episodes (success and failure, two prompts) or two groups, and write a report."""
    from lerobot_attn.analysis.compare import split_by_condition, split_by_success
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
        exclude=exclude,
        leave_out=leave_out,
        clip=clip,
        align=align,
        confidence=confidence,
        video=video,
    )
    what, _, names = (by or "").partition("=")
    if by is not None and (what not in ("success", "condition") or (names and what == "success")):
        raise ConfigError(f"--by: got {by!r}, expected success, condition, or condition=NAME,NAME")
    if (b is None) == (by is None):
        raise ConfigError("compare: expected two sides A and B, or one with --by success or --by condition")

    def side(path: Place) -> list[Episode]:
        return _whole_episodes(part_of(open_run(path), task, success, condition))

    if what == "success":
        split = split_by_success(side(a))
        sides = split.failures, split.successes
    elif what == "condition":
        sides = split_by_condition(side(a), names.split(",") if names else None)
    elif b is not None:
        sides = side(a), side(b)
    with chosen_workers(scheduler, workers) as computing, progress_bar("Comparing") as progress:
        files = write_report(*sides, output, chosen, progress, scheduler=computing)
    print("\n".join(f"Wrote {path}" for path in files))


def _whole_episodes(run: Run) -> list[Episode]:
    """Return a run's episodes, and say which ones cannot be opened."""
    for _, reason in run.damaged:
        print(f"left out: {reason}", file=sys.stderr)
    return list(run)


def _repair(path: Path, dry_run: bool, messages: TextIO) -> bool:
    """Repair the stores under a path and say what was dropped; return whether one could not be repaired."""
    from lerobot_attn.store.repair import repair

    with progress_bar("Repairing") as progress:
        repairs = repair(path, dry_run=dry_run, progress=progress)
    for store in repairs:
        is_refused = store.refused is not None
        for line in store.lines(done=not dry_run):
            print(f"error: {line}" if is_refused else line, file=sys.stderr if is_refused else messages)
    return any(store.refused is not None for store in repairs)
