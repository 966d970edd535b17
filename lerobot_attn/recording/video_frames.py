"""Plain videos as footage for a replay, one a camera, where there is no data set.

    VideoFrames({"observation.images.image": "grasp.mp4"}, task="pick up the soup")

There are no actions to compare with. Knows no policy: what else it wants is made up by the replay, and said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lerobot_attn.config import REFERENCE, AttentionConfig
from lerobot_attn.errors import ConfigError, StoreError, first_line
from lerobot_attn.recording.footage import FootageEpisode, FootageFeatures
from lerobot_attn.store.references import Clip
from lerobot_attn.store.video import count_frames, frame_rate, read_frames

_STATE = "observation.state"


class VideoFrames:
    """Frames of videos that were filmed together, as one episode.

    Args:
        videos: camera, by its whole or its short name ("image"), → MP4.
        task: the instruction.
        state: (frame, state_dim), or (state_dim,) for all frames, or an `.npy` of either, in the robot's
            units; frames are the videos', chosen or not. None: there is none.
        frames: numbers of the frames that are asked about, ascending; those alone are in the store then.
            None: all frames.
        sizes_px: camera → (height, width) of its pictures, where the video has a row or a column more,
            because codecs take even sizes alone.

    Raises:
        ConfigError: no video, one that cannot be read or differs in length or fps from the others, a state
            of another length, or a frame that is not there.
    """

    is_whole = False
    group = "video"

    def __init__(
        self,
        videos: Mapping[str, str | Path],
        *,
        task: str,
        state: np.ndarray | str | Path | None = None,
        frames: Sequence[int] | None = None,
        sizes_px: Mapping[str, tuple[int, int]] | None = None,
    ):
        if not videos:
            raise ConfigError("videos: got none, expected a video for at least one camera")
        self._videos = {_camera(name): Path(path) for name, path in videos.items()}
        self._task = task
        self._rate, self._n_frames = _agreed(self._videos)
        self._chosen = _chosen(frames, self._n_frames)
        self._is_choice = frames is not None
        self._state = None if state is None else _state(state, self._n_frames)
        # One for the frames that the policy is asked about, one for those that are filmed: both run ahead.
        sizes = {_camera(name): size for name, size in (sizes_px or {}).items()}
        self._asked = {name: _Reader(path, sizes.get(name)) for name, path in self._videos.items()}
        self._filmed = {name: _Reader(path, sizes.get(name)) for name, path in self._videos.items()}

    @property
    def said(self) -> Mapping[str, Any]:
        """The videos' names, and which frames were chosen."""
        return {
            "videos": {camera: path.name for camera, path in self._videos.items()},
            "frames": self._chosen if self._is_choice else None,
        }

    @property
    def dataset(self) -> Mapping[str, Any] | None:
        """There is none."""
        return None

    @property
    def fps(self) -> float:
        """The videos' own; one frame a second where single frames were chosen."""
        return 1.0 if self._is_choice else self._rate

    def check_clips(self, cameras: Sequence[str]) -> None:
        """Refuse: the videos are somebody's own files, of which nobody promised that they stay."""
        AttentionConfig(cameras=REFERENCE).check_films()

    def clips(self, index: int, cameras: Sequence[str]) -> dict[str, Clip]:
        """There is none."""
        return {}

    @property
    def every(self) -> int | None:
        """Each frame, where they were chosen."""
        return 1 if self._is_choice else None

    @property
    def features(self) -> FootageFeatures:
        """The cameras, and the state if there is one."""
        shapes = {} if self._state is None else {_STATE: (self._state.shape[1],)}
        return FootageFeatures(tuple(self._videos), shapes)

    def choose(self, episodes: Sequence[int] | None) -> list[int]:
        """Return the one episode's number.

        Raises:
            ConfigError: another one is asked for.
        """
        if episodes is not None and list(episodes) != [0]:
            raise ConfigError(f"episodes: got {list(episodes)}, videos are one episode, expected 0")
        return [0]

    def episode(self, index: int) -> FootageEpisode:
        """Return the frames' numbers."""
        frames = np.array(self._chosen, np.int32)
        zeros = np.zeros_like(frames)
        arrays = {
            "timestamp": (frames / self._rate).astype(np.float32),
            "frame_index": frames,
            "episode_index": zeros,
            "task_index": zeros,
        }
        if self._state is not None:
            arrays["state"] = self._state[frames]
        return FootageEpisode(index, [self._task] * len(frames), 0, arrays)

    def observation(self, index: int, frame: int) -> dict[str, Tensor]:
        """Read one frame's pictures, and its state."""
        number = self._chosen[frame]
        found = {camera: _as_tensor(reader.read(number)) for camera, reader in self._asked.items()}
        return found if self._state is None else {**found, _STATE: torch.from_numpy(self._state[number])}

    def pictures(self, index: int, frame: int, cameras: Sequence[str]) -> dict[str, Tensor]:
        """Read what cameras showed at one frame."""
        return {camera: _as_tensor(self._filmed[camera].read(self._chosen[frame])) for camera in cameras}


