"""The wrappers of `lerobot-eval`: its main function with the attention options, and what a rollout calls.

Each wrapper calls the original and tells the recording what happened. Knows nothing of stores.
"""

from __future__ import annotations

import functools
import inspect
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lerobot_attn.errors import ConfigError
from lerobot_attn.plugin.command_line import EVAL
from lerobot_attn.plugin.environments import ACTION_NAMES, STATE_NAMES, renamed_by
from lerobot_attn.plugin.script import replaced_names, with_options
from lerobot_attn.recording.first_look import INPUT_CHECKS

if TYPE_CHECKING:
    from lerobot_attn.plugin.acting import Acting
    from lerobot_attn.plugin.feeding.quiet import QuietChecks
    from lerobot_attn.recording.run import RunRecorder, TaskPlan

logger = logging.getLogger(__name__)


def install(namespace: dict[str, Any]) -> None:
    """Put the wrapped `eval_main`, with the attention options, into the evaluation script.

    Args:
        namespace: globals of the script, which is `__main__` when it was started with `python -m`.
    """
    original = namespace["eval_main"]
    if not hasattr(original, "lerobot_attn"):
        namespace["eval_main"] = _make_eval_main(original, namespace)


def _make_eval_main(original: Callable[..., Any], namespace: dict[str, Any]) -> Callable[..., Any]:
    from lerobot_attn.plugin.options import AttentionEvalPipelineConfig, plain_eval_config
    from lerobot_attn.plugin.rendering import drawing_at_inferences, draws_at_inferences
    from lerobot_attn.plugin.shards import beginning_at, check_first_episode

    run_original = inspect.unwrap(original)  # takes the parsed config

    def eval_main(cfg: AttentionEvalPipelineConfig) -> Any:
        options = cfg.eval
        cfg.eval = plain_eval_config(options)
        check_first_episode(options.first_episode, f"--{EVAL.first}")
        acting = _start_acting(cfg, options)
        draws_less = draws_at_inferences(cfg, options)
        if draws_less:
            _check_policy(cfg, f"--{EVAL.render}={options.render}")
        run = None
        if options.save_attention_maps:
            run = _start_run(cfg, options.attention, acting, {"render": options.render} if draws_less else {})
        with ExitStack() as stack:
            if draws_less or (run and run.config.segmentation) or (acting and acting.condition.needs_masks):
                from lerobot_attn.plugin.segmentation import environments_with_masks

                stack.enter_context(environments_with_masks(cfg.env.type))
            if run is not None:
                stack.enter_context(
                    recording(
                        namespace,
                        run,
                        env_type=cfg.env.type,
                        env=cfg.env,
                        acting=acting,
                        first_episode=options.first_episode,
                    )
                )
            if acting is not None:
                from lerobot_attn.plugin.acting import acting_in

                stack.enter_context(acting_in(namespace, acting))
            if draws_less:
                stack.enter_context(drawing_at_inferences(namespace))
            if options.first_episode:
                stack.enter_context(beginning_at(namespace, options.first_episode))
            result = _run_or_end(run_original, cfg, run)
        if run is not None:
            run.upload_evaluation(Path(cfg.output_dir))
        if run is not None and run.failures:
            sys.exit(
                f"error: the evaluation is done, but attention of {len(run.failures)} episodes could not be "
                "saved whole: "
                f"{run.failures[0]}"
            )
        return result

    return with_options(original, eval_main, AttentionEvalPipelineConfig, EVAL)


def _run_or_end(run_original: Callable[[Any], Any], cfg: Any, run: RunRecorder | None) -> Any:
    """Run the evaluation; end the process with the signal's status if one has asked for the end."""
    from lerobot_attn.recording.preemption import Preempted

    try:
        return run_original(cfg)
    except (Exception, Preempted) as error:
        number = run.preemption.number if run is not None else None
        if number is None:
            raise
        # A cluster signals the processes of the environments too, and their end may come first.
        why = "" if isinstance(error, Preempted) else f" ({type(error).__name__}: {error})".replace("\n", " ")
        logger.warning(
            "Ended by %s%s: what was filmed until then is written; the same command goes on with "
            "--%s.existing=skip",
            signal.Signals(number).name,
            why,
            EVAL.attention,
        )
        logger.debug("", exc_info=True)
        sys.exit(128 + number)


