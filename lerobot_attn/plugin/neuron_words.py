"""Neurons and the words that they say, of a checkpoint: its weights read in turns, what was found kept.

    found = neuron_words("lerobot/pi05_base", ["high", "low"])
    found.table  # word, stream, layer, unit, cosine, logit, rank, top_words, …

Loads no policy, and neither torch nor LeRobot. The numbers are `lerobot_attn.analysis.neuron_words`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lerobot_attn.analysis.neuron_words import (
    N_ALIKE,
    Controls,
    Ends,
    Neuron,
    NeuronWords,
    TokenRanking,
    WordSearch,
    clusters,
    draw_controls,
    final_norm,
    in_words,
    meanings,
)
from lerobot_attn.config import resolve_indices
from lerobot_attn.errors import ConfigError
from lerobot_attn.policies.value_vectors import ValueVectors, read_value_vectors
from lerobot_attn.policies.vocabulary import Vocabulary, read_vocabulary

Progress = Callable[[int, int], None]  # called as `progress(done, total)`

_FORMAT = 1  # of what is kept: another number makes old results be found anew
_NO_WORDS = {
    "expert": "the action expert has no vocabulary, so that its neurons say no words",
    "vision": "the vision tower has no vocabulary, so that its neurons say no words",
}


def neuron_words(
    policy: str | Path,
    words: Sequence[str] = (),
    *,
    neurons: Sequence[str] = (),
    stream: str = "vlm",
    layers: Any = "all",
    top: int = 20,
    n_words: int = 10,
    similar: float = 0.8,
    n_random: int = 100,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> NeuronWords:
    """Find the neurons of a policy's language model that say words, by its weights alone.

    Every unit's value vector goes through the final norm and the unembedding (the logit lens, Geva et al.
    2022; of such policies Häon et al. 2025). All neurons are scored for the wanted words and for random ones.
    A neuron's own list of words is made only for those that are found or asked for: all lists of a policy of
    4 billion parameters would take hours. One layer, or one part of the unembedding, is in memory at a time.

    Args:
        policy: a checkpoint's folder or its name on the Hub; pi0, pi05, pi0_fast or smolvla, or derived.
        words: what to look for. Case and a leading blank make no difference; a word that is no single token
            is the mean of its tokens.
        neurons: neurons whose top and bottom words are wanted, as "vlm.3.120" (layer 3, unit 120).
        stream: "vlm"; the other streams have no words.
        layers: "all", or numbers, negative ones from the last.
        top: neurons to list for each word.
        n_words: words to list for each neuron, at most 30.
        similar: the cosine from which on two neurons of a word's list are near-duplicates (`clusters`).
        n_random: random words that the chance level is made of.
        seed: of their draw.
        tokenizer: a tokenizer.json, a folder that has one or a name on the Hub, instead of the checkpoint's.
        cache: whether what was found may come from the cache, and is kept there.
        progress: called with (parts of the weights read, parts in all).

    Raises:
        ConfigError: no such checkpoint, word, layer or neuron, no tokenizer, or a setting out of range.
        SetupError: what reads tokenizers or the Hub is not installed.
        UnsupportedPolicyError: the policy has no language model that is known here.
    """
    _check_settings(words, neurons, stream, top, n_words, similar, n_random, seed)
    vectors = read_value_vectors(policy)
    chosen = resolve_indices("--layers: layer", _selection(layers), vectors.n_layers)
    if not chosen:
        raise ConfigError("--layers: got none, expected layers, or all")
    asked = [_neuron(name, vectors) for name in dict.fromkeys(neurons)]
    vocabulary = read_vocabulary(vectors.checkpoint, tokenizer)
    wanted = list(dict.fromkeys(words))
    settings = (wanted, list(map(str, asked)), chosen, top, n_words, similar, n_random, seed)
    kept = _kept_at(vectors, vocabulary, settings) if cache else None
    before = None if kept is None else _read_kept(kept)
    if before is not None:
        return before
    spelled = {word: vocabulary.spellings(word) for word in wanted}
    beyond = [word for word, spellings in spelled.items() if max(map(max, spellings)) >= vectors.n_tokens]
    if beyond:
        raise ConfigError(
            f"--words: {beyond[0]!r} has a token that the weights have no row for ({vectors.n_tokens} rows); "
            "expected the tokenizer that the policy was trained with, see --tokenizer"
        )
    found = _find(vectors, vocabulary, spelled, asked, chosen, settings[3:], progress)
    if kept is not None:
        _keep(kept, found)
    return found


def _check_settings(
    words: Sequence[str],
    neurons: Sequence[str],
    stream: str,
    top: int,
    n_words: int,
    similar: float,
    n_random: int,
    seed: int,
) -> None:
    _check_stream(stream, "--stream")
    if not words and not neurons:
        raise ConfigError("got neither words nor neurons, expected --words high,low or --neuron vlm.3.120")
    numbers = {"--top": (top, 1, 1000), "--n-words": (n_words, 1, N_ALIKE)}
    numbers |= {"--n-random": (n_random, 0, 10_000), "--seed": (seed, 0, 2**32 - 1)}
    for name, (value, least, most) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"{name}: got {value!r}, expected a whole number from {least} to {most}")
    if not 0 < similar <= 1:
        raise ConfigError(f"--similar: got {similar!r}, expected a cosine above 0, up to 1")


def _check_stream(stream: str, where: str) -> None:
    if stream in _NO_WORDS:
        raise ConfigError(
            f"{where}: got {stream!r}, but {_NO_WORDS[stream]}; expected vlm, or compare activations with "
            "lerobot-attn neurons contrast"
        )
    if stream != "vlm":
        raise ConfigError(f"{where}: got the stream {stream!r}, expected vlm")


def _selection(layers: Any) -> Any:
    if isinstance(layers, int) and not isinstance(layers, bool):
        return [layers]
    if layers == "all" or (not isinstance(layers, str) and isinstance(layers, Sequence)):
        return layers
    raise ConfigError(f"--layers: got {layers!r}, expected all, or numbers as -1 or 0,3")


def _neuron(name: str, vectors: ValueVectors) -> Neuron:
    match = re.fullmatch(r"([a-z]+)\.(\d+)\.(\d+)", name)
    if match is None:
        raise ConfigError(f"--neuron: got {name!r}, expected stream.layer.unit, as vlm.3.120")
    _check_stream(match[1], f"--neuron: {name}")
    found = Neuron(int(match[2]), int(match[3]))
    if found.layer >= vectors.n_layers or found.unit >= vectors.n_units:
        raise ConfigError(
            f"--neuron: {name} does not exist: this policy has the layers 0 to {vectors.n_layers - 1} with "
            f"the units 0 to {vectors.n_units - 1}"
        )
    return found


def _find(
    vectors: ValueVectors,
    vocabulary: Vocabulary,
    spelled: Mapping[str, tuple[tuple[int, ...], ...]],
    asked: Sequence[Neuron],
    layers: tuple[int, ...],
    settings: tuple[Any, ...],
    progress: Progress | None,
) -> NeuronWords:
    top, n_words, similar, n_random, seed = settings
    steps = _Steps((len(layers) if spelled else 0) + 1 + vectors.n_turns, progress)
    others = {word: tokens for word, tokens in vocabulary.words.items() if max(tokens) < vectors.n_tokens}
    controls = draw_controls(spelled, others, n_random, seed) if spelled else []
    table = _search(vectors, spelled, controls, layers, top, steps)
    listed = [Neuron(int(row.layer), int(row.unit)) for row in table.itertuples()]
    neurons = list(dict.fromkeys([*listed, *asked]))
    normed = _normed(vectors, neurons)
    steps.done()
    ends = _rank_tokens(vectors, table, spelled, neurons, normed, steps)
    place_of = {neuron: place for place, neuron in enumerate(neurons)}
    texts = [vocabulary.pieces(ids.tolist()) for ids in ends.top]
    own = [place_of[neuron] for neuron in listed]
    table = table.assign(
        top_words=[in_words(texts[neuron], n_words) for neuron in own],
        place=ends.place,
        cluster=_clusters(vectors, table, listed, own, normed, ends, similar),
    )
    order = ["word", "stream", "layer", "unit", "cosine", "logit", "rank", "top_words", "place", "cluster"]
    return NeuronWords(
        table=table[[*order, "chance", "p"]],
        ends=_ends_table(vocabulary, [(neuron, place_of[neuron]) for neuron in asked], ends, n_words),
        spellings={
            word: tuple("+".join(vocabulary.pieces(tokens)) for tokens in spellings)
            for word, spellings in spelled.items()
        },
        layers=layers,
        n_layers=vectors.n_layers,
        n_units=vectors.n_units,
        n_tokens=vectors.n_tokens,
        unembedding=vectors.unembedding,
        last_acts=vectors.last_acts,
    )


class _Steps:
    """Counts the parts of the weights that were read."""

    def __init__(self, total: int, progress: Progress | None):
        self._n_done, self._total, self._progress = 0, total, progress

    def done(self) -> None:
        self._n_done += 1
        if self._progress is not None:
            self._progress(self._n_done, self._total)


def _search(
    vectors: ValueVectors,
    spelled: Mapping[str, tuple[tuple[int, ...], ...]],
    controls: Sequence[Controls],
    layers: tuple[int, ...],
    top: int,
    steps: _Steps,
) -> pd.DataFrame:
    """Return the best neurons of each word, without what needs the whole vocabulary."""
    wanted = [np.array(tokens, np.int64) for spellings in spelled.values() for tokens in spellings]
    drawn = [one.token_id.ravel() for one in controls]
    token_id = np.unique(np.concatenate([np.empty(0, np.int64), *wanted, *drawn]))
    search = WordSearch(spelled, controls, token_id, vectors.tokens(token_id.tolist()), top)
    for layer in layers if spelled else ():
        search.add(layer, final_norm(vectors.layer(layer), vectors.gain, vectors.eps))
        steps.done()
    return search.table()


def _normed(vectors: ValueVectors, neurons: Sequence[Neuron]) -> NDArray[np.float32]:
    """Return neurons' value vectors behind the final norm: (neuron, width) float32."""
    found = np.empty((len(neurons), vectors.width), np.float32)
    for layer in sorted({neuron.layer for neuron in neurons}):
        places = [place for place, neuron in enumerate(neurons) if neuron.layer == layer]
        values = vectors.of_units(layer, [neurons[place].unit for place in places])
        found[places] = final_norm(values, vectors.gain, vectors.eps).vectors.T
    return found


