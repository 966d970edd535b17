"""Compare two groups of episodes: success with failure, one prompt with another, one policy with another.

    from lerobot_attn import open_run
    from lerobot_attn.analysis.compare import compare, compare_overall, split_by_success

    solved, failed = split_by_success(open_run("out"))
    compare(failed, solved)            # modality shares over the phase of the episode, b - a with intervals
    compare_overall(failed, solved)    # the same as a table of means over whole episodes
    compare_each(failed, solved, {"words": Aspect("token_attention"), "all": Aspect("entropy", "whole")})

Intervals are percentile bootstraps over episodes (Efron & Tibshirani, "An Introduction to the Bootstrap",
1993, chapters 8 and 13). An episode is drawn as a whole, so they say how far the difference would move if
other episodes of the same kind had been recorded; frames of an episode are not independent and are never
drawn. With few episodes, about ten or fewer a group, they are too narrow: read them as a rough guide. Each
interval is of one value alone, so of many some miss. Knows no files and draws nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.runs import (
    MEASURES,
    OLD_NAMES,
    AnyMeasure,
    Labels,
    Measure,
    Source,
    attributes_of,
    check_whole_episode,
    find_measure,
    label_columns,
    map_episodes,
    measured,
    ordered_columns,
    path_of,
    sources_of,
    success_of,
    token_labels,
)
from lerobot_attn.analysis.select import Where
from lerobot_attn.analysis.spatial import by_camera, camera_geometry, camera_names, image_heatmap
from lerobot_attn.analysis.tokens import MODALITY_OF
from lerobot_attn.errors import SelectionError, StoreError, first_line
from lerobot_attn.layout import ImageGeometry
from lerobot_attn.sizes import Progress

Align = Literal["phase", "frame"]
Axis = Literal["phase", "frame", "whole"]
Place = Callable[[xr.DataArray], xr.DataArray]  # (frame, …) onto the axis that episodes share

HEATMAP = "image_heatmap"
FEW_EPISODES = 10
_BATCH_BYTES = 64_000_000
_KINDS = list(MODALITY_OF.values())


class BySuccess[S: Source](NamedTuple):
    """Episodes that solved their task, and those that did not."""

    successes: list[S]
    failures: list[S]


@dataclass(frozen=True)
class Aspect:
    """What to compare: a measure, and the axis that episodes of all lengths are put on.

    Attributes:
        measure: as for `compare`.
        axis: "phase", "frame", or "whole": the mean over each episode, without an axis.
        n_phases: parts of an episode, for "phase".
        camera: whose heatmap, for "image_heatmap"; the first one by default.
    """

    measure: AnyMeasure
    axis: Axis = "phase"
    n_phases: int = 20
    camera: str | None = None

    def __post_init__(self) -> None:
        """Check the axis.

        Raises:
            SelectionError: no such axis, or no phase.
        """
        if self.axis not in ("phase", "frame", "whole"):
            raise SelectionError(f"axis={self.axis!r}: expected 'phase', 'frame' or 'whole'")
        if self.n_phases < 1:
            raise SelectionError(f"n_phases={self.n_phases}: expected 1 or more")

    @property
    def place(self) -> Place:
        """What puts (frame, …) onto the axis."""
        if self.axis == "phase":
            return functools.partial(_by_phase, n_phases=self.n_phases)
        return _by_frame if self.axis == "frame" else _whole


class _Task(NamedTuple):
    """What is to be done with each episode for one aspect."""

    measure: Measure
    place: Place
    camera: str | None

    def geometry_of(self, dataset: xr.Dataset) -> _Geometry | None:
        """Return what the patches of a heatmap show; None for other measures."""
        if self.measure.name != HEATMAP:
            return None
        return _Geometry(*camera_geometry(dataset, self.camera)[:2])


class _Geometry(NamedTuple):
    """A camera, and how its image became patches."""

    camera: str
    geometry: ImageGeometry

    def __str__(self) -> str:
        g = self.geometry
        return (
            f"{g.height_px}x{g.width_px} px, {g.pad_top_px} above and {g.pad_left_px} left of it padded, in "
            f"{g.grid_rows}x{g.grid_columns} patches"
        )


class _Measured(NamedTuple):
    """An episode's measures and its heatmaps' geometries, one for each task, and its cameras."""

    values: list[xr.DataArray]
    geometries: list[_Geometry | None]
    cameras: tuple[str, ...]


class _Group(NamedTuple):
    """One measure of every episode of a group, on one common axis."""

    values: list[xr.DataArray]
    paths: list[str]


def split_by_success[S: Source](episodes: Iterable[S]) -> BySuccess[S]:
    """Split episodes by whether they solved their task; interrupted ones, which do not know, are left out.

    Raises:
        SelectionError: one side would be empty.
    """
    found = sources_of(episodes, "split_by_success")
    successes = [source for source in found if success_of(source) is True]
    failures = [source for source in found if success_of(source) is False]
    if not successes or not failures:
        unknown = len(found) - len(successes) - len(failures)
        raise SelectionError(
            f"split_by_success needs both: got {len(successes)} successes, {len(failures)} failures and "
            f"{unknown} interrupted episodes"
        )
    return BySuccess(successes, failures)


def same_geometry(episodes: Iterable[Source], camera: str | None = None) -> bool:
    """Return whether a camera's patches show the same places of its image in all episodes.

    Only then can heatmaps be subtracted. Otherwise each map can be drawn on its own episode's pixels, see
    `on_camera_pixels`. No arrays are opened.

    Args:
        episodes: of `open_run`, or datasets.
        camera: its name or the end of it; the first one by default.

    Raises:
        SelectionError: an episode lacks the camera.
    """
    alone = [xr.Dataset(attrs={"layout": attributes_of(source).get("layout")}) for source in episodes]
    geometries = [camera_geometry(dataset, camera)[1] for dataset in alone]
    return all(geometry == geometries[0] for geometry in geometries)


def compare(
    a: Source | Iterable[Source],
    b: Source | Iterable[Source],
    measure: AnyMeasure = "modality_share",
    *,
    camera: str | None = None,
    align: Align = "phase",
    n_phases: int = 20,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    scheduler: str = "threads",
    progress: Progress | None = None,
    **where: Unpack[Where],
) -> xr.Dataset:
    """Compare a measure of two groups along the episode: b minus a, with intervals over episodes.

    Each episode's frames are put on a common axis. By phase, the frames of each of `n_phases` equal parts of
    the episode are averaged; an episode of fewer frames is interpolated between them. By frame, episodes
    stay as they are and the shorter ones are missing from the later frames: what is left there are the long
    episodes, often the failures.

    Args:
        a: an episode, or several: of `open_run`, or datasets.
        b: likewise.
        measure: "modality_share", "token_attention", "entropy", "stability" (all as for `summarise` by
            frame), "image_heatmap", or a function or `Measure`.
        camera: whose heatmap, by its name or the end of it; the first one by default.
        align: "phase" or "frame".
        n_phases: parts of an episode.
        confidence: of the intervals, 0 to 1.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.
        scheduler: Dask's: "threads", "processes" or "synchronous".
        progress: called as `progress(done, total)` as episodes are read.
        where: what to look at, see `Where`; neither its frame nor its inference.

    Returns:
        (phase or frame, and what the measure keeps: layer, modality, token, camera, grid_y, grid_x, …):
        `a` and `b`, means over episodes; `difference` = b - a; `low` and `high`, its interval; `n_a` and
        `n_b`, episodes that have a value there. `phase` is the middle of each part, 0 to 1.

        Modalities, and tokens by kind and text, are those of either group, NaN where none of a group's
        episodes has it; `label` "the (2)" is the second "the" of a task, and `ordinal` is -1 where episodes
        have it at different places. Where a group has fewer than two episodes there is no interval: NaN.
        `attrs["interval"]` says what it is, or why there is none.

    Raises:
        SelectionError: an empty group, cameras or sizes that differ, heatmaps of a camera whose geometry
            differs (one patch shows different places then; shares of whole images can be compared), nothing
            recorded, an unknown measure, align, camera or label, or a setting out of its range.
        StoreError: an episode cannot be read.
    """
    if align not in ("phase", "frame"):
        raise SelectionError(f"align={align!r}: expected 'phase' or 'frame'")
    (result,) = compare_each(
        a,
        b,
        {"": Aspect(measure, align, n_phases, camera)},
        confidence=confidence,
        n_resamples=n_resamples,
        seed=seed,
        scheduler=scheduler,
        progress=progress,
        **where,
    ).values()
    return result


def compare_overall(
    a: Source | Iterable[Source],
    b: Source | Iterable[Source],
    measure: AnyMeasure = "modality_share",
    *,
    camera: str | None = None,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    scheduler: str = "threads",
    progress: Progress | None = None,
    **where: Unpack[Where],
) -> pd.DataFrame:
    """Compare a measure's mean over each whole episode between two groups: b minus a, with intervals.

    Args and errors are those of `compare`; every episode counts the same, however long it is.

    Returns:
        One row per value. Columns: `layer`, `head`, … where they are not averaged over; `measure`,
        `quantity`, `kind` and `name` as for `summarise`; `a` and `b`, means over episodes; `difference` =
        b - a; `low` and `high`, its interval, NaN where a group has fewer than two episodes; `n_a` and `n_b`,
        episodes that have the value. `attrs["interval"]` says what the interval is, or why there is none.
    """
    (result,) = compare_each(
        a,
        b,
        {"": Aspect(measure, "whole", camera=camera)},
        confidence=confidence,
        n_resamples=n_resamples,
        seed=seed,
        scheduler=scheduler,
        progress=progress,
        **where,
    ).values()
    return overall_table(result)


def compare_each(
    a: Source | Iterable[Source],
    b: Source | Iterable[Source],
    aspects: Mapping[str, Aspect],
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    scheduler: str = "threads",
    progress: Progress | None = None,
    **where: Unpack[Where],
) -> dict[str, xr.Dataset]:
    """Compare several aspects of two groups in one pass over the episodes.

    Args and errors are those of `compare`, whose result this gives for each aspect.

    Args:
        a: an episode, or several.
        b: likewise.
        aspects: what to compare, by any name.
        confidence: of the intervals.
        n_resamples: of the bootstrap.
        seed: of the bootstrap, for each aspect anew.
        scheduler: Dask's.
        progress: called as `progress(done, total)` as episodes are read.
        where: what to look at, the same for all.

    Returns:
        A result for each name.
    """
    if not 0 < confidence < 1:
        raise SelectionError(f"confidence={confidence}: expected between 0 and 1, e.g. 0.95")
    if n_resamples < 1:
        raise SelectionError(f"n_resamples={n_resamples}: expected 1 or more, e.g. 2000")
    if not aspects:
        raise SelectionError("aspects: got none, expected one at least")
    tasks = [
        _Task(_measure(aspect.measure, aspect.camera), aspect.place, aspect.camera)
        for aspect in aspects.values()
    ]
    groups = _groups(a, b, tasks, where, scheduler, progress)
    return {
        name: _difference(*of_task, task.measure, confidence, n_resamples, seed)
        for name, task, of_task in zip(aspects, tasks, groups, strict=True)
    }


def overall_table(result: xr.Dataset) -> pd.DataFrame:
    """Return a comparison of whole episodes as the table that `compare_overall` gives.

    Args:
        result: of `compare_each`, for an aspect with axis "whole".
    """
    columns: dict[str, Any] = label_columns(result["difference"])
    columns["measure"] = result.attrs["measure"]
    columns.setdefault("quantity", result.attrs["quantity"])
    values = ("a", "b", "difference", "low", "high", "n_a", "n_b")
    for name in values:
        columns[name] = result[name].values.ravel()
    table = pd.DataFrame(columns)
    table = table[ordered_columns(table.columns, values)]
    table.attrs["interval"] = result.attrs["interval"]
    return table


def _measure(measure: AnyMeasure, camera: str | None) -> Measure:
    if measure == HEATMAP or measure is image_heatmap:
        return Measure(HEATMAP, functools.partial(_heatmap, camera=camera), "share", of_attention=True)
    if camera is not None:
        raise SelectionError(f"camera={camera!r} is a choice of measure={HEATMAP!r} alone, got {measure!r}")
    if isinstance(measure, str) and measure not in MEASURES and measure not in OLD_NAMES:
        known = ", ".join([*MEASURES, HEATMAP])
        raise SelectionError(f"measure {measure!r}: expected one of {known}, or a function")
    return find_measure(measure)


def _heatmap(dataset: xr.Dataset, array: xr.DataArray, camera: str | None) -> xr.DataArray:
    (heatmap,) = by_camera(dataset, array, [camera]).values()
    return heatmap


def _groups(
    a: Source | Iterable[Source],
    b: Source | Iterable[Source],
    tasks: Sequence[_Task],
    where: Mapping[str, Any],
    scheduler: str,
    progress: Progress | None,
) -> list[tuple[_Group, _Group]]:
    """Measure every episode of both groups; return both for each task."""
    check_whole_episode(where)
    of_a, of_b = sources_of(a, "a"), sources_of(b, "b")
    sources = [*of_a, *of_b]
    function = functools.partial(_episode, tasks=tasks, where=dict(where))
    results = map_episodes(function, sources, scheduler=scheduler, progress=progress)
    episodes: list[_Measured] = []
    for source, result in zip(sources, results, strict=True):
        if isinstance(result, Exception):
            # A comparison that silently lacks episodes would be of other groups than those asked for.
            where_it_was = path_of(source) or "an episode of unknown path"
            if isinstance(result, SelectionError):
                raise SelectionError(f"{where_it_was}: {result}") from result
            raise StoreError(f"{where_it_was}: cannot be read: {first_line(result)}") from result
        episodes.append(result)
    paths = [path_of(source) or f"episode {index}" for index, source in enumerate(sources)]
    cameras = [found.cameras for found in episodes]
    for path, names in zip(paths, cameras, strict=True):
        if names != cameras[0]:
            raise SelectionError(
                f"the episodes' cameras differ: {', '.join(cameras[0]) or 'none'} in {paths[0]}, "
                f"{', '.join(names) or 'none'} in {path}; compare episodes of the same cameras"
            )
    for path, found in zip(paths, episodes, strict=True):
        for ours, theirs in zip(episodes[0].geometries, found.geometries, strict=True):
            if ours is not None and ours != theirs:
                raise SelectionError(
                    f"heatmaps of {ours.camera} cannot be compared patch by patch, because patches show "
                    f"other places: {ours} in {paths[0]}, {theirs} in {path}; compare modality_share or "
                    "entropy, or episodes whose cameras are alike"
                )
    n = len(of_a)
    by_task = zip(*(found.values for found in episodes), strict=True)
    return [(_Group([*values[:n]], paths[:n]), _Group([*values[n:]], paths[n:])) for values in by_task]


def _episode(dataset: xr.Dataset, *, tasks: Sequence[_Task], where: Mapping[str, Any]) -> _Measured:
    """Measure an episode for every task, in one pass over its maps."""
    measures: list[Measure] = []
    for task in tasks:
        if task.measure not in measures:
            measures.append(task.measure)
    pieces: list[list[xr.DataArray]] = [[] for _ in measures]
    for measure, values in measured(dataset, measures, "frame", where):
        pieces[measures.index(measure)].append(values)
    # A word that one inference's prompt lacks got no attention then.
    whole = [
        _stacked(of_measure, "frame", fill_value=0, names=[f"frame {int(p['frame'][0])}" for p in of_measure])
        for of_measure in pieces
    ]
    placed = [task.place(whole[measures.index(task.measure)]) for task in tasks]
    geometries = [task.geometry_of(dataset) for task in tasks]
    return _Measured(placed, geometries, tuple(camera_names(dataset)))


def _by_phase(array: xr.DataArray, n_phases: int) -> xr.DataArray:
    """Put (frame, …) on (phase, …)."""
    n_frames = array.sizes["frame"]
    centres = (np.arange(n_phases) + 0.5) / n_phases
    values = array.values.astype(np.float64)
    if n_frames >= n_phases:
        part = np.minimum(np.arange(n_frames) * n_phases // max(1, n_frames - 1), n_phases - 1)
        placed = np.stack([_mean(values[part == index]) for index in range(n_phases)])
    else:
        position = centres * (n_frames - 1)
        low = position.astype(int)
        high = np.minimum(low + 1, n_frames - 1)
        weight = (position - low).reshape(-1, *[1] * (values.ndim - 1))
        placed = np.where(weight > 0, (1 - weight) * values[low] + weight * values[high], values[low])
    return _on_axis(array, "phase", placed).assign_coords(phase=centres)


def _by_frame(array: xr.DataArray) -> xr.DataArray:
    return array.astype(np.float64)


def _whole(array: xr.DataArray) -> xr.DataArray:
    return _on_axis(array, None, _mean(array.values.astype(np.float64)))


def _on_axis(array: xr.DataArray, axis: str | None, values: NDArray[np.float64]) -> xr.DataArray:
    coords = {name: coord for name, coord in array.coords.items() if "frame" not in coord.dims}
    dims = [*([axis] if axis else []), *array.dims[1:]]
    return xr.DataArray(values, coords, dims, attrs=array.attrs)


def _difference(
    a: _Group, b: _Group, measure: Measure, confidence: float, n_resamples: int, seed: int
) -> xr.Dataset:
    n_a, n_b = len(a.values), len(b.values)
    stacked = _stacked([*a.values, *b.values], "episode", fill_value=np.nan, names=[*a.paths, *b.paths])
    values = stacked.values
    # Low and high are NaN unless both groups have two episodes with a value.
    low, high = _bootstrap(values[:n_a], values[n_a:], confidence, n_resamples, seed)
    mean_a, mean_b = _mean(values[:n_a]), _mean(values[n_a:])
    found = {
        "a": (mean_a, "mean of a's episodes"),
        "b": (mean_b, "mean of b's episodes"),
        "difference": (mean_b - mean_a, "b - a"),
        "low": (low, "lower end of the difference's interval"),
        "high": (high, "upper end of the difference's interval"),
        "n_a": (np.isfinite(values[:n_a]).sum(axis=0), "episodes of a with a value"),
        "n_b": (np.isfinite(values[n_a:]).sum(axis=0), "episodes of b with a value"),
    }
    units = stacked.attrs.get("units", "1")
    result = xr.Dataset(
        {
            name: (
                stacked.dims[1:],
                array,
                {"long_name": text, "units": "1" if name in ("n_a", "n_b") else units},
            )
            for name, (array, text) in found.items()
        },
        {name: coord for name, coord in stacked.coords.items() if "episode" not in coord.dims},
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
    kept = {name: value for name, value in stacked.attrs.items() if name not in ("vmin", "vmax")}
    result.attrs = {
        **kept,
        "measure": measure.name,
        "quantity": measure.quantity,
        "episodes_a": n_a,
        "episodes_b": n_b,
        "interval": interval,
    }
    return result


def _bootstrap(
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


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the first axis of what is not NaN; NaN where everything is."""
    present = np.isfinite(values)
    count = present.sum(axis=0)
    total = np.where(present, values, 0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _stacked(
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
