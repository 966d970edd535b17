"""Grounding: each number against planted truth and against an implementation in plain loops."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import xarray as xr

from lerobot_attn import analysis
from lerobot_attn.analysis.grounding import METRICS, better_chance, grounding, mean_maps, with_mean_head
from lerobot_attn.analysis.intervals import interval_of_mean
from lerobot_attn.analysis.permutation import sign_flips
from lerobot_attn.analysis.phases import QUARTERS, TASK_PHASES, task_phases
from lerobot_attn.errors import SelectionError
from lerobot_attn.store.reader import open_episode
from lerobot_attn.synthetic import SyntheticPlan, planted_box, write_planted_episode, write_softmax_episode

IMAGE, WRIST = "observation.images.image", "observation.images.wrist"
OBJECTS = {"block": "target", "bowl": "destination", "can": "distractor", "arm": "robot"}
# The wrist camera is wider than high: its letterbox has rows of patches that show half of the image.
PLAN = SyntheticPlan(
    n_frames=5,
    n_executed=1,
    n_denoise_steps=2,
    n_layers=3,
    layers=(0, 1, 2),
    grid=(8, 8),
    image_px={IMAGE: (24, 24), WRIST: (14, 32)},
    videos=False,
    objects=OBJECTS,
    out_of_sight=(3,),
    on_first_object=(2, 1),
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return open_episode(write_planted_episode(tmp_path_factory.mktemp("planted"), PLAN))


@pytest.fixture(scope="module")
def random_maps(tmp_path_factory):
    """Episodes of different random maps, and of the same scene."""
    folder = tmp_path_factory.mktemp("random")
    plan = dataclasses.replace(PLAN, on_first_object=None)
    return [
        open_episode(write_softmax_episode(folder, dataclasses.replace(plan, seed=seed, episode_index=seed)))
        for seed in range(3)
    ]


# An implementation in plain loops


def areas_of(mask, g):
    """Return (patch) shares of a patch's area that a mask (height, width) covers, pixel by pixel."""
    height, width = len(mask), len(mask[0])
    high, wide = g.input_height_px / g.grid_rows, g.input_width_px / g.grid_columns
    shares = []
    for row, column in itertools.product(range(g.grid_rows), range(g.grid_columns)):
        area = 0.0
        for y, x in itertools.product(range(height), range(width)):
            if mask[y][x]:
                top = g.pad_top_px + y * g.resized_height_px / height
                left = g.pad_left_px + x * g.resized_width_px / width
                bottom, right = top + g.resized_height_px / height, left + g.resized_width_px / width
                tall = min(bottom, (row + 1) * high) - max(top, row * high)
                broad = min(right, (column + 1) * wide) - max(left, column * wide)
                area += max(0, tall) * max(0, broad)
        shares.append(area / (high * wide))
    return shares


def metrics_by_loops(heat, covered, shown, columns, ranking=None):
    """Return the five metrics of one map of one mask; all are lists over patches."""
    seen = [p for p in range(len(heat)) if shown[p] > 0]
    ranking = ranking or heat
    total = sum(heat[p] for p in seen)
    share = {p: heat[p] / total for p in seen}
    mass = sum(share[p] * covered[p] / shown[p] for p in seen)
    area = sum(covered[p] for p in seen) / sum(shown[p] for p in seen)
    inside, outside = mass / area, (1 - mass) / (1 - area) if area < 1 else math.nan
    n_top = max(1, round(len(seen) / 10))
    order = sorted(seen, key=lambda p: -ranking[p])
    last = ranking[order[n_top - 1]]
    weight = {p: 1.0 for p in seen if ranking[p] > last}
    tied = [p for p in seen if ranking[p] == last]
    weight |= {p: (n_top - len(weight)) / len(tied) for p in tied}
    shared = sum(w * covered[p] for p, w in weight.items())
    union = sum(w * shown[p] for p, w in weight.items()) + sum(covered) - shared
    most = [p for p in seen if ranking[p] == max(ranking[q] for q in seen)]
    hit = sum(covered[p] > 0 for p in most) / len(most)
    centre = [sum(share[p] * (divmod(p, columns)[i] + 0.5) for p in seen) for i in range(2)]
    goal = [sum(covered[p] * (divmod(p, columns)[i] + 0.5) for p in seen) / sum(covered) for i in range(2)]
    return [mass, inside / outside if outside else math.nan, shared / union, hit, math.dist(centre, goal)]


