"""The built page's files, as a browser needs them wherever a proxy shows them. Knows no recording."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Scope

IMMUTABLE = "private, max-age=31536000, immutable"
ASK_AGAIN = "no-cache"  # keep it, but ask whether it changed
# Python takes media types from the machine's registry, which may say anything: browsers run no script that is
# called text/plain.
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
# All that the page asks for is relative to its folder. Some proxies show the page at /proxy/8123 as well as
# at /proxy/8123/. Both look the same from here, because the proxy takes its path off; but without the slash
# the browser would ask for everything beside the proxy's path.
ADD_SLASH = (
    rb"<script>if(!/\/(index\.html)?$/.test(location.pathname))"
    rb'location.replace(location.pathname+"/"+location.search+location.hash)</script>'
)


class PageFiles(StaticFiles):
    """A folder with the built page: files in `assets` have a hash of themselves in their names."""

    def file_response(
        self, full_path: Any, stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        """Answer with a file, or say that what the browser has is still right."""
        path = Path(full_path)
        if path.suffix == ".html":
            return self._document(path.read_bytes(), scope, status_code)
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers["Cache-Control"] = IMMUTABLE if path.parent.name == "assets" else ASK_AGAIN
        if "content-type" in response.headers:
            response.headers["Content-Type"] = _MEDIA_TYPES.get(path.suffix, "application/octet-stream")
        return response

    def _document(self, body: bytes, scope: Scope, status_code: int) -> Response:
        response = document(body, status_code)
        if self.is_not_modified(response.headers, Headers(scope=scope)):
            return NotModifiedResponse(response.headers)
        return response


def document(html: bytes, status_code: int = 200) -> Response:
    """Return a page whose address ends in a slash, whatever was asked for: see `ADD_SLASH`."""
    body = html.replace(b"<head>", b"<head>" + ADD_SLASH, 1)
    etag = f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'
    headers = {"ETag": etag, "Cache-Control": ASK_AGAIN, "Content-Type": _MEDIA_TYPES[".html"]}
    return Response(body, status_code, headers=headers)
