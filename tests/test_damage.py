"""Damage, provoked for real: found where it is, the rest is read as before, and repair drops just that."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from changed import without_copies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_inspection import run_cli

from lerobot_attn import analysis
from lerobot_attn.errors import StoreError
from lerobot_attn.store.chunks import stored_arrays
from lerobot_attn.store.damage import find_damage
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.repair import repair
from lerobot_attn.store.runs import open_run
from lerobot_attn.store.schema import ARRAYS, SCHEMA_VERSION
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode
from lerobot_attn.verify import VerifySettings, contact_sheet, verify_episode

CAMERA = "observation.images.image"
PLAN = SyntheticPlan(
    n_frames=6,
    n_executed=2,
    n_queries=2,
    n_denoise_steps=2,
    n_layers=3,
    layers=(1, 2),
    prefix_layers=(0, 2),
    vision_layers=(1, 3),
    neurons={"vlm": (0, 2)},
    record_full=True,
    n_heads=1,
    grid=(2, 2),
    n_text=24,
    task="pick up",
    n_empty_cameras=0,
    n_state=1,
    n_actions=1,
    image_px={CAMERA: (16, 16)},
    objects={"cup": "target"},
)
N_CHUNKS_OF_A_SHARD = {"suffix_attention": 4, "suffix_attention_mean": 2, "prefix_attention": 2}
N_CHUNKS_OF_A_SHARD |= {"vision_attention": 2, "segmentation": 1}
N_CHUNKS_OF_A_SHARD |= {"vlm_neurons": 8, "vlm_neurons_full": 2}  # of a group and reduction; of a layer
# What only episodes of other families, of robots, or replays hold.
ABSENT = {
    *("prompt_truncated", "layer_sees_suffix", "all_layer_sees_suffix"),
    *("suffix_token_id", "suffix_token_text"),
    *("observed_before", "inference_start", "inference_end", "inference_delay", "frame_time"),
    *("predicted_action", "action_error", "frame_index", "timestamp", "episode_index", "task_index"),
    *("expert_neurons", "expert_neurons_full", "expert_group", "expert_neuron_layer"),
    *("vlm_residual", "vlm_residual_full", "vlm_residual_layer"),
    *("expert_residual", "expert_residual_full", "expert_residual_layer"),
}
HELD = [spec for spec in ARRAYS if spec.name not in ABSENT]
MAY_BE_MISSING = {spec.name for spec in HELD if spec.fill_value != spec.fill_value or spec.sharded}
CUTS = [spec.name for spec in HELD if spec.grows_with and spec.name not in MAY_BE_MISSING]
FIXED = [spec.name for spec in HELD if not spec.grows_with]


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    return write_planted_episode(tmp_path_factory.mktemp("sound") / "run", PLAN)


@pytest.fixture(scope="session")
def sound_values(sound):
    return {name: array.array[...] for name, array in stored_arrays(open_episode(sound)).items()}


@pytest.fixture
def path(sound, copied):
    return copied(sound)


@pytest.fixture(scope="session")
def long_episode(tmp_path_factory):
    """70 inferences of a frame each: tables of inferences have two chunks."""
    few = {"videos": False, "prefix_layers": (), "vision_layers": (), "neurons": {}, "record_full": False}
    plan = replace(PLAN, n_frames=70, n_executed=1, **few)
    return write_planted_episode(tmp_path_factory.mktemp("long") / "run", plan)


def files_of(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def file_of(path, name, row=0):
    """The file of a shard, or of a table's chunk."""
    array = stored_arrays(open_episode(path))[name]
    return array.file((row, *[0] * (array.array.ndim - 1)))


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def index_of(path, name, row):
    with file_of(path, name, row).open("rb") as file:
        return stored_arrays(open_episode(path))[name].index_of_shard(file)


def inside(path, name, chunk):
    """Where a chunk's entry is in its shard's index."""
    return (0, *chunk[1:], *[0] * (stored_arrays(open_episode(path))[name].array.ndim - len(chunk)))


def lies_at(path, name, chunk):
    """Offset and length of a chunk in its shard, bytes."""
    return tuple(map(int, index_of(path, name, chunk[0]).entries[inside(path, name, chunk)]))


def edit_document(path, function):
    document = json.loads((path / "zarr.json").read_text())
    function(document)
    (path / "zarr.json").write_text(json.dumps(document))


