"""What the caption of a figure says: which episode, frame, layer, step, head, query and normalisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr

from lerobot_attn.analysis import prefix_only_layers
from lerobot_attn.analysis.spatial import NORMALISATIONS
from lerobot_attn.errors import RANDOM_WEIGHTS
from lerobot_attn.figures.canvas import Caption, store_name
from lerobot_attn.plot.settings import PlotSettings
from lerobot_attn.store.reader import Episode

TRUNCATED = "prompt truncated: it did not fit the policy's slots, so its end is missing"


def caption_of(
    episode: Episode,
    chosen: dict[str, Any],
    settings: PlotSettings,
    frames: Any,
    *,
    image: bool = True,
    leave: str = "",
    notes: Iterable[str] = (),
) -> Caption:
    """Say which episode, frame, layer, step, head, query and normalisation were drawn.

    Args:
        episode: the episode.
        chosen: attributes of what `analysis` returned: `layer`, `denoise_step`, `head`, `query`, `source`, ….
        settings: of the picture.
        frames: frame numbers, or "all".
        image: whether maps on images are shown, whose unit and range are said.
        leave: what the panels' own titles say.
        notes: what else a reader has to know, each a line of its own; "" is left out.
    """
    outcome = {True: ", success", False: ", failure", None: ""}[episode.success]
    state = "" if episode.is_complete else ", incomplete"
    data = episode.arrays
    facts = [f"{store_name(episode.path)}{outcome}{state}"]
    if isinstance(frames, list) and len(frames) == 1:
        inference = int(data["frame_inference"].values[frames[0]])
        saw = int(data["inference_frame"].values[inference])
        older = f", which saw frame {saw}" if saw != frames[0] else ""
        before = int(data["observed_before"].values[inference]) if "observed_before" in data else 0
        if before:
            older = f", which saw the robot {before} frames before frame 0"
        facts.append(f"frame {frames[0]} (inference {inference}{older})")
    elif isinstance(frames, str):
        facts.append(f"{frames} frames")
    else:
        facts.append(f"frames {', '.join(map(str, np.atleast_1d(frames).tolist()))}")
    facts += [
        str(chosen.get(name, "")) for name in ("layer", "denoise_step", "head", "query") if name != leave
    ]
    if image:
        facts.append(NORMALISATIONS[settings.normalisation])
        if settings.clip < 100 and settings.normalisation != "frame":
            facts.append(f"colours end at percentile {settings.clip:g}")
    source = str(chosen.get("source", ""))
    facts.append(
        {"suffix_attention_mean": "from stored means", "suffix_attention": "from full maps"}.get(source, "")
    )
    facts.append(str(chosen.get("left_out", "")))
    said = [*dict.fromkeys(note for note in notes if note), *_truncation(episode, frames)]
    if episode.condition.line:
        said.insert(0, episode.condition.line)
    if episode.policy_remark:
        said.append(episode.policy_remark)
    return Caption(facts, RANDOM_WEIGHTS if episode.has_random_weights else "", said)


def unequal_views(data: xr.Dataset, layers: Iterable[int]) -> str:
    """Say of a mean over layers that not all of them see the actions; "" where all do, or none."""
    blind = [layer in prefix_only_layers(data) for layer in layers]
    if all(blind) or not any(blind):
        return ""
    return (
        f"mean of all layers: actions over the {blind.count(False)} of {len(blind)} layers that see them, so "
        "bars end above 100 %"
    )


def _truncation(episode: Episode, frames: Any) -> list[str]:
    """Say that the prompt of a frame's inference was cut, if it was."""
    data = episode.arrays
    if "prompt_truncated" not in data:
        return []
    numbers = range(episode.n_frames) if isinstance(frames, str) else np.atleast_1d(frames).tolist()
    inferences = np.unique(data["frame_inference"].values[list(numbers)])
    return [TRUNCATED] if data["prompt_truncated"].values[inferences].any() else []
