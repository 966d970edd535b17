"""Every figure shows what is planted: arrays in the axes are compared, not screenshots."""

import itertools
import re
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import zarr
from matplotlib.patches import Rectangle
from test_inspection import run_cli

from lerobot_attn import analysis
from lerobot_attn.errors import ConfigError, SelectionError, StoreError
from lerobot_attn.figures import save_figure
from lerobot_attn.figures.canvas import RANDOM_WEIGHTS
from lerobot_attn.overlay import OverlaySettings
from lerobot_attn.overlay.film import Film
from lerobot_attn.plot import KINDS, PlotSettings, plot
from lerobot_attn.store.reader import open_episode
from lerobot_attn.synthetic import (
    SyntheticPlan,
    camera_frames,
    planted_patch,
    planted_shares,
    planted_word,
    write_planted_episode,
)

SHAPES = {"square": (96, 96), "wide": (90, 160), "tall": (160, 90)}


@pytest.fixture(scope="module")
def plan():
    return SyntheticPlan(
        n_denoise_steps=4,
        prefix_layers=(0, 1, 2, 3),
        vision_layers=(0, 3),
        image_px={f"observation.images.{name}": size for name, size in SHAPES.items()},
    )


@pytest.fixture(scope="module")
def episode(plan, tmp_path_factory):
    return open_episode(write_planted_episode(tmp_path_factory.mktemp("planted"), plan))


@pytest.fixture(scope="module")
def left_top(plan, tmp_path_factory):
    other = SyntheticPlan(image_px=plan.image_px, padding="left_top")
    return other, open_episode(write_planted_episode(tmp_path_factory.mktemp("left_top"), other))


def heatmaps(figure):
    """(title, image, heatmap) of every axes that shows a heatmap over an image."""
    found = []
    for axes in figure.axes:
        if len(axes.images) == 2:
            image, heat = (np.asarray(shown.get_array()) for shown in axes.images)
            assert image.shape[:2] == heat.shape, "the heatmap does not lie on the image's own pixels"
            assert axes.images[0].get_extent() == axes.images[1].get_extent()
            found.append((axes.get_title(), image, heat))
    return found


def blob(plan, camera, **where):
    """The planted patch's pixels, found pixel by pixel through the geometry."""
    patch = planted_patch(plan, camera, **where)
    geometry = plan.layout.cameras[camera].geometry
    mask = np.zeros((geometry.height_px, geometry.width_px), bool)
    for y, x in np.ndindex(mask.shape):
        mask[y, x] = geometry.patch_at(y + 0.5, x + 0.5) == patch
    assert mask.any()
    return mask


def check_blob(heat, mask):
    """The planted pixels, all of them and only they, are the brightest."""
    np.testing.assert_array_equal(heat == heat.max(), mask)


@pytest.mark.parametrize("camera", range(3), ids=SHAPES)
def test_image_shows_the_planted_patch_for_every_layer(plan, episode, camera):
    name = list(plan.image_px)[camera]
    figure = plot(episode, "image", PlotSettings(frames=[1, 7], cameras=[name]))
    shown = heatmaps(figure)
    assert [title for title, _, _ in shown] == ["layer 2", "layer 3"] * 2
    frames = list(camera_frames(plan, camera))
    for (_, image, heat), (frame, layer) in zip(shown, itertools.product((1, 7), plan.layers), strict=True):
        # The head's mean has the patches of both heads: one of them must be there for a single head.
        assert np.abs(image.astype(int) - frames[frame]).mean() < 3, "not the frame's own image"
        for head in range(plan.n_heads):
            mask = blob(plan, camera, frame=frame, layer=layer, head=head, denoise_step=3)
            assert heat[mask].min() > 5 * np.median(heat)


