"""Addresses of stores on other machines, and which text is one. Knows no network.

place_of("s3://bucket/run/attention/task_0/episode_00000.zarr")    # a Url
place_of("outputs/eval")                                           # a Path
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from lerobot_attn.errors import StoreError

SCHEMES = ("s3", "gs", "az", "http", "https", "hf")
_WITH_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MAX_LENGTH = 4096


@dataclass(frozen=True, order=True)
class Url:
    """An address, with the names that a path has for its parts.

    Attributes:
        root: scheme and host, bucket or data set: "s3://bucket", "hf://datasets/user/name".
        key: what comes behind it, without slashes at its ends; not percent-encoded.
    """

    root: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.root}/{self.key}" if self.key else self.root

    @property
    def scheme(self) -> str:
        """What stands before "://"."""
        return self.root.partition(":")[0]

    @property
    def name(self) -> str:
        """The last part."""
        return (self.key or self.root).rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The last part's suffix, its dot included."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> Url:
        """The folder that it is in; of a root itself."""
        return Url(self.root, self.key.rpartition("/")[0])

    def __truediv__(self, below: str) -> Url:
        return Url(self.root, f"{self.key}/{below}".strip("/"))

    def absolute(self) -> Url:
        """Return itself."""
        return self

    def relative_to(self, other: Url) -> PurePosixPath:
        """Return what comes behind another address, which this one lies below."""
        return PurePosixPath(self.key).relative_to(other.key)


Place = Path | Url


def place_of(said: Any) -> Place:
    """Return where something lies: a `Url` of text with a scheme such as s3://, else a `Path`.

    Raises:
        StoreError: a scheme that nothing here reads, or an address with a query or with credentials in it.
    """
    if isinstance(said, Url | Path):
        return said
    text = str(said)
    found = _WITH_SCHEME.match(text)
    if found is None:
        return Path(said)
    scheme = found[1].lower()
    shown = text if len(text) <= 200 else f"{text[:197]}…"
    if scheme not in SCHEMES:
        raise StoreError(
            f"{shown}: cannot be read, expected a path or {', '.join(f'{name}://' for name in SCHEMES)}"
        )
    host, _, key = text[found.end() :].partition("/")
    if scheme == "hf":
        key = f"{host}/{key}"
        kind, _, key = key.partition("/")
        user, _, key = key.partition("/")
        name, _, key = key.partition("/")
        if kind != "datasets" or not user or not name:
            raise StoreError(f"{shown}: expected hf://datasets/USER/NAME/…")
        host = f"datasets/{user}/{name}"
    if scheme in ("http", "https"):
        parts = urlsplit(text)
        if parts.query or parts.fragment:
            raise StoreError(
                f"{shown}: has a query or a fragment, expected a plain address of a folder or file"
            )
        key = unquote(key)
    if not host or len(text) > _MAX_LENGTH or not text.isprintable():
        raise StoreError(f"{shown!r}: is no address, expected SCHEME://HOST-OR-BUCKET/…")
    if scheme != "hf" and "@" in host:
        raise StoreError(
            f"{scheme}://…@{host.rpartition('@')[2]}: has credentials in it, expected none; they come from "
            "the environment alone"
        )
    if any(part in (".", "..") for part in key.split("/")):
        raise StoreError(f"{shown}: has . or .. in it, expected a plain address")
    return Url(f"{scheme}://{host}", "/".join(part for part in key.split("/") if part))
