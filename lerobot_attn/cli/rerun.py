"""The command that writes for Rerun: export-rerun."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import progress_bar
from lerobot_attn.cli.options import (
    Alpha,
    Clip,
    ColorMap,
    Exclude,
    Head,
    Interpolation,
    Layer,
    Normalisation,
    Query,
    SettingsFile,
    Step,
)
from lerobot_attn.errors import ConfigError


@app.command()
def export_rerun(
    path: Annotated[
        Path, typer.Argument(help="An episode's store, ….zarr; with --follow a run's output folder, too.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="RRD file. Default: the episode's name.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Send episodes to a Rerun viewer instead, as they are recorded.")
    ] = False,
    connect: Annotated[
        str | None,
        typer.Option(help="With --follow: the viewer's address. Default: rerun+http://127.0.0.1:9876/proxy"),
    ] = None,
    camera: Annotated[str | None, typer.Option(help="Camera, by the end of its name. Default: all.")] = None,
    layer: Layer = None,
    denoise_step: Step = None,
    head: Head = None,
    query: Query = None,
    normalisation: Normalisation = None,
    exclude: Exclude = None,
    clip: Clip = None,
    alpha: Alpha = None,
    color_map: ColorMap = None,
    interpolation: Interpolation = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of the timeline. Default: the episode's.")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(help="Quality of the pictures as JPEG, 1 to 95. Default: 85.")
    ] = None,
    settings: SettingsFile = None,
    application: Annotated[str | None, typer.Option(hidden=True)] = None,
    recording_id: Annotated[str | None, typer.Option(hidden=True)] = None,
    since: Annotated[float | None, typer.Option(hidden=True)] = None,
) -> None:
    """Write an episode for Rerun: pictures, heatmaps, shares, words, state and actions, with a blueprint.

    Needs the extra `rerun`. Timelines are `frame` and `time`.
    """
    from lerobot_attn.overlay import RerunSettings
    from lerobot_attn.overlay import export_rerun as write
    from lerobot_attn.overlay.live import VIEWER, RerunSession, follow_rerun
    from lerobot_attn.settings import load_settings
    from lerobot_attn.store.reader import open_episode

    chosen = load_settings(
        RerunSettings,
        settings,
        camera=camera,
        layer=layer,
        denoise_step=denoise_step,
        head=head,
        query=query,
        normalisation=normalisation,
        exclude=exclude,
        clip=clip,
        alpha=alpha,
        colormap=color_map,
        interpolation=interpolation,
        fps=fps,
        quality=quality,
    )
    if follow:
        if output is not None:
            raise ConfigError(f"--output {output}: --follow sends to a viewer, expected one of the two")
        joined = None
        if application is not None and recording_id is not None:
            joined = RerunSession(application, recording_id)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        if (
            since is not None
        ):  # a recording started this, and says by a line, or by being gone, that it is over

            def wait_for_the_recording() -> None:
                sys.stdin.buffer.readline()
                stop.set()

            threading.Thread(target=wait_for_the_recording, daemon=True).start()
        follow_rerun(
            path,
            chosen,
            url=connect or VIEWER,
            session=joined,
            since_s=since or 0.0,
            stopped=stop.is_set,
            say=lambda line: print(line, flush=True),
        )
        return
    if connect is not None:
        raise ConfigError(f"--connect {connect}: goes with --follow, expected both or neither")
    episode = open_episode(path)
    with progress_bar("Exporting") as progress:
        written = write(episode, output or Path(f"{episode.bare_name}.rrd"), chosen, progress)
    print(f"Wrote {written}")
