"""Synthetic episodes whose stores hold activations of neurons, for tests of what reads them."""

import json
from pathlib import Path

import numpy as np
import xarray as xr
import zarr

from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

CAMERA = "observation.images.image"
GROUPS = {"vlm": [CAMERA, "task", "state"], "expert": ["actions"]}
LAYERS = {"vlm": [0, 2, 3], "expert": [1, 3]}
N_UNITS = {"vlm": 12, "expert": 8}
RAISED = {"vlm": (2, 5), "expert": (3, 6)}  # layer and unit that follow the hand's height
WITHOUT = (1, "state")  # inference and group of the vlm: no such tokens, so NaN


def write_neurons(
    folder: Path,
    plan: SyntheticPlan,
    *,
    fired: tuple[str, dict[str, dict[int, list[int]]]] | None = None,
    lift: float = 1.0,
) -> Path:
    """Write an episode with neurons and its hand's height; return its path.

    Args:
        folder: the run's.
        plan: of all else.
        fired: name of its condition, and stream → layer → units that it fires.
        lift: how high the hand rises.
    """
    path = write_planted_episode(folder, plan)
    height = 0.8 + 0.3 * lift * np.sin(np.pi * np.arange(plan.n_frames) / plan.n_frames) ** 2
    zarr.open_array(path / "state_dim", mode="r+")[2] = "eef_z"
    zarr.open_array(path / "state", mode="r+")[:, 2] = height.astype(np.float32)
    arrays, coordinates, encoding = {}, {"reduction": np.array(["mean", "max"], object)}, {}
    for stream, groups in GROUPS.items():
        values = _activations(stream, plan, height[:: plan.n_executed])
        dims = ["inference", *(["denoise_step"] if stream == "expert" else []), f"{stream}_group"]
        dims += ["reduction", f"{stream}_neuron_layer", f"{stream}_unit"]
        arrays[f"{stream}_neurons"] = (dims, values.astype(np.float16))
        encoding[f"{stream}_neurons"] = {"chunks": (*[1] * (values.ndim - 2), *values.shape[-2:])}
        coordinates[f"{stream}_group"] = np.array(groups, object)
        coordinates[f"{stream}_neuron_layer"] = np.array(LAYERS[stream], np.int32)
    document = json.loads((path / "zarr.json").read_text())
    xr.Dataset(arrays, coordinates).to_zarr(
        path, mode="a", zarr_format=3, consolidated=False, encoding=encoding
    )
    for name in [*arrays, *coordinates]:
        array = json.loads((path / name / "zarr.json").read_text())
        document["consolidated_metadata"]["metadata"][name] = array
    if fired is not None:
        name, units = fired
        done = [
            {"kind": "neurons", "stream": stream, "units": of_stream, "how": "add", "value": 4.0}
            for stream, of_stream in units.items()
        ]
        said = {"name": name, "text": f"{name}: fires neurons", "interventions": done}
        document["attributes"]["condition"] = said
    (path / "zarr.json").write_text(json.dumps(document))
    return path


def _activations(stream: str, plan: SyntheticPlan, height: np.ndarray) -> np.ndarray:
    """Return noise in which one unit follows the height, and the maximum over tokens lies above the mean."""
    steps = [plan.n_denoise_steps] if stream == "expert" else []
    sizes = [len(GROUPS[stream]), 2, len(LAYERS[stream]), N_UNITS[stream]]
    values = np.random.default_rng(plan.episode_index).normal(0.1, 0.2, (len(height), *steps, *sizes))
    layer, unit = RAISED[stream]
    raised = values[..., LAYERS[stream].index(layer), unit]
    raised += 4 * (height - 0.8).reshape(-1, *[1] * (raised.ndim - 1))
    values[..., 1, :, :] += 1
    if stream == "vlm":
        inference, group = WITHOUT
        values[inference : inference + 1, GROUPS["vlm"].index(group)] = np.nan
    return values
