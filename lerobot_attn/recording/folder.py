"""The folder that a run records into: one run's alone while it lasts, and never a mixture of two.

Knows stores and what they say of themselves. Knows neither policies nor rollouts.
"""

from __future__ import annotations

import glob
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lerobot_attn.errors import StoreError
from lerobot_attn.store.attributes import Header, read_header
from lerobot_attn.store.lock import claim_folder
from lerobot_attn.store.schema import EPISODE_SUFFIX

logger = logging.getLogger(__name__)

# What must be the same for episodes of two runs to be one run's.
_POLICY = ("type", "path", "dtype")
_CAPTURE = ("layers", "denoise_steps", "heads", "mean_layers", "prefix_layers", "keep_bits")
_ELSE = "choose another --output_dir or --eval.attention.dir"


class RunFolder:
    """A run's folder of stores, `{path}/{group}_{task_id}/episode_{index:05d}.zarr`.

    Args:
        path: the folder; it is made.
        existing: what to do where it holds episodes: "refuse"; "skip", keep those that are complete and
            record the others; or "overwrite", remove them all.

    Raises:
        StoreError: it holds episodes and they are refused, it is a file, or it cannot be written.
    """

    def __init__(self, path: Path, existing: str = "refuse"):
        self.path = path
        self._existing = existing
        if path.exists() and not path.is_dir():
            raise StoreError(
                f"{path}: is a file, expected a folder for the attention stores; remove or rename it"
            )
        found = next(iter(self._stores()), None)
        if found is not None and existing == "refuse":
            raise StoreError(
                f"{path}: already holds episodes (e.g. {found.parent.name}/{found.name}); expected a folder "
                f"without; {_ELSE}, or go on with --eval.attention.existing=skip, or overwrite"
            )
        probe = path / ".lerobot-attn-probe"
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise StoreError(f"{path}: cannot be written ({error.strerror}); {_ELSE}") from error

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other runs out while this one lasts; a killed run's claim ends with it.

        Raises:
            StoreError: another run records into the folder.
        """
        with claim_folder(self.path, f"{_ELSE}, or wait for it"):
            yield

    def settle(self, attributes: Mapping[str, Any], capture: Mapping[str, Any]) -> None:
        """Do with the episodes that are there what was asked for, before the first is recorded.

        Args:
            attributes: what every store of this run says of it; `policy` is compared.
            capture: this run's capture settings.

        Raises:
            StoreError: an episode that would be kept is of another policy or other settings, or one that
                would be overwritten cannot be removed.
        """
        stores = self._stores()
        if self._existing == "overwrite":
            for store in stores:
                remove_episode(store)
            if stores:
                logger.info("Removed %d episodes from %s (existing=overwrite)", len(stores), self.path)
            return
        for store in stores:
            episode = _complete(store)
            if episode is None:
                continue
            pairs = [("policy", name, attributes.get("policy", {}).get(name)) for name in _POLICY]
            pairs += [("capture", name, capture.get(name)) for name in _CAPTURE]
            for part, name, wanted in pairs:
                found = episode.attributes.get(part, {}).get(name)
                if found != wanted:
                    raise _mixture(store, f"{part} {name}", found, wanted)

    def kept(self, store: Path, seed: int | None) -> Header | None:
        """Return the complete episode that stands in an episode's place; an incomplete one is removed.

        Raises:
            StoreError: it was recorded with another seed, or cannot be removed.
        """
        if self._existing != "skip" or not store.exists():
            return None
        episode = _complete(store)
        if episode is None:
            logger.info("Recording %s/%s anew: it was incomplete", store.parent.name, store.name)
            remove_episode(store)
            return None
        if episode.attributes.get("seed") != seed:
            raise _mixture(store, "seed", episode.attributes.get("seed"), seed)
        return episode

    def _stores(self) -> list[Path]:
        return sorted(self.path.glob(f"*/episode_*{EPISODE_SUFFIX}")) if self.path.is_dir() else []


def remove_episode(store: Path) -> None:
    """Remove a store and the camera videos beside it.

    Raises:
        StoreError: it cannot be removed.
    """
    try:
        if store.is_dir() and not store.is_symlink():
            shutil.rmtree(store)
        else:
            store.unlink()
        for video in store.parent.glob(f"{glob.escape(store.stem)}.*.mp4"):
            video.unlink()
    except OSError as error:
        raise StoreError(f"{store}: cannot be removed ({error.strerror}); remove it by hand") from error


def _complete(store: Path) -> Header | None:
    try:
        episode = read_header(store)
    except StoreError:
        return None
    return episode if episode.is_complete else None


def _mixture(store: Path, what: str, found: Any, wanted: Any) -> StoreError:
    return StoreError(
        f"{store}: was recorded with {what} {found!r}, this run's is {wanted!r}; expected the same with "
        f"existing=skip; {_ELSE}, or existing=overwrite"
    )
