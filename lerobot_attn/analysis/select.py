"""Choose attention by label: which frame, layer, denoise step, head and query.

Every function of `lerobot_attn.analysis` takes an episode's dataset and these choices as keywords:

    attention(episode.dataset, frame=12, layer=17, denoise_step=9, head="mean", query="frame")

A Dask-backed dataset gives lazy results. Knows neither images nor words; opens no file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, TypedDict

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis import reduce
from lerobot_attn.analysis.decoded import ALL_IN_WORDS, check_read, decodes, mean_of_read, token_in_words
from lerobot_attn.analysis.labels import (
    default_layer,
    frame_in_words,
    frame_labels,
    from_end,
    in_words,
    integers,
    picked,
    policy_count,
    positions,
    ranges,
    stored_labels,
)
from lerobot_attn.analysis.renamed import warn_renamed
from lerobot_attn.errors import SelectionError, StoreError
from lerobot_attn.layout import TokenLayout

Labels = int | Sequence[int] | Literal["all"]
Choice = int | Sequence[int] | Literal["all", "mean"]
LayerChoice = Choice | None
HeadChoice = int | Sequence[int] | Literal["all", "mean", "max"]
QueryChoice = int | Literal["frame", "executed", "mean", "all"]

RAW, MEANS, PREFIX = "suffix_attention", "suffix_attention_mean", "prefix_attention"
KEY_COORDINATES = ("key_camera", "key_row", "key_column")


class Where(TypedDict, total=False):
    """What to look at; every key has a default.

    An integer drops its dimension, a list or "all" keeps it, "mean" and "max" reduce it. A map that the store
    lacks is NaN, and so is every mean or maximum that would need it. Keys that a layer cannot see are NaN
    too, and are left out of sums and means: see `lerobot_attn.analysis.reduce`.

    Keys:
        frame: frame number(s), or "all".
        inference: inference number(s), or "all"; the default where no frame is given.
        layer: labels, negative from the policy's last; by default the last stored one, or the one that the
            policy has for it (GR00T: the last that sees images); "all" for every stored one.
        denoise_step: labels likewise; by default the last stored one, mostly the step that yields the action.
        head: labels, "all", "mean" (default) or "max", which is taken last, of the other means.
        query: an action token's number in the chunk, from 0 also where a state token opens the suffix;
            "frame", the token whose action is executed at each frame (the default with `frame`, if every
            frame of the episode has one); "executed", the mean over the executed ones (the default
            otherwise); "mean" over all; or "all".
        exclude: key tokens to leave out, e.g. attention sinks; the rest is rescaled to sum to 1.
        leave_out: the former name of `exclude`, deprecated.
    """

    frame: Labels | None
    inference: Labels | None
    layer: LayerChoice
    denoise_step: LayerChoice
    head: HeadChoice
    query: QueryChoice | None
    exclude: Sequence[int]
    leave_out: Sequence[int]


def layout_of(dataset: xr.Dataset) -> TokenLayout:
    """Return the token layout that the dataset carries in its attributes, as an object or as JSON text.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    try:
        layout = dataset.attrs["layout"]
        return _layout_of_text(layout) if isinstance(layout, str) else TokenLayout.from_dict(layout)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the dataset's token layout is missing or damaged ({error!r})") from error


@lru_cache(maxsize=16)
def _layout_of_text(text: str) -> TokenLayout:
    return TokenLayout.from_dict(json.loads(text))


def executed_queries(dataset: xr.Dataset) -> slice:
    """Return the suffix queries whose actions are executed, as a slice of the store's `query`.

    They are no numbers of actions: where a state token opens the suffix, action 0 is query 1. What
    `attention` gives for `query="all"` is labelled by actions, of which `executed_actions` are executed.
    """
    try:
        first, stop = dataset.attrs["executed_queries"]
        return slice(int(first), int(stop))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the dataset does not say which queries are executed ({error!r})") from error


def executed_actions(dataset: xr.Dataset) -> slice:
    """Return which actions of a chunk are executed, as a slice of action numbers, from 0.

    Raises:
        StoreError: the dataset does not say it, or names queries that are no actions.
    """
    queries, layout = executed_queries(dataset), layout_of(dataset)
    try:
        return slice(layout.action_of_query(queries.start), layout.action_of_query(queries.stop - 1) + 1)
    except IndexError as error:
        raise StoreError(
            f"the dataset's executed_queries are {queries.start} to {queries.stop - 1}, expected action "
            f"tokens, {layout.action_queries.start} to {layout.action_queries.stop - 1}"
        ) from error


