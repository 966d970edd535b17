"""Pi0 through its demo policy: the contract, and what a state token that opens the suffix could get wrong."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from adapter_contract import act  # noqa: E402
from lerobot.processor.env_processor import LiberoProcessorStep  # noqa: E402
from test_pi05 import (  # noqa: E402
    IMAGE,
    N_STEPS,
    SIZES,
    TASK,
    WRIST,
    Pi05Contract,
    find_planted,
    raw_observation,
    rtc_records,
    softmaxes_of_gemma,
)

from lerobot_attn.capture import capture_attention, find_tokenizer  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.layout import Kind  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402

CAMERAS, TEXT, CHUNK = 3 * 256, 48, 50
PREFIX = CAMERAS + TEXT


@pytest.fixture(scope="module")
def loaded(pi0_policy):
    return pi0_policy(num_inference_steps=N_STEPS)


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


class Pi0Contract(Pi05Contract):
    n_fewer_slots = 30


class TestPi0(Pi0Contract):
    pass


@pytest.fixture(scope="module")
def in_bfloat16(pi0_policy):
    return pi0_policy(dtype="bfloat16", num_inference_steps=N_STEPS)[0]


@pytest.fixture(scope="module")
def wrapped(pi0_policy):
    peft = pytest.importorskip("peft")
    base = pi0_policy(num_inference_steps=N_STEPS)[0]
    config = peft.LoraConfig(r=2, target_modules=base._get_default_peft_targets()["target_modules"])
    return peft.get_peft_model(base, config).eval()


@pytest.fixture(scope="module")
def compiled(pi0_policy):
    return pi0_policy(num_inference_steps=2, compile_model="true", compile_mode="default")[0]


class TestPi0InBfloat16(Pi0Contract):
    is_bfloat16 = True

    @pytest.fixture
    def policy(self, in_bfloat16):
        in_bfloat16.reset()
        return in_bfloat16


class TestPi0WithLora(Pi0Contract):
    @pytest.fixture
    def policy(self, wrapped):
        wrapped.reset()
        return wrapped


@pytest.fixture
def run_eagerly():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("run_eagerly")
class TestCompiledPi0(Pi0Contract):
    settings = {"compiled": True}  # noqa: RUF012
    can_edit = False

    @pytest.fixture
    def policy(self, compiled):
        compiled.reset()
        return compiled


def test_the_suffix_opens_with_the_state(policy, batch):
    with capture_attention(policy, AttentionConfig(layers="all")) as capture:
        act(policy, batch, 0)
    (record,) = capture.drain()
    layout = record.layout
    assert (layout.prefix_len, layout.n_queries, layout.n_keys) == (PREFIX, 1 + CHUNK, PREFIX + 1 + CHUNK)
    assert layout.first_action_query == 1
    assert (record.key_kind[:, PREFIX] == Kind.STATE).all()
    assert (record.key_kind[:, PREFIX + 1 :] == Kind.ACTION).all()
    # The state does not see the actions; the actions see it and one another.
    maps = record.suffix_attention
    assert not maps[..., 0, PREFIX + 1 :].any()
    assert maps[..., 0, PREFIX].any()
    assert (maps[..., 1:, PREFIX:].astype(np.float32).max(axis=(0, 1, 2, 3)) > 0).all()


@pytest.mark.parametrize("action", [0, 1, 20, 49])
def test_action_i_is_query_i_plus_1(policy, batch, action):
    """Disturb one action's noise: the row that `query_of_action` names changes, and no other."""
    noise = torch.randn(2, CHUNK, 32, generator=torch.Generator().manual_seed(0))
    disturbed = noise.clone()
    disturbed[:, action] += 3.0
    maps = []
    for value in (noise, disturbed):
        # In the first layer of the first step, tokens have not mixed yet.
        with (
            capture_attention(policy, AttentionConfig(layers=[0], denoise_steps=[0])) as capture,
            torch.inference_mode(),
        ):
            policy.predict_action_chunk(batch, noise=value)
        (record,) = capture.drain()
        maps.append(record.suffix_attention[0, 0, 0].astype(np.float64))
    query = record.layout.query_of_action(action)
    column = PREFIX + query
    without = [np.delete(m, column, axis=-1) for m in maps]
    pattern = [m / m.sum(-1, keepdims=True) for m in without]
    change = np.abs(pattern[1] - pattern[0]).max(axis=(0, 2))
    assert change.argmax() == query
    assert np.delete(change, query).max() < 2e-3 < change[query]
    others = np.delete(np.arange(1 + CHUNK), [0, query])  # the state does not see it
    assert np.abs(maps[1] - maps[0])[:, others, column].max() > 2e-3


