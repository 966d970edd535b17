"""The explorer's server: what it answers is what the store holds, and it answers nothing else."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import uvicorn
import xarray as xr
import zarr
from neuron_stores import write_neurons
from test_store import LAYOUT, frame_rows, inference_rows, make_writer, write_episode

from lerobot_attn import analysis, open_episode, open_run
from lerobot_attn.analysis.compare import compare_overall
from lerobot_attn.analysis.spatial import episode_ranges
from lerobot_attn.errors import StoreError
from lerobot_attn.explorer import app as app_module
from lerobot_attn.explorer import groups as groups_module
from lerobot_attn.explorer import library as library_module
from lerobot_attn.explorer import means as means_module
from lerobot_attn.explorer import ranges as ranges_module
from lerobot_attn.explorer import slabs, tables
from lerobot_attn.explorer import summary as summary_module
from lerobot_attn.explorer.app import create_app
from lerobot_attn.explorer.library import Library, NotThereError
from lerobot_attn.explorer.summary import version_of
from lerobot_attn.layout import ImageGeometry
from lerobot_attn.store.files import first_link
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.schema import BY_NAME
from lerobot_attn.store.video import VideoWriter, read_frames
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode, write_softmax_episode

TASK = "synthetic_0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two planted episodes with videos."""
    folder = tmp_path_factory.mktemp("run") / "out"
    for index in range(2):
        write_planted_episode(folder, SyntheticPlan(episode_index=index))
    return folder


class Answer:
    """What the server answered."""

    def __init__(self, response):
        self.status_code = response.status
        self.headers = response.headers
        self.content = response.read()

    @property
    def text(self):
        return self.content.decode()

    def json(self):
        return json.loads(self.content)


class Client:
    """Sends paths as they are: no library between tidies up what a test of traversal asks for."""

    def __init__(self, port):
        self.port = port

    def request(self, method, path, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers or {})
            return Answer(connection.getresponse())

    def get(self, path, headers=None):
        return self.request("GET", path, headers)