def _check_policy(cfg: Any, option: str) -> None:
    """Check that a policy can be observed, and that one task runs at a time."""
    from lerobot_attn.policies import adapter_type

    adapter_type(cfg.policy)
    if getattr(cfg.env, "max_parallel_tasks", 1) > 1:
        raise ConfigError(
            f"env.max_parallel_tasks: got {cfg.env.max_parallel_tasks}, expected 1 with {option}, "
            "because parallel tasks share one policy and its action queue; evaluate several environments at "
            "once with --eval.batch_size"
        )


def _start_acting(cfg: Any, options: Any) -> Acting | None:
    """Read what is to be done to the policy, before an environment is built; None: nothing.

    Args:
        cfg: the parsed options.
        options: those of `--eval`.

    Raises:
        UnsupportedPolicyError, ConfigError: it cannot be done.
    """
    if options.interventions is None:
        return None
    from lerobot_attn.plugin.acting import Acting, read_condition

    condition = read_condition(options.interventions, f"--{EVAL.interventions}")
    acting = Acting(condition, options.attention.roles, options.first_episode)
    _check_policy(cfg, f"--{EVAL.interventions}")
    if condition.needs_masks:
        from lerobot_attn.plugin.segmentation import check_masks

        check_masks(cfg.env.type, options.attention.roles)
    if acting.condition.interventions and getattr(cfg.policy, "compile_model", False):
        raise ConfigError(
            f"--{EVAL.interventions}: got {acting.condition.name} with policy.compile_model=true, expected "
            "false, because a compiled policy cannot be acted on; leave one of the two out"
        )
    return acting


def _start_run(cfg: Any, config: Any, acting: Acting | None, said: dict[str, Any]) -> RunRecorder:
    """Check all that can be checked before an environment is built.

    Args:
        cfg: the parsed options.
        config: the capture settings.
        acting: what is done to the policy, if something is.
        said: what every store says of the run beside the usual.

    Raises:
        UnsupportedPolicyError, ConfigError, StoreError: the run cannot be recorded.
    """
    from lerobot_attn.recording.conditions import said_of
    from lerobot_attn.recording.provenance import checkpoint_facts, versions
    from lerobot_attn.recording.run import RunRecorder

    _check_policy(cfg, f"--{EVAL.flag}=true")
    attributes = dict(said)
    if config.segmentation:
        from lerobot_attn.plugin.segmentation import SOURCE, check_masks

        check_masks(cfg.env.type, config.roles)
        attributes["segmentation"] = SOURCE
    folder = Path(config.dir) if config.dir else Path(cfg.output_dir) / "attention"
    attributes |= {
        "versions": versions(),
        "policy": checkpoint_facts(cfg.policy),
        "env_type": cfg.env.type,
        **said_of(None if acting is None else acting.condition),
    }
    return RunRecorder(config, folder, attributes)


