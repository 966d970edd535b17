"""Pi0.5: image and language prefix through PaliGemma, action tokens through the action expert.

The prompt carries the state as digits; all suffix tokens are actions; the flow time enters through AdaRMS and
has no token. Both towers call their attention modules, and both passes force eager attention, so forward
hooks see the probabilities.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lerobot_attn.errors import CaptureError
from lerobot_attn.layout import Camera, ImageGeometry, Kind, Segment, TextSpan, TokenLayout
from lerobot_attn.policies.base import (
    AttentionSink,
    InferenceInputs,
    PolicyDescription,
    replaced_attribute,
)

logger = logging.getLogger(__name__)

# "Task: pick up the soup, State: 128 97 …;\nAction: ", as Pi05PrepareStateTokenizerProcessorStep writes it.
_PROMPT = re.compile(r"Task: (?P<task>.*), State:(?P<state>(?: +-?\d+)*) *;\s*Action:", re.DOTALL)


class Pi05Adapter:
    """Adapter of `PI05Policy` and policies derived from it."""

    policy_types: ClassVar[tuple[str, ...]] = ("pi05",)

    def __init__(self, policy: Any):
        self.policy = policy
        self.model = policy.model
        self._suffix_layers: nn.ModuleList = self.model.paligemma_with_expert.gemma_expert.model.layers
        self._prefix_layers: nn.ModuleList = (
            self.model.paligemma_with_expert.paligemma.model.language_model.layers
        )

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy."""
        config = self.policy.config
        rows, columns = self._grid
        prefix_len = len(config.image_features) * rows * columns + config.tokenizer_max_length
        expert = self.model.paligemma_with_expert.gemma_expert.config
        return PolicyDescription(
            policy_type=config.type,
            n_layers=len(self._suffix_layers),
            n_prefix_layers=len(self._prefix_layers),
            n_heads=expert.num_attention_heads,
            n_denoise_steps=config.num_inference_steps,
            n_queries=config.chunk_size,
            n_keys=prefix_len + config.chunk_size,
            first_action_query=0,
            chunk_size=config.chunk_size,
            n_action_steps=config.n_action_steps,
            random_weights=bool(getattr(config, "random_weights", False)),
        )

    @contextmanager
    def observe(
        self, sink: AttentionSink, *, layers: Sequence[int], prefix_layers: Sequence[int], compiled: bool
    ) -> Iterator[None]:
        """Hook the attention modules and the functions that bound an inference and its denoise steps."""
        policy, model = self.policy, self.model
        predict_action_chunk: Callable[..., Tensor] = policy.predict_action_chunk
        sample_actions: Callable[..., Tensor] = model.sample_actions
        tap: _Tap = sink
        if "sample_actions" in vars(model) and getattr(policy.config, "compile_model", False):
            # torch.compile put its wrapper on the instance; the class still has the plain function.
            sample_actions = MethodType(type(model).sample_actions, model)
            if compiled:
                tap = _CompiledTap(sink, sample_actions, policy.config.compile_mode)
                sample_actions = tap.sample_actions
            else:
                logger.warning(
                    "compile_model=true: while attention is captured the policy runs uncompiled; "
                    "--eval.attention.compiled=true keeps it compiled"
                )
        elif compiled:
            logger.warning("compiled=true changes nothing: the policy is not compiled (compile_model=false)")
        cameras: list[Camera] = []

        def observed_predict_action_chunk(batch: dict[str, Any], **kwargs: Any) -> Tensor:
            cameras[:] = self._cameras(batch)
            try:
                actions = predict_action_chunk(batch, **kwargs)
            except BaseException:
                sink.abandon()
                raise
            sink.end(actions)
            return actions

        def observed_sample_actions(
            images: list[Tensor],
            img_masks: list[Tensor],
            tokens: Tensor,
            masks: Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            sink.begin(self._inputs(cameras, img_masks, tokens, masks))
            return sample_actions(images, img_masks, tokens, masks, *args, **kwargs)

        with ExitStack() as stack:
            stack.enter_context(
                replaced_attribute(policy, "predict_action_chunk", observed_predict_action_chunk)
            )
            stack.enter_context(replaced_attribute(model, "sample_actions", observed_sample_actions))
            stack.enter_context(
                replaced_attribute(model, "denoise_step", _with_step(tap, model.denoise_step))
            )
            for modules, chosen, deliver in (
                (self._suffix_layers, layers, tap.suffix_attention),
                (self._prefix_layers, prefix_layers, tap.prefix_attention),
            ):
                for layer in chosen:
                    attention: Any = modules[layer].self_attn
                    stack.callback(attention.register_forward_hook(_weights_hook(tap, deliver, layer)).remove)
            yield

    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what each camera in the batch showed the policy: (batch, height, width, 3) uint8."""
        views = {}
        for name in self._present_cameras(batch):
            image: Tensor = batch[name]
            if image.dtype != torch.uint8:
                image = (image * 255).round_().clamp_(0, 255).to(torch.uint8)
            # The policy's own test for channels first.
            views[name] = image.permute(0, 2, 3, 1) if image.shape[1] == 3 else image
        return views

    def parse_prompt(self, prompt: str) -> list[TextSpan] | None:
        """Find the task's words and the state's numbers in `Task: …, State: 128 97 …; Action: `."""
        match = _PROMPT.search(prompt)
        if match is None:
            return None
        spans = []
        for group, kind, pattern in (("task", Kind.TASK, r"\S+"), ("state", Kind.STATE, r"-?\d+")):
            offset = match.start(group)
            for index, found in enumerate(re.finditer(pattern, match[group])):
                spans.append(TextSpan(kind, offset + found.start(), offset + found.end(), index))
        return spans

    @property
    def _grid(self) -> tuple[int, int]:
        vision = self.model.paligemma_with_expert.paligemma.config.vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    def _present_cameras(self, batch: dict[str, Any]) -> list[str]:
        return [name for name in self.policy.config.image_features if name in batch]

    def _cameras(self, batch: dict[str, Any]) -> list[Camera]:
        """The policy tokenises the cameras it got first, in the config's order, and then the missing ones."""
        cameras = []
        present = self._present_cameras(batch)
        for name in present:
            shape = batch[name].shape
            height, width = (shape[2], shape[3]) if shape[1] == 3 else (shape[1], shape[2])
            resolution = self.policy.config.image_resolution
            geometry = ImageGeometry.letterbox(
                (height, width), (resolution[0], resolution[1]), self._grid, padding="centred"
            )
            cameras.append(Camera(name, geometry))
        missing = [name for name in self.policy.config.image_features if name not in present]
        return cameras + [Camera(name, None) for name in missing]

    def _inputs(
        self, cameras: list[Camera], image_masks: list[Tensor], tokens: Tensor, masks: Tensor
    ) -> InferenceInputs:
        n_patches = self._grid[0] * self._grid[1]
        segments, position = [], 0
        for camera in cameras:
            segments.append(Segment("image", camera.name, position, position + n_patches))
            position += n_patches
        segments.append(Segment("language", "language", position, position + tokens.shape[1]))
        position += tokens.shape[1]
        prefix_len = position
        segments.append(Segment("action", "action", position, position + self.policy.config.chunk_size))
        layout = TokenLayout(tuple(segments), prefix_len, tuple(cameras))
        key_mask = torch.cat(
            [
                *(mask[:, None].expand(-1, n_patches) for mask in image_masks),
                masks.bool(),
                torch.ones(len(tokens), layout.n_queries, dtype=torch.bool, device=masks.device),
            ],
            dim=1,
        )
        return InferenceInputs(layout=layout, token_id=tokens, key_mask=key_mask)


class _Tap(Protocol):
    """What the hooks tell of a forward pass: of an uncompiled one, the sink itself."""

    def denoise_step(self, flow_time: Tensor | float) -> None: ...

    def prefix_attention(self, layer: int, weights: Tensor) -> None: ...

    def suffix_attention(self, layer: int, weights: Tensor) -> None: ...

    def fail(self, error: Exception) -> None: ...


class _CompiledTap:
    """Compiles the policy together with what is chosen of its attention, which the graph returns.

    Inside the graph the hooks only append tensors to a list; the sink gets them when the graph has run. It
    copies them on the graph's own stream, so before another run can overwrite the memory of a CUDA graph.
    """

    def __init__(self, sink: AttentionSink, sample_actions: Callable[..., Tensor], mode: str):
        self._sink = sink
        self._plain = sample_actions
        self._compiled = torch.compile(self._traced, mode=mode)
        self._events: list[_Event] | None = None
        self._n_steps = 0
        self._failure: Exception | None = None

    def sample_actions(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the compiled graph, and hand what it returns to the sink."""
        self._failure = None
        try:
            actions, events = self._compiled(*args, **kwargs)
        finally:
            self._events = None
        if self._failure is not None:
            self._sink.fail(self._failure)
        for kind, layer, value in events:
            if kind == "step":
                self._sink.denoise_step(value)
            elif kind == "prefix":
                self._sink.take_prefix(layer, value)
            else:
                self._sink.take_suffix(layer, value)
        result: Tensor = actions
        return result

    def denoise_step(self, flow_time: Tensor | float) -> None:
        if self._events is not None:
            self._events.append(("step", -1, flow_time))
            self._n_steps += 1

    def prefix_attention(self, layer: int, weights: Tensor) -> None:
        self._keep("prefix", layer, self._sink.choose_prefix, layer, weights)

    def suffix_attention(self, layer: int, weights: Tensor) -> None:
        self._keep("suffix", layer, self._sink.choose_suffix, self._n_steps - 1, layer, weights)

    def fail(self, error: Exception) -> None:
        """Keep the error for after the graph: no exception may reach the policy."""
        self._failure = self._failure or error

    def _keep(self, kind: str, layer: int, choose: Callable[..., Any], *args: Any) -> None:
        if self._events is None:
            return
        try:
            self._events.append((kind, layer, choose(*args)))
        except CaptureError as error:
            self.fail(error)

    def _traced(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[_Event]]:
        self._events, self._n_steps = [], 0
        actions = self._plain(*args, **kwargs)
        return actions, self._events


_Event = tuple[str, int, Any]  # what it is, layer, value: in the order of the forward pass


def _with_step(tap: _Tap, denoise_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def observed_denoise_step(*args: Any, **kwargs: Any) -> Tensor:
        tap.denoise_step(kwargs["timestep"] if "timestep" in kwargs else args[3])
        return denoise_step(*args, **kwargs)

    return observed_denoise_step


def _weights_hook(
    tap: _Tap, deliver: Callable[[int, Tensor], None], layer: int
) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            tap.fail(
                CaptureError(
                    f"layer {layer} returned no attention weights: got {type(output).__name__}, expected "
                    "(output, weights) "
                    "from eager attention; this LeRobot or transformers release runs another attention kernel"
                )
            )
            return
        deliver(layer, weights)

    return hook
