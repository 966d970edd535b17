"""The page's arrangement in windows of usual sizes: nothing that belongs to a frame is cut off or hidden."""

import pytest
from browser import until
from test_explorer import client_of

from lerobot_attn.synthetic import SyntheticPlan, write_softmax_episode

pytestmark = pytest.mark.browser

SHAPES = {"square": (96, 96), "wide": (96, 128)}
CAMERAS = {
    "two": ("image", "wrist"),
    "three": ("top", "left_wrist", "right_wrist"),
}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Address of a server of two episodes for each number and shape of cameras."""
    folder = tmp_path_factory.mktemp("layout") / "out"
    for number, names in CAMERAS.items():
        for shape, size in SHAPES.items():
            for index in range(2):
                plan = SyntheticPlan(
                    task_group=f"{number}{shape}",
                    episode_index=index,
                    n_frames=6 + 6 * index,
                    image_px={f"observation.images.{name}": size for name in names},
                )
                write_softmax_episode(folder, plan)
    with client_of(folder) as client:
        yield f"http://127.0.0.1:{client.port}/"


def opened(pages, url, cameras, size, *, compared):
    ids = [f"attention:{cameras}_0:episode_0000{index}" for index in range(2)]
    other = f"&compare={ids[1]}" if compared else ""
    page = pages.open(
        f"{url}?episode={ids[0]}&frame=4{other}", viewport=dict(zip(("width", "height"), size, strict=True))
    )
    n_timelines = 4 if compared else 2
    until(page, lambda: page.locator(".timeline canvas").count() == n_timelines, "the timelines are there")
    page.wait_for_load_state("networkidle")
    return page


def boxes(page, selector):
    """Return left, top, right, bottom of each element, in pixels of the window."""
    return page.evaluate(
        """(selector) => [...document.querySelectorAll(selector)].map((element) => {
            const { left, top, right, bottom } = element.getBoundingClientRect();
            return [left, top, right, bottom];
        })""",
        selector,
    )


@pytest.mark.parametrize("compared", [False, True], ids=["alone", "compared"])
@pytest.mark.parametrize("size", [(1280, 720), (1440, 900)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("number", CAMERAS)
def test_all_cameras_are_seen_without_scrolling(pages, url, number, shape, size, compared):
    page = opened(pages, url, number + shape, size, compared=compared)
    ((_, footer, _, _),) = boxes(page, "footer")
    pictures = boxes(page, ".camera .pictures")
    assert len(pictures) == len(CAMERAS[number]) * (2 if compared else 1)
    for _, top, right, bottom in boxes(page, ".camera, .colour-bar"):
        assert top >= 0
        assert bottom <= footer
        assert right <= size[0]
    for left, top, right, bottom in pictures:
        assert right - left > 190  # two pictures that can be told apart
        assert bottom - top > 70
    assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]") == [
        *size
    ]
    # No panel's own contents are wider than it is.
    wide = """[...document.querySelectorAll(".panel, .panels, .sides, footer")]
        .filter((element) => element.scrollWidth > element.clientWidth + 1)
        .map((element) => element.outerHTML.slice(0, 80))"""
    assert page.evaluate(wide) == []


def test_outlines_and_their_numbers_leave_the_cameras_in_view(pages, tmp_path):
    objects = {"cup": "target", "bowl": "destination", "can": "distractor", "robot": "robot"}
    path = write_softmax_episode(tmp_path, SyntheticPlan(n_frames=6, objects=objects))
    with pages.serving(path) as address:
        page = pages.open(f"{address}?frame=4", viewport={"width": 1440, "height": 900})
        page.locator(".plot.roles canvas").wait_for()
        page.wait_for_load_state("networkidle")
        ((_, footer, _, _),) = boxes(page, "footer")
        for _, top, right, bottom in boxes(page, ".camera, .outline-legend, .colour-bar, table.objects"):
            assert 0 <= top <= bottom <= footer
            assert right <= 1440
        size = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        assert page.evaluate(size) == [1440, 900]


@pytest.mark.parametrize("number", CAMERAS)
def test_in_a_window_of_900_pixels_cameras_lie_above_two_columns(pages, url, number):
    page = opened(pages, url, f"{number}wide", (900, 720), compared=False)
    ((left, _, right, seen),) = boxes(page, ".seen")
    assert right - left > 850
    ((_, footer, _, _),) = boxes(page, "footer")
    assert seen < footer
    tops = {top for _, top, _, _ in boxes(page, ".camera")}
    assert len(tops) == 1  # beside each other
    (maps,), (told,) = boxes(page, ".maps"), boxes(page, ".told")
    assert maps[1] == told[1] > seen
    assert maps[2] < told[0]
    assert page.evaluate("document.documentElement.scrollWidth") == 900


@pytest.mark.parametrize("size", [(900, 720), (1280, 720)], ids=str)
def test_what_is_compared_stands_beside_each_other(pages, url, size):
    page = opened(pages, url, "twosquare", size, compared=True)
    for selector in (".side > .side-title", ".seen", ".told", ".plots"):
        first, second = boxes(page, selector)
        assert first[1] == pytest.approx(second[1], abs=1), selector
        assert first[2] <= second[0], selector
    ((_, footer, _, _),) = boxes(page, "footer")
    for _, _, _, bottom in boxes(page, ".camera .pictures"):
        assert bottom <= footer
    # What only the first has goes over the whole width, below both, and says whose it is.
    ((left, top, right, _),) = boxes(page, ".maps")
    assert right - left > size[0] - 40
    assert top > max(bottom for _, _, _, bottom in boxes(page, ".told"))
    assert "twosquare 0 · episode 0" in page.locator(".maps .side-title").inner_text()
