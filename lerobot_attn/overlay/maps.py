"""The heatmaps that an overlay shows, read inference by inference, and their colour range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn import analysis
from lerobot_attn.analysis.prefix import attention_from
from lerobot_attn.analysis.select import RAW, Where, default_query
from lerobot_attn.analysis.sinks import keys_to_exclude
from lerobot_attn.analysis.spatial import Mask, by_camera, masks_at, percentile_of
from lerobot_attn.errors import LerobotAttnError, StoreError
from lerobot_attn.figures.look import OneMapSettings
from lerobot_attn.overlay.settings import OverlaySettings
from lerobot_attn.sizes import Progress
from lerobot_attn.store.damage import find_damage
from lerobot_attn.store.reader import Episode


class Maps(NamedTuple):
    """What was read."""

    heat: dict[str, NDArray[np.float32]]  # camera → (frame, grid_y, grid_x) float32
    vmax: float
    clipped: bool
    has_missing: bool  # whether a frame's map is not in the store: NaN
    attrs: dict[str, Any]
    n_read: int
    by_action: bool  # whether each frame shows the action executed at it, rather than one choice for all


def read_maps(
    episode: Episode,
    cameras: Sequence[str],
    settings: OverlaySettings,
    frames: Sequence[int],
    progress: Progress | None,
) -> Maps:
    """Read the chosen frames' heatmaps inference by inference, and find the colour range."""
    data = episode.arrays
    where = where_of(episode, settings, settings.prefix_query)
    episode_wide = settings.normalisation == "episode"
    # The episode's range is found on the way, so that no map is read twice.
    needed = np.arange(episode.n_frames) if episode_wide else np.array(frames)
    inference_of = data["frame_inference"].values[needed]
    n_inferences = len(np.unique(inference_of))
    pieces: dict[str, list[NDArray[np.float32]]] = {camera: [] for camera in cameras}
    attrs: dict[str, Any] = {}
    for done, array in enumerate(read_attention(episode, where, needed, settings.prefix_query), start=1):
        heatmaps = by_camera(data, array, cameras, normalisation=settings.normalisation)
        for camera, heat in heatmaps.items():
            pieces[camera].append(heat.values)
        attrs = array.attrs
        if progress is not None:
            progress(done, n_inferences + len(frames))
    read = {camera: np.concatenate(found) for camera, found in pieces.items()}
    order = np.argsort(inference_of, kind="stable")
    row_of = {int(frame): row for row, frame in enumerate(needed[order])}
    rows = [row_of[frame] for frame in frames]
    largest, vmax = range_of(read.values(), settings)
    heat_of = {camera: np.ascontiguousarray(heat[rows]) for camera, heat in read.items()}
    has_missing = any(bool(np.isnan(heat).any()) for heat in heat_of.values())
    by_action = where["query"] == "frame" and attrs["source"] == RAW
    return Maps(heat_of, vmax, largest > vmax, has_missing, attrs, n_inferences, by_action)


def where_of(episode: Episode, settings: OneMapSettings, prefix_query: str | int | None = None) -> Where:
    """Return what the settings choose of this episode, for `analysis`; `frame` is left to be said."""
    where = settings.where
    if where["query"] == "frame" and prefix_query is None:
        where["query"] = default_query(episode.arrays, by_frame=True)
    where["exclude"] = keys_to_exclude(settings.exclude, [episode])
    return where


def read_attention(
    episode: Episode, where: Where, frames: NDArray[Any], prefix_query: str | int | None = None
) -> Iterator[xr.DataArray]:
    """Yield the attention of frames, read inference by inference.

    Args:
        episode: from `open_episode`.
        where: what to look at, of `where_of`.
        frames: (frame,) numbers.
        prefix_query: a token of the prefix, instead of the suffix's queries.

    Returns:
        (frame, key) float32 of each inference that gave one of the frames its action.

    Raises:
        SelectionError: a layer, head … that the episode does not hold.
        StoreError: the store is damaged.
    """
    data = episode.arrays
    inference_of = data["frame_inference"].values[frames]
    for inference in np.unique(inference_of).tolist():
        where = {**where, "frame": frames[inference_of == inference].tolist()}
        with _told_as_damage(episode, f"the attention of inference {inference}"):
            yield _attention(data, where, prefix_query)


def read_masks(episode: Episode, camera: str, frames: Sequence[int]) -> dict[int, Mask]:
    """Return what a camera showed when the policy was asked about frames, as `masks_at` does.

    Raises:
        StoreError: the store is damaged.
    """
    with _told_as_damage(episode, f"masks of {camera}"):
        return masks_at(episode.arrays, camera, frames)


@contextmanager
def _told_as_damage(episode: Episode, what: str) -> Iterator[None]:
    try:
        yield
    except LerobotAttnError:
        raise
    except Exception as error:  # a damaged chunk raises whatever its codec raises
        if not is_damaged(episode):
            raise
        raise StoreError(
            f"{episode.path}: {what} cannot be read: {error}; lerobot-attn verify tells what is damaged"
        ) from error


def range_of(heatmaps: Iterable[NDArray[np.float32]], settings: OneMapSettings) -> tuple[float, float]:
    """Return the largest value of heatmaps, and where their one colour range ends."""
    heatmaps = [*heatmaps]
    largest = max(percentile_of(heat, 100) for heat in heatmaps)
    if settings.normalisation == "frame":
        return largest, 1.0
    return largest, max(percentile_of(heat, settings.clip) for heat in heatmaps) or largest


def _attention(data: xr.Dataset, where: Where, prefix_query: str | int | None) -> xr.DataArray:
    """Return (frame, key): of the suffix's queries, or of a token of the prefix."""
    if prefix_query is None:
        return analysis.attention(data, **where).load()
    found = attention_from(data, prefix_query, frame=where["frame"], layer=where["layer"], head=where["head"])
    return found.rename(prefix_key="key")


def is_damaged(episode: Episode) -> bool:
    """Return whether something of a store cannot be read, after an error that may have another cause.

    Every chunk is read, because a mistake in our own code must not be told as damage.
    """
    return bool(find_damage(episode.path).damaged)
