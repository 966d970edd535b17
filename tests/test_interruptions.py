"""An evaluation that is cut short: Ctrl-C, an environment's process that dies, a policy that raises.

Recordings run in processes of their own, which are interrupted as a terminal does it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import gymnasium as gym
import numpy as np
import psutil
import pytest
import scripted
from forked import PATIENCE_S, Forked
from test_recording import evaluate, make_policy, scripted_adapter  # noqa: F401
from test_slow_disk import slow_down_disk

from lerobot_attn.errors import StoreError
from lerobot_attn.store.reader import open_episode, open_run
from lerobot_attn.store.video import count_frames

N_FRAMES = 1000  # more than any test waits for


def record(folder, tell, mb_per_s=None, n_frames=N_FRAMES, queue_mb=512):
    """Record one long episode, an inference a frame; tell of each."""
    logging.basicConfig(level=logging.INFO, force=True)
    if mb_per_s:
        slow_down_disk(mb_per_s)
    policy = make_policy(n_action_steps=1)
    infer = policy.predict_action_chunk

    def told(*args, **kwargs):
        actions = infer(*args, **kwargs)
        tell(f"inferences {policy.n_inferences}")
        return actions

    policy.predict_action_chunk = told
    envs = {0: scripted.make_envs((n_frames,))}
    evaluate(folder, envs, policy=policy, layers="all", videos=0, queue_mb=queue_mb)


def check_committed(episode, env=0, n_envs=1):
    """The store opens as incomplete, and what it holds is what the policy attended to."""
    assert not episode.is_complete
    assert episode.n_inferences > 0
    maps = episode.dataset.suffix_attention.load()
    for inference in range(episode.n_inferences):
        true = scripted.attention_of(inference, 1, 2, n_envs)[env].numpy().astype(np.float16)
        np.testing.assert_array_equal(maps[inference, 1, 2], true)


def test_ctrl_c_ends_the_evaluation_and_closes_the_store(tmp_path):
    with Forked(record, tmp_path) as process:
        process.wait_for_count("inferences", 10)
        process.interrupt()
        started = time.monotonic()
        assert process.wait() == -signal.SIGINT
        assert time.monotonic() - started < 10
    assert process.log.count("Traceback") == 1
    assert process.log.rstrip().endswith("KeyboardInterrupt")
    (episode,) = open_run(tmp_path)
    check_committed(episode)
    made = int(process.said["inferences"])
    assert made - 1 <= episode.n_inferences <= made  # the last one may not have been handed over yet
    assert episode.attributes["interrupted_by"] == "KeyboardInterrupt"
    assert episode.attributes["error"] is None
    assert "not saved: episode 0: incomplete: interrupted by KeyboardInterrupt" in process.log


def test_ctrl_c_on_a_slow_disk_writes_what_is_queued(tmp_path):
    with Forked(record, tmp_path, mb_per_s=0.5) as process:
        process.wait_for_count("inferences", 30)
        process.interrupt()
        assert process.wait() == -signal.SIGINT
    assert re.search(r"Writing \d+ inferences that are queued; Ctrl-C again drops them", process.log)
    assert len(re.findall("Writing .* inferences", process.log)) >= 2, "no progress was shown"
    assert process.log.count("Traceback") == 1
    (episode,) = open_run(tmp_path)
    check_committed(episode)
    made = int(process.said["inferences"])
    assert made - 1 <= episode.n_inferences <= made
    assert episode.attributes["error"] is None


def test_ctrl_c_while_the_policy_waits_keeps_every_frame(tmp_path):
    with Forked(record, tmp_path, mb_per_s=0.5, queue_mb=1) as process:
        process.wait_for_count("inferences", 10)  # the queue holds six
        process.interrupt()
        assert process.wait() == -signal.SIGINT
    (episode,) = open_run(tmp_path)
    check_committed(episode)
    assert episode.n_frames == episode.n_inferences
    assert all(count_frames(video) == episode.n_frames for video in episode.videos.values())


@pytest.mark.parametrize(
    ("queue_mb", "mb_per_s"), [(512, 0.2), (1, 0.05)], ids=["while writing out", "while the queue is full"]
)
def test_a_second_ctrl_c_drops_what_is_queued(tmp_path, queue_mb, mb_per_s):
    with Forked(record, tmp_path, mb_per_s=mb_per_s, queue_mb=queue_mb) as process:
        process.wait_for_count("inferences", 8 if queue_mb == 1 else 100)
        process.interrupt()
        process.wait_for_log("Ctrl-C again drops them")
        process.interrupt()
        started = time.monotonic()
        assert process.wait() == -signal.SIGINT
        elapsed_s = time.monotonic() - started
    assert process.log.count("Traceback") == 1
    assert process.log.rstrip().endswith("KeyboardInterrupt")
    assert "not saved: episode 0: incomplete" in process.log
    n_dropped = int(re.search(r"Dropped (\d+) inferences that were queued", process.log)[1])
    (episode,) = open_run(tmp_path)
    check_committed(episode)
    made = int(process.said["inferences"])
    # The last one may not have been handed over yet.
    assert episode.n_inferences + n_dropped in (made - 1, made)
    # About 2 s; a busy machine needs a while to end a process.
    writing_s = n_dropped * episode.stored_bytes() / episode.n_inferences / (mb_per_s * 1e6)
    assert elapsed_s < min(10, writing_s)


def record_until_a_worker_dies(folder, tell, capture):
    """Evaluate two environments in processes of their own, kill one of them; tell how that ends."""
    logging.basicConfig(level=logging.INFO, force=True)
    cloudpickle.register_pickle_by_value(scripted)  # the workers need not import PyTorch for it
    make_env = scripted.ScriptedEnv
    envs = gym.vector.AsyncVectorEnv(  # as LeRobot's EnvConfig.create_envs makes them
        [lambda: make_env(length=60, success=False, max_steps=1000)] * 2,
        context="forkserver",
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    policy = make_policy(n_action_steps=1)
    infer = policy.predict_action_chunk

    def kill(*args, **kwargs):
        if policy.n_inferences == 20:
            envs.processes[1].kill()
            envs.processes[1].join()
        return infer(*args, **kwargs)

    policy.predict_action_chunk = kill
    try:
        evaluate(folder, {0: envs}, policy=policy, layers="all", record=capture)
    except Exception as error:
        raised = [f"{type(error).__name__}: {error}", repr(error.__context__), repr(error.__cause__)]
    result = {
        "raised": raised,
        "zombies": [p.pid for p in psutil.Process().children() if p.status() == psutil.STATUS_ZOMBIE],
        "policy_is_as_before": vars(policy)["predict_action_chunk"] is kill and "attend" not in vars(policy),
        "env_is_as_before": "step" not in vars(envs),
    }
    tell(f"workers {json.dumps([process.pid for process in envs.processes])}")
    tell(f"ending {json.dumps(result)}")
    os._exit(0)  # CPython 3.12.1 may crash while it frees the traceback of a broken pipe


def test_a_dying_environment_process_ends_the_evaluation_as_it_does_without_us(tmp_path):
    results = []
    for name, capture in (("stock", False), ("recorded", True)):
        with Forked(record_until_a_worker_dies, tmp_path / name, capture=capture) as process:
            results.append(json.loads(process.wait_for("ending")))
            assert process.wait() == 0, process.log
        wait_until_gone(json.loads(process.said["workers"]))
    stock, recorded = results
    assert recorded == stock
    assert "BrokenPipeError" in stock["raised"][0]
    assert stock["zombies"] == []
    assert recorded["policy_is_as_before"]
    assert recorded["env_is_as_before"]
    episodes = list(open_run(tmp_path / "recorded"))
    assert len(episodes) == 2
    for env, episode in enumerate(episodes):
        check_committed(episode, env, n_envs=2)
        assert (episode.n_inferences, episode.n_frames) == (21, 20)
        assert episode.attributes["interrupted_by"] == stock["raised"][0]


def wait_until_gone(pids):
    end = time.monotonic() + PATIENCE_S
    while left := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < end, f"processes {left} are left behind"
        time.sleep(0.05)


@pytest.mark.parametrize("where", ["policy", "environment"])
def test_what_was_raised_is_what_is_shown(tmp_path, scripted_adapter, where):  # noqa: F811
    """The very exception, with nothing around it; earlier episodes are whole, and nothing is left behind."""
    error = ValueError("broke")
    envs = {0: scripted.make_envs((5,)), 1: scripted.make_envs((45,))}
    policy = make_policy()
    owner, name = (policy, "predict_action_chunk") if where == "policy" else (envs[1].envs[0], "step")
    original = getattr(owner, name)
    n_calls = 0

    def breaks(*args, **kwargs):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise error
        return original(*args, **kwargs)

    setattr(owner, name, breaks)
    before = dict(vars(policy)), dict(vars(envs[1]))
    with pytest.raises(ValueError, match="broke") as raised:
        evaluate(tmp_path, envs, policy=policy)
    assert raised.value is error
    assert error.__context__ is None
    assert error.__cause__ is None
    earlier, cut = open_run(tmp_path)
    assert earlier.is_complete
    assert (cut.is_complete, cut.attributes["interrupted_by"]) == (False, "ValueError: broke")
    # The third inference of all is the second of this episode.
    assert (cut.n_inferences, cut.n_frames) == ((1, 10) if where == "policy" else (1, 2))
    for owner, attributes in zip((policy, envs[1]), before, strict=True):
        found = dict(vars(owner))
        assert set(found) - {"closed"} == set(attributes) - {"closed"}
        assert all(
            found[name] is attributes[name] for name in ("predict_action_chunk", "step") if name in found
        )


@pytest.mark.libero
def test_ctrl_c_on_the_real_simulation(demo_checkpoint, tmp_path):
    log = tmp_path / "log"
    store = tmp_path / "out/attention/libero_object_0/episode_00000.zarr"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "lerobot-eval"),
                f"--policy.path={demo_checkpoint}",
                "--policy.device=cpu",
                "--policy.n_action_steps=1",
                "--env.type=libero",
                "--env.task=libero_object",
                "--env.task_ids=[0]",
                "--eval.n_episodes=1",
                "--eval.batch_size=1",
                f"--output_dir={tmp_path / 'out'}",
                "--eval.save_attention_maps=true",
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            while not store_holds(store, 2):
                assert process.poll() is None, log.read_text()[-4000:]
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(5 * PATIENCE_S) == -signal.SIGINT
        finally:
            process.kill()
            process.wait()
    said = log.read_text()  # which ends with EGL's complaints about its own end
    assert "\nKeyboardInterrupt\n" in said
    assert "During handling of the above exception" not in said
    episode = open_episode(store)
    assert not episode.is_complete
    assert episode.attributes["interrupted_by"] == "KeyboardInterrupt"
    maps = episode.dataset.suffix_attention.astype(np.float32)
    assert float(abs(maps.sum("key") - 1).max()) <= episode.row_sum_tolerance()


def store_holds(store, n_inferences):
    try:
        return open_episode(store).n_inferences >= n_inferences
    except StoreError:
        return False  # it is not there yet
