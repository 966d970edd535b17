"""Stores that point into a data set's videos: the right frames are shown everywhere, and of no other file."""

from __future__ import annotations

import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from test_explorer import client_of
from test_explorer_export import page  # noqa: F401
from test_inspection import run_cli

from lerobot_attn import AttentionConfig, open_episode, open_run
from lerobot_attn.errors import ConfigError, StoreError
from lerobot_attn.explorer.library import Library, NotThereError
from lerobot_attn.overlay import export_rerun, overlay_frames, write_overlay
from lerobot_attn.plot.cameras import camera_pictures
from lerobot_attn.report import side_by_side
from lerobot_attn.store import references
from lerobot_attn.store.references import Clip, content_of, is_unchanged, reference_to
from lerobot_attn.store.video import VideoWriter, count_frames, frame_size_px, read_frames
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode
from lerobot_attn.verify import verify_episode
from lerobot_attn.verify.contact_sheet import contact_sheet

CAMERA, WRIST = "observation.images.image", "observation.images.wrist"
FPS, BEFORE, N_FRAMES, AFTER = 20, 13, 9, 6  # frames of other episodes in the file
PLAN = SyntheticPlan(n_frames=N_FRAMES, fps=FPS, image_px={CAMERA: (96, 96), WRIST: (64, 96)})
RED = (200, 20, 20)


def document(store):
    return json.loads((store / "zarr.json").read_text())


def say(store, videos):
    """Let a store say something else of its videos."""
    found = document(store)
    found["attributes"]["videos"] = videos
    (store / "zarr.json").write_text(json.dumps(found))
    return open_episode(store)


