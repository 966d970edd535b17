"""Overlays: the right patch on the right pixels of the right frame, in a file of as many frames as chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from matplotlib.font_manager import fontManager
from PIL import Image, ImageDraw, ImageFont, features
from test_figures_text import only_matplotlibs, write_font
from test_inspection import run_cli

import lerobot_attn.overlay.film as film_module
from lerobot_attn.errors import ConfigError, SelectionError, StoreError
from lerobot_attn.figures.canvas import colormap
from lerobot_attn.overlay import ColourScale, OverlaySettings, overlay_frames, write_overlay
from lerobot_attn.settings import load_settings
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.video import VideoWriter, count_frames, read_frames
from lerobot_attn.synthetic import SyntheticPlan, planted_patch, write_planted_episode

CAMERA = "observation.images.image"
PLAN = SyntheticPlan(n_frames=8, image_px={CAMERA: (96, 96), "observation.images.wrist": (96, 128)})
BRIGHTEST = (np.array(colormap("inferno")(1.0)[:3]) * 255).round()


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    return open_episode(write_planted_episode(tmp_path_factory.mktemp("planted"), PLAN))


def planted_pixels(plan, size_px, **where):
    """(height, width) bool: the pixels of the image that the planted patch shows."""
    geometry = plan.layout.cameras[0].geometry
    patch = planted_patch(plan, 0, **where)
    height, width = geometry.height_px, geometry.width_px
    ys = (np.arange(size_px[0]) + 0.5) * height / size_px[0]
    xs = (np.arange(size_px[1]) + 0.5) * width / size_px[1]
    return np.array([[geometry.patch_at(y, x) == patch for x in xs] for y in ys])


@lru_cache
def film_of(episode, settings):
    return film_module.Film(episode, settings)


def views_of(frame, episode, settings, camera=0):
    """Cut the two views of a camera out of an overlay's frame."""
    film = film_of(episode, settings)
    place, (height, width) = film._places[camera], film._views[camera].size_px
    rows = slice(place.top, place.top + height)
    return frame[rows, place.left : place.left + width], frame[rows, place.right : place.right + width]


@pytest.mark.parametrize("padding", ["centred", "left_top"])
@pytest.mark.parametrize("size_px", [(96, 96), (96, 160), (160, 96), (97, 131)])
def test_the_planted_patch_is_what_shines(tmp_path, size_px, padding):
    plan = SyntheticPlan(n_frames=5, image_px={CAMERA: size_px}, padding=padding)
    found = open_episode(write_planted_episode(tmp_path, plan))
    settings = OverlaySettings(head=1, layer=2, denoise_step=0, normalisation="frame", alpha=1.0)
    images = read_frames(found.videos[CAMERA], size_px=size_px)
    for frame, (shown, image) in enumerate(zip(overlay_frames(found, settings), images, strict=True)):
        pixels = planted_pixels(plan, size_px, frame=frame, layer=2, head=1, denoise_step=0)
        over, pure = views_of(shown, found, settings)
        np.testing.assert_array_equal((pure == BRIGHTEST).all(axis=-1), pixels)
        np.testing.assert_array_equal(over[pixels], np.broadcast_to(BRIGHTEST, (pixels.sum(), 3)))
        np.testing.assert_array_equal(over[~pixels], image[~pixels])


@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_scaled_views_show_the_same_patch(episode, interpolation):
    settings = OverlaySettings(head=0, size=240, frames=3, interpolation=interpolation)
    (shown,) = overlay_frames(episode, settings)
    over, pure = views_of(shown, episode, settings)
    assert over.shape == pure.shape == (240, 240, 3)
    pixels = planted_pixels(PLAN, (240, 240), frame=3, layer=3, head=0, denoise_step=2)
    light = pure.astype(int).sum(axis=-1)
    if interpolation == "nearest":
        np.testing.assert_array_equal(light == light.max(), pixels)
    else:
        assert pixels[np.unravel_index(light.argmax(), light.shape)]


def test_linear_on_a_grid_takes_the_general_path(episode):
    near, linear = (
        next(overlay_frames(episode, OverlaySettings(interpolation=name))) for name in ("nearest", "linear")
    )
    assert near.shape == linear.shape
    assert (near != linear).any()


