"""Recordings at URLs: read in place, in few requests, with the checks of every store."""

import json
import pickle
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from changed import without_copies
from servers import serving

from lerobot_attn import cli, inspection
from lerobot_attn.analysis.runs import summarise_run
from lerobot_attn.errors import LerobotAttnError, SetupError, StoreError
from lerobot_attn.explorer.library import Library
from lerobot_attn.overlay import OverlaySettings, overlay_frames
from lerobot_attn.plot import plot
from lerobot_attn.report import CompareSettings, write_report
from lerobot_attn.store import remote
from lerobot_attn.store.damage import find_damage
from lerobot_attn.store.pack import pack
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.repair import repair
from lerobot_attn.store.runs import open_run
from lerobot_attn.store.url import Url, place_of
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

pytest.importorskip("obstore")

PLAN = SyntheticPlan(n_frames=4)
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of buckets: `plain` has a run of two episodes, `packed` the same run, packed."""
    folder = tmp_path_factory.mktemp("served")
    for number in (0, 1):
        write_planted_episode(
            folder / "plain" / "run", replace(PLAN, episode_index=number, success=not number)
        )
    shutil.copytree(folder / "plain", folder / "packed")
    list(pack(folder / "packed"))
    return folder


STORE = "run/attention/synthetic_0/episode_00000.zarr"
WHERE = {"plain": f"plain/{STORE}", "packed": f"packed/{STORE}.zip"}


@pytest.fixture
def web(folder):
    """A plain HTTP server of the folder."""
    with serving(folder) as server:
        yield server


@pytest.fixture
def s3(folder, monkeypatch):
    """An S3 server of the folder, with keys for it in the environment."""
    with serving(folder, buckets=True) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(params=["web", "s3"])
def server(request):
    """Each of them in turn; its `at` gives the URL of a path below the folder."""
    server = request.getfixturevalue(request.param)
    server.at = f"{server.url}/{{}}".format if request.param == "web" else "s3://{}".format
    return server


@pytest.fixture
def at(server):
    """Gives the URL of a path below the folder."""
    return server.at


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["lerobot-attn", *map(str, args)])
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code
    return 0


# What is an address


@pytest.mark.parametrize(
    ("text", "root", "key"),
    [
        ("s3://bucket/a/b.zarr", "s3://bucket", "a/b.zarr"),
        ("S3://bucket//a/", "s3://bucket", "a"),
        ("gs://bucket", "gs://bucket", ""),
        ("https://example.org:8/a%20b/c.zarr", "https://example.org:8", "a b/c.zarr"),
        ("hf://datasets/user/name/run/c.zarr", "hf://datasets/user/name", "run/c.zarr"),
        ("hf://datasets/user/name@main/c.zarr", "hf://datasets/user/name@main", "c.zarr"),
    ],
)
def test_addresses(text, root, key):
    found = place_of(text)
    assert found == Url(root, key)
    assert place_of(str(found).replace(" ", "%20")) == found


@pytest.mark.parametrize("text", ["outputs/eval", "/a/s3:/b", "h#1", "a?b", "x::y", "c:/x", "s3:/bucket"])
def test_paths_stay_paths(text):
    assert place_of(text) == Path(text)
    assert place_of(Path(text)) == Path(text)


def test_names_of_an_address():
    url = Url("s3://bucket", "run/task_0/episode_00000.zarr.zip")
    assert (url.name, url.suffix, url.parent.name) == ("episode_00000.zarr.zip", ".zip", "task_0")
    assert str(url.parent / "x.mp4") == "s3://bucket/run/task_0/x.mp4"
    assert url.relative_to(Url("s3://bucket", "run")).parts == ("task_0", "episode_00000.zarr.zip")


# Who reads it


@pytest.mark.parametrize("form", WHERE)
def test_every_value_is_the_same(folder, at, form):
    there, here = open_episode(at(WHERE[form])), open_episode(folder / WHERE["plain"])
    assert there.attributes == here.attributes
    xr.testing.assert_identical(there.dataset.compute(), here.dataset.compute())
    for name, variable in here.arrays.variables.items():
        np.testing.assert_array_equal(there.arrays[name].values, variable.values)
    moved = pickle.loads(pickle.dumps(there.dataset.suffix_attention))
    np.testing.assert_array_equal(moved.values, here.arrays.suffix_attention.values)


def test_all_that_look_take_it(folder, s3, tmp_path):
    there, here = open_episode(f"s3://{WHERE['packed']}"), open_episode(folder / WHERE["plain"])
    described, same = inspection.describe_episode(there), inspection.describe_episode(here)
    for name in ("attention_mass", "arrays", "saved", "segments", "row_sum_max_deviation"):
        assert described[name] == same[name]
    assert described["stored_bytes"] > 0
    images = [axes.images[0].get_array() for axes in plot(there, "image").axes if axes.images]
    wanted = [axes.images[0].get_array() for axes in plot(here, "image").axes if axes.images]
    for image, want in zip(images, wanted, strict=True):
        np.testing.assert_array_equal(image, want)
    settings = OverlaySettings(frames=[0, 3])
    for ours, theirs in zip(overlay_frames(there, settings), overlay_frames(here, settings), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert all(
        Path(file).exists()
        for file in write_report([there], [here], tmp_path / "report", CompareSettings(video=False))
    )
    assert not find_damage(there.path).damaged


@pytest.mark.parametrize("bucket", ["plain", "packed"])
@pytest.mark.parametrize("below", ["run", "run/attention", "run/attention/synthetic_0"])
def test_runs_are_found(folder, s3, bucket, below):
    found, wanted = open_run(f"s3://{bucket}/{below}"), open_run(folder / bucket / below)
    assert [str(store) for store in found.stores] == [
        f"s3://{store.relative_to(folder).as_posix()}" for store in wanted.stores
    ]
    assert len(found) == 2
    assert not found.damaged


def test_runs_are_summed_up_and_served(folder, s3):
    found, wanted = open_run("s3://packed/run"), open_run(folder / "packed/run")
    assert found.table.drop(columns="path").equals(wanted.table.drop(columns="path"))
    tables = [summarise_run(run, "modality_share").table for run in (found, wanted)]
    np.testing.assert_allclose(*(table.select_dtypes("number").to_numpy() for table in tables))
    library = Library("s3://packed/run")
    rows = library.look().summaries
    assert [row.id for row in rows] == [row.id for row in Library(folder / "packed/run").look().summaries]
    episode = library.episode(rows[0].id)
    assert library.video(episode, next(iter(episode.videos))) is not None


def test_commands(folder, s3, monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, "inspect", f"s3://{WHERE['packed']}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["path"] == f"s3://{WHERE['packed']}"
    file = tmp_path / "x.mp4"
    assert command(monkeypatch, "overlay", f"s3://{WHERE['plain']}", "-o", file, "--frames", "0") == 0
    assert file.exists()
    with pytest.raises(StoreError, match="read-only"):
        repair("s3://plain/run")


# How often it asks


def asked_of(server):
    """What was asked for since the last call, but for videos."""
    asked = [request for request in server.asked if not request.path.endswith(".mp4")]
    server.asked.clear()
    return asked


def test_a_heatmap_of_a_folder_asks_for_the_metadata_and_the_map(folder, server, at):
    episode = open_episode(at(WHERE["plain"]))
    assert [request.path for request in asked_of(server)] == [f"{WHERE['plain']}/zarr.json"]
    chosen = {"layer": 3, "denoise_step": 0}
    found = episode.arrays.suffix_attention.sel(chosen)[1, 0].values
    here = open_episode(folder / WHERE["plain"]).arrays
    np.testing.assert_array_equal(found, here.suffix_attention.sel(chosen)[1, 0].values)
    (asked,) = asked_of(server)
    assert asked.path.startswith(f"{WHERE['plain']}/suffix_attention/c/1/")
    first, last = asked.range.removeprefix("bytes=").split("-")
    assert int(last) - int(first) < here.suffix_attention[0, 0, 0].nbytes  # one map and no more
    # Where the map belongs, and what its keys are, came with the metadata.
    for kind, arrays in {
        "image": ["suffix_attention"],
        "text": ["suffix_attention", "suffix_attention_mean"],
    }.items():
        assert plot(episode, kind).axes
        paths = [request.path.removeprefix(f"{WHERE['plain']}/") for request in asked_of(server)]
        assert [path.partition("/c/")[0] for path in paths] == arrays


def test_a_heatmap_of_a_packed_episode_takes_a_handful_of_requests(server, at, monkeypatch):
    # As of a large episode, whose maps are not in the part that is read first.
    monkeypatch.setattr(remote, "_TAIL_BYTES", 8000)
    episode = open_episode(at(WHERE["packed"]))
    values = episode.arrays.suffix_attention[1, -1, -1, 0].values
    assert values.any()
    asked = asked_of(server)
    # Its size, its list of members, the tables and the map.
    assert [request.method for request in asked] == ["HEAD", "GET", "GET", "GET"], asked
    assert plot(episode, "image").axes
    assert len(asked_of(server)) == 1


def test_a_heatmap_of_an_older_folder_reads_one_map_and_the_tables_that_it_needs_once(folder, tmp_path):
    store = without_copies(shutil.copytree(folder / WHERE["plain"], tmp_path / "episode_00000.zarr"))
    labels = {
        name for name, variable in open_episode(store).arrays.variables.items() if variable.dims == (name,)
    }
    with serving(tmp_path) as web:
        episode = open_episode(f"{web.url}/{store.name}")
        assert len(asked_of(web)) == 1  # consolidated metadata
        assert episode.arrays.suffix_attention.sel(layer=3, denoise_step=0)[1, 0].values.any()
        # What dimensions are called, then of the map its shard's index and itself.
        assert len(asked_of(web)) == len(labels) + 2 == 8
        assert plot(episode, "image").axes
        # Where the map belongs, too.
        asked = asked_of(web)
        assert len(asked) == 7 + 2
        maps = [request for request in asked if "/suffix_attention/c/" in request.path]
        assert len(maps) == 2
        assert maps[0].range.startswith("bytes=-")
        tables = Counter(request.path for request in asked if request not in maps)
        assert set(tables.values()) == {1}
        assert plot(episode, "text").axes
        others = Counter(request.path for request in asked_of(web) if request.range is None)
        assert set(others.values()) == {1}
        assert not others.keys() & tables.keys()


def test_tables_that_are_not_there_are_asked_for_once_and_errors_are_told(folder, tmp_path, monkeypatch):
    store = without_copies(shutil.copytree(folder / WHERE["plain"], tmp_path / "episode_00000.zarr"))
    shutil.rmtree(store / "key_row" / "c")
    with serving(tmp_path) as server:
        there = open_episode(f"{server.url}/episode_00000.zarr")
        with ThreadPoolExecutor(4) as threads:
            found = [*threads.map(lambda name: there.arrays[name].values, ["key_row", "key_column"] * 4)]
        assert len({*found[0].tolist()}) == 1  # the fill value
        assert len({*found[1].tolist()}) > 1
        assert Counter(request.path for request in server.asked)["episode_00000.zarr/key_row/c/0"] == 1
        again = open_episode(f"{server.url}/episode_00000.zarr")
        assert again.arrays.sizes  # what opening reads is read
        files = remote.remote_at(again.path)
        with monkeypatch.context() as patched:
            patched.setattr(files, "_store", Broken())
            with pytest.raises(StoreError, match=r"cannot be read: the line is cut"):
                _ = again.arrays["key_column"].values
        np.testing.assert_array_equal(again.arrays["key_column"].values, found[1])  # and again


class Broken:
    async def get(self, *_):
        raise OSError("the line is cut")


def test_what_has_grown_is_seen_anew(folder, web, tmp_path):
    episode = open_episode(f"{web.url}/{WHERE['plain']}")
    web.asked.clear()
    episode.refresh()
    assert [request.path for request in web.asked] == [f"{WHERE['plain']}/zarr.json"]


# What strangers may send


def test_trust_checks_hold(folder, tmp_path):
    store = shutil.copytree(folder / WHERE["plain"], tmp_path / "episode_00000.zarr")
    document = json.loads((store / "zarr.json").read_text())
    video = next(iter(document["attributes"]["videos"].values()))
    video["path"] = "../secret.mp4"
    (store / "zarr.json").write_text(json.dumps(document))
    with serving(tmp_path) as server:
        url = f"{server.url}/episode_00000.zarr"
        assert len(open_episode(url).videos) == len(document["attributes"]["videos"]) - 1
        document["consolidated_metadata"]["metadata"]["action"]["codecs"] = [{"name": "pickle"}]
        (store / "zarr.json").write_text(json.dumps(document))
        with pytest.raises(StoreError, match="codec 'pickle'"):
            open_episode(url)
        with (store / "zarr.json").open("ab") as file:
            file.write(b" " * 17_000_000)
        with pytest.raises(StoreError, match="larger than"):
            open_episode(url)


# What cannot be read


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://wrong/run/episode_00000.zarr", "no such store"),
        ("s3://wrong/run", "wrong"),
        ("s3://plain/elsewhere", "holds no episode store"),
        ("s3://plain/run/missing.zarr.zip", "no such store"),
        ("s3://plain/run/videos/synthetic_0/eval_episode_0.mp4", "no episode store"),
        ("http://127.0.0.1:9/x.zarr", "cannot be read"),
        ("az://container/x.zarr", "AZURE_STORAGE_ACCOUNT_NAME"),
        ("ftp://host/x.zarr", "expected a path or s3://"),
        ("https://user:secret@host/x.zarr", "environment alone"),
        ("https://host/x.zarr?token=1", "query"),
        ("hf://models/x", "hf://datasets/USER/NAME"),
        ("s3:///x", "no address"),
        ("s3://plain/../x", "plain address"),
        ("HTML/index.html", "damaged"),
        ("HTML/nothing", "expected the address of an episode"),
        ("NORANGE", "cannot be read"),
    ],
)
def test_one_line_in_a_bounded_time(s3, tmp_path, monkeypatch, capsys, url, message):
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "index.html").mkdir()
    (tmp_path / "index.html" / "zarr.json").write_text("<html>welcome</html>")
    (tmp_path / "x.zarr.zip").write_bytes(b"PK" * 200_000)
    with serving(tmp_path, ranges=url != "NORANGE") as server:
        url = url.replace("HTML", server.url).replace("NORANGE", f"{server.url}/x.zarr.zip")
        start = time.monotonic()
        assert command(monkeypatch, "inspect", url) in (1, 2)
    assert time.monotonic() - start < 25
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert "Traceback" not in said
    assert "secret" not in said


def test_without_credentials(s3, monkeypatch, capsys):
    for name in KEYS:
        monkeypatch.delenv(name)
    start = time.monotonic()
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID") as error:
        open_episode(f"s3://{WHERE['plain']}")
    assert time.monotonic() - start < 60
    assert "\n" not in str(error.value)


def test_with_refused_credentials(folder, s3, monkeypatch):
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(StoreError, match="credentials in the environment") as error:
        open_run("s3://plain/run")
    assert "\n" not in str(error.value)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    remote._store_of.cache_clear()
    with pytest.raises(SetupError, match=r"lerobot_policy_attn\[remote\]") as error:
        open_episode("gs://bucket/x.zarr")
    assert isinstance(error.value, LerobotAttnError)


def test_a_video_that_is_not_there_is_one_line(folder, tmp_path):
    shutil.copytree(folder / WHERE["plain"], tmp_path / "episode_00000.zarr")
    with serving(tmp_path) as server:
        episode = open_episode(f"{server.url}/episode_00000.zarr")
        with pytest.raises(StoreError, match="MP4 is not beside the store"):
            next(iter(overlay_frames(episode, OverlaySettings(frames=[0]))))
        assert plot(episode, "image").axes  # without pictures


def test_the_hub_is_read_through_fsspec(folder):
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class StandIn(MemoryFileSystem):
        protocol = "hf"
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("hf://", "memory://"))

    for file in (folder / "packed").rglob("*"):
        if file.is_file():
            name = file.relative_to(folder / "packed").as_posix()
            StandIn().pipe_file(f"/datasets/user/name/{name}", file.read_bytes())
    fsspec.register_implementation("hf", StandIn, clobber=True)
    remote._store_of.cache_clear()
    try:
        found = open_run("hf://datasets/user/name/run")
        assert len(found) == 2
        np.testing.assert_array_equal(
            found[0].arrays.suffix_attention[0].values,
            open_episode(folder / WHERE["plain"]).arrays.suffix_attention[0].values,
        )
    finally:
        fsspec.register_implementation("hf", "huggingface_hub.HfFileSystem", clobber=True)
        remote._store_of.cache_clear()
