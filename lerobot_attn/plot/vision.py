"""The figure of the vision tower: what goes together with a patch of a camera's image, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from lerobot_attn import analysis, figures
from lerobot_attn.analysis.spatial import colour_range, normalised, percentile_of
from lerobot_attn.analysis.vision import Patch, VisionCamera, VisionWhere
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import ImageGeometry
from lerobot_attn.plot.cameras import on_image
from lerobot_attn.plot.caption import caption_of
from lerobot_attn.plot.choices import is_single, listed, look, one_frame, reasons, views_of
from lerobot_attn.plot.settings import PEAK, PlotSettings
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.video import Frame

_MARK = (0, 255, 255)  # colour of the line around the patch


def vision_kind(episode: Episode, settings: PlotSettings) -> Callable[[], Figure]:
    """Read what patches attend to in each camera's image, and return what draws it.

    Args:
        episode: recorded with vision layers.
        settings: `patch` says whose attention; `layers` and `heads` are those of the vision tower, and one of
            the two may be several, which stand side by side.

    Raises:
        SelectionError: vision attention was not captured, or no such patch, layer, …
    """
    data, frame = episode.arrays, one_frame(episode, settings)
    layers: Any = "all" if settings.layers is None else settings.layers
    heads: Any = "mean" if settings.heads is None else settings.heads
    along = "vision_layer" if is_single(heads) else "vision_head"
    if along == "vision_head" and not is_single(layers):
        raise SelectionError(
            f"this kind shows several layers or several heads, got layers {layers!r} and heads {heads!r}; "
            "choose one layer with layers=-1"
        )
    where: VisionWhere = {"frame": frame, "layer": listed(layers), "head": heads}
    if along == "vision_head":
        where |= {"layer": layers, "head": listed(heads)}
    groups, maps, ends = [], [], []
    views = views_of(episode, settings, [frame])
    for view in views:
        camera = analysis.vision_geometry(data, view.camera)
        patch = _peak(episode, camera, frame) if settings.patch in (None, PEAK) else settings.patch
        found = analysis.attention_from_patch(data, patch, view.camera, **where).load()
        heat = normalised(found, settings.normalisation)
        maps.append(heat)
        if settings.normalisation == "episode":
            every: VisionWhere = {**where, "frame": None, "inference": "all"}
            ends.append(
                percentile_of(
                    analysis.attention_from_patch(episode.dataset, patch, view.camera, **every), settings.clip
                )
            )
        (image,), (note,) = view.images, view.notes
        several = heat if along in heat.dims else heat.expand_dims(along)
        pixels = on_image(several, camera.geometry, image, settings)
        word = along.removeprefix("vision_")
        labels = several[along].values.tolist() if along in several.coords else []
        titles = [f"{word} {label}" for label in labels] or [f"{layers} of {word}s"]
        label = f"{view.label}, {_in_words(patch)}"
        groups.append(
            figures.Group(
                label,
                _marked(image, patch, camera.geometry, settings),
                [figures.Panel(pixel, title) for pixel, title in zip(pixels, titles, strict=True)],
                note,
            )
        )
    shown = colour_range(maps, settings.normalisation, clip=settings.clip, episode_ends=ends)
    is_peak = settings.patch in (None, PEAK)
    query = "the patches that the actions look at most" if is_peak else found.attrs["query"]
    chosen = {**found.attrs, "query": query}
    left = "layer" if along == "vision_layer" else "head"
    facts = caption_of(episode, chosen, settings, [frame], image=False, leave=left, notes=reasons(views))
    return partial(
        figures.image_grid,
        groups,
        replace(facts, facts=["inside the vision tower, from the framed patch", *facts.facts]),
        columns=settings.columns,
        **look(settings, shown, of="the patch's attention"),
    )


def _peak(episode: Episode, camera: VisionCamera, frame: int) -> Patch:
    """Return the patches of the token that the actions attend to most on a camera; of no map, the middle."""
    geometry = camera.geometry
    try:
        heat = analysis.image_heatmap(episode.arrays, camera.name, frame=frame).load()
    except SelectionError as error:
        raise SelectionError(f"where the actions look is not known ({error}); choose a patch") from error
    rows, columns = heat.shape
    row, column = rows // 2, columns // 2
    if np.isfinite(heat.values).any():
        row, column = divmod(int(np.nanargmax(heat.values)), columns)

    def part(token: int, n_tokens: int, n_patches: int) -> list[int]:
        return [i for i in range(n_patches) if (2 * i + 1) * n_tokens // (2 * n_patches) == token]

    return part(row, rows, geometry.grid_rows), part(column, columns, geometry.grid_columns)


def _in_words(patch: Patch) -> str:
    def side(values: Any) -> str:
        found = np.atleast_1d(values).tolist()
        return f"{found[0]}" if len(found) == 1 else f"{found[0]}–{found[-1]}"

    return f"patch {side(patch[0])}, {side(patch[1])}"


def _marked(image: Frame, patch: Patch, geometry: ImageGeometry, settings: PlotSettings) -> Frame:
    """Return a copy of the image with a line around the patch; none where it lies on padding."""
    grid = np.zeros((geometry.grid_rows, geometry.grid_columns), np.float32)
    grid[np.ix_(np.atleast_1d(patch[0]), np.atleast_1d(patch[1]))] = 1
    height, width, _ = image.shape
    inside: NDArray[np.bool_] = analysis.on_camera_pixels(grid, geometry, size_px=(height, width)) > 0
    around = binary_dilation(inside, iterations=max(1, height // 128)) & ~inside
    marked = image.copy()
    marked[around] = _MARK
    return marked
