"""Open episode stores and runs lazily: milliseconds to open, no tensor read until asked.

    episode = open_episode("out/attention/libero_object_0/episode_00000.zarr")
    episode.dataset.suffix_attention.sel(layer=17, denoise_step=9)[0].values

Knows neither torch nor LeRobot. Stores may come from strangers: nothing in one is executed or unpickled, no
path in its metadata leads out of its folder, and sizes are checked before anything is allocated for them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from lerobot_attn.errors import StoreError, first_line
from lerobot_attn.layout import TokenLayout
from lerobot_attn.sizes import folder_bytes
from lerobot_attn.store.schema import (
    ARRAYS,
    BY_NAME,
    EPISODE_SUFFIX,
    FRAMES_PER_CHUNK,
    METADATA,
    SCHEMA_NAME,
    SCHEMA_VERSION,
)

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_MAX_METADATA_BYTES = 16_000_000
# Zarr also takes arrays of version 2, whose filters include pickle (which zarr 3.4 refuses by itself), and
# codecs that other packages register.
_CODECS = frozenset(
    {"blosc", "bytes", "crc32c", "gzip", "sharding_indexed", "transpose", "vlen-bytes", "vlen-utf8", "zstd"}
)
_DATA_TYPES = frozenset(
    {"bool", "string", "float16", "float32", "float64", "complex64", "complex128"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)
# Pi0.5's largest map of one inference is 135 million values, its largest table half a million in an episode.
_MAX_MAP_VALUES = 2**28
_MAX_TABLE_VALUES = 2**24
_OBJECTS = ("capture", "layout", "policy", "videos")  # attributes that are JSON objects, where they are there
_HELP = "expected an episode store written by `lerobot-eval --eval.save_attention_maps=true`"


class Episode:
    """One episode's store. Get it from `open_episode`.

    Attributes:
        path: the store's folder.
        attributes: everything that the store says of itself.
    """

    def __init__(self, path: Path, attributes: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]):
        self.path = path
        self.attributes = attributes
        self._shapes = dict(shapes)

    def __repr__(self) -> str:
        """Say which episode this is."""
        state = "complete" if self.is_complete else "incomplete"
        return (
            f"<Episode {self.path.parent.name}/{self.path.name}: {self.task!r}, {self.n_frames} frames, "
            f"{self.n_inferences} inferences, {state}>"
        )

    @property
    def task(self) -> str:
        """The instruction."""
        return str(self.attributes.get("task", ""))

    @property
    def is_complete(self) -> bool:
        """Whether the episode was recorded to its end."""
        return self.attributes.get("complete") is True

    @property
    def success(self) -> bool | None:
        """Whether the task was solved; None if the episode was interrupted."""
        success = self.attributes.get("success")
        return success if isinstance(success, bool) else None

    @property
    def n_inferences(self) -> int:
        """Number of inferences that are there."""
        return self._rows("inference")

    @property
    def n_frames(self) -> int:
        """Number of frames that are there."""
        return self._rows("frame")

    @property
    def has_random_weights(self) -> bool:
        """Whether the policy was a demo whose maps mean nothing."""
        return bool(self.attributes.get("policy", {}).get("random_weights"))

    @cached_property
    def layout(self) -> TokenLayout:
        """Segments of the keys, cameras and their geometry.

        Raises:
            StoreError: the store's layout is damaged.
        """
        try:
            return TokenLayout.from_dict(self.attributes["layout"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.path}: its token layout is damaged ({_shown(error)})") from error

    @cached_property
    def dataset(self) -> xr.Dataset:
        """All arrays as a lazy xarray dataset, one Dask chunk per chunk of the store.

        Raises:
            StoreError: the arrays' metadata is damaged.
        """
        return self._open(chunks={})

    @cached_property
    def arrays(self) -> xr.Dataset:
        """The same dataset without Dask: a selection is read when its values are asked for.

        The quickest for single maps; a computation over many of them belongs on `dataset`.

        Raises:
            StoreError: the arrays' metadata is damaged.
        """
        return self._open(chunks=None)

    def _open(self, chunks: dict[str, int] | None) -> xr.Dataset:
        import xarray as xr

        try:
            opened: xr.Dataset = xr.open_zarr(self.path, consolidated=True, chunks=chunks, zarr_format=3)
        except Exception as error:  # zarr and xarray raise many kinds for damaged metadata
            raise StoreError(f"{self.path}: damaged metadata: {_short(first_line(error))}") from error
        # What a recording has committed since this episode was opened is for `refresh`.
        mine = {"inference": self.n_inferences, "frame": self.n_frames}
        return opened.isel({dim: slice(n) for dim, n in mine.items() if opened.sizes.get(dim, n) > n})

    def array_shape(self, name: str) -> tuple[int, ...] | None:
        """Return an array's shape without opening it, or None if the episode does not have it."""
        return self._shapes.get(name)

    def refresh(self) -> Episode:
        """Return the episode as it is now: while it is recorded, with what was committed since.

        Raises:
            StoreError: the store is gone or damaged.
        """
        return open_episode(self.path)

    def follow(self, *, poll_s: float = 0.5, timeout_s: float | None = None) -> Iterator[Episode]:
        """Yield the episode, and again whenever inferences or frames were committed, until it is complete.

        Looks at the store every so often, so it works on network file systems too; what is yielded always
        holds whole inferences only.

        Args:
            poll_s: seconds between two looks.
            timeout_s: stop after so many seconds without anything new (a killed recording is never
                completed); None waits for ever.

        Raises:
            StoreError: the store is gone or damaged.
        """
        episode, since = self.refresh(), time.monotonic()
        yield episode
        while not episode.is_complete and (timeout_s is None or time.monotonic() - since < timeout_s):
            time.sleep(poll_s)
            latest = self.refresh()
            if _progress_of(latest) != _progress_of(episode):
                episode, since = latest, time.monotonic()
                yield episode

    @cached_property
    def videos(self) -> dict[str, Path]:
        """Camera → MP4 of what it showed the policy, where the file exists.

        A recording that was killed could not list its videos: they are found by their names beside the store.
        """
        listed = self.attributes.get("videos")
        if not isinstance(listed, dict):
            return self._unlisted_videos()
        found = {}
        for camera, video in listed.items():
            path = self._beside(video.get("path")) if isinstance(video, dict) else None
            if path is not None:
                found[camera] = path
        return found

    def video(self, camera: str) -> Path:
        """Return the MP4 of what a camera showed the policy.

        Raises:
            StoreError: there is none.
        """
        if camera not in self.videos:
            raise StoreError(
                f"{self.path}: has no video of camera {camera}, expected an MP4 beside the store; record "
                "with --eval.attention.cameras=true (the default)"
            )
        return self.videos[camera]

    def image_size_px(self, camera: str) -> tuple[int, int] | None:
        """Return (height, width) of a camera's images; its video may have a row or column more."""
        geometry = next((c.geometry for c in self.layout.cameras if c.name == camera), None)
        return None if geometry is None else (geometry.height_px, geometry.width_px)

    @cached_property
    def eval_video(self) -> Path | None:
        """The evaluation's own MP4 of this episode, where the file exists.

        It is looked for in the run's `videos` and in the store's own folder alone, whatever the store says.
        """
        video = self.attributes.get("eval_video")
        if not isinstance(video, dict) or not isinstance(video.get("path"), str):
            return None
        try:
            parents = self.path.resolve().parents
            path = (self.path.parent / video["path"]).resolve()
            # Three folders up is the run, or, of a store that was moved, anything.
            folders = [parents[0], *(parent / "videos" for parent in parents[2:3])]
            inside = any(path.is_relative_to(folder) for folder in folders)
            return path if inside and path.suffix == ".mp4" and path.is_file() else None
        except (OSError, RuntimeError, ValueError):  # too long a name, a loop of links, a null byte
            return None

    def stored_bytes(self) -> int:
        """Return the size of the store's files, bytes."""
        return folder_bytes(self.path)

    def raw_bytes(self) -> int:
        """Return the size of the maps before compression, bytes."""
        total = 0
        for spec in ARRAYS:
            shape = self.array_shape(spec.name)
            if spec.sharded and shape is not None:
                size = 2
                for length in shape:
                    size *= length
                total += size
        return total

    def row_sum_tolerance(self) -> float:
        """Return how far from 1 a row of attention may sum, by the roundings that it went through.

        The policy's softmax is rounded to the policy's dtype (relative error 2^-8 for bfloat16), then to
        float16 (2^-11, and 2^-25 absolute for tiny values), then to `keep_bits` mantissa bits if that was
        chosen.
        """
        keep_bits = self.attributes.get("capture", {}).get("keep_bits")
        tolerance = 2**-11 + self.layout.n_keys * 2**-25
        if self.attributes.get("policy", {}).get("dtype") == "bfloat16":
            tolerance += 2**-8
        if type(keep_bits) is int and 0 <= keep_bits <= 10:
            tolerance += 2.0 ** -(keep_bits + 1)
        return tolerance

    def _rows(self, dimension: str) -> int:
        return self._shapes["inference_frame" if dimension == "inference" else "frame_inference"][0]

    def _unlisted_videos(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for camera in self.layout.cameras if "layout" in self.attributes else ():
            # Of two cameras with one short name, the second one's file has the whole name.
            for name in (camera.name, camera.name.rpartition(".")[2]):
                path = self._beside(f"{self.path.stem}.{name}.mp4")
                if path is not None and path not in found.values():
                    found[camera.name] = path
                    break
        return found

    def _beside(self, name: Any) -> Path | None:
        """Return the MP4 of that name in the store's own folder, if it is there.

        Anything with a path in it is refused, and so is a link that leads elsewhere.
        """
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".mp4":
            return None
        path = self.path.parent / name
        try:
            is_here = path.is_file() and path.resolve().parent == self.path.parent.resolve()
        except (OSError, RuntimeError, ValueError):  # too long a name, a loop of links, a null byte
            return None
        return path if is_here else None


class TableRow(NamedTuple):
    """An episode in `Run.table`."""

    task_group: Any
    task_id: Any
    episode: Any
    task: str
    success: bool | None
    frames: int
    inferences: int
    bytes: int
    complete: bool
    path: str

    @classmethod
    def of(cls, episode: Episode) -> TableRow:
        """Return the row of an episode; looks at the size of each of its files."""
        return cls(
            episode.attributes.get("task_group"),
            episode.attributes.get("task_id"),
            episode.attributes.get("episode_index"),
            episode.task,
            episode.success,
            episode.n_frames,
            episode.n_inferences,
            episode.stored_bytes(),
            episode.is_complete,
            str(episode.path),
        )


class Run:
    """The episodes under a folder, opened one by one as they are asked for. Get it from `open_run`.

    Iterating yields the episodes in the order of their paths and passes over damaged stores, which `damaged`
    lists. `len(run)` and `run[index]` count the stores that are there, without opening any: where one is
    damaged, `run[index]` raises its `StoreError`.

    Attributes:
        path: the folder.
        stores: the stores' folders.
    """

    def __init__(self, path: Path, stores: Iterable[Path]):
        self.path = path
        self.stores = tuple(stores)
        self._reasons: dict[Path, str | None] = {}  # of the stores that were tried; None: it opened

    def __repr__(self) -> str:
        """Say which run this is."""
        return f"<Run {self.path}: {len(self)} episodes>"

    def __len__(self) -> int:
        return len(self.stores)

    def __iter__(self) -> Iterator[Episode]:
        for store in self.stores:
            episode = self._opened(store)
            if episode is not None:
                yield episode

    def __getitem__(self, index: int) -> Episode:
        return open_episode(self.stores[index])

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """All episodes that can be opened, in memory at once."""
        return tuple(self)

    @property
    def damaged(self) -> tuple[tuple[Path, str], ...]:
        """Stores that could not be opened, with the reason."""
        for store in self.stores:
            if store not in self._reasons:
                self._opened(store)
        return tuple((store, reason) for store in self.stores if (reason := self._reasons[store]) is not None)

    def _opened(self, store: Path) -> Episode | None:
        try:
            episode = open_episode(store)
        except StoreError as error:
            self._reasons[store] = str(error)
            return None
        self._reasons[store] = None
        return episode

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per episode: its task, success, frames, inferences, bytes, complete and path."""
        import pandas as pd

        return pd.DataFrame([TableRow.of(episode) for episode in self], columns=list(TableRow._fields))


def open_episode(path: str | Path) -> Episode:
    """Open an episode's store; reads one small file.

    Args:
        path: folder `….zarr`.

    Raises:
        StoreError: nothing there, something else, damaged metadata, a newer schema, or a recording that has
            not committed anything yet.
    """
    path = Path(path)
    if not path.exists():
        raise StoreError(f"{path}: no such store; {_HELP}")
    if not path.is_dir():
        raise StoreError(f"{path}: is a {path.suffix or 'plain'} file, {_HELP}")
    metadata = path / METADATA
    if not metadata.is_file():
        if (path / "meta" / "info.json").is_file():
            raise StoreError(f"{path}: is a LeRobot dataset, {_HELP}")
        stores = next(path.rglob(f"*{EPISODE_SUFFIX}/{METADATA}"), None)
        hint = f"; it holds stores, e.g. {stores.parent.relative_to(path)}: use open_run()" if stores else ""
        raise StoreError(f"{path}: is no Zarr v3 store, {_HELP}{hint}")
    try:
        if metadata.stat().st_size > _MAX_METADATA_BYTES:
            raise StoreError(
                f"{path}: its metadata is larger than {_MAX_METADATA_BYTES} bytes: damaged, or no episode"
            )
        document = json.loads(metadata.read_text(encoding="utf-8"))
    except StoreError:
        raise
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: no JSON, no UTF-8, or a number too long
        raise StoreError(f"{path}: its {METADATA} is damaged: {_short(first_line(error))}") from error
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or attributes.get("schema") != SCHEMA_NAME:
        raise StoreError(f"{path}: is a Zarr store of another kind, {_HELP}")
    version = attributes.get("schema_version")
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise StoreError(
            f"{path}: schema version {_shown(version)}, expected at most {SCHEMA_VERSION}; upgrade "
            "lerobot_policy_attn to read it"
        )
    if "n_inferences" not in attributes and "consolidated_metadata" not in document:
        raise StoreError(
            f"{path}: holds nothing yet: its recording has only just begun, or was ended as it began; "
            "expected a first commit; try again in a moment"
        )
    _check_attributes(path, attributes)
    # The rest of the arrays' metadata is Zarr's business, and large: thousands of episodes fit into memory.
    return Episode(path, attributes, _shapes(path, document))


def open_run(path: str | Path) -> Run:
    """Find every episode under a folder: a run's output folder, its `attention`, or one task's.

    Reads no store: each is opened when it is asked for.

    Args:
        path: the folder; an episode's own path gives a run of one.

    Raises:
        StoreError: nothing there, or no episode in it.
    """
    path = Path(path)
    if not path.exists():
        raise StoreError(f"{path}: no such folder; {_HELP}")
    if path.suffix == EPISODE_SUFFIX or not path.is_dir():
        open_episode(path)
        return Run(path, (path,))
    stores = _find_stores(path)
    if not stores:
        raise StoreError(f"{path}: holds no episode store, expected {{task}}/episode_*{EPISODE_SUFFIX} in it")
    return Run(path, stores)


def _find_stores(path: Path) -> list[Path]:
    pattern = f"episode_*{EPISODE_SUFFIX}"
    for prefix in ("", "*/", "attention/*/"):
        found = sorted(path.glob(prefix + pattern))
        if found:
            return found
    return sorted(path.rglob(pattern))


def _progress_of(episode: Episode) -> tuple[int, int, bool]:
    return episode.n_inferences, episode.n_frames, episode.is_complete


def _shapes(path: Path, document: dict[str, Any]) -> dict[str, tuple[int, ...]]:
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


def _check_attributes(path: Path, attributes: dict[str, Any]) -> None:
    """Check the attributes that analysis and figures take apart without looking."""
    for name in _OBJECTS:
        if not isinstance(attributes.get(name, {}), dict):
            raise StoreError(f"{path}: its {name} is {_shown(attributes[name])}, expected an object: damaged")
    queries = attributes.get("executed_queries", [0, 0])
    if not isinstance(queries, list) or len(queries) != 2 or not all(type(query) is int for query in queries):
        raise StoreError(
            f"{path}: its executed_queries is {_shown(queries)}, expected [first, stop]: damaged"
        )


def _check_array(path: Path, name: str, array: Any) -> None:
    """Check that an array lies in the store, and that reading it runs nothing but Zarr's own codecs."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        # Zarr would read the chunks of "../x" beside the store.
        raise StoreError(f"{path}: an array is named {_shown(name)}, expected a plain name: damaged")
    if not isinstance(array, dict) or not _is_shape(array.get("shape"), 0):
        raise StoreError(f"{path}: array {_short(name)} has no valid shape: damaged")
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
                f"{path}: array {_short(name)} has {field} {_shown(array.get(field))}, "
                f"expected {value!r}: damaged"
            )
    if not isinstance(array.get("data_type"), str) or array["data_type"] not in _DATA_TYPES:
        raise StoreError(
            f"{path}: array {_short(name)} has data_type {_shown(array.get('data_type'))}, "
            "expected numbers or strings"
        )
    _check_codecs(path, name, array.get("codecs"))


