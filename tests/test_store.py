"""The store: what a reader sees at any instant, and what plain xarray, Dask and zarr see."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from lerobot_attn.cli import main
from lerobot_attn.errors import StoreError
from lerobot_attn.layout import Camera, ImageGeometry, Segment, TokenLayout
from lerobot_attn.store.damage import find_damage
from lerobot_attn.store.reader import open_episode, open_run
from lerobot_attn.store.repair import repair
from lerobot_attn.store.schema import (
    ARRAYS,
    DIMENSIONS,
    SCHEMA_VERSION,
    coordinates_of_activations,
    coordinates_of_patches,
    schema_table,
)
from lerobot_attn.store.writer import Compression, EpisodeWriter
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

SIZES = {
    "denoise_step": 3,
    "layer": 2,
    "all_layer": 4,
    "prefix_layer": 1,
    "camera": 1,
    "vision_layer": 2,
    "vision_head": 3,
    "patch_query": 6,
    "patch_key": 6,
    "vlm_group": 2,
    "expert_group": 1,
    "reduction": 2,
    "vlm_neuron_layer": 2,
    "expert_neuron_layer": 1,
    "vlm_residual_layer": 1,
    "expert_residual_layer": 2,
    "vlm_unit": 7,
    "expert_unit": 6,
    "vlm_feature": 4,
    "expert_feature": 3,
    "mask_camera": 1,
    "mask_y": 4,
    "mask_x": 5,
    "instance": 3,
    "xyz": 3,
    "head": 2,
    "query": 5,
    "key": 14,
    "prefix_query": 9,
    "prefix_key": 9,
    "text": 5,
    "action_dim": 3,
    "state_dim": 2,
}
LAYOUT = TokenLayout(
    (
        Segment("image", "cam", 0, 4),
        Segment("language", "language", 4, 9),
        Segment("action", "action", 9, 14),
    ),
    9,
    (Camera("cam", ImageGeometry.letterbox((8, 8), (8, 8), (2, 2), padding="centred")),),
)


def softmax_like(rng, *shape):
    values = rng.random(shape, dtype=np.float32)
    return (values / values.sum(-1, keepdims=True)).astype(np.float16)


def make_writer(path, compression=None, **attributes):
    coordinates = {
        "flow_time": np.linspace(1, 0.3, 3),
        "denoise_step": np.array([0, 4, 9]),
        "layer": np.array([16, 17]),
        "all_layer": np.arange(4),
        "layer_sees_suffix": np.array([True, False]),
        "all_layer_sees_suffix": np.array([True, False, True, False]),
        "prefix_layer": np.array([17]),
        "camera": np.array(["cam"], dtype=object),
        "vision_layer": np.array([3, 11]),
        "vision_head": np.arange(3),
        **coordinates_of_patches((2, 3)),
        **coordinates_of_activations(
            {"vlm": ["cam", "task"], "expert": ["actions"]},
            {"vlm_neurons": [0, 3], "expert_neurons": [1], "vlm_residual": [2], "expert_residual": [0, 1]},
            ["mean", "max"],
        ),
        "mask_camera": np.array(["cam"], dtype=object),
        "instance": np.array(["background", "soup_1", "robot0"], dtype=object),
        "instance_role": np.array(["background", "target", "robot"], dtype=object),
        "head": np.array([1, 5]),
        "text_key": np.arange(4, 9),
        "key_camera": LAYOUT.key_camera(),
        "key_row": LAYOUT.key_patch()[0],
        "key_column": LAYOUT.key_patch()[1],
        "action_dim": np.array(["x", "y", "gripper"], dtype=object),
        "state_dim": np.array(["a", "b"], dtype=object),
    }
    return EpisodeWriter(
        path,
        sizes=SIZES,
        coordinates=coordinates,
        attributes={"task": "pick", "layout": LAYOUT.to_dict(), "executed_queries": [0, 2], **attributes},
        compression=compression or Compression(),
        optional={spec.name for spec in ARRAYS if spec.optional},
    )


def inference_rows(rng, index):
    return {
        "suffix_attention": softmax_like(rng, 3, 2, 2, 5, 14),
        "suffix_attention_mean": softmax_like(rng, 3, 4, 2, 14),
        "prefix_attention": softmax_like(rng, 1, 2, 9, 9),
        "vision_attention": softmax_like(rng, 1, 2, 3, 6, 6),
        **{
            name: rng.standard_normal(shape).astype(np.float16)
            for name, shape in {
                "vlm_neurons": (2, 2, 2, 7),
                "expert_neurons": (3, 1, 2, 1, 6),
                "vlm_residual": (2, 2, 1, 4),
                "expert_residual": (3, 1, 2, 2, 3),
                "vlm_neurons_full": (2, 9, 7),
                "expert_neurons_full": (3, 1, 5, 6),
                "vlm_residual_full": (1, 9, 4),
                "expert_residual_full": (3, 2, 5, 3),
            }.items()
        },
        "segmentation": rng.integers(-1, 3, (1, 4, 5)).astype(np.int16),
        "instance_position": rng.random((3, 3), dtype=np.float32),
        "token_id": np.arange(5) + index,
        "token_text": np.array(["Task", ":", " pick", f" {index}", "é"], dtype=object),
        "text_word": np.array([-1, -1, 0, -1, -1]),
        "text_state_dim": np.array([-1, -1, -1, 0, -1]),
        "key_kind": np.array([1] * 4 + [4, 4, 2, 3, 4] + [5] * 5),
        "prompt_truncated": np.bool_(index % 2),
        "suffix_token_id": np.array([7, 8, 9, -1, -1]),
        "suffix_token_text": np.array(["Action", ":", "|", "", ""], dtype=object),
        "inference_frame": np.int32(2 * index),
        "observed_before": np.int32(0),
        "inference_start": 0.1 * index,
        "inference_end": 0.1 * index + 0.05,
        "inference_delay": np.int32(index),
        "action_chunk": rng.random((5, 3), dtype=np.float32),
    }


def frame_rows(rng, index, n=2):
    return {
        "frame_inference": np.full(n, index),
        "frame_query": np.arange(n),
        "predicted_action": rng.random((n, 3), dtype=np.float32),
        "action_error": rng.random(n, dtype=np.float32),
        "frame_index": np.arange(n) + n * index,
        "timestamp": (np.arange(n) / 20).astype(np.float32),
        "episode_index": np.full(n, 7),
        "task_index": np.full(n, 3),
        "action": rng.random((n, 3), dtype=np.float32),
        "state": rng.random((n, 2), dtype=np.float32),
        "reward": np.arange(n, dtype=np.float32),
        "success": np.zeros(n, bool),
        "frame_time": 0.1 * (2 * index + np.arange(n)),
    }


def write_episode(path, n=3, *, complete=True, compression=None, **attributes):
    rng = np.random.default_rng(0)
    writer = make_writer(path, compression, **attributes)
    written = []
    for index in range(n):
        rows, frames = inference_rows(rng, index), frame_rows(rng, index)
        writer.append_inference(rows)
        writer.append_frames(frames)
        writer.commit()
        written.append((rows, frames))
    writer.close(complete=complete, attributes={"success": True})
    return written


def test_plain_xarray_reads_what_was_written(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    written = write_episode(path, 70)  # more rows than a chunk of the small arrays
    for consolidated in (True, False):
        dataset = xr.open_zarr(path, consolidated=consolidated)
        assert dataset.sizes["inference"] == 70
        assert dataset.sizes["frame"] == 140
        for name, rows in (("inference", 0), ("frame", 1)):
            for array in written[0][rows]:
                join = np.stack if name == "inference" else np.concatenate
                expected = join([entry[rows][array] for entry in written])
                np.testing.assert_array_equal(dataset[array].values, expected, err_msg=array)
                assert dataset[array].dims[0] == name
        assert dataset.layer.values.tolist() == [16, 17]
        assert dataset.suffix_attention.sel(layer=17, denoise_step=9, head=5).shape == (70, 5, 14)
        assert set(dataset.coords) >= {
            "key_camera",
            "key_row",
            "key_column",
            "flow_time",
            "text_key",
            "layer",
        }
        assert dataset.key_kind.attrs["flag_meanings"].split()[:3] == ["padding", "image", "task"]


def test_every_array_is_as_the_schema_says(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    write_episode(path)
    group = zarr.open_group(path, mode="r")
    assert set(group.array_keys()) == {spec.name for spec in ARRAYS}
    for spec in ARRAYS:
        array = group[spec.name]
        assert array.metadata.dimension_names == spec.dims
        assert array.attrs["long_name"] == spec.description
        assert set(spec.dims) <= set(DIMENSIONS)
        kind = "T" if spec.dtype == "string" else np.dtype(spec.dtype).kind
        assert array.dtype.kind == kind, spec.name
    suffix = group["suffix_attention"]
    assert suffix.chunks == (1, 1, 1, 2, 5, 14)
    assert suffix.shards == (1, 3, 2, 2, 5, 14)
    assert group["suffix_attention_mean"].chunks == (1, 1, 4, 2, 14)
    assert group["vision_attention"].chunks == (1, 1, 1, 3, 6, 6)
    assert group["vision_attention"].shards == (1, 1, 2, 3, 6, 6)
    # All layers of a group of tokens are read together; of every token's values one layer.
    assert group["vlm_neurons"].chunks == (1, 1, 1, 2, 7)
    assert group["vlm_neurons"].shards == (1, 2, 2, 2, 7)
    assert group["expert_residual"].chunks == (1, 1, 1, 1, 2, 3)
    assert group["expert_residual_full"].chunks == (1, 1, 1, 5, 3)
    assert group["expert_residual_full"].shards == (1, 3, 2, 5, 3)


def test_only_codecs_that_other_languages_have(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    write_episode(path)
    names = set()

    def collect(value):
        if isinstance(value, dict):
            if "codecs" in value:
                names.update(codec["name"] for codec in value["codecs"])
            for inner in value.values():
                collect(inner)
        elif isinstance(value, list):
            for inner in value:
                collect(inner)

    collect(json.loads((path / "zarr.json").read_text()))
    assert names == {"bytes", "blosc", "crc32c", "sharding_indexed", "transpose", "zstd", "vlen-utf8"}


def test_keys_lie_before_queries_in_a_chunk(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    written = write_episode(path)
    array = zarr.open_array(path / "suffix_attention", mode="r")
    (transpose,) = array.filters
    assert tuple(transpose.order) == (0, 1, 2, 3, 5, 4)
    np.testing.assert_array_equal(array[...], [rows["suffix_attention"] for rows, _ in written])


def test_dask_is_lazy_and_correct(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    written = write_episode(path)
    lazy = open_episode(path).dataset.suffix_attention
    assert lazy.chunks is not None
    sums = lazy.astype("float32").sum("key").mean("inference").compute()
    expected = np.mean([rows["suffix_attention"].astype(np.float32).sum(-1) for rows, _ in written], axis=0)
    np.testing.assert_allclose(sums, expected, rtol=1e-6)


@pytest.mark.parametrize("compressor", ["zstd", "lz4", "blosclz", "zlib", "none"])
def test_compressors_are_lossless(tmp_path, compressor):
    path = tmp_path / "episode_00000.zarr"
    written = write_episode(path, 1, compression=Compression(compressor, 3))
    stored = open_episode(path).dataset.suffix_attention[0].values
    np.testing.assert_array_equal(stored, written[0][0]["suffix_attention"])


@pytest.mark.parametrize("keep_bits", [1, 4, 7, 9, 10])
def test_keep_bits_keeps_its_error_bound(tmp_path, keep_bits):
    path = tmp_path / "episode_00000.zarr"
    written = write_episode(path, 1, compression=Compression(keep_bits=keep_bits))
    stored = open_episode(path).dataset.suffix_attention[0].values.astype(np.float64)
    true = written[0][0]["suffix_attention"].astype(np.float64)
    bound = 0.0 if keep_bits == 10 else 2.0 ** -(keep_bits + 1)
    smallest_normal = 2.0**-14
    error = np.max(np.abs(stored - true) / np.maximum(true, smallest_normal))
    assert error <= bound
    if keep_bits < 10:
        assert error > bound / 4  # it did round


def test_appended_but_not_committed_does_not_exist(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    rng = np.random.default_rng(0)
    writer = make_writer(path)
    assert open_episode(path).n_inferences == 0
    assert xr.open_zarr(path).sizes["inference"] == 0
    writer.append_inference(inference_rows(rng, 0))
    assert open_episode(path).n_inferences == 0
    writer.commit()
    episode = open_episode(path)
    assert (episode.n_inferences, episode.is_complete) == (1, False)
    writer.append_inference(inference_rows(rng, 1))
    assert xr.open_zarr(path).sizes["inference"] == 1
    writer.close(complete=True)
    episode = open_episode(path)
    assert (episode.n_inferences, episode.is_complete) == (2, True)


KILLED_WRITER = """
    import sys
    from pathlib import Path
    import numpy as np
    sys.path.insert(0, sys.argv[2])
    from test_store import make_writer, inference_rows, frame_rows
    rng = np.random.default_rng(0)
    writer = make_writer(Path(sys.argv[1]))
    for index in range(100_000):
        writer.append_inference(inference_rows(rng, index))
        writer.append_frames(frame_rows(rng, index))
        writer.commit()
        print(index + 1, flush=True)
