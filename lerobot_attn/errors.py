"""The package's exceptions, what a check finds, and the one warning that every door gives.

Each message is one line: what, got, expected, remedy.
"""

from __future__ import annotations

from dataclasses import dataclass

# Said wherever maps of an untrained policy are shown: figures, overlays, tables, the explorer, the recording.
RANDOM_WEIGHTS = "random weights: the maps mean nothing"


class LerobotAttnError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(LerobotAttnError, ValueError):
    """A setting is unknown, malformed or does not fit the policy it is applied to."""


class UnsupportedPolicyError(LerobotAttnError, TypeError):
    """No adapter knows how to observe this policy's attention."""


class CaptureError(LerobotAttnError, RuntimeError):
    """The policy ran, but its attention could not be recorded faithfully."""


class StoreError(LerobotAttnError, OSError):
    """A path is missing, not an episode store, damaged, or written by a newer schema."""


class IncompatibleLeRobotError(LerobotAttnError, RuntimeError):
    """The installed LeRobot lacks, or has changed, something the plugin hooks into."""


class SetupError(LerobotAttnError, RuntimeError):
    """Something around the package (LIBERO's files, a GL backend, an extra) is not in place."""


class SelectionError(LerobotAttnError, LookupError):
    """A frame, layer, head, camera, word … was asked for that the episode does not hold."""


def first_line(error: BaseException) -> str:
    """Return what an error of somebody else's says, in one line; its type's name where it says nothing."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"  # what a check may end with


@dataclass(frozen=True)
class Check:
    """What one check found, of a machine or of an episode.

    Attributes:
        name: what was looked at.
        status: "ok", "warning" (works, with a limit), "failed" (something is wrong or will not work) or
            "skipped" (there was nothing to look at).
        detail: what was found, one line.
        remedy: what to do about it, one line; empty when nothing has to be done or `detail` says it.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""

    def __post_init__(self) -> None:
        """Refuse a status that no report would know.

        Raises:
            ValueError: it is another word.
        """
        expected = (OK, WARNING, FAILED, SKIPPED)
        if self.status not in expected:
            raise ValueError(f"status {self.status!r} is unknown, expected one of {', '.join(expected)}")

    @classmethod
    def of(cls, name: str, passed: bool | None, detail: str) -> Check:
        """Return a check that passed, failed, or was skipped (None)."""
        return cls(name, SKIPPED if passed is None else OK if passed else FAILED, detail)

    @property
    def passed(self) -> bool | None:
        """Whether it did not fail; None if it was skipped."""
        return None if self.status == SKIPPED else self.status != FAILED
