"""Grounding of a whole run: each episode's means, beside the mean map of other episodes, and what follows.

An episode is opened when its turn comes and let go after it. What is kept of each lies in an unnamed file, so
memory does not grow with the number of episodes. Knows no file format, and draws nothing.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.catalogue import Measure
from lerobot_attn.analysis.grounding import (
    LOWER_IS_BETTER,
    METRICS,
    better_chance,
    episode_map,
    ground,
    scene_of,
    with_mean_head,
)
from lerobot_attn.analysis.runs import measured
from lerobot_attn.analysis.select import Where
from lerobot_attn.analysis.sources import Source, path_of, success_of
from lerobot_attn.analysis.spatial import camera_geometry
from lerobot_attn.errors import SelectionError
from lerobot_attn.masks import ROLES
from lerobot_attn.sizes import Progress

_MAP_DIMS = ("denoise_step", "layer", "head")
_FOLDS = 10  # parts of the run that a mean map over other episodes leaves out, one at a time
_MOST_DENSE = 1000.0  # a concentration, in means: where no attention lies outside, it has no end


class Candidate(NamedTuple):
    """One map among those that were tried: of a camera, layer and head."""

    camera: str
    layer: int
    head: str


@dataclass
class RunGrounding:
    """The grounding of every episode of a run, means over its inferences.

    A concentration above 1000 counts as 1000.

    Attributes:
        sources: the episodes, in the order of the arrays.
        cameras, layers, heads, denoise_steps, roles: labels of the arrays' axes; the first head is "mean".
        flow_time: (denoise_step,) 1 is noise, 0 the action; NaN of a policy that does not denoise.
        value: (episode, camera, layer, head, denoise_step, role, metric) float32.
        fixed: likewise, of the mean map over other episodes; all NaN of a single episode.
        uniform: (episode, camera, role, metric), and so is `centre`.
        visible: (episode, camera, role) share of the inferences at which the mask is seen.
        n_inferences: (camera, layer, head, denoise_step, role, metric) inferences with a value.
    """

    sources: list[Source]
    cameras: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[str, ...]
    denoise_steps: tuple[int, ...]
    roles: tuple[str, ...]
    flow_time: NDArray[np.float64]
    value: NDArray[np.float32]
    fixed: NDArray[np.float32]
    uniform: NDArray[np.float64]
    centre: NDArray[np.float64]
    visible: NDArray[np.float64]
    n_inferences: NDArray[np.int64]
    _maps: _FoldMaps = field(repr=False)
    _where: Where = field(default_factory=Where, repr=False)

    @property
    def n_episodes(self) -> int:
        """How many episodes there are."""
        return len(self.sources)

    @property
    def candidates(self) -> list[Candidate]:
        """Every camera, layer and head, in the order of the arrays."""
        return [Candidate(c, k, h) for c in self.cameras for k in self.layers for h in self.heads]

    @property
    def success(self) -> list[bool | None]:
        """Whether each episode solved its task; None where nobody knows."""
        return [success_of(source) for source in self.sources]

    def arrays(self, index: int) -> xr.Dataset:
        """Open an episode; it is let go when what is returned is."""
        return _arrays(self.sources[index])

    def place(self, candidate: Candidate) -> tuple[int, int, int]:
        """Return where a candidate lies on the axes camera, layer and head."""
        return (
            self.cameras.index(candidate.camera),
            self.layers.index(candidate.layer),
            self.heads.index(candidate.head),
        )

    def levels(
        self, candidate: Candidate, step: int, role: str, metric: str
    ) -> dict[str, NDArray[np.float64]]:
        """Return (episode,) of "value" and of each chance level.

        Args:
            candidate: the map.
            step: position among `denoise_steps`.
            role: of `roles`.
            metric: of `METRICS`.
        """
        camera, layer, head = self.place(candidate)
        r, m = self.roles.index(role), METRICS.index(metric)
        return {
            "value": np.asarray(self.value[:, camera, layer, head, step, r, m], float),
            "uniform": self.uniform[:, camera, r, m],
            "fixed": np.asarray(self.fixed[:, camera, layer, head, step, r, m], float),
            "centre": self.centre[:, camera, r, m],
        }

    def above_chance(self, step: int, role: str, metric: str) -> NDArray[np.float64]:
        """Return (episode, candidate): value minus the better of the chance levels; more is better."""
        r, m = self.roles.index(role), METRICS.index(metric)
        value, fixed = (np.asarray(a[:, :, :, :, step, r, m], float) for a in (self.value, self.fixed))
        own = (self.uniform[:, :, None, None, r, m], self.centre[:, :, None, None, r, m])
        sign = -1 if metric in LOWER_IS_BETTER else 1
        found: NDArray[np.float64] = sign * (value - better_chance(metric, [fixed, *own]))
        return found.reshape(self.n_episodes, -1)

    def by_inference(self, index: int, candidate: Candidate, step: int) -> xr.Dataset:
        """Measure one map of one episode: value and chance levels, (frame, role, metric) each.

        `frame` is the one at which each inference was asked for.
        """
        dataset = self.arrays(index)
        where = {**self._where, "layer": candidate.layer, "denoise_step": self.denoise_steps[step]}
        fixed = self._maps.others(index)
        place = {"layer": candidate.layer, "head": candidate.head, "denoise_step": self.denoise_steps[step]}

        def of_block(view: xr.Dataset, array: xr.DataArray) -> xr.DataArray:
            array = with_mean_head(array).sel(head=candidate.head, drop=True)
            own = {candidate.camera: fixed[candidate.camera].sel(place)} if fixed else None
            found = ground(view, array, cameras=[candidate.camera], roles=self.roles, fixed=own)
            return _kinds(found).isel(camera=0)

        blocks = [values for _, values in _blocks(dataset, of_block, where)]
        joined = xr.concat(blocks, "inference", coords="minimal", compat="override")
        found: xr.Dataset = joined.to_dataset("kind").assign_coords(
            inference=dataset["inference_frame"].values
        )
        return found.rename(inference="frame")


def ground_episodes(
    episodes: Sequence[Source], *, progress: Progress | None = None, **where: Any
) -> RunGrounding:
    """Measure every inference of every episode, in two readings: first the mean maps, then the metrics.

    The mean map of other episodes leaves an episode itself out; in a run of more than ten it leaves out the
    tenth of the run that the episode is in.

    Args:
        episodes: with masks, of one policy.
        progress: called as `progress(done, total)`, an episode counting twice.
        where: `layer`, `denoise_step`, `query` and `cameras` as `grounding` takes them; by default every
            stored layer and step, the mean over the executed actions, and every camera with masks.

    Returns:
        The means of each episode, of every head and of the mean over heads.

    Raises:
        SelectionError: no episode, one without masks, or episodes whose layers, heads, steps or grids differ.
    """
    if not episodes:
        raise SelectionError("grounding: got no episodes, expected one at least")
    cameras = where.pop("cameras", None)
    chosen: Where = {"layer": "all", "denoise_step": "all", **where}  # type: ignore[typeddict-item]
    first = _arrays(episodes[0])
    scene = scene_of(first)
    names = tuple(camera_geometry(first, camera)[0] for camera in cameras) if cameras else scene.cameras
    maps = _FoldMaps(len(episodes))
    roles: set[str] = set()
    n_done = 0

    def tell() -> None:
        nonlocal n_done
        n_done += 1
        if progress is not None:
            progress(n_done, 2 * len(episodes))

    for index, source in enumerate(episodes):
        dataset = _arrays(source)
        scene = scene_of(dataset)
        for name in names:
            if name not in scene.cameras:
                raise SelectionError(
                    f"{path_of(source)}: camera {name!r} has no masks; those with masks: "
                    f"{', '.join(scene.cameras)}"
                )
        roles |= set(scene.roles)
        maps.add(index, episode_map(dataset, names, each_head=True, **chosen), path_of(source))
        tell()
    a_map = maps.any[names[0]]
    sizes = (len(names), *(a_map.sizes[dim] for dim in ("layer", "head", "denoise_step")))
    held = tuple(role for role in ROLES if role in roles)
    cells = (len(episodes), *sizes, len(held), len(METRICS))
    run = RunGrounding(
        sources=list(episodes),
        cameras=names,
        layers=tuple(a_map["layer"].values.tolist()),
        heads=tuple(a_map["head"].values.tolist()),
        denoise_steps=tuple(a_map["denoise_step"].values.tolist()),
        roles=held,
        flow_time=np.asarray(a_map["flow_time"].values, float),
        value=_on_disk(cells),
        fixed=_on_disk(cells),
        uniform=np.full((len(episodes), len(names), len(held), len(METRICS)), np.nan),
        centre=np.full((len(episodes), len(names), len(held), len(METRICS)), np.nan),
        visible=np.full((len(episodes), len(names), len(held)), np.nan),
        n_inferences=np.zeros(cells[1:], np.int64),
        _maps=maps,
        _where=chosen,
    )
    for index in range(len(episodes)):
        _fill(run, index)
        tell()
    return run


def with_an_end(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return concentrations of at most 1000: one without end would be every mean that it is part of."""
    return np.minimum(ratios, _MOST_DENSE)


