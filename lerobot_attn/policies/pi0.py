"""Pi0: the prompt is the task alone; the state is a token of its own, which opens the suffix.

So suffix query 0 is the state, and action i is query i + 1. The flow time is mixed into the action tokens and
has no token.
"""

from __future__ import annotations

from typing import ClassVar

from lerobot_attn.policies.base import ParsedPrompt
from lerobot_attn.policies.paligemma import PaliGemmaAdapter
from lerobot_attn.policies.prompts import parse_task_line


class Pi0Adapter(PaliGemmaAdapter):
    """Adapter of `PI0Policy` and policies derived from it."""

    policy_types: ClassVar[tuple[str, ...]] = ("pi0",)
    suffix_opening: ClassVar[tuple[tuple[str, str, int], ...]] = (("state", "state", 1),)

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        r"""Find the task's words in `task\n`."""
        return parse_task_line(prompt)
