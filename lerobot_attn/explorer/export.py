"""One episode and the explorer's page in a single HTML file, which opens from disk without a network.

    export_html(open_episode("….zarr"), "page.html", ExportSettings(layers="16,17", frames="0-279:2"))

Python side of `lerobot-attn export-html`. The file holds what the server would answer for the chosen layers,
heads, denoise steps and frames; page/src/file.ts reads it.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_attn.analysis.labels import ranges
from lerobot_attn.errors import ConfigError, LerobotAttnError, StoreError, first_line
from lerobot_attn.explorer import scene, slabs, tables
from lerobot_attn.explorer.document import Document, data_element, escaped, single_document
from lerobot_attn.explorer.excerpt import Excerpt, as_option, choose, facts_of
from lerobot_attn.explorer.library import id_alone
from lerobot_attn.explorer.neurons import DEFAULT_TOP, MOST_UNITS, every_answer, read_found
from lerobot_attn.explorer.pictures import jpeg
from lerobot_attn.explorer.summary import summary_of
from lerobot_attn.settings import check_numbers, check_ranges, is_number, parse_choice
from lerobot_attn.sizes import Progress, format_bytes
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.video import read_frames

ELEMENT = "lerobot-attn-episode"
FORMATS = (".html", ".htm")
_MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of `lerobot-attn export-html`; labels as numbers, lists, or text: "17", "0,4,9", "0-3"."""

    # Layers: a number (negative from the last), a list, a range or 'all'.
    layers: Any = "all"
    # Heads, likewise.
    heads: Any = "all"
    # Denoise steps, likewise. Default: the last one that was recorded.
    denoise_steps: Any = None
    # Frames: a number, a list, a range as '0-99', every fifth as '0-279:5', or 'all'.
    frames: Any = "all"
    # Megabytes that the file may have; a larger one is not written.
    max_mb: float = 25
    # Quality of the camera pictures as JPEG, 1 to 95.
    quality: int = 80
    # Table of found neurons (columns stream, layer, unit), beside those that the condition fires.
    neurons: str | None = None
    # Units of each set in it, from the first row on.
    top: int = DEFAULT_TOP

    def __post_init__(self) -> None:
        """Read choices given as text, and check what can be checked without an episode.

        Raises:
            ConfigError: a value is out of range or of the wrong type.
        """
        for name in ("layers", "heads", "denoise_steps", "frames"):
            choice = parse_choice(getattr(self, name))
            if choice is not None or name != "denoise_steps":
                object.__setattr__(self, name, check_numbers(name, choice, "all"))
        limits = {"quality": (1, 95), "top": (1, MOST_UNITS)}
        check_ranges(self, {"max_mb": (0.1, 10_000), **limits})
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not is_number(value):
                raise ConfigError(f"{name}: got {value!r}, expected a whole number from {least} to {most}")
        if not isinstance(self.neurons, str | None):
            raise ConfigError(f"neurons: got {self.neurons!r}, expected the name of a CSV table")


@dataclass(frozen=True)
class Contents:
    """What is in the file, and how many of its bytes each part takes."""

    n_layers: int
    n_heads: int
    n_denoise_steps: int
    n_inferences: int
    n_frames: int
    n_cameras: int  # that have pictures
    maps_bytes: int
    pictures_bytes: int
    tables_bytes: int
    page_bytes: int

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return self.maps_bytes + self.pictures_bytes + self.tables_bytes + self.page_bytes

    def __str__(self) -> str:
        """Say what takes how much, in one line."""
        maps = " × ".join(
            [
                _counted(self.n_inferences, "inference"),
                _counted(self.n_denoise_steps, "denoise step"),
                _counted(self.n_layers, "layer"),
                _counted(self.n_heads, "head"),
            ]
        )
        pictures = f"{_counted(self.n_frames, 'frame')} × {_counted(self.n_cameras, 'camera')}"
        return (
            f"{format_bytes(self.total_bytes)} (maps {format_bytes(self.maps_bytes)}: {maps}; "
            f"pictures {format_bytes(self.pictures_bytes)}: {pictures}; "
            f"tables {format_bytes(self.tables_bytes)}; page {format_bytes(self.page_bytes)})"
        )


