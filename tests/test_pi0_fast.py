"""Pi0-FAST, small and without the Hub: the contract, each way in which a map could be wrong, a recording."""

import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import zarr

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import scripted  # noqa: E402
from adapter_contract import AdapterContract, Editor, act, rows_that_exist  # noqa: E402
from browser import drawn, until  # noqa: E402
from fast_policy import (  # noqa: E402
    ACTION_DIM,
    DEPTH,
    HEAD_DIM,
    IMAGE,
    N_ACTIONS,
    N_HEADS,
    N_TOKENS,
    TASK,
    TEXT,
    WRIST,
    DerivedConfig,
    DerivedPolicy,
    make_batch,
    text_tokenizer,
)
from lerobot.configs.types import FeatureType, PolicyFeature  # noqa: E402
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy  # noqa: E402
from matplotlib.text import Text  # noqa: E402
from test_explorer import client_of, values  # noqa: E402
from test_recording import evaluate  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from lerobot_attn import open_episode, open_run, record_episodes  # noqa: E402
from lerobot_attn.analysis import action_self_attention, attention, modality_share  # noqa: E402
from lerobot_attn.analysis.prefix import attention_from  # noqa: E402
from lerobot_attn.analysis.propagation import attention_flow, attention_rollout  # noqa: E402
from lerobot_attn.capture import capture_attention  # noqa: E402
from lerobot_attn.cli import app  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.errors import ConfigError, SelectionError  # noqa: E402
from lerobot_attn.layout import Kind  # noqa: E402
from lerobot_attn.plot import plot  # noqa: E402
from lerobot_attn.plot.kinds import KINDS  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402
from lerobot_attn.policies.base import Site  # noqa: E402
from lerobot_attn.verify import verify_episode  # noqa: E402

PATCHES = 256
TALL = {"width": 1280, "height": 2200}
PREFIX = 3 * PATCHES + TEXT + 1  # two cameras, an empty one, the prompt and <bos>


@pytest.fixture(scope="module")
def made(fast_policy):
    return fast_policy()


@pytest.fixture
def policy(made):
    made.reset()
    return made


@pytest.fixture
def batch():
    return make_batch()


class Pi0FastContract(AdapterContract):
    can_block = False
    n_blocked = PATCHES  # one of them changes no token that is decoded

    @pytest.fixture
    def longer(self):
        @contextmanager
        def with_fewer_slots():
            yield make_batch(text=40)

        return with_fewer_slots

    def breaks_at(self, base):
        return base.model.paligemma_with_expert.paligemma.model.language_model.layers[-1].mlp

    def test_an_edit_of_one_site_leaves_the_others(self, policy, batch):
        """Of the last layer: the first token's rows below it may not change; later tokens are others."""
        site = Site("expert", DEPTH - 1)
        before, _ = captured(policy, batch)
        editor = Editor(lambda value: value.flip(-1), sites=[site])
        with capture_attention(
            policy, AttentionConfig(layers="all"), probes=[(editor, editor.sites)]
        ) as capture:
            act(policy, batch, 5)
        (after,) = capture.drain()
        assert set(editor.seen) == {site}
        first = [record.suffix_attention[0, ..., 0, :] for record in (before, after)]
        np.testing.assert_array_equal(first[1][:-1], first[0][:-1])
        assert not np.array_equal(first[1][-1], first[0][-1])


class TestPi0Fast(Pi0FastContract):
    pass


@pytest.fixture(scope="module")
def in_bfloat16(fast_policy):
    return fast_policy(dtype="bfloat16")


@pytest.fixture(scope="module")
def sampled(fast_policy):
    """Every token is drawn, and none ends an inference early."""
    return fast_policy(temperature=1.0)


@pytest.fixture(scope="module")
def derived(fast_policy):
    peft = pytest.importorskip("peft")
    base = fast_policy(DerivedPolicy, DerivedConfig, empty_cameras=0)
    assert adapter_for(base).describe().policy_type == "pi0_fast_of_somebody"
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()


class TestPi0FastInBfloat16(Pi0FastContract):
    is_bfloat16 = True

    @pytest.fixture
    def policy(self, in_bfloat16):
        in_bfloat16.reset()
        return in_bfloat16


