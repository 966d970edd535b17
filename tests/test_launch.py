"""The Hydra app: what it composes is what lerobot-eval gets, and presets cost what they say."""

import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import ConfigError
from lerobot_attn.interventions import Condition, FixedNoise
from lerobot_attn.plugin.launch import check_launcher, eval_arguments, job_settings, option_text

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "configs" / "capture").glob("*.yaml"))
CONDITIONS = sorted(path.stem for path in (ROOT / "configs" / "intervention").glob("*.yaml"))
SUITES = sorted(path.stem for path in (ROOT / "configs" / "env").glob("*.yaml"))


def compose(*overrides):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("eval", ["output_dir=out", *overrides])
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


def test_masks_can_be_asked_for():
    arguments = eval_arguments(compose("policy.path=CKPT", "capture=with_masks"))
    assert "--eval.attention.segmentation=true" in arguments


@pytest.mark.parametrize("name", CONDITIONS)
def test_an_intervention_is_on_the_command_line_whole(name):
    """What LeRobot's parser gives back is the condition of the file; recording is left to `capture`."""
    import draccus

    from lerobot_attn.plugin.acting import read_condition
    from lerobot_attn.plugin.command_line import expand_attention_file
    from lerobot_attn.plugin.options import AttentionEvalConfig

    arguments = eval_arguments(compose("policy.path=CKPT", f"intervention={name}", "~capture"))
    (option,) = (argument for argument in arguments if "interventions" in argument)
    assert not any("attention_maps" in argument for argument in arguments)
    (option,) = expand_attention_file([option])
    parsed = draccus.parse(AttentionEvalConfig, args=[option.replace("--eval.", "--")])
    condition = read_condition(parsed.interventions, "--eval.interventions")
    assert condition == Condition.from_yaml(ROOT / "configs" / "intervention" / f"{name}.yaml")
    assert condition.name == name
    # The same noise in each of them: they can be compared pair by pair.
    assert FixedNoise(0) in condition.interventions


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
        (["policy.path=CKPT", "+intervention.name=a b"], "intervention: name: got 'a b'"),
        (["policy.path=CKPT", "capture.layers=last"], "layers: got 'last'"),
        (["policy.path=CKPT", "+job_name=include me"], "job_name: got 'include me', expected text that does"),
    ],
)
def test_bad_settings(overrides, message):
    with pytest.raises(ConfigError, match=message):
        eval_arguments(compose(*overrides))


# What may stand in a list, a map or on its own. Somebody can type each of these, and most mean something else
# to YAML or to JSON when they are written bare.
TEXTS = (
    "joint one",
    "a, b",
    "a=b",
    "key: value",
    'it\'s "quoted"',
    "back\\slash",
    "# no comment",
    " blanks around ",
    "",
    "true",
    "no",
    "null",
    "~",
    "7",
    "1e5",
    "1e-05",
    "0x10",
    "2026-01-31",
    "2026-13-45",
    "[a",
    "{a: b}",
    "*star",
    "&anchor",
    "!include nothing.yaml",
    "%20",
    "@at",
    "- dash",
    "--flag",
    "two\nlines",
    "tab\tand\x07bell\x7f",
    "next\x85line\u2028separator",
    "été 拿起碗 🥣",
    "$HOME `date` $(date)",
)
VALUES = (
    None,
    True,
    False,
    0,
    -3,
    0.1,
    1e-05,
    2.5e20,
    [],
    {},
    [-2, -1],
    [["joint one"], [None, "a, b"]],
    [True, "true", 1, "1", 1.5, "1.5"],
    {"observation.images.image": "front view", "n": [1, {"deep": None}]},
)


