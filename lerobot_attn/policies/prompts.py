"""How families write their prompts: the task's words and the state's numbers, by their characters."""

from __future__ import annotations

import re

from lerobot_attn.layout import Kind
from lerobot_attn.policies.base import ParsedPrompt
from lerobot_attn.prompt import TextSpan

# "<bos>" or "<|im_start|>", as tokenizers open a prompt, then the task, then the newline that LeRobot adds.
_TASK_LINE = re.compile(r"(?:<\|?\w+\|?>)*(?P<task>.*?)(?P<end>\n?)\Z", re.DOTALL)


def spans_of(match: re.Match[str], group: str, kind: Kind, pattern: str) -> list[TextSpan]:
    """Return what a pattern finds in a group of a match, numbered; nothing if the group is not there."""
    offset = match.start(group) if group in match.groupdict() else 0
    return [
        TextSpan(kind, offset + part.start(), offset + part.end(), index)
        for index, part in enumerate(re.finditer(pattern, match.groupdict().get(group) or ""))
    ]


def parse_task_line(prompt: str) -> ParsedPrompt | None:
    r"""Find the task's words in a prompt that is the task and a newline, as Pi0 and SmolVLA write it.

    Any text may be a task. Without its newline the prompt's end was cut off.
    """
    match = _TASK_LINE.match(prompt)
    if match is None:
        return None
    return ParsedPrompt(spans_of(match, "task", Kind.TASK, r"\S+"), is_truncated=not match["end"])


class TaskAndState:
    r"""Finds the task's words and the state's numbers in `Task: pick up the soup, State: 128 97 …;\n`.

    Where LeRobot has cut its end off, in the task or among the numbers, the rest is still understood.

    Args:
        closing: what stands behind the semicolon and blanks, e.g. "Action:".
    """

    def __init__(self, closing: str):
        start, state = r"Task: (?P<task>.*), State:", r"(?P<state>(?: +-?\d{})*) *"
        cut = _start_of(closing.rstrip(":"))
        self._whole = re.compile(rf"{start}{state.format('+')};\s*{re.escape(closing)}", re.DOTALL)
        self._cut = (
            re.compile(rf"{start}{state.format('*')}(?:;\s*{cut})?\Z", re.DOTALL),
            re.compile(rf"Task: (?P<task>.*?){_start_of(', State')}\Z", re.DOTALL),
        )

    def parse(self, prompt: str) -> ParsedPrompt | None:
        """Return the words and numbers, also those that are left of a prompt that was cut; None of others."""
        whole = self._whole.search(prompt)
        match = whole or next(filter(None, (pattern.search(prompt) for pattern in self._cut)), None)
        if match is None:
            return None
        words = spans_of(match, "task", Kind.TASK, r"\S+")
        numbers = spans_of(match, "state", Kind.STATE, r"-?\d+")
        return ParsedPrompt([*words, *numbers], is_truncated=whole is None)


def _start_of(text: str) -> str:
    """Return a pattern that matches any beginning of a text, also none of it."""
    return f"(?:{re.escape(text[0])}{_start_of(text[1:])})?" if text else ""
