"""Rules that recognise an operator in the pieces exporters take it apart into.

The numbers stay the same up to rounding, infinities at most where the pieces overflow and the whole does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Node, Value
from cnnc.ir.rewrite import miss, sole_use
from cnnc.ops.binary import Add, Div, Mul, Pow, Sub
from cnnc.ops.lrn import Lrn
from cnnc.ops.norm import ChannelNorm, LayerNorm
from cnnc.ops.pool import AveragePool
from cnnc.ops.reduce import ReduceMean
from cnnc.ops.reshape import Reshape, Transpose
from cnnc.ops.source import Constant, constant
from cnnc.ops.unary import Clip, Erf, Gelu, HardSigmoid, HardSwish, Sigmoid, Silu, Sqrt, Tanh
from cnnc.passes.constants import array_of, constant_operand, scalar_of


@dataclass(frozen=True)
class Product:
    """A number times values: what a tree of products, and quotients by numbers, multiplies."""

    number: float
    factors: tuple[Value, ...]

    def others(self, *taken: Value) -> tuple[Value, ...] | None:
        """Give the factors without the taken ones, None where one is not there."""
        left = list(self.factors)
        for value in taken:
            if value not in left:
                return None
            left.remove(value)
        return tuple(left)


def product(v: Value, depth: int = 4) -> Product:
    """Read a value as a product."""
    number = scalar_of(v)
    if number is not None and v.type.elements == 1:
        return Product(number, ())
    match v.node:
        case Node(Mul(), (a, b)) if depth:
            left, right = product(a, depth - 1), product(b, depth - 1)
            return Product(left.number * right.number, left.factors + right.factors)
        case Node(Div(), (a, c)) if depth and scalar_of(c):
            left = product(a, depth - 1)
            return Product(left.number / (scalar_of(c) or 1.0), left.factors)
    return Product(1.0, (v,))


def plus_number(v: Value) -> tuple[Value, float] | None:
    """Read a value as x + number."""
    match v.node:
        case Node(Add()):
            operands = constant_operand(v)
            number = scalar_of(operands[1]) if operands else None
            return None if operands is None or number is None else (operands[0], number)
    return None


def near(a: float, b: float) -> bool:
    """Whether two numbers are the same but for their rounding to f32, or to the digits a source prints."""
    return math.isclose(a, b, rel_tol=1e-6)


def silu(v: Value) -> Value | None:
    """x * sigmoid(a * x) -> silu{a}(x)."""
    match v.node:
        case Node(Mul(), (a, b)):
            for x, gate in ((a, b), (b, a)):
                if isinstance(gate.op, Sigmoid):
                    inner = product(gate.inputs[0])
                    if inner.factors == (x,) and x.type == v.type:
                        return call(Silu(inner.number), x)
    return None


def hard_sigmoid(v: Value) -> Value | None:
    """clip(x + 3, 0, 6) / 6 -> hard_sigmoid{1/6, 1/2}(x)."""
    match v.node:
        case Node(Mul() | Div()) if v.dtype.is_float:
            whole = product(v)
            if near(whole.number, 1 / 6) and len(whole.factors) == 1:
                x = _clipped(whole.factors[0])
                return call(HardSigmoid(1 / 6, 0.5), x) if x is not None and x.type == v.type else None
    return None


def hard_swish(v: Value) -> Value | None:
    """x * hard_sigmoid{1/6, 1/2}(x) -> hard_swish(x), and x * clip(x + 3, 0, 6) / 6 likewise."""
    match v.node:
        case Node(Mul() | Div()) if v.dtype.is_float:
            whole = product(v)
            if len(whole.factors) != 2:
                return None
            for gate, x in (whole.factors, whole.factors[::-1]):
                if x.type == v.type and _is_hard_gate(gate, x, whole.number):
                    return call(HardSwish(), x)
    return None


def _is_hard_gate(gate: Value, x: Value, number: float) -> bool:
    match gate.node:
        case Node(HardSigmoid(alpha, beta), (inner,)):
            return inner == x and near(number, 1) and near(alpha, 1 / 6) and near(beta, 0.5)
    return near(number, 1 / 6) and _clipped(gate) == x


def _clipped(v: Value) -> Value | None:
    """Give x of clip(x + 3, 0, 6)."""
    match v.node:
        case Node(Clip(0, 6), (inner,)):
            shifted = plus_number(inner)
            return shifted[0] if shifted and shifted[1] == 3 else None
    return None


def gelu(v: Value) -> Value | None:
    """x/2 * (1 + erf(x / sqrt 2)) -> gelu(x).

    With tanh(sqrt(2/pi) * (x + 0.044715 * x^3)) in place of erf it is the approximate one.
    """
    match v.node:
        case Node(Mul() | Div()) if v.dtype.is_float:
            whole = product(v)
            if not near(whole.number, 0.5) or len(whole.factors) != 2:
                return None
            for x, gate in (whole.factors, whole.factors[::-1]):
                approximate = _gelu_gate(gate, x)
                if approximate and x.type == v.type:
                    return call(Gelu(approximate), x)
    return None


def _gelu_gate(gate: Value, x: Value) -> str | None:
    shifted = plus_number(gate)
    if shifted is None or shifted[1] != 1:
        return None
    match shifted[0].node:
        case Node(Erf(), (inner,)):
            argument = product(inner)
            return "none" if argument.factors == (x,) and near(argument.number, math.sqrt(0.5)) else None
        case Node(Tanh(), (inner,)):
            argument = product(inner)
            fits = len(argument.factors) == 1 and near(argument.number, math.sqrt(2 / math.pi))
            return "tanh" if fits and _is_cubic(argument.factors[0], x) else None
    return None


def _is_cubic(v: Value, x: Value) -> bool:
    """Whether a value is x + 0.044715 * x^3."""
    match v.node:
        case Node(Add(), (a, b)):
            for line, cube in ((a, b), (b, a)):
                term = product(cube)
                if line == x and near(term.number, 0.044715) and term.factors == (x, x, x):
                    return True
    return False


def layer_norm(v: Value) -> Value | None:
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) -> layer_norm{epsilon}(x), over trailing axes."""
    match v.node:
        case Node(Div(), (Value(Node(Sub(), (x, mean))) as centred, Value(Node(Sqrt(), (inner,))))):
            shifted = plus_number(inner)
            axes = _mean_axes(mean, x)
            if shifted is None or axes is None or not x.type.is_static:
                return None
            match shifted[0].node:
                case Node(ReduceMean(over, True), (Value(Node(Mul(), (a, b))),)) if over == axes and a == b == centred:
                    if axes != tuple(range(axes[0], x.type.rank)):
                        miss("the axes normalised are not the last ones")
                        return None
                    ones = constant(np.ones(x.type.static_shape[axes[0] :], x.dtype.numpy))
                    return call(LayerNorm(axes[0], shifted[1]), x, ones)
    return None


