"""Rerun: what is read back from a recording is what the analysis says, whole or while it is recorded."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_inspection import run_cli

from lerobot_attn import AttentionConfig, analysis, open_episode, open_run
from lerobot_attn.errors import RANDOM_WEIGHTS, ConfigError, SetupError, StoreError
from lerobot_attn.overlay import ColourScale, RerunSettings, export_rerun
from lerobot_attn.recording import beside
from lerobot_attn.store.video import read_frames
from lerobot_attn.store.writer import EpisodeWriter
from lerobot_attn.synthetic import FAMILIES, SyntheticPlan, write_planted_episode

try:
    import rerun as rr
    from rerun.experimental import RrdReader
except ImportError:
    rr = None
try:
    from test_robots import rollout  # a fixture
except pytest.skip.Exception:  # LeRobot is not installed
    rollout = pytest.fixture(lambda: pytest.skip("LeRobot is not installed"))
needs_rerun = pytest.mark.skipif(rr is None, reason="rerun-sdk is not installed: lerobot_policy_attn[dev]")

CAMERA, WRIST = "observation.images.image", "observation.images.wrist"
PLAN = SyntheticPlan(n_frames=9, image_px={CAMERA: (96, 96), WRIST: (96, 128)})


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    return open_episode(write_planted_episode(tmp_path_factory.mktemp("planted"), PLAN))


def contents(path):
    """Of each recording in a file, by its id: entity and component → frame → value; frame None is static.

    Of values for the same frame the viewer shows the one that came last.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what was sent has no table of contents, and Rerun says so
        reader = RrdReader(path)
        found = {}
        for entry in reader.recordings():
            values = found.setdefault(entry.recording_id, {})
            newest = {}
            for chunk in reader.stream(store=entry).to_chunks():
                batch = chunk.to_record_batch()
                columns = {name: batch.column(name) for name in batch.schema.names}
                rows = columns.pop("rerun.controls.RowId")
                frames = columns.pop("frame", None)
                for name, column in columns.items():
                    for row in range(batch.num_rows):
                        frame = None if frames is None else frames[row].as_py()
                        key = (f"{chunk.entity_path}:{name}", frame)
                        if column[row].is_valid and newest.get(key, b"") < rows[row].as_py():
                            newest[key] = rows[row].as_py()
                            values.setdefault(key[0], {})[frame] = column[row].as_py()
    return found


def only(path):
    (values,) = contents(path).values()
    return values


def picture(blob):
    (file,) = blob
    return np.asarray(Image.open(io.BytesIO(bytes(file))))


def stacked(values):
    return np.array([values[frame] for frame in sorted(values)])


def check_maps(values, episode, root="", settings=None):
    """What an episode's recording holds is what the analysis says of it."""
    settings, data = settings or RerunSettings(), episode.arrays
    n_frames, query = episode.n_frames, "frame" if (data.frame_query.values >= 0).all() else "executed"
    shares = analysis.modality_share(data, frame="all", query=query)
    np.testing.assert_allclose(stacked(values[f"{root}/shares:Scalars:scalars"]), shares.values)
    short = episode.layout.short_names
    names = [short.get(name, name) for name in shares.modality.values.tolist()]
    assert values[f"{root}/shares:SeriesLines:names"] == {None: names}
    maps = {
        name: analysis.image_heatmap(data, name, frame="all", query=query)
        for name in analysis.camera_names(data)
    }
    ends = [np.percentile(heatmap.values, settings.clip) for heatmap in maps.values()]
    scale = ColourScale(max(ends), settings.colormap, settings.alpha)
    for name, heatmap in maps.items():
        camera = f"{root}/cameras/{short[name]}"
        assert set(values[f"{camera}/heatmap:EncodedImage:blob"]) == set(range(n_frames))
        for frame in (0, n_frames // 2, n_frames - 1):
            (patches,) = values[f"{camera}/patches:Tensor:data"][frame]
            np.testing.assert_array_equal(
                np.reshape(patches["buffer"], patches["shape"]), heatmap.values[frame]
            )
            _, geometry, _ = analysis.camera_geometry(data, name)
            pixels = scale.rgba(analysis.on_camera_pixels(heatmap.values[frame], geometry))
            shown = picture(values[f"{camera}/heatmap:EncodedImage:blob"][frame])
            np.testing.assert_array_equal(shown, pixels)
        for frame, image in enumerate(read_frames(episode.video(name), size_px=episode.image_size_px(name))):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=settings.quality)
            (blob,) = values[f"{camera}/image:EncodedImage:blob"][frame]
            assert bytes(blob) == file.getvalue()
    for name in ("action", "state"):
        found = stacked(values[f"{root}/{name}:Scalars:scalars"])
        np.testing.assert_array_equal(found, data[name].values.astype(float))


