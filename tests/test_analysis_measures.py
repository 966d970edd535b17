"""Sharpness and stability of distributions whose values are known."""

import numpy as np
import pytest
import xarray as xr

from lerobot_attn.analysis import attention_entropy, stability
from lerobot_attn.errors import SelectionError


def labelled(values, *dims, **coords):
    return xr.DataArray(np.asarray(values, np.float32), coords, dims)


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        ([0, 1, 0, 0], 0),
        ([1, 1, 1, 1], 2),
        ([0.5, 0, 0, 0.5], 1),
        ([3, 0, 3, 0], 1),  # values are divided by their sum
        ([0.5, 0.25, 0.125, 0.125], 1.75),
        ([0.9, 0.1, 0, 0], 0.9 * np.log2(1 / 0.9) + 0.1 * np.log2(10)),
        ([1e-30, 1e-30, 0, 0], 1),
        ([0, 0, 0, 0], np.nan),
    ],
    ids=str,
)
@pytest.mark.parametrize("dask", [False, True])
def test_sharpness_of_known_distributions(values, bits, dask):
    array = labelled(values, "key")
    found = attention_entropy(array.chunk() if dask else array).compute()
    np.testing.assert_allclose(found.entropy, bits, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.effective_number, 2**bits, rtol=1e-5)
    assert not np.signbit(found.entropy)
    assert found.entropy.attrs["units"] == "bit"


@pytest.mark.parametrize(
    "dims",
    [("grid_y", "grid_x"), ("key",), ("token",), ("action_key",), ("modality",)],
)
def test_the_usual_distribution_is_found(dims):
    sizes = {"frame": 3, "grid_y": 2, "grid_x": 4}
    shape = [sizes.get(dim, 8) for dim in ("frame", *dims)]
    values = np.zeros(shape)
    values[0] = 1
    values[1].flat[3] = 0.7
    found = attention_entropy(labelled(values, "frame", *dims, frame=[5, 6, 9]))
    np.testing.assert_allclose(found.effective_number, [8, 1, np.nan])
    assert found.entropy.dims == ("frame",)
    assert found.frame.values.tolist() == [5, 6, 9]


def test_other_dimensions_on_request():
    values = labelled([[1, 0], [1, 1]], "head", "key")
    np.testing.assert_allclose(attention_entropy(values, ["head"]).effective_number, [2, 1])
    np.testing.assert_allclose(attention_entropy(values, ["head", "key"]).effective_number, 3, rtol=1e-6)


MAPS = [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 2, 2], [1, 1, 2], [0, 0, 0], [1, 0, 0]]
OVERLAPS = [1, 0, 0.5, 0.75, np.nan, np.nan]


@pytest.mark.parametrize("along", ["denoise_step", "inference", "frame"])
@pytest.mark.parametrize("dask", [False, True])
def test_stability_by_hand(along, dask):
    labels = [0, 2, 4, 5, 6, 8, 9]
    array = labelled(MAPS, along, "key", **{along: labels})
    array = array.assign_coords(flow_time=(along, np.linspace(1, 0.1, 7)))
    found = stability(array.chunk({along: 1}) if dask else array, along).compute()
    np.testing.assert_allclose(found, OVERLAPS)
    # The later of the two maps gives the labels, those of other coordinates too.
    assert found[along].values.tolist() == labels[1:]
    np.testing.assert_allclose(found.flow_time, np.linspace(1, 0.1, 7)[1:])
    assert found.attrs["long_name"] == f"overlap with the previous {along.replace('_', ' ')}"


def test_stability_without_labels_and_with_repeated_ones():
    np.testing.assert_allclose(stability(labelled(MAPS, "frame", "key"), "frame"), OVERLAPS)
    again = labelled(MAPS, "frame", "key", frame=[3, 3, 3, 1, 1, 0, 0])
    found = stability(again, "frame")
    np.testing.assert_allclose(found, OVERLAPS)
    assert found.frame.values.tolist() == [3, 3, 1, 1, 0, 0]


def test_stability_of_heatmaps_keeps_the_other_dimensions():
    maps = np.zeros((2, 3, 2, 2))
    maps[0, :, 0, 0] = 1  # head 0 stays
    maps[1, 0, 0, 0] = maps[1, 1, 1, 1] = maps[1, 2, 1, 1] = 0.2  # head 1 moves once
    found = stability(labelled(maps, "head", "frame", "grid_y", "grid_x"), "frame")
    assert found.dims == ("head", "frame")
    np.testing.assert_allclose(found, [[1, 1], [0, 1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a: attention_entropy(a.rename(key="other")),
            "no distribution among the dimensions frame, other",
        ),
        (lambda a: attention_entropy(a, ["grid_x"]), "dimension 'grid_x' is not among frame, key"),
        (lambda a: stability(a, "denoise_step"), "along 'denoise_step': the maps have frame, key; keep it"),
        (lambda a: stability(a[:1], "frame"), "along 'frame' needs two maps at least, got 1"),
        (lambda a: stability(a[:0], "frame"), "along 'frame' needs two maps at least, got 0"),
        (lambda a: stability(a, "frame", ["head"]), "dimension 'head' is not among frame, key"),
    ],
)
def test_errors(call, message):
    with pytest.raises(SelectionError, match=message):
        call(labelled(MAPS, "frame", "key"))
