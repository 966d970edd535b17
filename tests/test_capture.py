"""Capture with a scripted policy: the adapter contract, and what `capture_attention` itself promises."""

from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import scripted  # noqa: E402
from adapter_contract import AdapterContract, act  # noqa: E402

from lerobot_attn.capture import capture_attention  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.errors import CaptureError, ConfigError, UnsupportedPolicyError  # noqa: E402
from lerobot_attn.policies import ADAPTERS, adapter_type  # noqa: E402


@pytest.fixture(autouse=True)
def scripted_adapter(monkeypatch):
    monkeypatch.setitem(ADAPTERS, "scripted", scripted.ADAPTER)


@pytest.fixture
def policy():
    return scripted.ScriptedPolicy(scripted.make_config())


@pytest.fixture
def batch():
    return {scripted.CAMERA: torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


class TestScriptedAdapter(AdapterContract):
    @pytest.fixture
    def break_policy(self, policy):
        @contextmanager
        def broken():
            policy.fail_at = (policy.n_inferences, 1, 2)
            try:
                yield
            finally:
                policy.fail_at = None

        return broken

    # Its attention depends on a counter, not on the seed.
    def act_afresh(self, policy, batch, seed):
        policy.n_inferences = 0
        return act(policy, batch, seed)

    def test_chosen_parts_are_the_same_as_of_everything(self, policy, batch, monkeypatch):
        import adapter_contract

        monkeypatch.setattr(adapter_contract, "act", self.act_afresh)
        super().test_chosen_parts_are_the_same_as_of_everything(policy, batch)

    def test_watching_changes_nothing(self, policy, batch, monkeypatch):
        import adapter_contract

        def afresh(policy, batch, seed, n=1):
            policy.n_inferences = 0
            return act(policy, batch, seed, n)

        monkeypatch.setattr(adapter_contract, "act", afresh)
        super().test_watching_changes_nothing(policy, batch)


def test_every_map_is_the_one_that_was_attended_with(policy, batch):
    with capture_attention(policy, AttentionConfig(layers="all")) as capture:
        for seed in range(3):
            act(policy, batch, seed)
    for inference, record in enumerate(capture.drain()):
        assert record.index == inference
        for step in range(scripted.STEPS):
            for layer in range(scripted.LAYERS):
                true = scripted.attention_of(inference, step, layer, 2).numpy().astype(np.float16)
                stored = record.suffix_attention[step, layer]
                np.testing.assert_array_equal(stored[..., : true.shape[-1]], true)
                # Cross-attention layers see the prefix alone: the rest is exactly 0.
                assert not stored[..., true.shape[-1] :].any()
    assert not capture.records


def test_max_records_keeps_the_newest(policy, batch):
    with capture_attention(policy, AttentionConfig(), max_records=2) as capture:
        for seed in range(4):
            act(policy, batch, seed)
    assert [record.index for record in capture.drain()] == [2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [4]}, "layer 4 does not exist: this policy has 4, expected 0 to 3"),
        ({"heads": [2]}, "head 2 does not exist"),
        ({"denoise_steps": [3]}, "denoise step 3 does not exist: this policy has 3"),
        ({"mean_layers": [-5]}, "mean_layer -5 does not exist"),
        ({"prefix_layers": [9]}, "prefix_layer 9 does not exist"),
    ],
)
def test_what_the_policy_does_not_have(policy, settings, message):
    with pytest.raises(ConfigError, match=message), capture_attention(policy, AttentionConfig(**settings)):
        pass


def test_unsupported_policy_is_named(policy, monkeypatch):
    monkeypatch.delitem(ADAPTERS, "scripted")
    with pytest.raises(UnsupportedPolicyError, match=r"policy type 'scripted'; supported: pi05"):
        adapter_type(policy.config)
    with pytest.raises(UnsupportedPolicyError), capture_attention(policy):
        pass


class Silent(scripted.ScriptedAdapter):
    """An adapter whose policy stopped calling what is observed."""

    @contextmanager
    def observe(self, sink, *, layers, prefix_layers, compiled):
        with super().observe(sink, layers=layers[1:], prefix_layers=prefix_layers, compiled=compiled):
            yield


class Twice(scripted.ScriptedAdapter):
    @contextmanager
    def observe(self, sink, *, layers, prefix_layers, compiled):
        deliver = sink.suffix_attention
        sink.suffix_attention = lambda layer, weights: (deliver(layer, weights), deliver(layer, weights))
        with super().observe(sink, layers=layers, prefix_layers=prefix_layers, compiled=compiled):
            yield


class Transposed(scripted.ScriptedAdapter):
    @contextmanager
    def observe(self, sink, *, layers, prefix_layers, compiled):
        deliver = sink.suffix_attention
        sink.suffix_attention = lambda layer, weights: deliver(layer, weights.transpose(1, 2))
        with super().observe(sink, layers=layers, prefix_layers=prefix_layers, compiled=compiled):
            yield


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Silent, r"3 of 12 attention maps never came, the first of them suffix layer 0 in denoise step 0"),
        (Twice, "suffix attention of layer 0 came twice in denoise step 0, expected once"),
        (
            Transposed,
            r"suffix attention of layer 0 has shape \(2, 51, 2, 58\), expected \(batch, 2 heads, 51",
        ),
    ],
)
def test_silence_is_an_error(policy, batch, monkeypatch, adapter, message):
    monkeypatch.setattr(scripted, "ScriptedAdapter", adapter)
    with pytest.raises(CaptureError, match=message), capture_attention(policy, AttentionConfig()):
        act(policy, batch, 0)


def test_on_failure_keeps_errors_from_the_policy(policy, batch, monkeypatch):
    expected, _ = act(policy, batch, 0)
    monkeypatch.setattr(scripted, "ScriptedAdapter", Silent)
    policy.n_inferences = 0
    failures = []
    with capture_attention(policy, AttentionConfig(), on_failure=failures.append) as capture:
        actions, _ = act(policy, batch, 0)
    assert torch.equal(actions, expected)
    assert len(failures) == 1
    assert not capture.records


def test_number_of_denoise_steps_must_be_the_configs(policy, batch):
    with capture_attention(policy, AttentionConfig()):
        policy.config.num_inference_steps = 2
        with pytest.raises(CaptureError, match="ran 2 denoise steps, expected 3"):
            act(policy, batch, 0)
