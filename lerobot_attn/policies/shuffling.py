"""A policy that has learned nothing, of the same sizes and scale: its weights shuffled for a while.

    with shuffled_weights(policy, seed=1):
        …                 # the same architecture, each matrix with its rows and columns in another order

The sanity check of Adebayo et al. 2018 ("Sanity Checks for Saliency Maps"): what a map says with weights that
mean nothing says nothing of what was learned. Weights that are put in another order keep their norms and each
matrix its singular values, so activations stay as large as the policy's numbers can hold; drawing them anew
would need each family's own rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lerobot_attn.errors import ConfigError


@contextmanager
def shuffled_weights(policy: nn.Module, seed: int) -> Iterator[None]:
    """Put every weight of a policy in another order along each of its axes, and afterwards back.

    No copy of the policy is made: one weight at a time is held twice. Buffers, and weights that are quantised
    to whole numbers, stay.

    Args:
        policy: whose weights are shuffled in place.
        seed: of the order.

    Raises:
        ConfigError: none of its weights is of floating point.
    """
    weights = [weight for weight in policy.parameters() if weight.is_floating_point() and weight.ndim]
    if not weights:
        raise ConfigError("shuffled weights: the policy has none of floating point, expected some")
    orders: list[list[Tensor]] = []
    try:
        for number, weight in enumerate(weights):
            rng = np.random.default_rng([seed, number])
            order = [torch.from_numpy(rng.permutation(length)) for length in weight.shape]
            _reorder(weight, order)
            orders.append(order)
        yield
    finally:
        for weight, order in zip(weights, orders, strict=False):
            _reorder(weight, [torch.argsort(places) for places in order])


@torch.no_grad()
def _reorder(weight: Tensor, order: Sequence[Tensor]) -> None:
    moved = weight.detach()
    for axis, places in enumerate(order):
        moved = moved.index_select(axis, places.to(weight.device))
    weight.data.copy_(moved)
