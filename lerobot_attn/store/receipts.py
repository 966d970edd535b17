"""Receipts: small files beside stores that say where an episode was sent, and what its store said of itself.

Where the local copy was removed once it was sent, the receipt stays in its place: a run that goes on knows
the episode by it. Knows files. Knows nothing of how an episode is sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lerobot_attn.store.attributes import Header
from lerobot_attn.store.files import replace_json
from lerobot_attn.store.location import bare_name, names_below, present_form
from lerobot_attn.store.schema import EPISODE_SUFFIX

SUFFIX = ".uploaded.json"


@dataclass(frozen=True)
class Receipt:
    """What is known of an episode that was sent.

    Attributes:
        url: of the packed store.
        n_bytes: of it.
        sha256: of it.
        etag: what the service calls its content.
        stamp: what told the local store, as it was sent, from one that was changed since.
        videos: name of a video that was sent → its SHA-256; the evaluation's own is called after the episode.
        removed: whether the local copy was removed, because it had been sent.
        attributes: what the store says of itself.
        shapes: array name → shape.
    """

    url: str
    n_bytes: int
    sha256: str
    etag: str
    stamp: tuple[int, ...]
    videos: Mapping[str, str] = field(default_factory=dict)
    removed: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def header(self) -> Header:
        """What the store says of itself."""
        return Header(self.attributes, self.shapes)


def receipt_path(store: Path) -> Path:
    """Return where the receipt of an episode lies; its store may be packed or not, or gone."""
    return store.with_name(bare_name(store.name) + SUFFIX)


def receipt_of(store: Path) -> Receipt | None:
    """Return the receipt of an episode; None where there is none, or a damaged one."""
    try:
        said = json.loads(receipt_path(store).read_text(encoding="utf-8"))
        shapes = {str(name): tuple(map(int, shape)) for name, shape in said.pop("shapes").items()}
        receipt = Receipt(**{**said, "stamp": tuple(said["stamp"]), "shapes": shapes})
        known = isinstance(receipt.attributes, dict) and isinstance(receipt.url, str)
        return receipt if known and type(receipt.n_bytes) is int and type(receipt.removed) is bool else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_receipt(store: Path, receipt: Receipt) -> None:
    """Write the receipt of an episode, in place of another one; the disk has it afterwards.

    Raises:
        OSError: it cannot be written.
    """
    replace_json(receipt_path(store), asdict(receipt), durable=True)


def sent_stores(folder: Path) -> Iterator[tuple[Path, Receipt]]:
    """Yield where the stores of a folder lie, or lay, that were sent, at any depth, and their receipts."""
    found = sorted(
        at / name
        for at, names in names_below(folder)
        for name in names
        if name.startswith("episode_") and name.endswith(SUFFIX)
    )
    for path in found:
        store = path.with_name(path.name.removesuffix(SUFFIX) + EPISODE_SUFFIX)
        receipt = receipt_of(store)
        if receipt is not None:
            yield store, receipt


def removed_stores(folder: Path) -> Iterator[Path]:
    """Yield where the stores of a folder lay that were sent and removed, at any depth."""
    for store, receipt in sent_stores(folder):
        if receipt.removed and present_form(store) is None:
            yield store
