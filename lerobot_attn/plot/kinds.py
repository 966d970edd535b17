"""The kinds of figures: what each reads of an episode, and which figure it becomes.

A kind reads everything, and returns what draws the figure: so what goes wrong while reading may be damage of
the store, and what goes wrong while drawing never is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import numpy as np
import xarray as xr
from dask.base import compute
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lerobot_attn import analysis, figures
from lerobot_attn.analysis.decoded import check_steps, of_read_tokens
from lerobot_attn.analysis.labels import default_layer, denoises, frame_in_words
from lerobot_attn.analysis.prefix import PrefixWhere, cross_modal, prefix_cameras, text_to_image
from lerobot_attn.analysis.select import (
    Where,
    default_query,
    executed_actions,
    frames_of,
    prefix_only_layers,
    stored_layers,
)
from lerobot_attn.analysis.spatial import (
    ColourRange,
    by_camera,
    colour_range,
    episode_ranges,
    normalised,
    percentile_of,
)
from lerobot_attn.analysis.tokens import by_modality, by_token
from lerobot_attn.errors import SelectionError
from lerobot_attn.plot.cameras import on_image
from lerobot_attn.plot.caption import caption_of, unequal_views
from lerobot_attn.plot.choices import (
    chosen_cameras,
    chosen_frames,
    is_single,
    listed,
    look,
    one_frame,
    reasons,
    views_of,
    with_outlines,
)
from lerobot_attn.plot.settings import PlotSettings
from lerobot_attn.plot.vision import vision_kind
from lerobot_attn.store.reader import Episode

Draw = Callable[[], Figure]

_MOST_GROUPS = 40  # images in one figure


def _image(episode: Episode, settings: PlotSettings) -> Draw:
    return _image_grid(episode, settings, along="layer", panels=_layers(episode, settings))


def _heads(episode: Episode, settings: PlotSettings) -> Draw:
    heads = settings.heads if settings.heads not in (None, "mean", "max") else "all"
    return _image_grid(episode, settings, along="head", panels=heads)


def _denoise(episode: Episode, settings: PlotSettings) -> Draw:
    check_steps(episode.arrays)
    steps = "all" if settings.denoise_steps is None else settings.denoise_steps
    return _image_grid(episode, settings, along="denoise_step", panels=steps)


def _image_grid(episode: Episode, settings: PlotSettings, *, along: str, panels: Any) -> Draw:
    """Draw one panel per value of a dimension, for each frame and camera."""
    data = episode.arrays
    where = _where(episode, settings, **{along: listed(panels)})
    for name, value in where.items():
        if name in ("layer", "denoise_step", "head") and name != along and not is_single(value):
            raise SelectionError(
                f"this kind shows one {name.replace('_', ' ')}, got {value!r}; choose a number or 'mean'"
            )
    frames = np.atleast_1d(frames_of(data, chosen_frames(episode, settings))).tolist()
    cameras = chosen_cameras(episode, settings)
    if len(frames) * len(cameras) > _MOST_GROUPS:
        raise SelectionError(
            f"{len(frames)} frames of {len(cameras)} cameras are too many for one figure, expected "
            f"{_MOST_GROUPS} images at most; choose frames, or make a video with lerobot-attn overlay"
        )
    of_frames = [_heatmaps(data, cameras, settings, {**where, "frame": frame}) for frame in frames]
    views = views_of(episode, settings, frames, outlines=along == "layer")
    groups, heatmaps = [], []
    for view in views:
        seen = zip(frames, view.images, view.notes, view.masks, of_frames, strict=True)
        for frame, image, note, mask, of_frame in seen:
            heat = of_frame[view.camera]
            heatmaps.append(heat)
            heat = heat if along in heat.dims else heat.expand_dims(along)
            pixels = on_image(heat, view.geometry, image, settings)
            labels = heat[along].values if along in heat.coords else [""]
            word = {"layer": "layer", "head": "head", "denoise_step": "step"}[along]
            titles = [f"{word} {label}" for label in labels]
            if panels in ("mean", "max"):
                titles = [f"{panels} of {word}s"]
            groups.append(
                figures.Group(
                    f"{view.label}, frame {frame}",
                    image,
                    [figures.Panel(pixel, title) for pixel, title in zip(pixels, titles, strict=True)],
                    note,
                    mask,
                )
            )
    shown = _range(data, heatmaps, cameras, settings, where)
    queries = {heat.attrs["query"] for heat in heatmaps}
    query = queries.pop() if len(queries) == 1 else f"the action {frame_in_words(data)} each frame"
    chosen = {**heatmaps[0].attrs, "query": query}
    return partial(
        figures.image_grid,
        groups,
        with_outlines(
            caption_of(episode, chosen, settings, frames, leave=along, notes=reasons(views)), views
        ),
        columns=settings.columns,
        **look(settings, shown),
    )


def _text(episode: Episode, settings: PlotSettings) -> Draw:
    data, frame = episode.arrays, one_frame(episode, settings)
    where = _where(episode, settings, frame=frame, layer=_one_layer(data, settings))
    tokens = analysis.token_attention(data, **where)
    every: Where = {**where, "layer": "all"}
    by_layer = analysis.token_attention(data, **every)
    facts = caption_of(episode, tokens.attrs, settings, [frame], image=False)
    other = by_layer.attrs["query"]
    note = f"by layer: {other}" if other != tokens.attrs["query"] else ""
    return partial(
        figures.text_figure,
        tokens.load(),
        by_layer.load(),
        replace(facts, facts=[*facts.facts, note]),
        width_in=settings.width,
    )


def _combined(episode: Episode, settings: PlotSettings) -> Draw:
    data, frame = episode.arrays, one_frame(episode, settings)
    where = _where(episode, settings, frame=frame, layer=_one_layer(data, settings))
    cameras = chosen_cameras(episode, settings)
    array = analysis.attention(data, **where).load()
    heatmaps = by_camera(data, array, cameras, normalisation=settings.normalisation)
    views = views_of(episode, settings, [frame], outlines=True)
    groups = []
    for view in views:
        (image,), (note,), (mask,) = view.images, view.notes, view.masks
        pixels = on_image(heatmaps[view.camera], view.geometry, image, settings)
        groups.append(figures.Group(view.label, image, [figures.Panel(pixels, "")], note, mask))
    shown = _range(data, [*heatmaps.values()], cameras, settings, where)
    return partial(
        figures.combined_figure,
        groups,
        by_modality(data, array),
        by_token(data, array),
        with_outlines(caption_of(episode, array.attrs, settings, [frame], notes=reasons(views)), views),
        **look(settings, shown),
    )


def _evolution(episode: Episode, settings: PlotSettings) -> Draw:
    data = episode.dataset
    frames: Any = "all" if settings.frames is None else settings.frames
    layers = "all" if settings.layers is None else settings.layers
    where = _where(episode, settings, frame=frames, layer=listed(layers), query="executed")
    steps = {**where, "denoise_step": "all", "layer": _single(settings.layers, "mean")}
    by_layer = analysis.modality_share(data, **where)
    n_frames = np.atleast_1d(frames_of(data, frames)).size
    note = unequal_views(data, by_layer["layer"].values.tolist()) if settings.layers is None else ""
    facts = caption_of(episode, by_layer.attrs, settings, frames, image=False, leave="layer", notes=[note])
    panels = [(f"through layers, {by_layer.attrs['denoise_step']}".rstrip(", "), _over_frames(by_layer))]
    if denoises(data):
        by_step = analysis.modality_share(data, **steps)
        panels.append((f"from noise to action, {by_step.attrs['layer']}", _over_frames(by_step)))
    return partial(
        figures.evolution_figure,
        panels,
        replace(facts, facts=[*facts.facts, f"mean of {n_frames} frames" if n_frames > 1 else ""]),
        width_in=settings.width,
    )


def _actions(episode: Episode, settings: PlotSettings) -> Draw:
    data, frame = episode.arrays, one_frame(episode, settings)
    layers = settings.layers if settings.layers is not None else (stored_layers(data)[0] or [-1])
    where = _where(episode, settings, frame=frame, layer=listed(layers))
    del where["query"]
    values, tokens = of_read_tokens(data, analysis.action_self_attention(data, **where), frame)
    along = [dim for dim in values.dims if dim not in ("query", "action_key")]
    if len(along) > 1:
        raise SelectionError(
            f"this kind shows several {along[0]}s or {along[1]}s, not both; choose one number"
        )
    name = str(along[0]) if along else "layer"
    stacked = values if along else values.expand_dims(name)
    named = np.atleast_1d(values[name].values).tolist() if name in values.coords else []
    titles = [f"{name.replace('_', ' ')} {value}" for value in named] or [values.attrs[name]]
    return partial(
        figures.action_figure,
        [(title, panel.values) for title, panel in zip(titles, stacked, strict=True)],
        caption_of(episode, values.attrs, settings, [frame], image=False, leave=name),
        unit=values.attrs["units"],
        executed=None if data.attrs.get("executed_queries") is None else executed_actions(data),
        tokens=tokens,
        unseen=[*_is_unseen(data, np.atleast_1d(values["layer"].values), len(titles))]
        if "layer" in values.coords
        else [],
        width_in=settings.width,
        columns=min(settings.columns, 4),
    )


def _cross_modal(episode: Episode, settings: PlotSettings) -> Draw:
    data, frame = episode.arrays, one_frame(episode, settings)
    head: Any = "mean" if settings.heads is None else settings.heads
    layer = _single(settings.layers, _last_prefix_layer(data))
    where: PrefixWhere = {"frame": frame, "layer": layer, "head": head}
    views = views_of(episode, replace(settings, cameras=settings.cameras or prefix_cameras(data)), [frame])
    groups, maps, ends = [], [], []
    for view in views:
        found = text_to_image(data, settings.word, view.camera, **where)
        heat = normalised(found, settings.normalisation)
        maps.append(heat)
        if settings.normalisation == "episode":
            every: PrefixWhere = {**where, "frame": "all"}
            ends.append(
                percentile_of(text_to_image(data, settings.word, view.camera, **every), settings.clip)
            )
        labels = heat["label"].values.tolist() if "token" in heat.dims else [str(found.attrs["word"])]
        by_word = heat if "token" in heat.dims else heat.expand_dims("token")
        (image,), (note,) = view.images, view.notes
        pixels = on_image(by_word, view.geometry, image, settings)
        panels = [figures.Panel(pixel, f"“{label}”") for pixel, label in zip(pixels, labels, strict=True)]
        groups.append(figures.Group(f"{view.label}, frame {frame}", image, panels, note))
    shares = cross_modal(data, **where)
    facts = caption_of(episode, found.attrs, settings, [frame], image=False, notes=reasons(views))
    shown = colour_range(maps, settings.normalisation, clip=settings.clip, episode_ends=ends)
    return partial(
        figures.cross_modal_figure,
        groups,
        shares.load(),
        replace(facts, facts=["prefix attention", *facts.facts]),
        columns=settings.columns,
        **look(settings, shown, of="the word's attention"),
    )


def _timeline(episode: Episode, settings: PlotSettings) -> Draw:
    data = episode.dataset
    # A single frame is a list of one: the time axis stays.
    frames: Any = "all" if settings.frames is None else listed(settings.frames)
    where = _where(episode, settings, frame=frames, layer=_one_layer(data, settings))
    array = analysis.attention(data, **where)
    heatmaps = by_camera(data, array, chosen_cameras(episode, settings))
    # Together, so that the maps are read once.
    shares, *numbers = compute(
        by_modality(data, array),
        *(analysis.attention_entropy(heat)["effective_number"] for heat in heatmaps.values()),
    )
    chosen = np.atleast_1d(frames_of(data, frames))
    reward, success = (data[name].values[chosen] if name in data else None for name in ("reward", "success"))
    return partial(
        figures.timeline_figure,
        shares,
        dict(zip(heatmaps, numbers, strict=True)),
        reward,
        success,
        np.unique(data["inference_frame"].values[data["frame_inference"].values[chosen]]),
        caption_of(episode, shares.attrs, settings, frames, image=False),
        width_in=settings.width,
    )


KINDS: dict[str, Callable[[Episode, PlotSettings], Draw]] = {
    "image": _image,
    "text": _text,
    "combined": _combined,
    "evolution": _evolution,
    "heads": _heads,
    "denoise": _denoise,
    "actions": _actions,
    "cross-modal": _cross_modal,
    "timeline": _timeline,
    "vision": vision_kind,
}


def _where(episode: Episode, settings: PlotSettings, **changes: Unpack[Where]) -> Where:
    data = episode.arrays
    where: Where = {
        "frame": chosen_frames(episode, settings),
        "layer": _default_layer(data, settings) if settings.layers is None else settings.layers,
        "denoise_step": _last_step(data) if settings.denoise_steps is None else settings.denoise_steps,
        "head": "mean" if settings.heads is None else settings.heads,
        "query": default_query(data, by_frame=True) if settings.query is None else settings.query,
        "exclude": settings.exclude,
    }
    return {**where, **changes}


def _heatmaps(
    data: xr.Dataset, cameras: Sequence[str], settings: PlotSettings, where: Where
) -> dict[str, xr.DataArray]:
    """Read a frame's map once for all cameras; full camera name → heatmap."""
    array = analysis.attention(data, **where).load()
    return by_camera(data, array, cameras, normalisation=settings.normalisation)


