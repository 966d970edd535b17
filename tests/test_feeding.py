"""Is what a policy is fed what it was trained on: each check with planted faults, the command, recordings."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import recorded  # noqa: E402
import scripted  # noqa: E402
from evaluation import evaluate_all  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from lerobot_attn import open_run  # noqa: E402
from lerobot_attn.cli import app  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.errors import ConfigError  # noqa: E402
from lerobot_attn.plugin import feeding  # noqa: E402
from lerobot_attn.plugin.feeding import (  # noqa: E402
    CHECKS,
    Expected,
    Facts,
    Fed,
    Recorded,
    World,
    check_feeding,
    command,
)
from lerobot_attn.policies import ADAPTERS  # noqa: E402
from lerobot_attn.recording.run import RunRecorder  # noqa: E402

IMAGE, WRIST, STATE = "observation.images.image", "observation.images.image2", "observation.state"
NAMES = ("shoulder", "elbow", "wrist", "gripper")
# Joints in radians, a gripper in metres.
LOW, HIGH = np.array([-2.0, 0.2, 1.0, 0.0]), np.array([-1.0, 1.2, 3.0, 0.04])
VALUES = np.array([-1.4, 0.5, 1.5, 0.03])
PROMPT = "<bos>Task: pick up the soup, State: 179 102 63 191;\nAction: "


def scene(camera=0, size=96):
    """(size, size, 3) float32 in [0, 1]: blobs of several colours, unlike in each camera."""
    rng = np.random.default_rng(camera)
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    picture = np.full((size, size, 3), 0.3)
    for _ in range(6):
        at, wide, colour = rng.uniform(0.1, 0.9, 2), rng.uniform(0.05, 0.2), rng.uniform(-0.5, 0.5, 3)
        picture += np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / wide**2)[..., None] * colour
    return np.clip(picture, 0, 1).astype(np.float32)


def first(picture):
    """Channels first, as a batch has it."""
    return np.ascontiguousarray(np.moveaxis(picture, -1, 0))


def normalised(values):
    return 2 * (values - LOW) / (HIGH - LOW) - 1


def statistics(low=LOW, high=HIGH):
    return {"q01": low, "q99": high}


EXPECTED = Expected(
    cameras={IMAGE: (3, 96, 96), WRIST: (3, 96, 96), "observation.images.empty_camera_0": (3, 224, 224)},
    state_dim=4,
    action_dim=3,
    most_dims=32,
    modes={IMAGE: "IDENTITY", STATE: "QUANTILES", "action": "QUANTILES"},
    statistics={STATE: statistics(), "action": statistics(-np.ones(3) * 0.7, np.array([0.7, 0.7, 1.0]))},
    n_action_steps=10,
    chunk_size=50,
    dtype="float32",
    takes_words=True,
)
FED = Fed(
    pictures={IMAGE: first(scene(0)), WRIST: first(scene(1))},
    state=normalised(VALUES),
    prompt=PROMPT,
    task="pick up the soup",
    digits=(179, 102, 63, 191),
)
WORLD = World("the environment", NAMES, ("dx", "dy", "grip"), 3, 20.0, "relative")
rng = np.random.default_rng(0)
RECORDED = Recorded(
    states=rng.uniform(LOW, HIGH, (200, 4)),
    actions=rng.uniform(-0.6, 0.6, (200, 3)),
    state_names=NAMES,
    action_names=("dx", "dy", "grip"),
    fps=20,
    pictures={IMAGE: [scene(7), scene(0) * 0.9], WRIST: [scene(1)]},
)
GOOD = Facts(EXPECTED, FED, WORLD, RECORDED)


def changed(part, **values):
    """The good facts with one part's fields replaced."""
    return GOOD._replace(**{part: dataclasses.replace(getattr(GOOD, part), **values)})


def scaled(**features):
    return changed("expected", statistics={**EXPECTED.statistics, **features})


