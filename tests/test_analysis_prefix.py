"""Prefix attention, rollout and flow: planted words found again; dense products and networkx to compare."""

from types import SimpleNamespace

import networkx
import numpy as np
import pytest
import zarr

from lerobot_attn import open_episode
from lerobot_attn.analysis import attention
from lerobot_attn.analysis.prefix import (
    attention_from,
    cross_modal,
    image_to_text,
    prefix_attention,
    text_to_image,
)
from lerobot_attn.analysis.propagation import attention_flow, attention_rollout
from lerobot_attn.analysis.spatial import camera_geometry, on_grid
from lerobot_attn.analysis.tokens import by_modality
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import Camera, ImageGeometry, Segment, TokenLayout
from lerobot_attn.store.writer import Compression, EpisodeWriter
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

IMAGE, WRIST = "observation.images.image", "observation.images.wrist"
N_PREFIX, N_TEXT, N_ACTIONS = 19, 7, 3
STEPS, HEADS, LAYERS = [0, 4], [1, 5], [0, 1, 2]
POLICY = {"n_layers": 3, "n_prefix_layers": 3, "n_heads": 8, "n_denoise_steps": 5}
# frame → (inference, action). Frames need not run through a chunk in order, nor inferences in turn.
TABLE = [(0, 0), (0, 1), (1, 1), (0, 1), (1, 0)]
# The second prompt is one token longer, and a token of state where the first has padding.
TEXTS = [["Task:", " pick", " bo", "wl", ",", "12", ""], ["Task:", " pick", " bo", "wl", ",", "7", "3"]]
STATE_DIMS = [[-1, -1, -1, -1, -1, 0, -1], [-1, -1, -1, -1, -1, 0, 1]]
WORDS = [-1, 0, 1, 1, -1, -1, -1]
TEXT_KINDS = [[4, 2, 2, 2, 4, 3, 0], [4, 2, 2, 2, 4, 3, 3]]


def make_layout(*, state_token=False):
    lengths = [("image", IMAGE, 4), ("image", WRIST, 4), ("image", "observation.images.empty", 4)]
    lengths += [("language", "language", N_TEXT), *([("state", "state", 1)] if state_token else [])]
    lengths += [("action", "action", N_ACTIONS)]
    segments, position = [], 0
    for kind, name, length in lengths:
        segments.append(Segment(kind, name, position, position + length))
        position += length
    geometry = ImageGeometry.letterbox((8, 8), (8, 8), (2, 2), padding="centred")
    cameras = (Camera(IMAGE, geometry), Camera(WRIST, geometry), Camera("observation.images.empty", None))
    return TokenLayout(tuple(segments), N_PREFIX, cameras)


def key_kinds(inference, *, state_token=False):
    return np.array([1] * 8 + [0] * 4 + TEXT_KINDS[inference % 2] + [3] * state_token + [5] * N_ACTIONS)


def softmax_rows(rng, *shape, mask):
    """Random rows over the keys of the mask, peaked like attention."""
    values = np.where(mask, rng.random(shape) ** 6, 0)
    return (values / values.sum(-1, keepdims=True)).astype(np.float16)


def random_maps(rng, kinds, layers, prefix_layers):
    n_queries = len(kinds) - N_PREFIX
    suffix = softmax_rows(rng, len(STEPS), len(layers), len(HEADS), n_queries, len(kinds), mask=kinds != 0)
    inside = kinds[:N_PREFIX] != 0
    prefix = softmax_rows(rng, len(prefix_layers), len(HEADS), N_PREFIX, N_PREFIX, mask=inside)
    prefix[..., ~inside, :] = 0
    return suffix, prefix