def write_film(path, frames, fps=FPS):
    path.parent.mkdir(parents=True, exist_ok=True)
    size = frames[0].shape[:2]
    writer = VideoWriter(path, fps=fps, size_px=size)
    for frame in frames:
        writer.write(frame)
    writer.close()
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An episode with videos of its own, and one that finds the same pictures between red ones."""
    root = tmp_path_factory.mktemp("references")
    own = open_episode(write_planted_episode(root / "own", PLAN))
    store = write_planted_episode(root / "runs" / "referring", PLAN)
    videos = {}
    for camera, video in own.videos.items():
        shown = list(read_frames(video))
        red = np.full_like(shown[0], RED)
        file = root / "data" / "videos" / camera / "file-000.mp4"
        write_film(file, [red] * BEFORE + shown + [red] * AFTER)
        clip = Clip(file, BEFORE / FPS, FPS, N_FRAMES)
        videos[camera] = reference_to(clip, store, frame_size_px(file))
    for file in store.parent.glob("*.mp4"):
        file.unlink()
    return own, say(store, videos)


def difference(one, other):
    """Mean absolute difference of two pictures, of 255."""
    return np.abs(np.asarray(one).astype(int) - np.asarray(other)).mean()


def assert_alike(some, others, *, moving=True):
    """Pictures are the same but for encoders; of a camera that moves, each fits its own number best."""
    some, others = list(some), list(others)
    assert len(some) == len(others) > 0
    for number, other in enumerate(others):
        differences = (
            [difference(one, other) for one in some] if moving else [difference(some[number], other)]
        )
        assert min(differences) < 5, differences
        assert int(np.argmin(differences)) == (number if moving else 0), differences


# Frames


@pytest.mark.parametrize(("start", "n"), [(0, 5), (7, 30), (31, 9), (39, 1), (12, 0)])
def test_a_part_of_a_file_is_its_frames(tmp_path, start, n):
    frames = [np.full((64, 64, 3), 10 + 5 * i, np.uint8) for i in range(40)]
    file = write_film(tmp_path / "film.mp4", frames, fps=30)
    clip = Clip(file, start / 30, 30, n)
    assert count_frames(clip) == n
    shown = [round(frame.mean()) for frame in read_frames(clip)]
    np.testing.assert_allclose(shown, [10 + 5 * i for i in range(start, start + n)], atol=2)
    some = [i for i in (1, 2, 6, 8) if i < n]
    found = [round(frame.mean()) for frame in read_frames(clip, numbers=some)]
    np.testing.assert_allclose(found, [10 + 5 * (start + i) for i in some], atol=2)
    with pytest.raises(StoreError, match=f"film.mp4, {n} frames from .* ends before a frame {n} in it"):
        list(read_frames(clip, numbers=[*some, n]))


def test_a_part_that_the_file_does_not_hold(tmp_path):
    file = write_film(tmp_path / "film.mp4", [np.zeros((64, 64, 3), np.uint8)] * 20)
    assert count_frames(Clip(file, 0.75, FPS, 9)) == 5  # the file ends
    with pytest.raises(StoreError, match="a frame 5 in it"):
        list(read_frames(Clip(file, 0.75, FPS, 9), numbers=range(9)))
    with pytest.raises(StoreError, match="frame 1 is missing"):  # half of them are not there
        list(read_frames(Clip(file, 0, 2 * FPS, 9)))
    with pytest.raises(StoreError, match="no such video file"):
        count_frames(Clip(tmp_path / "other.mp4", 0, FPS, 9))


def test_a_file_that_begins_anew_at_one_place_only_is_decoded_from_there(tmp_path, monkeypatch):
    """Where jumping leads behind the wanted frame, it is not taken for the wanted one."""
    import av

    frames = [np.full((64, 64, 3), 10 + 5 * i, np.uint8) for i in range(40)]
    clip = Clip(write_film(tmp_path / "film.mp4", frames), 0.5, FPS, 8)
    expected = [frame.mean() for frame in read_frames(clip)]
    jumps = []
    real = av.container.InputContainer

    class Late:
        def __init__(self, container):
            self._container = container
            self.streams = container.streams
            self._late = False

        def seek(self, offset, stream):
            jumps.append(offset)
            self._late = True

        def decode(self, stream):
            decoded = self._container.decode(stream)
            return (frame for i, frame in enumerate(decoded) if not self._late or i >= 14)

        def __enter__(self):
            self._container.__enter__()
            return self

        def __exit__(self, *error):
            return self._container.__exit__(*error)

    opened = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: Late(opened(*args, **options)))
    assert real is not None
    assert [frame.mean() for frame in read_frames(clip)] == expected
    assert len(jumps) == 1


# Everything that shows pictures


def test_plots_and_overlays_show_the_episodes_own_frames(pair, tmp_path):
    own, referring = pair
    assert all(isinstance(video, Clip) for video in referring.videos.values())
    assert not list(referring.path.parent.glob("*.mp4"))
    for camera in (CAMERA, WRIST):
        frames = [8, 0, 3]
        ours, theirs = (camera_pictures(episode, camera, frames) for episode in (own, referring))
        assert not theirs.reason
        assert_alike(ours.images, theirs.images)
    assert_alike(overlay_frames(own), overlay_frames(referring))
    write_overlay(referring, tmp_path / "overlay.mp4")
    assert_alike(overlay_frames(referring), read_frames(tmp_path / "overlay.mp4"))
    left, right = (list(side_by_side(one, own)) for one in pair)
    assert_alike(left, right)
    file = referring.videos[CAMERA].path
    with pytest.raises(ConfigError, match="one of the episode's own files"):
        write_overlay(referring, file)


def test_verify_and_its_sheet(pair):
    for episode in pair:
        report = verify_episode(episode)
        assert report.passed
        found = {check.name: check.detail for check in report.checks if check.name.startswith("frames of")}
        assert found["frames of image"] == found["frames of wrist"] == f"{N_FRAMES}, as the store"
    sheets = [contact_sheet(episode) for episode in pair]
    ours, theirs = (
        [image.get_array() for axes in sheet.axes for image in axes.images if image.get_array().ndim == 3]
        for sheet in sheets
    )
    assert_alike(ours, theirs, moving=False)


def test_inspect_says_where_the_pictures_are(pair, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    _, referring = pair
    status, said, _ = run_cli(monkeypatch, capsys, "inspect", referring.path)
    assert status == 0
    assert "file-000.mp4, 9 frames from 0.65 s" in " ".join(said.split())


def test_the_explorer_and_its_export(pair, tmp_path, page):  # noqa: F811
    from test_explorer_export import Document, image_of

    from lerobot_attn.explorer.export import export_html

    own, _ = pair
    names = []
    for episode in pair:
        with client_of(episode.path) as client:
            (row,) = client.get("/api/run").json()["episodes"]
            address = f"/api/episodes/{row['id']}/{row['version']}"
            facts = client.get(f"/api/episodes/{row['id']}").json()
            assert facts["fps"] == FPS
            assert [camera["has_file"] for camera in facts["cameras"]] == [episode is own] * 2 + [False]
            assert [camera["has_video"] for camera in facts["cameras"]] == [True, True, False]
            whole = client.get(f"{address}/cameras/{CAMERA}.mp4")
            names.append([client.get(f"{address}/cameras/{WRIST}/frames/{t}.jpg") for t in (0, 4, 8)])
            assert whole.status_code == (200 if episode is own else 404), whole.text
            assert client.get(f"{address}/cameras/{CAMERA}/frames/{N_FRAMES}.jpg").status_code == 404
    assert_alike(*([Image.open(io.BytesIO(answer.content)) for answer in some] for some in names))
    ours, theirs = (
        Document(export_html(episode, tmp_path / f"{i}.html", page=page).path).data
        for i, episode in enumerate(pair)
    )
    for camera in (CAMERA, WRIST):
        shown = ([image_of(data, camera, t) for t in range(N_FRAMES)] for data in (ours, theirs))
        assert_alike(*shown)


def test_rerun(pair, tmp_path):
    pytest.importorskip("rerun")
    from test_rerun import only, picture, stacked

    pictures = []
    for i, episode in enumerate(pair):
        values = only(export_rerun(episode, tmp_path / f"{i}.rrd").path)
        blobs = values["/cameras/wrist/image:EncodedImage:blob"]
        pictures.append([picture(blobs[frame]) for frame in range(N_FRAMES)])
    assert stacked
    assert_alike(*pictures)


# A file that is not there, or another one


@pytest.fixture
def moved(pair, tmp_path):
    """A copy of the referring run and of its data, to move about."""
    root = pair[1].path.parents[len(pair[1].path.relative_to(pair[0].path.parents[3]).parts) - 1]
    shutil.copytree(root, tmp_path / "all")
    store = tmp_path / "all" / pair[1].path.relative_to(root)
    videos = document(store)["attributes"]["videos"]
    for video in videos.values():
        video["absolute_path"] = str((store.parent / video["path"]).resolve())
    say(store, videos)
    return store


def test_a_run_and_its_data_can_be_moved_together_or_the_run_alone(moved, tmp_path):
    (tmp_path / "all").rename(tmp_path / "elsewhere")
    store = tmp_path / "elsewhere" / moved.relative_to(tmp_path / "all")
    assert len(open_episode(store).videos) == 2  # by the way from the store
    (tmp_path / "elsewhere").rename(tmp_path / "all")
    alone = tmp_path / "alone" / "deep" / "er" / moved.name
    shutil.copytree(moved, alone)
    assert len(open_episode(alone).videos) == 2  # by the place on this machine
    assert_alike(overlay_frames(open_episode(alone)), overlay_frames(open_episode(moved)))


def test_a_data_set_that_is_gone_or_another_one_is_one_line(moved, tmp_path):
    clips = open_episode(moved).videos
    file = clips[CAMERA].path
    assert is_unchanged(clips[CAMERA])
    with client_of(moved) as client:
        (row,) = client.get("/api/run").json()["episodes"]
        address = f"/api/episodes/{row['id']}/{row['version']}/cameras/{CAMERA}/frames"
        assert client.get(f"{address}/0.jpg").status_code == 200
        with file.open("ab") as stream:
            stream.write(b"more")
        assert client.get(f"{address}/1.jpg").status_code == 404  # looked at anew
    assert not is_unchanged(clips[CAMERA])
    expected = rf"the data set's file {file} is not there, or another one by now; put it back, or replay"
    for _ in ("another", "gone"):
        episode = open_episode(moved)
        assert set(episode.videos) == {WRIST}
        with pytest.raises(StoreError, match=expected) as raised:
            write_overlay(episode, tmp_path / "overlay.mp4")
        assert "\n" not in str(raised.value)
        assert "put it back" in camera_pictures(episode, CAMERA, [0]).reason
        (check,) = (check for check in verify_episode(episode).checks if check.name == "frames of image")
        assert check.status == "skipped"
        assert re.search(expected, check.detail)
        file.unlink(missing_ok=True)
    library = Library(moved, rescan_s=0)
    episode = library.episode(row["id"])
    assert CAMERA not in episode.videos
    with pytest.raises(NotThereError):
        library.video(episode, CAMERA)


def test_what_removes_an_episode_leaves_the_data_set(moved):
    pytest.importorskip("torch")
    from lerobot_attn.recording.folder import remove_episode

    clips = open_episode(moved).videos
    remove_episode(moved)
    assert not moved.exists()
    assert all(is_unchanged(clip) for clip in clips.values())


# What a stranger may send


def test_a_reference_leads_to_no_file_whose_contents_its_maker_did_not_know(moved, tmp_path, monkeypatch):
    secret = write_film(tmp_path / "home" / "secret.mp4", [np.zeros((96, 96, 3), np.uint8)] * 30)
    honest = document(moved)["attributes"]["videos"][CAMERA]
    looked = []
    real = references.content_of
    monkeypatch.setattr(references, "content_of", lambda path: (looked.append(str(path)), real(path))[1])
    known = {"path": str(secret), "absolute_path": str(secret), "content": content_of(secret)}
    (tmp_path / "home" / "secret.txt").write_bytes(secret.read_bytes())
    (moved.parent / "link.mp4").symlink_to(secret)
    cases = [
        {**honest, "path": str(secret), "absolute_path": str(secret)},
        {**honest, **known, "content": None},
        {**honest, **known, "content": ""},
        {**honest, **known, "content": f"{secret.stat().st_size}-"},
        {**honest, "path": "link.mp4", "absolute_path": None},
        {**honest, **known, "path": None, "absolute_path": str(secret.with_suffix(".txt"))},
        {**honest, **known, "reference": "yes"},
        {**{k: v for k, v in honest.items() if k != "reference"}, **known},
        {**honest, **known, "start_s": float("nan")},
        {**honest, **known, "start_s": -1},
        {**honest, **known, "fps": 0},
        {**honest, **known, "n_frames": True},
        {**honest, **known, "path": 7, "absolute_path": ["x"]},
        {**honest, **known, "path": "a\0b.mp4", "absolute_path": "x" * 5000 + ".mp4"},
    ]
    for video in cases:
        assert say(moved, {CAMERA: video}).videos == {}, video
    # Looking at these may ask another machine, and tell it who asks.
    looked.clear()
    for path in (r"\\evil\share\a.mp4", "//evil/share/a.mp4", r"/\evil\share\a.mp4"):
        assert say(moved, {CAMERA: {**honest, "path": path, "absolute_path": path}}).videos == {}
    assert not looked
    # It shows no more than the store has frames; and it is no file that could be handed out whole.
    clip = say(moved, {CAMERA: {**honest, "n_frames": 10**9}}).videos[CAMERA]
    assert clip.n_frames == N_FRAMES


# Where there is nothing to point to


def test_without_a_data_set_there_is_nothing_to_point_to(tmp_path):
    for wrong in ("reference ", "refer", 1, None):
        with pytest.raises(ConfigError, match=r"cameras: got .*, expected true, false or 'reference'"):
            AttentionConfig(cameras=wrong)
    config = AttentionConfig(cameras="reference")
    with pytest.raises(ConfigError, match="there is no data set here") as raised:
        config.for_robots()
    assert "\n" not in str(raised.value)
    assert config.for_evaluation() == AttentionConfig(cameras="reference", mean_layers="all")
    pytest.importorskip("lerobot")
    from test_recording import make_policy

    from lerobot_attn import record_episodes
    from lerobot_attn.recording import VideoFrames
    from lerobot_attn.recording.run import RunRecorder

    with pytest.raises(ConfigError, match="there is no data set here"):
        RunRecorder(config, tmp_path, {})
    with (
        pytest.raises(ConfigError, match="there is no data set here"),
        record_episodes(make_policy(), tmp_path, config, fps=20),
    ):
        pass
    film = write_film(tmp_path / "film.mp4", [np.zeros((64, 64, 3), np.uint8)])
    with pytest.raises(ConfigError, match="there is no data set here"):
        VideoFrames({"image": film}, task="").check_clips([])


# Replays


def brightness(episode, frame):
    return 20 + 70 * episode + 7 * frame


def test_a_replay_points_into_the_data_sets_videos(
    demo_policy, demo_checkpoint, tmp_path, monkeypatch, capsys
):
    import recorded

    from lerobot_attn import Occlude, record_dataset

    def shown(episode, frame, camera=0, size=64):
        return np.full((size, size, 3), brightness(episode, frame) + 4 * camera, np.uint8)

    monkeypatch.setattr(recorded, "picture", shown)
    lengths = (9, 6, 8)
    root = recorded.write_dataset(tmp_path / "films", lengths, size=64, videos=True)
    assert len(list(root.rglob("*.mp4"))) == 2  # of each camera one, with three episodes
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*.mp4"))
    policy, preprocessor, _ = demo_policy(num_inference_steps=2)
    config = AttentionConfig(layers=[-1], mean_layers="none", cameras="reference")
    record_dataset(policy, root, tmp_path / "out", config, preprocessor=preprocessor, every=3)
    episodes = sorted(open_run(tmp_path / "out"), key=lambda e: e.attributes["episode_index"])
    assert not list((tmp_path / "out").rglob("*.mp4"))
    for index, episode in enumerate(episodes):
        assert episode.is_complete
        assert episode.n_frames == lengths[index]
        for number, camera in enumerate(recorded.CAMERAS):
            said = [frame.mean() for frame in read_frames(episode.videos[camera])]
            expected = [brightness(index, t) + 4 * number for t in episode.dataset.frame_index.values]
            np.testing.assert_allclose(said, expected, atol=2.5)
        assert verify_episode(episode).passed
        assert episode.attributes["capture"]["cameras"] == "reference"
        assert not episode.attributes["videos"][recorded.CAMERAS[0]]["path"].startswith("/")
    # What is painted over is in no video of the data set.
    with pytest.raises(ConfigError, match="a condition paints over pictures"):
        record_dataset(
            policy,
            root,
            tmp_path / "painted",
            config,
            preprocessor=preprocessor,
            interventions=[Occlude(where={"camera": "image"}, fill="mean")],
        )
    # The command line, some episodes.
    words = ["replay", f"--policy.path={demo_checkpoint}", f"--dataset={root}", "--every", "4"]
    options = ["--attention.cameras=reference", "--attention.layers=-1", "--attention.mean_layers=none"]
    command = [*words, *options, "--policy.num_inference_steps=2", "-o", tmp_path / "command"]
    assert run_cli(monkeypatch, capsys, *command, "--episodes", "2")[0] == 0
    (episode,) = open_run(tmp_path / "command")
    assert round(next(read_frames(episode.videos[recorded.CAMERAS[0]])).mean()) in range(158, 163)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*.mp4"))
    # Pictures that are files of their own.
    images = recorded.write_dataset(tmp_path / "images", [3])
    refused = [*words[:2], f"--dataset={images}", *options, "-o", tmp_path / "images_out"]
    status, _, said = run_cli(monkeypatch, capsys, *refused)
    assert status == 1
    assert "got 'reference', but images keeps observation.images.image as images" in " ".join(said.split())
    with pytest.raises(ConfigError, match="as images, expected videos; set cameras=true"):
        record_dataset(policy, images, tmp_path / "images_out", config, preprocessor=preprocessor)
