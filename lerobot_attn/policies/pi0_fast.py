"""Pi0-FAST: PaliGemma alone, which decodes tokens one after another; no expert, no denoising.

The prefix is the images, the prompt and a `<bos>` that LeRobot puts behind it. The suffix holds the decoded
tokens, one slot for each that may be decoded: query i is token i, as it is read to decode token i + 1. What
it attends to is the prefix, the tokens before it and itself. Token 0 is decoded from the prefix: the last row
of the prefix maps, that of `<bos>`, decided it. The last token is never read, so it has no row.

In the store an inference is one step whose queries are the tokens, and not a step for each token: query i is
key `prefix_len + i` everywhere, a reader looks at the last step unless told otherwise (a slot that most
inferences never reach), and a map a token would be a chunk a token. The rows of tokens that an inference did
not read are NaN, their keys padding; keys that a token cannot see, because they came later, are 0, as in any
causal map.

No token is an action: the chunk is a cosine transform whose coefficients all tokens spell together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any, ClassVar

from torch import Tensor, nn

from lerobot_attn.errors import ConfigError
from lerobot_attn.layout import TokenLayout, tiled
from lerobot_attn.policies.base import (
    DecodedTokens,
    InferenceInputs,
    ParsedPrompt,
    PolicyDescription,
    Probe,
    Site,
    SiteInfo,
    Stream,
    said_by,
)
from lerobot_attn.policies.flow import key_mask
from lerobot_attn.policies.kernels import kernel_tap
from lerobot_attn.policies.paligemma import PaliGemmaCameras
from lerobot_attn.policies.prompts import TaskAndState
from lerobot_attn.policies.taps import begun, check_sites, no_attention, replaced_attribute, watched_method

logger = logging.getLogger(__name__)

_WITH_CACHE, _WITHOUT_CACHE = "sample_actions_fast_kv_cache", "sample_actions_fast"
_END = "|"  # LeRobot cuts the tokens off at the first of these
_PROMPT = TaskAndState(closing="")
_BOS = "<bos>"  # PaliGemma's, behind the prompt


class Pi0FastAdapter(PaliGemmaCameras):
    """Adapter of `PI0FastPolicy` and policies derived from it."""

    policy_types: ClassVar[tuple[str, ...]] = ("pi0_fast",)
    predicts: ClassVar[str] = "predict_action_chunk"

    def __init__(self, policy: Any):
        self.policy = policy
        self.model = policy.model
        self._layers: nn.ModuleList = self._paligemma.model.language_model.layers

    def describe(self) -> PolicyDescription:
        """Return the sizes of the live policy; a chunk is as long as what is executed of it."""
        config = self.policy.config
        return PolicyDescription(
            **said_by(config),
            n_layers=len(self._layers),
            n_prefix_layers=len(self._layers),
            n_heads=self._n_heads,
            n_denoise_steps=0,
            chunk_size=config.n_action_steps,
            n_decode_steps=self._n_tokens,
        )

    def sites(self) -> Mapping[Site, SiteInfo]:
        """Return every layer twice: in the prefix pass, and in the passes that read a decoded token."""
        keys: dict[Stream, Any] = {"vlm": "prefix", "expert": "prefix+suffix"}
        can_be_written = bool(self.policy.config.use_kv_cache)
        return {
            Site(stream, layer): SiteInfo(self._n_heads, keys=keys[stream], can_be_written=can_be_written)
            for stream in keys
            for layer in range(len(self._layers))
        }

    @contextmanager
    def observe(self, probe: Probe, sites: Iterable[Site], *, compiled: bool) -> Iterator[None]:
        """Tap the attention modules; what a pass reads tells whether it is the prefix's or a token's.

        Raises:
            ConfigError: also with a probe that edits a policy that decodes without its cache.
        """
        policy, model = self.policy, self.model
        wanted = frozenset(check_sites(sites, self.sites()))
        self._check_mode(probe, compiled=compiled)
        run = _Run()

        def observed_predict(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            run.start(batch)
            try:
                actions = predict(batch, *args, **kwargs)
            except BaseException:
                probe.abandon()
                raise
            finally:
                run.stop()
            probe.end(actions)
            return actions

        def observed_embedding(
            images: Any, img_masks: Any, tokens: Tensor, masks: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            if run.batch is not None:
                batch = run.batch

                def described() -> InferenceInputs:
                    layout = self._layout(batch, tokens.shape[1])
                    run.inputs = InferenceInputs(layout, tokens, key_mask(layout, img_masks, masks))
                    return run.inputs

                begun(probe, described)
            return embed(images, img_masks, tokens, masks, *args, **kwargs)

        def observed_pass(*args: Any, **kwargs: Any) -> Any:
            if run.inputs is None:  # training
                return forward(*args, **kwargs)
            run.stream = "vlm" if run.stream is None else "expert"
            output = forward(*args, **kwargs)
            if run.stream == "vlm":
                probe.denoise_step(float("nan"))
            return output

        def observed_decoding(decode: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            tokens = decode(*args, **kwargs)
            if run.inputs is not None:
                run.inputs.decoded.append(self._decoded(tokens))
            return tokens

        def is_wanted(layer: int) -> bool:
            return run.stream is not None and Site(run.stream, layer) in wanted

        def exchange(layer: int, value: Tensor) -> Tensor | None:
            assert run.stream is not None
            site = Site(run.stream, layer)
            if run.stream == "vlm" or value.shape[-2] == 1:
                return probe.at(site, value)
            # Without a cache every pass reads all tokens again; the last row is the new one's.
            probe.at(site, value[..., -1:, :])
            return None

        def missed(layer: int) -> None:
            probe.fail(no_attention(Site(run.stream or "vlm", layer)))

        predict: Callable[..., Tensor] = policy.predict_action_chunk
        embed: Callable[..., Any] = model.embed_prefix_fast
        forward: Callable[..., Any] = model.paligemma_with_expert.forward
        with ExitStack() as stack:
            stack.enter_context(watched_method(policy, self.predicts, observed_predict))
            for owner, name, value in (
                (model, "embed_prefix_fast", observed_embedding),
                (model.paligemma_with_expert, "forward", observed_pass),
                (model, _WITH_CACHE, partial(observed_decoding, getattr(model, _WITH_CACHE))),
                # torch.compile puts its wrapper on the instance; the class still has the plain function.
                (
                    model,
                    _WITHOUT_CACHE,
                    partial(observed_decoding, MethodType(getattr(type(model), _WITHOUT_CACHE), model)),
                ),
            ):
                stack.enter_context(replaced_attribute(owner, name, value))
            for layer in sorted({site.layer for site in wanted}):
                module: Any = self._layers[layer].self_attn
                stack.enter_context(
                    kernel_tap(
                        module, partial(exchange, layer), partial(missed, layer), partial(is_wanted, layer)
                    )
                )
            yield

    def parse_prompt(self, prompt: str) -> ParsedPrompt | None:
        r"""Find the task's words and the state's numbers in `Task: …, State: 128 97 …;\n`."""
        return _PROMPT.parse(prompt.removesuffix(_BOS))

    @property
    def _paligemma(self) -> Any:
        return self.model.paligemma_with_expert.paligemma

    @property
    def _n_heads(self) -> int:
        n_heads: int = self._paligemma.config.text_config.num_attention_heads
        return n_heads

    @property
    def _n_tokens(self) -> int:
        config = self.policy.config
        steps = config.max_decoding_steps
        return int(config.max_action_tokens if steps is None else steps)

    def _check_mode(self, probe: Probe, *, compiled: bool) -> None:
        config = self.policy.config
        is_compiled = config.compile_model and not config.use_kv_cache
        if compiled and is_compiled:
            raise ConfigError(
                "compiled=true: pi0_fast's decoding cannot be watched inside a compiled graph, whose "
                "number of passes is fixed when it is traced; leave compiled out: it runs uncompiled while "
                "it is watched"
            )
        if compiled:
            logger.warning(
                "compiled=true changes nothing: LeRobot compiles pi0_fast's decoding only with "
                "compile_model=true and use_kv_cache=false"
            )
        elif is_compiled:
            logger.warning("compile_model=true: while attention is captured the policy runs uncompiled")
        if probe.edits and not config.use_kv_cache:
            raise ConfigError(
                "use_kv_cache=false: every pass computes all tokens again, so that an edit of one pass is "
                "lost in the next one; set use_kv_cache=true to edit attention"
            )

    def _layout(self, batch: dict[str, Any], n_text: int) -> TokenLayout:
        cameras = self._cameras(batch)
        n_patches = self._grid[0] * self._grid[1]
        prefix = [("image", camera.name, n_patches) for camera in cameras]
        prefix.append(("language", "language", n_text))
        prefix_len = sum(length for _, _, length in prefix)
        suffix = ("action", "decoded tokens", self._n_tokens)
        return TokenLayout(tiled([*prefix, suffix]), prefix_len, tuple(cameras))

    def _decoded(self, tokens: Tensor) -> DecodedTokens:
        is_end = tokens == self.policy._paligemma_tokenizer.convert_tokens_to_ids(_END)
        n_ends_before = is_end.cumsum(dim=1) - is_end.long()
        return DecodedTokens(tokens, n_ends_before == 0)


class _Run:
    """How far the inference that runs has come; nothing of one where none does."""

    batch: dict[str, Any] | None = None
    inputs: InferenceInputs | None = None
    stream: Stream | None = None  # of the pass that runs

    def start(self, batch: dict[str, Any]) -> None:
        self.batch, self.inputs, self.stream = batch, None, None

    def stop(self) -> None:
        self.batch, self.inputs, self.stream = None, None, None
