"""Maps are read once, however many cameras are shown or measures are taken of them."""

from collections import Counter
from dataclasses import replace

import pytest
import xarray as xr
from zarr.storage import LocalStore, WrapperStore

from lerobot_attn import analysis
from lerobot_attn.analysis.runs import MEASURES, Measure, measured
from lerobot_attn.analysis.spatial import by_camera, episode_ranges
from lerobot_attn.overlay import OverlaySettings, overlay_frames
from lerobot_attn.plot import PlotSettings, plot
from lerobot_attn.report import compare_groups
from lerobot_attn.store.reader import open_episode
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

CAMERAS = {f"observation.images.{name}": (96, 96) for name in ("image", "wrist", "top")}
PLAN = SyntheticPlan(image_px=CAMERAS, grid=(4, 4), n_frames=7)
MAPS = ("suffix_attention", "suffix_attention_mean")


class CountingStore(WrapperStore[LocalStore]):
    """Counts the reads of each file of maps: a shard's index and its chunks are a read each."""

    def __init__(self, store):
        super().__init__(store)
        self.reads = Counter()

    async def get(self, key, prototype, byte_range=None):
        if key.split("/")[0] in MAPS and "/c/" in key:
            self.reads[key] += 1
        return await super().get(key, prototype, byte_range)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_planted_episode(tmp_path_factory.mktemp("planted"), PLAN)


@pytest.fixture
def counted(path):
    """An episode, and the reads of its maps so far."""
    store = CountingStore(LocalStore(path, read_only=True))
    episode = open_episode(path)
    episode.arrays = xr.open_zarr(store, chunks=None, zarr_format=3)
    episode.dataset = xr.open_zarr(store, chunks={}, zarr_format=3)
    return episode, store.reads


def reads_of(reads, act):
    reads.clear()
    act()
    found = dict(reads)
    assert found, "nothing was counted"
    return found


def test_heatmaps_of_all_cameras_take_the_reads_of_one(counted):
    episode, reads = counted
    data = episode.arrays
    one = reads_of(reads, lambda: analysis.image_heatmap(data, "wrist", frame=4))
    every = reads_of(reads, lambda: by_camera(data, analysis.attention(data, frame=4)))
    assert every == one
    ranges = reads_of(reads, lambda: episode_ranges(data, frame=4))
    assert ranges == reads_of(reads, lambda: episode_ranges(data, ["wrist"], frame=4))
    lazy = episode.dataset
    assert reads_of(reads, lambda: episode_ranges(lazy, frame=4)) == reads_of(
        reads, lambda: episode_ranges(lazy, ["wrist"], frame=4)
    )


def test_choosing_cameras_of_lazy_attention_reads_nothing(counted):
    episode, reads = counted
    data = episode.dataset
    reads.clear()
    heatmaps = by_camera(data, analysis.attention(data, frame="all"), normalisation="image")
    assert not reads
    heatmaps["observation.images.wrist"].compute()
    assert reads


@pytest.mark.parametrize("normalisation", ["share", "episode"])
@pytest.mark.parametrize("kind", ["image", "combined", "timeline"])
def test_figures_of_all_cameras_take_the_reads_of_one(counted, kind, normalisation):
    episode, reads = counted
    every = PlotSettings(normalisation=normalisation)
    one = replace(every, cameras="wrist")
    assert reads_of(reads, lambda: plot(episode, kind, every)) == reads_of(
        reads, lambda: plot(episode, kind, one)
    )


def test_a_combined_figure_reads_its_map_once(counted):
    episode, reads = counted
    figure = reads_of(reads, lambda: plot(episode, "combined", PlotSettings(frames=5)))
    assert figure == reads_of(reads, lambda: analysis.attention(episode.arrays, frame=5))


def test_a_timeline_reads_each_map_once(counted):
    episode, reads = counted
    figure = reads_of(reads, lambda: plot(episode, "timeline"))
    shares = analysis.modality_share(episode.dataset, frame="all")
    assert figure == reads_of(reads, shares.compute)


@pytest.mark.parametrize("normalisation", ["share", "episode"])
def test_overlays_of_all_cameras_take_the_reads_of_one(counted, normalisation):
    episode, reads = counted
    every = OverlaySettings(camera="all", normalisation=normalisation)
    one = replace(every, camera="wrist")
    assert reads_of(reads, lambda: overlay_frames(episode, every)) == reads_of(
        reads, lambda: overlay_frames(episode, one)
    )


@pytest.mark.parametrize("by", ["inference", "frame"])
@pytest.mark.parametrize("where", [{}, {"layer": "all", "head": "all"}], ids=str)
def test_all_measures_take_the_reads_of_one(counted, by, where):
    episode, reads = counted
    one = reads_of(reads, lambda: list(measured(episode.arrays, [MEASURES["stability"]], by, where)))
    every = reads_of(reads, lambda: list(measured(episode.arrays, [*MEASURES.values()], by, where)))
    assert every == one


def test_a_measure_of_ones_own_reads_for_itself(counted):
    episode, reads = counted
    own = Measure("own", analysis.modality_share)
    one = reads_of(reads, lambda: list(measured(episode.arrays, [own], "frame", {})))
    both = [own, MEASURES["modality_share"]]
    found = reads_of(reads, lambda: list(measured(episode.arrays, both, "frame", {})))
    assert found == {key: 2 * n for key, n in one.items()}


def test_a_comparison_takes_the_reads_of_one_measure(counted):
    episode, reads = counted
    one = reads_of(reads, lambda: analysis.compare(episode, episode, "modality_share"))
    assert reads_of(reads, lambda: compare_groups([episode], [episode])) == one
