"""What every adapter must do. Inherit from `AdapterContract` and provide the three fixtures."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from lerobot_attn.capture import capture_attention
from lerobot_attn.config import AttentionConfig
from lerobot_attn.layout import Kind
from lerobot_attn.policies import adapter_for
from lerobot_attn.policies.base import PolicyAdapter


def instance_state(policy):
    """Everything on the policy's modules that watching could leave behind."""
    return {
        name: (
            sorted(vars(module)),
            {key: id(value) for key, value in vars(module).items() if callable(value)},
            {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")},
        )
        for name, module in policy.named_modules()
    }


def act(policy, batch, seed, n=1):
    """Return n actions of a fresh episode and the random state after them."""
    torch.manual_seed(seed)
    policy.reset()
    with torch.inference_mode():
        actions = [policy.select_action(batch).clone() for _ in range(n)]
    return torch.stack(actions), torch.get_rng_state()


class AdapterContract:
    """Fixtures to provide: `policy`; `batch`, of two; `break_policy`, a context that makes it raise.

    Attributes:
        settings: capture settings that every test has besides its own.
        is_bfloat16: whether the policy computes in bfloat16.
    """

    settings: ClassVar[dict[str, Any]] = {}
    is_bfloat16 = False

    def config(self, **settings):
        return AttentionConfig(**self.settings, **settings)

    def test_is_an_adapter(self, policy):
        assert isinstance(adapter_for(policy), PolicyAdapter)

    def test_description_is_what_is_captured(self, policy, batch):
        config = self.config(layers="all", prefix_layers="all")
        with capture_attention(policy, config) as capture:
            act(policy, batch, 0)
        (record,) = capture.drain()
        sizes = adapter_for(policy).describe()
        queries, keys, steps = sizes.n_queries, sizes.n_keys, sizes.n_denoise_steps
        assert record.suffix_attention.shape == (steps, sizes.n_layers, 2, sizes.n_heads, queries, keys)
        assert record.suffix_attention_mean.shape == (steps, sizes.n_layers, 2, sizes.n_heads, keys)
        prefix = sizes.prefix_len
        assert record.prefix_attention.shape == (sizes.n_prefix_layers, 2, sizes.n_heads, prefix, prefix)
        assert record.suffix_attention.dtype == np.float16
        assert record.layout.n_keys == keys
        assert record.layout.n_queries == queries
        assert record.layout.first_action_query == sizes.first_action_query
        assert record.action_chunk.shape[:2] == (2, sizes.chunk_size)
        maps = record.suffix_attention.nbytes + record.suffix_attention_mean.nbytes
        assert capture.selection.bytes_per_inference(sizes) == (maps + record.prefix_attention.nbytes) // 2

    def test_rows_sum_to_one_and_masked_keys_are_zero(self, policy, batch):
        with capture_attention(policy, self.config(layers="all", prefix_layers="all")) as capture:
            act(policy, batch, 0)
        (record,) = capture.drain()
        tolerance = 2**-11 + record.layout.n_keys * 2**-25 + (2**-8 if self.is_bfloat16 else 0)
        for maps in (record.suffix_attention, record.suffix_attention_mean):
            assert np.abs(maps.astype(np.float32).sum(-1) - 1).max() <= tolerance
        is_padding = record.key_kind == Kind.PADDING
        for env in range(2):
            assert not record.suffix_attention[:, :, env][..., is_padding[env]].any()
            prefix = record.prefix_attention[:, env].astype(np.float32)
            padding = is_padding[env, : record.layout.prefix_len]
            assert not prefix[..., padding].any()
            assert not prefix[:, :, padding].any()
            assert np.abs(prefix[:, :, ~padding].sum(-1) - 1).max() <= tolerance

    def test_flow_time_goes_from_noise_to_action(self, policy, batch):
        with capture_attention(policy, self.config()) as capture:
            act(policy, batch, 0)
        (record,) = capture.drain()
        steps = adapter_for(policy).describe().n_denoise_steps
        np.testing.assert_allclose(record.flow_time, 1 - np.arange(steps) / steps, atol=1e-6)

    def test_watching_changes_nothing(self, policy, batch):
        actions, random_state = act(policy, batch, 7, n=3)
        with capture_attention(policy, self.config(layers="all", prefix_layers="all")):
            watched, watched_state = act(policy, batch, 7, n=3)
        assert torch.equal(actions, watched)
        assert torch.equal(random_state, watched_state)

    def test_nothing_is_left_behind(self, policy, batch):
        act(policy, batch, 0)
        before = instance_state(policy)
        with capture_attention(policy, self.config(layers="all", prefix_layers="all")):
            assert instance_state(policy) != before
            act(policy, batch, 0)
        policy.reset()
        assert instance_state(policy) == before

    def test_nothing_is_left_behind_when_the_policy_raises(self, policy, batch, break_policy):
        act(policy, batch, 0)
        policy.reset()
        before = instance_state(policy)
        with (
            pytest.raises(RuntimeError, match="the policy broke"),
            break_policy(),
            capture_attention(policy, self.config(layers="all", prefix_layers="all")) as capture,
        ):
            act(policy, batch, 0)
        policy.reset()
        assert instance_state(policy) == before
        assert not capture.records

    def test_capture_goes_on_after_the_policy_raised(self, policy, batch, break_policy):
        with capture_attention(policy, self.config()) as capture:
            with pytest.raises(RuntimeError, match="the policy broke"), break_policy():
                act(policy, batch, 0)
            act(policy, batch, 0)
        assert len(capture.records) == 1

    def test_chosen_parts_are_the_same_as_of_everything(self, policy, batch):
        with capture_attention(policy, self.config(layers="all", prefix_layers="all")) as capture:
            act(policy, batch, 3)
        (whole,) = capture.drain()
        config = self.config(
            layers=[-1], mean_layers=[0, 2], heads=[1], denoise_steps=[0, -1], prefix_layers=[-2]
        )
        with capture_attention(policy, config) as capture:
            act(policy, batch, 3)
        (part,) = capture.drain()
        steps = [0, len(whole.flow_time) - 1]
        np.testing.assert_array_equal(part.suffix_attention, whole.suffix_attention[steps][:, -1:, :, 1:2])
        mean = whole.suffix_attention_mean[steps][:, [0, 2]][:, :, :, 1:2]
        np.testing.assert_array_equal(part.suffix_attention_mean, mean)
        np.testing.assert_array_equal(part.prefix_attention, whole.prefix_attention[-2:-1, :, 1:2])
        np.testing.assert_array_equal(part.flow_time, whole.flow_time[steps])

    def test_mean_is_over_the_executed_actions(self, policy, batch):
        with capture_attention(policy, self.config(layers="all")) as capture:
            act(policy, batch, 0)
        (record,) = capture.drain()
        first = record.layout.first_action_query
        executed = record.suffix_attention[..., first : first + policy.config.n_action_steps, :]
        expected = executed.astype(np.float32).mean(-2)
        np.testing.assert_allclose(record.suffix_attention_mean, expected, rtol=2**-9, atol=2**-23)

    def test_paused_capture_records_nothing(self, policy, batch):
        with capture_attention(policy, self.config()) as capture:
            capture.enabled = False
            act(policy, batch, 0)
            assert not capture.records
            capture.enabled = True
            act(policy, batch, 0)
        assert len(capture.records) == 1

    def test_camera_views_are_the_batchs_images(self, policy, batch):
        adapter = adapter_for(policy)
        for name, view in adapter.camera_views(batch).items():
            image = batch[name]
            assert view.dtype == torch.uint8
            assert view.shape == (len(image), *image.shape[2:], 3)
            expected = image.permute(0, 2, 3, 1) * 255
            assert (view - expected).abs().max() <= 0.51
