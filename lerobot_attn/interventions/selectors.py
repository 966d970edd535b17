"""Which tokens, and which part of a picture: selectors, plain mappings that are checked when they are made.

Knows their form alone: no policy, no picture. `keys.py` and `regions.py` find out what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lerobot_attn.errors import ConfigError
from lerobot_attn.masks import check_role
from lerobot_attn.settings import is_number

Selector = dict[str, Any]  # one of the mappings below, checked

# What a token stands for; "text" is the whole prompt, "image" the patches of all cameras.
SEGMENTS = ("task", "state", "template", "text", "image")
OVERLAP = 0.1  # of a patch: from here on it belongs to what it shows

# The key that names a selector → the keys that it may have beside that one.
_OF_KEYS: dict[str, tuple[str, ...]] = {
    "role": ("camera", "overlap"),
    "words": (),
    "segment": (),
    "random_like": ("seed",),
    "all_but_top": ("layers",),
    "all_but_random": ("seed",),
    "camera": ("patches",),
}
_OF_REGIONS: dict[str, tuple[str, ...]] = {
    "role": ("camera",),
    "random_like": ("seed",),
    "camera": ("box",),
}
# What as many other patches, or a shape of the same area, can be found for.
_OF_PATCHES = ("role", "camera")


def key_selectors(value: Any, where: str) -> tuple[Selector, ...]:
    """Return selectors of tokens, one or several (whose tokens are joined), as somebody wrote them.

    Args:
        value: a mapping, or a list of them: `{camera: NAME}`, `{camera: NAME, patches: [[row, column], …]}`,
            `{role: ROLE}` with `camera` and `overlap` (share of a patch, 0 to 1), `{words: [WORD, …]}`,
            `{segment: task|state|template|text|image}`, `{random_like: SELECTOR, seed: 0}`,
            `{all_but_top: N, layers: …}` or `{all_but_random: N, seed: 0}`.
        where: what an error calls the place that they stand at.

    Raises:
        ConfigError: one that does not exist, or a value that it cannot have.
    """
    return _selectors(value, where, _OF_KEYS, key_selectors)


def region_selectors(value: Any, where: str) -> tuple[Selector, ...]:
    """Return selectors of parts of pictures, one or several (which are joined), as somebody wrote them.

    Args:
        value: a mapping, or a list of them: `{camera: NAME}`, `{camera: NAME, box: [top, left, bottom,
            right]}` in fractions of the picture's sides, `{role: ROLE}` with `camera`, or `{random_like:
            SELECTOR, seed: 0}`.
        where: what an error calls the place that they stand at.

    Raises:
        ConfigError: one that does not exist, or a value that it cannot have.
    """
    return _selectors(value, where, _OF_REGIONS, region_selectors)


def flat(selectors: Sequence[Selector]) -> Iterator[Selector]:
    """Yield selectors, and those inside `random_like`."""
    for selector in selectors:
        yield selector
        yield from flat(selector.get("random_like", ()))


def words_of(selectors: Sequence[Selector]) -> str:
    """Return what selectors choose, in words for people."""
    return " and ".join(map(_in_words, selectors))


def _selectors(
    value: Any,
    where: str,
    known: Mapping[str, tuple[str, ...]],
    inner: Callable[[Any, str], tuple[Selector, ...]],
) -> tuple[Selector, ...]:
    given = [value] if isinstance(value, Mapping) else value
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ConfigError(f"{where}: got {value!r}, expected a selector such as {{role: target}}, or a list")
    return tuple(_selector(one, where, known, inner) for one in given)


def _selector(
    value: Any,
    where: str,
    known: Mapping[str, tuple[str, ...]],
    inner: Callable[[Any, str], tuple[Selector, ...]],
) -> Selector:
    if not isinstance(value, Mapping) or not (names := [name for name in known if name in value]):
        raise ConfigError(f"{where}: got {value!r}, expected a selector, with one of {', '.join(known)}")
    name = names[0]
    unknown = [key for key in value if key != name and key not in known[name]]
    if unknown:
        expected = ", ".join(known[name]) or "nothing"
        raise ConfigError(f"{where}: got {unknown[0]!r} beside {name}, expected {expected} there")
    selector = {name: value[name], **value}
    if "seed" in known[name]:
        selector.setdefault("seed", 0)
    checks: dict[str, Callable[[Any, str], Any]] = {
        "role": lambda one, at: check_role(one, where=at),
        "words": _words,
        "segment": _segment,
        "random_like": inner,
        "all_but_top": _count,
        "all_but_random": _count,
        "camera": _name,
        "patches": _patches,
        "box": _box,
        "overlap": _share,
        "layers": _layers,
        "seed": seed_of_people,
    }
    for key, one in selector.items():
        selector[key] = checks[key](one, f"{where}.{key}")
    part = "patches" if "patches" in known["camera"] else "box"
    for like in selector.get("random_like", ()):
        if "camera" in like and "role" not in like and part not in like:
            raise ConfigError(
                f"{where}.random_like: got all of camera {like['camera']}, expected a part of it ({part} or "
                "a role): nothing of it is left to choose from; another camera is the control of a camera"
            )
        if not any(key in like for key in _OF_PATCHES):
            raise ConfigError(
                f"{where}.random_like: got {like!r}, expected a camera or a role: only patches of a picture "
                "have others of their kind to take in their place"
            )
    return selector


def seed_of_people(value: Any, where: str) -> int:
    """Return a seed: a whole number from 0 to 2^32 - 1.

    Raises:
        ConfigError: it is something else.
    """
    if not is_number(value) or not 0 <= value < 2**32:
        raise ConfigError(f"{where}: got {value!r}, expected a whole number from 0 to {2**32 - 1}")
    return int(value)


def _count(value: Any, where: str) -> int:
    if not is_number(value) or value < 1:
        raise ConfigError(f"{where}: got {value!r}, expected a number of patches, from 1")
    return int(value)


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: got {value!r}, expected the name of a camera of the policy")
    return value


def _segment(value: Any, where: str) -> str:
    if value not in SEGMENTS:
        raise ConfigError(f"{where}: got {value!r}, expected one of {', '.join(SEGMENTS)}")
    found: str = value
    return found


def _words(value: Any, where: str) -> list[str]:
    given = [value] if isinstance(value, str) else value
    ok = isinstance(given, Sequence) and given and all(isinstance(one, str) and one.split() for one in given)
    if not ok:
        raise ConfigError(f"{where}: got {value!r}, expected a list of words of the task")
    return list(given)


def _patches(value: Any, where: str) -> list[list[int]]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ConfigError(f"{where}: got {value!r}, expected a list of [row, column]")
    for patch in value:
        is_pair = isinstance(patch, Sequence) and len(patch) == 2 and all(map(is_number, patch))
        if not is_pair or min(patch) < 0:
            raise ConfigError(f"{where}: got {patch!r}, expected [row, column] of a patch, each from 0")
    return [[int(row), int(column)] for row, column in value]


def _box(value: Any, where: str) -> list[float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 4:
        raise ConfigError(f"{where}: got {value!r}, expected [top, left, bottom, right] as fractions")
    for one in value:
        if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one <= 1:
            raise ConfigError(f"{where}: got {one!r}, expected fractions from 0 to 1 of the picture's sides")
    top, left, bottom, right = map(float, value)
    if top >= bottom or left >= right:
        raise ConfigError(f"{where}: got {value!r}, expected top < bottom and left < right")
    return [top, left, bottom, right]


def _share(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigError(f"{where}: got {value!r}, expected a share of a patch, above 0 and at most 1")
    return float(value)


def _layers(value: Any, where: str) -> str | list[int]:
    return numbers(value, where)


def numbers(value: Any, where: str) -> str | list[int]:
    """Return "all" or a list of whole numbers; negative ones count from the end.

    Raises:
        ConfigError: it is something else.
    """
    if value == "all":
        return "all"
    given = [value] if is_number(value) else value
    is_list = isinstance(given, Sequence) and not isinstance(given, str)
    if not is_list or not given or not all(map(is_number, given)):
        raise ConfigError(f"{where}: got {value!r}, expected 'all' or a list of numbers")
    return [int(one) for one in given]


def _in_words(selector: Selector) -> str:
    if "role" in selector:
        at = f" in {selector['camera']}" if "camera" in selector else ""
        return f"the {selector['role']}{at}"
    if "words" in selector:
        return "the word(s) " + ", ".join(f'"{word}"' for word in selector["words"])
    if "segment" in selector:
        names = {"text": "the whole prompt", "image": "all cameras", "task": "the words of the task"}
        return names.get(selector["segment"], f"the {selector['segment']}")
    if "random_like" in selector:
        return f"as much elsewhere as {words_of(selector['random_like'])} (seed {selector['seed']})"
    if "all_but_top" in selector:
        return f"all patches but the {selector['all_but_top']} most attended"
    if "all_but_random" in selector:
        return f"all patches but {selector['all_but_random']} random ones (seed {selector['seed']})"
    if "patches" in selector:
        return f"{len(selector['patches'])} patches of {selector['camera']}"
    if "box" in selector:
        return f"the box {selector['box']} of {selector['camera']}"
    return f"camera {selector['camera']}"
