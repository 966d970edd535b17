"""Say that a name is deprecated, to whoever used it: the line outside this package."""

from __future__ import annotations

import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent.parent)


def warn_renamed(old: str, new: str) -> None:
    """Warn that `old` is now called `new`; both mean the same."""
    message = f"{old} is deprecated: it is called {new} now"
    warnings.warn(message, DeprecationWarning, stacklevel=2, skip_file_prefixes=(_PACKAGE,))
