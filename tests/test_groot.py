"""GR00T N1.7: the contract, each way in which a map could be wrong, and a recording to the last picture."""

from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")
pytest.importorskip("diffusers")

from adapter_contract import Editor, Watcher, act, attention_sites  # noqa: E402
from lerobot.policies.groot.processor_groot import (  # noqa: E402
    GrootN17PackInputsStep,
    GrootN17VLMEncodeStep,
)
from matplotlib.text import Text  # noqa: E402
from small_policies import (  # noqa: E402
    EVERYTHING,
    SIZE,
    TASKS,
    TOP,
    WRIST,
    SmallPolicyContract,
    another_task_is_told,
    captured,
    commands_take,
    compiled_is_refused,
    explorer_serves,
    family_fixtures,
    plot_is_drawn,
    raw_observation,
    record_own_loop,
    training_goes_on_unrecorded,
)

from lerobot_attn import open_run  # noqa: E402
from lerobot_attn.analysis import attention, image_heatmap, modality_share  # noqa: E402
from lerobot_attn.analysis.prefix import text_to_image  # noqa: E402
from lerobot_attn.analysis.propagation import attention_flow, attention_rollout  # noqa: E402
from lerobot_attn.capture import capture_attention, find_tokenizer  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.errors import CaptureError, SelectionError  # noqa: E402
from lerobot_attn.layout import ImageGeometry, Kind  # noqa: E402
from lerobot_attn.overlay import OverlaySettings, overlay_frames  # noqa: E402
from lerobot_attn.plot import plot  # noqa: E402
from lerobot_attn.plot.kinds import KINDS  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402
from lerobot_attn.policies.base import Site  # noqa: E402
from lerobot_attn.verify import verify_episode  # noqa: E402

GRID = (3, 4)
CHUNK, N_LAYERS, N_READING, N_HEADS, N_STEPS = 10, 5, 2, 4, 4
WORDS, AMONG, IMAGES = (0, 4), (1, 3), (2,)  # what the layers of the action head see

loaded, preprocessor, policy, batch = family_fixtures("groot_policy")


def model_of(policy):
    return adapter_for(policy).policy._groot_model


class GrootContract(SmallPolicyContract):
    cuts_pictures = True
    can_block = False

    def first_camera(self, policy, batch):
        return TOP

    def breaks_at(self, base):
        return base._groot_model.action_head.action_decoder


class TestGroot(GrootContract):
    pass


@pytest.fixture(scope="module")
def in_bfloat16(groot_policy):
    """As LeRobot runs it by default: weights in float32, under autocast."""
    return groot_policy(use_bf16=True)[0]


class TestGrootInBfloat16(GrootContract):
    is_bfloat16 = True

    @pytest.fixture
    def policy(self, in_bfloat16):
        in_bfloat16.reset()
        return in_bfloat16


@pytest.fixture(scope="module")
def wrapped(groot_policy):
    peft = pytest.importorskip("peft")
    targets = r".*(action_head\.model|vl_self_attention)\..*\.(to_q|to_v)"
    return peft.get_peft_model(groot_policy()[0], peft.LoraConfig(r=2, target_modules=targets)).eval()


class TestGrootWithLora(GrootContract):
    @pytest.fixture
    def policy(self, wrapped):
        wrapped.reset()
        return wrapped


def in_the_layouts_order(policy, batch):
    """Where in the prompt the layout's prefix stands, (batch, prefix): images, then all else."""
    is_image = batch["input_ids"].numpy() == model_of(policy).backbone.model.config.image_token_id
    return np.stack([np.concatenate([np.flatnonzero(row), np.flatnonzero(~row)]) for row in is_image])


