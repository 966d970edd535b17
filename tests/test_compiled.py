"""Capture while the policy stays compiled: the maps are those of the uncompiled policy, within rounding.

Pi0.5 and Pi0 are compiled for real (inductor; with fewer layers and denoise steps, for compiling takes
minutes). The other tests look at what surrounds the graph, with the compiler told to run it eagerly.
"""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from adapter_contract import act  # noqa: E402
from test_pi05 import Pi05Contract, raw_observation  # noqa: E402

from lerobot_attn.capture import capture_attention  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.demo.modeling_pi0_tiny import PI0TinyPolicy  # noqa: E402
from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy  # noqa: E402
from lerobot_attn.errors import CaptureError  # noqa: E402

EVERYTHING = {"layers": "all", "prefix_layers": "all"}
MAPS = ("suffix_attention", "suffix_attention_mean", "prefix_attention")


@pytest.fixture(scope="module")
def loaded(demo_policy):
    policy, preprocessor, _ = demo_policy(num_inference_steps=2)
    return PI05TinyPolicy(small(policy.config)).eval(), preprocessor(raw_observation())


def small(config, **settings):
    """The settings of a policy that is compiled within seconds."""
    sizes = {"depth": 2, "vision_depth": 1, "empty_cameras": 0, **settings}
    return replace(config, compile_model=True, compile_mode="default", **sizes)


@pytest.fixture
def policy(loaded):
    loaded[0].reset()
    return loaded[0]


@pytest.fixture
def batch(loaded):
    return loaded[1]


@pytest.fixture
def run_eagerly():
    with torch.compiler.set_stance("force_eager"):
        yield


def infer(policy, batch, config, n=1, **options):
    """Return the last actions, given the same noise each time, and the records of n inferences."""
    noise = torch.randn(2, policy.config.chunk_size, policy.config.max_action_dim, generator=seeded())
    with torch.inference_mode(), capture_attention(policy, config, **options) as capture:
        for _ in range(n):
            actions = policy.predict_action_chunk(batch, noise=noise)
        return actions, list(capture.drain())


def seeded():
    return torch.Generator().manual_seed(0)


def test_compiled_maps_are_the_uncompiled_ones(policy, batch):
    check_compiled(policy, batch)


def test_compiled_maps_of_pi0_are_the_uncompiled_ones(pi0_policy):
    """Whose suffix opens with a state token, and whose denoise step is given the state."""
    policy, preprocessor, _ = pi0_policy()
    policy = PI0TinyPolicy(small(policy.config, num_inference_steps=1, depth=1)).eval()
    check_compiled(policy, preprocessor(raw_observation()))


def check_compiled(policy, batch):
    expected_actions, (expected,) = infer(policy, batch, AttentionConfig(**EVERYTHING))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    actions, records = infer(policy, batch, AttentionConfig(compiled=True, **EVERYTHING), n=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "the hooks broke the graph"
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(actions, expected_actions, rtol=0, atol=1e-3)
    assert len(records) == 2
    for record in records:
        for name in MAPS:
            found = getattr(record, name).astype(np.float32)
            wanted = getattr(expected, name).astype(np.float32)
            assert wanted.any()
            # One unit in float16's last place, for sums in another order may round to the neighbour.
            np.testing.assert_allclose(found, wanted, rtol=2**-10, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(record.flow_time, expected.flow_time)
        np.testing.assert_array_equal(record.key_mask, expected.key_mask)


@pytest.fixture(scope="module")
def whole_policy(demo_policy):
    return demo_policy(num_inference_steps=2, compile_model="true", compile_mode="default")[0]


@pytest.mark.usefixtures("run_eagerly")
class TestCompiledPi05(Pi05Contract):
    settings: ClassVar = {"compiled": True}
    can_edit = False

    @pytest.fixture
    def policy(self, whole_policy):
        whole_policy.reset()
        return whole_policy


@pytest.mark.usefixtures("run_eagerly")
class TestAroundTheGraph:
    def test_what_the_graph_returns_is_what_the_hooks_see(self, policy, batch):
        config = {"layers": [-1], "mean_layers": [0, 1], "heads": [1], "denoise_steps": [-1]}
        config["prefix_layers"] = [1]
        expected_actions, (expected,) = infer(policy, batch, AttentionConfig(**config))
        actions, (found,) = infer(policy, batch, AttentionConfig(compiled=True, **config))
        assert torch.equal(actions, expected_actions)
        for name in (*MAPS, "flow_time", "token_id", "key_mask", "action_chunk"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)

    def test_a_failing_capture_does_not_reach_the_policy(self, policy, batch):
        expected, _ = infer(policy, batch, AttentionConfig())
        attention = policy.model.paligemma_with_expert.gemma_expert.model.layers[-1].self_attn
        handle = attention.register_forward_hook(lambda module, args, output: (output[0], None))
        failures = []
        try:
            actions, records = infer(
                policy, batch, AttentionConfig(compiled=True), on_failure=failures.append
            )
            with pytest.raises(CaptureError, match="returned no attention weights"):
                infer(policy, batch, AttentionConfig(compiled=True))
        finally:
            handle.remove()
        assert not records
        assert len(failures) == 1
        assert "returned no attention weights" in str(failures[0])
        assert torch.equal(actions, expected)

    def test_weights_of_another_shape_do_not_reach_the_policy(self, policy, batch):
        attention = policy.model.paligemma_with_expert.gemma_expert.model.layers[-1].self_attn
        handle = attention.register_forward_hook(lambda module, args, output: (output[0], output[1][0]))
        failures = []
        try:
            _, records = infer(policy, batch, AttentionConfig(compiled=True), on_failure=failures.append)
        finally:
            handle.remove()
        assert not records
        assert [str(failure).partition(" has shape")[0] for failure in failures] == [
            "suffix attention of layer 1"
        ]


def test_a_policy_that_is_not_compiled_says_so(demo_policy, batch, caplog):
    policy = demo_policy(num_inference_steps=2)[0]
    with caplog.at_level("WARNING"), capture_attention(policy, AttentionConfig(compiled=True)) as capture:
        act(policy, batch, 0)
    assert len(capture.records) == 1
    assert [record.message for record in caplog.records if record.name.startswith("lerobot_attn")] == [
        "compiled=true changes nothing: the policy is not compiled (compile_model=false)"
    ]
