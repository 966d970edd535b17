"""Commands that ask a policy: replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import log_lines, progress_bar
from lerobot_attn.cli.options import DataSetEpisodes, PolicyPath, whole_numbers
from lerobot_attn.errors import ConfigError


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def replay(
    context: typer.Context,
    policy_path: PolicyPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to record into.")],
    dataset: Annotated[
        str | None, typer.Option(metavar="REPO_OR_ROOT", help="A LeRobotDataset: its folder or its name.")
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CAMERA=FILE", help="A camera's MP4, instead of a data set; once for each camera."
        ),
    ] = None,
    episodes: DataSetEpisodes = None,
    every: Annotated[
        str | None,
        typer.Option(
            help="Ask at frames 0, N, 2N, …; chunk: at every chunk's start (n_action_steps), the default."
        ),
    ] = None,
    rename: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Names of the data set → the policy's, as '{\"observation.images.front\": …}'.",
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The instruction; with a data set, instead of its own.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="The robot's state beside videos: an .npy, (frame, state_dim).")
    ] = None,
    frames: Annotated[
        str | None, typer.Option(help="Frames of the videos, as 0,10,20: those alone. Default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Frames that the policy is asked about at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the noise that inferences start from.")] = 0,
    interventions: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="YAML of what is done to the policy (docs/interventions.md)."),
    ] = None,
) -> None:
    """Ask a policy about recorded observations, and record what it attends to.

    What to record and how is said with --attention.layers=all, --attention.existing=skip, … as
    --eval.attention.* does for lerobot-eval, or --attention=FILE.yaml.
    """
    with log_lines():
        from lerobot_attn.plugin.replay import ReplayRequest
        from lerobot_attn.plugin.replay import replay as run

        request = ReplayRequest(
            policy_path=policy_path,
            output=output,
            dataset=dataset,
            videos=video or (),
            task=task,
            state=state,
            frames=whole_numbers("--frames", frames),
            episodes=whole_numbers("--episodes", episodes),
            every=_every(every),
            rename=rename,
            batch_size=batch_size,
            seed=seed,
            interventions=interventions,
            options=context.args,
        )
        with progress_bar("Replaying") as progress:
            run(request, progress)
    print(f"Look at it with: lerobot-attn view {output}")


def _every(text: str | None) -> int | str | None:
    if text is None or text == "chunk":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--every: got {text!r}, expected a whole number, or chunk") from None
