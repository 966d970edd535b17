"""Attention of any called module: what it weighs, whichever kernel computes it. Knows no family.

Some kernels hand out no probabilities. Then these are computed a second time beside the kernel, in float32,
from the same queries and keys; they agree with what acted to about 3e-6, and the policy goes on with the
kernel's own output, bit for bit.

| the module | its probabilities |
|---|---|
| is or has one `nn.MultiheadAttention` that is asked for weights | those that acted |
| is or has one `nn.MultiheadAttention` on a fused kernel | computed beside it |
| calls `softmax`, then multiplies | those that acted |
| calls `scaled_dot_product_attention` | computed beside it |

Modes that look into a kernel are kept per thread, and around a whole policy they would change which kernels
it takes; so each is entered for one call of one attention module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lerobot_attn.errors import CaptureError
from lerobot_attn.policies.taps import Exchange, _BeforeUse, replaced_attribute

_KERNEL = nn.functional.scaled_dot_product_attention


@contextmanager
def kernel_tap(
    module: nn.Module,
    exchange: Exchange,
    missed: Callable[[], None],
    is_wanted: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Hand an attention module's probabilities to `exchange` each time the module is called.

    Nothing that the policy computes changes, and no random number is drawn. Where `exchange` returns a
    tensor, it is applied instead; one that equals what was applied leaves the output as it is.

    Args:
        module: computes attention once a call: through `nn.MultiheadAttention` (it is one, or has exactly one
            below it), `softmax`, or `scaled_dot_product_attention`.
        exchange: gets (batch, head, query, key), rows sum to 1, in the dtype that was applied; returns None,
            or what is applied instead.
        missed: called after a call in which no attention came.
        is_wanted: asked before each call; where nobody wants its attention the module runs as it always does.

    Raises:
        CaptureError: the module has several `nn.MultiheadAttention` below it.
    """
    inner = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
    if len(inner) > 1:
        raise CaptureError(
            f"{type(module).__name__} has {len(inner)} attention modules below it, expected one; tap each of "
            "them"
        )
    owner = inner[0] if inner else module
    forward: Callable[..., Any] = owner.forward

    def tapped_forward(*args: Any, **kwargs: Any) -> Any:
        if not is_wanted():
            return forward(*args, **kwargs)
        if inner:
            return _multihead(forward, exchange, args, kwargs)
        with _BesideKernel(exchange) as mode:
            output = forward(*args, **kwargs)
        if not mode.n_exchanged:
            missed()
        return output

    with replaced_attribute(owner, "forward", tapped_forward):
        yield


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what `scaled_dot_product_attention` weighs its values by, computed in float32.

    Args:
        query: (…, head, query, dim).
        key: (…, key_head, key, dim).
        attn_mask: bool, True where a query may attend, or numbers that are added to the scores.
        is_causal: each query sees the keys up to its own number.
        scale: of the scores; default dim ** -0.5.
        enable_gqa: several heads share a key head.

    Returns:
        (…, head, query, key) in the query's dtype; the rows of queries that may attend to nothing are 0.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.float() * factor) @ key.float().transpose(-2, -1)
    if is_causal:
        may_see = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~may_see, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
    # A query that may attend to nothing: 0 divided by 0.
    return scores.softmax(dim=-1).nan_to_num(0.0).to(query.dtype)


class _BesideKernel(_BeforeUse):
    """Exchanges probabilities between a softmax and its product, and beside a fused kernel."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not _KERNEL:
            return super().__torch_function__(func, types, args, kwargs)
        output: Tensor = func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        query, key, value = (given.pop(name) for name in names[:3])
        given.pop("dropout_p", None)
        probabilities = attention_probabilities(query, key, **given)
        self.n_exchanged += 1
        edited = self._exchange(probabilities)
        if edited is None or torch.equal(edited, probabilities):
            return output
        if given.get("enable_gqa"):
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
        return edited.to(value.dtype) @ value


class _Applied(TorchDispatchMode):
    """Puts given probabilities in the place of those of the first softmax that a batched product follows."""

    def __init__(self, probabilities: Tensor):
        super().__init__()
        self._probabilities: Tensor | None = probabilities
        self._shape: torch.Size | None = None  # of a softmax whose product has not come

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket
        if name is torch.ops.aten.bmm and args[0].shape == self._shape and self._probabilities is not None:
            given, self._probabilities = self._probabilities.reshape(args[0].shape).to(args[0].dtype), None
            return func(given, *args[1:], **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if name in (torch.ops.aten.softmax, torch.ops.aten._softmax):  # the former in inference mode
            self._shape = output.shape
        return output


def _multihead(
    forward: Callable[..., Any], exchange: Exchange, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Run `nn.MultiheadAttention`; only where its probabilities are edited does it run in a mode."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    # The path that has the probabilities: the module's fast one needs key and value to be one object.
    eager = {**named, "value": named["value"].view_as(named["value"]), "need_weights": True}
    eager["average_attn_weights"] = False
    if eager.get("attn_mask") is not None:
        eager["is_causal"] = False  # a hint for fused kernels: the mask says the same
    probabilities: Tensor
    weights: Tensor | None
    if named.get("need_weights", True):
        output, probabilities = forward(**{**named, "average_attn_weights": False})
        is_mean = named.get("average_attn_weights", True)
        weights = probabilities.mean(dim=-3) if is_mean else probabilities
    else:
        output, weights = forward(**named)
        probabilities = forward(**eager)[1]
    given = exchange(probabilities if probabilities.ndim == 4 else probabilities[None])
    if given is not None and not torch.equal(given.view_as(probabilities), probabilities):
        applied = given.view_as(probabilities)
        with _Applied(applied):
            output = forward(**eager)[0]
        if weights is not None:  # what is handed out is what was applied, e.g. to a tap around this one
            weights = applied if weights.shape == applied.shape else applied.mean(dim=-3)
    return output, weights
