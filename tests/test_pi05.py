"""Pi0.5 through the demo policy: the contract, and each way in which a map could be wrong."""

from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from adapter_contract import AdapterContract, act  # noqa: E402
from lerobot.processor.env_processor import LiberoProcessorStep  # noqa: E402
from transformers.models.gemma import modeling_gemma  # noqa: E402

from lerobot_attn import AttentionPolicy  # noqa: E402
from lerobot_attn.capture import capture_attention, find_tokenizer  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.errors import CaptureError  # noqa: E402
from lerobot_attn.layout import Kind  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402

IMAGE, WRIST = "observation.images.image", "observation.images.image2"
TASK = "pick up the alphabet soup and place it in the basket"


def raw_observation(seed=0, sizes=((256, 256), (256, 256)), n=2):
    """An observation as the environment gives it, before LIBERO's processor turns the images."""
    generator = torch.Generator().manual_seed(seed)
    return {
        IMAGE: torch.rand(n, 3, *sizes[0], generator=generator),
        WRIST: torch.rand(n, 3, *sizes[1], generator=generator),
        "observation.state": torch.rand(n, 8, generator=generator) * 2 - 1,
        "task": [TASK, "open the drawer"][:n],
    }


# As released it takes ten, which only takes longer.
N_STEPS = 3


@pytest.fixture(scope="module")
def loaded(demo_policy):
    return demo_policy(num_inference_steps=N_STEPS)


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


class Pi05Contract(AdapterContract):
    n_fewer_slots = 150

    @pytest.fixture
    def longer(self, batch):
        """A prompt of fewer slots."""

        @contextmanager
        def with_fewer_slots():
            names = ("observation.language.tokens", "observation.language.attention_mask")
            yield {**batch, **{name: batch[name][:, : self.n_fewer_slots] for name in names}}

        return with_fewer_slots

    def breaks_at(self, base):
        return base.model.paligemma_with_expert.gemma_expert.model.layers[-1].mlp


class TestPi05(Pi05Contract):
    pass


@pytest.fixture(scope="module")
def bfloat16_policy(demo_policy):
    return demo_policy(dtype="bfloat16", num_inference_steps=N_STEPS)[0]


@pytest.fixture(scope="module")
def peft_policy(demo_policy):
    peft = pytest.importorskip("peft")
    base = demo_policy(num_inference_steps=N_STEPS)[0]
    config = peft.LoraConfig(r=2, target_modules=base._get_default_peft_targets()["target_modules"])
    return peft.get_peft_model(base, config).eval()


class TestPi05InBfloat16(Pi05Contract):
    is_bfloat16 = True

    @pytest.fixture
    def policy(self, bfloat16_policy):
        bfloat16_policy.reset()
        return bfloat16_policy


class TestPi05WithLora(Pi05Contract):
    @pytest.fixture
    def policy(self, peft_policy):
        peft_policy.reset()
        return peft_policy


def test_stored_softmax_equals_an_independent_one(policy, batch, monkeypatch):
    softmaxes_of_gemma(policy, batch, monkeypatch)


def softmaxes_of_gemma(policy, batch, monkeypatch):
    """Queries and keys of the very pass, softmaxed in float64 by numpy, against the captured maps."""
    passes = []
    original = modeling_gemma.eager_attention_forward

    def spy(module, query, key, value, mask, scaling, **kwargs):
        passes.append((query.double().numpy(), key.double().numpy(), mask.double().numpy(), scaling))
        return original(module, query, key, value, mask, scaling, **kwargs)

    monkeypatch.setattr(modeling_gemma, "eager_attention_forward", spy)
    with capture_attention(policy, AttentionConfig(layers="all", prefix_layers="all")) as capture:
        act(policy, batch, 5)
    (record,) = capture.drain()
    sizes = adapter_for(policy).describe()
    assert len(passes) == sizes.n_prefix_layers + sizes.n_denoise_steps * sizes.n_layers

    def softmax(query, key, mask, scaling):
        key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
        logits = query @ key.swapaxes(2, 3) * scaling + mask
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    is_query = record.key_mask[:, : record.layout.prefix_len]
    for layer in range(sizes.n_prefix_layers):
        true = softmax(*passes[layer]) * is_query[:, None, :, None]
        np.testing.assert_allclose(record.prefix_attention[layer], true, rtol=2**-10, atol=2**-24)
    for step in range(sizes.n_denoise_steps):
        for layer in range(sizes.n_layers):
            true = softmax(*passes[sizes.n_prefix_layers + step * sizes.n_layers + layer])
            np.testing.assert_allclose(record.suffix_attention[step, layer], true, rtol=2**-10, atol=2**-24)


