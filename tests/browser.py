"""A headless Chromium for tests of the explorer's page, the gate before them, and what a canvas must show."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from conftest import REQUIRE_LIBERO
from PIL import Image
from test_explorer import client_of

from lerobot_attn import analysis
from lerobot_attn.analysis.spatial import colour_range, episode_ranges
from lerobot_attn.explorer.document import page_folder

SCREENSHOTS = "LEROBOT_ATTN_SCREENSHOTS"  # a folder that gets a picture of each page at its test's end
VIEWPORT = {"width": 1280, "height": 720}
WAIT_MS = 15_000  # for what takes a tenth of it, on a machine with other work


def require(reason: str) -> None:
    """Skip, or fail where everything must run, if there is a reason not to."""
    if not reason:
        return
    if os.environ.get("CI") == "true" or os.environ.get(REQUIRE_LIBERO) == "1":
        pytest.fail(f"every test must run here (CI=true or {REQUIRE_LIBERO}=1), but {reason}", pytrace=False)
    pytest.skip(reason)


def why_no_page() -> str:
    """Say why there is no page to test; nothing if there is."""
    if (page_folder() / "index.html").is_file():
        return ""
    return "the explorer's page is not built; bash scripts/build_explorer.sh"


def why_no_browser() -> str:
    """Say why the page cannot be tested; nothing if it can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed; pip install 'lerobot_policy_attn[dev]'"
    if shutil.which("chromium") is None:
        return "there is no chromium; apt-get install chromium"
    return why_no_page()


