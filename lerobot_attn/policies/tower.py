"""A language model or an action expert: decoder layers, whose neurons and residual stream can be reached.

Each layer has a gated feed-forward network, `mlp`, as transformers writes those of Gemma and Llama. Its
neurons are what `mlp.down_proj` is called with; column j of that projection is what neuron j writes to the
residual stream. Knows no policy family; where a layer's residual leaves it, the family's adapter says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lerobot_attn.policies.base import Probe, Site, SiteInfo, Stream
from lerobot_attn.policies.taps import CompiledTap, Exchange, replacement


class Tower:
    """The decoder layers of one stream.

    Args:
        stream: "vlm" or "expert".
        layers: each with an `mlp`.
        n_read: so many layers, from the first, give what something reads that the actions depend on. What
            leaves the others, and what their neurons write, changes no action.
    """

    def __init__(self, stream: Stream, layers: nn.ModuleList, *, n_read: int | None = None):
        self.stream: Stream = stream
        self.layers = layers
        self.n_read = len(layers) if n_read is None else n_read

    def sites(self) -> dict[Site, SiteInfo]:
        """Return the neurons and the residual of every layer."""
        found = {}
        for layer in range(len(self.layers)):
            into, out_of = self._projection(layer).in_features, self._projection(layer).out_features
            reaches = layer < self.n_read
            for what, n_units in (("neurons", into), ("residual", out_of)):
                site = Site(self.stream, layer, "neurons" if what == "neurons" else "residual")
                found[site] = SiteInfo(n_units=int(n_units), reaches_actions=reaches)
        return found

    def tap_neurons(self, stack: ExitStack, probe: Probe, graph: CompiledTap | None, layer: int) -> None:
        """Hand a layer's neurons to the probe, or to the graph if there is one, until the stack closes."""
        site = Site(self.stream, layer, "neurons")
        # Looked up now, not when the adapter was built: an adapter of PEFT may have been put around it since.
        tap_input(stack, self._projection(layer), exchange_at(site, probe, graph))

    @torch.no_grad()
    def value_vectors(self, layer: int, units: Sequence[int]) -> Tensor:
        """Return what neurons write to the residual stream for each unit of activation.

        What LoRA or another adapter of weights adds is in it. Where a norm gates the feed-forward network by
        the flow time (the action expert of Pi0.5), it is what is written before the gate.

        Args:
            layer: in the tower.
            units: numbers of neurons.

        Returns:
            (unit, feature), float32, on the host.
        """
        projection = self._projection(layer)
        weight = next(one for one in projection.parameters() if one.is_floating_point())
        one_hot = torch.zeros(
            len(units) + 1, projection.in_features, dtype=weight.dtype, device=weight.device
        )
        one_hot[range(len(units)), list(units)] = 1
        # Not called, so that hooks see nothing of it. The last row is 0: what comes of it is the bias.
        written: Tensor = projection.forward(one_hot).float().cpu()
        return written[:-1] - written[-1]

    def _projection(self, layer: int) -> Any:
        module: Any = self.layers[layer]
        return module.mlp.down_proj


def exchange_at(site: Site, probe: Probe, graph: CompiledTap | None) -> Exchange:
    """Return what hands a site's value to the probe, or to the graph if there is one."""
    if graph is not None:
        return partial(graph.note, site)

    def exchanged(value: Tensor) -> Tensor | None:
        given = replacement(site, value, probe.at(site, value))
        return None if given is value else given

    return exchanged


def tap_input(stack: ExitStack, module: nn.Module, exchange: Exchange) -> None:
    """Hand over the first argument of each call of a module, until the stack closes."""

    def hook(module: nn.Module, args: Any) -> Any:
        given = exchange(args[0])
        return None if given is None else (given, *args[1:])

    stack.callback(module.register_forward_pre_hook(hook).remove)


def tap_output(stack: ExitStack, module: nn.Module, exchange: Exchange) -> None:
    """Hand over what each call of a module returns, a tensor, until the stack closes."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return exchange(output)

    stack.callback(module.register_forward_hook(hook).remove)
