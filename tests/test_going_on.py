"""An evaluation that was interrupted goes on behind its last whole batch, as if nothing had happened."""

import importlib
import json
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import scripted
from evaluation import evaluate_all
from lerobot.utils.random_utils import set_seed
from test_recording import make_policy, scripted_adapter  # noqa: F401
from test_shards import NumberedEnv

from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import StoreError
from lerobot_attn.plugin.acting import Acting
from lerobot_attn.plugin.shards import beginning_at
from lerobot_attn.recording import folder as run_folder
from lerobot_attn.recording.run import RunRecorder
from lerobot_attn.recording.task_progress import FILE, TaskProgress
from lerobot_attn.store.reader import open_run

N_ENVS = 2
TASKS = (3, 4)


class InterruptedRolloutError(Exception):
    pass


class Counted:
    """Counts the rollouts of a policy, and ends the evaluation in one of them."""

    def __init__(self, policy, end_in):
        self.n_rollouts = 0
        reset, choose = policy.reset, policy.select_action

        def counted(*args, **kwargs):
            self.n_rollouts += 1
            policy.n_inferences = 0  # its actions say the number, here of an episode
            return reset(*args, **kwargs)

        def select_action(*args, **kwargs):
            if self.n_rollouts == end_in:
                raise InterruptedRolloutError
            return choose(*args, **kwargs)

        policy.reset, policy.select_action = counted, select_action


def evaluate(
    folder, n_episodes=4, *, end_in=None, seed=1000, first=0, acting=None, videos=1, existing="skip"
):
    """Evaluate two tasks; return LeRobot's summary (None: interrupted) and how many rollouts there were."""
    makers = [lambda number=number: NumberedEnv(number, N_ENVS) for number in range(N_ENVS)]
    mode = gym.vector.AutoresetMode.NEXT_STEP
    envs = {task: gym.vector.SyncVectorEnv(makers, autoreset_mode=mode) for task in TASKS}
    run = RunRecorder(
        AttentionConfig(existing=existing), folder / "attention", {"policy": {"dtype": "float32"}}
    )
    policy = make_policy()
    counted = Counted(policy, end_in)
    set_seed(seed)
    try:
        info = evaluate_all(
            envs,
            policy,
            run,
            first_episode=first,
            acting=acting,
            wraps=[lambda namespace: beginning_at(namespace, first)],
            n_episodes=n_episodes,
            max_episodes_rendered=videos,
            videos_dir=folder / "videos",
        )
    except InterruptedRolloutError:
        info = None
    return info, counted.n_rollouts


def counts(info):
    """What LeRobot counts: of each task, each group and all, but for how long it took."""
    kept = ("sum_rewards", "max_rewards", "successes")
    tasks = [(t["task_id"], {name: t["metrics"][name] for name in kept}) for t in info["per_task"]]
    overall = {name: value for name, value in info["overall"].items() if name.startswith(("avg", "pc", "n_"))}
    return tasks, overall


def actions(folder):
    """Each episode's actions, which hold the noise, and its initial state's number."""
    return {
        str(episode.path.relative_to(folder)): (
            episode.dataset.action.values.tolist(),
            float(episode.dataset.state[0, 0]),
        )
        for episode in open_run(folder)
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "0")
        patch.setitem(importlib.import_module("lerobot_attn.policies").ADAPTERS, "scripted", scripted.ADAPTER)
        folder = tmp_path_factory.mktemp("undisturbed")
        info, n_rollouts = evaluate(folder)
        assert n_rollouts == 4
        return counts(info), actions(folder)


@pytest.mark.parametrize("end_in", [2, 4])
def test_it_ends_as_if_it_had_not_been_interrupted(undisturbed, tmp_path, end_in):
    info, _ = evaluate(tmp_path, end_in=end_in)
    assert info is None
    whole = {e.path: e.path.stat().st_mtime_ns for e in open_run(tmp_path) if e.is_complete}
    assert len(whole) == (end_in - 1) * N_ENVS
    info, n_rollouts = evaluate(tmp_path, seed=77)
    assert n_rollouts == 4 - (end_in - 1)
    assert (counts(info), actions(tmp_path)) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    attention = [task["metrics"]["attention"] for task in info["per_task"]]
    assert [a["n_saved"] for a in attention] == [4, 4]
    assert sum(a["n_kept"] for a in attention) == len(whole)
    assert len(info["overall"]["attention_paths"]) == 8


def test_videos_are_counted_on(tmp_path):
    evaluate(tmp_path, end_in=2, videos=3)
    info, _ = evaluate(tmp_path, videos=3)
    videos = [
        p.removeprefix(str(tmp_path) + "/videos/") for p in info["per_task"][0]["metrics"]["video_paths"]
    ]
    assert videos == [
        "group_3/eval_episode_0.mp4",
        "group_3/eval_episode_1.mp4",
        "from_00002/group_3/eval_episode_0.mp4",
    ]
    episodes = [e for e in open_run(tmp_path) if e.attributes["task_id"] == 3]
    assert [str(e.eval_video.relative_to(tmp_path / "videos")) for e in episodes[:3]] == videos
    assert all((tmp_path / "videos" / video).stat().st_size for video in videos)
    assert episodes[3].eval_video is None


def test_nothing_is_rolled_out_again_behind_a_whole_run(undisturbed, tmp_path):
    first, _ = evaluate(tmp_path)
    info, n_rollouts = evaluate(tmp_path)
    assert n_rollouts == 0
    assert counts(info) == counts(first) == undisturbed[0]
    assert info["overall"]["video_paths"] == first["overall"]["video_paths"]
    assert info["overall"]["attention_paths"] == first["overall"]["attention_paths"]