@contextlib.contextmanager
def client_of(path, port=0, **options):
    """Serve a path on a thread."""
    app = create_app(Library(path, rescan_s=0), **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            yield Client(listener.getsockname()[1])
        finally:
            server.should_exit = app.state.is_closing = True
            thread.join(20)


@pytest.fixture(scope="module")
def client(run):
    with client_of(run) as client:
        yield client


@pytest.fixture(scope="module")
def first(client):
    """The first episode's summary, its address, and its store."""
    return client.get("/api/run").json()["episodes"][0]


@pytest.fixture(scope="module")
def address(first):
    return f"/api/episodes/{first['id']}/{first['version']}"


@pytest.fixture(scope="module")
def data(run):
    return open_episode(next((run / "attention" / TASK).glob("*.zarr"))).arrays


def values(response):
    assert response.status_code == 200, response.text
    shape = [int(length) for length in response.headers["x-shape"].split(",")]
    return np.frombuffer(response.content, "<f2").reshape(shape)


def test_the_run_lists_its_episodes(client, run):
    answer = client.get("/api/run").json()
    assert answer["name"] == "out"
    assert len(answer["episodes"]) == 2
    assert not answer["damaged"]
    assert {e["id"] for e in answer["episodes"]} == {
        f"attention:{TASK}:{path.stem}" for path in (run / "attention" / TASK).glob("*.zarr")
    }


def test_slabs_are_what_the_store_holds(client, address, data):
    steps, layers = data["denoise_step"].values, data["layer"].values
    inference = data.sizes["inference"] - 1
    for place, step in enumerate(steps):
        slab = values(client.get(f"{address}/inferences/{inference}/means/{step}"))
        np.testing.assert_array_equal(slab, data["suffix_attention_mean"].values[inference, place])
    slab = values(client.get(f"{address}/inferences/0/maps/{steps[-1]}/{layers[0]}"))
    np.testing.assert_array_equal(slab, data["suffix_attention"].values[0, -1, 0])


def test_facts_name_everything_that_a_slab_holds(client, first, data):
    facts = client.get(f"/api/episodes/{first['id']}").json()
    assert facts["version"] == first["version"]
    assert facts["mean_layers"] == data["all_layer"].values.tolist()
    assert facts["layers"] == data["layer"].values.tolist()
    assert facts["heads"] == data["head"].values.tolist()
    assert facts["denoise_steps"] == data["denoise_step"].values.tolist()
    assert facts["n_keys"] == data.sizes["key"]
    assert facts["n_inferences"] == data.sizes["inference"]
    assert facts["segments"][-1]["stop"] == facts["n_keys"]
    for number, camera in enumerate(facts["cameras"]):
        patches = (data["key_camera"].values == number).sum()
        geometry = camera["geometry"]
        assert geometry is None or geometry["grid_rows"] * geometry["grid_columns"] == patches


def test_timeline_and_tokens_are_the_stores(client, address, data):
    timeline = client.get(f"{address}/timeline").json()
    for name in ("frame_inference", "frame_query", "inference_frame", "success"):
        assert timeline[name] == data[name].values.tolist()
    np.testing.assert_allclose(timeline["action"], data["action"].values, rtol=1e-5)
    tokens = client.get(f"{address}/inferences/0/tokens").json()
    assert tokens["text"] == [str(text) for text in data["token_text"].values[0]]
    assert tokens["key_kind"] == data["key_kind"].values[0].tolist()
    labels = [group["label"] for group in tokens["groups"] if group["kind"] == "task"]
    assert labels == str(data.attrs["task"]).split()
    assert max(tokens["group_of_key"]) == len(tokens["groups"]) - 1
    chunk = client.get(f"{address}/inferences/0/actions").json()["action"]
    np.testing.assert_allclose(chunk, data["action_chunk"].values[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("query", "where"),
    [
        ("", {"layer": "mean", "denoise_step": -1, "head": "mean"}),
        ("?layer=1&head=0&denoise_step=0", {"layer": 1, "denoise_step": 0, "head": 0}),
        ("?first=1&layer=-1", {"layer": -1, "denoise_step": -1, "head": "mean"}),
        ("?layer=0&head=max", {"layer": 0, "denoise_step": -1, "head": "max"}),
    ],
)
def test_shares_are_the_analysis(client, address, data, query, where):
    answer = client.get(f"{address}/shares{query}").json()
    expected = analysis.modality_share(data, inference="all", **where).transpose("inference", "modality")
    assert answer["modalities"] == [str(name) for name in expected["modality"].values]
    np.testing.assert_allclose(answer["share"], expected.values[answer["first"] :], rtol=1e-5)
    assert answer["first"] == ("first" in query)
    assert len(answer["effective_tokens"]) == len(answer["share"])


def test_pictures_are_the_videos_frames(client, first, address, run):
    from io import BytesIO

    from PIL import Image

    episode = open_episode(next((run / "attention" / TASK).glob("*.zarr")))
    facts = client.get(f"/api/episodes/{first['id']}").json()
    camera = next(camera["name"] for camera in facts["cameras"] if camera["has_video"])
    frames = list(read_frames(episode.videos[camera], size_px=episode.image_size_px(camera)))
    for number in (0, len(frames) - 1, len(frames) // 2):
        response = client.get(f"{address}/cameras/{camera}/frames/{number}.jpg")
        assert response.headers["content-type"] == "image/jpeg"
        picture = np.asarray(Image.open(BytesIO(response.content))).astype(int)
        assert picture.shape == frames[number].shape
        assert np.abs(picture - frames[number]).mean() < 3
    assert client.get(f"{address}/cameras/{camera}/frames/{len(frames)}.jpg").status_code == 404


def test_videos_are_served_in_ranges(client, first, address, run):
    episode = open_episode(next((run / "attention" / TASK).glob("*.zarr")))
    camera, video = next(iter(episode.videos.items()))
    response = client.get(f"{address}/cameras/{camera}.mp4", headers={"Range": "bytes=100-199"})
    assert response.status_code == 206
    assert response.content == video.read_bytes()[100:200]
    assert client.get(f"{address}/cameras/nothing.mp4").status_code == 404


def test_committed_answers_are_immutable_and_growing_ones_are_asked_for_again(client, first, address):
    for path, immutable in (
        (f"{address}/inferences/0/means/0", True),
        (f"{address}/inferences/0/tokens", True),
        (f"{address}/timeline", False),
        (f"/api/episodes/{first['id']}", False),
        ("/api/run", False),
    ):
        response = client.get(path)
        assert ("immutable" in response.headers["cache-control"]) is immutable, path
        again = client.get(path, headers={"If-None-Match": response.headers["etag"]})
        assert again.status_code == 304, path
        assert not again.content


def test_pictures_are_immutable_under_their_videos_version_alone(plain, tmp_path):
    shutil.copytree(plain.parent, tmp_path / TASK)
    with client_of(tmp_path) as client:
        episode = client.get("/api/run").json()["episodes"][0]

        def version():
            facts = client.get(f"/api/episodes/{episode['id']}").json()
            return next(c["video_version"] for c in facts["cameras"] if c["name"] == episode["camera"])

        at = f"/api/episodes/{episode['id']}/{episode['version']}/cameras/{episode['camera']}/frames/0.jpg"
        before = version()
        assert re.fullmatch("[0-9a-f]{8}", before)

        def immutable(query):
            return "immutable" in client.get(at + query).headers["cache-control"]

        assert [immutable(query) for query in (f"?v={before}", "?v=0", "?v=", "")] == [
            True,
            False,
            False,
            False,
        ]
        latest = at.replace(episode["version"], "latest")
        assert client.get(f"{latest}?v={before}").headers["cache-control"] == "no-cache"
        video = open_episode(tmp_path / TASK / f"{episode['id'].split(':')[1]}.zarr").videos[
            episode["camera"]
        ]
        old = client.get(at).content
        found = video.stat()
        replace_video(video, (48, 64))
        os.utime(video, ns=(found.st_atime_ns, found.st_mtime_ns))  # of the same age, as a copy may be
        assert client.get(at).content != old
        assert version() != before
        assert [immutable(f"?v={v}") for v in (before, version())] == [False, True]
        video.unlink()
        assert version() is None


def replace_video(video, size_px):
    video.unlink()
    writer = VideoWriter(video, fps=20, size_px=size_px)
    for shade in (10, 90, 200):
        writer.write(np.full((*size_px, 3), shade, np.uint8))
    writer.close()


def test_another_version_of_the_package_has_other_addresses(plain, monkeypatch):
    episode = open_episode(plain)
    before = version_of(episode)
    assert version_of(episode) == before
    monkeypatch.setattr(summary_module, "__version__", "999.0")
    assert version_of(episode) != before


def test_the_page_is_asked_for_again_and_its_assets_are_kept(run, tmp_path):
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("the page")
    (tmp_path / "assets" / "index-abc.js").write_text("the script")
    with client_of(run, static=tmp_path) as client:
        for path, immutable in (("/", False), ("/index.html", False), ("/assets/index-abc.js", True)):
            answer = client.get(path)
            assert ("immutable" in answer.headers["cache-control"]) is immutable, path
            assert ("no-cache" in answer.headers["cache-control"]) is not immutable, path
            again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert again.status_code == 304
            assert again.headers["cache-control"] == answer.headers["cache-control"]


def test_json_is_compressed_and_maps_are_not(client, address):
    zipped = {"Accept-Encoding": "gzip"}
    assert client.get(f"{address}/timeline", headers=zipped).headers["content-encoding"] == "gzip"
    assert "content-encoding" not in client.get(f"{address}/inferences/0/means/0", headers=zipped).headers


@pytest.mark.parametrize(
    "path",
    [
        "/inferences/99/means/0",
        "/inferences/0/means/77",
        "/inferences/0/maps/0/77",
        "/inferences/0/prefix/99/0",
        "/inferences/99/tokens",
        "/inferences/99999999999999999999999/means/0",
        "/inferences/-1/means/0",
        f"/inferences/{'9' * 5000}/means/0",
        f"/inferences/0/maps/0/{'9' * 5000}",
        f"/ranges/{'1' * 10}",
        "/shares?layer=77",
        "/shares?layer=nonsense",
        "/shares?first=-3",
        "/shares?first=99999999999999999999",
        "/shares?head=" + "9" * 5000,
        "/cameras/none/frames/0.jpg",
        "/nothing",
    ],
)
def test_odd_requests_get_a_clean_answer(client, address, path):
    response = client.get(address + path)
    assert response.status_code in (400, 404)
    message = response.json()["error"]
    assert message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e%2f%2e%2e%2fsecret.txt",
        "/api/episodes/..%2f..%2fsecret.txt",
        "/api/episodes/..:..:secret",
        "/api/episodes/%2e%2e/x/cameras/%2e%2e%2fsecret.txt.mp4",
        "/api/episodes/ID/VERSION/cameras/..%2f..%2fsecret.mp4",
        "//secret.txt",
        "/\\..\\secret.txt",
    ],
)
def test_nothing_outside_is_served(run, first, path):
    (run.parent / "secret.txt").write_text("secret")
    (run / "attention" / "secret.mp4").write_text("secret")
    static = run.parent / "static"
    static.mkdir(exist_ok=True)
    (static / "index.html").write_text("the page")
    path = path.replace("ID", first["id"]).replace("VERSION", first["version"])
    with client_of(run, static=static) as client:
        assert client.get("/").text == "the page"
        response = client.get(path)
        assert response.status_code in (400, 404)
        assert response.text != "secret"


def test_links_out_of_the_folder_are_not_served(run, tmp_path):
    outside = tmp_path / "outside" / "episode_00007.zarr"
    write_episode(outside, 2)
    folder = tmp_path / "run" / TASK
    folder.mkdir(parents=True)
    write_episode(folder / "episode_00000.zarr", 2)
    (folder / "episode_00007.zarr").symlink_to(outside)
    with client_of(tmp_path / "run") as client:
        assert [e["id"] for e in client.get("/api/run").json()["episodes"]] == [f"{TASK}:episode_00000"]
        assert client.get(f"/api/episodes/{TASK}:episode_00007").status_code == 404


def edit_attributes(path, **attributes):
    """Change a store's attributes; NaN and Infinity are what Python's JSON reads, too."""
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"] |= attributes
    (path / "zarr.json").write_text(json.dumps(metadata))


def test_numbers_that_json_does_not_know_hide_nothing(tmp_path):
    path = tmp_path / TASK / "episode_00000.zarr"
    write_episode(path, 1)
    write_episode(path.with_name("episode_00001.zarr"), 1)
    nan, inf = float("nan"), float("inf")
    videos = {"cam": {"path": "episode_00000.cam.mp4", "fps": inf}}
    odd = {"episode_index": nan, "task_id": -inf, "seed": nan, "task_group": [nan], "videos": videos}
    edit_attributes(path, policy={"n_layers": inf, "n_heads": nan}, **odd)
    with client_of(tmp_path) as client:
        answer = client.get("/api/run")
        assert answer.status_code == 200
        first, second = answer.json()["episodes"]
        assert (first["episode"], first["task_id"], first["task_group"]) == (None, None, None)
        assert second["n_inferences"] == 1
        facts = client.get(f"/api/episodes/{first['id']}").json()
        names = ("episode", "task_id", "task_group", "seed", "n_layers", "n_heads")
        assert [facts[name] for name in names] == [None] * 6
        assert facts["fps"] == 20


def test_odd_stores_are_listed_with_what_is_wrong_and_hide_nothing(tmp_path, monkeypatch):
    folder = tmp_path / TASK
    write_episode(folder / "episode_00000.zarr", 1)
    (folder / "episode_00001.zarr").symlink_to("episode_00001.zarr")
    write_episode(folder / "episode_00002.zarr", 1)
    write_episode(folder / "episode_00003.zarr", 1)
    layout = LAYOUT.to_dict()
    layout["segments"] = [[]]
    edit_attributes(folder / "episode_00003.zarr", layout=layout)
    stored_bytes, is_away = Episode.stored_bytes, True

    def failing(episode):
        if is_away and episode.path.stem == "episode_00002":
            raise OSError(5, "Input/output error")
        return stored_bytes(episode)

    monkeypatch.setattr(Episode, "stored_bytes", failing)
    monkeypatch.setattr(library_module, "_RETRY_S", 0)
    with client_of(tmp_path) as client:
        answer = client.get("/api/run").json()
        assert [e["id"] for e in answer["episodes"]] == [f"{TASK}:episode_00000"]
        away, damaged, loop = answer["damaged"]
        assert "episode_00002.zarr: cannot be read: [Errno 5] Input/output error" in away
        assert "episode_00003.zarr: its token layout is damaged" in damaged
        assert "episode_00001.zarr: cannot be followed: Symlink loop" in loop
        assert not any("\n" in line for line in answer["damaged"])
        assert client.get(f"/api/episodes/{TASK}:episode_00001").status_code == 404
        is_away = False  # what may pass by itself is tried again
        assert len(client.get("/api/run").json()["episodes"]) == 2


def test_a_store_with_a_link_in_it_is_not_served(tmp_path):
    path = tmp_path / "run" / TASK / "episode_00000.zarr"
    write_episode(path, 2)
    secret = tmp_path / "secret"
    chunk = path / "token_id" / "c" / "0" / "0"
    with client_of(tmp_path / "run") as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        shutil.move(chunk, secret)
        chunk.symlink_to(secret)
        edit_attributes(path)  # as a commit does
        answer = client.get(f"/api/episodes/{episode['id']}/latest/inferences/0/tokens")
        assert answer.status_code == 422
        assert "token_id/c/0/0 is a link, expected plain files" in answer.json()["error"]
        run = client.get("/api/run").json()
        assert run["episodes"] == []
        assert "is a link" in run["damaged"][0]


def test_a_store_that_a_link_has_replaced_is_not_served(tmp_path):
    path = tmp_path / "run" / TASK / "episode_00000.zarr"
    write_episode(path, 2)
    library = Library(tmp_path / "run", rescan_s=1000)
    (summary,) = library.look().summaries
    assert library.episode(summary.id).n_inferences == 2
    moved = tmp_path / "episode_00000.zarr"
    shutil.move(path, moved)
    path.symlink_to(moved)
    with pytest.raises(NotThereError, match="is a link out of the served folder"):
        library.episode(summary.id, summary.version)


def test_links_are_looked_for_in_no_time(tmp_path):
    for index in range(20):
        folder = tmp_path / "array" / "c" / str(index)
        folder.mkdir(parents=True)
        for number in range(20):
            (folder / str(number)).touch()
    first_link(tmp_path)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert first_link(tmp_path) is None
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01


def test_a_video_that_a_link_has_replaced_is_not_served(plain, tmp_path):
    task = tmp_path / "run" / TASK
    shutil.copytree(plain.parent, task)
    with client_of(tmp_path / "run") as client:
        episode = client.get("/api/run").json()["episodes"][0]
        at = f"/api/episodes/{episode['id']}/{episode['version']}/cameras/{episode['camera']}"
        video = open_episode(task / f"{episode['id'].split(':')[1]}.zarr").videos[episode["camera"]]
        paths = (f"{at}.mp4", f"{at}/frames/0.jpg")
        for path in paths:
            assert client.get(path).status_code == 200
        shutil.move(video, tmp_path / "elsewhere.mp4")
        for path in paths:
            gone = client.get(path)
            assert gone.status_code == 404, path
            assert str(tmp_path) not in gone.text
        video.symlink_to(tmp_path / "elsewhere.mp4")
        for path in paths:
            assert client.get(path).status_code == 404, path


def test_another_host_is_refused(client):
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:8123"):
        assert client.get("/api/run", headers={"Host": host}).status_code == 400
    for host in ("localhost:8123", "127.0.0.1"):
        assert client.get("/api/run", headers={"Host": host}).status_code == 200


def test_nothing_can_be_written(client, address):
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, address + "/timeline").status_code == 405


