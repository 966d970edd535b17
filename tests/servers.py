"""Servers of the tests' own: plain HTTP with ranges, and as much of S3 as reading a bucket takes."""

import re
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Asked(NamedTuple):
    """A request: its method, the path below the served folder, and the range of bytes."""

    method: str
    path: str
    range: str | None


class Server:
    """A server of a folder's files.

    Attributes:
        url: "http://127.0.0.1:…"
        asked: the requests so far.
    """

    def __init__(self, folder: Path, *, buckets: bool, ranges: bool):
        self.asked: list[Asked] = []
        handler = partial(_Handler, folder, self.asked, buckets, ranges)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serving(folder: Path, *, buckets: bool = False, ranges: bool = True):
    """Serve a folder; with `buckets`, as S3 does: its folders are buckets, and requests must be signed."""
    server = Server(folder, buckets=buckets, ranges=ranges)
    try:
        yield server
    finally:
        server.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder, asked, buckets, ranges, *args):
        self._folder, self._asked, self._buckets, self._ranges = folder, asked, buckets, ranges
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = urlsplit(self.path)
        name = unquote(parts.path).strip("/")
        self._asked.append(Asked(self.command, name, self.headers.get("Range")))
        if self._buckets:
            if "Signature=" not in self.headers.get("Authorization", ""):
                return self._fail(403, "AccessDenied", "Access Denied")
            bucket = name.split("/")[0]
            if not (self._folder / bucket).is_dir():
                return self._fail(404, "NoSuchBucket", "The specified bucket does not exist")
            if "list-type" in parse_qs(parts.query):
                return self._list(bucket, {key: value[0] for key, value in parse_qs(parts.query).items()})
        file = self._folder / name
        if not file.is_file():
            return self._fail(404, "NoSuchKey", "The specified key does not exist.")
        return self._send(file.read_bytes(), self.headers.get("Range") if self._ranges else None)

    def do_PROPFIND(self):
        self._asked.append(Asked(self.command, self.path, None))
        self._fail(405, "MethodNotAllowed", "not here")

    def _send(self, content, part):
        size, headers = len(content), {}
        if part is not None:
            first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", part).groups()
            start = int(first) if first else max(0, size - int(last))
            stop = min(int(last) + 1, size) if first and last else size
            content, headers = content[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self.send_response(200 if part is None else 206)
        for name, value in {
            **headers,
            "Content-Length": len(content),
            "ETag": '"1"',
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _fail(self, status, code, message):
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        root = self._folder / bucket
        keys = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
        keys = [key for key in keys if key.startswith(prefix)]
        folders = set()
        if delimiter:
            folders = {
                prefix + key[len(prefix) :].split(delimiter)[0] + delimiter
                for key in keys
                if delimiter in key[len(prefix) :]
            }
            keys = [key for key in keys if delimiter not in key[len(prefix) :]]
        files = "".join(
            f"<Contents><Key>{key}</Key><Size>{(root / key).stat().st_size}</Size><ETag>1</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        )
        below = "".join(
            f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in sorted(folders)
        )
        self._send(
            f"<?xml version='1.0'?><ListBucketResult><Name>{bucket}</Name><Prefix>{prefix}</Prefix>"
            f"<KeyCount>{len(keys)}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
            f"{files}{below}</ListBucketResult>".encode(),
            None,
        )
