"""Experiments: plans are checked, conditions begin alike, and a run goes on where it stopped."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_inspection import run_cli
from test_launch import ROOT

from lerobot_attn.analysis.effects import METRICS
from lerobot_attn.errors import ConfigError, StoreError
from lerobot_attn.interventions import Condition
from lerobot_attn.plugin import experiment
from lerobot_attn.plugin.experiment import ExperimentPlan, arguments_of, run_experiment
from lerobot_attn.recording.progress import progress_of
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

SHIPPED = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
BLOCK = {"kind": "block_attention", "keys": {"role": "target"}}
RANDOM = {"kind": "block_attention", "keys": {"random_like": {"role": "target"}, "seed": 0}}
VALUES = {
    "name": "test",
    "policy": {"path": "CKPT"},
    "env": {"type": "libero", "task": "libero_object", "task_ids": [0, 3]},
    "n_episodes": 2,
    "conditions": [
        {"name": "blocked", "interventions": [BLOCK]},
        {"name": "random", "interventions": [RANDOM], "control_of": "blocked"},
    ],
}


def plan_of(**changes):
    return ExperimentPlan.from_dict({**VALUES, **changes})


# Plans


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_plans_have_controls_and_conditions_that_load(file):
    assert file.read_text().startswith("# @package _global_\n# Question: ")
    plan = ExperimentPlan.from_yaml(file, ["policy.path=CKPT"])
    assert (plan.name, plan.no_control) == (file.stem, False)
    assert plan.planned[0].name == "baseline"
    acting = [one for one in plan.planned if one.acts]
    controls = {one.control_of for one in acting}
    assert all(one.name in controls or one.control_of for one in acting)
    assert plan.capture["segmentation"] is True  # tells what was approached
    assert plan.tasks


def test_the_plans_are_there():
    assert [file.stem for file in SHIPPED] == [
        *("block_target", "keep_top_patches", "no_camera", "no_text", "occlude_target", "prompt_swap"),
        *("steer_height", "steer_speed"),
    ]


def test_every_condition_fixes_the_same_noise_and_a_baseline_is_added():
    plan = plan_of(seed=7)
    assert [one.name for one in plan.planned] == ["baseline", "blocked", "random"]
    for one in plan.planned:
        noise = [part for part in one.condition.to_dict()["interventions"] if part["kind"] == "fixed_noise"]
        assert noise == [{"kind": "fixed_noise", "seed": 7}]
    own = [{"kind": "fixed_noise", "seed": 3}]
    same = plan_of(
        conditions=[
            {"name": "baseline", "interventions": own},
            {"name": "b", "interventions": [BLOCK, *own]},
        ],
        no_control=True,
    )
    assert [len(one.condition.interventions) for one in same.planned] == [1, 2]
    assert same.planned[0].condition.experiment == {
        "name": "test",
        "condition": "baseline",
        "control_of": None,
    }


def conditions(*more):
    return {"conditions": [*VALUES["conditions"], *more]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_episodes": None}, "n_episodes: got None, expected how many initial states of each task; add"),
        ({"n_episodes": 0}, "n_episodes: got 0"),
        ({"episodes": 3}, "the plan: unknown key 'episodes'; expected one of name, policy"),
        ({"batch_size": 2, "n_episodes": 5}, r"batch_size: got 2, expected 1 or n_episodes \(5\), because"),
        ({"seed": -1}, "seed: got -1"),
        ({"env": "libero"}, "env: got 'libero', expected a mapping"),
        ({"render": "never"}, "render: got 'never', expected"),
        (
            {"render": "inferences", "capture": {"cameras": True}},
            r"capture\.cameras: got True with render: inferences, expected false",
        ),
        ({"capture": {"keep": "success"}}, "capture: got keep, which an experiment sets itself"),
        ({"conditions": []}, r"conditions: got \[\], expected a list of them"),
        ({"conditions": [{"interventions": []}]}, r"conditions\[1\]: got {'interventions'.*with a name"),
        (conditions({"name": "x", "prompt": "y"}), r"conditions\[3\]: unknown key 'prompt'"),
        (conditions({"name": "x", "interventions": [{"kind": "push"}]}), r"conditions\[3\] \(x\).*'push'"),
        (conditions({"name": "blocked"}), "conditions: two are called 'blocked'"),
        (conditions({"name": "x", "control_of": "y"}), "x: is the control of 'y', expected one of blocked"),
        (conditions({"name": "x", "control_of": "x"}), "x: is the control of 'x', expected one of"),
        (
            conditions({"name": "x", "interventions": [BLOCK]}),
            "x: has no control, .* add a condition with control_of: x, or say --no-control",
        ),
        (
            conditions({"name": "baseline", "interventions": [BLOCK]}),
            "baseline: got interventions, expected none",
        ),
        (
            conditions({"name": "x", "interventions": [{"kind": "fixed_noise", "seed": 1}]}),
            "fixed_noise: .* has seed .* expected one seed",
        ),
    ],
)
def test_bad_plans_are_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_of(**changes)
    assert "\n" not in str(caught.value)


def test_a_condition_without_control_passes_if_that_is_wanted():
    assert plan_of(**conditions({"name": "x", "interventions": [BLOCK]}), no_control=True).planned[-1].acts


def test_the_command_of_a_condition(tmp_path):
    plan = plan_of(rename_map={"observation.images.image": "observation.images.top"})
    assert arguments_of(plan, plan.planned[1], tmp_path, [3]) == [
        "--policy.path=CKPT",
        "--env.type=libero",
        "--env.task=libero_object",
        "--env.task_ids=[3]",
        "--eval.n_episodes=2",
        "--eval.batch_size=1",
        f"--eval.interventions={tmp_path / 'blocked.yaml'}",
        "--eval.save_attention_maps=true",
        "--eval.attention.layers=none",
        "--eval.attention.mean_layers=all",
        "--eval.attention.existing=skip",
        f"--output_dir={tmp_path / 'blocked'}",
        "--seed=1000",
        '--rename_map={"observation.images.image": "observation.images.top"}',
    ]


def test_pictures_may_be_left_out(tmp_path):
    plan = plan_of(render="inferences")
    arguments = arguments_of(plan, plan.planned[1], tmp_path)
    assert {"--eval.render=inferences", "--eval.attention.cameras=false"} <= set(arguments)
    assert ExperimentPlan.from_dict(plan.to_dict()) == plan_of(**plan.to_dict())
    assert "render" not in plan_of().to_dict()


def test_values_are_given_on_the_command_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in VALUES.items() if key != "name"}))
    plan = ExperimentPlan.from_yaml(
        file, ["--policy.path=a/1", "policy.device=cpu", "n_episodes=5", "env.task_ids=[1]"]
    )
    assert (plan.name, plan.n_episodes) == ("mine", 5)
    assert plan.policy == {"path": "a/1", "device": "cpu"}
    assert plan.tasks == [("libero_object", 1)]
    with pytest.raises(ConfigError, match=r"policy\.path: expected key=value"):
        ExperimentPlan.from_yaml(file, ["policy.path"])


# Doses, draws, named units


def neurons(units, value="$dose"):
    return {"kind": "neurons", "stream": "expert", "units": units, "how": "add", "value": value}


FIRED = {"name": "high", "doses": [1, 2.5], "interventions": [neurons("$found")]}
DRAWN = {
    "name": "random",
    "control_of": "high",
    "doses": [1, 2.5],
    "draws": 5,
    "interventions": [neurons({"random_like": "$found", "seed": "$draw"})],
}
PROMPT = {"name": "prompt", "control_of": "high", "interventions": [{"kind": "task", "text": "lift high"}]}
STEERING = {"units": {"found": {3: [12, 40]}}, "conditions": [FIRED, DRAWN, PROMPT]}


def fired(one):
    return one.condition.to_dict()["interventions"][0]


def test_doses_and_draws_become_conditions(tmp_path):
    plan = plan_of(**STEERING, outcome="lift_height", expectation="Up, because.")
    planned = {one.name: one for one in plan.planned}
    assert list(planned) == [
        *("baseline", "high_dose1", "high_dose2.5"),
        *(f"random_dose1_draw{draw}" for draw in range(5)),
        *(f"random_dose2.5_draw{draw}" for draw in range(5)),
        "prompt",
    ]
    assert fired(planned["high_dose2.5"])["value"] == 2.5
    assert fired(planned["high_dose2.5"])["units"] == {"3": [12, 40]}
    drawn = planned["random_dose2.5_draw3"]
    assert fired(drawn)["units"] == {"random_like": {"3": [12, 40]}, "seed": 3}
    assert (drawn.control_of, drawn.base, drawn.dose, drawn.draw) == ("high_dose2.5", "random", 2.5, 3)
    assert (planned["prompt"].control_of, planned["prompt"].base) == ("high", "prompt")
    assert drawn.condition.experiment == {
        "name": "test",
        "condition": "random_dose2.5_draw3",
        "control_of": "high_dose2.5",
        **{"base": "random", "dose": 2.5, "draw": 3},
        **{"outcome": "lift_height", "expectation": "Up, because."},
    }
    # What is written down is whole: no file of units is needed to go on with it.
    again = ExperimentPlan.from_dict(yaml.safe_load(yaml.safe_dump(plan.to_dict())))
    assert again.to_dict() == plan.to_dict()
    lines = []
    assert run_experiment(plan, tmp_path, dry_run=True, say=lines.append) == 0
    assert lines[:2] == ["Outcome: lift_height", "Expectation: Up, because."]
    assert [line for line in lines if line.startswith("# ")][1].startswith("# high_dose1: ")
    assert lines[-1] == "14 conditions × 2 tasks × 2 = 56 episodes"
    with pytest.raises(ConfigError, match="outcome: got 'hight', expected one of success"):
        run_experiment(plan_of(**STEERING, outcome="hight"), tmp_path, dry_run=True)


def steering(*conditions, **changes):
    return {**STEERING, "conditions": list(conditions), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (steering(FIRED, PROMPT), "high_dose1: fires units and has 0 random draws .* expected 5 or more"),
        (steering(FIRED, {**DRAWN, "draws": 4}, PROMPT), "high_dose1: fires units and has 4 random draws"),
        (steering(FIRED, DRAWN), "high_dose1: fires units and has no prompt control, expected one"),
        (
            steering({**FIRED, "doses": [1, 4]}, {**DRAWN, "doses": [1, 2]}, PROMPT),
            r"conditions\[2\] \(random\): has dose 2, and high, .* has not; expected some of 1, 4",
        ),
        (steering({**FIRED, "doses": [1, 4]}, {**DRAWN, "doses": [1]}, PROMPT), "high_dose4: .* 0 random"),
        (steering({**FIRED, "doses": [1, float("nan")]}), r"got doses \[1, nan\], expected different finite"),
        (steering({**FIRED, "doses": [1, 1.0]}), r"got doses \[1, 1.0\]"),
        (steering({**FIRED, "doses": []}), r"got doses \[\]"),
        (steering({**DRAWN, "draws": 0}), "got draws 0"),
        (steering({**FIRED, "doses": None}), "got doses None"),
        (
            steering({"name": "a", "interventions": [neurons("$found")]}),
            r"conditions\[1\] \(a\): got \$dose and no doses, expected both, or neither",
        ),
        (
            steering({**FIRED, "interventions": [neurons("$found", 2)]}),
            r"got doses and no \$dose, expected both",
        ),
        (steering({**FIRED, "interventions": [neurons("$fond")]}), r"got \$fond, expected .*\(\$found\)"),
        (steering(FIRED, units={"found": [3]}), r"units\.found: got \[3\], expected {layer: \[units\]}"),
        (steering(FIRED, units={"found": {3: [-1]}}), r"units\.found: got {3: \[-1\]}"),
        (steering(FIRED, units={"dose": {3: [1]}}), "units: got the name 'dose'"),
        (steering(FIRED, units={"found": "none.csv"}), "units.found: none.csv: cannot be read: No such file"),
        (steering(FIRED, DRAWN, PROMPT, expectation=3), "expectation: got 3, expected text"),
        (
            steering(FIRED, {**PROMPT, "control_of": "low"}),
            "prompt: is the control of 'low', expected one of",
        ),
    ],
)
def test_bad_doses_are_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_of(**changes)
    assert "\n" not in str(caught.value)


def test_controls_may_be_left_out_if_that_is_said():
    assert len(plan_of(**steering(FIRED), no_control=True).planned) == 3


def test_units_come_from_a_found_set(tmp_path):
    file = tmp_path / "found.csv"
    file.write_text("stream,layer,unit,auc\nexpert,3,12,0.9\nvlm,1,7,0.9\nexpert,5,2,0.8\nexpert,3,40,0.7\n")
    plan = plan_of(**{**STEERING, "units": {"found": str(file)}})
    assert fired(plan.planned[1])["units"] == {"3": [12, 40], "5": [2]}
    top = plan_of(**{**STEERING, "units": {"found": {"file": str(file), "top": 3}}})
    assert fired(top.planned[1])["units"] == {"3": [12], "5": [2]}
    only = {**neurons("$found"), "stream": "vlm"}
    other = [{**FIRED, "interventions": [{**only, "stream": "vision"}]}]
    with pytest.raises(
        ConfigError, match=r"units\.found has none of stream 'vision', expected one of expert"
    ):
        plan_of(units={"found": str(file)}, conditions=other)
    file.write_text(
        "word,stream,layer,unit,group,auc\nhigh,expert,3,1,actions,0.9\nhigh,expert,3,2,task,0.8\n"
        "low,expert,3,1,actions,0.9\nlow,expert,3,5,actions,0.1\n"
    )

    def chosen(**what):
        plan = plan_of(**{**STEERING, "units": {"found": {"file": str(file), **what}}})
        return {int(layer): units for layer, units in fired(plan.planned[1])["units"].items()}

    assert chosen(side="more", word="high") == {3: [1, 2]}
    assert chosen(side="more", group="actions", word="high") == {3: [1]}
    assert chosen(side="less") == {3: [5]}
    assert chosen(word="high", top=1) == {3: [1]}
    for what, message in (
        ({}, "has units that fire more and units that fire less, expected one; say .* side: more"),
        ({"group": "task", "word": "low"}, "has no units that were asked for"),
        ({"colour": 1}, "has no column colour, expected one of word, stream"),
        ({"side": "up"}, "expected .* side as more or less"),
        ({"top": 0}, "expected top, if there, as a whole number >= 1"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            chosen(**what)
        assert "\n" not in str(caught.value)
    file.write_text("word,stream,layer,unit\nhigh,expert,3,1\nlow,expert,3,2\n")
    with pytest.raises(
        ConfigError, match=r"has units of high, low, expected those of one word; say .*word: high"
    ):
        chosen()
    for text, message in (
        ("a,b\n1,2\n", "got other than rows of stream"),
        ("stream,layer,unit\n", "no units"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            plan_of(**{**STEERING, "units": {"found": str(file)}})


@pytest.mark.parametrize("name", ["steer_height", "steer_speed"])
def test_shipped_plans_of_steering_say_before_what_they_ask_and_expect(name):
    plan = ExperimentPlan.from_yaml(ROOT / "configs" / "experiment" / f"{name}.yaml", ["policy.path=CKPT"])
    assert plan.outcome in METRICS
    assert plan.expectation.endswith(".")
    assert plan.render == "inferences"
    assert len(plan.tasks) * plan.n_episodes == 30
    fired = [one for one in plan.planned if one.fires and one.control_of is None]
    assert len(fired) >= 2
    for one in fired:
        drawn = [other for other in plan.planned if other.control_of == one.name and other.is_random]
        assert [other.draw for other in drawn] == [0, 1, 2, 3, 4]
        assert {other.dose for other in drawn} == {one.dose}
    assert sum(one.is_prompt for one in plan.planned) == 1


# Runs


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A complete episode, solved."""
    tiny = SyntheticPlan(n_frames=3, layers=(), n_layers=1, n_denoise_steps=1, grid=(2, 2), videos=False)
    return write_planted_episode(tmp_path_factory.mktemp("store"), tiny)


