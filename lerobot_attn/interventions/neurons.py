"""The probe that fires neurons and adds to residual streams, and what its data mean of a live policy.

A value at a site is changed at some units, tokens and denoise steps; everything else of it stays bit for bit
what it was. Knows no policy family: which sites there are, and what a neuron writes, an adapter says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lerobot_attn.config import resolve_indices
from lerobot_attn.errors import CaptureError, ConfigError
from lerobot_attn.interventions.blocking import Rows
from lerobot_attn.interventions.firing import STREAMS, Firing, SteerResidual, significant
from lerobot_attn.interventions.keys import Keys, PromptLabels
from lerobot_attn.interventions.selectors import words_of
from lerobot_attn.policies.base import (
    InferenceInputs,
    NeuronAdapter,
    PolicyAdapter,
    PolicyDescription,
    Site,
    SiteInfo,
)

logger = logging.getLogger(__name__)

_AT_ONCE = 256  # neurons whose value vectors are held at once


def resolved(one: Firing, adapter: PolicyAdapter) -> Firing:
    """Return what is to be done to a live policy: layers from 0, draws made, norms and reach known.

    Args:
        one: what somebody asked for.
        adapter: of the policy; it has neurons.

    Raises:
        ConfigError: a layer or neuron that it does not have, a vector of another length, or too few others to
            draw from.
    """
    sites = adapter.sites()
    if isinstance(one, SteerResidual):
        site = _site(one, one.layer, sites)
        info = sites[site]
        if len(one.vector) != info.n_units:
            raise ConfigError(
                f"residual.vector: got {len(one.vector)} numbers, expected {info.n_units}, as {site} has"
            )
        return replace(one, layer=site.layer, reaches_actions=info.reaches_actions)
    assert isinstance(adapter, NeuronAdapter)
    asked = one.like or one.units
    found = {_site(one, layer, sites): units for layer, units in asked.items()}
    if len(found) < len(asked):
        raise ConfigError(f"neurons.units: got layers {list(asked)}, two of which are the same layer")
    values = {_site(one, layer, sites): value for layer, value in one.values.items()}
    for site, units in found.items():
        n_units = sites[site].n_units or 0
        if units[-1] >= n_units:
            raise ConfigError(
                f"neurons.units: neuron {units[-1]} of {one.stream} layer {site.layer} does not exist, "
                f"expected 0 to {n_units - 1}"
            )
    drawn = one.drawn
    if one.like is not None:
        drawn = {
            "random_like": {site.layer: units for site, units in found.items()},
            "seed": one.units["seed"],
            **({} if one.value is None else {"value": one.value}),
            **({} if one.match is None else {"match": one.match}),
        }
        like, found = (
            found,
            {site: _others(site, units, sites, drawn["seed"]) for site, units in found.items()},
        )
        if one.match is not None:
            values = {site: _matched(site, like[site], found[site], values[site], adapter) for site in found}
    n_values = len(set(values.values()))
    told = (
        {site.layer: value for site, value in values.items()} if n_values > 1 else next(iter(values.values()))
    )
    acts = {site: 1.0 if one.how in ("scale", "ablate") else value for site, value in values.items()}
    return replace(
        one,
        units={site.layer: units for site, units in found.items()},
        value=None if one.how == "ablate" else told,
        match=None,
        drawn=drawn,
        norms={
            str(site.layer): {
                "activations": significant(abs(acts[site]) * len(units) ** 0.5),
                "residual": significant(abs(acts[site]) * _length(site, units, adapter)),
            }
            for site, units in found.items()
        },
        reaches_actions=any(sites[site].reaches_actions for site in found),
    )


def warn_of_idle(name: str, firings: Sequence[Firing], adapter: PolicyAdapter) -> None:
    """Say of a condition what in it cannot change an action.

    Args:
        name: of the condition.
        firings: resolved.
        adapter: of the policy.
    """
    sites = adapter.sites()
    for one in firings:
        idle = [site for site in sites_of(one) if not sites[site].reaches_actions]
        if idle:
            logger.warning(
                "%s: %s cannot change an action, because nothing that the actions depend on reads it: "
                "whatever is done there, actions stay bit for bit what they were",
                name,
                " and ".join(map(str, idle)),
            )


def sites_of(one: Firing) -> list[Site]:
    """Return the sites at which a resolved firing acts."""
    stream = STREAMS[STREAMS.index(one.stream)]
    if isinstance(one, SteerResidual):
        return [Site(stream, one.layer, "residual")]  # type: ignore[arg-type]
    return [Site(stream, layer, "neurons") for layer in one.units]  # type: ignore[arg-type]


class _Change(NamedTuple):
    """What one firing does at a site."""

    spec: Firing
    how: str
    value: float  # infinite where float32 cannot hold it, which the end of the inference finds
    units: Tensor | None  # (unit,) integer; None: all, to which the vector is added
    vector: Tensor | None  # (unit,) float32
    steps: frozenset[int] | None  # of the expert; None: the pass over the prefix, which comes once


class Firer:
    """Changes neurons and residuals in every inference that an adapter hands over.

    Args:
        firings: what is done, in this order; resolved.
        policy: sizes of the policy.
        prompts: reads its prompts.
        rows: is called when an inference begins.

    Raises:
        ConfigError: a denoise step does not exist.
    """

    edits: ClassVar[bool] = True

    def __init__(
        self,
        firings: Sequence[Firing],
        policy: PolicyDescription,
        prompts: PromptLabels,
        rows: Callable[[], Rows],
    ):
        self._policy, self._prompts, self._rows = policy, prompts, rows
        self._firings = list(firings)
        self._changes: dict[Site, list[_Change]] = {}
        for one in firings:
            steps = None
            if one.stream == "expert":
                steps = frozenset(resolve_indices("denoise step", one.denoise_steps, policy.n_steps))
            for site in sites_of(one):
                if isinstance(one, SteerResidual):
                    change = _Change(one, "add", _float32(one.value), None, torch.tensor(one.vector), steps)
                else:
                    units = torch.tensor(one.units[site.layer])
                    change = _Change(one, one.how, _float32(one.values[site.layer]), units, None, steps)
                self._changes.setdefault(site, []).append(change)
        self._step = -1

    @property
    def sites(self) -> list[Site]:
        """The sites at which something is changed."""
        return list(self._changes)

    def begin(self, inputs: InferenceInputs) -> None:
        """An inference starts: find out whose values are changed in it."""
        self._step = -1
        self._n_seen = dict.fromkeys(self._changes, 0)
        self._dtypes: dict[Site, torch.dtype] = {}
        self._is_wrong: list[tuple[Site, _Change, Tensor]] = []
        layout, device = inputs.layout, inputs.key_mask.device
        self._tokens: dict[int, Tensor | None] = {}
        keys: Keys | None = None
        for one in self._firings:
            tokens: NDArray[np.bool_] | None = None
            if one.tokens == "actions":
                tokens = np.zeros(inputs.key_mask.shape, np.bool_)
                tokens[:, layout.actions.start : layout.actions.stop] = True
            elif one.tokens != "all":
                if keys is None:
                    rows = self._rows()
                    token_id, mask = inputs.token_id.cpu().numpy(), inputs.key_mask.cpu().numpy()
                    keys = Keys(
                        layout,
                        token_id,
                        mask,
                        self._prompts,
                        episodes=rows.episodes,
                        scenes=rows.scenes,
                        maps={},
                    )
                tokens = keys.chosen(one.tokens)
            if tokens is None:
                self._tokens[id(one)] = None
                continue
            is_vlm = one.stream == "vlm"
            part = tokens[:, : layout.prefix_len] if is_vlm else tokens[:, layout.prefix_len :]
            shows = any("role" in selector for selector in one.tokens if one.tokens != "actions")
            if not part.any() and not shows:
                raise ConfigError(
                    f"{one.kind}.tokens: {words_of(one.tokens)} has no token in the {one.stream} stream, "
                    f"expected some; choose stream: {'expert' if is_vlm else 'vlm'}"
                )
            self._tokens[id(one)] = torch.from_numpy(part).to(device)[:, :, None]

    def camera(self, name: str) -> None:
        """Nothing is changed in the vision tower."""

    def denoise_step(self, flow_time: Tensor | float) -> None:
        """The next Euler step starts."""
        self._step += 1

    def at(self, site: Site, value: Tensor) -> Tensor | None:
        """Return a site's value, (batch, token, unit), with what is changed; None in a step without any."""
        self._n_seen[site] += 1
        self._dtypes[site] = value.dtype
        current = value
        for change in self._changes[site]:
            if change.steps is not None and self._step not in change.steps:
                continue
            current = self._changed(site, current, change)
        return None if current is value else current

    def end(self, action_chunk: Tensor) -> None:
        """The inference is done: refuse it if something in it was not finite.

        Raises:
            ConfigError: a value is too large for the policy's numbers.
            CaptureError: a site never came, so nothing was changed there.
        """
        wrong, self._is_wrong = self._is_wrong, []
        for site, change, flag in wrong:
            if bool(flag):
                value = one.value if isinstance(one := change.spec, SteerResidual) else one.values[site.layer]
                said = f"{change.how} {value:g}"
                raise ConfigError(
                    f"{change.spec.kind}: {said} at {site} gives values that {self._dtypes[site]} cannot "
                    "hold (NaN or infinite), expected a smaller value"
                )
        if not bool(torch.isfinite(action_chunk).all()):
            said = "; ".join(one.said for one in self._firings)
            raise ConfigError(
                f"{self._firings[0].kind}: the policy's actions are not finite with {said:.200}, expected a "
                "smaller value"
            )
        for site, n_seen in self._n_seen.items():
            expected = 1 if site.stream == "vlm" else self._policy.n_steps
            if n_seen != expected:
                raise CaptureError(
                    f"{site} came {n_seen} times in an inference, expected {expected}; the policy's forward "
                    "pass is not the one that its adapter knows"
                )

    def abandon(self) -> None:
        """The policy raised."""
        self._is_wrong = []

    def fail(self, error: Exception) -> None:
        """A site cannot be reached, or an inference's tokens not be told: nothing can be changed there.

        Raises:
            Exception: the error.
        """
        raise error

    refuse = fail

    def _changed(self, site: Site, value: Tensor, change: _Change) -> Tensor:
        tokens = self._tokens[id(change.spec)]
        if change.units is None:
            assert change.vector is not None
            before = value
            after = (value.float() + change.value * change.vector.to(value.device)).to(value.dtype)
        else:
            units = change.units.to(value.device)
            before = value.index_select(-1, units)
            wide = before.float()  # a value that the policy's own numbers cannot hold becomes infinite below
            if change.how == "add":
                wide = wide + change.value
            elif change.how == "scale":
                wide = wide * change.value
            else:
                wide = torch.full_like(wide, change.value)
            after = wide.to(value.dtype)
        if tokens is not None:
            after = torch.where(tokens, after, before)
        self._is_wrong.append((site, change, ~torch.isfinite(after.detach()).all()))
        return after if change.units is None else value.index_copy(-1, units, after)


