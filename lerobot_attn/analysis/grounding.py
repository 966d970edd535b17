"""Attention against instance masks: is the map on the object, and is that more than chance?

    data = open_episode("….zarr").dataset
    found = analysis.grounding(data, layer="all", head="all")
    found.value.sel(role="target", metric="mass")   # (inference, layer, head, camera)
    found.uniform.sel(role="target", metric="mass") # (inference, camera), the same of a uniform map

A patch may lie in a mask in part: what it gets is spread evenly over that part of it which shows the image.
Knows masks and maps; draws nothing, tests nothing, and opens no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Unpack, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.catalogue import Measure
from lerobot_attn.analysis.labels import said_of
from lerobot_attn.analysis.runs import measured
from lerobot_attn.analysis.select import Where, attention
from lerobot_attn.analysis.spatial import camera_geometry, camera_names, on_grid
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import ImageGeometry
from lerobot_attn.masks import ROLES as ROLES
from lerobot_attn.masks import UNKNOWN, patch_coverage
from lerobot_attn.masks import Role as Role

Metric = Literal["mass", "concentration", "iou", "peak_hit", "centre_distance"]
METRICS: tuple[Metric, ...] = get_args(Metric)
LOWER_IS_BETTER: frozenset[str] = frozenset({"centre_distance"})
DEFINITIONS: dict[str, str] = {
    "mass": "share of the attention on this camera's visible patches that lies inside the mask",
    "concentration": "attention per area inside the mask, divided by attention per area outside",
    "iou": "area shared by the mask and the most attended tenth of the visible patches, divided by the area "
    "of both together",
    "peak_hit": "pointing game: 1 if the most attended visible patch overlaps the mask, else 0; of several "
    "patches with the same attention the mean",
    "centre_distance": "distance of the attention's centre of mass to the mask's, in patches; less is better",
}
# What a map is compared with; each is a map of which the same metrics are taken.
CHANCES: dict[str, str] = {
    "uniform": "uniform map: the mask's share of the image's area",
    "fixed": "the policy's own mean map over other episodes, which does not know this scene",
    "centre": "centre prior: a Gaussian at the image's centre",
}
MEAN_HEAD = "mean"
_TOP_SHARE = 0.1  # of the visible patches, for `iou`
CENTRE_SIGMA = 0.25  # of the centre prior, in heights and widths of the image
NO_MASKS = (
    "the episode holds no instance masks; record with --eval.attention.segmentation=true, or attach masks "
    "with lerobot-attn masks"
)


class Scene(NamedTuple):
    """What masks an episode holds."""

    cameras: tuple[str, ...]  # cameras with masks, in the policy's order
    roles: tuple[Role, ...]  # roles that some instance has, in the order of `masks.ROLES`


def scene_of(dataset: xr.Dataset) -> Scene:
    """Return which cameras of an episode have masks, and which roles its instances have.

    Raises:
        SelectionError: the episode holds no masks, or none of a camera that the policy saw.
    """
    if "segmentation" not in dataset or "instance_role" not in dataset.coords:
        raise SelectionError(NO_MASKS)
    masked = dataset["mask_camera"].values.tolist()
    cameras = tuple(name for name in camera_names(dataset) if name in masked)
    if not cameras:
        raise SelectionError(
            f"the masks are of cameras {', '.join(masked) or 'none'}, expected one of "
            f"{', '.join(camera_names(dataset)) or 'none, for the policy saw no image'}"
        )
    held = set(dataset["instance_role"].values.tolist())
    return Scene(cameras, tuple(role for role in ROLES if role in held))


def grounding(
    dataset: xr.Dataset,
    *,
    cameras: Sequence[str] | None = None,
    roles: Sequence[str] | None = None,
    fixed: Mapping[str, xr.DataArray] | None = None,
    **where: Unpack[Where],
) -> xr.Dataset:
    """Measure how much a map lies on what each role's mask shows, beside three levels of chance.

    "mass" is the energy-based pointing game of Wang et al. 2020 ("Score-CAM", arXiv:1910.01279), "peak_hit"
    the pointing game of Zhang et al. 2016 ("Top-down neural attention by excitation backprop",
    arXiv:1608.00507), the centre prior the usual control of eye tracking (Judd et al. 2009, "Learning to
    predict where humans look"). `DEFINITIONS` says each in one line. A role's mask is the union of its
    instances.

    Args:
        dataset: an episode's, with masks.
        cameras: their names or the ends of them; by default all that have masks.
        roles: of `masks.ROLES`; by default all that the scene has.
        fixed: camera → (…, grid_y, grid_x) of `mean_maps` over other episodes, chosen by the same `where`.
        where: what to look at, see `Where`; of a frame the mask is that of its inference.

    Returns:
        `value` (…, camera, role, metric) after the dimensions that `attention` keeps; and of the maps of
        `CHANCES`, `uniform` and `centre` (inference or frame, camera, role, metric) and, if it is given,
        `fixed` of the same dimensions as `value`. `visible` (inference or frame, camera, role) is whether the
        mask is seen at all. Lazy where the dataset is. NaN where the role's mask is not visible, where nobody
        knows what the camera shows, and where the map is missing.

    Raises:
        SelectionError: no masks, no such camera, no such role in the scene, or as `attention`.
    """
    scene = scene_of(dataset)
    return ground(
        dataset,
        attention(dataset, **where),
        cameras=_checked_cameras(dataset, scene, cameras),
        roles=_checked_roles(scene, roles),
        fixed=fixed,
        exclude=where.get("exclude") or where.get("leave_out") or (),
    )


def ground(
    dataset: xr.Dataset,
    array: xr.DataArray,
    *,
    cameras: Sequence[str],
    roles: Sequence[str],
    fixed: Mapping[str, xr.DataArray] | None = None,
    exclude: Sequence[int] = (),
) -> xr.Dataset:
    """Measure attention that was selected already; a role that the scene lacks is NaN.

    Args:
        dataset: an episode's, with masks.
        array: (…, key) of `attention`.
        cameras: full names of cameras that have masks.
        roles: what to measure.
        fixed: as for `grounding`.
        exclude: keys that were left out of the attention; as patches they count as not visible.

    Returns:
        As `grounding`.
    """
    of_cameras = []
    for name in cameras:
        _, geometry, segment = camera_geometry(dataset, name)
        kept = np.ones(len(segment))
        kept[[key - segment.start for key in exclude if segment.start <= key < segment.stop]] = 0
        coverage, shown = _places(dataset, array, name, geometry, roles, kept)
        heat = on_grid(array, geometry, segment).stack(patch=("grid_y", "grid_x"), create_index=False)
        centre = xr.DataArray(_gaussian(geometry), dims="patch") * shown
        found = {
            "value": _measured(heat, heat, coverage, shown, geometry),
            # By rank no visible patch stands before another, however little of it shows the image.
            "uniform": _measured(shown, (shown > 0).astype(float), coverage, shown, geometry),
            # Rounded, so that patches that are as far from the centre as each other tie.
            "centre": _measured(centre, centre.round(9), coverage, shown, geometry),
        }
        if fixed is not None:
            own = fixed[name].stack(patch=("grid_y", "grid_x"), create_index=False)
            of_fixed = _measured(own, own, coverage, shown, geometry)
            found["fixed"] = of_fixed.transpose(*found["value"].dims)
        of_camera = xr.Dataset({kind: values.drop_vars(_stray(values)) for kind, values in found.items()})
        visible = (coverage.sum("patch") > 0).drop_vars(_stray(coverage))
        of_cameras.append(of_camera.assign(visible=visible))
    result = xr.concat(of_cameras, "camera", coords="minimal", compat="override", join="override")
    result = result.assign_coords(camera=list(cameras), role=list(roles), metric=list(METRICS))
    result = result.transpose(..., "camera", "role", "metric")
    for kind, text in {"value": "the policy's map", **CHANCES}.items():
        if kind in result:
            result[kind].attrs = {"long_name": text, "units": "1; patches for centre_distance"}
    result["visible"].attrs = {"long_name": "whether the mask is visible at all"}
    chosen = ("query", "layer", "denoise_step", "head", "left_out", "source")
    result.attrs = {name: array.attrs[name] for name in chosen if name in array.attrs}
    return result


def mean_maps(
    episodes: Iterable[xr.Dataset],
    *,
    cameras: Sequence[str] | None = None,
    each_head: bool = False,
    **where: Unpack[Where],
) -> dict[str, xr.DataArray]:
    """Return the policy's mean map of each camera: over an episode's inferences, then over the episodes.

    Each map is divided by its sum over the camera's patches first. No more than a block of inferences is held
    at a time.

    Args:
        episodes: datasets, of which none should be the one that the maps are to be compared with.
        cameras: their names or the ends of them; by default all that showed an image.
        each_head: the mean over heads and every single one, labelled "mean", "0", "1", and so on; `where`
            says no head then.
        where: what to look at, see `Where`; neither its frame nor its inference.

    Returns:
        Camera → (…, grid_y, grid_x), shares of the attention on that camera.

    Raises:
        SelectionError: no episode, cameras of different grids, or as `attention`.
    """
    total: dict[str, xr.DataArray] = {}
    n_episodes = 0
    for dataset in episodes:
        names = [camera_geometry(dataset, name)[0] for name in cameras or camera_names(dataset)]
        own = episode_map(dataset, names, each_head=each_head, **where)
        for name in names:
            if name in total and total[name].shape != own[name].shape:
                raise SelectionError(
                    f"camera {name}: maps of {own[name].shape} and {total[name].shape}, expected one shape; "
                    "average episodes of one policy"
                )
            total[name] = total[name] + own[name] if name in total else own[name]
        n_episodes += 1
    if not n_episodes:
        raise SelectionError("the mean map: got no episodes, expected one at least")
    return {name: values / n_episodes for name, values in total.items()}


def episode_map(
    dataset: xr.Dataset, cameras: Sequence[str], *, each_head: bool = False, **where: Unpack[Where]
) -> dict[str, xr.DataArray]:
    """Return one episode's mean map of each camera, (…, grid_y, grid_x); see `mean_maps`."""
    found: dict[str, xr.DataArray] = {}
    grids = {name: camera_geometry(dataset, name)[1:] for name in cameras}

    def patches(view: xr.Dataset, array: xr.DataArray) -> xr.DataArray:
        array = with_mean_head(array) if each_head else array
        parts = [on_grid(array, *grids[name]) for name in cameras]
        shares = [part / part.sum(("grid_y", "grid_x"), skipna=False) for part in parts]
        flat = [part.stack(patch=("grid_y", "grid_x"), create_index=False) for part in shares]
        return xr.concat(flat, "patch", coords="minimal", compat="override")

    for _, values in measured(
        dataset, [Measure("map", patches, of_attention=True)], "inference", _every(where, each_head)
    ):
        start = 0
        for name, (geometry, segment) in grids.items():
            part = values.isel(patch=slice(start, start + len(segment))).sum("inference", skipna=False)
            shape = (*part.shape[:-1], geometry.grid_rows, geometry.grid_columns)
            block = xr.DataArray(part.values.reshape(shape), dims=(*part.dims[:-1], "grid_y", "grid_x"))
            kept = {dim: part[dim] for dim in part.dims if dim in part.coords}
            block = block.assign_coords(kept)
            found[name] = found[name] + block if name in found else block
            start += len(segment)
    return {name: values / dataset.sizes["inference"] for name, values in found.items()}


def with_mean_head(array: xr.DataArray) -> xr.DataArray:
    """Return attention of every head with the mean over them before; `head` is "mean", "0" and so on."""
    labels = [MEAN_HEAD, *map(str, array["head"].values.tolist())]
    joined = xr.concat(
        [array.mean("head", skipna=False).expand_dims("head"), array.drop_vars("head")], "head"
    )
    return joined.transpose(*array.dims).assign_coords(head=labels).assign_attrs(array.attrs)


def better_chance(metric: str, levels: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the chance level that is harder to beat, element by element, of those that are not NaN."""
    stack = np.stack(np.broadcast_arrays(*levels))
    better = np.fmin if metric in LOWER_IS_BETTER else np.fmax
    found: NDArray[Any] = better.reduce(stack)
    return found


def mask_source(dataset: xr.Dataset) -> str:
    """Return where the masks are from, e.g. "mujoco"; "" where the episode does not say."""
    said = said_of(dataset).get("segmentation")
    return str(said.get("source", "")) if isinstance(said, Mapping) else ""


def _every(where: Where, each_head: bool) -> dict[str, Any]:
    if each_head and where.get("head") is not None:
        raise SelectionError(f"got each_head and head={where['head']!r}, expected one of them")
    return {**where, "head": "all"} if each_head else {**where}


def _checked_cameras(dataset: xr.Dataset, scene: Scene, cameras: Sequence[str] | None) -> list[str]:
    if cameras is None:
        return [*scene.cameras]
    names = [camera_geometry(dataset, camera)[0] for camera in cameras]
    for name in names:
        if name not in scene.cameras:
            raise SelectionError(
                f"camera {name!r} has no masks; those with masks: {', '.join(scene.cameras)}"
            )
    return names


def _checked_roles(scene: Scene, roles: Sequence[str] | None) -> list[str]:
    for role in roles or ():
        if role not in scene.roles:
            raise SelectionError(f"role {role!r}: the scene has {', '.join(scene.roles) or 'none'}")
    return [*scene.roles] if roles is None else [*roles]


def _places(
    dataset: xr.Dataset,
    array: xr.DataArray,
    camera: str,
    geometry: ImageGeometry,
    roles: Sequence[str],
    kept: NDArray[np.float64],
) -> tuple[xr.DataArray, xr.DataArray]:
    """Return (…, role, patch) how much of a patch a role covers, and (…, patch) how much shows the image."""
    if "frame" in array.coords:
        inferences = dataset["frame_inference"].values[array["frame"].values]
        along = array["frame"].dims
    else:
        inferences, along = array["inference"].values, array["inference"].dims
    masks = dataset["segmentation"].isel(mask_camera=dataset["mask_camera"].values.tolist().index(camera))
    masks = masks.drop_vars(list(masks.coords)).isel(inference=xr.DataArray(inferences, dims=along))
    instance_roles = dataset["instance_role"].values
    numbers = [np.flatnonzero(instance_roles == role) for role in roles]

    def cover(mask: NDArray[Any]) -> NDArray[np.float64]:
        """Return (…, role + 1, patch); the last is what shows the image."""
        layers = np.stack([*(np.isin(mask, of_role) for of_role in numbers), mask != UNKNOWN], axis=-3)
        covered = patch_coverage(layers, geometry)
        flat: NDArray[np.float64] = covered.reshape(*covered.shape[:-2], -1) * kept
        return flat

    covered = xr.apply_ufunc(
        cover,
        masks,
        input_core_dims=[["mask_y", "mask_x"]],
        output_core_dims=[["role", "patch"]],
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={
            "output_sizes": {"role": len(roles) + 1, "patch": len(kept)},
            "allow_rechunk": True,
        },
    )
    return covered.isel(role=slice(0, len(roles))), covered.isel(role=-1)


def _measured(
    heat: xr.DataArray,
    ranking: xr.DataArray,
    coverage: xr.DataArray,
    shown: xr.DataArray,
    geometry: ImageGeometry,
) -> xr.DataArray:
    """Return (…, role, metric) of maps (…, patch); `ranking` (…, patch) says which patches come first."""
    rows, columns = np.divmod(np.arange(geometry.grid_rows * geometry.grid_columns), geometry.grid_columns)
    centres = np.stack([rows, columns], axis=-1) + 0.5
    result: xr.DataArray = xr.apply_ufunc(
        lambda *arrays: measure_maps(*arrays, centres=centres),
        heat,
        ranking,
        coverage,
        shown,
        input_core_dims=[["patch"], ["patch"], ["role", "patch"], ["patch"]],
        output_core_dims=[["role", "metric"]],
        join="override",
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"output_sizes": {"metric": len(METRICS)}, "allow_rechunk": True},
    )
    return result


def measure_maps(
    heat: NDArray[Any],
    ranking: NDArray[Any],
    coverage: NDArray[np.float64],
    shown: NDArray[np.float64],
    *,
    centres: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return (…, role, metric) of maps; leading dimensions broadcast.

    Args:
        heat: (…, patch) attention, not negative; its sum does not matter.
        ranking: (…, patch) by which the most attended patches are found; mostly the same.
        coverage: (…, role, patch) share of each patch's area that the mask covers.
        shown: (…, patch) share of each patch's area that shows the image, and of which it is known what.
        centres: (patch, 2) row and column of each patch's centre, in patches.
    """
    visible = shown > 0
    inside = coverage / np.where(visible, shown, 1)[..., None, :]
    share = np.where(visible, heat, 0).astype(np.float64)
    total = share.sum(-1, keepdims=True)
    share = share / np.where(total > 0, total, np.nan)
    mask_area = coverage.sum(-1)
    area = mask_area / np.where(visible.any(-1), shown.sum(-1), np.nan)[..., None]
    mass = _over_patches(share, inside)
    with np.errstate(divide="ignore", invalid="ignore"):
        concentration = (mass / area) / ((1 - mass) / (1 - area))

    # Patches of the same attention share the places that are left for them.
    order = np.where(visible, ranking, -np.inf)
    order, _ = np.broadcast_arrays(order, share)
    n_top = np.broadcast_to(
        np.maximum(1, np.round(_TOP_SHARE * visible.sum(-1, keepdims=True))), order[..., :1].shape
    )
    last = np.take_along_axis(-np.sort(-order, axis=-1), n_top.astype(int) - 1, axis=-1)
    above, tied = order > last, (order == last) & visible
    places = (n_top - above.sum(-1, keepdims=True)) / np.maximum(1, tied.sum(-1, keepdims=True))
    top = above + tied * places
    shared = _over_patches(top, coverage)
    union = (top * shown).sum(-1)[..., None] + mask_area - shared
    peak = (order == order.max(-1, keepdims=True)) & visible
    peak = peak / np.maximum(1, peak.sum(-1, keepdims=True))
    hit = _over_patches(peak, (coverage > 0).astype(np.float64))

    with np.errstate(invalid="ignore", divide="ignore"):
        centroid = coverage @ centres / mask_area[..., None]
        iou = shared / union
    away = share @ centres
    distance = np.sqrt(((away[..., None, :] - centroid) ** 2).sum(-1))
    found = np.stack(np.broadcast_arrays(mass, concentration, iou, hit, distance), axis=-1)
    missing = np.isnan(share).any(-1)[..., None] | ~(mask_area > 0)
    result: NDArray[np.float64] = np.where(missing[..., None], np.nan, found)
    return result


def _over_patches(weights: NDArray[Any], places: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.einsum("...p,...rp->...r", weights, places)
    return found


def _gaussian(geometry: ImageGeometry) -> NDArray[np.float64]:
    """Return (patch,) the density of the centre prior at each patch's centre."""
    g = geometry
    densities = []
    for pad, resized, whole, patches in (
        (g.pad_top_px, g.resized_height_px, g.input_height_px, g.grid_rows),
        (g.pad_left_px, g.resized_width_px, g.input_width_px, g.grid_columns),
    ):
        centres = (np.arange(patches) + 0.5) * whole / patches
        away = (centres - pad - resized / 2) / (CENTRE_SIGMA * max(1, resized))
        densities.append(np.exp(-(away**2) / 2))
    return np.outer(*densities).ravel()


def _stray(array: xr.DataArray) -> list[Any]:
    """Return the coordinates that belong to patches, or to nothing that is left."""
    return [name for name in array.coords if str(name).startswith(("key_", "grid_", "mask_"))]