def executed_in_words(dataset: xr.Dataset) -> str:
    """Say which actions are averaged over: "mean of executed actions 0-9"."""
    if decodes(dataset):
        return ALL_IN_WORDS
    executed = executed_actions(dataset)
    return f"mean of executed actions {executed.start}-{executed.stop - 1}"


def prefix_only_layers(dataset: xr.Dataset) -> list[int]:
    """Return the labels of the stored layers that cannot see the suffix, ascending; none in most policies.

    In their maps the suffix's keys are absent: NaN, which is neither 0 nor a missing map.
    """
    found: set[int] = set()
    for dim in ("layer", "all_layer"):
        name = f"{dim}_sees_suffix"
        if name in dataset.coords:
            found.update(dataset[dim].values[~dataset[name].values.astype(bool)].tolist())
    return sorted(found)


def default_query(dataset: xr.Dataset, *, by_frame: bool) -> QueryChoice:
    """Return the query that is looked at unless another is asked for.

    With frames the token whose action was executed; or the mean over the executed ones, for the whole
    episode, where the action of some frame is no token (RTC, temporal ensembling, relative actions).
    """
    return "frame" if by_frame and bool((dataset["frame_query"].values >= 0).all()) else "executed"


def queries_of_frames(dataset: xr.Dataset, frames: Sequence[int]) -> NDArray[np.integer[Any]]:
    """Return the suffix query of each frame's action, (frame,).

    Raises:
        SelectionError: the action of a frame is no token of a chunk.
        StoreError: the dataset names a query that is no action.
    """
    queries: NDArray[np.integer[Any]] = dataset["frame_query"].values[list(frames)]
    without = [frame for frame, query in zip(frames, queries.tolist(), strict=True) if query < 0]
    if without:
        raise SelectionError(
            f"the action of frame {ranges(sorted(without))} is no token of an inference's chunk; "
            "choose query='executed' or the number of an action"
        )
    try:
        layout_of(dataset).action_of_query(queries)
    except IndexError as error:
        raise StoreError(f"the dataset's frame_query is damaged: {error}") from error
    return queries


