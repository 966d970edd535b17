"""Several probes as one: what acts comes first, so that what watches sees what acted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lerobot_attn.policies.base import InferenceInputs, Probe, Site
from lerobot_attn.policies.taps import replacement

if TYPE_CHECKING:
    from torch import Tensor


class ProbeChain:
    """Hands each value from probe to probe, in their order; each gets what the one before it made of it.

    Args:
        probes: each with the sites that it wants, in the order in which they act.
    """

    def __init__(self, probes: Sequence[tuple[Probe, Iterable[Site]]]):
        self._probes = [probe for probe, _ in probes]
        self._wanting: dict[Site, list[Probe]] = {}
        self._seeing_images: list[Probe] = []
        for probe, sites in probes:
            wanted = list(sites)
            for site in wanted:
                self._wanting.setdefault(site, []).append(probe)
            if any(site.stream == "vision" for site in wanted):
                self._seeing_images.append(probe)
        self.edits = any(probe.edits for probe in self._probes)

    @property
    def sites(self) -> list[Site]:
        """Every site that one of the probes wants."""
        return list(self._wanting)

    def begin(self, inputs: InferenceInputs) -> None:
        """Tell every probe."""
        for probe in self._probes:
            probe.begin(inputs)

    def refuse(self, error: Exception) -> None:
        """Tell every probe."""
        for probe in self._probes:
            probe.refuse(error)

    def camera(self, name: str) -> None:
        """Tell every probe that wants sites of the vision tower."""
        for probe in self._seeing_images:
            probe.camera(name)

    def denoise_step(self, flow_time: Tensor | float) -> None:
        """Tell every probe."""
        for probe in self._probes:
            probe.denoise_step(flow_time)

    def at(self, site: Site, value: Tensor) -> Tensor | None:
        """Return what the probes made of the value, or None if none of them changed it.

        Raises:
            CaptureError: a replacement does not fit.
        """
        current = value
        for probe in self._wanting.get(site, ()):
            current = replacement(site, current, probe.at(site, current))
        return None if current is value else current

    def end(self, action_chunk: Tensor) -> None:
        """Tell every probe."""
        for probe in self._probes:
            probe.end(action_chunk)

    def abandon(self) -> None:
        """Tell every probe."""
        for probe in self._probes:
            probe.abandon()

    def fail(self, error: Exception) -> None:
        """Tell every probe."""
        for probe in self._probes:
            probe.fail(error)
