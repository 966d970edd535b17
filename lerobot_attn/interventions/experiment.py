"""The plan of an experiment: which conditions are compared, on which tasks, initial states and noise.

Plain values with a YAML form, checked when they are read. Starts nothing and writes nothing; what a policy or
an environment is called, and what is captured, is passed on to whatever evaluates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lerobot_attn.errors import ConfigError
from lerobot_attn.interventions.expansion import expanded, unit_sets
from lerobot_attn.interventions.spec import Condition, FixedNoise
from lerobot_attn.settings import check_choice, from_mapping, read_mapping

BASELINE = "baseline"
ALWAYS, INFERENCES = RENDER = ("always", "inferences")
_KNOWN = ("name", "interventions", "control_of", "doses", "draws", "base", "dose", "draw")
# Of what fires units or adds to a residual: so many random draws must stand beside it.
FEWEST_DRAWS = 5
_FIRES = ("neurons", "residual")
_FAMILY = ("base", "dose", "draw")
# Where an experiment's stores lie, and that none is left out, is not for a plan to change.
_OWN_CAPTURE = ("dir", "existing", "keep", "episodes")
_SHOWS_FRAMES = ("cameras", "view", "rerun")  # what needs the pictures of every frame


class PlannedCondition(NamedTuple):
    """One condition of a plan.

    Attributes:
        condition: what is done.
        control_of: whose control it is, if it is one: a condition's name, or the base of several doses.
        base: what it is called without its dose and draw; its name where it has neither.
        dose: the number in the place of `$dose`, if there is one.
        draw: the number in the place of `$draw`, likewise.
    """

    condition: Condition
    control_of: str | None
    base: str
    dose: float | None = None
    draw: int | None = None

    @property
    def name(self) -> str:
        """The condition's name, and that of its folder."""
        return self.condition.name

    @property
    def acts(self) -> bool:
        """Whether it does anything beside fixing the noise."""
        return any(not isinstance(one, FixedNoise) for one in self.condition.interventions)

    @property
    def fires(self) -> bool:
        """Whether it changes activations of units, or a residual."""
        return any(one.kind in _FIRES for one in self.condition.interventions)

    @property
    def is_random(self) -> bool:
        """Whether a random choice says what is fired: one that is still to be drawn, or was."""
        parts = [part for part in self.condition.to_dict()["interventions"] if part["kind"] in _FIRES]
        what = [part.get(key) for part in parts for key in ("units", "vector")]
        return _says(what, "random_like") or any(part.get("drawn") for part in parts)

    @property
    def is_prompt(self) -> bool:
        """Whether the policy is only told something else."""
        return self.condition.changes_task and not self.fires


