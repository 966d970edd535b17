"""verify, its contact sheet and overlay on episodes of other policies and loops, and at any legal path."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Text
from test_inspection import run_cli
from test_verify import edit, edit_attributes

from lerobot_attn import analysis
from lerobot_attn.errors import StoreError
from lerobot_attn.figures.fonts import one_line
from lerobot_attn.overlay import OverlaySettings, overlay_frames
from lerobot_attn.overlay.film import Film
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.video import count_frames
from lerobot_attn.synthetic import FAMILIES, write_planted_episode
from lerobot_attn.verify import VerifySettings, contact_sheet, verify_episode

SMOLVLA = [name for name in FAMILIES if name.startswith("smolvla")]
WITHOUT_TOKEN = [name for name in FAMILIES if "no token" in name]
PATHS = ["task0:ep0", "a?b/x", "[1]", "h#1", "two words", "é", "50%", "x::y", "n" * 250]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {
        name: write_planted_episode(folder / str(number), plan)
        for number, (name, plan) in enumerate(FAMILIES.items())
    }


def check_of(path, name):
    (found,) = [check for check in verify_episode(open_episode(path)).checks if check.name == name]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_good_episode_of_any_family_passes(paths, family):
    report = verify_episode(open_episode(paths[family]), thorough=True)
    assert report.passed, [check for check in report.checks if check.passed is False]
    assert check_of(paths[family], "row sums").passed


@pytest.mark.parametrize("family", SMOLVLA)
@pytest.mark.parametrize("key", [0, -1])
def test_wrong_rows_of_layers_that_cannot_see_the_suffix_fail(paths, copied, family, key):
    """Too much on a key that the layer sees, or a number on one that it cannot see."""
    path = copied(paths[family])
    name = "suffix_attention" if FAMILIES[family].layers else "suffix_attention_mean"
    edit(path, name, lambda values: values[:, :, 1].__setitem__((..., key), 0.5))
    wrong = check_of(path, "row sums")
    assert wrong.passed is False
    assert "layer 1" in wrong.detail


@pytest.mark.parametrize("family", WITHOUT_TOKEN)
def test_frames_whose_action_is_no_token_are_counted(paths, copied, family):
    found = check_of(paths[family], "frame table")
    assert found.passed
    assert "the action of 4 of them is no token of a chunk" in found.detail
    path = copied(paths[family])
    edit(path, "frame_query", lambda values: values.__setitem__(7, -2))
    assert check_of(path, "frame table").passed is False


def test_a_video_that_could_not_be_written_is_told(tmp_path):
    path = write_planted_episode(tmp_path, replace(FAMILIES["pi05"], videos=False))
    camera = open_episode(path).layout.cameras[0].name
    edit_attributes(path, lambda values: values.update(video_errors={camera: "no encoder [red]"}))
    found = check_of(path, "frames of image")
    assert (found.passed, found.detail) == (None, "its video could not be written: no encoder [red]")


@pytest.mark.parametrize("family", WITHOUT_TOKEN)
def test_an_overlay_shows_the_executed_mean_where_actions_are_no_tokens(paths, family):
    episode = open_episode(paths[family])
    film = Film(episode, OverlaySettings(normalisation="share"))
    query = film._header_parts()[-1]
    assert query.startswith("mean of executed actions 0-2")
    assert "no tokens of a chunk" in query
    heat = analysis.image_heatmap(
        episode.arrays, film._views[0].camera, frame="all", layer=-1, query="executed", normalisation="share"
    )
    np.testing.assert_allclose(film._views[0].heat, heat.values, rtol=1e-6)
    assert len(list(film.draw(film.frames))) == len(film.frames) == 12
    assert "no token" not in Film(episode, OverlaySettings(query=1))._header_parts()[-1]


@pytest.mark.parametrize("family", ["pi05", "pi0", "pi0 without means"])
def test_an_overlay_numbers_actions_from_0(paths, family):
    film = Film(open_episode(paths[family]), OverlaySettings())
    assert [film._actions[frame] for frame in film.frames] == [0, 1, 2] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_overlay_and_contact_sheet_draw_any_family(paths, family):
    episode = open_episode(paths[family])
    layer = 1 if family == "few layers" else -1
    assert len(list(overlay_frames(episode, OverlaySettings(layer=layer, frames="0-4")))) == 5
    assert contact_sheet(episode, VerifySettings(layer=layer)).axes


@pytest.mark.parametrize("name", ["top\nleft", "a\tb", "half \ud83d", "a\x1b[31mb"])
@pytest.mark.parametrize("camera", [None, "all"])
def test_a_camera_name_is_drawn_in_one_line(paths, name, camera):
    """One camera's name stands in the header; of several each stands over its view."""
    found, expected = (drawn(paths["pi05"], text, camera) for text in (name, one_line(name)))
    np.testing.assert_array_equal(found, expected)


