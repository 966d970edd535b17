"""The colour scale of heatmaps: which colour a value has, and how opaque it lies over an image.

Figures, overlays and contact sheets paint with it, and the explorer's page is tested against `rgba_table`. It
knows values and colours only: where a range ends is `analysis.spatial.colour_range`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap, Normalize
from numpy.typing import NDArray

from lerobot_attn.errors import ConfigError

# Where a map is missing from the store: a grey that no usual map has, which begin at black or dark blue.
MISSING_RGB = (96, 96, 96)
# Where a layer cannot see a token: hatched, so that it looks neither like 0 nor like a missing map.
UNSEEN_HEX, UNSEEN_INK_HEX, UNSEEN_HATCH = "#E4E4E4", "#9A9A9A", "////"
UNSEEN = "not visible to this layer"
MISSING = "the map is missing from the store"


@dataclass(frozen=True)
class ColourScale:
    """Colours and opacities of values from `vmin` to `vmax`.

    A value is one of 256 steps; below `vmin` it has the first colour and beyond `vmax` the last, which a
    colour bar's arrow says. Over an image, opacity grows with the step's root from 0 to `alpha`: what is not
    attended to stays visible as it is, and small values show. The colour alone tells the value. A missing
    value (NaN) is transparent over an image and grey (`MISSING_RGB`) in a map without an image.

    Attributes:
        vmax: end of the range, in the values' unit; where it does not exceed `vmin`, every value has the
            first colour.
        colormap: a matplotlib name.
        alpha: opacity of the largest value over an image, 0 to 1.
        vmin: start of the range.
    """

    vmax: float
    colormap: str = "inferno"
    alpha: float = 0.6
    vmin: float = 0.0

    @property
    def norm(self) -> Normalize:
        """The range as matplotlib takes it, for images and colour bars of a figure."""
        return Normalize(self.vmin, self.vmax if self.vmax > self.vmin else self.vmin + 1)

    def colours(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the colours of (…) values: (…, 3) uint8; grey where a value is missing (NaN)."""
        colours = np.take(self._tables.colours, self.steps(values), axis=0, mode="clip")
        missing = np.isnan(values)
        if missing.any():
            colours[missing] = MISSING_RGB
        return colours

    def opacity(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return how opaque (…) values are over an image: (…), 0 to `alpha`; 0 where missing (NaN)."""
        opacity = self._tables.opacity / 255
        return np.where(np.isnan(values), 0, np.take(opacity, self.steps(values), mode="clip"))

    def rgba(self, values: NDArray[np.float32], *, opaque: bool = False) -> NDArray[np.uint8]:
        """Return pixels of (…) values: (…, 4) uint8; a missing one (NaN) is (0, 0, 0, 0).

        Args:
            values: of any shape.
            opaque: whether every value that is there hides what lies below, as in a map without an image.
        """
        steps = self.steps(values)
        colours = np.take(self._tables.colours, steps, axis=0, mode="clip")
        opacity = np.full(steps.shape, 255) if opaque else np.take(self._tables.opacity, steps, mode="clip")
        pixels = np.concatenate([colours, opacity[..., None].astype(np.uint8)], axis=-1)
        pixels[np.isnan(values)] = 0
        return pixels

    def over(self, image: NDArray[np.uint8], values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return an image (height, width, 3) uint8 with (height, width) values blended over it.

        Where a value is missing (NaN) the image stays as it is.
        """
        return blend(image, *self.weights(values))

    def weights(self, values: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """Return what `blend` wants for (…) values: two arrays (…, 3) uint16."""
        steps = self.steps(values)
        rest, weighted = (
            np.take(table, steps, axis=0, mode="clip") for table in (self._tables.rest, self._tables.weighted)
        )
        return rest, weighted

    def steps(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the step of each of (…) values, 0 to 255; missing ones (NaN) have the first."""
        span = self.vmax - self.vmin
        scaled = (np.asarray(values, np.float32) - np.float32(self.vmin)) * np.float32(
            255 / span if span > 0 else 0
        )
        # `fmax` turns NaN into the step that shows nothing of the map.
        return np.fmax(np.clip(scaled + 0.5, 0, 255), 0).astype(np.uint8)

    @property
    def _tables(self) -> _Tables:
        return _tables(self.colormap, self.alpha)


def blend(
    image: NDArray[np.uint8], rest: NDArray[np.uint16], weighted: NDArray[np.uint16]
) -> NDArray[np.uint8]:
    """Return an image (height, width, 3) uint8 with what `ColourScale.weights` returned over it."""
    blended = image * rest
    blended += weighted
    blended //= 255
    return blended.astype(np.uint8)


def rgba_table(
    colormaps: Iterable[str] = ("inferno", "viridis", "magma", "cividis", "gray"),
    alphas: Iterable[float | None] = (None, 0.3, 0.6, 0.7, 1.0),
) -> list[dict[str, Any]]:
    """Return values and their pixels, as plain JSON, for a painter in another language to be tested against.

    Args:
        colormaps: matplotlib names.
        alphas: opacities of the largest value; None is a map without an image, whose values are opaque.

    Returns:
        One mapping for each colour map, opacity and end of the range: `colormap`, `alpha` (None: opaque),
        `vmax`, `values` (numbers, None is a missing one) and `rgba` (four whole numbers 0 to 255 for each).
        Values lie below, on, within and beyond the range; a range that ends at 0 is among them.
    """
    ends = (1.0, 0.37, 0.0)
    table = []
    for name in colormaps:
        for alpha in alphas:
            for vmax in ends:
                span = vmax or 1.0
                # Halfway between two steps a rounding decides, which is not what the test is for.
                shares = np.concatenate([[-0.2], np.arange(0, 256, 5) / 255, [1.0, 1.5, np.nan]])
                values = (shares * span).astype(np.float32)
                scale = ColourScale(vmax, name, 1.0 if alpha is None else alpha)
                table.append(
                    {
                        "colormap": name,
                        "alpha": alpha,
                        "vmax": vmax,
                        "values": [None if np.isnan(value) else float(value) for value in values],
                        "rgba": scale.rgba(values, opaque=alpha is None).tolist(),
                    }
                )
    return table


def colormap(name: str) -> Colormap:
    """Return a colour map by its name.

    Raises:
        ConfigError: matplotlib does not know it.
    """
    try:
        return mpl.colormaps[name]
    except KeyError as error:
        raise ConfigError(
            f"colormap {name!r}: unknown; expected a matplotlib name, e.g. inferno, viridis, magma, cividis"
        ) from error


class _Tables(NamedTuple):
    """What each of the 256 steps is painted with."""

    colours: NDArray[np.uint8]  # (256, 3) uint8
    opacity: NDArray[np.uint16]  # (256,) uint16, 0 to 255
    rest: NDArray[np.uint16]  # (256, 3) uint16: 255 less the opacity
    weighted: NDArray[np.uint16]  # (256, 3) uint16: colour times opacity


@lru_cache(maxsize=16)
def _tables(name: str, alpha: float) -> _Tables:
    values = np.arange(256) / 255
    colours = (colormap(name)(values)[:, :3] * 255).round().astype(np.uint8)
    # Halves are rounded up, as JavaScript's Math.round does: the page is held to the same numbers.
    opacity = np.floor(255 * alpha * np.sqrt(values) + 0.5).astype(np.uint16)
    column = opacity[:, None]
    # 127 rounds the division by 255; the sum stays below 2^16.
    return _Tables(colours, opacity, np.repeat(255 - column, 3, axis=1), colours * column + np.uint16(127))
