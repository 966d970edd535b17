"""Entry that LeRobot's plugin loader imports; see lerobot_attn.plugin."""