def _rank_tokens(
    vectors: ValueVectors,
    table: pd.DataFrame,
    spelled: Mapping[str, tuple[tuple[int, ...], ...]],
    neurons: Sequence[Neuron],
    normed: NDArray[np.float32],
    steps: _Steps,
) -> Ends:
    """Rank all tokens for some neurons, and find each row's word among them."""
    place_of = {neuron: place for place, neuron in enumerate(neurons)}
    neuron, token_id, logit = [], [], []
    rows = {word: [vectors.tokens(tokens) for tokens in spellings] for word, spellings in spelled.items()}
    for row in table.itertuples():
        place = place_of[Neuron(int(row.layer), int(row.unit))]
        # Of each spelling its worst token, and of these the best.
        logits = [tokens @ normed[place] for tokens in rows[row.word]]
        worst = [int(one.argmin()) for one in logits]
        best = int(np.argmax([one[at] for one, at in zip(logits, worst, strict=True)]))
        neuron.append(place)
        token_id.append(spelled[row.word][best][worst[best]])
        logit.append(logits[best][worst[best]])
    wanted = np.array(neuron, np.int64), np.array(token_id, np.int64), np.array(logit, np.float32)
    ranking = TokenRanking(normed, N_ALIKE, *wanted)
    for start, tokens in vectors.all_tokens():
        ranking.add(start, tokens)
        steps.done()
    return ranking.ends()


