"""Firing neurons and adding to residuals: what the data say, what a live policy makes of them."""

import logging
from contextlib import contextmanager

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from adapter_contract import Watcher, act, instance_state  # noqa: E402
from recorded import write_dataset  # noqa: E402
from scripted import CAMERA, ScriptedAdapter, make_envs  # noqa: E402
from test_act import make_batch  # noqa: E402
from test_act import make_policy as make_act  # noqa: E402
from test_acting import SMALL, evaluate, noisy  # noqa: E402
from test_own_loop import observation  # noqa: E402
from test_pi05 import raw_observation  # noqa: E402
from test_recording import scripted_adapter  # noqa: E402, F401

from lerobot_attn import (  # noqa: E402
    AttentionConfig,
    BlockAttention,
    Condition,
    FireNeurons,
    FixedNoise,
    SteerResidual,
    capture_attention,
    intervene,
    open_run,
    record_dataset,
    record_episodes,
)
from lerobot_attn.errors import ConfigError, StoreError  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402
from lerobot_attn.policies.base import Site, SiteInfo  # noqa: E402
from lerobot_attn.policies.taps import replaced_attribute  # noqa: E402

STEPS = {
    "demo_policy": "num_inference_steps",
    "pi0_policy": "num_inference_steps",
    "smolvla_policy": "num_steps",
}
WRIST = {"camera": "image2"}


# Data


def neurons(units=None, **more):
    return {
        "kind": "neurons",
        "stream": "vlm",
        "units": {1: [3, 9]} if units is None else units,
        "how": "set",
        "value": 4.0,
        **more,
    }


def residual(vector=(1.0, -2.0, 2.0), **more):
    return {"kind": "residual", "stream": "expert", "layer": 1, "vector": vector, "value": 2.0, **more}


DRAW = {"random_like": {1: [3, 9]}, "seed": 2}


def test_a_condition_survives_yaml_and_a_store(tmp_path):
    np.save(tmp_path / "up.npy", np.array([1.0, -2.0, 2.0]))
    parts = [
        neurons({-1: 5, 0: [9, 3]}, value={0: 1, -1: 2.5}, tokens=[WRIST, {"words": "soup"}]),
        neurons(DRAW, match="residual"),
        neurons(stream="expert", how="ablate", value=None, tokens="actions", denoise_steps=[0, -1]),
        residual(str(tmp_path / "up.npy")),
        residual({"random_like": [1.0, -2.0, 2.0], "seed": 1}, tokens=WRIST, stream="vlm"),
    ]
    made = Condition.from_dict({"name": "fired", "interventions": parts})
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(made.to_dict()))
    assert Condition.from_yaml(tmp_path / "file.yaml") == made
    first, drawn, ablated, steered, random = made.interventions
    assert first.units == {-1: [5], 0: [3, 9]}
    assert first.values == {0: 1.0, -1: 2.5}
    assert drawn.like == {1: [3, 9]}
    assert ablated.value is None
    assert steered.vector == [1.0, -2.0, 2.0]
    assert steered.norm == random.norm == 3.0
    assert steered.sha256 != random.sha256
    assert random.drawn == {"random_like": steered.sha256, "seed": 1}
    np.testing.assert_allclose(np.linalg.norm(random.vector), 3, rtol=1e-6)
    for part in ("neurons of vlm: 5 of layer -1 and 3, 9 of layer 0, set to", "random neurons (seed 2)"):
        assert part in made.text
    for part in (
        "ablated at the action tokens, denoise steps 0, -1",
        "2 × a vector of norm 3",
        "camera image2",
    ):
        assert part in made.text
    assert "\n" not in made.text