class TestPi0FastSampled(Pi0FastContract):
    @pytest.fixture
    def policy(self, sampled):
        sampled.reset()
        return sampled


class TestPi0FastDerivedWithLora(Pi0FastContract):
    @pytest.fixture
    def policy(self, derived):
        derived.reset()
        return derived


def captured(policy, batch, seed=5, **settings):
    config = AttentionConfig(**{"layers": "all", "prefix_layers": "all", **settings})
    with capture_attention(policy, config, tokenizer=text_tokenizer()) as capture:
        actions, _ = act(policy, batch, seed)
    (record,) = capture.drain()
    return record, actions


def test_the_suffix_holds_the_decoded_tokens(policy, batch):
    """Against the tokens that the policy itself turned into actions."""
    decoded = []
    detokenize = policy.detokenize_actions
    policy.detokenize_actions = lambda tokens, **sizes: (decoded.append(tokens), detokenize(tokens, **sizes))[
        1
    ]
    try:
        record, _ = captured(policy, batch)
    finally:
        del policy.detokenize_actions
    layout, (tokens,) = record.layout, decoded
    assert (layout.prefix_len, layout.n_queries, layout.n_keys) == (PREFIX, N_TOKENS, PREFIX + N_TOKENS)
    assert [segment.kind for segment in layout.segments] == ["image"] * 3 + ["language", "action"]
    end = policy._paligemma_tokenizer.convert_tokens_to_ids("|")
    lengths = []
    for env in range(2):
        n = tokens[env].tolist().index(end) + 1
        lengths.append(n)
        assert record.suffix_token_id[env].tolist() == tokens[env, :n].tolist() + [-1] * (N_TOKENS - n)
        assert record.suffix_token_text[env][n - 1 :] == ["|"] + [""] * (N_TOKENS - n)
        assert all(record.suffix_token_text[env][:n])
        # The last one ended the actions: it was never read.
        kinds = record.key_kind[env, PREFIX:].tolist()
        assert kinds == [Kind.ACTION] * (n - 1) + [Kind.PADDING] * (N_TOKENS - n + 1)
        maps = record.suffix_attention[0, :, env]
        assert np.isnan(maps[..., n - 1 :, :]).all()
        for query in range(n - 1):
            assert not maps[..., query, PREFIX + query + 1 :].any(), "a token sees none that comes later"
            assert maps[..., query, PREFIX + query].astype(np.float32).max() > 0, "and itself"
    assert len(set(lengths)) == 2, "the batch's inferences must differ, or nothing here is told apart"


