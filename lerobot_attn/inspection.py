"""What a store or a run holds, as plain values and as text for a terminal.

Reads metadata, and of the maps only what three inferences need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lerobot_attn.analysis.activations import activation_lines
from lerobot_attn.analysis.decoded import decodes, is_read
from lerobot_attn.analysis.labels import denoises, ranges
from lerobot_attn.analysis.reduce import row_sum
from lerobot_attn.analysis.select import (
    MEANS,
    QueryChoice,
    action_queries,
    attention,
    executed_actions,
    prefix_only_layers,
)
from lerobot_attn.analysis.tokens import by_modality
from lerobot_attn.errors import RANDOM_WEIGHTS, SelectionError, StoreError, first_line
from lerobot_attn.sizes import Progress, format_bytes
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.runs import Run
from lerobot_attn.store.schema import ARRAYS, BY_NAME, DIMENSIONS


def sampled_inferences(n_inferences: int) -> list[int]:
    """Return the inferences that are read: the first, the middle and the last."""
    return sorted({0, n_inferences // 2, n_inferences - 1}) if n_inferences else []


class SegmentMass(NamedTuple):
    """Where the attention of one inference goes, and whether its rows are there and sum to 1.

    Attributes:
        shares: modality (camera, task, …) → share of attention, averaged over denoise steps, layers, heads
            and executed action tokens; what is missing does not count.
        deviation: largest deviation of a row's sum from 1; NaN where every row is missing.
        missing: share of the rows that are missing (NaN), 0 to 1.
    """

    shares: dict[str, float]
    deviation: float
    missing: float


def segment_mass(episode: Episode, inference: int) -> SegmentMass:
    """Return where the attention of one inference goes, and how far its rows are from summing to 1.

    Args:
        episode: the store.
        inference: its index.

    Raises:
        StoreError: the episode holds no suffix attention, or a chunk is damaged.
    """
    dataset = episode.arrays
    query: QueryChoice = "executed" if MEANS in dataset else "all"
    try:
        maps = attention(
            dataset, inference=inference, layer="all", denoise_step="all", head="all", query=query
        ).load()
        if "query" in maps.dims:
            maps = maps.isel(query=is_read(dataset, inference)[action_queries(dataset)])
        sums = row_sum(maps).values
        known = sums[np.isfinite(sums)]
        deviation = float(np.abs(known - 1).max()) if known.size else math.nan
        # `maps` counts action tokens, from 0 also where a state token opens the suffix.
        over = ["denoise_step", "layer", "head", *(["query"] if "query" in maps.dims else [])]
        is_all = "query" not in maps.dims or decodes(dataset)
        executed = maps if is_all else maps.isel(query=executed_actions(dataset))
        # Each key is averaged over the rows that have it: neither a missing map nor a key that a layer cannot
        # see counts.
        shares = by_modality(dataset, executed.mean(over))
    except SelectionError as error:
        raise StoreError(f"{episode.path}: {first_line(error)}") from error
    except Exception as error:  # a damaged chunk raises whatever its codec raises
        raise StoreError(
            f"{episode.path}: the attention of inference {inference} cannot be read: {first_line(error)}"
        ) from error
    by_name = {str(share["modality"].item()): float(share) for share in shares}
    return SegmentMass(by_name, deviation, 1 - known.size / max(1, sums.size))


def describe_episode(episode: Episode) -> dict[str, Any]:
    """Return everything that `inspect` shows of an episode, as plain JSON values.

    Raises:
        StoreError: the store is damaged.
    """
    inferences = sampled_inferences(episode.n_inferences)
    looked_at, masses, deviations, missing = [], [], [], []
    has_maps = any(episode.array_shape(name) for name in ("suffix_attention", "suffix_attention_mean"))
    for inference in inferences if has_maps else []:
        if decodes(episode.arrays) and not is_read(episode.arrays, inference).any():
            continue  # it decoded nothing that attends: nothing is missing
        found = segment_mass(episode, inference)
        missing.append(found.missing)
        if found.missing < 1:
            looked_at.append(inference)
            masses.append(found.shares)
            deviations.append(found.deviation)
    mean_mass = {
        name: float(np.mean([mass.get(name, 0.0) for mass in masses]))
        for name in (masses[0] if masses else {})
    }
    deviation_of_all = max(deviations, default=None)
    stored, raw, coordinates = episode.stored_bytes(), episode.raw_bytes(), {}
    tolerance = episode.row_sum_tolerance() if episode.n_inferences else None
    for name in ("layer", "all_layer", "prefix_layer", "vision_layer", "denoise_step", "head"):
        is_told = name != "denoise_step" or denoises(episode.arrays)  # of one pass it is a stand-in
        if episode.array_shape(name) is not None and is_told:
            coordinates[name] = _labels(episode, name)
    attributes = {k: v for k, v in episode.attributes.items() if k not in ("layout", "coordinates")}
    return {
        "path": str(episode.path),
        "task": episode.task,
        "condition": episode.condition.text,
        "success": episode.success,
        "complete": episode.is_complete,
        "random_weights": episode.has_random_weights,
        "policy_remark": episode.policy_remark,
        "n_frames": episode.n_frames,
        "n_inferences": episode.n_inferences,
        "arrays": {
            spec.name: {
                "dims": list(spec.dims),
                "shape": list(shape),
                "dtype": spec.dtype,
                "description": spec.description,
            }
            for spec in ARRAYS
            if (shape := episode.array_shape(spec.name)) is not None
        },
        "saved": coordinates,
        "masks": episode.masked,
        "activations": activation_lines(episode.arrays, inferences),
        "segments": [
            {"kind": s.kind, "name": s.name, "start": s.start, "stop": s.stop, "tokens": len(s)}
            for s in episode.layout.segments
        ]
        if episode.n_inferences
        else [],
        "stored_bytes": stored,
        "raw_bytes": raw,
        "compression_ratio": raw / stored if stored else None,
        "attention_mass": mean_mass,
        "attention_mass_inferences": looked_at,
        "row_sum_max_deviation": deviation_of_all,
        "row_sum_tolerance": tolerance,
        "rows_missing": float(np.mean(missing)) if missing else 0.0,
        "rows_sum_to_one": None
        if tolerance is None or not missing
        else not any(missing) and max(deviations) <= tolerance,
        "layers_without_suffix": prefix_only_layers(episode.arrays) if episode.n_inferences else [],
        "prompts_truncated": _n_truncated(episode),
        "videos": {camera: str(path) for camera, path in episode.videos.items()},
        "video_errors": _video_errors(episode),
        "eval_video": None if episode.eval_video is None else str(episode.eval_video),
        "attributes": attributes,
    }


def describe_run(run: Run, progress: Progress | None = None) -> dict[str, Any]:
    """Return everything that `inspect` shows of a run, as plain JSON values."""
    found = run.rows(progress)
    rows = [row.table for row in found]
    return {
        "path": str(run.path),
        "n_episodes": len(rows),
        "n_complete": sum(row.complete for row in rows),
        "n_success": sum(row.success is True for row in rows),
        "conditions": {row.table.condition: row.condition_text for row in found},
        "stored_bytes": sum(row.bytes for row in rows),
        "random_weights": any(row.random_weights for row in found),
        "policy_remark": "; ".join(dict.fromkeys(row.policy_remark for row in found if row.policy_remark)),
        # JSON has no NaN, which an attribute may be.
        "episodes": [{k: None if v != v else v for k, v in row._asdict().items()} for row in rows],
        "damaged": [{"path": str(path), "error": error} for path, error in run.damaged],
    }


def render_episode(facts: dict[str, Any]) -> RenderableType:
    """Lay out what `describe_episode` returned for a terminal."""
    attributes = facts["attributes"]
    head = Table.grid(padding=(0, 2))
    for label, value in (
        ("episode", facts["path"]),
        ("task", facts["task"]),
        *([("condition", facts["condition"])] if facts["condition"] else []),
        ("outcome", _outcome(facts)),
        ("policy", _policy(attributes)),
        *_robot(attributes),
        ("seed", str(attributes.get("seed"))),
        *_replayed(attributes),
        ("frames", f"{facts['n_frames']}, from {facts['n_inferences']} inferences"),
        ("saved", "; ".join(f"{name} {ranges(values)}" for name, values in facts["saved"].items())),
        *([("masks", facts["masks"]["text"])] if facts["masks"] else []),
        *facts["activations"].items(),
        (
            "on disk",
            f"{format_bytes(facts['stored_bytes'])}, maps compressed {facts['compression_ratio'] or 0:.1f}x",
        ),
        ("videos", "\n".join(_videos(facts))),
    ):
        head.add_row(Text(label, style="bold"), _plain(value))
    parts: list[RenderableType] = [head]
    arrays = _table("array", "dimensions", "shape", "what it holds")
    used = []
    for name, array in facts["arrays"].items():
        if BY_NAME[name].coordinate:
            continue
        arrays.add_row(
            name, ", ".join(array["dims"]), " x ".join(map(str, array["shape"])), array["description"]
        )
        used += [dim for dim in array["dims"] if dim not in used]
    dims = _table("dimension", "what it is")
    for dim in used:
        dims.add_row(dim, escape(DIMENSIONS[dim]))
    segments = _table("segment", "kind", "keys", "tokens")
    for one in facts["segments"]:
        span, n_tokens = f"{one['start']} to {one['stop'] - 1}", str(one["tokens"])
        segments.add_row(_plain(one["name"]), _plain(one["kind"]), span, n_tokens)
    parts += [_title("arrays"), arrays, _title("dimensions"), dims, _title("token segments"), segments]
    if facts["attention_mass"]:
        sampled = ", ".join(map(str, facts["attention_mass_inferences"]))
        mass = _table("segment", "share", "")
        for name, share in facts["attention_mass"].items():
            bar = round(min(max(share, 0.0), 1.0) * 40) if math.isfinite(share) else 0
            mass.add_row(_plain(name), f"{share:6.1%}", _Bar(bar))
        title = "mean attention of the executed actions, over all saved layers, heads and denoise steps"
        if facts["attributes"].get("policy", {}).get("n_decode_steps"):
            title = "mean attention of the decoded tokens, over all saved layers and heads"
        parts += [_title(f"{title} of inferences {sampled}"), mass]
    parts += [Text(line, style="yellow") for line in _remarks(facts)]
    parts.append(_sanity(facts))
    if facts["random_weights"]:
        parts.append(Text(RANDOM_WEIGHTS, style="yellow"))
    if facts["policy_remark"]:
        parts.append(Text(_printable(facts["policy_remark"]), style="dim"))
    return Group(*parts)


def render_run(facts: dict[str, Any]) -> RenderableType:
    """Lay out what `describe_run` returned for a terminal."""
    head = Text(
        f"{facts['path']}: {facts['n_episodes']} episodes, {facts['n_complete']} complete, "
        f"{facts['n_success']} successful, {format_bytes(facts['stored_bytes'])}"
    )
    parts: list[RenderableType] = [head]
    tasks: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in facts["episodes"]:
        done = facts["conditions"][row["condition"]]
        tasks.setdefault((f"{row['task_group']}_{row['task_id']}", row["task"], done), []).append(row)
    for (name, instruction, done), rows in tasks.items():
        table = _table("episode", "outcome", "frames", "inferences", "size", "complete")
        for row in rows:
            table.add_row(
                _plain(str(row["episode"])),
                {True: "success", False: "failure"}.get(row["success"], "-"),
                str(row["frames"]),
                str(row["inferences"]),
                format_bytes(row["bytes"]),
                "yes" if row["complete"] else "[red]no[/red]",
            )
        parts += [_title(f"{name}: {instruction}{f'; condition: {done}' if done else ''}"), table]
    parts += [Text(f"damaged: {_printable(entry['error'])}", style="red") for entry in facts["damaged"]]
    if facts["random_weights"]:
        parts.append(Text(RANDOM_WEIGHTS, style="yellow"))
    if facts["policy_remark"]:
        parts.append(Text(_printable(facts["policy_remark"]), style="dim"))
    return Group(*parts)


_FIRST = {"dropped_inferences": "asked at frame {}", "policy_errors": "{}"}


class _Bar:
    """A bar of so many characters; of "#" where the terminal is not UTF-8."""

    def __init__(self, length: int):
        self._length = length

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(("#" if options.ascii_only else "█") * self._length)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self._length, self._length)


def _n_truncated(episode: Episode) -> int | None:
    """Return how many inferences had a prompt that was cut; None where the store does not say."""
    is_said = episode.array_shape("prompt_truncated") is not None
    return int(episode.arrays["prompt_truncated"].values.sum()) if is_said else None


def _video_errors(episode: Episode) -> dict[str, str]:
    errors = episode.attributes.get("video_errors")
    return {str(name): str(why) for name, why in errors.items()} if isinstance(errors, dict) else {}


def _videos(facts: dict[str, Any]) -> Iterator[str]:
    yield from facts["videos"].values()
    yield facts["eval_video"] or "no evaluation video"
    for camera, reason in facts["video_errors"].items():
        yield f"{camera}: could not be written ({reason})"


def _robot(attributes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Say which robot the policy moved, and which episode of which data set that is."""
    if attributes.get("robot_type"):
        yield (
            "robot",
            f"{attributes['robot_type']}, strategy {attributes.get('strategy')}, "
            f"inference {attributes.get('inference')}",
        )
    dataset = attributes.get("dataset")
    if isinstance(dataset, Mapping):
        yield "data set", f"{dataset.get('repo_id')}, episode {attributes.get('episode_index')}"


