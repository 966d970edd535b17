"""SmolVLA through its demo policy: the contract, and each way in which one of its maps could be wrong."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from adapter_contract import AdapterContract, act  # noqa: E402
from lerobot.policies.smolvla.smolvlm_with_expert import SmolVLMWithExpertModel  # noqa: E402
from lerobot.processor.env_processor import LiberoProcessorStep  # noqa: E402
from test_pi05 import IMAGE, N_STEPS, SIZES, TASK, WRIST, raw_observation, rtc_records  # noqa: E402

from lerobot_attn import AttentionPolicy  # noqa: E402
from lerobot_attn.capture import capture_attention, find_tokenizer  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.demo.modeling_smolvla_tiny import SmolVLATinyPolicy  # noqa: E402
from lerobot_attn.errors import ConfigError  # noqa: E402
from lerobot_attn.interventions import BlockAttention, intervene  # noqa: E402
from lerobot_attn.layout import Kind  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402

CHUNK, HEADS = 50, 15
EVERYTHING = AttentionConfig(layers="all", prefix_layers="all")


@pytest.fixture(scope="module")
def loaded(smolvla_policy):
    return smolvla_policy(num_steps=N_STEPS)


@pytest.fixture(scope="module")
def preprocessor(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def batch(preprocessor):
    return preprocessor(raw_observation())


@pytest.fixture
def policy(loaded):
    loaded[0].reset()
    return loaded[0]


def captured(policy, batch, config=EVERYTHING, **options):
    """Return the record of one inference."""
    policy.reset()
    with capture_attention(policy, config, **options) as capture:
        act(policy, batch, 0)
    (record,) = capture.drain()
    return record


class SmolVLAContract(AdapterContract):
    @pytest.fixture
    def longer(self, preprocessor):
        @contextmanager
        def with_a_longer_prompt():
            raw = raw_observation()
            raw["task"] = [f"{TASK} and then turn on the stove", "open the drawer"]
            yield preprocessor(raw)

        return with_a_longer_prompt

    def breaks_at(self, base):
        return base.model.vlm_with_expert.lm_expert.layers[-1].mlp


class TestSmolVLA(SmolVLAContract):
    pass


def test_a_block_of_one_head_leaves_the_others_whose_mask_all_heads_share(policy, batch):
    policy.reset()
    with intervene(policy, BlockAttention({"camera": IMAGE}, heads=[3])):
        record = captured(policy, batch)
    segment = next(one for one in record.layout.segments if one.name == IMAGE)
    read = np.nan_to_num(record.suffix_attention[..., segment.start : segment.stop]).max((0, 1, 2, 4, 5))
    assert np.flatnonzero(read == 0).tolist() == [3]


@pytest.fixture(scope="module")
def in_bfloat16(smolvla_policy):
    """As released: SmolVLM and expert in bfloat16, what stands around them in float32."""
    policy = smolvla_policy(num_steps=N_STEPS)[0]
    policy.model.vlm_with_expert.to(torch.bfloat16)
    return policy


class TestSmolVLAInBfloat16(SmolVLAContract):
    is_bfloat16 = True

    @pytest.fixture
    def policy(self, in_bfloat16):
        in_bfloat16.reset()
        return in_bfloat16


@pytest.fixture(scope="module")
def wrapped(smolvla_policy):
    peft = pytest.importorskip("peft")
    base = smolvla_policy(num_steps=N_STEPS)[0]
    config = peft.LoraConfig(r=2, target_modules=base._get_default_peft_targets()["target_modules"])
    return peft.get_peft_model(base, config).eval()


class TestSmolVLAWithLora(SmolVLAContract):
    @pytest.fixture
    def policy(self, wrapped):
        wrapped.reset()
        return wrapped


@pytest.fixture(scope="module")
def compiled(smolvla_policy):
    return smolvla_policy(num_steps=2, compile_model="true", compile_mode="default")[0]


@pytest.fixture
def run_eagerly():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("run_eagerly")
class TestCompiledSmolVLA(SmolVLAContract):
    settings = {"compiled": True}  # noqa: RUF012
    can_edit = False

    @pytest.fixture
    def policy(self, compiled):
        compiled.reset()
        return compiled


def test_traced_maps_are_the_uncompiled_ones(loaded, preprocessor, monkeypatch):
    """The compiler follows the tap through the graphs, of which there are several. Inductor takes minutes."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: compile_(function, backend="eager"))
    small = {"num_vlm_layers": 2, "vision_depth": 1, "num_steps": 1, "resize_imgs_with_padding": (128, 128)}
    policy = SmolVLATinyPolicy(
        replace(loaded[0].config, compile_model=True, compile_mode="default", **small)
    ).eval()
    batch = preprocessor(raw_observation())
    noise = torch.randn(2, CHUNK, 32, generator=torch.Generator().manual_seed(0))
    actions, records = [], []
    for is_compiled in (False, True):
        config = replace(EVERYTHING, compiled=is_compiled)
        with torch.inference_mode(), capture_attention(policy, config) as capture:
            actions.append(policy.predict_action_chunk(batch, noise=noise))
            records += capture.drain()
    torch._dynamo.reset()
    assert torch.equal(*actions)
    plain, traced = records
    for name in ("suffix_attention", "suffix_attention_mean", "prefix_attention", "flow_time"):
        np.testing.assert_array_equal(getattr(traced, name), getattr(plain, name), err_msg=name)


