"""Episodes' datasets with neurons in them, as stores hold them, of noise and of what a test plants."""

from __future__ import annotations

import numpy as np
import xarray as xr

GROUPS = ("observation.images.image", "task")
LAYERS = (1, 3)
N_UNITS = 10
SIZES = (len(GROUPS), 2, len(LAYERS), N_UNITS)  # of an inference: group, reduction, layer, unit


def noise(rng, n_inferences=16, sizes=SIZES, *, walks=False):
    """(inference, group, reduction, layer, unit): noise, or random walks."""
    values = rng.standard_normal((n_inferences, *sizes)).astype(np.float32)
    return np.cumsum(values, axis=0) / 5 if walks else values


def episode(values, *, expert=None, residual=None, height=None, attrs=None):
    """The dataset of an episode; `height` is `eef_z` at each inference, which comes every third frame."""
    n = len(values)
    arrays = {
        "vlm_neurons": (
            ("inference", "vlm_group", "reduction", "vlm_neuron_layer", "vlm_unit"),
            values.astype(np.float16),
        ),
        "inference_frame": (("inference",), 3 * np.arange(n)),
        "reward": (("frame",), np.zeros(3 * n)),
    }
    coords = {
        "vlm_group": list(GROUPS),
        "reduction": ["mean", "max"],
        "vlm_neuron_layer": list(LAYERS),
    }
    if expert is not None:
        dims = ("inference", "denoise_step", "expert_group", "reduction", "expert_neuron_layer")
        arrays["expert_neurons"] = ((*dims, "expert_unit"), expert.astype(np.float16))
        coords |= {"denoise_step": [0, 4, 9], "expert_group": ["actions"], "expert_neuron_layer": [2]}
    if residual is not None:
        dims = ("inference", "vlm_group", "reduction", "vlm_residual_layer", "vlm_feature")
        arrays["vlm_residual"] = (dims, residual.astype(np.float16))
        coords["vlm_residual_layer"] = list(LAYERS)
    if height is not None:
        state = np.stack([np.zeros(3 * n), np.repeat(height, 3)], axis=1)
        arrays["state"] = (("frame", "state_dim"), state)
        coords["state_dim"] = ["eef_x", "eef_z"]
    return xr.Dataset(arrays, coords, {"task": "lift it", **(attrs or {})})
