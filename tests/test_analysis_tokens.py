"""Words, state dimensions and modalities: prompts whose grouping is known, and planted shares found again."""

from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
import zarr
from test_analysis_select import N_ACTIONS, write_small_store

from lerobot_attn import open_episode
from lerobot_attn.analysis import (
    action_self_attention,
    attention,
    image_heatmap,
    modality_share,
    to_table,
    token_attention,
)
from lerobot_attn.analysis.tokens import TokenGroup, find_word, modalities, token_groups
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import Kind, Segment, TokenLayout
from lerobot_attn.synthetic import SyntheticPlan, planted_shares, planted_word, write_planted_episode

WORD_SHARE = 0.75
TASK, STATE, SCAFFOLD, TEXT, PADDING = Kind.TASK, Kind.STATE, Kind.SCAFFOLD, Kind.TEXT, Kind.PADDING
LETTERS = {"T": TASK, "S": STATE, ".": SCAFFOLD, "x": TEXT, "_": PADDING}
CLOSE = {"rtol": 2e-3, "atol": 1e-4}  # float16 shares summed over hundreds of keys


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Ten inferences, whose state numbers have one to three digits each."""
    plan = SyntheticPlan(n_frames=29, grid=(4, 4), videos=False, task="put the red cup by the bowl")
    episode = open_episode(write_planted_episode(tmp_path_factory.mktemp("planted"), plan))
    return SimpleNamespace(plan=plan, data=episode.arrays, episode=episode)


def prompts(*rows, names=("shoulder", "elbow"), first=2):
    """A dataset of language tokens alone; each row is [(piece, letter of its kind, ordinal), …]."""
    n = max(map(len, rows))
    layout = TokenLayout(
        (
            Segment("image", "image", 0, first),
            Segment("language", "language", first, first + n),
            Segment("action", "action", first + n, first + n + 1),
        ),
        first + n,
        (),
    )
    texts = np.full((len(rows), n), "", dtype=object)
    kinds = np.full((len(rows), layout.n_keys), Kind.PADDING, np.int8)
    kinds[:, :first], kinds[:, -1] = Kind.IMAGE, Kind.ACTION
    words, dims = np.full((len(rows), n), -1), np.full((len(rows), n), -1)
    for i, row in enumerate(rows):
        for slot, (piece, letter, *ordinal) in enumerate(row):
            texts[i, slot] = piece
            kinds[i, first + slot] = LETTERS[letter]
            if ordinal:
                (words if letter == "T" else dims)[i, slot] = ordinal[0]
    arrays = {"text_word": words, "text_state_dim": dims, "token_text": texts}
    data = xr.Dataset({name: (("inference", "text"), values) for name, values in arrays.items()})
    data["key_kind"] = (("inference", "key"), kinds)
    data.attrs["layout"] = layout.to_dict()
    return data.assign_coords(state_dim=list(names)) if names else data


HEAD = [("<bos>", "."), ("Task", "."), (":", ".")]


@pytest.mark.parametrize(
    ("rows", "groups", "keys"),
    [
        pytest.param(
            [[*HEAD, (" pi", "T", 0), ("ck", "T", 0), (" up", "T", 1), (";\n", ".")]],
            [(TASK, 0, "pick"), (TASK, 1, "up"), (SCAFFOLD, -1, "<bos>Task:"), (SCAFFOLD, -1, "(blanks)")],
            [[2, 2, 2, 0, 0, 1, 3]],
            id="pieces of a word are merged",
        ),
        pytest.param(
            [[(" the", "T", 0), (" cup", "T", 1), (" by", "T", 2), (" the", "T", 3), (" The", "T", 4)]],
            [(TASK, 0, "the"), (TASK, 1, "cup"), (TASK, 2, "by"), (TASK, 3, "the"), (TASK, 4, "The")],
            [[0, 1, 2, 3, 4]],
            id="a repeated word stays apart",
        ),
        pytest.param(
            [
                [(" up", "T", 0), (" ", "."), ("1", "S", 0), ("2", "S", 0), (" ", "."), ("7", "S", 1)],
                [(" up", "T", 0), (" ", "."), ("9", "S", 0), (" ", "."), ("5", "S", 1), ("", "_")],
            ],
            [(TASK, 0, "up"), (STATE, 0, "shoulder"), (STATE, 1, "elbow"), (SCAFFOLD, -1, "(blanks)")],
            [[0, 3, 1, 1, 3, 2], [0, 3, 1, 3, 2, -1]],
            id="numbers of other lengths are the same dimension",
        ),
        pytest.param(
            [[("Task:", "."), (" up", "T", 0), (" State", "."), (":", "."), ("8", "S", 3), ("Task:", ".")]],
            [(TASK, 0, "up"), (STATE, 3, "state 3"), (SCAFFOLD, -1, "Task:"), (SCAFFOLD, -1, "State:")],
            [[2, 0, 3, 3, 1, 2]],
            id="template of the same text is one, a dimension without a name has its number",
        ),
        pytest.param(
            [[(" a", "x"), (" a", "x"), ("", "_")], [(" a", "x"), (" b", "x"), ("c", "x")]],
            [(TEXT, 0, "a"), (TEXT, 1, "a"), (TEXT, 1, "b"), (TEXT, 2, "c")],
            [[0, 1, -1], [0, 2, 3]],
            id="tokens of an unknown prompt are a group each",
        ),
        pytest.param(
            [[("", "_"), ("", "_"), ("Task", "."), (":", "."), (" up", "T", 0)]],
            [(TASK, 0, "up"), (SCAFFOLD, -1, "Task:")],
            [[-1, -1, 1, 1, 0]],
            id="padding on the left",
        ),
        pytest.param([[("", "_")]], [], [[-1]], id="nothing but padding"),
    ],
)
def test_token_groups(rows, groups, keys):
    found, group_of_key = token_groups(prompts(*rows))
    assert found == [TokenGroup(*group) for group in groups]
    assert group_of_key.dtype == np.int16
    assert group_of_key[:, 2:-1].tolist() == keys
    # State tokens outside the prompt and actions are no language.
    assert (group_of_key[:, [0, 1, -1]] == -1).all()


def test_state_dimensions_without_names():
    groups, _ = token_groups(prompts([("1", "S", 0), ("2", "S", 1)], names=None))
    assert [group.label for group in groups] == ["state 0", "state 1"]


@pytest.mark.parametrize(
    ("word", "number"), [("red", 2), ("RED", 2), ("the", 1), (0, 0), (6, 6), ("5", 5), (np.int64(3), 3)]
)
def test_find_word(planted, word, number):
    assert find_word(planted.data, word) == number


@pytest.mark.parametrize("word", ["blue", "re", "", 7, -1, "7", "-1", "²"])
def test_find_word_says_which_words_there_are(planted, word):
    with pytest.raises(SelectionError, match="is not in the task; its words are put, the, red, cup, by, the"):
        find_word(planted.data, word)


def test_find_word_takes_a_number_in_the_task_for_a_word():
    data = prompts([(" put", "T", 0), (" 0", "T", 1)])
    assert find_word(data, "0") == 1
    assert find_word(data, 0) == 0


def test_find_word_returns_the_number_of_the_word_where_one_is_missing():
    assert find_word(prompts([(" put", "T", 0), (" cup", "T", 2)]), "cup") == 2


def test_find_word_without_labels():
    with pytest.raises(SelectionError, match="its words are unknown"):
        find_word(prompts([(" put", "x")]), "put")


def expected_tokens(plan, data, frame):
    """What was planted on each word and on each number, from the plan and the state's digits alone."""
    words = plan.task.split()
    shares = planted_shares(plan, frame)
    expected = np.full(len(words), shares["task"] * (1 - WORD_SHARE) / (len(words) - 1))
    expected[planted_word(plan, frame)] = shares["task"] * WORD_SHARE
    digits = np.array([len(str((37 * dim + 13 * (frame // 3)) % 256)) for dim in range(plan.n_state)])
    return expected, shares["state"] * digits / digits.sum()


def check_tokens(plan, data, found, frame):
    words, numbers = expected_tokens(plan, data, frame)
    np.testing.assert_allclose(found[np.asarray(found.kind) == "task"], words, **CLOSE)
    np.testing.assert_allclose(found[np.asarray(found.kind) == "state"], numbers, **CLOSE)
    template = found[np.asarray(found.kind) == "template"]
    by_label = dict(zip(template.label.values.tolist(), template.values.tolist(), strict=True))
    assert by_label.pop("<bos>Task:") == pytest.approx(0.05, rel=2e-3)
    assert set(by_label.values()) == {0}


@pytest.mark.parametrize("dask", [True, False])
def test_token_attention_finds_the_planted_word(planted, dask):
    plan, data = planted.plan, planted.episode.dataset if dask else planted.data
    digits = (data.key_kind.values == Kind.STATE).sum(axis=1)
    assert len(set(digits.tolist())) > 2  # the number of state tokens changes
    for frame in (0, 5, 28):
        found = token_attention(data, frame=frame, head=1)
        assert found.dims == ("token",)
        check_tokens(plan, data, found.compute(), frame)
    frames = [20, 3, 3, 28]
    found = token_attention(data, frame=frames, layer=[2, 3], denoise_step="all").compute()
    assert found.dims == ("frame", "denoise_step", "layer", "token")
    assert found.frame.values.tolist() == frames
    for position, frame in enumerate(frames):
        check_tokens(plan, data, found[position, 1, 0], frame)
    assert found.label.values[:8].tolist() == [*plan.task.split(), "joint_0"]
    assert found.ordinal.values[:8].tolist() == [*range(7), 0]
    assert found.attrs["source"] == "suffix_attention"


def test_token_attention_of_inferences(planted):
    plan = planted.plan
    found = token_attention(planted.data, inference=[8, 1, 1])
    assert found.dims == ("inference", "token")
    for position, inference in enumerate((8, 1, 1)):
        both = [expected_tokens(plan, planted.data, 3 * inference + i) for i in range(3)]
        words, numbers = (np.mean(values, axis=0) for values in zip(*both, strict=True))
        np.testing.assert_allclose(found[position][found.kind == "task"], words, **CLOSE)
        np.testing.assert_allclose(found[position][found.kind == "state"], numbers, **CLOSE)
    np.testing.assert_allclose(token_attention(planted.data, inference=1), found[1])


def test_tokens_of_the_language_add_up_to_the_modalities(planted):
    tokens = token_attention(planted.data, frame="all", head="all")
    shares = modality_share(planted.data, frame="all", head="all")
    for kind in ("task", "state", "template"):
        summed = tokens.isel(token=np.flatnonzero(tokens.kind == kind)).sum("token")
        np.testing.assert_allclose(summed, shares.sel(modality=kind), rtol=1e-5)


def test_modality_share_is_what_was_planted(planted):
    plan = planted.plan
    found = modality_share(planted.data, frame="all", head="all")
    assert found.dims == ("frame", "head", "modality")
    names = [*plan.image_px, "task", "state", "template", "actions", "padding"]
    assert found.modality.values.tolist() == modalities(planted.data) == names
    for frame in range(plan.n_frames):
        shares = planted_shares(plan, frame)
        shares = [*(shares[name] for name in names[:5]), shares["action"], 0]
        for head in range(2):
            np.testing.assert_allclose(found[frame, head], shares, **CLOSE)
    np.testing.assert_allclose(found.sum("modality"), 1, atol=planted.episode.row_sum_tolerance())
    assert (found.sel(modality="padding") == 0).all()


@pytest.mark.parametrize(
    "choice",
    [
        {"frame": 4},
        {"frame": [8, 2], "layer": [2, 3]},
        {"inference": 3, "query": "all"},
        {"inference": [3, 0]},
        {"denoise_step": "all", "head": [1], "exclude": [0, 1]},
        {"frame": []},
    ],
    ids=str,
)
def test_modalities_sum_to_1_and_dask_agrees(planted, choice):
    found = modality_share(planted.data, **choice)
    assert found.dims == (*attention(planted.data, **choice).dims[:-1], "modality")
    np.testing.assert_allclose(found.sum("modality"), 1, atol=planted.episode.row_sum_tolerance())
    lazy = modality_share(planted.episode.dataset, **choice)
    assert (lazy.chunks is not None) == bool(lazy.size)
    xr.testing.assert_allclose(lazy.compute(), found, rtol=1e-6)
    assert lazy.attrs == found.attrs


def test_a_camera_s_share_is_the_sum_of_its_heatmap(planted):
    shares = modality_share(planted.data, frame="all", denoise_step="all")
    for camera in planted.plan.image_px:
        heat = image_heatmap(planted.data, camera, frame="all", denoise_step="all")
        expected = heat.sum(("grid_y", "grid_x"))
        np.testing.assert_allclose(shares.sel(modality=camera), expected, rtol=1e-5)


@pytest.mark.parametrize("data", ["dataset", "arrays"])
def test_an_episode_without_inferences(tmp_path, data):
    plan = SyntheticPlan(n_frames=0, videos=False, grid=(4, 4))
    dataset = getattr(open_episode(write_planted_episode(tmp_path, plan)), data)
    assert modality_share(dataset).values.shape == (0, 2)
    assert modality_share(dataset, frame="all").sizes["frame"] == 0
    assert action_self_attention(dataset).values.shape == (0, 5, 5)
    assert len(to_table(modality_share(dataset))) == 0
    with pytest.raises(SelectionError, match="got no tokens of language or state"):
        token_attention(dataset)


def test_each_planted_action_attends_to_itself(planted):
    for choice, rows in [({"frame": [7, 2]}, "frame"), ({}, "inference")]:
        found = action_self_attention(planted.data, **choice)
        assert found.dims == (rows, "query", "action_key")
        expected = np.broadcast_to(0.1 * np.eye(5), found.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        within = action_self_attention(planted.data, within=True, **choice)
        np.testing.assert_allclose(within, np.broadcast_to(np.eye(5), found.shape), rtol=1e-6)
        assert within.attrs["units"] == "share of attention on actions"
    assert found["query"].values.tolist() == found.action_key.values.tolist() == list(range(5))
    assert not [name for name in found.coords if name.startswith("key_")]


@pytest.mark.parametrize("state_token", [False, True])
def test_rows_and_columns_of_action_self_attention_are_the_same_actions(tmp_path, state_token):
    episode = write_small_store(tmp_path / "episode_00000.zarr", state_token=state_token)
    raw = zarr.open_group(episode.path, mode="r")["suffix_attention"][...].astype(np.float32)
    first, start = int(state_token), 10 + int(state_token)
    found = action_self_attention(episode.arrays, frame=4, layer=16, denoise_step=0, head=5)
    assert found.shape == (N_ACTIONS, N_ACTIONS)
    np.testing.assert_array_equal(found, raw[1, 0, 0, 1, first:, start:])
    within = action_self_attention(episode.arrays, within=True, frame=4, query=3)  # the query is always all
    np.testing.assert_allclose(within.sum("action_key"), 1, rtol=1e-6)


@pytest.mark.parametrize(("state_token", "state_keys"), [(False, [8]), (True, [8, 10])])
def test_a_state_token_of_the_suffix_counts_as_state(tmp_path, state_token, state_keys):
    episode = write_small_store(tmp_path / "episode_00000.zarr", state_token=state_token)
    whole = attention(episode.arrays, frame="all").values
    found = modality_share(episode.arrays, frame="all")
    np.testing.assert_allclose(found.sel(modality="state"), whole[:, state_keys].sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.sel(modality="actions"), whole[:, -5:].sum(axis=1), rtol=1e-5)


def test_an_episode_without_named_state(tmp_path):
    episode = write_small_store(tmp_path / "episode_00000.zarr", named_state=False)
    found = token_attention(episode.arrays, frame=0)
    assert found.label.values.tolist() == ["pick", "state 0", "Task:", "State:"]


@pytest.mark.parametrize("mean_layers", [[], [17]])
def test_action_self_attention_needs_full_maps(tmp_path, mean_layers):
    episode = write_small_store(tmp_path / "episode_00000.zarr", layers=[], mean_layers=mean_layers)
    with pytest.raises(SelectionError, match=r"needs full maps, and none were saved; record with layers="):
        action_self_attention(episode.arrays)


def test_to_table_has_a_row_for_each_value(planted):
    shares = modality_share(planted.data, frame=[4, 0], layer=[3])
    table = to_table(shares)
    assert len(table) == 14
    assert {"frame", "layer", "modality", "share"} <= set(table.columns)
    row = table[(table.frame == 0) & (table.modality == "task")]
    assert row.share.item() == pytest.approx(shares.sel(frame=0, modality="task").item())
    tokens = to_table(token_attention(planted.data, frame=3), value="attention")
    assert tokens.label.tolist()[:7] == planted.plan.task.split()
    assert {"kind", "ordinal", "attention"} <= set(tokens.columns)


def test_to_table_of_a_single_value(planted):
    table = to_table(modality_share(planted.data, frame=2).sel(modality="state"))
    assert len(table) == 1
    assert (table.frame.item(), table.modality.item()) == (2, "state")
    assert table.share.item() == pytest.approx(0.1, rel=2e-3)
