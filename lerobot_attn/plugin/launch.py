"""Turn composed settings into a `lerobot-eval` command line, and run it.

The command line is the whole interface to LeRobot here: what is printed is what runs.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import ConfigError

SECTIONS = ("policy", "env", "eval", "capture", "output_dir", "seed", "job_name")


def eval_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Return the options of `lerobot-eval` for composed settings; unset (null) ones are left to LeRobot.

    Args:
        settings: sections `policy`, `env` and `eval` as LeRobot names their fields; `capture`, the attention
            settings, or null to evaluate without capture; `output_dir`, `seed` and `job_name`.

    Raises:
        ConfigError: an unknown section or attention setting, or no policy path.
    """
    unknown = sorted(set(settings) - set(SECTIONS))
    if unknown:
        raise ConfigError(f"unknown section {unknown[0]!r}; expected one of {', '.join(SECTIONS)}")
    if not (settings.get("policy") or {}).get("path"):
        raise ConfigError(
            "policy.path: not given, expected a checkpoint's folder or Hub name; add policy.path=…"
        )
    arguments: list[str] = []
    for section in ("policy", "env", "eval"):
        arguments += [
            f"--{name}={option_text(value)}" for name, value in _flatten(section, settings.get(section))
        ]
    capture = settings.get("capture")
    if capture is not None:
        AttentionConfig.from_dict(dict(capture), where="capture")
        arguments.append("--eval.save_attention_maps=true")
        arguments += [f"--{name}={option_text(value)}" for name, value in _flatten("eval.attention", capture)]
    for name in ("output_dir", "seed", "job_name"):
        if settings.get(name) is not None:
            arguments.append(f"--{name}={option_text(settings[name])}")
    return arguments


def launch_eval(arguments: list[str]) -> int:
    """Print the equivalent `lerobot-eval` command, run it as a process, and return its exit status."""
    print("lerobot-eval " + " ".join(shlex.quote(argument) for argument in arguments), flush=True)
    return subprocess.run(
        [sys.executable, "-m", "lerobot.scripts.lerobot_eval", *arguments], check=False
    ).returncode


def _flatten(prefix: str, values: Any) -> Iterator[tuple[str, Any]]:
    for name, value in (values or {}).items():
        if isinstance(value, Mapping):
            yield from _flatten(f"{prefix}.{name}", value)
        elif value is not None:
            yield f"{prefix}.{name}", value


def option_text(value: Any) -> str:
    """Return a value as the option parser of LeRobot reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)
