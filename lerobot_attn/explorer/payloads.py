"""What the explorer answers: an episode's facts and tables as JSON, its attention as little-endian float16.

Pure functions on an episode. A slab holds everything that one view of a frame needs, so that changing layer,
head, camera or normalisation asks for nothing more.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.measures import sharpness
from lerobot_attn.analysis.select import MEANS, RAW, attention
from lerobot_attn.analysis.tokens import modality_share, token_groups
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import Kind
from lerobot_attn.store.reader import Episode

PREFIX = "prefix_attention"


def facts(episode: Episode) -> dict[str, Any]:
    """Return what the page must know of an episode before it draws: sizes, labels, layout, cameras."""
    data, attributes, layout = episode.arrays, episode.attributes, episode.layout
    policy = attributes.get("policy", {})
    return {
        "task": episode.task,
        "task_group": attributes.get("task_group"),
        "task_id": attributes.get("task_id"),
        "episode": attributes.get("episode_index"),
        "seed": attributes.get("seed"),
        "success": episode.success,
        "complete": episode.is_complete,
        "random_weights": episode.has_random_weights,
        "policy": policy.get("type"),
        "n_frames": episode.n_frames,
        "n_inferences": episode.n_inferences,
        "n_layers": policy.get("n_layers"),
        "n_heads": policy.get("n_heads"),
        "n_queries": layout.n_queries,
        "n_keys": layout.n_keys,
        "first_action_query": layout.first_action_query,
        "executed_queries": attributes.get("executed_queries"),
        "mean_layers": _labels(data, "all_layer", MEANS),
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
        "cameras": [
            {
                "name": camera.name,
                "label": camera.name.rpartition(".")[2],
                "geometry": None if camera.geometry is None else vars(camera.geometry),
                "has_video": camera.name in episode.videos,
            }
            for camera in layout.cameras
        ],
        "kinds": {kind.name.lower(): int(kind) for kind in Kind},
    }


def mean_slab(episode: Episode, inference: int, denoise_step: int) -> tuple[bytes, tuple[int, ...]]:
    """Return one denoise step's stored means: (layer, head, key).

    Args:
        episode: the episode.
        inference: its number.
        denoise_step: its label.

    Raises:
        SelectionError: the episode does not hold it.
    """
    array = _inference(_array(episode, MEANS), inference)
    return _bytes(array.isel(denoise_step=_place(episode, "denoise_step", denoise_step)))


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
    return _bytes(array.isel(denoise_step=step, layer=place))


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
    return _bytes(array.isel(prefix_layer=layer, prefix_query=query))


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

    Args:
        episode: the episode.
        first: number of the first inference, so that a live page asks for the new ones alone.
        layer: label, or "mean".
        denoise_step: label.
        head: label, or "mean".

    Raises:
        SelectionError: the episode does not hold it.
    """
    n = episode.n_inferences
    if not 0 <= first <= n:
        raise SelectionError(f"inference {first} does not exist: the episode has {n}, expected 0 to {n}")
    data = episode.arrays.isel(inference=slice(first, n))
    where: dict[str, Any] = {
        "inference": "all",
        "layer": layer,
        "denoise_step": denoise_step,
        "head": head,
    }
    share = modality_share(data, **where).transpose("inference", "modality")
    return {
        "first": first,
        "modalities": [str(name) for name in share["modality"].values],
        "share": _numbers(share.values),
        "effective_tokens": _numbers(sharpness(attention(data, **where))["effective_number"].values),
    }


def action_chunk(episode: Episode, inference: int) -> dict[str, Any]:
    """Return the actions that an inference yielded: (query, action_dim), in the policy's normalised units.

    Raises:
        SelectionError: there is no such inference.
    """
    return {"action": _numbers(_inference(episode.arrays["action_chunk"], inference).values)}


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


def _bytes(array: xr.DataArray) -> tuple[bytes, tuple[int, ...]]:
    values = np.ascontiguousarray(array.values, dtype="<f2")
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
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
