"""Camera frames with the heatmap over them, beside the pure map: as arrays, as MP4, as GIF.

    write_overlay(open_episode("….zarr"), "overlay.mp4")
    for frame in overlay_frames(open_episode("….zarr"), OverlaySettings(layer=17)):
        …  # (height, width, 3) uint8

Python side of `lerobot-attn overlay`. Which attention is meant is `analysis`'s business; this only paints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lerobot_attn import analysis
from lerobot_attn.analysis.select import RAW, frames_of
from lerobot_attn.analysis.sinks import keys_to_leave_out
from lerobot_attn.analysis.spatial import NORMALISATIONS, Normalisation, by_camera, percentile_of
from lerobot_attn.errors import ConfigError, LerobotAttnError, SelectionError, StoreError
from lerobot_attn.figures.canvas import RANDOM_WEIGHTS
from lerobot_attn.figures.look import OneMapSettings
from lerobot_attn.figures.scale import ColourScale as ColourScale
from lerobot_attn.figures.scale import blend
from lerobot_attn.layout import ImageGeometry
from lerobot_attn.settings import check_numbers, check_one_map, check_ranges
from lerobot_attn.sizes import Progress
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.video import Frame, VideoWriter, count_frames, read_frames

FORMATS = (".mp4", ".gif")
_GIF_FPS = 10.0  # frames beyond are left out: a README's clip has to stay small
_GIF_SIZE_PX = 224
_DEFAULT_FPS = 20.0

_GAP_PX = 8
_BAR_PX = 12
_MIN_WIDTH_PX = 240  # narrower than this no header can be read
_BACKGROUND, _WHITE, _GREY, _AMBER = (18, 18, 18), (240, 240, 240), (170, 170, 170), (255, 190, 70)
# Stand for numbers that change from frame to frame; lines are broken for their widest.
_FRAME, _ACTION = "\ue000", "\ue001"


@dataclass(frozen=True, kw_only=True)
class OverlaySettings(OneMapSettings):
    """Settings of `lerobot-attn overlay`; labels as `analysis.Where` takes them, or as text: "17", "0-99".

    A frame shows one map, so layer, denoise step, head and query are each one number or a mean; camera 'all'
    shows every camera in a grid.
    """

    normalisation: Normalisation = "episode"
    alpha: float = 0.6
    # Height of a view, pixels. Default: the camera's; 224 at most for a GIF.
    size: int | None = None
    # Frames: 'all', a number, a list or a range as '40-80'; shown in the episode's order.
    frames: Any = "all"

    _choices: ClassVar[tuple[str, ...]] = (*OneMapSettings._choices, "frames")

    def __post_init__(self) -> None:
        """Read choices given as text, and check what can be checked without an episode.

        Raises:
            ConfigError: a value is out of range, of the wrong type, or asks for several maps at once.
        """
        super().__post_init__()
        check_one_map("query", self.query, ("frame", "executed", "mean"))
        if not isinstance(self.camera, str | None):
            raise ConfigError(f"camera: got {self.camera!r}, expected one camera's name or 'all'")
        self._set("frames", check_numbers("frames", self.frames, "all"))
        if self.size is not None:
            check_ranges(self, {"size": (32, 4320)})
            if self.size != int(self.size):
                raise ConfigError(f"size: got {self.size!r}, expected a whole number of pixels")


@dataclass(frozen=True)
class WrittenOverlay:
    """What `write_overlay` wrote; as text its path and what is to be known of it.

    Attributes:
        path: the file.
        n_frames: frames in it.
        fps: frames per second.
        notes: what differs from what was asked for, e.g. frames that no camera video shows; usually empty.
    """

    path: Path
    n_frames: int
    fps: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the path, and the notes in parentheses."""
        return f"{self.path} ({'; '.join(self.notes)})" if self.notes else str(self.path)


