"""Synthetic episodes are what recorded ones are: well-formed stores, videos beside them, masked keys at 0."""

import dataclasses

import numpy as np
import pytest

from lerobot_attn import open_episode, open_run
from lerobot_attn.errors import ConfigError
from lerobot_attn.layout import Kind
from lerobot_attn.masks import patch_coverage
from lerobot_attn.store.schema import ARRAYS
from lerobot_attn.store.video import count_frames, read_frames
from lerobot_attn.synthetic import (
    FAMILIES,
    SyntheticPlan,
    planted_box,
    planted_patch,
    planted_scene,
    planted_shares,
    planted_unit,
    planted_word,
    write_planted_episode,
    write_softmax_episode,
)

SMALL = {"grid": (4, 4), "n_frames": 5, "n_text": 60, "videos": False}
OBJECTS = {
    "objects": {"soup_1": "target", "basket_1": "destination", "milk_1": "distractor", "robot0": "robot"},
    "out_of_sight": (1,),
    "on_first_object": (2, 1),
}
PLANS = {
    "default": SyntheticPlan(**SMALL),
    "prefix": SyntheticPlan(**SMALL, prefix_layers=(0, 3)),
    "means only": SyntheticPlan(**SMALL, layers=()),
    "one camera": SyntheticPlan(
        **SMALL, image_px={"observation.images.image": (61, 97)}, n_empty_cameras=0, padding="left_top"
    ),
    "two empty cameras": SyntheticPlan(**SMALL, n_empty_cameras=2),
    "one word": SyntheticPlan(**SMALL, task="reach"),
    "objects": SyntheticPlan(**SMALL, **OBJECTS),
    "neurons": SyntheticPlan(
        **SMALL,
        neurons={"vlm": (0, 3), "expert": (1,)},
        residuals={"vlm": (2,), "expert": (0, 3)},
        record_full=True,
    ),
    "neurons alone": SyntheticPlan(**{**SMALL, "layers": ()}, has_means=False, neurons={"expert": (1,)}),
    "one frame": SyntheticPlan(**{**SMALL, "n_frames": 1}),
    "one head, one step": SyntheticPlan(**SMALL, n_heads=1, n_denoise_steps=1, n_layers=1, layers=(0,)),
    **{name: dataclasses.replace(plan, videos=False) for name, plan in FAMILIES.items()},
}


