"""What tests share: no network, a headless renderer and browser, the gate before LIBERO, the demo policy."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything imports mujoco or huggingface_hub, which read them once.
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Some virtual machines announce AMX and end a process that uses it; torch would, for bfloat16.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

REQUIRE_LIBERO = "LEROBOT_ATTN_REQUIRE_LIBERO"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("libero") and isinstance(item, pytest.Function):
            # First, so that no other fixture starts a simulation that cannot run.
            item.fixturenames[:] = ["libero_ready", *(n for n in item.fixturenames if n != "libero_ready")]
        if item.get_closest_marker("browser"):
            # On busy cores a browser may be slower than any patience. What is wrong is wrong each time;
            # earlier failures are shown as RERUN.
            item.add_marker(pytest.mark.flaky(reruns=2))


@pytest.fixture(scope="session")
def libero_ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of LIBERO's assets, with its config file in place and rendering tried.

    Skips when something is missing; fails instead when LEROBOT_ATTN_REQUIRE_LIBERO=1.
    """
    reason = _why_libero_cannot_run()
    if reason:
        if os.environ.get(REQUIRE_LIBERO) == "1":
            pytest.fail(f"{REQUIRE_LIBERO}=1, but {reason}", pytrace=False)
        pytest.skip(reason)

    from lerobot_attn.machine.libero import assets_state, config_path, write_libero_config

    if not config_path().exists():
        # Of the whole session, child processes too; the person's own folder stays as it is.
        os.environ["LIBERO_CONFIG_PATH"] = str(tmp_path_factory.mktemp("libero_config"))
        write_libero_config()
    return assets_state().folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium, of a module: Playwright keeps an event loop running, in the way of others' own."""
    from browser import started

    with started() as browser:
        yield browser


