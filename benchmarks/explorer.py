#!/usr/bin/env python
"""Time the explorer in headless Chromium: from a key to the picture, the first view, and the server's memory.

    python benchmarks/explorer.py [--episode EPISODE.zarr] [--chromium PATH]

Without an episode one of Pi0.5's sizes is made up first (half a minute): 280 frames of two cameras of
360 × 360, 18 layers of 8 heads over 1018 keys. Each round starts `lerobot-attn view` and a browser profile
anew, so that nothing is cached. Times are taken inside the page: from the key's event until the page says
what it has drawn and the browser has rendered it, with the wait for a display's refresh left out (Chromium's
frame rate is not limited); what a display of 60 Hz adds, up to 17 ms, is measured too.

Two cores do all of it: the server, and a browser that paints without a GPU.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from common import Result, arguments, finish, machine

from lerobot_attn.synthetic import SyntheticPlan, write_softmax_episode

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = "/usr/bin/chromium"
UNLIMITED = ("--disable-frame-rate-limit", "--disable-gpu-vsync")
SCRUB_MS, CHANGE_MS, FIRST_VIEW_MS = 50.0, 16.0, 1000.0
KEY_REPEAT_MS = 1000 / 30
N_FRAMES, N_FRAMES_QUICK = 280, 30
N_SCRUBBED, N_SCRUBBED_QUICK = 100, 10
N_CHANGES, N_CHANGES_QUICK = 60, 6
N_REQUESTS, N_REQUESTS_QUICK = 10_000, 200
# Growth that says nothing: an allocator's, and of caches that are limited and nearly full.
FLAT_MB = 16.0
# Keys that go round: at a last layer there is nothing to draw.
CHANGES = {"layer": ["ArrowDown"] * 3 + ["ArrowUp"] * 3, "head": ["h"], "camera": ["c"]}

# What the page itself measures. `painted` is after the frame in which the canvases are on the screen.
MEASURE = """
window.bench = (() => {
  const painted = () => new Promise((done) => requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => done(performance.now());
    channel.port2.postMessage(null);
  }));
  const observe = (onDrawn) => {
    const observer = new MutationObserver(onDrawn);
    // Of the document: this script runs before its element is there.
    observer.observe(document, { subtree: true, attributes: true, attributeFilter: ["data-drawn"] });
    return observer;
  };
  const drawnFrame = () => Number(document.documentElement.dataset.drawn.split("/")[1]);
  const send = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));

  /** Press keys, each as soon as the one before has been drawn; the milliseconds of each. */
  async function oneByOne(keys) {
    const found = [];
    for (const key of keys) {
      const drawn = new Promise((done) => { const o = observe(() => { o.disconnect(); done(); }); });
      const pressed = performance.now();
      send(key);
      await drawn;
      found.push(await painted() - pressed);
    }
    return found;
  }

  /** Hold a key that moves one frame on; the milliseconds until its frame, or a later one, was drawn. */
  async function hold(key, n, every) {
    const first = drawnFrame();
    const pressed = [];
    const found = [];
    const observer = observe(async () => {
      const reached = drawnFrame() - first;
      const now = await painted();
      while (found.length < Math.min(reached, pressed.length)) found.push(now - pressed[found.length]);
    });
    for (let i = 0; i < n; i++) {
      pressed.push(performance.now());
      send(key);
      await new Promise((done) => setTimeout(done, pressed[0] + (i + 1) * every - performance.now()));
    }
    while (found.length < n) await new Promise((done) => setTimeout(done, 10));
    observer.disconnect();
    return found;
  }

  const firstView = new Promise((done) => {
    const o = observe(() => { o.disconnect(); painted().then(done); });
  });
  return { oneByOne, hold, firstView };
})();
"""


class Server:
    """`lerobot-attn view` in a process of its own.

    Args:
        path: what it serves.
    """

    def __init__(self, path: Path):
        command = [sys.executable, "-m", "lerobot_attn.cli", "view", str(path), "--no-browser", "--port", "0"]
        # Byte code is kept, as in any installation, or each start would compile every library.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of {path} ended with status {self._process.wait()}")
        self.url = next(word for word in line.split() if word.startswith("http"))

    def resident_mb(self) -> float:
        """Return the memory that the process holds."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
        return int(kilobytes) / 1000

    def __enter__(self) -> Server:
        """Return the running server."""
        return self

    def __exit__(self, *error: object) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)


