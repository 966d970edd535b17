"""Examples of one's own loop, in README and docs, run as they are printed, with the demo policy."""

import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from lerobot_attn import AttentionConfig, open_run, record_episodes  # noqa: E402

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## Record your own loop")[1].split("\n## ")[0]
RECIPES = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS, README_BLOCKS = (
    re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for text in (RECIPES, SECTION)
)


def observation(seed=0):
    """What a robot with two cameras gives, as LeRobot's preprocessor takes it."""
    noise = torch.Generator().manual_seed(seed)
    return {
        "observation.images.image": torch.rand(1, 3, 96, 96, generator=noise),
        "observation.images.image2": torch.rand(1, 3, 96, 96, generator=noise),
        "observation.state": torch.rand(1, 8, generator=noise),
        "task": ["pick up the soup"],
    }


class Robot:
    """Shows another observation after each action."""

    def __init__(self):
        self.n_actions = 0

    def get_observation(self):
        return observation(self.n_actions)

    def send_action(self, action):
        assert action.shape == (7,)
        self.n_actions += 1
        return self.get_observation()


def test_an_episode_is_recorded_that_view_opens(demo_policy, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from lerobot_attn.cli import app
    from lerobot_attn.explorer.library import Library

    policy, preprocessor, postprocessor = demo_policy(num_inference_steps=2)
    robot = Robot()
    (block,) = README_BLOCKS
    monkeypatch.chdir(tmp_path)
    names = {"policy": policy, "robot": robot, "preprocessor": preprocessor, "postprocessor": postprocessor}
    exec(compile(block, "README.md", "exec"), names)
    (episode,) = open_run("out")
    assert (episode.is_complete, episode.n_frames, robot.n_actions) == (True, 40, 40)
    assert episode.task == "pick up the soup"
    assert not {"reward", "success"} & set(episode.dataset)
    assert set(episode.videos) == {"observation.images.image", "observation.images.image2"}
    assert len(Library(Path("out")).look().summaries) == 1
    done = CliRunner().invoke(app, ["inspect", "out"])
    assert done.exit_code == 0, done.output


def test_an_episode_with_real_time_chunking(demo_policy, tmp_path, monkeypatch):
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy, preprocessor, postprocessor = demo_policy(num_inference_steps=2)
    policy.config.rtc_config = RTCConfig()
    policy.init_rtc_processor()
    (block,) = (block for block in BLOCKS if "ActionQueue" in block)
    monkeypatch.chdir(tmp_path)
    names = {"policy": policy, "robot": Robot(), "preprocessor": preprocessor, "postprocessor": postprocessor}
    exec(compile(block, "recipes.md", "exec"), names)
    (episode,) = open_run("rtc")
    assert (episode.is_complete, episode.n_frames) == (True, 40)
    # The thread may ask some frames after it was told to, but before its answer is waited for.
    late = episode.dataset.inference_frame.values - [0, 8, 16, 24, 32]
    assert late[0] == 0
    assert set(late.tolist()) <= {0, 1, 2, 3}
    assert episode.dataset.frame_query.values.tolist() == [
        *range(11),
        *(3, 4, 5, 6, 7, 8, 9, 10) * 3,
        3,
        4,
        5,
        6,
        7,
    ]


class Robots:
    """Two that are seen in one batch; the second shows what the first showed ten frames before."""

    def __init__(self):
        self.n_actions = 0

    def get_observations(self, tasks):
        rows = [observation(self.n_actions + 10 * row) for row in range(2)]
        both = {name: torch.cat([row[name] for row in rows]) for name in rows[0] if name != "task"}
        return {**both, "task": list(tasks)}

    def send_actions(self, actions):
        assert actions.shape == (2, 7)
        self.n_actions += 1


def test_episodes_of_several_robots(demo_policy, tmp_path, monkeypatch):
    policy, preprocessor, postprocessor = demo_policy(num_inference_steps=2)
    (block,) = (block for block in BLOCKS if "recording.episodes" in block)
    monkeypatch.chdir(tmp_path)
    names = {
        "policy": policy,
        "robots": Robots(),
        "preprocessor": preprocessor,
        "postprocessor": postprocessor,
    }
    exec(compile(block, "recipes.md", "exec"), names)
    soup, milk = open_run("fleet")
    for episode in (soup, milk):
        assert (episode.is_complete, episode.n_frames, len(episode.videos)) == (True, 20, 2)
        np.testing.assert_array_equal(
            episode.dataset.frame_query, np.arange(20) % policy.config.n_action_steps
        )
        prompt = "".join(episode.dataset.token_text.values[0].tolist())
        assert episode.task.split()[-1] in prompt.replace(" ", "")
    assert not np.array_equal(soup.dataset.action, milk.dataset.action)


def test_the_explorer_serves_what_was_recorded(demo_policy, tmp_path):
    """`lerobot-attn view` on a loop's own folder: maps, words, pictures; no reward that was not told."""
    from test_explorer import client_of, values

    policy, preprocessor, postprocessor = demo_policy(num_inference_steps=2)
    robot = Robot()
    with (
        record_episodes(
            policy, tmp_path, AttentionConfig(layers=[-1]), fps=20, preprocessor=preprocessor
        ) as run,
        run.episode(task="pick up the soup") as episode,
    ):
        for frame in range(12):
            seen = robot.get_observation()
            action = postprocessor(policy.select_action(preprocessor(seen)))[0]
            episode.step(seen, action, from_chunk=frame != 5)
            robot.send_action(action)
    (stored,) = open_run(tmp_path)
    data = stored.arrays
    with client_of(tmp_path) as client:
        (row,) = client.get("/api/run").json()["episodes"]
        assert (row["n_frames"], row["success"], row["task"]) == (12, None, "pick up the soup")
        at = f"/api/episodes/{row['id']}"
        facts = client.get(at).json()
        at = f"{at}/{facts['version']}"
        assert facts["layers"] == data["layer"].values.tolist()
        slab = values(client.get(f"{at}/inferences/0/maps/1/{facts['layers'][0]}"))
        np.testing.assert_array_equal(slab, data["suffix_attention"].values[0, 1, 0])
        table = client.get(f"{at}/timeline").json()
        assert table["reward"] is None
        assert table["success"] is None
        assert table["frame_action"] == [-1 if frame == 5 else frame % 10 for frame in range(12)]
        found = client.get(f"{at}/inferences/0/tokens").json()
        words = [group["label"] for group in found["groups"] if group["kind"] == "task"]
        assert words == ["pick", "up", "the", "soup"]
        assert sum(group["kind"] == "state" for group in found["groups"]) == 8
        for camera in facts["cameras"]:
            assert camera["has_video"] == (camera["name"] in stored.videos)
        assert sum(camera["has_video"] for camera in facts["cameras"]) == 2
        picture = client.get(f"{at}/cameras/{facts['cameras'][0]['name']}/frames/11.jpg")
        assert picture.status_code == 200


def test_maps_are_taken_as_arrays(demo_policy):
    policy, preprocess, _ = demo_policy(num_inference_steps=2)
    (block,) = (block for block in BLOCKS if "AttentionPolicy" in block)
    names = {"policy": policy, "batch": preprocess(observation())}
    exec(compile(block, "README.md", "exec"), names)
    suffix = names["record"].suffix_attention
    assert suffix.ndim == 6
    assert suffix.sum(axis=-1) == pytest.approx(1, abs=2e-3)
    assert set(names["policy"].get_attention_maps(last_n_layers=2)[0]) == {
        "time",
        "prefix_len",
        "suffix_len",
        "attention_weights",
    }


def test_a_policy_that_cannot_look_at_a_camera(demo_policy):
    policy, preprocess, _ = demo_policy(num_inference_steps=2)
    (block,) = (block for block in BLOCKS if "BlockAttention" in block)
    names = {"policy": policy, "batch": preprocess(observation())}
    exec(compile(block, "recipes.md", "exec"), names)
    (record,) = names["capture"].drain()  # of the last, the control
    first, second = (len(segment) for segment in record.layout.segments[:2])
    assert record.suffix_attention[..., :first].any()
    assert not record.suffix_attention[..., first : first + second].any()
    assert record.suffix_attention.sum(axis=-1) == pytest.approx(1, abs=2e-3)
    actions = names["actions"]
    effects = {name: float((chunk - actions["seeing"]).abs().max()) for name, chunk in actions.items()}
    assert effects.pop("seeing") == 0
    assert min(effects.values()) > 0