WRONG = [
    (neurons({}), "got .*, expected layer → neurons"),
    (neurons({1: []}), r"got \[\] for layer 1, expected numbers of neurons"),
    (neurons({1: [-3]}), r"got \[-3\] for layer 1, expected numbers of neurons, from 0"),
    (neurons({1: [3, 3]}), "expected each neuron once"),
    (neurons({"one": [3]}), "got layer 'one', expected its number"),
    (neurons({"random_like": {1: [3]}, "sead": 1}), "expected random_like, and seed beside it"),
    (neurons(value=float("nan")), "neurons.value: got nan, expected a finite number"),
    (neurons(value=float("inf")), "got inf, expected a finite number"),
    (neurons(value=True), "got True, expected a finite number"),
    (neurons(value=None), "got None, expected a finite number"),
    (neurons(value={2: 1.0}), r"got layers \[2\], expected those of units: \[1\]"),
    (neurons(how="ablate"), "got 4.0 with how: ablate, expected none"),
    (neurons(how="fire"), "got 'fire', expected one of set, add, scale, ablate"),
    (neurons(stream="vision"), "got 'vision', expected one of vlm, expert"),
    (neurons(tokens="actions"), "got actions with stream: vlm"),
    (neurons(tokens="words"), "got 'words', expected all, actions or a selector"),
    (neurons(tokens={"all_but_top": 3}), "got all_but_top, expected one of camera"),
    (neurons(denoise_steps=[0]), r"got \[0\] with stream: vlm, expected all"),
    (neurons(match="residual"), "got residual with units that are no random draw"),
    (neurons(DRAW, match="residual", how="scale"), "got residual with how: scale, expected how: set or add"),
    ({"kind": "neurons", "units": {1: [3]}, "how": "set", "value": 1.0}, "stream is missing"),
    (residual([0.0, 0.0]), "expected a list of finite numbers, not all of them 0"),
    (residual([1.0, float("nan")]), "expected a list of finite numbers"),
    (residual([1e39]), "expected a list of finite numbers"),
    (residual([]), "expected a list of finite numbers"),
    (residual("none.npy"), "none.npy cannot be read"),
    (residual(value="2"), "residual.value: got '2', expected a finite number"),
]


