"""Neurons and residuals of an episode: which arrays it has of them, and what each holds, in a line.

Arrays in, values out. Knows neither a store nor a policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from lerobot_attn.analysis.labels import ranges
from lerobot_attn.errors import first_line

ACTIVATIONS = ("vlm_neurons", "expert_neurons", "vlm_residual", "expert_residual")
EVERY_TOKEN = tuple(f"{name}_full" for name in ACTIVATIONS)


class ActivationSummary(NamedTuple):
    """What an array of activations holds.

    Attributes:
        layers: labels of its layers.
        n_units: neurons of a layer, or numbers in the residual stream.
        groups: names of the groups of tokens; none of an array that has every token.
        least: smallest finite value looked at; NaN without one.
        most: largest one.
        share_missing: share of the values looked at that are NaN, 0 to 1: groups without tokens, padding,
            and what a repair dropped.
        n_beyond: values looked at that lie beyond float16's range, and so are infinite.
    """

    layers: list[int]
    n_units: int
    groups: list[str]
    least: float
    most: float
    share_missing: float
    n_beyond: int

    @property
    def line(self) -> str:
        """All of that in a line."""
        short = ", ".join(group.rpartition(".")[2] for group in self.groups) or "every token"
        parts = [f"layers {ranges(self.layers)}", f"{self.n_units} units", f"of {short}"]
        parts.append(f"values {self.least:.3g} to {self.most:.3g}")
        if self.share_missing:
            parts.append(f"{self.share_missing:.1%} without a value")
        if self.n_beyond:
            parts.append(f"{self.n_beyond} BEYOND ±65504, stored as infinite")
        return "; ".join(parts)


def activation_summary(dataset: xr.Dataset, name: str, inferences: Sequence[int]) -> ActivationSummary:
    """Return what an array of neurons or residuals holds.

    Args:
        dataset: an episode's.
        name: one of `ACTIVATIONS` or `EVERY_TOKEN`, which the episode has.
        inferences: those that are looked at; of the others nothing is read.
    """
    array = dataset[name]
    layer = next(str(dim) for dim in array.dims if str(dim).endswith("_layer"))
    n = n_missing = n_beyond = 0
    least, most = np.nan, np.nan
    for inference in inferences:
        # Part by part, for every token's values may take half a gigabyte.
        for position in range(array.shape[1]):
            values = array.variable[inference, position].values
            is_finite = np.isfinite(values)
            n, n_beyond = n + values.size, n_beyond + int(np.isinf(values).sum())
            n_missing += int(np.isnan(values).sum())
            if is_finite.any():
                least = float(np.fmin(least, values.min(where=is_finite, initial=np.inf)))
                most = float(np.fmax(most, values.max(where=is_finite, initial=-np.inf)))
    groups = [dim for dim in array.dims if str(dim).endswith("_group")]
    return ActivationSummary(
        layers=[int(label) for label in array[layer].values],
        n_units=array.shape[-1],
        groups=[str(name) for dim in groups for name in array[dim].values],
        least=least,
        most=most,
        share_missing=n_missing / max(1, n),
        n_beyond=n_beyond,
    )


def activation_lines(dataset: xr.Dataset, inferences: Sequence[int]) -> dict[str, str]:
    """Return array → what it holds in a line, of the arrays of neurons and residuals that an episode has.

    Args:
        dataset: an episode's.
        inferences: those that are looked at; of what has every token the first alone.
    """
    lines = {}
    for name in [name for name in ACTIVATIONS + EVERY_TOKEN if name in dataset]:
        looked_at = inferences[:1] if name in EVERY_TOKEN else inferences
        try:
            lines[name] = activation_summary(dataset, name, looked_at).line
        except Exception as error:  # a damaged chunk raises whatever its codec raises
            lines[name] = f"cannot be read: {first_line(error)}; `lerobot-attn verify` says what is damaged"
    return lines
