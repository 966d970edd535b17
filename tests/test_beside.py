"""The explorer beside a recording: it is there while the recording is, and nobody waits for it."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from test_own_loop import Robot, observation  # noqa: E402

from lerobot_attn import AttentionConfig, open_run, record_episodes  # noqa: E402
from lerobot_attn.recording import beside  # noqa: E402
from lerobot_attn.recording.camera_videos import CameraVideos  # noqa: E402
from lerobot_attn.recording.folder import remove_episode  # noqa: E402
from lerobot_attn.recording.plan import EpisodePlan  # noqa: E402
from lerobot_attn.store.stills import write_still  # noqa: E402
from lerobot_attn.store.video import read_frames  # noqa: E402


def address_in(capfd, seconds=60):
    """The address that the explorer's process printed."""
    printed = ""
    for _ in range(10 * seconds):
        printed += capfd.readouterr().out
        found = re.search(r"The explorer is at (http://\S+)", printed)
        if found:
            return found[1]
        time.sleep(0.1)
    pytest.fail(f"the explorer said no address, but {printed!r}")


def test_an_inference_is_told_soon_after_its_first_frame(demo_policy, tmp_path, capfd, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    policy, preprocess, postprocess = demo_policy(num_inference_steps=2)
    robot, config = Robot(), AttentionConfig(layers=[-1], view=True)
    with record_episodes(policy, tmp_path, config, fps=20, preprocessor=preprocess) as recording:
        with recording.episode(task="pick up the soup") as episode:
            policy.reset()

            def act():
                seen = observation(robot.n_actions)
                action = postprocess(policy.select_action(preprocess(seen)))[0]
                episode.step(seen, action)
                robot.send_action(action)

            act()
            url = address_in(capfd)  # it waited for the first episode
            with urllib.request.urlopen(url + "api/events", timeout=60) as events:
                assert events.readline() == b"event: ready\n"
                for _ in range(10):
                    act()
                acted_at = time.monotonic()
                told = []
                while not told or told[-1]["n_inferences"] < 2 or told[-1]["n_frames"] < 11:
                    line = events.readline()
                    if line.startswith(b'data: {"changed'):
                        told += json.loads(line[5:])["changed"]
                waited_s = time.monotonic() - acted_at
                # The newest inference's pictures, which no video shows yet.
                row, seen = told[-1], [observation(frame) for frame in range(11)]
                address = f"{url}api/episodes/{row['id']}/{row['version']}/cameras"
                for camera in ("observation.images.image", "observation.images.image2"):
                    frames = [255 * one[camera][0].movedim(0, -1).numpy() for one in seen]
                    with urllib.request.urlopen(f"{address}/{camera}/frames/10.jpg", timeout=60) as answer:
                        shown = np.asarray(Image.open(answer)).astype(int)
                        assert "immutable" not in answer.headers["cache-control"]
                    assert shown.shape == frames[10].shape
                    assert int(np.argmin([np.abs(shown - frame).mean() for frame in frames])) == 10
                    with pytest.raises(urllib.error.HTTPError, match="422"):
                        urllib.request.urlopen(f"{address}/{camera}/frames/9.jpg", timeout=60)
                assert len(list(tmp_path.rglob("*.jpg"))) == 2
        # The second inference and its first frame, long before the third would write them.
        assert (told[-1]["n_inferences"], told[-1]["n_frames"]) == (2, 11)
        assert waited_s < 5  # a tenth of a second, and what a busy machine adds
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)
    (found,) = open_run(tmp_path)
    assert found.is_complete
    assert found.dataset.frame_query.values.tolist() == [*range(10), 0]
    assert not [*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.new")]  # the videos have them now
    assert [sum(1 for _ in read_frames(video)) for video in found.videos.values()] == [11, 11]


def test_stills_are_of_the_newest_inference_and_of_watched_recordings_alone(tmp_path):
    def shown(frame):
        return np.full((16, 16, 3), 10 * frame, np.uint8)

    plan = EpisodePlan(0, tmp_path / "episode_00000.zarr", 20, {})
    for stills in (True, False):
        videos = CameraVideos(plan, stills=stills)
        for frame in range(7):
            videos.write("observation.images.front", shown(frame), inference=1 + frame // 3)
            there = {path.name for path in tmp_path.glob("*.jpg")}
            newest = f"episode_00000.front.{3 * (frame // 3):06d}.jpg"
            assert there == ({newest} if stills else set())
            if stills:
                found = np.asarray(Image.open(tmp_path / newest))
                np.testing.assert_allclose(found, shown(3 * (frame // 3)), atol=2)
        if stills:
            videos.remove()
        else:
            assert videos.close(7)["observation.images.front"]["n_frames"] == 7
        assert not list(tmp_path.glob("*.jpg"))


def test_what_a_killed_recording_left_is_removed_with_its_episode(tmp_path):
    store = tmp_path / "episode_00000.zarr"
    store.mkdir()
    video = tmp_path / "episode_00000.front.mp4"
    video.touch()
    write_still(video, 20, np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "episode_00000.front.note.jpg").touch()  # somebody's own
    remove_episode(store)
    assert [path.name for path in tmp_path.iterdir()] == ["episode_00000.front.note.jpg"]


def test_an_explorer_that_fails_costs_the_recording_nothing(tmp_path, monkeypatch, caplog):
    started, start = [], subprocess.Popen

    def noted(*args, **kwargs):
        started.append(start(*args, **kwargs))
        return started[0]

    monkeypatch.setattr(beside, "_COMMAND", "raise SystemExit(3)")
    monkeypatch.setattr(beside.subprocess, "Popen", noted)
    with beside.explorer_beside(tmp_path, wanted=True):
        started[0].wait(60)
    assert "The explorer ended by itself, with exit status 3" in caplog.text


def test_nothing_is_started_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(beside.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("it was started"))
    with beside.explorer_beside(tmp_path, wanted=False):
        pass
