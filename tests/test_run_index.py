"""Runs of many episodes: an index that is believed only as far as its stores are what they were."""

import json
import math
import os
import shutil
import threading
import time
from dataclasses import replace

import pandas as pd
import pyarrow.parquet as pq
import pytest
import scripted
from test_inspection import run_cli
from test_recording import evaluate, scripted_adapter  # noqa: F401
from test_store import write_episode

from lerobot_attn.cli import runs as commands
from lerobot_attn.errors import ConfigError, SelectionError
from lerobot_attn.policies import ADAPTERS
from lerobot_attn.report.eval_info import gather
from lerobot_attn.report.run_status import render_status, status_of
from lerobot_attn.store import index, runs
from lerobot_attn.store.index import INDEX, PARTS, gather_parts, note_episode, read_index
from lerobot_attn.store.pack import pack
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.runs import open_run


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """What a complete episode's store says of itself."""
    path = tmp_path_factory.mktemp("one") / "episode_00000.zarr"
    write_episode(path, 2)
    return json.loads((path / "zarr.json").read_text())


@pytest.fixture
def put(document):
    """Write the metadata of an episode, which is all that a row is made of."""

    def write(store, **attributes):
        store.mkdir(parents=True, exist_ok=True)
        own = {"task_group": "kitchen", "task_id": 0, "episode_index": 0, "success": True, **attributes}
        said = {**document, "attributes": {**document["attributes"], **own}}
        (store / "zarr.json").write_text(json.dumps(said))
        return store

    return write


@pytest.fixture
def many(tmp_path, put):
    """A run of 48 episodes of 12 tasks; every third one failed."""
    for number in range(48):
        task, episode = divmod(number, 4)
        store = tmp_path / "run" / "attention" / f"kitchen_{task}" / f"episode_{episode:05d}.zarr"
        text = f"put the {'cup' if task % 2 else 'Plate'} away"
        put(store, task_id=task, episode_index=episode, task=text, success=number % 3 > 0)
    return tmp_path / "run"


@pytest.fixture
def opened(monkeypatch):
    """The stores that were opened, in their order."""
    found = []

    def counted(path):
        found.append(path)
        return open_episode(path)

    monkeypatch.setattr(runs, "open_episode", counted)
    return found


@pytest.fixture
def always(monkeypatch):
    """Use an index for the smallest run, too."""
    monkeypatch.setattr(runs, "WORTH", 1)
    monkeypatch.setattr(index, "WORTH", 1)


# What is believed


def test_a_run_that_was_looked_at_opens_no_store(many, opened):
    first = open_run(many).table
    assert len(opened) == 48
    opened.clear()
    run = open_run(many)
    pd.testing.assert_frame_equal(run.table, first)
    assert not run.damaged
    assert len(run.where(task="kitchen_3", success=False)) == 2
    assert opened == []
    own = pd.read_parquet(many / "attention" / INDEX)
    assert own["store"].tolist() == [str(store.relative_to(many / "attention")) for store in run.stores]
    pd.testing.assert_frame_equal(own[first.columns[:-1]], first[first.columns[:-1]], check_dtype=False)


def test_a_store_counts_and_not_what_the_index_says_of_it(many, put, opened):
    before = open_run(many).table
    folder = many / "attention"
    changed = put(folder / "kitchen_0" / "episode_00001.zarr", episode_index=1, success=False)
    unfinished = put(folder / "kitchen_0" / "episode_00002.zarr", episode_index=2, complete=False)
    shutil.rmtree(folder / "kitchen_1" / "episode_00000.zarr")
    broken = folder / "kitchen_1" / "episode_00001.zarr"
    (broken / "zarr.json").write_text("{")
    new = put(folder / "kitchen_1" / "episode_00009.zarr", task_id=1, episode_index=9)
    opened.clear()
    run = open_run(many)
    after = run.table.set_index("path")
    assert opened == [changed, unfinished, broken, new]
    assert len(after) == len(before) - 1
    assert not after.loc[str(changed), "success"]
    assert not after.loc[str(unfinished), "complete"]
    assert [path for path, _ in run.damaged] == [broken]
    opened.clear()
    again = open_run(many)
    pd.testing.assert_frame_equal(again.table.set_index("path"), after)
    # What is not complete may change with every commit, and what is broken may be mended.
    assert opened == [unfinished, broken]
    assert [path for path, _ in again.damaged] == [broken]


