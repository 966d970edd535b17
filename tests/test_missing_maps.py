"""Maps that the store lacks (NaN, e.g. after a repair): never skipped in a mean, blank in pictures."""

import dataclasses
import io

import numpy as np
import pytest
import xarray as xr
import zarr
from matplotlib.patches import Rectangle
from rich.console import Console

from lerobot_attn import analysis, open_episode
from lerobot_attn.analysis import runs as runs_module
from lerobot_attn.analysis.compare import Aspect, compare_each
from lerobot_attn.analysis.spatial import NORMALISATIONS
from lerobot_attn.figures.canvas import MISSING
from lerobot_attn.figures.scale import MISSING_RGB
from lerobot_attn.inspection import describe_episode, render_episode, segment_mass
from lerobot_attn.overlay import OverlaySettings, overlay_frames
from lerobot_attn.overlay.film import Film
from lerobot_attn.plot import KINDS, PlotSettings, plot
from lerobot_attn.report import CompareSettings, compare_groups, comparison_figure
from lerobot_attn.store.video import read_frames
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

PLAN = SyntheticPlan(grid=(8, 8), prefix_layers=(0, 1, 2, 3), layers=(0, 1, 2, 3), vision_layers=(3,))
INFERENCE, STEP, LAYER = 1, 2, 3
FRAMES = [3, 4, 5]  # the missing inference's
OTHERS = [frame for frame in range(PLAN.n_frames) if frame not in FRAMES]
CAMERA = "observation.images.image"


