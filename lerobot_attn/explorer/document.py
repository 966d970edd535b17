"""The built page as a single document: script and style inside, the network forbidden.

Knows nothing of what the page shows.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from lerobot_attn import __version__
from lerobot_attn.errors import SetupError

_CHARSET = re.compile(r'<meta charset="utf-8"\s*/?>', re.IGNORECASE)
_SCRIPT = re.compile(r'<script type="module"[^>]*?\ssrc="([^"]+)"[^>]*></script>')
_STYLE = re.compile(r'<link rel="stylesheet"[^>]*?\shref="([^"]+)"[^>]*>')
_ASKED_FOR = re.compile(r'\s(?:src|href)="(?!data:)([^"]*)"')
_BUILD = "scripts/build_explorer.sh builds it"


class Document(NamedTuple):
    """A page in two halves, UTF-8, between which elements with data belong."""

    before: bytes
    after: bytes


def page_folder() -> Path:
    """Return the folder where the built page lies, if it was built."""
    return Path(str(resources.files("lerobot_attn.explorer"))) / "static"


def single_document(folder: Path | None = None) -> Document:
    """Return the page with its script and style inside, so that it opens from disk.

    A policy in it forbids every request, and every script but its own.

    Args:
        folder: of the built page; default: the package's.

    Raises:
        SetupError: the page was not built, or in a way that does not fit into one document.
    """
    folder = folder or page_folder()
    try:
        html = _read(folder / "index.html")
        script = _read(folder / _only(_SCRIPT, html, "scripts"))
        style = _read(folder / _only(_STYLE, html, "style sheets"))
    except OSError as error:
        missing = Path(str(error.filename)).name
        raise SetupError(
            f"this installation has no page to export ({missing} is missing in {folder}): {_BUILD}"
        ) from error
    # A script can hold these only in strings, templates and patterns, where the escape means the same.
    script = re.sub(r"<(?=/?script|!--)", r"\\x3c", script, flags=re.IGNORECASE)
    style = style.replace("</", r"<\/")
    rules = (
        "default-src 'none'",
        f"script-src 'sha256-{_sha256(script)}'",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
    )
    policy = (
        f'<meta http-equiv="Content-Security-Policy" content="{"; ".join(rules)}" />\n'
        f'    <meta name="generator" content="lerobot-attn {__version__}" />'
    )
    html = _CHARSET.sub(lambda found: f"{found[0]}\n    {policy}", html, count=1)
    html = _STYLE.sub(lambda _: "<style></style>", html)
    html = _SCRIPT.sub(lambda _: '<script type="module"></script>', html)
    left = _ASKED_FOR.search(html)
    before, end, after = html.rpartition("</body>")
    if left or policy not in html or not end:
        what = f"asks for {left[1]}" if left else "lacks its charset or its body's end"
        raise SetupError(
            f"{folder / 'index.html'}: {what}, expected one script and one style sheet: {_BUILD}"
        )
    # Last, because nothing in script or style may be taken for a part of the page.
    before = before.replace("<style></style>", f"<style>{style}</style>", 1)
    before = before.replace('<script type="module"></script>', f'<script type="module">{script}</script>', 1)
    return Document(before.encode(), f"{end}{after}".encode())


def data_element(name: str, json: str) -> bytes:
    """Return an element that holds JSON, in which nothing can end the element.

    Args:
        name: the element's id.
        json: the text.
    """
    return f'<script type="application/json" id="{name}">{escaped(json)}</script>\n'.encode()


def escaped(json: str) -> str:
    """Return JSON that may stand in an element: the same values, without "<"."""
    return json.replace("<", "\\u003c")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _only(pattern: re.Pattern[str], html: str, what: str) -> str:
    found = pattern.findall(html)
    if len(found) != 1:
        raise SetupError(f"the page has {len(found)} {what}, expected one: {_BUILD}")
    return str(found[0])


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
