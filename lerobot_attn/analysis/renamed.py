"""Say that a name is deprecated, to whoever used it: the line outside this package."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path

_PACKAGE = str(Path(__file__).parent.parent)


def warn_renamed(old: str, new: str) -> None:
    """Warn that `old` is now called `new`; both mean the same."""
    message = f"{old} is deprecated: it is called {new} now"
    warnings.warn(message, DeprecationWarning, stacklevel=2, skip_file_prefixes=(_PACKAGE,))


def argument_renamed[**P, R](old: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take its argument `new` by its former name too, which warns."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if old in kwargs:
                warn_renamed(f"{old}=", f"{new}=")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return run

    return decorate
