"""Jobs of a cluster: ended by signals, killed and started again, and each of their episodes is there once.

Recordings run in processes of their own, forked off one that has imported everything.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback

import psutil
import pytest
import scripted
from forked import Forked
from test_interruptions import check_committed, record
from test_recording import evaluate, make_policy, scripted_adapter  # noqa: F401

from lerobot_attn.errors import StoreError
from lerobot_attn.plugin.launch import launch_eval
from lerobot_attn.recording.preemption import SIGNALS, Preempted, Preemption
from lerobot_attn.store.reader import open_run
from lerobot_attn.store.video import count_frames


def record_until_preempted(folder, tell, **how):
    """As `record`; the status says the signal."""
    try:
        record(folder, tell, **how)
    except Preempted as preempted:
        sys.exit(128 + preempted.number)


def test_a_signal_ends_the_recording_between_two_frames(tmp_path):
    number = signal.SIGUSR1
    with Forked(record_until_preempted, tmp_path, mb_per_s=1) as process:
        process.wait_for_count("inferences", 10)
        os.kill(process.pid, number)
        os.kill(process.pid, signal.SIGTERM)  # and again: what is queued is written all the same
        # SLURM signals each process of a job, so the encoders of the videos too.
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(number)
        assert process.wait() == 128 + number
    (episode,) = open_run(tmp_path)
    check_committed(episode)
    made = int(process.said["inferences"])
    assert episode.n_inferences == episode.n_frames == made, "not whole frames"
    assert [count_frames(video) for video in episode.videos.values()] == [made]
    assert episode.attributes["interrupted_by"] == f"Preempted: {number.name}"
    assert episode.attributes["error"] is None


def test_handlers_are_as_they_were_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    handler = signal.getsignal(signal.SIGTERM)  # a test before this one may have left LeRobot's
    try:
        preemption = Preemption()
        with preemption.listening():
            os.kill(os.getpid(), signal.SIGUSR1)
            preemption.check()
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Preempted, match="SIGUSR2"):
                preemption.check()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGUSR1, before)


STAND_IN = """
import signal, sys, time
def drain(number, frame):
    time.sleep(0.3)
    print("WRITTEN", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, drain)
signal.signal(signal.SIGUSR1, drain)
print("RUNS", flush=True)
time.sleep(60)
"""


def launch(folder, tell, handled):
    """Start a stand-in for lerobot-eval as scripts/eval.py does."""
    package = folder / "lerobot" / "scripts"
    package.mkdir(parents=True)
    for part in (package.parent, package):
        (part / "__init__.py").touch()
    (package / "lerobot_eval.py").write_text(STAND_IN)
    os.environ["PYTHONPATH"] = str(folder)
    if handled:  # as submitit does, which queues the job again there
        signal.signal(signal.SIGUSR1, lambda *_: print("QUEUED AGAIN", flush=True))
    sys.exit(launch_eval(["--a=1"]))


@pytest.mark.parametrize("handled", [False, True])
def test_the_script_passes_signals_on_and_hears_them_when_all_is_written(tmp_path, handled):
    number = signal.SIGUSR1 if handled else signal.SIGTERM
    with Forked(launch, tmp_path, handled=handled) as process:
        process.wait_for_log("RUNS")
        os.kill(process.pid, number)
        assert process.wait() == (128 + number if handled else -number)
    said = process.log.split("RUNS\n")[1].splitlines()
    assert said == (["WRITTEN", "QUEUED AGAIN"] if handled else ["WRITTEN"])


# ---- many workers, which come to harm ----

N_TASKS, N_WORKERS = 20, 4
N_EPISODES = 10  # of a task: 200 in all


def work(folder, tell):
    """Fork workers for the tasks, harm them at random, and start them again until all tasks are done.

    It forks itself, for `Forked` is one process at a time; no thread runs here.
    """
    rng = random.Random(0)
    waiting, running, harm = list(range(N_TASKS)), {}, []
    while waiting or running:
        while waiting and len(running) < N_WORKERS:
            task = waiting.pop(0)
            breaks = CUT not in harm or rng.random() < 0.2
            running[_fork(folder, task, breaks)] = task
        # Another job is told the same episodes.
        if running and len(running) < N_WORKERS + 2 and rng.random() < (0.05 if TAKEN in harm else 0.5):
            task = rng.choice(list(running.values()))
            running[_fork(folder, task, False)] = task
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            task, code = running.pop(pid), os.waitstatus_to_exitcode(status)
            harm.append(code)
            tell(f"end {code}")  # not all of it may take as long as one waits for a word
            if code and task not in waiting and task not in running.values():
                waiting.append(task)
            continue
        if rng.random() < 0.08:
            number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
            os.kill(rng.choice(list(running)), number)
        time.sleep(0.02)
    tell(f"done {json.dumps(harm)}")


# Statuses: something was raised that should not be; the connection broke; another job has the folder.
UNEXPECTED, CUT, TAKEN = 1, 3, 4
RAISED = "Raised by a worker of task"


def _fork(folder, task, breaks):
    pid = os.fork()
    if pid:
        return pid
    status = UNEXPECTED
    try:
        status = _evaluate_task(folder / f"job_{task}", task, breaks)
    except BaseException:
        # In one piece: other workers write into the same log.
        os.write(2, f"{RAISED} {task}:\n{traceback.format_exc()}".encode())
    finally:
        os._exit(status)


def _evaluate_task(folder, task, breaks):
    policy = make_policy(n_action_steps=10)
    if breaks:
        infer, after = policy.predict_action_chunk, random.randrange(2)

        def breaking(*args, **kwargs):
            if policy.n_inferences > after:
                raise ConnectionResetError("the policy's server is gone")
            return infer(*args, **kwargs)

        policy.predict_action_chunk = breaking
    envs = {task: scripted.make_envs((4,) * 5)}  # five at a time
    how = {"layers": [-1], "cameras": False, "videos": 0, "existing": "skip"}
    try:
        evaluate(folder, envs, policy=policy, n_episodes=N_EPISODES, **how)
    except Preempted as preempted:
        return 128 + preempted.number
    except ConnectionResetError:
        return CUT
    except StoreError as error:
        if "another run" not in str(error) or "\n" in str(error):
            raise
        return TAKEN
    return 0


def test_a_run_that_is_harmed_at_random_ends_with_every_episode_once(tmp_path):
    with Forked(work, tmp_path) as process:
        ends = json.loads(process.wait_for("done"))
        assert process.wait() == 0, process.log[-4000:]
    assert UNEXPECTED not in ends, process.log[process.log.find(RAISED) :][:6000]
    assert {0, -signal.SIGKILL, CUT, TAKEN} <= set(ends), "too little harm was done"
    assert set(ends) & {128 + number for number in SIGNALS}, "nobody was preempted"
    found = {}
    for episode in open_run(tmp_path):
        assert (episode.is_complete, episode.n_frames, episode.n_inferences) == (True, 4, 1), episode.path
        key = episode.attributes["task_id"], episode.attributes["episode_index"]
        found.setdefault(key, []).append(episode.attributes["seed"])
    assert found == {(task, i): [1000 + i] for task in range(N_TASKS) for i in range(N_EPISODES)}
