"""Figures of an episode: reads what a kind of picture needs, and no more.

    figure = plot(open_episode("….zarr"), "image", PlotSettings(frames=[12], layers=[16, 17]))

Python side of `lerobot-attn plot`. The analysis is in `analysis`, the drawing in `figures`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Unpack

import numpy as np
import xarray as xr
from dask.base import compute
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lerobot_attn import analysis, figures
from lerobot_attn.analysis.prefix import PrefixWhere, cross_modal, text_to_image
from lerobot_attn.analysis.select import Where, executed_actions, frames_of, stored_layers
from lerobot_attn.analysis.sinks import keys_to_exclude
from lerobot_attn.analysis.spatial import (
    NORMALISATIONS,
    ColourRange,
    by_camera,
    colour_range,
    episode_ranges,
    normalised,
    percentile_of,
)
from lerobot_attn.analysis.tokens import by_modality, by_token
from lerobot_attn.errors import ConfigError, LerobotAttnError, SelectionError, StoreError, first_line
from lerobot_attn.figures.canvas import RANDOM_WEIGHTS, Caption
from lerobot_attn.figures.look import LookSettings
from lerobot_attn.layout import ImageGeometry
from lerobot_attn.settings import check_ranges, is_number
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.video import Frame, read_frames

_MOST_GROUPS = 40  # images in one figure
_RANGES = {"width": (2, 30), "columns": (2, 40), "dpi": (30, 1200)}


@dataclass(frozen=True, kw_only=True)
class PlotSettings(LookSettings):
    """Settings of `lerobot-attn plot`; labels as `analysis.Where` takes them, or as text: "0,4,9", "0-3".

    Unset (None) means what the kind of picture is usually looked at with.
    """

    query: Any = None
    # Frames: a number, a list, or 'all'. Default: the middle frame; every frame for evolution and timeline.
    frames: Any = None
    # Cameras, by name or the end of it. Default: all that showed an image.
    cameras: Any = None
    # Layers: a number (negative from the last), a list, 'all' or 'mean'. Default: those with full maps.
    layers: Any = None
    # Denoise steps, likewise. Default: the last one, which yields the action.
    denoise_steps: Any = None
    # Heads: a number, a list, 'all', 'mean' or 'max'. Default: mean; all for kind heads.
    heads: Any = None
    # A word of the task, by its text or number, for kind cross-modal. Default: all words.
    word: Any = None
    # Width of the figure, inches: 3.4 is a column of a paper, 7 a page.
    width: float = 7.0
    # Panels in a row.
    columns: int = 6
    # Dots per inch of PNG files.
    dpi: int = 200

    _choices: ClassVar[tuple[str, ...]] = (
        *LookSettings._choices,
        *("frames", "layers", "denoise_steps", "heads"),
    )

    def __post_init__(self) -> None:
        """Read choices given as text, and check what can be checked without an episode.

        Raises:
            ConfigError: a value is out of range or of the wrong type.
        """
        super().__post_init__()
        if isinstance(self.cameras, str):
            names = [name.strip() for name in self.cameras.split(",")]
            self._set("cameras", None if self.cameras == "all" else names)
        check_ranges(self, _RANGES)


def plot(episode: Episode, kind: str, settings: PlotSettings | None = None) -> Figure:
    """Draw a figure of an episode.

    Args:
        episode: from `open_episode`.
        kind: one of `KINDS`.
        settings: what to draw, and how.

    Raises:
        ConfigError: no such kind.
        SelectionError: a frame, layer, camera, word … that the episode does not hold.
        StoreError: the episode is empty or damaged, or lacks the camera's video.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if episode.n_frames == 0:
        raise StoreError(f"{episode.path}: holds no frames yet; expected one at least")
    settings = settings or PlotSettings()
    try:
        keys = keys_to_exclude(settings.exclude, [episode])
        return KINDS[kind](episode, replace(settings, exclude=keys))
    except LerobotAttnError:
        raise
    except (RuntimeError, ValueError, OSError) as error:  # what codecs raise for damaged chunks
        raise StoreError(
            f"{episode.path}: cannot be drawn ({first_line(error)}); lerobot-attn verify tells what is "
            "damaged"
        ) from error


def _image(episode: Episode, settings: PlotSettings) -> Figure:
    return _image_grid(episode, settings, along="layer", panels=_layers(episode, settings))


def _heads(episode: Episode, settings: PlotSettings) -> Figure:
    heads = settings.heads if settings.heads not in (None, "mean", "max") else "all"
    return _image_grid(episode, settings, along="head", panels=heads)


def _denoise(episode: Episode, settings: PlotSettings) -> Figure:
    steps = "all" if settings.denoise_steps is None else settings.denoise_steps
    return _image_grid(episode, settings, along="denoise_step", panels=steps)