@dataclass
class Times:
    """Milliseconds of every key that was pressed, or of every first view, a list a round."""

    rounds: list[list[float]]

    def percentile(self, percent: float) -> float:
        """Return a percentile over all rounds."""
        return percentile([ms for round_ in self.rounds for ms in round_], percent)

    def results(self, what: str, at_most: float | None, *, headline: bool = False) -> list[Result]:
        """Return the median and the p95, which the target is of, with those of the rounds around it."""
        each = [percentile(round_, 95) for round_ in self.rounds]
        median = Result(f"{what}: median", self.percentile(50), "ms")
        p95 = self.percentile(95)
        return [
            median,
            Result(f"{what}: p95", p95, "ms", min(each), max(each), at_most=at_most, headline=headline),
        ]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@contextlib.contextmanager
def browsers(chromium: str, *flags: str) -> Iterator[Browser]:
    """Start a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *flags])
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Browser, address: str) -> tuple[Page, float]:
    """Open an address with an empty cache; return the page and the milliseconds to its first view."""
    context = browser.new_context(viewport={"width": 1280, "height": 720})
    context.add_init_script(MEASURE)
    page = context.new_page()
    page.goto(address)
    return page, page.evaluate("bench.firstView")


def one_by_one(page: Page, keys: Sequence[str]) -> list[float]:
    """Press keys, each when the one before has been drawn; return the milliseconds of each."""
    found: list[float] = page.evaluate("keys => bench.oneByOne(keys)", list(keys))
    return found


def held(page: Page, key: str, n: int, every_ms: float = KEY_REPEAT_MS) -> list[float]:
    """Press a key at a keyboard's own pace, whatever has been drawn; return the milliseconds of each."""
    found: list[float] = page.evaluate("([key, n, every]) => bench.hold(key, n, every)", [key, n, every_ms])
    return found


def measure(path: Path, chromium: str, runs: int, *, quick: bool) -> dict[str, Times]:
    """Return the times of each question."""
    n_scrubbed = N_SCRUBBED_QUICK if quick else N_SCRUBBED
    n_changes = N_CHANGES_QUICK if quick else N_CHANGES
    middle = (N_FRAMES_QUICK if quick else N_FRAMES) // 2
    found: dict[str, Times] = {}

    def keep(name: str, ms: list[float]) -> None:
        found.setdefault(name, Times([])).rounds.append(ms)

    def scrub(browser: Browser, suffix: str, way: str) -> None:
        with Server(path) as server:
            page, first_ms = open_page(browser, f"{server.url}?frame={middle}")
            keep(f"first view{suffix}", [first_ms])
            page.wait_for_timeout(1000)
            if way == "held":
                keep(f"{way}{suffix}", held(page, "ArrowRight", n_scrubbed))
            else:
                keep(f"{way}{suffix}", one_by_one(page, ["ArrowRight"] * n_scrubbed))
                for name, keys in CHANGES.items():
                    page.wait_for_timeout(300)
                    keep(f"{name}{suffix}", one_by_one(page, (keys * n_changes)[:n_changes]))
            page.context.close()

    for suffix, flags in (("", UNLIMITED), (", at 60 Hz", ())):
        with browsers(chromium, *flags) as browser:
            for _ in range(runs):
                for way in ("one by one", "held"):
                    scrub(browser, suffix, way)
    return found


