"""Hypothesis draws networks: images through operators of every kind, joined and branched, constants of any shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ops import (
    Add,
    AveragePool,
    BatchNorm,
    Clip,
    Concat,
    Conv,
    ConvTranspose,
    Dense,
    Div,
    Lrn,
    MatMul,
    Maximum,
    MaxPool,
    Mul,
    Neg,
    Pad,
    Pow,
    ReduceMax,
    ReduceMean,
    Relu,
    Reshape,
    Sigmoid,
    Slice,
    Softmax,
    Split,
    Sub,
    Tanh,
    Transpose,
    constant,
    graph_input,
)

Step = Callable[[st.DrawFn, np.random.Generator, list[Value]], Value]

UNARY = (Relu(), Sigmoid(), Tanh(), Neg(), Clip(0.0, 6.0), Clip(-1.0, 1.0), Softmax(1), Lrn(3))
BINARY = (Add(), Sub(), Mul(), Maximum())


@st.composite
def networks(draw: st.DrawFn, largest: int = 12) -> Graph:
    """Draw a valid network of a few operators; every value it makes may be used again or be an output."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.integers(1, 7))
    shape = (draw(st.integers(1, 2)), draw(st.sampled_from((1, 3, 8, 12, 16))), size, draw(st.integers(1, 7)))
    values = [graph_input("x", shape)]
    inputs = tuple(values)
    ends = []
    for _ in range(draw(st.integers(1, largest))):
        step = draw(st.sampled_from(STEPS))
        try:
            value = step(draw, rng, values)
        except ShapeError:
            continue
        # What has no second axis left is of no use to most steps.
        (values if value.type.rank > 1 else ends).append(value)
    count = draw(st.integers(1, 3))
    outputs = tuple(draw(st.sampled_from([*values, *ends])) for _ in range(count))
    return Graph("random", inputs, (*outputs, values[-1]))


def _pick(draw: st.DrawFn, values: list[Value]) -> Value:
    """Prefer late values, so that networks get deep."""
    return values[-1 - draw(st.integers(0, min(len(values) - 1, 3)))]


def _numbers(rng: np.random.Generator, *shape: int) -> Value:
    return constant((rng.random(shape) * 2 - 1).astype(np.float32))


