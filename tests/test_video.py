"""Videos: exact frame counts, true colours, odd sizes."""

import subprocess
import sys

import numpy as np
import pytest

from lerobot_attn.errors import StoreError
from lerobot_attn.store.video import VideoWriter, count_frames, read_frames


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


INTERRUPTED = """
import os, signal, sys
import numpy as np
from lerobot_attn.store.video import VideoWriter

os.setpgid(0, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
writer = VideoWriter(sys.argv[1], fps=10, size_px=(64, 64))
encoder = writer._process.pid
assert os.getpgid(encoder) == encoder, "a terminal's Ctrl-C reaches the encoder"
for number in range(12):
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(encoder, ending)  # a cluster's signals go to all processes of a job
    writer.write(np.zeros((64, 64, 3), np.uint8))
writer.close()
os.killpg(0, signal.SIGINT)  # is heard again
"""


def test_the_encoder_lets_pass_what_ends_a_recording(tmp_path):
    path = tmp_path / "video.mp4"
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, path], capture_output=True, text=True, check=False
    )
    assert count_frames(path) == 12
    assert done.stderr.count("KeyboardInterrupt") == 1, done.stderr
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")


def test_the_encoder_is_started_without_a_copy_of_this_process(tmp_path):
    """What is called at a fork is not called: a process with a policy in it takes long to copy."""
    code = """
import os, sys
from pathlib import Path
import numpy as np
from lerobot_attn.store.video import VideoWriter, find_encoder

find_encoder()
os.register_at_fork(before=lambda: sys.exit("forked"))
writer = VideoWriter(Path(sys.argv[1]), fps=10, size_px=(64, 64))
writer.write(np.zeros((64, 64, 3), np.uint8))
writer.close()
"""
    path = tmp_path / "video.mp4"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert count_frames(path) == 1


def test_an_encoder_that_died_is_said(tmp_path):
    writer = VideoWriter(tmp_path / "video.mp4", fps=10, size_px=(256, 256))
    writer._process.kill()
    writer._process.wait()
    with pytest.raises(StoreError, match="the video encoder stopped"):
        writer.write(np.zeros((256, 256, 3), np.uint8))
    writer.close()
    writer.close()
    with pytest.raises(StoreError, match="the video encoder stopped"):
        writer.write(np.zeros((256, 256, 3), np.uint8))


def test_missing_video(tmp_path):
    with pytest.raises(StoreError, match="no such video file"):
        count_frames(tmp_path / "none.mp4")


def test_not_a_video(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_text("nothing of the kind")
    with pytest.raises(StoreError, match="not a readable video"):
        count_frames(path)


def numbered_video(path, n_frames=20):
    writer = VideoWriter(path, fps=10, size_px=(32, 32))
    for number in range(n_frames):
        writer.write(np.full((32, 32, 3), 20 + 10 * number, np.uint8))
    writer.close()
    return path


def numbers_shown(frames):
    return [round((float(frame.mean()) - 20) / 10) for frame in frames]


@pytest.mark.parametrize("numbers", [[0], [19], [3, 4, 11], range(20), range(5, 20, 7), []])
def test_chosen_frames_are_exact(tmp_path, numbers):
    path = numbered_video(tmp_path / "video.mp4")
    assert numbers_shown(read_frames(path, numbers=numbers)) == list(numbers)


def test_frame_beyond_the_end(tmp_path):
    frames = read_frames(numbered_video(tmp_path / "video.mp4"), numbers=[18, 20])
    assert numbers_shown([next(frames)]) == [18]
    with pytest.raises(StoreError, match="has 20 frames, expected a frame 20 in it"):
        next(frames)


@pytest.mark.parametrize("numbers", [[4, 3], [4, 4]])
def test_numbers_must_ascend(tmp_path, numbers):
    with pytest.raises(ValueError, match="numbers must ascend"):
        list(read_frames(numbered_video(tmp_path / "video.mp4"), numbers=numbers))


def test_truncated_video(tmp_path):
    path = numbered_video(tmp_path / "video.mp4")
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(StoreError, match="not a readable video"):
        count_frames(path)
