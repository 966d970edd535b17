"""`lerobot-attn replay`: a checkpoint is loaded as LeRobot loads it, and looks at recorded observations.

Knows LeRobot's checkpoints and the options' text. How a replay goes is `lerobot_attn.recording.replay`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lerobot_attn.errors import ConfigError
from lerobot_attn.plugin.own_options import attention_config, by_section, rename_map

if TYPE_CHECKING:
    from lerobot_attn.recording.plan import EpisodeResult


@dataclass
class ReplayRequest:
    """What the command line asks for.

    Attributes:
        policy_path: the checkpoint's folder, or its name on the Hub.
        output: where to record.
        dataset: a LeRobotDataset's folder or name.
        videos: CAMERA=FILE each, instead of a data set.
        task: the instruction; with a data set, instead of its own.
        state: an `.npy` of the videos' states.
        frames: the videos' frames that are asked about; None: all.
        episodes: the data set's episodes; None: all.
        every: frames from one question to the next, "chunk", or None.
        rename: JSON of the data set's feature → the policy's.
        batch_size: questions in one call of the policy.
        seed: of the noise.
        interventions: a YAML file of what is done to the policy.
        options: `--policy.name=value` and `--attention.name=value`, as they were written.
    """

    policy_path: str
    output: Path
    dataset: str | None = None
    videos: Sequence[str] = ()
    task: str | None = None
    state: Path | None = None
    frames: Sequence[int] | None = None
    episodes: Sequence[int] | None = None
    every: Any = None
    rename: str | None = None
    batch_size: int = 8
    seed: int = 0
    interventions: str | None = None
    options: Sequence[str] = field(default_factory=list)


def replay(request: ReplayRequest, progress: Callable[[int, int], None] | None = None) -> list[EpisodeResult]:
    """Do what the command line asks for; what can be checked is checked before weights are loaded.

    Args:
        request: what it asks for.
        progress: called with (frames done, frames in all).

    Raises:
        LerobotAttnError: as `record_dataset` says; or a checkpoint or an option that is none.
    """
    options = by_section(request.options, ("policy", "attention"))
    config = attention_config(options["attention"])
    rename = rename_map(request.rename)
    _check_doors(request)
    condition = None
    if request.interventions is not None:
        from lerobot_attn.plugin.acting import read_condition
        from lerobot_attn.recording.conditions import refuse_masks

        condition = read_condition(request.interventions, "--interventions")
        refuse_masks(condition, "a replay")

    from lerobot_attn.plugin.checkpoints import load_policy, read_checkpoint
    from lerobot_attn.plugin.recorders import record_dataset
    from lerobot_attn.recording import VideoFrames
    from lerobot_attn.recording.dataset import DatasetFrames
    from lerobot_attn.recording.replay import check_replay

    footage: Any
    if request.dataset is not None:
        footage = DatasetFrames(request.dataset)
    else:
        footage = VideoFrames(
            _videos(request.videos), task=request.task or "", state=request.state, frames=request.frames
        )
    episodes = footage.choose(config.episodes if request.episodes is None else request.episodes)
    checkpoint = read_checkpoint(request.policy_path, options["policy"])
    check_replay(checkpoint.config, footage, request.output, config, rename, checkpoint.preprocessor)
    policy = load_policy(checkpoint, getattr(footage, "meta", None), renames=True)
    return record_dataset(
        policy,
        footage,
        request.output,
        config,
        preprocessor=checkpoint.preprocessor,
        postprocessor=checkpoint.postprocessor,
        episodes=episodes,
        every=request.every,
        rename=rename,
        task=request.task,
        batch_size=request.batch_size,
        seed=request.seed,
        interventions=condition,
        progress=progress,
    )


def _check_doors(request: ReplayRequest) -> None:
    if (request.dataset is None) == (not request.videos):
        raise ConfigError("got neither or both of --dataset and --video, expected one of them")
    if request.videos and request.task is None:
        raise ConfigError('--task: not given, expected the instruction with --video; --task "" for none')
    if request.dataset is not None:
        for name, value in (("--state", request.state), ("--frames", request.frames)):
            if value is not None:
                raise ConfigError(f"{name}: goes with --video, a data set has its own; leave it out")


def _videos(texts: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        camera, _, file = text.partition("=")
        if not camera or not file or camera in found:
            raise ConfigError(f"--video: got {text!r}, expected CAMERA=FILE.mp4, each camera once")
        found[camera] = file
    return found
