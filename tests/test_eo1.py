"""EO-1: the contract, each way in which a map could be wrong, and a recording of it to the last picture."""

from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from adapter_contract import act  # noqa: E402
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
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: E402

from lerobot_attn import open_run  # noqa: E402
from lerobot_attn.analysis import attention, image_heatmap, modality_share  # noqa: E402
from lerobot_attn.analysis.prefix import text_to_image  # noqa: E402
from lerobot_attn.analysis.propagation import attention_rollout  # noqa: E402
from lerobot_attn.capture import capture_attention, find_tokenizer  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.errors import ConfigError  # noqa: E402
from lerobot_attn.layout import Kind  # noqa: E402
from lerobot_attn.plot.kinds import KINDS  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402
from lerobot_attn.verify import verify_episode  # noqa: E402

CHUNK, N_LAYERS, N_HEADS, N_STEPS = 10, 3, 4, 4

loaded, preprocessor, policy, batch = family_fixtures("eo1_policy")


class EO1Contract(SmallPolicyContract):
    cuts_pictures = True
    can_block = False

    def breaks_at(self, base):
        return base.model.action_out_proj


class TestEO1(EO1Contract):
    pass


@pytest.fixture(scope="module")
def eager(eo1_policy):
    return eo1_policy(attn_implementation="eager")[0]


class TestEO1WithEagerAttention(EO1Contract):
    @pytest.fixture
    def policy(self, eager):
        eager.reset()
        return eager


@pytest.fixture(scope="module")
def in_bfloat16(eo1_policy):
    return eo1_policy(dtype="bfloat16")[0]


class TestEO1InBfloat16(EO1Contract):
    is_bfloat16 = True

    @pytest.fixture
    def policy(self, in_bfloat16):
        in_bfloat16.reset()
        return in_bfloat16


@pytest.fixture(scope="module")
def wrapped(eo1_policy):
    peft = pytest.importorskip("peft")
    targets = r".*language_model.*\.(q_proj|v_proj)"
    return peft.get_peft_model(eo1_policy()[0], peft.LoraConfig(r=2, target_modules=targets)).eval()


class TestEO1WithLora(EO1Contract):
    @pytest.fixture
    def policy(self, wrapped):
        wrapped.reset()
        return wrapped


def in_the_layouts_order(policy, batch):
    """Where in the conversation the layout's prefix stands, (batch, prefix), by the kinds of its tokens."""
    ids = batch["input_ids"].numpy()
    start = int((ids[0] == batch["action_token_id"]).argmax())
    is_image = ids[:, :start] == policy.model.vlm_backbone.config.image_token_id
    is_state = ids[:, :start] == batch["state_token_id"]
    is_word = ~is_image & ~is_state
    return np.stack(
        [
            np.concatenate([np.flatnonzero(part) for part in (is_image[row], is_word[row], is_state[row])])
            for row in range(len(ids))
        ]
    )


