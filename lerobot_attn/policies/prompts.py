"""How families write their prompts: the words of the task, by their characters."""

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
