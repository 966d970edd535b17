"""Every analysis on every family of policies: unseen keys are absent, actions have their own numbers."""

import dataclasses
import json

import numpy as np
import pytest
import xarray as xr

from lerobot_attn import analysis, open_episode
from lerobot_attn.analysis.compare import Aspect, compare, compare_each
from lerobot_attn.analysis.labels import policy_of
from lerobot_attn.analysis.propagation import attention_flow, attention_rollout
from lerobot_attn.analysis.reduce import group_sums, in_float32, mean_over, row_sum
from lerobot_attn.analysis.renamed import argument_renamed
from lerobot_attn.analysis.select import executed_actions, executed_queries, layout_of, stored_layers
from lerobot_attn.errors import SelectionError, StoreError
from lerobot_attn.layout import Kind
from lerobot_attn.plot import PlotSettings, plot
from lerobot_attn.synthetic import FAMILIES, planted_shares, write_planted_episode

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

BLIND = [1, 3]


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    return {
        name: open_episode(
            write_planted_episode(
                tmp_path_factory.mktemp("family"), dataclasses.replace(plan, videos=False, n_frames=6)
            )
        )
        for name, plan in FAMILIES.items()
    }


@pytest.fixture(params=["arrays", "dataset"])
def kind(request):
    return request.param


def plan_of(name):
    return dataclasses.replace(FAMILIES[name], videos=False, n_frames=6)


@pytest.mark.parametrize("name", FAMILIES)
def test_shares_are_those_that_were_planted(episodes, name, kind):
    """At the right action, over the keys that the layer sees; also by the mean over executed actions."""
    plan, data = plan_of(name), getattr(episodes[name], kind)
    first = layout_of(data).action_queries.start
    layers = sorted({*stored_layers(data)[0], *stored_layers(data)[1]})
    for layer in layers:
        found = analysis.modality_share(data, frame="all", layer=layer).compute()
        np.testing.assert_allclose(row_sum(found, "modality"), 1, atol=3e-3)
        by_token = not plan.frames_without_query and plan.layers and layer in plan.layers
        for frame in range(plan.n_frames):
            start = frame // plan.n_executed * plan.n_executed
            frames = [frame] if by_token else range(start, start + plan.n_executed)
            planted = [planted_shares(plan, f, layer) for f in frames]
            for modality in found.modality.values.tolist():
                value = float(found.sel(frame=frame, modality=modality))
                share = np.mean([p.get({"actions": "action"}.get(modality, modality), 0) for p in planted])
                if modality == "actions" and layer in plan.prefix_only_layers:
                    assert np.isnan(value)
                else:
                    assert value == pytest.approx(share, abs=3e-3), (layer, frame, modality)
        said = found.attrs["query"]
        assert ("no tokens of a chunk" in said) == bool(plan.frames_without_query)
    if plan.layers:
        one = analysis.attention(data, inference=0, layer=plan.layers[0], query=0).compute()
        raw = data["suffix_attention"].isel(inference=0, denoise_step=-1, layer=0, query=first)
        np.testing.assert_array_equal(one, raw.astype(np.float32).mean("head").compute())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_analysis_has_defaults_that_work(episodes, name):
    """No argument but the dataset, a frame or an inference: what the store holds is what is looked at."""
    plan, data = plan_of(name), episodes[name].arrays
    for where in ({"frame": 1}, {"inference": 1}, {"frame": "all"}, {}):
        for function in (analysis.attention, analysis.modality_share, analysis.token_attention):
            assert np.isfinite(function(data, **where).values).any()
        assert np.isfinite(analysis.image_heatmap(data, **where).values).all()
        entropy = analysis.attention_entropy(analysis.attention(data, **where))
        assert np.isfinite(entropy["entropy"].values).all()
    if plan.layers:
        found = analysis.action_self_attention(data, frame=1)
        assert np.isfinite(found.values).all()
        assert found.shape == (plan.n_chunk, plan.n_chunk)
        own = np.diag(found.values)
        shares = [planted_shares(plan, min(3 * 0 + i, 5))["action"] for i in range(plan.n_chunk)]
        np.testing.assert_allclose(own, shares, atol=3e-3)
    if plan.prefix_layers:
        assert np.isfinite(analysis.cross_modal(data, frame=1).values).all()
        assert np.isfinite(analysis.text_to_image(data, frame=1).values).all()
        assert np.isfinite(analysis.image_to_text(data, frame=1).values).all()
        analysis.prefix_attention(data, inference=0)
    if plan.layers and plan.layers == plan.prefix_layers:
        rolled = attention_rollout(data, frame="all")
        np.testing.assert_allclose(rolled.sum("key"), 1, atol=1e-4)
        flow = attention_flow(data, inference=1, query=0)
        assert np.isfinite(flow.values).all()
    table = analysis.summarise(data)
    assert np.isfinite(table.value).any()
    by_frame = analysis.summarise(data, by="frame")
    assert "layer_sees_suffix" not in table.columns
    assert set(by_frame.frame) == set(range(plan.n_frames))
    assert len(analysis.attention_sinks(data, minimum=0, times_uniform=0))


