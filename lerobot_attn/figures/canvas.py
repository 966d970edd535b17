"""What all figures share: their size and letters, the caption, colour bars, colours, and saving."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from lerobot_attn.errors import RANDOM_WEIGHTS as RANDOM_WEIGHTS
from lerobot_attn.errors import ConfigError
from lerobot_attn.figures.scale import MISSING, colormap

FORMATS = (".png", ".pdf", ".svg")
# Letters that a paper's column can carry, in points.
_STYLE: Any = {
    "font.family": "DejaVu Sans",
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
    "scaffold": "#999999",
    "text": "#CC79A7",
    "actions": "#D55E00",
    "padding": "#DDDDDD",
}


@dataclass(frozen=True)
class Caption:
    """What a figure says of itself below.

    Attributes:
        facts: what was drawn: episode, frame, layer, head, step, normalisation, …; joined by dots.
        warning: set in red, e.g. that the weights are random.
    """

    facts: Sequence[str]
    warning: str = ""

    def lines(self, width_in: float) -> list[str]:
        """Return the facts as lines that fit the width."""
        characters = max(30, int(width_in * 72 / (_CAPTION_PT * 0.56)))
        lines = [""]
        for fact in (fact for fact in self.facts if fact):
            joined = f"{lines[-1]} · {fact}" if lines[-1] else fact
            if len(joined) <= characters:
                lines[-1] = joined
            else:
                lines += textwrap.wrap(fact, characters)
        return [line for line in lines if line] or [""]


@contextmanager
def style() -> Iterator[None]:
    """Draw with the package's letters and lines; matplotlib's own settings come back."""
    with mpl.rc_context(_STYLE):
        yield


def styled[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Run a function that draws within `style`."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with style():
            return function(*args, **kwargs)

    return run


def new_figure(width_in: float, height_in: float, caption: Caption) -> Figure:
    """Return an empty figure that is `height_in` high besides its caption, inches."""
    lines = caption.lines(width_in)
    n_lines = len(lines) + bool(caption.warning)
    below = (n_lines * _CAPTION_PT * 1.35 + 4) / 72
    height = height_in + below
    figure = Figure(figsize=(width_in, height), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, below / height, 1, 1 - below / height - 0.02 / height), w_pad=0.02, h_pad=0.03)
    line = _CAPTION_PT * 1.35 / 72 / height
    for index, text in enumerate(lines):
        y = (n_lines - index - 0.2) * line
        figure.text(0.01, y, text, fontsize=_CAPTION_PT, color="#444444", va="top")
    if caption.warning:
        figure.text(
            0.01,
            0.8 * line,
            caption.warning,
            fontsize=_CAPTION_PT,
            color="#B00020",
            va="top",
        )
    return figure


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
    temporary = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with style():
            figure.savefig(temporary, dpi=dpi)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the figure: {error.strerror or error}") from error
    finally:
        # Where a file stands in the folder's place there is nothing to remove, and the error above to show.
        with suppress(OSError):
            temporary.unlink()
    return path
