#!/usr/bin/env python
"""Neurons that say words, at Pi0.5's full size: what `lerobot-attn neurons words` costs without a GPU.

    python benchmarks/neuron_words.py [--runs 3]        # a few minutes on two cores, 2.3 GB of disk

A checkpoint with PaliGemma's language model alone is written layer by layer to a temporary folder, and
deleted afterwards: 18 layers of 16384 neurons, 2048 wide, 257152 tokens, random weights in bfloat16, in which
one neuron is planted for each word. The command runs in a process of its own, which has found nothing before:
six words, 20 neurons each, beside 100 random words. A second call takes what the first one kept. A process's
peak of resident memory is the system's own count. The vocabulary is made up: words of letters in six
spellings each, as frequent words have them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import arguments, finish, machine, median

WORDS = ("high", "low", "up", "down", "fast", "slow")
AT_MOST_MB = 2000.0
PREFIX = "model.paligemma_with_expert.paligemma."


class Sizes(NamedTuple):
    """Sizes of a language model."""

    n_layers: int
    n_units: int
    width: int
    n_tokens: int


FULL, QUICK = Sizes(18, 16384, 2048, 257152), Sizes(3, 256, 64, 2000)


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return name → shape of the tensors that are read."""
    text = f"{PREFIX}model.language_model."
    down = {
        f"{text}layers.{layer}.mlp.down_proj.weight": (sizes.width, sizes.n_units)
        for layer in range(sizes.n_layers)
    }
    return {
        **down,
        f"{text}norm.weight": (sizes.width,),
        f"{PREFIX}lm_head.weight": (sizes.n_tokens, sizes.width),
    }


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Return float32 numbers cut to bfloat16: uint16."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_checkpoint(folder: Path, sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Write random weights and a vocabulary; return word → (layer, unit) of the neuron planted for it."""
    tokens = vocabulary(sizes.n_tokens)
    planted = {word: ((3 * place + 1) % sizes.n_layers, 11 * place + 5) for place, word in enumerate(WORDS)}
    said = dict(zip(WORDS, np.random.default_rng(1).normal(size=(len(WORDS), sizes.width)), strict=True))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes(sizes).items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes(sizes).items():
            if len(shape) == 1:  # the norm's weight: 1 + 0
                file.write(bfloat16(np.zeros(shape)).tobytes())
                continue
            layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None
            random = np.random.default_rng(100 if layer is None else layer)
            n_each = max(1, 16_000_000 // shape[1])
            for start in range(0, shape[0], n_each):
                rows = random.standard_normal((min(n_each, shape[0] - start), shape[1]), np.float32)
                stop = start + len(rows)
                if layer is None:
                    for word, vector in said.items():
                        token = tokens[f" {word}"]
                        if start <= token < stop:
                            rows[token - start] = vector
                else:
                    for word, (of_layer, unit) in planted.items():
                        if of_layer == layer:
                            rows[:, unit] = said[word][start:stop]
                file.write(bfloat16(rows).tobytes())
    (folder / "config.json").write_text(json.dumps({"type": "pi05"}))
    write_tokenizer(folder / "tokenizer.json", tokens)
    return planted


def vocabulary(n_tokens: int) -> dict[str, int]:
    """Return piece → token: words of letters in six spellings each, first those that are looked for."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces: dict[str, int] = {}
    number = 0
    while len(pieces) < n_tokens:
        made = "".join(letters[number // 26**power % 26] for power in (3, 2, 1, 0)) + "q"
        word = WORDS[number] if number < len(WORDS) else made
        for form in (word, word.capitalize(), word.upper()):
            for blank in ("", " "):
                if len(pieces) < n_tokens:
                    pieces[blank + form] = len(pieces)
        number += 1
    return pieces


def write_tokenizer(file: Path, tokens: dict[str, int]) -> None:
    """Write a tokenizer of these pieces, "▁" for blanks as PaliGemma's."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {piece.replace(" ", "▁"): token for piece, token in tokens.items()}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.save(str(file))


class Cost(NamedTuple):
    """What a process has used.

    Attributes:
        seconds: from its start to its end.
        core_seconds: that it has had of all cores, however busy others keep them.
        peak_mb: its most resident memory, MB.
    """

    seconds: float
    core_seconds: float
    peak_mb: float


def command(folder: Path, cache: Path) -> Cost:
    """Run the command in a process of its own."""
    words = ["neurons", "words", str(folder), "--words", ",".join(WORDS), "-o", str(folder / "words.csv")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "lerobot_attn.cli", *words], env=environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the command ended with status {os.waitstatus_to_exitcode(status)}")
    seconds = time.perf_counter() - start
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def check(folder: Path, planted: dict[str, tuple[int, int]]) -> None:
    """Check that each word's planted neuron was found first.

    Raises:
        SystemExit: one was not.
    """
    import pandas as pd

    first = pd.read_csv(folder / "words.csv").query("rank == 1").set_index("word")
    for word, neuron in planted.items():
        if tuple(first.loc[word, ["layer", "unit"]]) != neuron:
            raise SystemExit(f"{word}: got {tuple(first.loc[word, ['layer', 'unit']])}, expected {neuron}")


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    parsed = arguments(__doc__)
    before = machine()
    sizes = QUICK if parsed.quick else FULL
    first: list[Cost] = []
    again: list[Cost] = []
    with tempfile.TemporaryDirectory(prefix="neuron_words_") as name:
        folder = Path(name)
        planted = write_checkpoint(folder, sizes)
        n_bytes = (folder / "model.safetensors").stat().st_size
        for run in range(parsed.runs):
            cache = folder / f"cache_{run}"
            first.append(command(folder, cache))
            check(folder, planted)
            again.append(command(folder, cache))
    what = f"neurons words, {len(WORDS)} words among {sizes.n_layers} × {sizes.n_units} neurons"
    results = [
        median(
            f"{what}: peak memory of the process",
            [cost.peak_mb for cost in first],
            "MB",
            at_most=AT_MOST_MB,
            headline=True,
        ),
        median(f"{what}: time of a core", [cost.core_seconds for cost in first], "s", headline=True),
        median(
            f"{what}: time of a core when asked again, from the cache",
            [cost.core_seconds for cost in again],
            "s",
        ),
    ]
    how = (
        f"random bfloat16 weights of PaliGemma's language model ({sizes.width} wide, {sizes.n_tokens} "
        f"tokens, {n_bytes / 1e9:.2f} GB), 20 neurons a word, 100 random words, a process of its own each "
        "time, files in the system's cache; each word's planted neuron was found first"
    )
    costs = {"first": [cost._asdict() for cost in first], "again": [cost._asdict() for cost in again]}
    details = {**costs, "bytes": n_bytes}
    return finish("neuron_words", results, parsed, how=how, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
