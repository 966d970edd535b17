"""What all figures share: their size and letters, the caption, colour bars, colours, and saving."""

from __future__ import annotations

import os
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from numpy.typing import ArrayLike, NDArray

from lerobot_attn.errors import RANDOM_WEIGHTS as RANDOM_WEIGHTS
from lerobot_attn.errors import ConfigError
from lerobot_attn.figures.fonts import BASE, drawable, families_for, missing_note, one_line
from lerobot_attn.figures.scale import (
    MISSING,
    UNSEEN,
    UNSEEN_HATCH,
    UNSEEN_HEX,
    UNSEEN_INK_HEX,
    colormap,
)

FORMATS = (".png", ".pdf", ".svg")
# Letters that a paper's column can carry, in points.
_STYLE: Any = {
    "font.family": BASE,
    # A dollar in an instruction is a dollar, and no formula begins with it.
    "text.parse_math": False,
    "text.usetex": False,
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "axes.linewidth": 0.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "lines.linewidth": 1,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # Letters stay letters.
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
_CAPTION_PT = 6.0
# Okabe and Ito's colours, which colour-blind readers tell apart: cameras in blues, the rest one hue each.
_CAMERAS = ("#0072B2", "#56B4E9", "#004466", "#99D0F0")
_MODALITIES = {
    "task": "#E69F00",
    "state": "#009E73",
    "template": "#999999",
    "scaffold": "#999999",  # the former name of template
    "special": "#666666",
    "text": "#CC79A7",
    "actions": "#D55E00",
    "decoded tokens": "#D55E00",
    "padding": "#DDDDDD",
}


@dataclass(frozen=True)
class Caption:
    """What a figure says of itself below.

    Attributes:
        facts: what was drawn: episode, frame, layer, head, step, normalisation, …; joined by dots.
        warning: set in red, e.g. that the weights are random.
        notes: what a reader has to know before reading the picture, e.g. that a video was missing or the
            prompt was cut; set in brown, a line or more each.
    """

    facts: Sequence[str]
    warning: str = ""
    notes: Sequence[str] = ()

    def lines(self, width_in: float) -> list[str]:
        """Return the facts as lines that fit the width."""
        return [line for line in _wrapped(self.facts, width_in) if line] or [""]


def _wrapped(facts: Iterable[str], width_in: float) -> list[str]:
    """Join facts by dots into lines that fit a width; a letter of Chinese is as wide as two of Latin."""
    columns = max(30, int(width_in * 72 / (_CAPTION_PT * 0.56)))
    lines = [""]
    for fact in (one_line(fact) for fact in facts if fact):
        joined = f"{lines[-1]} · {fact}" if lines[-1] else fact
        if _columns(joined) <= columns:
            lines[-1] = joined
        else:
            wide = _columns(fact) > len(fact)
            lines += textwrap.wrap(fact, int(0.42 * columns) if wide else columns)
    return lines


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


@contextmanager
def style() -> Iterator[None]:
    """Draw with the package's letters and lines; matplotlib's own settings come back."""
    with mpl.rc_context(_STYLE):
        yield


class CaptionedFigure(Figure):
    """A figure with a caption below, which `finish` writes when all other text is known.

    Attributes:
        caption: what is to be said.
        height_in: height besides the caption, inches.
    """

    def __init__(self, width_in: float, height_in: float, caption: Caption):
        super().__init__(figsize=(width_in, height_in), layout="constrained")
        self.caption, self.height_in = caption, height_in


def styled[**P, F: Figure](function: Callable[P, F]) -> Callable[P, F]:
    """Run a function that draws within `style`, and finish what it returns."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> F:
        with style():
            figure = function(*args, **kwargs)
            finish(figure)
            return figure

    return run


def new_figure(width_in: float, height_in: float, caption: Caption) -> Figure:
    """Return an empty figure that is `height_in` high besides its caption, inches; see `styled`."""
    return CaptionedFigure(width_in, height_in, caption)


def finish(figure: Figure) -> None:
    """Write the caption, and prepare every text of a figure for whatever people write in an instruction.

    No text is taken for a formula, and each is drawn by those fonts of the machine that have its letters. The
    caption says which scripts no font has; their letters are boxes.
    """
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    if isinstance(figure, CaptionedFigure):
        said = [*figure.caption.facts, *figure.caption.notes]
        letters = "".join([*said, *(text.get_text() for text in texts)])
        texts += _write_caption(figure, missing_note(letters))
    for text in texts:
        text.set_parse_math(False)
        content = text.get_text()
        if not content.isascii():
            text.set_text(drawable(content))
            text.set_fontfamily(families_for(content))


def _write_caption(figure: CaptionedFigure, note: str) -> list[Text]:
    caption, width_in = figure.caption, figure.get_figwidth()
    lines = [(line, "#444444") for line in caption.lines(width_in)]
    for text in (*caption.notes, note):
        lines += [(line, "#8A4B00") for line in _wrapped([text], width_in) if line]
    lines += [(line, "#B00020") for line in _wrapped([caption.warning], width_in) if line]
    below = (len(lines) * _CAPTION_PT * 1.35 + 4) / 72
    height = figure.height_in + below
    figure.set_size_inches(width_in, height)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, below / height, 1, 1 - below / height - 0.02 / height), w_pad=0.02, h_pad=0.03)
    line = _CAPTION_PT * 1.35 / 72 / height
    return [
        figure.text(
            0.01,
            (len(lines) - index - 0.2) * line + 2 / 72 / height,
            text,
            fontsize=_CAPTION_PT,
            color=color,
            va="top",
        )
        for index, (text, color) in enumerate(lines)
    ]


def colorbar(
    figure: Figure,
    axes: Any,
    cmap: str,
    vmin: float,
    vmax: float,
    label: str,
    *,
    clipped: bool = False,
    **where: Any,
) -> Axes:
    """Add a colour bar with its unit, and return its axes; an arrow says that some values lie beyond."""
    mappable = ScalarMappable(Normalize(vmin, vmax if vmax > vmin else vmin + 1), colormap(cmap))
    extend = {"extend": "max", "extendfrac": 0.025} if clipped else {}
    options = {"pad": 0.015, "aspect": 30, "shrink": 0.9, **extend, **where}
    bar = figure.colorbar(mappable, ax=axes, **options)
    bar.set_label(label)
    bar.outline.set_linewidth(0.5)
    return bar.ax


def modality_colors(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each modality: blues for the cameras, which are all names not known otherwise."""
    cameras = [name for name in names if name not in _MODALITIES]
    colors = {name: _CAMERAS[index % len(_CAMERAS)] for index, name in enumerate(cameras)}
    return {name: colors.get(name) or _MODALITIES[name] for name in names}


def largest(values: ArrayLike) -> float:
    """Return the largest of values that are not negative; 0 where all are missing (NaN)."""
    found = np.asarray(values)
    return float(found[np.isfinite(found)].max(initial=0))


def say_missing(axes: Axes, values: ArrayLike) -> None:
    """Write into axes that they show nothing because every value is missing (NaN), if it is so."""
    if is_missing(values):
        axes.text(
            0.5, 0.5, MISSING, ha="center", va="center", color="#444444", transform=axes.transAxes, wrap=True
        )


def is_missing(values: ArrayLike) -> bool:
    """Return whether there are values, and every one of them is missing (NaN)."""
    found = np.asarray(values)
    return found.size > 0 and not np.isfinite(found).any()


def unseen_cells(values: ArrayLike, axis: int = -1) -> NDArray[np.bool_]:
    """Return which values are absent because a layer cannot see the token, bool of the same shape.

    A missing map is NaN at all of its tokens; a layer that cannot see some of them is NaN at those alone.

    Args:
        values: shares, the tokens of one map lying along an axis.
        axis: that axis.
    """
    absent = np.isnan(np.asarray(values, float))
    unseen: NDArray[np.bool_] = absent & ~absent.all(axis=axis, keepdims=True)
    return unseen


def unseen_box(left: float, bottom: float, width: float, height: float, **options: Any) -> Rectangle:
    """Return the hatched box that stands for what a layer cannot see."""
    return Rectangle(
        (left, bottom),
        width,
        height,
        facecolor=UNSEEN_HEX,
        edgecolor=UNSEEN_INK_HEX,
        hatch=UNSEEN_HATCH,
        linewidth=0,
        **options,
    )


def mark_unseen_bars(axes: Axes, values: ArrayLike) -> None:
    """Mark those of horizontal bars, at 0, 1, …, that have no length because the layer cannot see them."""
    for place in np.flatnonzero(unseen_cells(values)):
        axes.add_patch(unseen_box(0, place - 0.4, 1, 0.8, transform=axes.get_yaxis_transform()))
        axes.text(
            0.5,
            place,
            UNSEEN,
            ha="center",
            va="center",
            fontsize=5.5,
            color="#444444",
            transform=axes.get_yaxis_transform(),
        )


def store_name(path: object) -> str:
    """Return how captions call a store: its folder and its name, "libero_object_4/episode_00000"."""
    text = str(path)
    where: PurePath = PurePosixPath(text) if "://" in text else Path(text).absolute()
    name = where.name.removesuffix(".zip") if where.name.endswith(".zarr.zip") else where.name  # packed
    return "/".join(part for part in (where.parent.name, PurePath(name).stem) if part)


def check_format(path: str | Path) -> Path:
    """Return a path whose suffix is one that figures are written in.

    Raises:
        ConfigError: another suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"{path}: cannot write {path.suffix or 'no suffix'!r}, expected {', '.join(FORMATS)}"
        )
    return path


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 200) -> Path:
    """Write a figure as PNG, PDF or SVG, by the file's suffix; folders are made.

    Raises:
        ConfigError: another suffix, or the file cannot be written.
    """
    path = check_format(path)
    # Short, because the name that was asked for may be as long as a file system allows.
    temporary = path.with_name(f".{os.getpid()}.new{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with style():
            figure.savefig(temporary, dpi=dpi, format=path.suffix[1:].lower())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the figure: {error.strerror or error}") from error
    finally:
        # Where a file stands in the folder's place there is nothing to remove, and the error above to show.
        with suppress(OSError):
            temporary.unlink()
    return path
