"""The recording of an evaluation run: its folder, its tasks, and what became of every episode.

Knows the capture, the background writer and the recorder of a rollout. Knows nothing of LeRobot's scripts:
the plugin tells it when tasks and rollouts begin and end.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_attn.capture import AttentionCapture, InferenceRecord, capture_attention
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import RANDOM_WEIGHTS, CaptureError
from lerobot_attn.layout import TokenLayout
from lerobot_attn.prompt import Tokenizer
from lerobot_attn.recording.background import BackgroundWriter
from lerobot_attn.recording.folder import RunFolder
from lerobot_attn.recording.rollout import (
    DimensionNames,
    EpisodeJob,
    EpisodePlan,
    EpisodeResult,
    RolloutRecorder,
)
from lerobot_attn.sizes import folder_bytes, format_bytes
from lerobot_attn.store.schema import EPISODE_SUFFIX
from lerobot_attn.store.video import find_encoder

logger = logging.getLogger(__name__)

_PROGRESS_S = 2.0  # how often is said what is still to be written
_GRACE_S = 1.0  # what a second Ctrl-C leaves for the write in progress, and for closing the stores


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
        names: names of state and action dimensions.
    """

    group: str
    task_id: int
    n_episodes: int
    max_steps: int
    fps: float = 30.0
    videos: Path | None = None
    n_videos: int = 0
    names: DimensionNames = field(default_factory=DimensionNames)

    @property
    def name(self) -> str:
        """Folder name, as the evaluation's videos have it."""
        return f"{self.group}_{self.task_id}"


@dataclass(frozen=True)
class TaskSummary:
    """What became of a task's episodes."""

    name: str
    saved: tuple[EpisodeResult, ...]
    not_saved: tuple[EpisodeResult, ...]
    stored_bytes: int
    waited_s: float

    @property
    def paths(self) -> list[str]:
        """Stores that are complete."""
        return [str(result.path) for result in self.saved]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `eval_info.json`."""
        return {
            "n_saved": len(self.saved),
            "n_kept": sum(r.kept for r in self.saved),
            "n_not_saved": len(self.not_saved),
            "not_saved": [
                {"episode": r.index, "reason": r.reason, "path": None if r.path is None else str(r.path)}
                for r in self.not_saved
            ],
            "stored_bytes": self.stored_bytes,
            "raw_bytes": sum(r.raw_bytes for r in self.saved),
            "waited_for_writer_s": round(self.waited_s, 3),
        }

    def line(self) -> str:
        """Return the one line that is printed at the task's end."""
        n = len(self.saved) + len(self.not_saved)
        raw = sum(r.raw_bytes for r in self.saved)
        n_kept = sum(r.kept for r in self.saved)
        kept = f" ({n_kept} of them before)" if n_kept else ""
        ratio = f", {raw / self.stored_bytes:.1f}x compressed" if self.stored_bytes else ""
        text = (
            f"Attention of {self.name}: {len(self.saved)} of {n} episodes saved{kept}, "
            f"{sum(r.n_inferences for r in self.saved)} inferences, "
            f"{format_bytes(self.stored_bytes)}{ratio}; "
            f"waited {self.waited_s:.1f} s for the writer"
        )
        reasons = sorted({f"episode {r.index}: {r.reason}" for r in self.not_saved})
        return text + ("; not saved: " + "; ".join(reasons) if reasons else "")


