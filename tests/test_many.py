"""Thousands of episodes, a hundred readers, and an episode that grows while it is read."""

import hashlib
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc

import numpy as np
import pytest
from test_store import frame_rows, inference_rows, make_writer, write_episode

from lerobot_attn.errors import StoreError
from lerobot_attn.store.reader import open_episode, open_run

N_EPISODES = 10_000
N_READERS = 100


@pytest.fixture(scope="module")
def ten_thousand(tmp_path_factory):
    """A run whose episodes have their metadata alone, which is all that opening reads."""
    folder = tmp_path_factory.mktemp("ten_thousand")
    write_episode(folder / "one.zarr", 2)
    metadata = (folder / "one.zarr" / "zarr.json").read_bytes()
    for index in range(N_EPISODES):
        store = folder / "run" / "attention" / f"task_{index // 100}" / f"episode_{index % 100:05d}.zarr"
        store.mkdir(parents=True)
        (store / "zarr.json").write_bytes(metadata)
    return folder / "run"


@pytest.mark.alone
def test_a_run_of_ten_thousand_opens_within_a_second(ten_thousand):
    open_run(ten_thousand)  # warm: the folders are in the system's cache
    start = time.process_time()  # whatever else the machine does
    run = open_run(ten_thousand)
    n, last = len(run), run[-1]
    seconds = time.process_time() - start
    assert n == N_EPISODES
    assert last.n_inferences == 2
    assert seconds < 1


@pytest.mark.alone
def test_memory_stays_when_ten_thousand_episodes_pass(ten_thousand):
    run = open_run(ten_thousand)
    episodes = iter(run)
    next(episodes)
    tracemalloc.start()
    try:
        for _ in range(100):
            next(episodes)
        _, after_100 = tracemalloc.get_traced_memory()
        for _ in range(500):
            next(episodes)
        _, after_600 = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Which stores opened is remembered: some hundred bytes each, and no episode.
    assert after_600 - after_100 < 500 * 500


def test_damaged_stores_are_passed_over_and_listed(tmp_path):
    for index in range(3):
        write_episode(tmp_path / "task_0" / f"episode_{index:05d}.zarr", 2)
    broken = tmp_path / "task_0" / "episode_00001.zarr"
    (broken / "zarr.json").write_text("{")
    run = open_run(tmp_path)
    assert len(run) == 3
    assert [episode.path.name for episode in run] == ["episode_00000.zarr", "episode_00002.zarr"]
    assert [episode.path.name for episode in run.episodes] == ["episode_00000.zarr", "episode_00002.zarr"]
    ((path, reason),) = run.damaged
    assert path == broken
    assert "damaged" in reason
    with pytest.raises(StoreError, match="damaged"):
        run[1]
    assert run[2].path.name == "episode_00002.zarr"


READERS = """
import hashlib, os, sys
from lerobot_attn.store.reader import open_episode
import dask.array, xarray, zarr  # before the fork: a hundred imports would take minutes

def digest():
    data = open_episode({path!r}).arrays
    return hashlib.sha256(b"".join(data[name].values.tobytes() for name in {names!r})).hexdigest()

ready, go = os.pipe(), os.pipe()
children = []
for number in range({n}):
    child = os.fork()
    if child == 0:
        os.close(go[1])
        os.write(ready[1], b".")
        os.read(go[0], 1)  # all at once: until the parent closes its end
        try:
            os._exit(0 if digest() == {digest!r} else 1)
        except BaseException:
            os._exit(2)
    children.append(child)
for _ in children:
    os.read(ready[0], 1)
os.close(go[1])
print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.alone
def test_a_hundred_readers_at_once(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    write_episode(path, 3)
    names = ["suffix_attention", "suffix_attention_mean", "key_kind", "token_id", "frame_inference"]
    data = open_episode(path).arrays
    digest = hashlib.sha256(b"".join(data[name].values.tobytes() for name in names)).hexdigest()
    code = READERS.format(path=str(path), names=names, n=N_READERS, digest=digest)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([0] * N_READERS)


def test_following_a_store_that_grows(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    rng = np.random.default_rng(0)
    writer = make_writer(path)
    written, read = [], threading.Semaphore(0)

    def write():
        for index in range(4):
            rows = inference_rows(rng, index)
            written.append(rows["suffix_attention"])
            writer.append_inference(rows)
            writer.append_frames(frame_rows(rng, index))
            writer.commit()
            read.acquire(timeout=30)  # until the reader has seen it
        writer.close(complete=True)

    thread = threading.Thread(target=write)
    seen = []
    for episode in open_episode(path).follow(poll_s=0.01, timeout_s=30):
        if not seen:
            thread.start()  # what is yielded first is the store as it was
        maps = episode.arrays["suffix_attention"].values
        seen.append((episode.n_inferences, episode.is_complete))
        np.testing.assert_array_equal(maps, np.array(written[: len(maps)]).reshape(maps.shape))
        assert len(maps) == len(episode.arrays["frame_inference"]) // 2 == episode.n_inferences
        if episode.n_inferences:
            read.release()
    thread.join(30)
    assert seen == [(0, False), (1, False), (2, False), (3, False), (4, False), (4, True)]


def test_following_ends_where_nothing_comes(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    write_episode(path, 2, complete=False)
    start = time.monotonic()
    (episode,) = open_episode(path).follow(poll_s=0.01, timeout_s=0.1)
    assert episode.n_inferences == 2
    assert 0.1 <= time.monotonic() - start < 10


def test_following_a_complete_store_yields_it_once(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    write_episode(path, 2)
    assert [episode.n_inferences for episode in open_episode(path).follow()] == [2]


def test_refreshing_a_removed_store_says_so(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    write_episode(path, 2)
    episode = open_episode(path)
    path.rename(tmp_path / "elsewhere.zarr")
    with pytest.raises(StoreError, match="no such store"):
        episode.refresh()


def test_an_episode_stays_as_it_was_opened(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    rng = np.random.default_rng(0)
    writer = make_writer(path)
    for index in range(2):
        writer.append_inference(inference_rows(rng, index))
        writer.append_frames(frame_rows(rng, index))
        writer.commit()
        if index == 0:
            episode = open_episode(path)
    for data in (episode.arrays, episode.dataset):
        assert data.sizes["inference"] == episode.n_inferences == 1
        assert data.sizes["frame"] == episode.n_frames == 2
    assert episode.refresh().arrays.sizes["inference"] == 2
