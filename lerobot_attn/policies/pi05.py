"""Pi0.5: image and language prefix through PaliGemma, action tokens through the action expert.

The prompt carries the state as digits; all suffix tokens are actions; the flow time enters through AdaRMS and
has no token. Both towers call their attention modules, and both passes force eager attention, so the
probabilities can be tapped inside these modules.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lerobot_attn.layout import Camera, ImageGeometry, Kind, Segment, TokenLayout
from lerobot_attn.policies.base import (
    InferenceInputs,
    ParsedPrompt,
    PolicyDescription,
    Probe,
    Site,
    SiteInfo,
    Stream,
)
from lerobot_attn.policies.taps import (
    CompiledTap,
    attention_tap,
    check_sites,
    no_attention,
    replaced_attribute,
)
from lerobot_attn.prompt import TextSpan

logger = logging.getLogger(__name__)


def _start_of(text: str) -> str:
    """Return a pattern that matches any beginning of a text, also none of it."""
    return f"(?:{re.escape(text[0])}{_start_of(text[1:])})?" if text else ""


# "Task: pick up the soup, State: 128 97 …;\nAction: ", as Pi05PrepareStateTokenizerProcessorStep writes it.
# Where LeRobot has cut its end off, in the task or among the numbers, the rest is still understood.
_WHOLE = re.compile(r"Task: (?P<task>.*), State:(?P<state>(?: +-?\d+)*) *;\s*Action:", re.DOTALL)
_CUT_IN_STATE = re.compile(
    rf"Task: (?P<task>.*), State:(?P<state>(?: +-?\d*)*) *(?:;\s*{_start_of('Action')})?\Z", re.DOTALL
)
_CUT_IN_TASK = re.compile(rf"Task: (?P<task>.*?){_start_of(', State')}\Z", re.DOTALL)


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
        expert = self.model.paligemma_with_expert.gemma_expert.config
        return PolicyDescription(
            policy_type=config.type,
            n_layers=len(self._suffix_layers),
            n_prefix_layers=len(self._prefix_layers),
            n_heads=expert.num_attention_heads,
            n_denoise_steps=config.num_inference_steps,
            chunk_size=config.chunk_size,
            n_action_steps=config.n_action_steps,
            random_weights=bool(getattr(config, "random_weights", False)),
            remark=str(getattr(config, "remark", "")),
        )

    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return the attention of every layer of both towers."""
        towers = self.model.paligemma_with_expert
        n_heads: dict[Stream, int] = {
            "vlm": towers.paligemma.config.text_config.num_attention_heads,
            "expert": towers.gemma_expert.config.num_attention_heads,
        }
        return {
            Site(stream, layer): SiteInfo(
                n_heads=n_heads[stream], keys="prefix" if stream == "vlm" else "prefix+suffix"
            )
            for stream, layers in self._layers.items()
            for layer in range(len(layers))
        }

    @contextmanager
    def observe(self, probe: Probe, sites: Iterable[Site], *, compiled: bool) -> Iterator[None]:
        """Tap the attention modules, and the functions that bound an inference and its denoise steps."""
        policy, model = self.policy, self.model
        sites = check_sites(sites, self.sites())
        predict_action_chunk: Callable[..., Tensor] = policy.predict_action_chunk
        sample_actions: Callable[..., Tensor] = model.sample_actions
        graph: CompiledTap | None = None
        if "sample_actions" in vars(model) and getattr(policy.config, "compile_model", False):
            # torch.compile put its wrapper on the instance; the class still has the plain function.
            sample_actions = MethodType(type(model).sample_actions, model)
            if compiled:
                graph = CompiledTap(probe, sample_actions, policy.config.compile_mode)
                sample_actions = graph.run
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
                probe.abandon()
                raise
            probe.end(actions)
            return actions

        def observed_sample_actions(
            images: list[Tensor],
            img_masks: list[Tensor],
            tokens: Tensor,
            masks: Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            probe.begin(self._inputs(cameras, img_masks, tokens, masks))
            return sample_actions(images, img_masks, tokens, masks, *args, **kwargs)

        with ExitStack() as stack:
            for owner, name, value in (
                (policy, "predict_action_chunk", observed_predict_action_chunk),
                (model, "sample_actions", observed_sample_actions),
                (model, "denoise_step", _with_step(graph or probe, model.denoise_step)),
            ):
                stack.enter_context(replaced_attribute(owner, name, value))
            for site in sites:
                module: Any = self._layers[site.stream][site.layer].self_attn
                if graph is not None:
                    stack.callback(module.register_forward_hook(graph.hook(site)).remove)
                else:
                    missed = partial(probe.fail, no_attention(site))
                    stack.enter_context(attention_tap(module, partial(probe.at, site), missed))
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

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        """Find the task's words and the state's numbers in `Task: …, State: 128 97 …; Action: `.

        A prompt whose end was cut off still has its words, and those of its numbers that are left.
        """
        whole = _WHOLE.search(prompt)
        match = whole or _CUT_IN_STATE.search(prompt) or _CUT_IN_TASK.search(prompt)
        if match is None:
            return None
        spans = []
        for group, kind, pattern in (("task", Kind.TASK, r"\S+"), ("state", Kind.STATE, r"-?\d+")):
            found = match.groupdict().get(group)
            for index, part in enumerate(re.finditer(pattern, found or "")):
                offset = match.start(group)
                spans.append(TextSpan(kind, offset + part.start(), offset + part.end(), index))
        return ParsedPrompt(spans, is_truncated=whole is None)

    @property
    def _layers(self) -> dict[Stream, nn.ModuleList]:
        return {"vlm": self._prefix_layers, "expert": self._suffix_layers}

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


def _with_step(tap: Probe | CompiledTap, denoise_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def observed_denoise_step(*args: Any, **kwargs: Any) -> Tensor:
        tap.denoise_step(kwargs["timestep"] if "timestep" in kwargs else args[3])
        return denoise_step(*args, **kwargs)

    return observed_denoise_step
