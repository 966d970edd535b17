"""What was captured of one inference, and which parts were chosen. Knows no policy family and no file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lerobot_attn.capture.activations import REDUCTIONS, ActivationChoice, choose_activations
from lerobot_attn.capture.copies import HostCopies
from lerobot_attn.config import AttentionConfig, resolve_indices
from lerobot_attn.errors import ConfigError
from lerobot_attn.layout import TokenLayout
from lerobot_attn.policies.base import PolicyDescription, Site, SiteInfo, Stream
from lerobot_attn.prompt import TextLabels


@dataclass(frozen=True)
class Selection:
    """Which indices of the live policy are captured; all ascending, none negative.

    `heads` and `denoise_steps` apply to the full maps and to the means alike; the vision tower has heads of
    its own.
    """

    layers: tuple[int, ...]
    mean_layers: tuple[int, ...]
    prefix_layers: tuple[int, ...]
    heads: tuple[int, ...]
    denoise_steps: tuple[int, ...]
    vision_layers: tuple[int, ...] = ()
    vision_heads: tuple[int, ...] = ()  # all of them, where there are vision layers
    activations: tuple[ActivationChoice, ...] = ()  # neurons and residuals
    record_full: bool = False  # every token's activations, too

    @classmethod
    def resolve(
        cls, config: AttentionConfig, policy: PolicyDescription, sites: Mapping[Site, SiteInfo]
    ) -> Selection:
        """Apply the settings to a policy; `mean_layers="auto"` means the layers of `layers`.

        Args:
            config: the settings.
            policy: sizes of the policy.
            sites: those of the policy.

        Raises:
            ConfigError: a layer, head or denoise step does not exist, no layer is chosen, or vision layers,
                neurons or residuals of a policy that has none.
        """
        layers = config.layers
        if layers == AttentionConfig().layers == [-2, -1] and policy.n_layers == 1:
            layers = [-1]  # unless told otherwise the last two, of which there is but one
        chosen = layers if config.mean_layers == "auto" else config.mean_layers
        if config.vision_layers != "none" and not policy.n_vision_layers:
            raise ConfigError(
                f"vision_layers: this policy ({policy.policy_type}) has no vision transformer that can be "
                f"captured, got {config.vision_layers!r}, expected 'none'; leave the setting out"
            )
        vision_layers = resolve_indices("vision_layer", config.vision_layers, policy.n_vision_layers)
        selection = cls(
            layers=resolve_indices("layer", layers, policy.n_layers),
            mean_layers=resolve_indices("mean_layer", chosen, policy.n_layers),
            prefix_layers=resolve_indices("prefix_layer", config.prefix_layers, policy.n_prefix_layers),
            heads=resolve_indices("head", config.heads, policy.n_heads),
            denoise_steps=resolve_indices("denoise step", config.denoise_steps, policy.n_steps),
            vision_layers=vision_layers,
            vision_heads=tuple(range(policy.n_vision_heads)) if vision_layers else (),
            activations=choose_activations(config, policy, sites),
            record_full=config.record_full,
        )
        if not selection.sites:
            raise ConfigError(
                "nothing to capture: got layers='none' and no other layers, expected at least one of layers, "
                "mean_layers, prefix_layers, vision_layers, neurons and residuals; set e.g. mean_layers='all'"
            )
        return selection

    @property
    def sites(self) -> list[Site]:
        """The sites that are needed."""
        expert = sorted({*self.layers, *self.mean_layers})
        prefix = [Site("vlm", layer) for layer in self.prefix_layers]
        vision = [Site("vision", layer) for layer in self.vision_layers]
        activations = [site for choice in self.activations for site in choice.sites]
        return [Site("expert", layer) for layer in expert] + prefix + vision + activations

    def bytes_per_inference(
        self,
        layout: TokenLayout,
        vision_grid: tuple[int, int] | None = None,
        n_groups: Mapping[Stream, int] | None = None,
    ) -> int:
        """Size in bytes of one environment's maps and activations for one inference, float16, uncompressed.

        Args:
            layout: of the inference.
            vision_grid: (rows, columns) of the vision tower's patches of an image, if there are any.
            n_groups: stream → groups of tokens over which its activations are reduced, if there are any.
        """
        suffix_rows = len(self.layers) * layout.n_queries + len(self.mean_layers)
        suffix = len(self.denoise_steps) * len(self.heads) * suffix_rows * layout.n_keys
        prefix = len(self.prefix_layers) * len(self.heads) * layout.prefix_len**2
        n_images = sum(not camera.is_empty for camera in layout.cameras)
        n_patches = 0 if vision_grid is None else math.prod(vision_grid)
        vision = n_images * len(self.vision_layers) * len(self.vision_heads) * n_patches**2
        n_tokens: dict[Stream, int] = {"vlm": layout.prefix_len, "expert": layout.n_queries}
        activations = sum(
            choice.n_bytes(
                len(REDUCTIONS) * (n_groups or {}).get(choice.stream, 0)
                + self.record_full * n_tokens[choice.stream],
                len(self.denoise_steps),
            )
            for choice in self.activations
        )
        return 2 * (suffix + prefix + vision) + activations


class PromptLabels(NamedTuple):
    """What the language slots of one environment's prompt are."""

    pieces: list[str]  # decoded text of each slot
    labels: TextLabels