def test_a_store_of_the_same_size_is_told_by_its_time(many, put, opened):
    store = many / "attention" / "kitchen_0" / "episode_00001.zarr"
    before = open_run(many).table
    size = (store / "zarr.json").stat().st_size
    put(store, task_id=0, episode_index=1, task="put the Slate away", success=True)
    assert (store / "zarr.json").stat().st_size == size
    opened.clear()
    assert open_run(many).table["task"].tolist() != before["task"].tolist()
    assert opened == [store]


def test_a_copy_with_its_times_keeps_its_index(many, tmp_path, opened):
    open_run(many).rows()
    opened.clear()
    copy = shutil.copytree(many, tmp_path / "copy")  # with times
    assert len(open_run(copy).table) == 48
    assert opened == []
    for metadata in copy.rglob("zarr.json"):
        os.utime(metadata, (1, 1))
    assert len(open_run(copy).table) == 48
    assert len(opened) == 48


@pytest.mark.parametrize(
    "harm", ["garbage", "truncated", "other columns", "other meaning", "a folder", "too large"]
)
def test_a_damaged_index_is_passed_over(many, harm, monkeypatch):
    first = open_run(many).table
    file = many / "attention" / INDEX
    whole = file.read_bytes()
    if harm == "garbage":
        file.write_bytes(b"\0" * 1000)
    elif harm == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    elif harm == "other columns":
        pd.read_parquet(file).assign(bytes=0).drop(columns="seed").to_parquet(file)
    elif harm == "other meaning":
        table = pq.read_table(file)
        column = table.schema.get_field_index("frames")
        wrong = table.set_column(column, table.schema.field(column), [[99] * 48])
        pq.write_table(wrong.replace_schema_metadata({index._FORMAT_NAME: "1"}), file)
    elif harm == "too large":
        monkeypatch.setattr(index, "_MAX_BYTES", 100)
    else:
        file.unlink()
        file.mkdir()
    pd.testing.assert_frame_equal(open_run(many).table, first)
    assert file.is_dir() or len(pd.read_parquet(file)) == 48  # written anew where it can be
    assert not [path for path in file.parent.iterdir() if path.name.endswith(".new")]


def test_a_few_episodes_get_no_index(tmp_path, put):
    put(tmp_path / "attention" / "kitchen_0" / "episode_00000.zarr")
    assert len(open_run(tmp_path).table) == 1
    assert [path.name for path in (tmp_path / "attention").iterdir()] == ["kitchen_0"]


def test_a_tasks_folder_uses_the_index_of_its_run_and_makes_none(many, always, opened):
    task = many / "attention" / "kitchen_3"
    assert len(open_run(task).table) == 4
    assert not list(task.glob("*.parquet"))
    open_run(many).rows()
    opened.clear()
    assert len(open_run(task).table) == 4
    assert opened == []
    assert len(pd.read_parquet(many / "attention" / INDEX)) == 48


def test_what_an_index_cannot_hold_is_read_from_the_store(many, put, opened):
    odd = put(many / "attention" / "kitchen_0" / "episode_00000.zarr", task_id="three", task="\ud800")
    first = open_run(many).table
    opened.clear()
    second = open_run(many).table
    assert opened == [odd]
    assert second["task_id"].tolist() == first["task_id"].tolist() == ["three", *first["task_id"][1:]]


