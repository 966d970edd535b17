"""Runs on Dask's distributed scheduler: the same tables, nothing lost, errors in one line. Real processes."""

import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import xarray as xr
from distributed import Client

from lerobot_attn import analysis, cli, open_run, report
from lerobot_attn.analysis import cluster, local_workers, modality_share
from lerobot_attn.analysis.cluster import dashboard_of, run_jobs, workers_of
from lerobot_attn.analysis.compare import compare
from lerobot_attn.analysis.runs import summarise_run
from lerobot_attn.errors import ConfigError, SelectionError, SetupError
from lerobot_attn.report import compare_groups
from lerobot_attn.store.pack import pack
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

PLAN = {"grid": (4, 4), "input_px": (32, 32), "n_layers": 2, "layers": (1,), "n_denoise_steps": 2}
PLAN |= {"videos": False, "task": "put the cup on the plate"}
N_EPISODES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run: episodes of several lengths, one of them packed."""
    folder = tmp_path_factory.mktemp("run") / "out"
    for index in range(N_EPISODES):
        plan = SyntheticPlan(**PLAN, episode_index=index, n_frames=4 + 2 * index, success=index % 2 == 0)
        path = write_planted_episode(folder, plan)
    assert [done.refused for done in pack(path)] == [None]
    return folder


@pytest.fixture(scope="module")
def workers():
    """A client of two worker processes."""
    with local_workers(2) as client:
        yield client


@pytest.fixture
def alone(workers):
    """The same client, where one death of a worker is enough for Dask to give a task up."""
    scheduler = workers.cluster.scheduler
    before, scheduler.allowed_failures = scheduler.allowed_failures, 0
    yield workers
    scheduler.allowed_failures = before


def run_cli(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["lerobot-attn", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def damage(store):
    for shard in (store / "suffix_attention_mean" / "c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(b"\x00" * shard.stat().st_size)


# The same


@pytest.mark.parametrize("by", ["inference", "episode"])
def test_a_cluster_gives_the_same_table(folder, workers, by, monkeypatch):
    monkeypatch.chdir(folder.parent)  # the workers stay where they were
    run = open_run(folder.name)
    _ = run.episodes[0].arrays  # what is open here is not sent
    expected = summarise_run(run, by=by)
    calls = []
    found = summarise_run(run, by=by, scheduler=workers, progress=lambda *of: calls.append(of))
    pd.testing.assert_frame_equal(found.table, expected.table)
    assert found.failed == expected.failed == ()
    assert list(found.table.episode.unique()) == [*range(N_EPISODES)]
    assert calls == [(done, N_EPISODES) for done in range(1, N_EPISODES + 1)]


def test_datasets_are_sent_without_their_maps(folder, workers):
    datasets = [episode.dataset for episode in open_run(folder)]
    found = summarise_run(datasets, "entropy", by="frame", scheduler=workers).table
    pd.testing.assert_frame_equal(found, summarise_run(datasets, "entropy", by="frame").table)


def test_a_cluster_compares_the_same(folder, workers):
    groups = analysis.split_by_success(open_run(folder))
    found = compare(*groups, "token_attention", n_phases=3, scheduler=workers)
    xr.testing.assert_identical(found, compare(*groups, "token_attention", n_phases=3))


def test_damaged_episodes_are_the_same_too(folder, workers, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "out")
    episodes = list(open_run(copied))
    shutil.rmtree(episodes[0].path)  # gone here, too: no matter of who sees what
    damage(episodes[1].path)
    found, expected = (summarise_run(episodes, scheduler=chosen) for chosen in (workers, None))
    assert found.failed == expected.failed
    assert [Path(failed.path).name for failed in found.failed] == [
        episode.path.name for episode in episodes[:2]
    ]
    pd.testing.assert_frame_equal(found.table, expected.table)


class Counting:
    """A job that says what it was told; its episode lies nowhere."""

    place = ""

    def __init__(self, number):
        self.number = number

    def __call__(self):
        return self.number


def test_only_a_few_jobs_are_under_way_at_a_time(workers):
    under_way = []
    jobs = [Counting(number) for number in range(20)]
    assert run_jobs(workers, jobs, lambda *_: under_way.append(len(workers.futures))) == [*range(20)]
    assert max(under_way) <= 8  # two for each worker, and as many that are just done


# Workers that end


def share_after_a_death(dataset, *, marker, always=(), **where):
    """End the worker: at the first call of all, and at every call with one of these episodes."""
    first = not Path(marker).exists()
    Path(marker).touch()
    if dataset.attrs["episode_index"] in always or (first and not always):
        os.kill(os.getpid(), signal.SIGKILL)
    return modality_share(dataset, **where)


def test_a_worker_that_is_killed_loses_no_episode(folder, workers, tmp_path):
    before = set(workers.run(os.getpid).values())
    marker = tmp_path / "killed"
    measure = functools.partial(share_after_a_death, marker=marker)
    found = summarise_run(open_run(folder), measure, scheduler=workers)
    assert marker.exists()
    workers.wait_for_workers(2)
    assert len(before - set(workers.run(os.getpid).values())) == 1
    assert found.failed == ()
    pd.testing.assert_frame_equal(found.table, summarise_run(open_run(folder), measure).table)


def test_an_episode_that_ends_every_worker_ends_no_other(folder, alone, tmp_path):
    measure = functools.partial(share_after_a_death, marker=tmp_path / "killed", always=[2])
    found = summarise_run(open_run(folder), measure, scheduler=alone)
    assert sorted(found.table.episode.unique()) == [0, 1, 3, 4]
    ((path, error),) = found.failed
    assert path.endswith("episode_00002.zarr")
    assert "its worker ended 1 times: killed, or out of memory" in error


SLOW = """
import os, sys, time
from lerobot_attn import open_run
from lerobot_attn.analysis import local_workers, summarise_run

