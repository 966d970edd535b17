"""What the explorer answers: an episode's facts and tables as JSON, its attention as little-endian float16.

Pure functions on an episode. A slab holds everything that one view of a frame needs, so that changing layer,
head, camera or normalisation asks for nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.compare import compare_overall, split_by_success
from lerobot_attn.analysis.measures import sharpness
from lerobot_attn.analysis.runs import summarise_run
from lerobot_attn.analysis.select import MEANS, RAW, attention, executed_queries, stored_layers
from lerobot_attn.analysis.tokens import by_modality, token_groups
from lerobot_attn.errors import LerobotAttnError, SelectionError, StoreError
from lerobot_attn.explorer.pictures import video_version
from lerobot_attn.layout import Kind, short_names
from lerobot_attn.store.reader import Episode

PREFIX = "prefix_attention"
CLIP = 99.9  # percentile of the patches at which colours end, as in the package's figures
_BLOCK = 32  # inferences that are read at once
_DEFAULT_FPS = 20.0  # of an episode without videos: LIBERO's


def facts(episode: Episode) -> dict[str, Any]:
    """Return what the page must know of an episode before it draws: sizes, labels, layout, cameras."""
    data, attributes, layout = episode.arrays, episode.attributes, episode.layout
    policy = attributes.get("policy", {})
    return {
        "task": episode.task,
        "task_group": plain(attributes.get("task_group")),
        "task_id": plain(attributes.get("task_id")),
        "episode": plain(attributes.get("episode_index")),
        "seed": plain(attributes.get("seed")),
        "success": episode.success,
        "complete": episode.is_complete,
        "random_weights": episode.has_random_weights,
        "policy": plain(policy.get("type")),
        "n_frames": episode.n_frames,
        "n_inferences": episode.n_inferences,
        "n_layers": plain(policy.get("n_layers")),
        "n_heads": plain(policy.get("n_heads")),
        "n_queries": layout.n_queries,
        "n_keys": layout.n_keys,
        "first_action_query": layout.first_action_query,
        "executed_queries": attributes.get("executed_queries"),
        "mean_layers": _mean_layers(data),
        "layers": _labels(data, "layer", RAW),
        "prefix_layers": _labels(data, "prefix_layer", PREFIX),
        "heads": _labels(data, "head"),
        "denoise_steps": _labels(data, "denoise_step"),
        "flow_time": _numbers(data["flow_time"].values),
        "state_dims": _names(data, "state_dim"),
        "action_dims": _names(data, "action_dim"),
        "segments": [
            {"kind": s.kind, "name": s.name, "start": s.start, "stop": s.stop} for s in layout.segments
        ],
        "cameras": _cameras(episode),
        "kinds": {kind.name.lower(): int(kind) for kind in Kind},
        "fps": _fps(attributes),
    }


def plain(value: Any) -> str | int | float | None:
    """Return an attribute as a JSON value: text, a number or a truth value; None for all else, NaN too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int) else None


def _cameras(episode: Episode) -> list[dict[str, Any]]:
    labels = episode.layout.short_names
    found = []
    for camera in episode.layout.cameras:
        video = episode.videos.get(camera.name)
        version = None if video is None else video_version(video)
        found.append(
            {
                "name": camera.name,
                "label": labels[camera.name],
                "geometry": None if camera.geometry is None else vars(camera.geometry),
                "has_video": version is not None,
                "video_version": version,
            }
        )
    return found


def _fps(attributes: Mapping[str, Any]) -> float:
    """Return the frames a second that the first video says; a number that can be divided by."""
    for video in (attributes.get("videos") or {}).values():
        fps = plain(video.get("fps")) if isinstance(video, dict) else None
        if isinstance(fps, int | float) and not isinstance(fps, bool) and fps > 0:
            return fps
    return _DEFAULT_FPS