def test_maps_differ_so_that_a_mixed_up_index_shows(policy, batch):
    """The demo's random maps must be peaked and unalike, else the tests above could not fail."""
    with capture_attention(policy, AttentionConfig(layers="all")) as capture:
        act(policy, batch, 0)
    (record,) = capture.drain()
    maps = record.suffix_attention.astype(np.float32)
    for axis in range(5):
        if maps.shape[axis] > 1:
            assert np.abs(np.diff(maps, axis=axis)).max() > 0.01, axis


@pytest.mark.parametrize("token", [0, 1, 20, 49])
def test_query_i_is_action_i(policy, batch, token):
    """Disturb one action's noise: its own row changes, and its own column, and nothing else."""
    noise = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    disturbed = noise.clone()
    disturbed[:, token] += 3.0
    maps = []
    for value in (noise, disturbed):
        # In the first layer of the first step, tokens have not mixed yet.
        with (
            capture_attention(policy, AttentionConfig(layers=[0], denoise_steps=[0])) as capture,
            torch.inference_mode(),
        ):
            policy.predict_action_chunk(batch, noise=value)
        maps.append(next(capture.drain()).suffix_attention[0, 0, 0].astype(np.float64))
    column = 968 + token
    others = np.delete(np.arange(50), token)
    # Without the disturbed column, every other row keeps its pattern; with it, they all change.
    without = [np.delete(m, column, axis=-1) for m in maps]
    pattern = [m / m.sum(-1, keepdims=True) for m in without]
    change = np.abs(pattern[1] - pattern[0]).max(axis=(0, 2))
    assert change.argmax() == token
    assert change[others].max() < 2e-3 < change[token]
    assert np.abs(maps[1] - maps[0])[:, others, column].max() > 2e-3


def test_words_and_state_digits_are_labelled_from_the_ids(policy, preprocessor):
    """States whose numbers have one, two and three digits, negative ones included."""
    decoder = find_tokenizer(preprocessor)
    for scale in (1.0, 0.02, 3.0):
        observation = raw_observation()
        observation["observation.state"] = observation["observation.state"] * scale
        batch = preprocessor(observation)
        with capture_attention(policy, AttentionConfig(), tokenizer=decoder) as capture:
            act(policy, batch, 0)
        (record,) = capture.drain()
        for env, task in enumerate((TASK, "open the drawer")):
            pieces, labels = record.prompts[env]
            prompt = decoder.decode(batch["observation.language.tokens"][env], skip_special_tokens=True)
            numbers = prompt.split("State:")[1].split(";")[0].split()
            assert len(numbers) == 8
            for dim, number in enumerate(numbers):
                assert "".join(np.array(pieces)[labels.state_dim == dim]).strip() == number
            for word, text in enumerate(task.split()):
                assert "".join(np.array(pieces)[labels.word == word]).strip() == text
            assert labels.word.max() == len(task.split()) - 1
            mask = batch["observation.language.attention_mask"][env].numpy()
            np.testing.assert_array_equal(labels.kind == Kind.PADDING, ~mask)
            kinds = record.key_kind[env]
            assert (kinds[:512] == Kind.IMAGE).all()
            assert (kinds[512:768] == Kind.PADDING).all()
            np.testing.assert_array_equal(kinds[768:968], labels.kind)
            assert (kinds[968:] == Kind.ACTION).all()


def test_without_a_tokenizer_text_is_only_text(policy, batch):
    with capture_attention(policy) as capture:
        act(policy, batch, 0)
    (record,) = capture.drain()
    assert set(np.unique(record.key_kind[0, 768:968])) == {Kind.PADDING, Kind.TEXT}
    assert set(record.token_text[0]) == {""}


