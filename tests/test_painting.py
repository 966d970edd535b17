"""What stands in the place of a part of a picture: one mean colour, one blur, for all who hide something."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from lerobot_attn.interventions.painting import blurred, inpainted, mean_colour


@pytest.fixture(scope="module")
def picture():
    return torch.from_numpy(np.random.default_rng(0).random((2, 3, 60, 96), np.float32))


def hidden(rows, columns, shape=(2, 1, 60, 96)):
    found = torch.zeros(shape, dtype=torch.bool)
    found[0, :, rows, columns] = True
    return found


def gaussian(picture):
    sigma = 96 / 16
    return gaussian_filter(picture.double().numpy(), (0, 0, sigma, sigma), mode="mirror", truncate=3)


def test_the_blur_is_a_gaussian_of_a_sixteenth_of_the_longer_side(picture):
    np.testing.assert_allclose(blurred(picture), gaussian(picture), atol=1e-6)
    # Of a picture whose shorter side is less than the Gaussian reaches, the mirror is one side wide.
    thin = blurred(picture[..., :5, :])
    assert thin.shape == (2, 3, 5, 96)
    torch.testing.assert_close(thin.mean((2, 3)), picture[..., :5, :].mean((2, 3)), atol=0.05, rtol=0)


@pytest.mark.parametrize(("rows", "columns"), [((0, 7), (90, 96)), ((20, 30), (40, 41)), ((59, 60), (0, 96))])
def test_only_the_box_around_what_is_hidden_is_worked_out(picture, rows, columns):
    box = slice(*rows), slice(*columns)
    found = blurred(picture, hidden(*box))
    np.testing.assert_allclose(found[..., *box], gaussian(picture)[..., *box], atol=1e-6)
    outside = ~hidden(*box)[:1].expand_as(found)
    assert torch.equal(found[outside], picture[outside])
    assert torch.equal(blurred(picture, hidden(slice(0), slice(0))), picture)


def test_the_blur_is_as_fine_under_autocast(picture):
    with torch.autocast("cpu"):
        found = blurred(picture)
    assert torch.equal(found, blurred(picture))


def test_the_mean_colour_is_that_of_the_rest(picture):
    box = hidden(slice(0, 30), slice(None))
    found = mean_colour(picture, box)
    torch.testing.assert_close(found[0, :, 0, 0], picture[0, :, 30:].mean((1, 2)))
    torch.testing.assert_close(found[1, :, 0, 0], picture[1].mean((1, 2)))
    torch.testing.assert_close(mean_colour(picture), picture.mean((2, 3), keepdim=True))
    torch.testing.assert_close(mean_colour(picture, torch.ones_like(box)), mean_colour(picture))


@pytest.mark.parametrize(("rows", "columns"), [((0, 9), (90, 96)), ((20, 37), (40, 52)), ((12, 13), (0, 96))])
def test_each_inpainted_pixel_is_the_mean_of_its_neighbours(picture, rows, columns):
    box = hidden(slice(*rows), slice(*columns))
    found = inpainted(picture, box)
    around = torch.nn.functional.pad(found, (1, 1, 1, 1), value=float("nan"))
    above, below = around[..., :-2, 1:-1], around[..., 2:, 1:-1]
    left, right = around[..., 1:-1, :-2], around[..., 1:-1, 2:]
    mean = torch.stack([above, below, left, right]).nanmean(0)
    inside = box[0].expand(3, -1, -1)
    torch.testing.assert_close(found[0][inside], mean[0][inside], atol=1e-6, rtol=0)


def test_without_a_rim_the_mean_colour_is_inpainted(picture):
    found = inpainted(picture, torch.ones(2, 1, 60, 96, dtype=torch.bool))
    torch.testing.assert_close(found, picture.mean((2, 3), keepdim=True).expand_as(picture))
