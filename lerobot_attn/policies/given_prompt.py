"""The prompt that a batch holds, before any policy reads it: its text, and the state's numbers in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from lerobot_attn.errors import UnsupportedPolicyError
from lerobot_attn.layout import Kind
from lerobot_attn.policies import adapter_class
from lerobot_attn.prompt import PieceDecoder, Tokenizer

_PADDING = re.compile(r"(?:<pad>)+\Z")  # of policies that mask none of it


class GivenPrompt(NamedTuple):
    """A prompt.

    Attributes:
        text: as the tokens say it, with those that open it.
        is_cut: whether its end is missing, as far as its format is known.
        digits: the numbers that stand for the state, or none.
    """

    text: str
    is_cut: bool
    digits: tuple[int, ...]


class PromptReader:
    """Reads prompts of one policy; it remembers the tokens it has decoded.

    Args:
        config: the policy's LeRobot config.
        tokenizer: what wrote the prompts; None: none is known, and nothing can be read.
    """

    def __init__(self, config: Any, tokenizer: Tokenizer | None):
        self._decoder = PieceDecoder(tokenizer)
        self._family: Any = None
        with suppress(UnsupportedPolicyError):
            self._family = adapter_class(config)

    def read(self, token_ids: Sequence[int]) -> GivenPrompt | None:
        """Read a prompt, without the padding that a policy masks; None without a tokenizer."""
        if not self._decoder.can_decode:
            return None
        whole = "".join(self._decoder.pieces(token_ids))
        text = _PADDING.sub("", whole)
        # How a prompt is written is the family's, not the policy's: no weights are needed to read it.
        family = self._family
        parsed = None if family is None else family.__new__(family).parse_prompt(whole)
        if parsed is None:
            return GivenPrompt(text, False, ())
        digits = tuple(int(whole[span.start : span.stop]) for span in parsed.spans if span.kind == Kind.STATE)
        return GivenPrompt(text, bool(parsed.is_truncated), digits)
