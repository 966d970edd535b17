"""What a recording does not have is absent from the explorer's answers: neither 0 nor false, nor another's.

Also what differs between families of policies: a state token that opens the suffix, layers that cannot see
the suffix, actions that are no token, prompts that were cut, episodes that differ in every size.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr
from test_explorer import client_of, edit_attributes, values
from test_explorer_export import Document, page  # noqa: F401  (a fixture)

from lerobot_attn import open_episode
from lerobot_attn.explorer.export import export_html
from lerobot_attn.explorer.facts import facts
from lerobot_attn.explorer.groups import groups
from lerobot_attn.explorer.ranges import ranges, ranges_of_steps
from lerobot_attn.explorer.tables import shares, timeline, tokens
from lerobot_attn.store.schema import BY_NAME
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

PLAN = SyntheticPlan(videos=False)


def set_array(path, name, array):
    """Put an array into a store, in place of the one that is there or beside the others."""
    shutil.rmtree(path / name, ignore_errors=True)
    zarr.create_array(path / name, data=array, dimension_names=BY_NAME[name].dims)
    metadata = json.loads((path / "zarr.json").read_text())
    arrays = metadata["consolidated_metadata"]["metadata"]
    arrays[name] = json.loads((path / name / "zarr.json").read_text())
    (path / "zarr.json").write_text(json.dumps(metadata))


def remove_arrays(path, *names):
    metadata = json.loads((path / "zarr.json").read_text())
    for name in names:
        shutil.rmtree(path / name)
        del metadata["consolidated_metadata"]["metadata"][name]
    (path / "zarr.json").write_text(json.dumps(metadata))


@pytest.fixture
def planted(tmp_path):
    return write_planted_episode(tmp_path / "run", PLAN)


def exported(path, tmp_path, page):  # noqa: F811
    return Document(export_html(open_episode(path), tmp_path / "page.html", page=page).path).data


@pytest.mark.parametrize("missing", [("reward",), ("success",), ("reward", "success"), ("state",)])
def test_what_a_loop_does_not_have_is_null(planted, tmp_path, page, missing):  # noqa: F811
    has_it = timeline(open_episode(planted))
    remove_arrays(planted, *missing)
    edit_attributes(planted, success=None)
    with client_of(tmp_path / "run") as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        assert (episode["n_frames"], episode["success"]) == (PLAN.n_frames, None)
        found = client.get(f"/api/episodes/{episode['id']}/latest/timeline").json()
    for name in ("reward", "success", "state"):
        assert found[name] == (None if name in missing else has_it[name]), name
    assert exported(planted, tmp_path, page)["timeline"] == found


def test_a_replays_predicted_actions_are_told(planted, tmp_path, page):  # noqa: F811
    assert facts(open_episode(planted))["replay"] is False
    assert timeline(open_episode(planted))["predicted_action"] is None
    predicted = np.arange(PLAN.n_frames * PLAN.n_actions, dtype=np.float32).reshape(PLAN.n_frames, -1)
    predicted[-1] = np.nan
    set_array(planted, "predicted_action", predicted)
    edit_attributes(planted, replay={"every": 3})
    found = timeline(open_episode(planted))
    assert facts(open_episode(planted))["replay"] is True
    assert found["predicted_action"] == [*predicted[:-1].tolist(), [None] * PLAN.n_actions]
    export = exported(planted, tmp_path, page)
    assert export["timeline"] == found
    assert "executed" not in export["facts"]["excerpt"]


def test_an_action_that_is_no_token_has_no_query(planted, tmp_path, page):  # noqa: F811
    queries = open_episode(planted).arrays["frame_query"].values.copy()
    queries[[0, 4, PLAN.n_frames - 1]] = -1
    set_array(planted, "frame_query", queries)
    found = timeline(open_episode(planted))
    assert found["frame_query"] == found["frame_action"] == queries.tolist()
    assert exported(planted, tmp_path, page)["timeline"] == found


@pytest.mark.parametrize("query", [PLAN.n_queries, 10**6, -7])
def test_a_query_that_does_not_exist_is_named_as_damage(planted, tmp_path, query):
    queries = open_episode(planted).arrays["frame_query"].values.copy()
    queries[1] = query
    set_array(planted, "frame_query", queries)
    with client_of(tmp_path / "run") as client:
        at = f"/api/episodes/attention:synthetic_0:{planted.stem}"
        answer = client.get(f"{at}/latest/timeline")
        assert answer.status_code == 422
        assert f"frame_query is {query} at frame 1" in answer.json()["error"]
        assert client.get(at).status_code == 200  # the rest is shown


@pytest.fixture
def with_state_token(tmp_path):
    """The first suffix token is a state token, as in pi0; every action comes one query later."""
    return write_planted_episode(tmp_path / "run", replace(PLAN, n_suffix_state=1))


def test_a_state_tokens_query_is_no_action(with_state_token):
    queries = open_episode(with_state_token).arrays["frame_query"].values.copy()
    queries[1] = 0
    set_array(with_state_token, "frame_query", queries)
    found = timeline(open_episode(with_state_token))
    assert (found["frame_query"][1], found["frame_action"][1]) == (-1, -1)
    assert (found["frame_query"][2], found["frame_action"][2]) == (queries[2], queries[2] - 1)


def test_a_state_token_in_the_suffix_is_no_action(with_state_token, tmp_path, page):  # noqa: F811
    episode = open_episode(with_state_token)
    found, table = facts(episode), timeline(episode)
    assert found["first_action_query"] == 1
    assert found["action_queries"] == [1, PLAN.n_queries]
    assert found["prefix_len"] == found["n_keys"] - PLAN.n_queries
    assert found["segments"][-2]["kind"] == "state"
    assert table["frame_query"] == [action + 1 for action in table["frame_action"]]
    assert table["frame_action"] == [frame % PLAN.n_executed for frame in range(PLAN.n_frames)]
    share = shares(episode, 0, layer="mean", denoise_step=-1, head="mean")
    np.testing.assert_allclose(np.sum(share["share"], axis=1), 1, atol=2e-3)
    # Full maps are averaged over the executed actions alone, not over the state token.
    remove_arrays(with_state_token, "suffix_attention_mean", "all_layer")
    with client_of(tmp_path / "run") as client:
        slab = values(
            client.get(f"/api/episodes/attention:synthetic_0:{episode.path.stem}/latest/inferences/1/means/2")
        )
    maps = episode.arrays["suffix_attention"].values[1, 2, :, :, 1 : 1 + PLAN.n_executed]
    np.testing.assert_array_equal(slab, maps.astype(np.float32).mean(axis=2).astype(np.float16))
    assert exported(with_state_token, tmp_path, page)["timeline"] == table


def test_a_prompt_that_was_cut_says_so(planted, tmp_path, page):  # noqa: F811
    episode = open_episode(planted)
    assert facts(episode)["prompt_truncated"] is tokens(episode, 0)["prompt_truncated"] is False
    cut = np.arange(episode.n_inferences) == 1
    set_array(planted, "prompt_truncated", cut)
    episode = open_episode(planted)
    assert facts(episode)["prompt_truncated"] is True
    assert [tokens(episode, i)["prompt_truncated"] for i in range(len(cut))] == cut.tolist()
    data = exported(planted, tmp_path, page)
    assert data["facts"]["prompt_truncated"] is True
    assert [found["prompt_truncated"] for found in data["tokens"]] == cut.tolist()


@pytest.mark.parametrize("errors", [{"observation.images.wrist": "no space left"}, {}, None, "odd", [1]])
def test_a_video_that_could_not_be_written_says_why(planted, errors):
    edit_attributes(planted, video_errors=errors)
    assert facts(open_episode(planted))["video_errors"] == (errors if isinstance(errors, dict) else {})


BLIND = (1, 3)


@pytest.fixture
def cross_attending(tmp_path):
    """Layers 1 and 3 do not see the suffix: its keys are absent there, and the rest sums to 1."""
    return write_planted_episode(tmp_path / "run", replace(PLAN, prefix_only_layers=BLIND))


def test_keys_that_a_layer_cannot_see_are_absent(cross_attending, tmp_path, page):  # noqa: F811
    episode = open_episode(cross_attending)
    n = episode.layout.prefix_len
    found = facts(episode)
    assert found["prefix_only_layers"] == list(BLIND)
    with client_of(tmp_path / "run") as client:
        at = f"/api/episodes/attention:synthetic_0:{episode.path.stem}/latest"
        slab = values(client.get(f"{at}/inferences/0/means/2"))
        full = values(client.get(f"{at}/inferences/0/maps/2/3"))
    assert np.isnan(slab[list(BLIND)][..., n:]).all()
    assert np.isfinite(slab[list(BLIND)][..., :n]).all()
    assert np.isfinite(slab[[0, 2]]).all()
    assert np.isnan(full[..., n:]).all()
    assert np.isfinite(full[..., :n]).all()
    data = exported(cross_attending, tmp_path, page)
    assert data["facts"]["prefix_only_layers"] == list(BLIND)
    assert facts(open_episode(write_planted_episode(tmp_path / "other", PLAN)))["prefix_only_layers"] == []


@pytest.mark.parametrize("layer", BLIND)
@pytest.mark.parametrize("head", [0, "mean", "max"])
def test_shares_of_what_a_layer_cannot_see_are_null(cross_attending, layer, head):
    array = zarr.open_array(cross_attending / "suffix_attention_mean", mode="r+")
    array[2] = np.nan
    episode = open_episode(cross_attending)
    found = shares(episode, 0, layer=layer, denoise_step=2, head=head)
    rows = dict(zip(found["modalities"], np.array(found["share"], float).T, strict=True))
    assert np.isnan(rows.pop("actions")).all()
    is_missing = np.arange(episode.n_inferences) == 2
    for name, row in rows.items():
        assert (np.isnan(row) == is_missing).all(), name
    if head != "max":
        np.testing.assert_allclose(sum(rows.values())[~is_missing], 1, atol=2e-3)
    effective = np.array(found["effective_tokens"], float)
    assert (np.isnan(effective) == is_missing).all()
    seen = shares(episode, 0, layer=2, denoise_step=2, head=head)
    actions = np.array(seen["share"], float)[:, seen["modalities"].index("actions")]
    assert (actions[~is_missing] > 0).all()


def test_ranges_of_layers_that_see_the_prefix_alone_are_of_their_patches(cross_attending):
    episode = open_episode(cross_attending)
    found = ranges(episode, 2)
    means = episode.arrays["suffix_attention_mean"].values[:, 2].astype(np.float64)
    for camera, rows in found["ranges"].items():
        segment = next(s for s in episode.layout.segments if s.name == camera)
        patches = means[..., segment.start : segment.stop]
        expected = np.percentile(patches, 99.9, axis=(0, 3))
        np.testing.assert_allclose(np.array(rows)[:-1, :-2], expected, rtol=1e-3)
        expected = np.percentile(patches.mean(axis=(1, 2)), 99.9)
        np.testing.assert_allclose(rows[-1][-2], expected, rtol=1e-3)


def test_every_denoise_step_has_its_ranges(planted):
    episode = open_episode(planted)
    found = ranges_of_steps(episode)
    assert found["denoise_steps"] == [0, 1, 2]
    for place, step in enumerate(found["denoise_steps"]):
        expected = ranges(episode, step)
        assert (found["layers"], found["heads"]) == (expected["layers"], expected["heads"])
        assert {name: rows[place] for name, rows in found["ranges"].items()} == expected["ranges"]


def test_one_range_for_the_episode_covers_every_cell_of_a_grid(planted):
    """The largest of the cells' own: no inference has a cell beyond it, but for what clipping leaves out."""
    episode = open_episode(planted)
    means = episode.arrays["suffix_attention_mean"].values.astype(np.float64)
    found = ranges_of_steps(episode)
    for camera, rows in found["ranges"].items():
        segment = next(s for s in episode.layout.segments if s.name == camera)
        patches = means[..., segment.start : segment.stop]
        n_layers, n_heads = patches.shape[2:4]
        table = np.array(rows)[:, :n_layers, :n_heads]
        for step, layer, head in np.ndindex(table.shape):
            end = table[step, layer, head]
            beyond = (patches[:, step, layer, head] > end * (1 + 1e-5)).mean()
            assert beyond <= 0.001 + 1 / patches[:, 0, 0, 0].size