@pytest.mark.parametrize("write", [write_planted_episode, write_softmax_episode])
@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_stores_are_well_formed(tmp_path, plan, write):
    path = write(tmp_path, plan, note="made up")
    (episode,) = open_run(tmp_path)
    assert episode.path == path == tmp_path / "attention" / "synthetic_0" / "episode_00000.zarr"
    assert (episode.n_frames, episode.n_inferences) == (plan.n_frames, plan.n_inferences)
    success = True if plan.has_success else None
    assert (episode.is_complete, episode.success, episode.task) == (True, success, plan.task)
    assert episode.has_random_weights  # nobody shall take it for a policy's
    assert episode.attributes["note"] == "made up"
    assert episode.layout == plan.layout
    data = episode.arrays
    optional = {"suffix_attention": plan.layers, "prefix_attention": plan.prefix_layers}
    optional |= {"vision_attention": plan.vision_layers}
    optional |= {"suffix_attention_mean": plan.has_means, "reward": plan.has_reward}
    optional |= {"success": plan.has_success, "prompt_truncated": plan.cut_prompt}
    optional |= {"segmentation": plan.objects, "instance_position": plan.objects}
    streams = {f"{stream}_neurons": bool(plan.neurons.get(stream)) for stream in ("vlm", "expert")}
    streams |= {f"{stream}_residual": bool(plan.residuals.get(stream)) for stream in ("vlm", "expert")}
    optional |= streams | {f"{name}_full": there and plan.record_full for name, there in streams.items()}
    missing = {name for name, is_there in optional.items() if not is_there}
    # What only robots, replays and policies that decode tokens bring.
    missing |= {s.name for s in ARRAYS if s.optional} - {*optional, "state", "layer_sees_suffix"}
    coordinates = set() if plan.prefix_only_layers else {"layer_sees_suffix", "all_layer_sees_suffix"}
    coordinates |= {"layer", "layer_sees_suffix"} if not plan.layers else set()
    coordinates |= {"all_layer", "all_layer_sees_suffix"} if not plan.has_means else set()
    coordinates |= {"prefix_layer"} if not plan.prefix_layers else set()
    in_vision = {"camera", "vision_layer", "vision_head", "patch_row", "patch_column"}
    coordinates |= in_vision if not plan.vision_layers else set()
    chosen = {name for name, is_there in streams.items() if is_there}
    coordinates |= {
        f"{name.replace('neurons', 'neuron')}_layer" for name, is_there in streams.items() if not is_there
    }
    coordinates |= {
        f"{stream}_group"
        for stream in ("vlm", "expert")
        if not {f"{stream}_neurons", f"{stream}_residual"} & chosen
    }
    coordinates |= set() if chosen else {"reduction"}
    coordinates |= {"mask_camera", "instance", "instance_role"} if not plan.objects else set()
    assert set(data.variables) == {spec.name for spec in ARRAYS} - missing - coordinates
    masked = data.key_kind.values == Kind.PADDING
    tolerance = episode.row_sum_tolerance()
    for name in ("suffix_attention", "suffix_attention_mean"):
        if name in data:
            maps = data[name].values.astype(np.float32)
            # Keys that a layer cannot see are NaN: those of the suffix, and no other.
            layers = data["layer" if name == "suffix_attention" else "all_layer"].values
            absent = np.zeros((len(layers), plan.layout.n_keys), bool)
            absent[np.isin(layers, plan.prefix_only_layers), plan.layout.prefix_len :] = True
            absent = absent.reshape(len(layers), *(1,) * (maps.ndim - 4), -1)
            assert (np.isnan(maps) == absent).all()
            maps = np.where(absent, 0, maps)
            assert (maps >= 0).all()
            np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=tolerance)
            for inference in range(plan.n_inferences):
                assert (maps[inference][..., masked[inference]] == 0).all()
    empty = np.isin(data.key_camera.values, range(len(plan.image_px), len(plan.layout.cameras)))
    assert masked[:, empty].all()
    assert not masked[:, data.key_camera.values == 0].any()
    # Every frame's action is that of its inference and query.
    chunk, inference, query = (data[n].values for n in ("action_chunk", "frame_inference", "frame_query"))
    frames = np.arange(plan.n_frames)
    is_token = ~np.isin(frames, plan.frames_without_query)
    assert ((query == -1) == ~is_token).all()
    assert (data.action.values == chunk[inference, query]).all(axis=1).tolist() == is_token.tolist()
    action = episode.layout.action_of_query(query[is_token])
    np.testing.assert_array_equal(data.inference_frame.values[inference[is_token]] + action, frames[is_token])
    assert np.isnan(chunk[:, : plan.first_action_query]).all()
    if plan.has_success:
        assert data.success.values.tolist() == [False] * (plan.n_frames - 1) + [True]


