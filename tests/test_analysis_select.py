"""Attention by label, against plain numpy indexing of the arrays that zarr reads."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
import zarr

from lerobot_attn import open_episode
from lerobot_attn.analysis import attention, reduce
from lerobot_attn.analysis.labels import ranges
from lerobot_attn.analysis.select import executed_queries, frames_of, layout_of, seen_frame, stored_layers
from lerobot_attn.errors import SelectionError, StoreError
from lerobot_attn.layout import Camera, ImageGeometry, Segment, TokenLayout
from lerobot_attn.store.direct import _Chunks
from lerobot_attn.store.writer import Compression, EpisodeWriter

STEPS, HEADS, LAYERS, MEAN_LAYERS = [0, 4, 9], [1, 5], [16, 17], [0, 3, 16, 17]
POLICY = {"n_layers": 18, "n_heads": 8, "n_denoise_steps": 10}
N_ACTIONS, N_EXECUTED = 5, 3
# frame → (inference, action). Frames need not run through a chunk in order, nor inferences in turn.
TABLE = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (0, 2), (2, 1), (2, 0)]


def make_layout(*, state_token=False):
    lengths = [("image", "observation.images.image", 4), ("language", "language", 6)]
    lengths += [("state", "state", 1)] if state_token else []
    lengths += [("action", "action", N_ACTIONS)]
    segments, position = [], 0
    for kind, name, length in lengths:
        segments.append(Segment(kind, name, position, position + length))
        position += length
    geometry = ImageGeometry.letterbox((8, 8), (8, 8), (2, 2), padding="centred")
    return TokenLayout(tuple(segments), 10, (Camera("observation.images.image", geometry),))


def softmax_like(rng, *shape):
    values = rng.random(shape, dtype=np.float32) ** 4
    return (values / values.sum(-1, keepdims=True)).astype(np.float16)


def make_small_writer(
    path, *, layers=LAYERS, mean_layers=MEAN_LAYERS, state_token=False, named_state=True, **attributes
):
    layout = make_layout(state_token=state_token)
    first = layout.first_action_query
    sizes = {
        "denoise_step": len(STEPS),
        "layer": len(layers),
        "all_layer": len(mean_layers),
        "prefix_layer": 0,
        "head": len(HEADS),
        "query": layout.n_queries,
        "key": layout.n_keys,
        "prefix_query": 10,
        "prefix_key": 10,
        "text": 6,
        "action_dim": 2,
        "state_dim": 2,
    }
    coordinates = {
        "flow_time": np.array([1, 0.6, 0.1]),
        "denoise_step": np.array(STEPS),
        "head": np.array(HEADS),
        "text_key": np.arange(4, 10),
        "key_camera": layout.key_camera(),
        "key_row": layout.key_patch()[0],
        "key_column": layout.key_patch()[1],
        "action_dim": np.array(["x", "gripper"], dtype=object),
    }
    coordinates |= {"layer": np.array(layers)} if layers else {}
    coordinates |= {"all_layer": np.array(mean_layers)} if mean_layers else {}
    coordinates |= {"state_dim": np.array(["shoulder", "elbow"], dtype=object)} if named_state else {}
    optional = {"reward", "success"} | ({"suffix_attention"} if layers else set())
    optional |= {"suffix_attention_mean"} if mean_layers else set()
    optional |= {"state"} if named_state else set()
    fixed = {
        "task": "pick",
        "layout": layout.to_dict(),
        "executed_queries": [first, first + N_EXECUTED],
        "policy": POLICY,
    }
    return EpisodeWriter(
        path,
        sizes=sizes,
        coordinates=coordinates,
        attributes=fixed | attributes,
        compression=Compression(),
        optional=optional,
    ), sizes


def append_inference(writer, sizes, rng):
    rows = {
        "token_id": np.arange(6),
        "token_text": np.array(["Task:", " pick", " State:", " ", "7", ""], dtype=object),
        "text_word": np.array([-1, 0, -1, -1, -1, -1]),
        "text_state_dim": np.array([-1, -1, -1, -1, 0, -1]),
        "key_kind": np.array([1] * 4 + [4, 2, 4, 4, 3, 0] + [3] * (sizes["query"] - 5) + [5] * 5),
        "inference_frame": np.int32(0),
        "action_chunk": rng.random((sizes["query"], 2), dtype=np.float32),
    }
    maps = [sizes[name] for name in ("denoise_step", "layer", "head", "query", "key")]
    if sizes["layer"]:
        rows["suffix_attention"] = softmax_like(rng, *maps)
    if sizes["all_layer"]:  # not the means of the maps, so that a test sees which of the two was read
        rows["suffix_attention_mean"] = softmax_like(rng, maps[0], sizes["all_layer"], maps[2], maps[4])
    writer.append_inference(rows)


def append_frames(writer, table, rng, *, first=0, named_state=True):
    n = len(table)
    rows = {
        "frame_inference": np.array([inference for inference, _ in table], int),
        "frame_query": np.array([first + action for _, action in table], int),
        "action": rng.random((n, 2), dtype=np.float32),
        "reward": np.zeros(n, np.float32),
        "success": np.zeros(n, bool),
    }
    writer.append_frames(rows | ({"state": rng.random((n, 2), dtype=np.float32)} if named_state else {}))


def write_small_store(path, *, n_inferences=3, table=TABLE, state_token=False, named_state=True, **options):
    """Write an episode of random maps with 4 patches, 6 language slots and 5 actions."""
    rng = np.random.default_rng(0)
    writer, sizes = make_small_writer(path, state_token=state_token, named_state=named_state, **options)
    for _ in range(n_inferences):
        append_inference(writer, sizes, rng)
    append_frames(writer, table, rng, first=int(state_token), named_state=named_state)
    writer.close(complete=True)
    return open_episode(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An episode, its datasets, and its raw arrays in float32."""
    episode = write_small_store(tmp_path_factory.mktemp("small") / "episode_00000.zarr")
    group = zarr.open_group(episode.path, mode="r")
    return SimpleNamespace(
        episode=episode,
        data=episode.arrays,
        raw=group["suffix_attention"][...].astype(np.float32),
        means=group["suffix_attention_mean"][...].astype(np.float32),
        inference=group["frame_inference"][...],
        query=group["frame_query"][...],
    )


