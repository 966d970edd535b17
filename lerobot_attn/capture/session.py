"""Watch a policy and hand out one `InferenceRecord` per action chunk.

    with capture_attention(policy, AttentionConfig(layers=[-1])) as capture:
        action = policy.select_action(batch)
        for record in capture.drain():
            record.suffix_attention  # (denoise_step, layer, batch, head, query, key)

Knows no policy family (an adapter makes attention observable), no environment, no episode and no file.
Watching changes nothing that the policy computes, draws no random number, and leaves nothing behind.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lerobot_attn.config import AttentionConfig, resolve_indices
from lerobot_attn.errors import CaptureError
from lerobot_attn.layout import TextLabels, TokenLayout, label_text
from lerobot_attn.policies import adapter_for
from lerobot_attn.policies.base import ChosenSuffix, InferenceInputs, PolicyAdapter, PolicyDescription
from lerobot_attn.prompt import PieceDecoder, Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """Which indices of the live policy are captured; all ascending, none negative.

    `heads` and `denoise_steps` apply to the full maps and to the means alike.
    """

    layers: tuple[int, ...]
    mean_layers: tuple[int, ...]
    prefix_layers: tuple[int, ...]
    heads: tuple[int, ...]
    denoise_steps: tuple[int, ...]
    executed_queries: slice  # the action tokens that are executed: what the means are taken over

    @classmethod
    def resolve(cls, config: AttentionConfig, policy: PolicyDescription) -> Selection:
        """Apply the settings to a policy.

        Raises:
            ConfigError: a layer, head or denoise step does not exist.
        """
        first = policy.first_action_query
        return cls(
            layers=resolve_indices("layer", config.layers, policy.n_layers),
            mean_layers=resolve_indices("mean_layer", config.mean_layers, policy.n_layers),
            prefix_layers=resolve_indices("prefix_layer", config.prefix_layers, policy.n_prefix_layers),
            heads=resolve_indices("head", config.heads, policy.n_heads),
            denoise_steps=resolve_indices("denoise step", config.denoise_steps, policy.n_denoise_steps),
            executed_queries=slice(first, first + policy.n_action_steps),
        )

    def bytes_per_inference(self, policy: PolicyDescription) -> int:
        """Size in bytes of one environment's maps for one inference, float16 and uncompressed."""
        suffix_rows = len(self.layers) * policy.n_queries + len(self.mean_layers)
        suffix = len(self.denoise_steps) * len(self.heads) * suffix_rows * policy.n_keys
        prefix = len(self.prefix_layers) * len(self.heads) * policy.prefix_len**2
        return 2 * (suffix + prefix)


class PromptLabels(NamedTuple):
    """What the language slots of one environment's prompt are."""

    pieces: list[str]  # decoded text of each slot
    labels: TextLabels


