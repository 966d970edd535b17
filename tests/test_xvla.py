"""X-VLA: the contract, each way in which a map could be wrong, and a recording of it to the last picture."""

from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from adapter_contract import AdapterContract, act  # noqa: E402
from small_policies import (  # noqa: E402
    EVERYTHING,
    SIZE,
    TASKS,
    TOP,
    WRIST,
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
from typer.testing import CliRunner  # noqa: E402

from lerobot_attn import open_run, record_episodes  # noqa: E402
from lerobot_attn.analysis import attention, image_heatmap, modality_share  # noqa: E402
from lerobot_attn.analysis.prefix import image_to_text, text_to_image  # noqa: E402
from lerobot_attn.analysis.propagation import attention_flow, attention_rollout  # noqa: E402
from lerobot_attn.capture import capture_attention, find_tokenizer  # noqa: E402
from lerobot_attn.cli import app  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.errors import SelectionError  # noqa: E402
from lerobot_attn.layout import Kind  # noqa: E402
from lerobot_attn.plot.kinds import KINDS  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402
from lerobot_attn.policies.base import Site  # noqa: E402
from lerobot_attn.store.video import read_frames  # noqa: E402
from lerobot_attn.verify import verify_episode  # noqa: E402

CHUNK, SOFT = 10, 5

loaded, preprocessor, policy, batch = family_fixtures("xvla_policy")


def denormalised(image):
    """Undo what the preprocessor does with ImageNet's mean and standard deviation."""
    std = image.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return image * std + image.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)


class XVLAContract(AdapterContract):
    can_block = False

    def picture(self, image):
        return denormalised(image)

    @pytest.fixture
    def longer(self, batch):
        @contextmanager
        def with_more_slots():
            tokens = batch["observation.language.tokens"]
            yield {**batch, "observation.language.tokens": torch.cat([tokens, tokens[:, -3:]], dim=1)}

        return with_more_slots

    def breaks_at(self, base):
        return base.model.transformer.blocks[-1].mlp


class TestXVLA(XVLAContract):
    pass


@pytest.fixture(scope="module")
def in_bfloat16(xvla_policy):
    return xvla_policy(dtype="bfloat16")[0]


class TestXVLAInBfloat16(XVLAContract):
    is_bfloat16 = True

    @pytest.fixture
    def policy(self, in_bfloat16):
        in_bfloat16.reset()
        return in_bfloat16


@pytest.fixture(scope="module")
def wrapped(xvla_policy):
    peft = pytest.importorskip("peft")
    targets = r".*\.(q_proj|v_proj|qkv)"
    return peft.get_peft_model(xvla_policy()[0], peft.LoraConfig(r=2, target_modules=targets)).eval()


class TestXVLAWithLora(XVLAContract):
    @pytest.fixture
    def policy(self, wrapped):
        wrapped.reset()
        return wrapped


@pytest.fixture(scope="module")
def with_a_view_too_many(xvla_policy):
    return xvla_policy(use_hetero_proj=True, num_image_views=3)[0]


class TestXVLAWithAViewTooMany(XVLAContract):
    @pytest.fixture
    def policy(self, with_a_view_too_many):
        with_a_view_too_many.reset()
        return with_a_view_too_many


def in_the_layouts_order(layout):
    """Where each key of the layout stands among the transformer's tokens, whose actions come first."""
    return np.roll(np.arange(layout.n_keys), -CHUNK)


