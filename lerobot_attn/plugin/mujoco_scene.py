"""Instance masks of a robosuite environment, of the very moment that its pictures show.

    scene = RobosuiteScene(env)      # robosuite's environment, in the process in which it runs
    scene.watch()                    # before whatever takes pictures: a step, a reset to a state
    scene.masks({"image": "agentview"}, size_px=(256, 256))

A picture is taken inside an environment step, before its last physics step ends: what is drawn afterwards is
not quite what the policy saw. So the abstract scene of each picture is kept (`mjv_updateScene`, 60 µs) and
drawn as segmentation only when masks are asked for. Nothing that the simulation computes with is written.

robosuite 1.4 can draw segmentations too, but under NumPy 2 its `read_pixels` computes ids in uint8, where
they overflow. Knows no task and no policy.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

BACKGROUND = "background"
_MOST_GEOMS = 1000  # of an abstract scene, as robosuite has it
_OPAQUE = 0.5  # what is more transparent than that does not hide what is behind it


def picture_of(scene: Any, context: Any, size_px: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw an abstract scene as a camera shows it, in the OpenGL context that is current.

    Args:
        scene: mujoco.MjvScene.
        context: mujoco.MjrContext.
        size_px: (height, width).

    Returns:
        (height, width, 3) uint8; rows from the bottom, as MuJoCo draws.
    """
    return _rendered(scene, context, size_px, segmented=False)


def mask_of(
    scene: Any,
    context: Any,
    size_px: tuple[int, int],
    instance_of: Mapping[int, NDArray[np.int16]],
) -> NDArray[np.int16]:
    """Draw which instance each pixel of an abstract scene shows, in the OpenGL context that is current.

    Args:
        scene: mujoco.MjvScene; what is nearly transparent is taken out of its segmentation.
        context: mujoco.MjrContext.
        size_px: (height, width).
        instance_of: MuJoCo's type of an object → (object,) the instance that each is a part of. What is of
            another type hides nothing.

    Returns:
        (height, width) int16; 0 where nothing of an instance is; rows from the bottom, as MuJoCo draws.
    """
    by_pixel = np.zeros(scene.maxgeom + 1, np.int16)  # by what a pixel says: 0 is nothing
    for geom in scene.geoms[: scene.ngeom]:
        instances = instance_of.get(geom.objtype)
        if instances is None or geom.rgba[3] < _OPAQUE:
            geom.segid = -1  # MuJoCo leaves it out: robosuite hides its markers by their colour
        elif geom.segid >= 0:
            by_pixel[geom.segid + 1] = instances[geom.objid]
    pixels = _rendered(scene, context, size_px, segmented=True)
    ids = pixels.astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)
    mask: NDArray[np.int16] = by_pixel[ids]
    return mask


def _rendered(scene: Any, context: Any, size_px: tuple[int, int], *, segmented: bool) -> NDArray[np.uint8]:
    height, width = size_px
    viewport = mujoco.MjrRect(0, 0, width, height)
    for flag in (mujoco.mjtRndFlag.mjRND_SEGMENT, mujoco.mjtRndFlag.mjRND_IDCOLOR):
        scene.flags[flag] = segmented
    mujoco.mjr_render(viewport, scene, context)
    pixels = np.empty((height, width, 3), np.uint8)
    mujoco.mjr_readPixels(pixels, None, viewport, context)
    return pixels


class _Picture(NamedTuple):
    """The moment of a camera's newest picture."""

    scene: Any  # mujoco.MjvScene: every geom where it was, seen from the camera
    positions: NDArray[np.float32]  # (instance, 3), m