def independent_softmax(policy, run):
    """Return (layer, batch, head, key, key) float64 of each pass, from q and k of the very pass.

    Taken from the projections' outputs, turned by the positions here, softmaxed by numpy.
    """
    layers = policy.model.paligemma_with_expert.paligemma.model.language_model.layers
    passes, handles = [], []

    def projected(name, layer):
        def hook(module, args, output):
            if (name, layer) == ("q", 0):
                passes.append({})
            passes[-1][name, layer] = output.detach().double()

        return hook

    for layer, module in enumerate(layers):
        for name in ("q", "k"):
            projection = getattr(module.self_attn, f"{name}_proj")
            handles.append(projection.register_forward_hook(projected(name, layer)))
    try:
        record = run()
    finally:
        for handle in handles:
            handle.remove()

    def turned(values, positions):
        heads = values.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        angles = positions[:, None, :, None] / 10000 ** (torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
        first, second = heads.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    mask = torch.from_numpy(record.key_mask[:, :PREFIX].copy())
    found = []
    for layer in range(DEPTH):
        keys, rows = [], []
        for number, projections in enumerate(passes):
            q, k = projections["q", layer], projections["k", layer]
            if number == 0:
                positions = mask.long().cumsum(1) - 1
                seen = mask
            else:
                positions = (mask.sum(1, keepdim=True) + number - 1).double()
                seen = torch.cat([mask, torch.ones(2, number, dtype=torch.bool)], dim=1)
            keys.append(turned(k, positions.double()))
            scores = turned(q, positions.double()) @ torch.cat(keys, dim=2).transpose(-2, -1) / HEAD_DIM**0.5
            scores = scores.masked_fill(~seen[:, None, None], -np.inf).numpy()
            exponents = np.exp(scores - scores.max(-1, keepdims=True))
            rows.append(exponents / exponents.sum(-1, keepdims=True))
        found.append(rows)
    return record, found


def test_stored_softmax_equals_an_independent_one(policy, batch):
    record, found = independent_softmax(policy, lambda: captured(policy, batch)[0])
    is_read = rows_that_exist(record)
    assert is_read.sum() > 8
    used = record.key_mask[:, :PREFIX]
    for layer in range(DEPTH):
        prefix, *rows = found[layer]
        for env in range(2):
            np.testing.assert_allclose(
                record.prefix_attention[layer, env][:, used[env]],
                prefix[env][:, used[env]],
                rtol=2**-10,
                atol=2**-18,
            )
            for query in np.flatnonzero(is_read[env]):
                np.testing.assert_allclose(
                    record.suffix_attention[0, layer, env, :, query, : PREFIX + query + 1],
                    rows[query][env, :, 0],
                    rtol=2**-10,
                    atol=2**-18,
                )


def test_maps_differ_so_that_a_mixed_up_index_shows(policy, batch):
    record, _ = captured(policy, batch)
    maps = record.suffix_attention[..., :3, :].astype(np.float32)  # both inferences read at least so many
    for axis in range(1, 6):
        assert np.abs(np.diff(maps, axis=axis)).max() > 0.01, axis


def test_without_a_cache_the_maps_are_the_same(fast_policy, policy, batch):
    with_cache, actions = captured(policy, batch)
    plain = fast_policy(use_kv_cache=False)
    without, same_actions = captured(plain, batch)
    np.testing.assert_array_equal(with_cache.suffix_token_id, without.suffix_token_id)
    assert torch.equal(actions, same_actions)
    for name in ("suffix_attention", "suffix_attention_mean", "prefix_attention"):
        one, other = (getattr(record, name).astype(np.float32) for record in (with_cache, without))
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=2**-9, err_msg=name)
    unwatched, _ = act(plain, batch, 5)
    assert torch.equal(unwatched, same_actions)
    editor = Editor(lambda value: value)
    editing = capture_attention(plain, AttentionConfig(), probes=[(editor, [Site("expert", 0)])])
    with (
        pytest.raises(ConfigError, match="use_kv_cache=false: every pass computes all tokens again"),
        editing,
    ):
        pass


def test_an_inference_that_reads_no_token_has_no_row(policy, batch):
    """The first token that is decoded may end the actions."""
    head = policy.model.paligemma_with_expert.paligemma.lm_head
    end = policy._paligemma_tokenizer.convert_tokens_to_ids("|")

    def only_the_end(module, args, output):
        output[..., end] = 1e4

    handle = head.register_forward_hook(only_the_end)
    try:
        record, _ = captured(policy, batch)
    finally:
        handle.remove()
    assert record.suffix_token_text[0] == ["|"] + [""] * (N_TOKENS - 1)
    assert np.isnan(record.suffix_attention).all()
    assert np.isnan(record.suffix_attention_mean).all()
    assert np.isfinite(record.prefix_attention).all()


def test_an_inference_that_is_never_ended_has_all_rows_but_the_last(policy, batch):
    head = policy.model.paligemma_with_expert.paligemma.lm_head
    end = policy._paligemma_tokenizer.convert_tokens_to_ids("|")

    def never_the_end(module, args, output):
        output[..., end] = -1e4

    handle = head.register_forward_hook(never_the_end)
    try:
        record, _ = captured(policy, batch)
    finally:
        handle.remove()
    assert (record.suffix_token_id >= 0).all()
    assert rows_that_exist(record).tolist() == [[True] * (N_TOKENS - 1) + [False]] * 2


def test_the_number_of_decode_steps_may_change_between_inferences(policy, batch):
    with capture_attention(policy, AttentionConfig()) as capture:
        for n_tokens in (N_TOKENS, 3):
            policy.config.max_decoding_steps = n_tokens
            try:
                act(policy, batch, 0)
            finally:
                policy.config.max_decoding_steps = N_TOKENS
    first, second = capture.drain()
    assert (first.layout.n_queries, second.layout.n_queries) == (N_TOKENS, 3)
    np.testing.assert_array_equal(second.suffix_token_id, first.suffix_token_id[:, :3])