class _Reader:
    """Reads frames of a video whose numbers ascend for the most part; decodes none twice then."""

    def __init__(self, path: Path, size_px: tuple[int, int] | None):
        self._path, self._size_px = path, size_px
        self._frames = read_frames(path, size_px=size_px)
        self._next = 0

    def read(self, number: int) -> np.ndarray:
        if number < self._next:
            self._frames, self._next = read_frames(self._path, size_px=self._size_px), 0
        for picture in self._frames:
            self._next += 1
            if self._next > number:
                return picture
        raise StoreError(f"{self._path}: has {self._next} frames, expected a frame {number} in it")


def _camera(name: str) -> str:
    return name if name.startswith("observation.") else f"observation.images.{name}"


def _agreed(videos: Mapping[str, Path]) -> tuple[float, int]:
    """Return frames per second and number of frames, in which all videos must agree."""
    try:
        found = {camera: (frame_rate(path), count_frames(path)) for camera, path in videos.items()}
    except StoreError as error:
        raise ConfigError(str(error)) from error
    (first, said), *others = found.items()
    for camera, theirs in others:
        for what, one, other in zip(("frames per second", "frames"), said, theirs, strict=True):
            if one != other:
                raise ConfigError(
                    f"{videos[camera]}: has {other:g} {what}, {videos[first]} has {one:g}; expected videos "
                    "that were filmed together"
                )
    if not said[1]:
        raise ConfigError(f"{videos[first]}: holds no frames")
    return said


def _chosen(frames: Sequence[int] | None, n_frames: int) -> list[int]:
    if frames is None:
        return list(range(n_frames))
    numbers = sorted(set(frames))
    for number in numbers:
        if not 0 <= number < n_frames:
            raise ConfigError(f"frames: got {number}, the video has {n_frames}, expected 0 to {n_frames - 1}")
    if not numbers:
        raise ConfigError("frames: got none, expected at least one")
    return numbers


def _state(state: np.ndarray | str | Path, n_frames: int) -> np.ndarray:
    """Return (frame, state_dim) float32."""
    what = "state"
    if isinstance(state, str | Path):
        what = str(state)
        try:
            state = np.load(state, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(
                f"{what}: cannot be read ({first_line(error)}); expected an .npy of numbers"
            ) from error
    array = np.asarray(state)
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or not array.size:
        raise ConfigError(
            f"{what}: got shape {array.shape} {array.dtype}, expected numbers (frame, state_dim) or "
            "(state_dim,)"
        )
    if array.ndim == 2 and len(array) != n_frames:
        raise ConfigError(
            f"{what}: got {len(array)} rows, the video has {n_frames} frames, expected one each"
        )
    return np.array(np.broadcast_to(array, (n_frames, array.shape[-1])), np.float32)  # a copy of its own


def _as_tensor(picture: np.ndarray) -> Tensor:
    """Return (3, height, width) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 255
