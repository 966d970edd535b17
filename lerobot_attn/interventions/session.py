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
from typing import Any

import torch
from torch import Tensor

from lerobot_attn.errors import ConfigError
from lerobot_attn.interventions.noise import fixed_noise
from lerobot_attn.interventions.spec import (
    BlockAttention,
    Condition,
    FixedNoise,
    Intervention,
    Occlude,
    Task,
)
from lerobot_attn.masks import SceneMasks
from lerobot_attn.policies import adapter_for
from lerobot_attn.policies.base import PolicyAdapter
from lerobot_attn.policies.taps import replaced_attribute
from lerobot_attn.prompt import Tokenizer, find_tokenizer

MasksNow = Callable[[], Sequence[SceneMasks]]


class Intervener:
    """Interventions that act on a policy; what `intervene` yields.

    Attributes:
        condition: what is done.
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
        self._tasks = [one for one in condition.interventions if isinstance(one, Task)]
        self._noise = next((one for one in condition.interventions if isinstance(one, FixedNoise)), None)
        self._episodes: tuple[int, ...] | None = None
        self._n_inferences = 0
        self._told = False
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

    def _check(self) -> None:
        """Refuse what cannot be done with this policy."""
        policy = self._policy
        for one in self.condition.interventions:
            if isinstance(one, BlockAttention | Occlude):
                raise ConfigError(f"{one.kind}: cannot be done yet, expected task or fixed_noise")
        if self._noise is not None and policy.noise_shape is None and policy.n_denoise_steps:
            raise ConfigError(
                f"fixed_noise: {policy.policy_type} takes no noise as an argument, expected a policy that "
                "does; seed this one before each inference instead"
            )

    def _rows(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the episode of each row of a batch."""
        n_rows = next((len(value) for value in batch.values() if torch.is_tensor(value) and value.ndim), 1)
        if self._episodes is None:
            return tuple(range(n_rows))
        if len(self._episodes) != n_rows:
            raise ConfigError(
                f"the policy got a batch of {n_rows}, expected {len(self._episodes)}, as begin() was told"
            )
        return self._episodes

    def _around(self, predict: Callable[..., Tensor], names: Sequence[str]) -> Callable[..., Tensor]:
        """Return the policy's method that predicts, with everything done that is no attention."""

        def predict_under_condition(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if self._tasks and not self._told:
                raise ConfigError(
                    "task: the policy was asked before anybody asked Intervener.task for its instruction; "
                    "give the preprocessor what it returns"
                )
            episodes = self._rows(batch)
            if self._noise is not None and self._draws and given.get("noise") is None:
                given["noise"] = self._noise_for(self._noise, episodes, batch)
            actions = predict(batch, **given)
            self._n_inferences += 1
            return actions

        return predict_under_condition

    def _noise_for(self, noise: FixedNoise, episodes: Sequence[int], batch: Mapping[str, Any]) -> Tensor:
        assert self._policy.noise_shape is not None
        shape, number = self._policy.noise_shape, self._n_inferences
        drawn = [fixed_noise(shape, noise.seed, episode, number) for episode in episodes]
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
    acting._check()
    if not condition.interventions:
        yield acting
        return
    unwrapped: Any = getattr(adapter, "policy")  # noqa: B009
    name: str = getattr(adapter, "predicts", "predict_action_chunk")
    names = list(inspect.signature(getattr(type(unwrapped), name)).parameters)[2:]
    with ExitStack() as stack:
        around = acting._around(getattr(unwrapped, name), names)
        stack.enter_context(replaced_attribute(unwrapped, name, around))
        yield acting
