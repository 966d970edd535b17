"""Decoded pieces of the token ids that the policy really got.

Knows tokenizers only by their `decode` method; never encodes a prompt again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], **kwargs: object) -> str:
        """Return the text of the ids."""


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