SIZES = [
    ((256, 256), (256, 256)),
    ((480, 640), (640, 480)),
    ((360, 360), (224, 224)),
    ((97, 331), (240, 320)),
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("camera", [0, 1])
def test_a_planted_object_lands_in_the_right_patch(policy, preprocessor, sizes, camera):
    find_planted(
        policy, lambda raw: preprocessor(LiberoProcessorStep()._process_observation(raw)), sizes, camera
    )


def find_planted(policy, preprocess, sizes, camera):
    """Light a square in an environment's image; find it in the camera's view and in the image tokens.

    Only the second of the batch has it: the first tells what the tokens are without.
    """
    height, width = sizes[camera]
    side = max(height, width) // 16
    name = (IMAGE, WRIST)[camera]
    tower = policy.model.paligemma_with_expert.paligemma.model.vision_tower
    embedded = []
    handle = tower.vision_model.embeddings.patch_embedding.register_forward_hook(
        lambda module, args, output: embedded.append(output.detach().flatten(2).transpose(1, 2))
    )
    try:
        for y, x in ((side, side), (height // 2, width // 3), (height - 2 * side, width - 2 * side)):
            raw = raw_observation(sizes=sizes)
            raw[IMAGE].fill_(0.2)
            raw[WRIST].fill_(0.2)
            raw[name][1, :, y : y + side, x : x + side] = 1.0
            batch = preprocess(raw)
            embedded.clear()
            with capture_attention(policy) as capture:
                act(policy, batch, 0)
            (record,) = capture.drain()
            layout = record.layout
            without, view = adapter_for(policy).camera_views(batch)[name].numpy()
            assert not (without[..., 0] > 200).any()
            ys, xs = np.nonzero(view[..., 0] > 200)
            # LIBERO's processor turns the picture by 180 degrees.
            assert abs(ys.mean() + 0.5 - (height - y - side / 2)) < 1
            assert abs(xs.mean() + 0.5 - (width - x - side / 2)) < 1
            change = torch.stack([(b - a).norm(dim=-1) for a, b in embedded]).flatten().numpy()
            token = int(change.argmax())
            rows, columns = layout.key_patch()
            geometry = layout.cameras[camera].geometry
            row, column = geometry.patch_at(ys.mean() + 0.5, xs.mean() + 0.5)
            assert layout.key_camera()[token] == camera
            assert layout.cameras[camera].name == name
            # The square is about one patch large and may straddle two.
            assert abs(rows[token] - row) <= 1
            assert abs(columns[token] - column) <= 1
            lit = np.flatnonzero(change > change.max() / 2)
            weights = change[lit] / change[lit].sum()
            centre_y = (rows[lit] + 0.5) @ weights * 14
            centre_x = (columns[lit] + 0.5) @ weights * 14
            scale = geometry.resized_height_px / height
            assert abs(centre_y - (geometry.pad_top_px + (ys.mean() + 0.5) * scale)) < 7
            assert abs(centre_x - (geometry.pad_left_px + (xs.mean() + 0.5) * scale)) < 7
    finally:
        handle.remove()


def test_a_missing_camera_is_put_last_and_masked(policy, preprocessor):
    """The policy puts the cameras that it got first: the layout must follow the batch, not the config."""
    batch = preprocessor(raw_observation())
    del batch[IMAGE]
    with capture_attention(policy) as capture:
        act(policy, batch, 0)
    (record,) = capture.drain()
    assert record.layout.cameras[0].name == WRIST
    assert [camera.is_empty for camera in record.layout.cameras] == [False, True, True]
    assert not record.suffix_attention[..., 256:768].any()
    assert record.suffix_attention[..., :256].any()


def test_compiled_policies_are_run_uncompiled(demo_policy, preprocessor, caplog):
    settings = {"num_inference_steps": N_STEPS}
    compiled = demo_policy(compile_model="true", compile_mode="default", **settings)[0]
    plain = demo_policy(**settings)[0]
    batch = preprocessor(raw_observation())
    wrapper = vars(compiled.model)["sample_actions"]
    with caplog.at_level("WARNING"), capture_attention(compiled) as capture:
        actions, _ = act(compiled, batch, 0)
        act(compiled, batch, 0)
    assert len(capture.records) == 2
    expected, _ = act(plain, batch, 0)
    assert torch.equal(actions, expected)
    assert vars(compiled.model)["sample_actions"] is wrapper
    said = [record.message for record in caplog.records if "uncompiled" in record.message]
    assert said == [
        "compile_model=true: while attention is captured the policy runs uncompiled; "
        "--eval.attention.compiled=true keeps it compiled"
    ]


@pytest.mark.parametrize("n", [1, 3])
def test_any_batch_size(policy, preprocessor, n):
    observation = raw_observation(n=2)
    take = [0] * n
    observation = {
        key: value[take] if torch.is_tensor(value) else [value[0]] * n for key, value in observation.items()
    }
    batch = preprocessor(observation)
    with capture_attention(policy) as capture:
        act(policy, batch, 0)
    (record,) = capture.drain()
    assert record.batch_size == n
    assert record.suffix_attention.shape[2] == n


def test_attention_policy_wraps_delegates_and_saves(policy, batch):
    from lerobot.policies import PreTrainedPolicy

    wrapped = AttentionPolicy(policy)
    assert isinstance(wrapped, PreTrainedPolicy)
    assert wrapped.config is policy.config
    assert wrapped.supports_rtc() == policy.supports_rtc()
    assert wrapped.model is policy.model
    with pytest.raises(CaptureError, match=r"call enable_attention_map_saving\(\) first"):
        wrapped.get_attention_maps()
    expected, _ = act(policy, batch, 4)
    wrapped.enable_attention_map_saving()
    assert wrapped.get_attention_maps() == {}
    actions, _ = act(wrapped, batch, 4)
    assert torch.equal(actions, expected)
    maps = wrapped.get_attention_maps(last_n_layers=2)
    assert list(maps) == list(range(N_STEPS))
    n_layers = adapter_for(policy).describe().n_layers
    assert list(maps[0]["attention_weights"]) == [n_layers - 2, n_layers - 1]
    assert maps[0]["time"] == 1.0
    assert abs(maps[2]["time"] - 1 / 3) < 1e-6
    assert (maps[1]["prefix_len"], maps[1]["suffix_len"]) == (968, 50)
    with capture_attention(policy, AttentionConfig(layers="all")) as capture:
        act(policy, batch, 4)
    (record,) = capture.drain()
    for step in range(N_STEPS):
        for layer, weights in maps[step]["attention_weights"].items():
            assert weights.shape == (2, 8, 50, 1018)
            np.testing.assert_array_equal(weights.numpy(), record.suffix_attention[step, layer])
    with pytest.raises(CaptureError, match=f"last_n_layers: got 99, expected 1 to {n_layers}"):
        wrapped.get_attention_maps(last_n_layers=99)
    wrapped.clear_attention_maps()
    assert wrapped.get_attention_maps() == {}
    wrapped.disable_attention_map_saving()
    assert "predict_action_chunk" not in vars(policy)


def test_attention_policy_saves_the_wrapped_checkpoint(policy, tmp_path):
    from safetensors.torch import load_file

    AttentionPolicy(policy).save_pretrained(tmp_path / "a")
    policy.save_pretrained(tmp_path / "b")
    wrapped, plain = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert wrapped.keys() == plain.keys()
    assert all(torch.equal(wrapped[key], plain[key]) for key in plain)


def test_rtc_guidance_is_captured(demo_policy, preprocessor):
    first, second = rtc_records(demo_policy(num_inference_steps=N_STEPS)[0], preprocessor(raw_observation()))
    for record in (first, second):
        assert record.prefix_attention.any()
    assert not np.array_equal(first.suffix_attention[-1], second.suffix_attention[-1]), "guidance changes it"


def rtc_records(policy, batch):
    """Return the records of two inferences with real-time chunking, the second of them guided.

    From its second inference on RTC computes gradients: what is captured must not carry a graph.
    """
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy.config.rtc_config = RTCConfig()
    policy.init_rtc_processor()

    def two_inferences():
        torch.manual_seed(0)
        first = policy.predict_action_chunk(batch)
        left_over = torch.zeros(2, policy.config.chunk_size, policy.config.max_action_dim)
        left_over[:, :40, : first.shape[-1]] = first[:, 10:].detach()
        second = policy.predict_action_chunk(batch, inference_delay=4, prev_chunk_left_over=left_over)
        return first.detach(), second.detach()

    expected = two_inferences()
    failures = []
    config = AttentionConfig(layers="all", prefix_layers="all")
    with capture_attention(policy, config, on_failure=failures.append) as capture:
        found = two_inferences()
    assert not failures
    assert all(map(torch.equal, found, expected))
    first, second = capture.drain()
    for record in (first, second):
        assert len(record.flow_time) == N_STEPS
        for maps in (record.suffix_attention, record.suffix_attention_mean):
            assert np.abs(np.nansum(maps.astype(np.float32), -1) - 1).max() < 2**-10
        assert np.isfinite(record.action_chunk).all()
    return first, second


@pytest.mark.parametrize(
    ("autocast", "dtype"), [(None, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16")]
)
def test_the_dtype_that_acted_is_said(policy, batch, autocast, dtype):
    """`--policy.use_amp=true`: the policy's own dtype says nothing of what its attention was rounded to."""
    with (
        capture_attention(policy, AttentionConfig()) as capture,
        torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        act(policy, batch, 0)
    (record,) = capture.drain()
    assert record.attention_dtype == dtype


LONG_TASK = " ".join(f"word{i}" for i in range(90))


@pytest.mark.parametrize("n_words", [90, 14])
def test_prompts_that_are_cut_keep_their_words(policy, preprocessor, caplog, n_words):
    """LeRobot cuts a prompt that is longer than the slots without a word: in the task, or in the state."""
    tokenizer = find_tokenizer(preprocessor)
    observation = raw_observation()
    task = " ".join(LONG_TASK.split()[:n_words])
    observation["task"] = [task, "open the drawer"]
    batch = preprocessor(observation)
    names = ("observation.language.tokens", "observation.language.attention_mask")
    if n_words == 14:  # as if there were fewer slots
        whole = len(tokenizer(f"Task: {task}, State:")["input_ids"])
        batch = {**batch, **{name: batch[name][:, : whole + 9] for name in names}}
    assert batch[names[1]][0].all()
    with (
        capture_attention(policy, AttentionConfig(), tokenizer=tokenizer) as capture,
        caplog.at_level("WARNING"),
    ):
        act(policy, batch, 0)
        act(policy, batch, 0)
    for record in capture.drain():
        assert record.prompt_truncated.tolist() == [True, False]
        pieces, labels = record.prompts[0]
        found = [
            "".join(np.array(pieces)[labels.word == word]).strip() for word in range(labels.word.max() + 1)
        ]
        assert found[:-1] == task.split()[: len(found) - 1]
        assert task.split()[len(found) - 1].startswith(found[-1])
        assert (labels.kind == Kind.TEXT).sum() == 0
        assert (labels.state_dim.max() >= 0) == (n_words == 14)
        assert record.prompts[1].labels.word.max() == 2
    said = [record.getMessage() for record in caplog.records if "did not fit" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize(
    ("prompt", "words", "numbers", "is_truncated"),
    [
        ("Task: pick up, State: 1 -2 3;\nAction: ", 2, 3, False),
        ("<bos>Task: pick, State: up, State: 1;\nAction: ", 3, 1, False),
        ("Task: , State: 1 2;\nAction: ", 0, 2, False),
        ("Task: $$ 抓 🥣\nagain, State: 1 2;\nAction: ", 4, 2, False),
        ("Task: pick up, State: 1 -2 3;\nAct", 2, 3, True),
        ("Task: pick up, State: 1 -", 2, 1, True),
        ("Task: pick up, Sta", 2, 0, True),
        ("Task: pick up the", 3, 0, True),
    ],
)
def test_prompts_are_parsed(policy, prompt, words, numbers, is_truncated):
    parsed = adapter_for(policy).parse_prompt(prompt)
    assert parsed.is_truncated == is_truncated
    kinds = [span.kind for span in parsed.spans]
    assert (kinds.count(Kind.TASK), kinds.count(Kind.STATE)) == (words, numbers)
    assert adapter_for(policy).parse_prompt("something else") is None
