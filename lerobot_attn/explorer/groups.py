"""The episodes that solved their task against those that did not, as plain JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lerobot_attn.analysis.compare import compare_overall, split_by_success
from lerobot_attn.analysis.runs import summarise_run
from lerobot_attn.errors import StoreError
from lerobot_attn.explorer.values import number
from lerobot_attn.layout import short_names
from lerobot_attn.store.reader import Episode

_COLUMNS = {"failure": "a", "success": "b", "difference": "difference", "low": "low", "high": "high"}


def groups(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Compare the episodes that solved their task with those that did not.

    What was done to the policy would be taken for what makes episodes fail: of several conditions only one
    is compared, the baseline where there is one.

    Args:
        episodes: of the run; incomplete ones are left out.

    Returns:
        `n_success`, `n_failure`; `what`, how the numbers came about; `left_out`, which episodes cannot be
        read and why, a line each; `rows`, for each modality the mean share over the episodes of either group,
        their difference, and its interval, None where there is none.

    Raises:
        SelectionError: one group would be empty.
    """
    whole, said = _of_one_condition([episode for episode in episodes if episode.is_complete])
    found = _readable(whole)
    return {**found, "what": f"{found['what']}{said}"}


def _of_one_condition(episodes: Sequence[Episode]) -> tuple[list[Episode], str]:
    """Return the episodes to compare, and a sentence where others are left out."""
    conditions = dict.fromkeys(episode.condition.text for episode in episodes)
    if len(conditions) < 2:
        return [*episodes], ""
    names = {episode.condition.text: episode.condition.name for episode in episodes}
    chosen = next((text for text in conditions if names[text] == "baseline"), next(iter(conditions)))
    kept = [episode for episode in episodes if episode.condition.text == chosen]
    return kept, f" Of {len(conditions)} conditions only this one: {names[chosen]}."


def _readable(whole: Sequence[Episode]) -> dict[str, Any]:
    """Compare the episodes that can be read, and name the others."""
    try:
        return _compared(whole)
    except StoreError:
        # A comparison refuses damaged stores without saying which there are; each by itself tells.
        failed = {
            found.path: found.error
            for found in summarise_run(whole, "modality_share", by="frame", query="executed").failed
        }
        if not failed:
            raise
        names = {path: "/".join(Path(path).parts[-2:]) for path in failed}
        readable = [episode for episode in whole if str(episode.path) not in failed]
        return {
            **_compared(readable),
            "left_out": [f"{names[path]}: {error}" for path, error in failed.items()],
        }


def _compared(episodes: Sequence[Episode]) -> dict[str, Any]:
    split = split_by_success(episodes)
    table = compare_overall(split.failures, split.successes, query="executed")
    labels = short_names(camera.name for episode in episodes for camera in episode.layout.cameras)
    rows = [
        {"label": labels.get(str(row["name"]), str(row["name"]))}
        | {name: number(row[column]) for name, column in _COLUMNS.items()}
        for row in table.to_dict("records")
        if row["name"] != "padding"
    ]
    return {
        "n_success": len(split.successes),
        "n_failure": len(split.failures),
        "what": f"Last layer and denoise step, mean of heads. Intervals: {table.attrs['interval']}.",
        "left_out": [],
        "rows": rows,
    }