class HostCopies:
    """Copies of device tensors on their way to host memory; one event tells when all of them are there.

    On CUDA the copies go to pinned memory on the current stream and nobody waits until a value is read.
    """

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._on_cuda = False

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised host tensor that copies from `device` can reach asynchronously."""
        self._on_cuda |= device.type == "cuda"
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def copy(self, source: Tensor) -> Tensor:
        """Start copying a tensor; it may change afterwards."""
        source = source.detach()
        target = self.allocate(tuple(source.shape), source.dtype, source.device)
        return self.copy_into(target, source)

    def copy_into(self, target: Tensor, source: Tensor) -> Tensor:
        """Start copying into a part of an allocated tensor, converted to its dtype before it travels."""
        if source.device.type == "cuda":
            source = source.to(target.dtype)
        return target.copy_(source, non_blocking=True)

    def seal(self) -> None:
        """Mark the end of the copies."""
        if self._on_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Block until every copy has arrived."""
        if self._event is not None:
            self._event.synchronize()


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
    _copies: HostCopies = field(repr=False)
    _suffix: Tensor | None = field(repr=False)
    _suffix_mean: Tensor | None = field(repr=False)
    _prefix: Tensor | None = field(repr=False)
    _flow_time: Tensor = field(repr=False)
    _token_id: Tensor = field(repr=False)
    _key_mask: Tensor = field(repr=False)
    _action_chunk: Tensor = field(repr=False)
    _label: Callable[[np.ndarray, np.ndarray], PromptLabels] = field(repr=False)

    @property
    def batch_size(self) -> int:
        """Number of environments."""
        return len(self._token_id)

    @property
    def n_bytes(self) -> int:
        """Host memory that the arrays take."""
        tensors = (self._suffix, self._suffix_mean, self._prefix, self._token_id, self._action_chunk)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def suffix_attention(self) -> np.ndarray | None:
        """(denoise_step, layer, batch, head, query, key), float16, rows sum to 1; None without layers."""
        return self._numpy(self._suffix)

    @property
    def suffix_attention_mean(self) -> np.ndarray | None:
        """(denoise_step, all_layer, batch, head, key), float16: mean over the executed action queries."""
        return self._numpy(self._suffix_mean)

    @property
    def prefix_attention(self) -> np.ndarray | None:
        """(prefix_layer, batch, head, prefix_query, prefix_key), float16; rows of padding queries are 0."""
        return self._numpy(self._prefix)

    @property
    def flow_time(self) -> np.ndarray:
        """(denoise_step,), float32: t of the Euler step, from 1 (noise) towards 0 (action)."""
        return self._array(self._flow_time)

    @property
    def token_id(self) -> np.ndarray:
        """(batch, text), int32: the language tokens that the policy got."""
        return self._array(self._token_id).astype(np.int32, copy=False)

    @property
    def key_mask(self) -> np.ndarray:
        """(batch, key), bool: True where the suffix may attend."""
        return self._array(self._key_mask)

    @property
    def action_chunk(self) -> np.ndarray:
        """(batch, chunk, action_dim), float32, in the policy's normalised units."""
        return self._array(self._action_chunk)

    @cached_property
    def prompts(self) -> list[PromptLabels]:
        """Pieces and labels of the language slots, one per environment."""
        language = self.layout.language
        masks = self.key_mask[:, language.start : language.stop]
        return [self._label(ids, mask) for ids, mask in zip(self.token_id, masks, strict=True)]

    @property
    def token_text(self) -> list[list[str]]:
        """The decoded piece of each language slot, (batch, text)."""
        return [prompt.pieces for prompt in self.prompts]

    @cached_property
    def key_kind(self) -> np.ndarray:
        """(batch, key), int8: values of `lerobot_attn.layout.Kind`."""
        return np.stack(
            [
                self.layout.key_kind(mask, prompt.labels.kind)
                for mask, prompt in zip(self.key_mask, self.prompts, strict=True)
            ]
        )

    def wait(self) -> None:
        """Block until every array is on the host."""
        self._copies.wait()

    def _array(self, tensor: Tensor) -> np.ndarray:
        self._copies.wait()
        return tensor.numpy()

    def _numpy(self, tensor: Tensor | None) -> np.ndarray | None:
        return None if tensor is None else self._array(tensor)


class AttentionCapture:
    """The records of a running capture; what `capture_attention` yields.

    Attributes:
        records: finished inferences that nobody has taken yet, oldest first.
        n_inferences: how many have finished so far.
        enabled: set it to False to let inferences pass unrecorded, e.g. when nobody needs the next ones.
        policy: sizes of the watched policy.
        selection: which layers, heads and denoise steps are captured.
        adapter: the adapter of the watched policy.
    """

    def __init__(self, adapter: PolicyAdapter, config: AttentionConfig, max_records: int | None = None):
        self.adapter = adapter
        self.policy = adapter.describe()
        self.selection = Selection.resolve(config, self.policy)
        self.records: deque[InferenceRecord] = deque(maxlen=max_records)
        self.n_inferences = 0
        self.enabled = True

    def drain(self) -> Iterator[InferenceRecord]:
        """Take the records that are there, oldest first."""
        while self.records:
            yield self.records.popleft()