def test_all_cameras_have_their_own_maps(episode):
    settings = OverlaySettings(camera="all", head=1, normalisation="frame", frames=[4])
    (shown,) = overlay_frames(episode, settings)
    for index, camera in enumerate(PLAN.image_px):
        one = replace(settings, camera=camera)
        (alone,) = overlay_frames(episode, one)
        for a, b in zip(
            views_of(shown, episode, settings, index), views_of(alone, episode, one), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_a_frame_shows_the_action_executed_at_it(episode, monkeypatch):
    """Query and frame belong together: the map changes from frame to frame within an inference."""
    numbers = []
    original = film_module.number_picture
    monkeypatch.setattr(
        film_module, "number_picture", lambda value, *rest: numbers.append(value) or original(value, *rest)
    )
    settings = OverlaySettings(head=0, normalisation="frame", alpha=1.0)
    by_frame = list(overlay_frames(episode, settings))
    assert numbers == [0, 0, 1, 1, 2, 2, 3, 0, 4, 1, 5, 2, 6, 0, 7, 1]
    for query in range(3):
        of_query = replace(settings, query=query)
        for frame, shown in enumerate(overlay_frames(episode, of_query)):
            same = np.array_equal(
                views_of(shown, episode, of_query)[1], views_of(by_frame[frame], episode, settings)[1]
            )
            assert same == (frame % 3 == query)


def test_header_and_footer_say_what_is_shown(episode):
    film = film_module.Film(episode, OverlaySettings())
    assert film._header_parts() == [
        "image",
        "frame \ue000/8",
        "layer 3",
        "denoise step 2",
        "head mean",
        "action \ue001",
    ]
    assert film._footer_parts()[0] == "colours: share of all attention, one range for the episode"
    # Layer 0 has stored means only.
    film = film_module.Film(episode, OverlaySettings(layer=0, exclude="0,7"))
    assert film._header_parts()[-1] == "mean of executed actions 0-2"
    assert {"from stored means", "2 key tokens left out"} <= set(film._footer_parts())
    film = film_module.Film(episode, OverlaySettings(query="mean", head=1))
    assert film._header_parts()[-2:] == ["head 1", "mean of all actions"]


def test_left_out_keys_do_not_shine(episode):
    patch = planted_patch(PLAN, 0, frame=0, layer=3, head=0, denoise_step=2)
    key = patch[0] * PLAN.grid[1] + patch[1]
    settings = OverlaySettings(head=0, frames=0, normalisation="frame", exclude=key)
    (shown,) = overlay_frames(episode, settings)
    pixels = planted_pixels(PLAN, (96, 96), frame=0, layer=3, head=0, denoise_step=2)
    _, pure = views_of(shown, episode, settings)
    assert (pure[pixels].astype(int).sum(axis=-1) < 30).all()
    assert (pure[~pixels] == BRIGHTEST).all()


@pytest.mark.parametrize("size", [None, 48, 224, 360])
@pytest.mark.parametrize("camera", ["image", "all"])
def test_no_text_is_clipped(episode, size, camera):
    film = film_module.Film(
        episode, OverlaySettings(camera=camera, size=size, layer=0, exclude=(1, 2), clip=99)
    )
    width = film.size_px[1] - 2 * film_module._GAP_PX
    for line in film._header:
        text = line.replace("\ue000", "8").replace("\ue001", "2")
        assert film._font.getlength(text) <= width
    words = " ".join(film._header).replace("|", "").split()
    assert words == " ".join(film._header_parts()).split()
    # Nothing but background in the last columns and rows.
    frame = next(film.draw(film.frames))
    assert (frame[:, -2:] == film_module.BACKGROUND).all()
    assert (frame[-2:] == film_module.BACKGROUND).all()


def test_a_word_longer_than_a_line_is_broken():
    font = film_module.font_of(12)
    lines = film_module.broken(["observation_images_agentview_left" * 3, "b"], " | ", font, 150)
    assert "".join(lines).removesuffix(" | b") == "observation_images_agentview_left" * 3
    assert all(font.getlength(line) <= 150 for line in lines)


def test_opacity_grows_from_nothing_to_alpha():
    image = np.full((1, 3, 3), 100, np.uint8)
    values = np.array([[0.0, 0.5, 2.0]])
    over = ColourScale(1.0, "gray", 0.5).over(image, values)[0]
    assert over[0].tolist() == [100] * 3
    assert over[2].tolist() == [178] * 3  # halfway from 100 to 255, values beyond the range included
    assert abs(int(over[1, 0]) - (100 + 0.5 * np.sqrt(0.5) * (128 - 100))) <= 1
    nothing = ColourScale(0.0).over(image, values)
    np.testing.assert_array_equal(nothing, image)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ("all", range(8)),
        ("2-5", [2, 3, 4, 5]),
        ("6", [6]),
        ([7, 0, 3], [0, 3, 7]),
        (-1, [7]),
        ((4, 4), [4]),
    ],
)
def test_chosen_frames_are_written(episode, tmp_path, frames, expected):
    calls = []
    settings = OverlaySettings(frames=frames)
    written = write_overlay(
        episode, tmp_path / "new" / "overlay.mp4", settings, lambda *call: calls.append(call)
    )
    assert written.n_frames == count_frames(written.path) == len(expected)
    assert str(written) == str(written.path)
    every = list(overlay_frames(episode))
    for shown, frame in zip(overlay_frames(episode, settings), expected, strict=True):
        for a, b in zip(
            views_of(shown, episode, settings), views_of(every[frame], episode, settings), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    totals = {total for _, total in calls}
    assert totals == {3 + len(expected)}
    assert [done for done, _ in calls] == list(range(1, 3 + len(expected) + 1))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["overlay.mp4"]


def test_the_file_holds_what_was_drawn(episode, tmp_path):
    written = write_overlay(episode, tmp_path / "overlay.mp4", OverlaySettings(fps=13))
    assert written.fps == 13
    drawn = list(overlay_frames(episode))
    for found, frame in zip(read_frames(written.path), drawn, strict=True):
        assert found.shape == frame.shape
        assert found.shape[0] % 2 == found.shape[1] % 2 == 0
        assert np.abs(found.astype(int) - frame).mean() < 4
    content = written.path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "a browser cannot start before all is loaded"


def test_gif(episode, tmp_path):
    written = write_overlay(episode, tmp_path / "overlay.gif")
    assert (written.n_frames, written.fps) == (4, 10)
    assert str(written).endswith("overlay.gif (one of 2 frames, at 10 frames/s)")
    drawn = list(overlay_frames(episode))[::2]
    with Image.open(written.path) as image:
        assert image.n_frames == 4
        assert image.info["duration"] == 100
        for index, frame in enumerate(drawn):
            image.seek(index)
            difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - frame)
            assert difference.mean() < 6
    every = write_overlay(episode, tmp_path / "every.gif", OverlaySettings(fps=20, size=64))
    assert (every.n_frames, every.fps, every.notes) == (8, 20, ())
    with Image.open(every.path) as image:
        assert image.n_frames == 8


