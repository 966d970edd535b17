"""Training frames: what one holds, and shards of them on the disk.

A shard is one `.npz` file that is either whole or absent. Its content follows from its name and the seed, so
an interrupted generation goes on where it was. Knows nothing of simulators or policies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.errors import SetupError

Array = NDArray[Any]

# name → (dtype, meaning); each array's first dimension counts frames. Objects are numbered as in
# scene.OBJECTS.
FIELDS = {
    "images": (np.uint8, "(2, 224, 224, 3): agent view and wrist, upright"),
    "patches": (np.uint8, "(2, 16, 16, classes): share of a patch that shows a class, 255 is all of it"),
    "state": (np.float32, "(8,): position, axis-angle, two fingers, as LeRobot gives them"),
    "positions": (np.float32, "(11, 3): objects and the basket, metres; NaN where not in the scene"),
    "actions": (np.float16, "(10, 50, 7): the teacher's next actions were this object named"),
    "known": (np.uint8, "(10,): how many of these actions count; 0 where the object cannot be asked for"),
    "stage": (np.uint8, "(): what the teacher is doing with `target`, an expert.Stage"),
    "target": (np.uint8, "(): the object that the teacher fetches"),
}


def write_shard(path: Path, frames: Sequence[dict[str, Any]]) -> None:
    """Write frames as one shard; there is no moment at which it is half there."""
    arrays = {
        name: np.stack([np.asarray(frame[name], dtype) for frame in frames])
        for name, (dtype, _) in FIELDS.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        np.savez(file, **arrays)
    unfinished.replace(path)


def read_shards(paths: Iterable[Path]) -> dict[str, Array]:
    """Return the frames of several shards, name → array as in `FIELDS`, in the order of the paths.

    Raises:
        SetupError: A shard cannot be read, or there is none.
    """
    parts: dict[str, list[Array]] = {name: [] for name in FIELDS}
    for path in paths:
        with contextlib.ExitStack() as stack:
            try:
                shard = stack.enter_context(np.load(path))
                loaded = {name: shard[name] for name in FIELDS}
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                raise SetupError(
                    f"cannot read the training frames of {path}: got {error}, expected a whole shard; "
                    "delete the file, and it will be made again"
                ) from error
        for name, array in loaded.items():
            parts[name].append(array)
    if not parts["state"]:
        raise SetupError("found no training frames: got no shard, expected some; generate them first")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