class _Collector:
    """The sink: turns what an adapter hands over into records."""

    def __init__(
        self,
        capture: AttentionCapture,
        decoder: PieceDecoder,
        on_record: Callable[[InferenceRecord], None],
        on_failure: Callable[[Exception], None] | None,
    ):
        self._capture = capture
        self._selection = capture.selection
        self._decoder = decoder
        self._on_record = on_record
        self._on_failure = on_failure
        # Position of each chosen index along its array's axis.
        self._layer_slot = {layer: i for i, layer in enumerate(self._selection.layers)}
        self._mean_slot = {layer: i for i, layer in enumerate(self._selection.mean_layers)}
        self._prefix_slot = {layer: i for i, layer in enumerate(self._selection.prefix_layers)}
        self._step_slot = {step: i for i, step in enumerate(self._selection.denoise_steps)}
        all_heads = len(self._selection.heads) == capture.policy.n_heads
        self._heads = None if all_heads else torch.tensor(self._selection.heads)
        self._inputs: InferenceInputs | None = None

    # Everything below runs inside the policy's forward pass: with `on_failure` no exception may reach the
    # policy.

    def begin(self, inputs: InferenceInputs) -> None:
        self.abandon()
        if not self._capture.enabled:
            return
        with self._guard():
            self._inputs = inputs
            self._copies = HostCopies()
            self._suffix: Tensor | None = None
            self._suffix_mean: Tensor | None = None
            self._prefix: Tensor | None = None
            self._flow_times: list[Tensor | float] = []
            self._seen: set[tuple[str, int, int]] = set()
            if inputs.layout.n_keys != self._capture.policy.n_keys:
                raise CaptureError(
                    f"the policy was asked with {inputs.layout.n_keys} key tokens, expected "
                    f"{self._capture.policy.n_keys} as its config says; the batch does not fit the policy"
                )

    def prefix_attention(self, layer: int, weights: Tensor) -> None:
        if self._inputs is None:
            return
        with self._guard():
            self.take_prefix(layer, self.choose_prefix(layer, weights))

    def choose_prefix(self, layer: int, weights: Tensor) -> Tensor:
        prefix_len = self._capture.policy.prefix_len
        self._check("prefix", layer, weights, (prefix_len, prefix_len))
        return self._choose_heads(weights)

    def take_prefix(self, layer: int, chosen: Tensor) -> None:
        if self._inputs is None:
            return
        with self._guard():
            if self._prefix is None:
                shape = (len(self._prefix_slot), *chosen.shape)
                self._prefix = self._copies.allocate(shape, torch.float16, chosen.device)
            # Padding queries softmax over nothing to uniform rows that mean nothing.
            is_query = self._inputs.key_mask[:, None, : chosen.shape[-1], None]
            self._copies.copy_into(self._prefix[self._prefix_slot[layer]], chosen * is_query)
            self._note("prefix", 0, layer)

    def denoise_step(self, flow_time: Tensor | float) -> None:
        if self._inputs is None:
            return
        with self._guard():
            self._flow_times.append(flow_time)

    def suffix_attention(self, layer: int, weights: Tensor) -> None:
        if self._inputs is None:
            return
        with self._guard():
            self.take_suffix(layer, self.choose_suffix(len(self._flow_times) - 1, layer, weights))

    def choose_suffix(self, step: int, layer: int, weights: Tensor) -> ChosenSuffix:
        if step not in self._step_slot:
            return ChosenSuffix(None, None)
        self._check("suffix", layer, weights, (self._capture.policy.n_queries, self._capture.policy.n_keys))
        weights = self._choose_heads(weights)
        mean = None
        if layer in self._mean_slot:
            mean = weights[:, :, self._selection.executed_queries].mean(dim=2, dtype=torch.float32)
        return ChosenSuffix(weights if layer in self._layer_slot else None, mean)

    def take_suffix(self, layer: int, chosen: ChosenSuffix) -> None:
        if self._inputs is None:
            return
        step = len(self._flow_times) - 1
        if step not in self._step_slot:
            return
        with self._guard():
            n_keys, slot, n_steps = self._inputs.layout.n_keys, self._step_slot[step], len(self._step_slot)
            if chosen.maps is not None:
                if self._suffix is None:
                    shape = (n_steps, len(self._layer_slot), *chosen.maps.shape[:-1], n_keys)
                    self._suffix = self._copies.allocate(shape, torch.float16, chosen.maps.device)
                self._fill(self._suffix[slot, self._layer_slot[layer]], chosen.maps)
            if chosen.mean is not None:
                if self._suffix_mean is None:
                    shape = (n_steps, len(self._mean_slot), *chosen.mean.shape[:-1], n_keys)
                    self._suffix_mean = self._copies.allocate(shape, torch.float16, chosen.mean.device)
                self._fill(self._suffix_mean[slot, self._mean_slot[layer]], chosen.mean)
            self._note("suffix", step, layer)

    def end(self, action_chunk: Tensor) -> None:
        if self._inputs is None:
            return
        with self._guard():
            inputs = self._inputs
            self._check_complete()
            copies = self._copies
            flow_time = copies.allocate((len(self._step_slot),), torch.float32, inputs.token_id.device)
            for step, slot in self._step_slot.items():
                value = self._flow_times[step]
                if isinstance(value, Tensor):
                    copies.copy_into(flow_time[slot], value.detach().reshape(-1)[0])
                else:
                    flow_time[slot] = value
            record = InferenceRecord(
                index=self._capture.n_inferences,
                layout=inputs.layout,
                selection=self._selection,
                policy=self._capture.policy,
                _copies=copies,
                _suffix=self._suffix,
                _suffix_mean=self._suffix_mean,
                _prefix=self._prefix,
                _flow_time=flow_time,
                _token_id=copies.copy(inputs.token_id),
                _key_mask=copies.copy(inputs.key_mask),
                _action_chunk=copies.copy(action_chunk.float()),
                _label=self._label,
            )
            copies.seal()
            self.abandon()
            self._capture.n_inferences += 1
            self._on_record(record)

    def abandon(self) -> None:
        self._inputs = None
        self._suffix = self._suffix_mean = self._prefix = None

    def fail(self, error: Exception) -> None:
        if self._inputs is None:
            return
        self.abandon()
        if self._on_failure is None:
            raise error
        self._on_failure(error)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.abandon()
            if self._on_failure is None:
                raise
            self._on_failure(error)

    def _choose_heads(self, weights: Tensor) -> Tensor:
        if self._heads is None:
            return weights
        if self._heads.device != weights.device:  # once, for a copy to the device may wait for it
            self._heads = self._heads.to(weights.device)
        return weights.index_select(1, self._heads)

    def _fill(self, target: Tensor, source: Tensor) -> None:
        keys = source.shape[-1]
        self._copies.copy_into(target[..., :keys], source)
        if keys < target.shape[-1]:
            target[..., keys:] = 0

    def _check(self, part: str, layer: int, weights: Tensor, expected: tuple[int, int]) -> None:
        queries, keys = expected
        fits = (
            weights.ndim == 4
            and weights.shape[1] == self._capture.policy.n_heads
            and weights.shape[2] == queries
            and (weights.shape[3] == keys or (part == "suffix" and weights.shape[3] < keys))
        )
        if not fits:
            raise CaptureError(
                f"{part} attention of layer {layer} has shape {tuple(weights.shape)}, expected (batch, "
                f"{self._capture.policy.n_heads} heads, {queries} queries, {keys} keys); the policy's "
                "forward pass is not "
                "the one that its adapter knows"
            )

    def _note(self, part: str, step: int, layer: int) -> None:
        if (part, step, layer) in self._seen:
            raise CaptureError(
                f"{part} attention of layer {layer} came twice in denoise step {step}, expected once; "
                "the policy's forward pass is not the one that its adapter knows"
            )
        self._seen.add((part, step, layer))

    def _check_complete(self) -> None:
        n_steps = len(self._flow_times)
        if n_steps != self._capture.policy.n_denoise_steps:
            raise CaptureError(
                f"the inference ran {n_steps} denoise steps, expected "
                f"{self._capture.policy.n_denoise_steps}; "
                "was num_steps passed to the policy? set policy.config.num_inference_steps instead"
            )
        layers = set(self._layer_slot) | set(self._mean_slot)
        expected = {("prefix", 0, layer) for layer in self._prefix_slot}
        expected |= {("suffix", step, layer) for step in self._step_slot for layer in layers}
        missing = sorted(expected - self._seen)
        if missing:
            part, step, layer = missing[0]
            raise CaptureError(
                f"{len(missing)} of {len(expected)} attention maps never came, the first of them {part} "
                f"layer {layer} in "
                f"denoise step {step}; the policy's forward pass is not the one that its adapter knows"
            )

    def _label(self, token_ids: np.ndarray, mask: np.ndarray) -> PromptLabels:
        pieces = self._decoder.pieces(token_ids.tolist())
        spans = None
        if self._decoder.can_decode:
            prompt = "".join(piece for piece, used in zip(pieces, mask, strict=True) if used)
            spans = self._capture.adapter.parse_prompt(prompt)
        return PromptLabels(pieces, label_text(pieces, mask, spans))


