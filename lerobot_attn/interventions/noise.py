"""Noise that depends on what is asked alone, so that two runs differ in nothing but what was done to one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def fixed_noise(shape: tuple[int, int], seed: int, episode: int, number: int) -> Tensor:
    """Return the noise that one inference starts from: (chunk, action) float32.

    It depends on its arguments alone: neither on the batch, nor on the other episodes, nor on what was drawn
    before.

    Args:
        shape: (chunk, action) that the policy denoises; its description's `noise_shape`.
        seed: of the run.
        episode: number of the episode.
        number: of the inference in its episode; in a replay, of the frame that the policy is asked about.
    """
    import torch

    generator = torch.Generator().manual_seed(seed_of(seed, episode, number))
    return torch.randn(shape, generator=generator)


def seed_of(seed: int, episode: int, number: int) -> int:
    """Return the seed of one inference; arguments as of `fixed_noise`."""
    state = np.random.SeedSequence([seed, episode, number]).generate_state(1, np.uint64)
    return int(state[0]) >> 1
