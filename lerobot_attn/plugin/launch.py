"""Turn composed settings into a `lerobot-eval` command line, and run it.

The command line is the whole interface to LeRobot here: what is printed is what runs. Which fields LeRobot
has is not known here: every name is passed on, and LeRobot refuses those that it does not have.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import yaml

from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import ConfigError
from lerobot_attn.interventions import Condition

_CLUSTER = "pip install '.[cluster]' brings it"
# A launcher of configs/hydra/launcher → its package, and what to do where that is missing.
_LAUNCHERS = {
    "submitit_slurm": ("hydra_submitit_launcher", _CLUSTER),
    "submitit_local": ("hydra_submitit_launcher", _CLUSTER),
    "joblib": ("hydra_joblib_launcher", _CLUSTER),
    "ray": (
        "hydra_ray_launcher",
        "pip install '.[ray]' && pip install --no-deps hydra-ray-launcher==1.2.2 bring it",
    ),
}
_SECTIONS = ("policy", "env", "eval", "capture", "intervention")
# LeRobot looks these options up on the command line before it parses it, so they are never quoted.
_READ_AS_TEXT = re.compile(r"config_path|(.*\.)?(path|type|discover_packages_path)")
# What quoted YAML holds only as an escape: control characters, surrogates, other kinds of line break.
_ONLY_ESCAPED = re.compile("[^\t -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def eval_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Return the options of `lerobot-eval` for composed settings; unset (null) ones are left to LeRobot.

    Args:
        settings: LeRobot's own fields by their names: the sections `policy`, `env` and `eval`, and top-level
            ones such as `output_dir`, `seed` or `rename_map`. Besides, `capture`: the attention settings, or
            null to evaluate without capture; and `intervention`, a condition: what is done to the policy.

    Raises:
        ConfigError: an unknown attention setting or intervention, no policy path, a section that is no
            mapping, or text that LeRobot's parser would take for the name of a file.
    """
    for section in _SECTIONS:
        if not isinstance(settings.get(section) or {}, Mapping):
            raise ConfigError(f"{section}: got {settings[section]!r}, expected a mapping of its fields")
    if not (settings.get("policy") or {}).get("path"):
        raise ConfigError(
            "policy.path: not given, expected a checkpoint's folder or Hub name; add policy.path=…"
        )
    options: list[tuple[str, Any]] = []
    for section in ("policy", "env", "eval"):
        options += _fields(section, settings.get(section))
    options = [(name, [value]) if _is_task_number(name, value) else (name, value) for name, value in options]
    capture = settings.get("capture")
    if capture is not None:
        AttentionConfig.from_dict(dict(capture), where="capture")
        options.append(("eval.save_attention_maps", True))
        options += _fields("eval.attention", capture)
    intervention = settings.get("intervention")
    if intervention:
        condition = Condition.from_dict(dict(intervention), where="intervention")
        options.append(("eval.interventions", condition.to_dict()))
    # The usual ones first, so that the command's end says where the results go.
    names = dict.fromkeys(["output_dir", "seed", "job_name", *settings])
    options += [
        (name, settings[name]) for name in names if name not in _SECTIONS and settings.get(name) is not None
    ]
    return [_argument(name, value) for name, value in options]


def check_launcher(arguments: Sequence[str]) -> None:
    """Check that the launcher that Hydra is told to use is installed.

    Args:
        arguments: of the command line; `hydra/launcher=NAME` among them names one.

    Raises:
        ConfigError: it is not.
    """
    for name in (argument.removeprefix("hydra/launcher=") for argument in arguments):
        package, remedy = _LAUNCHERS.get(name, ("", ""))
        if package and f"hydra/launcher={name}" in arguments and not _is_installed(package):
            raise ConfigError(
                f"hydra/launcher={name}: {package.replace('_', '-')} is not installed; {remedy}"
            )


