#!/usr/bin/env python
"""Compress attention maps in some forty ways on one core, and say which one wins.

    python benchmarks/codecs.py [--runs 5] [--quick] [--json FILE]

The data are ten denoise steps of one layer: (denoise_step, head, query, key), float16. A way to store them
has three parts: what is done to the numbers first (nothing, differences, rounding), how they are cut into
chunks and in which order a chunk's axes lie, and the compressor. Each is timed there and back, all three
parts together, in seconds of that core, and must give back what went in, or stay within its error bound.
Sizes are of four kinds of data, times of the first one.

To win, a way must lose nothing, be readable by any Zarr v3 reader (regular chunks, and no codecs but
transpose, bytes, blosc, zstd, gzip), read one map alone, and reach 150 MB/s of float16 a core. Of those,
the one with the fewest bytes over the four kinds of data wins.

Ways that need pcodec or zfpy are skipped where those are not installed. Longer than 450 lines because each
way is written out beside the others that it is compared with.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs
import numpy as np
import zarr
from common import (
    Result,
    arguments,
    finish,
    in_turns,
    machine,
    median,
    pin_to_one_core,
    ratio,
    stored_codec,
)
from made_up import MadeUpEpisode
from numcodecs.abc import Codec
from numcodecs.bitround import BitRound
from numcodecs.compat import ensure_ndarray
from rich.console import Console
from rich.table import Table

from lerobot_attn.synthetic import SyntheticPlan

FLOOR_MB_PER_S = 150.0
SMALLEST_NORMAL = 2.0**-14  # of float16
AXES = STEP, HEAD, QUERY, KEY = range(4)
SHUFFLES = {0: "no shuffle", 1: "byte shuffle", 2: "bit shuffle"}
# numcodecs 0.17.1 cannot read the version of zfpy 1.0.1.post0, and then cannot be imported at all.
PACKAGES = {"pcodec": "pcodec", "zfpy": "zfpy==1.0.1"}
DATA = ("float32", "bfloat16", "float32, flat", "float32, very peaked")  # times are of the first
HOW = (
    "Ten denoise steps of one layer of made-up softmax maps (MadeUpEpisode in benchmarks/made_up.py), "
    "float16, one core, in turns. Times of peaked maps of a float32 policy; sizes of those, of a bfloat16 "
    "policy's, and of flat and very peaked ones."
)


class Order(NamedTuple):
    """How maps are cut and laid down.

    Attributes:
        name: as the table has it.
        split: axes along which each index is a chunk of its own.
        within: the other axes, slowest first.
    """

    name: str
    split: tuple[int, ...]
    within: tuple[int, ...]

    def cut(self, maps: np.ndarray) -> list[np.ndarray]:
        """Return the chunks, contiguous."""
        turned = maps.transpose(self.split + self.within)
        shape = turned.shape[len(self.split) :]
        return [
            np.ascontiguousarray(turned[index]).reshape(shape)
            for index in np.ndindex(turned.shape[: len(self.split)])
        ]

    def join(self, chunks: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """Return the maps, of a shape by (denoise_step, head, query, key)."""
        axes = self.split + self.within
        stacked = np.stack([chunk.reshape(-1) for chunk in chunks]).reshape([shape[axis] for axis in axes])
        return np.ascontiguousarray(stacked.transpose(np.argsort(axes)))


MAP = Order("map (head, query, key)", (STEP,), (HEAD, QUERY, KEY))
MAP_BY_KEY = Order("map (head, key, query)", (STEP,), (HEAD, KEY, QUERY))
MAP_KEY_HEAD = Order("map (key, head, query)", (STEP,), (KEY, HEAD, QUERY))
MAP_KEY_QUERY = Order("map (key, query, head)", (STEP,), (KEY, QUERY, HEAD))
STEPS = Order("10 steps (step, head, query, key)", (), (STEP, HEAD, QUERY, KEY))
STEPS_LAST = Order("10 steps (head, key, query, step)", (), (HEAD, KEY, QUERY, STEP))
STEPS_OF_HEAD = Order("10 steps of a head (key, query, step)", (HEAD,), (KEY, QUERY, STEP))
ORDERS = (MAP, MAP_BY_KEY, MAP_KEY_HEAD, MAP_KEY_QUERY, STEPS, STEPS_LAST, STEPS_OF_HEAD)


class Change(NamedTuple):
    """What is done to the numbers before they are cut.

    Attributes:
        name: as the table has it.
        do: float16 maps → numbers of 16 bits.
        undo: (those numbers as uint16, the original) → float16 maps. Of the original it may use the shape and
            which keys are masked; a store would have to say both elsewhere.
        needs_step_before: whether a map can only be read after those of the earlier denoise steps.
    """

    name: str
    do: Callable[[np.ndarray], np.ndarray]
    undo: Callable[[np.ndarray, np.ndarray], np.ndarray]
    needs_step_before: bool = False


def difference(axis: int, name: str) -> Change:
    """Return differences of the bit patterns along an axis, small ones of either sign as small numbers."""

    def do(maps: np.ndarray) -> np.ndarray:
        bits = maps.view(np.int16)
        first = np.take(bits, [0], axis=axis)
        steps = np.concatenate([first, np.diff(bits, axis=axis)], axis=axis)
        return ((steps << 1) ^ (steps >> 15)).view(np.uint16)

    def undo(stored: np.ndarray, original: np.ndarray) -> np.ndarray:
        steps = (stored >> 1).view(np.int16) ^ -(stored & 1).view(np.int16)
        return np.cumsum(steps, axis=axis, dtype=np.int16).view(np.float16)

    return Change(name, do, undo, needs_step_before=axis == STEP)


def _xor(maps: np.ndarray) -> np.ndarray:
    bits = maps.view(np.uint16)
    return np.concatenate([bits[:1], bits[1:] ^ bits[:-1]])


def _undo_xor(stored: np.ndarray, original: np.ndarray) -> np.ndarray:
    return np.bitwise_xor.accumulate(stored, axis=STEP).view(np.float16)


def seen(maps: np.ndarray) -> np.ndarray:
    """Return which keys are not masked: (key,) bool."""
    found: np.ndarray = maps.any(axis=(STEP, HEAD, QUERY))
    return found


def _drop_masked(maps: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(maps[..., seen(maps)])


def _put_masked_back(stored: np.ndarray, original: np.ndarray) -> np.ndarray:
    maps = np.zeros_like(original)
    maps[..., seen(original)] = stored.view(np.float16)
    return maps


def rounding(keep_bits: int) -> Change:
    """Return rounding to fewer mantissa bits."""
    codec = BitRound(keepbits=keep_bits)
    return Change(
        f"{keep_bits} bits of mantissa",
        lambda maps: codec.encode(maps).reshape(maps.shape),
        lambda stored, original: stored.view(np.float16),
    )


STEP_DIFFERENCE = difference(STEP, "difference from the step before")
QUERY_DIFFERENCE = difference(QUERY, "difference from the query before")
STEP_XOR = Change("XOR with the step before", _xor, _undo_xor, needs_step_before=True)
UNMASKED = Change("without masked keys", _drop_masked, _put_masked_back)


class Zfp(Codec):  # type: ignore[misc]
    """zfp of float32, which is the smallest type that it takes; without a tolerance it is reversible.

    numcodecs has zfp as well, but not its reversible mode.
    """

    codec_id = "zfp_of_float32"

    def __init__(self, tolerance: float = -1):
        self.tolerance = tolerance

    def encode(self, buf: np.ndarray) -> bytes:
        """Compress float16."""
        import zfpy

        packed: bytes = zfpy.compress_numpy(buf.astype(np.float32), tolerance=self.tolerance)
        return packed

    def decode(self, buf: bytes, out: None = None) -> np.ndarray:
        """Return float16."""
        import zfpy

        values: np.ndarray = zfpy.decompress_numpy(buf).astype(np.float16)
        return values


@dataclass(frozen=True)
class Way:
    """One way to store maps.

    Attributes:
        compressor: its name.
        codec: compresses a chunk.
        order: how maps are cut.
        change: what is done to the numbers first.
        is_core: whether any Zarr v3 reader reads it.
        relative: largest relative error; values below float16's normal ones have that of the smallest normal.
        absolute: largest absolute error beside that.
    """

    compressor: str
    codec: Codec
    order: Order = MAP
    change: Change | None = None
    is_core: bool = True
    relative: float = 0
    absolute: float = 0

    @property
    def name(self) -> str:
        """Say what it is, in the order in which it is done."""
        return ", ".join([*([self.change.name] if self.change else []), self.order.name, self.compressor])

    @property
    def is_lossless(self) -> bool:
        """Whether every bit comes back."""
        return not (self.relative or self.absolute)

    @property
    def reads_one_map(self) -> bool:
        """Whether a map can be read without those of other denoise steps."""
        return STEP in self.order.split and not (self.change and self.change.needs_step_before)

    def pack(self, maps: np.ndarray) -> list[Any]:
        """Return the compressed chunks."""
        changed = self.change.do(maps) if self.change else maps
        return [self.codec.encode(chunk) for chunk in self.order.cut(changed)]

    def unpack(self, chunks: Sequence[Any], original: np.ndarray) -> np.ndarray:
        """Return the maps; of the original only the shape and the masked keys are used."""
        n_keys = np.count_nonzero(seen(original)) if self.change is UNMASKED else original.shape[KEY]
        stored = self.order.join(
            [ensure_ndarray(self.codec.decode(chunk)).view(np.uint16) for chunk in chunks],
            (*original.shape[:KEY], n_keys),
        )
        return self.change.undo(stored, original) if self.change else stored.view(np.float16)

    def checked_bytes(self, maps: np.ndarray) -> int:
        """Return the compressed size, after a look at what comes back.

        Raises:
            RuntimeError: it is not what went in, or further from it than the error bound.
        """
        packed = self.pack(maps)
        found = self.unpack(packed, maps)
        if self.is_lossless:
            is_fine = np.array_equal(found.view(np.uint16), maps.view(np.uint16))
        else:
            original = maps.astype(np.float32)
            bound = self.relative * np.maximum(original, SMALLEST_NORMAL) + self.absolute
            is_fine = bool((np.abs(found.astype(np.float32) - original) <= bound).all())
        if not is_fine:
            raise RuntimeError(f"{self.name}: gives back other numbers than went in, beyond its error bound")
        return sum(memoryview(chunk).nbytes for chunk in packed)


def blosc(compressor: str, level: int, shuffle: int = 2, **rest: Any) -> Way:
    """Return a way that compresses with Blosc."""
    name = f"{compressor} {level}, {SHUFFLES[shuffle]}"
    return Way(name, numcodecs.Blosc(compressor, level, shuffle), **rest)


def ways() -> Iterable[Way]:
    """Yield what is tried, as far as it is installed."""
    for order in ORDERS:
        yield blosc("zstd", 1, order=order)
        yield blosc("lz4", 1, order=order)
    for order in (MAP, MAP_BY_KEY):
        yield blosc("zstd", 1, 0, order=order)
        yield blosc("zstd", 1, 1, order=order)
        yield blosc("zstd", 3, order=order)
        yield blosc("zstd", 5, order=order)
        yield blosc("lz4", 9, order=order)
        yield blosc("lz4hc", 5, order=order)
        yield blosc("zlib", 1, order=order)
        yield Way("zstd 1 without Blosc", numcodecs.Zstd(1), order)
        yield Way("gzip 1 without Blosc", numcodecs.GZip(1), order)
        for change in (STEP_DIFFERENCE, STEP_XOR, QUERY_DIFFERENCE, UNMASKED):
            yield blosc("zstd", 1, order=order, change=change, is_core=False)
        for keep_bits in (8, 6, 4):
            error = 2.0 ** -(keep_bits + 1)
            yield blosc("zstd", 1, order=order, change=rounding(keep_bits), relative=error)
    if importlib.util.find_spec("pcodec"):
        from numcodecs.pcodec import PCodec

        for order in (MAP, MAP_BY_KEY, STEPS_LAST):
            for level in (2, 8):
                yield Way(f"pcodec {level}", PCodec(level=level), order, is_core=False)
    if importlib.util.find_spec("zfpy"):
        for order in (MAP, STEPS):
            yield Way("zfp, reversible", Zfp(), order, is_core=False)
        # Its result is rounded to float16 once more.
        yield Way("zfp, ±1e-4", Zfp(1e-4), is_core=False, relative=2.0**-11, absolute=1e-4)


@dataclass(frozen=True)
class Measured:
    """What came of a way.

    Attributes:
        way: the way.
        ratios: by kind of data, float16 bytes over compressed bytes.
        bytes: compressed, all kinds of data together.
        pack_s: seconds of each round, there.
        unpack_s: and back.
        mb: float16 megabytes that a round takes.
    """

    way: Way
    ratios: dict[str, float]
    bytes: int
    pack_s: list[float]
    unpack_s: list[float]
    mb: float

    @property
    def pack_mb_per_s(self) -> float:
        """Float16 MB compressed a second, median."""
        return self.mb / statistics.median(self.pack_s)

    @property
    def unpack_mb_per_s(self) -> float:
        """Float16 MB decompressed a second, median."""
        return self.mb / statistics.median(self.unpack_s)

    @property
    def against(self) -> list[str]:
        """Why it cannot win; empty where it can."""
        reasons = {
            "lossy": not self.way.is_lossless,
            "not plain Zarr v3": not self.way.is_core,
            "10 maps read for one": not self.way.reads_one_map,
            f"under {FLOOR_MB_PER_S:.0f} MB/s": self.pack_mb_per_s < FLOOR_MB_PER_S,
        }
        return [reason for reason, holds in reasons.items() if holds]


def kinds_of_data(*, quick: bool) -> dict[str, np.ndarray]:
    """Make ten steps of one layer, (denoise_step, head, query, key) float16, of every kind."""
    sizes = {"n_layers": 1, "layers": (0,)}
    plan = SyntheticPlan(n_frames=1, **sizes) if quick else SyntheticPlan.full_size(n_frames=1, **sizes)
    peaked, flat, very_peaked = (
        MadeUpEpisode(plan, sharpness=sharpness).maps(0) for sharpness in (2.0, 1.0, 3.0)
    )
    made = (peaked, peaked.as_bfloat16(), flat, very_peaked)
    return {
        name: np.ascontiguousarray(maps.as_float16().full[:, 0])
        for name, maps in zip(DATA, made, strict=True)
    }


def find_stored(measured: Iterable[Measured]) -> Measured:
    """Return the way in which the store lays maps down and compresses them, by its own metadata."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "episode.zarr"
        MadeUpEpisode(SyntheticPlan(n_frames=1)).writer(path)
        array = zarr.open_array(path / "suffix_attention", mode="r")
        found = stored_codec(array)
    # The array's last axes are a map's; ours have the denoise step before them.
    within = tuple(axis - array.ndim + len(AXES) for axis in found.order[-len(MAP.within) :])
    for one in measured:
        way = one.way
        is_same_order = (way.order.split, way.order.within, way.change) == ((STEP,), within, None)
        if is_same_order and way.codec == found.blosc:
            return one
    raise ValueError(f"the store's own way is not among those tried: {found}; add it to `ways`")


