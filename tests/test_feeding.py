"""Is what a policy is fed what it was trained on: each check with planted faults, the command, recordings."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("lerobot")

from lerobot_attn.plugin.feeding import CHECKS, Expected, Facts, Fed, Recorded, World, check_feeding

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
    import torch
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.processor import NormalizerProcessorStep

    feature = PolicyFeature(FeatureType.STATE, (4,))
    stats = {STATE: {low: LOW, high: HIGH}}
    step = NormalizerProcessorStep({STATE: feature}, {FeatureType.STATE: NormalizationMode(mode)}, stats)
    values = torch.tensor(VALUES, dtype=torch.float32)[None]
    theirs = step._normalize_observation({STATE: values}, inverse=False)[STATE][0].numpy()
    scale = Expected(modes={STATE: mode}, statistics=stats).scale(STATE)
    np.testing.assert_allclose(theirs * scale.half + scale.centre, VALUES, atol=1e-5)


def test_pictures_that_are_normalised_are_judged_as_they_were_before():
    modes = {**EXPECTED.modes, IMAGE: "MEAN_STD"}
    mean, std = np.full((3, 1, 1), 0.45), np.full((3, 1, 1), 0.22)
    stats = {**EXPECTED.statistics, IMAGE: {"mean": mean, "std": std}}
    facts = changed("expected", modes=modes, statistics=stats)

    def of(picture):
        return facts._replace(fed=dataclasses.replace(FED, pictures={IMAGE: (first(picture) - mean) / std}))

    assert CHECKS["pictures"]("pictures", of(scene(0))).status == "ok"
    assert CHECKS["pictures"]("pictures", of(scene(0) * 255)).status == "failed"