def _float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _site(one: Firing, layer: int, sites: Mapping[Site, SiteInfo]) -> Site:
    """Return the site that is meant by a layer, negative ones from the end."""
    what = "residual" if isinstance(one, SteerResidual) else "neurons"
    there = [site for site in sites if site.stream == one.stream and site.what == what]
    (number,) = resolve_indices(f"{one.kind}: {one.stream} layer", [layer], len(there))
    return there[number]


def _others(site: Site, units: Sequence[int], sites: Mapping[Site, SiteInfo], seed: int) -> list[int]:
    """Draw as many other neurons of a layer; the same for the same seed, stream and layer."""
    n_units = sites[site].n_units or 0
    if 2 * len(units) > n_units:
        raise ConfigError(
            f"neurons.units.random_like: got {len(units)} of the {n_units} neurons of {site.stream} layer "
            f"{site.layer}, expected at most half, so that as many others are left to draw from"
        )
    draw = np.random.default_rng([seed, STREAMS.index(site.stream), site.layer])
    order = draw.permutation(n_units)
    others: NDArray[np.integer[Any]] = order[~np.isin(order, list(units))][: len(units)]
    return sorted(map(int, others))


def _length(site: Site, units: Sequence[int], adapter: NeuronAdapter) -> float:
    """Return the norm of what neurons write to the residual stream together, each with an activation of 1."""
    total: Any = 0
    for start in range(0, len(units), _AT_ONCE):
        total = total + adapter.value_vectors(site, units[start : start + _AT_ONCE]).sum(0)
    return float(torch.linalg.vector_norm(total))


def _matched(
    site: Site, like: Sequence[int], drawn: Sequence[int], value: float, adapter: NeuronAdapter
) -> float:
    """Return the value with which drawn neurons write as long a vector as those that they are like do."""
    ours, theirs = _length(site, drawn, adapter), _length(site, like, adapter)
    if not ours:
        raise ConfigError(
            f"neurons.match: the neurons drawn in {site.stream} layer {site.layer} write nothing to the "
            "residual stream, expected others; choose another seed"
        )
    return significant(value * theirs / ours)