def test_a_packed_episode_has_a_row(tmp_path, always, opened):
    store = tmp_path / "attention" / "kitchen_0" / "episode_00000.zarr"
    write_episode(store, 2, task_group="kitchen", task_id=0)
    kept = shutil.copytree(store, tmp_path / "kept")
    open_run(tmp_path).rows()
    (done,) = pack(tmp_path)
    shutil.copytree(kept, store)  # as if packing had been interrupted: the index knows this form
    run = open_run(tmp_path)
    assert run.rows() == []
    assert "lies beside it" in run.damaged[0][1]
    shutil.rmtree(store)
    opened.clear()
    first = open_run(tmp_path).table
    assert first["path"].tolist() == [str(done.path)]
    assert opened == [done.path]
    opened.clear()
    pd.testing.assert_frame_equal(open_run(tmp_path).table, first)
    assert opened == []


# What recordings write


def test_jobs_leave_rows_of_which_one_index_is_made(tmp_path, put, always, opened):
    stores = []
    for job in ("seed=1", "seed=2"):
        for number in range(3):
            store = tmp_path / job / "attention" / "kitchen_0" / f"episode_{number:05d}.zarr"
            stores.append(put(store, episode_index=number, seed=number))
    writers = [threading.Thread(target=note_episode, args=(store,)) for store in stores]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(list((tmp_path / "seed=1" / "attention" / PARTS).iterdir())) == 3
    gather_parts(tmp_path / "seed=1" / "attention")
    # One job has ended, the other was killed.
    assert [path.name for path in sorted((tmp_path / "seed=1" / "attention").iterdir())] == [
        INDEX,
        "kitchen_0",
    ]
    assert open_run(tmp_path).table["path"].tolist() == list(map(str, stores))
    assert opened == []
    assert len(pd.read_parquet(tmp_path / INDEX)) == 6
    put(stores[4], episode_index=1, success=False)
    assert not open_run(tmp_path).table["success"][4]
    assert opened == [stores[4]]


def test_parts_of_stores_that_are_gone_are_dropped(tmp_path, put):
    stores = [put(tmp_path / "kitchen_0" / f"episode_{number:05d}.zarr") for number in range(3)]
    for store in stores:
        note_episode(store)
    (tmp_path / PARTS / "odd.json").write_text('{"store": "../x"}')
    shutil.rmtree(stores[0])
    put(stores[1], success=False)
    gather_parts(tmp_path)
    assert list(read_index(tmp_path)) == ["kitchen_0/episode_00002.zarr"]


def test_a_part_whose_values_mean_something_else_is_passed_over(tmp_path, put):
    note_episode(put(tmp_path / "kitchen_0" / "episode_00000.zarr"))
    assert len(read_index(tmp_path)) == 1
    (part,) = (tmp_path / PARTS).iterdir()
    part.write_text(json.dumps({**json.loads(part.read_text()), index._FORMAT_NAME: 1}))
    assert read_index(tmp_path) == {}


def test_an_incomplete_episode_leaves_no_row(tmp_path, put):
    note_episode(put(tmp_path / "kitchen_0" / "episode_00000.zarr", complete=False))
    note_episode(tmp_path / "kitchen_0" / "episode_00001.zarr")  # not even there
    assert read_index(tmp_path) == {}


def test_an_evaluation_writes_its_index(tmp_path, monkeypatch, always, opened):
    envs = {3: scripted.make_envs((5, 9), [True, False])}
    evaluate(tmp_path, envs, n_episodes=2)
    folder = tmp_path / "attention"
    assert sorted(path.name for path in folder.iterdir() if path.name[:13] != ".lerobot-attn") == [
        INDEX,
        "group_3",
    ]
    assert not (folder / PARTS).exists()
    rows = open_run(tmp_path).rows()
    assert opened == []
    (folder / INDEX).unlink()
    assert open_run(tmp_path).rows() == rows  # as its stores say
    assert len(opened) == 2
    assert [(row.table.success, row.n_expected, row.seed) for row in rows] == [
        (True, 2, 1000),
        (False, 2, 1001),
    ]
    assert [row.sum_reward for row in rows] == [0 + 1 + 2 + 3 + 4, sum(range(9))]


# Parts of a run