def test_one_frame_episode(tmp_path):
    found = open_episode(write_planted_episode(tmp_path, replace(PLAN, n_frames=1)))
    assert write_overlay(found, tmp_path / "one.mp4").n_frames == 1
    assert write_overlay(found, tmp_path / "one.gif").n_frames == 1


def rewrite_video(path, n_frames):
    frames = list(read_frames(path))
    writer = VideoWriter(path, fps=20, size_px=frames[0].shape[:2])
    for frame in frames[:n_frames]:
        writer.write(frame)
    writer.close()


def test_video_shorter_than_the_store(tmp_path):
    """An interrupted recording: what both have is shown, and it is said how much that is."""
    path = write_planted_episode(tmp_path, replace(PLAN, complete=False))
    rewrite_video(open_episode(path).videos[CAMERA], 5)
    found = open_episode(path)
    written = write_overlay(found, tmp_path / "overlay.mp4")
    assert written.n_frames == count_frames(written.path) == 5
    assert written.notes == (
        "incomplete, the camera's video has 5 of the store's 8 frames: 5 of 8 chosen frames are shown",
    )
    assert len(list(overlay_frames(found, OverlaySettings(camera="all")))) == 5
    with pytest.raises(StoreError, match="expected a chosen frame among them"):
        overlay_frames(found, OverlaySettings(frames=[6, 7]))


def test_videos_are_missing(tmp_path):
    found = open_episode(write_planted_episode(tmp_path, replace(PLAN, videos=False)))
    with pytest.raises(StoreError, match=r"no video of camera .*--eval.attention.cameras=true"):
        overlay_frames(found)


def test_empty_episode(tmp_path):
    found = open_episode(write_planted_episode(tmp_path, replace(PLAN, n_frames=0)))
    with pytest.raises(StoreError, match="holds no frames yet"):
        overlay_frames(found)


