"""The maps of all layers up to one, read one at a time, for what follows attention through the layers.

In each denoise step, layer l of the action expert attends to its own tokens and to the keys and values that
layer l of the language model made of its *input*. Knows no rollout and no flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.decoded import decodes, is_read
from lerobot_attn.analysis.labels import (
    from_end,
    in_words,
    integers,
    picked,
    policy_count,
    policy_of,
    ranges,
    stored_labels,
)
from lerobot_attn.analysis.select import (
    PREFIX,
    RAW,
    HeadChoice,
    LayerChoice,
    absent_in_words,
    layout_of,
    prefix_only_layers,
    stored_layers,
)
from lerobot_attn.errors import SelectionError, StoreError

_HOW_ALL = "record with --eval.attention.layers=all --eval.attention.prefix_layers=all"
_BOTH = f"{RAW} and {PREFIX}"

_Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LayerStack:
    """The maps of all layers up to one, read one at a time; their rows rescaled to sum to 1."""

    dataset: xr.Dataset
    top: int
    denoise_step: LayerChoice
    steps: list[int]
    head: HeadChoice
    heads: list[int]

    @classmethod
    def of(
        cls, dataset: xr.Dataset, what: str, layer: int | None, denoise_step: LayerChoice, head: HeadChoice
    ) -> LayerStack:
        """Check that everything needed was saved.

        Raises:
            SelectionError: it was not, or the policy's two towers do not go layer by layer.
        """
        policy = policy_of(dataset)
        full = stored_layers(dataset)[0]
        in_prefix = dataset["prefix_layer"].values.tolist() if PREFIX in dataset else []
        if not full:
            raise SelectionError(f"{what} needs full maps, and none were saved; {_HOW_ALL}")
        n_layers = int(policy.get("n_layers") or full[-1] + 1)
        layer = full[-1] if layer is None else layer
        top = None if isinstance(layer, str) else from_end("layer", layer, n_layers)
        if not isinstance(top, int) or not 0 <= top < n_layers:
            raise SelectionError(
                f"layer {layer!r}: {what} is of one layer's output, expected one of 0 to {n_layers - 1}"
            )
        if policy.get("reads_last_prefix_layer"):
            raise SelectionError(
                f"{what} needs an expert whose layer l reads layer l of the language model, but all layers "
                f"of {policy.get('type')} come after the last prefix layer"
            )
        if int(policy.get("n_prefix_layers") or n_layers) != n_layers:
            raise SelectionError(
                f"{what} needs an expert whose layer l reads layer l of the language model, but the policy's "
                f"have {n_layers} and {policy['n_prefix_layers']} layers"
            )
        if "layer_sees_suffix" in dataset.coords and not dataset["layer_sees_suffix"].values.any():
            raise SelectionError(
                f"{what} needs what the suffix's tokens attend to among themselves, which is not recorded of "
                f"{policy.get('type')}: none of the stored layers sees the suffix"
            )
        lacking = {
            "full maps": [value for value in range(top + 1) if value not in full],
            "prefix maps": [value for value in range(top) if value not in in_prefix],
        }
        missing = [f"{name} of layer {ranges(values)}" for name, values in lacking.items() if values]
        if missing:
            raise SelectionError(
                f"{what} to layer {top} needs all layers below; not saved are {' and '.join(missing)}; "
                f"{_HOW_ALL}"
            )
        layout = layout_of(dataset)
        for dim, expected in (("query", layout.n_queries), ("key", layout.n_keys)):
            if dataset.sizes[dim] != expected:
                raise StoreError(
                    f"the dataset's {dim} has {dataset.sizes[dim]} tokens, expected the layout's {expected}"
                )
        steps = stored_labels(dataset, "denoise_step", denoise_step, "n_denoise_steps")
        heads = stored_labels(dataset, "head", head, "n_heads", ("all", "mean", "max"))
        return cls(
            dataset, top, denoise_step, np.atleast_1d(steps).tolist(), head, np.atleast_1d(heads).tolist()
        )

    @property
    def fuses(self) -> bool:
        """Whether heads are reduced to one map before anything else."""
        return self.head in ("mean", "max") if isinstance(self.head, str) else False

    @property
    def n_heads(self) -> int:
        """Maps of a layer: one where heads are reduced, else one a head."""
        return 1 if self.fuses else len(self.heads)

    @property
    def n_keys(self) -> int:
        """Prefix and suffix tokens."""
        return int(self.dataset.sizes["key"])

    @property
    def n_prefix(self) -> int:
        """Prefix tokens."""
        return layout_of(self.dataset).prefix_len

    def suffix(self, inference: int, layer: int) -> _Floats:
        """Return (denoise_step, head, query, key) float32; 0 where the layer cannot see the key."""
        maps = self.dataset[RAW].isel(inference=inference).sel(layer=layer)
        if decodes(self.dataset):  # a token that was not read attends to nothing, and nothing to it
            maps = maps.where(xr.DataArray(is_read(self.dataset, inference), dims="query"), 0)
        is_blind = layer in prefix_only_layers(self.dataset)
        return np.stack([self._fused(maps.sel(denoise_step=step), is_blind) for step in self.steps])

    def prefix(self, inference: int, layer: int) -> _Floats:
        """Return (head, prefix_query, prefix_key) float32; rows of padding are 0."""
        return self._fused(self.dataset[PREFIX].isel(inference=inference).sel(prefix_layer=layer))

    def _fused(self, array: xr.DataArray, is_blind: bool = False) -> _Floats:
        values = picked(array.load(), "head", self.heads).values.astype(np.float32)
        if is_blind:
            # Nothing comes from keys that the layer cannot see; in a missing map these stay NaN as well.
            values[..., self.n_prefix :] = values[..., :1] * 0
        if self.fuses:
            fused = np.mean if self.head == "mean" else np.max
            values = fused(values, axis=0, keepdims=True)
        total = values.sum(axis=-1, keepdims=True)
        rescaled: _Floats = values / np.where(total > 0, total, 1)
        return rescaled

    def coordinates(self) -> dict[str, Any]:
        """Return the coordinates of denoise_step and head."""
        coords: dict[str, Any] = {"denoise_step": self.steps}
        if "flow_time" in self.dataset.coords:
            times = self.dataset["flow_time"].sel(denoise_step=self.steps).values
            coords["flow_time"] = ("denoise_step", times)
        return coords if self.fuses else coords | {"head": self.heads}

    def drop(self, array: xr.DataArray) -> xr.DataArray:
        """Drop and reduce denoise_step and head as they were chosen."""
        if self.fuses or _is_one(self.head):
            array = array.isel(head=0)
        if isinstance(self.denoise_step, str):
            return array.mean("denoise_step", skipna=False) if self.denoise_step == "mean" else array
        return array.isel(denoise_step=0) if _is_one(self.denoise_step) else array

    def attributes(self) -> dict[str, Any]:
        """Return in words what was chosen."""
        blind = [layer for layer in prefix_only_layers(self.dataset) if layer <= self.top]
        return {
            **({"absent_keys": absent_in_words(blind)} if blind else {}),
            "units": "share of attention",
            "source": _BOTH if self.top else RAW,
            "layer": in_words("layer", list(range(self.top + 1)), list(range(self.top + 1))),
            "denoise_step": in_words("denoise step", self.denoise_step, self.steps),
            "head": in_words("head", self.head, self.heads, policy_count(self.dataset, "n_heads")),
        }


def _is_one(choice: Any) -> bool:
    return choice is None or (
        not isinstance(choice, str) and isinstance(integers("choice", choice, "a word"), int)
    )
