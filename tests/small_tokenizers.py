"""A tokenizer that is trained on the tests' own words: no Hub, and pieces of words as real ones have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WORDS = ("put the bowl on the plate", "open the drawer and turn on the stove")


def byte_level_bpe(
    special: Sequence[str], *, more: Sequence[str] = (), size: int = 300, unknown: str | None = None
) -> Any:
    """Return a `tokenizers.Tokenizer` as GPT-2's, BART's and Qwen's are.

    Args:
        special: tokens that stand for no text, in the order of their numbers, from 0.
        more: texts that it is trained on besides `WORDS`.
        size: tokens at most.
        unknown: the one of `special` that stands for what it does not know.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*WORDS, *more], trainer)
    return tokenizer
