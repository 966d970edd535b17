"""Which neurons an episode holds, which sets of them are worth a look, and their activation over the episode.

Of stores that hold `vlm_neurons` or `expert_neurons`. Pure functions on an episode; knows no request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.neurons import STREAMS, units_of
from lerobot_attn.errors import SelectionError
from lerobot_attn.explorer.means import in_blocks
from lerobot_attn.explorer.values import numbers
from lerobot_attn.store.reader import Episode

MOST_UNITS = 200  # of a set that is looked at; more are no set but a layer
MOST_EACH = 32  # of a set whose units the page draws one by one
DEFAULT_TOP = 20  # of a found set
_MOST_SETS = 8  # of a table: words that are asked about are a few
_LARGEST = float(np.finfo(np.float16).max)  # what was larger is stored as infinity
_MOST_VALUES = 2**24  # of one inference and one group of tokens: some layers of 16384 neurons are 300,000
_BLOCK_VALUES = 2**22  # that are in memory at once

Unit = tuple[int, int]  # layer, number in the layer


class FoundSet(NamedTuple):
    """A set of neurons that somebody found, e.g. by `lerobot-attn neurons`.

    Attributes:
        name: what the page calls it.
        units: stream → (layer, unit), the best first.
    """

    name: str
    units: Mapping[str, Sequence[Unit]]


def read_found(csv: str | Path, top: int = DEFAULT_TOP) -> tuple[FoundSet, ...]:
    """Read the found sets of a table with the columns stream, layer and unit.

    A table of words (column word) holds a set a word. A contrast (column auc) holds the neurons that are more
    active in its first group and those that are less, because a mean over both would say nothing. Any other
    table is one set.

    Args:
        csv: the file; its rows are in order, the best first.
        top: how many units of each set at most.

    Raises:
        ConfigError: the file cannot be read, or holds no units.
    """
    top, file = min(top, MOST_UNITS), Path(csv).name
    whole = units_of(csv, top=top)  # says what is wrong with the file
    table = pd.read_csv(csv, usecols=lambda name: name in ("word", "auc"))
    found: dict[str, Mapping[str, Mapping[int, Sequence[int]]]] = {}
    if "word" in table:
        words = table["word"].dropna().unique().tolist()[:_MOST_SETS]
        found = {f"{file}, {word}": units_of(csv, top=top, word=word) for word in words}
    elif "auc" in table:
        if (table["auc"] > 0.5).any():
            found[f"{file}, more active"] = units_of(csv, top=top, side="more")
        if (table["auc"] < 0.5).any():
            found[f"{file}, less active"] = units_of(csv, top=top, side="less")
    return tuple(FoundSet(name, _listed(units)) for name, units in (found or {file: whole}).items())


def _listed(units: Mapping[str, Mapping[int, Sequence[int]]]) -> dict[str, list[Unit]]:
    return {
        stream: [(layer, unit) for layer, of_layer in layers.items() for unit in of_layer]
        for stream, layers in units.items()
    }


def neurons(episode: Episode, found: Sequence[FoundSet] = ()) -> dict[str, Any] | None:
    """Return which neurons an episode holds and which sets of them there are; None where it holds none.

    Args:
        episode: the episode.
        found: sets that somebody found.

    Returns:
        `streams`, "vlm" and "expert" as far as they were recorded → `groups` of tokens, `reductions`,
        `layers`, `n_units` of a layer, and whether there is one activation `per_step` of denoising; `sets`,
        the found ones and the one that the episode's condition fires, each with `kind` ("found", "fired"),
        `name`, `units`, stream → [layer, unit] of those that were recorded, and `n_left_out`, how many were
        not, or are too many. A set of which nothing was recorded is left out.
    """
    data = episode.arrays
    streams = {
        stream: _Recorded(data, stream).to_dict() for stream in STREAMS if _name(stream) in data.data_vars
    }
    if not streams:
        return None
    sets = [_set("found", one.name, one.units, streams) for one in found]
    fired = fired_units(episode)
    if fired:
        sets.append(_set("fired", episode.condition.name, fired, streams))
    return {"streams": streams, "sets": [one for one in sets if any(one["units"].values())]}


def fired_units(episode: Episode) -> dict[str, list[Unit]]:
    """Return the units that the episode's condition acts on, stream → (layer, unit); mostly empty.

    What a stranger's store says of them wrongly is passed over.
    """
    fired: dict[str, dict[Unit, None]] = {}
    for done in episode.condition.interventions:
        stream, layers = done.get("stream"), done.get("units")
        if done.get("kind") != "neurons" or stream not in STREAMS or not isinstance(layers, dict):
            continue
        for layer, units in layers.items():  # JSON has numbers as names
            if not str(layer).isdecimal() or len(str(layer)) > 4 or not isinstance(units, list):
                continue
            known = [(int(layer), unit) for unit in units if type(unit) is int and unit >= 0]
            fired.setdefault(stream, {}).update(dict.fromkeys(known))
    return {stream: list(units) for stream, units in fired.items()}


def activations(
    episode: Episode,
    first: int,
    stream: str,
    units: Sequence[Unit],
    *,
    group: str,
    reduction: str = "mean",
    denoise_step: int = -1,
    each: bool = False,
) -> dict[str, Any]:
    """Return how active a set of neurons is in the inferences from `first` on.

    Reads the layers of the set, some inferences at a time; of all others nothing is decoded that lies in
    chunks of its own.

    Args:
        episode: the episode.
        first: number of the first inference, so that a live page asks for the new ones alone.
        stream: "vlm" or "expert".
        units: (layer, unit), at most `MOST_UNITS`.
        group: of tokens, as `neurons` names it.
        reduction: over the group's tokens, "mean" or "max".
        denoise_step: label, negative from the last; the vlm runs once and has none.
        each: whether each unit is wanted too.

    Returns:
        `first`, `stream`, `units`, `group`, `reduction` as asked; `denoise_step`, its label or None; `mean`,
        (inference), over the units; `expected`, (inference), the same of all units of the same layers, each
        layer as often as the set has units of it: what as many units drawn at random would have on average;
        `each`, (inference, unit), or None. In the policy's own units; None where an inference had no
        token of the group, or is damaged.

    Raises:
        SelectionError: the episode does not hold it, or too many units are asked for.
    """
    data, n = episode.arrays, episode.n_inferences
    if not 0 <= first <= n:
        raise SelectionError(f"inference {first} does not exist: the episode has {n}, expected 0 to {n}")
    if stream not in STREAMS or _name(stream) not in data.data_vars:
        raise SelectionError(
            f"this episode was recorded without neurons of stream {stream!r}; record with "
            "--eval.attention.neurons='{vlm: all, expert: all}'"
        )
    if not 1 <= len(units) <= MOST_UNITS:
        raise SelectionError(f"got {len(units)} neurons, expected 1 to {MOST_UNITS}")
    recorded = _Recorded(data, stream)
    layers, places = recorded.places(units)
    step, array = recorded.chosen(group, reduction, denoise_step)
    array = array.isel({f"{stream}_neuron_layer": layers})
    each_inference = int(np.prod(array.shape[1:]))
    if each_inference > _MOST_VALUES:
        raise SelectionError(f"layers of {recorded.n_units} neurons are too large to be looked at")

    rows, expected = np.full((n - first, len(units)), np.nan), np.full(n - first, np.nan)
    layer_of, unit_of = places.T

    def read(block: slice) -> NDArray[np.float64]:
        """Return (inference, unit + 1): each unit, and what is expected of them."""
        asked = slice(first + block.start, first + block.stop)
        values = array.isel(inference=asked).values
        own = values[:, layer_of, unit_of].clip(-_LARGEST, _LARGEST).astype(np.float64)
        of_layers = np.full(values.shape[:2], np.nan)
        for layer in np.unique(layer_of):
            of_layer = values[:, layer].clip(-_LARGEST, _LARGEST)
            of_layers[:, layer] = of_layer.mean(axis=-1, dtype=np.float64)
        return np.column_stack([own, of_layers[:, layer_of].mean(axis=1)])

    at_once = max(1, _BLOCK_VALUES // max(1, each_inference))
    for block, found in in_blocks(n - first, read, at_once):
        rows[block], expected[block] = found[:, :-1], found[:, -1]
    return {
        "first": first,
        "stream": stream,
        "units": [list(unit) for unit in units],
        "group": group,
        "reduction": reduction,
        "denoise_step": step,
        "mean": numbers(rows.mean(axis=1)),
        "expected": numbers(expected),
        "each": numbers(rows) if each else None,
    }


def every_answer(
    episode: Episode, facts: Mapping[str, Any], steps: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield the activations of every set that an episode's facts name: each group, reduction and step.

    Args:
        episode: the episode.
        facts: what `neurons` returned.
        steps: labels of the denoise steps that are wanted.
    """
    for one in facts["sets"]:
        for stream, units in one["units"].items():
            of_stream = facts["streams"][stream]
            for group in of_stream["groups"]:
                for reduction in of_stream["reductions"]:
                    for step in steps if of_stream["per_step"] else steps[-1:]:
                        yield activations(
                            episode,
                            0,
                            stream,
                            [(layer, unit) for layer, unit in units],
                            group=group,
                            reduction=reduction,
                            denoise_step=step,
                            each=len(units) <= MOST_EACH,
                        )


