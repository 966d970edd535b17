"""What happens before the actions: how words and patches attend to each other in the language model.

    text_to_image(data, "bowl", "image", frame=12, layer=17)  # (grid_y, grid_x): where the word looks
    cross_modal(data, inference=0)                            # (from_modality, to_modality)

The language model runs the prefix (images, text) once an inference; its maps are stored where they were asked
for with prefix_layers. Knows no suffix: see `propagation` for attention through all layers. Draws nothing;
opens no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.labels import in_words, picked, policy_count, policy_of, stored_labels
from lerobot_attn.analysis.reduce import over_heads
from lerobot_attn.analysis.rows import Rows
from lerobot_attn.analysis.select import PREFIX, HeadChoice, Labels, LayerChoice, layout_of
from lerobot_attn.analysis.spatial import camera_geometry, camera_names, on_grid
from lerobot_attn.analysis.tokens import (
    ACTIONS,
    DECODED,
    MODALITY_OF,
    PADDING,
    TokenGroup,
    find_word,
    modality_keys,
    token_groups,
)
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import Kind

_HOW_PREFIX = "record with --eval.attention.prefix_layers=all"

_Floats = NDArray[np.float32]


class PrefixWhere(TypedDict, total=False):
    """What to look at in prefix attention; every key has a default, as in `Where`.

    Keys:
        frame: frame number(s), or "all": the inference that gave the frame's action.
        inference: inference number(s), or "all"; the default where no frame is given.
        layer: labels of the language model's layers, negative from its last; by default the last stored one;
            "all" or "mean" for every stored one.
        head: labels, "all", "mean" (default) or "max", which is taken after the mean over a word's tokens.
    """

    frame: Labels | None
    inference: Labels | None
    layer: LayerChoice
    head: HeadChoice


def prefix_attention(
    dataset: xr.Dataset,
    *,
    frame: Labels | None = None,
    inference: Labels | None = None,
    layer: LayerChoice = None,
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


def prefix_cameras(dataset: xr.Dataset) -> list[str]:
    """Return the cameras whose image the language model saw, in the policy's order.

    Of X-VLA that is the first one: the image tokens of the others enter with the actions.
    """
    prefix_len = layout_of(dataset).prefix_len
    return [name for name in camera_names(dataset) if camera_geometry(dataset, name)[2].stop <= prefix_len]


def attention_from(
    dataset: xr.Dataset, token: str | int = "last", **where: Unpack[PrefixWhere]
) -> xr.DataArray:
    """Return what a token of the prefix attends to, or several tokens on average.

    Args:
        dataset: an episode's.
        token: "last", the last one that is no padding (of SmolVLA the state token, of Pi0.5 the prompt's
            end); "state", all of the state's; "mean", all that are no padding; or a word of the task, by its
            text (any case) or its number from 0.
        where: what to look at, see `PrefixWhere`.

    Returns:
        (…, prefix_key) float32 share of attention, computed. NaN in an inference whose prompt lacks the word.

    Raises:
        SelectionError: no such word, a policy whose prefix holds no state, prefix attention was not captured,
            or no such frame, layer, …
    """
    choice = _PrefixChoice.of(dataset, **where)
    weights, said = _queries(dataset, token, choice.n_prefix)
    result = _gather(choice, rows=("token", _averaged(weights)[..., None])).isel(token=0, drop=True).compute()
    result.attrs = {**choice.attributes(), "query": said}
    return result


def _queries(dataset: xr.Dataset, token: str | int, n_prefix: int) -> tuple[_Floats, str]:
    """Return (inference, prefix token) float32, 1 for each token that is meant; and what to call them."""
    kinds = dataset["key_kind"].values[:, :n_prefix]
    filled = kinds != Kind.PADDING
    if token == "last":
        last = n_prefix - 1 - filled[:, ::-1].argmax(axis=1)
        return (np.arange(n_prefix) == last[:, None]).astype(np.float32), "last token of the prefix"
    if token == "mean":
        return filled.astype(np.float32), "mean of the prefix's tokens"
    if token == "state":
        is_state = kinds == Kind.STATE
        if not is_state.any():
            raise SelectionError(
                "token 'state': this policy's prefix holds no state, expected last, mean or a word"
            )
        return is_state.astype(np.float32), "state, mean of its tokens"
    ordinal = find_word(dataset, token)
    groups, keys = token_groups(dataset)
    chosen = [i for i, group in enumerate(groups) if group.kind == Kind.TASK and group.ordinal == ordinal]
    label = groups[chosen[0]].label if chosen else token
    return _members(keys, chosen, n_prefix).sum(axis=2), f"word {label}"


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
    if not len(layout_of(dataset).language):
        raise SelectionError(
            "the policy is given no instruction, so there are no words that attend to images"
        )
    ordinal = None if word is None else find_word(dataset, word)
    groups, keys = token_groups(dataset)
    words = [g for g in groups if g.kind == Kind.TASK and ordinal in (None, g.ordinal)]
    if not words:
        raise SelectionError("the task's words are not known: its tokens carry no labels")
    queries = _members(keys, [groups.index(group) for group in words], choice.n_prefix)
    attended = _gather(choice, rows=("token", _averaged(queries)))
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
    """Return what share of each patch's attention goes to each word, number of the state and template.

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
    # A state token that opens the suffix is no part of the prefix.
    kept = [i for i in range(len(groups)) if (keys[:, : choice.n_prefix] == i).any()]
    if not kept:
        raise SelectionError("the episode's policy got no language tokens")
    members = _members(keys, kept, choice.n_prefix)
    by_patch = _gather(choice, columns=("token", members))
    by_place = on_grid(by_patch.rename(prefix_query="key"), geometry, segment)
    result = _token_coordinates(by_place.transpose(..., "token").compute(), [groups[i] for i in kept])
    result.attrs = {
        **choice.attributes(),
        "query": "each patch",
        "camera": name,
        "vmin": 0.0,
        "vmax": _largest(result),
    }
    return result


