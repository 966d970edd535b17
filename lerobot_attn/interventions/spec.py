"""Interventions as data: what is done to a policy while it runs, checked when it is made, readable as YAML.

Knows no policy and no framework: `session.py` does what is said here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lerobot_attn.errors import ConfigError
from lerobot_attn.interventions.firing import FireNeurons, SteerResidual
from lerobot_attn.interventions.selectors import (
    SEGMENTS,
    Selector,
    flat,
    key_selectors,
    numbers,
    region_selectors,
    seed_of_people,
    words_of,
)
from lerobot_attn.settings import check_choice, from_mapping, read_mapping

PASSES = ("suffix", "prefix", "both")
QUERIES = ("all", "actions", *SEGMENTS)
FILLS = ("mean", "blur", "inpaint")


@dataclass(frozen=True)
class BlockAttention:
    """Some tokens are not read: attention to them is 0 before it is applied.

    Attributes:
        keys: selectors of the tokens that are not read, see `selectors.key_selectors`.
        passes: "suffix" (the action expert does not read them; what other tokens of the prefix read of them
            before still arrives), "prefix" (the other tokens of the prefix do not), or "both" (nothing of
            them arrives).
        queries: which tokens do not read them: "all", "actions" or one of `selectors.SEGMENTS`.
        layers: "all", or numbers of layers of each pass.
        heads: "all", or numbers of heads.
        denoise_steps: "all", or numbers of steps; the prefix pass, which comes once, is not divided.
        renormalise: whether what is left of a row is scaled to sum to 1, which equals masking the keys
            before the softmax; otherwise the rows sum to less.
    """

    kind: ClassVar[str] = "block_attention"
    keys: Any
    passes: str = "suffix"
    queries: str = "all"
    layers: Any = "all"
    heads: Any = "all"
    denoise_steps: Any = "all"
    renormalise: bool = True

    def __post_init__(self) -> None:
        """Check every value that can be checked without a policy.

        Raises:
            ConfigError: one is wrong.
        """
        _set(self, "keys", key_selectors(self.keys, f"{self.kind}.keys"))
        check_choice(self, "passes", PASSES)
        check_choice(self, "queries", QUERIES)
        for name in ("layers", "heads", "denoise_steps"):
            _set(self, name, numbers(getattr(self, name), f"{self.kind}.{name}"))
        _check_bool(self, "renormalise")

    @property
    def said(self) -> str:
        """What is done, for people."""
        where = {"suffix": "in the suffix", "prefix": "in the prefix", "both": "in prefix and suffix"}
        said = f"attention to {words_of(self.keys)} blocked {where[self.passes]}"
        if self.queries != "all":
            said += f" for {self.queries}"
        for name in ("layers", "heads", "denoise_steps"):
            chosen = getattr(self, name)
            if chosen != "all":
                said += f", {name.replace('_', ' ')} {', '.join(map(str, chosen))}"
        return said if self.renormalise else f"{said}, rows not renormalised"


@dataclass(frozen=True)
class Occlude:
    """A part of the cameras' pictures is painted over before the policy sees them.

    Attributes:
        where: selectors of parts of pictures, see `selectors.region_selectors`.
        fill: "mean" (the mean colour of the rest of the picture), "blur" (Gaussian, of a sixteenth of the
            picture's longer side) or "inpaint" (a smooth continuation of what is around it).
    """

    kind: ClassVar[str] = "occlude"
    where: Any
    fill: str = "mean"

    def __post_init__(self) -> None:
        """Check every value that can be checked without a picture.

        Raises:
            ConfigError: one is wrong.
        """
        _set(self, "where", region_selectors(self.where, f"{self.kind}.where"))
        check_choice(self, "fill", FILLS)
        for one in flat(self.where) if self.fill == "inpaint" else ():
            if "camera" in one and "box" not in one and "role" not in one:
                raise ConfigError(
                    f"occlude.fill: got inpaint for all of camera {one['camera']}, expected a part of it: "
                    "nothing is left to continue; take mean"
                )

    @property
    def said(self) -> str:
        """What is done, for people."""
        how = {"mean": "painted over in the mean colour", "blur": "blurred", "inpaint": "inpainted"}
        return f"{words_of(self.where)} {how[self.fill]}"


@dataclass(frozen=True)
class Task:
    """The policy is told another task than its environment's. Exactly one of the first five is given.

    Attributes:
        text: what it is told.
        replace: words → what stands in their place.
        remove: words that are left out.
        shuffle: its words come in another order, drawn for (`seed`, episode).
        empty: it is told nothing.
        seed: of the shuffling.
    """

    kind: ClassVar[str] = "task"
    text: str | None = None
    replace: Mapping[str, str] | None = None
    remove: Sequence[str] | None = None
    shuffle: bool = False
    empty: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: one is wrong, or not exactly one change is asked for.
        """
        _check_bool(self, "shuffle")
        _check_bool(self, "empty")
        _set(self, "seed", seed_of_people(self.seed, f"{self.kind}.seed"))
        given = [name for name in ("text", "replace", "remove") if getattr(self, name) is not None]
        given += [name for name in ("shuffle", "empty") if getattr(self, name)]
        if len(given) != 1:
            got = ", ".join(given) or "none"
            raise ConfigError(f"task: got {got}, expected one of text, replace, remove, shuffle, empty")
        if self.text is not None and (not isinstance(self.text, str) or not self.text.strip()):
            raise ConfigError(f"task.text: got {self.text!r}, expected words; for none say empty: true")
        if self.replace is not None:
            pairs = self.replace
            if not isinstance(pairs, Mapping) or not pairs or not all(map(_is_words, pairs)):
                raise ConfigError(f"task.replace: got {pairs!r}, expected words of the task → other words")
            if not all(isinstance(other, str) for other in pairs.values()):
                raise ConfigError(f"task.replace: got {pairs!r}, expected words of the task → other words")
            _set(self, "replace", dict(pairs))
        if self.remove is not None:
            words = [self.remove] if isinstance(self.remove, str) else self.remove
            if not isinstance(words, Sequence) or not words or not all(map(_is_words, words)):
                raise ConfigError(f"task.remove: got {self.remove!r}, expected a list of words of the task")
            _set(self, "remove", list(words))

    def applied(self, task: str, episode: int) -> str:
        """Return what the policy is told in place of a task.

        Args:
            task: the environment's.
            episode: its number, for the shuffling.

        Raises:
            ConfigError: words that are to be replaced or removed are not in it.
        """
        if self.empty:
            return ""
        if self.text is not None:
            return self.text
        if self.replace is not None:
            for words, other in self.replace.items():
                task = _exchanged(task, words, other, "replace")
            return task
        if self.remove is not None:
            for words in self.remove:
                task = _exchanged(task, words, "", "remove")
            return " ".join(task.split())
        in_order = task.split()
        draw = np.random.default_rng([self.seed, episode])
        shuffled = in_order
        while len(set(in_order)) > 1 and shuffled == in_order:
            shuffled = [in_order[place] for place in draw.permutation(len(in_order))]
        return " ".join(shuffled)

    @property
    def said(self) -> str:
        """What is done, for people."""
        if self.empty:
            return "no instruction"
        if self.text is not None:
            return f'instruction "{self.text}"'
        if self.replace is not None:
            return ", ".join(f'"{words}" said as "{other}"' for words, other in self.replace.items())
        if self.remove is not None:
            return "instruction without " + ", ".join(f'"{words}"' for words in self.remove)
        return f"words of the instruction shuffled (seed {self.seed})"


@dataclass(frozen=True)
class FixedNoise:
    """Denoising starts from the noise of (`seed`, episode, inference), whatever was drawn before."""

    kind: ClassVar[str] = "fixed_noise"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the seed.

        Raises:
            ConfigError: it is none.
        """
        _set(self, "seed", seed_of_people(self.seed, f"{self.kind}.seed"))

    @property
    def said(self) -> str:
        """What is done, for people."""
        return f"noise fixed by seed {self.seed}"


Intervention = BlockAttention | Occlude | Task | FireNeurons | SteerResidual | FixedNoise
_CLASSES: tuple[type[Intervention], ...] = (
    *(BlockAttention, Occlude, Task),
    *(FireNeurons, SteerResidual, FixedNoise),
)
KINDS: dict[str, type[Intervention]] = {cls.kind: cls for cls in _CLASSES}


@dataclass(frozen=True)
class Condition:
    """Interventions that act together, under a name.

    Attributes:
        name: e.g. "block_target".
        interventions: in the order in which they act.
        experiment: what an experiment says of itself, carried along: its `name`, this `condition`, and
            `control_of`, the condition that this one is the control of, or None.
    """

    name: str
    interventions: tuple[Intervention, ...] = ()
    experiment: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check the parts.

        Raises:
            ConfigError: one is none.
        """
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(f"name: got {self.name!r}, expected letters, digits, '_', '-' or '.'")
        _set(self, "interventions", tuple(self.interventions))
        for one in self.interventions:
            if not isinstance(one, Intervention):
                raise ConfigError(f"interventions: got {one!r}, expected one of {', '.join(KINDS)}")
        if self.experiment is not None:
            if not isinstance(self.experiment, Mapping):
                raise ConfigError(f"experiment: got {self.experiment!r}, expected a mapping")
            _set(self, "experiment", dict(self.experiment))

    @classmethod
    def of(cls, what: Condition | Intervention | Sequence[Intervention]) -> Condition:
        """Return a condition, or interventions as one."""
        if isinstance(what, Condition):
            return what
        parts = (what,) if isinstance(what, Intervention) else tuple(what)
        kinds = dict.fromkeys(getattr(part, "kind", "?") for part in parts)
        return cls("-".join(kinds) if "?" not in kinds and kinds else "baseline", parts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "the condition") -> Condition:
        """Build from plain values, as `to_dict` returns them and as a store holds them.

        Raises:
            ConfigError: an unknown key, or a value that an intervention cannot have.
        """
        known = ("name", "text", "interventions", "experiment")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: got a {type(values).__name__}, expected a mapping with a name")
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; expected one of {', '.join(known)}")
        parts = values.get("interventions") or ()
        if isinstance(parts, str | Mapping) or not isinstance(parts, Sequence):
            raise ConfigError(f"{where}: got interventions {parts!r}, expected a list of them")
        built = [_intervention(part, f"{where}: interventions[{i}]") for i, part in enumerate(parts)]
        try:
            return cls(values.get("name", "condition"), tuple(built), values.get("experiment"))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Condition:
        """Read a YAML file; its name is the file's where it says none.

        Raises:
            ConfigError: it is missing, no mapping, or says what cannot be done.
        """
        values = read_mapping(path)
        return cls.from_dict({"name": Path(path).stem, **values}, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with every setting, which `from_dict` and YAML take."""
        found = {
            "name": self.name,
            "interventions": [_plain(one) for one in self.interventions],
        }
        return found if self.experiment is None else {**found, "experiment": dict(self.experiment)}

    @property
    def text(self) -> str:
        """One line for people: the name and what is done."""
        parts = [one.said for one in self.interventions]
        return f"{self.name}: {'; '.join(parts) or 'no intervention'}"

    @property
    def needs_masks(self) -> bool:
        """Whether a selector speaks of a role, so that somebody must say what the pixels show."""
        return any("role" in selector for selector in flat(self._selectors))

    @property
    def changes_task(self) -> bool:
        """Whether the policy is told another task."""
        return any(isinstance(one, Task) for one in self.interventions)

    @property
    def _selectors(self) -> list[Selector]:
        found: list[Selector] = []
        for one in self.interventions:
            found += getattr(one, "keys", ()) or getattr(one, "where", ())
            tokens = getattr(one, "tokens", ())
            found += () if isinstance(tokens, str) else tokens
        return found


def _intervention(values: Any, where: str) -> Intervention:
    if not isinstance(values, Mapping) or values.get("kind") not in KINDS:
        got = values.get("kind") if isinstance(values, Mapping) else values
        raise ConfigError(f"{where}: got kind {got!r}, expected one of {', '.join(KINDS)}")
    cls = KINDS[values["kind"]]
    rest = {name: value for name, value in values.items() if name != "kind"}
    for needed in [f.name for f in fields(cls) if f.default is MISSING]:
        if needed not in rest:
            expected = "a selector such as {role: target}" if needed in ("keys", "where") else "it"
            raise ConfigError(f"{where}: {needed} is missing, expected {expected}")
    try:
        return from_mapping(cls, rest, where=cls.kind)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _plain(one: Intervention) -> dict[str, Any]:
    values = {f.name: _as_yaml(getattr(one, f.name)) for f in fields(one)}
    return {"kind": one.kind, **{name: value for name, value in values.items() if value is not None}}


def _as_yaml(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _as_yaml(one) for key, one in value.items()}  # JSON has only words as keys
    if isinstance(value, list | tuple):
        return [_as_yaml(one) for one in value]
    return value


def _exchanged(task: str, words: str, other: str, what: str) -> str:
    pattern = rf"(?<!\w){r'\s+'.join(map(re.escape, words.split()))}(?!\w)"
    found, n_found = re.subn(pattern, lambda match: other, task, flags=re.IGNORECASE)
    if not n_found:
        raise ConfigError(f"task.{what}: {words!r} is not in the task, expected words of {task!r}")
    return found


def _is_words(value: Any) -> bool:
    return isinstance(value, str) and bool(value.split())


def _check_bool(settings: object, name: str) -> None:
    value = getattr(settings, name)
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: got {value!r}, expected true or false")


def _set(one: object, name: str, value: Any) -> None:
    object.__setattr__(one, name, value)  # frozen: only here, while it is made