class _Recorded:
    """What was recorded of one stream's neurons; reads no activation."""

    def __init__(self, data: xr.Dataset, stream: str):
        self._array = data[_name(stream)]
        self._stream = stream
        self.groups, self.reductions = (
            [str(name) for name in data[dimension].values] for dimension in (f"{stream}_group", "reduction")
        )
        self.layers: list[int] = data[f"{stream}_neuron_layer"].values.tolist()
        self.steps: list[int] = data["denoise_step"].values.tolist() if self._per_step else []
        self.n_units = self._array.sizes[f"{stream}_unit"]

    @property
    def _per_step(self) -> bool:
        return "denoise_step" in self._array.dims

    def to_dict(self) -> dict[str, Any]:
        return {
            "groups": self.groups,
            "reductions": self.reductions,
            "layers": self.layers,
            "n_units": self.n_units,
            "per_step": self._per_step,
        }

    def places(self, units: Sequence[Unit]) -> tuple[slice, NDArray[np.intp]]:
        """Return the run of layers that holds all units, and each unit's layer in it and number."""
        for layer, unit in units:
            if layer not in self.layers:
                raise SelectionError(
                    f"{self._stream} layer {layer} was not recorded: the episode holds {self.layers}"
                )
            if not 0 <= unit < self.n_units:
                raise SelectionError(
                    f"unit {unit} does not exist: {self._stream} layers have {self.n_units} neurons"
                )
        places = [self.layers.index(layer) for layer, _ in units]
        run = slice(min(places), max(places) + 1)
        return run, np.array([(p - run.start, unit) for p, (_, unit) in zip(places, units, strict=True)])

    def chosen(self, group: str, reduction: str, denoise_step: int) -> tuple[int | None, xr.DataArray]:
        """Return the step's label, and (inference, layer, unit), nothing of which is read."""
        at: dict[str, int] = {}
        for dimension, names, name in (
            (f"{self._stream}_group", self.groups, group),
            ("reduction", self.reductions, reduction),
        ):
            if name not in names:
                raise SelectionError(f"{dimension} {name!r} was not recorded: the episode holds {names}")
            at[dimension] = names.index(name)
        step = None
        if self._per_step:
            is_place = denoise_step < 0 and -denoise_step <= len(self.steps)
            step = self.steps[denoise_step] if is_place else denoise_step
            if step not in self.steps:
                raise SelectionError(f"denoise_step {step} was not recorded: the episode holds {self.steps}")
            at["denoise_step"] = self.steps.index(step)
        return step, self._array.isel(at)


def _name(stream: str) -> str:
    return f"{stream}_neurons"


def _set(
    kind: str, name: str, units: Mapping[str, Sequence[Unit]], streams: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a set as JSON has it, as far as it was recorded."""
    kept = {}
    for stream, of_stream in units.items():
        there = streams.get(stream)
        known = [
            [layer, unit]
            for layer, unit in of_stream
            if there is not None and layer in there["layers"] and unit < there["n_units"]
        ]
        if known:
            kept[stream] = known[:MOST_UNITS]
    n_left_out = sum(map(len, units.values())) - sum(map(len, kept.values()))
    return {"kind": kind, "name": name, "units": kept, "n_left_out": n_left_out}
