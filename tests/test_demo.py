"""The demo policy: Pi0.5's token layout at a small size, loaded through LeRobot's own factory."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from lerobot_attn.errors import ConfigError, SetupError

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")
pytest.importorskip("transformers")

from lerobot.configs import PreTrainedConfig  # noqa: E402
from lerobot.envs.configs import LiberoEnv  # noqa: E402
from lerobot.policies.factory import make_policy, make_pre_post_processors  # noqa: E402
from lerobot.policies.pi05.modeling_pi05 import PI05Policy  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from lerobot_attn.demo.checkpoint import make_demo_checkpoint  # noqa: E402
from lerobot_attn.demo.configuration_pi05_tiny import PI05TinyConfig  # noqa: E402
from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy  # noqa: E402
from lerobot_attn.demo.processor_pi05_tiny import (  # noqa: E402
    DemoTokenizerProcessorStep,
    make_pi05_tiny_pre_post_processors,
)
from lerobot_attn.demo.tokenizer import (  # noqa: E402
    demo_tokenizer_json,
    libero_instructions,
    train_tokenizer,
    transformers_tokenizer,
    vocab_size,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libero") is None, reason="hf-libero is not installed"
)

CAMERA_TOKENS, TEXT_TOKENS, ACTION_TOKENS, HEADS, DENOISE_STEPS = 256, 200, 50, 8, 10
PREFIX = 3 * CAMERA_TOKENS + TEXT_TOKENS
EMPTY_CAMERA = slice(2 * CAMERA_TOKENS, 3 * CAMERA_TOKENS)


def load(directory: Path, **settings):
    """Return (policy, preprocessor, postprocessor) the way lerobot-eval makes them."""
    overrides = [f"--{name}={value}" for name, value in settings.items()]
    config = PreTrainedConfig.from_pretrained(directory, cli_overrides=overrides)
    config.pretrained_path = directory
    policy = make_policy(config, env_cfg=LiberoEnv()).eval()
    processors = make_pre_post_processors(
        config,
        pretrained_path=directory,
        preprocessor_overrides={
            "device_processor": {"device": str(policy.config.device)},
            "rename_observations_processor": {"rename_map": {}},
        },
    )
    return policy, *processors


def observation() -> dict:
    """Return a batch of one as LIBERO's environment processor hands it over: two cameras, state, task."""
    draw = torch.Generator().manual_seed(5)
    coarse = torch.rand(2, 1, 3, 8, 8, generator=draw)
    first, second = (torch.nn.functional.interpolate(image, size=(360, 360)) for image in coarse)
    return {
        "observation.images.image": first,
        "observation.images.image2": second,
        "observation.state": torch.tensor([[-0.1, 0.0, 0.9, 3.1, 0.0, 0.0, 0.03, -0.03]]),
        "task": ["pick up the black bowl on the stove and place it on the plate"],
    }


def attention_of(policy, batch) -> dict[tuple[str, int], list]:
    """Run one inference; return per (pass, layer) the weights its attention module gave, one entry a call."""
    seen = defaultdict(list)
    towers = policy.model.paligemma_with_expert
    passes = {"prefix": towers.paligemma.model.language_model, "suffix": towers.gemma_expert.model}
    handles = [
        layer.self_attn.register_forward_hook(
            lambda module, args, result, key=(name, index): seen[key].append(result[1])
        )
        for name, tower in passes.items()
        for index, layer in enumerate(tower.layers)
    ]
    try:
        torch.manual_seed(0)
        policy.predict_action_chunk(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_demo_checkpoint(tmp_path_factory.mktemp("demo") / "made" / "here", random=True)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint)


@pytest.fixture(scope="module")
def batch(loaded):
    return loaded[1](observation())


@pytest.fixture(scope="module")
def attention(loaded, batch):
    return attention_of(loaded[0], batch)


