"""Which pixel shows which object: instance masks, the objects' roles in the task, and their share of a patch.

Pure data: knows neither a simulator nor torch nor a store. A simulator or a file fills it in; interventions
and the analysis read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.errors import ConfigError
from lerobot_attn.layout import ImageGeometry

# What a thing is in the task. "target" is what is to be moved, "destination" where it is to go, "distractor"
# any other object, "background" everything that is no object, furniture that no task speaks of included.
Role = Literal["target", "destination", "distractor", "robot", "background"]
ROLES: tuple[Role, ...] = get_args(Role)
UNKNOWN = -1  # in a mask: nobody knows what this pixel shows, e.g. because this camera has no mask


class Instance(NamedTuple):
    """One thing that a mask can show: its name, e.g. "alphabet_soup_1", and its role in the task."""

    name: str
    role: Role


@dataclass(frozen=True)
class SceneMasks:
    """What the cameras of one environment show at one moment, pixel by pixel.

    Attributes:
        instances: what a mask's numbers stand for; instance 0 is the background.
        masks: camera (the policy's name of it) → (height, width) int16, an index into `instances`, or
            `UNKNOWN`; oriented as the policy sees the camera, before its letterbox.
        positions: (instance, 3) float32, m, in the world's frame; NaN where it is not known.
    """

    instances: tuple[Instance, ...]
    masks: Mapping[str, NDArray[np.int16]]
    positions: NDArray[np.float32] | None = None

    def of_role(self, camera: str, role: Role) -> NDArray[np.bool_]:
        """Return (height, width) bool: where a camera shows something of a role.

        Raises:
            ConfigError: there is no mask of the camera, or nothing of that role in the scene.
        """
        if camera not in self.masks:
            held = ", ".join(self.masks) or "none"
            raise ConfigError(f"camera {camera!r} has no mask; expected one of: {held}")
        numbers = [number for number, instance in enumerate(self.instances) if instance.role == role]
        if not numbers:
            held = ", ".join(sorted({instance.role for instance in self.instances}))
            raise ConfigError(f"role {role!r}: the scene has nothing of it; expected one of {held}")
        return np.isin(self.masks[camera], numbers)


def patch_coverage(mask: NDArray[np.bool_], geometry: ImageGeometry) -> NDArray[np.float64]:
    """Return (…, grid row, grid column): the share of each patch's area that lies in a mask, 0 to 1.

    Exact to the fraction of a pixel: a pixel at a patch's edge counts for each patch by its area there. What
    a patch shows of the letterbox's padding lies in no mask.

    Args:
        mask: (…, height, width) bool, of the camera's image. Its size may differ from the image's by a
            factor (a mask of half the resolution), which changes nothing but the precision.
        geometry: how the camera's image became the policy's patches.
    """
    g = geometry
    rows = _edges(mask.shape[-2], g.pad_top_px, g.resized_height_px, g.input_height_px, g.grid_rows)
    columns = _edges(mask.shape[-1], g.pad_left_px, g.resized_width_px, g.input_width_px, g.grid_columns)
    in_rows = _between(np.moveaxis(mask, -2, 0), rows)  # (grid row, …, width)
    in_patches = _between(np.moveaxis(in_rows, -1, 0), columns)  # (grid column, grid row, …)
    share = in_patches / (rows.patch_px * columns.patch_px)
    return np.moveaxis(share, (1, 0), (-2, -1))


class _Edges(NamedTuple):
    """Where patches begin and end along one side of a mask, in the mask's pixels: patch + 1 edges."""

    pixels: list[int]  # in which an edge lies; the number of pixels behind the last one
    parts: list[float]  # how much of that pixel lies before the edge, 0 to 1
    patch_px: float  # a patch's side, also of what it shows beside the picture


@lru_cache(maxsize=64)
def _edges(pixels: int, pad: int, resized: int, whole: int, patches: int) -> _Edges:
    # In whole numbers, so that an edge between two pixels is found there and takes nothing of either.
    unit = patches * resized
    places = [divmod((edge * whole - pad * patches) * pixels, unit) for edge in range(patches + 1)]
    inside = [(number, rest / unit) if 0 <= number < pixels else (number, 0.0) for number, rest in places]
    numbers = [min(max(number, 0), pixels) for number, _ in inside]
    return _Edges(numbers, [part for _, part in inside], whole * pixels / unit)


def _between(values: NDArray[Any], edges: _Edges) -> NDArray[np.float64]:
    """Return (patch, …): the sums of values (pixel, …) between each two edges.

    Sums rather than a product of matrices: after one, BLAS keeps its threads spinning, and a policy that
    infers on the CPU took half as long again.
    """
    kind = np.int32 if values.dtype == np.bool_ else np.float64
    last = len(values) - 1
    found = np.empty((len(edges.pixels) - 1, *values.shape[1:]))
    ends = list(zip(edges.pixels, edges.parts, strict=True))
    for patch, ((start, before), (stop, after)) in enumerate(pairwise(ends)):
        found[patch] = values[start:stop].sum(0, dtype=kind)
        if before:
            found[patch] -= before * values[start]
        if after:
            found[patch] += after * values[min(stop, last)]
    return found


def scaled(mask: NDArray[Any], size_px: tuple[int, int]) -> NDArray[np.int16]:
    """Return a mask in another (height, width): each pixel shows what lies at its centre."""
    if mask.shape == size_px:
        return mask.astype(np.int16, copy=False)
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size_px, mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)].astype(np.int16)


def in_words(instances: Sequence[Instance]) -> str:
    """Return the instances by role, in one line; the background last."""
    by_role = {role: [one.name for one in instances if one.role == role] for role in ROLES}
    return "; ".join(f"{role} {', '.join(names)}" for role, names in by_role.items() if names)


def check_role(role: Any, *, where: str) -> Role:
    """Return a role that somebody wrote.

    Raises:
        ConfigError: there is no such role.
    """
    if role not in ROLES:
        raise ConfigError(f"{where}: got role {role!r}, expected one of {', '.join(ROLES)}")
    found: Role = role
    return found


def instances_of(names: Sequence[str], roles: Mapping[str, str], *, where: str) -> tuple[Instance, ...]:
    """Return instances with the roles that were said of them; of the others, "distractor".

    Args:
        names: of the instances; the first is the background.
        roles: instance → role.
        where: what an error calls the roles' source.

    Raises:
        ConfigError: a role that does not exist, or one of an instance that does not.
    """
    for name, role in roles.items():
        check_role(role, where=f"{where}, {name}")
        if name not in names:
            raise ConfigError(f"{where}: got a role of {name!r}, expected one of {', '.join(names)}")
    given: dict[str, Any] = {names[0]: "background", **roles}
    return tuple(Instance(name, given.get(name, "distractor")) for name in names)
