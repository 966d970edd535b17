"""Instance masks of any MuJoCo simulation: what stands in its world, by body.

    scene = BodyScene(model, data, sites=("goal",))      # mujoco.MjModel and mujoco.MjData
    scene.masks({"image": "corner2"}, size_px=(480, 480))

An instance is a body that stands in the world, with all that hangs on it: an arm with its gripper, a cube, a
door with its frame. A robot is told by what drives it: an actuator, or a weld to a body that is moved from
outside (mocap). What is drawn is what the simulation holds at that moment; nothing of it is written.

Pictures are drawn in a thread of its own, because an OpenGL context is current in one thread: that of the
environment stays the current one in its thread. dm_control draws in its own context, as it does otherwise: it
frees that at the end of the process, and a second one would have closed the display before. Knows no
environment, no task and no policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import mujoco
import numpy as np
from numpy.typing import NDArray

from lerobot_attn.plugin.mujoco_scene import BACKGROUND, mask_of, picture_of

_MOST_GEOMS = 10_000  # of an abstract scene, as mujoco.Renderer has it
T = TypeVar("T")


class BodyScene:
    """What the cameras of a MuJoCo simulation show.

    Args:
        model: mujoco.MjModel.
        data: mujoco.MjData of it.
        sites: names of sites of the world that are instances of their own: a goal that is drawn as a ball.
            One that is not there is left out, and one on a body is a part of that body's instance.
        physics: dm_control's physics that they are of, if it is dm_control that simulates.
    """

    def __init__(self, model: Any, data: Any, sites: Sequence[str] = (), physics: Any = None):
        self.model, self.data = model, data
        roots = [int(body) for body in np.flatnonzero(model.body_parentid == 0) if body]
        shown = {int(root) for root in model.body_rootid[model.geom_bodyid]}
        self._roots = [body for body in roots if body in shown]
        found = (mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, site) for site in sites)
        self._sites = [site for site in dict.fromkeys(found) if site >= 0 and not model.site_bodyid[site]]
        self._names = _told_apart(
            [BACKGROUND]
            + [_name(model, mujoco.mjtObj.mjOBJ_BODY, body) for body in self._roots]
            + [_name(model, mujoco.mjtObj.mjOBJ_SITE, site) for site in self._sites]
        )
        self._physics = physics
        self._painter: _Painter | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all instances: the background, the bodies that stand in the world, the sites."""
        return self._names

    @property
    def robots(self) -> tuple[str, ...]:
        """Names of the instances that are driven."""
        driven = set(self.model.body_rootid[_driven_bodies(self.model)].tolist())
        return tuple(name for name, root in zip(self._names[1:], self._roots, strict=False) if root in driven)

    @property
    def movable(self) -> tuple[str, ...]:
        """Names of the instances of which some part can move."""
        moving = set(self.model.body_rootid[self.model.jnt_bodyid].tolist())
        return tuple(name for name, root in zip(self._names[1:], self._roots, strict=False) if root in moving)

    @property
    def cameras(self) -> tuple[str, ...]:
        """MuJoCo's names of the cameras; those without a name are left out."""
        names = (self.model.camera(number).name for number in range(self.model.ncam))
        return tuple(name for name in names if name)

    def instance_at(self, position: NDArray[np.floating]) -> str:
        """Return the name of the instance whose body, geom or site is nearest to a position, robots left out.

        Args:
            position: (3,), m in the world's frame.
        """
        model, data, robots = self.model, self.data, self.robots
        owners = np.concatenate([np.arange(model.nbody), model.geom_bodyid, model.site_bodyid])
        distances = np.linalg.norm(
            np.concatenate([data.xpos, data.geom_xpos, data.site_xpos]) - position, axis=-1
        )
        of_body = self._instance_of_body()
        for owner in owners[np.argsort(distances, kind="stable")]:
            name = self._names[of_body[owner]]
            if name != BACKGROUND and name not in robots:
                return name
        return BACKGROUND

    def instance_of_site(self, site: str) -> str | None:
        """Return the name of the instance that a site is or is a part of; None: of none, or there is none."""
        number = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, site)
        if number < 0:
            return None
        instance = self._instance_of_site()[number]
        return self._names[instance] if instance else None

    def masks(self, cameras: Mapping[str, str], size_px: tuple[int, int]) -> dict[str, NDArray[np.int16]]:
        """Draw what cameras show now.

        Args:
            cameras: name of the mask → MuJoCo's name of the camera.
            size_px: (height, width).

        Returns:
            name → (height, width) int16, an index into `names`; rows from the bottom, as MuJoCo draws.
        """
        instance_of = {
            mujoco.mjtObj.mjOBJ_GEOM: self._instance_of_body()[self.model.geom_bodyid],
            mujoco.mjtObj.mjOBJ_SITE: self._instance_of_site(),
        }
        return {
            name: self._painted(
                camera, size_px, lambda scene, context: mask_of(scene, context, size_px, instance_of)
            )
            for name, camera in cameras.items()
        }

    def picture(self, camera: str, size_px: tuple[int, int]) -> NDArray[np.uint8]:
        """Draw what a camera shows now: (height, width, 3) uint8, rows from the bottom."""
        return self._painted(camera, size_px, lambda scene, context: picture_of(scene, context, size_px))

    def positions(self, camera: str | None = None) -> NDArray[np.float32]:
        """Return (instance, 3) float32, m in the world's frame, now, for whatever camera; NaN: background."""
        nowhere = np.full((1, 3), np.nan)
        places = [nowhere, self.data.xpos[self._roots], self.data.site_xpos[self._sites]]
        return np.concatenate(places).astype(np.float32)

    def close(self) -> None:
        """Let go of the OpenGL context."""
        if self._painter is not None:
            self._painter.close()
            self._painter = None

    def _instance_of_body(self) -> NDArray[np.int16]:
        """Return (body,): the instance that each body is a part of; 0 where it is of none."""
        of_root = np.zeros(self.model.nbody, np.int16)
        of_root[self._roots] = range(1, 1 + len(self._roots))
        found: NDArray[np.int16] = of_root[self.model.body_rootid]
        return found

    def _instance_of_site(self) -> NDArray[np.int16]:
        """Return (site,): the instance that each site is or is a part of; 0 where it is of none."""
        found = self._instance_of_body()[self.model.site_bodyid]
        found[self._sites] = range(1 + len(self._roots), len(self._names))
        return found

    def _painted(self, camera: str, size_px: tuple[int, int], draw: Callable[[Any, Any], T]) -> T:
        if self._painter is None:
            self._painter = _Painter(self.model) if self._physics is None else _DmPainter(self._physics)
        scene = self._painter.scene
        mujoco.mjv_updateScene(
            self.model,
            self.data,
            mujoco.MjvOption(),
            mujoco.MjvPerturb(),
            self._seen_from(camera),
            mujoco.mjtCatBit.mjCAT_ALL,
            scene,
        )
        return self._painter.paint(size_px, lambda context: draw(scene, context))

    def _seen_from(self, camera: str) -> Any:
        seen_from = mujoco.MjvCamera()
        seen_from.type = mujoco.mjtCamera.mjCAMERA_FIXED
        seen_from.fixedcamid = self.model.camera(camera).id
        return seen_from


