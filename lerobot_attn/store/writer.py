"""Stream one episode into a Zarr v3 store that a reader may open at any instant.

The rows of an inference are written first; then one atomic replacement of the group's `zarr.json`, which
carries the consolidated metadata of every array, makes them exist. A process killed in between leaves a store
that holds every inference committed before. Knows neither torch nor LeRobot, and no thread: see
`lerobot_attn.recording.background`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs
from numcodecs.bitround import BitRound
from numpy.typing import NDArray
from zarr.storage import LocalStore

from lerobot_attn.errors import StoreError
from lerobot_attn.store.files import replace_json
from lerobot_attn.store.schema import (
    ARRAYS,
    BY_NAME,
    METADATA,
    SCHEMA_NAME,
    SCHEMA_VERSION,
    ArraySpec,
)


class Compression:
    """How maps are compressed: Blosc with bit shuffle, and optionally fewer mantissa bits.

    Args:
        compressor: a Blosc compressor's name, or "none".
        level: 0 to 9.
        keep_bits: mantissa bits kept of float16's 10, rounded to nearest; None is lossless. The largest
            relative error of a normal value is 2 ** -(keep_bits + 1).
    """

    def __init__(self, compressor: str = "zstd", level: int = 1, keep_bits: int | None = None):
        self.compressor = compressor
        self.level = level
        self._round = None if keep_bits is None or keep_bits >= 10 else BitRound(keepbits=keep_bits)

    def codecs(self) -> list[Any]:
        """Return the bytes-to-bytes codecs: compressor, then a checksum over what it wrote."""
        checksum = zarr.codecs.Crc32cCodec()
        if self.compressor == "none":
            return [checksum]
        blosc = zarr.codecs.BloscCodec(
            cname=self.compressor,  # type: ignore[arg-type]
            clevel=self.level,
            shuffle="bitshuffle",
        )
        return [blosc, checksum]

    def prepare(self, maps: NDArray[np.float16]) -> NDArray[np.float16]:
        """Return float16 maps as they are to be stored."""
        if self._round is None:
            return maps
        rounded: NDArray[np.float16] = (
            self._round.encode(np.ascontiguousarray(maps)).view(np.float16).reshape(maps.shape)
        )
        return rounded


class EpisodeWriter:
    """Writes one episode: `append_inference` and `append_frames` take rows, `commit` makes them visible.

    Args:
        path: the store's folder; must not exist.
        sizes: dimension name → size, for every dimension but inference and frame.
        coordinates: name → values of the fixed arrays.
        attributes: the group's attributes; schema, `complete` and the row counts are added.
        compression: how maps are compressed.
        optional: names of the optional arrays that this episode has.

    Raises:
        StoreError: the path exists, or its folder cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        sizes: Mapping[str, int],
        coordinates: Mapping[str, NDArray[Any]],
        attributes: Mapping[str, Any],
        compression: Compression,
        optional: set[str],
    ):
        self.path = path
        self._sizes = dict(sizes)
        self._compression = compression
        self._attributes: dict[str, Any] = {
            "schema": SCHEMA_NAME,
            "schema_version": SCHEMA_VERSION,
            **attributes,
            "complete": False,
            "n_inferences": 0,
            "n_frames": 0,
        }
        if path.exists():
            raise StoreError(
                f"{path}: already exists, expected a new path; choose another folder or remove it"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # By its schema a reader tells a store that has only just begun from one of another kind.
            begun = {name: self._attributes[name] for name in ("schema", "schema_version")}
            # A store object: Zarr reads a path as a URL, and then "#", "?" and "::" in it mean something.
            group = zarr.create_group(LocalStore(path), zarr_format=3, attributes=begun)
        except OSError as error:
            raise StoreError(f"{path}: cannot create the store: {error.strerror or error}") from error
        self._growing: dict[str, _GrowingArray] = {}
        self._metadata: dict[str, dict[str, Any]] = {}
        names = set(coordinates) | optional
        for spec in ARRAYS:
            if spec.optional and spec.name not in optional:
                continue
            if spec.grows_with is None and spec.name not in names:
                continue
            array = create_array(group, spec, self._sizes, self._compression)
            self._metadata[spec.name] = json.loads((path / spec.name / METADATA).read_text(encoding="utf-8"))
            if spec.grows_with:
                self._growing[spec.name] = _GrowingArray(array, spec)
            else:
                array[...] = np.asarray(coordinates[spec.name])
        # Coordinates that are no dimension's own: xarray finds them through this attribute.
        self._attributes["coordinates"] = " ".join(extra_coordinates(self._metadata))
        self.commit()

    @property
    def n_inferences(self) -> int:
        """Inferences appended so far."""
        return self._growing["token_id"].n_rows

    @property
    def n_frames(self) -> int:
        """Frames appended so far."""
        return self._growing["frame_inference"].n_rows

    def append_inference(self, rows: Mapping[str, NDArray[Any]]) -> None:
        """Write the arrays of the next inference; they exist after the next `commit`.

        Args:
            rows: array name → values without the inference axis, for every array that grows with inference.

        Raises:
            StoreError: a name is missing or a shape does not fit.
        """
        self._append("inference", {name: np.asarray(value)[None] for name, value in rows.items()})

    def append_frames(self, rows: Mapping[str, NDArray[Any]]) -> None:
        """Write the next frames; they exist after the next `commit`.

        Args:
            rows: array name → values with the frame axis first, for every array that grows with frame.

        Raises:
            StoreError: a name is missing or a shape does not fit.
        """
        if len({len(value) for value in rows.values()}) > 1:
            raise StoreError(f"{self.path}: frame arrays differ in length: {_lengths(rows)}")
        self._append("frame", rows)

    def update_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Change group attributes; they exist after the next `commit`."""
        self._attributes.update(attributes)

    def commit(self) -> None:
        """Make everything appended so far exist."""
        for name, growing in self._growing.items():
            metadata = self._metadata[name]
            if metadata["shape"][0] != growing.n_rows:
                metadata["shape"] = [growing.n_rows, *metadata["shape"][1:]]
                replace_json(self.path / name / METADATA, metadata)
        self._attributes["n_inferences"] = self.n_inferences
        self._attributes["n_frames"] = self.n_frames
        replace_json(
            self.path / METADATA,
            {
                "zarr_format": 3,
                "node_type": "group",
                "attributes": self._attributes,
                "consolidated_metadata": {
                    "kind": "inline",
                    "must_understand": False,
                    "metadata": self._metadata,
                },
            },
        )

    def close(self, *, complete: bool, attributes: Mapping[str, Any] | None = None) -> None:
        """Commit what is there; `complete` is the last thing that the store says of itself."""
        self.update_attributes(attributes or {})
        self._attributes["complete"] = complete
        self.commit()

    def remove(self) -> None:
        """Delete the store."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _append(self, dimension: str, rows: Mapping[str, NDArray[Any]]) -> None:
        expected = {name for name, g in self._growing.items() if g.spec.grows_with == dimension}
        if set(rows) != expected:
            odd = sorted(expected ^ set(rows))
            raise StoreError(
                f"{self.path}: {dimension} rows must hold exactly {sorted(expected)}; odd: {odd}"
            )
        for name, values in rows.items():
            growing = self._growing[name]
            shape = growing.spec.shape(self._sizes, len(values))
            if values.shape != shape:
                raise StoreError(f"{self.path}: {name} got shape {values.shape}, expected {shape}")
        before = {name: self._growing[name].state() for name in rows}
        try:
            for name, values in rows.items():
                growing = self._growing[name]
                growing.append(self._compression.prepare(values) if growing.spec.is_map else values)
        except BaseException:
            # A full disk takes some arrays and refuses others: none of them may have grown.
            for name, state in before.items():
                self._growing[name].restore(state)
            raise


def create_array(
    group: zarr.Group,
    spec: ArraySpec,
    sizes: Mapping[str, int],
    compression: Compression,
    *,
    n_rows: int = 0,
) -> zarr.Array[Any]:
    """Create an array as the schema has it.

    Args:
        group: where.
        spec: which.
        sizes: dimension name → size.
        compression: of maps and masks.
        n_rows: rows along the dimension that grows, if it has one.
    """
    tables = [zarr.codecs.ZstdCodec(level=1), zarr.codecs.Crc32cCodec()]
    order = spec.stored_order
    return group.create_array(
        spec.name,
        shape=spec.shape(sizes, n_rows),
        dtype=spec.dtype,
        chunks=spec.chunks(sizes),
        shards=spec.shards(sizes),
        fill_value=spec.fill_value,
        dimension_names=spec.dims,
        attributes=spec.attributes(),
        filters=[] if order is None else [zarr.codecs.TransposeCodec(order=order)],
        compressors=compression.codecs() if spec.sharded else tables,
        # A chunk that is not there is a lost one, also where it would hold but the fill value.
        config={"write_empty_chunks": True},
    )


def extra_coordinates(names: Iterable[str]) -> list[str]:
    """Return those of an episode's arrays that are coordinates, but no dimension's own."""
    known = [BY_NAME[name] for name in names if name in BY_NAME]
    return [spec.name for spec in known if spec.coordinate and spec.dims != (spec.name,)]


class _GrowingArray:
    """Rows of one array, written ahead of the shape that its metadata on disk admits to."""

    def __init__(self, array: zarr.Array[Any], spec: ArraySpec):
        self.spec = spec
        self.n_rows = 0
        self._array = array
        # Rows of the last, unfilled chunk: it is written as a whole each time, never read back.
        self._tail: list[NDArray[Any]] = []
        self._rows_per_chunk = array.chunks[0]

    def state(self) -> tuple[int, list[NDArray[Any]]]:
        """Return what `restore` takes back."""
        return self.n_rows, list(self._tail)

    def restore(self, state: tuple[int, list[NDArray[Any]]]) -> None:
        """Forget the rows that were appended since; what was written of them lies beyond the shape."""
        self.n_rows, self._tail = state[0], list(state[1])

    def append(self, rows: NDArray[Any]) -> None:
        if self.spec.sharded:
            start, values = self.n_rows, rows
        else:
            start = self.n_rows - len(self._tail)
            self._tail.extend(rows)
            values = np.stack(self._tail) if self._tail else rows
            keep = (self.n_rows + len(rows)) % self._rows_per_chunk
            self._tail = self._tail[len(self._tail) - keep :]
        self.n_rows += len(rows)
        if len(values) == 0:
            return
        shape = (self.n_rows, *self._array.shape[1:])
        # No comparison with the fill value: it costs a pass over the maps, and absent chunks save nothing
        # here.
        ahead: zarr.Array[Any] = zarr.Array(
            zarr.AsyncArray(  # type: ignore[call-overload]
                metadata=self._array.metadata.update_shape(shape),
                store_path=self._array.store_path,
                config={"write_empty_chunks": True},
            )
        )
        ahead[start:] = values


def _lengths(rows: Mapping[str, NDArray[Any]]) -> str:
    return ", ".join(f"{name} {len(values)}" for name, values in rows.items())
