"""What the kinds of figures share: which frames, cameras and pictures the settings mean. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lerobot_attn import analysis
from lerobot_attn.analysis.select import frames_of, seen_frame
from lerobot_attn.analysis.spatial import NORMALISATIONS, ColourRange, Mask, masks_at
from lerobot_attn.errors import SelectionError
from lerobot_attn.figures.canvas import Caption
from lerobot_attn.figures.outlines import outlines_in_words
from lerobot_attn.layout import ImageGeometry
from lerobot_attn.plot.cameras import camera_pictures
from lerobot_attn.plot.settings import PlotSettings
from lerobot_attn.settings import is_number
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.video import Frame

NO_IMAGE = "no camera image"


def chosen_frames(episode: Episode, settings: PlotSettings) -> Any:
    """Return the frames asked for, or the one whose image the middle frame's inference saw."""
    if settings.frames is None:
        return seen_frame(episode.arrays, episode.n_frames // 2)
    return settings.frames


def one_frame(episode: Episode, settings: PlotSettings) -> int:
    """Return the frame of a kind that shows one.

    Raises:
        SelectionError: several were asked for, or one that does not exist.
    """
    frames = np.atleast_1d(frames_of(episode.arrays, chosen_frames(episode, settings)))
    if len(frames) != 1:
        raise SelectionError(f"this kind shows one frame, got {len(frames)}; choose one with frames=12")
    return int(frames[0])


def chosen_cameras(episode: Episode, settings: PlotSettings) -> Sequence[str]:
    """Return the cameras asked for, or all that showed an image."""
    return settings.cameras or analysis.camera_names(episode.arrays)


class View(NamedTuple):
    """What a camera showed at some frames."""

    camera: str  # its full name
    label: str  # its short name
    geometry: ImageGeometry
    images: list[Frame]  # (height, width, 3) uint8 each
    notes: list[str]  # of each image, said beside it; "" for none
    reason: str  # why images are blank; "" if none is
    masks: list[Mask | None]  # of the objects to outline in each image; None: none


def views_of(
    episode: Episode, settings: PlotSettings, frames: Sequence[int], *, outlines: bool = False
) -> list[View]:
    """Return what the chosen cameras showed at some frames; with `outlines` also where objects were."""
    views = []
    inferences = episode.arrays["frame_inference"].values[list(frames)].tolist()
    for camera in chosen_cameras(episode, settings):
        name, geometry, _ = analysis.camera_geometry(episode.arrays, camera)
        images, is_blank, reason = camera_pictures(episode, name, frames)
        notes = [NO_IMAGE if blank else "" for blank in is_blank]
        masks = masks_at(episode.arrays, name, frames) if outlines and settings.outlines else {}
        of_frames = [masks.get(inference) for inference in inferences]
        label = episode.layout.short_names[name]
        views.append(View(name, label, geometry, images, notes, reason, of_frames))
    return views


def reasons(views: Sequence[View]) -> list[str]:
    """Say why images are blank, cameras of one reason together."""
    cameras: dict[str, list[str]] = {}
    for view in views:
        cameras.setdefault(view.reason, []).append(view.label)
    return [f"{', '.join(names)}: {reason}" for reason, names in cameras.items() if reason]


def with_outlines(caption: Caption, views: Sequence[View]) -> Caption:
    """Return a caption that also says which outlines mean what, where there are any."""
    masks = (mask for view in views for mask in view.masks if mask is not None)
    return replace(caption, facts=[*caption.facts, outlines_in_words(masks)])


def look(settings: PlotSettings, shown: ColourRange, *, of: str = "all attention") -> dict[str, Any]:
    """Return how figures with images colour them, as arguments of such a figure.

    Args:
        settings: of the plot.
        shown: the range of the colours.
        of: of what attention the values are shares, where they are not of all.
    """
    return {
        "vmax": shown.vmax,
        "clipped": shown.clipped,
        "unit": NORMALISATIONS[settings.normalisation].replace("all attention", of),
        "cmap": settings.colormap,
        "alpha": settings.alpha,
        "width_in": settings.width,
    }


def is_single(value: Any) -> bool:
    """Return whether a choice means one map: a number, a mean or a maximum."""
    return value in ("mean", "max") if isinstance(value, str) else is_number(value)


def listed(choice: Any) -> Any:
    """Return a number as a list of one, so that its dimension stays; other choices as they are."""
    return [choice] if is_number(choice) else choice