def test_parts_are_chosen_by_task_outcome_and_condition(many, put):
    put(
        many / "attention" / "kitchen_0" / "episode_00004.zarr",
        episode_index=4,
        success=None,
        condition={"name": "blind", "text": "no camera", "interventions": [{"kind": "block"}]},
    )
    run = open_run(many)

    def numbers(**where):
        return [(row.table.task_id, row.table.episode) for row in run.where(**where).rows()]

    assert numbers(task="kitchen_1") == [(1, number) for number in range(4)]  # and not kitchen_10
    assert len(numbers(task="kitchen")) == 49
    assert {task for task, _ in numbers(task="the CUP")} == {1, 3, 5, 7, 9, 11}
    assert len(numbers(success=True)) == 32
    assert len(numbers(success=False)) == 16  # what nobody judged is neither
    assert numbers(condition="blind") == [(0, 4)]
    assert numbers(task="kitchen_0", success=False, condition="baseline") == [(0, 0), (0, 3)]
    part = run.where(condition="blind")
    assert [episode.condition.name for episode in part] == ["blind"]
    assert part.path == run.path


def test_nothing_of_the_kind_says_what_there_is(many, monkeypatch, capsys):
    with pytest.raises(SelectionError, match=r"no episode of task 'fork'; of its 48 .* tasks kitchen_0 \("):
        open_run(many).where(task="fork")
    status, out, error = run_cli(monkeypatch, capsys, "inspect", many, "--condition", "blind", "--failure")
    assert (status, out) == (1, "")
    assert error == (
        f"error: {many}: no episode in condition 'blind' that failed; of its 48 episodes there are "
        "conditions baseline; 32 successes and 16 failures\n"
    )


def test_inspect_takes_a_part(many, put, monkeypatch, capsys):
    broken = many / "attention" / "kitchen_0" / "episode_00001.zarr"
    (broken / "zarr.json").write_text("{")
    arguments = ("inspect", many, "--task", "kitchen_10", "--success", "--json")
    status, out, error = run_cli(monkeypatch, capsys, *arguments)
    facts = json.loads(out)
    assert status == 0
    assert [(row["task_id"], row["episode"]) for row in facts["episodes"]] == [
        (10, 0),
        (10, 1),
        (10, 3),
    ]
    assert facts["damaged"] == []
    assert "left out:" in error
    assert str(broken) in error


# How far it is

NOW = 1_800_000_000.0


def aged(store, seconds):
    """Let a store's last change lie so long before NOW."""
    os.utime(store / "zarr.json", (NOW - seconds, NOW - seconds))
    return store


@pytest.fixture
def going(tmp_path, put):
    """A run of two jobs: six done, two being written, two stopped, two broken."""
    created = "2027-01-15T07:00:00+00:00"  # an hour before NOW
    for job in range(2):
        folder = tmp_path / f"job_{job}" / "attention" / f"kitchen_{job}"
        about = {"task_id": job, "n_episodes_expected": 8, "created": created}
        for number in range(3):
            store = put(folder / f"episode_{number:05d}.zarr", success=number > 0, **about)
            aged(store, 60 + 600 * number)
        aged(put(folder / "episode_00003.zarr", complete=False, **about), 20)
        end = {"interrupted_by": "Preempted"} if job else {}
        aged(put(folder / "episode_00004.zarr", complete=False, **about, **end), 10 if job else 400)
        broken = put(folder / "episode_00005.zarr")
        (broken / "zarr.json").write_text("{")
        aged(broken, 5)
    begun = put(tmp_path / "job_0" / "attention" / "kitchen_0" / "episode_00006.zarr")
    schema = {name: value for name, value in read(begun)["attributes"].items() if name[:6] == "schema"}
    begun_document = {"zarr_format": 3, "node_type": "group", "attributes": schema}
    (begun / "zarr.json").write_text(json.dumps(begun_document))
    aged(begun, 2)
    return tmp_path


def read(store):
    return json.loads((store / "zarr.json").read_text())


