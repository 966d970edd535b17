"""Numbers that are read without Zarr are what Zarr reads; where that is not sure, Zarr is asked."""

import itertools
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_store import write_episode
from xarray.backends.zarr import ZarrArrayWrapper
from xarray.core import indexing
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)

from lerobot_attn.errors import StoreError
from lerobot_attn.store import direct
from lerobot_attn.store.chunks import stored_arrays
from lerobot_attn.store.direct import DirectArray
from lerobot_attn.store.location import Folder
from lerobot_attn.store.pack import pack
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.writer import Compression

MAPS = "suffix_attention"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "episode_00000.zarr"
    write_episode(path, 3)
    return path


@pytest.fixture
def copy(path, tmp_path):
    return shutil.copytree(path, tmp_path / path.name)


@pytest.fixture
def asked(monkeypatch):
    """The arrays that Zarr was asked for."""
    names, ask = [], ZarrArrayWrapper.__getitem__

    def note(array, key):
        names.append(array.get_array().path)
        return ask(array, key)

    monkeypatch.setattr(ZarrArrayWrapper, "__getitem__", note)
    return names


def packed_from(path):
    list(pack(path))
    return path.with_name(path.name + ".zip")


def as_zarr_reads(path):
    return xr.open_zarr(path, consolidated=True, chunks=None)


def values_of(path):
    with as_zarr_reads(path) as data:
        return {name: variable.values for name, variable in data.variables.items()}


@pytest.mark.parametrize("compression", [("zstd", 1), ("lz4", 9), ("none", 0)], ids=lambda given: given[0])
def test_every_number_is_what_zarr_reads(tmp_path, asked, compression):
    path = tmp_path / "episode_00000.zarr"
    write_episode(path, 2, compression=Compression(*compression))
    expected = values_of(path)

    def check(data):
        assert set(data.variables) == set(expected)
        asked.clear()
        for name, values in expected.items():
            variable = data.variables[name]
            assert variable.dtype == values.dtype
            if values.dtype.kind not in "OT" and values.ndim > 1:
                np.testing.assert_array_equal(variable[-1, ..., ::2].values, values[-1, ..., ::2])
            np.testing.assert_array_equal(variable.values, values, err_msg=name)
        assert {expected[name].dtype.kind for name in asked} <= {"O", "T"}

    check(open_episode(path).arrays)
    check(open_episode(packed_from(path)).arrays)


def test_dask_reads_directly_too(path, asked):
    expected = values_of(path)[MAPS]
    lazy = pickle.loads(pickle.dumps(open_episode(path).dataset[MAPS]))
    asked.clear()
    np.testing.assert_array_equal(lazy.compute(scheduler="threads"), expected)
    assert not asked


CUTS = {
    "table": {"chunks": (4, 3, 2)},
    "shards": {"chunks": (1, 2, 3), "shards": (1, 4, 6)},
    "large shards": {"chunks": (2, 1, 3), "shards": (4, 2, 3)},
    "transposed": {"chunks": (1, 3, 2), "shards": (2, 3, 6), "filters": [TransposeCodec(order=(2, 0, 1))]},
    "transposed table": {"chunks": (3, 2, 4), "filters": [TransposeCodec(order=(1, 2, 0))]},
    "one": {"chunks": (5, 7, 6)},
}
VALUES = np.arange(5 * 7 * 6, dtype=np.int32).reshape(5, 7, 6)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """Arrays of the same values, cut in many ways, for xarray."""
    folder = tmp_path_factory.mktemp("cuts")
    group = zarr.create_group(folder)
    for name, cut in CUTS.items():
        group.create_array(name, shape=VALUES.shape, dtype="int32", **cut)[...] = VALUES
    opened = zarr.open_group(Folder(folder), mode="r")
    return {name: DirectArray(opened[name]) for name in CUTS}


def selections(length):
    places = st.integers(-length, length - 1)
    edges = st.none() | st.integers(-length - 1, length + 1)
    # An empty slice that runs backwards is more than xarray itself can read from Zarr.
    back = st.builds(slice, st.none(), st.none(), st.sampled_from([-1, -2]))
    on = st.builds(slice, edges, edges, st.sampled_from([None, 1, 2, 3]))
    return st.one_of(places, on, back, st.lists(places, max_size=6))


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
@given(cut=st.sampled_from(list(CUTS)), key=st.tuples(*map(selections, VALUES.shape)))
def test_any_selection_of_any_cut(cuts, asked, cut, key):
    dims = ("a", "b", "c")
    variable = xr.Variable(dims, indexing.LazilyIndexedArray(cuts[cut]))
    chosen = dict(zip(dims, key, strict=True))
    asked.clear()
    found = variable.isel(chosen)
    np.testing.assert_array_equal(found.values, xr.Variable(dims, VALUES).isel(chosen).values)
    assert not asked