def test_a_store_that_is_removed_damaged_or_replaced(tmp_path):
    path = tmp_path / TASK / "episode_00000.zarr"
    write_episode(path, 2, created="then")
    with client_of(tmp_path) as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        at = f"/api/episodes/{episode['id']}/{episode['version']}"
        assert client.get(at + "/inferences/0/means/0").status_code == 200

        chunk = next(
            file
            for file in (path / "suffix_attention_mean").rglob("*")
            if file.is_file() and file.name != "zarr.json"
        )
        chunk.write_bytes(b"\0" * 100)
        answers = [client.get(at + f"/inferences/{number}/means/0") for number in range(2)]
        assert sorted(answer.status_code for answer in answers) == [200, 422]
        (refused,) = (answer for answer in answers if answer.status_code == 422)
        assert "cannot be read" in refused.json()["error"]

        shutil.rmtree(path)
        write_episode(path, 2, created="now")
        replaced = client.get(at + "/timeline")
        assert replaced.status_code == 404
        assert "replaced" in replaced.json()["error"]
        # Whoever wants whatever is there now says so, and must ask again.
        latest = f"/api/episodes/{episode['id']}/latest"
        assert client.get(latest + "/timeline").status_code == 200
        means = client.get(latest + "/inferences/0/means/0")
        assert means.status_code == 200
        assert means.headers["Cache-Control"] == "no-cache"

        (path / "zarr.json").write_text("{")
        answer = client.get("/api/run").json()
        assert not answer["episodes"]
        assert "damaged" in answer["damaged"][0]
        assert client.get(f"/api/episodes/{episode['id']}").status_code == 422

        shutil.rmtree(path)
        assert client.get(f"/api/episodes/{episode['id']}").status_code == 404
        assert client.get("/api/run").json()["episodes"] == []


