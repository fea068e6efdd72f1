"""Elementwise operators of one input: activations and elementary functions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, ForeignNode, Op, onnx
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.broadcast import BOOLS, INTEGERS, NUMBERS, SIGNED, _Elementwise


class _Unary(_Elementwise):
    """y = f(x), element by element."""

    span: ClassVar[tuple[float, float]] = (-4.0, 4.0)
    """Where the examples draw floats from: inside the domain of f."""

    def infer(self, x: TensorType) -> TensorType:
        """Give x's shape."""
        return self._infer(x)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        """Give the operators the examples show; one with attributes shows several."""
        return (cls(),)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show odd sizes, 0-d, no elements, a run-time batch, a blocked layout with pad lanes, other dtypes."""
        first, *others = cls._variants()
        main = DType.F32 if DType.F32 in cls.takes else min(cls.takes & {DType.BOOL, DType.I32})
        types = [
            TensorType((2, 5, 3, 7), main),
            TensorType((), main),
            TensorType((3, 0, 2), main),
            TensorType((Dim.symbol("n", 3), 4), main),
            TensorType((2, 5, 3, 7), main, Layout("NCHW4c")),
        ]
        types += [TensorType((3, 5), d) for d in (DType.F64, DType.F16, DType.I64, DType.I8) if d in cls.takes]
        for type_ in types:
            yield cls._example(first, type_)
        for op in others:
            yield cls._example(op, types[0])

    @classmethod
    def _example(cls, op: Op, type_: TensorType) -> Example:
        if not type_.dtype.is_float:
            return Example(op, (type_,))
        low, high = cls.span

        def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
            return (rng.uniform(low, high, type_.static_shape).astype(type_.dtype.numpy),)

        return Example(op, (type_,), draw)


# Activations


class Relu(_Unary):
    """y = max(x, 0); NaN stays NaN."""

    takes = SIGNED

    def _numpy(self, x: np.ndarray) -> Any:
        return np.maximum(x, 0)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x < 0, te.const(0, dtype), x)


@dataclass(frozen=True)
class Clip(_Unary):
    """y = min(max(x, low), high); None is no bound, and high wins where low > high."""

    low: float | None = None
    high: float | None = None
    takes = NUMBERS

    def infer(self, x: TensorType) -> TensorType:
        """Give x's type; the bounds must be numbers of x's dtype."""
        for bound in (self.low, self.high):
            if bound is None or (x.dtype.is_float and not math.isnan(bound)):
                continue
            info = np.iinfo(x.dtype.numpy) if x.dtype.is_integer else None
            if info is None or bound != int(bound) or not info.min <= bound <= info.max:
                raise ShapeError(f"clip: bound {bound} is no number of x : {x}")
        return self._infer(x)

    def _numpy(self, x: np.ndarray) -> Any:
        y = x if self.low is None else np.maximum(x, x.dtype.type(self.low))
        return y if self.high is None else np.minimum(y, x.dtype.type(self.high))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        y = x
        if self.low is not None:
            low = te.const(self.low, dtype)
            y = te.select(y < low, low, y)
        if self.high is not None:
            high = te.const(self.high, dtype)
            y = te.select(y > high, high, y)
        return y

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(-1, 2), cls(0, 6), cls(None, 1), cls(-2, None), cls(2, 1))


@dataclass(frozen=True)
class LeakyRelu(_Unary):
    """y = x if x >= 0, else alpha * x."""

    alpha: float = 0.01

    def _numpy(self, x: np.ndarray) -> Any:
        return np.where(x < 0, self.alpha * x, x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x < 0, x * self.alpha, x)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(0.125), cls())


@dataclass(frozen=True)
class ThresholdedRelu(_Unary):
    """y = x if x > alpha, else 0."""

    alpha: float = 1.0

    def _numpy(self, x: np.ndarray) -> Any:
        return np.where(x > self.alpha, x, 0)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x > self.alpha, x, te.const(0, dtype))


@dataclass(frozen=True)
class Elu(_Unary):
    """y = x if x >= 0, else alpha * (e^x - 1)."""

    alpha: float = 1.0

    def _numpy(self, x: np.ndarray) -> Any:
        return np.where(x < 0, self.alpha * np.expm1(x), x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x < 0, te.expm1(x) * self.alpha, x)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(0.5))


@dataclass(frozen=True)
class Selu(_Unary):
    """y = gamma * (x if x > 0, else alpha * (e^x - 1))  (Klambauer et al., NeurIPS 2017)."""

    alpha: float = 1.6732632423543772
    gamma: float = 1.0507009873554805

    def _numpy(self, x: np.ndarray) -> Any:
        return self.gamma * np.where(x > 0, x, self.alpha * np.expm1(x))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x > 0, x, te.expm1(x) * self.alpha) * self.gamma


@dataclass(frozen=True)
class Celu(_Unary):
    """y = max(x, 0) + min(0, alpha * (e^(x / alpha) - 1))."""

    alpha: float = 1.0

    def infer(self, x: TensorType) -> TensorType:
        """Give x's type; alpha divides, so it is not 0."""
        if self.alpha == 0:
            raise ShapeError("celu: alpha is 0, but x is divided by it")
        return self._infer(x)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.maximum(x, 0) + np.minimum(0, self.alpha * np.expm1(x / self.alpha))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        zero = te.const(0, dtype)
        return te.maximum(x, zero) + te.minimum(zero, te.expm1(x / self.alpha) * self.alpha)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(0.5))


