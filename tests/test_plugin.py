"""The plugin inside lerobot-eval: never silently absent, and absent altogether when it is not asked for."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pprint
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("lerobot")

from forked import STOCK, Forked, run_code
from lerobot.configs.default import EvalConfig

from lerobot_attn import plugin
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import ConfigError
from lerobot_attn.policies.families import FAMILIES

ENV = ["--env.type=libero", "--env.task=libero_object", "--env.task_ids=[0]"]


class ReachedEnvironmentsError(Exception):
    """Everything before the environments went well."""


@pytest.fixture
def run_main(monkeypatch, demo_checkpoint):
    """Run LeRobot's `main` up to where it builds environments; return its config's printed form."""

    def run(*arguments, install=True, policy=None):
        spec = importlib.util.find_spec(plugin.EVAL_MODULE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        seen = []
        monkeypatch.setattr(
            sys, "argv", ["lerobot-eval", f"--policy.path={policy or demo_checkpoint}", *arguments]
        )
        module.register_third_party_plugins = lambda: install and plugin.install(vars(module))
        module.pformat = lambda value: seen.append(pprint.pformat(value)) or ""

        def make_env(*args, **kwargs):
            raise ReachedEnvironmentsError

        module.make_env = make_env
        try:
            module.main()
        except ReachedEnvironmentsError:
            return seen[0]
        raise AssertionError("did not come to the environments")

    return run


def error_of(run_main, capsys, *arguments, **options):
    with pytest.raises(SystemExit) as caught:
        run_main(*arguments, **options)
    code = caught.value.code
    message = code if isinstance(code, str) else capsys.readouterr().err
    assert code not in (0, None)
    return message


def test_without_the_flag_the_config_is_what_it_would_have_been(run_main, tmp_path):
    arguments = [*ENV, f"--output_dir={tmp_path}", "--eval.n_episodes=3", "--eval.batch_size=0"]
    assert run_main(*arguments) == run_main(*arguments, install=False)
    assert run_main(*arguments, "--eval.save_attention_maps=false") == run_main(*arguments, install=False)
    assert list(tmp_path.iterdir()) == []


def test_with_the_flag_lerobot_still_sees_its_own_config(run_main, tmp_path):
    arguments = [*ENV, f"--output_dir={tmp_path}", "--eval.n_episodes=3"]
    flags = ["--eval.save_attention_maps=true", "--eval.attention.layers=[0,-1]"]
    assert run_main(*arguments, *flags) == run_main(*arguments, install=False)
    assert (tmp_path / "attention").is_dir()


def test_patches_are_taken_back(demo_checkpoint):
    module = importlib.import_module(plugin.EVAL_MODULE)
    before = dict(vars(module))
    with plugin.recording(vars(module), object(), env_type="libero"):
        assert vars(module)["rollout"] is not before["rollout"]
    assert {name: vars(module)[name] for name in plugin.PATCH_POINTS} == {
        name: before[name] for name in plugin.PATCH_POINTS
    }


def test_help_shows_every_setting(run_main, capsys):
    with pytest.raises(SystemExit):
        run_main("--help")
    text = capsys.readouterr().out
    assert "--eval.save_attention_maps" in text
    for name in AttentionConfig().to_dict():
        assert f"--eval.attention.{name} " in text
    assert "Layers whose full maps are stored" in " ".join(text.split())
    assert "Which finished episodes to keep" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval.attention.keep_bits=0"], "error: keep_bits: got 0, expected a whole number from 1 to 10"),
        (["--eval.attention.keep=best"], "error: keep: got 'best', expected one of all, success, failure"),
        (["--env.max_parallel_tasks=2"], "error: env.max_parallel_tasks: got 2, expected 1"),
        (["--eval.attention=none.yaml"], "error: none.yaml: cannot read the settings"),
    ],
)
def test_bad_settings_are_one_line_before_any_environment(run_main, capsys, tmp_path, arguments, message):
    arguments = [*ENV, f"--output_dir={tmp_path}", "--eval.save_attention_maps=true", *arguments]
    error = error_of(run_main, capsys, *arguments)
    assert error.startswith(message)
    assert "\n" not in error.strip()


def test_unknown_setting_on_the_command_line(run_main, capsys, tmp_path):
    error = error_of(run_main, capsys, *ENV, f"--output_dir={tmp_path}", "--eval.attention.layerz=all")
    assert "--eval.attention.layerz" in error


def test_unknown_setting_in_the_config_file(run_main, capsys, tmp_path):
    path = tmp_path / "eval.yaml"
    path.write_text("eval:\n  save_attention_maps: true\n  attention:\n    layerz: all\n")
    error = error_of(run_main, capsys, *ENV, f"--output_dir={tmp_path / 'out'}", f"--config_path={path}")
    assert "layerz" in error


def test_unsupported_policy_before_any_environment(run_main, capsys, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"type": "tdmpc", "device": "cpu"}))
    arguments = [*ENV, f"--output_dir={tmp_path / 'out'}", "--eval.save_attention_maps=true"]
    error = error_of(run_main, capsys, *arguments, policy=tmp_path / "other")
    assert error.startswith(
        "error: attention capture does not support the policy type 'tdmpc' (no attention: convolutions and "
        f"MLPs); supported: {', '.join(sorted(FAMILIES))} and policies derived from them; "
    )
    assert not (tmp_path / "out").exists()


def test_existing_episodes_are_refused_before_any_environment(run_main, capsys, tmp_path):
    (tmp_path / "attention" / "libero_object_0" / "episode_00000.zarr").mkdir(parents=True)
    error = error_of(run_main, capsys, *ENV, f"--output_dir={tmp_path}", "--eval.save_attention_maps=true")
    assert "already holds episodes (e.g. libero_object_0/episode_00000.zarr)" in error


def test_a_file_where_the_folder_should_be(run_main, capsys, tmp_path):
    (tmp_path / "attention").write_text("")
    error = error_of(run_main, capsys, *ENV, f"--output_dir={tmp_path}", "--eval.save_attention_maps=true")
    assert "is a file, expected a folder" in error


def test_the_same_yaml_serves_every_way(tmp_path):
    path = tmp_path / "capture.yaml"
    path.write_text("layers: [0, -1]\nkeep_bits: 7\ncameras: false\nprefix_layers: all\n")
    config = AttentionConfig.from_yaml(path)
    import draccus

    from lerobot_attn.plugin.options import AttentionEvalConfig

    for argv in (["--eval.attention", str(path)], [f"--eval.attention={path}"]):
        expanded = plugin.expand_attention_file(["--seed=1", *argv, "--eval.attention.level=5"])
        assert expanded[0] == "--seed=1"
        options = [a.replace("--eval.", "--") for a in expanded[1:]]
        parsed = draccus.parse(AttentionEvalConfig, args=options)
        assert parsed.attention == AttentionConfig.from_dict({**config.to_dict(), "level": 5})


def test_attention_file_needs_a_name():
    with pytest.raises(ConfigError, match="got nothing, expected a YAML file"):
        plugin.expand_attention_file(["--eval.attention"])


def test_plain_eval_config_is_lerobots_own_class():
    from lerobot_attn.plugin.options import AttentionEvalConfig, plain_eval_config

    plain = plain_eval_config(AttentionEvalConfig(n_episodes=7, batch_size=0))
    assert type(plain) is EvalConfig
    assert asdict(plain) == asdict(EvalConfig(n_episodes=7, batch_size=0))


def test_this_lerobot_fits():
    assert plugin.check_lerobot() == []


def test_another_lerobot_version_is_named(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.7.2" if name == "lerobot" else real(name)
    )
    assert plugin.check_lerobot() == [
        "LeRobot 0.7.2 is installed, expected >=0.6,<0.7; pip install 'lerobot>=0.6,<0.7'"
    ]


def test_moved_patch_points_are_named():
    namespace = dict(vars(importlib.import_module(plugin.EVAL_MODULE)))
    del namespace["run_one"]
    namespace["rollout"] = lambda env, policy: None
    assert plugin.check_lerobot(namespace) == [
        "lerobot.scripts.lerobot_eval has no function run_one",
        "rollout() of lerobot.scripts.lerobot_eval has no parameter env_preprocessor, seeds",
    ]


def test_changed_config_classes_are_named(monkeypatch):
    from dataclasses import dataclass

    from lerobot.configs import default

    @dataclass
    class Changed:
        episodes: int = 3
        save_attention_maps: bool = False

    monkeypatch.setattr(default, "EvalConfig", Changed)
    assert plugin.check_lerobot() == [
        "EvalConfig has no field n_episodes",
        "EvalConfig has no field batch_size",
        "EvalConfig has its own field save_attention_maps",
    ]


# LeRobot's command, started with a package version that does not fit.
FAKE_VERSION = """
import importlib.metadata, sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.9.0" if name == "lerobot" else real(name)
sys.argv = ["lerobot-eval", *sys.argv[1:]]
from lerobot.scripts.lerobot_eval import main
main()
"""
TRAIN = """
import sys
sys.argv = ["lerobot-train", *sys.argv[1:]]
import atexit
import lerobot.scripts.lerobot_eval as script
from lerobot.scripts.lerobot_train import main
before = dict(vars(script))
atexit.register(lambda: vars(script) == before and print("evaluation script unchanged"))
main()
"""


def run_code_of(folder, code, *arguments):
    """Run code in a process of its own, which has imported LeRobot and nothing of this package."""
    with Forked(run_code, folder, STOCK, code=code, argv=arguments) as process:
        process.wait()
    return process


def test_an_incompatible_lerobot_cannot_swallow_the_flag(demo_checkpoint, tmp_path):
    arguments = [f"--policy.path={demo_checkpoint}", *ENV, "--eval.save_attention_maps=true"]
    process = run_code_of(tmp_path, FAKE_VERSION, *arguments)
    assert process.wait() == 1
    last = process.log.strip().splitlines()[-1]
    assert last.startswith("error: lerobot-attn cannot capture attention with this LeRobot: LeRobot 0.9.0 is")


def test_other_commands_are_left_alone_but_say_that_the_flag_is_not_theirs(tmp_path):
    process = run_code_of(tmp_path / "flag", TRAIN, "--eval.save_attention_maps=true")
    assert process.wait() == 1
    expected = (
        "works with lerobot-eval and --save_attention_maps with lerobot-rollout, not with lerobot-train"
    )
    assert f"error: --eval.save_attention_maps {expected}" in process.log
    assert "evaluation script unchanged" in process.output
    code = f"{TRAIN.replace('main()', '')}\nimport lerobot.scripts.lerobot_eval as e; before = dict(vars(e))"
    code += "\nimport lerobot_policy_attn\nassert dict(vars(e)) == before\nprint('unchanged')"
    process = run_code_of(tmp_path / "no flag", code)
    assert process.output.splitlines() == ["unchanged", "evaluation script unchanged"], process.log


IMPORT_COST = """
import lerobot.scripts.lerobot_eval, sys, time
before = set(sys.modules)
started = time.perf_counter()
import lerobot_policy_attn
cost = time.perf_counter() - started
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(cost, sorted(new & {"zarr", "xarray", "dask", "imageio", "hydra", "rich", "typer"}))
"""


def test_loading_the_plugin_costs_little(tmp_path):
    for attempt in range(3):  # a busy machine may stall a single run
        process = run_code_of(tmp_path / str(attempt), IMPORT_COST)
        cost_s, _, heavy = process.output.strip().splitlines()[-1].partition(" ")
        assert heavy == "[]"
        if float(cost_s) < 0.05:
            return
    pytest.fail(f"importing the plugin took {cost_s} s, expected under 0.05 s")


def test_the_distribution_is_found_by_lerobots_loader():
    distribution = importlib.metadata.distribution("lerobot_policy_attn")
    # The loader imports a module of the distribution's very name.
    assert distribution.metadata["Name"] == "lerobot_policy_attn"
    assert Path(importlib.util.find_spec("lerobot_policy_attn").origin).name == "__init__.py"
