"""What becomes of finished sums: the expressions that are stored, functions computed for several vectors at once.

A function such as the logistic one is a chain of twenty dependent instructions.  Written down vector after vector, the
few chains that a processor has in view leave it waiting; so the arguments of some vectors are gathered into one long
vector, which LLVM splits instruction by instruction, and the chains run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx

from cnnc.backends.lower import loops

__all__ = ["finish"]

Place = tuple[int, ...]
Value = Callable[[Place, Any], Any]
"""The expression of one lane of the vector at a place."""

SIDE_BY_SIDE = 4
"""Vectors whose functions are computed at once: their chains fill the time of one, and their numbers the registers."""

_CALL = type(tirx.exp(tirx.const(0.0, "float32")))


def finish(places: Sequence[Place], lanes: int, value: Value, store: Callable[[Place, Any, Any], Any]) -> Any:
    """Write the statements `store(place, lane, value(place, lane))` for all lanes of the vectors at all places."""
    if len(_functions(value(places[0], tirx.Var("lane", "int32")))) != 1:

        def one(place: Place) -> Any:
            return loops.vectorized(lanes, lambda c: store(place, c, value(place, c)))

        return loops.sequence(*(one(place) for place in places))
    groups = [places[start : start + SIDE_BY_SIDE] for start in range(0, len(places), SIDE_BY_SIDE)]
    return loops.sequence(*(_side_by_side(group, lanes, value, store) for group in groups))


def _side_by_side(places: Sequence[Place], lanes: int, value: Value, store: Callable[[Place, Any, Any], Any]) -> Any:
    """Gather the arguments of the one function, apply it to all, and finish with what it gave."""
    results = loops.buffer("results", (len(places) * lanes,), scope="local")
    applied: list[str] = []

    def gather(number: int, place: Place) -> Any:
        def lane(c: Any) -> Any:
            (function,) = _functions(value(place, c))
            applied.append(function.op.name)
            return loops.store(results, function.args[0], number * lanes + c)

        return loops.vectorized(lanes, lane)

    def finish_one(number: int, place: Place) -> Any:
        def lane(c: Any) -> Any:
            result = loops.load(results, number * lanes + c)
            return store(place, c, _replaced(value(place, c), result))

        return loops.vectorized(lanes, lane)

    gathered = [gather(number, place) for number, place in enumerate(places)]
    everything = loops.load(results, 0, lanes=len(places) * lanes)
    call = tirx.call_intrin(everything.ty.dtype, applied[0], everything)
    return loops.sequence(
        loops.alloc(results),
        *gathered,
        loops.store(results, call, 0, lanes=len(places) * lanes),
        *(finish_one(number, place) for number, place in enumerate(places)),
    )


def _is_function(node: Any) -> bool:
    return str(getattr(node.op, "name", "")).startswith("cnnc.") and len(node.args) == 1


def _functions(expression: Any) -> list[Any]:
    """List the calls of vectorised functions in an expression."""
    found = []

    def visit(node: Any) -> Any:
        if _is_function(node):
            found.append(node)
        return node

    tvm_ffi.structural_map(expression, [(_CALL, visit)], order="post")
    return found


def _replaced(expression: Any, result: Any) -> Any:
    """Put a result in the place of the call of a vectorised function."""
    return tvm_ffi.structural_map(
        expression, [(_CALL, lambda node: result if _is_function(node) else node)], order="post"
    )
