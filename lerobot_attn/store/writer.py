"""Stream one episode into a Zarr v3 store that a reader may open at any instant.

The maps of an inference are written when they come, the rows of the small arrays together at a commit; then
one atomic replacement of the group's `zarr.json`, which carries the consolidated metadata of every array,
makes them exist. A process killed in between leaves a store that holds every inference committed before. Zarr
makes the arrays; `lerobot_attn.store.encoding` encodes what fills them. Knows neither torch nor LeRobot, and
no queue: see `lerobot_attn.recording.background`.
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
from lerobot_attn.sizes import n_cores
from lerobot_attn.store.copies import COPIES, copies_of
from lerobot_attn.store.encoding import ArrayEncoder
from lerobot_attn.store.files import replace_bytes, replace_json
from lerobot_attn.store.location import present_form
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
        n_threads: how many compress the chunks of a map at a time; by default as many as there are cores.

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
        n_threads: int | None = None,
    ):
        self.path = path
        self._sizes = dict(sizes)
        self._compression = compression
        self._is_closing = False
        self._attributes: dict[str, Any] = {
            "schema": SCHEMA_NAME,
            "schema_version": SCHEMA_VERSION,
            **attributes,
            "complete": False,
            "n_inferences": 0,
            "n_frames": 0,
        }
        there = present_form(path)
        if there is not None:
            raise StoreError(
                f"{there}: already exists, expected a new path; choose another folder or remove it"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # By its schema a reader tells a store that has only just begun from one of another kind.
            begun = {name: self._attributes[name] for name in ("schema", "schema_version")}
            # A store object: Zarr reads a path as a URL, and then "#", "?" and "::" in it mean something.
            group = zarr.create_group(LocalStore(path), zarr_format=3, attributes=begun)
        except OSError as error:
            raise StoreError(f"{path}: cannot create the store: {error.strerror or error}") from error
        self._growing: dict[str, _Maps | _Table] = {}
        self._metadata: dict[str, dict[str, Any]] = {}
        names = set(coordinates) | optional
        for spec in ARRAYS:
            if spec.optional and spec.name not in optional:
                continue
            if spec.grows_with is None and spec.name not in names:
                continue
            array = create_array(group, spec, self._sizes, self._compression)
            metadata = json.loads((path / spec.name / METADATA).read_text(encoding="utf-8"))
            self._metadata[spec.name] = metadata
            chunks = _Chunks(path / spec.name, array, ArrayEncoder(metadata), n_threads or n_cores())
            if spec.grows_with is None:
                chunks.write(0, _as_dtype(coordinates[spec.name], chunks.dtype))
            else:
                self._growing[spec.name] = _Maps(spec, chunks) if spec.sharded else _Table(spec, chunks)
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
        """Make everything appended so far exist.

        Raises:
            OSError: it cannot be written. What was appended since the last commit is forgotten then.
        """
        try:
            for growing in self._growing.values():
                growing.write_out()
            for name, growing in self._growing.items():
                if self._metadata[name]["shape"][0] != growing.n_rows:
                    self._metadata[name]["shape"][0] = growing.n_rows
                    replace_json(self.path / name / METADATA, self._metadata[name])
            self._replace_metadata()
        except BaseException:
            for name, growing in self._growing.items():
                growing.forget_uncommitted()
                self._metadata[name]["shape"][0] = growing.n_rows
            raise
        for growing in self._growing.values():
            growing.committed()

    def _replace_metadata(self) -> None:
        self._attributes["n_inferences"] = self.n_inferences
        self._attributes["n_frames"] = self.n_frames
        consolidated = {"kind": "inline", "must_understand": False, "metadata": self._metadata}
        if self._is_closing:
            consolidated[COPIES] = copies_of(self.path, self._metadata)
        replace_json(
            self.path / METADATA,
            {
                "zarr_format": 3,
                "node_type": "group",
                "attributes": self._attributes,
                "consolidated_metadata": consolidated,
            },
        )

    def close(self, *, complete: bool, attributes: Mapping[str, Any] | None = None) -> None:
        """Commit what is there; `complete` is the last thing that the store says of itself."""
        self.update_attributes(attributes or {})
        self._attributes["complete"] = complete
        self._is_closing = True
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
        fitting = {}
        for name, values in rows.items():
            growing = self._growing[name]
            shape = growing.spec.shape(self._sizes, len(values))
            if values.shape != shape:
                raise StoreError(f"{self.path}: {name} got shape {values.shape}, expected {shape}")
            prepared = self._compression.prepare(values) if growing.spec.is_map else values
            fitting[name] = _as_dtype(prepared, growing.dtype)
        # A full disk takes some maps and refuses others: none of the arrays may have grown then.
        for name, values in fitting.items():
            self._growing[name].write_ahead(values)
        for name, values in fitting.items():
            self._growing[name].grow(values)


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


class _Chunks:
    """The chunk files of one array, each covering so many rows of it whole.

    Attributes:
        shape: what one file covers.
        dtype: of the values that a file takes.
        fill_value: of what was not written.
    """

    def __init__(self, folder: Path, array: zarr.Array[Any], encoder: ArrayEncoder, n_threads: int):
        self.shape = array.shards or array.chunks
        is_text = array.metadata.to_dict()["data_type"] == "string"
        self.dtype = np.dtype(object) if is_text else array.dtype
        self.fill_value = array.fill_value
        self._folder = folder
        self._key = array.metadata.encode_chunk_key
        self._encoder = encoder
        self._n_threads = n_threads

    def write(self, number: int, values: NDArray[Any]) -> None:
        """Write the file of this number along the first axis, in place of the one that is there.

        Values without a single element, such as the words of a policy that takes none, have no file.
        """
        if not values.size:
            return
        file = self._folder / self._key((number, *[0] * (len(self.shape) - 1)))
        replace_bytes(file, self._encoder.parts(values, n_threads=self._n_threads))


class _Maps:
    """Rows of an array of which each has a file of its own: it is written when it comes."""

    def __init__(self, spec: ArraySpec, chunks: _Chunks):
        self.spec = spec
        self.dtype = chunks.dtype
        self.n_rows = 0
        self._n_committed = 0
        self._chunks = chunks

    def write_ahead(self, rows: NDArray[Any]) -> None:
        """Write rows that do not count yet."""
        for number, row in enumerate(rows, start=self.n_rows):
            self._chunks.write(number, row[None])

    def grow(self, rows: NDArray[Any]) -> None:
        """Count rows that were written."""
        self.n_rows += len(rows)

    def write_out(self) -> None:
        """Nothing: all is written."""

    def committed(self) -> None:
        """Take the rows up to here for good."""
        self._n_committed = self.n_rows

    def forget_uncommitted(self) -> None:
        """Go back to the last commit; files of rows beyond it are overwritten by the next ones."""
        self.n_rows = self._n_committed


class _Table:
    """Rows of a small array, of which many share a chunk: a chunk is written at a commit, as a whole."""

    def __init__(self, spec: ArraySpec, chunks: _Chunks):
        self.spec = spec
        self.dtype = chunks.dtype
        self.n_rows = 0
        self._n_committed = 0
        self._chunks = chunks
        self._rows_per_chunk = chunks.shape[0]
        # Chunk by number, from the one that the next row after the last commit falls into.
        self._open: dict[int, NDArray[Any]] = {}

    def write_ahead(self, rows: NDArray[Any]) -> None:
        """Nothing: rows are written at a commit."""

    def grow(self, rows: NDArray[Any]) -> None:
        """Take rows."""
        if not rows.size:
            self.n_rows += len(rows)
            return
        while len(rows):
            number, start = divmod(self.n_rows, self._rows_per_chunk)
            if number not in self._open:
                self._open[number] = np.full(self._chunks.shape, self._chunks.fill_value, self.dtype)
            some = rows[: self._rows_per_chunk - start]
            self._open[number][start : start + len(some)] = some
            self.n_rows += len(some)
            rows = rows[len(some) :]

    def write_out(self) -> None:
        """Write the chunks that have new rows."""
        if self.n_rows > self._n_committed:
            for number, chunk in self._open.items():
                self._chunks.write(number, chunk)

    def committed(self) -> None:
        """Take the rows up to here for good."""
        self._n_committed = self.n_rows
        self._drop_but(self.n_rows // self._rows_per_chunk)

    def forget_uncommitted(self) -> None:
        """Go back to the last commit; what was written beyond it lies behind the shape."""
        self.n_rows = self._n_committed
        number, start = divmod(self.n_rows, self._rows_per_chunk)
        self._drop_but(number)
        if number in self._open:
            self._open[number][start:] = self._chunks.fill_value

    def _drop_but(self, number: int) -> None:
        self._open = {number: self._open[number]} if number in self._open else {}


def _as_dtype(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.asarray(values).astype(dtype, copy=False)


def _lengths(rows: Mapping[str, NDArray[Any]]) -> str:
    return ", ".join(f"{name} {len(values)}" for name, values in rows.items())
