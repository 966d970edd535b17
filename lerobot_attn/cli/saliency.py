"""The command that asks whether attention predicts what matters, frame by frame: saliency."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer

from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import log_lines, progress_bar
from lerobot_attn.cli.options import DataSetEpisodes, PolicyPath, whole_numbers
from lerobot_attn.errors import ConfigError
from lerobot_attn.settings import parse_choice


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def saliency(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="EPISODE|DATASET",
            help="An episode's store with its camera videos, or a LeRobotDataset: its folder or its name.",
        ),
    ],
    policy_path: PolicyPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")],
    frames: Annotated[
        str | None,
        typer.Option(help="Frames, as 0,10,20 or 0-9. Default: those at which the policy was asked anew."),
    ] = None,
    max_frames: Annotated[
        int, typer.Option(help="Frames at most, evenly spread, where --frames does not say them.")
    ] = 16,
    episodes: DataSetEpisodes = None,
    n_masks: Annotated[int, typer.Option(help="Random masks a frame; more are less noisy.")] = 256,
    hidden_share: Annotated[
        float, typer.Option(help="Share of the patches that a mask hides, up to 0.5.")
    ] = 0.0625,
    fill: Annotated[str, typer.Option(help="What hidden patches show: mean (colour) or blur.")] = "mean",
    layers: Annotated[str, typer.Option(help="Layers, as all, -1 or 0,3.")] = "all",
    curve_layers: Annotated[
        str,
        typer.Option(
            help="Layers whose maps rank patches for the deletion and insertion curves, as mean (of "
            "--layers) or 0,3; each takes about as many questions as 100 masks."
        ),
    ] = "mean",
    n_draws: Annotated[int, typer.Option(help="Draws of the random and of the shifted rankings.")] = 3,
    rename: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Names of the data set → the policy's, as '{\"observation.images.front\": …}'.",
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="The instruction, instead of the recorded one.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures that the policy is asked about at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of masks, noise and draws.")] = 0,
    shuffled: Annotated[
        int,
        typer.Option(
            help="Ask the same of so many copies of the policy with shuffled weights, which have learned "
            "nothing, and compare; 0, or at least 2. Each takes as long as the policy itself."
        ),
    ] = 0,
) -> None:
    """Ask whether attention predicts what matters: hide patches and see how the action changes.

    At each frame random masks give each patch's importance (RISE); beside it stand the attention of each
    layer and head, their rank correlation, and deletion and insertion curves against random ones. Nothing is
    rolled out. Writes report.md and report.html, saliency.csv, saliency.npz and figures.
    """
    with log_lines():
        from lerobot_attn.plugin.saliency import SaliencyRequest
        from lerobot_attn.plugin.saliency import saliency as run
        from lerobot_attn.report.saliency import write_saliency

        chosen, footage = whole_numbers("--frames", frames), cast("str | dict[str, Any]", source)
        wanted = whole_numbers("--episodes", episodes)
        if (Path(source) / "zarr.json").is_file():
            if wanted is not None:
                raise ConfigError("--episodes: got numbers beside one episode's store; leave it out")
            footage, chosen = _of_episode(Path(source), chosen, max_frames)
        request = SaliencyRequest(
            policy_path,
            footage,
            context.args,
            rename,
            {
                "episodes": wanted,
                "frames": chosen,
                "max_frames": max_frames,
                "task": task,
                "layers": layers if layers == "all" else _choices(layers),
                "curve_layers": [layer for part in curve_layers.split(",") for layer in _choices(part)],
                "n_masks": n_masks,
                "hidden_share": hidden_share,
                "fill": fill,
                "n_draws": n_draws,
                "batch_size": batch_size,
                "seed": seed,
                "n_shuffled": shuffled,
            },
        )
        with progress_bar("Asking") as progress:
            found = run(request, progress)
        write_saliency(found, output)
    print(f"Look at it: {output / 'report.html'}")


def _choices(text: str) -> list[Any]:
    choice = parse_choice(text.strip())
    return choice if isinstance(choice, list) else [choice]


def _of_episode(path: Path, frames: list[int] | None, max_frames: int) -> tuple[dict[str, Any], list[int]]:
    """Return an episode's camera videos as the arguments of `VideoFrames`, and the frames to look at.

    Raises:
        ConfigError: it has no videos, they are shorter than the store, or no inference.
    """
    from lerobot_attn.plugin.saliency import spread
    from lerobot_attn.store.reader import open_episode

    episode = open_episode(path)
    if not episode.videos:
        cameras = [camera.name for camera in episode.layout.cameras if not camera.is_empty]
        why = episode.why_no_video(cameras[0]) if cameras else "its policy saw no camera image"
        raise ConfigError(f"{path}: has no camera videos to ask about: {why}")
    data = episode.arrays
    state = np.asarray(data["state"].values) if "state" in data else None
    sizes = {camera: episode.image_size_px(camera) for camera in episode.videos}
    footage = {
        "videos": episode.videos,
        "task": episode.task,
        "state": state,
        "sizes_px": {camera: size for camera, size in sizes.items() if size is not None},
    }
    if frames is not None:
        return footage, frames
    asked = np.unique(data["inference_frame"].values).tolist()
    return footage, spread([frame for frame in asked if frame < episode.n_frames], max_frames)
