"""Instance masks of a rollout's environments, under the policy's names and turned as the policy sees them.

    with environments_with_masks("libero"):         # while environments are built
        …
        source = SceneSource(env, cameras=["observation.images.image"])
        source.shown(observation, preprocessed)     # tells how pictures are turned on their way to the policy
        source.current()                            # one SceneMasks for each environment, drawn once a step
        source.forget()                             # the environments step

An environment can be asked for masks if its class has a method `lerobot_attn_masks(environments, cameras)`
that returns `SceneMasks` of its newest pictures, named and turned as in its own observation, or `NoMasks`
with the reason. LeRobot's LIBERO is given it here (`libero_env.py`), and so is every other environment
(`masked_env.py`): whether MuJoCo simulates it shows at its first pictures. The environments may live in other
processes. Knows no recording.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from torch import Tensor

from lerobot_attn.errors import CaptureError, ConfigError, first_line
from lerobot_attn.masks import SceneMasks, check_role, instances_of
from lerobot_attn.plugin.environments import renamed_by
from lerobot_attn.plugin.masked_env import METHOD, EnvFactory, NoMasks
from lerobot_attn.policies.taps import replaced_attribute
from lerobot_attn.recording.observation import cameras_of

LIBERO = ("libero", "libero_plus")
# LeRobot's environments that something else simulates, and what does.
NOT_MUJOCO = {
    "pusht": "pymunk",
    "isaaclab_arena": "Isaac Sim",
    "robotwin": "SAPIEN",
    "robomme": "SAPIEN",
}
SOURCE = {"source": "mujoco"}  # what a store says of the masks
_FOLLOWED = "_lerobot_attn_scenes"  # attribute of a vector environment that is followed
_IMAGES = "observation.images."
# How LeRobot's environments may turn pictures, as the axes of (channel, row, column) that are flipped.
_TURNS = ((), (1, 2), (1,), (2,))


def check_masks(env_type: str, roles: Mapping[str, str]) -> None:
    """Refuse what cannot be drawn before an environment is built.

    Args:
        env_type: LeRobot's name of the environment. Whether MuJoCo simulates one that is not refused here
            shows at its reset.
        roles: instance → role, whose names show at the reset, too.

    Raises:
        ConfigError: it is an environment of LeRobot's that is no MuJoCo, or a role does not exist.
    """
    for name, role in roles.items():
        check_role(role, where=f"roles, {name}")
    if env_type in NOT_MUJOCO:
        raise ConfigError(_refusal(f"env.type={env_type} is simulated by {NOT_MUJOCO[env_type]}"))


@contextmanager
def environments_with_masks(env_type: str) -> Iterator[None]:
    """Let LeRobot's factory build environments that can be asked for masks, as long as this lasts."""
    if env_type not in LIBERO:
        with _batches_of_masked_environments():
            yield
        return
    import lerobot.envs.libero as module

    from lerobot_attn.plugin.libero_env import LiberoEnvWithMasks

    original = module.LiberoEnv
    module.LiberoEnv = LiberoEnvWithMasks
    try:
        yield
    finally:
        module.LiberoEnv = original


@contextmanager
def _batches_of_masked_environments() -> Iterator[None]:
    """Let every vector environment be built of environments that can be asked, as long as this lasts."""
    with ExitStack() as stack:
        for kind in (gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv):
            stack.callback(setattr, kind, "__init__", kind.__init__)
            kind.__init__ = _building_masked(kind.__init__)
        yield


def _building_masked(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, env_fns: Iterable[Callable[[], Any]], *args: Any, **kwargs: Any) -> None:
        masked = [EnvFactory(build, number) for number, build in enumerate(env_fns)]
        original(self, masked, *args, **kwargs)

    return init


@contextmanager
def scenes_of_rollout(call: dict[str, Any], roles: Mapping[str, str] | None = None) -> Iterator[SceneSource]:
    """Follow a rollout, as long as this lasts, to know when masks are new and how pictures are turned.

    Where somebody follows the rollout already, theirs is what is returned: nothing is drawn twice.

    Args:
        call: the rollout's arguments by name; its `env_preprocessor` is replaced.
        roles: instance → role, instead of the one that the environment says.

    Raises:
        ConfigError: at the rollout's first observation, if its environments have no such masks.
    """
    env, before, step = call["env"], call["env_preprocessor"], call["env"].step
    if (followed := getattr(env, _FOLLOWED, None)) is not None:
        yield followed
        return
    source = SceneSource(
        env,
        cameras_of(call["policy"]).names,
        renamed=renamed_by(call.get("preprocessor")),
        roles=roles,
    )
    is_first = True

    def env_preprocessor(observation: dict[str, Any]) -> dict[str, Any]:
        nonlocal is_first
        preprocessed: dict[str, Any] = before(dict(observation))
        source.shown(observation, preprocessed)
        if is_first:
            is_first = False
            source.check()
        return preprocessed

    def stepped(*args: Any, **kwargs: Any) -> Any:
        source.forget()
        return step(*args, **kwargs)

    call["env_preprocessor"] = env_preprocessor
    with replaced_attribute(env, "step", stepped), replaced_attribute(env, _FOLLOWED, source):
        yield source


