"""The explorer on episodes with instance masks: what lies on the objects; without masks, nothing of it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import zarr
from browser import canvas, drawn, pixels, require, until
from PIL import Image
from test_explorer import client_of
from test_explorer_export import Document
from test_explorer_page import AXE
from test_store import frame_rows, inference_rows, make_writer

from lerobot_attn import analysis, open_episode
from lerobot_attn.errors import SelectionError
from lerobot_attn.explorer.export import ExportSettings, export_html
from lerobot_attn.explorer.facts import facts
from lerobot_attn.explorer.scene import masks, role_shares
from lerobot_attn.explorer.tables import chosen_means
from lerobot_attn.figures.outlines import ROLE_LOOKS
from lerobot_attn.store.stills import write_still
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode, write_softmax_episode
from lerobot_attn.synthetic.scene import planted_box

IMAGE, WRIST = "observation.images.image", "observation.images.wrist"
OBJECTS = {
    "soup_1": "target",
    "basket_1": "destination",
    "milk_1": "distractor",
    "butter_1": "distractor",
    "robot": "robot",
}
ROLES = ["target", "destination", "distractor", "robot"]
PLAN = SyntheticPlan(
    n_frames=12, objects=OBJECTS, out_of_sight=(2,), image_px={IMAGE: (96, 96), WRIST: (90, 131)}
)
WHERE = {"layer": 2, "denoise_step": 1, "head": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An episode with masks and one without."""
    folder = tmp_path_factory.mktemp("masks") / "out"
    write_softmax_episode(folder, PLAN)
    write_planted_episode(folder, replace(PLAN, objects={}, out_of_sight=(), episode_index=1))
    return folder


@pytest.fixture(scope="module")
def episode(run):
    return open_episode(run / "attention" / "synthetic_0" / "episode_00000.zarr")


FIRST, PLAIN = (f"attention:synthetic_0:episode_0000{index}" for index in range(2))


def counted(data, camera, inference, instances, where):
    """Return the share of a camera's attention on instances and their share of its area, by counting samples.

    Each pixel of the mask is cut into so many samples that the error stays below a per cent; what a patch
    gets is spread over those of its samples that show the image.
    """
    _, g, _ = analysis.camera_geometry(data, camera)
    heat = analysis.image_heatmap(data, camera, inference=inference, query="executed", **where).values
    place = data["mask_camera"].values.tolist().index(camera)
    seen = data["segmentation"].values[inference, place]
    each = 12

    def patches(n, pad, resized, whole, grid):
        samples = pad + (np.arange(n * each) + 0.5) * resized / (n * each)
        return np.minimum((samples * grid / whole).astype(int), grid - 1)

    rows = patches(seen.shape[0], g.pad_top_px, g.resized_height_px, g.input_height_px, g.grid_rows)
    columns = patches(seen.shape[1], g.pad_left_px, g.resized_width_px, g.input_width_px, g.grid_columns)
    patch = rows[:, None] * g.grid_columns + columns[None]
    inside = np.isin(seen, instances).repeat(each, 0).repeat(each, 1)
    n = g.grid_rows * g.grid_columns
    all_of, in_of = (np.bincount(patch.ravel(), weights, n) for weights in (None, inside.ravel()))
    shown = all_of > 0
    share = (heat.ravel()[shown] * in_of[shown] / all_of[shown]).sum() / heat.ravel()[shown].sum()
    return share, inside.mean()


def numbers_of(episode, role):
    return np.flatnonzero(episode.arrays["instance_role"].values == role).tolist()


# What the server answers


