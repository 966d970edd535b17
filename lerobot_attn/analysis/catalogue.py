"""The measures that runs are summarised and compared by, by name. Reads no run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import xarray as xr

from lerobot_attn.analysis.measures import attention_entropy, stability
from lerobot_attn.analysis.spatial import camera_geometry, camera_names
from lerobot_attn.analysis.tokens import by_modality, by_token
from lerobot_attn.errors import SelectionError


@dataclass(frozen=True)
class Measure:
    """Something to measure at each inference or frame.

    Attributes:
        name: what tables call it.
        function: called as `function(dataset, inference=[…], **where)`, or with `frame=[…]`, as any function
            of `lerobot_attn.analysis` is. The dataset is a view of a few inferences and their frames, both
            numbered from 0. It returns a DataArray with that dimension.
        quantity: what its values are, where its result has no dimension "quantity".
        n_before: how many inferences before those asked for the view must hold too, where there are any.
        of_attention: the function is called as `function(dataset, array)` instead, with what `attention`
            selects: read once for all such measures. With `n_before` the array begins with as many rows
            (inferences or frames) before those asked for, where there are any; what it does not return of
            those asked for is NaN.
    """

    name: str
    function: Callable[..., xr.DataArray]
    quantity: str = "value"
    n_before: int = 0
    of_attention: bool = False


AnyMeasure = str | Measure | Callable[..., xr.DataArray]


def _camera_entropy(dataset: xr.Dataset, array: xr.DataArray) -> xr.DataArray:
    """Return entropy (bit) and effective number of patches within each image: (…, camera, quantity)."""
    cameras = []
    for part in _camera_parts(dataset, array):
        of_camera = attention_entropy(part, ["key"])
        cameras.append(xr.concat([of_camera[name] for name in of_camera], "quantity", coords="minimal"))
    result = xr.concat(cameras, "camera", coords="minimal").transpose(..., "camera", "quantity")
    result.attrs = {"long_name": "entropy within the image"}
    return result.assign_coords(camera=camera_names(dataset), quantity=["entropy", "effective_number"])


def _camera_stability(dataset: xr.Dataset, array: xr.DataArray) -> xr.DataArray:
    """Return the overlap with the inference, or frame, before within each image: (…, camera)."""
    along = "frame" if "frame" in array.dims else "inference"
    cameras = []
    for part in _camera_parts(dataset, array):
        # The episode's first has none before it.
        alone = part.isel({along: slice(1, None)}).sum("key")
        cameras.append(stability(part, along, ["key"]) if part.sizes[along] > 1 else alone)
    result = xr.concat(cameras, "camera", coords="minimal").transpose(..., "camera")
    result.attrs = {"long_name": f"overlap with the previous {along} within the image", "units": "1"}
    return result.assign_coords(camera=camera_names(dataset))


def _camera_parts(dataset: xr.Dataset, array: xr.DataArray) -> list[xr.DataArray]:
    """Return attention on each camera's patches, (…, key)."""
    cameras: list[str | None] = [*camera_names(dataset)]
    segments = [camera_geometry(dataset, name)[2] for name in cameras or [None]]
    array = array.drop_vars([name for name in array.coords if str(name).startswith("key_")])
    return [array.isel(key=slice(segment.start, segment.stop)) for segment in segments]


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("modality_share", by_modality, "share", of_attention=True),
        Measure("token_attention", by_token, "share", of_attention=True),
        Measure("entropy", _camera_entropy, of_attention=True),
        Measure("stability", _camera_stability, "overlap", n_before=1, of_attention=True),
    )
}


OLD_NAMES = {"sharpness": "entropy"}  # of measures; they still work, and tables call them as they were asked


def find_measure(measure: AnyMeasure) -> Measure:
    """Return a measure by its name, old ones too; a function becomes one of its own name.

    Raises:
        SelectionError: unknown name.
    """
    if isinstance(measure, Measure):
        return measure
    if isinstance(measure, str):
        if measure in MEASURES:
            return MEASURES[measure]
        if measure in OLD_NAMES:
            return replace(MEASURES[OLD_NAMES[measure]], name=measure)
        raise SelectionError(f"measure {measure!r}: expected one of {', '.join(MEASURES)}, or a function")
    if not callable(measure):
        raise SelectionError(f"measure {measure!r}: expected a name or a function")
    inner: Any = measure
    while isinstance(inner, functools.partial):
        inner = inner.func
    return Measure(getattr(inner, "__name__", type(inner).__name__), measure)
