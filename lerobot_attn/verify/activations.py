"""The check of neurons and residuals: groups are known, and values are there exactly where tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.analysis.activations import ACTIVATIONS, EVERY_TOKEN
from lerobot_attn.errors import Check
from lerobot_attn.layout import GROUP_OF_KIND, Kind
from lerobot_attn.store.damage import is_missing, missing_chunks
from lerobot_attn.store.reader import Episode

_NAME = "activations"


def activations(episode: Episode, inferences: Sequence[int]) -> list[Check]:
    """Check the neurons and residuals of some inferences, one group of tokens at a time.

    Returns:
        One check; none of an episode that was recorded without them.
    """
    data = episode.arrays
    names = [name for name in ACTIVATIONS + EVERY_TOKEN if name in data]
    if not names:
        return []
    wrong = _wrong_labels(episode, names)
    missing = missing_chunks(episode)
    n_values = n_beyond = n_left_out = 0
    for inference in inferences if not wrong else ():
        for name in names:
            there = _has_tokens(episode, name, inference)
            # The chunks of a layer of every token, or of a group and reduction.
            for place in np.ndindex(*data[name].shape[1:-2]):
                labels = ", ".join(
                    f"{dim} {_label(data, dim, index)}"
                    for dim, index in zip(data[name].dims[1:], place, strict=False)
                )
                at = f"{name}, inference {inference}, {labels}"
                if is_missing(missing, name, (inference, *place)):
                    n_left_out += 1
                    continue
                try:
                    values = data[name].variable[(inference, *place)].values
                except Exception:  # a damaged chunk, which the check of all chunks names
                    n_left_out += 1
                    continue
                n_values, n_beyond = n_values + values.size, n_beyond + int(np.isinf(values).sum())
                wrong += [
                    f"{at}: {said}" for said in [_wrong_values(values, there, place, data[name])] if said
                ]
    note = f"; left out, missing or damaged: {n_left_out} chunks" if n_left_out else ""
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return [Check.of(_NAME, False, f"{wrong[0]}{more}{note}")]
    if not n_values:
        return [Check.of(_NAME, None, f"no value was read{note}")]
    found = f"{', '.join(names)}; {n_values} values are there where their tokens are"
    if n_beyond:
        found += f", {n_beyond} of them beyond ±65504 and so infinite"
    return [Check.of(_NAME, True, found + note)]


def _wrong_labels(episode: Episode, names: Sequence[str]) -> list[str]:
    data, layout = episode.arrays, episode.layout
    wrong = []
    executed = episode.attributes.get("executed_queries", [0, 0])
    suffix = list(layout.suffix_groups(slice(*executed)))
    prefix = [camera.name for camera in layout.cameras if not camera.is_empty] + list(GROUP_OF_KIND.values())
    for dim, known in (("vlm_group", prefix), ("expert_group", suffix)):
        groups = data[dim].values.tolist() if dim in data else []
        odd = [group for group in groups if group not in known]
        if odd or len(set(groups)) < len(groups):
            wrong.append(
                f"{dim} has {odd[0] if odd else groups!r}, expected each once, of {', '.join(known)}"
            )
    if "reduction" in data and data["reduction"].values.tolist() != ["mean", "max"]:
        wrong.append(f"reduction is {data['reduction'].values.tolist()}, expected mean and max")
    for name in names:
        for dim, size in (("prefix_query", layout.prefix_len), ("query", layout.n_queries)):
            if dim in data[name].dims and data.sizes[dim] != size:
                wrong.append(f"{name} has {data.sizes[dim]} tokens, the layout {size}")
    return wrong


def _has_tokens(episode: Episode, name: str, inference: int) -> NDArray[np.bool_]:
    """Return whether each group of an array, or each token, has values: (group,) or (token,) bool."""
    data, layout = episode.arrays, episode.layout
    kinds = data["key_kind"].values[inference]
    if name in EVERY_TOKEN:
        n_queries = layout.n_queries
        return (
            kinds[: layout.prefix_len] != Kind.PADDING if name.startswith("vlm") else np.ones(n_queries, bool)
        )
    if name.startswith("expert"):
        return np.ones(data.sizes["expert_group"], bool)
    groups = layout.prefix_groups(kinds)
    names = data["vlm_group"].values.tolist()
    return np.array([group in groups and bool(groups[group].any()) for group in names])


def _label(data: Any, dim: Any, index: int) -> Any:
    return data[dim].values[index] if dim in data.coords else index


def _wrong_values(
    values: NDArray[np.float16], there: NDArray[np.bool_], place: tuple[int, ...], array: Any
) -> str | None:
    """Say what is wrong with a chunk's values; None if nothing is."""
    if "reduction" in array.dims:
        has = bool(there[place[-2]])
        if has == bool(np.isnan(values).any()):
            return "NaN though the group has tokens" if has else "values, though the group has no token"
        return None
    of_tokens = np.isnan(values).reshape(len(there), -1)
    if of_tokens[there].any():
        return "NaN of a token that is there"
    return None if of_tokens[~there].all() else "values of a padding token"
