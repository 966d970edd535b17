"""What of an episode's store cannot be read as it was written, with the coordinates of each chunk.

    report = find_damage("….zarr")
    [str(damage) for damage in report.damaged]
    # ['suffix_attention: inference 7, denoise_step 3, layer 17 (chunk 7/3/1): its checksum does not match']

Reads every chunk once, one at a time, and changes nothing; `lerobot_attn.store.repair` does. A flipped byte
is noticed by the checksum of its chunk; arrays of older stores that carry none are named in the report.
The group's own attributes carry no checksum. Files that no reader looks at, as a killed recording leaves
them, are no damage.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from lerobot_attn.errors import StoreError, first_line
from lerobot_attn.sizes import Progress
from lerobot_attn.store.chunks import Grid, StoredArray, stored_arrays
from lerobot_attn.store.copies import copies_in
from lerobot_attn.store.location import files_at
from lerobot_attn.store.reader import Episode, open_episode
from lerobot_attn.store.schema import BY_NAME, DIMENSIONS, METADATA
from lerobot_attn.store.url import Place

REPAIRED = "repaired"  # the attribute that lists what a repair dropped
# A store whose every map is damaged lists 5040 with all layers of Pi0.5 and 28 inferences.
_MAX_LISTED = 100_000

Kind = Literal["chunk", "shard", "metadata", "conflict", "copy", "unreadable"]


@dataclass(frozen=True)
class Damage:
    """One thing that is damaged.

    Attributes:
        kind: "chunk" or "shard" of an array; its "metadata" is not there; a "conflict" of two copies of it;
            a "copy" of a file in the group's metadata is of something else;
            "unreadable" where the file system refused, which may pass.
        array: its name.
        chunk: the chunk's index along the leading dimensions; those that one chunk covers are left out.
        at: dimension → label; (first, last) where a chunk covers several. Empty: the whole array.
        reason: what is wrong, in one line.
    """

    kind: Kind
    array: str
    chunk: Grid
    at: Mapping[str, int | str | tuple[int, int]]
    reason: str

    def __str__(self) -> str:
        """Say what is damaged where, and how."""
        return f"{self.array}: {self.place}: {self.reason}"

    @property
    def place(self) -> str:
        """Where in the array, in words."""
        if self.kind in ("metadata", "conflict", "copy"):
            return METADATA
        words = [
            f"{dim} {label[0]} to {label[1]}" if isinstance(label, tuple) else f"{dim} {label}"
            for dim, label in self.at.items()
        ]
        what = self.kind if self.kind in ("chunk", "shard") else "file"
        number = f" ({what} {'/'.join(map(str, self.chunk))})" if self.chunk else ""
        return f"{', '.join(words) or 'the whole array'}{number}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        at = {dim: list(label) if isinstance(label, tuple) else label for dim, label in self.at.items()}
        return {"array": self.array, "chunk": list(self.chunk), "at": at, "reason": self.reason}


class MetadataState(NamedTuple):
    """How an array's own metadata agrees with the group's copy of it.

    Attributes:
        kind: that of the damage; "ahead" where it admits to rows that were not committed before a recording
            or a repair was killed, which is no damage; None where they are the same.
        reason: what is wrong, in one line; "" if nothing is.
    """

    kind: Kind | Literal["ahead"] | None
    reason: str


@dataclass(frozen=True)
class DamageReport:
    """What `find_damage` found.

    Attributes:
        path: the store.
        damaged: what cannot be read as it was written.
        n_chunks: chunks that were looked for.
        n_missing: of these, what an earlier repair replaced by missing values; no damage any more.
        without_checksums: arrays in which a changed byte may go unnoticed, of a store by an older version.
    """

    path: Place
    damaged: tuple[Damage, ...]
    n_chunks: int
    n_missing: int
    without_checksums: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether everything that the store says it holds is there and whole."""
        return not self.damaged


