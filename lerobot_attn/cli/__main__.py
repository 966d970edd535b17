"""`python -m lerobot_attn.cli`."""

from lerobot_attn.cli import main

main()
