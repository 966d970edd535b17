"""Run the explorer on this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode

import uvicorn
from starlette.applications import Starlette

from lerobot_attn.errors import ConfigError, StoreError
from lerobot_attn.explorer import facts, slabs, tables
from lerobot_attn.explorer.app import create_app
from lerobot_attn.explorer.base_path import base_path as checked_base_path
from lerobot_attn.explorer.browser import open_page
from lerobot_attn.explorer.hosts import LOOPBACK_NAMES, host_pattern
from lerobot_attn.explorer.library import Library
from lerobot_attn.explorer.neurons import DEFAULT_TOP, read_found
from lerobot_attn.store.url import Place

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 8123
_TRIED_PORTS = 20
_WAIT_S = 0.2  # between two looks for the first episode
_LOOK_S = 0.2  # what is spent on reading a run's stores before the server answers


def serve(
    path: str | Place,
    *,
    host: str = LOOPBACK,
    port: int | None = None,
    open_browser: bool = True,
    allow_hosts: Sequence[str] = (),
    base_path: str = "",
    wait: bool = False,
    neurons: str | Path | None = None,
    top: int = DEFAULT_TOP,
    filters: Mapping[str, str] | None = None,
) -> None:
    """Serve the explorer until it is interrupted.

    Args:
        path: an episode, a task's folder, or a run's output folder.
        host: address to listen at; by default this machine alone can reach it.
        port: its port; by default the first free one from 8123 on.
        open_browser: open the page, where there is a graphical browser.
        allow_hosts: further names by which the server may be addressed, e.g. a proxy's; "*.example.org" for
            all that end so, "*" for any.
        base_path: path under which a proxy shows the server, e.g. "/proxy/8123/"; only for a proxy that
            passes its path on and does not say so in `X-Forwarded-Prefix`.
        wait: where there is no episode yet, wait until the first one is recorded.
        neurons: table of found neurons, with the columns stream, layer and unit; see `read_found`.
        top: how many units of each set in it, from the first row on.
        filters: of the run's table when the page opens, as its address has them: `show` (success, failure),
            `task` (an instruction), `find` (words), `condition`.

    Raises:
        StoreError: no episode at the path, and nobody waits for one.
        ConfigError: the address cannot be listened at, or a name or path is none, or the table of
            neurons cannot be read.
    """
    found = () if neurons is None else read_found(neurons, top)
    names = [host_pattern(name) for name in allow_hosts]
    base = checked_base_path(base_path)
    library = _first_episode(path) if wait else Library(path)
    listener = _listen(host, port)
    local = _is_loopback(host)
    bound = listener.getsockname()[1]
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    url = f"http://{name}:{bound}/" + (f"?{urlencode(filters)}" if filters else "")
    if not local:
        logger.warning(
            "Listening at %s: whoever can reach this machine can see these recordings; there is no password",
            host,
        )
    # Of another host any name may be the right one, unless they were told.
    known = [*LOOPBACK_NAMES, name, *names]
    app = create_app(library, hosts=known if local or names else ["*"], base=base, found=found)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    # Ctrl-C is how it is meant to end: the server raises it again once it has closed.
    with listener, contextlib.suppress(KeyboardInterrupt):
        if open_browser:
            # The browser starts while the first view is read; its request waits in the listener's queue.
            open_page(url)
        _warm_up(library)
        _Server(app, config, lambda: _announce(url)).run(sockets=[listener])


class _Server(uvicorn.Server):
    """A server that says when it answers, and tells its application that it ends."""

    def __init__(self, app: Starlette, config: uvicorn.Config, when_started: Callable[[], None]):
        super().__init__(config)
        self._app = app
        self._when_started = when_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._when_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.is_closing = True
        await super().shutdown(sockets)


def _first_episode(path: str | Place) -> Library:
    """Return the library of a path once there is an episode; Ctrl-C ends the wait."""
    told = False
    while True:
        try:
            return Library(path)
        except StoreError:
            if not told:
                print(f"Waiting for the first episode in {path}", flush=True)
            told = True
        time.sleep(_WAIT_S)


def _warm_up(library: Library) -> None:
    """Read what a first view reads, so that the libraries for it are loaded before the first request.

    Not on a thread beside the server: both would compete for one core, and the first answer would come later.
    """
    # A damaged episode is reported by the request that asks for it.
    with contextlib.suppress(Exception):
        episode = library.episode(library.look(_LOOK_S).summaries[0].id)
        slabs.mean_slab(episode, 0, facts.facts(episode)["denoise_steps"][-1])
        tables.tokens(episode, 0)


def _announce(url: str) -> None:
    print(f"The explorer is at {url} (Ctrl-C ends it)", flush=True)


def _listen(host: str, port: int | None) -> socket.socket:
    """Return a listening socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = range(DEFAULT_PORT, DEFAULT_PORT + _TRIED_PORTS) if port is None else [port]
    problem: OSError | None = None
    for tried in ports:
        # asyncio turns off Nagle's algorithm only for sockets that carry TCP's protocol number. With the
        # algorithm some small answers wait 40 ms for the browser's acknowledgement.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, tried))
            listener.listen()
            return listener
        except OSError as error:
            listener.close()
            problem = error
        except OverflowError as error:
            listener.close()
            raise ConfigError(f"--port: got {tried}, expected 0 to 65535") from error
    which = f"port {port}" if port is not None else f"ports {ports[0]} to {ports[-1]}"
    raise ConfigError(f"{host}: cannot listen at {which} ({problem}); choose another --port or --host")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