@pytest.mark.parametrize("name", [n for n, plan in FAMILIES.items() if plan.frames_without_query])
def test_an_action_that_is_no_token_is_never_taken_for_the_last_one(episodes, name, kind):
    data = getattr(episodes[name], kind)
    frames = [frame for frame in FAMILIES[name].frames_without_query if frame < 6]
    for frame in range(6):
        found = analysis.attention(data, frame=frame)
        mean = analysis.attention(data, inference=frame // 3, query="executed")
        np.testing.assert_array_equal(found, mean)
        assert found.attrs["query"] == (
            "mean of executed actions 0-2; actions of frames are no tokens of a chunk"
        )
        if frame in frames:
            message = f"the action of frame {frame} is no token of an inference's chunk"
            for call in (analysis.attention, attention_rollout, attention_flow):
                with pytest.raises(SelectionError, match=message):
                    call(data, frame=frame, query="frame")
        else:
            analysis.attention(data, frame=frame, query="frame")
    with pytest.raises(SelectionError, match="of frame 0, 4-5 is no token"):
        analysis.attention(data, frame="all", query="frame")
    rolled = attention_rollout(data, frame="all")
    of_means = attention_rollout(data, query="executed")[[0, 0, 0, 1, 1, 1]]
    np.testing.assert_allclose(rolled, of_means, rtol=1e-6)


def test_a_query_that_is_no_action_is_damage(episodes):
    data = episodes["pi0"].arrays.load()
    for wrong in (0, 6, 10**6):  # the state token, one beyond the chunk, a stranger's
        queries = np.full(6, wrong)
        odd = data.assign(frame_query=("frame", queries))
        with pytest.raises(StoreError, match="frame_query is damaged"):
            analysis.attention(odd, frame=2, layer=3)
    for wrong in ([0, 3], [1, 7], [0, 0]):
        with pytest.raises(StoreError, match="executed_queries are"):
            executed_actions(data.assign_attrs(executed_queries=wrong))


def test_executed_actions_are_no_queries(episodes):
    assert executed_queries(episodes["pi0"].arrays) == slice(1, 4)
    assert executed_actions(episodes["pi0"].arrays) == slice(0, 3)
    assert executed_actions(episodes["pi05"].arrays) == slice(0, 3)


@pytest.mark.parametrize("name", ["smolvla", "smolvla with special tokens", "smolvla means only"])
def test_layers_that_cannot_see_the_suffix_have_no_zeros_there(episodes, name, kind):
    data = getattr(episodes[name], kind)
    assert analysis.prefix_only_layers(data) == BLIND
    n_prefix = layout_of(data).prefix_len
    every = analysis.attention(data, inference=0, layer="all").compute()
    for layer in range(4):
        assert np.isnan(every.sel(layer=layer)[n_prefix:]).all() == (layer in BLIND)
        assert np.isfinite(every.sel(layer=layer)[:n_prefix]).all()
    assert every.attrs["absent_keys"] == "layers 1, 3 cannot see the suffix, whose keys are absent there"
    assert every.layer_sees_suffix.values.tolist() == [True, False, True, False]
    # A mean takes, for each key, the layers in which that key exists.
    mean = analysis.attention(data, inference=0, layer="mean").compute()
    np.testing.assert_allclose(mean[:n_prefix], every[:, :n_prefix].mean("layer"), rtol=1e-6)
    np.testing.assert_allclose(mean[n_prefix:], every[[0, 2], n_prefix:].mean("layer"), rtol=1e-6)
    some = analysis.attention(data, inference=0, layer=[1, 3])
    assert some.attrs["absent_keys"].startswith("layers 1, 3")
    assert "absent_keys" not in analysis.attention(data, inference=0, layer=[0, 2]).attrs
    # What is excluded leaves the rest of what the layer sees.
    rest = analysis.attention(data, inference=0, layer="all", exclude=[0, 1, 2]).compute()
    np.testing.assert_allclose(row_sum(rest), 1, atol=1e-5)
    assert np.isnan(rest.sel(layer=3)[n_prefix:]).all()
    shares = analysis.modality_share(data, inference=0, layer="all").compute()
    assert np.isnan(shares.sel(modality="actions")).values.tolist() == [False, True, False, True]
    np.testing.assert_allclose(row_sum(shares, "modality"), 1, atol=2e-3)
    entropy = analysis.attention_entropy(every)["entropy"]
    of_prefix = analysis.attention_entropy(every.sel(layer=BLIND)[:, :n_prefix])["entropy"]
    np.testing.assert_allclose(entropy.sel(layer=BLIND), of_prefix, rtol=1e-6)
    sinks = analysis.attention_sinks(data, minimum=0, times_uniform=0, layer=[1, 3])
    assert len(sinks)
    assert (sinks["key"] < n_prefix).all()


@pytest.mark.parametrize("layer", [1, -1, [1, 3]])
def test_actions_that_no_layer_sees_are_told(episodes, layer):
    message = "cannot see the suffix.*of the layers with full maps 0, 2 can see the actions"
    with pytest.raises(SelectionError, match=message):
        analysis.action_self_attention(episodes["smolvla"].arrays, frame=1, layer=layer)


def test_layers_that_see_actions_are_named_where_their_maps_were_not_saved(tmp_path):
    """As with `layers=[-1]` of SmolVLA, whose last layer cross-attends; the means tell of the others."""
    plan = dataclasses.replace(FAMILIES["smolvla"], layers=(1, 3), videos=False)
    episode = open_episode(write_planted_episode(tmp_path, plan))
    message = r"layer 3 cannot see .* none can see the actions; record with layers=\[0, 2\]$"
    with pytest.raises(SelectionError, match=message):
        analysis.action_self_attention(episode.arrays, frame=1)
    with pytest.raises(SelectionError, match=message.replace("layer 3", "layers 1, 3")):
        plot(episode, "actions", PlotSettings(layers=[1, 3]))


def test_actions_are_looked_at_where_they_can_be_seen(episodes):
    data = episodes["smolvla"].arrays
    default = analysis.action_self_attention(data, frame=1)
    assert int(default.layer) == 2
    every = analysis.action_self_attention(data, frame=1, layer="all")
    assert np.isnan(every).all(("query", "action_key")).values.tolist() == [False, True, False, True]
    mean = analysis.action_self_attention(data, frame=1, layer="mean")
    np.testing.assert_allclose(mean, every.sel(layer=[0, 2]).mean("layer"), rtol=1e-6)


def test_a_missing_map_is_not_taken_for_absent_keys(episodes):
    data = episodes["smolvla"].arrays.load()
    for layer in range(4):  # of a layer that sees the suffix, and of one that does not
        maps = data["suffix_attention"].copy(deep=True)
        maps[{"inference": 1, "layer": layer}] = np.nan
        holed = data.assign(suffix_attention=maps)
        for function in (analysis.attention, analysis.modality_share, analysis.token_attention):
            found = function(holed, inference="all", layer="mean", query="mean")
            expected = function(data, inference="all", layer="mean", query="mean")
            assert np.isnan(found[1]).all()
            np.testing.assert_array_equal(found[0], expected[0])
        assert np.isnan(attention_rollout(holed, inference=1)).all()
        assert np.isnan(attention_flow(holed, inference=1, query=0)).all()
        assert np.isfinite(attention_rollout(holed, inference=0)).all()


def test_rollout_of_a_layer_that_cannot_see_the_suffix_keeps_the_token_itself(episodes):
    """S[l+1] = S[l]/2 + A[l][:, prefix] P[l] / 2 there, with dense matrices."""
    data = episodes["smolvla"].arrays.load()
    n, n_prefix = layout_of(data).n_keys, layout_of(data).prefix_len
    p, s = np.eye(n_prefix, n), np.eye(n)[n_prefix:]
    for layer in range(4):
        suffix = data["suffix_attention"].values[0, -1, layer].astype(np.float64).mean(axis=0)
        prefix = data["prefix_attention"].values[0, layer].astype(np.float64).mean(axis=0)
        seen = suffix[:, :n_prefix] if layer in BLIND else suffix
        seen = seen / seen.sum(axis=1, keepdims=True)
        given = seen[:, :n_prefix] @ p + (0 if layer in BLIND else seen[:, n_prefix:] @ s)
        s = s / 2 + given / 2
        total = prefix.sum(axis=1, keepdims=True)
        p = p / 2 + prefix / np.where(total > 0, total, 1) @ p / 2
    found = attention_rollout(data, inference=0, query="all")
    np.testing.assert_allclose(found, s, atol=2e-6)
    assert found.attrs["absent_keys"].startswith("layers 1, 3")


def test_means_sums_and_groups_by_hand():
    nan = np.nan
    values = [[0.5, 0.25, 0.25], [0.75, 0.25, nan], [nan, nan, nan]]
    rows = xr.DataArray(np.array(values, np.float32), dims=("layer", "key"))
    member = xr.DataArray(np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32), dims=("key", "group"))
    for array in (rows, rows.chunk(layer=1)):
        mean = mean_over(array[:2], "layer")
        np.testing.assert_allclose(mean.compute(), [0.625, 0.25, 0.25])
        assert np.isnan(mean_over(array, "layer").compute()).all()
        assert np.isnan(mean_over(array[1:2], ["layer"]).compute()).values.tolist() == [False, False, True]
        np.testing.assert_array_equal(row_sum(array).compute(), [1, 1, nan])
        sums = group_sums(array, member).compute()
        np.testing.assert_array_equal(sums, [[0.75, 0.25, 0], [1, nan, 0], [nan, nan, nan]])
        assert mean_over(array[:1], "layer", may_lack_keys=False).dtype == np.float32
        assert (mean.chunks is None) == (array.chunks is None)


