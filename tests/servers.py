"""Servers of the tests' own: plain HTTP with ranges, and as much of S3 as using a bucket takes."""

import hashlib
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
        n_failing: so many of the next requests that write are answered with an error of the server's.
        harm: what arrives is changed by this before it is kept.
        etags: what objects are called that did not come in one piece, or whose service tells no MD5.
        tells_md5: whether ETags are MD5 sums.
        gate: requests that write wait for it.
    """

    def __init__(self, folder: Path, *, buckets: bool, ranges: bool):
        self.asked: list[Asked] = []
        self.n_failing = 0
        self.harm = lambda content: content
        self.etags: dict[str, str] = {}
        self.tells_md5 = True
        self.gate = threading.Event()
        self.gate.set()
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()
        handler = partial(_Handler, folder, self, buckets, ranges)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # of clients that went away
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self.gate.set()
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

    def __init__(self, folder, state, buckets, ranges, *args):
        self._folder, self._state, self._buckets, self._ranges = folder, state, buckets, ranges
        self._asked = state.asked
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
            if self._is_refused(name):
                return None
            bucket = name.split("/")[0]
            if "list-type" in parse_qs(parts.query):
                return self._list(bucket, {key: value[0] for key, value in parse_qs(parts.query).items()})
        file = self._folder / name
        if not file.is_file():
            return self._fail(404, "NoSuchKey", "The specified key does not exist.")
        part = self.headers.get("Range") if self._ranges else None
        return self._send(file.read_bytes(), part, self._etag(name))

    def _is_refused(self, name):
        if "Signature=" not in self.headers.get("Authorization", ""):
            self._fail(403, "AccessDenied", "Access Denied")
        elif not (self._folder / name.split("/")[0]).is_dir():
            self._fail(404, "NoSuchBucket", "The specified bucket does not exist")
        else:
            return False
        return True

    def do_PUT(self):
        parts = urlsplit(self.path)
        name, query = unquote(parts.path).strip("/"), parse_qs(parts.query, keep_blank_values=True)
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._state.gate.wait()
        with self._state.lock:
            self._asked.append(Asked(self.command, name, None))
            is_failing = self._state.n_failing > 0
            self._state.n_failing -= is_failing
        if self._is_refused(name):
            return
        if is_failing:
            self._fail(503, "SlowDown", "Please reduce your request rate.")
            return
        etag = hashlib.md5(content).hexdigest()
        if "uploads" in query:
            answer = "InitiateMultipartUploadResult"
            self._answer(f"<{answer}><UploadId>{name}</UploadId></{answer}>")
        elif "partNumber" in query:
            with self._state.lock:
                self._state.parts.setdefault(name, {})[int(query["partNumber"][0])] = content
            self._answer("", etag)
        elif "uploadId" in query:
            pieces = [piece for _, piece in sorted(self._state.parts.pop(name).items())]
            sums = b"".join(hashlib.md5(piece).digest() for piece in pieces)
            self._keep(name, b"".join(pieces), f"{hashlib.md5(sums).hexdigest()}-{len(pieces)}")
            self._answer(
                f"<CompleteMultipartUploadResult><ETag>{self._etag(name)}</ETag></CompleteMultipartUploadResult>"
            )
        else:
            self._keep(name, content, etag)
            self._answer("", self._etag(name))

    def do_POST(self):
        if "delete" in parse_qs(urlsplit(self.path).query, keep_blank_values=True):
            return self._delete()
        return self.do_PUT()

    def _delete(self):
        bucket = unquote(urlsplit(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        for key in re.findall("<Key>(.*?)</Key>", body):
            self._asked.append(Asked("DELETE", f"{bucket}/{key}", None))
            (self._folder / bucket / key).unlink(missing_ok=True)
        self._answer("<DeleteResult></DeleteResult>")

    def do_DELETE(self):
        name = unquote(urlsplit(self.path).path).strip("/")
        self._asked.append(Asked(self.command, name, None))
        (self._folder / name).unlink(missing_ok=True)
        self._answer("")

    def _keep(self, name, content, etag):
        file = self._folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        harmed = self._state.harm(content)
        file.write_bytes(harmed)
        sent = etag if harmed == content else hashlib.md5(harmed).hexdigest()
        self._state.etags[name] = sent if self._state.tells_md5 else f"tag-{len(self._asked)}"

    def _etag(self, name):
        if not self._buckets:
            return "1"
        return self._state.etags.get(name) or hashlib.md5((self._folder / name).read_bytes()).hexdigest()

    def _answer(self, text, etag=None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        if etag is not None:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PROPFIND(self):
        self._asked.append(Asked(self.command, self.path, None))
        self._fail(405, "MethodNotAllowed", "not here")

    def _send(self, content, part, etag="1"):
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
            "ETag": f'"{etag}"',
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
