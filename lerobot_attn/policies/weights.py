"""A checkpoint's files and weights, read piece by piece: any policy in little memory, without torch.

A safetensors file is eight bytes with the length of its header, the header (JSON: name → dtype, shape, place)
and the numbers, row by row (https://github.com/huggingface/safetensors#format). Reading it by hand needs no
package, maps no file into memory, and also takes bfloat16, which numpy has no type for.

Knows no policy family. Writes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.errors import ConfigError, SetupError, first_line

_BFLOAT16 = "BF16"
_NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", _BFLOAT16: "<u2"}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_BLOCK_BYTES = 32_000_000  # of float32, which is read at once
_CONFIG, _ONE_FILE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"


class Checkpoint(NamedTuple):
    """The files of a checkpoint.

    Attributes:
        config: what its config.json says.
        weights: its safetensors files, one or several.
        place: the folder, or the name on the Hub.
    """

    config: dict[str, Any]
    weights: tuple[Path, ...]
    place: str | Path

    @property
    def policy_type(self) -> str:
        """The policy's type, as its config says it."""
        return str(self.config.get("type", "unknown"))


def find_checkpoint(path: str | Path) -> Checkpoint:
    """Return the files of a checkpoint with whole weights.

    Args:
        path: its folder, or its name on the Hub, from which files are fetched once, into the Hub's own cache.

    Raises:
        ConfigError: there is none, a file is missing or damaged, or it holds a LoRA adapter alone.
        SetupError: it is no folder, and what reads the Hub is not installed.
    """
    place = Path(path) if Path(path).exists() else str(path)
    adapter = find_file(place, _ADAPTER)
    config_file = find_file(place, _CONFIG)
    config = {} if config_file is None else read_json(config_file)
    if adapter is not None or config.get("use_peft"):
        raise ConfigError(
            f"{path}: holds an adapter (LoRA), which is the difference to another checkpoint's weights and "
            "says nothing alone; merge it first (peft's merge_and_unload, then save_pretrained)"
        )
    if config_file is None:
        raise ConfigError(
            f"{path}: no checkpoint of a policy: got no {_CONFIG}, expected a checkpoint's folder (of a "
            "training run its pretrained_model) or its name on the Hub"
        )
    return Checkpoint(config, _weight_files(place), place)


def _weight_files(place: str | Path) -> tuple[Path, ...]:
    index = find_file(place, _INDEX)
    if index is None:
        single = find_file(place, _ONE_FILE)
        if single is None:
            raise ConfigError(f"{place}: got neither {_ONE_FILE} nor {_INDEX}, expected a policy's weights")
        return (single,)
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise ConfigError(f"{index}: got no weight_map, expected tensors and the files that hold them")
    names = sorted(set(mapping.values()))
    # Names come from the file: none may lead out of the checkpoint.
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ConfigError(f"{index}: got {outside[0]!r}, expected names of files beside it")
    found = {name: find_file(place, name) for name in names}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise ConfigError(f"{place}: {missing[0]} is missing, which {_INDEX} names; get the checkpoint again")
    return tuple(file for file in found.values() if file is not None)


def find_file(place: str | Path, name: str) -> Path | None:
    """Return a file of a folder or of a repository on the Hub; None if it has none of that name.

    Raises:
        ConfigError: the folder is a file, or the repository cannot be asked.
        SetupError: what reads the Hub is not installed.
    """
    if isinstance(place, Path):
        if not place.is_dir():
            raise ConfigError(f"{place}: got a file, expected a folder, or a name on the Hub")
        return place / name if (place / name).is_file() else None
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ModuleNotFoundError as error:
        raise SetupError(
            f"{place}: no such folder, and names on the Hub need huggingface_hub, which is not installed; "
            "pip install 'lerobot_policy_attn[eval]'"
        ) from error
    try:
        return Path(hf_hub_download(place, name))
    except EntryNotFoundError:  # also where the Hub may not be asked, and the cache has no such file
        return None
    except Exception as error:  # no such repository, a private one, no network: many kinds
        raise ConfigError(
            f"{place}: got neither a folder nor a repository on the Hub ({first_line(error)}); expected the "
            "one or the other"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ConfigError: it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)}); get the file again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: got a {type(found).__name__}, expected a JSON object; get the file again")
    return found


class _Tensor(NamedTuple):
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first number in the file, bytes


class Weights:
    """The tensors of safetensors files, of which rows are read when they are asked for, as float32.

    Args:
        files: as `Checkpoint.weights`.

    Raises:
        ConfigError: a file is none of the format, or shorter than its header says.
    """

    def __init__(self, files: Sequence[Path]):
        self._tensors: dict[str, _Tensor] = {}
        for file in files:
            self._tensors |= _read_header(file)

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._tensors[name].shape

    def whole(self, name: str) -> NDArray[np.float32]:
        """Return all of a tensor: float32, of its shape."""
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows `start … stop - 1` of a tensor: (row, column) float32; a vector has one column."""
        tensor = self._tensors[name]
        width = math.prod(tensor.shape[1:])
        with tensor.file.open("rb") as file:
            return _read(file, tensor, start * width, (stop - start) * width).reshape(stop - start, width)

    def chosen_rows(self, name: str, indices: Sequence[int]) -> NDArray[np.float32]:
        """Return single rows of a tensor: (index, column) float32, in the order of the indices."""
        tensor = self._tensors[name]
        width = math.prod(tensor.shape[1:])
        found = np.empty((len(indices), width), np.float32)
        with tensor.file.open("rb") as file:
            for place, index in enumerate(indices):
                found[place] = _read(file, tensor, int(index) * width, width)
        return found

    def blocks(self, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield a tensor in turns: the number of the first row, and (row, column) float32."""
        n_rows, n_each = self.shape(name)[0], self._rows_at_once(name)
        for start in range(0, n_rows, n_each):
            yield start, self.rows(name, start, min(start + n_each, n_rows))

    def n_blocks(self, name: str) -> int:
        """Return how many turns `blocks` takes."""
        return -(-self.shape(name)[0] // self._rows_at_once(name))

    def _rows_at_once(self, name: str) -> int:
        return max(1, _BLOCK_BYTES // (4 * math.prod(self.shape(name)[1:])))


def _read(file: Any, tensor: _Tensor, first: int, count: int) -> NDArray[np.float32]:
    """Return numbers of a tensor, float32."""
    dtype = np.dtype(_NUMBERS[tensor.dtype])
    file.seek(tensor.offset + first * dtype.itemsize)
    found = np.fromfile(file, dtype, count)
    if len(found) != count:
        raise ConfigError(f"{tensor.file}: ends before its numbers do; get the file again")
    if tensor.dtype == _BFLOAT16:  # the upper half of a float32
        return (found.astype(np.uint32) << 16).view(np.float32)
    return found.astype(np.float32, copy=False)


def _read_header(file: Path) -> dict[str, _Tensor]:
    wrong = ConfigError(f"{file}: no whole safetensors file: got another header; get the file again")
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise wrong
            header = json.loads(opened.read(length))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise wrong from error
    found = {}
    try:
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] not in _NUMBERS:
                continue  # whole numbers and the like are no weights
            begin, end = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            n_bytes = math.prod(shape) * np.dtype(_NUMBERS[entry["dtype"]]).itemsize
            if not (begin >= 0 and end - begin == n_bytes and 8 + length + end <= size):
                raise ConfigError(f"{file}: shorter than its header says at {name}; get the file again")
            found[name] = _Tensor(file, entry["dtype"], shape, 8 + length + begin)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise wrong from error
    return found
