"""Rows sum to 1 over the keys that a layer can see; keys that it cannot see are absent."""

import pytest
import zarr

from lerobot_attn.store.reader import open_episode
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode
from lerobot_attn.verify import verify_episode

PLAN = SyntheticPlan(n_frames=6, layers=(0, 1, 2, 3), n_layers=4, prefix_only_layers=(1, 3))


@pytest.fixture
def path(tmp_path):
    return write_planted_episode(tmp_path, PLAN)


def row_check(path):
    return next(check for check in verify_episode(open_episode(path)).checks if check.name == "row sums")


def test_rows_are_summed_over_the_keys_that_the_layer_can_see(path):
    found = row_check(path)
    assert found.passed is True, found.detail


@pytest.mark.parametrize("layer", [1, 3])
def test_numbers_where_the_layer_sees_nothing_are_not_believed(path, layer):
    zarr.open_array(path / "suffix_attention", mode="r+")[0, 0, layer, :, :, -1] = 0.0
    assert row_check(path).passed is False


@pytest.mark.parametrize("layer", [0, 1])
def test_a_seen_key_that_is_not_a_number_is_an_error(path, layer):
    zarr.open_array(path / "suffix_attention", mode="r+")[0, 0, layer, 0, 0, 2] = float("nan")
    assert row_check(path).passed is False