def meanstd(mean, std):
    modes = {**EXPECTED.modes, STATE: "MEAN_STD"}
    stats = {**EXPECTED.statistics, STATE: {"mean": np.asarray(mean, float), "std": np.asarray(std, float)}}
    return changed("expected", modes=modes, statistics=stats)


def shown(**pictures):
    names = {"image": IMAGE, "image2": WRIST}
    return changed("fed", pictures={names.get(k, f"observation.images.{k}"): v for k, v in pictures.items()})


def seen(image, image2=None):
    return shown(image=first(image), image2=first(scene(1) if image2 is None else image2))


def told(task, prompt=PROMPT, is_cut=False):
    return changed("fed", task=task, prompt=prompt, is_cut=is_cut)


def at(values):
    return changed("fed", state=normalised(np.asarray(values, float)))


def test_what_is_as_in_training_passes_every_check():
    checks = check_feeding(GOOD)
    assert [check.name for check in checks] == list(CHECKS)
    assert {check.name: check.status for check in checks} == dict.fromkeys(CHECKS, "ok")
    assert not [check.remedy for check in checks if check.remedy]


def test_a_checkpoint_alone_says_what_it_can():
    checks = {check.name: check.status for check in check_feeding(Facts(EXPECTED))}
    assert {name for name, status in checks.items() if status == "ok"} == {
        "normalisation",
        "chunk",
        "precision",
    }
    assert set(checks.values()) == {"ok", "skipped"}


def test_standard_deviations_are_called_so():
    facts = meanstd(VALUES, np.array([0.1, 0.2, 0.3, 0.01]))
    facts = facts._replace(recorded=None, fed=dataclasses.replace(FED, state=np.array([1.9, 0, 0, 0])))
    assert CHECKS["state range"]("state range", facts).detail == "within 1.9 standard deviations"
    facts = facts._replace(fed=dataclasses.replace(FED, state=np.array([20.0, 0, 0, 0])))
    check = CHECKS["state range"]("state range", facts)
    assert check.status == "failed"
    assert "shoulder 0.6 (training -1.4 ± 0.1)" in check.detail


def test_a_state_that_the_policy_pads_may_have_any_size_that_nothing_speaks_against():
    facts = changed("expected", state_dim=32, statistics={})
    assert CHECKS["state size"]("state size", facts).status == "ok"


@pytest.mark.parametrize(("beyond", "status"), [(0.0, "ok"), (0.3, "failed")])
def test_a_state_may_come_padded_with_zeros(beyond, status):
    padded = np.array([*FED.state, *[beyond] * 4])
    facts = changed("expected", statistics={}, most_dims=len(padded))
    facts = facts._replace(fed=dataclasses.replace(FED, state=padded))
    assert CHECKS["state size"]("state size", facts).status == status


