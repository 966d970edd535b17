"""Videos: exact frame counts, true colours, odd sizes."""

import numpy as np
import pytest

from lerobot_attn.errors import StoreError
from lerobot_attn.video import VideoWriter, count_frames, read_frames


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (65, 63)])
@pytest.mark.parametrize("fps", [10, 80])
def test_frames_come_back(tmp_path, size, fps):
    path = tmp_path / "video.mp4"
    writer = VideoWriter(path, fps=fps, size_px=size)
    frames = [np.full((*size, 3), 10 + 5 * i, np.uint8) for i in range(37)]
    for frame in frames:
        writer.write(frame)
    writer.close()
    assert count_frames(path) == 37
    for found, frame in zip(read_frames(path, size_px=size), frames, strict=True):
        assert found.shape == frame.shape
        assert np.abs(found.astype(int) - frame).max() <= 3


def test_wrong_frame_is_refused(tmp_path):
    writer = VideoWriter(tmp_path / "video.mp4", fps=10, size_px=(64, 64))
    with pytest.raises(StoreError, match="got a frame of shape"):
        writer.write(np.zeros((64, 32, 3), np.uint8))
    writer.close()


def test_missing_video(tmp_path):
    with pytest.raises(StoreError, match="no such video file"):
        count_frames(tmp_path / "none.mp4")


def test_not_a_video(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_text("nothing of the kind")
    with pytest.raises(StoreError, match="not a readable video"):
        count_frames(path)
