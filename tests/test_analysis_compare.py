"""Comparisons against planted differences, and intervals against scipy, plain numpy and simulated truth."""

import functools

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from lerobot_attn import open_episode, open_run
from lerobot_attn.analysis import image_heatmap, modality_share, token_attention
from lerobot_attn.analysis.compare import (
    Aspect,
    compare,
    compare_each,
    compare_overall,
    overall_table,
    split_by_success,
)
from lerobot_attn.analysis.intervals import interval_of_difference
from lerobot_attn.analysis.runs import success_of
from lerobot_attn.errors import SelectionError, StoreError
from lerobot_attn.synthetic import SyntheticPlan, planted, planted_shares, write_planted_episode

TASK = "put the cup on the plate"
SMALL = {"grid": (4, 4), "input_px": (32, 32), "n_layers": 2, "layers": (1,), "n_denoise_steps": 2}
SMALL |= {"videos": False, "task": TASK, "n_executed": 5}
CAMERA, WRIST = "observation.images.image", "observation.images.wrist"
PLANTED = planted.planted_shares


def plan(**changes):
    return SyntheticPlan(**{**SMALL, **changes})


def moved(amount):
    """Return planted shares with `amount` moved from the first camera to the task."""

    def shares(of, frame):
        found = PLANTED(of, frame)
        return {**found, CAMERA: found[CAMERA] - amount, "task": found["task"] + amount}

    return shares


def write(folder, amount=0.0, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "planted_shares", moved(amount))
        return open_episode(write_planted_episode(folder, plan(**changes)))


