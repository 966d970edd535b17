"""Differences of two groups of episodes, and bootstrap intervals over episodes. Reads no episode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.catalogue import Measure
from lerobot_attn.analysis.columns import Labels, token_labels
from lerobot_attn.analysis.tokens import MODALITY_OF
from lerobot_attn.errors import SelectionError

FEW_EPISODES = 10
_BATCH_BYTES = 64_000_000
_KINDS = list(MODALITY_OF.values())


class Group(NamedTuple):
    """One measure of every episode of a group, on one common axis."""

    values: list[xr.DataArray]
    paths: list[str]


def difference_of(
    a: Group, b: Group, measure: Measure, confidence: float, n_resamples: int, seed: int
) -> xr.Dataset:
    """Return a, b, their difference b - a and its interval, over the axis that both groups share."""
    n_a, n_b = len(a.values), len(b.values)
    together = stacked([*a.values, *b.values], "episode", fill_value=np.nan, names=[*a.paths, *b.paths])
    values = together.values
    # Low and high are NaN unless both groups have two episodes with a value.
    low, high = interval_of_difference(values[:n_a], values[n_a:], confidence, n_resamples, seed)
    mean_a, mean_b = mean_of(values[:n_a]), mean_of(values[n_a:])
    found = {
        "a": (mean_a, "mean of a's episodes"),
        "b": (mean_b, "mean of b's episodes"),
        "difference": (mean_b - mean_a, "b - a"),
        "low": (low, "lower end of the difference's interval"),
        "high": (high, "upper end of the difference's interval"),
        "n_a": (np.isfinite(values[:n_a]).sum(axis=0), "episodes of a with a value"),
        "n_b": (np.isfinite(values[n_a:]).sum(axis=0), "episodes of b with a value"),
    }
    units = together.attrs.get("units", "1")
    result = xr.Dataset(
        {
            name: (
                together.dims[1:],
                array,
                {"long_name": text, "units": "1" if name in ("n_a", "n_b") else units},
            )
            for name, (array, text) in found.items()
        },
        {name: coord for name, coord in together.coords.items() if "episode" not in coord.dims},
    )
    if "phase" in result.dims:
        result["phase"].attrs = {"long_name": "fraction of the episode", "units": "1"}
    fewest = min(n_a, n_b)
    interval = (
        f"{confidence:.0%} percentile bootstrap over episodes, {n_a} and {n_b}, {n_resamples} resamples"
    )
    if fewest < 2:
        interval = f"none: {n_a} and {n_b} episodes, two of each are needed"
    elif fewest < FEW_EPISODES:
        interval += "; too narrow with so few episodes"
    kept = {name: value for name, value in together.attrs.items() if name not in ("vmin", "vmax")}
    result.attrs = {
        **kept,
        "measure": measure.name,
        "quantity": measure.quantity,
        "episodes_a": n_a,
        "episodes_b": n_b,
        "interval": interval,
    }
    return result


def interval_of_mean(
    values: NDArray[np.float64], confidence: float, n_resamples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the expanded percentile bootstrap interval of the mean over the first axis; see `expanded_tail`.

    Args:
        values: (episode, …), NaN where an episode has no value.
        confidence: of the interval, 0 to 1.
        n_resamples: how often as many episodes are drawn with replacement.
        seed: of the drawing.

    Returns:
        Low and high, (…); NaN where fewer than two episodes have a value.
    """
    shape = values.shape[1:]
    values = values.reshape(len(values), -1)
    low, high = np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    patterns, members = np.unique(np.isfinite(values), axis=1, return_inverse=True)
    some = max(1, _BATCH_BYTES // (8 * n_resamples))
    for index, pattern in enumerate(patterns.T):
        n = int(pattern.sum())
        if n < 2:
            continue
        tail = expanded_tail(n, confidence)
        ends = [100 * tail, 100 * (1 - tail)]
        weights = _resample(n, n_resamples, np.random.default_rng(seed))
        cells = np.flatnonzero(members.ravel() == index)
        for start in range(0, len(cells), some):
            part = cells[start : start + some]
            low[part], high[part] = np.percentile(weights @ values[np.ix_(pattern, part)], ends, axis=0)
    return low.reshape(shape), high.reshape(shape)


def interval_of_difference(
    a: NDArray[np.float64], b: NDArray[np.float64], confidence: float, n_resamples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the percentile interval of mean(b) - mean(a); a and b are (episode, …), NaN for no value.

    The numbers are, to rounding, those of `scipy.stats.bootstrap` (method="percentile", the same seed), which
    gathers every resample: 18 s for heatmaps of 200 episodes a group, where means are one matrix product.
    """
    shape = a.shape[1:]
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    low, high = np.full(a.shape[1], np.nan), np.full(a.shape[1], np.nan)
    ends = [50 * (1 - confidence), 50 * (1 + confidence)]
    # Values that the same episodes have are drawn together; an episode without a value has no part in it.
    present = np.isfinite(np.concatenate([a, b]))
    patterns, members = np.unique(present, axis=1, return_inverse=True)
    for index, pattern in enumerate(patterns.T):
        of_a, of_b = pattern[: len(a)], pattern[len(a) :]
        if of_a.sum() < 2 or of_b.sum() < 2:
            continue
        rng = np.random.default_rng(seed)
        weights_a, weights_b = (_resample(int(of.sum()), n_resamples, rng) for of in (of_a, of_b))
        cells = np.flatnonzero(members.ravel() == index)
        some = max(1, _BATCH_BYTES // (8 * n_resamples))
        for start in range(0, len(cells), some):
            part = cells[start : start + some]
            means = weights_b @ b[np.ix_(of_b, part)] - weights_a @ a[np.ix_(of_a, part)]
            low[part], high[part] = np.percentile(means, ends, axis=0)
    return low.reshape(shape), high.reshape(shape)


def _resample(n: int, n_resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw n of n episodes with replacement; return each one's weight in the mean, (resample, episode)."""
    drawn = rng.integers(0, n, (n_resamples, n)) + n * np.arange(n_resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=n_resamples * n).reshape(n_resamples, n) / n


def expanded_tail(n: int, confidence: float) -> float:
    """Return the share of resampled means that an interval leaves out at each end.

    The percentiles lie farther out than the confidence says, as Student's t does from the normal: the plain
    ones are too narrow for few values. Source: Hesterberg 2015, The American Statistician 69:371-386.

    Args:
        n: values, two or more.
        confidence: of the interval.
    """
    from scipy.special import ndtr, stdtrit  # takes a while to import

    return float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - confidence) / 2)))


