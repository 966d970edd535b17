"""An overlay that is ready to be drawn: the camera with the heatmap over it, beside the pure map."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lerobot_attn import analysis
from lerobot_attn.analysis.select import MEANS, PREFIX, frames_of
from lerobot_attn.analysis.spatial import NORMALISATIONS
from lerobot_attn.errors import RANDOM_WEIGHTS, SelectionError, StoreError
from lerobot_attn.figures.fonts import missing_note, one_line
from lerobot_attn.figures.outlines import Painted, outlines_in_words, painted_outlines
from lerobot_attn.figures.scale import ColourScale, blend
from lerobot_attn.layout import ImageGeometry
from lerobot_attn.overlay.maps import read_maps, read_masks
from lerobot_attn.overlay.settings import OverlaySettings
from lerobot_attn.overlay.words import (
    AMBER,
    BACKGROUND,
    GREY,
    WHITE,
    broken,
    font_of,
    line_px,
    number_picture,
)
from lerobot_attn.sizes import Progress
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.references import Video
from lerobot_attn.store.video import Frame, count_frames, read_frames

_DEFAULT_FPS = 20.0
_GAP_PX = 8
_BAR_PX = 12
_MIN_WIDTH_PX = 240  # narrower than this no header can be read
# Stand for numbers that change from frame to frame; lines are broken for their widest.
FRAME, ACTION = "\ue000", "\ue001"


class _View(NamedTuple):
    """One camera's pair of pictures on the canvas; sizes in pixels."""

    camera: str
    video: Video
    crop_px: tuple[int, int] | None
    geometry: ImageGeometry
    size_px: tuple[int, int]
    heat: NDArray[np.float32]  # (frame, grid_y, grid_x) float32
    rows: NDArray[np.intp]  # (height,): the row of patches that a row of pixels shows
    columns: NDArray[np.intp]  # (width,): likewise
    outlines: dict[int, Painted]  # by the inference; empty: none

    @property
    def is_cut(self) -> bool:
        """Whether the policy did not see all of the image."""
        g = self.geometry
        return bool(self.rows.max() == g.grid_rows or self.columns.max() == g.grid_columns)


class _Place(NamedTuple):
    """Where a view's two pictures lie on the canvas, pixels."""

    top: int
    left: int
    right: int


