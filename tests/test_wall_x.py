"""Wall-X: the contract, each way in which a map could be wrong, and a recording of it to the last picture."""

from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")
pytest.importorskip("torchdiffeq")
pytest.importorskip("qwen_vl_utils")

from adapter_contract import Editor, act  # noqa: E402
from lerobot.policies.wall_x import modeling_wall_x  # noqa: E402
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
from lerobot_attn.capture import capture_attention  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.errors import CaptureError, UnsupportedPolicyError  # noqa: E402
from lerobot_attn.layout import Kind  # noqa: E402
from lerobot_attn.plot.kinds import KINDS  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402
from lerobot_attn.policies.base import Site  # noqa: E402
from lerobot_attn.verify import verify_episode  # noqa: E402

CHUNK, N_LAYERS, N_HEADS, N_STEPS = 10, 3, 4, 10
N_CELLS = 12  # of 3 rows and 4 columns

loaded, preprocessor, policy, batch = family_fixtures("wall_x_policy")


class TorchWith:
    """The module torch, as LeRobot's Wall-X imports it, with some of it replaced."""

    def __init__(self, **replaced):
        self._replaced = replaced

    def __getattr__(self, name):
        return self._replaced.get(name) or getattr(torch, name)


class WallXContract(SmallPolicyContract):
    is_bfloat16 = True
    is_exact = False

    def breaks_at(self, base):
        return base.model.model.norm


class TestWallX(WallXContract):
    pass


@pytest.fixture(scope="module")
def padded_left(tmp_path_factory):
    from wall_x_policy import make_policy, save_model

    return make_policy(save_model(tmp_path_factory.mktemp("wall_x_left"), padding_side="left"))[0]


class TestWallXPaddedOnTheLeft(WallXContract):
    @pytest.fixture
    def policy(self, padded_left):
        padded_left.reset()
        return padded_left


@pytest.fixture(scope="module")
def wrapped(wall_x_policy):
    peft = pytest.importorskip("peft")
    targets = r"model\.model\.layers.*\.(q_proj|v_proj)"
    config = peft.LoraConfig(r=2, target_modules=targets)
    return peft.get_peft_model(wall_x_policy()[0], config).eval()


class TestWallXWithLora(WallXContract):
    @pytest.fixture
    def policy(self, wrapped):
        wrapped.reset()
        return wrapped


@pytest.fixture(scope="module")
def float32_policies(tmp_path_factory):
    """By the side of their padding."""
    from wall_x_policy import make_policy, save_model

    folders = {side: tmp_path_factory.mktemp(f"wall_x_{side}") for side in ("right", "left")}
    return {
        side: make_policy(save_model(folder, padding_side=side))[0].float()
        for side, folder in folders.items()
    }


@pytest.fixture
def float32(float32_policies, monkeypatch):
    """LeRobot's code runs in bfloat16 alone, for one line makes the state so; here that line makes float32.

    In float32 a map can be recomputed exactly, and what is changed in one place shows nowhere else.
    """
    monkeypatch.setattr(modeling_wall_x, "torch", TorchWith(bfloat16=torch.float32))
    for one in float32_policies.values():
        one.reset()
    return float32_policies


class TestWallXInFloat32(WallXContract):
    is_bfloat16 = False

    @pytest.fixture
    def policy(self, float32):
        return float32["right"]


def inputs_of(policy, batch):
    """The token ids of the conversation and the mask of its tokens, (batch, token) each."""
    inputs = policy.preprocess_inputs(batch)
    return inputs["input_ids"].numpy(), inputs["attention_mask"].numpy().astype(bool)


def in_the_layouts_order(policy, batch):
    """Where in the conversation the layout's tokens stand, (batch, token), by the kinds of its tokens."""
    ids, _ = inputs_of(policy, batch)
    number = policy.model.processor.tokenizer.convert_tokens_to_ids
    others = [ids == number(name) for name in ("<|image_pad|>", "<|propri|>", "<|action|>")]
    is_image, is_state, is_action = others
    parts = (is_image, ~(is_image | is_state | is_action), is_state, is_action)
    return np.stack(
        [np.concatenate([np.flatnonzero(part[row]) for part in parts]) for row in range(len(ids))]
    )


