"""Labels of an array's values as columns of a tidy table: where each value is, and what it is of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

_NAMING = ("modality", "token", "camera")
_LEADING = (
    "inference",
    "frame",
    "phase",
    "flow_time",
    "denoise_step",
    "layer",
    "head",
    "query",
)
TEXTS = ("measure", "quantity", "kind", "name")


class Labels(NamedTuple):
    """What tells tokens of different inferences and episodes apart, and the same ones together."""

    kind: str  # "task", "state", "template" or "text"
    name: str  # the token's text; "the (2)" for the second of its kind and text


def token_labels(array: xr.DataArray) -> list[Labels]:
    """Return each token's kind and name, unique in the array; `array` is (…, token) of `token_attention`."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for kind, label in zip(array["kind"].values.tolist(), array["label"].values.tolist(), strict=True):
        seen[kind, label] += 1
        times = seen[kind, label]
        found.append(Labels(kind, label if times == 1 else f"{label} ({times})"))
    return found


def label_columns(array: xr.DataArray) -> dict[str, NDArray[Any] | pd.Categorical]:
    """Return the labels of every value, each a flat column in the order of `array.values.ravel()`.

    The dimension that names things (modality, token or camera) becomes `kind` and `name`, which are
    categories; other dimensions and coordinates keep theirs.
    """
    naming = next((dim for dim in _NAMING if dim in array.dims), None)
    labels: dict[str, tuple[Hashable | None, NDArray[Any]]] = {
        str(dim): (dim, np.arange(size)) for dim, size in array.sizes.items() if dim != naming
    }
    for key, coord in array.coords.items():
        if key == "layer_sees_suffix":  # says why values are NaN, not where they are
            continue
        if coord.ndim == 0:
            labels[str(key)] = (None, coord.values)
        elif coord.ndim == 1 and coord.dims[0] != naming:
            labels[str(key)] = (coord.dims[0], coord.values)
    if naming == "token":
        tokens = token_labels(array)
        labels["kind"] = (naming, np.array([token.kind for token in tokens], dtype=object))
        labels["name"] = (naming, np.array([token.name for token in tokens], dtype=object))
    else:
        names = np.array("" if naming is None else array[naming].values, dtype=object)
        labels["kind"] = (None, np.array(naming or "", dtype=object))
        labels["name"] = (naming, names)
    columns: dict[str, NDArray[Any] | pd.Categorical] = {}
    for column, (along, values) in labels.items():
        shape = [-1 if dim == along else 1 for dim in array.dims]
        is_text = column in TEXTS and values.dtype.kind in "OUT"
        # Found among a few names, not among as many as there are values.
        codes, texts = pd.factorize(values.ravel()) if is_text else (values, None)
        codes = codes.reshape(shape if along is not None else ())
        columns[column] = np.broadcast_to(codes, array.shape).ravel()
        if is_text:
            columns[column] = pd.Categorical.from_codes(columns[column], texts)
    return columns


def ordered_columns(columns: Iterable[str], last: Sequence[str]) -> list[str]:
    """Return column names in order: where in the episode and the policy, anything else, what, then `last`."""
    every = list(columns)
    known = {*_LEADING, *TEXTS, *last}
    names = [name for name in _LEADING if name in every] + [name for name in every if name not in known]
    return [*names, *TEXTS, *last]
