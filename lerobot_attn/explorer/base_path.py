"""The path under which a proxy shows the explorer, where the proxy passes it on.

A proxy shows the server of this machine at, say, /proxy/8123/. Most proxies take that path off a request
before they pass it on. Then nothing is to be done, because all that the page asks for is relative to where it
is. Others leave it there: they say so in the header `X-Forwarded-Prefix`, or one says it with `--base-path`.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lerobot_attn.errors import ConfigError

_PATH = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[^/?#\\\x00-\x1f]+)+")  # no "//", which would be another host
_OWN = ("/api", "/assets")  # the server's own addresses: as a proxy's path, either would have two meanings


def base_path(text: str) -> str:
    """Return a base path in the form that `BasePath` takes: "/proxy/8123", "" for none.

    Args:
        text: the path, with or without a slash at its ends, or the whole address in a browser.

    Raises:
        ConfigError: it is no path, or begins like one of the server's own.
    """
    path = "/" + re.sub(r"^[a-z]+://[^/]*", "", text.strip()).strip("/")
    if path == "/":
        return ""
    if not _PATH.fullmatch(path) or f"/{path.split('/')[1]}" in _OWN:
        raise ConfigError(
            f"--base-path: got {text!r}, expected the path of an address, such as /proxy/8123/, "
            f"that does not begin with {' or '.join(_OWN)}"
        )
    return unquote(path)


def guessed(path: str) -> str | None:
    """Return the base path that would explain a request for a path that is not there; None if none would."""
    start = re.split(r"/(?:api|assets)/|/[^/]*\.[^/]*$", path, maxsplit=1)[0]
    if "//" in start:
        return None
    try:
        return quote(base_path(quote(start))) or None
    except ConfigError:
        return None


class BasePath:
    """Takes a base path off the paths of requests that have it; the others stay as they are.

    Args:
        app: what answers.
        path: as `base_path` returns it; "" takes what the header `X-Forwarded-Prefix` says.
    """

    def __init__(self, app: ASGIApp, path: str = ""):
        self._app = app
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http":
            base = self._path or _forwarded(scope)
            if base and scope["path"] == base:
                # What the page asks for is relative to its folder, so its address must end in a slash.
                query = scope["query_string"].decode("latin-1")
                there = f"{quote(base)}/{f'?{query}' if query else ''}"
                answer = RedirectResponse(there, headers={"Cache-Control": "no-store"})
                return await answer(scope, receive, send)
            if base and scope["path"].startswith(f"{base}/"):
                scope = {**scope, "root_path": base}
        await self._app(scope, receive, send)


def _forwarded(scope: Scope) -> str:
    said = Headers(scope=scope).get("x-forwarded-prefix", "").partition(",")[0]
    try:
        return base_path(said)
    except ConfigError:
        return ""