class TestCheckpoint:
    def test_lerobots_factory_loads_every_weight(self, checkpoint, loaded):
        policy = loaded[0]
        saved, live = load_file(checkpoint / "model.safetensors"), policy.state_dict()
        assert isinstance(policy, PI05TinyPolicy)
        assert isinstance(policy, PI05Policy)
        assert saved.keys() == live.keys()
        assert [key for key in saved if not torch.equal(saved[key], live[key])] == []

    def test_loading_is_not_just_the_same_seed_again(self, tmp_path, loaded, capsys):
        policy = copy.deepcopy(loaded[0])
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.25)
        policy.save_pretrained(tmp_path)
        again = PI05TinyPolicy.from_pretrained(tmp_path)
        printed = capsys.readouterr().out
        assert "All keys loaded successfully!" in printed
        assert "Warning" not in printed
        expected, got = policy.state_dict(), again.state_dict()
        # LeRobot loads Pi0.5's lm_head into embed_tokens: both must have been saved equal.
        assert [key for key in expected if not torch.equal(expected[key], got[key])] == []

    def test_config(self, checkpoint, loaded):
        written = json.loads((checkpoint / "config.json").read_text())
        assert written["type"] == "pi05_tiny"
        assert written["random_weights"] is True
        assert written["n_action_steps"] == 10
        assert loaded[0].config.random_weights is True
        assert list(loaded[0].config.image_features) == [
            "observation.images.image",
            "observation.images.image2",
            "observation.images.empty_camera_0",
        ]

    def test_settings_can_be_overridden(self, checkpoint):
        config = PreTrainedConfig.from_pretrained(checkpoint, cli_overrides=["--n_action_steps=5"])
        assert (config.n_action_steps, config.type) == (5, "pi05_tiny")

    def test_processors_normalise_with_liberos_ranges(self, loaded):
        _, preprocessor, postprocessor = loaded
        middle = observation() | {
            "observation.state": torch.tensor([[-0.1, 0, 0.65, 2.45, 0, 0, 0.02, -0.02]])
        }
        state = preprocessor(middle)["observation.state"]
        torch.testing.assert_close(state, torch.zeros(1, 8), atol=1e-5, rtol=0)
        largest = postprocessor(torch.ones(1, 7))
        assert largest.shape == (1, 7)
        assert bool((largest > 0).all())
        assert bool((largest <= 1).all())
        assert largest[0, -1] == 1.0  # the gripper can open and close

    def test_same_seed_same_bytes(self, checkpoint, tmp_path):
        again = make_demo_checkpoint(tmp_path / "again", random=True, seed=0)
        other = make_demo_checkpoint(tmp_path / "other", random=True, seed=1)
        for name in ("model.safetensors", "config.json", "policy_preprocessor.json"):
            assert (again / name).read_bytes() == (checkpoint / name).read_bytes(), name
        assert (other / "model.safetensors").read_bytes() != (checkpoint / "model.safetensors").read_bytes()
        assert json.loads((other / "config.json").read_text())["init_seed"] == 1

    def test_global_random_state_is_untouched(self, tmp_path):
        def states():
            return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

        torch.manual_seed(3)
        before = states()
        make_demo_checkpoint(tmp_path / "new", random=True, seed=11)
        assert states() == before

    def test_moved_checkpoint_loads_and_acts_the_same(self, checkpoint, loaded, tmp_path):
        first = make_demo_checkpoint(tmp_path / "first", random=True)
        moved = first.rename(tmp_path / "moved")
        for path in moved.glob("*.json"):
            assert str(tmp_path) not in path.read_text(), path.name
        actions = []
        for policy, preprocessor, postprocessor in (loaded, load(moved)):
            policy.reset()
            torch.manual_seed(0)
            actions.append(postprocessor(policy.select_action(preprocessor(observation()))))
        assert torch.equal(*actions)

    def test_needs_no_import_of_the_demo_beforehand(self, checkpoint):
        """A pipeline imports the tokenizer step by its path; nothing registers it."""
        steps = json.loads((checkpoint / "policy_preprocessor.json").read_text())["steps"]
        step = next(step for step in steps if "tokenizer_json" in step["config"])
        assert "registry_name" not in step
        assert step["class"] == "lerobot_attn.demo.processor_pi05_tiny.DemoTokenizerProcessorStep"

    def test_overwrite_replaces_its_own_files_only(self, tmp_path):
        target = tmp_path / "used"
        target.mkdir()
        (target / "notes.txt").write_text("mine")
        (target / "config.json").write_text("old")
        with pytest.raises(SetupError, match="got a directory with files in it"):
            make_demo_checkpoint(target, random=True)
        make_demo_checkpoint(target, random=True, overwrite=True)
        assert (target / "notes.txt").read_text() == "mine"
        assert json.loads((target / "config.json").read_text())["type"] == "pi05_tiny"
        assert [path.name for path in target.iterdir() if path.name.startswith(".")] == []

    def test_paths_that_cannot_be_used(self, tmp_path):
        (tmp_path / "file").write_text("")
        for path, got in (("file", "got a file"), ("file/below", "got Not a directory")):
            with pytest.raises(SetupError, match=got) as caught:
                make_demo_checkpoint(tmp_path / path, random=True)
            assert "\n" not in str(caught.value)
        assert (tmp_path / "file").read_text() == ""

    def test_libero_not_installed(self, tmp_path, monkeypatch):
        demo_tokenizer_json.cache_clear()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SetupError, match=r"pip install 'lerobot_policy_attn\[eval\]'"):
            make_demo_checkpoint(tmp_path / "new", random=True)
        assert list(tmp_path.iterdir()) == []


