"""The explorer's requests: read-only, by episode id, with answers that a browser may keep.

JSON for facts and tables, `application/octet-stream` of little-endian float16 for attention, with its shape
in the header `X-Shape`. What belongs to a committed inference never changes: its address holds the
recording's version, and it is marked immutable.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from lerobot_attn.errors import LerobotAttnError, SelectionError, StoreError, first_line
from lerobot_attn.explorer import facts, groups, neurons, ranges, scene, slabs, tables
from lerobot_attn.explorer.base_path import BasePath, guessed
from lerobot_attn.explorer.document import page_folder
from lerobot_attn.explorer.hosts import LOOPBACK_NAMES, HostGate
from lerobot_attn.explorer.library import Library, NotThereError
from lerobot_attn.explorer.listing import Listing, news, part, wanted_of
from lerobot_attn.explorer.page_files import ASK_AGAIN, IMMUTABLE, PageFiles, document
from lerobot_attn.explorer.pictures import FramePictures, video_version
from lerobot_attn.explorer.summary import Summary, version_of
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.references import Clip, RemoteVideo, file_of
from lerobot_attn.store.stills import read_still

POLL_S = 0.1  # seconds between two looks at the library while somebody listens to its events
GROWING_POLL_S = 0.01  # the same where something has grown of late, and somebody probably watches it grow
_OF_LATE_S = 60.0
_LOOK_S = 0.5  # seconds spent on reading stores before an answer, because thousands of them take minutes
_KEEP_ALIVE_S = 15.0
_LATEST = "latest"  # as a version: whatever is in the episode's place
_UNITS = re.compile(r"[0-9]{1,9}:[0-9]{1,9}(,[0-9]{1,9}:[0-9]{1,9})*", re.ASCII)
_MISSING_PAGE = b"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>lerobot-attn</title></head>
<p>This installation has no page: it comes from sources in which the page was not built.
<p>Run <code>scripts/build_explorer.sh</code> there, install again, and start <code>lerobot-attn view</code>
again. Until then, the data is at <a href="api/run">api/run</a>."""


class _NumberConvertor(Convertor[int]):
    """A number in a path, short enough for Python to read: longer ones are no request."""

    regex = "[0-9]{1,9}"

    def convert(self, value: str) -> int:
        return int(value)

    def to_string(self, value: int) -> str:
        return str(value)


register_url_convertor("number", _NumberConvertor())


def create_app(
    library: Library,
    *,
    hosts: list[str] | None = None,
    base: str = "",
    static: Path | None = None,
    found: Sequence[neurons.FoundSet] = (),
) -> Starlette:
    """Return the web application.

    Args:
        library: the episodes that are served.
        hosts: names by which the server may be addressed, so that a page elsewhere cannot reach it by a name
            of its own; default: this machine's loopback.
        base: path under which a proxy shows the server and which it passes on, as `base_path` returns it.
        static: the built page; default: the one in the package.
        found: sets of neurons that somebody found, whose activation the page shows.
    """
    explorer = _Explorer(library, found)
    zipped = [Middleware(GZipMiddleware, minimum_size=1000)]

    def get(path: str, endpoint: Callable[..., Any], *, zip_: bool = False) -> Route:
        return Route(path, endpoint, methods=["GET"], middleware=zipped if zip_ else None)

    episode = "/api/episodes/{id}/{version}"
    at = episode + "/inferences/{inference:number}"
    routes: list[Route | Mount] = [
        get("/api/run", explorer.run, zip_=True),
        get("/api/groups", explorer.groups, zip_=True),
        get("/api/events", explorer.events),
        get("/api/episodes/{id}", explorer.facts, zip_=True),
        get(episode + "/timeline", explorer.timeline, zip_=True),
        get(episode + "/shares", explorer.shares, zip_=True),
        get(episode + "/roles/{camera:path}", explorer.roles, zip_=True),
        get(episode + "/neurons/{stream}", explorer.neurons, zip_=True),
        get(episode + "/ranges", explorer.ranges_of_steps, zip_=True),
        get(episode + "/ranges/{denoise_step:number}", explorer.ranges, zip_=True),
        get(at + "/tokens", explorer.tokens, zip_=True),
        get(at + "/actions", explorer.actions, zip_=True),
        get(at + "/masks", explorer.masks, zip_=True),
        get(at + "/means/{denoise_step:number}", explorer.means),
        get(at + "/maps/{denoise_step:number}/{layer:number}", explorer.maps),
        get(at + "/prefix/{layer:number}/{query:number}", explorer.prefix),
        get(episode + "/cameras/{camera:path}/frames/{frame:number}.jpg", explorer.frame),
        get(episode + "/cameras/{camera:path}.mp4", explorer.video),
        Route("/api/{rest:path}", _no_such_request),
        _page(static),
    ]
    allowed = list(LOOPBACK_NAMES) if hosts is None else hosts
    app = Starlette(
        routes=routes,
        middleware=[Middleware(HostGate, hosts=allowed), Middleware(BasePath, path=base)],
        exception_handlers={
            NotThereError: _refused(404),
            SelectionError: _refused(404),
            StoreError: _refused(422),
            LerobotAttnError: _refused(400),
            HTTPException: _http_refused,
            Exception: _refused(500),
        },
    )
    app.state.is_closing = False  # the server sets it when it ends, so that streams of events end too
    return app