class Sigmoid(_Unary):
    """y = 1 / (1 + e^-x)."""

    def _numpy(self, x: np.ndarray) -> Any:
        return _sigmoid(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.sigmoid(x)


@dataclass(frozen=True)
class HardSigmoid(_Unary):
    """y = min(max(alpha * x + beta, 0), 1)."""

    alpha: float = 0.2
    beta: float = 0.5

    def _numpy(self, x: np.ndarray) -> Any:
        return np.clip(self.alpha * x + self.beta, 0, 1)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return _unit_clip(te, dtype, x * self.alpha + self.beta)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(1 / 6, 0.5))


class HardSwish(_Unary):
    """y = x * min(max(x / 6 + 1/2, 0), 1)  (MobileNetV3, section 5.2)."""

    def _numpy(self, x: np.ndarray) -> Any:
        return x * np.clip(x * (1 / 6) + 0.5, 0, 1)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return x * _unit_clip(te, dtype, x * (1 / 6) + 0.5)


@dataclass(frozen=True)
class Silu(_Unary):
    """y = x * sigmoid(alpha * x), also called swish."""

    alpha: float = 1.0

    def _numpy(self, x: np.ndarray) -> Any:
        return x * _sigmoid(x if self.alpha == 1 else self.alpha * x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return x * te.sigmoid(x if self.alpha == 1 else x * self.alpha)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(1.5))


@dataclass(frozen=True)
class Gelu(_Unary):
    """y = x * P(normal <= x): x/2 * (1 + erf(x / sqrt 2)), or with "tanh" its approximation.

    The approximation is x/2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) (Hendrycks and Gimpel 2016).
    """

    approximate: str = "none"

    def infer(self, x: TensorType) -> TensorType:
        """Give x's type."""
        if self.approximate not in ("none", "tanh"):
            raise ShapeError(f'gelu: approximate is "none" or "tanh", not {self.approximate!r}')
        return self._infer(x)

    def _numpy(self, x: np.ndarray) -> Any:
        if self.approximate == "none":
            return 0.5 * x * (1 + _erf(x * math.sqrt(0.5)))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        if self.approximate == "none":
            return x * 0.5 * (te.erf(x * math.sqrt(0.5)) + 1)
        return x * 0.5 * (te.tanh((x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)) + 1)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls("tanh"))


class Mish(_Unary):
    """y = x * tanh(softplus(x))."""

    def _numpy(self, x: np.ndarray) -> Any:
        return x * np.tanh(_softplus(x))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2); above 20 it is 1 in every dtype.
        e = te.exp(te.select(x > 20, te.const(20, dtype), x))
        grown = e * (e + 2)
        return x * te.select(x > 20, te.const(1, dtype), grown / (grown + 2))

    span = (-8.0, 30.0)