def test_stored_softmax_equals_an_independent_one(policy, batch, monkeypatch):
    """Queries and keys of the very pass, softmaxed in float64 by numpy, against the captured maps."""
    rotate, pairs = modeling_qwen2_5_vl.apply_multimodal_rotary_pos_emb, []

    def noted(*args):
        query, key = rotate(*args)
        pairs.append((query.detach().double().numpy(), key.detach().double().numpy()))
        return query, key

    monkeypatch.setattr(modeling_qwen2_5_vl, "apply_multimodal_rotary_pos_emb", noted)
    record = captured(policy, batch)
    assert len(pairs) == N_LAYERS * (1 + N_STEPS)
    order = in_the_layouts_order(policy, batch)
    n_prefix = order.shape[1]
    may_see = batch["attention_mask"].numpy()[:, : n_prefix + CHUNK].astype(bool)

    def softmax(query, key, row, first):
        """(head, query, key) of one row, whose queries are the tokens from `first` on."""
        key = key[row].repeat(N_HEADS // key.shape[1], axis=0)
        scores = query[row] @ key.swapaxes(1, 2) * query.shape[-1] ** -0.5
        tokens = np.arange(key.shape[1])
        seen = (tokens[None] <= tokens[first:, None]) & may_see[row, : len(tokens)]
        weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        with np.errstate(invalid="ignore"):  # padding sees nothing
            return np.nan_to_num(weights / weights.sum(-1, keepdims=True))

    for layer in range(N_LAYERS):
        query, key = pairs[layer]
        for row in range(2):
            true = softmax(query, key, row, 0)[:, order[row]][..., order[row]]
            true[:, ~may_see[row, order[row]]] = 0  # padding is no query
            np.testing.assert_allclose(record.prefix_attention[layer][row], true, rtol=2**-10, atol=4e-6)
    keys = np.concatenate([order, np.tile(n_prefix + np.arange(CHUNK), (2, 1))], axis=1)
    for number, (query, key) in enumerate(pairs[N_LAYERS:]):
        step, layer = divmod(number, N_LAYERS)
        whole = np.concatenate([pairs[layer][1], key], axis=2)
        for row in range(2):
            true = softmax(query, whole, row, n_prefix)[..., keys[row]]
            np.testing.assert_allclose(
                record.suffix_attention[step, layer, row], true, rtol=2**-10, atol=4e-6
            )


def test_maps_differ_so_that_a_mixed_up_index_shows(policy, batch):
    record = captured(policy, batch)
    for maps in (record.suffix_attention, record.prefix_attention):
        for axis in range(maps.ndim):
            assert np.abs(np.diff(maps.astype(np.float32), axis=axis)).max() > 0.01, axis


def test_a_row_is_the_same_alone_and_behind_padding(policy, preprocessor, batch):
    """The shorter task's tokens are shifted by padding in a batch, and not when it is asked alone."""
    raw = raw_observation()
    alone = preprocessor(
        {key: value[1:] for key, value in raw.items() if key != "task"} | {"task": list(TASKS[1:])}
    )
    n_padding = int((batch["attention_mask"][1] == 0).sum())
    assert n_padding > 0
    assert alone["input_ids"].shape[1] == batch["input_ids"].shape[1] - n_padding
    config = AttentionConfig(layers="all", prefix_layers="all", denoise_steps=[0])
    same_noise = torch.rand(1, CHUNK, 8, generator=torch.Generator().manual_seed(3))
    policy.model.sample_noise = lambda shape, device: same_noise.expand(shape)
    try:
        both, one = captured(policy, batch, config), captured(policy, alone, config)
    finally:
        del policy.model.sample_noise
    is_there = both.key_mask[1]
    kept = np.flatnonzero(is_there)
    assert len(kept) == one.layout.n_keys
    np.testing.assert_allclose(
        both.suffix_attention[:, :, 1][..., kept], one.suffix_attention[:, :, 0], atol=2e-3
    )
    inside = kept[kept < both.layout.prefix_len]
    np.testing.assert_allclose(
        both.prefix_attention[:, 1][:, :, inside][..., inside], one.prefix_attention[:, 0], atol=2e-3
    )
    np.testing.assert_array_equal(both.key_kind[1][kept], one.key_kind[0])


def test_kinds_are_what_the_tokens_are(policy, batch):
    record = captured(policy, batch)
    expected = {"image": Kind.IMAGE, "state": Kind.STATE, "action": Kind.ACTION}
    assert [segment.kind for segment in record.layout.segments] == [
        *("image", "image", "language", "state", "action")
    ]
    for segment in record.layout.segments:
        kinds = record.key_kind[:, segment.start : segment.stop]
        if segment.kind in expected:
            assert (kinds == expected[segment.kind]).all(), segment
        else:
            n_padding = (batch["attention_mask"] == 0).sum(1).tolist()
            assert (kinds == Kind.PADDING).sum(1).tolist() == n_padding == [0, max(n_padding)]
    assert record.layers_seeing_suffix == {0, 1, 2}


@contextmanager
def given_to(policy):
    """Note what the language model is given, in each call: (batch, token, dim)."""
    given = []
    handle = policy.model.vlm_backbone.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"].detach().clone()), with_kwargs=True
    )
    try:
        yield given
    finally:
        handle.remove()


