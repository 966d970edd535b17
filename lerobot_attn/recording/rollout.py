"""The life of an episode: which inference, and which of its action tokens, gave the action at which frame.

A `RolloutRecorder` follows one batched rollout. It is told what happens (an inference ended, an action was
selected, the environments stepped) and writes each environment's episode, cut at its own end, through the
background writer. It knows neither LeRobot's scripts nor how attention is observed.
"""

from __future__ import annotations

import errno
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lerobot_attn.capture import HostCopies, InferenceRecord
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import CaptureError, StoreError
from lerobot_attn.layout import TokenLayout
from lerobot_attn.recording.background import BackgroundWriter
from lerobot_attn.sizes import format_bytes
from lerobot_attn.store.video import VideoWriter
from lerobot_attn.store.writer import Compression, EpisodeWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodePlan:
    """What is known of an episode before it starts.

    Attributes:
        index: its number within the task, as the evaluation's videos count.
        path: where its store goes.
        fps: frames per second of its videos.
        attributes: what else its store says of itself (task ids, seed, versions, policy, …).
    """

    index: int
    path: Path
    fps: float
    attributes: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"{self.path.parent.name}/{self.path.name}"


@dataclass(frozen=True)
class EpisodeResult:
    """What became of an episode: saved completely, or why not."""

    index: int
    path: Path | None  # None: there is no store
    reason: str | None  # None: saved and complete
    failed: bool = False  # the reason is a fault, not a choice
    kept: bool = False  # an earlier run of the same evaluation had recorded it
    n_frames: int = 0
    n_inferences: int = 0
    raw_bytes: int = 0


@dataclass(frozen=True)
class DimensionNames:
    """Names of the state's and the action's dimensions, where somebody knows them."""

    state: Sequence[str] = ()
    action: Sequence[str] = ()

    def labels(self, kind: str, count: int) -> np.ndarray:
        """Return (count,) names, numbered ones if the known names do not fit."""
        known = self.state if kind == "state" else self.action
        names = known if len(known) == count else [f"{kind}_{i}" for i in range(count)]
        return np.array(names, dtype=object)


@dataclass
class _Frame:
    """One environment step of the whole batch, on its way to the host."""

    copies: HostCopies
    policy_action: Tensor  # (batch, action_dim) as the policy returned it
    state: np.ndarray | None  # (batch, state_dim)
    action: np.ndarray | None = None  # (batch, action_dim) as the environment got it
    reward: np.ndarray | None = None  # (batch,)
    success: np.ndarray | None = None  # (batch,)


@dataclass(frozen=True)
class _Views:
    """What the cameras of the whole batch showed at one frame, on its way to the host."""

    copies: HostCopies
    images: dict[str, Tensor]  # camera → (batch, height, width, 3) uint8

    @property
    def n_bytes(self) -> int:
        return sum(image.numel() for image in self.images.values())


@dataclass
class _Track:
    """One environment's episode as the rollout sees it. Only `writing` is touched by the writer's thread."""

    plan: EpisodePlan
    env: int
    writing: EpisodeJob
    inference: int = -1
    query: int = 0
    n_frames: int = 0
    ended: str | None = None
    frames: list[tuple[_Frame, int, int]] = field(
        default_factory=list
    )  # (frame, inference, query), not yet queued


