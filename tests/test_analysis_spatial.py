"""Heatmaps: planted patches found again, and the letterbox undone against a loop over pixels."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from lerobot_attn import open_episode
from lerobot_attn.analysis import (
    attention,
    camera_geometry,
    camera_names,
    image_heatmap,
    on_camera_pixels,
    padding_share,
    patch_of_pixels,
)
from lerobot_attn.analysis.spatial import NORMALISATIONS, by_camera, colour_range, episode_ranges
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import Camera, ImageGeometry, Segment, TokenLayout
from lerobot_attn.synthetic import SyntheticPlan, planted_patch, planted_shares, write_planted_episode

CAMERAS = {
    "observation.images.image": (96, 96),
    "observation.images.wrist": (61, 97),  # wide, odd
    "observation.images.top": (90, 50),  # tall
}
PATCH_SHARE = 0.75
STORED = {"layer": [2, 3], "head": "all", "denoise_step": "all"}


@pytest.fixture(scope="module", params=["centred", "left_top"])
def planted(request, tmp_path_factory):
    plan = SyntheticPlan(
        image_px=CAMERAS, grid=(8, 8), padding=request.param, n_frames=7, n_denoise_steps=2, videos=False
    )
    folder = tmp_path_factory.mktemp(request.param)
    episode = open_episode(write_planted_episode(folder, plan))
    return SimpleNamespace(plan=plan, episode=episode, data=episode.arrays)


def geometry_of(image, padding="centred", *, input_px=(224, 224), grid=(16, 16)):
    return ImageGeometry.letterbox(image, input_px, grid, padding=padding)


def patches_at(geometry, y, x, margin=1e-6):
    """Return the patches at a point; two or four where it lies on their edge within rounding."""
    points = itertools.product((y - margin, y + margin), (x - margin, x + margin))
    return {geometry.patch_at(*point) for point in points}


@pytest.mark.parametrize("padding", ["centred", "left_top"])
@pytest.mark.parametrize(
    ("image", "size", "input_px", "grid"),
    [
        ((96, 96), None, (224, 224), (16, 16)),
        ((96, 128), None, (224, 224), (16, 16)),
        ((128, 96), (64, 48), (224, 224), (16, 16)),
        ((61, 97), None, (224, 224), (16, 16)),
        ((97, 61), None, (224, 224), (16, 16)),
        ((480, 640), (31, 77), (224, 224), (16, 16)),
        ((720, 1280), (90, 160), (224, 224), (16, 16)),
        ((33, 7), (99, 20), (224, 224), (16, 16)),
        ((40, 60), (53, 41), (64, 96), (4, 7)),
        ((5, 5), (20, 20), (50, 50), (3, 3)),
        ((30, 31), None, (32, 32), (1, 1)),
    ],
    ids=str,
)
def test_each_pixel_shows_the_patch_at_its_centre(padding, image, size, input_px, grid):
    geometry = geometry_of(image, padding, input_px=input_px, grid=grid)
    numbers = np.arange(grid[0] * grid[1], dtype=np.float32).reshape(grid)
    found = on_camera_pixels(numbers, geometry, size_px=size)
    height, width = size or image
    assert found.shape == (height, width)
    assert found.dtype == np.float32
    on_edges = 0
    for i, j in np.ndindex(height, width):
        y, x = (i + 0.5) * image[0] / height, (j + 0.5) * image[1] / width
        allowed = patches_at(geometry, y, x)
        on_edges += len(allowed) > 1
        assert divmod(int(found[i, j]), grid[1]) in allowed, (i, j)
    assert on_edges < 0.2 * height * width


def test_leading_dimensions_stay_and_labels_are_not_needed():
    geometry = geometry_of((96, 128))
    maps = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    for interpolation in ("nearest", "linear"):
        whole = on_camera_pixels(maps, geometry, interpolation=interpolation)
        labelled = on_camera_pixels(
            xr.DataArray(maps, dims=("a", "b", "grid_y", "grid_x")), geometry, interpolation=interpolation
        )
        assert whole.shape == (2, 3, 96, 128)
        np.testing.assert_array_equal(whole, labelled)
        for at in np.ndindex(2, 3):
            one = on_camera_pixels(maps[at], geometry, interpolation=interpolation)
            np.testing.assert_allclose(whole[at], one, rtol=1e-6)


@pytest.mark.parametrize("padding", ["centred", "left_top"])
@pytest.mark.parametrize("image", [(96, 96), (61, 97), (97, 61), (30, 200)], ids=str)
@pytest.mark.parametrize("grid", [(16, 16), (3, 5), (2, 2), (1, 1)], ids=str)
def test_linear_interpolation_stays_between_the_patches(padding, image, grid):
    geometry = geometry_of(image, padding, grid=grid)
    constant = on_camera_pixels(np.full(grid, 0.3), geometry, interpolation="linear")
    np.testing.assert_allclose(constant, 0.3, rtol=1e-6)
    values = np.random.default_rng(0).random(grid, dtype=np.float32)
    found = on_camera_pixels(values, geometry, interpolation="linear", size_px=(133, 71))
    assert found.min() >= values.min() - 1e-6
    assert found.max() <= values.max() + 1e-6


@pytest.mark.parametrize("padding", ["centred", "left_top"])
@pytest.mark.parametrize("image", [(100, 100), (60, 100), (100, 60)], ids=str)
def test_linear_interpolation_is_exact_at_patch_centres_and_even_between(padding, image):
    # Patches of 20 px on an input as large as the image's longer side: nothing is resized.
    geometry = geometry_of(image, padding, input_px=(100, 100), grid=(5, 5))
    assert (geometry.resized_height_px, geometry.resized_width_px) == image
    values = np.random.default_rng(0).random((5, 5), dtype=np.float32)
    # Twice the odd multiple, so that a pixel's centre falls on each patch's centre.
    size = (image[0] * 3, image[1] * 3)
    found = on_camera_pixels(values, geometry, interpolation="linear", size_px=size)
    coarse = on_camera_pixels(
        values, geometry, interpolation="linear", size_px=(image[0] // 4, image[1] // 4)
    )
    rows = range(geometry.pad_top_px // 20, (geometry.pad_top_px + image[0]) // 20)
    columns = range(geometry.pad_left_px // 20, (geometry.pad_left_px + image[1]) // 20)
    for row, column in itertools.product(rows, columns):
        # Pixels of 4 px: the third of a patch's five has its centre at the patch's.
        i, j = (row * 20 - geometry.pad_top_px) // 4 + 2, (column * 20 - geometry.pad_left_px) // 4 + 2
        np.testing.assert_allclose(coarse[i, j], values[row, column], rtol=1e-6)
    # Half way between two patches it is their mean.
    row, column = rows[0], columns[0]
    y, x = (row + 1) * 60 - 3 * geometry.pad_top_px, column * 60 + 30 - 3 * geometry.pad_left_px
    at_edge = found[y - 1 : y + 1, x - 1 : x + 1].mean()
    np.testing.assert_allclose(at_edge, values[row : row + 2, column].mean(), rtol=1e-2)


@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
@pytest.mark.parametrize("size", [(100, 120), (50, 60)], ids=str)
def test_what_was_cut_off_shows_nothing(interpolation, size):
    """Of 100 x 120 px ten are cut off on each side, but above and below alone those that lie beyond."""
    values = np.random.default_rng(0).random((4, 5), dtype=np.float32) + 1
    for top, inside in ((-10, slice(10, 90)), (0, slice(0, 100))):
        geometry = ImageGeometry(100, 120, 100, 120, top, -10, 80 if top else 100, 100, 4, 5)
        found = on_camera_pixels(values, geometry, size_px=size, interpolation=interpolation)
        scale = 100 // size[0]
        seen = np.zeros(size, bool)
        seen[inside.start // scale : inside.stop // scale, 10 // scale : 110 // scale] = True
        np.testing.assert_array_equal(np.isfinite(found), seen)
        whole = ImageGeometry(
            inside.stop - inside.start,
            100,
            inside.stop - inside.start,
            100,
            0,
            0,
            *(80 if top else 100, 100),
            4,
            5,
        )
        alone = on_camera_pixels(
            values,
            whole,
            size_px=((inside.stop - inside.start) // scale, 100 // scale),
            interpolation=interpolation,
        )
        np.testing.assert_allclose(found[seen].reshape(alone.shape), alone, rtol=1e-6)
        rows, columns = patch_of_pixels(geometry, size)
        assert (rows == 4).tolist() == (~seen.any(1)).tolist()
        assert (columns == 5).tolist() == (~seen.any(0)).tolist()


def test_a_list_as_size_and_an_unknown_interpolation():
    geometry = geometry_of((96, 96))
    assert on_camera_pixels(np.zeros((16, 16)), geometry, size_px=[10, 12]).shape == (10, 12)
    with pytest.raises(SelectionError, match="interpolation 'cubic': expected 'nearest' or 'linear'"):
        on_camera_pixels(np.zeros((16, 16)), geometry, interpolation="cubic")


def test_heatmaps_show_the_planted_patch(planted):
    plan = planted.plan
    for index, name in enumerate(CAMERAS):
        heat = image_heatmap(planted.data, name, frame="all", **STORED)
        assert heat.dims == ("frame", "denoise_step", "layer", "head", "grid_y", "grid_x")
        assert heat.shape == (7, 2, 2, 2, 8, 8)
        for frame, step, layer, head in itertools.product(range(7), range(2), (2, 3), range(2)):
            one = heat.sel(frame=frame, denoise_step=step, layer=layer, head=head).values
            row, column = planted_patch(plan, index, frame=frame, layer=layer, head=head, denoise_step=step)
            assert np.unravel_index(one.argmax(), one.shape) == (row, column)
            share = planted_shares(plan, frame)[name]
            np.testing.assert_allclose(one[row, column], PATCH_SHARE * share, rtol=1e-3)
            np.testing.assert_allclose(one.sum(), share, rtol=2e-3)


def test_the_planted_patch_is_bright_where_the_camera_saw_it(planted):
    for index, (name, size) in enumerate(CAMERAS.items()):
        full_name, geometry, _ = camera_geometry(planted.data, name)
        assert full_name == name
        for frame in (0, 4, 6):
            heat = image_heatmap(planted.data, name, frame=frame, layer=2, head=1, denoise_step=0)
            bright = on_camera_pixels(heat, geometry) > 0.5 * float(heat.max())
            assert bright.shape == size
            patch = planted_patch(planted.plan, index, frame=frame, layer=2, head=1, denoise_step=0)
            for i, j in np.ndindex(size):
                allowed = patches_at(geometry, i + 0.5, j + 0.5)
                assert bright[i, j] == (patch in allowed) or len(allowed) > 1, (i, j)
            assert bright.any()


def test_the_grid_is_in_the_order_of_key_row_and_key_column(planted):
    data = planted.data
    array = attention(data, frame=2, layer=3)
    for index, name in enumerate(CAMERAS):
        expected = np.full((8, 8), np.nan)
        for key in np.flatnonzero(data.key_camera.values == index):
            expected[data.key_row.values[key], data.key_column.values[key]] = array.values[key]
        np.testing.assert_array_equal(image_heatmap(data, name, frame=2, layer=3), expected)


def test_dask_and_lazy_heatmaps_agree(planted):
    for choice in ({"frame": 3}, {"frame": [6, 0], "layer": "all"}, {"query": "all", "layer": [3]}, {}):
        for normalisation in NORMALISATIONS:
            lazy = image_heatmap(planted.episode.dataset, "wrist", normalisation=normalisation, **choice)
            now = image_heatmap(planted.data, "wrist", normalisation=normalisation, **choice)
            assert lazy.chunks is not None
            xr.testing.assert_allclose(lazy.compute(), now, rtol=1e-6)
            np.testing.assert_allclose(lazy.attrs["vmax"], now.attrs["vmax"], rtol=1e-6)


@pytest.mark.parametrize("normalisation", list(NORMALISATIONS))
@pytest.mark.parametrize("choice", [{"frame": 2, "layer": 2}, {"frame": [5, 2], "layer": 3}, {}], ids=str)
def test_normalisations(planted, normalisation, choice):
    name = "observation.images.wrist"
    _, _, keys = camera_geometry(planted.data, name)
    share = attention(planted.data, **choice).values[..., keys.start : keys.stop]
    share = share.reshape(*share.shape[:-1], 8, 8)
    heat = image_heatmap(planted.data, "wrist", normalisation=normalisation, **choice)
    every = {**choice, "frame": range(7)} if "frame" in choice else {"inference": range(3)}
    expected, vmax = {
        "share": (share, share.max()),
        "image": (share / share.sum((-1, -2), keepdims=True),) * 2,
        "frame": (share / share.max((-1, -2), keepdims=True), 1),
        "episode": (share, attention(planted.data, **every).values[..., keys.start : keys.stop].max()),
    }[normalisation]
    np.testing.assert_allclose(heat, expected, rtol=1e-5)
    np.testing.assert_allclose(heat.attrs["vmax"], np.max(vmax), rtol=1e-6)
    assert heat.attrs["vmin"] == 0
    assert heat.attrs["camera"] == name
    assert heat.attrs["normalisation"] == normalisation
    assert heat.attrs["units"] == NORMALISATIONS[normalisation]
    assert heat.attrs["layer"] == f"layer {choice.get('layer', 3)}"


def test_the_range_of_an_episode_is_that_of_all_its_frames(planted):
    # The first camera's share falls over the episode, so a late frame is darker than the range.
    every = [image_heatmap(planted.data, "image", frame=frame) for frame in range(7)]
    largest = max(float(heat.max()) for heat in every)
    late = image_heatmap(planted.data, "image", frame=6, normalisation="episode")
    assert late.attrs["vmax"] == pytest.approx(largest)
    assert float(late.max()) < 0.9 * largest
    name = "observation.images.image"
    assert episode_ranges(planted.data, ["image"], frame=3) == {name: pytest.approx(largest)}
    low, half = (episode_ranges(planted.data, ["image"], frame=3, clip=clip)[name] for clip in (0, 50))
    assert low < half


@pytest.mark.parametrize("kind", ["arrays", "dataset"])
@pytest.mark.parametrize("normalisation", list(NORMALISATIONS))
def test_cameras_together_are_what_they_are_alone(planted, normalisation, kind):
    data = getattr(planted.episode, kind)
    where = {"frame": [0, 5], "layer": [2, 3], "head": "all"}
    together = by_camera(data, attention(data, **where), normalisation=normalisation)
    ranges = episode_ranges(data, clip=90, **where)
    assert list(together) == list(ranges) == list(CAMERAS)
    for name, heat in together.items():
        assert (heat.chunks is not None) == (kind == "dataset")
        alone = image_heatmap(data, name, normalisation=normalisation, clip=90, **where)
        np.testing.assert_array_equal(heat, alone)
        if normalisation == "episode":
            assert ranges[name] == alone.attrs["vmax"]
        assert heat.attrs == {k: v for k, v in alone.attrs.items() if k not in ("vmin", "vmax")}
    some = by_camera(data, attention(data, **where), ["wrist", "image"])
    assert list(some) == ["observation.images.wrist", "observation.images.image"]


@pytest.mark.parametrize(
    ("normalisation", "clip", "expected"),
    [
        ("share", 100, (0.5, False)),
        ("image", 50, (0.25, True)),
        ("frame", 50, (1.0, False)),
        ("episode", 50, (0.4, True)),
    ],
)
def test_one_colour_range_of_what_is_shown_together(normalisation, clip, expected):
    maps = [np.array([[0.0, 0.1], [0.2, 0.3]]), np.array([[0.4, np.nan], [0.5, np.nan]])]
    found = colour_range(maps, normalisation, clip=clip, episode_ends=[0.3, 0.4])
    assert found == pytest.approx(expected)


def test_colour_range_of_nothing_but_zeros_and_missing_maps():
    assert colour_range([np.zeros((2, 2))], "share", clip=99) == (0, False)
    assert colour_range([np.full((2, 2), np.nan)], "image") == (0, False)
    assert colour_range([np.full((2, 2), 0.2)], "episode", episode_ends=[0.0]) == pytest.approx((0.2, False))


def test_a_map_of_zeros_stays_zero(planted):
    everything = range(planted.plan.layout.n_keys)
    for normalisation in NORMALISATIONS:
        heat = image_heatmap(planted.data, frame=0, normalisation=normalisation, exclude=everything)
        assert (heat.values == 0).all()


@pytest.mark.parametrize(
    ("image", "padding", "hidden_rows", "hidden_columns"),
    [
        ((224, 224), "centred", [], []),
        ((112, 224), "centred", [0, 1, 6, 7], []),
        ((112, 224), "left_top", [0, 1, 2, 3], []),
        ((224, 112), "centred", [], [0, 1, 6, 7]),
        ((224, 112), "left_top", [], [0, 1, 2, 3]),
        ((168, 224), "centred", [0, 7], []),
        ((170, 224), "centred", [], []),  # a pixel of the image in the first and the last row of patches
        ((166, 224), "centred", [0, 7], []),
    ],
    ids=str,
)
def test_padding_share_is_what_lies_on_nothing_but_padding(image, padding, hidden_rows, hidden_columns):
    geometry = geometry_of(image, padding, grid=(8, 8))
    values = np.random.default_rng(0).random((3, 8, 8))
    hidden = np.zeros((8, 8), bool)
    hidden[hidden_rows] = True
    hidden[:, hidden_columns] = True
    found = padding_share(xr.DataArray(values, dims=("frame", "grid_y", "grid_x")), geometry)
    assert found.dims == ("frame",)
    np.testing.assert_allclose(found, values[:, hidden].sum(axis=1))
    # What is hidden shows on no pixel, and everything else on one at least.
    numbers = np.arange(64.0).reshape(8, 8)
    shown = np.unique(on_camera_pixels(numbers, geometry))
    assert sorted(shown) == sorted(numbers[~hidden])


def test_planted_patches_lie_on_the_image(planted):
    for name in CAMERAS:
        _, geometry, _ = camera_geometry(planted.data, name)
        heat = image_heatmap(planted.data, name, frame="all", **STORED, normalisation="image")
        rest = 1 - PATCH_SHARE
        assert float(padding_share(heat, geometry).max()) <= rest + 1e-3


@pytest.mark.parametrize(
    ("camera", "found"),
    [
        (None, "observation.images.image"),
        ("image", "observation.images.image"),
        ("wrist", "observation.images.wrist"),
        ("observation.images.top", "observation.images.top"),
    ],
)
def test_cameras_by_the_end_of_their_name(planted, camera, found):
    name, geometry, keys = camera_geometry(planted.data, camera)
    assert name == found
    assert (geometry.height_px, geometry.width_px) == CAMERAS[found]
    index = list(CAMERAS).index(found)
    assert np.flatnonzero(planted.data.key_camera == index).tolist() == list(range(keys.start, keys.stop))
    assert image_heatmap(planted.data, camera, frame=0).attrs["camera"] == found


def layout_only(*names, empty=()):
    """A dataset with nothing but a layout of one-patch cameras."""
    geometry = geometry_of((8, 8), grid=(1, 1))
    segments = [Segment("image", name, i, i + 1) for i, name in enumerate(names)]
    n = len(segments)
    cameras = tuple(Camera(name, None if name in empty else geometry) for name in names)
    layout = TokenLayout((*segments, Segment("action", "action", n, n + 1)), n, cameras)
    return xr.Dataset(attrs={"layout": layout.to_dict()})


@pytest.mark.parametrize(
    ("names", "empty", "camera", "message"),
    [
        (("a.left", "a.right"), (), "top", "camera 'top' does not exist; the episode's are a.left, a.right"),
        (("a.left",), (), "a", "camera 'a' does not exist"),
        (("a.left",), (), "", "camera '' does not exist"),
        (("a.left", "b.left"), (), "left", "camera 'left' is ambiguous; the episode's are a.left, b.left"),
        (("a.left", "a.empty"), ("a.empty",), "empty", "camera 'empty' showed no image; .* are a.left$"),
        (("a.empty",), ("a.empty",), None, "policy saw no camera image"),
        ((), (), "left", "policy saw no camera image"),
    ],
)
def test_camera_errors(names, empty, camera, message):
    with pytest.raises(SelectionError, match=message):
        camera_geometry(layout_only(*names, empty=empty), camera)


def test_a_full_name_wins_over_the_end_of_another():
    data = layout_only("a.left", "left")
    assert camera_geometry(data, "left")[0] == "left"
    assert camera_geometry(data, "left")[2].start == 1


def test_a_camera_is_found_by_any_dotted_end_of_its_name():
    data = layout_only("a.left.rgb", "a.right.rgb")
    assert camera_geometry(data, "right.rgb")[0] == "a.right.rgb"
    for not_an_end in ("ght.rgb", "right", "rgb"):
        with pytest.raises(SelectionError):
            camera_geometry(data, not_an_end)


def test_the_first_camera_is_the_first_that_showed_something():
    data = layout_only("a.empty", "a.left", "a.right", empty=("a.empty",))
    assert camera_names(data) == ["a.left", "a.right"]
    name, _, keys = camera_geometry(data)
    assert (name, keys.start) == ("a.left", 1)


def test_heatmap_errors(planted):
    with pytest.raises(SelectionError, match="normalisation 'softmax': expected one of share, image, frame"):
        image_heatmap(planted.data, normalisation="softmax")
    with pytest.raises(SelectionError, match="camera 'empty_0' showed no image"):
        image_heatmap(planted.data, "empty_0")
    with pytest.raises(SelectionError, match="frame 7 does not exist"):
        image_heatmap(planted.data, frame=7)


@pytest.mark.parametrize("data", ["dataset", "arrays"])
def test_an_episode_without_frames_gives_empty_heatmaps(tmp_path, data):
    plan = SyntheticPlan(n_frames=0, videos=False, grid=(4, 4))
    episode = open_episode(write_planted_episode(tmp_path, plan))
    for normalisation in NORMALISATIONS:
        heat = image_heatmap(getattr(episode, data), frame="all", normalisation=normalisation)
        assert heat.shape == (0, 4, 4)
        assert heat.attrs["vmax"] == (1 if normalisation == "frame" else 0)
