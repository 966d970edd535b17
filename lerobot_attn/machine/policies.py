"""What is offered for each policy type of the LeRobot that is installed here."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from lerobot_attn.errors import SetupError


def print_policies(console: Console) -> None:
    """Print which registered policy types are captured, edited and compiled, and why others are not.

    Raises:
        SetupError: LeRobot is not installed.
    """
    try:
        from lerobot_attn.plugin.registry import policy_table

        rows = policy_table()
    except ModuleNotFoundError as error:
        raise SetupError(
            f"{error.name} is not installed, expected LeRobot, whose policies are listed; "
            "pip install 'lerobot_policy_attn[eval]'"
        ) from error
    captured = Table("captured", "attention", "edited", "stays compiled", box=box.SIMPLE_HEAD)
    others = Table("not captured", "why not", box=box.SIMPLE_HEAD)
    for row in rows:
        if row.why_not:
            others.add_row(row.policy_type, row.why_not)
        else:
            captured.add_row(*row[:4])
    console.print(captured)
    console.print(others)