def find_damage(path: str | Place, progress: Progress | None = None) -> DamageReport:
    """Read every chunk of every array of a store, and compare the two copies of each array's metadata.

    Args:
        path: the store's folder, `….zarr`, or its file where it is packed.
        progress: called as `progress(done, total)` with the chunks read.

    Raises:
        StoreError: the store cannot be opened: its own metadata is missing or damaged, or its schema newer.
    """
    episode = open_episode(path)
    arrays = stored_arrays(episode)
    scan = _Scan(episode, arrays, progress)
    for array in arrays.values():
        kind, reason = metadata_of(array)
        if kind is not None and kind != "ahead":
            scan.damaged.append(Damage(kind, array.name, (), {}, reason))
        scan.read(array)
    return DamageReport(
        episode.path,
        tuple(scan.damaged),
        scan.n_read,
        scan.n_missing,
        tuple(name for name, array in arrays.items() if not array.has_checksums),
    )


def missing_chunks(episode: Episode) -> frozenset[tuple[str, Grid]]:
    """Return array and leading chunk index of what a repair replaced by missing values."""
    entries = episode.attributes.get(REPAIRED)
    found = set()
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and "cut_to" not in entry:
            name, chunk = entry.get("array"), entry.get("chunk")
            if isinstance(name, str) and isinstance(chunk, list) and all(type(i) is int for i in chunk):
                found.add((name, tuple(chunk)))
    return frozenset(found)


def was_cut(episode: Episode) -> bool:
    """Return whether a repair cut the episode, so that its videos show more than the store holds."""
    entries = episode.attributes.get(REPAIRED)
    return isinstance(entries, list) and any(isinstance(e, dict) and "cut_to" in e for e in entries)


def is_missing(missing: frozenset[tuple[str, Grid]], name: str, chunk: Sequence[int]) -> bool:
    """Return whether a repair dropped a chunk, or the whole shard that it was in.

    Args:
        missing: from `missing_chunks`.
        name: the array's.
        chunk: its index, or the leading part of it.
    """
    return any((name, tuple(chunk[:n])) in missing for n in range(len(chunk) + 1))


