"""Attention on images: the grid of patches, and the camera's own pixels with the letterbox undone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Unpack

import numpy as np
import xarray as xr
from dask.base import compute
from numpy.typing import ArrayLike, NDArray

from lerobot_attn.analysis.select import Where, attention, layout_of
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import ImageGeometry, Segment
from lerobot_attn.masks import UNKNOWN, Instance

Normalisation = Literal["share", "image", "frame", "episode"]
Interpolation = Literal["nearest", "linear"]

NORMALISATIONS: dict[str, str] = {
    "share": "share of all attention",
    "image": "share of the attention on this image",
    "frame": "relative to the largest patch",
    "episode": "share of all attention, one range for the episode",
}


NO_CAMERAS = "the episode's policy saw no camera image"


class ColourRange(NamedTuple):
    """The colour range of several heatmaps begins at 0; where it ends, and whether values lie beyond."""

    vmax: float
    clipped: bool


def camera_names(dataset: xr.Dataset) -> list[str]:
    """Return the cameras that showed the policy an image, in the policy's order."""
    return [camera.name for camera in layout_of(dataset).cameras if not camera.is_empty]


def camera_geometry(dataset: xr.Dataset, camera: str | None = None) -> tuple[str, ImageGeometry, Segment]:
    """Find a camera by its name or the end of it; without a name, the first one.

    Returns:
        Its full name, its geometry and its keys.

    Raises:
        SelectionError: no such camera, several of that ending, or one that showed nothing.
    """
    layout, names = layout_of(dataset), camera_names(dataset)
    if not names:
        raise SelectionError(NO_CAMERAS)
    images = [segment for segment in layout.segments if segment.kind == "image"]
    name = names[0] if camera is None else camera
    found = [c for c in layout.cameras if c.name == name]
    found = found or [c for c in layout.cameras if c.name.endswith(f".{name}")]
    if len(found) != 1 or found[0].geometry is None:
        why = "does not exist" if not found else "is ambiguous" if len(found) > 1 else "showed no image"
        raise SelectionError(f"camera {camera!r} {why}; the episode's are {', '.join(names)}")
    return found[0].name, found[0].geometry, images[layout.cameras.index(found[0])]


class Mask(NamedTuple):
    """What one camera showed at an inference.

    Attributes:
        instance_of_pixel: (mask_y, mask_x) int16, an index into `instances`; −1 where nobody knows.
        instances: what the numbers stand for.
    """

    instance_of_pixel: NDArray[np.int16]
    instances: tuple[Instance, ...]


def masks_at(dataset: xr.Dataset, camera: str, frames: Sequence[int]) -> dict[int, Mask]:
    """Return what a camera showed when the policy was asked about frames: each frame's inference → its mask.

    Empty where the episode has no masks of this camera. An inference of which nothing is known is left out.

    Args:
        dataset: an episode's.
        camera: its full name.
        frames: frame numbers.
    """
    if "segmentation" not in dataset or camera not in dataset["mask_camera"].values:
        return {}
    place = dataset["mask_camera"].values.tolist().index(camera)
    names, roles = (dataset[name].values.tolist() for name in ("instance", "instance_role"))
    instances = tuple(Instance(name, role) for name, role in zip(names, roles, strict=True))
    found = {}
    for inference in np.unique(dataset["frame_inference"].values[list(frames)]).tolist():
        mask = dataset["segmentation"].isel(inference=inference, mask_camera=place).values
        if (mask > UNKNOWN).any():
            found[inference] = Mask(mask, instances)
    return found