@contextmanager
def noted_queries_and_keys(layers):
    """Note queries and keys of attention modules, from their projections: (batch, head, token, dim)."""
    noted, handles = [], []

    def note(module, args, kwargs):
        tokens = args[0]
        other = kwargs.get("encoder_hidden_states")

        def heads(projection, given):
            weight = projection.weight.detach().double().numpy()
            bias = 0 if projection.bias is None else projection.bias.detach().double().numpy()
            projected = given.double().numpy() @ weight.T + bias
            return projected.reshape(*given.shape[:2], N_HEADS, -1).transpose(0, 2, 1, 3)

        noted.append((heads(module.to_q, tokens), heads(module.to_k, tokens if other is None else other)))

    for layer in layers:
        handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def softmax(query, key, may_see):
    """(head, query, key) in float64, over the keys that may be seen."""
    scores = np.where(may_see, query @ key.swapaxes(1, 2) * query.shape[-1] ** -0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("is_alternate", [True, False])
def test_stored_softmax_equals_an_independent_one(groot_policy, is_alternate):
    """Queries and keys from the projections' own weights, softmaxed in float64 by numpy."""
    policy, preprocessor, _ = groot_policy(is_alternate=is_alternate)
    batch = preprocessor(raw_observation())
    head = model_of(policy).action_head
    reading = [block.attn1 for block in head.vl_self_attention.transformer_blocks]
    acting = [block.attn1 for block in head.model.transformer_blocks]
    with noted_queries_and_keys(reading) as in_prefix, noted_queries_and_keys(acting) as in_suffix:
        record = captured(policy, batch)
    assert (len(in_prefix), len(in_suffix)) == (N_READING, N_LAYERS * N_STEPS)
    order = in_the_layouts_order(policy, batch)
    n_prefix = order.shape[1]
    is_image = batch["input_ids"].numpy() == model_of(policy).backbone.model.config.image_token_id
    is_there = batch["attention_mask"].numpy().astype(bool)
    assert is_there.sum(1).min() < n_prefix, "no row is padded"
    close = {"rtol": 2**-10, "atol": 4e-6}
    for row in range(2):
        for layer, (query, key) in enumerate(in_prefix):
            true = softmax(query[row], key[row], may_see=True)[:, order[row]][..., order[row]]
            np.testing.assert_allclose(record.prefix_attention[layer, row], true, **close)
        for number, (query, key) in enumerate(in_suffix):
            step, layer = divmod(number, N_LAYERS)
            found = record.suffix_attention[step, layer, row]
            if layer in AMONG:
                true = softmax(query[row], key[row], may_see=True)
                np.testing.assert_allclose(found[..., n_prefix:], true, **close)
                assert not found[..., :n_prefix].any()
                continue
            may_see = is_there[row] & (is_image[row] if layer in IMAGES else ~is_image[row])
            true = softmax(query[row], key[row], may_see if is_alternate else np.array(True))
            np.testing.assert_allclose(found[..., :n_prefix], true[..., order[row]], **close)
            assert np.isnan(found[..., n_prefix:]).all()
    assert record.layers_seeing_suffix == set(AMONG)
    seen = "2" if is_alternate else "0, 2, 4"
    assert adapter_for(policy).describe().remark == f"layers that see images: {seen}"


def test_maps_differ_so_that_a_mixed_up_index_shows(policy, batch):
    record = captured(policy, batch)
    n_prefix = record.layout.prefix_len
    suffix = record.suffix_attention.astype(np.float32)
    for maps in (
        record.prefix_attention.astype(np.float32),
        suffix[:, AMONG, ..., n_prefix:],
        suffix[:, WORDS + IMAGES, ..., :n_prefix],
    ):
        for axis in range(maps.ndim):
            assert np.abs(np.diff(maps, axis=axis)).max() > 0.01, axis


def test_kinds_are_what_the_tokens_are(policy, batch):
    """What pads a row is read by the action head's attention over the prompt, and so is no padding."""
    record = captured(policy, batch)
    n_prefix = batch["input_ids"].shape[1]
    assert [(segment.kind, segment.name, len(segment)) for segment in record.layout.segments] == [
        *(("image", TOP, 12), ("image", WRIST, 12), ("language", "language", n_prefix - 24)),
        *(("state", "state", 1), ("action", "action", CHUNK)),
    ]
    assert record.layout.prefix_len == n_prefix
    assert record.key_mask.all()
    assert not (record.key_kind == Kind.PADDING).any()
    n_padding = int((batch["attention_mask"][1] == 0).sum())
    padding = slice(24, 24 + n_padding)
    assert n_padding > 0
    assert record.prefix_attention[:, 1][..., padding].max() > 0.001
    assert not np.nan_to_num(record.suffix_attention[:, :, 1][..., padding]).any()


def test_without_attention_over_the_prompt_padding_is_padding(groot_policy):
    policy, preprocessor, _ = groot_policy(n_reading=0)
    assert adapter_for(policy).describe().n_prefix_layers == 0
    batch = preprocessor(raw_observation())
    record = captured(policy, batch, AttentionConfig(layers="all"))
    n_padding = (batch["attention_mask"] == 0).sum(1).tolist()
    assert max(n_padding) > 0
    assert (record.key_kind == Kind.PADDING).sum(1).tolist() == n_padding


def test_attention_over_the_prompt_with_other_heads_is_left_out(groot_policy):
    policy, preprocessor, _ = groot_policy(reading_heads=2)
    sizes = adapter_for(policy).describe()
    assert (sizes.n_prefix_layers, sizes.n_heads) == (0, N_HEADS)
    record = captured(policy, preprocessor(raw_observation()), AttentionConfig(layers="all"))
    assert record.key_mask.all()
    assert record.suffix_attention.shape[:4] == (N_STEPS, N_LAYERS, 2, N_HEADS)


@contextmanager
def given_to(policy):
    """Note what Qwen3-VL's layers and the action head are given, in each call: (batch, token, dim)."""
    noted = {"prefix": [], "suffix": []}
    model = model_of(policy)
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, noted=noted[part], name=name: noted.append(
                kwargs[name].detach().clone()
            ),
            with_kwargs=True,
        )
        for part, module, name in (
            ("prefix", model.backbone.language_model, "inputs_embeds"),
            ("suffix", model.action_head.model, "hidden_states"),
        )
    ]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def test_segments_are_where_the_policy_put_them(policy, preprocessor, batch):
    """Change one input at a time: exactly the tokens change that the layout says are its."""
    layout, order = captured(policy, batch).layout, in_the_layouts_order(policy, batch)
    raw = raw_observation()
    changes = {
        TOP: {TOP: raw[TOP] * 0.5},
        WRIST: {WRIST: raw[WRIST] * 0.5},
        "language": {"task": ["put the bowl on the stove", "open the plate"]},
        "state": {"observation.state": raw["observation.state"] * 0.5},
    }
    for name, other in changes.items():
        with given_to(policy) as given:
            act(policy, batch, 0)
            act(policy, preprocessor({**raw, **other}), 0)
        first = torch.cat([given["prefix"][0], given["suffix"][0]], dim=1)
        second = torch.cat([given["prefix"][1], given["suffix"][N_STEPS]], dim=1)
        changed = (second - first).abs().amax(dim=2).numpy() > 0
        (segment,) = [one for one in layout.segments if one.name == name]
        for row in range(2):
            places = np.concatenate([order[row], np.arange(layout.prefix_len, layout.n_keys)])
            found = np.flatnonzero(changed[row, places])
            assert segment.start <= found.min() <= found.max() < segment.stop, name
            assert len(found) == len(segment) if name != "language" else 0 < len(found) < 8, name


