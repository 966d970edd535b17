"""The episodes of a run with what is known of their inferences: what a contrast or a probe is about.

Opens stores and tables; knows no statistics.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lerobot_attn.analysis.quantities import Rule, label, quantity
from lerobot_attn.errors import RANDOM_WEIGHTS, ConfigError, SelectionError
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.runs import Run

_OF_TABLE = re.compile(r"^(?P<over>(?:mean|max|min)\()?(?P<file>.+\.csv):(?P<column>[^)]+)\)?$")


class Readable(NamedTuple):
    """The complete episodes of a run.

    Attributes:
        episodes: in the order of their paths.
        notes: what was left out, one line each.
        remarks: what is to be said of the policy beside its numbers.
    """

    episodes: list[Episode]
    notes: tuple[str, ...]
    remarks: tuple[str, ...]


def readable(run: Run) -> Readable:
    """Return the complete episodes of a run.

    Raises:
        SelectionError: there is none.
    """
    every = list(run)
    complete = [episode for episode in every if episode.is_complete]
    if not complete:
        raise SelectionError(f"{run.path}: none of {len(run)} episodes is complete; expected some")
    notes = [f"left out: {reason}" for _, reason in run.damaged]
    if n := len(every) - len(complete):
        notes.append(f"left out: {n} incomplete episode{'s' * (n > 1)}")
    remarks = [RANDOM_WEIGHTS if e.has_random_weights else e.policy_remark for e in complete]
    return Readable(complete, tuple(notes), tuple(dict.fromkeys(filter(None, remarks))))


def values_of(name: str, episodes: Sequence[Episode]) -> list[NDArray[Any]]:
    """Return a quantity of every episode, (inference,) each; see `analysis.quantities.quantity`.

    Args:
        name: of the quantity, or FILE.csv:COLUMN.
        episodes: to ask.

    Raises:
        SelectionError: an episode has none, or no episode is in the table.
        ConfigError: the table cannot be read.
    """
    table, found = None, _OF_TABLE.match(name)
    if found is not None:
        table = _table(found["file"])
        name = f"{found['over']}{found['column']})" if found["over"] else found["column"]
    values = [quantity(episode.arrays, name, table=table) for episode in episodes]
    if found is not None and not any(_is_known(own).any() for own in values):
        raise SelectionError(
            f"{found['file']}: tells nothing of these episodes; expected rows of some of them"
        )
    return values


class Named(NamedTuple):
    """Labels of every episode and what they mean.

    Attributes:
        labels: (inference,) of each episode; 1, 0, or NaN.
        text: what 1 means.
    """

    labels: list[NDArray[np.float64]]
    text: str


def labels_of(text: str, episodes: Sequence[Episode]) -> Named:
    """Return where a rule holds, such as phase=carry or eef_z>median.

    Raises:
        SelectionError: the rule is none, or the episodes do not know.
        ConfigError: its table cannot be read.
    """
    rule = Rule.parse(text)
    return Named(*label(rule, values_of(rule.name, episodes), tasks_of(episodes)))


def tasks_of(episodes: Sequence[Episode]) -> list[Hashable]:
    """Return what tells tasks apart, of each episode."""
    return [(e.attributes.get("task_group"), e.attributes.get("task_id"), e.task) for e in episodes]


def narrowed(labels: Named, during: str | None, episodes: Sequence[Episode]) -> Named:
    """Return labels that are NaN where another rule does not hold.

    Raises:
        SelectionError: as `labels_of`.
    """
    if during is None:
        return labels
    inside = labels_of(during, episodes)
    kept = [
        np.where(there == 1, own, np.nan) for own, there in zip(labels.labels, inside.labels, strict=True)
    ]
    return Named(kept, labels.text)


def make_folder(folder: str | Path, write: Callable[[Path], list[Path]]) -> list[Path]:
    """Make a folder and write into it; return the files.

    Raises:
        ConfigError: it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write the report: {error.strerror or error}") from error


def _table(file: str) -> pd.DataFrame:
    try:
        return pd.read_csv(file)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{file}: cannot read the table ({reason}); expected a CSV file") from error


def _is_known(values: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(~pd.isna(values), bool)
