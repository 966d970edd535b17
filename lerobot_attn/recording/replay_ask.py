"""A replay's questions to the policy: a batch of recorded frames goes in, a batch of answers comes out.

Knows the policy by what it is asked and answers. Knows no store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lerobot_attn.capture import AttentionCapture, InferenceRecord
from lerobot_attn.errors import CaptureError
from lerobot_attn.interventions import Intervener
from lerobot_attn.recording.asking import AskedPolicy, Moment
from lerobot_attn.recording.episode import Views
from lerobot_attn.recording.first_look import Found
from lerobot_attn.recording.footage import FootageEpisode
from lerobot_attn.recording.handle import EpisodeHandle
from lerobot_attn.recording.loop_episode import shown_by
from lerobot_attn.recording.replay_inputs import ReplayInputs


class Question(NamedTuple):
    """One frame that the policy is asked about, and the frames that its chunk stands beside: frame … stop."""

    episode: ReplayedEpisode
    frame: int
    stop: int

    @property
    def task(self) -> str:
        """The instruction."""
        return self.episode.task_of(self.frame)


@dataclass
class ReplayedEpisode:
    """An episode on its way from the footage to its store."""

    footage: FootageEpisode
    handle: EpisodeHandle
    task: str | None  # instead of the recorded ones

    def task_of(self, frame: int) -> str:
        """Return the instruction at a frame."""
        return self.footage.tasks[frame] if self.task is None else self.task


@dataclass
class Answer:
    """What the policy answered to a batch of questions; `record` is None where capture failed.

    `found`: row of the batch → what an episode's first observation did not pass, where it was looked at.
    """

    record: InferenceRecord | None
    failure: Exception | None
    predicted: np.ndarray | None = None  # (batch, row of the chunk, action_dim), in the robot's units
    seen: Views | None = None  # what the cameras showed the policy, where something was painted over
    found: Mapping[int, Found] = field(default_factory=dict)


class Asker:
    """Asks the policy about a batch of frames."""

    def __init__(
        self,
        policy: Any,
        capture: AttentionCapture,
        inputs: ReplayInputs,
        preprocessor: Any,
        postprocessor: Any,
        seed: int,
        records: list[InferenceRecord],
        failures: list[Exception],
        acting: Intervener | None = None,
        looks: Callable[..., list[Found] | None] | None = None,
    ):
        self._policy = AskedPolicy(policy, preprocessor, capture.policy)
        self.capture = capture
        self.inputs = inputs
        self._postprocessor = postprocessor
        # What every store says it was drawn with; a policy that does not denoise draws nothing.
        self.seed = seed if self.draws_itself or capture.policy.noise_shape is not None else None
        self._records, self._failures = records, failures
        self._acting = acting
        self._looks = looks  # at (batch, tasks)

    @property
    def draws_itself(self) -> bool:
        """Whether the policy draws its own noise: it is then asked about one frame at a time."""
        return self._policy.draws_itself

    @property
    def predicts(self) -> bool:
        """Whether answers come in the robot's units."""
        return self._postprocessor is not None

    @property
    def changes_task(self) -> bool:
        """Whether the policy is told other instructions than the recorded ones."""
        return self._acting is not None and self._acting.condition.changes_task

    def told(self, episode: ReplayedEpisode, frame: int) -> str:
        """Return the instruction as the policy is told it at a frame."""
        task = episode.task_of(frame)
        return task if self._acting is None else self._acting.task(task, episode.footage.index)

    def _look(self, questions: Sequence[Question], batch: Any) -> Mapping[int, Found]:
        """Check the first observation of each episode that begins in a batch; before the policy gets it."""
        rows = [row for row, question in enumerate(questions) if question.frame == 0]
        if self._looks is None or not rows:
            return {}
        tasks = [self.told(question.episode, question.frame) for question in questions]
        found = self._looks(batch, tasks, rows=rows)
        return {} if found is None else dict(zip(rows, found, strict=True))

    def _painted(self, batch: dict[str, Any]) -> Views | None:
        """Return the pictures that the policy just saw, if they are not those that it was given."""
        seen = batch if self._acting is None else self._acting.seen(batch)
        is_painted = any(seen[name] is not value for name, value in batch.items())
        return shown_by(self.capture, seen) if is_painted else None

    @torch.inference_mode()
    def ask(
        self,
        questions: Sequence[Question],
        frames: Sequence[Mapping[str, Tensor]],
        meanwhile: Callable[[], None],
    ) -> Answer:
        """Return the answers to a batch.

        Args:
            questions: of one task.
            frames: what the policy sees at each.
            meanwhile: called once the policy was started; on a GPU it still runs then.
        """
        self._records.clear()
        self._failures.clear()
        if self._acting is not None:
            self._acting.begin([question.episode.footage.index for question in questions])
        batch = self._policy.batch(frames, [self.told(one.episode, one.frame) for one in questions])
        found = self._look(questions, batch)
        moments = [Moment(one.episode.footage.index, one.frame) for one in questions]
        chunk = self._policy.chunk(batch, self.seed, moments)
        meanwhile()
        failure = self._failures[0] if self._failures else None
        record = self._records[0] if self._records else None
        if record is None and failure is None:
            failure = CaptureError("the policy answered without an inference, expected one for each batch")
        if record is not None and record.batch_size != len(questions):
            failure, record = (
                CaptureError(f"the policy got a batch of {record.batch_size}, expected {len(questions)}"),
                None,
            )
        answer = Answer(record, failure, seen=self._painted(batch), found=found)
        if self._postprocessor is not None:
            rows = range(min(chunk.shape[1], max(q.stop - q.frame for q in questions)))
            # Row by row, as in a rollout: it may add the state that the preprocessor saw last.
            done = [self._postprocessor(chunk[:, row]) for row in rows]
            answer.predicted = torch.stack(done, dim=1).float().cpu().numpy()
        return answer