def _remarks(facts: dict[str, Any]) -> Iterator[str]:
    """Say what a reader of the numbers must know."""
    if facts["prompts_truncated"]:
        yield (
            f"prompt truncated in {facts['prompts_truncated']} of {facts['n_inferences']} inferences: it did "
            "not fit the policy's slots, so its end, the state among it, was never read"
        )
    if facts["layers_without_suffix"]:
        yield (
            f"layers {ranges(facts['layers_without_suffix'])} cannot see the suffix: shares of actions are "
            "those of the other layers"
        )
    attributes = facts["attributes"]
    for name, what in (
        ("dropped_inferences", "inferences are missing, because the writer could not keep up"),
        ("policy_errors", "times the policy raised"),
    ):
        found = attributes.get(name)
        if isinstance(found, list) and found:
            yield f"{len(found)} {what}; the first: {_FIRST[name].format(found[0])}"
    checks = attributes.get("input_checks")
    for check in checks if isinstance(checks, list) else []:
        if isinstance(check, Mapping):
            remedy = f"; remedy: {check['remedy']}" if check.get("remedy") else ""
            yield _printable(
                f"input, {check.get('name')} {check.get('status')}: {check.get('detail')}{remedy}"
            )
    if attributes.get("n_repeated_pictures"):
        yield f"{attributes['n_repeated_pictures']} frames show the pictures of the frame before"


