"""Verification: a good episode passes, and each way of being broken fails the check that is about it."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import zarr
from changed import without_copies
from rich.console import Console
from test_inspection import run_cli

from lerobot_attn.errors import ConfigError, StoreError
from lerobot_attn.figures.canvas import RANDOM_WEIGHTS
from lerobot_attn.store.damage import find_damage
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.video import VideoWriter
from lerobot_attn.synthetic import SyntheticPlan, camera_frames, write_planted_episode
from lerobot_attn.verify import VerifySettings, contact_sheet, verify_episode

CAMERA = "observation.images.image"
PLAN = SyntheticPlan(n_frames=14, image_px={CAMERA: (96, 96), "observation.images.wrist": (96, 128)})


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    return write_planted_episode(tmp_path_factory.mktemp("good"), PLAN)


@pytest.fixture
def path(good, copied):
    return copied(good)


def verdicts(report):
    return {check.name: check.passed for check in report.checks}


def failures(path, **options):
    """Names of failed checks → what they say, of an episode that is opened anew."""
    report = verify_episode(open_episode(path), **options)
    assert report.passed == (not any(check.passed is False for check in report.checks))
    return {check.name: check.detail for check in report.checks if check.passed is False}


def write_video(file, frames):
    writer = VideoWriter(file, fps=20, size_px=frames[0].shape[:2])
    for frame in frames:
        writer.write(np.ascontiguousarray(frame))
    writer.close()


def edit(path, name, function):
    """Change an array of the store in place, as a bug in the recorder would have written it."""
    array = zarr.open_group(without_copies(path), mode="r+", use_consolidated=False)[name]
    values = array[:]
    function(values)
    array[:] = values


def edit_attributes(path, function):
    document = json.loads((path / "zarr.json").read_text())
    function(document["attributes"])
    (path / "zarr.json").write_text(json.dumps(document))


def damage(file):
    file.write_bytes(b"\7" * file.stat().st_size)


@pytest.mark.parametrize("thorough", [False, True])
def test_a_good_episode_passes(path, thorough):
    calls = []
    report = verify_episode(open_episode(path), thorough=thorough, progress=lambda *call: calls.append(call))
    assert report.passed
    assert set(verdicts(report).values()) == {True}, report
    n = (5 if thorough else 3) + 14 + find_damage(path).n_chunks
    assert calls[-1] == (n, n)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    words = {check.name: check.detail for check in report.checks}
    assert words["chunks"] == "69 of 69 can be read"
    assert ("every inference" in words["row sums"]) == thorough


def test_report_as_text_and_values(path):
    report = verify_episode(open_episode(path))
    found = json.loads(json.dumps(report.to_dict()))
    assert found["passed"] is True
    assert found["random_weights"] is True
    assert found["checks"][0] == {"name": "complete", "passed": True, "detail": "14 frames, 5 inferences"}
    console = Console(file=io.StringIO(), width=140)
    report.render(console)
    text = console.file.getvalue()
    assert "11 checks passed, 0 failed, 0 skipped" in " ".join(text.split())
    assert RANDOM_WEIGHTS in text


def test_an_incomplete_episode_is_checked_all_the_same(tmp_path):
    path = write_planted_episode(tmp_path, replace(PLAN, complete=False), interrupted_by="ctrl-c")
    assert failures(path) == {"complete": "incomplete (ctrl-c): it holds 14 frames, 5 inferences"}


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_a_shifted_video_fails(path, shift):
    frames = list(camera_frames(PLAN, 0))
    shifted = [frames[min(max(t + shift, 0), len(frames) - 1)] for t in range(len(frames))]
    write_video(open_episode(path).eval_video, shifted)
    found = failures(path)
    assert list(found) == ["evaluation's timing"]
    assert f"fits the evaluation's frame t{-shift:+d} better" in found["evaluation's timing"]


def test_a_turned_view_fails(path):
    frames = [frame[::-1, ::-1] for frame in camera_frames(PLAN, 0)]
    write_video(open_episode(path).eval_video, frames)
    found = failures(path)
    assert list(found) == ["evaluation's view"]
    assert "image turned by 180° differs by 1." in found["evaluation's view"]


def test_another_scene_fails(path):
    rng = np.random.default_rng(0)
    write_video(open_episode(path).eval_video, list(rng.integers(0, 255, (14, 96, 96, 3), np.uint8)))
    assert "no camera's view" in failures(path)["evaluation's view"]


def test_an_evaluation_of_another_size_is_scaled(path):
    frames = [np.repeat(np.repeat(frame, 2, axis=0), 2, axis=1) for frame in camera_frames(PLAN, 0)]
    write_video(open_episode(path).eval_video, frames)
    assert failures(path) == {}


def test_a_still_scene_does_not_fail(path):
    """Where only what an encoder makes of each frame differs; the evaluation's MP4 is of another encoder."""
    film = pytest.importorskip("lerobot.utils.io_utils").write_video
    still = [next(camera_frames(PLAN, 0))] * 14
    episode = open_episode(path)
    film(episode.eval_video, still, 20)
    write_video(episode.videos[CAMERA], still)
    checks = {check.name: check for check in verify_episode(open_episode(path)).checks}
    assert checks["evaluation's timing"].passed is None
    assert "moves too little to tell" in checks["evaluation's timing"].detail


