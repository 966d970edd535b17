"""A small tokenizer in PaliGemma's manner, trained on LIBERO's instructions.

Pieces carry their leading blank as "▁", digits and punctuation stand alone, a newline is a token of its own,
bytes catch every other character, and a `<bos>` opens the prompt. Knows neither policies nor checkpoints, and
never imports `libero`, whose first import asks a question on stdin.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lerobot_attn.errors import SetupError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_90", "libero_10")

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"
# In the order of PaliGemma's ids 0 to 3: the towers' configs name pad 0, eos 1 and bos 2.
_SPECIAL_TOKENS = (PAD, EOS, BOS, UNK)
_BYTE_TOKENS = tuple(f"<0x{value:02X}>" for value in range(256))
_BLANK = "▁"
# What Pi0.5's prompt step writes around the instruction, with every digit in it.
_SCAFFOLD = "Task: {instruction}, State: 128 97 34 56 -1;\nAction: "


def libero_instructions() -> tuple[str, ...]:
    """Return the instructions of LIBERO's five suites, each once, sorted.

    They are read off the file names of the installed `hf-libero`, as LIBERO itself does:
    `KITCHEN_SCENE3_turn_on_the_stove.bddl` is "turn on the stove".

    Raises:
        SetupError: LIBERO or its task files are not installed.
    """
    found = importlib.util.find_spec("libero")
    roots = [Path(root) for root in (found.submodule_search_locations or [])] if found else []
    instructions = {
        _instruction(path.stem)
        for root in roots
        for suite in LIBERO_SUITES
        for path in (root / "libero" / "bddl_files" / suite).glob("*.bddl")
    }
    if not instructions:
        got = f"no *.bddl file under {roots[0] / 'libero' / 'bddl_files'}" if roots else "no package 'libero'"
        raise SetupError(
            f"the demo tokenizer learns from LIBERO's instructions: got {got}, expected the task files of "
            "hf-libero; run pip install 'lerobot_policy_attn[eval]'"
        )
    return tuple(sorted(instructions))


def train_tokenizer(instructions: Sequence[str]) -> Tokenizer:
    """Train the tokenizer on instructions in Pi0.5's prompt; the same instructions give the same tokenizer.

    Args:
        instructions: e.g. `["turn on the stove", …]`; their words become single pieces: `▁turn`, `▁on`, …

    Returns:
        A tokenizer whose `decode(encode(text).ids)` is `text` for every text without a "▁" of its own.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    blank_is_piece = normalizers.Replace(" ", _BLANK)
    cut = pre_tokenizers.Sequence(
        [
            # Digits, the newline and punctuation alone, so that no state value hides in a longer piece.
            pre_tokenizers.Split(Regex(rf"[0-9]|[^\p{{L}}0-9{_BLANK}]"), behavior="isolated"),
            pre_tokenizers.Split(_BLANK, behavior="merged_with_next"),
        ]
    )
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = blank_is_piece, cut
    printable = [chr(code) for code in range(0x21, 0x7F)]
    # No limit on the vocabulary: merging ends by itself when every word is one piece.
    alphabet = [*printable, "\n", _BLANK]
    trainer = BpeTrainer(vocab_size=1_000_000, show_progress=False, initial_alphabet=alphabet)
    prompts = [_SCAFFOLD.format(instruction=text) for text in sorted(instructions)]
    learner.train_from_iterator(prompts, trainer)

    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    pieces = [*_SPECIAL_TOKENS, *_BYTE_TOKENS, *(piece for piece, _ in learned)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=_merges(learner),
            unk_token=UNK,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank_is_piece, cut
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, _SPECIAL_TOKENS.index(BOS))]
    )
    return tokenizer


@cache
def demo_tokenizer_json() -> str:
    """Return the tokenizer of the installed LIBERO's instructions as one JSON text.

    Raises:
        SetupError: LIBERO is not installed.
    """
    return train_tokenizer(libero_instructions()).to_str()


def vocab_size(tokenizer_json: str) -> int:
    """Return the number of token ids of a tokenizer given as JSON text."""
    from tokenizers import Tokenizer

    return int(Tokenizer.from_str(tokenizer_json).get_vocab_size(with_added_tokens=True))


def transformers_tokenizer(tokenizer_json: str) -> PreTrainedTokenizerFast:
    """Return the JSON text as the tokenizer that LeRobot's processor steps call, padding on the right."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json),
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _instruction(stem: str) -> str:
    """Return "turn on the stove" of `KITCHEN_SCENE3_turn_on_the_stove` or of `turn_on_the_stove`."""
    words = stem.split("_")
    if stem[0].isupper():
        scene = next(index for index, word in enumerate(words) if word.startswith("SCENE"))
        words = words[scene + 1 :]
    return " ".join(words)


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    """Return the learned merges in order; tokenizers shows them only in its JSON."""
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
