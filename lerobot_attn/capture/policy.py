"""A drop-in policy that remembers the attention of its latest inference, for people's own loops."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import PreTrainedPolicy
from torch import Tensor

from lerobot_attn.capture.session import AttentionCapture, capture_attention
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import CaptureError


class AttentionPolicy(PreTrainedPolicy):
    """Wraps a policy, delegates everything to it, and can save its attention maps.

    policy = AttentionPolicy(policy)
    policy.enable_attention_map_saving()
    policy.select_action(batch)
    maps = policy.get_attention_maps(last_n_layers=2)

    The wrapped policy is `policy.policy`. The maps of one inference are kept: the latest.
    """

    config_class = PreTrainedConfig
    name = "attention"

    def __init__(self, policy: PreTrainedPolicy):
        super().__init__(policy.config)
        self.policy = policy
        self._stack = ExitStack()
        self._capture: AttentionCapture | None = None

    def enable_attention_map_saving(self, config: AttentionConfig | None = None) -> None:
        """Start to save. Twice in a row starts afresh.

        Args:
            config: which layers, heads and denoise steps; default: all of them.

        Raises:
            UnsupportedPolicyError: no adapter knows the wrapped policy.
            ConfigError: a layer, head or denoise step does not exist.
        """
        self.disable_attention_map_saving()
        config = config or AttentionConfig(layers="all")
        self._capture = self._stack.enter_context(capture_attention(self.policy, config, max_records=1))

    def disable_attention_map_saving(self) -> None:
        """Stop, forget the maps, and leave the wrapped policy as it was."""
        self._stack.close()
        self._capture = None

    def get_attention_maps(self, last_n_layers: int | None = None) -> dict[int, dict[str, Any]]:
        """Return the suffix-only attention of the latest inference.

        Args:
            last_n_layers: how many of the saved layers, counted from the last; default: two, or the one
                that there is.

        Returns:
            denoise step → `{"time": flow time t, "prefix_len": keys before the suffix, "suffix_len": suffix
            tokens, "attention_weights": {layer: (batch, head, query, key), float16, on the CPU, rows sum to
            1}}`; empty before the first inference and after `clear_attention_maps`. A layer that cannot see
            the suffix has the prefix's keys alone.

        Raises:
            CaptureError: saving is off, or fewer layers were saved than asked for.
        """
        if self._capture is None:
            raise CaptureError("no attention maps are saved; call enable_attention_map_saving() first")
        layers = self._capture.selection.layers
        if last_n_layers is None:
            last_n_layers = min(2, len(layers))
        if not 1 <= last_n_layers <= len(layers):
            raise CaptureError(
                f"last_n_layers: got {last_n_layers}, expected 1 to {len(layers)}, the number of layers that "
                "are saved; "
                "enable_attention_map_saving(AttentionConfig(layers='all')) saves all"
            )
        if not self._capture.records:
            return {}
        record = self._capture.records[-1]
        attention = record.suffix_attention
        assert attention is not None  # at least one layer is saved
        wanted = list(enumerate(layers))[-last_n_layers:]
        n_keys = {
            layer: record.layout.n_keys if layer in record.layers_seeing_suffix else record.layout.prefix_len
            for layer in layers
        }
        return {
            step: {
                "time": float(record.flow_time[i]),
                "prefix_len": record.layout.prefix_len,
                "suffix_len": record.layout.n_queries,
                "attention_weights": {
                    layer: torch.from_numpy(attention[i, j, ..., : n_keys[layer]]) for j, layer in wanted
                },
            }
            for i, step in enumerate(record.selection.denoise_steps)
        }

    def clear_attention_maps(self) -> None:
        """Forget the maps; saving stays on."""
        if self._capture is not None:
            self._capture.records.clear()

    def get_base_model(self) -> PreTrainedPolicy:
        """Return the wrapped policy."""
        return self.policy

    def forward(self, batch: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Delegate to the wrapped policy."""
        return self.policy(batch, *args, **kwargs)

    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Delegate to the wrapped policy."""
        return self.policy.select_action(batch, **kwargs)

    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Delegate to the wrapped policy."""
        return self.policy.predict_action_chunk(batch, **kwargs)

    def reset(self) -> None:
        """Delegate to the wrapped policy."""
        self.policy.reset()

    def get_optim_params(self) -> dict[str, Any]:
        """Delegate to the wrapped policy."""
        return self.policy.get_optim_params()

    def supports_rtc(self) -> bool:
        """Delegate to the wrapped policy."""
        return self.policy.supports_rtc()

    def _save_pretrained(self, save_directory: Any, state_dict: dict[str, Tensor] | None = None) -> None:
        self.policy._save_pretrained(save_directory, state_dict=state_dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "policy":  # not set yet: __init__ is still running
                raise
            return getattr(self.policy, name)
