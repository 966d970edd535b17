"""Episodes of one's own loop, be it around a robot, a simulator or a data set.

    with record_episodes(policy, "out", AttentionConfig(layers=[-1]), fps=20) as recording:
        with recording.episode(task="pick up the cup") as episode:
            policy.reset()
            while not done:
                action = policy.select_action(preprocessor(observation))
                …
                episode.step(observation, action)

Knows the policy by what it is asked and answers. Knows no environment, and LeRobot's scripts neither.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lerobot_attn.capture import (
    HostCopies,
    InferenceRecord,
    capture_attention,
    find_tokenizer,
)
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import CaptureError, ConfigError
from lerobot_attn.interventions import Intervener
from lerobot_attn.policies.base import Probe, Site
from lerobot_attn.policies.taps import replaced_attribute
from lerobot_attn.prompt import Tokenizer
from lerobot_attn.recording.beside import viewers_beside
from lerobot_attn.recording.conditions import Interventions, acting_on, said_of
from lerobot_attn.recording.first_look import INPUT_CHECKS, Found, InputChecks, is_pipeline
from lerobot_attn.recording.folder import Remedies, RunFolder, task_folder
from lerobot_attn.recording.handle import EpisodeHandle, write_out, write_out_after
from lerobot_attn.recording.loop_episode import Chosen, LoopEpisode, shown_by
from lerobot_attn.recording.plan import DimensionNames, EpisodePlan
from lerobot_attn.recording.provenance import check_encoder
from lerobot_attn.recording.series import EpisodeSeries
from lerobot_attn.recording.uploading import uploading

logger = logging.getLogger(__name__)

_MASKLESS = "a loop, unless intervene(…, masks=…) is entered around it and what it yields is given,"
_REMEDIES = Remedies("choose another folder", "AttentionConfig(existing=…): ")


@contextmanager
def record_episodes(
    policy: Any,
    folder: str | Path,
    config: AttentionConfig | None = None,
    *,
    fps: float,
    preprocessor: Any = None,
    tokenizer: Tokenizer | None = None,
    state_names: Sequence[str] = (),
    action_names: Sequence[str] = (),
    attributes: Mapping[str, Any] | None = None,
    probes: Sequence[tuple[Probe, Iterable[Site]]] = (),
    interventions: Interventions | None = None,
    checks: InputChecks | None = None,
) -> Iterator[LoopRecording]:
    """Record episodes of your own loop; `lerobot-attn view FOLDER` and `open_run(FOLDER)` open them.

    Stores go to `{folder}/attention/{group}_{task_id}/episode_{index:05d}.zarr`. They are written by a thread
    of their own; when its queue is full (`config.queue_mb`), the policy waits.

    Args:
        policy: a LeRobot policy, as the loop uses it: `select_action`, `predict_action_chunk`.
        folder: where to record; `config.dir`, if given, holds the stores instead of `{folder}/attention`.
        config: what to capture and how to store it. `mean_layers="auto"` (the default) means the layers of
            `layers` here.
        fps: frames per second of the videos.
        preprocessor: the policy's, whose tokenizer tells words and state digits apart.
        tokenizer: the tokenizer itself, where there is no preprocessor.
        state_names: names of the state's dimensions.
        action_names: names of the action's dimensions.
        attributes: further plain values that each store says of itself.
        probes: others that watch or change the policy, as `capture_attention` takes them.
        interventions: what is done to the policy, which each store then says: a `Condition`, interventions,
            or what `intervene` yielded; None: what acts on the policy already, if something does. An
            episode's `task` is then what to tell the policy.
        checks: looks at the first batch that the policy gets in each episode, if `preprocessor` is a LeRobot
            pipeline; what it finds is the store's `input_checks`. `lerobot_attn.record_episodes` brings its
            own.

    Raises:
        UnsupportedPolicyError: no adapter knows the policy.
        ConfigError: a layer, head or denoise step does not exist, fps is not above 0, or `config.cameras` is
            "reference".
        StoreError: the folder cannot be used or holds episodes already (`config.existing`), another recording
            goes on there, or there is no video encoder for the policy's cameras.
        CaptureError: at the end, if some episode could not be saved whole; or at once with
            `config.on_error="abort"`.
    """
    config = (config or AttentionConfig()).without_simulator("in a loop of your own")
    config.check_films()
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf"):
        raise ConfigError(f"fps: got {fps!r}, expected a number above 0, the frames per second of the loop")
    stores = Path(config.dir) if config.dir else Path(folder) / "attention"
    run_folder = RunFolder(stores, config.existing, _REMEDIES)
    check_encoder(policy, config)
    tokenizer = tokenizer or find_tokenizer(preprocessor)
    with (
        run_folder.claim(),
        uploading(run_folder.path, config) as uploads,
        viewers_beside(run_folder.path, config),
    ):
        names = DimensionNames(state_names, action_names)
        looks = partial(checks, policy, preprocessor, None) if checks and is_pipeline(preprocessor) else None
        recording = LoopRecording(policy, run_folder, config, fps, names, looks)
        recording.uploads = uploads
        with (
            acting_on(
                policy, interventions, _MASKLESS, tokenizer=tokenizer, preprocessor=preprocessor
            ) as acting,
            capture_attention(
                policy,
                config,
                tokenizer=tokenizer,
                on_record=recording._on_record,
                on_failure=recording._on_failure,
                probes=probes,
            ) as capture,
            replaced_attribute(policy, "select_action", recording._observed(policy.select_action)),
            replaced_attribute(policy, "predict_action_chunk", recording._asked(policy.predict_action_chunk)),
        ):
            recording._acting = acting
            condition = None if acting is None else acting.condition
            recording._begin(capture, {**said_of(condition), **(attributes or {})})
            capture.enabled = False
            try:
                yield recording
            except BaseException as error:
                write_out_after(recording._writer, recording._handles, error)
                recording._end()
                raise
            write_out(recording._writer, recording._handles, "Ctrl-C ends the loop")
            recording._end()
    recording._raise_of_failures()


class LoopRecording(EpisodeSeries):
    """The episodes of a loop; what `record_episodes` yields.

    Attributes:
        folder: where the stores go.
    """

    def __init__(
        self,
        policy: Any,
        run_folder: RunFolder,
        config: AttentionConfig,
        fps: float,
        names: DimensionNames,
        looks: Callable[..., list[Found] | None] | None = None,
    ):
        super().__init__(policy, run_folder, config, fps, names)
        self._looks = looks  # at (batch, tasks)
        self._looked = False
        self._open: list[LoopEpisode] = []  # one for each environment of the batch
        self._acting: Intervener | None = None

    @contextmanager
    def episode(
        self,
        task: str = "",
        *,
        group: str = "loop",
        task_id: int = 0,
        index: int | None = None,
        seed: int | None = None,
    ) -> Iterator[LoopEpisode]:
        """Record one episode: the frames that `step` is told of inside the block.

        An exception in the block ends the episode as incomplete, and goes on.

        Args:
            task: the instruction.
            group: first part of the folder's name, for several kinds of task.
            task_id: second part of the folder's name.
            index: the episode's number; default: the one after the last.
            seed: of the environment, if there is one.

        Raises:
            ConfigError: the number is not free, or an episode is open already.
            StoreError: an earlier recording's episode of that number was made otherwise
                (`existing="skip"`).
        """
        with self.episodes([task], group=group, task_id=task_id, indices=[index], seeds=[seed]) as (episode,):
            yield episode

    @contextmanager
    def episodes(
        self,
        tasks: Sequence[str],
        *,
        group: str = "loop",
        task_id: int = 0,
        indices: Sequence[int | None] | None = None,
        seeds: Sequence[int | None] | None = None,
    ) -> Iterator[list[LoopEpisode]]:
        """Record one episode for each environment of a batch that the policy is asked about in one call.

        They begin together. Tell each of its own frames with `step`, and call `finish` of one that ends
        before the others: otherwise what the policy attends to there is kept in memory until the block is
        left.

        Args:
            tasks: the instruction of each environment, in the order of the batch.
            group: first part of the folder's name.
            task_id: second part of the folder's name.
            indices: the episodes' numbers; default: those after the last.
            seeds: of the environments, if they have some.

        Raises:
            ConfigError: a number is not free, or an episode is open already, or there is not one number or
                seed for each task.
            StoreError: an earlier recording's episode of such a number was made otherwise
                (`existing="skip"`).
        """
        if self._open:
            raise ConfigError("episode: another one is open, expected one at a time; leave its block first")
        rows = {"indices": indices or [None] * len(tasks), "seeds": seeds or [None] * len(tasks)}
        for name, values in rows.items():
            if isinstance(tasks, str) or not tasks or len(values) != len(tasks):
                raise ConfigError(
                    f"{name}: got {len(values)} for the tasks {tasks!r}, expected a list with one for each "
                    "environment of the batch"
                )
        named = task_folder(group, task_id)
        numbers = [index for index in rows["indices"] if index is not None]
        if len(set(numbers)) < len(numbers) or 0 < len(numbers) < len(tasks):
            raise ConfigError(f"indices: got {indices}, expected each number once, or none at all")
        plans, numbers = [], []
        for index, seed in zip(rows["indices"], rows["seeds"], strict=True):
            numbers.append(self._next.get(named, 0) if index is None else index)
            plans.append(self._plan(named, group, task_id, index, seed))
        told = self._told(tasks, numbers)
        opened = [
            LoopEpisode(
                self._policy,
                self._capture,
                self._writer,
                self._config,
                self._handle(plan, task, own),
                self._enable,
                task,
            )
            for plan, task, own in zip(plans, told, tasks, strict=True)
        ]
        self._open, self._looked = opened, False
        self._enable()
        try:
            yield opened
            for episode in opened:
                episode.finish()
        except BaseException as error:
            for episode in opened:
                episode.interrupt(error)
            raise
        finally:
            self._open = []
            self._enable()

    def _told(self, tasks: Sequence[str], episodes: Sequence[int]) -> list[str]:
        """Return what the policy is to be told of episodes that begin, one for each environment."""
        if self._acting is None:
            return [*tasks]
        self._acting.begin(episodes)
        return [self._acting.task(task, episode) for task, episode in zip(tasks, episodes, strict=True)]

    def _handle(self, plan: EpisodePlan | None, task: str, own: str) -> EpisodeHandle | None:
        if plan is None:
            return None
        handle = EpisodeHandle(plan, 0, self._config, self._writer, self._names, strict=False)
        handle.task, handle.has_reward, handle.has_success = task, False, False
        if self._acting is not None and self._acting.condition.changes_task:
            handle.attributes["environment_task"] = own
        self._handles.append(handle)
        return handle

    def _enable(self) -> None:
        """Watch the policy as long as something of it is wanted."""
        self._capture.enabled = any(episode.wants_inferences for episode in self._open)

    def _observed(self, select_action: Any) -> Any:
        def observed_select_action(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._look(batch, self._fps)
            for episode in self._open:
                episode.on_request()
            action = select_action(batch, *args, **kwargs)
            if any(episode.wants_inferences for episode in self._open):
                self._on_action(batch, action)
            return action

        return observed_select_action

    def _asked(self, predict_action_chunk: Any) -> Any:
        def asked_predict_action_chunk(*args: Any, **kwargs: Any) -> Any:
            self._look(args[0] if args else kwargs.get("batch"), None)  # the loop says what is executed of it
            for episode in self._open:
                episode.on_request()
            return predict_action_chunk(*args, **kwargs)

        return asked_predict_action_chunk

    def _look(self, batch: Any, fps: float | None) -> None:
        """Check the first batch of the episodes that are open."""
        if self._looks is None or self._looked or not self._open:
            return
        self._looked = True
        tasks = [episode.task or None for episode in self._open]  # what is not given here may be in the batch
        found = self._looks(batch, tasks, fps=fps, state_names=self._names.state)
        if found is not None and len(found) == len(self._open):
            for episode, checks in zip(self._open, found, strict=True):
                episode.say(INPUT_CHECKS, checks)

    def _on_action(self, batch: dict[str, Any], action: Any) -> None:
        """Nothing that goes wrong here may reach the loop through the policy."""
        rows, copies = None, HostCopies()
        try:
            rows = copies.copy(action.detach().float().reshape(len(self._open), -1))
            copies.seal()
        except Exception as error:
            self._on_failure(
                CaptureError(f"select_action returned no ({len(self._open)}, action_dim) tensor: {error}")
            )
        if self._acting is not None:
            batch = self._acting.seen(batch)
        views = shown_by(self._capture, batch) if self._config.cameras else None
        for env, episode in enumerate(self._open):
            episode.on_action(
                None if rows is None else Chosen(copies, rows[env : env + 1]),
                None if views is None else views.of(env),
            )

    def _on_record(self, record: InferenceRecord) -> None:
        self._tell_size(record.maps_bytes)
        if not self._open:
            return  # it ended after its episode, on a thread of its own
        if record.batch_size != len(self._open):
            raise CaptureError(
                f"the policy got a batch of {record.batch_size}, expected {len(self._open)}: an episode is "
                "one robot's or environment's; open one for each with `recording.episodes(tasks)`"
            )
        for env, episode in enumerate(self._open):
            episode.on_inference(record if record.batch_size == 1 else record.of(env))

    def _on_failure(self, error: Exception) -> None:
        if not self._open:
            logger.error("An inference outside of every episode could not be captured: %s", error)
        for episode in self._open:
            episode.fail(error)