def test_damaged_chunk_names_the_inference(tmp_path):
    path = write_planted_episode(tmp_path, PLAN)
    (shard,) = (file for file in (path / "suffix_attention" / "c" / "1").rglob("*") if file.is_file())
    shard.write_bytes(b"\7" * shard.stat().st_size)
    with pytest.raises(StoreError, match="the attention of inference 1 cannot be read"):
        overlay_frames(open_episode(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 9}, "layer 9 was not saved"),
        ({"layer": 0, "query": 4}, "needs full maps of layer 0"),
        ({"denoise_step": 7}, "denoise step 7 was not saved"),
        ({"head": 2}, "head 2 was not saved"),
        ({"frames": 8}, "frame 8 does not exist"),
        ({"frames": []}, "expected one at least"),
        ({"camera": "nose"}, "camera 'nose' does not exist"),
        ({"exclude": [99999]}, "key 99999 does not exist"),
    ],
)
def test_choices_that_the_episode_does_not_hold(episode, settings, message):
    with pytest.raises(SelectionError, match=message):
        overlay_frames(episode, OverlaySettings(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "all"}, "layer: got 'all', expected one number or 'mean'"),
        ({"layer": [1, 2]}, "one map is shown at a time"),
        ({"denoise_step": "0,1"}, "denoise_step"),
        ({"head": "all"}, "expected one number, 'mean' or 'max'"),
        ({"query": "all"}, "query"),
        ({"query": True}, "query"),
        ({"camera": ["image"]}, "camera"),
        ({"normalisation": "log"}, "normalisation: got 'log'"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"alpha": 1.5}, "alpha: got 1.5, expected a number from 0 to 1"),
        ({"alpha": "much"}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"clip": 20}, "clip"),
        ({"fps": 0}, "fps"),
        ({"size": 8}, "size"),
        ({"size": 99.5}, "size"),
        ({"colormap": "rainbows"}, "colormap 'rainbows': unknown"),
        ({"colormap": 3}, "colormap"),
        ({"frames": "some"}, "frames: got 'some'"),
        ({"frames": "5-2"}, "range"),
        ({"frames": [1.5]}, "frames"),
        ({"exclude": "sink"}, "exclude: got 'sink'"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load_settings(OverlaySettings, **settings)
    assert "\n" not in str(raised.value)


def test_settings_from_yaml(tmp_path):
    file = tmp_path / "overlay.yaml"
    file.write_text("layer: mean\nframes: 2-4\nleave_out: [3]\nalpha: 1\n")
    settings = load_settings(OverlaySettings, file, head="1", camera="wrist")
    assert settings == OverlaySettings(
        layer="mean", frames=(2, 3, 4), exclude=(3,), alpha=1, head=1, camera="wrist"
    )


@pytest.mark.parametrize("name", ["overlay.avi", "overlay", "overlay.png"])
def test_other_suffixes_are_refused(episode, tmp_path, name):
    with pytest.raises(ConfigError, match=r"expected \.mp4 or \.gif"):
        write_overlay(episode, tmp_path / name)


def test_the_episodes_own_files_are_safe(episode, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in episode.path.parent.rglob("*")}
    (tmp_path / "link.mp4").symlink_to(episode.videos[CAMERA])
    for target in (
        episode.videos[CAMERA],
        episode.eval_video,
        tmp_path / "link.mp4",
        episode.path / "overlay.mp4",
    ):
        with pytest.raises(ConfigError, match="one of the episode's own files"):
            write_overlay(episode, target)
    assert before == {file: file.stat().st_mtime_ns for file in episode.path.parent.rglob("*")}


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, StoreError])
def test_nothing_half_written_is_left(episode, tmp_path, monkeypatch, suffix, failure):
    path = tmp_path / f"overlay{suffix}"
    path.write_text("what was there before")
    original = film_module.Film.draw

    def failing(self, frames, progress=None):
        for number, frame in enumerate(original(self, frames, progress)):
            if number == 2 and progress is not None:
                raise failure("in the middle")
            yield frame

    monkeypatch.setattr(film_module.Film, "draw", failing)
    with pytest.raises(failure):
        write_overlay(episode, path, progress=lambda done, total: None)
    assert path.read_text() == "what was there before"
    assert list(tmp_path.iterdir()) == [path]


