"""The wrappers of `lerobot-rollout`: its main function with the attention options, and what a loop calls.

Each wrapper calls the original and tells the recording what happened. Knows nothing of stores. What hangs on
instances (the policy, its engine, the data set, the robot) is replaced there; three names of modules are
replaced while a rollout runs: `send_next_action` in the strategies, the queue of actions, and what builds the
policy's observation for real-time chunking.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lerobot_attn.errors import ConfigError
from lerobot_attn.plugin.command_line import ROLLOUT
from lerobot_attn.plugin.compatibility import ROLLOUT_MODULES
from lerobot_attn.plugin.script import with_options

if TYPE_CHECKING:
    from lerobot_attn.plugin.acting import Acting
    from lerobot_attn.plugin.feeding.facts import World
    from lerobot_attn.recording.robot import RobotRecording

logger = logging.getLogger(__name__)


def install_rollout(namespace: dict[str, Any]) -> None:
    """Put the wrapped `rollout`, with the attention options, into the rollout script.

    Args:
        namespace: globals of the script, which is `__main__` when it was started with `python -m`.
    """
    original = namespace["rollout"]
    if not hasattr(original, "lerobot_attn"):
        namespace["rollout"] = _make_rollout(original, namespace)


def _make_rollout(original: Callable[..., Any], namespace: dict[str, Any]) -> Callable[..., Any]:
    from lerobot_attn.plugin.rollout_options import AttentionRolloutConfig

    run_original = inspect.unwrap(original)  # takes the parsed config

    def rollout(cfg: AttentionRolloutConfig) -> Any:
        if not cfg.save_attention_maps and cfg.interventions is None:
            return run_original(cfg)
        acting = _check(cfg)
        failures: list[str] = []
        with recorded_rollout(namespace, cfg, failures, acting):
            result = run_original(cfg)
        if failures:
            sys.exit(
                f"error: the rollout is done, but attention of {len(failures)} episodes could not be saved "
                f"whole: {failures[0]}"
            )
        return result

    return with_options(original, rollout, AttentionRolloutConfig, ROLLOUT)


def _check(cfg: Any) -> Acting | None:
    """Check all that can be checked before the robot is connected; return what acts on the policy.

    Raises:
        UnsupportedPolicyError, ConfigError: the rollout cannot be recorded, or not be acted on.
    """
    from lerobot_attn.plugin.acting import acting_of_rollout
    from lerobot_attn.policies import adapter_type

    adapter_type(cfg.policy)
    acting = None if cfg.interventions is None else acting_of_rollout(cfg)
    if not cfg.save_attention_maps:
        return acting
    cfg.attention.for_robots().without_simulator("on a robot")
    if cfg.use_torch_compile and cfg.attention.compiled and cfg.policy.type not in ("pi0", "pi05"):
        raise ConfigError(
            "attention.compiled: got true with use_torch_compile=true, expected false for a policy of type "
            f"{cfg.policy.type}, because LeRobot compiles its predict_action_chunk as a whole there, out of "
            "which no map can be handed; leave one of the two out"
        )
    return acting


def stores_of(cfg: Any) -> Path:
    """Return the folder of a rollout's stores: `attention.dir`, or a dated one as evaluations have."""
    if cfg.attention.dir:
        return Path(cfg.attention.dir)
    now = datetime.now()
    name = f"{now:%H-%M-%S}_{cfg.robot.type}_{cfg.policy.type}"
    return Path("outputs/rollout") / f"{now:%Y-%m-%d}" / name / "attention"