@pytest.fixture
def pages(chromium: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Opens pages in the browser; the test fails if their consoles say anything."""
    from browser import Pages

    opened = Pages(chromium, request.node.name)
    yield opened
    opened.close()
    assert not opened.said, "the console is not empty"


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy the run that an episode is of, for a test to change: the episode → its path in the copy."""

    def copy(episode: Path) -> Path:
        run = episode.parents[2]
        return shutil.copytree(run, tmp_path / "run") / episode.relative_to(run)

    return copy


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, without LIBERO's files."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    return folder


def _why_libero_cannot_run() -> str:
    import importlib.util

    from lerobot_attn.machine.doctor import check_rendering
    from lerobot_attn.machine.libero import assets_state

    if importlib.util.find_spec("libero") is None:
        return "libero is not installed; pip install 'lerobot_policy_attn[eval]'"
    state = assets_state()
    if not state.complete:
        return (
            f"LIBERO's assets in {state.folder} lack {', '.join(state.missing)}; "
            "lerobot-attn setup-libero --assets ARCHIVE_OR_FOLDER"
        )
    check = check_rendering()
    return f"{check.detail}; {check.remedy}" if check.status == "failed" else ""


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a demo checkpoint."""
    from lerobot_attn.demo.checkpoint import make_demo_checkpoint

    return make_demo_checkpoint(tmp_path_factory.mktemp("demo") / "pi05_tiny", random=True)


@pytest.fixture(scope="session")
def demo_policy(demo_checkpoint: Path) -> Callable[..., tuple[Any, Any, Any]]:
    """Load the demo checkpoint as lerobot-eval does: settings → (policy, preprocessor, postprocessor)."""
    return functools.partial(_load, demo_checkpoint)


@pytest.fixture(scope="session")
def pi0_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a demo checkpoint of type pi0_tiny."""
    return _random_checkpoint(tmp_path_factory, "pi0_tiny")


@pytest.fixture(scope="session")
def pi0_policy(pi0_checkpoint: Path) -> Callable[..., tuple[Any, Any, Any]]:
    """Load it as lerobot-eval does: settings → (policy, preprocessor, postprocessor)."""
    return functools.partial(_load, pi0_checkpoint)


@pytest.fixture(scope="session")
def smolvla_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a demo checkpoint of type smolvla_tiny."""
    return _random_checkpoint(tmp_path_factory, "smolvla_tiny")


@pytest.fixture(scope="session")
def smolvla_policy(smolvla_checkpoint: Path) -> Callable[..., tuple[Any, Any, Any]]:
    """Load it as lerobot-eval does: settings → (policy, preprocessor, postprocessor)."""
    return functools.partial(_load, smolvla_checkpoint)


@pytest.fixture(scope="session")
def fast_policy() -> Callable[..., Any]:
    """Make a small Pi0-FAST without the Hub: settings → policy."""
    from fast_policy import make_policy

    return make_policy


@pytest.fixture(scope="session")
def xvla_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any, Any]]:
    """Make a small X-VLA of LeRobot's own code: settings → (policy, preprocessor, postprocessor).

    Its weights are random but peaked, so that mixed-up indices show; its tokenizer writes prompts as BART's.
    """
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("xvla") / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=_bart_tokenizer(),
        **{f"{name}_token": token for name, token in zip(("bos", "pad", "eos", "unk"), _BART, strict=True)},
    ).save_pretrained(folder)
    return functools.partial(_xvla, str(folder))


_BART = ("<s>", "<pad>", "</s>", "<unk>")  # BART's ids 0 to 3


def _bart_tokenizer() -> Any:
    """A tokenizer in BART's manner: pieces with their leading blank, `<s>` before and `</s>` after."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["put the bowl on the plate", "open the drawer and turn on the stove"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(_BART), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def _xvla(
    tokenizer: str,
    cameras: tuple[str, ...] = ("observation.images.top", "observation.images.wrist"),
    policy_class: Any = None,
    encoder_heads: int = 4,
    vision: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Any, Any, Any]:
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
    from lerobot.policies.xvla.processor_xvla import make_xvla_pre_post_processors

    policy_class = policy_class or XVLAPolicy
    florence = {
        "vision_config": {
            "embed_dim": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_heads": [2, 2, 2, 2],
            "num_groups": [2, 2, 2, 2],
            "window_size": 4,
            "projection_dim": 32,
            **(vision or {}),
        },
        "text_config": {
            "model_type": "bart",
            "vocab_size": 320,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": encoder_heads,
            "decoder_attention_heads": encoder_heads,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 256,
        },
    }
    torch.manual_seed(0)
    config = policy_class.config_class(
        **{
            "device": "cpu",
            "florence_config": florence,
            "tokenizer_name": tokenizer,
            "tokenizer_max_length": 24,
            "hidden_size": 32,
            "depth": 3,
            "num_heads": 4,
            "num_domains": 3,
            "len_soft_prompts": 5,
            "dim_time": 8,
            "action_mode": "auto",
            "num_denoising_steps": 4,
            "max_state_dim": 8,
            "chunk_size": 10,
            "n_action_steps": 4,
            "input_features": {
                **{name: PolicyFeature(FeatureType.VISUAL, (3, 96, 128)) for name in cameras},
                "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
            },
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (6,))},
            **settings,
        }
    )
    policy = policy_class(config).eval()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight *= 15
            if name.endswith("attn.qkv.weight"):
                weight *= 2
            if name.endswith(("pos_emb", "soft_prompt_hub.weight")):
                weight *= 20
    return policy, *make_xvla_pre_post_processors(config)


def _random_checkpoint(tmp_path_factory: pytest.TempPathFactory, policy_type: str) -> Path:
    from lerobot_attn.demo.checkpoint import make_demo_checkpoint

    folder = tmp_path_factory.mktemp("demo") / policy_type
    return make_demo_checkpoint(folder, policy_type=policy_type, random=True)


def _load(checkpoint: Path, **settings: Any) -> tuple[Any, Any, Any]:
    from lerobot.configs import PreTrainedConfig
    from lerobot.envs.configs import LiberoEnv
    from lerobot.policies.factory import make_policy, make_pre_post_processors

    import lerobot_attn.plugin

    lerobot_attn.plugin.load()  # registers the demo policies
    overrides = [f"--{name}={value}" for name, value in settings.items()]
    config = PreTrainedConfig.from_pretrained(checkpoint, cli_overrides=overrides)
    config.pretrained_path = checkpoint
    policy = make_policy(config, env_cfg=LiberoEnv()).eval()
    return policy, *make_pre_post_processors(config, pretrained_path=str(checkpoint))