def test_points_are_read_by_zarr(path, asked):
    """Each chunk of all inferences, steps and layers would have to be read otherwise."""
    points = {dim: xr.Variable("point", [0, 1]) for dim in ("inference", "denoise_step", "layer")}
    expected = as_zarr_reads(path)[MAPS].isel(points).values
    asked.clear()
    np.testing.assert_array_equal(open_episode(path).arrays[MAPS].isel(points).values, expected)
    assert MAPS in asked


LITTLE, BIG = BytesCodec(endian="little"), BytesCodec(endian="big")
INDEX = [LITTLE, Crc32cCodec()]
STRANGE = {
    "gzip": [LITTLE, GzipCodec(level=1)],
    "big-endian": [BIG, ZstdCodec(level=1)],
    "index first": [
        ShardingCodec(
            chunk_shape=(1, 1, 6),
            codecs=[LITTLE, ZstdCodec(level=1)],
            index_codecs=INDEX,
            index_location="start",
        )
    ],
    "index without a checksum": [
        ShardingCodec(chunk_shape=(1, 1, 6), codecs=[LITTLE], index_codecs=[LITTLE])
    ],
    "big-endian index": [
        ShardingCodec(chunk_shape=(1, 1, 6), codecs=[LITTLE], index_codecs=[BIG, Crc32cCodec()])
    ],
    "shards of shards": [
        ShardingCodec(chunk_shape=(1, 7, 6), codecs=[ShardingCodec(chunk_shape=(1, 1, 6), codecs=[LITTLE])])
    ],
    "compressed twice": [LITTLE, BloscCodec(typesize=4, cname="lz4"), GzipCodec(level=1), Crc32cCodec()],
}


@pytest.mark.parametrize("name", STRANGE)
def test_another_layout_goes_through_zarr(tmp_path, asked, name):
    metadata = {"shape": VALUES.shape, "chunk_shape": (1, 7, 6), "dtype": "int32", "zarr_format": 3}
    zarr.create(store=zarr.storage.LocalStore(tmp_path), path="x", codecs=STRANGE[name], **metadata)[...] = (
        VALUES
    )
    array = DirectArray(zarr.open_group(Folder(tmp_path), mode="r")["x"])
    np.testing.assert_array_equal(
        xr.Variable(tuple("abc"), indexing.LazilyIndexedArray(array)).values, VALUES
    )
    assert asked == ["x"]


def test_of_another_chunk_key_encoding_the_files_are_found(tmp_path, asked):
    group = zarr.create_group(tmp_path)
    keys = {"name": "v2", "separator": "."}
    group.create_array("x", shape=VALUES.shape, dtype="int32", chunks=(2, 7, 6), chunk_key_encoding=keys)[
        ...
    ] = VALUES
    array = DirectArray(zarr.open_group(Folder(tmp_path), mode="r")["x"])
    np.testing.assert_array_equal(array[indexing.BasicIndexer((slice(None),) * 3)], VALUES)
    assert not asked


def entry_at(file, number, offset, length):
    """Say in a shard's index that one of its chunks lies elsewhere; the index's checksum is right."""

    def change(array):
        with file.open("rb") as opened:
            found = array.index_of_shard(opened)
        found.entries.reshape(-1, 2)[number] = offset, length
        file.write_bytes(file.read_bytes()[: found.start] + found.encoded())

    return change


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


HARM = {
    "a byte of a chunk": lambda file: flip(file, 3),
    "a byte of the index": lambda file: flip(file, -20),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "shorter than its index": lambda file: file.write_bytes(file.read_bytes()[-9:]),
    "empty": lambda file: file.write_bytes(b""),
    "no file": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a chunk that is not there": lambda file: entry_at(file, 0, 2**64 - 1, 2**64 - 1),
    "a chunk behind the end": lambda file: entry_at(file, 0, 10_000_000, 100),
    "a chunk of exabytes": lambda file: entry_at(file, 0, 0, 2**62),
    "a chunk that reaches into the index": lambda file: entry_at(file, 0, file.stat().st_size - 90, 60),
    "an empty chunk": lambda file: entry_at(file, 0, 0, 0),
}


def outcome(read):
    """What was read, or how that failed."""
    try:
        return read().tobytes()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("harm", HARM)
