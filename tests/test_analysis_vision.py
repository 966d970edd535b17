"""Attention inside the vision tower, from stores whose truth is planted: analysis, figure, and bad input."""

import dataclasses

import numpy as np
import pytest
import zarr
from test_plot import heatmaps
from test_verify import edit

from lerobot_attn import analysis
from lerobot_attn.errors import ConfigError, SelectionError
from lerobot_attn.plot import PlotSettings, plot
from lerobot_attn.store.reader import open_episode
from lerobot_attn.synthetic import (
    FAMILIES,
    SyntheticPlan,
    planted_partner,
    planted_patch,
    write_planted_episode,
)
from lerobot_attn.verify import verify_episode

PLAN = SyntheticPlan(
    grid=(4, 5),
    vision_grid=(8, 10),
    vision_layers=(0, 1, 3),
    input_px=(224, 280),
    padding="left_top",
    videos=False,
)


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    return open_episode(write_planted_episode(tmp_path_factory.mktemp("planted"), PLAN))


def brightest(array):
    return tuple(map(int, np.unravel_index(int(np.argmax(array.values)), array.shape)))


@pytest.mark.parametrize("kind", ["arrays", "dataset"])
@pytest.mark.parametrize("camera", [0, 1])
def test_a_patch_finds_its_planted_partner(episode, kind, camera):
    name = list(PLAN.image_px)[camera]
    for inference, layer, head in ((0, 0, 0), (2, 3, 1), (3, 1, 2)):
        for patch in ((0, 0), (3, 9), (7, 4)):
            found = analysis.attention_from_patch(
                getattr(episode, kind), patch, name, inference=inference, layer=layer, head=head
            ).compute()
            assert found.dims == ("grid_y", "grid_x")
            assert found.sum() == pytest.approx(1, abs=2e-3)
            at = {"inference": inference, "camera": camera, "layer": layer, "head": head}
            assert brightest(found) == planted_partner(PLAN, patch, **at)
            assert found.max() == pytest.approx(0.75, abs=1e-3)


def test_dimensions_are_those_that_were_asked_for(episode):
    data = episode.dataset
    every = analysis.vision_attention(data, "wrist", layer="all", head="all")
    assert every.dims == ("inference", "vision_layer", "vision_head", "patch_query", "patch_key")
    assert every.shape == (4, 3, 3, 80, 80)
    assert every.chunks is not None
    by_frame = analysis.attention_from_patch(data, (1, 2), "wrist", frame=[0, 5, 4], layer="mean", head="max")
    assert by_frame.dims == ("frame", "grid_y", "grid_x")
    assert by_frame.frame.values.tolist() == [0, 5, 4]
    np.testing.assert_array_equal(
        by_frame.sel(frame=5),
        every.isel(inference=1, patch_query=12).mean("vision_layer").max("vision_head").values.reshape(8, 10),
    )
    area = analysis.attention_from_patch(data, ([1, 2], [3, 4, 5]), "wrist", inference=0, layer=-1)
    rows = [row * 10 + column for row in (1, 2) for column in (3, 4, 5)]
    expected = every.isel(inference=0).sel(vision_layer=3).mean("vision_head").values[rows].mean(axis=0)
    np.testing.assert_allclose(area.values.ravel(), expected, rtol=1e-6)
    assert area.attrs["query"] == "mean of patches at row 1-2, column 3-5"