def image_heatmap(
    dataset: xr.Dataset,
    camera: str | None = None,
    *,
    normalisation: Normalisation = "share",
    clip: float = 100.0,
    **where: Unpack[Where],
) -> xr.DataArray:
    """Return how much each patch of a camera's image is attended to.

    For several cameras `by_camera` reads the maps once.

    Args:
        dataset: an episode's.
        camera: its name or the end of it; the first one by default.
        normalisation: "share" of all attention; share of the attention on this "image"; relative to the
            largest patch of the map ("frame"); or "episode": shares of all attention whose colour range is
            that of every frame of the episode, so that frames compare.
        clip: percentile of the patches at which the colour range ends; 100 is the largest. A single bright
            patch, e.g. an attention sink, otherwise darkens all others.
        where: what to look at, see `Where`.

    Returns:
        (…, grid_y, grid_x) float32 after the dimensions that `attention` keeps; NaN where the store lacks the
        map. Attributes `vmin` and `vmax` are the colour range, `camera` and `normalisation` say what it is,
        the rest what was chosen.

    Raises:
        SelectionError: no such camera, normalisation, frame, layer, …
    """
    _check_clip(clip)
    _check_normalisation(normalisation)
    name = camera_geometry(dataset, camera)[0]
    (heatmap,) = by_camera(dataset, attention(dataset, **where), [name], normalisation=normalisation).values()
    if normalisation == "episode":
        vmax = episode_ranges(dataset, [name], clip=clip, **where)[name]
    elif normalisation == "frame":
        vmax = 1.0
    else:
        vmax = percentile_of(heatmap, clip)
    heatmap.attrs |= {"vmin": 0.0, "vmax": vmax}
    return heatmap


def by_camera(
    dataset: xr.Dataset,
    array: xr.DataArray,
    cameras: Sequence[str | None] | None = None,
    *,
    normalisation: Normalisation = "share",
) -> dict[str, xr.DataArray]:
    """Return the heatmaps of attention that was selected already: once, for however many cameras.

    Args:
        dataset: an episode's.
        array: (…, key) of `attention`.
        cameras: their names or the ends of them; by default all that showed an image.
        normalisation: as for `image_heatmap`; "episode" has the values of "share".

    Returns:
        Each camera's full name → what `image_heatmap` returns, lazy where the array is, without a colour
        range; see `colour_range`.

    Raises:
        SelectionError: no such camera or normalisation.
    """
    heatmaps = {}
    for camera in camera_names(dataset) if cameras is None else cameras:
        name, geometry, segment = camera_geometry(dataset, camera)
        heatmap = normalised(on_grid(array, geometry, segment), normalisation)
        heatmap.attrs = {**array.attrs, "camera": name, "normalisation": normalisation}
        heatmap.attrs["units"] = NORMALISATIONS[normalisation]
        heatmaps[name] = heatmap
    return heatmaps


def normalised(heatmap: xr.DataArray, normalisation: Normalisation) -> xr.DataArray:
    """Return a heatmap in the unit of a normalisation; its attributes are for the caller to set.

    Args:
        heatmap: (…, grid_y, grid_x) share of all attention; each map of the grid is normalised by itself.
        normalisation: as for `image_heatmap`; "episode" has the values of "share".

    Returns:
        The same dimensions. A map without attention on the image stays 0, and a missing one NaN.

    Raises:
        SelectionError: no such normalisation.
    """
    _check_normalisation(normalisation)
    over = ("grid_y", "grid_x")
    if normalisation == "image":
        whole = heatmap.sum(over, skipna=False)
    elif normalisation == "frame":
        whole = heatmap.max(over, skipna=False)
    else:
        return heatmap
    return heatmap / whole.where(whole != 0, 1)


def episode_ranges(
    dataset: xr.Dataset,
    cameras: Sequence[str | None] | None = None,
    *,
    clip: float = 100.0,
    **where: Unpack[Where],
) -> dict[str, float]:
    """Return the share of all attention that a patch gets at most at any frame (or inference) of the episode.

    Args:
        dataset: an episode's; its maps are read once for all cameras.
        cameras: as for `by_camera`.
        clip: percentile of the patches of all frames; 100 is the largest.
        where: what to look at; its `frame` or `inference` is widened to all.

    Returns:
        Each camera's full name → where its colour range ends.
    """
    _check_clip(clip)
    everything: Where = {**where, "inference": "all"}
    if where.get("frame") is not None:
        everything = {**where, "frame": "all"}
    heatmaps = by_camera(dataset, attention(dataset, **everything), cameras)
    values = compute(*(heatmap.data for heatmap in heatmaps.values()))
    return {name: percentile_of(found, clip) for name, found in zip(heatmaps, values, strict=True)}