class TestTokenLayout:
    def test_attention_shapes(self, attention, loaded):
        depth = loaded[0].config.depth
        assert sorted(attention) == sorted((name, i) for name in ("prefix", "suffix") for i in range(depth))
        for (name, _), maps in attention.items():
            expected = {
                "prefix": [(1, HEADS, PREFIX, PREFIX)],
                "suffix": [(1, HEADS, ACTION_TOKENS, PREFIX + ACTION_TOKENS)] * DENOISE_STEPS,
            }[name]
            assert [tuple(weights.shape) for weights in maps] == expected

    def test_masked_tokens_get_nothing(self, attention, batch):
        padding = ~batch["observation.language.attention_mask"][0]
        assert 100 < int(padding.sum()) < 180
        for (name, _), maps in attention.items():
            if name == "suffix":
                for weights in maps:
                    torch.testing.assert_close(weights.sum(-1), torch.ones(1, HEADS, ACTION_TOKENS))
                    assert weights[..., EMPTY_CAMERA].max() == 0
                    assert weights[..., 3 * CAMERA_TOKENS : PREFIX][..., padding].max() == 0

    def test_attention_is_worth_looking_at(self, attention):
        """Peaked, in every segment, and different between heads, layers, denoise steps and action tokens."""
        layers = [torch.cat(maps) for (name, _), maps in sorted(attention.items()) if name == "suffix"]
        weights = torch.stack(layers)  # (layer, denoise_step, head, query, key)
        keys = weights.shape[-1]
        strongest = weights.amax(-1).mean((1, 3))  # (layer, head)
        assert strongest.min() > 10 / keys
        assert strongest.max() < 0.8
        for start, stop in ((0, 256), (256, 512), (768, 968), (968, 1018)):
            assert weights[..., start:stop].sum(-1).mean() > 0.01

        def apart(first, second):  # total variation distance, 0 to 1
            return float((first - second).abs().sum(-1).mean() / 2)

        assert apart(weights[0], weights[-1]) > 0.3
        assert apart(weights[:, :, 0], weights[:, :, 1]) > 0.3
        assert apart(weights[:, 0], weights[:, 1]) > 0.1
        assert apart(weights[:, 0], weights[:, -1]) > 0.3
        assert apart(weights[:, -1, :, 0], weights[:, -1, :, 20]) > 0.1

    def test_attention_follows_the_image(self, loaded, batch, attention):
        other = dict(batch)
        other["observation.images.image"] = batch["observation.images.image"].flip(-1)
        changed = attention_of(loaded[0], other)
        first, second = attention["suffix", 0][0][..., :256], changed["suffix", 0][0][..., :256]
        assert float((first - second).abs().sum() / first.sum()) > 0.2

    def test_actions_are_small_and_not_still(self, loaded, batch):
        policy = loaded[0]
        torch.manual_seed(0)
        chunk = policy.predict_action_chunk(batch)[0]
        assert chunk.shape == (ACTION_TOKENS, 7)
        assert chunk.abs().max() < 1.0
        assert 0.02 < chunk.mean(0).abs().max() < 0.6
        assert chunk.std(0).max() < 0.35  # what is left of the noise

    def test_ten_actions_are_executed_of_a_chunk(self, loaded, batch, monkeypatch):
        policy = loaded[0]
        policy.reset()
        asked = []
        predict = policy.predict_action_chunk
        monkeypatch.setattr(policy, "predict_action_chunk", lambda b: asked.append(1) or predict(b))
        for _ in range(11):
            policy.select_action(batch)
        assert len(asked) == 2

    def test_about_as_small_as_promised(self, loaded):
        assert sum(parameter.numel() for parameter in loaded[0].parameters()) < 1_000_000