@dataclass(frozen=True)
class WrittenExport:
    """What `export_html` wrote; as text its path and what is to be known of it.

    Attributes:
        path: the file.
        contents: what is in it.
        notes: what differs from what was asked for, e.g. frames that a camera's video lacks; usually empty.
    """

    path: Path
    contents: Contents
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the path, and the notes in parentheses."""
        return f"{self.path} ({'; '.join(self.notes)})" if self.notes else str(self.path)


def export_html(
    episode: Episode,
    path: str | Path,
    settings: ExportSettings | None = None,
    *,
    progress: Progress | None = None,
    announce: Callable[[Contents], None] | None = None,
    page: Path | None = None,
) -> WrittenExport:
    """Write an episode as a single HTML page that opens from disk without a network.

    It shows means over the executed actions and the camera pictures, as the explorer does; full maps, the
    prefix and other episodes stay in the recording. Numbers are those of the store, bit by bit.

    Args:
        episode: from `open_episode`; an incomplete one is exported as far as it was recorded.
        path: ….html; folders are made. It appears when the file is whole.
        settings: what of it, and how large the file may be.
        progress: called as `progress(done, total)` with inferences and frames read.
        announce: called with what will be written, before it is.
        page: folder of the built page; default: the package's.

    Raises:
        ConfigError: another suffix, the file would be larger than allowed, or cannot be written; the table of
            neurons cannot be read.
        SelectionError: a frame, layer, head … that the episode does not hold.
        SetupError: the page was not built.
        StoreError: the episode is empty or damaged.
    """
    settings, path = settings or ExportSettings(), Path(path)
    _check_target(episode, path)
    neurons = () if settings.neurons is None else read_found(settings.neurons, settings.top)
    document = single_document(page)
    try:
        chosen = choose(
            episode,
            layers=settings.layers,
            heads=settings.heads,
            denoise_steps=settings.denoise_steps,
            frames=settings.frames,
            neurons=neurons,
        )
        parts = _read(episode, chosen, settings.quality, progress)
    except LerobotAttnError:
        raise
    except Exception as error:  # whatever codecs raise for damaged chunks
        raise StoreError(
            f"{episode.path}: cannot be exported ({first_line(error)}); lerobot-attn verify tells what is "
            "damaged"
        ) from error
    contents = _contents(chosen, parts, document)
    if contents.total_bytes > settings.max_mb * _MB:
        raise _too_large(path, contents, settings.max_mb, chosen)
    if announce is not None:
        announce(contents)
    _write(path, document, parts)
    return WrittenExport(path, contents, tuple(parts.notes))


@dataclass
class _Parts:
    """What the file's element holds. Maps and pictures are kept apart: in JSON they are base64."""

    tables: dict[str, Any]
    maps: bytes  # gzip of float16
    maps_shape: tuple[int, ...]
    pictures: dict[str, dict[int, bytes]]  # camera → frame → JPEG
    notes: list[str] = field(default_factory=list)

    def json(self, encode: Callable[[bytes], str]) -> str:
        """Return everything as JSON, with maps and pictures as `encode` writes them."""
        value = {
            **self.tables,
            "means": {"shape": self.maps_shape, "data": encode(self.maps)},
            "pictures": {
                camera: {frame: encode(picture) for frame, picture in of_camera.items()}
                for camera, of_camera in self.pictures.items()
            },
        }
        return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _check_target(episode: Episode, path: Path) -> None:
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: cannot write {path.suffix or 'no suffix'!r}, expected .html")
    if isinstance(episode.path, Path) and path.resolve().is_relative_to(episode.path.resolve()):
        raise ConfigError(f"{path}: lies inside the episode's store; expected another folder")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, expected a file's name")


def _read(episode: Episode, chosen: Excerpt, quality: int, progress: Progress | None) -> _Parts:
    """Read everything that the file will hold."""
    cameras = [camera.name for camera in episode.layout.cameras if camera.name in episode.videos]
    total = len(chosen.inferences) + len(cameras) * len(chosen.frames)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    found: dict[str, Any] = {
        "row": summary_of(id_alone(episode.path), episode).to_dict(),
        "facts": facts_of(episode, chosen),
        "timeline": tables.timeline(episode),
        "inferences": chosen.inferences,
        "tokens": [],
        "actions": [],
    }
    if found["facts"]["scene"] is not None:
        found["masks"] = []
    if found["facts"]["neurons"] is not None:
        found["neurons"] = list(every_answer(episode, found["facts"]["neurons"], chosen.steps))
    places = np.ix_(
        _places(chosen.recording["mean_layers"], chosen.layers),
        _places(chosen.recording["heads"], chosen.heads),
    )
    zipped = zlib.compressobj(wbits=31)  # gzip
    maps = []
    for inference in chosen.inferences:
        found["tokens"].append(tables.tokens(episode, inference))
        found["actions"].append(tables.action_chunk(episode, inference))
        if "masks" in found:
            found["masks"].append(scene.masks(episode, inference))
        for step in chosen.steps:
            slab, whole = slabs.mean_slab(episode, inference, step)
            maps.append(zipped.compress(np.frombuffer(slab, "<f2").reshape(whole)[places].tobytes()))
        advance()
    maps.append(zipped.flush())
    sizes = (chosen.inferences, chosen.steps, chosen.layers, chosen.heads)
    shape = (*map(len, sizes), episode.layout.n_keys)
    parts = _Parts(found, b"".join(maps), shape, {})
    for camera in cameras:
        parts.pictures[camera] = _pictures(episode, camera, chosen.frames, quality, advance, parts.notes)
    for camera in found["facts"]["cameras"]:
        camera["has_video"] = bool(parts.pictures.get(camera["name"]))
    return parts


