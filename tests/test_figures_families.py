"""Figures of every family of policies, and of recordings that lack something: shown, or said."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from matplotlib.patches import Rectangle

import lerobot_attn.plot.kinds
from lerobot_attn.errors import SelectionError
from lerobot_attn.figures import Caption, action_figure, evolution_figure, text_figure, timeline_figure
from lerobot_attn.figures.canvas import MISSING
from lerobot_attn.figures.scale import UNSEEN
from lerobot_attn.figures.text import Sentence, sentence_places, shade_sentence
from lerobot_attn.plot import KINDS, PlotSettings, camera_pictures, plot
from lerobot_attn.store.reader import open_episode
from lerobot_attn.synthetic import FAMILIES, SyntheticPlan, write_planted_episode


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Open a family's episode, written once."""
    written = {}

    def of(name):
        if name not in written:
            plan = replace(FAMILIES[name], videos=False)
            written[name] = write_planted_episode(tmp_path_factory.mktemp("family"), plan)
        return open_episode(written[name])

    return of


def said(figure):
    return " ".join(text.get_text() for text in figure.texts)


def hatched(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_figure_of_every_family(stores, family, kind):
    episode = stores(family)
    if kind == "vision" and not FAMILIES[family].vision_layers:
        with pytest.raises(SelectionError, match="vision attention was not captured"):
            plot(episode, kind)
        return
    if family == "smolvla means only" and kind in ("actions", "cross-modal"):
        with pytest.raises(SelectionError, match=r"none were saved|was not captured"):
            plot(episode, kind)
        return
    figure = plot(episode, kind)
    figure.draw_without_rendering()
    assert "episode_00000" in said(figure)


@pytest.mark.parametrize("kind", ["text", "combined"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_token_has_its_bar(stores, family, kind):
    plan, figure = FAMILIES[family], plot(stores(family), kind)
    labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert labels.count("state token") == bool(plan.n_prefix_state + plan.n_suffix_state)


@pytest.mark.parametrize("family", ["pi05", "pi0", "pi0 without means", "smolvla"])
def test_the_line_stands_after_the_last_executed_action(stores, family):
    plan, figure = FAMILIES[family], plot(stores(family), "actions")
    for line in figure.axes[0].lines:
        places = {*line.get_xdata(), *line.get_ydata()} - {0, 1}
        assert places == {plan.n_executed - 0.5}


def test_without_knowledge_of_what_is_executed_no_line_is_drawn():
    figure = action_figure([("layer 0", np.eye(4, dtype=np.float32))], Caption([]), unit="", executed=None)
    assert not figure.axes[0].lines


def test_a_layer_that_cannot_see_the_actions_is_hatched(stores):
    plan, figure = FAMILIES["smolvla"], plot(stores("smolvla"), "actions")
    for axes, layer in zip(figure.axes, plan.layers, strict=False):
        assert axes.get_title() == f"layer {layer}"
        assert bool(hatched(axes)) == (layer in plan.prefix_only_layers)
        assert (UNSEEN in [text.get_text() for text in axes.texts]) == (layer in plan.prefix_only_layers)
    with pytest.raises(SelectionError, match="layer 1 cannot see the suffix"):
        plot(stores("smolvla"), "actions", PlotSettings(layers=1))


def test_shares_of_what_a_layer_sees_are_stacked_and_the_rest_is_hatched():
    values = np.array([[0.6, 0.3, 0.1], [0.7, 0.3, np.nan], [np.nan] * 3], np.float32)
    names = ["observation.images.image", "task", "actions"]
    shares = xr.DataArray(values, {"layer": [0, 1, 2], "modality": names}, ("layer", "modality"))
    whole = xr.DataArray(values[:1], {"denoise_step": [0], "modality": names}, ("denoise_step", "modality"))
    panels = [("through layers", shares), ("from noise to action", whole)]
    axes = evolution_figure(panels, Caption([])).axes[0]
    bars = [patch for patch in axes.patches if not patch.get_hatch()]
    tops = {}
    for bar in bars:
        tops[round(bar.get_x() + bar.get_width() / 2)] = bar.get_y() + bar.get_height()
    assert tops[0] == pytest.approx(100)
    assert tops[1] == pytest.approx(100)
    assert np.isnan(tops[2]), "a missing map is blank"
    (box,) = hatched(axes)
    assert axes.get_ylim()[1] >= box.get_y() + box.get_height()
    assert (box.get_x() + box.get_width() / 2, box.get_label()) == (1, f"actions:\n{UNSEEN}")


@pytest.mark.parametrize("family", ["smolvla", "pi0"])
def test_a_mean_of_layers_that_see_unlike_keys_says_so(stores, family):
    """The actions' mean leaves out the layers that cannot see them, so that a bar is more than the whole."""
    figure = plot(stores(family), "evolution")
    tops = {round(bar.get_y() + bar.get_height(), 3) for bar in figure.axes[1].patches}
    is_mixed = family == "smolvla"
    assert (max(tops) > 100.5) == is_mixed
    assert ("actions over the 2 of 4 layers that see them" in said(figure)) == is_mixed
    figure = plot(stores(family), "evolution", PlotSettings(layers=2))
    assert "layers that see them" not in said(figure)


def test_tokens_that_a_layer_cannot_see_are_hatched_and_missing_maps_are_said():
    coords = {
        "token": [0, 1, 2],
        "label": ("token", ["pick", "up", "state 0"]),
        "kind": ("token", ["task", "task", "state"]),
    }
    by_layer = xr.DataArray(
        np.array([[0.2, 0.1, 0.3], [0.2, 0.1, np.nan], [np.nan] * 3], np.float32),
        {"layer": [0, 1, 2], **coords},
        ("layer", "token"),
    )
    figure = text_figure(by_layer[1], by_layer, Caption([]))
    bars, matrix = figure.axes[1], figure.axes[2]
    (box,) = hatched(bars)
    assert box.get_y() + box.get_height() / 2 == 2
    (cell,) = hatched(matrix)
    assert (cell.get_x(), cell.get_y()) == (0.5, 1.5)
    assert UNSEEN in matrix.get_title()
    figure = text_figure(by_layer[2], by_layer[2:], Caption([]))
    assert MISSING in [text.get_text() for text in figure.axes[1].texts]
    assert not hatched(figure.axes[1])


@pytest.mark.parametrize(("has_reward", "has_success"), [(True, False), (False, True), (False, False)])
def test_a_loop_without_reward_or_success_has_none_drawn(has_reward, has_success):
    names = ["observation.images.image", "task"]
    shares = xr.DataArray(
        np.full((4, 2), 0.5, np.float32), {"frame": range(4), "modality": names}, ("frame", "modality")
    )
    number = {"observation.images.image": xr.DataArray(np.ones(4), dims="frame")}
    reward, success = np.zeros(4, np.float32), np.array([False, False, True, True])
    figure = timeline_figure(
        shares,
        number,
        reward if has_reward else None,
        success if has_success else None,
        np.array([0]),
        Caption([]),
    )
    assert len(figure.axes) == 3 - (not has_reward and not has_success)
    assert figure.axes[-1].get_xlabel() == "frame"
    labels = figure.axes[-1].get_legend_handles_labels()[1]
    assert ("reward" in labels, "solved" in labels) == (has_reward, has_success)


def test_the_former_name_of_effective_patches_is_taken():
    names = ["observation.images.image", "task"]
    shares = xr.DataArray(
        np.full((4, 2), 0.5, np.float32), {"frame": range(4), "modality": names}, ("frame", "modality")
    )
    number = {"observation.images.image": xr.DataArray(np.arange(4) + 3.0, dims="frame")}
    rest = {"reward": None, "success": None, "inference_frames": np.array([0]), "caption": Caption([])}
    with pytest.warns(DeprecationWarning, match="sharpness= is deprecated: it is called effective_patches="):
        figure = timeline_figure(shares, sharpness=number, **rest)
    assert figure.axes[1].lines[0].get_ydata().tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["text", "combined", "cross-modal"])
def test_a_prompt_that_was_cut_is_said(stores, kind):
    assert "prompt truncated" in said(plot(stores("truncated prompt"), kind))
    assert "truncated" not in said(plot(stores("pi05"), kind))


@pytest.mark.parametrize(
    ("words", "shares", "title"),
    [
        ([], [], "the prompt holds no words of a task"),
        (["pick"], [0.0], "words of the task: none of the attention is on them"),
        (["pick"], [np.nan], f"words of the task: {MISSING}"),
        (["pick"], [0.25], "words of the task: colour from 0 (dark) to 25 % of all attention (bright)"),
    ],
)
def test_a_sentence_says_what_its_colours_mean_only_where_they_mean_something(words, shares, title):
    axes = plot_axes()
    sentence = Sentence(words, np.array(shares, np.float32), "words of the task")
    shade_sentence(axes, sentence, "viridis", sentence_places(words, 6)[0])
    assert axes.get_title(loc="left") == title


def plot_axes():
    from matplotlib.figure import Figure

    return Figure().add_subplot()


CAMERA = "observation.images.image"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capture": {"cameras": False}}, "image, wrist: recorded without cameras (cameras=false)"),
        ({}, "image, wrist: no video beside the store"),
        (
            {"videos": {CAMERA: {"path": "episode_00000.image.mp4"}}},
            "image: its MP4 is not beside the store; copy it too",
        ),
        ({"video_errors": {CAMERA: "disk full"}}, "image: its video could not be written: disk full"),
        ({"video_errors": {"another": "disk full"}}, "image, wrist: no video beside the store"),
    ],
)
@pytest.mark.parametrize("kind", ["image", "combined"])
def test_without_a_video_the_map_lies_on_a_blank_frame_that_says_why(stores, tmp_path, kind, changes, reason):
    path = tmp_path / "episode_00000.zarr"
    shutil.copytree(stores("pi05").path, path)
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"] |= changes
    (path / "zarr.json").write_text(json.dumps(document))
    episode = open_episode(path)
    figure = plot(episode, kind)
    assert reason in said(figure)
    plan = FAMILIES["pi05"]
    with_heat = [axes.images[0].get_array() for axes in figure.axes if len(axes.images) == 2]
    assert {image.shape[:2] for image in with_heat} == set(plan.image_px.values())
    assert all(len(np.unique(image)) == 1 for image in with_heat)


