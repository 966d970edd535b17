#!/usr/bin/env python
"""Capture one inference of Pi0.5 at its released size, with random bfloat16 weights, and write it to a store.

python benchmarks/full_size_inference.py        # 4.1 B parameters, 11 GB of memory, minutes on a CPU

Checks shapes, row sums and masked keys, and prints sizes. The weights are random: the maps mean nothing, and
their compression ratio is not that of a trained policy.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy, PI05Pytorch
from lerobot.policies.pretrained import PreTrainedPolicy

from lerobot_attn.capture import capture_attention
from lerobot_attn.config import AttentionConfig
from lerobot_attn.recorder import EpisodePlan, RolloutRecorder
from lerobot_attn.store.background import BackgroundWriter
from lerobot_attn.store.reader import open_episode

CAMERAS = ("observation.images.image", "observation.images.image2")


class EmptyPI05Policy(PI05Policy):
    """Pi0.5 whose weights are allocated and filled in place, without a first copy in float32."""

    def __init__(self, config: PI05Config):
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.init_rtc_processor()
        with torch.device("meta"):
            self.model = PI05Pytorch(config)
        self.model.to_empty(device="cpu")
        _fill(self.model)
        self.reset()


def _fill(model: PI05Pytorch) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
    both = model.paligemma_with_expert
    for tower in (both.paligemma.model.language_model, both.gemma_expert.model):
        rotary = tower.rotary_emb
        inverse, _ = rotary.compute_default_rope_parameters(rotary.config, device="cpu")
        rotary.inv_freq.copy_(inverse)
        if hasattr(rotary, "original_inv_freq"):
            rotary.original_inv_freq = inverse.clone()
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
        elif name.endswith("embed_scale"):
            buffer.fill_(both.paligemma.config.text_config.hidden_size**0.5)


def main() -> None:
    """Run one inference and print what was captured as JSON."""
    features = {name: PolicyFeature(FeatureType.VISUAL, (3, 360, 360)) for name in CAMERAS}
    config = PI05Config(
        input_features={**features, "observation.state": PolicyFeature(FeatureType.STATE, (8,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        dtype="bfloat16",
        device="cpu",
        n_action_steps=10,
        empty_cameras=1,
    )
    policy = EmptyPI05Policy(config).eval()
    mask = torch.zeros(1, config.tokenizer_max_length, dtype=torch.bool)
    mask[:, :40] = True
    batch = {
        **{name: torch.rand(1, 3, 360, 360) for name in CAMERAS},
        "observation.language.tokens": torch.randint(0, 250_000, mask.shape),
        "observation.language.attention_mask": mask,
    }
    settings = AttentionConfig(layers="all")
    folder = Path(tempfile.mkdtemp())
    writer = BackgroundWriter(max_bytes=settings.queue_mb * 1_000_000)
    plan = EpisodePlan(index=0, path=folder / "task_0" / "episode_00000.zarr", fps=10, attributes={})
    with capture_attention(policy, settings) as capture:
        recorder = RolloutRecorder(
            [plan], config=settings, writer=writer, camera_views=capture.adapter.camera_views
        )
        started = time.perf_counter()
        with torch.inference_mode():
            action = policy.select_action(batch)
        inference_s = time.perf_counter() - started
        (record,) = capture.drain()
    maps = record.suffix_attention
    assert maps is not None
    started = time.perf_counter()
    recorder.on_observation(None, ["random weights"])
    recorder.on_inference(record)
    recorder.on_action(batch, action)
    step = np.zeros(1)
    recorder.on_step(action.numpy(), step, step.astype(bool), step.astype(bool))
    recorder.finish(rewards=step[:, None], successes=step[:, None].astype(bool))
    writer.close()
    write_s = time.perf_counter() - started
    episode = open_episode(plan.path)
    stored = episode.dataset.suffix_attention[0]
    sample = maps[:, :, 0, :, :, :].astype(np.float32)
    print(
        json.dumps(
            {
                "parameters": sum(parameter.numel() for parameter in policy.parameters()),
                "suffix_attention": list(maps.shape),
                "suffix_attention_mean": list(record.suffix_attention_mean.shape),  # type: ignore[union-attr]
                "raw_mb": round(episode.raw_bytes() / 1e6, 1),
                "stored_mb": round(episode.stored_bytes() / 1e6, 1),
                "row_sum_max_deviation": float(np.abs(sample.sum(-1) - 1).max()),
                "masked_keys_max": float(maps[..., ~record.key_mask[0]].max()),
                "stored_equals_captured": bool((stored.values == maps[:, :, 0]).all()),
                "complete": episode.is_complete,
                "inference_s": round(inference_s, 1),
                "write_s": round(write_s, 1),
                "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
