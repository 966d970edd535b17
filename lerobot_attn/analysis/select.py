"""Choose attention by label: which frame, layer, denoise step, head and query.

Every function of `lerobot_attn.analysis` takes an episode's dataset and these choices as keywords:

    attention(episode.dataset, frame=12, layer=17, denoise_step=9, head="mean", query="frame")

A Dask-backed dataset gives lazy results. Knows neither images nor words; opens no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
import xarray as xr

from lerobot_attn.analysis.labels import (
    from_end,
    in_words,
    integers,
    picked,
    policy_count,
    positions,
    ranges,
    said_of,
    stored_labels,
)
from lerobot_attn.errors import SelectionError, StoreError
from lerobot_attn.layout import TokenLayout

Labels = int | Sequence[int] | Literal["all"]
Choice = int | Sequence[int] | Literal["all", "mean"]
HeadChoice = int | Sequence[int] | Literal["all", "mean", "max"]
QueryChoice = int | Literal["frame", "executed", "mean", "all"]

RAW, MEANS = "suffix_attention", "suffix_attention_mean"
KEY_COORDINATES = ("key_camera", "key_row", "key_column")


class Where(TypedDict, total=False):
    """What to look at; every key has a default.

    An integer drops its dimension, a list or "all" keeps it, "mean" and "max" reduce it. A map that the store
    lacks is NaN, and so is every mean or maximum that would need it.

    Keys:
        frame: frame number(s), or "all".
        inference: inference number(s), or "all"; the default where no frame is given.
        layer: labels, negative from the policy's last; default -1, "all" for every stored one.
        denoise_step: labels likewise; default -1, the step that yields the action.
        head: labels, "all", "mean" (default) or "max", which is taken last, of the other means.
        query: an action token's number in the chunk, from 0 also where a state token opens the suffix;
            "frame", the token whose action is executed at each frame (the default with `frame`); "executed",
            the mean over the executed ones (the default otherwise); "mean" over all; or "all".
        leave_out: key tokens to leave out, e.g. attention sinks; the rest is rescaled to sum to 1.
    """

    frame: Labels | None
    inference: Labels | None
    layer: Choice
    denoise_step: Choice
    head: HeadChoice
    query: QueryChoice | None
    leave_out: Sequence[int]


def layout_of(dataset: xr.Dataset) -> TokenLayout:
    """Return the token layout that the dataset carries in its attributes.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    try:
        return TokenLayout.from_dict(said_of(dataset)["layout"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the dataset's token layout is missing or damaged ({error!r})") from error


def executed_queries(dataset: xr.Dataset) -> slice:
    """Return the queries whose actions are executed, as a slice."""
    try:
        first, stop = dataset.attrs["executed_queries"]
        return slice(int(first), int(stop))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the dataset does not say which queries are executed ({error!r})") from error


def attention(
    dataset: xr.Dataset,
    *,
    frame: Labels | None = None,
    inference: Labels | None = None,
    layer: Choice = -1,
    denoise_step: Choice = -1,
    head: HeadChoice = "mean",
    query: QueryChoice | None = None,
    leave_out: Sequence[int] = (),
) -> xr.DataArray:
    """Select suffix attention by label. See `Where` for the choices.

    Full maps are used where every layer asked for has them. Otherwise, and for `query="executed"`, the stored
    means over the executed actions are; `attrs["source"]` and `attrs["query"]` say what was used.

    Returns:
        (frame or inference, denoise_step, layer, head, query, key) without the dimensions that were dropped
        or reduced: float32 share of attention, rows sum to 1 over key (not with `head="max"`). Its attributes
        say in words what was chosen.

    Raises:
        SelectionError: a label that the episode does not hold; the message names those that it does.
    """
    if frame is not None and inference is not None:
        raise SelectionError(f"got both frame={frame!r} and inference={inference!r}, expected one of them")
    by_frame = frame is not None
    query = ("frame" if by_frame else "executed") if query is None else query
    query = checked_query(dataset, query, by_frame=by_frame)
    source, layers = _source(dataset, layer, query)
    array = dataset[source]
    if source == MEANS:
        array = array.rename(all_layer="layer")
    array = picked(array, "layer", layers)
    steps = stored_labels(dataset, "denoise_step", denoise_step, "n_denoise_steps")
    array = picked(array, "denoise_step", steps)
    heads = stored_labels(dataset, "head", head, "n_heads", ("all", "mean", "max"))
    if not isinstance(head, str):
        array = picked(array, "head", heads)
    array, query_text = _select_rows(dataset, array, frame, inference, query, source)
    array = array.astype(np.float32)
    if array.size == 0:
        array = array.compute()  # Dask cannot reduce an array that holds nothing
    if isinstance(denoise_step, str) and denoise_step == "mean":
        array = array.mean("denoise_step", skipna=False)
    if isinstance(layer, str) and layer == "mean":
        array = array.mean("layer", skipna=False)
    if isinstance(head, str) and head != "all":
        array = array.mean("head", skipna=False) if head == "mean" else array.max("head", skipna=False)
    if len(leave_out):
        array = _leave_out(array, leave_out)
    n_steps, n_left_out = policy_count(dataset, "n_denoise_steps"), len(leave_out)
    plural = "s" if n_left_out > 1 else ""
    array.attrs = {
        "long_name": "attention",
        "units": "share of attention",
        "source": source,
        "query": query_text,
        "layer": in_words("layer", layer, layers, policy_count(dataset, "n_layers")),
        "denoise_step": in_words("denoise step", denoise_step, steps, n_steps),
        "head": in_words("head", head, heads, policy_count(dataset, "n_heads")),
        "left_out": f"{n_left_out} key token{plural} left out" if n_left_out else "",
    }
    return array


def frames_of(dataset: xr.Dataset, frame: Labels) -> int | list[int]:
    """Return frame numbers after checking them; negative ones count from the end.

    Raises:
        SelectionError: no such frame.
    """
    return positions("frame", frame, dataset.sizes.get("frame", 0))


def stored_layers(dataset: xr.Dataset) -> tuple[list[int], list[int]]:
    """Return the layers with full maps, and those with means over the executed actions."""
    full = dataset["layer"].values.tolist() if RAW in dataset else []
    means = dataset["all_layer"].values.tolist() if MEANS in dataset else []
    return full, means


def action_queries(dataset: xr.Dataset) -> slice:
    """Return the queries that are action tokens: all of them unless a state token opens the suffix."""
    layout = layout_of(dataset)
    return slice(layout.first_action_query, layout.first_action_query + len(layout.actions))


def checked_query(dataset: xr.Dataset, query: QueryChoice, *, by_frame: bool) -> QueryChoice:
    """Return a choice of query after checking it.

    Raises:
        SelectionError: no such action token or word, or "frame" without a frame.
    """
    words = ("frame", "executed", "mean", "all")
    if isinstance(query, str):
        if query not in words:
            raise SelectionError(
                f"query {query!r}: expected an action token's index or one of {', '.join(words)}"
            )
        if query == "frame" and not by_frame:
            raise SelectionError("query='frame' is the action executed at a frame: expected frame= with it")
        return query
    number, n_actions = integers("query", query, "a word"), len(layout_of(dataset).actions)
    if not isinstance(number, int) or not 0 <= number < n_actions:
        raise SelectionError(
            f"query {query} does not exist: a chunk has {n_actions}, expected one of 0 to {n_actions - 1}"
        )
    return number


def _source(dataset: xr.Dataset, layer: Choice, query: QueryChoice) -> tuple[str, int | list[int]]:
    """Choose full maps or means, and return the layers' labels in it."""
    full, means = stored_layers(dataset)
    if not full and not means:
        raise SelectionError("the episode holds no suffix attention; record with layers or mean_layers")
    if isinstance(query, int):
        executed, position = executed_queries(dataset), action_queries(dataset).start + query
        covered, prefer_means = executed.start <= position < executed.stop, not full
    else:
        covered = query in ("executed", "frame")
        prefer_means = len(means) >= len(full)
    if isinstance(layer, str):
        if layer not in ("all", "mean"):
            raise SelectionError(f"layer {layer!r}: expected a number, a list, 'all' or 'mean'")
        labels: int | list[int] = means if covered and prefer_means else full
    else:
        last = max([*full, *means])
        n_layers = policy_count(dataset, "n_layers") or last + 1
        labels = from_end("layer", layer, n_layers)
    wanted = [labels] if isinstance(labels, int) else labels
    in_means, in_full = (bool(wanted) and set(wanted) <= set(saved) for saved in (means, full))
    if in_means and query == "executed":
        return MEANS, labels
    if in_full:
        return RAW, labels
    if in_means and covered:
        return MEANS, labels
    saved = f"{ranges(full) or 'none'} as full maps, {ranges(means) or 'none'} as means over executed actions"
    if in_means:
        raise SelectionError(
            f"query={query!r} needs full maps of layer {ranges(wanted)}; saved are {saved}; "
            "choose query='executed' or a layer with full maps"
        )
    missing = [value for value in wanted if value not in full and value not in means]
    if wanted and not missing:
        raise SelectionError(
            f"layers {ranges(wanted)} are not all in the same array; saved are {saved}; "
            "choose layers of one kind"
        )
    raise SelectionError(f"layer {ranges(missing) or repr(layer)} was not saved; saved are {saved}")


def _select_rows(
    dataset: xr.Dataset,
    array: xr.DataArray,
    frame: Labels | None,
    inference: Labels | None,
    query: QueryChoice,
    source: str,
) -> tuple[xr.DataArray, str]:
    """Select along inference or frame, and along query; and say in words which query it is."""
    executed, actions = executed_queries(dataset), action_queries(dataset)
    first = actions.start
    mean_text = f"mean of executed actions {executed.start - first}-{executed.stop - 1 - first}"
    if frame is None:
        chosen = positions("inference", "all" if inference is None else inference, dataset.sizes["inference"])
        array = array.isel(inference=chosen)
        labels = ("inference", np.array(chosen, int)) if isinstance(chosen, list) else chosen
        array = array.assign_coords(inference=labels)
        if source == MEANS:
            return array, mean_text
        return _reduce_query(array, query, executed, actions, mean_text)
    frames = frames_of(dataset, frame)
    wanted, order = np.unique(np.array(frames, int), return_inverse=True)
    inferences = dataset["frame_inference"].values[wanted]
    if source == RAW and query == "frame":
        queries = dataset["frame_query"].values[wanted]
        if isinstance(frames, int):
            one = array.isel(inference=int(inferences[0]), query=int(queries[0]))
            return one.assign_coords(frame=frames), f"action {int(queries[0]) - first}, executed at the frame"
        # One inference at a time: its frames share a chunk, and no more than one is ever held.
        pieces = []
        for value in dict.fromkeys(inferences.tolist()):
            at = inferences == value
            piece = (
                array.isel(inference=value).isel(query=queries[at]).rename(query="frame").astype(np.float32)
            )
            pieces.append(piece.assign_coords(frame=wanted[at]))
        if not pieces:
            none = array.isel(inference=slice(0), query=0).rename(inference="frame")
            pieces = [none.assign_coords(frame=wanted)]
        joined = xr.concat(pieces, "frame").sel(frame=wanted[order])
        return joined.transpose("frame", ...), "the action executed at the frame"
    unique, back = np.unique(inferences, return_inverse=True)
    array = array.isel(inference=unique)
    text = mean_text
    if source == RAW:
        array, text = _reduce_query(array, query, executed, actions, mean_text)
    if isinstance(frames, int):
        return array.isel(inference=0).assign_coords(frame=frames), text
    array = array.isel(inference=xr.DataArray(back[order], dims="frame")).assign_coords(frame=wanted[order])
    return array.transpose("frame", ...), text


def _reduce_query(
    array: xr.DataArray, query: QueryChoice, executed: slice, actions: slice, mean_text: str
) -> tuple[xr.DataArray, str]:
    if query == "executed":
        return array.isel(query=executed).astype(np.float32).mean("query", skipna=False), mean_text
    if query == "mean":
        return array.isel(query=actions).astype(np.float32).mean("query", skipna=False), "mean of all actions"
    if query == "all":
        array = array.isel(query=actions)
        return array.assign_coords(query=np.arange(array.sizes["query"])), "every action"
    assert isinstance(query, int)
    return array.isel(query=actions.start + query), f"action {query}"


def _leave_out(array: xr.DataArray, keys: Sequence[int]) -> xr.DataArray:
    n_keys = array.sizes["key"]
    bad = [key for key in keys if not 0 <= key < n_keys]
    if bad:
        raise SelectionError(f"leave_out: key {bad[0]} does not exist, expected 0 to {n_keys - 1}")
    keep = np.ones(n_keys, np.float32)
    keep[list(keys)] = 0
    kept = array * xr.DataArray(keep, dims="key")
    total = kept.sum("key", skipna=False)
    return kept / total.where(total != 0, 1)  # nothing left stays 0, a missing map NaN