def _places(labels: list[int], wanted: list[int]) -> list[int]:
    return [labels.index(label) for label in wanted]


def _pictures(
    episode: Episode,
    camera: str,
    frames: list[int],
    quality: int,
    advance: Callable[[], None],
    notes: list[str],
) -> dict[int, bytes]:
    """Return the frames of a camera's video as JPEG; what is wrong with the video is noted."""
    found: dict[int, bytes] = {}
    video = read_frames(episode.videos[camera], size_px=episode.image_size_px(camera), numbers=frames)
    try:
        for frame, image in zip(frames, video, strict=True):
            found[frame] = jpeg(image, quality=quality, small=True)
            advance()
    except StoreError as error:
        # As in the explorer, attention is shown without its picture: a killed recording's video may be short.
        notes.append(f"{len(found)} of {len(frames)} pictures of {camera}: {first_line(error)}")
    return found


def _contents(chosen: Excerpt, parts: _Parts, document: Document) -> Contents:
    pictures = [picture for of_camera in parts.pictures.values() for picture in of_camera.values()]
    element = data_element(ELEMENT, "")
    return Contents(
        n_layers=len(chosen.layers),
        n_heads=len(chosen.heads),
        n_denoise_steps=len(chosen.steps),
        n_inferences=len(chosen.inferences),
        n_frames=len(chosen.frames),
        n_cameras=sum(bool(of_camera) for of_camera in parts.pictures.values()),
        maps_bytes=_base64_bytes(parts.maps),
        pictures_bytes=sum(map(_base64_bytes, pictures)),
        tables_bytes=len(escaped(parts.json(lambda _: ""))),
        page_bytes=len(document.before) + len(element) + len(document.after),
    )


def _base64_bytes(value: bytes) -> int:
    return 4 * math.ceil(len(value) / 3)


def _too_large(path: Path, contents: Contents, max_mb: float, chosen: Excerpt) -> ConfigError:
    remedies = _remedies(contents, max_mb * _MB, chosen)
    listed = ", ".join(
        f"{option} {'would bring it ' if i == 0 else ''}to about {format_bytes(size)}"
        for i, (option, size) in enumerate(remedies)
    )
    allow = f"--max-mb {math.ceil(contents.total_bytes / _MB)} allows it"
    return ConfigError(
        f"{path}: would be {contents}; expected at most {max_mb:g} MB; "
        f"{f'{listed}; ' if listed else ''}{allow}; nothing was written"
    )


def _remedies(contents: Contents, limit: float, chosen: Excerpt) -> list[tuple[str, float]]:
    """Return options that would make the file small enough, each with about the size that it would have."""

    def size(*, pictures: float = 1, maps: float = 1) -> float:
        saved = (1 - pictures) * contents.pictures_bytes + (1 - maps) * contents.maps_bytes
        return contents.total_bytes - saved

    found: list[tuple[str, float]] = []

    def fits(option: str, estimate: float) -> bool:
        if estimate > limit:
            return False
        found.append((option, estimate))
        return True

    for every in range(2, len(chosen.frames)):
        frames = chosen.frames[::every]
        n_inferences = len({chosen.inference_of[frame] for frame in frames})
        parts = {"pictures": len(frames) / len(chosen.frames), "maps": n_inferences / len(chosen.inferences)}
        if fits(f"--frames {as_option(frames, chosen.frames[-1])}", size(**parts)):
            break
    for name, labels in (("layers", chosen.layers), ("heads", chosen.heads)):
        for n in range(len(labels) - 1, 0, -1):
            if fits(f"--{name} {ranges(labels[-n:]).replace(' ', '')}", size(maps=n / len(labels))):
                break
    if len(chosen.steps) > 1:
        fits(f"--denoise-steps {chosen.steps[-1]}", size(maps=1 / len(chosen.steps)))
    return found


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _write(path: Path, document: Document, parts: _Parts) -> None:
    text = parts.json(lambda value: base64.b64encode(value).decode())
    temporary = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(document.before + data_element(ELEMENT, text) + document.after)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the page: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # nothing there is fine, a folder that could not be made as well
            temporary.unlink()
