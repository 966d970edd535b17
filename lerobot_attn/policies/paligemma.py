"""What Pi0, Pi0.5 and Pi0-FAST share: images and words through PaliGemma.

PaliGemma's vision tower runs first, once for each camera. The suffix of Pi0 and Pi0.5 goes through the action
expert. Both towers call their attention modules, and both passes force eager attention, so the probabilities
can be tapped inside these modules. How a family writes its prompt, and what opens its suffix, its own module
says.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from lerobot_attn.layout import Camera, ImageGeometry, TokenLayout, tiled
from lerobot_attn.policies.base import PolicyDescription, Probe, Site, SiteInfo, Stream, said_by
from lerobot_attn.policies.flow import FlowMatchingAdapter, as_uint8
from lerobot_attn.policies.taps import CompiledTap, attention_tap, masking_of, no_attention
from lerobot_attn.policies.tower import Tower, exchange_at, tap_output
from lerobot_attn.policies.vision import VisionTower


class PaliGemmaCameras:
    """The cameras of a policy whose images go through PaliGemma's vision tower."""

    policy: Any
    model: Any

    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what each camera in the batch showed the policy: (batch, height, width, 3) uint8."""
        views = {}
        for name in self._present_cameras(batch):
            image = as_uint8(batch[name])
            # The policy's own test for channels first.
            views[name] = image.permute(0, 2, 3, 1) if image.shape[1] == 3 else image
        return views

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


class PaliGemmaAdapter(PaliGemmaCameras, FlowMatchingAdapter):
    """Adapter of a policy whose towers are PaliGemma and a Gemma action expert.

    Attributes:
        suffix_opening: (kind, name, number) of the tokens before the actions in the suffix.
    """

    suffix_opening: ClassVar[tuple[tuple[str, str, int], ...]] = ()

    def __init__(self, policy: Any):
        super().__init__(policy)
        towers = self.model.paligemma_with_expert
        self.vision = VisionTower(towers.paligemma.model.vision_tower.vision_model)
        vlm = towers.paligemma.model.language_model.layers
        # Of the language model's last layer the suffix reads the keys and values, which come before its
        # attention and its feed-forward network.
        self.towers: dict[Stream, Tower] = {
            "vlm": Tower("vlm", vlm, n_read=len(vlm) - 1),
            "expert": Tower("expert", towers.gemma_expert.model.layers),
        }

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy."""
        config = self.policy.config
        expert = self.model.paligemma_with_expert.gemma_expert.config
        return PolicyDescription(
            **said_by(config),
            n_layers=len(self.towers["expert"].layers),
            n_prefix_layers=len(self.towers["vlm"].layers),
            n_heads=expert.num_attention_heads,
            n_denoise_steps=config.num_inference_steps,
            chunk_size=config.chunk_size,
            noise_shape=(config.chunk_size, config.max_action_dim),
            n_vision_layers=self.vision.n_layers,
            n_vision_heads=self.vision.n_heads,
        )

    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return the attention of every layer of all towers; of both that are no vision tower, more."""
        towers = self.model.paligemma_with_expert
        n_heads: dict[Stream, int] = {
            "vlm": towers.paligemma.config.text_config.num_attention_heads,
            "expert": towers.gemma_expert.config.num_attention_heads,
        }
        attention = {
            Site(stream, layer): SiteInfo(
                n_heads=n_heads[stream],
                keys="prefix" if stream == "vlm" else "prefix+suffix",
                reaches_actions=layer < tower.n_read,
            )
            for stream, tower in self.towers.items()
            for layer in range(len(tower.layers))
        }
        rest = [tower.sites() for tower in self.towers.values()]
        return {**attention, **self.vision.sites(), **rest[0], **rest[1]}

    def _tap(self, stack: ExitStack, probe: Probe, graph: CompiledTap | None, sites: list[Site]) -> None:
        for site in sites:
            module: Any = self.towers[site.stream].layers[site.layer].self_attn
            if graph is not None:
                stack.callback(module.register_forward_hook(graph.hook(site)).remove)
            else:
                missed = partial(probe.fail, no_attention(site))
                exchange, masking = partial(probe.at, site), masking_of(probe, site)
                stack.enter_context(attention_tap(module, exchange, missed, masking))

    def _tap_residual(
        self, stack: ExitStack, probe: Probe, graph: CompiledTap | None, sites: list[Site]
    ) -> None:
        for site in sites:
            # A layer returns its residual stream; the gate of the expert of Pi0.5 has been applied in it.
            layer = self.towers[site.stream].layers[site.layer]
            tap_output(stack, layer, exchange_at(site, probe, graph))

    def _layout(self, cameras: list[Camera], n_text: int) -> TokenLayout:
        n_patches = self._grid[0] * self._grid[1]
        prefix = [("image", camera.name, n_patches) for camera in cameras]
        prefix.append(("language", "language", n_text))
        suffix = [*self.suffix_opening, ("action", "action", self.policy.config.chunk_size)]
        prefix_len = sum(length for _, _, length in prefix)
        return TokenLayout(tiled([*prefix, *suffix]), prefix_len, tuple(cameras))
