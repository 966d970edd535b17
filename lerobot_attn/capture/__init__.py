"""Watch a policy and hand out one `InferenceRecord` per action chunk: see `capture_attention`."""

from lerobot_attn.capture.session import (
    AttentionCapture,
    HostCopies,
    InferenceRecord,
    Selection,
    capture_attention,
    find_tokenizer,
)

__all__ = [
    "AttentionCapture",
    "HostCopies",
    "InferenceRecord",
    "Selection",
    "capture_attention",
    "find_tokenizer",
]