class _Scan:
    """Reads arrays chunk by chunk, and notes what is damaged.

    Attributes:
        damaged: what cannot be read.
        n_read: chunks looked for.
        n_missing: of these, known to be missing.
    """

    def __init__(self, episode: Episode, arrays: Mapping[str, StoredArray], progress: Progress | None):
        self.damaged: list[Damage] = []
        self.n_read, self.n_missing = 0, 0
        self._path = episode.path
        self._missing = missing_chunks(episode)
        self._labels = _labels(arrays)
        copies = copies_in(json.loads(files_at(episode.path).read(METADATA)))
        self._copies = {**copies.files, **copies.ends}
        self._total = sum(array.n_chunks for array in arrays.values())
        self._progress = progress

    def read(self, array: StoredArray) -> None:
        for index in np.ndindex(array.n_files):
            before = self.n_read
            if array.is_sharded:
                self._read_shard(array, index)
            else:
                self._read_chunk(array, index)
            self.n_read = before + math.prod(array.n_inside)
            if len(self.damaged) > _MAX_LISTED:
                raise StoreError(f"{self._path}: more than {_MAX_LISTED} chunks are damaged")
            self._tick()

    def _read_shard(self, array: StoredArray, index: Grid) -> None:
        try:
            with array.open_file(index) as file:
                entries = array.index_of_shard(file)
        except FileNotFoundError:
            self._absent(array, "shard", index[:1], "its file is missing")
        except OSError as error:
            self._note("unreadable", array, index[:1], f"the file system cannot read it: {error.strerror}")
        except ValueError as error:
            self._note("shard", array, index[:1], str(error))
        else:
            n_damaged = len(self.damaged)
            for inside in np.ndindex(array.n_inside):
                chunk = tuple(i * n + j for i, n, j in zip(index, array.n_inside, inside, strict=True))
                if entries.holds(inside):
                    self._decode(array, chunk)
                else:
                    self._absent(array, "chunk", chunk, "it is missing from its shard")
                self.n_read += 1
                self._tick()
            if n_damaged == len(self.damaged):
                self._compare(array, index, entries.encoded())

    def _read_chunk(self, array: StoredArray, index: Grid) -> None:
        if array.is_there(index):
            n_damaged = len(self.damaged)
            self._decode(array, index)
            if n_damaged == len(self.damaged) and array.file_name(index) in self._copies:
                with array.open_file(index) as file:
                    self._compare(array, index, file.read())
        elif array.grows_with or array.has_checksums:
            # Of fixed arrays, versions that wrote no checksums left out those of one value.
            self._absent(array, "chunk", index, "its file is missing")

    def _compare(self, array: StoredArray, index: Grid, content: bytes) -> None:
        """Note where the copy of what a file holds is of something else: readers at a URL would take it."""
        name = array.file_name(index)
        if self._copies.get(name, content) != content:
            reason = f"its copy of {name} is not what the file holds"
            self.damaged.append(Damage("copy", array.name, array.leading(index), {}, reason))

    def _decode(self, array: StoredArray, chunk: Grid) -> None:
        try:
            array.array[array.selection(chunk)]
        except OSError as error:
            self._note("unreadable", array, chunk, f"the file system cannot read it: {error.strerror}")
        except Exception as error:  # a damaged chunk raises whatever its codec raises
            text = first_line(error)
            reason = "its checksum does not match" if "checksum" in text else f"it cannot be decoded: {text}"
            self._note("chunk", array, chunk, reason)

    def _absent(self, array: StoredArray, kind: Kind, chunk: Grid, reason: str) -> None:
        if array.can_miss_values and is_missing(self._missing, array.name, array.leading(chunk)):
            self.n_missing += math.prod(array.n_inside) if kind == "shard" else 1
        else:
            self._note(kind, array, chunk, reason)

    def _note(self, kind: Kind, array: StoredArray, chunk: Grid, reason: str) -> None:
        at = array.place(chunk, self._labels)
        self.damaged.append(Damage(kind, array.name, array.leading(chunk), at, reason))

    def _tick(self) -> None:
        if self._progress is not None:
            self._progress(min(self.n_read, self._total), self._total)


def _labels(arrays: Mapping[str, StoredArray]) -> dict[str, list[Any]]:
    """Return the numbers that label dimensions, of those that have some which can be read."""
    labels = {}
    for name in DIMENSIONS.keys() & arrays.keys():
        if BY_NAME[name].dtype == "string":  # of dimensions that no chunk divides
            continue
        with contextlib.suppress(Exception):  # it will be listed as damaged itself
            labels[name] = np.asarray(arrays[name].array[...]).tolist()
    return labels


def metadata_of(array: StoredArray) -> MetadataState:
    """Compare an array's own metadata with the group's copy of it, which is the one that readers use."""
    try:
        own = array.own_metadata()
    except FileNotFoundError:
        return MetadataState("metadata", "it is missing")
    except OSError as error:
        return MetadataState("unreadable", f"the file system cannot read its {METADATA}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        return MetadataState("metadata", f"it cannot be parsed: {first_line(error)}")
    if not isinstance(own, dict):
        return MetadataState("metadata", "it cannot be parsed: it is no object")
    odd = [key for key in sorted({*own, *array.metadata}) if own.get(key) != array.metadata.get(key)]
    if not odd:
        return MetadataState(None, "")
    if odd == ["shape"] and _is_longer(own["shape"], array.array.shape):
        return MetadataState("ahead", "")
    named = ", ".join(map(repr, odd))[:200]
    return MetadataState("conflict", f"it differs from the group's copy in {named}")


def _is_longer(shape: Any, held: Grid) -> bool:
    """Whether a shape has more rows than are held, and is the same otherwise."""
    return (
        isinstance(shape, list)
        and len(shape) == len(held)
        and tuple(shape[1:]) == held[1:]
        and type(shape[0]) is int
        and shape[0] > held[0]
    )
