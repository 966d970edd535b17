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
