"""A folder that holds episodes already: refused, gone on with, or made anew; never two runs mixed."""

import json
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import scripted
from test_recording import evaluate, scripted_adapter  # noqa: F401

from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import ConfigError, StoreError
from lerobot_attn.recording.folder import RunFolder
from lerobot_attn.store.attributes import read_header
from lerobot_attn.store.reader import open_episode, open_run

TASK = 3


def envs():
    return {TASK: scripted.make_envs((5, 9, 7))}


def files_of(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def edit(store, change):
    metadata = store / "zarr.json"
    document = json.loads(metadata.read_text())
    change(document["attributes"])
    metadata.write_text(json.dumps(document))


@pytest.fixture
def recorded(tmp_path):
    """A run of three episodes: the first complete, the second cut off, the third missing."""
    evaluate(tmp_path, envs())
    task = tmp_path / "attention" / f"group_{TASK}"
    stores = [task / f"episode_{index:05d}.zarr" for index in range(3)]
    edit(stores[1], lambda attributes: attributes.update(complete=False))
    RunFolder(tmp_path / "attention", "overwrite")  # looks, and changes nothing
    assert len(open_run(tmp_path)) == 3
    for file in task.glob("episode_00002*"):
        subprocess.run(["rm", "-r", str(file)], check=True)
    return tmp_path, stores


def test_skip_keeps_what_is_complete_and_records_the_rest(recorded):
    folder, stores = recorded
    before = files_of(stores[0])
    info, run = evaluate(folder, envs(), existing="skip")
    assert not run.failures
    assert files_of(stores[0]) == before
    assert [episode.is_complete for episode in open_run(folder)] == [True] * 3
    assert [episode.n_frames for episode in open_run(folder)] == [5, 9, 7]
    attention = info["per_task"][0]["metrics"]["attention"]
    assert (attention["n_saved"], attention["n_kept"], attention["n_not_saved"]) == (3, 1, 0)
    assert info["overall"]["attention_paths"] == [str(store) for store in stores]


def test_jobs_that_look_into_a_folder_at_once_do_not_disturb_each_other(tmp_path):
    """Nobody has claimed it yet: that two are told the same is said by the claim, in its own words."""

    def look(_):
        for _ in range(100):
            RunFolder(tmp_path / "attention", "skip")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(look, range(4)))
    assert list((tmp_path / "attention").iterdir()) == []


def test_skip_after_a_whole_run_records_nothing(tmp_path):
    evaluate(tmp_path, envs())
    before = files_of(tmp_path / "attention" / f"group_{TASK}")
    info, _ = evaluate(tmp_path, envs(), existing="skip")
    assert files_of(tmp_path / "attention" / f"group_{TASK}") == before
    assert info["per_task"][0]["metrics"]["attention"]["n_kept"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["policy"].update(type="other"), r"policy type 'other', this run's is 'scripted'"),
        (lambda a: a["policy"].update(path="x"), r"policy path 'x', this run's is None"),
        (lambda a: a["capture"].update(layers=[0]), r"capture layers \[0\], this run's is \[-2, -1\]"),
        (lambda a: a["capture"].update(keep_bits=4), r"capture keep_bits 4, this run's is None"),
        (lambda a: a.update(seed=7), r"seed 7, this run's is 1000"),
    ],
)
def test_skip_never_mixes_two_runs(tmp_path, change, message):
    evaluate(tmp_path, envs())
    first = open_run(tmp_path)[0].path
    edit(first, change)
    before = files_of(tmp_path / "attention")
    with pytest.raises(StoreError, match=message) as caught:
        evaluate(tmp_path, envs(), existing="skip")
    assert "\n" not in str(caught.value)
    after = files_of(tmp_path / "attention")
    assert {f: t for f, t in after.items() if "lock" not in f.name} == {
        f: t for f, t in before.items() if "lock" not in f.name
    }


def test_overwrite_leaves_nothing_of_the_run_before(recorded):
    folder, stores = recorded
    stale = folder / "attention" / "group_9" / "episode_00000.zarr"
    stores[0].parent.joinpath("episode_00007.image.mp4").write_text("of nobody")
    stale.mkdir(parents=True)
    (stale / "zarr.json").write_text("{")
    (stale.parent / "episode_00000.image.mp4").write_text("old")
    before = files_of(stores[0])
    evaluate(folder, envs(), existing="overwrite")
    assert not any(files_of(stores[0]).get(file) == time for file, time in before.items())
    assert [episode.is_complete for episode in open_run(folder)] == [True] * 3
    assert list(stale.parent.iterdir()) == []


def test_unknown_word():
    with pytest.raises(ConfigError, match="existing: got 'append', expected one of refuse, skip, overwrite"):
        AttentionConfig(existing="append")


