"""Neurons and residuals: each way in which a stored number could be another one than the policy computed."""

import json
import logging
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import zarr

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import scripted  # noqa: E402
from adapter_contract import act  # noqa: E402
from test_act import make_policy as make_act  # noqa: E402
from test_pi05 import IMAGE, WRIST, raw_observation  # noqa: E402
from test_vision import record_frames  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from lerobot_attn import open_episode, open_run, record_episodes  # noqa: E402
from lerobot_attn.capture import HostCopies, Selection, capture_attention, find_tokenizer  # noqa: E402
from lerobot_attn.capture.activations import ActivationChoice, ActivationCollector  # noqa: E402
from lerobot_attn.cli import app  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.errors import CaptureError, ConfigError  # noqa: E402
from lerobot_attn.layout import Kind  # noqa: E402
from lerobot_attn.plugin.own_options import attention_config  # noqa: E402
from lerobot_attn.policies import ADAPTERS, adapter_for  # noqa: E402
from lerobot_attn.policies.base import PolicyDescription, Site, SiteInfo  # noqa: E402
from lerobot_attn.recording.activations import ActivationRows  # noqa: E402
from lerobot_attn.store.schema import BY_NAME  # noqa: E402
from lerobot_attn.synthetic import FAMILIES, SyntheticPlan, write_planted_episode  # noqa: E402
from lerobot_attn.synthetic.prompts import key_kinds, make_prompt  # noqa: E402
from lerobot_attn.verify import verify_episode  # noqa: E402

ALL = {"vlm": "all", "expert": "all"}
NEURONS = AttentionConfig(layers="none", mean_layers="none", neurons=ALL)
EVERYTHING = replace(NEURONS, residuals=ALL, record_full=True)
NAMES = ("vlm_neurons", "expert_neurons", "vlm_residual", "expert_residual")


# Reduced over groups of tokens


def collected(layout, kinds, executed, values, *, full=False):
    """Collect values: {(stream, layer, step): (batch, token, unit)} of neurons."""
    n_units = next(iter(values.values())).shape[-1]
    layers = {stream: sorted({key[1] for key in values if key[0] == stream}) for stream in ("vlm", "expert")}
    n_steps = 1 + max(step for _, _, step in values)
    choices = [ActivationChoice(s, "neurons", tuple(chosen), n_units) for s, chosen in layers.items()]
    collector, copies = ActivationCollector(choices, n_steps, full=full), HostCopies()
    collector.begin(layout, kinds, executed, copies)
    for (stream, layer, step), value in values.items():
        collector.take(Site(stream, layer, "neurons"), step, value)
    return collector.groups, {name: tensor.numpy() for name, tensor in collector.end().items()}


