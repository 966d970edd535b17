"""Neurons and residuals as stores hold them: the units, their activations, and found sets of units.

A unit is one neuron of a layer's feed-forward network, or one feature of the residual stream behind a layer.
Its activation was reduced over a group of tokens (a camera's, the task's words, the state, the actions) when
it was recorded. Knows no labels and no statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.labels import ranges
from lerobot_attn.errors import ConfigError, SelectionError

Kind = Literal["neurons", "residual"]
STREAMS = ("vlm", "expert")
HOW = {
    "neurons": "--eval.attention.neurons='{vlm: all, expert: all}'",
    "residual": "--eval.attention.residuals='{vlm: all, expert: all}'",
}
_UNIT = {"neurons": "unit", "residual": "feature"}
_LAYER = {"neurons": "neuron_layer", "residual": "residual_layer"}
_BLOCK_BYTES = 64_000_000
_LARGEST = float(np.finfo(np.float16).max)  # what was larger is stored as infinity

_Floats = NDArray[np.float32]


class Block(NamedTuple):
    """Units that are looked at together: one layer's, reduced over one group of tokens.

    Attributes:
        kind: "neurons" or "residual".
        stream: "vlm" or "expert".
        layer: the layer's number.
        group: the tokens: a camera's name, "task", "state", "template" or "actions".
        reduction: over the group's tokens, "mean" or "max".
        denoise_step: its number; None of the vlm, which runs once, and of the mean over steps.
        n_units: how many there are; they are numbered from 0.
    """

    kind: str
    stream: str
    layer: int
    group: str
    reduction: str
    denoise_step: int | None
    n_units: int

    @property
    def text(self) -> str:
        """Say where this is: "expert layer 3, tokens actions (mean)"."""
        step = "" if self.denoise_step is None else f", denoise step {self.denoise_step}"
        return f"{self.stream} layer {self.layer}, tokens {self.group} ({self.reduction}){step}"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which activations to look at.

    Attributes:
        kind: "neurons" or "residual".
        stream: "vlm" or "expert"; None: both, as far as they were recorded.
        layers: numbers of layers; None: all that were recorded.
        groups: names of token groups, a camera's by the end of its name; None: all.
        reductions: "mean", "max".
        denoise_step: its number, negative from the last; "mean" over the steps, or "all", each by itself.
    """

    kind: Kind = "neurons"
    stream: str | None = None
    layers: Sequence[int] | None = None
    groups: Sequence[str] | None = None
    reductions: Sequence[str] = ("mean",)
    denoise_step: int | Literal["mean", "all"] = "mean"


class Activations(NamedTuple):
    """The activations of one block.

    Attributes:
        block: which units.
        values: (inference, unit) float32, in the policy's own units; a row is NaN where the inference had no
            token of the group.
    """

    block: Block
    values: _Floats


class Units:
    """The units of several blocks on one axis, block after block.

    Args:
        blocks: in their order.
    """

    def __init__(self, blocks: Iterable[Block]):
        self.blocks = tuple(blocks)
        self._stops = np.cumsum([block.n_units for block in self.blocks])

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def slices(self) -> list[slice]:
        """Return where each block lies on the axis."""
        return [
            slice(int(stop) - block.n_units, int(stop))
            for stop, block in zip(self._stops, self.blocks, strict=True)
        ]

    def table(self, places: NDArray[np.intp]) -> pd.DataFrame:
        """Return the units at places of the axis: stream, layer, unit, group, reduction, denoise_step."""
        owners = np.searchsorted(self._stops, places, side="right")
        rows = []
        for place, owner in zip(places.tolist(), owners.tolist(), strict=True):
            block = self.blocks[owner]
            unit = place - (int(self._stops[owner]) - block.n_units)
            rows.append((block.stream, block.layer, unit, block.group, block.reduction, block.denoise_step))
        table = pd.DataFrame(rows, columns=["stream", "layer", "unit", "group", "reduction", "denoise_step"])
        return table.astype({"denoise_step": "Int64"})


def blocks_of(dataset: xr.Dataset, choice: Choice) -> list[Block]:
    """Return what an episode holds of a choice, without reading any activation.

    Args:
        dataset: an episode's.
        choice: which activations.

    Raises:
        SelectionError: it holds none, or a layer, group, reduction or step that was not recorded.
    """
    return [
        Block(choice.kind, stream, layer, group, reduction, step, part.n_units)
        for stream, part in _parts(dataset, choice).items()
        for layer, group, reduction, step in part.labels()
    ]