def test_damage_is_what_zarr_says_it_is(copy, harm):
    array = stored_arrays(open_episode(copy))[MAPS]
    data, zarrs = open_episode(copy).arrays[MAPS], as_zarr_reads(copy)[MAPS]
    sound = outcome(lambda: data[1, 0, 0].values)
    assert isinstance(sound, bytes)
    change = HARM[harm](array.file((1, 0, 0, 0, 0, 0)))
    if callable(change):
        change(array)
    found = []
    for where in ((1, 0, 0), (1, 2, 1), (0,), (slice(None), 1)):
        found.append(outcome(lambda where=where: data[where].values))
        assert found[-1] == outcome(lambda where=where: zarrs[where].values), where
    assert found[0] != sound
    assert isinstance(found[2], bytes)  # another shard


def test_damage_of_a_table_is_what_zarr_says_it_is(copy):
    file = stored_arrays(open_episode(copy))["action_chunk"].file((0, 0, 0))
    for harm in ("a byte of a chunk", "cut short", "empty", "no file"):
        whole = file.read_bytes()
        HARM[harm](file)
        found = outcome(lambda: open_episode(copy).arrays["action_chunk"].values)
        assert found == outcome(lambda: as_zarr_reads(copy)["action_chunk"].values), harm
        assert isinstance(found, bytes) == (harm == "no file"), harm
        file.write_bytes(whole)


def test_a_shard_that_is_replaced_midway_is_read_anew(copy, monkeypatch, asked):
    """Its index is of the old file, whose chunks may lie elsewhere in the new one."""
    file = stored_arrays(open_episode(copy))[MAPS].file((1, 0, 0, 0, 0, 0))
    other = stored_arrays(open_episode(copy))[MAPS].file((2, 0, 0, 0, 0, 0))
    expected = values_of(copy)[MAPS]
    data, read = open_episode(copy).arrays, direct._read
    reads = itertools.count()

    def replace_first(source, place):
        if next(reads) == 1:  # between the index and the chunk
            new = shutil.copy(other, file.with_name("new"))
            new.replace(file)
        return read(source, place)

    monkeypatch.setattr(direct, "_read", replace_first)
    asked.clear()
    np.testing.assert_array_equal(data[MAPS][1, 2, 0].values, expected[2, 2, 0])
    assert asked == [MAPS]
    np.testing.assert_array_equal(data[MAPS][1, 2, 0].values, expected[2, 2, 0])
    assert asked == [MAPS]


def test_a_pack_that_is_replaced_is_refused(copy):
    packed = packed_from(copy)
    a_map = open_episode(packed).arrays[MAPS][1, 2, 0]
    packed.write_bytes(packed.read_bytes() + b" ")
    with pytest.raises(StoreError, match="another file has taken its place"):
        a_map.load()


def test_many_chunks_are_decoded_by_threads_that_end(tmp_path, asked, monkeypatch):
    shape = (4, 60, 50, 90)
    values = np.random.default_rng(0).random(shape, dtype=np.float32)
    group = zarr.create_group(tmp_path)
    group.create_array("x", shape=shape, dtype="float32", chunks=(1, 60, 50, 90), shards=(2, 60, 50, 90))[
        ...
    ] = values
    array = DirectArray(zarr.open_group(Folder(tmp_path), mode="r")["x"])
    names, read = set(), direct._read

    def note(source, place):
        names.add(threading.current_thread().name.rpartition("_")[0])
        return read(source, place)

    monkeypatch.setattr(direct, "_read", note)
    monkeypatch.setattr(direct, "n_cores", lambda: 3)
    key = indexing.OuterIndexer((slice(None), 5, np.array([1, 7]), slice(None)))
    np.testing.assert_array_equal(array[key], values[:, 5, [1, 7]])
    assert "lerobot-attn-reader" in names
    assert not asked
    assert not [thread for thread in threading.enumerate() if "lerobot-attn-reader" in thread.name]


def test_threads_read_side_by_side(path, asked):
    expected = values_of(path)[MAPS]
    data = open_episode(path).arrays[MAPS]
    places = list(itertools.product(*map(range, expected.shape[:3]))) * 5
    asked.clear()
    with ThreadPoolExecutor(8) as pool:
        for place, found in zip(places, pool.map(lambda place: data[place].values, places), strict=True):
            np.testing.assert_array_equal(found, expected[place])
    assert not asked


def test_what_is_read_may_be_changed(path):
    found = open_episode(path).arrays[MAPS][0, 0, 0].values
    found += 1
    assert (open_episode(path).arrays[MAPS][0, 0, 0].values != found).all()