def test_what_is_committed_while_one_looks_is_there_at_once(tmp_path):
    path = tmp_path / TASK / "episode_00000.zarr"
    rng = np.random.default_rng(0)
    writer = make_writer(path)
    with client_of(tmp_path) as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        at = f"/api/episodes/{episode['id']}/{episode['version']}"
        for index in range(3):
            assert client.get(f"{at}/inferences/{index}/means/0").status_code == 404
            rows = inference_rows(rng, index)
            writer.append_inference(rows)
            writer.append_frames(frame_rows(rng, index))
            writer.commit()
            slab = values(client.get(f"{at}/inferences/{index}/means/0"))
            np.testing.assert_array_equal(slab[:4], rows["suffix_attention_mean"][0])
            of_full = rows["suffix_attention"][0, ..., :2, :].astype(np.float32).mean(axis=2)
            np.testing.assert_array_equal(slab[4:], of_full.astype(np.float16))
            assert len(client.get(f"{at}/shares?first={index}").json()["share"]) == 1
            assert client.get("/api/run").json()["episodes"][0]["n_inferences"] == index + 1


def test_a_store_that_somebody_follows_is_opened_once_a_commit(tmp_path, monkeypatch):
    path, other = (tmp_path / TASK / f"episode_0000{index}.zarr" for index in range(2))
    write_episode(path, 2)
    write_episode(other, 2)
    library = Library(tmp_path)
    followed, unseen = (summary.id for summary in library.look().summaries)
    before = library.episode(followed)
    opened = []
    monkeypatch.setattr(library_module, "open_episode", lambda at: opened.append(at) or open_episode(at))
    edit_attributes(path)  # as a commit does
    edit_attributes(other)
    library.look()
    assert opened == [path, other]
    now = library.episode(followed)
    assert opened == [path, other]
    assert now is not before
    assert "arrays" in vars(now), "each of the questions that come at once opens them"
    library.episode(unseen)  # nobody has asked for it before
    assert opened == [path, other, other]


def test_who_asks_for_an_episode_does_not_wait_for_a_listing(tmp_path, monkeypatch):
    write_episode(tmp_path / TASK / "episode_00000.zarr", 1)
    library = Library(tmp_path, rescan_s=0)
    (summary,) = library.look().summaries
    library._rescan_s = 1000
    may_end, scans = threading.Event(), []

    def slow(path):
        scans.append(path)
        assert may_end.wait(30)
        return open_run(path)

    monkeypatch.setattr(library_module, "open_run", slow)
    monkeypatch.setattr(library_module, "_RESCAN_S", 0)

    def ask():
        with contextlib.suppress(NotThereError):
            library.episode("unknown")

    asker = threading.Thread(target=ask)
    asker.start()
    while not scans:
        time.sleep(0.01)
    assert library.episode(summary.id).n_inferences == 1  # while the other's listing goes on
    assert not may_end.is_set()
    may_end.set()
    asker.join(30)
    monkeypatch.setattr(library_module, "_RESCAN_S", 1000)
    for _ in range(20):
        ask()
    assert len(scans) == 1


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(StoreError, match="holds no episode store"):
        Library(tmp_path)


def test_pictures_stay_within_their_memory(run):
    from lerobot_attn.explorer.pictures import FramePictures

    episode = open_episode(next((run / "attention" / TASK).glob("*.zarr")))
    camera, video = next(iter(episode.videos.items()))
    size = episode.image_size_px(camera)
    unlimited, limited = FramePictures(), FramePictures(max_bytes=5_000)
    for frame in (0, 3, 0, episode.n_frames - 1):
        assert limited.picture(video, frame, size) == unlimited.picture(video, frame, size)
        assert limited._bytes <= 5_000
        assert sum(len(picture) for picture in limited._pictures.values()) == limited._bytes


def test_pictures_are_exact_in_any_order(tmp_path):
    """Whether a decoder goes on, begins anew or serves another video between."""
    from lerobot_attn.explorer.pictures import FramePictures, jpeg

    rng = np.random.default_rng(0)
    videos = [tmp_path / f"{number}.mp4" for number in range(6)]
    for video in videos:
        writer = VideoWriter(video, fps=20, size_px=(16, 16))
        for _ in range(80):
            writer.write(np.full((16, 16, 3), rng.integers(0, 256, 3), np.uint8))
        writer.close()
    expected = {video: [jpeg(frame) for frame in read_frames(video)] for video in videos}
    pictures = FramePictures(max_bytes=20 * len(expected[videos[0]][0]))
    for frame in (0, 1, 2, 40, 41, 39, 8, 79, 78, 0, 31, 32, 63):
        for video in videos:
            assert pictures.picture(video, frame, None) == expected[video][frame], frame
    with pytest.raises(StoreError, match="80 frames"):
        pictures.picture(videos[0], 80, None)
    assert pictures.picture(videos[0], 79, None) == expected[videos[0]][79]
    with pytest.raises(StoreError, match="no such video file"):
        pictures.picture(tmp_path / "none.mp4", 0, None)


def copy_without_means(path, target):
    """Write an episode again as a recording without mean layers would have: the array is left out."""
    shutil.copytree(path, target)
    shutil.rmtree(target / "suffix_attention_mean")
    shutil.rmtree(target / "all_layer")
    metadata = json.loads((target / "zarr.json").read_text())
    for name in ("suffix_attention_mean", "all_layer"):
        del metadata["consolidated_metadata"]["metadata"][name]
    (target / "zarr.json").write_text(json.dumps(metadata))
    return target


def with_missing_maps(path, target, missing):
    """Copy an episode and make the means of some (inference, layer) missing."""
    shutil.copytree(path, target)
    array = zarr.open_array(target / "suffix_attention_mean", mode="r+")
    for inference, layer in missing:
        array[inference, :, layer] = np.nan
    return target


@pytest.fixture(scope="module")
def plain(run):
    return next((run / "attention" / TASK).glob("*.zarr"))


@pytest.mark.parametrize("block", [1, 3, 32])
@pytest.mark.parametrize("missing", [[], [(0, 1), (2, 1)], [(i, 0) for i in range(4)]])
def test_ranges_are_the_analysis(plain, tmp_path, monkeypatch, block, missing):
    monkeypatch.setattr(means_module, "_BLOCK", block)
    episode = open_episode(with_missing_maps(plain, tmp_path / "episode_00000.zarr", missing))
    data = episode.arrays
    found = ranges_module.ranges(episode, 1)
    assert found["layers"] == [*data["all_layer"].values.tolist(), "mean"]
    assert found["heads"] == [*data["head"].values.tolist(), "mean", "max"]
    assert list(found["ranges"]) == analysis.camera_names(data)
    for camera, rows in found["ranges"].items():
        for layer, row in zip(found["layers"], rows, strict=True):
            for head, end in zip(found["heads"], row, strict=True):
                expected = episode_ranges(
                    data,
                    [camera],
                    clip=ranges_module.CLIP,
                    inference="all",
                    layer=layer,
                    head=head,
                    denoise_step=1,
                    query="executed",
                )[camera]
                assert end == pytest.approx(expected, rel=1e-5), (camera, layer, head)
    every = np.array(list(found["ranges"].values()))
    has_none = len(missing) == data.sizes["inference"]
    assert (every[:, [0, -1]] == 0).all() == has_none  # a layer without a map, and the mean that needs it
    assert (every[:, 1:-1] > 0).all()


def test_ranges_of_many_numbers_are_numpys(tmp_path, monkeypatch):
    """Long enough that numbers above the percentile are several, and some are dropped on the way."""
    monkeypatch.setattr(means_module, "_BLOCK", 7)
    plan = SyntheticPlan(n_frames=60, n_executed=1, n_denoise_steps=1, videos=False, n_heads=3)
    episode = open_episode(write_softmax_episode(tmp_path, plan))
    means = episode.arrays["suffix_attention_mean"].values[:, 0].astype(np.float32)
    found = ranges_module.ranges(episode, 0)
    for camera, rows in found["ranges"].items():
        _, _, segment = analysis.camera_geometry(episode.arrays, camera)
        patches = means[..., segment.start : segment.stop]
        assert np.size(patches[:, 0, 0]) * (100 - ranges_module.CLIP) / 100 > 10
        expected = np.percentile(patches.astype(np.float64), ranges_module.CLIP, axis=(0, 3))
        np.testing.assert_allclose(np.array(rows)[:-1, :-2], expected, rtol=1e-5)