def test_two_runs_at_once_and_a_killed_one(tmp_path):
    code = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from lerobot_attn.recording.folder import RunFolder

        with RunFolder(Path(sys.argv[1]), "skip").claim():
            print("claimed", flush=True)
            time.sleep(60)
        """
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == "claimed"
        with (
            pytest.raises(StoreError, match=rf"another run \(process {other.pid} on .*\) records into it"),
            RunFolder(tmp_path, "skip").claim(),
        ):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    with RunFolder(tmp_path, "skip").claim():
        assert "process" in (tmp_path / ".lerobot-attn.lock").read_text()


def test_a_run_claims_its_folder_only_while_it_lasts(tmp_path):
    evaluate(tmp_path, envs())
    with RunFolder(tmp_path / "attention", "skip").claim():
        pass
    assert open_episode(next((tmp_path / "attention").rglob("*.zarr"))).is_complete


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [
        ("layers", [-1, 2], [1, 2]),
        ("layers", [3, 2, 3], "all"),
        ("mean_layers", [0, 1, 2, 3], [0, 1, 2]),
        ("prefix_layers", "none", "all"),
        ("heads", [1, -2], [0]),
        ("denoise_steps", [0, 1, 2], [0, 1]),
        ("keep_bits", 10, 9),
    ],
)
def test_skip_compares_what_settings_mean(tmp_path, name, same, other):
    evaluate(tmp_path, envs())
    before = files_of(tmp_path / "attention" / f"group_{TASK}")
    info, run = evaluate(tmp_path, envs(), existing="skip", **{name: same})
    assert not run.failures
    assert info["per_task"][0]["metrics"]["attention"]["n_kept"] == 3
    assert files_of(tmp_path / "attention" / f"group_{TASK}") == before
    with pytest.raises(StoreError, match=f"capture {name}"):
        evaluate(tmp_path, envs(), existing="skip", **{name: other})


def test_stores_from_before_vision_layers_are_gone_on_with(tmp_path):
    evaluate(tmp_path, envs())
    for store in (tmp_path / "attention").rglob("*.zarr/zarr.json"):
        document = json.loads(store.read_text())
        for name in ("vision_layers", "neurons", "residuals", "record_full"):
            del document["attributes"]["capture"][name]
        store.write_text(json.dumps(document))
    info, run = evaluate(tmp_path, envs(), existing="skip")
    assert not run.failures
    assert info["per_task"][0]["metrics"]["attention"]["n_kept"] == 3


def test_neurons_are_compared_by_what_they_mean(tmp_path):
    evaluate(tmp_path, envs())
    stores = list((tmp_path / "attention").rglob("*.zarr/zarr.json"))
    for store in stores:
        document = json.loads(store.read_text())
        document["attributes"]["capture"]["neurons"] = {"vlm": [0, 1, 2, -1]}  # of four
        store.write_text(json.dumps(document))
    attributes = read_header(stores[0].parent).attributes
    folder = RunFolder(tmp_path / "attention", "skip")
    folder.settle(attributes, {**attributes["capture"], "neurons": {"vlm": "all"}})
    with pytest.raises(StoreError, match="capture neurons"):
        folder.settle(attributes, {**attributes["capture"], "neurons": {}})


@pytest.mark.parametrize("group", ["gym_hil/PandaPick-v0", "a/b/c", "sub:mod/Env-v1"])
def test_namespaced_environments(tmp_path, group):
    """A group's slashes: refused, gone on with and made anew as any other; eval's own video is found."""
    evaluate(tmp_path, envs(), group=group)
    run = open_run(tmp_path)
    assert [episode.attributes["task_group"] for episode in run] == [group] * 3
    for index, episode in enumerate(run):
        assert episode.eval_video == tmp_path / "videos" / f"{group}_{TASK}" / f"eval_episode_{index}.mp4"
    with pytest.raises(StoreError, match="already holds episodes"):
        evaluate(tmp_path, envs(), group=group)
    info, _ = evaluate(tmp_path, envs(), group=group, existing="skip")
    assert info["per_task"][0]["metrics"]["attention"]["n_kept"] == 3
    info, run = evaluate(tmp_path, envs(), group=group, existing="overwrite")
    assert not run.failures
    assert info["per_task"][0]["metrics"]["attention"]["n_kept"] == 0
    assert len(open_run(tmp_path)) == 3


def test_nested_folders_of_older_versions_are_found(tmp_path):
    evaluate(tmp_path, envs())
    old = tmp_path / "attention" / "gym_hil" / "PandaPick-v0_0"
    old.parent.mkdir()
    (tmp_path / "attention" / f"group_{TASK}").rename(old)
    with pytest.raises(StoreError, match=r"already holds episodes .*gym_hil/PandaPick-v0_0/episode_00000"):
        RunFolder(tmp_path / "attention")
    RunFolder(tmp_path / "attention", "overwrite").settle({}, {})
    assert list(old.iterdir()) == []
