"""Ways to reach the values inside a policy that families share. Knows no family and no probe's purpose.

Eager: `tapped` and `attention_tap` run a function or an attention module so that its probabilities are handed
over after the softmax and before they are applied to the values; what is handed back is applied instead. A
probe that only masks scores needs no probabilities: what it masks is added to the mask that the function is
called with, and the function runs as it always does.

Compiled: `CompiledTap` compiles the policy together with what a probe keeps of its attention, which the graph
returns as additional outputs. Nothing can be handed back there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lerobot_attn.errors import CaptureError, ConfigError
from lerobot_attn.policies.base import InferenceInputs, MaskingProbe, Probe, Site, SiteInfo

_ABSENT = object()
_SOFTMAX = frozenset({nn.functional.softmax, torch.softmax, Tensor.softmax})
_PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm})

Exchange = Callable[[Tensor], Tensor | None]
Bias = Callable[[], Tensor | None]
Call = tuple[Sequence[Any], Mapping[str, Any]]  # the arguments of a call, by place and by name
Masked = Callable[[Tensor, Call], Call | None]

_TRIAL = ContextVar("trial", default=False)


@contextmanager
def trial_pass() -> Iterator[None]:
    """Say of a pass of the policy that it only serves to prepare one that acts; this thread's alone."""
    token = _TRIAL.set(True)
    try:
        yield
    finally:
        _TRIAL.reset(token)


def in_trial_pass() -> bool:
    """Return whether the pass that runs acts on nothing, so that nobody records it."""
    return _TRIAL.get()


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


