"""The explorer beside a recording: it is there while the recording is, and nobody waits for it."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from test_own_loop import Robot, observation  # noqa: E402

from lerobot_attn import AttentionConfig, open_run, record_episodes  # noqa: E402
from lerobot_attn.recording import beside  # noqa: E402


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
        # The second inference and its first frame, long before the third would write them.
        assert (told[-1]["n_inferences"], told[-1]["n_frames"]) == (2, 11)
        assert waited_s < 5  # a tenth of a second, and what a busy machine adds
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)
    (found,) = open_run(tmp_path)
    assert found.is_complete
    assert found.dataset.frame_query.values.tolist() == [*range(10), 0]


def test_an_explorer_that_fails_costs_the_recording_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(beside, "_COMMAND", "raise SystemExit(3)")
    with beside.explorer_beside(tmp_path, wanted=True):
        time.sleep(1)
    assert "The explorer ended by itself, with exit status 3" in caplog.text


def test_nothing_is_started_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(beside.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("it was started"))
    with beside.explorer_beside(tmp_path, wanted=False):
        pass