def test_the_state_is_query_0(policy, preprocessor):
    maps = []
    for scale in (1.0, 0.2):
        raw = raw_observation()
        raw["observation.state"] = raw["observation.state"] * scale
        noise = torch.randn(2, CHUNK, 32, generator=torch.Generator().manual_seed(0))
        with (
            capture_attention(policy, AttentionConfig(layers=[0], denoise_steps=[0])) as capture,
            torch.inference_mode(),
        ):
            policy.predict_action_chunk(preprocessor(raw), noise=noise)
        maps.append(next(capture.drain()).suffix_attention[0, 0, 0].astype(np.float64))
    without = [np.delete(m, PREFIX, axis=-1) for m in maps]
    pattern = [m / m.sum(-1, keepdims=True) for m in without]
    change = np.abs(pattern[1] - pattern[0]).max(axis=(0, 2))
    assert change.argmax() == 0
    assert change[1:].max() < 2e-3 < change[0]


def test_stored_softmax_equals_an_independent_one(policy, batch, monkeypatch):
    softmaxes_of_gemma(policy, batch, monkeypatch)


def test_maps_differ_so_that_a_mixed_up_index_shows(policy, batch):
    """The demo's random maps must be peaked and unalike, else the tests above could not fail."""
    with capture_attention(policy, AttentionConfig(layers="all")) as capture:
        act(policy, batch, 0)
    (record,) = capture.drain()
    maps = record.suffix_attention.astype(np.float32)
    for axis in range(5):
        assert np.abs(np.diff(maps, axis=axis)).max() > 0.01, axis
    # Not of one token, and not even either.
    strongest = maps.max(-1).mean()
    assert 10 / record.layout.n_keys < strongest < 0.8


def test_actions_are_small_and_noise_is_taken_away(pi0_policy, batch):
    policy = pi0_policy()[0]
    torch.manual_seed(0)
    chunk = policy.predict_action_chunk(batch)
    assert chunk.shape == (2, CHUNK, 7)
    assert chunk.abs().max() < 4
    assert chunk.std(1).max() < 0.6  # what is left of noise of standard deviation 1


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("camera", [0, 1])
def test_a_planted_object_lands_in_the_right_patch(policy, preprocessor, sizes, camera):
    find_planted(
        policy, lambda raw: preprocessor(LiberoProcessorStep()._process_observation(raw)), sizes, camera
    )


def test_words_are_labelled_from_the_ids(policy, preprocessor):
    decoder = find_tokenizer(preprocessor)
    batch = preprocessor(raw_observation())
    with capture_attention(policy, AttentionConfig(), tokenizer=decoder) as capture:
        act(policy, batch, 0)
    (record,) = capture.drain()
    for env, task in enumerate((TASK, "open the drawer")):
        pieces, labels = record.prompts[env]
        for word, text in enumerate(task.split()):
            assert "".join(np.array(pieces)[labels.word == word]).strip() == text
        assert labels.word.max() == len(task.split()) - 1
        assert labels.state_dim.max() == -1, "the prompt holds no state"
        mask = batch["observation.language.attention_mask"][env].numpy()
        np.testing.assert_array_equal(labels.kind == Kind.PADDING, ~mask)
        assert labels.kind[0] == Kind.TEMPLATE  # <bos>
        assert labels.kind[mask.sum() - 1] == Kind.TEMPLATE  # the newline
    assert record.prompt_truncated.tolist() == [False, False]


