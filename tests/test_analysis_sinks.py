"""Attention sinks: planted ones are found, and nothing that follows the input is."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_analysis_prefix import HEADS, STEPS, write_small_store

from lerobot_attn import open_episode
from lerobot_attn.analysis import attention
from lerobot_attn.analysis.select import layout_of
from lerobot_attn.analysis.sinks import attention_sinks
from lerobot_attn.errors import SelectionError
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

N_INFERENCES = 10
BOS, PATCH, WANDERING, MISSED, LATER_STATE = 12, 6, (0, 1, 2, 3), 13, 18
COLUMNS = ["key", "kind", "camera", "row", "column", "label", "mean_share", "low_share", "times_uniform"]


def planted_shares(inference, n_keys=22):
    """Share of each key: two sinks, one patch that follows the input, a token that is missed now and then."""
    shares = np.zeros(n_keys)
    shares[BOS] = 0.30
    shares[PATCH] = 0.20 + 0.01 * (inference % 2)
    shares[WANDERING[inference % 4]] = 0.25
    shares[MISSED] = 0.0 if inference < 2 else 0.125
    shares[LATER_STATE] = 0.09 if inference % 2 else 0.0  # padding in every other prompt
    shares[19] = 1 - shares.sum()
    return shares


def write_sinks(path, *, n_inferences=N_INFERENCES, share=planted_shares, **options):
    inferences = iter(range(n_inferences))

    def maps(rng, kinds, layers, prefix_layers):
        row = share(next(inferences), len(kinds)).astype(np.float16)
        n_queries = len(kinds) - 19
        return np.broadcast_to(row, (len(STEPS), len(layers), len(HEADS), n_queries, len(kinds))), None

    return write_small_store(
        path, maps=maps, prefix_layers=[], n_inferences=n_inferences, table=[(0, 0)], **options
    )


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sinks")
    one = write_sinks(folder / "episode_00000.zarr")

    def without_the_patch(inference, n_keys):
        shares = planted_shares(inference, n_keys)
        shares[0] += shares[PATCH]
        shares[PATCH] = 0
        return shares

    other = write_sinks(folder / "episode_00001.zarr", share=without_the_patch)
    return SimpleNamespace(one=one, other=other)


@pytest.fixture
def data(episodes):
    return episodes.one.arrays


@pytest.mark.parametrize("kind", ["dataset", "arrays"])
def test_planted_sinks_are_found(episodes, kind):
    found = attention_sinks(getattr(episodes.one, kind), times_uniform=2)
    assert found.columns.tolist() == COLUMNS
    assert found["key"].tolist() == [BOS, PATCH]
    assert found["kind"].tolist() == ["template", "image"]
    assert found["camera"].tolist() == ["", "observation.images.wrist"]
    assert found["row"].tolist() == [-1, 1]
    assert found["column"].tolist() == [-1, 0]
    assert found["label"].tolist() == ["Task:", "wrist row 1, column 0"]
    np.testing.assert_allclose(found["mean_share"], [0.30, 0.205], atol=2e-4)
    np.testing.assert_allclose(found["low_share"], [0.30, 0.20], atol=2e-4)
    # Prompts have 17 and 18 unmasked keys in turn.
    np.testing.assert_allclose(found["times_uniform"], [0.30 * 17.5, 0.2 * 8.5 + 0.21 * 9], atol=4e-3)
    assert found.attrs == {"n_inferences": N_INFERENCES, "n_episodes": 1}


def test_what_is_found_can_be_left_out(data):
    found = attention_sinks(data, times_uniform=2)
    rest = attention(data, inference=0, exclude=found["key"].tolist())
    assert float(rest[BOS]) == float(rest[PATCH]) == 0
    assert float(rest.sum()) == pytest.approx(1, abs=1e-5)


def test_a_token_that_is_missed_in_some_inferences_is_no_sink(data):
    often = {"times_uniform": 0, "minimum": 0.1}
    assert MISSED not in attention_sinks(data, **often)["key"].tolist()
    assert MISSED not in attention_sinks(data, **often, quantile=0.2)["key"].tolist()
    assert MISSED in attention_sinks(data, **often, quantile=0.25)["key"].tolist()
    everything = attention_sinks(data, minimum=0, times_uniform=0)
    assert everything["mean_share"].is_monotonic_decreasing
    assert set(everything["key"]) == set(range(22)) - {8, 9, 10, 11, LATER_STATE}, "all but padding"


def test_a_token_whose_kind_changes_is_no_sink(data):
    """The key's share is high whenever it is no padding; another inference has another token there."""
    odd = data.isel(inference=[1, 3, 5, 7])
    options = {"times_uniform": 0, "minimum": 0.05}
    assert LATER_STATE in attention_sinks(odd, **options)["key"].tolist()
    both = data.isel(inference=[1, 3, 5, 7, 0])
    assert LATER_STATE not in attention_sinks(both, **options, quantile=0.5)["key"].tolist()


def test_several_episodes_tell_a_sink_from_a_static_scene(episodes):
    both = [episodes.one.dataset, episodes.other.arrays]
    found = attention_sinks((dataset for dataset in both), times_uniform=2)
    assert found["key"].tolist() == [BOS]
    assert found.attrs == {"n_inferences": 2 * N_INFERENCES, "n_episodes": 2}


