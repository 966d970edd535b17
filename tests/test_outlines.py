"""Outlines of objects in plots and overlays: on the planted edges, in the roles' colours, only with masks."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from matplotlib.contour import QuadContourSet
from matplotlib.text import Text
from test_inspection import run_cli

from lerobot_attn.analysis.spatial import Mask, masks_at
from lerobot_attn.errors import ConfigError, StoreError
from lerobot_attn.figures import Caption
from lerobot_attn.figures.grounding import Levels, levels_figure, phases_figure
from lerobot_attn.figures.outlines import ROLE_LOOKS, outlines_in_words, painted_outlines
from lerobot_attn.masks import ROLES, Instance
from lerobot_attn.overlay import OverlaySettings, overlay_frames
from lerobot_attn.overlay.film import Film
from lerobot_attn.plot import PlotSettings, plot
from lerobot_attn.store.reader import open_episode
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode
from lerobot_attn.synthetic.scene import planted_box

IMAGE, WRIST = "observation.images.image", "observation.images.wrist"
OBJECTS = {"soup": "target", "basket": "destination", "milk": "distractor", "robot": "robot"}
PLAN = SyntheticPlan(n_frames=8, objects=OBJECTS, out_of_sight=(2,))


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    return open_episode(write_planted_episode(tmp_path_factory.mktemp("outlines"), PLAN))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    plan = replace(PLAN, objects={}, out_of_sight=())
    return open_episode(write_planted_episode(tmp_path_factory.mktemp("plain"), plan))


def rgb(role):
    return [int(ROLE_LOOKS[role].colour[i : i + 2], 16) for i in (1, 3, 5)]


def said(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")


def test_the_masks_of_frames_are_those_of_their_inferences(episode, plain):
    data = episode.arrays
    found = masks_at(data, WRIST, [7, 0, 1])
    assert list(found) == [0, 2]
    for inference, mask in found.items():
        assert (mask.instance_of_pixel == data["segmentation"].values[inference, 1]).all()
        assert mask.instances[1:] == tuple(Instance(*item) for item in OBJECTS.items())
    assert masks_at(data, "observation.images.other", [0]) == {}
    assert masks_at(plain.arrays, IMAGE, [0]) == {}


@pytest.mark.parametrize("kind", ["image", "combined"])
def test_a_figure_outlines_each_object_along_its_edges(episode, kind):
    figure = plot(episode, kind, PlotSettings(frames=4, layers=[3] if kind == "image" else 3))
    panels = [axes for axes in figure.axes if axes.images and axes.findobj(QuadContourSet)]
    assert len(panels) == (4 if kind == "image" else 2)
    for number, axes in enumerate(panels):
        camera = number // (2 if kind == "image" else 1)
        height, width = list(PLAN.image_px.values())[camera]
        contours = axes.findobj(QuadContourSet)
        assert len(contours) == len(OBJECTS)
        by_colour = {tuple(np.round(255 * c.get_edgecolor()[0][:3]).astype(int)): c for c in contours}
        for name, role in OBJECTS.items():
            box = planted_box(PLAN, camera, name, 3)  # where the policy saw it
            (path,) = by_colour[tuple(rgb(role))].get_paths()
            x, y = path.vertices.T
            # Half a pixel around the edge between two pixels, in the image's pixels, whose centres are whole.
            assert [y.min(), y.max()] == pytest.approx(
                [max(0, height * box.top - 0.5), min(height - 1, height * box.bottom - 0.5)], abs=1
            )
            assert [x.min(), x.max()] == pytest.approx(
                [width * box.left - 0.5, width * box.right - 0.5], abs=1
            )
    text = said(figure)
    assert (
        "outlines: target blue (soup), destination violet (basket), distractor grey (milk), robot brown"
        in text
    )
    assert "which saw frame 3" in text


def test_what_is_not_asked_for_or_not_there_is_not_outlined(episode, plain):
    for figure in (
        plot(episode, "image", PlotSettings(frames=4, outlines=False)),
        plot(plain, "image", PlotSettings(frames=4)),
        plot(plain, "combined", PlotSettings(frames=4)),
        plot(episode, "heads", PlotSettings(frames=4)),
    ):
        assert not figure.findobj(QuadContourSet)
        assert "outline" not in said(figure)
    # At inference 2 no camera shows the target.
    figure = plot(episode, "image", PlotSettings(frames=6, cameras=["image"], layers=[3]))
    assert len(figure.findobj(QuadContourSet)) == 2 * (len(OBJECTS) - 1)
    assert "target" not in said(figure)


@pytest.mark.parametrize("size", [96, 240])
def test_an_overlay_outlines_them_in_its_camera_picture_alone(episode, size):
    settings = OverlaySettings(camera="all", size=size, alpha=0)
    film = Film(episode, settings)
    without = Film(episode, replace(settings, outlines=False))
    frames = [0, 4, 6]
    for frame, shown, clean in zip(frames, film.draw(frames), without.draw(frames), strict=True):
        for camera, (view, place) in enumerate(zip(film._views, film._places, strict=True)):
            height, width = view.size_px
            rows = slice(place.top, place.top + height)
            left, right = (slice(x, x + width) for x in (place.left, place.right))
            assert (shown[rows, right] == clean[rows, right]).all()
            differs = (shown[rows, left] != clean[rows, left]).any(axis=-1)
            allowed = np.zeros((height, width), bool)
            y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
            thick = 3 * max(2, round(height / 80))
            for name, role in OBJECTS.items():
                box = planted_box(PLAN, camera, name, 3 * (frame // 3))
                if box is None:
                    assert role == "target"
                    continue
                inside = np.outer((y >= box.top) & (y < box.bottom), (x >= box.left) & (x < box.right))
                r, c = np.nonzero(inside)
                # A mask has the size of the largest camera: its edge may be a pixel off.
                allowed[max(0, r.min() - 2) : r.max() + 3, max(0, c.min() - 2) : c.max() + 3] = True
                allowed[r.min() + thick : r.max() - thick, c.min() + thick : c.max() - thick] = False
                own = (shown[rows, left] == rgb(role)).all(axis=-1)
                around = own[max(0, r.min() - 2) : r.max() + 3, max(0, c.min() - 2) : c.max() + 3]
                assert around.sum() > 0.3 * len(np.unique(r)) * 2, (name, frame)
            assert not (differs & ~allowed).any()
            if frame == 6:
                assert not (shown[rows, left] == rgb("target")).all(axis=-1).any()


def test_an_overlays_footer_says_what_is_outlined(episode, plain):
    said = Film(episode, OverlaySettings())._footer_parts()
    what = (
        "outlines: target blue, destination violet, distractor grey, robot brown, where the policy saw them"
    )
    assert what in said
    for film in (Film(plain, OverlaySettings()), Film(episode, OverlaySettings(outlines=False))):
        assert not [part for part in film._footer_parts() if "outline" in part]


def test_a_line_lies_inside_its_object_and_the_target_above_the_rest():
    seen = np.zeros((160, 160), np.int16)
    seen[40:80, 40:80], seen[40:80, 80:120] = 1, 2  # side by side
    mask = Mask(seen, (Instance("background", "background"), Instance("a", "target"), Instance("b", "robot")))
    painted = painted_outlines(mask, seen.shape).onto(np.zeros((160, 160, 3), np.uint8))
    is_target = (painted == rgb("target")).all(axis=-1)
    expected = np.zeros_like(is_target)
    expected[40:80, 40:80] = True
    expected[42:78, 42:78] = False
    assert (is_target == expected).all()
    is_robot = (painted == rgb("robot")).all(axis=-1)
    assert is_robot.any()
    assert not (is_robot & (seen != 2)).any()
    assert not painted[seen == 0].any()


def test_the_roles_colours_are_told_apart():
    """Also by readers who are colour-blind: CIE76 differences under Machado 2009's matrices."""
    eyes = {
        "normal": np.eye(3),
        "protan": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
        "deutan": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
        "tritan": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
    }
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]

    def lab(role, eye):
        linear = ((np.array(rgb(role)) / 255 + 0.055) / 1.055) ** 2.4
        xyz = np.array(to_xyz) @ np.clip(np.array(eyes[eye]) @ linear, 0, 1) / [0.9505, 1, 1.089]
        x, y, z = np.cbrt(xyz)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    assert set(ROLE_LOOKS) == {*ROLES} - {"background"}
    for eye in eyes:
        for one, other in combinations(ROLE_LOOKS, 2):
            assert np.linalg.norm(lab(one, eye) - lab(other, eye)) > 25, (eye, one, other)
    assert len({look.dashes for look in ROLE_LOOKS.values()}) == len(ROLE_LOOKS)


