"""The trained demo policy: its files, what it does in LIBERO, and where it looks meanwhile."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("lerobot")

SCRIPTS = Path(__file__).parent.parent / "scripts" / "demo"
sys.path.append(str(SCRIPTS))

from lerobot_attn.demo import trained  # noqa: E402
from lerobot_attn.demo.checkpoint import make_demo_checkpoint  # noqa: E402
from lerobot_attn.errors import SetupError  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_demo_checkpoint(tmp_path_factory.mktemp("trained") / "pi05_tiny")


class TestCheckpoint:
    def test_says_that_it_was_trained(self, checkpoint):
        config = json.loads((checkpoint / "config.json").read_text())
        assert config["type"] == "pi05_tiny"
        assert config["random_weights"] is False
        assert config["remark"] == trained.REMARK
        assert "trained in simulation" in trained.REMARK
        assert (config["n_action_steps"], config["num_inference_steps"]) == (10, 10)

    def test_card_comes_along(self, checkpoint):
        card = (checkpoint / "README.md").read_text()
        for words in (
            "patch",
            "flow matching",
            "steps",
            "hours",
            "success",
            "pointing game",
            "chance",
            "limits",
        ):
            assert words in card.lower(), words

    def test_the_weights_are_small_and_whole(self, checkpoint):
        from safetensors.torch import load_file

        files = list(trained.WEIGHTS.glob("*.safetensors"))
        assert sum(path.stat().st_size for path in files) <= 4_000_000
        saved = load_file(checkpoint / "model.safetensors")
        packed = load_file(trained.WEIGHTS / f"{trained.DEFAULT}.safetensors")
        assert set(saved) == set(packed) | set(trained.HEADS)
        assert all((saved[name] == packed[name].float()).all() for name in packed)

    def test_moved_and_without_libero_it_loads_and_acts(self, tmp_path, monkeypatch):
        """Its tokenizer comes with the weights: neither LIBERO nor a network is needed."""
        import importlib.util

        import torch
        from lerobot.policies.factory import make_pre_post_processors

        from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy

        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == "libero" else find(name, *rest)
        )
        made = make_demo_checkpoint(tmp_path / "here")
        monkeypatch.undo()
        moved = made.rename(tmp_path / "there")
        policy = PI05TinyPolicy.from_pretrained(moved)
        before, after = make_pre_post_processors(policy.config, pretrained_path=str(moved))
        image = torch.zeros((1, 3, 360, 360))
        batch = {
            "observation.images.image": image,
            "observation.images.image2": image,
            "observation.state": torch.zeros((1, 8)),
            "task": ["pick up the milk and place it in the basket"],
        }
        action = after(policy.select_action(before(batch)))
        assert action.shape == (1, 7)
        assert torch.isfinite(action).all()

    def test_each_variant_says_what_it_is(self, tmp_path):
        remarks = set()
        for variant in trained.VARIANTS:
            made = make_demo_checkpoint(tmp_path / variant, variant=variant)
            config = json.loads((made / "config.json").read_text())
            assert config["remark"].startswith(trained.REMARK)
            remarks.add(config["remark"])
        assert len(remarks) == len(trained.VARIANTS) == 2
        assert "low or high" in config["remark"]

    def test_a_variant_that_is_not_there(self, tmp_path):
        with pytest.raises(SetupError, match="no trained demo policy 'pi06'") as caught:
            make_demo_checkpoint(tmp_path / "new", variant="pi06")
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.libero
class TestInSimulation:
    def test_it_lifts_the_named_object_and_no_other(self, checkpoint, libero_ready):
        """Layouts that no training frame shows; it lifts 94 to 100 %, so of five two may fail by chance."""
        import evaluate
        import scene

        trials = [evaluate.Trial("named", 0, 100 + i, name) for i, name in enumerate(NAMED)]
        try:
            outcomes = [evaluate.run(checkpoint, trial) for trial in trials]
        finally:
            scene.close_scenes()
        for trial, outcome in zip(trials, outcomes, strict=True):
            assert outcome.reached == trial.name, (trial, outcome)
            assert set(outcome.lifted) <= {trial.name}, (trial, outcome)
        assert sum(bool(outcome.lifted) for outcome in outcomes) >= 3, outcomes

    def test_another_word_in_the_same_scene_moves_the_map(
        self, checkpoint, libero_ready, tmp_path, monkeypatch
    ):
        """Of four objects named in turn (examples/prompt_swap.py), three or four get a patch of their own."""
        import numpy as np

        from lerobot_attn import analysis, open_run

        monkeypatch.syspath_prepend(str(SCRIPTS.parent.parent / "examples"))
        import prompt_swap

        monkeypatch.setattr(prompt_swap, "N_FRAMES", 1)
        prompt_swap.main(str(checkpoint), tmp_path, [0])
        run = open_run(tmp_path)
        assert [
            name in episode.task for episode, name in zip(run, prompt_swap.SCENES[0], strict=True)
        ] == 4 * [True]
        maps = [analysis.image_heatmap(episode.arrays, "image", frame=0, layer=-1).values for episode in run]
        patches = np.array([np.unravel_index(each.argmax(), each.shape) for each in maps])
        apart = [np.abs(patches - patch).max(1) > 1 for patch in patches]
        assert sum(others.sum() == 3 for others in apart) >= 3, patches

    def test_it_looks_at_the_named_object_far_more_often_than_chance(self, checkpoint, libero_ready):
        import grounding
        import numpy as np

        looks = [look for look in grounding.grounding(checkpoint, [0], 24) if look.layers == grounding.ALL]
        assert len(looks) >= 16
        assert np.mean([look.hit_chance for look in looks]) < 0.08
        assert np.mean([look.hit for look in looks]) > 0.5
        several = [look for look in looks if look.most is not None]
        chance = np.mean([look.most_chance for look in several])
        assert np.mean([look.most for look in several]) > chance + 0.3


NAMED = ("alphabet_soup", "milk", "tomato_sauce", "salad_dressing", "milk")


@pytest.mark.libero
def test_the_whole_training_in_miniature(libero_ready, tmp_path):
    """Every stage runs from nothing but LIBERO's assets; a second run finds all of it done."""
    command = [
        sys.executable,
        SCRIPTS / "train.py",
        "--config-name=miniature",
        f"folder={tmp_path / 'out'}",
    ]

    def run():
        return subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=1800,
            env=dict(os.environ),
            cwd=tmp_path,
        )

    first = run()
    assert first.returncode == 0, first.stderr[-3000:]
    out = tmp_path / "out"
    assert (out / "checkpoint" / "model.safetensors").is_file()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"frames", "vision", "cloning", "dagger-1", "evaluation"} <= {line["stage"] for line in lines}
    shards = {path: path.stat().st_mtime_ns for path in out.glob("frames/*.npz")}
    assert len(shards) == 4  # two kinds, two tasks
    weights = (out / "checkpoint" / "model.safetensors").read_bytes()
    again = run()
    assert again.returncode == 0, again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in out.glob("frames/*.npz")} == shards
    assert (out / "checkpoint" / "model.safetensors").read_bytes() == weights


def test_training_without_libero_is_one_line(tmp_path):
    environment = {
        **os.environ,
        "LIBERO_CONFIG_PATH": str(tmp_path / "config"),
        "HOME": str(tmp_path),
    }
    (tmp_path / "config").mkdir()
    paths = {
        name: str(tmp_path / "nowhere" / name)
        for name in ("benchmark_root", "bddl_files", "init_states", "datasets", "assets")
    }
    (tmp_path / "config" / "config.yaml").write_text(json.dumps(paths))
    ran = subprocess.run(
        [sys.executable, SCRIPTS / "train.py", "--config-name=miniature", f"folder={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=tmp_path,
    )
    assert ran.returncode != 0
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, ran.stderr[-2000:]
    assert re.search(r"LIBERO.*setup\.sh", errors[0])
    assert "Traceback" not in ran.stderr
