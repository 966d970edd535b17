"""Selections of an episode written elsewhere with xarray's own means, and read back for the same analysis."""

import operator

import numpy as np
import pytest
import xarray as xr

from lerobot_attn import analysis
from lerobot_attn.store.reader import open_episode
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

# xarray warns that Zarr's consolidated metadata is no standard yet.
pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata")
SELECTIONS = {
    "everything": lambda data: data,
    "two inferences": lambda data: data.isel(inference=slice(1, 3)),
    "a list": lambda data: data.isel(inference=[2, 0], frame=slice(3, 9)),
    "every other one": lambda data: data.isel(inference=slice(None, None, 2)),
    "labels": lambda data: data.sel(denoise_step=data.denoise_step.values[-1:], head=data["head"].values[:1]),
    "computed on": lambda data: data.assign(suffix_attention=data.suffix_attention.astype("float32") * 2),
    "cut anew": lambda data: data.chunk(inference=2),
}


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    plan = SyntheticPlan(n_frames=24)
    repaired = [{"array": "suffix_attention", "chunk": [9]}]
    return open_episode(
        write_planted_episode(tmp_path_factory.mktemp("run"), plan, seed=None, repaired=repaired)
    )


def written(data, folder, how):
    target = folder / f"part.{how}"
    if how == "zarr":
        data.to_zarr(target)
        return xr.open_zarr(target)
    data.to_netcdf(target)
    return xr.open_dataset(target)


@pytest.mark.parametrize("how", ["zarr", "nc"])
@pytest.mark.parametrize("kind", ["dataset", "arrays"])
@pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_a_selection_comes_back(episode, tmp_path, select, kind, how):
    part = select(getattr(episode, kind))
    back = written(part, tmp_path, how)
    assert set(back.variables) == set(part.variables)
    for name, variable in part.variables.items():
        assert back[name].dims == variable.dims
        np.testing.assert_array_equal(back[name].values, variable.values)
    assert back.attrs.keys() == part.attrs.keys()


@pytest.mark.parametrize("how", ["zarr", "nc"])
@pytest.mark.parametrize(
    "analyse",
    [
        lambda data: analysis.modality_share(data, inference=0),
        lambda data: analysis.image_heatmap(data, "observation.images.image", inference=0),
        lambda data: analysis.token_attention(data, inference=0),
        lambda data: analysis.attention(data, inference=0, layer=-1, denoise_step=-1),
    ],
)
def test_what_is_read_back_is_analysed_as_the_episode_is(episode, tmp_path, analyse, how):
    back = written(episode.dataset, tmp_path, how)
    xr.testing.assert_allclose(analyse(back), analyse(episode.dataset))


@pytest.mark.parametrize("how", ["zarr", "nc"])
def test_whether_it_was_solved_comes_back_as_a_truth(tmp_path, how):
    for solved in (True, False, None):
        folder = tmp_path / str(solved)
        episode = open_episode(write_planted_episode(folder, SyntheticPlan(n_frames=6), success=solved))
        back = written(episode.dataset, folder, how)
        found = analysis.runs.success_of(back)
        assert found is solved
        assert analysis.runs.success_of(episode.dataset) is solved


def test_opening_says_which_store_it_is_of(episode):
    assert episode.dataset.encoding == {"source": str(episode.path)}
    assert not any(variable.encoding for variable in episode.dataset.variables.values())


def test_dask_chunks_are_the_stores(episode):
    chunks = episode.dataset["suffix_attention"].chunks
    assert set(chunks[0]) == set(chunks[1]) == set(chunks[2]) == {1}
    assert episode.dataset["token_id"].chunks[0] == (episode.n_inferences,)


def test_what_a_store_has_grown_to_is_never_taken_for_what_it_was(tmp_path):
    import os

    path = write_planted_episode(tmp_path, SyntheticPlan(n_frames=6))
    before = open_episode(path).dataset["token_id"].data.name
    assert open_episode(path).dataset["token_id"].data.name == before
    os.utime(path, ns=(1, 1))
    assert open_episode(path).dataset["token_id"].data.name != before


def test_other_processes_read_and_write_lazily(episode, tmp_path):
    from distributed import Client, LocalCluster

    expected = episode.arrays["suffix_attention"].astype("float32").mean().item()
    cluster = LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None)
    with cluster, Client(cluster):
        data = episode.dataset
        found = data["suffix_attention"].astype("float32").mean()
        assert operator.truth(found.chunks is not None)
        assert found.compute().item() == pytest.approx(expected, rel=1e-5)
        for how in ("zarr", "nc"):
            back = written(data.isel(inference=slice(0, 2)), tmp_path, how)
            np.testing.assert_array_equal(
                back["suffix_attention"].values, episode.arrays["suffix_attention"].values[:2]
            )
