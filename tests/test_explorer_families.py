"""The explorer on episodes of every family: what it answers is what the store and `analysis` have."""

import dataclasses

import numpy as np
import pytest
from test_explorer import client_of, values
from test_explorer_export import Document, means_of, page  # noqa: F401  (a fixture)

from lerobot_attn import analysis, open_episode
from lerobot_attn.analysis.select import stored_layers
from lerobot_attn.explorer.export import ExportSettings, export_html
from lerobot_attn.explorer.facts import facts
from lerobot_attn.explorer.ranges import ranges, ranges_of_steps
from lerobot_attn.explorer.slabs import map_slab, mean_slab, prefix_slab
from lerobot_attn.explorer.tables import action_chunk, shares, timeline, tokens
from lerobot_attn.synthetic import FAMILIES, planted_shares, planted_word, write_planted_episode


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A family's plan, and its episode."""
    plan = dataclasses.replace(FAMILIES[request.param], videos=False)
    return plan, open_episode(write_planted_episode(tmp_path_factory.mktemp("family"), plan))


def array_of(slab):
    return np.frombuffer(slab.body, "<f2").reshape(slab.shape).astype(np.float32)


def rows_of(found):
    """Return modality → (inference) shares, NaN where there is none."""
    return dict(zip(found["modalities"], np.array(found["share"], float).T, strict=True))


def test_every_request_is_answered(family, tmp_path):
    plan, episode = family
    with client_of(episode.path.parents[2]) as client:
        (row,) = client.get("/api/run").json()["episodes"]
        assert row["n_frames"] == plan.n_frames
        at = f"/api/episodes/{row['id']}"
        found = client.get(at).json()
        at = f"{at}/{found['version']}"
        step = found["denoise_steps"][-1]
        paths = ["/timeline", "/shares", "/ranges", f"/ranges/{step}"]
        paths += [f"/inferences/1/{what}" for what in ("tokens", "actions", f"means/{step}")]
        paths += [f"/inferences/1/maps/{step}/{layer}" for layer in found["layers"]]
        paths += [f"/inferences/1/prefix/{layer}/3" for layer in found["prefix_layers"]]
        for path in paths:
            answer = client.get(at + path)
            assert answer.status_code == 200, (path, answer.text)
        slab = values(client.get(f"{at}/inferences/1/means/{step}"))
        assert slab.shape == (len(found["mean_layers"]), len(found["heads"]), found["n_keys"])


def test_facts_and_timeline_are_the_stores(family):
    plan, episode = family
    found, table = facts(episode), timeline(episode)
    layout, data = episode.layout, episode.arrays
    assert found["prefix_only_layers"] == sorted(plan.prefix_only_layers)
    assert found["prefix_len"] == layout.prefix_len
    first, stop = found["action_queries"]
    assert (first, stop - first) == (plan.first_action_query, plan.n_chunk)
    assert {segment["kind"] for segment in found["segments"]} <= {
        "image",
        "language",
        "state",
        "action",
        "special",
        "padding",
    }
    assert found["prompt_truncated"] == plan.cut_prompt
    assert (table["reward"] is None) == (not plan.has_reward)
    assert (table["success"] is None) == (not plan.has_success)
    expected = [
        -1 if frame in plan.frames_without_query else frame % plan.n_executed
        for frame in range(plan.n_frames)
    ]
    assert table["frame_action"] == expected
    assert table["frame_query"] == data["frame_query"].values.tolist()
    # The chunk's row of a frame's action is that action's number, wherever the actions' queries begin.
    for frame, action in enumerate(table["frame_action"]):
        if action < 0:
            continue
        inference = table["frame_inference"][frame]
        chunk = action_chunk(episode, inference)["action"]
        row = action if len(chunk) == plan.n_chunk else layout.query_of_action(action)
        np.testing.assert_allclose(chunk[row], table["action"][frame], rtol=1e-4)


def test_slabs_are_the_stores(family):
    plan, episode = family
    data = episode.arrays
    found = facts(episode)
    full, stored = stored_layers(data)
    slab = array_of(mean_slab(episode, 1, 2))
    for place, layer in enumerate(found["mean_layers"]):
        if layer in stored:
            expected = data["suffix_attention_mean"].sel(all_layer=layer, denoise_step=2).values[1]
        else:
            maps = data["suffix_attention"].sel(layer=layer, denoise_step=2).values[1]
            expected = maps[:, plan.executed_queries].astype(np.float32).mean(axis=1).astype(np.float16)
        np.testing.assert_array_equal(slab[place], expected)
        is_blind = layer in plan.prefix_only_layers
        assert np.isnan(slab[place][:, found["prefix_len"] :]).all() == is_blind
        assert np.isfinite(slab[place][:, : found["prefix_len"]]).all()
        np.testing.assert_allclose(np.nansum(slab[place], axis=-1), 1, atol=3e-3)
    for layer in full:
        found_map = array_of(map_slab(episode, 1, 2, layer))
        np.testing.assert_array_equal(
            found_map, data["suffix_attention"].sel(layer=layer, denoise_step=2).values[1]
        )
    for layer in found["prefix_layers"]:
        assert array_of(prefix_slab(episode, 1, layer, 3)).shape == (plan.n_heads, found["prefix_len"])


