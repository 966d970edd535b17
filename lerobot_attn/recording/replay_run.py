"""A replay's way through its episodes: one thread reads, the caller's asks the policy, the writer's stores.

Knows footage, and the policy through an `Asker`. Opens neither.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lerobot_attn.capture import HostCopies
from lerobot_attn.config import REFERENCE, AttentionConfig
from lerobot_attn.errors import CaptureError
from lerobot_attn.recording.episode import Frame, Views
from lerobot_attn.recording.first_look import INPUT_CHECKS
from lerobot_attn.recording.folder import RunFolder, task_folder
from lerobot_attn.recording.footage import Footage, FootageEpisode
from lerobot_attn.recording.handle import (
    EpisodeHandle,
    queue_inference,
    queue_views,
    write_out,
    write_out_after,
)
from lerobot_attn.recording.loop_episode import shown_by
from lerobot_attn.recording.plan import DimensionNames, EpisodePlan
from lerobot_attn.recording.replay_ask import Answer, Asker, Question, ReplayedEpisode
from lerobot_attn.recording.replay_views import FilmedFrames, ViewsAhead, computes_alone, reading
from lerobot_attn.recording.series import EpisodeSeries
from lerobot_attn.sizes import Progress, format_bytes
from lerobot_attn.store.references import reference_to
from lerobot_attn.store.video import frame_size_px

logger = logging.getLogger(__name__)

_NICENESS = 10  # of the writer: it takes what the policy leaves, until somebody waits for it
_COORDINATES = ("frame_index", "timestamp", "episode_index", "task_index")


class ReplayRun(EpisodeSeries):
    """The episodes of a replay.

    Args:
        policy: the policy that is asked.
        run_folder: where the stores go.
        config: the capture and storage settings.
        footage: what is replayed.
        every: frames from one question to the next.
        batch_size: questions in one call of the policy.
        task: the instruction, instead of the recorded ones.
    """

    def __init__(
        self,
        policy: Any,
        run_folder: RunFolder,
        config: AttentionConfig,
        footage: Footage,
        *,
        every: int,
        batch_size: int,
        task: str | None,
    ):
        names = DimensionNames(footage.features.state_names, footage.features.action_names)
        super().__init__(policy, run_folder, config, footage.fps, names, niceness=_NICENESS)
        self._footage = footage
        self._every = every
        self._batch_size = batch_size
        self._task = task
        self._open: list[ReplayedEpisode] = []
        self._n_done = self._n_frames = self._n_questions = 0
        self._progress: Progress = lambda done, total: None

    def run(
        self, asker: Asker, indices: Sequence[int], attributes: Mapping[str, Any], progress: Progress | None
    ) -> None:
        """Replay the episodes of these numbers; what was begun is closed, also if this is interrupted.

        Args:
            asker: asks the policy.
            indices: the episodes.
            attributes: what every store says.
            progress: called with (frames done, frames in all).

        Raises:
            StoreError: an episode that would be kept was recorded otherwise.
            CaptureError: a frame cannot be read; or what went wrong, with `on_error="abort"`.
        """
        self._asker, self._inputs = asker, asker.inputs
        self._unused = [name for name in self._footage.features.cameras if name not in self._inputs.cameras]
        self._progress = progress or self._progress
        self._begin(asker.capture, attributes)
        if self._unused:
            logger.info("The policy does not look at %s", ", ".join(self._unused))
        reader = ThreadPoolExecutor(1, "lerobot-attn-reader", initializer=computes_alone)
        try:
            self._run(reader, indices, asker.seed)
            write_out(self._writer, self._handles, "Ctrl-C ends the replay")
        except BaseException as error:
            for episode in self._open:
                episode.handle.interrupt(error)
            write_out_after(self._writer, self._handles, error)
            raise
        finally:
            reader.shutdown(cancel_futures=True)
            self._end()
        self._raise_of_failures()

    def _run(self, reader: ThreadPoolExecutor, indices: Sequence[int], seed: int | None) -> None:
        episodes = self._planned(reader, indices, seed)
        batches = self._batches(episodes)
        batch = next(batches, None)
        frames = None if batch is None else reader.submit(self._frames_of, batch)
        written: Callable[[], None] = _nothing
        while batch is not None and frames is not None:
            following = next(batches, None)
            now = frames.result()
            views = self._views_ahead(reader, batch, now)
            frames = None if following is None else reader.submit(self._frames_of, following)
            # What was answered before is written while a GPU works on this.
            answer = self._asker.ask(batch, now, written)
            written = partial(self._write, batch, answer, views)
            batch = following
        written()

    def _planned(
        self, reader: ThreadPoolExecutor, indices: Sequence[int], seed: int | None
    ) -> list[tuple[EpisodePlan, FootageEpisode]]:
        planned = []
        for index in indices:
            found: FootageEpisode = reader.submit(self._footage.episode, index).result()
            group = self._footage.group
            name = task_folder(group, found.task_id)
            plan = self._plan(name, group, found.task_id, found.index, seed)
            if plan is None:
                continue
            if self._config.cameras == REFERENCE:
                videos = reader.submit(self._references, found.index, plan.path).result()
                plan = replace(plan, attributes={**plan.attributes, "videos": videos})
            planned.append((plan, found))
            self._n_frames += len(found)
            self._n_questions += -(-len(found) // self._every)
        return planned

    def _references(self, index: int, store: Path) -> dict[str, dict[str, Any]]:
        """Return where the cameras' videos of an episode are, by the policy's names, for its store to say.

        Raises:
            CaptureError: a file cannot be read.
        """
        found = {}
        for camera, clip in self._footage.clips(index, list(self._inputs.cameras)).items():
            with reading(index, 0):
                found[self._inputs.cameras[camera]] = reference_to(clip, store, frame_size_px(clip.path))
        return found

    def _batches(self, planned: Sequence[tuple[EpisodePlan, FootageEpisode]]) -> Iterator[list[Question]]:
        """Yield batches of questions of one task: a longer prompt would pad the others of its batch."""
        batch: list[Question] = []
        for plan, found in planned:
            episode = self._begun(plan, found)
            for frame in range(0, len(found), self._every):
                question = Question(episode, frame, min(frame + self._every, len(found)))
                if batch and (len(batch) == self._batch_size or question.task != batch[0].task):
                    yield batch
                    batch = []
                batch.append(question)
        if batch:
            yield batch

    def _begun(self, plan: EpisodePlan, found: FootageEpisode) -> ReplayedEpisode:
        handle = EpisodeHandle(plan, 0, self._config, self._writer, self._names)
        self._handles.append(handle)
        arrays = found.arrays
        episode = ReplayedEpisode(found, handle, self._task)
        handle.task = self._asker.told(episode, 0)
        if self._asker.changes_task:
            handle.attributes["environment_task"] = episode.task_of(0)
        if self._config.cameras == REFERENCE:
            handle.attributes["videos"] = plan.attributes["videos"]
        handle.has_reward, handle.has_success = "reward" in arrays, "success" in arrays
        handle.state_dim = arrays["state"].shape[1] if "state" in arrays else None
        predicted = ("predicted_action",) if self._asker.predicts else ()
        error = ("action_error",) if predicted and "action" in arrays else ()
        handle.more = frozenset({*_COORDINATES, *predicted, *error})
        self._open.append(episode)
        return episode

    def _frames_of(self, questions: Sequence[Question]) -> list[dict[str, Tensor]]:
        """Read what the policy sees at each frame that it is asked about. On the reader's thread."""
        found = []
        for question in questions:
            index = question.episode.footage.index
            with reading(index, question.frame):
                observation = self._footage.observation(index, question.frame)
            found.append(self._inputs.frame(observation, self._unused))
        return found

    def _views_ahead(
        self,
        reader: ThreadPoolExecutor,
        questions: Sequence[Question],
        frames: Sequence[Mapping[str, Tensor]],
    ) -> ViewsAhead | None:
        """Begin to read what the cameras showed; None where nothing is filmed.

        Args:
            reader: the thread that reads.
            questions: of a batch.
            frames: what the policy sees at each of them.
        """
        if self._config.cameras is not True or not self._inputs.cameras:
            return None
        names = {camera: self._inputs.rename.get(camera, camera) for camera in self._inputs.cameras}
        shown = [{camera: frame[name] for camera, name in names.items()} for frame in frames]
        n_bytes = sum(picture.numel() for picture in shown[0].values())
        return ViewsAhead(reader, self._views_of, questions, shown, n_bytes)

    def _views_of(self, question: Question, first: Mapping[str, Tensor] | None) -> FilmedFrames:
        """Read what the cameras showed at a question's frames. On the reader's thread.

        Args:
            question: whose frames.
            first: what they showed at the first one, where that is at hand: camera → picture.
        """
        found, index = [], question.episode.footage.index
        for frame in range(question.frame, question.stop):
            shown = first if frame == question.frame else None
            if shown is None:
                with reading(index, frame):
                    shown = self._footage.pictures(index, frame, list(self._inputs.cameras))
            named = {self._inputs.cameras[camera]: picture[None] for camera, picture in shown.items()}
            found.append(shown_by(self._capture, named))
        return found

    def _tell_size(self, inference_bytes: int) -> None:
        """Say once what the whole replay takes, and whether the disk has room for it."""
        is_told = self._size_told
        super()._tell_size(inference_bytes)
        if is_told:
            return
        needed = self._n_questions * inference_bytes
        logger.info("%d inferences: about %s before compression", self._n_questions, format_bytes(needed))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            logger.warning(
                "%s may not hold all of it: %s are free; choose another folder, or save fewer layers",
                self.folder,
                format_bytes(free),
            )

    def _write(self, questions: Sequence[Question], answer: Answer, views: ViewsAhead | None) -> None:
        """Hand a batch to the writer's thread, in the order of the frames."""
        if answer.record is not None:
            self._tell_size(answer.record.maps_bytes)
        for row, question in enumerate(questions):
            self._write_one(question, answer, row, [] if views is None else views.take())
            self._n_done += question.stop - question.frame
            self._progress(self._n_done, self._n_frames)

    def _write_one(self, question: Question, answer: Answer, row: int, views: Sequence[Views | None]) -> None:
        episode, handle = question.episode, question.episode.handle
        if row in answer.found:
            handle.attributes[INPUT_CHECKS] = answer.found[row]
        if answer.record is None:
            handle.fail(answer.failure or CaptureError("nothing was captured"))
        elif handle.failure is None:
            record = answer.record if answer.record.batch_size == 1 else answer.record.of(row)
            queue_inference(self._writer, [handle], record)
            record.wait()
            predicted = None if answer.predicted is None else answer.predicted[row]
            for token, frame in enumerate(range(question.frame, question.stop)):
                shown = views[token] if views else None
                if shown is not None and token == 0 and answer.seen is not None:
                    shown = answer.seen.of(row)
                if shown is not None:
                    queue_views(self._writer, [handle], shown)
                has_token = token < record.action_chunk.shape[1]
                chosen = record.action_chunk[0, token] if has_token else None
                said = predicted[token] if has_token and predicted is not None else None
                n_dims = record.action_chunk.shape[2]
                handle.add_frame(self._frame(episode, frame, chosen, said, n_dims), has_token=has_token)
                handle.next_frame()
        handle.tell_failure(goes_on="the replay")
        if question.stop == len(episode.footage):
            handle.ended = "the end of what was recorded"
            handle.finish()
            self._open.remove(episode)

    def _frame(
        self,
        episode: ReplayedEpisode,
        frame: int,
        chosen: np.ndarray | None,
        said: np.ndarray | None,
        n_dims: int,
    ) -> Frame:
        """Return a frame as the store takes it.

        Args:
            episode: whose frame.
            frame: its number.
            chosen: (action_dim,) the chunk's token that stands for it, as the policy gave it.
            said: (action_dim,) the same in the robot's units.
            n_dims: action dimensions.
        """
        arrays = {name: values[frame : frame + 1] for name, values in episode.footage.arrays.items()}
        nothing = np.full((1, n_dims), np.nan, np.float32)
        action = arrays.get("action", nothing)
        predicted = nothing if said is None else said[None]
        more = {name: arrays[name] for name in _COORDINATES}
        more["predicted_action"] = predicted
        more["action_error"] = np.abs(predicted - action).mean(axis=1, dtype=np.float32)
        return Frame(
            HostCopies(),
            None if chosen is None else torch.from_numpy(chosen[None]),
            arrays.get("state"),
            action,
            arrays.get("reward"),
            arrays.get("success"),
            {name: more[name] for name in episode.handle.more},
        )


def _nothing() -> None:
    pass
