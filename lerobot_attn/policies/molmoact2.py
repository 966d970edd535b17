"""MolmoAct2 in continuous mode: a language model reads the prompt, and an action expert denoises the actions.

The prefix is the whole prompt: each camera's patches among the marks that frame them, and the words, in which
the robot's state is written as tokens of its own. The language model reads it once an inference, and the
"vlm" stream is its self-attention. The suffix holds the actions alone. What is recorded of them, as the
"expert" stream, is the cross-attention of the action expert, whose layer l reads the keys and values of the
language model's layer l: it sees the prefix and no action. The expert's attention among the actions is a
softmax of its own and not recorded, for in one map with it a row would sum to 2.

- A store has one number of heads: where the language model has another than the expert, it is left out.
- A batch's rows are padded, and a store has one layout. So tokens are put in another order: each camera's
  patches, the marks of images, the words with their padding. In the prompt the marks stand around and among
  the patches, and "Image 1" before them.
- Words see what stands before them; tokens of images see all images, also those behind them. With action
  mode "both" the actions do not see the tokens that end a text, which the language model does see: such a key
  is no padding, and always 0 in the expert's rows.
- A token of an image is several patches (two by two) of the whole image, resized by one factor for its height
  and another for its width. Where LeRobot cuts further crops of an image, their tokens are "special".
- LeRobot's time runs from 0, noise, to 1, the actions. A store's runs the other way, and is 1 minus it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lerobot_attn.errors import CaptureError, ConfigError
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

_PROMPT = re.compile(
    r"The task is to (?P<task>.*)\. The setup is .*?"
    r"(?: The current state of the robot is <state_start>(?P<state>(?:<state_\d+>)*)<state_end>\.)?"
    r" The expected control mode is ",
    re.DOTALL,
)
_MARKS = (
    *("image_start_token_id", "image_end_token_id", "image_col_id", "image_low_res_id"),
    *("low_res_image_start_token_id", "frame_start_token_id", "frame_end_token_id"),
)


class MolmoAct2Adapter:
    """Adapter of `MolmoAct2Policy` and policies derived from it, where they denoise."""

    policy_types: ClassVar[tuple[str, ...]] = ("molmoact2",)
    predicts: ClassVar[str] = "predict_action_chunk"

    def __init__(self, policy: Any):
        self.policy = policy
        self._backbone: Any = policy._backbone()
        if self._backbone.action_expert is None:
            _check_mode("discrete")
        self._expert: Any = self._backbone.action_expert
        self._layers: dict[Stream, list[Any]] = {
            "vlm": [block.self_attn for block in self._backbone.transformer.blocks],
            "expert": [block.cross_attn for block in self._expert.blocks],
        }
        self._n_heads: int = self._expert.config.num_heads
        if any(module.num_heads != self._n_heads for module in self._layers["vlm"]):
            self._layers["vlm"] = []  # a store has one number of heads for both

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy; no prefix layers where the language model has other heads."""
        config = self.policy.config
        return PolicyDescription(
            **said_by(config),
            n_layers=len(self._layers["expert"]),
            n_prefix_layers=len(self._layers["vlm"]),
            n_heads=self._n_heads,
            n_denoise_steps=int(config.num_inference_steps or self._backbone.config.flow_matching_num_steps),
            chunk_size=config.chunk_size,
        )

    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return the expert's cross-attention and the language model's self-attention.

        The expert reads each layer's keys and values, and so not what the language model's last attends to.
        """
        last = Site("vlm", len(self._layers["vlm"]) - 1)
        return {
            site: SiteInfo(n_heads=self._n_heads, keys="prefix", reaches_actions=site != last)
            for stream, layers in self._layers.items()
            for site in (Site(stream, layer) for layer in range(len(layers)))
        }

    @contextmanager
    def observe(self, probe: Probe, sites: Iterable[Site], *, compiled: bool) -> Iterator[None]:
        """Tap the attention modules; an inference begins when the language model is given the prompt.

        Raises:
            ConfigError: the policy decodes its actions as tokens; or as `PolicyAdapter.observe`.
        """
        policy, expert = self.policy, self._expert
        sites = check_sites(sites, self.sites())
        check_not_compiled("molmoact2", compiled=compiled)
        _check_mode(policy.config.inference_action_mode)
        order = self._camera_order()
        run = _Run()
        predict: Callable[..., Tensor] = policy.predict_action_chunk
        forward_with_context: Callable[..., Tensor] = expert.forward_with_context
        prepare_modulation: Callable[..., Any] = expert.get_or_prepare_modulation_cache

        def observed_predict(batch: dict[str, Any], **kwargs: Any) -> Tensor:
            _check_mode(kwargs.get("inference_action_mode"))
            run.batch = batch
            try:
                actions = predict(batch, **kwargs)
            except BaseException:
                probe.abandon()
                raise
            finally:
                run.batch = None
            # LeRobot hands out what is executed; the policy has made the whole chunk.
            probe.end(run.trajectory[..., : actions.shape[-1]].to(actions.dtype))
            return actions

        def noted(generate: Callable[..., Tensor], **given: Any) -> Tensor:
            run.trajectory = generate(**given)
            return run.trajectory

        def on_backbone(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
            if run.batch is not None:
                described = partial(self._begun, run, run.batch, given, order)
                if not begun(probe, described):
                    run.batch = None

        def observed_modulation(timesteps: list[Tensor], **given: Any) -> Any:
            run.times = list(timesteps)
            return prepare_modulation(timesteps, **given)

        def observed_forward(*args: Any, **given: Any) -> Tensor:
            if run.batch is not None:
                probe.denoise_step(1 - run.times.pop(0))
            return forward_with_context(*args, **given)

        def exchange(site: Site, value: Tensor) -> Tensor | None:
            at = partial(probe.at, site)
            return exchanged_in_order(value, run.order, at, is_square=site.stream == "vlm")

        with ExitStack() as stack:
            stack.enter_context(watched_method(policy, self.predicts, observed_predict))
            for owner, name in (
                (self._backbone, "generate_actions_from_inputs"),
                (policy, "_generate_actions_from_inputs_with_rtc"),
            ):
                stack.enter_context(replaced_attribute(owner, name, partial(noted, getattr(owner, name))))
            stack.enter_context(
                replaced_attribute(expert, "get_or_prepare_modulation_cache", observed_modulation)
            )
            stack.enter_context(replaced_attribute(expert, "forward_with_context", observed_forward))
            graphs = getattr(self._backbone, "action_cuda_graph_manager", None)
            if graphs is not None:  # a graph that was captured before calls no module
                stack.enter_context(replaced_attribute(graphs, "can_use_action_flow", lambda inputs: False))
            hook = self._backbone.register_forward_pre_hook(on_backbone, with_kwargs=True)
            stack.callback(hook.remove)
            for site in sites:
                stack.enter_context(
                    kernel_tap(
                        self._layers[site.stream][site.layer],
                        partial(exchange, site),
                        partial(probe.fail, no_attention(site)),
                        lambda: run.batch is not None,  # training runs the modules without an inference
                    )
                )
            yield

    def camera_views(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what each camera in the batch showed the policy: (batch, height, width, 3) uint8."""
        return views_of(batch, self.policy.config.image_features)

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        """Find the task's words and the state's tokens in `… The task is to open it. The setup is …`.

        LeRobot refuses a prompt that is too long, so that none is cut.
        """
        match = _PROMPT.search(prompt)
        if match is None:
            return None
        words = spans_of(match, "task", Kind.TASK, r"\S+")
        return ParsedPrompt([*words, *spans_of(match, "state", Kind.STATE, r"<state_\d+>")])

    def _camera_order(self) -> list[str]:
        """Return the cameras in the order in which LeRobot's preprocessor puts them into the prompt.

        Raises:
            ConfigError: the checkpoint's statistics name another order, which the preprocessor may follow.
        """
        config = self.policy.config
        if config.image_keys:
            return list(config.image_keys)
        features = list(config.image_features)
        if len(features) > 1 and str(config.norm_tag or "").strip():
            from lerobot.policies.molmoact2.modeling_molmoact2 import _load_hf_norm_metadata_for_tag

            said = _load_hf_norm_metadata_for_tag(
                config.checkpoint_path,
                revision=config.checkpoint_revision,
                force_download=False,
                norm_tag=config.norm_tag,
            ).get("camera_keys")
            if isinstance(said, list) and set(said) <= set(config.input_features) and said != features:
                raise ConfigError(
                    f"image_keys: got none, and norm_tag {config.norm_tag!r} has cameras in another order "
                    f"({', '.join(said)}) than the policy; set policy.image_keys to the order in the prompt"
                )
        return features

    def _begun(
        self, run: _Run, batch: dict[str, Any], given: Mapping[str, Any], order: list[str]
    ) -> InferenceInputs:
        """Return what the policy got, and note in which order its tokens stand in the layout.

        Args:
            run: gets the order.
            batch: the policy's, with the pictures.
            given: what the language model is called with.
            order: the cameras, as the prompt has them.

        Raises:
            CaptureError: it cannot be told which token is what.
        """
        ids: Tensor = given["input_ids"]
        n_rows, n_tokens = ids.shape
        grids: list[list[int]] = []
        if given.get("image_grids") is not None:
            by_row = given["image_grids"].reshape(n_rows, -1, 4)
            if (by_row != by_row[:1]).any():
                raise CaptureError("molmoact2: images of a batch's rows have unlike grids, expected the same")
            grids = by_row[0].tolist()
        names = [name for name in order if name in batch]
        if len(names) < len(order) and not self.policy.config.image_keys:
            # LeRobot then takes what pictures there are, by their names.
            found = [name for name in batch if name.startswith("observation.images.")]
            names = sorted(found or (name for name in batch if name.startswith("observation.image")))
        if len(names) != len(grids):
            raise CaptureError(
                f"molmoact2: the prompt has {len(grids)} images, the batch pictures of {', '.join(names)}; "
                "give the policy the preprocessor's whole batch"
            )
        # Whole images come first, then crops, marks and words; each in the prompt's order.
        n_whole = [rows * columns for rows, columns, _, _ in grids]
        n_cropped = [rows * columns for _, _, rows, columns in grids]
        n_patches = [n for pair in zip(n_whole, n_cropped, strict=True) for n in pair]
        ranks = [rank for image in range(len(grids)) for rank in (image, len(grids) + image)]
        rank_of_patch = torch.tensor(
            [rank for rank, n in zip(ranks, n_patches, strict=True) for _ in range(n)],
            dtype=torch.int64,
            device=ids.device,
        )
        is_patch, is_mark = ids == self._backbone.config.image_patch_id, self._is_mark(ids)
        n_marks = int(is_mark[0].sum())
        if (is_patch.sum(1) != sum(n_patches)).any() or (is_mark.sum(1) != n_marks).any():
            raise CaptureError(
                f"molmoact2: expected {sum(n_patches)} tokens of patches and as many marks in each row, got "
                f"{is_patch.sum(1).tolist()} and {is_mark.sum(1).tolist()}"
            )
        rank = 2 * len(grids) + (~is_mark).long()
        rank[is_patch] = rank_of_patch.repeat(n_rows)
        run.order = rank.argsort(dim=1, stable=True)
        layout = TokenLayout(
            tiled(
                part
                for part in (
                    *(("image", name, n) for name, n in zip(names, n_whole, strict=True)),
                    *(("special", f"crops of {name}", n) for name, n in zip(names, n_cropped, strict=True)),
                    ("special", "marks of images", n_marks),
                    ("language", "language", n_tokens - sum(n_patches) - n_marks),
                    ("action", "action", self.policy.config.chunk_size),
                )
                if part[2]
            ),
            n_tokens,
            tuple(self._cameras(names, batch, grids, given.get("image_token_pooling"))),
        )
        mask = given.get("attention_mask")
        is_there = (torch.ones_like(ids) if mask is None else mask).bool().gather(1, run.order)
        words = layout.language
        return InferenceInputs(
            layout,
            ids.gather(1, run.order)[:, words.start : words.stop],
            torch.cat([is_there, is_there.new_ones((n_rows, layout.n_queries))], dim=1),
        )

    def _is_mark(self, ids: Tensor) -> Tensor:
        config = self._backbone.config
        marks = [getattr(config, name, None) for name in _MARKS]
        return torch.isin(ids, ids.new_tensor([mark for mark in marks if mark is not None]))

    def _cameras(
        self, names: list[str], batch: dict[str, Any], grids: list[list[int]], pooling: Tensor | None
    ) -> Iterator[Camera]:
        """Yield the cameras of one row of the batch.

        Args:
            names: in the prompt's order.
            batch: the policy's, with the pictures.
            grids: of each image (rows, columns) of the whole, then of the crops.
            pooling: (token, patch in it): which patches of an image's crops are a token, -1 for none.

        Raises:
            CaptureError: an image's tokens are not its patches, row by row.
        """
        start = 0
        for name, grid in zip(names, grids, strict=True):
            assert pooling is not None
            rows, columns = grid[:2]
            height, width = newest(batch[name]).shape[-2:]
            found = _cells(
                self._backbone.config.vit_config.image_num_patch,
                (rows, columns),
                pooling[start : start + rows * columns],
            )
            if found is None:
                raise CaptureError(f"molmoact2: the tokens of {name} are not a grid of its patches")
            (cell_rows, cell_columns), (top, left) = found
            patch_px = self._backbone.config.vit_config.image_patch_size
            n_rows, n_columns = self._backbone.config.vit_config.image_num_patch
            yield Camera(
                name,
                ImageGeometry(
                    height_px=height,
                    width_px=width,
                    resized_height_px=n_rows * patch_px,
                    resized_width_px=n_columns * patch_px,
                    pad_top_px=top * patch_px,
                    pad_left_px=left * patch_px,
                    input_height_px=rows * cell_rows * patch_px,
                    input_width_px=columns * cell_columns * patch_px,
                    grid_rows=rows,
                    grid_columns=columns,
                ),
            )
            start += rows * columns + grid[2] * grid[3]