class _FoldMaps:
    """The mean maps of the parts of a run: of few episodes each one's own, of more a tenth of them."""

    def __init__(self, n_episodes: int):
        self._n_episodes, self._n_folds = n_episodes, min(n_episodes, _FOLDS)
        self._sums: dict[int, dict[str, xr.DataArray]] = {}

    @property
    def any(self) -> dict[str, xr.DataArray]:
        """Maps of some fold, for their labels."""
        return next(iter(self._sums.values()))

    def add(self, index: int, maps: dict[str, xr.DataArray], path: str) -> None:
        """Add an episode's own mean maps."""
        for name, values in maps.items():
            first = self.any[name] if self._sums else values
            for dim in (*_MAP_DIMS, "grid_y", "grid_x"):
                ours, theirs = values.sizes[dim], first.sizes[dim]
                labels = [a[dim].values.tolist() for a in (values, first)] if dim in _MAP_DIMS else []
                if ours != theirs or (labels and labels[0] != labels[1]):
                    got, expected = labels or (ours, theirs)
                    raise SelectionError(
                        f"{path}: {dim} of {name} is {got!s:.60}, expected {expected!s:.60} as in the run's "
                        "first episode; ground the runs of one policy and one set of captured layers"
                    )
        fold = index % self._n_folds
        before = self._sums.get(fold)
        self._sums[fold] = {n: before[n] + v if before else v for n, v in maps.items()}

    def others(self, index: int) -> dict[str, xr.DataArray] | None:
        """Return the mean maps without the part of the run that an episode is in; None if nothing is left."""
        own = index % self._n_folds
        rest = [sums for fold, sums in self._sums.items() if fold != own]
        n_rest = sum(1 for other in range(self._n_episodes) if other % self._n_folds != own)
        if not n_rest:
            return None
        return {name: sum((sums[name] for sums in rest[1:]), rest[0][name]) / n_rest for name in rest[0]}