class Film:
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
        maps = read_maps(episode, names, settings, self.frames, progress)
        self._attrs = maps.attrs
        self.scale = ColourScale(maps.vmax, settings.colormap, settings.alpha)
        self._clipped, self._has_missing = maps.clipped, maps.has_missing
        self._by_action = maps.by_action
        queries = data["frame_query"].values
        # Frame → number of the action executed at it; nothing where one choice stands for all frames.
        self._actions: dict[int, int] = {}
        if maps.by_action:
            actions = episode.layout.action_of_query(queries[self.frames])
            self._actions = dict(zip(self.frames, actions.tolist(), strict=True))
        self._views = []
        self._inferences = dict(
            zip(self.frames, data["frame_inference"].values[self.frames].tolist(), strict=True)
        )
        masks = {name: read_masks(episode, name, self.frames) if settings.outlines else {} for name in names}
        self._outlines = outlines_in_words(
            (mask for of_camera in masks.values() for mask in of_camera.values()), names=False
        )
        for name in names:
            _, geometry, _ = analysis.camera_geometry(data, name)
            size = _size_of(geometry, settings.size, max_size_px)
            crop = episode.image_size_px(name)
            rows, columns = analysis.patch_of_pixels(geometry, size)
            outlines = {number: painted_outlines(mask, size) for number, mask in masks[name].items()}
            self._views.append(
                _View(name, videos[name], crop, geometry, size, maps.heat[name], rows, columns, outlines)
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
                outlines = view.outlines.get(self._inferences[frame])
                if outlines is not None:
                    over = outlines.onto(over)
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

            if view.is_cut:  # what the policy did not see shows no colour
                heat = np.pad(heat, ((0, 1), (0, 1)), constant_values=np.nan)
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
        if self._by_action:
            query = f"action {ACTION}"
        parts = [
            one_line(self._episode.layout.short_names[self._views[0].camera])
            if one_camera
            else f"{len(self._views)} cameras",
            f"frame {FRAME}/{self._episode.n_frames}",
            "prefix" if attrs["source"] == PREFIX else "",
            attrs["layer"],
            attrs.get("denoise_step", ""),
            f"head {settings.head}" if isinstance(settings.head, str) else attrs["head"],
            query,
        ]
        return [part for part in parts if part]

    def _footer_parts(self) -> list[str]:
        settings, attrs = self._settings, self._attrs
        over = "" if settings.normalisation in ("frame", "episode") else ", one range for the frames shown"
        return [
            f"colours: {NORMALISATIONS[settings.normalisation]}{over}",
            f"range ends at percentile {settings.clip:g}" if self._clipped else "",
            "from stored means" if attrs["source"] == MEANS else "",
            attrs["left_out"],
            "grey: not in the store" if self._has_missing else "",
            f"{self._outlines}, where the policy saw them" if self._outlines else "",
            "" if self._episode.is_complete else "incomplete episode",
        ]

    def _arrange(self) -> None:
        """Place everything that stays, and draw it once."""
        views, names = self._views, self._episode.layout.short_names
        heights, widths = zip(*(view.size_px for view in views), strict=True)
        self._font = font_of(min(max(round(max(heights) / 24), 11), 22))
        small = font_of(min(max(round(max(heights) / 30), 10), 18))
        columns = math.ceil(math.sqrt(len(views) / 2))
        label_px = line_px(small) if len(views) > 1 else 0
        labels = self._bar_labels()
        bar_px = _BAR_PX + 4 + math.ceil(max(small.getlength(label) for label in labels))
        cell_px = 2 * max(widths) + _GAP_PX
        pairs_px = columns * (cell_px + _GAP_PX)
        width = _GAP_PX + pairs_px + bar_px + _GAP_PX
        shift = max(0, _MIN_WIDTH_PX - width) // 2
        width = max(width, _MIN_WIDTH_PX)
        width += width % 2
        self._digits = {
            FRAME: len(str(max(self.frames))),
            ACTION: len(str(max(self._actions.values(), default=0))),
        }
        inside = width - 2 * _GAP_PX
        self._header = broken(self._header_parts(), " | ", self._font, inside, self._digits)
        parts = [self._episode.condition.line, *self._footer_parts(), self._episode.policy_remark]
        footer = broken([part for part in parts if part], " | ", small, inside)
        warnings = [RANDOM_WEIGHTS] if self._episode.has_random_weights else []
        letters = "".join([*self._header_parts(), *(names[view.camera] for view in views)])
        no_font = missing_note(letters.replace(FRAME, "").replace(ACTION, ""))
        if no_font:
            warnings.append(no_font)
            self.notes = (*self.notes, no_font)
        warning = broken(warnings, " | ", small, inside)
        top = 4 + len(self._header) * line_px(self._font) + 3
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
        height = bottom + 5 + (len(footer) + len(warning)) * line_px(small) + 3
        canvas = Image.new("RGB", (width, height + height % 2), BACKGROUND)
        draw = ImageDraw.Draw(canvas)
        if label_px:
            for view, place in zip(views, self._places, strict=True):
                (label, *_) = broken([one_line(names[view.camera])], " ", small, cell_px)
                small.write(draw, (place.left, place.top - label_px), label, WHITE)
        y = bottom + 5
        for line, colour in [*((line, GREY) for line in footer), *((line, AMBER) for line in warning)]:
            small.write(draw, (_GAP_PX, y), line, colour)
            y += line_px(small)
        bar_left, bar_top = _GAP_PX + shift + pairs_px, top + label_px
        draw.rectangle((bar_left - 1, bar_top, bar_left + _BAR_PX, bottom - 1), outline=GREY)
        small.write(draw, (bar_left + _BAR_PX + 4, bar_top), labels[1], WHITE)
        small.write(draw, (bar_left + _BAR_PX + 4, bottom - line_px(small)), labels[0], WHITE)
        self._numbers = []
        for index, line in enumerate(self._header):
            x, y = float(_GAP_PX), 4 + index * line_px(self._font)
            for piece in re.split(f"([{FRAME}{ACTION}])", line):
                if piece in (FRAME, ACTION):
                    self._numbers.append((piece, round(x), y))
                    piece = "0" * self._digits[piece]
                else:
                    self._font.write(draw, (round(x), y), piece, WHITE)
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
        values = {FRAME: frame, ACTION: self._actions.get(frame, 0)}
        for mark, x, y in self._numbers:
            picture = number_picture(values[mark], self._digits[mark], self._font)
            canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture


def _size_of(geometry: ImageGeometry, size: int | None, largest: int | None) -> tuple[int, int]:
    height = int(size or min(geometry.height_px, largest or geometry.height_px))
    return height, max(1, round(geometry.width_px * height / geometry.height_px))


def resized(image: Frame, size_px: tuple[int, int]) -> Frame:
    """Return an image (height, width, 3) uint8 at another (height, width)."""
    return np.asarray(Image.fromarray(image).resize(size_px[::-1], Image.Resampling.BILINEAR))