def test_ranges_over_the_network(client, address, data):
    answer = client.get(f"{address}/ranges/2")
    assert answer.status_code == 200
    assert "immutable" not in answer.headers["cache-control"]  # it widens as the episode grows
    expected = episode_ranges(
        data, clip=99.9, inference="all", layer="mean", head="max", denoise_step=2, query="executed"
    )
    ranges = answer.json()["ranges"]
    assert {name: rows[-1][-1] for name, rows in ranges.items()} == pytest.approx(expected, rel=1e-5)
    assert client.get(f"{address}/ranges/77").status_code == 404


def test_means_come_from_full_maps_where_none_are_stored(plain, tmp_path):
    bare = copy_without_means(plain, tmp_path / TASK / plain.name)
    data = open_episode(plain).arrays
    executed = slice(*data.attrs["executed_queries"])
    with client_of(tmp_path) as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        at = f"/api/episodes/{episode['id']}/{episode['version']}"
        facts = client.get(f"/api/episodes/{episode['id']}").json()
        assert facts["mean_layers"] == facts["layers"] == [2, 3]
        for inference in range(data.sizes["inference"]):
            slab = values(client.get(f"{at}/inferences/{inference}/means/2"))
            maps = data["suffix_attention"].values[inference, 2, :, :, executed].astype(np.float32)
            np.testing.assert_array_equal(slab, maps.mean(axis=2).astype(np.float16))
        ranges = client.get(f"{at}/ranges/2").json()
        shares = client.get(f"{at}/shares?layer=mean&head=mean&denoise_step=2").json()
    expected = episode_ranges(
        open_episode(bare).arrays, clip=99.9, inference="all", layer="mean", head=1, denoise_step=2
    )
    assert {name: rows[-1][1] for name, rows in ranges["ranges"].items()} == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(np.sum(shares["share"], axis=1), 1, atol=1e-3)


def test_an_episode_without_suffix_attention_is_listed_and_says_what_it_lacks(plain, tmp_path):
    bare = copy_without_means(plain, tmp_path / TASK / plain.name)
    shutil.rmtree(bare / "suffix_attention")
    metadata = json.loads((bare / "zarr.json").read_text())
    del metadata["consolidated_metadata"]["metadata"]["suffix_attention"]
    (bare / "zarr.json").write_text(json.dumps(metadata))
    with client_of(tmp_path) as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        at = f"/api/episodes/{episode['id']}/{episode['version']}"
        assert client.get(f"/api/episodes/{episode['id']}").json()["mean_layers"] == []
        for path in ("/inferences/0/means/2", "/inferences/0/maps/2/2", "/ranges/2", "/shares"):
            answer = client.get(at + path)
            assert answer.status_code == 404, path
            assert "suffix" in answer.json()["error"]


def damage(path, inference):
    """Damage one inference's stored means."""
    shard = path / "suffix_attention_mean" / "c" / str(inference)
    for file in [shard] if shard.is_file() else shard.rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0" * 100)


@pytest.mark.parametrize("block", [2, 32])
def test_what_a_damaged_chunk_holds_is_missing_and_nothing_else(plain, tmp_path, monkeypatch, block):
    monkeypatch.setattr(means_module, "_BLOCK", block)
    path = tmp_path / TASK / plain.name
    shutil.copytree(plain, path)
    damage(path, 1)
    gone = with_missing_maps(plain, tmp_path / "missing.zarr", [(1, layer) for layer in range(4)])
    expected = open_episode(gone)
    with client_of(tmp_path) as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        at = f"/api/episodes/{episode['id']}/{episode['version']}"
        assert [client.get(f"{at}/inferences/{i}/means/2").status_code for i in (0, 1, 2)] == [200, 422, 200]
        shares, ranges = client.get(f"{at}/shares"), client.get(f"{at}/ranges/2")
        assert (shares.status_code, ranges.status_code) == (200, 200)
        alone = client.get(f"{at}/shares?first={episode['n_inferences'] - 1}")
        assert None not in alone.json()["effective_tokens"]
    assert shares.json() == tables.shares(expected, 0, layer="mean", denoise_step=-1, head="mean")
    assert ranges.json() == ranges_module.ranges(expected, 2)
    assert set(shares.json()["share"][1]) == {None}
    is_missing = [number is None for number in shares.json()["effective_tokens"]]
    assert is_missing == [index == 1 for index in range(episode["n_inferences"])]


@pytest.fixture(scope="module")
def few_means(plain, tmp_path_factory):
    """An episode with stored means of layers 0 and 3, and full maps of 2 and 3."""
    path = tmp_path_factory.mktemp("few") / TASK / plain.name
    shutil.copytree(plain, path)
    with xr.open_zarr(plain, consolidated=True) as dataset:
        stored = dataset["suffix_attention_mean"].isel(all_layer=[0, 3]).load()
    metadata = json.loads((path / "zarr.json").read_text())
    for name, values in (("suffix_attention_mean", stored.values), ("all_layer", np.array([0, 3], np.int32))):
        shutil.rmtree(path / name)
        zarr.create_array(path / name, data=values, dimension_names=BY_NAME[name].dims)
        metadata["consolidated_metadata"]["metadata"][name] = json.loads(
            (path / name / "zarr.json").read_text()
        )
    (path / "zarr.json").write_text(json.dumps(metadata))
    return path


def test_layers_with_full_maps_alone_have_means_too(few_means, plain):
    executed = slice(*open_episode(plain).attributes["executed_queries"])
    data = open_episode(plain).arrays
    stored = data["suffix_attention_mean"].values[:, 2].astype(np.float32)
    of_2 = data["suffix_attention"].values[:, 2, 0, :, executed].astype(np.float32).mean(axis=2)
    expected = np.stack([stored[:, 0], of_2, stored[:, 3]], axis=1)
    with client_of(few_means.parents[1]) as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        at = f"/api/episodes/{episode['id']}/{episode['version']}"
        facts = client.get(f"/api/episodes/{episode['id']}").json()
        assert (facts["mean_layers"], facts["layers"]) == ([0, 2, 3], [2, 3])
        for inference in range(len(expected)):
            slab = values(client.get(f"{at}/inferences/{inference}/means/2"))
            np.testing.assert_array_equal(slab, expected[inference].astype(np.float16))
        ranges = client.get(f"{at}/ranges/2").json()
        shares = {
            (layer, head): client.get(f"{at}/shares?layer={layer}&head={head}&denoise_step=2").json()
            for layer in (0, 2, 3, "mean")
            for head in (1, "mean", "max")
        }
    assert ranges["layers"] == [0, 2, 3, "mean"]
    camera, _, segment = analysis.camera_geometry(data)
    layers = np.concatenate([expected, expected.mean(axis=1, keepdims=True)], axis=1)
    every = np.concatenate([layers, layers.mean(2, keepdims=True), layers.max(2, keepdims=True)], axis=2)
    patches = every[..., segment.start : segment.stop]
    ends = np.percentile(patches.astype(np.float64), ranges_module.CLIP, axis=(0, 3))
    np.testing.assert_allclose(ranges["ranges"][camera], ends, rtol=1e-5)
    for (layer, head), answer in shares.items():
        place = (ranges["layers"].index(layer), ranges["heads"].index(head))
        of_camera = patches[:, *place].sum(axis=-1)
        found = np.array(answer["share"])[:, answer["modalities"].index(camera)]
        np.testing.assert_allclose(found, of_camera, rtol=1e-5, err_msg=f"{layer}, {head}")