@pytest.fixture(scope="module")
def with_other_settings(loaded):
    """Make a policy of the same weights' seed with other settings."""

    def make(**settings):
        return SmolVLATinyPolicy(replace(loaded[0].config, **settings)).eval()

    return make


def test_stored_softmax_equals_an_independent_one(policy, batch, monkeypatch):
    """Queries and keys of the very pass, softmaxed in float64 by numpy, against the captured maps."""
    passes = []
    original = SmolVLMWithExpertModel.eager_attention_forward

    def spy(self, mask, batch_size, head_dim, query, key, value):
        passes.append((query.double().numpy(), key.double().numpy(), mask.numpy(), head_dim**-0.5))
        return original(self, mask, batch_size, head_dim, query, key, value)

    monkeypatch.setattr(SmolVLMWithExpertModel, "eager_attention_forward", spy)
    record = captured(policy, batch)
    sizes = adapter_for(policy).describe()
    assert len(passes) == sizes.n_prefix_layers + sizes.n_denoise_steps * sizes.n_layers

    def softmax(query, key, mask, scaling):
        query, key = query.swapaxes(1, 2), key.swapaxes(1, 2)
        key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
        logits = np.where(mask[:, None], query @ key.swapaxes(2, 3) * scaling, -np.inf)
        weights = np.exp(logits - np.maximum(logits.max(-1, keepdims=True), -1e30))
        return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)

    prefix_len = record.layout.prefix_len
    is_query = record.key_mask[:, :prefix_len]
    for layer in range(sizes.n_prefix_layers):
        true = softmax(*passes[layer]) * is_query[:, None, :, None]
        np.testing.assert_allclose(record.prefix_attention[layer], true, rtol=2**-10, atol=2**-24)
    for step in range(sizes.n_denoise_steps):
        for layer in range(sizes.n_layers):
            true = softmax(*passes[sizes.n_prefix_layers + step * sizes.n_layers + layer])
            found = record.suffix_attention[step, layer]
            assert true.shape[-1] == (prefix_len if layer % 2 else prefix_len + CHUNK)
            np.testing.assert_allclose(found[..., : true.shape[-1]], true, rtol=2**-10, atol=2**-24)
            assert np.isnan(found[..., true.shape[-1] :]).all()


