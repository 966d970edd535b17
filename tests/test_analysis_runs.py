"""Summaries of runs against planted attention, against single calls, and against damage and memory."""

import functools
import gc
import pickle
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from lerobot_attn import open_episode, open_run
from lerobot_attn.analysis import (
    attention,
    attention_entropy,
    image_heatmap,
    modality_share,
    reduce,
    stability,
    token_attention,
)
from lerobot_attn.analysis import runs as runs_module
from lerobot_attn.analysis import sources as sources_module
from lerobot_attn.analysis.runs import (
    MEASURES,
    Measure,
    find_measure,
    map_episodes,
    measured,
    summarise,
    summarise_run,
)
from lerobot_attn.analysis.select import layout_of
from lerobot_attn.errors import SelectionError
from lerobot_attn.sizes import n_cores, one_core
from lerobot_attn.synthetic import SyntheticPlan, planted_shares, write_planted_episode, write_softmax_episode

TASK = "put the cup on the plate"
SMALL = {"grid": (4, 4), "input_px": (32, 32), "n_layers": 2, "layers": (1,), "n_denoise_steps": 2}
SMALL |= {"videos": False, "task": TASK}
CAMERAS = ["observation.images.image", "observation.images.wrist"]


def plan(**changes):
    return SyntheticPlan(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_planted_episode(folder, plan())
    write_planted_episode(folder, plan(episode_index=1, n_frames=7, success=False))
    write_planted_episode(folder, plan(episode_index=2, n_frames=5, complete=False))
    return folder


@pytest.fixture(scope="module")
def data(run_folder):
    return open_run(run_folder)[0].arrays


def test_shares_by_frame_are_the_planted_ones(data):
    table = summarise(data, "modality_share", by="frame")
    got = table.pivot(index="frame", columns="name", values="value")
    for frame in range(12):
        shares = planted_shares(plan(), frame)
        for name in [*CAMERAS, "task", "state", "template"]:
            assert got.loc[frame, name] == pytest.approx(shares[name], abs=2e-3)
    assert set(table.kind) == {"modality"}
    assert set(table.quantity) == {"share"}
    phases = table.drop_duplicates("frame").phase
    np.testing.assert_allclose(phases, np.arange(12) / 11)


@pytest.mark.parametrize("by", ["inference", "frame"])
@pytest.mark.parametrize("most", [1, 64])
@pytest.mark.parametrize(
    "where", [{}, {"layer": "all", "head": "all"}, {"denoise_step": "mean", "layer": [0]}]
)
def test_blocks_give_what_one_call_on_the_whole_episode_gives(data, monkeypatch, by, most, where):
    monkeypatch.setattr(runs_module, "_MOST_INFERENCES", most)
    table = summarise(data, by=by, **where)
    everything = {**where, by: "all"}
    heatmaps = xr.concat([image_heatmap(data, camera, **everything) for camera in CAMERAS], "camera")
    parts = {
        ("modality_share", "share"): modality_share(data, **everything),
        ("token_attention", "share"): token_attention(data, **everything),
        ("entropy", "entropy"): attention_entropy(heatmaps)["entropy"],
        ("entropy", "effective_number"): attention_entropy(heatmaps)["effective_number"],
        ("stability", "overlap"): stability(heatmaps, by),
    }
    for (measure, quantity), expected in parts.items():
        got = table[(table.measure == measure) & (table.quantity == quantity)]
        if measure == "stability":
            assert got[got[by] == 0].value.isna().all()
            got = got[got[by] > 0]
        last = next(d for d in ("modality", "token", "camera") if d in expected.dims)
        expected = expected.transpose(by, ..., last)
        assert len(got) == expected.size, measure
        np.testing.assert_allclose(got.value, expected.values.ravel(), rtol=1e-4, atol=1e-6)


def test_each_row_is_labelled_by_what_it_is_of(data):
    table = summarise(data, layer="all", head=[1])
    assert [*table.columns] == [
        *("inference", "phase", "flow_time", "denoise_step", "layer", "head"),
        *("measure", "quantity", "kind", "name", "value"),
    ]
    row = table[(table.measure == "token_attention") & (table.layer == 0) & (table.inference == 2)]
    expected = token_attention(data, inference=2, layer=0, head=1)
    words = row[row.kind == "task"]
    assert words.name.tolist() == ["put", "the", "cup", "on", "the (2)", "plate"]
    at = int(np.flatnonzero(expected.ordinal.values == 4)[0])
    assert words[words.name == "the (2)"].value.item() == pytest.approx(float(expected[at]))
    assert set(row.kind) == {"task", "state", "template"}
    assert set(table[table.measure == "entropy"].name) == set(CAMERAS)
    phases = table.groupby("inference").phase.first()
    np.testing.assert_allclose(phases, np.array([0, 3, 6, 9]) / 11)


def test_by_episode_are_the_means_over_the_inferences_that_have_a_value(data):
    table = summarise(data, layer="all")
    means = summarise(data, by="episode", layer="all")
    assert [*means.columns] == [name for name in table.columns if name not in ("inference", "phase")]
    labels = ["layer", "measure", "quantity", "kind", "name"]
    expected = table.astype({"value": float}).groupby(labels).value.mean()  # leaves NaN out
    assert len(means) == len(expected)
    np.testing.assert_allclose(means.set_index(labels).value[expected.index], expected)
    assert means.value.notna().all()  # of stability, too, which the first inference lacks


def test_by_episode_a_word_that_a_prompt_lacks_got_no_attention(data):
    table = summarise(data, "token_attention")
    is_cut = (table.name == "plate") & (table.inference == 1)
    found = runs_module._means(table[~is_cut], 4).set_index("name").value
    kept = table[(table.name == "plate") & ~is_cut].value
    assert len(kept) == 3
    assert found["plate"] == pytest.approx(kept.sum() / 4)
    assert found["cup"] == pytest.approx(table[table.name == "cup"].value.mean())


def test_a_dask_dataset_gives_the_same_table(run_folder, data):
    lazy = open_run(run_folder)[0].dataset
    assert lazy.suffix_attention.chunks
    pd.testing.assert_frame_equal(summarise(lazy, by="frame"), summarise(data, by="frame"))


def test_summarising_leaves_the_dataset_as_it_was(run_folder):
    lazy = open_run(run_folder)[0].dataset
    summarise(lazy)
    assert all(lazy[name].chunks for name in ("suffix_attention", "key_kind", "token_text"))


def test_a_person_gives_a_function_of_their_own(data):
    calls = []

    def largest(dataset, *, scale, **where):
        calls.append(where)
        return scale * image_heatmap(dataset, "wrist", **where).max(("grid_y", "grid_x"))

    table = summarise(data, [functools.partial(largest, scale=10)], layer=0)
    assert set(table.measure) == {"largest"}
    assert set(table.quantity) == {"value"}
    expected = 10 * image_heatmap(data, "wrist", inference="all", layer=0).max(("grid_y", "grid_x"))
    np.testing.assert_allclose(table.value, expected, rtol=1e-5)
    assert all(call["layer"] == 0 for call in calls)
    maps = summarise(data, functools.partial(image_heatmap, camera="wrist"), by="frame")
    assert len(maps) == 12 * 16
    np.testing.assert_allclose(
        maps[maps.frame == 5].sort_values(["grid_y", "grid_x"]).value,
        image_heatmap(data, "wrist", frame=5).values.ravel(),
        rtol=1e-5,
    )


def test_a_function_sees_the_inferences_before_that_it_asks_for(data, monkeypatch):
    monkeypatch.setattr(runs_module, "_MOST_INFERENCES", 1)

    def seen(dataset, inference):
        counts = np.full(len(inference), dataset.sizes["inference"])
        assert (dataset.frame_inference.values < dataset.sizes["inference"]).all()
        return xr.DataArray(counts, dims="inference")

    assert summarise(data, Measure("seen", seen, n_before=2)).value.tolist() == [1, 2, 3, 3]
    assert summarise(data, Measure("seen", seen)).value.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("by", ["inference", "frame"])
def test_a_measure_of_attention_gets_the_rows_before_that_it_asks_for(data, monkeypatch, by):
    monkeypatch.setattr(runs_module, "_MOST_INFERENCES", 1)
    n_own = 3 if by == "frame" else 1  # rows of a block

    def n_before(dataset, array):
        counts = np.full(array.sizes[by], array.sizes[by] - n_own)
        return xr.DataArray(counts, {by: array[by]}, (by,))

    measures = [Measure("seen", n_before, n_before=2, of_attention=True), "modality_share"]
    table = summarise(data, measures, by=by)
    seen = table[table.measure == "seen"].value.tolist()
    assert seen == ([0] * 3 + [2] * 9 if by == "frame" else [0, 1, 2, 2])
    alone = Measure("seen", n_before, of_attention=True)
    assert set(summarise(data, alone, by=by).value) == {0}
    shares = table[table.measure == "modality_share"].value
    np.testing.assert_array_equal(shares, summarise(data, "modality_share", by=by).value)


def test_what_a_measure_of_attention_does_not_return_is_missing(data):
    later = Measure("later", lambda _, array: array.max("key")[2:], n_before=1, of_attention=True)
    assert summarise(data, later).value.isna().tolist() == [True, True, False, False]


def test_a_run_is_one_table_with_its_episodes(run_folder):
    calls = []
    run = open_run(run_folder)
    summary = summarise_run(run, progress=lambda done, total: calls.append((done, total)))
    table = summary.table
    assert summary.failed == ()
    assert calls == [(1, 3), (2, 3), (3, 3)]
    labels = table.groupby("episode")[["success", "complete", "task_id"]].first()
    assert labels.complete.tolist() == [True, True, False]
    assert [table[table.episode == e].success.iloc[0] for e in range(3)] == [True, False, None]
    assert set(table.task) == {TASK}
    assert set(table.task_group) == {"synthetic"}
    for index, episode in enumerate(run):
        own = table[table.path == str(episode.path)]
        assert set(own.episode) == {index}
        alone = summarise(episode.arrays)
        np.testing.assert_array_equal(own.value, alone.value)
        assert own.name.astype(str).tolist() == alone.name.tolist()
    assert isinstance(table.path.dtype, pd.CategoricalDtype)


def cores_that_may_be_used(dataset, inference):
    return xr.DataArray(np.full(len(inference), n_cores()), dims="inference")


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_episodes_side_by_side_use_a_core_each(run_folder, scheduler, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    found = summarise_run(open_run(run_folder), cores_that_may_be_used, scheduler=scheduler).table
    assert set(found.value) == ({3} if scheduler == "synchronous" else {1})
    assert n_cores() == 3
    with one_core(), ThreadPoolExecutor(1) as pool:
        assert n_cores() == 1
        assert pool.submit(n_cores).result() == 3  # of another thread nothing was said
    assert n_cores() == 3


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_schedulers_agree(run_folder, scheduler):
    episodes = open_run(run_folder).episodes[:2]
    table = summarise_run(episodes, "stability", scheduler=scheduler).table
    both = pd.concat([summarise(episode.arrays, "stability") for episode in episodes])
    np.testing.assert_array_equal(table.value, both.value)


def test_an_episode_can_be_sent_to_another_process(run_folder, data):
    function = functools.partial(summarise, measures=tuple(MEASURES.values()))
    job = pickle.loads(pickle.dumps(sources_module._Job(function, open_run(run_folder)[0])))
    pd.testing.assert_frame_equal(job(), summarise(data))


def test_datasets_are_taken_too_and_stay_lazy(run_folder):
    lazy = open_run(run_folder)[1].dataset
    table = summarise_run([lazy], "modality_share").table
    assert set(table.episode) == {1}
    assert table.path.iloc[0].endswith("episode_00001.zarr")
    assert lazy.suffix_attention.chunks


def test_a_damaged_episode_is_reported_and_the_others_are_summarised(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    episodes = list(open_run(folder))
    for shard in (episodes[1].path / "suffix_attention_mean" / "c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(b"\x00" * shard.stat().st_size)
    shutil.rmtree(episodes[2].path)
    summary = summarise_run(episodes, "modality_share")
    assert set(summary.table.episode) == {0}
    assert [failed.path for failed in summary.failed] == [str(episode.path) for episode in episodes[1:]]
    assert all(failed.error for failed in summary.failed)


def test_episodes_are_let_go_after_their_turn(run_folder):
    episodes = list(open_run(run_folder))
    summarise_run(episodes)
    assert not any({"arrays", "dataset"} & set(vars(episode)) for episode in episodes)


def peak_bytes(dataset, by):
    chosen = [MEASURES["modality_share"], MEASURES["stability"]]
    where = {"layer": "all", "denoise_step": "all", "head": "all"}
    where |= {"query": "all"} if by == "inference" else {}
    gc.collect()
    gc.freeze()  # so that what imports and other tests have left is not looked through for every inference
    tracemalloc.start()
    for values in measured(dataset, chosen, by, where):
        del values
        gc.collect()  # zarr's finished tasks are cycles: garbage, but not before somebody looks
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.fixture(scope="module")
def short_and_long(tmp_path_factory):
    """Return episodes of 4 and of 20 inferences."""
    folder = tmp_path_factory.mktemp("memory")
    sizes = {"n_heads": 8, "n_queries": 40, "n_executed": 10, "grid": (8, 8), "layers": (0, 1)}
    plans = [plan(**sizes, n_frames=10 * n, episode_index=n) for n in (4, 20)]
    return [open_episode(write_softmax_episode(folder, p)).arrays for p in plans]


@pytest.mark.parametrize("by", ["inference", "frame"])
def test_memory_does_not_grow_with_the_episode(short_and_long, by, monkeypatch):
    monkeypatch.setattr(runs_module, "_BLOCK_BYTES", 0)
    short, long = short_and_long
    slab = short["suffix_attention"][0].nbytes + short["suffix_attention_mean"][0].nbytes
    assert slab > 300_000
    peak_bytes(short, by)  # what is imported and cached once
    growth = peak_bytes(long, by) - peak_bytes(short, by)
    # Of 16 more inferences only the tables of tokens stay, some ten kilobytes each.
    assert growth < slab / 2
    monkeypatch.setattr(runs_module, "_BLOCK_BYTES", 10**9)
    monkeypatch.setattr(runs_module, "_MOST_INFERENCES", 64)
    whole = peak_bytes(long, by) - peak_bytes(short, by)
    assert whole > 4 * growth


def test_maps_are_averaged_without_holding_all_of_them(short_and_long, monkeypatch):
    maps = short_and_long[1]["suffix_attention"]
    monkeypatch.setattr(reduce, "_PIECE_BYTES", 0)
    chosen = {"layer": "all", "denoise_step": "all"}
    for choice in ({"inference": "all", "query": "mean"}, {"inference": "all", "query": 3}, {"frame": "all"}):
        attention(short_and_long[0], **choice, **chosen)  # what is imported and cached once
        tracemalloc.start()
        result = attention(short_and_long[1], **choice, **chosen)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # An inference's maps in float16 and a piece of them in float32, beside the result and its parts.
        assert peak < maps.nbytes / 20 * 4 + 3 * result.nbytes, choice


def test_one_frame_is_an_episode(tmp_path):
    data = open_episode(write_planted_episode(tmp_path, plan(n_frames=1))).arrays
    table = summarise(data, by="frame")
    assert set(table.phase) == {0}
    assert table[table.measure == "stability"].value.isna().all()
    assert table[table.measure != "stability"].value.notna().all()


def returns_a_number(dataset, **where):
    return 3


def forgets_frames(dataset, **where):
    return modality_share(dataset, **where).mean("frame")


@pytest.mark.parametrize(
    ("arguments", "choices", "message"),
    [
        (("sharp",), {}, "measure 'sharp': expected one of modality_share, token_attention"),
        ((3,), {}, "measure 3: expected a name or a function"),
        (([3],), {}, "expected a name or a function"),
        (((),), {}, "got no measures"),
        ((), {"by": "task"}, "by='task': expected 'inference', 'frame' or 'episode'"),
        ((), {"frame": 3}, "got frame=3, expected none"),
        ((), {"inference": "all"}, "got inference='all', expected none"),
        ((), {"layer": 9}, "layer 9 was not saved"),
        ((returns_a_number,), {}, "'returns_a_number' returned int, expected a DataArray, inference of"),
        ((forgets_frames,), {"by": "frame"}, r"'forgets_frames' returned \{'modality': .*frame of"),
    ],
)
def test_what_cannot_be_summarised_is_refused(data, arguments, choices, message):
    with pytest.raises(SelectionError, match=message):
        summarise(data, *arguments, **choices)


def test_nothing_recorded_is_refused(data):
    with pytest.raises(SelectionError, match="holds 0 inferences and 0 frames: nothing to measure"):
        summarise(data.isel(inference=[], frame=[]))
    with pytest.raises(SelectionError, match="holds 4 inferences and 0 frames"):
        summarise(data.isel(frame=[]), by="frame")


def test_episodes_without_cameras_have_no_sharpness(tmp_path):
    data = open_episode(write_planted_episode(tmp_path, plan())).arrays
    layout = layout_of(data).to_dict()
    blind = {**layout, "cameras": [{**camera, "geometry": None} for camera in layout["cameras"]]}
    with pytest.raises(SelectionError, match="saw no camera image"):
        summarise(data.assign_attrs(layout=blind), "entropy")


@pytest.mark.parametrize(
    ("episodes", "choices", "message"),
    [
        ([], {}, "episodes: got no episodes"),
        (["out/attention"], {}, "episodes: got str 'out/attention', expected datasets or episodes"),
        (None, {"measures": "sharp"}, "measure 'sharp'"),
        (None, {"scheduler": "distributed"}, "scheduler 'distributed': expected"),
        (None, {"layer": 9}, "none of 3 episodes could be summarised; .*00000.zarr: SelectionError: layer 9"),
    ],
)
def test_what_cannot_be_a_run_is_refused(run_folder, episodes, choices, message):
    with pytest.raises(SelectionError, match=message):
        summarise_run(open_run(run_folder) if episodes is None else episodes, **choices)


def test_what_an_episode_raises_takes_the_place_of_its_result(data):
    def fails(dataset):
        raise RuntimeError("no")

    (result,) = map_episodes(fails, [data], scheduler="synchronous")
    assert isinstance(result, RuntimeError)


def test_measures_are_found_by_name_and_pass_through():
    assert find_measure("stability") is MEASURES["stability"]
    assert find_measure(MEASURES["stability"]) is MEASURES["stability"]
    assert find_measure(modality_share).name == "modality_share"
