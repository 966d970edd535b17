"""The explorer's page in a real browser: what it draws is what the store holds, and every control works."""

import itertools
import json
import re
import shutil
import time
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import zarr
from browser import (
    assert_frames,
    assert_shows,
    canvas,
    colour_end,
    drawn,
    heatmaps,
    inferno,
    require,
    until,
)
from PIL import Image
from test_benchmarks import load
from test_explorer import client_of, edit_attributes, without_suffix
from test_explorer_absent import set_array
from test_explorer_build import PAGE
from test_explorer_listing import add_store
from test_store import frame_rows, inference_rows, make_writer, write_episode

from lerobot_attn import analysis, open_episode
from lerobot_attn.store.video import read_frames
from lerobot_attn.synthetic import FAMILIES, SyntheticPlan, write_planted_episode, write_softmax_episode

pytestmark = pytest.mark.browser

FIRST, SECOND, LONG = (f"attention:synthetic_0:episode_0000{index}" for index in range(3))
NORMALISATIONS = ("share", "image", "frame", "episode")
AXE = PAGE / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A success with the prefix recorded, a failure, and a longer success of random numbers."""
    folder = tmp_path_factory.mktemp("explorer") / "out"
    write_planted_episode(folder, SyntheticPlan(prefix_layers=(3,)))
    write_planted_episode(folder, SyntheticPlan(episode_index=1, n_frames=18, success=False))
    write_softmax_episode(folder, SyntheticPlan(episode_index=2, n_frames=30, seed=5))
    return folder


@pytest.fixture(scope="module")
def url(run):
    """Address of a server of the run."""
    with client_of(run) as client:
        yield f"http://127.0.0.1:{client.port}/"


def stored(run, id_):
    """Return an episode by the id that the page has for it."""
    return open_episode(run.joinpath(*id_.split(":")).with_suffix(".zarr"))


def said(page):
    """Return what the address says, name → value."""
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}


def choose(page, label, value):
    """Choose a value of a select."""
    page.get_by_role("combobox", name=re.compile(f"^{label}")).select_option(str(value))


def seek(page, frame):
    """Move the slider of the frames."""
    page.get_by_role("slider", name="Frame").fill(str(frame))


# What is drawn


def one_hot(path, patches):
    """Put all attention of inference i on the i-th patch: (camera, row, column)."""
    data = open_episode(path).arrays
    keys = []
    for camera, row, column in patches:
        _, geometry, segment = analysis.camera_geometry(data, camera)
        keys.append(segment.start + row * geometry.grid_columns + column)
    for name in ("suffix_attention", "suffix_attention_mean"):
        array = zarr.open_array(path / name, mode="r+")
        for inference, key in enumerate(keys):
            values = np.zeros(array.shape[1:], np.float16)
            values[..., key] = 1
            array[inference] = values


GEOMETRIES = [
    ("centred", {"a.square": (96, 96), "a.wide": (64, 128)}),
    ("left_top", {"a.tall": (130, 70), "a.square": (224, 224)}),
    ("centred", {"a.odd": (97, 131), "a.tall": (90, 40)}),
    ("left_top", {"a.wide": (61, 150), "a.odd": (33, 35)}),
]


@pytest.mark.parametrize(("padding", "image_px"), GEOMETRIES)
def test_a_patch_lights_exactly_its_pixels(pages, tmp_path, padding, image_px):
    patches = [
        (camera, row, column)
        for row, column in ((0, 0), (15, 15), (8, 8))
        for camera in ("a." + name.rpartition(".")[2] for name in image_px)
    ]
    plan = SyntheticPlan(
        n_frames=len(patches), n_executed=1, image_px=image_px, padding=padding, videos=False
    )
    path = write_planted_episode(tmp_path, plan)
    one_hot(path, patches)
    data = open_episode(path).arrays
    n_lit = 0
    with pages.serving(path) as address:
        page = pages.open(address)
        for normalisation in NORMALISATIONS:
            choose(page, "Colours show", normalisation)
            for frame, (camera, row, column) in enumerate(patches):
                seek(page, frame)
                drawn(page, frame=frame, norm=normalisation)
                for name in image_px:
                    _, geometry, _ = analysis.camera_geometry(data, name)
                    grid = np.zeros((16, 16))
                    grid[row, column] = name == camera
                    expected = analysis.on_camera_pixels(grid, geometry) > 0
                    shown = canvas(page, name.rpartition(".")[2], "raw")
                    what = (
                        f"{name}, {normalisation}, frame {frame}: {np.unique(shown.reshape(-1, 4), axis=0)}"
                    )
                    assert (shown[expected] == (252, 255, 164, 255)).all(), what
                    assert (shown[~expected] == (0, 0, 4, 255)).all(), what
                    n_lit += int(expected.any())
    assert n_lit >= 2 * len(NORMALISATIONS)  # the letterbox hides some


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize(
    "where",
    [
        {"layer": -1, "head": "mean", "denoise_step": -1, "frame": 0},
        {"layer": 1, "head": 1, "denoise_step": 0, "frame": 17},
        {"layer": "mean", "head": "max", "denoise_step": 1, "frame": 29},
        {"layer": 2, "head": 0, "denoise_step": 2, "frame": 4, "query": 3},
        {"layer": 3, "head": "max", "denoise_step": 2, "frame": 5, "query": "frame"},
    ],
)
def test_heatmaps_are_the_analysis(pages, url, run, normalisation, where):
    where = {"query": "executed", **where}
    asked = {"norm": normalisation, "step": where["denoise_step"]} | {
        name: where[name] for name in ("layer", "head", "frame", "query")
    }
    page = pages.open(f"{url}?episode={LONG}&" + "&".join(f"{name}={value}" for name, value in asked.items()))
    data = stored(run, LONG).arrays
    assert_shows(page, data, colour_end([data], normalisation, **where), normalisation, **where)


def test_pictures_are_the_videos_frames(pages, url, run):
    episode = stored(run, FIRST)
    page = pages.open(f"{url}?episode={FIRST}&opacity=0")
    for frame in (0, 1, 7, 3, 11):
        seek(page, frame)
        drawn(page, frame=frame)
        for camera, video in episode.videos.items():
            frames = list(read_frames(video, size_px=episode.image_size_px(camera)))
            assert_frames(page, frames, camera.rpartition(".")[2], frame)


def test_the_overlay_lies_on_the_picture(pages, url, run):
    """Its opacity grows with the root of the value, as in the package's own overlays."""
    page = pages.open(f"{url}?episode={LONG}&layer=3&head=0&norm=frame&opacity=0")
    bare = canvas(page, "image", "overlay")[..., :3].astype(float)
    page.get_by_role("slider", name="Opacity").fill("0.8")
    until(page, lambda: said(page).get("opacity") == "0.8", "the opacity is in the address")
    data = stored(run, LONG).arrays
    heatmap = heatmaps(data, "frame", frame=0, layer=3, head=0, query="executed")["observation.images.image"]
    values = analysis.on_camera_pixels(heatmap.values, analysis.camera_geometry(data, "image")[1])
    alpha = 0.8 * np.sqrt(values)[..., None]
    expected = (1 - alpha) * bare + alpha * inferno(values, 1)
    assert np.abs(canvas(page, "image", "overlay")[..., :3] - expected).max() < 12