@pytest.mark.parametrize("camera", range(3), ids=SHAPES)
@pytest.mark.parametrize("padding", ["centred", "left_top"])
def test_blob_in_pixels_for_both_paddings(plan, episode, left_top, camera, padding):
    plan, episode = (plan, episode) if padding == "centred" else left_top
    name = list(plan.image_px)[camera].rpartition(".")[2]
    settings = PlotSettings(frames=4, cameras=name, layers=3, heads=1, denoise_steps=0)
    ((_, _, heat),) = heatmaps(plot(episode, "image", settings))
    check_blob(heat, blob(plan, camera, frame=4, layer=3, head=1, denoise_step=0))
    ((_, _, heat),) = heatmaps(plot(episode, "combined", settings))
    check_blob(heat, blob(plan, camera, frame=4, layer=3, head=1, denoise_step=0))


@pytest.mark.parametrize("camera", range(3), ids=SHAPES)
def test_heads_and_denoise_steps_side_by_side(plan, episode, camera):
    name = list(plan.image_px)[camera]
    shown = heatmaps(plot(episode, "heads", PlotSettings(frames=5, cameras=[name], layers=2)))
    assert [title for title, _, _ in shown] == ["head 0", "head 1"]
    for head, (_, _, heat) in enumerate(shown):
        check_blob(heat, blob(plan, camera, frame=5, layer=2, head=head, denoise_step=3))
    shown = heatmaps(plot(episode, "denoise", PlotSettings(frames=5, cameras=[name], layers=2, heads=0)))
    assert [title for title, _, _ in shown] == [f"step {step}" for step in range(4)]
    for step, (_, _, heat) in enumerate(shown):
        check_blob(heat, blob(plan, camera, frame=5, layer=2, head=0, denoise_step=step))


def test_cross_modal_shows_each_words_patch(plan, episode):
    name = next(iter(plan.image_px))
    shown = heatmaps(plot(episode, "cross-modal", PlotSettings(cameras=[name])))
    words = plan.task.split()
    assert [title for title, _, _ in shown] == [f"“{word}”" for word in words]
    data = episode.arrays
    geometry = analysis.camera_geometry(data, name)[1]
    for word, (_, _, heat) in enumerate(shown):
        grid = np.zeros((16, 16))
        grid[divmod(word, 16)] = 1
        np.testing.assert_array_equal(heat, analysis.on_camera_pixels(grid, geometry))
    ((title, _, heat),) = heatmaps(plot(episode, "cross-modal", PlotSettings(cameras=[name], word="Red")))
    assert title == "“red”"


@pytest.mark.parametrize(
    ("normalisation", "most", "vmax", "unit"),
    [
        ("share", 0.25, 0.25, "share of the word's attention"),
        ("image", 1, 1, "share of the attention on this image"),
        ("frame", 1, 1, "relative to the largest patch"),
        ("episode", 0.25, 0.5, "share of the word's attention, one range for the episode"),
    ],
)
def test_cross_modal_maps_are_in_the_unit_of_the_normalisation(
    episode, copied, normalisation, most, vmax, unit
):
    path = copied(episode.path)
    maps = zarr.open_array(path / "prefix_attention", mode="r+")
    maps[0], maps[1:] = maps[0] * np.float16(0.25), maps[1:] * np.float16(0.5)
    settings = PlotSettings(frames=0, cameras="square", normalisation=normalisation, clip=100)
    figure = plot(open_episode(path), "cross-modal", settings)
    shown = heatmaps(figure)
    assert [float(heat.max()) for _, _, heat in shown] == [most] * len(shown)
    assert figure.axes[1].images[1].get_clim() == (0, vmax)
    assert unit in [axes.get_ylabel() for axes in figure.axes]


def test_linear_interpolation_keeps_the_brightest_point_in_the_patch(plan, episode):
    settings = PlotSettings(frames=4, cameras="wide", layers=3, heads=1, interpolation="linear")
    ((_, _, heat),) = heatmaps(plot(episode, "image", settings))
    mask = blob(plan, 1, frame=4, layer=3, head=1, denoise_step=3)
    assert mask[np.unravel_index(heat.argmax(), heat.shape)]


def bar_widths(axes):
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return dict(zip(labels, (p.get_width() for p in axes.patches if isinstance(p, Rectangle)), strict=False))


