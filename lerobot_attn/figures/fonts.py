"""Fonts for any text: which fonts of this machine have its letters, and which scripts no font has.

Figures and overlays both ask here. Knows no figure; finds what fonts hold by their own tables of characters.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font

BASE = "DejaVu Sans"  # comes with matplotlib
# Comes with matplotlib too, and has a box with a sample letter of its script for every character: what no
# other font has is seen to be there, and matplotlib has nothing to warn of.
LAST_RESORT = "Last Resort High-Efficiency"
# Package to install, by script; Debian's names, which others resemble.
_PACKAGES = {
    "Han": "fonts-noto-cjk",
    "Hiragana": "fonts-noto-cjk",
    "Katakana": "fonts-noto-cjk",
    "Hangul": "fonts-noto-cjk",
    "symbols": "fonts-symbola",
}
# First words of Unicode's character names that do not name the script.
_SCRIPTS = {"CJK": "Han", "KANGXI": "Han", "IDEOGRAPHIC": "Han", "HALFWIDTH": "Katakana", "FULLWIDTH": "Han"}


class FontFile(NamedTuple):
    """A font of this machine: its family as matplotlib calls it, and its file."""

    family: str
    path: Path


class Run(NamedTuple):
    """A part of a text that one font draws: the font's file, and the part."""

    path: Path
    text: str


def fonts_for(text: str) -> list[FontFile]:
    """Return fonts that together have the letters of a text, the first one being `BASE`.

    Args:
        text: anything; letters that no font of this machine has are not covered, see `missing_scripts`.
    """
    return list(_chosen(frozenset(text) - _characters(str(base_path()))))


def families_for(text: str) -> list[str]:
    """Return the families of `fonts_for`, and `LAST_RESORT`, as matplotlib's fallback list takes them."""
    return [*(font.family for font in fonts_for(text)), LAST_RESORT]


def runs_of(text: str) -> list[Run]:
    """Cut a text into parts that one font draws each, for what has no fallback of its own, as Pillow.

    A letter has the first of `fonts_for` that holds it; a letter that none holds has `LAST_RESORT`, whose box
    shows a sample of its script. Blanks and marks stay in the font of the letter before them if it holds
    them, and joiners that no font holds are dropped, because nothing is to be seen of them.

    Args:
        text: one line.

    Returns:
        The parts in their order; together they are the text without the joiners.
    """
    fonts = [font.path for font in fonts_for(text)]
    runs: list[Run] = []
    for character in text:
        holders = [path for path in fonts if character in _characters(str(path))]
        follows = _is_invisible(character) or unicodedata.category(character)[0] == "M"
        if not holders and _is_invisible(character):
            continue
        before = runs[-1].path if runs else None
        path = holders[0] if holders else _font_path("LastResortHE-Regular.ttf")
        if before in holders and follows:
            path = before
        if path == before:
            runs[-1] = Run(path, runs[-1].text + character)
        else:
            runs.append(Run(path, character))
    return runs


def missing_scripts(text: str) -> list[str]:
    """Return the scripts of letters that no font of this machine has, e.g. ["Han"]; usually empty."""
    unknown = frozenset(text) - _characters(str(base_path()))
    for font in _chosen(unknown):
        unknown -= _characters(str(font.path))
    scripts = (_script(character) for character in sorted(unknown) if not _is_invisible(character))
    return list(dict.fromkeys(scripts))


def missing_note(text: str) -> str:
    """Say which scripts of a text no font of this machine has, and what to install; "" if none."""
    scripts = missing_scripts(text)
    if not scripts:
        return ""
    packages = dict.fromkeys(_PACKAGES.get(script, "fonts-noto-core") for script in scripts)
    return f"no font on this machine has: {', '.join(scripts)}; install e.g. {', '.join(packages)}"


def drawable(text: str) -> str:
    """Return a text as fonts can draw it: control characters are blanks, halves of characters are "�".

    Line breaks stay. A recording's text may hold anything, and matplotlib stops at half a surrogate pair.
    """
    return "".join(
        character
        if character == "\n" or unicodedata.category(character) not in ("Cc", "Cs")
        else "�"
        if "\ud800" <= character <= "\udfff"
        else " "
        for character in text
    )


def one_line(text: str, most: int | None = None) -> str:
    """Return a text drawable in one line, blanks and line breaks being single blanks.

    Args:
        text: anything.
        most: characters to keep; of a longer text the middle gives way to "…".
    """
    line = " ".join(drawable(text).split())
    if most is None or len(line) <= most:
        return line
    head = (most - 1) * 2 // 3
    return f"{line[:head]}…{line[len(line) - (most - 1 - head) :]}"


def is_right_to_left(text: str) -> bool:
    """Return whether a text runs from right to left: its first letter with a direction says it."""
    for character in text:
        direction = unicodedata.bidirectional(character)
        if direction in ("L", "R", "AL"):
            return direction != "L"
    return False


def _chosen(wanted: frozenset[str]) -> tuple[FontFile, ...]:
    # The number of fonts is part of the key because a program may add some at any time.
    return _fonts_for(wanted, len(fontManager.ttflist)) if wanted else (FontFile(BASE, base_path()),)


@lru_cache(maxsize=64)
def _fonts_for(wanted: frozenset[str], n_fonts: int) -> tuple[FontFile, ...]:
    """Choose fonts greedily: of those that have most of what is left, the plainest one."""
    chosen = [FontFile(BASE, base_path())]
    left = frozenset(character for character in wanted if not _is_invisible(character))
    while left:
        best, most = None, 0
        for font in _plain_fonts():
            covered = len(left & _characters(str(font.path)))
            if covered > most:
                best, most = font, covered
        if best is None:
            break
        chosen.append(best)
        left -= _characters(str(best.path))
    return tuple(chosen)


def _plain_fonts() -> list[FontFile]:
    """Return one font a family, upright, of usual weight and of scalable outlines; sans serifs first."""
    files: dict[str, FontFile] = {}
    entries = sorted(
        (entry for entry in fontManager.ttflist if entry.style == "normal" and entry.size == "scalable"),
        key=lambda entry: (
            not entry.name.startswith("Noto Sans"),
            "Sans" not in entry.name,
            abs(_weight(entry.weight) - 400),
            entry.name,
        ),
    )
    for entry in entries:
        # Those of mathematics hold letters of their own at places that Unicode leaves to private use.
        if not entry.name.startswith(("Last Resort", "STIX", "cm")):
            files.setdefault(entry.name, FontFile(entry.name, Path(entry.fname)))
    return list(files.values())


def _weight(weight: object) -> int:
    return weight if isinstance(weight, int) else 400


@lru_cache(maxsize=512)
def _characters(path: str) -> frozenset[str]:
    """Return the characters that a font has; none if it cannot be read or holds bitmaps alone."""
    try:
        font = FT2Font(path)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def base_path() -> Path:
    """Return the file of `BASE`."""
    return _font_path("DejaVuSans.ttf")


@lru_cache(maxsize=2)
def _font_path(name: str) -> Path:
    """Return the file of a font that comes with matplotlib."""
    return Path(mpl.get_data_path()) / "fonts" / "ttf" / name


def _script(character: str) -> str:
    word = unicodedata.name(character, "").partition(" ")[0].partition("-")[0]
    if unicodedata.category(character)[0] in "SP" and word not in _SCRIPTS:
        return "symbols"
    return _SCRIPTS.get(word, word.capitalize() or "unassigned characters")


def _is_invisible(character: str) -> bool:
    """Return whether nothing is to be seen of a character: controls, joiners, variation selectors."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp") or (
        "\ufe00" <= character <= "\ufe0f"
    )