def said(path):
    return [str(damage) for damage in find_damage(path).damaged]


def covers(damage, name, chunk):
    return damage[0] == name and chunk[: len(damage[1])] == damage[1]


def assert_others_unchanged(path, values, *damaged):
    """Compare every chunk but those in `damaged`, each an array's name and a chunk's leading index."""
    episode = open_episode(path)
    data, n_compared = episode.arrays, 0
    for name, array in stored_arrays(episode).items():
        n = [files * inside for files, inside in zip(array.n_files, array.n_inside, strict=True)]
        for chunk in np.ndindex(*n):
            if any(covers(one, name, chunk) for one in damaged):
                continue
            found = data[name].variable[array.selection(chunk)].values
            np.testing.assert_array_equal(found, values[name][array.selection(chunk)], err_msg=name)
            n_compared += 1
    assert n_compared > 40


def assert_repair_makes_missing(path, values, name, chunk):
    """Repair, and check that just this chunk is NaN, that the store says so and passes, and stays so."""
    before = files_of(path)
    (planned,) = repair(path, dry_run=True)
    assert files_of(path) == before
    (done,) = repair(path)
    assert planned == done
    assert [(damage.array, damage.chunk) for damage in done.missing] == [(name, chunk)]
    assert (done.cut_by, done.rewritten) == ((), ())
    after = files_of(path)
    changed = {file for file in before if after.get(file) != before[file]}
    assert changed - {path / "zarr.json"} <= {file_of(path, name, chunk[0])}
    assert set(after) <= set(before)
    episode = open_episode(path)
    array = stored_arrays(episode)[name]
    lost = episode.arrays[name].variable[array.selection(chunk)].values
    assert lost.size
    assert (lost == -1).all() if name == "segmentation" else np.isnan(lost).all()
    assert_others_unchanged(path, values, (name, chunk))
    assert episode.is_complete
    (entry,) = episode.attributes["repaired"]
    assert (entry["array"], entry["chunk"]) == (name, list(chunk))
    assert list(entry["at"]) == list(array.dims[: len(chunk)])
    report = find_damage(path)
    assert report.is_sound
    assert report.n_missing == np.prod(array.n_inside[len(chunk) :], dtype=int)
    checks = verify_episode(episode, thorough=True)
    assert checks.passed, checks.to_dict()
    assert repair(path)[0].changes_nothing
    assert files_of(path) == after


def test_a_sound_store(path):
    before = files_of(path)
    calls = []
    report = find_damage(path, lambda *call: calls.append(call))
    assert report.is_sound
    assert (report.n_missing, report.without_checksums) == (0, ())
    n_tables = len([spec for spec in HELD if not spec.sharded])
    assert report.n_chunks == 3 * sum(N_CHUNKS_OF_A_SHARD.values()) + n_tables
    assert calls[-1] == (report.n_chunks, report.n_chunks)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert repair(path)[0].changes_nothing
    assert files_of(path) == before


@pytest.mark.parametrize("keep", ["nothing", "a byte", "half", "all but half the index", "all but a byte"])
@pytest.mark.parametrize("name", list(N_CHUNKS_OF_A_SHARD))
def test_truncated_shard(path, sound_values, name, keep):
    file = file_of(path, name, 1)
    size, n_index = file.stat().st_size, 16 * N_CHUNKS_OF_A_SHARD[name] + 4
    lengths = {
        "nothing": 0,
        "a byte": 1,
        "half": size // 2,
        "all but half the index": size - n_index // 2,
        "all but a byte": size - 1,
    }
    os.truncate(file, lengths[keep])
    (found,) = said(path)
    assert found.startswith(f"{name}: inference 1 (shard 1): ")
    assert "truncated" in found
    assert_others_unchanged(path, sound_values, (name, (1,)))
    assert_repair_makes_missing(path, sound_values, name, (1,))


