"""Sums and maxima over the lanes of a vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["lane_max", "lane_sum"]


def lane_sum(vector: Any, lanes: int) -> Any:
    """Add up the lanes of a vector, halves first."""
    return _halved(vector, lanes, lambda low, high: low + high)


def lane_max(vector: Any, lanes: int) -> Any:
    """Give the largest of the lanes of a vector that holds no NaN."""
    from tvm import tirx

    return _halved(vector, lanes, tirx.max)


def _halved(vector: Any, lanes: int, join: Callable[[Any, Any], Any]) -> Any:
    from tvm import tirx

    while lanes > 1:
        lanes //= 2
        low, high = ([tirx.const(first + i, "int32") for i in range(lanes)] for first in (0, lanes))
        vector = join(tirx.Shuffle([vector], low), tirx.Shuffle([vector], high))
    return vector
