"""Watch a policy and hand out one `InferenceRecord` per action chunk: see `capture_attention`."""

from lerobot_attn.capture.copies import HostCopies
from lerobot_attn.capture.record import InferenceRecord, PromptLabels, Selection
from lerobot_attn.capture.session import AttentionCapture, capture_attention
from lerobot_attn.prompt import find_tokenizer

__all__ = [
    "AttentionCapture",
    "HostCopies",
    "InferenceRecord",
    "PromptLabels",
    "Selection",
    "capture_attention",
    "find_tokenizer",
]