def _check_codecs(path: Path, name: str, codecs: Any) -> None:
    if not isinstance(codecs, list):
        raise StoreError(
            f"{path}: array {_short(name)} has codecs {_shown(codecs)}, expected a list: damaged"
        )
    for codec in codecs:
        # Zarr takes a codec's bare name too.
        codec_name = codec.get("name") if isinstance(codec, dict) else codec
        if not isinstance(codec_name, str) or codec_name not in _CODECS:
            raise StoreError(
                f"{path}: array {_short(name)} has codec {_shown(codec_name)}, expected one of "
                f"{', '.join(sorted(_CODECS))}"
            )
        settings = codec.get("configuration") if isinstance(codec, dict) else None
        if codec_name == "sharding_indexed":
            if not isinstance(settings, dict) or not _is_shape(settings.get("chunk_shape"), 1):
                raise StoreError(f"{path}: array {_short(name)} has no valid chunks in its shards: damaged")
            for field in ("codecs", "index_codecs"):
                _check_codecs(path, name, settings.get(field))


def _check_size(path: Path, name: str, array: dict[str, Any]) -> None:
    """Refuse arrays and chunks for which a reader would allocate more memory than any recording needs."""
    known, shape = BY_NAME.get(name), array["shape"]
    sharded = known is not None and known.sharded
    limit = _MAX_MAP_VALUES if sharded else _MAX_TABLE_VALUES
    # Of maps, one inference is read at a time. A length of 0 does not excuse the others.
    lengths = [max(1, length) for length in (shape[1:] if sharded else shape)]
    if math.prod(lengths) > limit or max(shape, default=0) > _MAX_MAP_VALUES:
        raise StoreError(
            f"{path}: array {_short(name)} has shape {_shown(shape)}, expected at most {limit} values: "
            "damaged"
        )
    grid = array.get("chunk_grid")
    settings = grid.get("configuration") if isinstance(grid, dict) else None
    chunks = settings.get("chunk_shape") if isinstance(settings, dict) else None
    if not _is_shape(chunks, 1) or len(chunks) != len(shape):
        raise StoreError(f"{path}: array {_short(name)} has no valid chunks: damaged")
    # Tables begin with a chunk larger than themselves, to grow into.
    if any(chunk > max(length, FRAMES_PER_CHUNK) for chunk, length in zip(chunks, shape, strict=True)):
        raise StoreError(
            f"{path}: array {_short(name)} has chunks of {_shown(chunks)}, its shape is {_shown(shape)}: "
            "damaged"
        )


def _is_shape(value: Any, least: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(length) is int and length >= least for length in value)


def _shown(value: Any) -> str:
    """Return a value's `repr` for a message: one line and short, whatever the store says."""
    try:
        return _short(repr(value))
    except (RecursionError, ValueError):  # nested too deeply, or an integer too long to write
        return f"a {type(value).__name__}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}…"