@pytest.mark.parametrize(
    ("name", "chunk", "place"),
    [
        ("suffix_attention", (0, 0, 0), "inference 0, denoise_step 0, layer 1 (chunk 0/0/0)"),
        ("suffix_attention", (2, 1, 0), "inference 2, denoise_step 1, layer 1 (chunk 2/1/0)"),
        ("suffix_attention", (1, 0, 1), "inference 1, denoise_step 0, layer 2 (chunk 1/0/1)"),
        ("suffix_attention_mean", (1, 1), "inference 1, denoise_step 1 (chunk 1/1)"),
        ("prefix_attention", (2, 1), "inference 2, prefix_layer 2 (chunk 2/1)"),
        (
            "vision_attention",
            (1, 0, 1),
            "inference 1, camera at position 0, vision_layer 3 (chunk 1/0/1)",
        ),
        (
            "vlm_neurons",
            (1, 2, 1),
            "inference 1, vlm_group at position 2, reduction at position 1 (chunk 1/2/1)",
        ),
        ("vlm_neurons_full", (0, 1), "inference 0, vlm_neuron_layer 2 (chunk 0/1)"),
    ],
)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_flipped_byte_in_a_map(path, sound_values, name, chunk, place, where):
    start, length = lies_at(path, name, chunk)
    flip(file_of(path, name, chunk[0]), start + int(where * (length - 1)))
    assert said(path) == [f"{name}: {place}: its checksum does not match"]
    assert_others_unchanged(path, sound_values, (name, chunk))
    assert_repair_makes_missing(path, sound_values, name, chunk)


def test_two_damaged_maps_of_a_shard(path, sound_values):
    for chunk in ((1, 0, 0), (1, 1, 1)):
        flip(file_of(path, "suffix_attention", 1), lies_at(path, "suffix_attention", chunk)[0])
    shard = file_of(path, "suffix_attention", 1)
    before, index = shard.read_bytes(), index_of(path, "suffix_attention", 1).start
    (done,) = repair(path)
    assert [damage.chunk for damage in done.missing] == [(1, 0, 0), (1, 1, 1)]
    assert shard.read_bytes()[:index] == before[:index]
    assert_others_unchanged(
        path, sound_values, ("suffix_attention", (1, 0, 0)), ("suffix_attention", (1, 1, 1))
    )
    # A third one later: what was missing stays missing.
    flip(shard, lies_at(path, "suffix_attention", (1, 0, 1))[0])
    (done,) = repair(path)
    assert [damage.chunk for damage in done.missing] == [(1, 0, 1)]
    assert len(open_episode(path).attributes["repaired"]) == 3
    assert find_damage(path).is_sound


def test_flipped_byte_in_a_shards_index(path, sound_values):
    file = file_of(path, "suffix_attention", 2)
    size = file.stat().st_size
    for at in range(size - 16 * 4 - 4, size, 3):
        flip(file, at)
        (found,) = said(path)
        assert found.startswith("suffix_attention: inference 2 (shard 2): its index cannot be read"), at
        flip(file, at)
    flip(file, size - 30)
    assert_others_unchanged(path, sound_values, ("suffix_attention", (2,)))
    assert_repair_makes_missing(path, sound_values, "suffix_attention", (2,))


def test_a_map_that_is_not_in_its_shard(path, sound_values):
    """Zarr reads it as NaN, without a word."""
    file, chunk = file_of(path, "suffix_attention", 1), (1, 1, 0)
    index = index_of(path, "suffix_attention", 1)
    index.drop(inside(path, "suffix_attention", chunk))
    data = file.read_bytes()
    file.write_bytes(data[: index.start] + index.encoded())
    assert said(path) == [
        "suffix_attention: inference 1, denoise_step 1, layer 1 (chunk 1/1/0): it is missing from its shard"
    ]
    assert_repair_makes_missing(path, sound_values, "suffix_attention", chunk)


@pytest.mark.parametrize("name", list(N_CHUNKS_OF_A_SHARD))
def test_deleted_shard(path, sound_values, name):
    file_of(path, name, 0).unlink()
    assert said(path) == [f"{name}: inference 0 (shard 0): its file is missing"]
    assert_others_unchanged(path, sound_values, (name, (0,)))
    assert_repair_makes_missing(path, sound_values, name, (0,))


