"""The seam between policies and everything that watches or changes them.

An adapter describes a policy and makes its sites observable: while the policy runs, the value at each site
that was asked for is handed to a `Probe`, which may hand back another one to be used in its place. Watching
and acting share this one interface. An adapter records nothing, and knows no store and no episode. Nothing
here knows a policy family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

from lerobot_attn.layout import TokenLayout
from lerobot_attn.prompt import TextSpan, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

Stream = Literal["vision", "vlm", "expert"]
What = Literal["attention", "neurons", "residual"]


class Site(NamedTuple):
    """A place in a layer where a value can be read and perhaps replaced, e.g. "expert.17.attention" as text.

    Attributes:
        stream: the tower: "vision" (runs once for each camera), "vlm" (runs once an
            inference, over the prefix) or "expert" (runs in every denoise step, over the suffix).
        layer: the layer in that tower, from 0.
        what: its attention probabilities, its FFN neurons, or its residual stream.
    """

    stream: Stream
    layer: int
    what: What = "attention"

    def __str__(self) -> str:
        return f"{self.stream}.{self.layer}.{self.what}"


@dataclass(frozen=True)
class SiteInfo:
    """What is known of a site before the policy runs.

    Attributes:
        n_heads: attention heads; None where the site is no attention.
        n_units: neurons of the layer, or dimensions of its residual stream; None where the site is attention.
        keys: which keys an attention site sees: those of the prefix alone, or the suffix's too; or, in the
            vision tower, the patches of one camera's "image".
        can_be_written: whether a probe's replacement is used. A compiled policy's sites are read only.
        reaches_actions: whether anything that the actions depend on reads it. False of the attention, the
            neurons and the residual of a language model's last layer, where the action expert reads each
            layer's keys and values alone: whatever is done there, actions stay bit for bit what they were.
    """

    n_heads: int | None = None
    n_units: int | None = None
    keys: Literal["prefix", "prefix+suffix", "image"] = "prefix+suffix"
    can_be_written: bool = True
    reaches_actions: bool = True


@dataclass(frozen=True)
class PolicyDescription:
    """Sizes of a live policy, read from its modules and config.

    It counts no tokens: they may differ from inference to inference, so each inference's layout says them.
    """

    policy_type: str
    n_layers: int  # layers of the expert, which run in the suffix pass
    n_prefix_layers: int  # layers of the language model, which run in the prefix pass
    n_heads: int
    n_denoise_steps: int  # 0 of a policy that does not denoise: one pass, recorded as one step without a time
    chunk_size: int
    n_action_steps: int  # actions executed of each chunk
    random_weights: bool = False  # a demo policy whose maps mean nothing
    remark: str = ""  # one line that everything that shows its maps says of it
    noise_shape: tuple[int, int] | None = None  # (chunk, action) that denoising starts from; None without
    reads_last_prefix_layer: bool = False  # all layers come after the prefix's last, not each after its like
    # Tokens that an autoregressive policy decodes at most; 0 of one that decodes none. They are its suffix,
    # and the chunk's actions are made of all of them together: none of them is an action.
    n_decode_steps: int = 0
    n_vision_layers: int = 0  # layers of the vision tower; 0 of a policy without a vision transformer
    n_vision_heads: int = 0  # its attention heads, of which the other towers may have more or fewer
    shown_layer: int | None = None  # looked at unless another is chosen; None: the last

    @property
    def draws_own_noise(self) -> bool:
        """Whether it denoises from noise that nobody can give it, drawn for the whole batch."""
        return self.noise_shape is None and self.n_denoise_steps > 0

    @property
    def n_steps(self) -> int:
        """Passes over the suffix in an inference: the denoise steps, or one."""
        return max(self.n_denoise_steps, 1)


class _Said(TypedDict):
    policy_type: str
    n_action_steps: int
    random_weights: bool
    remark: str


def said_by(config: Any) -> _Said:
    """Return what the config of any family says of a description."""
    return {
        "policy_type": config.type,
        "n_action_steps": config.n_action_steps,
        "random_weights": bool(getattr(config, "random_weights", False)),
        "remark": str(getattr(config, "remark", "")),
    }


class DecodedTokens(NamedTuple):
    """What an autoregressive policy decoded in an inference.

    Attributes:
        token_id: (batch, query) integer, in the order in which they were decoded.
        is_used: (batch, query) bool, True up to the token that ends the actions and at that one; what was
            decoded behind it, while others of the batch had not ended, changes nothing.
    """

    token_id: Tensor
    is_used: Tensor

    @property
    def is_read(self) -> Tensor:
        """(batch, query) bool: the tokens that were read to decode another one, so all used but the last."""
        read = self.is_used.roll(-1, dims=1)
        read[:, -1] = False
        return read


@dataclass(frozen=True)
class InferenceInputs:
    """What the policy got for one inference.

    Attributes:
        layout: the keys' segments, cameras and geometry.
        token_id: (batch, text) integer, the language tokens.
        key_mask: (batch, key) bool, True where the suffix may attend.
        decoded: what an autoregressive policy has decoded: one element when it has, before `end`.
        vision_grid: (rows, columns) of the patches that the vision tower makes of an image, which may be
            finer than the camera's tokens; None of a policy without a vision transformer.
    """

    layout: TokenLayout
    token_id: Tensor
    key_mask: Tensor
    decoded: list[DecodedTokens] = field(default_factory=list)
    vision_grid: tuple[int, int] | None = None


class ParsedPrompt(NamedTuple):
    """What a decoded prompt says.

    Attributes:
        spans: the words of the task and the numbers of the state, by their characters.
        is_truncated: whether the prompt's end is missing, because it was longer than the policy's slots; None
            if that cannot be told.
    """

    spans: list[TextSpan]
    is_truncated: bool | None = False


class Probe(Protocol):
    """What an adapter calls while the policy runs: for each inference in this order.

    `begin`; for each camera `camera` and `at`, of a probe that wants sites of the vision tower; `at` for the
    sites of the prefix pass; then for each denoise step `denoise_step` and `at`; then `end`. If the policy
    raises, `abandon` comes instead of `end`. If the adapter cannot tell what the tokens are, `refuse` comes
    instead of `begin`.

    An autoregressive policy has a single step, in which `at` comes once for each token that is read: one
    query, and the keys of the prefix, of the tokens before it and of itself.

    A policy that reads its prefix anew in every denoise step, and each time alike, hands over the sites of
    the prefix pass in the first one, between those of the suffix. What `at` returns for them holds for all.
    """

    @property
    def edits(self) -> bool:
        """Whether `at` may return a replacement; a policy that stays compiled takes no such probe."""

    def begin(self, inputs: InferenceInputs) -> None:
        """An inference starts."""

    def refuse(self, error: Exception) -> None:
        """An inference starts, but what its tokens are cannot be told: comes instead of `begin`.

        The policy goes on; calls that may follow are of no inference.

        Raises:
            Exception: the error, of a probe that cannot go without; it is raised through the policy's call.
        """

    def camera(self, name: str) -> None:
        """The vision tower starts on a camera's image: what comes from "vision" sites is of this camera.

        Cameras come in the layout's order, missing ones too, in whose place the policy sees a blank image. A
        probe that wants no "vision" site is never called so.
        """

    def denoise_step(self, flow_time: Tensor | float) -> None:
        """The next Euler step starts; `flow_time` is its t, as a float or in every element of a tensor.

        A policy that does not denoise has one step, whose time is NaN.
        """

    def at(self, site: Site, value: Tensor) -> Tensor | None:
        """Take the value of a site before the policy uses it.

        Args:
            site: which one.
            value: attention probabilities (batch, head, query, key), rows sum to 1. The queries and keys of
                the "vision" stream are the patches of one camera's image, row by row from the top left; those
                of the "vlm" stream are the prefix's; those of the "expert" are the suffix's queries (the one
                that is read, of an autoregressive policy) and the keys that the layer sees.
                Neurons: the activations of the feed-forward network, (batch, token, unit), which its last
                projection reads. Residual: what leaves the layer, (batch, token, unit), after the
                feed-forward network's output is added. Their tokens are the prefix's in the "vlm" stream,
                padding too, and the suffix's queries in the "expert", once a denoise step.

        Returns:
            None to leave it, or a tensor of the same shape, dtype and device that the policy uses instead.
        """

    def end(self, action_chunk: Tensor) -> None:
        """The inference is done: (batch, chunk, action_dim), as the policy returns it."""

    def abandon(self) -> None:
        """The policy raised: what was begun is void."""

    def fail(self, error: Exception) -> None:
        """Report that a site could not be observed."""


@runtime_checkable
class MaskingProbe(Protocol):
    """A probe that can say before the softmax which keys are not read."""

    def bias(self, site: Site) -> Tensor | None:
        """Return what is added to a site's scores before the softmax; None adds nothing.

        Asked, right before `at`, where an adapter reaches the scores; so a probe learns there that `at` gets
        what came of them.

        Returns:
            0, or -inf where a key is not read: of a shape that broadcasts to (batch, head, query, key). Keys
            that the layer does not see come last, and are left out.
        """

    def only_masks(self, site: Site) -> bool:
        """Return whether `bias` is all that the probe does at a site now, so that `at` need not be called.

        Asked before `bias`. An adapter that can mask scores where the policy does itself then makes no map
        for the probe, which costs more than the mask.
        """


def own_tokenizer(adapter: PolicyAdapter) -> Tokenizer | None:
    """Return the tokenizer of a policy that writes its prompts itself; None where its preprocessor does."""
    found: Tokenizer | None = getattr(adapter, "tokenizer", None)
    return found


@runtime_checkable
class NeuronAdapter(Protocol):
    """An adapter whose sites include neurons."""

    def value_vectors(self, site: Site, units: Sequence[int]) -> Tensor:
        """Return what neurons write to the residual stream for each unit of activation.

        Args:
            site: the neurons of a layer.
            units: their numbers.

        Returns:
            (unit, feature), float32, on the host: columns of the layer's `down_proj`, with what LoRA adds.
        """


@runtime_checkable
class PolicyAdapter(Protocol):
    """Everything that is needed of a policy family. Built around one (unwrapped) policy.

    Attributes:
        policy_types: the types as registered with LeRobot.
        predicts: the policy's method that every inference goes through, from a batch to an action chunk.
        policy: the policy.
    """

    policy_types: ClassVar[tuple[str, ...]]
    predicts: ClassVar[str]
    policy: Any

    def __init__(self, policy: nn.Module) -> None: ...

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy."""

    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return every site that `observe` can hand over; not each is attention."""

    def observe(self, probe: Probe, sites: Iterable[Site], *, compiled: bool) -> AbstractContextManager[None]:
        """Return a context in which every inference is handed to `probe`.

        Args:
            probe: receives the values of the sites asked for; other sites cost nothing.
            sites: which sites to hand over.
            compiled: a policy that is compiled stays so; otherwise it runs uncompiled in the context.

        Raises:
            ConfigError: a site that the policy does not have; or `compiled`, and this family cannot be
                observed so, or the probe edits.

        The context leaves nothing behind, also when the policy raises. A probe that returns nothing does not
        change what the policy computes.
        """

    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return camera → what it showed the policy: (batch, height, width, 3) uint8, not letterboxed."""

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        """Return what a decoded prompt says; None if its format is unknown."""