@pytest.mark.parametrize("value", [*TEXTS, *VALUES, list(TEXTS), {text: text for text in TEXTS}], ids=repr)
def test_a_value_reads_back_by_both_of_lerobots_parsers(value):
    text = option_text(value)
    if text == "":  # both parsers leave it alone
        assert value == ""
        return
    assert yaml.safe_load(text) == value
    if text != value:  # LeRobot takes what is no JSON for text
        assert json.loads(text) == value
    else:
        with pytest.raises(ValueError, match=r"line \d+ column \d+"):
            json.loads(text)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder whose name has a blank, with a config of Pi0.5 and no weights."""
    pytest.importorskip("lerobot")
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    folder = tmp_path_factory.mktemp("with") / "a blank, and: more"
    folder.mkdir()
    PI05Config(device="cpu")._save_pretrained(folder)
    return folder


@pytest.fixture
def parse(monkeypatch):
    """Read a command line, copied through a shell's quoting, as `lerobot-eval` with the plugin does."""
    parser = pytest.importorskip("lerobot.configs.parser")
    import lerobot.policies.pi05.configuration_pi05  # noqa: F401

    from lerobot_attn.plugin.options import AttentionEvalPipelineConfig

    def evaluate(config):
        return config

    evaluate.__annotations__["config"] = AttentionEvalPipelineConfig

    def parsed(arguments):
        copied = shlex.split(shlex.join(arguments))
        monkeypatch.setattr(sys, "argv", ["lerobot-eval", *copied])
        return parser.wrap()(evaluate)()

    return parsed


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        (
            ["+rename_map={observation.images.image: observation.images.front}"],
            "rename_map",
            {"observation.images.image": "observation.images.front"},
        ),
        (["+rename_map={a b: 'c: d, e=f', 2: '1'}"], "rename_map", {"a b": "c: d, e=f", "2": "1"}),
        (["+trust_remote_code=true"], "trust_remote_code", True),
        (["+job_name='true'"], "job_name", "true"),
        (["+job_name='say \"a, b\": 50% = half'"], "job_name", 'say "a, b": 50% = half'),
        (["output_dir='out/a: b, #1'"], "output_dir", Path("out/a: b, #1")),
        (
            ["+env.camera_name_mapping={agentview_image: front view}"],
            "env.camera_name_mapping",
            {"agentview_image": "front view"},
        ),
        (["env.task_ids=[0,3]"], "env.task_ids", [0, 3]),
        (["+eval.recording=true", "+eval.recording_repo_id='me/a b'"], "eval.recording_repo_id", "me/a b"),
        (["+policy.n_action_steps=5"], "policy.n_action_steps", 5),
        (["+policy.optimizer_lr=1e-5"], "policy.optimizer_lr", 1e-5),
        (["+policy.image_resolution=[224,192]"], "policy.image_resolution", (224, 192)),
        (
            ["+policy.relative_exclude_joints=[joint one,'a, b','true','1e5','']"],
            "policy.relative_exclude_joints",
            ["joint one", "a, b", "true", "1e5", ""],
        ),
        (["+policy.rtc_config={execution_horizon: 7}"], "policy.rtc_config.execution_horizon", 7),
        (["+policy.rtc_config.execution_horizon=8"], "policy.rtc_config.execution_horizon", 8),
        (["+capture.dir='maps/a b: c'"], "eval.attention.dir", "maps/a b: c"),
        (["capture.layers=[-1]"], "eval.attention.layers", [-1]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value and isinstance(value[0], str) else "",
)
def test_lerobot_reads_any_field_as_it_was_composed(checkpoint, parse, overrides, field, value):
    quoted = str(checkpoint).replace("'", "\\'")
    got = parse(eval_arguments(compose(f"policy.path='{quoted}'", *overrides)))
    assert got.policy.pretrained_path == checkpoint
    for name in field.split("."):
        got = getattr(got, name)
    assert got == value
    assert isinstance(got, type(value))


def test_a_field_that_lerobot_lacks_is_refused_by_lerobot(checkpoint, parse, capsys):
    arguments = eval_arguments(compose(f"policy.path='{checkpoint}'", "+sim=1"))
    assert arguments[-1] == "--sim=1"
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "unrecognized arguments: --sim=1" in capsys.readouterr().err


def test_a_section_that_is_no_mapping_is_refused():
    with pytest.raises(ConfigError, match="env: got 'libero', expected a mapping"):
        eval_arguments({"policy": {"path": "CKPT"}, "env": "libero"})