@contextmanager
def watched_method(policy: object, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace the method with which a policy infers by one that hands inferences to a probe."""
    function.hands_over = True  # type: ignore[attr-defined]
    with replaced_attribute(policy, name, function):
        yield


def is_watched(policy: object, name: str) -> bool:
    """Return whether the newest thing that was put around a policy's method hands inferences to a probe."""
    return bool(getattr(vars(policy).get(name), "hands_over", False))


def check_sites(asked: Iterable[Site], known: Mapping[Site, SiteInfo]) -> list[Site]:
    """Return the sites asked for, each once.

    Raises:
        ConfigError: the policy does not have one of them.
    """
    sites = list(dict.fromkeys(asked))
    for site in sites:
        if site not in known:
            alike = [other for other in known if other[::2] == site[::2]]
            alike = alike or [other for other in known if other.what == site.what] or list(known)
            groups = dict.fromkeys(other[::2] for other in alike)
            kinds = [[other for other in alike if other[::2] == group] for group in groups]
            held = ", ".join(f"{one[0]} to {one[-1]}" for one in kinds)
            raise ConfigError(f"site {site} does not exist: this policy's are {held}")
    return sites


def check_not_compiled(policy_type: str, *, compiled: bool) -> None:
    """Refuse to read a compiled policy of a family that LeRobot never compiles.

    Raises:
        ConfigError: that is asked for.
    """
    if compiled:
        raise ConfigError(
            f"compiled=true: LeRobot does not compile {policy_type}, so there is no compiled policy to read; "
            "leave compiled out"
        )


def replacement(site: Site, value: Tensor, given: Tensor | None) -> Tensor:
    """Return what the policy goes on with: the value itself, or what a probe gave in its place.

    Raises:
        CaptureError: the replacement does not fit.
    """
    if given is None:
        return value
    if given.shape != value.shape or given.dtype != value.dtype or given.device != value.device:
        raise CaptureError(
            f"{site}: a probe returned {tuple(given.shape)} {given.dtype} on {given.device}, expected "
            f"{tuple(value.shape)} {value.dtype} on {value.device}, as it was given"
        )
    return given


def exchanged_in_order(
    value: Tensor, order: Tensor, at: Exchange, *, is_square: bool = False, kept: Tensor | None = None
) -> Tensor | None:
    """Hand a map over with its tokens in another order, and return what came back in the policy's own.

    Args:
        value: attention probabilities (batch, head, query, key).
        order: (batch, token): where in the policy's order the tokens stand. Keys behind them stay there.
        at: gets the map in that order; returns None, or what is applied instead.
        is_square: whether the queries are the same tokens, and put in order, too.
        kept: (batch, token) bool, in that order: queries whose rows stay as they are, whatever `at` returns.

    Returns:
        None, or what `at` returned, in the policy's order. What has another shape is returned as it is: what
        is wrong with it is said where it is applied.
    """
    rest = torch.arange(order.shape[1], value.shape[-1], device=order.device)
    keys = torch.cat([order, rest.expand(len(order), -1)], dim=1)[:, None, None].expand(value.shape)
    rows = order[:, None, :, None].expand(value.shape) if is_square else None
    turned = value.gather(-1, keys)
    if rows is not None:
        turned = turned.gather(-2, rows)
    given = at(turned)
    if given is None or given.shape != value.shape:
        return given
    if kept is not None:
        given = torch.where(kept[:, None, :, None], turned, given)
    if rows is not None:
        given = torch.empty_like(given).scatter_(-2, rows, given)
    return torch.empty_like(given).scatter_(-1, keys, given)


class _BeforeUse(TorchFunctionMode):
    """Exchanges the left factor of the first matrix product after a softmax: attention as it is applied.

    So casts and dropout between the two have been done already, whatever the module does there.
    """

    def __init__(self, exchange: Exchange, bias: Bias | None = None):
        super().__init__()
        self._exchange = exchange
        self._bias = bias
        self._softmaxed = False
        self.n_exchanged = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._softmaxed and func in _PRODUCTS:
            self._softmaxed = False
            self.n_exchanged += 1
            value, *others = args
            given = self._exchange(value)
            return func(value if given is None else given, *others, **kwargs)
        if func in _SOFTMAX:
            self._softmaxed = True
            if self._bias is not None and (bias := self._bias()) is not None:
                scores, *others = args
                bias = bias[..., : scores.shape[-1]].to(scores.dtype)
                # In place, for another map of this size would cost more than the addition: nothing but the
                # softmax reads the scores of the functions that are tapped with a bias.
                scores = scores + bias if scores.requires_grad else scores.add_(bias)
                return func(scores, *others, **kwargs)
        return func(*args, **kwargs)


class Masking(NamedTuple):
    """How a probe masks the scores of one site, see `MaskingProbe`.

    Attributes:
        bias: returns what is added to the scores; None: nothing.
        is_all: returns whether the probe does without the probabilities now.
    """

    bias: Bias
    is_all: Callable[[], bool]


def tapped(
    function: Callable[..., Any],
    exchange: Exchange,
    missed: Callable[[], None],
    masking: Masking | None = None,
    masked: Masked | None = None,
) -> Callable[..., Any]:
    """Return a function that hands its attention probabilities to `exchange` before it applies them.

    It computes as it always does: nothing of it is replaced but the probabilities, and these only where
    `exchange` returns a tensor.

    Args:
        function: calls softmax and then multiplies its result with the values.
        exchange: gets (batch, head, query, key); returns None, or what is applied instead.
        missed: called after a call in which no such product came.
        masking: what is added to the scores; where that is all, `exchange` is not called.
        masked: gets a bias and a call of the function; returns the call whose mask has the bias in it, or
            None if the call has no mask that could hold it.
    """

    def tapped_function(*args: Any, **kwargs: Any) -> Any:
        if masking is not None and masked is not None and masking.is_all():
            bias = masking.bias()
            if bias is None:
                return function(*args, **kwargs)
            if (call := masked(bias, (args, kwargs))) is not None:
                return function(*call[0], **call[1])
        # The mode belongs to one call: it is kept per thread, and a real robot infers in a thread of its own.
        with _BeforeUse(exchange, masking.bias if masking else None) as mode:
            output = function(*args, **kwargs)
        if not mode.n_exchanged:
            missed()
        return output

    return tapped_function


@contextmanager
def attention_tap(
    module: nn.Module, exchange: Exchange, missed: Callable[[], None], masking: Masking | None = None
) -> Iterator[None]:
    """Tap an attention module's forward pass as `tapped` does, while the context lasts.

    Args:
        module: of transformers, called with `attention_mask`, numbers that are added to its scores.
        exchange: see `tapped`; so the others.
        missed: see there.
        masking: see there.
    """
    tapped_forward = tapped(module.forward, exchange, missed, masking, _with_added_mask)
    with replaced_attribute(module, "forward", tapped_forward):
        yield


def _with_added_mask(bias: Tensor, call: Call) -> Call | None:
    """Return a call of a transformers attention module with a bias added to its mask."""
    args, kwargs = call
    mask = kwargs.get("attention_mask")
    if not torch.is_tensor(mask) or not mask.is_floating_point():
        return None
    return args, {**kwargs, "attention_mask": mask + bias[..., : mask.shape[-1]].to(mask.dtype)}


def masking_of(probe: Probe, site: Site) -> Masking | None:
    """Return how a probe masks a site's scores; None of one that does not."""
    if not isinstance(probe, MaskingProbe):
        return None
    return Masking(partial(probe.bias, site), partial(probe.only_masks, site))


def begun(probe: Probe, describe: Callable[[], InferenceInputs]) -> bool:
    """Begin an inference for a probe; return False if what its tokens are cannot be told.

    The probe learns why. The policy goes on unobserved, unless the probe raises what it is told.

    Args:
        probe: what is called.
        describe: returns what the policy got.
    """
    try:
        inputs = describe()
    except Exception as error:
        probe.refuse(error)
        return False
    probe.begin(inputs)
    return True


def no_attention(site: Site) -> CaptureError:
    """Return the error for an attention module that gave no probabilities."""
    return CaptureError(
        f"layer {site.layer} ({site}) returned no attention weights, expected eager attention; this LeRobot "
        "or transformers release runs another attention kernel"
    )


@runtime_checkable
class GraphProbe(Protocol):
    """A probe that says inside a compiled graph what it keeps, so that the rest never leaves the graph."""

    def choose(self, site: Site, denoise_step: int, value: Tensor) -> Any:
        """Return tensors (in tuples, with None) made of the value; called while the graph is traced."""

    def take(self, site: Site, chosen: Any) -> None:
        """Take what `choose` returned, after the graph has run, in the denoise step that was started last."""


class _Event(NamedTuple):
    site: Site | None  # None: the vision tower starts on a camera, by its name, or a denoise step starts
    value: Any


class CompiledTap:
    """Compiles a policy's function together with what is chosen of its attention, which the graph returns.

    Inside the graph the hooks only append tensors to a list. The probe gets them when the graph has run. It
    copies them on the graph's own stream, so before another run can overwrite the memory of a CUDA graph.

    Args:
        probe: only watches.
        function: the policy's own, not compiled.
        mode: of `torch.compile`.

    Raises:
        ConfigError: the probe edits.
    """

    def __init__(self, probe: Probe, function: Callable[..., Tensor], mode: str):
        if probe.edits:
            raise ConfigError(
                "compiled=true: values can only be read from a compiled policy, expected a probe that "
                "does not edit; leave compiled out to edit an uncompiled one"
            )
        self._probe = probe
        self._chooser = probe if isinstance(probe, GraphProbe) else None
        self._plain = function
        self._compiled = torch.compile(self._traced, mode=mode)
        self._events: list[_Event] | None = None
        self._n_steps = 0
        self._failure: Exception | None = None

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the compiled graph, and hand what it returns to the probe."""
        self._failure = None
        try:
            result, events = self._compiled(*args, **kwargs)
        finally:
            self._events = None
        if self._failure is not None:
            self._probe.fail(self._failure)
        for site, value in events:
            if site is None and isinstance(value, str):
                self._probe.camera(value)
            elif site is None:
                self._probe.denoise_step(value)
            elif self._chooser is not None:
                self._chooser.take(site, value)
            else:
                self._probe.at(site, value)
        returned: Tensor = result
        return returned

    def camera(self, name: str) -> None:
        """Note inside the graph that the vision tower starts on a camera's image."""
        if self._events is not None:
            self._events.append(_Event(None, name))

    def denoise_step(self, flow_time: Tensor | float) -> None:
        """Note inside the graph that the next Euler step starts."""
        if self._events is not None:
            self._events.append(_Event(None, flow_time))
            self._n_steps += 1

    def hook(self, site: Site) -> Callable[[nn.Module, Any, Any], None]:
        """Return a forward hook for a module that returns (output, attention probabilities)."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.note(site, output[1] if isinstance(output, tuple) and len(output) > 1 else None)

        return hook

    def note(self, site: Site, weights: Tensor | None) -> None:
        """Take note of a site's value inside the graph; None where its attention gave none."""
        if self._events is None:
            return
        if weights is None:
            self._fail(no_attention(site))
            return
        try:
            kept = (
                weights if self._chooser is None else self._chooser.choose(site, self._n_steps - 1, weights)
            )
            self._events.append(_Event(site, kept))
        except CaptureError as error:  # no exception may reach the policy
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error

    def _traced(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[_Event]]:
        self._events, self._n_steps = [], 0
        result = self._plain(*args, **kwargs)
        return result, self._events
