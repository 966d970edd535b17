"""What checks found of an episode, as plain values and as a table. Checks nothing itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lerobot_attn.errors import RANDOM_WEIGHTS, Check
from lerobot_attn.store.damage import Damage
from lerobot_attn.store.url import Place


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_episode` found.

    Attributes:
        path: the store.
        checks: in the order in which they were made.
        random_weights: whether the policy was a demo whose maps mean nothing.
        damaged: everything that cannot be read as it was written, which the check "chunks" sums up.
        policy_remark: one line on the policy that belongs beside its maps.
        condition: what was done to the policy; "" where nothing was.
    """

    path: Place
    checks: tuple[Check, ...]
    random_weights: bool
    damaged: tuple[Damage, ...] = ()
    policy_remark: str = ""
    condition: str = ""

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "path": str(self.path),
            "passed": self.passed,
            "random_weights": self.random_weights,
            "policy_remark": self.policy_remark,
            "condition": self.condition,
            "checks": [
                {"name": check.name, "passed": check.passed, "detail": check.detail} for check in self.checks
            ],
            "damaged": [damage.to_dict() for damage in self.damaged],
        }

    def render(self, console: Console) -> None:
        """Print the checks as a table, and the verdict."""
        words = {True: "[green]passed[/green]", False: "[bold red]FAILED[/bold red]", None: "skipped"}
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("check", no_wrap=True)
        table.add_column("result", no_wrap=True)
        table.add_column("found", overflow="fold")
        for check in self.checks:
            table.add_row(check.name, words[check.passed], escape(check.detail))
        console.print(table)
        for damage in self.damaged:
            console.print(Text(f"damaged: {damage}", style="red"))
        counts = [sum(check.passed is value for check in self.checks) for value in (True, False, None)]
        text = f"{self.path}: {counts[0]} checks passed, {counts[1]} failed, {counts[2]} skipped"
        console.print(Text(text, style="green" if self.passed else "bold red"))
        if self.random_weights:
            console.print(Text(RANDOM_WEIGHTS, style="yellow"))
        if self.condition:
            console.print(Text(f"condition: {self.condition}", style="yellow"))
        if self.policy_remark:
            console.print(Text(self.policy_remark, style="dim"))
