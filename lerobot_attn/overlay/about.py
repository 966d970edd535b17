"""What a reader of an episode's heatmaps has to know, in words. Draws nothing and knows no format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lerobot_attn.analysis.select import MEANS
from lerobot_attn.analysis.spatial import NORMALISATIONS
from lerobot_attn.analysis.tokens import prompt_truncated
from lerobot_attn.figures.canvas import store_name
from lerobot_attn.figures.fonts import one_line
from lerobot_attn.overlay.settings import RerunSettings
from lerobot_attn.store.reader import Episode


def about(
    episode: Episode, attrs: dict[str, Any], settings: RerunSettings, vmax: float, has_cameras: bool
) -> Iterator[str]:
    """Yield what a reader of the maps has to know, a line each: what is shown, in which colours, remarks.

    Args:
        episode: the episode.
        attrs: of what `analysis` returned: `layer`, `denoise_step`, `head`, `query`, `source`, ….
        settings: which maps are shown, and how.
        vmax: where the colours end.
        has_cameras: whether there are heatmaps at all.
    """
    outcome = {True: ", success", False: ", failure", None: ""}[episode.success]
    yield f"{store_name(episode.path)}{outcome}{'' if episode.is_complete else ', incomplete'}"
    yield f"task: {one_line(episode.task)}"
    if episode.condition.line:
        yield one_line(episode.condition.line)
    if episode.policy_remark:
        yield one_line(episode.policy_remark)
    chosen = [str(attrs.get(name, "")) for name in ("layer", "denoise_step", "head", "query", "left_out")]
    chosen.append("from stored means" if attrs.get("source") == MEANS else "")
    yield "shown: " + ", ".join(part for part in chosen if part)
    if has_cameras:
        whole = "" if episode.is_complete else ", by the frames so far"
        yield f"colours: {NORMALISATIONS[settings.normalisation]}, 0 to {100 * vmax:.3g} %{whole}"
    if prompt_truncated(episode.arrays).any():
        yield "prompt truncated: it did not fit the policy's slots, so its end is missing"
    yield "predicted actions are in the policy's normalised units, actions sent in the environment's"
