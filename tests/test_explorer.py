"""The explorer's server: what it answers is what the store holds, and it answers nothing else."""

import contextlib
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import uvicorn
from test_store import frame_rows, inference_rows, make_writer, write_episode

from lerobot_attn import analysis, open_episode
from lerobot_attn.errors import StoreError
from lerobot_attn.explorer import app as app_module
from lerobot_attn.explorer.app import create_app
from lerobot_attn.explorer.library import Library
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode
from lerobot_attn.video import read_frames

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
def client_of(path, **options):
    """Serve a path on a thread."""
    app = create_app(Library(path, rescan_s=0), **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            yield Client(listener.getsockname()[1])
        finally:
            server.should_exit = True
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
            np.testing.assert_array_equal(slab, rows["suffix_attention_mean"][0])
            assert len(client.get(f"{at}/shares?first={index}").json()["share"]) == 1
            assert client.get("/api/run").json()["episodes"][0]["n_inferences"] == index + 1


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


class Served:
    """The command `lerobot-attn view` in a process of its own."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "lerobot_attn.cli", "view", *map(str, arguments), "--no-browser"]
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
        assert events.readline().startswith(b":")
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
    assert seconds < app_module.POLL_S + 2  # half a second, and what a busy machine adds
    status, err = served.stop()
    assert status == 0
    assert "Traceback" not in err


def test_view_says_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "lerobot_attn.cli", "view", str(tmp_path / "none"), "--no-browser"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
