"""Elementwise arithmetic of two inputs with numpy broadcasting.

Integers wrap around (two's complement).  Where C leaves a result undefined it is defined here, so that folding at
compile time and the compiled program agree: x / 0 = 0 and x mod 0 = 0.  (The ONNX reader refuses a constant 0.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, ForeignNode, Op, onnx, random_array
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.broadcast import INTEGERS, NUMBERS, _Elementwise
from cnnc.ops.cast import convert
from cnnc.ops.source import Constant, constant
from cnnc.ops.unary import Clip


class _Binary(_Elementwise):
    """y = f(a, b), element by element after broadcasting."""

    takes = NUMBERS
    nonzero: ClassVar[bool] = False
    """Whether the examples keep b away from 0."""
    positive: ClassVar[bool] = False
    """Whether the examples keep a above 0."""

    def infer(self, a: TensorType, b: TensorType) -> TensorType:
        """Broadcast the shapes; both have one dtype."""
        return self._infer(a, b)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        """Give the operators the examples show."""
        return (cls(),)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show every way to broadcast, 0-d, no elements, a run-time batch, blocked layouts, other dtypes."""
        first, *others = cls._variants()
        main = DType.F32 if DType.F32 in cls.takes else min(cls.takes)
        blocked = Layout("NCHW4c")
        batch = Dim.symbol("n", 3)
        pairs = [
            (TensorType((2, 5, 3, 7), main), TensorType((2, 5, 3, 7), main)),
            (TensorType((2, 5, 3, 7), main), TensorType((5, 1, 1), main)),
            (TensorType((4, 1), main), TensorType((2, 1, 3), main)),
            (TensorType((), main), TensorType((3, 2), main)),
            (TensorType((), main), TensorType((), main)),
            (TensorType((0, 3), main), TensorType((1, 3), main)),
            (TensorType((batch, 4), main), TensorType((batch, 1), main)),
            (TensorType((2, 5, 3, 7), main, blocked), TensorType((2, 5, 3, 7), main, blocked)),
            (TensorType((2, 5, 3, 7), main, blocked), TensorType((1, 5, 1, 1), main, blocked)),
            (TensorType((2, 5, 3, 7), main, blocked), TensorType((2, 1, 3, 7), main, blocked)),
            (TensorType((1, 1, 1, 1), main), TensorType((2, 5, 3, 7), main, blocked)),
            (TensorType((2, 5, 3, 7), main, blocked), TensorType((3, 7), main)),
        ]
        dtypes = (DType.F64, DType.F16, DType.I64, DType.I32, DType.I8, DType.U8, DType.BOOL)
        pairs += [(TensorType((3, 5), d), TensorType((5,), d)) for d in dtypes if d in cls.takes and d is not main]
        for pair in pairs:
            yield cls._example(first, pair)
        for op in others:
            for pair in (pairs[1], *pairs[-2:]):
                yield cls._example(op, pair)

    @classmethod
    def _example(cls, op: Op, types: tuple[TensorType, TensorType]) -> Example:
        def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
            a, b = (random_array(rng, type_) for type_ in types)
            if cls.positive:
                a = np.abs(a) + a.dtype.type(0.125)
            if cls.nonzero:
                b = np.where(np.abs(b) < 0.125, b.dtype.type(1), b)
            return (a, b)

        return Example(op, types, draw)


class Add(_Binary):
    """y = a + b."""

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a + b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return a + b


class Sub(_Binary):
    """y = a - b."""

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a - b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return a - b


class Mul(_Binary):
    """y = a * b."""

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a * b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return a * b


class Div(_Binary):
    """y = a / b; integers truncate toward zero as in C, and x / 0 = 0."""

    nonzero = True

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        if not np.issubdtype(a.dtype, np.integer):
            return a / b
        quotient = a // b
        return quotient + ((quotient < 0) & (quotient * b != a) & (b != 0)).astype(a.dtype)

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        if dtype.is_float:
            return a / b
        quotient = te.truncdiv(a, _safe_divisor(te, dtype, b))
        return _for_divisor(te, dtype, b, zero=te.const(0, dtype), minus_one=-a, other=quotient)


@dataclass(frozen=True)
class Mod(_Binary):
    """y = a - b * floor(a / b), which has b's sign; with fmod a - b * trunc(a / b), which has a's.

    Integers mod 0 are 0, floats NaN.
    """

    fmod: bool = False
    nonzero = True

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return np.fmod(a, b) if self.fmod else np.mod(a, b)

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        if dtype.is_float:
            rest = te.fmod(a, b)
            if self.fmod:
                return rest
            other_sign = te.logical_or(te.logical_and(rest < 0, b > 0), te.logical_and(rest > 0, b < 0))
            return te.select(other_sign, rest + b, rest)
        zero = te.const(0, dtype)
        divide = te.truncmod if self.fmod else te.floormod
        return _for_divisor(te, dtype, b, zero=zero, minus_one=zero, other=divide(a, _safe_divisor(te, dtype, b)))

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(fmod=True))


class Pow(_Binary):
    """y = a to the power b, of floats (the ONNX reader takes integers through f64)."""

    takes = frozenset(d for d in DType if d.is_float)
    positive = True

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return np.power(a, b)

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return te.pow(a, b)


class Maximum(_Binary):
    """y = the larger of a and b; NaN if either is."""

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return np.maximum(a, b)

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return te.maximum(a, b)


class Minimum(_Binary):
    """y = the smaller of a and b; NaN if either is."""

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return np.minimum(a, b)

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return te.minimum(a, b)


class PRelu(_Binary):
    """y = x if x >= 0, else slope * x."""

    def _numpy(self, x: np.ndarray, slope: np.ndarray) -> Any:
        return np.where(x < 0, slope * x, x)

    def _expression(self, te: Any, dtype: DType, x: Any, slope: Any) -> Any:
        return te.select(x < 0, slope * x, x)


