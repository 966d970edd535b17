"""Neurons and directions that are turned up or down, as data: checked when made, readable as YAML.

Knows no policy and no framework: `neurons.py` finds out what is said here of a live policy, and does it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lerobot_attn.errors import ConfigError
from lerobot_attn.interventions.selectors import (
    Selector,
    key_selectors,
    numbers,
    seed_of_people,
    words_of,
)
from lerobot_attn.settings import check_choice, is_number

STREAMS = ("vlm", "expert")
HOW = ("set", "add", "scale", "ablate")
MATCHES = ("residual",)
# Of the selectors of tokens those that need no pass of their own.
_TOKENS = ("camera", "role", "words", "segment", "random_like")
_FEW = 8  # units that a line for people still lists
_CANNOT = "which reaches no action: actions stay what they were"


@dataclass(frozen=True)
class FireNeurons:
    """Neurons of feed-forward networks get other activations than the policy computed.

    Attributes:
        stream: "vlm" (the language model, once an inference) or "expert" (in each denoise step).
        units: layer → numbers of neurons; or `{random_like: {layer: [unit, …]}, seed: 0}`, as many others of
            the same layers, which a live policy's `resolved` puts in its place.
        how: "set" (the activation becomes `value`), "add" (`value` is added), "scale" (it is multiplied by
            `value`) or "ablate" (it becomes 0).
        value: in units of activation, or a factor; one for all, or layer → value. None with "ablate".
        tokens: "all", "actions", or selectors of tokens, see `selectors.key_selectors`: whose activations.
        denoise_steps: "all", or numbers of steps; of the expert alone.
        match: "residual": a random draw's value is scaled, layer by layer, such that it adds as long a vector
            to the residual stream as the neurons that it is the control of. By default the values are equal.
        drawn: of a random draw that was resolved: `random_like`, `seed`, `value` and `match` as asked for.
        norms: layer → `activations` and `residual`: the Euclidean norm of `value` at these units, and of what
            `down_proj` makes of it (with "scale" and "ablate": of 1 at these units). Once resolved.
        reaches_actions: whether any of it can change an action. Once resolved.
    """

    kind: ClassVar[str] = "neurons"
    stream: str
    units: Any
    how: str
    value: Any = None
    tokens: Any = "all"
    denoise_steps: Any = "all"
    match: str | None = None
    drawn: Mapping[str, Any] | None = None
    norms: Mapping[str, Any] | None = None
    reaches_actions: bool | None = None

    def __post_init__(self) -> None:
        """Check every value that can be checked without a policy.

        Raises:
            ConfigError: one is wrong.
        """
        check_choice(self, "stream", STREAMS)
        check_choice(self, "how", HOW)
        _set(self, "units", _units_or_draw(self.units, f"{self.kind}.units"))
        _set(self, "value", self._checked_value())
        for name in ("drawn", "norms"):
            _set(self, name, _with_words_as_keys(getattr(self, name), f"{self.kind}.{name}"))
        _check_where(self)
        if self.match is None:
            return
        check_choice(self, "match", MATCHES)
        if self.like is None or self.how not in ("set", "add"):
            got = f"how: {self.how}" if self.like is not None else "units that are no random draw"
            raise ConfigError(
                f"{self.kind}.match: got {self.match} with {got}, expected how: set or add and units: "
                "{random_like: …}: only a draw has something to be matched with"
            )

    @property
    def like(self) -> dict[int, list[int]] | None:
        """Layer → neurons that as many others are to be drawn for; None where the units are known."""
        found: dict[int, list[int]] | None = self.units.get("random_like")
        return found

    @property
    def values(self) -> dict[int, float]:
        """Layer → what `how` does it with; 0 of "ablate"."""
        layers = self.units if self.like is None else self.like
        if isinstance(self.value, Mapping):
            return dict(self.value)
        return dict.fromkeys(layers, 0.0 if self.value is None else self.value)

    @property
    def said(self) -> str:
        """What is done, for people."""
        like = self.like
        shown = self.units if like is None else like
        n_units = sum(map(len, shown.values()))
        parts = [f"{', '.join(map(str, units))} of layer {layer}" for layer, units in shown.items()]
        if n_units > _FEW:
            parts = [f"{n_units} of layers {', '.join(map(str, shown))}"]
        said = f"neurons of {self.stream}: {' and '.join(parts)}"
        if like is not None:
            said = f"as many random neurons (seed {self.units['seed']}) as the {said}"
        elif self.drawn is not None:
            said += f" (drawn at random, seed {self.drawn.get('seed')})"
        value = "/".join(f"{one:g}" for one in dict.fromkeys(self.values.values()))
        how = {"set": f"set to {value}", "add": f"raised by {value}", "scale": f"multiplied by {value}"}
        return f"{said}, {how.get(self.how, 'ablated')}{_said_where(self)}"

    def _checked_value(self) -> Any:
        if self.how == "ablate":
            if self.value is not None:
                raise ConfigError(f"{self.kind}.value: got {self.value!r} with how: ablate, expected none")
            return None
        if not isinstance(self.value, Mapping):
            return _finite(self.value, f"{self.kind}.value")
        layers = sorted(self.units if self.like is None else self.like)
        given = {_layer(key, f"{self.kind}.value"): one for key, one in self.value.items()}
        if sorted(given) != layers:
            raise ConfigError(
                f"{self.kind}.value: got layers {sorted(given)}, expected those of units: {layers}"
            )
        return {layer: _finite(given[layer], f"{self.kind}.value") for layer in layers}


@dataclass(frozen=True)
class SteerResidual:
    """A vector is added to what leaves a layer.

    Attributes:
        stream: "vlm" or "expert".
        layer: its number.
        vector: its numbers, as many as the stream is wide; or a file FILE.npy of them; or `{random_like: …,
            seed: 0}`: a random direction of the same norm, drawn when this is made.
        value: the dose, a factor of the vector.
        tokens: see `FireNeurons`.
        denoise_steps: see `FireNeurons`.
        norm: Euclidean norm of the vector, before the dose.
        sha256: of its numbers in float32, little-endian.
        drawn: of a random direction: `random_like`, the `sha256` of what it is the control of, and `seed`.
        reaches_actions: whether it can change an action. Once resolved.
    """

    kind: ClassVar[str] = "residual"
    stream: str
    layer: int
    vector: Any
    value: float
    tokens: Any = "all"
    denoise_steps: Any = "all"
    norm: float | None = None
    sha256: str | None = None
    drawn: Mapping[str, Any] | None = None
    reaches_actions: bool | None = None

    def __post_init__(self) -> None:
        """Check every value that can be checked without a policy, and read or draw the vector.

        Raises:
            ConfigError: one is wrong.
        """
        check_choice(self, "stream", STREAMS)
        _set(self, "layer", _layer(self.layer, f"{self.kind}.layer"))
        _set(self, "value", _finite(self.value, f"{self.kind}.value"))
        where = f"{self.kind}.vector"
        if isinstance(self.vector, Mapping):
            given = _draw(self.vector, where)
            like = _vector(given["random_like"], where)
            direction = np.random.default_rng(given["seed"]).standard_normal(len(like))
            direction *= np.linalg.norm(like) / np.linalg.norm(direction)
            vector = direction.astype(np.float32)
            _set(self, "drawn", {"random_like": _hash(like), "seed": given["seed"]})
        else:
            vector = _vector(self.vector, where)
        _set(self, "vector", vector.tolist())
        _set(self, "norm", significant(float(np.linalg.norm(vector))))
        _set(self, "sha256", _hash(vector))
        _check_where(self)

    @property
    def said(self) -> str:
        """What is done, for people."""
        vector = f"a vector of norm {self.norm:g} ({str(self.sha256)[:8]})"
        if self.drawn is not None:
            vector = f"a random vector of norm {self.norm:g} (seed {self.drawn.get('seed')})"
        where = f"the residual of {self.stream} layer {self.layer}{_said_where(self)}"
        return f"{self.value:g} × {vector} added to {where}"


Firing = FireNeurons | SteerResidual


def significant(value: float) -> float:
    """Return a number to six digits: the same on every machine, where sums differ in the last ones."""
    return float(f"{value:.6g}")


def _with_words_as_keys(value: Any, where: str) -> Any:
    """Return a mapping as JSON has it, so that what a store says equals what was said."""
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{where}: got {value!r}, expected nothing: it is found out, not set")
    if value is None:
        return None
    inner = {str(key): one for key, one in value.items()}
    return {
        key: _with_words_as_keys(one, where) if isinstance(one, Mapping) else one
        for key, one in inner.items()
    }


def _check_where(one: Firing) -> None:
    """Check whose values are changed, and when."""
    name, tokens = f"{one.kind}.tokens", one.tokens
    if tokens not in ("all", "actions"):
        if isinstance(tokens, str):
            raise ConfigError(
                f"{name}: got {tokens!r}, expected all, actions or a selector as {{camera: image}}"
            )
        chosen: tuple[Selector, ...] = key_selectors(tokens, name)
        for selector in chosen:
            if not any(key in selector for key in _TOKENS):
                raise ConfigError(f"{name}: got {next(iter(selector))}, expected one of {', '.join(_TOKENS)}")
        _set(one, "tokens", chosen)
    if tokens == "actions" and one.stream == "vlm":
        raise ConfigError(
            f"{name}: got actions with stream: vlm, expected tokens of the prefix, or stream: expert"
        )
    _set(one, "denoise_steps", numbers(one.denoise_steps, f"{one.kind}.denoise_steps"))
    if one.denoise_steps != "all" and one.stream == "vlm":
        raise ConfigError(
            f"{one.kind}.denoise_steps: got {one.denoise_steps} with stream: vlm, expected all: it runs once "
            "an inference, before the denoise steps"
        )


def _said_where(one: Firing) -> str:
    said = ""
    if one.tokens == "actions":
        said += " at the action tokens"
    elif one.tokens != "all":
        said += f" at {words_of(one.tokens)}"
    if one.denoise_steps != "all":
        said += f", denoise steps {', '.join(map(str, one.denoise_steps))}"
    return said if one.reaches_actions is not False else f"{said}, {_CANNOT}"


def _units_or_draw(value: Any, where: str) -> dict[Any, Any]:
    if isinstance(value, Mapping) and "random_like" in value:
        given = _draw(value, where)
        return {"random_like": _units(given["random_like"], f"{where}.random_like"), "seed": given["seed"]}
    return _units(value, where)


def _draw(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    unknown = [key for key in value if key not in ("random_like", "seed")]
    if unknown or "random_like" not in value:
        raise ConfigError(f"{where}: got {list(value)}, expected random_like, and seed beside it")
    return {
        "random_like": value["random_like"],
        "seed": seed_of_people(value.get("seed", 0), f"{where}.seed"),
    }


def _units(value: Any, where: str) -> dict[int, list[int]]:
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"{where}: got {value!r}, expected layer → neurons, as {{1: [3, 9]}}")
    found: dict[int, list[int]] = {}
    for key, given in value.items():
        layer = _layer(key, where)
        units = [given] if is_number(given) else given
        is_list = isinstance(units, Sequence) and not isinstance(units, str)
        if not is_list or not units or not all(is_number(unit) and unit >= 0 for unit in units):
            raise ConfigError(
                f"{where}: got {given!r} for layer {layer}, expected numbers of neurons, from 0"
            )
        if len(set(units)) < len(units):
            raise ConfigError(f"{where}: got {given!r} for layer {layer}, expected each neuron once")
        found[layer] = sorted(map(int, units))
    if len(found) < len(value):
        raise ConfigError(f"{where}: got a layer twice, expected each once")
    return dict(sorted(found.items()))


def _layer(value: Any, where: str) -> int:
    """Return the number of a layer; JSON has only words as keys."""
    if isinstance(value, str) and value.removeprefix("-").isdecimal():
        value = int(value)
    if not is_number(value):
        raise ConfigError(f"{where}: got layer {value!r}, expected its number")
    return int(value)


def _finite(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: got {value!r}, expected a finite number")
    return float(value)


def _vector(value: Any, where: str) -> np.ndarray:
    """Return numbers, or those of a file: (feature,) float32, finite and not all 0."""
    given = value
    if isinstance(value, str | Path):
        try:
            given = np.load(value, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or "not an array of numbers that numpy saved"
            raise ConfigError(f"{where}: {value} cannot be read ({reason}), expected a .npy file") from error
    try:
        with np.errstate(over="ignore"):
            found = np.asarray(given, np.float32)
    except (TypeError, ValueError):
        found = np.empty(0, np.float32)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all() or not found.any():
        what = value if isinstance(value, str | Path) else f"{type(value).__name__} of shape {found.shape}"
        raise ConfigError(f"{where}: got {what}, expected a list of finite numbers, not all of them 0")
    return found


def _hash(vector: np.ndarray) -> str:
    return hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()


def _set(one: object, name: str, value: Any) -> None:
    object.__setattr__(one, name, value)  # frozen: only here, while it is made