def lose(path, *, inference=INFERENCE, step=STEP, layer=LAYER):
    """Make one map missing, or with slices many: the full one, and its mean over the executed actions."""
    for name in ("suffix_attention", "suffix_attention_mean"):
        zarr.open_array(path / name, mode="r+")[inference, step, layer] = np.nan
    return open_episode(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return open_episode(write_planted_episode(tmp_path_factory.mktemp("whole"), PLAN))


@pytest.fixture(scope="module")
def holed(tmp_path_factory):
    """One map is missing."""
    return lose(write_planted_episode(tmp_path_factory.mktemp("holed"), PLAN))


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """Every map is missing, also those of the prefix and of the vision tower."""
    path = write_planted_episode(tmp_path_factory.mktemp("empty"), PLAN)
    for name in ("prefix_attention", "vision_attention"):
        zarr.open_array(path / name, mode="r+")[:] = np.nan
    return lose(path, inference=slice(None), step=slice(None), layer=slice(None))


@pytest.mark.parametrize("kind", ["arrays", "dataset"])
@pytest.mark.parametrize("query", ["frame", "executed", "mean", 2])
@pytest.mark.parametrize(
    ("choice", "is_missing"),
    [
        ({"layer": 3}, True),
        ({"layer": 2}, False),
        ({"layer": "mean"}, True),
        ({"layer": "mean", "denoise_step": 0}, False),
        ({"denoise_step": "mean"}, True),
        ({"denoise_step": "mean", "layer": [1]}, False),
        ({"head": "max"}, True),
        ({"head": 1}, True),
        ({"exclude": [0, 7]}, True),
    ],
    ids=str,
)
def test_what_needs_the_missing_map_is_missing_and_nothing_else(
    whole, holed, kind, query, choice, is_missing
):
    found = analysis.attention(getattr(holed, kind), frame="all", query=query, **choice).compute()
    expected = analysis.attention(getattr(whole, kind), frame="all", query=query, **choice).compute()
    if is_missing:
        assert np.isnan(found.sel(frame=FRAMES)).all()
        found, expected = found.sel(frame=OTHERS), expected.sel(frame=OTHERS)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("normalisation", list(NORMALISATIONS))
def test_heatmaps_are_missing_and_ranges_are_those_of_the_others(whole, holed, normalisation):
    choice = {"frame": "all", "normalisation": normalisation, "clip": 90}
    found = analysis.image_heatmap(holed.arrays, "wrist", **choice)
    expected = analysis.image_heatmap(whole.arrays, "wrist", **choice)
    assert np.isnan(found.sel(frame=FRAMES)).all()
    np.testing.assert_array_equal(found.sel(frame=OTHERS), expected.sel(frame=OTHERS))
    rest = expected.sel(frame=OTHERS)
    vmax = 1 if normalisation == "frame" else np.percentile(rest, 90)
    assert found.attrs["vmax"] == pytest.approx(vmax, rel=1e-6)
    _, geometry, _ = analysis.camera_geometry(holed.arrays, "wrist")
    hidden = analysis.padding_share(found, geometry)
    np.testing.assert_array_equal(np.isnan(hidden.values), np.isin(hidden.frame, FRAMES))
    for interpolation in ("nearest", "linear"):
        pixels = analysis.on_camera_pixels(found, geometry, interpolation=interpolation)
        np.testing.assert_array_equal(np.isnan(pixels).all(axis=(1, 2)), np.isin(found.frame, FRAMES))


def test_a_missing_map_of_a_square_image_has_no_known_padding_either(holed):
    heat = analysis.image_heatmap(holed.arrays, CAMERA, frame=4)
    assert np.isnan(analysis.padding_share(heat, analysis.camera_geometry(holed.arrays, CAMERA)[1]))


@pytest.mark.parametrize("function", [analysis.modality_share, analysis.token_attention])
def test_shares_are_missing(whole, holed, function):
    found, expected = function(holed.arrays, frame="all"), function(whole.arrays, frame="all")
    assert np.isnan(found.sel(frame=FRAMES)).all()
    np.testing.assert_array_equal(found.sel(frame=OTHERS), expected.sel(frame=OTHERS))


def test_shares_among_actions_are_missing(holed):
    found = analysis.action_self_attention(holed.arrays, frame=4, within=True)
    assert np.isnan(found).all()


def test_sharpness_and_stability_are_missing(whole, holed):
    found, expected = (analysis.image_heatmap(episode.arrays, inference="all") for episode in (holed, whole))
    sharp, of_whole = analysis.attention_entropy(found), analysis.attention_entropy(expected)
    for name in ("entropy", "effective_number"):
        assert np.isnan(sharp[name]).values.tolist() == [False, True, False, False]
        np.testing.assert_array_equal(sharp[name][[0, 2, 3]], of_whole[name][[0, 2, 3]])
    # Neither the missing map nor the one after it has a neighbour to compare with.
    assert np.isnan(analysis.stability(found, "inference")).values.tolist() == [True, True, False]


def test_absent_keys_have_no_part_in_a_distribution_and_a_missing_row_has_none():
    nan = np.nan
    rows = [[0.5, nan, 0.5], [0.5, 0.25, 0.25], [nan, nan, nan], [0.25, nan, 0.75]]
    maps = xr.DataArray(np.array(rows, np.float32), dims=("frame", "key"))
    for array in (maps, maps.chunk(frame=1)):
        entropy = analysis.attention_entropy(array)["entropy"].compute()
        np.testing.assert_allclose(entropy, [1, 1.5, nan, 0.8112781], rtol=1e-6)
        np.testing.assert_allclose(analysis.stability(array, "frame").compute(), [0.75, nan, nan])
    np.testing.assert_allclose(analysis.stability(maps[[0, 3]], "frame"), [0.75])


@pytest.mark.parametrize("most", [1, 64])
def test_tables_have_no_values_there(whole, holed, monkeypatch, most):
    monkeypatch.setattr(runs_module, "_MOST_INFERENCES", most)
    found, expected = (analysis.summarise(episode.arrays) for episode in (holed, whole))
    lost = (found.inference == INFERENCE) | (
        (found.measure == "stability") & (found.inference == INFERENCE + 1)
    )
    assert found.value[lost].isna().all()
    np.testing.assert_array_equal(found.value[~lost], expected.value[~lost])


@pytest.mark.parametrize("most", [1, 64])
@pytest.mark.parametrize("measure", ["modality_share", "token_attention", "sharpness", "image_heatmap"])
def test_means_over_an_episode_are_those_of_the_frames_that_are_there(
    whole, holed, monkeypatch, measure, most
):
    monkeypatch.setattr(runs_module, "_MOST_INFERENCES", most)
    found = compare_each(
        holed,
        whole,
        {"whole": Aspect(measure, "whole"), "frame": Aspect(measure, "frame")},
    )
    by_frame = found["frame"]
    assert np.isnan(by_frame.a.sel(frame=FRAMES)).all()
    assert (by_frame.n_a.sel(frame=FRAMES) == 0).all()
    np.testing.assert_array_equal(by_frame.a.sel(frame=OTHERS), by_frame.b.sel(frame=OTHERS))
    expected = by_frame.b.sel(frame=OTHERS).mean("frame")
    np.testing.assert_allclose(found["whole"].a, expected, rtol=1e-6)


def test_a_word_that_only_other_prompts_have_is_not_zero_where_the_map_is_missing(holed, monkeypatch):
    monkeypatch.setattr(runs_module, "_MOST_INFERENCES", 1)
    data = holed.arrays.load()
    texts = data["text_word"].values.copy()
    texts[INFERENCE][texts[INFERENCE] == 9] = 8  # its prompt lacks the last word
    other = data.assign(text_word=(data["text_word"].dims, texts))
    found = analysis.compare(other, other, "token_attention", align="frame")
    words = found.isel(token=found["kind"].values == "task").a
    assert np.isnan(words.sel(frame=FRAMES)).all()


def test_rollout_and_flow_that_need_it_are_missing(whole, holed):
    found, expected = (
        analysis.attention_rollout(episode.arrays, inference="all") for episode in (holed, whole)
    )
    assert np.isnan(found.isel(inference=INFERENCE)).all()
    np.testing.assert_array_equal(found.isel(inference=[0, 2, 3]), expected.isel(inference=[0, 2, 3]))
    assert np.isnan(analysis.attention_rollout(holed.arrays, inference=INFERENCE, denoise_step="mean")).all()
    lower = analysis.attention_rollout(holed.arrays, inference=INFERENCE, layer=2)
    np.testing.assert_array_equal(
        lower, analysis.attention_rollout(whole.arrays, inference=INFERENCE, layer=2)
    )
    assert np.isnan(analysis.attention_flow(holed.arrays, frame=4)).all()
    np.testing.assert_array_equal(
        analysis.attention_flow(holed.arrays, frame=1), analysis.attention_flow(whole.arrays, frame=1)
    )


def test_sinks_are_those_of_the_other_inferences(whole, holed):
    choice = {"times_uniform": 2, "minimum": 0.04}
    found = analysis.attention_sinks(holed.arrays, **choice)
    assert len(found)
    assert found.attrs["n_inferences"] == 3
    rest = whole.arrays.isel(inference=[0, 2, 3])
    expected = analysis.attention_sinks(rest, **choice)
    assert found.to_dict() == expected.to_dict()


def drawn(figure):
    figure.savefig(io.BytesIO(), dpi=50)
    return figure


@pytest.mark.parametrize(
    ("kind", "normalisation"), [*((kind, "share") for kind in KINDS), *(("image", n) for n in NORMALISATIONS)]
)
def test_every_figure_is_drawn(holed, empty, kind, normalisation):
    frames = None if kind in ("timeline", "evolution") else 4
    settings = PlotSettings(
        frames=frames, normalisation=normalisation, heads=0 if kind == "denoise" else None
    )
    for episode in (holed, empty):
        assert drawn(plot(episode, kind, settings)).axes


def test_a_missing_map_is_hatched_and_the_image_shows_through(holed):
    figure = drawn(plot(holed, "image", PlotSettings(frames=4, cameras="image", layers=[2, 3])))
    there, missing = (axes for axes in figure.axes if len(axes.images) == 2)
    assert not there.patches
    (hatched,) = missing.patches
    assert isinstance(hatched, Rectangle)
    assert hatched.get_hatch()
    assert np.ma.getmaskarray(missing.images[1].get_array()).all()
    np.testing.assert_array_equal(missing.images[1].get_alpha(), 0)


@pytest.mark.parametrize(("kind", "count"), [("text", 2), ("combined", 3)])
def test_words_whose_map_is_missing_are_said_to_be(whole, holed, kind, count):
    """In the sentence's title, and in every diagram of bars."""

    def notes(episode):
        axes = drawn(plot(episode, kind, PlotSettings(frames=4))).axes
        return [a.get_title(loc="left") for a in axes] + [text.get_text() for a in axes for text in a.texts]

    assert sum(MISSING in note for note in notes(holed)) == count
    assert not any(MISSING in note for note in notes(whole))
    assert not any("from 0 (dark) to 0 %" in note for note in notes(holed))


def test_the_timeline_has_a_gap(holed):
    figure = drawn(plot(holed, "timeline"))
    (line, _) = figure.axes[1].lines[:2]
    assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == FRAMES


def shown_frames(figure):
    """Where the timeline's shares begin and end, and the frames at which its sharpness can be seen."""
    top, middle = figure.axes[:2]
    bands = [path.get_extents() for shown in top.collections for path in shown.get_paths()]
    line = middle.lines[0]
    known = np.isfinite(line.get_ydata())
    joined = known & (np.append(known[1:], False) | np.append(False, known[:-1]))
    seen = joined.copy()
    if line.get_marker() not in ("", "None", None):
        seen[line.get_markevery()] = True
    assert (line.get_ydata()[known] < middle.get_ylim()[1]).all()
    return {(band.x0, band.x1) for band in bands}, np.flatnonzero(seen).tolist()


@pytest.mark.parametrize(
    ("frames", "bands", "seen"),
    [
        (None, {(1.5, 2.5), (4.5, 5.5)}, [2, 5]),
        (5, {(4.5, 5.5)}, [0]),
        ([5], {(4.5, 5.5)}, [0]),
        ([2, 5], {(1.5, 5.5)}, [0, 1]),
    ],
)
def test_the_timeline_shows_frames_between_missing_ones(tmp_path, frames, bands, seen):
    plan = dataclasses.replace(PLAN, n_executed=1, n_queries=1, n_frames=7, prefix_layers=())
    path = write_planted_episode(tmp_path, plan)
    for inference in (0, 1, 3, 4, 6):
        lose(path, inference=inference)
    figure = drawn(plot(open_episode(path), "timeline", PlotSettings(frames=frames)))
    assert shown_frames(figure) == (bands, seen)


def test_the_timeline_of_a_single_missing_frame_is_blank(tmp_path):
    plan = dataclasses.replace(PLAN, n_executed=1, n_queries=1, n_frames=1, prefix_layers=())
    episode = lose(write_planted_episode(tmp_path, plan), inference=0)
    assert shown_frames(drawn(plot(episode, "timeline"))) == (set(), [])


@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
@pytest.mark.parametrize("normalisation", list(NORMALISATIONS))
def test_an_overlay_leaves_the_image_alone_and_says_so(whole, holed, interpolation, normalisation):
    settings = OverlaySettings(interpolation=interpolation, normalisation=normalisation, layer=LAYER)
    film = Film(holed, settings)
    (place,), (view,) = film._places, film._views
    rows = slice(place.top, place.top + view.size_px[0])
    images = read_frames(holed.videos[CAMERA], size_px=view.size_px)
    same_range = film.scale == Film(whole, settings).scale
    for frame, (shown, other, image) in enumerate(
        zip(overlay_frames(holed, settings), overlay_frames(whole, settings), images, strict=True)
    ):
        left, right = (shown[rows, start : start + view.size_px[1]] for start in (place.left, place.right))
        if frame in FRAMES:
            np.testing.assert_array_equal(left, image)
            assert (right == MISSING_RGB).all()
        else:
            assert (left != image).any()
            if same_range:
                np.testing.assert_array_equal(shown[rows], other[rows])
    assert "grey: not in the store" in film._footer_parts()
    assert "grey: not in the store" not in Film(whole, settings)._footer_parts()


def test_an_overlay_of_nothing_is_drawn(empty):
    assert len(list(overlay_frames(empty, OverlaySettings(camera="all")))) == PLAN.n_frames


def test_reports_are_drawn(whole, holed, empty):
    for a, b in (([holed], [whole]), ([holed, whole], [holed, whole]), ([empty], [whole])):
        assert drawn(comparison_figure(a, b)).axes
    overall = compare_groups([holed], [whole], CompareSettings(layer=2)).overall
    np.testing.assert_array_equal(overall["difference"], 0)


def said(facts):
    console = Console(file=io.StringIO(), width=200)
    console.print(render_episode(facts))
    return console.file.getvalue()


def test_inspection_counts_the_maps_that_are_there(tmp_path, whole, empty):
    holed = lose(write_planted_episode(tmp_path, PLAN), inference=0, layer=0)
    found, expected = segment_mass(holed, 0), segment_mass(whole, 0)
    assert found.shares == pytest.approx(expected.shares, abs=0.02)
    assert sum(found.shares.values()) == pytest.approx(1, abs=1e-3)
    assert found.deviation == pytest.approx(expected.deviation, abs=1e-3)
    assert (found.missing, expected.missing) == (pytest.approx(1 / 12), 0)
    text = said(describe_episode(holed))
    assert "2.8% OF THE ROWS ARE MISSING, the other rows sum to 1; largest deviation" in text
    facts = describe_episode(empty)
    assert (facts["attention_mass"], facts["attention_mass_inferences"]) == ({}, [])
    assert (facts["row_sum_max_deviation"], facts["rows_missing"]) == (None, 1)
    assert facts["rows_sum_to_one"] is False
    assert "sanity: 100.0% OF THE ROWS ARE MISSING\n" in said(facts)


def test_rewards_that_are_missing_leave_a_gap(tmp_path):
    path = write_planted_episode(tmp_path, dataclasses.replace(PLAN, prefix_layers=()))
    zarr.open_array(path / "reward", mode="r+")[:5] = np.nan
    line = drawn(plot(open_episode(path), "timeline")).axes[2].lines[0]
    assert np.isnan(line.get_ydata()).sum() == 5
