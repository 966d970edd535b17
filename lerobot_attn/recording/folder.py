"""The folder that a run records into: one run's alone while it lasts, and never a mixture of two.

Knows stores and what they say of themselves. Knows neither policies nor rollouts.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lerobot_attn.config import FLOAT16_MANTISSA_BITS, resolve_indices
from lerobot_attn.errors import ConfigError, StoreError
from lerobot_attn.recording.task_progress import FILE as PROGRESS
from lerobot_attn.sizes import folder_bytes
from lerobot_attn.store.attributes import Header, read_header
from lerobot_attn.store.index import Stamp, gather_parts, stamp_of_store
from lerobot_attn.store.location import (
    bare_name,
    is_episode_name,
    names_below,
    present_form,
    refuse_both_forms,
)
from lerobot_attn.store.lock import claim_folder
from lerobot_attn.store.receipts import receipt_of, receipt_path, removed_stores
from lerobot_attn.store.stills import remove_stills

logger = logging.getLogger(__name__)

# What must be the same for episodes of two runs to be one run's.
_POLICY = ("type", "path", "dtype")
_REPLAY = ("dataset", "videos", "frames", "every", "rename", "task")
_CAPTURE = (
    *("layers", "denoise_steps", "heads", "mean_layers", "prefix_layers", "vision_layers"),
    *("keep_bits", "neurons", "residuals", "record_full"),
)
# Of which number of the policy a setting chooses.
_COUNTS = {
    "layers": "n_layers",
    "mean_layers": "n_layers",
    "prefix_layers": "n_prefix_layers",
    "vision_layers": "n_vision_layers",
    "heads": "n_heads",
    "denoise_steps": "n_denoise_steps",
}
_STREAMS = {"vlm": "n_prefix_layers", "expert": "n_layers"}


@dataclass(frozen=True)
class Remedies:
    """What a person can do about a folder, in the words of what they started."""

    elsewhere: str = "choose another --output_dir or --eval.attention.dir"
    existing: str = "--eval.attention.existing="

    def __str__(self) -> str:
        return self.elsewhere


EVALUATION = Remedies()


class KeptEpisode(NamedTuple):
    """What counts of a complete episode that is kept.

    Attributes:
        seed: of its environment, as its store says it.
        eval_video: where the evaluation's own video of it lies; None: it made none.
        n_frames: frames that it has.
        n_inferences: inferences that it has.
        raw_bytes: size of its maps before compression.
    """

    seed: Any
    eval_video: Path | None
    n_frames: int
    n_inferences: int
    raw_bytes: int

    @classmethod
    def of(cls, store: Path, header: Header) -> KeptEpisode:
        """Return it of what a store says of itself."""
        path = _part(header.attributes, "eval_video").get("path")
        video = Path(os.path.normpath(store.parent / path)) if isinstance(path, str) else None
        sizes = header.n_frames, header.n_inferences, header.raw_bytes()
        return cls(header.attributes.get("seed"), video, *sizes)


class RunFolder:
    """A run's folder of stores, `{path}/{group}_{task_id}/episode_{index:05d}.zarr`.

    Args:
        path: the folder; it is made.
        existing: what to do where it holds episodes: "refuse"; "skip", keep those that are complete and
            record the others; or "overwrite", remove them all.
        remedies: what errors tell to do.

    Raises:
        StoreError: it holds episodes and they are refused, it is a file, or it cannot be written.
    """

    def __init__(self, path: Path, existing: str = "refuse", remedies: Remedies = EVALUATION):
        self.path = path
        self._existing = existing
        self._remedies = remedies
        # Each store is asked for several times: what it looked like when it was read, and what counts of it.
        self._known: dict[Path, tuple[Stamp, KeptEpisode]] = {}
        if path.exists() and not path.is_dir():
            raise StoreError(
                f"{path}: is a file, expected a folder for the attention stores; remove or rename it"
            )
        found = next(iter(self._stores()), None)
        if found is not None and existing == "refuse":
            raise StoreError(
                f"{path}: already holds episodes (e.g. {found.relative_to(path)}); expected a folder "
                f"without; {remedies}, or go on with {remedies.existing}skip, or overwrite"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Under no name, or a random one: nobody has claimed the folder yet, and another job may try the
            # same at this very moment.
            tempfile.TemporaryFile(dir=path, prefix=".lerobot-attn-probe-").close()
        except OSError as error:
            raise StoreError(f"{path}: cannot be written ({error.strerror}); {remedies}") from error

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other runs out while this one lasts; a killed run's claim ends with it.

        Raises:
            StoreError: another run records into the folder.
        """
        with claim_folder(self.path, f"{self._remedies}, or wait for it"):
            try:
                yield
            finally:
                gather_parts(self.path)

    def settle(self, attributes: Mapping[str, Any], capture: Mapping[str, Any]) -> None:
        """Do with the episodes that are there what was asked for, before the first is recorded.

        Args:
            attributes: what every store of this run says of it; `policy`, `replay` and `condition` are
                compared.
            capture: this run's capture settings.

        Raises:
            StoreError: an episode that would be kept is of another policy or other settings, or one that
                would be overwritten cannot be removed.
        """
        stores = self._stores()
        if self._existing == "overwrite":
            for store in stores:
                remove_episode(store)
            for folder in {store.parent for store in stores}:
                (folder / PROGRESS).unlink(missing_ok=True)
            if stores:
                logger.info("Removed %d episodes from %s (existing=overwrite)", len(stores), self.path)
            return
        for store in stores:
            refuse_both_forms(store)
            found = self._look(store)
            if found is None:
                continue
            theirs, ours = _part(found.attributes, "policy"), _part(attributes, "policy")
            for name in _POLICY:
                if theirs.get(name) != ours.get(name):
                    raise self._mixture(store, f"policy {name}", theirs.get(name), ours.get(name))
            replayed, replays = _part(found.attributes, "replay"), _part(attributes, "replay")
            for name in _REPLAY:
                if replayed.get(name) != replays.get(name):
                    raise self._mixture(store, f"replay {name}", replayed.get(name), replays.get(name))
            done, does = _condition(found.attributes), _condition(attributes)
            if done != does:
                raise self._mixture(store, "condition", *_told_apart(done, does))
            settings = _part(found.attributes, "capture")
            for name in _CAPTURE:
                if _meant(name, settings, theirs) != _meant(name, capture, ours):
                    raise self._mixture(store, f"capture {name}", settings.get(name), capture.get(name))

    def kept(self, store: Path, seed: int | None) -> KeptEpisode | None:
        """Return what counts of the complete episode in an episode's place; an incomplete one is removed.

        Raises:
            StoreError: it was recorded with another seed, or cannot be removed.
        """
        if self._existing != "skip":
            return None
        there = present_form(store)
        if there is not None:
            refuse_both_forms(there)
            store = there
        stamp, found = self._known.get(store, (None, None))
        if stamp is None or stamp != stamp_of_store(store):
            header = self._look(store)
            found = None if header is None else KeptEpisode.of(store, header)
        if found is None and there is None:
            return None
        if found is None:
            logger.info("Recording %s/%s anew: it was incomplete", store.parent.name, store.name)
            remove_episode(store)
            return None
        if found.seed != seed:
            raise self._mixture(store, "seed", found.seed, seed)
        return found

    def _look(self, store: Path) -> Header | None:
        """Return what a complete store says of itself, and remember what counts of it."""
        stamp, found = stamp_of_store(store), _complete(store)
        if found is not None and stamp is not None:  # another one may come into its place
            self._known[store] = stamp, KeptEpisode.of(store, found)
        return found

    def _stores(self) -> list[Path]:
        """Return the stores at any depth: older versions nested a namespaced environment's folders."""
        found = [
            folder / name
            for folder, names in names_below(self.path)
            for name in names
            if name.startswith("episode_") and is_episode_name(name)
        ]
        found += removed_stores(self.path)  # which are in a bucket
        return sorted(store for store in found if store.parent != self.path)

    def _mixture(self, store: Path, what: str, found: Any, wanted: Any) -> StoreError:
        return StoreError(
            f"{store}: was recorded with {what} {found!r}, this run's is {wanted!r}; expected the same with "
            f"existing=skip; {self._remedies}, or existing=overwrite"
        )