def test_masks_are_the_stores(episode):
    data, found = episode.arrays, facts(episode)["scene"]
    assert [(one["name"], one["role"]) for one in found["instances"]] == [
        ("background", "background"),
        *OBJECTS.items(),
    ]
    assert found["cameras"] == [IMAGE, WRIST]
    size = (found["height_px"], found["width_px"])
    for inference in range(PLAN.n_inferences):
        cameras = masks(episode, inference)["cameras"]
        for place, camera in enumerate((IMAGE, WRIST)):
            stored = data["segmentation"].values[inference, place]
            runs = np.reshape(cameras[camera]["runs"], (-1, 2))
            assert (np.repeat(runs[:, 0], runs[:, 1]).reshape(size) == stored).all()
            assert set(cameras[camera]["area"]) == set(np.unique(stored).tolist())
            assert sum(cameras[camera]["area"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("camera", [IMAGE, WRIST])
def test_role_shares_are_what_one_counts(episode, camera):
    found = role_shares(episode, 1, camera, chosen_means(episode, 1, **WHERE))
    assert (found["first"], found["camera"], found["roles"]) == (1, camera, ROLES)
    assert len(found["share"]) == PLAN.n_inferences - 1
    for row, (shares, chances) in enumerate(zip(found["share"], found["chance"], strict=True)):
        for role, share, chance in zip(ROLES, shares, chances, strict=True):
            if role == "target" and row + 1 == 2:
                assert (share, chance) == (None, None)
                continue
            of_role = numbers_of(episode, role)
            expected = counted(episode.arrays, camera, row + 1, of_role, WHERE)
            assert (share, chance) == pytest.approx(expected, rel=1e-2), (row, role)


def test_what_nobody_knows_counts_neither_inside_nor_outside(tmp_path):
    path = write_softmax_episode(tmp_path, replace(PLAN, image_px={IMAGE: (96, 96)}, videos=False))
    array = zarr.open_array(path / "segmentation", mode="r+")
    values = array[:]
    values[0] = -1
    values[1, 0, :48] = -1  # the upper half of the first camera: eight whole rows of patches
    array[:] = values
    episode = open_episode(path)
    found = role_shares(episode, 0, IMAGE, chosen_means(episode, 0, **WHERE))
    assert found["share"][0] == found["chance"][0] == [None] * 4
    heat = analysis.image_heatmap(episode.arrays, IMAGE, inference=1, query="executed", **WHERE).values[8:]
    lower = values[1, 0, 48:]
    per_pixel = heat.repeat(6, 0).repeat(6, 1) / 36
    for role, share, chance in zip(ROLES, found["share"][1], found["chance"][1], strict=True):
        inside = np.isin(lower, numbers_of(episode, role))
        if not inside.any():
            assert (share, chance) == (None, None)
            continue
        assert share == pytest.approx(per_pixel[inside].sum() / heat.sum(), rel=1e-4)
        assert chance == pytest.approx(inside.mean(), rel=1e-4)
    assert masks(episode, 0)["cameras"][IMAGE]["coverage"] == {}
    assert len(masks(episode, 1)["cameras"][IMAGE]["hidden"]) == 8 * 16


def test_the_requests_answer_the_same(run, episode):
    with client_of(run) as client:
        at = f"/api/episodes/{FIRST}/{facts_of(client, FIRST)['version']}"
        answer = client.get(f"{at}/inferences/1/masks")
        assert "immutable" in answer.headers["Cache-Control"]
        assert answer.json() == json.loads(json.dumps(masks(episode, 1)))
        found = client.get(f"{at}/roles/{WRIST}?first=2&layer=2&denoise_step=1&head=1").json()
        assert found == role_shares(episode, 2, WRIST, chosen_means(episode, 2, **WHERE))
        # As in a notebook: the end of the name, and what is usually looked at.
        usual = {"layer": "mean", "denoise_step": -1, "head": "mean"}
        expected = role_shares(episode, 0, IMAGE, chosen_means(episode, 0, **usual))
        assert client.get(f"{at}/roles/image").json() == expected
        for refused, what in (
            (f"{at}/inferences/99/masks", "inference 99 does not exist"),
            (f"{at}/roles/front", "camera 'front' does not exist"),
            (f"{at}/roles/image?first=9", "inference 9 does not exist"),
            (f"{at}/roles/image?layer=9", "layer 9"),
        ):
            answer = client.get(refused)
            assert answer.status_code == 404, refused
            assert what in answer.json()["error"]


def facts_of(client, id_):
    return client.get(f"/api/episodes/{id_}").json()


def test_without_masks_there_are_none(run, tmp_path):
    with client_of(run) as client:
        found = facts_of(client, PLAIN)
        assert found["scene"] is None
        for path in ("inferences/0/masks", "roles/image"):
            answer = client.get(f"/api/episodes/{PLAIN}/latest/{path}")
            assert answer.status_code == 404
            assert "this episode has no masks" in answer.json()["error"]


def test_a_camera_without_masks_is_refused_and_has_none(tmp_path):
    path = write_softmax_episode(tmp_path, replace(PLAN, videos=False))
    names = zarr.open_array(path / "mask_camera", mode="r+")
    names[1] = "observation.images.other"
    episode = open_episode(path)
    assert facts(episode)["scene"]["cameras"] == [IMAGE]
    assert list(masks(episode, 0)["cameras"]) == [IMAGE]
    with pytest.raises(
        SelectionError, match=r"'wrist' has no mask; expected one of: observation\.images\.image"
    ):
        role_shares(episode, 0, "wrist", chosen_means(episode, 0, **WHERE))


def test_an_inference_that_is_damaged_costs_no_other(tmp_path):
    path = write_softmax_episode(tmp_path, replace(PLAN, videos=False))
    whole = open_episode(path)
    expected = role_shares(whole, 0, IMAGE, chosen_means(whole, 0, **WHERE))
    chunk = next(file for file in (path / "segmentation").rglob("*") if file.parts[-4:-1] == ("1", "0", "0"))
    chunk.write_bytes(b"nonsense" * 100)
    episode = open_episode(path)
    found = role_shares(episode, 0, IMAGE, chosen_means(episode, 0, **WHERE))
    assert found["share"][1] == found["chance"][1] == [None] * 4
    for name in ("share", "chance"):
        assert [found[name][i] for i in (0, 2, 3)] == [expected[name][i] for i in (0, 2, 3)]


def test_an_export_holds_the_masks_of_its_inferences(episode, run, tmp_path):
    written = export_html(episode, tmp_path / "a.html", ExportSettings(frames="0,7"))
    data = Document(written.path).data
    assert data["inferences"] == [0, 2]
    assert data["masks"] == json.loads(json.dumps([masks(episode, i) for i in (0, 2)]))
    assert data["facts"]["scene"] == facts(episode)["scene"]
    plain = open_episode(run / "attention" / "synthetic_0" / "episode_00001.zarr")
    data = Document(export_html(plain, tmp_path / "b.html").path).data
    assert "masks" not in data
    assert data["facts"]["scene"] is None


# What the page shows


def rgb(role):
    return np.array([int(ROLE_LOOKS[role].colour[i : i + 2], 16) for i in (1, 3, 5)])


def outlines(page, camera, over, side=0):
    """Return what a canvas of outlines holds, (height, width, 4), once it is of the shown inference."""
    found = page.locator(".side").nth(side).locator(f'canvas[data-outlines="{camera}"][data-over={over}]')
    return pixels(found)


def painted(page, inference):
    """Wait until every canvas of outlines shows an inference."""
    script = """(inference) => {
        const found = [...document.querySelectorAll("canvas[data-outlines]")];
        return found.length && found.every(({ dataset }) => dataset.inference === inference);
    }"""
    page.wait_for_function(script, arg=str(inference))


def assert_outlined(shown, camera, inference):
    """Check that each object's colour lies along its planted edges, inside, and nothing anywhere else."""
    height, width, _ = shown.shape
    expected = np.zeros((height, width), bool)
    frame = inference * PLAN.n_executed
    mask_px = (96, 131)
    for name, role in OBJECTS.items():
        box = planted_box(PLAN, camera, name, frame)
        if box is None:
            continue
        rows, columns = np.nonzero(box.mask(mask_px))
        scale = height // mask_px[0]
        top, bottom = rows.min() * scale, (rows.max() + 1) * scale
        left, right = columns.min() * scale, (columns.max() + 1) * scale
        inside = shown[top:bottom, left:right]
        middle = inside[len(inside) // 4 : -len(inside) // 4, :, 3] == 0
        thick = int(np.argmax(middle, axis=1).max())  # of the line; 0 in the gaps of a dashed one
        assert 2 <= thick < 40, (name, thick)
        rim = np.ones(inside.shape[:2], bool)
        rim[thick:-thick, thick:-thick] = False
        expected[top:bottom, left:right] |= rim
        # The outermost pixels: the role's colour, with gaps where it is dashed.
        outermost = np.concatenate([inside[1, 1:-1], inside[-2, 1:-1], inside[1:-1, 1], inside[1:-1, -2]])
        lit = outermost[..., 3] > 250
        assert lit.mean() > (0.95 if role == "target" else 0.4), (name, lit.mean())
        assert lit.mean() < 1 or role == "target", name
        off = np.abs(outermost[lit][:, :3].astype(int) - rgb(role)).max(axis=-1)
        assert np.median(off) <= 2, (name, np.median(off))
    assert (shown[~expected][:, 3] == 0).all(), "nothing but outlines is drawn"


@pytest.fixture(scope="module")
def url(run):
    with client_of(run) as client:
        yield f"http://127.0.0.1:{client.port}/"


@pytest.mark.browser
def test_objects_are_outlined_where_they_are(pages, url):
    page = pages.open(f"{url}?episode={FIRST}&frame=1")
    for frame in (1, 4, 7):
        page.get_by_role("slider", name="Frame").fill(str(frame))
        drawn(page, frame=frame)
        inference = frame // PLAN.n_executed
        painted(page, inference)
        for place, camera in enumerate(("image", "wrist")):
            for over in ("overlay", "raw"):
                assert_outlined(outlines(page, camera, over), place, inference)
        legend = page.locator(".outline-legend").inner_text()
        assert all(role in legend for role in ROLES)
        assert f"as at frame {3 * inference}" in legend  # these frames are not those that the policy saw
    page.get_by_role("slider", name="Frame").fill("6")
    drawn(page, frame=6)
    until(page, lambda: "as at" not in page.locator(".outline-legend").inner_text(), "it was seen like that")


def table_of(page, side=0):
    """Return the table's rows: first cell's text → other cells'."""
    rows = page.locator(".side").nth(side).locator("table.objects tbody tr")
    found = [row.locator("th, td").all_inner_texts() for row in rows.all()]
    return {" ".join(first.split()): rest for first, *rest in found}


def percent_of(text):
    return float(re.match(r"([\d.]+) %", text)[1]) / 100


@pytest.mark.browser
def test_the_numbers_of_a_frame_are_the_servers(pages, url, episode):
    page = pages.open(f"{url}?episode={FIRST}&frame=4&layer=2&step=1&head=1")
    for camera, name in (("image", IMAGE), ("wrist", WRIST)):
        page.get_by_role("combobox", name=re.compile("^Camera")).select_option(camera)
        drawn(page, camera=camera)
        until(
            page,
            lambda camera=camera: camera in page.locator("#objects h2").inner_text(),
            "the table is of the camera",
        )
        found = table_of(page)
        expected = role_shares(episode, 0, name, chosen_means(episode, 0, **WHERE))
        for role, share, chance in zip(ROLES, expected["share"][1], expected["chance"][1], strict=True):
            ((texts),) = [rest for first, rest in found.items() if first.startswith(role)]
            assert percent_of(texts[0]) == pytest.approx(share, rel=0.06)
            assert percent_of(texts[1]) == pytest.approx(chance, rel=0.06)
            assert float(texts[2].split()[0]) == pytest.approx(share / chance, rel=0.06)
        assert "target soup_1" in found
        assert {"milk_1", "butter_1"} <= set(found)
    # An object that is not in view has no share.
    page.get_by_role("slider", name="Frame").fill("7")
    drawn(page, frame=7)
    until(page, lambda: table_of(page).get("target soup_1") == ["not in view"], "the target is gone")
    assert page.locator("#objects").inner_text().count("as at") == 0
    keys = page.locator(".timeline-keys")
    until(page, lambda: "of camera wrist" in keys.inner_text(), "the timeline is of the camera")
    assert "chance, by area" in keys.inner_text()
    page.locator(".plot.roles canvas").wait_for()


@pytest.mark.browser
def test_the_timeline_draws_the_roles(pages, url, episode):
    """The lines lie where the numbers say, in the roles' colours, and break where a role is not in view."""
    page = pages.open(f"{url}?episode={FIRST}&frame=0&layer=2&step=1&head=1")
    page.locator(".plot.roles canvas").wait_for()
    page.wait_for_load_state("networkidle")
    shown = pixels(page.locator(".plot.roles canvas"))
    box = page.locator(".plot.roles .u-over").bounding_box()
    outer = page.locator(".plot.roles canvas").bounding_box()
    expected = role_shares(episode, 0, IMAGE, chosen_means(episode, 0, **WHERE))
    values = np.array(expected["share"] + expected["chance"], float)
    end = min(1, np.nanmax(values) * 1.1)
    ratio = shown.shape[1] / outer["width"]

    def place(share):
        """Return the row of pixels at which a share is drawn."""
        return (box["y"] - outer["y"] + box["height"] * (1 - share / end)) * ratio

    n_seen = 0
    for inference in range(PLAN.n_inferences):
        middle = inference * PLAN.n_executed + PLAN.n_executed / 2
        x = box["x"] - outer["x"] + box["width"] * middle / PLAN.n_frames
        column = shown[:, round(x * ratio)]
        for role, share in zip(ROLES, expected["share"][inference], strict=True):
            lit = (np.abs(column[:, :3].astype(int) - rgb(role)).max(axis=-1) <= 6) & (column[:, 3] > 250)
            if share is None:
                assert not lit.any()
                continue
            apart = np.abs(np.flatnonzero(lit) - place(share)).min(initial=np.inf)
            # Of lines that lie on each other the last one is seen.
            later = np.array(expected["share"], float)[inference, ROLES.index(role) + 1 :]
            is_hidden = np.abs(place(later) - place(share)).min(initial=np.inf) < 4 * ratio
            n_seen += not is_hidden
            assert apart <= 2 or is_hidden, (role, inference, apart)
    assert n_seen > 2 * PLAN.n_inferences


@pytest.mark.browser
def test_what_is_pointed_at_says_what_it_is(pages, url, episode):
    page = pages.open(f"{url}?episode={FIRST}&frame=3&layer=2&step=1&head=1")
    painted(page, 1)
    picture = page.locator(".picture").first
    size = picture.bounding_box()
    expected = counted(episode.arrays, IMAGE, 1, [1], WHERE)

    def point(name):
        y, x = planted_box(PLAN, 0, name, 3).centre
        picture.hover(position={"x": x * size["width"], "y": y * size["height"]})

    point("soup_1")
    label = page.locator(".object-label")
    label.wait_for()
    text = " ".join(label.inner_text().split())
    assert text.startswith("soup_1 target")
    share, chance = re.search(
        r"([\d.]+) % of this camera's attention on ([\d.]+) % of its area", text
    ).groups()
    assert (float(share) / 100, float(chance) / 100) == pytest.approx(expected, rel=0.06)
    point("milk_1")
    until(page, lambda: label.inner_text().startswith("milk_1 distractor"), "the other object is named")
    page.mouse.move(2, 2)
    label.wait_for(state="hidden")
    # A tap does the same.
    touch = pages.open(f"{url}?episode={FIRST}&frame=3", has_touch=True)
    painted(touch, 1)
    picture = touch.locator(".picture").first
    size = picture.bounding_box()
    y, x = planted_box(PLAN, 0, "basket_1", 3).centre
    picture.tap(position={"x": x * size["width"], "y": y * size["height"]})
    label = touch.locator(".object-label")
    label.wait_for()
    assert label.inner_text().startswith("basket_1 destination")


@pytest.mark.browser
def test_outlines_are_switched_and_the_address_keeps_it(pages, url):
    page = pages.open(f"{url}?episode={FIRST}&frame=3")
    painted(page, 1)
    checkbox = page.get_by_role("checkbox", name=re.compile("^Outlines"))
    assert checkbox.is_checked()
    page.keyboard.press("o")
    page.locator("canvas[data-outlines]").first.wait_for(state="detached")
    until(page, lambda: "outlines=off" in page.url, "the address says it")
    assert not checkbox.is_checked()
    assert page.locator(".outline-legend").count() == 0
    assert page.locator("table.objects").count() == 1  # numbers are no outlines
    page.locator(".picture").first.hover()
    page.reload()
    drawn(page, frame=3)
    assert page.locator("canvas[data-outlines]").count() == 0
    checkbox.check()
    painted(page, 1)
    until(page, lambda: "outlines" not in page.url, "the address says nothing of what is usual")
    # With the focus on it, other keys than Space still work.
    page.keyboard.press("ArrowRight")
    drawn(page, frame=4)
    page.keyboard.press(" ")
    page.locator("canvas[data-outlines]").first.wait_for(state="detached")


@pytest.mark.browser
def test_a_page_without_masks_has_nothing_of_them(pages, url):
    asked = []
    page = pages.open(url, wait=False)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{url}?episode={PLAIN}&frame=4")
    drawn(page, frame=4)
    page.wait_for_load_state("networkidle")
    page.keyboard.press("?")
    page.get_by_role("dialog").wait_for()
    said = page.locator("body").inner_text().casefold()
    for word in ("outline", "on the objects", "chance", "target", "distractor", "mask"):
        assert word not in said
    for selector in (
        "canvas[data-outlines]",
        ".plot.roles",
        ".outline-legend",
        "table.objects",
        "input[type=checkbox]",
    ):
        assert page.locator(selector).count() == 0, selector
    assert not [address for address in asked if "/masks" in address or "/roles" in address]


@pytest.mark.browser
def test_compared_sides_have_their_own(pages, url):
    """One side has masks and the other none; axe finds nothing serious, a narrow window hides nothing."""
    page = pages.open(f"{url}?episode={FIRST}&compare={PLAIN}&frame=4", color_scheme="dark")
    painted(page, 1)
    page.wait_for_load_state("networkidle")
    page.locator(".plot.roles canvas").wait_for()
    sides = page.locator(".side")
    assert sides.nth(0).locator("table.objects").count() == 1
    assert sides.nth(1).locator("table.objects, canvas[data-outlines], .outline-legend").count() == 0
    assert page.locator(".plot.roles").count() == 1
    page.set_viewport_size({"width": 400, "height": 800})
    until(page, lambda: page.evaluate("document.documentElement.scrollWidth") <= 400, "it is narrow")
    require("" if AXE.is_file() else "axe-core is not installed; bash scripts/build_explorer.sh lint")
    page.add_script_tag(path=AXE)
    violations = page.evaluate("axe.run().then((found) => found.violations)")
    serious = [(v["id"], v["nodes"][0]["html"]) for v in violations if v["impact"] in ("serious", "critical")]
    assert not serious


@pytest.mark.browser
def test_the_png_holds_the_outlines(pages, url):
    page = pages.open(f"{url}?episode={FIRST}&frame=3&opacity=0")
    painted(page, 1)
    saved = {}
    for state in ("on", "off"):
        with page.expect_download() as download:
            page.get_by_role("button", name="Save PNG").click()
        saved[state] = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
        page.keyboard.press("o")
        page.locator("canvas[data-outlines]").first.wait_for(
            state="detached" if state == "on" else "attached"
        )
    on, off = saved["on"][12:372], saved["off"][12:372]
    is_target = (np.abs(on - rgb("target")).max(axis=-1) <= 3) & (
        np.abs(off - rgb("target")).max(axis=-1) > 20
    )
    rows, columns = np.nonzero(is_target[:, 12:372])  # of the first picture
    box = planted_box(PLAN, 0, "soup_1", 3)
    assert rows.min() == pytest.approx(360 * box.top, abs=6)
    assert rows.max() == pytest.approx(360 * box.bottom, abs=6)
    assert columns.min() == pytest.approx(360 * box.left, abs=6)
    assert columns.max() == pytest.approx(360 * box.right, abs=6)
    assert saved["on"].shape[0] > saved["off"].shape[0], "a line of the caption says what the outlines are"


GROWN = {"layer": 2, "denoise_step": 9, "head": 1}


def seen_while_it_grows(inference):
    """Return the masks of one camera, (1, 4, 5): the target comes into view and moves, the robot stays."""
    mask = np.zeros((1, 4, 5), np.int16)
    mask[0, 3] = 2
    if inference:
        mask[0, 1:3, inference - 1 : inference + 1] = 1
    return mask


def columns_of(shown, role):
    """Return the first and the last column of a canvas in which a role's colour is, if there is one."""
    lit = (np.abs(shown[..., :3].astype(int) - rgb(role)).max(axis=-1) <= 6) & (shown[..., 3] > 250)
    found = np.flatnonzero(lit.any(axis=0))
    return tuple(found[[0, -1]].tolist()) if len(found) else ()


@pytest.mark.browser
def test_outlines_and_numbers_appear_while_it_is_recorded(pages, tmp_path):
    path, rng = tmp_path / "task_0" / "episode_00000.zarr", np.random.default_rng(0)
    writer = make_writer(path, created="now", videos={"cam": {"path": "episode_00000.cam.mp4", "fps": 20}})
    video = path.with_name("episode_00000.cam.mp4")
    video.write_bytes(b"cannot be read before it is finished")
    with pages.serving(tmp_path) as address:
        asked = "?episode=task_0:episode_00000&layer=2&step=9&head=1&opacity=0"
        page = pages.open(f"{address}{asked}", wait=False)
        page.get_by_text("Nothing is recorded yet.").wait_for()
        assert page.locator("table.objects").count() == 0
        for inference in range(4):
            writer.append_inference(
                inference_rows(rng, inference) | {"segmentation": seen_while_it_grows(inference)}
            )
            writer.append_frames(frame_rows(rng, inference))
            write_still(video, 2 * inference, np.full((8, 8, 3), 60 + 40 * inference, np.uint8))
            writer.commit()
            n = 2 * (inference + 1)
            page.get_by_text(re.compile(f"frame [0-9]+ of {n - 1} ")).wait_for()
            page.keyboard.press("End")
            drawn(page, frame=n - 1)
            painted(page, inference)
            # Frame n - 1 has no picture yet, but the one that the policy saw is there, and says so.
            page.get_by_text(f"picture of frame {n - 2}, when the policy was asked").wait_for()
            np.testing.assert_allclose(canvas(page, "cam", "overlay")[..., :3], 60 + 40 * inference, atol=2)
            for over in ("overlay", "raw"):
                shown = outlines(page, "cam", over)
                scale = shown.shape[1] // 5
                left = inference - 1
                expected = ((left * scale, (left + 2) * scale - 1)) if inference else ()
                assert columns_of(shown, "target") == pytest.approx(expected, abs=1), inference
            now = open_episode(path)
            found = role_shares(now, 0, "cam", chosen_means(now, 0, **GROWN))
            assert found["roles"] == ["target", "robot"]
            for role, share, chance in zip(
                found["roles"], found["share"][-1], found["chance"][-1], strict=True
            ):
                ((texts),) = [rest for first, rest in table_of(page).items() if first.startswith(role)]
                if share is None:
                    assert texts == ["not in view"]
                    continue
                assert percent_of(texts[0]) == pytest.approx(share, rel=0.06)
                assert percent_of(texts[1]) == pytest.approx(chance, rel=0.06)
            assert_line_spans(page, "robot", 0, n)
            if inference:
                assert_line_spans(page, "target", 2, n)
        page.locator(".badge.live").wait_for()
        video.unlink()
        writer.close(complete=True, attributes={"success": True})
        page.locator(".badge.live").wait_for(state="detached")
        painted(page, 3)


def assert_line_spans(page, role, first, n_frames):
    """Check that a role's line in the timeline begins at a frame and ends at the last one."""

    def where():
        found = page.locator(".plot.roles canvas")
        if not found.count():
            return ()
        over, outer = page.locator(".plot.roles .u-over").bounding_box(), found.bounding_box()
        shown = pixels(found)
        ratio = shown.shape[1] / outer["width"]
        return tuple(
            (column / ratio - over["x"] + outer["x"]) / over["width"] for column in columns_of(shown, role)
        )

    expected = ((first + 0.5) / n_frames, (n_frames - 0.5) / n_frames)
    until(
        page,
        lambda: where() == pytest.approx(expected, abs=0.01),
        f"{role}'s line is at {expected}, not {where()}",
    )


@pytest.mark.browser
def test_an_exported_page_has_them_without_a_server(pages, episode, url, tmp_path):
    written = export_html(episode, tmp_path / "page.html", ExportSettings(denoise_steps="1"))
    page = pages.open(f"{written.path.as_uri()}?frame=4&layer=2&step=1&head=1")
    painted(page, 1)
    assert_outlined(outlines(page, "image", "overlay"), 0, 1)
    page.locator(".plot.roles canvas").wait_for()
    served = pages.open(f"{url}?episode={FIRST}&frame=4&layer=2&step=1&head=1")
    served.locator(".plot.roles canvas").wait_for()
    for one in (page, served):
        one.wait_for_load_state("networkidle")
    assert table_of(page) == table_of(served)
    plots = [pixels(one.locator(".plot.roles canvas")) for one in (page, served)]
    assert (plots[0] == plots[1]).all()