@pytest.mark.parametrize("spec", [spec for spec in HELD if not spec.sharded], ids=lambda spec: spec.name)
def test_every_byte_of_every_table_is_guarded(path, spec):
    file = file_of(path, spec.name)
    size = file.stat().st_size
    for at in sorted({0, size // 3, size // 2, size - 5, size - 1}):
        flip(file, at)
        last = {"inference": "inference 0 to 2 (chunk 0)", "frame": "frame 0 to 5 (chunk 0)"}
        place = last.get(spec.grows_with, "the whole array")
        assert said(path) == [f"{spec.name}: {place}: its checksum does not match"]
        flip(file, at)
    assert said(path) == []
    file.unlink()
    assert [line.rpartition(": ")[2] for line in said(path)] == ["its file is missing"]


@pytest.mark.parametrize("name", sorted(MAY_BE_MISSING - N_CHUNKS_OF_A_SHARD.keys()))
def test_tables_of_numbers_may_miss_them(path, sound_values, name):
    flip(file_of(path, name), 9)
    assert_others_unchanged(path, sound_values, (name, (0,)))
    assert_repair_makes_missing(path, sound_values, name, (0,))


@pytest.mark.parametrize("name", CUTS)
def test_other_tables_cut_the_episode(path, sound_values, name):
    flip(file_of(path, name), 9)
    cut_inferences = open_episode(path).array_shape(name)[0] == 3
    before = files_of(path)
    (planned,) = repair(path, dry_run=True)
    assert files_of(path) == before
    (done,) = repair(path)
    assert planned == done
    assert [damage.array for damage in done.cut_by] == [name]
    assert done.missing == ()
    assert (done.n_inferences, done.n_frames) == ((3, 0 if cut_inferences else 3), (6, 0))
    episode = open_episode(path)
    assert (episode.n_inferences, episode.n_frames) == (done.n_inferences[1], 0)
    assert episode.attributes["n_inferences"] == episode.n_inferences
    assert not episode.is_complete
    (entry,) = episode.attributes["repaired"]
    assert entry["cut_to"] == {"inferences": episode.n_inferences, "frames": 0}
    if not cut_inferences:
        np.testing.assert_array_equal(episode.arrays.suffix_attention, sound_values["suffix_attention"])
    failed = {check.name: check.detail for check in verify_episode(episode).checks if check.passed is False}
    assert list(failed) == ["complete"]
    assert "cut by a repair" in failed["complete"]
    assert find_damage(path).is_sound
    after = files_of(path)
    assert repair(path)[0].changes_nothing
    assert files_of(path) == after


def test_the_episode_is_cut_before_the_first_damaged_row(long_episode, tmp_path):
    path = shutil.copytree(long_episode, tmp_path / long_episode.name)
    values = open_episode(path).arrays.load()
    flip(path / "token_id" / "c" / "1" / "0", 9)
    # A damaged map on either side: one becomes missing, the other goes with the cut.
    for inference in (3, 66):
        file_of(path, "suffix_attention", inference).unlink()
    assert said(path)[-1] == "token_id: inference 64 to 69 (chunk 1): its checksum does not match"
    (done,) = repair(path)
    assert (done.n_inferences, done.n_frames) == ((70, 64), (70, 64))
    assert [damage.chunk for damage in done.missing] == [(3,)]
    found = open_episode(path).arrays.load()
    assert np.isnan(found.suffix_attention[3]).all()
    left = values.isel(inference=slice(64), frame=slice(64))
    rest = [i for i in range(64) if i != 3]
    assert found.isel(inference=rest).drop_attrs().identical(left.isel(inference=rest).drop_attrs())
    for name, array in stored_arrays(open_episode(path)).items():
        assert json.loads((path / name / "zarr.json").read_text()) == array.metadata
    assert find_damage(path).is_sound
    assert repair(path)[0].changes_nothing


@pytest.mark.parametrize(
    ("name", "row", "value", "frame"),
    [
        ("frame_inference", 66, 70, 66),
        ("frame_inference", 5, -1, 5),
        ("frame_query", 7, 2, 7),
        ("inference_frame", 9, 7, 9),
    ],
)
def test_rows_that_contradict_others_are_named_and_left_alone(
    long_episode, tmp_path, name, row, value, frame
):
    """Every byte is as it was written: nothing is damaged, and nothing says which row is right."""
    path = shutil.copytree(long_episode, tmp_path / long_episode.name)
    zarr.open_array(without_copies(path) / name, mode="r+")[row] = value
    failed = {
        check.name: check.detail for check in verify_episode(open_episode(path)).checks if not check.passed
    }
    assert failed["frame table"].startswith(f"frame {frame}: ")
    before = files_of(path)
    assert find_damage(path).is_sound
    assert repair(path)[0].changes_nothing
    assert files_of(path) == before


def test_an_action_that_is_no_token_of_a_chunk_is_no_damage(long_episode, tmp_path):
    path = shutil.copytree(long_episode, tmp_path / long_episode.name)
    zarr.open_array(without_copies(path) / "frame_query", mode="r+")[5:9] = -1
    assert find_damage(path).is_sound
    assert repair(path)[0].changes_nothing
    assert open_episode(path).arrays["frame_query"][5:9].values.tolist() == [-1] * 4


@pytest.mark.parametrize("text", [None, "", "{", "[]"], ids=["deleted", "empty", "cut off", "no object"])
def test_metadata_of_an_array(path, sound_values, text):
    file = path / "suffix_attention" / "zarr.json"
    whole = json.loads(file.read_text())
    file.unlink()
    if text is not None:
        file.write_text(text)
    (found,) = said(path)
    assert found.startswith("suffix_attention: zarr.json: it ")
    assert_others_unchanged(path, sound_values)
    (done,) = repair(path)
    assert done.rewritten == ("suffix_attention/zarr.json",)
    assert json.loads(file.read_text()) == whole
    assert verify_episode(open_episode(path)).passed
    assert open_episode(path).is_complete
    assert repair(path)[0].changes_nothing


def test_metadata_that_differs_is_not_repaired(path):
    file = path / "token_id" / "zarr.json"
    own = json.loads(file.read_text())
    own["fill_value"] = 7
    file.write_text(json.dumps(own))
    assert said(path) == ["token_id: zarr.json: it differs from the group's copy in 'fill_value'"]
    before = files_of(path)
    with pytest.raises(StoreError, match="which of the two is right cannot be told"):
        repair(path)
    assert files_of(path) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "is no Zarr v3 store"), ("{", "is damaged"), (SCHEMA_VERSION + 1, "schema version")],
    ids=["deleted", "damaged", "newer"],
)
def test_a_store_without_its_own_metadata_is_not_repaired(path, sound_values, text, message):
    file = path / "zarr.json"
    if text is None:
        file.unlink()
    elif isinstance(text, str):
        file.write_text(text)
    else:
        edit_document(path, lambda document: document["attributes"].update(schema_version=text))
    with pytest.raises(StoreError, match=message):
        find_damage(path)
    before = files_of(path)
    with pytest.raises(StoreError, match=message) as error:
        repair(path)
    assert "\n" not in str(error.value)
    assert "zarr.open_array(store / name)" in str(error.value)
    assert files_of(path) == before
    found = zarr.open_array(path / "suffix_attention", mode="r")[...]
    np.testing.assert_array_equal(found, sound_values["suffix_attention"])


