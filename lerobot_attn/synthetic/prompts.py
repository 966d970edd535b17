"""The prompts of synthetic episodes, in the manner of Pi0.5 or of the task alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.errors import ConfigError
from lerobot_attn.layout import Kind
from lerobot_attn.prompt import TextSpan, label_text
from lerobot_attn.synthetic.plan import SyntheticPlan


class Prompt(NamedTuple):
    """The language slots of one inference; arrays of shape (text,)."""

    pieces: list[str]
    mask: NDArray[np.bool_]
    kind: NDArray[np.int8]
    word: NDArray[np.int16]
    state_dim: NDArray[np.int16]
    is_truncated: bool

    @property
    def words(self) -> list[int]:
        """The words of the task that are left of it, at least in part."""
        return sorted({*self.word.tolist()} - {-1})


def make_prompt(plan: SyntheticPlan, inference: int) -> Prompt:
    """Build a prompt: long words and numbers are several tokens, and numbers change with the inference.

    Raises:
        ConfigError: it is longer than the language slots, and the plan does not let it be cut.
    """
    pieces, spans = ["<bos>"], []

    def add(kind: Kind, ordinal: int, parts: list[str]) -> None:
        start = sum(map(len, pieces))
        pieces.extend(parts)
        spans.append(TextSpan(kind, start, sum(map(len, pieces)), ordinal))

    if plan.state_in_prompt:
        pieces += ["Task", ":"]
    for ordinal, word in enumerate(plan.task.split()):
        add(Kind.TASK, ordinal, [f" {word[:4]}", *([word[4:]] if word[4:] else [])])
    if plan.state_in_prompt:
        pieces += [",", " State", ":"]
        for dim in range(plan.n_state):
            pieces.append(" ")
            add(Kind.STATE, dim, list(str((37 * dim + 13 * inference) % 256)))
        pieces += [";\n", "Action", ":", " "]
    else:
        pieces.append("\n")
    is_truncated = len(pieces) > plan.n_text
    if is_truncated and not plan.cut_prompt:
        raise ConfigError(f"n_text: got {plan.n_text}, expected at least the prompt's {len(pieces)} tokens")
    pieces = pieces[: plan.n_text]
    mask = np.arange(plan.n_text) < len(pieces)
    pieces += [""] * (plan.n_text - len(pieces))
    return Prompt(pieces, mask, *label_text(pieces, mask, spans), is_truncated)


def masked_keys(plan: SyntheticPlan, prompt: Prompt) -> NDArray[np.bool_]:
    """Return (key,) bool: what nobody may attend to: empty cameras, unused slots, padding."""
    layout = plan.layout
    masked = np.isin(layout.key_camera(), np.arange(len(plan.image_px), len(layout.cameras)))
    masked[layout.language.start : layout.language.stop] = ~prompt.mask
    for segment in layout.segments:
        if segment.kind == "padding":
            masked[segment.start : segment.stop] = True
    return masked


def key_kinds(plan: SyntheticPlan, prompt: Prompt) -> NDArray[np.int8]:
    """Return (key,) int8 values of `Kind`."""
    return plan.layout.key_kind(~masked_keys(plan, prompt), prompt.kind)
