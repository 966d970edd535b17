"""Conditions of a plan that are written once and stand for many: doses, random draws, named sets of units.

    expanded([{"name": "high", "doses": [1, 2], "interventions": [{…, "units": "$high", "value": "$dose"}]}],
             unit_sets({"high": {3: [12, 40]}}))
    → conditions high_dose1 and high_dose2

`$dose` and `$draw` stand for numbers, `$NAME` for the units of that name. Plain values in, plain values out;
knows no intervention.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lerobot_attn.errors import ConfigError, first_line

MOST_CONDITIONS = 1000
_STANDS_FOR = re.compile(r"\$([A-Za-z_]\w*)")
_COLUMNS = ("stream", "layer", "unit")
_SIDES = ("more", "less")

Units = Mapping[int, Sequence[int]]
UnitSets = Mapping[str, Mapping[str | None, Units]]


def expanded(conditions: Sequence[Any], sets: UnitSets) -> list[Any]:
    """Return a plan's conditions with every dose and draw as one of its own.

    A condition with `doses: [1, 2]` becomes NAME_dose1 and NAME_dose2, one with `draws: 5` NAME_draw0 to
    NAME_draw4 (after the dose, where it has both), and each says its `base` (NAME), `dose` and `draw`. A
    control with doses is the control of the condition that has the same dose; one without is the control of
    all of them.

    Args:
        conditions: as a plan lists them; what is no mapping is passed on.
        sets: name → stream → units, see `unit_sets`.

    Raises:
        ConfigError: a dose or a number of draws is none, `$dose`, `$draw` or a name is used and not given, or
            given and not used.
    """
    doses_of = {
        one["name"]: _doses(one, f"conditions[{number}]")
        for number, one in enumerate(conditions)
        if isinstance(one, Mapping) and "doses" in one and isinstance(one.get("name"), str)
    }
    found: list[Any] = []
    for number, one in enumerate(conditions):
        where = f"conditions[{number}]"
        if not isinstance(one, Mapping) or not isinstance(one.get("name"), str):
            found.append(one)
        else:
            found += _expanded(one, f"{where} ({one['name']})", doses_of, sets)
        if len(found) > MOST_CONDITIONS:
            raise ConfigError(f"conditions: got more than {MOST_CONDITIONS} with all doses and draws")
    return found


def _expanded(
    one: Mapping[str, Any], where: str, doses_of: Mapping[str, Sequence[float]], sets: UnitSets
) -> Iterator[dict[str, Any]]:
    rest = {key: value for key, value in one.items() if key not in ("doses", "draws")}
    doses, draws = doses_of.get(one["name"]) if "doses" in one else None, _draws(one, where)
    used = set(_names(one.get("interventions")))
    for name, given in (("dose", doses), ("draw", draws)):
        if (given is not None) != (name in used):
            got = f"${name} and no {name}s" if given is None else f"{name}s and no ${name}"
            raise ConfigError(f"{where}: got {got}, expected both, or neither")
    control_of = one.get("control_of")
    each_dose: Sequence[float | None] = doses or [None]
    for dose in each_dose:
        target = control_of
        if dose is not None and isinstance(control_of, str) and control_of in doses_of:
            if dose not in doses_of[control_of]:
                has = ", ".join(f"{other:g}" for other in doses_of[control_of])
                raise ConfigError(
                    f"{where}: has dose {dose:g}, and {control_of}, whose control it is, has not; expected "
                    f"some of {has}"
                )
            target = dosed(control_of, dose)
        for draw in range(draws) if draws else [None]:
            numbers = {"dose": dose, "draw": draw}
            told = {key: number for key, number in numbers.items() if number is not None}
            name = one["name"] if dose is None else dosed(one["name"], dose)
            values = {**rest, "name": name if draw is None else f"{name}_draw{draw}"}
            if told:
                values |= {"base": one.get("base", one["name"]), **told}
            if target is not None:
                values["control_of"] = target
            if "interventions" in one:
                values["interventions"] = _filled(one["interventions"], told, sets, None, where)
            yield values


def dosed(name: str, dose: float) -> str:
    """Return what a condition is called at a dose."""
    return f"{name}_dose{dose:g}"


def _doses(one: Mapping[str, Any], where: str) -> list[float]:
    doses = one["doses"]
    good = isinstance(doses, Sequence) and not isinstance(doses, str) and len(doses) > 0
    for dose in doses if good else ():
        good &= isinstance(dose, int | float) and not isinstance(dose, bool) and math.isfinite(dose)
    if not good or len({f"{dose:g}" for dose in doses}) < len(doses):
        raise ConfigError(
            f"{where} ({one['name']}): got doses {doses!r}, expected different finite numbers, e.g. [1, 2, 4]"
        )
    return list(doses)


def _draws(one: Mapping[str, Any], where: str) -> int | None:
    draws = one.get("draws")
    if draws is None:
        return None
    if not isinstance(draws, int) or isinstance(draws, bool) or not 1 <= draws <= MOST_CONDITIONS:
        raise ConfigError(f"{where}: got draws {draws!r}, expected how many, e.g. 5")
    return draws


def _names(value: Any) -> Iterator[str]:
    """Yield what is left open in plain values."""
    if isinstance(value, str) and (found := _STANDS_FOR.fullmatch(value)):
        yield found[1]
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _names(one)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            yield from _names(one)


def _filled(value: Any, told: Mapping[str, float], sets: UnitSets, stream: Any, where: str) -> Any:
    """Return plain values with numbers and units in the place of what is left open.

    Args:
        value: plain values.
        told: "dose" and "draw" → their numbers.
        sets: see `unit_sets`.
        stream: of the intervention that the value is a part of, if it says one.
        where: for the error message.
    """
    if isinstance(value, str) and (found := _STANDS_FOR.fullmatch(value)):
        name = found[1]
        if name in told:
            return told[name]
        if name not in sets:
            known = ", ".join(f"${other}" for other in sets) or "none"
            raise ConfigError(
                f"{where}: got {value}, expected $dose, $draw or a name under the plan's units ({known})"
            )
        of_it = sets[name]
        units = of_it.get(None, of_it.get(stream))
        if units is None:
            has = ", ".join(str(other) for other in of_it)
            raise ConfigError(f"{where}: units.{name} has none of stream {stream!r}, expected one of {has}")
        return {layer: list(numbers) for layer, numbers in units.items()}
    if isinstance(value, Mapping):
        stream = value.get("stream", stream)
        return {key: _filled(one, told, sets, stream, where) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_filled(one, told, sets, stream, where) for one in value]
    return value


def unit_sets(units: Any) -> dict[str, dict[str | None, dict[int, list[int]]]]:
    """Return a plan's `units`: name → stream (None: whichever the intervention says) → layer → numbers.

    Args:
        units: name → {layer: [numbers]}, a CSV file with the columns stream, layer and unit, as
            `lerobot-attn neurons … -o FILE.csv` writes it, or {file: FILE.csv, top: 16, side: more, group:
            actions} for the first units that fire more in a contrast's first group (`auc` above 0.5; less:
            below), of the rows that have these values in other columns.

    Raises:
        ConfigError: it is none of these, or a file cannot be read.
    """
    if not isinstance(units, Mapping):
        raise ConfigError(f"units: got {units!r}, expected names → {{layer: [units]}} or a CSV file")
    found: dict[str, dict[str | None, dict[int, list[int]]]] = {}
    for name, value in units.items():
        where = f"units.{name}"
        if not isinstance(name, str) or not _STANDS_FOR.fullmatch(f"${name}") or name in ("dose", "draw"):
            raise ConfigError(f"units: got the name {name!r}, expected letters, digits and '_'")
        if isinstance(value, str):
            value = {"file": value}
        if isinstance(value, Mapping) and "file" in value:
            found[name] = _read(value, where)
        else:
            found[name] = {None: _numbers(value, where)}
    return found


def _numbers(value: Any, where: str) -> dict[int, list[int]]:
    expected = f"{where}: got {value!r}, expected {{layer: [units]}}, e.g. {{3: [12, 40]}}, or a CSV file"
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(expected)
    for layer, numbers in value.items():
        whole = [layer, *numbers] if isinstance(numbers, Sequence) and not isinstance(numbers, str) else [""]
        if len(whole) < 2 or not all(type(one) is int and one >= 0 for one in whole):
            raise ConfigError(expected)
    return {layer: list(numbers) for layer, numbers in value.items()}


def _read(value: Mapping[str, Any], where: str) -> dict[str | None, dict[int, list[int]]]:
    file, top, side = str(value["file"]), value.get("top"), value.get("side")
    if not (top is None or (type(top) is int and top >= 1)) or side not in (None, *_SIDES):
        raise ConfigError(
            f"{where}: got {dict(value)!r}, expected top, if there, as a whole number >= 1, and side as "
            f"{' or '.join(_SIDES)}"
        )
    try:
        with Path(file).open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"{where}: {file}: cannot be read: {reason}") from error
    for column, wanted in value.items():
        if column not in ("file", "top", "side"):
            if rows and column not in rows[0]:
                raise ConfigError(
                    f"{where}: {file} has no column {column}, expected one of {', '.join(rows[0])}"
                )
            rows = [row for row in rows if row[column] == str(wanted)]
    try:
        sides = {float(row["auc"]) > 0.5 for row in rows if row.get("auc")}
        if side is not None:
            rows = [row for row in rows if (float(row["auc"]) > 0.5) == (side == "more")]
        units = [(row["stream"], int(row["layer"]), int(row["unit"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: {file}: got other than rows of {', '.join(_COLUMNS)}{' and auc' if side else ''}, "
            "expected a found set as `lerobot-attn neurons … -o FILE.csv` writes it"
        ) from error
    _check_one_set(rows, len(sides) > 1 and side is None, where, file)
    if not units:
        raise ConfigError(f"{where}: {file}: has no units that were asked for, expected some")
    found: dict[str | None, dict[int, list[int]]] = {}
    for stream, layer, unit in list(dict.fromkeys(units))[:top]:
        found.setdefault(stream, {}).setdefault(layer, []).append(unit)
    return found


def _check_one_set(rows: Sequence[Mapping[str, str]], is_both: bool, where: str, file: Any) -> None:
    """Refuse units of both sides of a contrast, or of several words, together: one would undo the other."""
    if is_both:
        raise ConfigError(
            f"{where}: {file} has units that fire more and units that fire less, expected one; say "
            f"{{file: {file}, side: more}}"
        )
    words = list(dict.fromkeys(row["word"] for row in rows if row.get("word")))
    if len(words) > 1:
        raise ConfigError(
            f"{where}: {file} has units of {', '.join(words[:4])}, expected those of one word; say "
            f"{{file: {file}, word: {words[0]}}}"
        )
