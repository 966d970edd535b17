"""The recipe of a cluster, its own commands, on a stand-in for SLURM; one job is preempted on the way."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import slurm
from forked import PATIENCE_S
from test_store import write_episode
from typer.testing import CliRunner

from lerobot_attn.cli import app
from lerobot_attn.store.reader import open_run

ROOT = Path(__file__).parent.parent
SECTION = (
    (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split("## A cluster\n")[1].split("\n## ")[0]
)

# Leaves the stores that lerobot-eval would, as far as a run's table needs them. The first of all jobs waits
# amid its part until it is told to end, as a real one writes what is queued.
EVALUATION = """
import json, signal, sys, time
from pathlib import Path

here = Path(__file__).parents[2]
said = dict(word[2:].split("=", 1) for word in sys.argv[1:])
assert said["eval.attention.existing"] == "skip", said
came = []
signal.signal(signal.SIGUSR2, lambda number, frame: came.append(number))
(task,), group, seed = json.loads(said["env.task_ids"]), said["env.task"], int(said["seed"])
first, n_episodes = int(said["eval.first_episode"]), int(said["eval.n_episodes"])
document = json.loads((here / "document.json").read_text())
for number in range(first, first + n_episodes):
    store = Path(said["output_dir"], "attention", f"{group}_{task}", f"episode_{number:05d}.zarr")
    if store.exists():
        continue
    if number == 10 and seed == 1000 and not (here / "waits").exists():
        (here / "waits").touch()
        while not came:
            time.sleep(0.01)
        sys.exit(128 + came[0])
    own = {"task_group": group, "task_id": task, "episode_index": number, "seed": seed}
    own["success"] = number > 20
    store.mkdir(parents=True)
    text = json.dumps({**document, "attributes": {**document["attributes"], **own}})
    (store / "zarr.json").write_text(text)
"""


def commands(program):
    """The section's commands of a program, as words, in their order."""
    for block in re.findall(r"^```bash\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(program + " "):
                yield shlex.split(line, comments=True)[len(program.split()) :]


@pytest.fixture
def cluster(tmp_path):
    """A folder where the commands of the recipe run, and their environment."""
    package = tmp_path / "lerobot" / "scripts"
    package.mkdir(parents=True)
    for part in (package.parent, package):
        (part / "__init__.py").touch()
    (package / "lerobot_eval.py").write_text(EVALUATION)
    write_episode(tmp_path / "one.zarr", 2)
    (tmp_path / "one.zarr" / "zarr.json").rename(tmp_path / "document.json")
    bin_ = slurm.install(tmp_path / "bin")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SUBMITIT"))}
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    return {**kept, "PYTHONPATH": path, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}


def test_the_recipes_sweep_runs_and_a_preempted_job_goes_on(cluster, tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    sweep, one_job = commands("python scripts/eval.py")
    assert "env.task_ids=range(10)" in sweep
    assert "env=libero_object,libero_goal" in sweep
    smaller = {
        "env.task_ids=range(10)": "env.task_ids=0",
        "env=libero_object,libero_goal": "env=libero_object",
    }
    sweep = [smaller.get(word, word) for word in sweep]
    python = [sys.executable, str(ROOT / "scripts" / "eval.py")]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*python, *sweep], cwd=tmp_path, env=cluster, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(tmp_path / "waits", process, log)
        job = psutil.Process(int((tmp_path / "bin" / f"pid.{slurm.JOB_ID}_0").read_text()))
        for each in (job, *job.children(recursive=True)):  # as SLURM does
            each.send_signal(signal.SIGUSR2)
        job.send_signal(signal.SIGTERM)  # which is not the one that submitit waits for
        assert process.wait(PATIENCE_S) == 0, log.read_text()[-4000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (script,) = (tmp_path / "bin").glob("script.*")
    asked = script.read_text()
    for option in ("partition=gpu", "array=0-3%4", "signal=USR2@120", "gpus-per-node=1", "time=240"):
        assert f"#SBATCH --{option}\n" in asked
    said = (tmp_path / f"out/.submitit/{slurm.JOB_ID}_0/{slurm.JOB_ID}_0_0_log.out").read_text()
    assert "this job is preempted" in said
    assert f"Requeued job {slurm.JOB_ID}_0" in said
    assert said.count("lerobot-eval --policy.path=CHECKPOINT") == 2
    subprocess.run([*python, *one_job], cwd=tmp_path, env=cluster, check=True, capture_output=True)
    found = [
        tuple(e.attributes[n] for n in ("task_id", "seed", "episode_index"))
        for e in open_run(tmp_path / "out")
    ]
    parts = {(0, seed, number) for seed in (1000, 2000) for number in range(50)}
    assert sorted(found) == sorted(parts | {(3, 1000, number) for number in range(25, 50)})
    monkeypatch.chdir(tmp_path)
    outputs = {}
    for words in commands("lerobot-attn"):
        if words[0] == "view":  # serves until it is ended; tests/test_readme.py tries its options
            continue
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        outputs[words[0]] = done.output
    assert "125 of 2000 episodes done" in outputs["status"]
    assert "125 episodes of 2 tasks from 5 jobs" in outputs["gather"]
    info = json.loads((tmp_path / "out" / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 125
    assert info["overall"]["pc_success"] == pytest.approx(100 * (2 * 29 + 25) / 125)


def wait_for(file, process, log):
    end = time.monotonic() + PATIENCE_S
    while not file.exists():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.02)