@pytest.fixture(scope="module")
def with_state_token(tmp_path_factory):
    path = tmp_path_factory.mktemp("state_token") / "episode_00000.zarr"
    return write_small_store(path, state_token=True, mean_layers=[])


@pytest.fixture(scope="module")
def without_frames(tmp_path_factory):
    path = tmp_path_factory.mktemp("without_frames") / "episode_00000.zarr"
    return write_small_store(path, n_inferences=0, table=[])


def pick(values, axis, choice, labels, total):
    """Apply one choice with numpy alone, keeping the axis; and say whether the axis stays."""
    if isinstance(choice, str):
        if choice == "all":
            return values, True
        reduce = {"mean": np.mean, "max": np.max}[choice]
        return reduce(values, axis=axis, keepdims=True), False
    wanted = [label + total if label < 0 else label for label in np.atleast_1d(choice)]
    positions = [labels.index(label) for label in wanted]
    return np.take(values, positions, axis), isinstance(choice, list)


def expect(values, layers, *, rows, layer, denoise_step, head, query_kept=False, row_kept=False):
    """Reduce (row, step, layer, head, query, key) maps as asked for; `rows` were chosen already."""
    values, step_kept = pick(values, 1, denoise_step, STEPS, 10)
    values, layer_kept = pick(values, 2, layer, layers, 18)
    values, head_kept = pick(values, 3, head, HEADS, 8)
    kept = [row_kept, step_kept, layer_kept, head_kept, query_kept, True]
    return values.squeeze(tuple(axis for axis, keep in enumerate(kept) if not keep))


def dims_of(row, denoise_step, layer, head, query="frame"):
    dims = [row] if row else []
    dims += ["denoise_step"] if denoise_step == "all" or isinstance(denoise_step, list) else []
    dims += ["layer"] if layer == "all" or isinstance(layer, list) else []
    dims += ["head"] if head == "all" or isinstance(head, list) else []
    return (*dims, *(["query"] if query == "all" else []), "key")


