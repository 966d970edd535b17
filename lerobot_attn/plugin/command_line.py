"""The attention options as text: on the command line, and in the YAML file that it names.

Knows how LeRobot's parser wants options written. Starts nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lerobot_attn.errors import ConfigError
from lerobot_attn.plugin.compatibility import FLAG


class Options(NamedTuple):
    """How a script's attention options are written, without the dashes; "" where it has no such option."""

    flag: str
    attention: str
    interventions: str
    render: str = ""
    first: str = ""


EVAL = Options(f"eval.{FLAG}", "eval.attention", "eval.interventions", "eval.render", "eval.first_episode")
ROLLOUT = Options(FLAG, "attention", "interventions")


def asks_for_attention(argv: Sequence[str]) -> bool:
    """Whether the command line, or the config file that it names, mentions the options of any script."""
    from lerobot.configs import parser

    named = tuple(f"--{name}" for options in (EVAL, ROLLOUT) for name in options if name)
    if any(arg.startswith(named) for arg in argv):
        return True
    config_path = parser.parse_arg("config_path", argv)
    try:
        return config_path is not None and FLAG in Path(config_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False  # LeRobot will say what is wrong with it


def expand_attention_file(argv: Sequence[str], options: Options = EVAL) -> list[str]:
    """Replace `--eval.attention=FILE` by the options that the YAML file holds; later options override them.

    What stands in braces after `--eval.interventions` is quoted, for LeRobot's parser would take it apart.

    Args:
        argv: the command line's arguments.
        options: how they are written there.

    Raises:
        ConfigError: the file cannot be read or holds something else than attention settings.
    """
    from lerobot_attn.config import AttentionConfig

    option, acted = f"--{options.attention}", f"--{options.interventions}"
    expanded: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == option:
            path = next(arguments, None)
        elif argument.startswith(f"{option}="):
            path = argument.partition("=")[2]
        elif argument == acted or argument.startswith(f"{acted}="):
            text = argument.partition("=")[2] if "=" in argument else next(arguments, "")
            expanded.append(f"{acted}={json.dumps(text) if text.lstrip().startswith('{') else text}")
            continue
        else:
            expanded.append(argument)
            continue
        if not path:
            raise ConfigError(f"{option}: got nothing, expected a YAML file of attention settings")
        expanded += attention_options(AttentionConfig.from_yaml(path).to_dict(), options)
    return expanded


def attention_options(settings: dict[str, Any], options: Options = EVAL) -> list[str]:
    """Return settings as `--eval.attention.name=value` options; unset ones are left out."""
    from lerobot_attn.plugin.launch import option_text

    return [
        f"--{options.attention}.{name}={option_text(value)}"
        for name, value in settings.items()
        if value is not None
    ]
