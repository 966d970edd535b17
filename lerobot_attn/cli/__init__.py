"""The `lerobot-attn` command. Each command parses its options and makes one call into the package."""

from __future__ import annotations

import sys

from lerobot_attn.cli import (
    evidence,
    explore,
    hub,
    look,
    masks,
    neuron_contrast,
    neuron_words,
    places,
    record,
    rerun,
    runs,
    saliency,
    setup,
    summarise,
)
from lerobot_attn.cli.app import app
from lerobot_attn.cli.messages import any_text_can_be_printed
from lerobot_attn.errors import LerobotAttnError

__all__ = [
    "app",
    "evidence",
    "explore",
    "hub",
    "look",
    "main",
    "masks",
    "neuron_contrast",
    "neuron_words",
    "places",
    "record",
    "rerun",
    "runs",
    "saliency",
    "setup",
    "summarise",
]


def main() -> None:
    """Run the command line; errors of ours are one line on stderr and exit status 1."""
    any_text_can_be_printed()
    try:
        app()
    except LerobotAttnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
