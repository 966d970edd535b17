"""Neurons and residuals of Pi0.5, Pi0 and SmolVLA where the contract of adapters does not go."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from adapter_contract import Editor, Watcher, act, unit_sites  # noqa: E402
from test_pi05 import raw_observation  # noqa: E402

from lerobot_attn.errors import CaptureError, ConfigError  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402
from lerobot_attn.policies.base import NeuronAdapter, Site  # noqa: E402

STEPS = {
    "demo_policy": "num_inference_steps",
    "pi0_policy": "num_inference_steps",
    "smolvla_policy": "num_steps",
}


@pytest.fixture(scope="module", params=STEPS)
def loaded(request):
    """A policy of each family that takes one step, a batch of one, and what makes a policy."""
    make = request.getfixturevalue(request.param)
    policy, preprocess, _ = make(**{STEPS[request.param]: 1})
    return policy, preprocess(raw_observation(n=1)), make


def edited(policy, batch, *sites, by=lambda value: value.flip(-1)):
    with adapter_for(policy).observe(Editor(by, list(sites)), sites, compiled=False):
        return act(policy, batch, 3)[0]


def test_every_other_layer_can_change_actions(loaded):
    policy, batch, _ = loaded
    assert isinstance(adapter_for(policy), NeuronAdapter)
    sites = adapter_for(policy).sites()
    actions, _ = act(policy, batch, 3)
    for site in unit_sites(policy):
        if (site.what == "neurons") == (site.layer % 2 == 1):  # the contract has both, of some layers
            assert torch.equal(edited(policy, batch, site), actions) != sites[site].reaches_actions, str(site)


def test_gradients_half_precision_and_guidance_are_no_hindrance(loaded):
    """RTC runs with gradients; `use_amp` runs in an autocast."""
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy, batch, _ = loaded
    sites = unit_sites(policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actions, _ = act(policy, batch, 3)
        assert torch.equal(edited(policy, batch, *sites, by=torch.clone), actions)
    before = policy.config.rtc_config, policy.rtc_processor
    policy.config.rtc_config = RTCConfig()
    policy.init_rtc_processor()

    def guided_inference():
        torch.manual_seed(0)
        left_over = torch.ones(1, policy.config.chunk_size, policy.config.max_action_dim)
        return policy.predict_action_chunk(batch, inference_delay=4, prev_chunk_left_over=left_over).detach()

    try:
        expected, watcher = guided_inference(), Watcher()
        with adapter_for(policy).observe(watcher, sites, compiled=False):
            assert torch.equal(guided_inference(), expected)
        assert len(watcher.values[Site("expert", 0, "neurons")]) == 1
        with adapter_for(policy).observe(Editor(torch.clone, sites), sites, compiled=False):
            assert torch.equal(guided_inference(), expected)
        some = [Site("expert", 1, "residual"), Site("vlm", 0, "neurons")]
        with adapter_for(policy).observe(Editor(lambda value: value * 2, some), some, compiled=False):
            assert not torch.equal(guided_inference(), expected)
    finally:
        policy.config.rtc_config, policy.rtc_processor = before


def test_lora_on_the_feed_forward_network(loaded):
    """What LoRA adds to `down_proj` is part of what a neuron writes; its activations are its input."""
    peft = pytest.importorskip("peft")
    _, batch, make = loaded
    base = make()[0]
    site, units = Site("expert", 1, "neurons"), [5, 0, 17]
    plain = adapter_for(base).value_vectors(site, units)
    down = adapter_for(base).towers["expert"].layers[1].mlp.down_proj
    np.testing.assert_allclose(plain, down.weight.detach()[:, units].T, rtol=1e-6)
    names = r".*(lm_expert|gemma_expert.model).layers.1.mlp.(gate|up|down)_proj"
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    adapter_before = adapter_for(base)
    wrapped = peft.get_peft_model(base, config).eval()
    down = adapter_for(wrapped).towers["expert"].layers[1].mlp.down_proj
    assert hasattr(down, "lora_A")
    whole = (down.base_layer.weight + down.get_delta_weight("default")).detach()[:, units].T
    assert not np.allclose(whole, plain, rtol=1e-2)
    for adapter in (adapter_for(wrapped), adapter_before):  # also one that was made before LoRA came
        np.testing.assert_allclose(adapter.value_vectors(site, units), whole, rtol=1e-4, atol=1e-6)
        watcher = Watcher()
        with adapter.observe(watcher, [site], compiled=False):
            act(base, batch, 3)
        assert watcher.values[site][0].shape[-1] == adapter.sites()[site].n_units == down.in_features


def test_what_cannot_be_is_said_in_a_line(loaded):
    policy, batch, _ = loaded
    adapter = adapter_for(policy)
    for site in (Site("expert", 99, "neurons"), Site("vision", 0, "neurons")):
        with pytest.raises(ConfigError, match=f"site {site} does not exist: this policy's are ") as caught:
            adapter.observe(Watcher(), [site], compiled=False).__enter__()
        assert len(str(caught.value)) < 300
    site = Site("expert", 1, "residual")
    with pytest.raises(CaptureError, match=r"a probe returned .* expected .* as it was given"):
        edited(policy, batch, site, by=lambda value: value[:, :-1])


def test_a_vlm_layer_that_no_expert_layer_follows_cannot_change_actions(smolvla_policy):
    """SmolVLA's expert may have fewer layers than the VLM: of four only those before its last are read."""
    policy, preprocess, _ = smolvla_policy(num_steps=1)
    config = replace(policy.config, num_expert_layers=2, self_attn_every_n_layers=-1)
    small = type(policy)(config).eval()
    batch = preprocess(raw_observation(n=1))
    actions, _ = act(small, batch, 3)
    sites = adapter_for(small).sites()
    idle = {site.layer for site, info in sites.items() if not info.reaches_actions}
    assert idle == {2, 3}
    for site in unit_sites(small):
        assert torch.equal(edited(small, batch, site), actions) != sites[site].reaches_actions, str(site)
