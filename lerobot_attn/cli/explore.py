"""Commands of the explorer: view, export-html."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import progress_bar
from lerobot_attn.cli.options import (
    ConditionName,
    EpisodePath,
    RunPath,
    SettingsFile,
    Successes,
    TaskText,
    part_of,
)

if TYPE_CHECKING:
    from lerobot_attn.store.url import Place

NeuronsFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.csv",
        help="Found neurons: a table with columns stream, layer, unit, the best first, as lerobot-attn "
        "neurons writes; of words, a set a word. Beside those that the episode's condition fires.",
    ),
]
NeuronsTop = Annotated[
    int | None,
    typer.Option(min=1, help="Units of each set in --neurons, from the first row on. Default: 20."),
]


@app.command()
def view(
    path: RunPath,
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
    wait: Annotated[
        bool, typer.Option("--wait", help="Where nothing is recorded yet, wait for the first episode.")
    ] = False,
    neurons: NeuronsFile = None,
    top: NeuronsTop = None,
    task: TaskText = None,
    success: Successes = None,
    condition: ConditionName = None,
) -> None:
    """Serve recordings to the browser, live while they grow, until Ctrl-C.

    All of a run is served. With --task, --success, --failure or --condition the page opens with its table
    filtered so; its address says the filters, and they can be changed and cleared there.
    """
    from lerobot_attn.explorer.server import serve

    serve(
        path,
        host=host,
        port=port,
        open_browser=browser,
        allow_hosts=allow_host or (),
        base_path=base_path,
        wait=wait,
        neurons=neurons,
        filters=_filters(path, task, success, condition, wait=wait),
        **({} if top is None else {"top": top}),
    )


def _filters(
    path: Place, task: str | None, success: bool | None, condition: str | None, *, wait: bool
) -> dict[str, str]:
    """Return the same filters as the page's address has them.

    Raises:
        StoreError: no episode at the path, and nobody waits for one.
        SelectionError: no episode is so.
    """
    from lerobot_attn.store.runs import open_run, task_name

    filters = {} if success is None else {"show": "success" if success else "failure"}
    filters |= {} if condition is None else {"condition": condition}
    if task is not None:
        filters["find"] = task
    if wait or not filters:  # what fits may be recorded only now
        return filters
    rows = part_of(open_run(path), task, success, condition).rows()
    instructions = {row.table.task for row in rows}
    # Words of an instruction might find others, too.
    if task is not None and len(instructions) == 1 and task not in {task_name(row.table) for row in rows}:
        del filters["find"]
        filters["task"] = instructions.pop()
    return filters


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
    neurons: NeuronsFile = None,
    top: NeuronsTop = None,
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
        neurons=None if neurons is None else str(neurons),
        top=top,
    )
    found = open_episode(episode)
    path = output or Path(f"{found.bare_name}.html")
    with progress_bar("Reading") as progress:
        written = write(
            found,
            path,
            chosen,
            progress=progress,
            announce=lambda contents: print(f"{path}: {contents}, at most {chosen.max_mb:g} MB"),
        )
    print(f"Wrote {written}")