# A row a planted fault: the check that finds it, how, and a part of what it and its remedy say.
FAULTS = {
    "no statistics": ("normalisation", "failed", scaled(**{STATE: {}}), "no q01 and no q99", "stats"),
    "one statistic": (
        "normalisation",
        "failed",
        scaled(**{STATE: {"q01": LOW}}),
        "observation.state has no q99",
        "stats",
    ),
    "identity quantiles": (
        "normalisation",
        "failed",
        scaled(**{STATE: statistics(-np.ones(4), np.ones(4))}),
        "normalises nothing",
        "stats",
    ),
    "identity mean and std": (
        "normalisation",
        "failed",
        meanstd(np.zeros(4), np.ones(4)),
        "mean 0 and std 1",
        "stats",
    ),
    "limits instead of actions": (
        "normalisation",
        "warning",
        scaled(action=statistics(-np.ones(3), np.ones(3))),
        "action has q01 -1",
        "stats",
    ),
    "a joint that never moved": (
        "normalisation",
        "warning",
        scaled(**{STATE: statistics(LOW, np.where([0, 0, 1, 0], LOW, HIGH))}),
        "dimension 2",
        "stats",
    ),
    "statistics of nothing": (
        "normalisation",
        "failed",
        scaled(**{STATE: statistics(LOW * np.nan, HIGH)}),
        "not finite",
        "stats",
    ),
    "a missing camera": (
        "cameras",
        "failed",
        shown(image=first(scene(0))),
        f"lacks {WRIST}",
        "show that camera",
    ),
    "an unknown camera": (
        "cameras",
        "failed",
        shown(front=first(scene(0)), image2=first(scene(1))),
        "it drops observation.images.front",
        json.dumps({"observation.images.front": IMAGE}),
    ),
    "both cameras under other names": (
        "cameras",
        "failed",
        changed("fed", pictures={"observation.image2": scene(), "observation.images.top": scene()}),
        f"lacks {IMAGE}, {WRIST}",
        json.dumps({"observation.image2": IMAGE, "observation.images.top": WRIST}),
    ),
    "a third camera": (
        "cameras",
        "warning",
        shown(image=first(scene(0)), image2=first(scene(1)), top=first(scene(2))),
        "drops observation.images.top",
        "train a policy",
    ),
    "uint8": (
        "pictures",
        "failed",
        seen((scene(0) * 255).astype(np.uint8)),
        f"{IMAGE} is uint8",
        "image.float() / 255",
    ),
    "float up to 255": ("pictures", "failed", seen(scene(0) * 255), "goes from", "/ 255"),
    "float from -1": ("pictures", "failed", seen(scene(0) * 2 - 1), "goes from -", "/ 255"),
    "divided twice": ("pictures", "failed", seen(scene(0) / 255), "twice", "once"),
    "a black camera": ("pictures", "warning", seen(scene(0), scene(1) * 0), "one colour", "look at"),
    "a wide camera": ("pictures", "warning", seen(scene(0)[:48]), "96x48, in training 96x96", "look at"),
    "a hole": ("pictures", "failed", seen(scene(0) * np.float32("nan")), "nan", "/ 255"),
    "mirrored": ("orientation", "failed", seen(scene(0)[:, ::-1]), "is mirrored", "turn"),
    "upside down": ("orientation", "failed", seen(scene(0)[::-1]), "is upside down", "turn"),
    "turned": ("orientation", "failed", seen(scene(0)[::-1, ::-1]), "is turned by 180°", "turn"),
    "on its side": ("orientation", "failed", seen(np.rot90(scene(0))), "is turned by 270°", "turn"),
    "swapped": ("orientation", "failed", seen(scene(1), scene(0)), f"{IMAGE} looks like {WRIST}", "rename"),
    "blue for red": ("orientation", "failed", seen(scene(0)[..., ::-1]), "red and blue", "recolour"),
    "another scene": ("orientation", "warning", seen(scene(5)), "unlike", "by eye"),
    "a state too long": (
        "state size",
        "failed",
        changed("fed", state=np.zeros(5)),
        "got 5 numbers, expected 4",
        "trained",
    ),
    "no state": ("state size", "failed", changed("fed", state=None), "no observation.state", "trained"),
    "other order of names": (
        "names",
        "failed",
        changed("world", state_names=NAMES[::-1]),
        "gripper, wrist, elbow, shoulder; in the data set shoulder",
        "order",
    ),
    "other names": (
        "names",
        "warning",
        changed("world", action_names=("x", "y", "z")),
        "action is x, y, z",
        "the same",
    ),
    "degrees": (
        "state range",
        "failed",
        at([*np.degrees(VALUES[:3]), VALUES[3]]),
        "shoulder -80.2 (training -2 to -1)",
        "from degrees to radians",
    ),
    "another order": (
        "state range",
        "failed",
        at(VALUES[[3, 0, 1, 2]]),
        "far outside of training",
        "in the order 1, 2, 3, 0 they fit",
    ),
    "a state a little outside": ("state range", "warning", at([-2.4, 0.5, 1.5, 0.03]), "shoulder -2.4", ""),
    "a state that is not finite": ("state range", "failed", at([np.nan, 0, 1, 0]), "not finite", "repair"),
    "radians in a data set": (
        "state range",
        "warning",
        changed("recorded", states=np.linspace(0.4, 0.6, 200)[:, None] / 50 * (HIGH - LOW) + LOW),
        "as much as in training",
        "radians",
    ),
    "degrees in a data set": (
        "state range",
        "failed",
        changed("recorded", states=RECORDED.states * [57.3, 57.3, 57.3, 1]),
        "100% of the data set's frames",
        "from degrees to radians",
    ),
    "saturated digits": (
        "state digits",
        "failed",
        changed("fed", digits=(255, 255, -1, 40)),
        "3 of 4 are saturated",
        "normalisation",
    ),
    "large actions": (
        "action range",
        "failed",
        changed("recorded", actions=RECORDED.actions * 100),
        "far outside",
        "",
    ),
    "actions too long": (
        "action range",
        "failed",
        changed("recorded", actions=np.zeros((9, 7))),
        "has 7 numbers, expected 3",
        "this robot",
    ),
    "no instruction": ("prompt", "failed", told(" "), "no task", "instruction"),
    "a name for a task": ("prompt", "warning", told("pick_up_the_soup"), "no sentence", "sentence"),
    "a cut prompt": ("prompt", "failed", told("pick", PROMPT[:40], is_cut=True), "cut off", "shorten"),
    "more steps than the chunk": (
        "chunk",
        "failed",
        changed("expected", n_action_steps=60),
        "n_action_steps is 60, expected 1 to 50",
        "--policy.n_action_steps=50",
    ),
    "a long blind run": (
        "chunk",
        "warning",
        changed("expected", n_action_steps=50),
        "2.5 s at 20 a second",
        "--policy.n_action_steps=10",
    ),
    "absolute actions": (
        "control",
        "failed",
        scaled(action=statistics(np.array([0.2, -0.3, 0.8]), np.array([0.7, 0.4, 3.1]))),
        "went to 3.1",
        "control_mode=absolute",
    ),
    "relative actions": (
        "control",
        "warning",
        changed("world", control_mode="absolute"),
        "absolute",
        "control_mode=relative",
    ),
    "another rate": ("control", "warning", changed("recorded", fps=10), "has 10", "--env.fps=10"),
    "a robot with more joints": (
        "control",
        "failed",
        changed("world", action_dim=7),
        "takes 7 numbers, the policy's actions have 3",
        "this robot",
    ),
    "half precision": ("precision", "warning", changed("expected", dtype="float16"), "float16", "bfloat16"),
    "bfloat16 on a CPU": ("precision", "warning", changed("expected", dtype="bfloat16"), "slow", "cuda"),
    "compiled on a CPU": (
        "precision",
        "warning",
        changed("expected", compile_mode="max-autotune"),
        "compiled (max-autotune)",
        "compile_model=false",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_with_its_remedy(fault):
    name, status, facts, detail, remedy = FAULTS[fault]
    check = CHECKS[name](name, facts)
    assert (check.name, check.status) == (name, status), check
    assert detail in check.detail
    assert check.remedy
    assert remedy in check.remedy
    assert "\n" not in check.detail + check.remedy


@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [("MIN_MAX", "min", "max"), ("QUANTILES", "q01", "q99"), ("MEAN_STD", "mean", "std")],
)
def test_normalisation_is_undone_as_lerobot_does_it(mode, low, high):
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.processor import NormalizerProcessorStep

    feature = PolicyFeature(FeatureType.STATE, (4,))
    stats = {STATE: {low: LOW, high: HIGH}}
    step = NormalizerProcessorStep({STATE: feature}, {FeatureType.STATE: NormalizationMode(mode)}, stats)
    values = torch.tensor(VALUES, dtype=torch.float32)[None]
    theirs = step._normalize_observation({STATE: values}, inverse=False)[STATE][0].numpy()
    scale = Expected(modes={STATE: mode}, statistics=stats).scale(STATE)
    np.testing.assert_allclose(theirs * scale.half + scale.centre, VALUES, atol=1e-5)


def test_cameras_whose_pictures_were_cut_into_patches_are_not_judged():
    check = CHECKS["cameras"]("cameras", changed("fed", pictures={}, has_patches=True))
    assert (check.status, check.detail[:34]) == ("skipped", "the preprocessor leaves patches, a")
    assert CHECKS["cameras"]("cameras", changed("fed", pictures={})).status == "failed"


def test_pictures_that_are_normalised_are_judged_as_they_were_before():
    modes = {**EXPECTED.modes, IMAGE: "MEAN_STD"}
    mean, std = np.full((3, 1, 1), 0.45), np.full((3, 1, 1), 0.22)
    stats = {**EXPECTED.statistics, IMAGE: {"mean": mean, "std": std}}
    facts = changed("expected", modes=modes, statistics=stats)

    def of(picture):
        return facts._replace(fed=dataclasses.replace(FED, pictures={IMAGE: (first(picture) - mean) / std}))

    assert CHECKS["pictures"]("pictures", of(scene(0))).status == "ok"
    assert CHECKS["pictures"]("pictures", of(scene(0) * 255)).status == "failed"


def test_what_another_step_normalises_is_judged_as_it_was_before():
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.xvla.processor_xvla import XVLAImageNetNormalizeProcessorStep
    from lerobot.processor import TransitionKey

    from lerobot_attn.plugin.feeding.gather import FedReader, expected_of

    step = XVLAImageNetNormalizeProcessorStep()
    config = SimpleNamespace(input_features={IMAGE: PolicyFeature(FeatureType.VISUAL, (3, 96, 96))})
    pipeline = SimpleNamespace(steps=[step])
    observation = {IMAGE: torch.from_numpy(first(scene(0)))[None]}
    batch = step({TransitionKey.OBSERVATION: observation})[TransitionKey.OBSERVATION]
    fed = FedReader(config, pipeline).read(batch, 0, None)
    assert fed.pictures[IMAGE].min() < -0.1
    check = CHECKS["pictures"]("pictures", Facts(expected_of(config, pipeline, None), fed))
    assert check.status == "ok"
    assert check.detail == f"{IMAGE} 96x96, 0 to 0.96"


def test_flat_statistics_of_pictures_scale_channels():
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.processor import NormalizerProcessorStep

    from lerobot_attn.plugin.feeding.gather import expected_of

    features = {IMAGE: PolicyFeature(FeatureType.VISUAL, (3, 96, 96))}
    stats = {IMAGE: {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}}
    step = NormalizerProcessorStep(features, {FeatureType.VISUAL: NormalizationMode.MEAN_STD}, stats)
    expected = expected_of(
        SimpleNamespace(input_features=features), SimpleNamespace(steps=[step]), SimpleNamespace(steps=[])
    )
    assert expected.scale(IMAGE).centre.shape == (3, 1, 1)


def test_actions_are_scaled_by_the_postprocessors_statistics(demo_policy):
    from lerobot_attn.plugin.feeding.gather import expected_of

    policy, preprocessor, postprocessor = demo_policy()
    for step in postprocessor.steps:
        getattr(step, "stats", {}).pop("action", None)
    check = CHECKS["normalisation"](
        "normalisation", Facts(expected_of(policy.config, preprocessor, postprocessor))
    )
    assert check.status == "failed"
    assert check.detail == "action has no q01 and no q99 for QUANTILES"


def test_a_prompt_is_shown_without_its_padding():
    from lerobot_attn.policies.given_prompt import PromptReader

    class Words:
        def decode(self, token_ids, **kwargs):
            return "".join(["<s>", "pick", " it", "<pad>"][i] for i in token_ids)

    assert PromptReader(None, Words()).read([0, 1, 2, 3, 3]).text == "<s>pick it"
    assert PromptReader(None, None).read([0]) is None


# The command


def doctor(*arguments):
    """Run the command; return its exit status and name → (status, detail, remedy)."""
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    found, name = {}, None
    for line in result.stdout.splitlines():
        match = re.match(r"(ok|warning|failed|skipped) +(\S+(?: \S+)?)  +(.*)", line)
        if match:
            status, name, detail = match.groups()
            found[name] = (status, detail, "")
        elif " remedy: " in line:
            found[name] = (*found[name][:2], line.partition(" remedy: ")[2])
    return result.exit_code, found


DOCS = Path(__file__).parent.parent / "docs" / "recording.md"


def commands_of_the_docs(checkpoint, dataset="me/cups"):
    """The arguments of each command of the docs, with what is there instead of what stands for it."""
    lines = re.findall(r"^lerobot-attn doctor (.*)$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    texts = [line.replace("CHECKPOINT", str(checkpoint)).replace("me/cups", str(dataset)) for line in lines]
    return [shlex.split(text) for text in texts]


def in_range(statistics, episode, frame):
    """Values that run through what the statistics say."""
    low, high = np.asarray(statistics["q01"]), np.asarray(statistics["q99"])
    return (low + (high - low) * ((7 * frame + 3 * episode) % 25) / 25).astype(np.float32)


@pytest.fixture
def trained_on(demo_policy, monkeypatch):
    """Let data sets be written as the demo policy was trained."""
    _, preprocessor, _ = demo_policy()
    (stats,) = [step.stats for step in preprocessor.steps if getattr(step, "stats", None)]
    monkeypatch.setattr(recorded, "state", lambda e, f, dim=8: in_range(stats[STATE], e, f))
    monkeypatch.setattr(recorded, "action", lambda e, f, dim=7: in_range(stats["action"], e, f))
    return recorded.write_dataset


def test_a_data_set_that_the_policy_was_trained_on_passes(trained_on, demo_checkpoint, tmp_path):
    root = trained_on(tmp_path / "cups", [25, 25])
    _, arguments, _ = commands_of_the_docs(demo_checkpoint, root)
    status, found = doctor(*arguments)
    assert status == 0
    assert set(found) == {*CHECKS, "neurons"}
    assert "language model's last layer (3 of 4, from 0) reach no action" in found["neurons"][1]
    assert {status for status, _, _ in found.values()} == {"ok", "skipped"}
    assert found["state range"][0] == found["action range"][0] == found["prompt"][0] == "ok"
    assert "Task: pick up the soup, State: " in found["prompt"][1]
    assert found["chunk"][1] == "10 of 50 actions are executed, 0.5 s at 20 a second"


def test_a_data_set_with_other_cameras_and_in_degrees_fails_with_what_mends_it(
    trained_on, demo_checkpoint, tmp_path, monkeypatch
):
    good = recorded.state
    monkeypatch.setattr(recorded, "state", lambda e, f, dim=8: np.degrees(good(e, f)))
    root = trained_on(tmp_path / "cups", [25], cameras=("observation.images.front", WRIST))
    arguments = "--policy.path", demo_checkpoint, "--dataset", root
    status, found = doctor(*arguments)
    assert status == 1
    assert {name for name, (status, _, _) in found.items() if status == "failed"} >= {
        "cameras",
        "state range",
    }
    rename = found["cameras"][2].partition("--rename_map='")[2].partition("'")[0]
    assert json.loads(rename) == {"observation.images.front": IMAGE}
    assert "degrees to radians" in found["state range"][2]
    _, found = doctor(*arguments, "--rename", rename)
    assert found["cameras"][0] == "ok"


def test_a_state_of_another_size_breaks_the_preprocessor_and_the_rest_is_still_said(
    demo_checkpoint, tmp_path
):
    root = recorded.write_dataset(tmp_path / "cups", [3], dims=(6, 7))
    status, found = doctor("--policy.path", demo_checkpoint, "--dataset", root)
    assert status == 1
    assert found["preprocessor"][0] == "failed"
    assert found["state size"][:2] == ("failed", "got 6 numbers, expected 8")
    assert found["cameras"][0] == "ok"


def test_statistics_of_a_checkpoint_that_say_nothing_fail(demo_policy, tmp_path):
    policy, preprocessor, postprocessor = demo_policy()
    for step in (*preprocessor.steps, *postprocessor.steps):
        for values in getattr(step, "_tensor_stats", {}).values():
            values["q01"], values["q99"] = -torch.ones_like(values["q01"]), torch.ones_like(values["q99"])
    for part in (policy, preprocessor, postprocessor):
        part.save_pretrained(tmp_path)
    status, found = doctor("--policy.path", tmp_path)
    assert status == 1
    assert found["normalisation"][0] == "failed"
    assert STATE in found["normalisation"][1]
    assert found["chunk"][0] == "ok"
    assert found["cameras"][0] == "skipped"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "x"], "--dataset: goes with --policy.path"),
        (["--env.type=libero"], "--env.type: goes with --policy.path"),
        (["--nonsense=1"], "--nonsense=1: goes with --policy.path"),
        (["--policy.path", "CHECKPOINT", "--nonsense=1"], "--nonsense=1: no such option"),
        (["--policy.path", "CHECKPOINT", "--env.type=moon"], "--env.type: got moon, expected one of aloha"),
        (["--policy.path", "CHECKPOINT", "--env.task=x"], "--env.type: got none, expected one of aloha"),
        (["--policy.path", "CHECKPOINT", "--env.type=libero", "--env.x=1"], "--env: got --x=1, expected"),
        (["--policy.path", "CHECKPOINT", "--dataset", "/none"], "/none: no such folder"),
        (["--policy.path", "CHECKPOINT", "--rename", "x"], "--rename: got 'x', expected JSON"),
        (["--policy.path", "CHECKPOINT", "--policy.n_action_steps=60"], "cannot be greater than chunk_size"),
        (["--policy.path", "/none"], "--policy.path: /none cannot be loaded"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, demo_checkpoint):
    with pytest.raises(ConfigError) as caught:
        doctor(*[str(demo_checkpoint) if one == "CHECKPOINT" else one for one in arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.libero
def test_libero_and_a_data_set_of_it_that_is_mirrored(
    libero_ready, demo_checkpoint, trained_on, tmp_path, monkeypatch
):
    looked = []
    real = command._first_observation
    monkeypatch.setattr(command, "_first_observation", lambda *a: looked.append(real(*a)) or looked[-1])
    status, found = doctor(*commands_of_the_docs(demo_checkpoint)[0])
    assert status == 0, found
    assert {name for name, (status, _, _) in found.items() if status == "skipped"} == {
        "orientation",
        "names",
        "action range",
    }
    assert {status for status, _, _ in found.values()} == {"ok", "skipped"}
    assert "Task: pick up the alphabet soup and place it in the basket" in found["prompt"][1]
    assert found["control"][1] == "relative actions, 20 a second"
    # What it showed, once as it is and once mirrored, as a data set.
    monkeypatch.setattr(command, "_first_observation", lambda *a: looked[0])
    shown = [looked[0][1][camera][0].movedim(0, -1).numpy() for camera in recorded.CAMERAS]
    as_uint8 = [(picture * 255).astype(np.uint8) for picture in shown]
    for turn, status in (("as it is", "ok"), ("mirrored", "failed")):
        monkeypatch.setattr(
            recorded,
            "picture",
            lambda e, f, i=0, size=32, turn=turn: as_uint8[i] if turn == "as it is" else as_uint8[i][:, ::-1],
        )
        root = trained_on(tmp_path / turn.replace(" ", "_"), [2], size=360)
        _, found = doctor(*commands_of_the_docs(demo_checkpoint, root)[2])
        assert found["orientation"][0] == status, found
    assert f"{IMAGE} is mirrored" in found["orientation"][1]


# Recordings


def evaluate(folder, monkeypatch, preprocess, lengths=(4, 3)):
    """Run LeRobot's own evaluation of a scripted policy, recorded; return the actions' sum."""
    monkeypatch.setenv("SLURM_JOB_ID", "0")
    monkeypatch.setitem(ADAPTERS, "scripted", scripted.ADAPTER)
    torch.manual_seed(0)
    evaluate_all(
        {0: scripted.make_envs(lengths)},
        scripted.ScriptedPolicy(scripted.make_config()),
        RunRecorder(AttentionConfig(), folder, {}),
        preprocessor=preprocess,
        n_episodes=2 * len(lengths),
        start_seed=0,
    )
    return [*open_run(folder)]


def bright_second(batch):
    """The first environment shows black at first, as it is scripted; the second one something."""
    batch[IMAGE][1] = torch.linspace(0, 1, batch[IMAGE][1].numel()).reshape(batch[IMAGE][1].shape)
    return batch


def test_each_store_says_what_its_own_input_did_not_pass(tmp_path, monkeypatch, caplog):
    episodes = evaluate(tmp_path, monkeypatch, bright_second)
    black, bright = episodes[:2]
    (check,) = black.attributes["input_checks"]
    assert check == {
        "name": "pictures",
        "status": "warning",
        "detail": f"{IMAGE} shows one colour, 0",
        "remedy": "look at what the camera shows, and show it as in training",
    }
    assert bright.attributes["input_checks"] == []
    assert [len(episode.attributes["input_checks"]) for episode in episodes] == [1, 0, 1, 0]
    said = [record for record in caplog.records if "What the policy is fed" in record.getMessage()]
    assert len(said) == 1  # of two rollouts
    assert said[0].levelno == logging.WARNING
    assert f"1 of {len(CHECKS)} checks (pictures)" in said[0].getMessage()
    result = CliRunner().invoke(app, ["inspect", str(black.path)], env={"COLUMNS": "300"})
    assert f"input, pictures warning: {IMAGE} shows one colour, 0; remedy: look at" in result.stdout
    assert "input, " not in CliRunner().invoke(app, ["inspect", str(bright.path)]).stdout


def test_a_check_that_breaks_costs_a_recording_nothing(tmp_path, monkeypatch, caplog):
    whole = evaluate(tmp_path / "whole", monkeypatch, bright_second)

    def broken(name, facts):
        raise RuntimeError("no such fact")

    monkeypatch.setitem(feeding.CHECKS, "cameras", broken)
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="lerobot_attn"):
        episodes = evaluate(tmp_path / "broken", monkeypatch, bright_second)
    assert all(episode.is_complete for episode in episodes)
    assert all("input_checks" not in episode.attributes for episode in episodes)
    assert not [r for r in caplog.records if "feeding" in r.name and r.levelno >= logging.WARNING]
    assert any(
        "could not be checked" in r.getMessage() and r.levelno == logging.DEBUG for r in caplog.records
    )
    assert len(whole) == len(episodes) == 4
    for one, other in zip(whole, episodes, strict=True):
        np.testing.assert_array_equal(one.dataset.action, other.dataset.action)


def test_a_look_moves_no_random_state_and_changes_no_batch(demo_policy):
    from lerobot_attn.plugin.feeding.quiet import QuietChecks

    policy, preprocessor, postprocessor = demo_policy()
    observation = {camera: torch.rand(2, 3, 96, 96) for camera in recorded.CAMERAS}
    batch = preprocessor({**observation, STATE: torch.zeros(2, 8), "task": ["pick up the soup", ""]})
    before = {name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}
    state, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    look = QuietChecks(lambda: World("the robot")).look
    first, second = look(policy, preprocessor, postprocessor, batch, ["pick up the soup", ""])
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpys)
    assert batch.keys() >= before.keys()
    assert all(torch.equal(batch[name], value) for name, value in before.items())
    assert all(torch.equal(value, weights[name]) for name, value in policy.state_dict().items())
    assert "state range" in {check["name"] for check in first}  # no arm is at 0
    assert {check["name"] for check in second} - {check["name"] for check in first} == {"prompt"}
    json.dumps([first, second])
    batch = preprocessor({**observation, STATE: torch.zeros(2, 8), "task": ["pick " * 300, "pick"]})
    first, second = look(policy, preprocessor, postprocessor, batch, None)
    (cut,) = [check["detail"] for check in first if check["name"] == "prompt"]
    assert "cut off" in cut
    assert "prompt" not in {check["name"] for check in second}
