"""The index of a run, a row an episode, so that a table of thousands opens none of their stores.

    attention/attention-index.parquet      # beside the tasks' folders; pandas.read_parquet opens it
    attention/.lerobot-attn-index/         # while a recording goes on: a small file an episode

A row is of a complete episode alone, and is believed only while the file in which the store says so has the
size and the time of change that it had. So an index may be old, of another copy of the run, or lost: then
stores are read. Whoever records adds a file of its own for each episode, and makes one table of them when it
ends. Knows files and what stores say of themselves; opens no array.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lerobot_attn.errors import first_line
from lerobot_attn.store.attributes import Header, read_header
from lerobot_attn.store.files import replace_json
from lerobot_attn.store.location import files_at, signature_of
from lerobot_attn.store.url import Place

logger = logging.getLogger(__name__)

INDEX = "attention-index.parquet"
PARTS = ".lerobot-attn-index"
WORTH = 16  # episodes: of fewer, the stores themselves are read in no time
_MAX_BYTES = 512_000_000
_MAX_ROWS = 4_000_000
_MAX_PART_BYTES = 100_000


class TableRow(NamedTuple):
    """An episode in `Run.table`."""

    task_group: Any
    task_id: Any
    episode: Any
    task: str
    condition: str  # its name; "baseline" where nothing was done to the policy
    success: bool | None
    frames: int
    inferences: int
    bytes: int
    complete: bool
    dataset: str | None  # the data set's repo_id, whose episode `episode` is
    path: str

    @classmethod
    def of(cls, episode: Any) -> TableRow:
        """Return the row of an `Episode`; looks at the size of each of its files."""
        return IndexRow.of(episode.path, episode.header).table


class Stamp(NamedTuple):
    """What a store's metadata, or its file where it is packed, looked like. It changes with every commit."""

    mtime_ns: int
    size: int


class IndexRow(NamedTuple):
    """What is known of an episode without opening its store.

    Attributes:
        table: its row in `Run.table`.
        stamp: of the store when the row was made; None at a URL.
        seed: of its environment, if it had one.
        policy: the policy's type and where it came from, one line.
        condition_text: what was done to the policy, in words; "" where nothing was.
        random_weights: whether the policy was a demo whose maps mean nothing.
        policy_remark: a line that belongs beside the policy's maps; "" if none.
        n_expected: episodes that its recording was to have in all, as far as it said.
        created: when it began, ISO 8601, as far as it said.
        sum_reward: of its frames; None where the store does not say it in its attributes.
        max_reward: likewise the largest.
        camera: the first one of which the store lists a video; "" if none, None where it has no such list.
        video: that video's file, beside the store; None where it is a part of another file.
        has_ended: whether its recording has closed the store, complete or not.
    """

    table: TableRow
    stamp: Stamp | None
    seed: int | None
    policy: str
    condition_text: str
    random_weights: bool
    policy_remark: str
    n_expected: int | None
    created: str | None
    sum_reward: float | None
    max_reward: float | None
    camera: str | None
    video: str | None
    has_ended: bool = True

    @classmethod
    def of(
        cls, place: Place, header: Header, stamp: Stamp | None = None, *, n_bytes: int | None = None
    ) -> IndexRow:
        """Return the row of a store.

        Args:
            place: the store.
            header: what it says of itself.
            stamp: taken before that was read.
            n_bytes: of the store; None: looks at the size of each of its files.

        Raises:
            OSError: a file cannot be looked at.
        """
        said, condition, policy = header.attributes, header.condition, header.attributes.get("policy", {})
        dataset = said.get("dataset")
        repository = dataset.get("repo_id") if isinstance(dataset, Mapping) else None
        table = TableRow(
            said.get("task_group"),
            said.get("task_id"),
            said.get("episode_index"),
            header.task,
            condition.name,
            header.success,
            header.n_frames,
            header.n_inferences,
            _bytes_of(place) if n_bytes is None else n_bytes,
            header.is_complete,
            str(repository) if repository else None,
            str(place),
        )
        return cls(
            table,
            stamp,
            header.seed,
            " ".join(str(policy[name]) for name in ("type", "path") if policy.get(name)),
            condition.text,
            header.has_random_weights,
            header.policy_remark,
            _whole(said.get("n_episodes_expected")),
            header.created,
            _number(said.get("sum_reward")),
            _number(said.get("max_reward")),
            *header.first_video,
            header.is_complete or "interrupted_by" in said,
        )


