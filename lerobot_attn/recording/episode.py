"""One episode on the writer's thread: the job that writes its store and videos.

Everything in `EpisodeJob` runs on that thread alone; the loop's thread reaches it through
`lerobot_attn.recording.handle.EpisodeHandle`. Knows no policy, no environment and no loop.
"""

from __future__ import annotations

import errno
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lerobot_attn.capture import HostCopies, InferenceRecord
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import CaptureError, StoreError
from lerobot_attn.layout import TokenLayout
from lerobot_attn.masks import SceneMasks
from lerobot_attn.recording.activations import ActivationRows
from lerobot_attn.recording.begin import begin_store
from lerobot_attn.recording.camera_videos import CameraVideos
from lerobot_attn.recording.plan import Ending, EpisodePlan, EpisodeResult, Known
from lerobot_attn.recording.scenes import SceneRows
from lerobot_attn.sizes import format_bytes
from lerobot_attn.store.index import note_episode
from lerobot_attn.store.writer import EpisodeWriter

logger = logging.getLogger(__name__)

# How long what is written may wait for inferences that are queued behind it, to be committed with them: a
# commit replaces some thirty files. Nobody waits longer for it than for the queue.
COMMIT_WITHIN_S = 0.25
NO_TOKEN = -1  # in place of a query, where a frame's action is no token of its inference's chunk


@dataclass
class Frame:
    """One environment step of the whole batch, on its way to the host."""

    copies: HostCopies
    policy_action: Tensor | None  # (batch, action_dim or padded) from the policy; None where nobody knows
    state: np.ndarray | None  # (batch, state_dim)
    action: np.ndarray | None = None  # (batch, action_dim) as the environment got it
    reward: np.ndarray | None = None  # (batch,); None in a loop without rewards
    success: np.ndarray | None = None  # (batch,); None in a loop that cannot tell
    more: Mapping[str, np.ndarray] = field(default_factory=dict)  # optional arrays of frames: (batch, …)


class FrameEntry(NamedTuple):
    """A frame and where its action came from, as far as the loop knows."""

    frame: Frame
    inference: int
    query: int  # the token that comes next in the chunk
    is_certain: bool = False  # the loop itself says so; otherwise the action is compared with the chunk


class Origin(NamedTuple):
    """Which inference gave a frame's action, and which of its queries: `NO_TOKEN` where none did."""

    inference: int
    query: int


@dataclass(frozen=True)
class Views:
    """What the cameras of the whole batch showed at one frame, on its way to the host."""

    copies: HostCopies
    images: dict[str, Tensor]  # camera → (batch, height, width, 3) uint8

    @property
    def n_bytes(self) -> int:
        """Host memory that the pictures take."""
        return sum(image.numel() for image in self.images.values())

    def of(self, env: int) -> Views:
        """Return the part of one environment: a batch of 1, without a copy."""
        return Views(self.copies, {name: image[env : env + 1] for name, image in self.images.items()})