FULL_LAYERS = [-1, 16, [17], [-1, 16]]
STEP_CHOICES = [-1, 4, [9, 0], "all", "mean"]
HEAD_CHOICES = [-3, [5], [5, 1], "all", "mean", "max"]


@pytest.mark.parametrize("layer", FULL_LAYERS, ids=str)
def test_every_choice_of_layer_step_and_head(small, layer):
    frame = 4
    rows = small.raw[small.inference[[frame]]][..., small.query[[frame]], :]
    for step, head in itertools.product(STEP_CHOICES, HEAD_CHOICES):
        found = attention(small.data, frame=frame, layer=layer, denoise_step=step, head=head)
        expected = expect(rows, LAYERS, rows=frame, layer=layer, denoise_step=step, head=head)
        assert found.dims == dims_of(None, step, layer, head), (step, head)
        np.testing.assert_allclose(found.values, expected, rtol=1e-6, err_msg=f"{step} {head}")
        assert found.dtype == np.float32


@pytest.mark.parametrize("layer", [3, -18, [0, 17], "all", "mean"], ids=str)
def test_every_choice_of_layer_step_and_head_of_the_means(small, layer):
    rows = small.means[:, :, :, :, None]
    for step, head in itertools.product(STEP_CHOICES, HEAD_CHOICES):
        found = attention(small.data, layer=layer, denoise_step=step, head=head)
        expected = expect(
            rows, MEAN_LAYERS, rows="all", layer=layer, denoise_step=step, head=head, row_kept=True
        )
        assert found.dims == dims_of("inference", step, layer, head), (step, head)
        np.testing.assert_allclose(found.values, expected, rtol=1e-6, err_msg=f"{step} {head}")
        assert found.attrs["source"] == "suffix_attention_mean"


FRAMES = [0, 5, -1, [6], [3, 0, 0, 7], [7, 6, 5, 4, 3], "all", range(1, 4), np.array([5, 2]), []]
INFERENCES = [0, -1, [1], [2, 0, 2], "all", np.array([1, 2]), []]
QUERIES = ["frame", "executed", "mean", "all", 0, 4]


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_frames_find_their_inference_and_action_through_the_table(small, frame, query):
    numbers = np.arange(len(TABLE))[slice(None) if isinstance(frame, str) else frame]
    kept = np.ndim(numbers) > 0
    maps = [small.raw[TABLE[number][0]] for number in np.atleast_1d(numbers)]
    if query == "frame":
        maps = [m[..., [TABLE[number][1]], :] for m, number in zip(maps, np.atleast_1d(numbers), strict=True)]
    elif query == "mean":
        maps = [m.mean(axis=-2, keepdims=True) for m in maps]
    elif isinstance(query, int):
        maps = [m[..., [query], :] for m in maps]
    if query == "executed":
        rows = small.means[[TABLE[number][0] for number in np.atleast_1d(numbers)]][:, :, 2:, :, None]
    else:
        rows = np.reshape(maps, (len(maps), 3, 2, 2, -1, 15)) if maps else np.zeros((0, 3, 2, 2, 1, 15))
    for layer, step, head in [(-1, -1, "mean"), ([16], "all", 5)]:
        found = attention(small.data, frame=frame, layer=layer, denoise_step=step, head=head, query=query)
        expected = expect(
            rows,
            LAYERS,
            rows=frame,
            layer=layer,
            denoise_step=step,
            head=head,
            query_kept=query == "all",
            row_kept=kept,
        )
        if not rows.size:
            assert found.shape[0] == 0
            continue
        assert found.dims == dims_of("frame" if kept else None, step, layer, head, query)
        np.testing.assert_allclose(found.values, expected, rtol=1e-6)
        assert found.frame.values.tolist() == numbers.tolist()


