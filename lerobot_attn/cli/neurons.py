"""The group of commands about neurons, to which the modules beside this one add theirs."""

from __future__ import annotations

import typer

from lerobot_attn.cli.app import app

neurons = typer.Typer(
    no_args_is_help=True, help="Find neurons of the feed-forward layers, and ask what they say."
)
app.add_typer(neurons, name="neurons")