# What the file has: name → type, and whether it may be missing. A store's path is relative to the index's.
_COLUMNS: dict[str, tuple[type, bool]] = {
    "store": (str, False),
    "mtime_ns": (int, False),
    "size": (int, False),
    "task_group": (str, True),
    "task_id": (int, True),
    "episode": (int, True),
    "task": (str, False),
    "condition": (str, False),
    "success": (bool, True),
    "frames": (int, False),
    "inferences": (int, False),
    "bytes": (int, False),
    "complete": (bool, False),
    "dataset": (str, True),
    "seed": (int, True),
    "policy": (str, False),
    "condition_text": (str, False),
    "random_weights": (bool, False),
    "policy_remark": (str, False),
    "n_expected": (int, True),
    "created": (str, True),
    "sum_reward": (float, True),
    "max_reward": (float, True),
    "camera": (str, True),
    "video": (str, True),
}
# What the columns mean; another number where that changes, so that rows of another meaning are not believed.
_FORMAT = 2
_FORMAT_NAME = "lerobot_attn_index"
_N_TABLE = len(TableRow._fields) - 1  # all but the path
type Values = tuple[Any, ...]  # of the columns behind `store`, in their order


class Index:
    """What is on disk of a run's rows: in its own index, and in those of the jobs that recorded it.

    Args:
        home: where the run's own index lies, see `home_of`; None: there is none.
    """

    def __init__(self, home: Path | None):
        self._home = home
        self._table = {} if home is None else _read_table(home / INDEX)
        self._held: dict[str, dict[str, Values]] = {}
        if home is not None:
            self._held[str(home)] = self._table | _read_parts(home)
        self._found: dict[str, Values] = {}  # path → values, of the rows that were handed out

    def row(self, store: Path, stamp: Stamp) -> IndexRow | None:
        """Return a store's row; None where there is none, or it is of what the store was before."""
        path = str(store)
        for folder in (self._home, store.parent.parent):
            values = None if folder is None else self._of(str(folder)).get(_below(path, str(folder)))
            if values is not None and values[:2] == stamp:
                self._found[path] = values
                table = TableRow._make((*values[2 : 2 + _N_TABLE], path))
                return IndexRow(table, stamp, *values[2 + _N_TABLE :])
        return None

    def keep(self, rows: Iterable[IndexRow]) -> None:
        """Write the run's own index anew, if these are not the rows that it holds."""
        if self._home is None:
            return
        folder, kept = str(self._home), dict[str, Values]()
        for row in rows:
            path = row.table.path
            found = self._found.get(path)
            one = (_below(path, folder), found) if found is not None else values_of(row, self._home)
            kept |= [] if one is None else [one]
        # Of a few episodes only what a recording has written is kept in one table.
        if kept != self._table and len(kept) >= WORTH:
            write_index(self._home, kept)

    def _of(self, folder: str) -> dict[str, Values]:
        if folder not in self._held:
            self._held[folder] = read_index(Path(folder))
        return self._held[folder]


def stamp_of_store(store: Place) -> Stamp | None:
    """Return what a store looks like now; None where it is gone, and at a URL."""
    if not isinstance(store, Path):
        return None
    try:
        _, mtime_ns, size = signature_of(store)
    except OSError:
        return None
    return Stamp(mtime_ns, size)


def read_index(folder: Path) -> dict[str, Values]:
    """Return the rows that lie in a folder: a store's path in it → values. Damaged ones are passed over."""
    return _read_table(folder / INDEX) | _read_parts(folder)


def _read_parts(folder: Path) -> dict[str, Values]:
    held: dict[str, Values] = {}
    for part in _parts(folder):
        with suppress(OSError, ValueError, RecursionError):
            if part.stat().st_size <= _MAX_PART_BYTES:
                values = json.loads(part.read_text(encoding="utf-8"))
                is_ours = isinstance(values, dict) and values.pop(_FORMAT_NAME, None) == _FORMAT
                if is_ours and _is_row(values):
                    held[values["store"]] = tuple(values[name] for name in list(_COLUMNS)[1:])
    return held


def write_index(folder: Path, rows: Mapping[str, Values]) -> bool:
    """Replace a folder's table in one step.

    Args:
        folder: where.
        rows: as `read_index` returns them.

    Returns:
        Whether it could be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(_COLUMNS)
    columns = [list(rows), *map(list, zip(*rows.values(), strict=True))] if rows else [[] for _ in names]
    temporary = folder / f".{INDEX}.{os.getpid()}.new"
    try:
        pq.write_table(pa.table(dict(zip(names, columns, strict=True)), schema=_schema()), temporary)
        temporary.replace(folder / INDEX)
    except (OSError, pa.ArrowException) as error:
        logger.debug("%s: no index there: %s", folder, first_line(error))
        with suppress(OSError):
            temporary.unlink()
        return False
    return True


def values_of(row: IndexRow, folder: Path) -> tuple[str, Values] | None:
    """Return what an index in a folder holds of a row.

    Returns:
        The store's path in the folder and its values; None of an episode that is not complete, or that says
        of itself what the columns cannot hold.
    """
    table, stamp, *rest, _ = row
    if stamp is None or not table.complete:
        return None
    name = _below(table.path, str(folder))
    values = (*stamp, *table[:_N_TABLE], *rest)
    return (name, values) if _is_row(dict(zip(_COLUMNS, (name, *values), strict=True))) else None


def folders_of(stores: Iterable[Path]) -> list[Path]:
    """Return the folders that hold the stores' tasks: where their recordings write."""
    tasks = {store.parent for store in stores}
    return sorted({task.parent for task in tasks})


