"""The `lerobot-attn` command itself, to which the modules beside this one add theirs."""

from __future__ import annotations

from typing import Annotated

import typer

from lerobot_attn import __version__

app = typer.Typer(
    name="lerobot-attn",
    help="See what a vision-language-action policy attends to.\n\n"
    "Record with: lerobot-eval --eval.save_attention_maps=true …",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
