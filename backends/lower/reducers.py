"""How two partial results combine in the reductions TVM has no exact form of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx


def nan_max(a: Any, b: Any) -> Any:
    """Give the larger of two floats, NaN if either is (TVM's gives the second operand then)."""
    return tirx.Select(tirx.isnan(a), a, tirx.max(a, b))


def nan_min(a: Any, b: Any) -> Any:
    """Give the smaller of two floats, NaN if either is."""
    return tirx.Select(tirx.isnan(a), a, tirx.min(a, b))


def arg_reducer(
    better: Callable[[Any, Any], Any], identity: float, is_float: bool, select_last: bool
) -> Callable[..., Any]:
    """Make a reducer of (position, value): the better value, NaN before all others, the first or last of equals."""
    # The position of "nothing yet" loses against every real one.
    before, nowhere = (tirx.GT, -1) if select_last else (tirx.LT, 2**31 - 1)

    def combine(a: Any, b: Any) -> tuple[Any, Any]:
        tie = tirx.EQ(a[1], b[1])
        wins = better(a[1], b[1])
        if is_float:
            a_nan, b_nan = tirx.isnan(a[1]), tirx.isnan(b[1])
            tie = tirx.any(tie, tirx.all(a_nan, b_nan))
            wins = tirx.any(wins, tirx.all(a_nan, tirx.Not(b_nan)))
        first = tirx.any(wins, tirx.all(tie, before(a[0], b[0])))
        return tirx.Select(first, a[0], b[0]), tirx.Select(first, a[1], b[1])

    def start(index_type: str, value_type: str) -> tuple[Any, Any]:
        return tirx.const(nowhere, index_type), tirx.const(identity, value_type)

    return tirx.comm_reducer(combine, start, name="arg")  # type: ignore[no-any-return]
