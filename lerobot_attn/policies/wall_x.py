"""Wall-X (WALL-OSS): images, words, a state token and the actions, all through one Qwen2.5-VL with experts.

The prefix is what stands before the actions in the conversation that the policy writes: the system's
sentence, each camera between two marks, the task, the state, and what opens the answer. The suffix holds the
actions. Both go through the same attention; the experts are feed-forward networks, one of them the actions'.
All but the actions is causal, so the prefix sees no action.

LeRobot keeps no keys and values of the prefix: each denoise step runs all tokens through all layers. As the
prefix sees no action, its rows are the same in every step. So the "vlm" stream is the prefix's rows of the
first denoise step. They come after its `denoise_step`, in each layer before the actions' rows, which are the
"expert" stream. What a probe returns for the prefix is used in every step of the inference.

- Padding stands before the conversation or behind the actions, as the tokenizer has it, and shifts the tokens
  of a row, whereas a store has one layout. So rows and keys are put in another order: the cameras, the words
  with their padding, the state, the actions.
- The words and cameras see what stands before them in the conversation; an action sees all of it, and all
  actions. What a token cannot see is 0 in its row.
- Patches are merged two by two. An image is resized by one factor for its height and another for its width,
  so that both are whole numbers of such cells; nothing is padded.
- LeRobot's time runs from 0, noise, to 1, the actions. A store's runs the other way, and is 1 minus it.
- LeRobot puts the state into the conversation in bfloat16, so weights of another type than that cannot run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lerobot_attn.errors import CaptureError, UnsupportedPolicyError
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
from lerobot_attn.policies.flow import views_of
from lerobot_attn.policies.kernels import kernel_tap
from lerobot_attn.policies.prompts import spans_of
from lerobot_attn.policies.taps import (
    begun,
    check_not_compiled,
    check_sites,
    exchanged_in_order,
    no_attention,
    replaced_attribute,
    replacement,
    watched_method,
)

_PROMPT = re.compile(
    r"\nInstruction: (?P<task>.*?)(?:(?P<end>\nPredict the next action in robot action\.)|\Z)", re.DOTALL
)


class WallXAdapter:
    """Adapter of `WallXPolicy` and policies derived from it, where they denoise.

    Attributes:
        tokenizer: the policy's own, with which it writes its prompts.

    Raises:
        UnsupportedPolicyError: the policy decodes its actions as tokens.
    """

    policy_types: ClassVar[tuple[str, ...]] = ("wall_x",)
    predicts: ClassVar[str] = "predict_action_chunk"

    def __init__(self, policy: Any):
        if policy.config.prediction_mode != "diffusion":
            raise UnsupportedPolicyError(
                f"wall_x with prediction_mode={policy.config.prediction_mode!r}: actions that are decoded as "
                "tokens are not captured, expected prediction_mode='diffusion'"
            )
        self.policy = policy
        self.model = policy.model
        self.tokenizer = self.model.processor.tokenizer
        self._layers: list[Any] = [layer.self_attn for layer in self.model.model.layers]
        self._n_heads: int = self.model.config.num_attention_heads

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy; its layers run over the prefix and over the actions.

        How often it denoises is no setting of LeRobot's, but written into the model's `predict`.
        """
        config = self.policy.config
        n_steps = inspect.signature(self.model.predict).parameters["num_inference_timesteps"].default
        return PolicyDescription(
            **said_by(config),
            n_layers=len(self._layers),
            n_prefix_layers=len(self._layers),
            n_heads=self._n_heads,
            n_denoise_steps=int(n_steps),
            chunk_size=config.chunk_size,
        )

    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return every layer twice: the prefix's rows, and the actions'.

        The actions read each layer's keys and values, and so not what the prefix attends to in the last.
        """
        keys: dict[Stream, Any] = {"vlm": "prefix", "expert": "prefix+suffix"}
        last = Site("vlm", len(self._layers) - 1)
        return {
            site: SiteInfo(n_heads=self._n_heads, keys=keys[site.stream], reaches_actions=site != last)
            for stream in keys
            for site in (Site(stream, layer) for layer in range(len(self._layers)))
        }

    @contextmanager
    def observe(self, probe: Probe, sites: Iterable[Site], *, compiled: bool) -> Iterator[None]:
        """Tap the attention modules; an inference begins when the model is given its conversation."""
        policy, model = self.policy, self.model
        wanted = frozenset(check_sites(sites, self.sites()))
        check_not_compiled("wall_x", compiled=compiled)
        run = _Run()
        predict: Callable[..., Tensor] = policy.predict_action_chunk
        embed_actions: Callable[..., Tensor] = model.action_preprocessor.step

        def observed_predict(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            run.start(batch)
            try:
                actions = predict(batch, *args, **kwargs)
            except BaseException:
                probe.abandon()
                raise
            finally:
                run.start(None)
            probe.end(actions)
            return actions

        def on_model(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
            if run.batch is None or self._is_cut(given["input_ids"]):
                return
            if not begun(probe, partial(self._begun, run, run.batch, given)):
                run.start(None)

        def observed_embed_actions(timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if run.order is not None:
                probe.denoise_step(1 - timestep)
                run.n_steps += 1
            return embed_actions(timestep, *args, **kwargs)

        def is_wanted(layer: int) -> bool:
            is_asked = Site("expert", layer) in wanted or (run.n_steps == 1 and Site("vlm", layer) in wanted)
            return run.order is not None and (is_asked or layer in run.edited)

        def exchange(layer: int, value: Tensor) -> Tensor | None:
            assert run.order is not None
            return exchanged_in_order(value, run.order, partial(at, layer), is_square=True)

        def at(layer: int, value: Tensor) -> Tensor | None:
            """Hand over the rows of a layer's map (batch, head, token, token), in the layout's order."""
            vlm, expert, n = Site("vlm", layer), Site("expert", layer), run.prefix_len
            if vlm in wanted and run.n_steps == 1:
                rows = value[..., :n, :n]
                if (given := probe.at(vlm, rows)) is not None:
                    given = replacement(vlm, rows, given)
                    # What padding attends to is no attention, and divided by its sum may be no numbers.
                    run.edited[layer] = torch.where(run.is_padding[:, None, :, None], rows, given)
            prefix, rows, given = run.edited.get(layer), value[..., n:, :], None
            if expert in wanted:
                given = probe.at(expert, rows)
            if prefix is None and given is None:
                return None
            edited = value.clone()
            edited[..., n:, :] = replacement(expert, rows, given)
            if prefix is not None:
                edited[..., :n, :n] = prefix
            return edited

        def missed(layer: int) -> None:
            probe.fail(no_attention(Site("expert", layer)))

        with ExitStack() as stack:
            stack.enter_context(watched_method(policy, self.predicts, observed_predict))
            hook = model.register_forward_pre_hook(on_model, with_kwargs=True)
            stack.callback(hook.remove)
            stack.enter_context(replaced_attribute(model.action_preprocessor, "step", observed_embed_actions))
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
        r"""Find the task's words in `…\nInstruction: pick up the soup.\nPredict the next action …`."""
        match = _PROMPT.search(prompt)
        if match is None:
            return None
        return ParsedPrompt(spans_of(match, "task", Kind.TASK, r"\S+"), is_truncated=not match["end"])

    def _present_cameras(self, batch: dict[str, Any]) -> list[str]:
        return [name for name in self.policy.config.image_features if name in batch]

    def _kinds(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which tokens are a camera's, the state, an action; (batch, token) bool, as `ids` are."""
        special = self.model.action_token_id_set
        is_image = ids == self.model.config.image_token_id
        return is_image, ids == special["propri_token_id"], ids == special["action_token_id"]

    def _is_cut(self, ids: Tensor) -> bool:
        """Return whether actions are missing in a row, because it was too long; LeRobot says so then."""
        _, _, is_action = self._kinds(ids)
        return bool((is_action.sum(dim=1) != self.policy.config.chunk_size).any())

    def _begun(self, run: _Run, batch: dict[str, Any], given: Mapping[str, Any]) -> InferenceInputs:
        """Return what the policy got, and note in which order its tokens stand in the layout.

        Args:
            run: gets the order.
            batch: the policy's, with the pictures.
            given: what the model is called with.

        Raises:
            CaptureError: rows have unlike numbers of a kind of tokens.
        """
        ids = given["input_ids"]
        is_image, is_state, is_action = kinds = self._kinds(ids)
        counts = torch.stack([kind.sum(dim=1) for kind in kinds], dim=1)
        if bool((counts != counts[0]).any()):
            raise CaptureError(
                "wall_x: a batch's rows have unlike numbers of tokens of cameras and state, expected the same"
            )
        n_images, n_states, n_actions = counts[0].tolist()
        # Cameras, words, state, actions; each in the conversation's order.
        place = 1 - is_image.int() + is_state.int() + 2 * is_action.int()
        order = place.argsort(dim=1, stable=True)
        cameras = self._cameras(batch, given["image_grid_thw"])
        parts = [("image", camera.name, _n_cells(camera)) for camera in cameras]
        n_tokens = ids.shape[1]
        parts.append(("language", "language", n_tokens - n_images - n_states - n_actions))
        parts += [("state", "state", n_states), ("action", "action", n_actions)]
        layout = TokenLayout(tiled(parts), n_tokens - n_actions, tuple(cameras))
        words = layout.language
        is_there = given["attention_mask"].to(ids.device).bool().gather(1, order)
        run.order, run.prefix_len = order, layout.prefix_len
        run.is_padding = ~is_there[:, : layout.prefix_len]
        return InferenceInputs(layout, ids.gather(1, order)[:, words.start : words.stop], is_there)

    def _cameras(self, batch: dict[str, Any], grids: Tensor) -> list[Camera]:
        """Return the cameras of the batch, whose images are alike in all rows.

        Args:
            batch: the policy's.
            grids: (row and camera, 3): frames, and rows and columns of patches before they are merged.
        """
        vision = self.model.config.vision_config
        merged, patch_px = vision.spatial_merge_size, vision.patch_size
        cameras = []
        for name, (_, rows, columns) in zip(self._present_cameras(batch), grids.tolist(), strict=False):
            height, width = batch[name].shape[-2:]
            grid = (rows // merged, columns // merged)
            geometry = ImageGeometry.stretched((height, width), (rows * patch_px, columns * patch_px), grid)
            cameras.append(Camera(name, geometry))
        return cameras


def _n_cells(camera: Camera) -> int:
    assert camera.geometry is not None
    return camera.geometry.grid_rows * camera.geometry.grid_columns


class _Run:
    """The inference that runs.

    Attributes:
        batch: the policy's; None between inferences, and in training.
        order: (batch, token): where in the conversation the layout's tokens stand; None until it is known.
        prefix_len: how many of them are the prefix's.
        is_padding: (batch, prefix) bool, in the layout's order.
        n_steps: denoise steps that have begun.
        edited: layer → what its rows of the prefix are replaced by, (batch, head, prefix, prefix).
    """

    def __init__(self) -> None:
        self.is_padding: Tensor
        self.order: Tensor | None
        self.prefix_len: int
        self.start(None)

    def start(self, batch: dict[str, Any] | None) -> None:
        """Begin with a batch, or with None forget the inference."""
        self.batch, self.order, self.n_steps = batch, None, 0
        self.edited: dict[int, Tensor] = {}
