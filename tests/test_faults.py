"""What goes wrong for real: killed processes, a full disk. What was committed before is there, and whole."""

import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import scripted
from forked import PATIENCE_S, Forked
from test_recording import evaluate, make_policy, scripted_adapter  # noqa: F401

from lerobot_attn.errors import CaptureError
from lerobot_attn.inspection import describe_episode
from lerobot_attn.recording import episode
from lerobot_attn.store.reader import open_episode, open_run
from lerobot_attn.store.writer import EpisodeWriter

KILLS = 20
FRAMES = 60
READS = 5


def record_two(folder, tell, n_reads=0):
    """Record two episodes, of 5 and of 60 frames; tell of each commit of the second.

    Some of its commits are of one inference, some of several. With `n_reads` each is of one, and after each
    of the first ones it waits until that has been read.
    """
    commit = EpisodeWriter.commit

    def told(self):
        is_second = self.path.parent.name == "group_1"
        if is_second:
            tell(f"committing {self.n_inferences}")
        commit(self)
        if is_second:
            tell(f"committed {self.n_inferences}")
            if 0 < self.n_inferences <= n_reads:
                wait_for_file(folder / f"read_{self.n_inferences}")

    EpisodeWriter.commit = told
    episode.COMMIT_WITHIN_S = 0 if n_reads else 0.01
    envs = {0: scripted.make_envs((5,)), 1: scripted.make_envs((FRAMES,))}
    evaluate(folder, envs, policy=make_policy(n_action_steps=1))


def wait_for_file(path):
    end = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The two episodes, recorded undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with Forked(record_two, folder) as process:
        assert process.wait() == 0, process.log
    return [episode.dataset.load() for episode in open_run(folder)]


def record_and_kill(folder, rng):
    """Kill a recording at a random instant of its second episode; return the process."""
    with Forked(record_two, folder) as process:
        process.wait_for_count("committed", rng.randint(1, FRAMES // 2))
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.wait()
    return process


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_at_a_random_instant(whole, tmp_path, kill):
    first, second = whole
    rng = random.Random(kill)
    for attempt in range(3):  # on a busy machine the recording may be over before the kill
        folder = tmp_path / str(attempt)
        process = record_and_kill(folder, rng)
        if process.wait() == -signal.SIGKILL:
            break
    told = {int(process.said["committed"]), int(process.said["committing"])}
    earlier, cut = open_run(folder)
    assert earlier.is_complete
    assert earlier.dataset.load().suffix_attention.equals(first.suffix_attention), (
        "an earlier episode changed"
    )
    assert process.wait() == -signal.SIGKILL, "it was never killed in time"
    # The kill may fall between a commit and its telling.
    assert cut.n_inferences in told
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


def test_a_killed_run_is_gone_on_with(tmp_path):
    with Forked(record_two, tmp_path) as process:
        process.wait_for_count("committed", 3)
    kept = {file: file.stat().st_mtime_ns for file in open_run(tmp_path)[0].path.rglob("*")}
    envs = {0: scripted.make_envs((5,)), 1: scripted.make_envs((FRAMES,))}
    evaluate(tmp_path, envs, policy=make_policy(n_action_steps=1), existing="skip")
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    run = open_run(tmp_path)
    assert [episode.is_complete for episode in run] == [True, True]
    assert run[1].n_inferences == FRAMES


def test_a_reader_sees_whole_inferences_while_the_store_grows(whole, tmp_path):
    """Opened again and again while it is recorded: some number of whole inferences, never an error."""
    store = tmp_path / "attention" / "group_1" / "episode_00000.zarr"
    seen = set()
    with Forked(record_two, tmp_path, n_reads=READS) as process:
        process.wait_for_count("committed", 1)
        episode = open_episode(store)
        while not episode.is_complete:
            data = episode.dataset.load()
            # The arrays are opened after the episode: they may have grown in between.
            assert data.sizes["inference"] >= episode.n_inferences
            assert data.sizes["frame"] >= episode.n_frames
            final = whole[1].isel(inference=slice(data.sizes["inference"]), frame=slice(data.sizes["frame"]))
            for name in data:
                np.testing.assert_array_equal(data[name], final[name], err_msg=name)
            seen.add(data.sizes["inference"])
            (tmp_path / f"read_{data.sizes['inference']}").touch()
            episode = open_episode(store)
        assert process.wait() == 0, process.log
    assert len(seen) >= READS, "it was never read while it grew"
    for name, values in episode.dataset.load().items():
        np.testing.assert_array_equal(values, whole[1][name], err_msg=name)


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