@pytest.mark.parametrize("query", QUERIES[1:])
@pytest.mark.parametrize("inference", INFERENCES, ids=str)
def test_inferences_in_any_order(small, inference, query):
    numbers = np.arange(3)[slice(None) if isinstance(inference, str) else inference]
    kept = np.ndim(numbers) > 0
    found = attention(small.data, inference=inference, layer=16, denoise_step=9, head=5, query=query)
    assert found.inference.values.tolist() == numbers.tolist()
    maps = small.raw[numbers][..., 2, 0, 1, :, :]
    expected = {
        "executed": small.means[numbers][..., 2, MEAN_LAYERS.index(16), 1, :],
        "mean": maps.mean(axis=-2),
        "all": maps,
    }
    expected = expected[query] if isinstance(query, str) else maps[..., query, :]
    assert found.dims == (("inference",) if kept else ()) + dims_of(None, -1, -1, 0, query)
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    if query == "all":
        assert found["query"].values.tolist() == list(range(N_ACTIONS))


def test_rows_sum_to_1_and_labels_stay(small):
    found = attention(small.data, frame=[2, 6], layer=[16, 17], denoise_step="all", head="all")
    np.testing.assert_allclose(found.sum("key"), 1, atol=small.episode.row_sum_tolerance())
    assert found.layer.values.tolist() == LAYERS
    assert found.denoise_step.values.tolist() == STEPS
    assert found["head"].values.tolist() == HEADS
    np.testing.assert_allclose(found.flow_time, [1, 0.6, 0.1])
    assert found.key_camera.values.tolist() == [0] * 4 + [-1] * 11
    assert found.attrs["units"] == "share of attention"


FULL, MEAN, EXECUTED = "suffix_attention", "suffix_attention_mean", "mean of executed actions 0-2"


@pytest.mark.parametrize(
    ("choice", "source", "query"),
    [
        ({}, MEAN, EXECUTED),
        ({"frame": 4}, FULL, "action 1, executed at the frame"),
        ({"frame": [4]}, FULL, "the action executed at the frame"),
        ({"frame": 4, "query": "executed"}, MEAN, EXECUTED),
        ({"frame": 4, "layer": 3}, MEAN, EXECUTED),
        ({"frame": 4, "layer": [3, 17]}, MEAN, EXECUTED),
        ({"frame": 4, "layer": "all"}, MEAN, EXECUTED),
        ({"frame": 4, "layer": "mean"}, MEAN, EXECUTED),
        ({"query": 2, "layer": 3}, MEAN, EXECUTED),
        ({"query": 2, "layer": 16}, FULL, "action 2"),
        ({"query": np.int64(2), "layer": np.int64(16)}, FULL, "action 2"),
        ({"query": "mean", "layer": "all"}, FULL, "mean of all actions"),
        ({"query": "all", "layer": "mean"}, FULL, "every action"),
        ({"query": 4, "layer": "all"}, FULL, "action 4"),
    ],
    ids=str,
)
def test_means_stand_in_where_they_can_and_attributes_say_so(small, choice, source, query):
    found = attention(small.data, **choice)
    assert (found.attrs["source"], found.attrs["query"]) == (source, query)
    if source == MEAN and "layer" not in found.dims and not isinstance(choice.get("layer"), str):
        inference = TABLE[choice["frame"]][0] if "frame" in choice else slice(None)
        expected = small.means[inference, ..., 2, MEAN_LAYERS.index(choice.get("layer", 17)), :, :]
        np.testing.assert_allclose(found.values, expected.mean(axis=-2), rtol=1e-6)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({}, ("layer 17", "denoise step 9", "mean of heads 1, 5", "")),
        ({"layer": [16, 17], "denoise_step": [0, 4, 9], "head": "all"}, (
            "layers 16-17", "denoise steps 0, 4, 9", "heads 1, 5", "",
        )),
        ({"layer": "mean", "denoise_step": "mean", "head": [5], "exclude": [4]}, (
            "mean of layers 0, 3, 16-17", "mean of denoise steps 0, 4, 9", "head 5", "1 key token left out",
        )),
        ({"head": "max", "denoise_step": "all", "layer": "all"}, (
            "layers 0, 3, 16-17", "denoise steps 0, 4, 9", "max of heads 1, 5", "",
        )),
    ],
    ids=str,
)  # fmt: skip
def test_attributes_say_what_was_chosen(small, choice, words):
    attrs = attention(small.data, **choice).attrs
    assert tuple(attrs[name] for name in ("layer", "denoise_step", "head", "left_out")) == words


