"""The plugin inside LeRobot's own commands: the only room that reaches into `lerobot.scripts`."""

from lerobot_attn.plugin.command_line import attention_options, expand_attention_file
from lerobot_attn.plugin.compatibility import (
    EVAL_MODULE,
    FLAG,
    PATCH_POINTS,
    check_lerobot,
    check_rollout,
)
from lerobot_attn.plugin.eval import install, recording
from lerobot_attn.plugin.loading import load
from lerobot_attn.plugin.rollout import install_rollout

__all__ = [
    "EVAL_MODULE",
    "FLAG",
    "PATCH_POINTS",
    "attention_options",
    "check_lerobot",
    "check_rollout",
    "expand_attention_file",
    "install",
    "install_rollout",
    "load",
    "recording",
]
