"""A policy that is asked about recorded frames: each question's own noise, nobody's random numbers disturbed.

Knows the policy by what it is asked and answers. Knows no footage and no store, and not why it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lerobot_attn.interventions.noise import fixed_noise, seed_of
from lerobot_attn.policies import unwrap
from lerobot_attn.policies.base import PolicyDescription
from lerobot_attn.recording.replay_inputs import collated


class Moment(NamedTuple):
    """A frame of an episode, by their numbers; noise depends on both."""

    episode: int
    frame: int


def noise_of(shape: tuple[int, int], seed: int, moments: Sequence[Moment]) -> Tensor:
    """Return (moment, *shape) float32: the noise that each moment's question starts from."""
    return torch.stack([fixed_noise(shape, seed, *moment) for moment in moments])


class AskedPolicy:
    """Asks a policy about batches of frames.

    Args:
        policy: a LeRobot policy, PEFT-wrapped or not.
        preprocessor: the policy's; None: it gets the observations as they are.
        described: the policy's description.

    Attributes:
        draws_itself: whether it takes no noise and draws its own, for a whole batch: it is then to be asked
            about one frame at a time.
        noise_shape: (token, dimension) of the noise that it takes; None where it takes none.
    """

    def __init__(self, policy: Any, preprocessor: Any, described: PolicyDescription):
        self._policy, self._preprocessor = policy, preprocessor
        self.draws_itself = described.draws_own_noise
        self.noise_shape = described.noise_shape
        config = unwrap(policy).config
        self._amp = bool(getattr(config, "use_amp", False))
        self._device = torch.device(getattr(config, "device", None) or "cpu")

    def batch(self, frames: Sequence[Mapping[str, Tensor]], tasks: Sequence[str]) -> Any:
        """Return frames as the policy gets them, each with its instruction."""
        batch = collated(frames, tasks)
        return batch if self._preprocessor is None else self._preprocessor(batch)

    @torch.inference_mode()
    def chunk(self, batch: Any, seed: int | None, moments: Sequence[Moment]) -> Tensor:
        """Return the predicted chunks, (batch, action, dimension).

        Args:
            batch: as `batch` returns it.
            seed: of the noise; None: nothing is fixed.
            moments: whose noise each row starts from. A policy that draws its own draws the first one's.
        """
        more = {}
        if self.noise_shape is not None and seed is not None:
            more["noise"] = noise_of(self.noise_shape, seed, moments).to(self._device)
        with (
            self._own_draws(seed, moments[0]),
            torch.autocast(self._device.type) if self._amp else nullcontext(),  # as lerobot-eval does
        ):
            chunk: Tensor = self._policy.predict_action_chunk(batch, **more)
        return chunk

    @contextmanager
    def _own_draws(self, seed: int | None, moment: Moment) -> Iterator[None]:
        """Let a policy that draws its noise itself draw a moment's, and nobody else notice."""
        if not self.draws_itself or seed is None:
            yield
            return
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed_of(seed, *moment))
            yield
