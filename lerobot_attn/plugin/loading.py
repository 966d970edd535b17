"""The plugin's start: LeRobot's loader imports it in every command, and it acts in two of them.

In `lerobot-eval` and `lerobot-rollout`, and there only once `--eval.save_attention_maps=true` or
`--save_attention_maps=true` is given: otherwise their original functions run as without this package.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lerobot_attn.plugin.command_line import asks_for_attention
from lerobot_attn.plugin.compatibility import (
    EVAL_MODULE,
    FLAG,
    ROLLOUT_MODULE,
    check_lerobot,
    check_rollout,
    incompatible,
)
from lerobot_attn.plugin.eval import install
from lerobot_attn.plugin.rollout import install_rollout

logger = logging.getLogger(__name__)

_Check = Callable[[dict[str, Any]], list[str]]
_SCRIPTS: dict[str, tuple[_Check, Callable[[dict[str, Any]], None]]] = {
    EVAL_MODULE: (check_lerobot, install),
    ROLLOUT_MODULE: (check_rollout, install_rollout),
}


def load() -> None:
    """Register the demo policies, and install the options if `lerobot-eval` is what is being started.

    Raises:
        SystemExit: attention capture is asked for on the command line, but cannot be offered. LeRobot's
            loader swallows exceptions; this one it does not.
    """
    import lerobot_attn.demo.configuration_pi0_tiny
    import lerobot_attn.demo.configuration_pi05_tiny
    import lerobot_attn.demo.configuration_smolvla_tiny  # noqa: F401  each registers its policy type

    running = _running_script()
    asked = asks_for_attention(sys.argv[1:])
    if running is None:
        if asked:
            sys.exit(
                f"error: --eval.{FLAG} works with lerobot-eval and --{FLAG} with lerobot-rollout, not with "
                f"{Path(sys.argv[0]).name}"
            )
        return
    module, namespace = running
    check, install_in = _SCRIPTS[module]
    problems = check(namespace)
    if not problems:
        install_in(namespace)
    elif asked:
        sys.exit(f"error: {incompatible(problems)}")
    elif {"--help", "-h"} & set(sys.argv[1:]):
        logger.warning("%s is not available: %s", FLAG, incompatible(problems))


def _running_script() -> tuple[str, dict[str, Any]] | None:
    """Return the module and the globals of the script whose `main` called the plugin loader."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "main":
            spec = getattr(frame.f_globals.get("__spec__"), "name", None)
            for module in _SCRIPTS:
                if module in (frame.f_globals.get("__name__"), spec):
                    return module, frame.f_globals
        frame = frame.f_back
    return None
