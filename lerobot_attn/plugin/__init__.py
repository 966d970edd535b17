"""The plugin inside LeRobot's own commands: the only room that reaches into `lerobot.scripts`."""

from lerobot_attn.plugin.compatibility import EVAL_MODULE, FLAG, PATCH_POINTS, check_lerobot
from lerobot_attn.plugin.wrappers import (
    attention_options,
    expand_attention_file,
    install,
    load,
    recording,
)

__all__ = [
    "EVAL_MODULE",
    "FLAG",
    "PATCH_POINTS",
    "attention_options",
    "check_lerobot",
    "expand_attention_file",
    "install",
    "load",
    "recording",
]
