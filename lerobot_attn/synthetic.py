"""Episodes whose attention is known, written like recorded ones: to test analysis, figures and speed.

    path = write_planted_episode("out", SyntheticPlan())   # attention on one known patch per frame and camera
    path = write_softmax_episode("out", SyntheticPlan.full_size())   # Pi0.5's sizes, softmax-like numbers

No policy runs: what these stores hold was made up, and each says so in its `policy` attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.errors import ConfigError
from lerobot_attn.layout import Camera, ImageGeometry, Kind, Segment, TextSpan, TokenLayout, label_text
from lerobot_attn.store.schema import EPISODE_SUFFIX
from lerobot_attn.store.video import Frame, VideoWriter
from lerobot_attn.store.writer import Compression, EpisodeWriter

_PATCH_SHARE = (
    0.75  # of a camera's attention that lies on the planted patch; the rest is even over the others
)
_WORD_SHARE = 0.75  # likewise of the task's


def _two_cameras() -> dict[str, tuple[int, int]]:
    return {"observation.images.image": (96, 96), "observation.images.wrist": (96, 128)}


@dataclass(frozen=True)
class SyntheticPlan:
    """Sizes of a synthetic episode; counts are of tokens, layers and so on, images in pixels."""

    n_frames: int = 12
    n_executed: int = 3
    n_queries: int = 5
    n_denoise_steps: int = 3
    n_layers: int = 4
    layers: tuple[int, ...] = (2, 3)  # whose full maps are stored; none: the array is left out
    prefix_layers: tuple[int, ...] = ()
    n_heads: int = 2
    image_px: Mapping[str, tuple[int, int]] = field(default_factory=_two_cameras)  # camera → (height, width)
    n_empty_cameras: int = 1
    padding: Literal["centred", "left_top"] = "centred"
    input_px: tuple[int, int] = (224, 224)
    grid: tuple[int, int] = (16, 16)
    n_text: int = 48
    n_state: int = 3
    n_actions: int = 4  # action dimensions
    task: str = "pick up the red block and place it in the bowl"
    task_group: str = "synthetic"
    task_id: int = 0
    episode_index: int = 0
    success: bool = True
    complete: bool = True
    videos: bool = True
    fps: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that there is something to plant in: a camera of several patches, a word, a number of state.

        Raises:
            ConfigError: a size is too small.
        """
        rules = {
            "image_px": (len(self.image_px) >= 1, "at least one camera"),
            "grid": (self.grid[0] * self.grid[1] >= 2, "at least two patches"),
            "task": (len(self.task.split()) >= 1, "at least one word"),
            "n_state": (self.n_state >= 1, "at least 1"),
            "n_executed": (1 <= self.n_executed <= self.n_queries, f"1 to n_queries = {self.n_queries}"),
            "layers": (all(0 <= i < self.n_layers for i in self.layers), f"0 to {self.n_layers - 1}"),
        }
        for name, (is_fine, expected) in rules.items():
            if not is_fine:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @classmethod
    def full_size(cls, n_frames: int = 280, **changes: Any) -> SyntheticPlan:
        """Return the sizes of Pi0.5 as released: (8, 50, 1018) a map, 18 layers, 10 denoise steps."""
        sizes: dict[str, Any] = {
            "n_executed": 10,
            "n_queries": 50,
            "n_denoise_steps": 10,
            "n_layers": 18,
            "layers": (16, 17),
            "n_heads": 8,
            "image_px": {"observation.images.image": (360, 360), "observation.images.image2": (360, 360)},
            "n_text": 200,
            "n_state": 8,
            "n_actions": 7,
        }
        return cls(n_frames=n_frames, **{**sizes, **changes})

    @property
    def n_inferences(self) -> int:
        """Inferences that the frames need."""
        return -(-self.n_frames // self.n_executed)

    @property
    def layout(self) -> TokenLayout:
        """Cameras, then empty cameras, then the language slots, then the action tokens."""
        cameras = [
            Camera(name, ImageGeometry.letterbox(size, self.input_px, self.grid, padding=self.padding))
            for name, size in self.image_px.items()
        ]
        cameras += [Camera(f"observation.images.empty_{i}", None) for i in range(self.n_empty_cameras)]
        segments, position = [], 0
        sizes = [("image", camera.name, self.grid[0] * self.grid[1]) for camera in cameras]
        sizes += [("language", "language", self.n_text), ("action", "action", self.n_queries)]
        for kind, name, length in sizes:
            segments.append(Segment(kind, name, position, position + length))
            position += length
        return TokenLayout(tuple(segments), position - self.n_queries, tuple(cameras))


class _Prompt(NamedTuple):
    pieces: list[str]
    mask: NDArray[np.bool_]
    kind: NDArray[np.int8]
    word: NDArray[np.int16]
    state_dim: NDArray[np.int16]


def planted_patch(
    plan: SyntheticPlan, camera: int, *, frame: int, layer: int, head: int, denoise_step: int
) -> tuple[int, int]:
    """Return the (row, column) of the one patch that is attended to; it always shows a part of the image."""
    height, width = list(plan.image_px.values())[camera]
    y = (0.5 + (3 * frame + 2 * layer + 5 * head + denoise_step + camera) % 11) / 11 * height
    x = (0.5 + (2 * frame + 5 * layer + 3 * head + 4 * denoise_step + camera) % 9) / 9 * width
    geometry = plan.layout.cameras[camera].geometry
    assert geometry is not None
    return geometry.patch_at(y, x)


def planted_word(plan: SyntheticPlan, frame: int) -> int:
    """Return which word of the task gets most of the task's attention at a frame."""
    return frame % len(plan.task.split())


def planted_shares(plan: SyntheticPlan, frame: int) -> dict[str, float]:
    """Return the share of each modality at a frame: the cameras' falls over the episode, the task's rises."""
    phase = frame / max(1, plan.n_frames - 1)
    cameras = list(plan.image_px)
    shares = {cameras[0]: 0.45 - 0.25 * phase} | {name: 0.15 / (len(cameras) - 1) for name in cameras[1:]}
    if len(cameras) == 1:
        shares[cameras[0]] += 0.15
    return shares | {"task": 0.15 + 0.25 * phase, "state": 0.1, "scaffold": 0.05, "action": 0.1}


def write_planted_episode(folder: str | Path, plan: SyntheticPlan | None = None, **attributes: Any) -> Path:
    """Write an episode whose attention is that of `planted_patch`, `planted_word` and `planted_shares`.

    Of a camera's share three quarters lie on its planted patch, of the task's on the planted word; an action
    token's self-attention is all its own; the "State" scaffold is never looked at, only begin-of-sequence is.
    In prefix attention, word w looks at patch w of the first camera, each patch at the word of its own row,
    and everything else at itself.

    Args:
        folder: a run's folder; the store goes to `attention/{task_group}_{task_id}/episode_{index}.zarr`.
        plan: its sizes.
        attributes: further group attributes.

    Returns:
        The store's path.
    """
    plan = plan or SyntheticPlan()

    def maps(inference: int, prompt: _Prompt) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        full = np.zeros(
            (plan.n_denoise_steps, plan.n_layers, plan.n_heads, plan.n_queries, plan.layout.n_keys),
            np.float32,
        )
        for step, layer, head, query in np.ndindex(full.shape[:-1]):
            full[step, layer, head, query] = _planted_row(plan, prompt, inference, step, layer, head, query)
        return full[:, list(plan.layers)], full[..., : plan.n_executed, :].mean(axis=3)

    return _write(Path(folder), plan, maps, attributes)


def write_softmax_episode(folder: str | Path, plan: SyntheticPlan | None = None, **attributes: Any) -> Path:
    """Write an episode of numbers distributed like a policy's attention, for measuring size and speed.

    Rows are softmaxes in float32 over logits of normal parts: one per (layer, head, key) with standard
    deviation 2, which every inference shares; a drift of 0.7 per inference; 0.5 per denoise step; 0.4 per
    query; independent noise of 0.1. So rows are peaked and correlated over inferences, steps and queries.
    Masked keys are exactly 0.

    Args:
        folder: a run's folder.
        plan: its sizes.
        attributes: further group attributes.

    Returns:
        The store's path.
    """
    plan = plan or SyntheticPlan.full_size()
    rng = np.random.default_rng(plan.seed)
    n_keys = plan.layout.n_keys

    def normal(*shape: int, scale: float) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    base = normal(plan.n_layers, plan.n_heads, 1, n_keys, scale=2)

    def maps(inference: int, prompt: _Prompt) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        drift = base + normal(plan.n_layers, plan.n_heads, 1, n_keys, scale=0.7)
        steps = normal(plan.n_denoise_steps, 1, plan.n_heads, 1, n_keys, scale=0.5)
        queries = normal(1, plan.n_heads, plan.n_queries, n_keys, scale=0.4)
        masked = np.full(n_keys, np.float32(0))
        masked[_masked_keys(plan, prompt)] = -np.inf

        def rows(layers: list[int], n_queries: int) -> NDArray[np.float32]:
            logits = drift[layers][None] + steps[:, :1] + queries[:, :, :n_queries]
            logits += normal(*logits.shape, scale=0.1) + masked
            np.exp(logits - logits.max(axis=-1, keepdims=True), out=logits)
            logits /= logits.sum(axis=-1, keepdims=True)
            return logits

        every = list(range(plan.n_layers))
        means = np.concatenate([rows([layer], plan.n_executed).mean(axis=3) for layer in every], axis=1)
        return rows(list(plan.layers), plan.n_queries), means

    return _write(Path(folder), plan, maps, attributes)


def _planted_row(
    plan: SyntheticPlan, prompt: _Prompt, inference: int, step: int, layer: int, head: int, query: int
) -> NDArray[np.float32]:
    layout, frame = plan.layout, inference * plan.n_executed + query
    shares = planted_shares(plan, min(frame, plan.n_frames - 1))
    row = np.zeros(layout.n_keys, np.float32)
    for index, segment in enumerate(layout.segments[: len(plan.image_px)]):
        share = shares[segment.name]
        patch_row, column = planted_patch(plan, index, frame=frame, layer=layer, head=head, denoise_step=step)
        row[segment.start : segment.stop] = share * (1 - _PATCH_SHARE) / (len(segment) - 1)
        row[segment.start + patch_row * plan.grid[1] + column] = share * _PATCH_SHARE
    start, words = layout.language.start, len(plan.task.split())
    for word in range(words):
        tokens = np.flatnonzero(prompt.word == word)
        here = _WORD_SHARE if word == planted_word(plan, frame) else (1 - _WORD_SHARE) / (words - 1)
        here = 1 if words == 1 else here
        row[start + tokens] = shares["task"] * here / len(tokens)
    digits = np.flatnonzero(prompt.kind == Kind.STATE)
    row[start + digits] = shares["state"] / len(digits)
    row[start] = shares["scaffold"]
    row[layout.actions.start + query] = shares["action"]
    return row


def _planted_prefix(plan: SyntheticPlan, prompt: _Prompt) -> NDArray[np.float32]:
    layout = plan.layout
    n, words = layout.prefix_len, len(plan.task.split())
    rows = np.eye(n, dtype=np.float32)
    tokens = [layout.language.start + np.flatnonzero(prompt.word == word) for word in range(words)]
    for word, keys in enumerate(tokens):
        rows[keys] = 0
        rows[keys, word] = 1
    for segment in layout.segments[: len(plan.image_px)]:
        for patch in range(len(segment)):
            keys = tokens[patch // plan.grid[1] % words]
            rows[segment.start + patch] = 0
            rows[segment.start + patch, keys] = 1 / len(keys)
    rows[_masked_keys(plan, prompt)[:n]] = 0
    return np.broadcast_to(rows, (len(plan.prefix_layers), plan.n_heads, n, n))


def _masked_keys(plan: SyntheticPlan, prompt: _Prompt) -> NDArray[np.bool_]:
    layout = plan.layout
    masked = np.isin(layout.key_camera(), np.arange(len(plan.image_px), len(layout.cameras)))
    masked[layout.language.start : layout.language.stop] = ~prompt.mask
    return masked


def _prompt(plan: SyntheticPlan, inference: int) -> _Prompt:
    """Build a prompt in Pi0.5's manner: long words and numbers are several tokens, numbers change."""
    pieces, spans = ["<bos>", "Task", ":"], []

    def add(kind: Kind, ordinal: int, parts: list[str]) -> None:
        start = sum(map(len, pieces))
        pieces.extend(parts)
        spans.append(TextSpan(kind, start, sum(map(len, pieces)), ordinal))

    for ordinal, word in enumerate(plan.task.split()):
        add(Kind.TASK, ordinal, [f" {word[:4]}", *([word[4:]] if word[4:] else [])])
    pieces += [",", " State", ":"]
    for dim in range(plan.n_state):
        pieces.append(" ")
        add(Kind.STATE, dim, list(str((37 * dim + 13 * inference) % 256)))
    pieces += [";\n", "Action", ":", " "]
    if len(pieces) > plan.n_text:
        raise ConfigError(f"n_text: got {plan.n_text}, expected at least the prompt's {len(pieces)} tokens")
    mask = np.arange(plan.n_text) < len(pieces)
    pieces += [""] * (plan.n_text - len(pieces))
    return _Prompt(pieces, mask, *label_text(pieces, mask, spans))


def _write(
    folder: Path,
    plan: SyntheticPlan,
    maps: Callable[[int, _Prompt], tuple[NDArray[np.float32], NDArray[np.float32]]],
    attributes: Mapping[str, Any],
) -> Path:
    path = folder / "attention" / f"{plan.task_group}_{plan.task_id}"
    path /= f"episode_{plan.episode_index:05d}{EPISODE_SUFFIX}"
    optional = {"suffix_attention_mean", "state", "reward", "success"}
    optional |= {"suffix_attention"} if plan.layers else set()
    optional |= {"prefix_attention"} if plan.prefix_layers else set()
    writer = EpisodeWriter(
        path,
        sizes=_sizes(plan),
        coordinates=_coordinates(plan),
        attributes=_attributes(plan) | dict(attributes),
        compression=Compression(),
        optional=optional,
    )
    rng = np.random.default_rng(plan.seed)
    for inference in range(plan.n_inferences):
        prompt = _prompt(plan, inference)
        full, means = maps(inference, prompt)
        start = inference * plan.n_executed
        chunk = rng.standard_normal((plan.n_queries, plan.n_actions), dtype=np.float32)
        rows: dict[str, NDArray[Any]] = {
            "suffix_attention": full.astype(np.float16),
            "suffix_attention_mean": means.astype(np.float16),
            "token_id": np.arange(plan.n_text) * prompt.mask,
            "token_text": np.array(prompt.pieces, dtype=object),
            "text_word": prompt.word,
            "text_state_dim": prompt.state_dim,
            "key_kind": plan.layout.key_kind(~_masked_keys(plan, prompt), prompt.kind),
            "inference_frame": np.array(start, np.int32),
            "action_chunk": chunk,
        }
        if plan.prefix_layers:
            rows["prefix_attention"] = _planted_prefix(plan, prompt).astype(np.float16)
        if not plan.layers:
            del rows["suffix_attention"]
        writer.append_inference(rows)
        writer.append_frames(_frame_rows(plan, start, chunk))
        writer.commit()
    videos = _write_videos(path, plan) if plan.videos and plan.n_frames else {}
    writer.close(
        complete=plan.complete,
        attributes={"success": plan.success if plan.complete else None, **videos},
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
        "query": plan.n_queries,
        "key": layout.n_keys,
        "prefix_query": layout.prefix_len,
        "prefix_key": layout.prefix_len,
        "text": plan.n_text,
        "action_dim": plan.n_actions,
        "state_dim": plan.n_state,
    }


def _coordinates(plan: SyntheticPlan) -> dict[str, NDArray[Any]]:
    layout = plan.layout
    rows, columns = layout.key_patch()
    coordinates = {
        "flow_time": 1 - np.arange(plan.n_denoise_steps) / plan.n_denoise_steps,
        "denoise_step": np.arange(plan.n_denoise_steps),
        "layer": np.array(plan.layers, int),
        "all_layer": np.arange(plan.n_layers),
        "prefix_layer": np.array(plan.prefix_layers, int),
        "head": np.arange(plan.n_heads),
        "text_key": np.arange(layout.language.start, layout.language.stop),
        "key_camera": layout.key_camera(),
        "key_row": rows,
        "key_column": columns,
        "action_dim": np.array([f"action_{i}" for i in range(plan.n_actions)], dtype=object),
        "state_dim": np.array([f"joint_{i}" for i in range(plan.n_state)], dtype=object),
    }
    unused = {"layer"} if not plan.layers else set()
    unused |= {"prefix_layer"} if not plan.prefix_layers else set()
    return {name: values for name, values in coordinates.items() if name not in unused}


def _attributes(plan: SyntheticPlan) -> dict[str, Any]:
    return {
        "task": plan.task,
        "task_group": plan.task_group,
        "task_id": plan.task_id,
        "episode_index": plan.episode_index,
        "seed": plan.seed,
        "layout": plan.layout.to_dict(),
        "executed_queries": [0, plan.n_executed],
        "capture": {"keep_bits": None},
        "policy": {
            "type": "none (synthetic attention)",
            "path": None,
            "dtype": "float32",
            "n_layers": plan.n_layers,
            "n_heads": plan.n_heads,
            "n_denoise_steps": plan.n_denoise_steps,
            "n_action_steps": plan.n_executed,
            "chunk_size": plan.n_queries,
            "random_weights": True,
        },
    }


def _frame_rows(plan: SyntheticPlan, start: int, chunk: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    n = min(plan.n_executed, plan.n_frames - start)
    frames = np.arange(start, start + n)
    last = frames == plan.n_frames - 1
    return {
        "frame_inference": np.full(n, start // plan.n_executed),
        "frame_query": np.arange(n),
        "action": chunk[:n],
        "state": np.sin(frames[:, None] / 20 + np.arange(plan.n_state)).astype(np.float32),
        "reward": (last & plan.success).astype(np.float32),
        "success": last & plan.success,
    }


def camera_frames(plan: SyntheticPlan, camera: int) -> Iterator[Frame]:
    """Yield what a camera shows: (height, width, 3) uint8, a gradient with a square that moves each frame."""
    height, width = list(plan.image_px.values())[camera]
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([40 + 80 * y / height, 60 + 80 * x / width, np.full_like(y, 60 + 50 * camera)], axis=-1)
    side = max(4, height // 8)
    for frame in range(plan.n_frames):
        shown = image.astype(np.uint8)
        top = int((height - side) * (0.5 + 0.4 * np.sin(frame / 5 + camera)))
        left = int((width - side) * (frame % 40) / 40)
        shown[top : top + side, left : left + side] = (230, 230, 220)
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
