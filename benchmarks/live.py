#!/usr/bin/env python
"""How soon is an inference on the screen of somebody who watches: a recording, the explorer, a browser.

    python benchmarks/live.py [--chromium PATH]      # two minutes on two idle cores

The demo policy acts in a loop of one's own at 10 Hz, asked every tenth frame, recorded with `view`'s way of
writing; `lerobot-attn view` follows it, and headless Chromium shows the newest frame. The time runs from the
return of the policy's call until the page has drawn the first frame of that inference. Policy, writer, server
and browser, which paints without a GPU, share this machine's cores.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import urllib.request
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch
from urllib.parse import quote

import torch
from common import Result, arguments, finish, machine
from explorer import CHROMIUM, Server, browsers, percentile
from policies import observation, tiny_policy

from lerobot_attn import AttentionConfig, record_episodes

HZ = 10
AT_MOST_MS = 200.0
# The page says in `data-drawn` what it has drawn, within an animation frame.
NOTE_WHAT_IS_DRAWN = """
window.seen = [];
new MutationObserver(() => {
  const drawn = document.documentElement.dataset.drawn;
  if (drawn) window.seen.push([Number(drawn.split("/")[1]), Date.now()]);
}).observe(document, { subtree: true, attributes: true, attributeFilter: ["data-drawn"] });
"""


def latencies_ms(folder: Path, chromium: str, n_inferences: int) -> list[float]:
    """Record an episode that a browser watches; return the milliseconds of each inference."""
    policy = tiny_policy()
    batch = observation(policy)
    n_frames = policy.config.n_action_steps
    ended: dict[int, float] = {}
    # The explorer is started here, whose address is needed; `view` is what writes as for it.
    config = AttentionConfig(view=True)
    with (
        patch("lerobot_attn.recording.loop.viewers_beside", lambda folder, config: nullcontext()),
        record_episodes(policy, folder, config, fps=HZ) as recording,
        recording.episode() as episode,
        torch.inference_mode(),
    ):

        def act(frame: int) -> None:
            action = policy.select_action(batch)
            if frame % n_frames == 0:
                ended[frame] = 1000 * time.time()
            episode.step(None, action[0])

        policy.reset()
        act(0)
        with browsers(chromium) as browser:
            time.sleep(1)
            with Server(folder) as server:
                page = browser.new_context(viewport={"width": 1280, "height": 720}).new_page()
                page.add_init_script(NOTE_WHAT_IS_DRAWN)
                with urllib.request.urlopen(server.url + "api/run") as answer:
                    (row,) = json.load(answer)["episodes"]
                page.goto(f"{server.url}?episode={quote(row['id'])}")
                page.wait_for_function("window.seen.length > 0")
                page.wait_for_timeout(1000)
                start = time.perf_counter()
                for frame in range(1, n_frames * n_inferences + 2):
                    act(frame)
                    time.sleep(max(0, start + frame / HZ - time.perf_counter()))
                page.wait_for_timeout(2000)
                seen = page.evaluate("window.seen")
    found = []
    for frame, at_ms in ended.items():
        drawn = [when for number, when in seen if number >= frame]
        if frame and drawn:
            found.append(drawn[0] - at_ms)
    if len(found) < n_inferences:
        raise RuntimeError(f"the page drew {len(found)} of {n_inferences} inferences")
    return found


def main() -> int:
    """Measure, print and write JSON; exit status 1 where the target is missed."""
    parsed = arguments(
        __doc__, ("--chromium", {"default": CHROMIUM, "help": f"the browser (default: {CHROMIUM})"})
    )
    before = machine()
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(parsed.runs):
            rounds.append(latencies_ms(Path(name, str(number)), parsed.chromium, 3 if parsed.quick else 20))
    every = [ms for one in rounds for ms in one]
    results = []
    for what, percent, target in (("median", 50, AT_MOST_MS), ("p95", 95, None)):
        each = [percentile(one, percent) for one in rounds]
        results.append(
            Result(
                f"watching live: from an inference's end to the screen, {what}",
                percentile(every, percent),
                "ms",
                min(each),
                max(each),
                at_most=target,
                headline=target is not None,
            )
        )
    how = (
        f"demo policy in a loop at {HZ} Hz, default capture, `lerobot-attn view` and headless Chromium beside"
        " it on the same cores"
    )
    return finish("live", results, parsed, how=how, before=before, details={"ms": rounds})


if __name__ == "__main__":
    sys.exit(main())
