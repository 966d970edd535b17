"""A recording whose episodes go to a bucket: in the background, and never at the recording's cost."""

import json
import logging
import os
import shlex
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scripted
from forked import Forked
from recorded import write_dataset
from test_recording import evaluate, make_policy, scripted_adapter  # noqa: F401
from test_robots import rollout  # noqa: F401
from test_upload import KEYS, s3, written  # noqa: F401

from lerobot_attn import record_dataset
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import ConfigError, SetupError, StoreError
from lerobot_attn.interventions.experiment import ExperimentPlan
from lerobot_attn.plugin.experiment import arguments_of
from lerobot_attn.recording import uploading
from lerobot_attn.recording.loop import record_episodes
from lerobot_attn.recording.preemption import Preempted
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.receipts import receipt_of
from lerobot_attn.store.runs import open_run
from lerobot_attn.store.upload import upload

URL = "s3://bucket/eval"
TASK = "group_0"
LENGTHS = (5, 9, 7)


def envs():
    return {0: scripted.make_envs(LENGTHS)}


def stores_of(folder):
    return [folder / "attention" / TASK / f"episode_{number:05d}.zarr" for number in range(len(LENGTHS))]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting between tries, and little at the end."""
    monkeypatch.setattr(uploading, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(uploading, "_LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(uploading, "_LOOK_S", 0.01)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def warnings_of(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name == uploading.__name__
    ]


def check_there(folder):
    """The bucket holds the whole run, as it was recorded."""
    there = open_run(URL)
    assert [episode.n_frames for episode in there] == [*LENGTHS]
    for env, episode in enumerate(there):
        assert episode.is_complete
        true = scripted.attention_of(0, 1, 2, len(LENGTHS))[env].numpy().astype(np.float16)
        np.testing.assert_array_equal(episode.arrays.suffix_attention.sel(layer=2)[0, 1].values, true)
        assert episode.videos


# It goes


def test_each_episode_goes_as_it_completes(run, s3, caplog):  # noqa: F811
    caplog.set_level(logging.INFO)
    info, _ = evaluate(run, envs(), upload=URL)
    check_there(run)
    assert [open_episode(store).is_complete for store in stores_of(run)] == [True] * 3  # kept
    assert info["overall"]["attention_paths"] == [str(store) for store in stores_of(run)]
    assert f"Uploaded 3 episodes to {URL}" in caplog.text
    assert not warnings_of(caplog)
    sent = [*dict.fromkeys(Path(name).name for name in written(s3))]
    assert sent == [
        f"episode_0000{n}.{what}" for n in range(3) for what in ("image.mp4", "zarr.zip")
    ]  # the store last
    before = len(written(s3))
    evaluate(run, envs(), upload=URL, existing="skip")
    assert len(written(s3)) == before


def test_a_network_that_fails_and_comes_back(run, s3, caplog):  # noqa: F811
    s3.n_failing = 4  # a request is tried three times
    evaluate(run, envs(), upload=URL)
    check_there(run)
    (line,) = warnings_of(caplog)
    assert line.startswith("Nothing can be uploaded now: ")
    assert "The recording goes on" in line


def test_a_loop_of_ones_own_uploads_too(run, s3):  # noqa: F811
    policy = make_policy()
    with record_episodes(
        policy, run, AttentionConfig(layers=[2], upload=URL, keep_local=False), fps=10
    ) as loop:
        for _ in range(2):
            with loop.episode("do as told") as episode:
                policy.reset()
                for _ in range(4):
                    batch = {scripted.CAMERA: scripted.torch.rand(1, 3, 8, 8)}
                    action = policy.select_action(batch)
                    episode.step({"image": np.zeros((8, 8, 3), np.uint8)}, action)
    assert [episode.n_frames for episode in open_run(URL)] == [4, 4]
    assert [receipt_of(run / f"attention/loop_0/episode_0000{n}.zarr").removed for n in (0, 1)] == [
        True,
        True,
    ]
    assert [result.reason for result in loop.results] == [None, None]


def test_a_replay_uploads_too(run, s3, tmp_path):  # noqa: F811
    root = write_dataset(
        tmp_path / "data", (3, 4), cameras=(scripted.CAMERA,), tasks=("do as told",), dims=(3, 4), size=8
    )
    record_dataset(make_policy(), root, run, AttentionConfig(layers=[-1], upload=URL))
    assert [episode.n_frames for episode in open_run(URL)] == [3, 4]


def test_a_robot_uploads_too(rollout, s3):  # noqa: F811
    rollout("--duration=0.3", f"--attention.upload={URL}", "--attention.keep_local=false")
    (episode,) = open_run(URL)
    assert episode.is_complete
    assert episode.n_frames > 0
    with pytest.raises(StoreError, match="was sent to a bucket"):
        open_run(rollout.stores)


# It does not go


@pytest.mark.parametrize("fault", ["dead", "bucket", "keys", "another"])
def test_what_cannot_go_stays_and_is_said(run, s3, monkeypatch, caplog, fault):  # noqa: F811
    live = os.environ["AWS_ENDPOINT_URL"]
    if fault == "dead":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    if fault == "bucket":
        shutil.move(s3.folder / "bucket", s3.folder / "elsewhere")
    if fault == "keys":
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    if fault == "another":
        (s3.folder / "bucket/eval" / TASK).mkdir(parents=True)
        for number in range(3):
            (s3.folder / "bucket/eval" / TASK / f"episode_0000{number}.zarr.zip").write_bytes(b"somebody's")
    info, recorder = evaluate(run, envs(), upload=URL, keep_local=False)
    assert not recorder.failures
    assert info["per_task"][0]["metrics"]["attention"]["n_saved"] == 3
    assert [open_episode(store).is_complete for store in stores_of(run)] == [True] * 3
    lines = warnings_of(caplog)
    assert len(lines) == (4 if fault == "another" else 2), "one line at the time, one at the end"
    assert all("\n" not in line for line in lines)
    assert lines[-1].startswith(
        f"3 of 3 episodes were not uploaded to {URL} and stay in {run / 'attention'}: "
    )
    wanted = {
        "dead": "127.0.0.1:9",
        "bucket": "NoSuchBucket",
        "keys": "AWS_ACCESS_KEY_ID",
        "another": "another recording",
    }
    assert wanted[fault] in lines[0]
    assert wanted[fault] in lines[-1]
    command = shlex.split(lines[-1].rpartition("to send them: ")[2])
    assert command == ["lerobot-attn", "upload", str(run / "attention"), URL]
    # And that command does it.
    monkeypatch.setenv("AWS_ENDPOINT_URL", live)
    monkeypatch.delenv("AWS_SKIP_SIGNATURE", raising=False)
    (s3.folder / "bucket").mkdir(exist_ok=True)
    done = [*upload(run / "attention", URL, overwrite=True)]
    assert [one.sent for one in done] == [True] * 3
    check_there(run)


def test_a_network_that_hangs_delays_nothing(run, s3, monkeypatch, caplog):  # noqa: F811
    s3.gate.clear()  # what is written is never answered
    with monkeypatch.context() as patched:
        patched.setattr(uploading, "PATIENCE_S", 0.05)
        evaluate(run, envs(), upload=URL)
    assert "not uploaded" in warnings_of(caplog)[-1]
    assert [open_episode(store).is_complete for store in stores_of(run)] == [True] * 3
    assert not list(s3.folder.rglob("*.zip"))
    s3.gate.set()
    evaluate(run, envs(), upload=URL, existing="skip")
    check_there(run)


def record(folder, tell, **settings):
    """Record as `evaluate` does; tell when the first upload has begun."""
    logging.basicConfig(level=logging.INFO, force=True)
    uploading.HURRIED_S = uploading.PATIENCE_S if settings.pop("patient", False) else 0.5
    try:
        evaluate(folder, envs(), upload=URL, **settings)
    except Preempted as preempted:
        sys.exit(128 + preempted.number)


def wait_for_put(server, process):
    """Wait until an upload hangs: `gate` is closed, so nothing more comes."""
    process.wait_for_log("Uploading 3 episodes")


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_ended_while_it_uploads_it_goes_on(run, s3, how):  # noqa: F811
    s3.gate.clear()
    with Forked(record, run) as process:
        wait_for_put(s3, process)
        number = getattr(signal, how)
        process.interrupt() if how == "SIGINT" else os.kill(process.pid, number)
        status = process.wait()
    # The evaluation itself was over.
    assert status == (-number if how == "SIGKILL" else 0)
    if how != "SIGKILL":
        assert "3 of 3 episodes were not uploaded" in process.log
        assert "Traceback" not in process.log
    assert not list(s3.folder.rglob("*.zip"))
    s3.gate.set()
    evaluate(run, envs(), upload=URL, existing="skip")
    check_there(run)
    zips = [name for name in written(s3) if name.endswith(".zip")]
    assert len(zips) == len({*zips}) == 3


# Nothing is kept here


def test_a_run_goes_on_whose_local_copies_went(run, s3, monkeypatch):  # noqa: F811
    evaluate(run, envs(), upload=URL, keep_local=False)
    check_there(run)
    left = sorted(file.name for file in (run / "attention" / TASK).glob("[!.]*"))
    assert left == [f"episode_0000{n}.uploaded.json" for n in range(3)]
    with pytest.raises(StoreError, match="already holds episodes"):
        evaluate(run, envs(), upload=URL)
    before = len(written(s3))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody is asked
    info, recorder = evaluate(run, envs(), upload=URL, existing="skip")
    assert not recorder.failures
    attention = info["per_task"][0]["metrics"]["attention"]
    assert (attention["n_saved"], attention["n_kept"]) == (3, 3)
    assert attention["stored_bytes"] == sum(receipt_of(store).n_bytes for store in stores_of(run))
    assert len(written(s3)) == before
    assert not list(run.rglob("*.zarr"))


def test_receipts_are_held_against_the_run_as_stores_are(run, s3):  # noqa: F811
    evaluate(run, envs(), upload=URL, keep_local=False)
    with pytest.raises(StoreError, match=r"capture layers \[-2, -1\], this run's is \[0\]"):
        evaluate(run, envs(), upload=URL, existing="skip", layers=[0])
    path = stores_of(run)[1].with_name("episode_00001.uploaded.json")
    said = json.loads(path.read_text())
    said["attributes"]["seed"] = 7
    path.write_text(json.dumps(said))
    with pytest.raises(StoreError, match="seed 7, this run's is 1001"):
        evaluate(run, envs(), upload=URL, existing="skip")
    path.unlink()  # what nobody knows of is recorded again
    info, _ = evaluate(run, envs(), upload=URL, existing="skip")
    assert info["per_task"][0]["metrics"]["attention"]["n_kept"] == 2
    evaluate(run, envs(), existing="overwrite")
    assert len(open_run(run)) == 3
    assert not list(run.rglob("*.uploaded.json"))


def test_overwrite_replaces_what_is_there(run, s3):  # noqa: F811
    evaluate(run, envs(), upload=URL, layers=[0])
    evaluate(run, envs(), upload=URL, existing="overwrite")
    check_there(run)


# Settings


def test_settings_are_checked_before_anything_runs(run, monkeypatch):
    with pytest.raises(ConfigError, match="upload: got 'elsewhere', expected a bucket's folder"):
        AttentionConfig(upload="elsewhere")
    with pytest.raises(ConfigError, match="push"):
        AttentionConfig(upload="hf://datasets/user/name")
    with pytest.raises(ConfigError, match="keep_local: got false without upload"):
        AttentionConfig(keep_local=False)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(SetupError, match=r"lerobot_policy_attn\[remote\]"):
        evaluate(run, envs(), upload=URL)
    assert not list(run.rglob("*.zarr"))


def test_conditions_of_an_experiment_have_folders_of_their_own(tmp_path):
    plan = ExperimentPlan(
        policy={"path": "x"},
        env={"type": "libero"},
        n_episodes=1,
        capture={"upload": f"{URL}/"},
        conditions=[{"name": "baseline"}],
    )
    (one,) = plan.planned
    assert f"--eval.attention.upload={URL}/baseline/attention" in arguments_of(plan, one, tmp_path)
    plan = replace(plan, capture={"upload": URL, "keep_local": False})
    with pytest.raises(ConfigError, match="conditions are compared here"):
        arguments_of(plan, one, tmp_path)