@pytest.mark.parametrize("camera", [IMAGE, WRIST])
def test_every_number_is_that_of_plain_loops(random_maps, camera):
    data = random_maps[0].arrays
    others = mean_maps([episode.arrays for episode in random_maps[1:]], layer="all", head="all")
    found = grounding(data, layer="all", head="all", fixed=others)
    _, g, segment = analysis.camera_geometry(data, camera)
    maps = data["suffix_attention_mean"].values[:, -1, :, :, segment.start : segment.stop].astype(float)
    for inference, layer, head in [(0, 0, 0), (1, 2, 1), (4, 1, 0)]:
        mask = data["segmentation"].sel(mask_camera=camera).values[inference]
        shown = areas_of(np.ones_like(mask).tolist(), g)
        rows = np.abs(np.arange(g.grid_rows) + 0.5 - (g.pad_top_px + g.resized_height_px / 2) * 8 / 224)
        columns = np.abs(np.arange(g.grid_columns) + 0.5 - (g.pad_left_px + g.resized_width_px / 2) * 8 / 224)
        sigma = g.resized_height_px / 4 * 8 / 224, g.resized_width_px / 4 * 8 / 224
        prior = [
            math.exp(-((rows[p // 8] / sigma[0]) ** 2) / 2 - (columns[p % 8] / sigma[1]) ** 2 / 2) * shown[p]
            for p in range(64)
        ]
        elsewhere = others[camera].values[layer, head].ravel().tolist()
        for role in ("target", "background"):
            numbers = [n for n, r in enumerate(data["instance_role"].values) if r == role]
            covered = areas_of(np.isin(mask, numbers).tolist(), g)
            where = {"inference": inference, "camera": camera, "role": role}
            at = {**where, "layer": layer, "head": head}
            own = maps[inference, layer, head].tolist()
            expected = metrics_by_loops(own, covered, shown, 8)
            np.testing.assert_allclose(found.value.sel(at), expected, rtol=1e-5, err_msg=str(at))
            expected = metrics_by_loops(elsewhere, covered, shown, 8)
            np.testing.assert_allclose(found.fixed.sel(at), expected, rtol=1e-5)
            ties = [round(density, 9) for density in prior]
            expected = metrics_by_loops(prior, covered, shown, 8, ties)
            np.testing.assert_allclose(found.centre.sel(where), expected, rtol=1e-5)
            every_patch = [float(share > 0) for share in shown]
            expected = metrics_by_loops(shown, covered, shown, 8, every_patch)
            np.testing.assert_allclose(found.uniform.sel(where), expected, rtol=1e-5, atol=1e-9)


def test_chance_of_mass_is_the_share_of_the_area_and_of_concentration_one(random_maps):
    found = grounding(random_maps[0].arrays)
    mask = random_maps[0].arrays["segmentation"].values
    for index, (role, camera) in enumerate(itertools.product(("target", "robot"), (0, 1))):
        number = 1 + list(OBJECTS.values()).index(role)
        expected = (mask[0, camera] == number).mean()
        uniform = found.uniform.isel(inference=0, camera=camera).sel(role=role)
        assert float(uniform.sel(metric="mass")) == pytest.approx(expected, abs=1e-9), index
        assert float(uniform.sel(metric="concentration")) == pytest.approx(1)


# Planted truth


def test_map_on_the_object_is_on_it_and_others_are_not(planted):
    found = grounding(planted.arrays, layer="all", head="all", denoise_step="all")
    assert found.value.dims == ("inference", "denoise_step", "layer", "head", "camera", "role", "metric")
    on = found.value.sel(layer=2, head=1, role="target", inference=[0, 1, 2, 4])
    assert (on.sel(metric="peak_hit") == 1).all()
    patch = 0.75 / (28 * 28)  # of the attention, on one patch of 28 x 28 px
    for inference, camera in itertools.product((0, 1, 2, 4), (0, 1)):
        geometry = planted.layout.cameras[camera].geometry
        height, width = PLAN.image_px[(IMAGE, WRIST)[camera]]
        box = planted_box(PLAN, camera, "block", inference)
        row, column = geometry.patch_at(box.centre[0] * height, box.centre[1] * width)
        # The planted patch's share of the object, and the rest of the attention spread over the others.
        mask = np.asarray(box.mask(tuple(planted.arrays["segmentation"].shape[2:])))
        covered = np.array(areas_of(mask.tolist(), geometry)).reshape(8, 8)
        shown = np.array(areas_of(np.ones_like(mask).tolist(), geometry)).reshape(8, 8)
        inside = np.divide(covered, shown, out=np.zeros_like(shown), where=shown > 0)
        rest = 0.25 / 63
        weights = np.full((8, 8), rest)
        weights[row, column] = 0.75
        weights = weights * (shown > 0)
        expected = float((weights * inside).sum() / weights.sum())
        got = on.sel(inference=inference, metric="mass").isel(camera=camera)
        np.testing.assert_allclose(got, expected, rtol=2e-3)
        assert expected > 10 * patch
    off = found.value.sel(layer=0, head=0, role="target", metric="mass").mean()
    assert float(on.sel(metric="mass").mean()) > 4 * float(off)


def test_perfect_and_opposite_maps():
    from lerobot_attn.analysis.grounding import measure_maps

    rows, columns = np.divmod(np.arange(100), 10)
    centres = np.stack([rows, columns], -1) + 0.5
    mask = ((rows >= 2) & (rows < 4) & (columns >= 5)).astype(float)  # ten of a hundred patches
    perfect = measure_maps(mask, mask, mask[None], np.ones(100), centres=centres)[0]
    np.testing.assert_allclose(perfect, [1, np.inf, 1, 1, 0], atol=1e-12)
    away = np.where(rows == 8, 1.0, 0)
    opposite = measure_maps(away, away, mask[None], np.ones(100), centres=centres)[0]
    # From row 8.5, column 5 to row 3, column 7.5.
    np.testing.assert_allclose(opposite, [0, 0, 0, 0, math.hypot(5.5, 2.5)], atol=1e-12)
    # Half on the object: 0.5 on a tenth of the area is nine times as dense as 0.5 on nine tenths.
    half = 0.5 * mask / 10 + 0.5 * away / 10
    found = measure_maps(half, half, mask[None], np.ones(100), centres=centres)[0]
    np.testing.assert_allclose(found[:2], [0.5, 9])


def test_what_is_out_of_sight_or_unknown_has_no_number(planted):
    found = grounding(planted.arrays)
    assert not found.visible.sel(inference=3, role="target").any()
    assert found.visible.sel(inference=3, role="robot").all()
    assert found.value.sel(inference=3, role="target").isnull().all()
    assert found.value.sel(inference=3, role="robot").notnull().all()
    unknown = planted.arrays["segmentation"].load().copy()
    unknown[0, 1] = -1
    unknown[1, 1, :7] = -1  # the upper half
    data = planted.arrays.assign(segmentation=unknown)
    found = grounding(data)
    assert found.value.sel(inference=0, camera=WRIST).isnull().all()
    assert not found.visible.sel(inference=0, camera=WRIST).any()
    assert found.value.sel(inference=0, camera=IMAGE).sel(role="target").notnull().all()
    mask = unknown.values[1, 1]
    expected = (mask == 1).sum() / (mask >= 0).sum()
    got = float(found.uniform.sel(inference=1, camera=WRIST, role="target", metric="mass"))
    assert got == pytest.approx(expected, abs=1e-9)


def test_missing_map_has_no_number(planted):
    data = planted.arrays
    maps = data["suffix_attention_mean"].load().copy()
    maps[2, :, 1] = np.nan
    found = grounding(data.assign(suffix_attention_mean=maps), layer="all")
    assert found.value.sel(inference=2, layer=1).isnull().all()
    assert found.value.sel(inference=2, layer=0, role="target").notnull().all()
    assert found.uniform.sel(inference=2, role="target").notnull().all()


def test_frames_have_the_mask_of_their_inference(tmp_path):
    plan = dataclasses.replace(PLAN, n_frames=6, n_executed=2, on_first_object=None, out_of_sight=())
    data = open_episode(write_planted_episode(tmp_path, plan)).arrays
    by_frame = grounding(data, frame=[2, 3, 5], layer=1)
    by_inference = grounding(data, inference="all", layer=1)
    assert by_frame.value.dims[0] == by_frame.uniform.dims[0] == "frame"
    np.testing.assert_array_equal(by_frame.uniform.values, by_inference.uniform.values[[1, 1, 2]])
    one = grounding(data, frame=3, layer=1, head=0, query="frame")
    expected = grounding(data, inference=1, layer=1, head=0, query=1)
    np.testing.assert_array_equal(one.value.values, expected.value.values)
    assert one.value.dims == ("camera", "role", "metric")


def test_excluded_patches_are_not_visible(planted):
    data = planted.arrays
    _, _, segment = analysis.camera_geometry(data, IMAGE)
    keys = [*range(segment.start, segment.start + 32)]  # the upper half of the square camera
    found = grounding(data, inference=0, exclude=keys)
    mask = data["segmentation"].values[0, 0][12:]
    for role in ("target", "robot"):
        number = 1 + list(OBJECTS.values()).index(role)
        uniform = float(found.uniform.sel(camera=IMAGE, role=role, metric="mass"))
        share = (mask == number).mean()
        assert uniform == pytest.approx(share, abs=1e-9) or (math.isnan(uniform) and share == 0)


def test_lazy_in_lazy_out(planted):
    where = {"layer": "all", "head": "all", "fixed": mean_maps([planted.arrays], layer="all", head="all")}
    lazy = grounding(planted.dataset, **where)
    eager = grounding(planted.arrays, **where)
    assert all(
        type(lazy[name].data).__module__.startswith("dask") for name in ("value", "uniform", "visible")
    )
    for name in eager:
        np.testing.assert_allclose(lazy[name].values, eager[name].values, rtol=1e-9, atol=1e-12)


def test_mean_map_is_the_mean_of_each_episodes_mean(random_maps):
    found = mean_maps([e.arrays for e in random_maps], each_head=True, layer=[0, 2], denoise_step=1)
    assert list(found) == [IMAGE, WRIST]
    assert found[WRIST]["head"].values.tolist() == ["mean", "0", "1"]
    expected = []
    for episode in random_maps:
        heat = analysis.image_heatmap(
            episode.arrays, WRIST, normalisation="image", layer=[0, 2], denoise_step=1, head="all"
        )
        mean = analysis.image_heatmap(
            episode.arrays, WRIST, normalisation="image", layer=[0, 2], denoise_step=1, head="mean"
        )
        expected.append(np.stack([mean.values, *heat.transpose("head", ...).values]).mean(axis=1))
    expected = np.mean(expected, axis=0).swapaxes(0, 1)
    np.testing.assert_allclose(found[WRIST].transpose("layer", "head", ...).values, expected, rtol=1e-4)
    with pytest.raises(SelectionError, match="no episodes"):
        mean_maps([])


def test_mean_head_stands_before_the_others(random_maps):
    array = analysis.attention(random_maps[0].arrays, head="all", layer=1)
    joined = with_mean_head(array)
    assert joined["head"].values.tolist() == ["mean", "0", "1"]
    np.testing.assert_allclose(joined.sel(head="mean"), array.mean("head"), rtol=1e-6)
    np.testing.assert_array_equal(joined.sel(head="1"), array.sel(head=1))


def test_bad_choices_are_one_line(planted, tmp_path):
    bare = open_episode(
        write_planted_episode(tmp_path, dataclasses.replace(PLAN, objects={}, on_first_object=None))
    )
    for data, options, words in [
        (bare.arrays, {}, ("--eval.attention.segmentation=true", "lerobot-attn masks")),
        (planted.arrays, {"roles": ["cup"]}, ("'cup'", "target, destination, distractor, robot, background")),
        (planted.arrays, {"cameras": ["left"]}, ("'left'", WRIST)),
        (
            planted.arrays.isel(mask_camera=[0]),
            {"cameras": ["wrist"]},
            ("no masks", f"those with masks: {IMAGE}"),
        ),
        (planted.arrays, {"layer": 9}, ("layer 9",)),
        (planted.arrays, {"frame": 1, "inference": 0}, ("both",)),
    ]:
        with pytest.raises(SelectionError) as caught:
            grounding(data, **options)
        assert all(word in str(caught.value) for word in words), caught.value
        assert "\n" not in str(caught.value)


def test_better_chance_is_the_one_that_is_harder_to_beat():
    levels = [np.array([1.0, np.nan]), np.array([2.0, 3.0])]
    np.testing.assert_array_equal(better_chance("mass", levels), [2, 3])
    np.testing.assert_array_equal(better_chance("centre_distance", levels), [1, 3])
    assert len(METRICS) == 5


# Phases


def state(opening, height, names=("eef_z", "gripper_left", "gripper_right")):
    opening, height = np.asarray(opening, float), np.asarray(height, float)
    values = np.stack([height, opening / 2, -opening / 2], axis=1)
    n = len(opening)
    return xr.Dataset(
        {"state": (("frame", "state_dim"), values), "inference_frame": ("inference", np.arange(0, n, 2))},
        {"state_dim": list(names)},
        {},
    ).assign(frame_inference=("frame", np.arange(n) // 2))


def test_phases_follow_gripper_and_hand():
    #          approach           closes      lifts       carries     opens
    opening = [0.04, 0.08, 0.08, 0.06, 0.055, 0.055, 0.055, 0.055, 0.07, 0.08]
    height = [0.30, 0.20, 0.10, 0.10, 0.095, 0.110, 0.120, 0.30, 0.30, 0.30]
    found = task_phases(state(opening, height))
    assert found.names == TASK_PHASES
    assert found.of_frame.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert found.of_inferences(state(opening, height)).tolist() == [0, 0, 1, 2, 3]
    # A gripper that closes on nothing and opens again approaches anew; one that drops and grasps, too.
    missed = task_phases(state([0.08, 0.04, 0.08, 0.04, 0.04], [0.1, 0.1, 0.1, 0.1, 0.13]))
    assert missed.of_frame.tolist() == [0, 1, 0, 1, 2]
    again = task_phases(state([0.08, 0.04, 0.04, 0.08, 0.04], [0.1, 0.1, 0.2, 0.2, 0.2]))
    assert again.of_frame.tolist() == [0, 1, 2, 3, 1]


def test_without_names_phases_are_quarters():
    found = task_phases(state([0.08] * 8, [0.1] * 8, names=("a", "b", "c")))
    assert found.names == QUARTERS
    assert found.of_frame.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# Tests and intervals


def test_sign_flips_are_those_of_plain_loops():
    rng = np.random.default_rng(3)
    values = rng.normal(0.3, 1, (6, 4))
    values[2, 1] = np.nan
    found = sign_flips(values)
    filled = np.nan_to_num(values)
    scale = np.sqrt((filled**2).sum(axis=0))
    flips = [
        [sum(s * row[c] for s, row in zip(signs, filled, strict=True)) / scale[c] for c in range(4)]
        for signs in itertools.product((1, -1), repeat=6)
    ]
    for c in range(4):
        observed = flips[0][c]
        assert found.statistic[c] == pytest.approx(observed)
        assert found.p[c] == pytest.approx(sum(f[c] >= observed - 1e-9 for f in flips) / 64)
        assert found.p_corrected[c] == pytest.approx(sum(max(f) >= observed - 1e-9 for f in flips) / 64)
    assert found.smallest == 1 / 64
    assert (found.p_corrected >= found.p).all()


def test_random_flips_agree_with_all_of_them_and_never_give_zero():
    values = np.random.default_rng(5).normal(0.4, 1, (10, 30))
    every, some = sign_flips(values), sign_flips(values, n_flips=1000, seed=1)
    np.testing.assert_allclose(some.p_corrected, every.p_corrected, atol=0.06)
    sure = sign_flips(np.ones((40, 2)), n_flips=200)
    assert (sure.p_corrected == 1 / 201).all()
    assert (sign_flips(np.zeros((4, 2))).p == 1).all()


def test_correction_holds_the_chance_of_a_false_find():
    """Of 300 experiments without an effect, each with 40 maps, about one in twenty may find one."""
    rng = np.random.default_rng(0)
    corrected, plain = 0, 0
    for _ in range(300):
        found = sign_flips(rng.normal(size=(8, 40)))
        corrected += found.p_corrected.min() <= 0.05
        plain += found.p.min() <= 0.05
    assert corrected <= 300 * 0.05 + 3 * math.sqrt(300 * 0.05 * 0.95)
    assert plain > 150


def test_interval_of_the_mean_is_scipys_at_the_expanded_percentiles():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).normal(3, 2, (9, 3))
    values[4, 1] = np.nan
    low, high = interval_of_mean(values, 0.9, 800, 7)
    for column in range(3):
        own = values[np.isfinite(values[:, column]), column]
        n = len(own)
        tail = stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(0.05, n - 1))
        expected = stats.bootstrap(
            (own,),
            np.mean,
            confidence_level=1 - 2 * tail,
            n_resamples=800,
            method="percentile",
            rng=np.random.default_rng(7),
        ).confidence_interval
        assert (low[column], high[column]) == (pytest.approx(expected.low), pytest.approx(expected.high))
    alone = interval_of_mean(values[:1], 0.9, 800, 7)
    assert np.isnan(alone).all()


def test_interval_of_the_mean_holds_it_as_often_as_it_says():
    values = np.random.default_rng(2).normal(0, 1, (6, 2000))
    low, high = interval_of_mean(values, 0.9, 1000, 0)
    assert 0.87 < ((low <= 0) & (high >= 0)).mean() < 0.94


def test_explorers_timeline_has_the_same_numbers(planted):
    from lerobot_attn.explorer.scene import role_shares

    for camera in (IMAGE, WRIST):
        found = role_shares(planted, 0, camera, analysis.attention(planted.arrays, layer=2, head=1))
        mine = grounding(planted.arrays, layer=2, head=1, cameras=[camera], roles=found["roles"])
        for name, kind in (("share", "value"), ("chance", "uniform")):
            expected = mine[kind].sel(camera=camera, metric="mass").values
            np.testing.assert_allclose(np.array(found[name], float), expected, atol=1e-4)
