"""The colour scale: the same value has the same colour and opacity wherever it is painted."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lerobot_attn.errors import ConfigError
from lerobot_attn.figures.images import draw_overlay
from lerobot_attn.figures.scale import MISSING_RGB, ColourScale, rgba_table


def test_opacity_grows_with_the_root_and_colour_with_the_value():
    values = np.array([0, 0.25, 1], np.float32) * np.float32(0.4)
    scale = ColourScale(0.4, "gray", 0.8)
    np.testing.assert_array_equal(scale.colours(values)[:, 0], [0, 64, 255])
    np.testing.assert_allclose(scale.opacity(values), [0, 0.4, 0.8], atol=1 / 255)
    np.testing.assert_array_equal(scale.rgba(values)[:, 3], [0, 102, 204])
    np.testing.assert_array_equal(scale.rgba(values, opaque=True)[:, 3], 255)


@pytest.mark.parametrize("name", ["inferno", "viridis", "gray"])
def test_values_beyond_the_range_have_its_last_colours(name):
    scale = ColourScale(2.0, name, 1.0, vmin=1.0)
    low, first, last, high = scale.rgba(np.array([-5, 1, 2, 9], np.float32))
    np.testing.assert_array_equal(low, first)
    np.testing.assert_array_equal(last, high)
    expected = np.round(np.array(mpl.colormaps[name]([0.0, 1.0]))[:, :3] * 255)
    np.testing.assert_array_equal([first[:3], last[:3]], expected)


def test_a_range_that_ends_where_it_begins_has_the_first_colour():
    scale = ColourScale(0.0, "viridis")
    np.testing.assert_array_equal(scale.steps(np.array([0, 1, 7], np.float32)), 0)


def test_missing_is_transparent_over_an_image_and_grey_without():
    values = np.array([[np.nan, 1]], np.float32)
    image = np.full((1, 2, 3), 120, np.uint8)
    scale = ColourScale(1.0, "gray", 0.5)
    np.testing.assert_array_equal(scale.over(image, values)[0, 0], 120)
    np.testing.assert_array_equal(scale.rgba(values)[0, 0], 0)
    np.testing.assert_array_equal(scale.colours(values)[0, 0], MISSING_RGB)
    assert scale.opacity(values)[0, 0] == 0


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.0])
def test_figures_and_overlays_paint_the_same(alpha):
    heat = np.linspace(0, 1.2, 256, dtype=np.float32).reshape(16, 16)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    figure = Figure(figsize=(0.16, 0.16), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    draw_overlay(axes, image, heat, vmax=1.0, cmap="inferno", alpha=alpha)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    painted = ColourScale(1.0, "inferno", alpha).over(image, heat).astype(int)
    assert np.abs(drawn - painted).max() <= 4


def test_the_table_holds_what_the_scale_paints():
    table = rgba_table(["magma"], [None, 0.6])
    assert {(row["alpha"], row["vmax"]) for row in table} == {
        (a, v) for a in (None, 0.6) for v in (1, 0.37, 0)
    }
    for row in table:
        assert row["values"][-1] is None
        assert row["rgba"][-1] == [0, 0, 0, 0]
        assert len(row["values"]) == len(row["rgba"]) > 50
        steps = [ColourScale(row["vmax"]).steps(np.float32(v)) for v in row["values"][:-1]]
        alphas = [rgba[3] for rgba in row["rgba"][:-1]]
        expected = [255 if row["alpha"] is None else np.floor(153 * np.sqrt(s / 255) + 0.5) for s in steps]
        assert alphas == expected
    assert {rgba[3] for row in table if row["vmax"] == 0 and row["alpha"] for rgba in row["rgba"]} == {0}


def test_an_unknown_colour_map_is_named():
    with pytest.raises(ConfigError, match="colormap 'rainbows': unknown"):
        ColourScale(1.0, "rainbows").colours(np.zeros(1, np.float32))
