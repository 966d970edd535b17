"""The probe that records: turns what an adapter hands over into `InferenceRecord`s.

Runs inside the policy's forward pass. Knows no policy family, no episode and no file.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lerobot_attn.capture.activations import ActivationCollector
from lerobot_attn.capture.copies import HostCopies, least_precise
from lerobot_attn.capture.decoding import DecodedRows, mean_of_rows
from lerobot_attn.capture.record import (
    InferenceRecord,
    LabelledPrompt,
    PromptLabels,
    Selection,
    executed_queries,
    key_kinds,
    labelled,
)
from lerobot_attn.errors import CaptureError
from lerobot_attn.policies.base import (
    InferenceInputs,
    ParsedPrompt,
    PolicyDescription,
    Site,
    SiteInfo,
    Stream,
)
from lerobot_attn.policies.taps import in_trial_pass
from lerobot_attn.prompt import PieceDecoder, label_text

logger = logging.getLogger(__name__)

# What the attention of each tower is called.
_PARTS: dict[Stream, str] = {"vision": "vision", "vlm": "prefix", "expert": "suffix"}
_UNLIKE = "the policy's forward pass is not the one that its adapter knows"
_PREFIX_PASS = "the prefix pass"


class _Chosen(NamedTuple):
    """What is kept of a site's attention; None of what is not."""

    maps: Tensor | None  # (batch, head, query, key) of the chosen heads
    mean: Tensor | None  # (batch, head, key), float32, over the executed action queries
    like: Tensor  # (0,), of the dtype in which the policy applied its attention