def activations(dataset: xr.Dataset, choice: Choice) -> Iterator[Activations]:
    """Yield the activations of one block after another, in the order of `blocks_of`.

    What was larger than float16 holds (65504) counts as that.

    Args:
        dataset: an episode's.
        choice: which activations.

    Raises:
        SelectionError: as `blocks_of`.
    """
    for stream, part in _parts(dataset, choice).items():
        values = part.read()
        for (layer, group, reduction, step), found in zip(part.labels(), values, strict=True):
            block = Block(choice.kind, stream, layer, group, reduction, step, part.n_units)
            yield Activations(block, np.clip(found, -_LARGEST, _LARGEST, dtype=np.float32))


def units_of(
    csv: str | Path,
    *,
    top: int | None = None,
    side: Literal["more", "less"] | None = None,
    **where: Any,
) -> dict[str, dict[int, list[int]]]:
    """Read a found set: the table that `lerobot-attn neurons` wrote, or any with the same columns.

    Args:
        csv: the file, with columns stream, layer and unit; its rows are in order, the best first.
        top: how many units at most; None: all. A unit in several rows counts once.
        side: of a contrast, units that fire more in its first group (column auc above 0.5), or less.
        where: values of other columns, e.g. `word="high"` or `group="actions"`.

    Returns:
        stream → layer → units, in the file's order.

    Raises:
        ConfigError: the file cannot be read, lacks a column, holds a unit that is no number, or nothing of
            what was asked for.
    """
    try:
        table = pd.read_csv(csv)
    except (OSError, UnicodeDecodeError, ValueError) as error:  # pandas' own errors are ValueErrors
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{csv}: cannot read a found set ({reason}); expected a CSV table") from error
    needed = ["stream", "layer", "unit", *where, *(["auc"] if side else [])]
    if lacking := [name for name in needed if name not in table]:
        raise ConfigError(
            f"{csv}: has the columns {', '.join(map(str, table.columns))}; expected {', '.join(needed)} "
            f"({lacking[0]} is missing)"
        )
    if top is not None and top < 1:
        raise ConfigError(f"top: got {top}, expected 1 or more units")
    for name, value in where.items():
        table = table[table[name] == value]
    if side is not None:
        table = table[table["auc"] > 0.5 if side == "more" else table["auc"] < 0.5]
    found: dict[str, dict[int, list[int]]] = {}
    taken: set[tuple[str, int, int]] = set()
    for row in table[["stream", "layer", "unit"]].itertuples(index=False):
        unit = _unit_of(csv, row)
        if unit in taken or (top is not None and len(taken) >= top):
            continue
        taken.add(unit)
        stream, layer, number = unit
        found.setdefault(stream, {}).setdefault(layer, []).append(number)
    if not found:
        asked = ", ".join(f"{name} {value}" for name, value in {**where, "side": side}.items() if value)
        raise ConfigError(f"{csv}: holds no unit{f' of {asked}' if asked else ''}; expected one at least")
    return found


def _unit_of(csv: str | Path, row: Any) -> tuple[str, int, int]:
    stream = str(row.stream)
    try:
        layer, unit = int(row.layer), int(row.unit)
        is_whole = layer == row.layer and unit == row.unit and layer >= 0 and unit >= 0
    except (TypeError, ValueError):
        is_whole = False
    if not is_whole or stream not in STREAMS:
        raise ConfigError(
            f"{csv}: got stream {stream}, layer {row.layer}, unit {row.unit}; expected vlm or expert and "
            "whole numbers"
        )
    return stream, layer, unit


