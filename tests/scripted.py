"""A policy whose attention and actions are known in advance, its adapter, and an environment for it.

The policy's attention is not made by modules: its adapter observes it by replacing a function, as SmolVLA's
must. Its suffix opens with a state token, as pi0's does, and its odd layers attend to the prefix alone, as
SmolVLA's do. So what runs here uses the whole width of the seam between adapters and capture.
"""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.policies import PreTrainedPolicy

from lerobot_attn.layout import Camera, ImageGeometry, Segment, TokenLayout
from lerobot_attn.policies.base import InferenceInputs, PolicyDescription, Site, SiteInfo
from lerobot_attn.policies.taps import begun, check_sites, replaced_attribute, replacement

N_PATCHES, N_TEXT, CHUNK, HEADS, LAYERS, STEPS = 4, 3, 50, 2, 4, 3
PREFIX = N_PATCHES + N_TEXT
QUERIES = 1 + CHUNK
CAMERA = "observation.images.image"


@PreTrainedConfig.register_subclass("scripted")
@dataclass
class ScriptedConfig(PreTrainedConfig):
    n_action_steps: int = 10
    num_inference_steps: int = STEPS
    chunk_size: int = CHUNK
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=dict)

    @property
    def observation_delta_indices(self):
        return None

    @property
    def action_delta_indices(self):
        return None

    @property
    def reward_delta_indices(self):
        return None

    def get_optimizer_preset(self):
        raise NotImplementedError

    def get_scheduler_preset(self):
        return None

    def validate_features(self):
        pass


def make_config(**settings):
    return ScriptedConfig(
        input_features={CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 8, 8))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (4,))},
        device="cpu",
        **settings,
    )


def attention_of(inference, step, layer, batch, n_text=N_TEXT):
    """What the scripted policy "attends" with: (batch, head, query, key), known from the indices."""
    prefix = N_PATCHES + n_text
    n_keys = prefix if layer % 2 else prefix + QUERIES
    generator = torch.Generator().manual_seed(1_000_000 * inference + 1000 * step + layer)
    return torch.softmax(3 * torch.randn(batch, HEADS, QUERIES, n_keys, generator=generator), dim=-1)


class ScriptedPolicy(PreTrainedPolicy):
    """Action of token k in inference i of environment e is (e, i, k, noise and what was attended to)."""

    config_class = ScriptedConfig
    name = "scripted"

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.n_inferences = 0
        self.n_text = N_TEXT  # a test may change it between inferences, as SmolVLA's prompts do
        self.fail_at = None
        self.noise_shape = (CHUNK, 4)  # None: it draws its own, as it does here in any case
        self.reset()

    def reset(self):
        self._queue = deque()

    def attend(self, part, layer, weights):
        return weights

    def predict_action_chunk(self, batch, **kwargs):
        n, prefix = len(batch[CAMERA]), N_PATCHES + self.n_text
        attended = torch.zeros(n)
        for layer in range(LAYERS):
            weights = torch.softmax(
                torch.arange(prefix * prefix).reshape(1, 1, prefix, prefix) / 7 + layer, -1
            )
            weights = self.attend("prefix", layer, weights.expand(n, HEADS, -1, -1))
            attended += weights[..., 0].mean(dim=(1, 2))
        for step in range(self.config.num_inference_steps):
            for layer in range(LAYERS):
                if self.fail_at == (self.n_inferences, step, layer):
                    raise RuntimeError("the policy broke")
                weights = attention_of(self.n_inferences, step, layer, n, self.n_text)
                weights = self.attend((step, 1 - step / STEPS), layer, weights)
                attended += weights[..., 0].mean(dim=(1, 2))
        env, token = torch.meshgrid(torch.arange(n), torch.arange(CHUNK), indexing="ij")
        inference = torch.full_like(env, self.n_inferences)
        self.n_inferences += 1
        # The last number tells what was attended to, so that an edit shows.
        last = torch.rand(n, CHUNK) + attended[:, None]
        return torch.stack([env, inference, token, last], dim=-1).float()

    def select_action(self, batch, **kwargs):
        if not self._queue:
            actions = self.predict_action_chunk(batch)[:, : self.config.n_action_steps]
            self._queue.extend(actions.transpose(0, 1))
        return self._queue.popleft()

    def forward(self, batch):
        raise NotImplementedError

    def get_optim_params(self):
        return {}


