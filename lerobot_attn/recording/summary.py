"""What became of the episodes of a task or a loop, as one line and as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lerobot_attn.recording.plan import EpisodeResult
from lerobot_attn.sizes import format_bytes


@dataclass(frozen=True)
class TaskSummary:
    """What became of a task's episodes."""

    name: str
    saved: tuple[EpisodeResult, ...]
    not_saved: tuple[EpisodeResult, ...]
    stored_bytes: int
    waited_s: float

    @property
    def paths(self) -> list[str]:
        """Stores that are complete."""
        return [str(result.path) for result in self.saved]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `eval_info.json`."""
        return {
            "n_saved": len(self.saved),
            "n_kept": sum(r.kept for r in self.saved),
            "n_not_saved": len(self.not_saved),
            "not_saved": [
                {"episode": r.index, "reason": r.reason, "path": None if r.path is None else str(r.path)}
                for r in self.not_saved
            ],
            "stored_bytes": self.stored_bytes,
            "raw_bytes": sum(r.raw_bytes for r in self.saved),
            "waited_for_writer_s": round(self.waited_s, 3),
        }

    def line(self) -> str:
        """Return the one line that is printed at the task's end."""
        n = len(self.saved) + len(self.not_saved)
        raw = sum(r.raw_bytes for r in self.saved)
        n_kept = sum(r.kept for r in self.saved)
        kept = f" ({n_kept} of them before)" if n_kept else ""
        ratio = f", {raw / self.stored_bytes:.1f}x compressed" if self.stored_bytes else ""
        text = (
            f"Attention of {self.name}: {len(self.saved)} of {n} episodes saved{kept}, "
            f"{sum(r.n_inferences for r in self.saved)} inferences, "
            f"{format_bytes(self.stored_bytes)}{ratio}; "
            f"waited {self.waited_s:.1f} s for the writer"
        )
        reasons = sorted({f"episode {r.index}: {r.reason}" for r in self.not_saved})
        return text + ("; not saved: " + "; ".join(reasons) if reasons else "")
