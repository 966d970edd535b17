"""Attention inside the vision tower: what each patch of a camera's image attends to in that image.

    attention_from_patch(data, (12, 20), "image", frame=12, layer=-1)  # (grid_y, grid_x): what goes with it
    vision_rollout(data, (12, 20), "image", frame=12)                  # the same, followed through all layers

The tower runs once for each camera and each inference, before words and actions; its patches may be finer
than the camera's tokens (SmolVLA makes one token of 4 × 4 patches). Draws nothing; opens no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.labels import from_end, in_words, picked, policy_count, ranges, stored_labels
from lerobot_attn.analysis.reduce import over_heads
from lerobot_attn.analysis.rows import Rows
from lerobot_attn.analysis.select import HeadChoice, Labels, LayerChoice
from lerobot_attn.analysis.spatial import camera_geometry
from lerobot_attn.errors import SelectionError, StoreError
from lerobot_attn.layout import ImageGeometry

VISION = "vision_attention"
_HOW = "record a policy that has a vision transformer with --eval.attention.vision_layers=[-1] (or all)"

Patch = tuple[int | Sequence[int], int | Sequence[int]]


class VisionWhere(TypedDict, total=False):
    """What to look at in the vision tower; every key has a default, as in `Where`.

    Keys:
        frame: frame number(s), or "all": the inference that gave the frame's action.
        inference: inference number(s), or "all"; the default where no frame is given.
        layer: labels of the tower's layers, negative from its last; by default the last stored one; "all" or
            "mean" for every stored one.
        head: labels of the tower's own heads, "all", "mean" (default) or "max".
    """

    frame: Labels | None
    inference: Labels | None
    layer: LayerChoice
    head: HeadChoice


class VisionCamera(NamedTuple):
    """A camera as the vision tower saw it.

    Attributes:
        name: its full name.
        geometry: where the tower's patches lie on its image; the grid is the tower's own.
        position: of the camera in the store's maps.
    """

    name: str
    geometry: ImageGeometry
    position: int


def vision_geometry(dataset: xr.Dataset, camera: str | None = None) -> VisionCamera:
    """Find a camera by its name or the end of it, and where the vision tower's patches lie on its image.

    Raises:
        SelectionError: no such camera, or vision attention was not captured.
        StoreError: the dataset's patches are no grid.
    """
    if VISION not in dataset:
        raise SelectionError(f"vision attention was not captured; {_HOW}")
    name, geometry, _ = camera_geometry(dataset, camera)
    cameras = dataset["camera"].values.tolist()
    if name not in cameras:
        raise SelectionError(f"camera {name!r} has no vision attention; stored are {', '.join(cameras)}")
    rows, columns = (int(dataset[axis].values.max(initial=-1)) + 1 for axis in ("patch_row", "patch_column"))
    n_patches = dataset.sizes["patch_key"]
    if rows * columns != n_patches:
        raise StoreError(f"the dataset's {n_patches} vision patches are no grid of {rows} x {columns}")
    return VisionCamera(name, replace(geometry, grid_rows=rows, grid_columns=columns), cameras.index(name))


def vision_attention(
    dataset: xr.Dataset, camera: str | None = None, **where: Unpack[VisionWhere]
) -> xr.DataArray:
    """Select the attention of a camera's patches among each other by label.

    Args:
        dataset: an episode's.
        camera: its name or the end of it; the first one by default.
        where: what to look at, see `VisionWhere`.

    Returns:
        (frame or inference, vision_layer, vision_head, patch_query, patch_key) without the dimensions that
        were dropped or reduced: float32 share of attention, lazy where the dataset is. Rows sum to 1 over
        patch_key (not with `head="max"`).

    Raises:
        SelectionError: no such camera, vision attention was not captured, or no such frame, layer, …
    """
    return _Choice.of(dataset, camera, **where).maps()


def attention_from_patch(
    dataset: xr.Dataset, patch: Patch, camera: str | None = None, **where: Unpack[VisionWhere]
) -> xr.DataArray:
    """Return what a patch, or an area of patches on average, attends to in its image.

    Args:
        dataset: an episode's.
        patch: (row, column) in the vision tower's grid, from (0, 0) at the top left; each a number, or a list
            of them for an area.
        camera: its name or the end of it; the first one by default.
        where: what to look at, see `VisionWhere`.

    Returns:
        (…, grid_y, grid_x) float32 share of the patch's attention, lazy where the dataset is. The geometry of
        the grid is that of `vision_geometry`. Attributes say in words what was chosen.

    Raises:
        SelectionError: no such patch or camera, vision attention was not captured, or no such frame, …
    """
    choice = _Choice.of(dataset, camera, **where)
    queries, said = _queries(choice.camera.geometry, patch)
    attended = choice.maps(queries).mean("patch_query", skipna=False)
    return choice.on_grid(attended, said)


def vision_rollout(
    dataset: xr.Dataset, patch: Patch, camera: str | None = None, **where: Unpack[VisionWhere]
) -> xr.DataArray:
    """Follow a patch's attention down through the vision tower's layers, to the patches that came in.

    Attention rollout of Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers"
    (arXiv:2005.00928): half of a patch's next state is taken to be its own (the residual connection), half
    what it attends to, A' = A/2 + I/2, and these are multiplied through the layers. Rows of A are first
    rescaled to sum to 1, which undoes the store's rounding. Values, MLPs and norms are ignored.

    Args:
        dataset: an episode's.
        patch: as for `attention_from_patch`: where at the output of the layer to begin.
        camera: its name or the end of it; the first one by default.
        where: what to look at, see `VisionWhere`; `layer` is one number, and the layers below it are needed
            too. `head` is a number, "mean" or "max" (of the maps, before they are multiplied).

    Returns:
        (…, grid_y, grid_x) float32 share of the input patches, computed; sums to 1.

    Raises:
        SelectionError: as `attention_from_patch`; or a layer up to the one asked for was not stored, or
            several layers or heads were asked for.
    """
    top = where.get("layer")
    if not (top is None or isinstance(top, int | np.integer)):
        raise SelectionError(f"rollout begins at the output of one layer, got {top!r}, expected a number")
    if isinstance(head := where.get("head", "mean"), str) and head == "all":
        raise SelectionError("rollout is of one map a layer: expected one head, 'mean' or 'max', got 'all'")
    choice = _Choice.of(dataset, camera, **where)
    stored, last = dataset["vision_layer"].values.tolist(), int(np.max(choice.layers))
    absent = [layer for layer in range(last + 1) if layer not in stored]
    if absent:
        raise SelectionError(
            f"rollout needs every vision layer up to {last}; not saved are {ranges(absent)}; record with "
            "--eval.attention.vision_layers=all"
        )
    queries, said = _queries(choice.camera.geometry, patch)
    n_patches = dataset.sizes["patch_key"]
    start: NDArray[np.float32] = np.zeros(n_patches, np.float32)
    start[queries] = 1 / len(queries)
    pieces = []
    for number in dict.fromkeys(choice.rows.inferences.tolist()):
        share = start
        for layer in range(last, -1, -1):
            one = replace(choice, rows=Rows.of(dataset, None, number), layer=layer, layers=layer)
            maps: NDArray[np.float32] = one.maps().values
            maps = maps / maps.sum(axis=-1, keepdims=True)
            share = (share / 2 + share @ maps / 2).astype(np.float32)
        pieces.append(xr.DataArray(share, dims="patch_key"))
    back = [list(dict.fromkeys(choice.rows.inferences.tolist())).index(n) for n in choice.rows.inferences]
    joined = xr.concat(pieces, "inference").isel(inference=back)
    result = choice.on_grid(choice.rows.label(joined), said)
    result.attrs |= {"long_name": "attention rollout in the vision tower", "layer": f"vision layers 0-{last}"}
    return result


@dataclass(frozen=True)
class _Choice:
    """What was chosen of the vision attention, checked."""

    dataset: xr.Dataset
    camera: VisionCamera
    rows: Rows
    layer: LayerChoice
    layers: int | list[int]
    head: HeadChoice
    heads: int | list[int]

    @classmethod
    def of(
        cls,
        dataset: xr.Dataset,
        camera: str | None = None,
        *,
        frame: Labels | None = None,
        inference: Labels | None = None,
        layer: LayerChoice = None,
        head: HeadChoice = "mean",
    ) -> _Choice:
        found = vision_geometry(dataset, camera)
        layers = stored_labels(dataset, "vision_layer", layer, "n_vision_layers")
        heads = stored_labels(dataset, "vision_head", head, "n_vision_heads", ("all", "mean", "max"))
        return cls(dataset, found, Rows.of(dataset, frame, inference), layer, layers, head, heads)

    def maps(self, queries: Sequence[int] | None = None) -> xr.DataArray:
        """Select (…, vision_layer, vision_head, patch_query, patch_key) of the camera, reduced as chosen."""
        unique, back = np.unique(self.rows.inferences, return_inverse=True)
        array = self.dataset[VISION].isel(camera=self.camera.position, drop=True).isel(inference=unique)
        array = picked(array, "vision_layer", self.layers)
        if not isinstance(self.head, str):
            array = picked(array, "vision_head", self.heads)
        if queries is not None:
            array = array.isel(patch_query=list(queries))
        array = array.astype(np.float32)
        if isinstance(self.layer, str) and self.layer == "mean":
            array = array.mean("vision_layer", skipna=False)
        array = over_heads(array, self.head, "vision_head")
        result = self.rows.label(array.isel(inference=back))
        result.attrs = self.attributes()
        return result

    def on_grid(self, array: xr.DataArray, query: str) -> xr.DataArray:
        """Arrange (…, patch_key) by the rows and columns of the patches: (…, grid_y, grid_x)."""
        grid = self.camera.geometry.grid_rows, self.camera.geometry.grid_columns
        array = array.transpose(..., "patch_key")
        coords = {
            name: array.coords[name] for name in array.coords if "patch_key" not in array.coords[name].dims
        }
        data = array.data.reshape((*array.shape[:-1], *grid))
        result = xr.DataArray(data, coords, (*array.dims[:-1], "grid_y", "grid_x"))
        result.attrs = self.attributes() | {"query": query, "camera": self.camera.name}
        return result

    def attributes(self) -> dict[str, Any]:
        return {
            "long_name": "attention in the vision tower",
            "units": "share of attention",
            "source": VISION,
            "query": "every patch",
            "layer": in_words("vision layer", self.layer, self.layers),
            "head": in_words("head", self.head, self.heads, policy_count(self.dataset, "n_vision_heads")),
            "left_out": "",
        }


def _queries(geometry: ImageGeometry, patch: Patch) -> tuple[list[int], str]:
    """Return the numbers of the patches of an area, and the area in words."""
    try:
        sides = [np.atleast_1d(from_end("patch", side, 0)).tolist() for side in patch]
    except TypeError:
        sides = []
    if len(sides) != 2 or not all(sides):
        raise SelectionError(f"patch {patch!r}: expected a row and a column, as (12, 20)")
    limits = geometry.grid_rows, geometry.grid_columns
    for name, found, limit in zip(("row", "column"), sides, limits, strict=True):
        for value in found:
            if not 0 <= value < limit:
                raise SelectionError(
                    f"patch {name} {value} does not exist: the vision tower has {limits[0]} x {limits[1]} "
                    f"patches of an image, expected 0 to {limit - 1}"
                )
    rows, columns = sides
    said = f"row {ranges(rows)}, column {ranges(columns)}"
    several = len(rows) * len(columns) > 1
    return (
        [row * geometry.grid_columns + column for row in rows for column in columns],
        f"mean of patches at {said}" if several else f"patch at {said}",
    )
