"""An episode on its way to a bucket: its videos, then its store, packed, so that it is there whole or not.

    receipt = await send_episode(store, bucket, "libero_object_0")

What is there already is not sent again, and what is another recording is not replaced. Knows stores and
buckets. Knows nothing of when an episode is sent.
"""

from __future__ import annotations

import glob
import shutil
from dataclasses import replace
from pathlib import Path

from lerobot_attn.errors import StoreError
from lerobot_attn.sizes import Progress
from lerobot_attn.store.attributes import read_header
from lerobot_attn.store.bucket import Bucket, Content, Found, PlainFile, digest_of
from lerobot_attn.store.files import first_link, unfinished
from lerobot_attn.store.location import PACKED_EPISODE_SUFFIX, bare_name, is_packed, signature_of
from lerobot_attn.store.receipts import Receipt, receipt_of, write_receipt
from lerobot_attn.store.schema import EPISODE_SUFFIX
from lerobot_attn.store.stills import remove_stills
from lerobot_attn.store.zipped import zipped_store


async def send_episode(
    store: Path, bucket: Bucket, folder: str, *, overwrite: bool = False, progress: Progress | None = None
) -> tuple[Receipt, bool]:
    """Send a complete episode and its cameras' videos, and leave a receipt beside the store.

    Args:
        store: the episode, packed or not.
        bucket: where to.
        folder: in which of its folders; "" for none.
        overwrite: replace another recording that is in its place.
        progress: called as `progress(done, total)` with bytes.

    Returns:
        The receipt, and whether anything had to be sent.

    Raises:
        UnreachedError: the bucket does not take it; nothing here was changed.
        StoreError: it is incomplete or damaged, has links in it, was changed meanwhile, or another recording
            is in its place.
        OSError: it cannot be read.
    """
    name = "/".join(part for part in (folder, bare_name(store.name) + PACKED_EPISODE_SUFFIX) if part)
    stamp = signature_of(store)
    header = read_header(store)
    if not header.is_complete:
        raise StoreError(f"{store}: is incomplete, expected an episode recorded to its end; not sent")
    link = None if is_packed(store) else first_link(store)
    if link is not None:
        raise StoreError(f"{store}: {link.relative_to(store)} is a link, expected plain files; not sent")
    videos = {video.name: PlainFile(video) for video in videos_of(store)}
    there = await bucket.found(name)
    before = receipt_of(store)
    if (
        before is not None
        and there is not None
        and _is_of(before, bucket, name, stamp, there)
        and {*before.videos} >= {*videos}
    ):
        return before, False
    content: Content = PlainFile(store) if is_packed(store) else zipped_store(store)
    same = there is not None and await bucket.holds(name, there, digest_of(content))
    if there is not None and not same and not overwrite:
        raise StoreError(
            f"{bucket.url / name}: holds another recording, expected this one or none; upload to another "
            "place, or replace it with `lerobot-attn upload --overwrite`"
        )
    total, done = content.size + sum(video.size for video in videos.values()), 0

    def step(n: int, _: int) -> None:
        if progress is not None:
            progress(done + n, total)

    sums, sent = {}, not same
    for video, file in videos.items():
        sums[video], was_sent = await place_file(bucket, f"{folder}/{video}".strip("/"), file, step)
        sent |= was_sent
        done += file.size
    # Last: who sees the store sees all that belongs to it.
    if there is None or not same:
        digest, there = await bucket.put(name, content, step)
    else:
        digest = digest_of(content)
    if signature_of(store) != stamp:
        raise StoreError(f"{store}: was changed while it was sent, expected it as it was; send it again")
    receipt = Receipt(
        url=str(bucket.url / name),
        n_bytes=content.size,
        sha256=digest.sha256,
        etag=there.etag,
        stamp=stamp,
        videos=sums,
        attributes=header.attributes,
        shapes=header.shapes,
    )
    write_receipt(store, receipt)
    return receipt, sent


async def place_file(
    bucket: Bucket, name: str, content: PlainFile, progress: Progress | None = None
) -> tuple[str, bool]:
    """Send a file unless it is there; return its SHA-256 and whether it was sent.

    Raises:
        UnreachedError: the bucket does not take it.
        OSError: it cannot be read.
    """
    there = await bucket.found(name)
    if there is not None:
        digest = digest_of(content)
        if await bucket.holds(name, there, digest):
            return digest.sha256, False
    digest, _ = await bucket.put(name, content, progress)
    return digest.sha256, True


def _is_of(receipt: Receipt, bucket: Bucket, name: str, stamp: tuple[int, ...], there: Found) -> bool:
    """Return whether a receipt is of this very store, and of what is in the bucket."""
    return (receipt.url, receipt.stamp) == (str(bucket.url / name), stamp) and there == (
        receipt.n_bytes,
        receipt.etag,
    )


def remove_sent(store: Path, receipt: Receipt) -> None:
    """Remove an episode's store and camera videos that were sent; the receipt stays.

    Raises:
        StoreError: the store is not the one that was sent.
        OSError: it cannot be removed.
    """
    if signature_of(store) != receipt.stamp:
        raise StoreError(f"{store}: was changed since it was sent, expected it as it was; it stays")
    # First the receipt, so that the episode is known whatever ends the process on the way.
    write_receipt(store, replace(receipt, removed=True))
    if store.is_dir():
        # At once, then file by file: no reader sees half a store.
        old = _on_its_way_out(store)
        shutil.rmtree(old, ignore_errors=True)
        store.rename(old)
    else:
        store.unlink()
    remove_rest(store, receipt)


def remove_rest(store: Path, receipt: Receipt) -> None:
    """Remove what is left of an episode whose store is gone because it was sent.

    Raises:
        OSError: it cannot be removed.
    """
    old = _on_its_way_out(store)
    if old.exists():
        shutil.rmtree(old)
    for video in videos_of(store):
        if video.name in receipt.videos:
            video.unlink()
            remove_stills(video)


def _on_its_way_out(store: Path) -> Path:
    return store.with_name(unfinished(bare_name(store.name) + EPISODE_SUFFIX))


def videos_of(store: Path) -> list[Path]:
    """Return the camera videos beside a store."""
    return sorted(store.parent.glob(f"{glob.escape(bare_name(store.name))}.*.mp4"))
