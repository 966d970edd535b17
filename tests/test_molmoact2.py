"""MolmoAct2: the contract, each way in which a map could be wrong, and a recording to the last picture."""

import json
from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from adapter_contract import act  # noqa: E402
from lerobot.policies.molmoact2.molmoact2_hf_model import modeling_molmoact2 as hf  # noqa: E402
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
from lerobot_attn.errors import CaptureError, ConfigError, SelectionError  # noqa: E402
from lerobot_attn.layout import Kind  # noqa: E402
from lerobot_attn.plot.kinds import KINDS  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402
from lerobot_attn.verify import verify_episode  # noqa: E402

GRID = (3, 4)
CHUNK, N_LAYERS, N_HEADS, N_STEPS = 10, 3, 4, 4

loaded, preprocessor, policy, batch = family_fixtures("molmoact2_policy")


class MolmoAct2Contract(SmallPolicyContract):
    cuts_pictures = True
    can_block = False

    def breaks_at(self, base):
        return base._action_expert().final_layer


class TestMolmoAct2(MolmoAct2Contract):
    pass


@pytest.fixture(scope="module")
def eager(molmoact2_policy):
    return molmoact2_policy(attention="eager")[0]


class TestMolmoAct2WithEagerAttention(MolmoAct2Contract):
    @pytest.fixture
    def policy(self, eager):
        eager.reset()
        return eager


@pytest.fixture(scope="module")
def in_bfloat16(molmoact2_policy):
    """With square images: on a CPU the positions of others cannot be resized in bfloat16."""
    return molmoact2_policy(model_dtype="bfloat16", input_px=(84, 84))


class TestMolmoAct2InBfloat16(MolmoAct2Contract):
    is_bfloat16 = True

    @pytest.fixture
    def policy(self, in_bfloat16):
        in_bfloat16[0].reset()
        return in_bfloat16[0]

    @pytest.fixture
    def preprocessor(self, in_bfloat16):
        return in_bfloat16[1]

    @pytest.fixture
    def batch(self, preprocessor):
        return preprocessor(raw_observation())


@pytest.fixture(scope="module")
def wrapped(molmoact2_policy):
    peft = pytest.importorskip("peft")
    targets = r".*(transformer\.blocks.*att_proj|cross_attn\.q_proj)"
    return peft.get_peft_model(molmoact2_policy()[0], peft.LoraConfig(r=2, target_modules=targets)).eval()


class TestMolmoAct2WithLora(MolmoAct2Contract):
    @pytest.fixture
    def policy(self, wrapped):
        wrapped.reset()
        return wrapped


@pytest.fixture(scope="module")
def with_own_lora(molmoact2_policy):
    pytest.importorskip("peft")
    return molmoact2_policy(enable_lora_vlm=True, lora_rank=2)[0].eval()


class TestMolmoAct2WithLeRobotsLora(MolmoAct2Contract):
    """LeRobot wraps the language model in PEFT, inside the policy."""

    @pytest.fixture
    def policy(self, with_own_lora):
        with_own_lora.reset()
        return with_own_lora


def in_the_layouts_order(policy, batch):
    """Where in the prompt the layout's prefix stands, (batch, prefix): images, crops, marks, words."""
    ids, config = batch["input_ids"].numpy(), policy._backbone().config
    low_res = ids == config.low_res_image_start_token_id
    is_start = low_res | (ids == config.image_start_token_id)
    is_mark = is_start | np.isin(ids, [config.image_end_token_id, config.image_col_id])
    block = is_start.cumsum(1)  # of an image with crops the whole is one, the crops are the next
    place = np.where(block % 2 == 1, block, 100 + block) if low_res.any() else block
    place = np.where(ids == config.image_patch_id, place, np.where(is_mark, 1000, 1001))
    return place.argsort(axis=1, kind="stable")


def softmax(scores, may_see):
    """(head, query, key) of scores, over the keys that may be seen."""
    weights = np.exp(np.where(may_see, scores - scores.max(-1, keepdims=True), -np.inf))
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(weights / weights.sum(-1, keepdims=True))


