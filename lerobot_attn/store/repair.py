"""Make a damaged or incomplete store consistent by dropping what is damaged, and say what was dropped.

    for store in repair("outputs/eval", dry_run=True):
        for line in store.lines(done=False):
            print(line)

A damaged chunk of maps, or of a table that can say "not there", is replaced by missing values (NaN). Where a
damaged chunk cannot say so (token ids, which inference gave a frame's action, …), what it covered and all
that came after it is cut off: nothing is guessed. Both are listed in the group's attribute `repaired`. What
is not damaged stays as it is, bit for bit.

Why by chunk, and not by cutting before the first damage: one flipped byte in the first inference's map would
cost the whole episode, though every other map is whole. Most of a store is maps, so most damage falls there.

Each file is written beside the old one and renamed, and each step leaves a store that opens; a repair that
was killed is finished by the next one. What a cut leaves behind stays on the disk, and no reader looks at it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_attn.errors import StoreError, first_line
from lerobot_attn.sizes import Progress
from lerobot_attn.store.attributes import is_store
from lerobot_attn.store.chunks import Grid, StoredArray, stored_arrays
from lerobot_attn.store.copies import COPIES, copies_of
from lerobot_attn.store.damage import (
    REPAIRED,
    Damage,
    find_damage,
    metadata_of,
)
from lerobot_attn.store.files import first_link, replace_json, unfinished
from lerobot_attn.store.location import is_episode_name, is_packed, on_this_machine
from lerobot_attn.store.lock import LOCK, claim_folder
from lerobot_attn.store.reader import Episode, open_episode
from lerobot_attn.store.runs import open_run
from lerobot_attn.store.schema import METADATA
from lerobot_attn.store.url import Place, place_of


@dataclass(frozen=True)
class Repair:
    """What a repair drops from one store.

    Attributes:
        path: the store.
        missing: chunks that become missing values.
        cut_by: what forces the episode to be cut.
        n_inferences: how many there were, and how many are left.
        n_frames: likewise.
        rewritten: metadata of arrays that is written anew from the group's copy of it.
        refused: why the store cannot be repaired; nothing of it is touched then.
    """

    path: Path
    missing: tuple[Damage, ...] = ()
    cut_by: tuple[Damage, ...] = ()
    n_inferences: tuple[int, int] = (0, 0)
    n_frames: tuple[int, int] = (0, 0)
    rewritten: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def changes_nothing(self) -> bool:
        """Whether there is nothing to repair."""
        return not (self.missing or self.cut_by or self.rewritten)

    def lines(self, *, done: bool) -> Iterator[str]:
        """Yield what is dropped, in words.

        Args:
            done: whether it was done, or would be.
        """
        if self.refused is not None:
            yield self.refused
            return
        if self.changes_nothing:
            yield f"{self.path}: nothing to repair"
            return
        yield f"{self.path}: {'repaired' if done else 'would be repaired'}"
        for damage in self.missing:
            yield f"  {'dropped' if done else 'would drop'} {damage}"
        if self.cut_by:
            inferences = f"{self.n_inferences[1]} of {self.n_inferences[0]} inferences"
            frames = f"{self.n_frames[1]} of {self.n_frames[0]} frames"
            yield f"  {'cut' if done else 'would cut'} the episode to {inferences} and {frames}, because of"
            for damage in self.cut_by:
                yield f"    {damage}"
        for name in self.rewritten:
            yield f"  {'wrote' if done else 'would write'} {name} anew"


def repair(
    path: str | Path, *, dry_run: bool = False, progress: Progress | None = None
) -> tuple[Repair, ...]:
    """Make an episode, or every episode of a task's folder or a run, consistent.

    Args:
        path: an episode's store, a task's folder or a run's output folder.
        dry_run: change nothing, and say what would be.
        progress: called as `progress(done, total)` with the chunks read of a store.

    Returns:
        What was dropped, for each store.

    Raises:
        StoreError: nothing there, a recording is going on in the folder, or (of a single episode; among
            several it is noted) the store cannot be repaired.
    """
    path = _here(place_of(path))
    if is_episode_name(path.name) or is_store(path):
        return (_repair_store(path, dry_run, progress),)
    repairs = []
    for store in map(_here, open_run(path).stores):
        try:
            repairs.append(_repair_store(store, dry_run, progress))
        except StoreError as error:
            repairs.append(Repair(store, refused=str(error)))
    return tuple(repairs)


def _here(place: Place) -> Path:
    return on_this_machine(place, "a URL is read-only, so nothing is repaired there")


def _repair_store(path: Path, dry_run: bool, progress: Progress | None) -> Repair:
    if is_packed(path):
        raise StoreError(
            f"{path}: is packed, expected a folder; unpack it (lerobot-attn unpack), then repair"
        )
    with ExitStack() as stack:
        # Where nothing was ever recorded there is no lock, and none is made: it may be anybody's folder.
        folder = path.resolve().parent.parent
        if (folder / LOCK).exists():
            try:
                stack.enter_context(claim_folder(folder))
            except StoreError as error:
                raise StoreError(
                    f"{path}: cannot be repaired now, expected that no recording goes on in {folder}; repair "
                    f"it when it has ended ({error})"
                ) from error
        try:
            episode = open_episode(path)
        except StoreError as error:
            if not (path / "token_id").is_dir():
                raise
            raise StoreError(
                f"{error}; not repaired and not touched: what the group's {METADATA} says is nowhere else; "
                "single arrays can be read with zarr.open_array(store / name)"
            ) from error
        plan = _plan(episode, progress)
        if not (dry_run or plan.changes_nothing):
            try:
                _apply(episode, plan)
            except OSError as error:
                raise StoreError(
                    f"{path}: the repair could not be finished ({error.strerror or first_line(error)}), "
                    "expected a disk with room that can be written; the store still opens; repair it again"
                ) from error
    return plan


def _plan(episode: Episode, progress: Progress | None) -> Repair:
    """Decide what to drop.

    Raises:
        StoreError: something is damaged that neither can be dropped nor follows from anything else.
    """
    path = _here(episode.path)
    report = find_damage(path, progress)
    arrays = stored_arrays(episode)
    missing, cut_by = [], []
    rewritten = [f"{name}/{METADATA}" for name, array in arrays.items() if metadata_of(array).kind == "ahead"]
    for damage in report.damaged:
        array = arrays[damage.array]
        if damage.kind == "copy":
            rewritten.append(METADATA)
        elif damage.kind == "metadata":
            rewritten.append(f"{damage.array}/{METADATA}")
        elif damage.kind in ("conflict", "unreadable") or array.spec is None:
            raise _irreparable(path, damage)
        elif array.can_miss_values:
            missing.append(damage)
        elif array.grows_with:
            cut_by.append(damage)
        else:
            raise _irreparable(path, damage)
    n_inferences, n_frames = _cut(episode, arrays, cut_by)
    left = {"inference": n_inferences, "frame": n_frames}
    plan = Repair(
        path,
        # What lies beyond a cut goes with it.
        tuple(d for d in missing if _first_row(arrays[d.array], d) < left[str(arrays[d.array].grows_with)]),
        tuple(cut_by),
        (episode.n_inferences, n_inferences),
        (episode.n_frames, n_frames),
        tuple(dict.fromkeys(rewritten)),
    )
    if not plan.changes_nothing:
        _refuse_links(path)
    return plan


def _refuse_links(path: Path) -> None:
    """Raise StoreError if a part of the store lies elsewhere: what is there is not ours to change."""
    link = first_link(path)
    if link is not None:
        raise StoreError(
            f"{path}: {link.relative_to(path)} is a link, expected plain files; not repaired; put what "
            "it leads to in its place"
        )


def _cut(episode: Episode, arrays: Mapping[str, StoredArray], cut_by: Sequence[Damage]) -> tuple[int, int]:
    """Return how many inferences and frames are left; every frame has its inference."""
    left = {"inference": episode.n_inferences, "frame": episode.n_frames}
    for damage in cut_by:
        array = arrays[damage.array]
        dim = str(array.grows_with)
        left[dim] = min(left[dim], _first_row(array, damage))
    owners = np.asarray(arrays["frame_inference"].array[: left["frame"]])
    orphans = np.flatnonzero(owners >= left["inference"])
    return left["inference"], int(orphans[0]) if len(orphans) else left["frame"]


def _first_row(array: StoredArray, damage: Damage) -> int:
    return int(array.selection(damage.chunk[:1])[0].start)


def _apply(episode: Episode, plan: Repair) -> None:
    """Drop what was planned: chunks first, then the group's metadata says so, then that of arrays."""
    path, arrays = _here(episode.path), stored_arrays(episode)
    by_file: dict[Path, list[Damage]] = defaultdict(list)
    for damage in plan.missing:
        by_file[arrays[damage.array].file_of(damage.chunk)].append(damage)
    document = json.loads((path / METADATA).read_text(encoding="utf-8"))
    if document["consolidated_metadata"].pop(COPIES, None) is not None:
        replace_json(path / METADATA, document, durable=True)  # no copy outlives its file, whatever comes
    for file, damages in by_file.items():
        array = arrays[damages[0].array]
        if array.is_sharded and damages[0].kind == "chunk":
            _drop_from_shard(array, file, [damage.chunk for damage in damages])
        else:
            file.unlink(missing_ok=True)
    described = document["consolidated_metadata"]["metadata"]
    _say_so(document["attributes"], plan)
    left = {"inference": plan.n_inferences[1], "frame": plan.n_frames[1]}
    stale = {name for name in described if f"{name}/{METADATA}" in plan.rewritten}
    for name, array in arrays.items():
        if array.grows_with and described[name]["shape"][0] != left[array.grows_with]:
            described[name]["shape"][0] = left[array.grows_with]
            stale.add(name)
    document["consolidated_metadata"][COPIES] = copies_of(path, described)
    replace_json(path / METADATA, document, durable=True)
    for name in stale:
        (path / name).mkdir(exist_ok=True)
        replace_json(path / name / METADATA, described[name], durable=True)