class ScriptedAdapter:
    policy_types = ("scripted",)
    predicts = "predict_action_chunk"

    def __init__(self, policy):
        self.policy = policy

    def describe(self):
        return PolicyDescription(
            policy_type="scripted",
            n_layers=LAYERS,
            n_prefix_layers=LAYERS,
            n_heads=HEADS,
            n_denoise_steps=self.policy.config.num_inference_steps,
            chunk_size=CHUNK,
            n_action_steps=self.policy.config.n_action_steps,
            noise_shape=self.policy.noise_shape,
        )

    def sites(self):
        prefix = {Site("vlm", layer): SiteInfo(n_heads=HEADS, keys="prefix") for layer in range(LAYERS)}
        return prefix | {
            Site("expert", layer): SiteInfo(n_heads=HEADS, keys="prefix" if layer % 2 else "prefix+suffix")
            for layer in range(LAYERS)
        }

    @contextmanager
    def observe(self, probe, sites, *, compiled):
        sites = check_sites(sites, self.sites())
        predict, attend = self.policy.predict_action_chunk, self.policy.attend
        step_now = None

        def observed_predict(batch, **kwargs):
            nonlocal step_now
            step_now = None
            n, _, height, width = batch[CAMERA].shape
            n_text = self.policy.n_text
            prefix = N_PATCHES + n_text
            geometry = ImageGeometry.letterbox((height, width), (8, 8), (2, 2), padding="left_top")
            layout = TokenLayout(
                (
                    Segment("image", CAMERA, 0, N_PATCHES),
                    Segment("language", "language", N_PATCHES, prefix),
                    Segment("state", "state", prefix, prefix + 1),
                    Segment("action", "action", prefix + 1, prefix + QUERIES),
                ),
                prefix,
                (Camera(CAMERA, geometry),),
            )
            mask = torch.ones(n, layout.n_keys, dtype=torch.bool)
            begun(probe, lambda: InferenceInputs(layout, torch.arange(n_text).expand(n, -1), mask))
            try:
                actions = predict(batch, **kwargs)
            except BaseException:
                probe.abandon()
                raise
            probe.end(actions)
            return actions

        def observed_attend(part, layer, weights):
            nonlocal step_now
            if part != "prefix" and part != step_now:
                step_now = part
                probe.denoise_step(part[1])
            site = Site("vlm" if part == "prefix" else "expert", layer)
            given = probe.at(site, weights) if site in sites else None
            return attend(part, layer, replacement(site, weights, given))

        with (
            replaced_attribute(self.policy, "predict_action_chunk", observed_predict),
            replaced_attribute(self.policy, "attend", observed_attend),
        ):
            yield

    def camera_views(self, batch):
        return {CAMERA: (batch[CAMERA].permute(0, 2, 3, 1) * 255).round().byte()}

    def parse_prompt(self, prompt):
        return None


ADAPTER = (__name__, "ScriptedAdapter")


class ScriptedEnv(gym.Env):
    """Ends after `length` steps; its picture is as bright as 4 times the frame, its reward is the frame."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012  as gymnasium declares it
    task = "scripted"
    task_description = "do as told"

    def __init__(self, length, success, max_steps, fail_at=None, size=8):
        self._length, self._success, self._fail_at = length, success, fail_at
        self._max_episode_steps, self._size = max_steps, size
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (size, size, 3), np.uint8)}),
                "agent_pos": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
            }
        )
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self._t = 0

    def _observation(self):
        image = np.full((self._size, self._size, 3), min(4 * self._t, 255), np.uint8)
        return {"pixels": {"image": image}, "agent_pos": np.array([self._t, -self._t], np.float64)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._t = 0
        return self._observation(), {"is_success": False}

    def step(self, action):
        if self._t == self._fail_at:
            raise RuntimeError("the environment broke")
        reward = float(self._t)
        self._t += 1
        ended = self._t >= self._length
        return self._observation(), reward, ended, False, {"is_success": ended and self._success}

    def render(self):
        return self._observation()["pixels"]["image"]


def make_envs(lengths, successes=None, max_steps=1000, fail_at=None, size=8):
    successes = successes or [False] * len(lengths)
    return gym.vector.SyncVectorEnv(
        [
            lambda length=length, success=success: ScriptedEnv(length, success, max_steps, fail_at, size)
            for length, success in zip(lengths, successes, strict=True)
        ],
        autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
    )