@pytest.fixture
def evaluations(monkeypatch, store):
    """A stand-in for lerobot-eval: writes the stores of episodes, of which the first is solved."""

    def evaluate(arguments):
        options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
        evaluate.calls.append(options)
        condition = Condition.from_yaml(options["eval.interventions"])
        for task in yaml.safe_load(options["env.task_ids"]):
            for index in range(int(options["eval.n_episodes"])):
                if (condition.name, task, index) == evaluate.stops_at:
                    return 130
                folder = Path(options["output_dir"], "attention", f"libero_object_{task}")
                path = folder / f"episode_{index:05d}.zarr"
                if not path.exists():
                    shutil.copytree(store, path)
                    said = path / "zarr.json"
                    text = said.read_text()
                    assert '"success": true' in text
                    said.write_text(
                        text if index == 0 else text.replace('"success": true', '"success": false')
                    )
        return 0

    evaluate.stops_at = None
    evaluate.calls = []
    monkeypatch.setattr(experiment, "launch_eval", evaluate)
    return evaluate


def run(plan, out):
    lines = []
    return run_experiment(plan, out, say=lines.append), [re.sub(r"[\d.]+ min", "_ min", x) for x in lines]


def test_a_run_goes_through_the_conditions_and_says_how_far_it_is(evaluations, tmp_path):
    status, lines = run(plan_of(), tmp_path)
    assert status == 0
    assert [Path(call["output_dir"]).name for call in evaluations.calls] == ["baseline", "blocked", "random"]
    assert lines == [
        "[1/3] baseline: 0 of 4 episodes complete, 0 successful; evaluating",
        "[1/3] baseline: 4 of 4 episodes complete, 2 successful, _ min",
        "[2/3] blocked: 0 of 4 episodes complete, 0 successful; evaluating",
        "[2/3] blocked: 4 of 4 episodes complete, 2 successful, _ min",
        "[3/3] random: 0 of 4 episodes complete, 0 successful; evaluating",
        "[3/3] random: 4 of 4 episodes complete, 2 successful, _ min",
        f"Compare the conditions with: lerobot-attn effects {tmp_path}",
    ]
    # What was run can be read there, and is the same plan.
    assert ExperimentPlan.from_yaml(tmp_path / "experiment.yaml").to_dict() == plan_of().to_dict()
    condition = Condition.from_yaml(tmp_path / "random.yaml")
    assert condition.experiment == {"name": "test", "condition": "random", "control_of": "blocked"}
    assert condition.needs_masks


