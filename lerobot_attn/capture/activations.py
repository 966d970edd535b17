"""Neurons and residuals of one inference, reduced over groups of tokens where the policy runs.

A layer's activations have a row for each token: 16384 neurons of 968 tokens in 18 layers are 570 MB an
inference. Here only the mean and the maximum over each group of tokens are kept (each camera's patches, the
words of the task, the state, the template; the executed actions), which is 0.6 MB a group and reduction. They
are computed on the policy's device, gathered there, and copied to the host once an inference.

Runs inside the policy's forward pass, called by `lerobot_attn.capture.collector.Collector`. Knows no policy
family, no episode and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lerobot_attn.capture.copies import HostCopies
from lerobot_attn.config import CaptureSettings, resolve_indices
from lerobot_attn.errors import CaptureError, ConfigError
from lerobot_attn.layout import Kind, TokenLayout
from lerobot_attn.policies.base import PolicyDescription, Site, SiteInfo, Stream, What

REDUCTIONS = ("mean", "max")
_STREAMS: tuple[Stream, ...] = ("vlm", "expert")
_SETTINGS: tuple[tuple[What, str], ...] = (("neurons", "neurons"), ("residual", "residuals"))


class ActivationChoice(NamedTuple):
    """The layers of one stream whose neurons, or whose residual stream, are kept.

    Attributes:
        stream: "vlm" or "expert".
        what: "neurons" or "residual".
        layers: ascending.
        n_units: neurons of a layer, or numbers in the residual stream.
    """

    stream: Stream
    what: What
    layers: tuple[int, ...]
    n_units: int

    @property
    def name(self) -> str:
        """The store's name of the array that is reduced over groups of tokens."""
        return f"{self.stream}_{self.what}"

    @property
    def sites(self) -> list[Site]:
        """The sites that are needed."""
        return [Site(self.stream, layer, self.what) for layer in self.layers]

    def n_bytes(self, n_rows: int, n_steps: int) -> int:
        """Return the size for one environment and inference, float16, uncompressed.

        Args:
            n_rows: rows of units that are kept of a layer in a step: groups × reductions, or tokens.
            n_steps: denoise steps that are kept; the language model runs once.
        """
        return 2 * n_rows * len(self.layers) * self.n_units * (n_steps if self.stream == "expert" else 1)


def choose_activations(
    config: CaptureSettings, policy: PolicyDescription, sites: Mapping[Site, SiteInfo]
) -> tuple[ActivationChoice, ...]:
    """Apply the settings `neurons` and `residuals` to a policy.

    Raises:
        ConfigError: the policy has no such sites, or a layer does not exist.
    """
    chosen = []
    for what, setting in _SETTINGS:
        asked = getattr(config, setting)
        for stream in (stream for stream in _STREAMS if stream in asked):
            held = {site.layer: info.n_units for site, info in sites.items() if site[::2] == (stream, what)}
            if not held:
                raise ConfigError(
                    f"{setting}: this policy ({policy.policy_type}) has no {what} of stream {stream!r} that "
                    f"can be captured, got {asked!r}, expected none; leave the setting out (pi0, pi05 and "
                    "smolvla have them)"
                )
            layers = resolve_indices(f"{setting}: layer of the {stream}", asked[stream], len(held))
            units = {held[layer] for layer in layers}
            if len(units) != 1 or None in units:
                raise ConfigError(
                    f"{setting}: the chosen layers of the {stream} have {units} units, expected the same "
                    "number in each; choose layers that are alike"
                )
            chosen.append(ActivationChoice(stream, what, layers, int(units.pop() or 0)))
    return tuple(chosen)


class _Group(NamedTuple):
    """A group of tokens: the span that they lie in, and which of it they are.

    Attributes:
        start: first token of the span.
        stop: the token behind its last one.
        mask: (batch, token of the span) bool; None where every row has all of them.
    """

    start: int
    stop: int
    mask: NDArray[np.bool_] | None


class _Mask(NamedTuple):
    """The tokens of a group on the policy's device.

    Attributes:
        drop: (batch, token of the span, 1) bool, True where a token is none of the group's.
        n_tokens: (batch, 1), how many are.
    """

    drop: Tensor
    n_tokens: Tensor