def write_small_store(
    path,
    *,
    maps=random_maps,
    layers=LAYERS,
    prefix_layers=LAYERS,
    state_token=False,
    n_inferences=2,
    table=TABLE,
    **attributes,
):
    """Write an episode with two cameras of 4 patches, an empty one, 7 language slots and 3 actions.

    `maps` is called with (rng, kinds, layers, prefix_layers) and gives suffix and prefix maps.
    """
    layout = make_layout(state_token=state_token)
    first = layout.first_action_query
    sizes = {
        "denoise_step": len(STEPS),
        "layer": len(layers),
        "prefix_layer": len(prefix_layers),
        "head": len(HEADS),
        "query": layout.n_queries,
        "key": layout.n_keys,
        "prefix_query": N_PREFIX,
        "prefix_key": N_PREFIX,
        "text": N_TEXT,
        "action_dim": 2,
        "state_dim": 2,
    }
    coordinates = {
        "flow_time": np.array([1, 0.2]),
        "denoise_step": np.array(STEPS),
        "head": np.array(HEADS),
        "text_key": np.arange(12, 19),
        "key_camera": layout.key_camera(),
        "key_row": layout.key_patch()[0],
        "key_column": layout.key_patch()[1],
        "action_dim": np.array(["x", "gripper"], dtype=object),
        "state_dim": np.array(["shoulder", "elbow"], dtype=object),
    }
    coordinates |= {"layer": np.array(layers)} if layers else {}
    coordinates |= {"prefix_layer": np.array(prefix_layers)} if prefix_layers else {}
    optional = {"reward", "success"} | ({"suffix_attention"} if layers else set())
    optional |= {"prefix_attention"} if prefix_layers else set()
    fixed = {
        "task": "pick bowl",
        "layout": layout.to_dict(),
        "executed_queries": [first, first + 2],
        "policy": POLICY,
    }
    writer = EpisodeWriter(
        path,
        sizes=sizes,
        coordinates=coordinates,
        attributes=fixed | attributes,
        compression=Compression(),
        optional=optional,
    )
    rng = np.random.default_rng(0)
    for inference in range(n_inferences):
        kinds = key_kinds(inference, state_token=state_token)
        suffix, prefix = maps(rng, kinds, layers, prefix_layers)
        rows = {
            "token_id": np.arange(N_TEXT),
            "token_text": np.array(TEXTS[inference % 2], dtype=object),
            "text_word": np.array(WORDS),
            "text_state_dim": np.array(STATE_DIMS[inference % 2]),
            "key_kind": kinds,
            "inference_frame": np.int32(inference),
            "action_chunk": rng.random((layout.n_queries, 2), dtype=np.float32),
        }
        rows |= {"suffix_attention": suffix} if layers else {}
        rows |= {"prefix_attention": prefix} if prefix_layers else {}
        writer.append_inference(rows)
    n = len(table)
    frames = {
        "frame_inference": np.array([inference for inference, _ in table], int),
        "frame_query": np.array([first + action for _, action in table], int),
        "action": rng.random((n, 2), dtype=np.float32),
        "reward": np.zeros(n, np.float32),
        "success": np.zeros(n, bool),
    }
    writer.append_frames(frames)
    writer.close(complete=True)
    return open_episode(path)