def cross_modal(dataset: xr.Dataset, **where: Unpack[PrefixWhere]) -> xr.DataArray:
    """Return how the modalities of the prefix attend to each other: cameras, task, state, template.

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
    kept = [i for i, name in enumerate(names) if i in present and name not in (ACTIONS, DECODED, PADDING)]
    members = _members(keys, kept, choice.n_prefix)
    result = _gather(choice, rows=("from_modality", _averaged(members)), columns=("to_modality", members))
    labels = [names[i] for i in kept]
    result = result.transpose(..., "from_modality", "to_modality")
    result = result.assign_coords(from_modality=labels, to_modality=labels)
    result.attrs = {**choice.attributes(), "query": "mean of the modality's tokens"}
    return result


@dataclass(frozen=True)
class _PrefixChoice:
    """What was chosen of the prefix attention, checked."""

    dataset: xr.Dataset
    rows: Rows
    layer: LayerChoice
    layers: int | list[int]
    head: HeadChoice
    heads: int | list[int]

    @classmethod
    def of(
        cls,
        dataset: xr.Dataset,
        frame: Labels | None = None,
        inference: Labels | None = None,
        layer: LayerChoice = None,
        head: HeadChoice = "mean",
    ) -> _PrefixChoice:
        if PREFIX not in dataset:
            raise SelectionError(f"prefix attention was not captured; {_HOW_PREFIX}")
        policy = policy_of(dataset)
        count = "n_prefix_layers" if policy.get("n_prefix_layers") else "n_layers"
        layers = stored_labels(dataset, "prefix_layer", layer, count)
        heads = stored_labels(dataset, "head", head, "n_heads", ("all", "mean", "max"))
        return cls(dataset, Rows.of(dataset, frame, inference), layer, layers, head, heads)

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
        array = over_heads(array, choice.head)
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


def _averaged(members: _Floats) -> _Floats:
    """Return weights that average over the members, (inference, prefix token, …); NaN without members."""
    count = members.sum(axis=1, keepdims=True)
    weights: _Floats = members / np.where(count > 0, count, np.float32(np.nan))
    return weights


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


def __getattr__(name: str) -> Any:
    # Both were here before they had a module of their own.
    if name in ("rollout", "flow"):
        from lerobot_attn.analysis import propagation

        return getattr(propagation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