class ActivationCollector:
    """Collects the activations of one inference at a time.

    Args:
        choices: what is kept.
        n_steps: how many denoise steps are kept.
        full: also keep every token's.

    Attributes:
        groups: stream → names of its groups of tokens, of the inference that was begun last.
        dtypes: in which the policy computed what was taken.
    """

    def __init__(self, choices: Sequence[ActivationChoice], n_steps: int, *, full: bool):
        self.groups: dict[Stream, tuple[str, ...]] = {}
        self.dtypes: set[torch.dtype] = set()
        self._choices = {(choice.stream, choice.what): choice for choice in choices}
        self._n_steps: dict[Stream, int] = {"vlm": 1, "expert": n_steps}
        self._is_full = full
        self.abandon()

    def begin(
        self, layout: TokenLayout, key_kind: NDArray[np.int8], executed: slice, copies: HostCopies
    ) -> None:
        """Start to collect an inference.

        Args:
            layout: its tokens.
            key_kind: (batch, key), values of `Kind`.
            executed: the queries whose actions are executed.
            copies: on their way to the host.
        """
        self.abandon()
        self.dtypes.clear()
        self._copies = copies
        prefix, suffix = layout.prefix_groups(key_kind), layout.suffix_groups(executed)
        self.groups = {"vlm": tuple(prefix), "expert": tuple(suffix)}
        self._n_tokens: dict[Stream, int] = {"vlm": layout.prefix_len, "expert": layout.n_queries}
        self._spans: dict[Stream, list[_Group]] = {
            "vlm": [_span_of(tokens) for tokens in prefix.values()],
            "expert": [_Group(span.start, span.stop, None) for span in suffix.values()],
        }
        self._is_padding = torch.from_numpy(key_kind[:, : layout.prefix_len] == Kind.PADDING)

    def take(self, site: Site, step: int, value: Tensor) -> None:
        """Keep a layer's activations: (batch, token, unit), of the step with this position among those kept.

        Raises:
            CaptureError: its shape is not the one that the layout says.
        """
        choice = self._choices[site.stream, site.what]
        expected = (self._n_tokens[site.stream], choice.n_units)
        if value.ndim != 3 or tuple(value.shape[1:]) != expected:
            raise CaptureError(
                f"{site.what} of layer {site.layer} of the {site.stream} has shape {tuple(value.shape)}, "
                f"expected (batch, {expected[0]} tokens, {expected[1]} units); the policy's forward pass is "
                "not the one that its adapter knows"
            )
        self.dtypes.add(value.dtype)
        groups = self._groups_on(value.device, site.stream)
        batch, layer = len(value), choice.layers.index(site.layer)
        sizes = (self._n_steps[site.stream], len(choice.layers), batch)
        if choice.name not in self._reduced:
            shape = (*sizes, len(groups), len(REDUCTIONS), choice.n_units)
            # On the policy's device: many small copies to the host would cost more than one.
            self._reduced[choice.name] = value.new_empty(shape, dtype=torch.float16)
        for number, (group, mask) in enumerate(groups):
            mean, most = _reduced(value[:, group.start : group.stop], mask)
            target = self._reduced[choice.name][step, layer]
            target[:, number, 0] = mean
            target[:, number, 1] = most
        if not self._is_full:
            return
        name = f"{choice.name}_full"
        if name not in self._full:
            shape = (*sizes, *value.shape[1:])
            self._full[name] = self._copies.allocate(shape, torch.float16, value.device)
        if site.stream == "vlm":
            value = value.masked_fill(self._is_padding.to(value.device)[..., None], float("nan"))
        self._copies.copy_into(self._full[name][step, layer], value)

    def end(self) -> dict[str, Tensor]:
        """Return what was collected: array → (step, layer, batch, group, reduction, unit).

        Every token's: (step, layer, batch, token, unit). On their way to the host, float16; what lies beyond
        float16's range (65504) is infinite.
        """
        is_here = {name: tensor.device.type == "cpu" for name, tensor in self._reduced.items()}
        reduced = {
            name: tensor if is_here[name] else self._copies.copy(tensor)
            for name, tensor in self._reduced.items()
        }
        return {**reduced, **self._full}

    def abandon(self) -> None:
        """Forget what was collected of an inference."""
        self._reduced: dict[str, Tensor] = {}
        self._full: dict[str, Tensor] = {}
        self._masks: dict[Stream, list[_Mask | None]] = {}

    def _groups_on(self, device: torch.device, stream: Stream) -> list[tuple[_Group, _Mask | None]]:
        """Return a stream's groups with their masks on a device, where they travel once an inference."""
        spans = self._spans[stream]
        if stream not in self._masks:
            self._masks[stream] = [_mask_on(device, group) for group in spans]
        return list(zip(spans, self._masks[stream], strict=True))


def _span_of(tokens: NDArray[np.bool_]) -> _Group:
    """Return the span of a group of tokens, (batch, token) bool."""
    positions = np.flatnonzero(tokens.any(axis=0))
    start, stop = (int(positions[0]), int(positions[-1]) + 1) if len(positions) else (0, 1)
    mask = tokens[:, start:stop]
    return _Group(start, stop, None if mask.all() else np.ascontiguousarray(mask))


def _mask_on(device: torch.device, group: _Group) -> _Mask | None:
    if group.mask is None:
        return None
    drop = torch.from_numpy(~group.mask).to(device, non_blocking=True)
    return _Mask(drop[..., None], (~drop).sum(dim=1, keepdim=True))


def _reduced(value: Tensor, mask: _Mask | None) -> tuple[Tensor, Tensor]:
    """Return mean (float32) and maximum over tokens, each (batch, unit); NaN of a row without tokens.

    Args:
        value: (batch, token, unit).
        mask: the tokens that count; None: all.
    """
    if mask is None:
        return value.mean(dim=1, dtype=torch.float32), value.amax(dim=1)
    # Filled, not multiplied: what is left out may be infinite or NaN.
    mean = value.masked_fill(mask.drop, 0).sum(dim=1, dtype=torch.float32) / mask.n_tokens
    most = value.masked_fill(mask.drop, float("-inf")).amax(dim=1)
    return mean, most.masked_fill(mask.n_tokens == 0, float("nan"))