def _labels(episode: Episode, name: str) -> list[int]:
    try:
        return [int(label) for label in episode.dataset[name].values]
    except StoreError:
        raise
    except Exception as error:  # a damaged chunk raises whatever its codec raises
        raise StoreError(f"{episode.path}: {name} cannot be read: {first_line(error)}") from error


def _plain(text: str) -> Text:
    """Return text without the markup and the terminal's control sequences that a store may bring."""
    return Text(_printable(text))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _title(text: str) -> Text:
    return Text(f"\n{_printable(text)}", style="bold")


def _outcome(facts: dict[str, Any]) -> str:
    outcome = {True: "success", False: "failure"}.get(facts["success"], "unknown")
    if facts["complete"]:
        return f"{outcome}, complete"
    said, unsaid = facts["attributes"], "the recording did not come to its end"
    cause = said.get("error") or said.get("interrupted_by") or unsaid
    return f"INCOMPLETE ({cause}): it holds the {facts['n_inferences']} inferences committed before"


def _policy(attributes: dict[str, Any]) -> str:
    policy = attributes.get("policy", {})
    path = f" from {policy['path']}" if policy.get("path") else ""
    # SmolVLA's config names no dtype: what its attention was applied in is known all the same.
    dtype = policy.get("dtype") or f"attention in {attributes.get('attention_dtype', 'an unknown dtype')}"
    steps = f"{policy.get('n_denoise_steps') or 'no'} denoise steps"
    if policy.get("n_decode_steps"):
        steps = f"up to {policy['n_decode_steps']} decode steps"
    return (
        f"{policy.get('type')}{path}, {dtype}, {policy.get('n_layers')} layers, "
        f"{policy.get('n_heads')} heads, {steps}, {policy.get('n_action_steps')} of "
        f"{policy.get('chunk_size')} actions executed"
    )