class TestVariants:
    def test_bfloat16(self, checkpoint, capsys):
        policy, preprocessor, _ = load(checkpoint, dtype="bfloat16")
        seen = attention_of(policy, preprocessor(observation()))
        assert "All keys loaded successfully!" in capsys.readouterr().out
        assert policy.model.paligemma_with_expert.gemma_expert.model.layers[0].mlp.up_proj.weight.dtype == (
            torch.bfloat16
        )
        for maps in seen.values():
            assert all(weights.dtype == torch.bfloat16 and weights.isfinite().all() for weights in maps)
        torch.manual_seed(0)
        assert policy.predict_action_chunk(preprocessor(observation())).isfinite().all()

    def test_compile_model_constructs(self, checkpoint, loaded, batch):
        precision = torch.get_float32_matmul_precision()  # Pi0.5 sets it when it compiles
        try:
            policy, _, _ = load(checkpoint, compile_model="true")
        finally:
            torch.set_float32_matmul_precision(precision)
        assert {"sample_actions", "forward"} <= vars(
            policy.model
        ).keys()  # wrapped, compiled at the first call
        # They were wrapped before the small towers came: they must run this very model.
        chunks = []
        for model in (loaded[0], policy):
            torch.manual_seed(0)
            with torch.compiler.set_stance("force_eager"):
                chunks.append(model.predict_action_chunk(batch))
        assert torch.equal(*chunks)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_training_step(self, checkpoint, batch, dtype):
        policy, _, _ = load(checkpoint, dtype=dtype, gradient_checkpointing="true")
        assert policy.model.gradient_checkpointing_enabled
        policy.train()
        loss, _ = policy.forward(batch | {"action": torch.zeros(1, ACTION_TOKENS, 7)})
        loss.backward()
        assert loss.isfinite()
        for name, parameter in policy.named_parameters():
            if "lm_head" not in name and "paligemma.model.language_model.norm" not in name:
                if "language_model.layers.3" in name and (
                    "o_proj" in name or "mlp" in name or "post" in name
                ):
                    continue  # Pi0.5 reads only keys and values of the VLM's last layer
                assert parameter.grad is not None, name

    def test_lora(self, loaded, batch):
        peft = pytest.importorskip("peft")
        policy = copy.deepcopy(loaded[0])
        settings = peft.LoraConfig(r=2, **policy._get_default_peft_targets())
        wrapped = peft.get_peft_model(policy, settings)
        assert any("lora_A" in name for name, _ in wrapped.named_parameters())
        torch.manual_seed(0)
        adapted = wrapped.predict_action_chunk(batch)
        torch.manual_seed(0)
        torch.testing.assert_close(
            adapted, loaded[0].predict_action_chunk(batch)
        )  # a new LoRA changes nothing

    def test_a_new_policy_needs_no_checkpoint(self):
        config = PI05TinyConfig(device="cpu")
        policy = make_policy(config, env_cfg=LiberoEnv())
        assert isinstance(policy, PI05TinyPolicy)
        processors = make_pre_post_processors(config, dataset_stats=None)
        assert any(isinstance(step, DemoTokenizerProcessorStep) for step in processors[0].steps)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"depth": 0}, "policy.depth is 0"),
            ({"width": 16}, "at least policy.max_action_dim = 32"),
            ({"head_dim": 15}, "policy.head_dim 15"),
            ({"vision_width": 30}, "a multiple of policy.vision_heads"),
        ],
    )
    def test_sizes_that_do_not_fit(self, settings, message):
        with pytest.raises(ConfigError, match=message) as caught:
            PI05TinyConfig(device="cpu", **settings)
        assert "\n" not in str(caught.value)

    def test_vocabulary_smaller_than_the_tokenizer(self):
        with pytest.raises(ConfigError, match=r"raise policy\.vocab_size"):
            make_pi05_tiny_pre_post_processors(PI05TinyConfig(device="cpu", vocab_size=300))


