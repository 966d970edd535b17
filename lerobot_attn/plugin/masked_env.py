"""Any environment that simulates with MuJoCo, with one more method: the masks of its newest pictures.

    env = EnvWithMasks(gym.make("gym_aloha/AlohaInsertion-v0", …), number=0)
    env.lerobot_attn_masks()         # SceneMasks, or NoMasks with the reason

What simulates is looked for inside the environment: robosuite's environment, dm_control's `physics`, or a
MuJoCo model with its data. Which camera took a picture, and how the environment turned it, is found by
drawing each camera and comparing. Every later picture is compared too: an environment may take its pictures
before its step has ended, and then masks of what the simulation holds afterwards would not fit them.

It runs in the worker processes too, where the environments live, and raises nothing there: gymnasium ends a
worker that raises. Knows nothing of recordings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from lerobot_attn.masks import Instance, SceneMasks
from lerobot_attn.plugin.scene_roles import goal_sites, roles_in

METHOD = "lerobot_attn_masks"
_BELOW = ("_env", "env", "_physics")  # what environments call what they are built around
_DEEPEST = 8
# How an environment may turn a picture, as the axes of (row, column) that are flipped.
_TURNS: tuple[tuple[int, ...], ...] = ((), (0, 1), (0,), (1,))
# Mean difference of pixels, of 255. A camera's picture is drawn again exactly, or nearly if the environment
# scales it or draws with other settings.
_SAME = 4.0
_TELLS = 0.5  # by so much another turn must be worse
_STILL = 0.25  # by so much a later picture may be: the arm moved by about a pixel


class NoMasks(NamedTuple):
    """Why an environment has no masks of its newest pictures.

    Attributes:
        reason: in words.
        for_good: whether later pictures will have none either.
    """

    reason: str
    for_good: bool = True


class EnvFactory:
    """Builds an environment that can be asked for masks; can be sent to another process.

    Args:
        build: builds the environment. If it has the method already, it is left as it is.
        number: of the environment in its batch.
    """

    def __init__(self, build: Callable[[], Any], number: int):
        self._build, self._number = build, number

    def __call__(self) -> Any:
        """Build it."""
        env = self._build()
        if not isinstance(env, gym.Env) or env.has_wrapper_attr(METHOD):
            return env
        return EnvWithMasks(env, self._number)


class EnvWithMasks(gym.Wrapper[Any, Any, Any, Any]):
    """An environment whose observations, rewards and random numbers are what they are without this.

    Args:
        env: the environment.
        number: of the environment in its batch.
    """

    def __init__(self, env: gym.Env[Any, Any], number: int = 0):
        super().__init__(env)
        self._number = number
        self._pictures: dict[str, NDArray[np.uint8]] = {}
        self._is_over = False  # the simulation may have begun another episode than the pictures show
        self._scene: Any = None
        self._views: dict[str, _View] = {}

    def reset(self, **options: Any) -> Any:
        """Begin an episode."""
        observation, info = self.env.reset(**options)
        # LeRobot keeps an environment still whose episode has ended, and then a reset does not reach it.
        self._is_over = self.env.has_wrapper_attr("is_frozen") and self.env.get_wrapper_attr("is_frozen")
        self._pictures = _pictures_in(observation)
        return observation, info

    def step(self, action: Any) -> Any:
        """Take a step."""
        if hasattr(self._scene, "watch"):
            self._scene.watch()
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._is_over = bool(terminated or truncated)
        self._pictures = _pictures_in(observation)
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Let go of the simulation."""
        self._forget()
        super().close()

    def lerobot_attn_masks(
        self, environments: Collection[int] | None = None, cameras: Collection[str] | None = None
    ) -> SceneMasks | NoMasks | None:
        """Return the masks of the newest pictures, named and turned as these are in the observation.

        Args:
            environments: numbers of those in the batch whose masks are wanted; None: all.
            cameras: names of the pictures; None: all.

        Returns:
            None of an environment that is not wanted; the reason where there are no masks.
        """
        if environments is not None and self._number not in environments:
            return None
        try:
            return self._masks(cameras)
        except _MissingError as missing:
            return missing.why
        except Exception as error:  # whatever draws may fail, and must not end the worker
            return NoMasks(f"its masks cannot be drawn ({type(error).__name__}: {error})".replace("\n", " "))

    def _masks(self, cameras: Collection[str] | None) -> SceneMasks:
        parts = [*_inside(self.env.unwrapped)]
        scene = self._scene = self._scene_of(parts)
        wanted = {name: p for name, p in self._pictures.items() if cameras is None or name in cameras}
        masks = {}
        for name, picture in wanted.items():
            view = self._view(name, picture)
            (mask,) = scene.masks({name: view.camera}, picture.shape[:2]).values()
            masks[name] = np.ascontiguousarray(np.flip(np.flipud(mask), view.turn))
        roles = roles_in(parts, scene)
        instances = tuple(Instance(name, roles[name]) for name in scene.names)
        seen_from = next((self._views[name].camera for name in masks), None)
        return SceneMasks(instances, masks, None if seen_from is None else scene.positions(seen_from))

    def _scene_of(self, parts: list[Any]) -> Any:
        """Return what draws the simulation, the same one as long as the simulation is."""
        # First, because what is built around robosuite's environment may show its simulation too.
        robosuite = next((part for part in parts if _is_robosuite(part)), None)
        if robosuite is not None:
            if getattr(self._scene, "env", None) is not robosuite:
                from lerobot_attn.plugin.mujoco_scene import RobosuiteScene

                self._forget()
                return RobosuiteScene(robosuite)
            return self._scene
        for part in parts:
            found = _simulation_of(part)
            if found is None:
                continue
            model, data, physics = found
            if getattr(self._scene, "model", None) is not model or self._scene.data is not data:
                from lerobot_attn.plugin.mujoco_bodies import BodyScene

                self._forget()
                return BodyScene(model, data, goal_sites(parts), physics)
            return self._scene
        raise _MissingError(f"{type(self.env.unwrapped).__name__} shows no MuJoCo simulation")

    def _view(self, name: str, picture: NDArray[np.uint8]) -> _View:
        """Return which camera took a picture and how it was turned, checked on this very picture."""
        known = self._views.get(name)
        if known is None:
            known = self._views[name] = self._search(name, picture)
        elif not self._is_over:
            drawn = self._drawn(known.camera, picture)
            differs = _difference(drawn, picture, known.turn)
            if differs > known.differs + _STILL:
                raise _MissingError(
                    f"camera {known.camera} does not show what picture {name!r} shows (they differ by "
                    f"{differs:.2f} of 255 a pixel, by {known.differs:.2f} at first), so it was taken at "
                    "another moment, or changed",
                    for_good=False,
                )
        return known

    def _search(self, name: str, picture: NDArray[np.uint8]) -> _View:
        cameras = self._scene.cameras
        said = [getattr(part, "camera_name", None) for part in _inside(self.env.unwrapped)]
        likely = [camera for camera in dict.fromkeys([name, *map(str, said)]) if camera in cameras]
        found = [
            _View(camera, turn, _difference(drawn, picture, turn))
            for camera in dict.fromkeys([*likely, *cameras])
            for drawn in (self._drawn(camera, picture),)
            for turn in _TURNS
        ]
        best = min(found, key=lambda view: view.differs, default=None)
        if best is None or best.differs > _SAME:
            raise _MissingError(
                f"none of the simulation's cameras ({', '.join(cameras) or 'it has none with a name'}) shows "
                f"picture {name!r}"
                + (f" (the closest one differs by {best.differs:.1f} of 255 a pixel)" if best else "")
            )
        # Two cameras at one place show the same, and either will do.
        alike = [view for view in found if view.differs < best.differs + _TELLS]
        if any((view.turn, view.differs) != (best.turn, best.differs) for view in alike):
            raise _MissingError(
                f"which camera took picture {name!r}, and how it is turned, cannot be told from what it "
                "shows so far",
                for_good=False,
            )
        return best

    def _drawn(self, camera: str, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return cast(NDArray[np.uint8], np.flipud(self._scene.picture(camera, picture.shape[:2])))

    def _forget(self) -> None:
        if hasattr(self._scene, "close"):
            self._scene.close()
        self._scene = None


class _View(NamedTuple):
    """Which camera takes a picture of an observation."""

    camera: str  # MuJoCo's name
    turn: tuple[int, ...]  # axes that the environment flips
    differs: float  # the picture from what was drawn again, mean over pixels, of 255


class _MissingError(Exception):
    def __init__(self, reason: str, *, for_good: bool = True):
        super().__init__(reason)
        self.why = NoMasks(reason, for_good)


def _pictures_in(observation: Any) -> dict[str, NDArray[np.uint8]]:
    """Return the pictures of an observation under the names that LeRobot gives them, without its prefix."""
    pixels = observation.get("pixels") if isinstance(observation, Mapping) else None
    pictures = pixels if isinstance(pixels, Mapping) else {"observation.image": pixels}
    return {
        name: picture
        for name, picture in pictures.items()
        if isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[-1] == 3
    }


def _difference(drawn: NDArray[np.uint8], picture: NDArray[np.uint8], turn: tuple[int, ...]) -> float:
    return float(np.abs(np.flip(drawn, turn).astype(np.int16) - picture).mean())


def _inside(env: Any) -> Iterator[Any]:
    """Yield an environment and what it is built around, from the outside in."""
    for _ in range(_DEEPEST):
        yield env
        for name in _BELOW:
            below = getattr(env, name, None)
            if below is not None:
                env = below.unwrapped if isinstance(below, gym.Env) else below
                break
        else:
            return


def _is_robosuite(part: Any) -> bool:
    return hasattr(part, "sim") and hasattr(getattr(part, "model", None), "mujoco_robots")


def _simulation_of(part: Any) -> tuple[Any, Any, Any] | None:
    """Return the model, the data and, where dm_control simulates, its physics; None: it does not simulate."""
    mujoco = sys.modules.get("mujoco")  # what nobody has imported does not simulate
    if mujoco is None:
        return None
    for holder in (part, getattr(part, "physics", None), getattr(part, "sim", None)):
        model, data = getattr(holder, "model", None), getattr(holder, "data", None)
        ways = (
            (model, data, None),
            (getattr(model, "ptr", None), getattr(data, "ptr", None), holder),  # dm_control
            (getattr(model, "_model", None), getattr(data, "_data", None), None),  # robosuite
        )
        for one, other, physics in ways:
            if isinstance(one, mujoco.MjModel) and isinstance(other, mujoco.MjData):
                return one, other, physics
    return None
