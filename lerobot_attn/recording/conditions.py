"""What recordings say of the condition that their policy is in, and who acts on it in a loop or a replay.

Knows conditions and what stores may hold of them. How one acts is for `lerobot_attn.interventions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lerobot_attn.errors import ConfigError
from lerobot_attn.interventions import Condition, Intervener, Intervention, intervene
from lerobot_attn.interventions.session import interveners_of
from lerobot_attn.prompt import Tokenizer
from lerobot_attn.store.trust import MAX_INTERVENTIONS, MAX_NAME, MAX_TEXT

Interventions = Condition | Intervention | Sequence[Intervention] | Intervener


def said_of(condition: Condition | None) -> dict[str, Any]:
    """Return what every store says of the condition that its policy was in, and of its experiment.

    Args:
        condition: what was done to the policy; None: nothing, of which nothing is said.

    Raises:
        ConfigError: more than a reader would take.
    """
    if condition is None:
        return {}
    if len(condition.name) > MAX_NAME or len(condition.interventions) > MAX_INTERVENTIONS:
        raise ConfigError(
            f"interventions: got {len(condition.interventions)} under a name of {len(condition.name)} "
            f"characters, expected at most {MAX_INTERVENTIONS} and {MAX_NAME}"
        )
    said = condition.to_dict()
    experiment = said.pop("experiment", None)
    text = condition.text if len(condition.text) <= MAX_TEXT else f"{condition.text[: MAX_TEXT - 1]}…"
    found: dict[str, Any] = {"condition": {"name": said["name"], "text": text, **said}}
    return found if experiment is None else {**found, "experiment": experiment}


def refuse_masks(condition: Condition, whose: str) -> None:
    """Refuse a condition that speaks of objects where nobody can say what the pixels show.

    Raises:
        ConfigError: it does.
    """
    if condition.needs_masks:
        raise ConfigError(
            f"condition {condition.name}: needs masks (role: …), and {whose} has none; expected cameras, "
            "boxes, patches or words, or an evaluation in a simulator that renders masks (LIBERO)"
        )


@contextmanager
def acting_on(
    policy: Any,
    interventions: Interventions | None,
    whose: str,
    *,
    tokenizer: Tokenizer | None,
    preprocessor: Any,
) -> Iterator[Intervener | None]:
    """Act on a policy while it is recorded; None where nothing is to be done.

    Args:
        policy: a LeRobot policy.
        interventions: what to do, or what `intervene` yielded: that acts already. None: what acts already,
            if something does.
        whose: what runs the policy and has no masks, for messages.
        tokenizer: see `intervene`.
        preprocessor: likewise.

    Raises:
        UnsupportedPolicyError: no adapter knows the policy.
        ConfigError: something that cannot be done with this policy.
    """
    already = interveners_of(policy)
    if interventions is None and already:
        interventions = already[-1]
    if len(already) > 1 or (already and interventions is not already[-1]):
        names = ", ".join(one.condition.name for one in already)
        raise ConfigError(
            f"interventions: {names} already acts on the policy, expected one condition, for a store says "
            "one; give intervene() all interventions in one list, and the recording none"
        )
    if interventions is None or isinstance(interventions, Intervener):
        yield interventions
        return
    refuse_masks(Condition.of(interventions), whose)
    with intervene(policy, interventions, tokenizer=tokenizer, preprocessor=preprocessor) as acting:
        yield acting