class _Explorer:
    """The endpoints. Those that read stores are plain functions: Starlette runs them on threads."""

    def __init__(self, library: Library, found: Sequence[neurons.FoundSet]):
        self._library = library
        self._found = found
        self._pictures = FramePictures()
        self._groups = _Once()

    def run(self, request: Request) -> Response:
        wanted = wanted_of(request.query_params)
        found = self._library.look(_LOOK_S)
        named = {"name": self._library.name, "is_episode": self._library.is_episode}
        return _json(request, {**named, **part(found, wanted), **found.overview})

    async def groups(self, request: Request) -> Response:
        listing = await run_in_threadpool(self._library.look, _LOOK_S)
        while listing.n_unread:  # a little at a time, for others look too
            listing = await run_in_threadpool(self._library.look, _LOOK_S)
        whole = [found for found in listing.summaries if found.facts["complete"]]
        state = tuple((found.id, found.version, found.facts["stored_bytes"]) for found in whole)
        return _json(request, await self._groups.ask(state, lambda: self._compare(whole)))

    def _compare(self, summaries: list[Summary]) -> dict[str, Any]:
        episodes = []
        for summary in summaries:
            with contextlib.suppress(NotThereError, StoreError):  # removed or damaged since one looked
                episodes.append(self._library.episode(summary.id, summary.version))
        return groups.groups(episodes)

    def facts(self, request: Request) -> Response:
        episode = self._library.episode(request.path_params["id"])
        return _json(request, {"version": version_of(episode), **_read(episode, facts.facts, self._found)})

    def timeline(self, request: Request) -> Response:
        return _json(request, _read(self._episode(request), tables.timeline))

    def shares(self, request: Request) -> Response:
        found = _read(self._episode(request), tables.shares, **_which_means(request))
        return _json(request, found)

    def roles(self, request: Request) -> Response:
        camera, where = request.path_params["camera"], _which_means(request)

        def read(episode: Episode) -> dict[str, Any]:
            return scene.role_shares(episode, where["first"], camera, tables.chosen_means(episode, **where))

        return _json(request, _read(self._episode(request), read))

    def neurons(self, request: Request) -> Response:
        asked = request.query_params
        found = _read(
            self._episode(request),
            neurons.activations,
            _integer(request, "first", 0),
            request.path_params["stream"],
            _units(request),
            group=asked.get("group", ""),
            reduction=asked.get("reduction", "mean"),
            denoise_step=_integer(request, "denoise_step", -1),
            each=_integer(request, "each", 0) != 0,
        )
        return _json(request, found)

    def ranges(self, request: Request) -> Response:
        step = request.path_params["denoise_step"]
        return _json(request, _read(self._episode(request), ranges.ranges, step))

    def ranges_of_steps(self, request: Request) -> Response:
        return _json(request, _read(self._episode(request), ranges.ranges_of_steps))

    def tokens(self, request: Request) -> Response:
        inference = request.path_params["inference"]
        return _json(request, _read(self._episode(request), tables.tokens, inference), immutable=True)

    def masks(self, request: Request) -> Response:
        inference = request.path_params["inference"]
        return _json(request, _read(self._episode(request), scene.masks, inference), immutable=True)

    def actions(self, request: Request) -> Response:
        inference = request.path_params["inference"]
        return _json(request, _read(self._episode(request), tables.action_chunk, inference), immutable=True)

    def means(self, request: Request) -> Response:
        return self._slab(request, slabs.mean_slab, "inference", "denoise_step")

    def maps(self, request: Request) -> Response:
        return self._slab(request, slabs.map_slab, "inference", "denoise_step", "layer")

    def prefix(self, request: Request) -> Response:
        return self._slab(request, slabs.prefix_slab, "inference", "layer", "query")

    def frame(self, request: Request) -> Response:
        episode, camera = self._episode(request), request.path_params["camera"]
        frame, video = request.path_params["frame"], self._library.video(episode, camera)
        version = video_version(video)
        if frame >= max(1, episode.n_frames):
            raise NotThereError(f"frame {frame} does not exist: the episode has {episode.n_frames}")
        if not episode.is_complete and (found := _still(episode, camera, frame)) is not None:
            return _answer(request, found, "image/jpeg", immutable=False)  # the video is being written
        picture = self._pictures.picture(video, frame, episode.image_size_px(camera))
        # A video can be replaced, or grow, while its recording stays the same. It is immutable only if it was
        # the wanted version both before and after it was decoded.
        asked = request.query_params.get("v")
        immutable = asked is not None and asked == version == video_version(video)
        return _answer(request, picture, "image/jpeg", immutable=immutable)

    def video(self, request: Request) -> Response:
        camera = request.path_params["camera"]
        video = self._library.video(self._episode(request), camera)
        if isinstance(video, RemoteVideo):
            video = file_of(video)
        if isinstance(video, Clip):  # the file holds other episodes, perhaps of other people
            raise NotThereError(
                f"the video of camera {camera!r} is a part of a data set's file; ask for frames"
            )
        try:
            found = video.stat()
        except OSError as error:
            raise NotThereError(f"the video of camera {camera!r} was removed") from error
        headers = {"Cache-Control": ASK_AGAIN}
        return FileResponse(video, media_type="video/mp4", headers=headers, stat_result=found)

    async def events(self, request: Request) -> Response:
        """Tell of every episode that is new, has grown or is gone, as server-sent events."""
        # nginx would otherwise keep events back until many have come together.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._changes(request), media_type="text/event-stream", headers=headers)

    async def _changes(self, request: Request) -> AsyncIterator[str]:
        told: Listing | None = None
        silent_s, grew_at = 0.0, -math.inf
        while not (request.app.state.is_closing or await request.is_disconnected()):
            started = time.monotonic()
            found, work_s = await run_in_threadpool(self._timed_look)
            if told is None:
                # Whatever changes after an answer to /api/run that follows this event will be told.
                yield "event: ready\ndata: {}\n\n"
            elif (changes := news(told, found)) is not None:
                if changes["changed"]:
                    grew_at = started
                yield f"data: {json.dumps(changes, allow_nan=False)}\n\n"
                silent_s = 0.0
            elif silent_s >= _KEEP_ALIVE_S:
                yield ": here\n\n"
                silent_s = 0.0
            told = found
            # Looking at thousands of stores takes long; three quarters of the time are left for answers, or
            # half of it where there are stores that nobody has read yet. Beside a busy policy a short look
            # takes long too, but only by the clock.
            grows = started - grew_at < _OF_LATE_S
            pause_s = max(
                GROWING_POLL_S if grows else max(POLL_S, time.monotonic() - started),
                (1 if found.n_unread else 3) * work_s,
            )
            silent_s += pause_s
            while pause_s > 0 and not request.app.state.is_closing:
                await asyncio.sleep(min(pause_s, POLL_S))
                pause_s -= POLL_S

    def _timed_look(self) -> tuple[Listing, float]:
        """Return what is there, and the seconds that this thread had of a core for finding it out."""
        before = time.thread_time()
        return self._library.look(_LOOK_S), time.thread_time() - before

    def _episode(self, request: Request) -> Episode:
        version = request.path_params["version"]
        return self._library.episode(request.path_params["id"], None if version == _LATEST else version)

    def _slab(self, request: Request, slab: Callable[..., slabs.Slab], *names: str) -> Response:
        values = [request.path_params[name] for name in names]
        body, shape = _read(self._episode(request), slab, *values)
        headers = {"X-Shape": ",".join(map(str, shape))}
        return _answer(request, body, "application/octet-stream", immutable=True, headers=headers)