@pytest.mark.parametrize("camera", [IMAGE, WRIST])
@pytest.mark.parametrize("at", [(2, 3), (40, 70), (80, 110)])
def test_a_planted_object_lands_in_the_right_patch(policy, camera, at):
    """A square changes the tokens of its own patches most, before they have mixed."""
    dark = make_batch(1)
    for name in (IMAGE, WRIST):
        dark[name] = torch.full((1, 3, 96, 128), 0.2)
    lit = {**dark, camera: dark[camera].clone()}
    lit[camera][..., at[0] : at[0] + 6, at[1] : at[1] + 6] = 1
    given = []
    vision = policy.model.paligemma_with_expert.paligemma.model.vision_tower.vision_model
    handle = vision.embeddings.register_forward_hook(
        lambda module, args, output: given.append(output.detach())
    )
    try:
        captured(policy, dark)
        record, _ = captured(policy, lit)
    finally:
        handle.remove()
    embedded = [torch.cat(given[i : i + 3], dim=1) for i in (0, 3)]
    token = int((embedded[1] - embedded[0]).norm(dim=-1)[0].argmax())
    layout = record.layout
    index = [c.name for c in layout.cameras].index(camera)
    assert layout.key_camera()[token] == index
    rows, columns = layout.key_patch()
    assert (rows[token], columns[token]) == layout.cameras[index].geometry.patch_at(at[0] + 3, at[1] + 3)


def test_what_a_token_looks_at_follows_its_own_image(policy, batch):
    """Blocking a camera's patches in the maps is what makes its keys 0, and no other camera's."""
    segment = next(s for s in captured(policy, batch)[0].layout.segments if s.name == WRIST)

    def blocked(value):
        value = value.clone()
        value[..., segment.start : segment.stop] = 0
        return value

    editor = Editor(blocked)
    sites = [Site("expert", layer) for layer in range(DEPTH)]
    with capture_attention(policy, AttentionConfig(layers="all"), probes=[(editor, sites)]) as capture:
        act(policy, batch, 5)
    (record,) = capture.drain()
    seen = np.nanmax(record.suffix_attention.astype(np.float32), axis=(0, 1, 2, 3, 4))
    is_blocked = np.zeros(record.layout.n_keys, bool)
    is_blocked[segment.start : segment.stop] = True
    assert not seen[is_blocked].any()
    assert seen[:PATCHES].any()


def test_words_and_numbers_are_labelled_from_the_ids(policy, batch):
    record, _ = captured(policy, batch)
    for env, task in enumerate((TASK, "open the drawer")):
        pieces, labels = record.prompts[env]
        for word, text in enumerate(task.split()):
            assert "".join(np.array(pieces)[labels.word == word]).strip() == text
        assert labels.word.max() == len(task.split()) - 1
        numbers = [
            int("".join(np.array(pieces)[labels.state_dim == dim]))
            for dim in range(labels.state_dim.max() + 1)
        ]
        state = batch["observation.state"][env].numpy()
        assert numbers == (np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1).tolist()
        assert (pieces[0], pieces[-1]) == ("<bos>", "<bos>")
        assert labels.kind[-1] == Kind.TEMPLATE
    assert record.prompt_truncated.tolist() == [False, False]
    assert captured(policy, make_batch(text=20))[0].prompt_truncated.tolist() == [True, True]


@pytest.mark.parametrize(
    ("prompt", "words", "numbers", "is_truncated"),
    [
        ("<bos>Task: pick up, State: 128 -1;\n<bos>", ["pick", "up"], ["128", "-1"], False),
        ("<bos>Task: pick up, State: 128 9<bos>", ["pick", "up"], ["128", "9"], True),
        ("<bos>Task: pick u<bos>", ["pick", "u"], [], True),
    ],
)
def test_prompts_are_parsed(policy, prompt, words, numbers, is_truncated):
    parsed = adapter_for(policy).parse_prompt(prompt)
    found = {kind: [prompt[s.start : s.stop] for s in parsed.spans if s.kind == kind] for kind in Kind}
    assert (found[Kind.TASK], found[Kind.STATE]) == (words, numbers)
    assert parsed.is_truncated == is_truncated
    assert adapter_for(policy).parse_prompt("something else") is None


