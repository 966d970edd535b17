"""Neurons that say a word are found in the weights of each family; bad input is one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from safetensors.torch import load_file, save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from lerobot_attn import cli  # noqa: E402
from lerobot_attn.analysis import neuron_words as lens  # noqa: E402
from lerobot_attn.demo.modeling_pi0_tiny import PI0TinyPolicy  # noqa: E402
from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy  # noqa: E402
from lerobot_attn.demo.modeling_smolvla_tiny import SmolVLATinyPolicy  # noqa: E402
from lerobot_attn.errors import ConfigError, UnsupportedPolicyError  # noqa: E402
from lerobot_attn.plugin import neuron_words as plugin  # noqa: E402
from lerobot_attn.plugin.neuron_words import neuron_words  # noqa: E402
from lerobot_attn.policies import weights  # noqa: E402
from lerobot_attn.policies.value_vectors import read_value_vectors  # noqa: E402
from lerobot_attn.policies.vocabulary import read_vocabulary  # noqa: E402
from lerobot_attn.policies.weights import Weights  # noqa: E402

PALIGEMMA = "model.paligemma_with_expert.paligemma."
SMOLVLM = "model.vlm_with_expert.vlm."
# Family → policy class, its checkpoint's fixture, layers, final norm, unembedding, what the norm adds to 1.
FAMILIES = {
    "pi05": (
        PI05TinyPolicy,
        "demo_checkpoint",
        f"{PALIGEMMA}model.language_model.",
        f"{PALIGEMMA}lm_head",
        1,
    ),
    "pi0": (PI0TinyPolicy, "pi0_checkpoint", f"{PALIGEMMA}model.language_model.", f"{PALIGEMMA}lm_head", 1),
    "smolvla": (
        SmolVLATinyPolicy,
        "smolvla_checkpoint",
        f"{SMOLVLM}model.text_model.",
        f"{SMOLVLM}lm_head",
        0,
    ),
}
WORD, PHRASE, SEVERAL = "bowl", "gripper", "bowl,up,gripper"
PLANTED, TWIN, OF_PHRASE = lens.Neuron(2, 31), lens.Neuron(0, 7), lens.Neuron(1, 100)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def token_of(checkpoint, word):
    return read_vocabulary(weights.find_checkpoint(checkpoint)).spellings(word)


def plant(source, target, family):
    """Copy a checkpoint with another final norm and unembedding, and neurons that say words."""
    _, _, layers, head, offset = FAMILIES[family]
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    draw = torch.Generator().manual_seed(3)
    norm = tensors[f"{layers}norm.weight"]
    norm.copy_(0.5 + torch.rand(norm.shape, generator=draw) - offset)
    rows = tensors[f"{head}.weight"]
    # Rows of different lengths, and of SmolVLA's lm_head others than the embedding's.
    rows.copy_(torch.randn(rows.shape, generator=draw) * (0.5 + torch.rand(len(rows), 1, generator=draw)))
    if offset:
        tensors[f"{layers}embed_tokens.weight"].copy_(rows)
    gain = norm + offset
    unit = rows / rows.norm(dim=1, keepdim=True)
    for neuron, word, scale in ((PLANTED, WORD, 0.3), (TWIN, WORD, 2.0), (OF_PHRASE, PHRASE, 1.0)):
        (tokens,) = token_of(target, word)
        column = tensors[f"{layers}layers.{neuron.layer}.mlp.down_proj.weight"]
        value = scale * unit[list(tokens)].mean(dim=0) / gain
        if neuron == TWIN:
            value += 0.1 * value.norm() * torch.randn(value.shape, generator=draw) / len(value) ** 0.5
        column[:, neuron.unit] = value
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def planted(family, request, tmp_path_factory):
    source = request.getfixturevalue(FAMILIES[family][1])
    return plant(source, tmp_path_factory.mktemp("planted") / family, family)


@pytest.fixture(scope="module")
def pi05(demo_checkpoint, tmp_path_factory):
    return plant(demo_checkpoint, tmp_path_factory.mktemp("planted") / "pi05_alone", "pi05")


def dense(planted, family):
    """All logits and cosines of all neurons, by the policy's own modules: two of (layer, unit, token)."""
    policy = FAMILIES[family][0].from_pretrained(planted)
    if family == "smolvla":
        vlm = policy.model.vlm_with_expert.vlm
        text = vlm.model.text_model
        # SmolVLM2's own, which no checkpoint says; the demo's text model has Llama's default.
        text.norm.variance_epsilon = 1e-5
    else:
        vlm = policy.model.paligemma_with_expert.paligemma
        text = vlm.model.language_model
    with torch.no_grad():
        values = torch.stack([layer.mlp.down_proj.weight.T for layer in text.layers])
        normed = text.norm(values)
        normed = normed[0] if isinstance(normed, tuple) else normed
        rows = vlm.lm_head.weight
        logit = vlm.lm_head(normed)
        cosine = logit / normed.norm(dim=-1, keepdim=True) / rows.norm(dim=-1)
    return logit.numpy(), cosine.numpy()


