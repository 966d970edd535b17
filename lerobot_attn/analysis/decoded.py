"""The tokens that an autoregressive policy decoded: which of them have a row, and what they are called.

Inferences differ in how many they decode. A token that was not read attends to nothing: its row is absent
(NaN), its key padding, and no mean counts it. Knows no layer, head or frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.labels import denoises, policy_count
from lerobot_attn.analysis.reduce import in_float32, plain_mean
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import Kind

_UNREADABLE = "\ufffd"  # what a decoder writes for bytes that are no whole character
ALL_IN_WORDS = "mean of the decoded tokens"


def decodes(dataset: xr.Dataset) -> bool:
    """Return whether the suffix is made of decoded tokens, none of which is an action of its own."""
    return bool(policy_count(dataset, "n_decode_steps"))


def is_read(dataset: xr.Dataset, inferences: int | Sequence[int] | NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return which suffix tokens have rows: (inference, query), or (query,) of one inference.

    All of them, where the policy decodes none.
    """
    n_queries = dataset.sizes["query"]
    if not decodes(dataset):
        return np.ones((*np.shape(inferences), n_queries), bool)
    read: NDArray[np.bool_] = dataset["key_kind"].values[inferences, -n_queries:] != Kind.PADDING
    return read


def check_steps(dataset: xr.Dataset) -> None:
    """Check that there are denoise steps to show side by side.

    Raises:
        SelectionError: the policy does not denoise.
    """
    if decodes(dataset):
        raise SelectionError(
            "the policy does not denoise, it decodes tokens one after another; one of them is query=3"
        )
    if not denoises(dataset):
        raise SelectionError("the policy does not denoise: an inference is one pass, not several steps")


def of_read_tokens(
    dataset: xr.Dataset, array: xr.DataArray, frame: int
) -> tuple[xr.DataArray, list[str] | None]:
    """Leave out what a frame's inference did not decode, and name what it did.

    Args:
        dataset: an episode's.
        array: (…, query, action_key), of that frame.
        frame: its number.

    Returns:
        The array, and the name of each token that is left; as it was, and None, where nothing is decoded.
    """
    if not decodes(dataset):
        return array, None
    inference = int(dataset["frame_inference"].values[frame])
    read = np.flatnonzero(is_read(dataset, inference))
    return array.isel(query=read, action_key=read), token_texts(dataset)[inference, read].tolist()


def mean_of_read(
    dataset: xr.Dataset,
    array: xr.DataArray,
    inferences: int | Sequence[int] | NDArray[np.integer],
    queries: slice,
) -> xr.DataArray:
    """Return the mean over the suffix tokens that have rows.

    Args:
        dataset: an episode's.
        array: (inference, …, query, key), or without the inference if that is one number.
        inferences: of which they are.
        queries: which suffix tokens to average over.

    Returns:
        (inference, …, key) float32; NaN where a map is missing, and where no token has a row.
    """
    array = array.isel(query=queries)
    if not decodes(dataset):
        return plain_mean(array, "query")
    array = in_float32(array)
    dims = ("query",) if np.ndim(inferences) == 0 else ("inference", "query")
    exists = xr.DataArray(is_read(dataset, inferences)[..., queries], dims=dims)
    count = exists.sum("query")
    return array.where(exists, 0).sum("query", skipna=False).transpose(..., "key") / count.where(count > 0)


def check_read(
    dataset: xr.Dataset, number: int, inferences: int | Sequence[int] | NDArray[np.integer]
) -> None:
    """Check that at least one of the inferences has a row for a token.

    Raises:
        SelectionError: none has, because they decoded fewer.
    """
    read = np.atleast_2d(is_read(dataset, inferences))
    if decodes(dataset) and len(read) and not read[:, number].any():
        which = f"inference {inferences}" if np.ndim(inferences) == 0 else "any of these inferences"
        most = int(read.sum(axis=1).max())
        expected = f"expected one of 0 to {most - 1}" if most else "which read none"
        raise SelectionError(f"decoded token {number} was not read in {which}, {expected}")


def token_in_words(
    dataset: xr.Dataset, number: int, inferences: int | Sequence[int] | NDArray[np.integer] = ()
) -> str:
    """Name an action token, "action 3", or a decoded one: 'decoded token 3 "<loc0711>"'.

    Args:
        dataset: an episode's.
        number: among the actions.
        inferences: whose; its text is said where it is the same in all of them.
    """
    if not decodes(dataset):
        return f"action {number}"
    texts = set(np.atleast_1d(token_texts(dataset)[inferences, number]).tolist()) - {""}
    return f"decoded token {number}" + (f' "{texts.pop()}"' if len(texts) == 1 else "")


def token_texts(dataset: xr.Dataset) -> NDArray[np.object_]:
    """Return what names each decoded token, (inference, query); empty where there is none.

    Its text, or "#371", its id, where the text cannot be read or there was no tokenizer.
    """
    if "suffix_token_id" not in dataset or "suffix_token_text" not in dataset:
        return np.full((dataset.sizes["inference"], dataset.sizes["query"]), "", object)
    ids = dataset["suffix_token_id"].values
    names: NDArray[np.object_] = dataset["suffix_token_text"].values.astype(object)
    for place in zip(*np.nonzero(ids >= 0), strict=True):
        text = str(names[place])
        if not text.isprintable() or _UNREADABLE in text or not text:
            names[place] = f"#{ids[place]}"
    return names