def keys_of_the_expert(policy):
    sites = adapter_for(policy).sites().items()
    return [info.keys for site, info in sites if site.stream == "expert" and site.what == "attention"]


def test_layers_that_cross_attend_see_the_prefix_alone(policy, batch):
    assert keys_of_the_expert(policy) == ["prefix+suffix", "prefix"] * 2
    record = captured(policy, batch)
    prefix_len = record.layout.prefix_len
    assert record.layers_seeing_suffix == {0, 2}
    for maps in (record.suffix_attention, record.suffix_attention_mean):
        assert np.isnan(maps[:, 1::2, ..., prefix_len:]).all(), "absent, which is not zero"
        assert np.isfinite(maps[:, ::2]).all()
        assert np.isfinite(maps[..., :prefix_len]).all()


def test_actions_are_causal(policy, batch):
    record = captured(policy, batch)
    prefix_len = record.layout.prefix_len
    among = record.suffix_attention[:, ::2, ..., prefix_len:].astype(np.float32)
    later = np.triu(np.ones((CHUNK, CHUNK), bool), k=1)
    assert not among[..., later].any()
    assert (among.max(axis=(0, 1, 2, 3))[~later] > 0).all()


@pytest.mark.parametrize("action", [0, 1, 20, 49])
def test_query_i_is_action_i(policy, batch, action):
    """Disturb one action's noise: in the first layer its own row changes, after it only those that see it."""
    noise = torch.randn(2, CHUNK, 32, generator=torch.Generator().manual_seed(0))
    disturbed = noise.clone()
    disturbed[:, action] += 3.0
    maps = []
    for value in (noise, disturbed):
        with (
            capture_attention(policy, AttentionConfig(layers=[0, 1], denoise_steps=[0])) as capture,
            torch.inference_mode(),
        ):
            policy.predict_action_chunk(batch, noise=value)
        (record,) = capture.drain()
        maps.append(record.suffix_attention[0].astype(np.float64))
    prefix_len = record.layout.prefix_len
    assert record.layout.query_of_action(action) == action
    own, cross = ([m[layer, :, :, :, :prefix_len] for m in maps] for layer in (0, 1))
    pattern = [m / m.sum(-1, keepdims=True) for m in own]
    change = np.abs(pattern[1] - pattern[0]).max(axis=(0, 1, 3))
    assert change.argmax() == action
    assert np.delete(change, action).max() < 2e-3 < change[action]
    change = np.abs(cross[1] - cross[0]).max(axis=(0, 1, 3))
    assert not change[:action].any()
    assert change[action] > 2e-3


def embedded_prefixes(policy, batches):
    """Return the prefix as the policy embeds it for each batch: (batch, token, channel)."""
    embed, found = policy.model.embed_prefix, []

    def spy(*args, **kwargs):
        result = embed(*args, **kwargs)
        found.append(result[0].detach().float())
        return result

    policy.model.embed_prefix = spy
    try:
        for batch in batches:
            act(policy, batch, 0)
    finally:
        del policy.model.embed_prefix
    return found


def changed(batch, name):
    """The batch with another picture, prompt or state."""
    if name == "language":
        tokens = batch["observation.language.tokens"]
        return {**batch, "observation.language.tokens": tokens.roll(1, dims=1)}
    key = "observation.state" if name == "state" else name
    return {**batch, key: 1 - batch[key]}


LAYOUTS = {
    "as released": {},
    "image special tokens": {"add_image_special_tokens": True},
    "a fixed prefix length": {"prefix_length": 200},
    "an empty camera": {"empty_cameras": 1},
}


