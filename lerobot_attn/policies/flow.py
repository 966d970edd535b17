"""What LeRobot's flow-matching policies share: how an inference runs, and where it begins and ends.

A policy prepares a batch, `model.sample_actions` runs the prefix once, and `model.denoise_step` runs the
suffix in each Euler step. A family says what its tokens are and where its attention is reached.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lerobot_attn.layout import Camera, TokenLayout
from lerobot_attn.policies.base import (
    InferenceInputs,
    ParsedPrompt,
    PolicyDescription,
    Probe,
    Site,
    SiteInfo,
    Stream,
)
from lerobot_attn.policies.taps import CompiledTap, begun, check_sites, replaced_attribute, watched_method
from lerobot_attn.policies.tower import Tower
from lerobot_attn.policies.vision import VisionTower

logger = logging.getLogger(__name__)


class FlowMatchingAdapter(ABC):
    """Adapter of a policy whose `model` has `sample_actions` and `denoise_step`.

    Attributes:
        policy_types: the types as registered with LeRobot.
        predicts: the policy's method that turns a batch into an action chunk.
        vision: the policy's vision tower, which it calls once for each camera.
        towers: its language model ("vlm") and its action expert ("expert").
    """

    policy_types: ClassVar[tuple[str, ...]] = ()
    predicts: ClassVar[str] = "predict_action_chunk"
    vision: VisionTower
    towers: dict[Stream, Tower]

    def __init__(self, policy: Any):
        self.policy = policy
        self.model = policy.model

    @abstractmethod
    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy."""

    @abstractmethod
    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return every site that `observe` can hand over, those of `vision` and `towers` among them."""

    @abstractmethod
    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what each camera in the batch showed the policy: (batch, height, width, 3) uint8."""

    @abstractmethod
    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        """Return what a decoded prompt says; None if its format is unknown."""

    @abstractmethod
    def _cameras(self, batch: dict[str, Any]) -> list[Camera]:
        """Return the cameras that have tokens, in the order of their tokens."""

    @abstractmethod
    def _layout(self, cameras: list[Camera], n_text: int) -> TokenLayout:
        """Return the tokens of an inference with this many language slots."""

    @abstractmethod
    def _tap(self, stack: ExitStack, probe: Probe, graph: CompiledTap | None, sites: list[Site]) -> None:
        """Hand the sites' attention to the probe, or to the graph if there is one, until the stack closes.

        Of every stream but "vision".
        """

    @abstractmethod
    def _tap_residual(
        self, stack: ExitStack, probe: Probe, graph: CompiledTap | None, sites: list[Site]
    ) -> None:
        """Hand over what leaves these layers, as `_tap` does with attention."""

    def value_vectors(self, site: Site, units: Sequence[int]) -> Tensor:
        """Return (unit, feature), float32: what a layer's neurons write to the residual stream."""
        return self.towers[site.stream].value_vectors(site.layer, units)

    @contextmanager
    def observe(self, probe: Probe, sites: Iterable[Site], *, compiled: bool) -> Iterator[None]:
        """Tap the sites, and the functions that bound an inference and its denoise steps."""
        policy, model = self.policy, self.model
        sites = check_sites(sites, self.sites())
        predict: Callable[..., Tensor] = getattr(policy, self.predicts)
        sample_actions: Callable[..., Tensor] = model.sample_actions
        unwatched = sample_actions
        denoise_step: Callable[..., Tensor] = model.denoise_step
        graph: CompiledTap | None = None
        if "sample_actions" in vars(model) and getattr(policy.config, "compile_model", False):
            # torch.compile put its wrapper on the instance; the class still has the plain function.
            plain = MethodType(type(model).sample_actions, model)
            if compiled:
                graph = CompiledTap(probe, plain, policy.config.compile_mode)
                sample_actions = graph.run
            else:
                sample_actions = unwatched = plain
                logger.warning(
                    "compile_model=true: while attention is captured the policy runs uncompiled; "
                    "--eval.attention.compiled=true keeps it compiled"
                )
        elif compiled:
            logger.warning("compiled=true changes nothing: the policy is not compiled (compile_model=false)")
        cameras: list[Camera] = []
        started: list[str] = []  # the cameras that the vision tower has come to in this inference
        stepping: Probe | CompiledTap = graph or probe

        def observed_predict(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            cameras[:] = self._cameras(batch)
            try:
                actions = predict(batch, *args, **kwargs)
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
            def described() -> InferenceInputs:
                layout = self._layout(cameras, tokens.shape[1])
                mask = key_mask(layout, img_masks, masks)
                return InferenceInputs(layout, tokens, mask, vision_grid=self.vision.grid(images))

            started.clear()
            # A graph that returns attention is made for the tokens of an inference that has begun.
            sample = sample_actions if begun(probe, described) else unwatched
            return sample(images, img_masks, tokens, masks, *args, **kwargs)

        def observed_denoise_step(*args: Any, **kwargs: Any) -> Tensor:
            stepping.denoise_step(kwargs["timestep"] if "timestep" in kwargs else args[-1])
            return denoise_step(*args, **kwargs)

        with ExitStack() as stack:
            stack.enter_context(watched_method(policy, self.predicts, observed_predict))
            for owner, name, value in (
                (model, "sample_actions", observed_sample_actions),
                (model, "denoise_step", observed_denoise_step),
            ):
                stack.enter_context(replaced_attribute(owner, name, value))
            in_vision = [site for site in sites if site.stream == "vision"]
            in_towers = [site for site in sites if site.stream != "vision"]
            if attention := [site for site in in_towers if site.what == "attention"]:
                self._tap(stack, probe, graph, attention)
            for site in in_towers:
                if site.what == "neurons":
                    self.towers[site.stream].tap_neurons(stack, probe, graph, site.layer)
            if residual := [site for site in in_towers if site.what == "residual"]:
                self._tap_residual(stack, probe, graph, residual)
            if in_vision:
                self.vision.tap(stack, probe, graph, in_vision, cameras, started)
            yield


def key_mask(layout: TokenLayout, image_masks: list[Tensor], text_mask: Tensor) -> Tensor:
    """Return (batch, key) bool: where the suffix may attend.

    Args:
        layout: the tokens.
        image_masks: (batch,) bool of each camera that has tokens, in their order.
        text_mask: (batch, text), true where a language slot is used.
    """
    batch, images = len(text_mask), iter(image_masks)
    masks = []
    for segment in layout.segments:
        if segment.kind == "image":
            mask = next(images).bool()[:, None].expand(-1, len(segment))
        elif segment.kind == "language":
            mask = text_mask.bool()
        else:
            mask = torch.ones(batch, len(segment), dtype=torch.bool, device=text_mask.device)
            if segment.kind == "padding":
                mask = ~mask
        masks.append(mask)
    return torch.cat(masks, dim=1)


def as_uint8(images: Tensor) -> Tensor:
    """Return images (batch, 3, height, width), as the policy got them in [0, 1], as whole numbers to 255."""
    if images.dtype == torch.uint8:
        return images
    if images.device.type == "cpu" and images.dtype == torch.float32:
        return _on_this_thread(images.detach().numpy())
    return (images * 255).round_().clamp_(0, 255).to(torch.uint8)


def _on_this_thread(images: np.ndarray) -> Tensor:
    """Do the same by NumPy, at each frame between two of the simulation's.

    PyTorch would wake its other threads for it, which wait for each other, awake, on cores that the renderer
    wants. A pixel's colours lie together in memory, as videos want them.
    """
    scaled = images * np.float32(255)
    np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled)
    with np.errstate(invalid="ignore"):  # NaN, which a policy may be given
        if scaled.shape[1] != 3:  # the colours are last
            return torch.from_numpy(scaled.astype(np.uint8))
        batch, _, height, width = scaled.shape
        pixels = np.empty((batch, height, width, 3), np.uint8)
        for channel in range(3):  # twice as fast as all at once
            pixels[..., channel] = scaled[:, channel]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def views_of(batch: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the cameras' newest pictures that a batch has, in [0, 1]: (batch, height, width, 3) uint8."""
    return {name: as_uint8(newest(batch[name])).permute(0, 2, 3, 1) for name in names if name in batch}


def newest(image: Tensor) -> Tensor:
    """Return (batch, 3, height, width); of several observations, (batch, time, 3, …), the last."""
    return image[:, -1] if image.ndim == 5 else image