def task_folder(group: str, task_id: int) -> str:
    """Return the name of a task's folder, one level deep also where the group's name holds slashes."""
    return f"{group}_{task_id}".replace("/", "~").replace("\\", "~")


def remove_episode(store: Path) -> None:
    """Remove a store, and the camera videos and the receipt beside it.

    Raises:
        StoreError: it cannot be removed.
    """
    try:
        if store.is_dir() and not store.is_symlink():
            shutil.rmtree(store)
        else:
            store.unlink(missing_ok=True)  # one that was sent to a bucket and removed has a receipt
        receipt_path(store).unlink(missing_ok=True)
        for video in store.parent.glob(f"{glob.escape(bare_name(store.name))}.*.mp4"):
            video.unlink()
            remove_stills(video)
    except OSError as error:
        raise StoreError(f"{store}: cannot be removed ({error.strerror}); remove it by hand") from error


def stored_bytes(store: Path) -> int:
    """Return the size of an episode's store, packed or not, bytes; also while it is sent and removed."""
    there = present_form(store)
    if there is not None:
        with suppress(OSError):
            return folder_bytes(there)
    receipt = receipt_of(store)
    return 0 if receipt is None else receipt.n_bytes


def _complete(store: Path) -> Header | None:
    """Return what a complete store says of itself; None of one that is not there, cut off or damaged.

    Of one that was sent to a bucket and removed here, its receipt says the same.
    """
    if present_form(store) is None:
        receipt = receipt_of(store)
        return receipt.header if receipt is not None and receipt.removed else None
    try:
        found = read_header(store)
    except StoreError:
        return None
    return found if found.is_complete else None