class TestTokenizer:
    def test_reads_all_of_liberos_instructions(self):
        instructions = libero_instructions()
        assert len(instructions) == 112  # LIBERO's 130 tasks share some
        assert "turn on the stove and put the moka pot on it" in instructions  # KITCHEN_SCENE3_…
        assert not [text for text in instructions if "SCENE" in text or "_" in text or text != text.strip()]

    def test_decodes_what_it_encoded(self):
        tokenizer = transformers_tokenizer(demo_tokenizer_json())
        prompts = [f"Task: {text}, State: 0 12 255 -1;\nAction: " for text in libero_instructions()]
        for text in [*prompts, *libero_instructions(), "Grüße  an 日本\t\n\n 🦾", "a<b", ""]:
            assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text

    def test_instructions_are_whole_words(self):
        tokenizer = Tokenizer.from_str(demo_tokenizer_json())
        for text in libero_instructions():
            pieces = tokenizer.encode("Task: " + text).tokens
            assert pieces[:3] == ["<bos>", "Task", ":"]
            assert "".join(pieces[3:]) == "▁" + text.replace(" ", "▁")
            assert len(pieces[3:]) == len(text.split())

    def test_digits_newline_and_padding(self, batch, loaded):
        step = next(step for step in loaded[1].steps if isinstance(step, DemoTokenizerProcessorStep))
        ids = batch["observation.language.tokens"][0]
        mask = batch["observation.language.attention_mask"][0]
        assert ids.shape == (TEXT_TOKENS,)
        count = int(mask.sum())
        assert bool(mask[:count].all())  # padding lies on the right
        pieces = step.input_tokenizer.convert_ids_to_tokens(ids[:count].tolist())
        assert pieces[0] == "<bos>"
        assert pieces[-5:] == [";", "\n", "Action", ":", "▁"]
        colon = pieces.index("State") if "State" in pieces else pieces.index("▁State")
        state = pieces[colon + 2 : -5]
        assert set(state) <= {"▁", *"0123456789"}
        assert len("".join(state).split("▁")[1:]) == 8
        assert ids[count:].unique().tolist() == [step.input_tokenizer.pad_token_id]

    def test_training_is_deterministic(self):
        instructions = libero_instructions()
        assert train_tokenizer(instructions).to_str() == train_tokenizer(instructions[::-1]).to_str()
        assert vocab_size(demo_tokenizer_json()) <= PI05TinyConfig(device="cpu").vocab_size

    def test_step_without_a_tokenizer(self):
        with pytest.raises(ConfigError, match="got no tokenizer_json"):
            DemoTokenizerProcessorStep()


def test_package_imports_neither_torch_nor_lerobot():
    code = (
        "import sys, lerobot_attn.demo, lerobot_attn.demo.checkpoint, lerobot_attn.demo.tokenizer;"
        "print({'torch', 'lerobot', 'transformers', 'tokenizers', 'libero'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


class TestOtherFamilies:
    @pytest.mark.parametrize("policy_type", ["pi0_tiny", "smolvla_tiny"])
    def test_the_command_writes_random_weights_and_says_so(self, policy_type, tmp_path):
        from typer.testing import CliRunner

        from lerobot_attn.cli import app

        done = CliRunner().invoke(app, ["demo-policy", str(tmp_path / "made"), "--type", policy_type])
        assert done.exit_code == 0, done.output
        said = " ".join(done.output.split())
        assert f"policy type {policy_type}, random weights, so its attention maps mean nothing" in said
        written = json.loads((tmp_path / "made" / "config.json").read_text())
        assert (written["type"], written["random_weights"]) == (policy_type, True)

    def test_moved_checkpoints_load_and_act_the_same(self, tmp_path):
        actions = []
        first = make_demo_checkpoint(tmp_path / "first", policy_type="smolvla_tiny", random=True, seed=4)
        for place in (first, tmp_path / "moved"):
            if place != first:
                first.rename(place)
            policy, preprocessor, postprocessor = load(place)
            policy.reset()
            torch.manual_seed(0)
            actions.append(postprocessor(policy.select_action(preprocessor(observation()))))
        assert torch.equal(*actions)

    def test_what_there_is_not(self, tmp_path):
        with pytest.raises(SetupError, match=r"no demo policy of type 'act_tiny': expected one of pi05"):
            make_demo_checkpoint(tmp_path / "new", policy_type="act_tiny", random=True)
        with pytest.raises(SetupError, match="only pi05_tiny comes with trained weights; ask for"):
            make_demo_checkpoint(tmp_path / "new", policy_type="pi0_tiny")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("policy_type", ["pi0_tiny", "smolvla_tiny"])
    def test_training_step(self, policy_type, tmp_path):
        """LeRobot's own training code runs on them, so that they can be trained one day."""
        checkpoint = make_demo_checkpoint(tmp_path / "new", policy_type=policy_type, random=True)
        policy, preprocessor, _ = load(checkpoint)
        policy.train()
        loss, _ = policy.forward(preprocessor(observation()) | {"action": torch.zeros(1, ACTION_TOKENS, 7)})
        loss.backward()
        assert loss.isfinite()
        assert policy.model.state_proj.weight.grad.abs().max() > 0