@pytest.mark.parametrize(("n_frames", "timing"), [(1, None), (2, None), (3, True), (4, True)])
def test_short_episodes(tmp_path, n_frames, timing):
    path = write_planted_episode(tmp_path, replace(PLAN, n_frames=n_frames))
    report = verify_episode(open_episode(path))
    assert report.passed
    assert verdicts(report)["evaluation's timing"] is timing


def test_a_missing_frame_fails(path):
    episode = open_episode(path)
    write_video(episode.videos[CAMERA], list(camera_frames(PLAN, 0))[:-1])
    write_video(episode.eval_video, list(camera_frames(PLAN, 0))[1:])
    found = failures(path)
    assert found["frames of image"] == "episode_00000.image.mp4 has 13 frames, the store 14"
    assert "has 13 frames, the store 14" in found["frames of evaluation"]
    assert "t-1" in found["evaluation's timing"]


def test_missing_videos_are_skipped(tmp_path, path):
    silent = write_planted_episode(tmp_path / "none", replace(PLAN, videos=False))
    report = verify_episode(open_episode(silent))
    assert report.passed
    skipped = [name for name, passed in verdicts(report).items() if passed is None]
    assert skipped == [
        "frames of image",
        "frames of wrist",
        "frames of evaluation",
        "evaluation's view",
        "evaluation's timing",
    ]
    open_episode(path).videos[CAMERA].unlink()
    open_episode(path).eval_video.unlink()
    report = verify_episode(open_episode(path))
    assert report.passed
    words = {check.name: check.detail for check in report.checks if check.passed is None}
    assert words["frames of image"] == "its MP4 is not beside the store; copy it too"
    assert "not in the run's folder" in words["evaluation's view"]


def test_an_unreadable_video_fails(path):
    video = open_episode(path).videos[CAMERA]
    video.write_bytes(video.read_bytes()[:300])
    found = failures(path)
    assert "not a readable video" in found["frames of image"]


@pytest.mark.parametrize(
    ("name", "frame", "value", "words"),
    [
        ("frame_inference", 13, 5, "frame 13: inference 5, action token 1, but the store has inferences 0"),
        ("frame_inference", 4, -1, "frame 4: inference -1"),
        ("frame_inference", 5, 0, "frame 5: inference 0, action token 2, but inferences must follow"),
        ("frame_inference", 3, 0, "frame 3: inference 0, action token 0, but it is not as many frames"),
        ("frame_query", 7, 3, "executed are tokens 0 to 2"),
        ("frame_query", 7, 0, "not as many frames after its inference as its token says"),
        ("inference_frame", 2, 5, "frame 6: inference 2"),
    ],
)
def test_a_wrong_table_fails(path, name, frame, value, words):
    edit(path, name, lambda values: values.__setitem__(frame, value))
    found = failures(path)
    assert list(found) == ["frame table"]
    assert words in found["frame table"]