def test_text_bars_are_the_planted_words(plan, episode):
    figure = plot(episode, "text", PlotSettings(frames=9))
    sentence, bars = figure.axes[0], figure.axes[1]
    assert [text.get_text() for text in sentence.texts] == plan.task.split()
    widths = bar_widths(bars)
    word = plan.task.split()[planted_word(plan, 9)]
    assert widths[word] == pytest.approx(75 * planted_shares(plan, 9)["task"], rel=0.01)
    assert widths["joint_1"] == pytest.approx(100 * planted_shares(plan, 9)["state"] / 3, rel=0.35)
    grounds = [patch.get_facecolor() for patch in sentence.patches]
    assert grounds.index(max(grounds, key=sum)) == planted_word(plan, 9)


def test_combined_shares_are_the_planted_ones(plan, episode):
    figure = plot(episode, "combined", PlotSettings(frames=6))
    (axes,) = (a for a in figure.axes if "square" in bar_widths(a))
    expected = {name.rpartition(".")[2]: 100 * share for name, share in planted_shares(plan, 6).items()}
    expected["actions"] = expected.pop("action")
    found = bar_widths(axes)
    assert set(found) == set(expected)
    for name, share in expected.items():
        assert found[name] == pytest.approx(share, abs=0.1), name


def test_cameras_whose_names_end_alike_are_told_apart(tmp_path):
    shapes = {"observation.images.left.rgb": (48, 64), "observation.images.right.rgb": (48, 64)}
    episode = open_episode(write_planted_episode(tmp_path, SyntheticPlan(image_px=shapes)))
    labels = {"left.rgb", "right.rgb"}
    combined = plot(episode, "combined", PlotSettings(frames=6))
    assert labels <= {axes.get_title() for axes in combined.axes}
    assert any(labels <= set(bar_widths(axes)) for axes in combined.axes)
    bands = plot(episode, "timeline").axes[0].collections
    assert labels <= {band.get_label() for band in bands}
    ((title, *_),) = heatmaps(plot(episode, "image", PlotSettings(frames=6, cameras="right.rgb", layers=2)))
    assert title == "layer 2"
    film = Film(episode, OverlaySettings(camera="right.rgb"))
    assert film._header_parts()[0] == "right.rgb"


def test_timeline_is_the_planted_one(plan, episode):
    figure = plot(episode, "timeline")
    top = figure.axes[0]
    heights = {c.get_label(): c.get_paths()[0].vertices[:, 1] for c in top.collections}
    # The first band lies on the axis; its upper edge is its share, which falls over the episode.
    shares = [
        100 * planted_shares(plan, frame)["observation.images.square"] for frame in range(plan.n_frames)
    ]
    assert heights["square"].max() == pytest.approx(max(shares), abs=0.1)
    assert {round(value, 1) for value in heights["square"]} >= {round(share, 1) for share in shares}
    reward = figure.axes[2].lines[0].get_ydata()
    np.testing.assert_array_equal(reward, [0] * (plan.n_frames - 1) + [1])
    assert len(figure.axes[2].patches) == 1, "the solved frames are not shaded"


def test_evolution_bars_add_up(plan, episode):
    figure = plot(episode, "evolution", PlotSettings(frames=0))
    for axes, count in zip(figure.axes, (plan.n_layers, plan.n_denoise_steps), strict=True):
        tops = [patch.get_y() + patch.get_height() for patch in axes.patches]
        assert max(tops) == pytest.approx(100, abs=0.1)
        squares = axes.patches[:count]
        mean = np.mean([planted_shares(plan, f)["observation.images.square"] for f in range(3)])
        assert [p.get_height() for p in squares] == pytest.approx([100 * mean] * count, abs=0.1)


def test_actions_look_at_themselves(plan, episode):
    figure = plot(episode, "actions", PlotSettings(frames=0))
    assert [axes.get_title() for axes in figure.axes[:2]] == ["layer 2", "layer 3"]
    expected = np.diag([planted_shares(plan, frame)["action"] for frame in range(plan.n_queries)])
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), expected, atol=1e-3)


