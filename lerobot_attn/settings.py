"""Settings of commands: dataclasses filled from YAML and from the command line. Knows none of them."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lerobot_attn.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_LONGEST_RANGE = 1_000_000  # a slip of the finger must not fill the memory


class Renaming(type):
    """Metaclass of settings whose fields had other names: the old ones are still taken, with a warning.

    A class that uses it maps old names to new ones in `renamed`; its subclasses inherit that.
    """

    def __call__(cls, *args: Any, **options: Any) -> Any:
        """Make an instance; a field's former name stands for its new one, and wins if both are given."""
        renamed: Mapping[str, str] = getattr(cls, "renamed", {})
        for old in [name for name in options if name in renamed]:
            message = f"{cls.__name__}: {old} is now called {renamed[old]}; the old name is deprecated"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            options[renamed[old]] = options.pop(old)
        return super().__call__(*args, **options)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that maps names of settings to values; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, no YAML, or not a mapping.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"{path}: cannot read the settings ({reason}); expected a YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got a {type(values).__name__}, expected a mapping of settings to values")
    return values


def from_mapping[T: DataclassInstance](cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Build a dataclass of settings.

    Args:
        cls: the dataclass; its `__post_init__` checks the values.
        values: by field name; former names of fields are taken too, so old files stay good.
        where: what an error calls their source.

    Raises:
        ConfigError: an unknown name, or what the dataclass itself refuses.
    """
    values = in_new_names(cls, values)
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; expected one of {', '.join(known)}")
    return cls(**values)


def in_new_names(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with each former name of a field replaced by its new one, see `Renaming`."""
    renamed: Mapping[str, str] = getattr(cls, "renamed", {})
    return {renamed.get(name, name): value for name, value in values.items()}


def load_settings[T: DataclassInstance](cls: type[T], file: str | Path | None = None, **options: Any) -> T:
    """Build settings from a YAML file, then options on top; options that are None were not given.

    Raises:
        ConfigError: a bad file, an unknown name or a bad value.
    """
    values = {} if file is None else read_mapping(file)
    given = {name: value for name, value in options.items() if value is not None}
    values, given = in_new_names(cls, values), in_new_names(cls, given)
    return from_mapping(cls, {**values, **given}, where="settings" if file is None else str(file))


def parse_choice(text: Any) -> Any:
    """Read a choice of labels as people write it: "17", "0,4,9", "0-3", "0-279:5" (every fifth), "all".

    Anything but a string is returned as it is, so values from YAML pass.

    Raises:
        ConfigError: a list or range that is malformed.
    """
    if not isinstance(text, str):
        return text
    is_list = "," in text or text.strip().startswith("[")
    text = text.strip().strip("[]").strip()
    if not text or not (text[0].isdigit() or text[0] == "-"):
        return text
    values: list[int] = []
    wrong = ConfigError(f"got {text!r}, expected a number, a list as 0,4,9 or a range as 0-3 or 0-9:3")
    for part in text.split(","):
        span, colon, step = part.strip().partition(":")
        first, dash, last = ("", "", "") if span.startswith("-") else span.partition("-")
        try:
            found = range(int(first), int(last) + 1, int(step) if colon else 1) if dash else [int(part)]
        except ValueError:
            raise wrong from None
        if not 0 < len(found) <= _LONGEST_RANGE:
            raise wrong
        values += found
    return values if is_list or len(values) != 1 else values[0]


def check_ranges(settings: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Check that settings are numbers within their limits, both included.

    Raises:
        ConfigError: one is not.
    """
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"{name}: got {value!r}, expected a number from {low} to {high}")


def check_choice(settings: object, name: str, choices: Iterable[str]) -> None:
    """Check that a setting is one of some words.

    Raises:
        ConfigError: it is not.
    """
    value, words = getattr(settings, name), list(choices)
    if value not in words:
        raise ConfigError(f"{name}: got {value!r}, expected one of {', '.join(words)}")


def check_flag(settings: object, name: str) -> None:
    """Check that a field is true or false.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(getattr(settings, name), bool):
        raise ConfigError(f"{name}: got {getattr(settings, name)!r}, expected true or false")


def check_numbers(name: str, value: Any, word: str) -> Any:
    """Return a list of whole numbers as a tuple, one number as a tuple of it, and a word as it is.

    Raises:
        ConfigError: the value is something else.
    """
    if isinstance(value, str) and value == word:
        return value
    values = (value,) if is_number(value) else value
    if isinstance(values, str) or not hasattr(values, "__iter__") or not all(map(is_number, values)):
        raise ConfigError(f"{name}: got {value!r}, expected {word!r}, a number, a list or a range as '0-9'")
    return tuple(operator.index(item) for item in values)


def check_one_map(name: str, value: Any, words: tuple[str, ...]) -> None:
    """Check that a choice is one number or one of some words.

    Raises:
        ConfigError: it is something else.
    """
    if value in words if isinstance(value, str) else is_number(value):
        return
    expected = f"{', '.join(['one number', *map(repr, words[:-1])])} or {words[-1]!r}"
    raise ConfigError(f"{name}: got {value!r}, expected {expected}: one map is shown at a time")


def is_number(value: Any) -> bool:
    """Return whether a value is a whole number, numpy's included."""
    # Numpy's arrays have an index method too, which most refuse.
    return hasattr(value, "__index__") and not hasattr(value, "__iter__") and not isinstance(value, bool)