def job_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a job that may be queued again: it goes on with what it has recorded.

    Args:
        settings: as for `eval_arguments`; what they say of `capture.existing` stays.
    """
    capture = settings.get("capture")
    if not isinstance(capture, Mapping):
        return dict(settings)
    return {**settings, "capture": {"existing": "skip", **capture}}


def eval_command(arguments: Sequence[str]) -> str:
    """Return the `lerobot-eval` command as one types it into a shell."""
    return "lerobot-eval " + shlex.join(arguments)


def launch_eval(arguments: list[str]) -> int:
    """Print the equivalent `lerobot-eval` command, run it as a process, and return its exit status.

    Ctrl-C is left to that process, which writes out what it has recorded before it ends. The signals by
    which a cluster ends a job are passed on to it; once it has ended without being done, they do here what
    they would have done (end this process, or let submitit queue the job again). The status of a process
    that a signal ended is 128 and the signal's number, as in a shell.
    """
    print(eval_command(arguments), flush=True)
    with _passing_on() as passing:
        process = subprocess.Popen([sys.executable, "-m", "lerobot.scripts.lerobot_eval", *arguments])
        passing.to(process)
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:  # a terminal sends it to both
                continue
    if status:
        for number in passing.numbers:  # all: SLURM may send SIGTERM besides the one that submitit waits for
            os.kill(os.getpid(), number)
    return status if status >= 0 else 128 - status


class _PassingOn:
    """Passes signals on to a process, also one that came before the process was there."""

    def __init__(self) -> None:
        self.numbers: dict[int, None] = {}  # each once, in the order in which they came
        self._process: subprocess.Popen[bytes] | None = None

    def to(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        for number in self.numbers:
            process.send_signal(number)

    def take(self, number: int, frame: Any) -> None:
        self.numbers[number] = None
        if self._process is not None:
            self._process.send_signal(number)


@contextmanager
def _passing_on() -> Iterator[_PassingOn]:
    passing = _PassingOn()
    names: tuple[str, ...] = ("SIGTERM", "SIGUSR1", "SIGUSR2")
    if threading.current_thread() is not threading.main_thread():
        names = ()  # Python cannot there
    before = {}
    try:
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            before[number] = signal.signal(number, passing.take)
        yield passing
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def option_text(value: Any) -> str:
    """Return a value as the option parser of LeRobot reads it.

    LeRobot parses a policy's options as JSON and all others as YAML. What is returned means the same in both,
    and text that both would leave alone stays as it is.

    Args:
        value: text, a number, a boolean, null, or lists and mappings of these.
    """
    if isinstance(value, str) and _stays_as_it_is(value):
        return value
    return _flow(value)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{package}") is not None
    except ModuleNotFoundError:  # no plugin of Hydra is
        return False


def _is_task_number(name: str, value: Any) -> bool:
    """Say whether this is one task's number, which a sweep over `range(10)` gives; LeRobot takes a list."""
    return name == "env.task_ids" and isinstance(value, int) and not isinstance(value, bool)


def _fields(section: str, values: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a section that are set. A mapping in it is one value: LeRobot takes it whole."""
    for name, value in (values or {}).items():
        if value is not None:
            yield f"{section}.{name}", value


def _argument(name: str, value: Any) -> str:
    if _READ_AS_TEXT.fullmatch(name):
        return f"--{name}={value}"
    if isinstance(value, str) and value.startswith("include"):
        # draccus opens the rest of such a text as a file, however it is quoted.
        raise ConfigError(
            f"{name}: got {value!r}, expected text that does not begin with 'include', because LeRobot's "
            "parser takes that for the name of a file; where it is a path, write ./ before it"
        )
    return f"--{name}={option_text(value)}"


def _stays_as_it_is(text: str) -> bool:
    """Say whether both of LeRobot's parsers give a text back unchanged when it is not quoted."""
    try:
        json.loads(text)
    except ValueError:
        pass
    else:
        return False
    try:
        return bool(yaml.safe_load(text) == text)
    except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
        return False


def _flow(value: Any) -> str:
    """Return a value as JSON that YAML reads the same way."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_quoted(str(name))}: {_flow(item)}" for name, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(_flow(item) for item in value) + "]"
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        # YAML takes 1e-05 for text: it wants a point before the exponent.
        return re.sub(r"^(-?\d+)e", r"\1.0e", json.dumps(value))
    return _quoted(str(value))


def _quoted(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    return _ONLY_ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