def mean_slab(episode: Episode, inference: int, denoise_step: int) -> tuple[bytes, tuple[int, ...]]:
    """Return one denoise step's means over the executed actions: (layer, head, key).

    Those that are stored; of a layer without them, that of its full map.

    Args:
        episode: the episode.
        inference: its number.
        denoise_step: its label.

    Raises:
        SelectionError: the episode does not hold it.
    """
    step = _place(episode, "denoise_step", denoise_step)
    _inference(episode.arrays["token_id"], inference)
    return _bytes(_means(episode, slice(inference, inference + 1), step)[0])


def map_slab(
    episode: Episode, inference: int, denoise_step: int, layer: int
) -> tuple[bytes, tuple[int, ...]]:
    """Return one full map of the suffix: (head, query, key).

    Args:
        episode: the episode.
        inference: its number.
        denoise_step: its label.
        layer: its label.

    Raises:
        SelectionError: the episode does not hold it.
    """
    array = _inference(_array(episode, RAW), inference)
    step, place = _place(episode, "denoise_step", denoise_step), _place(episode, "layer", layer)
    return _bytes(array.isel(denoise_step=step, layer=place).values)


def prefix_slab(
    episode: Episode, inference: int, prefix_layer: int, query: int
) -> tuple[bytes, tuple[int, ...]]:
    """Return what one prefix token attends to in one layer of the language model: (head, prefix_key).

    Args:
        episode: the episode.
        inference: its number.
        prefix_layer: its label.
        query: key token of the prefix.

    Raises:
        SelectionError: the episode does not hold it.
    """
    array = _inference(_array(episode, PREFIX), inference)
    if not 0 <= query < array.sizes["prefix_query"]:
        raise SelectionError(f"prefix token {query} does not exist: there are {array.sizes['prefix_query']}")
    layer = _place(episode, "prefix_layer", prefix_layer)
    return _bytes(array.isel(prefix_layer=layer, prefix_query=query).values)


def tokens(episode: Episode, inference: int) -> dict[str, Any]:
    """Return what the policy's language tokens were at an inference, and how they group into words.

    Raises:
        SelectionError: there is no such inference.
    """
    data = episode.arrays
    _inference(data["token_id"], inference)
    data = data.isel(inference=[inference])
    groups, group_of_key = token_groups(data)
    return {
        "text": [str(piece) for piece in data["token_text"].values[0]],
        "id": data["token_id"].values[0].tolist(),
        "key": data["text_key"].values.tolist(),
        "key_kind": data["key_kind"].values[0].tolist(),
        "group_of_key": group_of_key[0].tolist(),
        "groups": [
            {"kind": group.kind.name.lower(), "ordinal": group.ordinal, "label": group.label}
            for group in groups
        ],
    }


def timeline(episode: Episode) -> dict[str, Any]:
    """Return what is stored once a frame: the executed action, state, reward, success, and where from."""
    data = episode.arrays
    found = {
        "inference_frame": data["inference_frame"].values.tolist(),
        "frame_inference": data["frame_inference"].values.tolist(),
        "frame_query": data["frame_query"].values.tolist(),
        "reward": _numbers(data["reward"].values),
        "success": data["success"].values.tolist(),
        "action": _numbers(data["action"].values),
        "state": _numbers(data["state"].values) if "state" in data else None,
    }
    return found


