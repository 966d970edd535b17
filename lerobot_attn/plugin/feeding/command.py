"""`lerobot-attn doctor --policy.path=…`: one observation goes through the checkpoint's own processors.

Knows LeRobot's factories of environments. Loads no weights and runs no policy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lerobot_attn.errors import FAILED, OK, Check, ConfigError, UnsupportedPolicyError, first_line
from lerobot_attn.plugin.checkpoints import Checkpoint, read_checkpoint
from lerobot_attn.plugin.feeding import check_feeding
from lerobot_attn.plugin.feeding.facts import STATE, Facts, Fed, Recorded, World
from lerobot_attn.plugin.feeding.gather import FedReader, environment_of, expected_of
from lerobot_attn.plugin.own_options import by_section, rename_map
from lerobot_attn.policies import adapter_type
from lerobot_attn.recording.dataset import DatasetFrames

_EPISODES = 8  # of a data set that are looked at


@dataclass(frozen=True)
class FeedingRequest:
    """What the command line asks for.

    Attributes:
        policy_path: the checkpoint's folder, or its name on the Hub.
        dataset: a LeRobotDataset's folder or name.
        rename: JSON of a data set's or an environment's feature → the policy's.
        options: `--policy.name=value` and `--env.name=value`, as they were written.
    """

    policy_path: str
    dataset: str | None = None
    rename: str | None = None
    options: Sequence[str] = field(default_factory=list)


def run_feeding_checks(
    request: FeedingRequest, tell: Callable[[str], None] = lambda text: None
) -> list[Check]:
    """Do what the command line asks for.

    Without an environment the policy is fed a data set's first frame; with both, the environment's first
    observation, and the data set is what it is compared with; with neither, only the checkpoint is looked at.

    Args:
        request: what it asks for.
        tell: called with what is being done, for a progress line.

    Returns:
        One `Check` each, in the order in which problems should be solved.

    Raises:
        ConfigError: there is no such checkpoint, environment or data set, or an option is none.
        UnsupportedPolicyError: nobody knows how to read the policy's prompt.
    """
    options = by_section(request.options, ("policy", "env"))
    rename = rename_map(request.rename)
    tell("Reading the checkpoint")
    checkpoint = read_checkpoint(request.policy_path, options["policy"])
    expected = expected_of(*checkpoint)
    world = fed = recorded = None
    broken: list[Check] = []
    observation: Mapping[str, Any] | None = None
    if request.dataset is not None:
        tell("Reading the data set")
        recorded, observation = _recorded(request.dataset, rename)
    if options["env"]:
        tell("Making the environment")
        world, observation = _first_observation(options["env"], checkpoint.config)
    if observation is not None:
        named = {rename.get(name, name): value for name, value in observation.items()}
        fed, broken = _feed(checkpoint, named)
    said = _said_of_neurons(checkpoint.config)
    return [*broken, *check_feeding(Facts(expected, fed, world, recorded)), *said]


def _said_of_neurons(config: Any) -> list[Check]:
    """Say which neurons of a policy that has some cannot change an action, before anybody fires them."""
    try:
        family = adapter_type(config)
    except UnsupportedPolicyError:
        return []
    if family == "smolvla":
        n_layers = config.num_vlm_layers
        n_experts = config.num_expert_layers if config.num_expert_layers > 0 else n_layers
        first = (n_experts - 1) * (n_layers // n_experts) if n_experts > 0 else -1
    elif family in ("pi0", "pi05"):
        from lerobot.policies.pi05.modeling_pi05 import get_gemma_config

        n_layers = getattr(config, "depth", None) or get_gemma_config(config.paligemma_variant).depth
        first = n_layers - 1
    else:
        return []
    numbers = (
        f" ({', '.join(map(str, range(first, n_layers)))} of {n_layers}, from 0)" if n_layers > 0 else ""
    )
    detail = (
        f"neurons and residuals of the language model's last layer{numbers} reach no action, so firing them "
        "changes nothing; all others can be fired"
    )
    return [Check("neurons", OK, detail)]


def _feed(checkpoint: Checkpoint, observation: Mapping[str, Any]) -> tuple[Fed, list[Check]]:
    """Return what comes out of the preprocessor; of one that raises what went in, and the failed check."""
    reader, task = FedReader(checkpoint.config, checkpoint.preprocessor), str(observation["task"][0])
    try:
        return reader.read(checkpoint.preprocessor(dict(observation)), 0, task), []
    except Exception as error:  # LeRobot's steps raise whatever they raise
        check = Check(
            "preprocessor",
            FAILED,
            f"raised {type(error).__name__}: {first_line(error)}",
            "see what else fails below; states and pictures are judged as they went in",
        )
    fed = reader.read(observation, 0, task)
    scale = expected_of(*checkpoint).scale(STATE)
    if fed.state is None or scale is None or np.size(scale.centre) != len(fed.state):
        return fed, [check]
    state = (fed.state - scale.centre) / scale.half
    return Fed(fed.pictures, state, fed.prompt, fed.task), [check]


def _first_observation(options: Sequence[str], config: Any) -> tuple[World, dict[str, Any]]:
    """Make an environment as LeRobot does, and return its first observation as its evaluation gives it."""
    import draccus
    from lerobot.envs import close_envs, make_env, make_env_pre_post_processors, preprocess_observation
    from lerobot.envs.configs import EnvConfig

    kinds = [option.removeprefix("--type=") for option in options if option.startswith("--type=")]
    known = EnvConfig.get_known_choices()
    if not kinds or kinds[-1] not in known:
        raise ConfigError(
            f"--env.type: got {kinds[-1] if kinds else 'none'}, expected one of {', '.join(known)}"
        )
    fields = [option for option in options if not option.startswith("--type=")]
    try:
        env_config = draccus.parse(EnvConfig.get_choice_class(kinds[-1]), args=fields)
        if getattr(env_config, "task_ids", []) is None:
            env_config.task_ids = [0]  # one is enough
    except SystemExit as error:  # the parser has printed what it did not understand
        raise ConfigError(
            f"--env: got {' '.join(fields)}, expected fields of its config as --env.name=value"
        ) from error
    except Exception as error:
        raise ConfigError(f"--env: {first_line(error)}; expected what lerobot-eval takes") from error
    envs = None
    try:
        # Simulators print as they like; what is printed here is the report.
        with redirect_stdout(sys.stderr):
            envs = make_env(env_config, n_envs=1, use_async_envs=False)
            env = next(env for tasks in envs.values() for env in tasks.values())
            raw, _ = env.reset(seed=[0])
            observation = preprocess_observation(raw)
            observation["task"] = _tasks(env)
            preprocess, _ = make_env_pre_post_processors(env_config, config)
            return environment_of(env_config), dict(preprocess(observation))
    except Exception as error:
        raise ConfigError(
            f"--env: {env_config.type} shows no observation ({type(error).__name__}: {first_line(error)}); "
            "lerobot-attn doctor without --policy.path says what is missing on this machine"
        ) from error
    finally:
        if envs is not None:
            with redirect_stdout(sys.stderr):
                close_envs(envs)


def _tasks(env: Any) -> list[str]:
    """Return the instruction of each environment, as LeRobot's rollout finds it."""
    for name in ("task_description", "task"):
        try:
            return [str(task) for task in env.call(name)]
        except (AttributeError, NotImplementedError):
            continue
    return [""] * int(env.num_envs)