def slow(dataset, **where):
    time.sleep(600)

if __name__ == "__main__":
    with local_workers(1) as client:
        print(*client.run(os.getpid).values(), flush=True)
        summarise_run(open_run(sys.argv[1]), slow, scheduler=client)
"""


def test_an_interrupt_ends_workers_of_our_own(folder, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    command = [sys.executable, script, folder]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        try:
            worker = int(running.stdout.readline())
            os.killpg(running.pid, signal.SIGINT)  # as a terminal does
            _, error = running.communicate(timeout=120)
        finally:
            running.kill()
    assert running.returncode != 0
    assert "KeyboardInterrupt" in error
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


# One line


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_no_scheduler_is_there(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cluster, "_PATIENCE_S", 1)
    address = f"tcp://127.0.0.1:{free_port()}"
    status, _, error = run_cli(
        *(monkeypatch, capsys, "summarise", folder, "-o", tmp_path / "a.csv", "--scheduler", address)
    )
    assert status == 1
    (line,) = error.splitlines()
    assert line.startswith(f"error: {address}: no Dask scheduler answered within 1 s (")
    assert "--workers N" in line
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize(
    ("choices", "kind", "message"),
    [
        ({"scheduler": "tcp://a:1", "workers": 2}, ConfigError, "'tcp://a:1' and 2 workers, expected one of"),
        ({"scheduler": "threads", "workers": 2}, ConfigError, "'threads' and 2 workers, expected one of"),
        ({"workers": 0}, ConfigError, "workers=0: expected a number of processes, 1 or more"),
        ({"workers": "2"}, ConfigError, "workers='2': expected a number of processes"),
        ({"scheduler": "10.0.0.1:8786"}, SelectionError, "expected 'threads', .*'tcp://HOST:PORT'"),
        ({"scheduler": "nowhere://1"}, SetupError, "nowhere://1: no Dask scheduler answered"),
        ({"scheduler": 3}, SelectionError, "scheduler 3: expected"),
    ],
)
def test_what_cannot_compute_is_refused(folder, choices, kind, message):
    with pytest.raises(kind, match=message):
        summarise_run(open_run(folder), **choices)


@pytest.mark.parametrize("choices", [{"workers": 2}, {"scheduler": "tcp://127.0.0.1:1"}])
def test_without_distributed_the_extra_is_named(folder, choices, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SetupError, match=r"pip install 'lerobot_policy_attn\[cluster\]'"):
        summarise_run(open_run(folder), **choices)


def test_workers_that_do_not_see_a_path(folder, workers, monkeypatch):
    monkeypatch.chdir(folder)
    here = Path("/proc/self/cwd")  # which means this folder here, and another one to the workers
    if not (here / "attention").exists():
        pytest.skip("no /proc")
    one_of_them = rf"on {socket.gethostname()} sees nothing at {here}/attention/.*zarr, "
    with pytest.raises(SetupError, match=one_of_them):
        summarise_run(list(open_run(here)), scheduler=workers)


def test_workers_of_another_version(folder, workers, monkeypatch):
    monkeypatch.setattr(cluster, "__version__", "99.0")
    with pytest.raises(SetupError, match=r"has lerobot_policy_attn \d.*, expected 99\.0 as here"):
        summarise_run(open_run(folder), scheduler=workers)


def test_a_measure_that_workers_cannot_import(folder, workers, monkeypatch, tmp_path):
    (tmp_path / "only_here.py").write_text("def measure(dataset, **where):\n    return None\n")
    monkeypatch.syspath_prepend(tmp_path)
    measure = importlib.import_module("only_here").measure
    with pytest.raises(SetupError, match=r"cannot import what it is to do .*'only_here'.*importable there"):
        summarise_run(open_run(folder), measure, scheduler=workers)


def test_clients_of_others_are_left_as_they_were(workers):
    with workers_of(workers, None) as chosen:
        assert chosen is workers
    assert workers.status == "running"
    with pytest.raises(ValueError, match="No clients"):
        Client.current()  # what else a person computes with Dask goes where it did


# The commands


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_command_writes_one_table(folder, workers, suffix, monkeypatch, capsys, tmp_path):
    file = tmp_path / "new" / f"table{suffix}"
    chosen = ("--measures", "modality_share,entropy", "--layers", "all")
    at = ("--scheduler", workers.scheduler.address) if suffix == ".csv" else ()
    status, out, error = run_cli(monkeypatch, capsys, "summarise", folder, "-o", file, *chosen, *at)
    assert (status, error.strip()) == (0, "")
    expected = summarise_run(open_run(folder), ["modality_share", "entropy"], by="episode", layer="all").table
    assert out == f"Wrote {file}: {len(expected)} rows of {N_EPISODES} episodes\n"
    found = pd.read_csv(file) if suffix == ".csv" else pd.read_parquet(file)
    assert [*found.columns] == [*expected.columns]
    pd.testing.assert_series_equal(found.value, expected.value)
    assert found.path.tolist() == expected.path.tolist()
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_command_names_what_is_left_out(folder, monkeypatch, capsys, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "out")
    stores = open_run(copied).stores
    (stores[0] / "zarr.json").write_text("{")
    damage(stores[1])
    status, out, error = run_cli(monkeypatch, capsys, "summarise", copied, "-o", tmp_path / "a.csv")
    assert status == 1
    assert f"rows of {N_EPISODES - 2} episodes" in out
    lines = error.split()  # a progress bar leaves an empty line
    assert lines.count("left") == 2
    assert all(f"left out: {store}" in error for store in stores[:2])


def test_a_report_has_the_same_numbers(folder, workers):
    a, b = analysis.split_by_success(open_run(folder))
    found, expected = (compare_groups(a, b, None, None, chosen) for chosen in (workers, None))
    pd.testing.assert_frame_equal(found.overall, expected.overall)
    xr.testing.assert_identical(found.shares, expected.shares)


def test_command_compares_with_a_scheduler(folder, workers, monkeypatch, capsys, tmp_path):
    addresses = []

    def write_report(a, b, output, settings, progress, scheduler):
        addresses.append(scheduler.scheduler.address)
        return []

    monkeypatch.setattr(report, "write_report", write_report)
    words = ("compare", folder, "--by", "success", "-o", tmp_path, "--scheduler", workers.scheduler.address)
    assert run_cli(monkeypatch, capsys, *words)[0] == 0
    assert addresses == [workers.scheduler.address]


@pytest.mark.parametrize("command", ["summarise", "compare"])
def test_commands_refuse_a_scheduler_and_workers(folder, command, monkeypatch, capsys, tmp_path):
    words = (command, folder, *(("--by", "success") if command == "compare" else ()))
    both = ("--scheduler", "tcp://127.0.0.1:1", "--workers", "2")
    monkeypatch.chdir(tmp_path)
    status, _, error = run_cli(monkeypatch, capsys, *words, *both)
    assert status == 1
    assert error.startswith("error: got scheduler 'tcp://127.0.0.1:1' and 2 workers, expected one of them")


def test_command_refuses_another_kind_of_file_first(folder, monkeypatch, capsys, tmp_path):
    status, _, error = run_cli(monkeypatch, capsys, "summarise", folder, "-o", tmp_path / "a.xlsx")
    assert status == 1
    assert "a.xlsx: expected a name that ends in .csv or .parquet" in error


def test_a_dashboard_is_named_where_there_is_one(workers):
    there = importlib.util.find_spec("bokeh") is not None
    assert dashboard_of(workers) == (workers.dashboard_link if there else None)