@pytest.mark.parametrize("dims", [("row", "step", "key"), ("step", "key", "row"), ("step", "row", "key")])
def test_groups_that_differ_from_row_to_row(dims):
    rng = np.random.default_rng(0)
    array = xr.DataArray(rng.random((3, 4, 20), np.float32), dims=("row", "step", "key"))
    array[1, 2] = np.nan
    member = xr.DataArray(rng.integers(0, 2, (3, 20, 5)).astype(np.float32), dims=("row", "key", "group"))
    expected = np.einsum("rsk,rkg->rsg", array.values.astype(float), member.values.astype(float))
    found = group_sums(array.transpose(*dims), member, may_lack_keys=False)
    assert found.dims == (*(dim for dim in dims if dim != "key"), "group")
    # float32, added in another order than float64: some ten roundings.
    np.testing.assert_allclose(found.transpose("row", "step", "group"), expected, rtol=1e-6)
    one = group_sums(array[0], member[0], may_lack_keys=False)
    np.testing.assert_allclose(one, expected[0], rtol=1e-6)
    assert group_sums(array[:, :0], member, may_lack_keys=False).shape == (3, 0, 5)


def test_a_cut_prompt_is_told_and_its_words_stay_words(episodes):
    data = episodes["truncated prompt"].arrays
    assert analysis.prompt_truncated(data).tolist() == [True, True]
    assert analysis.prompt_truncated(episodes["pi05"].arrays).tolist() == [False, False]
    found = analysis.token_attention(data, frame=0)
    words = found.label.values[found.kind.values == "task"].tolist()
    assert words[:4] == ["pick", "up", "the", "red"]
    assert not (found.kind == "state").any()
    assert "state" not in analysis.modality_share(data, frame=0).modality


