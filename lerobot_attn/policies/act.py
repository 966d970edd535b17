"""ACT: an encoder over latent, state and image features, and a decoder whose action queries read its output.

No instruction, hence no words; no denoising, so an inference is one pass, which is recorded as a single step
without a flow time. The prefix is the encoder's tokens: the latent (zeros when the policy acts), the robot's
state, the environment's state, then each camera's feature map, row by row. What is recorded as the suffix's
attention is the decoder's cross-attention, which sees the prefix alone; the decoder's attention among the
action queries themselves is a softmax of its own, and not recorded. The prefix maps are the encoder's
self-attention.

Each encoder layer reads the one below; every decoder layer reads the last encoder layer's output.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lerobot_attn.layout import Camera, ImageGeometry, TokenLayout, tiled
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
from lerobot_attn.policies.kernels import kernel_tap
from lerobot_attn.policies.taps import begun, check_sites, no_attention, watched_method

logger = logging.getLogger(__name__)


class ACTAdapter:
    """Adapter of `ACTPolicy` and policies derived from it."""

    policy_types: ClassVar[tuple[str, ...]] = ("act",)
    predicts: ClassVar[str] = "predict_action_chunk"

    def __init__(self, policy: Any):
        self.policy = policy
        self.model = policy.model
        self._layers: dict[Stream, list[nn.Module]] = {
            "vlm": [layer.self_attn for layer in self.model.encoder.layers],
            "expert": [layer.multihead_attn for layer in self.model.decoder.layers],
        }

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy."""
        config = self.policy.config
        return PolicyDescription(
            **said_by(config),
            n_layers=len(self._layers["expert"]),
            n_prefix_layers=len(self._layers["vlm"]),
            n_heads=config.n_heads,
            n_denoise_steps=0,
            chunk_size=config.chunk_size,
            reads_last_prefix_layer=True,
        )

    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return the cross-attention of the decoder and the self-attention of the encoder."""
        return {
            Site(stream, layer): SiteInfo(n_heads=self.policy.config.n_heads, keys="prefix")
            for stream, layers in self._layers.items()
            for layer in range(len(layers))
        }

    @contextmanager
    def observe(self, probe: Probe, sites: Iterable[Site], *, compiled: bool) -> Iterator[None]:
        """Tap the attention modules; an inference begins with the encoder, when its grids are known."""
        policy, model = self.policy, self.model
        sites = check_sites(sites, self.sites())
        if compiled:
            logger.warning("compiled=true changes nothing: LeRobot does not compile ACT")
        predict_action_chunk: Callable[..., Tensor] = policy.predict_action_chunk
        batches: list[dict[str, Any]] = []  # of the inference that runs; training runs the model without one
        grids: list[tuple[int, int]] = []

        def observed_predict_action_chunk(batch: dict[str, Any], **kwargs: Any) -> Tensor:
            batches[:], grids[:] = [batch], []
            try:
                actions = predict_action_chunk(batch, **kwargs)
            except BaseException:
                probe.abandon()
                raise
            finally:
                batches.clear()
            probe.end(actions)
            return actions

        def on_features(module: nn.Module, args: Any, output: Mapping[str, Tensor]) -> None:
            height, width = output["feature_map"].shape[-2:]
            grids.append((height, width))

        def on_encoder(module: nn.Module, args: Any) -> None:
            if batches:
                begun(probe, partial(self._inputs, batches[0], grids, args[0]))
                grids.clear()  # the same batch may be asked about twice

        def on_decoder(module: nn.Module, args: Any) -> None:
            if batches:
                probe.denoise_step(float("nan"))

        with ExitStack() as stack:
            stack.enter_context(watched_method(policy, self.predicts, observed_predict_action_chunk))
            hooks = [
                model.encoder.register_forward_pre_hook(on_encoder),
                model.decoder.register_forward_pre_hook(on_decoder),
            ]
            if policy.config.image_features:
                hooks.append(model.backbone.register_forward_hook(on_features))
            for hook in hooks:
                stack.callback(hook.remove)
            for site in sites:
                missed = partial(probe.fail, no_attention(site))
                module = self._layers[site.stream][site.layer]
                stack.enter_context(kernel_tap(module, partial(probe.at, site), missed))
            yield

    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what each camera in the batch showed the policy: (batch, height, width, 3) uint8.

        A camera whose values leave [0, 1] was normalised by the preprocessor with statistics that the policy
        does not know: it is left out, for its picture can no longer be told.
        """
        views = {}
        for name in self.policy.config.image_features:
            image: Tensor | None = batch.get(name)
            if image is None or image.min() < 0 or image.max() > 1:
                continue
            views[name] = (image * 255).round_().to(torch.uint8).permute(0, 2, 3, 1)
        return views

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        """Return None: the policy is told nothing."""

    def _inputs(self, batch: dict[str, Any], grids: list[tuple[int, int]], tokens: Tensor) -> InferenceInputs:
        """Lay out the encoder's tokens: (token, batch, dim)."""
        config = self.policy.config
        sizes = [("special", "latent", 1)]
        if config.robot_state_feature:
            sizes.append(("state", "state", 1))
        if config.env_state_feature:
            sizes.append(("state", "environment_state", 1))
        cameras = []
        for name, grid in zip(config.image_features, grids, strict=True):
            cameras.append(Camera(name, self._geometry(batch[name].shape[-2:], grid)))
            sizes.append(("image", name, grid[0] * grid[1]))
        sizes.append(("action", "action", config.chunk_size))
        layout = TokenLayout(tiled(sizes), len(tokens), tuple(cameras))
        n_envs = tokens.shape[1]
        return InferenceInputs(
            layout=layout,
            token_id=torch.zeros(n_envs, 0, dtype=torch.int64, device=tokens.device),
            key_mask=torch.ones(n_envs, layout.n_keys, dtype=torch.bool, device=tokens.device),
        )

    def _geometry(self, image_px: torch.Size, grid: tuple[int, int]) -> ImageGeometry:
        """Return where the cells of the feature map lie on the image, which is neither resized nor padded.

        A ResNet pads its odd kernels evenly, so cell i is centred on pixel i * stride and not between two
        multiples of it: the cells reach half a stride over the image's top and left, and what lies beyond the
        last cell at the bottom and right belongs to that one.
        """
        (height, width), stride = image_px, self._stride
        return ImageGeometry(
            height_px=height,
            width_px=width,
            resized_height_px=height,
            resized_width_px=width,
            pad_top_px=stride // 2,
            pad_left_px=stride // 2,
            input_height_px=grid[0] * stride,
            input_width_px=grid[1] * stride,
            grid_rows=grid[0],
            grid_columns=grid[1],
        )

    @property
    def _stride(self) -> int:
        """Pixels from one cell of the feature map to the next, along the way through the backbone."""
        backbone = self.model.backbone
        stride = int(backbone["conv1"].stride[0] * backbone["maxpool"].stride)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            shortcut = backbone[name][0].downsample
            stride *= 1 if shortcut is None else shortcut[0].stride[0]
        return stride