def _mean_axes(mean: Value, x: Value) -> tuple[int, ...] | None:
    match mean.node:
        case Node(ReduceMean(axes, True), (inner,)) if inner == x and axes:
            return tuple(axes)
    return None


def layer_norm_scale(v: Value) -> Value | None:
    """layer_norm(x, 1) * gamma -> layer_norm(x, gamma)."""
    match v.node:
        case Node(Mul()):
            operands = constant_operand(v)
            if operands is None:
                return None
            match operands[0].node:
                case Node(LayerNorm() as norm, (x, ones)) if scalar_of(ones) == 1 and operands[0].type == v.type:
                    gamma = _trailing(operands[1], ones)
                    return None if gamma is None else call(norm, x, gamma)
    return None


def layer_norm_shift(v: Value) -> Value | None:
    """layer_norm(x, gamma) + beta -> layer_norm(x, gamma, beta)."""
    match v.node:
        case Node(Add()):
            operands = constant_operand(v)
            if operands is None:
                return None
            match operands[0].node:
                case Node(LayerNorm() as norm, (x, gamma)) if operands[0].type == v.type:
                    beta = _trailing(operands[1], gamma)
                    return None if beta is None else call(norm, x, gamma, beta)
    return None


def channel_norm(v: Value) -> Value | None:
    """transpose(layer_norm(transpose(x))) -> channel_norm(x), where channels are last in between and first around."""
    match v.node:
        case Node(Transpose(back), (Value(Node(LayerNorm(axis, epsilon), (y, gamma, *beta))),)):
            rank = y.type.rank
            moves = isinstance(y.op, Transpose) and y.op.perm == (0, *range(2, rank), 1)
            if not moves or back != (0, rank - 1, *range(1, rank - 1)) or axis % rank != rank - 1:
                return None
            if not sole_use(v.inputs[0]):
                miss("the layer norm is read elsewhere, too")
                return None
            zeros = constant(np.zeros(gamma.type.static_shape, gamma.dtype.numpy))
            return call(ChannelNorm(epsilon), y.inputs[0], gamma, *(beta or (zeros,)))
    return None


def _trailing(c: Value, like: Value) -> Value | None:
    """Give a constant that broadcasts over the normalised axes only, in just their shape."""
    array = array_of(c)
    shape = like.type.static_shape
    if array is None or not isinstance(c.op, Constant):
        return None
    while array.ndim > len(shape) and array.shape[0] == 1:
        array = array[0]
    if array.ndim > len(shape):
        return None
    return c if array.shape == shape == c.shape else constant(np.broadcast_to(array, shape).copy(), label=c.op.label)


def lrn(v: Value) -> Value | None:
    """x / (bias + alpha * average_pool(x * x over channels)) ^ beta -> lrn(x), as PyTorch exports it.

    The average pool slides over channels as if they were rows, so it stands between two reshapes.
    """
    match v.node:
        case Node(Div(), (x, Value(Node(Pow(), (scaled, c))))) if x.type.rank >= 3 and scalar_of(c) is not None:
            shifted = plus_number(scaled)
            if shifted is None:
                return None
            mean = product(shifted[0])
            size = _channel_window(mean.factors[0], x) if len(mean.factors) == 1 else None
            if size is None:
                return None
            return call(Lrn(size, mean.number, float(scalar_of(c) or 0.0), shifted[1]), x)
    return None


def _channel_window(v: Value, x: Value) -> int | None:
    """Give how many channels a mean of squares slides over."""
    match v.node:
        case Node(Reshape(), (Value(Node(AveragePool() as pool, (Value(Node(Reshape(), (square,))) as rows,))),)):
            squares = isinstance(square.op, Mul) and square.inputs == (x, x)
            if not squares or v.shape != x.shape or rows.shape[:3] != (x.shape[0], 1, x.shape[1]):
                return None
            size = pool.kernel[0]
            rank = len(pool.kernel)
            slides = set(pool.kernel[1:]) <= {1} and {*pool.stride, *pool.dilation} == {1}
            around = pool.pad[0] == pool.pad[rank] == size // 2 and sum(pool.pad) == 2 * (size // 2)
            counts = pool.count_include_pad or size == 1
            if not (slides and around and counts and size % 2):
                miss("the average pool is no window of channels around each one")
                return None
            return size
    return None


PATTERNS = (
    silu,
    hard_sigmoid,
    hard_swish,
    gelu,
    layer_norm,
    layer_norm_scale,
    layer_norm_shift,
    channel_norm,
    lrn,
)