def recording(
    namespace: dict[str, Any],
    run: RunRecorder,
    *,
    env_type: str,
    env: Any = None,
    acting: Acting | None = None,
    first_episode: int = 0,
) -> AbstractContextManager[None]:
    """Wrap the evaluation script's functions for one run.

    Args:
        namespace: globals of the script, where its functions look each other up by name.
        run: records what they do.
        env_type: LeRobot's name of the environment, by which dimensions get their names.
        env: the environment's config, as far as it is known.
        acting: what is done to the policy, if something is; it wraps the functions by itself, see
            `acting_in`.
        first_episode: number of each task's first episode.
    """
    from lerobot_attn.plugin.feeding.facts import World
    from lerobot_attn.plugin.feeding.gather import environment_of
    from lerobot_attn.plugin.feeding.quiet import QuietChecks

    checks = QuietChecks(lambda: World() if env is None else environment_of(env))
    return replaced_names(
        namespace,
        {
            "eval_policy_all": functools.partial(_wrap_eval_policy_all, run=run, first_episode=first_episode),
            "run_one": functools.partial(
                _wrap_run_one, run=run, env_type=env_type, first_episode=first_episode, acting=acting
            ),
            "rollout": functools.partial(_wrap_rollout, run=run, checks=checks, acting=acting),
        },
    )


def _wrap_eval_policy_all(
    original: Callable[..., Any], run: RunRecorder, *, first_episode: int
) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def eval_policy_all(*args: Any, **kwargs: Any) -> dict[str, Any]:
        from lerobot_attn.capture import find_tokenizer

        call = signature.bind(*args, **kwargs).arguments
        run.announce(sum(map(len, call["envs"].values())), call["n_episodes"], first_episode)
        with run.watch(call["policy"], find_tokenizer(call["preprocessor"])):
            info: dict[str, Any] = original(*args, **kwargs)
        _list_paths(info)
        return info

    return eval_policy_all


def _list_paths(info: dict[str, Any]) -> None:
    """List the stores beside the videos in the evaluation's summary, per group and over all."""
    info["overall"]["attention_paths"] = []
    for task in info["per_task"]:
        paths = task["metrics"].get("attention_paths", [])
        info["overall"]["attention_paths"] += paths
        info["per_group"][task["task_group"]].setdefault("attention_paths", []).extend(paths)


def _wrap_run_one(
    original: Callable[..., Any],
    run: RunRecorder,
    *,
    env_type: str,
    first_episode: int,
    acting: Acting | None,
) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def run_one(*args: Any, **kwargs: Any) -> Any:
        from lerobot_attn.plugin import going_on

        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        run.preemption.check()
        plan, seed, point = _task_plan(call, env_type, first_episode), call["start_seed"], None
        if going_on.names_its_episodes(call):
            point = run.whole_before(plan, seed)
        if point is not None:
            going_on.go_on(call, point)
            plan = replace(plan, n_before=len(point.results), videos=_videos_of(call))
            if acting is not None:
                acting.pass_episodes(plan.n_before)
        run.start_task(plan, seed)
        metrics: dict[str, Any] = {}
        if call["n_episodes"]:
            _, _, metrics = original(*bound.args, **bound.kwargs)
        if point is not None:
            metrics = going_on.joined(point, metrics)
        summary = run.end_task()
        metrics["attention_paths"] = summary.paths
        metrics["attention"] = summary.to_dict()
        return call["task_group"], call["task_id"], metrics

    return run_one


def _task_plan(call: dict[str, Any], env_type: str, first_episode: int) -> TaskPlan:
    from lerobot_attn.recording.plan import DimensionNames
    from lerobot_attn.recording.run import TaskPlan

    return TaskPlan(
        group=call["task_group"],
        task_id=call["task_id"],
        n_episodes=call["n_episodes"],
        max_steps=int(call["env"].call("_max_episode_steps")[0]),  # as the rollout asks
        fps=float(call["env"].unwrapped.metadata.get("render_fps", 30)),
        videos=_videos_of(call),
        n_videos=call["max_episodes_rendered"],
        first_episode=first_episode,
        names=DimensionNames(STATE_NAMES.get(env_type, ()), ACTION_NAMES.get(env_type, ())),
    )


def _videos_of(call: dict[str, Any]) -> Path | None:
    """Return the folder of a task's videos, as LeRobot names it."""
    folder = call["videos_dir"]
    return None if folder is None else Path(folder) / f"{call['task_group']}_{call['task_id']}"