def opened(episode, **facts):
    """The episode, and its raw maps in float64, read by zarr alone."""
    group = zarr.open_group(episode.path, mode="r")
    raw = {name: group[name][...].astype(float) for name in ("suffix_attention", "prefix_attention")}
    return SimpleNamespace(
        episode=episode, suffix=raw["suffix_attention"], prefix=raw["prefix_attention"], **facts
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return opened(write_small_store(tmp_path_factory.mktemp("small") / "episode_00000.zarr"))


@pytest.fixture(params=["dataset", "arrays"])
def data(request, small):
    return getattr(small.episode, request.param)


@pytest.fixture(scope="module", params=["actions-arrays", "state_token-dataset"])
def stack(request, tmp_path_factory):
    """An episode with every layer; in one a state token opens the suffix, before the actions."""
    suffix, _, kind = request.param.partition("-")
    first = int(suffix == "state_token")
    path = tmp_path_factory.mktemp("stack") / "episode_00000.zarr"
    episode = write_small_store(path, state_token=bool(first))
    return opened(episode, first=first, data=getattr(episode, kind))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    plan = SyntheticPlan(
        grid=(4, 4),
        n_frames=6,
        n_denoise_steps=1,
        layers=(0, 1, 2, 3),
        prefix_layers=(0, 1, 2, 3),
        videos=False,
    )
    episode = open_episode(write_planted_episode(tmp_path_factory.mktemp("planted"), plan))
    return SimpleNamespace(plan=plan, episode=episode)


@pytest.fixture(params=["dataset", "arrays"])
def planted_data(request, planted):
    return getattr(planted.episode, request.param)


def test_each_word_looks_at_its_planted_patch(planted, planted_data):
    words = planted.plan.task.split()
    heat = text_to_image(planted_data, frame=4, layer="all", head="all")
    assert heat.dims == ("prefix_layer", "head", "token", "grid_y", "grid_x")
    assert heat["label"].values.tolist() == words
    expected = np.eye(16)[: len(words)].reshape(len(words), 4, 4)
    np.testing.assert_array_equal(heat.values, np.broadcast_to(expected, heat.shape))
    assert text_to_image(planted_data, "red", "wrist", inference=0).max() == 0


@pytest.mark.parametrize("word", ["bowl", "BOWL", 10, "10"])
def test_a_word_by_text_or_number(planted, planted_data, word):
    heat = text_to_image(planted_data, word, "image", inference=1)
    np.testing.assert_array_equal(heat, np.eye(16)[10].reshape(4, 4))
    facts = {
        "units": "share of attention",
        "camera": IMAGE,
        "word": "bowl",
        "query": "word bowl",
        "source": "prefix_attention",
        "layer": "layer 3",
        "head": "mean of all heads",
        "vmin": 0.0,
        "vmax": 1.0,
    }
    assert facts.items() <= heat.attrs.items()


def test_each_patch_looks_at_the_word_of_its_row(planted, planted_data):
    shares = image_to_text(planted_data, "wrist", frame=[5, 0])
    assert shares.dims == ("frame", "grid_y", "grid_x", "token")
    tokens = shares["ordinal"].where(shares["kind"] == "task", -1).values
    for row in range(4):
        np.testing.assert_array_equal(
            shares.isel(grid_y=row), np.broadcast_to(tokens == row, (2, 4, len(tokens)))
        )
    assert (shares.attrs["camera"], shares.attrs["vmax"]) == (WRIST, 1.0)


def test_modalities_attend_as_planted(planted_data):
    shares = cross_modal(planted_data, frame="all")
    names = [IMAGE, WRIST, "task", "state", "template"]
    assert shares.dims == ("frame", "from_modality", "to_modality")
    assert shares["from_modality"].values.tolist() == shares["to_modality"].values.tolist() == names
    looks_at = {IMAGE: "task", WRIST: "task", "task": IMAGE, "state": "state", "template": "template"}
    expected = [[float(looks_at[a] == b) for b in names] for a in names]
    np.testing.assert_allclose(shares, np.broadcast_to(expected, (6, 5, 5)), atol=1e-6)


def reduced(maps, layer, head):
    """Reduce (layer, head, …) as the words say; labels become positions."""
    maps = maps.mean(0) if layer == "mean" else maps if layer == "all" else maps[layer]
    axis = 0 if maps.ndim == 3 else 1
    if head in ("mean", "max"):
        return getattr(maps, head)(axis)
    return maps if head == "all" else np.take(maps, np.vectorize(HEADS.index)(head), axis)


@pytest.mark.parametrize(
    ("layer", "head"),
    [
        (-1, "mean"),
        (0, 5),
        (1, [5, 1]),
        ([2, 0], "max"),
        ([1], [1]),
        ("all", "all"),
        ("mean", "max"),
        ("mean", 1),
    ],
    ids=str,
)
def test_prefix_attention_is_what_numpy_selects(small, data, layer, head):
    got = prefix_attention(data, inference=1, layer=layer, head=head)
    np.testing.assert_allclose(got, reduced(small.prefix[1], layer, head), rtol=1e-5, atol=1e-7)
    assert got.dtype == np.float32


def test_prefix_attention_of_frames_is_that_of_their_inferences(small, data):
    got = prefix_attention(data, frame=[4, 1, 2], layer=1)
    assert got.dims == ("frame", "prefix_query", "prefix_key")
    assert got["frame"].values.tolist() == [4, 1, 2]
    np.testing.assert_allclose(got, small.prefix[[1, 0, 1], 1].mean(1), rtol=1e-5, atol=1e-7)
    one = prefix_attention(data, frame=-1, layer=1)
    assert int(one["frame"]) == 4
    np.testing.assert_array_equal(one, got[0])
    every = prefix_attention(data)
    assert every["inference"].values.tolist() == [0, 1]
    padding = key_kinds(0)[:N_PREFIX] == 0
    sums = every.isel(inference=0).sum("prefix_key").values
    np.testing.assert_array_equal(sums[padding], 0)
    np.testing.assert_allclose(sums[~padding], 1, atol=2e-3)


def test_nothing_is_read_of_a_dask_dataset_before_it_is_asked_for(small):
    assert prefix_attention(small.episode.dataset, inference=0).chunks is not None
    assert cross_modal(small.episode.dataset).chunks is not None


@pytest.mark.parametrize("head", ["mean", "max", 5])
def test_a_word_is_the_mean_of_its_tokens(small, data, head):
    heat = text_to_image(data, "bowl", "wrist", frame="all", layer=1, head=head)
    maps = small.prefix[[i for i, _ in TABLE], 1]  # (frame, head, query, key)
    of_word = maps[:, :, [14, 15], 4:8].mean(2)
    expected = of_word[:, 1] if head == 5 else getattr(of_word, head)(1)
    np.testing.assert_allclose(heat, expected.reshape(5, 2, 2), rtol=1e-5, atol=1e-7)
    assert heat.attrs["vmax"] == pytest.approx(expected.max(), rel=1e-5)


def test_patches_give_to_the_tokens_of_each_prompt(small, data):
    shares = image_to_text(data, inference=[1, 0], layer=0, head="all")
    assert shares.dims == ("inference", "head", "grid_y", "grid_x", "token")
    labels = shares["label"].values.tolist()
    assert labels == ["pick", "bowl", "shoulder", "elbow", "Task:", "(blanks)"]
    maps = small.prefix[[1, 0], 0][:, :, :4].reshape(2, 2, 2, 2, N_PREFIX)
    keys = {"pick": [13], "bowl": [14, 15], "shoulder": [17], "Task:": [12], "(blanks)": [16]}
    for label, at in keys.items():
        np.testing.assert_allclose(
            shares.isel(token=labels.index(label)), maps[..., at].sum(-1), rtol=1e-5, atol=1e-7
        )
    elbow = shares.isel(token=labels.index("elbow"))
    np.testing.assert_allclose(elbow[0], maps[0, ..., 18], rtol=1e-5)
    assert elbow[1].max() == 0, "the first prompt has padding there"


def test_cross_modal_is_the_mean_over_unmasked_rows(small, data):
    shares = cross_modal(data, inference="all", layer=2)
    names = [IMAGE, WRIST, "task", "state", "template"]
    assert shares["to_modality"].values.tolist() == names, "neither padding nor actions"
    for inference in range(2):
        kinds = key_kinds(inference)[:N_PREFIX]
        keys = [np.arange(4), np.arange(4, 8), *(np.flatnonzero(kinds == k) for k in (2, 3, 4))]
        keys[3] = keys[3][keys[3] < N_PREFIX]
        maps = small.prefix[inference, 2].mean(0)
        expected = [[maps[np.ix_(a, b)].sum(1).mean() for b in keys] for a in keys]
        np.testing.assert_allclose(shares.sel(inference=inference), expected, rtol=1e-5)
    np.testing.assert_allclose(shares.sum("to_modality"), 1, atol=2e-3)


def fused(maps, head):
    """Mean, max or one head of (head, query, key), rows rescaled to 1."""
    maps = getattr(maps, head)(0) if isinstance(head, str) else maps[HEADS.index(head)]
    total = maps.sum(-1, keepdims=True)
    return maps / np.where(total > 0, total, 1)


def augmented(stack, inference, step, layer, head):
    """A/2 + I/2 among all prefix and suffix tokens, dense."""
    n_keys = stack.suffix.shape[-1]
    weights = np.zeros((n_keys, n_keys))
    weights[:N_PREFIX, :N_PREFIX] = fused(stack.prefix[inference, layer], head)
    weights[N_PREFIX:] = fused(stack.suffix[inference, step, layer], head)
    return (weights + np.eye(n_keys)) / 2


def dense_rollout(stack, inference, step=-1, head="mean", top=2):
    """Every suffix token's rollout, (query, key): the product of dense matrices, lowest layer last."""
    product = np.eye(stack.suffix.shape[-1])
    for layer in range(top + 1):
        product = augmented(stack, inference, step, layer, head) @ product
    return product[N_PREFIX:]


def test_rollout_is_the_recursion_of_its_docstring(stack):
    """P and S carried up as written there, and the dense product: three ways to the same."""
    n_suffix = stack.suffix.shape[-2]
    p, s = np.eye(N_PREFIX, stack.suffix.shape[-1]), np.eye(n_suffix, stack.suffix.shape[-1], N_PREFIX)
    for layer in range(3):
        to = fused(stack.suffix[1, -1, layer], "mean")
        s = s / 2 + (to[:, :N_PREFIX] @ p + to[:, N_PREFIX:] @ s) / 2
        p = p / 2 + fused(stack.prefix[1, layer], "mean") @ p / 2
    np.testing.assert_allclose(s, dense_rollout(stack, 1), atol=1e-12)
    got = attention_rollout(stack.data, inference=1, query="all")
    np.testing.assert_allclose(got, s[stack.first :], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["mean", "max", 1, 5])
@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_rollout_is_the_product_of_dense_matrices(stack, head, layer):
    got = attention_rollout(stack.data, inference=1, query="all", head=head, layer=layer)
    expected = dense_rollout(stack, 1, head=head, top=layer % 3)[stack.first :]
    assert got.dims == ("query", "key")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.sum("key"), 1, atol=1e-5)


