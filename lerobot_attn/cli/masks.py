"""The command that puts masks into a store: masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from lerobot_attn.cli.app import app
from lerobot_attn.errors import ConfigError


@app.command()
def masks(
    path: Annotated[Path, typer.Argument(help="An episode's store, ….zarr.")],
    source: Annotated[
        Path,
        typer.Option(
            "--from",
            metavar="FOLDER|COCO.json",
            help="CAMERA/frame_00012.png of instance numbers with names.json, or a COCO file.",
        ),
    ],
    roles: Annotated[
        str | None,
        typer.Option(help="Instances and their roles, as {cup: target, tray: destination}."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the masks that the store has.")] = False,
) -> None:
    """Attach masks or boxes that somebody else made to a finished episode, at the policy's inferences.

    Roles are target, destination, distractor, robot and background; what is not named is a distractor. Frames
    count from 0, as in the camera videos.
    """
    from lerobot_attn.store.attach import attach_masks

    attached = attach_masks(path, source, roles=_roles(roles), overwrite=overwrite)
    unused = f"; {attached.n_unused} of other frames left out" if attached.n_unused else ""
    cameras = ", ".join(attached.cameras)
    print(f"{attached.path}: masks of {cameras} at {attached.n_inferences} inferences{unused}")
    print(attached.in_words)


def _roles(text: str | None) -> dict[str, str]:
    try:
        found = yaml.safe_load(text) if text else {}
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ConfigError(f"--roles: got {text!r}, expected instances and roles as {{cup: target}}")
    return {str(name): role for name, role in found.items()}