def without_suffix(path):
    """Leave a store nothing but its prefix maps."""
    metadata = json.loads((path / "zarr.json").read_text())
    for name in ("suffix_attention", "suffix_attention_mean", "layer", "all_layer"):
        shutil.rmtree(path / name)
        del metadata["consolidated_metadata"]["metadata"][name]
    (path / "zarr.json").write_text(json.dumps(metadata))


def test_an_episode_with_prefix_maps_alone_still_shows_its_cameras_and_words(tmp_path):
    without_suffix(write_planted_episode(tmp_path, SyntheticPlan(prefix_layers=(1,))))
    with client_of(tmp_path) as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        at = f"/api/episodes/{episode['id']}/{episode['version']}"
        facts = client.get(f"/api/episodes/{episode['id']}").json()
        assert (facts["mean_layers"], facts["layers"], facts["prefix_layers"]) == ([], [], [1])
        for lacking in ("/inferences/0/means/2", "/ranges/2", "/shares"):
            answer = client.get(at + lacking)
            assert answer.status_code == 404, lacking
            assert "suffix" in answer.json()["error"]
        picture = f"/cameras/{episode['camera']}/frames/0.jpg"
        for there in ("/timeline", "/inferences/0/tokens", "/inferences/0/actions", picture):
            assert client.get(at + there).status_code == 200, there
        assert values(client.get(at + "/inferences/0/prefix/1/5")).ndim == 2


