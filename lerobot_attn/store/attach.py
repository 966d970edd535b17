"""Put masks that somebody else made into a finished episode's store.

    attached = attach_masks("….zarr", "masks", roles={"cup": "target"})

The arrays are written aside first; then one replacement of the group's metadata makes them exist, as a
recording's commit does. Whoever is interrupted before leaves the store as it was. Where older masks are
replaced, the store has none for the moment in which folders are renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from lerobot_attn.errors import ConfigError, StoreError, first_line
from lerobot_attn.masks import UNKNOWN, Instance, in_words, instances_of, scaled
from lerobot_attn.store.copies import COPIES, copies_of
from lerobot_attn.store.files import first_link, replace_json, unfinished
from lerobot_attn.store.location import is_packed, on_this_machine
from lerobot_attn.store.lock import LOCK, claim_folder
from lerobot_attn.store.mask_files import ReadMasks, read_masks
from lerobot_attn.store.reader import Episode, open_episode
from lerobot_attn.store.schema import BY_NAME, METADATA, coordinates_of_masks
from lerobot_attn.store.writer import Compression, create_array, extra_coordinates

_NAMES = ("segmentation", "instance_position", "mask_camera", "instance", "instance_role")


@dataclass(frozen=True)
class Attached:
    """What was put into a store.

    Attributes:
        path: the store.
        cameras: those that have masks.
        instances: what the masks show.
        n_inferences: inferences that have a mask of some camera.
        n_unused: masks of frames at which the policy was not asked; they are left out.
    """

    path: Path
    cameras: tuple[str, ...]
    instances: tuple[Instance, ...]
    n_inferences: int
    n_unused: int

    @property
    def in_words(self) -> str:
        """The instances by role, in one line."""
        return in_words(self.instances)


def attach_masks(
    path: str | Path,
    source: str | Path,
    *,
    roles: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Attached:
    """Put masks or boxes into an episode's store, at the frames at which the policy was asked.

    Args:
        path: the store's folder, `….zarr`.
        source: a folder of PNGs or a COCO file, as `lerobot_attn.store.mask_files` reads them.
        roles: instance → role; of others, "distractor".
        overwrite: replace masks that the store has already.

    Raises:
        StoreError: the store or the masks cannot be read, a recording goes on in its folder, it has masks
            already, or the disk is full.
        ConfigError: a camera, a size, a frame, or a role's name that does not fit the episode.
    """
    episode = open_episode(path)
    path = on_this_machine(episode.path, "a URL is read-only, so no masks are attached there")
    if is_packed(path):
        raise StoreError(f"{path}: is packed, expected a folder; unpack it (lerobot-attn unpack) first")
    with ExitStack() as stack:
        folder = path.resolve().parent.parent
        if (folder / LOCK).exists():
            stack.enter_context(claim_folder(folder, "attach masks when it has ended"))
        if episode.array_shape("segmentation") is not None and not overwrite:
            raise StoreError(f"{path}: has masks already, expected none; replace them with --overwrite")
        link = first_link(path)
        if link is not None:
            raise StoreError(f"{path}: {link.relative_to(path)} is a link, expected plain files")
        sizes_px = {
            camera.name: (camera.geometry.height_px, camera.geometry.width_px)
            for camera in episode.layout.cameras
            if camera.geometry is not None
        }
        read = read_masks(source, sizes_px)
        instances = instances_of(read.names, roles or {}, where="roles")
        frames = np.asarray(episode.arrays["inference_frame"].values)
        masks = _at_inferences(episode, read, frames, sizes_px, source)
        try:
            _write(path, masks, list(read.masks), instances, read.source)
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(
                f"{path}: the masks could not be written ({error.strerror or first_line(error)}), expected a "
                "disk with room that can be written; the store still opens"
            ) from error
    used = {int(frame) for frame in frames}
    return Attached(
        path,
        tuple(read.masks),
        instances,
        int((masks != UNKNOWN).any(axis=(1, 2, 3)).sum()),
        sum(frame not in used for by_frame in read.masks.values() for frame in by_frame),
    )


def _at_inferences(
    episode: Episode,
    read: ReadMasks,
    frames: NDArray[np.integer[Any]],
    sizes_px: Mapping[str, tuple[int, int]],
    source: str | Path,
) -> NDArray[np.int16]:
    """Return (inference, mask_camera, mask_y, mask_x) int16; `UNKNOWN` where there is no mask."""
    for camera, by_frame in read.masks.items():
        late = [frame for frame in sorted(by_frame) if frame >= episode.n_frames]
        if late:
            raise ConfigError(
                f"{source}: got a mask of {camera} at frame {late[0]}, expected frames 0 to "
                f"{episode.n_frames - 1}, which the episode has"
            )
    used = {int(frame) for frame in frames}
    if not any(frame in used for by_frame in read.masks.values() for frame in by_frame):
        some = ", ".join(map(str, sorted(used)[:8])) + ", …" * (len(used) > 8)
        raise ConfigError(
            f"{source}: got no mask of a frame at which the policy was asked, expected some of {some}"
        )
    size_px = tuple(max(sizes_px[camera][axis] for camera in read.masks) for axis in (0, 1))
    masks = np.full((len(frames), len(read.masks), *size_px), UNKNOWN, np.int16)
    for number, by_frame in enumerate(read.masks.values()):
        for inference, frame in enumerate(frames):
            if int(frame) in by_frame:
                masks[inference, number] = scaled(by_frame[int(frame)], (size_px[0], size_px[1]))
    return masks


def _write(
    path: Path, masks: NDArray[np.int16], cameras: list[str], instances: tuple[Instance, ...], source: str
) -> None:
    new = path / unfinished("masks")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    values: dict[str, NDArray[Any]] = {"segmentation": masks, **coordinates_of_masks(cameras, instances)}
    sizes = dict(zip(BY_NAME["segmentation"].dims[1:], masks.shape[1:], strict=True))
    sizes["instance"] = len(instances)
    try:
        group = zarr.create_group(LocalStore(new), zarr_format=3)
        described = {}
        for name, rows in values.items():
            array = create_array(group, BY_NAME[name], sizes, Compression(), n_rows=len(masks))
            array[...] = rows
            described[name] = json.loads((new / name / METADATA).read_text(encoding="utf-8"))
        document = json.loads((path / METADATA).read_text(encoding="utf-8"))
        attributes, consolidated = document["attributes"], document["consolidated_metadata"]
        arrays = consolidated["metadata"]
        consolidated.pop(COPIES, None)  # some are of arrays that go
        if any(name in arrays for name in _NAMES):
            for name in _NAMES:
                arrays.pop(name, None)
            attributes.pop("segmentation", None)
            attributes["coordinates"] = " ".join(extra_coordinates(arrays))
            replace_json(path / METADATA, document, durable=True)
        for name in _NAMES:
            shutil.rmtree(path / name, ignore_errors=True)
        for name in values:
            (new / name).replace(path / name)
        arrays |= described
        attributes["segmentation"] = {"source": source}
        attributes["coordinates"] = " ".join(extra_coordinates(arrays))
        consolidated[COPIES] = copies_of(path, arrays)
        replace_json(path / METADATA, document, durable=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
