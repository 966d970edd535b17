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
from lerobot_attn.policies import ADAPTERS, adapter_for, adapter_type  # noqa: E402
from lerobot_attn.policies.base import Site  # noqa: E402


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
    can_block = False
    sees = False

    def act(self, policy, batch, seed, n=1):
        policy.n_inferences = 0  # its attention depends on a counter, not on the seed
        return act(policy, batch, seed, n)

    @pytest.fixture
    def longer(self, policy, batch):
        @contextmanager
        def with_a_longer_prompt():
            policy.n_text += 2
            yield batch
            policy.n_text -= 2

        return with_a_longer_prompt

    @pytest.fixture
    def break_policy(self, policy):
        @contextmanager
        def broken():
            policy.fail_at = (0, 1, 2)
            try:
                yield
            finally:
                policy.fail_at = None

        return broken


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
                # Cross-attention layers see the prefix alone: the other keys are absent, which is not 0.
                assert np.isnan(stored[..., true.shape[-1] :]).all()
                mean = record.suffix_attention_mean[step, layer]
                assert np.isnan(mean[..., true.shape[-1] :]).all()
                assert not np.isnan(mean[..., : true.shape[-1]]).any()
        assert record.layers_seeing_suffix == {0, 2}
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
        ({"vision_layers": "all"}, r"vision_layers: this policy \(scripted\) has no vision transformer"),
    ],
)
def test_what_the_policy_does_not_have(policy, settings, message):
    with pytest.raises(ConfigError, match=message), capture_attention(policy, AttentionConfig(**settings)):
        pass


def test_unsupported_policy_is_named(policy, monkeypatch):
    monkeypatch.delitem(ADAPTERS, "scripted")
    with pytest.raises(UnsupportedPolicyError, match=r"policy type 'scripted'; supported: .*pi05"):
        adapter_type(policy.config)
    with pytest.raises(UnsupportedPolicyError), capture_attention(policy):
        pass


class Silent(scripted.ScriptedAdapter):
    """An adapter whose policy stopped calling what is observed."""

    @contextmanager
    def observe(self, probe, sites, *, compiled):
        with super().observe(probe, list(sites)[1:], compiled=compiled):
            yield


class Twice(scripted.ScriptedAdapter):
    @contextmanager
    def observe(self, probe, sites, *, compiled):
        deliver = probe.at
        probe.at = lambda site, value: (deliver(site, value), deliver(site, value))[0]
        with super().observe(probe, sites, compiled=compiled):
            yield


class Transposed(scripted.ScriptedAdapter):
    @contextmanager
    def observe(self, probe, sites, *, compiled):
        deliver = probe.at
        probe.at = lambda site, value: deliver(site, value.transpose(1, 2))
        with super().observe(probe, sites, compiled=compiled):
            yield


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            Silent,
            r"3 of 12 values never came, the first of them the suffix attention of layer 0 in denoise step 0",
        ),
        (Twice, "suffix attention of layer 0 came twice in denoise step 0, expected once"),
        (
            Transposed,
            r"suffix attention of layer 0 has shape \(2, 51, 2, 58\), expected \(batch, 2 heads, 51",
        ),
    ],
)
def test_silence_is_an_error(policy, batch, monkeypatch, adapter, message):
    monkeypatch.setattr(scripted, "ScriptedAdapter", adapter)
    config = AttentionConfig(mean_layers="all")
    with pytest.raises(CaptureError, match=message), capture_attention(policy, config):
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


def test_what_nobody_asked_for_costs_nothing(policy, batch, monkeypatch):
    """In own loops only the layers asked for are handed over, their means included."""
    asked = []

    class Noting(scripted.ScriptedAdapter):
        def observe(self, probe, sites, *, compiled):
            asked.extend(sites)
            return super().observe(probe, sites, compiled=compiled)

    monkeypatch.setattr(scripted, "ScriptedAdapter", Noting)
    with capture_attention(policy, AttentionConfig(layers=[-1])) as capture:
        act(policy, batch, 0)
    assert asked == [Site("expert", 3)]
    (record,) = capture.drain()
    assert record.suffix_attention_mean.shape[1] == record.suffix_attention.shape[1] == 1
    with (
        pytest.raises(ConfigError, match="nothing to capture"),
        capture_attention(policy, AttentionConfig(layers="none")),
    ):
        pass


def test_an_inference_that_never_ends_is_reported(policy, batch, monkeypatch):
    class NeverEnds(scripted.ScriptedAdapter):
        @contextmanager
        def observe(self, probe, sites, *, compiled):
            probe.end = lambda actions: None
            with super().observe(probe, sites, compiled=compiled):
                yield

    monkeypatch.setattr(scripted, "ScriptedAdapter", NeverEnds)
    failures = []
    with capture_attention(policy, AttentionConfig(), on_failure=failures.append):
        act(policy, batch, 0)
        assert not failures
        act(policy, batch, 0)
        assert [str(failure).partition(",")[0] for failure in failures] == [
            "an inference began before the one before it had ended"
        ]
    assert "the watching ended inside an inference" in str(failures[1])
    assert len(failures) == 2
    with (
        pytest.raises(CaptureError, match="the watching ended inside an inference"),
        capture_attention(policy, AttentionConfig()),
    ):
        act(policy, batch, 0)


@pytest.mark.parametrize(
    ("device", "asynchronous"), [("cuda", True), ("mps", False), ("xpu", False), ("cpu", False)]
)
def test_copies_are_left_unfinished_only_where_an_event_can_be_waited_for(device, asynchronous):
    from types import SimpleNamespace

    from lerobot_attn.capture import HostCopies

    how = []
    source = SimpleNamespace(device=torch.device(device))
    source.detach = lambda: source
    source.to = lambda dtype: source
    target = SimpleNamespace(dtype=torch.float16, copy_=lambda source, non_blocking: how.append(non_blocking))
    HostCopies().copy_into(target, source)
    assert how == [asynchronous]


def test_the_first_layers_alone_can_be_got_by_default(policy, batch):
    """`get_attention_maps()` gives what there is where fewer layers than two were saved."""
    from lerobot_attn import AttentionPolicy

    for layers, expected in (([3], [3]), ([0], [0]), ([0, 2, 3], [2, 3])):
        wrapped = AttentionPolicy(policy)
        wrapped.enable_attention_map_saving(AttentionConfig(layers=layers))
        act(wrapped, batch, 0)
        weights = wrapped.get_attention_maps()[0]["attention_weights"]
        wrapped.disable_attention_map_saving()
        assert list(weights) == expected
        for layer, maps in weights.items():
            # A layer that cannot see the suffix has the prefix's keys alone.
            assert maps.shape[-1] == scripted.PREFIX + (0 if layer % 2 else scripted.QUERIES)
            assert not torch.isnan(maps).any()


def test_sites_are_text(policy):
    assert str(Site("expert", 17)) == "expert.17.attention"
    info = adapter_for(policy).sites()
    assert info[Site("expert", 1)].keys == "prefix"
    assert info[Site("expert", 2)].keys == "prefix+suffix"