def shares(
    episode: Episode, first: int, *, layer: int | str, denoise_step: int, head: int | str
) -> dict[str, Any]:
    """Return where attention goes in the inferences from `first` on: shares, and how many tokens it is worth.

    None for an inference whose maps are missing or damaged.

    Args:
        episode: the episode.
        first: number of the first inference, so that a live page asks for the new ones alone.
        layer: label, or "mean" of the layers that `facts` names.
        denoise_step: label.
        head: label, "mean", or "max", whose shares may sum to more than 1.

    Raises:
        SelectionError: the episode does not hold it.
    """
    n = episode.n_inferences
    if not 0 <= first <= n:
        raise SelectionError(f"inference {first} does not exist: the episode has {n}, expected 0 to {n}")
    data = episode.arrays.isel(inference=slice(first, n))

    def read(block: slice) -> xr.DataArray:
        part = data.isel(inference=block)
        return _executed_attention(part, layer=layer, denoise_step=denoise_step, head=head).load()

    rows = np.full((n - first, data.sizes["key"]), np.nan, np.float32)
    for block, found in _in_blocks(n - first, read):
        rows[block] = found.transpose("inference", "key").values
    maps = xr.DataArray(rows, dims=("inference", "key"), coords={"inference": np.arange(n - first)})
    share = by_modality(data, maps).transpose("inference", "modality")
    return {
        "first": first,
        "modalities": [str(name) for name in share["modality"].values],
        "share": _numbers(share.values),
        "effective_tokens": _numbers(sharpness(maps)["effective_number"].values),
    }


def ranges(episode: Episode, denoise_step: int) -> dict[str, Any]:
    """Return where the colour range of the whole episode ends, for every choice of layer and head.

    The `CLIP` percentile of a camera's patches in all inferences, as `analysis`'s `episode_ranges` has it;
    without those that are damaged.

    Args:
        episode: the episode.
        denoise_step: label.

    Returns:
        `layers` and `heads`, the labels and then "mean" (and "max"); `ranges`, a camera's full name → (layer,
        head) shares of attention.

    Raises:
        SelectionError: the episode does not hold it.
    """
    step = _place(episode, "denoise_step", denoise_step)
    images = [segment for segment in episode.layout.segments if segment.kind == "image"]
    views = {
        camera.name: slice(segment.start, segment.stop)
        for camera, segment in zip(episode.layout.cameras, images, strict=True)
        if not camera.is_empty
    }
    layers: list[int | str] = [*_mean_layers(episode.arrays), "mean"]
    heads: list[int | str] = [*_labels(episode.arrays, "head"), "mean", "max"]
    n = episode.n_inferences
    largest = {
        name: _Largest((len(layers), len(heads)), n * (keys.stop - keys.start))
        for name, keys in views.items()
    }
    for _, means in _in_blocks(n, lambda block: _means(episode, block, step)):
        every = _with_reductions(means.astype(np.float32))
        for name, keys in views.items():
            largest[name].add(np.moveaxis(every[..., keys], 0, 2).reshape(len(layers), len(heads), -1))
    return {
        "layers": layers,
        "heads": heads,
        "ranges": {name: _numbers(found.percentile()) for name, found in largest.items()},
    }


def _with_reductions(means: NDArray[np.float32]) -> NDArray[np.float32]:
    """Append to (inference, layer, head, key) the mean of layers, then the mean and the largest of heads."""
    layers = np.concatenate([means, means.mean(axis=1, keepdims=True)], axis=1)
    # As `analysis.attention` does: the mean of layers first, then heads.
    reduced = [layers.mean(axis=2, keepdims=True), layers.max(axis=2, keepdims=True)]
    return np.concatenate([layers, *reduced], axis=2)