@dataclass(frozen=True, kw_only=True)
class ExperimentPlan:
    """What an experiment compares, and on what.

    A condition "baseline", in which nothing is done, is added where there is none, and the same noise for
    each (episode, inference) to every condition that does not fix it itself.
    """

    # What the experiment is called; of a file its own name, where it says none.
    name: str = "experiment"
    # LeRobot's fields of the policy; `path` is needed.
    policy: Mapping[str, Any] = field(default_factory=dict)
    # LeRobot's fields of the environment: type, task, task_ids, ….
    env: Mapping[str, Any] = field(default_factory=dict)
    # Initial states of each task; every condition begins from the same.
    n_episodes: int | None = None
    # Of the environments, the policy and the noise.
    seed: int = 1000
    # Environments at once: 1, or all episodes of a task.
    batch_size: int = 1
    # What is recorded, as `--eval.attention.*`.
    capture: Mapping[str, Any] = field(default_factory=lambda: {"layers": "none", "mean_layers": "all"})
    # When cameras are drawn: "always", or at "inferences" alone, for the same actions several times as fast
    # and without videos (LIBERO).
    render: str = ALWAYS
    # The environment's names of observations → the policy's.
    rename_map: Mapping[str, str] | None = None
    # Mappings of name, interventions, and control_of where it is the control of another one; with doses and
    # draws, where one stands for many (`interventions.expansion`).
    conditions: Sequence[Mapping[str, Any]] = ()
    # Units that conditions name as $NAME: {layer: [numbers]}, or a CSV file of a found set.
    units: Mapping[str, Any] = field(default_factory=dict)
    # The metric that the question is about (`analysis.effects.METRICS`), named before the run.
    outcome: str | None = None
    # What is expected of it and why, in one sentence written before the run.
    expectation: str | None = None
    # Let conditions pass that have no control.
    no_control: bool = False

    def __post_init__(self) -> None:
        """Check all that can be checked without LeRobot.

        Raises:
            ConfigError: a value is missing or wrong, two conditions have one name, or one has no control.
        """
        for name in ("policy", "env", "capture"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected a mapping of its fields")
        if not _is_count(self.n_episodes):
            raise ConfigError(
                f"n_episodes: got {self.n_episodes!r}, expected how many initial states of each task; add "
                "n_episodes=20"
            )
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32 or isinstance(self.seed, bool):
            raise ConfigError(f"seed: got {self.seed!r}, expected a whole number from 0 to 2^32 - 1")
        if not _is_count(self.batch_size) or 1 < self.batch_size < (self.n_episodes or 0):
            raise ConfigError(
                f"batch_size: got {self.batch_size!r}, expected 1 or n_episodes ({self.n_episodes}), because "
                "after a batch LIBERO's next initial state depends on which episode ended first, so that "
                "conditions would not begin alike"
            )
        own = [name for name in self.capture if name in _OWN_CAPTURE]
        if own:
            raise ConfigError(
                f"capture: got {own[0]}, which an experiment sets itself; expected it to be left out"
            )
        check_choice(self, "render", RENDER)
        shown = next((name for name in _SHOWS_FRAMES if self.capture.get(name)), None)
        if self.render == INFERENCES and shown is not None:
            raise ConfigError(
                f"capture.{shown}: got {self.capture[shown]!r} with render: {INFERENCES}, expected false, "
                "because between two inferences there are no pictures; leave one of the two out"
            )
        for name in ("outcome", "expectation"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ConfigError(f"{name}: got {value!r}, expected text, or it left out")
        _check_controls(self.planned, self.no_control)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "the plan") -> ExperimentPlan:
        """Build from plain values.

        Raises:
            ConfigError: an unknown key, or a value that a plan cannot have.
        """
        return from_mapping(cls, values, where=where)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = (), **values: Any) -> ExperimentPlan:
        """Read a plan's file.

        Args:
            path: the file.
            overrides: `key=value`, keys with dots, values as YAML, perhaps with dashes before:
                `--policy.path=CHECKPOINT`, `n_episodes=2`.
            values: of fields, on top.

        Raises:
            ConfigError: it cannot be read, or as `from_dict`.
        """
        read = {"name": Path(path).stem, **read_mapping(path)}
        for override in overrides:
            _override(read, override)
        return cls.from_dict({**read, **values}, where=str(path))

    @property
    def planned(self) -> list[PlannedCondition]:
        """The conditions in their order, the baseline first where the plan does not list it.

        Raises:
            ConfigError: one of them is wrong.
        """
        given = self.conditions
        if isinstance(given, str | Mapping) or not isinstance(given, Sequence) or not given:
            raise ConfigError(f"conditions: got {given!r}, expected a list of them; see configs/experiment")
        if not any(isinstance(one, Mapping) and one.get("name") == BASELINE for one in given):
            given = [{"name": BASELINE}, *given]
        found = expanded(given, unit_sets(self.units))
        return [self._planned(one, f"conditions[{number}]") for number, one in enumerate(found)]

    def _planned(self, values: Any, where: str) -> PlannedCondition:
        if not isinstance(values, Mapping) or not values.get("name"):
            raise ConfigError(f"{where}: got {values!r}, expected a mapping with a name")
        unknown = [key for key in values if key not in _KNOWN]
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; expected one of {', '.join(_KNOWN)}")
        name, control_of = values["name"], values.get("control_of")
        parts = values.get("interventions") or []
        if isinstance(parts, Sequence) and not any(
            isinstance(part, Mapping) and part.get("kind") == FixedNoise.kind for part in parts
        ):
            parts = [*parts, {"kind": FixedNoise.kind, "seed": self.seed}]
        family = {key: values[key] for key in _FAMILY if values.get(key) is not None}
        told = {"outcome": self.outcome, "expectation": self.expectation}
        said = {
            "name": self.name,
            "condition": name,
            "control_of": control_of,
            **family,
            **{key: value for key, value in told.items() if value is not None},
        }
        condition = Condition.from_dict(
            {"name": name, "interventions": parts, "experiment": said}, where=f"{where} ({name})"
        )
        return PlannedCondition(
            condition, control_of, str(values.get("base", name)), values.get("dose"), values.get("draw")
        )

    @property
    def tasks(self) -> list[tuple[str, int]] | None:
        """The tasks as (group, number); None where the environment alone knows them."""
        ids, groups = self.env.get("task_ids"), self.env.get("task")
        if self.env.get("type") != "libero" or not isinstance(ids, list) or not isinstance(groups, str):
            return None
        if not all(isinstance(number, int) for number in ids):
            return None  # LeRobot says what it expects
        return [(group.strip(), number) for group in groups.split(",") for number in ids]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with what was added."""
        conditions = [
            {
                "name": one.name,
                "interventions": one.condition.to_dict()["interventions"],
                **({} if one.control_of is None else {"control_of": one.control_of}),
                **({} if one.base == one.name else {"base": one.base}),
                **{key: getattr(one, key) for key in ("dose", "draw") if getattr(one, key) is not None},
            }
            for one in self.planned
        ]
        return {
            "name": self.name,
            "policy": {name: value for name, value in self.policy.items() if value is not None},
            "env": {name: value for name, value in self.env.items() if value is not None},
            "n_episodes": self.n_episodes,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "capture": dict(self.capture),
            **({} if self.render == ALWAYS else {"render": self.render}),
            **({} if self.rename_map is None else {"rename_map": dict(self.rename_map)}),
            **{key: getattr(self, key) for key in ("outcome", "expectation") if getattr(self, key)},
            "conditions": conditions,
            **({"no_control": True} if self.no_control else {}),
        }


def _check_controls(planned: Sequence[PlannedCondition], no_control: bool) -> None:
    names = [one.name for one in planned]
    double = [name for name in names if names.count(name) > 1]
    if double:
        raise ConfigError(f"conditions: two are called {double[0]!r}, expected different names")
    seeds = {
        part.seed: one.name
        for one in planned
        for part in one.condition.interventions
        if isinstance(part, FixedNoise)
    }
    if len(seeds) > 1:
        said = " and ".join(f"{name} has seed {seed}" for seed, name in list(seeds.items())[:2])
        raise ConfigError(f"fixed_noise: {said}, expected one seed, because pairs share their noise")
    for one in planned:
        if one.name == BASELINE and one.acts:
            raise ConfigError(f"{BASELINE}: got interventions, expected none; call the condition otherwise")
        others = [name for name in names if name not in (one.name, BASELINE)]
        others += [base for base in dict.fromkeys(each.base for each in planned) if base not in names]
        if one.control_of is not None and one.control_of not in others:
            raise ConfigError(
                f"{one.name}: is the control of {one.control_of!r}, expected one of {', '.join(others)}"
            )
    have = {one.control_of for one in planned}
    bare = [
        one.name for one in planned if one.acts and one.control_of is None and not {one.name, one.base} & have
    ]
    if bare and not no_control:
        raise ConfigError(
            f"{bare[0]}: has no control, so that nobody could tell whether any intervention at all does the "
            f"same; add a condition with control_of: {bare[0]}, or say --no-control"
        )

    for one in planned if not no_control else ():
        if one.fires and one.control_of is None:
            _check_firing(one, [other for other in planned if other.control_of in (one.name, one.base)])


def _check_firing(one: PlannedCondition, controls: Sequence[PlannedCondition]) -> None:
    """Refuse firing units of which nobody could say that other units, or a word, do not do the same."""
    n_draws = sum(other.fires and other.is_random for other in controls)
    if n_draws < FEWEST_DRAWS:
        raise ConfigError(
            f"{one.name}: fires units and has {n_draws} random draws as its controls, expected "
            f"{FEWEST_DRAWS} or more, because one random set is not like another; add a condition with "
            f"control_of: {one.base}, units: {{random_like: …, seed: $draw}}, draws: {FEWEST_DRAWS} and the "
            "same doses, or say --no-control"
        )
    if not any(other.is_prompt for other in controls):
        raise ConfigError(
            f"{one.name}: fires units and has no prompt control, expected one, because saying the word may "
            f"do the same; add a condition with control_of: {one.base} and {{kind: task, …}}, or say "
            "--no-control"
        )


def _says(value: Any, key: str) -> bool:
    """Return whether a key is anywhere in plain values."""
    if isinstance(value, Mapping):
        return key in value or any(_says(one, key) for one in value.values())
    return isinstance(value, list | tuple) and any(_says(one, key) for one in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _override(values: dict[str, Any], text: str) -> None:
    """Put `key=value` into a plan's values."""
    name, is_there, written = text.removeprefix("--").partition("=")
    if not is_there or not name:
        raise ConfigError(f"{text}: expected key=value, such as policy.path=CHECKPOINT or n_episodes=20")
    *sections, last = name.split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = values = dict(inner) if isinstance(inner, Mapping) else {}
    try:
        values[last] = written if last in ("path", "type") else yaml.safe_load(written)
    except yaml.YAMLError:
        values[last] = written
