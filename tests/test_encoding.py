"""Chunks that the package encodes itself are what Zarr writes; threads share those of a shard."""

import itertools
import json
import threading

import numpy as np
import pytest
import zarr
from test_store import SIZES, write_episode

from lerobot_attn.store.chunks import stored_arrays
from lerobot_attn.store.encoding import ArrayEncoder
from lerobot_attn.store.files import replace_bytes
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.schema import BY_NAME
from lerobot_attn.store.writer import Compression, create_array


def files_of(folder):
    return {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}


def chunks_of_shard(array, file):
    """Index of a chunk inside its shard -> its bytes, which lie in the file one after another."""
    with file.open("rb") as opened:
        entries = array.index_of_shard(opened).entries.astype(int)
    content = file.read_bytes()
    places = list(itertools.product(*map(range, array.n_inside)))
    assert sum(entries[place][1] for place in places) + 16 * len(places) + 4 == len(content)
    return {place: content[entries[place][0] :][: entries[place][1]] for place in places}


@pytest.mark.parametrize("compression", [("zstd", 1), ("lz4", 9), ("none", 0)], ids=lambda given: given[0])
def test_every_chunk_is_what_zarr_writes(tmp_path, compression):
    """70 inferences and 140 frames: the small arrays have a full chunk and one that is not."""
    ours = tmp_path / "ours.zarr"
    write_episode(ours, 70, compression=Compression(*compression))
    episode = open_episode(ours)
    group = zarr.create_group(tmp_path / "zarrs")
    for name, array in stored_arrays(episode).items():
        values = array.array[...]
        n_rows = len(values) if BY_NAME[name].grows_with else 0
        theirs = create_array(group, BY_NAME[name], SIZES, Compression(*compression), n_rows=n_rows)
        theirs[...] = values
        folder = tmp_path / "zarrs" / name
        assert json.loads((array.folder / "zarr.json").read_text()) == json.loads(
            (folder / "zarr.json").read_text()
        )
        written, expected = files_of(array.folder), files_of(folder)
        assert written.keys() == expected.keys(), name
        for file, path in written.items():
            if file.name == "zarr.json":
                continue
            if array.is_sharded:
                assert chunks_of_shard(array, path) == chunks_of_shard(array, expected[file]), (name, file)
            else:
                assert path.read_bytes() == expected[file].read_bytes(), (name, file)


def large_array(tmp_path):
    """An array whose shard has 12 chunks of 0.24 MB; its metadata and a row of it."""
    sizes = {**SIZES, "denoise_step": 4, "layer": 3, "query": 50, "key": 1200}
    group = zarr.create_group(tmp_path / "large.zarr")
    create_array(group, BY_NAME["suffix_attention"], sizes, Compression(), n_rows=1)
    folder = tmp_path / "large.zarr" / "suffix_attention"
    rng = np.random.default_rng(0)
    return folder, rng.random((1, 4, 3, 2, 50, 1200), dtype=np.float32).astype(np.float16)


def test_a_shard_is_encoded_on_as_many_threads_as_asked_for(tmp_path):
    folder, values = large_array(tmp_path)
    encoder = ArrayEncoder(json.loads((folder / "zarr.json").read_text()))

    def encoders():
        return [thread for thread in threading.enumerate() if "encoder" in thread.name]

    expected = list(encoder.parts(values))
    parts = encoder.parts(values, n_threads=3)
    found = [next(parts)]
    assert 1 < len(encoders()) <= 3
    found += parts
    assert [bytes(part) for part in found] == [bytes(part) for part in expected]
    assert not encoders()
    replace_bytes(folder / "c/0/0/0/0/0/0", encoder.parts(values, n_threads=3))
    np.testing.assert_array_equal(zarr.open_array(folder, mode="r")[...], values)


def test_what_cannot_be_written_leaves_the_old_file_and_no_thread(tmp_path):
    folder, values = large_array(tmp_path)
    encoder = ArrayEncoder(json.loads((folder / "zarr.json").read_text()))
    file = folder / "c/0/0/0/0/0/0"
    replace_bytes(file, [b"old"])

    def full(parts):
        yield next(parts)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_bytes(file, full(encoder.parts(values, n_threads=2)))
    assert [found.name for found in file.parent.iterdir()] == ["0"]
    assert file.read_bytes() == b"old"
    assert not [thread for thread in threading.enumerate() if "encoder" in thread.name]


def test_another_shape_or_codec_is_refused(tmp_path):
    folder, values = large_array(tmp_path)
    metadata = json.loads((folder / "zarr.json").read_text())
    with pytest.raises(ValueError, match="got values of shape"):
        list(ArrayEncoder(metadata).parts(values[:, :3]))
    sharding = metadata["codecs"][0]["configuration"]
    sharding["codecs"].append({"name": "gzip", "configuration": {"level": 1}})
    with pytest.raises(ValueError, match="codec 'gzip'"):
        ArrayEncoder(metadata)
