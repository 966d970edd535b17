"""The prompt that the policy really got: decoded pieces, words of the task, numbers of the state.

Knows tokenizers only by their `decode` method; never encodes a prompt again. How a family writes its prompts
is its adapter's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.layout import Kind


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], **kwargs: object) -> str:
        """Return the text of the ids."""


def find_tokenizer(preprocessor: Any) -> Tokenizer | None:
    """Return the tokenizer of a LeRobot preprocessor pipeline, or None if it has none."""
    for step in getattr(preprocessor, "steps", ()):
        tokenizer: Tokenizer | None = getattr(step, "input_tokenizer", None)
        for name in ("_processor", "processor", "proc"):  # EO-1's, MolmoAct2's, GR00T's: inside a processor
            if tokenizer is None:
                tokenizer = getattr(getattr(step, name, None), "tokenizer", None)
        if tokenizer is not None:
            return tokenizer
    return None


_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character
# A character has at most four bytes, but tokens of several bytes may each end inside one: a run of such
# tokens is decoded together up to this length.
_MAX_RUN = 16


class PieceDecoder:
    """Decode single tokens with the blanks they stand for, one table per tokenizer.

    Decoding a SentencePiece token alone drops its leading blank, so each is decoded behind an anchor token
    whose own text is then cut off. Tokens that hold only some bytes of a character are decoded together: the
    first of them gets the character, the others get no text.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._pieces: dict[tuple[int, ...], str] = {}

    @property
    def can_decode(self) -> bool:
        """Whether there is a tokenizer at all; without one every piece is empty."""
        return self._tokenizer is not None

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token id, e.g. `["Task", ":", " pick", …]`."""
        if self._tokenizer is None:
            return [""] * len(token_ids)
        ids = [int(token_id) for token_id in token_ids]
        found: list[str] = []
        while len(found) < len(ids):
            found += self._next(ids[len(found) : len(found) + _MAX_RUN])
        return found

    def _next(self, ids: Sequence[int]) -> list[str]:
        """Return the piece of the first token, and of those that share a character with it."""
        alone = self._piece((ids[0],))
        if _REPLACEMENT not in alone:
            return [alone]
        for n in range(2, len(ids) + 1):
            if _REPLACEMENT not in self._piece((ids[n - 1],)):
                break  # a whole character: what came before it will not become one
            together = self._piece(tuple(ids[:n]))
            if _REPLACEMENT not in together:
                return [together, *[""] * (n - 1)]
        return [alone]

    def _piece(self, ids: tuple[int, ...]) -> str:
        if ids not in self._pieces:
            # The second of two equal runs shows its blank: " pick" in "pick pick".
            alone, twice = self._decode([*ids]), self._decode([*ids, *ids])
            self._pieces[ids] = twice.removeprefix(alone)
        return self._pieces[ids]

    def _decode(self, token_ids: list[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


class TextSpan(NamedTuple):
    """Characters `start … stop - 1` of a prompt: one word of the task or one number of the state."""

    kind: Kind
    start: int
    stop: int
    ordinal: int  # which word, or which dimension of the state


class TextLabels(NamedTuple):
    """Labels of the language slots of one inference, arrays of shape (text,)."""

    kind: NDArray[np.int8]  # int8, values of Kind
    word: NDArray[np.int16]  # int16, which word of the task, -1 elsewhere
    state_dim: NDArray[np.int16]  # int16, which dimension of the state, -1 elsewhere


def label_text(
    pieces: Sequence[str], mask: NDArray[np.bool_], spans: Sequence[TextSpan] | None
) -> TextLabels:
    """Label language slots by the spans that their characters fall into.

    Args:
        pieces: the decoded text of each slot; the prompt is their concatenation over unmasked slots.
        mask: (text,) bool, False for padding.
        spans: what the prompt's words and numbers are; None when its format is unknown.

    Returns:
        A token without text is labelled as the one before it, whose character it completes. For a token that
        touches several spans, the one it shares most characters with; tokens in no span (blanks and
        punctuation between numbers, the fixed words) are template.
    """
    kind = np.where(mask, Kind.TEXT if spans is None else Kind.TEMPLATE, Kind.PADDING).astype(np.int8)
    word, state_dim = np.full(len(pieces), -1, np.int16), np.full(len(pieces), -1, np.int16)
    position = 0
    for slot, piece in enumerate(pieces):
        if not mask[slot] or spans is None:
            continue
        start, stop = position, position + len(piece)
        position = stop
        if not piece and slot and mask[slot - 1]:
            # The rest of a character that several tokens make up: it belongs where the character does.
            kind[slot], word[slot] = kind[slot - 1], word[slot - 1]
            state_dim[slot] = state_dim[slot - 1]
            continue
        shared, best = max(
            ((min(stop, span.stop) - max(start, span.start), span) for span in spans),
            key=lambda pair: pair[0],
            default=(0, None),
        )
        if best is None or shared <= 0:
            continue
        kind[slot] = best.kind
        if best.kind == Kind.TASK:
            word[slot] = best.ordinal
        elif best.kind == Kind.STATE:
            state_dim[slot] = best.ordinal
    return TextLabels(kind, word, state_dim)