def drawn(path, name, camera):
    episode = open_episode(path)
    renamed = {c.name: f"{name}{number}" for number, c in enumerate(episode.layout.cameras)}
    cameras = tuple(replace(c, name=renamed[c.name]) for c in episode.layout.cameras)
    film = Film(episode, OverlaySettings(camera=camera, frames=0))
    film._episode = _Renamed(episode, replace(episode.layout, cameras=cameras))
    film._views = [view._replace(camera=renamed[view.camera]) for view in film._views]
    film._arrange()
    return next(film.draw([0]))


class _Renamed:
    """An episode with another layout."""

    def __init__(self, episode, layout):
        self._episode, self.layout = episode, layout

    def __getattr__(self, name):
        return getattr(self._episode, name)


def test_a_sheet_of_an_episode_opened_by_a_bare_name_is_named_with_its_folder(paths, monkeypatch):
    path = paths["pi05"]
    monkeypatch.chdir(path.parent)
    (text,) = [
        t.get_text()
        for t in contact_sheet(open_episode(path.name)).findobj(Text)
        if path.stem in t.get_text()
    ]
    assert f"{path.parent.name}/{path.stem}" in text
    assert not text.startswith("/")


@pytest.mark.parametrize("draw", [contact_sheet, lambda episode: list(overlay_frames(episode))])
@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError])
def test_a_mistake_of_our_own_is_not_called_damage(paths, monkeypatch, draw, error):
    def broken(*_, **__):
        raise error("ours")

    monkeypatch.setattr(analysis, "attention", broken)
    with pytest.raises(error, match="ours") as found:
        draw(open_episode(paths["pi05"]))
    assert not isinstance(found.value, StoreError)


@pytest.mark.parametrize("name", PATHS)
def test_any_legal_path_is_one_to_write_to(paths, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for suffix in (".mp4", ".gif"):
        arguments = ("overlay", paths["pi05"], "--frames", "0-3", "-o", name + suffix)
        assert run_cli(monkeypatch, capsys, *arguments)[0] == 0
        assert (tmp_path / (name + suffix)).stat().st_size
    assert count_frames(tmp_path / f"{name}.mp4") == 4
    assert run_cli(monkeypatch, capsys, "verify", paths["pi05"], "-o", f"{name}.png")[0] == 0
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    written = {path.name for path in (tmp_path / f"{name}.png").parent.iterdir()}
    assert written == {f"{name}{suffix}".rpartition("/")[2] for suffix in (".mp4", ".gif", ".png")}


def test_doors_show_the_last_layer_that_is_stored(tmp_path):
    """The store of "few layers" holds full maps of layer 1 alone, and the policy has more."""
    episode = open_episode(write_planted_episode(tmp_path, FAMILIES["few layers"]))
    assert overlay_frames(episode, OverlaySettings(frames=[0])).__next__().ndim == 3
    assert contact_sheet(episode).axes
