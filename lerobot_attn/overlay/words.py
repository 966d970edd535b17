"""Words on an overlay's canvas: fonts, lines that fit, numbers that change. Knows no episode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lerobot_attn.figures.fonts import base_path, runs_of
from lerobot_attn.store.video import Frame

BACKGROUND, WHITE, GREY, AMBER = (18, 18, 18), (240, 240, 240), (170, 170, 170), (255, 190, 70)


class Letters:
    """Letters of one size for any text: the figures' font, and where that lacks one the machine's others.

    Attributes:
        size: height of an em, pixels.
        base: the font of Latin letters, numbers and most others.
    """

    def __init__(self, size_px: int):
        self.size = size_px
        self.base = _font(base_path(), size_px)

    def getlength(self, text: str) -> float:
        """Return how wide a line of text is, pixels."""
        return sum(_length_px(_font(run.path, self.size), run.text) for run in runs_of(text))

    def write(
        self, draw: ImageDraw.ImageDraw, at_px: tuple[float, float], text: str, colour: tuple[int, int, int]
    ) -> None:
        """Write one line of text.

        Args:
            draw: on what.
            at_px: (x, y) of the line's upper left corner, pixels.
            text: what.
            colour: red, green and blue, 0 to 255.
        """
        x, y = at_px
        baseline = y + self.base.getmetrics()[0]  # the fonts differ in how high they are above it
        for path, part in runs_of(text):
            font = _font(path, self.size)
            draw.text((x, baseline), part, colour, font, anchor="ls", direction=_direction(font))
            x += _length_px(font, part)


@lru_cache(maxsize=16)
def font_of(size_px: int) -> Letters:
    """Return the letters of a size."""
    return Letters(size_px)


@lru_cache(maxsize=64)
def _font(path: Path, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size_px)


def _length_px(font: ImageFont.FreeTypeFont, text: str) -> float:
    return font.getlength(text, direction=_direction(font))


def _direction(font: ImageFont.FreeTypeFont) -> str | None:
    """Return the direction of a line, in which words of other directions keep their own.

    Without it a line whose first word is Arabic would run from the right, its numbers and all. Pillow takes a
    direction only where it was built with Raqm.
    """
    return "ltr" if font.layout_engine == ImageFont.Layout.RAQM else None


@lru_cache(maxsize=4096)
def number_picture(value: int, digits: int, font: Letters) -> Frame:
    """Return a number, right-aligned: (height, width, 3) uint8."""
    width = math.ceil(font.getlength("0" * digits))
    picture = Image.new("RGB", (width, line_px(font)), BACKGROUND)
    ImageDraw.Draw(picture).text((width, 0), str(value), WHITE, font.base, anchor="ra")
    return np.asarray(picture)


def line_px(font: Letters) -> int:
    """Return the height of a line, pixels."""
    return math.ceil(font.size * 1.3)


def broken(
    parts: Sequence[str],
    separator: str,
    font: Letters,
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