def _image_grid(episode: Episode, settings: PlotSettings, *, along: str, panels: Any) -> Figure:
    """Draw one panel per value of a dimension, for each frame and camera."""
    data = episode.arrays
    where = _where(episode, settings, **{along: _listed(panels)})
    for name, value in where.items():
        if name in ("layer", "denoise_step", "head") and name != along and not _is_single(value):
            raise SelectionError(
                f"this kind shows one {name.replace('_', ' ')}, got {value!r}; choose a number or 'mean'"
            )
    frames = np.atleast_1d(frames_of(data, _frames(episode, settings))).tolist()
    cameras = _cameras(episode, settings)
    if len(frames) * len(cameras) > _MOST_GROUPS:
        raise SelectionError(
            f"{len(frames)} frames of {len(cameras)} cameras are too many for one figure, expected "
            f"{_MOST_GROUPS} images at most; choose frames, or make a video with lerobot-attn overlay"
        )
    of_frames = [_heatmaps(data, cameras, settings, {**where, "frame": frame}) for frame in frames]
    groups, heatmaps = [], []
    for camera in cameras:
        name, geometry, _ = analysis.camera_geometry(data, camera)
        images = camera_frames(episode, name, frames)
        for frame, image, of_frame in zip(frames, images, of_frames, strict=True):
            heat = of_frame[name]
            heatmaps.append(heat)
            heat = heat if along in heat.dims else heat.expand_dims(along)
            pixels = on_image(heat, geometry, image, settings)
            labels = heat[along].values if along in heat.coords else [""]
            word = {"layer": "layer", "head": "head", "denoise_step": "step"}[along]
            titles = [f"{word} {label}" for label in labels]
            if panels in ("mean", "max"):
                titles = [f"{panels} of {word}s"]
            groups.append(
                figures.Group(
                    f"{episode.layout.short_names[name]}, frame {frame}",
                    image,
                    [figures.Panel(pixel, title) for pixel, title in zip(pixels, titles, strict=True)],
                )
            )
    vmax, clipped = _range(data, heatmaps, cameras, settings, where)
    queries = {heat.attrs["query"] for heat in heatmaps}
    query = queries.pop() if len(queries) == 1 else "the action executed at each frame"
    return figures.image_grid(
        groups,
        _caption(episode, {**heatmaps[0].attrs, "query": query}, settings, frames, leave=along),
        vmax=vmax,
        clipped=clipped,
        unit=NORMALISATIONS[settings.normalisation],
        cmap=settings.colormap,
        alpha=settings.alpha,
        columns=settings.columns,
        width_in=settings.width,
    )


def _text(episode: Episode, settings: PlotSettings) -> Figure:
    data, frame = episode.arrays, _one_frame(episode, settings)
    where = _where(episode, settings, frame=frame, layer=_single(settings.layers, -1))
    tokens = analysis.token_attention(data, **where)
    every: Where = {**where, "layer": "all"}
    by_layer = analysis.token_attention(data, **every)
    facts = _caption(episode, tokens.attrs, settings, [frame], image=False)
    other = by_layer.attrs["query"]
    note = f"by layer: {other}" if other != tokens.attrs["query"] else ""
    return figures.text_figure(
        tokens.load(),
        by_layer.load(),
        Caption([*facts.facts, note], facts.warning),
        width_in=settings.width,
    )


def _combined(episode: Episode, settings: PlotSettings) -> Figure:
    data, frame = episode.arrays, _one_frame(episode, settings)
    where = _where(episode, settings, frame=frame, layer=_single(settings.layers, -1))
    cameras = _cameras(episode, settings)
    array = analysis.attention(data, **where).load()
    heatmaps = by_camera(data, array, cameras, normalisation=settings.normalisation)
    groups = []
    for camera in cameras:
        name, geometry, _ = analysis.camera_geometry(data, camera)
        (image,) = camera_frames(episode, name, [frame])
        pixels = on_image(heatmaps[name], geometry, image, settings)
        groups.append(figures.Group(episode.layout.short_names[name], image, [figures.Panel(pixels, "")]))
    vmax, clipped = _range(data, [*heatmaps.values()], cameras, settings, where)
    return figures.combined_figure(
        groups,
        by_modality(data, array),
        by_token(data, array),
        _caption(episode, array.attrs, settings, [frame]),
        vmax=vmax,
        clipped=clipped,
        unit=NORMALISATIONS[settings.normalisation],
        cmap=settings.colormap,
        alpha=settings.alpha,
        width_in=settings.width,
    )


