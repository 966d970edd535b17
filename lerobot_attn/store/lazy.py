"""A store's arrays as a lazy xarray dataset, fit to be selected from, computed on and written elsewhere.

Knows where a store lies and how much of it counts. Reads no values, and knows no meaning of any.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
import zarr
from dask.base import tokenize
from numpy.typing import NDArray

from lerobot_attn.store.copies import copies_in, file_names, n_files
from lerobot_attn.store.direct import DirectStore
from lerobot_attn.store.location import Files, files_at
from lerobot_attn.store.numbers import Allowed, check_when_read
from lerobot_attn.store.packed import Packed
from lerobot_attn.store.remote import Remote, RemoteFile
from lerobot_attn.store.schema import BY_NAME, METADATA
from lerobot_attn.store.trust import check_array
from lerobot_attn.store.url import Place, Url

# Of a table that is read together with others from a URL.
_MAX_VALUES, _MAX_CHUNKS = 1 << 20, 8
# What says where a map belongs: of which frame, at which flow time, over which patches.
_PLACES = (
    *("frame_inference", "frame_query", "inference_frame"),
    *("flow_time", "key_camera", "key_row", "key_column"),
)


def lazy_dataset(
    path: Place, rows: Mapping[str, int], allowed: Mapping[str, Allowed], *, with_dask: bool
) -> xr.Dataset:
    """Open a store's arrays; only the coordinates of dimensions are read.

    Its attributes are what netCDF takes too: objects are JSON text, truths 0 or 1, and what is None is left
    out.

    Args:
        path: the store's folder, or its file where it is packed; a URL of either.
        rows: growing dimension → how many of its rows count, though the store may hold more by now.
        allowed: array name → the numbers that it may hold; others raise StoreError when they are read.
        with_dask: one Dask chunk per chunk of the store.

    Raises:
        Exception: of many kinds, where the metadata is damaged.
    """
    files = files_at(path)
    if isinstance(path, Url):
        _expect(files, json.loads(files.read(METADATA)))
    store = DirectStore.open_group(files, consolidated=True, zarr_format=3)
    opened: xr.Dataset = xr.open_dataset(store)
    opened = opened.isel({dim: slice(n) for dim, n in rows.items() if opened.sizes.get(dim, n) > n})
    token = tokenize(files, sorted(opened.sizes.items())) if with_dask else ""
    for name, variable in opened.variables.items():
        if name in allowed:
            variable.data = check_when_read(variable, f"{path}: {name}", allowed[str(name)])
        if with_dask and name not in opened.indexes:
            chunks = variable.encoding.get("preferred_chunks", {})
            variable.data = variable.chunk(chunks, name=f"{name}-{token}").data
    # How the store is cut and compressed is no property of a selection: to_zarr would refuse it.
    opened = opened.drop_encoding()
    opened.attrs = {name: _plain(value) for name, value in opened.attrs.items() if value is not None}
    opened.encoding["source"] = str(path)
    return opened


def single_array(path: Place, name: str, n_rows: int) -> NDArray[Any]:
    """Return the rows of one small array that count; no other one is opened.

    Args:
        path: the store's folder, or its file where it is packed; a URL of either.
        name: the array's.
        n_rows: how many of its rows count.

    Raises:
        Exception: of many kinds, where the array or the metadata is damaged.
    """
    files = files_at(path)
    # All metadata of a store take Zarr longer than the array itself; so its own is read, and checked.
    check_array(path, name, json.loads(files.read(f"{name}/{METADATA}")))
    array = zarr.open_array(files, path=name, mode="r", zarr_format=3)
    return np.asarray(array[:n_rows])


def _expect(files: Files, document: Mapping[str, Any]) -> None:
    """Prepare for few requests to a store at a URL.

    Args:
        files: of the store.
        document: the group's metadata.
    """
    copies = copies_in(document)
    if isinstance(files, Remote):
        files.keep(copies.files, copies.ends)
        for group in _tables(document):
            files.read_together(group)
    elif isinstance(files, Packed) and isinstance(files.source, RemoteFile):
        for name, end in copies.ends.items():
            if name in files.members:
                start, size = files.members[name]
                files.source.keep(start + size - len(end), end)


def _tables(document: Mapping[str, Any]) -> tuple[list[str], ...]:
    """Return the names of a store's small files, in groups that are needed together.

    They are those that opening reads, those that a heatmap needs, and the others.
    """
    opening, places, others = list[str](), list[str](), list[str]()
    for name, array in document["consolidated_metadata"]["metadata"].items():
        spec = BY_NAME.get(name)
        if spec is None or spec.sharded or math.prod(array["shape"]) > _MAX_VALUES:
            continue
        if n_files(array) <= _MAX_CHUNKS:
            group = opening if array.get("dimension_names") == [name] else others
            group = places if name in _PLACES else group
            group += file_names(name, array)
    return opening, places, others


def _plain(value: Any) -> Any:
    """Return an attribute as netCDF takes it."""
    plain = (str, int, float)
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, plain):
        return value
    if isinstance(value, list) and value and len({type(v) for v in value}) == 1 and type(value[0]) in plain:
        return value
    return json.dumps(value)
