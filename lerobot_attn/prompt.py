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


class PieceDecoder:
    """Decode single tokens with the blanks they stand for, one table per tokenizer.

    Decoding a SentencePiece token alone drops its leading blank, so each is decoded behind an anchor token
    whose own text is then cut off. A character split over several byte tokens shows as replacement
    characters.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    @property
    def can_decode(self) -> bool:
        """Whether there is a tokenizer at all; without one every piece is empty."""
        return self._tokenizer is not None

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token id, e.g. `["Task", ":", " pick", …]`."""
        if self._tokenizer is None:
            return [""] * len(token_ids)
        return [self._piece(int(token_id)) for token_id in token_ids]

    def _piece(self, token_id: int) -> str:
        if token_id not in self._pieces:
            anchor = [token_id, token_id]
            alone, twice = self._decode(anchor[:1]), self._decode(anchor)
            # The second of two equal tokens shows its blank: " pick" in "pick pick".
            self._pieces[token_id] = twice.removeprefix(alone)
        return self._pieces[token_id]

    def _decode(self, token_ids: list[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