@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)
def test_segments_are_where_the_policy_put_them(with_other_settings, batch, settings):
    """Change one input at a time: exactly the tokens change that the layout says are its."""
    policy = with_other_settings(**settings)
    record = captured(policy, batch)
    layout = record.layout
    names = [IMAGE, WRIST, "language", "state"]
    before, *after = embedded_prefixes(policy, [batch, *(changed(batch, name) for name in names)])
    assert before.shape[1] == layout.prefix_len
    for name, embedded in zip(names, after, strict=True):
        (segment,) = [s for s in layout.segments if s.name == name]
        places = torch.nonzero((embedded - before).abs().amax(dim=(0, 2)) > 1e-6)[:, 0]
        assert segment.start <= places.min() <= places.max() < segment.stop, name
        assert len(places) >= len(segment) / 2, name
    kinds = record.key_kind[0]
    expected = {"special": Kind.SPECIAL, "image": Kind.IMAGE, "state": Kind.STATE, "action": Kind.ACTION}
    for segment in layout.segments:
        if segment.kind in expected and "empty" not in segment.name:
            assert (kinds[segment.start : segment.stop] == expected[segment.kind]).all(), segment
        elif segment.kind != "language":
            assert (kinds[segment.start : segment.stop] == Kind.PADDING).all(), segment
    assert layout.prefix_len == settings.get("prefix_length", layout.prefix_len)
    assert sum(s.kind == "special" for s in layout.segments) == (4 if "add_image" in str(settings) else 0)
    assert [c.is_empty for c in layout.cameras] == [False, False] + [True] * settings.get("empty_cameras", 0)


def test_missing_cameras_have_no_tokens(policy, batch):
    whole = captured(policy, batch)
    without = {key: value for key, value in batch.items() if key != IMAGE}
    record = captured(policy, without)
    assert [camera.name for camera in record.layout.cameras] == [WRIST]
    assert record.layout.prefix_len == whole.layout.prefix_len - 64


def test_prompts_are_as_long_as_the_longest(policy, preprocessor):
    lengths = []
    for tasks in ([TASK, "open the drawer"], ["open the drawer", "open it"]):
        raw = raw_observation()
        raw["task"] = tasks
        record = captured(policy, preprocessor(raw))
        lengths.append(len(record.layout.language))
        assert record.key_mask[0].all()
        assert not record.key_mask[1].all()
    assert lengths[0] > lengths[1]


def test_words_and_the_state_token_are_labelled(policy, preprocessor, batch):
    record = captured(policy, batch, AttentionConfig(), tokenizer=find_tokenizer(preprocessor))
    layout = record.layout
    assert layout.segments[-2].kind == "state"
    assert (record.key_kind[:, layout.prefix_len - 1] == Kind.STATE).all()
    for env, task in enumerate((TASK, "open the drawer")):
        pieces, labels = record.prompts[env]
        for word, text in enumerate(task.split()):
            assert "".join(np.array(pieces)[labels.word == word]).strip() == text
        assert labels.word.max() == len(task.split()) - 1
        mask = batch["observation.language.attention_mask"][env].numpy().astype(bool)
        np.testing.assert_array_equal(labels.kind == Kind.PADDING, ~mask)
    # Neither images nor words see the state.
    prefix = captured(policy, batch).prefix_attention
    assert not prefix[..., :-1, -1].any()
    assert prefix[..., -1, -1].all()


def test_maps_differ_so_that_a_mixed_up_index_shows(policy, batch):
    """The demo's random maps must be peaked and unalike, else the tests above could not fail."""
    record = captured(policy, batch)
    maps = record.suffix_attention[..., : record.layout.prefix_len].astype(np.float32)
    for axis in range(5):
        assert np.abs(np.diff(maps, axis=axis)).max() > 0.01, axis
    strongest = maps.max(-1).mean()
    assert 4 / record.layout.n_keys < strongest < 0.8


def test_actions_are_small_and_noise_is_taken_away(smolvla_policy, batch):
    policy = smolvla_policy()[0]
    torch.manual_seed(0)
    chunk = policy.predict_action_chunk(batch)
    assert chunk.shape == (2, CHUNK, 7)
    assert chunk.abs().max() < 4
    assert chunk.std(1).max() < 0.6  # what is left of noise of standard deviation 1


