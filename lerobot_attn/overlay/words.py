"""Words on an overlay's canvas: fonts, lines that fit, numbers that change. Knows no episode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lerobot_attn.store.video import Frame

BACKGROUND, WHITE, GREY, AMBER = (18, 18, 18), (240, 240, 240), (170, 170, 170), (255, 190, 70)


@lru_cache(maxsize=16)
def font_of(size_px: int) -> ImageFont.FreeTypeFont:
    """Return the font of a size."""
    # Matplotlib brings it, so letters are the figures' and the same on every machine.
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size_px)


@lru_cache(maxsize=4096)
def number_picture(value: int, digits: int, font: ImageFont.FreeTypeFont) -> Frame:
    """Return a number, right-aligned: (height, width, 3) uint8."""
    width = math.ceil(font.getlength("0" * digits))
    picture = Image.new("RGB", (width, line_px(font)), BACKGROUND)
    ImageDraw.Draw(picture).text((width, 0), str(value), WHITE, font, anchor="ra")
    return np.asarray(picture)


def line_px(font: ImageFont.FreeTypeFont) -> int:
    """Return the height of a line, pixels."""
    return math.ceil(font.size * 1.3)


def broken(
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
