"""Act on a policy while it runs.

    with intervene(policy, Condition.from_yaml("block_target.yaml"), masks=scene.current) as acting:
        acting.begin([0])
        action = policy.select_action(batch)

Knows no policy family (an adapter makes a policy observable), no environment, no simulator and no file. What
is not intervened on stays bit for bit what it was, and nothing is left behind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lerobot_attn.errors import ConfigError
from lerobot_attn.interventions.blocking import Blocker, Rows
from lerobot_attn.interventions.firing import FireNeurons, SteerResidual
from lerobot_attn.interventions.keys import PromptLabels
from lerobot_attn.interventions.neurons import Firer, resolved, warn_of_idle
from lerobot_attn.interventions.noise import fixed_noise
from lerobot_attn.interventions.occlusion import Occluder
from lerobot_attn.interventions.selectors import flat
from lerobot_attn.interventions.spec import (
    BlockAttention,
    Condition,
    FixedNoise,
    Intervention,
    Occlude,
    Task,
)
from lerobot_attn.masks import SceneMasks
from lerobot_attn.policies import adapter_for, adapter_type, unwrap
from lerobot_attn.policies.base import PolicyAdapter, own_tokenizer
from lerobot_attn.policies.taps import in_trial_pass, is_watched, replaced_attribute, trial_pass
from lerobot_attn.prompt import Tokenizer, find_tokenizer

MasksNow = Callable[[], Sequence[SceneMasks]]

# Families whose attention is blocked. The others' kernels give probabilities that are computed beside what
# acts, and a recording around them could not tell what acted.
_BLOCKED = ("act", "pi0", "pi05", "smolvla", "wall_x")
# Families whose neurons and residuals have sites, and why the others have none.
_FIRED = ("pi0", "pi05", "smolvla")
_NOT_FIRED = {
    "act": "of ACT attention alone is reached, and it has no language model whose neurons stand for words",
    "eo1": "of EO-1 attention alone is reached",
    "evo1": "of EVO-1 attention alone is reached",
    "groot": "of GR00T attention alone is reached",
    "molmoact2": "of MolmoAct2 attention alone is reached",
    "pi0_fast": "of Pi0-FAST attention alone is reached, whose passes hold one decoded token each",
    "wall_x": "of Wall-X attention alone is reached",
    "xvla": "of X-VLA attention alone is reached",
}
_WITHOUT_INSTRUCTION = ("act",)
# Families whose preprocessor cuts pictures into patches: of the policy's batch nobody reads them.
_CUT_BEFORE = ("eo1", "groot", "molmoact2")
_NEEDS_WORDS = ("task", "template")  # segments that only a tokenizer can tell
_ACTING: WeakKeyDictionary[Any, list[Intervener]] = WeakKeyDictionary()  # by policy


class Intervener:
    """Interventions that act on a policy; what `intervene` yields.

    Attributes:
        condition: what is done; inside the context with what is only known of a live policy, such as which
            neurons were drawn at random.
        masks: is called at each inference, where the condition needs masks: returns what the cameras show
            now, one for each row of the policy's batch. May be set later than the context is entered.
    """

    def __init__(
        self,
        adapter: PolicyAdapter,
        condition: Condition,
        *,
        tokenizer: Tokenizer | None = None,
        masks: MasksNow | None = None,
    ):
        self.condition = condition
        self.masks = masks
        self._adapter = adapter
        self._policy = adapter.describe()
        self._draws = self._policy.noise_shape is not None
        self._prompts = PromptLabels(tokenizer or own_tokenizer(adapter), adapter.parse_prompt)
        parts = condition.interventions
        self._tasks = [one for one in parts if isinstance(one, Task)]
        self._blocks = [one for one in parts if isinstance(one, BlockAttention)]
        self._firings = [one for one in parts if isinstance(one, FireNeurons | SteerResidual)]
        occlusions = [one for one in parts if isinstance(one, Occlude)]
        self._noise = next((one for one in parts if isinstance(one, FixedNoise)), None)
        features: Mapping[str, Any] = getattr(adapter.policy.config, "image_features", None) or {}
        self._occluder = Occluder(occlusions, list(features)) if occlusions else None
        self._episodes: tuple[int, ...] | None = None
        self._n_inferences = 0
        self._told = False
        self._rows = Rows((), None)
        self._painted: dict[str, Tensor] = {}

    def begin(self, episodes: Sequence[int]) -> None:
        """Say that a batch of episodes starts; inferences are counted from here.

        Args:
            episodes: number of the episode of each row of the policy's batch. Noise and random choices
                depend on it. Without any such call the rows are episodes 0, 1, ….
        """
        self._episodes = tuple(int(episode) for episode in episodes)
        self._n_inferences = 0
        self._painted = {}

    def task(self, text: str, episode: int) -> str:
        """Return the instruction as the policy shall get it.

        Args:
            text: the environment's.
            episode: its number.

        Raises:
            ConfigError: words that are to be replaced or removed are not in it.
        """
        self._told = True
        for change in self._tasks:
            text = change.applied(text, episode)
        return text

    def seen(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch as the policy saw it: with the pictures that its newest inference got.

        Args:
            batch: the policy's. If no inference came since the last call, it is returned as it is.
        """
        painted, self._painted = self._painted, {}
        return {**batch, **{name: image for name, image in painted.items() if name in batch}}

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """Act while the context lasts.

        Raises:
            ConfigError: something cannot be done with this policy.
        """
        adapter, policy = self._adapter, self._adapter.policy
        self._check()
        with ExitStack() as stack:
            if self._firings:
                firer = Firer(self._resolve(), self._policy, self._prompts, lambda: self._rows)
                stack.enter_context(adapter.observe(firer, firer.sites, compiled=False))
            blocker = None
            if self._blocks:
                blocker = Blocker(self._blocks, self._policy, self._prompts, lambda: self._rows)
                stack.enter_context(adapter.observe(blocker, blocker.sites, compiled=False))
            parameters = inspect.signature(getattr(type(policy), adapter.predicts)).parameters
            predict = self._around(getattr(policy, adapter.predicts), list(parameters)[2:], blocker)
            stack.enter_context(replaced_attribute(policy, adapter.predicts, predict))
            yield

    def _resolve(self) -> list[FireNeurons | SteerResidual]:
        """Find out what is fired in this policy, and say it in the condition."""
        parts = [
            resolved(one, self._adapter) if isinstance(one, FireNeurons | SteerResidual) else one
            for one in self.condition.interventions
        ]
        self.condition = replace(self.condition, interventions=tuple(parts))
        firings = [one for one in parts if isinstance(one, FireNeurons | SteerResidual)]
        warn_of_idle(self.condition.name, firings, self._adapter)
        return firings

    def _check(self) -> None:
        """Refuse what cannot be done with this policy."""
        policy, config = self._policy, self._adapter.policy.config
        kind = policy.policy_type
        if self._noise is not None and policy.draws_own_noise:
            raise ConfigError(
                f"fixed_noise: {kind} takes no noise as an argument, expected a policy that does; seed this "
                "one before each inference instead"
            )
        family = adapter_type(config)
        if self._tasks and family in _WITHOUT_INSTRUCTION:
            raise ConfigError(f"task: {kind} is given no instruction, expected a policy that is")
        if self._occluder is not None and family in _CUT_BEFORE:
            raise ConfigError(
                f"occlude: {kind}'s preprocessor cuts pictures into patches before the policy gets them, "
                "expected a policy that reads its cameras itself; paint over what the preprocessor is given"
            )
        if not self._blocks and not self._firings:
            return
        does = (self._blocks or self._firings)[0].kind
        if self._blocks and family not in _BLOCKED:
            raise ConfigError(
                f"block_attention: got a policy of type {kind}, expected one of {', '.join(_BLOCKED)}: what "
                f"{kind}'s kernels weigh by is only computed beside them"
            )
        if self._firings and family in _NOT_FIRED:
            raise ConfigError(
                f"{self._firings[0].kind}: got a policy of type {kind}, expected one of {', '.join(_FIRED)}: "
                f"{_NOT_FIRED[family]}"
            )
        if self._is_compiled():
            raise ConfigError(
                f"{does}: the policy is compiled, so it can only be read, expected one that is not; set "
                "compile_model=false"
            )
        if is_watched(self._adapter.policy, self._adapter.predicts):
            raise ConfigError(
                f"{does}: the policy's attention is already being captured, which would record what did not "
                "act; enter intervene first and the capture inside it"
            )
        chosen = [one for block in self._blocks for one in block.keys]
        chosen += [
            one for firing in self._firings if not isinstance(firing.tokens, str) for one in firing.tokens
        ]
        for selector in flat(chosen):
            needs_words = "words" in selector or selector.get("segment") in _NEEDS_WORDS
            if needs_words and not self._prompts.can_read:
                raise ConfigError(
                    f"keys: got {selector}, but no tokenizer is known, expected one; give intervene() "
                    "tokenizer= or preprocessor="
                )

    def _is_compiled(self) -> bool:
        policy = self._adapter.policy
        # torch.compile puts its wrapper on the instance.
        by_config = getattr(policy.config, "compile_model", False) and "sample_actions" in vars(policy.model)
        by_command = hasattr(vars(policy).get(self._adapter.predicts), "_torchdynamo_orig_callable")
        return bool(by_config or by_command)

    def _around(
        self, predict: Callable[..., Tensor], names: Sequence[str], blocker: Blocker | None
    ) -> Callable[..., Tensor]:
        """Return the policy's method that predicts, with everything done.

        Args:
            predict: the method; attention is blocked in it.
            names: of its arguments behind the batch.
            blocker: blocks it; None where nothing is.
        """

        def predict_under_condition(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if self._tasks and not self._told:
                raise ConfigError(
                    "task: the policy was asked before anybody asked Intervener.task for its instruction; "
                    "give the preprocessor what it returns"
                )
            self._rows = self._rows_of(batch)
            if self._occluder is not None:
                self._painted = self._occluder.painted(batch, *self._rows)
                batch = {**batch, **self._painted}
            # The caller's own noise is fixed already, as that of a replay.
            if self._noise is not None and self._draws and given.get("noise") is None:
                given["noise"] = self._noise_of(self._noise, batch)
            if blocker is not None and blocker.ranks:
                self._rank(predict, blocker, batch, given)
            actions = predict(batch, **given)
            if not in_trial_pass():
                self._n_inferences += 1
            return actions

        return predict_under_condition

    def _rank(
        self,
        predict: Callable[..., Tensor],
        blocker: Blocker,
        batch: Mapping[str, Any],
        given: Mapping[str, Any],
    ) -> None:
        """Run the unblocked pass that ranks patches; random numbers are drawn again by the one that acts."""
        cuda = {one.device for one in batch.values() if torch.is_tensor(one) and one.device.type == "cuda"}
        blocker.rank()
        with torch.random.fork_rng(devices=list(cuda)), trial_pass():
            predict(dict(batch), **given)
        blocker.ranked()

    def _rows_of(self, batch: Mapping[str, Any]) -> Rows:
        """Return whom a batch is about."""
        n_rows = next((len(value) for value in batch.values() if torch.is_tensor(value) and value.ndim), 1)
        episodes = tuple(range(n_rows)) if self._episodes is None else self._episodes
        if len(episodes) != n_rows:
            raise ConfigError(
                f"the policy got a batch of {n_rows}, expected {len(episodes)}, as begin() was told"
            )
        if not self.condition.needs_masks:
            return Rows(episodes, None)
        if self.masks is None:
            raise ConfigError(
                f"{self.condition.name}: speaks of roles, and nobody says what the pixels show, expected "
                "masks; give intervene() masks="
            )
        scenes = list(self.masks())
        if len(scenes) != n_rows:
            raise ConfigError(f"masks: got {len(scenes)} scenes, expected {n_rows}, one for each row")
        return Rows(episodes, scenes)

    def _noise_of(self, noise: FixedNoise, batch: Mapping[str, Any]) -> Tensor:
        shape, number = self._policy.noise_shape, self._n_inferences
        assert shape is not None
        drawn = [fixed_noise(shape, noise.seed, episode, number) for episode in self._rows.episodes]
        device = next(value.device for value in batch.values() if torch.is_tensor(value))
        return torch.stack(drawn).to(device)


@contextmanager
def intervene(
    policy: Any,
    condition: Condition | Intervention | Sequence[Intervention],
    *,
    tokenizer: Tokenizer | None = None,
    preprocessor: Any = None,
    masks: MasksNow | None = None,
) -> Iterator[Intervener]:
    """Act on every inference that the policy makes inside the `with` block.

    Works around `select_action`, `predict_action_chunk` or anything that calls them, in whichever thread. To
    record the map that acted, enter `capture_attention` (or `enable_attention_map_saving`) inside the block.

    Args:
        policy: a LeRobot policy, PEFT-wrapped or not.
        condition: what to do; without interventions the policy is left alone.
        tokenizer: the one whose ids the policy gets; needed to find words, or the state's digits in a prompt.
        preprocessor: the policy's LeRobot preprocessor, whose tokenizer is taken where none is given.
        masks: see `Intervener.masks`.

    Raises:
        UnsupportedPolicyError: no adapter knows this policy.
        ConfigError: something that cannot be done with this policy.
    """
    adapter = adapter_for(policy)
    condition = Condition.of(condition)
    acting = Intervener(adapter, condition, tokenizer=tokenizer or find_tokenizer(preprocessor), masks=masks)
    if not condition.interventions:
        yield acting
        return
    with acting._acting():
        _ACTING.setdefault(adapter.policy, []).append(acting)
        try:
            yield acting
        finally:
            _ACTING[adapter.policy].remove(acting)


def interveners_of(policy: Any) -> tuple[Intervener, ...]:
    """Return what acts on a policy now, the outermost first, so that a recording can say it."""
    return tuple(_ACTING.get(unwrap(policy), ()))
