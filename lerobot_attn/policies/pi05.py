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
from typing import Any, ClassVar

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
        self, sink: AttentionSink, *, layers: Sequence[int], prefix_layers: Sequence[int]
    ) -> Iterator[None]:
        """Hook the attention modules and the functions that bound an inference and its denoise steps."""
        policy, model = self.policy, self.model
        predict_action_chunk: Callable[..., Tensor] = policy.predict_action_chunk
        denoise_step: Callable[..., Tensor] = model.denoise_step
        sample_actions: Callable[..., Tensor] = model.sample_actions
        if "sample_actions" in vars(model) and getattr(policy.config, "compile_model", False):
            # torch.compile put its wrapper on the instance; the class still has the plain function.
            sample_actions = MethodType(type(model).sample_actions, model)
            logger.warning("compile_model=true: while attention is captured the policy runs uncompiled")
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

        def observed_denoise_step(*args: Any, **kwargs: Any) -> Tensor:
            sink.denoise_step(kwargs["timestep"] if "timestep" in kwargs else args[3])
            return denoise_step(*args, **kwargs)

        with ExitStack() as stack:
            stack.enter_context(
                replaced_attribute(policy, "predict_action_chunk", observed_predict_action_chunk)
            )
            stack.enter_context(replaced_attribute(model, "sample_actions", observed_sample_actions))
            stack.enter_context(replaced_attribute(model, "denoise_step", observed_denoise_step))
            for layer in layers:
                attention: Any = self._suffix_layers[layer].self_attn
                hook = _weights_hook(sink, sink.suffix_attention, layer)
                stack.callback(attention.register_forward_hook(hook).remove)
            for layer in prefix_layers:
                attention = self._prefix_layers[layer].self_attn
                hook = _weights_hook(sink, sink.prefix_attention, layer)
                stack.callback(attention.register_forward_hook(hook).remove)
            yield

    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what each camera in the batch showed the policy: (batch, height, width, 3) uint8."""
        views = {}
        for name in self._present_cameras(batch):
            image: Tensor = batch[name]
            if image.shape[1] == 3:  # the policy's own test for channels first
                image = image.permute(0, 2, 3, 1)
            views[name] = image if image.dtype == torch.uint8 else (image * 255).round().clamp(0, 255).byte()
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


def _weights_hook(
    sink: AttentionSink, deliver: Callable[[int, Tensor], None], layer: int
) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            sink.fail(
                CaptureError(
                    f"layer {layer} returned no attention weights: got {type(output).__name__}, expected "
                    "(output, weights) "
                    "from eager attention; this LeRobot or transformers release runs another attention kernel"
                )
            )
            return
        deliver(layer, weights)

    return hook