def test_an_interrupted_run_goes_on_with_what_is_missing(evaluations, tmp_path):
    evaluations.stops_at = ("blocked", 3, 1)
    status, lines = run(plan_of(), tmp_path)
    assert status == 130
    assert lines[-1] == ("[2/3] blocked: ended with status 130; the same command goes on there")
    evaluations.stops_at = None
    evaluations.calls.clear()
    status, lines = run(plan_of(), tmp_path)
    assert status == 0
    assert lines[0] == "[1/3] baseline: 4 of 4 episodes complete, 2 successful"
    asked = [(Path(call["output_dir"]).name, call["env.task_ids"]) for call in evaluations.calls]
    assert asked == [("blocked", "[3]"), ("random", "[0,3]")]
    evaluations.calls.clear()
    assert run(plan_of(), tmp_path)[0] == 0
    assert evaluations.calls == []


def test_an_episode_that_is_cut_off_is_missing(evaluations, tmp_path):
    plan = plan_of()
    assert run(plan, tmp_path)[0] == 0
    cut = tmp_path / "random" / "attention" / "libero_object_0" / "episode_00001.zarr" / "zarr.json"
    assert '"complete": true' in cut.read_text()
    cut.write_text(cut.read_text().replace('"complete": true', '"complete": false'))
    found = progress_of(tmp_path / "random", 2, plan.tasks)
    assert (found.n_complete, found.missing, found.is_done) == (3, [0], False)
    of_one = progress_of(tmp_path / "random", 2, [("libero_object", 3)])
    assert (of_one.n_complete, of_one.n_expected, of_one.is_done) == (2, 2, True)


