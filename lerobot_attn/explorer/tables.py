"""An episode's tables as JSON values: a row per frame or inference, and the prompt's tokens.

Pure functions on an episode; knows no request.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import xarray as xr

from lerobot_attn.analysis.measures import sharpness
from lerobot_attn.analysis.select import attention, stored_layers
from lerobot_attn.analysis.tokens import by_modality, token_groups
from lerobot_attn.errors import SelectionError
from lerobot_attn.explorer.slabs import added_layers, in_blocks, of_inference
from lerobot_attn.explorer.values import numbers
from lerobot_attn.store.reader import Episode


def tokens(episode: Episode, inference: int) -> dict[str, Any]:
    """Return what the policy's language tokens were at an inference, and how they group into words.

    Raises:
        SelectionError: there is no such inference.
    """
    data = episode.arrays
    of_inference(data["token_id"], inference)
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
    return {
        "inference_frame": data["inference_frame"].values.tolist(),
        "frame_inference": data["frame_inference"].values.tolist(),
        "frame_query": data["frame_query"].values.tolist(),
        "reward": numbers(data["reward"].values),
        "success": data["success"].values.tolist(),
        "action": numbers(data["action"].values),
        "state": numbers(data["state"].values) if "state" in data else None,
    }


def action_chunk(episode: Episode, inference: int) -> dict[str, Any]:
    """Return the actions that an inference yielded: (query, action_dim), in the policy's normalised units.

    Raises:
        SelectionError: there is no such inference.
    """
    return {"action": numbers(of_inference(episode.arrays["action_chunk"], inference).values)}


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
    for block, found in in_blocks(n - first, read):
        rows[block] = found.transpose("inference", "key").values
    maps = xr.DataArray(rows, dims=("inference", "key"), coords={"inference": np.arange(n - first)})
    share = by_modality(data, maps).transpose("inference", "modality")
    return {
        "first": first,
        "modalities": [str(name) for name in share["modality"].values],
        "share": numbers(share.values),
        "effective_tokens": numbers(sharpness(maps)["effective_number"].values),
    }


def _executed_attention(
    data: xr.Dataset, *, layer: int | str, denoise_step: int, head: int | str
) -> xr.DataArray:
    """Return (inference, key) of `attention`, mean over the executed actions.

    The mean of layers is of all of `mean_layers`, where `attention` takes either stored means or full maps.
    """
    where: dict[str, Any] = {"inference": "all", "denoise_step": denoise_step, "query": "executed"}
    _, stored = stored_layers(data)
    added = added_layers(data)
    if layer != "mean" or not (stored and added):
        return attention(data, layer=layer, head=head, **where)  # type: ignore[arg-type]
    every_head: int | Literal["all"] = head if isinstance(head, int) else "all"
    parts = [attention(data, layer=labels, head=every_head, **where) for labels in (stored, added)]
    mean = xr.concat(parts, "layer").mean("layer", skipna=False)
    if head == "mean":
        return mean.mean("head", skipna=False)
    return mean.max("head", skipna=False) if head == "max" else mean