def test_without_hydra_the_app_says_what_is_missing(tmp_path):
    (tmp_path / "hydra.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'hydra'\", name='hydra')\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "eval.py"), "policy.path=CKPT"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: hydra-core is not installed, scripts/eval.py needs it; pip install '.[eval]' brings it\n"
    )


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_cost_what_they_say(preset):
    pytest.importorskip("torch")
    from lerobot_attn.capture import Selection
    from lerobot_attn.layout import Camera, ImageGeometry, Segment, TokenLayout
    from lerobot_attn.policies.base import PolicyDescription, Site, SiteInfo

    full_size = PolicyDescription(
        policy_type="pi05",
        n_layers=18,
        n_prefix_layers=18,
        n_heads=8,
        n_denoise_steps=10,
        chunk_size=50,
        n_action_steps=10,
        n_vision_layers=27,
        n_vision_heads=16,
    )
    text = preset.read_text()
    assert text.startswith("# Question: ")
    said_mb = float(re.search(r"full size: ([\d.]+) MB an inference", text)[1])
    units = {("vlm", "neurons"): 16384, ("expert", "neurons"): 4096}
    sites = {
        Site(stream, layer, what): SiteInfo(n_units=n)
        for (stream, what), n in units.items()
        for layer in range(18)
    }
    selection = Selection.resolve(AttentionConfig.from_yaml(preset), full_size, sites)
    segments = (Segment("language", "prefix", 0, 968), Segment("action", "action", 968, 1018))
    geometry = ImageGeometry.letterbox((256, 256), (224, 224), (16, 16), padding="centred")
    layout = TokenLayout(segments, 968, (Camera("image", geometry), Camera("image2", geometry)))
    n_groups = {"vlm": 5, "expert": 1}  # two cameras, words, state and template; the actions
    assert said_mb == round(selection.bytes_per_inference(layout, (16, 16), n_groups) / 1e6, 1)


def test_the_presets_and_suites_are_there():
    assert [path.stem for path in PRESETS] == [
        "all_layers",
        "final_step",
        "last_two",
        "summary",
        "with_masks",
        "with_neurons",
        "with_prefix",
        "with_vision",
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
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
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


def test_a_task_of_a_sweep_is_a_list_of_one():
    assert "--env.task_ids=[3]" in eval_arguments({"policy": {"path": "CKPT"}, "env": {"task_ids": 3}})
    assert "--env.task_ids=[3,4]" in eval_arguments({"policy": {"path": "CKPT"}, "env": {"task_ids": [3, 4]}})


def test_jobs_go_on_with_what_they_have():
    assert job_settings({"capture": {"layers": [1]}})["capture"] == {"existing": "skip", "layers": [1]}
    assert job_settings({"capture": {"existing": "overwrite"}})["capture"] == {"existing": "overwrite"}
    assert job_settings({"capture": None}) == {"capture": None}


@pytest.mark.parametrize("name", ["submitit_slurm", "submitit_local", "joblib", "ray"])
def test_a_launcher_that_is_not_installed_is_one_line(monkeypatch, name):
    check_launcher(["policy.path=a", "hydra/launcher=basic"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=rf"^hydra/launcher={name}: hydra-\w+-launcher is not installed; pip install '\.\["
    ):
        check_launcher(["-m", f"hydra/launcher={name}"])
    assert (ROOT / "configs" / "hydra" / "launcher" / f"{name}.yaml").is_file()


def test_app_makes_jobs_of_a_sweep(tmp_path):
    """Each in a folder of its own, which the same job finds again; a failure leaves the others alone."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    how = [
        "-m",
        "hydra/launcher=joblib",
        "hydra.sweep.dir=out",
        "hydra.launcher.n_jobs=1",
        "policy.path=CKPT",
    ]
    result = hydra_app(tmp_path, *how, "env.task_ids=range(2)", "seed=1,2", "+job_name=fail,fine")
    folders = {
        f"out/libero_object,+job_name={n},env.task_ids={t},seed={s}"
        for n, t, s in itertools.product(("fail", "fine"), (0, 1), (1, 2))
    }
    ran = [line for line in result.stdout.splitlines() if line.startswith("RAN ")]
    assert len(ran) == 8, result.stderr[-3000:]
    assert all("--eval.attention.existing=skip" in line for line in ran)
    assert {
        str(path.relative_to(tmp_path)) for path in (tmp_path / "out").iterdir() if path.is_dir()
    } == folders
    assert result.returncode == 1
    assert "lerobot-eval ended with status 7; see the log of" in result.stderr
    assert "is validated against ConfigStore" not in result.stderr