def _clusters(
    vectors: ValueVectors,
    table: pd.DataFrame,
    listed: Sequence[Neuron],
    own: Sequence[int],
    normed: NDArray[np.float32],
    ends: Ends,
    similar: float,
) -> list[str]:
    """Return for each row the name of the neuron that leads its cluster."""
    found: list[str] = []
    for word in dict.fromkeys(table["word"]):
        rows = np.flatnonzero(table["word"] == word)
        places = [own[row] for row in rows]
        meaning = np.empty((len(places), vectors.width), np.float32)
        for at, place in enumerate(places):
            tokens = vectors.tokens(ends.top[place].tolist())
            meaning[at] = meanings(ends.top_logit[place : place + 1], tokens[None])[0]
        leaders = clusters(meaning, normed[places], similar)
        found += [str(listed[rows[leader]]) for leader in leaders]
    return found


def _ends_table(
    vocabulary: Vocabulary, asked: Sequence[tuple[Neuron, int]], ends: Ends, n_words: int
) -> pd.DataFrame:
    rows = []
    for neuron, place in asked:
        for end, tokens, logits in (
            ("top", ends.top[place], ends.top_logit[place]),
            ("bottom", ends.bottom[place], ends.bottom_logit[place]),
        ):
            pieces = vocabulary.pieces(tokens[:n_words].tolist())
            for number, (piece, logit) in enumerate(zip(pieces, logits.tolist(), strict=False), start=1):
                rows.append(("vlm", neuron.layer, neuron.unit, end, number, piece, logit))
    return pd.DataFrame(rows, columns=["stream", "layer", "unit", "end", "place", "piece", "logit"])


# What was found before


def _kept_at(vectors: ValueVectors, vocabulary: Vocabulary, settings: tuple[Any, ...]) -> Path:
    """Return where a result of these very files and settings is kept."""
    files = []
    for file in vectors.checkpoint.weights:
        status = file.resolve().stat()
        files.append((str(file.resolve()), status.st_size, status.st_mtime_ns))
    key = json.dumps([_FORMAT, files, vectors.checkpoint.policy_type, vocabulary.digest, *settings])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(cache) / "lerobot_attn" / "neuron_words" / f"{name}.json"


def _read_kept(file: Path) -> NeuronWords | None:
    """Return what is kept, or None where nothing is, or nothing that can be read."""
    try:
        return NeuronWords.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _keep(file: Path, found: NeuronWords) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(found.to_dict()), encoding="utf-8")
        temporary.replace(file)
    except OSError:
        return  # a cache that cannot be written costs time alone