class RolloutRecorder:
    """Follows one batched rollout.

    Args:
        plans: one per environment of the batch; None for an episode that is not to be recorded.
        config: the capture settings.
        writer: where jobs go; keys are store paths.
        camera_views: what the cameras show the policy, from the batch that the policy gets.
        names: names of state and action dimensions.
    """

    def __init__(
        self,
        plans: Sequence[EpisodePlan | None],
        *,
        config: AttentionConfig,
        writer: BackgroundWriter,
        camera_views: Callable[[dict[str, Any]], dict[str, Tensor]],
        names: DimensionNames | None = None,
    ):
        self._config = config
        self._writer = writer
        self._camera_views = camera_views
        names = names or DimensionNames()
        self._tracks = [
            _Track(plan, env, EpisodeJob(plan, env, config, names))
            for env, plan in enumerate(plans)
            if plan is not None
        ]
        self._record: InferenceRecord | None = None
        self._state: np.ndarray | None = None
        self._frame: _Frame | None = None
        self._views: _Views | None = None

    def on_observation(self, state: np.ndarray | None, tasks: Sequence[str] | None) -> None:
        """The policy is about to be shown an observation.

        Args:
            state: (batch, state_dim), in the robot's units; None if there is none.
            tasks: instruction of each environment.
        """
        self._state = state
        for track in self._active:
            if tasks is not None:
                track.writing.task = str(tasks[track.env])
            if state is not None:
                track.writing.state_dim = state.shape[1]

    def on_inference(self, record: InferenceRecord) -> None:
        """The policy ran; its first action is selected next.

        Raises:
            CaptureError: an inference was recorded and no action was taken from it.
        """
        if self._record is not None:
            raise CaptureError(
                "two inferences for one action, expected one; the policy asks its model more than once"
            )
        self._record = record

    def on_action(self, batch: dict[str, Any], action: Tensor) -> None:
        """The policy has chosen the frame's action.

        Args:
            batch: what the policy got.
            action: (batch, action_dim), in the policy's units.
        """
        active = self._active
        copies = HostCopies()
        if self._config.cameras and active:
            images = {name: copies.copy(view) for name, view in self._camera_views(batch).items()}
            self._views = _Views(copies, images)
        self._frame = _Frame(copies, copies.copy(action.float()), self._state)
        copies.seal()
        record, self._record = self._record, None
        if record is not None and active:
            self._queue_inference(active, record)
        for track in active:
            track.frames.append((self._frame, track.inference, track.query))

    def on_step(self, action: np.ndarray, reward: np.ndarray, success: np.ndarray, ended: np.ndarray) -> None:
        """The environments have taken the action.

        Args:
            action: (batch, action_dim), as the environments got it.
            reward: (batch,).
            success: (batch,) bool.
            ended: (batch,) bool, True where the environment terminated or truncated.
        """
        frame, self._frame = self._frame, None
        if frame is None:
            return
        self._queue_views()
        frame.action, frame.reward, frame.success = action, reward, success
        for track in self._active:
            track.n_frames += 1
            track.query += 1
            if ended[track.env]:
                track.ended = "terminated or truncated by the environment"
        self._raise_if_aborting()

    def fail(self, error: Exception) -> None:
        """Attention could not be captured: what follows in these episodes has no inference to belong to.

        Raises:
            CaptureError: with `on_error="abort"`.
        """
        self._record = None
        for track in self._active:
            self._writer.fail(track.plan.path, error)
        self._raise_if_aborting()

    def finish(self, *, rewards: np.ndarray, successes: np.ndarray) -> list[EpisodeJob]:
        """The rollout has returned; episodes still running were cut at the step limit.

        Args:
            rewards: (batch, step) as the evaluation counts them.
            successes: (batch, step) likewise.
        """
        for track in self._tracks:
            track.ended = track.ended or "the step limit"
            self._queue_close(
                track, rewards[track.env, : track.n_frames], successes[track.env, : track.n_frames]
            )
        return [track.writing for track in self._tracks]

    def interrupt(self, error: BaseException) -> list[EpisodeJob]:
        """The rollout raised: close what there is; episodes that had ended are whole."""
        for track in self._tracks:
            if track.ended is None:
                # The frame in flight was shown to the policy, but its outcome is not known.
                track.frames = [entry for entry in track.frames if entry[0].reward is not None]
                track.writing.interrupted = f"{type(error).__name__}: {error}".strip().rstrip(":")
            self._queue_close(track)
        return [track.writing for track in self._tracks]

    @property
    def wants_inferences(self) -> bool:
        """Whether some environment's episode still needs what the policy attends to."""
        return any(self._writer.failure(track.plan.path) is None for track in self._active)

    @property
    def _active(self) -> list[_Track]:
        return [track for track in self._tracks if track.ended is None]

    def _queue_inference(self, tracks: list[_Track], record: InferenceRecord) -> None:
        self._writer.submit_shared(
            {
                track.plan.path: partial(track.writing.append, track.frames, record, track.n_frames)
                for track in tracks
            },
            record.n_bytes,
        )
        # Only now: a Ctrl-C while the queue is full leaves the frames to `interrupt`.
        for track in tracks:
            track.writing.n_queued += 1
            track.inference += 1
            track.query = record.layout.query_of_action(0)
            track.frames = []

    def _queue_views(self) -> None:
        """Queue the frame's pictures on their own: a chunk of frames of many cameras would be too much."""
        views, self._views = self._views, None
        if views is not None:
            self._writer.submit_shared(
                {track.plan.path: partial(track.writing.show, views) for track in self._active},
                views.n_bytes,
            )

    def _queue_close(
        self, track: _Track, rewards: np.ndarray | None = None, successes: np.ndarray | None = None
    ) -> None:
        job, frames, ended = track.writing, track.frames, track.ended
        key = track.plan.path
        self._writer.submit(key, lambda: job.append(frames, None, track.n_frames))
        self._writer.submit(key, lambda: job.check_against(rewards, successes))
        self._writer.submit(key, lambda: job.close(ended, self._writer.failure(key)), always=True)

    def _raise_if_aborting(self) -> None:
        for track in self._tracks:
            error = self._writer.failure(track.plan.path)
            if error is None or track.writing.reported:
                continue
            track.writing.reported = True
            message = f"attention of {track.plan.name} is no longer recorded: {error}"
            if self._config.on_error == "abort":
                raise CaptureError(f"{message}; stopped because of on_error=abort") from error
            logger.error("%s; the evaluation goes on", message)


