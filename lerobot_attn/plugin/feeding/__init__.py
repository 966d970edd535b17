"""Is what a policy is fed what it was trained on?

    checks = check_feeding(Facts(expected, fed, world, recorded))

The checks are pure: plain facts in, one `Check` each out. `gather` finds the facts, `command` is
`lerobot-attn doctor --policy.path=…`, `quiet` looks at the first observation of a recording.
"""

from __future__ import annotations

from collections.abc import Callable

from lerobot_attn.errors import Check
from lerobot_attn.plugin.feeding import numbers, pictures, settings
from lerobot_attn.plugin.feeding.facts import Expected, Facts, Fed, Recorded, World

__all__ = ["CHECKS", "Expected", "Facts", "Fed", "Recorded", "World", "check_feeding"]

CHECKS: dict[str, Callable[[str, Facts], Check]] = {
    "normalisation": numbers.check_statistics,
    "cameras": pictures.check_cameras,
    "pictures": pictures.check_pictures,
    "orientation": pictures.check_orientation,
    "state size": numbers.check_state_size,
    "names": settings.check_names,
    "state range": numbers.check_state_range,
    "state digits": numbers.check_digits,
    "action range": numbers.check_action_range,
    "prompt": settings.check_prompt,
    "chunk": settings.check_chunk,
    "control": settings.check_control,
    "precision": settings.check_precision,
}


def check_feeding(facts: Facts) -> list[Check]:
    """Run every check, in the order in which problems should be solved.

    Returns:
        One `Check` each; "skipped" where there was nothing to look at.
    """
    return [check(name, facts) for name, check in CHECKS.items()]
