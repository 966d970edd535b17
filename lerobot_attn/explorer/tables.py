"""An episode's tables as JSON values: a row per frame or inference, and the prompt's tokens.

Pure functions on an episode; knows no request.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from lerobot_attn.analysis.labels import from_end, policy_count, stored_labels
from lerobot_attn.analysis.measures import attention_entropy
from lerobot_attn.analysis.select import attention
from lerobot_attn.analysis.tokens import by_modality, prompt_truncated, token_groups
from lerobot_attn.errors import SelectionError
from lerobot_attn.explorer.means import in_blocks, mean_layers, means_dataset
from lerobot_attn.explorer.slabs import of_inference, place_of
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
        "prompt_truncated": bool(prompt_truncated(data)[0]),
    }


def timeline(episode: Episode) -> dict[str, Any]:
    """Return what is stored once a frame: the executed action, state, reward, success, and where from.

    State, reward, success and the predicted action are None where the recording has none. Query and action
    are -1 where the frame's action is no token of an inference's chunk. In a replay the action is the
    recorded one.
    """
    data, actions = episode.arrays, episode.layout.action_queries
    query = data["frame_query"].values
    is_token = (query >= actions.start) & (query < actions.stop)
    action = np.full(query.shape, -1)
    action[is_token] = episode.layout.action_of_query(query[is_token])
    return {
        "inference_frame": data["inference_frame"].values.tolist(),
        "frame_inference": data["frame_inference"].values.tolist(),
        "frame_query": np.where(is_token, query, -1).tolist(),
        "frame_action": action.tolist(),
        "reward": numbers(data["reward"].values) if "reward" in data else None,
        "success": data["success"].values.tolist() if "success" in data else None,
        "action": numbers(data["action"].values),
        "predicted_action": numbers(data["predicted_action"].values) if "predicted_action" in data else None,
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

    None for an inference whose maps are missing or damaged, and for what a layer cannot see.

    Args:
        episode: the episode.
        first: number of the first inference, so that a live page asks for the new ones alone.
        layer: label, or "mean" of the layers that `facts` names.
        denoise_step: label.
        head: label, "mean", or "max", whose shares may sum to more than 1.

    Raises:
        SelectionError: the episode does not hold it.
    """
    data, n = episode.arrays, episode.n_inferences
    maps = chosen_means(episode, first, layer=layer, denoise_step=denoise_step, head=head)
    share = by_modality(data.isel(inference=slice(first, n)), maps).transpose("inference", "modality")
    return {
        "first": first,
        "modalities": [str(name) for name in share["modality"].values],
        "share": numbers(share.values),
        "effective_tokens": numbers(attention_entropy(maps)["effective_number"].values),
    }


def chosen_means(
    episode: Episode, first: int, *, layer: int | str, denoise_step: int, head: int | str
) -> xr.DataArray:
    """Return (inference, key) float32: means over the executed actions, of the inferences from `first` on.

    NaN where an inference's maps are missing or damaged, and at keys that a layer cannot see. Arguments and
    errors are those of `shares`.
    """
    n = episode.n_inferences
    if not 0 <= first <= n:
        raise SelectionError(f"inference {first} does not exist: the episode has {n}, expected 0 to {n}")
    data = episode.arrays
    step = stored_labels(data, "denoise_step", denoise_step, "n_denoise_steps")
    place = place_of(episode, "denoise_step", step)
    there = mean_layers(data)
    layers = there
    if not isinstance(layer, str):  # one layer is a part of what all of them take to read
        last = policy_count(data, "n_layers") or max(there, default=0) + 1
        layers = [int(number) for number in np.atleast_1d(from_end("layer", layer, last))]

    def read(block: slice) -> xr.DataArray:
        inferences = slice(first + block.start, first + block.stop)
        found = means_dataset(data, inferences, place, layers)
        where: dict[str, Any] = {"layer": "mean" if isinstance(layer, str) else layers[0], "head": head}
        return attention(found, inference="all", denoise_step=step, **where)

    rows = np.full((n - first, data.sizes["key"]), np.nan, np.float32)
    for block, found in in_blocks(n - first, read):
        rows[block] = found.transpose("inference", "key").values
    return xr.DataArray(rows, dims=("inference", "key"), coords={"inference": np.arange(n - first)})