def test_more_episodes_and_conditions_may_come_and_nothing_else(evaluations, tmp_path):
    assert run(plan_of(), tmp_path)[0] == 0
    evaluations.calls.clear()
    more = plan_of(n_episodes=3, **conditions({"name": "again", "control_of": "blocked"}))
    assert run(more, tmp_path)[0] == 0
    assert [Path(call["output_dir"]).name for call in evaluations.calls][-1] == "again"
    for changes, what in (
        ({"seed": 1}, "seed 1000"),
        ({"policy": {"path": "OTHER"}}, "policy {'path': 'CKPT'}"),
        ({"env": {**VALUES["env"], "task": "libero_goal"}}, "env {"),
        ({"n_episodes": 4, "batch_size": 4}, "batch_size 1"),
    ):
        with pytest.raises(StoreError, match=f"is of an experiment with {what}"):
            run(plan_of(**changes), tmp_path)
    changed = [{"name": "blocked", "interventions": [RANDOM]}, VALUES["conditions"][1]]
    with pytest.raises(StoreError, match="with blocked's interventions"):
        run(plan_of(conditions=changed), tmp_path)


def test_where_the_environment_alone_knows_the_tasks_a_finished_evaluation_tells(tmp_path, store):
    plan = plan_of(env={"type": "libero", "task": "libero_object"})
    for index in range(2):
        shutil.copytree(store, tmp_path / "attention" / "libero_object_0" / f"episode_{index:05d}.zarr")
    assert not progress_of(tmp_path, 2, plan.tasks).is_done
    (tmp_path / "eval_info.json").write_text('{"per_task": [{}]}')
    assert progress_of(tmp_path, 2, plan.tasks).is_done
    (tmp_path / "eval_info.json").write_text('{"per_task": [{}, {}]}')
    assert not progress_of(tmp_path, 2, plan.tasks).is_done


