"""What a neuron of the language model writes, and the way from there to words, in a checkpoint's weights.

A neuron is a unit of a layer's feed-forward network (FFN). Its value vector is a column of
`down_proj.weight`: what it adds to the residual stream when its activation is 1. The final norm and the
matrix that makes logits of what the norm returns (the unembedding) come last in a language model.

Knows where each family's tensors are. Knows neither words nor tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.errors import ConfigError, UnsupportedPolicyError
from lerobot_attn.policies.families import WHY_NOT
from lerobot_attn.policies.weights import Checkpoint, Weights, find_checkpoint


class _Family(NamedTuple):
    """Where a family keeps its language model.

    Attributes:
        layers: its layers, behind any prefix.
        norm: the final norm.
        unembeddings: what makes logits; the first that a checkpoint has.
        gain_offset: what the norm adds to its weight before it multiplies by it.
        eps: what the norm adds to the mean square. No checkpoint says it: it is the code's own.
    """

    layers: str
    norm: str
    unembeddings: tuple[str, ...]
    gain_offset: float
    eps: float


_PALIGEMMA, _SMOLVLM = "paligemma_with_expert.paligemma.", "vlm_with_expert.vlm."
_FAMILIES = (
    # Pi0, Pi0.5 and Pi0-FAST. LeRobot copies lm_head into embed_tokens when it loads: they are one matrix.
    # `PiGemmaRMSNorm` multiplies by 1 + weight.
    _Family(
        _PALIGEMMA + "model.language_model.layers.",
        _PALIGEMMA + "model.language_model.norm.weight",
        (_PALIGEMMA + "lm_head.weight", _PALIGEMMA + "model.language_model.embed_tokens.weight"),
        gain_offset=1.0,
        eps=1e-6,
    ),
    # SmolVLA. SmolVLM2's text model is a Llama; its lm_head need not be its embedding.
    _Family(
        _SMOLVLM + "model.text_model.layers.",
        _SMOLVLM + "model.text_model.norm.weight",
        (_SMOLVLM + "lm_head.weight", _SMOLVLM + "model.text_model.embed_tokens.weight"),
        gain_offset=0.0,
        eps=1e-5,
    ),
)
_DOWN = "mlp.down_proj.weight"


class ValueVectors:
    """The value vectors of a checkpoint's language model, and what turns them into logits.

    Attributes:
        checkpoint: whose they are.
        n_layers: layers of the language model.
        n_units: units of a layer's FFN.
        width: numbers of a value vector.
        n_tokens: rows of the unembedding.
        gain: (width,) float32, what the final norm multiplies by.
        eps: what it adds to the mean square before it divides by its root.
        unembedding: "lm_head" or "embed_tokens": which matrix makes the logits.
        last_acts: whether the last layer's neurons reach the actions. Where an action expert reads the keys
            and values of the layers, they do not: nothing of the language model comes after them.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._weights = Weights(checkpoint.weights)
        names = set(self._weights.names)
        if any(".lora_" in name for name in names):
            raise ConfigError(
                f"{checkpoint.place}: its weights hold LoRA's beside the others; merge them first (peft's "
                "merge_and_unload, then save_pretrained)"
            )
        family, prefix, layers = self._family(names)
        self.n_layers = len(layers)
        self._down = [f"{prefix}{family.layers}{layer}.{_DOWN}" for layer in range(self.n_layers)]
        norm, heads = prefix + family.norm, [prefix + name for name in family.unembeddings]
        head = next((name for name in heads if name in names), heads[0])
        for name in (*self._down, norm, head):
            if name not in names:
                raise ConfigError(f"{checkpoint.place}: {name} is missing; get the checkpoint again")
        self._head, self.unembedding = head, head.split(".")[-2]
        self.width, self.n_units = self._weights.shape(self._down[0])
        self.n_tokens = self._weights.shape(head)[0]
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(self._down, (self.width, self.n_units))
        expected |= {norm: (self.width,), head: (self.n_tokens, self.width)}
        for name, shape in expected.items():
            if self._weights.shape(name) != shape:
                got = self._weights.shape(name)
                raise ConfigError(f"{checkpoint.place}: {name} has the shape {got}, expected {shape}")
        self.gain: NDArray[np.float32] = self._weights.whole(norm) + np.float32(family.gain_offset)
        self.eps = family.eps
        self.last_acts = checkpoint.policy_type == "pi0_fast"

    def _family(self, names: set[str]) -> tuple[_Family, str, list[int]]:
        """Return the family, what stands before its names, and the numbers of the layers."""
        for family in _FAMILIES:
            pattern = re.compile(rf"(|.*\.){re.escape(family.layers)}(\d+)\.{re.escape(_DOWN)}")
            found = [match for match in map(pattern.fullmatch, names) if match]
            if found:
                return family, found[0][1], sorted(int(match[2]) for match in found)
        kind = self.checkpoint.policy_type
        why = f" ({WHY_NOT[kind]})" if kind in WHY_NOT else ""
        raise UnsupportedPolicyError(
            f"{self.checkpoint.place}: the words of a policy of type {kind!r} cannot be read{why}; expected "
            "the language model of pi0, pi05, pi0_fast or smolvla among its weights"
        )

    def layer(self, layer: int) -> NDArray[np.float32]:
        """Return a layer's value vectors: (width, unit) float32, each unit's in a column."""
        found = np.empty((self.width, self.n_units), np.float32)
        for start, rows in self._weights.blocks(self._down[layer]):
            found[start : start + len(rows)] = rows
        return found

    def of_units(self, layer: int, units: Sequence[int]) -> NDArray[np.float32]:
        """Return some units' value vectors: (width, unit) float32."""
        found = np.empty((self.width, len(units)), np.float32)
        for start, rows in self._weights.blocks(self._down[layer]):
            found[start : start + len(rows)] = rows[:, units]
        return found

    def tokens(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return rows of the unembedding: (token, width) float32."""
        return self._weights.chosen_rows(self._head, token_ids)

    def all_tokens(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the unembedding in turns: the first token's number, and (token, width) float32."""
        return self._weights.blocks(self._head)

    @property
    def n_turns(self) -> int:
        """How many turns `all_tokens` takes."""
        return self._weights.n_blocks(self._head)


def read_value_vectors(path: str | Path) -> ValueVectors:
    """Open a checkpoint's value vectors; nothing large is read yet.

    Args:
        path: its folder, or its name on the Hub.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged, or it holds a LoRA adapter alone.
        SetupError: what reads the Hub is not installed.
        UnsupportedPolicyError: the policy has no such language model.
    """
    return ValueVectors(find_checkpoint(path))
