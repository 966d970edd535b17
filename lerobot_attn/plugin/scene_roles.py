"""What the bodies of an environment's simulation are in its task, where the environment tells.

An environment is recognised by the package that its classes come from. Of one that is not known here the
robot has its role and everything else is background, until somebody says otherwise (`roles` of the capture
settings). Knows nothing of how masks are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lerobot_attn.masks import Role

_ALOHA: Mapping[str, Role] = {"box": "target", "peg": "target", "socket": "destination"}
# In these MetaWorld tasks the hand itself is to go somewhere, and the object that is observed stays.
_HAND_ALONE = ("SawyerReachEnv", "SawyerReachWallEnv", "SawyerHandInsertEnv")


def goal_sites(parts: Sequence[Any]) -> tuple[str, ...]:
    """Return names of the sites at which an environment shows its goal.

    Args:
        parts: the environment and what it is built around.
    """
    metaworld = _of_package(parts, "metaworld")
    if metaworld is None:
        return ()
    # Of a door that can be locked and unlocked the other goal is put far away.
    goal = metaworld._target_pos
    return tuple(name for name, place in metaworld._target_site_config if np.allclose(place, goal))


def roles_in(parts: Sequence[Any], scene: Any) -> dict[str, Role]:
    """Return instance → role.

    - MetaWorld: the object whose position it observes is the target (of two, the first: hammer, stick), and
      what it shows as the goal, or the second object, is the destination.
    - Aloha: cube and peg are targets, the socket is a destination.
    - RoboCasa: "obj", as its tasks call what is to be moved, is the target.

    In these, every other object (what can be moved and is no robot) is a distractor.

    Args:
        parts: the environment and what it is built around.
        scene: its `BodyScene` or `RobosuiteScene`.
    """
    roles: dict[str, Role] = dict.fromkeys(scene.names, "background")
    given: Mapping[str, Role] = {}
    for package, roles_of in _KNOWN.items():
        part = _of_package(parts, package)
        if part is not None:
            given, objects = roles_of(part, scene)
            roles |= dict.fromkeys(objects, "distractor")
    roles |= {name: role for name, role in given.items() if name in roles}
    return roles | dict.fromkeys(scene.robots, "robot")


def _metaworld(env: Any, scene: Any) -> tuple[dict[str, Role], Collection[str]]:
    roles: dict[str, Role] = {}
    observed = np.asarray(env._get_pos_objects(), float).reshape(-1, 3)
    is_moved = not type(env).__name__.startswith(_HAND_ALONE)
    for position, role in reversed([*zip(observed, ("target", "destination"), strict=False)] * is_moved):
        roles[scene.instance_at(position)] = role
    for site in goal_sites([env]):
        shown = scene.instance_of_site(site)
        if shown is not None:
            roles.setdefault(shown, "destination")
    return roles, scene.movable


def _aloha(env: Any, scene: Any) -> tuple[Mapping[str, Role], Collection[str]]:
    return _ALOHA, scene.movable


def _robocasa(env: Any, scene: Any) -> tuple[Mapping[str, Role], Collection[str]]:
    return {"obj": "target"}, getattr(env, "objects", {})


_RolesOf = Callable[[Any, Any], tuple[Mapping[str, Role], Collection[str]]]
_KNOWN: Mapping[str, _RolesOf] = {"metaworld": _metaworld, "gym_aloha": _aloha, "robocasa": _robocasa}


def _of_package(parts: Sequence[Any], package: str) -> Any | None:
    """Return the innermost part whose class comes from a package."""
    of_it = [part for part in parts if type(part).__module__.partition(".")[0] == package]
    return of_it[-1] if of_it else None
