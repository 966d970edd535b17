"""Pi0.5: the prompt carries the state as digits; all suffix tokens are actions.

The flow time enters through AdaRMS and has no token.
"""

from __future__ import annotations

from typing import ClassVar

from lerobot_attn.policies.base import ParsedPrompt
from lerobot_attn.policies.paligemma import PaliGemmaAdapter
from lerobot_attn.policies.prompts import TaskAndState

# "Task: pick up the soup, State: 128 97 …;\nAction: ", as Pi05PrepareStateTokenizerProcessorStep writes it.
_PROMPT = TaskAndState(closing="Action:")


class Pi05Adapter(PaliGemmaAdapter):
    """Adapter of `PI05Policy` and policies derived from it."""

    policy_types: ClassVar[tuple[str, ...]] = ("pi05",)

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        """Find the task's words and the state's numbers in `Task: …, State: 128 97 …; Action: `.

        A prompt whose end was cut off still has its words, and those of its numbers that are left.
        """
        return _PROMPT.parse(prompt)
