"""Neurons and residuals of an episode's inferences, as rows of its store.

The first inference says which arrays and which groups of tokens there are. Knows records and the schema;
knows neither a policy nor a file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.capture import InferenceRecord
from lerobot_attn.capture.activations import REDUCTIONS
from lerobot_attn.errors import CaptureError
from lerobot_attn.policies.base import Stream
from lerobot_attn.store.schema import activation_dims, coordinates_of_activations

logger = logging.getLogger(__name__)


class ActivationRows:
    """Rows of one episode.

    Args:
        first: its first inference.

    Attributes:
        arrays: names of the arrays that every inference of the episode has.
        sizes: dimension → size.
        coordinates: fixed array → values.
        n_beyond: array → how many of its values so far lie beyond float16's range, and so are infinite.
    """

    def __init__(self, first: InferenceRecord):
        choices = first.selection.activations
        self._groups: Mapping[Stream, tuple[str, ...]] = {
            stream: names
            for stream, names in first.activation_groups.items()
            if any(choice.stream == stream for choice in choices)
        }
        self.arrays = set(first.activations)
        self.n_beyond: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        for choice in choices:
            groups, layers, units = activation_dims(choice.name)
            self.sizes |= {groups: len(self._groups[choice.stream]), layers: len(choice.layers)}
            self.sizes |= {units: choice.n_units, "reduction": len(REDUCTIONS)}
        by_array = {choice.name: choice.layers for choice in choices}
        self.coordinates: dict[str, NDArray[Any]] = (
            coordinates_of_activations(self._groups, by_array, REDUCTIONS) if choices else {}
        )

    def rows(self, record: InferenceRecord, env: int) -> dict[str, NDArray[Any]]:
        """Return array → an inference's row of one environment; NaN of a group that it has no tokens of.

        Raises:
            CaptureError: it has tokens of a group that the first inference had none of.
        """
        found = {}
        for name, values in record.activations.items():
            row = values[env]
            stream: Stream = "vlm" if name.startswith("vlm") else "expert"
            if not name.endswith("_full"):
                row = self._in_order(row, record.activation_groups[stream], self._groups[stream])
            self._count(name, row)
            found[name] = row
        return found

    def _in_order(
        self, row: NDArray[Any], theirs: tuple[str, ...], ours: tuple[str, ...]
    ) -> NDArray[np.float16]:
        """Return a row, (…, group, reduction, layer, unit), with the first inference's groups."""
        if theirs == ours:
            return row
        by_name = {group: row[..., number, :, :, :] for number, group in enumerate(theirs)}
        new = [group for group, values in by_name.items() if group not in ours and not np.isnan(values).all()]
        if new:
            raise CaptureError(
                f"activations: the prompt has tokens of {new[0]}, which the episode's first had none of, "
                f"expected {', '.join(ours)}; record the episode with one kind of prompt"
            )
        none = np.full(row[..., 0, :, :, :].shape, np.nan, np.float16)
        return np.stack([by_name.get(group, none) for group in ours], axis=-4)

    def _count(self, name: str, row: NDArray[np.float16]) -> None:
        n_beyond = int(np.isinf(row).sum())
        if not n_beyond:
            return
        if name not in self.n_beyond:
            logger.warning(
                "%s: %d of an inference's %d values lie beyond float16's range of 65504; they are stored as "
                "infinite",
                name,
                n_beyond,
                row.size,
            )
        self.n_beyond[name] = self.n_beyond.get(name, 0) + n_beyond