@pytest.mark.parametrize("plan", [PLANS["default"], PLANS["two empty cameras"]])
def test_means_are_the_mean_of_the_executed_actions(tmp_path, plan):
    data = open_episode(write_planted_episode(tmp_path, plan)).arrays
    full = data.suffix_attention.values.astype(np.float32)[..., : plan.n_executed, :].mean(axis=-2)
    np.testing.assert_allclose(data.suffix_attention_mean.values[:, :, list(plan.layers)], full, atol=3e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_hold_what_was_planted(tmp_path, name):
    """Every row of every layer: shares, the patch, the word, and what each family has besides."""
    plan = dataclasses.replace(FAMILIES[name], videos=False, layers=(0, 1, 2, 3))
    data = open_episode(write_planted_episode(tmp_path, plan)).arrays
    layout, cameras = plan.layout, list(plan.image_px)
    kinds, words = data.key_kind.values, data.text_word.values
    maps = data.suffix_attention.values.astype(np.float32)
    first = layout.action_queries.start
    for frame in range(plan.n_frames):
        inference, action = divmod(frame, plan.n_executed)
        for layer, head in np.ndindex(plan.n_layers, plan.n_heads):
            row = maps[inference, 1, layer, head, layout.query_of_action(action)]
            shares = planted_shares(plan, frame, layer)
            assert sum(shares.values()) == pytest.approx(1)
            for index, camera in enumerate(cameras):
                of_camera = np.where(data.key_camera.values == index, row, 0)
                assert of_camera.sum() == pytest.approx(shares[camera], abs=2e-3)
                key = int(of_camera.argmax())
                where = (int(data.key_row[key]), int(data.key_column[key]))
                at = {"frame": frame, "layer": layer, "head": head, "denoise_step": 1}
                assert where == planted_patch(plan, index, **at)
            of_kind = {kind: row[kinds[inference] == kind] for kind in Kind}
            names = {"task": Kind.TASK, "state": Kind.STATE, "template": Kind.TEMPLATE}
            names |= {"special": Kind.SPECIAL, "action": Kind.ACTION}
            for modality, kind in names.items():
                if modality in shares:
                    share = pytest.approx(shares[modality], abs=2e-3)
                    assert np.nansum(of_kind[kind]) == share, (modality, frame, layer)
                else:
                    assert not len(of_kind[kind]) or np.isnan(of_kind[kind]).all(), (modality, frame, layer)
            word = words[inference] == planted_word(plan, frame)
            text = row[layout.language.start : layout.language.stop]
            assert text[word].sum() >= 0.7 * shares["task"]
            assert np.isnan(row[layout.prefix_len :]).all() == (layer in plan.prefix_only_layers)
            if layer not in plan.prefix_only_layers:
                own = layout.prefix_len + first + action
                assert row[own] == pytest.approx(shares["action"], abs=1e-3)
    if plan.cut_prompt:
        assert data.prompt_truncated.values.all()
        assert not (kinds == Kind.STATE).any()
        assert (kinds == Kind.TASK).any()


def test_families_differ_as_the_policies_do():
    """Literal token rows of three policies: what stands where, and which queries are actions."""
    kinds = {name: [s.kind for s in FAMILIES[name].layout.segments] for name in FAMILIES}
    assert kinds["pi05"] == ["image", "image", "image", "language", "action"]
    assert kinds["pi0"] == ["image", "image", "image", "language", "state", "action"]
    assert kinds["smolvla"] == ["image", "image", "language", "state", "padding", "action"]
    around = ["special", "image", "special"]
    assert kinds["smolvla with special tokens"] == [*around, *around, *kinds["smolvla"][2:]]
    assert FAMILIES["pi0"].layout.action_queries == slice(1, 6)
    assert FAMILIES["pi0"].layout.n_queries == 6
    assert FAMILIES["smolvla"].layout.action_queries == slice(0, 5)
    tops = {n: FAMILIES[n].layout.cameras[1].geometry for n in ("pi05", "pi05 left-top")}
    assert tops["pi05"].pad_top_px * 2 == tops["pi05 left-top"].pad_top_px > 0


def test_planted_prefix_rows(tmp_path):
    plan = PLANS["prefix"]
    data = open_episode(write_planted_episode(tmp_path, plan)).arrays
    assert data.prefix_layer.values.tolist() == [0, 3]
    n_words, start = len(plan.task.split()), plan.layout.language.start
    for inference in range(plan.n_inferences):
        rows = data.prefix_attention.values[inference].astype(np.float32)
        words, kinds = data.text_word.values[inference], data.key_kind.values[inference]
        masked = kinds[: plan.layout.prefix_len] == Kind.PADDING
        assert (rows[..., masked, :] == 0).all()
        assert (rows[..., masked] == 0).all()
        np.testing.assert_allclose(rows[..., ~masked, :].sum(axis=-1), 1, atol=1e-3)
        for word in range(n_words):
            tokens = start + np.flatnonzero(words == word)
            assert len(tokens) >= 1
            assert (rows[..., tokens, word] == 1).all()  # patch `word` of the first camera
        for key in np.flatnonzero(np.isin(data.key_camera.values, [0, 1])):
            tokens = start + np.flatnonzero(words == data.key_row.values[key] % n_words)
            np.testing.assert_allclose(rows[..., key, tokens], 1 / len(tokens), rtol=1e-3)
        itself = np.flatnonzero(np.isin(kinds, [Kind.TEMPLATE, Kind.STATE]))
        assert (rows[..., itself, itself] == 1).all()


def test_prompts_name_their_words_and_numbers(tmp_path):
    plan = SyntheticPlan(**{**SMALL, "n_frames": 30})
    data = open_episode(write_planted_episode(tmp_path, plan)).arrays
    lengths = set()
    for inference in range(plan.n_inferences):
        texts, words, dims = (
            data[name].values[inference] for name in ("token_text", "text_word", "text_state_dim")
        )
        assert [
            "".join(texts[words == i]).strip() for i in range(len(plan.task.split()))
        ] == plan.task.split()
        numbers = ["".join(texts[dims == i]) for i in range(plan.n_state)]
        assert numbers == [str((37 * dim + 13 * inference) % 256) for dim in range(plan.n_state)]
        lengths.add(sum(map(len, numbers)))
    assert len(lengths) > 2  # the number of state tokens changes from inference to inference


def test_videos_have_the_frames_and_sizes_that_the_store_says(tmp_path):
    plan = SyntheticPlan(
        grid=(4, 4), n_frames=5, image_px={"observation.images.a": (48, 64), "observation.images.b": (33, 47)}
    )
    episode = open_episode(write_planted_episode(tmp_path, plan))
    assert set(episode.videos) == set(plan.image_px)
    for camera, size in plan.image_px.items():
        video = episode.attributes["videos"][camera]
        assert (video["n_frames"], video["height_px"], video["width_px"]) == (5, *size)
        frames = list(read_frames(episode.videos[camera], size_px=size))
        assert [frame.shape for frame in frames] == [(*size, 3)] * 5
        assert any((frames[0] != frames[4]).ravel())
    assert episode.eval_video == tmp_path / "videos" / "synthetic_0" / "eval_episode_0.mp4"
    assert count_frames(episode.eval_video) == 5


def test_an_episode_without_frames_has_no_videos(tmp_path):
    episode = open_episode(write_planted_episode(tmp_path, SyntheticPlan(grid=(4, 4), n_frames=0)))
    assert (episode.n_frames, episode.n_inferences, episode.videos) == (0, 0, {})


def test_several_episodes_make_a_run(tmp_path):
    for index, success in enumerate((True, False, True)):
        plan = SyntheticPlan(**SMALL, episode_index=index, success=success, complete=index < 2)
        write_planted_episode(tmp_path, plan)
    run = open_run(tmp_path)
    assert [episode.success for episode in run] == [True, False, None]
    assert run.table.complete.tolist() == [True, True, False]
    assert not run[1].arrays.success.values.any()


@pytest.mark.parametrize("write", [write_planted_episode, write_softmax_episode])
def test_the_same_plan_gives_the_same_numbers(tmp_path, write):
    first, second = (open_episode(write(tmp_path / name, PLANS["default"])).arrays for name in "ab")
    assert first.drop_attrs().identical(second.drop_attrs())
    other = open_episode(write(tmp_path / "c", SyntheticPlan(**SMALL, seed=1))).arrays
    assert not np.array_equal(first.action, other.action)


def test_softmax_rows_are_peaked_and_alike_from_inference_to_inference(tmp_path):
    data = open_episode(write_softmax_episode(tmp_path, PLANS["default"])).arrays
    maps = data.suffix_attention.values.astype(np.float64)[..., data.key_kind.values[0] != Kind.PADDING]
    assert maps.max(axis=-1).mean() > 5 / maps.shape[-1]  # far from even
    logs = np.log(maps[:, 0, 0, 0, 0] + 1e-6)
    assert np.corrcoef(logs[0], logs[1])[0, 1] > 0.6


def test_what_is_planted_adds_up_and_moves():
    plan = PLANS["default"]
    for frame in range(plan.n_frames):
        assert sum(planted_shares(plan, frame).values()) == pytest.approx(1)
        assert 0 <= planted_word(plan, frame) < len(plan.task.split())
    assert sum(planted_shares(PLANS["one camera"], 3).values()) == pytest.approx(1)
    base = {"frame": 0, "layer": 0, "head": 0, "denoise_step": 0}
    full = SyntheticPlan()
    for name in base:
        places = {planted_patch(full, 0, **{**base, name: value}) for value in range(4)}
        assert len(places) > 2, name


@pytest.mark.parametrize("padding", ["centred", "left_top"])
def test_masks_show_the_objects_where_they_were_planted(tmp_path, padding):
    plan = SyntheticPlan(**OBJECTS, padding=padding)
    episode = open_episode(write_planted_episode(tmp_path, plan))
    data = episode.arrays
    names = ["background", *plan.objects]
    assert data.instance.values.tolist() == names
    assert data.instance_role.values.tolist() == ["background", *plan.objects.values()]
    assert data.mask_camera.values.tolist() == list(plan.image_px)
    assert data.segmentation.shape == (4, 2, 96, 128)
    films = [list(read_frames(video)) for video in episode.videos.values()]
    places = set()
    for inference, camera in np.ndindex(data.segmentation.shape[:2]):
        frame = int(data.inference_frame[inference])
        mask = data.segmentation.values[inference, camera]
        picture = films[camera][frame].astype(int)
        np.testing.assert_array_equal(mask, planted_scene(plan, frame).masks[list(plan.image_px)[camera]])
        for number, name in enumerate(plan.objects, 1):
            box = planted_box(plan, camera, name, frame)
            places.add(box)
            rows, columns = np.nonzero(mask == number)
            if box is None:
                assert (number, inference, len(rows)) == (1, 1, 0)
                continue
            assert (rows.min(), columns.min()) == pytest.approx((box.top * 96, box.left * 128), abs=1)
            assert (rows.max(), columns.max()) == pytest.approx((box.bottom * 96, box.right * 128), abs=1.5)
            assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # nothing hides it
            y, x = (int(share * size) for share, size in zip(box.centre, picture.shape, strict=False))
            assert np.ptp(picture[y - 3 : y + 3, x - 3 : x + 3], axis=(0, 1)).max() < 30  # the picture too
        expected = planted_scene(plan, frame).positions
        np.testing.assert_array_equal(data.instance_position.values[inference], expected)
    assert len(places) > 20


def test_a_head_attends_to_the_first_object_as_long_as_it_is_in_sight(tmp_path):
    plan = SyntheticPlan(**OBJECTS, layers=(2, 3), videos=False)
    data = open_episode(write_planted_episode(tmp_path, plan)).arrays
    for inference, head in np.ndindex(plan.n_inferences, plan.n_heads):
        frame = inference * plan.n_executed
        for camera in range(2):
            keys = np.flatnonzero(data.key_camera.values == camera)
            geometry = plan.layout.cameras[camera].geometry
            target = planted_scene(plan, frame).of_role(list(plan.image_px)[camera], "target")
            inside = patch_coverage(target, geometry).ravel()
            maps = data.suffix_attention.values[inference, :, :, head, 0][..., keys].astype(np.float32)
            share = (maps * (inside > 0.5)).sum(axis=-1) / maps.sum(axis=-1)
            is_on = share > 0.7
            on_it = (head, inference in plan.out_of_sight) == (1, False)
            assert is_on[:, 0].all() == on_it  # layer 2, every denoise step
            assert not is_on[:, 1].all()  # layer 3


def test_full_size_is_pi05():
    plan = SyntheticPlan.full_size(20, n_heads=4)
    assert plan.layout.n_keys == 1018
    assert (plan.n_frames, plan.n_heads, plan.n_layers, plan.n_inferences) == (20, 4, 18, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_px": {}}, "image_px: got {}, expected at least one camera"),
        ({"grid": (1, 1)}, r"grid: got \(1, 1\), expected at least two patches"),
        ({"task": " "}, "task: got ' ', expected at least one word"),
        ({"n_state": 0}, "n_state: got 0, expected at least 1"),
        ({"n_executed": 6}, "n_executed: got 6, expected 1 to n_queries = 5"),
        ({"n_executed": 0}, "n_executed: got 0"),
        ({"layers": (3, 4)}, r"layers: got \(3, 4\), expected 0 to 3"),
        ({"prefix_only_layers": (4,)}, r"prefix_only_layers: got \(4,\), expected 0 to 3"),
        (
            {"n_suffix_cameras": 2, "n_empty_cameras": 0},
            "n_suffix_cameras: got 2, expected fewer than the cameras, and none with empty cameras",
        ),
        ({"n_suffix_cameras": 1}, "n_suffix_cameras: got 1, expected fewer than the cameras"),
        (
            {"n_suffix_state": 1, "n_executed": 5},
            "n_executed: got 5, expected 1 to n_queries - n_suffix_state = 4",
        ),
        ({"on_first_object": (4, 0), "objects": {"soup_1": "target"}}, r"on_first_object: got \(4, 0\)"),
        ({"objects": {"soup_1": "goal"}}, "objects, soup_1: got role 'goal', expected one of target"),
        ({"on_first_object": (0, 0)}, "on_first_object: .* in a plan with objects"),
        ({"layers": (), "has_means": False}, "has_means: got False, expected True, or layers"),
    ],
)
def test_plans_that_nothing_can_be_planted_in(changes, message):
    with pytest.raises(ConfigError, match=message):
        SyntheticPlan(**changes)


