"""Policies to measure with: Pi0.5 at its released size, and the demo policy, both with random weights.

    policy = tiny_policy()
    with capture_attention(policy) as capture, torch.inference_mode():
        policy.predict_action_chunk(observation(policy, batch_size=4))

Also plays an episode into a recorder. Knows no simulation and times nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy, PI05Pytorch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from lerobot_attn import AttentionCapture, AttentionConfig, InferenceRecord
from lerobot_attn.demo.configuration_pi05_tiny import PI05TinyConfig
from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy
from lerobot_attn.recording.background import BackgroundWriter
from lerobot_attn.recording.handle import EpisodeHandle
from lerobot_attn.recording.plan import EpisodePlan
from lerobot_attn.recording.rollout import RolloutRecorder

CAMERAS = ("observation.images.image", "observation.images.image2")
IMAGE_PX = 360
N_PROMPT = 40  # language tokens that are not padding

_PRESETS = Path(__file__).parent.parent / "configs" / "capture"


def captures(**changes: Any) -> dict[str, AttentionConfig]:
    """Return the settings that are measured: what they are called → the settings."""
    presets = {
        "default": AttentionConfig(),
        "summary": AttentionConfig.from_yaml(_PRESETS / "summary.yaml"),
        "all layers": AttentionConfig.from_yaml(_PRESETS / "all_layers.yaml"),
    }
    return {name: AttentionConfig.from_dict(preset.to_dict() | changes) for name, preset in presets.items()}


def tiny_policy(device: str = "cpu", *, compiled: bool = False, **sizes: Any) -> PI05TinyPolicy:
    """Return the demo policy; each call gives the same weights.

    Args:
        device: where to.
        compiled: with `torch.compile`, as `compile_model=true` does.
        sizes: settings of `PI05TinyConfig`, e.g. `depth=18`.
    """
    return PI05TinyPolicy(PI05TinyConfig(**_settings(device, compiled), **sizes)).eval()


def full_size_policy(
    device: str = "cpu", *, compiled: bool = False, weights_of: PI05Policy | None = None
) -> PI05Policy:
    """Return Pi0.5 as LeRobot builds it, 4.1 B parameters, with random bfloat16 weights: 8.3 GB.

    Args:
        device: where to.
        compiled: with `torch.compile`, as `compile_model=true` does.
        weights_of: share this policy's weights, so that a second policy takes no memory.
    """
    config = PI05Config(**_settings(device, compiled), dtype="bfloat16", empty_cameras=1)
    return _EmptyPI05Policy(config, weights_of).eval()


def observation(policy: PI05Policy, batch_size: int = 1) -> dict[str, Tensor]:
    """Return what the policy is shown: two random pictures and a prompt, the same for each environment."""
    config: Any = policy.config
    generator = torch.Generator().manual_seed(0)
    n_text = config.tokenizer_max_length
    vocabulary = policy.model.paligemma_with_expert.paligemma.config.text_config.vocab_size
    batch = {name: torch.rand(1, 3, IMAGE_PX, IMAGE_PX, generator=generator) for name in CAMERAS}
    batch["observation.language.tokens"] = torch.randint(0, vocabulary, (1, n_text), generator=generator)
    batch["observation.language.attention_mask"] = torch.arange(n_text)[None] < N_PROMPT
    return {
        name: value.expand(batch_size, *value.shape[1:]).contiguous().to(config.device)
        for name, value in batch.items()
    }


@torch.inference_mode()
def infer(policy: PI05Policy, batch: dict[str, Tensor]) -> Tensor:
    """Return an action chunk, (batch, chunk, action_dim), always from the same noise."""
    torch.manual_seed(0)
    chunk: Tensor = policy.predict_action_chunk(batch)
    return chunk


class Player:
    """Records episodes of made-up frames: every `n_action_steps` frames an inference, as in a rollout.

    Args:
        capture: of the policy that made the inferences.
        config: how to store them.
        folder: where the stores go.
    """

    def __init__(self, capture: AttentionCapture, config: AttentionConfig, folder: Path):
        self._capture = capture
        self._config = config
        self._folder = folder
        self._n_episodes = 0

    def play(
        self, writer: BackgroundWriter, batch: dict[str, Tensor], inferences: Sequence[InferenceRecord]
    ) -> list[EpisodeHandle]:
        """Record one episode for each environment of the batch.

        Args:
            writer: writes; what is queued is not waited for.
            batch: what the policy was shown, at each frame.
            inferences: the episode's; each with the environments of the batch.

        Returns:
            The jobs of the episodes; their `result` is there once the writer is closed.
        """
        n_envs, n_frames = inferences[0].batch_size, self._capture.policy.n_action_steps
        recorder = RolloutRecorder(
            [self._plan() for _ in range(n_envs)],
            config=self._config,
            writer=writer,
            camera_views=self._capture.adapter.camera_views,
        )
        state, zeros = np.zeros((n_envs, 8)), np.zeros(n_envs)
        for record in inferences:
            for frame in range(n_frames):
                recorder.on_observation(state, ["made-up frames"] * n_envs)
                if frame == 0:
                    recorder.on_inference(record)
                action = record.action_chunk[:, frame]
                recorder.on_action(batch, torch.from_numpy(action))
                recorder.on_step(action, zeros, zeros.astype(bool), zeros.astype(bool))
        nothing = np.zeros((n_envs, n_frames * len(inferences)))
        return recorder.finish(rewards=nothing, successes=nothing.astype(bool))

    def _plan(self) -> EpisodePlan:
        index, self._n_episodes = self._n_episodes, self._n_episodes + 1
        path = self._folder / "made_up_0" / f"episode_{index:05d}.zarr"
        attributes = {"task_group": "made_up", "task_id": 0, "episode_index": index, "seed": index}
        return EpisodePlan(index=index, path=path, fps=20, attributes=attributes)


class _EmptyPI05Policy(PI05Policy):
    """Pi0.5 whose weights are allocated and filled in place, without a first copy in float32."""

    def __init__(self, config: PI05Config, weights_of: PI05Policy | None):
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.init_rtc_processor()
        with torch.device("meta"):
            self.model = PI05Pytorch(config)
        if weights_of is None:
            self.model.to_empty(device=config.device)
            _fill(self.model)
        else:
            _share(weights_of.model, self.model)
        self.reset()


def _settings(device: str, compiled: bool) -> dict[str, Any]:
    features = {name: PolicyFeature(FeatureType.VISUAL, (3, IMAGE_PX, IMAGE_PX)) for name in CAMERAS}
    return {
        "input_features": {**features, "observation.state": PolicyFeature(FeatureType.STATE, (8,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (7,))},
        "device": device,
        "n_action_steps": 10,
        "compile_model": compiled,
        "compile_mode": "default",
    }


def _fill(model: PI05Pytorch) -> None:
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
    both = model.paligemma_with_expert
    for tower in (both.paligemma.model.language_model, both.gemma_expert.model):
        rotary = tower.rotary_emb
        inverse, _ = rotary.compute_default_rope_parameters(rotary.config, device=device)
        rotary.inv_freq.copy_(inverse)
        if hasattr(rotary, "original_inv_freq"):
            rotary.original_inv_freq = inverse.clone()
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
        elif name.endswith("embed_scale"):
            buffer.fill_(both.paligemma.config.text_config.hidden_size**0.5)


def _share(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Let `target` hold the very tensors of `source`, a module of the same structure."""
    for theirs, mine in zip(source.modules(), target.modules(), strict=True):
        mine._parameters.update(theirs._parameters)
        mine._buffers.update(theirs._buffers)