def measure(data: dict[str, np.ndarray], runs: int) -> list[Measured]:
    """Try every way on every kind of data, and time each there and back on the first."""
    tried = {way.name: way for way in ways()}
    timed = data[DATA[0]]
    packed = {name: way.pack(timed) for name, way in tried.items()}
    gc.freeze()  # `in_turns` collects garbage before each call: not again among all that the imports left
    there = in_turns(
        {name: lambda way=way: way.pack(timed) for name, way in tried.items()}, runs, clock=time.process_time
    )
    back = in_turns(
        {name: lambda way=way, name=name: way.unpack(packed[name], timed) for name, way in tried.items()},
        runs,
        clock=time.process_time,
    )
    measured = []
    for name, way in tried.items():
        sizes = {kind: way.checked_bytes(maps) for kind, maps in data.items()}
        ratios = {kind: maps.nbytes / sizes[kind] for kind, maps in data.items()}
        measured.append(
            Measured(way, ratios, sum(sizes.values()), there[name], back[name], timed.nbytes / 1e6)
        )
    return measured


def show(measured: Sequence[Measured], winner: Measured, stored: Measured) -> None:
    """Print all ways, smallest first."""
    table = Table(title="ways, smallest first", title_justify="left")
    table.add_column("way", overflow="fold")
    for column in (*DATA, "MB/s there", "and back"):
        table.add_column(column, justify="right")
    table.add_column("why not")
    for one in sorted(measured, key=lambda one: one.bytes):
        marks = [word for word, is_it in (("WINS", one is winner), ("stored", one is stored)) if is_it]
        table.add_row(
            one.way.name,
            *(f"{one.ratios[kind]:.2f}×" for kind in DATA),
            f"{one.pack_mb_per_s:.0f}",
            f"{one.unpack_mb_per_s:.0f}",
            ", ".join(marks + one.against) or "larger than the winner",
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def main() -> int:
    """Measure, print and write JSON; exit status 1 where a target is missed."""
    parsed = arguments(__doc__)
    pin_to_one_core()
    before = machine()
    numcodecs.blosc.set_nthreads(1)
    missing = [package for package in PACKAGES if not importlib.util.find_spec(package)]
    for package in missing:
        print(f"{package} is not installed: its ways are skipped (pip install {PACKAGES[package]})")
    data = kinds_of_data(quick=parsed.quick)
    measured = measure(data, parsed.runs)
    stored = find_stored(measured)
    winner = min((one for one in measured if not one.against), key=lambda one: one.bytes, default=stored)
    show(measured, winner, stored)
    of_winner = f"compression: the best of {len(measured)} ways that meets all conditions ({winner.way.name})"
    results = [
        Result(
            f"the store's own way ({stored.way.name}): smaller than float16, peaked maps, float32 policy",
            stored.ratios[DATA[0]],
            "×",
        ),
        median(
            "the same, float16 compressed a second on one core",
            [stored.mb / s for s in stored.pack_s],
            "MB/s",
            at_least=FLOOR_MB_PER_S,
        ),
        Result(
            f"{of_winner}: smaller than the store's own, four kinds of data",
            stored.bytes / winner.bytes,
            "×",
            headline=True,
        ),
        ratio("the same: times as fast as the store's own, compressing", stored.pack_s, winner.pack_s),
    ]
    details = {
        "skipped, not installed": missing,
        "winner": winner.way.name,
        "stored": stored.way.name,
        "ways": [
            {
                "way": one.way.name,
                "times smaller than float16": one.ratios,
                "MB/s there": one.pack_mb_per_s,
                "MB/s back": one.unpack_mb_per_s,
                "largest relative error": one.way.relative,
                "largest absolute error": one.way.absolute,
                "why not": one.against,
            }
            for one in measured
        ],
    }
    return finish("codecs", results, parsed, how=HOW, before=before, details=details)


if __name__ == "__main__":
    sys.exit(main())