class _Run:
    """The inference that runs.

    Attributes:
        batch: the policy's; None between inferences, and in training.
        order: (batch, prefix): where in the prompt the layout's tokens stand.
        times: of the steps that are to come, as LeRobot counts: (batch,) each.
        trajectory: (batch, chunk, action_dim) that was denoised, padded dimensions included.
    """

    def __init__(self) -> None:
        self.batch: dict[str, Any] | None = None
        self.times: list[Tensor] = []
        self.order: Tensor
        self.trajectory: Tensor


def _check_mode(mode: str | None) -> None:
    if mode == "discrete":
        raise ConfigError(
            "inference_action_mode: got 'discrete', whose actions are decoded as tokens and not captured; "
            "expected 'continuous'"
        )


def _cells(
    n_patches: tuple[int, int], grid: tuple[int, int], pooling: Tensor
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Find how the patches of a whole image were put together to its tokens.

    Args:
        n_patches: rows and columns of patches.
        grid: rows and columns of tokens.
        pooling: (token, patch in it): the patches' numbers, row by row, -1 for none.

    Returns:
        Rows and columns of patches in a token, and how many of the first token's lie above and left of the
        image; None where no grid has these tokens.
    """
    numbers = torch.arange(n_patches[0] * n_patches[1]).view(n_patches)
    size, pooling = pooling.shape[1], pooling.cpu()
    for cell in ((rows, size // rows) for rows in range(1, size + 1) if size % rows == 0):
        spare = [n * one - have for n, one, have in zip(grid, cell, n_patches, strict=True)]
        if min(spare) < 0:
            continue
        before = (spare[0] // 2, spare[1] // 2)
        padded = nn.functional.pad(
            numbers, (before[1], spare[1] - before[1], before[0], spare[0] - before[0]), value=-1
        )
        tokens = padded.view(grid[0], cell[0], grid[1], cell[1]).transpose(1, 2).reshape(-1, size)
        if torch.equal(tokens, pooling.to(tokens.dtype)):
            return cell, before
    return None