@pytest.mark.parametrize("query", [0, 2, "executed", "mean"])
def test_rollout_of_one_query(stack, query):
    got = attention_rollout(stack.data, query=query)
    assert got.dims == ("inference", "key")
    every = np.stack([dense_rollout(stack, i)[stack.first :] for i in range(2)])
    expected = {"executed": every[:, :2].mean(1), "mean": every.mean(1)}.get(query)
    np.testing.assert_allclose(got, every[:, query] if expected is None else expected, rtol=1e-4, atol=1e-6)
    assert got.attrs["query"] == attention(stack.data, query=query, layer=0).attrs["query"]


def test_rollout_of_steps_and_heads(stack):
    every = attention_rollout(stack.data, inference=0, denoise_step="all", head="all", query=1)
    assert every.dims == ("denoise_step", "head", "key")
    assert every["denoise_step"].values.tolist() == STEPS
    assert every["head"].values.tolist() == HEADS
    np.testing.assert_allclose(every["flow_time"], [1, 0.2])
    for at, (step, head) in enumerate([(0, 1), (0, 5), (1, 1), (1, 5)]):
        expected = dense_rollout(stack, 0, step, head)[stack.first + 1]
        np.testing.assert_allclose(every.values.reshape(4, -1)[at], expected, rtol=1e-4, atol=1e-6)
    mean = attention_rollout(stack.data, inference=0, denoise_step="mean", head=[5], query=1)
    assert mean.dims == ("head", "key")
    np.testing.assert_allclose(mean, every.sel(head=[5]).mean("denoise_step"), rtol=1e-5)
    first = attention_rollout(stack.data, inference=0, denoise_step=0, head=5, query=1)
    np.testing.assert_array_equal(first, every.sel(denoise_step=0, head=5))


