"""EVO-1: InternVL3 reads images and words, and an action head cross-attends to what comes of them.

InternVL3 runs once an inference, causally. What leaves it, and one token of the robot's state, are what each
action attends to in every denoise step: this is the "expert" stream. An action sees no other action. So all
keys are the prefix's, and the suffix holds actions alone.

- InternVL3's own attention is not recorded: it has other heads than the action head, and a store has one
  number of heads; the state is no token of it.
- LeRobot writes the prompt, with marks around each image, inside the policy, by a tokenizer of the policy's.
  The keys are put in another order than the prompt's: the cameras, the words, the state.
- A view without a camera is masked: "padding", as are the slots behind a prompt's end.
- Images are resized to a square, height and width by factors of their own, and cut into square cells.
- The policy's actions are filled up with numbers that no robot takes. The chunk that is handed over is not.
- EVO-1's time runs from 0, noise, to 1. What is handed over is 1 minus it, as in the other families.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lerobot_attn.errors import UnsupportedPolicyError
from lerobot_attn.layout import Camera, ImageGeometry, Kind, TokenLayout, tiled
from lerobot_attn.policies.base import (
    InferenceInputs,
    ParsedPrompt,
    PolicyDescription,
    Probe,
    Site,
    SiteInfo,
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
    watched_method,
)

# Marks of each image, then the task; padded behind.
_PROMPT = re.compile(r"(?:.*</img>)?\n?(?P<task>.*?)(?P<after>(?:<pad>|<\|endoftext\|>)*)\Z", re.DOTALL)


class EVO1Adapter:
    """Adapter of `Evo1Policy` and policies derived from it.

    Attributes:
        tokenizer: the policy's own, with which it writes its prompts.

    Raises:
        UnsupportedPolicyError: the action head is given one pooled token instead of the prompt's.
    """

    policy_types: ClassVar[tuple[str, ...]] = ("evo1",)
    predicts: ClassVar[str] = "predict_action_chunk"

    def __init__(self, policy: Any):
        if policy.config.return_cls_only:
            raise UnsupportedPolicyError(
                "evo1 with return_cls_only=true: the actions attend to one pooled token, and to no image, "
                "expected return_cls_only=false"
            )
        self.policy = policy
        self.model = policy.model
        self.tokenizer = self.model.embedder.tokenizer
        self._blocks: nn.ModuleList = self.model.action_head.transformer_blocks
        self._n_heads: int = policy.config.num_heads

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy."""
        return PolicyDescription(
            **said_by(self.policy.config),
            n_layers=len(self._blocks),
            n_prefix_layers=0,
            n_heads=self._n_heads,
            n_denoise_steps=self.model.action_head.num_inference_timesteps,
            chunk_size=self.policy.config.chunk_size,
            reads_last_prefix_layer=True,
        )

    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return the cross-attention of the action head's blocks."""
        info = SiteInfo(n_heads=self._n_heads, keys="prefix")
        return {Site("expert", layer): info for layer in range(len(self._blocks))}

    @contextmanager
    def observe(self, probe: Probe, sites: Iterable[Site], *, compiled: bool) -> Iterator[None]:
        """Tap the blocks; an inference begins when the language model is called, a step with the first."""
        policy = self.policy
        sites = check_sites(sites, self.sites())
        check_not_compiled("evo1", compiled=compiled)
        run = _Run()
        predict: Callable[..., Tensor] = policy.predict_action_chunk
        n_steps = int(self.model.action_head.num_inference_timesteps)

        def observed_predict(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            run.batch, run.order, run.n_steps = batch, None, 0
            try:
                actions = predict(batch, *args, **kwargs)
            except BaseException:
                probe.abandon()
                raise
            finally:
                run.batch = run.order = None
            probe.end(actions[..., : self._action_dim])
            return actions

        def on_language_model(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if run.batch is not None:
                described = partial(self._begun, run, kwargs["input_ids"], kwargs["attention_mask"])
                if not begun(probe, described):
                    run.order = None

        def on_first_block(module: nn.Module, args: Any) -> None:
            if run.order is not None:
                probe.denoise_step(1 - run.n_steps / n_steps)
                run.n_steps += 1

        def exchange(site: Site, value: Tensor) -> Tensor | None:
            assert run.order is not None
            return exchanged_in_order(value, run.order, partial(probe.at, site))

        with ExitStack() as stack:
            stack.enter_context(watched_method(policy, self.predicts, observed_predict))
            for hook in (
                self.model.embedder.model.register_forward_pre_hook(on_language_model, with_kwargs=True),
                self._blocks[0].register_forward_pre_hook(on_first_block),
            ):
                stack.callback(hook.remove)
            for site in sites:
                stack.enter_context(
                    kernel_tap(
                        self._blocks[site.layer],
                        partial(exchange, site),
                        partial(probe.fail, no_attention(site)),
                        lambda: run.order is not None,  # not in training
                    )
                )
            yield

    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what each camera in the batch showed the policy: (batch, height, width, 3) uint8."""
        return views_of(batch, self._present_cameras(batch))

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        r"""Find the task's words in `Image-1: <img></img>\npick up the soup<pad>…`.

        Without room to spare none can tell whether the prompt was cut.
        """
        match = _PROMPT.match(prompt)
        if match is None:
            return None
        return ParsedPrompt(spans_of(match, "task", Kind.TASK, r"\S+"), False if match["after"] else None)

    @property
    def _action_dim(self) -> int:
        """How many of the numbers that stand for an action are the robot's; the others fill it up."""
        config = self.policy.config
        feature = config.action_feature
        wanted = config.postprocess_action_dim or (feature and feature.shape[0])
        return int(wanted or config.max_action_dim)

    def _present_cameras(self, batch: dict[str, Any]) -> list[str]:
        config = self.policy.config
        return [name for name in list(config.image_features)[: config.max_views] if name in batch]

    def _begun(self, run: _Run, token_id: Tensor, attention_mask: Tensor) -> InferenceInputs:
        """Return what the action head is given, and note in which order its keys stand in the layout.

        Args:
            run: the inference.
            token_id: (batch, token), the prompt with a token for each cell of each view.
            attention_mask: (batch, token), 0 where the head may not attend.
        """
        assert run.batch is not None
        is_image = token_id == self.model.embedder.img_context_token_id
        n_tokens, n_cells = token_id.shape[1], int(self.model.embedder.num_image_token)
        order = (~is_image).int().argsort(dim=1, stable=True)
        state = torch.full_like(order[:, :1], n_tokens)
        run.order = torch.cat([order, state], dim=1)
        cameras = tuple(
            Camera(name, self._geometry(newest(run.batch[name]).shape[-2:], n_cells))
            for name in self._present_cameras(run.batch)
        )
        parts = [("image", camera.name, n_cells) for camera in cameras]
        n_views = int(is_image[0].sum()) // n_cells
        parts += [
            ("padding", f"view {number} without an image", n_cells)
            for number in range(len(cameras) + 1, n_views + 1)
        ]
        parts += [("language", "language", n_tokens - n_views * n_cells), ("state", "state", 1)]
        parts.append(("action", "action", self.policy.config.chunk_size))
        layout = TokenLayout(tiled(parts), n_tokens + 1, cameras)
        words = layout.language
        may_see = attention_mask.bool().gather(1, order)
        others = may_see.new_ones((len(token_id), 1 + layout.n_queries))
        prompt = token_id.gather(1, order)[:, words.start : words.stop]
        return InferenceInputs(layout, prompt, torch.cat([may_see, others], dim=1))

    def _geometry(self, image_px: torch.Size, n_cells: int) -> ImageGeometry:
        side_px, side = int(self.policy.config.image_resolution[0]), math.isqrt(n_cells)
        return ImageGeometry.stretched((image_px[0], image_px[1]), (side_px, side_px), (side, side))


class _Run:
    """The inference that runs.

    Attributes:
        batch: the policy's; None between inferences, and in training.
        order: (batch, key): where among the action head's keys the layout's stand; None until it is known.
        n_steps: denoise steps that have begun.
    """

    def __init__(self) -> None:
        self.batch: dict[str, Any] | None = None
        self.order: Tensor | None = None
        self.n_steps = 0
