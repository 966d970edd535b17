"""Which token is what: segments of keys, and cameras and their geometry.

Pure data: knows neither torch nor LeRobot nor zarr, and holds no size of any policy. Adapters fill it in from
the live policy; the store carries it as JSON; analysis reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

# A store's layout may be anything: no policy has this many tokens, and no camera this many pixels a side.
_MAX_KEYS = 2**20
_MAX_PX = 2**16


class Kind(IntEnum):
    """What a key token is; the values of `key_kind` in the store."""

    PADDING = 0  # masked: an empty camera or an unused language slot; attention to it is exactly 0
    IMAGE = 1
    TASK = 2  # a word of the instruction
    STATE = 3  # a digit of the robot's state, or a state token
    TEMPLATE = 4  # the prompt's fixed words: "Task:", ", State:", ";\nAction:", begin-of-sequence
    SCAFFOLD = 4  # the former name of TEMPLATE
    ACTION = 5
    TEXT = 6  # language that could not be told apart (no tokenizer, or an unknown prompt format)
    SPECIAL = 7  # no patch, word or state: e.g. the tokens that begin and end an image


@dataclass(frozen=True)
class ImageGeometry:
    """How a camera's image became the square input of the vision tower, and its grid of patches.

    The image is resized by one factor to fit, then padded. All sizes in pixels; a point (y, x) of the image
    lies at `(pad_top_px + y * resized_height_px / height_px, …)` of the input. Where the policy sees a part
    of the image alone, the others lie beyond the input: above and left of it where the padding is below 0.
    """

    height_px: int
    width_px: int
    resized_height_px: int
    resized_width_px: int
    pad_top_px: int
    pad_left_px: int
    input_height_px: int
    input_width_px: int
    grid_rows: int
    grid_columns: int

    @classmethod
    def letterbox(
        cls,
        image_px: tuple[int, int],
        input_px: tuple[int, int],
        grid: tuple[int, int],
        *,
        padding: Literal["centred", "left_top"],
    ) -> ImageGeometry:
        """Compute the geometry of LeRobot's two letterboxes.

        Args:
            image_px: (height, width) of the camera's image.
            input_px: (height, width) of the vision tower's input.
            grid: (rows, columns) of patches.
            padding: "centred" for openpi's `resize_with_pad_torch`, the odd pixel going right and below;
                "left_top" for SmolVLA's `resize_with_pad`.
        """
        (height, width), (input_height, input_width) = image_px, input_px
        ratio = max(width / input_width, height / input_height)
        resized_height, resized_width = int(height / ratio), int(width / ratio)
        spare_height, spare_width = input_height - resized_height, input_width - resized_width
        centred = padding == "centred"
        return cls(
            height_px=height,
            width_px=width,
            resized_height_px=resized_height,
            resized_width_px=resized_width,
            pad_top_px=spare_height // 2 if centred else spare_height,
            pad_left_px=spare_width // 2 if centred else spare_width,
            input_height_px=input_height,
            input_width_px=input_width,
            grid_rows=grid[0],
            grid_columns=grid[1],
        )

    @classmethod
    def stretched(
        cls, image_px: tuple[int, int], input_px: tuple[int, int], grid: tuple[int, int]
    ) -> ImageGeometry:
        """Compute the geometry of an image whose height and width are resized to fit, each by its own factor.

        Args:
            image_px: (height, width) of the camera's image.
            input_px: (height, width) of the vision tower's input, which the image fills.
            grid: (rows, columns) of patches.
        """
        return cls(*image_px, *input_px, 0, 0, *input_px, *grid)

    def patch_at(self, y_px: float, x_px: float) -> tuple[int, int]:
        """Return the (row, column) of the patch that shows the image's point (y, x), both in pixels."""
        y_input = self.pad_top_px + y_px * self.resized_height_px / self.height_px
        x_input = self.pad_left_px + x_px * self.resized_width_px / self.width_px
        row = int(y_input * self.grid_rows / self.input_height_px)
        column = int(x_input * self.grid_columns / self.input_width_px)
        return min(max(row, 0), self.grid_rows - 1), min(max(column, 0), self.grid_columns - 1)


