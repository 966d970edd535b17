"""Replay: a policy looks at recorded observations, and what it attends to is recorded.

    record_dataset(policy, "lerobot/pusht", "out", preprocessor=preprocessor, postprocessor=postprocessor)

The policy is asked at some frames of each episode; its chunk stands beside the actions that were recorded
from there on. It moves nothing: the next observation is the recorded one, whatever it would have done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lerobot_attn.capture import InferenceRecord, capture_attention, find_tokenizer
from lerobot_attn.config import REFERENCE, AttentionConfig
from lerobot_attn.errors import ConfigError
from lerobot_attn.interventions import FixedNoise, Occlude
from lerobot_attn.policies import unwrap
from lerobot_attn.policies.base import Probe, Site
from lerobot_attn.prompt import Tokenizer
from lerobot_attn.recording.background import quick_turns
from lerobot_attn.recording.beside import viewers_beside
from lerobot_attn.recording.conditions import Interventions, acting_on, refuse_masks, said_of
from lerobot_attn.recording.dataset import DatasetFrames
from lerobot_attn.recording.first_look import InputChecks, is_pipeline
from lerobot_attn.recording.folder import Remedies, RunFolder
from lerobot_attn.recording.footage import Footage
from lerobot_attn.recording.plan import EpisodeResult
from lerobot_attn.recording.provenance import check_encoder
from lerobot_attn.recording.replay_ask import Asker
from lerobot_attn.recording.replay_inputs import ReplayInputs
from lerobot_attn.recording.replay_run import ReplayRun
from lerobot_attn.recording.uploading import check_upload, uploading
from lerobot_attn.sizes import Progress

logger = logging.getLogger(__name__)

_REMEDIES = Remedies("choose another folder", "AttentionConfig(existing=…), --attention.existing=")


def record_dataset(
    policy: Any,
    dataset: Any,
    folder: str | Path,
    config: AttentionConfig | None = None,
    *,
    preprocessor: Any = None,
    postprocessor: Any = None,
    tokenizer: Tokenizer | None = None,
    episodes: Sequence[int] | None = None,
    every: int | Literal["chunk"] | None = None,
    rename: Mapping[str, str] | None = None,
    task: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    attributes: Mapping[str, Any] | None = None,
    probes: Sequence[tuple[Probe, Iterable[Site]]] = (),
    interventions: Interventions | None = None,
    progress: Progress | None = None,
    checks: InputChecks | None = None,
) -> list[EpisodeResult]:
    """Ask a policy about recorded observations and store what it attends to, one store an episode.

    Stores go to `{folder}/attention/{data set}_{task_index}/episode_{index:05d}.zarr`. All frames of an
    episode are frames of its store: `action` is the recorded action, `frame_inference` and `frame_query` say
    which token of which inference stands for the frame, `predicted_action` what that token says in the
    robot's units, and `action_error` how far it is from the recorded one. `episode_index`, `frame_index`,
    `timestamp` and `task_index` are the data set's, to join with it.

    Each inference starts from noise that depends on `seed`, its episode and its frame alone, so neither the
    batch nor the choice of episodes changes what is stored, beyond the rounding of floats.

    Args:
        policy: a LeRobot policy.
        dataset: a LeRobotDataset, its folder, its name, or `VideoFrames`.
        folder: where to record; `config.dir`, if given, holds the stores instead of `{folder}/attention`.
        config: what to capture and how to store it. `mean_layers="auto"` means all layers, as in
            evaluations. `config.existing="skip"` goes on where an earlier replay was cut off.
            `config.cameras="reference"` lets the stores point into the data set's own videos.
        preprocessor: the policy's; without it the policy gets the observations as they are.
        postprocessor: the policy's, which gives actions in the robot's units; without it there is no
            `predicted_action`.
        tokenizer: the one whose ids the policy gets, where there is no preprocessor.
        episodes: numbers of the episodes; default: all.
        every: ask at frames 0, every, 2 · every, …; default, and "chunk": where the policy would have
            run anew, every `n_action_steps`. Frames beyond a chunk's end have no token: `frame_query` is -1.
        rename: the data set's feature → the policy's, e.g. {"observation.images.front":
            "observation.images.image"}.
        task: the instruction, instead of the recorded ones.
        batch_size: frames that the policy is asked about in one call. Their maps are in memory together. One
            of a policy that denoises and takes no noise (X-VLA), because it draws its own for a whole batch.
        seed: of the noise.
        attributes: further plain values that each store says of itself.
        probes: others that watch or change the policy, as `capture_attention` takes them.
        interventions: what is done to the policy, which each store then says: a `Condition`, interventions,
            or what `intervene` yielded; None: what acts on the policy already. Noise is the same in every
            condition anyway; the seed of a `fixed_noise` stands in place of `seed`.
        progress: called with (frames done, frames in all).
        checks: looks at each episode's first observation, if `preprocessor` is a LeRobot pipeline; what it
            finds is the store's `input_checks`. `lerobot_attn.record_dataset` brings its own.

    Returns:
        What became of each episode.

    Raises:
        UnsupportedPolicyError: no adapter knows the policy.
        ConfigError: no such data set or episode; a camera, state or action that does not fit the policy; or a
            setting out of range.
        StoreError: the folder cannot be used, holds episodes already (`config.existing`) or those of another
            replay, or there is no video encoder.
        CaptureError: pictures that are no float in [0, 1]; at the end, if some episode could not be saved
            whole, or at once with `config.on_error="abort"`.
    """
    config = (config or AttentionConfig()).for_evaluation().without_simulator("in a replay")
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        _check_whole(name, value, least)
    if every is not None and every != "chunk":
        _check_whole("every", every, 1, " or 'chunk'")
    footage: Footage = dataset if _is_footage(dataset) else DatasetFrames(dataset)
    inputs = _inputs(unwrap(policy).config, footage, config, rename, preprocessor)
    wanted = footage.choose(config.episodes if episodes is None else episodes)
    config = replace(config, episodes=None)  # they are chosen
    run_folder = RunFolder(_stores_in(folder, config), config.existing, _REMEDIES)
    check_encoder(policy, config)
    tokenizer = tokenizer or find_tokenizer(preprocessor)
    records: list[InferenceRecord] = []
    failures: list[Exception] = []
    with (
        run_folder.claim(),
        uploading(run_folder.path, config) as uploads,
        quick_turns(),
        viewers_beside(run_folder.path, config),
        acting_on(
            policy, interventions, "a replay", tokenizer=tokenizer, preprocessor=preprocessor
        ) as acting,
        capture_attention(
            policy,
            config,
            tokenizer=tokenizer,
            on_record=records.append,
            on_failure=failures.append,
            probes=probes,
        ) as capture,
    ):
        if every in (None, "chunk"):
            every = footage.every if every is None and footage.every else capture.policy.n_action_steps
        assert isinstance(every, int)
        condition = None if acting is None else acting.condition
        if condition is not None:
            refuse_masks(condition, "a replay")
            paints = any(isinstance(one, Occlude) for one in condition.interventions)
            if paints and config.cameras == REFERENCE:
                raise ConfigError(
                    f"cameras: got {REFERENCE!r}, but a condition paints over pictures, which the data set's "
                    "videos do not show; set cameras=true"
                )
            seed = next((one.seed for one in condition.interventions if isinstance(one, FixedNoise)), seed)
        looks = None
        if checks is not None and is_pipeline(preprocessor):
            looks = partial(
                checks, policy, preprocessor, postprocessor, state_names=footage.features.state_names
            )
        asker = Asker(
            policy, capture, inputs, preprocessor, postprocessor, seed, records, failures, acting, looks
        )
        said = {
            **footage.said,
            "every": every,
            "rename": dict(rename or {}),
            "task": task,
            "not_given": list(inputs.not_given),
            "noise_seed": asker.seed,
        }
        if asker.draws_itself and batch_size > 1:
            logger.info("The policy draws its own noise, so it is asked about one frame at a time")
            batch_size = 1
        run = ReplayRun(policy, run_folder, config, footage, every=every, batch_size=batch_size, task=task)
        run.uploads = uploads
        said_too = {"replay": said, "dataset": footage.dataset, **said_of(condition), **(attributes or {})}
        run.run(asker, wanted, said_too, progress)
    return run.results


def check_replay(
    policy_config: Any,
    footage: Footage,
    folder: str | Path,
    config: AttentionConfig,
    rename: Mapping[str, str] | None,
    preprocessor: Any,
) -> None:
    """Check what can be checked before a policy's weights are loaded; arguments as of `record_dataset`.

    Args:
        policy_config: the policy's config.
        footage: what is replayed.
        folder: where to record.
        config: how to.
        rename: the footage's feature → the policy's.
        preprocessor: the policy's.

    Raises:
        ConfigError: a camera, state or action does not fit the policy, or no store can point to its videos.
        StoreError: the folder cannot be used.
    """
    check_upload(config)
    _inputs(policy_config, footage, config, rename, preprocessor)
    RunFolder(_stores_in(folder, config), config.existing, _REMEDIES)


def _inputs(
    policy_config: Any,
    footage: Footage,
    config: AttentionConfig,
    rename: Mapping[str, str] | None,
    preprocessor: Any,
) -> ReplayInputs:
    inputs = ReplayInputs.of(policy_config, footage, rename, preprocessor)
    if config.cameras == REFERENCE:
        footage.check_clips(list(inputs.cameras))
    return inputs


def _stores_in(folder: str | Path, config: AttentionConfig) -> Path:
    return Path(config.dir) if config.dir else Path(folder) / "attention"


def _is_footage(dataset: Any) -> bool:
    return all(hasattr(dataset, name) for name in ("observation", "pictures", "choose"))


def _check_whole(name: str, value: Any, least: int, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: got {value!r}, expected a whole number of at least {least}{otherwise}")
