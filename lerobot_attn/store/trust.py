"""What strangers may send: checks of a store's metadata before anything in it is read or allocated.

Nothing in a store is executed or unpickled, no name in its metadata leads out of its folder, and sizes are
checked before memory is taken for them. Knows the group's `zarr.json` as parsed JSON, and opens no file.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from lerobot_attn.errors import StoreError
from lerobot_attn.store.schema import ARRAYS, BY_NAME, FRAMES_PER_CHUNK, METADATA
from lerobot_attn.store.url import Place

# Zarr also takes arrays of version 2, whose filters include pickle (which zarr 3.4 refuses by itself), and
# codecs that other packages register.
_CODECS = frozenset(
    {"blosc", "bytes", "crc32c", "gzip", "sharding_indexed", "transpose", "vlen-bytes", "vlen-utf8", "zstd"}
)
_DATA_TYPES = frozenset(
    {"bool", "string", "float16", "float32", "float64", "complex64", "complex128"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)
# Pi0.5's largest maps of one inference are 135 million values, those of SmolVLA's vision tower (1024 patches,
# 12 heads, 12 layers, three cameras) 453 million; the largest table is half a million in an episode.
_MAX_MAP_VALUES = 2**30
_MAX_TABLE_VALUES = 2**24
# Of a condition, which is shown beside every map: a line, not a book.
MAX_NAME = 200
MAX_TEXT = 2000
MAX_INTERVENTIONS = 100
# Attributes that are JSON objects, where they are there.
_OBJECTS = ("capture", "experiment", "layout", "policy", "replay", "segmentation", "videos")


def checked_shapes(path: Place, document: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the arrays' shapes after checking their names, types, ranks, codecs and sizes."""
    consolidated = document.get("consolidated_metadata")
    arrays = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    if not isinstance(arrays, dict):
        raise StoreError(f"{path}: its {METADATA} has no consolidated metadata: damaged")
    for spec in ARRAYS:
        needed = bool(spec.grows_with) and not spec.optional
        if needed and spec.name not in arrays:
            raise StoreError(f"{path}: array {spec.name} is missing from its metadata: damaged")
    lengths: dict[str, int] = {}
    for name, array in arrays.items():
        _check_array(path, name, array)
        known = BY_NAME.get(name)
        if known is None:
            continue
        shape = array["shape"]
        if len(shape) != len(known.dims):
            raise StoreError(
                f"{path}: array {name} has {len(shape)} dimensions, expected {len(known.dims)}: damaged"
            )
        for dim, length in zip(known.dims, shape, strict=True):
            if lengths.setdefault(dim, length) != length:
                raise StoreError(
                    f"{path}: dimension {dim} is {length} in {name}, {lengths[dim]} elsewhere: damaged"
                )
    # After the lengths, whose message says more where both are wrong.
    for name, array in arrays.items():
        _check_size(path, name, array)
    return {name: tuple(array["shape"]) for name, array in arrays.items()}


def check_array(path: Place, name: str, array: Any) -> None:
    """Check a single array's own metadata: its name, type, codecs and size.

    Raises:
        StoreError: something is not as it may be.
    """
    _check_array(path, name, array)
    _check_size(path, name, array)


def check_attributes(path: Place, attributes: dict[str, Any]) -> None:
    """Check the attributes that analysis and figures take apart without looking."""
    for name in _OBJECTS:
        if not isinstance(attributes.get(name, {}), dict):
            raise StoreError(f"{path}: its {name} is {shown(attributes[name])}, expected an object: damaged")
    queries = attributes.get("executed_queries", [0, 0])
    if not isinstance(queries, list) or len(queries) != 2 or not all(type(query) is int for query in queries):
        raise StoreError(f"{path}: its executed_queries is {shown(queries)}, expected [first, stop]: damaged")
    if attributes.get("condition") is not None and not _is_condition(attributes["condition"]):
        raise StoreError(
            f"{path}: its condition is {shown(attributes['condition'])}, expected name (at most {MAX_NAME} "
            f"characters), text (at most {MAX_TEXT}) and interventions (at most {MAX_INTERVENTIONS}): damaged"
        )


def _is_condition(value: Any) -> bool:
    """Say whether this is what an episode says of its interventions, and no longer than can be shown."""
    if not isinstance(value, dict):
        return False
    texts = [(value.get("name"), MAX_NAME), (value.get("text", ""), MAX_TEXT)]
    done = value.get("interventions", [])
    return (
        all(isinstance(text, str) and len(text) <= most for text, most in texts)
        and isinstance(done, list)
        and len(done) <= MAX_INTERVENTIONS
        and all(isinstance(one, dict) for one in done)
    )


