"""The recording of an evaluation run: its folder, its tasks, and what became of every episode.

Knows the capture, the background writer and the recorder of a rollout. Knows nothing of LeRobot's scripts:
the plugin tells it when tasks and rollouts begin and end.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_attn.capture import AttentionCapture, InferenceRecord, capture_attention
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import RANDOM_WEIGHTS, CaptureError
from lerobot_attn.interventions.session import interveners_of
from lerobot_attn.masks import SceneMasks
from lerobot_attn.prompt import Tokenizer
from lerobot_attn.recording.background import BackgroundWriter
from lerobot_attn.recording.beside import viewers_beside
from lerobot_attn.recording.conditions import said_of
from lerobot_attn.recording.folder import RunFolder, stored_bytes, task_folder
from lerobot_attn.recording.handle import EpisodeHandle, write_out, write_out_after
from lerobot_attn.recording.observation import PolicyCameras, cameras_of
from lerobot_attn.recording.plan import DimensionNames, EpisodePlan, EpisodeResult
from lerobot_attn.recording.preemption import Preemption
from lerobot_attn.recording.provenance import check_encoder, policy_facts
from lerobot_attn.recording.rollout import RolloutRecorder
from lerobot_attn.recording.summary import TaskSummary
from lerobot_attn.recording.task_progress import Point, Result, TaskProgress
from lerobot_attn.recording.uploading import Uploads, check_upload, upload_evaluation, uploading
from lerobot_attn.sizes import format_bytes
from lerobot_attn.store.schema import EPISODE_SUFFIX

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskPlan:
    """One task of the run.

    Attributes:
        group: e.g. "libero_object".
        task_id: its number within the group.
        n_episodes: how many are evaluated; a last batch may roll out more, which are discarded.
        max_steps: frames that an episode can have.
        fps: frames per second of the evaluation's videos.
        videos: folder of the evaluation's own MP4s, or None.
        n_videos: how many of the first episodes get one.
        first_episode: number of the first; the videos are counted from 0 all the same.
        n_before: episodes at the beginning that are whole and not rolled out again; the videos are counted
            from behind them.
        names: names of state and action dimensions.
    """

    group: str
    task_id: int
    n_episodes: int
    max_steps: int
    fps: float = 30.0
    videos: Path | None = None
    n_videos: int = 0
    first_episode: int = 0
    n_before: int = 0
    names: DimensionNames = field(default_factory=DimensionNames)

    @property
    def name(self) -> str:
        """Name of the task's folder. A group's slashes (of namespaced environments) do not nest folders."""
        return task_folder(self.group, self.task_id)


class RunRecorder:
    """Records an evaluation run into `folder`.

    Args:
        config: the capture settings.
        folder: where the stores go: `{folder}/{group}_{task_id}/episode_{index:05d}.zarr`.
        attributes: what every store says of the run (versions, policy, environment).

    Attributes:
        preemption: whether a signal has asked for the end, which ends the run before its next frame.

    Raises:
        ConfigError: cameras are to be a data set's.
        StoreError: the folder holds episodes and `existing` is "refuse", is a file, or cannot be written; or
            `upload` is no address of a bucket.
        SetupError: `upload` is given, and the extra `remote` is not installed.
    """

    def __init__(self, config: AttentionConfig, folder: Path, attributes: Mapping[str, Any]):
        self.config = config = config.for_evaluation()
        config.check_films()
        check_upload(config)
        self.folder = folder
        self.failures: list[str] = []
        self.preemption = Preemption()
        self._attributes = dict(attributes)
        self._capture: AttentionCapture | None = None
        self._cameras = PolicyCameras()
        self._writer: BackgroundWriter | None = None
        self._uploads: Uploads | None = None
        self._task: TaskPlan | None = None
        self._progress: TaskProgress | None = None
        self._episodes: list[EpisodeHandle] = []
        self._next_episode = 0
        self._waited_before_s = 0.0
        self._size_told = False
        self._n_unsized = 0  # episodes of the running rollout whose size has not been told yet
        self._recorder: RolloutRecorder | None = None
        self._kept: list[EpisodeResult] = []
        self._run_folder = RunFolder(folder, config.existing)

    @contextmanager
    def watch(self, policy: Any, tokenizer: Tokenizer | None) -> Iterator[None]:
        """Capture the policy's attention while the run lasts.

        Raises:
            UnsupportedPolicyError: no adapter knows the policy.
            ConfigError: a layer, head or denoise step does not exist.
            StoreError: another run records into the folder, episodes to be kept are not of this run, or there
                is no video encoder.
            Preempted: a signal asked for the end; what was filmed until then is written.
        """
        check_encoder(policy, self.config)
        recorder_of = self._current_recorder
        with (
            self._run_folder.claim(),
            self.preemption.listening(),
            uploading(self.folder, self.config, lambda: self.preemption.number is not None) as self._uploads,
            viewers_beside(self.folder, self.config),
            capture_attention(
                policy,
                self.config,
                tokenizer=tokenizer,
                on_record=self._on_record,
                on_failure=lambda error: recorder_of().fail(error),
            ) as capture,
        ):
            capture.enabled = False
            self._capture = capture
            self._cameras = cameras_of(policy)
            self._attributes["policy"] = {
                **self._attributes.get("policy", {}),
                **policy_facts(capture.policy),
            }
            for acting in interveners_of(policy)[
                -1:
            ]:  # which knows more of its condition than the options did
                self._attributes |= said_of(acting.condition)
            self._run_folder.settle(self._attributes, self.config.to_dict())
            if capture.policy.random_weights:
                logger.warning("This policy has %s", RANDOM_WEIGHTS)
            if capture.policy.remark:
                logger.info("This policy is a %s", capture.policy.remark)
            self._writer = BackgroundWriter(self.config.queue_mb * 1_000_000)
            try:
                yield
            except BaseException as error:
                write_out_after(self._writer, self._episodes, error)
                raise
            finally:
                self._writer.close(0)
                if self._task is not None:  # the task raised: say what there is
                    self._report(self._summarise())

    def upload_evaluation(self, output: Path) -> None:
        """Send the evaluation's own videos and its eval_info.json to where the episodes went.

        The evaluation is over. Where episodes could not be sent, nothing is: what sends them takes these too.

        Args:
            output: the evaluation's output folder.
        """
        if self._uploads is not None and not self._uploads.n_left:
            upload_evaluation(self.folder, self.config, output)

    def announce(self, n_tasks: int, n_episodes: int, first_episode: int = 0) -> None:
        """Let every store say how many episodes the whole evaluation is to leave, if that is known.

        Args:
            n_tasks: how many are evaluated.
            n_episodes: of each.
            first_episode: number of each task's first.
        """
        if self.config.keep == "all":
            chosen, numbers = self.config.episodes, range(first_episode, first_episode + n_episodes)
            n_wanted = n_episodes if chosen is None else sum(index in chosen for index in numbers)
            self._attributes["n_episodes_expected"] = n_tasks * n_wanted

    def whole_before(self, task: TaskPlan, start_seed: int) -> Point | None:
        """Return where a task can go on without rolling out whole episodes again; None: at its beginning.

        Args:
            task: that has not been started.
            start_seed: of its first episode.

        Raises:
            StoreError: a whole episode was recorded with another seed.
        """
        if self.config.existing != "skip":
            return None
        self._progress = self._progress_of(task)
        self._progress.read()
        videos: list[Path] = []
        n_whole = 0
        for number in range(task.n_episodes):
            path = self._path_of(task, task.first_episode + number)
            if (found := self._run_folder.kept(path, start_seed + number)) is None:
                break
            if found.eval_video is not None:
                videos.append(found.eval_video)
                if not found.eval_video.exists():
                    break
            n_whole += 1
        point = self._progress.point(n_whole, task.n_episodes)
        return None if point is None else replace(point, videos=tuple(videos[: len(point.results)]))

    def start_task(self, task: TaskPlan, start_seed: int | None = None) -> None:
        """A task's rollouts begin.

        Args:
            task: what is rolled out.
            start_seed: of its first episode; needed with `n_before`.
        """
        self._task = task
        self._episodes = []
        self._kept = []
        self._next_episode = task.first_episode + task.n_before
        self._waited_before_s = self._open_writer.waited_s
        self._progress = self._progress or self._progress_of(task)  # `whole_before` has read it
        self._progress.go_on_behind(task.n_before)
        for number in range(task.n_before):
            self._plan(task, task.first_episode + number, None if start_seed is None else start_seed + number)
        if task.n_before:
            logger.info("%s: %d episodes are whole and not rolled out again", task.name, task.n_before)

    def end_task(self) -> TaskSummary:
        """The task's rollouts are done: wait until all is written.

        Raises:
            CaptureError: an episode could not be saved whole, and `on_error` is "abort".
        """
        write_out(self._open_writer, self._episodes, "Ctrl-C ends the evaluation")
        summary = self._summarise()
        self._report(summary)
        self._task = self._progress = None
        if self.failures and self.config.on_error == "abort":
            raise CaptureError(f"{self.failures[0]}; stopped because of on_error=abort")
        return summary

    @contextmanager
    def rollout(
        self,
        n_envs: int,
        seeds: Sequence[int] | None,
        scenes: Callable[[Collection[int]], Mapping[int, SceneMasks]] | None = None,
    ) -> Iterator[RolloutRecorder]:
        """Follow one batched rollout; the caller tells the recorder what happens.

        Args:
            n_envs: environments of the batch.
            seeds: of each environment, if there are any.
            scenes: numbers of environments → their masks now; None: none are stored.
        """
        task = self._running_task
        episodes = range(self._next_episode, self._next_episode + n_envs)
        self._next_episode += n_envs
        plans = [self._plan(task, index, seeds[env] if seeds else None) for env, index in enumerate(episodes)]
        self._n_unsized = sum(plan is not None for plan in plans)
        recorder = RolloutRecorder(
            plans,
            config=self.config,
            writer=self._open_writer,
            camera_views=self._open_capture.adapter.camera_views,
            cameras=self._cameras,
            names=task.names,
            scenes=scenes,
        )
        self._recorder = recorder
        try:
            yield recorder
        except BaseException as error:
            self._episodes += recorder.interrupt(error)
            raise
        finally:
            self._open_capture.enabled = False
            self._recorder = None

    def before_inference(self) -> None:
        """Called before each action is selected: inferences that nobody needs are let pass."""
        self._open_capture.enabled = self._current_recorder().wants_inferences

    def finish_rollout(self, *, rewards: np.ndarray, successes: np.ndarray) -> None:
        """The rollout has returned its (batch, step) rewards and successes."""
        self._episodes += self._current_recorder().finish(rewards=rewards, successes=successes)

    def tell_progress(self, results: Sequence[Result], random_state: str) -> None:
        """The rollout has returned: where a run that is interrupted after it can go on.

        Args:
            results: of each environment's episode.
            random_state: of the random numbers now.
        """
        assert self._progress is not None, "start_task() comes first"
        self._progress.add(results, random_state)

    def _progress_of(self, task: TaskPlan) -> TaskProgress:
        return TaskProgress(self.folder / task.name, task.first_episode)

    def _path_of(self, task: TaskPlan, index: int) -> Path:
        return self.folder / task.name / f"episode_{index:05d}{EPISODE_SUFFIX}"

    def _on_record(self, record: InferenceRecord) -> None:
        """Say what the run will take, once its first inference tells how many tokens there are."""
        if self._n_unsized:
            self._tell_size(self._running_task, self._n_unsized, record.maps_bytes)
            self._n_unsized = 0
        self._current_recorder().on_inference(record)

    def _tell_size(self, task: TaskPlan, n_episodes: int, inference_bytes: int) -> None:
        """Say once what an episode takes, and before each rollout if the disk has too little room for it."""
        n_inferences = math.ceil(task.max_steps / self._open_capture.policy.n_action_steps)
        episode_bytes = n_inferences * inference_bytes
        if not self._size_told:
            logger.info(
                "Attention goes to %s: about %s an inference, at most about %s an episode (%d inferences of "
                "%d frames), before compression; %s free",
                self.folder,
                format_bytes(inference_bytes),
                format_bytes(episode_bytes),
                n_inferences,
                task.max_steps,
                format_bytes(shutil.disk_usage(self.folder).free),
            )
            self._size_told = True
        needed_bytes = n_episodes * episode_bytes
        free_bytes = shutil.disk_usage(self.folder).free
        if needed_bytes > free_bytes:
            logger.warning(
                "The next %d episodes may need about %s before compression, but %s has %s free; save fewer "
                "layers (--eval.attention.layers) or free some space",
                n_episodes,
                format_bytes(needed_bytes),
                self.folder,
                format_bytes(free_bytes),
            )

    def _plan(self, task: TaskPlan, index: int, seed: int | None) -> EpisodePlan | None:
        wanted = self.config.episodes is None or index in self.config.episodes
        number = index - task.first_episode
        if number >= task.n_episodes or not wanted:
            return None
        path = self._path_of(task, index)
        kept = self._run_folder.kept(path, seed)
        if kept is not None:
            if self._uploads is not None:
                self._uploads.add(path)
            self._kept.append(
                EpisodeResult(
                    index,
                    path,
                    None,
                    kept=True,
                    n_frames=kept.n_frames,
                    n_inferences=kept.n_inferences,
                    raw_bytes=kept.raw_bytes,
                )
            )
            return None
        video = None
        if task.videos is not None and number < task.n_videos:
            target = task.videos / f"eval_episode_{number - task.n_before}.mp4"
            video = {"path": Path(os.path.relpath(target, path.parent)).as_posix(), "fps": task.fps}
        return EpisodePlan(
            index=index,
            path=path,
            fps=task.fps,
            attributes={
                **self._attributes,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "task_group": task.group,
                "task_id": task.task_id,
                "episode_index": index,
                "seed": seed,
                "eval_video": video,
            },
            when_complete=None if self._uploads is None else self._uploads.add,
        )

    def _summarise(self) -> TaskSummary:
        task = self._running_task
        results = [*self._kept, *(episode.outcome() for episode in self._episodes)]
        chosen = self.config.episodes
        first = task.first_episode
        for index in range(first, min(first + task.n_episodes, self._next_episode)):
            if chosen is not None and index not in chosen:
                results.append(EpisodeResult(index, None, f"not among episodes={chosen}"))
        saved = tuple(sorted((r for r in results if r.reason is None), key=lambda r: r.index))
        not_saved = tuple(sorted((r for r in results if r.reason is not None), key=lambda r: r.index))
        self.failures += [f"{task.name} episode {r.index}: {r.reason}" for r in not_saved if r.failed]
        return TaskSummary(
            name=task.name,
            saved=saved,
            not_saved=not_saved,
            stored_bytes=sum(stored_bytes(r.path) for r in saved if r.path is not None),
            waited_s=self._open_writer.waited_s - self._waited_before_s,
        )

    def _report(self, summary: TaskSummary) -> None:
        failed = any(result.failed for result in summary.not_saved)
        logger.log(logging.ERROR if failed else logging.INFO, "%s", summary.line())

    def _current_recorder(self) -> RolloutRecorder:
        assert self._recorder is not None, "no rollout is running"
        return self._recorder

    @property
    def _open_capture(self) -> AttentionCapture:
        assert self._capture is not None, "watch() comes first"
        return self._capture

    @property
    def _open_writer(self) -> BackgroundWriter:
        assert self._writer is not None, "watch() comes first"
        return self._writer

    @property
    def _running_task(self) -> TaskPlan:
        assert self._task is not None, "start_task() comes first"
        return self._task