def test_what_lies_there_is_read_once(tmp_path, monkeypatch):
    evaluate(tmp_path)
    read = Counter()

    def counting(function, key):
        def counted(*args):
            read[key(*args)] += 1
            return function(*args)

        return counted

    monkeypatch.setattr(run_folder, "read_header", counting(run_folder.read_header, str))
    name = lambda progress: str(progress._file)  # noqa: E731
    monkeypatch.setattr(TaskProgress, "read", counting(TaskProgress.read, name))
    info, n_rollouts = evaluate(tmp_path)
    assert (n_rollouts, len(info["overall"]["attention_paths"])) == (0, 8)
    assert set(read.values()) == {1}
    stores = {str(store) for store in open_run(tmp_path).stores}
    assert {*read} == stores | {str(tmp_path / "attention" / f"group_{task}" / FILE) for task in TASKS}


def test_a_store_that_changes_meanwhile_is_read_again(tmp_path):
    evaluate(tmp_path)
    store = open_run(tmp_path).stores[0]
    its = run_folder.RunFolder(tmp_path / "attention", "skip")
    n_frames = open_run(tmp_path)[0].n_frames
    assert its.kept(store, 1000).n_frames == its.kept(store, 1000).n_frames == n_frames
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["seed"] = 5
    (store / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreError, match="was recorded with seed 5"):
        its.kept(store, 1000)


def test_a_run_is_made_longer(undisturbed, tmp_path):
    _, n_rollouts = evaluate(tmp_path, 2)
    assert n_rollouts == 2
    _, n_rollouts = evaluate(tmp_path, 4)
    assert n_rollouts == 2
    # Of the first task only: the second began with other random numbers when the first was shorter.
    its = {name: value for name, value in undisturbed[1].items() if "group_3" in name}
    assert {name: value for name, value in actions(tmp_path).items() if name in its} == its


def test_a_batch_that_is_not_whole_is_rolled_out_again(undisturbed, tmp_path):
    evaluate(tmp_path)
    store = open_run(tmp_path)[3].path  # of the second batch
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["complete"] = False
    (store / "zarr.json").write_text(json.dumps(document))
    info, n_rollouts = evaluate(tmp_path, seed=77)
    assert n_rollouts == 1
    assert (counts(info), actions(tmp_path)) == undisturbed


def test_a_video_that_is_missing_is_made_anew(tmp_path):
    evaluate(tmp_path)
    (tmp_path / "videos" / "group_4" / "eval_episode_0.mp4").unlink()
    _, n_rollouts = evaluate(tmp_path)
    assert n_rollouts == 2
    assert (tmp_path / "videos" / "group_4" / "eval_episode_0.mp4").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"results": 3}', '{"results": [{"a": 1}], "random_states": {}}']
)
def test_progress_that_cannot_be_read(undisturbed, tmp_path, text):
    evaluate(tmp_path)
    (tmp_path / "attention" / "group_3" / FILE).write_text(text)
    info, n_rollouts = evaluate(tmp_path)
    assert n_rollouts == 2
    assert (counts(info), actions(tmp_path)) == undisturbed


def test_parts_of_a_task_do_not_go_on_with_another_ones_progress(tmp_path):
    evaluate(tmp_path, 2, first=0)
    _, n_rollouts = evaluate(tmp_path, 4, first=2)
    assert n_rollouts == 4
    assert [e.attributes["seed"] for e in open_run(tmp_path)] == [1000, 1001, 1002, 1003, 1004, 1005] * 2


def test_a_part_goes_on(tmp_path):
    evaluate(tmp_path / "whole", first=2)
    evaluate(tmp_path / "cut", first=2, end_in=2)
    _, n_rollouts = evaluate(tmp_path / "cut", first=2)
    assert n_rollouts == 3
    assert actions(tmp_path / "cut") == actions(tmp_path / "whole")


def test_another_seed_is_refused(tmp_path):
    evaluate(tmp_path)
    for store in (tmp_path / "attention").rglob("*.zarr/zarr.json"):
        document = json.loads(store.read_text())
        document["attributes"]["seed"] += 5
        store.write_text(json.dumps(document))
    with pytest.raises(StoreError, match="was recorded with seed 1005, this run's is 1000"):
        evaluate(tmp_path)


def test_who_acts_knows_the_episodes_numbers(tmp_path, monkeypatch):
    begun = []
    acting = Acting.__new__(Acting)
    acting._first_episode, acting._next_episode = 0, 0
    monkeypatch.setattr(Acting, "seen", lambda self, batch: batch)
    monkeypatch.setattr(Acting, "pass_episodes", lambda self, number: begun.append(number))

    class Condition:
        changes_task = False

    acting.condition = Condition
    evaluate(tmp_path, end_in=3, acting=acting)
    assert begun == []
    evaluate(tmp_path, acting=acting)
    assert begun == [4]  # of the first task; the second begins at its beginning


def test_numbers_that_were_passed():
    acting = Acting.__new__(Acting)
    acting._first_episode, acting._next_episode = 5, 5
    acting.pass_episodes(4)
    assert acting._next_episode == 9
    acting.start_task()
    assert acting._next_episode == 5


def test_overwritten_runs_begin_anew(tmp_path):
    evaluate(tmp_path)
    _, n_rollouts = evaluate(tmp_path, existing="overwrite")
    assert n_rollouts == 4
    assert np.all([e.is_complete for e in open_run(tmp_path)])