def _check_array(path: Place, name: str, array: Any) -> None:
    """Check that an array lies in the store, and that reading it runs nothing but Zarr's own codecs."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        # Zarr would read the chunks of "../x" beside the store.
        raise StoreError(f"{path}: an array is named {shown(name)}, expected a plain name: damaged")
    if not isinstance(array, dict) or not _is_shape(array.get("shape"), 0):
        raise StoreError(f"{path}: array {shortened(name)} has no valid shape: damaged")
    known = BY_NAME.get(name)
    expected = {"zarr_format": 3, "node_type": "array"}
    if known is not None:
        expected |= {"data_type": known.dtype, "dimension_names": list(known.dims)}
    for field, value in expected.items():
        # A rank that is wrong has its own message.
        if field == "dimension_names" and known is not None and len(array["shape"]) != len(known.dims):
            continue
        if array.get(field) != value:
            raise StoreError(
                f"{path}: array {shortened(name)} has {field} {shown(array.get(field))}, "
                f"expected {value!r}: damaged"
            )
    if not isinstance(array.get("data_type"), str) or array["data_type"] not in _DATA_TYPES:
        raise StoreError(
            f"{path}: array {shortened(name)} has data_type {shown(array.get('data_type'))}, "
            "expected numbers or strings"
        )
    _check_codecs(path, name, array.get("codecs"))


def _check_codecs(path: Place, name: str, codecs: Any) -> None:
    if not isinstance(codecs, list):
        raise StoreError(
            f"{path}: array {shortened(name)} has codecs {shown(codecs)}, expected a list: damaged"
        )
    for codec in codecs:
        # Zarr takes a codec's bare name too.
        codec_name = codec.get("name") if isinstance(codec, dict) else codec
        if not isinstance(codec_name, str) or codec_name not in _CODECS:
            raise StoreError(
                f"{path}: array {shortened(name)} has codec {shown(codec_name)}, expected one of "
                f"{', '.join(sorted(_CODECS))}"
            )
        settings = codec.get("configuration") if isinstance(codec, dict) else None
        if codec_name == "sharding_indexed":
            if not isinstance(settings, dict) or not _is_shape(settings.get("chunk_shape"), 1):
                raise StoreError(
                    f"{path}: array {shortened(name)} has no valid chunks in its shards: damaged"
                )
            for field in ("codecs", "index_codecs"):
                _check_codecs(path, name, settings.get(field))


def _check_size(path: Place, name: str, array: dict[str, Any]) -> None:
    """Refuse arrays and chunks for which a reader would allocate more memory than any recording needs."""
    known, shape = BY_NAME.get(name), array["shape"]
    sharded = known is not None and known.sharded
    limit = _MAX_MAP_VALUES if sharded else _MAX_TABLE_VALUES
    # Of maps, one inference is read at a time. A length of 0 does not excuse the others.
    lengths = [max(1, length) for length in (shape[1:] if sharded else shape)]
    if math.prod(lengths) > limit or max(shape, default=0) > _MAX_MAP_VALUES:
        raise StoreError(
            f"{path}: array {shortened(name)} has shape {shown(shape)}, expected at most {limit} values: "
            "damaged"
        )
    grid = array.get("chunk_grid")
    settings = grid.get("configuration") if isinstance(grid, dict) else None
    chunks = settings.get("chunk_shape") if isinstance(settings, dict) else None
    if not _is_shape(chunks, 1) or len(chunks) != len(shape):
        raise StoreError(f"{path}: array {shortened(name)} has no valid chunks: damaged")
    # Tables begin with a chunk larger than themselves, to grow into.
    if any(chunk > max(length, FRAMES_PER_CHUNK) for chunk, length in zip(chunks, shape, strict=True)):
        raise StoreError(
            f"{path}: array {shortened(name)} has chunks of {shown(chunks)}, its shape is {shown(shape)}: "
            "damaged"
        )


def _is_shape(value: Any, least: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(length) is int and length >= least for length in value)


def shown(value: Any) -> str:
    """Return a value's `repr` for a message: one line and short, whatever the store says."""
    try:
        return shortened(repr(value))
    except (RecursionError, ValueError):  # nested too deeply, or an integer too long to write
        return f"a {type(value).__name__}"


def shortened(text: str) -> str:
    """Return a text for a message, cut off where it is long."""
    return text if len(text) <= 80 else f"{text[:77]}…"
