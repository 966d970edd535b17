"""What a store says of itself: the group's attributes and the shapes of its arrays, from one small file.

    said = read_header("….zarr")
    said.attributes["task"], said.n_frames, said.is_complete

Knows the group's `zarr.json`. Opens no array, so whatever records may use it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lerobot_attn.errors import StoreError, first_line
from lerobot_attn.store.location import Files, files_at, is_packed, refuse_both_forms
from lerobot_attn.store.packed import HELP as PACKED_HELP
from lerobot_attn.store.schema import ARRAYS, EPISODE_SUFFIX, METADATA, SCHEMA_NAME, SCHEMA_VERSION
from lerobot_attn.store.trust import check_attributes, checked_shapes, shortened, shown
from lerobot_attn.store.url import Place, Url, place_of

_MAX_BYTES = 16_000_000
HELP = "expected an episode store written by `lerobot-eval --eval.save_attention_maps=true`"


class NothingYetError(StoreError):
    """A recording has made the store and has not committed anything yet."""


class RecordedCondition(NamedTuple):
    """What was done to the policy in an episode.

    Attributes:
        name: of the condition; "baseline" where nothing was done and no name was given.
        text: the same for people, one line, to be said beside the maps; "" where nothing was done.
        interventions: each as plain values, as a condition's file has them.
    """

    name: str = "baseline"
    text: str = ""
    interventions: tuple[dict[str, Any], ...] = ()

    @property
    def line(self) -> str:
        """The line that stands beside maps; "" where nothing was done."""
        return f"condition: {self.text}" if self.text else ""


@dataclass(frozen=True)
class Header:
    """What a store says of itself.

    Attributes:
        attributes: the group's attributes.
        shapes: array name → shape.
    """

    attributes: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def is_complete(self) -> bool:
        """Whether the episode was recorded to its end."""
        return self.attributes.get("complete") is True

    @property
    def n_inferences(self) -> int:
        """Number of inferences that are there."""
        return self.shapes["inference_frame"][0]

    @property
    def n_frames(self) -> int:
        """Number of frames that are there."""
        return self.shapes["frame_inference"][0]

    @property
    def task(self) -> str:
        """The instruction."""
        return str(self.attributes.get("task", ""))

    @property
    def success(self) -> bool | None:
        """Whether the task was solved; None if the episode was interrupted."""
        success = self.attributes.get("success")
        return success if isinstance(success, bool) else None

    @property
    def seed(self) -> int | None:
        """The environment's seed; None if it had none."""
        seed = self.attributes.get("seed")
        return seed if type(seed) is int else None

    @property
    def created(self) -> str | None:
        """When the recording began, ISO 8601; None where the store does not say it."""
        created = self.attributes.get("created")
        return created if isinstance(created, str) else None

    @property
    def first_video(self) -> tuple[str | None, str | None]:
        """The first camera of which the store lists a video, and that video's file beside the store.

        The camera is "" where the store lists no video, and None where it has no such list. The file is None
        where the video is a part of another file. Whether the file exists, nobody has looked.
        """
        listed = self.attributes.get("videos")
        if not isinstance(listed, dict):
            return None, None
        camera, video = next(iter(listed.items()), ("", None))
        path = video.get("path") if isinstance(video, dict) and video.get("reference") is not True else None
        return camera, path if isinstance(path, str) else None

    @property
    def has_random_weights(self) -> bool:
        """Whether the policy was a demo whose maps mean nothing."""
        return bool(self.attributes.get("policy", {}).get("random_weights"))

    @property
    def policy_remark(self) -> str:
        """One line on the policy that belongs beside its maps; "" if none, or if the weights are random."""
        remark = self.attributes.get("policy", {}).get("remark")
        return "" if self.has_random_weights or not isinstance(remark, str) else " ".join(remark.split())

    @property
    def condition(self) -> RecordedCondition:
        """What was done to the policy: the interventions, whose text belongs beside the maps."""
        said = self.attributes.get("condition")
        if not isinstance(said, dict):
            return RecordedCondition()
        done = tuple(said.get("interventions", ()))
        text = " ".join(said.get("text", "").split()) if done else ""
        return RecordedCondition(said["name"], text, done)

    def raw_bytes(self) -> int:
        """Return the size of the maps before compression, bytes."""
        maps = [self.shapes[spec.name] for spec in ARRAYS if spec.is_map and spec.name in self.shapes]
        return sum(2 * math.prod(shape) for shape in maps)


