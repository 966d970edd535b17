"""A LeRobotDataset as footage for a replay: by its object, its folder or its name.

Uses LeRobot's own reader, so several episodes may share a file of frames or of video. Knows no policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lerobot_attn.config import REFERENCE
from lerobot_attn.errors import ConfigError, first_line
from lerobot_attn.recording.footage import FootageEpisode, FootageFeatures
from lerobot_attn.store.references import Clip

_OBSERVATION = "observation."
# Array of the store → feature of the data set.
_NUMBERS = {
    "timestamp": "timestamp",
    "frame_index": "frame_index",
    "episode_index": "episode_index",
    "task_index": "task_index",
}
_OPTIONAL_NUMBERS = {
    "action": "action",
    "state": "observation.state",
    "reward": "next.reward",
    "success": "next.success",
}
_TOLERANCE_S = 1e-3  # what float32 and a recorder's rounding may take


class DatasetFrames:
    """The frames of a LeRobotDataset.

    Args:
        dataset: a LeRobotDataset, the folder of one, or its name on the Hub or in LeRobot's cache.

    Raises:
        ConfigError: there is no such data set, it is empty, its fps is no number above 0, or it was opened
            in a way that a replay cannot read.
    """

    is_whole = True
    every: int | None = None

    def __init__(self, dataset: Any):
        self._dataset: Any = None
        if isinstance(dataset, str | Path):
            self._root, self.meta = _open_metadata(dataset)
        else:
            self._dataset, self._root, self.meta = dataset, Path(dataset.root), dataset.meta
            _check_opened(dataset)
        self._name = str(self.meta.repo_id)
        fps, n_frames = self.meta.fps, self.meta.total_frames
        if not isinstance(fps, int | float) or not 0 < fps < float("inf"):
            raise ConfigError(f"{self._name}: its fps is {fps!r}, expected a number above 0")
        if not self.meta.total_episodes or not n_frames:
            raise ConfigError(f"{self._name}: holds no frames, expected a data set with at least one episode")

    @property
    def group(self) -> str:
        """The last part of the data set's name."""
        return self._name.rstrip("/").rpartition("/")[2] or "dataset"

    @property
    def said(self) -> Mapping[str, Any]:
        """The data set's name."""
        return {"dataset": self._name}

    @property
    def dataset(self) -> Mapping[str, Any] | None:
        """The data set's name, folder and revision."""
        revision = getattr(self.meta, "revision", None)
        return {
            "repo_id": self._name,
            "root": str(self.meta.root),
            "revision": None if revision is None else str(revision),
        }

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self.meta.fps)

    @property
    def features(self) -> FootageFeatures:
        """The data set's own."""
        features = self.meta.features
        cameras = tuple(self.meta.camera_keys)
        shapes = {
            name: tuple(int(n) for n in feature["shape"])
            for name, feature in features.items()
            if name not in cameras
        }
        return FootageFeatures(
            cameras,
            shapes,
            _names(features.get("observation.state")),
            _names(features.get("action")),
        )

    def choose(self, episodes: Sequence[int] | None) -> list[int]:
        """Return the episodes' numbers, and open the data set for them.

        Raises:
            ConfigError: one does not exist, or their files cannot be had.
        """
        n_episodes = int(self.meta.total_episodes)
        opened = None if self._dataset is None else self._dataset.episodes
        there = list(range(n_episodes)) if opened is None else sorted(opened)
        wanted = there if episodes is None else sorted(set(episodes))
        missing = [index for index in wanted if index not in there]
        if missing or not wanted:
            those = f"0 to {n_episodes - 1}"
            if opened is not None:
                those = f"one of {there}, with which it was opened"
            got = missing[0] if missing else "none"
            raise ConfigError(
                f"episodes: got {got}, {self._name} has {n_episodes} episodes; expected {those}"
            )
        if self._dataset is None:
            self._dataset = _open(self._name, self._root, wanted if len(wanted) < n_episodes else None)
        return wanted

    def episode(self, index: int) -> FootageEpisode:
        """Read an episode's numbers, without decoding a picture.

        Raises:
            ConfigError: frame numbers or timestamps are not those of the data set's fps.
        """
        rows = self._rows(index)
        wanted = _NUMBERS | {
            array: feature for array, feature in _OPTIONAL_NUMBERS.items() if feature in self.meta.features
        }
        table = self._dataset.hf_dataset.select_columns(list(dict.fromkeys(wanted.values())))[rows]
        arrays = {
            array: np.stack([np.asarray(value) for value in table[feature]])
            for array, feature in wanted.items()
        }
        n = len(arrays["frame_index"])
        for array in ("action", "state"):
            if array in arrays:
                arrays[array] = arrays[array].reshape(n, -1).astype(np.float32)
        for array, dtype in (("reward", np.float32), ("success", bool), ("timestamp", np.float32)):
            if array in arrays:
                arrays[array] = arrays[array].reshape(n).astype(dtype)
        for array in ("frame_index", "episode_index", "task_index"):
            arrays[array] = arrays[array].reshape(n).astype(np.int32)
        self._check(index, arrays)
        numbers = arrays["task_index"]
        # As LeRobot's reader looks a task up.
        names = {number: str(self.meta.tasks.iloc[number].name) for number in np.unique(numbers).tolist()}
        return FootageEpisode(index, [names[number] for number in numbers.tolist()], int(numbers[0]), arrays)

    def observation(self, index: int, frame: int) -> dict[str, Tensor]:
        """Read one frame's observation as LeRobot's reader gives it."""
        item = self._dataset[self._rows(index).start + frame]
        return {
            name: value
            for name, value in item.items()
            if name.startswith(_OBSERVATION) and isinstance(value, Tensor)
        }

    def check_clips(self, cameras: Sequence[str]) -> None:
        """Check that what cameras showed is kept as videos.

        Raises:
            ConfigError: a camera's pictures are files of their own.
        """
        images = [camera for camera in cameras if camera not in self.meta.video_keys]
        if images:
            raise ConfigError(
                f"cameras: got {REFERENCE!r}, but {self._name} keeps {images[0]} as images, expected videos; "
                "set cameras=true, which writes them"
            )

    def clips(self, index: int, cameras: Sequence[str]) -> dict[str, Clip]:
        """Return which part of which of the data set's files shows an episode, of each camera."""
        said = self.meta.episodes[index]
        return {
            camera: Clip(
                Path(self.meta.root) / self.meta.get_video_file_path(index, camera),
                float(said[f"videos/{camera}/from_timestamp"]),
                self.fps,
                int(said["dataset_to_index"]) - int(said["dataset_from_index"]),
            )
            for camera in cameras
        }

    def pictures(self, index: int, frame: int, cameras: Sequence[str]) -> dict[str, Tensor]:
        """Read what cameras showed at one frame."""
        found = self.observation(index, frame)
        return {camera: found[camera] for camera in cameras}

    def _rows(self, index: int) -> slice:
        """Return where an episode lies among the rows that are loaded."""
        said = self.meta.episodes[index]
        first, stop = int(said["dataset_from_index"]), int(said["dataset_to_index"])
        places = self._dataset.absolute_to_relative_idx
        start = first if places is None else places[first]
        return slice(start, start + stop - first)

    def _check(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        frames = np.arange(len(arrays["frame_index"]))
        if not np.array_equal(arrays["frame_index"], frames) or (arrays["episode_index"] != index).any():
            raise ConfigError(
                f"{self._name}: the rows of episode {index} are not its frames 0 to {len(frames) - 1} in "
                "their order: the data set is damaged"
            )
        off = np.abs(arrays["timestamp"] - frames / self.fps)
        if off.max() > _TOLERANCE_S + frames[-1] * 1e-6:
            frame = int(off.argmax())
            raise ConfigError(
                f"{self._name}: frame {frame} of episode {index} is at {arrays['timestamp'][frame]:.4g} s, "
                f"expected {frame / self.fps:.4g} s at its {self.fps:g} frames per second; mend its fps or "
                "its timestamps"
            )


def _names(feature: Any) -> tuple[str, ...]:
    """Return the names of a feature's dimensions, which data sets write as a list or inside a mapping."""
    names = None if feature is None else feature.get("names")
    if isinstance(names, Mapping):
        names = next(iter(names.values()), None)
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def _open_metadata(dataset: str | Path) -> tuple[Path | None, Any]:
    """Return the folder, None for one that LeRobot finds by its name, and the metadata."""
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    folder = Path(dataset)
    here = folder if folder.is_dir() else None
    if here is not None and not (here / "meta" / "info.json").is_file():
        raise ConfigError(f"{folder}: is no LeRobotDataset, expected a folder that holds meta/info.json")
    if here is None and (folder.is_absolute() or len(folder.parts) > 2 or str(dataset).startswith(".")):
        raise ConfigError(f"{folder}: no such folder, expected one that holds meta/info.json")
    name = str(dataset) if here is None else here.resolve().name
    try:
        return here, LeRobotDatasetMetadata(name, root=here)
    except Exception as error:  # of the Hub, of the network, of the files: many kinds
        where = "" if here is not None else ", neither in LeRobot's cache nor on the Hub"
        raise ConfigError(
            f"{dataset}: no data set that can be read{where} ({_said(error)}); expected a folder with "
            "meta/info.json, or a name such as lerobot/pusht"
        ) from error


def _open(name: str, root: Path | None, episodes: list[int] | None) -> Any:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    try:
        return LeRobotDataset(name, root=root, episodes=episodes)
    except Exception as error:
        raise ConfigError(
            f"{name}: its frames cannot be read ({_said(error)}); expected the files that its meta/info.json "
            "names"
        ) from error


def _said(error: Exception) -> str:
    """Return what an error says, in one line; LeRobot's longest begin with an empty one."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line or first_line(error)


def _check_opened(dataset: Any) -> None:
    if getattr(dataset, "writer", None) is not None and not getattr(dataset, "_is_finalized", True):
        raise ConfigError("dataset: is being written, expected a finished one; call its finalize() first")
    dataset.meta.ensure_readable()
    if getattr(dataset, "delta_timestamps", None):
        raise ConfigError(
            "dataset: was opened with delta_timestamps, expected one frame an item; open it without"
        )