class EpisodeJob:
    """What the writer's thread does for one episode.

    Attributes:
        n_queued: inferences that were handed over.
        n_written: inferences that the store holds.
        result: what became of the episode; None until it is closed.
    """

    def __init__(self, plan: EpisodePlan, env: int, config: AttentionConfig, names: DimensionNames):
        self.plan = plan
        self.env = env
        self.task = ""
        self.state_dim: int | None = None
        self.interrupted: str | None = None
        self.reported = False
        self.result: EpisodeResult | None = None
        self.n_queued = 0
        self.n_written = 0
        self._config = config
        self._names = names
        self._store: EpisodeWriter | None = None
        self._layout: TokenLayout | None = None
        self._raw_bytes = 0
        self._videos: dict[str, VideoWriter] = {}
        self._chunk: np.ndarray | None = None  # (chunk, action_dim): of the latest inference
        self._rewards: list[float] = []
        self._successes: list[bool] = []

    def show(self, views: _Views) -> None:
        """Write what the cameras showed at the next frame.

        Raises:
            StoreError: the video cannot be written.
        """
        if self._store is None:
            return  # the policy acted without an inference: `append` says so
        views.copies.wait()
        for camera, images in views.images.items():
            self._write_view(camera, images[self.env].numpy())

    def append(
        self, frames: list[tuple[_Frame, int, int]], record: InferenceRecord | None, frame: int
    ) -> None:
        """Write the frames up to here and then the inference made at `frame`; commit both.

        Raises:
            StoreError: the disk is full.
            OSError: writing failed for another reason.
        """
        try:
            self._append_frames(frames)
            if record is not None:
                self._append_inference(record, frame)
            if self._store is not None:
                self._store.commit()
                self.n_written = self._store.n_inferences
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            needed = 0 if record is None else math.ceil(record.n_bytes / record.batch_size)
            free = shutil.disk_usage(self.plan.path.parent).free
            raise StoreError(
                f"{self.plan.path}: the disk is full ({error.strerror}): an inference needs up to "
                f"{format_bytes(needed)}, {format_bytes(free)} are free; free some space, or save fewer "
                "layers (--eval.attention.layers)"
            ) from error

    def check_against(self, rewards: np.ndarray | None, successes: np.ndarray | None) -> None:
        """Compare the recorded frames with what the evaluation returned.

        Raises:
            CaptureError: they differ, so that frames and video would be out of step.
        """
        if rewards is None or successes is None:
            return
        same = np.array_equal(
            np.asarray(self._rewards, np.float32), np.asarray(rewards, np.float32), equal_nan=True
        )
        if not same or self._successes != successes.tolist():
            raise CaptureError(
                f"the {len(self._rewards)} recorded frames do not match the {len(rewards)} steps that the "
                "evaluation "
                "returned; the store would be out of step with the video"
            )

    @property
    def n_unwritten(self) -> int:
        """Inferences that were handed over and that the store does not hold."""
        return self.n_queued - self.n_written

    def unfinished(self) -> EpisodeResult:
        """Return what became of an episode that nobody closed, as if the process had been killed."""
        return EpisodeResult(
            index=self.plan.index,
            path=self.plan.path if self.n_written else None,
            reason="incomplete: Ctrl-C came before its store was closed",
            failed=True,
            n_inferences=self.n_written,
        )

    def close(self, ended: str | None, failure: BaseException | None) -> None:
        """Finish or drop the store, and say what became of it."""
        store, problem = self._store, failure
        videos: dict[str, Any] = {}
        for camera, video in self._videos.items():
            try:
                video.close()
            except Exception as error:
                problem = problem or error
            videos[camera] = {
                "path": video.path.name,
                "fps": self.plan.fps,
                "n_frames": video.n_frames,
                "height_px": video.size_px[0],
                "width_px": video.size_px[1],
            }
        if store is None or store.n_inferences == 0:
            if self.interrupted is None or failure is not None:
                cause = str(failure or "nothing was captured: the policy made no inference")
            else:
                cause = f"interrupted before the first inference: {self.interrupted}"
            self._drop(cause, failed=True)
            return
        success = any(self._successes)
        whole = problem is None and self.interrupted is None
        attributes = {
            "videos": videos,
            "success": success if ended else None,
            "ended_by": ended,
            "raw_bytes": self._raw_bytes,
            "error": None if problem is None else str(problem),
            "interrupted_by": self.interrupted,
        }
        try:
            store.close(complete=whole, attributes=attributes)
        except Exception as error:
            problem, whole = problem or error, False
        if whole and self._config.keep != "all" and success != (self._config.keep == "success"):
            self._drop(
                f"keep={self._config.keep}, and the episode was a {'success' if success else 'failure'}"
            )
            return
        reason: str | None = None
        if problem is not None:
            reason = f"incomplete: {problem}"
        elif self.interrupted is not None:
            reason = f"incomplete: interrupted by {self.interrupted}"
        self.result = EpisodeResult(
            index=self.plan.index,
            path=self.plan.path,
            reason=reason,
            failed=reason is not None,
            n_frames=store.n_frames,
            n_inferences=store.n_inferences,
            raw_bytes=self._raw_bytes,
        )

    def _drop(self, reason: str, *, failed: bool = False) -> None:
        if self._store is not None:
            self._store.remove()
        for video in self._videos.values():
            video.path.unlink(missing_ok=True)
        self.result = EpisodeResult(index=self.plan.index, path=None, reason=reason, failed=failed)

    def _append_frames(self, frames: list[tuple[_Frame, int, int]]) -> None:
        if not frames:
            return
        if self._store is None:
            raise CaptureError(
                f"frame 0 of {self.plan.name} has an action but no captured inference; expected the policy "
                "to run after "
                "its reset"
            )
        env = self.env
        for frame, _, query in frames:
            frame.copies.wait()
            self._check_action(frame.policy_action[env].numpy(), query)
        rows: dict[str, np.ndarray] = {
            "frame_inference": np.array([inference for _, inference, _ in frames], np.int32),
            "frame_query": np.array([query for _, _, query in frames], np.int32),
            "action": np.stack([_row(frame.action, env) for frame, _, _ in frames]),
            "reward": np.array([_row(frame.reward, env) for frame, _, _ in frames], np.float32),
            "success": np.array([_row(frame.success, env) for frame, _, _ in frames], bool),
        }
        if frames[0][0].state is not None:
            rows["state"] = np.stack([_row(frame.state, env) for frame, _, _ in frames])
        self._rewards.extend(rows["reward"].tolist())
        self._successes.extend(rows["success"].tolist())
        self._store.append_frames(rows)

    def _check_action(self, action: np.ndarray, query: int) -> None:
        """The frame's action must be the very token of the chunk that the table names."""
        assert self._chunk is not None
        assert self._layout is not None
        offset = self._layout.action_of_query(query)
        if offset >= len(self._chunk) or not np.array_equal(action, self._chunk[offset], equal_nan=True):
            raise CaptureError(
                f"frame {len(self._rewards)} of {self.plan.name} executed an action that is not token "
                f"{offset} of its "
                "inference's chunk; expected a policy that serves its chunk in order"
            )

    def _append_inference(self, record: InferenceRecord, frame: int) -> None:
        env, layout = self.env, record.layout
        record.wait()
        if self._store is None:
            self._layout = layout
            self._store = self._create(record)
        elif layout != self._layout:
            raise CaptureError(
                f"inference {record.index} has another token layout than the episode's first (another image "
                "size or "
                "prompt length?), expected the same throughout"
            )
        labels = record.prompts[env].labels
        chunk = record.action_chunk[env]
        action_chunk = np.full((layout.n_queries, chunk.shape[1]), np.nan, np.float32)
        action_chunk[layout.action_queries] = chunk
        self._chunk = chunk
        rows: dict[str, np.ndarray] = {
            "token_id": record.token_id[env],
            "token_text": np.array(record.token_text[env], dtype=object),
            "text_word": labels.word,
            "text_state_dim": labels.state_dim,
            "key_kind": record.key_kind[env],
            "inference_frame": np.int32(frame),  # type: ignore[dict-item]
            "action_chunk": action_chunk,
        }
        truncated = record.prompt_truncated
        if truncated is not None:
            rows["prompt_truncated"] = truncated[env]
        for name, maps, axis in (
            ("suffix_attention", record.suffix_attention, 2),
            ("suffix_attention_mean", record.suffix_attention_mean, 2),
            ("prefix_attention", record.prefix_attention, 1),
        ):
            if maps is not None:
                rows[name] = np.moveaxis(maps, axis, 0)[env]  # a view: all layers' maps take 150 MB
                self._raw_bytes += rows[name].nbytes
        self._store.append_inference(rows)

    def _create(self, record: InferenceRecord) -> EpisodeWriter:
        layout, selection = record.layout, record.selection
        sizes = {
            "denoise_step": len(selection.denoise_steps),
            "layer": len(selection.layers),
            "all_layer": len(selection.mean_layers),
            "prefix_layer": len(selection.prefix_layers),
            "head": len(selection.heads),
            "query": layout.n_queries,
            "key": layout.n_keys,
            "prefix_query": layout.prefix_len,
            "prefix_key": layout.prefix_len,
            "text": len(layout.language),
            "action_dim": record.action_chunk.shape[-1],
        }
        if self.state_dim is not None:
            sizes["state_dim"] = self.state_dim
        rows, columns = layout.key_patch()
        coordinates: dict[str, np.ndarray] = {
            "flow_time": record.flow_time,
            "denoise_step": np.array(selection.denoise_steps, np.int32),
            "head": np.array(selection.heads, np.int32),
            "text_key": np.arange(layout.language.start, layout.language.stop, dtype=np.int32),
            "key_camera": layout.key_camera(),
            "key_row": rows,
            "key_column": columns,
            "action_dim": self._names.labels("action", sizes["action_dim"]),
        }
        optional = {"reward", "success"}
        for array, coordinate, chosen in (
            ("suffix_attention", "layer", selection.layers),
            ("suffix_attention_mean", "all_layer", selection.mean_layers),
            ("prefix_attention", "prefix_layer", selection.prefix_layers),
        ):
            if chosen:
                optional.add(array)
                coordinates[coordinate] = np.array(chosen, np.int32)
                if coordinate != "prefix_layer" and not set(chosen) <= record.layers_seeing_suffix:
                    sees = [layer in record.layers_seeing_suffix for layer in chosen]
                    coordinates[f"{coordinate}_sees_suffix"] = np.array(sees)
        if record.prompt_truncated is not None:
            optional.add("prompt_truncated")
        if "state_dim" in sizes:
            optional.add("state")
            coordinates["state_dim"] = self._names.labels("state", sizes["state_dim"])
        queries = record.executed_queries
        return EpisodeWriter(
            self.plan.path,
            sizes=sizes,
            coordinates=coordinates,
            attributes={
                **self.plan.attributes,
                "task": self.task,
                "success": None,
                "layout": layout.to_dict(),
                "executed_queries": [queries.start, queries.stop],
                "attention_dtype": record.attention_dtype,
                "capture": self._config.to_dict(),
            },
            compression=Compression(self._config.compressor, self._config.level, self._config.keep_bits),
            optional=optional,
        )

    def _write_view(self, camera: str, view: np.ndarray) -> None:
        if camera not in self._videos:
            path = self.plan.path.with_name(f"{self.plan.path.stem}.{camera.rsplit('.', 1)[-1]}.mp4")
            if path in {video.path for video in self._videos.values()}:  # two cameras with one short name
                path = self.plan.path.with_name(f"{self.plan.path.stem}.{camera}.mp4")
            self._videos[camera] = VideoWriter(
                path, fps=self.plan.fps, size_px=(view.shape[0], view.shape[1])
            )
        self._videos[camera].write(view)


def _row(values: np.ndarray | None, env: int) -> Any:
    assert values is not None  # the frame has stepped
    return values[env]