def test_heads_and_steps_are_all_there(pages, url, run):
    """The small maps: each cell's brightest patch is the store's."""
    page = pages.open(f"{url}?episode={FIRST}&frame=4&norm=frame")
    data = stored(run, FIRST).arrays.isel(inference=1)
    _, geometry, segment = analysis.camera_geometry(data, "image")
    keys = slice(segment.start, segment.stop)

    def brightest(kind, n_columns, n_rows):
        encoded = page.locator(f"canvas[data-kind={kind}]").evaluate(
            "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        )
        rows = n_rows * (geometry.grid_rows + 1) - 1
        pixels = np.array(encoded).reshape(rows, -1, 4)[..., :3].sum(axis=-1)
        for column, row in itertools.product(range(n_columns), range(n_rows)):
            cell = pixels[row * 17 : row * 17 + 16, column * 17 : column * 17 + 16]
            yield (column, row), int(cell.argmax())

    means = data["suffix_attention_mean"].values[..., keys]
    for (layer, head), patch in brightest("heads", means.shape[1], means.shape[2]):
        assert patch == means[-1, layer, head].argmax()
    until(page, lambda: not page.locator(".stale").count(), "the steps are there")
    for (step, _), patch in brightest("steps", len(means), 1):
        assert patch == means[step, -1].astype(np.float32).mean(axis=0).argmax()


def grid_end(page, kind):
    """Return where the colour range of the small maps ends; None until they are painted."""
    found = page.locator(f"canvas[data-kind={kind}]").get_attribute("data-end")
    return None if found is None else float(found)


def test_small_maps_keep_one_range_for_the_episode(pages, url, run):
    """The grid of heads and the strip of denoise steps have the same colours at every frame."""
    page = pages.open(f"{url}?episode={LONG}&norm=episode&layer=2&head=1&step=1&camera=wrist")
    data = stored(run, LONG).arrays
    _, _, segment = analysis.camera_geometry(data, "wrist")
    # (inference, denoise_step, layer, head, patch)
    means = data["suffix_attention_mean"].values[..., segment.start : segment.stop].astype(np.float32)
    heads = max(np.percentile(means[:, 1, i, j], 99.9) for i, j in np.ndindex(means.shape[2:4]))
    steps = max(np.percentile(means[:, i, 2, 1], 99.9) for i in range(means.shape[1]))
    for frame in (0, 4, 17, 29):
        seek(page, frame)
        drawn(page, frame=frame)
        until(page, lambda: not page.locator(".stale").count(), "the steps are there")
        for kind, end in (("heads", heads), ("steps", steps)):
            until(
                page,
                lambda kind=kind, end=end: grid_end(page, kind) == pytest.approx(float(end), rel=1e-3),
                f"{kind} of frame {frame} end at {end}, not {grid_end(page, kind)}",
            )
    choose(page, "Colours show", "share")
    until(page, lambda: grid_end(page, "heads") != pytest.approx(float(heads), rel=1e-3), "its own range")


TASKS = [
    "把红色方块放进碗里",
    "ضع المكعب الأحمر في الوعاء",
    "pick 🟥 up",
    "one\ntwo",
    "<b>bold</b>",
    "x" * 300,
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("width", [390, 1280])
def test_any_instruction_is_shown_as_it_is(pages, tmp_path, task, width):
    write_planted_episode(
        tmp_path / "out", SyntheticPlan(task=task, n_text=len(task.encode()) + 40, videos=False)
    )
    with pages.serving(tmp_path / "out") as address:
        page = pages.open(f"{address}?episode={FIRST}", viewport={"width": width, "height": 800})
        assert " ".join(task.split()) in " ".join(page.locator("body").inner_text().split())
        assert page.locator(".task b, .sentence b").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("family", ["smolvla", "pi0"])
def test_the_page_shows_other_policies(pages, tmp_path, family):
    """What a layer cannot see is said, actions are numbered by themselves, and no reward is invented."""
    changes = {
        "smolvla": {"prefix_only_layers": (1, 3), "n_prefix_state": 1, "state_in_prompt": False},
        "pi0": {"n_suffix_state": 1, "n_queries": 6, "state_in_prompt": False},
    }[family]
    plan = SyntheticPlan(
        has_reward=False, has_success=False, frames_without_query=(4,), layers=(2, 3), videos=False, **changes
    )
    write_planted_episode(tmp_path / "out", plan)
    with pages.serving(tmp_path / "out") as address:
        page = pages.open(f"{address}?episode={FIRST}&frame=1&layer=3&query=2")
        page.locator(".timeline-keys", has_text="actions").wait_for()
        assert "reward" not in page.locator(".timeline-keys").inner_text()
        assert page.locator(".badge.failure, .badge.success").count() == 0
        assert "the line is action 1," in page.locator("#actions").inner_text()
        page.get_by_text("Action token 2 alone.").wait_for()
        assert (
            page.locator("#shares li", has_text="actions")
            .inner_text()
            .endswith("not visible to this layer" if family == "smolvla" else "%")
        )
        assert page.get_by_text("does not see the action tokens").count() == (family == "smolvla")
        seek(page, 4)
        drawn(page, frame=4)
        assert "no token of a chunk" in page.locator("#actions").inner_text()


@pytest.mark.parametrize("predicts", [True, False])
def test_a_replay_says_that_nothing_was_executed(pages, tmp_path, predicts):
    path = write_planted_episode(tmp_path, SyntheticPlan(videos=False, frames_without_query=(5,)))
    edit_attributes(path, replay={"every": 3})
    data = open_episode(path).arrays
    predicted = data["action"].values + 1
    predicted[5] = np.nan
    if predicts:
        set_array(path, "predicted_action", predicted)
    with pages.serving(path) as address:
        page = pages.open(f"{address}?frame=4&query=frame&layer=3")
        page.locator(".badge", has_text="replay").wait_for()
        panel, names = page.locator("#actions"), page.locator(".action-names li")
        names.first.wait_for()
        said = page.locator("body").inner_text()
        assert "executed" not in said
        assert "action 1, predicted for this frame" in said
        assert ("beside it the predicted one" in said) == predicts
        assert (
            "mean of the first 3"
            in page.get_by_role("combobox", name=re.compile("^Action token")).inner_text()
        )
        shown = [[float(number) for number in row.split()[1:]] for row in names.all_inner_texts()]
        recorded = data["action"].values[4][:, None]
        expected = np.concatenate([recorded, predicted[4][:, None]], axis=1) if predicts else recorded
        np.testing.assert_allclose(shown, expected, atol=6e-4)
        seek(page, 5)
        drawn(page, frame=5)
        until(page, lambda: "none of it stands for this frame" in panel.inner_text(), "it has no prediction")
        page.get_by_text("No action of a chunk stands for this frame").wait_for()
        assert [len(row.split()) for row in names.all_inner_texts()] == [2] * 4


def test_a_camera_that_the_words_have_not_seen_says_so(pages, tmp_path):
    """X-VLA's further cameras enter with the actions: a word cannot have looked at them."""
    write_planted_episode(tmp_path / "out", replace(FAMILIES["xvla"], videos=False))
    unseen = "the language model has not seen it"
    with pages.serving(tmp_path / "out") as address:
        page = pages.open(f"{address}?episode={FIRST}&frame=1&layer=3")
        captions = page.locator(".cameras figcaption")
        assert unseen not in " ".join(captions.all_inner_texts())
        page.locator("#words button.token", has_text="red").first.hover()
        page.get_by_text("looks at in the prefix").wait_for()
        image, wrist = captions.all_inner_texts()
        assert unseen not in image
        assert "% of all attention" in image
        assert unseen in wrist


def shown_share(text):
    """Return the number in "4.1 %", and how far off its rounding may be."""
    number = float(text.removeprefix("< ").removesuffix("%"))
    decimals = len(text.partition(".")[2].removesuffix("%").strip())
    return number / 100, (0.6 * 10**-decimals + 0.005) / 100


def assert_share(text, expected, what):
    value, off = shown_share(text)
    assert value == pytest.approx(float(expected), abs=off), f"{what}: {text}, expected {float(expected):.3%}"


@pytest.mark.parametrize("head", ["mean", 1, "max"])
def test_words_state_and_shares_are_the_analysis(pages, url, run, head):
    page = pages.open(f"{url}?episode={FIRST}&frame=5&layer=1&head={head}")
    data = stored(run, FIRST).arrays
    where = {"frame": 5, "layer": 1, "head": head, "query": "executed"}
    expected = analysis.token_attention(data, **where)
    state = data["state"].values[5]
    rows = page.locator("#words .bars li").all()
    labels = [row.locator(".bar-label").inner_text() for row in rows]
    assert labels == [str(label) for label in expected["label"].values]
    for row, token in zip(rows, expected, strict=True):
        assert_share(row.locator(".bar-value").inner_text(), token, str(token["label"].values))
        if token["kind"] == "state":
            assert row.locator(".bar-note").inner_text() == f"{state[int(token['ordinal'])]:.2f}"
    shares = analysis.modality_share(data, **where)
    names = {
        str(name).rpartition(".")[2]: share
        for name, share in zip(shares["modality"].values, shares, strict=True)
    }
    legend = page.locator("#shares .legend li").all_inner_texts()
    assert {text.split()[0] for text in legend} >= {name for name in names if name != "padding"}
    for text in legend:
        name, _, share = text.strip().partition(" ")
        assert_share(share.strip(), names[name], name)
    for camera in ("image", "wrist"):
        caption = page.locator("figcaption", has_text=camera).inner_text()
        found = re.search(rf"{camera} (\S+ %) of all attention", caption)
        assert found, caption
        assert_share(found[1], names[camera], camera)


def test_who_looks_at_a_patch(pages, url, run):
    page = pages.open(f"{url}?episode={LONG}&frame=8&layer=2&head=1")
    box = page.locator("canvas[data-camera=wrist][data-kind=raw]").bounding_box()
    page.mouse.click(box["x"] + 0.4 * box["width"], box["y"] + 0.6 * box["height"])
    data = stored(run, LONG).arrays
    _, geometry, segment = analysis.camera_geometry(data, "wrist")
    row, column = geometry.patch_at(0.6 * geometry.height_px, 0.4 * geometry.width_px)
    until(page, lambda: said(page).get("patch") == f"wrist:{row}:{column}", "the patch is in the address")
    assert page.locator("svg.mark").count() == 2
    key = segment.start + row * geometry.grid_columns + column

    def assert_most(panel, values, label):
        """The six largest, in order."""
        panel.locator("li").first.wait_for()
        expected = sorted(np.ndenumerate(values), key=lambda found: -found[1])[:6]
        lines = panel.locator("li").all()
        assert len(lines) == len(expected[:6])
        for line, (place, share) in zip(lines, expected, strict=True):
            assert line.locator(".bar-label").inner_text() == label(*place)
            assert_share(line.locator(".bar-value").inner_text(), share, label(*place))

    panels = page.locator("#patch .bar-columns > div")
    at = {"inference": 2, "denoise_step": -1}
    means = data["suffix_attention_mean"].isel(**at).values[..., key]
    assert_most(panels.nth(0), means, lambda layer, head: f"layer {layer}, head {head}")
    raw = data["suffix_attention"].isel(**at).sel(layer=2).values[1, :, key]
    assert_most(panels.nth(1), raw, lambda action: f"action {action}")
    page.keyboard.press("ArrowUp")
    panels.nth(1).get_by_role("heading", name="Action tokens, in layer 3").wait_for()
    raw = data["suffix_attention"].isel(**at).sel(layer=3).values[1, :, key]
    assert_most(panels.nth(1), raw, lambda action: f"action {action}")
    page.get_by_role("spinbutton", name="row").fill("3")
    until(page, lambda: said(page)["patch"] == f"wrist:3:{column}", "the row is another")
    page.locator("#patch").get_by_role("button", name="Close").click()
    assert page.locator("svg.mark").count() == 0


def test_a_word_shows_what_it_looks_at(pages, url, run):
    page = pages.open(f"{url}?episode={FIRST}&frame=4")
    data = stored(run, FIRST).arrays
    cameras = analysis.camera_names(data)
    before = canvas(page, "image", "raw")
    words = data.attrs["task"].split()

    def is_shown(word, frame):
        for name in cameras:
            _, geometry, _ = analysis.camera_geometry(data, name)
            heatmap = analysis.text_to_image(data, word, name, frame=frame)
            lit = analysis.on_camera_pixels(heatmap.values, geometry) > 0
            shown = canvas(page, name.rpartition(".")[2], "raw")
            if ((shown[..., :3] != (0, 0, 4)).any(axis=-1) != lit).any():
                return False
        return True

    for word in (3, 6):
        assert any(analysis.text_to_image(data, word, name, frame=4).values.any() for name in cameras)
        page.locator("#words button.token", has_text=words[word]).first.hover()
        until(page, lambda word=word: is_shown(word, 4), f"word {word} shows what it looks at")
        page.get_by_text(f"what “{words[word]}” looks at").wait_for()
    # The pointer stays where it is while inferences come and go.
    with page.expect_request("**/inferences/2/prefix/**"):
        for _ in range(3):
            page.keyboard.press("ArrowRight")
    until(page, lambda: is_shown(6, 7), "the word shows what it looks at in the next inference")
    page.get_by_text(f"what “{words[6]}” looks at").wait_for()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    drawn(page, frame=4)
    page.mouse.move(1, 1)
    until(page, lambda: (canvas(page, "image", "raw") == before).all(), "the map of the actions is back")
    page.locator("#words button.token").nth(3).focus()  # without a mouse
    page.get_by_text("looks at in the prefix").wait_for()


def test_words_are_shown_without_any_map_of_the_actions(pages, tmp_path):
    path = write_planted_episode(tmp_path, SyntheticPlan(prefix_layers=(3,)))
    data = open_episode(path).arrays
    word = data.attrs["task"].split()[3]
    heatmap = analysis.text_to_image(data, 3, "observation.images.image", frame=4)
    _, geometry, _ = analysis.camera_geometry(data, "observation.images.image")
    lit = analysis.on_camera_pixels(heatmap.values, geometry) > 0
    without_suffix(path)
    with pages.serving(path) as address:
        page = pages.open(f"{address}?frame=4&norm=image")
        page.get_by_text("No attention of the action tokens was recorded").wait_for()
        page.get_by_text("this map is missing").first.wait_for()
        assert page.locator(".timeline canvas").count() == 2  # reward, and when the policy was asked
        page.locator("#words button.token", has_text=word).first.hover()
        until(
            page,
            lambda: (((canvas(page, "image", "raw")[..., :3] != (0, 0, 4)).any(axis=-1)) == lit).all(),
            "the word shows what it looks at",
        )
        page.wait_for_load_state("networkidle")
        assert page.get_by_role("alert").count() == 0


# Two episodes


@pytest.mark.parametrize(("lock", "other_frame"), [("frame", 8), ("phase", 12)])
def test_compared_episodes_are_at_the_same_frame_or_phase(pages, url, run, lock, other_frame):
    page = pages.open(f"{url}?episode={FIRST}&frame=0&layer=1&head=0")
    choose(page, "Compare", SECOND)
    choose(page, "at the same", lock)
    page.locator(".side").nth(1).locator("canvas[data-kind=raw]").first.wait_for()
    seek(page, 8)
    drawn(page, frame=8)
    second = page.locator(".side").nth(1)
    second.get_by_text(f"frame {other_frame} ·").wait_for()
    assert said(page).get("compare") == SECOND
    data = [stored(run, id_).arrays for id_ in (FIRST, SECOND)]
    where = {"layer": 1, "head": 0, "query": "executed"}
    shown = [
        analysis.spatial.by_camera(d, analysis.attention(d, frame=f, **where))
        for d, f in zip(data, (8, other_frame), strict=True)
    ]
    end = analysis.spatial.percentile_of(
        np.concatenate([np.ravel(h.values) for maps in shown for h in maps.values()]), 99.9
    )
    assert_shows(page, data[0], end, "share", frame=8, **where)
    assert_shows(page, data[1], end, "share", frame=other_frame, side=1, **where)


def test_locked_by_frame_the_playhead_goes_on_to_the_longer_episodes_end(pages, url, run):
    page = pages.open(f"{url}?episode={FIRST}&compare={LONG}&lock=frame&frame=3")
    sides = page.locator(".side")
    sides.nth(1).get_by_text("frame 3 ·").wait_for()
    last = stored(run, FIRST).n_frames - 1
    page.keyboard.press("End")
    sides.nth(1).get_by_text("frame 29 ·").wait_for()
    sides.nth(0).get_by_text(f"frame {last} ·").wait_for()
    page.get_by_text("frame 29 of 29").wait_for()
    seek(page, 26)
    sides.nth(1).get_by_text("frame 26 ·").wait_for()
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    sides.nth(1).get_by_text("frame 27 ·").wait_for()
    page.get_by_role("button", name="Play").click()
    sides.nth(1).get_by_text("frame 29 ·").wait_for()
    page.get_by_role("button", name="Play").wait_for()  # it has ended by itself
    choose(page, "at the same", "phase")
    page.get_by_text(f"frame {last} of {last}").wait_for()
    sides.nth(1).get_by_text("frame 29 ·").wait_for()


def test_any_of_many_episodes_can_be_compared_with(pages, tmp_path):
    one = write_planted_episode(tmp_path / "out", SyntheticPlan(n_frames=6, videos=False))
    for index in range(1, 230):
        shutil.copytree(one, one.with_name(f"episode_{index:05}.zarr"))
    first, wanted = ("attention:synthetic_0:episode_" + number for number in ("00000", "00225"))
    with pages.serving(tmp_path / "out") as address:
        page = pages.open(f"{address}?episode={first}")
        offered = page.get_by_role("combobox", name=re.compile("^Compare")).locator("option")
        until(page, lambda: "and 129 more" in offered.last.text_content(), "not all are offered")
        page.get_by_role("searchbox", name="Find episodes").fill("success _0022")
        until(page, lambda: offered.count() == 11, "those that were found are offered")
        choose(page, "Compare", wanted)
        page.locator(f'.side[data-episode="{wanted}"]').get_by_text("of all attention").first.wait_for()
        page.get_by_role("searchbox", name="Find episodes").fill("no such episode")
        until(page, lambda: offered.count() == 2, "the chosen one stays")
        until(page, lambda: said(page).get("compare") == wanted, "the address says so")
        last = page.get_by_role("button", name="Help").bounding_box()
        assert last["x"] + last["width"] <= page.viewport_size["width"]


def test_a_drag_through_the_timeline_seeks(pages, url):
    page = pages.open(f"{url}?episode={LONG}&compare={SECOND}&lock=phase")
    plots = page.locator(".timeline .plots")
    until(page, lambda: page.locator(".timeline canvas").count() == 4, "the timelines are there")
    for place, part, frame in ((0, 0.5, 14.5), (1, 0.5, 14.5), (0, 0.9, 26.5)):
        over = plots.nth(place).locator(".u-over").first.bounding_box()
        page.mouse.click(over["x"] + part * over["width"], over["y"] + 10)
        until(page, lambda at=frame: abs(int(drawn(page)["frame"]) - at) <= 1, f"frame {frame} is drawn")


# Addresses, keys, controls


def state_names():
    """Return the name of everything that the page keeps in its address."""
    text = (PAGE / "src" / "state.ts").read_text()
    return re.findall(r'= field(?:<[^;(]*>)?\(\s*"(\w+)"', text)


EPISODE_STATE = {
    "episode": FIRST,
    "frame": "7",
    "layer": "2",
    "step": "1",
    "head": "1",
    "query": "3",
    "camera": "wrist",
    "norm": "image",
    "colours": "viridis",
    "opacity": "0.35",
    "patch": "wrist:3:5",
    "compare": SECOND,
    "lock": "phase",
    "outlines": "off",
    "neurons": "unit:vlm:2:5",
    "tokens": "task",
    "reduction": "max",
    "units": "on",
    "beside": "joint_1",
}
RUN_STATE = {
    "show": "failure",
    "find": "episode 1",
    "task": "fetch 1",
    "condition": "baseline",
    "sort": "-size",
    "page": "2",
}


def test_every_part_of_the_state_is_in_a_link_that_is_tested():
    assert {*EPISODE_STATE, *RUN_STATE, "tour"} == set(state_names())


def controls(page):
    """Return the value of every control of the page."""
    return page.evaluate(
        """() => [...document.querySelectorAll("select, input")].map((control) =>
            [(control.labels[0]?.innerText ?? control.ariaLabel).split("\\n")[0], control.value])"""
    )


@pytest.mark.parametrize("changes", [{}, {"query": "frame", "layer": "mean", "head": "max", "lock": "frame"}])
def test_a_link_reproduces_the_view(pages, url, changes):
    state = {**EPISODE_STATE, **changes}
    link = url + "?" + "&".join(f"{name}={value}" for name, value in state.items())
    page = pages.open(link)
    found = drawn(page, frame=7, step=1, camera="wrist", norm="image", layer=state["layer"])
    page.locator(".side").nth(1).locator("canvas[data-kind=raw]").first.wait_for()
    page.wait_for_load_state("networkidle")

    def everything():
        shown = [
            canvas(page, camera, kind, side).tobytes()
            for camera in ("image", "wrist")
            for kind in ("raw", "overlay")
            for side in (0, 1)
        ]
        return drawn(page), said(page), controls(page), shown

    initial = {"lock": "frame"}  # what an address does not say
    expected = {name: value for name, value in state.items() if initial.get(name) != value}
    until(page, lambda: said(page) == expected, "the address says all of it")
    before = everything()
    page.reload()
    drawn(page, **found)
    page.wait_for_load_state("networkidle")
    until(page, lambda: everything() == before, "everything is as it was")
    copied = pages.open(page.url)
    drawn(copied, **found)
    assert controls(copied) == controls(page)


def test_a_link_to_the_run_reproduces_its_filters(pages, url):
    page = pages.open(f"{url}?show=failure&find=episode+1", wait=False)
    page.locator(".episodes tbody tr").first.wait_for()
    assert page.locator(".episodes tbody tr").count() == 1
    before = controls(page)
    assert dict(before) == {"Show": "failure", "Find": "episode 1"}
    page.reload()
    page.locator(".episodes tbody tr").first.wait_for()
    assert controls(page) == before
    page.get_by_role("combobox", name="Show").select_option("success")
    page.get_by_text("No episode is like that").wait_for()
    page.get_by_role("searchbox", name="Find").fill("")
    until(page, lambda: page.locator(".episodes tbody tr").count() == 2, "the successes are there")
    until(page, lambda: said(page) == {"show": "success"}, "the address says so")


def episodes(page):
    """Return the number of each episode in the run's table."""
    names = page.locator(".episodes tbody a").all_inner_texts()
    return [int(name.rpartition(" ")[2]) for name in names]


def test_a_large_run_is_paged_through(pages, tmp_path):
    write_episode(tmp_path / "one.zarr", 1)
    metadata = json.loads((tmp_path / "one.zarr" / "zarr.json").read_text())
    run = tmp_path / "run"
    for number in range(1, 121):
        add_store(run, metadata, number, folder="task_0")
    with pages.serving(run) as address:
        page = pages.open(address, wait=False)
        page.get_by_text("120 of 120", exact=True).wait_for()
        assert episodes(page) == [*range(1, 51)]

        above = page.get_by_role("navigation", name="Pages", exact=True)
        above.get_by_role("button", name="Next page").focus()
        page.keyboard.press("Enter")
        until(page, lambda: episodes(page) == [*range(51, 101)], "the second page is there")
        assert above.get_by_role("button", name="Next page").evaluate("e => e === document.activeElement")
        add_store(run, metadata, 0, folder="task_0")
        page.get_by_text("121 of 121", exact=True).wait_for()
        assert episodes(page) == [*range(51, 101)]  # it came before them, and they stay

        below = page.get_by_role("navigation", name="Pages, below the table")
        below.get_by_role("button", name="Last page").click()
        until(page, lambda: episodes(page) == [*range(100, 121)], "the last page is there")
        top = page.locator(".episodes").evaluate("e => e.getBoundingClientRect().top")
        assert -2 < top < 720  # it begins in the window, though the pager below it was there
        above.get_by_role("spinbutton", name="page").fill("2")
        page.keyboard.press("Enter")
        until(page, lambda: said(page) == {"page": "2"}, "the address says the page")

        page.get_by_role("button", name="Episode", exact=False).first.click()
        page.get_by_role("columnheader", name="Episode").and_(
            page.locator("[aria-sort=descending]")
        ).wait_for()
        until(page, lambda: episodes(page) == [*range(120, 70, -1)], "the last ones come first")
        page.get_by_role("combobox", name="Task").select_option("fetch 1 & go")
        page.get_by_role("combobox", name="Show").select_option("failure")
        expected = [number for number in range(120, -1, -1) if number % 2 and not number % 3]
        until(page, lambda: episodes(page) == expected, "they are filtered")
        link = {"sort": "-path", "task": "fetch 1 & go", "show": "failure"}
        until(page, lambda: said(page) == link, "the address says all of it")
        assert not below.is_visible()
        copied = pages.open(page.url, wait=False)
        until(copied, lambda: episodes(copied) == expected, "a link shows the same")
        page.go_back()
        page.go_back()
        page.go_back()
        until(page, lambda: episodes(page) == [*range(50, 100)], "back comes the second page")


def test_a_click_with_ctrl_leaves_the_table_where_it_is(pages, url):
    page = pages.open(url, wait=False)
    link = page.get_by_role("link", name="episode 1")
    with page.context.expect_page() as opened:
        link.click(modifiers=["ControlOrMeta"])
    drawn(opened.value, episode=SECOND)
    assert link.is_visible()
    assert "episode" not in said(page)


def test_home_and_end_belong_to_the_control_with_the_focus(pages, url):
    page = pages.open(f"{url}?episode={FIRST}&frame=4")
    page.get_by_role("slider", name="Opacity").focus()
    page.keyboard.press("End")
    until(page, lambda: said(page).get("opacity") == "1", "the opacity has changed")
    assert said(page)["frame"] == "4"
    page.keyboard.press("Home")
    until(page, lambda: said(page).get("opacity") == "0", "the opacity has changed")
    assert said(page)["frame"] == "4"


def test_back_and_forward(pages, url):
    page = pages.open(url, wait=False)
    page.get_by_role("link", name="synthetic 0 · episode 2").click()
    drawn(page, episode=LONG, frame=0)
    page.go_back()
    page.locator(".episodes").wait_for()
    page.go_forward()
    page.locator("canvas[data-kind=raw]").first.wait_for()
    page.get_by_role("link", name="All episodes").click()
    page.locator(".episodes").wait_for()
    until(page, lambda: not said(page), "the address is the run's")


KEYS = [
    ("ArrowRight", {"frame": 16}),
    ("Shift+ArrowRight", {"frame": 26}),
    ("ArrowLeft", {"frame": 25}),
    ("Shift+ArrowLeft", {"frame": 15}),
    ("Home", {"frame": 0}),
    ("End", {"frame": 29}),
    ("ArrowUp", {"layer": 2}),
    ("ArrowDown", {"layer": 1}),
    ("ArrowDown", {"layer": 0}),
    ("]", {"step": 2}),
    ("[", {"step": 1}),
    ("[", {"step": 0}),
    ("]", {"step": 1}),
    ("h", {"head": "max"}),
    ("h", {"head": 0}),
    ("H", {"head": "max"}),
    ("H", {"head": "mean"}),
    ("H", {"head": 1}),
    ("c", {"camera": "wrist"}),
    ("c", {"camera": "image"}),
]
START = {"frame": 15, "layer": 1, "step": 1, "head": "mean", "camera": "image", "norm": "share"}


def test_every_key_does_what_the_help_says(pages, url):
    page = pages.open(f"{url}?episode={LONG}&frame=15&layer=1&step=1")
    now = START
    drawn(page, **now)
    for key, change in KEYS:
        now = {**now, **change}
        page.keyboard.press(key)
        drawn(page, **now)
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog")
    dialog.wait_for()
    named = set(" ".join(dialog.locator("kbd").all_inner_texts()).split())
    assert named == {"Space", "←", "→", "Home", "End", "↑", "↓", "[", "]", "h", "c", "?"}
    page.keyboard.press("ArrowLeft")  # belongs to the dialog
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert drawn(page)["frame"] == "29"


def test_keys_stop_at_the_ends(pages, url):
    page = pages.open(f"{url}?episode={FIRST}&frame=11&layer=0&step=0")
    for key in ("ArrowRight", "Shift+ArrowRight", "ArrowDown", "["):
        page.keyboard.press(key)
    page.keyboard.press("c")
    drawn(page, frame=11, layer=0, step=0, camera="wrist")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    drawn(page, frame=0)


def test_it_plays_every_frame_and_pauses(pages, url):
    page = pages.open(f"{url}?episode={LONG}&frame=3")
    page.evaluate(
        """() => {
            window.frames_ = [];
            const root = document.documentElement;
            new MutationObserver(() => frames_.push(Number(root.dataset.drawn.split("/")[1])))
                .observe(root, { attributeFilter: ["data-drawn"] });
        }"""
    )
    page.keyboard.press("Space")
    page.get_by_role("button", name="Pause").wait_for()
    until(page, lambda: int(drawn(page)["frame"]) >= 10, "frame 10 was drawn")
    page.keyboard.press("Space")
    page.get_by_role("button", name="Play").wait_for()
    paused = int(drawn(page)["frame"])
    page.wait_for_timeout(300)
    assert int(drawn(page)["frame"]) - paused <= 1  # the one that was on its way
    page.keyboard.press("Space")
    drawn(page, frame=29)
    page.get_by_role("button", name="Play").wait_for()
    assert page.evaluate("frames_") == list(range(4, 30))
    page.get_by_role("button", name="Play").click()  # at the end it begins anew
    until(page, lambda: 2 <= int(drawn(page)["frame"]) < 29, "it plays again")
    page.get_by_role("button", name="Pause").click()


REACHED = """() => {
    const controls = [...document.querySelectorAll("a[href], button, select, input, summary, [tabindex]")];
    return controls.filter((c) => !c.disabled && c.tabIndex >= 0 && c.checkVisibility()).length;
}"""
# The element that has the focus, once each; null for the page itself.
FOCUSED = """() => {
    const focused = document.activeElement;
    if (!focused || focused === document.body) return null;
    focused.dataset.reached ??= String(Math.random());
    const style = getComputedStyle(focused);
    return [focused.dataset.reached, style.outlineStyle !== "none" || style.boxShadow !== "none"];
}"""


def tabbed(page):
    """Press Tab until it comes round; return how many elements it reached, all of which show the focus."""
    reached = []
    for _ in range(200):
        page.keyboard.press("Tab")
        found = page.evaluate(FOCUSED)
        if found is None:  # between the last and the first
            continue
        name, is_visible = found
        assert is_visible, page.evaluate("document.activeElement.outerHTML")
        if name in reached:
            break
        reached.append(name)
    return len(reached)


@pytest.mark.parametrize(
    "query",
    [
        "",
        f"?episode={FIRST}&patch=image:1:1",
        f"?episode={FIRST}&compare={SECOND}",
        f"?episode={LONG}&tour=2",
    ],
)
def test_tab_reaches_every_control(pages, url, query):
    page = pages.open(url + query, wait=bool(query))
    page.locator("canvas[data-kind=raw], .episodes").first.wait_for()
    page.wait_for_load_state("networkidle")
    page.evaluate("document.activeElement.blur()")
    wanted = page.evaluate(REACHED)
    assert wanted >= 4
    assert tabbed(page) == wanted


def focus(page, role, name):
    """Go to a control by Tab alone."""
    for _ in range(150):
        page.keyboard.press("Tab")
        target = page.get_by_role(role, name=re.compile(name))
        if target.count() and target.first.evaluate("e => e === document.activeElement"):
            return
    raise AssertionError(f"Tab does not reach the {role} {name}")


def test_every_control_works_by_keyboard_alone(pages, url):
    page = pages.open(url, wait=False)
    page.locator(".episodes").wait_for()
    focus(page, "combobox", "Show")
    page.keyboard.press("ArrowDown")
    until(page, lambda: said(page).get("show") == "success", "successes are shown")
    focus(page, "searchbox", "Find")
    page.keyboard.type("episode 2")
    focus(page, "link", "episode 2")
    page.keyboard.press("Enter")
    drawn(page, episode=LONG)

    for name, changed in (
        ("Layer", {"layer": "mean"}),
        ("Head", {"head": "max"}),
        ("Camera", {"camera": "wrist"}),
        ("Action token", {"layer": "mean"}),
        ("Colours show", {"norm": "image"}),
    ):
        focus(page, "combobox", f"^{name}")
        page.keyboard.press("ArrowDown")
        drawn(page, **changed)
    focus(page, "combobox", "^Denoise step")
    page.keyboard.press("ArrowUp")
    drawn(page, step=1)
    focus(page, "combobox", "^Colour map")
    page.keyboard.press("ArrowDown")
    focus(page, "slider", "^Opacity")
    page.keyboard.press("ArrowLeft")
    focus(page, "slider", "^Frame")
    page.keyboard.press("ArrowRight")
    drawn(page, frame=1)
    expected = {"query": "frame", "colours": "viridis", "opacity": "0.65", "frame": "1", "camera": "wrist"}
    until(page, lambda: said(page).items() >= expected.items(), "the address says what was chosen")
    focus(page, "button", "^choose one by number")
    page.keyboard.press("Enter")
    focus(page, "spinbutton", "^row")
    page.keyboard.press("ArrowUp")
    until(page, lambda: said(page).get("patch") == "wrist:1:0", "the patch is chosen")
    focus(page, "button", "^Play")
    page.keyboard.press("Space")
    page.get_by_role("button", name="Pause").wait_for()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Play").wait_for()
    focus(page, "button", "^Help")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for(state="hidden")
    focus(page, "combobox", "^Compare")
    page.keyboard.press("ArrowDown")
    until(page, lambda: said(page).get("compare") == FIRST, "another episode is beside it")
    focus(page, "button", "^Tour")
    page.keyboard.press("Enter")
    page.get_by_role("dialog", name="What you see").wait_for()
    focus(page, "button", "^Next")
    page.keyboard.press("Enter")
    page.get_by_text("2 of 10").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("2 of 10").wait_for(state="hidden")
    with page.expect_download():
        focus(page, "button", "^Save PNG")
        page.keyboard.press("Enter")
    focus(page, "link", "^All episodes")
    page.keyboard.press("Enter")
    page.locator(".episodes").wait_for()


VIEWS = {
    "run": "",
    "episode": f"?episode={FIRST}",
    "patch": f"?episode={LONG}&patch=image:3:4&query=frame",
    "compare": f"?episode={FIRST}&compare={SECOND}",
    "tour": f"?episode={FIRST}&tour=1",
    "help": f"?episode={FIRST}",
    "problem": "?episode=nothing",
}


def view(pages, url, name, **context):
    """Open a view, with all that belongs to it on the page."""
    is_drawn = name not in ("run", "problem")
    page = pages.open(url + VIEWS[name], wait=is_drawn, **context)
    page.locator("main").wait_for()
    if name == "run":
        page.get_by_role("button", name="Compare").click()
        page.locator("table.groups").wait_for()
    elif name == "help":
        page.get_by_role("button", name="Help").click()
        page.get_by_role("dialog").wait_for()
    elif name == "problem":
        page.get_by_role("alert").first.wait_for()
        pages.forgive("404")
    elif name == "tour":
        page.get_by_role("dialog").wait_for()
    page.wait_for_load_state("networkidle")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", VIEWS)
def test_axe_finds_nothing_serious(pages, url, name, scheme):
    require("" if AXE.is_file() else "axe-core is not installed; bash scripts/build_explorer.sh lint")
    page = view(pages, url, name, color_scheme=scheme)
    page.add_script_tag(path=AXE)
    violations = page.evaluate("axe.run().then((found) => found.violations)")
    serious = [
        (
            found["id"],
            found["help"],
            [(node["html"][:120], node["failureSummary"]) for node in found["nodes"][:3]],
        )
        for found in violations
        if found["impact"] in ("serious", "critical")
    ]
    assert not serious


@pytest.mark.parametrize("name", VIEWS)
def test_a_narrow_window_is_not_scrolled_sideways(pages, url, name):
    page = view(pages, url, name, viewport={"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    beyond = """() => [...document.querySelectorAll("main *")].filter((element) =>
        element.checkVisibility() && element.getBoundingClientRect().right > innerWidth + 1
        && !element.closest(".hidden")).map((element) => element.outerHTML.slice(0, 120))"""
    assert page.evaluate(beyond) == []


# Tour, download


TOUR = [
    ("cameras", {"norm": "image", "layer": 3, "step": 2, "head": "mean"}),
    ("shares", {"norm": "share"}),
    ("cameras", {"norm": "image"}),
    ("heads", {"head": 0, "norm": "frame"}),
    ("timeline", {"frame": 17}),
    ("cameras", {"camera": "wrist", "norm": "share"}),
    ("steps", {"step": 0}),
    ("words", {"layer": 2}),
    ("words", {"frame": 22}),
    ("patch", {"layer": 3}),
]


def test_the_tour_moves_the_controls(pages, url):
    page = pages.open(f"{url}?episode={LONG}&tour=1")
    titles = []
    for number, (at, shown) in enumerate(TOUR, start=1):
        page.get_by_text(f"{number} of 10", exact=True).wait_for()
        drawn(page, **shown)
        titles.append(page.locator("#tour-title").inner_text())
        assert len(page.locator("#tour-text").inner_text()) > 100
        target = page.locator(".toured")
        until(
            page,
            lambda t=target, at=at: t.evaluate("e => e.id || e.className.split(' ')[0]") == at,
            f"the tour points at {at}",  # it comes a moment after its number
        )
        page.wait_for_timeout(100)  # it scrolls there
        until(
            page,
            lambda t=target: t.evaluate("e => e.getBoundingClientRect().top < innerHeight"),
            "it is in sight",
        )
        if number < len(TOUR):
            page.get_by_role("button", name="Next").click()
    assert len(set(titles)) == len(TOUR)
    until(page, lambda: said(page).get("patch") == "image:8:8", "a patch is asked about")
    page.get_by_role("button", name="Back").click()
    page.get_by_text("9 of 10", exact=True).wait_for()
    page.get_by_role("button", name="Next").click()
    page.get_by_role("button", name="Done").click()
    page.locator(".tour").wait_for(state="hidden")
    page.locator(".toured").wait_for(state="detached")
    until(page, lambda: "tour" not in said(page), "the address is without it")


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_motion_is_reduced_where_that_is_asked_for(pages, url, motion):
    page = pages.open(f"{url}?episode={FIRST}", reduced_motion=motion)
    page.evaluate(
        """() => {
            window.behaviours = [];
            Element.prototype.scrollIntoView = (how) => behaviours.push(how.behavior);
        }"""
    )
    page.get_by_role("button", name="Tour").click()
    page.get_by_role("button", name="Next").click()
    page.get_by_text("2 of 10").wait_for()
    assert set(page.evaluate("behaviours")) == {"auto" if motion == "reduce" else "smooth"}


def test_the_png_holds_the_cameras(pages, url):
    page = pages.open(f"{url}?episode={FIRST}&frame=6&opacity=1")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save PNG").click()
    assert download.value.suggested_filename == f"{FIRST.replace(':', '_')}_frame_6.png"
    saved = Image.open(download.value.path()).convert("RGB")
    left = 12
    for camera, kind in itertools.product(("image", "wrist"), ("overlay", "raw")):
        source = Image.fromarray(canvas(page, camera, kind)).convert("RGB")
        width = round(source.width * 360 / source.height)
        shown = np.asarray(saved.crop((left, 12, left + width, 372))).astype(int)
        expected = np.asarray(source.resize((width, 360), Image.Resampling.NEAREST)).astype(int)
        # Where a pixel is not a whole number of others, the two may round an edge to either side.
        assert (np.abs(shown - expected).max(axis=-1) > 2).mean() < 0.05
        left += width + 12
    below = np.asarray(saved.crop((0, 376, saved.width, saved.height)).convert("L"))
    assert (below < 128).any(), "it has a caption"


# While something is recorded


class Recording:
    """An episode that is being recorded."""

    def __init__(self, path):
        self._rng = np.random.default_rng(0)
        self._writer = make_writer(path, created=path.name)
        self.n = 0

    def record(self):
        """Commit another inference and its two frames."""
        self._writer.append_inference(inference_rows(self._rng, self.n))
        self._writer.append_frames(frame_rows(self._rng, self.n))
        self._writer.commit()
        self.n += 1


def test_the_page_follows_a_recording(pages, tmp_path):
    recording = Recording(tmp_path / "task_0" / "episode_00000.zarr")
    recording.record()
    with pages.serving(tmp_path) as address:
        at_the_end = pages.open(f"{address}?episode=task_0:episode_00000&frame=1", reduced_motion="reduce")
        elsewhere = pages.open(f"{address}?episode=task_0:episode_00000&frame=0")
        at_the_end.wait_for_timeout(700)  # both listen
        seconds = []
        for _ in range(3):
            recording.record()
            start = time.monotonic()
            drawn(at_the_end, frame=2 * recording.n - 1)
            seconds.append(time.monotonic() - start)
            elsewhere.get_by_text(f"frame 0 of {2 * recording.n - 1}").wait_for()
        assert sorted(seconds)[1] < 1
        assert drawn(elsewhere)["frame"] == "0"
        badge = at_the_end.locator(".badge.live")
        badge.wait_for()
        style = "e => getComputedStyle(e, '::before').animationName"
        assert badge.evaluate(style) == "none"
        assert elsewhere.locator(".badge.live").evaluate(style) == "pulse"


def test_new_episodes_appear_in_the_run(pages, tmp_path):
    first = Recording(tmp_path / "task_0" / "episode_00000.zarr")
    first.record()
    with pages.serving(tmp_path) as address:
        both = [pages.open(address, wait=False) for _ in range(2)]
        for page in both:
            page.locator(".episodes tbody tr").wait_for()
        both[0].wait_for_timeout(700)
        second = Recording(tmp_path / "task_0" / "episode_00001.zarr")
        second.record()
        for page in both:
            page.locator(".episodes tbody tr").nth(1).wait_for()
        second.record()
        for page in both:
            page.locator(".episodes tbody tr").nth(1).get_by_text("live").wait_for()
            until(
                page,
                lambda p=page: "4 2" in " ".join(p.locator("tr").nth(2).inner_text().split()),
                "it grows",
            )
        shutil.rmtree(tmp_path / "task_0" / "episode_00001.zarr")
        for page in both:
            until(page, lambda p=page: p.locator(".episodes tbody tr").count() == 1, "it is gone")


def test_two_browsers_at_once(pages, url):
    """What one looks at is not what the other looks at."""
    links = [f"{url}?episode={FIRST}", f"{url}?episode={LONG}&layer=0"]
    both = [pages.open(link) for link in links]
    for _ in range(8):
        for page in both:
            page.keyboard.press("ArrowRight")
    drawn(both[0], episode=FIRST, frame=8, layer=3)
    drawn(both[1], episode=LONG, frame=8, layer=0)


# What goes wrong


def test_a_store_that_is_deleted_while_it_is_open(pages, tmp_path):
    for index in range(2):
        write_episode(tmp_path / "task_0" / f"episode_0000{index}.zarr", 4, created=str(index))
    with pages.serving(tmp_path) as address:
        page = pages.open(f"{address}?episode=task_0:episode_00000")
        page.wait_for_timeout(700)
        before = canvas(page, "cam", "raw")
        shutil.rmtree(tmp_path / "task_0" / "episode_00000.zarr")
        page.get_by_role("alert").get_by_text("What was loaded is still shown").wait_for()
        assert (canvas(page, "cam", "raw") == before).all()
        seek(page, 7)
        page.get_by_role("alert").first.wait_for()
        page.get_by_role("link", name="All episodes").click()
        until(page, lambda: page.locator(".episodes tbody tr").count() == 1, "the other one is there")
        page.get_by_role("link", name="episode").click()
        drawn(page, episode="task_0:episode_00001")
        assert page.get_by_role("alert").count() == 0
    pages.forgive("404")


def test_a_store_that_is_damaged_while_it_is_open(pages, tmp_path):
    path = tmp_path / "task_0" / "episode_00000.zarr"
    write_episode(path, 6, created="once")
    write_episode(path.with_name("episode_00001.zarr"), 2, created="too")
    with pages.serving(tmp_path) as address:
        page = pages.open(f"{address}?episode=task_0:episode_00000")
        page.wait_for_load_state("networkidle")
        (path / "suffix_attention_mean" / "c" / "4" / "0" / "0" / "0" / "0").write_bytes(b"\0" * 100)
        seek(page, 9)
        page.get_by_role("alert").get_by_text("cannot be read").wait_for()
        seek(page, 3)
        drawn(page, frame=3)
        assert page.get_by_role("alert").count() == 0
        (path / "zarr.json").write_text("{")
        page.reload()
        page.get_by_role("alert").get_by_text("damaged").wait_for()
        page.get_by_role("link", name="All episodes").click()
        page.get_by_text("1 store cannot be opened").wait_for()
        page.get_by_role("link", name="episode").click()
        drawn(page, episode="task_0:episode_00001")
    pages.forgive("422")


def test_a_recording_whose_place_another_takes(pages, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    path = write_softmax_episode(run, SyntheticPlan(seed=1, image_px={"a.square": (96, 96)}, videos=False))
    new = write_softmax_episode(other, SyntheticPlan(seed=2, image_px={"a.square": (64, 96)}, videos=False))
    with pages.serving(run) as address:
        page = pages.open(f"{address}?episode=attention:synthetic_0:episode_00000&frame=4")
        page.wait_for_timeout(700)
        # Exchanged at once, as a recorder that overwrites does with the last of its renames.
        path.rename(tmp_path / "old.zarr")
        new.rename(path)
        until(page, lambda: canvas(page, "square", "raw").shape[:2] == (64, 96), "the new one is shown")
        data = open_episode(path).arrays
        where = {"layer": -1, "head": "mean", "denoise_step": -1, "query": "executed", "frame": 4}
        assert_shows(page, data, colour_end([data], "share", **where), "share", **where)
        assert page.get_by_role("alert").count() == 0
    pages.said = [text for text in pages.said if "404" not in text]  # between the two renames


def test_stores_that_break_and_are_mended_while_the_run_is_open(pages, tmp_path):
    for index in range(2):
        write_episode(tmp_path / "task_0" / f"episode_0000{index}.zarr", 2, created=str(index))
    metadata = tmp_path / "task_0" / "episode_00001.zarr" / "zarr.json"
    whole = metadata.read_text()
    with pages.serving(tmp_path) as address:
        page = pages.open(address, wait=False)
        page.locator(".episodes tbody tr").nth(1).wait_for()
        page.wait_for_timeout(700)
        metadata.write_text("{")
        page.get_by_text("1 store cannot be opened").wait_for()
        assert page.locator(".episodes tbody tr").count() == 1
        metadata.write_text(whole)
        page.locator(".episodes tbody tr").nth(1).wait_for()
        page.get_by_text("1 store cannot be opened").wait_for(state="detached")


def test_a_player_passes_over_what_cannot_be_read(pages, tmp_path):
    path = tmp_path / "task_0" / "episode_00000.zarr"
    write_episode(path, 6)
    (path / "suffix_attention_mean" / "c" / "4" / "0" / "0" / "0" / "0").write_bytes(b"\0" * 100)
    with pages.serving(tmp_path) as address:
        page = pages.open(f"{address}?episode=task_0:episode_00000&frame=5")
        page.keyboard.press("Space")
        drawn(page, frame=11)
        page.get_by_role("button", name="Play").wait_for()
    pages.forgive("422")


def test_a_server_that_ends_and_comes_back(pages, tmp_path):
    recording = Recording(tmp_path / "task_0" / "episode_00000.zarr")
    recording.record()
    with client_of(tmp_path) as client:
        page = pages.open(f"http://127.0.0.1:{client.port}/?episode=task_0:episode_00000")
        page.wait_for_load_state("networkidle")
    lost = page.get_by_text("No connection to the server")
    lost.wait_for()
    assert drawn(page)["frame"] == "0"
    write_episode(tmp_path / "task_0" / "episode_00001.zarr", 1)
    recording.record()
    with client_of(tmp_path, port=client.port):
        lost.wait_for(state="detached")
        page.get_by_text("frame 0 of 3").wait_for()  # what was recorded meanwhile
        page.keyboard.press("End")
        drawn(page, frame=3)
        page.get_by_role("link", name="All episodes").click()
        page.locator(".episodes tbody tr").nth(1).wait_for()
        pages.close()
    pages.said = [text for text in pages.said if "ERR_CONNECTION_REFUSED" not in text]  # it tried again


def test_an_episode_that_is_not_there(pages, url):
    page = pages.open(f"{url}?episode=nothing:like:this", wait=False)
    page.get_by_role("alert").get_by_text("there is no episode 'nothing:like:this' here").wait_for()
    page.get_by_role("link", name="All episodes").click()
    page.get_by_role("link", name="episode 1").click()
    drawn(page, episode=SECOND)
    assert page.get_by_role("alert").count() == 0
    page.goto(f"{url}?episode={FIRST}&compare=nothing")
    drawn(page, episode=FIRST)
    page.get_by_role("alert").get_by_text("there is no episode 'nothing' here").wait_for()
    page.keyboard.press("ArrowRight")
    drawn(page, frame=1)
    pages.forgive("404")


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        (
            "frame=abc&layer=zzz&step=x&head=y&query=z&norm=bad&colours=none&lock=on&opacity=7",
            {"frame": 0, "layer": 3},
        ),
        ("frame=-7&layer=-99&step=-99&head=-99", {"frame": 0, "layer": 0, "step": 0, "head": 0}),
        ("frame=999999999&layer=999&step=999&head=999", {"frame": 11, "layer": 3, "step": 2, "head": 1}),
        ("frame=1e3&layer=0x2&step=1.5&head=", {"frame": 0, "layer": 3, "step": 2, "head": "mean"}),
        ("camera=none&patch=none:9999:9999", {"camera": "image"}),
        ("patch=image:99:99", {"camera": "image"}),
        ("query=9999999&layer=2", {"query": "executed", "layer": 2}),
        ("tour=-4", {"frame": 0}),
        ("frame=3&unknown=%00%ff%3Cscript%3E", {"frame": 3}),
        ("camera=" + "x" * 3000, {"camera": "image"}),
    ],
)
def test_malformed_links_show_something_sensible(pages, url, query, shown):
    page = pages.open(f"{url}?episode={FIRST}&{query}")
    drawn(page, **shown)
    page.wait_for_load_state("networkidle")
    assert page.get_by_role("alert").count() == 0
    page.keyboard.press("End")
    drawn(page, frame=11)


# Speed: a limit that a busy machine keeps; benchmarks/explorer.py tells how fast it is


def test_scrubbing_is_quick(chromium, tmp_path, monkeypatch):
    benchmark = load("explorer", monkeypatch)
    path = write_softmax_episode(tmp_path, SyntheticPlan.full_size(n_frames=50, layers=()))
    with client_of(path) as client:
        page, _ = benchmark.open_page(chromium, f"http://127.0.0.1:{client.port}/")
        page.wait_for_timeout(500)
        ms = benchmark.one_by_one(page, ["ArrowRight"] * 40)
        page.context.close()
    assert benchmark.percentile(ms, 95) < 3 * benchmark.SCRUB_MS