class _Once:
    """The answer to a slow question, computed on a thread of its own and kept.

    A request that comes while it is computed waits without taking a thread, so that others find one.
    """

    def __init__(self) -> None:
        self._state: Hashable = None
        self._answer: asyncio.Task[dict[str, Any]] | None = None

    async def ask(self, state: Hashable, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `compute` returned for this state, or, where that failed, call it again."""
        kept = self._answer
        failed = kept is not None and kept.done() and (kept.cancelled() or kept.exception() is not None)
        if kept is None or failed or state != self._state:
            self._state = state
            kept = self._answer = asyncio.create_task(run_in_threadpool(compute))
        return await asyncio.shield(kept)  # if this request is cancelled, others still wait for it


def _read[**P, R](episode: Episode, read: Callable[..., R], *args: Any, **where: Any) -> R:
    """Read from an episode; a damaged chunk raises whatever its codec raises, which becomes a StoreError."""
    try:
        return read(episode, *args, **where)
    except LerobotAttnError:
        raise
    except Exception as error:
        raise StoreError(f"{episode.path.name}: cannot be read: {first_line(error)}") from error


def _still(episode: Episode, camera: str, frame: int) -> bytes | None:
    still = episode.still(camera, frame)
    return None if still is None else read_still(still)


def _which_means(request: Request) -> dict[str, Any]:
    """Return which means over the executed actions a request asks for: arguments of `chosen_means`."""
    return {
        "first": _integer(request, "first", 0),
        "layer": _integer_or(request, "layer", "mean"),
        "denoise_step": _integer(request, "denoise_step", -1),
        "head": _integer_or(request, "head", "mean", "max"),
    }


def _json(request: Request, value: Any, *, immutable: bool = False) -> Response:
    body = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    return _answer(request, body, "application/json", immutable=immutable)


def _answer(
    request: Request,
    body: bytes,
    media_type: str,
    *,
    immutable: bool,
    headers: dict[str, str] | None = None,
) -> Response:
    """Answer, or say that what the browser has is still right."""
    etag = f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'
    immutable = immutable and request.path_params.get("version") != _LATEST
    kept = {"ETag": etag, "Cache-Control": IMMUTABLE if immutable else ASK_AGAIN, **(headers or {})}
    asked = request.headers.get("if-none-match", "")
    if etag in (tag.strip().removeprefix("W/") for tag in asked.split(",")):
        return Response(status_code=304, headers=kept)
    return Response(body, media_type=media_type, headers=kept)


def _integer(request: Request, name: str, default: int | None) -> int:
    text = request.query_params.get(name)
    if text is None and default is not None:
        return default
    with contextlib.suppress(TypeError, ValueError):
        if len(text or "") <= 9:
            return int(text or "")
    raise HTTPException(400, f"{name}: got {(text or '')[:40]!r}, expected a whole number")


def _integer_or(request: Request, name: str, *words: str) -> int | str:
    """Return a number, or one of the words, of which the first is the default."""
    text = request.query_params.get(name, words[0])
    return text if text in words else _integer(request, name, None)


def _units(request: Request) -> list[neurons.Unit]:
    """Return the neurons that a request asks for, as "3:17,3:20": layer and unit of each."""
    text = request.query_params.get("units", "")
    if not _UNITS.fullmatch(text):
        raise HTTPException(400, f"units: got {text[:40]!r}, expected layer:unit, as 3:17,3:20")
    pairs = [one.split(":") for one in text.split(",")]
    return [(int(layer), int(unit)) for layer, unit in pairs]


def _refused(status: int) -> Callable[[Request, Exception], Response]:
    def answer(request: Request, error: Exception) -> Response:
        return _problem(status, first_line(error))

    return answer


def _http_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, base = error.detail, guessed(request.url.path)
    if error.status_code == 404 and base is not None:
        message = (
            f"nothing is at {request.url.path[:200]}; behind a proxy that passes its own path on, start the "
            f"explorer with: lerobot-attn view … --base-path {base}/"
        )
    return _problem(error.status_code, message, error.headers)


def _problem(status: int, message: str, headers: Any = None) -> Response:
    # In ASCII: a path on the disk may hold what no UTF-8 can say.
    body = json.dumps({"error": message}, separators=(",", ":")).encode()
    kept = {**(headers or {}), "Cache-Control": "no-store"}
    return Response(body, status, headers=kept, media_type="application/json")


def _no_such_request(request: Request) -> Response:
    return _problem(404, f"no such request: {request.url.path[:200]}")


def _page(static: Path | None) -> Mount | Route:
    folder = static or page_folder()
    if not (folder / "index.html").is_file():
        return Route("/", lambda request: document(_MISSING_PAGE))
    return Mount("/", PageFiles(directory=folder, html=True))