def test_status_counts_what_is_there(going):
    found = status_of(open_run(going), now=NOW)
    assert (found.n_done, found.n_success, found.n_failure) == (6, 4, 2)
    assert (found.n_writing, found.n_stopped, found.n_broken) == (3, 2, 2)
    assert (found.n_expected, found.is_announced, found.is_done) == (16, True, False)
    # Of the last half hour: all six, at 60, 660 and 1260 seconds.
    assert found.per_hour == pytest.approx(12)
    assert found.left_s == pytest.approx(10 / 12 * 3600)
    assert found.line == (
        f"{going}: 6 of 16 episodes announced done (38%), 4 successful, 2 failing, 3 being written, "
        "2 stopped halfway, 2 broken; "
        f"{found.n_bytes / 1000:.1f}"
        " kB; 12 episodes an hour, 50 min left"
    )
    files = [path.stat().st_size for path in going.rglob("zarr.json")]
    assert found.n_bytes == sum(size for size in files if size > 500)  # of those that can be read
    assert [(task.name, task.n_done) for task in found.tasks if task.condition != "?"] == [
        ("kitchen_0", 3),
        ("kitchen_1", 3),
    ]
    known = status_of(open_run(going), expected=6, now=NOW)
    assert (known.n_expected, known.is_announced, known.left_s) == (6, False, None)
    assert not known.is_done  # others are being written


def test_a_run_that_has_ended_has_the_speed_of_all_of_it(going):
    found = status_of(open_run(going), now=NOW + 100_000)
    assert (found.n_writing, found.n_stopped, found.n_broken) == (0, 4, 3)
    assert found.per_hour == pytest.approx(6 / (3600 - 60) * 3600)
    assert found.left_s is None


def test_jobs_that_say_nothing_are_not_guessed(going, put):
    put(going / "job_2" / "attention" / "kitchen_2" / "episode_00000.zarr", task_id=2)
    assert status_of(open_run(going), now=NOW).n_expected is None


def test_the_commands_table_and_json(going, monkeypatch, capsys):
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run_cli(monkeypatch, capsys, "status", going)
    assert status == 0
    assert "6 of 16 episodes announced done" in out
    assert "being written" in out
    assert out.count("broken: ") == 2
    _, out, _ = run_cli(monkeypatch, capsys, "status", going, "--expected", "12", "--json")
    facts = json.loads(out)
    assert (facts["n_expected"], facts["n_done"], facts["n_broken"]) == (12, 6, 2)
    assert facts["tasks"][0]["name"] == "kitchen_0"


def test_many_tasks_are_shown_by_group(many):
    found = status_of(open_run(many))
    assert len(found.tasks) == render_status(found).renderables[1].row_count == 12
    table = render_status(found, height=17).renderables[1]
    assert table.row_count == 1
    found.tasks = [replace(task, name=f"{task.name}{n}") for n in range(4) for task in found.tasks]
    assert render_status(found).renderables[1].row_count == 1


def test_what_cannot_be_read_is_counted_in_its_tasks_row(many):
    for store in open_run(many).stores[:3]:
        (store / "zarr.json").write_text("{")
    found = status_of(open_run(many))
    line, table, *broken = render_status(found, height=24).renderables
    assert "45 episodes done" in line.plain
    assert table.row_count == 12
    assert [text.plain.partition(":")[0] for text in broken] == ["broken"] * 3
    _, _, *broken = render_status(found, height=8).renderables
    assert broken[-1].plain == "and 1 more that are broken"


def test_watching_ends_when_all_is_there(tmp_path, put, monkeypatch, capsys, opened):
    """It begins before the first episode; each look reads what has changed alone."""
    stores = [tmp_path / "attention" / "kitchen_0" / f"episode_{number:05d}.zarr" for number in range(3)]
    looks = []

    def meanwhile(seconds):
        looks.append(list(opened))
        opened.clear()
        if len(looks) <= 3:
            put(stores[len(looks) - 1], episode_index=len(looks) - 1)

    monkeypatch.setattr(commands.time, "sleep", meanwhile)
    status, out, _ = run_cli(monkeypatch, capsys, "status", tmp_path, "--watch", "--expected", "3")
    assert status == 0
    assert [line.partition(": ")[2].partition(" episodes")[0] for line in out.splitlines()] == [
        "0 of 3",
        "1 of 3",
        "2 of 3",
        "3 of 3",
    ]
    assert [*looks, opened] == [[], [stores[0]], [stores[1]], [stores[2]]]


