"""The names by which the server may be addressed, and what is said to whoever uses another one.

A page of a stranger's can lead a name of its own to this machine (DNS rebinding), and would read recordings
if any name were answered. A proxy passes on the name that its users know, which has to be allowed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lerobot_attn.errors import ConfigError

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
_NAME = re.compile(r"(?:\*\.)?[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\]|\*")


def host_pattern(text: str) -> str:
    """Return a name as the `Host` header has it, from a name, an address or the URL in a browser.

    Args:
        text: "attn.example.org", "attn.example.org:8443", "https://attn.example.org/x" or "::1";
            "*.example.org" for all names that end so; "*" for any.

    Raises:
        ConfigError: it is no name.
    """
    name = text.strip()
    try:
        if ":" in name and _is_ipv6(name):
            name = f"[{name}]"
        address = urlsplit(name if "://" in name else f"//{name}")
        _ = address.port  # raises where it is no number
        found = address.hostname or ""
        found = f"[{found}]" if ":" in found else found.encode("idna").decode()
    except ValueError:  # UnicodeError too
        found = ""
    if not name.isprintable() or not _NAME.fullmatch(found):
        raise ConfigError(
            f"--allow-host: got {text!r}, expected a host's name as browsers have it in their address, such "
            "as attn.example.org, *.example.org, or * for any"
        )
    return found


class HostGate:
    """Answers requests that name an allowed host; tells the others which are, and how to allow one more.

    Starlette's middleware decides: its own refusal cannot say any of that.

    Args:
        app: what answers.
        hosts: allowed names, as `host_pattern` returns them.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]):
        self._app = app
        self._hosts = list(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        is_allowed = False

        async def allowed(scope: Scope, receive: Receive, _: Send) -> None:
            nonlocal is_allowed
            is_allowed = True
            await self._app(scope, receive, send)

        await TrustedHostMiddleware(allowed, self._hosts, www_redirect=False)(scope, receive, _drop)
        if not is_allowed:
            headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
            text = self._refusal(Headers(scope=scope).get("host", ""))
            await PlainTextResponse(text, 400, headers=headers)(scope, receive, send)

    def _refusal(self, header: str) -> str:
        name = header if len(header) <= 100 else f"{header[:99]}…"
        try:
            remedy = host_pattern(header)
        except ConfigError:
            remedy = "NAME"
        return (
            f"Host {name!r} is not answered, expected one of {', '.join(self._hosts)}: by a name of its own "
            "a stranger's page could read what is served here. If it is your name for this server, as "
            f"behind a proxy, start it with: lerobot-attn view … --allow-host {remedy}\n"
        )


async def _drop(message: Any) -> None:
    """Take the middleware's refusal."""


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False