@pytest.mark.parametrize("name", FAMILIES)
def test_a_state_that_is_a_token_of_its_own_is_among_the_tokens(episodes, name, kind):
    """Last in the prefix or first in the suffix: all of the state's attention is among the tokens."""
    plan, data = plan_of(name), getattr(episodes[name], kind)
    is_token = bool(plan.n_prefix_state + plan.n_suffix_state)
    for layer in sorted({*stored_layers(data)[0], *stored_layers(data)[1]}):
        found = analysis.token_attention(data, frame=2, layer=layer).compute()
        of_state = found.isel(token=found.kind.values == "state")
        assert ("state token" in found.label.values.tolist()) == is_token
        if is_token:
            assert (of_state.label.values.tolist(), of_state.ordinal.values.tolist()) == (
                ["state token"],
                [-1],
            )
        shares = analysis.modality_share(data, frame=2, layer=layer).compute()
        if "state" not in shares.modality.values:
            assert not of_state.size
            continue
        expected = float(shares.sel(modality="state"))
        np.testing.assert_allclose(float(of_state.sum("token", skipna=False)), expected, rtol=1e-3)
        assert not np.isnan(expected)


def test_a_state_token_of_the_suffix_that_a_layer_cannot_see_is_absent(tmp_path):
    plan = dataclasses.replace(plan_of("pi0"), prefix_only_layers=(1, 3))
    data = open_episode(write_planted_episode(tmp_path, plan)).arrays
    found = analysis.token_attention(data, frame=1, layer=[0, 1]).set_index(token="label")
    assert np.isnan(found.sel(token="state token")).values.tolist() == [False, True]
    share = planted_shares(plan, 1, 0)["state"]
    assert float(found.sel(token="state token", layer=0)) == pytest.approx(share, abs=3e-3)