class _Painter:
    """An OpenGL context for a model, current in a thread of its own.

    Attributes:
        scene: mujoco.MjvScene, to be filled.
    """

    def __init__(self, model: Any):
        self.scene = mujoco.MjvScene(model, maxgeom=_MOST_GEOMS)
        self._model = model
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lerobot_attn_masks")
        self._gl: Any = None
        self._context: Any = None

    def paint(self, size_px: tuple[int, int], draw: Callable[[Any], T]) -> T:
        """Call something with a mujoco.MjrContext that holds so many pixels."""
        return self._thread.submit(self._paint, size_px, draw).result()

    def close(self) -> None:
        self._thread.submit(self._close).result()
        self._thread.shutdown()

    def _paint(self, size_px: tuple[int, int], draw: Callable[[Any], T]) -> T:
        height, width = size_px
        if self._context is None:
            self._gl = mujoco.GLContext(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_150)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        largest = max(width, self._context.offWidth), max(height, self._context.offHeight)
        if largest != (self._context.offWidth, self._context.offHeight):
            mujoco.mjr_resizeOffscreen(*largest, self._context)
        return draw(self._context)

    def _close(self) -> None:
        if self._context is not None:
            self._context.free()
        if self._gl is not None:
            self._gl.free()
        self._context = self._gl = None


class _DmPainter(_Painter):
    """The OpenGL context in which dm_control draws a physics."""

    def __init__(self, physics: Any):
        self.scene = mujoco.MjvScene(physics.model.ptr, maxgeom=_MOST_GEOMS)
        self._physics = physics

    def paint(self, size_px: tuple[int, int], draw: Callable[[Any], T]) -> T:
        contexts = self._physics.contexts
        with contexts.gl.make_current() as current:
            context = contexts.mujoco.ptr
            current.call(mujoco.mjr_setBuffer, mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
            painted: T = current.call(draw, context)
        return painted

    def close(self) -> None:
        """Leave it to dm_control."""


def _driven_bodies(model: Any) -> list[int]:
    """Return the bodies on which an actuator acts, and those welded to a body that is moved from outside."""
    kinds, driven = mujoco.mjtTrn, list[int]()
    for kind, (target, _) in zip(model.actuator_trntype, model.actuator_trnid, strict=True):
        if kind in (kinds.mjTRN_JOINT, kinds.mjTRN_JOINTINPARENT):
            driven.append(model.jnt_bodyid[target])
        elif kind == kinds.mjTRN_TENDON:
            driven += _bodies_of_tendon(model, target)
        elif kind in (kinds.mjTRN_SITE, kinds.mjTRN_SLIDERCRANK):
            driven.append(model.site_bodyid[target])
        elif kind == kinds.mjTRN_BODY:
            driven.append(target)
    for equality in np.flatnonzero(model.eq_type == mujoco.mjtEq.mjEQ_WELD):
        ends = [int(model.eq_obj1id[equality]), int(model.eq_obj2id[equality])]
        if model.eq_objtype[equality] == mujoco.mjtObj.mjOBJ_SITE:
            ends = [int(model.site_bodyid[end]) for end in ends]
        if any(model.body_mocapid[end] >= 0 for end in ends):
            driven += [end for end in ends if model.body_mocapid[end] < 0]
    return [int(body) for body in driven]


def _bodies_of_tendon(model: Any, tendon: int) -> list[int]:
    start = model.tendon_adr[tendon]
    found = []
    for part in range(start, start + model.tendon_num[tendon]):
        if model.wrap_type[part] == mujoco.mjtWrap.mjWRAP_JOINT:
            found.append(model.jnt_bodyid[model.wrap_objid[part]])
        elif model.wrap_type[part] == mujoco.mjtWrap.mjWRAP_SITE:
            found.append(model.site_bodyid[model.wrap_objid[part]])
    return found


def _name(model: Any, kind: Any, number: int) -> str:
    name: str | None = mujoco.mj_id2name(model, kind, number)
    return name or f"{'body' if kind == mujoco.mjtObj.mjOBJ_BODY else 'site'}_{number}"


def _told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of which no two are the same: a body and a site may share one."""
    found: list[str] = []
    for name in names:
        while name in found:
            name += "_"
        found.append(name)
    return tuple(found)
