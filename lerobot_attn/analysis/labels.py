"""Labels as people give them: numbers, from the end too, lists, words; checked against the episode."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from lerobot_attn.errors import SelectionError


def said_of(dataset: xr.Dataset) -> dict[str, Any]:
    """Return what the episode says of itself: its attributes with objects as objects and truths as bool.

    A dataset carries objects as JSON text and truths as 0 or 1, because netCDF takes neither.
    """
    said = dict(dataset.attrs)
    for name in ("capture", "condition", "layout", "policy", "segmentation", "videos"):
        if isinstance(said.get(name), str):
            with contextlib.suppress(ValueError):
                said[name] = json.loads(said[name])
    for name in ("complete", "success"):
        if name in said and said[name] in (0, 1):
            said[name] = bool(said[name])
    return said


def stored_labels(
    dataset: xr.Dataset, name: str, choice: Any, count: str, words: tuple[str, ...] = ("all", "mean")
) -> Any:
    """Return what a choice of layers, steps or heads means among the labels that were saved.

    Args:
        dataset: an episode's.
        name: the coordinate, e.g. "denoise_step".
        choice: a number (negative from the policy's last), a list of them, or one of `words`: every one. None
            is the last one that was saved.
        count: the policy attribute that says how many there are.
        words: what may be said instead of numbers.

    Raises:
        SelectionError: a label that was not saved, or something else.
    """
    saved = dataset[name].values.tolist()
    if isinstance(choice, str):
        if choice not in words:
            known = f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}"
            raise SelectionError(f"{_plain(name)} {choice!r}: expected a number, a list, {known}")
        return saved
    if choice is None and saved:
        return saved[-1]
    total = policy_count(dataset, count)
    labels = from_end(_plain(name), choice, total or saved[-1] + 1)
    if labels == []:
        raise SelectionError(f"{_plain(name)} []: expected at least one; saved are {ranges(saved)}")
    for label in [labels] if isinstance(labels, int) else labels:
        if label not in saved:
            raise SelectionError(f"{_plain(name)} {label} was not saved; saved are {ranges(saved)}")
    return labels


def from_end(name: str, choice: Any, count: int) -> int | list[int]:
    """Return labels, of which negative ones count from the last of `count`; others are not checked here."""
    labels = integers(name, choice, "a word")

    def positive(label: int) -> int:
        return label + count if -count <= label < 0 else label

    return positive(labels) if isinstance(labels, int) else [positive(label) for label in labels]


def integers(name: str, choice: Any, word: str) -> int | list[int]:
    """Return a number or a list of them, of whatever integer type, as plain integers."""

    def plain(value: Any) -> int:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)

    values = np.asarray(choice).tolist() if hasattr(choice, "__array__") else choice
    try:
        return [plain(value) for value in values] if isinstance(values, Iterable) else plain(values)
    except TypeError:
        raise SelectionError(f"{name} {choice!r}: expected a number, a list or {word}") from None


def positions(name: str, choice: Any, count: int) -> int | list[int]:
    """Return frame or inference numbers, "all" included, after checking them; negative ones from the end."""
    if isinstance(choice, str) and choice == "all":
        return list(range(count))
    numbers = integers(name, choice, "'all'")
    values = [numbers] if isinstance(numbers, int) else numbers
    for value in values:
        if not -count <= value < count:
            held = f"0 to {count - 1}" if count else "none: it is empty"
            raise SelectionError(f"{name} {value} does not exist: the episode's are {held}")
    found = [value % count for value in values]
    return found[0] if isinstance(numbers, int) else found


def picked(array: xr.DataArray, dim: str, labels: int | list[int]) -> xr.DataArray:
    """Select labels. All of them are left as they are: Zarr reads by list ten times as slowly as by slice."""
    if isinstance(labels, list) and labels == array[dim].values.tolist():
        return array
    return array.sel({dim: labels})


def in_words(name: str, choice: Any, labels: Any, total: int | None = None) -> str:
    """Say a choice as people do: "layers 16-17", "mean of all heads".

    Args:
        name: what is chosen, in the singular.
        choice: as it was given.
        labels: what it means.
        total: how many the policy has; fewer labels than that are not called all.
    """
    values = np.atleast_1d(labels).tolist()
    listed = f"{name} {ranges(values)}" if len(values) == 1 else f"{name}s {ranges(values)}"
    if not isinstance(choice, str):
        return listed
    what = f"all {name}s" if total is None or len(values) >= total else listed
    return what if choice == "all" else f"{choice} of {what}"


def policy_count(dataset: xr.Dataset, name: str) -> int | None:
    """Return how many layers, heads or denoise steps the policy has, where the store says it."""
    count = policy_of(dataset).get(name)
    return count if isinstance(count, int) else None


def default_layer(dataset: xr.Dataset, labels: Sequence[int]) -> int:
    """Return which of some layers is shown unless another is asked for: the policy's own, or the last."""
    shown = policy_count(dataset, "shown_layer")
    return shown if shown is not None and shown in labels else max(labels)


def denoises(dataset: xr.Dataset) -> bool:
    """Return whether the policy denoises; the single step of one that does not stands for its one pass."""
    return policy_count(dataset, "n_denoise_steps") != 0


def frame_in_words(dataset: xr.Dataset) -> str:
    """Return what the action of a frame's token was to it: executed, or, in a replay, predicted alone."""
    return "predicted for" if "replay" in dataset.attrs else "executed at"


def frame_labels(dataset: xr.Dataset, frames: Sequence[int]) -> dict[str, xr.DataArray]:
    """Return the frames' own coordinates, by which a replay joins with its data set."""
    return {
        str(name): coordinate.isel(frame=list(frames)).drop_vars(list(coordinate.coords))
        for name, coordinate in dataset.coords.items()
        if coordinate.dims == ("frame",) and name != "frame"
    }


def policy_of(dataset: xr.Dataset) -> Mapping[str, Any]:
    """Return what the store says of the policy; nothing where it says nothing."""
    policy = said_of(dataset).get("policy")
    return policy if isinstance(policy, dict) else {}


def ranges(values: Sequence[int]) -> str:
    """Shorten [0, 1, 2, 5] to "0-2, 5"."""
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][1] + 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _plain(name: str) -> str:
    return name.replace("_", " ")