@contextmanager
def noted_queries_and_keys(policy, monkeypatch):
    """Note queries and keys of the passes: (batch, head, token, dim) in float64."""
    rotate, pairs, crossed = hf.apply_rotary_pos_emb, [], []

    def rotated(*args, **kwargs):
        query, key = rotate(*args, **kwargs)
        pairs.append((query.double().numpy(), key.double().numpy()))
        return query, key

    def on_cross(module, args, given):
        found["key"] = module._as_heads(given["kv_k"]).transpose(1, 2).double().numpy()

    def on_query(module, args, output):
        crossed.append((output.double().numpy(), found["key"]))

    found = {}
    monkeypatch.setattr(hf, "apply_rotary_pos_emb", rotated)
    handles = []
    for block in policy._action_expert().blocks:
        handles.append(block.cross_attn.register_forward_pre_hook(on_cross, with_kwargs=True))
        handles.append(block.cross_attn.q_norm.register_forward_hook(on_query))
    try:
        yield pairs, crossed
    finally:
        monkeypatch.undo()
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def with_crops(molmoact2_policy):
    return molmoact2_policy(crops=True, input_px=(84, 84), max_sequence_length=1024)


@pytest.mark.parametrize(("side", "images"), [("right", "whole"), ("left", "whole"), ("left", "crops")])
def test_stored_softmax_equals_an_independent_one(loaded, with_crops, monkeypatch, side, images):
    """Queries and keys of the very pass, softmaxed in float64 by numpy, against the captured maps."""
    policy, preprocessor, _ = with_crops if images == "crops" else loaded
    batch = padded_on(side, preprocessor)
    with noted_queries_and_keys(policy, monkeypatch) as (pairs, crossed):
        record = captured(policy, batch)
    assert (len(pairs), len(crossed)) == (N_LAYERS, N_LAYERS * N_STEPS)
    order = in_the_layouts_order(policy, batch)
    n_prefix = order.shape[1]
    ids = batch["input_ids"].numpy()
    is_there = batch["attention_mask"].numpy().astype(bool)
    is_image = batch["token_type_ids"].numpy().astype(bool)
    tokens = np.arange(n_prefix)
    is_end = ids == policy._backbone().config.eos_token_id  # the first token too, which the expert leaves out
    # LeRobot's processor says of padding on the right that it is there; it ends a text, and so the expert
    # does not see it.
    n_padding = is_there[1].argmax() if side == "left" else is_end[1].sum() - 1
    assert n_padding > 0
    assert (is_end & is_there).sum(1).tolist() == [1, 1 if side == "left" else 1 + n_padding]
    for row in range(2):
        causal = (tokens[None] <= tokens[:, None]) | (is_image[row][None] & is_image[row][:, None])
        for layer, (query, key) in enumerate(pairs):
            whole = key[row].repeat(N_HEADS // key.shape[1], axis=0)
            scores = query[row] @ whole.swapaxes(1, 2) * query.shape[-1] ** -0.5
            true = softmax(scores, causal & is_there[row])[:, order[row]][..., order[row]]
            true[:, ~is_there[row, order[row]]] = 0  # padding is no query
            np.testing.assert_allclose(record.prefix_attention[layer][row], true, rtol=2**-10, atol=4e-6)
        for number, (query, key) in enumerate(crossed):
            step, layer = divmod(number, N_LAYERS)
            scores = query[row] @ key[row].swapaxes(1, 2) * query.shape[-1] ** -0.5
            true = softmax(scores, (is_there & ~is_end)[row][None])[..., order[row]]
            np.testing.assert_allclose(
                record.suffix_attention[step, layer, row, ..., :n_prefix], true, rtol=2**-10, atol=4e-6
            )
    assert np.isnan(record.suffix_attention[..., n_prefix:]).all()
    assert record.layers_seeing_suffix == set()


def padded_on(side, preprocessor, tasks=TASKS):
    (step,) = [one for one in preprocessor.steps if hasattr(one, "processor")]
    tokenizer = step.processor.tokenizer
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        return preprocessor(raw_observation(tasks=tasks))
    finally:
        tokenizer.padding_side = before


def test_maps_differ_so_that_a_mixed_up_index_shows(policy, batch):
    record = captured(policy, batch)
    suffix = record.suffix_attention[..., : record.layout.prefix_len]
    for maps in (suffix, record.prefix_attention):
        for axis in range(maps.ndim):
            assert np.abs(np.diff(maps.astype(np.float32), axis=axis)).max() > 0.01, axis


@pytest.mark.parametrize("side", ["right", "left"])
def test_kinds_are_what_the_tokens_are(policy, preprocessor, side):
    batch = padded_on(side, preprocessor)
    record = captured(policy, batch)
    expected = {"image": Kind.IMAGE, "special": Kind.SPECIAL, "action": Kind.ACTION}
    assert [(segment.kind, len(segment)) for segment in record.layout.segments] == [
        *(("image", 12), ("image", 12), ("special", 2 * (1 + 3 + 1))),
        *(("language", batch["input_ids"].shape[1] - 34), ("action", CHUNK)),
    ]
    for segment in record.layout.segments:
        kinds = record.key_kind[:, segment.start : segment.stop]
        if segment.kind in expected:
            assert (kinds == expected[segment.kind]).all(), segment
        else:
            n_padding = (batch["attention_mask"] == 0).sum(1).tolist()
            assert (kinds == Kind.PADDING).sum(1).tolist() == n_padding
            # Padding on the right is read by the language model: it is none.
            assert (max(n_padding) > 0) == (side == "left")


@contextmanager
def given_to(policy):
    """Note what the language model is given, in each call: (batch, token, dim)."""
    given = []
    handle = policy._backbone().transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"].detach().clone()), with_kwargs=True
    )
    try:
        yield given
    finally:
        handle.remove()


