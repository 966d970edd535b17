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

from lerobot_attn.analysis.catalogue import MEASURES, OLD_NAMES, AnyMeasure, Measure, find_measure
from lerobot_attn.analysis.cluster import Scheduler
from lerobot_attn.analysis.columns import label_columns, ordered_columns
from lerobot_attn.analysis.intervals import Group, difference_of, mean_of, stacked
from lerobot_attn.analysis.runs import check_whole_episode, measured
from lerobot_attn.analysis.select import Where
from lerobot_attn.analysis.sources import Source, attributes_of, map_episodes, path_of, sources_of
from lerobot_attn.analysis.spatial import by_camera, camera_geometry, camera_names, image_heatmap
from lerobot_attn.analysis.splits import ByCondition as ByCondition
from lerobot_attn.analysis.splits import BySuccess as BySuccess
from lerobot_attn.analysis.splits import split_by_condition as split_by_condition
from lerobot_attn.analysis.splits import split_by_success as split_by_success
from lerobot_attn.errors import SelectionError, StoreError, first_line
from lerobot_attn.layout import ImageGeometry
from lerobot_attn.sizes import Progress

Align = Literal["phase", "frame"]
Axis = Literal["phase", "frame", "whole"]
Place = Callable[[xr.DataArray], xr.DataArray]  # (frame, …) onto the axis that episodes share

HEATMAP = "image_heatmap"


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

    def geometry_of(self, dataset: xr.Dataset) -> CameraPatches | None:
        """Return what the patches of a heatmap show; None for other measures."""
        if self.measure.name != HEATMAP:
            return None
        return CameraPatches(*camera_geometry(dataset, self.camera)[:2])


class CameraPatches(NamedTuple):
    """A camera's full name, and how its image became patches."""

    camera: str
    geometry: ImageGeometry

    def __str__(self) -> str:
        """Say what decides which place of the image a patch shows."""
        g = self.geometry
        return (
            f"{g.height_px}x{g.width_px} px, {g.pad_top_px} above and {g.pad_left_px} left of it padded, in "
            f"{g.grid_rows}x{g.grid_columns} patches"
        )


class _Measured(NamedTuple):
    """An episode's measures and its heatmaps' geometries, one for each task, and its cameras."""

    values: list[xr.DataArray]
    geometries: list[CameraPatches | None]
    cameras: tuple[str, ...]


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
    return len(set(patches_of(episodes, camera))) <= 1


def patches_of(episodes: Iterable[Source], camera: str | None = None) -> list[CameraPatches]:
    """Return for each episode what a camera's patches show; arguments and errors as for `same_geometry`."""
    alone = [xr.Dataset(attrs={"layout": attributes_of(source).get("layout")}) for source in episodes]
    return [CameraPatches(*camera_geometry(dataset, camera)[:2]) for dataset in alone]


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
    scheduler: Scheduler = None,
    workers: int | None = None,
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
        scheduler: as for `summarise_run`: Dask's own, or a cluster's address or client.
        workers: start so many processes on this machine instead.
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
        ConfigError, SetupError: of the scheduler and workers, as for `summarise_run`.
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
        workers=workers,
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
    scheduler: Scheduler = None,
    workers: int | None = None,
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
        workers=workers,
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
    scheduler: Scheduler = None,
    workers: int | None = None,
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
        scheduler: as for `summarise_run`.
        workers: likewise.
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
    reading = functools.partial(map_episodes, scheduler=scheduler, workers=workers, progress=progress)
    groups = _groups(a, b, tasks, where, reading)
    return {
        name: difference_of(*of_task, task.measure, confidence, n_resamples, seed)
        for name, task, of_task in zip(aspects, tasks, groups, strict=True)
    }


def overall_table(result: xr.Dataset) -> pd.DataFrame:
    """Return a comparison of whole episodes as the table that `compare_overall` gives.

    Args:
        result: of `compare_each`, for an aspect with axis "whole".
    """
    labels = label_columns(result["difference"])
    columns: dict[str, Any] = {name: np.asarray(values) for name, values in labels.items()}
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
    reading: Callable[..., list[Any]],
) -> list[tuple[Group, Group]]:
    """Measure every episode of both groups by `reading`, which maps them; return both for each task."""
    check_whole_episode(where)
    of_a, of_b = sources_of(a, "a"), sources_of(b, "b")
    sources = [*of_a, *of_b]
    function = functools.partial(_episode, tasks=tasks, where=dict(where))
    results = reading(function, sources)
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
    return [(Group([*values[:n]], paths[:n]), Group([*values[n:]], paths[n:])) for values in by_task]


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
        stacked(of_measure, "frame", fill_value=0, names=[f"frame {int(p['frame'][0])}" for p in of_measure])
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
        placed = np.stack([mean_of(values[part == index]) for index in range(n_phases)])
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
    return _on_axis(array, None, mean_of(array.values.astype(np.float64)))


def _on_axis(array: xr.DataArray, axis: str | None, values: NDArray[np.float64]) -> xr.DataArray:
    coords = {name: coord for name, coord in array.coords.items() if "frame" not in coord.dims}
    dims = [*([axis] if axis else []), *array.dims[1:]]
    return xr.DataArray(values, coords, dims, attrs=array.attrs)