def attention(
    dataset: xr.Dataset,
    *,
    frame: Labels | None = None,
    inference: Labels | None = None,
    layer: LayerChoice = None,
    denoise_step: LayerChoice = None,
    head: HeadChoice = "mean",
    query: QueryChoice | None = None,
    exclude: Sequence[int] = (),
    leave_out: Sequence[int] | None = None,
) -> xr.DataArray:
    """Select suffix attention by label. See `Where` for the choices.

    Full maps are used where every layer asked for has them. Otherwise, and for `query="executed"`, the stored
    means over the executed actions are; `attrs["source"]` and `attrs["query"]` say what was used.

    Returns:
        (frame or inference, denoise_step, layer, head, query, key) without the dimensions that were dropped
        or reduced: float32 share of attention, rows sum to 1 over the keys that the layer can see (not with
        `head="max"`; nor the mean of layers of which some cannot see the suffix, see `mean_over`). Keys that
        a layer cannot see are NaN; `attrs["absent_keys"]` names such layers where there are any. The other
        attributes say in words what was chosen.

    Raises:
        SelectionError: a label that the episode does not hold, and the message names those that it does; or a
            frame whose action is no token, with `query="frame"`.
    """
    if leave_out is not None:
        warn_renamed("leave_out", "exclude")
        exclude = leave_out
    if frame is not None and inference is not None:
        raise SelectionError(f"got both frame={frame!r} and inference={inference!r}, expected one of them")
    by_frame = frame is not None
    query = default_query(dataset, by_frame=by_frame) if query is None else query
    query = checked_query(dataset, query, by_frame=by_frame)
    source, layers = _source(dataset, layer, query)
    array = dataset[source]
    if source == MEANS:
        array = array.rename(all_layer="layer")
        array = array.rename({n: "layer_sees_suffix" for n in array.coords if n == "all_layer_sees_suffix"})
    array = picked(array, "layer", layers)
    blind = [label for label in prefix_only_layers(dataset) if label in np.atleast_1d(layers)]
    steps = stored_labels(dataset, "denoise_step", denoise_step, "n_denoise_steps")
    array = picked(array, "denoise_step", steps)
    heads = stored_labels(dataset, "head", head, "n_heads", ("all", "mean", "max"))
    if not isinstance(head, str):
        array = picked(array, "head", heads)

    def reduced(rows: xr.DataArray) -> xr.DataArray:
        if rows.size == 0:
            rows = rows.compute()  # Dask cannot reduce an array that holds nothing
        if isinstance(denoise_step, str) and denoise_step == "mean":
            rows = reduce.plain_mean(rows, "denoise_step")
        if isinstance(layer, str) and layer == "mean":
            rows = reduce.mean_over(rows, "layer", may_lack_keys=bool(blind))
        return reduce.in_float32(reduce.over_heads(rows, head)).astype(np.float32, copy=False)

    labels = {name: label.variable for name, label in array.coords.items() if "inference" not in label.dims}
    array = array.drop_vars(labels)  # or they would be compared and copied with every piece that is read
    array, query_text = _select_rows(dataset, array, frame, inference, query, source, reduced)
    array = array.assign_coords({n: label for n, label in labels.items() if {*label.dims} <= {*array.dims}})
    if len(exclude):
        array = reduce.without(array, exclude, may_lack_keys=bool(blind))
    n_steps, n_left_out = policy_count(dataset, "n_denoise_steps"), len(exclude)
    plural = "s" if n_left_out > 1 else ""
    if "frame" in array.dims:
        array = array.assign_coords(frame_labels(dataset, array["frame"].values.tolist()))
    array.attrs = {
        "long_name": "attention",
        "units": "share of attention",
        "source": source,
        "query": query_text,
        "layer": in_words("layer", layer, layers, policy_count(dataset, "n_layers")),
        "denoise_step": "" if n_steps == 0 else in_words("denoise step", denoise_step, steps, n_steps),
        "head": in_words("head", head, heads, policy_count(dataset, "n_heads")),
        "left_out": f"{n_left_out} key token{plural} left out" if n_left_out else "",
    }
    if blind:
        array.attrs["absent_keys"] = absent_in_words(blind)
    return array


def absent_in_words(layers: Sequence[int]) -> str:
    """Say which layers cannot see the suffix."""
    plural = "s" if len(layers) > 1 else ""
    return f"layer{plural} {ranges(layers)} cannot see the suffix, whose keys are absent there"


def frames_of(dataset: xr.Dataset, frame: Labels) -> int | list[int]:
    """Return frame numbers after checking them; negative ones count from the end.

    Raises:
        SelectionError: no such frame.
    """
    return positions("frame", frame, dataset.sizes.get("frame", 0))


def seen_frame(dataset: xr.Dataset, frame: int) -> int:
    """Return the frame whose image a frame's inference saw, if that inference also gave that frame's action.

    Between two inferences the robot moves on, the map does not: over the image of the returned frame a map
    lies where the policy looked. Where an older inference still acted there, `frame` itself is returned.
    """
    inference = dataset["frame_inference"].values
    seen = int(dataset["inference_frame"].values[inference[frame]])
    return seen if inference[seen] == inference[frame] else frame


def stored_layers(dataset: xr.Dataset) -> tuple[list[int], list[int]]:
    """Return the layers with full maps, and those with means over the executed actions."""
    full = dataset["layer"].values.tolist() if RAW in dataset else []
    means = dataset["all_layer"].values.tolist() if MEANS in dataset else []
    return full, means


def action_queries(dataset: xr.Dataset) -> slice:
    """Return the queries that are action tokens: all of them unless a state token opens the suffix."""
    return layout_of(dataset).action_queries


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