def test_rollout_of_frames(stack):
    got = attention_rollout(stack.data, frame=[4, 0, 2, 0])
    expected = [dense_rollout(stack, *TABLE[t][:1])[stack.first + TABLE[t][1]] for t in (4, 0, 2, 0)]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert got["frame"].values.tolist() == [4, 0, 2, 0]
    one = attention_rollout(stack.data, frame=3)
    assert one.dims == ("key",)
    assert one.attrs["query"] == "action 1, executed at the frame"
    np.testing.assert_allclose(one, dense_rollout(stack, 0)[stack.first + 1], rtol=1e-4, atol=1e-6)
    other = attention_rollout(stack.data, frame=[2, 1], query="executed")
    np.testing.assert_allclose(other, attention_rollout(stack.data, query="executed")[[1, 0]], rtol=1e-6)
    assert attention_rollout(stack.data, frame=[]).shape == (0, stack.data.sizes["key"])


def test_rollout_serves_where_attention_does(stack):
    got, like = attention_rollout(stack.data, frame=[0, 4]), attention(stack.data, frame=[0, 4])
    assert got.dims == like.dims
    assert set(got.coords) == set(like.coords)
    for name in like.coords:
        if name != "layer":
            np.testing.assert_array_equal(got[name], like[name])
    assert set(like.attrs) <= set(got.attrs)
    assert got.attrs["source"] == "suffix_attention and prefix_attention"
    assert got.attrs["layer"] == "layers 0-2"
    np.testing.assert_allclose(by_modality(stack.data, got).sum("modality"), 1, atol=1e-5)
    name, geometry, segment = camera_geometry(stack.data, "wrist")
    heat = on_grid(got, geometry, segment)
    np.testing.assert_array_equal(heat, got.values[:, 4:8].reshape(2, 2, 2))


def test_the_prefix_reaches_the_actions_one_layer_late(tmp_path):
    """Patch 0 passes what word 0 shows it to the actions only from the layer after."""

    def maps(rng, kinds, layers, prefix_layers):
        suffix = np.zeros((len(STEPS), 3, len(HEADS), N_ACTIONS, len(kinds)), np.float16)
        prefix = np.broadcast_to(
            np.eye(N_PREFIX, dtype=np.float16), (3, len(HEADS), N_PREFIX, N_PREFIX)
        ).copy()
        suffix[:, :2, :, :, -1] = 1  # in layers 0 and 1 actions look at the last action
        suffix[:, 2, :, :, 0] = 1  # in layer 2 at patch 0
        prefix[1, :, 0] = np.eye(N_PREFIX)[13]  # which has seen "pick" in layer 1
        prefix[2, :, 0] = np.eye(N_PREFIX)[14]  # and will see "bowl" in layer 2, too late
        return suffix, prefix

    data = write_small_store(tmp_path / "episode_00000.zarr", maps=maps).arrays
    got = attention_rollout(data, inference=0, query=N_ACTIONS - 1)
    expected = np.zeros(data.sizes["key"])
    expected[[0, 13, -1]] = 0.25, 0.25, 0.5
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_only_the_layers_that_count_are_needed(tmp_path):
    """The language model's last layer is read by nobody."""
    needed = write_small_store(tmp_path / "episode_00000.zarr", prefix_layers=[0, 1]).arrays
    assert attention_rollout(needed, frame=0).sum() == pytest.approx(1, abs=1e-5)
    first = write_small_store(tmp_path / "episode_00001.zarr", layers=[0], prefix_layers=[]).arrays
    got = attention_rollout(first, inference=0, layer=0, query=0)
    expected = attention(first, inference=0, layer=0, query=0).values / 2
    expected[N_PREFIX] += 0.5
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert got.attrs["source"] == "suffix_attention"