class Collector:
    """Collects one inference at a time.

    Args:
        policy: sizes of the watched policy.
        sites: its sites.
        selection: which layers, heads and denoise steps are kept.
        decoder: decodes the language tokens.
        parse_prompt: the adapter's.
        on_record: called with each finished record.
        on_failure: called when an inference could not be captured, which then goes on unwatched. Without it
            the error is raised through the policy's call.

    Attributes:
        enabled: whether inferences are recorded.
        n_inferences: how many were recorded so far.
    """

    edits: ClassVar[bool] = False

    def __init__(
        self,
        policy: PolicyDescription,
        sites: Mapping[Site, SiteInfo],
        selection: Selection,
        *,
        decoder: PieceDecoder,
        parse_prompt: Callable[[str], ParsedPrompt | None],
        on_record: Callable[[InferenceRecord], None],
        on_failure: Callable[[Exception], None] | None,
    ):
        self.enabled = True
        self.n_inferences = 0
        self._policy = policy
        self._selection = selection
        self._decoder = decoder
        self._parse_prompt = parse_prompt
        self._on_record = on_record
        self._on_failure = on_failure
        # Position of each chosen index along its array's axis.
        self._layer_slot = {layer: i for i, layer in enumerate(selection.layers)}
        self._mean_slot = {layer: i for i, layer in enumerate(selection.mean_layers)}
        self._prefix_slot = {layer: i for i, layer in enumerate(selection.prefix_layers)}
        self._vision_slot = {layer: i for i, layer in enumerate(selection.vision_layers)}
        self._step_slot = {step: i for i, step in enumerate(selection.denoise_steps)}
        self._sees_suffix = frozenset(
            site.layer
            for site in selection.sites
            if site[::2] == ("expert", "attention") and sites[site].keys != "prefix"
        )
        n_steps, full = len(selection.denoise_steps), selection.record_full
        self._activations = ActivationCollector(selection.activations, n_steps, full=full)
        all_heads = len(selection.heads) == policy.n_heads
        self._heads = None if all_heads else torch.tensor(selection.heads)
        self._inputs: InferenceInputs | None = None
        self._truncation_told = False

    def begin(self, inputs: InferenceInputs) -> None:
        """Start to collect an inference; one that was never ended is reported."""
        if self._inputs is not None:
            self.fail(
                CaptureError(
                    "an inference began before the one before it had ended, expected one at a time; what was "
                    "captured of that one is lost"
                )
            )
        self.abandon()
        # Also of an inference that is let pass, because a compiled graph is made anew when these change.
        layout, executed = inputs.layout, executed_queries(inputs.layout, self._policy)
        self._n_queries, self._n_keys, self._prefix_len = layout.n_queries, layout.n_keys, layout.prefix_len
        self._first_executed, self._stop_executed = executed.start, executed.stop
        self._n_patches = 0 if inputs.vision_grid is None else math.prod(inputs.vision_grid)
        if not self.enabled or in_trial_pass():
            return
        with self._guard():
            self._copies = HostCopies()
            self._suffix: Tensor | None = None
            self._suffix_mean: Tensor | None = None
            self._prefix: Tensor | None = None
            self._vision: Tensor | None = None
            shown = [camera.name for camera in layout.cameras if not camera.is_empty]
            self._camera_slot = {name: i for i, name in enumerate(shown)}
            self._camera: str | None = None
            self._flow_times: list[Tensor | float] = []
            self._seen: set[tuple[Site, str]] = set()
            self._dtypes: set[torch.dtype] = set()
            self._rows = DecodedRows(self._prefix_len, self._n_queries)
            if self._selection.activations:
                # Which tokens are words and which are numbers decides what is reduced, so the host must know
                # them now: the one time that it waits for the device.
                masks = inputs.key_mask.cpu().numpy()
                prompts = labelled(layout, inputs.token_id.cpu().numpy(), masks, self._label)
                self._activations.begin(layout, key_kinds(layout, masks, prompts), executed, self._copies)
            self._inputs = inputs

    def camera(self, name: str) -> None:
        """Note that the vision tower starts on a camera's image."""
        if self._inputs is not None:
            self._camera = name

    def denoise_step(self, flow_time: Tensor | float) -> None:
        """Note that the next Euler step starts."""
        if self._inputs is not None:
            self._flow_times.append(flow_time)

    def at(self, site: Site, value: Tensor) -> None:
        """Keep what was chosen of a site's attention or activations, and change nothing."""
        if self._inputs is None:
            return
        with self._guard():
            if site.what != "attention":
                self._take_activations(site, value.detach())
                return
            if self._policy.n_decode_steps and site.stream == "expert":
                self._check(site, value, 1, self._rows.n_keys(site))
                self._rows.add(site, self._choose_heads(value.detach()))
                return
            self._take(site, self.choose(site, len(self._flow_times) - 1, value.detach()))

    def choose(self, site: Site, denoise_step: int, value: Tensor) -> _Chosen | None:
        """Return what is kept of a site's attention: (batch, head, query, key); None if nothing is.

        Raises:
            CaptureError: its shape is not the one that the layout says.
        """
        if site.stream == "vision":
            self._check(site, value, self._n_patches, self._n_patches)
            return _Chosen(value, None, value.new_empty(0))
        if site.stream == "vlm":
            self._check(site, value, self._prefix_len, self._prefix_len)
            return _Chosen(self._choose_heads(value), None, value.new_empty(0))
        if denoise_step not in self._step_slot:
            return None
        n_keys = self._n_keys if site.layer in self._sees_suffix else self._prefix_len
        self._check(site, value, self._n_queries, n_keys)
        like = value.new_empty(0)
        value = self._choose_heads(value)
        mean = None
        if site.layer in self._mean_slot:
            executed = value[:, :, self._first_executed : self._stop_executed]
            mean = executed.mean(dim=2, dtype=torch.float32)
        return _Chosen(value if site.layer in self._layer_slot else None, mean, like)

    def take(self, site: Site, chosen: _Chosen | None) -> None:
        """Keep what `choose` returned, in the denoise step that was started last."""
        if self._inputs is None:
            return
        with self._guard():
            self._take(site, chosen)

    def end(self, action_chunk: Tensor) -> None:
        """Make the record of the inference and hand it on."""
        if self._inputs is None:
            return
        with self._guard():
            if self._policy.n_decode_steps:
                self._take_decoded(self._inputs)
            record = self._record(self._inputs, action_chunk)
            self.abandon()
            self.n_inferences += 1
            self._on_record(record)

    def abandon(self) -> None:
        """Forget what was collected of an inference."""
        self._inputs = None
        self._suffix = self._suffix_mean = self._prefix = self._vision = None
        self._activations.abandon()

    def fail(self, error: Exception) -> None:
        """Forget the inference and report the error.

        Raises:
            Exception: the error, where nobody takes failures.
        """
        if self._inputs is not None:
            self._report(error)

    def refuse(self, error: Exception) -> None:
        """Report, as `fail` does, an inference whose tokens cannot be told, unless it is let pass."""
        self.abandon()
        if self.enabled and not in_trial_pass():
            self._report(error)

    def close(self) -> None:
        """The watching ends: an inference that was begun and never ended is reported."""
        self.fail(CaptureError("the watching ended inside an inference, expected it to end first"))

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """With `on_failure` no exception may reach the policy."""
        try:
            yield
        except Exception as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        self.abandon()
        if self._on_failure is None:
            raise error
        self._on_failure(error)

    def _take_activations(self, site: Site, value: Tensor) -> None:
        """Keep what was chosen of a layer's neurons or residual stream: (batch, token, unit)."""
        step = len(self._flow_times) - 1
        if site.stream == "expert" and step not in self._step_slot:
            return
        self._note(site, _PREFIX_PASS if site.stream == "vlm" else f"denoise step {step}")
        self._activations.take(site, self._step_slot.get(step, 0) if site.stream == "expert" else 0, value)

    def _take_decoded(self, inputs: InferenceInputs) -> None:
        """Take the maps that the rows of the decoded tokens make up."""
        if len(inputs.decoded) != 1:
            raise CaptureError(
                "the policy never said which tokens it decoded, expected it to before it ended"
            )
        for site in self._selection.sites:
            if site.stream != "expert":
                continue
            maps = self._rows.maps(site, inputs.decoded[0], len(self._selection.heads))
            if maps is None:
                continue
            mean = mean_of_rows(maps) if site.layer in self._mean_slot else None
            kept = maps if site.layer in self._layer_slot else None
            self._take(site, _Chosen(kept, mean, maps.new_empty(0)))

    def _take(self, site: Site, chosen: _Chosen | None) -> None:
        if chosen is None:
            return
        assert self._inputs is not None
        if site.stream == "vision" and self._camera not in self._camera_slot:
            return  # a camera that is missing: the policy looks at a blank image, and its tokens are masked
        self._dtypes.add(chosen.like.dtype)
        if site.stream == "vision":
            assert chosen.maps is not None
            assert self._camera is not None
            self._note(site, self._camera)
            if self._vision is None:
                shape = (len(self._camera_slot), len(self._vision_slot), *chosen.maps.shape)
                self._vision = self._copies.allocate(shape, torch.float16, chosen.maps.device)
            target = self._vision[self._camera_slot[self._camera], self._vision_slot[site.layer]]
            self._copies.copy_into(target, chosen.maps)
            return
        if site.stream == "vlm":
            assert chosen.maps is not None
            self._note(site, _PREFIX_PASS)
            if self._prefix is None:
                shape = (len(self._prefix_slot), *chosen.maps.shape)
                self._prefix = self._copies.allocate(shape, torch.float16, chosen.maps.device)
            # A padding query attends to no key, so its row is uniform noise or no number: it is set to 0.
            is_padding = ~self._inputs.key_mask[:, None, : chosen.maps.shape[-1], None].bool()
            maps = chosen.maps.masked_fill(is_padding, 0)
            self._copies.copy_into(self._prefix[self._prefix_slot[site.layer]], maps)
            return
        step = len(self._flow_times) - 1
        self._note(site, f"denoise step {step}")
        slot, n_steps = self._step_slot[step], len(self._step_slot)
        if chosen.maps is not None:
            if self._suffix is None:
                shape = (n_steps, len(self._layer_slot), *chosen.maps.shape[:-1], self._n_keys)
                self._suffix = self._copies.allocate(shape, torch.float16, chosen.maps.device)
            self._fill(self._suffix[slot, self._layer_slot[site.layer]], chosen.maps)
        if chosen.mean is not None:
            if self._suffix_mean is None:
                shape = (n_steps, len(self._mean_slot), *chosen.mean.shape[:-1], self._n_keys)
                self._suffix_mean = self._copies.allocate(shape, torch.float16, chosen.mean.device)
            self._fill(self._suffix_mean[slot, self._mean_slot[site.layer]], chosen.mean)

    def _record(self, inputs: InferenceInputs, action_chunk: Tensor) -> InferenceRecord:
        self._check_complete()
        copies = self._copies
        flow_time = copies.allocate((len(self._step_slot),), torch.float32, inputs.token_id.device)
        for step, slot in self._step_slot.items():
            value = self._flow_times[step]
            if isinstance(value, Tensor):
                copies.copy_into(flow_time[slot], value.reshape(-1)[0])
            else:
                flow_time[slot] = value
        decoded, key_mask = None, inputs.key_mask
        if self._policy.n_decode_steps:
            tokens = inputs.decoded[0]
            decoded = copies.copy(torch.where(tokens.is_used, tokens.token_id, -1))
            key_mask = torch.cat([key_mask[:, : self._prefix_len], tokens.is_read], dim=1)
        record = InferenceRecord(
            index=self.n_inferences,
            layout=inputs.layout,
            selection=self._selection,
            policy=self._policy,
            layers_seeing_suffix=self._sees_suffix,
            attention_dtype=least_precise(self._dtypes) or "float32",
            _copies=copies,
            _suffix=self._suffix,
            _suffix_mean=self._suffix_mean,
            _prefix=self._prefix,
            _flow_time=flow_time,
            _token_id=copies.copy(inputs.token_id),
            _key_mask=copies.copy(key_mask),
            _action_chunk=copies.copy(action_chunk.float()),
            _label=self._label,
            _decoded=decoded,
            _pieces=self._decoder.pieces,
            vision_grid=inputs.vision_grid if self._vision_slot else None,
            _vision=self._vision,
            activation_groups=self._activations.groups,
            activation_dtype=least_precise(self._activations.dtypes),
            _activations=self._activations.end(),
        )
        copies.seal()
        return record

    def _choose_heads(self, weights: Tensor) -> Tensor:
        if self._heads is None:
            return weights
        if self._heads.device != weights.device:  # once, for a copy to the device may wait for it
            self._heads = self._heads.to(weights.device)
        return weights.index_select(1, self._heads)

    def _fill(self, target: Tensor, source: Tensor) -> None:
        """Copy a layer's maps; keys that the layer cannot see are absent, which is not the same as 0."""
        n_seen = source.shape[-1]
        self._copies.copy_into(target[..., :n_seen], source)
        if n_seen < target.shape[-1]:
            target[..., n_seen:] = float("nan")

    def _check(self, site: Site, weights: Tensor, n_queries: int, n_keys: int) -> None:
        is_vision = site.stream == "vision"
        n_heads = self._policy.n_vision_heads if is_vision else self._policy.n_heads
        if weights.ndim != 4 or tuple(weights.shape[1:]) != (n_heads, n_queries, n_keys):
            why = "cameras of several image sizes have no patches in common, or " if is_vision else ""
            raise CaptureError(
                f"{_in_words(site)} has shape {tuple(weights.shape)}, "
                f"expected (batch, {n_heads} heads, {n_queries} queries, {n_keys} keys); {why}{_UNLIKE}"
            )

    def _note(self, site: Site, when: str) -> None:
        """Take note that a site's value came, once in a denoise step or for a camera."""
        if (site, when) in self._seen:
            raise CaptureError(f"{_in_words(site)} came twice in {when}, expected once; {_UNLIKE}")
        self._seen.add((site, when))

    def _check_complete(self) -> None:
        n_steps = len(self._flow_times)
        if n_steps != self._policy.n_steps:
            raise CaptureError(
                f"the inference ran {n_steps} denoise steps, expected {self._policy.n_steps}; "
                "was num_steps passed to the policy? set it in the policy's config instead"
            )
        passes: dict[Stream, list[str]] = {
            "vision": list(self._camera_slot),
            "vlm": [_PREFIX_PASS],
            "expert": [f"denoise step {step}" for step in self._step_slot],
        }
        sites = self._selection.sites
        expected = [
            (site, when)
            for stream, all_of_them in passes.items()
            for when in all_of_them
            for site in sites
            if site.stream == stream
        ]
        missing = [pair for pair in expected if pair not in self._seen]
        if missing:
            site, when = missing[0]
            raise CaptureError(
                f"{len(missing)} of {len(expected)} values never came, the first of them the "
                f"{_in_words(site)} in {when}; {_UNLIKE}"
            )

    def _label(self, token_ids: np.ndarray, mask: np.ndarray) -> LabelledPrompt:
        pieces = self._decoder.pieces(token_ids.tolist())
        parsed, prompt = None, ""
        if self._decoder.can_decode:
            prompt = "".join(piece for piece, used in zip(pieces, mask, strict=True) if used)
            parsed = self._parse_prompt(prompt)
        if parsed is None or (parsed.is_truncated and not mask.all()):
            # No tokenizer, or a format that nobody knows: a prompt that leaves slots free was not cut.
            return LabelledPrompt(PromptLabels(pieces, label_text(pieces, mask, None)), None)
        if parsed.is_truncated and not self._truncation_told:
            self._truncation_told = True
            logger.warning(
                "A prompt did not fit the policy's %d language slots, and LeRobot cut its end off: %r is all "
                "that the policy was told; give a shorter task, or raise tokenizer_max_length",
                len(mask),
                prompt,
            )
        labels = PromptLabels(pieces, label_text(pieces, mask, parsed.spans))
        return LabelledPrompt(labels, parsed.is_truncated)


def _in_words(site: Site) -> str:
    if site.what == "attention":
        return f"{_PARTS[site.stream]} attention of layer {site.layer}"
    return f"{site.what} of layer {site.layer} of the {site.stream}"
