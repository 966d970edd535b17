"""EVO-1: the contract, each way in which a map could be wrong, and a recording of it to the last picture."""

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

from lerobot_attn import open_run  # noqa: E402
from lerobot_attn.analysis import attention, image_heatmap, modality_share  # noqa: E402
from lerobot_attn.capture import capture_attention  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.errors import UnsupportedPolicyError  # noqa: E402
from lerobot_attn.layout import Kind  # noqa: E402
from lerobot_attn.plot.kinds import KINDS  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402
from lerobot_attn.verify import verify_episode  # noqa: E402

CHUNK, N_LAYERS, N_HEADS, N_STEPS, N_CELLS = 10, 3, 4, 4, 9

loaded, preprocessor, policy, batch = family_fixtures("evo1_policy")


class EVO1Contract(SmallPolicyContract):
    can_block = False

    def breaks_at(self, base):
        return base.model.action_head.norm_out


class TestEVO1(EVO1Contract):
    pass


@pytest.fixture(scope="module")
def in_bfloat16(evo1_policy):
    return evo1_policy(vlm_dtype="bfloat16")[0].to(torch.bfloat16)


class TestEVO1InBfloat16(EVO1Contract):
    is_bfloat16 = True

    @pytest.fixture
    def policy(self, in_bfloat16):
        in_bfloat16.reset()
        return in_bfloat16


@pytest.fixture(scope="module")
def wrapped(evo1_policy):
    peft = pytest.importorskip("peft")
    targets = r".*language_model.*\.(q_proj|v_proj)"
    return peft.get_peft_model(evo1_policy()[0], peft.LoraConfig(r=2, target_modules=targets)).eval()


class TestEVO1WithLora(EVO1Contract):
    @pytest.fixture
    def policy(self, wrapped):
        wrapped.reset()
        return wrapped


@contextmanager
def given_to(policy):
    """Note what the first block is given in each step: (actions, keys, mask), each (batch, token, …)."""
    given = []
    handle = policy.model.action_head.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args: given.append((args[0].detach(), args[1].detach(), args[3]))
    )
    try:
        yield given
    finally:
        handle.remove()


@contextmanager
def prompts_of(policy):
    """Note the prompts' token ids, (batch, token)."""
    ids = []
    handle = policy.model.embedder.model.register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True
    )
    try:
        yield ids
    finally:
        handle.remove()


def in_the_layouts_order(policy, batch):
    """Where among the head's keys the layout's prefix stands, (batch, prefix), by the kinds of its tokens."""
    with prompts_of(policy) as prompts:
        act(policy, batch, 0)
    ids = prompts[0].numpy()
    is_image = ids == policy.model.embedder.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return np.stack(
        [np.concatenate([np.flatnonzero(row), np.flatnonzero(~row), [ids.shape[1]]]) for row in is_image]
    )