@pytest.mark.parametrize("sizes", [*SIZES, ((512, 512), (512, 512))])
@pytest.mark.parametrize("camera", [0, 1])
def test_a_planted_object_lands_in_the_right_patch(policy, preprocessor, sizes, camera):
    """Light a square in an environment's image; find it in the camera's view and in the image tokens.

    Only the second of the batch has it: the first tells what the tokens are without.
    """
    height, width = sizes[camera]
    side = max(height, width) // 16
    name = (IMAGE, WRIST)[camera]
    vlm = policy.model.vlm_with_expert.get_vlm_model()
    embedded = []

    def note(module, args, output):
        # Before the image encoder mixes the patches; the connector makes a token of 4×4 of them.
        patches = output.detach().flatten(2).transpose(1, 2).contiguous()
        embedded.append(vlm.connector.pixel_shuffle(patches, vlm.connector.scale_factor))

    handle = vlm.vision_model.embeddings.patch_embedding.register_forward_hook(note)
    try:
        for y, x in ((side, side), (height // 2, width // 3), (height - 2 * side, width - 2 * side)):
            raw = raw_observation(sizes=sizes)
            raw[IMAGE].fill_(0.2)
            raw[WRIST].fill_(0.2)
            raw[name][1, :, y : y + side, x : x + side] = 1.0
            batch = preprocessor(LiberoProcessorStep()._process_observation(raw))
            embedded.clear()
            layout = captured(policy, batch).layout
            without, view = adapter_for(policy).camera_views(batch)[name].numpy()
            assert not (without[..., 0] > 200).any()
            ys, xs = np.nonzero(view[..., 0] > 200)
            # LIBERO's processor turns the picture by 180 degrees.
            assert abs(ys.mean() + 0.5 - (height - y - side / 2)) < 1
            assert abs(xs.mean() + 0.5 - (width - x - side / 2)) < 1
            change = torch.stack([(b - a).norm(dim=-1) for a, b in embedded]).flatten().numpy()
            token = int(change.argmax())
            assert layout.key_camera()[token] == camera
            assert layout.cameras[camera].name == name
            rows, columns = layout.key_patch()
            geometry = layout.cameras[camera].geometry
            assert (geometry.grid_rows, geometry.grid_columns) == (8, 8)
            # All tokens that the square touches, and no others, a pixel of interpolation aside.
            lit = {(rows[i], columns[i]) for i in np.flatnonzero(change > change.max() / 20)}
            touched = {
                geometry.patch_at(py, px)
                for py in np.linspace(ys.min() - 0.5, ys.max() + 1.5, 9)
                for px in np.linspace(xs.min() - 0.5, xs.max() + 1.5, 9)
            }
            assert (rows[token], columns[token]) in touched
            assert lit <= touched
            inner = geometry.patch_at(ys.mean() + 0.5, xs.mean() + 0.5)
            assert inner in lit
    finally:
        handle.remove()


def test_rtc_guidance_is_captured(smolvla_policy, preprocessor):
    policy = smolvla_policy(num_steps=N_STEPS)[0]
    first, second = rtc_records(policy, preprocessor(raw_observation()))
    for record in (first, second):
        assert record.prefix_attention.any()
    assert not np.array_equal(first.suffix_attention[-1], second.suffix_attention[-1], equal_nan=True), (
        "guidance changes it"
    )


@pytest.mark.parametrize("n", [1, 3])
def test_any_batch_size(policy, batch, n):
    taken = {key: value[[0] * n] if torch.is_tensor(value) else value for key, value in batch.items()}
    record = captured(policy, taken)
    assert record.batch_size == n
    assert record.suffix_attention.shape[2:4] == (n, HEADS)


@pytest.mark.parametrize(("autocast", "dtype"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_the_dtype_that_acted_is_said(policy, batch, autocast, dtype):
    with torch.autocast("cpu", dtype=autocast):
        assert captured(policy, batch).attention_dtype == dtype


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"attention_mode": "self_attn"}, ["prefix+suffix"] * 4),
        ({"self_attn_every_n_layers": -1}, ["prefix"] * 4),
        ({"self_attn_every_n_layers": 3}, ["prefix+suffix", "prefix", "prefix", "prefix+suffix"]),
        ({"self_attn_every_n_layers": -1, "num_expert_layers": 2}, ["prefix"] * 2),
    ],
)
def test_which_layers_see_the_actions(with_other_settings, batch, settings, keys):
    """The expert may have fewer layers than the VLM; its layers are numbered by themselves."""
    policy = with_other_settings(**settings)
    assert keys_of_the_expert(policy) == keys
    record = captured(policy, batch)
    is_absent = np.isnan(record.suffix_attention[..., record.layout.prefix_len :]).all(axis=(0, 2, 3, 4, 5))
    assert is_absent.tolist() == [key == "prefix" for key in keys]