class LabelledPrompt(NamedTuple):
    """A prompt's labels, and whether its end was cut off; None if that cannot be told."""

    labels: PromptLabels
    is_truncated: bool | None


@dataclass
class InferenceRecord:
    """What a policy attended to during one inference: numpy arrays, on the host when first read.

    Axes are named as in the store; `batch` is the environment. `selection` tells which layers, heads and
    steps the array's indices stand for.
    """

    index: int  # counts the inferences of one capture from 0
    layout: TokenLayout
    selection: Selection
    policy: PolicyDescription
    layers_seeing_suffix: frozenset[int]  # of the layers captured, those that see the suffix's own keys
    attention_dtype: str  # the least precise dtype in which the policy applied its attention, e.g. "bfloat16"
    _copies: HostCopies = field(repr=False)
    _suffix: Tensor | None = field(repr=False)
    _suffix_mean: Tensor | None = field(repr=False)
    _prefix: Tensor | None = field(repr=False)
    _flow_time: Tensor = field(repr=False)
    _token_id: Tensor = field(repr=False)
    _key_mask: Tensor = field(repr=False)
    _action_chunk: Tensor = field(repr=False)
    _label: Callable[[np.ndarray, np.ndarray], LabelledPrompt] = field(repr=False)
    _decoded: Tensor | None = field(repr=False, default=None)
    _pieces: Callable[[list[int]], list[str]] | None = field(repr=False, default=None)
    vision_grid: tuple[int, int] | None = None  # (rows, columns) of the vision tower's patches of an image
    _vision: Tensor | None = field(repr=False, default=None)
    # Stream → names of the groups of tokens over which its activations are reduced.
    activation_groups: Mapping[Stream, tuple[str, ...]] = field(default_factory=dict)
    activation_dtype: str | None = None  # the least precise dtype in which the policy computed them
    _activations: Mapping[str, Tensor] = field(repr=False, default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Number of environments."""
        return len(self._token_id)

    @property
    def executed_queries(self) -> slice:
        """The queries whose actions are executed: what the means are taken over."""
        return executed_queries(self.layout, self.policy)

    @property
    def n_bytes(self) -> int:
        """Host memory that the arrays take."""
        maps = (self._suffix, self._suffix_mean, self._prefix, self._vision)
        tensors = (*maps, *self._activations.values(), self._token_id, self._action_chunk)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def maps_bytes(self) -> int:
        """Size of one environment's maps and activations before they are compressed."""
        n_groups = {stream: len(names) for stream, names in self.activation_groups.items()}
        return self.selection.bytes_per_inference(self.layout, self.vision_grid, n_groups)

    @property
    def suffix_attention(self) -> np.ndarray | None:
        """(denoise_step, layer, batch, head, query, key), float16, rows sum to 1; None without layers.

        Keys that a layer cannot see (the suffix's, in a cross-attention layer) are NaN. So are the rows of
        tokens that an autoregressive policy did not decode or did not read.
        """
        return self._numpy(self._suffix)

    @property
    def suffix_attention_mean(self) -> np.ndarray | None:
        """(denoise_step, all_layer, batch, head, key), float16: mean over the executed action queries.

        Of an autoregressive policy over the tokens that were read. Keys that a layer cannot see are NaN.
        """
        return self._numpy(self._suffix_mean)

    @property
    def prefix_attention(self) -> np.ndarray | None:
        """(prefix_layer, batch, head, prefix_query, prefix_key), float16; rows of padding queries are 0."""
        return self._numpy(self._prefix)

    @property
    def vision_attention(self) -> np.ndarray | None:
        """(camera, vision_layer, batch, vision_head, patch_query, patch_key), float16, rows sum to 1.

        The cameras are `vision_cameras`; patches are numbered row by row from the top left of `vision_grid`.
        None without vision layers.
        """
        return self._numpy(self._vision)

    @property
    def vision_cameras(self) -> list[str]:
        """The cameras that showed an image, in the layout's order: those of `vision_attention`."""
        return [camera.name for camera in self.layout.cameras if not camera.is_empty]

    @property
    def activations(self) -> dict[str, np.ndarray]:
        """Neurons and residuals by the store's names, float16; empty where none were asked for.

        `vlm_neurons`, `vlm_residual`: (batch, vlm_group, reduction, layer, unit), NaN of a group that has no
        token in this environment's inference. `expert_neurons`, `expert_residual`: (batch, denoise_step,
        expert_group, reduction, layer, unit). With `record_full` also `…_full`, whose last axes are (layer,
        token, unit); rows of padding tokens are NaN. What lies beyond ±65504 is infinite.
        """
        found = {}
        for name, tensor in self._activations.items():
            values = np.moveaxis(self._array(tensor), 2, 0)  # (batch, step, layer, …)
            if not name.endswith("_full"):
                values = np.moveaxis(values, 2, -2)
            found[name] = values if name.startswith("expert") else values[:, 0]
        return found

    @property
    def flow_time(self) -> np.ndarray:
        """(denoise_step,), float32: t of the Euler step, from 1 (noise) towards 0 (action).

        NaN of a policy that does not denoise.
        """
        return self._array(self._flow_time)

    @property
    def token_id(self) -> np.ndarray:
        """(batch, text), int32: the language tokens that the policy got."""
        return self._array(self._token_id).astype(np.int32, copy=False)

    @property
    def key_mask(self) -> np.ndarray:
        """(batch, key), bool: True where the suffix may attend.

        Of an autoregressive policy False at the tokens that the inference did not read, which attend to
        nothing either: their rows are NaN.
        """
        return self._array(self._key_mask)

    @property
    def action_chunk(self) -> np.ndarray:
        """(batch, chunk, action_dim), float32, in the policy's normalised units."""
        return self._array(self._action_chunk)

    @property
    def suffix_token_id(self) -> np.ndarray | None:
        """(batch, query), int32: the tokens that an autoregressive policy decoded, -1 behind the last one.

        None of a policy that decodes none.
        """
        return None if self._decoded is None else self._array(self._decoded).astype(np.int32, copy=False)

    @property
    def suffix_token_text(self) -> list[list[str]] | None:
        """The decoded piece of each of these tokens, (batch, query); None of a policy that decodes none."""
        if self.suffix_token_id is None or self._pieces is None:
            return None
        found = []
        for ids in self.suffix_token_id:
            n = int((ids >= 0).sum())
            found.append(self._pieces(ids[:n].tolist()) + [""] * (len(ids) - n))
        return found

    @property
    def prompts(self) -> list[PromptLabels]:
        """Pieces and labels of the language slots, one per environment."""
        return [prompt.labels for prompt in self._labelled]

    @property
    def token_text(self) -> list[list[str]]:
        """The decoded piece of each language slot, (batch, text)."""
        return [prompt.pieces for prompt in self.prompts]

    @property
    def prompt_truncated(self) -> np.ndarray | None:
        """(batch,) bool: whether the prompt did not fit the policy's slots; None if that cannot be told."""
        found = [prompt.is_truncated for prompt in self._labelled]
        return None if None in found else np.array(found, bool)

    @cached_property
    def _labelled(self) -> list[LabelledPrompt]:
        return labelled(self.layout, self.token_id, self.key_mask, self._label)

    @cached_property
    def key_kind(self) -> np.ndarray:
        """(batch, key), int8: values of `lerobot_attn.layout.Kind`."""
        return key_kinds(self.layout, self.key_mask, self._labelled)

    def of(self, env: int) -> InferenceRecord:
        """Return the part of one environment of the batch: a record of a batch of 1, without a copy."""

        def cut(tensor: Tensor | None, axis: int) -> Any:
            return None if tensor is None else tensor.narrow(axis, env, 1)

        return replace(
            self,
            _suffix=cut(self._suffix, 2),
            _suffix_mean=cut(self._suffix_mean, 2),
            _prefix=cut(self._prefix, 1),
            _vision=cut(self._vision, 2),
            _token_id=cut(self._token_id, 0),
            _key_mask=cut(self._key_mask, 0),
            _action_chunk=cut(self._action_chunk, 0),
            _decoded=cut(self._decoded, 0),
            _activations={name: cut(tensor, 2) for name, tensor in self._activations.items()},
        )

    def wait(self) -> None:
        """Block until every array is on the host."""
        self._copies.wait()

    def _array(self, tensor: Tensor) -> np.ndarray:
        self._copies.wait()
        return tensor.numpy()

    def _numpy(self, tensor: Tensor | None) -> np.ndarray | None:
        return None if tensor is None else self._array(tensor)


def labelled(
    layout: TokenLayout,
    token_id: np.ndarray,
    key_mask: np.ndarray,
    label: Callable[[np.ndarray, np.ndarray], LabelledPrompt],
) -> list[LabelledPrompt]:
    """Return the labels of each environment's prompt.

    Args:
        layout: the tokens of the inference.
        token_id: (batch, text).
        key_mask: (batch, key).
        label: from ids and mask of the language slots to their labels.
    """
    masks = key_mask[:, layout.language.start : layout.language.stop]
    return [label(ids, mask) for ids, mask in zip(token_id, masks, strict=True)]


def key_kinds(layout: TokenLayout, key_mask: np.ndarray, prompts: list[LabelledPrompt]) -> np.ndarray:
    """Return (batch, key) int8, values of `Kind`, from the mask (batch, key) and each prompt's labels."""
    pairs = zip(key_mask, prompts, strict=True)
    return np.stack([layout.key_kind(mask, prompt.labels.labels.kind) for mask, prompt in pairs])


def executed_queries(layout: TokenLayout, policy: PolicyDescription) -> slice:
    """Return the suffix queries whose actions are executed; all, where no token is an action."""
    queries = layout.action_queries
    if policy.n_decode_steps:  # all of them together make the actions
        return queries
    return slice(queries.start, min(queries.stop, queries.start + policy.n_action_steps))