def test_segments_are_where_the_policy_put_them(policy, preprocessor, batch):
    """Change one input at a time: exactly the tokens change that the layout says are its."""
    layout, order = captured(policy, batch).layout, in_the_layouts_order(policy, batch)
    other_word = batch["input_ids"].clone()
    word = int((other_word[0] == batch["action_token_id"]).int().argmax()) - 8
    other_word[:, word] += 1
    changes = {
        TOP: preprocessor({**(raw := raw_observation()), TOP: raw[TOP] * 0.5}),
        WRIST: preprocessor({**raw, WRIST: raw[WRIST] * 0.5}),
        "state": {**batch, "observation.state": batch["observation.state"] * 0.5},
        "language": {**batch, "input_ids": other_word},
    }
    for name, other in changes.items():
        with given_to(policy) as given:
            act(policy, batch, 0)
            act(policy, other, 0)
        changed = (given[1 + N_STEPS] - given[0]).abs().amax(dim=2).numpy() > 0
        (segment,) = [one for one in layout.segments if one.name == name]
        for row in range(2):
            found = np.flatnonzero(changed[row, order[row]])
            assert segment.start <= found.min() <= found.max() < segment.stop
            assert len(found) == (1 if name == "language" else len(segment)), name


GEOMETRIES = {
    "as they are": (SIZE, {}),
    "another shape": ((150, 70), {}),
    "few cells": ((200, 200), {"image_max_pixels": 5 * 28 * 28}),
}


