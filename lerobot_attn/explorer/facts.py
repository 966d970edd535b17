"""An episode's facts: all that the page must know of it before it draws, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from lerobot_attn.analysis.decoded import decodes
from lerobot_attn.analysis.select import RAW, prefix_only_layers
from lerobot_attn.analysis.tokens import prompt_truncated
from lerobot_attn.explorer.means import mean_layers
from lerobot_attn.explorer.neurons import FoundSet, neurons
from lerobot_attn.explorer.pictures import video_version
from lerobot_attn.explorer.scene import scene
from lerobot_attn.explorer.slabs import PREFIX, labels
from lerobot_attn.explorer.values import numbers, plain
from lerobot_attn.layout import Kind
from lerobot_attn.store.reader import Episode

_DEFAULT_FPS = 20.0  # of an episode without videos: LIBERO's


def identity(episode: Episode) -> dict[str, Any]:
    """Return which episode it is, how long, and how it ended; opens no array."""
    attributes = episode.attributes
    return {
        "task": episode.task,
        "task_group": plain(attributes.get("task_group")),
        "task_id": plain(attributes.get("task_id")),
        "episode": plain(attributes.get("episode_index")),
        "success": episode.success,
        "complete": episode.is_complete,
        "random_weights": episode.has_random_weights,
        "policy_remark": episode.policy_remark,
        "condition": episode.condition.text,
        "condition_name": str(episode.condition.name),
        "n_frames": episode.n_frames,
        "n_inferences": episode.n_inferences,
    }


def facts(episode: Episode, found: Sequence[FoundSet] = ()) -> dict[str, Any]:
    """Return an episode's sizes, labels, layout and cameras.

    Args:
        episode: the episode.
        found: sets of neurons that somebody found.
    """
    data, attributes, layout = episode.arrays, episode.attributes, episode.layout
    policy = attributes.get("policy", {})
    actions = layout.action_queries
    return {
        **identity(episode),
        "seed": plain(attributes.get("seed")),
        "policy": plain(policy.get("type")),
        "n_layers": plain(policy.get("n_layers")),
        "n_heads": plain(policy.get("n_heads")),
        "n_queries": layout.n_queries,
        "n_keys": layout.n_keys,
        "prefix_len": layout.prefix_len,
        "decodes": decodes(data),
        "first_action_query": layout.first_action_query,
        "action_queries": [actions.start, actions.stop],
        "replay": "replay" in attributes,
        "executed_queries": attributes.get("executed_queries"),
        "shown_layer": plain(policy.get("shown_layer")),
        "mean_layers": mean_layers(data),
        "layers": labels(data, "layer", RAW),
        "prefix_layers": labels(data, "prefix_layer", PREFIX),
        "prefix_only_layers": prefix_only_layers(data),
        "heads": labels(data, "head"),
        "denoise_steps": labels(data, "denoise_step"),
        "flow_time": numbers(data["flow_time"].values),
        "state_dims": _names(data, "state_dim"),
        "action_dims": _names(data, "action_dim"),
        "segments": [
            {"kind": s.kind, "name": s.name, "start": s.start, "stop": s.stop} for s in layout.segments
        ],
        "cameras": _cameras(episode),
        "scene": scene(data),
        "neurons": neurons(episode, found),
        "video_errors": _video_errors(attributes),
        "prompt_truncated": bool(prompt_truncated(data).any()),
        "kinds": {kind.name.lower(): int(kind) for kind in Kind},
        "fps": _fps(attributes),
    }


def _cameras(episode: Episode) -> list[dict[str, Any]]:
    short = episode.layout.short_names
    found = []
    for camera in episode.layout.cameras:
        video = episode.videos.get(camera.name)
        version = None if video is None else video_version(video)
        still = None if version is None else _still(episode, camera.name)
        found.append(
            {
                "name": camera.name,
                "label": short[camera.name],
                "geometry": None if camera.geometry is None else vars(camera.geometry),
                "has_video": version is not None,
                "has_file": version is not None and isinstance(video, Path),
                "video_version": version,
                "still": still,
            }
        )
    return found


def _still(episode: Episode, camera: str) -> int | None:
    """Return the frame of which there is a picture while the video is written; None where there is none."""
    if episode.is_complete or not episode.n_inferences:
        return None
    frame = int(episode.arrays["inference_frame"].values[-1])
    path = episode.still(camera, frame)
    return frame if path is not None and path.is_file() else None


def _video_errors(attributes: Mapping[str, Any]) -> dict[str, str]:
    """Return a camera's full name → why its video could not be written."""
    errors = attributes.get("video_errors")
    return {camera: str(why) for camera, why in errors.items()} if isinstance(errors, dict) else {}


def _fps(attributes: Mapping[str, Any]) -> float:
    """Return the frames a second that the first video says; a number that can be divided by."""
    for video in (attributes.get("videos") or {}).values():
        fps = plain(video.get("fps")) if isinstance(video, dict) else None
        if isinstance(fps, int | float) and not isinstance(fps, bool) and fps > 0:
            return fps
    return _DEFAULT_FPS


def _names(data: xr.Dataset, dimension: str) -> list[str]:
    return [str(name) for name in data[dimension].values] if dimension in data.coords else []
