"""The package's exceptions, and the one warning that every door gives.

Each message is one line: what, got, expected, remedy.
"""

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