AMOUNTS_A, AMOUNTS_B = (0.0, 0.02, 0.01), (0.08, 0.12, 0.1, 0.06)
FRAMES_A, FRAMES_B = (12, 9, 15), (10, 14, 8, 6)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Return failures and successes; these look more at the task, and all differ in length."""
    folder = tmp_path_factory.mktemp("run")
    index = iter(range(100))
    a = [
        write(folder, x, n_frames=n, episode_index=next(index), success=False)
        for x, n in zip(AMOUNTS_A, FRAMES_A, strict=True)
    ]
    b = [
        write(folder, x, n_frames=n, episode_index=next(index), success=True)
        for x, n in zip(AMOUNTS_B, FRAMES_B, strict=True)
    ]
    return a, b


def test_the_planted_difference_is_found_at_each_phase(groups):
    a, b = groups
    result = compare(a, b, n_phases=5)
    assert dict(result.sizes) == {"phase": 5, "modality": 7}
    np.testing.assert_allclose(result.phase, [0.1, 0.3, 0.5, 0.7, 0.9])
    expected = np.mean(AMOUNTS_B) - np.mean(AMOUNTS_A)
    # Frames fall into parts unevenly, and shares change by 0.25 over the episode.
    task = result.sel(modality="task")
    np.testing.assert_allclose(task.difference, expected, atol=0.02)
    assert (task.low > 0).all()
    assert (result.sel(modality=CAMERA).high < 0).all()
    np.testing.assert_allclose(result.sel(modality="state").difference, 0, atol=1e-3)
    assert ((result.low <= result.difference) & (result.difference <= result.high)).all()
    np.testing.assert_allclose(result.difference, result.b - result.a)
    assert (result.n_a == 3).all()
    assert (result.n_b == 4).all()
    assert result.layer == 1
    assert result.attrs["measure"] == "modality_share"
    assert result.attrs["interval"] == (
        "95% percentile bootstrap over episodes, 3 and 4, 2000 resamples; too narrow with so few episodes"
    )


@pytest.mark.parametrize("n_phases", [1, 3, 8, 12])
def test_phases_average_the_frames_that_fall_into_them(groups, n_phases):
    episode = groups[0][0]
    shares = modality_share(episode.arrays, frame="all").values
    part = [min(int(n_phases * frame / 11 + 1e-9), n_phases - 1) for frame in range(12)]
    expected = [shares[np.array(part) == p].mean(axis=0) for p in range(n_phases)]
    result = compare(episode, episode, n_phases=n_phases)
    np.testing.assert_allclose(result.a, expected, atol=1e-6)
    np.testing.assert_array_equal(result.difference, 0)


def test_episodes_shorter_than_the_phases_are_interpolated(groups):
    short = groups[1][3]  # 6 frames
    result = compare(short, short, n_phases=25)
    shares = modality_share(short.arrays, frame="all")
    for name in (CAMERA, "task"):
        expected = np.interp((np.arange(25) + 0.5) / 25, np.arange(6) / 5, shares.sel(modality=name))
        np.testing.assert_allclose(result.a.sel(modality=name), expected, atol=1e-6)


def test_lengths_that_differ_do_not_make_a_difference_by_phase(tmp_path):
    # The first camera's share falls by 0.25 over the episode: by frame, these two differ much.
    short, long = write(tmp_path, n_frames=20), write(tmp_path, n_frames=40, episode_index=1)
    by_phase = compare(short, long, n_phases=10).sel(modality=CAMERA)
    np.testing.assert_allclose(by_phase.difference, 0, atol=0.01)
    by_frame = compare(short, long, align="frame").sel(modality=CAMERA)
    assert by_frame.difference[19] == pytest.approx(0.25 * (1 - 19 / 39), abs=2e-3)


def test_by_frame_shorter_episodes_are_missing_and_counted(groups):
    a, b = groups
    result = compare(a, b, align="frame")
    assert result.frame.values.tolist() == list(range(15))
    task = result.sel(modality="task")
    assert task.n_a.values.tolist() == [sum(n > frame for n in FRAMES_A) for frame in range(15)]
    assert task.n_b.values.tolist() == [sum(n > frame for n in FRAMES_B) for frame in range(15)]
    values = [modality_share(e.arrays, frame=11).sel(modality="task").item() for e in (a[0], a[2])]
    assert task.a[11] == pytest.approx(np.mean(values), abs=1e-6)
    assert np.isnan(task.b[14])
    assert np.isnan(task.difference[14])
    # One episode is left on b's side from frame 10 on.
    assert np.isfinite(task.low[:10]).all()
    assert np.isnan(task.low[10:]).all()
    assert np.isfinite(task.difference[:14]).all()


def test_intervals_are_those_of_scipy_and_of_a_plain_loop(groups):
    a, b = groups
    result = compare(a, b, n_phases=4, n_resamples=500, confidence=0.9, seed=3)
    of_a, of_b = (
        np.stack([compare(e, e, n_phases=4).a.sel(modality="task").values for e in group]) for group in groups
    )
    interval = stats.bootstrap(
        (of_a, of_b),
        lambda x, y, axis: y.mean(axis=axis) - x.mean(axis=axis),
        paired=False,
        vectorized=True,
        axis=0,
        n_resamples=500,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    task = result.sel(modality="task")
    np.testing.assert_allclose(task.low, interval.low, rtol=1e-9)
    np.testing.assert_allclose(task.high, interval.high, rtol=1e-9)
    rng = np.random.default_rng(3)
    draws_a, draws_b = rng.integers(0, 3, (500, 3)), rng.integers(0, 4, (500, 4))
    loop = [of_b[y].mean(axis=0) - of_a[x].mean(axis=0) for x, y in zip(draws_a, draws_b, strict=True)]
    np.testing.assert_allclose(task.low, np.percentile(loop, 5, axis=0), rtol=1e-9)
    np.testing.assert_allclose(task.high, np.percentile(loop, 95, axis=0), rtol=1e-9)


def test_missing_values_are_drawn_from_the_episodes_that_have_them():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(6, 3)), rng.normal(size=(5, 3))
    a[[0, 4], 1], b[2, 1], b[:4, 2] = np.nan, np.nan, np.nan
    low, high = interval_of_difference(a, b, 0.95, 400, 0)
    alone = interval_of_difference(
        np.delete(a, [0, 4], axis=0)[:, 1:2], np.delete(b, 2, axis=0)[:, 1:2], 0.95, 400, 0
    )
    assert low[1] == pytest.approx(alone[0][0])
    assert high[1] == pytest.approx(alone[1][0])
    assert np.isnan([low[2], high[2]]).all()


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    # 1,000 simulated comparisons of 30 episodes a group, whose true difference is 0.3.
    low, high = interval_of_difference(
        rng.normal(0, 1, (30, 1000)), rng.normal(0.3, 1.5, (30, 1000)), 0.9, 1000, 0
    )
    covered = ((low <= 0.3) & (high >= 0.3)).mean()
    assert 0.85 < covered < 0.93


def test_the_interval_depends_on_the_seed_alone(groups):
    a, b = groups
    first, again = (compare(a, b, n_phases=3, n_resamples=50) for _ in range(2))
    xr.testing.assert_identical(first, again)
    other = compare(a, b, n_phases=3, n_resamples=50, seed=1)
    assert not other.low.equals(first.low)
    xr.testing.assert_equal(other.difference, first.difference)


def test_one_episode_has_no_interval(groups):
    a, b = groups
    result = compare(a[0], b)
    assert np.isnan(result.low).all()
    assert np.isnan(result.high).all()
    assert np.isfinite(result.difference).all()
    assert result.attrs["interval"] == "none: 1 and 4 episodes, two of each are needed"
    assert compare_overall(a, b[0]).attrs["interval"].startswith("none: 3 and 1")


def test_one_frame_is_an_episode(tmp_path):
    one = write(tmp_path, n_frames=1)
    shares = planted_shares(plan(n_frames=1), 0)
    for result in (compare(one, one, n_phases=5), compare(one, one, align="frame")):
        np.testing.assert_allclose(result.a.sel(modality="task"), shares["task"], atol=2e-3)
    assert np.isnan(compare(one, one, "stability").difference).all()


def test_datasets_lazy_or_not_give_what_episodes_give(groups):
    a, b = groups[0][0], groups[1][:2]
    expected = compare(a, b, "sharpness", n_phases=3)
    for kind in ("arrays", "dataset"):
        datasets = [getattr(open_episode(episode.path), kind) for episode in (a, *b)]
        result = compare(datasets[0], datasets[1:], "sharpness", n_phases=3)
        xr.testing.assert_identical(result, expected)
        assert bool(datasets[0].suffix_attention.chunks) == (kind == "dataset")


def test_words_are_compared_by_their_text(tmp_path):
    prompts = ("put the cup on the plate", "put the red cup on the joint_0")
    a, b = (
        [write(tmp_path, x, task=task, task_id=id_, episode_index=i) for i, x in enumerate((0, 0.05))]
        for id_, task in enumerate(prompts)
    )
    result = compare(a, b, "token_attention", n_phases=2)
    labels = list(zip(result["kind"].values.tolist(), result.label.values.tolist(), strict=True))
    assert labels[:8] == [
        *[("task", word) for word in ("put", "the", "cup", "on", "the (2)", "plate", "red", "joint_0")]
    ]
    # A word that is spelled like a state dimension is another thing.
    assert labels.count(("state", "joint_0")) == 1
    assert dict(zip(labels, result.ordinal.values.tolist(), strict=True))["task", "the (2)"] == -1
    for word, ordinal_a, ordinal_b in (("put", 0, 0), ("cup", 2, 3), ("the (2)", 4, 5)):
        found = result.isel(token=labels.index(("task", word)))
        for group, ordinal, mean in ((a, ordinal_a, found.a), (b, ordinal_b, found.b)):
            maps = [token_attention(e.arrays, frame="all") for e in group]
            values = [m.isel(token=ordinal).values.reshape(2, -1).mean(axis=1) for m in maps]
            np.testing.assert_allclose(mean, np.mean(values, axis=0), atol=1e-6)
    only_a, only_b = (result.isel(token=labels.index(("task", word))) for word in ("plate", "red"))
    assert np.isnan(only_a.b).all()
    assert np.isnan(only_b.a).all()
    assert (only_a.n_b == 0).all()
    assert np.isnan(only_b.difference).all()
    assert np.isnan(only_b.low).all()
    table = compare_overall(a, b, "token_attention").set_index(["kind", "name"])
    assert table.loc[("task", "plate"), ["n_a", "n_b"]].tolist() == [2, 0]
    assert table.loc[("state", "joint_0"), ["n_a", "n_b"]].tolist() == [2, 2]


def test_heatmaps_differ_where_they_do(groups):
    a, b = groups
    result = compare(a, b, "image_heatmap", camera="wrist", n_phases=4, n_resamples=100)
    assert dict(result.sizes) == {"phase": 4, "grid_y": 4, "grid_x": 4}
    assert result.attrs["camera"] == WRIST
    assert "vmax" not in result.attrs
    one = compare(a[0], b[0], "image_heatmap", camera="wrist", align="frame")
    expected = image_heatmap(b[0].arrays, "wrist", frame=4) - image_heatmap(a[0].arrays, "wrist", frame=4)
    np.testing.assert_allclose(one.difference[4], expected, atol=1e-6)
    # The wrist camera's share is the same in both groups: what is moved is not.
    np.testing.assert_allclose(result.difference.sum(("grid_y", "grid_x")), 0, atol=2e-3)
    first = compare(a, b, "image_heatmap", n_phases=4, n_resamples=100).difference
    np.testing.assert_allclose(first.sum(("grid_y", "grid_x")).mean(), -0.08, atol=0.01)


def test_a_function_and_kept_dimensions_are_compared(groups):
    a, b = groups
    words = functools.partial(modality_share, exclude=[0])
    result = compare(a, b, words, n_phases=2, layer="all", head="all")
    assert result.difference.dims == ("phase", "layer", "head", "modality")
    expected = np.mean(
        [
            modality_share(e.arrays, frame="all", exclude=[0], layer=0, head=1)
            .sel(modality="task")
            .values.mean()
            for e in a[:1]
        ]
    )
    whole = compare(a[0], b, words, n_phases=1, layer="all", head="all")
    assert whole.a.sel(layer=0, head=1, modality="task").item() == pytest.approx(expected, abs=1e-6)
    assert result.attrs["measure"] == "modality_share"


def test_overall_is_the_mean_of_each_whole_episode(groups):
    a, b = groups
    table = compare_overall(a, b, layer=[1], n_resamples=300, seed=5)
    assert table.columns[-7:].tolist() == ["a", "b", "difference", "low", "high", "n_a", "n_b"]
    assert {"layer", "measure", "quantity", "kind", "name"} <= set(table.columns)
    assert len(table) == 7
    assert set(table.layer) == {1}
    row = table[table.name == "task"].iloc[0]
    of_a, of_b = (
        np.array(
            [modality_share(e.arrays, frame="all", layer=1).sel(modality="task").values.mean() for e in g]
        )
        for g in groups
    )
    assert row.a == pytest.approx(of_a.mean(), abs=1e-6)
    assert row.difference == pytest.approx(of_b.mean() - of_a.mean(), abs=1e-6)
    low, high = interval_of_difference(of_a[:, None], of_b[:, None], 0.95, 300, 5)
    assert (row.low, row.high) == (pytest.approx(low[0], abs=1e-6), pytest.approx(high[0], abs=1e-6))
    assert row.low > 0
    sharp = compare_overall(a, b, "sharpness")
    assert set(sharp.quantity) == {"entropy", "effective_number"}
    assert set(sharp.name) == {CAMERA, WRIST}


def test_aspects_together_are_what_they_are_alone(groups):
    a, b = groups
    options = {"n_resamples": 100, "seed": 4, "layer": "all"}
    own = functools.partial(modality_share, exclude=[0])
    together = compare_each(
        a,
        b,
        {
            "shares": Aspect("modality_share", n_phases=3),
            "words": Aspect("token_attention", "frame"),
            "all words": Aspect("token_attention", "whole"),
            "wrist": Aspect("image_heatmap", n_phases=2, camera="wrist"),
            "image": Aspect(image_heatmap, "whole"),
            "steady": Aspect("stability", n_phases=3),
            "own": Aspect(own, n_phases=2),
        },
        **options,
    )
    alone = {
        "shares": compare(a, b, "modality_share", n_phases=3, **options),
        "words": compare(a, b, "token_attention", align="frame", **options),
        "wrist": compare(a, b, "image_heatmap", camera="wrist", n_phases=2, **options),
        "steady": compare(a, b, "stability", n_phases=3, **options),
        "own": compare(a, b, own, n_phases=2, **options),
    }
    for name, expected in alone.items():
        xr.testing.assert_identical(together[name], expected)
        assert together[name].attrs == expected.attrs
    pd.testing.assert_frame_equal(
        overall_table(together["all words"]), compare_overall(a, b, "token_attention", **options)
    )
    image = compare(a, b, "image_heatmap", n_phases=1, **options).isel(phase=0, drop=True)
    xr.testing.assert_identical(together["image"], image)


@pytest.mark.parametrize(
    ("aspects", "message"),
    [
        ({}, "aspects: got none, expected one at least"),
        ({"a": ("sharpness", "time")}, "axis='time': expected 'phase', 'frame' or 'whole'"),
        ({"a": ("sharpness", "phase", 0)}, "n_phases=0: expected 1 or more"),
        ({"a": ("sharp",)}, "measure 'sharp': expected one of"),
        ({"a": ("sharpness",), "b": ("image_heatmap", "whole", 1, "foot")}, "camera 'foot' does not exist"),
    ],
)
def test_aspects_that_cannot_be_compared_are_refused(groups, aspects, message):
    with pytest.raises(SelectionError, match=message):
        compare_each(*groups, {name: Aspect(*values) for name, values in aspects.items()})


def test_runs_split_by_success(groups, tmp_path):
    a, b = groups
    interrupted = write(tmp_path, complete=False)
    solved, failed = split_by_success([*a, interrupted, *b])
    assert (solved, failed) == (b, a)
    failure = split_by_success([e.arrays for e in [*a, *b]]).failures[0]
    assert success_of(failure) is False  # a dataset says 0, which netCDF can take
    with pytest.raises(SelectionError, match="got 0 successes, 3 failures and 1 interrupted"):
        split_by_success([*a, interrupted])
    with pytest.raises(SelectionError, match="split_by_success: got no episodes"):
        split_by_success([])


def test_progress_counts_the_episodes_of_both(groups):
    calls = []
    compare(*groups, n_phases=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 7) for i in range(1, 8)]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"measure": "sharp"}, "measure 'sharp': expected one of modality_share, .*image_heatmap"),
        ({"align": "time"}, "align='time': expected 'phase' or 'frame'"),
        ({"n_phases": 0}, "n_phases=0: expected 1 or more"),
        ({"confidence": 95}, "confidence=95: expected between 0 and 1"),
        ({"n_resamples": 0}, "n_resamples=0: expected 1 or more"),
        ({"frame": 3}, "got frame=3, expected none"),
        ({"camera": "wrist"}, "camera='wrist' is a choice of measure='image_heatmap' alone"),
        ({"measure": "image_heatmap", "camera": "foot"}, "camera 'foot' does not exist"),
        ({"layer": 7}, "layer 7 was not saved"),
        ({"scheduler": "cluster"}, "scheduler 'cluster'"),
        ({"a": []}, "a: got no episodes"),
        ({"b": ["out"]}, "b: got str 'out', expected datasets or episodes"),
    ],
)
def test_what_cannot_be_compared_is_refused(groups, choices, message):
    a, b = groups
    with pytest.raises(SelectionError, match=message):
        compare(**{"a": a, "b": b, **choices})


def test_overall_refuses_what_it_cannot_draw(groups):
    with pytest.raises(SelectionError, match="confidence=0: expected"):
        compare_overall(*groups, confidence=0)


def test_an_error_names_the_episode(groups):
    with pytest.raises(SelectionError) as caught:
        compare(*groups, layer=7)
    assert str(caught.value).startswith(f"{groups[0][0].path}: layer 7 was not saved")


def test_episodes_without_frames_are_refused(groups):
    empty = groups[0][0].arrays.isel(frame=[], inference=[])
    with pytest.raises(SelectionError, match="holds 0 inferences and 0 frames"):
        compare(empty, groups[1])


def test_a_damaged_episode_ends_a_comparison(groups, tmp_path):
    broken = write(tmp_path)
    (broken.path / "zarr.json").write_text("{}")
    with pytest.raises(StoreError, match="damaged metadata"):
        compare(groups[0], [*groups[1], broken])


def test_cameras_that_differ_are_refused(groups, tmp_path):
    one = write(tmp_path, image_px={CAMERA: (96, 96), "observation.images.side": (96, 96)})
    with pytest.raises(
        SelectionError, match=f"cameras differ: {CAMERA}, {WRIST} in .*images.side in .*00000"
    ):
        compare(groups[0], one)


@pytest.mark.parametrize(
    ("measure", "changes", "choices", "message"),
    [
        ("image_heatmap", {"grid": (8, 8)}, {}, "cannot be compared patch by patch"),
        ("modality_share", {"n_heads": 3}, {"head": "all"}, r"head differs: \[0, 1\] in .*\[0, 1, 2\]"),
        ("modality_share", {"n_layers": 3, "layers": (2,)}, {"layer": "all"}, "layer differs"),
    ],
)
def test_sizes_that_differ_are_refused(groups, tmp_path, measure, changes, choices, message):
    with pytest.raises(SelectionError, match=message):
        compare(groups[0], write(tmp_path, **changes), measure, **choices)


def test_maps_and_means_that_were_mixed_are_named(groups, tmp_path):
    means = write(tmp_path, layers=())
    result = compare(groups[0], means)
    assert result.attrs["source"] == "suffix_attention or suffix_attention_mean"


def test_a_run_is_a_group(groups):
    run = open_run(groups[0][0].path.parents[2])
    assert compare(run, groups[1], n_phases=2).attrs["episodes_a"] == 7