def test_patches_of_the_prefix_look_at_its_own_state_token_alone(episodes):
    for name, expected in (("smolvla", True), ("pi0", False)):
        found = analysis.image_to_text(episodes[name].arrays, frame=0)
        assert ("state token" in found.label.values.tolist()) == expected
        assert "task" in found.kind.values.tolist()


def test_special_tokens_are_a_modality(episodes):
    name = "smolvla with special tokens"
    data = episodes[name].arrays
    shares = analysis.modality_share(data, frame=2, layer=0)
    assert float(shares.sel(modality="special")) == pytest.approx(
        planted_shares(plan_of(name), 2, 0)["special"], abs=2e-3
    )
    assert (data.key_kind == Kind.SPECIAL).sum("key").values.tolist() == [6, 6]


def test_what_other_files_give_back_is_understood(episodes):
    """netCDF knows neither objects nor lists of them: JSON text and arrays come back."""
    data = episodes["pi0"].arrays
    said = {"layout": layout_of(data).to_dict(), "policy": dict(policy_of(data))}
    assert said["policy"]["n_layers"] == 4
    objects = data.assign_attrs(said)
    texts = {name: json.dumps(value) for name, value in said.items()}
    other = objects.assign_attrs(texts, executed_queries=np.array(data.attrs["executed_queries"]))
    assert layout_of(other) == layout_of(objects) == layout_of(data)
    assert policy_of(other) == policy_of(objects)
    found, expected = (analysis.modality_share(d, frame=1) for d in (other, data))
    np.testing.assert_array_equal(found, expected)
    assert analysis.attention(other, frame=1).attrs == analysis.attention(data, frame=1).attrs
    with pytest.raises(StoreError, match="layout is missing or damaged"):
        layout_of(data.assign_attrs(layout="{nonsense"))


def test_a_kind_that_does_not_exist_is_damage(episodes):
    data = episodes["pi05"].arrays.load()
    kinds = data["key_kind"].copy()
    kinds[0, layout_of(data).language.start] = 99
    with pytest.raises(StoreError, match="key_kind holds 99, expected 0 to 7"):
        analysis.token_attention(data.assign(key_kind=kinds), frame=0)


def test_old_names_work_and_say_the_new_one(episodes):
    data = episodes["pi05"].arrays
    with pytest.warns(DeprecationWarning, match="rollout is deprecated.*attention_rollout") as caught:
        old = analysis.rollout(data, frame=1)
    assert caught[0].filename == __file__  # whoever called it, not this package
    np.testing.assert_array_equal(old, analysis.attention_rollout(data, frame=1))
    with pytest.warns(DeprecationWarning, match="flow is deprecated.*attention_flow"):
        analysis.flow(data, frame=1)
    with pytest.warns(DeprecationWarning, match="sharpness is deprecated.*attention_entropy"):
        analysis.sharpness(analysis.attention(data, frame=1))
    with pytest.warns(DeprecationWarning, match="sharpness= is deprecated.*effective_patches=") as caught:
        argument_renamed("sharpness", "effective_patches")(lambda effective_patches: None)(sharpness=1)
    assert caught[0].filename == __file__
    for function in (analysis.attention, analysis.image_heatmap, analysis.modality_share):
        with pytest.warns(DeprecationWarning, match="leave_out is deprecated.*exclude"):
            old = function(data, frame=1, leave_out=[0])
        np.testing.assert_array_equal(old, function(data, frame=1, exclude=[0]))
    from lerobot_attn.analysis.prefix import flow, rollout

    assert (flow, rollout) == (analysis.flow, analysis.rollout)
    old, new = (analysis.summarise(data, name) for name in ("sharpness", "entropy"))
    assert set(old.measure) == {"sharpness"}
    np.testing.assert_array_equal(old.value, new.value)