def _unary(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    return call(draw(st.sampled_from(UNARY)), _pick(draw, values))


def _binary(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    return call(draw(st.sampled_from(BINARY)), _pick(draw, values), _pick(draw, values))


def _gate(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    x = _pick(draw, values)
    return call(Mul(), x, call(Sigmoid(), x))


def _with_constant(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    x = _pick(draw, values)
    rank = draw(st.integers(0, x.type.rank))
    shape = [draw(st.sampled_from((1, s))) for s in x.type.static_shape[x.type.rank - rank :]]
    c = draw(st.sampled_from((_numbers(rng, *shape), constant(1.0), constant(0.0), constant(2.0))))
    op = draw(st.sampled_from((*BINARY, Div())))
    if isinstance(op, Div):
        return call(op, x, constant(draw(st.sampled_from((1.0, 2.0, 3.0)))))
    return call(op, x, c) if draw(st.booleans()) else call(op, c, x)


def _power(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    return call(Pow(), call(Sigmoid(), _pick(draw, values)), constant(draw(st.sampled_from((1.0, 2.0, 3.0, 0.5)))))


def _conv(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    x = _pick(draw, values)
    if x.type.rank < 3:
        raise ShapeError("a convolution needs an axis to slide along")
    rank = x.type.rank - 2
    channels = x.type.static_shape[1]
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 4, channels) if channels % g == 0]))
    outputs = groups * draw(st.sampled_from((1, 2, 3, 8)))
    kernel, stride = ([draw(st.integers(1, 3)) for _ in range(rank)] for _ in range(2))
    pad = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    w = _numbers(rng, outputs, channels // groups, *kernel)
    bias = (_numbers(rng, outputs),) if draw(st.booleans()) else ()
    return call(Conv(tuple(stride), tuple(pad), (1,) * rank, groups), x, w, *bias)


def _conv_transpose(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    x = _pick(draw, values)
    if x.type.rank < 3:
        raise ShapeError("a convolution needs an axis to slide along")
    rank = x.type.rank - 2
    w = _numbers(rng, x.type.static_shape[1], draw(st.sampled_from((1, 3, 8))), *[2] * rank)
    return call(ConvTranspose((2,) * rank, (0,) * (2 * rank), (1,) * rank), x, w)


def _batch_norm(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    x = _pick(draw, values)
    channels = x.type.static_shape[1] if x.type.rank > 1 else 1
    var = constant(rng.uniform(0.3, 2, channels).astype(np.float32))
    return call(BatchNorm(), x, *(_numbers(rng, channels) for _ in range(3)), var)


def _pool(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    x = _pick(draw, values)
    rank = x.type.rank - 2
    kernel, stride = (tuple(draw(st.integers(1, 3)) for _ in range(rank)) for _ in range(2))
    pad = tuple(draw(st.integers(0, 1)) for _ in range(2 * rank))
    if draw(st.booleans()):
        return call(AveragePool(kernel, stride, pad, (1,) * rank, count_include_pad=draw(st.booleans())), x)
    return call(MaxPool(kernel, stride, pad, (1,) * rank, ceil_mode=draw(st.booleans())), x)


def _reduce(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    x = _pick(draw, values)
    axes = tuple(range(2, x.type.rank)) if draw(st.booleans()) else (draw(st.integers(0, max(x.type.rank - 1, 0))),)
    return call(draw(st.sampled_from((ReduceMean, ReduceMax)))(axes, draw(st.booleans())), x)


def _pad(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    x = _pick(draw, values)
    outer = min(x.type.rank, 2)
    ends = [0] * outer + [draw(st.integers(0, 2)) for _ in range(x.type.rank - outer)]
    return call(Pad((*ends, *ends), value=draw(st.sampled_from((0.0, 0.0, 1.5)))), x)


def _move(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    x = _pick(draw, values)
    shape = x.type.static_shape
    kind = draw(st.sampled_from(("transpose", "flatten", "slice", "split", "same")))
    if kind == "transpose":
        return call(Transpose(tuple(draw(st.permutations(range(len(shape)))))), x)
    if kind == "flatten":
        return call(Reshape((shape[0], int(np.prod(shape[1:])))), x)
    if kind == "slice":
        starts = tuple(draw(st.integers(0, s - 1)) for s in shape)
        sizes = tuple(draw(st.integers(1, s - start)) for s, start in zip(shape, starts, strict=True))
        return call(Slice(starts, sizes, (1,) * len(shape)), x)
    if kind == "split" and len(shape) > 1 and shape[1] > 1:
        first = draw(st.integers(1, shape[1] - 1))
        parts = call(Split(1, (first, shape[1] - first)), x).node.values
        values.append(parts[0])
        return parts[1]
    return call(Reshape(shape), x)


def _concat(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    parts = [_pick(draw, values) for _ in range(draw(st.integers(1, 3)))]
    return call(Concat(draw(st.integers(0, 1))), *parts)


def _dense(draw: st.DrawFn, rng: np.random.Generator, values: list[Value]) -> Value:
    x = _pick(draw, values)
    features = x.type.static_shape[-1]
    if draw(st.booleans()):
        return call(MatMul(), x, _numbers(rng, features, 5))
    return call(Dense(), x, _numbers(rng, 6, features))


STEPS: tuple[Step, ...] = (
    _unary, _unary, _binary, _gate, _with_constant, _with_constant, _power, _conv, _conv, _conv, _conv_transpose,
    _batch_norm, _batch_norm, _pool, _reduce, _pad, _move, _move, _concat, _dense,
)  # fmt: skip
