"""What LeRobot's plugin loader imports, because of its name. Everything is in `lerobot_attn.plugin`."""

from lerobot_attn.plugin import load

load()
