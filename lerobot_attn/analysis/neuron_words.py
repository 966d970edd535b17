"""Which neurons say a word, by the weights alone: the logit lens on value vectors.

A unit of a feed-forward layer adds its value vector, times its activation, to the residual stream. Put
through the final norm and the unembedding, that vector gives each token of the vocabulary a logit: the words
that the unit promotes (Geva et al. 2021, arXiv 2012.14913, and 2022, arXiv 2203.14680). Häon et al. 2025
(arXiv 2509.00328) looked for neurons of vision-language-action policies so, without the norm.

What a neuron says is no proof of what it does: fire it, with controls.

Pure numpy. Value vectors and rows of the unembedding come from whoever reads the weights, in any turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

_Floats = NDArray[np.float32]
_Integers = NDArray[np.int64]
Spellings = Sequence[Sequence[int]]  # of a word: each way to write it, its tokens

FEWEST_CONTROLS = 19  # fewer cannot give a p of 0.05
N_ALIKE = 30  # tokens that a neuron's meaning is made of
_AT_ONCE_BYTES = 64_000_000  # of scores


class Neuron(NamedTuple):
    """A unit of a layer of the language model, e.g. "vlm.3.120" as text."""

    layer: int
    unit: int

    def __str__(self) -> str:
        return f"vlm.{self.layer}.{self.unit}"


class Normed(NamedTuple):
    """Value vectors behind the final norm.

    Attributes:
        vectors: (width, unit) float32.
        length: (unit,) float32, Euclidean; 1 of a vector of zeros, so that its cosines are 0.
    """

    vectors: _Floats
    length: _Floats


def final_norm(vectors: _Floats, gain: _Floats, eps: float) -> Normed:
    """Put value vectors through the final norm (RMSNorm), in place.

    Args:
        vectors: (width, unit) float32; overwritten.
        gain: (width,) float32, what the norm multiplies by (of Gemma 1 + its weight).
        eps: added to the mean square before its root is taken.
    """
    mean_square = np.einsum("du,du->u", vectors, vectors) / len(vectors)
    vectors *= gain[:, None]
    vectors *= (1 / np.sqrt(mean_square + np.float32(eps)))[None]
    length = np.sqrt(np.einsum("du,du->u", vectors, vectors))
    length[length == 0] = 1
    return Normed(vectors, length)


class Controls(NamedTuple):
    """Random other words, which say what a word of the same make reaches by chance.

    Attributes:
        make: "spellings": each word has several tokens, of which one is enough; "tokens": it is all of them.
        token_id: (word, token) integer.
        numbers: how many of the tokens, the first ones, are taken.
    """

    make: Literal["spellings", "tokens"]
    token_id: _Integers
    numbers: tuple[int, ...]


def draw_controls(
    words: Mapping[str, Spellings], others: Mapping[str, Sequence[int]], n_random: int, seed: int
) -> list[Controls]:
    """Draw random words of the vocabulary, of the same make as those that are looked for.

    A word with more spellings reaches a higher cosine by chance, so its controls have as many: words that
    have at least as many, cut to that number at random. Where the vocabulary has too few of these, each
    control has spellings of different words, which reach more than those of one. A word of several tokens
    gets as many random tokens.

    Args:
        words: word → its spellings.
        others: the vocabulary's words, folded → their single tokens.
        n_random: how many words to draw; fewer where the vocabulary has fewer.
        seed: of the draw.
    """
    random = np.random.default_rng(seed)
    asked = {word.strip().casefold() for word in words}
    pool = [np.array(others[word]) for word in sorted(others) if word not in asked]
    makes = {make_of(spellings) for spellings in words.values()}
    found: list[Controls] = []
    for number in sorted((n for make, n in makes if make == "spellings"), reverse=True):
        if found and len(found[-1].token_id) == n_random:
            # Words that have more spellings serve as well, cut: they need be scored only once.
            found[-1] = found[-1]._replace(numbers=(*found[-1].numbers, number))
            continue
        able = [tokens for tokens in pool if len(tokens) >= number]
        if len(able) >= FEWEST_CONTROLS:
            chosen = random.permutation(len(able))[:n_random]
            drawn = [random.permutation(able[index])[:number] for index in chosen]
        else:
            drawn = _unrelated(pool, number, n_random, random)
        found.append(Controls("spellings", np.array(drawn, np.int64).reshape(-1, number), (number,)))
    for number in sorted(n for make, n in makes if make == "tokens"):
        drawn = _unrelated(pool, number, n_random, random)
        found.append(Controls("tokens", np.array(drawn, np.int64).reshape(-1, number), (number,)))
    return found


def _unrelated(
    pool: Sequence[_Integers], number: int, n_random: int, random: np.random.Generator
) -> list[_Integers]:
    """Return sets of tokens of different random words; none where the vocabulary has too few words."""
    first = np.array([tokens[0] for tokens in pool], np.int64)
    enough = len(first) >= max(2 * number, FEWEST_CONTROLS)
    return [random.permutation(first)[:number] for _ in range(n_random if enough else 0)]


def make_of(spellings: Spellings) -> tuple[Literal["spellings", "tokens"], int]:
    """Return of what make a word is: so many spellings of one token each, or one of so many tokens."""
    if len(spellings) == 1 and len(spellings[0]) > 1:
        return "tokens", len(spellings[0])
    return "spellings", len(spellings)


class WordSearch:
    """Looks for the neurons that say words, layer by layer.

    A neuron's score for a word is the largest over the word's spellings, of a spelling of several tokens the
    mean over them. Neurons are ranked by cosine, among all units of all layers that were added.

    Args:
        words: word → its spellings.
        controls: as `draw_controls` gives them.
        token_id: (token,) the tokens of all of these, ascending, each once.
        tokens: (token, width) float32, their rows of the unembedding.
        top: neurons to list for each word.
    """

    def __init__(
        self,
        words: Mapping[str, Spellings],
        controls: Sequence[Controls],
        token_id: _Integers,
        tokens: _Floats,
        top: int,
    ):
        self._words, self._controls, self._top = dict(words), list(controls), top
        self._id = token_id
        length = np.linalg.norm(tokens, axis=1, keepdims=True)
        self._length = np.where(length == 0, np.float32(1), length)
        self._directions = tokens / self._length
        self._layers: list[int] = []
        self._scores: dict[str, list[tuple[_Floats, _Floats]]] = {word: [] for word in words}
        # (make, number) → (control word, rank): the best cosines so far.
        self._best: dict[tuple[str, int], _Floats] = {}

    def add(self, layer: int, normed: Normed) -> None:
        """Score a layer's neurons."""
        self._layers.append(layer)
        for word, spellings in self._words.items():
            rows = [np.searchsorted(self._id, spelling) for spelling in spellings]
            along = [self._directions[row] @ normed.vectors for row in rows]  # (token, unit) of each spelling
            cosine = np.stack([one.mean(axis=0) for one in along]) / normed.length
            logit = [(one * self._length[row]).mean(axis=0) for one, row in zip(along, rows, strict=True)]
            best = (cosine.argmax(axis=0), np.arange(cosine.shape[1]))
            self._scores[word].append((np.stack(logit)[best], cosine[best]))
        for controls in self._controls:
            self._add_controls(controls, normed)

    def _add_controls(self, controls: Controls, normed: Normed) -> None:
        n_words, n_each = controls.token_id.shape
        at_once = max(1, _AT_ONCE_BYTES // (4 * n_each * normed.vectors.shape[1]))
        found: dict[tuple[str, int], list[_Floats]] = {(controls.make, n): [] for n in controls.numbers}
        for start in range(0, n_words, at_once):
            rows = np.searchsorted(self._id, controls.token_id[start : start + at_once])
            scores = (self._directions[rows.ravel()] @ normed.vectors) / normed.length
            scores = scores.reshape(*rows.shape, -1)
            for number in controls.numbers:
                of_word = scores[:, :number]
                of_word = of_word.max(axis=1) if controls.make == "spellings" else of_word.mean(axis=1)
                found[controls.make, number].append(_largest(of_word, self._top))
        for key, parts in found.items():
            if parts:
                new = np.concatenate(parts)
                old = self._best.get(key, new[:, :0])
                self._best[key] = _largest(np.concatenate([old, new], axis=1), self._top)

    def table(self) -> pd.DataFrame:
        """Return the neurons found: word, stream, layer, unit, cosine, logit, rank, chance, p.

        `chance` is the cosine that the neuron of that rank reaches for a random word (median). p is the share
        of words, the random ones and this one, whose neuron of that rank reaches as much. Both are NaN where
        there are too few random words.
        """
        rows = []
        for word, spellings in self._words.items():
            logit, cosine = (np.concatenate(part) for part in zip(*self._scores[word], strict=True))
            n_units = len(cosine) // len(self._layers)
            control = self._best.get(make_of(spellings))
            enough = control is not None and len(control) >= FEWEST_CONTROLS
            for place, index in enumerate(np.argsort(-cosine, kind="stable")[: self._top]):
                chance, p = np.nan, np.nan
                if control is not None and enough:
                    others = control[:, place]
                    chance = float(np.median(others))
                    p = float((1 + (others >= cosine[index]).sum()) / (1 + len(others)))
                layer, unit = self._layers[index // n_units], int(index % n_units)
                numbers = float(cosine[index]), float(logit[index]), place + 1, chance, p
                rows.append((word, "vlm", layer, unit, *numbers))
        columns = ["word", "stream", "layer", "unit", "cosine", "logit", "rank", "chance", "p"]
        return pd.DataFrame(rows, columns=columns)


def _largest(scores: _Floats, n: int) -> _Floats:
    """Return the n largest of each row, descending: (row, rank)."""
    if scores.shape[1] > n:
        scores = -np.partition(-scores, n - 1, axis=1)[:, :n]
    return -np.sort(-scores, axis=1)


class Ends(NamedTuple):
    """The tokens at the ends of each neuron's list.

    Attributes:
        top: (neuron, place) integer, the tokens with the largest logits, descending.
        top_logit: theirs, float32.
        bottom: (neuron, place) integer, those with the smallest, ascending.
        bottom_logit: theirs, float32.
        place: (wanted,) integer, the place of each wanted token in its neuron's list, from 1.
    """

    top: _Integers
    top_logit: _Floats
    bottom: _Integers
    bottom_logit: _Floats
    place: _Integers


class TokenRanking:
    """Ranks the whole vocabulary for a few neurons, part by part.

    Args:
        vectors: (neuron, width) float32, value vectors behind the final norm.
        n_tokens: how many tokens to keep at each end.
        neuron: (wanted,) integer, whose list a token is wanted in.
        token_id: (wanted,) integer, the tokens whose places are wanted.
        logit: (wanted,) float32, theirs.
    """

    def __init__(
        self, vectors: _Floats, n_tokens: int, neuron: _Integers, token_id: _Integers, logit: _Floats
    ):
        self._vectors, self._n = vectors, n_tokens
        self._neuron, self._token_id, self._logit = neuron, token_id, logit
        self._before = np.zeros(len(neuron), np.int64)
        none: tuple[_Integers, _Floats] = (
            np.empty((len(vectors), 0), np.int64),
            np.empty((len(vectors), 0), np.float32),
        )
        self._top, self._bottom = none, none

    def add(self, start: int, tokens: _Floats) -> None:
        """Rank more of the vocabulary: (token, width) float32, whose first token is `start`."""
        logit = self._vectors @ tokens.T
        ids = np.broadcast_to(np.arange(start, start + len(tokens)), logit.shape)
        for wanted, (neuron, token, own) in enumerate(
            zip(self._neuron, self._token_id, self._logit, strict=True)
        ):
            larger = logit[neuron] > own
            if start <= token < start + len(tokens):
                # Its own logit, of another product, may differ from itself in the last bit.
                larger[token - start] = False
            self._before[wanted] += np.count_nonzero(larger)
        self._top = _kept(self._top, ids, logit, self._n, 1)
        self._bottom = _kept(self._bottom, ids, logit, self._n, -1)

    def ends(self) -> Ends:
        """Return what was found."""
        return Ends(*self._top, *self._bottom, self._before + 1)


def _kept(
    before: tuple[_Integers, _Floats], ids: _Integers, logit: _Floats, n: int, sign: int
) -> tuple[_Integers, _Floats]:
    if logit.shape[1] > n:
        part = np.argpartition(-sign * logit, n - 1, axis=1)[:, :n]
        ids, logit = np.take_along_axis(ids, part, 1), np.take_along_axis(logit, part, 1)
    ids, logit = np.concatenate([before[0], ids], axis=1), np.concatenate([before[1], logit], axis=1)
    order = np.argsort(-sign * logit, axis=1, kind="stable")[:, :n]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logit, order, 1)


def meanings(logit: _Floats, tokens: _Floats) -> _Floats:
    """Return what neurons mean, as unit vectors: the mean direction of their top tokens, weighted by logit.

    Logits grow with the norm's gain and with the width: a softmax of them would be the top token alone.

    Args:
        logit: (neuron, place) float32, of their top tokens.
        tokens: (neuron, place, width) float32, these tokens' rows of the unembedding.

    Returns:
        (neuron, width) float32.
    """
    directions = _unit(tokens)
    weight = np.maximum(logit, 0)
    return _unit(np.einsum("np,npd->nd", weight, directions))


def _unit(vectors: _Floats) -> _Floats:
    """Return vectors of length 1; zeros stay."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    found: _Floats = vectors / np.where(length == 0, np.float32(1), length)
    return found


def clusters(meaning: _Floats, vectors: _Floats, similar: float) -> list[int]:
    """Put near-duplicates together.

    A neuron joins the first before it that leads a cluster and whose meaning, or whose value vector behind
    the norm, has at least this cosine with its own; otherwise it leads a new one. So the members of a cluster
    are all like its leader, which is the best-ranked of them.

    Args:
        meaning: (neuron, width) unit vectors, in the order of the ranks.
        vectors: (neuron, width) value vectors behind the final norm.
        similar: the least cosine of near-duplicates.

    Returns:
        For each neuron, the position of the leader of its cluster.
    """
    direction = _unit(vectors)
    cosine = np.maximum(meaning @ meaning.T, direction @ direction.T)
    leaders: list[int] = []
    found = []
    for neuron in range(len(meaning)):
        leader = next((one for one in leaders if cosine[neuron, one] >= similar), neuron)
        if leader == neuron:
            leaders.append(neuron)
        found.append(leader)
    return found


def in_words(pieces: Sequence[str], n: int) -> str:
    """Return the first n words of a list of tokens' texts, each once whatever its case: "high | tall | …".

    What is nothing but blanks or cannot be printed stands as Python writes it, in quotation marks.
    """
    found: dict[str, str] = {}
    for piece in pieces:
        word = piece.strip()
        shown = word if word and word.isprintable() else repr(piece)
        found.setdefault(shown.casefold(), shown)
    return " | ".join([*found.values()][:n])


@dataclass(frozen=True)
class NeuronWords:
    """What was found.

    Attributes:
        table: a row for each word and neuron: word, stream ("vlm"), layer, unit, cosine, logit, rank (among
            all units of the layers that were looked at, by cosine, from 1), top_words (the neuron's own top
            words), place (of the word's best spelling among all tokens in the neuron's own list, by logit,
            from 1; of a word of several tokens that of its worst), cluster (the best-ranked neuron of this
            word that says nearly the same), chance and p (see `WordSearch.table`).
        ends: a row for each neuron that was asked for and token at the ends of its list: stream, layer, unit,
            end ("top" or "bottom"), place (from 1 at either end), piece (its text with its blanks), logit.
        spellings: word → the texts of its spellings, tokens joined by "+".
        layers: the layers that were looked at.
        n_layers: layers of the language model.
        n_units: units of a layer.
        n_tokens: tokens of the vocabulary.
        unembedding: which matrix made the logits, "lm_head" or "embed_tokens".
        last_acts: whether the last layer's neurons reach the actions.
    """

    table: pd.DataFrame
    ends: pd.DataFrame
    spellings: dict[str, tuple[str, ...]]
    layers: tuple[int, ...]
    n_layers: int
    n_units: int
    n_tokens: int
    unembedding: str
    last_acts: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        tables = {name: getattr(self, name).to_dict("list") for name in ("table", "ends")}
        return {**vars(self), **tables}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NeuronWords:
        """Return what `to_dict` was called of.

        Raises:
            KeyError: something is missing.
            TypeError: something is not what it was.
        """
        tables = {name: pd.DataFrame(values[name]) for name in ("table", "ends")}
        spellings = {word: tuple(texts) for word, texts in values["spellings"].items()}
        return cls(**{**values, **tables, "spellings": spellings, "layers": tuple(values["layers"])})
