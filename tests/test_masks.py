"""Masks: roles, and the share of each patch that lies in a mask."""

import numpy as np
import pytest

from lerobot_attn.errors import ConfigError
from lerobot_attn.layout import ImageGeometry
from lerobot_attn.masks import Instance, SceneMasks, instances_of, patch_coverage

NAMES = ("background", "soup_1", "basket_1", "robot0")


def sampled(mask, geometry, n=16):
    """The coverage by brute force: n × n points in each patch, each asked for the pixel it shows."""
    g = geometry
    inside = np.zeros((g.grid_rows * n, g.grid_columns * n))
    for i, j in np.ndindex(inside.shape):
        y = (i + 0.5) / n * g.input_height_px / g.grid_rows - g.pad_top_px
        x = (j + 0.5) / n * g.input_width_px / g.grid_columns - g.pad_left_px
        row = int(np.floor(y / g.resized_height_px * mask.shape[0]))
        column = int(np.floor(x / g.resized_width_px * mask.shape[1]))
        if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]:
            inside[i, j] = mask[row, column]
    return inside.reshape(g.grid_rows, n, g.grid_columns, n).mean(axis=(1, 3))


@pytest.mark.parametrize("padding", ["centred", "left_top"])
@pytest.mark.parametrize("mask_px", [(48, 64), (24, 32), (96, 128)])
def test_coverage_is_the_area_that_each_patch_shows_of_the_mask(padding, mask_px):
    geometry = ImageGeometry.letterbox((48, 64), (56, 56), (4, 4), padding=padding)
    mask = np.random.default_rng(0).random(mask_px) < 0.3
    found = patch_coverage(mask, geometry)
    # The grid of points is as fine as the patches' and the pixels' edges allow.
    np.testing.assert_allclose(found, sampled(mask, geometry, 28), atol=0.05)
    visible = geometry.resized_height_px * geometry.resized_width_px
    whole = patch_coverage(np.ones(mask_px, bool), geometry)
    assert whole.sum() * (56 / 4) ** 2 == pytest.approx(visible)
    assert found.sum() / whole.sum() == pytest.approx(mask.mean())


def test_of_an_image_that_was_cropped_only_the_rest_is_covered():
    geometry = ImageGeometry(48, 64, 60, 80, -6, -10, 48, 60, 3, 4)
    rng = np.random.default_rng(0)
    mask = rng.random((48, 64)) < 0.3
    np.testing.assert_allclose(patch_coverage(mask, geometry), by_matrices(mask, geometry), atol=1e-12)
    np.testing.assert_allclose(patch_coverage(np.ones((48, 64), bool), geometry), 1)
    border = np.ones((48, 64), bool)
    border[5:43, 8:56] = False  # of 60 px 6 are cut off above, so 4.8 of the image's 48
    found = patch_coverage(border, geometry)
    assert found[0].max() < 0.02
    assert not found[1, 1:3].any()


def by_matrices(mask, g):
    """The coverage as two products of matrices: how long each pixel's overlap with each patch is."""

    def overlaps(pixels, pad, resized, whole, patches):
        pixel = pad + np.arange(pixels + 1) * resized / pixels
        patch = np.arange(patches + 1) * whole / patches
        low, high = np.maximum(pixel[:-1], patch[:-1, None]), np.minimum(pixel[1:], patch[1:, None])
        return np.clip(high - low, 0, None) / (whole / patches)

    rows = overlaps(mask.shape[-2], g.pad_top_px, g.resized_height_px, g.input_height_px, g.grid_rows)
    columns = overlaps(mask.shape[-1], g.pad_left_px, g.resized_width_px, g.input_width_px, g.grid_columns)
    return rows @ mask @ columns.T


@pytest.mark.parametrize("seed", range(12))
def test_coverage_is_exact_to_the_fraction_of_a_pixel(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(6, 200, 2)
    grid = tuple(rng.integers(1, 9, 2))
    geometry = ImageGeometry.letterbox(
        (height, width), (56, 70), grid, padding=["centred", "left_top"][seed % 2]
    )
    factor = (1, 2, 0.5)[seed % 3]
    mask = rng.random((2, int(height * factor), int(width * factor))) < 0.3
    found, expected = patch_coverage(mask, geometry), by_matrices(mask, geometry)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    empty = np.zeros_like(mask)
    empty[1, : height // 3] = True
    covered = patch_coverage(empty, geometry)
    np.testing.assert_array_equal(covered[0], 0)
    np.testing.assert_allclose(covered, by_matrices(empty, geometry), rtol=0, atol=1e-12)
    assert patch_coverage(empty[1], geometry).shape == grid


def test_padding_and_what_is_not_in_the_mask_is_not_covered():
    geometry = ImageGeometry.letterbox((32, 64), (64, 64), (4, 4), padding="centred")
    mask = np.zeros((2, 32, 64), bool)
    mask[1, :16, :16] = True  # one patch, below the one row that is padding
    found = patch_coverage(mask, geometry)
    assert found.shape == (2, 4, 4)
    expected = np.zeros((2, 4, 4))
    expected[1, 1, 0] = 1
    np.testing.assert_allclose(found, expected)


def test_roles():
    instances = instances_of(NAMES, {"soup_1": "target", "robot0": "robot"}, where="roles")
    assert [instance.role for instance in instances] == ["background", "target", "distractor", "robot"]
    assert instances[1] == Instance("soup_1", "target")
    mask = np.array([[0, 1], [3, -1]], np.int16)
    scene = SceneMasks(instances, {"image": mask})
    np.testing.assert_array_equal(scene.of_role("image", "target"), [[False, True], [False, False]])
    with pytest.raises(ConfigError, match="camera 'wrist' has no mask; expected one of: image"):
        scene.of_role("wrist", "target")
    with pytest.raises(ConfigError, match="role 'destination': the scene has nothing of it"):
        scene.of_role("image", "destination")
    with pytest.raises(ConfigError, match="roles, soup_1: got role 'goal', expected one of target"):
        instances_of(NAMES, {"soup_1": "goal"}, where="roles")
    with pytest.raises(ConfigError, match="roles: got a role of 'milk_1', expected one of background"):
        instances_of(NAMES, {"milk_1": "target"}, where="roles")
