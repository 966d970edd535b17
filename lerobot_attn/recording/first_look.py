"""What a recording says of its policy's input: a look at the first observation of each episode.

Who looks is handed in, so that recording needs none of the checks. Knows no policy and no store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

INPUT_CHECKS = "input_checks"  # a store's attribute: what did not pass when its episode was recorded

Found = list[dict[str, str]]  # of one observation: name, status, detail and remedy of what did not pass


class InputChecks(Protocol):
    """Checks what a policy is fed; `lerobot_attn.plugin.feeding.quiet.QuietChecks.look` is one."""

    def __call__(
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
        """Check observations; never raises, changes nothing.

        Args:
            policy: the policy, which is not asked.
            preprocessor: the pipeline that returned the batch, which is not called.
            postprocessor: the policy's, likewise; None: nothing is known of it.
            batch: feature → (batch, …), as the policy gets it.
            tasks: the instruction of each observation of the batch; None: unknown.
            rows: which observations; None: all of them.
            fps: actions a second, where the policy itself says which action is executed; None: unknown.
            state_names: names of the state's dimensions, or none.

        Returns:
            For each of these observations what did not pass; None: it could not be checked.
        """


def is_pipeline(preprocessor: Any) -> bool:
    """Return whether a preprocessor says of its steps what they do, as LeRobot's pipelines do.

    What a plain function does to its observations nobody can tell, so there is nothing to hold them to.
    """
    return bool(getattr(preprocessor, "steps", ()))