def test_a_missing_camera_is_put_last_and_masked(policy, batch):
    del batch[IMAGE]
    record, _ = captured(policy, batch)
    assert record.layout.cameras[0].name == WRIST
    assert [camera.is_empty for camera in record.layout.cameras] == [False, True, True]
    assert not np.nan_to_num(record.suffix_attention[..., PATCHES : 3 * PATCHES]).any()


@pytest.mark.parametrize("n", [1, 3])
def test_any_batch_size(policy, n):
    record, _ = captured(policy, make_batch(n))
    assert record.batch_size == n
    assert record.suffix_attention.shape == (1, DEPTH, n, N_HEADS, N_TOKENS, PREFIX + N_TOKENS)


def test_training_goes_on_unrecorded(policy, batch):
    """The loss runs the same modules without an inference."""
    target = {
        **batch,
        "action.tokens": torch.zeros(2, 4, dtype=torch.long),
        "action.token_mask": torch.ones(2, 4, dtype=torch.bool),
    }
    with capture_attention(policy) as capture:
        policy.forward(target)
        assert not capture.records
        act(policy, batch, 0)
    assert len(capture.records) == 1


def test_a_site_that_was_not_asked_for_costs_nothing(policy, batch, monkeypatch):
    from lerobot_attn.policies import kernels

    asked = []
    true = kernels.attention_probabilities
    monkeypatch.setattr(
        kernels,
        "attention_probabilities",
        lambda query, *args, **kwargs: (asked.append(query.shape[-2]), true(query, *args, **kwargs))[1],
    )
    captured(policy, batch, layers=[1], prefix_layers="none")
    assert set(asked) == {1}, "the prefix pass was computed a second time for nothing"
    asked.clear()
    captured(policy, batch, layers="none", mean_layers="none", prefix_layers=[1])
    assert asked == [PREFIX]


def test_compiled_is_refused_where_it_would_be_lost(fast_policy, policy, batch, caplog):
    with caplog.at_level("WARNING"):
        captured(policy, batch, compiled=True)
    assert [r.getMessage() for r in caplog.records if "compiled=true changes nothing" in r.getMessage()]
    with torch.compiler.set_stance("force_eager"):
        compiled = fast_policy(use_kv_cache=False, compile_model=True, compile_mode="default")
        with (
            pytest.raises(ConfigError, match="compiled=true: pi0_fast's decoding cannot be watched inside"),
            capture_attention(compiled, AttentionConfig(compiled=True)),
        ):
            pass
        record, _ = captured(compiled, batch)  # runs uncompiled while it is watched
    assert np.isfinite(record.suffix_attention).any()


# A recording of it, to the last picture


def observation(t, seed):
    """A square that moves by 3 pixels a frame, in both cameras."""
    batch = make_batch(1, seed=seed + t // N_ACTIONS)
    for name in (IMAGE, WRIST):
        batch[name][..., 20 + 3 * t : 32 + 3 * t, 30:42] = 1
    return batch


def record(policy, folder, **settings):
    """Two episodes of one's own loop, of three inferences each."""
    config = AttentionConfig(**{"layers": "all", "prefix_layers": "all", **settings})
    with record_episodes(policy, folder, config, fps=10, tokenizer=text_tokenizer()) as recording:
        for seed in (0, 10):
            with recording.episode(task=TASK) as episode:
                policy.reset()
                for t in range(3 * N_ACTIONS):
                    batch = observation(t, seed)
                    with torch.inference_mode():
                        action = policy.select_action(batch)
                    episode.step({name: value[0] for name, value in batch.items()}, action[0])
                episode.success = True
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, fast_policy):
    return record(fast_policy(), tmp_path_factory.mktemp("pi0_fast"))


@pytest.fixture(scope="module")
def episode(run):
    return open_run(run)[0]


def read_counts(episode):
    """How many tokens each inference read."""
    data = episode.dataset
    return (data.key_kind.values[:, PREFIX:] == Kind.ACTION).sum(axis=1)