def test_segments_are_where_the_policy_put_them(policy, preprocessor, batch):
    """Change one input at a time: exactly the tokens change that the layout says are its."""
    layout, order = captured(policy, batch).layout, in_the_layouts_order(policy, batch)
    raw = raw_observation()
    changes = {
        TOP: preprocessor({**raw, TOP: raw[TOP] * 0.5}),
        WRIST: preprocessor({**raw, WRIST: raw[WRIST] * 0.5}),
        "language": preprocessor({**raw, "observation.state": raw["observation.state"] * 0.5}),
    }
    for name, other in changes.items():
        with given_to(policy) as given:
            act(policy, batch, 0)
            act(policy, other, 0)
        changed = (given[1] - given[0]).abs().amax(dim=2).numpy() > 0
        (segment,) = [one for one in layout.segments if one.name == name]
        for row in range(2):
            found = np.flatnonzero(changed[row, order[row]])
            assert segment.start <= found.min() <= found.max() < segment.stop
            assert len(found) == len(segment) if name != "language" else 0 < len(found) <= 6, name


GEOMETRIES = {"as they are": SIZE, "another shape": (150, 70), "small": (40, 60)}


@pytest.mark.parametrize("camera", [TOP, WRIST])
@pytest.mark.parametrize("size", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_planted_object_lands_in_the_right_patch(molmoact2_policy, camera, size):
    """A bright square changes its own cell most: a vision tower without attention mixes nothing."""
    policy, preprocessor, _ = molmoact2_policy(size=size)
    for block in policy._backbone().vision_backbone.image_vit.transformer.resblocks:
        block.attention.forward = torch.zeros_like
    side = max(3, max(size) // 20)
    inside = (int(size[0] * 28 / 70) - side - 1, int(size[1] * 28 / 98) - side - 1)  # the first cell's corner
    for y, x in ((2, 2), inside, (size[0] // 2, size[1] // 3), (size[0] - side - 2, size[1] - side - 2)):
        raw = raw_observation(2, size=size)
        for name in (TOP, WRIST):
            raw[name].fill_(0.2)
        batch = preprocessor(raw)
        raw[camera][1, :, y : y + side, x : x + side] = 1
        with given_to(policy) as given:
            act(policy, batch, 0)
            layout = captured(policy, preprocessor(raw)).layout
        change = (given[1] - given[0]).norm(dim=-1).numpy()
        assert not change[0].any()
        key = int(change[1, in_the_layouts_order(policy, batch)[1]].argmax())
        index = [TOP, WRIST].index(camera)
        rows, columns = layout.key_patch()
        assert layout.key_camera()[key] == index
        geometry = layout.cameras[index].geometry
        assert (rows[key], columns[key]) == geometry.patch_at(y + side / 2, x + side / 2)
        assert (geometry.grid_rows, geometry.grid_columns) == GRID


def test_cameras_stand_in_the_prompts_order(molmoact2_policy):
    """`image_keys` says which camera is first in the prompt, whatever the config's features are."""
    policy, preprocessor, _ = molmoact2_policy(image_keys=[WRIST, TOP])
    raw = raw_observation()
    batch = preprocessor(raw)
    layout = captured(policy, batch).layout
    assert [segment.name for segment in layout.segments[:2]] == [WRIST, TOP]
    with given_to(policy) as given:
        act(policy, batch, 0)
        act(policy, preprocessor({**raw, WRIST: raw[WRIST] * 0.5}), 0)
    changed = (given[1] - given[0]).abs().amax(dim=2).numpy()[0] > 0
    assert np.flatnonzero(changed[in_the_layouts_order(policy, batch)[0]]).tolist() == [*range(12)]


def test_pictures_of_other_names_stand_in_the_order_of_their_names(policy, preprocessor):
    raw = raw_observation()
    raw["observation.images.b"], raw["observation.images.a"] = raw.pop(TOP), raw.pop(WRIST)
    layout = captured(policy, preprocessor(raw)).layout
    assert [camera.name for camera in layout.cameras] == ["observation.images.a", "observation.images.b"]


def test_another_order_in_the_checkpoints_statistics_is_refused(molmoact2_policy, batch, tmp_path):
    policy, *_ = molmoact2_policy()
    metadata = {"metadata_by_tag": {"arm": {"camera_keys": [WRIST, TOP]}}}
    (tmp_path / "norm_stats.json").write_text(json.dumps(metadata))
    policy.config.checkpoint_path, policy.config.norm_tag = str(tmp_path), "arm"
    with (
        pytest.raises(ConfigError, match=r"^image_keys: got none, and norm_tag 'arm' has cameras in another"),
        capture_attention(policy, EVERYTHING),
    ):
        pass
    policy.config.image_keys = [TOP, WRIST]
    captured(policy, batch)


def test_crops_of_an_image_are_special(with_crops):
    """Of an image that is cut besides being resized, the whole is the camera's grid."""
    policy, preprocessor, _ = with_crops
    raw = raw_observation()
    batch = preprocessor(raw)
    layout = captured(policy, batch).layout
    parts = [(segment.kind, segment.name) for segment in layout.segments]
    crops = [("special", f"crops of {name}") for name in (TOP, WRIST)]
    assert parts[:5] == [("image", TOP), ("image", WRIST), *crops, ("special", "marks of images")]
    whole, cropped = layout.segments[1], layout.segments[3]
    assert len(whole) == 9 < len(cropped)
    order = in_the_layouts_order(policy, batch)[0]
    with given_to(policy) as given:
        act(policy, batch, 0)
        act(policy, preprocessor({**raw, WRIST: raw[WRIST] * 0.5}), 0)
    changed = np.flatnonzero((given[1] - given[0]).abs().amax(dim=2).numpy()[0, order] > 0)
    assert changed.tolist() == [*range(whole.start, whole.stop), *range(cropped.start, cropped.stop)]


def test_pictures_that_the_batch_lacks_are_refused(policy, batch):
    without = {name: value for name, value in batch.items() if name != WRIST}
    with (
        capture_attention(policy, EVERYTHING),
        pytest.raises(CaptureError, match=r"the prompt has 2 images, the batch pictures of "),
    ):
        act(policy, without, 0)


def test_tokens_that_are_no_grid_of_patches_are_refused(policy, batch):
    mixed = {**batch, "image_token_pooling": batch["image_token_pooling"].flip(0)}
    with (
        capture_attention(policy, EVERYTHING),
        pytest.raises(CaptureError, match=r"the tokens of observation\.images\.top are not a grid"),
    ):
        act(policy, mixed, 0)


@pytest.mark.parametrize("action", [0, 1, 5, 9])
def test_query_i_is_action_i(policy, batch, action, monkeypatch):
    """Disturb one action's noise where nothing mixes actions before the first cross-attention."""
    config = AttentionConfig(layers=[0], denoise_steps=[0])
    monkeypatch.setattr(policy._action_expert().blocks[0].self_attn, "forward", lambda x, **_: x * 0)
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
    assert change.argmax() == query == action
    assert np.delete(change, query).max() == 0 < change[query]


def test_the_whole_chunk_is_recorded_and_its_head_is_executed(policy, batch):
    policy.reset()
    with capture_attention(policy, EVERYTHING) as capture, torch.inference_mode():
        torch.manual_seed(0)
        handed_out = policy.predict_action_chunk(batch)
    (record,) = capture.drain()
    assert (handed_out.shape, record.action_chunk.shape) == ((2, 4, 6), (2, CHUNK, 6))
    np.testing.assert_array_equal(record.action_chunk[:, :4], handed_out.numpy())


def test_a_language_model_with_other_heads_is_left_out(molmoact2_policy):
    policy, preprocessor, _ = molmoact2_policy(expert_heads=2)
    assert (adapter_for(policy).describe().n_prefix_layers, adapter_for(policy).describe().n_heads) == (0, 2)
    record = captured(policy, preprocessor(raw_observation()), AttentionConfig(layers="all"))
    assert record.suffix_attention.shape[:4] == (N_STEPS, N_LAYERS, 2, 2)
    seen = record.suffix_attention[..., : record.layout.prefix_len].astype(np.float32)
    np.testing.assert_allclose(seen.sum(-1), 1, atol=2e-3)


def test_real_time_chunking_is_recorded(molmoact2_policy, batch):
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy, *_ = molmoact2_policy(rtc_config=RTCConfig(enabled=True, execution_horizon=4))
    leftover = torch.zeros(2, CHUNK, 32)
    options = {"inference_delay": 1, "prev_chunk_left_over": leftover, "execution_horizon": 4}
    torch.manual_seed(0)
    expected = policy.predict_action_chunk(batch, **options)
    with capture_attention(policy, EVERYTHING) as capture:
        torch.manual_seed(0)
        assert torch.equal(policy.predict_action_chunk(batch, **options), expected)
    (record,) = capture.drain()
    assert record.flow_time.tolist() == [1, 0.75, 0.5, 0.25]
    np.testing.assert_array_equal(record.action_chunk[:, :4], expected.numpy())


def test_the_last_layers_prefix_pass_is_read_by_nobody(policy):
    sites = adapter_for(policy).sites()
    assert [str(site) for site, info in sites.items() if not info.reaches_actions] == ["vlm.2.attention"]


def test_words_are_labelled(policy, preprocessor, batch):
    record = captured(policy, batch, AttentionConfig(), tokenizer=find_tokenizer(preprocessor))
    language = record.layout.language
    kinds = record.key_kind[:, language.start : language.stop]
    for env, task in enumerate(TASKS):
        pieces, labels = record.prompts[env]
        for word, text in enumerate(task.split()):
            assert "".join(np.array(pieces)[labels.word == word]).strip() == text
        assert labels.word.max() == len(task.split()) - 1
        states = [pieces[int(np.flatnonzero(labels.state_dim == number)[0])] for number in range(6)]
        shown = ((batch["observation.state"][env] + 1) / 2 * 15).round().int().tolist()
        assert states == [f"<state_{number}>" for number in shown]
        marks = np.isin(pieces, ["<|im_start|>", "<state_start>", "<setup_start>", "<action_output>"])
        assert marks.sum() == 2 + 1 + 1 + 1
        assert (kinds[env][marks] == Kind.TEMPLATE).all()
    assert record.prompt_truncated.tolist() == [False, False]


@pytest.mark.parametrize(
    ("prompt", "task", "state"),
    [
        (
            "The task is to open it. The setup is . The current state of the robot is "
            "<state_start><state_3><state_12><state_end>. The expected control mode is <control_start>",
            "open it",
            ["<state_3>", "<state_12>"],
        ),
        ("The task is to open\nit. The setup is a. The expected control mode is b", "open\nit", []),
        ("The task is to . The setup is . The expected control mode is .", "", []),
        ("open it", None, None),
    ],
)
def test_prompts_are_read_as_they_are_written(policy, prompt, task, state):
    parsed = adapter_for(policy).parse_prompt(prompt)
    if task is None:
        assert parsed is None
        return
    texts = [(span.kind, prompt[span.start : span.stop]) for span in parsed.spans]
    assert texts == [(Kind.TASK, word) for word in task.split()] + [(Kind.STATE, one) for one in state]
    assert parsed.is_truncated is False


def test_another_task_is_told(policy):
    another_task_is_told(policy)


def test_compiled_is_refused(policy):
    compiled_is_refused(policy, "molmoact2")


def test_decoding_actions_as_tokens_is_refused(molmoact2_policy, batch):
    policy, *_ = molmoact2_policy()
    with capture_attention(policy, EVERYTHING) as capture:
        with pytest.raises(ConfigError, match=r"^inference_action_mode: got 'discrete', whose") as said:
            policy.predict_action_chunk(batch, inference_action_mode="discrete")
        assert "\n" not in str(said.value)
        act(policy, batch, 0)
    assert len(capture.records) == 1
    policy.config.inference_action_mode = "discrete"
    with (
        pytest.raises(ConfigError, match=r"not captured; expected 'continuous'$"),
        capture_attention(policy, EVERYTHING),
    ):
        pass


def test_a_policy_without_an_action_expert_is_refused(policy, monkeypatch):
    monkeypatch.setitem(policy._backbone()._modules, "action_expert", None)
    with pytest.raises(ConfigError, match=r"^inference_action_mode: got 'discrete'"):
        adapter_for(policy)


def test_a_graph_that_was_captured_before_is_not_run(policy, batch, monkeypatch):
    """On a GPU LeRobot replays a graph, which calls no module; it is told to use it again afterwards."""
    graphs = policy._backbone().action_cuda_graph_manager
    assert graphs is not None
    monkeypatch.setattr(graphs, "can_use_action_flow", lambda inputs: True)
    monkeypatch.setattr(graphs, "run_action_flow", lambda *args: pytest.fail("the graph was run"))
    assert captured(policy, batch).suffix_attention.shape[0] == N_STEPS
    with pytest.raises(pytest.fail.Exception, match="the graph was run"):
        act(policy, batch, 0)


def test_training_goes_on_unrecorded(policy, preprocessor, batch):
    target = preprocessor({**raw_observation(), "action": torch.zeros(2, CHUNK, 6)})
    training_goes_on_unrecorded(policy, batch, target)


@pytest.mark.parametrize("n", [1, 3])
def test_any_batch_size(policy, preprocessor, n):
    record = captured(policy, preprocessor(raw_observation(n)))
    assert record.suffix_attention.shape[2] == record.batch_size == n


@pytest.fixture(scope="module")
def run(tmp_path_factory, molmoact2_policy):
    return record_own_loop(tmp_path_factory.mktemp("molmoact2_run"), *molmoact2_policy())


def test_a_recording_says_what_the_policy_attends_to(run):
    for number, episode in enumerate(open_run(run)):
        data = episode.dataset
        assert (episode.is_complete, episode.n_frames, data.sizes["inference"]) == (True, 8, 2)
        assert data.frame_query.values.tolist() == [*range(4)] * 2
        assert set(episode.videos) == {TOP, WRIST}
        shares = modality_share(data, frame=0).compute()
        assert shares.modality.values.tolist()[:5] == [TOP, WRIST, "task", "state", "template"]
        assert shares.sum() == pytest.approx(1, abs=1e-3)
        assert image_heatmap(data, "wrist", frame=3).shape == GRID
        assert attention(data, frame=1).attrs["query"] == "action 1, executed at the frame"
        words = text_to_image(data, inference=0)
        assert words["label"].values.tolist() == TASKS[number].split()
        assert not [check for check in verify_episode(episode).checks if check.status == "failed"]


@pytest.mark.parametrize("function", [attention_rollout, attention_flow])
def test_attention_is_not_followed_without_the_actions_own(run, function):
    with pytest.raises(SelectionError, match=r"among themselves, which is not recorded of molmoact2"):
        function(open_run(run)[0].dataset, inference=0, query=0)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_plot_is_drawn(run, kind):
    plot_is_drawn(run, kind, {"actions": "no action attends to another"})


def test_commands_take_the_recording(run, tmp_path):
    commands_take(
        run, tmp_path, {"inspect": "molmoact2, attention in float32, 3 layers, 4 heads, 4 denoise steps"}
    )


def test_the_explorer_serves_the_recording(run):
    explorer_serves(run, N_HEADS)