@contextmanager
def recorded_rollout(
    namespace: dict[str, Any], cfg: Any, failures: list[str], acting: Acting | None = None
) -> Iterator[None]:
    """Record the rollout that starts inside the block, or act on it, or both.

    Args:
        namespace: globals of the rollout script.
        cfg: the parsed options.
        failures: gets a line for each episode that could not be saved whole.
        acting: what is done to the policy, if something is.

    Raises:
        ConfigError, StoreError: it cannot be recorded; the robot has been disconnected then.
    """
    build = namespace["build_rollout_context"]
    begun: list[RobotRecording] = []
    with ExitStack() as stack:
        # Called last, when all is written.
        stack.callback(lambda: failures.extend(line for one in begun for line in one.failures))

        @functools.wraps(build)
        def build_rollout_context(*args: Any, **kwargs: Any) -> Any:
            ctx = build(*args, **kwargs)
            try:
                if acting is not None:
                    stack.enter_context(acting.on_rollout(ctx, begun))
                if cfg.save_attention_maps:
                    begun.append(stack.enter_context(_recording(ctx, cfg, acting)))
                    stack.enter_context(_observed(ctx, begun[0]))
            except BaseException:
                _let_go(ctx.hardware)
                raise
            return ctx

        namespace["build_rollout_context"] = build_rollout_context
        try:
            yield
        finally:
            namespace["build_rollout_context"] = build


def _let_go(hardware: Any) -> None:
    """Disconnect the robot of a rollout that did not begin: LeRobot does so only once it has begun."""
    for device in (hardware.robot_wrapper.inner, hardware.teleop):
        if device is not None and device.is_connected:
            with suppress(Exception):
                device.disconnect()


def _recording(ctx: Any, cfg: Any, acting: Acting | None) -> Any:
    from lerobot_attn.capture import find_tokenizer
    from lerobot_attn.recording.conditions import said_of
    from lerobot_attn.recording.plan import DimensionNames
    from lerobot_attn.recording.robot import record_robot

    policy, features, dataset = ctx.policy.policy, ctx.data.dataset_features, ctx.data.dataset
    known = getattr(policy.config, "image_features", None) or {}
    cameras = {
        name: cfg.rename_map.get(name, name) for name in features if name.startswith("observation.images.")
    }
    fps = cfg.fps * cfg.interpolation_multiplier if dataset is None else dataset.fps
    return record_robot(
        policy,
        stores_of(cfg),
        cfg.attention,
        fps=fps,
        tokenizer=find_tokenizer(ctx.policy.preprocessor),
        names=DimensionNames(
            features.get("observation.state", {}).get("names") or (), tuple(ctx.data.ordered_action_keys)
        ),
        cameras={robots: policys for robots, policys in cameras.items() if policys in known},
        task=cfg.dataset.single_task if cfg.dataset else cfg.task,
        attributes={
            "robot_type": cfg.robot.type,
            "strategy": cfg.strategy.type,
            "inference": cfg.inference.type,
            "dataset": None if dataset is None else {"repo_id": dataset.repo_id, "root": str(dataset.root)},
            **said_of(None if acting is None else acting.condition),
        },
        rerun_url=_rerun_url(cfg),
    )


def _rerun_url(cfg: Any) -> str | None:
    """Return where LeRobot's Rerun session is shown, if it is not on this machine as Rerun does by itself."""
    if cfg.display_data and cfg.display_mode == "rerun" and cfg.display_ip and cfg.display_port:
        return f"rerun+http://{cfg.display_ip}:{cfg.display_port}/proxy"
    return None