class Softplus(_Unary):
    """y = log(1 + e^x)."""

    span = (-30.0, 30.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return _softplus(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x > 0, x, te.const(0, dtype)) + te.log1p(te.exp(-te.abs(x)))


class Softsign(_Unary):
    """y = x / (1 + |x|)."""

    def _numpy(self, x: np.ndarray) -> Any:
        return x / (1 + np.abs(x))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return x / (te.abs(x) + 1)


@dataclass(frozen=True)
class Shrink(_Unary):
    """y = x - bias if x > threshold, x + bias if x < -threshold, else 0."""

    threshold: float = 0.5
    bias: float = 0.0

    def _numpy(self, x: np.ndarray) -> Any:
        return np.where(x < -self.threshold, x + self.bias, np.where(x > self.threshold, x - self.bias, 0))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        above = te.select(x > self.threshold, x - self.bias, te.const(0, dtype))
        return te.select(x < -self.threshold, x + self.bias, above)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(1.5, 1.0))


# Elementary functions


class Neg(_Unary):
    """y = -x."""

    takes = SIGNED

    def _numpy(self, x: np.ndarray) -> Any:
        return -x

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return -x


class Abs(_Unary):
    """y = |x|; the smallest integer, which has no positive, stays itself."""

    takes = SIGNED

    def _numpy(self, x: np.ndarray) -> Any:
        return np.abs(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.abs(x)


class Sign(_Unary):
    """y = 1 if x > 0, -1 if x < 0, else x (0 or NaN)."""

    takes = SIGNED

    def _numpy(self, x: np.ndarray) -> Any:
        return np.sign(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x > 0, te.const(1, dtype), te.select(x < 0, te.const(-1, dtype), x))


class Floor(_Unary):
    """y = the largest integer <= x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.floor(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.floor(x)


class Ceil(_Unary):
    """y = the smallest integer >= x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.ceil(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.ceil(x)


class Round(_Unary):
    """y = the integer nearest to x, the even one of two."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.round(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.round(x)


class Reciprocal(_Unary):
    """y = 1 / x."""

    span = (0.25, 4.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return 1 / x

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.const(1, dtype) / x


class Sqrt(_Unary):
    """y = the square root of x."""

    span = (0.0, 4.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.sqrt(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.sqrt(x)


class Rsqrt(_Unary):
    """y = 1 / sqrt(x)."""

    span = (0.25, 4.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return 1 / np.sqrt(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.const(1, dtype) / te.sqrt(x)


class Exp(_Unary):
    """y = e^x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.exp(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.exp(x)


class Log(_Unary):
    """y = ln x."""

    span = (0.01, 4.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.log(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.log(x)


class Erf(_Unary):
    """y = 2 / sqrt(pi) * integral of e^(-t^2) from 0 to x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return _erf(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.erf(x)


class Sin(_Unary):
    """y = sin x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.sin(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.sin(x)


class Cos(_Unary):
    """y = cos x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.cos(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.cos(x)


class Tan(_Unary):
    """y = tan x."""

    span = (-1.5, 1.5)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.tan(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.tan(x)


class Asin(_Unary):
    """y = the angle in [-pi/2, pi/2] whose sine is x."""

    span = (-1.0, 1.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.arcsin(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.asin(x)


class Acos(_Unary):
    """y = the angle in [0, pi] whose cosine is x."""

    span = (-1.0, 1.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.arccos(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.acos(x)


class Atan(_Unary):
    """y = the angle in (-pi/2, pi/2) whose tangent is x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.arctan(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.atan(x)


class Sinh(_Unary):
    """y = (e^x - e^-x) / 2."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.sinh(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.sinh(x)


class Cosh(_Unary):
    """y = (e^x + e^-x) / 2."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.cosh(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.cosh(x)


class Tanh(_Unary):
    """y = (e^x - e^-x) / (e^x + e^-x)."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.tanh(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.tanh(x)


class Asinh(_Unary):
    """y = the number whose sinh is x."""

    def _numpy(self, x: np.ndarray) -> Any:
        return np.arcsinh(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.asinh(x)


class Acosh(_Unary):
    """y = the number >= 0 whose cosh is x."""

    span = (1.0, 4.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.arccosh(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.acosh(x)


class Atanh(_Unary):
    """y = the number whose tanh is x."""

    span = (-0.99, 0.99)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.arctanh(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.atanh(x)


# Predicates and bits


class IsNan(_Unary):
    """y = whether x is no number."""

    gives = DType.BOOL

    def _numpy(self, x: np.ndarray) -> Any:
        return np.isnan(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.isnan(x)


@dataclass(frozen=True)
class IsInf(_Unary):
    """y = whether x is -infinity (if `negative`) or +infinity (if `positive`)."""

    negative: bool = True
    positive: bool = True
    gives = DType.BOOL

    def _numpy(self, x: np.ndarray) -> Any:
        return (np.isneginf(x) & self.negative) | (np.isposinf(x) & self.positive)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        found = te.isinf(x)
        if not self.negative:
            found = te.logical_and(found, x > 0)
        return found if self.positive else te.logical_and(found, x < 0)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(negative=False), cls(positive=False))


class Not(_Unary):
    """y = not x."""

    takes = BOOLS

    def _numpy(self, x: np.ndarray) -> Any:
        return np.logical_not(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.logical_not(x)


class BitwiseNot(_Unary):
    """y = x with every bit flipped."""

    takes = INTEGERS

    def _numpy(self, x: np.ndarray) -> Any:
        return ~x

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return ~x


def _unit_clip(te: Any, dtype: DType, x: Any) -> Any:
    """Clip to [0, 1]; NaN stays NaN."""
    y = te.select(x < 0, te.const(0, dtype), x)
    return te.select(y > 1, te.const(1, dtype), y)


def _sigmoid(x: np.ndarray) -> Any:
    return 1 / (1 + np.exp(-x))


def _softplus(x: np.ndarray) -> Any:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def _erf(x: np.ndarray) -> np.ndarray:
    """Numpy has none: the C library's, element by element, in f64."""
    values = map(math.erf, x.ravel().tolist())
    return np.fromiter(values, np.float64, x.size).reshape(x.shape).astype(x.dtype)


# ONNX

_PLAIN = {
    "IsNaN": IsNan,
    **{
        op.__name__: op
        for op in (
            *(Relu, Sigmoid, HardSwish, Mish, Softplus, Softsign, Neg, Abs, Sign, Floor, Ceil, Round, Reciprocal),
            *(Sqrt, Exp, Log, Erf, Sin, Cos, Tan, Asin, Acos, Atan, Sinh, Cosh, Tanh, Asinh, Acosh, Atanh),
            *(Not, BitwiseNot),
        )
    },
}
"""ONNX operators without attributes."""

_ATTRIBUTES: dict[str, tuple[type[Op], dict[str, float]]] = {
    "LeakyRelu": (LeakyRelu, {"alpha": 0.01}),
    "ThresholdedRelu": (ThresholdedRelu, {"alpha": 1.0}),
    "Elu": (Elu, {"alpha": 1.0}),
    "Selu": (Selu, {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}),
    "Celu": (Celu, {"alpha": 1.0}),
    "HardSigmoid": (HardSigmoid, {"alpha": 0.2, "beta": 0.5}),
    "Swish": (Silu, {"alpha": 1.0}),
    "Shrink": (Shrink, {"lambd": 0.5, "bias": 0.0}),
}
"""ONNX operators with attributes, given in the order of the operator's fields, and ONNX's defaults."""


@onnx(*_PLAIN)
def _plain(node: ForeignNode, x: Value) -> Value:
    return call(_PLAIN[node.op_type](), x)


@onnx(*_ATTRIBUTES)
def _with_attributes(node: ForeignNode, x: Value) -> Value:
    op, defaults = _ATTRIBUTES[node.op_type]
    return call(op(*(float(node.attr(name, default)) for name, default in defaults.items())), x)


@onnx("IsInf")
def _is_inf(node: ForeignNode, x: Value) -> Value:
    negative = bool(node.attr("detect_negative", 1))
    positive = bool(node.attr("detect_positive", 1))
    return call(IsInf(negative, positive), x)


@onnx("Gelu")
def _gelu(node: ForeignNode, x: Value) -> Value:
    return call(Gelu(node.attr("approximate", "none")), x)
