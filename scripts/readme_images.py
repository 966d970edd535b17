#!/usr/bin/env python
"""Draw the README's pictures anew from a recorded run.

    python scripts/readme_images.py OUT [--other OUT2]

Every kind of `lerobot-attn plot` from the run's first episode (record it with layers=all and
prefix_layers=all), a comparison with the other run's first episode, a contact sheet and an overlay; small, in
docs/images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from lerobot_attn import open_run
from lerobot_attn.figures import save_figure
from lerobot_attn.overlay import OverlaySettings, write_overlay
from lerobot_attn.plot import KINDS, PlotSettings, plot
from lerobot_attn.report import comparison_figure
from lerobot_attn.verify import contact_sheet

FOLDER = Path(__file__).parent.parent / "docs" / "images"
DPI = 120


CHARTS = ("text", "evolution", "actions", "timeline")


def shrink(path: Path) -> None:
    """Make a JPEG of what shows camera images; charts stay as they are."""
    if path.stem not in CHARTS:
        with Image.open(path) as image:
            image.convert("RGB").save(path.with_suffix(".jpg"), quality=88, optimize=True)
        path.unlink()


def main() -> int:
    """Draw them all, and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--other", type=Path, help="another run, for the comparison; default: the same")
    arguments = parser.parse_args()
    episode = open_run(arguments.run)[0]
    other = open_run(arguments.other)[0] if arguments.other else open_run(arguments.run)[1]
    figures = {
        kind: plot(episode, kind, PlotSettings(word="soup" if kind == "cross-modal" else None))
        for kind in KINDS
    }
    figures["comparison"] = comparison_figure([episode], [other])
    figures["contact-sheet"] = contact_sheet(episode)
    for name, figure in figures.items():
        shrink(save_figure(figure, FOLDER / f"{name}.png", dpi=DPI))
    clip = OverlaySettings(size=224, frames=list(range(0, episode.n_frames, 3)), fps=8)
    write_overlay(episode, FOLDER / "overlay.gif", clip)
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.stat().st_size / 1000:8.0f} kB  {path.relative_to(FOLDER.parent.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