# A file


@needs_rerun
@pytest.mark.parametrize("family", ["planted", *FAMILIES])
def test_a_file_holds_what_the_analysis_says(tmp_path, episode, family):
    if family != "planted":
        episode = open_episode(write_planted_episode(tmp_path, FAMILIES[family]))
    written = export_rerun(episode, tmp_path / "episode.rrd")
    assert (written.n_frames, written.notes) == (episode.n_frames, ())
    values = only(written.path)
    check_maps(values, episode)
    data = episode.arrays
    begins = np.flatnonzero(np.diff(data.frame_inference.values, prepend=-1)).tolist()
    assert sorted(values["/chunk:Tensor:data"]) == begins
    queries = data.frame_query.values
    for frame, row in values.get("/predicted:Scalars:scalars", {}).items():
        chunk = data.action_chunk.values[data.frame_inference.values[frame]]
        np.testing.assert_array_equal(row, chunk[queries[frame]])
    assert len(values.get("/predicted:Scalars:scalars", {})) == (queries >= 0).sum()


@needs_rerun
def test_words_are_a_table_and_lines(tmp_path, episode):
    values = only(export_rerun(episode, tmp_path / "episode.rrd").path)
    shares = analysis.token_attention(episode.arrays, frame="all", query="frame")
    shares = shares.isel(token=shares.kind.values == "task")
    np.testing.assert_allclose(stacked(values["/words:Scalars:scalars"]), shares.values)
    labels = shares.label.values.tolist()
    assert values["/words:SeriesLines:names"] == {None: [f"{i} {word}" for i, word in enumerate(labels)]}
    for frame in range(PLAN.n_frames):
        (table,) = values["/words/table:TextDocument:text"][frame]
        most = int(shares.values[frame].argmax())
        assert f"| **{labels[most]}** | **{100 * shares.values[frame, most]:.2f} %** |" in table


@needs_rerun
def test_timelines_are_frame_and_time(tmp_path, episode):
    export_rerun(episode, tmp_path / "episode.rrd")
    timelines = {}
    for chunk in RrdReader(tmp_path / "episode.rrd").store().stream().to_chunks():
        if not chunk.is_static:
            batch = chunk.to_record_batch()
            assert set(chunk.timeline_names) == {"frame", "time"}
            for frame, when in zip(batch.column("frame"), batch.column("time"), strict=True):
                timelines[frame.as_py()] = when.value / 1e9
    assert timelines == pytest.approx({frame: frame / PLAN.fps for frame in range(PLAN.n_frames)})


@needs_rerun
def test_it_opens_with_a_blueprint_and_says_what_the_maps_are(tmp_path, episode):
    export_rerun(episode, tmp_path / "episode.rrd")
    reader = RrdReader(tmp_path / "episode.rrd")
    (blueprint,) = reader.blueprints()
    shown = "".join(
        str(chunk.to_record_batch().to_pydict()) for chunk in reader.stream(store=blueprint).to_chunks()
    )
    for view in ("cameras/image", "cameras/wrist", "/shares", "/words", "/action", "/chunk", "/about"):
        assert view in shown
    assert RANDOM_WEIGHTS in shown
    (text,) = only(tmp_path / "episode.rrd")["/about:TextDocument:text"][None]
    for said in (RANDOM_WEIGHTS, PLAN.task, "layer 3", "share of all attention"):
        assert said in text


