"""Write a synthetic episode's store and videos: the rows of its frames and inferences, whatever its maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.store.schema import (
    EPISODE_SUFFIX,
    coordinates_of,
    coordinates_of_masks,
    coordinates_of_vision,
)
from lerobot_attn.store.video import Frame, VideoWriter
from lerobot_attn.store.writer import Compression, EpisodeWriter
from lerobot_attn.synthetic.activations import (
    activation_arrays,
    activation_coordinates,
    activation_rows,
    activation_sizes,
)
from lerobot_attn.synthetic.plan import SyntheticPlan
from lerobot_attn.synthetic.prompts import Prompt, key_kinds, make_prompt
from lerobot_attn.synthetic.scene import instances, mask_px, planted_box, planted_scene

_COLOURS = ((200, 60, 50), (60, 140, 70), (60, 90, 190), (220, 170, 60), (150, 80, 160))  # of objects, RGB


class Maps(NamedTuple):
    """The attention of one inference, float32; keys that a layer cannot see are NaN."""

    full: NDArray[np.float32]  # (denoise_step, layer, head, query, key)
    means: NDArray[np.float32]  # (denoise_step, all_layer, head, key), over the executed actions
    prefix: NDArray[np.float32] | None  # (prefix_layer, head, prefix_query, prefix_key)
    vision: NDArray[np.float32] | None = None  # (camera, vision_layer, vision_head, patch_query, patch_key)


def write_store(
    folder: Path,
    plan: SyntheticPlan,
    maps: Callable[[int, Prompt], Maps],
    attributes: Mapping[str, Any],
) -> Path:
    """Write an episode and return its store's path; `maps` is called with each inference and its prompt."""
    path = folder / "attention" / f"{plan.task_group}_{plan.task_id}"
    path /= f"episode_{plan.episode_index:05d}{EPISODE_SUFFIX}"
    present = {
        "suffix_attention": bool(plan.layers),
        "suffix_attention_mean": plan.has_means,
        "prefix_attention": bool(plan.prefix_layers),
        "vision_attention": bool(plan.vision_layers),
        "state": True,
        "reward": plan.has_reward,
        "success": plan.has_success,
        "prompt_truncated": plan.cut_prompt,
        "segmentation": bool(plan.objects),
        "instance_position": bool(plan.objects),
        **dict.fromkeys(activation_arrays(plan), True),
    }
    writer = EpisodeWriter(
        path,
        sizes=_sizes(plan),
        coordinates=_coordinates(plan),
        attributes=_attributes(plan) | dict(attributes),
        compression=Compression(),
        optional={name for name, is_present in present.items() if is_present},
    )
    rng = np.random.default_rng(plan.seed)
    for inference in range(plan.n_inferences):
        prompt = make_prompt(plan, inference)
        found = maps(inference, prompt)
        start = inference * plan.n_executed
        chunk = rng.standard_normal((plan.n_chunk, plan.n_actions), dtype=np.float32)
        by_query = np.full((plan.n_queries, plan.n_actions), np.nan, np.float32)
        by_query[plan.first_action_query :] = chunk  # other tokens yield no action
        rows: dict[str, NDArray[Any]] = {
            "suffix_attention": found.full.astype(np.float16),
            "suffix_attention_mean": found.means.astype(np.float16),
            "prompt_truncated": np.array(prompt.is_truncated),
            "token_id": np.arange(plan.n_text) * prompt.mask,
            "token_text": np.array(prompt.pieces, dtype=object),
            "text_word": prompt.word,
            "text_state_dim": prompt.state_dim,
            "key_kind": key_kinds(plan, prompt),
            "inference_frame": np.array(start, np.int32),
            "action_chunk": by_query,
            **activation_rows(plan, inference, prompt),
        }
        if found.prefix is not None:
            rows["prefix_attention"] = found.prefix.astype(np.float16)
        if found.vision is not None:
            rows["vision_attention"] = found.vision.astype(np.float16)
        if plan.objects:
            scene = planted_scene(plan, start)
            rows["segmentation"] = np.stack(list(scene.masks.values()))
            rows["instance_position"] = np.asarray(scene.positions)
        writer.append_inference({name: row for name, row in rows.items() if present.get(name, True)})
        writer.append_frames(_frame_rows(plan, start, chunk))
        writer.commit()
    videos = _write_videos(path, plan) if plan.videos and plan.n_frames else {}
    writer.close(
        complete=plan.complete,
        attributes={"success": plan.success if plan.complete and plan.has_success else None, **videos},
    )
    return path


def _sizes(plan: SyntheticPlan) -> dict[str, int]:
    layout = plan.layout
    return {
        "denoise_step": plan.n_denoise_steps,
        "layer": len(plan.layers),
        "all_layer": plan.n_layers,
        "prefix_layer": len(plan.prefix_layers),
        "head": plan.n_heads,
        "camera": len(plan.image_px),
        "vision_layer": len(plan.vision_layers),
        "vision_head": plan.n_vision_heads,
        "patch_query": plan.patches[0] * plan.patches[1],
        "patch_key": plan.patches[0] * plan.patches[1],
        "mask_camera": len(plan.image_px),
        **dict(zip(("mask_y", "mask_x"), mask_px(plan), strict=True)),
        "instance": len(plan.objects) + 1,
        "xyz": 3,
        **activation_sizes(plan),
        "query": plan.n_queries,
        "key": layout.n_keys,
        "prefix_query": layout.prefix_len,
        "prefix_key": layout.prefix_len,
        "text": plan.n_text,
        "action_dim": plan.n_actions,
        "state_dim": plan.n_state,
    }


