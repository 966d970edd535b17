"""Made-up attention at a policy's sizes, as hard to compress and as quick to read as a policy's own.

No policy runs, and nothing here knows what is measured with it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from lerobot_attn.store.writer import EpisodeWriter
    from lerobot_attn.synthetic import SyntheticPlan


class MadeUpMaps(NamedTuple):
    """What a made-up policy attends to in one inference, rows sum to 1.

    Attributes:
        full: (denoise_step, layer, head, query, key), float32.
        means: (denoise_step, all_layer, head, key), float32, over the executed queries.
    """

    full: np.ndarray
    means: np.ndarray

    def as_bfloat16(self) -> MadeUpMaps:
        """Return the maps of the same policy run in bfloat16, which rounds each softmax.

        The means stay: they are taken in float32, and a mean of rounded values has as many bits as another.
        """
        return MadeUpMaps(_round_to_bfloat16(self.full), self.means)

    def as_float16(self) -> MadeUpMaps:
        """Return the maps as they are stored."""
        return MadeUpMaps(self.full.astype(np.float16), self.means.astype(np.float16))


class MadeUpEpisode:
    """An episode of maps that are made as a policy makes them, of random queries and keys; no policy runs.

    A row is softmax(sharpness · q·k/√256 + sinks) in float32. As in Pi0.5, all heads share a layer's keys.
    Keys are normal, and patches resemble their neighbours (a Gaussian of 1.5 patches). A query is the sum of
    normal parts: one of its head, with a standard deviation of 1; one of 0.5 that changes slowly along the
    chunk (a Gaussian of 8 tokens); one of its own of 0.4 · flow time; one of 0.1 that is new at each denoise
    step. Sinks are begin-of-sequence (+5) and three patches per head (+4). Masked keys (the empty camera,
    unused language slots) are exactly 0. With a sharpness of 2, a full-size row is spread over 42 keys
    effectively (exp of its entropy) and its largest weight is 0.23, on average. Trained policies' maps were
    not at hand.

    Args:
        plan: its sizes.
        sharpness: standard deviation of the logits before the sinks.
    """

    def __init__(self, plan: SyntheticPlan, *, sharpness: float = 2.0):
        self.plan = plan
        self.sharpness = sharpness
        self._read_tables()

    def maps(self, inference: int) -> MadeUpMaps:
        """Make the maps of an inference; the same ones each time."""
        plan = self.plan
        shape = (plan.n_denoise_steps, plan.n_layers, plan.n_heads, plan.layout.n_keys)
        full, means = [], np.empty(shape, np.float32)
        for layer in range(plan.n_layers):
            is_full = layer in plan.layers
            rows = self._layer(inference, layer, plan.n_queries if is_full else plan.n_executed)
            means[:, layer] = rows[:, :, : plan.n_executed].mean(axis=2)
            if is_full:
                full.append(rows)
        return MadeUpMaps(np.stack(full, axis=1), means)

    def rows(self, inference: int, maps: MadeUpMaps) -> dict[str, np.ndarray]:
        """Return what `EpisodeWriter.append_inference` takes; `maps` are float16."""
        return {
            **self._inference_rows[inference],
            "suffix_attention": maps.full,
            "suffix_attention_mean": maps.means,
        }

    def frame_rows(self, inference: int) -> dict[str, np.ndarray]:
        """Return what `EpisodeWriter.append_frames` takes: the frames of an inference's actions."""
        mine = self._frames["frame_inference"] == inference
        return {name: values[mine] for name, values in self._frames.items()}

    def writer(self, path: Path) -> EpisodeWriter:
        """Return the package's writer for this episode, with the default compression."""
        from lerobot_attn.store.writer import Compression, EpisodeWriter

        return EpisodeWriter(
            path,
            sizes=self._sizes,
            coordinates=self._coordinates,
            attributes=self._attributes,
            compression=Compression(),
            optional={"suffix_attention", "suffix_attention_mean", "state", "reward", "success"},
        )

    def write(self, path: Path, make: Callable[[int], MadeUpMaps]) -> None:
        """Write the whole episode; `make` gives the float16 maps of an inference."""
        writer = self.writer(path)
        for inference in range(self.plan.n_inferences):
            writer.append_inference(self.rows(inference, make(inference)))
            writer.append_frames(self.frame_rows(inference))
            writer.commit()
        writer.close(complete=True)

    def _layer(self, inference: int, layer: int, n_queries: int) -> np.ndarray:
        """Return (denoise_step, head, query, key), float32."""
        plan, rank = self.plan, 256
        rng = np.random.default_rng((plan.seed, inference, layer))
        slots = self._inference_rows[inference]["key_kind"]

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, dtype=np.float32)

        keys = normal(plan.layout.n_keys, rank)
        near = _resemblance(np.argwhere(np.ones(plan.grid)), 1.5)
        cameras = [part for part in plan.layout.segments if part.kind == "image"]
        for part in cameras:
            patches = keys[part.start : part.stop]
            keys[part.start : part.stop] = 0.8 * near @ patches + 0.6 * patches
        sinks = np.where(slots == 0, np.float32(-np.inf), np.float32(0))[None].repeat(plan.n_heads, axis=0)
        sinks[:, plan.layout.language.start] += 5
        for head in sinks:
            head[rng.choice(np.flatnonzero(slots == 1), 3, replace=False)] += 4
        along_chunk = _resemblance(np.arange(plan.n_queries)[:, None], 8)[:n_queries]
        head_part = normal(plan.n_heads, 1, rank)
        slow_part = 0.5 * (along_chunk @ normal(plan.n_heads, plan.n_queries, rank))
        own_part = 0.4 * normal(plan.n_heads, n_queries, rank)
        rows = np.empty((plan.n_denoise_steps, plan.n_heads, n_queries, plan.layout.n_keys), np.float32)
        for step, logits in enumerate(rows):
            flow_time = 1 - step / plan.n_denoise_steps
            queries = head_part + slow_part + flow_time * own_part + 0.1 * normal(*own_part.shape)
            np.matmul(queries * (self.sharpness / rank**0.5), keys.T, out=logits)
            logits += sinks[:, None]
            logits -= logits.max(axis=-1, keepdims=True)
            np.exp(logits, out=logits)
            logits /= logits.sum(axis=-1, keepdims=True)
        return rows

    def _read_tables(self) -> None:
        """Take all but the maps from an episode that the package makes, written with the smallest maps."""
        from lerobot_attn.store.reader import open_episode
        from lerobot_attn.store.schema import BY_NAME
        from lerobot_attn.synthetic import write_softmax_episode

        plan = self.plan
        small = replace(plan, n_layers=1, layers=(), n_heads=1, n_denoise_steps=1, videos=False)
        with tempfile.TemporaryDirectory() as folder:
            episode = open_episode(write_softmax_episode(folder, small))
            data = episode.arrays.load()
        policy = {
            "n_layers": plan.n_layers,
            "n_heads": plan.n_heads,
            "n_denoise_steps": plan.n_denoise_steps,
        }
        self._attributes = {**episode.attributes, "policy": {**episode.attributes["policy"], **policy}}
        counts = {
            "denoise_step": plan.n_denoise_steps,
            "layer": len(plan.layers),
            "all_layer": plan.n_layers,
            "head": plan.n_heads,
        }
        self._sizes = {**{str(dim): size for dim, size in data.sizes.items()}, **counts}
        self._coordinates = {name: np.arange(size) for name, size in counts.items()}
        self._coordinates["layer"] = np.array(plan.layers)
        self._coordinates["flow_time"] = 1 - np.arange(plan.n_denoise_steps) / plan.n_denoise_steps
        self._inference_rows: list[dict[str, np.ndarray]] = [{} for _ in range(plan.n_inferences)]
        self._frames: dict[str, np.ndarray] = {}
        for name, variable in data.variables.items():
            spec = BY_NAME[str(name)]
            if spec.grows_with == "frame":
                self._frames[spec.name] = variable.values
            elif spec.grows_with == "inference" and not spec.sharded:
                for rows, values in zip(self._inference_rows, variable.values, strict=True):
                    rows[spec.name] = values
            elif spec.grows_with is None:
                self._coordinates.setdefault(spec.name, variable.values)


def _resemblance(positions: np.ndarray, width: float) -> np.ndarray:
    """Return weights, (position, position) of float32, that make neighbours alike and keep the variance."""
    squared = ((positions[:, None] - positions[None]) ** 2).sum(axis=-1)
    weights = np.exp(-squared / (2 * width**2))
    normed: np.ndarray = (weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))).astype(np.float32)
    return normed


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    import torch

    rounded: np.ndarray = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    return rounded