@contextmanager
def _observed(ctx: Any, recording: RobotRecording) -> Iterator[None]:
    """Replace what the loop calls, such that the recording is told."""
    from lerobot_attn.policies.taps import replaced_attribute

    policy, engine, robot = ctx.policy.policy, ctx.policy.inference, ctx.hardware.robot_wrapper
    dataset = ctx.data.dataset
    with ExitStack() as stack:

        def replace(owner: object, name: str, wrap: Callable[[Any], Any]) -> None:
            original = getattr(owner, name)
            stack.enter_context(replaced_attribute(owner, name, functools.wraps(original)(wrap(original))))

        def before(tell: Callable[..., None]) -> Callable[[Any], Any]:
            def wrap(original: Any) -> Any:
                def told_before(*args: Any, **kwargs: Any) -> Any:
                    tell(*args)
                    return original(*args, **kwargs)

                return told_before

            return wrap

        compiled = vars(policy).get("predict_action_chunk")
        if ctx.runtime.cfg.use_torch_compile and compiled is not None:
            logger.warning("use_torch_compile=true: while attention is captured the policy runs uncompiled")
            plain = inspect.unwrap(type(policy).predict_action_chunk).__get__(policy)
            stack.enter_context(replaced_attribute(policy, "predict_action_chunk", plain))
        replace(robot, "get_observation", before(lambda: recording.on_look()))
        replace(engine, "notify_observation", before(recording.on_observation))
        replace(engine, "reset", before(lambda: recording.on_reset()))
        look = _first_look(ctx, recording)
        replace(policy, "select_action", lambda original: _selecting(original, recording, look))
        replace(policy, "predict_action_chunk", lambda original: _guarded(original, recording, look))
        if dataset is not None:
            replace(dataset, "add_frame", lambda original: _adding(original, dataset, recording))
            replace(dataset, "save_episode", lambda original: _saving(original, recording))
            replace(dataset, "clear_episode_buffer", lambda original: _clearing(original, recording))
        for name, attribute, value in (
            ("rtc", "ActionQueue", functools.partial(_queue, recording)),
            ("rtc", "build_dataset_frame", functools.partial(_building, recording)),
            ("highlight", "RolloutRingBuffer", functools.partial(_ring, recording)),
        ):
            module = importlib.import_module(ROLLOUT_MODULES[name])
            stack.enter_context(_replaced_name(module, attribute, value(getattr(module, attribute))))
        for strategy in ("base", "sentry", "episodic", "highlight", "dagger"):
            module = importlib.import_module(ROLLOUT_MODULES[strategy])
            sending = _sending(module.send_next_action, recording, in_frames=dataset is None)
            stack.enter_context(_replaced_name(module, "send_next_action", sending))
        yield