def test_a_prompt_that_is_cut_keeps_its_words(policy, preprocessor, caplog):
    tokenizer = find_tokenizer(preprocessor)
    raw = raw_observation()
    task = " ".join(f"word{i}" for i in range(60))
    raw["task"] = [task, "open the drawer"]
    batch = preprocessor(raw)
    with (
        capture_attention(policy, AttentionConfig(), tokenizer=tokenizer) as capture,
        caplog.at_level("WARNING"),
    ):
        act(policy, batch, 0)
    (record,) = capture.drain()
    assert record.prompt_truncated.tolist() == [True, False]
    assert record.prompts[0].labels.word.max() > 5
    assert [r.getMessage() for r in caplog.records if "did not fit" in r.getMessage()]


@pytest.mark.parametrize(
    ("prompt", "words", "is_truncated"),
    [
        ("<bos>pick up the soup\n", ["pick", "up", "the", "soup"], False),
        ("<|im_start|>pick up\n", ["pick", "up"], False),
        ("pick up\nand then place\n", ["pick", "up", "and", "then", "place"], False),
        ("<bos>抓 🥣\n", ["抓", "🥣"], False),
        ("<bos>\n", [], False),
        ("<bos>pick up the so", ["pick", "up", "the", "so"], True),
        ("", [], True),
    ],
)
def test_prompts_are_parsed(policy, prompt, words, is_truncated):
    parsed = adapter_for(policy).parse_prompt(prompt)
    assert parsed.is_truncated == is_truncated
    assert [prompt[span.start : span.stop] for span in parsed.spans] == words
    assert {span.kind for span in parsed.spans} <= {Kind.TASK}
    assert [span.ordinal for span in parsed.spans] == list(range(len(words)))


def test_a_missing_camera_is_put_last_and_masked(policy, preprocessor):
    batch = preprocessor(raw_observation())
    del batch[IMAGE]
    with capture_attention(policy) as capture:
        act(policy, batch, 0)
    (record,) = capture.drain()
    assert record.layout.cameras[0].name == WRIST
    assert [camera.is_empty for camera in record.layout.cameras] == [False, True, True]
    assert not record.suffix_attention[..., 256:768].any()
    assert record.suffix_attention[..., :256].any()


def test_rtc_guidance_is_captured(pi0_policy, preprocessor):
    first, second = rtc_records(pi0_policy(num_inference_steps=N_STEPS)[0], preprocessor(raw_observation()))
    for record in (first, second):
        assert record.prefix_attention.any()
    assert not np.array_equal(first.suffix_attention[-1], second.suffix_attention[-1]), "guidance changes it"


@pytest.mark.parametrize("n", [1, 3])
def test_any_batch_size(policy, batch, n):
    taken = {key: value[[0] * n] if torch.is_tensor(value) else value for key, value in batch.items()}
    with capture_attention(policy) as capture:
        act(policy, taken, 0)
    (record,) = capture.drain()
    assert record.batch_size == n
    assert record.suffix_attention.shape[2] == n


@pytest.mark.parametrize(("autocast", "dtype"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_the_dtype_that_acted_is_said(policy, batch, autocast, dtype):
    with capture_attention(policy, AttentionConfig()) as capture, torch.autocast("cpu", dtype=autocast):
        act(policy, batch, 0)
    (record,) = capture.drain()
    assert record.attention_dtype == dtype


def test_it_is_registered_saved_and_moved(pi0_checkpoint, pi0_policy, tmp_path, capsys):
    """Every weight is loaded, and no path stands in the files."""
    from safetensors.torch import load_file

    policy = pi0_policy()[0]
    assert "All keys loaded successfully!" in capsys.readouterr().out
    saved, live = load_file(pi0_checkpoint / "model.safetensors"), policy.state_dict()
    assert saved.keys() == live.keys()
    assert [key for key in saved if not torch.equal(saved[key], live[key])] == []
    for path in pi0_checkpoint.glob("*.json"):
        assert str(pi0_checkpoint) not in path.read_text(), path.name
    assert sum(parameter.numel() for parameter in policy.parameters()) < 1_000_000
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.25)
    policy.save_pretrained(tmp_path)
    again = type(policy).from_pretrained(tmp_path).state_dict()
    assert [key for key, value in policy.state_dict().items() if not torch.equal(again[key], value)] == []