def _evolution(episode: Episode, settings: PlotSettings) -> Figure:
    data = episode.dataset
    frames: Any = "all" if settings.frames is None else settings.frames
    layers = "all" if settings.layers is None else settings.layers
    where = _where(episode, settings, frame=frames, layer=_listed(layers), query="executed")
    steps = {**where, "denoise_step": "all", "layer": _single(settings.layers, "mean")}
    by_layer = analysis.modality_share(data, **where)
    by_step = analysis.modality_share(data, **steps)
    n_frames = np.atleast_1d(frames_of(data, frames)).size
    facts = _caption(episode, by_layer.attrs, settings, frames, image=False, leave="layer")
    return figures.evolution_figure(
        [
            (f"through layers, {by_layer.attrs['denoise_step']}", _over_frames(by_layer)),
            (f"from noise to action, {by_step.attrs['layer']}", _over_frames(by_step)),
        ],
        Caption([*facts.facts, f"mean of {n_frames} frames" if n_frames > 1 else ""], facts.warning),
        width_in=settings.width,
    )


def _actions(episode: Episode, settings: PlotSettings) -> Figure:
    data, frame = episode.arrays, _one_frame(episode, settings)
    layers = settings.layers if settings.layers is not None else (stored_layers(data)[0] or [-1])
    where = _where(episode, settings, frame=frame, layer=_listed(layers))
    del where["query"]
    values = analysis.action_self_attention(data, **where)
    along = [dim for dim in values.dims if dim not in ("query", "action_key")]
    if len(along) > 1:
        raise SelectionError(
            f"this kind shows several {along[0]}s or {along[1]}s, not both; choose one number"
        )
    name = str(along[0]) if along else "layer"
    stacked = values if along else values.expand_dims(name)
    titles = (
        [f"{name.replace('_', ' ')} {value}" for value in np.atleast_1d(values[name].values)]
        if (name in values.coords)
        else [values.attrs[name]]
    )
    return figures.action_figure(
        [(title, panel.values) for title, panel in zip(titles, stacked, strict=True)],
        _caption(episode, values.attrs, settings, [frame], image=False, leave=name),
        unit=values.attrs["units"],
        executed=executed_actions(data),
        width_in=settings.width,
        columns=min(settings.columns, 4),
    )


def _cross_modal(episode: Episode, settings: PlotSettings) -> Figure:
    data, frame = episode.arrays, _one_frame(episode, settings)
    head: Any = "mean" if settings.heads is None else settings.heads
    where: PrefixWhere = {"frame": frame, "layer": _single(settings.layers, -1), "head": head}
    groups, maps, ends = [], [], []
    for camera in _cameras(episode, settings):
        name, geometry, _ = analysis.camera_geometry(data, camera)
        (image,) = camera_frames(episode, name, [frame])
        found = text_to_image(data, settings.word, name, **where)
        heat = normalised(found, settings.normalisation)
        maps.append(heat)
        if settings.normalisation == "episode":
            every: PrefixWhere = {**where, "frame": "all"}
            ends.append(percentile_of(text_to_image(data, settings.word, name, **every), settings.clip))
        labels = heat["label"].values.tolist() if "token" in heat.dims else [str(found.attrs["word"])]
        by_word = heat if "token" in heat.dims else heat.expand_dims("token")
        pixels = on_image(by_word, geometry, image, settings)
        panels = [figures.Panel(pixel, f"“{label}”") for pixel, label in zip(pixels, labels, strict=True)]
        groups.append(figures.Group(f"{episode.layout.short_names[name]}, frame {frame}", image, panels))
    shares = cross_modal(data, **where)
    facts = _caption(episode, found.attrs, settings, [frame], image=False)
    vmax, clipped = colour_range(maps, settings.normalisation, clip=settings.clip, episode_ends=ends)
    return figures.cross_modal_figure(
        groups,
        shares.load(),
        Caption(["prefix attention", *facts.facts], facts.warning),
        vmax=vmax,
        clipped=clipped,
        unit=NORMALISATIONS[settings.normalisation].replace("all attention", "the word's attention"),
        cmap=settings.colormap,
        alpha=settings.alpha,
        columns=settings.columns,
        width_in=settings.width,
    )


def _timeline(episode: Episode, settings: PlotSettings) -> Figure:
    data = episode.dataset
    # A single frame is a list of one: the time axis stays.
    frames: Any = "all" if settings.frames is None else _listed(settings.frames)
    where = _where(episode, settings, frame=frames, layer=_single(settings.layers, -1))
    array = analysis.attention(data, **where)
    heatmaps = by_camera(data, array, _cameras(episode, settings))
    # Together, so that the maps are read once.
    shares, *numbers = compute(
        by_modality(data, array),
        *(analysis.attention_entropy(heat)["effective_number"] for heat in heatmaps.values()),
    )
    chosen = np.atleast_1d(frames_of(data, frames))
    return figures.timeline_figure(
        shares,
        dict(zip(heatmaps, numbers, strict=True)),
        data["reward"].values[chosen],
        data["success"].values[chosen],
        np.unique(data["inference_frame"].values[data["frame_inference"].values[chosen]]),
        _caption(episode, shares.attrs, settings, frames, image=False),
        width_in=settings.width,
    )