def test_the_label_of_a_text_that_changes(data):
    found = attention_sinks(data, minimum=0, times_uniform=0).set_index("key")["label"]
    assert found[17] == "(changes)", "12 in one prompt, 7 in the other"
    assert (found[13], found[16], found[19], found[21]) == ("pick", ",", "action 0", "action 2")


def test_the_label_of_a_blank_and_of_a_state_token(tmp_path):
    data = write_sinks(
        tmp_path / "episode_00000.zarr",
        n_inferences=3,
        share=lambda inference, n: np.eye(n)[19],
        state_token=True,
    ).dataset.copy()
    assert attention_sinks(data)[["key", "kind", "label"]].values.tolist() == [[19, "state", "state"]]
    texts = data["token_text"].values.copy()
    texts[:, 4] = " "
    data["token_text"] = (("inference", "text"), texts)
    labels = attention_sinks(data, minimum=0, times_uniform=0).set_index("key")["label"]
    assert labels[16] == "' '"


def test_the_threshold_is_the_larger_of_two(data):
    assert attention_sinks(data, minimum=0.25, times_uniform=0)["key"].tolist() == [BOS]
    assert attention_sinks(data, minimum=0, times_uniform=5)["key"].tolist() == [BOS]
    assert attention_sinks(data, minimum=0.25, times_uniform=8)["key"].tolist() == []
    assert attention_sinks(data, minimum=0.31, times_uniform=0).empty


def test_shares_are_means_over_the_chosen(tmp_path):
    def maps(rng, kinds, layers, prefix_layers):
        rows = np.zeros((len(STEPS), len(layers), len(HEADS), 3, len(kinds)), np.float16)
        rows[..., 19] = 1
        rows[1, 2, 1, 1] = np.eye(len(kinds))[BOS]  # one step, layer, head and query
        return rows, None

    data = write_small_store(
        tmp_path / "episode_00000.zarr", maps=maps, prefix_layers=[], table=[(0, 0)]
    ).arrays

    def share(**where):
        found = attention_sinks(data, minimum=0, times_uniform=0, **where).set_index("key")
        return float(found["mean_share"][BOS])

    assert share() == pytest.approx(1 / (2 * 3 * 2 * 2), abs=1e-6), "executed are two of three queries"
    assert share(layer=2) == pytest.approx(1 / 8, abs=1e-6)
    assert share(layer=[1, 2], denoise_step=4) == pytest.approx(1 / 8, abs=1e-6)
    assert share(layer=2, denoise_step=4, head=5, query=1) == 1
    assert share(layer=2, denoise_step=4, head="all", query=1) == 0.5
    assert share(layer=0) == 0


def test_planted_episode(tmp_path):
    """Begin-of-sequence, and the executed actions, which attend to themselves."""
    plan = SyntheticPlan(grid=(16, 16), n_frames=12, n_denoise_steps=1, videos=False)
    data = open_episode(write_planted_episode(tmp_path, plan)).dataset
    found = attention_sinks(data).set_index("label")
    assert set(found.index) == {"<bos>", "action 0", "action 1", "action 2"}
    assert found.loc["<bos>", "key"] == plan.layout.language.start
    assert found.loc["<bos>", "mean_share"] == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"minimum": -0.1}, "minimum: got -0.1, expected 0 to 1"),
        ({"minimum": float("nan")}, "minimum: got nan, expected 0 to 1"),
        ({"quantile": 1.5}, "quantile: got 1.5, expected 0 to 1"),
        ({"times_uniform": -1}, "times_uniform: got -1, expected 0 or more"),
        ({"head": "max"}, "head='max'"),
        ({"layer": 7}, "layer 7 was not saved"),
        ({"query": "frame"}, "expected frame= with it"),
    ],
    ids=str,
)
def test_a_wrong_choice_is_told(data, options, said):
    with pytest.raises(SelectionError) as caught:
        attention_sinks(data, **options)
    assert said in str(caught.value)


def test_one_inference_shows_nothing(data):
    with pytest.raises(SelectionError, match="got 1 inferences of 1 episodes, expected two at least"):
        attention_sinks(data.isel(inference=[0]))
    with pytest.raises(SelectionError, match="got 0 inferences of 0 episodes"):
        attention_sinks([])


def test_episodes_of_other_layouts_do_not_mix(episodes):
    data = episodes.one.dataset
    layout = layout_of(data).to_dict()
    layout["cameras"][0]["name"] = "observation.images.other"
    with pytest.raises(SelectionError, match="token layouts differ"):
        attention_sinks([data, data.assign_attrs(layout=layout)])


def test_one_inference_is_read_at_a_time(episodes, monkeypatch):
    """Also of an episode that is larger than memory."""
    seen = []

    def spy(dataset, **where):
        seen.append(where["inference"])
        return attention(dataset, **where)

    monkeypatch.setattr("lerobot_attn.analysis.sinks.attention", spy)
    attention_sinks(episodes.one.dataset)
    assert seen == list(range(N_INFERENCES))