def test_what_is_no_run_is_one_line(tmp_path, monkeypatch, capsys):
    for arguments in (["status", tmp_path], ["status", tmp_path / "no", "--watch"], ["gather", tmp_path]):
        status, out, error = run_cli(monkeypatch, capsys, *arguments)
        assert (status, out) == (1, "")
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1


# One file for all jobs


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder with two evaluations of a task each, as jobs; and LeRobot's own file of both at once."""
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ADAPTERS, "scripted", scripted.ADAPTER)
        patch.setenv("SLURM_JOB_ID", "0")
        for name, tasks in {"jobs/a": [3], "jobs/b": [4], "both": [3, 4]}.items():
            envs = {task: scripted.make_envs((5, 9, 7), [True, False, task == 4]) for task in tasks}
            info, _ = evaluate(folder / name, envs, n_episodes=3, videos=0)
            (folder / name / "eval_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def jobs(evaluated, tmp_path):
    return shutil.copytree(evaluated / "jobs", tmp_path / "jobs")


PATHS = ("attention_paths", "video_paths", "predicted_video_paths")


def numbers_of(info):
    """What a file says, without paths and times."""
    return {
        "per_task": [
            {
                **one,
                "metrics": {
                    name: one["metrics"][name] for name in ("sum_rewards", "max_rewards", "successes")
                },
            }
            for one in info["per_task"]
        ],
        "per_group": {
            group: {name: value for name, value in found.items() if name not in PATHS}
            for group, found in info["per_group"].items()
        },
        "overall": {
            name: value
            for name, value in info["overall"].items()
            if name not in (*PATHS, "eval_s", "eval_ep_s")
        },
    }


@pytest.fixture
def of_both(evaluated):
    return numbers_of(json.loads((evaluated / "both" / "eval_info.json").read_text()))


def test_the_file_of_two_jobs_is_that_of_one_evaluation(jobs, of_both, monkeypatch, capsys):
    status, out, error = run_cli(monkeypatch, capsys, "gather", jobs)
    assert (status, error) == (0, "")
    assert "6 episodes of 2 tasks from 2 jobs, 50.0 % successful" in out
    info = json.loads((jobs / "eval_info.json").read_text())
    assert numbers_of(info) == of_both
    parts = [json.loads((jobs / name / "eval_info.json").read_text()) for name in "ab"]
    assert info["overall"]["eval_s"] == pytest.approx(sum(part["overall"]["eval_s"] for part in parts))
    assert info["overall"]["eval_ep_s"] == pytest.approx(info["overall"]["eval_s"] / 6)
    listed = [path for part in parts for path in part["overall"]["attention_paths"]]
    assert info["overall"]["attention_paths"] == listed
    assert len(listed) == 6
    # Of what was gathered, nothing is gathered a second time.
    assert run_cli(monkeypatch, capsys, "gather", jobs)[0] == 0
    assert numbers_of(json.loads((jobs / "eval_info.json").read_text())) == of_both


@pytest.mark.parametrize("what", ["ended early", "damaged", "behind its stores"])
def test_a_job_without_its_file_is_counted_from_its_stores(jobs, of_both, what):
    file = jobs / "b" / "eval_info.json"
    if what == "ended early":
        file.unlink()
    elif what == "damaged":
        file.write_text('{"per_task": [')
    else:  # of an evaluation of one episode that went on with two more
        info = json.loads(file.read_text())
        for name in ("sum_rewards", "max_rewards", "successes"):
            info["per_task"][0]["metrics"][name] = info["per_task"][0]["metrics"][name][:1]
        file.write_text(json.dumps(info))
    found = gather(open_run(jobs))
    assert numbers_of(found.info) == of_both
    assert found.info["gathered"]["n_episodes_from_stores"] == 3
    assert (what == "behind its stores") == (not found.notes)
    assert all(str(jobs / "b") in note for note in found.notes)


def test_stores_that_do_not_say_their_sums_are_read(jobs, of_both, monkeypatch):
    for metadata in (jobs / "b").rglob("*.zarr/zarr.json"):
        said = json.loads(metadata.read_text())
        assert said["attributes"].pop("sum_reward") > 0
        said["attributes"].pop("max_reward")
        metadata.write_text(json.dumps(said))
    (jobs / "b" / "eval_info.json").unlink()
    assert numbers_of(gather(open_run(jobs)).info) == of_both


def test_what_is_missing_is_said(jobs):
    (jobs / "b" / "eval_info.json").unlink()
    stores = sorted((jobs / "b").rglob("*.zarr"))
    shutil.rmtree(stores[0])
    (stores[1] / "zarr.json").write_text("{")
    found = gather(open_run(jobs))
    assert [one["metrics"]["successes"] for one in found.info["per_task"]] == [[True, False, False], [True]]
    notes = "\n".join(found.notes)
    assert f"{jobs / 'b'}: 1 of its 3 episodes are there" in notes
    assert f"not counted: {stores[1]}" in notes
    assert found.info["gathered"]["notes"] == found.notes


def test_a_job_that_kept_no_store_counts(jobs, of_both):
    shutil.rmtree(jobs / "b" / "attention")
    found = gather(open_run(jobs))
    assert numbers_of(found.info) == of_both
    assert found.info["gathered"]["n_episodes_from_stores"] == 0


def test_an_episode_of_two_jobs_counts_once(jobs, of_both):
    shutil.copytree(jobs / "b", jobs / "c")
    (extra,) = (jobs / "c").rglob("episode_00002.zarr")
    said = json.loads((extra / "zarr.json").read_text())
    said["attributes"] |= {"episode_index": 7, "seed": 1007}
    (extra / "zarr.json").write_text(json.dumps(said))
    found = gather(open_run(jobs))
    assert found.info["per_task"][1]["metrics"]["successes"] == [True, False, True, True]
    assert sum("counted once" in note for note in found.notes) == 2


def test_conditions_are_not_mixed(jobs, of_both, monkeypatch, capsys):
    for metadata in (jobs / "b").rglob("*.zarr/zarr.json"):
        said = json.loads(metadata.read_text())
        said["attributes"]["condition"] = {"name": "blind", "text": "", "interventions": []}
        metadata.write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"2 conditions \('baseline', 'blind'\).*--condition NAME"):
        gather(open_run(jobs))
    file = jobs / "blind.json"
    run_cli(monkeypatch, capsys, "gather", jobs, "--condition", "blind", "-o", file)
    assert numbers_of(json.loads(file.read_text()))["per_task"] == of_both["per_task"][1:]


def test_an_evaluations_own_file_stays(jobs, monkeypatch, capsys):
    before = (jobs / "a" / "eval_info.json").read_bytes()
    status, _, error = run_cli(monkeypatch, capsys, "gather", jobs / "a")
    assert status == 1
    assert "is an evaluation's own" in error
    assert (jobs / "a" / "eval_info.json").read_bytes() == before


def test_what_is_no_number_is_no_number(jobs):
    file = jobs / "a" / "eval_info.json"
    info = json.loads(file.read_text())
    info["per_task"][0]["metrics"]["sum_rewards"] = [math.nan, 3.0, 5.0]
    file.write_text(json.dumps(info))
    found = gather(open_run(jobs)).info
    assert found["per_task"][0]["metrics"]["sum_rewards"] == [None, 3.0, 5.0]
    json.dumps(found, allow_nan=False)
    assert found["per_group"]["group"]["avg_sum_reward"] > 0
