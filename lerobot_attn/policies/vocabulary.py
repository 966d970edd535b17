"""A tokenizer's words: how a word is spelt in tokens, and which other words there are.

Reads the tokenizer that a checkpoint's preprocessor names, without LeRobot. Knows no weights.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lerobot_attn.errors import ConfigError, SetupError, first_line
from lerobot_attn.policies.weights import Checkpoint, find_file, read_json
from lerobot_attn.prompt import PieceDecoder

_PREPROCESSOR, _TOKENIZER = "policy_preprocessor.json", "tokenizer.json"
_BLANKS = "▁Ġ "  # what tokenizers write for a blank that opens a piece
# What LeRobot's code names for checkpoints that have no preprocessor's file.
_OF_TYPE = dict.fromkeys(("pi0", "pi05", "pi0_fast"), "google/paligemma-3b-pt-224")


class Vocabulary:
    """The words of a tokenizer, which is built when they are first asked for: that takes seconds.

    Args:
        tokenizer: the text of a `tokenizer.json`.
        where: what an error calls it.

    Attributes:
        digest: of that text.

    Whatever asks for words raises a `ConfigError` where it is no tokenizer, and a `SetupError` where the
    package that reads it is not installed.
    """

    def __init__(self, tokenizer: str, where: str | Path):
        self._text, self._where = tokenizer, where
        self.digest = hashlib.sha256(tokenizer.encode()).hexdigest()
        self._decoder = PieceDecoder(self)

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise SetupError(
                "tokenizers is not installed, which reads a policy's words; pip install "
                "'lerobot_policy_attn[eval]'"
            ) from error
        try:
            return Tokenizer.from_str(self._text)
        except Exception as error:  # the package raises no kind of its own
            raise ConfigError(f"{self._where}: got no tokenizer ({first_line(error)})") from error

    def decode(self, token_ids: list[int], **_: object) -> str:
        """Return the text of token ids, special tokens too."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token by itself, with the blanks it stands for, e.g. `[" high", …]`.

        A token that is a part of a character, and no text, has the tokenizer's own name, e.g. "<0xE3>".
        """
        found = [self._decoder.pieces([token])[0] for token in token_ids]
        return [
            self._tokenizer.id_to_token(token) or "" if "\ufffd" in piece else piece
            for token, piece in zip(token_ids, found, strict=True)
        ]

    @cached_property
    def words(self) -> dict[str, tuple[int, ...]]:
        """Words of a to z, folded, that are single tokens → these tokens, e.g. "high" → " high", "High"."""
        found: dict[str, list[int]] = defaultdict(list)
        pieces: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        for piece, token in sorted(pieces.items(), key=lambda item: item[1]):
            word = piece.lstrip(_BLANKS)
            if len(word) > 1 and word.isascii() and word.isalpha():
                found[word.casefold()].append(token)
        return {word: tuple(tokens) for word, tokens in found.items()}

    def spellings(self, word: str) -> tuple[tuple[int, ...], ...]:
        """Return the ways in which a word is written in tokens.

        Upper and lower case and a leading blank make no difference: every single token that is the word is
        one way. A word that is no single token has one way, the tokens of it behind a blank.

        Raises:
            ConfigError: it is empty, or the tokenizer cannot write it.
        """
        wanted = fold(word)
        single = set(self.words.get(wanted, ()))
        for form in {word.strip(), wanted, wanted.capitalize(), wanted.upper()}:
            single |= {ids[0] for ids in map(self._encode, (form, f" {form}")) if len(ids) == 1}
        single = {token for token in single if fold(self.pieces([token])[0]) == wanted}
        if wanted and single:
            return tuple((token,) for token in sorted(single))
        tokens = self._encode(f" {word.strip()}")
        if not wanted or fold("".join(self._decoder.pieces(tokens))) != wanted:
            raise ConfigError(
                f"--words: {word!r} is no sequence of the tokenizer's tokens; expected a word of its language"
            )
        return (tuple(token for token in tokens if self.pieces([token])[0] != " "),)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def fold(text: str) -> str:
    """Return a word as it is compared: without blanks around it, upper and lower case alike."""
    return text.strip().casefold()


def read_vocabulary(checkpoint: Checkpoint, tokenizer: str | Path | None = None) -> Vocabulary:
    """Return the vocabulary of a checkpoint's language model.

    Args:
        checkpoint: its preprocessor holds the tokenizer or says its name.
        tokenizer: a `tokenizer.json`, a folder that has one, or a name on the Hub, instead of that.

    Raises:
        ConfigError: there is none.
        SetupError: it is on the Hub, and what reads that is not installed.
    """
    if tokenizer is not None and Path(tokenizer).is_file():
        return _read(Path(tokenizer))
    if tokenizer is None:
        here = find_file(checkpoint.place, _TOKENIZER)
        if here is not None:
            return _read(here)
        preprocessor = find_file(checkpoint.place, _PREPROCESSOR)
        steps = [] if preprocessor is None else read_json(preprocessor).get("steps", [])
        settings: list[dict[str, Any]] = [
            step["config"]
            for step in steps
            if isinstance(step, dict) and isinstance(step.get("config"), dict)
        ]
        whole = next((one["tokenizer_json"] for one in settings if one.get("tokenizer_json")), None)
        if whole is not None:
            return Vocabulary(str(whole), checkpoint.place)
        named = next((one["tokenizer_name"] for one in settings if one.get("tokenizer_name")), None)
        fallback = checkpoint.config.get("vlm_model_name") or _OF_TYPE.get(checkpoint.policy_type)
        tokenizer = named or fallback
    remedy = f"name one with --tokenizer: a {_TOKENIZER}, a folder that has it, or a name on the Hub"
    if tokenizer is None:
        raise ConfigError(f"{checkpoint.place}: no tokenizer beside the weights; {remedy}")
    place = Path(tokenizer) if Path(tokenizer).exists() else str(tokenizer)
    try:
        file = find_file(place, _TOKENIZER)
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoint.place}: its tokenizer cannot be had: {first_line(error)}; {remedy}"
        ) from error
    if file is None:
        raise ConfigError(
            f"{checkpoint.place}: its tokenizer {tokenizer} is neither here nor to be had; {remedy}"
        )
    return _read(file)


def _read(file: Path) -> Vocabulary:
    try:
        return Vocabulary(file.read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({first_line(error)})") from error