class EpisodeJob:
    """Writes one episode. Runs on the writer's thread; others may read `n_written` and `result`.

    Args:
        plan: what is known of the episode.
        env: its environment's number in the batch.
        config: the capture and storage settings.
        strict: an action that is not the expected token of its chunk ends the episode. Otherwise the token
            is looked for in the chunk and in the one before (an inference may end while actions of the last
            one are still executed), and one that is not there is recorded as none.
        n_queued: returns how many jobs that commit (`append` and `close`) were handed over so far; 0 once it
            is not sure that they are run.

    Attributes:
        n_written: inferences that the store holds.
        result: what became of the episode; None until it is closed.
    """

    def __init__(
        self,
        plan: EpisodePlan,
        env: int,
        config: AttentionConfig,
        *,
        strict: bool = True,
        n_queued: Callable[[], int] = lambda: 0,
    ):
        self.plan = plan
        self.env = env
        self.result: EpisodeResult | None = None
        self.n_written = 0
        self._config = config
        self._strict = strict
        self._n_queued = n_queued
        self._n_appended = 0  # how often `append` was called
        self._uncommitted_since: float | None = None
        self._store: EpisodeWriter | None = None
        self._layout: TokenLayout | None = None
        self._has_truncation = False
        self._is_decoded = False
        self._known: Known | None = None
        self._scenes: SceneRows | None = None  # where the first inference came with masks
        self._activations: ActivationRows | None = None  # likewise with neurons or residuals
        self._raw_bytes = 0
        self._videos = CameraVideos(plan, stills=config.view)
        self._chunk: np.ndarray | None = None  # (chunk, action_dim): of the latest inference
        self._chunk_before: np.ndarray | None = None
        self._rewards: list[float] = []
        self._successes: list[bool] = []

    def show(self, views: Views) -> None:
        """Write what the cameras showed at the next frame. A video that fails does not cost the maps."""
        if self._store is None:
            return  # the policy acted without an inference: `append` says so
        views.copies.wait()
        for camera, images in views.images.items():
            self._videos.write(camera, images[self.env].numpy(), self._store.n_inferences)

    def show_again(self) -> None:
        """Show the last pictures once more, where the next frame's were dropped: frames stay aligned."""
        if self._store is not None:
            self._videos.repeat()

    def append(
        self,
        entries: Sequence[FrameEntry],
        record: InferenceRecord | None,
        frame: int,
        known: Known | None = None,
        more: Mapping[str, Any] | None = None,
        scene: SceneMasks | None = None,
    ) -> None:
        """Write the frames up to here and then the inference made at `frame`; commit both.

        While more is queued behind, several are committed together; see `_may_wait`.

        `more` holds this inference's values of optional arrays, by their names; `scene` its masks.

        Raises:
            StoreError: the disk is full.
            OSError: writing failed for another reason.
        """
        self._n_appended += 1
        if self._uncommitted_since is None:
            self._uncommitted_since = time.monotonic()  # also on a disk that takes seconds to write one
        try:
            self._append_frames(entries)
            if record is not None:
                assert known is not None
                self._append_inference(record, frame, known, more or {}, scene)
            if self._store is not None and not self._may_wait(record is not None):
                self._store.commit()
                self.n_written = self._store.n_inferences
                self._uncommitted_since = None
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
                "evaluation returned; the store would be out of step with the video"
            )

    def close(self, ending: Ending, failure: BaseException | None) -> None:
        """Finish or drop the store, and say what became of it.

        Args:
            ending: how the episode ended.
            failure: what went wrong with the jobs before, if anything did.
        """
        store, problem = self._store, failure
        if ending.discarded_by is not None:
            self._videos.close(n_frames=None)
            self._drop(ending.discarded_by)
            return
        whole = problem is None and ending.interrupted_by is None
        videos = self._videos.close(n_frames=store.n_frames if whole and store is not None else None)
        if store is None or store.n_inferences == 0:
            if ending.interrupted_by is None or failure is not None:
                cause = str(failure or "nothing was captured: the policy made no inference")
            else:
                cause = f"interrupted before the first inference: {ending.interrupted_by}"
            self._drop(cause, failed=True, interrupted=failure is None and ending.interrupted_by is not None)
            return
        success = self._success(ending)
        attributes: dict[str, Any] = {
            "videos": videos,
            "success": success if ending.ended_by else None,
            "ended_by": ending.ended_by,
            "raw_bytes": self._raw_bytes,
            "error": None if problem is None else str(problem),
            "interrupted_by": ending.interrupted_by,
            **ending.attributes,
        }
        if self._rewards and np.isfinite(self._rewards).all():
            attributes |= {"sum_reward": sum(self._rewards), "max_reward": max(self._rewards)}
        if self._videos.n_repeated:
            attributes["n_repeated_pictures"] = self._videos.n_repeated
        if self._activations is not None and self._activations.n_beyond:
            attributes["n_beyond_float16"] = self._activations.n_beyond
        if self._videos.errors:
            attributes["video_errors"] = self._videos.errors
        try:
            store.close(complete=whole, attributes=attributes)
            self.n_written = store.n_inferences
        except Exception as error:
            problem, whole = problem or error, False
        if whole and self._is_unwanted(success):
            self._drop(
                f"keep={self._config.keep}, and the episode was a {'success' if success else 'failure'}"
            )
            return
        reason: str | None = None
        if problem is not None:
            reason = f"incomplete: {problem}"
        elif ending.interrupted_by is not None:
            reason = f"incomplete: interrupted by {ending.interrupted_by}"
        if reason is None:
            note_episode(store.path)
        self.result = EpisodeResult(
            index=self.plan.index,
            path=self.plan.path,
            reason=reason,
            failed=reason is not None,
            interrupted=reason is not None and problem is None,
            n_frames=store.n_frames,
            n_inferences=store.n_inferences,
            raw_bytes=self._raw_bytes,
        )
        if reason is None and self.plan.when_complete is not None:
            self.plan.when_complete(self.plan.path)

    def _may_wait(self, has_inference: bool) -> bool:
        """Return whether what was written is committed with what is queued behind it.

        Who watches sees an inference by its first frame, so only an inference waits then: for that frame.
        """
        is_watched = self._config.view or self._config.rerun
        if self._n_queued() <= self._n_appended or (is_watched and not has_inference):
            return False
        since = self._uncommitted_since
        return since is not None and time.monotonic() - since < COMMIT_WITHIN_S

    def _success(self, ending: Ending) -> bool | None:
        if ending.success is not None:
            return ending.success
        return any(self._successes) if self._known is None or self._known.has_success else None

    def _is_unwanted(self, success: bool | None) -> bool:
        if self._config.keep == "all":
            return False
        if success is None:
            logger.warning(
                "%s: keep=%s, but the loop never said whether the episode succeeded: it is kept",
                self.plan.name,
                self._config.keep,
            )
            return False
        return success != (self._config.keep == "success")

    def _drop(self, reason: str, *, failed: bool = False, interrupted: bool = False) -> None:
        if self._store is not None:
            self._store.remove()
        self._videos.remove()
        self.result = EpisodeResult(
            index=self.plan.index, path=None, reason=reason, failed=failed, interrupted=interrupted
        )

    def _append_frames(self, entries: Sequence[FrameEntry]) -> None:
        if not entries:
            return
        if self._store is None:
            raise CaptureError(
                f"frame 0 of {self.plan.name} has an action but no captured inference; expected the policy "
                "to run after its reset"
            )
        env = self.env
        frames = [entry.frame for entry in entries]
        for frame in frames:
            frame.copies.wait()
        origins = [
            self._origin_of(entry, self._store.n_frames + number) for number, entry in enumerate(entries)
        ]
        rows: dict[str, np.ndarray] = {
            "frame_inference": np.array([origin.inference for origin in origins], np.int32),
            "frame_query": np.array([origin.query for origin in origins], np.int32),
            "action": np.stack([_row(frame.action, env) for frame in frames]),
        }
        if frames[0].reward is not None:
            rows["reward"] = np.array([_row(frame.reward, env) for frame in frames], np.float32)
            self._rewards.extend(rows["reward"].tolist())
        if frames[0].success is not None:
            rows["success"] = np.array([_row(frame.success, env) for frame in frames], bool)
            self._successes.extend(rows["success"].tolist())
        if frames[0].state is not None:
            rows["state"] = np.stack([_row(frame.state, env) for frame in frames])
        for name in frames[0].more:
            rows[name] = np.stack([frame.more[name][env] for frame in frames])
        self._store.append_frames(rows)

    def _origin_of(self, entry: FrameEntry, number: int) -> Origin:
        """Return which inference, and which token of its chunk, gave a frame's action.

        Raises:
            CaptureError: it is not the very token that comes next, and the recording is strict.
        """
        assert self._chunk is not None
        assert self._layout is not None
        newest = entry.inference
        if entry.is_certain:
            return Origin(newest, NO_TOKEN if self._is_decoded else entry.query)
        if entry.query == NO_TOKEN or entry.frame.policy_action is None:
            return Origin(newest, NO_TOKEN)
        action = entry.frame.policy_action[self.env].numpy()[: self._chunk.shape[1]]
        token = min(entry.query - self._layout.first_action_query, len(self._chunk))
        if token < len(self._chunk) and np.array_equal(action, self._chunk[token], equal_nan=True):
            return Origin(newest, self._query_of(token))
        if self._strict:
            raise CaptureError(
                f"frame {number} of {self.plan.name} executed an action that is not token {token} of its "
                "inference's chunk; expected a policy that serves its chunk in order"
            )
        for inference, chunk in ((newest, self._chunk), (newest - 1, self._chunk_before)):
            if chunk is None or action.shape != chunk.shape[1:]:
                continue
            found = np.flatnonzero((chunk == action).all(axis=1))
            if len(found):
                return Origin(inference, self._query_of(int(found[0])))
        return Origin(newest, NO_TOKEN)

    def _query_of(self, action: int) -> int:
        """Return the query that is an action of the chunk; none where decoded tokens spell it together."""
        assert self._layout is not None
        return NO_TOKEN if self._is_decoded else self._layout.query_of_action(action)

    def _append_inference(
        self,
        record: InferenceRecord,
        frame: int,
        known: Known,
        more: Mapping[str, Any],
        scene: SceneMasks | None,
    ) -> None:
        env, layout = self.env, record.layout
        record.wait()
        if self._store is None:
            self._layout, self._known = layout, known
            self._has_truncation = record.prompt_truncated is not None
            self._is_decoded = record.suffix_token_id is not None
            self._scenes = None if scene is None else SceneRows(scene)
            self._activations = ActivationRows(record) if record.activations else None
            self._store = begin_store(self.plan, record, known, self._config, self._scenes, self._activations)
        elif layout != self._layout:
            raise CaptureError(
                f"inference {record.index} has another token layout than the episode's first (another image "
                "size or prompt length?), expected the same throughout"
            )
        if scene is not None and self._scenes is None:
            raise CaptureError(
                f"masks at frame {frame}, but not at the first inference; expected them at both"
            )
        labels = record.prompts[env].labels
        chunk = record.action_chunk[env]
        action_chunk = np.full((layout.n_queries, chunk.shape[1]), np.nan, np.float32)
        if not self._is_decoded:
            action_chunk[layout.action_queries] = chunk
        self._chunk_before, self._chunk = self._chunk, chunk
        rows: dict[str, np.ndarray] = {
            "token_id": record.token_id[env],
            "token_text": np.array(record.token_text[env], dtype=object),
            "text_word": labels.word,
            "text_state_dim": labels.state_dim,
            "key_kind": record.key_kind[env],
            "inference_frame": np.int32(frame),  # type: ignore[dict-item]
            "action_chunk": action_chunk,
            **{name: np.asarray(value) for name, value in more.items()},
            **({} if self._scenes is None else self._scenes.rows(scene)),
        }
        if record.suffix_token_id is not None and record.suffix_token_text is not None:
            rows["suffix_token_id"] = record.suffix_token_id[env]
            rows["suffix_token_text"] = np.array(record.suffix_token_text[env], dtype=object)
        if self._has_truncation:
            truncated = record.prompt_truncated
            rows["prompt_truncated"] = np.bool_(truncated is not None and truncated[env])  # type: ignore[assignment]
        for name, maps, axis in (
            ("suffix_attention", record.suffix_attention, 2),
            ("suffix_attention_mean", record.suffix_attention_mean, 2),
            ("prefix_attention", record.prefix_attention, 1),
            ("vision_attention", record.vision_attention, 2),
        ):
            if maps is not None:
                rows[name] = np.moveaxis(maps, axis, 0)[env]  # a view: all layers' maps take 150 MB
                self._raw_bytes += rows[name].nbytes
        if self._activations is not None:
            found = self._activations.rows(record, env)
            self._raw_bytes += sum(row.nbytes for row in found.values())
            rows |= found
        self._store.append_inference(rows)


def _row(values: np.ndarray | None, env: int) -> Any:
    assert values is not None  # the frame has stepped
    return values[env]