def test_a_recording_holds_what_was_decoded(run):
    n_read = []
    for episode in open_run(run):
        data, counts = episode.dataset, read_counts(episode)
        n_read += counts.tolist()
        assert (episode.is_complete, episode.n_frames, data.sizes["inference"]) == (True, 3 * N_ACTIONS, 3)
        assert data.frame_inference.values.tolist() == np.repeat([0, 1, 2], N_ACTIONS).tolist()
        assert (data.frame_query.values == -1).all()
        assert np.isnan(data.action_chunk.values).all(), "no token is an action"
        assert data.action.shape == (3 * N_ACTIONS, ACTION_DIM)
        assert np.isnan(data.flow_time.values).tolist() == [True]
        ended = data.suffix_token_id.values == text_tokenizer().convert_tokens_to_ids("|")
        for inference, n in enumerate(counts.tolist()):
            n_decoded = int((data.suffix_token_id.values[inference] >= 0).sum())
            assert n == n_decoded - 1
            assert n_decoded == N_TOKENS or ended[inference, n]
            rows = data.suffix_attention.values[inference, 0]
            assert np.isnan(rows[:, :, n:]).all()
            assert np.isfinite(rows[:, :, :n]).all()
        assert set(episode.videos) == {IMAGE, WRIST}
    assert len(set(n_read)) > 2, "the episodes' inferences must decode unlike numbers of tokens"


def test_verify_passes_and_finds_rows_that_should_not_be(episode, copied):
    report = verify_episode(episode, thorough=True)
    assert [check for check in report.checks if check.status == "failed"] == []
    n = int(read_counts(episode)[1])
    for key, value in ((PREFIX + n - 1, Kind.PADDING), (PREFIX + n, Kind.ACTION)):
        store = copied(episode.path)
        kinds = zarr.open_group(store)["key_kind"]
        row = kinds[1]
        row[key] = value
        kinds[1] = row
        report = verify_episode(open_episode(store), thorough=True)
        (check,) = (check for check in report.checks if check.name == "row sums")
        assert check.status == "failed", check
        shutil.rmtree(store.parents[2])


def test_means_are_over_the_tokens_that_were_read(episode):
    data = episode.dataset
    counts = read_counts(episode)
    raw = data.suffix_attention.values[:, 0].astype(np.float32)
    expected = [raw[i, :, :, :n].mean(axis=2) for i, n in enumerate(counts)]
    without = data.drop_vars(["suffix_attention_mean", "all_layer"])
    for dataset, query in ((data, "executed"), (without, "executed"), (data, "mean")):
        found = attention(dataset, inference="all", layer="all", head="all", query=query)
        np.testing.assert_allclose(
            found.values[:, 0] if found.ndim > 4 else found.values, expected, atol=2e-4
        )
        assert found.attrs["query"] == "mean of the decoded tokens"
        assert found.attrs["denoise_step"] == ""
    one = attention(without, inference=1, layer=2, head="all", query="executed")
    np.testing.assert_allclose(one.values, expected[1][2], atol=2e-4)
    shares = modality_share(data, frame=7)
    assert shares.sum() == pytest.approx(1, abs=1e-3)
    assert "actions" not in shares.modality
    assert shares.sel(modality="decoded tokens") > 0
    frames = attention(data, frame=[0, 7])
    assert frames.attrs["query"].startswith("mean of the decoded tokens; actions of frames are no tokens")
    with pytest.raises(SelectionError, match="is no token of an inference's chunk"):
        attention(data, frame=0, query="frame")


def test_a_token_is_named_by_its_text_or_id(episode):
    data, n = episode.dataset, int(read_counts(episode)[1])
    text, number = data.suffix_token_text.values[1, 0], data.suffix_token_id.values[1, 0]
    name = text if text.isprintable() and text != "\ufffd" else f"#{number}"
    assert attention(data, inference=1, query=0).attrs["query"] == f'decoded token 0 "{name}"'
    assert attention(data, inference="all", query=0).attrs["query"] == "decoded token 0"
    nameless = data.drop_vars("suffix_token_id")
    assert attention(nameless, inference=1, query=0).attrs["query"] == "decoded token 0"
    with pytest.raises(SelectionError, match=f"token {n} was not read in inference 1, expected one of 0 to"):
        attention(data, inference=1, query=n)
    every = attention(data, inference="all", query=n)
    assert np.isnan(every[1]).all()
    assert np.isfinite(every).any(), "others read it"
    maps = action_self_attention(data, inference=1, layer=2)
    assert maps.attrs["query"] == "every decoded token"


