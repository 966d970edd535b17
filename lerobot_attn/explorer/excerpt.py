"""Which layers, heads, denoise steps and frames of an episode are exported, and how one says so.

Knows nothing of the file that they go into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from lerobot_attn.analysis.labels import in_words, policy_count, stored_labels
from lerobot_attn.analysis.select import frames_of
from lerobot_attn.errors import SelectionError, StoreError
from lerobot_attn.explorer.facts import facts
from lerobot_attn.explorer.neurons import FoundSet
from lerobot_attn.explorer.summary import version_of
from lerobot_attn.store.reader import Episode


@dataclass(frozen=True)
class Excerpt:
    """What is exported, as the store's own labels and numbers, ascending.

    Attributes:
        recording: facts of all that there is.
        layers, heads, steps, frames: labels and numbers.
        inference_of: frame → its inference.
        in_words: all of that in a sentence.
        is_every_frame: whether no frame is left out.
    """

    recording: dict[str, Any]
    layers: list[int]
    heads: list[int]
    steps: list[int]
    frames: list[int]
    inference_of: dict[int, int]
    in_words: str
    is_every_frame: bool

    @property
    def inferences(self) -> list[int]:
        """Numbers of the frames' inferences."""
        return sorted(set(self.inference_of.values()))


def choose(
    episode: Episode,
    *,
    layers: Any,
    heads: Any,
    denoise_steps: Any,
    frames: Any,
    neurons: Sequence[FoundSet] = (),
) -> Excerpt:
    """Find what is asked for in an episode.

    Args:
        episode: the episode.
        layers: labels as `ExportSettings` has them.
        heads: likewise.
        denoise_steps: likewise.
        frames: likewise.
        neurons: sets of them that somebody found.

    Raises:
        SelectionError: something that the episode does not hold.
        StoreError: the episode is empty.
    """
    data, recording = episode.arrays, facts(episode, neurons)
    if episode.n_frames == 0:
        raise StoreError(f"{episode.path}: holds no frames yet; expected one at least")
    if not recording["mean_layers"]:
        raise SelectionError(f"{episode.path}: was recorded without suffix attention; nothing to show")
    steps = recording["denoise_steps"][-1:] if denoise_steps is None else denoise_steps
    choices = {"layer": layers, "head": heads, "denoise_step": steps}
    there = xr.Dataset(
        coords={name: recording["mean_layers" if name == "layer" else f"{name}s"] for name in choices},
        attrs=data.attrs,
    )
    labels: list[list[int]] = []
    said = []
    for name, choice in choices.items():
        found = sorted(set(stored_labels(there, name, choice, f"n_{name}s", ("all",))))
        labels.append(found)
        said.append(in_words(name.replace("_", " "), choice, found, policy_count(data, f"n_{name}s")))
    numbers = np.unique(np.array(frames_of(data, frames), int)).tolist()
    if not numbers:
        raise SelectionError("frames []: expected one at least")
    inference_of = dict(zip(numbers, data["frame_inference"].values[numbers].tolist(), strict=True))
    is_every_frame = len(numbers) == episode.n_frames
    said.append("all frames" if is_every_frame else _frames_in_words(numbers, episode.n_frames))
    averaged = (
        "the decoded tokens"
        if recording["decodes"]
        else "the first actions of each chunk"
        if recording["replay"]
        else "the executed actions"
    )
    sentence = (
        f"An export of {', '.join(said)}. Means, largest values and the episode's colour range are of what "
        f"is here; the maps are means over {averaged}.{_neurons_in_words(recording)}"
    )
    return Excerpt(
        recording, labels[0], labels[1], labels[2], numbers, inference_of, sentence, is_every_frame
    )


def _neurons_in_words(recording: dict[str, Any]) -> str:
    """Say which neurons are here: those of the sets, for all others are too many."""
    if recording["neurons"] is None:
        return ""
    names = [f"{one['kind']}: {one['name']}" for one in recording["neurons"]["sets"]]
    return f" Of the neurons, the sets {', '.join(names)} are here." if names else " Neurons are left out."


def _frames_in_words(frames: Sequence[int], n_frames: int) -> str:
    """Say which frames: "frame 3", "frames 0-99", "every 5th of frames 0-275", "40 of 280 frames"."""
    span = f"{frames[0]}-{frames[-1]}"
    stride = _stride(frames)
    if len(frames) == 1:
        return f"frame {frames[0]}"
    if stride is None:
        return f"{len(frames)} of {n_frames} frames"
    ordinal = {2: "2nd", 3: "3rd"}.get(stride, f"{stride}th")
    return f"frames {span}" if stride == 1 else f"every {ordinal} of frames {span}"


def _stride(frames: Sequence[int]) -> int | None:
    """Return how far apart the frames are, if they are so evenly; 1 for a single one."""
    apart = set(np.diff(frames).tolist())
    return int(apart.pop()) if len(apart) == 1 else None if apart else 1


def facts_of(episode: Episode, chosen: Excerpt) -> dict[str, Any]:
    """Return an episode's facts as far as an excerpt of it goes."""
    recording = chosen.recording
    flow_time = dict(zip(recording["denoise_steps"], recording["flow_time"], strict=True))
    return {
        "version": version_of(episode),
        **recording,
        "mean_layers": chosen.layers,
        "layers": [],
        "prefix_layers": [],
        "heads": chosen.heads,
        "denoise_steps": chosen.steps,
        "flow_time": [flow_time[step] for step in chosen.steps],
        "neurons": recording["neurons"] if recording["neurons"] and recording["neurons"]["sets"] else None,
        "excerpt": chosen.in_words,
        **({} if chosen.is_every_frame else {"frames": chosen.frames}),
    }


def as_option(frames: Sequence[int], last: int) -> str:
    """Write frames as `--frames` takes them; evenly spaced ones as a range that may end at a later frame."""
    stride = _stride(frames)
    return ",".join(map(str, frames)) if stride is None else f"{frames[0]}-{last}:{stride}"
