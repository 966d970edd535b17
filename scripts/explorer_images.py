#!/usr/bin/env python
"""Draw the README's pictures of the explorer anew from a recorded run.

    python scripts/explorer_images.py OUT
    python scripts/explorer_images.py OUT --neurons   # a baseline and an episode that fires neurons

Needs the built page (scripts/build_explorer.sh) and Debian's Chromium; writes into docs/images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from lerobot_attn.explorer.app import create_app
from lerobot_attn.explorer.library import Library

FOLDER = Path(__file__).parent.parent / "docs" / "images"
WAIT_S = 60


@contextlib.contextmanager
def served(path: Path) -> Iterator[str]:
    """Serve a run while the pictures are taken; yield the page's address."""
    server = uvicorn.Server(uvicorn.Config(create_app(Library(path)), log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def settle(page: Page) -> None:
    """Wait until everything that is shown has been loaded and drawn."""
    page.wait_for_selector("html[data-drawn]", timeout=WAIT_S * 1000)
    page.wait_for_selector(".strip:not(.stale) canvas", timeout=WAIT_S * 1000)
    page.wait_for_selector(".plot canvas", timeout=WAIT_S * 1000)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(300)


def save(page: Page, name: str) -> None:
    """Save what the window shows as a JPEG."""
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").save(FOLDER / f"{name}.jpg", quality=86, optimize=True)


def main() -> int:
    """Take them all, and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--neurons", action="store_true", help="only the neurons panel: two episodes side by side, same phase"
    )
    arguments = parser.parse_args()
    episodes = [found.id for found in Library(arguments.run).look().summaries]
    views = {
        "explorer": f"?episode={episodes[0]}&frame=10&norm=image&patch=image:7:11",
        "explorer-compare": f"?episode={episodes[0]}&compare={episodes[-1]}&lock=phase&frame=10&norm=image",
        "explorer-tour": f"?episode={episodes[0]}&tour=7",
    }
    if arguments.neurons:
        views = {"explorer-neurons": f"?episode={episodes[0]}&compare={episodes[-1]}&lock=phase&frame=40"}
    with served(arguments.run) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--force-color-profile=srgb"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 760})
        for name, query in views.items():
            page.goto(address + query)
            settle(page)
            save(page, name)
        if not arguments.neurons:
            page.goto(address)
            page.wait_for_selector("table.episodes img")
            page.wait_for_load_state("load")
            page.wait_for_timeout(1000)
            page.set_viewport_size({"width": 1000, "height": 420})
            save(page, "explorer-run")
        browser.close()
    for path in sorted(FOLDER.glob("explorer*")):
        print(f"{path.stat().st_size / 1000:8.0f} kB  {path.relative_to(FOLDER.parent.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
