"""Masks and boxes that somebody else made: a folder of PNGs, or a COCO file. Knows no store.

    masks = read_masks("masks", cameras)        # {"front": {12: (height, width) int16, …}, …}

A folder holds `CAMERA/frame_00012.png`, whose pixels are the instances' numbers (grey or palette, 8 or 16
bits), and `names.json`: the instances' names, a list or {"1": "cup"}; 0 is the background. A COCO file
(https://cocodataset.org/#format-data) holds polygons, RLE or boxes; an instance is a category, and an image's
`file_name` says camera and frame: `CAMERA/frame_00012.png` or `CAMERA_00012.jpg`. A polygon or box has the
pixels whose centres lie in it; where annotations overlap, the later one in the file is on top.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.errors import ConfigError, StoreError, first_line

BACKGROUND = "background"
_MOST_INSTANCES = np.iinfo(np.int16).max
_FRAME = re.compile(r"(?P<before>.*?)(?P<frame>\d+)$", re.DOTALL)
_BETWEEN = re.compile(
    r"[_\-. ]+(frame)?[_\-. ]*$|^frame[_\-. ]*$"
)  # what may stand between camera and number


@dataclass(frozen=True)
class ReadMasks:
    """What a folder or file of masks holds.

    Attributes:
        source: "files" or "coco".
        names: of the instances; 0 is the background.
        masks: camera, as the store names it → frame → (height, width) int16, an index into `names`.
    """

    source: str
    names: tuple[str, ...]
    masks: Mapping[str, Mapping[int, NDArray[np.int16]]]


def read_masks(source: str | Path, cameras: Mapping[str, tuple[int, int]]) -> ReadMasks:
    """Read masks, and check that they fit an episode's cameras.

    Args:
        source: a folder of PNGs, or a COCO file, `….json`.
        cameras: the store's name of a camera → (height, width) of its images, pixels. Masks may use the last
            part of the name alone.

    Raises:
        StoreError: nothing is there, or it cannot be read.
        ConfigError: a camera that the episode does not have, an image of another size, a number without a
            name, or no mask at all.
    """
    source = Path(source)
    short = {name.rpartition(".")[2]: name for name in cameras}
    known = {**(short if len(short) == len(cameras) else {}), **{name: name for name in cameras}}
    if source.is_dir():
        read = _read_folder(source, known, cameras)
    elif source.is_file():
        read = _read_coco(source, known, cameras)
    else:
        raise StoreError(f"{source}: no such file or folder; expected a folder of PNGs, or a COCO file")
    if not any(read.masks.values()):
        raise ConfigError(f"{source}: got no mask, expected some: {_layout_of(source)}")
    return read


def _layout_of(source: Path) -> str:
    if source.is_dir():
        return "CAMERA/frame_00012.png and names.json"
    return 'images with a file_name such as "CAMERA/frame_00012.png", and annotations'


def _read_folder(folder: Path, known: Mapping[str, str], cameras: Mapping[str, tuple[int, int]]) -> ReadMasks:
    from PIL import Image

    names = _names(folder / "names.json")
    masks: dict[str, dict[int, NDArray[np.int16]]] = {}
    for file in sorted(folder.rglob("*.png")):
        camera, frame = _place(file, file.relative_to(folder).as_posix(), known)
        try:
            with Image.open(file) as image:
                if image.mode not in ("L", "P", "1", "I", "I;16"):
                    raise ConfigError(
                        f"{file}: got pixels of {image.mode}, expected one number a pixel (grey or palette)"
                    )
                _check_size(file, (image.height, image.width), camera, cameras)
                values = np.asarray(image).astype(np.int64)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise StoreError(f"{file}: cannot be read as an image: {first_line(error)}") from error
        if values.min() < 0 or values.max() >= len(names):
            odd = values.max() if values.max() >= len(names) else values.min()
            raise ConfigError(
                f"{file}: got the number {odd}, expected 0 to {len(names) - 1}, which names.json names"
            )
        masks.setdefault(camera, {})[frame] = _cropped(values.astype(np.int16), cameras[camera])
    return ReadMasks("files", names, masks)


def _names(file: Path) -> tuple[str, ...]:
    values = _read_json(file)
    if isinstance(values, list):
        values = {str(number): name for number, name in enumerate(values)}
    expected = 'expected a list of names, or {"1": "cup", …} with the background as 0'
    if not isinstance(values, dict) or not all(isinstance(name, str) and name for name in values.values()):
        raise ConfigError(f"{file}: got no names, {expected}")
    if not all(number.isdecimal() and int(number) <= _MOST_INSTANCES for number in values):
        raise ConfigError(f"{file}: got a number that is none, {expected}")
    by_number = {0: BACKGROUND, **{int(number): name for number, name in values.items()}}
    names = tuple(by_number.get(number, f"unnamed_{number}") for number in range(max(by_number) + 1))
    return _distinct(file, names)


def _distinct(file: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise ConfigError(f"{file}: got {twice[0]!r} twice, expected each name once")
    return names


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{file}: cannot be read ({error.strerror or first_line(error)})") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file}: is no JSON: {first_line(error)}") from error


def _place(source: Path, file_name: str, known: Mapping[str, str]) -> tuple[str, int]:
    """Return camera and frame that a file's name says.

    Raises:
        ConfigError: it says none.
    """
    path = Path(file_name)
    found = _FRAME.fullmatch(path.stem)
    folder = path.parent.name
    if found is not None:
        before = _BETWEEN.sub("", found["before"])
        for name in (folder, before):
            if name in known and len(found["frame"]) < 10:
                return known[name], int(found["frame"])
    raise ConfigError(
        f"{source}: {file_name!r} does not say camera and frame, expected e.g. CAMERA/frame_00012.png, with "
        f"one of the cameras {', '.join(known)}"
    )


def _check_size(
    where: object, size_px: tuple[int, int], camera: str, cameras: Mapping[str, tuple[int, int]]
) -> None:
    height, width = cameras[camera]
    if size_px not in ((height, width), (height + height % 2, width + width % 2)):
        raise ConfigError(
            f"{where}: got {size_px[0]} x {size_px[1]} pixels (height x width), expected {height} x {width} "
            f"as the images of {camera}"
        )


def _cropped(mask: NDArray[np.int16], size_px: tuple[int, int]) -> NDArray[np.int16]:
    """Leave out the row and column by which a video is larger than an image of odd size."""
    return mask[: size_px[0], : size_px[1]]


# COCO


def _read_coco(file: Path, known: Mapping[str, str], cameras: Mapping[str, tuple[int, int]]) -> ReadMasks:
    document = _read_json(file)
    images, annotations, categories = (_records(file, document, name) for name in _COCO)
    names = _distinct(file, (BACKGROUND, *(str(one["name"]) for one in categories)))
    numbers = {one["id"]: number for number, one in enumerate(categories, 1)}
    masks: dict[str, dict[int, NDArray[np.int16]]] = {}
    by_image: dict[Any, NDArray[np.int16]] = {}
    for image in images:
        camera, frame = _place(file, str(image["file_name"]), known)
        size_px = (image["height"], image["width"])
        _check_size(f"{file}, {image['file_name']}", size_px, camera, cameras)
        by_image[image["id"]] = np.zeros(size_px, np.int16)
        masks.setdefault(camera, {})[frame] = _cropped(by_image[image["id"]], cameras[camera])  # a view
    for position, annotation in enumerate(annotations):
        where = f"{file}, annotation {annotation.get('id', position)}"
        if annotation["image_id"] not in by_image or annotation["category_id"] not in numbers:
            raise ConfigError(f"{where}: is of an image or category that the file does not have")
        mask = by_image[annotation["image_id"]]
        mask[_shape_of(where, annotation, (mask.shape[0], mask.shape[1]))] = numbers[
            annotation["category_id"]
        ]
    return ReadMasks("coco", names, masks)


# What is needed of each record, and of what type.
_COCO: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": str, "height": int, "width": int},
    "annotations": {"image_id": (int, str), "category_id": (int, str)},
    "categories": {"id": (int, str), "name": str},
}


def _records(file: Path, document: Any, name: str) -> list[dict[str, Any]]:
    records = document.get(name) if isinstance(document, dict) else None
    if not isinstance(records, list):
        raise ConfigError(f"{file}: got no list {name!r}, expected COCO's images, annotations and categories")
    for number, record in enumerate(records):
        for field, kind in _COCO[name].items():
            if not isinstance(record, dict) or not isinstance(record.get(field), kind):
                raise ConfigError(f"{file}: {name}[{number}] has no {field!r} as COCO has it")
    return records


def _shape_of(where: str, annotation: Mapping[str, Any], size_px: tuple[int, int]) -> NDArray[np.bool_]:
    """Return (height, width) bool: what an annotation covers, by its segmentation, else by its box."""
    shape = annotation.get("segmentation")
    try:
        if isinstance(shape, dict):
            if tuple(shape["size"]) != size_px:
                raise ConfigError(f"{where}: its RLE is of {shape['size']}, expected {list(size_px)}")
            counts = shape["counts"]
            return _filled_runs(_counts_of(counts) if isinstance(counts, str) else counts, size_px)
        if isinstance(shape, list) and shape:
            covered = np.zeros(size_px, bool)
            for polygon in shape:
                covered |= filled_polygon(np.asarray(polygon, float).reshape(-1, 2), size_px)
            return covered
        left, top, width, height = (float(value) for value in annotation["bbox"])
        corners = [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]
        return filled_polygon(np.array(corners), size_px)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{where}: is neither a polygon, nor RLE, nor a box as COCO has them ({first_line(error)})"
        ) from error


def filled_polygon(points: NDArray[np.floating[Any]], size_px: tuple[int, int]) -> NDArray[np.bool_]:
    """Return (height, width) bool: pixels whose centre lies inside a polygon, by the even-odd rule.

    Args:
        points: (corner, 2) of x and y, pixels; (0, 0) is the outer corner of the first pixel.
        size_px: (height, width).
    """
    height, width = size_px
    if not np.isfinite(points).all():
        raise ValueError("a corner is no number")
    x, y = points[:, 0], points[:, 1]
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    inside = np.zeros(size_px, bool)
    centres = np.arange(width) + 0.5
    for row in range(max(0, int(np.floor(y.min()))), min(height, int(np.ceil(y.max())))):
        crosses = (y <= row + 0.5) != (next_y <= row + 0.5)
        at = x[crosses] + (row + 0.5 - y[crosses]) * (next_x - x)[crosses] / (next_y - y)[crosses]
        inside[row] = np.searchsorted(np.sort(at), centres, side="right") % 2 == 1
    return inside


def _counts_of(text: str) -> list[int]:
    """Decode the runs of a compressed RLE.

    A number is written in digits of five bits, the lowest first, each as the character 48 + digit, plus 32 if
    another one follows; the last digit's highest bit is the sign. From the fourth number on it is the
    difference to the number two before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"{character!r} is no character of an RLE")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _filled_runs(counts: Sequence[Any], size_px: tuple[int, int]) -> NDArray[np.bool_]:
    """Return (height, width) bool of runs, column by column, of pixels outside and inside in turn."""
    runs = np.asarray(counts)
    are_counts = runs.ndim == 1 and runs.dtype.kind in "iu" and (runs >= 0).all()
    if not are_counts or runs.sum() != size_px[0] * size_px[1]:
        raise ValueError(f"its runs do not fill {size_px[0]} x {size_px[1]} pixels")
    filled: NDArray[np.bool_] = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return filled.reshape(size_px[::-1]).T
