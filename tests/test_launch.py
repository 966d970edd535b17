"""The Hydra app: what it composes is what lerobot-eval gets, and presets cost what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import ConfigError
from lerobot_attn.plugin.launch import eval_arguments

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "configs" / "capture").glob("*.yaml"))
SUITES = sorted(path.stem for path in (ROOT / "configs" / "env").glob("*.yaml"))


def compose(*overrides):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("eval", [*overrides, "output_dir=out"])
        return OmegaConf.to_container(config, resolve=True)


def test_composed_command():
    arguments = eval_arguments(
        compose(
            "env=libero_goal",
            "capture=final_step",
            "policy.path=CKPT",
            "eval.n_episodes=3",
            "env.task_ids=[1,2]",
        )
    )
    assert arguments == [
        "--policy.path=CKPT",
        "--env.type=libero",
        "--env.task=libero_goal",
        "--env.task_ids=[1,2]",
        "--eval.n_episodes=3",
        "--eval.save_attention_maps=true",
        "--eval.attention.layers=all",
        "--eval.attention.mean_layers=all",
        "--eval.attention.denoise_steps=[-1]",
        "--output_dir=out",
        "--seed=1000",
    ]


def test_any_field_of_lerobots_config_can_be_added():
    arguments = eval_arguments(
        compose("policy.path=CKPT", "+policy.n_action_steps=5", "eval.use_async_envs=false", "~capture")
    )
    assert "--policy.n_action_steps=5" in arguments
    assert "--eval.use_async_envs=false" in arguments
    assert not any("attention" in argument for argument in arguments)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "policy.path: not given"),
        (["policy.path=CKPT", "+capture.layerz=all"], "capture: unknown key 'layerz'"),
        (["policy.path=CKPT", "capture.layers=last"], "layers: got 'last'"),
        (["policy.path=CKPT", "+sim=1"], "unknown section 'sim'"),
    ],
)
def test_bad_settings(overrides, message):
    with pytest.raises(ConfigError, match=message):
        eval_arguments(compose(*overrides))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_cost_what_they_say(preset):
    pytest.importorskip("torch")
    from lerobot_attn.capture import Selection
    from lerobot_attn.layout import Segment, TokenLayout
    from lerobot_attn.policies.base import PolicyDescription

    full_size = PolicyDescription(
        policy_type="pi05",
        n_layers=18,
        n_prefix_layers=18,
        n_heads=8,
        n_denoise_steps=10,
        chunk_size=50,
        n_action_steps=10,
    )
    text = preset.read_text()
    assert text.startswith("# Question: ")
    said_mb = float(re.search(r"full size: ([\d.]+) MB an inference", text)[1])
    selection = Selection.resolve(AttentionConfig.from_yaml(preset), full_size)
    segments = (Segment("language", "prefix", 0, 968), Segment("action", "action", 968, 1018))
    layout = TokenLayout(segments, 968, ())
    assert said_mb == round(selection.bytes_per_inference(layout) / 1e6, 1)


def test_the_presets_and_suites_are_there():
    assert [path.stem for path in PRESETS] == [
        "all_layers",
        "final_step",
        "last_two",
        "summary",
        "with_prefix",
    ]
    assert SUITES == ["libero_10", "libero_90", "libero_goal", "libero_object", "libero_spatial"]


def hydra_app(tmp_path, *arguments):
    """Run scripts/eval.py with a stand-in for lerobot-eval that prints its arguments."""
    package = tmp_path / "lerobot" / "scripts"
    package.mkdir(parents=True, exist_ok=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "lerobot_eval.py").write_text(
        "import sys\nprint('RAN', *sys.argv[1:])\nsys.exit('fail' in ' '.join(sys.argv) and 7)\n"
    )
    command = [sys.executable, str(ROOT / "scripts" / "eval.py"), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )


def test_app_prints_the_command_and_runs_it(tmp_path):
    result = hydra_app(tmp_path, "capture=summary", "policy.path=CKPT")
    assert result.returncode == 0, result.stderr
    printed = next(line for line in result.stdout.splitlines() if line.startswith("lerobot-eval "))
    ran = next(line for line in result.stdout.splitlines() if line.startswith("RAN "))
    assert printed.removeprefix("lerobot-eval ") == ran.removeprefix("RAN ")
    assert "--eval.attention.layers=none" in ran


def test_app_passes_on_a_failure(tmp_path):
    assert hydra_app(tmp_path, "policy.path=fail").returncode == 7
    result = hydra_app(tmp_path, "capture=summary")
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "error: policy.path: not given, expected a checkpoint's folder or Hub name; add policy.path=…"
    )


def test_app_sweeps(tmp_path):
    result = hydra_app(tmp_path, "-m", "env=libero_goal,libero_10", "capture=summary", "policy.path=CKPT")
    ran = [line for line in result.stdout.splitlines() if line.startswith("RAN ")]
    assert ["--env.task=libero_goal" in ran[0], "--env.task=libero_10" in ran[1]] == [True, True]
    folders = {word for line in ran for word in line.split() if word.startswith("--output_dir=")}
    assert len(folders) == 2
