"""A recording's look at the first observation that its policy gets anyway: what it finds goes to the store.

Never in the way: what raises here is a line in the debug log, and the recording goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from lerobot_attn.errors import FAILED, WARNING
from lerobot_attn.plugin.feeding import CHECKS, check_feeding
from lerobot_attn.plugin.feeding.facts import Facts, World
from lerobot_attn.plugin.feeding.gather import FedReader, batch_size, expected_of
from lerobot_attn.policies import unwrap
from lerobot_attn.recording.first_look import Found

logger = logging.getLogger(__name__)


class QuietChecks:
    """Checks first observations, and warns once of each thing that is wrong.

    Args:
        world: returns what shows the observations; None: a loop or a replay, of which nothing else is known.
    """

    def __init__(self, world: Callable[[], World] | None = None):
        self._world = world
        self._told: set[str] = set()

    def look(
        self,
        policy: Any,
        preprocessor: Any,
        postprocessor: Any,
        batch: Any,
        tasks: Sequence[str | None] | None,
        *,
        rows: Sequence[int] | None = None,
        fps: float | None = None,
        state_names: Sequence[str] = (),
    ) -> list[Found] | None:
        """Check observations of a batch; see `InputChecks`.

        Args:
            policy: it is not asked; its config says what it expects.
            preprocessor: the pipeline that returned the batch; it is not called.
            postprocessor: the policy's, likewise; None: nothing is known of it.
            batch: feature → (batch, …), as the policy gets it; it is not changed.
            tasks: the instruction of each observation; None: unknown.
            rows: which observations; None: all of them.
            fps: actions a second, if nothing else is known of what shows the observations.
            state_names: names of the state's dimensions, likewise.

        Returns:
            For each observation what did not pass, as plain values; None: the checks broke.
        """
        try:
            config = unwrap(policy).config
            world = World("the loop", state_names, fps=fps) if self._world is None else self._world()
            expected, reader = (
                expected_of(config, preprocessor, postprocessor),
                FedReader(config, preprocessor),
            )
            found = []
            for row in range(batch_size(batch)) if rows is None else rows:
                task = None if tasks is None else tasks[row]
                fed = reader.read(batch, row, None if task is None else str(task))
                checks = check_feeding(Facts(expected, fed, world))
                found.append([check for check in checks if check.status in (WARNING, FAILED)])
            self._warn(sorted({check.name for checks in found for check in checks}))
            return [
                [{"name": c.name, "status": c.status, "detail": c.detail, "remedy": c.remedy} for c in checks]
                for checks in found
            ]
        except Exception:
            logger.debug("What the policy is fed could not be checked", exc_info=True)
            return None

    def _warn(self, names: Sequence[str]) -> None:
        if set(names) <= self._told:
            return
        self._told.update(names)
        logger.warning(
            "What the policy is fed does not pass %d of %d checks (%s): lerobot-attn inspect EPISODE says "
            "why, and lerobot-attn doctor --policy.path=… more",
            len(names),
            len(CHECKS),
            ", ".join(names),
        )
