"""Rules of algebra: what adds nothing, what undoes itself, what has a cheaper name.

The sign of a zero is the only thing a rule here may change.
"""

from __future__ import annotations

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Node, Value
from cnnc.ir.literal import Literal
from cnnc.ir.op import Op
from cnnc.ops.binary import Add, Div, Maximum, Minimum, Mul, Pow, Sub
from cnnc.ops.cast import Cast
from cnnc.ops.dense import Dense, MatMul
from cnnc.ops.pool import AveragePool, MaxPool
from cnnc.ops.reduce import ReduceMax, ReduceMean
from cnnc.ops.source import Constant
from cnnc.ops.unary import Clip, Neg, Not, Relu
from cnnc.passes.constants import constant_operand, scalar_of


def same(v: Value, x: Value) -> Value | None:
    """Give x in place of v where their types are the same."""
    return x if x.type == v.type else None


def add_nothing(v: Value) -> Value | None:
    """x + 0 -> x, x - 0 -> x."""
    match v.node:
        case Node(Add()):
            operands = constant_operand(v)
            return same(v, operands[0]) if operands and scalar_of(operands[1]) == 0 else None
        case Node(Sub(), (x, c)) if scalar_of(c) == 0:
            return same(v, x)
    return None


def multiply_by_one(v: Value) -> Value | None:
    """x * 1 -> x, x / 1 -> x, x ^ 1 -> x."""
    match v.node:
        case Node(Mul()):
            operands = constant_operand(v)
            return same(v, operands[0]) if operands and scalar_of(operands[1]) == 1 else None
        case Node(Div() | Pow(), (x, c)) if scalar_of(c) == 1:
            return same(v, x)
    return None


def twice_is_never(v: Value) -> Value | None:
    """-(-x) -> x, not not x -> x."""
    match v.node:
        case Node(Neg(), (Value(Node(Neg(), (x,))),)) | Node(Not(), (Value(Node(Not(), (x,))),)):
            return x
    return None


def small_power(v: Value) -> Value | None:
    """x ^ 2 -> x * x, x ^ 3 -> x * x * x."""
    match v.node:
        case Node(Pow(), (x, c)) if scalar_of(c) in (2, 3) and x.type == v.type:
            square = call(Mul(), x, x)
            return square if scalar_of(c) == 2 else call(Mul(), square, x)
    return None


def cast_to_the_same(v: Value) -> Value | None:
    """cast(x) -> x where x has that dtype."""
    match v.node:
        case Node(Cast(), (x,)):
            return same(v, x)
    return None


def bound_by_number(v: Value) -> Value | None:
    """max(x, c) -> clip(x, c, _), min(x, c) -> clip(x, _, c)."""
    match v.node:
        case Node(Maximum() | Minimum() as op):
            operands = constant_operand(v)
            c = scalar_of(operands[1]) if operands else None
            if operands is None or c is None or operands[0].type != v.type:
                return None
            try:
                return call(Clip(low=c) if isinstance(op, Maximum) else Clip(high=c), operands[0])
            except ShapeError:
                return None
    return None


def clip_below_zero(v: Value) -> Value | None:
    """clip(x, 0, _) -> relu(x), clip(x, _, _) -> x."""
    match v.node:
        case Node(Clip(None, None), (x,)):
            return x
        case Node(Clip(low, None), (x,)) if low == 0:
            try:
                return call(Relu(), x)
            except ShapeError:
                return None
    return None


def clip_twice(v: Value) -> Value | None:
    """clip(clip(x, a, b), c, d) -> clip(x, clip(a, c, d), clip(b, c, d)) where a <= b, c <= d; a relu is clip(0, _)."""
    match v.node:
        case Node(Clip() | Relu() as outer, (Value(Node(Clip() | Relu() as inner, (x,))),)):
            a, b = _bounds(inner)
            c, d = _bounds(outer)
            if not (a <= b and c <= d):
                return None
            low, high = min(max(a, c), d), min(max(b, c), d)
            op = Clip(None if low == -np.inf else low, None if high == np.inf else high)
            if isinstance(outer, Relu) and isinstance(inner, Relu):
                return v.inputs[0]
            return call(op, x)
    return None


def _bounds(op: Op) -> tuple[float, float]:
    if not isinstance(op, Clip):
        return 0.0, np.inf
    return -np.inf if op.low is None else op.low, np.inf if op.high is None else op.high


def matmul_by_weight(v: Value) -> Value | None:
    """matmul(x, w) -> dense(x, transpose(w)) where w is a constant matrix."""
    match v.node:
        case Node(MatMul(transpose_a=False) as matmul, (x, Value(Node(Constant() as c)) as w)):
            if not v.dtype.is_float or w.type.rank != 2 or w.type.layout is not None:
                return None
            rows = c.value.array if matmul.transpose_b else c.value.array.T
            return call(Dense(), x, call(Constant(Literal(np.ascontiguousarray(rows)), c.label)))
    return None


def pool_the_whole_image(v: Value) -> Value | None:
    """average_pool(x, kernel = image) -> reduce_mean(x), max_pool likewise."""
    match v.node:
        case Node(AveragePool() | MaxPool() as pool, (x,)) if len(v.node.types) == 1:
            whole = pool.kernel == tuple(x.shape[2:]) and set(v.shape[2:]) == {1}
            if not whole or any(pool.pad) or set(pool.dilation) != {1}:
                return None
            axes = tuple(range(2, x.type.rank))
            return call(ReduceMean(axes) if isinstance(pool, AveragePool) else ReduceMax(axes), x)
    return None


ALGEBRA = (
    add_nothing,
    multiply_by_one,
    twice_is_never,
    small_power,
    cast_to_the_same,
    bound_by_number,
    clip_below_zero,
    clip_twice,
    matmul_by_weight,
    pool_the_whole_image,
)