def _source(dataset: xr.Dataset, layer: LayerChoice, query: QueryChoice) -> tuple[str, int | list[int]]:
    """Choose full maps or means, and return the layers' labels in it."""
    full, means = stored_layers(dataset)
    if not full and not means:
        raise SelectionError("the episode holds no suffix attention; record with layers or mean_layers")
    if isinstance(query, int):
        executed = executed_actions(dataset)
        covered, prefer_means = executed.start <= query < executed.stop, not full
    else:
        covered = query in ("executed", "frame")
        prefer_means = len(means) >= len(full)
    labels: int | list[int]
    if layer is None:
        labels = default_layer(dataset, [*full, *means] if covered or not full else full)
    elif isinstance(layer, str):
        if layer not in ("all", "mean"):
            raise SelectionError(f"layer {layer!r}: expected a number, a list, 'all' or 'mean'")
        labels = means if covered and prefer_means else full
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
    reduced: Callable[[xr.DataArray], xr.DataArray],
) -> tuple[xr.DataArray, str]:
    """Select along inference or frame, and along query, reduce that, and say in words which query it is."""

    def read(numbers: Any) -> xr.DataArray:
        rows = array.isel(inference=numbers)
        return reduced(rows if source == MEANS else _over_queries(dataset, rows, query, numbers))

    if frame is None:
        chosen = positions("inference", "all" if inference is None else inference, dataset.sizes["inference"])
        text = _query_in_words(dataset, query, source, chosen)
        labels = ("inference", np.array(chosen, int)) if isinstance(chosen, list) else chosen
        return reduce.in_pieces(array, chosen, read).assign_coords(inference=labels), text
    frames = frames_of(dataset, frame)
    wanted, order = np.unique(np.array(frames, int), return_inverse=True)
    inferences = dataset["frame_inference"].values[wanted]
    if source == RAW and query == "frame":
        queries = queries_of_frames(dataset, wanted.tolist())
        if isinstance(frames, int):
            one = reduced(array.isel(inference=int(inferences[0]), query=int(queries[0])))
            action = layout_of(dataset).action_of_query(int(queries[0]))
            return one.assign_coords(frame=frames), f"action {action}, {frame_in_words(dataset)} the frame"
        # One inference at a time: its frames share a chunk, and no more than one is ever held.
        pieces, places = [], []
        for value in dict.fromkeys(inferences.tolist()):
            places.append(np.flatnonzero(inferences == value))
            pieces.append(reduced(array.isel(inference=value, query=queries[places[-1]])))
        if not pieces:
            pieces = [reduced(array.isel(inference=slice(0), query=0).rename(inference="query"))]
            places = [order]
        array = reduce.joined(pieces, "query").rename(query="frame")
        text = f"the action {frame_in_words(dataset)} the frame"
        back = np.argsort(np.concatenate(places))
    else:
        unique, back = np.unique(inferences, return_inverse=True)
        text = _query_in_words(dataset, query, source, unique)
        if query == "executed" and default_query(dataset, by_frame=True) != "frame":
            text += "; actions of frames are no tokens of a chunk"
        array = reduce.in_pieces(array, unique, read)
        if isinstance(frames, int):
            return array.isel(inference=0).assign_coords(frame=frames), text
        array = array.rename(inference="frame")
    if not np.array_equal(back[order], np.arange(array.sizes["frame"])):
        array = array.isel(frame=back[order])
    return array.transpose("frame", ...).assign_coords(frame=wanted[order]), text


def _over_queries(
    dataset: xr.Dataset, array: xr.DataArray, query: QueryChoice, inferences: Any
) -> xr.DataArray:
    """Select along query, or take the mean over it."""
    layout = layout_of(dataset)
    if query in ("executed", "mean"):
        over = executed_queries(dataset) if query == "executed" else layout.action_queries
        return mean_of_read(dataset, array, inferences, over)
    if query == "all":
        array = array.isel(query=layout.action_queries)
        return array.assign_coords(query=np.arange(array.sizes["query"]))
    assert isinstance(query, int)
    return array.isel(query=layout.query_of_action(query))


def _query_in_words(dataset: xr.Dataset, query: QueryChoice, source: str, inferences: Any) -> str:
    """Say which query it is.

    Raises:
        SelectionError: a decoded token that none of the inferences read.
    """
    if source == MEANS or query == "executed" or (query == "mean" and decodes(dataset)):
        return executed_in_words(dataset)
    if isinstance(query, int):
        check_read(dataset, query, inferences)
        return token_in_words(dataset, query, inferences)
    every = "every decoded token" if decodes(dataset) else "every action"
    return "mean of all actions" if query == "mean" else every
