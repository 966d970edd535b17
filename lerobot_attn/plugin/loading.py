"""The plugin's start: LeRobot's loader imports it in every command, and it acts in `lerobot-eval` alone.

There too only once `--eval.save_attention_maps=true` is given: otherwise the original `eval_main` runs with
the config that it would have had without this package.
"""

from __future__ import annotations

import inspect
import logging
import sys
from pathlib import Path
from typing import Any

from lerobot_attn.plugin.command_line import asks_for_attention
from lerobot_attn.plugin.compatibility import EVAL_MODULE, FLAG, check_lerobot, incompatible
from lerobot_attn.plugin.eval import install

logger = logging.getLogger(__name__)


def load() -> None:
    """Register the demo policies, and install the options if `lerobot-eval` is what is being started.

    Raises:
        SystemExit: attention capture is asked for on the command line, but cannot be offered. LeRobot's
            loader swallows exceptions; this one it does not.
    """
    import lerobot_attn.demo.configuration_pi0_tiny
    import lerobot_attn.demo.configuration_pi05_tiny
    import lerobot_attn.demo.configuration_smolvla_tiny  # noqa: F401  each registers its policy type

    namespace = _running_eval_namespace()
    asked = asks_for_attention(sys.argv[1:])
    if namespace is None:
        if asked:
            sys.exit(f"error: --eval.{FLAG} works with lerobot-eval, not with {Path(sys.argv[0]).name}")
        return
    problems = check_lerobot(namespace)
    if not problems:
        install(namespace)
    elif asked:
        sys.exit(f"error: {incompatible(problems)}")
    elif {"--help", "-h"} & set(sys.argv[1:]):
        logger.warning("--eval.%s is not available: %s", FLAG, incompatible(problems))


def _running_eval_namespace() -> dict[str, Any] | None:
    """Return the globals of the evaluation script if its `main` is what called the plugin loader."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "main":
            spec = frame.f_globals.get("__spec__")
            if EVAL_MODULE in (frame.f_globals.get("__name__"), getattr(spec, "name", None)):
                return frame.f_globals
        frame = frame.f_back
    return None
