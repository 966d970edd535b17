"""EO-1: images, words, a state token and the actions, all through Qwen2.5-VL; there is no expert of its own.

The prefix is what stands before the actions in the conversation that LeRobot's preprocessor writes: padding
on the left, the system's sentence, each camera between two marks, the state between two marks, the task, and
what opens the answer. It runs once an inference. The suffix holds the actions, which the same layers read
in every denoise step: the "vlm" stream is a layer's prefix pass, the "expert" stream its passes over actions.

- Padding shifts all tokens of a row, and a store has one layout. So rows and keys are put in another order:
  the cameras, the words with their padding, the state, the actions. Cameras stand in front of the words here
  and between them in the conversation.
- Everything is causal: a word sees the words and cameras before it in the conversation, an action itself and
  the actions before it. What a token cannot see is 0 in its row.
- Patches are merged two by two. An image is resized by one factor for its height and another for its width,
  so that both are whole numbers of such cells; nothing is padded.
- LeRobot's preprocessor cuts images into patches. The policy's batch still has the pictures, which nobody
  reads, so what is changed there changes no action.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

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
from lerobot_attn.policies.flow import newest, views_of
from lerobot_attn.policies.kernels import kernel_tap
from lerobot_attn.policies.prompts import spans_of
from lerobot_attn.policies.taps import (
    begun,
    check_not_compiled,
    check_sites,
    exchanged_in_order,
    no_attention,
    replaced_attribute,
    watched_method,
)

_PROMPT = re.compile(r"<\|state_end\|>(?P<task>.*?)(?P<end><\|vla\|>|\Z)", re.DOTALL)


class EO1Adapter:
    """Adapter of `EO1Policy` and policies derived from it."""

    policy_types: ClassVar[tuple[str, ...]] = ("eo1",)
    predicts: ClassVar[str] = "predict_action_chunk"

    def __init__(self, policy: Any):
        self.policy = policy
        self.model = policy.model
        self._vlm: Any = self.model.vlm_backbone
        self._layers: list[Any] = [layer.self_attn for layer in self._vlm.model.language_model.layers]
        self._n_heads: int = self._vlm.config.text_config.num_attention_heads

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy; its layers run over the prefix and over the suffix."""
        config = self.policy.config
        return PolicyDescription(
            **said_by(config),
            n_layers=len(self._layers),
            n_prefix_layers=len(self._layers),
            n_heads=self._n_heads,
            n_denoise_steps=config.num_denoise_steps,
            chunk_size=config.chunk_size,
        )

    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return every layer twice: in the prefix pass, and in the passes over the actions.

        Of the prefix pass the actions read each layer's keys and values, and so not what its last attends to.
        """
        keys: dict[Stream, Any] = {"vlm": "prefix", "expert": "prefix+suffix"}
        last = len(self._layers) - 1
        return {
            Site(stream, layer): SiteInfo(
                n_heads=self._n_heads, keys=keys[stream], reaches_actions=(stream, layer) != ("vlm", last)
            )
            for stream in keys
            for layer in range(len(self._layers))
        }

    @contextmanager
    def observe(self, probe: Probe, sites: Iterable[Site], *, compiled: bool) -> Iterator[None]:
        """Tap the attention modules; once an action has been embedded, their passes are the actions'."""
        policy, model = self.policy, self.model
        wanted = frozenset(check_sites(sites, self.sites()))
        check_not_compiled("eo1", compiled=compiled)
        run = _Run()
        predict: Callable[..., Tensor] = policy.predict_action_chunk
        sample_actions: Callable[..., Tensor] = model.sample_actions
        embed_suffix: Callable[..., Tensor] = model.embed_suffix

        def observed_predict(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            run.batch = batch
            try:
                actions = predict(batch, *args, **kwargs)
            except BaseException:
                probe.abandon()
                raise
            finally:
                run.batch = run.stream = None
            probe.end(actions)
            return actions

        def observed_sample_actions(**given: Any) -> Tensor:
            # Without actions in the conversation LeRobot says what is wrong.
            if run.batch is not None and (given["input_ids"] == given["action_token_id"]).any():
                run.stream = "vlm" if begun(probe, partial(self._begun, run, given)) else None
            return sample_actions(**given)

        def observed_embed_suffix(timestep: Tensor, noisy_actions: Tensor) -> Tensor:
            if run.stream is not None:  # training embeds actions without an inference
                run.stream = "expert"
                probe.denoise_step(timestep)
            return embed_suffix(timestep, noisy_actions)

        def is_wanted(layer: int) -> bool:
            return run.stream is not None and Site(run.stream, layer) in wanted

        def exchange(layer: int, value: Tensor) -> Tensor | None:
            assert run.stream is not None
            is_prefix = run.stream == "vlm"
            return exchanged_in_order(
                value,
                run.order,
                partial(probe.at, Site(run.stream, layer)),
                is_square=is_prefix,
                # Padding's rows may be 0, and divided by their sum no numbers.
                kept=run.is_padding if is_prefix else None,
            )

        def missed(layer: int) -> None:
            probe.fail(no_attention(Site(run.stream or "vlm", layer)))

        with ExitStack() as stack:
            stack.enter_context(watched_method(policy, self.predicts, observed_predict))
            stack.enter_context(replaced_attribute(model, "sample_actions", observed_sample_actions))
            stack.enter_context(replaced_attribute(model, "embed_suffix", observed_embed_suffix))
            for layer in sorted({site.layer for site in wanted}):
                stack.enter_context(
                    kernel_tap(
                        self._layers[layer],
                        partial(exchange, layer),
                        partial(missed, layer),
                        partial(is_wanted, layer),
                    )
                )
            yield

    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what each camera in the batch showed the policy: (batch, height, width, 3) uint8."""
        return views_of(batch, self._present_cameras(batch))

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        """Find the task's words in `…<|state_end|>pick up the soup<|vla|>…`."""
        match = _PROMPT.search(prompt)
        if match is None:
            return None
        return ParsedPrompt(spans_of(match, "task", Kind.TASK, r"\S+"), is_truncated=not match["end"])

    def _present_cameras(self, batch: dict[str, Any]) -> list[str]:
        return [name for name in self.policy.config.image_features if name in batch]

    def _begun(self, run: _Run, given: Mapping[str, Any]) -> InferenceInputs:
        """Return what the policy got, and note in which order its tokens stand in the layout."""
        assert run.batch is not None
        ids: Tensor = given["input_ids"]
        prefix_len = int((ids[0] == given["action_token_id"]).int().argmax())
        prefix = ids[:, :prefix_len]
        is_image = prefix == self._vlm.config.image_token_id
        is_state = prefix == given["state_token_id"]
        # Cameras, words, state; each in the conversation's order.
        run.order = (1 - is_image.int() + is_state.int()).argsort(dim=1, stable=True)
        grids: Tensor = given["image_grid_thw"]
        grids = grids[: len(grids) // len(ids)]  # of each row, whose images are alike
        cameras = self._cameras(run.batch, grids)
        n_words = prefix_len - int(is_image[0].sum()) - int(is_state[0].sum())
        n_cells = (grids.prod(dim=1) // self._vlm.config.vision_config.spatial_merge_size**2).tolist()
        # Where nobody can tell how large the images were, a cell has no place on them.
        parts = [("image", camera.name, n) for camera, n in zip(cameras, n_cells, strict=False)] or [
            ("special", f"image {number}", n) for number, n in enumerate(n_cells, start=1)
        ]
        layout = TokenLayout(
            tiled(
                [
                    *parts,
                    ("language", "language", n_words),
                    ("state", "state", int(is_state[0].sum())),
                    ("action", "action", self.policy.config.chunk_size),
                ]
            ),
            prefix_len,
            tuple(cameras),
        )
        words = layout.language
        is_there = given["attention_mask"][:, :prefix_len].to(ids.device).bool().gather(1, run.order)
        run.is_padding = ~is_there
        actions = is_there.new_ones((len(ids), layout.n_queries))
        token_id = prefix.gather(1, run.order)[:, words.start : words.stop]
        return InferenceInputs(layout, token_id, torch.cat([is_there, actions], dim=1))

    def _cameras(self, batch: dict[str, Any], grids: Tensor) -> list[Camera]:
        """Return the cameras of one row of the batch; none where not each image's picture is in it.

        Args:
            batch: the policy's, with the pictures.
            grids: (camera, 3): frames, and rows and columns of patches before they are merged.
        """
        vision = self._vlm.config.vision_config
        merged, patch_px = vision.spatial_merge_size, vision.patch_size
        cameras, names = [], self._present_cameras(batch)
        if len(names) != len(grids):
            return []
        for name, (_, rows, columns) in zip(names, grids.tolist(), strict=True):
            height, width = newest(batch[name]).shape[-2:]
            grid = (rows // merged, columns // merged)
            geometry = ImageGeometry.stretched((height, width), (rows * patch_px, columns * patch_px), grid)
            cameras.append(Camera(name, geometry))
        return cameras


class _Run:
    """The inference that runs.

    Attributes:
        batch: the policy's; None between inferences, and in training.
        stream: whose pass it is; None before the prefix's.
        order: (batch, prefix): where in the conversation the layout's tokens stand.
        is_padding: (batch, prefix) bool, in the layout's order.
    """

    def __init__(self) -> None:
        self.batch: dict[str, Any] | None = None
        self.stream: Stream | None = None
        self.order: Tensor
        self.is_padding: Tensor
