"""Values of a store as JSON has them: text, finite numbers, null for all else.

Knows no episode and no request.
"""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import NDArray


def plain(value: Any) -> str | int | float | None:
    """Return an attribute as a JSON value: text, a number or a truth value; None for all else, NaN too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int) else None


def number(value: float) -> float | None:
    """Return a number with six significant digits; None where JSON knows none."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def numbers(values: NDArray[Any]) -> list[Any]:
    """Return an array as nested lists, each number as `number` has it."""
    if values.ndim > 1:
        return [numbers(row) for row in values]
    return [number(value) for value in values.tolist()]