@contextmanager
def capture_attention(
    policy: Any,
    config: AttentionConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    on_record: Callable[[InferenceRecord], None] | None = None,
    on_failure: Callable[[Exception], None] | None = None,
    max_records: int | None = None,
) -> Iterator[AttentionCapture]:
    """Record the attention of every inference that the policy makes inside the `with` block.

    Works around `select_action`, `predict_action_chunk` or anything that calls them. A policy compiled with
    `compile_model=true` runs uncompiled inside the block, unless `config.compiled` keeps it compiled.

    Args:
        policy: a LeRobot policy, PEFT-wrapped or not.
        config: what to capture; of its settings only `layers`, `denoise_steps`, `heads`, `mean_layers`,
            `prefix_layers` and `compiled` matter here.
        tokenizer: the one whose ids the policy gets, so that words and state digits can be told apart.
            Without it language tokens are labelled `Kind.TEXT`.
        on_record: called with each record as soon as the inference ends, instead of keeping it in
            `capture.records`.
        on_failure: called when an inference could not be captured, which then goes on unwatched. Without it
            the `CaptureError` is raised through the policy's call.
        max_records: keep only the newest so many in `capture.records`. By default every record stays there
            until it is taken with `capture.drain()`.

    Raises:
        UnsupportedPolicyError: no adapter knows this policy.
        ConfigError: a layer, head or denoise step does not exist, or `compiled` cannot be had.
    """
    config = config or AttentionConfig()
    adapter = adapter_for(policy)
    capture = AttentionCapture(adapter, config, max_records)
    collector = _Collector(capture, PieceDecoder(tokenizer), on_record or capture.records.append, on_failure)
    selection = capture.selection
    layers = sorted({*selection.layers, *selection.mean_layers})
    with adapter.observe(
        collector, layers=layers, prefix_layers=selection.prefix_layers, compiled=config.compiled
    ):
        yield capture


def find_tokenizer(preprocessor: Any) -> Tokenizer | None:
    """Return the tokenizer of a LeRobot preprocessor pipeline, or None if it has none."""
    for step in getattr(preprocessor, "steps", ()):
        tokenizer: Tokenizer | None = getattr(step, "input_tokenizer", None)
        if tokenizer is not None:
            return tokenizer
    return None