@needs_rerun
def test_a_remark_and_a_missing_video_are_said(tmp_path):
    policy = {"type": "pi05", "remark": "stand-in for a real one", "n_layers": 4, "n_heads": 2}
    path = write_planted_episode(tmp_path, PLAN, policy=policy | {"n_denoise_steps": 3})
    (path.parent / "episode_00000.wrist.mp4").unlink()
    written = export_rerun(open_episode(path), tmp_path / "episode.rrd")
    (note,) = written.notes
    assert "wrist" in note
    assert "its MP4 is not beside the store" in note
    values = only(written.path)
    assert "/cameras/wrist/image:EncodedImage:blob" not in values
    assert len(values["/cameras/wrist/heatmap:EncodedImage:blob"]) == PLAN.n_frames
    (text,) = values["/about:TextDocument:text"][None]
    assert "real one" in text
    assert "not beside the store" in text
    assert RANDOM_WEIGHTS not in text


@needs_rerun
def test_the_command_writes_the_chosen_map(tmp_path, episode, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run_cli(
        monkeypatch, capsys, "export-rerun", episode.path, "--layer", "2", "--camera", "wrist"
    )
    assert (status, out.strip()) == (0, "Wrote episode_00000.rrd")
    values = only(tmp_path / "episode_00000.rrd")
    heatmap = analysis.image_heatmap(episode.arrays, "wrist", frame=4, query="frame", layer=2)
    (patches,) = values["/cameras/wrist/patches:Tensor:data"][4]
    np.testing.assert_array_equal(np.reshape(patches["buffer"], patches["shape"]), heatmap.values)
    assert not [name for name in values if name.startswith("/cameras/image")]


@needs_rerun
def test_nothing_is_left_where_it_cannot_be_written(tmp_path, episode):
    with pytest.raises(ConfigError, match=r"expected \.rrd"):
        export_rerun(episode, tmp_path / "episode.mp4")
    with pytest.raises(StoreError, match="holds no frames"):
        export_rerun(
            open_episode(write_planted_episode(tmp_path / "empty", SyntheticPlan(n_frames=0))),
            tmp_path / "episode.rrd",
        )
    with pytest.raises(LookupError, match="layer 9"):
        export_rerun(episode, tmp_path / "episode.rrd", RerunSettings(layer=9))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write the recording"):
        export_rerun(episode, tmp_path / "file" / "episode.rrd")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@needs_rerun
def test_a_disk_that_becomes_full_is_one_line_and_leaves_no_file(tmp_path, episode):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from lerobot_attn.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "export-rerun", episode.path, "-o", tmp_path / "episode.rrd"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "cannot write the recording" in error
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.iterdir()]