class RobosuiteScene:
    """What the cameras of a robosuite environment show.

    Args:
        env: robosuite's environment, after its first reset. Its simulation may be replaced later on.
    """

    def __init__(self, env: Any):
        self.env = env
        self._sim: Any = lambda: None  # a weak reference: robosuite frees a simulation's context with it
        self._pictures: dict[str, _Picture] = {}

    @property
    def robots(self) -> tuple[str, ...]:
        """Names of the instances that are parts of a robot: arm, mount, gripper."""
        return tuple(model.name for robot in self.env.model.mujoco_robots for model in (robot, *robot.models))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all instances: the background, the objects, the robot's parts."""
        return (BACKGROUND, *(model.name for model in self.env.model.mujoco_objects), *self.robots)

    @property
    def cameras(self) -> tuple[str, ...]:
        """MuJoCo's names of the cameras."""
        return tuple(self.env.sim.model.camera_names)

    def watch(self) -> None:
        """Keep the scene of every picture that the simulation takes from now on; once is enough."""
        sim = self.env.sim
        if self._sim() is sim:
            return
        self._sim, self._pictures = weakref.ref(sim), {}
        take = sim.render

        def render(*args: Any, **kwargs: Any) -> Any:
            picture = take(*args, **kwargs)
            if kwargs.get("camera_name") is not None:
                self._keep(kwargs["camera_name"])
            return picture

        sim.render = render

    def masks(self, cameras: Mapping[str, str], size_px: tuple[int, int]) -> dict[str, NDArray[np.int16]]:
        """Draw what cameras showed in their newest pictures.

        Args:
            cameras: name of the mask → MuJoCo's name of the camera.
            size_px: (height, width).

        Returns:
            name → (height, width) int16, an index into `names`; rows from the bottom, as MuJoCo draws.
        """
        self.watch()
        return {name: self._draw(self._picture(camera), size_px) for name, camera in cameras.items()}

    def picture(self, camera: str, size_px: tuple[int, int]) -> NDArray[np.uint8]:
        """Draw a camera's newest picture once more: (height, width, 3) uint8, rows from the bottom."""
        self.watch()
        context = self.env.sim._render_context_offscreen.con
        return picture_of(self._picture(camera).scene, context, size_px)

    def positions(self, camera: str) -> NDArray[np.float32]:
        """Return (instance, 3) float32, m in the world's frame, at a camera's newest picture."""
        self.watch()
        return self._picture(camera).positions

    def _picture(self, camera: str) -> _Picture:
        if camera not in self._pictures:  # taken before anybody watched, and nothing has moved since
            context = self.env.sim._render_context_offscreen
            context.cam.fixedcamid = self.env.sim.model.camera_name2id(camera)
            self._keep(camera)
        return self._pictures[camera]

    def _keep(self, camera: str) -> None:
        sim, before = self.env.sim, self._pictures.get(camera)
        model, data, context = sim.model._model, sim.data._data, sim._render_context_offscreen
        scene = mujoco.MjvScene(model, maxgeom=_MOST_GEOMS) if before is None else before.scene
        mujoco.mjv_updateScene(
            model, data, context.vopt, context.pert, context.cam, mujoco.mjtCatBit.mjCAT_ALL, scene
        )
        positions = np.full((len(self.names), 3), np.nan, np.float32)
        positions[1:] = data.xpos[self._root_bodies()]
        self._pictures[camera] = _Picture(scene, positions)

    def _root_bodies(self) -> list[int]:
        """Return the body of each instance but the background."""
        world = self.env.model
        models = [*world.mujoco_objects]
        models += [model for robot in world.mujoco_robots for model in (robot, *robot.models)]
        return [self.env.sim.model.body_name2id(model.root_body) for model in models]

    def _instance_of_body(self) -> NDArray[np.int16]:
        """Return (body,): the instance that each body is a part of; 0 where it is of none."""
        parents = self.env.sim.model._model.body_parentid
        found = np.zeros(len(parents), np.int16)
        roots = {body: number for number, body in enumerate(self._root_bodies(), 1)}
        for body in range(1, len(parents)):  # parents come first
            found[body] = roots.get(body, found[parents[body]])
        return found

    def _draw(self, picture: _Picture, size_px: tuple[int, int]) -> NDArray[np.int16]:
        sim, of_body = self.env.sim, self._instance_of_body()
        model = sim.model._model
        instance_of = {
            mujoco.mjtObj.mjOBJ_GEOM: of_body[model.geom_bodyid],
            mujoco.mjtObj.mjOBJ_SITE: of_body[model.site_bodyid],
        }
        # The current OpenGL context is the one in which the pictures were drawn: it is left as it is.
        return mask_of(picture.scene, sim._render_context_offscreen.con, size_px, instance_of)
