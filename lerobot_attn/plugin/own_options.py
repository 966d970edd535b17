"""Options of this package's own commands that are written as LeRobot writes them: `--section.name=value`.

Knows the sections by their names, and the fields of the attention settings. Starts nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import ConfigError


def by_section(arguments: Sequence[str], sections: Sequence[str]) -> dict[str, list[str]]:
    """Sort options by their section, and leave its name out.

    Args:
        arguments: `--section.name=value` or `--section.name value`; `--section=value` keeps an empty name.
        sections: the sections that there are.

    Returns:
        Section → its options as `--name=value`, in their order.

    Raises:
        ConfigError: an argument is none of these.
    """
    found: dict[str, list[str]] = {section: [] for section in sections}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        section, _, name = option.removeprefix("--").partition(".")
        if not option.startswith("--") or section not in found:
            expected = " or ".join(f"--{section}.name=value" for section in sections)
            raise ConfigError(f"{argument}: no such option, expected {expected}, or one that --help lists")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{argument}: got no value, expected {argument}=value")
            value = rest.pop(0)
        found[section].append(f"--{name}={value}")
    return found


def attention_config(options: Sequence[str]) -> AttentionConfig:
    """Return the attention settings of `--name=value` options; `--=FILE` reads a YAML file of them.

    Later options override earlier ones.

    Raises:
        ConfigError: an unknown name, a value out of range, or a file that cannot be read.
    """
    values: dict[str, Any] = {}
    for option in options:
        name, _, text = option.removeprefix("--").partition("=")
        if not name:
            values |= AttentionConfig.from_yaml(text).to_dict()
            continue
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--attention.{name}: got {text!r}, expected a value as YAML has it") from error
    return AttentionConfig.from_dict(values, where="--attention")


def rename_map(text: str | None) -> Mapping[str, str]:
    """Return what `--rename` says: a data set's or an environment's name of a feature → the policy's.

    Raises:
        ConfigError: it is no JSON object of names.
    """
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ConfigError(
            f"--rename: got {text!r}, expected JSON such as "
            """'{"observation.images.front": "observation.images.image"}'"""
        )
    return found