@contextmanager
def _replaced_name(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _first_look(ctx: Any, recording: RobotRecording) -> Callable[..., None]:
    """Return what checks the first batch that the policy gets, called with the policy's arguments."""
    from lerobot_attn.plugin.feeding.quiet import QuietChecks
    from lerobot_attn.recording.first_look import INPUT_CHECKS

    checks, looked = QuietChecks(lambda: _robot(ctx)), threading.Event()

    def look(batch: Any = None, *args: Any, **kwargs: Any) -> None:
        if looked.is_set():
            return
        looked.set()
        task = getattr(ctx.policy.inference, "_task", None)  # what the policy is told, by a condition too
        processors = ctx.policy.preprocessor, ctx.policy.postprocessor
        found = checks.look(ctx.policy.policy, *processors, batch, [task or ""])
        if found:
            recording.say(INPUT_CHECKS, found[0])

    return look


def _robot(ctx: Any) -> World:
    from lerobot_attn.plugin.feeding.facts import World

    cfg, features = ctx.runtime.cfg, ctx.data.dataset_features
    return World(
        what=f"the robot {cfg.robot.type}",
        state_names=tuple(features.get("observation.state", {}).get("names") or ()),
        action_names=tuple(ctx.data.ordered_action_keys),
        action_dim=len(ctx.data.ordered_action_keys),
        fps=float(cfg.fps),
    )


def _selecting(
    original: Callable[..., Any], recording: RobotRecording, look: Callable[..., None]
) -> Callable[..., Any]:
    def select_action(*args: Any, **kwargs: Any) -> Any:
        look(*args, **kwargs)
        recording.on_shown()
        action = original(*args, **kwargs)
        recording.on_selected(action)
        return action

    return select_action


def _guarded(
    original: Callable[..., Any], recording: RobotRecording, look: Callable[..., None]
) -> Callable[..., Any]:
    def predict_action_chunk(*args: Any, **kwargs: Any) -> Any:
        look(*args, **kwargs)
        try:
            return original(*args, **kwargs)
        except Exception as error:
            recording.on_policy_error(error)
            raise

    return predict_action_chunk


def _sending(
    original: Callable[..., Any], recording: RobotRecording, *, in_frames: bool
) -> Callable[..., Any]:
    """Tell of actions; in a rollout without a data set each of them is a frame of the one episode."""

    def send_next_action(obs_processed: Any, obs_raw: Any, ctx: Any, interpolator: Any) -> Any:
        action = original(obs_processed, obs_raw, ctx, interpolator)
        if action is not None:
            # Between two actions of the policy the robot is sent what lies between them.
            recording.on_sent(has_token=interpolator.needs_new_action())
            if in_frames:
                recording.add_frame(0, _frame(ctx.data.dataset_features, obs_processed, action))
        return action

    return send_next_action


def _frame(features: Mapping[str, Any], observation: Mapping[str, Any], action: Mapping[str, Any]) -> Any:
    from lerobot.utils.constants import ACTION, OBS_STR
    from lerobot.utils.feature_utils import build_dataset_frame

    return {
        **build_dataset_frame(dict(features), dict(observation), prefix=OBS_STR),
        **build_dataset_frame(dict(features), dict(action), prefix=ACTION),
    }


def _adding(original: Callable[..., Any], dataset: Any, recording: RobotRecording) -> Callable[..., Any]:
    def add_frame(frame: dict[str, Any]) -> Any:
        shown = dict(frame)  # the data set takes the task out of it
        result = original(frame)
        recording.add_frame(dataset.num_episodes, shown)
        return result

    return add_frame


def _saving(original: Callable[..., Any], recording: RobotRecording) -> Callable[..., Any]:
    def save_episode(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)  # raises where there is nothing to save
        recording.finish_episode("the rollout")
        return result

    return save_episode


def _clearing(original: Callable[..., Any], recording: RobotRecording) -> Callable[..., Any]:
    def clear_episode_buffer(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        recording.discard_episode("discarded, to be recorded again")
        return result

    return clear_episode_buffer


def _building(recording: RobotRecording, original: Callable[..., Any]) -> Callable[..., Any]:
    """Real-time chunking builds the policy's observation once an inference, of what it was told."""

    def build_dataset_frame(features: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        recording.on_shown(values)
        return original(features, values, *args, **kwargs)

    return build_dataset_frame


def _queue(recording: RobotRecording, queue_type: type[Any]) -> type[Any]:
    """Return the queue of actions that knows of each action which row of which chunk it is."""
    from lerobot_attn.recording.robot_episode import Origin

    class ObservedActionQueue(queue_type):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self._origins: list[Origin] = []  # of what is in the queue, handed out or not
            self._both = threading.RLock()  # queue and origins change together

        def merge(self, original_actions: Any, processed_actions: Any, *args: Any, **kwargs: Any) -> None:
            with self._both:
                left = self._origins[self.last_index :]
                super().merge(original_actions, processed_actions, *args, **kwargs)
                n_rows, n_left = len(processed_actions), 0 if self.cfg.enabled else len(left)
                n_skipped = n_rows + n_left - len(self.queue)
                inference = recording.on_chunk(n_skipped)
                rows = [Origin(inference, row, is_certain=True) for row in range(n_skipped, n_rows)]
                self._origins = [*left[len(left) - n_left :], *rows]

        def get(self) -> Any:
            with self._both:
                place = self.last_index
                action = super().get()
                if action is not None:
                    recording.on_popped(self._origins[place])
                return action

        def clear(self) -> None:
            with self._both:
                super().clear()
                self._origins = []

    return ObservedActionQueue


def _ring(recording: RobotRecording, ring_type: type[Any]) -> type[Any]:
    """Return the buffer of the newest frames that tells what it holds."""

    class ObservedRingBuffer(ring_type):
        def append(self, frame: dict[str, Any]) -> None:
            super().append(frame)
            recording.on_buffered(len(self))

        def drain(self) -> list[dict[str, Any]]:
            frames: list[dict[str, Any]] = super().drain()
            recording.on_drained()
            return frames

    return ObservedRingBuffer