def _say_so(attributes: dict[str, Any], plan: Repair) -> None:
    """Change the group's attributes as planned."""
    attributes["n_inferences"], attributes["n_frames"] = plan.n_inferences[1], plan.n_frames[1]
    entries = [damage.to_dict() for damage in plan.missing]
    if plan.cut_by:
        cut_to = {"inferences": plan.n_inferences[1], "frames": plan.n_frames[1]}
        entries += [{**damage.to_dict(), "cut_to": cut_to} for damage in plan.cut_by]
        attributes["complete"] = False
    if entries:
        before = attributes.get(REPAIRED)
        attributes[REPAIRED] = [*(before if isinstance(before, list) else []), *entries]


def _drop_from_shard(array: StoredArray, file: Path, chunks: Sequence[Grid]) -> None:
    """Take chunks out of a shard's index; every other byte of the shard stays where it is."""
    temporary = file.with_name(unfinished(file.name))
    shutil.copyfile(file, temporary)
    with temporary.open("r+b") as shard:
        index = array.index_of_shard(shard)
        for chunk in chunks:
            inside = [i % n for i, n in zip(chunk, array.n_inside, strict=False)]
            index.drop((*inside, *[0] * (len(array.n_inside) - len(inside))))
        shard.seek(index.start)
        shard.write(index.encoded())
        shard.flush()
        os.fsync(shard.fileno())
    temporary.replace(file)


def _irreparable(path: Path, damage: Damage) -> StoreError:
    why = {
        "conflict": "which of the two is right cannot be told",
        "unreadable": "it may be whole: copy the store to another disk and try again",
    }.get(damage.kind, "all of the episode needs it, so it can neither be dropped nor cut off")
    return StoreError(
        f"{path}: {damage}; it cannot be repaired, {why}; nothing was touched, and the other arrays can "
        f"be read with zarr.open_group(store)[name]"
    )
