"""What happens before the actions: words and patches among each other, and attention through all layers.

    text_to_image(data, "bowl", "image", frame=12, layer=17)  # (grid_y, grid_x): where the word looks
    cross_modal(data, inference=0)                            # (from_modality, to_modality)
    rollout(data, frame=12)                                   # (key,): what the action was mixed from
    flow(data, frame=12)                                      # (target,): how much could have flowed at most

The language model runs the prefix (images, text) once an inference; its maps are stored where they were asked
for with prefix_layers. In each denoise step, layer l of the action expert then attends to its own tokens and
to the keys and values that layer l of the language model made of its *input*. Draws nothing; opens no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import xarray as xr
from numpy.typing import NDArray

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
from lerobot_attn.analysis.select import (
    KEY_COORDINATES,
    RAW,
    Choice,
    HeadChoice,
    Labels,
    QueryChoice,
    action_queries,
    checked_query,
    executed_queries,
    frames_of,
    layout_of,
    stored_layers,
)
from lerobot_attn.analysis.spatial import camera_geometry, on_grid
from lerobot_attn.analysis.tokens import (
    ACTIONS,
    MODALITY_OF,
    PADDING,
    TokenGroup,
    find_word,
    modality_keys,
    token_groups,
)
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import Kind

PREFIX = "prefix_attention"
_HOW_PREFIX = "record with --eval.attention.prefix_layers=all"
_HOW_ALL = "record with --eval.attention.layers=all --eval.attention.prefix_layers=all"
_BOTH = f"{RAW} and {PREFIX}"

# Of a capacity of 1. The flow from one token is 1 at most, so no sum of the solver's int32 overflows.
_CAPACITY = 2**30

Targets = Literal["groups", "tokens"] | Sequence[int]

_Floats = NDArray[np.float32]
_Integers = NDArray[np.integer[Any]]


class PrefixWhere(TypedDict, total=False):
    """What to look at in prefix attention; every key has a default, as in `Where`.

    Keys:
        frame: frame number(s), or "all": the inference that gave the frame's action.
        inference: inference number(s), or "all"; the default where no frame is given.
        layer: labels of the language model's layers, negative from its last; default -1, "all" or "mean" for
            every stored one.
        head: labels, "all", "mean" (default) or "max", which is taken after the mean over a word's tokens.
    """

    frame: Labels | None
    inference: Labels | None
    layer: Choice
    head: HeadChoice


def prefix_attention(
    dataset: xr.Dataset,
    *,
    frame: Labels | None = None,
    inference: Labels | None = None,
    layer: Choice = -1,
    head: HeadChoice = "mean",
) -> xr.DataArray:
    """Select the attention of prefix tokens among each other by label. See `PrefixWhere` for the choices.

    Returns:
        (frame or inference, prefix_layer, head, prefix_query, prefix_key) without the dimensions that were
        dropped or reduced: float32 share of attention. Rows sum to 1 over prefix_key (not with `head="max"`);
        rows of padding tokens are 0.

    Raises:
        SelectionError: prefix attention was not captured, or no such frame, layer, …
    """
    choice = _PrefixChoice.of(dataset, frame, inference, layer, head)
    result = _gather(choice)
    result.attrs = choice.attributes()
    return result


def text_to_image(
    dataset: xr.Dataset,
    word: str | int | None = None,
    camera: str | None = None,
    **where: Unpack[PrefixWhere],
) -> xr.DataArray:
    """Return where on a camera's image the words of the task look, before any action is made.

    Args:
        dataset: an episode's.
        word: its text (any case) or its number from 0; without one, every word of the task.
        camera: its name or the end of it; the first one by default.
        where: what to look at, see `PrefixWhere`.

    Returns:
        (…, token, grid_y, grid_x) float32 share of all of the word's attention, the mean over its tokens,
        computed; without token where one word was asked for. NaN in an inference whose prompt lacks the word.
        Coordinates of token: `label`, `kind`, `ordinal`. Attributes: as of `image_heatmap`, and `word`.

    Raises:
        SelectionError: no such word or camera, prefix attention was not captured, or no such frame, layer, …
    """
    choice = _PrefixChoice.of(dataset, **where)
    name, geometry, segment = camera_geometry(dataset, camera)
    ordinal = None if word is None else find_word(dataset, word)
    groups, keys = token_groups(dataset)
    words = [g for g in groups if g.kind == Kind.TASK and ordinal in (None, g.ordinal)]
    if not words:
        raise SelectionError("the task's words are not known: its tokens carry no labels")
    queries = _members(keys, [groups.index(group) for group in words], choice.n_prefix)
    count = queries.sum(axis=1, keepdims=True)
    queries /= np.where(count > 0, count, np.nan)
    attended = _gather(choice, rows=("token", queries))
    result = on_grid(attended.rename(prefix_key="key"), geometry, segment).compute()
    said = ", ".join(group.label for group in words)
    result = _token_coordinates(result, words) if word is None else result.isel(token=0, drop=True)
    result.attrs = {
        **choice.attributes(),
        "query": f"word {said}" if word is not None else "words of the task",
        "camera": name,
        "word": said,
        "normalisation": "share",
        "vmin": 0.0,
        "vmax": _largest(result),
    }
    return result


def image_to_text(
    dataset: xr.Dataset,
    camera: str | None = None,
    **where: Unpack[PrefixWhere],
) -> xr.DataArray:
    """Return what share of each patch's attention goes to each word, number of the state and scaffold.

    Args:
        dataset: an episode's.
        camera: its name or the end of it; the first one by default.
        where: what to look at, see `PrefixWhere`.

    Returns:
        (…, grid_y, grid_x, token) float32 share of all of the patch's attention, computed; the tokens of a
        word are added up. Coordinates of token as in `token_attention`; attributes `camera`, `vmin`, `vmax`.

    Raises:
        SelectionError: no such camera, prefix attention was not captured, or no such frame, layer, …
    """
    choice = _PrefixChoice.of(dataset, **where)
    name, geometry, segment = camera_geometry(dataset, camera)
    groups, keys = token_groups(dataset)
    if not groups:
        raise SelectionError("the episode's policy got no language tokens")
    members = _members(keys, range(len(groups)), choice.n_prefix)
    by_patch = _gather(choice, columns=("token", members))
    by_place = on_grid(by_patch.rename(prefix_query="key"), geometry, segment)
    result = _token_coordinates(by_place.transpose(..., "token").compute(), groups)
    result.attrs = {
        **choice.attributes(),
        "query": "each patch",
        "camera": name,
        "vmin": 0.0,
        "vmax": _largest(result),
    }
    return result


def cross_modal(dataset: xr.Dataset, **where: Unpack[PrefixWhere]) -> xr.DataArray:
    """Return how the modalities of the prefix attend to each other: cameras, task, state, scaffold.

    Args:
        dataset: an episode's.
        where: what to look at, see `PrefixWhere`.

    Returns:
        (…, from_modality, to_modality) float32: the mean over the tokens of one modality of what they give to
        all tokens of another. Rows sum to 1 as those of the store do (not with `head="max"`). Padding tokens
        neither count as rows nor, their attention being 0, as columns. Actions are no part of the prefix.

    Raises:
        SelectionError: prefix attention was not captured, or no such frame, layer, …
    """
    choice = _PrefixChoice.of(dataset, **where)
    names, keys = modality_keys(dataset)
    present = set(np.unique(keys[:, : choice.n_prefix]).tolist())
    kept = [i for i, name in enumerate(names) if i in present and name not in (ACTIONS, PADDING)]
    members = _members(keys, kept, choice.n_prefix)
    count = members.sum(axis=1, keepdims=True)
    queries = members / np.where(count > 0, count, np.nan)
    result = _gather(choice, rows=("from_modality", queries), columns=("to_modality", members))
    labels = [names[i] for i in kept]
    result = result.transpose(..., "from_modality", "to_modality")
    result = result.assign_coords(from_modality=labels, to_modality=labels)
    result.attrs = {**choice.attributes(), "query": "mean of the modality's tokens"}
    return result


def rollout(
    dataset: xr.Dataset,
    *,
    frame: Labels | None = None,
    inference: Labels | None = None,
    layer: int = -1,
    denoise_step: Choice = -1,
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
    to sum to 1, which undoes the store's rounding.

    Limits: values, MLPs, norms and the size of the residual stream are ignored. The mean over heads is the
    paper's (here over the saved ones) and blurs what they do apart; a head by number pairs the language
    model's with the expert's of that number, which have nothing in common. It stays within one denoise step:
    what earlier steps did to the actions that come in is not followed.

    Computed when called, one inference and one layer at a time.

    Args:
        dataset: an episode's.
        frame: frame number(s), or "all".
        inference: inference number(s), or "all"; the default where no frame is given.
        layer: the expert's layer at whose output the tokens are looked at; negative from the last.
        denoise_step: labels, negative from the last; "all", or the "mean" of the steps' rollouts.
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
    query = ("frame" if by_frame else "executed") if query is None else query
    rows = _Rows.of(dataset, frame, inference)
    query = checked_query(dataset, query, by_frame=by_frame)
    stack = _Stack.of(dataset, "rollout", layer, denoise_step, head)
    starts, said = _starts(dataset, query)
    each = 1 if query == "frame" else len(starts)
    shape = (len(rows.inferences), len(stack.steps), stack.n_heads, each, stack.n_keys)
    shares = np.zeros(shape, np.float32)
    for number in np.unique(rows.inferences).tolist():
        at = np.flatnonzero(rows.inferences == number)
        if query == "frame":
            queries = dataset["frame_query"].values[np.atleast_1d(rows.numbers)[at]]
            rolled = _rolled(stack, number, starts[queries])
            shares[at, ..., 0, :] = np.moveaxis(rolled, 2, 0)
            if not rows.is_list:
                said = f"action {int(queries[0]) - action_queries(dataset).start}, executed at the frame"
        else:
            shares[at] = _rolled(stack, number, starts)
    coords: dict[str, Any] = _key_coordinates(dataset)
    coords |= stack.coordinates() | {"layer": stack.top}
    array = xr.DataArray(shares, coords, ("inference", "denoise_step", "head", "query", "key"))
    array = array.assign_coords(query=np.arange(each)) if query == "all" else array.isel(query=0)
    result = stack.drop(rows.label(array))
    result.attrs = stack.attributes() | {"long_name": "attention rollout", "query": said, "left_out": ""}
    return result


def flow(
    dataset: xr.Dataset,
    *,
    frame: int | None = None,
    inference: int | None = None,
    layer: int = -1,
    denoise_step: int = -1,
    head: int | Literal["mean", "max"] = "mean",
    query: int | Literal["frame"] | None = None,
    targets: Targets = "groups",
    min_share: float = 0.0,
) -> xr.DataArray:
    """Return how much could flow at most from an action token down to what came in.

    Attention flow of Abnar & Zuidema 2020 (arXiv:2005.00928): in the graph whose nodes are tokens at each
    layer and whose edges are those of `rollout`, with the same A' = A/2 + I/2 as capacities, the maximum flow
    from the action token at the output of `layer` to an input token. Unlike rollout it lets what is attended
    to be routed anew at each token, so it tells what attention permits, not what it mixes.

    Read it with care. Each target has a flow of its own that may use every edge, so flows of several targets
    do not sum to 1. What leaves a token has a capacity of 1 in all, so many layers of even attention let
    everything through: the larger the target and the deeper the policy, the nearer to 1 whatever the policy
    attends to. `layer` looks at fewer layers. The limits of `rollout` hold too.

    Capacities are whole multiples of 2^-30, so a flow is off by at most 2^-31 for each edge of its smallest
    cut. It takes one maximum flow (Dinic, of scipy) a target. Measured on two CPU cores at 968 + 50 tokens,
    613 of them unmasked, min_share 0: 4 layers (1 million edges) take 0.3 s to read and build and 0.07 s a
    target, 40 s for "tokens"; 18 layers (those repeated, 6 million edges) 2 s, 0.16 s a target and 0.5 GB.

    Args:
        dataset: an episode's.
        frame: a frame's number.
        inference: an inference's number, with `query` an action token.
        layer: the expert's layer at whose output the token is looked at; negative from the last.
        denoise_step: a label, negative from the last.
        head: a label, "mean" or "max", as in `rollout`.
        query: an action token; "frame" (the default with `frame`), the one executed at the frame.
        targets: "groups": each modality, then each word and each number of the state, whose tokens share one
            flow; "tokens": each key; or a list of keys.
        min_share: edges of less capacity are left out. Quicker, and a flow can only come out smaller.

    Returns:
        (target,) or (key,) float32 largest flow, 0 to 1; NaN where the store lacks one of the maps.
        Coordinates of target: `label` and `kind` ("modality", "task" or "state"). Padding tokens get 0.

    Raises:
        SelectionError: as `rollout`; or more than one frame, inference, query, step or head was asked for.
    """
    if (frame is None) == (inference is None):
        raise SelectionError("flow is of one action token: give either frame=, or inference= and query=")
    rows = _Rows.of(dataset, frame, inference)
    query = "frame" if query is None and frame is not None else query
    if rows.is_list or query is None or query in ("executed", "mean", "all"):
        raise SelectionError(
            "flow is of one action token: expected one frame, or one inference and the number of a query; "
            f"got {rows.dim} {frame if rows.dim == 'frame' else inference!r} and query {query!r}"
        )
    query_number = checked_query(dataset, query, by_frame=frame is not None)
    if not 0 <= min_share < 1:
        raise SelectionError(f"min_share: got {min_share!r}, expected at least 0 and less than 1")
    stack = _Stack.of(dataset, "flow", layer, denoise_step, head)
    if len(stack.steps) != 1 or stack.n_heads != 1:
        raise SelectionError(
            f"flow is of one map a layer: expected one denoise step, and one head, 'mean' or 'max'; "
            f"got denoise step {denoise_step!r} and head {head!r}"
        )
    number = int(rows.inferences[0])
    first = action_queries(dataset).start
    if query_number == "frame":
        token = int(dataset["frame_query"].values[rows.numbers])
        said = f"action {token - first}, executed at the frame"
    else:
        assert isinstance(query_number, int)
        token, said = first + query_number, f"action {query_number}"
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


class _Rows(NamedTuple):
    """What the first dimension of a result is, and the inference of each of its rows."""

    dim: Literal["frame", "inference"]
    numbers: int | list[int]
    inferences: _Integers

    @classmethod
    def of(cls, dataset: xr.Dataset, frame: Labels | None, inference: Labels | None) -> _Rows:
        if frame is not None and inference is not None:
            raise SelectionError(
                f"got both frame={frame!r} and inference={inference!r}, expected one of them"
            )
        if frame is not None:
            frames = frames_of(dataset, frame)
            owners = dataset["frame_inference"].values[np.atleast_1d(np.array(frames, int))]
            return cls("frame", frames, owners)
        n_inferences = dataset.sizes["inference"]
        chosen = positions("inference", "all" if inference is None else inference, n_inferences)
        return cls("inference", chosen, np.atleast_1d(np.array(chosen, int)))

    @property
    def is_list(self) -> bool:
        return isinstance(self.numbers, list)

    def label(self, array: xr.DataArray) -> xr.DataArray:
        """Name the first dimension of an array with a row for each of the numbers, or drop it."""
        if not isinstance(self.numbers, list):
            return array.isel(inference=0).assign_coords({self.dim: self.numbers})
        array = array.rename(inference=self.dim) if self.dim != "inference" else array
        labelled = array.assign_coords({self.dim: (self.dim, np.array(self.numbers, int))})
        return labelled.transpose(self.dim, ...)


@dataclass(frozen=True)
class _PrefixChoice:
    """What was chosen of the prefix attention, checked."""

    dataset: xr.Dataset
    rows: _Rows
    layer: Choice
    layers: int | list[int]
    head: HeadChoice
    heads: int | list[int]

    @classmethod
    def of(
        cls,
        dataset: xr.Dataset,
        frame: Labels | None = None,
        inference: Labels | None = None,
        layer: Choice = -1,
        head: HeadChoice = "mean",
    ) -> _PrefixChoice:
        if PREFIX not in dataset:
            raise SelectionError(f"prefix attention was not captured; {_HOW_PREFIX}")
        policy = said_of(dataset).get("policy", {})
        count = "n_prefix_layers" if policy.get("n_prefix_layers") else "n_layers"
        layers = stored_labels(dataset, "prefix_layer", layer, count)
        heads = stored_labels(dataset, "head", head, "n_heads", ("all", "mean", "max"))
        return cls(dataset, _Rows.of(dataset, frame, inference), layer, layers, head, heads)

    @property
    def n_prefix(self) -> int:
        return int(self.dataset.sizes["prefix_key"])

    def maps(self, inference: int) -> xr.DataArray:
        """Select (prefix_layer, head, prefix_query, prefix_key), heads not reduced yet."""
        array = picked(self.dataset[PREFIX].isel(inference=inference), "prefix_layer", self.layers)
        if not isinstance(self.head, str):
            array = picked(array, "head", self.heads)
        if isinstance(self.layer, str) and self.layer == "mean":
            # The dtype is the sum's: all layers in float32 at once would be twice what was read.
            array = array.mean("prefix_layer", skipna=False, dtype=np.float32)
        return array.astype(np.float32)

    def over_heads(self, array: xr.DataArray) -> xr.DataArray:
        if not isinstance(self.head, str) or self.head == "all":
            return array
        return array.mean("head", skipna=False) if self.head == "mean" else array.max("head", skipna=False)

    def attributes(self) -> dict[str, Any]:
        return {
            "long_name": "prefix attention",
            "units": "share of attention",
            "source": PREFIX,
            "query": "prefix tokens",
            "layer": in_words("layer", self.layer, self.layers),
            "head": in_words("head", self.head, self.heads, policy_count(self.dataset, "n_heads")),
            "left_out": "",
        }


def _gather(
    choice: _PrefixChoice,
    *,
    rows: tuple[str, _Floats] | None = None,
    columns: tuple[str, _Floats] | None = None,
) -> xr.DataArray:
    """Weigh rows and add up columns of prefix maps, one inference at a time.

    Args:
        choice: what was chosen.
        rows: name of the new dimension, and its weights (inference, prefix_query, new).
        columns: likewise (inference, prefix_key, new).
    """
    unique, back = np.unique(choice.rows.inferences, return_inverse=True)
    if not len(unique):
        raise SelectionError(f"no {choice.rows.dim} to look at, expected at least one")
    pieces = []
    for number in unique.tolist():
        array = choice.maps(number)
        if rows is not None:
            weights = xr.DataArray(rows[1][number], dims=("prefix_query", rows[0]))
            array = xr.dot(array, weights, dim="prefix_query")
        array = choice.over_heads(array)
        if columns is not None:
            weights = xr.DataArray(columns[1][number], dims=("prefix_key", columns[0]))
            array = xr.dot(array, weights, dim="prefix_key")
        pieces.append(array)
    joined = xr.concat(pieces, "inference", coords="minimal", compat="override")
    return choice.rows.label(joined.isel(inference=back))


def _members(keys: NDArray[np.int16], groups: Iterable[int], n_prefix: int) -> _Floats:
    """Return (inference, prefix token, group) float32: 1 where the token is of the group."""
    members: NDArray[np.bool_] = keys[:, :n_prefix, None] == np.array(list(groups), int)
    return members.astype(np.float32)


def _token_coordinates(array: xr.DataArray, groups: Sequence[TokenGroup]) -> xr.DataArray:
    return array.assign_coords(
        token=np.arange(len(groups)),
        label=("token", [group.label for group in groups]),
        kind=("token", [MODALITY_OF[group.kind] for group in groups]),
        ordinal=("token", [group.ordinal for group in groups]),
    )


def _largest(array: xr.DataArray) -> float:
    largest = array.max()
    return float(largest) if np.isfinite(largest) else 0.0


@dataclass(frozen=True)
class _Stack:
    """The maps of all layers up to one, read one at a time; their rows rescaled to sum to 1."""

    dataset: xr.Dataset
    top: int
    denoise_step: Choice
    steps: list[int]
    head: HeadChoice
    heads: list[int]

    @classmethod
    def of(cls, dataset: xr.Dataset, what: str, layer: int, denoise_step: Choice, head: HeadChoice) -> _Stack:
        """Check that everything needed was saved.

        Raises:
            SelectionError: it was not, or the policy's two towers do not go layer by layer.
        """
        policy = said_of(dataset).get("policy", {})
        full = stored_layers(dataset)[0]
        in_prefix = dataset["prefix_layer"].values.tolist() if PREFIX in dataset else []
        if not full:
            raise SelectionError(f"{what} needs full maps, and none were saved; {_HOW_ALL}")
        n_layers = int(policy.get("n_layers") or full[-1] + 1)
        top = None if isinstance(layer, str) else from_end("layer", layer, n_layers)
        if not isinstance(top, int) or not 0 <= top < n_layers:
            raise SelectionError(
                f"layer {layer!r}: {what} is of one layer's output, expected one of 0 to {n_layers - 1}"
            )
        if int(policy.get("n_prefix_layers") or n_layers) != n_layers:
            raise SelectionError(
                f"{what} needs an expert whose layer l reads layer l of the language model, but the policy's "
                f"have {n_layers} and {policy['n_prefix_layers']} layers"
            )
        lacking = {
            "full maps": [value for value in range(top + 1) if value not in full],
            "prefix maps": [value for value in range(top) if value not in in_prefix],
        }
        missing = [f"{name} of layer {ranges(values)}" for name, values in lacking.items() if values]
        if missing:
            raise SelectionError(
                f"{what} to layer {top} needs all layers below; not saved are {' and '.join(missing)}; "
                f"{_HOW_ALL}"
            )
        steps = stored_labels(dataset, "denoise_step", denoise_step, "n_denoise_steps")
        heads = stored_labels(dataset, "head", head, "n_heads", ("all", "mean", "max"))
        return cls(
            dataset, top, denoise_step, np.atleast_1d(steps).tolist(), head, np.atleast_1d(heads).tolist()
        )

    @property
    def fuses(self) -> bool:
        """Whether heads are reduced to one map before anything else."""
        return self.head in ("mean", "max") if isinstance(self.head, str) else False

    @property
    def n_heads(self) -> int:
        return 1 if self.fuses else len(self.heads)

    @property
    def n_keys(self) -> int:
        return int(self.dataset.sizes["key"])

    @property
    def n_prefix(self) -> int:
        return layout_of(self.dataset).prefix_len

    def suffix(self, inference: int, layer: int) -> _Floats:
        """Return (denoise_step, head, query, key) float32."""
        maps = self.dataset[RAW].isel(inference=inference).sel(layer=layer)
        return np.stack([self._fused(maps.sel(denoise_step=step)) for step in self.steps])

    def prefix(self, inference: int, layer: int) -> _Floats:
        """Return (head, prefix_query, prefix_key) float32; rows of padding are 0."""
        return self._fused(self.dataset[PREFIX].isel(inference=inference).sel(prefix_layer=layer))

    def _fused(self, array: xr.DataArray) -> _Floats:
        values = picked(array.load(), "head", self.heads).values.astype(np.float32)
        if self.fuses:
            fused = np.mean if self.head == "mean" else np.max
            values = fused(values, axis=0, keepdims=True)
        total = values.sum(axis=-1, keepdims=True)
        rescaled: _Floats = values / np.where(total > 0, total, 1)
        return rescaled

    def coordinates(self) -> dict[str, Any]:
        """Return the coordinates of denoise_step and head."""
        coords: dict[str, Any] = {"denoise_step": self.steps}
        if "flow_time" in self.dataset.coords:
            times = self.dataset["flow_time"].sel(denoise_step=self.steps).values
            coords["flow_time"] = ("denoise_step", times)
        return coords if self.fuses else coords | {"head": self.heads}

    def drop(self, array: xr.DataArray) -> xr.DataArray:
        """Drop and reduce denoise_step and head as they were chosen."""
        if self.fuses or isinstance(_plain_choice(self.head), int):
            array = array.isel(head=0)
        if isinstance(self.denoise_step, str):
            return array.mean("denoise_step", skipna=False) if self.denoise_step == "mean" else array
        return array.isel(denoise_step=0) if isinstance(_plain_choice(self.denoise_step), int) else array

    def attributes(self) -> dict[str, Any]:
        return {
            "units": "share of attention",
            "source": _BOTH if self.top else RAW,
            "layer": in_words("layer", list(range(self.top + 1)), list(range(self.top + 1))),
            "denoise_step": in_words("denoise step", self.denoise_step, self.steps),
            "head": in_words("head", self.head, self.heads, policy_count(self.dataset, "n_heads")),
        }


def _plain_choice(choice: Any) -> Any:
    return choice if isinstance(choice, str) else integers("choice", choice, "a word")


def _key_coordinates(dataset: xr.Dataset) -> dict[str, Any]:
    return {name: ("key", dataset[name].values) for name in KEY_COORDINATES if name in dataset.coords}


def _starts(dataset: xr.Dataset, query: QueryChoice) -> tuple[_Floats, str]:
    """Return the queries as weights of the suffix tokens, (row, suffix token) float32, and them in words.

    For "frame", a row for every suffix token: the frames choose among them.
    """
    executed, actions = executed_queries(dataset), action_queries(dataset)
    first = actions.start
    one = np.eye(dataset.sizes["query"], dtype=np.float32)
    if query == "frame":
        return one, "the action executed at the frame"
    if query == "all":
        return one[actions], "every action"
    if query == "executed":
        said = f"mean of executed actions {executed.start - first}-{executed.stop - 1 - first}"
        return one[executed].mean(axis=0, keepdims=True), said
    if query == "mean":
        return one[actions].mean(axis=0, keepdims=True), "mean of all actions"
    assert isinstance(query, int)
    return one[[first + query]], f"action {query}"


def _rolled(stack: _Stack, inference: int, starts: _Floats) -> _Floats:
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
    stack: _Stack, inference: int, query: int, targets: Sequence[_Integers], min_share: float
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


def _augmented(stack: _Stack, inference: int, tokens: _Integers) -> Iterator[tuple[int, NDArray[np.float64]]]:
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
