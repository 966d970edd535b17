"""The store of an episode at its first inference: which arrays it has, and how large they are.

Knows what was captured and what the loop knows. Writes no row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lerobot_attn.capture import InferenceRecord
from lerobot_attn.config import AttentionConfig
from lerobot_attn.recording.activations import ActivationRows
from lerobot_attn.recording.plan import EpisodePlan, Known
from lerobot_attn.recording.scenes import SceneRows
from lerobot_attn.store.schema import BY_NAME, coordinates_of, coordinates_of_vision
from lerobot_attn.store.writer import Compression, EpisodeWriter


def begin_store(
    plan: EpisodePlan,
    record: InferenceRecord,
    known: Known,
    config: AttentionConfig,
    scenes: SceneRows | None = None,
    activations: ActivationRows | None = None,
) -> EpisodeWriter:
    """Create the store of an episode whose first inference is at hand; it holds no row yet.

    Args:
        plan: where it goes, and what it says of itself.
        record: the first inference.
        known: what the loop knows of the episode.
        config: the capture and storage settings.
        scenes: of its masks, where it has some.
        activations: of its neurons and residuals, where it has some.

    Raises:
        StoreError: the path exists, or its folder cannot be written.
    """
    layout, selection = record.layout, record.selection
    sizes = {
        "denoise_step": len(selection.denoise_steps),
        "layer": len(selection.layers),
        "all_layer": len(selection.mean_layers),
        "prefix_layer": len(selection.prefix_layers),
        "head": len(selection.heads),
        "query": layout.n_queries,
        "key": layout.n_keys,
        "prefix_query": layout.prefix_len,
        "prefix_key": layout.prefix_len,
        "text": len(layout.language),
        "action_dim": record.action_chunk.shape[-1],
    }
    coordinates: dict[str, np.ndarray] = {
        "flow_time": record.flow_time,
        "denoise_step": np.array(selection.denoise_steps, np.int32),
        "head": np.array(selection.heads, np.int32),
        **coordinates_of(layout),
        "action_dim": known.names.labels("action", sizes["action_dim"]),
    }
    if (maps := record.vision_attention) is not None and record.vision_grid is not None:
        sizes |= zip(BY_NAME["vision_attention"].dims[1:], maps[:, :, 0].shape, strict=True)
        grid, heads = record.vision_grid, selection.vision_heads
        coordinates |= coordinates_of_vision(grid, record.vision_cameras, heads)
    has_or_not = {"reward": known.has_reward, "success": known.has_success}
    has_or_not["prompt_truncated"] = record.prompt_truncated is not None
    optional = {name for name, has in has_or_not.items() if has}
    for array, coordinate, chosen in (
        ("suffix_attention", "layer", selection.layers),
        ("suffix_attention_mean", "all_layer", selection.mean_layers),
        ("prefix_attention", "prefix_layer", selection.prefix_layers),
        ("vision_attention", "vision_layer", selection.vision_layers),
    ):
        if chosen:
            optional.add(array)
            coordinates[coordinate] = np.array(chosen, np.int32)
            if coordinate in ("layer", "all_layer") and not set(chosen) <= record.layers_seeing_suffix:
                sees = [layer in record.layers_seeing_suffix for layer in chosen]
                coordinates[f"{coordinate}_sees_suffix"] = np.array(sees)
    optional |= known.more
    said: dict[str, Any] = {}
    if scenes is not None:
        optional |= scenes.arrays
        sizes |= scenes.sizes
        coordinates |= scenes.coordinates
        said["segmentation"] = {"source": "loop"}  # unless the plan knows better
    if activations is not None:
        optional |= activations.arrays
        sizes |= activations.sizes
        coordinates |= activations.coordinates
        said["activation_dtype"] = record.activation_dtype
    if record.suffix_token_id is not None:
        optional |= {"suffix_token_id", "suffix_token_text"}
    if known.state_dim is not None:
        optional.add("state")
        sizes["state_dim"] = known.state_dim
        coordinates["state_dim"] = known.names.labels("state", known.state_dim)
    queries = record.executed_queries
    return EpisodeWriter(
        plan.path,
        sizes=sizes,
        coordinates=coordinates,
        attributes={
            **said,
            **plan.attributes,
            "task": known.task,
            "success": None,
            "layout": layout.to_dict(),
            "executed_queries": [queries.start, queries.stop],
            "attention_dtype": record.attention_dtype,
            "capture": config.to_dict(),
        },
        compression=Compression(config.compressor, config.level, config.keep_bits),
        optional=optional,
    )