def home_of(root: Path, stores: Sequence[Path]) -> Path | None:
    """Return where the index of a run belongs: the folder of its tasks, or what holds those of several jobs.

    Args:
        root: of the run.
        stores: its episodes.

    Returns:
        A folder that is the root or in it; None of one task's folder, whose run is not all there.
    """
    found = folders_of(stores)
    inside = all(folder == root or root in folder.parents for folder in found)
    return None if not found or not inside else found[0] if len(found) == 1 else root


def note_episode(store: Path) -> None:
    """Add a complete episode to the index of its folder. Whatever goes wrong, it is a row less."""
    folder = store.parent.parent
    try:
        stamp = stamp_of_store(store)
        found = values_of(IndexRow.of(store, read_header(store), stamp), folder)
        if found is None:
            return
        name, values = found
        parts = folder / PARTS
        parts.mkdir(exist_ok=True)
        # Named after the store, so that no two processes write the same one.
        file = parts / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.json"
        row = dict(zip(_COLUMNS, (name, *values), strict=True))
        replace_json(file, {_FORMAT_NAME: _FORMAT, **row})
    except (OSError, ValueError) as error:
        logger.debug("%s: not in the index: %s", store, first_line(error))


def gather_parts(folder: Path) -> None:
    """Make one table of a folder's index and its parts; rows of stores that are gone or changed are dropped.

    For the process that records into the folder, when it ends.
    """
    parts = list(_parts(folder))
    if not parts:
        return
    held = {
        name: values
        for name, values in read_index(folder).items()
        if values[:2] == stamp_of_store(folder / name)
    }
    if write_index(folder, held):
        for part in parts:
            part.unlink(missing_ok=True)
        with suppress(OSError):
            (folder / PARTS).rmdir()


def _bytes_of(place: Place) -> int:
    for _ in range(3):
        with suppress(FileNotFoundError):  # its recording renamed a file between two looks at it
            return files_at(place).total_bytes()
    return files_at(place).total_bytes()


def _below(path: str, folder: str) -> str:
    """Return a store's path in a folder, as an index has it."""
    if folder == ".":
        return path
    return path[len(folder) + 1 :] if path.startswith(folder) else ""


def _parts(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder / PARTS) as entries:
            return [Path(entry.path) for entry in entries if entry.name.endswith(".json")]
    except OSError:
        return []


def _is_row(values: Mapping[str, Any]) -> bool:
    """Return whether these are a row's values: all, each of its type, and such that a table holds them."""
    for name, (kind, optional) in _COLUMNS.items():
        value = values.get(name)
        if value is None and optional and name in values:
            continue
        if type(value) is not kind or (isinstance(value, int) and not -(2**63) <= value < 2**63):
            return False
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:  # half of a pair of surrogates
                return False
    return len(values) == len(_COLUMNS) and bool(values["store"]) and values["complete"] is True


def _read_table(path: Path) -> dict[str, Values]:
    """Return the rows of an index; none where it is not there, damaged, or of another version."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > _MAX_ROWS or not _is_ours(file.schema_arrow):
                return {}
            columns = file.read(use_threads=False).to_pydict()
        names, *others = (columns[name] for name in _COLUMNS)
        return dict(zip(names, zip(*others, strict=True), strict=True))
    except FileNotFoundError:
        return {}
    except Exception as error:  # pyarrow raises many kinds for damaged files
        logger.debug("%s: passed over: %s", path, first_line(error))
        return {}


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _schema() -> Any:
    import pyarrow as pa

    types = {str: pa.string(), int: pa.int64(), bool: pa.bool_(), float: pa.float64()}
    fields = [pa.field(name, types[kind], nullable=optional) for name, (kind, optional) in _COLUMNS.items()]
    return pa.schema(fields, metadata={_FORMAT_NAME: str(_FORMAT)})


def _is_ours(schema: Any) -> bool:
    """Return whether a table has the columns of this version, and they mean the same."""
    own = _schema()
    said = (schema.metadata or {}).get(_FORMAT_NAME.encode())
    return bool(schema.equals(own)) and said == own.metadata[_FORMAT_NAME.encode()]
