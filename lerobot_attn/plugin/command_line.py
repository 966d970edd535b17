"""The attention options as text: on the command line, and in the YAML file that it names.

Knows how LeRobot's parser wants options written. Starts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lerobot_attn.errors import ConfigError
from lerobot_attn.plugin.compatibility import FLAG


def asks_for_attention(argv: Sequence[str]) -> bool:
    """Whether the command line, or the config file that it names, mentions the options."""
    from lerobot.configs import parser

    if any(arg.startswith((f"--eval.{FLAG}", "--eval.attention")) for arg in argv):
        return True
    config_path = parser.parse_arg("config_path", argv)
    try:
        return config_path is not None and FLAG in Path(config_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False  # LeRobot will say what is wrong with it


def expand_attention_file(argv: Sequence[str]) -> list[str]:
    """Replace `--eval.attention=FILE` by the options that the YAML file holds; later options override them.

    Raises:
        ConfigError: the file cannot be read or holds something else than attention settings.
    """
    from lerobot_attn.config import AttentionConfig

    expanded: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--eval.attention":
            path = next(arguments, None)
        elif argument.startswith("--eval.attention="):
            path = argument.partition("=")[2]
        else:
            expanded.append(argument)
            continue
        if not path:
            raise ConfigError("--eval.attention: got nothing, expected a YAML file of attention settings")
        expanded += attention_options(AttentionConfig.from_yaml(path).to_dict())
    return expanded


def attention_options(settings: dict[str, Any]) -> list[str]:
    """Return settings as `--eval.attention.name=value` options; unset ones are left out."""
    from lerobot_attn.plugin.launch import option_text

    return [
        f"--eval.attention.{name}={option_text(value)}"
        for name, value in settings.items()
        if value is not None
    ]