def test_rollout_is_the_product_of_the_layers(tmp_path):
    plan = dataclasses.replace(PLAN, vision_layers=(0, 1, 2))
    data = open_episode(write_planted_episode(tmp_path, plan)).dataset
    stored = data.vision_attention.values.astype(np.float64)[1, 1].mean(axis=1)
    product = np.eye(80)
    for maps in stored:
        product = (np.eye(80) / 2 + maps / maps.sum(-1, keepdims=True) / 2) @ product
    found = analysis.vision_rollout(data, (4, 6), "wrist", inference=1)
    np.testing.assert_allclose(found.values.ravel(), product[46], atol=1e-5)
    assert found.sum() == pytest.approx(1, abs=1e-5)
    below = analysis.vision_rollout(data, (4, 6), "wrist", frame=[3, 0, 3], layer=1)
    assert below.dims == ("frame", "grid_y", "grid_x")
    np.testing.assert_array_equal(below[0], below[2])
    np.testing.assert_array_equal(
        below[1], analysis.vision_rollout(data, (4, 6), "wrist", inference=0, layer=1)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: analysis.attention_from_patch(d, (8, 0)), "patch row 8 does not exist: .* 8 x 10 patches"),
        (lambda d: analysis.attention_from_patch(d, (0, -1)), "patch column -1 does not exist"),
        (lambda d: analysis.attention_from_patch(d, (1,)), "expected a row and a column"),
        (lambda d: analysis.attention_from_patch(d, 3), "expected a row and a column"),
        (lambda d: analysis.attention_from_patch(d, (0, 0), "left"), "camera 'left' does not exist"),
        (lambda d: analysis.vision_attention(d, layer=2), "vision layer 2 was not saved; saved are 0-1, 3"),
        (lambda d: analysis.vision_attention(d, head=3), "vision head 3 was not saved; saved are 0-2"),
        (lambda d: analysis.vision_attention(d, frame=99), "frame 99 does not exist"),
        (lambda d: analysis.vision_rollout(d, (0, 0)), "every vision layer up to 3; not saved are 2; record"),
        (lambda d: analysis.vision_rollout(d, (0, 0), layer="all"), "the output of one layer, got 'all'"),
        (lambda d: analysis.vision_rollout(d, (0, 0), layer=1, head="all"), "expected one head"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(episode, call, message):
    with pytest.raises(SelectionError, match=message) as caught:
        call(episode.dataset)
    assert "\n" not in str(caught.value)


def test_without_vision_maps_it_says_how_to_get_them(tmp_path):
    bare = open_episode(write_planted_episode(tmp_path, SyntheticPlan(n_frames=3, videos=False)))
    for call in (
        lambda: analysis.vision_attention(bare.dataset),
        lambda: plot(bare, "vision", PlotSettings(patch="0,0")),
    ):
        with pytest.raises(SelectionError, match=r"not captured; record .* --eval\.attention\.vision_layers"):
            call()


@pytest.mark.parametrize("patch", ["3", "1,2,3", "a,b", "-1,2", (1,), 4, "1,", ("x", 2)])
def test_patches_that_are_none(patch):
    with pytest.raises(ConfigError, match=r"patch: got .*, expected ROW,COLUMN"):
        PlotSettings(patch=patch)


@pytest.mark.parametrize("patch", ["3,4", (3, 4), [3, 4], " 3 , 4 "])
def test_patches_that_are_one(patch):
    assert PlotSettings(patch=patch).patch == (3, 4)


@pytest.mark.parametrize("camera", [0, 1])
def test_the_figure_shows_the_partner_on_the_cameras_own_pixels(episode, camera):
    name = list(PLAN.image_px)[camera]
    figure = plot(episode, "vision", PlotSettings(frames=4, cameras=[name], patch="5,6", heads=2))
    shown = heatmaps(figure)
    assert [title for title, _, _ in shown] == ["layer 0", "layer 1", "layer 3"]
    geometry = dataclasses.replace(PLAN.layout.cameras[camera].geometry, grid_rows=8, grid_columns=10)
    for (_, image, heat), layer in zip(shown, (0, 1, 3), strict=True):
        partner = planted_partner(PLAN, (5, 6), inference=1, camera=camera, layer=layer, head=2)
        at = {
            patch: np.array([geometry.patch_at(y + 0.5, x + 0.5) == patch for y, x in np.ndindex(heat.shape)])
            for patch in (partner, (5, 6))
        }
        visible = at[partner].reshape(heat.shape)
        if visible.any():  # else it lies on the letterbox's padding
            np.testing.assert_array_equal(heat == heat.max(), visible)
        marked = (image == (0, 255, 255)).all(axis=-1)
        assert marked.any()
        assert not (marked & at[5, 6].reshape(heat.shape)).any()
        rows, columns = np.nonzero(marked)
        inside = np.nonzero(at[5, 6].reshape(heat.shape))
        assert (rows.min(), columns.min()) == (inside[0].min() - 1, inside[1].min() - 1)


def test_the_figure_begins_where_the_actions_look(episode):
    """A token of this plan stands for 2 x 2 patches."""
    figure = plot(episode, "vision", PlotSettings(frames=5, cameras="image"))
    where = {"frame": 5, "layer": 3, "denoise_step": 2}
    heat = analysis.image_heatmap(episode.arrays, "image", **where)
    row, column = brightest(heat)
    assert (row, column) in [planted_patch(PLAN, 0, head=head, **where) for head in range(2)]
    (title,) = [axes.get_title() for axes in figure.axes if "patch" in axes.get_title()]
    expected = f"patch {2 * row}–{2 * row + 1}, {2 * column}–{2 * column + 1}"
    assert expected in title


def test_heads_stand_side_by_side(episode):
    figure = plot(episode, "vision", PlotSettings(patch="0,0", cameras="image", heads="all", layers=1))
    assert [title for title, _, _ in heatmaps(figure)] == ["head 0", "head 1", "head 2"]
    with pytest.raises(SelectionError, match="several layers or several heads"):
        plot(episode, "vision", PlotSettings(patch="0,0", heads="all", layers="all"))


def broken(name, function):
    return lambda path: edit(path, name, function)


def swap(values):
    values[:] = values[::-1].copy()


BROKEN = {
    "rows that do not sum to 1": (
        broken("vision_attention", lambda v: v.__setitem__((0, 1, 2, 0, 5), 0)),
        "inference 0, camera observation.images.wrist, layer 3",
    ),
    "a missing row": (broken("vision_attention", lambda v: v.__setitem__((0, 0, 0, 0, 5), np.nan)), "is inf"),
    "rows for columns": (broken("patch_row", swap), "patch_row is not that of a grid"),
    "swapped cameras": (broken("camera", swap), "the layout's cameras with an image"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_verify_names_what_is_wrong(tmp_path, change, message):
    path = write_planted_episode(tmp_path, PLAN)
    change(path)
    checks = {check.name: check for check in verify_episode(open_episode(path)).checks}
    assert checks["vision maps"].passed is False
    assert message in checks["vision maps"].detail


def test_verify_checks_them_where_there_are_any(episode, tmp_path):
    checks = {check.name: check for check in verify_episode(episode).checks}
    assert checks["vision maps"].passed
    assert "patches of 8 x 10" in checks["vision maps"].detail
    bare = open_episode(write_planted_episode(tmp_path, dataclasses.replace(PLAN, vision_layers=())))
    assert "vision maps" not in {check.name for check in verify_episode(bare).checks}


@pytest.mark.parametrize("name", ["pi05", "smolvla"])
def test_families_plant_them(tmp_path, name):
    plan = dataclasses.replace(FAMILIES[name], videos=False)
    data = open_episode(write_planted_episode(tmp_path, plan)).arrays
    found = analysis.attention_from_patch(data, (1, 3), "wrist", inference=2, layer=1, head=2)
    assert found.shape == plan.patches
    assert brightest(found) == planted_partner(plan, (1, 3), inference=2, camera=1, layer=1, head=2)


def test_a_missing_map_is_missing_in_what_needs_it_alone(tmp_path):
    path = write_planted_episode(tmp_path, PLAN)
    zarr.open_array(path / "vision_attention", mode="r+")[1, 0, 2] = np.nan
    data = open_episode(path).arrays
    found = analysis.attention_from_patch(data, (0, 0), "image", inference="all", layer="all")
    assert np.isnan(found.values).all(axis=(-1, -2)).tolist() == [
        [False, False, inference == 1] for inference in range(4)
    ]
    assert np.isfinite(analysis.attention_from_patch(data, (0, 0), "wrist", layer="all")).all()
