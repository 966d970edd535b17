"""Replays and own loops say what each episode's first observation did not pass."""

from __future__ import annotations

import inspect
import shlex

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import recorded  # noqa: E402
from recorded import CAMERAS, write_dataset  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import lerobot_attn  # noqa: E402
from lerobot_attn import AttentionConfig, open_run, record_dataset, record_episodes, recording  # noqa: E402
from lerobot_attn.cli import app  # noqa: E402

LAST = AttentionConfig(layers=[-1], mean_layers="none", cameras=False)
N_ACTIONS = 7


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """Three episodes; the state of each is further from that of training: see `recorded.state`."""
    return write_dataset(tmp_path_factory.mktemp("data") / "kitchen", (5, 3, 4), tasks=("pick up the soup",))


def problems(folder, says="status"):
    """Of each episode in its order: the check that did not pass → its status."""
    episodes = sorted(open_run(folder), key=lambda episode: episode.attributes["episode_index"])
    found = [episode.attributes["input_checks"] for episode in episodes]
    assert all({*check} == {"name", "status", "detail", "remedy"} for checks in found for check in checks)
    return [{check["name"]: check[says] for check in checks} for checks in found]


def ranges(folder):
    return [found["state range"] for found in problems(folder, "detail")]


def test_a_replay_looks_at_each_episodes_first_observation(demo_policy, demo_checkpoint, kitchen, tmp_path):
    policy, preprocessor, postprocessor = demo_policy(num_inference_steps=2)
    processors = {"preprocessor": preprocessor, "postprocessor": postprocessor}
    arguments = processors | {"every": 2}
    record_dataset(policy, kitchen, tmp_path / "all", LAST, **arguments)
    for found in problems(tmp_path / "all"):
        assert "state range" in found  # no arm of training was there
        assert "normalisation" not in found
        assert "chunk" not in found  # nobody executes it
    # Each of its own first frame, whatever shares its batch.
    said = ranges(tmp_path / "all")
    for index, detail in enumerate(said):
        assert f"state_h {recorded.state(index, 0)[7]:.3g} " in detail, detail
    assert len(set(said)) == 3
    record_dataset(policy, kitchen, tmp_path / "one", LAST, batch_size=1, **arguments)
    assert ranges(tmp_path / "one") == said
    # Nobody knows what a function does to its observations, nor what a replay without one shows.
    record_dataset(policy, kitchen, tmp_path / "own", LAST, preprocessor=lambda batch: preprocessor(batch))
    assert all("input_checks" not in episode.attributes for episode in open_run(tmp_path / "own"))
    recording.record_dataset(policy, kitchen, tmp_path / "left", LAST, **arguments)
    assert all("input_checks" not in episode.attributes for episode in open_run(tmp_path / "left"))
    # The command line, and what says it.
    line = (
        f"replay --policy.path={demo_checkpoint} --dataset={kitchen} --episodes 1 -o {tmp_path / 'command'}"
    )
    options = " --policy.num_inference_steps=2 --attention.cameras=false --attention.mean_layers=none"
    assert CliRunner().invoke(app, shlex.split(line + options)).exit_code == 0
    assert ranges(tmp_path / "command") == said[1:2]
    (episode,) = open_run(tmp_path / "command")
    told = CliRunner().invoke(app, ["inspect", str(episode.path)], env={"COLUMNS": "400"}).stdout
    assert f"input, state range {problems(episode.path)[0]['state range']}: {said[1]}" in told


def shown(frame, black=False):
    pictures = {
        camera: torch.from_numpy(recorded.picture(0, frame, i)).movedim(-1, 0)[None] / 255
        for i, camera in enumerate(CAMERAS)
    }
    if black:
        pictures[CAMERAS[0]] = torch.zeros_like(pictures[CAMERAS[0]])
    state = np.array([[-0.05, 0.03, 0.76, 2.97, -0.22, -0.12, 0.03, -0.03]], np.float32)
    return {**pictures, "observation.state": torch.from_numpy(state)}


def run_loop(policy, preprocessor, folder, tasks=("pick up the soup",), chunked=False, config=LAST):
    """Two episodes; the second begins with a black picture, the first goes on with one."""
    with record_episodes(policy, folder, config, fps=4, preprocessor=preprocessor) as loop:
        for index in range(2):
            with loop.episodes(tasks) as episodes:
                policy.reset()
                for frame in range(2):
                    one = shown(frame, black=frame != index)
                    batch = {name: torch.cat([value] * len(tasks)) for name, value in one.items()}
                    batch = preprocessor({**batch, "task": [*tasks]})
                    if chunked:
                        action = policy.predict_action_chunk(batch)[:, 0]
                    else:
                        action = policy.select_action(batch)
                    for row, episode in enumerate(episodes):
                        episode.step(None, action[row], policy_action=action[row])


def test_an_own_loop_looks_at_each_episodes_first_batch(demo_policy, tmp_path, caplog):
    policy, preprocessor, _ = demo_policy(num_inference_steps=2)
    run_loop(policy, preprocessor, tmp_path / "one")
    first, second = problems(tmp_path / "one")
    assert set(second) - set(first) == {"pictures"}
    assert "normalisation" not in first  # how actions are scaled back is not known here
    assert first["chunk"] == "warning"  # 50 actions at 4 a second are long
    assert sum("What the policy is fed" in record.getMessage() for record in caplog.records) == 2
    # Of a chunk that the loop itself serves nobody knows how much is executed.
    run_loop(policy, preprocessor, tmp_path / "chunk", chunked=True)
    assert [found.keys() for found in problems(tmp_path / "chunk")] == [
        {*first} - {"chunk"},
        {*second} - {"chunk"},
    ]
    # Of several environments each has its own.
    run_loop(policy, preprocessor, tmp_path / "two", tasks=("pick up the soup", "pick_up_the_soup"))
    found = problems(tmp_path / "two")
    assert [found[row].get("prompt") for row in range(4)] == [None, "warning"] * 2


def test_a_look_changes_no_action_and_one_that_breaks_costs_nothing(demo_policy, tmp_path, monkeypatch):
    from lerobot_attn.plugin import feeding

    policy, preprocessor, _ = demo_policy(num_inference_steps=2)
    arrays = []
    for name in ("looked", "broken"):
        if name == "broken":
            monkeypatch.setitem(feeding.CHECKS, "cameras", None)  # cannot be called
        torch.manual_seed(0)
        run_loop(policy, preprocessor, tmp_path / name)
        arrays.append([episode.dataset.action_chunk.values for episode in open_run(tmp_path / name)])
        assert all(("input_checks" in e.attributes) == (name == "looked") for e in open_run(tmp_path / name))
    np.testing.assert_array_equal(arrays[0], arrays[1])


def test_the_front_doors_recorders_are_those_of_recording():
    for name in ("record_dataset", "record_episodes"):
        ours, theirs = getattr(lerobot_attn, name), getattr(recording, name)
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert ours.__doc__ == theirs.__doc__