@pytest.mark.parametrize("name", FIXED)
def test_a_store_whose_labels_are_damaged_is_not_touched(path, sound_values, name):
    flip(file_of(path, name), 9)
    before = files_of(path)
    with pytest.raises(StoreError, match="neither be dropped nor cut off") as error:
        repair(path)
    assert name in str(error.value)
    assert "zarr.open_group(store)[name]" in str(error.value)
    assert files_of(path) == before
    found = zarr.open_group(path, mode="r")["suffix_attention"][...]
    np.testing.assert_array_equal(found, sound_values["suffix_attention"])


def test_what_the_file_system_refuses_is_not_dropped(path):
    """It may be there on the next day."""
    file = file_of(path, "suffix_attention", 1)
    file.unlink()
    file.mkdir()
    (found,) = said(path)
    assert found.startswith("suffix_attention: inference 1 (file 1): the file system cannot read it")
    with pytest.raises(StoreError, match="it may be whole"):
        repair(path)


def test_links_are_not_followed(path, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(path / "state", elsewhere)
    (path / "state").symlink_to(elsewhere)
    assert repair(path)[0].changes_nothing
    file_of(path, "suffix_attention", 1).unlink()
    before = files_of(elsewhere)
    with pytest.raises(StoreError, match="state is a link, expected plain files"):
        repair(path)
    assert files_of(elsewhere) == before


def test_a_stranger_cannot_declare_tables_missing(path):
    """Absent chunks of whole numbers would read as 0."""
    file_of(path, "frame_inference").unlink()
    entry = {"array": "frame_inference", "chunk": [0], "at": {}, "reason": ""}
    edit_document(path, lambda document: document["attributes"].update(repaired=[entry, 3, {"chunk": "x"}]))
    assert said(path) == ["frame_inference: frame 0 to 5 (chunk 0): its file is missing"]


def test_leftovers_of_a_killed_recording_are_no_damage(path, sound_values):
    names = (
        ".zarr.json.new",
        "reward/.zarr.json.new",
        "suffix_attention/c/3/0/0/0/0/0",
        "suffix_attention/c/1/0/0/0/0/0.5d41402abc4b2a76b9719d911017c592.partial",
        "token_id/c/1/0",
        "reward/c/1",
    )
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"7")
    before = files_of(path)
    assert find_damage(path).is_sound
    assert verify_episode(open_episode(path)).passed
    assert repair(path)[0].changes_nothing
    assert files_of(path) == before
    assert_others_unchanged(path, sound_values)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_damage