def test_two_observations_show_the_newer_one(policy, batch):
    """LeRobot takes the last of several."""
    several = {**batch, IMAGE: torch.stack([1 - batch[IMAGE], batch[IMAGE]], dim=1)}
    view = adapter_for(policy).camera_views(several)[IMAGE]
    assert torch.equal(view, adapter_for(policy).camera_views(batch)[IMAGE])
    assert captured(policy, several).layout == captured(policy, batch).layout


def test_attention_policy_gives_what_each_layer_sees(policy, batch):
    watched = AttentionPolicy(policy)
    watched.enable_attention_map_saving()
    act(watched, batch, 0)
    weights = watched.get_attention_maps(last_n_layers=2)[0]["attention_weights"]
    prefix_len = captured(policy, batch).layout.prefix_len
    assert {layer: value.shape[-1] for layer, value in weights.items()} == {
        2: prefix_len + CHUNK,
        3: prefix_len,
    }
    watched.disable_attention_map_saving()


def test_it_is_saved_whole_and_moves(smolvla_checkpoint, smolvla_policy, tmp_path):
    from safetensors.torch import load_file

    policy = smolvla_policy()[0]
    saved, live = load_file(smolvla_checkpoint / "model.safetensors"), policy.state_dict()
    assert saved.keys() == live.keys()
    assert [key for key in saved if not torch.equal(saved[key], live[key])] == []
    for path in smolvla_checkpoint.glob("*.json"):
        assert str(smolvla_checkpoint) not in path.read_text(), path.name
    assert sum(parameter.numel() for parameter in policy.parameters()) < 1_500_000
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.25)
    policy.save_pretrained(tmp_path)
    again = type(policy).from_pretrained(tmp_path).state_dict()
    assert [key for key, value in policy.state_dict().items() if not torch.equal(again[key], value)] == []


def test_it_is_built_without_the_hub_and_leaves_lerobot_as_it_was(loaded):
    from lerobot.policies.smolvla import smolvlm_with_expert
    from transformers import AutoConfig, AutoProcessor

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (SmolVLATinyPolicy(loaded[0].config) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert smolvlm_with_expert.AutoConfig is AutoConfig
    assert smolvlm_with_expert.AutoProcessor is AutoProcessor


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_vlm_weights": True}, "policy.load_vlm_weights is true, expected false"),
        ({"width": 30}, "at least|expected more than policy.max_action_dim = 32"),
        ({"width": 121}, "a multiple of policy.heads = 15"),
        ({"heads": 14}, "a multiple of"),
        ({"head_dim": 15}, "policy.head_dim is 15, expected even"),
        ({"num_vlm_layers": 0}, "policy.num_vlm_layers is 0"),
    ],
)
def test_sizes_that_do_not_fit(loaded, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        replace(loaded[0].config, **settings)
    assert "\n" not in str(caught.value)