@pytest.mark.parametrize("camera", [TOP, WRIST])
@pytest.mark.parametrize(("size", "settings"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_planted_object_lands_in_the_right_patch(eo1_policy, camera, size, settings):
    """A bright square changes its own cell and no other: the vision tower has no layers that would mix."""
    policy, preprocessor, _ = eo1_policy(size=size, **settings)
    policy.model.vlm_backbone.model.visual.blocks = torch.nn.ModuleList()
    side = 3
    for y, x in ((2, 2), (size[0] // 2, size[1] // 3), (size[0] - side - 2, size[1] - side - 2)):
        raw = raw_observation(2, size=size)
        for name in (TOP, WRIST):
            raw[name].fill_(0.2)
        batch = preprocessor(raw)
        raw[camera][1, :, y : y + side, x : x + side] = 1
        with given_to(policy) as given:
            act(policy, batch, 0)
            layout = captured(policy, preprocessor(raw)).layout
        change = (given[1 + N_STEPS] - given[0]).norm(dim=-1).numpy()
        assert not change[0].any()
        key = int(change[1, in_the_layouts_order(policy, batch)[1]].argmax())
        index = [TOP, WRIST].index(camera)
        rows, columns = layout.key_patch()
        assert layout.key_camera()[key] == index
        geometry = layout.cameras[index].geometry
        assert (rows[key], columns[key]) == geometry.patch_at(y + side / 2, x + side / 2)
        assert geometry.grid_rows * geometry.grid_columns == len(layout.segments[index])


@pytest.mark.parametrize("action", [0, 1, 5, 9])
def test_query_i_is_action_i(policy, batch, action):
    """Disturb one action's noise: in the first layer its row alone changes, among the keys of no action."""
    config = AttentionConfig(layers=[0], denoise_steps=[0])
    first = captured(policy, batch, config)
    draw = policy.model.sample_noise

    def disturbed(shape, device):
        noise = draw(shape, device)
        noise[:, action] += 3
        return noise

    policy.model.sample_noise = disturbed
    try:
        second = captured(policy, batch, config)
    finally:
        del policy.model.sample_noise
    layout, maps = first.layout, []
    for record in (first, second):
        rows = record.suffix_attention[0, 0].astype(np.float64)[..., : layout.actions.start]
        maps.append(rows / rows.sum(-1, keepdims=True))
    change = np.abs(maps[1] - maps[0]).max(axis=(0, 1, 3))
    query = layout.query_of_action(action)
    assert change.argmax() == query == action
    assert np.delete(change, query).max() < 2e-3 < change[query]


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
        marks = np.isin(pieces, ["<|im_start|>", "<|vision_start|>", "<|state_start|>", "<|vla|>"])
        assert marks.sum() == 3 + 2 + 1 + 1
        assert (kinds[env][marks] == Kind.TEMPLATE).all()
        assert pieces[-1] == "<|action_start|>"
    assert record.prompt_truncated.tolist() == [False, False]


@pytest.mark.parametrize(
    ("prompt", "task", "is_cut"),
    [
        ("<|im_start|>user\n<|state_start|><|state_end|>open it<|vla|><|im_end|>", "open it", False),
        ("<|state_end|>open\nit, please<|vla|>", "open\nit, please", False),
        ("<|state_end|>open i", "open i", True),
        ("<|state_end|><|vla|>", "", False),
        ("open it", None, None),
    ],
)
def test_prompts_are_read_as_they_are_written(policy, prompt, task, is_cut):
    parsed = adapter_for(policy).parse_prompt(prompt)
    if task is None:
        assert parsed is None
        return
    assert [prompt[span.start : span.stop] for span in parsed.spans] == task.split()
    assert parsed.is_truncated is is_cut


def test_another_task_is_told(policy):
    another_task_is_told(policy)


def test_compiled_is_refused(policy):
    compiled_is_refused(policy, "eo1")


def test_a_vision_tower_that_is_not_recorded_is_refused(policy):
    with (
        pytest.raises(ConfigError, match=r"vision_layers"),
        capture_attention(policy, AttentionConfig(vision_layers=[0])),
    ):
        pass


def test_training_goes_on_unrecorded(policy, preprocessor, batch):
    target = preprocessor({**raw_observation(), "action": torch.zeros(2, CHUNK, 6)})
    target["action_is_pad"] = torch.zeros(2, CHUNK, dtype=torch.bool)
    training_goes_on_unrecorded(policy, batch, target)


def test_a_conversation_without_actions_is_lerobots_error(policy, batch):
    ids = batch["input_ids"].clone()
    ids[ids == batch["action_token_id"]] = 7
    with capture_attention(policy, EVERYTHING) as capture:
        with pytest.raises(ValueError, match="must contain exactly 10 action tokens"):
            act(policy, {**batch, "input_ids": ids}, 0)
        act(policy, batch, 0)
    assert len(capture.records) == 1


def test_without_their_pictures_cells_have_no_place(policy, batch):
    """Nobody can tell then how large they were. The attention is the same."""
    cut = {key: value for key, value in batch.items() if key != WRIST}
    whole, found = captured(policy, batch), captured(policy, cut)
    assert [(one.kind, one.name, len(one)) for one in found.layout.segments[:2]] == [
        *(("special", f"image {number}", 15) for number in (1, 2))
    ]
    assert found.layout.cameras == ()
    assert (found.key_kind[:, :30] == Kind.SPECIAL).all()
    np.testing.assert_array_equal(found.suffix_attention, whole.suffix_attention)


@pytest.mark.parametrize("n", [1, 3])
def test_any_batch_size(policy, preprocessor, n):
    record = captured(policy, preprocessor(raw_observation(n)))
    assert record.suffix_attention.shape[2] == record.batch_size == n


@pytest.fixture(scope="module")
def run(tmp_path_factory, eo1_policy):
    return record_own_loop(tmp_path_factory.mktemp("eo1"), *eo1_policy())


def test_a_recording_says_what_the_policy_attends_to(run):
    for number, episode in enumerate(open_run(run)):
        data = episode.dataset
        assert (episode.is_complete, episode.n_frames, data.sizes["inference"]) == (True, 8, 2)
        assert data.frame_query.values.tolist() == [*range(4)] * 2
        assert set(episode.videos) == {TOP, WRIST}
        shares = modality_share(data, frame=0).compute()
        assert shares.modality.values.tolist() == [TOP, WRIST, "task", "state", "template", "actions"]
        assert shares.sum() == pytest.approx(1, abs=1e-3)
        assert image_heatmap(data, "wrist", frame=3).shape == (3, 5)
        assert attention(data, frame=1).attrs["query"] == "action 1, executed at the frame"
        words = text_to_image(data, inference=0)
        assert words["label"].values.tolist() == TASKS[number].split()
        assert attention_rollout(data, inference=0, query=0).sum() == pytest.approx(1, abs=1e-2)
        assert not [check for check in verify_episode(episode).checks if check.status == "failed"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_plot_is_drawn(run, kind):
    plot_is_drawn(run, kind)


def test_commands_take_the_recording(run, tmp_path):
    commands_take(run, tmp_path, {"inspect": "float32, 3 layers, 4 heads, 4 denoise steps"})


def test_the_explorer_serves_the_recording(run):
    explorer_serves(run, N_HEADS)