def test_stored_softmax_equals_an_independent_one(policy, batch):
    """Queries and keys of the very pass, softmaxed in float64 by numpy, against the captured maps."""
    passes = {"vlm": [], "expert": []}
    projected = []

    def note_half(module, args, output):
        projected.append(output.detach().double().numpy())
        if len(projected) == 2:
            passes["vlm"].append(tuple(projected))
            projected.clear()

    def note_all(module, args, output):
        passes["expert"].append(np.split(output.detach().double().numpy(), 3, axis=-1)[:2])

    layers = policy.model.vlm.language_model.encoder.layers
    handles = [
        part.register_forward_hook(note_half)
        for layer in layers
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    ]
    handles += [block.attn.qkv.register_forward_hook(note_all) for block in policy.model.transformer.blocks]
    try:
        record = captured(policy, batch)
    finally:
        for handle in handles:
            handle.remove()
    sizes, layout = adapter_for(policy).describe(), record.layout
    assert len(passes["vlm"]) == sizes.n_prefix_layers == 2
    assert len(passes["expert"]) == sizes.n_denoise_steps * sizes.n_layers == 4 * 3

    def softmax(query, key):
        n, tokens, _ = query.shape
        query, key = (
            part.reshape(n, tokens, sizes.n_heads, -1).transpose(0, 2, 1, 3) for part in (query, key)
        )
        scores = query @ key.swapaxes(2, 3) * query.shape[-1] ** -0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    for layer, pair in enumerate(passes["vlm"]):
        np.testing.assert_allclose(record.prefix_attention[layer], softmax(*pair), rtol=2**-10, atol=4e-6)
    order = in_the_layouts_order(layout)
    for number, pair in enumerate(passes["expert"]):
        true = softmax(*pair)[:, :, order[layout.prefix_len :]][..., order]
        found = record.suffix_attention[divmod(number, sizes.n_layers)]
        np.testing.assert_allclose(found, true, rtol=2**-10, atol=4e-6)


def test_maps_differ_so_that_a_mixed_up_index_shows(policy, batch):
    record = captured(policy, batch)
    for maps in (record.suffix_attention, record.prefix_attention):
        for axis in range(maps.ndim):
            assert np.abs(np.diff(maps.astype(np.float32), axis=axis)).max() > 0.01, axis


@contextmanager
def given_to(policy):
    """Note what the encoder and the first block are given, in each call: (batch, token, dim)."""
    encoder, block = [], []
    handles = [
        policy.model.vlm.language_model.encoder.register_forward_pre_hook(
            lambda module, args, kwargs: encoder.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
        ),
        policy.model.transformer.blocks[0].register_forward_pre_hook(
            lambda module, args: block.append(args[0].detach())
        ),
    ]
    try:
        yield encoder, block
    finally:
        for handle in handles:
            handle.remove()


def test_segments_are_where_the_policy_put_them(policy, batch):
    """Change one input at a time: exactly the tokens change that the layout says are its."""
    layout = captured(policy, batch).layout
    segments = {segment.name: segment for segment in layout.segments}
    names = [f"mean of {TOP}", TOP, "language", f"mean of {WRIST}", WRIST, "soft prompts", "action"]
    assert list(segments) == names
    assert [segment.kind for segment in layout.segments] == (
        ["special", "image", "language", "special", "image", "special", "action"]
    )
    assert layout.prefix_len == segments["language"].stop
    assert len(segments["soft prompts"]) == SOFT
    tokens = batch["observation.language.tokens"]
    changes = {
        (f"mean of {TOP}", TOP): {TOP: batch[TOP] * 0.5},
        ("language",): {"observation.language.tokens": tokens + 1},
        (f"mean of {WRIST}", WRIST): {WRIST: batch[WRIST] * 0.5},
        ("action",): {"observation.state": batch["observation.state"] * 0.5},
        ("soft prompts",): {},
    }
    for changed, other in changes.items():
        with given_to(policy) as (encoder, block):
            act(policy, batch, 0)
            if changed == ("soft prompts",):
                policy.model.transformer.soft_prompt_hub.weight.data += 1
            act(policy, {**batch, **other}, 0)
            if changed == ("soft prompts",):
                policy.model.transformer.soft_prompt_hub.weight.data -= 1
        expected = np.zeros(layout.n_keys, bool)
        for name in changed:
            expected[segments[name].start : segments[name].stop] = True
        found = (encoder[1] - encoder[0]).abs().amax(dim=(0, 2)).numpy() > 0
        np.testing.assert_array_equal(found, expected[: layout.prefix_len], err_msg=changed)
        steps = len(block) // 2
        found = (block[steps] - block[0]).abs().amax(dim=(0, 2)).numpy()[in_the_layouts_order(layout)] > 0
        if expected[: layout.prefix_len].any():  # the encoder has mixed these
            expected[: layout.prefix_len] = True
        np.testing.assert_array_equal(found, expected, err_msg=changed)