OTHERS = {
    "denoise steps": {"n_denoise_steps": 5},
    "depth": {"n_layers": 6, "layers": (4, 5)},
    "heads": {"n_heads": 4},
    "chunk": {"n_queries": 8, "n_executed": 6},
    "grid": {"grid": (8, 8)},
    "state": {"n_state": 1},
    "prompt": {"n_text": 60},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_groups_of_policies_that_differ_have_labelled_rows(tmp_path, other):
    for index in range(4):
        changes = other if index % 2 else {}
        plan = SyntheticPlan(n_frames=6, videos=False, episode_index=index, success=index < 2, **changes)
        write_planted_episode(tmp_path, plan)
    with client_of(tmp_path) as client:
        assert len(client.get("/api/run").json()["episodes"]) == 4
        answer = client.get("/api/groups")
    assert answer.status_code == 200, answer.text
    labels = [row["label"] for row in answer.json()["rows"]]
    assert labels[:3] == ["image", "wrist", "task"]
    assert "padding" not in labels
    assert not any(label.isdigit() for label in labels)


def test_groups_whose_cameras_differ_say_so_in_a_line(tmp_path):
    for index, name in enumerate(("image", "other")):
        plan = SyntheticPlan(
            n_frames=3,
            videos=False,
            episode_index=index,
            success=index == 0,
            image_px={f"observation.images.{name}": (48, 48)},
        )
        write_planted_episode(tmp_path, plan)
    with client_of(tmp_path) as client:
        answer = client.get("/api/groups")
    if answer.status_code == 200:
        assert not any(row["label"].isdigit() for row in answer.json()["rows"])
    else:
        assert answer.status_code == 404
        assert "cameras differ" in answer.json()["error"]


def test_groups_without_success_say_what_they_lack(planted):
    edit_attributes(planted, success=None)
    from lerobot_attn.errors import SelectionError

    with pytest.raises(SelectionError, match="0 successes, 0 failures"):
        groups([open_episode(planted)])