def test_target_that_cannot_be_written(episode, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the overlay"):
        write_overlay(episode, tmp_path / "file" / "overlay.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        write_overlay(episode, tmp_path / "folder.mp4")


def test_videos_of_unknown_size_are_read_whole(tmp_path):
    path = write_planted_episode(tmp_path, PLAN)
    document = json.loads((path / "zarr.json").read_text())
    for video in document["attributes"]["videos"].values():
        del video["height_px"], video["fps"]
    (path / "zarr.json").write_text(json.dumps(document))
    written = write_overlay(open_episode(path), tmp_path / "overlay.mp4")
    assert (written.n_frames, written.fps) == (8, 20)


def test_command_writes_what_it_was_told(episode, tmp_path, monkeypatch, capsys):
    settings = tmp_path / "overlay.yaml"
    settings.write_text("layer: 2\nframes: [1, 4]\n")
    target = tmp_path / "a.mp4"
    status, out, _ = run_cli(
        monkeypatch, capsys, "overlay", episode.path, "--settings", settings, "--head", "1", "-o", target
    )
    assert status == 0
    assert out.strip() == f"Wrote {target}"
    assert count_frames(target) == 2
    monkeypatch.chdir(tmp_path)
    status, out, _ = run_cli(monkeypatch, capsys, "overlay", episode.path, "--gif", "--frames", "0-2")
    assert status == 0
    assert (tmp_path / "overlay.gif").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gif", "-o", "a.mp4"], "error: a.mp4: --gif writes a GIF"),
        (["-o", "a.avi"], "error: a.avi: cannot write '.avi', expected .mp4 or .gif"),
        (["--layer", "7"], "error: layer 7 was not saved"),
        (["--frames", "90"], "error: frame 90 does not exist"),
    ],
)
def test_command_errors_are_one_line(episode, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, error = run_cli(monkeypatch, capsys, "overlay", episode.path, *arguments)
    assert status == 1
    assert error.strip().startswith(message)
    assert list(tmp_path.iterdir()) == []


def named(tmp_path, camera):
    """An episode whose only camera has a name of any script."""
    image_px = {f"observation.images.{camera}": (96, 96)}
    return open_episode(write_planted_episode(tmp_path / "named", replace(PLAN, image_px=image_px)))


def test_a_script_without_a_font_is_named_on_the_picture_and_in_the_notes(tmp_path, monkeypatch):
    monkeypatch.setattr(fontManager, "ttflist", only_matplotlibs())
    found = named(tmp_path, "左手 arm")
    said = "no font on this machine has: Han; install e.g. fonts-noto-cjk"
    written = write_overlay(found, tmp_path / "overlay.mp4", OverlaySettings(frames="0-1"))
    assert written.notes == (said,)
    film = film_module.Film(found, OverlaySettings(frames=0))
    amber = (np.array(next(film.draw([0]))) == film_module.AMBER).all(axis=-1)
    assert amber.any()
    assert "左手 arm" in film._header_parts()


def test_letters_of_another_script_are_drawn_by_a_font_that_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr(fontManager, "ttflist", only_matplotlibs())
    write_font(tmp_path / "han.ttf", "Squares of Han", "左手")
    fontManager.addfont(tmp_path / "han.ttf")
    found = named(tmp_path, "左手")
    film = film_module.Film(found, OverlaySettings(frames=0))
    assert film.notes == ()
    font = film._font
    # Each glyph of that font is 0.8 em wide, of which 0.7 em are a square.
    assert abs(font.getlength("左手") - 1.6 * font.size) < 1
    right = film_module._GAP_PX + round(1.6 * font.size)
    expected = Image.new("RGB", (right, 4 + font.size), film_module.BACKGROUND)
    place = (film_module._GAP_PX, 4 + font.base.getmetrics()[0])
    of_han = ImageFont.truetype(tmp_path / "han.ttf", font.size)
    ImageDraw.Draw(expected).text(place, "左手", film_module.WHITE, of_han, anchor="ls")
    np.testing.assert_array_equal(next(film.draw([0]))[: 4 + font.size, :right], np.asarray(expected))
    # On the base line of the words beside it.
    latin = Image.new("RGB", (60, 40))
    font.write(ImageDraw.Draw(latin), (2, 2), "左H", (255, 255, 255))
    lit = np.asarray(latin)[..., 0] > 128
    assert (
        np.flatnonzero(lit[:, 4])[-1] == np.flatnonzero(lit[:, round(0.8 * font.size) + 2 :].any(axis=1))[-1]
    )


def test_latin_words_are_drawn_as_by_the_figures_font_alone():
    letters = film_module.font_of(14)
    ours, pillows = (Image.new("RGB", (300, 30)) for _ in range(2))
    letters.write(ImageDraw.Draw(ours), (3, 2), "frame 7 | layer 17, ≥0.5%", film_module.WHITE)
    ImageDraw.Draw(pillows).text((3, 2), "frame 7 | layer 17, ≥0.5%", film_module.WHITE, letters.base)
    assert ours.tobytes() == pillows.tobytes()


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow cannot set text from right to left")
def test_a_line_that_begins_with_a_word_from_right_to_left_still_runs_from_the_left():
    """What stands right of the word is where it would be behind a Latin one."""
    letters = film_module.font_of(14)
    width = round(letters.getlength("הרם"))
    pictures = []
    for text, x in (("הרם | frame 7", 3), (" | frame 7", 3 + width)):
        picture = Image.new("RGB", (300, 30))
        letters.write(ImageDraw.Draw(picture), (x, 2), text, film_module.WHITE)
        pictures.append(np.asarray(picture)[:, 3 + width + 2 :].astype(int))
    assert pictures[0].any()
    assert np.abs(pictures[0] - pictures[1]).mean() < 3  # the width is no whole number of pixels


@pytest.mark.parametrize("name", ["ارفع المكعب", "הרם", "x" * 150, "a\nb\tc", "🤖👩‍🚀", "लाल घन"])
def test_any_name_fits_the_picture(tmp_path, name):
    found = named(tmp_path, name)
    film = film_module.Film(found, OverlaySettings(frames=0))
    (frame,) = film.draw([0])
    assert (frame[:, -2:] == film_module.BACKGROUND).all()
    assert (frame[-2:] == film_module.BACKGROUND).all()
    (shown,) = overlay_frames(found, OverlaySettings(frames=0, camera="all"))
    np.testing.assert_array_equal(shown, frame)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """An episode with prefix attention."""
    plan = replace(PLAN, prefix_layers=(1, 3))
    return open_episode(write_planted_episode(tmp_path_factory.mktemp("prefix"), plan))


class TestPrefix:
    """The language model's own attention: as planted, word w looks at patch w of the first camera."""

    def test_a_words_patch_shines_in_every_frame(self, recorded):
        settings = OverlaySettings(prefix_query="block", normalisation="frame", alpha=1.0)
        geometry = recorded.layout.cameras[0].geometry
        words = recorded.task.split()
        patch = divmod(words.index("block"), geometry.grid_columns)
        pixels = [[geometry.patch_at(y + 0.5, x + 0.5) == patch for x in range(96)] for y in range(96)]
        shown = list(overlay_frames(recorded, settings))
        assert len(shown) == recorded.n_frames
        for frame in shown:
            _, pure = views_of(frame, recorded, settings)
            np.testing.assert_array_equal((pure == BRIGHTEST).all(axis=-1), pixels)

    def test_the_header_says_so_and_nothing_of_steps_or_means(self, recorded):
        film = film_of(recorded, OverlaySettings(prefix_query="state", layer=1))
        header, footer = film._header_parts(), " ".join(film._footer_parts())
        assert header[2:] == ["prefix", "layer 1", "head mean", "state, mean of its tokens"]
        assert "means" not in footer

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"query": 3}, "query: got 3 with prefix_query"),
            ({"denoise_step": 0}, "denoise_step: got 0 with prefix_query"),
            ({"exclude": "sinks"}, "exclude: got 'sinks' with prefix_query"),
            ({"prefix_query": 1.5}, "prefix_query: got 1.5, expected last, state, mean, or a word"),
        ],
    )
    def test_what_the_prefix_does_not_have_is_refused(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            OverlaySettings(**{"prefix_query": "last", **settings})

    def test_as_a_command(self, recorded, tmp_path, monkeypatch, capsys):
        target = tmp_path / "prefix.mp4"
        options = ["--prefix-query", "mean", "--layer", "-1", "--frames", "0-2"]
        status, *_ = run_cli(monkeypatch, capsys, "overlay", recorded.path, "-o", target, *options)
        assert status == 0
        assert count_frames(target) == 3
        status, _, error = run_cli(monkeypatch, capsys, "overlay", recorded.path, "--prefix-query", "fork")
        assert status == 1
        assert error.strip().startswith("error: word 'fork' is not in the task")
