"""Outlines of the objects that a mask shows, with a colour and dashes for each role.

`ROLE_LOOKS` says each role's colour: overlays and figures take it from there, and the explorer's page
has the same (a test compares them). Knows masks and pictures, not attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from lerobot_attn.analysis.spatial import Mask
from lerobot_attn.masks import Role


class RoleLook(NamedTuple):
    """How a role's outline looks: its colour, the colour's name, and dashes as matplotlib takes them."""

    colour: str
    name: str
    dashes: tuple[float, ...] = ()  # none: a whole line


# None of the usual heatmaps' colours; readers of every kind of colour blindness tell them apart, and by the
# dashes who sees no colours at all. The background is not outlined.
ROLE_LOOKS: dict[Role, RoleLook] = {
    "target": RoleLook("#1E9BDC", "blue"),
    "destination": RoleLook("#AA00FF", "violet", (5, 2)),
    "distractor": RoleLook("#808080", "grey", (1.5, 1.5)),
    "robot": RoleLook("#C08A4E", "brown", (6, 2, 1.5, 2)),
}
_CASING = "#FFFFFF"
_LINE_PT, _CASING_PT = 1.0, 0.6


class Painted(NamedTuple):
    """Pixels of outlines: their places in the flattened image, and (pixel, 3) uint8 colours."""

    places: NDArray[np.intp]
    colours: NDArray[np.uint8]

    def onto(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return an image (height, width, 3) with the outlines in it."""
        painted = image.copy()
        painted.reshape(-1, 3)[self.places] = self.colours
        return painted


def draw_outlines(axes: Axes, mask: Mask, size_px: tuple[int, int]) -> None:
    """Draw the outlines over an image.

    Args:
        axes: where the image is.
        mask: what to outline; one of another size is scaled to the image.
        size_px: (height, width) of the image.
    """
    instance_of_pixel = mask.instance_of_pixel
    height, width = instance_of_pixel.shape
    y = (np.arange(height) + 0.5) * size_px[0] / height - 0.5
    x = (np.arange(width) + 0.5) * size_px[1] / width - 0.5
    for number, look in _outlined(mask).items():
        inside = (instance_of_pixel == number).astype(np.float32)
        if min(inside.shape) < 2 or inside.all():
            continue
        lines = axes.contour(
            x,
            y,
            inside,
            levels=[0.5],
            colors=[look.colour],
            linewidths=_LINE_PT,
            linestyles=[(0, look.dashes)] if look.dashes else "solid",
        )
        lines.set_path_effects([withStroke(linewidth=_LINE_PT + 2 * _CASING_PT, foreground=_CASING)])


def painted_outlines(mask: Mask, size_px: tuple[int, int]) -> Painted:
    """Return the outlines as pixels of an image, each inside its object, with a white line beside it.

    A line is as thick as an eightieth of the image's height, two pixels at least.

    Args:
        mask: what to outline; one of another size is scaled to the image.
        size_px: (height, width) of the image.
    """
    line = max(2, round(size_px[0] / 80))
    instance_of_pixel = _resized(mask.instance_of_pixel, size_px)
    y, x = np.indices(size_px)
    colours = np.zeros((*size_px, 3), np.uint8)
    is_painted = np.zeros(size_px, bool)
    for number, look in _outlined(mask).items():
        inside = instance_of_pixel == number
        inner = _eroded(inside, line)
        edge, casing = inside & ~inner, inner & ~_eroded(inner, max(1, line // 3))
        if look.dashes:
            dash = round(line * max(1.5, look.dashes[0] / 1.5))
            is_dash = (x // dash + y // dash) % 2 == 0
            edge, casing = edge & is_dash, casing & is_dash
        colours[casing] = 255
        colours[edge] = [int(look.colour[i : i + 2], 16) for i in (1, 3, 5)]
        is_painted |= edge | casing
    places = np.flatnonzero(is_painted)
    return Painted(places, colours.reshape(-1, 3)[places])


def outlines_in_words(masks: Iterable[Mask], *, names: bool = True) -> str:
    """Say which outline is which: "outlines: target blue (soup_1), robot brown"; "" where there are none.

    Args:
        masks: what is outlined.
        names: whether to name the objects; their number where there are more than two of a role.
    """
    shown: dict[str, dict[str, None]] = {}
    for mask in masks:
        for number in _outlined(mask):
            instance = mask.instances[number]
            shown.setdefault(instance.role, {})[instance.name] = None
    parts = []
    for role, look in ROLE_LOOKS.items():
        if role in shown:
            of_role = [name for name in shown[role] if name != role]
            said = ", ".join(of_role) if len(of_role) < 3 else f"{len(of_role)} objects"
            parts.append(f"{role} {look.name}" + (f" ({said})" if names and said else ""))
    return f"outlines: {', '.join(parts)}" if parts else ""


def _outlined(mask: Mask) -> dict[int, RoleLook]:
    """Return the instances that are in view and outlined; targets come last, so they lie above the others."""
    present = set(np.unique(mask.instance_of_pixel).tolist())
    order = [*ROLE_LOOKS]
    found = [
        (order.index(instance.role), number)
        for number, instance in enumerate(mask.instances)
        if instance.role in order and number in present
    ]
    return {number: ROLE_LOOKS[order[place]] for place, number in sorted(found, reverse=True)}


def _resized(mask: NDArray[np.int16], size_px: tuple[int, int]) -> NDArray[np.int16]:
    """Return a mask at another size: of each pixel what lies at its centre."""
    rows, columns = (
        ((np.arange(wanted) + 0.5) * there / wanted).astype(int)
        for wanted, there in zip(size_px, mask.shape, strict=True)
    )
    resized: NDArray[np.int16] = mask[rows][:, columns]
    return resized


def _eroded(inside: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """Return a shape without a rim of so many pixels; outside the image lies nothing of it."""
    left = inside
    for _ in range(by):
        padded = np.pad(left, 1)
        left = left & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return left
