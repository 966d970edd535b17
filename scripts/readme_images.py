#!/usr/bin/env python
"""Draw the README's pictures anew from recorded episodes of the trained demo policy.

    python scripts/readme_images.py OUT SWAP FAILURE

OUT is a run of LIBERO's task 0, recorded with layers=all, prefix_layers=all and vision_layers=all: from its
first episode every kind of `lerobot-attn plot`, a contact sheet and an overlay. SWAP is what
examples/prompt_swap.py recorded: its first two episodes are compared. FAILURE is an episode that failed.
Small pictures, in docs/images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from lerobot_attn import open_episode, open_run
from lerobot_attn.figures import save_figure
from lerobot_attn.overlay import OverlaySettings, overlay_frames, write_overlay
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


def story(path: Path, frames: list[int]) -> Image.Image:
    """Return frames of an episode's overlay, two in a row."""
    settings = OverlaySettings(camera="image", size=300, frames=frames, normalisation="image")
    shown = [Image.fromarray(frame) for frame in overlay_frames(open_episode(path), settings)]
    width, height, gap = *shown[0].size, 12
    sheet = Image.new("RGB", (2 * width + gap, -(-len(shown) // 2) * (height + gap) - gap), "white")
    for index, picture in enumerate(shown):
        sheet.paste(picture, (index % 2 * (width + gap), index // 2 * (height + gap)))
    return sheet


def main() -> int:
    """Draw them all, and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("swap", type=Path)
    parser.add_argument("failure", type=Path)
    arguments = parser.parse_args()
    episode, swap = open_run(arguments.run)[0], open_run(arguments.swap)
    settings = {
        **dict.fromkeys(("image", "combined", "heads", "text", "vision"), PlotSettings(frames=0)),
        "cross-modal": PlotSettings(word="soup"),
    }
    figures = {kind: plot(episode, kind, settings.get(kind, PlotSettings())) for kind in KINDS}
    figures["comparison"] = comparison_figure([swap[0]], [swap[1]])
    figures["contact-sheet"] = contact_sheet(episode)
    for name, figure in figures.items():
        shrink(save_figure(figure, FOLDER / f"{name}.png", dpi=DPI))
    clip = OverlaySettings(size=224, frames=list(range(0, episode.n_frames, 3)), fps=8)
    write_overlay(episode, FOLDER / "overlay.gif", clip)
    story(arguments.failure, [0, 60, 120, 200]).save(FOLDER / "failure.jpg", quality=88)
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.stat().st_size / 1000:8.0f} kB  {path.relative_to(FOLDER.parent.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
