"""Importance, its rank correlation with attention, and the curves: against truth that was planted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata, spearmanr

from lerobot_attn.analysis.intervals import interval_of_mean
from lerobot_attn.analysis.saliency import (
    SHARES,
    Patches,
    against_shifts,
    curve_areas,
    gain,
    hidden_along,
    importance_of,
    random_masks,
    random_ranking,
    ranking,
    shifted_correlations,
    shifted_ranking,
)
from lerobot_attn.figures.canvas import Caption
from lerobot_attn.figures.saliency import Picture, maps_figure
from lerobot_attn.layout import ImageGeometry

# A wide picture: of 8 × 8 patches the rows 2 to 5 show something of it.
WIDE = ImageGeometry.letterbox((32, 64), (64, 64), (8, 8), padding="centred")
SQUARE = ImageGeometry.letterbox((48, 48), (64, 64), (8, 8), padding="centred")
PATCHES = Patches({"wide": WIDE, "square": SQUARE})


def rng(seed=0):
    return np.random.default_rng(seed)


def smooth(seed, size=16):
    return gaussian_filter(rng(seed).normal(size=(size, size)), 3, mode="wrap")


# Patches


def test_patches_on_padding_have_no_number():
    assert len(PATCHES) == 4 * 8 + 64
    numbers = np.arange(len(PATCHES), dtype=float)
    grid = PATCHES.on_grid(numbers, "wide")
    assert np.isnan(grid[[0, 1, 6, 7]]).all()
    np.testing.assert_array_equal(grid[2:6], np.arange(32).reshape(4, 8))
    assert PATCHES.rectangle(numbers, "wide").shape == (4, 8)
    grids = {camera: PATCHES.on_grid(numbers[None], camera) for camera in PATCHES.cameras}
    np.testing.assert_array_equal(PATCHES.of_grids(grids), numbers[None])


# Importance


@pytest.mark.parametrize(("share", "per_round"), [(0.5, 2), (0.25, 4), (1 / 16, 16)])
def test_each_round_of_masks_hides_every_patch_once(share, per_round):
    masks = random_masks(PATCHES, 3 * per_round - 1, hidden_share=share, rng=rng())
    assert masks.shape == (3 * per_round, len(PATCHES))
    rounds = masks.reshape(3, per_round, -1).sum(axis=1)
    np.testing.assert_array_equal(rounds, np.ones_like(rounds))
    assert not np.array_equal(masks[:per_round], masks[per_round : 2 * per_round])


def test_large_grids_are_hidden_in_cells_at_random_offsets():
    patches = Patches({"a": ImageGeometry.letterbox((64, 64), (64, 64), (16, 16), padding="centred")})
    masks = random_masks(patches, 64, hidden_share=0.25, rng=rng())
    grids = patches.rectangle(masks, "a")
    inside = np.diff(grids, axis=2).any(axis=(0, 1))
    assert inside.all(), "cells of two patches begin at even and at odd columns"
    # In one mask cells are two wide: a hidden patch's left or right neighbour is hidden, but at the rim.
    alone = grids[:, :, 1:-1] & ~grids[:, :, :-2] & ~grids[:, :, 2:]
    assert not alone.any()


def test_importance_is_the_change_with_a_patch_hidden_less_that_with_it_shown():
    hidden = np.array([[True, False], [True, True], [False, True], [False, False]])
    np.testing.assert_allclose(importance_of(hidden, [5.0, 9.0, 2.0, 0.0]), [7 - 1, 5.5 - 2.5])


@pytest.mark.parametrize("seed", range(3))
def test_importance_peaks_at_the_one_patch_that_matters(seed):
    masks = random_masks(PATCHES, 64, hidden_share=0.25, rng=rng(seed))
    importance = importance_of(masks, 3.0 * masks[:, 40])
    assert importance.argmax() == 40
    assert importance[40] == pytest.approx(3)
    assert np.delete(importance, 40).max() < 2


# Rank correlation


def test_rank_correlation_is_spearmans_and_shifts_are_all_of_the_circular_ones():
    importance, other = rng(0).integers(0, 5, (3, 4)), rng(1).normal(size=(3, 4))
    maps = np.stack([other, np.exp(importance), -importance, np.ones((3, 4))])
    found = shifted_correlations(importance, maps)
    assert found.shape == (12, 4)
    assert found[0, 0] == pytest.approx(spearmanr(importance.ravel(), other.ravel())[0])
    np.testing.assert_allclose(found[0, 1:3], [1, -1])
    assert np.isnan(found[:, 3]).all()
    shifts = [np.roll(importance, (down, across), (0, 1)) for down in range(3) for across in range(4)]
    expected = [spearmanr(shift.ravel(), other.ravel())[0] for shift in shifts]
    np.testing.assert_allclose(found[:, 0], expected)


def test_smooth_unrelated_maps_are_at_chance_under_shifts_and_not_under_shuffled_patches():
    """Why the null is circular shifts: shuffled patches call smooth maps significant far too often."""
    by_shift, by_shuffle = [], []
    for seed in range(50):
        importance, other = smooth(2 * seed), smooth(2 * seed + 1)
        found = against_shifts([shifted_correlations(importance, other[None])], [0])
        by_shift.append(found.p[0])
        ranks, theirs = rankdata(importance), rankdata(other)
        shuffled = [np.corrcoef(rng(i).permutation(ranks), theirs)[0, 1] for i in range(20)]
        by_shuffle.append(np.mean(np.array([np.inf, *shuffled]) >= found.value[0]))
        assert found.chance[0] == pytest.approx(0, abs=0.02)
        assert found.chance_low[0] < 0 < found.chance_high[0]
    assert np.mean(np.array(by_shift) < 0.05) <= 0.1
    assert np.mean(np.array(by_shuffle) < 0.05) > 0.25


def test_a_map_that_is_the_importance_correlates_fully_and_beyond_chance():
    importances = [smooth(seed) for seed in range(4)]
    found = against_shifts([shifted_correlations(i, np.stack([i, i[::-1]])) for i in importances], [0] * 4)
    assert found.value[0] == pytest.approx(1)
    assert found.p[0] == pytest.approx(1 / 256)
    assert found.p[1] > 0.1
    assert found.chance_high[0] < 0.9


def test_a_coincidence_that_lasts_for_an_episode_counts_once():
    """Twenty frames with the same maps say no more than one; as twenty episodes they would."""
    one = shifted_correlations(smooth(6), -smooth(9)[None])
    alone = against_shifts([one], [0])
    assert 0.15 < alone.value[0] < alone.chance_high[0]
    as_frames, as_episodes = (against_shifts([one] * 20, names) for names in ([3] * 20, range(20)))
    np.testing.assert_allclose(as_frames.p, alone.p)
    assert as_episodes.p[0] < 0.01 < as_frames.p[0]


def test_p_counts_how_many_maps_were_tried():
    importance = smooth(6)
    maps = np.stack([-smooth(seed) for seed in range(9, 59)])
    one = against_shifts([shifted_correlations(importance, maps[:1])], [0])
    many = against_shifts([shifted_correlations(importance, maps)], [0])
    assert many.p[0] > one.p[0]


# Curves


def test_areas_under_curves_by_hand():
    shares = (0.25, 0.5)
    # Trapezoids of deletion 0, 4, 6, 8 and insertion 8, 2, 1, 0 over 0, 0.25, 0.5, 1, in units of 8.
    deletion, insertion = (0.25 * 2 + 0.25 * 5 + 0.5 * 7) / 8, (0.25 * 5 + 0.25 * 1.5 + 0.5 * 0.5) / 8
    found = curve_areas([[4, 6], [2, 1]], 8.0, shares)
    np.testing.assert_allclose(found, [deletion, insertion])
    assert np.isnan(curve_areas([[0, 0], [0, 0]], 0.0, shares)).all()
    np.testing.assert_allclose(gain([0.7, 0.2], [0.5, 0.6]), [0.2, 0.4])


def test_deletion_hides_the_first_of_a_ranking_and_insertion_shows_them_alone():
    order = np.array([3, 0, 2, 1])
    deletion, insertion = hidden_along(order, (0.01, 0.5, 0.75))
    np.testing.assert_array_equal(
        deletion, [[0, 0, 0, 1], [1, 0, 0, 1], [1, 0, 1, 1]], "at least one is hidden"
    )
    np.testing.assert_array_equal(insertion, ~deletion)


def test_ranking_is_descending_with_ties_at_random_and_missing_ones_last():
    score = np.array([0.0, 2.0, np.nan, 1.0, 0.0, 0.0])
    orders = np.stack([ranking(score, rng(seed)) for seed in range(20)])
    assert (orders[:, :2] == [1, 3]).all()
    assert (orders[:, -1] == 2).all()
    assert len({tuple(order) for order in orders}) > 1


def test_a_random_ranking_has_the_cameras_of_the_order_that_it_stands_beside():
    order = rng(2).permutation(len(PATCHES))
    random = random_ranking(order, PATCHES, rng(3))
    assert sorted(random) == sorted(order)
    np.testing.assert_array_equal(random < 32, order < 32)
    assert (random != order).mean() > 0.9


def test_a_shifted_ranking_stays_in_its_camera_and_keeps_its_clumps():
    score = np.zeros(len(PATCHES))
    score[PATCHES.places["square"]] = np.arange(64) + 1
    moved = shifted_ranking(score, PATCHES, rng(1))
    place = np.empty(len(PATCHES), int)
    place[moved] = np.arange(len(PATCHES))
    ranks = PATCHES.rectangle(place, "square")
    assert set(moved[:64]) == set(range(32, 96))
    assert moved[0] != 95, "moved by one patch at least"
    again = [np.roll(ranks, (d, a), (0, 1)) for d in range(8) for a in range(8)]
    assert any(np.array_equal(np.sort(one.ravel())[::-1], one.ravel()) for one in again)


def test_the_interval_of_a_mean_covers_it_and_leaves_out_what_is_missing():
    values = np.stack([rng(0).normal(5, 1, 200), np.full(200, np.nan)], axis=1)
    values[0, 1] = 3.0
    low, high = interval_of_mean(values, 0.95, 500, 0)
    assert low[0] < 5 < high[0]
    assert high[0] - low[0] == pytest.approx(2 * 1.96 / np.sqrt(200), rel=0.2)
    assert np.isnan([low[1], high[1]]).all()


def test_shares_are_dense_where_a_few_patches_matter():
    assert list(SHARES) == sorted(SHARES)
    assert SHARES[0] < 0.02


def test_the_figure_of_maps_names_camera_importance_and_attention():
    picture = Picture("wrist", np.zeros((8, 8, 3), np.uint8), *np.ones((2, 8, 8), np.float32))
    figure = maps_figure([("frame 3", [picture]), ("frame 9", [picture])], Caption(["a"]))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:6] == ["wrist", "importance", "attention", "", "", ""]