def caption(figure):
    return " ".join(text.get_text() for text in figure.texts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_caption_says_what_was_drawn(episode, kind):
    text = caption(plot(episode, kind))
    assert "synthetic_0/episode_00000, success" in text
    assert "mean of all heads" in text or kind == "heads"
    assert RANDOM_WEIGHTS in text


def test_caption_is_inside_a_tight_bounding_box(episode):
    # Notebooks cut figures to it: what the picture is must not be cut away.
    figure = plot(episode, "image")
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    for text in figure.texts:
        extent = text.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        assert box.y0 <= extent.y0 + 0.01
        assert extent.x1 <= box.x1 + 0.01


def test_by_default_the_map_lies_on_the_image_that_the_policy_saw(tmp_path):
    """The middle frame is 5; the policy, asked at every third one, last saw frame 3."""
    episode = open_episode(write_planted_episode(tmp_path, SyntheticPlan(n_frames=11)))
    assert "frame 3 (inference 1) ·" in caption(plot(episode, "image", PlotSettings()))
    given = caption(plot(episode, "image", PlotSettings(frames=5)))
    assert "frame 5 (inference 1, which saw frame 3) ·" in given


def test_caption_says_normalisation_sinks_and_fallback(plan, episode):
    settings = PlotSettings(frames=7, layers=1, normalisation="episode", exclude="sinks", clip=100)
    text = caption(plot(episode, "image", settings))
    assert "frame 7 (inference 2, which saw frame 6)" in text
    assert "one range for the episode" in text
    assert re.search(r"\d+ key tokens? left out", text)
    assert "from stored means" in text
    assert "mean of executed actions 0-2" in text
    assert "percentile" not in text
    assert "the action executed at each frame" in caption(plot(episode, "image", PlotSettings(frames=[0, 7])))
    assert "colours end at percentile 90" in caption(plot(episode, "image", PlotSettings(clip=90)))


def test_colour_range_of_the_normalisations(plan, episode):
    ranges = {}
    for normalisation in ("share", "image", "frame", "episode"):
        settings = PlotSettings(
            frames=7, cameras="square", layers=3, heads=0, normalisation=normalisation, clip=100
        )
        figure = plot(episode, "image", settings)
        ranges[normalisation] = figure.axes[1].images[1].get_clim()
    shares = [planted_shares(plan, frame)["observation.images.square"] for frame in range(plan.n_frames)]
    assert ranges["share"][1] == pytest.approx(0.75 * shares[7], rel=1e-3)
    assert ranges["image"][1] == pytest.approx(0.75, rel=1e-3)
    assert ranges["frame"] == (0, 1)
    assert ranges["episode"][1] == pytest.approx(0.75 * shares[0], rel=1e-3)


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_files_of_three_formats(tmp_path, episode, suffix):
    path = save_figure(
        plot(episode, "image", PlotSettings(width=3.4)), tmp_path / "new" / f"a{suffix}", dpi=80
    )
    assert path.read_bytes()[:5] == {".png": b"\x89PNG\r", ".pdf": b"%PDF-", ".svg": b"<?xml"}[suffix]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_matplotlibs_settings_are_left_alone(episode):
    before = dict(mpl.rcParams)
    plot(episode, "image")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("image", {"layers": [0, 9]}, r"layer 9 was not saved; saved are 2-3 as full maps, 0-3 as means"),
        ("image", {"frames": 12}, r"frame 12 does not exist: the episode's are 0 to 11"),
        ("image", {"cameras": "front"}, r"camera 'front' does not exist; the episode's are .*square"),
        ("image", {"cameras": "empty_0"}, r"camera 'empty_0' showed no image"),
        ("image", {"heads": "all"}, r"this kind shows one head, got 'all'"),
        ("heads", {"heads": [5]}, r"head 5 was not saved; saved are 0-1"),
        ("denoise", {"denoise_steps": [7]}, r"denoise step 7 was not saved"),
        ("image", {"frames": [0] * 14}, r"14 frames of 3 cameras are too many for one figure"),
        ("text", {"frames": [1, 2]}, r"this kind shows one frame, got 2"),
        ("text", {"layers": [1, 2]}, r"this kind shows one layer, got \[1, 2\]"),
        (
            "cross-modal",
            {"word": "cube"},
            r"word 'cube' is not in the task; its words are pick, up, the, red",
        ),
        ("actions", {"layers": [1]}, r"needs full maps of layer 1"),
        ("actions", {"heads": "all"}, r"several layers or heads, not both"),
        ("image", {"query": 4, "layers": 1}, r"query=4 needs full maps of layer 1"),
    ],
)
def test_bad_choices_are_one_line(episode, kind, settings, message):
    with pytest.raises(SelectionError, match=message) as caught:
        plot(episode, kind, PlotSettings(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalisation": "max"}, r"normalisation: got 'max', expected one of share, image, frame, episode"),
        ({"interpolation": "cubic"}, r"interpolation: got 'cubic', expected nearest or linear"),
        ({"alpha": 2}, r"alpha: got 2, expected a number from 0 to 1"),
        ({"dpi": True}, r"dpi: got True"),
        ({"colormap": "rainbows"}, r"colormap 'rainbows': unknown"),
        ({"frames": "1,x"}, r"got '1,x', expected a number, a list"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        PlotSettings(**settings)


def test_episode_without_prefix_full_maps_or_video(tmp_path, left_top):
    _, plain = left_top
    with pytest.raises(SelectionError, match=r"prefix attention was not captured.*prefix_layers"):
        plot(plain, "cross-modal")
    bare = open_episode(write_planted_episode(tmp_path, SyntheticPlan(layers=(), videos=False)))
    assert "image, wrist: no video beside the store" in caption(plot(bare, "image"))
    with pytest.raises(SelectionError, match="needs full maps, and none were saved"):
        plot(bare, "actions")
    assert "from stored means" in caption(plot(bare, "timeline"))
    assert "from stored means" in caption(plot(bare, "text"))


def test_one_frame_and_incomplete_episodes(tmp_path):
    one = open_episode(
        write_planted_episode(
            tmp_path / "one", SyntheticPlan(n_frames=1, prefix_layers=(3,), vision_layers=(3,))
        )
    )
    for kind in KINDS:
        assert plot(one, kind).axes
    cut = open_episode(write_planted_episode(tmp_path / "cut", SyntheticPlan(complete=False)))
    assert "episode_00000, incomplete" in caption(plot(cut, "timeline"))
    empty = open_episode(write_planted_episode(tmp_path / "empty", SyntheticPlan(n_frames=0, videos=False)))
    with pytest.raises(StoreError, match="holds no frames yet"):
        plot(empty, "timeline")


def test_damaged_chunk_is_one_line(tmp_path):
    path = write_planted_episode(tmp_path, SyntheticPlan())
    shard = path / "suffix_attention" / "c" / "2" / "0" / "0" / "0" / "0" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[:-400] = bytes(len(damaged) - 400)  # the chunks; the index at the end stays
    shard.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"cannot be drawn \(.*\); lerobot-attn verify tells") as caught:
        plot(open_episode(path), "denoise", PlotSettings(frames=6))
    assert "\n" not in str(caught.value)


def test_command_with_settings_from_a_file(tmp_path, episode, monkeypatch, capsys):
    settings = tmp_path / "plot.yaml"
    settings.write_text("layers: [2]\nframes: 3\nwidth: 3.4\ndpi: 60\n")
    out = tmp_path / "a.png"
    status, printed, _ = run_cli(
        monkeypatch, capsys, "plot", episode.path, "--settings", settings, "--heads", "max", "-o", out
    )
    assert status == 0
    assert printed.strip() == f"Wrote {out}"
    assert out.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "imagee"], "error: kind: got 'imagee', expected one of image, text"),
        (["-o", "a.bmp"], "error: a.bmp: cannot write '.bmp', expected .png, .pdf, .svg"),
        (["--layers", "9"], "error: layer 9 was not saved"),
        (["--settings", "none.yaml"], "error: none.yaml: cannot read the settings"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(tmp_path, episode, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, error = run_cli(monkeypatch, capsys, "plot", episode.path, *arguments)
    assert status == 1
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_drawing_needs_no_framework():
    code = (
        "import lerobot_attn.plot, lerobot_attn.figures, lerobot_attn.analysis, lerobot_attn.synthetic, sys\n"
        "print([m for m in ('torch', 'lerobot', 'matplotlib.pyplot') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