def test_kinds_are_what_the_tokens_are(policy, batch):
    record = captured(policy, batch)
    expected = {"special": Kind.SPECIAL, "image": Kind.IMAGE, "action": Kind.ACTION, "language": Kind.TEXT}
    for segment in record.layout.segments:
        assert (record.key_kind[:, segment.start : segment.stop] == expected[segment.kind]).all(), segment
    assert record.key_mask.all(), "LeRobot masks nothing"
    assert record.layers_seeing_suffix == {0, 1, 2}


@pytest.mark.parametrize("action", [0, 1, 5, 9])
def test_query_i_is_action_i(policy, batch, action):
    """Disturb one action's noise: in the first layer its row alone changes, among the keys of no action."""

    def disturb(module, args, kwargs):
        noisy = kwargs["action_with_noise"].clone()
        noisy[:, action] += 3
        return args, {**kwargs, "action_with_noise": noisy}

    config = AttentionConfig(layers=[0], denoise_steps=[0])
    first = captured(policy, batch, config)
    handle = policy.model.transformer.register_forward_pre_hook(disturb, with_kwargs=True)
    try:
        second = captured(policy, batch, config)
    finally:
        handle.remove()
    layout, maps = first.layout, []
    for record in (first, second):
        rows = record.suffix_attention[0, 0].astype(np.float64)[..., : layout.actions.start]
        maps.append(rows / rows.sum(-1, keepdims=True))
    change = np.abs(maps[1] - maps[0]).max(axis=(0, 1, 3))
    query = layout.query_of_action(action)
    assert layout.first_action_query == layout.n_queries - CHUNK > SOFT
    assert change.argmax() == query
    assert np.delete(change, query).max() < 2e-3 < change[query]


def test_an_edit_changes_the_actions_row_alone(policy, batch):
    """What a probe hands back for one query acts on that query: of the last layer, on its action alone."""

    class Editor:
        edits = True

        def at(self, site, value):
            value = value.clone()
            value[:, :, query] = 0
            value[:, :, query, 0] = 1
            return value

        def begin(self, inputs):
            pass

        denoise_step = end = begin

    query = captured(policy, batch).layout.query_of_action(3)
    with given_to(policy) as (_, block):
        policy.reset()
        torch.manual_seed(0)
        expected = policy.predict_action_chunk(batch)
        with capture_attention(policy, EVERYTHING, probes=[(Editor(), [Site("expert", 2)])]):
            torch.manual_seed(0)
            policy.predict_action_chunk(batch)
    steps = len(block) // 2
    # What was denoised first differs in the action that was edited, and so in what the next step is given.
    changed = (block[steps + 1] - block[1]).abs().amax(dim=(0, 2)).numpy() > 1e-4  # others: rounding
    assert np.flatnonzero(changed).tolist() == [3]
    assert expected.shape == (2, CHUNK, 6)


def test_flow_time_is_the_policys_own(xvla_policy, batch):
    policy = xvla_policy(num_denoising_steps=3)[0]
    seen = []
    policy.model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["t"][0])), with_kwargs=True
    )
    record = captured(policy, batch)
    np.testing.assert_array_equal(record.flow_time, np.float32(seen))
    np.testing.assert_allclose(seen, [1, 2 / 3, 1 / 3], atol=1e-6)


def test_a_missing_camera_is_a_view_that_shows_nothing(policy, batch):
    """Its tokens are there, zeros to which the transformer attends; a camera that moves up is the first."""
    whole = captured(policy, batch).layout
    for missing, other in ((WRIST, TOP), (TOP, WRIST)):
        without = {key: value for key, value in batch.items() if key != missing}
        record = captured(policy, without)
        assert [camera.name for camera in record.layout.cameras] == [other]
        assert record.layout.n_keys == whole.n_keys
        names = [segment.name for segment in record.layout.segments]
        assert names[:4] == [f"mean of {other}", other, "language", "view 2 without an image"]
        empty = record.layout.segments[3]
        assert (record.key_kind[:, empty.start : empty.stop] == Kind.SPECIAL).all()
        assert (record.suffix_attention[..., empty.start : empty.stop].max(axis=(0, 1, 2, 3)) > 0).all()