"""


def test_killed_at_any_instant_leaves_what_was_committed(tmp_path):
    rng = np.random.default_rng(1)
    for attempt in range(3):
        path = tmp_path / f"episode_{attempt:05d}.zarr"
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED_WRITER), str(path), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        time.sleep(float(rng.uniform(0.02, 0.4)))
        process.send_signal(signal.SIGKILL)
        committed = 1 + len(process.stdout.read().splitlines())
        process.wait()
        process.stdout.close()
        episode = open_episode(path)
        assert not episode.is_complete
        # The kill may fall between a commit and its line.
        assert committed <= episode.n_inferences <= committed + 1
        same = np.random.default_rng(0)
        dataset = xr.open_zarr(path)
        for index in range(episode.n_inferences):
            rows = inference_rows(same, index)
            frame_rows(same, index)
            np.testing.assert_array_equal(dataset.suffix_attention[index].values, rows["suffix_attention"])
            assert dataset.token_text[index].values.tolist() == rows["token_text"].tolist()


def test_writer_refuses_an_existing_store(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    write_episode(path)
    before = (path / "zarr.json").read_bytes()
    with pytest.raises(StoreError, match="already exists"):
        make_writer(path)
    assert (path / "zarr.json").read_bytes() == before


def test_a_store_before_its_first_commit_is_not_taken_for_another_kind(tmp_path, monkeypatch):
    path = tmp_path / "episode_00000.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(EpisodeWriter, "commit", lambda self: None)
        writer = make_writer(path)
    with pytest.raises(StoreError, match="holds nothing yet: its recording has only just begun") as caught:
        open_episode(path)
    assert "\n" not in str(caught.value)
    writer.commit()
    assert open_episode(path).n_inferences == 0


def test_writer_refuses_rows_that_do_not_fit(tmp_path):
    writer = make_writer(tmp_path / "episode_00000.zarr")
    rows = inference_rows(np.random.default_rng(0), 0)
    with pytest.raises(StoreError, match="suffix_attention got shape"):
        writer.append_inference({**rows, "suffix_attention": rows["suffix_attention"][..., :-1]})
    del rows["token_id"]
    with pytest.raises(StoreError, match=r"odd: \['token_id'\]"):
        writer.append_inference(rows)
    assert writer.n_inferences == 0


def pt_file(folder):
    path = folder / "attention.pt"
    path.write_bytes(b"PK\x03\x04")
    return path


def lerobot_dataset(folder):
    (folder / "meta").mkdir()
    (folder / "meta" / "info.json").write_text("{}")
    return folder


def foreign_zarr(folder):
    zarr.create_group(folder / "other.zarr")
    return folder / "other.zarr"


def newer_schema(folder):
    write_episode(folder / "e.zarr", schema_version=SCHEMA_VERSION + 1)
    return folder / "e.zarr"


def damaged_json(folder):
    write_episode(folder / "e.zarr")
    text = (folder / "e.zarr" / "zarr.json").read_text()
    (folder / "e.zarr" / "zarr.json").write_text(text[: len(text) // 2])
    return folder / "e.zarr"


def damaged_shape(folder):
    write_episode(folder / "e.zarr")
    document = json.loads((folder / "e.zarr" / "zarr.json").read_text())
    document["consolidated_metadata"]["metadata"]["suffix_attention"]["shape"][0] = 10**12
    (folder / "e.zarr" / "zarr.json").write_text(json.dumps(document))
    return folder / "e.zarr"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.zarr", "no such store"),
        (pt_file, r"is a \.pt file, expected an episode store"),
        (lerobot_dataset, "is a LeRobot dataset, expected an episode store"),
        (foreign_zarr, "is a Zarr store of another kind"),
        (newer_schema, "schema version 3, expected at most 2; upgrade"),
        (damaged_json, "zarr.json is damaged"),
        (damaged_shape, "dimension inference is .* elsewhere: damaged"),
        (lambda folder: folder, "is no Zarr v3 store"),
    ],
)
def test_open_episode_says_what_is_wrong(tmp_path, make, message):
    with pytest.raises(StoreError, match=message) as error:
        open_episode(make(tmp_path))
    assert "\n" not in str(error.value)


def test_open_episode_points_to_open_run(tmp_path):
    write_episode(tmp_path / "attention" / "task_0" / "episode_00000.zarr")
    with pytest.raises(StoreError, match=r"it holds stores, e\.g\. .*: use open_run\(\)"):
        open_episode(tmp_path)


def test_open_run_lists_episodes_and_what_is_damaged(tmp_path):
    for task, index in (("a_0", 0), ("a_0", 1), ("b_3", 0)):
        path = tmp_path / "attention" / task / f"episode_{index:05d}.zarr"
        group, task_id = task.split("_")
        write_episode(path, 2, task_group=group, task_id=int(task_id), episode_index=index)
    broken = tmp_path / "attention" / "b_3" / "episode_00001.zarr"
    broken.mkdir()
    (broken / "zarr.json").write_text("{")
    for folder in (tmp_path, tmp_path / "attention"):
        run = open_run(folder)
        assert [(e.attributes["task_group"], e.attributes["episode_index"]) for e in run] == [
            ("a", 0),
            ("a", 1),
            ("b", 0),
        ]
        assert [path for path, _ in run.damaged] == [folder / broken.relative_to(folder)]
    assert len(open_run(tmp_path / "attention" / "a_0")) == 2
    table = open_run(tmp_path).table
    assert table.success.tolist() == [True] * 3
    assert table.inferences.tolist() == [2] * 3
    assert (table.bytes > 0).all()


def test_open_run_of_an_empty_folder(tmp_path):
    with pytest.raises(StoreError, match="holds no episode store"):
        open_run(tmp_path)
    with pytest.raises(StoreError, match="no such folder"):
        open_run(tmp_path / "none")


def test_opening_reads_no_tensor(tmp_path):
    path = tmp_path / "episode_00000.zarr"
    write_episode(path)
    for chunk in path.glob("*/c"):  # without any chunk on the disk, opening and describing still work
        import shutil

        shutil.rmtree(chunk)
    episode = open_episode(path)
    assert episode.n_inferences == 3
    assert episode.layout == LAYOUT
    in_vision = 2 * 3 * 6 * 6
    reduced = 2 * 2 * (2 * 7 + 4) + 3 * 2 * (6 + 2 * 3)
    of_tokens = 9 * (2 * 7 + 4) + 3 * 5 * (6 + 2 * 3)
    maps = 3 * 2 * 2 * 5 * 14 + 3 * 4 * 2 * 14 + 2 * 9 * 9 + in_vision
    assert episode.raw_bytes() == 3 * 2 * (maps + reduced + of_tokens)


def test_videos_of_a_killed_recording_are_found_by_name(tmp_path):
    cameras = tuple(Camera(name, LAYOUT.cameras[0].geometry) for name in ("left.cam", "right.cam"))
    segments = tuple(Segment("image", c.name, 4 * i, 4 * i + 4) for i, c in enumerate(cameras))
    layout = TokenLayout((*segments, Segment("action", "action", 8, 14)), 8, cameras)
    path = tmp_path / "episode_00000.zarr"
    write_episode(path, complete=False, layout=layout.to_dict())
    assert open_episode(path).videos == {}
    for name in ("episode_00000.cam.mp4", "episode_00000.right.cam.mp4"):
        (tmp_path / name).touch()
    assert open_episode(path).videos == {
        "left.cam": tmp_path / "episode_00000.cam.mp4",
        "right.cam": tmp_path / "episode_00000.right.cam.mp4",
    }
    assert open_episode(path).image_size_px("left.cam") == (8, 8)
    with pytest.raises(StoreError, match="has no video of camera other"):
        open_episode(path).video("other")


@pytest.mark.parametrize("name", ["../../secret.mp4", "/etc/passwd", "a/b.mp4"])
def test_video_paths_stay_beside_the_store(tmp_path, name):
    (tmp_path / "secret.mp4").write_bytes(b"")
    path = tmp_path / "attention" / "a_0" / "episode_00000.zarr"
    write_episode(path, videos={"cam": {"path": name}})
    assert open_episode(path).videos == {}


def test_eval_video_is_found_in_the_run_alone(tmp_path):
    path = tmp_path / "run" / "attention" / "a_0" / "episode_00000.zarr"
    write_episode(path, eval_video={"path": "../../videos/a_0/eval_episode_0.mp4"})
    assert open_episode(path).eval_video is None
    video = tmp_path / "run" / "videos" / "a_0" / "eval_episode_0.mp4"
    video.parent.mkdir(parents=True)
    video.write_bytes(b"")
    assert open_episode(path).eval_video == video
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(b"")
    other = tmp_path / "run" / "attention" / "a_0" / "episode_00001.zarr"
    write_episode(other, eval_video={"path": "../../../outside.mp4"})
    assert open_episode(other).eval_video is None


def test_schema_table_names_every_array():
    table = schema_table()
    for spec in ARRAYS:
        assert f"| `{spec.name}` | {', '.join(spec.dims)} | {spec.dtype} |" in table


@pytest.mark.parametrize("full_at", ["suffix_attention_mean", "token_id", "key_kind/zarr.json", "zarr.json"])
def test_a_full_disk_grows_no_array(tmp_path, monkeypatch, full_at):
    from lerobot_attn.store import writer as module

    path = tmp_path / "episode_00000.zarr"
    rng = np.random.default_rng(0)
    writer = make_writer(path)
    writer.append_inference(inference_rows(rng, 0))
    writer.append_frames(frame_rows(rng, 0))
    writer.commit()

    def refused(replace):
        def full(file, what):
            if file == path / full_at or full_at in file.relative_to(path).parts:
                raise OSError(28, "No space left on device")
            replace(file, what)

        return full

    for name in ("replace_bytes", "replace_json"):
        monkeypatch.setattr(module, name, refused(getattr(module, name)))
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012
        writer.append_inference(inference_rows(rng, 1))
        writer.append_frames(frame_rows(rng, 0))
        writer.commit()
    assert (writer.n_inferences, writer.n_frames) == (1, 2)
    monkeypatch.undo()
    assert open_episode(path).n_inferences == 1
    rows, frames = inference_rows(rng, 1), frame_rows(rng, 1)
    writer.append_inference(rows)  # some space was made: the next inference takes the place
    writer.append_frames(frames)
    writer.close(complete=False)
    episode = open_episode(path)
    assert (episode.n_inferences, episode.n_frames) == (2, 4)
    assert find_damage(path).damaged == ()
    data = episode.dataset.load()
    np.testing.assert_array_equal(data.suffix_attention.values[1], rows["suffix_attention"])
    assert data.token_id.values[:, 0].tolist() == [0, 1]
    assert data.frame_inference.values.tolist() == [0, 0, 1, 1]


def command(monkeypatch, *arguments):
    """Run the command line; return its exit status."""
    monkeypatch.setattr("sys.argv", ["lerobot-attn", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_a_store_by_another_name_is_opened_by_every_door(tmp_path, monkeypatch):
    plan = SyntheticPlan(n_frames=6)
    path = write_planted_episode(tmp_path, plan).rename(tmp_path / "my favourite")
    assert open_episode(path).n_inferences == plan.n_inferences
    run = open_run(path)
    assert run.is_episode
    assert run.stores == (path,)
    assert [episode.path for episode in run] == [path]
    assert command(monkeypatch, "inspect", path) == 0
    assert command(monkeypatch, "inspect", path, "--json") == 0
    assert command(monkeypatch, "verify", path, "--repair", "--dry-run", "--no-sheet") == 0


def test_a_damaged_store_by_another_name_says_what_is_wrong(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged: "):
        open_run(tmp_path / "mine")


def test_a_read_only_file_system_is_read(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    store = tmp_path / "disk" / "task_0" / "episode_00000.zarr"

    def mount(*options):
        return subprocess.run(["mount", *options, tmp_path / "disk"], capture_output=True, text=True)

    mounted = mount("-t", "tmpfs", "none")
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    try:
        write_episode(store)
        assert mount("-o", "remount,ro").returncode == 0
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "disk" / "file").touch()
        (episode,) = open_run(tmp_path / "disk")
        assert episode.arrays["suffix_attention"].values.shape[0] == episode.n_inferences
        assert episode.dataset["suffix_attention"].values.shape[0] == episode.n_inferences
        assert find_damage(store).is_sound
        assert repair(store, dry_run=True)[0].changes_nothing
        assert command(monkeypatch, "inspect", store) == 0
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


@pytest.mark.parametrize(
    ("said", "rounding"),
    [
        ({"policy": {"dtype": "bfloat16"}}, 2**-8),
        ({"policy": {"dtype": "float32"}}, 0),
        ({"policy": {"dtype": "float16"}}, 2**-11),
        # Autocast: the softmax of a float32 policy came in bfloat16.
        ({"policy": {"dtype": "float32"}, "attention_dtype": "bfloat16"}, 2**-8),
        ({"policy": {"dtype": "float32"}, "attention_dtype": "float16"}, 2**-11),
        ({"policy": {"dtype": "bfloat16"}, "attention_dtype": "float32"}, 0),
        ({"policy": {"dtype": "bfloat16"}, "attention_dtype": ["x"]}, 0),
        ({}, 0),
    ],
)
def test_rows_may_be_off_by_the_dtype_that_the_softmax_came_in(tmp_path, said, rounding):
    write_episode(tmp_path / "e.zarr", n=1, **said)
    rest = 2**-11 + 14 * 2**-25
    assert open_episode(tmp_path / "e.zarr").row_sum_tolerance() == pytest.approx(rest + rounding)
