"""GR00T N1.7: Qwen3-VL reads images and words, and an action head reads what comes of them.

The prefix is the whole prompt. Qwen3-VL reads it once an inference, and then the action head's own
self-attention over the prompt: this is the "vlm" stream. The suffix holds a token of the robot's state and
the actions. In every denoise step their layers (the "expert" stream) look to one side only, in turns: at the
words and no image, at each other, at the images and no word, at each other. What a layer does not look at is
0 in its rows.

- Qwen3-VL's own attention is not recorded: a store has one stream over the prefix, and one number of heads,
  which Qwen3-VL does not share (LeRobot's configs have 16, and the action head's 32). Where the action head's
  self-attention over the prompt is missing, or has other heads than its layers, no prefix is recorded.
- That self-attention masks nothing: tokens of images and words see all others, and also what pads a row to
  the longest prompt of its batch. So padding is none here: its `key_mask` is true. The actions do not see it.
- Keys are put in another order than the prompt's: the cameras, then all else, padding first.
- LeRobot's preprocessor takes the pictures out of the batch. It resizes them, cuts off their borders and cuts
  the rest into patches, of which two by two are a token. What it did is noted while it runs in the context;
  for a batch that was made before, its settings are read from the checkpoint, and the size of the pictures
  from the config.
- LeRobot's time runs from 0, noise, to 1, the actions. A store's runs the other way, and is 1 minus it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lerobot_attn.errors import CaptureError
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

_PROMPT = re.compile(r".*<\|vision_end\|>(?P<task>.*?)<\|im_end\|>\s*\Z", re.DOTALL)


class GrootAdapter:
    """Adapter of `GrootPolicy` and policies derived from it."""

    policy_types: ClassVar[tuple[str, ...]] = ("groot",)
    predicts: ClassVar[str] = "predict_action_chunk"

    def __init__(self, policy: Any):
        self.policy = policy
        self._model: Any = policy._groot_model
        self._head: Any = self._model.action_head
        reading = getattr(self._head.vl_self_attention, "transformer_blocks", [])
        self._layers: dict[Stream, list[Any]] = {
            "vlm": [block.attn1 for block in reading],
            "expert": [block.attn1 for block in self._head.model.transformer_blocks],
        }
        self._n_heads: int = self._layers["expert"][0].heads
        self._is_alternate = bool(self._model.config.use_alternate_vl_dit)
        self._reads_padding = bool(self._layers["vlm"]) or not self._is_alternate
        if any(module.heads != self._n_heads for module in self._layers["vlm"]):
            self._layers["vlm"] = []  # a store has one number of heads for both

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy; its chunk is the model's, of which LeRobot may return less."""
        n_actions = int(self._head.action_horizon)
        said = said_by(self.policy.config)
        said["n_action_steps"] = min(self.policy._action_queue_steps, n_actions)
        layers = [layer for layer in range(len(self._layers["expert"])) if self._sees_images(layer)]
        seeing = ", ".join(map(str, layers)) or "none"
        said["remark"] = said["remark"] or f"layers that see images: {seeing}"
        return PolicyDescription(
            **said,
            n_layers=len(self._layers["expert"]),
            n_prefix_layers=len(self._layers["vlm"]),
            n_heads=self._n_heads,
            n_denoise_steps=int(self._head.num_inference_timesteps),
            chunk_size=n_actions,
            reads_last_prefix_layer=True,
            # The last layer's map of an image would be empty and look broken.
            shown_layer=max(layers, default=None),
        )

    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return the layers over the prompt, and those of state and actions.

        Of these every other one sees the prompt alone; the ones between see no prompt, and are 0 there.
        """
        return {
            Site(stream, layer): SiteInfo(
                n_heads=self._n_heads,
                keys="prefix+suffix" if stream == "expert" and self._sees_suffix(layer) else "prefix",
            )
            for stream, layers in self._layers.items()
            for layer in range(len(layers))
        }

    @contextmanager
    def observe(self, probe: Probe, sites: Iterable[Site], *, compiled: bool) -> Iterator[None]:
        """Tap the attention modules; an inference begins when Qwen3-VL is given the prompt.

        Raises:
            CaptureError: in the policy, where a probe lets an action attend to what its layer cannot see.
            ConfigError: as `PolicyAdapter.observe`.
        """
        policy, head = self.policy, self._head
        sites = check_sites(sites, self.sites())
        check_not_compiled("groot", compiled=compiled)
        run = _Run()
        n_steps = int(head.num_inference_timesteps)
        predict: Callable[..., Tensor] = policy.predict_action_chunk
        get_action: Callable[..., Any] = self._model.get_action

        def observed_predict(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            run.batch, run.order, run.n_steps = batch, None, 0
            try:
                actions = predict(batch, *args, **kwargs)
            except BaseException:
                probe.abandon()
                raise
            finally:
                run.batch = run.order = None
            # LeRobot may return fewer actions than the model has made, all of which attend.
            probe.end(run.chunk[..., : actions.shape[-1]])
            return actions

        def observed_get_action(*args: Any, **kwargs: Any) -> Any:
            output = get_action(*args, **kwargs)
            run.chunk = output["action_pred"]
            return output

        def on_backbone(module: nn.Module, args: Any) -> None:
            if run.batch is not None and not begun(probe, partial(self._begun, run, run.batch, args[0])):
                run.order = None

        def on_head(module: nn.Module, args: Any, kwargs: Any) -> None:
            if run.order is not None:  # not in training
                probe.denoise_step(1 - run.n_steps / n_steps)
                run.n_steps += 1

        def exchange(site: Site, value: Tensor) -> Tensor | None:
            assert run.order is not None
            at = partial(probe.at, site)
            if site.stream == "expert" and self._sees_suffix(site.layer):
                return _exchanged_behind(run.order.shape[1], value, site, at)
            return exchanged_in_order(value, run.order, at, is_square=site.stream == "vlm")

        with ExitStack() as stack:
            stack.enter_context(watched_method(policy, self.predicts, observed_predict))
            stack.enter_context(replaced_attribute(self._model, "get_action", observed_get_action))
            stack.enter_context(_watched_preprocessing(run))
            for hook in (
                self._model.backbone.register_forward_pre_hook(on_backbone),
                head.model.register_forward_pre_hook(on_head, with_kwargs=True),
            ):
                stack.callback(hook.remove)
            for site in sites:
                stack.enter_context(
                    kernel_tap(
                        self._layers[site.stream][site.layer],
                        partial(exchange, site),
                        partial(probe.fail, no_attention(site)),
                        lambda: run.order is not None,
                    )
                )
            yield

    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the pictures in the batch: (batch, height, width, 3) uint8. The preprocessor leaves none."""
        return views_of(batch, self.policy.config.image_features)

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        r"""Find the task's words in `<|im_start|>user\n<|vision_start|><|vision_end|>open it<|im_end|>\n`.

        No prompt is too long for LeRobot, so that none is cut.
        """
        match = _PROMPT.match(prompt)
        return None if match is None else ParsedPrompt(spans_of(match, "task", Kind.TASK, r"\S+"))

    def _sees_suffix(self, layer: int) -> bool:
        """Whether a layer of the action head is among state and actions; it then sees no prompt."""
        return layer % 2 == 1 and bool(self._head.model.config.interleave_self_attention)

    def _sees_images(self, layer: int) -> bool:
        if self._is_alternate and layer % (2 * self._head.model.attend_text_every_n_blocks) == 0:
            return False
        return not self._sees_suffix(layer)

    def _begun(self, run: _Run, batch: Mapping[str, Any], given: Mapping[str, Any]) -> InferenceInputs:
        """Return what the policy got, and note in which order the prompt's tokens stand in the layout.

        Args:
            run: gets the order.
            batch: the policy's.
            given: what Qwen3-VL is called with.

        Raises:
            CaptureError: the rows of the batch have unlike images.
        """
        ids: Tensor = given["input_ids"]
        n_rows, n_tokens = ids.shape
        config = self._model.backbone.model.config
        is_image = ids == config.image_token_id
        grids = given["image_grid_thw"].reshape(n_rows, -1, 3)
        if (grids != grids[:1]).any():
            raise CaptureError("groot: images of a batch's rows have unlike grids, expected the same")
        side = config.vision_config.spatial_merge_size
        grid = [(rows // side, columns // side) for _, rows, columns in grids[0].tolist()]
        run.order = (~is_image).int().argsort(dim=1, stable=True)
        # Of several frames of a camera, whose images come first, the last is the one that is shown.
        if run.shown is None and run.assumed is None:
            run.assumed = _assumed(self.policy.config, batch)
        shown = run.shown or run.assumed
        assert shown is not None
        fits = len(shown.names) > 0 and len(grid) % len(shown.names) == 0
        n_earlier = len(grid) - len(shown.names) if fits else len(grid)
        cameras = tuple(
            Camera(name, _geometry(shown.step, shown.size_px, cells))
            for name, cells in zip(shown.names, grid[n_earlier:], strict=False)
        )
        n_cells = [rows * columns for rows, columns in grid]
        layout = TokenLayout(
            tiled(
                [
                    *(
                        ("special", f"{'earlier ' if fits else ''}image {number}", n)
                        for number, n in enumerate(n_cells[:n_earlier], start=1)
                    ),
                    *(("image", one.name, n) for one, n in zip(cameras, n_cells[n_earlier:], strict=True)),
                    ("language", "language", n_tokens - sum(n_cells)),
                    ("state", "state", 1),
                    ("action", "action", int(self._head.action_horizon)),
                ]
            ),
            n_tokens,
            cameras,
        )
        may_see = given["attention_mask"].bool().gather(1, run.order)
        if self._reads_padding:
            may_see = torch.ones_like(may_see)
        suffix = may_see.new_ones((n_rows, layout.n_queries))
        words = layout.language
        return InferenceInputs(
            layout,
            ids.gather(1, run.order)[:, words.start : words.stop],
            torch.cat([may_see, suffix], dim=1),
        )


class _Shown(NamedTuple):
    """What the preprocessor was given, and what it does with pictures.

    Attributes:
        names: of the cameras, in the order in which it puts them into the prompt.
        size_px: (height, width), the same of all cameras.
        step: LeRobot's `GrootN17VLMEncodeStep`, which resizes and crops.
    """

    names: tuple[str, ...]
    size_px: tuple[int, int]
    step: Any


class _Run:
    """The inference that runs.

    Attributes:
        batch: the policy's; None between inferences, and in training.
        order: (batch, prefix): where in the prompt the layout's tokens stand; None until it is known.
        n_steps: denoise steps that have begun.
        chunk: (batch, chunk, action_dim) that was denoised, padded dimensions included.
        shown: what the preprocessor was given last; None where it has not run in the context.
        assumed: what is then taken for it.
    """

    def __init__(self) -> None:
        self.batch: Mapping[str, Any] | None = None
        self.order: Tensor | None = None
        self.n_steps = 0
        self.chunk: Tensor
        self.shown: _Shown | None = None
        self.assumed: _Shown | None = None


def _exchanged_behind(
    n_prefix: int, value: Tensor, site: Site, at: Callable[[Tensor], Tensor | None]
) -> Tensor | None:
    """Hand over a layer that sees the suffix alone, with 0 for the prefix, and return what came back.

    Raises:
        CaptureError: what came back has weight on the prefix.
    """
    seen = nn.functional.pad(value, (n_prefix, 0))
    given = at(seen)
    if given is None or given.shape != seen.shape:
        return given
    if given[..., :n_prefix].any():
        raise CaptureError(
            f"{site}: a probe lets actions attend to the prompt, expected 0 there: this layer has no keys of "
            "it; edit a layer that sees the prompt"
        )
    return given[..., n_prefix:]


@contextmanager
def _watched_preprocessing(run: _Run) -> Iterator[None]:
    """Note what LeRobot's preprocessor is given while the context lasts, whichever pipeline it is in."""
    from lerobot.policies.groot.processor_groot import GrootN17PackInputsStep, GrootN17VLMEncodeStep

    ordered, build = GrootN17PackInputsStep._ordered_image_keys, GrootN17VLMEncodeStep._build_sample_images
    names: list[str] = []

    def watched_ordered(step: Any, obs: dict[str, Any]) -> list[str]:
        names[:] = ordered(step, obs)
        return list(names)

    def watched_build(step: Any, video: Any, *args: Any, **kwargs: Any) -> Any:
        height, width = video.shape[-3:-1]
        run.shown = _Shown(tuple(names), (int(height), int(width)), step)
        return build(step, video, *args, **kwargs)

    owners: Any = (GrootN17PackInputsStep, GrootN17VLMEncodeStep)
    owners[0]._ordered_image_keys, owners[1]._build_sample_images = watched_ordered, watched_build
    try:
        yield
    finally:
        owners[0]._ordered_image_keys, owners[1]._build_sample_images = ordered, build


def _assumed(config: Any, batch: Mapping[str, Any]) -> _Shown:
    """Return what a checkpoint's preprocessor makes of pictures, where nobody has seen it run.

    Args:
        config: the policy's; says how large the pictures are.
        batch: the policy's; has the pictures where somebody has put them back.
    """
    from lerobot.policies.groot.processor_groot import (
        GrootN17PackInputsStep,
        GrootN17VLMEncodeStep,
        make_groot_pre_post_processors,
        make_groot_pre_post_processors_from_pretrained,
    )

    folder = Path(str(config.pretrained_path or ""))
    if (folder / "policy_preprocessor.json").is_file():
        preprocessor, _ = make_groot_pre_post_processors_from_pretrained(config, str(folder))
    else:
        absolute = copy(config)
        absolute.use_relative_actions = False  # which need statistics; these change nothing of the pictures
        stats = {"action": {"min": torch.zeros(1), "max": torch.ones(1)}}
        preprocessor, _ = make_groot_pre_post_processors(absolute, dataset_stats=stats)
    (pack,) = [one for one in preprocessor.steps if isinstance(one, GrootN17PackInputsStep)]
    (encode,) = [one for one in preprocessor.steps if isinstance(one, GrootN17VLMEncodeStep)]
    sizes = {
        name: tuple((newest(batch[name]) if name in batch else feature).shape[-2:])
        for name, feature in config.image_features.items()
    }
    names = tuple(pack._ordered_image_keys(dict.fromkeys(sizes)))
    return _Shown(names, sizes[names[0]], encode)


def _geometry(step: Any, size_px: tuple[int, int], grid: tuple[int, int]) -> ImageGeometry:
    """Return where the cells lie on a picture that was put into a square, resized and cropped.

    What comes after the crop stretches it over the cells.

    Args:
        step: LeRobot's `GrootN17VLMEncodeStep`.
        size_px: (height, width) of the picture.
        grid: (rows, columns) of cells.
    """
    if step.image_target_size is None:
        return ImageGeometry.stretched(size_px, size_px, grid)
    target_px = step.image_target_size[0]
    square = (max(size_px), max(size_px)) if step.letter_box_transform else size_px
    edge = step.shortest_image_edge or target_px
    scale = edge / min(square)
    resized = tuple(round(side * scale) for side in square) if step.use_albumentations else (edge, edge)
    fraction = step.crop_fraction
    if fraction is None and step.image_crop_size is not None:
        fraction = step.image_crop_size[0] / target_px
    if fraction is None or not 0 < fraction < 1:
        fraction = 1
    whole = int if step.use_albumentations else round
    window = tuple(max(1, whole(side * fraction)) for side in resized)
    pads, inside = [], []
    for own, padded, side, shown in zip(size_px, square, resized, window, strict=True):
        before = (padded - own) // 2 * side / padded
        pads.append(round(before) - (side - shown) // 2)
        inside.append(round(own * side / padded))
    return ImageGeometry(*size_px, inside[0], inside[1], pads[0], pads[1], window[0], window[1], *grid)