class _Part:
    """The chosen activations of one stream: (inference, layer, group, reduction, step, unit)."""

    def __init__(self, array: xr.DataArray, stream: str, choice: Choice):
        kind = choice.kind
        layer, group, unit = f"{stream}_{_LAYER[kind]}", f"{stream}_group", f"{stream}_{_UNIT[kind]}"
        self.layers = _known(array, layer, choice.layers)
        self.groups = _known_groups(array, group, choice.groups)
        self.reductions = [str(name) for name in array["reduction"].values if name in choice.reductions]
        if lacking := [name for name in choice.reductions if name not in self.reductions]:
            held = ", ".join(map(str, array["reduction"].values))
            raise SelectionError(f"reduction {lacking[0]!r} was not recorded; recorded are {held}")
        self.n_units = int(array.sizes[unit])
        self.is_empty = not (self.layers and self.groups)
        self._is_mean = "denoise_step" in array.dims and choice.denoise_step == "mean"
        self.steps: list[int | None] = [None]
        for dim, labels in ((layer, self.layers), (group, self.groups), ("reduction", self.reductions)):
            array = _picked(array, dim, labels)
        if "denoise_step" in array.dims and not self._is_mean:
            stored = array["denoise_step"].values.tolist()
            self.steps = stored if choice.denoise_step == "all" else [_step(stored, choice.denoise_step)]
            array = _picked(array, "denoise_step", self.steps)
        elif "denoise_step" not in array.dims:
            array = array.expand_dims("denoise_step")
        self._array = array.transpose("inference", layer, group, "reduction", "denoise_step", unit)

    def labels(self) -> list[tuple[int, str, str, int | None]]:
        """Return layer, group, reduction and step of each block, in order."""
        return [
            (layer, group, reduction, step)
            for layer in self.layers
            for group in self.groups
            for reduction in self.reductions
            for step in self.steps
        ]

    def read(self) -> Iterator[NDArray[Any]]:
        """Yield (inference, unit) of each block; inferences are read some at a time."""
        n_inferences = self._array.sizes["inference"]
        one = max(1, self._array.nbytes // max(1, n_inferences))
        some = max(1, _BLOCK_BYTES // one)
        pieces = []
        for start in range(0, n_inferences, some):
            values = self._array.isel(inference=slice(start, start + some)).values
            if self._is_mean:
                values = values.astype(np.float32).mean(axis=4, keepdims=True)
            pieces.append(values)
        every = np.concatenate(pieces) if pieces else np.zeros(self._array.shape, np.float16)
        every = every.reshape(n_inferences, len(self.labels()), self.n_units)
        for index in range(every.shape[1]):
            yield every[:, index]


def _parts(dataset: xr.Dataset, choice: Choice) -> Mapping[str, _Part]:
    if choice.stream is not None and choice.stream not in STREAMS:
        raise SelectionError(f"stream {choice.stream!r}: expected {' or '.join(STREAMS)}")
    streams = STREAMS if choice.stream is None else (choice.stream,)
    there = [stream for stream in streams if f"{stream}_{choice.kind}" in dataset]
    if not there:
        of = "" if choice.stream is None else f" of the {choice.stream} stream"
        raise SelectionError(
            f"{choice.kind}: the episode has none{of}; record with {HOW[choice.kind]} (or some layers)"
        )
    problems, parts = [], {}
    for stream in there:
        array = dataset[f"{stream}_{choice.kind}"]
        if "denoise_step" in array.dims and choice.denoise_step not in ("mean", "all"):
            _step(array["denoise_step"].values.tolist(), choice.denoise_step)
        try:
            parts[stream] = _Part(array, stream, choice)
        except SelectionError as error:  # what one stream lacks, the other may hold
            problems.append(f"{stream}: {error}")
    if not parts:
        raise SelectionError("; ".join(problems))
    return parts


def _picked(array: xr.DataArray, dim: str, labels: Sequence[Any]) -> xr.DataArray:
    """Select labels; one alone as a slice and all of them not at all, because Zarr reads lists slowly."""
    stored = array[dim].values.tolist()
    if list(labels) == stored:
        return array
    places = [stored.index(label) for label in labels]
    return array.isel({dim: slice(places[0], places[0] + 1) if len(places) == 1 else places})


def _known(array: xr.DataArray, dim: str, wanted: Sequence[int] | None) -> list[int]:
    stored = [int(label) for label in array[dim].values]
    if wanted is None:
        return stored
    if missing := [label for label in wanted if label not in stored]:
        raise SelectionError(f"layer {missing[0]} was not recorded; recorded are {ranges(stored)}")
    return list(dict.fromkeys(int(label) for label in wanted))


def _known_groups(array: xr.DataArray, dim: str, wanted: Sequence[str] | None) -> list[str]:
    stored = [str(name) for name in array[dim].values]
    if wanted is None:
        return stored
    found = []
    for name in wanted:
        exact = [group for group in stored if group == name]
        ends = exact or [group for group in stored if group.endswith(f".{name}")]
        if len(ends) != 1:
            raise SelectionError(f"token group {name!r} was not recorded; recorded are {', '.join(stored)}")
        found.append(ends[0])
    return list(dict.fromkeys(found))


def _step(stored: list[int], choice: Any) -> int:
    if isinstance(choice, int) and not isinstance(choice, bool):
        step = choice + stored[-1] + 1 if choice < 0 else choice
        if step in stored:
            return step
    raise SelectionError(
        f"denoise step {choice!r} was not recorded; recorded are {ranges(stored)}, or 'mean' or 'all'"
    )
