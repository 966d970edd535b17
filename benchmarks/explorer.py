#!/usr/bin/env python
"""Time the explorer in headless Chromium: from a key to the picture, the first view, and the server's memory.

    python benchmarks/explorer.py [--episode EPISODE.zarr] [--chromium PATH]

Without an episode one of Pi0.5's sizes is made up first (half a minute): 280 frames of two cameras of
360 × 360, 18 layers of 8 heads over 1018 keys. Each round starts `lerobot-attn view` and a browser profile
anew, so that nothing is cached, and begins in the middle of the episode. Times are taken inside the page:
from the key's event until the page says what it has drawn and the browser is through with that frame. With
"(60 Hz)" that includes the wait for a display's refresh, up to 17 ms; without, Chromium's frame rate is not
limited.

All of it shares this machine's cores: the server, and a browser that paints without a GPU.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
FLAT = 1.05  # memory at the end over that of the warm server
KEY_REPEAT_MS = 1000 / 30
N_FRAMES, N_FRAMES_QUICK = 280, 30
N_SCRUBBED, N_SCRUBBED_QUICK = 100, 10
N_CHANGES, N_CHANGES_QUICK = 60, 6
N_REQUESTS, N_REQUESTS_QUICK = 10_000, 200
AT_60_HZ = " (60 Hz)"
# Keys that go round: at a last layer there is nothing to draw.
CHANGES = {"layer": ["ArrowDown"] * 3 + ["ArrowUp"] * 3, "head": ["h"], "camera": ["c"]}

# What the page itself measures. It says what it has drawn within an animation frame, once the canvases are
# painted; `painted` is when the browser is through with that frame.
MEASURE = """
window.bench = (() => {
  const painted = () => new Promise((done) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => done(performance.now());
    channel.port2.postMessage(null);
  });
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

    Attributes:
        url: where it answers.
        start_ms: from the command until it said so.
    """

    def __init__(self, path: Path):
        command = [sys.executable, "-m", "lerobot_attn.cli", "view", str(path), "--no-browser", "--port", "0"]
        # Byte code is kept, as in any installation, or each start would compile every library.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        started = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of {path} ended with status {self._process.wait()}")
        self.start_ms = 1000 * (time.perf_counter() - started)
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


class Times:
    """Milliseconds, a list a round, of each question."""

    def __init__(self) -> None:
        self.rounds: dict[str, list[list[float]]] = {}

    def keep(self, what: str, ms: list[float]) -> None:
        """Note a round."""
        self.rounds.setdefault(what, []).append(ms)

    def summary(self) -> dict[str, list[dict[str, float]]]:
        """Return what each round says of each question."""
        percents = {"median": 50, "p95": 95, "largest": 100}
        return {
            what: [
                {name: round(percentile(ms, percent), 2) for name, percent in percents.items()}
                for ms in rounds
            ]
            for what, rounds in self.rounds.items()
        }

    def results(self, what: str, at_most: float | None) -> list[Result]:
        """Return the median, and the p95, which the target is of, with the rounds' own as its spread."""
        rounds = self.rounds[what]
        every = [ms for round_ in rounds for ms in round_]
        each = [percentile(round_, 95) for round_ in rounds]
        p95 = Result(f"explorer, {what}: p95", percentile(every, 95), "ms", min(each), max(each))
        p95 = replace(p95, at_most=at_most, headline=at_most is not None)
        return [Result(f"explorer, {what}: median", percentile(every, 50), "ms"), p95]


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


def measure(path: Path, chromium: str, runs: int, *, quick: bool) -> Times:
    """Time everything, `runs` times."""
    n_scrubbed = N_SCRUBBED_QUICK if quick else N_SCRUBBED
    n_changes = N_CHANGES_QUICK if quick else N_CHANGES
    middle = (N_FRAMES_QUICK if quick else N_FRAMES) // 2
    times = Times()

    @contextlib.contextmanager
    def cold(browser: Browser, suffix: str) -> Iterator[Page]:
        with Server(path) as server:
            times.keep("from the command to the server", [server.start_ms])
            page, ms = open_page(browser, f"{server.url}?frame={middle}")
            times.keep(f"first view{suffix}", [ms])
            times.keep(f"from the command to the first view{suffix}", [server.start_ms + ms])
            page.wait_for_timeout(1000)
            yield page
            page.context.close()

    modes = {"": UNLIMITED} if quick else {"": UNLIMITED, AT_60_HZ: ()}
    for suffix, flags in modes.items():
        with browsers(chromium, *flags) as browser:
            for _ in range(runs):
                with cold(browser, suffix) as page:
                    ms = one_by_one(page, ["ArrowRight"] * n_scrubbed)
                    times.keep(f"next frame, key after key{suffix}", ms)
                    for name, keys in CHANGES.items():
                        page.wait_for_timeout(300)
                        ms = one_by_one(page, (keys * n_changes)[:n_changes])
                        times.keep(f"another {name}{suffix}", ms)
                with cold(browser, suffix) as page:
                    times.keep(f"next frame, key held{suffix}", held(page, "ArrowRight", n_scrubbed))
    return times


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


def claims(times: Times, memory_mb: tuple[float, float], n_requests: int) -> list[Result]:
    """Return what is claimed."""
    targets = {"next frame": SCRUB_MS, "another": CHANGE_MS, "first view": FIRST_VIEW_MS}
    results = []
    for what in times.rounds:
        is_target = not what.endswith(AT_60_HZ)
        target = next((ms for name, ms in targets.items() if is_target and what.startswith(name)), None)
        results += times.results(what, target)
    what = f"explorer, the server's memory after {n_requests:,} requests over before"
    return [*results, Result(what, memory_mb[1] / memory_mb[0], "×", at_most=FLAT, headline=True)]


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
    details = {"ms": times.summary(), "resident_mb": {"warm": memory_mb[0], "end": memory_mb[1]}}
    how = "made-up softmax numbers" if parsed.episode is None else f"episode {parsed.episode.name}"
    results = claims(times, memory_mb, n_requests)
    return finish("explorer", results, parsed, how=how, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