def overlay_frames(
    episode: Episode, settings: OverlaySettings | None = None, progress: Progress | None = None
) -> Iterator[Frame]:
    """Yield the overlay's frames: the camera with the heatmap over it on the left, the pure map on the right.

    A header names camera, frame, layer, denoise step, head and action; a footer what the colours mean. Maps
    are read first, one inference at a time, and kept as patches (1 kB a frame for 16 × 16); images stream, so
    memory stays flat. Frames that the store has but a camera's video has not are left out at the end.

    Args:
        episode: from `open_episode`.
        settings: what to show, and how.
        progress: called as `progress(done, total)` with inferences read and frames drawn.

    Returns:
        An iterator over (height, width, 3) uint8, all of one size. Whatever can go wrong with the choice
        itself is raised before the first frame is asked for.

    Raises:
        SelectionError: a frame, layer, camera … that the episode does not hold.
        StoreError: the episode is empty or damaged, or has no video of the camera.
    """
    film = _Film(episode, settings or OverlaySettings(), progress)
    return film.draw(film.frames, progress)


def write_overlay(
    episode: Episode,
    path: str | Path,
    settings: OverlaySettings | None = None,
    progress: Progress | None = None,
) -> WrittenOverlay:
    """Write the overlay as MP4 (H.264, for browsers) or, by the file's suffix, as GIF.

    A GIF shows at most 10 frames a second, or `settings.fps`; frames between are left out, and the result's
    notes say so. It is held in memory, one byte a pixel, so it is for clips.

    Args:
        episode: from `open_episode`.
        path: ….mp4 or ….gif; folders are made. It appears when the file is whole.
        settings: what to show, and how.
        progress: called as `progress(done, total)` with inferences read and frames drawn.

    Returns:
        What was written. Where a camera's video is shorter than the store, the frames that both have are
        written, and the notes say how many.

    Raises:
        ConfigError: another suffix, the file is one of the episode's own, or it cannot be written.
        SelectionError: a frame, layer, camera … that the episode does not hold.
        StoreError: the episode is empty or damaged, has no video of the camera, or encoding failed.
    """
    settings, path = settings or OverlaySettings(), Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(
            f"{path}: cannot write {path.suffix or 'no suffix'!r}, expected {' or '.join(FORMATS)}"
        )
    _refuse_inputs(episode, path)
    film = _Film(episode, settings, progress, max_size_px=_GIF_SIZE_PX if suffix == ".gif" else None)
    temporary = path.with_name(f".{path.stem}.new{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = (_write_gif if suffix == ".gif" else _write_mp4)(film, temporary, progress)
        temporary.replace(path)
    except LerobotAttnError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the overlay: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # nothing there is fine, a folder that could not be made as well
            temporary.unlink()
    return WrittenOverlay(path, written.n_frames, written.fps, (*film.notes, *written.notes))


class _View(NamedTuple):
    """One camera's pair of pictures on the canvas; sizes in pixels."""

    camera: str
    video: Path
    crop_px: tuple[int, int] | None
    geometry: ImageGeometry
    size_px: tuple[int, int]
    heat: NDArray[np.float32]  # (frame, grid_y, grid_x) float32
    rows: NDArray[np.intp]  # (height,): the row of patches that a row of pixels shows
    columns: NDArray[np.intp]  # (width,): likewise


class _Place(NamedTuple):
    """Where a view's two pictures lie on the canvas, pixels."""

    top: int
    left: int
    right: int


class _Written(NamedTuple):
    n_frames: int
    fps: float
    notes: tuple[str, ...] = ()


class _Film:
    """An overlay that is ready to be drawn.

    Attributes:
        frames: frame numbers that will be drawn, ascending.
        fps: frames per second.
        fps_is_free: nobody asked for them.
        scale: its colours.
        notes: what differs from what was asked for.
    """

    def __init__(
        self,
        episode: Episode,
        settings: OverlaySettings,
        progress: Progress | None = None,
        *,
        max_size_px: int | None = None,
    ):
        if episode.n_frames == 0:
            raise StoreError(f"{episode.path}: holds no frames yet; expected one at least")
        self._episode, self._settings = episode, settings
        data = episode.arrays
        chosen = np.unique(np.atleast_1d(frames_of(data, settings.frames))).tolist()
        names = (
            analysis.camera_names(data)
            if settings.camera == "all"
            else [analysis.camera_geometry(data, settings.camera)[0]]
        )
        videos = {name: episode.video(name) for name in names}
        self._n_shown = min(count_frames(video) for video in videos.values())
        self.frames: list[int] = [frame for frame in chosen if frame < self._n_shown]
        self.notes: tuple[str, ...] = ()
        if len(self.frames) < len(chosen):
            state = "" if episode.is_complete else "incomplete, "
            what = f"the camera's video has {self._n_shown} of the store's {episode.n_frames} frames"
            if not self.frames:
                raise StoreError(f"{episode.path}: {state}{what}; expected a chosen frame among them")
            self.notes = (f"{state}{what}: {len(self.frames)} of {len(chosen)} chosen frames are shown",)
        elif not self.frames:
            raise SelectionError("frames []: expected one at least")
        facts = episode.attributes.get("videos", {})
        self.fps = float(settings.fps or facts.get(names[0], {}).get("fps") or _DEFAULT_FPS)
        self.fps_is_free = settings.fps is None
        maps = _read_maps(episode, names, settings, self.frames, progress)
        self._attrs = maps.attrs
        self.scale = ColourScale(maps.vmax, settings.colormap, settings.alpha)
        self._clipped, self._has_missing = maps.clipped, maps.has_missing
        self._views = []
        for name in names:
            _, geometry, _ = analysis.camera_geometry(data, name)
            size = _size_of(geometry, settings.size, max_size_px)
            crop = episode.image_size_px(name)
            rows, columns = _patches_of(geometry, size)
            self._views.append(
                _View(name, videos[name], crop, geometry, size, maps.heat[name], rows, columns)
            )
        self._n_read = maps.n_read
        self._arrange()

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of its frames."""
        height, width, _ = self._canvas.shape
        return height, width

    def draw(self, frames: Sequence[int], progress: Progress | None = None) -> Iterator[Frame]:
        """Yield the overlay at some of its frames, ascending."""
        images = [read_frames(view.video, size_px=view.crop_px, numbers=frames) for view in self._views]
        index_of = {frame: index for index, frame in enumerate(self.frames)}
        for done, (frame, *shown) in enumerate(zip(frames, *images, strict=True), start=1):
            canvas = self._canvas.copy()
            for view, place, image in zip(self._views, self._places, shown, strict=True):
                height, width = view.size_px
                if image.shape[:2] != view.size_px:
                    image = resized(image, view.size_px)
                over, pure = self._paint(view, view.heat[index_of[frame]], image)
                rows = slice(place.top, place.top + height)
                canvas[rows, place.left : place.left + width] = over
                canvas[rows, place.right : place.right + width] = pure
            self._write_numbers(canvas, frame)
            yield canvas
            if progress is not None:
                progress(self._n_read + done, self._n_read + len(frames))

    def _paint(self, view: _View, heat: NDArray[np.float32], image: Frame) -> tuple[Frame, Frame]:
        """Return the image with the heatmap over it, and the heatmap, (height, width, 3) uint8 each."""
        if self._settings.interpolation == "nearest":
            # Colours are looked up a patch, not a pixel: several times as fast.
            def spread[T: np.generic](patches: NDArray[T]) -> NDArray[T]:
                return patches.take(view.columns, axis=1, mode="clip").take(view.rows, axis=0, mode="clip")

            rest, weighted = self.scale.weights(heat)
            return blend(image, spread(rest), spread(weighted)), spread(self.scale.colours(heat))
        pixels = analysis.on_camera_pixels(
            heat, view.geometry, size_px=view.size_px, interpolation=self._settings.interpolation
        )
        return self.scale.over(image, pixels), self.scale.colours(pixels)

    def _header_parts(self) -> list[str]:
        settings, attrs = self._settings, self._attrs
        one_camera = len(self._views) == 1
        query = attrs["query"]
        if attrs["source"] == RAW and settings.query == "frame":
            query = f"action {_ACTION}"
        return [
            self._episode.layout.short_names[self._views[0].camera]
            if one_camera
            else f"{len(self._views)} cameras",
            f"frame {_FRAME}/{self._episode.n_frames}",
            attrs["layer"],
            attrs["denoise_step"],
            f"head {settings.head}" if isinstance(settings.head, str) else attrs["head"],
            query,
        ]

    def _footer_parts(self) -> list[str]:
        settings, attrs = self._settings, self._attrs
        over = "" if settings.normalisation in ("frame", "episode") else ", one range for the frames shown"
        return [
            f"colours: {NORMALISATIONS[settings.normalisation]}{over}",
            f"range ends at percentile {settings.clip:g}" if self._clipped else "",
            "" if attrs["source"] == RAW else "from stored means",
            attrs["left_out"],
            "grey: not in the store" if self._has_missing else "",
            "" if self._episode.is_complete else "incomplete episode",
        ]

    def _arrange(self) -> None:
        """Place everything that stays, and draw it once."""
        views = self._views
        heights, widths = zip(*(view.size_px for view in views), strict=True)
        self._font = _font(min(max(round(max(heights) / 24), 11), 22))
        small = _font(min(max(round(max(heights) / 30), 10), 18))
        columns = math.ceil(math.sqrt(len(views) / 2))
        label_px = _line_px(small) if len(views) > 1 else 0
        labels = self._bar_labels()
        bar_px = _BAR_PX + 4 + math.ceil(max(small.getlength(label) for label in labels))
        cell_px = 2 * max(widths) + _GAP_PX
        pairs_px = columns * (cell_px + _GAP_PX)
        width = _GAP_PX + pairs_px + bar_px + _GAP_PX
        shift = max(0, _MIN_WIDTH_PX - width) // 2
        width = max(width, _MIN_WIDTH_PX)
        width += width % 2
        self._frame_query = self._episode.arrays["frame_query"].values
        self._first_query = self._episode.layout.first_action_query
        last_action = int(self._frame_query.max()) - self._first_query
        self._digits = {_FRAME: len(str(max(self.frames))), _ACTION: len(str(last_action))}
        inside = width - 2 * _GAP_PX
        self._header = _break(self._header_parts(), " | ", self._font, inside, self._digits)
        footer = _break([part for part in self._footer_parts() if part], " | ", small, inside)
        warning = _break([RANDOM_WEIGHTS], " ", small, inside) if self._episode.has_random_weights else []
        top = 4 + len(self._header) * _line_px(self._font) + 3
        rows = [heights[start : start + columns] for start in range(0, len(views), columns)]
        self._places: list[_Place] = []
        y = top
        for row in rows:
            for column, _ in enumerate(row):
                left = _GAP_PX + shift + column * (cell_px + _GAP_PX)
                own = views[len(self._places)].size_px[1]
                self._places.append(_Place(y + label_px, left, left + own + _GAP_PX))
            y += label_px + max(row) + _GAP_PX
        bottom = y - _GAP_PX
        height = bottom + 5 + (len(footer) + len(warning)) * _line_px(small) + 3
        canvas = Image.new("RGB", (width, height + height % 2), _BACKGROUND)
        draw = ImageDraw.Draw(canvas)
        if label_px:
            names = self._episode.layout.short_names
            for view, place in zip(views, self._places, strict=True):
                (label, *_) = _break([names[view.camera]], " ", small, cell_px)
                draw.text((place.left, place.top - label_px), label, _WHITE, small)
        y = bottom + 5
        for line, colour in [*((line, _GREY) for line in footer), *((line, _AMBER) for line in warning)]:
            draw.text((_GAP_PX, y), line, colour, small)
            y += _line_px(small)
        bar_left, bar_top = _GAP_PX + shift + pairs_px, top + label_px
        draw.rectangle((bar_left - 1, bar_top, bar_left + _BAR_PX, bottom - 1), outline=_GREY)
        draw.text((bar_left + _BAR_PX + 4, bar_top), labels[1], _WHITE, small)
        draw.text((bar_left + _BAR_PX + 4, bottom - _line_px(small)), labels[0], _WHITE, small)
        self._numbers = []
        for index, line in enumerate(self._header):
            x, y = float(_GAP_PX), 4 + index * _line_px(self._font)
            for piece in re.split(f"([{_FRAME}{_ACTION}])", line):
                if piece in (_FRAME, _ACTION):
                    self._numbers.append((piece, round(x), y))
                    piece = "0" * self._digits[piece]
                else:
                    draw.text((round(x), y), piece, _WHITE, self._font)
                x += self._font.getlength(piece)
        self._canvas = np.array(canvas)
        ramp = np.linspace(self.scale.vmax or 1, 0, bottom - bar_top - 2, dtype=np.float32)[:, None]
        bar = ColourScale(self.scale.vmax or 1, self.scale.colormap).colours(ramp)
        self._canvas[bar_top + 1 : bottom - 1, bar_left : bar_left + _BAR_PX] = bar

    def _bar_labels(self) -> tuple[str, str]:
        end = f"{100 * self.scale.vmax:.3g}%" if self.scale.vmax else "0%"
        return "0%", f"≥{end}" if self._clipped else end

    def _write_numbers(self, canvas: Frame, frame: int) -> None:
        """Write what the header's words leave open; they are on the canvas already."""
        action = int(self._frame_query[frame]) - self._first_query
        values = {_FRAME: frame, _ACTION: action}
        for mark, x, y in self._numbers:
            picture = _number(values[mark], self._digits[mark], self._font)
            canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture


class _Maps(NamedTuple):
    heat: dict[str, NDArray[np.float32]]  # camera → (frame, grid_y, grid_x) float32
    vmax: float
    clipped: bool
    has_missing: bool  # whether a frame's map is not in the store: NaN
    attrs: dict[str, Any]
    n_read: int


def _read_maps(
    episode: Episode,
    cameras: Sequence[str],
    settings: OverlaySettings,
    frames: Sequence[int],
    progress: Progress | None,
) -> _Maps:
    """Read the chosen frames' heatmaps inference by inference, and find the colour range."""
    data = episode.arrays
    where = settings.where
    where["leave_out"] = keys_to_leave_out(settings.exclude, [episode])
    episode_wide = settings.normalisation == "episode"
    # The episode's range is found on the way, so that no map is read twice.
    needed = np.arange(episode.n_frames) if episode_wide else np.array(frames)
    inference_of = data["frame_inference"].values[needed]
    inferences = np.unique(inference_of).tolist()
    pieces: dict[str, list[NDArray[np.float32]]] = {camera: [] for camera in cameras}
    attrs: dict[str, Any] = {}
    for done, inference in enumerate(inferences, start=1):
        where["frame"] = needed[inference_of == inference].tolist()
        try:
            array = analysis.attention(data, **where).load()
        except LerobotAttnError:
            raise
        except Exception as error:  # a damaged chunk raises whatever its codec raises
            raise StoreError(
                f"{episode.path}: the attention of inference {inference} cannot be read: {error}; "
                "lerobot-attn verify tells what is damaged"
            ) from error
        heatmaps = by_camera(data, array, cameras, normalisation=settings.normalisation)
        for camera, heat in heatmaps.items():
            pieces[camera].append(heat.values)
        attrs = array.attrs
        if progress is not None:
            progress(done, len(inferences) + len(frames))
    read = {camera: np.concatenate(found) for camera, found in pieces.items()}
    order = np.argsort(inference_of, kind="stable")
    row_of = {int(frame): row for row, frame in enumerate(needed[order])}
    rows = [row_of[frame] for frame in frames]
    largest = max(percentile_of(heat, 100) for heat in read.values())
    vmax = 1.0
    if settings.normalisation != "frame":
        vmax = max(percentile_of(heat, settings.clip) for heat in read.values()) or largest
    heat_of = {camera: np.ascontiguousarray(heat[rows]) for camera, heat in read.items()}
    has_missing = any(bool(np.isnan(heat).any()) for heat in heat_of.values())
    return _Maps(heat_of, vmax, largest > vmax, has_missing, attrs, len(inferences))


def _write_mp4(film: _Film, path: Path, progress: Progress | None) -> _Written:
    writer = VideoWriter(path, fps=film.fps, size_px=film.size_px, fast=True)
    try:
        for frame in film.draw(film.frames, progress):
            writer.write(frame)
    finally:
        writer.close()
    found = count_frames(path)
    if found != len(film.frames):
        raise StoreError(
            f"{path}: the video encoder wrote {found} frames, expected {len(film.frames)}; is the disk full?"
        )
    return _Written(found, film.fps)


def _write_gif(film: _Film, path: Path, progress: Progress | None) -> _Written:
    step = max(1, math.ceil(film.fps / _GIF_FPS - 1e-6)) if film.fps_is_free else 1
    # GIFs count hundredths of a second, and players take less than two for ten.
    hundredths = max(2, round(100 * step / film.fps))
    frames = film.frames[::step]
    palette = _palette(film, frames)
    images = (
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in film.draw(frames, progress)
    )
    first = next(images)
    first.save(
        path, format="GIF", save_all=True, append_images=images, duration=10 * hundredths, loop=0, disposal=1
    )
    fps = 100 / hundredths
    notes = (f"one of {step} frames, at {fps:.3g} frames/s",) if step > 1 else ()
    return _Written(len(frames), fps, notes)


def _palette(film: _Film, frames: Sequence[int]) -> Image.Image:
    """Return 256 colours for the first, the middle and the last frame, and for the colour map."""
    sampled = sorted({frames[0], frames[len(frames) // 2], frames[-1]})
    stacked = np.concatenate(list(film.draw(sampled)))
    # A fifth of all pixels, or the images take every colour and the bar gets bands.
    ramp = film.scale.colours(np.linspace(0, film.scale.vmax, 256))
    stacked = np.concatenate([stacked, np.resize(ramp, (len(stacked) // 4, *stacked.shape[1:]))])
    return Image.fromarray(stacked).quantize(256, method=Image.Quantize.MEDIANCUT)


def _refuse_inputs(episode: Episode, path: Path) -> None:
    target = path.resolve()
    inputs = [file for file in (*episode.videos.values(), episode.eval_video) if file is not None]
    if target in [file.resolve() for file in inputs] or target.is_relative_to(episode.path.resolve()):
        raise ConfigError(f"{path}: is one of the episode's own files; expected another name")
    if target.is_dir():
        raise ConfigError(f"{path}: is a folder, expected a file's name")


def _size_of(geometry: ImageGeometry, size: int | None, largest: int | None) -> tuple[int, int]:
    height = int(size or min(geometry.height_px, largest or geometry.height_px))
    return height, max(1, round(geometry.width_px * height / geometry.height_px))


def _patches_of(
    geometry: ImageGeometry, size_px: tuple[int, int]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return which row and which column of patches each pixel's row and column show."""
    rows, columns = np.mgrid[: geometry.grid_rows, : geometry.grid_columns]
    row, column = analysis.on_camera_pixels(np.stack([rows, columns]), geometry, size_px=size_px)
    return row[:, 0].astype(int), column[0].astype(int)


def resized(image: Frame, size_px: tuple[int, int]) -> Frame:
    """Return an image (height, width, 3) uint8 at another (height, width)."""
    return np.asarray(Image.fromarray(image).resize(size_px[::-1], Image.Resampling.BILINEAR))


@lru_cache(maxsize=16)
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    # Matplotlib brings it, so letters are the figures' and the same on every machine.
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size_px)


@lru_cache(maxsize=4096)
def _number(value: int, digits: int, font: ImageFont.FreeTypeFont) -> Frame:
    """Return a number, right-aligned: (height, width, 3) uint8."""
    width = math.ceil(font.getlength("0" * digits))
    picture = Image.new("RGB", (width, _line_px(font)), _BACKGROUND)
    ImageDraw.Draw(picture).text((width, 0), str(value), _WHITE, font, anchor="ra")
    return np.asarray(picture)


def _line_px(font: ImageFont.FreeTypeFont) -> int:
    return math.ceil(font.size * 1.3)


def _break(
    parts: Sequence[str],
    separator: str,
    font: ImageFont.FreeTypeFont,
    width_px: int,
    digits: Mapping[str, int] | None = None,
) -> list[str]:
    """Put parts on as few lines as fit; a part that is too long for one is broken at words, then anywhere."""

    def fits(text: str) -> bool:
        for mark, n in (digits or {}).items():
            text = text.replace(mark, "0" * n)
        return font.getlength(text) <= width_px

    lines: list[str] = []
    for part in parts:
        joined = f"{lines[-1]}{separator}{part}" if lines else part
        if lines and fits(joined):
            lines[-1] = joined
            continue
        lines.append("")
        for word in part.split(" "):
            joined = f"{lines[-1]} {word}" if lines[-1] else word
            if fits(joined):
                lines[-1] = joined
                continue
            if lines[-1]:
                lines.append("")
            for letter in word:
                if not fits(lines[-1] + letter):
                    lines.append("")
                lines[-1] += letter
    return lines