def test_words_are_labelled_and_what_fills_the_slots_is_attended_to(policy, preprocessor, batch):
    record = captured(policy, batch, AttentionConfig(), tokenizer=find_tokenizer(preprocessor))
    language = record.layout.language
    kinds = record.key_kind[:, language.start : language.stop]
    for env, task in enumerate(TASKS):
        pieces, labels = record.prompts[env]
        for word, text in enumerate(task.split()):
            assert "".join(np.array(pieces)[labels.word == word]).strip() == text
        assert labels.word.max() == len(task.split()) - 1
        fills = np.array(pieces) == "<pad>"
        assert fills.any()
        assert (kinds[env][fills] == Kind.TEMPLATE).all()
        assert kinds[env][0] == Kind.TEMPLATE
        assert pieces[0] == "<s>"
    assert record.prompt_truncated.tolist() == [False, False]


@pytest.mark.parametrize(
    ("prompt", "task", "is_truncated"),
    [
        ("<s>open it</s><pad><pad>", "open it", False),
        ("<pad><pad><s>open it</s>", "open it", False),
        ("<s>open it</s>", "open it", None),
        ("open it", "open it", None),
        ("<s>", "", None),
    ],
)
def test_prompts_are_read_as_bart_writes_them(policy, prompt, task, is_truncated):
    parsed = adapter_for(policy).parse_prompt(prompt)
    assert " ".join(prompt[span.start : span.stop] for span in parsed.spans) == task
    assert parsed.is_truncated is is_truncated


def test_a_prompt_without_room_does_not_say_whether_it_was_cut(policy, preprocessor):
    raw = raw_observation(tasks=("put the bowl on the plate " * 8,))
    record = captured(policy, preprocessor(raw), AttentionConfig(), tokenizer=find_tokenizer(preprocessor))
    assert record.prompts[0].pieces[-1] == "</s>"
    assert record.prompts[0].labels.word.max() > 10
    assert record.prompt_truncated is None


GEOMETRIES = {
    "as they are": ({}, SIZE),
    "larger images": ({}, (150, 200)),
    "letterboxed below": ({"resize_imgs_with_padding": (96, 96)}, SIZE),
    "letterboxed beside": ({"resize_imgs_with_padding": (128, 192)}, (160, 120)),
}


