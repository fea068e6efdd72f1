"""Makes every buffer one-dimensional, as TVM's pass does, but for a mistake of it.

    x[(39 - i) % 40 // 8, (7 - i) % 8]  ->  x_flat[(39 - i) % 40 // 8 * 8 + (7 - i) % 8]

TVM puts quotient and remainder together again where it can, and forgets or mixes up what is added to i: it would read
x_flat[(-i) % 40] here.  So dividends that are shifted or count down are hidden from it; the simplifier, which comes
later, gets them right.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from cnnc.backends.lower.operators import register_operator

_HIDDEN = "cnnc.hidden_index"
_CALL = type(tirx.exp(tirx.const(0.0, "float32")))


def flatten_buffers(mod: Any) -> Any:
    """Give the module with flat buffers only."""
    _register()
    hidden = _each_body(mod, [(tirx.FloorDiv, _hide), (tirx.FloorMod, _hide)])
    return _each_body(tirx.transform.FlattenBuffer()(hidden), [(_CALL, _reveal)])


@cache
def _register() -> None:
    register_operator(_HIDDEN, 1, lambda call: call.args[0])


def _each_body(mod: Any, rules: list[Any]) -> Any:
    functions = {
        var: func.with_body(tvm_ffi.structural_map(func.body, rules, order="post"))
        for var, func in mod.functions.items()
    }
    return tvm.IRModule(functions)


def _hide(division: Any) -> Any:
    dividend = division.a
    if not _is_shifted(dividend):
        return division
    return type(division)(tirx.call_intrin(str(dividend.ty.dtype), _HIDDEN, dividend), division.b)


def _reveal(call: Any) -> Any:
    return call.args[0] if call.op.name == _HIDDEN else call


def _is_shifted(expression: Any) -> bool:
    """Tell whether a number is added to variables, or one of them counts down."""
    found: list[None] = []

    def mark(_: Any) -> None:
        found.append(None)

    def total(node: Any) -> None:
        if isinstance(node.a, tirx.IntImm) or isinstance(node.b, tirx.IntImm):
            found.append(None)

    def product(node: Any) -> None:
        if any(isinstance(factor, tirx.IntImm) and int(factor.value) < 0 for factor in (node.a, node.b)):
            found.append(None)

    tvm_ffi.structural_walk(expression, [(tirx.Sub, mark), (tirx.Add, total), (tirx.Mul, product)])
    return bool(found)