def test_attention_is_followed_through_the_layers(episode):
    """Each token reads every layer of the one tower, so that rollout and flow apply."""
    data, n = episode.dataset, int(read_counts(episode)[1])
    for query in ("executed", "mean", 0):
        found = attention_rollout(data, inference=1, query=query)
        assert found.sum() == pytest.approx(1, abs=1e-3)
    every = attention_rollout(data, inference=1, query="all").values
    assert np.isfinite(every[:n]).all()
    assert np.isnan(every[n:]).all()
    np.testing.assert_allclose(
        attention_rollout(data, inference=1, query="mean"), every[:n].mean(0), atol=1e-5
    )
    assert np.isfinite(attention_flow(data, inference=1, query=0)).all()
    for function in (attention_flow, attention_rollout):
        with pytest.raises(SelectionError, match=f"decoded token {n} was not read in .* expected one of 0"):
            function(data, inference=1, query=n)


def test_the_last_prefix_token_decided_the_first_decoded_one(episode):
    data = episode.dataset
    found = attention_from(data, "last", inference=1, layer=2)
    expected = data.prefix_attention.values[1, 2, :, PREFIX - 1].astype(np.float32).mean(axis=0)
    np.testing.assert_allclose(found.values[..., :PREFIX], expected, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_plots_are_drawn_or_refused_in_one_line(episode, kind):
    refusals = {
        "denoise": "does not denoise, it decodes tokens one after another",
        "vision": "vision attention was not captured",
    }
    if kind in refusals:
        with pytest.raises(SelectionError, match=refusals[kind]):
            plot(episode, kind)
        return
    figure = plot(episode, kind)
    said = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "nois" not in said
    assert "step" not in said
    assert "nan" not in said
    assert "executed" not in said
    if kind == "actions":
        n = int(read_counts(episode)[1])
        panels = [axes for axes in figure.axes if axes.images]
        assert {axes.images[0].get_array().shape for axes in panels[:-1]} == {(n, n)}
        assert "query: decoded token" in said


def test_commands_take_the_recording(episode, tmp_path):
    store = str(episode.path)
    for command in (
        ["inspect", store],
        ["verify", store, "-o", str(tmp_path / "sheet.png")],
        ["overlay", store, "-o", str(tmp_path / "film.mp4")],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.output)
        if command[0] == "inspect":
            said = " ".join(done.output.split())
            assert f"up to {N_TOKENS} decode steps, {N_ACTIONS} of {N_ACTIONS} actions executed" in said
            assert "mean attention of the decoded tokens" in said
            assert "MISSING" not in said


def test_the_explorer_serves_the_recording(run, episode):
    with client_of(run) as client:
        first = client.get("/api/run").json()["episodes"][0]
        facts = client.get(f"/api/episodes/{first['id']}").json()
        assert (facts["flow_time"], facts["denoise_steps"], facts["decodes"]) == ([None], [0], True)
        base = f"/api/episodes/{first['id']}/{first['version']}"
        means = values(client.get(f"{base}/inferences/1/means/0"))
        maps = values(client.get(f"{base}/inferences/1/maps/0/2"))
        n = int(read_counts(episode)[1])
        assert np.abs(means.astype(np.float32).sum(-1) - 1).max() < 2**-9
        assert np.abs(maps[:, :n].astype(np.float32).sum(-1) - 1).max() < 2**-9
        assert np.isnan(maps[:, n:]).all()
        for address in ("shares", "timeline", "ranges/0", f"cameras/{IMAGE}/frames/4.jpg"):
            assert client.get(f"{base}/{address}").status_code == 200, address


@pytest.mark.browser
def test_the_page_names_decoded_tokens(episode, pages):
    with pages.serving(episode.path) as address:
        page = pages.open(f"{address}?frame=7&query=0&layer=2&patch=image:3:4", viewport=TALL)
        drawn(page, query="0", layer="2")
        query = page.get_by_label("Decoded token")
        assert query.locator("option").all_inner_texts()[:2] == ["mean of all", "decoded token 0"]
        said = page.locator("body").inner_text()
        assert "Denoise step" not in said
        assert "all decoded tokens together make the chunk" in said
        assert "executed actions" not in said
        assert "Decoded token 0 alone." in said
        assert "Action token" not in said
        for place in (".timeline-keys", "#shares"):
            until(page, lambda place=place: "decoded tokens" in page.locator(place).inner_text(), place)
            assert "actions" not in page.locator(place).inner_text()


def test_means_of_layers_with_full_maps_alone_are_those_of_the_store(run, episode, fast_policy, tmp_path):
    """The explorer computes them itself, and leaves out what was not read."""
    folder = record(fast_policy(), tmp_path, mean_layers=[0])
    with client_of(folder) as client:
        first = client.get("/api/run").json()["episodes"][0]
        base = f"/api/episodes/{first['id']}/{first['version']}"
        found = values(client.get(f"{base}/inferences/1/means/0"))
    np.testing.assert_allclose(
        found.astype(np.float32), episode.dataset.suffix_attention_mean.values[1, 0], atol=2e-4
    )


def test_an_episode_with_an_inference_that_read_nothing(fast_policy, tmp_path):
    """Its rows are absent, which is no damage."""
    policy = fast_policy()
    head = policy.model.paligemma_with_expert.paligemma.lm_head
    end = policy._paligemma_tokenizer.convert_tokens_to_ids("|")
    calls = []

    def ends_at_once(module, args, output):
        calls.append(len(calls))
        if len(calls) == 1:  # the first token of the first inference
            output[..., end] = 1e4

    head.register_forward_hook(ends_at_once)
    episode = open_run(record(policy, tmp_path, mean_layers="none"))[0]
    assert read_counts(episode)[0] == 0
    assert read_counts(episode)[1] > 0
    report = verify_episode(episode, thorough=True)
    assert [check for check in report.checks if check.status == "failed"] == []
    assert np.isnan(attention(episode.dataset, inference=0)).all()
    said = CliRunner().invoke(app, ["inspect", str(episode.path)]).output
    assert "MISSING" not in said
    assert "rows sum to 1" in said


class InEvaluation(PI0FastPolicy):
    """Makes the prompt itself, as the evaluation below has no preprocessor."""

    def predict_action_chunk(self, batch, **kwargs):
        tokens = make_batch(len(batch[IMAGE]), seed=int(batch[IMAGE].sum()))
        language = {name: value for name, value in tokens.items() if ".language." in name}
        return super().predict_action_chunk({**batch, **language}, **kwargs)


class OutOfOrder(InEvaluation):
    def select_action(self, batch):
        action = super().select_action(batch)
        self._action_queue.reverse()
        return action + 0.25


@pytest.mark.parametrize(
    ("policy_class", "n_tokens", "n_failures"),
    [(InEvaluation, N_TOKENS, 0), (InEvaluation, N_ACTIONS - 2, 0), (OutOfOrder, N_TOKENS, 2)],
)
def test_an_evaluation_finds_each_frames_inference(
    fast_policy, tmp_path, monkeypatch, policy_class, n_tokens, n_failures
):
    """By the very action, though no token is that action."""
    monkeypatch.setenv("SLURM_JOB_ID", "0")  # LeRobot's own way to leave its progress bars out
    policy = fast_policy(
        policy_class,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (4,))},
        temperature=1.0,
        max_decoding_steps=n_tokens,
    )
    _, run = evaluate(tmp_path, {0: scripted.make_envs((7, 2 * N_ACTIONS + 1))}, policy=policy)
    assert len(run.failures) == n_failures
    if n_failures:
        found = [
            re.search(r"frame (\d+) of .* that is not token (\d+) of its", said) for said in run.failures
        ]
        assert [one.groups() for one in found] == [("0", "0")] * 2
        return
    for episode, length in zip(open_run(tmp_path), (7, 2 * N_ACTIONS + 1), strict=True):
        data = episode.dataset
        assert episode.is_complete
        assert data.frame_inference.values.tolist() == (np.arange(length) // N_ACTIONS).tolist()
        assert (data.frame_query.values == -1).all()
        assert verify_episode(episode, thorough=True).passed
