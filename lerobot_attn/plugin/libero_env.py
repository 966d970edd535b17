"""LeRobot's LIBERO environment with two more methods: the masks of its newest pictures, and taking fewer.

It is imported in the worker processes too, where the environments live. Roles follow the task's goal as BDDL
writes it, e.g. `(In alphabet_soup_1 basket_1_contain_region)`. Knows nothing of recordings.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lerobot.envs.libero import LiberoEnv

from lerobot_attn.errors import CaptureError
from lerobot_attn.masks import Instance, Role, SceneMasks
from lerobot_attn.plugin.mujoco_scene import BACKGROUND, RobosuiteScene


class LiberoEnvWithMasks(LiberoEnv):
    """LeRobot's class: observations, actions and random numbers are what they are there."""

    _scene: RobosuiteScene | None = None
    _shutter: Shutter | None = None
    _n_waiting = 0  # steps of a reset that are still to come

    def _ensure_env(self) -> None:
        is_new = self._env is None
        super()._ensure_env()
        if is_new:
            assert self._env is not None
            self._scene = RobosuiteScene(self._env.env)
            # Both take pictures, and a reset may have brought a new simulation.
            self._env.step = self._stepping(self._env.step)
            self._env.set_init_state = self._watched(self._env.set_init_state)

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        """Begin an episode as LeRobot does; the pictures of its first frame are always taken."""
        self._n_waiting = self.num_steps_wait
        if self._shutter is not None:
            self._shutter.is_open = True
        return super().reset(*args, **kwargs)

    def lerobot_attn_draw(self, draws: bool) -> None:
        """Say whether the steps from now on take pictures; if not, observations hold the newest ones.

        A reset takes them anyway, and then goes on taking them.
        """
        self._shutter = self._shutter or Shutter()
        self._shutter.is_open = draws

    def close(self) -> None:
        """Let go of the simulation."""
        self._scene = None
        super().close()

    def lerobot_attn_masks(
        self, environments: Collection[int] | None = None, cameras: Collection[str] | None = None
    ) -> SceneMasks | None:
        """Return the masks of the newest pictures, named and turned as these are in the observation.

        Args:
            environments: numbers of those in the batch whose masks are wanted; None: all.
            cameras: names of the pictures; None: all.

        Returns:
            None of an environment that is not wanted.
        """
        if environments is not None and self.episode_index not in environments:
            return None
        self._ensure_env()
        assert self._scene is not None
        assert self._env is not None
        shown = {self.camera_name_mapping[camera]: camera for camera in self.camera_name}
        drawn = {
            name: camera.removesuffix("_image")
            for name, camera in shown.items()
            if cameras is None or name in cameras
        }
        names = self._scene.names
        problem = self._env.env.parsed_problem
        fixtures = {name for group in problem["fixtures"].values() for name in group}
        roles = roles_of(
            names, self._scene.robots, fixtures, problem["goal_state"], problem["obj_of_interest"]
        )
        return SceneMasks(
            tuple(Instance(name, roles[name]) for name in names),
            self._scene.masks(drawn, (self.observation_height, self.observation_width)),
            self._scene.positions(next(iter(drawn.values()), "agentview")),
        )

    def _watched(self, method: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            assert self._scene is not None
            assert self._env is not None
            self._scene.watch()
            if self._shutter is not None:
                self._shutter.watch(self._env.sim)
            return method(*args, **kwargs)

        return watched

    def _stepping(self, step: Any) -> Any:
        watched = self._watched(step)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            shutter = self._shutter
            if shutter is not None and self._n_waiting:  # of these steps only the last one is looked at
                shutter.is_open = self._n_waiting == 1
                self._n_waiting -= 1
            result = watched(*args, **kwargs)
            if shutter is not None:
                shutter.check()
            return result

        return stepped


class Shutter:
    """Decides which pictures a simulation really takes; in the place of the others stands the newest one.

    An observation holds what its cameras took at a moment of the step that robosuite chooses, so the taking
    itself is left out, and everything else goes its ordinary way.

    Attributes:
        is_open: whether pictures are taken.
    """

    def __init__(self) -> None:
        self.is_open = True
        self._sim: Any = lambda: None  # a weak reference, as that of `RobosuiteScene`
        self._newest: dict[str, Any] = {}
        self._left_out: set[str] = set()

    def watch(self, sim: Any) -> None:
        """Stand before everything that takes pictures of a simulation; once is enough."""
        if self._sim() is sim:
            return
        self._sim, self._newest, self._left_out = weakref.ref(sim), {}, set()
        take = sim.render

        def render(*args: Any, **kwargs: Any) -> Any:
            camera = kwargs.get("camera_name")
            if camera is None or kwargs.get("segmentation"):
                return take(*args, **kwargs)
            if self.is_open or camera not in self._newest:
                self._newest[camera] = take(*args, **kwargs)
                self._left_out.discard(camera)
            else:
                self._left_out.add(camera)
            return self._newest[camera]

        sim.render = render

    def check(self) -> None:
        """Check after a step that its pictures are there, if they are to be.

        Raises:
            CaptureError: a camera took none, so that an older one stands in the observation.
        """
        if self.is_open and self._left_out:
            raise CaptureError(
                f"render=inferences: {', '.join(sorted(self._left_out))} took no picture in a step at whose "
                "end the policy looks, expected one a step; leave the option out"
            )


def roles_of(
    names: Sequence[str],
    robots: Collection[str],
    fixtures: Collection[str],
    goal: Sequence[Sequence[str]],
    of_interest: Sequence[str],
) -> Mapping[str, Role]:
    """Return instance → role in a LIBERO task.

    Of a goal with two places, `(On a b)`, a is a target and b a destination; of one with a single place,
    `(Open a)`, a is a target unless something is to go there. A place names an instance or a region of
    one; the table's regions are none. Without a goal that names instances, the first object of interest is
    the target and the last one the destination. Furniture that is neither is background, other objects are
    distractors.

    Args:
        names: of the instances; the first is the background.
        robots: those that are parts of a robot.
        fixtures: names of furniture.
        goal: predicates, each with its places: ["in", "alphabet_soup_1", "basket_1_contain_region"].
        of_interest: BDDL's objects of interest.
    """
    owners = sorted(set(names) - {BACKGROUND, *robots}, key=len, reverse=True)

    def owner(place: str) -> str | None:
        return next((name for name in owners if place == name or place.startswith(f"{name}_")), None)

    moved, places, used = set[str | None](), set[str | None](), set[str | None]()
    for _, first, *rest in goal:
        if rest:
            moved.add(owner(first))
            places.add(owner(rest[0]))
        else:
            used.add(owner(first))
    if not (moved | used) - {None} and of_interest:
        first, *_, last = (of_interest[0], *of_interest)
        moved, places = {owner(first)}, {owner(last)} - {owner(first)}
    roles: dict[str, Role] = {}
    for name in names:
        if name == BACKGROUND:
            roles[name] = "background"
        elif name in robots:
            roles[name] = "robot"
        elif name in moved:
            roles[name] = "target"
        elif name in places:
            roles[name] = "destination"
        elif name in used:
            roles[name] = "target"
        else:
            roles[name] = "background" if name in fixtures else "distractor"
    return roles