KINDS: dict[str, Callable[[Episode, PlotSettings], Figure]] = {
    "image": _image,
    "text": _text,
    "combined": _combined,
    "evolution": _evolution,
    "heads": _heads,
    "denoise": _denoise,
    "actions": _actions,
    "cross-modal": _cross_modal,
    "timeline": _timeline,
}


def _where(episode: Episode, settings: PlotSettings, **changes: Unpack[Where]) -> Where:
    where: Where = {
        "frame": _frames(episode, settings),
        "layer": -1 if settings.layers is None else settings.layers,
        "denoise_step": -1 if settings.denoise_steps is None else settings.denoise_steps,
        "head": "mean" if settings.heads is None else settings.heads,
        "query": "frame" if settings.query is None else settings.query,
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


def _frames(episode: Episode, settings: PlotSettings) -> Any:
    return episode.n_frames // 2 if settings.frames is None else settings.frames


def _one_frame(episode: Episode, settings: PlotSettings) -> int:
    frames = np.atleast_1d(frames_of(episode.arrays, _frames(episode, settings)))
    if len(frames) != 1:
        raise SelectionError(f"this kind shows one frame, got {len(frames)}; choose one with frames=12")
    return int(frames[0])


def _cameras(episode: Episode, settings: PlotSettings) -> Sequence[str]:
    return settings.cameras or analysis.camera_names(episode.arrays)


def _layers(episode: Episode, settings: PlotSettings) -> Any:
    if settings.layers is not None:
        return settings.layers
    full, means = stored_layers(episode.arrays)
    return full or means[-2:] or -1


def _single(choice: Any, default: Any) -> Any:
    if choice is None:
        return default
    if _is_single(choice):
        return choice
    raise SelectionError(f"this kind shows one layer, got {choice!r}; choose a number or 'mean'")


def _is_single(value: Any) -> bool:
    return value in ("mean", "max") if isinstance(value, str) else is_number(value)


def _listed(choice: Any) -> Any:
    return [choice] if is_number(choice) else choice


def _over_frames(shares: xr.DataArray) -> xr.DataArray:
    return (shares.mean("frame") if "frame" in shares.dims else shares).compute()


def on_image(
    heatmap: xr.DataArray, geometry: ImageGeometry, image: Frame, settings: LookSettings
) -> NDArray[np.float32]:
    """Put a heatmap (…, grid_y, grid_x) on the pixels of a camera's image: (…, height, width)."""
    height, width, _ = image.shape
    return analysis.on_camera_pixels(
        heatmap, geometry, size_px=(height, width), interpolation=settings.interpolation
    )


def camera_frames(episode: Episode, camera: str, frames: Sequence[int]) -> list[Frame]:
    """Return the camera's frames, (height, width, 3) uint8 each.

    Raises:
        StoreError: the episode has no video of the camera, or it is shorter.
    """
    video, numbers = episode.video(camera), sorted(set(frames))
    found = dict(
        zip(numbers, read_frames(video, size_px=episode.image_size_px(camera), numbers=numbers), strict=True)
    )
    return [found[frame] for frame in frames]


def _caption(
    episode: Episode,
    chosen: dict[str, Any],
    settings: PlotSettings,
    frames: Any,
    *,
    image: bool = True,
    leave: str = "",
) -> Caption:
    """Say which episode, frame, layer, step, head, query and normalisation were drawn."""
    outcome = {True: ", success", False: ", failure", None: ""}[episode.success]
    state = "" if episode.is_complete else ", incomplete"
    data = episode.arrays
    facts = [f"{episode.path.parent.name}/{episode.path.stem}{outcome}{state}"]
    if isinstance(frames, list) and len(frames) == 1:
        facts.append(f"frame {frames[0]} (inference {int(data['frame_inference'].values[frames[0]])})")
    elif isinstance(frames, str):
        facts.append(f"{frames} frames")
    else:
        facts.append(f"frames {', '.join(map(str, np.atleast_1d(frames).tolist()))}")
    facts += [
        str(chosen.get(name, "")) for name in ("layer", "denoise_step", "head", "query") if name != leave
    ]
    if image:
        facts.append(NORMALISATIONS[settings.normalisation])
        if settings.clip < 100 and settings.normalisation != "frame":
            facts.append(f"colours end at percentile {settings.clip:g}")
    source = str(chosen.get("source", ""))
    facts.append(
        {"suffix_attention_mean": "from stored means", "suffix_attention": "from full maps"}.get(source, "")
    )
    facts.append(str(chosen.get("left_out", "")))
    return Caption(facts, RANDOM_WEIGHTS if episode.has_random_weights else "")