@dataclass(frozen=True)
class Camera:
    """One image feature of the policy, e.g. `observation.images.image`; an empty one has no geometry."""

    name: str
    geometry: ImageGeometry | None

    @property
    def is_empty(self) -> bool:
        """Whether the batch held no image for it, so that its tokens are masked."""
        return self.geometry is None


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return each name's short form: its shortest dotted end that no other of the names has.

    "images.left.rgb", "images.right.rgb", "images.wrist" → "left.rgb", "right.rgb", "wrist". A name that is
    the end of another one stays whole.
    """
    parts = {name: name.split(".") for name in names}

    def short(name: str, own: list[str]) -> str:
        others = [other for other_name, other in parts.items() if other_name != name]
        ends = (own[-n:] for n in range(1, len(own)))
        return ".".join(next((end for end in ends if all(o[-len(end) :] != end for o in others)), own))

    return {name: short(name, own) for name, own in parts.items()}


@dataclass(frozen=True)
class Segment:
    """A run of key tokens `start … stop - 1` of one kind.

    `kind` is "image", "language", "state", "action", "special" (tokens that are none of these, such as those
    that begin and end an image) or "padding" (slots that no query may attend to). `name` tells segments of a
    kind apart (a camera's name).
    """

    kind: str
    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def tiled(parts: Iterable[tuple[str, str, int]]) -> tuple[Segment, ...]:
    """Return segments that follow one another, given as (kind, name, number of tokens)."""
    segments, position = [], 0
    for kind, name, length in parts:
        segments.append(Segment(kind, name, position, position + length))
        position += length
    return tuple(segments)


# The kind of a segment's tokens; the tokens of a prompt are told apart by `prompt.label_text`.
_SEGMENT_KINDS = {
    "image": Kind.IMAGE,
    "language": Kind.TEXT,
    "state": Kind.STATE,
    "action": Kind.ACTION,
    "special": Kind.SPECIAL,
    "padding": Kind.PADDING,
}


# What the groups of tokens that are no camera's are called, where activations are reduced over them.
GROUP_OF_KIND = {
    Kind.TASK: "task",
    Kind.STATE: "state",
    Kind.TEMPLATE: "template",
    Kind.TEXT: "text",
    Kind.SPECIAL: "special",
}


@dataclass(frozen=True)
class TokenLayout:
    """The keys of the suffix pass in order: the prefix (images, language, state) and then the suffix.

    Queries of the suffix pass are its own tokens: query i is key `prefix_len + i`. The actions end it. Before
    them stands what the prefix pass has not seen: nothing, a state token (pi0), or cameras (X-VLA).
    """

    segments: tuple[Segment, ...]
    prefix_len: int
    cameras: tuple[Camera, ...]

    def __post_init__(self) -> None:
        """Check that the segments tile the keys.

        Raises:
            ValueError: a gap, an overlap, or a prefix that ends inside a segment.
        """
        position = 0
        for segment in self.segments:
            if segment.start != position or segment.stop < segment.start:
                raise ValueError(f"segments must follow one another: {segment} does not start at {position}")
            position = segment.stop
        if self.prefix_len not in {0, *(segment.stop for segment in self.segments)}:
            raise ValueError(f"prefix_len must be a segment's end, got {self.prefix_len}")

    @property
    def n_keys(self) -> int:
        """Number of key tokens of the suffix pass."""
        return self.segments[-1].stop if self.segments else 0

    @property
    def n_queries(self) -> int:
        """Number of query tokens of the suffix pass."""
        return self.n_keys - self.prefix_len

    @property
    def short_names(self) -> dict[str, str]:
        """Each camera's name and its short form, which tells it apart from the others."""
        return short_names(camera.name for camera in self.cameras)

    @property
    def language(self) -> Segment:
        """The language slots; empty when the policy has none."""
        return next((s for s in self.segments if s.kind == "language"), Segment("language", "language", 0, 0))

    @property
    def actions(self) -> Segment:
        """The action tokens, as keys."""
        return next(s for s in self.segments if s.kind == "action")

    @property
    def first_action_query(self) -> int:
        """Query index of the first action token: 0 unless the suffix begins with other tokens."""
        return self.actions.start - self.prefix_len

    @property
    def action_queries(self) -> slice:
        """The queries that are action tokens, in the order of the chunk."""
        return slice(self.first_action_query, self.first_action_query + len(self.actions))

    @overload
    def query_of_action(self, action: int) -> int: ...
    @overload
    def query_of_action(self, action: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]: ...
    def query_of_action(self, action: int | NDArray[np.integer[Any]]) -> int | NDArray[np.integer[Any]]:
        """Return the suffix query of an action of the chunk.

        Args:
            action: number(s) in the chunk, from 0 also where a state token opens the suffix.

        Raises:
            IndexError: the chunk has no such action.
        """
        self._check_actions(action)
        return action + self.first_action_query

    @overload
    def action_of_query(self, query: int) -> int: ...
    @overload
    def action_of_query(self, query: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]: ...
    def action_of_query(self, query: int | NDArray[np.integer[Any]]) -> int | NDArray[np.integer[Any]]:
        """Return the action of the chunk that a suffix query stands for; undoes `query_of_action`.

        Args:
            query: index or indices of action tokens among the suffix queries.

        Raises:
            IndexError: the query is no action token, e.g. the state token, or -1, which a store's
                `frame_query` holds where an action came from no token.
        """
        action = query - self.first_action_query
        self._check_actions(action)
        return action

    def _check_actions(self, action: int | NDArray[np.integer[Any]]) -> None:
        wrong = np.atleast_1d((np.asarray(action) < 0) | (np.asarray(action) >= len(self.actions)))
        if wrong.any():
            number = int(np.atleast_1d(action)[wrong.argmax()])
            raise IndexError(
                f"action {number} does not exist: a chunk has {len(self.actions)}, expected one of "
                f"0 to {len(self.actions) - 1}"
            )

    def key_camera(self) -> NDArray[np.int8]:
        """Return (key,) int8: index into `cameras`, -1 for tokens that are no image patch."""
        result = np.full(self.n_keys, -1, np.int8)
        for index, segment in enumerate(s for s in self.segments if s.kind == "image"):
            result[segment.start : segment.stop] = index
        return result

    def key_patch(self) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """Return the patch rows and columns, each (key,) int16: top-left is (0, 0), -1 for other tokens."""
        rows, columns = np.full(self.n_keys, -1, np.int16), np.full(self.n_keys, -1, np.int16)
        images = [s for s in self.segments if s.kind == "image"]
        for camera, segment in zip(self.cameras, images, strict=True):
            # An empty camera is tokenised like the others: its grid is theirs.
            geometry = camera.geometry or next((c.geometry for c in self.cameras if c.geometry), None)
            if geometry is None:
                continue
            patch = np.arange(len(segment))
            rows[segment.start : segment.stop] = patch // geometry.grid_columns
            columns[segment.start : segment.stop] = patch % geometry.grid_columns
        return rows, columns

    def key_kind(self, key_mask: NDArray[np.bool_], text_kind: NDArray[np.int8]) -> NDArray[np.int8]:
        """Label every key of one inference.

        Args:
            key_mask: (key,) bool, True where the policy may attend.
            text_kind: (text,) kinds of the language slots.

        Returns:
            (key,) int8 values of `Kind`.
        """
        result = np.concatenate([np.full(len(s), _SEGMENT_KINDS[s.kind], np.int8) for s in self.segments])
        result[self.language.start : self.language.stop] = text_kind
        result[~key_mask] = Kind.PADDING
        return result

    def prefix_groups(self, key_kind: NDArray[np.int8]) -> dict[str, NDArray[np.bool_]]:
        """Return the groups of prefix tokens over which a language model's activations are reduced.

        Args:
            key_kind: (…, key), values of `Kind`.

        Returns:
            name → (…, prefix) bool. First each camera of the prefix that showed an image, by its name, then
            the kinds of other tokens that are there, by the names of `GROUP_OF_KIND`. Padding is in no group.
        """
        kinds, cameras = key_kind[..., : self.prefix_len], self.key_camera()[: self.prefix_len]
        groups = {
            camera.name: (kinds == Kind.IMAGE) & (cameras == index)
            for index, camera in enumerate(self.cameras)
            if not camera.is_empty and (cameras == index).any()
        }
        others = {name: kinds == kind for kind, name in GROUP_OF_KIND.items()}
        return groups | {name: tokens for name, tokens in others.items() if tokens.any()}

    def suffix_groups(self, executed: slice) -> dict[str, slice]:
        """Return the groups of suffix tokens over which an action expert's activations are reduced.

        Args:
            executed: the queries whose actions are executed.

        Returns:
            name → queries: "state" where state tokens open the suffix, and "actions", the executed ones.
        """
        state = [s for s in self.segments if s.kind == "state" and s.start >= self.prefix_len]
        spans = [("state", slice(s.start - self.prefix_len, s.stop - self.prefix_len)) for s in state]
        return {**dict(spans), "actions": executed}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenLayout:
        """Build from what `to_dict` returned.

        Raises:
            KeyError, TypeError, ValueError: the values are not a layout.
        """
        layout = cls(
            segments=tuple(_segment(segment) for segment in values["segments"]),
            prefix_len=_whole(values["prefix_len"], "prefix_len", _MAX_KEYS),
            cameras=tuple(
                Camera(
                    _text(camera["name"], "a camera's name"),
                    None if camera["geometry"] is None else _geometry(camera["geometry"]),
                )
                for camera in values["cameras"]
            ),
        )
        names = [camera.name for camera in layout.cameras]
        if len(set(names)) != len(names):
            raise ValueError("two cameras have one name")
        if not any(segment.kind == "action" for segment in layout.segments):
            raise ValueError("no segment holds the action tokens")
        return layout


def _segment(values: dict[str, Any]) -> Segment:
    segment = Segment(**values)
    for name in ("start", "stop"):
        _whole(values[name], name, _MAX_KEYS)
    if _text(segment.kind, "a segment's kind") not in _SEGMENT_KINDS:
        raise ValueError(f"a segment's kind must be one of {', '.join(_SEGMENT_KINDS)}")
    _text(segment.name, "a segment's name")
    return segment


def _geometry(values: dict[str, Any]) -> ImageGeometry:
    geometry = ImageGeometry(**values)
    for name, value in values.items():
        # What is padded away entirely has no pixel left, and what is cut off lies before the input; the
        # others are divided by.
        least = -_MAX_PX if name.startswith("pad_") else 0 if name.startswith("resized_") else 1
        _whole(value, name, _MAX_PX, least=least)
    return geometry


def _whole(value: Any, name: str, most: int, *, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got a {type(value).__name__}")
    return value
