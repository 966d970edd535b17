"""Attention through all layers, from action tokens down to what came in: attention rollout and flow.

    attention_rollout(data, frame=12)   # (key,): what the action was mixed from
    attention_flow(data, frame=12)      # (target,): how much could have flowed at most

Both are of Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers" (arXiv:2005.00928). Knows no
values, MLPs or norms, only maps. Draws nothing; opens no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.decoded import ALL_IN_WORDS, check_read, decodes, is_read, token_in_words
from lerobot_attn.analysis.labels import integers
from lerobot_attn.analysis.renamed import warn_renamed
from lerobot_attn.analysis.rows import Rows
from lerobot_attn.analysis.select import (
    KEY_COORDINATES,
    HeadChoice,
    Labels,
    LayerChoice,
    QueryChoice,
    checked_query,
    default_query,
    executed_in_words,
    executed_queries,
    layout_of,
    queries_of_frames,
)
from lerobot_attn.analysis.stack import LayerStack
from lerobot_attn.analysis.tokens import MODALITY_OF, PADDING, modality_keys, token_groups
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import Kind

# Of a capacity of 1. The flow from one token is 1 at most, so no sum of the solver's int32 overflows.
_CAPACITY = 2**30

Targets = Literal["groups", "tokens"] | Sequence[int]

_Floats = NDArray[np.float32]
_Integers = NDArray[np.integer[Any]]


def attention_rollout(
    dataset: xr.Dataset,
    *,
    frame: Labels | None = None,
    inference: Labels | None = None,
    layer: int | None = None,
    denoise_step: LayerChoice = None,
    head: HeadChoice = "mean",
    query: QueryChoice | None = None,
) -> xr.DataArray:
    """Follow attention down through all layers, from action tokens to what came in.

    Attention rollout of Abnar & Zuidema 2020 (arXiv:2005.00928): half of a token's next state is taken to be
    its own (the residual connection), half what it attends to, A' = A/2 + I/2, and these are multiplied
    through the layers. The prefix is carried into the suffix as the policy does it: expert layer l reads the
    language model's hidden states *before* layer l. With P of the prefix and S of the suffix tokens,

        P[0] = I    P[l+1] = P[l]/2 + A_prefix[l] P[l] / 2
        S[0] = I    S[l+1] = S[l]/2 + (A_suffix[l][:, prefix] P[l] + A_suffix[l][:, suffix] S[l]) / 2

    So the language model's attention in `layer` itself and above never counts. Rows of A are first rescaled
    to sum to 1, which undoes the store's rounding. An expert layer l that cannot see the suffix has rows over
    the prefix alone, and a suffix token keeps of the suffix no more than itself, by the residual connection:

        S[l+1] = S[l]/2 + A_suffix[l][:, prefix] P[l] / 2

    because no other token of the suffix is among what it attends to.

    Limits: values, MLPs, norms and the size of the residual stream are ignored. The mean over heads is the
    paper's (here over the saved ones) and blurs what they do apart; a head by number pairs the language
    model's with the expert's of that number, which have nothing in common. It stays within one denoise step:
    what earlier steps did to the actions that come in is not followed.

    Computed when called, one inference and one layer at a time.

    Args:
        dataset: an episode's.
        frame: frame number(s), or "all".
        inference: inference number(s), or "all"; the default where no frame is given.
        layer: the expert's layer at whose output the tokens are looked at; negative from the policy's last;
            by default the last with full maps.
        denoise_step: labels, negative from the policy's last; by default the last stored one; "all", or the
            "mean" of the steps' rollouts.
        head: labels, "all", "mean" or "max" (of the maps, before they are multiplied).
        query: an action token, "frame", "executed", "mean" or "all", as in `attention`.

    Returns:
        (frame or inference, denoise_step, head, query, key) without the dimensions that were dropped or
        reduced: float32 share of the input tokens, rows sum to 1 over key. Coordinates and attributes are
        those of `attention`.

    Raises:
        SelectionError: the full maps up to the layer, or the prefix maps below it, were not all saved; or no
            such frame, layer, …
    """
    by_frame = frame is not None
    query = default_query(dataset, by_frame=by_frame) if query is None else query
    rows = Rows.of(dataset, frame, inference)
    query = checked_query(dataset, query, by_frame=by_frame)
    if isinstance(query, int):
        check_read(dataset, query, rows.inferences)
    stack = LayerStack.of(dataset, "rollout", layer, denoise_step, head)
    starts, said = _starts(dataset, query)
    each = 1 if query == "frame" else len(starts)
    shape = (len(rows.inferences), len(stack.steps), stack.n_heads, each, stack.n_keys)
    shares = np.zeros(shape, np.float32)
    for number in np.unique(rows.inferences).tolist():
        at = np.flatnonzero(rows.inferences == number)
        if query == "frame":
            queries = queries_of_frames(dataset, np.atleast_1d(rows.numbers)[at].tolist())
            rolled = _rolled(stack, number, starts[queries])
            shares[at, ..., 0, :] = np.moveaxis(rolled, 2, 0)
            if not rows.is_list:
                action = layout_of(dataset).action_of_query(int(queries[0]))
                said = f"action {action}, executed at the frame"
        else:
            read = is_read(dataset, number)
            shares[at] = _rolled(stack, number, _of_read(starts, read))
            if not isinstance(query, str) and not rows.is_list:
                said = token_in_words(dataset, query, number)
    coords: dict[str, Any] = _key_coordinates(dataset)
    coords |= stack.coordinates() | {"layer": stack.top}
    array = xr.DataArray(shares, coords, ("inference", "denoise_step", "head", "query", "key"))
    array = array.assign_coords(query=np.arange(each)) if query == "all" else array.isel(query=0)
    result = stack.drop(rows.label(array))
    result.attrs = stack.attributes() | {"long_name": "attention rollout", "query": said, "left_out": ""}
    return result


def attention_flow(
    dataset: xr.Dataset,
    *,
    frame: int | None = None,
    inference: int | None = None,
    layer: int | None = None,
    denoise_step: int | None = None,
    head: int | Literal["mean", "max"] = "mean",
    query: int | Literal["frame"] | None = None,
    targets: Targets = "groups",
    min_share: float = 0.0,
) -> xr.DataArray:
    """Return how much could flow at most from an action token down to what came in.

    Attention flow of Abnar & Zuidema 2020 (arXiv:2005.00928): in the graph whose nodes are tokens at each
    layer and whose edges are those of `attention_rollout`, with the same A' = A/2 + I/2 as capacities, the
    maximum flow from the action token at the output of `layer` to an input token. Unlike rollout it lets what
    is attended to be routed anew at each token, so it tells what attention permits, not what it mixes.

    Read it with care. Each target has a flow of its own that may use every edge, so flows of several targets
    do not sum to 1. What leaves a token has a capacity of 1 in all, so many layers of even attention let
    everything through: the larger the target and the deeper the policy, the nearer to 1 whatever the policy
    attends to. `layer` looks at fewer layers. The limits of `attention_rollout` hold too.

    Capacities are whole multiples of 2^-30, so a flow is off by at most 2^-31 for each edge of its smallest
    cut. It takes one maximum flow (Dinic, of scipy) a target. Measured on two CPU cores at 968 + 50 tokens,
    613 of them unmasked, min_share 0: 4 layers (1 million edges) take 0.3 s to read and build and 0.07 s a
    target, 40 s for "tokens"; 18 layers (those repeated, 6 million edges) 2 s, 0.16 s a target and 0.5 GB.

    Args:
        dataset: an episode's.
        frame: a frame's number.
        inference: an inference's number, with `query` an action token.
        layer: the expert's layer at whose output the token is looked at; negative from the policy's last; by
            default the last with full maps.
        denoise_step: a label, negative from the policy's last; by default the last stored one.
        head: a label, "mean" or "max", as in `attention_rollout`.
        query: an action token; "frame" (the default with `frame`), the one executed at the frame.
        targets: "groups": each modality, then each word and each number of the state, whose tokens share one
            flow; "tokens": each key; or a list of keys.
        min_share: edges of less capacity are left out. Quicker, and a flow can only come out smaller.

    Returns:
        (target,) or (key,) float32 largest flow, 0 to 1; NaN where the store lacks one of the maps.
        Coordinates of target: `label` and `kind` ("modality", "task" or "state"). Padding tokens get 0.

    Raises:
        SelectionError: as `attention_rollout`; or more than one frame, inference, query, step or head was
            asked for.
    """
    if (frame is None) == (inference is None):
        raise SelectionError("flow is of one action token: give either frame=, or inference= and query=")
    rows = Rows.of(dataset, frame, inference)
    query = "frame" if query is None and frame is not None else query
    if rows.is_list or query is None or query in ("executed", "mean", "all"):
        raise SelectionError(
            "flow is of one action token: expected one frame, or one inference and the number of a query; "
            f"got {rows.dim} {frame if rows.dim == 'frame' else inference!r} and query {query!r}"
        )
    query_number = checked_query(dataset, query, by_frame=frame is not None)
    if not 0 <= min_share < 1:
        raise SelectionError(f"min_share: got {min_share!r}, expected at least 0 and less than 1")
    stack = LayerStack.of(dataset, "flow", layer, denoise_step, head)
    if len(stack.steps) != 1 or stack.n_heads != 1:
        raise SelectionError(
            f"flow is of one map a layer: expected one denoise step, and one head, 'mean' or 'max'; "
            f"got denoise step {stack.steps[0] if denoise_step is None else denoise_step!r} and head {head!r}"
        )
    number = int(rows.inferences[0])
    layout = layout_of(dataset)
    if query_number == "frame":
        (token,) = queries_of_frames(dataset, np.atleast_1d(rows.numbers).tolist()).tolist()
        said = f"action {layout.action_of_query(token)}, executed at the frame"
    else:
        assert isinstance(query_number, int)
        token, said = layout.query_of_action(query_number), token_in_words(dataset, query_number, number)
        check_read(dataset, query_number, number)
    wanted, coords, dim = _targets(dataset, targets, number)
    values = _flows(stack, number, token, wanted, min_share)
    at: dict[str, Any] = {rows.dim: rows.numbers, "layer": stack.top, "denoise_step": stack.steps[0]}
    at |= {} if isinstance(head, str) else {"head": stack.heads[0]}
    result = xr.DataArray(values, coords | at, (dim,))
    result.attrs = stack.attributes() | {
        "long_name": "attention flow",
        "units": "largest flow",
        "query": said,
        "min_share": min_share,
    }
    return result


def rollout(*args: Any, **kwargs: Any) -> xr.DataArray:
    """Return what `attention_rollout` does; deprecated."""
    warn_renamed("rollout", "attention_rollout")
    return attention_rollout(*args, **kwargs)


def flow(*args: Any, **kwargs: Any) -> xr.DataArray:
    """Return what `attention_flow` does; deprecated."""
    warn_renamed("flow", "attention_flow")
    return attention_flow(*args, **kwargs)


def _key_coordinates(dataset: xr.Dataset) -> dict[str, Any]:
    return {name: ("key", dataset[name].values) for name in KEY_COORDINATES if name in dataset.coords}


def _starts(dataset: xr.Dataset, query: QueryChoice) -> tuple[_Floats, str]:
    """Return the queries as weights of the suffix tokens, (row, suffix token) float32, and them in words.

    For "frame", a row for every suffix token: the frames choose among them.
    """
    layout = layout_of(dataset)
    actions = layout.action_queries
    one = np.eye(dataset.sizes["query"], dtype=np.float32)
    if query == "frame":
        return one, "the action executed at the frame"
    if query == "all":
        return one[actions], "every decoded token" if decodes(dataset) else "every action"
    if query == "executed":
        return one[executed_queries(dataset)].mean(axis=0, keepdims=True), executed_in_words(dataset)
    if query == "mean":
        said = ALL_IN_WORDS if decodes(dataset) else "mean of all actions"
        return one[actions].mean(axis=0, keepdims=True), said
    assert isinstance(query, int)
    return one[[layout.query_of_action(query)]], token_in_words(dataset, query)


def _of_read(starts: _Floats, is_read: NDArray[np.bool_]) -> _Floats:
    """Leave out tokens that have no rows; a row of weights without any token that has one is NaN."""
    kept = starts * is_read
    total = kept.sum(axis=1, keepdims=True)
    weights: _Floats = kept / np.where(total > 0, total, np.float32(np.nan))
    return weights


def _rolled(stack: LayerStack, inference: int, starts: _Floats) -> _Floats:
    """Carry rows from the top down.

    The rows of S are all that is wanted, so they are multiplied from the left, which never forms P: a few
    rows times a map in each layer instead of a map times a map.

    Args:
        stack: the maps.
        inference: whose.
        starts: (row, suffix token) weights.

    Returns:
        (denoise_step, head, row, key) float32.
    """
    leading, half = (len(stack.steps), stack.n_heads, len(starts)), np.float32(0.5)
    on_prefix: _Floats = np.zeros((*leading, stack.n_prefix), np.float32)
    on_suffix = np.broadcast_to(starts, (*leading, starts.shape[-1]))
    for layer in range(stack.top, -1, -1):
        given = on_suffix @ stack.suffix(inference, layer)
        if layer < stack.top:
            on_prefix = (on_prefix + on_prefix @ stack.prefix(inference, layer)) * half
        on_prefix = on_prefix + given[..., : stack.n_prefix] * half
        on_suffix = (on_suffix + given[..., stack.n_prefix :]) * half
    return np.concatenate([on_prefix, on_suffix], axis=-1)


def _targets(
    dataset: xr.Dataset, targets: Targets, inference: int
) -> tuple[list[_Integers], dict[str, Any], str]:
    """Return the keys of each target, the coordinates of the result's dimension, and its name."""
    if isinstance(targets, str):
        if targets not in ("groups", "tokens"):
            raise SelectionError(f"targets {targets!r}: expected 'groups', 'tokens' or a list of keys")
        if targets == "groups":
            return _groups(dataset, inference)
    n_keys = dataset.sizes["key"]
    keys = list(range(n_keys)) if isinstance(targets, str) else integers("targets", targets, "a word")
    if not isinstance(keys, list) or not keys:
        raise SelectionError(f"targets {targets!r}: expected 'groups', 'tokens' or a list of keys")
    bad = [key for key in keys if not 0 <= key < n_keys]
    if bad:
        raise SelectionError(f"targets: key {bad[0]} does not exist, expected 0 to {n_keys - 1}")
    coords: dict[str, Any] = _key_coordinates(dataset.isel(key=keys))
    return [np.array([key]) for key in keys], {"key": keys, **coords}, "key"


