"""A run sent to a bucket, or what of it is missing there.

    for done in upload("outputs/eval", "s3://bucket/eval"):
        print(done.line)

Each episode goes packed, so that it is there whole or not at all. Knows runs and buckets. Knows nothing of
recordings that go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lerobot_attn.errors import StoreError, first_line
from lerobot_attn.sizes import Progress, format_bytes
from lerobot_attn.store.bucket import Bucket, UnreachedError, writable
from lerobot_attn.store.evaluation import ATTENTION, film_to_send, infos_of, send_film, send_info
from lerobot_attn.store.location import on_this_machine
from lerobot_attn.store.lock import LOCK, claim_folder
from lerobot_attn.store.receipts import Receipt, receipt_of, removed_stores
from lerobot_attn.store.runs import open_run
from lerobot_attn.store.sending import remove_rest, remove_sent, send_episode
from lerobot_attn.store.url import place_of

_WAITS_S = (1.0, 2.0, 4.0, 8.0)  # between tries


@dataclass(frozen=True)
class Uploaded:
    """What became of one episode.

    Attributes:
        path: the store.
        url: where it is.
        n_bytes: of the packed store.
        sent: whether it had to be sent; otherwise it was there.
        refused: why it was not sent, in one line; None where it was.
    """

    path: Path
    url: str = ""
    n_bytes: int = 0
    sent: bool = False
    refused: str | None = None

    @property
    def line(self) -> str:
        """What became of it, in one line."""
        if self.refused is not None:
            return self.refused
        return f"{self.url}: {format_bytes(self.n_bytes)}{'' if self.sent else ', was there'}"


def upload(
    path: str | Path,
    url: str,
    *,
    keep_local: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Iterator[Uploaded]:
    """Send the complete episodes of a run to a bucket, with all videos of them; what is there stays.

    A run's episodes lie in the bucket's folder as in the run's `attention` folder: `URL/{task}/episode_*`, as
    a recording with `upload` sends them. The evaluation's own videos of them go to `URL/videos/{task}`, and
    of a whole run its `eval_info.json`; both stay here. A request that fails is tried again four times.

    Args:
        path: a run's output folder, a task's folder, or an episode.
        url: the bucket's folder, s3://, gs:// or az://. Credentials come from the environment alone.
        keep_local: otherwise an episode is removed here once its checksum was compared; a receipt stays.
        overwrite: replace other recordings of the same names.
        progress: called as `progress(done, total)` with the bytes of an episode.

    Yields:
        What became of each episode, as it is done, and of each eval_info.json. Of episodes that were sent and
        removed before nothing, unless the evaluation's video of one is sent only now.

    Raises:
        StoreError: nothing there; the bucket does not take it, and the same call goes on; a recording goes on
            in the folder, and local copies are to be removed.
        SetupError: the extra `remote` is not installed.
    """
    local = on_this_machine(place_of(path), "a URL is sent from nowhere")
    bucket = Bucket(writable(url))
    removed = [*removed_stores(local)] if local.is_dir() else []
    for store in removed:
        receipt = receipt_of(store)
        if receipt is not None:
            remove_rest(store, receipt)  # of a process that was killed
    stores = [] if removed and not _holds_stores(local) else open_run(local).stores
    here = [on_this_machine(store, "a URL is sent from nowhere") for store in stores]
    root, n_done = _root_of(local, [*removed, *here]), 0
    episodes = set(here)
    jobs: list[tuple[Path, _Send]] = []
    for store in here:
        inside = _inside(store.parent, root)
        jobs.append((store, partial(_send_episode, store, bucket, inside, keep_local, overwrite, progress)))
    jobs += [
        (store, partial(_send_film, store, receipt, bucket, _inside(store.parent, root), progress))
        for store in removed
        if (receipt := receipt_of(store)) and film_to_send(store, receipt)
    ]
    if root in (local.absolute(), local.absolute() / ATTENTION):  # neither an episode nor a task
        folders = {store.absolute().parent.parent for store in (*removed, *here)}
        jobs += [
            (info, partial(_send_info, info, bucket, _inside(place, root), overwrite, progress))
            for info, place in infos_of(local.absolute(), folders)
        ]
    with ExitStack() as claimed:
        if not keep_local:
            for folder in sorted({store.resolve().parent.parent for store in here}):
                if (folder / LOCK).exists():
                    claimed.enter_context(claim_folder(folder, "upload when it has ended"))
        for path, send in jobs:
            try:
                done = asyncio.run(_tried(send))
            except UnreachedError as error:
                raise StoreError(
                    f"{error}; {n_done} of {len(episodes)} episodes are there, the same call goes on"
                ) from error
            except OSError as error:
                yield Uploaded(path, refused=first_line(error))
                continue
            n_done += path in episodes
            yield done


type _Send = Callable[[], Coroutine[Any, Any, Uploaded]]


async def _tried(send: _Send) -> Uploaded:
    for wait_s in (*_WAITS_S, None):
        try:
            return await send()
        except UnreachedError:
            if wait_s is None:
                raise
            await asyncio.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


async def _send_episode(
    store: Path, bucket: Bucket, folder: str, keep_local: bool, overwrite: bool, progress: Progress | None
) -> Uploaded:
    receipt, sent = await send_episode(store, bucket, folder, overwrite=overwrite, progress=progress)
    receipt, n_bytes = await send_film(store, receipt, bucket, folder, progress=progress)
    if not keep_local:
        remove_sent(store, receipt)
    return Uploaded(store, receipt.url, receipt.n_bytes, sent or n_bytes > 0)


async def _send_film(
    store: Path, receipt: Receipt, bucket: Bucket, folder: str, progress: Progress | None
) -> Uploaded:
    receipt, n_bytes = await send_film(store, receipt, bucket, folder, progress=progress)
    return Uploaded(store, f"{receipt.url}, its video", n_bytes, n_bytes > 0)


async def _send_info(
    info: Path, bucket: Bucket, folder: str, overwrite: bool, progress: Progress | None
) -> Uploaded:
    receipt, sent = await send_info(info, bucket, folder, overwrite=overwrite, progress=progress)
    return Uploaded(info, receipt.url, receipt.n_bytes, sent)


def _inside(folder: Path, root: Path) -> str:
    """Return a folder's name in the bucket's folder; "" of the root, and of what lies above it."""
    folder = folder.absolute()
    inside = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else "."
    return "" if inside == "." else inside


def _root_of(path: Path, stores: list[Path]) -> Path:
    """Return the folder whose paths the bucket's folder has."""
    path = path.absolute()
    above = [store.absolute() for store in stores]
    if above == [path]:  # an episode
        return path.parent.parent
    if all(store.is_relative_to(path / ATTENTION) for store in above):
        return path / ATTENTION
    return path.parent if all(store.parent == path for store in above) else path


def _holds_stores(folder: Path) -> bool:
    try:
        return bool(open_run(folder).stores)
    except StoreError:
        return False