from lerobot_attn.store import writer
from lerobot_attn.synthetic import write_planted_episode

replace_json, commits = writer.replace_json, 0

def killed(path, document):
    global commits
    if path.parent.suffix == ".zarr":
        commits += 1
        if commits == 4:
            path.with_name(".zarr.json.new").write_text("{{")
            os.kill(os.getpid(), signal.SIGKILL)
    replace_json(path, document)

writer.replace_json = killed
write_planted_episode(sys.argv[1], test_damage.PLAN)
"""


def test_a_recording_killed_in_its_commit(tmp_path, sound_values):
    """Everything of the third inference is written, and each array admits to it; the group does not."""
    code = KILLED.format(tests=str(Path(__file__).parent))
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    path = tmp_path / "attention" / "synthetic_0" / "episode_00000.zarr"
    report = find_damage(path)
    assert report.is_sound
    (done,) = repair(path)
    assert "suffix_attention/zarr.json" in done.rewritten
    episode = open_episode(path)
    assert (episode.n_inferences, episode.n_frames, episode.is_complete) == (2, 4, False)
    for name, values in sound_values.items():
        found = zarr.open_array(path / name, mode="r")[...]
        np.testing.assert_array_equal(found, values[: len(found)], err_msg=name)
    failed = [check.name for check in verify_episode(episode).checks if check.passed is False]
    assert failed == ["complete"]
    assert repair(path)[0].changes_nothing


class Killed(BaseException):
    """Raised where a process is to be taken for dead."""


def test_a_killed_repair_is_finished_by_the_next(sound, tmp_path, monkeypatch):
    """Killed before each of its changes to the disk in turn; what comes out in the end is the same."""

    def damaged_copy(name):
        path = shutil.copytree(sound, tmp_path / name / "task" / sound.name)
        flip(file_of(path, "suffix_attention", 1), lies_at(path, "suffix_attention", (1, 0, 1))[0])
        file_of(path, "suffix_attention_mean", 2).unlink()
        for table in ("action_chunk", "frame_query"):
            flip(file_of(path, table), 9)
        (path / "layer" / "zarr.json").unlink()
        return path

    def killing(function, counter):
        def change(*arguments, **options):
            if next(counter) == 0:
                raise Killed
            return function(*arguments, **options)

        return change

    def content(path):
        """Bytes of every file, and the group's metadata with what was repaired in any order."""
        files = {str(file.relative_to(path)): data for file, data in files_of(path).items()}
        document = json.loads(files.pop("zarr.json"))
        document["attributes"]["repaired"].sort(key=str)
        return files, document

    expected = damaged_copy("undisturbed")
    repair(expected)
    for after in range(100):
        path = damaged_copy(str(after))
        with monkeypatch.context() as patch:
            counter = iter(range(after, -1000, -1))
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, killing(getattr(Path, name), counter))
            try:
                repair(path)
            except Killed:
                pass
            else:
                break
        assert open_episode(path).n_frames in (0, 6)
        repair(path)
        assert find_damage(path).is_sound
        assert repair(path)[0].changes_nothing
        (files, document), (wanted_files, wanted) = content(path), content(expected)
        assert files == wanted_files
        reasons = [entry.pop("reason") for entry in document["attributes"]["repaired"]]
        for entry in wanted["attributes"]["repaired"]:
            entry.pop("reason")  # a dropped map is found missing by the second repair
        assert len(reasons) == 4
        assert document == wanted
    assert after > 10


