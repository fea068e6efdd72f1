"""Turns `let` expressions into temporaries of their own, as the last step before code generation.

    y[i] = (let t = f(x[i]) in t / (t + 1))  ->  v[0:8] = f(x[i]);  y[i] = v[0:8] / (v[0:8] + 1)

TVM's code generator substitutes the value of each `let` wherever it simplifies an expression, which takes time
exponential in how deep they nest (two sigmoids in a row: half a minute).  It looks into no buffer; LLVM keeps
these in registers.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx

_CALL = type(tirx.exp(tirx.const(0.0, "float32")))


def bind_lets(func: Any) -> Any:
    """Give the function with the `let`s of every store bound to temporaries."""
    return func.with_body(tvm_ffi.structural_map(func.body, [(tirx.BufferStore, _bind_store)], order="post"))


def _bind_store(store: Any) -> Any:
    before: list[Any] = []
    value = _Binder(before).bind(store.value)
    if not before:
        return store
    return tirx.SeqStmt([*before, tirx.BufferStore(store.buffer, value, list(store.indices))])


class _Binder:
    """Moves the `let`s of one expression before it, outermost first, so that each sees those it reads."""

    def __init__(self, before: list[Any]) -> None:
        self.before = before
        self.reads: dict[Any, Any] = {}
        self.guarded: set[Any] = set()

    def bind(self, expression: Any) -> Any:
        """Give the expression without `let`s, but for those behind a guard, which must not run outside of it."""
        rules = [(tirx.Let, self._open), (tirx.Var, lambda var: self.reads.get(var, var)), (_CALL, self._guard)]
        return tvm_ffi.structural_map(self._open(expression), rules, order="pre")

    def _open(self, expression: Any) -> Any:
        while isinstance(expression, tirx.Let) and expression.var not in self.guarded:
            value = self.bind(expression.value)
            lanes = _lanes(value)
            temporary = tirx.decl_buffer((lanes,), _element(value), "v", scope="local")
            start, step = tirx.const(0, "int32"), tirx.const(1, "int32")
            at = [tirx.Ramp(start, step, lanes) if lanes > 1 else start]
            self.before += [tirx.AllocBuffer(temporary), tirx.BufferStore(temporary, value, at)]
            self.reads[expression.var] = tirx.BufferLoad(temporary, at)
            expression = expression.body
        return self.reads.get(expression, expression) if isinstance(expression, tirx.Var) else expression

    def _guard(self, call: Any) -> Any:
        if call.op.name == "tirx.if_then_else":
            tvm_ffi.structural_walk(call, [(tirx.Let, lambda let: self.guarded.add(let.var))])
        return call


def _type(value: Any) -> str:
    return str(value.ty.dtype)


def _lanes(value: Any) -> int:
    _, _, lanes = _type(value).partition("x")
    return int(lanes or 1)


def _element(value: Any) -> str:
    return _type(value).partition("x")[0]