@pytest.mark.parametrize("name", ["suffix_attention", "suffix_attention_mean"])
def test_rows_that_do_not_sum_to_one_fail(path, name):
    edit(path, name, lambda values: values[4, 1, -1].__imul__(np.float16(1.01)))
    found = failures(path)
    assert list(found) == ["row sums"]
    assert f"{name}, inference 4, denoise step 1, layer 3" in found["row sums"]


def test_rows_of_other_inferences_need_thorough(path):
    edit(path, "suffix_attention", lambda values: values[1, 0, 0].__imul__(np.float16(0.9)))
    assert failures(path) == {}
    assert "inference 1, denoise step 0, layer 2" in failures(path, thorough=True)["row sums"]


def test_nan_fails(path):
    edit(path, "suffix_attention", lambda values: values.__setitem__((0, 0, 0, 0, 0, 3), np.nan))
    assert "inference 0" in failures(path)["row sums"]


def test_attention_to_a_masked_key_fails(path):
    masked = int(np.flatnonzero(open_episode(path).arrays["key_kind"].values[0] == 0)[0])
    tiny = np.float16(6e-8)
    edit(path, "suffix_attention", lambda values: values.__setitem__((0, 2, 1, 0, 0, masked), tiny))
    found = failures(path)
    assert list(found) == ["masked keys"]
    assert "inference 0, denoise step 2, layer 3" in found["masked keys"]


def test_a_damaged_chunk_fails_with_its_place(path):
    (shard,) = (file for file in (path / "suffix_attention" / "c" / "2").rglob("*") if file.is_file())
    data = bytearray(shard.read_bytes())
    data[: len(data) // 12] = b"\7" * (len(data) // 12)
    shard.write_bytes(data)
    found = failures(path)
    assert list(found) == ["chunks"]
    place = "suffix_attention: inference 2, denoise_step 0, layer 2 (chunk 2/0/0)"
    assert found["chunks"].startswith(f"damaged: {place}: its checksum does not match")
    report = verify_episode(open_episode(path))
    assert json.loads(json.dumps(report.to_dict()))["damaged"][0] == {
        "array": "suffix_attention",
        "chunk": [2, 0, 0],
        "at": {"inference": 2, "denoise_step": 0, "layer": 2},
        "reason": "its checksum does not match",
    }
    (rows,) = (check for check in report.checks if check.name == "row sums")
    assert rows.passed
    assert rows.detail.endswith("; maps left out: 1 damaged")
    console = Console(file=io.StringIO(), width=140)
    report.render(console)
    assert f"damaged: {place}" in console.file.getvalue()


def test_a_lost_shard_fails(path):
    """Zarr reads what is missing as NaN."""
    (shard,) = (file for file in (path / "suffix_attention" / "c" / "0").rglob("*") if file.is_file())
    shard.unlink()
    found = failures(path)
    assert "suffix_attention: inference 0 (shard 0): its file is missing" in found["chunks"]
    assert "inference 0, denoise step 0, layer 2" in found["row sums"]


def test_a_damaged_table_fails_where_it_is_needed(path):
    for file in (path / "frame_query").rglob("*"):
        if file.is_file() and file.name != "zarr.json":
            damage(file)
    found = failures(path)
    assert list(found) == ["chunks", "frame table"]
    assert "frame_query: frame 0 to 13 (chunk 0): its checksum does not match" in found["chunks"]
    assert found["frame table"].startswith("cannot be checked: ")


def test_what_cannot_be_checked_is_named(path):
    damage(path / "layer" / "c" / "0")
    found = failures(path)
    assert "layer: the whole array: its checksum does not match" in found["chunks"]
    # xarray cannot open a dataset without the labels of its dimensions.
    for name in ("frame table", "layout", "row sums, masked keys"):
        assert found[name].startswith("cannot be checked: ")


def test_a_layout_that_does_not_match_the_keys_fails(path):
    edit(path, "key_column", lambda values: values.__setitem__(slice(0, 256), values[255::-1].copy()))
    assert failures(path) == {"layout": "key_column does not match the layout"}


def test_a_camera_whose_video_has_another_size_fails(path):
    edit_attributes(path, lambda attributes: attributes["videos"][CAMERA].update(height_px=90))
    assert "image's video is (90, 96), its image (96, 96)" in failures(path)["layout"]


def test_stores_of_means_alone(tmp_path):
    report = verify_episode(open_episode(write_planted_episode(tmp_path, replace(PLAN, layers=()))))
    assert report.passed
    assert verdicts(report)["row sums"] is True


def test_an_empty_episode_is_reported(tmp_path):
    episode = open_episode(write_planted_episode(tmp_path, replace(PLAN, n_frames=0, complete=False)))
    assert verdicts(verify_episode(episode))["row sums"] is None
    with pytest.raises(StoreError, match="holds no frames yet"):
        contact_sheet(episode)


def test_contact_sheet(path):
    episode = open_episode(path)
    figure = contact_sheet(episode)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles) == 3 * 2 * 3
    assert titles[:3] == [
        "inference 0, frame 0: image",
        "evaluation's MP4, frame 0",
        "image with attention, frame 0",
    ]
    assert [title for title in titles if title.startswith("inference")][2::2] == [
        "inference 2, frame 6: image",
        "inference 4, frame 12: image",
    ]
    shown = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    view, film, over = (
        shown[title].astype(int)
        for title in (
            "inference 2, frame 6: image",
            "evaluation's MP4, frame 6",
            "image with attention, frame 6",
        )
    )
    assert np.abs(view - film).mean() < 1
    assert 0 < (np.abs(view - over).max(axis=-1) > 40).mean() < 0.05
    assert RANDOM_WEIGHTS in [text.get_text() for text in figure.texts]


