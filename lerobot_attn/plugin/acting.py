"""What acts on the policy of an evaluation or a rollout: a condition's file, and who is told what of it.

Knows LeRobot's evaluation by the calls that its wrappers see. How a condition acts is for
`lerobot_attn.interventions`; whether anything is recorded makes no difference here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import yaml

from lerobot_attn.errors import ConfigError
from lerobot_attn.interventions import Condition
from lerobot_attn.plugin.command_line import ROLLOUT
from lerobot_attn.plugin.script import replaced_names

if TYPE_CHECKING:
    from lerobot_attn.interventions import Intervener
    from lerobot_attn.recording.robot import RobotRecording


def read_condition(text: str, option: str) -> Condition:
    """Return the condition that an option names: a YAML file, or the file's content in braces.

    Args:
        text: the option's value.
        option: its name, for messages.

    Raises:
        ConfigError: no such file, or not what a condition says.
    """
    if not text.lstrip().startswith("{"):
        if not text.strip():
            raise ConfigError(f"{option}: got nothing, expected a YAML file of interventions")
        return Condition.from_yaml(text)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option}: got {text!r:.80}, expected a YAML file, or one mapping") from error
    return Condition.from_dict(values, where=option)


class Acting:
    """A condition that acts on the policy of a run, and counts the run's episodes for it.

    Args:
        condition: what is done to the policy; from `on` on with what is known of the live one.
        roles: instance → role, in the masks that the condition needs, instead of the one that the environment
            says.
        first_episode: number of each task's first episode.
    """

    def __init__(self, condition: Condition, roles: Mapping[str, str] | None = None, first_episode: int = 0):
        self.condition = condition
        self._roles = dict(roles or {})
        self._intervener: Intervener | None = None
        self._first_episode = self._next_episode = first_episode
        self._episodes: Sequence[int] = ()

    @contextmanager
    def on(self, policy: Any, preprocessor: Any) -> Iterator[None]:
        """Act on the policy inside the block.

        Raises:
            UnsupportedPolicyError: no adapter knows the policy.
            ConfigError: something that cannot be done with this policy.
        """
        from lerobot_attn.interventions import intervene

        with intervene(policy, self.condition, preprocessor=preprocessor) as self._intervener:
            self.condition = self._intervener.condition  # with what only a live policy knows
            yield

    def start_task(self) -> None:
        """Another task's episodes begin."""
        self._next_episode = self._first_episode

    def pass_episodes(self, number: int) -> None:
        """So many of the task's next episodes are passed over."""
        self._next_episode += number

    def begin(self, n_envs: int) -> None:
        """The next episodes begin, one in each environment; of a last batch also those that nobody counts."""
        self.begin_episodes(range(self._next_episode, self._next_episode + n_envs))
        self._next_episode += n_envs

    @contextmanager
    def masks_of(self, call: dict[str, Any]) -> Iterator[None]:
        """Draw masks for the condition while a rollout lasts, if it needs some.

        Args:
            call: the rollout's arguments by name; its `env_preprocessor` is replaced.

        Raises:
            ConfigError: at the rollout's first observation, if its environments have no masks.
        """
        if not self.condition.needs_masks:
            yield
            return
        from lerobot_attn.plugin.segmentation import scenes_of_rollout

        with scenes_of_rollout(call, self._roles) as scenes:
            self._acting.masks = scenes.current
            try:
                yield
            finally:
                self._acting.masks = None

    def begin_episodes(self, episodes: Sequence[int]) -> None:
        """Episodes of these numbers begin, one for each row of the policy's batch."""
        self._episodes = episodes
        self._acting.begin(episodes)

    def tasks(self, texts: Sequence[str]) -> list[str]:
        """Return the instructions as the policy shall get them, one for each environment."""
        pairs = zip(texts, self._episodes, strict=True)
        return [self._acting.task(str(text), episode) for text, episode in pairs]

    def seen(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch as the policy saw it, if it has run since the last call."""
        return self._acting.seen(batch)

    @contextmanager
    def on_rollout(self, ctx: Any, recordings: Sequence[RobotRecording]) -> Iterator[None]:
        """Act on the policy of a robot's rollout; an episode begins where LeRobot resets the policy.

        Args:
            ctx: LeRobot's context of the rollout.
            recordings: are told the instruction; may be filled later.

        Raises:
            UnsupportedPolicyError, ConfigError: as of `on`; or the task is to change, and nobody holds one.
        """
        from lerobot_attn.policies.taps import replaced_attribute

        engine, dataset, changes = ctx.policy.inference, ctx.data.dataset, self.condition.changes_task
        if changes and not hasattr(engine, "_task"):
            raise ConfigError(
                f"condition {self.condition.name}: changes the task, and this LeRobot's inference engine "
                f"{type(engine).__name__} holds none; expected one that does"
            )
        own, reset = getattr(engine, "_task", None) or "", engine.reset

        @functools.wraps(reset)
        def reset_and_begin(*args: Any, **kwargs: Any) -> Any:
            self.begin_episodes([0 if dataset is None else dataset.num_episodes])
            if changes:
                (engine._task,) = self.tasks([own])
                for recording in recordings:
                    recording.tell_task(engine._task)
                    recording.say("environment_task", own)
            return reset(*args, **kwargs)

        with ExitStack() as stack:
            stack.enter_context(self.on(ctx.policy.policy, ctx.policy.preprocessor))
            stack.enter_context(replaced_attribute(engine, "reset", reset_and_begin))
            if changes:
                stack.enter_context(replaced_attribute(engine, "_task", own))
            yield

    @property
    def _acting(self) -> Intervener:
        assert self._intervener is not None, "on() comes first"
        return self._intervener


def acting_of_rollout(cfg: Any) -> Acting:
    """Read what is to be done to a robot's policy, before the robot is connected.

    Args:
        cfg: the parsed options of `lerobot-rollout`.

    Raises:
        ConfigError: no such file, or something that cannot be done there.
    """
    from lerobot_attn.recording.conditions import refuse_masks

    option = f"--{ROLLOUT.interventions}"
    condition = read_condition(cfg.interventions, option)
    refuse_masks(condition, "a robot")
    if cfg.use_torch_compile and condition.interventions:
        raise ConfigError(
            f"{option}: got {condition.name} with use_torch_compile=true, expected false, because a compiled "
            "policy cannot be acted on; leave one of the two out"
        )
    return Acting(condition)


def acting_in(namespace: dict[str, Any], acting: Acting) -> AbstractContextManager[None]:
    """Wrap the evaluation script's functions such that a condition acts; outside of a recording's wrappers.

    Args:
        namespace: globals of the script, where its functions look each other up by name.
        acting: what acts.
    """
    wrappers = {
        "eval_policy_all": _wrap_eval_policy_all,
        "run_one": _wrap_run_one,
        "rollout": _wrap_rollout,
    }
    return replaced_names(
        namespace, {name: functools.partial(wrap, acting=acting) for name, wrap in wrappers.items()}
    )


def _wrap_eval_policy_all(original: Callable[..., Any], *, acting: Acting) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def eval_policy_all(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        with acting.on(call["policy"], call["preprocessor"]):
            return original(*args, **kwargs)

    return eval_policy_all


def _wrap_run_one(original: Callable[..., Any], *, acting: Acting) -> Callable[..., Any]:
    @functools.wraps(original)
    def run_one(*args: Any, **kwargs: Any) -> Any:
        acting.start_task()
        return original(*args, **kwargs)

    return run_one


def _wrap_rollout(original: Callable[..., Any], *, acting: Acting) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def rollout(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        acting.begin(call["env"].num_envs)
        preprocess = call["env_preprocessor"]

        def env_preprocessor(observation: dict[str, Any]) -> Any:
            # LIBERO's instruction comes from the task's name, so it is changed behind the environment.
            if "task" in observation:
                observation = {**observation, "task": acting.tasks(observation["task"])}
            return preprocess(observation)

        call["env_preprocessor"] = env_preprocessor
        with acting.masks_of(call):
            return original(*bound.args, **bound.kwargs)

    return rollout
