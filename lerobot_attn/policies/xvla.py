"""X-VLA: Florence-2 reads the first camera and the words, a soft-prompted transformer denoises the actions.

Florence-2's encoder runs once an inference, over the first camera's image and the language slots. These are
the prefix, and the "vlm" stream is that encoder's self-attention. The transformer (the "expert" stream) is
one self-attention over all tokens, in every denoise step. What enters only there is the suffix: the further
cameras, which no language model has seen, the soft prompts and the actions. So the layout is

    mean of camera 1 | camera 1 | language || mean of camera 2 | camera 2 | … | soft prompts | actions

whereas the transformer's own order is actions, prefix, further cameras, soft prompts: its rows and keys are
turned round until the actions stand last. Every token of the suffix is a query; `first_action_query` tells
the first action. In the transformer the prefix's tokens are queries too, anew in each layer: these rows are
not recorded, and the prefix maps, which are the encoder's, say nothing of them.

- Florence-2 puts the mean of an image's patches before the patches: a token of kind "special".
- The soft prompts, learned for each robot (`domain_id`), are "special" too: they stand for no input.
- The robot's state is no token: LeRobot writes it, and the flow time, into every action token.
- Nothing is masked. Language slots after the prompt's end hold `<pad>`, and both towers attend to them. A
  view that the batch lacks is zeros, and the transformer attends to it: "special", for it shows no camera.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lerobot_attn.layout import Camera, ImageGeometry, Kind, TokenLayout, tiled
from lerobot_attn.policies.base import (
    InferenceInputs,
    ParsedPrompt,
    PolicyDescription,
    Probe,
    Site,
    SiteInfo,
    Stream,
    said_by,
)
from lerobot_attn.policies.flow import as_uint8, newest
from lerobot_attn.policies.kernels import kernel_tap
from lerobot_attn.policies.prompts import spans_of
from lerobot_attn.policies.taps import (
    begun,
    check_not_compiled,
    check_sites,
    no_attention,
    replaced_attribute,
    watched_method,
)

# As BART's tokenizer writes it; padded on either side.
_PROMPT = re.compile(
    r"(?P<before>(?:<pad>)*(?:<s>)?)(?P<task>.*?)(?P<after>(?:</s>)?(?:<pad>)*)\Z", re.DOTALL
)

_ROUNDING = 0.5 / 255  # of a picture whose normalisation was undone, maybe in bfloat16


class XVLAAdapter:
    """Adapter of `XVLAPolicy` and policies derived from it."""

    policy_types: ClassVar[tuple[str, ...]] = ("xvla",)
    predicts: ClassVar[str] = "_get_action_chunk"

    def __init__(self, policy: Any):
        self.policy = policy
        self.model = policy.model
        self._layers: dict[Stream, list[Any]] = {
            "vlm": [layer.self_attn for layer in self.model.vlm.language_model.encoder.layers],
            "expert": [block.attn for block in self.model.transformer.blocks],
        }
        self._n_heads: int = self._layers["expert"][0].num_heads
        if any(module.num_heads != self._n_heads for module in self._layers["vlm"]):
            self._layers["vlm"] = []  # a store has one number of heads for both

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy; no prefix layers where the encoder has other heads."""
        config = self.policy.config
        return PolicyDescription(
            **said_by(config),
            n_layers=len(self._layers["expert"]),
            n_prefix_layers=len(self._layers["vlm"]),
            n_heads=self._n_heads,
            n_denoise_steps=max(1, int(config.num_denoising_steps)),
            chunk_size=self.model.chunk_size,
            reads_last_prefix_layer=True,
        )

    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return the attention of the transformer's blocks and of the encoder's layers."""
        return {
            Site(stream, layer): SiteInfo(
                n_heads=self._n_heads, keys="prefix" if stream == "vlm" else "prefix+suffix"
            )
            for stream, layers in self._layers.items()
            for layer in range(len(layers))
        }

    @contextmanager
    def observe(self, probe: Probe, sites: Iterable[Site], *, compiled: bool) -> Iterator[None]:
        """Tap the attention modules; an inference begins with the encoder, when its grid is known."""
        policy, model = self.policy, self.model
        sites = check_sites(sites, self.sites())
        check_not_compiled("xvla", compiled=compiled)
        running = _Inference()
        predict: Callable[..., Tensor] = policy._get_action_chunk
        forward_vlm: Callable[..., Any] = model.forward_vlm

        def observed_predict(batch: dict[str, Any]) -> Tensor:
            running.batch = batch
            try:
                actions = predict(batch)
            except BaseException:
                probe.abandon()
                raise
            finally:
                running.batch = None
            probe.end(actions)
            return actions

        def observed_forward_vlm(input_ids: Tensor, pixel_values: Tensor, image_mask: Tensor) -> Any:
            running.token_id, running.n_views = input_ids, pixel_values.shape[1]
            return forward_vlm(input_ids, pixel_values, image_mask)

        def on_projector(module: nn.Module, args: Any, output: Tensor) -> None:
            rows, columns = args[0].shape[-2:]
            running.grid, running.n_view_tokens = (rows, columns), output.shape[1]

        def on_encoder(module: nn.Module, args: Any) -> None:
            if running.batch is not None:
                described = partial(self._begun, running, running.batch)
                if not begun(probe, described):
                    running.batch = None

        def on_transformer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if running.batch is not None:
                probe.denoise_step(kwargs["t"])

        def exchange(site: Site, value: Tensor) -> Tensor | None:
            if running.batch is None:  # training runs the modules without an inference
                return None
            if site.stream == "vlm":
                return probe.at(site, value)
            # From the transformer's order, in which the actions stand first, to the layout's and back.
            n_actions, prefix_len = len(running.layout.actions), running.layout.prefix_len
            turned = value.roll((-n_actions, -n_actions), dims=(-2, -1))
            given = probe.at(site, turned[..., prefix_len:, :])
            if given is None:
                return None
            edited = torch.cat([turned[..., :prefix_len, :], given], dim=-2)
            return edited.roll((n_actions, n_actions), dims=(-2, -1))

        with ExitStack() as stack:
            stack.enter_context(watched_method(policy, self.predicts, observed_predict))
            stack.enter_context(replaced_attribute(model, "forward_vlm", observed_forward_vlm))
            for hook in (
                model.vlm.multi_modal_projector.register_forward_hook(on_projector),
                model.vlm.language_model.encoder.register_forward_pre_hook(on_encoder),
                model.transformer.register_forward_pre_hook(on_transformer, with_kwargs=True),
            ):
                stack.callback(hook.remove)
            for site in sites:
                missed = partial(probe.fail, no_attention(site))
                module = self._layers[site.stream][site.layer]
                stack.enter_context(kernel_tap(module, partial(exchange, site), missed))
            yield

    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what each camera in the batch showed the policy: (batch, height, width, 3) uint8.

        LeRobot's preprocessor normalises images by ImageNet's mean and standard deviation, which is undone in
        a batch of the policy's. A camera whose values cannot come from that is left out, for its picture can
        no longer be told. So is one whose values all lie in [0, 1], because most likely nobody normalised
        it. Images without a prompt are an observation's own, and taken as they are.
        """
        from lerobot.utils.constants import IMAGENET_STATS, OBS_LANGUAGE_TOKENS

        views = {}
        for name in self._present_cameras(batch):
            picture = newest(batch[name])
            if OBS_LANGUAGE_TOKENS in batch:
                if picture.min() >= 0 and picture.max() <= 1:
                    continue
                mean, std = (picture.new_tensor(IMAGENET_STATS[key]).view(3, 1, 1) for key in ("mean", "std"))
                picture = picture * std + mean
            if picture.min() > -_ROUNDING and picture.max() < 1 + _ROUNDING:
                views[name] = as_uint8(picture).permute(0, 2, 3, 1)
        return views

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        """Find the task's words in `<s>task</s><pad>…`.

        The tokenizer ends a prompt that it cuts like any other: without room to spare none can tell.
        """
        match = _PROMPT.match(prompt)
        if match is None:
            return None
        has_room = "<pad>" in match["before"] + match["after"]
        return ParsedPrompt(spans_of(match, "task", Kind.TASK, r"\S+"), False if has_room else None)

    def _present_cameras(self, batch: dict[str, Any]) -> list[str]:
        return [name for name in self.policy.config.image_features if name in batch]

    def _begun(self, running: _Inference, batch: dict[str, Any]) -> InferenceInputs:
        """Return what the policy got, and note the layout."""
        running.layout = layout = self._layout(running, batch)
        key_mask = running.token_id.new_ones((len(running.token_id), layout.n_keys), dtype=torch.bool)
        return InferenceInputs(layout, running.token_id, key_mask)

    def _layout(self, running: _Inference, batch: dict[str, Any]) -> TokenLayout:
        rows, columns = running.grid
        n_patches = rows * columns
        cameras = tuple(
            Camera(name, self._geometry(newest(batch[name]).shape[-2:], running.grid))
            for name in self._present_cameras(batch)
        )
        views = [
            [
                ("special", f"mean of {camera.name}", running.n_view_tokens - n_patches),
                ("image", camera.name, n_patches),
            ]
            for camera in cameras
        ]
        views += [
            [("special", f"view {number} without an image", running.n_view_tokens)]
            for number in range(len(cameras) + 1, running.n_views + 1)
        ]
        prefix = [*views[0], ("language", "language", running.token_id.shape[1])]
        suffix = [
            *(part for view in views[1:] for part in view),
            ("special", "soft prompts", self.model.transformer.len_soft_prompts),
            ("action", "action", self.model.chunk_size),
        ]
        return TokenLayout(
            tiled(part for part in (*prefix, *suffix) if part[2]), sum(part[2] for part in prefix), cameras
        )

    def _geometry(self, image_px: torch.Size, grid: tuple[int, int]) -> ImageGeometry:
        """Return where the cells of the feature map lie on the image.

        Cell i of a convolution's output is centred on `stride * i` pixels and a little more: with the odd,
        evenly padded kernels of DaViT nothing more, so that cells reach half a stride over the top and left.
        """
        stride, centre = 1, 0.0
        for part in self.model.vlm.vision_tower.convs:
            conv = part.conv
            centre += stride * ((conv.kernel_size[0] - 1) / 2 - conv.padding[0])
            stride *= conv.stride[0]
        # (height, width), or None: images are taken as they are.
        input_px = self.policy.config.resize_imgs_with_padding or image_px
        letterbox = ImageGeometry.letterbox(
            (image_px[0], image_px[1]), (input_px[0], input_px[1]), grid, padding="left_top"
        )
        reach = max(0, math.floor(stride / 2 - centre))
        return replace(
            letterbox,
            pad_top_px=letterbox.pad_top_px + reach,
            pad_left_px=letterbox.pad_left_px + reach,
            input_height_px=grid[0] * stride,
            input_width_px=grid[1] * stride,
        )


class _Inference:
    """What is known of the inference that runs, filled in as the policy comes to it."""

    batch: dict[str, Any] | None = None  # None between inferences, and in training
    token_id: Tensor  # (batch, text)
    n_views: int  # cameras, and views without an image
    grid: tuple[int, int]  # (rows, columns) of each view's patches
    n_view_tokens: int  # patches, and what stands before them
    layout: TokenLayout