def test_contact_sheet_without_videos(tmp_path):
    figure = contact_sheet(open_episode(write_planted_episode(tmp_path, replace(PLAN, videos=False))))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts.count("no camera video\nof this frame") == 12
    assert texts.count("no evaluation MP4\nof this frame") == 6


def test_command_draws_the_sheet_and_its_status_tells(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run_cli(monkeypatch, capsys, "verify", path)
    assert status == 0
    assert "Wrote contact-sheet.png" in out
    assert (tmp_path / "contact-sheet.png").stat().st_size > 10_000
    settings = tmp_path / "verify.yaml"
    settings.write_text("thorough: true\nlayer: 2\n")
    edit_attributes(path, lambda attributes: attributes.update(complete=False))
    status, out, _ = run_cli(
        monkeypatch, capsys, "verify", path, "--settings", settings, "--json", "--no-sheet"
    )
    assert status == 1
    facts = json.loads(out)
    assert [check["name"] for check in facts["checks"] if check["passed"] is False] == ["complete"]
    assert facts["damaged"] == []
    (rows,) = (check for check in facts["checks"] if check["name"] == "row sums")
    assert "every inference" in rows["detail"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "all"}, "layer: got 'all', expected one number or 'mean'"),
        ({"thorough": "yes"}, "thorough: got 'yes', expected true or false"),
        ({"dpi": 5}, "dpi: got 5, expected a number from 30 to 1200"),
        ({"colormap": "heat"}, "colormap 'heat': unknown"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        VerifySettings(**settings)


def test_sheet_of_another_layer(path):
    sheets = [contact_sheet(open_episode(path), VerifySettings(layer=layer)) for layer in (2, 3)]
    views = [sheet.axes[2].images[0].get_array() for sheet in sheets]
    assert not np.array_equal(*views)
