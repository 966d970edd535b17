"""Episodes sent to a Rerun viewer while they are recorded.

Looks at the stores several times a second, as the explorer does, and sends what was committed since. Starts
no viewer and opens no port: Rerun's own listens at every interface, and reports its use unless told not to.
Knows how to find what grows; what is shown of an episode is `overlay.rerun`'s business.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from lerobot_attn.errors import ConfigError, LerobotAttnError, StoreError, first_line
from lerobot_attn.overlay.rerun import EpisodeTrack, flush, new_stream, rerun_sdk
from lerobot_attn.overlay.settings import RerunSettings
from lerobot_attn.store.location import on_this_machine, signature_of
from lerobot_attn.store.reader import Episode, open_episode
from lerobot_attn.store.runs import open_run

VIEWER = "rerun+http://127.0.0.1:9876/proxy"  # where Rerun's viewer listens unless told otherwise
_POLL_S = 0.1
_FLUSH_S = 5.0
# LeRobot logs a camera's newest picture as the robot's name of it behind this.
_LEROBOTS_CAMERAS = "observation."


class RerunSession(NamedTuple):
    """A recording of somebody else's that the episodes become a part of, as LeRobot's of a rollout."""

    application: str
    recording_id: str


def follow_rerun(
    path: str | Path,
    settings: RerunSettings | None = None,
    *,
    url: str = VIEWER,
    session: RerunSession | None = None,
    since_s: float = 0.0,
    stopped: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> None:
    """Send episodes to a Rerun viewer, each as it grows.

    While an episode is recorded, heatmaps are coloured by the range of the frames so far. Its cameras'
    pictures follow when it is complete, because a video opens only then; all heatmaps are then sent again in
    the episode's range. Waits for the first episode and for the viewer, for ever.

    Args:
        path: an episode, whose end ends this, or a run's folder, whose new episodes are looked for until
            `stopped`.
        settings: which maps to show, and how.
        url: the viewer's address.
        session: what the episodes become a part of, each below `attention/{group}/{episode}`; by default each
            is a recording of its own.
        since_s: leave out stores that have not changed since then, seconds since 1970.
        stopped: whether to send what is there, as far as it goes, and end.
        say: called with what a person has to know, a line each.

    Raises:
        SetupError: Rerun is not installed.
        ConfigError: the address is none.
    """
    rr, target = rerun_sdk(), Path(path)
    address = _address(url)
    following = _Following(rr, settings or RerunSettings(), url, session, since_s, say)
    waited = False
    while not (is_last := stopped()) and not _listens(address):
        if not waited:
            say(f"Waiting for a Rerun viewer at {address[0]}:{address[1]}; start one: rerun --bind 127.0.0.1")
        waited = True
        time.sleep(5 * _POLL_S)
    if is_last and not _listens(address):
        say(f"No Rerun viewer came at {address[0]}:{address[1]}: nothing was sent")
        return
    say(f"Sending to the Rerun viewer at {address[0]}:{address[1]}")
    try:
        while True:
            is_last = stopped()
            stores = _stores(target)
            for store in stores:
                following.look(store, is_last=is_last)
            if is_last or (stores == (target,) and following.is_done(target)):
                return
            time.sleep(_POLL_S)
    finally:
        following.close()


@dataclass
class _Followed:
    """An episode that is sent."""

    signature: tuple[int, int, int]
    created: Any
    track: EpisodeTrack | None  # None: it cannot be shown
    is_done: bool = False


class _Following:
    """What is sent of each store."""

    def __init__(
        self,
        rr: Any,
        settings: RerunSettings,
        url: str,
        session: RerunSession | None,
        since_s: float,
        say: Callable[[str], None],
    ):
        self._rr, self._settings, self._url, self._session = rr, settings, url, session
        self._since_s, self._say = since_s, say
        self._known: dict[Path, _Followed] = {}
        self._takes: dict[Path, int] = {}
        self._streams: list[Any] = []

    def is_done(self, store: Path) -> bool:
        """Return whether all of an episode was sent."""
        return store in self._known and self._known[store].is_done

    def look(self, store: Path, *, is_last: bool) -> None:
        """Send what is new of a store; all that can be if this is the last look."""
        known = self._known.get(store)
        try:
            signature = signature_of(store)
        except OSError:  # discarded
            return
        is_old = known is not None and known.signature == signature
        if signature[1] / 1e9 < self._since_s or (is_old and (not is_last or self.is_done(store))):
            return
        try:
            episode = open_episode(store)
        except StoreError:  # nothing is committed yet
            return
        if not episode.n_frames:
            return
        created = episode.attributes.get("created")
        try:
            if known is None or known.created != created:  # another one may have taken its place
                known = self._known[store] = _Followed(signature, created, self._track(store, episode))
            known.signature = signature
            if known.track is None:
                return
            if episode.is_complete or is_last:
                known.is_done = True
                known.track.finish(episode)
            else:
                known.track.add(episode)
        except LerobotAttnError as error:
            self._say(f"{store}: not shown: {first_line(error)}")
            self._known[store] = _Followed(signature, created, None, is_done=True)

    def close(self) -> None:
        """Wait a few seconds until the viewer has got everything."""
        for stream in self._streams:
            with suppress(Exception):  # the viewer is gone
                flush(stream, _FLUSH_S)
                stream.disconnect()

    def _track(self, store: Path, episode: Episode) -> EpisodeTrack:
        if self._session is None:
            stream = new_stream(self._rr, episode)
            stream.connect_grpc(self._url)
            self._streams.append(stream)
            return EpisodeTrack(stream, episode, self._settings)
        if not self._streams:
            application, recording_id = self._session
            stream = self._rr.RecordingStream(application, recording_id=recording_id)
            stream.connect_grpc(self._url)
            self._streams.append(stream)
        take = self._takes[store] = self._takes.get(store, 0) + 1
        name = (
            episode.bare_name if take == 1 else f"{episode.bare_name} take {take}"
        )  # filmed again under its number
        root = ("attention", store.parent.name, name)
        return EpisodeTrack(self._streams[0], episode, self._settings, root, _LEROBOTS_CAMERAS)


def _stores(path: Path) -> tuple[Path, ...]:
    try:
        return tuple(on_this_machine(store, "a URL is not followed") for store in open_run(path).stores)
    except OSError:  # nothing is there yet
        return ()


def _address(url: str) -> tuple[str, int]:
    """Return the host and port of a viewer's address.

    Raises:
        ConfigError: it is none.
    """
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("rerun+http", "rerun+https") and parts.hostname and parts.port:
            return parts.hostname, parts.port
    raise ConfigError(f"Rerun viewer {url!r}: expected an address as {VIEWER}")


def _listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True