@pytest.mark.parametrize(
    ("layers", "mean_layers", "choice", "source", "found"),
    [
        ([16, 17], [], {"frame": "all", "layer": "all"}, FULL, [16, 17]),
        ([16, 17], [], {"layer": "all"}, FULL, [16, 17]),
        ([], [0, 17], {"layer": "all", "query": 1}, MEAN, [0, 17]),
        ([], [0, 17], {"frame": 0, "layer": "all"}, MEAN, [0, 17]),
        # Full maps of more layers than means: "all" is every stored one, not the few of the means.
        ([15, 16, 17], [17], {"frame": 0, "layer": "all"}, FULL, [15, 16, 17]),
        ([15, 16, 17], [17], {"layer": "all"}, FULL, [15, 16, 17]),
        ([15, 16, 17], [15, 16, 17], {"frame": 0, "layer": "all"}, FULL, [15, 16, 17]),
        ([15, 16, 17], [15, 16, 17], {"layer": "all"}, MEAN, [15, 16, 17]),
    ],
)
def test_all_layers_is_every_stored_one(tmp_path, layers, mean_layers, choice, source, found):
    episode = write_small_store(tmp_path / "episode_00000.zarr", layers=layers, mean_layers=mean_layers)
    assert stored_layers(episode.arrays) == (layers, mean_layers)
    array = attention(episode.arrays, **choice)
    assert array.attrs["source"] == source
    assert array.layer.values.tolist() == found


def test_executed_without_means_is_their_mean_over_the_executed_actions(tmp_path):
    episode = write_small_store(tmp_path / "episode_00000.zarr", mean_layers=[])
    raw = zarr.open_group(episode.path, mode="r")["suffix_attention"][...].astype(np.float32)
    found = attention(episode.arrays, head=5, layer=16)
    np.testing.assert_allclose(found, raw[:, 2, 0, 1, :N_EXECUTED].mean(axis=1), rtol=1e-6)
    assert (found.attrs["source"], found.attrs["query"]) == (FULL, EXECUTED)
    by_frame = attention(episode.arrays, head=5, layer=16, frame=[6, 0], query="executed")
    np.testing.assert_allclose(by_frame, found.values[[2, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("query", "rows"),
    [("frame", [2]), ("executed", [1, 2, 3]), ("mean", [1, 2, 3, 4, 5]), (0, [1]), (4, [5])],
)
def test_actions_are_counted_from_the_first_action_not_from_the_state_token(with_state_token, query, rows):
    episode = with_state_token
    raw = zarr.open_group(episode.path, mode="r")["suffix_attention"][...].astype(np.float32)
    frame = 4  # inference 1, its action 1, which is query 2
    found = attention(episode.arrays, frame=frame, layer=17, denoise_step=4, head=5, query=query)
    np.testing.assert_allclose(found, raw[1, 1, 1, 1, rows].mean(axis=0), rtol=1e-6)
    expected = {
        "frame": "action 1, executed at the frame",
        "executed": "mean of executed actions 0-2",
        "mean": "mean of all actions",
        0: "action 0",
        4: "action 4",
    }
    assert found.attrs["query"] == expected[query]
    with pytest.raises(SelectionError, match="query 5 does not exist: a chunk has 5, expected one of 0 to 4"):
        attention(episode.arrays, query=5)


@pytest.mark.parametrize("keys", [[0], [4, 0, 0], np.array([1, 2]), (14,)], ids=str)
def test_leave_out_rescales_the_rest(small, keys):
    choice = {"frame": [3, 1], "layer": 16, "denoise_step": 0}
    whole = attention(small.data, head="all", **choice).values.mean(axis=1)
    found = attention(small.data, exclude=keys, **choice)
    expected = whole.copy()
    expected[:, list(keys)] = 0
    expected /= expected.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(found.sum("key"), 1, rtol=1e-6)


def test_leaving_out_everything_leaves_nothing(small):
    assert (attention(small.data, exclude=range(15)).values == 0).all()


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"frame": 3},
        {"frame": "all"},
        {"frame": [7, 0, 0], "head": "max", "denoise_step": "all"},
        {"frame": [], "layer": 16},
        {"frame": [2, 5], "query": "mean", "layer": "mean"},
        {"frame": [2, 5], "layer": "all"},
        {"inference": [2, 0], "query": "all", "head": "all"},
        {"inference": [], "query": "all", "head": "max"},
        {"query": 3, "denoise_step": "mean", "exclude": [0, 1]},
    ],
    ids=str,
)
def test_dask_and_lazy_arrays_agree(small, choice):
    lazy = attention(small.episode.dataset, **choice)
    assert (lazy.chunks is not None) == bool(lazy.size)  # of nothing there is nothing to wait for
    now = attention(small.episode.arrays, **choice)
    assert now.chunks is None
    xr.testing.assert_allclose(lazy.compute(), now, rtol=1e-6)
    assert lazy.attrs == now.attrs
    assert lazy.dims == now.dims


