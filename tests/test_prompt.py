"""Pieces of prompts, decoded from token ids."""

import numpy as np
import pytest

from lerobot_attn.layout import Kind
from lerobot_attn.prompt import PieceDecoder, TextSpan, label_text


class Bytes:
    """A tokenizer of single UTF-8 bytes, and of one word with its blank (id 256)."""

    def decode(self, token_ids, **kwargs):
        data = b"".join(b" bowl" if i == 256 else bytes([i]) for i in token_ids)
        return data.decode("utf-8", errors="replace").removeprefix(" ")


class Pairs:
    """A tokenizer of runs of bytes that may end inside a character: id i is the i-th run."""

    runs = (b"a\xe2", b"\x82\xac\xe2\x82", b"\xac", b"b", b"\xff")

    def decode(self, token_ids, **kwargs):
        return b"".join(self.runs[i] for i in token_ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    "text", ["abc", "naïve café", "抓住红色方块", "🥣🍲", "التقط الوعاء", "a🥣b", "é" * 20]
)
def test_characters_that_are_several_tokens_are_decoded_together(text):
    ids = list(text.encode())
    pieces = PieceDecoder(Bytes()).pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


def test_blanks_stay_and_broken_bytes_are_shown():
    assert PieceDecoder(Bytes()).pieces([256, 256]) == [" bowl", " bowl"]
    assert PieceDecoder(Bytes()).pieces([97, 0xE2, 98]) == ["a", "\ufffd", "b"]
    assert PieceDecoder(Bytes()).pieces([0xE2]) == ["\ufffd"]


def test_tokens_that_end_inside_a_character():
    assert PieceDecoder(Pairs()).pieces([0, 1, 2, 3]) == ["a€€", "", "", "b"]
    assert PieceDecoder(Pairs()).pieces([4, 3]) == ["\ufffd", "b"]


def test_every_token_of_a_word_is_the_words():
    text = "抓 碗"
    ids = list(text.encode())
    pieces = PieceDecoder(Bytes()).pieces(ids)
    spans = [TextSpan(Kind.TASK, 0, 1, 0), TextSpan(Kind.TASK, 2, 3, 1)]
    labels = label_text(pieces, np.ones(len(ids), bool), spans)
    assert labels.word.tolist() == [0, 0, 0, -1, 1, 1, 1]
    assert labels.kind.tolist() == [Kind.TASK] * 3 + [Kind.TEMPLATE] + [Kind.TASK] * 3


def test_label_text_merges_tokens_of_a_word_and_of_a_number():
    pieces = [
        "<bos>",
        "Task",
        ":",
        " pi",
        "ck",
        " up",
        ",",
        " State",
        ":",
        " ",
        "1",
        "2",
        " ",
        "7",
        ";",
        "",
        "",
    ]
    mask = np.array([True] * 15 + [False] * 2)
    prompt = "".join(pieces[:15])
    spans = [
        TextSpan(Kind.TASK, prompt.index("pick"), prompt.index("pick") + 4, 0),
        TextSpan(Kind.TASK, prompt.index("up"), prompt.index("up") + 2, 1),
        TextSpan(Kind.STATE, prompt.index("12"), prompt.index("12") + 2, 0),
        TextSpan(Kind.STATE, prompt.index("7"), prompt.index("7") + 1, 1),
    ]
    labels = label_text(pieces, mask, spans)
    assert labels.word.tolist() == [-1, -1, -1, 0, 0, 1] + [-1] * 11
    assert labels.state_dim.tolist() == [-1] * 10 + [0, 0, -1, 1, -1, -1, -1]
    assert labels.kind.tolist() == [4, 4, 4, 2, 2, 2, 4, 4, 4, 4, 3, 3, 4, 3, 4, 0, 0]


def test_label_text_without_spans_is_plain_text():
    labels = label_text(["a", "b", ""], np.array([True, True, False]), None)
    assert labels.kind.tolist() == [Kind.TEXT, Kind.TEXT, Kind.PADDING]