def test_without_rerun_one_line_says_what_to_install(tmp_path, episode, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rerun", None)  # as if it were not installed
    status, _, err = run_cli(monkeypatch, capsys, "export-rerun", episode.path, "-o", tmp_path / "e.rrd")
    assert status == 1
    assert len(err.strip().splitlines()) == 1
    assert "lerobot_policy_attn[rerun]" in err
    monkeypatch.delitem(sys.modules, "rerun")
    monkeypatch.setattr(beside.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(beside.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("it was started"))
    with (
        pytest.raises(SetupError, match=r"lerobot_policy_attn\[rerun\]"),
        beside.viewers_beside(tmp_path, AttentionConfig(rerun=True)),
    ):
        pass
    with beside.viewers_beside(tmp_path, AttentionConfig()):
        pass


# While it is recorded


@pytest.fixture
def viewer(tmp_path, monkeypatch):
    """Rerun's own receiver, which writes what a viewer would get to a file: its address, and its end."""
    # It would report its use otherwise; the settings are a folder of this test's.
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    import rerun_cli

    command = [str(Path(rerun_cli.__file__).with_name("rerun"))]
    subprocess.run([*command, "analytics", "disable"], check=True, capture_output=True, timeout=60)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = tmp_path / "received.rrd"
    process = subprocess.Popen([*command, "--bind", "127.0.0.1", "--port", str(port), "--save", str(file)])

    def end(check):
        """End the receiver once what it has received passes a check: it takes in nothing more then."""
        with suppress(pytest.fail.Exception):
            until(lambda: passes(check, file), 30)
        process.send_signal(signal.SIGINT)
        process.wait(60)
        check(contents(file))

    yield f"rerun+http://127.0.0.1:{port}/proxy", end
    process.kill()
    process.wait()


def passes(check, file):
    try:
        check(contents(file))
    except (AssertionError, LookupError, OSError, RuntimeError, ValueError):  # not there yet, or in part
        return False
    return True


def until(condition, seconds=60):
    for _ in range(20 * seconds):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it did not come")


@needs_rerun
def test_episodes_are_sent_as_they_grow(tmp_path, viewer, monkeypatch):
    from lerobot_attn.overlay import live, rerun

    url, end = viewer
    sent, waited, go_on = [], set(), threading.Semaphore(0)
    commit, add = EpisodeWriter.commit, rerun.EpisodeTrack.add

    def slow_commit(writer):
        commit(writer)
        written = (writer.path, open_episode(writer.path).n_frames)
        if written[1] and written not in waited:
            waited.add(written)
            go_on.acquire(timeout=20)  # until what was committed is sent

    def told_add(track, episode, progress=None):
        is_new = episode.n_frames > track._n_shown
        add(track, episode, progress)
        if is_new:
            sent.append((episode.path.stem, episode.n_frames, episode.is_complete))
            go_on.release()

    monkeypatch.setattr(EpisodeWriter, "commit", slow_commit)
    monkeypatch.setattr(rerun.EpisodeTrack, "add", told_add)
    over = threading.Event()

    def record():
        for index in range(2):
            write_planted_episode(tmp_path / "run", SyntheticPlan(n_frames=9, episode_index=index))
        over.set()

    thread = threading.Thread(target=record)
    thread.start()
    said = []
    live.follow_rerun(tmp_path / "run", url=url, stopped=over.is_set, say=said.append)
    thread.join(60)
    # Each commit by itself, long before the episode's end.
    assert sent == [(f"episode_0000{index}", n, False) for index in range(2) for n in (3, 6, 9)]
    assert len([line for line in said if "Sending" in line]) == 1

    def check(received):
        assert sorted(received) == ["synthetic_0/episode_00000", "synthetic_0/episode_00001"]
        for name, values in received.items():
            episode = open_episode(tmp_path / "run" / "attention" / f"{name}.zarr")
            check_maps(values, episode)  # the colours of all frames are those of the whole episode

    end(check)


@needs_rerun
def test_a_session_of_somebody_elses_is_joined(tmp_path, viewer):
    from lerobot_attn.overlay import live

    url, end = viewer
    path = write_planted_episode(tmp_path / "run", PLAN)
    until(lambda: live._listens(live._address(url)))
    theirs = rr.RecordingStream("rollout", recording_id="a rollout")
    theirs.connect_grpc(url)
    theirs.log("observation.image", rr.TextDocument("a picture"))
    live.follow_rerun(path, url=url, session=live.RerunSession("rollout", "a rollout"))
    theirs.flush()

    def check(received):
        assert list(received) == ["a rollout"]
        values = received["a rollout"]
        assert "/observation.image:TextDocument:text" in values
        check_maps(values, open_episode(path), "/attention/synthetic_0/episode_00000")

    end(check)


@needs_rerun
def test_what_was_recorded_before_is_not_sent_and_a_viewer_is_waited_for(tmp_path):
    from lerobot_attn.overlay import live

    write_planted_episode(tmp_path, PLAN)
    looks = iter([False, False, True])
    said = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"rerun+http://127.0.0.1:{port}/proxy"
    live.follow_rerun(tmp_path, url=url, stopped=lambda: next(looks), say=said.append)
    assert [line.split()[0] for line in said] == ["Waiting", "No"]
    following = live._Following(rr, RerunSettings(), url, None, time.time() + 60, said.append)
    (store,) = live._stores(tmp_path)
    following.look(store, is_last=True)
    assert not following.is_done(store)
    with pytest.raises(ConfigError, match="expected an address"):
        live.follow_rerun(tmp_path, url="localhost:9876", say=said.append)


def test_lerobots_session_is_handed_on(tmp_path, monkeypatch):
    started = []

    class Process:
        pid, returncode, stdin = os.getpid(), 0, io.BytesIO()

        def __init__(self, words, **options):
            started.append(words[3:])

        def poll(self):
            return None

        def wait(self, timeout=None):
            started.append("ended")
            return 0

    class Session:
        get_application_id = staticmethod(lambda: "rollout")
        get_recording_id = staticmethod(lambda: "1234")

    monkeypatch.setattr(beside.subprocess, "Popen", Process)
    monkeypatch.setattr(beside.os, "setpriority", lambda *args: None)
    monkeypatch.setitem(sys.modules, "rerun", Session)
    with beside.viewers_beside(tmp_path, AttentionConfig(rerun=True), "rerun+http://10.0.0.2:9876/proxy"):
        assert len(started) == 1
    words, ended = started
    assert ended == "ended"
    assert words[:3] == ["export-rerun", str(tmp_path), "--follow"]
    assert words[words.index("--connect") + 1] == "rerun+http://10.0.0.2:9876/proxy"
    assert words[words.index("--application") + 1] == "rollout"
    assert words[words.index("--recording-id") + 1] == "1234"


@needs_rerun
def test_a_recording_sends_while_it_records(demo_policy, tmp_path, viewer, monkeypatch, caplog):
    pytest.importorskip("lerobot")
    from test_own_loop import Robot, observation

    from lerobot_attn import record_episodes

    url, end = viewer
    joined = [*beside._session(), "--connect", url]
    monkeypatch.setattr(beside, "_session", lambda: joined)
    policy, preprocess, postprocess = demo_policy(num_inference_steps=2)
    robot, config = Robot(), AttentionConfig(layers=[-1], rerun=True)
    caplog.set_level(logging.WARNING)
    with (
        record_episodes(policy, tmp_path / "run", config, fps=20, preprocessor=preprocess) as recording,
        recording.episode(task="pick up the soup") as episode,
    ):
        policy.reset()
        for _ in range(12):
            seen = observation(robot.n_actions)
            action = postprocess(policy.select_action(preprocess(seen)))[0]
            episode.step(seen, action)
            robot.send_action(action)
    assert "ended by itself" not in caplog.text
    (found,) = open_run(tmp_path / "run")

    def check(received):
        (values,) = received.values()
        check_maps(values, found)

    end(check)


@needs_rerun
def test_a_rollout_sends_into_lerobots_own_session(rollout, viewer):
    url, end = viewer
    port = url.rpartition(":")[2].partition("/")[0]
    display = ["--display_data=true", "--display_ip=127.0.0.1", f"--display_port={port}"]
    rollout("--robot.breaks_at=34", "--attention.rerun=true", *display, raises=ConnectionError)
    (found,) = open_run(rollout.stores)

    def check(received):
        (values,) = received.values()
        names = {name.partition(":")[0] for name in values}
        root = "/attention/rollout_0/episode_00000"
        assert f"{root}/shares" in names
        check_maps(values, found, root)
        # LeRobot's own pictures, over which the blueprint puts the heatmaps.
        short = set(found.layout.short_names.values())
        assert {f"/observation.{name}" for name in short} & names

    end(check)
