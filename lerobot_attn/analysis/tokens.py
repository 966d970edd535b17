"""Attention on the prompt and by modality: words, state dimensions, template; cameras, text, actions."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.decoded import decodes
from lerobot_attn.analysis.labels import ranges
from lerobot_attn.analysis.reduce import group_sums
from lerobot_attn.analysis.select import (
    RAW,
    Where,
    absent_in_words,
    attention,
    layout_of,
    prefix_only_layers,
    stored_layers,
)
from lerobot_attn.errors import SelectionError, StoreError
from lerobot_attn.layout import Kind

TASK, STATE, TEMPLATE, SPECIAL, TEXT = "task", "state", "template", "special", "text"
ACTIONS, PADDING = "actions", "padding"
DECODED = "decoded tokens"  # in place of actions, where the policy decodes tokens of which none is an action
MODALITY_OF = {
    Kind.TASK: TASK,
    Kind.STATE: STATE,
    Kind.TEMPLATE: TEMPLATE,
    Kind.SPECIAL: SPECIAL,
    Kind.TEXT: TEXT,
    Kind.ACTION: ACTIONS,
    Kind.PADDING: PADDING,
}


class TokenGroup(NamedTuple):
    """Tokens of language or state that are one thing to a reader."""

    kind: Kind
    ordinal: int  # which word of the task, or which dimension of the state; -1 for template and state tokens
    label: str


def token_groups(dataset: xr.Dataset) -> tuple[list[TokenGroup], NDArray[np.int16]]:
    """Group the tokens of language and state: each word, each number of the state, each run of template.

    Words and numbers come first, in their order. Template runs of the same text are one group; blanks and
    punctuation alone are the group "(blanks)". Tokens whose role is unknown are a group each. Where the state
    is no part of the prompt, but a token of its own in prefix or suffix, that is the group "state token".

    Args:
        dataset: an episode's.

    Returns:
        The groups, and (inference, key) int16: each key's group, -1 for other tokens and padding.
    """
    layout = layout_of(dataset)
    kinds = dataset["key_kind"].values[:, layout.language.start : layout.language.stop]
    words, dims = dataset["text_word"].values, dataset["text_state_dim"].values
    texts = dataset["token_text"].values
    names = [str(name) for name in dataset["state_dim"].values] if "state_dim" in dataset.coords else []
    groups: dict[TokenGroup, int] = {}
    keys = np.full((len(kinds), layout.n_keys), -1, np.int16)
    segments = [np.arange(s.start, s.stop) for s in layout.segments if s.kind == "state"]
    of_state = np.concatenate(segments) if segments else np.array([], int)
    state_tokens = TokenGroup(Kind.STATE, -1, "state token" if len(of_state) == 1 else "state tokens")

    for inference in range(len(kinds)):
        previous_kind, run = None, []
        runs: list[tuple[Kind, list[int]]] = []
        for slot, value in enumerate(kinds[inference].tolist()):
            kind = kind_of(value)
            if kind == Kind.PADDING:
                continue
            if kind == Kind.TEMPLATE and previous_kind == Kind.TEMPLATE:
                run.append(slot)
            else:
                run = [slot]
                runs.append((kind, run))
            previous_kind = kind
        for kind, slots in runs:
            pieces = [str(texts[inference, slot]) for slot in slots]
            if kind == Kind.TASK:
                ordinal = int(words[inference, slots[0]])
                at = words[inference] == ordinal
                group = TokenGroup(kind, ordinal, "".join(map(str, texts[inference][at])).strip())
            elif kind == Kind.STATE:
                ordinal = int(dims[inference, slots[0]])
                group = TokenGroup(
                    kind, ordinal, names[ordinal] if 0 <= ordinal < len(names) else f"state {ordinal}"
                )
            elif kind == Kind.TEMPLATE:
                text = " ".join("".join(pieces).split())
                group = TokenGroup(kind, -1, text if any(c.isalnum() for c in text) else "(blanks)")
            else:
                group = TokenGroup(kind, slots[0], "".join(pieces).strip())
            index = groups.setdefault(group, len(groups))
            keys[inference, [layout.language.start + slot for slot in slots]] = index
        present = of_state[dataset["key_kind"].values[inference, of_state] == Kind.STATE]
        if len(present):
            keys[inference, present] = groups.setdefault(state_tokens, len(groups))
    kinds_in_order = [*MODALITY_OF, Kind.IMAGE]
    order = sorted(groups, key=lambda g: (kinds_in_order.index(g.kind), g.ordinal))
    new = np.full(len(groups) + 1, -1, np.int16)
    for position, group in enumerate(order):
        new[groups[group]] = position
    return order, new[keys]


def kind_of(value: int) -> Kind:
    """Return a value of `key_kind` as a kind.

    Raises:
        StoreError: there is no such kind.
    """
    try:
        return Kind(value)
    except ValueError:
        raise StoreError(f"key_kind holds {value}, expected {min(Kind)} to {max(Kind)}: damaged") from None


def prompt_truncated(dataset: xr.Dataset) -> NDArray[np.bool_]:
    """Return (inference,) bool: whether the prompt did not fit the policy's slots, so that its end was cut.

    Words of the task that are left stay words; the state and the fixed text behind them are gone. False where
    the store does not say it.
    """
    if "prompt_truncated" not in dataset:
        return np.zeros(dataset.sizes.get("inference", 0), bool)
    cut: NDArray[np.bool_] = dataset["prompt_truncated"].values.astype(bool)
    return cut


def find_word(dataset: xr.Dataset, word: str | int) -> int:
    """Return which word of the task is meant, by its text (any case) or its number from 0.

    Raises:
        SelectionError: the task does not have it.
    """
    groups, _ = token_groups(dataset)
    words = {group.ordinal: group.label for group in groups if group.kind == Kind.TASK}
    if not isinstance(word, str) or (word.isdecimal() and word not in words.values()):
        matches = [ordinal for ordinal in words if ordinal == int(word)]
    else:
        matches = [ordinal for ordinal, label in words.items() if label.casefold() == word.casefold()]
    if matches:
        return matches[0]
    held = ", ".join(words.values()) or "unknown"
    raise SelectionError(f"word {word!r} is not in the task; its words are {held}")


def token_attention(dataset: xr.Dataset, **where: Unpack[Where]) -> xr.DataArray:
    """Return the share of attention on each word of the task, number of the state and piece of template.

    Args:
        dataset: an episode's.
        where: what to look at, see `Where`.

    Returns:
        (…, token) float32 share of all attention after the dimensions that `attention` keeps; the tokens of a
        word, and the digits of a number, are added up. Coordinates of token: `label`, `kind` ("task",
        "state", "template" or "text") and `ordinal` (which word or state dimension, -1 for others).
        `dataset.state_dim` names are the labels of state dimensions. A state that is a token of its own is
        the token "state token"; NaN in a layer that cannot see it.

    Raises:
        SelectionError: no such frame, layer, …
    """
    return by_token(dataset, attention(dataset, **where))


def by_token(dataset: xr.Dataset, array: xr.DataArray) -> xr.DataArray:
    """Return what `token_attention` does of attention that was selected already.

    Args:
        dataset: an episode's.
        array: (…, key) of `attention`.
    """
    groups, keys = token_groups(dataset)
    if not groups:
        raise SelectionError("the episode's policy got no tokens of language or state")
    result = _sum_by_group(dataset, array, keys, len(groups), "token")
    return result.assign_coords(
        token=np.arange(len(groups)),
        label=("token", [group.label for group in groups]),
        kind=("token", [MODALITY_OF[group.kind] for group in groups]),
        ordinal=("token", [group.ordinal for group in groups]),
    )


def modalities(dataset: xr.Dataset) -> list[str]:
    """Return the modalities of an episode: each camera, then task, state, template, text and actions.

    Of a policy that decodes its suffix (Pi0-FAST) the actions are "decoded tokens".
    """
    layout = layout_of(dataset)
    present = set(np.unique(dataset["key_kind"].values).tolist())
    names = [camera.name for camera in layout.cameras if not camera.is_empty]
    return names + [name for kind, name in _names_of_kinds(dataset).items() if kind in present]


def _names_of_kinds(dataset: xr.Dataset) -> dict[Kind, str]:
    return MODALITY_OF | ({Kind.ACTION: DECODED} if decodes(dataset) else {})


def modality_keys(dataset: xr.Dataset) -> tuple[list[str], NDArray[np.int16]]:
    """Return the modalities, and (inference, key) int16: which one each key belongs to."""
    names = modalities(dataset)
    layout = layout_of(dataset)
    kinds, cameras = dataset["key_kind"].values, layout.key_camera()
    keys = np.full(kinds.shape, -1, np.int16)
    for index, camera in enumerate(layout.cameras):
        if not camera.is_empty:
            keys[(kinds == Kind.IMAGE) & (cameras == index)] = names.index(camera.name)
    for kind, name in _names_of_kinds(dataset).items():
        keys[kinds == kind] = names.index(name) if name in names else -1
    return names, keys


def modality_share(dataset: xr.Dataset, **where: Unpack[Where]) -> xr.DataArray:
    """Return the share of attention on each camera, on the task, state and template, and on the actions.

    Args:
        dataset: an episode's.
        where: what to look at, see `Where`.

    Returns:
        (…, modality) float32, sums to 1 over modality (not with `head="max"`, nor for the mean of layers of
        which some cannot see the suffix). NaN for what the layer cannot see, e.g. "actions" in a layer of
        cross-attention. "padding" is exactly 0 in a faithful store.

    Raises:
        SelectionError: no such frame, layer, …
    """
    return by_modality(dataset, attention(dataset, **where))


def by_modality(dataset: xr.Dataset, array: xr.DataArray) -> xr.DataArray:
    """Return what `modality_share` does of attention that was selected already.

    Args:
        dataset: an episode's.
        array: (…, key) of `attention`.
    """
    names, keys = modality_keys(dataset)
    return _sum_by_group(dataset, array, keys, len(names), "modality").assign_coords(modality=names)


def action_self_attention(
    dataset: xr.Dataset, *, within: bool = False, **where: Unpack[Where]
) -> xr.DataArray:
    """Return how action tokens attend to each other.

    Args:
        dataset: an episode's.
        within: give shares of the attention on actions; shares of all attention otherwise.
        where: what to look at, see `Where`; its `query` is always "all", and its `layer` by default the last
            one with full maps that can see the actions.

    Returns:
        (…, query, action_key) float32: row q is what action token q attends to, column k action token k. NaN
        in a layer that cannot see the actions.

    Raises:
        SelectionError: full maps of the layer were not saved; none of the chosen layers can see the actions;
            or no such frame, layer, …
    """
    if RAW not in dataset:
        raise SelectionError(
            "action-to-action attention needs full maps, and none were saved; record with layers=[-1]"
        )
    actions, (full, means) = layout_of(dataset).actions, stored_layers(dataset)
    blind = prefix_only_layers(dataset)
    seeing = [layer for layer in full if layer not in blind]
    every: Where = {**where, "query": "all"}
    if every.get("layer") is None and seeing:
        every["layer"] = seeing[-1]
    array = attention(dataset, **every)
    chosen = np.atleast_1d(array.coords["layer"]).tolist() if "layer" in array.coords else full
    if not set(chosen) & set(seeing):
        others = [layer for layer in means if layer not in blind]
        remedy = f"; record with layers={others}" if others and not seeing else ""
        raise SelectionError(
            f"{absent_in_words(chosen)}: no action attends to another; of the layers with full maps "
            f"{ranges(seeing) or 'none'} can see the actions{remedy}"
        )
    result = array.isel(key=slice(actions.start, actions.stop)).rename(key="action_key")
    result = result.drop_vars([name for name in result.coords if str(name).startswith("key_")])
    if within:
        total = result.sum("action_key", skipna=False)
        result = result / total.where(total != 0, 1)
    result = result.assign_coords(action_key=np.arange(len(actions)))
    result.attrs = array.attrs | {
        "units": "share of attention on actions" if within else "share of attention"
    }
    return result


def to_table(array: xr.DataArray, value: str = "share") -> pd.DataFrame:
    """Return a tidy table: one row per value, its labels in columns.

    Args:
        array: a result of this package.
        value: name of the value's column.
    """
    if array.ndim == 0:
        return pd.DataFrame([{**{str(k): v.item() for k, v in array.coords.items()}, value: float(array)}])
    return array.rename(value).to_dataframe().reset_index()


def _sum_by_group(
    dataset: xr.Dataset, array: xr.DataArray, keys: NDArray[np.int16], n_groups: int, dim: str
) -> xr.DataArray:
    """Add up attention over the keys of each group; `keys` is (inference, key), -1 for none."""
    member = (keys[:, :, None] == np.arange(n_groups)).astype(np.float32)
    membership = xr.DataArray(member, dims=("inference", "key", dim))
    if "frame" in array.coords:
        # The attention has lost its inference: find it again through the table.
        frames = array.coords["frame"]
        inferences = dataset["frame_inference"].values[np.atleast_1d(frames.values)]
        membership = membership.isel(
            inference=xr.DataArray(inferences, dims="frame") if frames.ndim else int(inferences[0])
        )
    else:
        inferences = np.atleast_1d(array.coords["inference"].values)
        membership = membership.isel(
            inference=inferences if array.coords["inference"].ndim else int(inferences[0])
        )
        membership = membership.drop_vars("inference", errors="ignore")
    drop = [name for name in array.coords if "key" in array.coords[name].dims]
    lacks = bool(prefix_only_layers(dataset))
    result = group_sums(array.drop_vars(drop), membership, may_lack_keys=lacks).transpose(..., dim)
    result.attrs = dict(array.attrs)
    return result