class _Largest:
    """The `CLIP` percentile of many shares of attention, exactly, of which only the largest are kept.

    What lies above the 99.9th percentile is a thousandth of them, so a long episode's maps need not be in
    memory together. No share is negative: a 0 stands for what is not there.

    Args:
        shape: of the percentiles, e.g. (layer, head).
        n_most: numbers that will be added for each of them, at most.
    """

    _ABOVE = (100 - CLIP) / 100  # the part of the numbers that is larger than the percentile

    def __init__(self, shape: tuple[int, ...], n_most: int):
        n_kept = math.floor(max(n_most - 1, 0) * self._ABOVE) + 2  # the percentile lies between two of them
        self._kept = np.zeros((*shape, n_kept), np.float32)
        self._n = np.zeros(shape, int)

    def add(self, values: NDArray[np.float32]) -> None:
        """Take (*shape, value) float32; a missing map, NaN, does not count."""
        is_there = np.isfinite(values)
        self._n += is_there.sum(axis=-1)
        candidates = np.concatenate([self._kept, np.where(is_there, values, 0)], axis=-1)
        n_kept = self._kept.shape[-1]
        self._kept = np.partition(candidates, -n_kept, axis=-1)[..., -n_kept:]

    def percentile(self) -> NDArray[np.float64]:
        """Return (*shape), between neighbours as NumPy has it; 0 where no number was there."""
        descending = np.sort(self._kept, axis=-1)[..., ::-1].astype(np.float64)
        last = np.maximum(self._n - 1, 0)
        from_top = last * self._ABOVE
        upper = np.floor(from_top).astype(int)
        lower = np.minimum(upper + 1, last)
        above, below = (np.take_along_axis(descending, i[..., None], -1)[..., 0] for i in (upper, lower))
        found: NDArray[np.float64] = above + (below - above) * (from_top - upper)
        return found