@pytest.mark.parametrize("cached", [1, 40])
@pytest.mark.parametrize(
    "choice",
    [
        {"frame": "all", "denoise_step": "all", "layer": "all"},
        {"frame": [7, 0, 0, 3], "query": "mean", "layer": [16, 17]},
        {"frame": "all", "query": "executed"},
        {"inference": "all", "denoise_step": "mean", "query": "all"},
        {"inference": [2, 0, 1], "layer": "mean", "head": "max", "query": "mean"},
        {"inference": [1, 2], "denoise_step": "all", "head": "all", "query": 3},
    ],
    ids=str,
)
def test_a_few_maps_at_a_time_give_the_same_numbers(small, monkeypatch, choice, cached):
    whole, reads, read = attention(small.data, **choice), [], _Chunks.read

    def note(chunks, key):
        reads.append(key)
        return read(chunks, key)

    monkeypatch.setattr(reduce, "_PIECE_BYTES", 1)
    monkeypatch.setattr(reduce, "_CACHED_VALUES", cached)
    monkeypatch.setattr(_Chunks, "read", note)
    xr.testing.assert_identical(attention(small.data, **choice), whole)
    n_inferences = [
        len(range(3)[key[0]]) if isinstance(key[0], slice) else 1 for key in reads if len(key) > 4
    ]
    assert n_inferences == [1] * len(n_inferences)
    assert len(n_inferences) > 1


def damage_all_but(path, inference, step, layer):
    """Overwrite every chunk of the full maps but one with zeros, so that reading another raises."""
    for shard in (path / "suffix_attention" / "c").glob("*/0/0/0/0/0"):
        data = bytearray(shard.read_bytes())
        n_chunks = len(STEPS) * len(LAYERS)
        # A shard ends with (offset, length) of each chunk and a checksum of 4 bytes over them.
        index = np.frombuffer(data[-16 * n_chunks - 4 : -4], np.uint64).reshape(len(STEPS), len(LAYERS), 2)
        for at in np.ndindex(len(STEPS), len(LAYERS)):
            if (int(shard.relative_to(path).parts[2]), *at) != (inference, step, layer):
                start, length = map(int, index[at])
                data[start : start + length] = bytes(length)
        shard.write_bytes(data)


@pytest.mark.parametrize("data", ["dataset", "arrays"])
def test_one_frame_reads_one_map(tmp_path, data):
    episode = write_small_store(tmp_path / "episode_00000.zarr")
    choices = [{"frame": 3}, {"frame": [3]}, {"inference": 1, "query": 2}, {"frame": 4, "query": "all"}]
    intact = [attention(episode.arrays, **choice).values for choice in choices]
    damage_all_but(episode.path, inference=1, step=2, layer=1)
    dataset = getattr(open_episode(episode.path), data)
    for choice, expected in zip(choices, intact, strict=True):
        np.testing.assert_array_equal(attention(dataset, **choice), expected)
    for choice in ({"frame": 0}, {"frame": 3, "layer": 16}, {"frame": 3, "denoise_step": 0}):
        with pytest.raises(Exception, match=r"(?i)checksum|crc|decompress|codec"):  # the damage does show
            attention(dataset, **choice).compute()


