#!/usr/bin/env python
"""What capture costs: inference of the demo policy alone and its LIBERO rollouts, with capture over without.

    python benchmarks/overhead.py                    # eight minutes on two idle cores
    python benchmarks/overhead.py --only inference   # without LIBERO
    python benchmarks/overhead.py --policy smolvla_tiny --only rollouts   # another demo policy, or pi0_tiny

Inference: `predict_action_chunk` on one observation, kinds in turns: without capture; with capture, records
dropped; with capture and recording, where each inference is followed by the frames that it serves and by
waiting until all is on disk, which a rollout never waits for. Each kind has a policy of its own with the same
weights.

Rollouts: LeRobot's own `eval_policy_all` on one LIBERO task, videos and all, in one process, in turns, from
the same initial state with the same seed; recorded as `lerobot-eval` does. The time ends when the store is
closed.

That actions are bit for bit the same is checked, with and without capture, in both.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from common import Result, arguments, finish, in_turns, machine, median, ratio
from policies import Player, captures, infer, observation, tiny_policy

from lerobot_attn import AttentionConfig, capture_attention
from lerobot_attn.recording.background import BackgroundWriter

OFF = "without capture"
AT_MOST = 1.05
SUITE, TASK, SEED = "libero_object", 0, 1000
RECORDED = "recorded"
PARTS = ("inference", "rollouts")
POLICIES = ("pi05_tiny", "pi0_tiny", "smolvla_tiny")

Kinds = dict[str, Callable[[], Any]]


class SameActions:
    """Holds the actions of every kind to those of the first."""

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None

    def check(self, kind: str, actions: torch.Tensor) -> None:
        """Raise if the actions differ in any bit."""
        if self._first is None:
            self._first = actions.clone()
        if not torch.equal(actions, self._first):
            raise RuntimeError(
                f"{kind}: the actions differ from those of the first run, expected the same bits"
            )


@contextmanager
def inference_kinds(folder: Path, n_inferences: int, **sizes: Any) -> Iterator[Kinds]:
    """Yield what is timed: name → `n_inferences` inferences.

    Args:
        folder: where recordings go.
        n_inferences: in one timing.
        sizes: of the demo policy.
    """
    same, episode = SameActions(), itertools.count()
    batch = observation(tiny_policy(**sizes))

    with ExitStack() as stack:

        def kind(name: str, config: AttentionConfig | None, recorded: bool) -> Callable[[], None]:
            policy, capture = tiny_policy(**sizes), None
            if config is not None:
                keep = {} if recorded else {"on_record": lambda record: None}
                capture = stack.enter_context(capture_attention(policy, config, **keep))

            def run() -> None:
                with ExitStack() as recording:
                    if capture is not None and recorded:
                        writer = BackgroundWriter(config.queue_mb * 1_000_000)
                        recording.callback(writer.close)
                        player = Player(capture, config, folder / str(next(episode)))
                    for _ in range(n_inferences):
                        same.check(name, infer(policy, batch))
                        if capture is not None and recorded:
                            player.play(writer, batch, list(capture.drain()))

            return run

        yield {OFF: kind(OFF, None, False)} | {
            name + suffix: kind(name, config, bool(suffix))
            for suffix in ("", f", {RECORDED}")
            for name, config in captures().items()
        }


class Rollouts:
    """LIBERO, the demo policy and what stands between them, built once.

    Args:
        folder: where the checkpoint, the videos and the recordings go.
        policy_type: of the demo policy, whose weights are random.
        n_frames: frames of an episode.
        image_px: height and width of the cameras' pictures.
    """

    def __init__(self, folder: Path, policy_type: str, n_frames: int, image_px: int):
        from lerobot.configs import PreTrainedConfig
        from lerobot.envs import make_env
        from lerobot.envs.configs import LiberoEnv
        from lerobot.envs.factory import make_env_pre_post_processors
        from lerobot.policies.factory import make_policy, make_pre_post_processors

        from lerobot_attn.demo.checkpoint import make_demo_checkpoint

        checkpoint = make_demo_checkpoint(folder / policy_type, policy_type=policy_type, random=True)
        config = PreTrainedConfig.from_pretrained(checkpoint, cli_overrides=["--device=cpu"])
        config.pretrained_path = checkpoint
        env = LiberoEnv(
            task=SUITE,
            task_ids=[TASK],
            episode_length=n_frames,
            observation_height=image_px,
            observation_width=image_px,
        )
        self._envs = make_env(env, n_envs=1)
        self._policy = make_policy(config, env_cfg=env).eval()
        around_policy = make_pre_post_processors(config, pretrained_path=str(checkpoint))
        around_env = make_env_pre_post_processors(env_cfg=env, policy_cfg=config)
        names = ("preprocessor", "postprocessor", "env_preprocessor", "env_postprocessor")
        self._processors = dict(zip(names, (*around_policy, *around_env), strict=True))
        self._folder = folder
        self._count = itertools.count()
        self._same = SameActions()

    def kind(self, name: str, config: AttentionConfig | None) -> Callable[[], None]:
        """Return one evaluation of one episode, recorded with these settings or not at all."""
        from lerobot.scripts import lerobot_eval
        from lerobot.utils.random_utils import set_seed

        from lerobot_attn.plugin import recording
        from lerobot_attn.recording.run import RunRecorder

        def run() -> None:
            folder = self._folder / str(next(self._count))
            # LIBERO goes on to the next initial state at each reset.
            self._envs[SUITE][TASK].envs[0].unwrapped.init_state_id = 0
            set_seed(SEED)
            with ExitStack() as stack:
                stack.enter_context(
                    _watched_rollout(vars(lerobot_eval), functools.partial(self._same.check, name))
                )
                if config is not None:
                    recorder = RunRecorder(config, folder / "attention", {})
                    stack.enter_context(recording(vars(lerobot_eval), recorder, env_type="libero"))
                info = lerobot_eval.eval_policy_all(
                    envs=self._envs,
                    policy=self._policy,
                    **self._processors,
                    n_episodes=1,
                    max_episodes_rendered=10,
                    videos_dir=folder / "videos",
                    start_seed=SEED,
                )
            n_stores = len(info["overall"].get("attention_paths", []))
            if n_stores != (config is not None):
                raise RuntimeError(
                    f"{name}: got {n_stores} complete stores, expected {int(config is not None)}"
                )

        return run

    def close(self) -> None:
        """Close the simulation."""
        from lerobot.envs import close_envs

        close_envs(self._envs)


@contextmanager
def _watched_rollout(namespace: dict[str, Any], on_actions: Callable[[torch.Tensor], None]) -> Iterator[None]:
    original = namespace["rollout"]

    @functools.wraps(original)
    def rollout(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        on_actions(result["action"])
        return result

    namespace["rollout"] = rollout
    try:
        yield
    finally:
        namespace["rollout"] = original


def compare(what: str, seconds: dict[str, list[float]], targets: dict[str, float]) -> list[Result]:
    """Return each kind over the one without capture, and that one's seconds."""
    results = [
        ratio(
            f"{what}, capture {name} over without",
            values,
            seconds[OFF],
            at_most=targets.get(name),
            headline=name in targets,
        )
        for name, values in seconds.items()
        if name != OFF
    ]
    return [*results, median(f"{what}, {OFF}", seconds[OFF], "s")]


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    parsed = arguments(
        __doc__,
        ("--only", {"choices": PARTS, "help": "one of the two parts"}),
        ("--policy", {"choices": POLICIES, "default": POLICIES[0], "help": "of the rollouts"}),
        ("--frames", {"type": int, "default": 60, "help": "frames of a rollout (default: 60)"}),
    )
    if parsed.policy != POLICIES[0] and parsed.only != "rollouts":
        sys.exit(
            f"error: --policy {parsed.policy}: inferences are measured with {POLICIES[0]} alone, expected "
            "--only rollouts beside it"
        )
    before = machine()
    quick, results, details = parsed.quick, [], {}
    sizes = {"depth": 2, "num_inference_steps": 2} if quick else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if parsed.only != "rollouts":
            with inference_kinds(folder / "inference", 1 if quick else 2, **sizes) as kinds:
                seconds = in_turns(kinds, parsed.runs, warm_up=not quick)
            results += compare("inference of the demo policy", seconds, {})
            details["inference_s"] = seconds
        if parsed.only != "inference":
            os.environ.setdefault("MUJOCO_GL", "egl")
            os.environ.setdefault("SLURM_JOB_ID", "0")  # LeRobot's way to leave the progress bars out
            frames, image_px = (11, 64) if quick else (parsed.frames, 360)
            rollouts = Rollouts(folder, parsed.policy, frames, image_px)
            settings = dict(itertools.islice(captures().items(), 1 if quick else None))
            kinds = {OFF: rollouts.kind(OFF, None)}
            kinds |= {name: rollouts.kind(name, config) for name, config in settings.items()}
            seconds = in_turns(kinds, parsed.runs, warm_up=not quick)
            rollouts.close()
            of = "" if parsed.policy == POLICIES[0] else f" with {parsed.policy}"
            results += compare(f"LIBERO rollout of {frames} frames{of}", seconds, {"default": AT_MOST})
            details["rollout_s"] = seconds
    how = (
        f"demo policy ({parsed.policy}: LeRobot's own code and tokens, small layers), float32, 10 actions an "
        f"inference; LIBERO {SUITE} task {TASK}, two cameras of 360 × 360, LeRobot's own evaluation with its "
        "video; kinds in turns in one process, ratios of each round; actions bit for bit the same"
    )
    document = "overhead" if parsed.policy == POLICIES[0] else f"overhead_{parsed.policy}"
    return finish(document, results, parsed, how=how, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
