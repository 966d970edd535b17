"""SmolVLA: images, words and one state token through SmolVLM, action tokens through the action expert.

The prefix ends with the state, the suffix holds actions alone. In the denoise steps layers that self-attend
(to the prefix, and to an action itself and those before it) alternate with layers that cross-attend, which
see the prefix alone. The prompt has as many slots as the batch's longest one needs, and cameras that the
batch lacks have no tokens, so the number of keys may differ from inference to inference.

LeRobot never calls the attention modules: it takes their projections and computes attention in a function of
its own, which is tapped here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lerobot_attn.layout import Camera, ImageGeometry, TokenLayout, tiled
from lerobot_attn.policies.base import ParsedPrompt, PolicyDescription, Probe, Site, SiteInfo, Stream, said_by
from lerobot_attn.policies.flow import FlowMatchingAdapter, as_uint8, newest
from lerobot_attn.policies.prompts import parse_task_line
from lerobot_attn.policies.taps import Call, CompiledTap, masking_of, no_attention, replaced_attribute, tapped
from lerobot_attn.policies.tower import Tower, exchange_at
from lerobot_attn.policies.vision import VisionTower

# With `add_image_special_tokens`, as `embed_prefix` writes them around each camera.
_BEFORE_IMAGE, _AFTER_IMAGE = 2, 1


class SmolVLAAdapter(FlowMatchingAdapter):
    """Adapter of `SmolVLAPolicy` and policies derived from it."""

    policy_types: ClassVar[tuple[str, ...]] = ("smolvla",)
    # `select_action` calls it without going through `predict_action_chunk`.
    predicts: ClassVar[str] = "_get_action_chunk"

    def __init__(self, policy: Any):
        super().__init__(policy)
        self._towers = self.model.vlm_with_expert
        vlm = self._towers.get_vlm_model()
        self.vision = VisionTower(vlm.vision_model)
        # The expert reads keys and values of the VLM's layers, and not of those behind its own last one.
        n_read = (self._towers.num_expert_layers - 1) * self._vlm_layers_each
        self.towers: dict[Stream, Tower] = {
            "vlm": Tower("vlm", vlm.text_model.layers, n_read=n_read),
            "expert": Tower("expert", self._towers.lm_expert.layers),
        }

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy."""
        config = self.policy.config
        return PolicyDescription(
            **said_by(config),
            n_layers=self._towers.num_expert_layers,
            n_prefix_layers=self._towers.num_vlm_layers,
            n_heads=self._towers.num_attention_heads,
            n_denoise_steps=config.num_steps,
            chunk_size=config.chunk_size,
            noise_shape=(config.chunk_size, config.max_action_dim),
            n_vision_layers=self.vision.n_layers,
            n_vision_heads=self.vision.n_heads,
        )

    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return the attention of every layer of all towers; of both that are no vision tower, more.

        What cross-attends sees the prefix alone.
        """
        n_heads = self._towers.num_attention_heads
        vlm = {
            Site("vlm", layer): SiteInfo(
                n_heads=n_heads, keys="prefix", reaches_actions=layer < self.towers["vlm"].n_read
            )
            for layer in range(self._towers.num_vlm_layers)
        }
        return (
            self.vision.sites()
            | vlm
            | {
                Site("expert", layer): SiteInfo(
                    n_heads=n_heads,
                    keys="prefix" if self._cross_attends(layer * self._vlm_layers_each) else "prefix+suffix",
                )
                for layer in range(self._towers.num_expert_layers)
            }
            | self.towers["vlm"].sites()
            | self.towers["expert"].sites()
        )

    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what each camera in the batch showed the policy: (batch, height, width, 3) uint8."""
        return {
            name: as_uint8(newest(batch[name])).permute(0, 2, 3, 1) for name in self._present_cameras(batch)
        }

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        r"""Find the task's words in `task\n`."""
        return parse_task_line(prompt)

    @property
    def _vlm_layers_each(self) -> int:
        """Of how many layers of the VLM the expert has one."""
        each: int = self._towers.num_vlm_layers // self._towers.num_expert_layers
        return each

    def _cross_attends(self, vlm_layer: int) -> bool:
        """Whether the expert's part of a layer, numbered as the VLM's, sees the prefix alone."""
        every = self._towers.self_attn_every_n_layers
        return "cross" in self._towers.attention_mode and not (every > 0 and vlm_layer % every == 0)

    def _tap(self, stack: ExitStack, probe: Probe, graph: CompiledTap | None, sites: list[Site]) -> None:
        towers, wanted = self._towers, frozenset(sites)
        running: list[Site] = []  # the layer whose attention is computed next
        get_interface: Callable[[], Callable[..., Tensor]] = towers.get_attention_interface
        each = self._vlm_layers_each

        def entered(forward: Callable[..., Any]) -> Callable[..., Any]:
            def observed(
                layers: Any, inputs_embeds: list[Tensor], layer: int, *args: Any, **kwargs: Any
            ) -> Any:
                # Of the two inputs the prefix pass has the first alone, a denoise step the second.
                is_prefix = inputs_embeds[0] is not None
                running[:] = [Site("vlm", layer) if is_prefix else Site("expert", layer // each)]
                return forward(layers, inputs_embeds, layer, *args, **kwargs)

            return observed

        def observed_interface() -> Callable[..., Tensor]:
            attend = get_interface()
            site = running[0]
            if site not in wanted:
                return attend
            if graph is not None:
                return tapped(attend, partial(graph.note, site), partial(graph.note, site, None))
            missed = partial(probe.fail, no_attention(site))
            return tapped(
                attend, partial(probe.at, site), missed, masking_of(probe, site), _with_narrowed_mask
            )

        for name, value in (
            ("forward_attn_layer", entered(towers.forward_attn_layer)),
            ("forward_cross_attn_layer", entered(towers.forward_cross_attn_layer)),
            ("get_attention_interface", observed_interface),
        ):
            stack.enter_context(replaced_attribute(towers, name, value))

    def _tap_residual(
        self, stack: ExitStack, probe: Probe, graph: CompiledTap | None, sites: list[Site]
    ) -> None:
        """Hand over what leaves a layer where the next one, or the norm behind the last, reads it.

        LeRobot calls no layer as a whole: it keeps the residual stream of [VLM, expert] in a list, which it
        hands from layer to layer and adds to. So a replacement goes into that list.
        """
        towers = self._towers
        norms = {"vlm": towers.get_vlm_model().text_model.norm, "expert": towers.lm_expert.norm}
        running: list[list[Tensor | None]] = []

        def entered(forward: Callable[..., Any]) -> Callable[..., Any]:
            def observed(layers: Any, inputs_embeds: list[Tensor | None], *args: Any, **kwargs: Any) -> Any:
                running[:] = [inputs_embeds]
                return forward(layers, inputs_embeds, *args, **kwargs)

            return observed

        for name in ("forward_attn_layer", "forward_cross_attn_layer"):
            stack.enter_context(replaced_attribute(towers, name, entered(getattr(towers, name))))
        for site in sites:
            layers: Any = self.towers[site.stream].layers
            is_last = site.layer == len(layers) - 1
            reader = norms[site.stream] if is_last else layers[site.layer + 1].input_layernorm
            slot = 0 if site.stream == "vlm" else 1

            def hook(module: Any, args: Any, *, give: Any, slot: int, is_last: bool) -> Any:
                given = give(args[0])
                if given is None:
                    return None
                if not is_last:
                    running[0][slot] = given
                return (given, *args[1:])

            give = exchange_at(site, probe, graph)
            hooked = reader.register_forward_pre_hook(partial(hook, give=give, slot=slot, is_last=is_last))
            stack.callback(hooked.remove)

    def _present_cameras(self, batch: dict[str, Any]) -> list[str]:
        return [name for name in self.policy.config.image_features if name in batch]

    def _cameras(self, batch: dict[str, Any]) -> list[Camera]:
        """The cameras that the batch has, in the config's order, then up to `empty_cameras` missing ones."""
        config = self.policy.config
        cameras = []
        present = self._present_cameras(batch)
        for name in present:
            height, width = newest(batch[name]).shape[-2:]
            # (width, height), or None: images are taken as they are.
            resized = config.resize_imgs_with_padding
            input_px = (resized[1], resized[0]) if resized else (height, width)
            geometry = ImageGeometry.letterbox(
                (height, width), input_px, self._grid(input_px), padding="left_top"
            )
            cameras.append(Camera(name, geometry))
        missing = [name for name in config.image_features if name not in present]
        return cameras + [Camera(name, None) for name in missing[: config.empty_cameras]]

    def _grid(self, input_px: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, columns) of an image's tokens, each of which stands for several patches."""
        vlm = self._towers.config
        side: int = vlm.vision_config.patch_size * vlm.scale_factor
        return input_px[0] // side, input_px[1] // side

    def _layout(self, cameras: list[Camera], n_text: int) -> TokenLayout:
        has_special = self.model.add_image_special_tokens
        prefix: list[tuple[str, str, int]] = []
        n_patches = 0
        for camera in cameras:
            if camera.geometry is not None:  # a missing camera has as many as the one before it
                n_patches = camera.geometry.grid_rows * camera.geometry.grid_columns
            if has_special:
                prefix.append(("special", "image start", _BEFORE_IMAGE))
            prefix.append(("image", camera.name, n_patches))
            if has_special:
                prefix.append(("special", "image end", _AFTER_IMAGE))
        prefix += [("language", "language", n_text), ("state", "state", 1)]
        prefix_len = sum(length for _, _, length in prefix)
        if prefix_len < self.model.prefix_length:
            prefix.append(("padding", "padding", self.model.prefix_length - prefix_len))
            prefix_len = self.model.prefix_length
        suffix = ("action", "action", self.policy.config.chunk_size)
        return TokenLayout(tiled([*prefix, suffix]), prefix_len, tuple(cameras))


def _with_narrowed_mask(bias: Tensor, call: Call) -> Call | None:
    """Return a call of LeRobot's `eager_attention_forward` whose mask leaves out what a bias masks.

    Args:
        bias: (batch, 1 or head, 1 or query, key): 0, or -inf.
        call: its first argument is the mask, (batch, query, key) bool, the same for all heads.
    """
    args, kwargs = call
    mask: Any = args[0] if args else None
    if not torch.is_tensor(mask) or mask.dtype != torch.bool or bias.shape[1] != 1:
        return None
    return (mask & (bias[:, 0, :, : mask.shape[-1]] == 0), *args[1:]), kwargs