def _part(attributes: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = attributes.get(name)
    return part if isinstance(part, Mapping) else {}


def _condition(attributes: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name of what was done to the policy, and what it was; untouched it is the baseline."""
    condition = _part(attributes, "condition")
    return str(condition.get("name", "baseline")), list(condition.get("interventions", ()))


def _told_apart(done: tuple[str, Any], does: tuple[str, Any]) -> tuple[Any, Any]:
    """Return the names of two conditions, or what they do where the names are the same."""
    return (done[0], does[0]) if done[0] != does[0] else (done[1], does[1])


def _meant(name: str, settings: Mapping[str, Any], policy: Mapping[str, Any]) -> Any:
    """Return what a setting means for a policy, so that two ways to say the same are equal."""
    value = settings.get(name)
    if name in ("neurons", "residuals"):
        return {
            stream: _indices(f"{stream} layer", layers, policy.get(_STREAMS[stream]))
            for stream, layers in (value or {}).items()
        }
    if name == "record_full":
        return bool(value)  # of a store from before it could be: no
    if name == "keep_bits":
        return None if value is None or value >= FLOAT16_MANTISSA_BITS else value
    if name == "mean_layers" and value == "auto":
        value = settings.get("layers")
    if value == "none" or (name == "vision_layers" and value is None):  # of a store from before they could be
        return ()
    return _indices(name, value, policy.get(_COUNTS[name]))


def _indices(name: str, value: Any, count: Any) -> Any:
    """Return what a choice means where there are so many to choose from, or the choice if that fails."""
    if isinstance(count, int) and isinstance(value, list | str):
        with suppress(ConfigError, TypeError):
            return resolve_indices(name, value, count)
    return value
