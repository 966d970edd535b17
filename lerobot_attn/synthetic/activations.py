"""Neurons and residuals that are known: one unit follows the episode's frames, the others are noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.store.schema import activation_dims, coordinates_of_activations
from lerobot_attn.synthetic.plan import SyntheticPlan
from lerobot_attn.synthetic.prompts import Prompt, key_kinds

_REDUCTIONS = ("mean", "max")


def planted_unit(plan: SyntheticPlan, name: str, layer: int) -> int:
    """Return the unit of a layer that rises from 1 at the episode's first inference to 3 at its last.

    Args:
        plan: the episode's.
        name: the array, e.g. "vlm_neurons".
        layer: of those that are stored.
    """
    return (layer + 1) % _n_units(plan, name)


def planted_activations(plan: SyntheticPlan, name: str, inference: int) -> NDArray[np.float32]:
    """Return every token's activations, (denoise_step, token, layer, unit); one step of the language model.

    They are normal noise of standard deviation 0.1, but for the `planted_unit` of each layer. Units of one
    layer, step or token differ from those of another.

    Args:
        plan: the episode's.
        name: the array, e.g. "vlm_neurons".
        inference: its number.
    """
    stream, layers = _chosen(plan)[name]
    n_steps = plan.n_denoise_steps if stream == "expert" else 1
    n_tokens = plan.n_queries if stream == "expert" else plan.layout.prefix_len
    rng = np.random.default_rng([plan.seed, inference, sorted(_chosen(plan)).index(name)])
    shape = (n_steps, n_tokens, len(layers), _n_units(plan, name))
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
    for number, layer in enumerate(layers):
        rise = 1 + 2 * inference / max(1, plan.n_inferences - 1)
        values[..., number, planted_unit(plan, name, layer)] += np.float32(rise)
    return values


def activation_rows(plan: SyntheticPlan, inference: int, prompt: Prompt) -> dict[str, NDArray[np.float16]]:
    """Return array → an inference's row."""
    rows: dict[str, NDArray[np.float16]] = {}
    kinds = key_kinds(plan, prompt)
    groups = plan.layout.prefix_groups(kinds)
    for name, (stream, _) in _chosen(plan).items():
        values = planted_activations(plan, name, inference)
        tokens: list[Any] = list(plan.layout.suffix_groups(plan.executed_queries).values())
        if stream == "vlm":
            tokens = [
                groups.get(group, np.zeros(plan.layout.prefix_len, bool)) for group in _groups(plan)[stream]
            ]
        reduced = np.full((len(values), len(tokens), 2, *values.shape[2:]), np.nan, np.float32)
        for number, chosen in enumerate(tokens):
            if values[:, chosen].shape[1]:
                reduced[:, number, 0] = values[:, chosen].mean(axis=1)
                reduced[:, number, 1] = values[:, chosen].max(axis=1)
        if stream == "vlm":
            values[:, kinds[: plan.layout.prefix_len] == 0] = np.nan  # padding
        for array, found in ((name, reduced), (f"{name}_full", values.swapaxes(1, 2))):
            if array == name or plan.record_full:
                rows[array] = (found[0] if stream == "vlm" else found).astype(np.float16)
    return rows


def activation_sizes(plan: SyntheticPlan) -> dict[str, int]:
    """Return dimension → size."""
    sizes = {"reduction": len(_REDUCTIONS)}
    for name, (stream, layers) in _chosen(plan).items():
        wanted = (len(_groups(plan)[stream]), len(layers), _n_units(plan, name))
        sizes |= dict(zip(activation_dims(name), wanted, strict=True))
    return sizes


def activation_coordinates(plan: SyntheticPlan) -> dict[str, NDArray[Any]]:
    """Return fixed array → values; none of an episode without neurons and residuals."""
    chosen = _chosen(plan)
    if not chosen:
        return {}
    streams = {stream for stream, _ in chosen.values()}
    groups = {stream: names for stream, names in _groups(plan).items() if stream in streams}
    return coordinates_of_activations(
        groups, {name: layers for name, (_, layers) in chosen.items()}, _REDUCTIONS
    )


def activation_arrays(plan: SyntheticPlan) -> set[str]:
    """Return the names of the arrays that the episode has."""
    return {name + end for name in _chosen(plan) for end in ("", "_full")[: 1 + plan.record_full]}


def _chosen(plan: SyntheticPlan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return array → its stream and layers."""
    return {
        f"{stream}_{what}": (stream, layers)
        for what, of_stream in (("neurons", plan.neurons), ("residual", plan.residuals))
        for stream, layers in of_stream.items()
    }


def _groups(plan: SyntheticPlan) -> dict[str, tuple[str, ...]]:
    cameras = list(plan.image_px)[: len(plan.image_px) - plan.n_suffix_cameras]
    has_state = (plan.state_in_prompt and not plan.cut_prompt) or plan.n_prefix_state
    others = ["task", *(["state"] if has_state else []), "template"]
    others += ["special"] if any(plan.image_special) else []
    return {"vlm": (*cameras, *others), "expert": tuple(plan.layout.suffix_groups(plan.executed_queries))}


def _n_units(plan: SyntheticPlan, name: str) -> int:
    return plan.n_units if name.endswith("neurons") else plan.n_units - 2
