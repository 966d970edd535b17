"""A stand-in for the Hugging Face Hub: the few requests with which `huggingface_hub` pushes and pulls.

Written after what the client asks for, with git's and LFS's own checksums, which it checks. No Xet, no rate
limits, no web pages.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


def sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class StandIn:
    """What the Hub holds, and how it is asked.

    Attributes:
        repos: name → {"private": …, "commits": [{"id", "message", "files": {path: content}}]}.
        objects: sha256 → what was uploaded under it.
        asked: "METHOD path" of each request.
        fails: called with each "METHOD path"; a status that it returns is answered instead.
    """

    def __init__(self):
        self.repos, self.objects, self.asked, self.lfs = {}, {}, [], set()
        self.fails: Callable[[str], int | None] = lambda asked: None
        self.endpoint = ""

    def files(self, repo: str, commit: str | None = None) -> dict[str, bytes]:
        commits = self.repos[repo]["commits"]
        return next(one for one in reversed(commits) if commit in (None, "main", one["id"]))["files"]

    def commit(self, repo: str, message: str, files: dict[str, bytes]) -> str:
        commits = self.repos[repo]["commits"]
        commits.append(
            {"id": hashlib.sha1(b"%d" % len(commits)).hexdigest(), "message": message, "files": files}
        )
        return commits[-1]["id"]

    def messages(self, repo: str) -> list[str]:
        return [one["message"] for one in self.repos[repo]["commits"]]


def is_binary(content: bytes) -> bool:
    return b"\0" in content[:512] or len(content) > 10_000_000


class Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value=None, *, status=200, content=None, headers=()):
        body = content if content is not None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers:
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self):
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        asked = f"{self.command} {path}"
        self.hub.asked.append(asked)
        if status := self.hub.fails(asked):
            return self.answer({"error": "stand-in"}, status=status)
        if not path.startswith("/storage/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, status=401)
        for pattern, act in ROUTES.items():
            if found := re.fullmatch(pattern, asked):
                return act(self, body, **found.groupdict())
        return self.answer({"error": f"the stand-in does not know {asked}"}, status=501)

    do_GET = do_POST = do_PUT = do_HEAD = handle_one  # noqa: N815

    # What the client asks for

    def create(self, body):
        said = json.loads(body)
        name = f"{said['organization']}/{said['name']}" if said.get("organization") else f"me/{said['name']}"
        assert said["type"] == "dataset"
        if name in self.hub.repos:
            return self.answer({"url": f"{self.hub.endpoint}/datasets/{name}"}, status=409)
        private = said.get("private", said.get("visibility") == "private")
        self.hub.repos[name] = {"private": private, "commits": []}
        self.hub.commit(name, "initial commit", {".gitattributes": b"*.zarr filter=lfs\n"})
        return self.answer({"url": f"{self.hub.endpoint}/datasets/{name}"})

    def missing(self, repo):
        if repo in self.hub.repos:
            return False
        self.answer({"error": "Repository not found"}, status=404, headers=[("X-Error-Code", "RepoNotFound")])
        return True

    def info(self, body, repo, revision=None):
        if not self.missing(repo):
            commit = self.hub.repos[repo]["commits"][-1]["id"] if revision in (None, "main") else revision
            private = self.hub.repos[repo]["private"]
            self.answer({"id": repo, "sha": commit, "private": private, "siblings": [], "tags": []})

    def tree(self, body, repo, revision):
        if self.missing(repo):
            return
        entries = []
        for path, content in sorted(self.hub.files(repo, revision).items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": sha1(content)}
            if is_binary(content):
                entry["oid"] = "0" * 40  # of the pointer
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.answer(entries)

    def preupload(self, body, repo, revision):
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if is_binary(base64.b64decode(one["sample"])) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for one in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def batch(self, body, repo):
        found = []
        for one in json.loads(body)["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                href = f"{self.hub.endpoint}/storage/{one['oid']}"
                entry["actions"] = {"upload": {"href": href, "header": {}}}
            found.append(entry)
        self.answer({"transfer": "basic", "objects": found})

    def store(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.answer({})

    def commit(self, body, repo, revision):
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(self.hub.files(repo))
        message = ""
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commit = self.hub.commit(repo, message, files)
        url = f"{self.hub.endpoint}/datasets/{repo}/commit/{commit}"
        self.answer({"commitUrl": url, "commitOid": commit})

    def resolve(self, body, repo, revision, path):
        if self.missing(repo):
            return
        content = self.hub.files(repo, revision).get(path)
        if content is None:
            return self.answer(
                {"error": "Entry not found"}, status=404, headers=[("X-Error-Code", "EntryNotFound")]
            )
        commit = self.hub.repos[repo]["commits"][-1]["id"] if revision == "main" else revision
        etag = hashlib.sha256(content).hexdigest() if is_binary(content) else sha1(content)
        headers = [("X-Repo-Commit", commit), ("ETag", f'"{etag}"')]
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found:
            start = int(found[1])
            headers.append(("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"))
            return self.answer(content=content[start:], status=206, headers=headers)
        self.answer(content=content, headers=headers)


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = {
    r"POST /api/repos/create": Handler.create,
    r"POST /api/validate-yaml": lambda self, body: self.answer({"warnings": [], "errors": []}),
    rf"GET /api/datasets/{_REPO}(/revision/(?P<revision>[^/]+))?": Handler.info,
    rf"GET /api/datasets/{_REPO}/tree/(?P<revision>[^/]+)": Handler.tree,
    rf"POST /api/datasets/{_REPO}/preupload/(?P<revision>[^/]+)": Handler.preupload,
    rf"POST /datasets/{_REPO}\.git/info/lfs/objects/batch": Handler.batch,
    r"PUT /storage/(?P<oid>\w+)": Handler.store,
    rf"POST /api/datasets/{_REPO}/commit/(?P<revision>[^/]+)": Handler.commit,
    rf"(GET|HEAD) /datasets/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": Handler.resolve,
}


@contextmanager
def serving() -> Iterator[StandIn]:
    """Serve an empty Hub at an address of this machine."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