@contextlib.contextmanager
def started() -> Iterator[Any]:
    """Start a Chromium; skips or fails where there is none, or no page to look at."""
    require(why_no_browser())
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Pages:
    """Opens pages, each in a profile of its own, and notes what their consoles say.

    Attributes:
        said: errors and warnings, in order.
    """

    def __init__(self, browser: Any, name: str):
        """Note the browser, and the test's name for pictures."""
        self._browser = browser
        self._name = re.sub(r"\W+", "_", name)
        self._n = 0
        self._open: list[Any] = []
        self.said: list[str] = []

    def open(self, address: str, *, wait: bool = True, **context: Any) -> Any:
        """Open an address; with `wait`, return once an episode's frame is drawn."""
        page = self._browser.new_context(**{"viewport": VIEWPORT, **context}).new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda m: m.type in ("error", "warning") and self.said.append(m.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        self._open.append(page)
        page.goto(address)
        if wait:
            drawn(page)
        return page

    def forgive(self, pattern: str) -> None:
        """Take back what had to be said: of a request that was refused, the browser itself tells."""
        kept = [text for text in self.said if not re.search(pattern, text)]
        assert len(kept) < len(self.said), f"nothing in the console is like {pattern!r}: {self.said}"
        self.said = kept

    @contextlib.contextmanager
    def serving(self, path: Path) -> Iterator[str]:
        """Serve a path for a while; pages are closed before the server, which they would miss."""
        with client_of(path) as client:
            yield f"http://127.0.0.1:{client.port}/"
            self.close()

    def close(self) -> None:
        """Close all that are open, photographed if that is asked for."""
        folder = os.environ.get(SCREENSHOTS)
        while self._open:
            page = self._open.pop(0)
            if folder:
                page.screenshot(path=Path(folder) / f"{self._name}_{self._n}.png")
                self._n += 1
            page.context.close()


def drawn(page: Any, **wanted: Any) -> dict[str, str]:
    """Wait until the page has drawn what is wanted; return all that it says of what it has drawn.

    Args:
        page: Playwright's.
        wanted: `frame=3`, `layer="mean"`, …; nothing: anything at all.
    """
    names = ["episode", "frame", "step", "layer", "head", "camera", "norm", "query"]
    script = """([names, wanted]) => {
        const values = (document.documentElement.dataset.drawn ?? "").split("/");
        if (values.length !== names.length) return null;
        const found = Object.fromEntries(names.map((name, i) => [name, values[i]]));
        return Object.keys(wanted).every((name) => found[name] === wanted[name]) && found;
    }"""
    asked = {name: str(value) for name, value in wanted.items()}
    found: dict[str, str] = page.wait_for_function(script, arg=[names, asked]).json_value()
    return found


def until(page: Any, condition: Callable[[], Any], what: str, timeout_ms: int = WAIT_MS) -> Any:
    """Wait until a condition holds, e.g. of Python's own; return its value."""
    for _ in range(timeout_ms // 20):
        found = condition()
        if found:
            return found
        page.wait_for_timeout(20)
    raise AssertionError(f"waited {timeout_ms} ms in vain until {what}")


def canvas(page: Any, camera: str, kind: str, side: int = 0) -> np.ndarray:
    """Return what a camera's canvas holds.

    Args:
        page: Playwright's.
        camera: its short name.
        kind: "raw" or "overlay".
        side: 1 is the compared episode.

    Returns:
        (height, width, 4) uint8, of the canvas's own pixels.
    """
    return pixels(
        page.locator(".side").nth(side).locator(f'canvas[data-camera="{camera}"][data-kind={kind}]')
    )


def pixels(found: Any) -> np.ndarray:
    """Return what a canvas holds, (height, width, 4) uint8, from Playwright's locator of it."""
    # What was just chosen is painted in the next animation frame.
    encoded = found.evaluate(
        """async (canvas) => {
            await new Promise(requestAnimationFrame);
            return canvas.toDataURL("image/png").split(",")[1];
        }"""
    )
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA"))


def heatmaps(data: Any, normalisation: str, **where: Any) -> dict[str, Any]:
    """Return each camera's heatmap, by its full name, as the package's figures have it."""
    return {
        name: analysis.image_heatmap(data, name, normalisation=normalisation, **where)
        for name in analysis.camera_names(data)
    }


def colour_end(episodes: Sequence[Any], normalisation: str, **where: Any) -> float:
    """Return where the one colour range of episodes that are shown together ends."""
    shown = [h for data in episodes for h in heatmaps(data, normalisation, **where).values()]
    # Of an episode: of the means over the executed actions of all inferences, whatever is shown.
    everywhere = {**where, "frame": None, "inference": "all", "query": "executed"}
    ends = [end for data in episodes for end in episode_ranges(data, clip=99.9, **everywhere).values()]
    return colour_range(shown, normalisation, clip=99.9, episode_ends=ends).vmax


def assert_shows(
    page: Any, data: Any, end: float, normalisation: str, *, side: int = 0, **where: Any
) -> None:
    """Check that the raw canvases of all cameras show what `analysis` has, once they are drawn."""
    for name, heatmap in heatmaps(data, normalisation, **where).items():
        _, geometry, _ = analysis.camera_geometry(data, name)
        expected = inferno(analysis.on_camera_pixels(heatmap.values, geometry), end)
        label = name.rpartition(".")[2]
        off = np.inf
        for _ in range(100):
            shown = canvas(page, label, "raw", side)
            assert shown.shape == (*expected.shape[:2], 4)
            assert (shown[..., 3] == 255).all()
            # The page blends between 52 colours of the map's, which is off by 4, and float16 may round the
            # place in it up where float32 rounds down.
            off = np.abs(shown[..., :3].astype(int) - expected).max()
            if off <= 9:
                break
            page.wait_for_timeout(50)  # an episode's range comes after its map
        assert off <= 9, f"{label}: a pixel is {off} of 255 off"


def inferno(values: np.ndarray, end: float) -> np.ndarray:
    """Return (…, 3) colours, 0 to 255, of matplotlib's map."""
    places = np.round(np.clip(values / end, 0, 1) * 255) if end > 0 else np.zeros_like(values)
    return np.round(mpl.colormaps["inferno"](places.astype(int))[..., :3] * 255).astype(int)


def assert_frames(page: Any, frames: Sequence[np.ndarray], camera: str, number: int) -> None:
    """Check that the overlay, at opacity 0, is the video's frame of this number and no other.

    Args:
        page: Playwright's.
        frames: of the camera's video, (height, width, 3) uint8 each.
        camera: its short name.
        number: of the frame that is shown.
    """
    shown = canvas(page, camera, "overlay")[..., :3].astype(int)
    off = [np.abs(shown - frame).mean() for frame in frames]
    assert off[number] < 3, f"frame {number}: {off[number]:.1f} of 255 off on average"  # what JPEG loses
    same = [i for i, frame in enumerate(frames) if (frame == frames[number]).all()]
    assert min(off) == off[number] or int(np.argmin(off)) in same, f"it is rather frame {np.argmin(off)}"