def test_choosing_from_dask_reads_no_map(tmp_path):
    episode = write_small_store(tmp_path / "episode_00000.zarr")
    damage_all_but(episode.path, inference=None, step=None, layer=None)
    lazy = attention(episode.dataset, frame=[5, 1], layer=[16, 17], head="max", exclude=[0])
    assert lazy.chunks is not None
    assert lazy.shape == (2, 2, 15)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"layer": 5}, "layer 5 was not saved; saved are 16-17 as full maps, 0, 3, 16-17 as means over"),
        ({"layer": [16, 4, 5]}, "layer 4-5 was not saved"),
        ({"layer": -19}, "layer -19 was not saved"),
        ({"layer": 18}, "layer 18 was not saved"),
        ({"layer": []}, r"layer \[\] was not saved; saved are 16-17"),
        ({"layer": "last"}, "layer 'last': expected a number, a list, 'all' or 'mean'"),
        ({"layer": "max"}, "layer 'max': expected a number, a list, 'all' or 'mean'"),
        ({"layer": 1.5}, "layer 1.5: expected a number, a list"),
        ({"layer": True}, "layer True: expected a number, a list"),
        ({"layer": 3, "query": "mean"}, "query='mean' needs full maps of layer 3; saved are 16-17 as full"),
        ({"layer": 3, "query": "all"}, "choose query='executed' or a layer with full maps"),
        ({"layer": 3, "query": 3}, "query=3 needs full maps of layer 3"),
        ({"layer": [0, 16], "query": 4}, "query=4 needs full maps of layer 0, 16"),
        ({"denoise_step": 5}, "denoise step 5 was not saved; saved are 0, 4, 9"),
        ({"denoise_step": [0, -2]}, "denoise step 8 was not saved; saved are 0, 4, 9"),
        ({"denoise_step": []}, r"denoise step \[\]: expected at least one; saved are 0, 4, 9"),
        ({"denoise_step": "max"}, "denoise step 'max': expected a number, a list, 'all' or 'mean'"),
        ({"head": 0}, "head 0 was not saved; saved are 1, 5"),
        ({"head": -1}, "head 7 was not saved; saved are 1, 5"),
        ({"head": []}, r"head \[\]: expected at least one"),
        ({"head": "median"}, "head 'median': expected a number, a list, 'all', 'mean' or 'max'"),
        ({"frame": 8}, "frame 8 does not exist: the episode's are 0 to 7"),
        ({"frame": [0, -9]}, "frame -9 does not exist"),
        ({"frame": "last"}, "frame 'last': expected a number, a list or 'all'"),
        ({"frame": 0.0}, "frame 0.0: expected a number, a list or 'all'"),
        ({"frame": [[0, 1]]}, r"frame \[\[0, 1\]\]: expected a number, a list or 'all'"),
        ({"inference": 3}, "inference 3 does not exist: the episode's are 0 to 2"),
        ({"inference": "mean"}, "inference 'mean': expected a number, a list or 'all'"),
        ({"frame": 0, "inference": 0}, "got both frame=0 and inference=0, expected one of them"),
        ({"query": "last"}, "query 'last': expected an action token's index or one of frame, executed, mean"),
        ({"query": "frame"}, "query='frame' is the action executed at a frame: expected frame= with it"),
        ({"query": 5}, "query 5 does not exist: a chunk has 5, expected one of 0 to 4"),
        ({"query": -1}, "query -1 does not exist"),
        ({"query": [0, 1]}, r"query \[0, 1\] does not exist"),
        ({"query": 1.0}, "query 1.0: expected a number"),
        ({"exclude": [15]}, "exclude: key 15 does not exist, expected 0 to 14"),
        ({"exclude": [-1]}, "exclude: key -1 does not exist"),
    ],
    ids=str,
)
def test_errors_name_what_the_episode_holds(small, choice, message):
    with pytest.raises(SelectionError, match=message) as error:
        attention(small.data, **choice)
    assert "\n" not in str(error.value)