def request_many(server: Server, n: int) -> tuple[float, float]:
    """Send requests of every kind; return the server's memory in MB, when it is warm and at the end."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)

    def get(path: str) -> bytes:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise RuntimeError(f"{path}: got status {response.status}, expected 200")
        return body

    (episode,) = json.loads(get("/api/run"))["episodes"]
    at = f"/api/episodes/{quote(episode['id'])}/{episode['version']}"
    facts = json.loads(get(f"/api/episodes/{quote(episode['id'])}"))
    cameras = [camera["name"] for camera in facts["cameras"] if camera["has_video"]]

    def path_of(i: int) -> str:
        inference, frame = i % facts["n_inferences"], i % facts["n_frames"]
        step = facts["denoise_steps"][i % len(facts["denoise_steps"])]
        kinds = [
            f"{at}/inferences/{inference}/means/{step}",
            f"{at}/inferences/{inference}/maps/{step}/{facts['layers'][-1]}",
            *(f"{at}/cameras/{camera}/frames/{frame}.jpg" for camera in cameras),
            f"{at}/inferences/{inference}/tokens",
            f"{at}/inferences/{inference}/actions",
            f"{at}/shares?layer={facts['mean_layers'][-1]}&head=mean&denoise_step={step}",
            f"{at}/timeline",
            "/api/run",
        ]
        return kinds[i % len(kinds)]

    for i in range(max(n // 5, 10 * facts["n_frames"])):
        get(path_of(i))
    warm_mb = server.resident_mb()
    for i in range(n):
        get(path_of(i))
    connection.close()
    return warm_mb, server.resident_mb()


def claims(times: dict[str, Times], memory_mb: tuple[float, float], n_requests: int) -> list[Result]:
    """Return what is claimed."""
    results = []
    for suffix in ("", ", at 60 Hz"):
        is_target = not suffix
        scrub_ms, change_ms = (SCRUB_MS, CHANGE_MS) if is_target else (None, None)
        one, many = "the next frame, key after key", "the next frame, key held (30 a second)"
        results += times[f"one by one{suffix}"].results(one + suffix, scrub_ms, headline=is_target)
        results += times[f"held{suffix}"].results(many + suffix, scrub_ms, headline=is_target)
        for name in CHANGES:
            results += times[f"{name}{suffix}"].results(
                f"another {name}{suffix}", change_ms, headline=is_target
            )
        first = times[f"first view{suffix}"].results(
            f"first view after the server's start{suffix}",
            FIRST_VIEW_MS if is_target else None,
            headline=is_target,
        )
        results += first
    growth = memory_mb[1] - memory_mb[0]
    what = f"explorer's server: growth of resident memory over {n_requests:,} requests"
    return [*results, Result(what, growth, "MB", at_most=FLAT_MB, headline=True)]


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    parsed = arguments(
        __doc__,
        ("--episode", {"type": Path, "help": "an episode's store of at least 250 frames"}),
        ("--chromium", {"default": CHROMIUM, "help": f"the browser (default: {CHROMIUM})"}),
    )
    before = machine()
    n_requests = N_REQUESTS_QUICK if parsed.quick else N_REQUESTS
    with tempfile.TemporaryDirectory() as name:
        path = parsed.episode
        if path is None:
            plan = (
                SyntheticPlan(n_frames=N_FRAMES_QUICK) if parsed.quick else SyntheticPlan.full_size(N_FRAMES)
            )
            path = write_softmax_episode(Path(name), plan)
        times = measure(path, parsed.chromium, parsed.runs, quick=parsed.quick)
        with Server(path) as server:
            memory_mb = request_many(server, n_requests)
    details = {
        "ms": {name: one.rounds for name, one in times.items()},
        "resident_mb": {"warm": memory_mb[0], "end": memory_mb[1]},
    }
    how = "made-up softmax numbers" if parsed.episode is None else f"episode {parsed.episode.name}"
    return finish(
        "explorer", claims(times, memory_mb, n_requests), parsed, how=how, before=before, details=details
    )


if __name__ == "__main__":
    sys.exit(main())