# What is found


def test_planted_neurons_are_found_first(planted):
    found = neuron_words(planted, [WORD, PHRASE], top=5)
    of_word, of_phrase = (found.table[found.table["word"] == word] for word in (WORD, PHRASE))
    assert [*of_word[["layer", "unit"]].itertuples(index=False, name=None)][:2] == [PLANTED, TWIN]
    assert of_word["cosine"].iloc[0] == pytest.approx(1, abs=1e-5)
    assert of_word["top_words"].str.startswith(WORD).tolist()[:2] == [True, True]
    assert of_word["place"].tolist()[:2] == [1, 1]
    assert of_word["rank"].tolist() == [1, 2, 3, 4, 5]
    # Near-duplicates: the second is like the first, and the others are not.
    assert of_word["cluster"].tolist()[:2] == [str(PLANTED)] * 2
    assert str(PLANTED) not in of_word["cluster"].tolist()[2:]
    assert (of_word["p"].iloc[:2] == 1 / 101).all()
    assert (of_word["p"].iloc[2:] > 0.05).any()
    assert tuple(of_phrase.iloc[0][["layer", "unit"]]) == OF_PHRASE
    assert "+" in found.spellings[PHRASE][0]


def test_agrees_with_the_policys_own_modules(planted, family):
    logit, cosine = dense(planted, family)
    found = neuron_words(planted, ["up", PHRASE], neurons=["vlm.1.5"], top=200, n_words=30)
    vocabulary = read_vocabulary(weights.find_checkpoint(planted))
    (one,), (other,) = vocabulary.spellings("up")
    phrase = list(vocabulary.spellings(PHRASE)[0])
    expected = {"up": cosine[..., [one, other]].max(-1), PHRASE: cosine[..., phrase].mean(-1)}
    for word, scores in expected.items():
        rows = found.table[found.table["word"] == word]
        at = rows["layer"].to_numpy(), rows["unit"].to_numpy()
        np.testing.assert_allclose(rows["cosine"], scores[at], atol=2e-6)
        np.testing.assert_allclose(rows["cosine"], np.sort(scores.ravel())[::-1][:200], atol=2e-6)
        for row in rows.itertuples():
            own = logit[row.layer, row.unit]
            if word == "up":
                best = max((one, other), key=lambda token, n=row: cosine[n.layer, n.unit, token])
                assert row.logit == pytest.approx(own[best], rel=1e-5)
                place = 1 + (own > max(own[one], own[other])).sum()
            else:
                assert row.logit == pytest.approx(own[phrase].mean(), rel=1e-5)
                place = 1 + (own > own[phrase].min()).sum()
            assert row.place == place
    own = logit[1, 5]
    for end, sign in (("top", -1), ("bottom", 1)):
        rows = found.ends[found.ends["end"] == end]
        order = np.argsort(sign * own)[:30]
        assert rows["piece"].tolist() == vocabulary.pieces(order.tolist())
        np.testing.assert_allclose(rows["logit"], own[order], rtol=1e-5)


def test_case_and_blanks_make_no_difference(pi05):
    tables = [neuron_words(pi05, [word], top=3).table for word in ("up", "UP", " Up ")]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table.drop(columns="word"), tables[0].drop(columns="word"))
    assert neuron_words(pi05, ["up"], top=1).spellings == {"up": ("up", " up")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_several_files(pi05, tmp_path, dtype):
    folder = shutil.copytree(pi05, tmp_path / "policy")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    shares = {f"model-{n}.safetensors": sorted(tensors)[n::2] for n in (0, 1)}
    for file, names in shares.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in shares.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read = Weights(weights.find_checkpoint(folder).weights)
    assert set(read.names) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read.whole(name), tensor.float().numpy())
    row = neuron_words(folder, [WORD], top=1).table.iloc[0]
    assert (row["layer"], row["unit"], row["place"]) == (*PLANTED, 1)