def _coordinates(plan: SyntheticPlan) -> dict[str, NDArray[Any]]:
    coordinates: dict[str, NDArray[Any]] = {
        "flow_time": 1 - np.arange(plan.n_denoise_steps) / plan.n_denoise_steps,
        "denoise_step": np.arange(plan.n_denoise_steps),
        "layer": np.array(plan.layers, int),
        "all_layer": np.arange(plan.n_layers),
        "prefix_layer": np.array(plan.prefix_layers, int),
        "head": np.arange(plan.n_heads),
        "vision_layer": np.array(plan.vision_layers, int),
        **coordinates_of_vision(plan.patches, list(plan.image_px), range(plan.n_vision_heads)),
        **(coordinates_of_masks(list(plan.image_px), instances(plan)) if plan.objects else {}),
        **activation_coordinates(plan),
        **coordinates_of(plan.layout),
        "action_dim": np.array([f"action_{i}" for i in range(plan.n_actions)], dtype=object),
        "state_dim": np.array([f"joint_{i}" for i in range(plan.n_state)], dtype=object),
    }
    if plan.prefix_only_layers:
        for name in ("layer", "all_layer"):
            coordinates[f"{name}_sees_suffix"] = ~np.isin(coordinates[name], plan.prefix_only_layers)
    unused = {"layer", "layer_sees_suffix"} if not plan.layers else set()
    unused |= {"all_layer", "all_layer_sees_suffix"} if not plan.has_means else set()
    unused |= {"prefix_layer"} if not plan.prefix_layers else set()
    in_vision = {"camera", "vision_layer", "vision_head", "patch_row", "patch_column"}
    unused |= in_vision if not plan.vision_layers else set()
    return {name: values for name, values in coordinates.items() if name not in unused}


def _attributes(plan: SyntheticPlan) -> dict[str, Any]:
    return {
        "task": plan.task,
        "task_group": plan.task_group,
        "task_id": plan.task_id,
        "episode_index": plan.episode_index,
        "seed": plan.seed,
        "layout": plan.layout.to_dict(),
        "executed_queries": [plan.executed_queries.start, plan.executed_queries.stop],
        "attention_dtype": "float32",
        "capture": {"keep_bits": None},
        **({"segmentation": {"source": "synthetic"}} if plan.objects else {}),
        "policy": {
            "type": "none (synthetic attention)",
            "path": None,
            "dtype": "float32",
            "n_layers": plan.n_layers,
            "n_heads": plan.n_heads,
            "n_denoise_steps": plan.n_denoise_steps,
            "n_action_steps": plan.n_executed,
            "chunk_size": plan.n_chunk,
            **(
                {"n_vision_layers": plan.n_vision_layers, "n_vision_heads": plan.n_vision_heads}
                if plan.vision_layers
                else {}
            ),
            "random_weights": True,
        },
    }


def _frame_rows(plan: SyntheticPlan, start: int, chunk: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    n = min(plan.n_executed, plan.n_frames - start)
    frames = np.arange(start, start + n)
    last = frames == plan.n_frames - 1
    is_token = ~np.isin(frames, plan.frames_without_query)
    rows: dict[str, NDArray[Any]] = {
        "frame_inference": np.full(n, start // plan.n_executed),
        "frame_query": np.where(is_token, plan.first_action_query + np.arange(n), -1),
        # What is no token is a blend of two, as temporal ensembling makes it.
        "action": np.where(is_token[:, None], chunk[:n], (chunk[:n] + chunk[-1]) / 2),
        "state": np.sin(frames[:, None] / 20 + np.arange(plan.n_state)).astype(np.float32),
    }
    if plan.has_reward:
        rows["reward"] = (last & plan.success).astype(np.float32)
    if plan.has_success:
        rows["success"] = last & plan.success
    return rows


def camera_frames(plan: SyntheticPlan, camera: int) -> Iterator[Frame]:
    """Yield what a camera shows: (height, width, 3) uint8: a gradient, a moving square, and the objects."""
    height, width = list(plan.image_px.values())[camera]
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([40 + 80 * y / height, 60 + 80 * x / width, np.full_like(y, 60 + 50 * camera)], axis=-1)
    side = max(4, height // 8)
    for frame in range(plan.n_frames):
        shown = image.astype(np.uint8)
        top = int((height - side) * (0.5 + 0.4 * np.sin(frame / 5 + camera)))
        left = int((width - side) * (frame % 40) / 40)
        shown[top : top + side, left : left + side] = (230, 230, 220)
        for number, name in enumerate(plan.objects):
            box = planted_box(plan, camera, name, frame)
            if box is not None:
                shown[box.mask((height, width))] = _COLOURS[number % len(_COLOURS)]
        yield shown


def _write_videos(path: Path, plan: SyntheticPlan) -> dict[str, Any]:
    videos: dict[str, Any] = {}
    run = path.parents[2]
    film = run / "videos" / path.parent.name / f"eval_episode_{plan.episode_index}.mp4"
    film.parent.mkdir(parents=True, exist_ok=True)
    for index, (camera, size) in enumerate(plan.image_px.items()):
        file = path.with_suffix(f".{camera.rpartition('.')[2]}.mp4")
        for target in (file, *([film] if index == 0 else [])):
            writer = VideoWriter(target, fps=plan.fps, size_px=size)
            for shown in camera_frames(plan, index):
                writer.write(shown)
            writer.close()
        videos[camera] = {
            "path": file.name,
            "fps": plan.fps,
            "n_frames": plan.n_frames,
            "height_px": size[0],
            "width_px": size[1],
        }
    relative = Path("..") / ".." / "videos" / path.parent.name / film.name
    return {"videos": videos, "eval_video": {"path": str(relative)}}