@pytest.mark.parametrize("camera", [TOP, WRIST])
@pytest.mark.parametrize(("settings", "size"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_planted_object_lands_in_the_right_patch(xvla_policy, camera, settings, size):
    """A bright square changes its own cell most, among all tokens that either tower is given.

    The vision tower is a stub that keeps DaViT's strides and paddings: its fields are far wider than the
    cells between them, which the gradients of the test below are for.
    """
    policy, preprocessor, _ = xvla_policy(**settings)
    tower = policy.model.vlm.vision_tower
    given = []

    def narrow(module, args, output):
        image = args[0]
        for part in module.convs:
            conv = part.conv
            image = torch.nn.functional.avg_pool2d(image, conv.kernel_size, conv.stride, conv.padding)
        output.last_hidden_state = image.mean(1, keepdim=True).expand_as(output.last_hidden_state)
        return output

    tower.register_forward_hook(narrow)
    policy.model.vlm.multi_modal_projector.register_forward_hook(
        lambda module, args, output: given.append(output.detach().unflatten(0, (1, -1)))
    )
    side = max(size) // 14
    for y, x in ((0, 0), (size[0] // 2, size[1] // 3), (size[0] - side, size[1] - side)):
        raw = raw_observation(1, size=size)
        for name in (TOP, WRIST):
            raw[name].fill_(0.2)
        given.clear()
        captured(policy, preprocessor(raw))
        raw[camera][..., y : y + side, x : x + side] = 1
        layout = captured(policy, preprocessor(raw)).layout
        # (camera, token): the mean first.
        change = (given[1] - given[0]).norm(dim=-1)[0].numpy()
        index, token = np.unravel_index(change.argmax(), change.shape)
        assert [TOP, WRIST][index] == camera
        (segment,) = [s for s in layout.segments if s.name == camera]
        geometry = layout.cameras[index].geometry
        rows, columns = layout.key_patch()
        key = segment.start + token - 1
        assert layout.key_camera()[key] == index
        assert (rows[key], columns[key]) == geometry.patch_at(y + side / 2, x + side / 2)


@pytest.mark.parametrize(
    "vision",
    [{}, {"patch_size": [4, 2, 2, 2], "patch_stride": [4, 2, 2, 2], "patch_padding": [0, 0, 0, 0]}],
    ids=["as released", "cells side by side"],
)
def test_cells_are_centred_where_the_geometry_says(xvla_policy, vision):
    """By the gradient of a cell of the feature map in the image's pixels: fields are wide, centres exact."""
    policy = xvla_policy(vision=vision)[0]
    size = (320, 320)
    record = captured(policy, xvla_policy()[1](raw_observation(1, size=size)))
    geometry = record.layout.cameras[0].geometry
    tower = policy.model.vlm.vision_tower
    tower.blocks = torch.nn.ModuleList(torch.nn.ModuleList() for _ in tower.blocks)  # convolutions alone
    weight = np.zeros(size)
    for seed in range(8):
        image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        tower(image).last_hidden_state[0, :, 4, 5].pow(2).sum().backward()
        weight += image.grad[0].pow(2).sum(0).numpy()
    weight /= weight.sum()
    y, x = (weight.sum(1 - axis) @ (np.arange(size[axis]) + 0.5) for axis in (0, 1))
    assert geometry.patch_at(y, x) == (4, 5)
    stride = 32
    assert abs(y - (4.5 * stride - geometry.pad_top_px)) < stride / 6
    assert abs(x - (5.5 * stride - geometry.pad_left_px)) < stride / 6
    assert geometry.pad_top_px == (0 if vision else 16)


def test_pictures_are_those_that_the_preprocessor_got(policy, preprocessor):
    raw = raw_observation()
    views = adapter_for(policy).camera_views(preprocessor(raw))
    assert list(views) == [TOP, WRIST]
    for name, view in views.items():
        expected = raw[name].permute(0, 2, 3, 1) * 255
        assert (view - expected).abs().max() <= 0.51
    # Not normalised, or by other numbers: nobody can tell what they showed.
    batch = preprocessor(raw)
    for unknown in (raw[TOP], batch[TOP] * 3, raw[TOP] * 255):
        assert list(adapter_for(policy).camera_views({**batch, TOP: unknown})) == [WRIST]
    # An observation's own pictures come without a prompt.
    views = adapter_for(policy).camera_views({TOP: raw[TOP]})
    assert (views[TOP] - raw[TOP].permute(0, 2, 3, 1) * 255).abs().max() <= 0.51


def test_a_picture_that_may_not_have_been_normalised_is_the_observations(xvla_policy, tmp_path):
    """Of plain grey the normalised values lie in [0, 1], where nobody can tell them from a picture's."""
    policy, preprocessor, _ = xvla_policy()
    with (
        record_episodes(policy, tmp_path, AttentionConfig(layers=[-1]), fps=10) as recording,
        recording.episode() as episode,
    ):
        raw = raw_observation(1)
        for name in (TOP, WRIST):
            raw[name].fill_(0.6)
        with torch.inference_mode():
            action = policy.select_action(preprocessor(raw))
        assert not adapter_for(policy).camera_views(preprocessor(raw))
        episode.step({name: raw[name][0] for name in (TOP, WRIST, "observation.state")}, action[0])
    (found,) = open_run(tmp_path)
    (frame,) = read_frames(found.videos[TOP])
    assert np.abs(frame.astype(int) - 153).max() < 6


def test_an_encoder_with_other_heads_has_no_prefix_maps(xvla_policy, batch):
    policy = xvla_policy(encoder_heads=2)[0]
    sizes = adapter_for(policy).describe()
    assert (sizes.n_heads, sizes.n_prefix_layers, sizes.n_layers) == (4, 0, 3)
    assert {site.stream for site in adapter_for(policy).sites()} == {"expert"}
    assert captured(policy, batch).suffix_attention.shape[3] == 4


def test_compiled_is_refused(policy):
    compiled_is_refused(policy, "xvla")


def test_training_goes_on_unrecorded(policy, batch):
    target = {**batch, "action": torch.zeros(2, CHUNK, 6)}
    training_goes_on_unrecorded(policy, batch, target)


@pytest.mark.parametrize("n", [1, 3])
def test_any_batch_size(policy, preprocessor, n):
    record = captured(policy, preprocessor(raw_observation(n)))
    assert record.suffix_attention.shape[2] == record.batch_size == n


@pytest.fixture(scope="module")
def run(tmp_path_factory, xvla_policy):
    return record_own_loop(tmp_path_factory.mktemp("xvla"), *xvla_policy())


def test_a_recording_says_what_the_policy_attends_to(run):
    for number, episode in enumerate(open_run(run)):
        data = episode.dataset
        assert (episode.is_complete, episode.n_frames, data.sizes["inference"]) == (True, 8, 2)
        first = episode.layout.first_action_query
        assert data.frame_query.values.tolist() == [*range(first, first + 4)] * 2
        assert data.prompt_truncated.values.tolist() == [False, False]
        assert set(episode.videos) == {TOP, WRIST}
        shares = modality_share(data, frame=0).compute()
        assert shares.modality.values.tolist() == [TOP, WRIST, "task", "template", "special", "actions"]
        assert shares.sum() == pytest.approx(1, abs=1e-3)
        assert image_heatmap(data, "wrist", frame=3).shape == (3, 4)
        assert attention(data, frame=1).attrs["query"] == "action 1, executed at the frame"
        words = text_to_image(data, inference=0)
        assert words["label"].values.tolist() == TASKS[number].split()


def test_a_recorded_action_is_that_of_its_query(run):
    """`action_chunk` holds the chunk at the actions' queries; other tokens of the suffix have no action."""
    episode = open_run(run)[0]
    chunk = episode.dataset.action_chunk.isel(inference=0).values
    first = episode.layout.first_action_query
    assert np.isnan(chunk[:first]).all()
    torch.testing.assert_close(
        torch.tensor(chunk[first : first + 4]), torch.tensor(episode.dataset.action.values[:4])
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_plot_is_drawn(run, kind):
    said = plot_is_drawn(run, kind)
    # The language model has seen the first camera alone.
    assert ("wrist" in said) == (kind not in ("actions", "cross-modal", "text", "vision"))


@pytest.mark.parametrize("of_prefix", [text_to_image, image_to_text])
def test_a_camera_that_the_language_model_has_not_seen_is_refused(run, of_prefix):
    data = open_run(run)[0].dataset
    assert of_prefix(data, camera="top", inference=0).size
    with pytest.raises(SelectionError, match=r"^camera 'observation\.images\.wrist' has no prefix attention"):
        of_prefix(data, camera="wrist", inference=0)


@pytest.mark.parametrize("function", [attention_rollout, attention_flow])
def test_attention_is_not_followed_through_layers_that_do_not_meet(run, function):
    with pytest.raises(SelectionError, match=r"all layers of xvla come after the last prefix layer"):
        function(open_run(run)[0].dataset, inference=0, query=0)


def test_commands_take_the_recording(run, tmp_path):
    says = {
        "inspect": "xvla, float32, 3 layers, 4 heads, 4 denoise steps",
        "verify": "8 checks passed, 0 failed",
    }
    commands_take(run, tmp_path, says)
    store, film = str(open_run(run)[0].path), str(tmp_path / "film.mp4")
    for query, why in (("state", "this policy's prefix holds no state"), ("bowl", "has no prefix attention")):
        done = CliRunner().invoke(
            app, ["overlay", store, "-o", film, "--camera", "wrist", "--prefix-query", query]
        )
        assert isinstance(done.exception, SelectionError)
        assert why in str(done.exception)


def test_verify_takes_letterboxed_cells_that_reach_half_a_stride_out(xvla_policy, tmp_path):
    policy, preprocessor, _ = xvla_policy(resize_imgs_with_padding=(96, 96))
    with (
        record_episodes(policy, tmp_path, AttentionConfig(layers=[-1]), fps=10) as recording,
        recording.episode() as episode,
    ):
        raw = raw_observation(1)
        with torch.inference_mode():
            action = policy.select_action(preprocessor(raw))
        episode.step({name: raw[name][0] for name in (TOP, WRIST, "observation.state")}, action[0])
    (found,) = open_run(tmp_path)
    assert found.layout.cameras[0].geometry.pad_top_px == 24 + 16
    assert not [check for check in verify_episode(found).checks if check.status == "failed"]


def test_the_explorer_serves_the_recording(run):
    facts = explorer_serves(run, n_heads=4)
    (wrist,) = [s for s in facts["segments"] if s["name"] == WRIST]
    assert facts["prefix_len"] < wrist["start"] < wrist["stop"] < facts["n_keys"]
