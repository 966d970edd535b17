"""Episodes that one policy acts in, one after another: what recordings of own loops and of robots share.

Knows the run's folder and its writer. Knows neither what drives an episode nor when one begins and ends.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from lerobot_attn.capture import AttentionCapture
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import RANDOM_WEIGHTS, CaptureError, ConfigError
from lerobot_attn.recording.background import BackgroundWriter
from lerobot_attn.recording.folder import RunFolder, stored_bytes
from lerobot_attn.recording.handle import EpisodeHandle
from lerobot_attn.recording.plan import DimensionNames, EpisodePlan, EpisodeResult
from lerobot_attn.recording.provenance import checkpoint_facts, policy_facts, versions
from lerobot_attn.recording.summary import TaskSummary
from lerobot_attn.recording.uploading import Uploads
from lerobot_attn.sizes import format_bytes
from lerobot_attn.store.schema import EPISODE_SUFFIX

logger = logging.getLogger(__name__)


class EpisodeSeries:
    """The episodes of one recording: where each goes, and what became of it.

    Args:
        policy: the policy that acts in them.
        run_folder: where the stores go.
        config: the capture and storage settings.
        fps: frames per second of the videos.
        names: names of the state's and the action's dimensions.
        niceness: by how much the writer yields to the loop.
        look_every_s: how often the writer looks for what is to be written; None: it is woken.

    Attributes:
        folder: where the stores go.
        uploads: sends complete episodes to a bucket; None: nobody does.
    """

    def __init__(
        self,
        policy: Any,
        run_folder: RunFolder,
        config: AttentionConfig,
        fps: float,
        names: DimensionNames,
        *,
        niceness: int = 0,
        look_every_s: float | None = None,
    ):
        self.folder = run_folder.path
        self._policy = policy
        self._run_folder = run_folder
        self._config = config
        self._fps = float(fps)
        self._names = names
        self._writer = BackgroundWriter(
            config.queue_mb * 1_000_000, niceness=niceness, look_every_s=look_every_s
        )
        self._handles: list[EpisodeHandle] = []
        self._kept: list[EpisodeResult] = []
        self._next: dict[str, int] = {}
        self._size_told = False
        self.uploads: Uploads | None = None

    @property
    def results(self) -> list[EpisodeResult]:
        """What became of the episodes so far, in their order; of an unwritten one, that it is incomplete."""
        return [*self._kept, *(handle.outcome() for handle in self._handles)]

    def _begin(self, capture: AttentionCapture, attributes: Mapping[str, Any]) -> None:
        self._capture = capture
        policy = {**checkpoint_facts(getattr(self._policy, "config", None)), **policy_facts(capture.policy)}
        self._attributes = {"versions": versions(), "policy": policy, **attributes}
        self._run_folder.settle(self._attributes, self._config.to_dict())
        if capture.policy.random_weights:
            logger.warning("This policy has %s", RANDOM_WEIGHTS)
        if capture.policy.remark:
            logger.info("This policy is a %s", capture.policy.remark)

    def _end(self) -> None:
        self._writer.close(0)
        results = self.results
        saved = tuple(result for result in results if result.reason is None)
        summary = TaskSummary(
            name=str(self.folder),
            saved=saved,
            not_saved=tuple(result for result in results if result.reason is not None),
            stored_bytes=sum(stored_bytes(result.path) for result in saved if result.path is not None),
            waited_s=self._writer.waited_s,
        )
        failed = any(result.failed for result in summary.not_saved)
        logger.log(logging.ERROR if failed else logging.INFO, "%s", summary.line())

    def _raise_of_failures(self) -> None:
        failed = [result for result in self.results if result.failed and not result.interrupted]
        if failed:
            raise CaptureError(
                f"attention of {len(failed)} of {len(self.results)} episodes could not be saved whole: "
                f"episode {failed[0].index}: {failed[0].reason}"
            )

    def _plan(
        self, name: str, group: str, task_id: int, index: int | None, seed: int | None
    ) -> EpisodePlan | None:
        index = self._next.get(name, 0) if index is None else index
        path = self.folder / name / f"episode_{index:05d}{EPISODE_SUFFIX}"
        taken = {handle.plan.path for handle in self._handles} | {result.path for result in self._kept}
        if index < 0 or path in taken:
            raise ConfigError(f"index: got {index}, expected an episode number of {name} that is not taken")
        self._next[name] = max(self._next.get(name, 0), index + 1)
        if self._config.episodes is not None and index not in self._config.episodes:
            return None
        kept = self._run_folder.kept(path, seed)
        if kept is not None:
            if self.uploads is not None:
                self.uploads.add(path)
            sizes = (kept.n_frames, kept.n_inferences, kept.raw_bytes)
            self._kept.append(EpisodeResult(index, path, None, False, False, True, *sizes))
            return None
        said = {
            **self._attributes,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "task_group": group,
            "task_id": task_id,
            "episode_index": index,
            "seed": seed,
            "eval_video": None,
        }
        done = None if self.uploads is None else self.uploads.add
        return EpisodePlan(index=index, path=path, fps=self._fps, attributes=said, when_complete=done)

    def _tell_size(self, inference_bytes: int) -> None:
        """Say once what an inference takes, when the first one tells how many tokens there are."""
        if self._size_told:
            return
        self._size_told = True
        logger.info(
            "Attention goes to %s: about %s an inference before compression; %s free",
            self.folder,
            format_bytes(inference_bytes),
            format_bytes(shutil.disk_usage(self.folder).free),
        )