def _wrap_rollout(
    original: Callable[..., Any], run: RunRecorder, *, checks: QuietChecks, acting: Acting | None
) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def rollout(*args: Any, **kwargs: Any) -> Any:
        from lerobot_attn.plugin.going_on import random_state, results_of
        from lerobot_attn.policies.taps import replaced_attribute

        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        env, policy = call["env"], call["policy"]
        run.preemption.check()
        with ExitStack() as stack:
            scenes = None
            if run.config.segmentation:
                from lerobot_attn.plugin.segmentation import scenes_of_rollout

                scenes = stack.enter_context(scenes_of_rollout(call, run.config.roles)).of
            recorder = stack.enter_context(run.rollout(env.num_envs, call["seeds"], scenes))
            look = functools.partial(checks.look, policy, call["preprocessor"], call["postprocessor"])
            observers = _Observers(
                run, recorder, env, policy, call["env_preprocessor"], call.get("preprocessor"), look, acting
            )
            call["env_preprocessor"] = observers.env_preprocessor
            stack.enter_context(replaced_attribute(env, "step", observers.step))
            stack.enter_context(replaced_attribute(policy, "select_action", observers.select_action))
            result = original(*bound.args, **bound.kwargs)
            run.finish_rollout(rewards=result["reward"].numpy(), successes=result["success"].numpy())
            run.tell_progress(results_of(result), random_state())
        return result

    return rollout


class _Observers:
    """Stand-ins for what a rollout calls: each calls the original and tells the recorder."""

    def __init__(
        self,
        run: RunRecorder,
        recorder: Any,
        env: Any,
        policy: Any,
        env_preprocessor: Any,
        preprocessor: Any,
        look: Callable[..., Any],
        acting: Acting | None,
    ):
        self._run = run
        self._recorder = recorder
        self._env = env
        self._step = env.step
        self._select_action = policy.select_action
        self._env_preprocessor = env_preprocessor
        self._renamed = renamed_by(preprocessor)
        self._look: Callable[..., Any] | None = look  # at the first observation
        self._tasks: Any = None
        self._acting = acting

    def env_preprocessor(self, observation: dict[str, Any]) -> dict[str, Any]:
        self._run.preemption.check()  # here the frame before is whole
        own = observation.get("task")
        result: dict[str, Any] = self._env_preprocessor(observation)
        if own is not None and self._tasks is None and self._acting and self._acting.condition.changes_task:
            self._recorder.say("environment_task", [str(task) for task in own])
        self._tasks = result.get("task", own)  # another one where a condition says so
        state = result.get("observation.state")
        self._recorder.on_observation(
            None if state is None else state.detach().cpu().numpy().copy(),
            self._tasks,
            {self._renamed.get(name, name): value for name, value in result.items()},
        )
        return result

    def select_action(self, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        look, self._look = self._look, None
        found = None if look is None else look(batch, self._tasks)
        if found is not None and len(found) == self._env.num_envs:
            self._recorder.say(INPUT_CHECKS, found)
        self._run.before_inference()
        action = self._select_action(batch, *args, **kwargs)
        self._recorder.on_action(batch if self._acting is None else self._acting.seen(batch), action)
        return action

    def step(self, actions: Any) -> Any:
        outcome = self._step(actions)
        _, reward, terminated, truncated, info = outcome
        self._recorder.on_step(
            actions.copy(), reward.copy(), _successes(info, self._env.num_envs), terminated | truncated
        )
        return outcome


def _successes(info: dict[str, Any], n_envs: int) -> Any:
    """Return (batch,) bool as the rollout reads it from a step's info; its result is compared at the end."""
    import numpy as np

    final = info.get("final_info", info)
    if isinstance(final, dict):
        found = final.get("is_success", False)
    else:  # Gymnasium before 1.0: one dict per environment
        found = [isinstance(item, dict) and bool(item.get("is_success", False)) for item in final]
    return np.broadcast_to(np.asarray(found, dtype=bool), (n_envs,)).copy()
