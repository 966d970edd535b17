"""The probe that blocks attention: takes chosen keys out of rows of attention before these are applied.

Where the adapter reaches the scores, they are masked before the softmax, so that a token that nobody reads
has no influence at all. Elsewhere, and where rows are not renormalised, keys are set to 0 after the softmax
and what is left is scaled to sum to 1: the same but for rounding. A row of which nothing is left is 0: its
token reads nothing. Knows no policy family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lerobot_attn.config import resolve_indices
from lerobot_attn.interventions.keys import Keys, PromptLabels
from lerobot_attn.interventions.selectors import flat
from lerobot_attn.interventions.spec import BlockAttention
from lerobot_attn.masks import SceneMasks
from lerobot_attn.policies.base import InferenceInputs, PolicyDescription, Site, Stream


class Rows(NamedTuple):
    """Whom an inference is about: the episode of each row of the batch, and what its cameras show."""

    episodes: Sequence[int]
    scenes: Sequence[SceneMasks] | None


class _Cut(NamedTuple):
    """How a block changes the maps of one stream, in one inference."""

    keep: Tensor  # (batch, 1 or head, 1 or query, key), float32: 0 where nothing is read
    is_cut: Tensor  # (batch, 1 or head, 1 or query, 1), bool: rows in which something is not read
    renormalise: bool
    bias: Tensor | None  # 0, or -inf where nothing is read; None where scores cannot be masked


class _Block(NamedTuple):
    spec: BlockAttention
    layers: Mapping[Stream, frozenset[int]]
    heads: tuple[int, ...] | None  # None: all
    steps: frozenset[int]


class Blocker:
    """Blocks attention in every inference that an adapter hands over.

    Args:
        blocks: what is blocked, in this order.
        policy: sizes of the policy.
        prompts: reads its prompts.
        rows: is called when an inference begins.

    Raises:
        ConfigError: a layer, head or denoise step does not exist.
    """

    edits: ClassVar[bool] = True

    def __init__(
        self,
        blocks: Sequence[BlockAttention],
        policy: PolicyDescription,
        prompts: PromptLabels,
        rows: Callable[[], Rows],
    ):
        self._policy = policy
        self._prompts = prompts
        self._rows = rows
        self._blocks = [_resolved(block, policy) for block in blocks]
        # Layers whose maps rank patches, as their selectors say them.
        self._ranked: dict[str, frozenset[int]] = {}
        for block in blocks:
            for selector in flat(block.keys):
                if "all_but_top" in selector:
                    layers = selector.get("layers", "all")
                    self._ranked[str(layers)] = frozenset(resolve_indices("layer", layers, policy.n_layers))
        self._maps: dict[str, NDArray[np.float32]] = {}
        self._sums: dict[str, list[Tensor]] | None = None  # while patches are ranked
        self._step = -1
        self._masked: Site | None = None  # whose scores were masked, and are about to come

    @property
    def ranks(self) -> bool:
        """Whether patches have to be ranked before each inference, by an unblocked pass."""
        return bool(self._ranked)

    @property
    def sites(self) -> list[Site]:
        """The sites at which something is blocked or ranked."""
        layers: dict[Stream, set[int]] = {"vlm": set(), "expert": set()}
        for block in self._blocks:
            for stream, chosen in block.layers.items():
                layers[stream] |= chosen
        for ranked in self._ranked.values():
            layers["expert"] |= ranked
        return [Site(stream, layer) for stream, chosen in layers.items() for layer in sorted(chosen)]

    def rank(self) -> None:
        """The next inference is the unblocked pass that ranks patches."""
        self._sums = {layers: [] for layers in self._ranked}

    def ranked(self) -> None:
        """The unblocked pass is done."""
        sums, self._sums = self._sums or {}, None
        for layers, found in sums.items():
            self._maps[layers] = torch.stack(found).mean(0).float().cpu().numpy()

    def begin(self, inputs: InferenceInputs) -> None:
        """An inference starts: find out what the selectors mean in it."""
        layout = inputs.layout
        self._step, self._prefix_len = -1, layout.prefix_len
        first = layout.first_action_query
        self._executed = slice(first, first + min(self._policy.n_action_steps, len(layout.actions)))
        self._cuts: dict[tuple[int, Stream], _Cut | None] = {}
        if self._sums is not None:
            return
        rows = self._rows()
        keys = Keys(
            layout,
            inputs.token_id.cpu().numpy(),
            inputs.key_mask.cpu().numpy(),
            self._prompts,
            episodes=rows.episodes,
            scenes=rows.scenes,
            maps=self._maps,
        )
        chosen = [keys.chosen(block.spec.keys) for block in self._blocks]
        # Masked scores of a row of which nothing is left would weigh padding, so such rows are cut. That
        # something is left is sure if it is in the prefix, and no state, which not all tokens may read.
        left = inputs.key_mask.cpu().numpy() & ~np.logical_or.reduce(chosen)
        for segment in layout.segments:
            if segment.kind == "state":
                left[:, segment.start : segment.stop] = False
        is_left = bool(left[:, : layout.prefix_len].any(axis=1).all())
        for number, (block, blocked) in enumerate(zip(self._blocks, chosen, strict=True)):
            readers = None
            if block.spec.queries == "actions":
                readers = np.zeros_like(blocked)
                readers[:, layout.actions.start : layout.actions.stop] = True
            elif block.spec.queries != "all":
                readers = keys.segment(block.spec.queries)
            for stream in block.layers:
                self._cuts[number, stream] = self._cut(
                    block, stream, blocked, readers, inputs.key_mask.device, is_left=is_left
                )

    def camera(self, name: str) -> None:
        """Nothing is blocked in the vision tower."""

    def denoise_step(self, flow_time: Tensor | float) -> None:
        """The next Euler step starts."""
        self._step += 1

    def bias(self, site: Site) -> Tensor | None:
        """Return what masks a site's scores: broadcasts to (batch, head, query, key); None masks nothing."""
        self._masked = site
        total: Tensor | None = None
        for cut in self._cuts_at(site):
            if cut.bias is not None:
                total = cut.bias if total is None else total + cut.bias
        return total

    def only_masks(self, site: Site) -> bool:
        """Return whether masked scores do all that is done at a site in the step that runs."""
        return self._sums is None and all(cut.bias is not None for cut in self._cuts_at(site))

    def at(self, site: Site, value: Tensor) -> Tensor | None:
        """Return a site's attention without what is blocked, or None where nothing is left to do."""
        is_masked, self._masked = self._masked == site, None
        if self._sums is not None:
            self._note(site, value)
            return None
        current = value
        for cut in self._cuts_at(site):
            if cut.bias is None or not is_masked:
                current = _without(current, cut)
        return None if current is value else current

    def end(self, action_chunk: Tensor) -> None:
        """The inference is done."""

    def abandon(self) -> None:
        """The policy raised."""
        self._sums = None

    def fail(self, error: Exception) -> None:
        """A site cannot be reached, or an inference's tokens not be told: nothing can be blocked there.

        Raises:
            Exception: the error.
        """
        raise error

    refuse = fail

    def _cuts_at(self, site: Site) -> Iterator[_Cut]:
        """Yield what is blocked at a site in the step that runs."""
        if self._sums is not None:
            return
        for number, block in enumerate(self._blocks):
            if site.layer not in block.layers.get(site.stream, ()):
                continue
            if site.stream == "expert" and self._step not in block.steps:
                continue
            cut = self._cuts[number, site.stream]
            if cut is not None:
                yield cut

    def _note(self, site: Site, value: Tensor) -> None:
        assert self._sums is not None
        if site.stream != "expert":
            return
        for layers, chosen in self._ranked.items():
            if site.layer in chosen:
                read = value.detach()[:, :, self._executed, : self._prefix_len]
                self._sums[layers].append(read.mean(dim=(1, 2), dtype=torch.float32))

    def _cut(
        self,
        block: _Block,
        stream: Stream,
        blocked: NDArray[np.bool_],
        readers: NDArray[np.bool_] | None,
        device: torch.device,
        *,
        is_left: bool,
    ) -> _Cut | None:
        """Return what a block does to a stream's maps; None if nothing.

        Args:
            block: the block.
            stream: "vlm" or "expert".
            blocked: (batch, key).
            readers: (batch, key), the tokens that do not read them; None: all.
            device: of the maps.
            is_left: whether in every row something is left to read.
        """
        if stream == "vlm":
            blocked = blocked[:, : self._prefix_len]
        not_read = torch.from_numpy(blocked)[:, None, None]
        if readers is not None:
            readers = readers[:, : self._prefix_len] if stream == "vlm" else readers[:, self._prefix_len :]
            not_read = not_read & torch.from_numpy(readers)[:, None, :, None]
        if block.heads is not None:
            is_head = torch.zeros(self._policy.n_heads, dtype=torch.bool)
            is_head[list(block.heads)] = True
            not_read = not_read & is_head[None, :, None, None]
        if not not_read.any():
            return None
        not_read = not_read.to(device)
        bias = None
        if block.spec.renormalise and is_left:
            bias = torch.zeros(not_read.shape, device=device).masked_fill(not_read, float("-inf"))
        is_cut = not_read.any(-1, keepdim=True)
        return _Cut((~not_read).float(), is_cut, block.spec.renormalise, bias)