def prediction_interval(values: NDArray[np.float64], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return where one more value like these would lie, if they are normal: mean ± t·s·sqrt(1 + 1/n).

    Args:
        values: (draw,), no NaN.
        confidence: of the interval.

    Returns:
        low and high; NaN with fewer than two values.
    """
    n = len(values)
    if n < 2:
        return np.nan, np.nan
    from scipy.special import stdtrit  # takes a while to import

    half = stdtrit(n - 1, (1 + confidence) / 2) * values.std(ddof=1) * math.sqrt(1 + 1 / n)
    return float(values.mean() - half), float(values.mean() + half)


def paired_interval(
    differences: NDArray[np.float64], *, confidence: float = 0.95, n_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the expanded percentile bootstrap interval of a mean of paired differences; pairs are drawn.

    Its percentiles are those of `expanded_tail`.

    Args:
        differences: (pair,), no NaN.
        confidence: of the interval.
        n_resamples: how often pairs are drawn.
        seed: of the draws.

    Returns:
        low and high; NaN with fewer than two pairs.
    """
    if len(differences) < 2:
        return np.nan, np.nan
    tail = 100 * expanded_tail(len(differences), confidence)
    rng = np.random.default_rng(seed)
    some = max(1, _BATCH_BYTES // (24 * len(differences)))
    means = [
        _resample(len(differences), min(some, n_resamples - start), rng) @ differences
        for start in range(0, n_resamples, some)
    ]
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def mean_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the first axis of what is not NaN; NaN where everything is."""
    present = np.isfinite(values)
    count = present.sum(axis=0)
    total = np.where(present, values, 0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def stacked(
    arrays: Sequence[xr.DataArray], dim: str, *, fill_value: float, names: Sequence[str]
) -> xr.DataArray:
    """Join arrays along `dim`, first; modalities and tokens by name, frames of episodes by number."""
    tokens: dict[Labels, set[int]] = {}
    keyed = []
    for array in arrays:
        if "token" in array.dims:
            labels = [Labels(*label) for label in token_labels(array)]
            for label, ordinal in zip(labels, array["ordinal"].values.tolist(), strict=True):
                tokens.setdefault(label, set()).add(ordinal)
            array = array.drop_vars(["label", "kind", "ordinal"]).assign_coords(token=list(map(str, labels)))
        keyed.append(array)
    order = sorted(
        tokens, key=lambda label: _KINDS.index(label.kind) if label.kind in _KINDS else len(_KINDS)
    )
    wanted: dict[str, list[Any]] = {"token": [str(label) for label in order]} if order else {}
    if any("modality" in array.dims for array in keyed):
        wanted["modality"] = list(
            dict.fromkeys(m for array in keyed for m in array["modality"].values.tolist())
        )
    if dim == "episode" and "frame" in keyed[0].dims:
        longest = max(int(array["frame"][-1]) for array in keyed) + 1
        keyed = [array.reindex(frame=np.arange(longest)) for array in keyed]
    keyed = [_filled(array, wanted, fill_value) for array in keyed]
    _check_same(keyed, dim, names)
    axis = keyed[0].dims.index(dim) if dim in keyed[0].dims else None
    values = [array.values for array in keyed]
    joined = np.stack(values) if axis is None else np.concatenate(values, axis=axis)
    coords = _common_coords(keyed, dim)
    if axis is not None:
        coords[dim] = np.concatenate([array[dim].values for array in keyed])
    result = xr.DataArray(joined, coords, keyed[0].dims if axis is not None else [dim, *keyed[0].dims])
    if order:
        result = result.assign_coords(
            token=np.arange(len(order)),
            label=("token", [label.name for label in order]),
            kind=("token", [label.kind for label in order]),
            ordinal=("token", [next(iter(o)) if len(o := tokens[label]) == 1 else -1 for label in order]),
        )
    result.attrs = _common_attrs(keyed)
    return result


def _filled(array: xr.DataArray, wanted: Mapping[str, Sequence[Any]], fill_value: float) -> xr.DataArray:
    """Bring an array to the wanted labels; a row that is missing as a whole stays so, others are filled."""
    dims = [dim for dim in wanted if dim in array.dims]
    filled = array.reindex({dim: wanted[dim] for dim in dims}, fill_value=fill_value)
    return filled.where(array.notnull().any(dims)) if dims else filled


def _check_same(arrays: Sequence[xr.DataArray], dim: str, names: Sequence[str]) -> None:
    first = arrays[0]
    for array, name in zip(arrays, names, strict=True):
        dims = [d for d in first.dims if d != dim]
        if array.dims != first.dims:
            raise SelectionError(f"dimensions differ: {first.dims} in {names[0]}, {array.dims} in {name}")
        for d in dims:
            if array.sizes[d] != first.sizes[d] or not np.array_equal(array[d].values, first[d].values):
                ours, theirs = first[d].values.tolist(), array[d].values.tolist()
                raise SelectionError(f"{d} differs: {ours!s:.60} in {names[0]}, {theirs!s:.60} in {name}")


def _common_coords(arrays: Sequence[xr.DataArray], dim: str) -> dict[Any, Any]:
    """Return the coordinates that all arrays have alike, without those along `dim`.

    By their own values: `equals` of a coordinate also compares the scalar ones that hang on it, such as the
    flow time of a step, which differs between policies.
    """
    return {
        name: coord
        for name, coord in arrays[0].coords.items()
        if dim not in coord.dims
        and all(name in a.coords and a.coords[name].variable.equals(coord.variable) for a in arrays)
    }


def _common_attrs(arrays: Sequence[xr.DataArray]) -> dict[str, Any]:
    """Return the attributes in words; where arrays differ, what each of them is."""
    found: dict[str, dict[str, Any]] = {}
    for array in arrays:
        for name, value in array.attrs.items():
            found.setdefault(str(name), {}).setdefault(str(value), value)
    return {
        name: next(iter(values.values())) if len(values) == 1 else " or ".join(values)
        for name, values in found.items()
    }