def test_the_grounding_figures_have_the_outlines_colours():
    role = Levels(*np.array([[2.0], [1.0], [3.0]]))
    dots = phases_figure(dict.fromkeys(ROLES, role), ["reach"], "concentration", Caption([])).axes[0]
    drawn = {line.get_label(): line.get_color() for line in dots.get_lines()}
    assert {name: drawn[name] for name in ROLE_LOOKS} == {
        name: look.colour for name, look in ROLE_LOOKS.items()
    }
    assert len({drawn[name] for name in ROLES}) == len(ROLES)  # the background has one of its own
    for name, look in ROLE_LOOKS.items():
        figure = levels_figure({"image": role}, np.zeros(1), ("layer", "mass"), Caption([]), role=name)
        assert figure.axes[0].get_lines()[0].get_color() == look.colour


def test_many_objects_are_counted_in_words():
    seen = np.arange(5, dtype=np.int16).repeat(10).reshape(5, 10)
    instances = (
        Instance("background", "background"),
        *(Instance(f"can_{i}", "distractor") for i in range(4)),
    )
    assert outlines_in_words([Mask(seen, instances)]) == "outlines: distractor grey (4 objects)"
    assert outlines_in_words([]) == ""


@pytest.mark.parametrize("settings", [PlotSettings, OverlaySettings])
@pytest.mark.parametrize("value", ["yes", 1, None])
def test_outlines_are_on_or_off(settings, value):
    with pytest.raises(ConfigError, match=f"outlines: got {value!r}, expected true or false"):
        settings(outlines=value)


def test_commands_take_the_option(episode, tmp_path, monkeypatch, capsys):
    pictures = []
    for option in ("--outlines", "--no-outlines"):
        file = tmp_path / f"image{option}.png"
        words = ["plot", episode.path, "-o", file, "--layers", "3", option]
        status, _, error = run_cli(monkeypatch, capsys, *words)
        assert status == 0, error
        pictures.append(file.read_bytes())
    assert pictures[0] != pictures[1]
    words = ["overlay", episode.path, "-o", tmp_path / "o.mp4", "--frames", "0-1", "--no-outlines"]
    status, _, error = run_cli(monkeypatch, capsys, *words)
    assert status == 0, error


def test_damaged_masks_are_said_in_one_line(tmp_path):
    path = write_planted_episode(tmp_path, PLAN)
    for file in (path / "segmentation").rglob("*"):
        if file.is_file() and file.name != "zarr.json":
            file.write_bytes(b"nonsense" * 100)
    episode = open_episode(path)
    for draw in (
        lambda: next(overlay_frames(episode)),
        lambda: plot(episode, "image"),
    ):
        with pytest.raises(StoreError, match="lerobot-attn verify tells what is damaged") as caught:
            draw()
        assert "\n" not in str(caught.value)