def _without(value: Tensor, cut: _Cut) -> Tensor:
    """Return attention (batch, head, query, key) without what is cut; rows that lose nothing are equal."""
    # Layers that cross-attend see the prefix alone, whose keys come first.
    kept = value * cut.keep[..., : value.shape[-1]]  # float32, also of bfloat16
    if cut.renormalise:
        total = kept.sum(-1, keepdim=True)
        # Of a row of which nothing is left the total is 0, and it stays as it is: all 0.
        scale = torch.where(cut.is_cut & (total > 0), total, 1).reciprocal()
        # The graph of a policy that runs with gradients needs both factors as they were.
        kept = kept * scale if kept.requires_grad else kept.mul_(scale)
    return kept.to(value.dtype)


def _resolved(block: BlockAttention, policy: PolicyDescription) -> _Block:
    layers: dict[Stream, frozenset[int]] = {}
    if block.passes != "suffix":
        layers["vlm"] = frozenset(resolve_indices("prefix layer", block.layers, policy.n_prefix_layers))
    if block.passes != "prefix":
        layers["expert"] = frozenset(resolve_indices("layer", block.layers, policy.n_layers))
    heads = None if block.heads == "all" else resolve_indices("head", block.heads, policy.n_heads)
    steps = frozenset(resolve_indices("denoise step", block.denoise_steps, policy.n_steps))
    return _Block(block, layers, heads, steps)