def colour_range(
    heatmaps: Iterable[ArrayLike],
    normalisation: Normalisation,
    *,
    clip: float = 100.0,
    episode_ends: Iterable[float] = (),
) -> ColourRange:
    """Return the one colour range of heatmaps that are shown together.

    Args:
        heatmaps: what is shown, each of any shape, in the unit of the normalisation.
        normalisation: what the range is of: of these heatmaps; for "frame" it ends at 1; for "episode" where
            that of the cameras and episodes ends.
        clip: percentile of the patches at which it ends; 100 is the largest.
        episode_ends: for "episode", of `episode_ranges`, one for each camera and episode that is shown.

    Raises:
        SelectionError: there is no heatmap, because no camera showed an image.
    """
    heatmaps = [*heatmaps]
    if not heatmaps:
        raise SelectionError(NO_CAMERAS)
    if normalisation == "frame":
        return ColourRange(1.0, False)
    shown = np.concatenate([np.ravel(np.asarray(heatmap)) for heatmap in heatmaps])
    vmax = max(episode_ends) if normalisation == "episode" else percentile_of(shown, clip)
    largest = percentile_of(shown, 100)
    return ColourRange(vmax, largest > vmax) if vmax > 0 else ColourRange(largest, False)


def percentile_of(values: ArrayLike, percentile: float) -> float:
    """Return a percentile, 0 to 100, of the values that are there (not NaN); 0 where there is none."""
    found = np.asarray(values)
    found = found[np.isfinite(found)]
    return float(np.percentile(found, percentile)) if found.size else 0.0


def on_camera_pixels(
    heatmap: ArrayLike,
    geometry: ImageGeometry,
    *,
    size_px: tuple[int, int] | None = None,
    interpolation: Interpolation = "nearest",
) -> NDArray[np.float32]:
    """Put patch values on the camera's own pixels: the resize and the padding of the policy undone.

    Args:
        heatmap: (…, grid_y, grid_x).
        geometry: the camera's, from `camera_geometry` or the layout.
        size_px: (height, width) wanted; the camera's own by default.
        interpolation: "nearest" gives each pixel its patch's value; "linear" blends between patch centres.

    Returns:
        (…, height, width) float32. Values are those of patches, not divided by their number of pixels.
        Patches that lie wholly on padding do not show; see `padding_share`. NaN where the policy saw nothing,
        because its preprocessor has cut off the image's borders.
    """
    height, width = size_px or (geometry.height_px, geometry.width_px)
    rows, columns = _weights(geometry, (int(height), int(width)), interpolation)
    values = np.asarray(heatmap, np.float32)
    if interpolation == "nearest":
        pixels = values[..., rows.argmax(axis=1), :][..., columns.argmax(axis=1)]
    else:
        pixels = (rows @ values @ columns.T).astype(np.float32)
    if geometry.pad_top_px < 0 or geometry.pad_left_px < 0:
        pixels[..., ~rows.any(axis=1), :] = np.nan
        pixels[..., ~columns.any(axis=1)] = np.nan
    return pixels