class SceneSource:
    """Masks of a batch of environments, each drawn at most once between two steps.

    Args:
        env: the vector environment of a rollout.
        cameras: the policy's names of its cameras; others are not drawn.
        renamed: the environment's name of an observation → the policy's, where they differ.
        roles: instance → role, instead of the one that the environment says.
    """

    def __init__(
        self,
        env: Any,
        cameras: Sequence[str],
        *,
        renamed: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
    ):
        self._env = env
        self._cameras = tuple(cameras)
        self._renamed = dict(renamed or {})
        self._roles = dict(roles or {})
        self._turns: dict[str, tuple[int, ...]] = {}  # the environment's name of a camera → flipped axes
        self._drawn: dict[int, SceneMasks] = {}

    def shown(self, observation: Mapping[str, Any], preprocessed: Mapping[str, Any]) -> None:
        """Find out how pictures are turned, from one before and after the environment's preprocessor.

        Args:
            observation: name → (batch, channel, height, width), before.
            preprocessed: the same after it.

        Raises:
            ConfigError: a picture is changed by more than being turned, so that no mask lies on it.
        """
        for name, after in preprocessed.items():
            if name in self._turns or self._renamed.get(name, name) not in self._cameras:
                continue
            before = observation.get(name)
            if not isinstance(before, Tensor) or not isinstance(after, Tensor):
                continue
            fitting = [turn for turn in _TURNS if _is_turned(before[0], after[0], turn)]
            if not fitting:
                raise ConfigError(
                    f"{name}: the environment's preprocessor changes its pictures, expected them turned at "
                    "most, because the masks are laid over them; leave segmentation out"
                )
            if len(fitting) == 1:  # of a picture that looks the same turned, a later one will tell
                self._turns[name] = fitting[0]

    def forget(self) -> None:
        """The environments step: what was drawn is over."""
        self._drawn.clear()

    def check(self) -> None:
        """Draw once, to find out before the first action what cannot be drawn.

        Raises:
            ConfigError: as of `of`.
        """
        with suppress(CaptureError):  # later pictures may tell
            self.current()

    def current(self) -> list[SceneMasks]:
        """Return the masks of each environment of the batch.

        Raises:
            ConfigError, CaptureError: as of `of`.
        """
        found = self.of(range(self._env.num_envs))
        return [found[env] for env in range(self._env.num_envs)]

    def of(self, environments: Collection[int]) -> Mapping[int, SceneMasks]:
        """Return number of an environment → its masks; those of others are not drawn.

        Raises:
            ConfigError: the environments have no masks, none of them is of the policy's cameras, or a role
                was given to an instance that is not there.
            CaptureError: it is not known yet how pictures are turned.
        """
        missing = [env for env in environments if env not in self._drawn]
        if missing:
            names = {name: self._renamed.get(name, name) for name in self._env_cameras()}
            try:
                found = self._env.call(METHOD, missing, [name.removeprefix(_IMAGES) for name in names])
            except AttributeError as error:
                raise ConfigError(_refusal(f"what is evaluated has none ({first_line(error)})")) from error
            for env in missing:
                self._drawn[env] = self._as_seen(_checked(found[env]), names)
        return {env: self._drawn[env] for env in environments}

    def _env_cameras(self) -> list[str]:
        """Return the environment's names of the policy's cameras."""
        given = {self._renamed.get(name, name): name for name in self._renamed}
        return [given.get(camera, camera) for camera in self._cameras]

    def _as_seen(self, scene: SceneMasks, names: Mapping[str, str]) -> SceneMasks:
        """Return an environment's masks under the policy's names, turned as the policy sees them."""
        masks = {}
        for name, camera in names.items():
            mask = scene.masks.get(name.removeprefix(_IMAGES))
            if mask is None:  # the policy's config may name cameras that this environment does not have
                continue
            if name not in self._turns:
                raise CaptureError(
                    f"{name}: how its pictures are turned cannot be told from what they show so far"
                )
            masks[camera] = np.ascontiguousarray(np.flip(mask, [axis - 1 for axis in self._turns[name]]))
        if not masks:
            raise ConfigError(
                f"segmentation: got masks of {', '.join(scene.masks) or 'no camera'}, expected some of the "
                f"policy's cameras: {', '.join(self._cameras) or 'none'}"
            )
        instances = scene.instances
        if self._roles:
            roles = {instance.name: instance.role for instance in instances} | self._roles
            instances = instances_of([instance.name for instance in instances], roles, where="roles")
        return replace(scene, instances=instances, masks=masks)


def _checked(found: SceneMasks | NoMasks) -> SceneMasks:
    """Return the masks that an environment gave.

    Raises:
        ConfigError: it has none.
        CaptureError: it has none of its newest pictures.
    """
    if not isinstance(found, NoMasks):
        return found
    if found.for_good:
        raise ConfigError(_refusal(f"{found.reason}, so what is evaluated has none"))
    raise CaptureError(f"masks: {found.reason}; leave segmentation out")


def _is_turned(before: Tensor, after: Tensor, turn: tuple[int, ...]) -> bool:
    turned = before.flip(turn) if turn else before
    return bool(turned.shape == after.shape and (turned == after.to(turned.device)).all())


def _refusal(why: str) -> str:
    return (
        f"masks: {why}, expected an environment that simulates with MuJoCo, or whose class has the method "
        f"{METHOD} (docs/recording.md); leave out segmentation and conditions with roles, or attach masks to "
        "what was recorded with `lerobot-attn masks`"
    )
