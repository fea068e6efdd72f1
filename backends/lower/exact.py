"""Arithmetic and comparisons of floats that TVM may not simplify, as it takes floats for real numbers.

    x - x -> 0    x == x -> true    not x < c -> c <= x    (x + c) - c -> x    x * 0 -> 0    0 / x -> 0    x + 0 -> x

are wrong for NaN, infinities, rounding and -0.0.  So a difference, a comparison and whatever may meet a constant zero
is an operator of its own (`cnnc.float_sub`), which the last lowering step replaces by the plain node.  LLVM keeps
IEEE arithmetic as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tvm import ir, tirx
from tvm_ffi import structural

from cnnc.backends.lower.operators import register_operator

PREFIX = "cnnc.float_"
"""What the names of these operators begin with; each is a single instruction."""

_MAKERS: dict[str, Callable[[Any, Any], Any]] = {
    "add": tirx.Add,
    "sub": tirx.Sub,
    "mul": tirx.Mul,
    "div": tirx.Div,
    "eq": tirx.EQ,
    # TVM's own `!=` is false for NaN.
    "ne": lambda a, b: tirx.Not(tirx.EQ(a, b)),
    "lt": tirx.LT,
    "le": tirx.LE,
    "gt": tirx.GT,
    "ge": tirx.GE,
}
_ALWAYS = frozenset({"sub", "eq", "ne", "lt", "le", "gt", "ge"})
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})


def binary(name: str, a: Any, b: Any) -> Any:
    """Give `a name b` of two expressions of one float type, safe from simplification."""
    if name not in _ALWAYS and not (_may_be_zero(a) or _may_be_zero(b)):
        return _MAKERS[name](a, b)
    _register()
    return tirx.call_intrin("bool" if name in _COMPARISONS else str(a.ty.dtype), PREFIX + name, a, b)


def _may_be_zero(x: Any) -> bool:
    """Tell whether a constant zero stands here, or what comes of indices alone and may turn out to be one."""
    if isinstance(x, tirx.FloatImm):
        return float(x.value) == 0
    data: list[None] = []
    structural.structural_walk(
        x, [(ir.Call, lambda _: data.append(None)), (ir.TensorLoad, lambda _: data.append(None))]
    )
    return not data and not (isinstance(x, tirx.Var) and str(x.ty.dtype).startswith("float"))


@cache
def _register() -> None:
    for name, make in _MAKERS.items():
        register_operator(PREFIX + name, 2, _lowering(make))


def _lowering(make: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    return lambda call: make(*call.args)