def test_the_command_says_what_it_would_run(tmp_path, monkeypatch, capsys):
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    out = tmp_path / "out"
    status, printed, error = run_cli(monkeypatch, capsys, "experiment", file, "-o", out, "--dry-run")
    assert status == 0, error
    *lines, total = printed.splitlines()
    assert [command.split()[0] for command in lines[1::2]] == ["lerobot-eval"] * 3
    names = [condition["name"] for condition in VALUES["conditions"]]
    assert [line.split(":")[0] for line in lines[::2]] == [f"# {name}" for name in ("baseline", *names)]
    assert lines[4].endswith(f"; control of {names[0]}")
    assert total == "3 conditions × 2 tasks × 2 = 12 episodes"
    assert not out.exists()
    status, _, error = run_cli(monkeypatch, capsys, "experiment", file, "-o", out, "--policy.path=")
    assert (status, "policy.path: not given" in error, out.exists()) == (1, True, False)
    more = ("policy.path=CKPT", "capture.layerz=all")
    status, _, error = run_cli(monkeypatch, capsys, "experiment", file, "-o", out, *more)
    assert (status, "capture: unknown key 'layerz'" in error, out.exists()) == (1, True, False)


STAND_IN = """
import pathlib, signal, sys, time

def drain(*_):
    time.sleep(1)
    print("DRAINED", flush=True)
    sys.exit(signal.SIGINT + 128)

signal.signal(signal.SIGINT, drain)
print("READY", flush=True)
time.sleep(60)
"""


def stand_in(tmp_path, code):
    package = tmp_path / "lerobot" / "scripts"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "lerobot_eval.py").write_text(code)


def test_ctrl_c_lets_the_evaluation_write_what_it_has(tmp_path):
    """A terminal interrupts both processes; the one that waits must not end the one that writes."""
    stand_in(tmp_path, STAND_IN)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, lerobot_attn.plugin.launch as launch; sys.exit(launch.launch_eval(['--a=1']))",
        ],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    try:
        while "READY" not in process.stdout.readline():
            pass
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert "DRAINED" in rest
    assert process.returncode == 130


def test_the_hydra_app_composes_the_same_plan(tmp_path):
    pytest.importorskip("hydra")
    script = ROOT / "scripts" / "experiment.py"
    done = subprocess.run(
        [sys.executable, str(script), "experiment=block_target", "policy.path=CKPT", "dry_run=true"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    plan = ExperimentPlan.from_yaml(ROOT / "configs/experiment/block_target.yaml", ["policy.path=CKPT"])
    lines = []
    run_experiment(plan, Path("outputs/experiment/block_target"), dry_run=True, say=lines.append)
    assert done.stdout.splitlines() == lines
    assert list(tmp_path.iterdir()) == []