def network(stack, inference, step, head, top=2):
    """The same flow network, edge by edge."""
    graph = networkx.DiGraph()
    for layer in range(top + 1):
        capacity = augmented(stack, inference, step, layer, head)
        for start, end in zip(*np.nonzero(capacity), strict=True):
            graph.add_edge((layer + 1, int(start)), (layer, int(end)), capacity=capacity[start, end])
    return graph


def reference_flow(graph, source, keys):
    graph = graph.copy()
    graph.add_node("target")
    for key in keys:
        graph.add_edge((0, int(key)), "target")  # no capacity: unlimited
    return networkx.maximum_flow_value(
        graph, source, "target", flow_func=networkx.algorithms.flow.shortest_augmenting_path
    )


def test_flow_to_tokens_is_networkx_s(stack):
    got = attention_flow(stack.data, inference=0, query=1, targets="tokens", layer=1)
    graph = network(stack, 0, -1, "mean", top=1)
    source = (2, N_PREFIX + stack.first + 1)
    masked = key_kinds(0, state_token=bool(stack.first)) == 0
    expected = [0 if masked[key] else reference_flow(graph, source, [key]) for key in range(len(masked))]
    assert got.dims == ("key",)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert len(set(np.round(expected, 6))) > 5, "a case in which every flow is the same shows little"
    np.testing.assert_array_equal(got["key_camera"], stack.data["key_camera"])
    assert got.attrs["query"] == "action 1"


def test_flow_to_groups_is_networkx_s(stack):
    got = attention_flow(stack.data, frame=2, head=5, denoise_step=0)
    graph = network(stack, 1, 0, 5)
    source = (3, N_PREFIX + stack.first + 1)
    kinds = key_kinds(1, state_token=bool(stack.first))
    keys = {
        ("modality", IMAGE): range(4),
        ("modality", WRIST): range(4, 8),
        ("modality", "task"): [13, 14, 15],
        ("modality", "state"): np.flatnonzero(kinds == 3),
        ("modality", "template"): [12, 16],
        ("modality", "actions"): np.flatnonzero(kinds == 5),
        ("task", "pick"): [13],
        ("task", "bowl"): [14, 15],
        **({("state", "state token"): [N_PREFIX]} if stack.first else {}),
        ("state", "shoulder"): [17],
        ("state", "elbow"): [18],
    }
    assert list(zip(got["kind"].values.tolist(), got["label"].values.tolist(), strict=True)) == list(keys)
    expected = [reference_flow(graph, source, at) for at in keys.values()]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.attrs["query"] == "action 1, executed at the frame"
    assert (int(got["frame"]), int(got["head"]), int(got["denoise_step"])) == (2, 5, 0)


def test_flow_is_conserved(stack):
    """No more reaches a group than 1, than its tokens one by one, nor less than any of them."""
    groups = attention_flow(stack.data, frame=0)
    tokens = attention_flow(stack.data, frame=0, targets="tokens").values
    kinds = key_kinds(0, state_token=bool(stack.first))
    members = {IMAGE: range(4), "task": [13, 14, 15], "actions": np.flatnonzero(kinds == 5), "elbow": []}
    for label, keys in members.items():
        value = float(groups[groups["label"].values.tolist().index(label)])
        assert max([0, *tokens[list(keys)]]) - 1e-6 <= value <= min(1, tokens[list(keys)].sum()) + 1e-6
    assert tokens.sum() >= 1 - 1e-6, "all that leaves the action arrives"


def test_flow_of_one_layer_is_the_augmented_attention(stack):
    got = attention_flow(stack.data, inference=1, query=0, layer=0, targets=[3, 0, 17])
    expected = augmented(stack, 1, -1, 0, "mean")[N_PREFIX + stack.first][[3, 0, 17]]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got["key"].values.tolist() == [3, 0, 17]