def test_shares_are_what_was_planted(family):
    plan, episode = family
    for layer in facts(episode)["mean_layers"]:
        found = shares(episode, 0, layer=layer, denoise_step=-1, head="mean")
        rows = rows_of(found)
        is_blind = layer in plan.prefix_only_layers
        for inference in range(episode.n_inferences):
            frames = range(inference * plan.n_executed, (inference + 1) * plan.n_executed)
            each = [planted_shares(plan, min(frame, plan.n_frames - 1), layer) for frame in frames]
            for name, row in rows.items():
                if name == "padding":
                    assert row[inference] == 0
                    continue
                planted = [of.get({"actions": "action"}.get(name, name)) for of in each]
                if name == "actions" and is_blind:
                    assert np.isnan(row[inference])
                else:
                    assert row[inference] == pytest.approx(np.mean(planted), abs=3e-3), (layer, name)
        total = np.nansum(list(rows.values()), axis=0)
        np.testing.assert_allclose(total, 1, atol=3e-3)
        assert None not in found["effective_tokens"]


def test_shares_of_all_layers_count_a_layer_only_where_a_key_exists(family):
    _, episode = family
    layers = facts(episode)["mean_layers"]
    whole = rows_of(shares(episode, 0, layer="mean", denoise_step=-1, head="mean"))
    each = {layer: rows_of(shares(episode, 0, layer=layer, denoise_step=-1, head="mean")) for layer in layers}
    for name, row in whole.items():
        of_layers = np.array([rows[name] for rows in each.values()])
        np.testing.assert_allclose(row, np.nanmean(of_layers, axis=0), rtol=1e-3, err_msg=name)


def test_words_are_those_of_the_task(family):
    plan, episode = family
    for inference in range(episode.n_inferences):
        found = tokens(episode, inference)
        words = [group["label"] for group in found["groups"] if group["kind"] == "task"]
        assert plan.task.split()[: len(words)] == words
        assert (words == plan.task.split()) or plan.cut_prompt
        assert found["prompt_truncated"] == plan.cut_prompt
        assert {group["kind"] for group in found["groups"]} <= {
            "task",
            "state",
            "template",
            "text",
            "special",
        }
        assert len(found["group_of_key"]) == episode.layout.n_keys
        if plan.cut_prompt:
            continue
        slab = array_of(mean_slab(episode, inference, 2))[-1].mean(axis=0)
        group_of_key = np.array(found["group_of_key"])
        of_word = [
            slab[group_of_key == number].sum()
            for number, group in enumerate(found["groups"])
            if group["kind"] == "task"
        ]
        frames = range(inference * plan.n_executed, (inference + 1) * plan.n_executed)
        assert np.argmax(of_word) in {planted_word(plan, frame) for frame in frames}


def test_a_state_token_is_a_group_of_its_own(family):
    plan, episode = family
    found = tokens(episode, 0)
    groups = {group["label"]: number for number, group in enumerate(found["groups"])}
    assert ("state token" in groups) == bool(plan.n_prefix_state + plan.n_suffix_state)
    if "state token" in groups:
        number = groups["state token"]
        assert found["groups"][number] == {"kind": "state", "ordinal": -1, "label": "state token"}
        (segment,) = (segment for segment in episode.layout.segments if segment.kind == "state")
        keys = [key for key, group in enumerate(found["group_of_key"]) if group == number]
        assert keys == [*range(segment.start, segment.stop)]


def test_ranges_are_the_analysis(family):
    _, episode = family
    found, every = ranges(episode, 1), ranges_of_steps(episode)
    assert list(found["ranges"]) == analysis.camera_names(episode.arrays)
    means = np.stack([array_of(mean_slab(episode, i, 1)) for i in range(episode.n_inferences)])
    for camera, rows in found["ranges"].items():
        _, _, segment = analysis.camera_geometry(episode.arrays, camera)
        patches = means[..., segment.start : segment.stop].astype(np.float64)
        expected = np.percentile(patches, 99.9, axis=(0, 3))
        np.testing.assert_allclose(np.array(rows)[:-1, :-2], expected, rtol=2e-3)
        np.testing.assert_allclose(rows[-1][-2], np.percentile(patches.mean(axis=(1, 2)), 99.9), rtol=2e-3)
        assert every["ranges"][camera][1] == rows


def test_an_export_holds_the_same(family, tmp_path, page):  # noqa: F811
    _, episode = family
    written = export_html(episode, tmp_path / "page.html", ExportSettings(denoise_steps="all"), page=page)
    data = Document(written.path).data
    found = facts(episode)
    kept = (
        "prefix_only_layers",
        "prefix_len",
        "action_queries",
        "mean_layers",
        "prompt_truncated",
        "segments",
    )
    assert {name: data["facts"][name] for name in kept} == {name: found[name] for name in kept}
    assert data["timeline"] == timeline(episode)
    inference = data["inferences"].index(1)
    for place, step in enumerate(found["denoise_steps"]):
        np.testing.assert_array_equal(
            means_of(data)[inference, place].astype(np.float32), array_of(mean_slab(episode, 1, step))
        )
    assert data["tokens"][inference] == tokens(episode, 1)