def _range(
    data: xr.Dataset,
    heatmaps: Sequence[xr.DataArray],
    cameras: Sequence[str],
    settings: PlotSettings,
    where: Where,
) -> ColourRange:
    """Return the colour range of the heatmaps; that of the episode is looked up in all its frames."""
    ends: dict[str, float] = {}
    if settings.normalisation == "episode":
        ends = episode_ranges(data, cameras, clip=settings.clip, **where)
    return colour_range(heatmaps, settings.normalisation, clip=settings.clip, episode_ends=ends.values())


def _layers(episode: Episode, settings: PlotSettings) -> Any:
    if settings.layers is not None:
        return settings.layers
    full, means = stored_layers(episode.arrays)
    return full or means[-2:] or -1


def _one_layer(data: xr.Dataset, settings: PlotSettings) -> Any:
    return _single(settings.layers, _default_layer(data, settings))


def _default_layer(data: xr.Dataset, settings: PlotSettings) -> int:
    """Return the layer to be shown, mostly the last, of those that the store has for such a query.

    Means are over the executed actions, so for another query the layer needs full maps.
    """
    full, means = stored_layers(data)
    of_means = settings.query in (None, "frame", "executed") or not full
    held = {*full, *(means if of_means else [])}
    return default_layer(data, [*held]) if held else -1


def _last_step(data: xr.Dataset) -> int:
    """Return the last denoise step that is stored."""
    return int(data["denoise_step"].values.max(initial=-1))


def _last_prefix_layer(data: xr.Dataset) -> int:
    """Return the last layer whose prefix attention is stored; -1 if there is none, which is then said."""
    saved = data["prefix_layer"].values if "prefix_layer" in data.coords else np.array([-1])
    return int(saved.max(initial=-1))


def _is_unseen(data: xr.Dataset, layers: NDArray[Any], n_panels: int) -> list[bool]:
    """Return for each panel whether its layer, of one for all or one each, cannot see the suffix."""
    blind = [layer in prefix_only_layers(data) for layer in layers.tolist()]
    return blind if len(blind) == n_panels else blind[:1] * n_panels


def _single(choice: Any, default: Any) -> Any:
    if choice is None:
        return default
    if is_single(choice):
        return choice
    raise SelectionError(f"this kind shows one layer, got {choice!r}; choose a number or 'mean'")


def _over_frames(shares: xr.DataArray) -> xr.DataArray:
    return (shares.mean("frame") if "frame" in shares.dims else shares).compute()