def test_leaving_out_small_edges_only_lowers_a_flow(stack):
    full = attention_flow(stack.data, frame=1, targets="tokens")
    some, most = (
        attention_flow(stack.data, frame=1, targets="tokens", min_share=share) for share in (0.02, 0.2)
    )
    assert (some <= full + 1e-6).all()
    assert (most <= some + 1e-6).all()
    assert float(most.sum()) < float(some.sum()) < float(full.sum())
    assert some.attrs["min_share"] == 0.02


CALLS = {"prefix_attention": prefix_attention, "rollout": attention_rollout, "flow": attention_flow}
CALLS |= {"text_to_image": text_to_image, "image_to_text": image_to_text, "cross_modal": cross_modal}


@pytest.mark.parametrize(
    ("call", "options", "said"),
    [
        ("prefix_attention", {"layer": 3}, "prefix layer 3 was not saved; saved are 0-2"),
        ("prefix_attention", {"head": 0}, "head 0 was not saved; saved are 1, 5"),
        ("prefix_attention", {"head": "median"}, "head 'median'"),
        ("prefix_attention", {"layer": "last"}, "prefix layer 'last'"),
        ("prefix_attention", {"inference": 2}, "inference 2 does not exist: the episode's are 0 to 1"),
        ("prefix_attention", {"frame": 5}, "frame 5 does not exist: the episode's are 0 to 4"),
        ("prefix_attention", {"frame": []}, "no frame to look at"),
        ("cross_modal", {"frame": 0, "inference": 0}, "expected one of them"),
        ("text_to_image", {"word": "plate"}, "word 'plate' is not in the task; its words are pick, bowl"),
        ("text_to_image", {"camera": "top"}, "camera 'top' does not exist"),
        ("image_to_text", {"camera": "empty"}, "showed no image"),
        ("rollout", {"frame": 0, "inference": 0}, "expected one of them"),
        (
            "rollout",
            {"layer": "all"},
            "layer 'all': rollout is of one layer's output, expected one of 0 to 2",
        ),
        ("rollout", {"layer": [1, 2]}, "rollout is of one layer's output"),
        ("rollout", {"layer": 3}, "expected one of 0 to 2"),
        ("rollout", {"query": "frame"}, "expected frame= with it"),
        ("rollout", {"query": 3}, "query 3 does not exist"),
        ("rollout", {"denoise_step": 1}, "denoise step 1 was not saved; saved are 0, 4"),
        ("flow", {}, "either frame=, or inference= and query="),
        ("flow", {"frame": 0, "inference": 0}, "either frame=, or inference= and query="),
        ("flow", {"inference": 0}, "expected one frame, or one inference and the number of a query"),
        ("flow", {"frame": [0]}, "expected one frame, or one inference and the number of a query"),
        ("flow", {"frame": 0, "query": "executed"}, "expected one frame, or one inference"),
        (
            "flow",
            {"frame": 0, "head": "all"},
            "one head, 'mean' or 'max'; got denoise step 4 and head 'all'",
        ),
        ("flow", {"frame": 0, "denoise_step": "all"}, "expected one denoise step"),
        ("flow", {"frame": 0, "min_share": 1}, "min_share: got 1, expected at least 0 and less than 1"),
        ("flow", {"frame": 0, "targets": "words"}, "targets 'words': expected 'groups', 'tokens' or a list"),
        ("flow", {"frame": 0, "targets": []}, "expected 'groups', 'tokens' or a list of keys"),
        ("flow", {"frame": 0, "targets": 3}, "expected 'groups', 'tokens' or a list of keys"),
        ("flow", {"frame": 0, "targets": [99]}, "targets: key 99 does not exist, expected 0 to"),
    ],
    ids=str,
)
def test_what_is_not_there_is_told(small, call, options, said):
    with pytest.raises(SelectionError) as caught:
        CALLS[call](small.episode.arrays, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", ["prefix_attention", "text_to_image", "image_to_text", "cross_modal"])
def test_prefix_attention_that_was_not_captured(tmp_path, call):
    data = write_small_store(tmp_path / "episode_00000.zarr", prefix_layers=[]).dataset
    with pytest.raises(
        SelectionError, match=r"not captured; record with --eval\.attention\.prefix_layers=all"
    ):
        CALLS[call](data)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (
            {"layers": [1, 2], "prefix_layers": [1, 2]},
            "to layer 2 needs all layers below; not saved are full maps of layer 0 and "
            "prefix maps of layer 0; record with --eval.attention.layers=all "
            "--eval.attention.prefix_layers=all",
        ),
        ({"prefix_layers": []}, "not saved are prefix maps of layer 0-1; record with"),
        ({"layers": []}, "needs full maps, and none were saved; record with --eval.attention.layers=all"),
        (
            {"policy": POLICY | {"n_prefix_layers": 16}},
            "layer l reads layer l of the language model, but the policy's have 3 and 16 layers",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["rollout", "flow"])
def test_layers_that_are_missing_between(tmp_path, call, saved, said):
    data = write_small_store(tmp_path / "episode_00000.zarr", **saved).arrays
    with pytest.raises(SelectionError) as caught:
        CALLS[call](data, frame=0)
    assert str(caught.value).startswith(f"{call} ")
    assert said in str(caught.value)


def test_text_without_labels(small):
    unknown = small.episode.dataset.copy()
    kinds = unknown["key_kind"].values
    unknown["key_kind"] = (("inference", "key"), np.where(np.isin(kinds, (2, 3, 4)), 6, kinds))
    with pytest.raises(SelectionError, match="words are not known"):
        text_to_image(unknown)
    shares = image_to_text(unknown, inference=0)
    assert set(shares["kind"].values.tolist()) == {"text"}
    unknown["key_kind"] = (("inference", "key"), np.where(np.arange(kinds.shape[1]) < 8, 1, 0) + 0 * kinds)
    with pytest.raises(SelectionError, match="no language tokens"):
        image_to_text(unknown)


def test_an_episode_without_inferences(tmp_path):
    data = write_small_store(tmp_path / "episode_00000.zarr", n_inferences=0, table=[]).dataset
    with pytest.raises(SelectionError, match="no inference to look at"):
        cross_modal(data)


# Token → the rows that are meant, of each of the two inferences of the small store.
ROWS_OF = {
    "last": ([17], [18]),
    "state": ([17], [17, 18]),
    "mean": ([*range(8), *range(12, 18)], [*range(8), *range(12, 19)]),
    "bowl": ([14, 15], [14, 15]),
    1: ([14, 15], [14, 15]),
    "PICK": ([13], [13]),
}


class TestAttentionFrom:
    """Against means of the raw rows; the small store's two prompts differ in length."""

    @pytest.mark.parametrize("token", list(ROWS_OF), ids=str)
    def test_is_the_mean_of_the_rows_that_are_meant(self, tmp_path, token):
        data = write_small_store(tmp_path / "episode_00000.zarr").arrays
        raw = data.prefix_attention.values.astype(np.float32)  # (inference, layer, head, query, key)
        found = attention_from(data, token, layer=1)
        expected = [raw[i, 1][:, rows].mean((0, 1)) for i, rows in enumerate(ROWS_OF[token])]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        assert found.dims == ("inference", "prefix_key")
        by_frame = attention_from(data, token, layer=1, frame=[0, 2])
        np.testing.assert_allclose(by_frame, [expected[TABLE[0][0]], expected[TABLE[2][0]]], rtol=1e-5)

    def test_a_state_token_in_the_prefix_is_the_last(self, tmp_path):
        plan = SyntheticPlan(prefix_layers=(0, 3), state_in_prompt=False, n_prefix_state=1)
        data = open_episode(write_planted_episode(tmp_path, plan)).arrays
        (state,) = (segment for segment in plan.layout.segments if segment.kind == "state")
        for token in ("last", "state"):
            attended = attention_from(data, token, inference=0, layer=0)
            assert int(attended.values.argmax()) == state.start  # everything else looks at itself
        assert attention_from(data, "last", inference=0).attrs["layer"] == "layer 3"

    @pytest.mark.parametrize(
        ("plan", "token", "message"),
        [
            (
                SyntheticPlan(prefix_layers=(0,)),
                "bowls",
                "word 'bowls' is not in the task",
            ),
            (
                SyntheticPlan(),
                "last",
                "prefix attention was not captured; record with --eval.attention.prefix",
            ),
            (
                SyntheticPlan(prefix_layers=(0,), state_in_prompt=False, n_suffix_state=1, n_queries=6),
                "state",
                "token 'state': this policy's prefix holds no state, expected last, mean or a word",
            ),
        ],
        ids=["no such word", "not captured", "no state"],
    )
    def test_what_is_not_there_is_refused(self, tmp_path, plan, token, message):
        data = open_episode(write_planted_episode(tmp_path, plan)).arrays
        with pytest.raises(SelectionError, match=message):
            attention_from(data, token)