def test_a_video_that_is_shorter_or_damaged_shows_what_it_has(tmp_path):
    path = write_planted_episode(tmp_path, SyntheticPlan(n_frames=6))
    short = write_planted_episode(tmp_path / "short", SyntheticPlan(n_frames=3))
    shutil.copy(short.with_suffix(".image.mp4"), path.with_suffix(".image.mp4"))
    path.with_suffix(".wrist.mp4").write_bytes(b"no video")
    episode = open_episode(path)
    images, is_blank, reason = camera_pictures(episode, CAMERA, [5, 1])
    assert is_blank == [True, False]
    assert images[0].shape == images[1].shape == (96, 96, 3)
    assert "has 3 frames" in reason
    text = said(plot(episode, "image", PlotSettings(frames=[1, 5])))
    assert "has 3 frames" in text
    assert "not a readable video" in text
    assert str(tmp_path) not in text


def test_defaults_are_what_the_store_holds(stores, tmp_path):
    few = stores("few layers")  # the full map of layer 1, the prefix of layer 2, no means
    for kind in ("image", "text", "combined", "heads", "denoise", "timeline"):
        figure = plot(few, kind)
        assert "layer 1" in said(figure) or kind == "image", kind
    assert "layer 2" in said(plot(few, "cross-modal"))
    means = stores("smolvla means only")
    assert "from stored means" in said(plot(means, "combined"))
    both = open_episode(
        write_planted_episode(
            tmp_path, SyntheticPlan(layers=(1,), prefix_layers=(0, 2), n_frames=3, videos=False)
        )
    )
    assert "layer 3" in said(plot(both, "text")), "the policy's last layer, of which there are means"
    assert "layer 1" in said(plot(both, "text", PlotSettings(query=4))), "this action has a full map alone"
    assert "layer 2" in said(plot(both, "cross-modal"))


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError])
def test_what_goes_wrong_while_drawing_is_no_damage(stores, monkeypatch, error):
    def broken(*_, **__):
        raise error("could not parse")

    monkeypatch.setattr(lerobot_attn.plot.kinds.figures, "text_figure", broken)
    with pytest.raises(error, match=r"^could not parse$"):
        plot(stores("pi05"), "text")