class BitwiseAnd(_Binary):
    """y = a & b, bit by bit."""

    takes = INTEGERS

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a & b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return a & b


class BitwiseOr(_Binary):
    """y = a | b, bit by bit."""

    takes = INTEGERS

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a | b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return a | b


class BitwiseXor(_Binary):
    """y = a ^ b, bit by bit."""

    takes = INTEGERS

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a ^ b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return a ^ b


@dataclass(frozen=True)
class BitShift(_Binary):
    """y = a << b or a >> b; a right shift repeats the sign.

    A shift by the width of the dtype or more, or by a negative number, leaves 0, or of a negative a shifted right -1.
    """

    direction: str = "left"
    takes = INTEGERS

    def infer(self, a: TensorType, b: TensorType) -> TensorType:
        """Broadcast the shapes."""
        if self.direction not in ("left", "right"):
            raise ShapeError(f'bit_shift: direction is "left" or "right", not {self.direction!r}')
        return self._infer(a, b)

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        beyond = (b < 0) | (b >= 8 * a.itemsize)
        amount = np.where(beyond, 0, b).astype(a.dtype)
        if self.direction == "left":
            return np.where(beyond, 0, np.left_shift(a, amount))
        return np.where(beyond, np.where(a < 0, -1, 0), np.right_shift(a, amount))

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        zero = te.const(0, dtype)
        beyond = te.logical_or(b < zero, b >= te.const(8 * dtype.itemsize, dtype))
        amount = te.select(beyond, zero, b)
        if self.direction == "left":
            return te.select(beyond, zero, a << amount)
        emptied = zero if dtype is DType.U8 else te.select(a < zero, te.const(-1, dtype), zero)
        return te.select(beyond, emptied, a >> amount)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls("left"), cls("right"))


def _safe_divisor(te: Any, dtype: DType, b: Any) -> Any:
    """Replace the divisors the processor traps on, 0 and (for the smallest integer) -1, by 1."""
    one = te.const(1, dtype)
    return _for_divisor(te, dtype, b, zero=one, minus_one=one, other=b)


def _for_divisor(te: Any, dtype: DType, b: Any, *, zero: Any, minus_one: Any, other: Any) -> Any:
    result = te.select(b == te.const(0, dtype), zero, other)
    if dtype is DType.U8:
        return result
    return te.select(b == te.const(-1, dtype), minus_one, result)


# ONNX

_SAME: dict[str, type[Op]] = {op.__name__: op for op in (Add, Sub, Mul, BitwiseAnd, BitwiseOr, BitwiseXor)}
_VARIADIC: dict[str, Callable[[], Op]] = {"Sum": Add, "Mean": Add, "Max": Maximum, "Min": Minimum}


@onnx(*_SAME)
def _same(node: ForeignNode, a: Value, b: Value) -> Value:
    return call(_SAME[node.op_type](), a, b)


@onnx("PRelu")
def _prelu(node: ForeignNode, x: Value, slope: Value) -> Value:
    y = call(PRelu(), x, slope)
    if y.shape != x.shape:
        raise node.invalid(f"the slope {slope.type} does not broadcast to x : {x.type} (only one way is allowed)")
    return y


@onnx("Div")
def _div(node: ForeignNode, a: Value, b: Value) -> Value:
    _refuse_zero_divisor(node, b)
    return call(Div(), a, b)


@onnx("Mod")
def _mod(node: ForeignNode, a: Value, b: Value) -> Value:
    _refuse_zero_divisor(node, b)
    if a.dtype.is_float and not node.attr("fmod", 0) and node.opset < 28:
        raise node.invalid("floats need fmod=1 before opset 28")
    return call(Mod(bool(node.attr("fmod", 0))), a, b)


def _refuse_zero_divisor(node: ForeignNode, b: Value) -> None:
    if b.dtype.is_integer and isinstance(b.op, Constant) and not b.op.value.array.all():
        raise node.invalid("integers are divided by the constant 0")


@onnx("Pow")
def _pow(node: ForeignNode, a: Value, b: Value) -> Value:
    if a.dtype.is_float:
        return call(Pow(), a, convert(b, a.dtype))
    return convert(call(Pow(), convert(a, DType.F64), convert(b, DType.F64)), a.dtype)


@onnx("BitShift")
def _bit_shift(node: ForeignNode, a: Value, b: Value) -> Value:
    return call(BitShift(str(node.attr("direction")).lower()), a, b)


@onnx(*_VARIADIC)
def _variadic(node: ForeignNode, *xs: Value) -> Value:
    op = _VARIADIC[node.op_type]()
    y = reduce(lambda a, b: call(op, a, b), xs)
    if node.op_type == "Mean" and len(xs) > 1:
        return call(Div(), y, constant(np.asarray(len(xs)), y.dtype))
    return y


@onnx("Clip")
def _clip(node: ForeignNode, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    if node.opset < 11:
        largest = float(np.finfo(np.float32).max)
        return call(Clip(float(node.attr("min", -largest)), float(node.attr("max", largest))), x)
    for bound in (low, high):
        if bound is not None and bound.type.elements != 1:
            raise node.invalid(f"a bound of Clip is one number, not {bound.type}")
    constants = [None if bound is None else bound.op for bound in (low, high)]
    numbers = [op.value.array.item() if isinstance(op, Constant) else None for op in constants]
    if [op is None for op in constants] == [number is None for number in numbers]:
        return call(Clip(*numbers), x)
    y = x if low is None else call(Maximum(), x, low)
    return y if high is None else call(Minimum(), y, high)
