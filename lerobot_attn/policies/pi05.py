"""Pi0.5: the prompt carries the state as digits; all suffix tokens are actions.

The flow time enters through AdaRMS and has no token.
"""

from __future__ import annotations

import re
from typing import ClassVar

from lerobot_attn.layout import Kind
from lerobot_attn.policies.base import ParsedPrompt
from lerobot_attn.policies.paligemma import PaliGemmaAdapter
from lerobot_attn.policies.prompts import spans_of


def _start_of(text: str) -> str:
    """Return a pattern that matches any beginning of a text, also none of it."""
    return f"(?:{re.escape(text[0])}{_start_of(text[1:])})?" if text else ""


# "Task: pick up the soup, State: 128 97 …;\nAction: ", as Pi05PrepareStateTokenizerProcessorStep writes it.
# Where LeRobot has cut its end off, in the task or among the numbers, the rest is still understood.
_WHOLE = re.compile(r"Task: (?P<task>.*), State:(?P<state>(?: +-?\d+)*) *;\s*Action:", re.DOTALL)
_CUT_IN_STATE = re.compile(
    rf"Task: (?P<task>.*), State:(?P<state>(?: +-?\d*)*) *(?:;\s*{_start_of('Action')})?\Z", re.DOTALL
)
_CUT_IN_TASK = re.compile(rf"Task: (?P<task>.*?){_start_of(', State')}\Z", re.DOTALL)


class Pi05Adapter(PaliGemmaAdapter):
    """Adapter of `PI05Policy` and policies derived from it."""

    policy_types: ClassVar[tuple[str, ...]] = ("pi05",)

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        """Find the task's words and the state's numbers in `Task: …, State: 128 97 …; Action: `.

        A prompt whose end was cut off still has its words, and those of its numbers that are left.
        """
        whole = _WHOLE.search(prompt)
        match = whole or _CUT_IN_STATE.search(prompt) or _CUT_IN_TASK.search(prompt)
        if match is None:
            return None
        words = spans_of(match, "task", Kind.TASK, r"\S+")
        numbers = spans_of(match, "state", Kind.STATE, r"-?\d+")
        return ParsedPrompt([*words, *numbers], is_truncated=whole is None)
