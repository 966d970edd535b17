"""Copies of device tensors on their way to host memory. Knows nothing of what they hold."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class HostCopies:
    """Copies on their way to the host; one event tells when all of them are there.

    On CUDA the copies go to pinned memory on the current stream, and nobody waits until a value is read. On
    every other accelerator each copy is waited for, because only CUDA's events tell here when it has arrived.
    No copy carries a graph, also where the policy computes gradients (RTC's guidance does).
    """

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._on_cuda = False

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised host tensor that copies from `device` can reach asynchronously."""
        asynchronous = _has_events(device)
        self._on_cuda |= asynchronous
        return torch.empty(shape, dtype=dtype, pin_memory=asynchronous)

    def copy(self, source: Tensor) -> Tensor:
        """Start copying a tensor; it may change afterwards."""
        target = self.allocate(tuple(source.shape), source.dtype, source.device)
        return self.copy_into(target, source)

    def copy_into(self, target: Tensor, source: Tensor) -> Tensor:
        """Start copying into a part of an allocated tensor, converted to its dtype before it travels."""
        source = source.detach()
        if target.dtype == torch.uint8 and source.device.type == "cpu" and source.dtype == target.dtype:
            # Pictures come at each frame: see `policies.flow.as_uint8`.
            np.copyto(target.numpy(), source.numpy())
            return target
        if source.device.type != "cpu":
            source = source.to(target.dtype)
        return target.copy_(source, non_blocking=_has_events(source.device))

    def seal(self) -> None:
        """Mark the end of the copies."""
        if self._on_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Block until every copy has arrived."""
        if self._event is not None:
            self._event.synchronize()


def least_precise(dtypes: Iterable[torch.dtype]) -> str | None:
    """Return the least precise of some dtypes of numbers, e.g. "bfloat16"; None of none."""
    found = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)
    return None if found is None else str(found).removeprefix("torch.")


def _has_events(device: torch.device) -> bool:
    """Whether copies from the device may be left unfinished, because an event tells when they are done."""
    return device.type == "cuda"