def test_layers_of_two_kinds_are_not_called_unsaved(tmp_path):
    episode = write_small_store(tmp_path / "episode_00000.zarr", mean_layers=[0, 3])
    with pytest.raises(SelectionError, match="layers 0, 16 are not all in the same array; saved are 16-17"):
        attention(episode.arrays, layer=[0, 16])


def test_an_episode_without_suffix_attention_says_how_to_record_it(tmp_path):
    episode = write_small_store(tmp_path / "episode_00000.zarr", layers=[], mean_layers=[])
    with pytest.raises(SelectionError, match="holds no suffix attention; record with layers or mean_layers"):
        attention(episode.arrays, frame=0)


def test_negative_labels_count_from_the_last_stored_where_the_policy_is_unknown(tmp_path):
    episode = write_small_store(tmp_path / "episode_00000.zarr", policy={})
    found = attention(episode.arrays, frame=0, layer=-2, denoise_step=-1, head=[-1])
    assert (found.layer.item(), found.denoise_step.item(), found["head"].values.tolist()) == (16, 9, [5])


@pytest.mark.parametrize("query", ["frame", "executed", "mean", "all", 1])
@pytest.mark.parametrize("data", ["dataset", "arrays"])
def test_an_episode_without_frames_is_empty_not_an_error(without_frames, query, data):
    dataset = getattr(without_frames, data)
    found = attention(dataset, frame="all", query=query)
    assert found.values.shape == ((0, 5, 15) if query == "all" else (0, 15))
    if query != "frame":
        assert attention(dataset, query=query).sizes["inference"] == 0
    with pytest.raises(SelectionError, match="frame 0 does not exist: the episode's are none: it is empty"):
        attention(dataset, frame=0)


def test_an_episode_that_still_grows(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "episode_00000.zarr"
    writer, sizes = make_small_writer(path)
    early = open_episode(path).dataset
    append_inference(writer, sizes, rng)
    append_frames(writer, [(0, 0), (0, 1)], rng)
    writer.commit()
    append_inference(writer, sizes, rng)  # written, but not committed
    growing = open_episode(path).dataset
    first = attention(growing, frame="all").compute()
    assert first.sizes["frame"] == 2
    append_frames(writer, [(1, 0)], rng)
    writer.commit()
    np.testing.assert_array_equal(attention(growing, frame="all"), first)
    assert attention(early, frame="all").values.shape == (0, 15)
    later = attention(open_episode(path).dataset, frame="all")
    np.testing.assert_array_equal(later[:2], first)
    assert later.sizes["frame"] == 3
    writer.close(complete=False)


def test_damaged_attributes_are_store_errors(small):
    bare = small.data.copy()
    bare.attrs = {}
    with pytest.raises(StoreError, match="token layout is missing or damaged"):
        layout_of(bare)
    with pytest.raises(StoreError, match="does not say which queries are executed"):
        executed_queries(bare)
    bare.attrs = {"executed_queries": [0]}
    with pytest.raises(StoreError, match="does not say which queries are executed"):
        executed_queries(bare)


def test_frames_of_counts_from_the_end(small):
    assert frames_of(small.data, -1) == 7
    assert frames_of(small.data, [-8, 7]) == [0, 7]
    assert frames_of(small.data, "all") == list(range(8))


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2, 5"), ([2, 1], "2, 1"), ([0, 2, 3], "0, 2-3")],
)
def test_ranges(values, text):
    assert ranges(values) == text


def test_seen_frame_is_the_image_that_the_inference_saw():
    """Inference 1 saw frame 2, where 0 still acted (real-time chunking); inference 2 saw frame 6."""
    data = xr.Dataset(
        {
            "frame_inference": ("frame", [0, 0, 0, 1, 1, 1, 2, 2]),
            "inference_frame": ("inference", [0, 2, 6]),
        }
    )
    assert [seen_frame(data, frame) for frame in range(8)] == [0, 0, 0, 3, 4, 5, 6, 6]