def groups(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Compare the episodes that solved their task with those that did not.

    Args:
        episodes: of the run; incomplete ones are left out.

    Returns:
        `n_success`, `n_failure`; `what`, how the numbers came about; `left_out`, which episodes cannot be
        read and why, a line each; `rows`, for each modality the mean share over the episodes of either group,
        their difference, and its interval, None where there is none.

    Raises:
        SelectionError: one group would be empty.
    """
    whole = [episode for episode in episodes if episode.is_complete]
    try:
        return _compared(whole)
    except StoreError:
        # A comparison refuses damaged stores without saying which there are; each by itself tells.
        failed = {
            found.path: found.error
            for found in summarise_run(whole, "modality_share", by="frame", query="executed").failed
        }
        if not failed:
            raise
        names = {path: "/".join(Path(path).parts[-2:]) for path in failed}
        readable = [episode for episode in whole if str(episode.path) not in failed]
        return {
            **_compared(readable),
            "left_out": [f"{names[path]}: {error}" for path, error in failed.items()],
        }


def _compared(episodes: Sequence[Episode]) -> dict[str, Any]:
    split = split_by_success(episodes)
    table = compare_overall(split.failures, split.successes, query="executed")
    labels = short_names(camera.name for episode in episodes for camera in episode.layout.cameras)
    columns = {"failure": "a", "success": "b", "difference": "difference", "low": "low", "high": "high"}
    rows = [
        {"label": labels.get(str(row["name"]), str(row["name"]))}
        | {name: _number(row[column]) for name, column in columns.items()}
        for row in table.to_dict("records")
        if row["name"] != "padding"
    ]
    return {
        "n_success": len(split.successes),
        "n_failure": len(split.failures),
        "what": f"Last layer and denoise step, mean of heads. Intervals: {table.attrs['interval']}.",
        "left_out": [],
        "rows": rows,
    }


def action_chunk(episode: Episode, inference: int) -> dict[str, Any]:
    """Return the actions that an inference yielded: (query, action_dim), in the policy's normalised units.

    Raises:
        SelectionError: there is no such inference.
    """
    return {"action": _numbers(_inference(episode.arrays["action_chunk"], inference).values)}


def _mean_layers(data: xr.Dataset) -> list[int]:
    """Return the layers whose means over the executed actions can be had: stored ones, and of full maps."""
    _, stored = stored_layers(data)
    return sorted([*stored, *_added_layers(data)])


def _added_layers(data: xr.Dataset) -> list[int]:
    """Return the layers that have full maps but no stored means."""
    full, stored = stored_layers(data)
    return [layer for layer in full if layer not in stored]


def _means(episode: Episode, inferences: slice, step: int) -> NDArray[np.floating[Any]]:
    """Return (inference, layer, head, key), means over the executed actions, of the layers `_mean_layers`."""
    data = episode.arrays
    full, stored = stored_layers(data)
    at = {"inference": inferences, "denoise_step": step}
    means: list[NDArray[np.floating[Any]]] = []
    if stored:
        means.append(data[MEANS].isel(at).values)
    added = _added_layers(data)
    for layer in added:  # one at a time, for a full map is large
        maps = data[RAW].isel(at | {"layer": full.index(layer), "query": executed_queries(data)})
        mean = maps.astype(np.float32).mean("query", skipna=False).values
        means.append(mean[:, None])
    if not means:
        raise SelectionError("this episode was recorded without suffix attention")
    found: NDArray[np.floating[Any]] = np.concatenate(means, axis=1)[:, np.argsort([*stored, *added])]
    return found


def _executed_attention(
    data: xr.Dataset, *, layer: int | str, denoise_step: int, head: int | str
) -> xr.DataArray:
    """Return (inference, key) of `attention`, mean over the executed actions.

    The mean of layers is of all of `_mean_layers`, where `attention` takes either stored means or full maps.
    """
    where: dict[str, Any] = {"inference": "all", "denoise_step": denoise_step, "query": "executed"}
    _, stored = stored_layers(data)
    added = _added_layers(data)
    if layer != "mean" or not (stored and added):
        return attention(data, layer=layer, head=head, **where)  # type: ignore[arg-type]
    every_head: int | Literal["all"] = head if isinstance(head, int) else "all"
    parts = [attention(data, layer=labels, head=every_head, **where) for labels in (stored, added)]
    mean = xr.concat(parts, "layer").mean("layer", skipna=False)
    if head == "mean":
        return mean.mean("head", skipna=False)
    return mean.max("head", skipna=False) if head == "max" else mean


def _in_blocks[R](n: int, read: Callable[[slice], R]) -> Iterator[tuple[slice, R]]:
    """Yield what is read of `n` inferences, and of which; those that are damaged are passed over.

    Reads nothing once, where there is nothing: what was asked for may not exist.
    """
    blocks = [slice(first, min(first + _BLOCK, n)) for first in range(0, n, _BLOCK)] or [slice(0, 0)]
    while blocks:
        block = blocks.pop(0)
        try:
            found = read(block)
        except LerobotAttnError:  # says what is wrong with all of them
            raise
        except Exception:  # whatever codecs raise for a damaged chunk
            if block.stop - block.start > 1:
                blocks[:0] = [slice(i, i + 1) for i in range(block.start, block.stop)]
        else:
            yield block, found


def _array(episode: Episode, name: str) -> xr.DataArray:
    data = episode.arrays
    if name not in data or 0 in data[name].shape[1:]:
        raise SelectionError(f"this episode was recorded without {name}")
    return data[name]


def _inference(array: xr.DataArray, inference: int) -> xr.DataArray:
    n = array.sizes["inference"]
    if not 0 <= inference < n:
        raise SelectionError(f"inference {inference} does not exist: the episode has {n}")
    return array.isel(inference=inference)


def _place(episode: Episode, dimension: str, label: int) -> int:
    """Return a label's place along its dimension."""
    labels = _labels(episode.arrays, dimension)
    if label not in labels:
        raise SelectionError(f"{dimension} {label} was not recorded: the episode holds {labels}")
    return labels.index(label)


def _bytes(array: NDArray[Any]) -> tuple[bytes, tuple[int, ...]]:
    values = np.ascontiguousarray(array, dtype="<f2")
    return values.tobytes(), values.shape


def _labels(data: xr.Dataset, dimension: str, array: str | None = None) -> list[int]:
    if dimension not in data.coords or (array is not None and array not in data):
        return []
    labels: list[int] = data[dimension].values.tolist()
    return labels


def _names(data: xr.Dataset, dimension: str) -> list[str]:
    return [str(name) for name in data[dimension].values] if dimension in data.coords else []


def _numbers(values: NDArray[Any]) -> list[Any]:
    """Return nested lists of numbers with six significant digits; None where JSON knows no number."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