@pytest.mark.parametrize("family", ["pi05", "pi0", "smolvla with special tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_and_maximum_of_each_group_are_those_of_its_own_tokens(family, dtype):
    """Two prompts of different lengths in a batch: each row has its own words. What is masked is NaN here."""
    plan = replace(FAMILIES[family], grid=(2, 2))
    layout, generator = plan.layout, torch.Generator().manual_seed(0)
    prompts = [make_prompt(replace(plan, task=task), 0) for task in ("lift", "pick up the blocks")]
    kinds = np.stack([key_kinds(plan, prompt) for prompt in prompts])
    values = {}
    for stream, layer, step in (("vlm", 0, 0), ("vlm", 4, 0), ("expert", 2, 0), ("expert", 2, 1)):
        n_tokens = layout.prefix_len if stream == "vlm" else layout.n_queries
        value = torch.randn(2, n_tokens, 5, generator=generator).to(dtype)
        if stream == "vlm":
            value[torch.from_numpy(kinds[:, : layout.prefix_len] == Kind.PADDING)] = float("nan")
        values[stream, layer, step] = value
    groups, found = collected(layout, kinds, plan.executed_queries, values)
    cameras = [camera.name for camera in layout.cameras if not camera.is_empty]
    expected = [*cameras, "task", *(["state"] if family != "pi0" else []), "template"]
    assert groups["vlm"] == (*expected, *(["special"] if any(plan.image_special) else []))
    assert groups["expert"] == (("state", "actions") if family == "pi0" else ("actions",))
    assert found["vlm_neurons"].shape == (1, 2, 2, len(groups["vlm"]), 2, 5)
    kind_of = {"task": Kind.TASK, "state": Kind.STATE, "template": Kind.TEMPLATE, "special": Kind.SPECIAL}
    for (stream, layer, step), value in values.items():
        array = found[f"{stream}_neurons"]
        slot = {0: 0, 4: 1, 2: 0}[layer]
        for row, number in np.ndindex(2, len(groups[stream])):
            group = groups[stream][number]
            tokens = value[row].double().numpy()
            if stream == "vlm" and group in kind_of:
                tokens = tokens[kinds[row, : layout.prefix_len] == kind_of[group]]
            elif stream == "vlm":
                segment = next(one for one in layout.segments if one.name == group)
                tokens = tokens[segment.start : segment.stop]
            elif group == "actions":
                first = layout.first_action_query
                tokens = tokens[first : first + plan.n_executed]
            else:
                tokens = tokens[:1]
            mean, most = array[step, slot, row, number].astype(np.float64)
            np.testing.assert_allclose(mean, tokens.mean(axis=0), rtol=2**-10, atol=1e-6)
            np.testing.assert_array_equal(most, tokens.max(axis=0).astype(np.float16))


def test_a_group_without_tokens_is_nan_in_that_row_alone():
    plan = FAMILIES["pi05"]
    layout = plan.layout
    kinds = np.stack([key_kinds(plan, make_prompt(plan, 0))] * 2)
    kinds[1, kinds[1] == Kind.STATE] = Kind.PADDING
    camera = layout.segments[0]
    kinds[1, camera.start : camera.stop] = Kind.PADDING
    value = torch.rand(2, layout.prefix_len, 3)
    values = {("vlm", 0, 0): value, ("expert", 0, 0): torch.rand(2, layout.n_queries, 3)}
    groups, found = collected(layout, kinds, plan.executed_queries, values)
    is_nan = np.isnan(found["vlm_neurons"][0, 0])
    assert not is_nan[0].any()
    for number, group in enumerate(groups["vlm"]):
        assert (is_nan[1, number] == (group in ("state", camera.name))).all(), group


def test_every_token_is_kept_and_padding_is_nan():
    plan = replace(FAMILIES["smolvla"], grid=(2, 2))
    layout = plan.layout
    kinds = key_kinds(plan, make_prompt(plan, 0))[None]
    value = torch.randn(1, layout.prefix_len, 3)
    values = {("vlm", 0, 0): value, ("expert", 0, 0): torch.randn(1, layout.n_queries, 3)}
    _, found = collected(layout, kinds, plan.executed_queries, values, full=True)
    padding = kinds[0, : layout.prefix_len] == Kind.PADDING
    kept = found["vlm_neurons_full"][0, 0, 0]
    assert padding.any()
    assert np.isnan(kept[padding]).all()
    np.testing.assert_array_equal(kept[~padding], value[0, ~padding].half().numpy())
    np.testing.assert_array_equal(found["expert_neurons_full"][0, 0], values["expert", 0, 0].half().numpy())


def test_what_float16_cannot_hold_is_infinite_and_never_another_number():
    plan = FAMILIES["pi05"]
    layout, kinds = plan.layout, key_kinds(plan, make_prompt(plan, 0))[None]
    value = torch.ones(1, layout.prefix_len, 4)
    value[..., 1], value[..., 2], value[..., 3] = 65504, 1e5, -1e9
    expert = torch.ones(1, layout.n_queries, 4)
    values = {("vlm", 0, 0): value.bfloat16().float(), ("expert", 0, 0): expert}
    values["vlm", 0, 0][..., 1] = 65504  # which bfloat16 rounds up
    _, found = collected(layout, kinds, plan.executed_queries, values)
    for mean_and_max in found["vlm_neurons"][0, 0, 0]:
        np.testing.assert_array_equal(mean_and_max, [[1, 65504, np.inf, -np.inf]] * 2)


@pytest.mark.parametrize("shape", [(1, 7, 3), (1, 60, 4), (60, 3)])
def test_another_shape_is_an_error(shape):
    plan = replace(FAMILIES["pi05"], grid=(2, 2))
    choice = ActivationChoice("vlm", "neurons", (0,), 3)
    collector = ActivationCollector([choice], 1, full=False)
    kinds = key_kinds(plan, make_prompt(plan, 0))[None]
    collector.begin(plan.layout, kinds, plan.executed_queries, HostCopies())
    message = r"neurons of layer 0 of the vlm has shape .*, expected \(batch, 60 tokens, 3 units\)"
    with pytest.raises(CaptureError, match=message):
        collector.take(Site("vlm", 0, "neurons"), 0, torch.zeros(shape))


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neurons": "all"}, "neurons: got 'all', expected the layers of each stream, such as {vlm: all"),
        ({"neurons": {"vision": "all"}}, "neurons: got the stream 'vision', expected vlm or expert"),
        ({"residuals": {"vlm": "last"}}, "residuals, vlm: got 'last', expected a list of indices or 'all'"),
        ({"record_full": True}, "record_full: got true without neurons and residuals"),
        ({"record_full": "yes", "neurons": ALL}, "record_full: got 'yes'"),
        ({"neurons": ALL, "compiled": True}, "compiled: got true together with neurons, expected one of"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, message):
    with pytest.raises(ConfigError) as error:
        AttentionConfig(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_lines_and_yaml_say_the_same(tmp_path):
    import draccus

    from lerobot_attn.plugin.command_line import ROLLOUT, attention_options
    from lerobot_attn.plugin.options import AttentionEvalConfig

    wanted = AttentionConfig(neurons={"vlm": [3, -1], "expert": "all"}, residuals={"vlm": [0]})
    text = [
        "--attention.neurons={vlm: [3, -1], expert: all}",
        "--attention.residuals={vlm: [0], expert: none}",
    ]
    assert draccus.parse(AttentionEvalConfig, args=text).attention == wanted
    assert attention_config([option.replace("--attention.", "--") for option in text]) == wanted
    file = tmp_path / "capture.yaml"
    file.write_text("neurons: {vlm: [3, -1], expert: all}\nresiduals:\n  vlm: 0\n  expert: []\n")
    assert AttentionConfig.from_yaml(file) == wanted
    written = attention_options(wanted.to_dict(), ROLLOUT)
    assert draccus.parse(AttentionEvalConfig, args=written).attention == wanted


SIZES = PolicyDescription(
    policy_type="tiny",
    n_layers=2,
    n_prefix_layers=3,
    n_heads=1,
    n_denoise_steps=4,
    chunk_size=5,
    n_action_steps=3,
)
SITES = {
    **{Site("vlm", layer, "neurons"): SiteInfo(n_units=16) for layer in range(3)},
    **{Site("expert", layer, "neurons"): SiteInfo(n_units=8) for layer in range(2)},
}


def test_layers_that_do_not_exist_are_named():
    config = replace(NEURONS, neurons={"vlm": [3]})
    with pytest.raises(ConfigError, match=r"neurons: layer of the vlm 3 does not exist: this policy has 3"):
        Selection.resolve(config, SIZES, SITES)
    with pytest.raises(ConfigError, match=r"residuals: this policy \(tiny\) has no residual of stream 'vlm'"):
        Selection.resolve(replace(NEURONS, residuals=ALL), SIZES, SITES)


def test_the_size_is_known_before_the_run():
    """Of Pi0.5 at full size 0.59 MB a group and reduction, for all neurons of its language model."""
    sizes = replace(SIZES, n_layers=18, n_prefix_layers=18, n_denoise_steps=10)
    sites = {Site("vlm", layer, "neurons"): SiteInfo(n_units=16384) for layer in range(18)}
    sites |= {Site("expert", layer, "neurons"): SiteInfo(n_units=4096) for layer in range(18)}
    selection = Selection.resolve(NEURONS, sizes, sites)
    layout = FAMILIES["pi05"].layout
    vlm = [selection.bytes_per_inference(layout, None, {"vlm": n, "expert": 0}) for n in (1, 2, 5)]
    assert vlm == [n * 2 * 18 * 16384 * 2 for n in (1, 2, 5)]
    expert = selection.bytes_per_inference(layout, None, {"vlm": 0, "expert": 1})
    assert expert == 10 * 2 * 18 * 4096 * 2
    full = replace(selection, record_full=True).bytes_per_inference(layout, None, {"vlm": 1, "expert": 0})
    assert full - vlm[0] == 18 * 2 * (layout.prefix_len * 16384 + 10 * layout.n_queries * 4096)


@pytest.mark.parametrize("family", ["act", "xvla", "pi0_fast"])
def test_policies_without_neurons_refuse_in_one_line(family, request):
    make = {"act": lambda: make_act, "xvla": lambda: request.getfixturevalue("xvla_policy")}
    made = make.get(family, lambda: request.getfixturevalue("fast_policy"))()()
    policy = made[0] if isinstance(made, tuple) else made
    for settings in ({"neurons": {"expert": [0]}}, {"residuals": {"vlm": "all"}}):
        message = r"this policy \(\w+\) has no \w+ of stream .*, got .*, expected none; leave the setting out"
        with (
            pytest.raises(ConfigError, match=message) as error,
            capture_attention(policy, AttentionConfig(**settings)),
        ):
            pass
        assert "\n" not in str(error.value)


# Of real policies


def towers(name, policy):
    """The layers and the last norm of both streams, found by hand."""
    if name == "smolvla":
        both = policy.model.vlm_with_expert
        return {"vlm": both.vlm.model.text_model, "expert": both.lm_expert}
    both = policy.model.paligemma_with_expert
    return {"vlm": both.paligemma.model.language_model, "expert": both.gemma_expert.model}


@pytest.fixture(scope="module", params=["pi05", "pi0", "smolvla"])
def family(request):
    """A family's name, its policy and its preprocessor."""
    name = request.param
    load = request.getfixturevalue({"pi05": "demo_policy"}.get(name, f"{name}_policy"))
    steps = "num_steps" if name == "smolvla" else "num_inference_steps"
    policy, preprocessor, _ = load(**{steps: 2})
    return name, policy, preprocessor


@contextmanager
def noted(name, policy):
    """What plain hooks see: array → for each layer one (batch, token, unit) a call."""
    seen, hooks = {}, []

    def note(calls):
        return lambda module, args, *rest: calls.append(args[0].detach().clone())

    for stream, tower in towers(name, policy).items():
        layers = list(tower.layers)
        norms = [*(layer.input_layernorm for layer in layers[1:]), tower.norm]
        for array, modules in (
            (f"{stream}_neurons", [layer.mlp.down_proj for layer in layers]),
            (f"{stream}_residual", norms),
        ):
            seen[array] = [[] for _ in modules]
            for module, calls in zip(modules, seen[array], strict=True):
                hooks.append(module.register_forward_pre_hook(note(calls)))
    yield seen
    for hook in hooks:
        hook.remove()


def groups_by_hand(record, stream):
    """Name → (batch, token) bool, of the record's own table of kinds and segments."""
    layout, n = record.layout, record.batch_size
    if stream == "expert":
        tokens = np.zeros((n, layout.n_queries), bool)
        first = layout.n_queries - record.policy.chunk_size
        tokens[:, first : first + record.policy.n_action_steps] = True
        state = np.arange(layout.n_queries)[None].repeat(n, 0) < first
        return {**({"state": state} if first else {}), "actions": tokens}
    kinds = record.key_kind[:, : layout.prefix_len]
    found = {}
    for camera in (IMAGE, WRIST):
        segment = next(one for one in layout.segments if one.name == camera)
        found[camera] = np.zeros(kinds.shape, bool)
        found[camera][:, segment.start : segment.stop] = True
    for kind, group in ((Kind.TASK, "task"), (Kind.STATE, "state"), (Kind.TEMPLATE, "template")):
        if (kinds == kind).any():
            found[group] = kinds == kind
    return found


def test_stored_values_are_those_of_plain_hooks_reduced_by_hand(family):
    name, policy, preprocessor = family
    batch = preprocessor(raw_observation())
    plain, random_state = act(policy, batch, 3, n=2)
    with noted(name, policy) as seen:
        act(policy, batch, 3)
    tokenizer = find_tokenizer(preprocessor)
    with capture_attention(policy, EVERYTHING, tokenizer=tokenizer) as capture:
        watched, watched_state = act(policy, batch, 3, n=2)
    (record,) = capture.drain()
    assert torch.equal(plain, watched)
    assert torch.equal(random_state, watched_state)
    assert set(record.activations) == {*NAMES, *(f"{one}_full" for one in NAMES)}
    for array in NAMES:
        stream = array.partition("_")[0]
        groups = groups_by_hand(record, stream)
        assert record.activation_groups[stream] == tuple(groups)
        true = np.array([[call.float().numpy() for call in calls] for calls in seen[array]])
        true = true.astype(np.float64)  # (layer, step, batch, token, unit)
        found = record.activations[array]
        found = found[:, None] if stream == "vlm" else found  # (batch, step, group, reduction, layer, unit)
        full = record.activations[f"{array}_full"]
        full = full[:, None] if stream == "vlm" else full  # (batch, step, layer, token, unit)
        n_layers, n_steps, n_batch, n_tokens, n_units = true.shape
        assert found.shape == (n_batch, n_steps, len(groups), 2, n_layers, n_units)
        assert found.dtype == full.dtype == np.float16
        for row in range(n_batch):
            for number, tokens in enumerate(groups.values()):
                chosen = true[:, :, row, tokens[row]]
                for reduction, expected in enumerate((chosen.mean(axis=2), chosen.max(axis=2))):
                    kept = found[row, :, number, reduction].astype(np.float64).swapaxes(0, 1)
                    np.testing.assert_allclose(kept, expected, rtol=2**-10, atol=2e-6)
            is_token = np.ones(n_tokens, bool)
            if stream == "vlm":
                is_token = record.key_kind[row, :n_tokens] != Kind.PADDING
                assert np.isnan(full[row][..., ~is_token, :]).all()
            kept = full[row][..., is_token, :].astype(np.float64).swapaxes(0, 1)
            np.testing.assert_allclose(kept, true[:, :, row][..., is_token, :], rtol=2**-11, atol=1e-7)
        assert found[0].astype(np.float64).std() > 0
        if stream == "expert":
            assert (found[:, 0] != found[:, 1]).any(), "steps differ"
        assert (found[0] != found[1]).any(), "rows differ"
    n_bytes = sum(values[0].nbytes for values in record.activations.values())
    assert record.maps_bytes == record.of(1).maps_bytes == n_bytes
    for array, values in record.of(1).activations.items():
        np.testing.assert_array_equal(values, record.activations[array][1:])


def test_chosen_layers_and_steps_are_those_of_all(family):
    _, policy, preprocessor = family
    batch = preprocessor(raw_observation())
    with capture_attention(policy, NEURONS) as capture:
        act(policy, batch, 0)
    (whole,) = capture.drain()
    config = AttentionConfig(
        layers=[-1], denoise_steps=[-1], neurons={"vlm": [-1], "expert": [0, -1]}, residuals={"expert": [1]}
    )
    with capture_attention(policy, config) as capture:
        act(policy, batch, 0)
    (part,) = capture.drain()
    assert set(part.activations) == {"vlm_neurons", "expert_neurons", "expert_residual"}
    assert part.suffix_attention is not None
    np.testing.assert_array_equal(
        part.activations["vlm_neurons"], whole.activations["vlm_neurons"][..., -1:, :]
    )
    np.testing.assert_array_equal(
        part.activations["expert_neurons"], whole.activations["expert_neurons"][:, -1:, ..., [0, -1], :]
    )
    assert whole.activation_groups["vlm"][-1] == "text" or "state" in whole.activation_groups["vlm"]


def test_no_graph_is_kept_where_the_policy_computes_gradients(family):
    """RTC's guidance does."""
    _, policy, preprocessor = family
    batch = preprocessor(raw_observation())
    with capture_attention(policy, EVERYTHING) as capture, torch.enable_grad():
        policy.reset()
        policy.predict_action_chunk(batch)
    (record,) = capture.drain()
    assert not any(tensor.requires_grad for tensor in record._activations.values())
    assert all(np.isfinite(record.activations[name]).all() for name in NAMES)


def test_nothing_is_kept_of_an_inference_that_failed(family, monkeypatch):
    _, policy, preprocessor = family
    batch = preprocessor(raw_observation())
    expected, _ = act(policy, batch, 0)
    take, failures = ActivationCollector.take, []
    monkeypatch.setattr(ActivationCollector, "take", lambda self, site, *_: take(self, site, 0, batch[IMAGE]))
    with capture_attention(policy, NEURONS, on_failure=failures.append) as capture:
        actions, _ = act(policy, batch, 0)
    assert torch.equal(actions, expected)
    assert not capture.records
    (failure,) = failures
    assert "neurons of layer 0 of the vlm has shape" in str(failure)


def test_a_layer_that_never_comes_is_an_error(family, monkeypatch):
    _, policy, preprocessor = family
    batch = preprocessor(raw_observation())
    adapter = type(adapter_for(policy))
    observe = adapter.observe
    monkeypatch.setattr(
        adapter, "observe", lambda self, probe, sites, **more: observe(self, probe, sites[:-1], **more)
    )
    message = (
        "2 of .* values never came, the first of them the neurons of layer . of the expert in denoise step 0"
    )
    with pytest.raises(CaptureError, match=message), capture_attention(policy, NEURONS):
        act(policy, batch, 0)


# From the store on


def test_a_recording_of_neurons_alone_holds_them_and_passes_verify(family, tmp_path, caplog):
    _, policy, preprocessor = family
    config = replace(EVERYTHING, cameras=False)
    with caplog.at_level(logging.INFO, "lerobot_attn"):
        torch.manual_seed(5)
        record_frames(policy, preprocessor, tmp_path, config, policy.config.n_action_steps + 1)
    said = [line for line in caplog.messages if "for each group of tokens" in line]
    assert len(said) == len(NAMES)
    (episode,) = open_run(tmp_path)
    data = episode.dataset
    assert not {"suffix_attention", "suffix_attention_mean", "layer"} & set(data.variables)
    assert data.vlm_neurons.chunks is not None, "lazy"
    raw = {**raw_observation(seed=0, n=1), "task": ["pick up the soup"]}
    tokenizer = find_tokenizer(preprocessor)
    with capture_attention(policy, EVERYTHING, tokenizer=tokenizer) as capture:
        act(policy, preprocessor(raw), 5)
    (record,) = capture.drain()
    for name, values in record.activations.items():
        if name.startswith("vlm"):  # the expert's depend on the noise
            np.testing.assert_array_equal(data[name][0], values[0])
        assert data[name].dims[1:] == data[name].dims[1:]
        assert data[name].shape[1:] == values.shape[1:]
    assert tuple(data.vlm_group.values) == record.activation_groups["vlm"]
    assert data.reduction.values.tolist() == ["mean", "max"]
    task = data.vlm_neurons.sel(vlm_group="task", reduction="max", vlm_neuron_layer=1)[0]
    number = record.activation_groups["vlm"].index("task")
    np.testing.assert_array_equal(task, record.activations["vlm_neurons"][0, number, 1, 1])
    assert episode.attributes["activation_dtype"] == record.activation_dtype
    report = verify_episode(episode, thorough=True)
    assert report.passed, report.to_dict()
    assert {check.name: check.passed for check in report.checks}["activations"] is True
    done = CliRunner().invoke(app, ["inspect", str(episode.path)], env={"COLUMNS": "250"})
    assert done.exit_code == 0, done.output
    assert f"; {data.sizes['vlm_unit']} units; of image, image2, task" in done.output
    done = CliRunner().invoke(app, ["verify", str(episode.path)])
    assert done.exit_code == 0, done.output
    assert "recorded without suffix attention" in done.output


def test_each_environment_of_a_batch_gets_its_own_row(family):
    """And where another prompt lacks a group of tokens, its row is NaN there; a group more is an error."""
    _, policy, preprocessor = family
    raw = raw_observation()
    tokenizer = find_tokenizer(preprocessor)
    with capture_attention(policy, EVERYTHING, tokenizer=tokenizer) as capture:
        act(policy, preprocessor(raw), 0)
    (record,) = capture.drain()
    rows = ActivationRows(record)
    assert rows.arrays == set(record.activations)
    for env in range(2):
        for name, row in rows.rows(record, env).items():
            np.testing.assert_array_equal(row, record.activations[name][env])
            assert row.shape == BY_NAME[name].shape({**rows.sizes, **sizes_of(record)}, 1)[1:]
    with capture_attention(policy, EVERYTHING) as capture:  # without a tokenizer words are "text"
        act(policy, preprocessor(raw), 0)
    (other,) = capture.drain()
    assert "text" in other.activation_groups["vlm"]
    with pytest.raises(
        CaptureError, match="the prompt has tokens of text, which the episode's first had none"
    ):
        rows.rows(other, 0)
    cameras = replace(
        record,
        activation_groups={**record.activation_groups, "vlm": record.activation_groups["vlm"][:2]},
        _activations={
            name: tensor[:, :, :, :2] if name in ("vlm_neurons", "vlm_residual") else tensor
            for name, tensor in record._activations.items()
        },
    )
    row = rows.rows(cameras, 1)["vlm_neurons"]
    np.testing.assert_array_equal(row[:2], record.activations["vlm_neurons"][1, :2])
    assert np.isnan(row[2:]).all()


def sizes_of(record):
    layout = record.layout
    sizes = {"denoise_step": len(record.selection.denoise_steps)}
    return {**sizes, "query": layout.n_queries, "prefix_query": layout.prefix_len}


@pytest.fixture
def scripted_neurons(monkeypatch):
    """A scripted policy with neurons: 3 a layer, whose activations are made up."""
    made = {"value": lambda n, tokens: torch.ones(n, tokens, 3)}

    class Adapter(scripted.ScriptedAdapter):
        def sites(self):
            neurons = {Site("vlm", layer, "neurons"): SiteInfo(n_units=3) for layer in range(scripted.LAYERS)}
            return super().sites() | neurons

        @contextmanager
        def observe(self, probe, sites, *, compiled):
            asked = [site for site in sites if site.what == "neurons"]
            begin = probe.begin

            def begun(inputs):
                begin(inputs)
                for site in asked:
                    probe.at(site, made["value"](len(inputs.token_id), inputs.layout.prefix_len))

            probe.begin = begun
            rest = [site for site in sites if site.what == "attention"]
            with super().observe(probe, rest, compiled=compiled):
                yield

    monkeypatch.setitem(ADAPTERS, "scripted", scripted.ADAPTER)
    monkeypatch.setattr(scripted, "ScriptedAdapter", Adapter)
    return made


def record_scripted(folder, n_frames, config=None):
    policy = scripted.ScriptedPolicy(scripted.make_config())
    config = config or AttentionConfig(layers="none", mean_layers="none", neurons={"vlm": [1, 2]})
    with record_episodes(policy, folder, config, fps=10) as recording, recording.episode(task="x") as episode:
        for _ in range(n_frames):
            image = torch.rand(1, 3, 8, 8)
            with torch.inference_mode():
                action = policy.select_action({scripted.CAMERA: image})
            episode.step({scripted.CAMERA: image[0]}, action[0])
    (found,) = open_run(folder)
    return found


def test_values_beyond_float16_are_said_in_the_log_the_store_inspect_and_verify(
    scripted_neurons, tmp_path, caplog
):
    scripted_neurons["value"] = lambda n, tokens: torch.tensor([1.0, 7e4, -9e9]).expand(n, tokens, 3)
    episode = record_scripted(tmp_path, 11)
    said = [line for line in caplog.messages if "beyond float16's range" in line]
    assert len(said) == 1
    # 2 inferences, of 2 groups, 2 reductions, 2 layers, 2 units each
    assert episode.attributes["n_beyond_float16"] == {"vlm_neurons": 32}
    np.testing.assert_array_equal(episode.arrays.vlm_neurons[1, 0, 0, 0], [1, np.inf, -np.inf])
    report = verify_episode(episode)
    assert report.passed, report.to_dict()
    (check,) = [check for check in report.checks if check.name == "activations"]
    assert "32 of them beyond" in check.detail
    done = CliRunner().invoke(app, ["inspect", str(episode.path)], env={"COLUMNS": "250"})
    assert "32 BEYOND" in done.output


def test_nan_that_the_policy_computed_does_not_pass_verify(scripted_neurons, tmp_path):
    scripted_neurons["value"] = lambda n, tokens: torch.full((n, tokens, 3), float("nan"))
    report = verify_episode(record_scripted(tmp_path, 1))
    assert not report.passed
    (check,) = [check for check in report.checks if check.name == "activations"]
    assert "NaN though the group has tokens" in check.detail


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    plan = SyntheticPlan(
        n_frames=4,
        grid=(2, 2),
        videos=False,
        neurons={"vlm": (0, 3), "expert": (1,)},
        residuals={"vlm": (2,)},
        record_full=True,
    )
    return write_planted_episode(tmp_path_factory.mktemp("planted"), plan)


def put(name, index, value):
    def damage(path):
        array = zarr.open_array(path / name, mode="r+")
        array[index] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            put("vlm_neurons", (1, 2, 0, 1, 3), np.nan),
            "vlm_group task, reduction mean: NaN though the group has",
        ),
        (
            put("expert_neurons", (0, 1, 0, 1, 0, 3), np.nan),
            "inference 0, denoise_step 1, expert_group actions",
        ),
        (put("vlm_residual_full", (0, 0, -1, 0), 1), "vlm_residual_layer 2: values of a padding token"),
        (put("vlm_neurons_full", (0, 1, 0, 0), np.nan), "vlm_neuron_layer 3: NaN of a token that is there"),
        (put("key_kind", (1, slice(0, 4)), int(Kind.PADDING)), "values, though the group has no token"),
        (
            put("vlm_group", 2, "verbs"),
            "vlm_group has 'verbs', expected each once, of observation.images.image",
        ),
        (put("vlm_group", 2, "state"), "expected each once"),
        (put("expert_group", 0, "state"), "expert_group has 'state'"),
        (put("reduction", 0, "median"), "reduction is ['median', 'max'], expected mean and max"),
    ],
)
def test_verify_finds_what_is_wrong(planted, copied, damage, message):
    path = copied(planted)
    assert verify_episode(open_episode(path)).passed
    damage(path)
    checks = {check.name: check for check in verify_episode(open_episode(path)).checks}
    assert not checks["activations"].passed
    assert message in checks["activations"].detail


def test_inspect_says_what_cannot_be_read_and_goes_on(planted, copied):
    path = copied(planted)
    for shard in (path / "vlm_neurons" / "c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(shard.read_bytes()[:-8])
    done = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)["activations"]
    assert said["vlm_neurons"].startswith("cannot be read: ")
    assert said["expert_neurons"].startswith("layers 1; 6 units; of actions; values ")
