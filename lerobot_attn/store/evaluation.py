"""What an evaluation leaves beside its episodes, on its way to a bucket: its own videos and eval_info.json.

    receipt, n_bytes = await send_film(store, receipt, bucket, "libero_object_0")
    receipt, sent = await send_info(Path("outputs/eval/eval_info.json"), bucket, "")

LeRobot counts the videos of each of its calls from 0. In the bucket a video has the number of its episode, so
that the parts of a task, or a job that went on, do not meet there. Nothing here is changed but receipts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from lerobot_attn.errors import StoreError
from lerobot_attn.sizes import Progress
from lerobot_attn.store.bucket import Bucket, Found, PlainFile, digest_of
from lerobot_attn.store.location import bare_name
from lerobot_attn.store.packed import stamp_of
from lerobot_attn.store.receipts import Receipt, receipt_of, sent_stores, write_receipt
from lerobot_attn.store.references import film_of
from lerobot_attn.store.sending import place_file

EVAL_INFO = "eval_info.json"
ATTENTION = "attention"  # the folder of an evaluation's stores, in its output folder


def film_to_send(store: Path, receipt: Receipt) -> Path | None:
    """Return the evaluation's video of an episode that is in a bucket; None where there is none to send.

    Args:
        store: where the episode lies, or lay before it was removed.
        receipt: of it.
    """
    return None if _film_name(store) in receipt.videos else film_of(store, receipt.attributes)


def films_to_send(folder: Path, bucket: Bucket) -> Iterator[tuple[Path, Receipt]]:
    """Yield the episodes of a folder that are in a bucket while the evaluation's videos of them are not."""
    for store, receipt in sent_stores(folder):
        if receipt.url.startswith(f"{bucket.url}/") and film_to_send(store, receipt) is not None:
            yield store, receipt


async def send_film(
    store: Path, receipt: Receipt, bucket: Bucket, folder: str, *, progress: Progress | None = None
) -> tuple[Receipt, int]:
    """Send the evaluation's video of an episode that was sent, if there is one, and note it in the receipt.

    Args:
        store: where the episode lies, or lay before it was removed.
        receipt: of it.
        bucket: where to.
        folder: in which of its folders the episode is; the video goes into `videos/…` beside that.
        progress: called as `progress(done, total)` with bytes.

    Returns:
        The receipt as it is now, and the bytes that had to be sent.

    Raises:
        UnreachedError: the bucket does not take it.
        OSError: it cannot be read.
    """
    film = film_to_send(store, receipt)
    if film is None:
        return receipt, 0
    above, _, task = folder.rpartition("/")
    name = "/".join(part for part in (above, "videos", task, _film_name(store)) if part)
    content = PlainFile(film)
    sha256, sent = await place_file(bucket, name, content, progress)
    receipt = replace(receipt, videos={**receipt.videos, _film_name(store): sha256})
    write_receipt(store, receipt)
    return receipt, content.size if sent else 0


def infos_of(path: Path, folders: Collection[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield a run's eval_info.json and those of the evaluations in it, and beside which folders they belong.

    Args:
        path: the run's folder.
        folders: those that hold the tasks' folders.

    Yields:
        The file, and the folder in whose place in the bucket it belongs.
    """
    seen = set[Path]()
    # Beside `attention` lies that of its own evaluation, which stands in the bucket beside the tasks.
    for folder, file in [
        *((folder, folder.parent / EVAL_INFO) for folder in sorted(folders) if folder.name == ATTENTION),
        (path, path / EVAL_INFO),
    ]:
        if file not in seen and file.is_file() and not file.is_symlink():
            seen.add(file)
            yield file, folder


async def send_info(
    info: Path, bucket: Bucket, folder: str, *, overwrite: bool = False, progress: Progress | None = None
) -> tuple[Receipt, bool]:
    """Send an eval_info.json, and leave a receipt beside it.

    Where that of another evaluation is in its place (jobs that share an address), it is called
    `eval_info.NAME.json`, after the folder that it lies in.

    Args:
        info: the file.
        bucket: where to.
        folder: in which of its folders; "" for none.
        overwrite: replace another one that is called after the same folder.
        progress: called as `progress(done, total)` with bytes.

    Returns:
        The receipt, and whether it had to be sent.

    Raises:
        UnreachedError: the bucket does not take it.
        StoreError: both names are taken.
        OSError: it cannot be read.
    """
    content, stamp, before = PlainFile(info), stamp_of(info.stat()), receipt_of(info)
    digest = digest_of(content)
    plain, own = (
        f"{folder}/{name}".strip("/") for name in (EVAL_INFO, f"eval_info.{info.absolute().parent.name}.json")
    )
    was_own = before is not None and before.url == str(bucket.url / own)
    for name in (own,) if was_own else (plain, own):
        there = await bucket.found(name)
        if there is not None and await bucket.holds(name, there, digest):
            sent = False
            break
        # What was sent from here before is replaced.
        known = (str(bucket.url / name), there)
        is_ours = before is not None and known == (before.url, Found(before.n_bytes, before.etag))
        if there is None or is_ours or (overwrite and name == own):
            digest, there = await bucket.put(name, content, progress)
            sent = True
            break
    else:
        raise StoreError(
            f"{bucket.url / own}: holds that of another evaluation, expected this one's or none; send it to "
            "another place, or replace it with `lerobot-attn upload --overwrite`"
        )
    receipt = Receipt(
        url=str(bucket.url / name), n_bytes=content.size, sha256=digest.sha256, etag=there.etag, stamp=stamp
    )
    write_receipt(info, receipt)
    return receipt, sent


def _film_name(store: Path) -> str:
    return f"{bare_name(store.name)}.mp4"