@pytest.mark.parametrize(("part", "message"), WRONG)
def test_what_cannot_be_done_is_said_in_one_line(part, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Condition.from_dict({"name": "a_name", "interventions": [part]})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_pickle_is_no_vector(tmp_path):
    np.save(tmp_path / "bad.npy", np.array([{}], object))
    with pytest.raises(ConfigError, match=r"cannot be read \(not an array"):
        SteerResidual("vlm", 0, str(tmp_path / "bad.npy"), 1.0)


# A live policy


@pytest.fixture(scope="module", params=STEPS)
def loaded(request):
    """A policy of each family that takes two steps, a batch of one, and its preprocessor."""
    policy, preprocess, _ = request.getfixturevalue(request.param)(**{STEPS[request.param]: 2})
    return policy, preprocess(raw_observation(n=1)), preprocess


@contextmanager
def watching(policy, *sites):
    watcher = Watcher()
    with adapter_for(policy).observe(watcher, sites, compiled=False):
        yield watcher


def at(stream, layer, what="neurons"):
    return Site(stream, layer, what)


def test_what_is_fired_is_what_the_next_layers_read(loaded):
    """Each way to do it, at chosen tokens and steps; the rest of the very layer is bit for bit untouched."""
    policy, batch, preprocess = loaded
    feature = adapter_for(policy).sites()[at("expert", 2, "residual")].n_units
    vector = np.linspace(-1, 1, feature).astype(np.float32)
    parts = [
        FireNeurons("vlm", {0: [3, 9]}, "set", 4.0, tokens=WRIST),
        FireNeurons("expert", {0: [1]}, "add", 0.5, tokens="actions", denoise_steps=[-1]),
        FireNeurons("expert", {0: [2]}, "scale", -2.0),
        FireNeurons("expert", {0: [5, 7]}, "ablate"),
        SteerResidual("vlm", 1, np.ones(adapter_for(policy).sites()[at("vlm", 1, "residual")].n_units), 3.0),
        SteerResidual("expert", 2, vector.tolist(), 2.0, denoise_steps=[0]),
    ]
    sites = [at("vlm", 0), at("expert", 0), at("vlm", 1, "residual"), at("expert", 2, "residual")]
    with (
        capture_attention(policy, AttentionConfig(layers=[-1])) as capture,
        watching(policy, *sites) as before,
    ):
        act(policy, batch, 1)
    layout = capture.records[0].layout
    for number, part in enumerate(parts):  # each by itself, for what comes later depends on what came before
        with intervene(policy, part, preprocessor=preprocess), watching(policy, *sites) as after:
            act(policy, batch, 1)
        site = sites[(0, 1, 1, 1, 2, 3)[number]]
        was, now = before.values[site], after.values[site]
        expected = was[0].clone()
        wrist = next(one for one in layout.segments if one.name.endswith("image2"))
        if number == 0:
            expected[:, wrist.start : wrist.stop, [3, 9]] = 4.0
        elif number == 1:
            assert torch.equal(now[0], was[0])
            expected = was[1].clone()
            expected[:, layout.first_action_query :, 1] += 0.5
            if layout.first_action_query:
                assert torch.equal(now[1][:, 0], was[1][:, 0])
        elif number == 2:
            expected[:, :, 2] *= -2
        elif number == 3:
            expected[:, :, [5, 7]] = 0
        elif number == 4:
            expected += 3
        else:
            expected += 2 * torch.from_numpy(vector)
        assert torch.equal(now[1 if number == 1 else 0], expected), part.said


def test_nothing_is_left_behind_and_what_does_nothing_changes_no_bit(loaded):
    policy, batch, _ = loaded
    idle = [
        FireNeurons("vlm", {0: [3], 1: [4]}, "add", 0.0),
        FireNeurons("expert", {0: [3]}, "scale", 1.0),
        SteerResidual(
            "expert", 0, [1.0] * adapter_for(policy).sites()[at("expert", 0, "residual")].n_units, 0.0
        ),
    ]
    actions, random_state = act(policy, batch, 1)
    policy.reset()
    before = instance_state(policy)
    with intervene(policy, idle):
        found, state = act(policy, batch, 1)
    assert torch.equal(actions, found)
    assert torch.equal(random_state, state)
    with intervene(policy, FireNeurons("expert", {1: list(range(40))}, "ablate")):
        ablated, state = act(policy, batch, 1)
    assert not torch.equal(ablated, actions)
    assert torch.equal(random_state, state)
    policy.reset()
    assert instance_state(policy) == before
    assert torch.equal(act(policy, batch, 1)[0], actions), "ablating outlived its context"


@contextmanager
def planted(policy, stream, layer, unit, column):
    """Write what a neuron writes."""
    weight = adapter_for(policy).towers[stream].layers[layer].mlp.down_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[:, unit] = column
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_the_dose_response_of_a_planted_neuron_is_found_and_of_an_inert_one_is_not(loaded):
    """The causal one writes one direction into the last layer, so what comes of each dose can be computed."""
    policy, batch, _ = loaded
    layer = adapter_for(policy).describe().n_layers - 1
    site = at("expert", layer, "residual")
    n_features = adapter_for(policy).sites()[site].n_units
    direction = torch.linspace(-1, 1, n_features)

    def fired(unit, dose):
        with (
            intervene(policy, FireNeurons("expert", {layer: [unit]}, "add", dose)),
            watching(policy, site) as watcher,
        ):
            return act(policy, batch, 2)[0], watcher.values[site][0]

    with planted(policy, "expert", layer, 6, direction), planted(policy, "expert", layer, 7, 0.0):
        actions, _ = act(policy, batch, 2)
        base = fired(6, 0.0)[1]
        moved = {}
        for dose in (-2.0, 1.0, 2.0, 4.0):
            found, streams = fired(6, dose)
            moved[dose] = (found - actions).flatten()
            written = (
                streams - base
            )  # the action expert of Pi0.5 gates it by the flow time, alike for all doses
            moved[dose, "written"] = written
        assert torch.equal(fired(7, 400.0)[0], actions), "an inert neuron"
    for dose in (-2.0, 2.0, 4.0):
        torch.testing.assert_close(moved[dose, "written"], dose * moved[1.0, "written"], rtol=1e-3, atol=1e-4)
    assert 0 < moved[1.0].norm() < moved[2.0].norm() < moved[4.0].norm()
    assert moved[2.0] @ moved[-2.0] < 0


def test_random_draws_match_layer_number_and_norm(loaded):
    policy, _, _ = loaded
    adapter, like = adapter_for(policy), {1: [3, 9], -2: [0, 1, 5]}

    def resolved(**more):
        part = FireNeurons("vlm", **more)
        with intervene(policy, part) as acting:
            (found,) = acting.condition.interventions
        assert Condition.from_dict(acting.condition.to_dict()) == acting.condition
        with intervene(policy, found) as acting:  # as somebody may do again what a store says
            assert acting.condition.interventions == (found,)
        return found

    def written(layer, units, value):
        vectors = adapter.value_vectors(at("vlm", layer), units)
        return float((value * vectors.sum(0)).norm())

    fired = resolved(units=like, how="add", value=4.0)
    n_layers = adapter.describe().n_prefix_layers
    assert sorted(fired.units) == [1, n_layers - 2]
    draws = [resolved(units={"random_like": like, "seed": seed}, how="add", value=4.0) for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0].units != draws[2].units
    for draw in draws:
        assert {layer: len(units) for layer, units in draw.units.items()} == {
            layer: len(units) for layer, units in fired.units.items()
        }
        assert not any(set(units) & set(fired.units[layer]) for layer, units in draw.units.items())
        assert draw.value == 4.0
        assert draw.drawn["random_like"] == {str(layer): units for layer, units in fired.units.items()}
        assert "drawn at random, seed" in draw.said
        for layer, units in draw.units.items():
            norms = draw.norms[str(layer)]
            assert norms["activations"] == fired.norms[str(layer)]["activations"]
            np.testing.assert_allclose(norms["residual"], written(layer, units, 4.0), rtol=1e-4)
    n_units = adapter.sites()[at("vlm", 1)].n_units
    half = list(range(0, n_units, 2))
    assert resolved(units={"random_like": {1: half}}, how="ablate").units == {1: list(range(1, n_units, 2))}
    matched = resolved(units={"random_like": like, "seed": 0}, how="add", value=4.0, match="residual")
    assert matched.units == draws[0].units
    assert matched.drawn["match"] == "residual"
    for layer, value in matched.values.items():
        expected = written(layer, fired.units[layer], 4.0)
        np.testing.assert_allclose(written(layer, matched.units[layer], value), expected, rtol=1e-4)
        np.testing.assert_allclose(matched.norms[str(layer)]["residual"], expected, rtol=1e-4)


def test_the_last_layer_of_the_language_model_is_said_to_change_nothing(loaded, caplog):
    policy, batch, _ = loaded
    last = adapter_for(policy).describe().n_prefix_layers - 1
    width = adapter_for(policy).sites()[at("vlm", last, "residual")].n_units
    parts = [FireNeurons("vlm", {-1: [3]}, "set", 100.0), SteerResidual("vlm", last, [1.0] * width, 50.0)]
    actions, _ = act(policy, batch, 1)
    with caplog.at_level(logging.WARNING), intervene(policy, parts) as acting:
        assert torch.equal(act(policy, batch, 1)[0], actions)
    for said in (
        f"vlm.{last}.neurons cannot change an action",
        f"vlm.{last}.residual cannot change an action",
    ):
        assert said in caplog.text
    assert [part["reaches_actions"] for part in acting.condition.to_dict()["interventions"]] == [False, False]
    assert acting.condition.text.count("which reaches no action") == 2
    caplog.clear()
    with (
        caplog.at_level(logging.WARNING),
        intervene(policy, FireNeurons("vlm", {0: [3]}, "add", 0.0)) as acting,
    ):
        pass
    assert not caplog.text
    assert acting.condition.interventions[0].reaches_actions


def test_what_the_policy_cannot_take_is_said_in_one_line_and_leaves_nothing(loaded):
    policy, batch, preprocess = loaded
    n_units = adapter_for(policy).sites()[at("vlm", 0)].n_units
    n_expert = adapter_for(policy).sites()[at("expert", 0)].n_units
    before = instance_state(policy)
    early = [
        (
            FireNeurons("vlm", {0: [n_units]}, "ablate"),
            f"neuron {n_units} of vlm layer 0 does not exist, expected 0",
        ),
        (FireNeurons("vlm", {99: [0]}, "ablate"), "neurons: vlm layer 99 does not exist"),
        (FireNeurons("vlm", {0: [1], -4: [2]}, "ablate"), "two of which are the same layer"),
        (FireNeurons("expert", {0: [1]}, "ablate", denoise_steps=[9]), "denoise step 9 does not exist"),
        (
            FireNeurons("vlm", {"random_like": {0: list(range(n_units - 1))}}, "ablate"),
            "expected at most half",
        ),
        (SteerResidual("vlm", 0, [1.0, 2.0], 1.0), "got 2 numbers, expected"),
        (FireNeurons("vlm", {0: [1]}, "ablate", tokens={"words": "soup"}), "no tokenizer is known"),
    ]
    for part, message in early:
        with pytest.raises(ConfigError, match=message) as caught, intervene(policy, part):
            pass
        assert "\n" not in str(caught.value)
    late = [
        (FireNeurons("expert", {0: [1]}, "ablate", tokens=WRIST), "camera image2 has no token in the expert"),
        (FireNeurons("vlm", {0: [1]}, "ablate", tokens={"camera": "left"}), "got 'left', expected one that"),
        (FireNeurons("vlm", {0: [1]}, "ablate", tokens={"words": "moon"}), "'moon' is not in the task"),
        (
            FireNeurons("expert", {0: [1]}, "set", 1e39),
            "1e.39 at expert.0.neurons gives values that torch.float32",
        ),
        (FireNeurons("expert", {0: range(n_expert)}, "set", 3.4e38), "actions are not finite with neurons"),
    ]
    for part, message in late:
        with (
            intervene(policy, part, preprocessor=preprocess),
            capture_attention(policy, AttentionConfig(layers=[-1])) as capture,
            pytest.raises(ConfigError, match=message) as caught,
        ):
            act(policy, batch, 1)
        assert "\n" not in str(caught.value)
        assert not capture.records
    with (
        torch.autocast("cpu", dtype=torch.float16),
        intervene(policy, FireNeurons("vlm", {0: [1]}, "add", 1e5)),
        pytest.raises(ConfigError, match=r"values that torch\.float16 cannot hold"),
    ):
        act(policy, batch, 1)
    with capture_attention(policy, AttentionConfig(layers=[-1])):
        fire = intervene(policy, FireNeurons("vlm", {0: [1]}, "ablate"))
        with pytest.raises(ConfigError, match="already being captured"), fire:
            pass
    policy.reset()
    assert instance_state(policy) == before


def test_it_acts_together_with_the_others_and_with_gradients(loaded):
    policy, batch, preprocess = loaded
    fire = FireNeurons("vlm", {1: list(range(20))}, "set", 2.0, tokens={"words": "soup"})
    both = [BlockAttention(WRIST, passes="both"), fire, FixedNoise(0)]
    batch = preprocess({**raw_observation(n=1), "task": ["pick up the soup"]})
    found = []
    for parts in (both, both[:1] + both[2:], both[1:]):
        with intervene(policy, parts, preprocessor=preprocess), torch.enable_grad():
            policy.reset()
            found.append(policy.predict_action_chunk(batch).detach())
    assert not any(torch.equal(found[0], other) for other in found[1:])
    with watching(policy, at("vlm", 1)) as before:
        act(policy, preprocess(raw_observation()), 1)
    fire = FireNeurons("vlm", {1: [4]}, "set", 9.0, tokens={"segment": "task"})
    with intervene(policy, fire, preprocessor=preprocess), watching(policy, at("vlm", 1)) as after:
        act(policy, preprocess(raw_observation()), 1)
    (was,), (now,) = before.values[at("vlm", 1)], after.values[at("vlm", 1)]
    n_words = (now != was).any(-1).sum(-1)
    assert (now[..., 4] == 9).sum(-1).tolist() == n_words.tolist()
    assert n_words[0] > n_words[1] > 0, "each row of a batch has its own words"
    with intervene(policy, both, preprocessor=preprocess):
        other = {**batch, "observation.images.image2": 1 - batch["observation.images.image2"]}
        policy.reset()
        assert torch.equal(policy.predict_action_chunk(other), found[0]), "a blocked camera's pixels matter"


def test_families_without_neurons_and_compiled_policies_are_refused(demo_policy, xvla_policy, fast_policy):
    part = FireNeurons("expert", {0: [1]}, "ablate")
    for policy in (make_act(), xvla_policy()[0], fast_policy()):
        message = (
            r"neurons: got a policy of type \w+, expected one of pi0, pi05, smolvla: of .* attention alone"
        )
        with pytest.raises(ConfigError, match=message), intervene(policy, part):
            pass
    compiled = demo_policy(num_inference_steps=2, compile_model="true", compile_mode="default")[0]
    with pytest.raises(ConfigError, match="neurons: the policy is compiled"), intervene(compiled, part):
        pass
    with intervene(make_act(), FixedNoise()) as acting:
        assert make_batch()
    assert acting.condition.interventions == (FixedNoise(),)


# Where it acts


def test_an_own_loop_says_what_was_fired_and_writes_nothing_of_a_dose_that_is_too_large(
    demo_policy, tmp_path
):
    policy, preprocess, _ = demo_policy(num_inference_steps=1)

    def record(name, value):
        part = FireNeurons("vlm", DRAW, "add", value)
        with (
            record_episodes(
                policy,
                tmp_path / name,
                AttentionConfig(layers=[-1], mean_layers="none", cameras=False),
                preprocessor=preprocess,
                fps=10,
                interventions=Condition("fired", (part,)),
            ) as recording,
            recording.episode("pick up the soup") as episode,
            torch.inference_mode(),
        ):
            policy.reset()
            for frame in range(2):
                raw = observation(frame)
                action = policy.select_action(preprocess(raw))
                episode.step(raw, action[0])

    record("fired", 4.0)
    (episode,) = open_run(tmp_path / "fired")
    (said,) = episode.condition.interventions
    assert "drawn at random, seed 2" in episode.condition.text
    assert set(said["norms"]) == {"1"}
    assert len(said["units"]["1"]) == 2
    assert said["drawn"]["random_like"] == {"1": [3, 9]}
    with pytest.raises(ConfigError, match="cannot hold"):
        record("infinite", 1e39)
    assert not list((tmp_path / "infinite").rglob("*.zarr"))


class NeuronAdapter(ScriptedAdapter):
    """The scripted policy with neurons, whose activations are 0 and are added to its actions."""

    def sites(self):
        return {**super().sites(), at("expert", 0): SiteInfo(n_units=8, reaches_actions=False)}

    def value_vectors(self, site, units):
        return torch.eye(8)[list(units)]

    @contextmanager
    def observe(self, probe, sites, *, compiled):
        sites = list(sites)
        attention = [site for site in sites if site.what == "attention"]
        if attention or not sites:
            with super().observe(probe, attention, compiled=compiled):
                yield
            return
        predict = self.policy.predict_action_chunk

        def observed(batch, **kwargs):
            actions = predict(batch, **kwargs)
            mask = torch.ones(len(actions), 1, dtype=torch.bool)
            probe.begin(type("Inputs", (), {"layout": None, "key_mask": mask, "token_id": mask}))
            for step in range(self.policy.config.num_inference_steps):
                probe.denoise_step(step)
                value = torch.zeros(len(actions), actions.shape[1], 8)
                given = probe.at(sites[0], value)
                actions = actions + (value if given is None else given).sum(-1, keepdim=True)
            probe.end(actions)
            return actions

        with replaced_attribute(self.policy, "predict_action_chunk", observed):
            yield


FIRED = Condition(
    "fired", (FireNeurons("expert", {"random_like": {0: [1, 2]}, "seed": 3}, "add", 2.0), FixedNoise(3))
)


@pytest.fixture
def neuron_adapter(scripted_adapter, monkeypatch):  # noqa: F811
    from lerobot_attn import policies

    monkeypatch.setitem(policies.ADAPTERS, "scripted", (__name__, "NeuronAdapter"))


@pytest.mark.usefixtures("neuron_adapter")
def test_evaluations_and_replays_say_it_and_go_on_in_it(tmp_path):
    evaluate(tmp_path, {0: make_envs([4])}, FIRED)
    evaluate(tmp_path / "noise", {0: make_envs([4])}, Condition("noise", (FixedNoise(3),)))
    (episode,), (other,) = open_run(tmp_path / "attention"), open_run(tmp_path / "noise" / "attention")
    said = episode.condition.interventions[0]
    assert len(said["units"]["0"]) == 2
    assert not {1, 2} & set(said["units"]["0"])
    assert said["norms"] == {"0": {"activations": 2.82843, "residual": 2.82843}}
    assert "which reaches no action" in episode.condition.text
    n_steps = episode.dataset.sizes["denoise_step"]
    shifted = episode.arrays["action"].values - other.arrays["action"].values
    np.testing.assert_allclose(shifted, 4 * n_steps, rtol=1e-5)
    evaluate(tmp_path, {0: make_envs([4])}, FIRED, existing="skip")
    seed = Condition(
        "fired", (FireNeurons("expert", {"random_like": {0: [1, 2]}, "seed": 4}, "add", 2.0), FixedNoise(3))
    )
    with pytest.raises(StoreError, match="was recorded with condition"):
        evaluate(tmp_path, {0: make_envs([4])}, seed, existing="skip")
    data = write_dataset(tmp_path / "data", (7,), cameras=(CAMERA,), dims=(3, 4), size=8)
    record_dataset(noisy(), data, tmp_path / "replay", AttentionConfig(**SMALL), interventions=FIRED)
    (replayed,) = open_run(tmp_path / "replay")
    assert replayed.condition.interventions[0] == said