def _fill(run: RunGrounding, index: int) -> None:
    """Measure one episode into the run's arrays."""
    dataset, fixed = _arrays(run.sources[index]), run._maps.others(index)

    def of_block(view: xr.Dataset, array: xr.DataArray) -> xr.DataArray:
        found = ground(view, with_mean_head(array), cameras=run.cameras, roles=run.roles, fixed=fixed)
        return _kinds(found)

    total: Any = 0
    count: Any = 0
    kinds: list[str] = []
    for kinds, values in _blocks(dataset, of_block, run._where):  # noqa: B007
        order = ("kind", "inference", "camera", "layer", "head", "denoise_step", "role", "metric")
        block = np.array(values.transpose(*order).values)
        at = METRICS.index("concentration")
        block[..., at] = with_an_end(block[..., at])
        is_there = np.isfinite(block)
        total, count = total + np.where(is_there, block, 0).sum(axis=1), count + is_there.sum(axis=1)
    means = dict(zip(kinds, np.where(count > 0, total / np.maximum(1, count), np.nan), strict=True))
    run.value[index] = means["value"]
    run.fixed[index] = means.get("fixed", np.nan)
    run.uniform[index] = means["uniform"][:, 0, 0, 0]
    run.centre[index] = means["centre"][:, 0, 0, 0]
    counts = dict(zip(kinds, count, strict=True))
    # A uniform map is never missing: where it has a value, the mask is visible.
    run.visible[index] = counts["uniform"][:, 0, 0, 0, :, METRICS.index("mass")] / dataset.sizes["inference"]
    run.n_inferences += counts["value"]


def _kinds(found: xr.Dataset) -> xr.DataArray:
    """Return the value and its chance levels as one array, along `kind`."""
    kinds = [kind for kind in ("value", "uniform", "fixed", "centre") if kind in found]
    parts = [found[kind].broadcast_like(found["value"]) for kind in kinds]
    return xr.concat(parts, "kind", coords="minimal", compat="override").assign_coords(kind=kinds)


def _blocks(dataset: xr.Dataset, function: Any, where: Any) -> Iterator[tuple[list[str], xr.DataArray]]:
    """Yield a function of the attention of every head, one block of inferences after another."""
    measure = Measure("grounding", function, of_attention=True)
    for _, values in measured(dataset, [measure], "inference", {**where, "head": "all"}):
        yield values["kind"].values.tolist(), values


def _arrays(source: Source) -> xr.Dataset:
    """Open an episode; what a copy opens goes when the copy goes."""
    return source if isinstance(source, xr.Dataset) else copy.copy(source).arrays


def _on_disk(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return an array of NaN in a file that is gone when the array is."""
    with tempfile.TemporaryFile() as file:  # the mapping keeps it open
        array: NDArray[np.float32] = np.memmap(file, np.float32, "w+", shape=shape)
    array[...] = np.nan
    return array
