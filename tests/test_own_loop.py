"""Examples of one's own loop, in README and docs, run as they are printed, with the demo policy."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## Record your own loop")[1].split("\n## ")[0]
RECIPES = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", SECTION + RECIPES, re.MULTILINE | re.DOTALL)


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

    from lerobot_attn import open_run
    from lerobot_attn.cli import app
    from lerobot_attn.explorer.library import Library

    policy, preprocessor, postprocessor = demo_policy(num_inference_steps=2)
    robot = Robot()
    (block,) = (block for block in BLOCKS if "record_episodes" in block)
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


def test_a_probe_blocks_a_camera(demo_policy):
    policy, preprocess, _ = demo_policy(num_inference_steps=2)
    (block,) = (block for block in BLOCKS if "probes=" in block)
    noise = torch.randn(1, policy.config.chunk_size, policy.config.max_action_dim)
    names = {"policy": policy, "batch": preprocess(observation()), "noise": noise}
    exec(compile(block, "recipes.md", "exec"), names)
    (record,) = names["capture"].drain()
    assert not record.suffix_attention[..., : len(record.layout.segments[0])].any()
    assert record.suffix_attention.sum(axis=-1) == pytest.approx(1, abs=2e-3)
    assert (names["blind"] - names["seeing"]).abs().max() > 0