def patch_of_pixels(
    geometry: ImageGeometry, size_px: tuple[int, int]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return which row of patches shows in each row of pixels, (height,), and likewise for columns, (width,).

    Where the policy saw nothing it is one behind the last; see `on_camera_pixels`.
    """
    found = []
    for weights in _weights(geometry, size_px, "nearest"):
        found.append(np.where(weights.any(axis=1), weights.argmax(axis=1), weights.shape[1]))
    return found[0], found[1]


def padding_share(heatmap: xr.DataArray, geometry: ImageGeometry) -> xr.DataArray:
    """Return the sum over patches that show nothing but letterbox padding, (…) in the heatmap's unit."""
    rows, columns = visible_patches(geometry)
    hidden = xr.DataArray(~(rows[:, None] & columns[None, :]), dims=("grid_y", "grid_x"))
    # If a map is missing, its hidden patches are NaN as well, so the sum is NaN.
    return (heatmap * hidden).sum(("grid_y", "grid_x"), skipna=False)


def on_grid(array: xr.DataArray, geometry: ImageGeometry, segment: Segment) -> xr.DataArray:
    """Arrange anything given per key, e.g. of `attention` or `attention_rollout`, by the patches of a camera.

    Args:
        array: (…, key).
        geometry: the camera's, from `camera_geometry`.
        segment: its keys, likewise.

    Returns:
        (…, grid_y, grid_x).

    Raises:
        SelectionError: the array is of the prefix, and the camera has no tokens there.
    """
    if segment.stop > array.sizes["key"]:
        raise SelectionError(
            f"camera {segment.name!r} has no prefix attention: its image enters with the actions, so the "
            "language model has not seen it; choose another camera"
        )
    part = array.isel(key=slice(segment.start, segment.stop)).transpose(..., "key")
    shape = (*part.shape[:-1], geometry.grid_rows, geometry.grid_columns)
    coords = {name: part.coords[name] for name in part.coords if "key" not in part.coords[name].dims}
    return xr.DataArray(part.data.reshape(shape), coords, (*part.dims[:-1], "grid_y", "grid_x"))


def _check_clip(clip: float) -> None:
    if not 0 <= clip <= 100:
        raise SelectionError(f"clip {clip!r}: expected a percentile from 0 to 100")


def _check_normalisation(normalisation: str) -> None:
    if normalisation not in NORMALISATIONS:
        raise SelectionError(f"normalisation {normalisation!r}: expected one of {', '.join(NORMALISATIONS)}")


def visible_patches(geometry: ImageGeometry) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which rows and which columns of patches show a part of the image, both bool."""

    def of_axis(pad: int, resized: int, whole: int, patches: int) -> NDArray[np.bool_]:
        edges = np.arange(patches + 1) * whole / patches
        return (edges[1:] > pad) & (edges[:-1] < pad + resized)

    g = geometry
    return (
        of_axis(g.pad_top_px, g.resized_height_px, g.input_height_px, g.grid_rows),
        of_axis(g.pad_left_px, g.resized_width_px, g.input_width_px, g.grid_columns),
    )


@lru_cache(maxsize=64)
def _weights(
    geometry: ImageGeometry, size_px: tuple[int, int], interpolation: Interpolation
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the weights of patch rows per pixel row (height, grid_y), and likewise (width, grid_x).

    They are 0 where the policy saw nothing: beyond the input, on a side where padding is below 0.
    """
    if interpolation not in ("nearest", "linear"):
        raise SelectionError(f"interpolation {interpolation!r}: expected 'nearest' or 'linear'")

    def of_axis(pixels: int, pad: int, resized: int, whole: int, patches: int) -> NDArray[np.float32]:
        # Centres of the pixels, in units of patches of the policy's input.
        centre = (pad + (np.arange(pixels) + 0.5) * resized / pixels) * patches / whole
        weights = np.zeros((pixels, patches), np.float32)
        is_cut = (centre < 0) | (centre >= patches) if pad < 0 else np.zeros(pixels, bool)
        if interpolation == "nearest":
            weights[np.arange(pixels), np.clip(centre.astype(int), 0, patches - 1)] = 1
            weights[is_cut] = 0
            return weights
        position = np.clip(centre - 0.5, 0, patches - 1)
        low = np.minimum(position.astype(int), max(patches - 2, 0))
        high = np.minimum(low + 1, patches - 1)
        part = (position - low).astype(np.float32)
        np.add.at(weights, (np.arange(pixels), low), 1 - part)
        np.add.at(weights, (np.arange(pixels), high), part)
        weights[is_cut] = 0
        return weights

    g = geometry
    return (
        of_axis(size_px[0], g.pad_top_px, g.resized_height_px, g.input_height_px, g.grid_rows),
        of_axis(size_px[1], g.pad_left_px, g.resized_width_px, g.input_width_px, g.grid_columns),
    )