def test_cameras_whose_names_end_alike_have_labels_of_their_own(tmp_path):
    names = ("observation.images.left.rgb", "observation.images.right.rgb")
    for index, success in enumerate([True, False]):
        plan = SyntheticPlan(
            image_px=dict.fromkeys(names, (48, 64)), episode_index=index, success=success, videos=False
        )
        write_planted_episode(tmp_path, plan)
    with client_of(tmp_path) as client:
        episode = client.get("/api/run").json()["episodes"][0]
        facts = client.get(f"/api/episodes/{episode['id']}").json()
        groups = client.get("/api/groups").json()
    labels = {camera["name"]: camera["label"] for camera in facts["cameras"]}
    assert [labels[name] for name in names] == ["left.rgb", "right.rgb"]
    assert [row["label"] for row in groups["rows"]][:2] == ["left.rgb", "right.rgb"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run of two successes and two failures, which differ, and one that was interrupted."""
    folder = tmp_path_factory.mktemp("mixed")
    for index, success in enumerate([True, True, False, False, True]):
        plan = SyntheticPlan(
            episode_index=index,
            success=success,
            complete=index < 4,
            n_frames=6 + 3 * index,
            videos=False,
            task="pick up the red block and place it in the bowl" if success else "push the plate",
        )
        write_planted_episode(folder, plan, created=f"at {index}")
    return folder


def test_groups_are_the_analysis(mixed):
    stores = sorted((mixed / "attention" / TASK).glob("*.zarr"))
    episodes = [open_episode(path) for path in stores]
    with client_of(mixed) as client:
        answer = client.get("/api/groups")
    assert answer.status_code == 200
    found = answer.json()
    assert (found["n_success"], found["n_failure"], found["left_out"]) == (2, 2, [])
    table = compare_overall(episodes[2:4], episodes[:2], query="executed")
    table = table[table["name"] != "padding"]
    assert [row["label"] for row in found["rows"]] == [
        name.removeprefix("observation.images.") for name in table["name"]
    ]
    columns = {"failure": "a", "success": "b", "difference": "difference", "low": "low", "high": "high"}
    for name, column in columns.items():
        np.testing.assert_allclose([row[name] for row in found["rows"]], table[column], rtol=1e-5, atol=1e-9)
    assert table.attrs["interval"] in found["what"]


def test_groups_compare_the_episodes_of_one_condition(mixed, tmp_path):
    shutil.copytree(mixed, tmp_path / "run")
    plan = SyntheticPlan(episode_index=9, success=False, n_frames=6, videos=False)
    done = [{"kind": "block_attention", "keys": [{"role": "target"}]}]
    blocked = {"name": "block", "text": "block: attention to the target blocked", "interventions": done}
    write_planted_episode(tmp_path / "run", plan, condition=blocked)
    found = groups_module.groups([open_episode(path) for path in sorted(tmp_path.rglob("*.zarr"))])
    assert (found["n_success"], found["n_failure"]) == (2, 2)
    assert found["what"].endswith("Of 2 conditions only this one: baseline.")
    alone = groups_module.groups([open_episode(path) for path in sorted(mixed.rglob("*.zarr"))])
    assert found["rows"] == alone["rows"]
    assert "conditions" not in alone["what"]


def test_groups_without_an_interval_say_so(run, tmp_path):
    for index, success in enumerate([True, False]):
        write_planted_episode(
            tmp_path, SyntheticPlan(episode_index=index, success=success, videos=False, n_frames=6)
        )
    found = groups_module.groups([open_episode(path) for path in sorted(tmp_path.rglob("*.zarr"))])
    assert {(row["low"], row["high"]) for row in found["rows"]} == {(None, None)}
    assert "two of each are needed" in found["what"]


@pytest.mark.parametrize("success", [True, False])
def test_groups_of_one_side_alone_get_a_clean_answer(tmp_path, success):
    for index in range(2):
        plan = SyntheticPlan(episode_index=index, success=success, videos=False, n_frames=3)
        write_planted_episode(tmp_path, plan)
    with client_of(tmp_path) as client:
        answer = client.get("/api/groups")
    assert answer.status_code == 404
    counts = "2 successes, 0 failures" if success else "0 successes, 2 failures"
    assert counts in answer.json()["error"]


def test_groups_leave_out_a_damaged_store_and_name_it(mixed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(mixed, folder)
    for path in sorted((folder / "attention" / TASK).glob("*.zarr"))[:1]:
        copy = path.with_name("episode_00009.zarr")
        shutil.copytree(path, copy)
        for file in (copy / "suffix_attention_mean").rglob("*"):
            if file.is_file() and file.name != "zarr.json":
                file.write_bytes(b"\0" * 100)
    with client_of(mixed) as client:
        expected = client.get("/api/groups").json()
    with client_of(folder) as client:
        found = client.get("/api/groups").json()
    (reason,) = found.pop("left_out")
    assert reason.startswith(f"{TASK}/episode_00009.zarr: ")
    assert "\n" not in reason
    assert found == {name: value for name, value in expected.items() if name != "left_out"}


def test_groups_are_computed_once_and_block_nobody(mixed, tmp_path, monkeypatch):
    shutil.copytree(mixed / "attention", tmp_path / "attention")
    may_end, calls = threading.Event(), []

    def slow(episodes):
        calls.append(len(episodes))
        assert may_end.wait(30)
        return {"call": len(calls)}

    monkeypatch.setattr(groups_module, "groups", slow)
    with client_of(tmp_path) as client:
        answers = []
        askers = [
            threading.Thread(target=lambda: answers.append(client.get("/api/groups").json()))
            for _ in range(60)  # more than there are threads
        ]
        for asker in askers:
            asker.start()
        deadline = time.monotonic() + 20
        while not calls and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.get("/api/run").status_code == 200  # while sixty wait
        assert not answers
        may_end.set()
        for asker in askers:
            asker.join(30)
        assert answers == [{"call": 1}] * 60
        assert client.get("/api/groups").json() == {"call": 1}

        write_planted_episode(
            tmp_path, SyntheticPlan(episode_index=7, videos=False, n_frames=3), created="later"
        )
        assert client.get("/api/groups").json() == {"call": 2}
        assert calls == [4, 5]  # the interrupted one is in neither


def test_groups_that_failed_are_computed_again(mixed, monkeypatch):
    outcomes = [StoreError("a disk that was away"), {"call": 2}]

    def failing_once(episodes):
        found = outcomes.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(groups_module, "groups", failing_once)
    with client_of(mixed) as client:
        answer = client.get("/api/groups")
        assert (answer.status_code, answer.json()) == (422, {"error": "a disk that was away"})
        assert client.get("/api/groups").json() == {"call": 2}


def test_the_run_says_what_the_page_shows_of_it(client, run, plain):
    answer = client.get("/api/run").json()
    assert answer["is_episode"] is False
    summary = next(e for e in answer["episodes"] if e["id"].endswith(plain.stem))
    episode = open_episode(plain)
    assert summary["stored_bytes"] == sum(f.stat().st_size for f in plain.rglob("*") if f.is_file())
    assert summary["camera"] in episode.videos
    assert summary["random_weights"] is True
    facts = client.get(f"/api/episodes/{summary['id']}").json()
    assert facts["fps"] == SyntheticPlan().fps
    assert not {"frames", "excerpt"} & set(facts)  # of an exported page alone
    with client_of(plain) as alone:
        answer = alone.get("/api/run").json()
        assert answer["is_episode"] is True
        assert [e["id"] for e in answer["episodes"]] == [plain.stem]


def test_an_episode_without_videos_plays_at_liberos_speed(mixed):
    with client_of(mixed) as client:
        episode = client.get("/api/run").json()["episodes"][0]
        assert episode["camera"] is None
        facts = client.get(f"/api/episodes/{episode['id']}").json()
    assert facts["fps"] == 20
    assert not any(camera["has_video"] for camera in facts["cameras"])


class Served:
    """The command `lerobot-attn view` in a process of its own."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "lerobot_attn.cli", "view", "--no-browser", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        assert line.startswith("The explorer is at http://"), (line, self.process.stderr.read())
        self.url = line.split()[4]

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        _, err = self.process.communicate(timeout=20)
        return self.process.returncode, err


def test_view_serves_tells_of_news_and_ends_with_ctrl_c(tmp_path):
    path = tmp_path / TASK / "episode_00000.zarr"
    rng = np.random.default_rng(0)
    writer = make_writer(path)
    served = Served(tmp_path, "--port", 0)
    assert served.url.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(served.url + "api/events", timeout=20) as events:
        assert events.readline() == b"event: ready\n"
        assert events.readline() == b"data: {}\n"
        writer.append_inference(inference_rows(rng, 0))
        writer.append_frames(frame_rows(rng, 0))
        writer.commit()
        committed_at = time.monotonic()
        line = b""
        while not line.startswith(b"data:"):
            line = events.readline()
        seconds = time.monotonic() - committed_at
    (changed,) = json.loads(line[5:])["changed"]
    assert changed["n_inferences"] == 1
    assert seconds < app_module.POLL_S + 8  # which is a tenth of a second, and what a busy machine adds
    status, err = served.stop()
    assert status == 0
    assert "Traceback" not in err


def test_many_stores_are_read_a_few_at_a_time(tmp_path):
    for index in range(5):
        write_episode(tmp_path / TASK / f"episode_{index:05d}.zarr", 1)
    library = Library(tmp_path)
    first = library.look(0)
    assert (len(first.summaries), first.n_unread) == (1, 4)
    for n_read in range(2, 6):
        found = library.look(0)
        assert (len(found.summaries), found.n_unread) == (n_read, 5 - n_read)
    assert [summary.id for summary in found.summaries] == [f"{TASK}:episode_{i:05d}" for i in range(5)]


def test_events_bring_what_the_run_did_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(app_module, "_LOOK_S", 0)
    monkeypatch.setattr(app_module, "POLL_S", 0.01)
    for index in range(6):
        write_episode(tmp_path / TASK / f"episode_{index:05d}.zarr", 1)
    with (
        client_of(tmp_path) as client,
        urllib.request.urlopen(f"http://127.0.0.1:{client.port}/api/events", timeout=20) as events,
    ):
        assert events.readline() == b"event: ready\n"
        run = client.get("/api/run").json()
        told = {episode["id"] for episode in run["episodes"]}
        n_unread = run["n_unread"]
        assert n_unread > 0
        while n_unread:
            line = events.readline()
            if line.startswith(b'data: {"changed'):
                news = json.loads(line[5:])
                told |= {episode["id"] for episode in news["changed"]}
                n_unread = news["n_unread"]
    assert told == {f"{TASK}:episode_{index:05d}" for index in range(6)}


def replace_text(path, text):
    """Write a file in one step: the server, which looks at it all the time, never finds it empty."""
    new = path.with_name("new")
    new.write_text(text)
    new.replace(path)


def test_events_tell_when_only_the_damaged_ones_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(app_module, "POLL_S", 0.01)
    folder = tmp_path / TASK
    for index in range(2):
        write_episode(folder / f"episode_{index:05d}.zarr", 1)
    with (
        client_of(tmp_path) as client,
        urllib.request.urlopen(f"http://127.0.0.1:{client.port}/api/events", timeout=20) as events,
    ):

        def news():
            line = b""
            while not line.startswith(b'data: {"changed'):
                line = events.readline()
            return json.loads(line[5:])

        assert events.readline() == b"event: ready\n"
        replace_text(folder / "episode_00001.zarr" / "zarr.json", "{")
        told = news()
        assert (told["changed"], told["removed"]) == ([], [f"{TASK}:episode_00001"])
        (line,) = told["damaged"]
        assert "episode_00001.zarr" in line
        replace_text(folder / "episode_00001.zarr" / "zarr.json", "[]")
        told = news()
        assert (told["changed"], told["removed"]) == ([], [])
        assert told["damaged"] != [line]
        edit_attributes(folder / "episode_00000.zarr", episode_index=float("nan"))
        (changed,) = news()["changed"]
        assert changed["episode"] is None
        assert client.get("/api/run").json()["damaged"] == told["damaged"]


def test_a_loopback_address_of_ones_own_choice_is_answered(tmp_path):
    write_episode(tmp_path / TASK / "episode_00000.zarr", 1)
    served = Served(tmp_path, "--port", 0, "--host", "127.0.0.2")
    try:
        assert served.url.startswith("http://127.0.0.2:")
        with urllib.request.urlopen(served.url + "api/run", timeout=20) as answer:
            assert answer.status == 200
        other = urllib.request.Request(served.url + "api/run", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(other, timeout=20)
    finally:
        served.stop()


def test_small_answers_do_not_wait(tmp_path):
    """Sent in two parts over a connection that is kept, an answer once took 40 ms (Nagle's algorithm)."""
    write_episode(tmp_path / TASK / "episode_00000.zarr", 2)
    served = Served(tmp_path, "--port", 0)
    connection = http.client.HTTPConnection(served.url.split("/")[2], timeout=20)
    seconds = []
    for _ in range(60):  # the first ones are acknowledged at once
        start = time.monotonic()
        connection.request("GET", "/api/episodes/nothing")
        connection.getresponse().read()
        seconds.append(time.monotonic() - start)
    connection.close()
    status, _ = served.stop()
    assert status == 0
    assert np.quantile(seconds[30:], 0.2) < 0.03  # on busy cores some wait for other processes


def test_view_opens_the_browser(tmp_path, monkeypatch):
    write_episode(tmp_path / TASK / "episode_00000.zarr", 2)
    opened = tmp_path / "opened"
    monkeypatch.setenv("BROWSER", f"sh -c 'echo %s > {opened}'")
    served = Served(tmp_path, "--port", 0, "--browser")
    deadline = time.monotonic() + 20
    while not (opened.exists() and opened.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert opened.read_text().strip() == served.url
    status, _ = served.stop()
    assert status == 0


def test_an_open_page_does_not_hold_the_server_up(tmp_path):
    """Ctrl-C ends the streams of events, too, without a word."""
    write_episode(tmp_path / TASK / "episode_00000.zarr", 2)
    served = Served(tmp_path, "--port", 0)
    with urllib.request.urlopen(served.url + "api/events", timeout=20) as events:
        events.readline()
        start = time.monotonic()
        status, err = served.stop()
    assert status == 0
    assert err == ""
    assert time.monotonic() - start < 5


def test_view_says_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "lerobot_attn.cli", "view", str(tmp_path / "none"), "--no-browser"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


DOCUMENT = Path(__file__).parent.parent / "docs" / "explorer-api.md"


def documented():
    """Return each documented request's address, and what is written of it."""
    parts = re.split(r"^### `GET (\S+)`$", DOCUMENT.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def words_of(text):
    return {word for quoted in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", quoted)}


def fields_of(value):
    """Return the names of all fields of an answer, those of rows too, but not what cameras name."""
    if isinstance(value, list):
        return set().union(*map(fields_of, value[:3])) if value else set()
    if not isinstance(value, dict):
        return set()
    named = ("kinds", "ranges", "area", "coverage")
    inner = [found for name, found in value.items() if name not in named]
    if isinstance(value.get("cameras"), dict):
        inner += value["cameras"].values()
        inner.remove(value["cameras"])
    return set(value).union(*map(fields_of, inner))


def test_every_request_is_documented_and_every_documented_one_is_there(run):
    routes = create_app(Library(run)).routes
    there = {re.sub(r":\w+}", "}", route.path) for route in routes if route.path.startswith("/api/")}
    assert set(documented()) == there - {"/api/{rest}"}
    statuses = {int(status) for status in re.findall(r"^\| (\d{3}) \|", DOCUMENT.read_text(), re.MULTILINE)}
    assert statuses == {400, 404, 405, 416, 422, 500}


def test_every_field_of_an_answer_is_documented(mixed, tmp_path):
    plan = SyntheticPlan(prefix_layers=(1,), episode_index=9, objects={"cup": "target"})
    shutil.copytree(mixed, tmp_path / "run")
    write_neurons(tmp_path / "run", plan, fired=("steered", {"vlm": {"2": [5]}}))
    with client_of(tmp_path / "run") as client:
        episode = client.get("/api/run").json()["episodes"][-1]
        values_of = {
            "id": episode["id"],
            "version": episode["version"],
            "inference": 1,
            "denoise_step": 2,
            "layer": 3,
            "camera": episode["camera"],
            "frame": 1,
            "stream": "vlm",
        }
        n_json = 0
        facts = client.get(f"/api/episodes/{episode['id']}").json()
        video_version = next(c for c in facts["cameras"] if c["name"] == episode["camera"])["video_version"]
        for address, text in documented().items():
            if address == "/api/events":
                continue
            prefix = {"layer": 1, "query": 5} if "/prefix/" in address else {}
            path = address.format(**values_of | prefix)
            path += "?units=2:5&group=task&each=1" * ("/neurons/" in address)
            answer = client.get(f"{path}?v={video_version}" if path.endswith(".jpg") else path)
            assert answer.status_code == 200, address
            cached = answer.headers["cache-control"]
            assert ("`immutable`" in text) == ("immutable" in cached), address
            assert ("`no-cache`" in text) == (cached == "no-cache"), address
            if answer.headers["content-type"] == "application/json":
                n_json += 1
                assert fields_of(answer.json()) <= words_of(text), address
            elif "X-Shape" in answer.headers:
                shape = re.search(r"float16 \(([^)]*)\)", text)[1].split(", ")
                assert len(values(answer).shape) == len(shape), address
    assert n_json == 12


def test_the_documents_example_runs_against_the_command(run, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    served = Served(run, "--port", 0)
    try:
        assert "http://127.0.0.1:8123" in example
        exec(example.replace("http://127.0.0.1:8123", served.url.rstrip("/")), {"__name__": "example"})
    finally:
        served.stop()
    first, *words = capsys.readouterr().out.splitlines()
    data = open_episode(sorted((run / "attention" / TASK).glob("*.zarr"))[0]).arrays
    inference = int(data["frame_inference"][data.sizes["frame"] // 2])
    heat = analysis.image_heatmap(data, inference=inference, query="executed")
    row, column = np.unravel_index(heat.values.argmax(), heat.shape)
    share = f"{heat.values.sum():.0%} of all attention"
    assert first == f"image: {share}, most of it on row {row}, column {column}"
    tokens = analysis.token_attention(data, inference=inference, query="executed")
    assert len(words) == tokens.sizes["token"]
    for line, label, share in zip(words, tokens["label"].values, tokens.values, strict=True):
        assert line[9:21].strip() == str(label).strip()[:12]
        assert float(line[21:].rstrip("%")) == pytest.approx(100 * share, abs=0.02)


PIXEL_MAPS = Path(slabs.__file__).parent / "page" / "tests" / "pixel_maps.json"
GEOMETRIES = [
    ImageGeometry.letterbox((48, 64), (224, 224), (16, 16), padding="centred"),
    ImageGeometry.letterbox((97, 61), (224, 224), (16, 16), padding="left_top"),
    ImageGeometry.letterbox((60, 60), (512, 512), (8, 8), padding="centred"),
    ImageGeometry.letterbox((30, 200), (224, 224), (4, 7), padding="centred"),
    # Borders that were cut off, of both sides and of one.
    ImageGeometry(40, 48, 128, 128, -6, -6, 116, 116, 3, 4),
    ImageGeometry(40, 60, 72, 128, 22, -6, 116, 116, 4, 4),
]


def test_the_pages_tests_compare_with_these_pixel_maps():
    """The page's own tests read the file: its numbers are the package's."""
    expected = []
    for geometry in GEOMETRIES:
        patches = np.mgrid[: geometry.grid_rows, : geometry.grid_columns]
        rows, columns = analysis.patch_of_pixels(geometry, (geometry.height_px, geometry.width_px))
        hidden = [
            analysis.padding_share(xr.DataArray(one, dims=("grid_y", "grid_x")), geometry).item()
            for one in np.eye(patches[0].size).reshape(-1, *patches[0].shape)
        ]
        expected.append(
            {
                "geometry": vars(geometry),
                "rows": rows.tolist(),
                "columns": columns.tolist(),
                "visible": [int(share == 0) for share in hidden],
            }
        )
    found = json.loads(PIXEL_MAPS.read_text())
    assert found == expected, f"write it anew: {json.dumps(expected)}"