def test_stored_softmax_equals_an_independent_one(policy, batch):
    """Queries and keys from the projections' own weights, softmaxed in float64 by numpy."""
    given = []

    def note(module, args, kwargs):
        given.append((args[0].double().numpy(), args[1].double().numpy(), kwargs["key_padding_mask"].numpy()))

    blocks = policy.model.action_head.transformer_blocks
    handles = [block.attn.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        record = captured(policy, batch)
    finally:
        for handle in handles:
            handle.remove()
    order = in_the_layouts_order(policy, batch)
    n_prefix = order.shape[1]
    assert record.layout.prefix_len == n_prefix
    assert len(given) == N_STEPS * N_LAYERS
    for number, (actions, context, is_masked) in enumerate(given):
        step, layer = divmod(number, N_LAYERS)
        attn = blocks[layer].attn
        weights = attn.in_proj_weight.detach().double().numpy().reshape(3, 32, 32)
        biases = attn.in_proj_bias.detach().double().numpy().reshape(3, 32)

        def heads(tokens, part, weights=weights, biases=biases):
            projected = tokens @ weights[part].T + biases[part]
            return projected.reshape(*tokens.shape[:2], N_HEADS, -1).transpose(0, 2, 1, 3)

        scores = heads(actions, 0) @ heads(context, 1).swapaxes(2, 3) * 8**-0.5
        scores = np.where(is_masked[:, None, None], -np.inf, scores)
        true = np.exp(scores - scores.max(-1, keepdims=True))
        true /= true.sum(-1, keepdims=True)
        for row in range(2):
            found = record.suffix_attention[step, layer, row]
            expected = true[row][..., order[row]]
            np.testing.assert_allclose(found[..., :n_prefix], expected, rtol=2**-10, atol=4e-6)
            assert np.isnan(found[..., n_prefix:]).all(), "no action sees another"


def test_maps_differ_so_that_a_mixed_up_index_shows(policy, batch):
    maps = captured(policy, batch).suffix_attention[..., :-CHUNK].astype(np.float32)
    for axis in range(maps.ndim):
        assert np.abs(np.diff(maps, axis=axis)).max() > 0.01, axis


def test_kinds_are_what_the_tokens_are(policy, batch):
    record = captured(policy, batch)
    assert [(segment.kind, len(segment)) for segment in record.layout.segments][:2] == [
        ("image", N_CELLS)
    ] * 2
    assert [segment.kind for segment in record.layout.segments][2:] == ["language", "state", "action"]
    expected = {"image": Kind.IMAGE, "state": Kind.STATE, "action": Kind.ACTION}
    with given_to(policy) as given:
        act(policy, batch, 0)
    order, mask = in_the_layouts_order(policy, batch), given[0][2].numpy()
    for segment in record.layout.segments:
        kinds = record.key_kind[:, segment.start : segment.stop]
        if segment.kind in expected:
            assert (kinds == expected[segment.kind]).all(), segment
        else:
            masked = [mask[row, order[row, segment.start : segment.stop]] for row in range(2)]
            np.testing.assert_array_equal(kinds == Kind.PADDING, masked)
            assert np.sum(masked) > 0
    assert record.layers_seeing_suffix == set()
    assert adapter_for(policy).describe().n_prefix_layers == 0


def test_segments_are_where_the_policy_put_them(policy, batch):
    """Change one input at a time: the first of the keys that change is the first that the layout says is its.

    The language model is causal: what comes behind a token in the prompt changes with it, and nothing before.
    """
    layout, order = captured(policy, batch).layout, in_the_layouts_order(policy, batch)
    changes = {
        TOP: {TOP: batch[TOP] * 0.5},
        WRIST: {WRIST: batch[WRIST] * 0.5},
        "state": {"observation.state": batch["observation.state"] * 0.5},
    }
    for name, other in changes.items():
        with given_to(policy) as given:
            act(policy, batch, 0)
            act(policy, {**batch, **other}, 0)
        changed = (given[N_STEPS][1] - given[0][1]).abs().amax(dim=2).numpy() > 1e-5
        (segment,) = [one for one in layout.segments if one.name == name]
        for row in range(2):
            found = np.flatnonzero(changed[row])
            assert found.min() == order[row, segment.start]
            if name == "state":
                assert found.tolist() == [order[row, segment.start]]


@pytest.mark.parametrize("camera", [TOP, WRIST])
@pytest.mark.parametrize("size", [SIZE, (150, 70), (84, 84)])
def test_a_planted_object_lands_in_the_right_patch(evo1_policy, camera, size):
    """A bright square changes its own cell most: the vision tower has no layers that would mix.

    The language model would: what is compared is what it is given.
    """
    policy, preprocessor, _ = evo1_policy(size=size)
    model = policy.model.embedder.model
    model.vision_tower.encoder.layer = torch.nn.ModuleList()
    given = []
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"].detach().clone()), with_kwargs=True
    )
    side = min(size) // 14
    for y, x in ((2, 2), (size[0] // 2, size[1] // 6), (size[0] - side - 2, size[1] - side - 2)):
        raw = raw_observation(2, size=size)
        for name in (TOP, WRIST):
            raw[name].fill_(0.2)
        batch = preprocessor(raw)
        raw[camera] = raw[camera].clone()
        raw[camera][1, :, y : y + side, x : x + side] = 1
        order = in_the_layouts_order(policy, batch)
        given.clear()
        act(policy, batch, 0)
        layout = captured(policy, preprocessor(raw)).layout
        change = (given[1] - given[0]).norm(dim=-1).numpy()
        assert not change[0].any()
        key = int(change[1, order[1, :-1]].argmax())
        index = [TOP, WRIST].index(camera)
        rows, columns = layout.key_patch()
        assert layout.key_camera()[key] == index
        geometry = layout.cameras[index].geometry
        assert (rows[key], columns[key]) == geometry.patch_at(y + side / 2, x + side / 2)


@pytest.mark.parametrize("action", [0, 1, 5, 9])
def test_query_i_is_action_i(policy, batch, action):
    """Disturb one action as the head is given it: in the first layer its row alone changes."""

    def disturb(module, args):
        tokens = args[0].clone()
        tokens[:, action] = tokens[:, action].flip(-1)
        return (tokens, *args[1:])

    config = AttentionConfig(layers=[0], denoise_steps=[0])
    first = captured(policy, batch, config)
    handle = policy.model.action_head.transformer_blocks[0].register_forward_pre_hook(disturb)
    try:
        second = captured(policy, batch, config)
    finally:
        handle.remove()
    maps = [record.suffix_attention[0, 0, ..., :-CHUNK].astype(np.float64) for record in (first, second)]
    change = np.abs(maps[1] - maps[0]).max(axis=(0, 1, 3))
    query = first.layout.query_of_action(action)
    assert change.argmax() == query == action
    assert not np.delete(change, query).any()


def test_words_are_labelled_by_the_policys_own_tokenizer(policy, batch):
    record = captured(policy, batch, AttentionConfig())
    language = record.layout.language
    kinds = record.key_kind[:, language.start : language.stop]
    for env, task in enumerate(TASKS):
        pieces, labels = record.prompts[env]
        for word, text in enumerate(task.split()):
            assert "".join(np.array(pieces)[labels.word == word]).strip() == text
        assert labels.word.max() == len(task.split()) - 1
        marks = np.isin(pieces, ["<img>", "</img>"])
        assert marks.sum() == 4
        assert (kinds[env][marks] == Kind.TEMPLATE).all()


@pytest.mark.parametrize(
    ("prompt", "task", "is_cut"),
    [
        ("Image-1: <img></img>\nopen it<pad><pad>", "open it", False),
        ("Image-1: <img></img>\nImage-2: <img></img>\nopen\nit", "open\nit", None),
        ("Image-1: <img></img>\nopen it<|endoftext|>", "open it", False),
        ("Image-1: <img></img>\n", "", None),
    ],
)
def test_prompts_are_read_as_they_are_written(policy, prompt, task, is_cut):
    parsed = adapter_for(policy).parse_prompt(prompt)
    assert [prompt[span.start : span.stop] for span in parsed.spans] == task.split()
    assert parsed.is_truncated is is_cut


def test_a_view_without_a_camera_is_padding(evo1_policy):
    policy, preprocessor, _ = evo1_policy(max_views=3)
    record = captured(policy, preprocessor(raw_observation()))
    assert [segment.kind for segment in record.layout.segments] == [
        *("image", "image", "padding", "language", "state", "action")
    ]
    empty = record.layout.segments[2]
    assert (empty.name, len(empty)) == ("view 3 without an image", N_CELLS)
    assert (record.key_kind[:, empty.start : empty.stop] == Kind.PADDING).all()
    assert not record.suffix_attention[..., empty.start : empty.stop].any()


def test_one_pooled_token_is_refused(evo1_policy):
    with pytest.raises(
        UnsupportedPolicyError, match=r"^evo1 with return_cls_only=true: the actions attend to"
    ):
        adapter_for(evo1_policy(return_cls_only=True)[0])


def test_another_task_is_told(policy):
    another_task_is_told(policy)


def test_compiled_is_refused(policy):
    compiled_is_refused(policy, "evo1")


def test_training_goes_on_unrecorded(policy, batch):
    target = {**batch, "action": torch.zeros(2, CHUNK, 6)}
    training_goes_on_unrecorded(policy, batch, target)


@pytest.mark.parametrize("n", [1, 3])
def test_any_batch_size(policy, preprocessor, n):
    record = captured(policy, preprocessor(raw_observation(n)))
    assert record.suffix_attention.shape[2] == record.batch_size == n


def test_real_time_chunking_is_recorded(evo1_policy):
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy, preprocessor, _ = evo1_policy(rtc_config=RTCConfig(enabled=True, execution_horizon=4))
    batch = preprocessor(raw_observation(1))
    left = torch.zeros(1, CHUNK, 8)
    chunks = []
    for watched in (False, True):
        torch.manual_seed(0)
        with capture_attention(policy, EVERYTHING) as capture:
            capture.enabled = watched
            chunks.append(
                policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=left).clone()
            )
            records = list(capture.drain())
    assert torch.equal(*chunks)
    (record,) = records
    np.testing.assert_allclose(record.flow_time, [1, 0.75, 0.5, 0.25])


@pytest.fixture(scope="module")
def run(tmp_path_factory, evo1_policy):
    return record_own_loop(tmp_path_factory.mktemp("evo1"), *evo1_policy())


def test_a_recording_says_what_the_policy_attends_to(run):
    for number, episode in enumerate(open_run(run)):
        data = episode.dataset
        assert (episode.is_complete, episode.n_frames, data.sizes["inference"]) == (True, 8, 2)
        assert data.frame_query.values.tolist() == [*range(4)] * 2
        assert set(episode.videos) == {TOP, WRIST}
        shares = modality_share(data, frame=0).compute()
        assert shares.modality.values.tolist() == [TOP, WRIST, "task", "state", "template", "actions"]
        assert shares[:-1].sum() == pytest.approx(1, abs=1e-3)
        assert not np.nan_to_num(shares[-1])
        assert image_heatmap(data, "wrist", frame=3).shape == (3, 3)
        assert attention(data, frame=1).attrs["query"] == "action 1, executed at the frame"
        assert episode.task == TASKS[number]
        assert not [check for check in verify_episode(episode).checks if check.status == "failed"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_plot_is_drawn_or_refused_in_one_line(run, kind):
    plot_is_drawn(run, kind, {"cross-modal": "prefix", "actions": "action"})


def test_commands_take_the_recording(run, tmp_path):
    commands_take(
        run,
        tmp_path,
        {"inspect": "evo1, attention in float32, 3 layers, 4 heads, 4 denoise steps"},
        of_prefix=False,
    )


def test_the_explorer_serves_the_recording(run):
    explorer_serves(run, N_HEADS, prefix_map="")
