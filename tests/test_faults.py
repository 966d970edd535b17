"""What goes wrong for real: killed processes, a full disk. What was committed before is there, and whole."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import scripted
from test_recording import evaluate, make_policy, scripted_adapter  # noqa: F401

from lerobot_attn.errors import CaptureError
from lerobot_attn.inspection import describe_episode
from lerobot_attn.store.reader import open_episode, open_run

KILLS = 20
FRAMES = 60
# Imports once, then records in a forked process for each line that it reads: no thread runs before the fork.
RECORDER = """
import importlib, os, sys, time
sys.path.insert(0, {tests!r})
import scripted
from test_recording import evaluate, make_policy
from lerobot_attn import plugin
from lerobot_attn.policies import ADAPTERS
from lerobot_attn.store.writer import EpisodeWriter

importlib.import_module(plugin.EVAL_MODULE)
ADAPTERS["scripted"] = scripted.ADAPTER
commit = EpisodeWriter.commit

def told(self):
    commit(self)
    if self.path.parent.name == "group_1":
        os.write(1, f"committed {{self.n_inferences}}\\n".encode())

EpisodeWriter.commit = told
os.write(1, b"ready\\n")
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        envs = {{0: scripted.make_envs((5,)), 1: scripted.make_envs(({frames},))}}
        evaluate(__import__("pathlib").Path(line.strip()), envs, policy=make_policy(n_action_steps=1))
        os._exit(0)
    os.write(1, f"child {{child}}\\n".encode())
    _, status = os.waitpid(child, 0)
    os.write(1, f"ended {{status}}\\n".encode())
"""


class Recorder:
    """A process that records two episodes, of 5 and of 40 frames, into any folder; it can be killed."""

    def __init__(self):
        self.told = 0  # the last commit that was told of
        code = textwrap.dedent(RECORDER.format(tests=str(Path(__file__).parent), frames=FRAMES))
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "SLURM_JOB_ID": "0"},
        )
        self.lines_until("ready")

    def lines_until(self, word):
        """Read lines until one that begins with the word; return the lines."""
        lines = []
        while not lines or not lines[-1].startswith(word):
            line = self._process.stdout.readline()
            assert line, f"the recorder ended after {lines}"
            lines.append(line.strip())
            if lines[-1].startswith("committed"):
                self.told = int(lines[-1].split()[1])
        return lines

    def start(self, folder):
        """Begin to record; return the process's number."""
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        return int(self.lines_until("child")[-1].split()[1])

    def close(self):
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def recorder():
    recorder = Recorder()
    yield recorder
    recorder.close()


@pytest.fixture(scope="module")
def whole(recorder, tmp_path_factory):
    """The two episodes, recorded undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    recorder.start(folder)
    assert recorder.lines_until("ended")[-1] == "ended 0"
    return [episode.dataset.load() for episode in open_run(folder)]


def record_and_kill(recorder, folder, rng):
    """Kill a recording at a random instant of its second episode; return how many commits it had told of."""
    child = recorder.start(folder)
    recorder.lines_until(f"committed {rng.randint(1, FRAMES // 2)}")
    time.sleep(rng.uniform(0, 0.03))
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return recorder.lines_until("ended")


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_at_a_random_instant(recorder, whole, tmp_path, kill):
    first, second = whole
    rng = random.Random(kill)
    for attempt in range(3):  # on a busy machine the recording may be over before the kill
        folder = tmp_path / str(attempt)
        lines = record_and_kill(recorder, folder, rng)
        if lines[-1] == f"ended {int(signal.SIGKILL)}":
            break
    told = recorder.told
    earlier, cut = open_run(folder)
    assert earlier.is_complete
    assert earlier.dataset.load().suffix_attention.equals(first.suffix_attention), (
        "an earlier episode changed"
    )
    assert lines[-1] == f"ended {int(signal.SIGKILL)}", "it was never killed in time"
    # The kill may fall between a commit and its telling.
    assert cut.n_inferences in (told, told + 1)
    assert not cut.is_complete
    n, n_frames = cut.n_inferences, cut.n_frames
    found = cut.dataset.load()
    for name in ("suffix_attention", "suffix_attention_mean", "inference_frame", "key_kind", "token_id"):
        np.testing.assert_array_equal(found[name].values, second[name].values[:n], err_msg=name)
    for name in ("frame_inference", "frame_query", "reward", "success"):
        np.testing.assert_array_equal(found[name].values, second[name].values[:n_frames], err_msg=name)
    facts = describe_episode(cut)
    assert facts["complete"] is False
    assert facts["rows_sum_to_one"] is True


def test_a_killed_run_is_gone_on_with(recorder, whole, tmp_path):
    child = recorder.start(tmp_path)
    recorder.lines_until("committed 3")
    os.kill(child, signal.SIGKILL)
    recorder.lines_until("ended")
    kept = {file: file.stat().st_mtime_ns for file in open_run(tmp_path)[0].path.rglob("*")}
    envs = {0: scripted.make_envs((5,)), 1: scripted.make_envs((FRAMES,))}
    evaluate(tmp_path, envs, policy=make_policy(n_action_steps=1), existing="skip")
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    run = open_run(tmp_path)
    assert [episode.is_complete for episode in run] == [True, True]
    assert run[1].n_inferences == FRAMES


@pytest.fixture
def small_disk(tmp_path):
    """A folder `attention` on a file system of 2 MB."""
    folder = tmp_path / "attention"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield tmp_path
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_lets_the_evaluation_go_on(small_disk, caplog):
    envs = {0: scripted.make_envs((400,)), 1: scripted.make_envs((5,))}
    info, run = evaluate(small_disk, envs, policy=make_policy(n_action_steps=1), layers="all")
    assert len(info["per_task"]) == 2
    assert all(len(task["metrics"]["successes"]) == 1 for task in info["per_task"])
    attention = info["per_task"][0]["metrics"]["attention"]
    (entry,) = attention["not_saved"]
    assert "the disk is full (No space left on device): an inference needs up to" in entry["reason"]
    assert "are free; free some space, or save fewer layers" in entry["reason"]
    assert str(small_disk) in entry["reason"]
    assert run.failures
    episode = open_episode(small_disk / "attention" / "group_0" / "episode_00000.zarr")
    assert not episode.is_complete
    assert 0 < episode.n_inferences < 400
    data = episode.dataset.load()
    sums = data.suffix_attention.astype(np.float32).sum("key")
    assert float(abs(sums - 1).max()) <= episode.row_sum_tolerance()
    assert describe_episode(episode)["complete"] is False


def test_full_disk_can_stop_the_evaluation(small_disk):
    policy = make_policy(n_action_steps=1)
    infer = policy.predict_action_chunk

    def slowly(*args, **kwargs):
        time.sleep(0.005)
        return infer(*args, **kwargs)

    policy.predict_action_chunk = slowly
    with pytest.raises(CaptureError, match=r"the disk is full.*stopped because of on_error=abort"):
        evaluate(small_disk, {0: scripted.make_envs((2000,))}, policy=policy, layers="all", on_error="abort")
    assert policy.n_inferences < 2000