def test_a_prompt_that_does_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="n_text: got 10, expected at least the prompt's 31 tokens"):
        write_planted_episode(tmp_path, SyntheticPlan(n_text=10))


def test_one_unit_of_each_layer_rises_over_the_episode(tmp_path):
    """And what is reduced is what every token's values are."""
    data = open_episode(write_planted_episode(tmp_path, PLANS["neurons"])).arrays
    plan = PLANS["neurons"]
    layout, kinds = plan.layout, data.key_kind.values
    for name in ("vlm_neurons", "expert_neurons", "vlm_residual", "expert_residual"):
        array, full = data[name].astype(float), data[f"{name}_full"].astype(float)
        layer_dim, unit_dim = array.dims[-2:]
        for layer in array[layer_dim].values:
            mean = array.sel({layer_dim: layer, "reduction": "mean"})
            over = [dim for dim in mean.dims if dim not in ("inference", unit_dim)]
            by_unit = mean.mean(over).values
            unit = planted_unit(plan, name, layer)
            np.testing.assert_allclose(by_unit[:, unit], np.linspace(1, 3, plan.n_inferences), atol=0.1)
            assert np.abs(np.delete(by_unit, unit, axis=1)).max() < 0.2
        for inference in range(plan.n_inferences):
            groups = layout.suffix_groups(plan.executed_queries)
            if name.startswith("vlm"):
                groups = layout.prefix_groups(kinds[inference])
            for group, tokens in groups.items():
                group_dim = f"{name.partition('_')[0]}_group"
                kept = array[inference].sel({group_dim: group})
                of_tokens = full[inference].transpose(..., layer_dim, unit_dim).values[..., tokens, :, :]
                for reduction, expected in (("mean", of_tokens.mean(-3)), ("max", of_tokens.max(-3))):
                    np.testing.assert_allclose(kept.sel(reduction=reduction), expected, atol=2e-3)