class RunRecorder:
    """Records an evaluation run into `folder`.

    Args:
        config: the capture settings.
        folder: where the stores go: `{folder}/{group}_{task_id}/episode_{index:05d}.zarr`.
        attributes: what every store says of the run (versions, policy, environment).

    Raises:
        StoreError: the folder holds episodes and `existing` is "refuse", is a file, or cannot be written.
    """

    def __init__(self, config: AttentionConfig, folder: Path, attributes: Mapping[str, Any]):
        self.config = config = config.for_evaluation()
        self.folder = folder
        self.failures: list[str] = []
        self._attributes = dict(attributes)
        self._capture: AttentionCapture | None = None
        self._writer: BackgroundWriter | None = None
        self._task: TaskPlan | None = None
        self._jobs: list[EpisodeJob] = []
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
        """
        find_encoder()
        recorder_of = self._current_recorder
        with (
            self._run_folder.claim(),
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
            sizes = capture.policy
            self._attributes["policy"] = {
                **self._attributes.get("policy", {}),
                "type": sizes.policy_type,
                "n_layers": sizes.n_layers,
                "n_prefix_layers": sizes.n_prefix_layers,
                "n_heads": sizes.n_heads,
                "n_denoise_steps": sizes.n_denoise_steps,
                "chunk_size": sizes.chunk_size,
                "n_action_steps": sizes.n_action_steps,
                "random_weights": sizes.random_weights,
            }
            self._run_folder.settle(self._attributes, self.config.to_dict())
            if sizes.random_weights:
                logger.warning("This policy has %s", RANDOM_WEIGHTS)
            self._writer = BackgroundWriter(self.config.queue_mb * 1_000_000)
            try:
                yield
            except BaseException as error:
                self._write_out_after(error)
                raise
            finally:
                self._writer.close(0)
                if self._task is not None:  # the task raised: say what there is
                    self._report(self._summarise())

    def start_task(self, task: TaskPlan) -> None:
        """A task's rollouts begin."""
        self._task = task
        self._jobs = []
        self._kept = []
        self._next_episode = 0
        self._waited_before_s = self._open_writer.waited_s

    def end_task(self) -> TaskSummary:
        """The task's rollouts are done: wait until all is written.

        Raises:
            CaptureError: an episode could not be saved whole, and `on_error` is "abort".
        """
        self._write_out("Ctrl-C ends the evaluation")
        summary = self._summarise()
        self._report(summary)
        self._task = None
        if self.failures and self.config.on_error == "abort":
            raise CaptureError(f"{self.failures[0]}; stopped because of on_error=abort")
        return summary

    @contextmanager
    def rollout(self, n_envs: int, seeds: Sequence[int] | None) -> Iterator[RolloutRecorder]:
        """Follow one batched rollout; the caller tells the recorder what happens."""
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
            names=task.names,
        )
        self._recorder = recorder
        try:
            yield recorder
        except BaseException as error:
            self._jobs += recorder.interrupt(error)
            raise
        finally:
            self._open_capture.enabled = False
            self._recorder = None

    def before_inference(self) -> None:
        """Called before each action is selected: inferences that nobody needs are let pass."""
        self._open_capture.enabled = self._current_recorder().wants_inferences

    def finish_rollout(self, *, rewards: np.ndarray, successes: np.ndarray) -> None:
        """The rollout has returned its (batch, step) rewards and successes."""
        self._jobs += self._current_recorder().finish(rewards=rewards, successes=successes)

    def _write_out(self, remedy: str, *, patience_s: float = _PROGRESS_S) -> None:
        """Wait until all that is queued is written; say every few seconds how much is left.

        Args:
            remedy: what can be done about it, for the message.
            patience_s: how long to wait before it is said for the first time.
        """
        while not self._open_writer.flush(patience_s):
            patience_s = _PROGRESS_S
            n_inferences = sum(job.n_unwritten for job in self._jobs if not self._has_failed(job))
            logger.warning("Writing %d inferences that are queued; %s", n_inferences, remedy)

    def _write_out_after(self, error: BaseException) -> None:
        """Write out what an evaluation that raised has queued, unless a further Ctrl-C says to drop it."""
        try:
            if isinstance(error, KeyboardInterrupt):
                self._write_out("Ctrl-C again drops them", patience_s=0)
            else:
                self._write_out("Ctrl-C drops them")
        except KeyboardInterrupt:  # not raised: it would hide what ended the evaluation
            jobs = [job for job in self._jobs if not self._has_failed(job)]
            self._open_writer.drop(CaptureError("what was queued was dropped by Ctrl-C"))
            self._open_writer.close(_GRACE_S)
            n_inferences = sum(job.n_unwritten for job in jobs)
            logger.warning("Dropped %d inferences that were queued", n_inferences)

    def _has_failed(self, job: EpisodeJob) -> bool:
        return self._open_writer.failure(job.plan.path) is not None

    def _on_record(self, record: InferenceRecord) -> None:
        """Say what the run will take, once its first inference tells how many tokens there are."""
        if self._n_unsized:
            self._tell_size(self._running_task, self._n_unsized, record.layout)
            self._n_unsized = 0
        self._current_recorder().on_inference(record)

    def _tell_size(self, task: TaskPlan, n_episodes: int, layout: TokenLayout) -> None:
        """Say once what an episode takes, and before each rollout if the disk has too little room for it."""
        inference_bytes = self._open_capture.selection.bytes_per_inference(layout)
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
        if index >= task.n_episodes or not wanted:
            return None
        path = self.folder / task.name / f"episode_{index:05d}{EPISODE_SUFFIX}"
        kept = self._run_folder.kept(path, seed)
        if kept is not None:
            self._kept.append(
                EpisodeResult(
                    index,
                    path,
                    None,
                    kept=True,
                    n_frames=kept.n_frames,
                    n_inferences=kept.n_inferences,
                    raw_bytes=kept.raw_bytes(),
                )
            )
            return None
        video = None
        if task.videos is not None and index < task.n_videos:
            target = task.videos / f"eval_episode_{index}.mp4"
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
        )

    def _summarise(self) -> TaskSummary:
        task = self._running_task
        results = [*self._kept, *(job.result or job.unfinished() for job in self._jobs)]
        chosen = self.config.episodes
        for index in range(min(task.n_episodes, self._next_episode)):
            if chosen is not None and index not in chosen:
                results.append(EpisodeResult(index, None, f"not among episodes={chosen}"))
        saved = tuple(sorted((r for r in results if r.reason is None), key=lambda r: r.index))
        not_saved = tuple(sorted((r for r in results if r.reason is not None), key=lambda r: r.index))
        self.failures += [f"{task.name} episode {r.index}: {r.reason}" for r in not_saved if r.failed]
        return TaskSummary(
            name=task.name,
            saved=saved,
            not_saved=not_saved,
            stored_bytes=sum(folder_bytes(r.path) for r in saved if r.path is not None),
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
