"""What an adapter tells about a policy, and how it hands over attention.

The seam between a policy family and `capture`: an adapter describes a policy and *makes its attention
observable*, in whatever way that family needs (forward hooks, a replaced attention interface, a function
mode), by calling an `AttentionSink`. It records nothing itself. Capture knows no policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from lerobot_attn.layout import TextSpan, TokenLayout

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class PolicyDescription:
    """Sizes of a live policy, read from its modules and config."""

    policy_type: str
    n_layers: int  # layers that run in the suffix pass
    n_prefix_layers: int
    n_heads: int
    n_denoise_steps: int
    n_queries: int  # suffix tokens
    n_keys: int  # prefix and suffix tokens
    first_action_query: int
    chunk_size: int
    n_action_steps: int  # actions executed of each chunk
    random_weights: bool = False  # a demo policy whose maps mean nothing

    @property
    def prefix_len(self) -> int:
        """Number of prefix tokens."""
        return self.n_keys - self.n_queries


@dataclass(frozen=True)
class InferenceInputs:
    """What the policy got for one inference.

    Attributes:
        layout: the keys' segments, cameras and geometry.
        token_id: (batch, text) integer, the language tokens.
        key_mask: (batch, key) bool, True where the suffix may attend.
    """

    layout: TokenLayout
    token_id: Tensor
    key_mask: Tensor


class ChosenSuffix(NamedTuple):
    """What a sink keeps of a layer's suffix attention in one denoise step; None of what it does not keep."""

    maps: Tensor | None  # (batch, head, query, key) of the chosen heads
    mean: Tensor | None  # (batch, head, key), over the executed action queries


class AttentionSink(Protocol):
    """What an adapter calls while the policy runs; one inference at a time, in this order.

    Attention is handed over in one call, or, where the forward pass is traced by a compiler, in two:
    `choose_…` inside the graph, which returns its outputs and does nothing else, and `take_…` outside.
    """

    def begin(self, inputs: InferenceInputs) -> None:
        """An inference starts."""

    def prefix_attention(self, layer: int, weights: Tensor) -> None:
        """Hand over a layer's prefix self-attention: (batch, head, prefix_query, prefix_key)."""

    def denoise_step(self, flow_time: Tensor | float) -> None:
        """The next Euler step starts; `flow_time` is its t, as a float or in every element of a tensor."""

    def suffix_attention(self, layer: int, weights: Tensor) -> None:
        """Hand over a layer's suffix attention: (batch, head, query, key), rows sum to 1.

        A layer that sees only the first keys (cross-attention to the prefix) hands over those: the others are
        0.
        """

    def choose_prefix(self, layer: int, weights: Tensor) -> Tensor:
        """Return what is kept of `prefix_attention`'s weights: (batch, head, prefix_query, prefix_key)."""

    def take_prefix(self, layer: int, chosen: Tensor) -> None:
        """Hand over what `choose_prefix` returned."""

    def choose_suffix(self, step: int, layer: int, weights: Tensor) -> ChosenSuffix:
        """Return what is kept of `suffix_attention`'s weights in the inference's denoise step `step`."""

    def take_suffix(self, layer: int, chosen: ChosenSuffix) -> None:
        """Hand over what `choose_suffix` returned, in the denoise step that was started last."""

    def end(self, action_chunk: Tensor) -> None:
        """The inference is done: (batch, chunk, action_dim), as the policy returns it."""

    def abandon(self) -> None:
        """The policy raised: what was begun is void."""

    def fail(self, error: Exception) -> None:
        """Report that attention could not be observed."""


@runtime_checkable
class PolicyAdapter(Protocol):
    """Everything capture needs to know about a policy family. Built around one (unwrapped) policy."""

    policy_types: ClassVar[tuple[str, ...]]

    def __init__(self, policy: nn.Module) -> None: ...

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy."""

    def observe(
        self, sink: AttentionSink, *, layers: Sequence[int], prefix_layers: Sequence[int], compiled: bool
    ) -> AbstractContextManager[None]:
        """Return a context in which every inference is handed to `sink`.

        Args:
            sink: receives the attention of the layers asked for; other layers cost nothing.
            layers: suffix layers to hand over.
            prefix_layers: prefix layers to hand over.
            compiled: a policy that is compiled stays so; otherwise it runs uncompiled in the context.

        Raises:
            ConfigError: `compiled`, and this family cannot be observed so.

        The context leaves nothing behind, also when the policy raises, and does not change what the policy
        computes.
        """

    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return camera → what it showed the policy: (batch, height, width, 3) uint8, not letterboxed."""

    def parse_prompt(self, prompt: str) -> list[TextSpan] | None:
        """Return the task words and state numbers of a decoded prompt, or None if its format is unknown."""


_ABSENT = object()


@contextmanager
def replaced_attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of an instance, and afterwards leave its `__dict__` as it was."""
    before = vars(owner).get(name, _ABSENT)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)