def crops(**settings):
    return {"image_target_size": [96, 96], "image_crop_size": [86, 86], **settings}


GEOMETRIES = {
    "as they are": (SIZE, None),
    "another shape": ((150, 70), None),
    "a square": ((96, 128), crops(letter_box_transform=True)),
    "upright in a square": ((150, 70), crops(letter_box_transform=True, crop_fraction=0.8)),
    "by OpenCV": ((90, 150), crops(use_albumentations=True, crop_fraction=0.8, shortest_image_edge=100)),
    "by OpenCV in a square": ((90, 150), crops(use_albumentations=True, letter_box_transform=True)),
    "without a crop": ((96, 96), {"image_target_size": [96, 160], "crop_fraction": 1.0}),
}


@pytest.mark.parametrize("camera", [TOP, WRIST])
@pytest.mark.parametrize(("size", "pictures"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_planted_object_lands_in_the_right_patch(groot_policy, camera, size, pictures):
    """A bright square changes its own cell most: a vision tower without attention mixes nothing."""
    policy, preprocessor, _ = groot_policy(size=size, pictures=pictures)
    for block in model_of(policy).backbone.visual.blocks:
        block.attn.forward = lambda hidden_states, **_: torch.zeros_like(hidden_states)
    side = max(3, max(size) // 20)
    index, found_cells = [TOP, WRIST].index(camera), set()
    for y, x in ((0.16, 0.16), (0.3, 0.45), (0.5, 0.6), (0.42, 0.3), (0.8, 0.8)):
        top, left = int(y * size[0]), int(x * size[1])
        raw = raw_observation(2, size=size)
        for name in (TOP, WRIST):
            raw[name].fill_(0.2)
        batch = preprocessor(raw)
        raw[camera][1, :, top : top + side, left : left + side] = 1
        with given_to(policy) as given, capture_attention(policy, AttentionConfig()) as capture:
            act(policy, batch, 0)
            act(policy, preprocessor(raw), 0)
        before, after = capture.drain()
        assert before.layout == after.layout, "what is assumed of pictures is not what was done"
        change = (given["prefix"][1] - given["prefix"][0]).norm(dim=-1).numpy()
        assert not change[0].any()
        key = int(change[1, in_the_layouts_order(policy, batch)[1]].argmax())
        rows, columns = after.layout.key_patch()
        assert after.layout.key_camera()[key] == index
        geometry = after.layout.cameras[index].geometry
        found = (int(rows[key]), int(columns[key]))
        assert found == geometry.patch_at(top + side / 2, left + side / 2)
        found_cells.add(found)
    assert len(found_cells) >= 3


def test_what_is_cut_off_is_not_seen(policy, preprocessor, batch):
    raw = raw_observation()
    raw[TOP][:, :, :2] = 1 - raw[TOP][:, :, :2]
    raw[TOP][..., -2:] = 1 - raw[TOP][..., -2:]
    assert torch.equal(act(policy, preprocessor(raw), 0)[0], act(policy, batch, 0)[0])
    geometry = captured(policy, batch).layout.cameras[0].geometry
    assert (geometry.pad_top_px, geometry.resized_height_px, geometry.input_height_px) == (-5, 96, 86)


def test_opencvs_way_keeps_the_pictures_shape(groot_policy):
    size, pictures = GEOMETRIES["by OpenCV"]
    policy, preprocessor, _ = groot_policy(size=size, pictures=pictures)
    geometry = captured(policy, preprocessor(raw_observation(size=size))).layout.cameras[0].geometry
    assert geometry == ImageGeometry(90, 150, 100, 167, -10, -17, 80, 133, 3, 5)


def test_pictures_of_another_size_than_the_configs_are_noted(policy, preprocessor):
    """And without the preprocessor in the context the config's size is all that is known."""
    with capture_attention(policy, AttentionConfig()) as capture:
        act(policy, preprocessor(raw_observation(size=(64, 80))), 0)
    (record,) = capture.drain()
    seen = [(one.geometry.height_px, one.geometry.width_px) for one in record.layout.cameras]
    assert seen == [(64, 80), (64, 80)]
    outside = captured(policy, preprocessor(raw_observation(size=(64, 80)))).layout.cameras[0].geometry
    assert (outside.height_px, outside.width_px) == SIZE


def test_the_preprocessor_is_left_as_it_was(policy, preprocessor, batch):
    classes = (GrootN17PackInputsStep, GrootN17VLMEncodeStep)
    before = [dict(vars(one)) for one in classes]
    with capture_attention(policy, EVERYTHING):
        assert [dict(vars(one)) for one in classes] != before
        again = preprocessor(raw_observation())
    assert [dict(vars(one)) for one in classes] == before
    assert torch.equal(again["pixel_values"], batch["pixel_values"])


def test_earlier_frames_are_special_and_cameras_in_the_checkpoints_order(groot_policy):
    modalities = {"video": {"delta_indices": [-1, 0], "modality_keys": ["wrist", "top"]}}
    policy, preprocessor, _ = groot_policy(
        pictures={**crops(), "modality_configs": {"new_embodiment": modalities}}
    )
    raw = raw_observation()
    batch = preprocessor(raw)
    layout = captured(policy, batch).layout
    assert [(one.kind, one.name, len(one)) for one in layout.segments[:4]] == [
        *(("special", "earlier image 1", 9), ("special", "earlier image 2", 9)),
        *(("image", WRIST, 9), ("image", TOP, 9)),
    ]
    with given_to(policy) as given:
        act(policy, batch, 0)
        act(policy, preprocessor({**raw, WRIST: raw[WRIST] * 0.5}), 0)
    changed = (given["prefix"][1] - given["prefix"][0]).abs().amax(dim=2).numpy()[0] > 0
    found = np.flatnonzero(changed[in_the_layouts_order(policy, batch)[0]])
    assert found.tolist() == [*range(9), *range(18, 27)]


def test_images_that_nobody_can_name_are_special(policy, preprocessor):
    batch = preprocessor({**raw_observation(), "observation.images.third": torch.rand(2, 3, *SIZE)})
    layout = captured(policy, batch).layout
    assert [(one.kind, one.name) for one in layout.segments[:3]] == [
        ("special", f"image {number}") for number in (1, 2, 3)
    ]
    assert layout.cameras == ()


def test_a_checkpoints_own_preprocessor_says_what_is_done_to_pictures(groot_policy, tmp_path):
    """It may have been trained with other settings than the base that its config names."""
    policy, preprocessor, _ = groot_policy()
    (step,) = [one for one in preprocessor.steps if isinstance(one, GrootN17VLMEncodeStep)]
    before, step.crop_fraction = step.crop_fraction, 0.5
    try:
        preprocessor.save_pretrained(tmp_path, config_filename="policy_preprocessor.json")
        from lerobot.processor import PolicyProcessorPipeline

        PolicyProcessorPipeline([]).save_pretrained(tmp_path, config_filename="policy_postprocessor.json")
        policy.config.pretrained_path = tmp_path
        geometry = captured(policy, preprocessor(raw_observation())).layout.cameras[0].geometry
    finally:
        step.crop_fraction = before
    assert (geometry.pad_top_px, geometry.input_height_px) == (-24, 48)


def test_unlike_images_are_refused(policy, batch):
    grids = batch["image_grid_thw"].clone()
    grids[2] = grids.new_tensor([1, 8, 6])
    with (
        capture_attention(policy, EVERYTHING),
        pytest.raises(CaptureError, match=r"^groot: images of a batch's rows have unlike grids"),
    ):
        act(policy, {**batch, "image_grid_thw": grids}, 0)


@pytest.mark.parametrize("action", [0, 1, 5, 9])
def test_query_i_is_action_i(policy, batch, action, monkeypatch):
    """Disturb one action's noise: in the first layer, which mixes no actions, its row alone changes."""
    config = AttentionConfig(layers=[0], denoise_steps=[0])
    first = captured(policy, batch, config)
    draw = torch.randn

    def disturbed(*args, **kwargs):
        noise = draw(*args, **kwargs)
        noise[:, action] += 3
        return noise

    monkeypatch.setattr(torch, "randn", disturbed)
    second = captured(policy, batch, config)
    change = np.abs(second.suffix_attention.astype(np.float32) - first.suffix_attention)
    change = np.nanmax(change[0, 0], axis=(0, 1, 3))
    query = first.layout.query_of_action(action)
    assert change.argmax() == query == action + 1
    assert np.delete(change, query).max() == 0 < change[query]


def test_a_layer_without_keys_of_the_prompt_cannot_be_made_to_see_it(policy, batch):
    (site,) = [Site("expert", 1)]
    editor = Editor(lambda value: value.flip(-1), sites=[site])
    with (
        capture_attention(policy, AttentionConfig(), probes=[(editor, [site])]),
        pytest.raises(
            CaptureError, match=r"^expert\.1\.attention: a probe lets actions attend to the"
        ) as said,
    ):
        act(policy, batch, 0)
    assert "\n" not in str(said.value)


def test_an_edit_among_the_actions_acts(policy, batch):
    """Of the keys that the layer sees it may be anything."""

    def to_the_state_alone(value):
        value = torch.zeros_like(value)
        value[..., -CHUNK - 1] = 1
        return value

    actions, _ = act(policy, batch, 0)
    sites = [Site("expert", layer) for layer in AMONG]
    editor = Editor(to_the_state_alone, sites=sites)
    with capture_attention(policy, EVERYTHING, probes=[(editor, sites)]) as capture:
        assert not torch.equal(act(policy, batch, 0)[0], actions)
    (record,) = capture.drain()
    assert (record.suffix_attention[:, AMONG, ..., record.layout.prefix_len] == 1).all()


def test_the_models_whole_chunk_is_recorded(groot_policy):
    """LeRobot returns its head alone, where the config has fewer actions than the model."""
    policy, preprocessor, _ = groot_policy(horizon=12)
    batch = preprocessor(raw_observation())
    policy.reset()
    with capture_attention(policy, EVERYTHING) as capture, torch.inference_mode():
        torch.manual_seed(0)
        handed_out = policy.predict_action_chunk(batch)
    (record,) = capture.drain()
    assert (handed_out.shape, record.action_chunk.shape) == ((2, 4, 6), (2, 12, 6))
    np.testing.assert_array_equal(record.action_chunk[:, :4], handed_out.numpy())
    assert record.executed_queries == slice(1, 5)
    assert len(record.layout.actions) == adapter_for(policy).describe().chunk_size == 12


def test_real_time_chunking_is_recorded(policy, batch):
    def chunk(**options):
        torch.manual_seed(0)
        return policy.predict_action_chunk(batch, **options)

    options = {"inference_delay": 1, "prev_chunk_left_over": torch.ones(2, 6, 6) * 0.5}
    expected = chunk(**options)
    assert not torch.equal(chunk(), expected)
    with capture_attention(policy, EVERYTHING) as capture:
        assert torch.equal(chunk(**options), expected)
    (record,) = capture.drain()
    assert record.flow_time.tolist() == [1, 0.75, 0.5, 0.25]
    np.testing.assert_array_equal(record.action_chunk[:, :4], expected.numpy())


def test_training_goes_on_unrecorded(policy, batch):
    target = {**batch, "action": torch.zeros(2, CHUNK, 8), "action_mask": torch.ones(2, CHUNK, 8)}
    training_goes_on_unrecorded(policy, batch, target)
    watcher, told = Watcher(), []
    watcher.denoise_step = told.append
    with adapter_for(policy).observe(watcher, attention_sites(policy), compiled=False):
        policy.forward(target)
        assert (told, watcher.values) == ([], {})
        act(policy, batch, 0)
    assert told == [1, 0.75, 0.5, 0.25]


def test_words_are_labelled(policy, preprocessor, batch):
    record = captured(policy, batch, AttentionConfig(), tokenizer=find_tokenizer(preprocessor))
    language = record.layout.language
    kinds = record.key_kind[:, language.start : language.stop]
    for env, task in enumerate(TASKS):
        pieces, labels = record.prompts[env]
        for word, text in enumerate(task.split()):
            assert "".join(np.array(pieces)[labels.word == word]).strip() == text
        assert labels.word.max() == len(task.split()) - 1
        marks = np.isin(pieces, ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"])
        assert marks.sum() == 2 + 2 * 2
        assert (kinds[env][marks] == Kind.TEMPLATE).all()
        assert (kinds[env] == Kind.TASK).sum() == (labels.word >= 0).sum()
    assert record.prompt_truncated.tolist() == [False, False]


def test_the_tokenizer_of_a_preprocessor_that_has_not_run_is_found(groot_policy):
    assert find_tokenizer(groot_policy()[1]) is not None


@pytest.mark.parametrize(
    ("prompt", "task"),
    [
        ("<|im_start|>user\n<|vision_start|><|vision_end|>open it<|im_end|>\n", "open it"),
        (
            "<|endoftext|><|im_start|>user\n<|vision_end|><|vision_start|><|vision_end|>a\nb<|im_end|>\n",
            "a\nb",
        ),
        ("<|im_start|>user\n<|vision_start|><|vision_end|><|im_end|>", ""),
        ("<|im_start|>user\nopen it<|im_end|>\n", None),
        ("open it", None),
    ],
)
def test_prompts_are_read_as_they_are_written(policy, prompt, task):
    parsed = adapter_for(policy).parse_prompt(prompt)
    if task is None:
        assert parsed is None
        return
    assert [prompt[span.start : span.stop] for span in parsed.spans] == task.split()
    assert {span.kind for span in parsed.spans} <= {Kind.TASK}
    assert parsed.is_truncated is False


def test_another_task_is_told(policy):
    another_task_is_told(policy)


def test_compiled_is_refused(policy):
    compiled_is_refused(policy, "groot")


def test_pictures_that_somebody_put_back_into_the_batch_are_its_views(policy, batch):
    adapter, pictures = adapter_for(policy), raw_observation()
    assert adapter.camera_views(batch) == {}
    views = adapter.camera_views({**batch, TOP: pictures[TOP]})
    assert list(views) == [TOP]
    expected = (pictures[TOP].permute(0, 2, 3, 1) * 255).round()
    assert torch.equal(views[TOP].float(), expected)


@pytest.mark.parametrize("n", [1, 3])
def test_any_batch_size(policy, preprocessor, n):
    record = captured(policy, preprocessor(raw_observation(n)))
    assert record.suffix_attention.shape[2] == record.batch_size == n


@pytest.fixture(scope="module")
def run(tmp_path_factory, groot_policy):
    return record_own_loop(tmp_path_factory.mktemp("groot_run"), *groot_policy())


def test_a_recording_says_what_the_policy_attends_to(run):
    for number, episode in enumerate(open_run(run)):
        data = episode.dataset
        assert (episode.is_complete, episode.n_frames, data.sizes["inference"]) == (True, 8, 2)
        assert data.frame_query.values.tolist() == [*range(1, 5)] * 2
        assert set(episode.videos) == {TOP, WRIST}
        shares = modality_share(data, frame=0).compute()
        assert shares.modality.values.tolist() == [TOP, WRIST, "task", "state", "template", "actions"]
        assert shares.sum() == pytest.approx(1, abs=1e-3)
        by_layer = {layer: modality_share(data, frame=0, layer=layer).compute() for layer in range(N_LAYERS)}
        for layer, share in by_layer.items():
            parts = dict(zip(share.modality.values.tolist(), np.nan_to_num(share.values), strict=True))
            seen = parts[TOP] + parts[WRIST], parts["task"] + parts["template"], parts["actions"]
            expected = 0 if layer in IMAGES else 1 if layer in WORDS else 2
            assert np.delete(seen, expected).max() == 0 < seen[expected]
        # Unless another layer is chosen, the last that sees images.
        shown, last = (image_heatmap(data, "wrist", frame=3, **which) for which in ({}, {"layer": -1}))
        assert shown.shape == last.shape == GRID
        assert shown.max() > 0 == last.max()
        assert attention(data, frame=3).attrs["layer"].startswith("layer 2")
        assert attention(data, frame=3, query=3, layer=None).attrs["layer"].startswith("layer 2")
        assert attention(data, frame=1).attrs["query"] == "action 1, executed at the frame"
        assert text_to_image(data, camera="wrist", inference=0).sizes["grid_y"] == GRID[0]
        assert episode.task == TASKS[number]
        assert not [check for check in verify_episode(episode).checks if check.status == "failed"]
        assert episode.attributes["input_checks"] == [], "none failed"


def test_rollout_and_flow_are_refused(run):
    data = open_run(run)[0].dataset
    for of in (attention_rollout, attention_flow):
        with pytest.raises(SelectionError, match="all layers of groot come after the last prefix layer"):
            of(data, frame=0)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_plot_is_drawn(run, kind):
    plot_is_drawn(run, kind)


def test_commands_take_the_recording(run, tmp_path):
    facts = "groot, attention in float32, 5 layers, 4 heads, 4 denoise steps"
    commands_take(run, tmp_path, {"inspect": facts, "overlay": "Wrote"})


def test_the_explorer_serves_the_recording(run):
    facts = explorer_serves(run, N_HEADS)
    assert (facts["policy_remark"], facts["shown_layer"]) == ("layers that see images: 2", 2)


def test_pictures_show_the_last_layer_that_sees_images(run, tmp_path):
    episode = open_run(run)[0]
    for kind in ("image", "combined"):
        said = " ".join(text.get_text() for text in plot(episode, kind).findobj(Text))
        assert "layer 2" in said, kind
    frames = list(overlay_frames(episode, OverlaySettings(frames=[0])))
    plain = list(overlay_frames(episode, OverlaySettings(frames=[0], layer=2)))
    np.testing.assert_array_equal(frames, plain)
