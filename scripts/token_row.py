#!/usr/bin/env python
"""Draw the README's picture of the token row: what Pi0.5 puts in a row, and which pass reads what.

    python scripts/token_row.py          # writes docs/images/token-row.svg

The numbers come from the full-size layout that the tests and benchmarks use. Widths are not to scale, because
200 slots of text beside 768 patches would leave no room to write.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

from lerobot_attn.synthetic import SyntheticPlan

FILE = Path(__file__).parent.parent / "docs" / "images" / "token-row.svg"
WIDTH_PX, HEIGHT_PX = 1000, 352
ROW_TOP_PX, ROW_PX = 112, 56
INK, GREY = "#1f2328", "#59636e"
IMAGE, EMPTY, TEMPLATE, TASK, STATE, ACTION = "#cfe3f7", "#f0f2f4", "#e6e8eb", "#fde3b5", "#d5ebd0", "#f6cfcf"


def text(x: float, y: float, words: str, *, px: int = 15, colour: str = INK, style: str = "") -> str:
    """Return centred words."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{px}" fill="{colour}" {style}>{escape(words)}</text>'


def box(x: float, width: float, colour: str, words: str, below: str = "") -> str:
    """Return a stretch of the row, with words in it and a second line below them."""
    middle = x + width / 2
    place = f'x="{x:g}" y="{ROW_TOP_PX}" width="{width:g}" height="{ROW_PX}"'
    rect = f'<rect {place} fill="{colour}" stroke="{INK}"/>'
    first = ROW_TOP_PX + ROW_PX / 2 + (5 if not below else -3)
    lines = [rect, text(middle, first, words, px=13)]
    if below:
        lines.append(text(middle, first + 19, below, px=12, colour=GREY))
    return "\n".join(lines)


def bracket(x: float, width: float, y: float, title: str, *lines: str) -> str:
    """Return a bracket below the row, and what it stands for."""
    middle = x + width / 2
    path = f'<path d="M{x:g} {y:g} v8 h{width:g} v-8" fill="none" stroke="{INK}" stroke-width="1.5"/>'
    words = [text(middle, y + 30, title, px=16, style='font-weight="bold"')]
    words += [text(middle, y + 52 + 19 * i, line, px=13, colour=GREY) for i, line in enumerate(lines)]
    return "\n".join([path, *words])


def arrow(x: float, to: float, height: float, colour: str, dash: str = "") -> str:
    """Return an arc above the row from the query that looks to the key that is looked at."""
    top = ROW_TOP_PX - 4
    path = f"M{x:g} {top} C{x:g} {top - height:g} {to:g} {top - height:g} {to:g} {top}"
    return (
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}" '
        f'marker-end="url(#{colour[1:]})"/>'
    )


def head(colour: str) -> str:
    """Return the arrow head of a colour."""
    return (
        f'<marker id="{colour[1:]}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
    )


def drawing() -> str:
    """Return the picture as SVG."""
    plan = SyntheticPlan.full_size()
    layout = plan.layout
    by_kind: dict[str, list[int]] = {}
    for segment in layout.segments:
        by_kind.setdefault(segment.kind, []).append(len(segment))
    patches, (slots,), (actions,) = by_kind["image"], by_kind["language"], by_kind["action"]
    grid = layout.cameras[0].geometry
    assert grid is not None
    cells = f"{grid.grid_rows} × {grid.grid_columns} patches"
    left, gap, suffix_width = 16, 16, 184
    widths = [
        (138, IMAGE, "first camera", cells),
        (138, IMAGE, "second camera", cells),
        (86, EMPTY, "no camera", "masked"),
        (50, TEMPLATE, "Task:", ""),
        (124, TASK, "pick up the soup", "words"),
        (60, TEMPLATE, ", State:", ""),
        (76, STATE, "128 97 …", "state"),
        (68, TEMPLATE, "; Action:", ""),
        (28, EMPTY, "…", ""),
    ]
    parts, x = [], float(left)
    starts = []
    for width, colour, words, below in widths:
        parts.append(box(x, width, colour, words, below))
        starts.append(x)
        x += width
    prefix_width, suffix = x - left, x + gap
    parts.append(box(suffix, suffix_width, ACTION, f"{actions} noisy actions", "action 0, action 1, …"))
    images_width = sum(width for width, *_ in widths[:3])
    parts.append(
        text(left + images_width / 2, ROW_TOP_PX + ROW_PX + 20, f"images: {sum(patches)} tokens", px=13)
    )
    text_middle = left + images_width + (prefix_width - images_width) / 2
    parts.append(
        text(
            text_middle,
            ROW_TOP_PX + ROW_PX + 20,
            f"the prompt as text: {slots} slots, the rest masked",
            px=13,
        )
    )
    parts.append(
        text(suffix + suffix_width / 2, ROW_TOP_PX + ROW_PX + 20, f"actions: {actions} tokens", px=13)
    )
    below = ROW_TOP_PX + ROW_PX + 34
    parts.append(
        bracket(
            left,
            prefix_width,
            below,
            f"prefix: {layout.prefix_len} tokens",
            "the vision-language model reads them once an inference;",
            "its keys and values of every layer are kept for the suffix",
        )
    )
    parts.append(
        bracket(
            suffix,
            suffix_width,
            below,
            f"suffix: {actions} tokens",
            "the action expert, once in each",
            f"of {plan.n_denoise_steps} denoise steps, from",
            "noise to actions",
        )
    )
    query = suffix + suffix_width / 2
    red, blue = "#cf222e", "#0969da"
    for start, (width, colour, *_), height in zip(starts, widths, range(108, 0, -9), strict=False):
        if colour in (IMAGE, TASK, STATE):  # one each is enough
            parts.append(arrow(query, start + width / 2, height, red))
    parts.append(arrow(query + 30, query + 62, 40, red))
    parts.append(arrow(starts[4] + 40, starts[1] + 100, 44, blue, "5 4"))
    parts.append(text(query, 22, "a query looks at keys", px=13, colour=red))
    legend = HEIGHT_PX - 38
    parts += [
        text(
            WIDTH_PX / 2,
            legend,
            "red: suffix attention, recorded by default; the weights of a query over all keys sum to 1",
            px=13,
            colour=red,
        ),
        text(
            WIDTH_PX / 2,
            legend + 22,
            "blue: prefix attention, recorded with prefix_layers; the prefix never looks at the actions",
            px=13,
            colour=blue,
        ),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" '
            f'width="{WIDTH_PX}" height="{HEIGHT_PX}" text-anchor="middle" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img">',
            "<title>The token row of Pi0.5: images, words, state and actions</title>",
            f"<defs>{head(red)}{head(blue)}</defs>",
            f'<rect width="{WIDTH_PX}" height="{HEIGHT_PX}" fill="#ffffff" rx="8"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def main() -> int:
    """Write the picture."""
    FILE.write_text(drawing(), encoding="utf-8")
    print(FILE.relative_to(FILE.parent.parent.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