def _recorded(dataset: str, rename: Mapping[str, str]) -> tuple[Recorded, dict[str, Any]]:
    """Return what a data set holds, and its first frame as a batch of one."""
    frames = DatasetFrames(dataset)
    n_episodes = int(frames.meta.total_episodes)
    chosen = np.unique(np.linspace(0, n_episodes - 1, _EPISODES).astype(int)).tolist()
    episodes = [frames.episode(index) for index in frames.choose(chosen)]
    features = frames.features

    def numbers(array: str) -> np.ndarray | None:
        return np.concatenate([e.arrays[array] for e in episodes]) if array in episodes[0].arrays else None

    first = [frames.observation(episode.index, 0) for episode in episodes]
    pictures = {
        rename.get(camera, camera): [_picture(one[camera]) for one in first] for camera in features.cameras
    }
    observation = {name: value[None] for name, value in first[0].items()}
    recorded = Recorded(
        states=numbers("state"),
        actions=numbers("action"),
        state_names=features.state_names,
        action_names=features.action_names,
        fps=frames.fps,
        pictures=pictures,
    )
    return recorded, {**observation, "task": [episodes[0].tasks[0]]}


def _picture(picture: Tensor) -> np.ndarray:
    """Return (height, width, 3) float32 of LeRobot's (3, height, width)."""
    return picture.movedim(0, -1).to(torch.float32).numpy()