def test_a_repair_on_a_full_disk_is_one_line(path, monkeypatch):
    file_of(path, "suffix_attention", 1).unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(StoreError, match=r"could not be finished \(No space left on device\)") as error:
            repair(path)
    assert "\n" not in str(error.value)
    assert len(repair(path)[0].missing) == 1


def test_no_repair_while_a_recording_goes_on(path):
    file_of(path, "suffix_attention", 1).unlink()
    folder = path.parents[1]
    code = (
        "import sys, pathlib\nfrom lerobot_attn.recording.folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1]), 'skip').claim():\n"
        "    print('held', flush=True)\n    input()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as recording:
        assert recording.stdout.readline() == "held\n"
        before = files_of(path)
        with pytest.raises(StoreError, match="cannot be repaired now") as error:
            repair(path)
        assert f"process {recording.pid}" in str(error.value)
        assert "\n" not in str(error.value)
        assert files_of(path) == before
        recording.communicate("\n")
    assert len(repair(path)[0].missing) == 1


def test_no_lock_is_left_where_nothing_was_recorded(path):
    file_of(path, "suffix_attention", 1).unlink()
    repair(path)
    assert [file.name for file in path.parents[1].iterdir()] == ["synthetic_0"]


def test_a_run_is_repaired_store_by_store(path, sound_values):
    run = path.parents[2]
    second = shutil.copytree(path, path.parent / "episode_00001.zarr")
    third = shutil.copytree(path, path.parent / "episode_00002.zarr")
    fourth = shutil.copytree(path, path.parent / "episode_00003.zarr")
    file_of(second, "suffix_attention", 1).unlink()
    (third / "zarr.json").unlink()
    flip(file_of(fourth, "layer"), 9)
    assert len(list(open_run(run))) == 3
    for folder in (run, run / "attention", path.parent):
        found = repair(folder, dry_run=True)
        assert [store.path.name for store in found] == [f"episode_0000{i}.zarr" for i in range(4)]
    found = repair(run)
    assert [store.changes_nothing for store in found] == [True, False, True, True]
    assert found[2].refused is not None
    assert found[3].refused is not None
    assert list(found[3].lines(done=True)) == [found[3].refused]
    assert_others_unchanged(second, sound_values, ("suffix_attention", (1,)))
    assert find_damage(second).is_sound


def test_stores_of_older_versions(path):
    """Their tables carry no checksums, and fixed arrays of one value have no chunk."""
    without_copies(path)
    for name in ("token_id", "head"):
        values = stored_arrays(open_episode(path))[name].array[...]
        own = json.loads((path / name / "zarr.json").read_text())
        own["codecs"] = [codec for codec in own["codecs"] if codec["name"] != "crc32c"]
        shutil.rmtree(path / name)
        (path / name).mkdir()
        (path / name / "zarr.json").write_text(json.dumps(own))
        zarr.open_array(path / name, mode="r+")[...] = values
        edit_document(
            path, lambda d, n=name, own=own: d["consolidated_metadata"]["metadata"].update({n: own})
        )
    assert not (path / "head" / "c").exists()
    report = find_damage(path)
    assert report.is_sound
    assert report.without_checksums == ("token_id", "head")
    checks = {check.name: check for check in verify_episode(open_episode(path)).checks}
    assert checks["chunks"].passed
    assert "so a changed byte may go unnoticed: token_id, head" in checks["chunks"].detail
    file_of(path, "token_id").write_bytes(b"\7" * 40)
    (found,) = said(path)
    assert found.startswith("token_id: inference 0 to 2 (chunk 0): it cannot be decoded: ")


def test_missing_maps_are_blank_and_left_out_of_means(path):
    whole = open_episode(path).arrays.load()
    flip(file_of(path, "suffix_attention", 1), lies_at(path, "suffix_attention", (1, 1, 0))[0])
    repair(path)
    episode = open_episode(path)
    data = episode.arrays
    look = {"frame": 2, "denoise_step": 1, "query": "frame"}
    heat = analysis.image_heatmap(data, CAMERA, layer=1, **look)
    assert np.isnan(heat).all()
    other = {"frame": 2, "denoise_step": 1, "query": "frame", "layer": 2}
    np.testing.assert_array_equal(
        analysis.image_heatmap(data, CAMERA, **other), analysis.image_heatmap(whole, CAMERA, **other)
    )
    mean = data.suffix_attention.mean("layer")[1, 1]
    np.testing.assert_allclose(mean, whole.suffix_attention[1, 1, 1])
    report = verify_episode(episode)
    (rows,) = (check for check in report.checks if check.name == "row sums")
    assert rows.detail.endswith("; maps left out: 1 missing")
    for layer, expected in ((1, 1), (2, 0)):
        chosen = VerifySettings(layer=layer, denoise_step=1)
        texts = [text.get_text() for axes in contact_sheet(episode, chosen).axes for text in axes.texts]
        assert texts.count("the map is missing\nof this frame") == expected


def test_command(path, monkeypatch, capsys):
    verify = ("verify", path, "--no-sheet")
    assert run_cli(monkeypatch, capsys, *verify)[0] == 0
    file_of(path, "suffix_attention", 1).unlink()
    status, out, _ = run_cli(monkeypatch, capsys, *verify)
    assert status == 1
    assert "suffix_attention: inference 1 (shard 1): its file is missing" in " ".join(out.split())
    before = files_of(path)
    status, out, _ = run_cli(monkeypatch, capsys, *verify, "--repair", "--dry-run")
    assert status == 1
    assert f"{path}: would be repaired\n  would drop suffix_attention: inference 1 (shard 1)" in out
    assert files_of(path) == before
    status, out, err = run_cli(monkeypatch, capsys, *verify, "--repair", "--json")
    assert status == 0
    assert json.loads(out)["passed"] is True
    assert f"{path}: repaired\n  dropped suffix_attention: inference 1 (shard 1)" in err
    status, out, _ = run_cli(monkeypatch, capsys, *verify, "--repair")
    assert status == 0
    assert f"{path}: nothing to repair" in out
    status, _, err = run_cli(monkeypatch, capsys, *verify, "--dry-run")
    assert status == 1
    assert err == "error: --dry-run: goes with --repair, expected both or neither\n"


def test_command_on_a_run(path, monkeypatch, capsys):
    second = shutil.copytree(path, path.parent / "episode_00001.zarr")
    run = path.parents[2]
    status, out, _ = run_cli(monkeypatch, capsys, "verify", run, "--json")
    assert status == 0
    assert [Path(facts["path"]).name for facts in json.loads(out)] == [path.name, second.name]
    flip(file_of(path, "token_id"), 9)
    status, out, _ = run_cli(monkeypatch, capsys, "verify", run, "--repair")
    assert status == 1  # what was cut is incomplete
    assert "  cut the episode to 0 of 3 inferences and 0 of 6 frames, because of\n    token_id: " in out
    (second / "zarr.json").write_text("{")
    for options in ([], ["--repair"]):
        status, _, err = run_cli(monkeypatch, capsys, "verify", run, *options)
        assert status == 1
        assert err.count(f"error: {second}: its zarr.json is damaged") == 1


def test_damage_before_the_sheet(path, tmp_path, monkeypatch, capsys):
    for chunk in np.ndindex(1, 2, 2):
        flip(file_of(path, "suffix_attention"), lies_at(path, "suffix_attention", chunk)[0])
    status, out, err = run_cli(monkeypatch, capsys, "verify", path, "-o", tmp_path / "sheet.png")
    assert status == 1
    assert "checks passed" in " ".join(out.split())
    assert "No contact sheet: " in err


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(draw=st.data())
def test_any_flipped_byte_is_found_or_harmless(path, sound_values, draw):
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = draw.draw(st.sampled_from(files))
    at = draw.draw(st.integers(0, file.stat().st_size - 1))
    before = file.read_bytes()
    changed = bytearray(before)
    changed[at] ^= draw.draw(st.integers(1, 255))
    file.write_bytes(changed)
    try:
        with contextlib.suppress(StoreError):  # found at once
            if find_damage(path).is_sound:
                data = open_episode(path).arrays
                assert set(data.variables) == set(sound_values)
                for name, values in sound_values.items():
                    np.testing.assert_array_equal(data[name].values, values, err_msg=name)
    finally:
        file.write_bytes(before)
