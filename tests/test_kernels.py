"""The generic tap: any kernel's probabilities, beside the kernel, and a policy that does not notice."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from lerobot_attn.errors import CaptureError  # noqa: E402
from lerobot_attn.policies.kernels import attention_probabilities, kernel_tap  # noqa: E402

BATCH, HEADS, QUERIES, KEYS, DIM = 2, 4, 5, 7, 8


class Fused(nn.Module):
    def forward(self, query, key, value, **settings):
        return functional.scaled_dot_product_attention(query, key, value, **settings)


class Eager(nn.Module):
    def forward(self, query, key, value):
        weights = (query @ key.transpose(-2, -1) * DIM**-0.5).softmax(dim=-1)
        return functional.dropout(weights, training=self.training) @ value


class Around(nn.Module):
    """A layer that keeps its attention one level below."""

    def __init__(self, n=1):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.MultiheadAttention(HEADS * DIM, HEADS, batch_first=True) for _ in range(n)
        )

    def forward(self, query, key, value, **settings):
        return self.parts[0](query, key, value, **settings)[0]


def tensors(*shape, seed=0, n=3):
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=noise) for _ in range(n)]


def heads(n_keys=KEYS, key_heads=HEADS):
    noise = torch.Generator().manual_seed(1)
    return (
        torch.randn(BATCH, HEADS, QUERIES, DIM, generator=noise),
        torch.randn(BATCH, key_heads, n_keys, DIM, generator=noise),
        torch.randn(BATCH, key_heads, n_keys, DIM, generator=noise),
    )


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class Taken:
    def __init__(self, function=lambda value: None):
        self.function, self.values, self.n_missed = function, [], 0

    def __call__(self, value):
        self.values.append(value.detach().clone())
        return self.function(value)

    def missed(self):
        self.n_missed += 1


def tapped(module, taken, *args, **kwargs):
    before = dict(vars(module))
    with kernel_tap(module, taken, taken.missed):
        output = module(*args, **kwargs)
    assert dict(vars(module)) == before
    return output


MASK = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(2)
SETTINGS = {
    "plain": {},
    "bool mask": {"attn_mask": MASK},
    "added mask": {"attn_mask": torch.zeros(QUERIES, KEYS).masked_fill(~MASK, float("-inf"))},
    "scale": {"scale": 0.5},
    "causal": {"is_causal": True},
    "shared keys": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_fused_kernel_is_left_alone_and_its_probabilities_computed_beside_it(name):
    settings = SETTINGS[name]
    query, key, value = heads(QUERIES if name == "causal" else KEYS, 2 if name == "shared keys" else HEADS)
    expected = functional.scaled_dot_product_attention(query, key, value, **settings)
    taken = Taken()
    state = torch.get_rng_state()
    assert torch.equal(tapped(Fused(), taken, query, key, value, **settings), expected)
    assert torch.equal(torch.get_rng_state(), state)
    (found,) = taken.values
    repeats = HEADS // key.shape[1]
    keys, values = (np.repeat(part.double().numpy(), repeats, axis=1) for part in (key, value))
    scores = query.double().numpy() @ keys.swapaxes(2, 3) * settings.get("scale", DIM**-0.5)
    if name == "causal":
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    if "mask" in name:
        scores = np.where(MASK.numpy(), scores, -np.inf)
    np.testing.assert_allclose(found, softmax(scores), atol=3e-6)
    np.testing.assert_allclose(softmax(scores) @ values, expected, atol=3e-6)
    assert not taken.n_missed


def test_queries_that_may_attend_to_nothing_have_rows_of_zeros():
    query, key, _ = heads()
    found = attention_probabilities(query, key, torch.zeros(QUERIES, KEYS, dtype=torch.bool))
    assert not found.any()


@pytest.mark.parametrize("module", [Fused(), Eager().eval()], ids=["fused", "eager"])
def test_an_edit_acts_and_one_that_changes_nothing_is_bit_identical(module):
    query, key, value = heads()
    expected = module(query, key, value)
    assert torch.equal(tapped(module, Taken(lambda weights: weights.clone()), query, key, value), expected)
    even = tapped(module, Taken(lambda weights: torch.full_like(weights, 1 / KEYS)), query, key, value)
    torch.testing.assert_close(even, value.mean(2, keepdim=True).expand_as(even))
    assert torch.equal(module(query, key, value), expected)


# Whether probabilities that acted are handed out, or computed beside: by what the module is asked for.
CASES = {
    "weights": ({}, False),
    "weights by head": ({"average_attn_weights": False}, False),
    "kernel": ({"need_weights": False}, False),
    "masked": ({"key_padding_mask": torch.arange(KEYS)[None].expand(BATCH, -1) > 4}, False),
    "masked kernel": (
        {"need_weights": False, "key_padding_mask": torch.arange(KEYS)[None].expand(BATCH, -1) > 4},
        False,
    ),
    "fast path": ({"need_weights": False}, True),
}


@pytest.mark.parametrize("name", CASES)
def test_multihead_attention_is_left_alone(name):
    settings, is_self = CASES[name]
    torch.manual_seed(0)
    module = nn.MultiheadAttention(HEADS * DIM, HEADS, batch_first=True).eval()
    nn.init.normal_(module.in_proj_bias)
    query, other, value = tensors(BATCH, KEYS, HEADS * DIM)
    key, value = (query, query) if is_self else (other, value)
    with torch.inference_mode():
        expected, weights = module(query, key, value, **settings)
        taken = Taken()
        state = torch.get_rng_state()
        found, found_weights = tapped(module, taken, query, key, value, **settings)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(found, expected)
        assert (found_weights is None) == (weights is None)
        if weights is not None:
            assert torch.equal(found_weights, weights)
        again = tapped(module, Taken(lambda w: w.clone()), query, key, value, **settings)[0]
        assert torch.equal(again, expected)
        edited = tapped(module, Taken(lambda w: w.flip(-1)), query, key, value, **settings)[0]
        assert (edited - expected).abs().max() > 1e-3
    projections = zip(
        (query, key), module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=False
    )
    q, k = (
        functional.linear(part.double(), weight.double(), bias.double())
        .view(BATCH, KEYS, HEADS, DIM)
        .transpose(1, 2)
        .detach()
        .numpy()
        for part, weight, bias in projections
    )
    scores = q @ k.swapaxes(2, 3) * DIM**-0.5
    if "masked" in name:
        scores[..., 5:] = -np.inf
    assert len(taken.values) == 1
    assert not taken.n_missed
    np.testing.assert_allclose(taken.values[0], softmax(scores), atol=3e-6)


def test_the_fast_path_stays_the_one_that_is_taken():
    """A mode of torch functions around the module would turn it off; its output differs in some bits."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(HEADS * DIM, HEADS, batch_first=True).eval()
    (states,) = tensors(BATCH, KEYS, HEADS * DIM, n=1)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        tapped(module, Taken(), states, states, states, need_weights=False)
    assert any("_native_multi_head_attention" in event.key for event in profile.key_averages())


def test_attention_below_a_module_is_found_and_several_are_refused():
    torch.manual_seed(0)
    states = tensors(BATCH, KEYS, HEADS * DIM)
    taken, around = Taken(), Around().eval()
    expected = around(*states)
    assert torch.equal(tapped(around, taken, *states), expected)
    assert taken.values[0].shape == (BATCH, HEADS, KEYS, KEYS)
    with pytest.raises(
        CaptureError, match=r"Around has 2 attention modules below it, expected one; tap each"
    ):
        tapped(Around(2), taken, *states)


def test_a_module_without_attention_is_reported():
    taken = Taken()
    tapped(nn.Linear(4, 4), taken, torch.ones(2, 4))
    assert (taken.n_missed, taken.values) == (1, [])
