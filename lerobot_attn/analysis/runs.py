"""Summaries of whole runs: measures of every inference or frame of thousands of episodes, as tidy tables.

    from lerobot_attn import open_run
    from lerobot_attn.analysis.runs import summarise_run

    summary = summarise_run(open_run("out"), ("modality_share", "stability"), layer="all")
    summary.table    # one row per value, with the episode that it is of
    summary.failed   # episodes that could not be read, and why

A worker holds no more than the maps of one inference are in the store. Knows no file format: an episode opens
itself when its turn comes, and is let go after it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np
import pandas as pd
import xarray as xr
from pandas.api.types import union_categoricals

from lerobot_attn.analysis.catalogue import MEASURES, AnyMeasure, Measure, find_measure
from lerobot_attn.analysis.cluster import Scheduler
from lerobot_attn.analysis.columns import TEXTS, label_columns, ordered_columns
from lerobot_attn.analysis.select import MEANS, RAW, Where, attention, default_query
from lerobot_attn.analysis.sources import (
    Source,
    attributes_of,
    condition_of,
    map_episodes,
    path_of,
    sources_of,
    success_of,
)
from lerobot_attn.errors import SelectionError
from lerobot_attn.sizes import Progress

By = Literal["inference", "frame"]
Rows = Literal["inference", "frame", "episode"]

_MAPS = (RAW, MEANS, "prefix_attention", "vision_attention", "segmentation")
_TABLE_BYTES = 100_000  # of an inference: what is larger is read where it is asked for
_BLOCK_BYTES = 8_000_000  # where the maps of an inference are smaller: blocks of a few would be slow
_MOST_INFERENCES = 16  # of a block: its tables of tokens grow with it, too


class FailedEpisode(NamedTuple):
    """An episode that could not be summarised."""

    path: str
    error: str


class RunSummary(NamedTuple):
    """What `summarise_run` returns."""

    table: pd.DataFrame
    failed: tuple[FailedEpisode, ...]


def summarise(
    dataset: xr.Dataset,
    measures: AnyMeasure | Sequence[AnyMeasure] = tuple(MEASURES),
    *,
    by: Rows = "inference",
    **where: Unpack[Where],
) -> pd.DataFrame:
    """Measure every inference, or every frame, of an episode, or the mean of its inferences.

    No more is held at a time than the maps of one inference are in the store. By inference the stored means
    over the executed actions are used unless `where` says otherwise; by frame the map of the very action,
    where it was stored.

    Args:
        dataset: an episode's; `episode.arrays` is quicker here than the Dask one.
        measures: names from `MEASURES`, `Measure`s or functions:
            "modality_share", the share of attention on each camera, words, state, …;
            "token_attention", the share on each word, state number and piece of template;
            "entropy", its entropy (bit) and effective number of patches within each image;
            "stability", the overlap (0 to 1) with the previous inference, or frame, within each image; NaN at
            the first.
        by: "inference", "frame", or "episode", the mean over all inferences: those without a value, such as
            the first one's stability, do not count, and a word that a prompt lacks got no attention then.
        where: what to look at, see `Where`; neither its frame nor its inference.

    Returns:
        One row per value. Columns: `inference` or `frame`; `phase`, 0 at the episode's first frame and 1 at
        its last (neither of them by episode); `flow_time`, `denoise_step`, `layer`, `head`, `query` where
        they are not averaged over; any other dimension of a function's result; `measure`; `quantity`, what
        the value is; `kind` and `name`, what it is of: modality, camera, or task, state and template for
        tokens (the second "the" of a task is "the (2)"); `value`.

    Raises:
        SelectionError: unknown measure or `by`, nothing recorded, or a label that the episode does not hold.
    """
    chosen = _measures(measures)
    _check(by, where)
    return _summarised(dataset, chosen, by, where).astype(dict.fromkeys(TEXTS, object))


def summarise_run(
    episodes: Iterable[Source],
    measures: AnyMeasure | Sequence[AnyMeasure] = tuple(MEASURES),
    *,
    by: Rows = "inference",
    scheduler: Scheduler = None,
    workers: int | None = None,
    progress: Progress | None = None,
    **where: Unpack[Where],
) -> RunSummary:
    """Measure every inference, every frame, or the means, of every episode, in parallel by Dask.

    An episode is opened when its turn comes and let go after it; see `summarise` for what a worker holds. On
    a cluster each worker opens its episodes itself, so it must see their paths; the table is the same
    whatever computes it. Incomplete episodes are included and marked so.

    Args:
        episodes: of `open_run`, or datasets, whose attributes name them.
        measures: as for `summarise`.
        by: "inference", "frame" or "episode", as for `summarise`.
        scheduler: Dask's: "threads" (the default), "processes" or "synchronous"; or a cluster, by its
            distributed scheduler's address, "tcp://HOST:PORT", or a client of it.
        workers: start so many processes on this machine instead, as `local_workers` does, for this call.
        progress: called as `progress(done, total)` as episodes are done, from this thread.
        where: what to look at, see `Where`; neither its frame nor its inference.

    Returns:
        The table of `summarise` after columns task_group, task_id, episode, task, condition (its name),
        success (None where an episode was interrupted), complete and path. Texts are categories, which keeps
        millions of rows small: group by them with `observed=True`. Beside it, the episodes that could not be
        read and why.

    Raises:
        SelectionError: unknown measure, `by` or scheduler, no episodes, or not one could be summarised.
        ConfigError: a scheduler and workers, or no workers.
        SetupError: `distributed` is missing (extra `cluster`), no scheduler answers at the address, or its
            workers do not see the episodes, or have another version of this package.
    """
    chosen = _measures(measures)
    _check(by, where)
    sources = sources_of(episodes, "episodes")
    # With texts as categories, which are small to send and to keep.
    function = functools.partial(_summarised, measures=chosen, by=by, where=where)
    results = map_episodes(function, sources, scheduler=scheduler, workers=workers, progress=progress)
    done = [(s, r) for s, r in zip(sources, results, strict=True) if isinstance(r, pd.DataFrame)]
    failed = tuple(
        FailedEpisode(path_of(source), f"{type(result).__name__}: {result}")
        for source, result in zip(sources, results, strict=True)
        if isinstance(result, Exception)
    )
    if not done:
        raise SelectionError(
            f"none of {len(sources)} episodes could be summarised; {failed[0].path}: {failed[0].error}"
        )
    return RunSummary(_run_table([s for s, _ in done], [t for _, t in done]), failed)


class Measured(NamedTuple):
    """A measure of some inferences or frames of an episode, computed."""

    measure: Measure
    values: xr.DataArray


def measured(
    dataset: xr.Dataset, measures: Sequence[Measure], by: By, where: Mapping[str, Any]
) -> Iterator[Measured]:
    """Yield measures of one block of inferences after another.

    A block is as many inferences as can be looked at in the bytes that the maps of one inference have in the
    store, or in 8 MB if that is more, and one at least: a long episode needs the memory of a short one. Its
    maps are read once for all measures of attention, and once for each other measure. For measures of
    attention alone, what is looked at is what `attention` returns, which reads one inference after another.

    Args:
        dataset: an episode's.
        measures: what to measure.
        by: what the values' first dimension is, labelled by the episode's own numbers.
        where: what to look at, neither frame nor inference.

    Raises:
        SelectionError: nothing recorded, or a function returned something else than expected.
    """
    n_inferences, n_frames = dataset.sizes.get("inference", 0), dataset.sizes.get("frame", 0)
    if not n_inferences or (by == "frame" and not n_frames):
        raise SelectionError(
            f"the episode holds {n_inferences} inferences and {n_frames} frames: nothing to measure"
        )
    maps = [
        name
        for name, array in dataset.data_vars.items()
        if name in _MAPS or array.nbytes > _TABLE_BYTES * n_inferences
    ]
    # Tables of a few kilobytes an inference, whose chunks hold many: read once, not for each block.
    dataset = (
        dataset.drop_vars(maps)
        .compute(scheduler="synchronous")
        .assign({name: dataset.variables[name] for name in maps})
    )
    owners = dataset["frame_inference"].values
    if by == "frame" and where.get("query") is None and default_query(dataset, by_frame=True) != "frame":
        # Decided for the episode as a whole: a block's frames alone may all have a token.
        where = {**where, "query": default_query(dataset, by_frame=True)}
    n_before = max(measure.n_before for measure in measures)
    length = _block_length(dataset, measures, by, where)
    for start in range(0, n_inferences, length):
        first, stop = max(0, start - n_before), min(start + length, n_inferences)
        frames = np.flatnonzero((owners >= first) & (owners < stop))
        view = dataset.isel(inference=slice(first, stop), frame=frames)
        view = view.assign(frame_inference=("frame", owners[frames] - first))
        own = (
            np.flatnonzero(owners[frames] >= start)
            if by == "frame"
            else np.arange(start - first, stop - first)
        )
        if not len(own):
            continue
        labels = frames[own] if by == "frame" else own + first
        rows: list[int] = own.tolist()
        array = _attention_of_block(view, measures, by, rows, where)
        for measure in measures:
            if array is not None and measure.of_attention:
                values = _of_attention(measure, view, array, by, rows)
            else:
                choice: dict[str, Any] = {by: rows}
                values = measure.function(view, **choice, **where)
            if not isinstance(values, xr.DataArray) or values.sizes.get(by) != len(own):
                got = dict(values.sizes) if isinstance(values, xr.DataArray) else type(values).__name__
                raise SelectionError(
                    f"measure {measure.name!r} returned {got}, expected a DataArray, {by} of {len(own)}"
                )
            values = values.compute(scheduler="synchronous").transpose(by, ...)
            yield Measured(measure, values.assign_coords({by: labels}))


def _attention_of_block(
    view: xr.Dataset, measures: Sequence[Measure], by: By, rows: list[int], where: Mapping[str, Any]
) -> xr.DataArray | None:
    """Read what the measures of attention need of a block: its rows and those before; None if none does."""
    before = [min(measure.n_before, rows[0]) for measure in measures if measure.of_attention]
    if not before:
        return None
    choice: dict[str, Any] = {by: [*range(rows[0] - max(before), rows[0]), *rows]}
    return attention(view, **choice, **where).compute(scheduler="synchronous")


def _of_attention(
    measure: Measure, view: xr.Dataset, array: xr.DataArray, by: By, rows: list[int]
) -> xr.DataArray:
    """Measure the rows at the end of the array; those before are for measures that ask for them."""
    n_rows = len(rows) + min(measure.n_before, rows[0])
    values = measure.function(view, array.isel({by: slice(array.sizes[by] - n_rows, None)}))
    return values.reindex({by: rows}) if measure.n_before else values


def _measures(measures: AnyMeasure | Sequence[AnyMeasure]) -> tuple[Measure, ...]:
    if isinstance(measures, (str, Measure)) or not isinstance(measures, Iterable):
        return (find_measure(measures),)
    found = tuple(find_measure(measure) for measure in measures)
    if not found:
        raise SelectionError(f"got no measures, expected some of {', '.join(MEASURES)}, or functions")
    return found


def _check(by: str, where: Mapping[str, Any]) -> None:
    if by not in ("inference", "frame", "episode"):
        raise SelectionError(f"by={by!r}: expected 'inference', 'frame' or 'episode'")
    check_whole_episode(where)


def check_whole_episode(where: Mapping[str, Any]) -> None:
    """Check that `where` leaves frames and inferences open.

    Raises:
        SelectionError: it does not.
    """
    for name in ("frame", "inference"):
        if where.get(name) is not None:
            raise SelectionError(f"got {name}={where[name]!r}, expected none: every {name} is measured")


def _block_length(dataset: xr.Dataset, measures: Sequence[Measure], by: By, where: Mapping[str, Any]) -> int:
    """Return how many inferences to look at at once."""
    maps = [dataset[name] for name in (RAW, MEANS) if name in dataset]
    sizes = {
        "layer": max((m.sizes.get("layer", m.sizes.get("all_layer", 0)) for m in maps), default=1),
        "denoise_step": dataset.sizes.get("denoise_step", 1),
        "head": dataset.sizes.get("head", 1),
        "query": dataset.sizes["query"] if RAW in dataset else 1,
    }
    chosen = {"head": "mean"} | {dim: where[dim] for dim in sizes if dim in where}
    rows = dataset.sizes["frame"] / dataset.sizes["inference"] if by == "frame" else 1.0
    if not all(measure.of_attention for measure in measures):
        # A function may look at whole maps, whatever it returns.
        chosen = {dim: "all" if isinstance(choice, str) else choice for dim, choice in chosen.items()}
        chosen, rows = {**chosen, "head": "all", "query": "all"}, 1.0
    kept = [
        (sizes[dim] if choice == "all" else 1) if isinstance(choice, str) else np.size(choice)
        for dim, choice in chosen.items()
    ]
    # Looked at in float32, whatever the store holds.
    looked_at = int(4 * math.prod(kept) * rows * dataset.sizes["key"])
    stored = sum(array.nbytes for array in maps) // dataset.sizes["inference"]
    return min(max(1, max(stored, _BLOCK_BYTES) // max(1, looked_at)), _MOST_INFERENCES)


def _summarised(
    dataset: xr.Dataset, measures: Sequence[Measure], by: Rows, where: Mapping[str, Any]
) -> pd.DataFrame:
    """Return what `summarise` does, with texts as categories."""
    if by == "episode":
        return _means(_episode_table(dataset, measures, "inference", where), dataset.sizes["inference"])
    return _episode_table(dataset, measures, by, where)


def _episode_table(
    dataset: xr.Dataset, measures: Sequence[Measure], by: By, where: Mapping[str, Any]
) -> pd.DataFrame:
    starts = dataset["inference_frame"].values
    last = max(dataset.sizes["frame"] - 1, int(starts.max(initial=0)), 1)
    pieces: dict[str, list[dict[str, Any]]] = {}
    for measure, values in measured(dataset, measures, by, where):
        columns: dict[str, Any] = label_columns(values)
        frames = columns["frame"] if by == "frame" else starts[columns["inference"]]
        columns["phase"] = frames / last
        columns["measure"] = _same(measure.name, values.size)
        columns.setdefault("quantity", _same(measure.quantity, values.size))
        columns["value"] = values.values.ravel()
        pieces.setdefault(measure.name, []).append(columns)
    tables = [
        pd.DataFrame(
            {
                name: np.concatenate([p[name] for p in of_measure])
                for name in of_measure[0]
                if name not in TEXTS
            }
        )
        for of_measure in pieces.values()
    ]
    table = pd.concat(tables, ignore_index=True)
    for name in TEXTS:
        parts = [piece[name] for of_measure in pieces.values() for piece in of_measure]
        table[name] = union_categoricals(parts, sort_categories=True)
    return table[ordered_columns(table.columns, ["value"])]


def _same(text: str, n: int) -> pd.Categorical:
    return pd.Categorical.from_codes(np.zeros(n, np.int8), [text])


def _means(table: pd.DataFrame, n_inferences: int) -> pd.DataFrame:
    """Average a table by inference over the inferences."""
    keys = [name for name in table.columns if name not in ("inference", "phase", "value")]
    of_each = table.astype({"value": np.float64}).groupby(keys, sort=False, dropna=False, observed=True)[
        "value"
    ]
    means = of_each.agg(["sum", "count", "size"]).reset_index()
    absent = (n_inferences - means["size"]).where(means["quantity"] == "share", 0)
    return means[keys].assign(value=means["sum"] / (means["count"] + absent))


def _run_table(sources: Sequence[Source], tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    counts = [len(table) for table in tables]
    attributes = [attributes_of(source) for source in sources]
    labels: dict[str, Any] = {
        "task_group": [a.get("task_group") for a in attributes],
        "task_id": [a.get("task_id") for a in attributes],
        "episode": [a.get("episode_index") for a in attributes],
        "task": [str(a.get("task", "")) for a in attributes],
        "condition": [condition_of(source) for source in sources],
        "success": [success_of(source) for source in sources],
        "complete": [a.get("complete") is True for a in attributes],
        "path": [path_of(source) for source in sources],
    }
    texts = {name: union_categoricals([table[name] for table in tables]) for name in TEXTS}
    table = pd.concat([table.drop(columns=list(TEXTS)) for table in tables], ignore_index=True)
    for name, values in texts.items():
        table[name] = values
    table = table[ordered_columns(table.columns, ["value"])]
    for position, (name, values) in enumerate(labels.items()):
        is_text = name in ("task_group", "task", "condition", "path")
        column = pd.Series(values, dtype="category" if is_text else None)
        table.insert(position, name, column.repeat(counts).array)
    return table