def _replayed(attributes: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Say of a replay what it saw, and what it was not given."""
    replay = attributes.get("replay")
    if not isinstance(replay, dict):
        return
    videos = replay.get("videos")
    source = "" if not isinstance(videos, dict) else f"of {', '.join(map(str, videos.values()))}, "
    yield (
        "replay",
        f"{source}asked every {replay.get('every')} frames; the actions are the recorded ones, which the "
        "policy did not choose",
    )
    not_given = replay.get("not_given")
    if isinstance(not_given, list) and not_given:
        yield "not given", "; ".join(map(str, not_given))


def _sanity(facts: dict[str, Any]) -> Text:
    if facts["rows_sum_to_one"] is None:
        return Text("sanity: no suffix attention to check")
    deviation, tolerance = facts["row_sum_max_deviation"], facts["row_sum_tolerance"]
    parts = [f"{facts['rows_missing']:.1%} OF THE ROWS ARE MISSING"] if facts["rows_missing"] else []
    if deviation is not None:
        verdict = "rows sum to 1" if deviation <= tolerance else "ROWS DO NOT SUM TO 1"
        parts.append(f"{'the other ' if parts else ''}{verdict}; largest deviation {deviation:.1e}")
        parts.append(f"allowed by the stored precision {tolerance:.1e}")
    return Text(f"sanity: {', '.join(parts)}", style="green" if facts["rows_sum_to_one"] else "bold red")
