"""Watch a policy and hand out one `InferenceRecord` per action chunk.

    with capture_attention(policy, AttentionConfig(layers=[-1])) as capture:
        action = policy.select_action(batch)
        for record in capture.drain():
            record.suffix_attention  # (denoise_step, layer, batch, head, query, key)

Knows no policy family (an adapter makes attention observable), no environment, no episode and no file.
Watching changes nothing that the policy computes, draws no random number, and leaves nothing behind.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lerobot_attn.capture.activations import REDUCTIONS
from lerobot_attn.capture.collector import Collector
from lerobot_attn.capture.record import InferenceRecord, Selection
from lerobot_attn.config import AttentionConfig
from lerobot_attn.policies import adapter_for
from lerobot_attn.policies.base import PolicyAdapter, Probe, Site, own_tokenizer
from lerobot_attn.policies.chain import ProbeChain
from lerobot_attn.prompt import PieceDecoder, Tokenizer

logger = logging.getLogger(__name__)


class AttentionCapture:
    """The records of a running capture; what `capture_attention` yields.

    Attributes:
        records: finished inferences that nobody has taken yet, oldest first.
        policy: sizes of the watched policy.
        selection: which layers, heads and denoise steps are captured.
        adapter: the adapter of the watched policy.
    """

    def __init__(
        self,
        adapter: PolicyAdapter,
        config: AttentionConfig,
        *,
        tokenizer: Tokenizer | None = None,
        on_record: Callable[[InferenceRecord], None] | None = None,
        on_failure: Callable[[Exception], None] | None = None,
        max_records: int | None = None,
    ):
        self.adapter = adapter
        self.policy = adapter.describe()
        sites = adapter.sites()
        self.selection = Selection.resolve(config, self.policy, sites)
        for choice in self.selection.activations:
            logger.info(
                "%s of %d layers: %.2f MB an inference for each group of tokens, before compression",
                choice.name,
                len(choice.layers),
                choice.n_bytes(len(REDUCTIONS), len(self.selection.denoise_steps)) / 1e6,
            )
        self.records: deque[InferenceRecord] = deque(maxlen=max_records)
        self.collector = Collector(
            self.policy,
            sites,
            self.selection,
            decoder=PieceDecoder(tokenizer or own_tokenizer(adapter)),
            parse_prompt=adapter.parse_prompt,
            on_record=on_record or self.records.append,
            on_failure=on_failure,
        )

    @property
    def n_inferences(self) -> int:
        """How many inferences have been recorded so far."""
        return self.collector.n_inferences

    @property
    def enabled(self) -> bool:
        """Whether inferences are recorded; set it to False to let those pass that nobody needs."""
        return self.collector.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.collector.enabled = value

    def drain(self) -> Iterator[InferenceRecord]:
        """Take the records that are there, oldest first."""
        while self.records:
            yield self.records.popleft()


@contextmanager
def capture_attention(
    policy: Any,
    config: AttentionConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    on_record: Callable[[InferenceRecord], None] | None = None,
    on_failure: Callable[[Exception], None] | None = None,
    max_records: int | None = None,
    probes: Sequence[tuple[Probe, Iterable[Site]]] = (),
) -> Iterator[AttentionCapture]:
    """Record the attention of every inference that the policy makes inside the `with` block.

    Works around `select_action`, `predict_action_chunk` or anything that calls them. A policy compiled with
    `compile_model=true` runs uncompiled inside the block, unless `config.compiled` keeps it compiled.

    Args:
        policy: a LeRobot policy, PEFT-wrapped or not.
        config: what to capture; of its settings only `layers`, `denoise_steps`, `heads`, `mean_layers`,
            `prefix_layers`, `vision_layers`, `neurons`, `residuals`, `record_full` and `compiled` matter
            here. `mean_layers="auto"` (the default) means the layers that `layers` asks for: what nobody
            asked for costs nothing.
        tokenizer: the one whose ids the policy gets, so that words and state digits can be told apart.
            Without it language tokens are labelled `Kind.TEXT`, unless the policy has one of its own (EVO-1).
        on_record: called with each record as soon as the inference ends, instead of keeping it in
            `capture.records`.
        on_failure: called when an inference could not be captured, which then goes on unwatched. Without it
            the `CaptureError` is raised through the policy's call.
        max_records: keep only the newest so many in `capture.records`. By default every record stays there
            until it is taken with `capture.drain()`.
        probes: others that watch or change the policy at the same time, each with the sites that it wants.
            They come before the recording, in their order: what is recorded is what acted.

    Raises:
        UnsupportedPolicyError: no adapter knows this policy.
        ConfigError: a layer, head, denoise step or site does not exist, or `compiled` cannot be had (with a
            probe that edits it never can).
        CaptureError: an inference could not be captured, and nobody takes failures.
    """
    config = config or AttentionConfig()
    adapter = adapter_for(policy)
    capture = AttentionCapture(
        adapter,
        config,
        tokenizer=tokenizer,
        on_record=on_record,
        on_failure=on_failure,
        max_records=max_records,
    )
    collector = capture.collector
    # A chain has nothing to choose inside a compiled graph, so a capture alone is not put into one.
    chain = ProbeChain([*probes, (collector, capture.selection.sites)]) if probes else None
    sites = capture.selection.sites if chain is None else chain.sites
    with adapter.observe(chain or collector, sites, compiled=config.compiled):
        yield capture
    collector.close()