@pytest.mark.parametrize("side", ["right", "left"])
def test_stored_softmax_equals_an_independent_one(float32, batch, monkeypatch, side):
    """Queries and keys of the very pass, softmaxed in float64 by numpy, against the captured maps.

    Of the prefix, those of every step: LeRobot computes its rows ten times, and the store has them once.
    """
    policy = float32[side]
    rotate, pairs = modeling_qwen2_5_vl.apply_multimodal_rotary_pos_emb, []

    def noted(*args):
        query, key = rotate(*args)
        pairs.append((query.detach().double().numpy(), key.detach().double().numpy()))
        return query, key

    monkeypatch.setattr(modeling_qwen2_5_vl, "apply_multimodal_rotary_pos_emb", noted)
    record = captured(policy, batch)
    assert len(pairs) == N_LAYERS * N_STEPS
    order, (ids, is_there) = in_the_layouts_order(policy, batch), inputs_of(policy, batch)
    assert not is_there.all()
    n = record.layout.prefix_len
    is_action = ids == policy.model.processor.tokenizer.convert_tokens_to_ids("<|action|>")
    tokens = np.arange(ids.shape[1])
    for number, (query, key) in enumerate(pairs):
        step, layer = divmod(number, N_LAYERS)
        for row in range(2):
            keys = key[row].repeat(N_HEADS // key.shape[1], axis=0)
            scores = query[row] @ keys.swapaxes(1, 2) * query.shape[-1] ** -0.5
            seen = tokens[None] <= tokens[:, None]
            seen = (seen | (is_action[row][None] & is_action[row][:, None])) & is_there[row][None]
            weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
            with np.errstate(invalid="ignore"):  # padding on the left sees nothing
                weights = np.nan_to_num(weights / weights.sum(-1, keepdims=True))
            true = weights[:, order[row]][..., order[row]]
            true[:, ~is_there[row, order[row]]] = 0  # padding is no query
            np.testing.assert_allclose(
                record.prefix_attention[layer][row], true[:, :n, :n], rtol=2**-10, atol=4e-6
            )
            np.testing.assert_allclose(
                record.suffix_attention[step, layer, row], true[:, n:], rtol=2**-10, atol=4e-6
            )


def test_maps_differ_so_that_a_mixed_up_index_shows(policy, batch):
    record = captured(policy, batch)
    for maps in (record.suffix_attention, record.prefix_attention):
        for axis in range(maps.ndim):
            assert np.abs(np.diff(maps.astype(np.float32), axis=axis)).max() > 0.01, axis


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_is_the_same_alone_and_beside_padding(float32, preprocessor, batch, monkeypatch, side):
    """The shorter task's tokens are padded in a batch, and not when it is asked alone."""
    policy, raw = float32[side], raw_observation()
    alone = preprocessor(
        {key: value[1:] for key, value in raw.items() if key != "task"} | {"task": list(TASKS[1:])}
    )
    same_noise = torch.rand(1, CHUNK, 8, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(
        modeling_wall_x,
        "torch",
        TorchWith(bfloat16=torch.float32, randn=lambda size, **kwargs: same_noise.expand(size)),
    )
    config = AttentionConfig(layers="all", prefix_layers="all", denoise_steps=[0])
    both, one = captured(policy, batch, config), captured(policy, alone, config)
    kept = np.flatnonzero(both.key_mask[1])
    assert len(kept) == one.layout.n_keys < both.layout.n_keys
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
    _, is_there = inputs_of(policy, batch)
    n_padding = (~is_there).sum(1).tolist()
    assert n_padding == [0, max(n_padding)]
    assert max(n_padding) > 0
    for segment in record.layout.segments:
        kinds = record.key_kind[:, segment.start : segment.stop]
        if segment.kind in expected:
            assert (kinds == expected[segment.kind]).all(), segment
        else:
            assert (kinds == Kind.PADDING).sum(1).tolist() == n_padding
    assert record.layers_seeing_suffix == {0, 1, 2}


@contextmanager
def given_to(policy):
    """Note what the language model is given, in each call: (batch, token, dim)."""
    given = []
    handle = policy.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"].detach().float()), with_kwargs=True
    )
    try:
        yield given
    finally:
        handle.remove()


def test_segments_are_where_the_policy_put_them(policy, preprocessor, batch):
    """Change one input at a time: exactly the tokens change that the layout says are its."""
    layout, order = captured(policy, batch).layout, in_the_layouts_order(policy, batch)
    raw = raw_observation()
    swapped = ("put the plate on the bowl", "open the stove")
    changes = {
        TOP: {TOP: raw[TOP] * 0.5},
        WRIST: {WRIST: raw[WRIST] * 0.5},
        "state": {"observation.state": raw["observation.state"] * 0.5},
        "language": {"task": list(swapped)},
    }
    for name, change in changes.items():
        with given_to(policy) as given:
            act(policy, batch, 0)
            act(policy, preprocessor({**raw, **change}), 0)
        changed = (given[N_STEPS] - given[0]).abs().amax(dim=2).numpy() > 0
        (segment,) = [one for one in layout.segments if one.name == name]
        for row in range(2):
            found = np.flatnonzero(changed[row, order[row]])
            assert segment.start <= found.min() <= found.max() < segment.stop
            assert len(found) == ((2, 1)[row] if name == "language" else len(segment)), name
    with given_to(policy) as given:
        act(policy, batch, 0)
        act(policy, batch, 1)  # other noise
    changed = (given[N_STEPS] - given[0]).abs().amax(dim=2).numpy() > 0
    for row in range(2):
        actions = np.arange(layout.actions.start, layout.actions.stop)
        np.testing.assert_array_equal(np.flatnonzero(changed[row, order[row]]), actions)


GEOMETRIES = {
    "alike": (SIZE, SIZE),
    "of unlike shapes": ((150, 70), (96, 128)),
    "of unlike sizes": ((300, 420), (64, 64)),
}


@pytest.mark.parametrize("camera", [TOP, WRIST])
@pytest.mark.parametrize("sizes", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_planted_object_lands_in_the_right_patch(wall_x_policy, camera, sizes):
    """A bright square changes its own cell more than others: the tower has no layers that would mix."""
    policy, preprocessor, _ = wall_x_policy()
    policy.model.visual.blocks = torch.nn.ModuleList()
    raw = {**raw_observation(2), TOP: torch.full((2, 3, *sizes[0]), 0.2)}
    raw[WRIST] = torch.full((2, 3, *sizes[1]), 0.2)
    batch, index = preprocessor(raw), [TOP, WRIST].index(camera)
    with given_to(policy) as before:
        act(policy, batch, 0)
    height, width = sizes[index]
    side = max(3, height // 30)
    order, corners = in_the_layouts_order(policy, batch)[1], (height - side - 2, width - side - 2)
    for y, x in ((2, 2), (2, corners[1]), (height // 2, width // 3), corners):
        planted = raw[camera].clone()
        planted[1, :, y : y + side, x : x + side] = 1
        other = preprocessor({**raw, camera: planted})
        with given_to(policy) as given:
            layout = captured(policy, other, AttentionConfig()).layout
        change = (given[0] - before[0]).norm(dim=-1).numpy()
        assert not change[0].any()
        key = int(change[1, order].argmax())
        rows, columns = layout.key_patch()
        assert layout.key_camera()[key] == index
        geometry = layout.cameras[index].geometry
        assert (geometry.height_px, geometry.width_px) == (height, width)
        assert (rows[key], columns[key]) == geometry.patch_at(y + side / 2, x + side / 2)
        assert geometry.grid_rows * geometry.grid_columns == len(layout.segments[index])


@pytest.mark.parametrize("action", [0, 1, 5, 9])
def test_query_i_is_action_i(float32, batch, monkeypatch, action):
    """Disturb one action's noise: in the first layer its row alone changes, among the keys of no action."""
    config, policy = AttentionConfig(layers=[0], denoise_steps=[0]), float32["right"]
    first = captured(policy, batch, config)

    def disturbed(*args, **kwargs):
        noise = torch.randn(*args, **kwargs)
        noise[:, action] += 3
        return noise

    monkeypatch.setattr(modeling_wall_x, "torch", TorchWith(bfloat16=torch.float32, randn=disturbed))
    second = captured(policy, batch, config)
    layout, maps = first.layout, []
    for record in (first, second):
        rows = record.suffix_attention[0, 0].astype(np.float64)[..., : layout.actions.start]
        maps.append(rows / rows.sum(-1, keepdims=True))
    change = np.abs(maps[1] - maps[0]).max(axis=(0, 1, 3))
    query = layout.query_of_action(action)
    assert change.argmax() == query == action
    assert np.delete(change, query).max() < 2e-3 < change[query]


def test_an_edit_of_the_prefix_acts_in_every_denoise_step(float32, batch):
    """As if LeRobot kept the prefix's keys and values: what layer 0 makes of it is the same in each step."""
    policy, made = float32["right"], []
    output = policy.model.model.layers[0].self_attn.o_proj
    handle = output.register_forward_pre_hook(lambda module, args: made.append(args[0].detach().clone()))
    editor = Editor(lambda value: value.flip(-1), sites=[Site("vlm", 0)])
    try:
        act(policy, batch, 0)
        with adapter_for(policy).observe(editor, editor.sites, compiled=False):
            act(policy, batch, 0)
    finally:
        handle.remove()
    assert editor.seen == [Site("vlm", 0)]
    _, is_there = inputs_of(policy, batch)
    words = torch.from_numpy(is_there[0])
    words[-CHUNK:] = False
    plain, edited = ([one[0, words] for one in half] for half in (made[:N_STEPS], made[N_STEPS:]))
    assert len(edited) == N_STEPS
    for step in range(N_STEPS):
        assert torch.equal(plain[step], plain[0])
        assert torch.equal(edited[step], edited[0])
    assert (edited[0] - plain[0]).abs().max() > 0.1


def test_a_replacement_of_another_shape_is_refused_by_a_probe_alone(policy, batch):
    for site in (Site("vlm", 0), Site("expert", 0)):
        editor = Editor(lambda value: value[..., :-1], sites=[site])
        with (
            pytest.raises(CaptureError, match=rf"^{site}: a probe returned .* expected .* as it was given"),
            adapter_for(policy).observe(editor, [site], compiled=False),
        ):
            act(policy, batch, 0)


def test_the_last_layers_prefix_pass_is_read_by_nobody(policy):
    sites = adapter_for(policy).sites()
    assert [str(site) for site, info in sites.items() if not info.reaches_actions] == ["vlm.2.attention"]


def test_words_are_labelled_by_the_policys_own_tokenizer(policy, batch):
    record = captured(policy, batch, AttentionConfig(), tokenizer=adapter_for(policy).tokenizer)
    language = record.layout.language
    kinds = record.key_kind[:, language.start : language.stop]
    for env, task in enumerate(TASKS):
        pieces, labels = record.prompts[env]
        for word, text in enumerate(f"{task}.".split()):  # the preprocessor ends a task so
            assert "".join(np.array(pieces)[labels.word == word]).strip() == text
        assert labels.word.max() == len(task.split()) - 1
        marks = np.isin(pieces, ["<|im_start|>", "<|vision_start|>", "<|vision_end|>"])
        assert marks.sum() == 3 + 2 + 2
        assert (kinds[env][marks] == Kind.TEMPLATE).all()
    assert record.prompt_truncated.tolist() == [False, False]


@pytest.mark.parametrize(
    ("prompt", "task", "is_cut"),
    [
        (
            "user\nInstruction: open it.\nPredict the next action in robot action.",
            "open it.",
            False,
        ),
        ("\nInstruction: open\nit.\nPredict the next action in robot action.\nPropr", "open\nit.", False),
        ("\nInstruction: open i", "open i", True),
        ("\nInstruction: \nPredict the next action in robot action.", "", False),
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
    compiled_is_refused(policy, "wall_x")


def test_decoding_actions_as_tokens_is_refused(policy, monkeypatch):
    monkeypatch.setattr(policy.config, "prediction_mode", "fast")
    with pytest.raises(UnsupportedPolicyError, match=r"^wall_x with prediction_mode='fast': .*='diffusion'$"):
        adapter_for(policy)


def test_training_goes_on_unrecorded(policy, batch):
    training_goes_on_unrecorded(policy, batch, {**batch, "action": torch.zeros(2, CHUNK, 6)})


def test_a_conversation_that_is_cut_is_lerobots_error(policy, batch, monkeypatch):
    """LeRobot cuts it to 768 tokens, and with it the actions, which stand last."""
    with capture_attention(policy, EVERYTHING) as capture:
        with monkeypatch.context() as patch:
            patch.setattr(modeling_wall_x, "TOKENIZER_MAX_LENGTH", 120)
            with pytest.raises(RuntimeError, match="shape mismatch"):
                act(policy, batch, 0)
        act(policy, batch, 0)
    assert len(capture.records) == 1


def test_a_camera_that_the_batch_lacks_has_no_tokens(policy, batch):
    found = captured(policy, {key: value for key, value in batch.items() if key != TOP})
    assert [camera.name for camera in found.layout.cameras] == [WRIST]
    assert [(one.name, len(one)) for one in found.layout.segments[:1]] == [(WRIST, N_CELLS)]
    assert (found.key_kind[:, :N_CELLS] == Kind.IMAGE).all()


@pytest.mark.parametrize("n", [1, 3])
def test_any_batch_size(policy, preprocessor, n):
    record = captured(policy, preprocessor(raw_observation(n)))
    assert record.suffix_attention.shape[2] == record.batch_size == n


@pytest.fixture(scope="module")
def run(tmp_path_factory, wall_x_policy):
    return record_own_loop(tmp_path_factory.mktemp("wall_x"), *wall_x_policy())


def test_a_recording_says_what_the_policy_attends_to(run):
    for number, episode in enumerate(open_run(run)):
        data = episode.dataset
        assert (episode.is_complete, episode.n_frames, data.sizes["inference"]) == (True, 8, 2)
        assert data.frame_query.values.tolist() == [*range(4)] * 2
        assert set(episode.videos) == {TOP, WRIST}
        shares = modality_share(data, frame=0).compute()
        assert shares.modality.values.tolist() == [TOP, WRIST, "task", "state", "template", "actions"]
        assert shares.sum() == pytest.approx(1, abs=2**-8)
        assert image_heatmap(data, "wrist", frame=3).shape == (3, 4)
        assert attention(data, frame=1).attrs["query"] == "action 1, executed at the frame"
        words = text_to_image(data, inference=0)
        assert words["label"].values.tolist() == f"{TASKS[number]}.".split()
        assert attention_rollout(data, inference=0, query=0).sum() == pytest.approx(1, abs=2e-2)
        assert not [check for check in verify_episode(episode).checks if check.status == "failed"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_plot_is_drawn(run, kind):
    plot_is_drawn(run, kind)


def test_commands_take_the_recording(run, tmp_path):
    commands_take(run, tmp_path, {"inspect": "bfloat16, 3 layers, 4 heads, 10 denoise steps"})


def test_the_explorer_serves_the_recording(run):
    explorer_serves(run, N_HEADS)
