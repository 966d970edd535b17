"""The vision tower of a vision-language model: a transformer that policies call once for each camera.

Its attention is among the patches of one image. Knows no policy family; whose tower it is, and which cameras
there are in which order, the family's adapter says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from lerobot_attn.errors import CaptureError
from lerobot_attn.layout import Camera
from lerobot_attn.policies.base import Probe, Site, SiteInfo
from lerobot_attn.policies.kernels import kernel_tap
from lerobot_attn.policies.taps import CompiledTap, Exchange, no_attention


class VisionTower:
    """A vision transformer of transformers' SigLIP kind, as PaliGemma and SmolVLM have it.

    Args:
        module: is called with an image; has `encoder.layers`, each with a `self_attn` that is called, and a
            `config` with the number of heads and the patch size.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        encoder: Any = module.encoder
        self._attention: list[nn.Module] = [layer.self_attn for layer in encoder.layers]
        config: Any = module.config
        self._patch_px: int = config.patch_size
        self.n_heads: int = config.num_attention_heads

    @property
    def n_layers(self) -> int:
        """Number of its layers."""
        return len(self._attention)

    def sites(self) -> dict[Site, SiteInfo]:
        """Return the attention of every layer."""
        info = SiteInfo(n_heads=self.n_heads, keys="image")
        return {Site("vision", layer): info for layer in range(self.n_layers)}

    def grid(self, images: Sequence[Tensor]) -> tuple[int, int] | None:
        """Return (rows, columns) of the patches of the first image, (batch, 3, height, width)."""
        if not images:
            return None
        height, width = images[0].shape[-2:]
        return height // self._patch_px, width // self._patch_px

    def tap(
        self,
        stack: ExitStack,
        probe: Probe,
        graph: CompiledTap | None,
        sites: Sequence[Site],
        cameras: Sequence[Camera],
        started: list[str],
    ) -> None:
        """Hand its attention to the probe, or to the graph if there is one, until the stack closes.

        Args:
            stack: what is to be undone afterwards.
            probe: wants the sites.
            graph: of a policy that stays compiled.
            sites: of the "vision" stream.
            cameras: in the order in which the policy calls the tower; filled before each inference.
            started: names of those that it was called for; emptied before each inference.
        """
        watching: Probe | CompiledTap = graph or probe

        def on_image(module: nn.Module, args: Any, kwargs: Any) -> None:
            number = len(started)
            if number >= len(cameras):
                probe.fail(
                    CaptureError(
                        f"the vision tower was called {number + 1} times in an inference, expected once for "
                        f"each of {len(cameras)} cameras; the policy's forward pass is not the one that its "
                        "adapter knows"
                    )
                )
                return
            started.append(cameras[number].name)
            watching.camera(cameras[number].name)

        stack.callback(self._module.register_forward_pre_hook(on_image, with_kwargs=True).remove)
        for site in sites:
            exchange: Exchange = partial(probe.at, site)
            missed: Callable[[], None] = partial(probe.fail, no_attention(site))
            if graph is not None:
                exchange, missed = partial(graph.note, site), partial(graph.note, site, None)
            stack.enter_context(kernel_tap(self._attention[site.layer], exchange, missed))