CHANGES = {
    "denoise steps": {"n_denoise_steps": 7},
    "depth": {"n_layers": 6, "layers": (5,), "prefix_layers": ()},
    "heads": {"n_heads": 3},
    "no reward": {"has_reward": False},
    "chunk": {"n_queries": 8},
    "layers that do not see the suffix": {"prefix_only_layers": (3,)},
    "another task": {"task": "open the drawer"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_episodes_whose_policies_differ_compare_with_labels(episodes, tmp_path, change):
    plan = dataclasses.replace(plan_of("pi05"), **CHANGES[change])
    other = open_episode(write_planted_episode(tmp_path, plan))
    aspects = {
        name: Aspect(name, axis)
        for name, axis in (("modality_share", "phase"), ("entropy", "frame"), ("token_attention", "whole"))
    }
    aspects["heat"] = Aspect("image_heatmap", "whole")
    found = compare_each(episodes["pi05"], other, aspects, n_resamples=10)
    assert {"actions", "task"} <= set(found["modality_share"].modality.values.tolist())
    assert found["entropy"]["quantity"].values.tolist() == ["entropy", "effective_number"]
    assert found["entropy"]["camera"].values.tolist() == list(plan.image_px)
    assert set(found["token_attention"]["kind"].values.tolist()) == {"task", "state", "template"}
    shares = found["modality_share"].sel(modality="actions")
    assert np.isnan(shares.b).all() == (change == "layers that do not see the suffix")
    assert np.isfinite(shares.a).all()


@pytest.mark.parametrize(
    ("where", "message"), [({"layer": "all"}, "layer differs"), ({"head": "all"}, "head differs")]
)
def test_what_cannot_be_compared_is_said_in_one_line(episodes, tmp_path, where, message):
    plan = dataclasses.replace(plan_of("pi05"), n_layers=6, layers=(5,), prefix_layers=(), n_heads=3)
    other = open_episode(write_planted_episode(tmp_path, plan))
    with pytest.raises(SelectionError, match=message) as caught:
        compare(episodes["pi05"], other, **where)
    assert "\n" not in str(caught.value)


GEOMETRIES = {
    "size": {"image_px": {"observation.images.image": (96, 128), "observation.images.wrist": (96, 128)}},
    "padding": {"padding": "left_top"},
    "grid": {"grid": (4, 4)},
}


@pytest.mark.parametrize("change", GEOMETRIES)
def test_patches_of_other_geometry_are_not_compared(episodes, tmp_path, change):
    """One patch shows different places in the two; shares of whole images are comparable."""
    plan = dataclasses.replace(plan_of("pi05"), **GEOMETRIES[change])
    other = open_episode(write_planted_episode(tmp_path, plan))
    camera = "wrist" if change == "padding" else "image"
    with pytest.raises(SelectionError, match="patch by patch") as caught:
        compare(episodes["pi05"], other, "image_heatmap", camera=camera)
    assert "\n" not in str(caught.value)
    assert str(other.path) in str(caught.value)
    assert analysis.same_geometry([episodes["pi05"], other], camera) is False
    assert analysis.same_geometry([episodes["pi05"], episodes["pi0"]], camera) is True
    shares = compare(episodes["pi05"], other, n_resamples=10)
    assert np.isfinite(shares.difference.sel(modality="task")).all()


def test_every_float16_becomes_what_numpy_makes_of_it():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    for values in (every, every[:0x7C00], every[:0x7C00].reshape(31, 1024)[:, ::3].T, every[:0]):
        found = in_float32(xr.DataArray(values))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.values, values.astype(np.float32))
