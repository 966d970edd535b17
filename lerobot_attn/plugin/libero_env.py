"""LeRobot's LIBERO environment with one more method: the instance masks of its newest picture.

It is imported in the worker processes too, where the environments live. Roles follow the task's goal as BDDL
writes it, e.g. `(In alphabet_soup_1 basket_1_contain_region)`. Knows nothing of recordings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lerobot.envs.libero import LiberoEnv

from lerobot_attn.masks import Instance, Role, SceneMasks
from lerobot_attn.plugin.mujoco_scene import BACKGROUND, RobosuiteScene


class LiberoEnvWithMasks(LiberoEnv):
    """LeRobot's class: observations, actions and random numbers are what they are there."""

    _scene: RobosuiteScene | None = None

    def _ensure_env(self) -> None:
        is_new = self._env is None
        super()._ensure_env()
        if is_new:
            assert self._env is not None
            self._scene = RobosuiteScene(self._env.env)
            # Both take pictures, and a reset may have brought a new simulation.
            for name in ("step", "set_init_state"):
                setattr(self._env, name, _watched(getattr(self._env, name), self._scene))

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


def _watched(method: Any, scene: RobosuiteScene) -> Any:
    def watched(*args: Any, **kwargs: Any) -> Any:
        scene.watch()
        return method(*args, **kwargs)

    return watched


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
