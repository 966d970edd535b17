"""Any legal path is a legal path: no letter of it is a URL, a pattern, an option or a protocol."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from lerobot_attn import analysis
from lerobot_attn.cli import main
from lerobot_attn.recording.folder import RunFolder, remove_episode
from lerobot_attn.store.damage import find_damage
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.repair import repair
from lerobot_attn.store.runs import open_run
from lerobot_attn.store.video import VideoWriter, count_frames, read_frames
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

NAMES = [
    *(
        "h#1",
        "a?b",
        "x::y",
        "run:a",
        "file:x",
        "s3:bucket",
        "memory:",
        "a b ",
        "é è",
        "[1]",
        "*",
        "50%",
        "%23",
    ),
    *("-o", "~", "a&b;c", "'\"", "back\\slash", "运行", "🤖", "a\nb", "x.zarr", "{}", "$HOME", "concat:a|b"),
]
PLAN = SyntheticPlan(n_frames=12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_planted_episode(folder / "task_0", PLAN)
    return folder


@pytest.fixture(params=["absolute", "relative"])
def at(request, monkeypatch, tmp_path):
    """Return a function: a name → the path of it, in a folder that exists, absolute or relative."""
    monkeypatch.chdir(tmp_path)
    return lambda name: tmp_path / name if request.param == "absolute" else Path(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_read(run, at, name):
    folder = at(name)
    shutil.copytree(run, folder)
    opened = open_run(folder) if folder.suffix != ".zarr" else open_run(folder / "task_0")
    assert opened.table["frames"].tolist() == [12]
    (episode,) = opened
    assert list(episode.videos) == [c.name for c in episode.layout.cameras]
    expected = open_episode(run / "task_0" / "episode_00000.zarr").arrays["suffix_attention"].values
    np.testing.assert_array_equal(episode.arrays["suffix_attention"].values, expected)
    np.testing.assert_array_equal(episode.dataset["suffix_attention"].values, expected)
    assert find_damage(episode.path).is_sound
    assert all(found.changes_nothing for found in repair(episode.path))
    shares = analysis.modality_share(episode.arrays, inference=0)
    assert float(shares.sum()) == pytest.approx(1, abs=0.01)
    for video in episode.videos.values():
        assert count_frames(video) == 12
        assert len(list(read_frames(video))) == 12


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_repaired(run, at, name):
    store = at(name) / "task_0" / "episode_00000.zarr"
    shutil.copytree(run, at(name))
    shard = next((store / "suffix_attention" / "c").rglob("0"))
    while shard.is_dir():
        shard = next(shard.iterdir())
    shard.write_bytes(b"")
    (done,) = repair(store)
    assert done.missing
    assert find_damage(store).is_sound
    assert main(["verify", str(at(name) / "task_0"), "--output", str(at("sheet.png")), "--thorough"]) in (
        0,
        1,
    )


@pytest.mark.parametrize("name", [*NAMES, "task0:ep0", "run:a/x", "concat:y", "-y"])
def test_a_video_is_written_and_read(at, name):
    path = at(f"{name}.mp4")
    path.parent.mkdir(exist_ok=True)
    writer = VideoWriter(path, fps=10, size_px=(32, 32))
    for value in range(5):
        writer.write(np.full((32, 32, 3), 40 * value, np.uint8))
    writer.close()
    assert path.is_file()
    assert count_frames(path) == 5
    assert [int(frame.mean().round(-1)) for frame in read_frames(path)] == [0, 40, 80, 120, 160]


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_of_any_name_is_removed_alone(run, at, name):
    folder = at("run") / "task_0"
    shutil.copytree(run, at("run"))
    for path in list(folder.iterdir()):
        path.rename(folder / path.name.replace("episode_00000", f"episode_{name}"))
    neighbour = folder / "episode_1.camera.mp4"
    neighbour.write_bytes(b"")
    remove_episode(folder / f"episode_{name}.zarr")
    assert list(folder.iterdir()) == [neighbour]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_claimed(at, name):
    with RunFolder(at(name)).claim():
        assert at(name).is_dir()