def _groups(dataset: xr.Dataset, inference: int) -> tuple[list[_Integers], dict[str, Any], str]:
    names, of_modality = modality_keys(dataset)
    groups, of_group = token_groups(dataset)
    wanted = [
        ("modality", name, of_modality[inference] == i) for i, name in enumerate(names) if name != PADDING
    ]
    wanted += [
        (MODALITY_OF[group.kind], group.label, of_group[inference] == i)
        for i, group in enumerate(groups)
        if group.kind in (Kind.TASK, Kind.STATE)
    ]
    coords: dict[str, Any] = {
        "target": np.arange(len(wanted)),
        "label": ("target", [label for _, label, _ in wanted]),
        "kind": ("target", [kind for kind, _, _ in wanted]),
    }
    return [np.flatnonzero(member) for _, _, member in wanted], coords, "target"


def _flows(
    stack: LayerStack, inference: int, query: int, targets: Sequence[_Integers], min_share: float
) -> _Floats:
    """Return the maximum flow to each target, (target,) float32.

    Args:
        stack: the maps, of one denoise step and head.
        inference: whose.
        query: the suffix token that it starts at.
        targets: the keys of each.
        min_share: capacities below are dropped.
    """
    kinds = stack.dataset["key_kind"].isel(inference=inference).values
    tokens = np.flatnonzero(kinds != Kind.PADDING)
    position = np.full(len(kinds), -1)
    position[tokens] = np.arange(len(tokens))
    # Node (level, token) is level * n + token; level 0 came in, level top + 1 is the top layer's output.
    n, top = len(tokens), stack.top + 1
    source = top * n + int(position[stack.n_prefix + query])
    starts, ends, capacities = [], [], []
    reached = np.zeros(n, bool)
    reached[position[stack.n_prefix + query]] = True
    for level, augmented in _augmented(stack, inference, tokens):
        if np.isnan(augmented).any():
            return np.full(len(targets), np.nan, np.float32)
        capacity = np.rint(np.where(augmented >= min_share, augmented, 0) * _CAPACITY).astype(np.int32)
        capacity[~reached] = 0  # nothing flows out of them: a smaller graph, the same flow
        start, end = np.nonzero(capacity)
        starts.append(start + (level + 1) * n)
        ends.append(end + level * n)
        capacities.append(capacity[start, end])
        reached = capacity.any(axis=0)
    # Targets have no way out, so that one graph with all of them serves each.
    n_nodes = (top + 1) * n
    for index, keys in enumerate(targets):
        inputs = position[keys]
        inputs = inputs[inputs >= 0]
        starts.append(inputs)
        ends.append(np.full(len(inputs), n_nodes + index))
        capacities.append(np.full(len(inputs), _CAPACITY, np.int32))
    size = n_nodes + len(targets)
    edges = (np.concatenate(starts).astype(np.int32), np.concatenate(ends).astype(np.int32))
    # Imported here: nothing else needs it, and it takes most of a second.
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    graph = csr_array((np.concatenate(capacities), edges), shape=(size, size))
    flows = [maximum_flow(graph, source, n_nodes + i).flow_value for i in range(len(targets))]
    # Rounded capacities of a token's edges may sum to a little more than 1.
    return np.minimum(np.array(flows, float) / _CAPACITY, 1).astype(np.float32)


def _augmented(
    stack: LayerStack, inference: int, tokens: _Integers
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield each layer from the top, and its A/2 + I/2 among the tokens, (token, token) float64."""
    n_prefix = stack.n_prefix
    n_before = int((tokens < n_prefix).sum())
    for layer in range(stack.top, -1, -1):
        weights = np.zeros((len(tokens), len(tokens)))
        weights[n_before:] = stack.suffix(inference, layer)[0, 0][tokens[n_before:] - n_prefix][:, tokens]
        if layer < stack.top:
            prefix = stack.prefix(inference, layer)[0]
            weights[:n_before, :n_before] = prefix[np.ix_(tokens[:n_before], tokens[:n_before])]
        yield layer, (weights + np.eye(len(tokens))) / 2