def is_store(folder: Path) -> bool:
    """Return whether a path is a Zarr v3 store, whatever its name, or a packed one; reads nothing."""
    return (folder / METADATA).is_file() or is_packed(folder)


def read_attributes(path: str | Place) -> dict[str, Any]:
    """Return what a store's group says of the episode.

    Raises:
        StoreError: as of `read_header`.
    """
    return read_header(path).attributes


def read_header(path: str | Place) -> Header:
    """Read and check what a store says of itself.

    Args:
        path: the store's folder, or its file where it is packed; a URL of either.

    Raises:
        StoreError: nothing there, something else, damaged metadata, a newer schema, a recording that has not
            committed anything yet, or an episode that is there packed and unpacked.
    """
    place = place_of(path)
    files = files_at(place, anew=True) if isinstance(place, Url) else _local_files(place)
    try:
        text = files.read_start(METADATA, _MAX_BYTES + 1)
    except FileNotFoundError as error:
        where = "; is the address right?" if isinstance(place, Url) else ""
        raise StoreError(f"{place}: no such store, or no Zarr v3 store; {HELP}{where}") from error
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{place}: its {METADATA} is damaged: {shortened(first_line(error))}") from error
    if len(text) > _MAX_BYTES:
        raise StoreError(f"{place}: its metadata is larger than {_MAX_BYTES} bytes: damaged, or no episode")
    try:
        document = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number too long
        raise StoreError(f"{place}: its {METADATA} is damaged: {shortened(first_line(error))}") from error
    return _header(place, document)


def _local_files(path: Path) -> Files:
    """Return the files of a store on this machine.

    Raises:
        StoreError: nothing there, or something else.
    """
    if not path.exists():
        raise StoreError(f"{path}: no such store; {HELP}")
    packed = is_packed(path)
    if not packed and not path.is_dir():
        raise StoreError(f"{path}: is a {path.suffix or 'plain'} file, {HELP}")
    refuse_both_forms(path)
    try:
        files = files_at(path)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {first_line(error)}") from error
    if files.holds(METADATA):
        return files
    if packed:
        raise StoreError(f"{path}: holds no {METADATA} at its top, {PACKED_HELP}")
    if (path / "meta" / "info.json").is_file():
        raise StoreError(f"{path}: is a LeRobot dataset, {HELP}, or by `lerobot-attn replay` of it")
    stores = next(path.rglob(f"*{EPISODE_SUFFIX}/{METADATA}"), None)
    hint = f"; it holds stores, e.g. {stores.parent.relative_to(path)}: use open_run()" if stores else ""
    raise StoreError(f"{path}: is no Zarr v3 store, {HELP}{hint}")


def _header(path: Place, document: Any) -> Header:
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or attributes.get("schema") != SCHEMA_NAME:
        raise StoreError(f"{path}: is a Zarr store of another kind, {HELP}")
    version = attributes.get("schema_version")
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise StoreError(
            f"{path}: schema version {shown(version)}, expected at most {SCHEMA_VERSION}; upgrade "
            "lerobot_policy_attn to read it"
        )
    if "n_inferences" not in attributes and "consolidated_metadata" not in document:
        raise NothingYetError(
            f"{path}: holds nothing yet: its recording has only just begun, or was ended as it began; "
            "expected a first commit; try again in a moment"
        )
    check_attributes(path, attributes)
    return Header(attributes, checked_shapes(path, document))
