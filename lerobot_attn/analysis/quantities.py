"""What an episode is like at each inference: the arm's height, the phase, a table's column; and labels of it.

    values = quantity(dataset, "eef_z")               # (inference,) m
    label(Rule.parse("eef_z>median"), [values, …])    # per episode (inference,) 1, 0 or NaN

Knows neither neurons nor statistics, and reads no file: a table is given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis import behaviour
from lerobot_attn.analysis.labels import said_of
from lerobot_attn.analysis.phases import task_phases
from lerobot_attn.analysis.sources import condition_of, path_of, success_of
from lerobot_attn.errors import SelectionError

_SIGNS = re.compile(r"^(?P<name>.+?)\s*(?:(?P<sign>>=|<=|!=|==|=|>|<)\s*(?P<value>.+))?$")
_OVER = re.compile(r"^(?P<over>mean|max|min)\((?P<name>.+)\)$")
_WORDS = ("time", "phase", "success", "condition", "task", "reward")
_OF_EPISODES = {
    "lift_height": behaviour.lift_height,
    "lift_height_max": behaviour.lift_height_max,
    "mean_speed": behaviour.mean_speed,
    "path_length": behaviour.path_length,
}
_NUMBERS_OF = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
_XYZ = ("x", "y", "z")

_Any = NDArray[Any]


@dataclass(frozen=True)
class Rule:
    """What makes an inference belong to the first of two groups.

    Attributes:
        text: as it was written.
        name: the quantity's.
        sign: "=", "!=", ">", ">=", "<", "<="; "" alone: the quantity is 1.
        value: what it is compared with: a number, a word, "median" (of all inferences of all episodes; of all
            episodes, where each has one value), "task_median" (of those of the episode's task) or
            "episode_median" (of the episode's own).
    """

    text: str
    name: str
    sign: str = ""
    value: str = ""

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read a rule such as "success", "phase=carry", "eef_z>median" or "mean(eef_z)>0.9".

        Raises:
            SelectionError: it is none.
        """
        found = _SIGNS.match(text.strip())
        if found is None or found["name"][-1] in "=<>!":
            raise SelectionError(
                f"label {text!r}: expected a quantity and what it is compared with, as phase=carry, "
                "eef_z>median or success"
            )
        sign = (found["sign"] or "").replace("==", "=")
        return cls(text.strip(), found["name"].strip(), sign, (found["value"] or "").strip())


class Labelled(NamedTuple):
    """What `label` returns.

    Attributes:
        labels: for each episode (inference,) float64: 1 where the rule holds, 0 where it does not, NaN where
            the quantity is not known.
        text: the rule, with the number that a median is.
    """

    labels: list[NDArray[np.float64]]
    text: str


def quantity(dataset: xr.Dataset, name: str, *, table: pd.DataFrame | None = None) -> _Any:
    """Return a quantity at each inference's frame.

    Args:
        dataset: an episode's.
        name: a dimension of the state (`eef_z`), `time` (0 at the episode's first frame, 1 at its last),
            `phase`, `reward`, `success` (of the episode, 0 or 1), `condition`, `task`, a metric of the
            episode (`lift_height`, `lift_height_max`, m; `mean_speed`, m/s; `path_length`, m),
            `position:INSTANCE.z` or `distance:INSTANCE` (m; from the hand; an instance's name or a role that
            one instance has), or a column of `table`. `mean(…)`, `max(…)` and `min(…)` of a number are the
            episode's, the same at each inference.
        table: with a column `episode` (the number of the episode, or the name of its store), perhaps
            `task_group`, `task_id`, `condition`, and `frame` where values change within an episode. If it is
            given, `name` is a column of it.

    Returns:
        (inference,) float64, or object with words in it; NaN or None where it is not known.

    Raises:
        SelectionError: the episode has no such quantity, or the table does not tell.
    """
    if found := _OVER.match(name):
        values = quantity(dataset, found["name"].strip(), table=table)
        if values.dtype == object:
            raise SelectionError(f"{name}: {found['name']} is no number; expected a number")
        known = values[np.isfinite(values)]
        one = float(getattr(np, found["over"])(known)) if len(known) else np.nan
        return np.full(len(values), one)
    asked = _frames(dataset)
    if table is not None:
        return _of_table(dataset, name, table, asked)
    if name.startswith(("position:", "distance:")):
        return _of_instance(dataset, name)
    if name == "time":
        return asked / max(1, dataset.sizes.get("frame", 0) - 1)
    if name == "phase":
        phases = task_phases(dataset)
        return np.array([phases.names[i] for i in phases.of_inferences(dataset)], dtype=object)
    if name == "success":
        success = success_of(dataset)
        return np.full(len(asked), np.nan if success is None else float(success))
    if name in ("condition", "task"):
        word = condition_of(dataset) if name == "condition" else str(said_of(dataset).get("task", ""))
        return np.array([word] * len(asked), dtype=object)
    if name in _OF_EPISODES:
        return np.full(len(asked), _OF_EPISODES[name](dataset))
    if name == "reward":
        if "reward" not in dataset:
            raise SelectionError("reward: the episode has none; expected an environment that gives one")
        return np.asarray(dataset["reward"].values, float)[asked]
    return _of_state(dataset, name, asked)


def label(rule: Rule, values: Sequence[_Any], tasks: Sequence[Hashable] | None = None) -> Labelled:
    """Return which inferences a rule holds of.

    Args:
        rule: what is asked.
        values: of each episode (inference,), as `quantity` returns them.
        tasks: of each episode, for "task_median"; None: all have one.

    Raises:
        SelectionError: a word that never occurs, or an order of words.
    """
    are_words = any(value.dtype == object for value in values)
    if not rule.sign:
        if are_words or not _is_binary(values):
            raise SelectionError(
                f"label {rule.text!r}: is not 0 or 1; expected a comparison, as {rule.name}>median"
                if not are_words
                else f"label {rule.text!r}: expected one of its values, as {rule.name}={_words(values)[0]}"
            )
        return Labelled([np.asarray(value, float) for value in values], rule.text)
    if are_words:
        return Labelled(_same_word(rule, values), rule.text)
    word = rule.value.lower()
    if word in ("episode_median", "task_median"):
        kinds = range(len(values)) if word == "episode_median" else tasks or [0] * len(values)
        of_kind = {
            kind: _median([v for v, own in zip(values, kinds, strict=True) if own == kind]) for kind in kinds
        }
        labels = [_compared(rule, v, of_kind[kind]) for v, kind in zip(values, kinds, strict=True)]
        return Labelled(labels, rule.text)
    text = rule.text
    if word == "median":
        level = _median(values)
        if np.isnan(level):
            raise SelectionError(f"label {rule.text!r}: {rule.name} is not known at any inference")
        text = f"{rule.name} {rule.sign} its median {level:.4g}"
    else:
        level = _NUMBERS_OF.get(word, _number(rule))
    return Labelled([_compared(rule, value, level) for value in values], text)


def _median(values: Sequence[_Any]) -> float:
    """Return the median over inferences, or over episodes where each has one value; NaN of nothing."""
    known = [own[np.isfinite(own)] for own in (np.asarray(value, float) for value in values)]
    if all(len(np.unique(own)) <= 1 for own in known):
        known = [own[:1] for own in known]  # a long episode counts no more than a short one
    together = np.concatenate(known) if known else np.zeros(0)
    return float(np.median(together)) if together.size else np.nan


def _number(rule: Rule) -> float:
    if rule.value.lower() in _NUMBERS_OF:
        return _NUMBERS_OF[rule.value.lower()]
    try:
        return float(rule.value)
    except ValueError:
        raise SelectionError(
            f"label {rule.text!r}: {rule.name} is a number and got {rule.value!r}; expected a number, "
            "median, task_median or episode_median"
        ) from None


def _compared(rule: Rule, values: _Any, level: float) -> NDArray[np.float64]:
    values = np.asarray(values, float)
    compare = {
        "=": np.equal,
        "!=": np.not_equal,
        ">": np.greater,
        ">=": np.greater_equal,
        "<": np.less,
        "<=": np.less_equal,
    }[rule.sign]
    known = np.isfinite(values) & np.isfinite(level)
    return np.where(known, compare(values, level), np.nan).astype(float)


def _same_word(rule: Rule, values: Sequence[_Any]) -> list[NDArray[np.float64]]:
    words = _words(values)
    if rule.sign not in ("=", "!="):
        raise SelectionError(f"label {rule.text!r}: {rule.name} is a word; expected {rule.name}={words[0]}")
    if rule.value not in words:
        raise SelectionError(
            f"label {rule.text!r}: no inference has {rule.name} {rule.value!r}; there are {', '.join(words)}"
        )
    wanted = 1.0 if rule.sign == "=" else 0.0
    return [
        np.array([np.nan if _is_unknown(v) else wanted if v == rule.value else 1 - wanted for v in value])
        for value in values
    ]


def _words(values: Sequence[_Any]) -> list[str]:
    words = dict.fromkeys(str(v) for value in values for v in value if not _is_unknown(v))
    return list(words) or ["none"]


def _is_unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_binary(values: Sequence[_Any]) -> bool:
    known = np.concatenate([np.asarray(value, float) for value in values]) if values else np.zeros(0)
    return bool(np.isin(known[np.isfinite(known)], (0, 1)).all())


def _frames(dataset: xr.Dataset) -> NDArray[np.intp]:
    """Return (inference,) the frame of each inference; of those after the last frame, the last."""
    last = max(0, dataset.sizes.get("frame", 0) - 1)
    return np.clip(dataset["inference_frame"].values, 0, last).astype(np.intp)


def _of_state(dataset: xr.Dataset, name: str, asked: NDArray[np.intp]) -> _Any:
    names = [str(n) for n in dataset["state_dim"].values] if "state_dim" in dataset.coords else []
    if "state" not in dataset or name not in names:
        held = ", ".join([*(names if "state" in dataset else []), *_WORDS, *_OF_EPISODES])
        raise SelectionError(
            f"quantity {name!r}: the episode has none of this name; it has {held}, position:INSTANCE.z, "
            "distance:INSTANCE, or a column of a table as FILE.csv:COLUMN"
        )
    return np.asarray(dataset["state"].values[asked, names.index(name)], float)


def _of_instance(dataset: xr.Dataset, name: str) -> _Any:
    what, _, who = name.partition(":")
    axis = ""
    if what == "position":
        who, _, axis = who.rpartition(".")
        if axis not in _XYZ or not who:
            raise SelectionError(f"quantity {name!r}: expected position:INSTANCE.x, .y or .z")
    if "instance_position" not in dataset:
        raise SelectionError(
            f"quantity {name!r}: the episode has no places of objects; record with "
            "--eval.attention.segmentation=true"
        )
    names = [str(n) for n in dataset["instance"].values]
    roles = [str(r) for r in dataset["instance_role"].values]
    found = [i for i, n in enumerate(names) if n == who] or [i for i, r in enumerate(roles) if r == who]
    if len(found) != 1:
        raise SelectionError(
            f"quantity {name!r}: {len(found)} instances are called {who!r}; there are {', '.join(names)}"
        )
    where = np.asarray(dataset["instance_position"].values, float)[:, found[0]]
    if what == "position":
        return np.asarray(where[:, _XYZ.index(axis)])
    return np.asarray(np.linalg.norm(where - behaviour.end_effector(dataset)[_frames(dataset)], axis=1))


def _of_table(dataset: xr.Dataset, name: str, table: pd.DataFrame, asked: NDArray[np.intp]) -> _Any:
    if lacking := [column for column in ("episode", name) if column not in table]:
        raise SelectionError(
            f"table: has the columns {', '.join(map(str, table.columns))}; expected episode and {name} "
            f"({lacking[0]} is missing)"
        )
    rows = table[_are_of(dataset, table)]
    is_number = pd.api.types.is_numeric_dtype(table[name]) or pd.api.types.is_bool_dtype(table[name])
    column = rows[name].astype(float) if is_number else rows[name].astype(object)
    unknown: Any = np.nan if is_number else None
    keys = ["frame"] if "frame" in table else []
    if len(rows) > 1 and (not keys or rows["frame"].duplicated().any()):
        raise SelectionError(
            f"table: {len(rows)} rows are of {path_of(dataset) or 'an episode'}; expected one, or one a "
            f"frame, "
            "told apart by task_group, task_id, condition and frame"
        )
    if keys:
        held: Mapping[Any, Any] = dict(zip(rows["frame"].tolist(), column.tolist(), strict=True))
        values = [held.get(frame, unknown) for frame in asked.tolist()]
    else:
        values = [column.iloc[0] if len(rows) else unknown] * len(asked)
    return np.array(values, dtype=float if is_number else object)


def _are_of(dataset: xr.Dataset, table: pd.DataFrame) -> NDArray[np.bool_]:
    """Return which rows of a table are an episode's."""
    said = said_of(dataset)
    path = PurePath(path_of(dataset))
    own = {str(said.get("episode_index")), path.name, path.stem, str(path)}
    mine = np.asarray(table["episode"].astype(str).isin(own), bool)
    others = {"task_group": said.get("task_group"), "task_id": said.get("task_id")}
    others["condition"] = condition_of(dataset)
    for column, value in others.items():
        if column in table:
            mine &= (table[column].astype(str) == str(value)).to_numpy()
    return mine