def test_read_in_any_turns_it_is_the_same(pi05, monkeypatch):
    whole = neuron_words(pi05, [WORD, "up"], neurons=["vlm.1.5"], top=30, cache=False)
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 4 * 64 * 7)
    monkeypatch.setattr(lens, "_AT_ONCE_BYTES", 4 * 192 * 2 * 3)
    seen = []
    turns = neuron_words(
        pi05, [WORD, "up"], neurons=["vlm.1.5"], top=30, cache=False, progress=lambda *at: seen.append(at)
    )
    pd.testing.assert_frame_equal(turns.table, whole.table, atol=1e-5)
    pd.testing.assert_frame_equal(turns.ends, whole.ends, atol=1e-4)
    assert len(seen) > 80
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_layers_that_are_chosen(pi05):
    found = neuron_words(pi05, [WORD], layers=[0, -1], top=400)
    assert set(found.table["layer"]) == {0, 3}
    assert len(found.table) == 2 * 192
    assert found.table.iloc[0][["layer", "unit", "rank"]].tolist() == [*TWIN, 1]


def test_a_tied_policy_without_a_head_is_read_by_its_embedding(pi05, tmp_path):
    folder = shutil.copytree(pi05, tmp_path / "policy")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{PALIGEMMA}lm_head.weight"]
    # Checkpoints that were converted from OpenPI's have no "model." before their names.
    bare = {name.removeprefix("model."): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors")
    found = neuron_words(folder, [WORD], top=3)
    assert found.unembedding == "embed_tokens"
    pd.testing.assert_frame_equal(found.table, neuron_words(pi05, [WORD], top=3).table)


# The chance level


def test_chance_is_what_random_words_reach():
    random = np.random.default_rng(0)
    width, n_units, n_layers, top = 12, 40, 3, 5
    tokens = random.normal(size=(200, width)).astype(np.float32)
    vectors = random.normal(size=(n_layers, width, n_units)).astype(np.float32)
    words = {"high": [[0], [1]], "gripper": [[2, 3, 4]]}
    others = {chr(97 + n // 26) + chr(97 + n % 26): (5 + 3 * n, 6 + 3 * n, 7 + 3 * n) for n in range(60)}
    controls = lens.draw_controls(words, others, 25, 0)
    assert {(one.make, one.token_id.shape) for one in controls} == {
        ("spellings", (25, 2)),
        ("tokens", (25, 3)),
    }
    for row in next(one.token_id for one in controls if one.make == "spellings"):
        assert any(set(row) <= set(ids) for ids in others.values())
    ids = np.arange(200)
    search = lens.WordSearch(words, controls, ids, tokens, top)
    for layer in range(n_layers):
        search.add(layer, lens.final_norm(vectors[layer].copy(), np.ones(width, np.float32), 1e-6))
    table = search.table()
    values = np.concatenate(list(vectors), axis=1)
    cosine = (tokens @ values) / np.linalg.norm(tokens, axis=1)[:, None] / np.linalg.norm(values, axis=0)
    for make, reduce, word in (("spellings", np.max, "high"), ("tokens", np.mean, "gripper")):
        drawn = next(one.token_id for one in controls if one.make == make)
        best = np.sort(reduce(cosine[drawn], axis=1), axis=1)[:, ::-1][:, :top]
        rows = table[table["word"] == word]
        np.testing.assert_allclose(rows["chance"], np.median(best, axis=0), atol=1e-5)
        p = [(1 + (best[:, n] >= rows["cosine"].iloc[n]).sum()) / 26 for n in range(top)]
        np.testing.assert_allclose(rows["p"], p)


def test_fewer_random_words_than_make_a_chance_level_give_none():
    others = {"abc"[n] * 2: (n,) for n in range(3)}
    (controls,) = lens.draw_controls({"up": [[5]]}, others, 100, 0)
    assert len(controls.token_id) == 0
    search = lens.WordSearch({"up": [[5]]}, [controls], np.array([5]), np.ones((1, 4), np.float32), 2)
    search.add(0, lens.final_norm(np.ones((4, 3), np.float32), np.ones(4, np.float32), 0.0))
    assert search.table()[["chance", "p"]].isna().all(axis=None)


def test_a_neuron_of_zeros_says_nothing():
    normed = lens.final_norm(np.zeros((4, 2), np.float32), np.ones(4, np.float32), 1e-6)
    assert (normed.length == 1).all()
    assert not normed.vectors.any()


def test_clusters_are_led_by_the_best_and_do_not_chain():
    angles = np.radians([0, 30, 60, 61])  # each is like the next; the first is not like the third
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert lens.clusters(vectors, vectors, np.cos(np.radians(35))) == [0, 0, 2, 2]


def test_words_are_listed_once_whatever_their_case():
    assert lens.in_words([" high", "High", "\n", "tall"], 3) == "high | '\\n' | tall"


# What is kept


def test_what_was_found_is_kept_until_the_checkpoint_changes(pi05, tmp_path, monkeypatch):
    folder = shutil.copytree(pi05, tmp_path / "policy")
    first = neuron_words(folder, [WORD], neurons=["vlm.1.5"], top=4)
    with monkeypatch.context() as patch:
        patch.setattr(plugin, "_search", None)
        again = neuron_words(folder, [WORD], neurons=["vlm.1.5"], top=4)
        pd.testing.assert_frame_equal(again.table, first.table)
        pd.testing.assert_frame_equal(again.ends, first.ends)
        assert (again.spellings, again.layers, again.last_acts) == (first.spellings, first.layers, False)
        for others in ({"top": 3}, {"layers": [0]}, {"cache": False}, {"seed": 1}):
            with pytest.raises(TypeError):
                neuron_words(folder, [WORD], neurons=["vlm.1.5"], **{"top": 4, **others})
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{PALIGEMMA}model.language_model.layers.2.mlp.down_proj.weight"][:, PLANTED.unit] = 0
    save_file(tensors, folder / "model.safetensors")
    assert neuron_words(folder, [WORD], neurons=["vlm.1.5"], top=4).table.iloc[0]["unit"] == TWIN.unit


def test_a_damaged_cache_costs_time_alone(pi05, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = neuron_words(pi05, [WORD], top=2)
    (kept,) = tmp_path.rglob("*.json")
    kept.write_text('{"table": 1}')
    pd.testing.assert_frame_equal(neuron_words(pi05, [WORD], top=2).table, first.table)


# The command


def run(*arguments):
    return run_in(160, *arguments)


def run_in(columns, *arguments):
    words = ["neurons", "words", *map(str, arguments)]
    return CliRunner().invoke(cli.app, words, env={"COLUMNS": str(columns)})


def test_the_command_prints_and_writes_the_table(pi05, tmp_path):
    out = tmp_path / "words.csv"
    done = run(pi05, "--words", SEVERAL, "--top", 6, "--neuron", PLANTED, "-o", out)
    assert done.exit_code == 0, done.output
    table = pd.read_csv(out)
    columns = ["word", "stream", "layer", "unit", "cosine", "logit", "rank", "top_words"]
    assert table.columns[:8].tolist() == columns
    assert table["word"].tolist() == [word for word in SEVERAL.split(",") for _ in range(6)]
    assert table.iloc[0][["stream", "layer", "unit", "rank"]].tolist() == ["vlm", *PLANTED, 1]
    assert str(PLANTED) in done.output
    assert "Layer 3 is the language model's last" in done.output


def test_a_narrow_terminal_cuts_no_number(pi05):
    done = run_in(80, pi05, "--words", SEVERAL, "--top", 2)
    assert done.output.count(str(PLANTED)) >= 1, done.output
    for name in ("rank", "neuron", "cosine", "chance", "place"):
        assert name in done.output


def test_a_name_on_the_hub(pi05, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def download(repository, file):
        assert repository == "someone/policy"
        if not (pi05 / file).is_file():
            raise EntryNotFoundError(file)
        return str(pi05 / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert neuron_words("someone/policy", [WORD], top=1).table.iloc[0]["unit"] == PLANTED.unit


def test_it_starts_without_torch(pi05, tmp_path):
    code = (
        "import sys; from lerobot_attn.cli import app\n"
        f"app(['neurons', 'words', {str(pi05)!r}, '--words', 'up', '--no-cache'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'lerobot', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--words", ""], "'' is no sequence"),
        (["--words", "up,,down"], "'' is no sequence"),
        (["--words", "up", "--layers", "4"], "layer 4 does not exist"),
        (["--words", "up", "--layers", "some"], "expected all, or numbers"),
        (["--words", "up", "--stream", "expert"], "neurons contrast"),
        (["--words", "up", "--stream", "arm"], "expected vlm"),
        (["--words", "up", "--neuron", "expert.0.1"], "no vocabulary"),
        (["--words", "up", "--neuron", "vlm.4.0"], "the layers 0 to 3 with the units 0 to 191"),
        (["--words", "up", "--neuron", "vlm.0.192"], "does not exist"),
        (["--words", "up", "--neuron", "3"], "expected stream.layer.unit"),
        (["--words", "up", "--top", "0"], "whole number from 1"),
        (["--words", "up", "--n-words", "31"], "from 1 to 30"),
        (["--words", "up", "--similar", "0"], "a cosine above 0"),
        (["--words", "up", "--tokenizer", "nowhere/at-all"], "tokenizer"),
        (["--words", "up", "-o", "no/folder/words.csv"], "a folder that exists"),
        (["--neuron", "vlm.0.1", "-o", "words.csv"], "without --words"),
        ([], "--words high,low"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(pi05, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    output = [] if "-o" in arguments else ["-o", "words.csv"] if "--words" in arguments else []
    monkeypatch.setattr(sys, "argv", ["lerobot-attn", "neurons", "words", str(pi05), *arguments, *output])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert said in error[0]
    assert not [*tmp_path.iterdir()]


def without_tokenizer(folder):
    file = folder / "policy_preprocessor.json"
    pipeline = json.loads(file.read_text())
    pipeline["steps"] = [step for step in pipeline["steps"] if "tokenizer_json" not in step.get("config", {})]
    file.write_text(json.dumps(pipeline))


def set_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def another_policys_weights(folder):
    save_file({"model.encoder.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    set_config(folder, type="diffusion")


def without(name):
    def remove(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return remove


def fewer_rows(folder):
    tensors = load_file(folder / "model.safetensors")
    head = f"{PALIGEMMA}lm_head.weight"
    tensors[head] = tensors[head][:300].clone()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: set_config(folder, use_peft=True), "merge it first"),
        (lambda folder: (folder / "config.json").unlink(), "got no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "expected a policy's weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "no whole safetensors"),
        (truncated, "shorter than its header says"),
        (another_policys_weights, "'diffusion' cannot be read (no attention over images"),
        (without(f"{PALIGEMMA}model.language_model.norm.weight"), "norm.weight is missing"),
        (without(f"{PALIGEMMA}model.language_model.layers.1.mlp.down_proj.weight"), "is missing"),
        (without_tokenizer, "no tokenizer beside the weights"),
        (fewer_rows, "has a token that the weights have no row for"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "got no tokenizer"),
    ],
)
def test_checkpoints_that_cannot_be_read(pi05, tmp_path, damage, said):
    folder = shutil.copytree(pi05, tmp_path / "policy")
    damage(folder)
    with pytest.raises((ConfigError, UnsupportedPolicyError)) as stopped:
        neuron_words(folder, ["cabinet"])
    assert said in str(stopped.value)
    assert len(str(stopped.value).splitlines()) == 1


def test_an_index_cannot_lead_out_of_the_checkpoint(pi05, tmp_path):
    folder = shutil.copytree(pi05, tmp_path / "policy")
    index = {"weight_map": {"a": "../policy/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="files beside it"):
        neuron_words(folder, [WORD])


def test_a_policy_that_is_nowhere():
    with pytest.raises(ConfigError, match=r"no config\.json|neither a folder nor a repository"):
        neuron_words("nobody/nothing", [WORD])


def test_a_tokenizer_of_ones_own(pi05, tmp_path):
    folder = shutil.copytree(pi05, tmp_path / "policy")
    steps = json.loads((folder / "policy_preprocessor.json").read_text())["steps"]
    text = next(step["config"]["tokenizer_json"] for step in steps if "tokenizer_json" in step["config"])
    without_tokenizer(folder)
    (tmp_path / "tokenizer.json").write_text(text)
    for place in (tmp_path / "tokenizer.json", tmp_path):
        assert neuron_words(folder, [WORD], top=1, tokenizer=place).table.iloc[0]["unit"] == PLANTED.unit


def test_a_word_that_the_tokenizer_cannot_write():
    from tokenizers import Tokenizer, models, pre_tokenizers

    from lerobot_attn.policies.vocabulary import Vocabulary

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "up": 1, "High": 2, "high": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary = Vocabulary(tokenizer.to_str(), Path("here"))
    assert vocabulary.spellings("HIGH") == ((2,), (3,))
    with pytest.raises(ConfigError, match="'slow' is no sequence"):
        vocabulary.spellings("slow")


def test_pi0_fast_is_read_too(fast_policy, tmp_path):
    from fast_policy import text_tokenizer

    folder = tmp_path / "fast"
    fast_policy().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(text_tokenizer().backend_tokenizer.to_str())
    found = neuron_words(folder, [WORD], top=3)
    assert found.last_acts
    assert read_value_vectors(folder).n_layers == found.n_layers == 3
